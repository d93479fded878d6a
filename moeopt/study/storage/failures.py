"""How a storage says that a study is over, or is not as it was."""

from __future__ import annotations

from moeopt.errors import StorageError


class NoSlotLeft(Exception):
    """Every slot that the study shall have was started."""


class SetBack(StorageError):
    """The database was restored to an earlier state: trials that this process knows are not there, or others are."""

    def __init__(self) -> None:
        super().__init__("the database was set back to an earlier state while the study was searched; load it anew")


class StudyIsGone(StorageError):
    """The study was deleted, and its key may be another one's now."""

    def __init__(self) -> None:
        super().__init__("the study was deleted while it was searched")
