"""The database of a study, and all access to what Optuna keeps private. Imports `trials` and below.

A team of workers can trust it: outages are waited for, nothing evaluated is lost, slots are exact.
"""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.study.storage.opening import check_storage, in_memory, is_new, open_storage, study_names
    from moeopt.study.storage.urls import anywhere, hidden, readable_errors, scrub

__all__ = [
    "anywhere",
    "check_storage",
    "hidden",
    "in_memory",
    "is_new",
    "open_storage",
    "readable_errors",
    "scrub",
    "study_names",
]

__getattr__ = lazily(
    __name__,
    {name: "urls" if name in ("anywhere", "hidden", "readable_errors", "scrub") else "opening" for name in __all__},
)
