"""What a study holds so that a worker anywhere can rebuild its objective and sampler; only the checkpoint is missing.

Kept in system attributes of the study, compressed JSON in pieces: how trials are evaluated, the sampler and the pruner
by name and settings, and the task's examples in use (`moeopt.study.recorded_tasks`). No code and no path is in it. What
cannot be kept is missing with a reason, and a worker is given it. `get_study_system_attrs`, which dashboards poll,
takes 4 ms a MiB longer (SQLite, PostgreSQL and MariaDB on the same machine); 64 examples of BoolQ are 20 KiB.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.errors import MoeoptError, SamplerError, StudyError, TaskError
from moeopt.study import guards
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.description import FLAG, TEXT, Maybe, Of, check

if TYPE_CHECKING:
    import optuna
    from optuna.pruners import BasePruner

    from moeopt.samplers import GenomeSampler
    from moeopt.spaces import Space
    from moeopt.study.guards import Guard
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task

RECIPE = "moeopt:recipe"
WANTED = "moeopt:wanted"
PATIENCE = "moeopt:patience"
VERSION = 1
LARGEST = 8 << 20
"""Characters of a packed recipe; a larger one is not kept."""
UNPACKED = 64 << 20
"""Bytes of its JSON."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _at_most(largest: float, *kinds: type) -> Of:
    """A number of these types that is believed; a flag is none."""
    return Of(f"a number from 0 to {largest:g}", lambda value: type(value) in kinds and 0 <= value <= largest)


SETTINGS: dict[str, Any] = {
    "split": TEXT, "limit": Maybe(_at_most(1 << 30, int)), "max_length": Maybe(_at_most(1 << 24, int)),
    "batch_tokens": Maybe(_at_most(1 << 24, int)), "rungs": Maybe(_at_most(1 << 12, int)), "report": Maybe(TEXT),
    "active_weight": Maybe(_at_most(1e9, int, float)), "prefix_memory": Maybe(_at_most(1 << 44, int)),
    "score": Maybe(TEXT), "top_p": Maybe(_at_most(1, int, float)), "memory": Maybe(_at_most(1 << 44, int)),
    "reference": Maybe(FLAG), "guide": Maybe(_at_most(1, int, float)),
    "objectives": Maybe([TEXT]), "constraints": Maybe([TEXT]),
}  # fmt: skip
"""Settings of an objective that a recipe holds."""
FORM = {
    "model": Maybe(Of("a hub id", lambda value: isinstance(value, str) and bool(_HUB_ID.fullmatch(value)))),
    "dtype": TEXT, "objective": SETTINGS, "scored": TEXT, "missing": {TEXT: TEXT}, "task": Maybe({}),
    "sampler": Maybe({}), "pruner": Maybe({}), "guards": Maybe([{"tasks": {TEXT: {}}}]),
}  # fmt: skip
MAY_BE_NONE = ("limit", "max_length", "prefix_memory")
COMPRESSION = ("top_p", "memory")


@dataclass(frozen=True)
class Recipe:
    """A study's recipe, in JSON types; whatever is None has a reason in `missing`.

    Attributes:
        model: the hub id that the model was loaded from.
        dtype: of its weights.
        objective: settings of the objective.
        scored: `Evaluator.fingerprint` of what it evaluates.
        task: from `moeopt.study.recorded_tasks.keep`.
        sampler: settings, and start vector where it is not the space's own.
        pruner: `describe` of the pruner.
        missing: by field, why it is not there.
        guards: from `moeopt.study.guards.keep`; none where the study has none.
    """

    model: str | None
    dtype: str
    objective: dict[str, Any]
    scored: str
    task: dict[str, Any] | None
    sampler: dict[str, Any] | None
    pruner: dict[str, Any] | None
    missing: dict[str, str]
    guards: list[dict[str, Any]] | None = None


