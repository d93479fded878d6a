"""Storages that a team of workers can trust: outages are waited for, nothing evaluated is lost, slots are exact."""

from moeopt.study.storage.opening import check_storage, in_memory, is_new, open_storage
from moeopt.study.storage.resilient import ResilientStorage, study_names
from moeopt.study.storage.urls import anywhere, hidden, readable_errors, scrub

__all__ = [
    "ResilientStorage",
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
