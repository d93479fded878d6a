"""A comparison of optimisers as people read it: table, sentences, files, and a page with figures.

    comparison = moeopt.results.optimiser_comparison.compare(studies)
    print(*conclusions(comparison), sep=" ")
    save(comparison, "folder")

It takes `moeopt.results.optimiser_comparison`'s arrays; only the page needs plotly.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from moeopt.errors import ExportError
from moeopt.report.optimiser_comparison.conclusions import conclusions
from moeopt.report.optimiser_comparison.page import page
from moeopt.report.optimiser_comparison.record import record
from moeopt.report.optimiser_comparison.table import view
from moeopt.report.tables import csv_of, json_text, write
from moeopt.results.optimiser_comparison import OptimiserComparison

__all__ = ["conclusions", "page", "record", "save", "view"]

PAGE = "index.html"


def save(c: OptimiserComparison, folder: str | Path) -> Path | None:
    """Write optimisers.csv, studies.csv, comparison.json and, where plotly is installed, index.html, the page.

    Returns:
        Where the page is; None without plotly.

    Raises:
        ExportError: when the folder cannot be written.
    """
    folder, whole = Path(folder), record(c)
    files = {folder / f"{name}.csv": csv_of(whole[name]) for name in ("optimisers", "studies")}
    files[folder / "comparison.json"] = json_text(whole) + "\n"
    drawn = find_spec("plotly") is not None
    if drawn:
        files[folder / PAGE] = page(c)
    write(files, ExportError, folder=folder)
    return folder / PAGE if drawn else None