def made(objective: Objective, sampler: GenomeSampler, pruner: BasePruner) -> Recipe:
    """The recipe of a study that is about to be made."""
    from moeopt.samplers import from_settings
    from moeopt.samplers.shadow import describe
    from moeopt.study.recorded_tasks import Use, keep

    missing: dict[str, str] = {}
    settings, task = objective.settings, None
    try:
        use = Use(settings["split"], objective.tokenizer, settings["limit"], objective.evaluator.max_length)
        task = keep(objective.task, use)
    except TaskError as error:
        missing["task"] = str(error)
    guarded = None
    try:
        guarded = [
            guards.keep(guard, objective.tokenizer, objective.evaluator.max_length) for guard in objective.guards.guards
        ] or None
    except TaskError as error:
        missing["guards"] = str(error)
    chosen: dict[str, Any] | None = {"settings": sampler.settings()}
    start = getattr(sampler, "x0", None)
    if start is not None:
        chosen |= genome.pack("start", start)  # type: ignore[operator]
    try:
        if type(from_settings(sampler.settings(), objective.space, start)) is not type(sampler):
            raise SamplerError(f"sampler {type(sampler).__name__} is code of its own")
    except SamplerError as error:
        chosen, missing["sampler"] = None, str(error)
    described: dict[str, Any] | None = describe(pruner)
    try:
        json.dumps(described, allow_nan=False)
        pruner_from(described)
    except (StudyError, ValueError) as error:
        described, missing["pruner"] = None, str(error)
    name = str(getattr(objective.model.config, "_name_or_path", ""))
    hub = _HUB_ID.fullmatch(name) and not Path(name).exists()
    missing |= {} if hub else {"model": "it was a folder of the machine that made the study"}
    dtype = str(next(objective.model.parameters()).dtype).removeprefix("torch.")
    scored = objective.evaluator.fingerprint
    recipe = Recipe(name if hub else None, dtype, settings, scored, task, chosen, described, missing, guarded)
    for part in ("guards", "task"):
        if getattr(recipe, part) is not None and _too_large(recipe):
            missing[part] = f"its examples are too many to keep (over {LARGEST >> 20} MiB): set a limit"
            recipe = replace(recipe, **{part: None})  # type: ignore[arg-type]
    return recipe


def write(study: optuna.Study, objective: Objective, sampler: GenomeSampler, pruner: BasePruner) -> None:
    """Keep the recipe in a study, unless it has one."""
    if RECIPE not in attributes.study_attributes(study):
        attributes.write_study(study, _packed(made(objective, sampler, pruner)))


def read(study: optuna.Study) -> Recipe:
    """The recipe of a study.

    Raises:
        StudyError: when it has none, or one that is damaged, hostile, or of a newer moeopt.
    """
    attrs, named = attributes.study_attributes(study), f"study {study.study_name!r}"
    head = attrs.get(RECIPE)
    if head is None:
        raise StudyError(f"{named} was made by an older moeopt, or not by create_study: resume it with moeopt search")
    if not isinstance(head, dict) or head.get("v") != VERSION:
        version = head.get("v") if isinstance(head, dict) else head
        raise StudyError(f"the recipe of {named} is of version {version!r:.40}; this moeopt reads {VERSION}")
    try:
        size = head["bytes"]
        if type(size) is not int or not 0 < size <= UNPACKED:
            raise ValueError(f"{size!r:.40} bytes")
        return _checked(json.loads(genome.unpack_bytes(RECIPE, attrs, size), parse_constant=_no_constant))
    except genome.DAMAGE as error:
        raise StudyError(f"the recipe of {named} is damaged: {type(error).__name__}: {error!s:.200}") from None


def stored(study: optuna.Study) -> Recipe | None:
    """`read`; None for a study that has none."""
    return read(study) if RECIPE in attributes.study_attributes(study) else None


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe holds, with one split.

    Raises:
        StudyError: when it holds none, with the reason, or one that is damaged.
    """
    from moeopt.study.recorded_tasks import restored

    if recipe.task is None:
        why = recipe.missing.get("task", "for no reason given")
        raise StudyError(f"the study does not hold its task ({why}): give it, as to the search")
    try:
        return restored(recipe.task, recipe.objective["split"])
    except TaskError as error:
        raise StudyError(str(error)) from None


def arguments(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of the objective; raises as `guards_of`."""
    from moeopt.evaluation import Compression

    given = {key: value for key, value in recipe.objective.items() if key not in COMPRESSION}
    compression = {key: recipe.objective[key] for key in COMPRESSION if key in recipe.objective}
    if compression:
        given["compression"] = Compression(**compression)
    if guarded := guards_of(recipe):
        given["guards"] = guarded
    return given


