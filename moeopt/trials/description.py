"""What a study says of itself and of its trials, checked once, where it is read.

A study comes from a database that others write to. What moeopt takes from it is JSON; here it is held against a form,
so that the code behind may rely on keys and types, and whatever is of another form is one error that names the place.

`FORMAT` stands beside the version that wrote a study. It rises when an older moeopt would misread what is written, and
a reader refuses what is newer, naming both versions. Studies of moeopt 0.1.0 that have none are of format 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeopt import __version__
from moeopt.errors import MoeoptError, StorageError, StudyError
from moeopt.showing import shown
from moeopt.trials import genome
from moeopt.trials.objectives import LOSS, PREFIX, check_names, direction

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

DESCRIPTION = "moeopt"
"""User attribute of a study: the JSON description of model, task, space and sampler it was made with."""
FULL_MODEL = "full_model"
HELD = "held"
"""User attribute of a study: what the full model gives on its examples (`moeopt.study.reference`)."""
COMMAND = "command"
"""User attribute of a study that `moeopt search` made: the command, without its storage's password."""
SERVING = "serving"
"""User attribute of a study: which servers its plans are for, and what these ask for (`moeopt.spaces.serving`)."""
FORMAT = 1
DEEPEST = 64
"""Levels of objects and lists in a description."""
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
"""What Optuna raises on rows that hold something else than it wrote."""
ENQUEUED = "enqueued"
"""Operator, in a trial's origin, of one whose genotype, or part of it, a person gave."""
MAY_DIFFER = ("version", "format", "model.name_or_path")
"""Fields of the description that a resumed study need not share: the same weights may lie elsewhere."""


@dataclass(frozen=True)
class Of:
    """A JSON value that is no list or object: what to call it, and whether something is one."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A form whose value may be null or missing."""

    form: Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TEXT = Of("text", lambda value: isinstance(value, str))
FLAG = Of("true or false", lambda value: isinstance(value, bool))
COUNT = Of(
    "an integer from 0 to 2**53", lambda value: _is_number(value) and int is type(value) and 0 <= value <= 1 << 53
)
NUMBER = Of("a number", lambda value: _is_number(value) and (isinstance(value, float) or abs(value) <= 1 << 53))
FINITE = Of("a finite number", lambda value: NUMBER.holds(value) and math.isfinite(value))

STUDY = {
    "version": TEXT,
    "model": {"name_or_path": TEXT, "architecture": TEXT, "config_hash": TEXT, "weights": TEXT},
    "task": {
        "name": TEXT, "fingerprint": TEXT, "split": TEXT, "limit": Maybe(COUNT), "max_length": Maybe(COUNT),
        "examples": Maybe({TEXT: COUNT}),
    },
    "space": {
        "kind": TEXT, "keep": COUNT, "k": COUNT, "groups": [[COUNT]], "router": TEXT,
        "shape": {"layers": COUNT, "experts": COUNT, "k": COUNT, "router_groups": Maybe(COUNT)},
    },
    "sampler": {"name": Maybe(TEXT)},
    "pruner": Maybe({"class": Maybe(TEXT)}),
    "evaluation": Maybe(
        {
            "score": Maybe(TEXT), "top_p": Maybe(FINITE), "active_weight": Maybe(FINITE), "objectives": Maybe([TEXT]),
            "constraints": Maybe([TEXT]), "guards": Maybe([{"name": TEXT, "loss": FINITE}]),
        }
    ),
}  # fmt: skip
REFERENCE = {
    "of": TEXT, "score": TEXT, "loss": NUMBER, "penalty": FINITE, "accuracy": FINITE, "metrics": {TEXT: NUMBER},
    "active": FINITE, "examples": COUNT, "chance": Maybe(FINITE), "tokens": COUNT, "layer_tokens": COUNT,
    "seconds": FINITE, "warnings": [TEXT],
}  # fmt: skip
GAIN = {
    "trial": COUNT, "start": COUNT, "search": FINITE, "dev": FINITE, "low": FINITE, "high": FINITE, "examples": COUNT,
}  # fmt: skip
SERVED = {"on": [TEXT], "parallel": COUNT, "asks": [TEXT]}
TRIAL = {
    genome.ORIGIN: {
        "slot": Maybe(COUNT), "operator": Maybe(TEXT), "phase": Maybe(TEXT), "parents": Maybe([COUNT]),
        "plan": Maybe(TEXT), "notes": Maybe({}), "worker": Maybe({"pid": Maybe(COUNT)}),
    },
    genome.RETRIES: [COUNT],
    genome.SCORES: {"of": Maybe(TEXT), "active": Maybe(FINITE), "penalty": Maybe(FINITE)},
    "fixed_params": {},
}  # fmt: skip
"""System attributes of a trial, of those that moeopt reads."""


