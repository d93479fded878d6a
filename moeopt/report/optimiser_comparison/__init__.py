"""A comparison of optimisers as people read it: table, sentences, files, and a page with figures.

    comparison = moeopt.results.optimiser_comparison.compare(studies)
    print(*conclusions(comparison), sep=" ")
    save(comparison, "folder")

It takes `moeopt.results.optimiser_comparison`'s arrays; only the page needs plotly.
"""

from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.optimiser_comparison.files import save
from moeopt.report.optimiser_comparison.page import page
from moeopt.report.optimiser_comparison.record import record
from moeopt.report.optimiser_comparison.table import view

__all__ = ["conclusions", "page", "record", "save", "view"]