def guards_of(recipe: Recipe) -> list[Guard]:
    """The guards that a recipe holds, each with the splits of its task that were there.

    Raises:
        StudyError: when the study has guards that it does not hold, with the reason, or they are damaged.
    """
    if "guards" in recipe.missing:
        why = recipe.missing["guards"]
        raise StudyError(f"the study does not hold its guards ({why}): go on with the search that made it")
    return [guards.restored(record) for record in recipe.guards or ()]


def sampler_of(recipe: Recipe, space: Space) -> GenomeSampler:
    """The sampler that a recipe names.

    Raises:
        StudyError: when it names none, with the reason, or what it says is not a sampler's settings.
    """
    from moeopt.samplers import from_settings

    settings = _given(recipe, "sampler")
    try:
        return from_settings(settings["settings"], space, genome.unpack("start", settings))
    except (MoeoptError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"the sampler kept in the study cannot be used: {error!s:.300}") from None


def pruner_of(recipe: Recipe) -> BasePruner:
    """The pruner that a recipe names.

    Raises:
        StudyError: when it names none, with the reason, or what it says is not a pruner's settings.
    """
    return pruner_from(_given(recipe, "pruner"))


def _given(recipe: Recipe, part: str) -> Any:
    value = getattr(recipe, part)
    if value is None:
        why = recipe.missing.get(part, "for no reason given")
        raise StudyError(f"the study does not hold its {part} ({why}); moeopt.run_worker({part}=...) takes it")
    return value


def pruner_from(described: Any) -> BasePruner:
    """The pruner, racing or Optuna's own, of which `describe` says this.

    Raises:
        StudyError: when it says this of none.
    """
    import optuna

    from moeopt.samplers.racing import RacingPruner
    from moeopt.samplers.shadow import describe

    kinds = [RacingPruner, *(getattr(optuna.pruners, name) for name in optuna.pruners.__all__)]
    named = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds if kind is not optuna.pruners.BasePruner}
    try:
        kind = named[described["class"]]
        given = {key: pruner_from(v) if isinstance(v, dict) else v for key, v in described.items() if key != "class"}
        pruner: BasePruner = kind(**given)
        if describe(pruner) == described:
            return pruner
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        pass
    raise StudyError(f"the pruner is not one that is known by name: {described!r:.200}")


def want(study: optuna.Study, trials: int | None, patience: int | None = None) -> None:
    """Note when a study is done, for the workers that join it: `trials` and `patience` of `moeopt.optimize`."""
    if (wanted(study), patience_of(study)) != (trials, patience):
        attributes.write_study(study, {WANTED: trials, PATIENCE: patience})


def wanted(study: optuna.Study) -> int | None:
    """How many finished trials a study shall hold, as it was last said; None when it never was."""
    return _count(study, WANTED)


def patience_of(study: optuna.Study) -> int | None:
    """After how many trials without a better one a study is done; None when that does not end it."""
    return _count(study, PATIENCE)


def _count(study: optuna.Study, key: str) -> int | None:
    count = attributes.study_attributes(study).get(key)
    return count if type(count) is int and count > 0 else None


def _packed(recipe: Recipe) -> dict[str, Any]:
    """Attributes that hold a recipe, its head last."""
    body = {key: value for key, value in vars(recipe).items() if key != "guards" or value is not None}
    data = json.dumps(body, allow_nan=False).encode()
    return genome.pack_bytes(RECIPE, data, {"v": VERSION, "bytes": len(data)}, level=9)


def _too_large(recipe: Recipe) -> bool:
    attrs = _packed(recipe)
    head = attrs.pop(RECIPE)
    return head["bytes"] > UNPACKED or sum(map(len, attrs.values())) + len(head["z"]) > LARGEST


def _checked(body: Any) -> Recipe:
    check(body, FORM, "it")
    for name, value in body["objective"].items():
        if name not in SETTINGS or (value is None and name not in MAY_BE_NONE):
            raise ValueError(f"objective.{name:.40} is {value!r:.40}")
    return Recipe(**body)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
