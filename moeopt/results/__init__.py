"""Results of studies and models, as arrays and dataclasses: selection, comparisons, profiles.

It may import rooms up to `study` and `exporting`; `moeopt.report` shows and saves what is here.
"""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.results import analysis, method_comparison, optimiser_comparison, profiling, selection, similarity

__all__ = ["analysis", "method_comparison", "optimiser_comparison", "profiling", "selection", "similarity"]

__getattr__ = lazily(__name__, {}, __all__)
