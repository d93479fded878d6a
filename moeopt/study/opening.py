"""Studies that are there: opened, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, NopPruner

from moeopt.errors import MoeoptError, StudyError, got, nearest
from moeopt.samplers import UnknownSampler, from_settings
from moeopt.showing import line, shown
from moeopt.spaces import space_of
from moeopt.study.storage import attributes, check_storage, hidden, open_storage, readable_errors, study_names
from moeopt.trials.description import check_whole, described, go_on, reading

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

LONGEST_NAME = 512
"""Characters of a study's name, as Optuna's tables hold it."""


def find(storage: BaseStorage | None, study_name: str | None) -> optuna.Study | None:
    """The study of that name, None where there is none."""
    if storage is None or study_name is None:
        return None
    try:
        return optuna.load_study(study_name=study_name, storage=storage)
    except KeyError:
        return None


def load_study(study_name: str, storage: str | BaseStorage) -> optuna.Study:
    """Open a study of moeopt; all of it is read and checked, and it goes on with its own sampler and pruner.

    These are rebuilt from the study. Where they cannot be (an object of Optuna's, code of your own), the study can
    be read and exported, and a trial that it would start is refused: `create_study` takes the object again.

    Raises:
        StudyError: when there is no such study (the nearest name is suggested), moeopt did not make it, a newer one
            did, or a trial is not of the form that moeopt writes.
        StorageError: when the storage cannot be opened, or the study is damaged.
    """
    study = read_study(study_name, storage)
    with readable_errors(storage):
        study.sampler, study.pruner = _rebuilt(study)
    return study


def read_study(study_name: str, storage: str | BaseStorage) -> optuna.Study:
    """Open a study of moeopt to read it, as `load_study` does; nothing of it is rebuilt, and it starts no trials."""
    check_storage(storage)
    if not isinstance(study_name, str):
        raise StudyError(f"a study has a name, a text, got {got(study_name)}")
    opened = open_storage(storage, create=False) if isinstance(storage, str) else storage
    with readable_errors(storage):
        study = find(opened, study_name)
        if study is None:
            with reading(study_name):
                names = study_names(opened)
            hint = nearest(study_name, [str(name) for name in names])
            raise StudyError(f"no study {study_name!r} in {hidden(storage)}{hint}")
        check_whole(study)
    study.sampler = UnknownSampler(f"study {study_name!r} was opened to be read{go_on(study)}")
    return study


def check_name(study_name: object) -> None:
    """Raise StudyError unless a new study may be called so: a name can be typed again, and told from others."""
    if not isinstance(study_name, str):
        raise StudyError(f"a study's name is a text, got {got(study_name)}")
    if not study_name.strip() or study_name != study_name.strip() or not study_name.isprintable():
        raise StudyError(
            "a study's name must be printable, and neither empty nor begin or end with white space, got "
            f"{shown(study_name)}"
        )
    if len(study_name) > LONGEST_NAME:
        raise StudyError(f"a study's name has at most {LONGEST_NAME} characters, got {len(study_name)}")


def _described_pruner(description: dict[str, Any] | None) -> BasePruner:
    """The pruner of a description; the first versions had none."""
    from moeopt.study import recipe

    return NopPruner() if description is None else recipe.pruner_from(description)


def _rebuilt(study: optuna.Study) -> tuple[BaseSampler, BasePruner]:
    """The study's sampler and pruner, rebuilt; a sampler that starts nothing, with the reason, where one cannot be."""
    from moeopt.study import recipe as recipes

    name = study.study_name
    try:
        about, recipe = described(study), recipes.stored(study)
        space = space_of(study)
        sampler = recipes.sampler_of(recipe, space) if recipe else from_settings(about["sampler"], space)
        pruner = recipes.pruner_of(recipe) if recipe else _described_pruner(about.get("pruner"))
        attributes.check_sampler(study, sampler.settings())
    except MoeoptError as error:
        why = (
            f"the sampler or the pruner of study {name!r} cannot be rebuilt from it: {line(str(error), 300)}. Pass the "
            f"object that it was made with again, sampler=... or pruner=..., to moeopt.create_study({name!r}, "
            "objective=..., storage=..., load_if_exists=True) or moeopt.run_worker"
        )
        return UnknownSampler(why), NopPruner()
    return sampler, pruner