def check(value: Any, form: Any, where: str) -> None:
    """Raise StudyError, naming the first place that differs, unless a JSON value is of a form.

    Args:
        value: as `json.loads` gives it.
        form: an `Of`; a list of one form, that of all items; a dictionary of forms by key, further keys being free, or
            of one form by `TEXT`, that of all values; or a `Maybe` of one of these.
        where: what to call the value.
    """
    if isinstance(form, Maybe):
        if value is None:
            return
        form = form.form
    if isinstance(form, Of):
        if not form.holds(value):
            raise StudyError(f"{where} must be {form.words}, got {shown(value)}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise StudyError(f"{where} must be a list, got {shown(value)}")
        for i, item in enumerate(value):
            check(item, form[0], f"{where}[{i}]")
    else:
        if not isinstance(value, dict):
            raise StudyError(f"{where} must be an object, got {shown(value)}")
        every = form.get(TEXT)
        for key, item in value.items() if every is not None else ():
            check(item, every, f"{where}.{shown(key)}")
        for key, inner in form.items() if every is None else ():
            if key in value or not isinstance(inner, Maybe):
                check(value.get(key), inner, f"{where}.{key}")


def check_depth(value: Any, where: str, deepest: int = DEEPEST) -> None:
    """Raise StudyError when lists and objects stand in one another deeper than that."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > deepest:
            raise StudyError(f"{where} is nested deeper than {deepest} levels")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def check_format(record: Mapping[str, Any], where: str, version: Any) -> None:
    """Raise StudyError, naming the version that wrote it and this one, when something is of a newer format."""
    written = record.get("format", 1)
    if type(written) is not int or written < 1:
        raise StudyError(f"{where}.format must be an integer of at least 1, got {shown(written)}")
    if written > FORMAT:
        raise StudyError(
            f"{where} was written by moeopt {shown(version)} in format {written}; this is moeopt {__version__}, which "
            f"reads formats up to {FORMAT}: open it with a newer one"
        )


@contextmanager
def reading(study_name: str) -> Iterator[None]:
    """Turn what Optuna raises on rows that it did not write into one StorageError that names the study."""
    try:
        yield
    except MoeoptError:
        raise
    except DAMAGE as error:
        raise StorageError(
            f"study {shown(study_name)} is damaged and cannot be read: {type(error).__name__}: {shown(str(error))}"
        ) from None


def described(study: optuna.Study) -> dict[str, Any]:
    """The description that a study of moeopt keeps, of the form `STUDY`.

    Raises:
        StudyError: when moeopt did not make the study, a newer one did, or the description is of another form.
        StorageError: when the study cannot be read.
    """
    with reading(study.study_name):
        description = study.user_attrs.get(DESCRIPTION)
    name = f"study {shown(study.study_name)}"
    if description is None:
        raise StudyError(f"{name} does not say what it searched; moeopt did not make it")
    where = f"{name}: its attribute {DESCRIPTION!r}"
    if not isinstance(description, dict):
        raise StudyError(f"{where} must be an object, got {shown(description)}")
    check_format(description, where, description.get("version"))
    check_depth(description, where)
    check(description, STUDY, where)
    return description


def check_whole(study: optuna.Study) -> dict[str, Any]:
    """Read all of a study of moeopt, and raise unless description and trials are of a form that moeopt writes.

    Returns:
        Its description.

    Raises:
        StudyError: as `described`, when its directions are not those of its objectives, or a trial is not of that form.
        StorageError: when it cannot be read.
    """
    description = described(study)
    with reading(study.study_name):
        directions, trials, attrs = study.directions, study.get_trials(deepcopy=False), study.user_attrs
    names = objective_names(description)
    if [each.name.lower() for each in directions] != [direction(name) for name in names]:
        raise StudyError(
            f"study {shown(study.study_name)} does not {' and '.join(f'{direction(n)} {shown(n)}' for n in names)}, as "
            "it was made to"
        )
    for trial in trials:
        check_trial(trial, study.study_name, len(names))
    full_model(attrs, study.study_name)
    held_facts(attrs, study.study_name)
    serving(attrs, study.study_name)
    return description


def objective_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the objectives that a description holds, in the order of trials' values; the loss where none is.

    Raises:
        StudyError: when they are no objectives.
    """
    return check_names((description.get("evaluation") or {}).get("objectives") or [LOSS])


def full_model(attrs: Mapping[str, Any], study_name: str) -> dict[str, Any] | None:
    """What the user attributes of a study say of the full model, of the form `REFERENCE`; None where they do not.

    Raises:
        StudyError: when it is of another form.
    """
    return _facts(attrs, FULL_MODEL, REFERENCE, study_name)


def held_facts(attrs: Mapping[str, Any], study_name: str) -> dict[str, Any] | None:
    """What the user attributes of a study say of what held on dev, of the form `GAIN`; None where they do not.

    Raises:
        StudyError: when it is of another form.
    """
    facts = _facts(attrs, HELD, GAIN, study_name)
    if facts is not None and not facts["search"] > 0:
        raise StudyError(f"study {shown(study_name)}: {HELD!r}.search must be above 0, got {shown(facts['search'])}")
    return facts


def serving(attrs: Mapping[str, Any], study_name: str) -> dict[str, Any] | None:
    """What the user attributes of a study say of servers, of the form `SERVED`; None where they do not.

    Raises:
        StudyError: when it is of another form.
    """
    return _facts(attrs, SERVING, SERVED, study_name)


def _facts(attrs: Mapping[str, Any], key: str, form: dict[str, Any], study_name: str) -> dict[str, Any] | None:
    if key not in attrs:
        return None
    check(attrs[key], form, f"study {shown(study_name)}: its attribute {key!r}")
    return {name: attrs[key].get(name) for name in form}


def check_trial(trial: FrozenTrial, study_name: str, objectives: int = 1) -> None:
    """Raise StudyError, naming the trial, unless what moeopt reads of it is of the form that moeopt writes.

    Args:
        objectives: how many values a trial of its study has.
    """
    where = f"study {shown(study_name)}, trial {trial.number}"
    values = trial.values
    complete = trial.state.name == "COMPLETE"
    check(values, [NUMBER] if complete else Maybe([NUMBER]), f"{where}: its values")
    if values is not None and (len(values) != objectives or (complete and any(map(math.isnan, values)))):
        count = "one value" if objectives == 1 else f"{objectives} values"
        raise StudyError(f"{where}: a trial has {count}, of a completed one not NaN; got {shown(values)}")
    for key, value in trial.system_attrs.items():
        if key.startswith(PREFIX):
            check(value, NUMBER, f"{where}: {shown(key)}")
    for key, form in TRIAL.items():
        if key in trial.system_attrs:
            check_depth(trial.system_attrs[key], f"{where}: {key!r}")
            check(trial.system_attrs[key], form, f"{where}: {key!r}")
    origin, retries = trial.system_attrs.get(genome.ORIGIN) or {}, trial.system_attrs.get(genome.RETRIES) or []
    if (origin.get("slot") or 0) > trial.number:
        raise StudyError(f"{where}: {genome.ORIGIN!r}.slot must be at most its number, got {shown(origin['slot'])}")
    if any(number >= trial.number for number in retries):
        raise StudyError(f"{where}: {genome.RETRIES!r} must name earlier trials, got {shown(retries)}")


def number(attrs: Mapping[str, Any], key: str) -> Any:
    """A number among user attributes, which anyone may set; None where there is none, or something else."""
    value = attrs.get(key)
    return value if FINITE.holds(value) else None


def write(study: optuna.Study, description: Mapping[str, Any]) -> None:
    """Keep in a study what it is made with, and what tells it from others."""
    study.set_user_attr(DESCRIPTION, {"version": __version__, "format": FORMAT, **description})
    for key, value in summary(description).items():
        study.set_user_attr(key, value)


def summary(description: Mapping[str, Any]) -> dict[str, str | int]:
    """What tells studies apart, one user attribute each, for tables that cut the description short."""
    sampler, space, model = description["sampler"], description["space"], description["model"]
    seed = {"seed": sampler["seed"]} if isinstance(sampler.get("seed"), int) else {}
    return {
        "optimiser": str(sampler.get("name")),
        **seed,
        "task": str(description["task"].get("name")),
        "model": str(model.get("name_or_path")),
        "space": f"{space['kind']}, {space['keep']} of {space['shape']['experts']} experts"
        if "keep" in space
        else str(space["kind"]),
    }


def check_same(study: optuna.Study, description: Mapping[str, Any], hint: str = "") -> None:
    """Raise StudyError, naming the fields that differ, unless the study was made with this description.

    Args:
        description: as `write` takes it, or parts of it.
        hint: what to do instead, said at the end.
    """
    with reading(study.study_name):
        attrs = study.user_attrs
        empty = not attrs and not study.get_trials(deepcopy=False)
    if DESCRIPTION not in attrs:
        if not empty:
            raise StudyError(f"study {study.study_name!r} was not made by moeopt; choose another name")
        return
    check_parts(study, check_whole(study), description, hint)


def go_on(study: optuna.Study) -> str:
    """How a study goes on with its own sampler and pruner, to say after what is wrong."""
    if DESCRIPTION in study.user_attrs:
        how = f"moeopt.load_study({study.study_name!r}, storage) goes on with the study's own"
    else:
        how = "give optuna.load_study the sampler that the study was made with"
    return f". {how}; others need a study of their own"


def check_parts(study: optuna.Study, stored: Mapping[str, Any], description: Mapping[str, Any], hint: str) -> None:
    """Raise StudyError, naming what differs, unless what is stored of a study agrees with parts of a description."""
    differences = [each for each in differences_of(stored, description) if each[0] not in MAY_DIFFER]
    for part, kind in (("sampler", "name"), ("pruner", "class")):
        if any(path == f"{part}.{kind}" for path, _, _ in differences):  # its hyperparameters differ, too
            differences = [d for d in differences if d[0] == f"{part}.{kind}" or not d[0].startswith(f"{part}.")]
    if differences:
        listed = "; ".join(f"{path}: study has {shown(old)}, now {shown(new)}" for path, old, new in differences)
        raise StudyError(f"study {study.study_name!r} cannot be resumed with something else. {listed}{hint}")


def differences_of(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, old and new value of every field in which two descriptions differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences_of(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new and not (isinstance(old, list) and isinstance(new, (list, tuple)) and old == list(new)):
        yield path, old, new
