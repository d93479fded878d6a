"""What can be judged before anything is read or evaluated."""

from __future__ import annotations

from collections.abc import Sequence

from moeopt.errors import MethodError, StudyError
from moeopt.methods.names import parsed

TOP = 20
"""Points of the front that are judged on dev, unless said otherwise."""
METHODS = ("reap", "frequency", "ean", "loss_aware")
"""One-shot methods whose uniform plans a front is held against, unless others are named."""


def check_arguments(methods: Sequence[str], **counts: int | None) -> None:
    """Raise StudyError or MethodError unless `front_of` can take these."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise StudyError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(methods, str):
        raise MethodError(f"methods must be a list of names, such as [{methods!r}], got {methods!r}")
    for method in methods:
        if not parsed(method).prunes:
            raise MethodError(f"a front is held against methods that prune, as {', '.join(METHODS)} do; got {method!r}")
