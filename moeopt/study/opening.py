"""Studies that are there: opened, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optuna

from moeopt.description import DESCRIPTION, check_whole, described, reading
from moeopt.errors import SpaceError, StudyError
from moeopt.showing import line
from moeopt.spaces import Space, from_description
from moeopt.storage import hidden, open_storage, readable_errors, study_names

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def find(storage: BaseStorage | None, study_name: str | None) -> optuna.Study | None:
    """The study of that name, None where there is none."""
    if storage is None or study_name is None:
        return None
    try:
        return optuna.load_study(study_name=study_name, storage=storage)
    except KeyError:
        return None


def load_study(study_name: str, storage: str | BaseStorage) -> optuna.Study:
    """Open a study of moeopt to read it; all of it is read and checked.

    Raises:
        StudyError: when there is no such study (the nearest name is suggested), moeopt did not make it, a newer one
            did, or a trial is not of the form that moeopt writes.
        StorageError: when the storage cannot be opened, or the study is damaged.
    """
    from moeopt.errors import nearest

    opened = open_storage(storage, create=False) if isinstance(storage, str) else storage
    with readable_errors(storage):
        study = find(opened, study_name)
        if study is None:
            with reading(study_name):
                names = study_names(opened)
            hint = nearest(study_name, [str(name) for name in names])
            raise StudyError(f"no study {study_name!r} in {hidden(storage)}{hint}")
        check_whole(study)
    return study


def space_of(study: optuna.Study) -> Space:
    """The space that a study of moeopt searches, rebuilt from its description.

    Raises:
        StudyError: when moeopt did not make the study, a newer one did, or no space is described so.
    """
    description = described(study)["space"]
    try:
        return from_description(description)
    except SpaceError as error:
        raise StudyError(
            f"study {study.study_name!r}: its attribute {DESCRIPTION!r}.space: {line(str(error), 500)}"
        ) from None
