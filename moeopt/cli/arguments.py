"""Arguments of the command line as checked values: shapes, options, tasks, plans, existing studies."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeopt.defaults import STORAGE_VARIABLE
from moeopt.errors import ModelError, MoeoptError, PlanError, SpaceError, StudyError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from moeopt.plan import ModelShape, Plan
    from moeopt.spaces import Space
    from moeopt.study.guards import Guard
    from moeopt.tasks import Task


def quick_shape(model: str, *, trust_remote_code: bool = False) -> ModelShape | None:
    """The shape that a Mixtral's own config.json tells; None where only transformers, or trusted code, can tell."""
    from moeopt.plan import ModelShape

    config = checkpoint_config(model)
    if config is None:
        return None
    if not re.search(r"expert|moe|mixtral", json.dumps(config), re.IGNORECASE):
        raise ModelError(f"{model!r} is a dense model: its config.json names no experts")
    numbers: list[Any] = [config.get(key) for key in ("num_hidden_layers", "num_local_experts", "num_experts_per_tok")]
    brings_code = trust_remote_code and "auto_map" in config
    if brings_code or config.get("model_type") != "mixtral" or not all(isinstance(value, int) for value in numbers):
        return None
    return ModelShape(*numbers)


def checkpoint_config(model: str) -> dict[str, Any] | None:
    """The config.json of a checkpoint folder; None for what may be a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"{model!r} is a file; a checkpoint is a folder, or a hub id such as 'org/name'")
        if model.startswith((".", "/", "~")) or len(folder.parts) > 2:
            raise ModelError(f"no checkpoint folder at {model!r}")
        return None
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model!r} is not a checkpoint folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{model!r} is not a checkpoint folder: its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{model!r} is not a checkpoint folder: its config.json holds {type(config).__name__}")
    return config


def pairs(option: str, given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE options by name; a value is a number, a truth value or null as in JSON, otherwise text."""
    values: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.replace("-", "_").isidentifier():
            raise MoeoptError(f"{option} must be NAME=VALUE, got {text!r}")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            values[name.replace("-", "_")] = value
    return values


def numbers(option: str, text: str) -> list[int]:
    """
    >>> numbers("--keep", "6,4,2")
    [6, 4, 2]
    """
    if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", text):
        raise MoeoptError(f"{option} must be numbers of at least 1, such as 6,4,2, got {text!r}")
    return [int(part) for part in text.split(",")]


def words(option: str, text: str, example: str) -> list[str]:
    """Names between commas."""
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise MoeoptError(f"{option} must be names between commas, such as {example}, got {text!r}")
    return names


def read_plan(path: Path, layers: int | None) -> Plan:
    """A plan file of moeopt, or an EEP .pth for a model of so many MoE layers."""
    from moeopt.plan import Plan

    if path.suffix != ".pth":
        return Plan.load(path)
    if layers is None:
        raise PlanError(f"{str(path)!r} does not say how many MoE layers its model has: give --layers")
    return Plan.from_eep(path, layers)


def warm_starts(given: Sequence[str], layers: int, space: Space) -> list[Plan | str] | Literal["auto"]:
    """Plan files as plans, and names of one-shot methods, each held against the space; those of "auto", and "none".

    Raises:
        SpaceError: when "none" stands beside others.
    """
    from moeopt.study import check_expressible

    if [*given] == ["auto"]:
        return "auto"
    if [*given] == ["none"]:
        return []
    if "none" in given or "auto" in given:
        raise SpaceError(f"--warm-start none and auto stand alone, got {' '.join(given)}")
    starts: list[Plan | str] = []
    for text in given:
        if Path(text).exists() or text.endswith((".safetensors", ".pth")):
            plan = read_plan(Path(text), layers)
            space.encode(plan)
            starts.append(plan)
            continue
        for name in text.split(","):
            check_expressible(name.strip(), space)
            starts.append(name.strip())
    return starts


def command_again(given: Sequence[str] | None, storage: str) -> str:
    """The command that was given (None: of this process), to resume with here; without a storage's password."""
    return shlex.join(["moeopt", *_again(given, storage)])


def noted_command(given: Sequence[str] | None, storage: str) -> str:
    """`command_again` to resume with from another folder, and where MOEOPT_STORAGE is not set."""
    from moeopt.study.storage import hidden

    words = _again(given, storage)
    if not any(word.partition("=")[0] == "--storage" for word in words):
        words += ["--storage", hidden(storage)]
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(['moeopt', *words])}"


def _again(given: Sequence[str] | None, storage: str) -> list[str]:
    from moeopt.study.storage import hidden
    from moeopt.study.storage.urls import scrub

    words = [word for word in (sys.argv[1:] if given is None else given) if word != "--no-resume"]
    words = [word.replace(storage, hidden(storage)) for word in words]
    return [scrub(word) if "://" in word else word for word in words]  # places of trackers are URLs, too


def storage_again(storage: str) -> list[str]:
    """The option that names a storage again, without its password; none where MOEOPT_STORAGE names it."""
    from moeopt.study.storage import hidden

    return [] if os.environ.get(STORAGE_VARIABLE) == storage else ["--storage", hidden(storage)]


def show_again(study: str, storage: str) -> str:
    """The command that shows a study."""
    name = ["--", study] if study.startswith("-") else [study]
    return shlex.join(["moeopt", "show", *storage_again(storage), *name])


def open_task(name: str, data: str | None, given: list[str] | None, *, split: str | None = "search") -> Task:
    """The task of `--task`, `--data` and `--task-option`; a split that has no examples is found out now.

    Args:
        split: which; None: the last one that the task has.
    """
    options = pairs("--task-option", given)
    from moeopt import tasks

    task = tasks.get(name, data=data, **options)
    task.examples(split or task.splits[-1])
    return task


def guards(given: Sequence[str] | None, loss: float) -> list[Guard]:
    """The guards of `--guard TASK[=DATA][,NAME=VALUE...]`; a task that has no search split is found out now.

    Args:
        given: each a task, its data, and options of the guard (loss, limit, score, name) and of the task.
        loss: what is allowed where it does not say.
    """
    parsed: list[tuple[str, str, dict[str, Any]]] = []
    for text in given or ():
        head, *rest = text.split(",")
        task_name, _, data = head.partition("=")
        if not task_name:
            raise MoeoptError(f"--guard must be TASK[=DATA][,NAME=VALUE...], as text=notes/,loss=0.05, got {text!r}")
        parsed.append((task_name, data, {"loss": loss, **pairs("--guard", rest)}))
    if not parsed:
        return []
    from moeopt import tasks
    from moeopt.study.guards import Guard

    made = []
    for name, data, options in parsed:
        settings = {key: options.pop(key) for key in ("loss", "limit", "score", "name") if key in options}
        task = tasks.get(name, data=data or None, **options)
        task.examples("search")
        made.append(Guard(task, **settings))
    return made


def other_task(name: str | None, data: str | None, given: list[str] | None) -> Task | None:
    """The task of options of which `--task` may be missing; None where it is, and the others too."""
    if name is None and (data is not None or given):
        raise MoeoptError("--data and --task-option need --task")
    return None if name is None else open_task(name, data, given, split=None)


def calibration_task(
    task: str, given: list[str] | None, name: str | None, data: str | None, more: list[str] | None = None
) -> Task | None:
    """What is looked at in place of `task`: another task, or, where no name is given, other data of the same one.

    Args:
        task, given: the task itself, and what `--task-option` says of it.
        name, data: of the other; None, None: there is no other.
        more: options of the other, beside those of `task` where it is the same.
    """
    if name is None and data is None:
        if more:
            raise MoeoptError("--calibration-option needs --calibration-task or --calibration-data")
        return None
    options = pairs("--task-option", given) if name in (None, task) else {}
    options |= pairs("--calibration-option", more)
    from moeopt import tasks

    other = tasks.get(name or task, data=data, **options)
    other.examples("search")
    return other


def chosen_plan(
    name: str, file: Path | None, layers: int | None, storage: str, study: str | None, trial: str,
    fit: int | None = None,
) -> tuple[Plan, str, tuple[optuna.Study, FrozenTrial] | None]:  # fmt: skip
    """The plan of a file, or of a trial with its study, and what to call it; of no more than `fit` bytes, if given."""
    if (file is None) == (study is None):
        raise StudyError(f"give either {name}, a plan file, or --study, a study to take the plan from")
    if file is not None:
        return read_plan(file, layers), str(file), None
    assert study is not None
    if trial not in ("best", "best-stock", "selected") and not trial.isdecimal():
        raise StudyError(f"--trial must be a trial's number, best, best-stock or selected, got {trial!r}")
    from moeopt.study import read_study

    opened = read_study(study, storage)
    if fit is None:
        chosen, plan = plan_of(opened, trial)
        return plan, f"trial {chosen.number} of {study} ({values_told(opened, chosen)})", (opened, chosen)
    from moeopt.exporting import plan_of as plan_of_trial
    from moeopt.results.selection import fitting_trial

    chosen, selected = fitting_trial(opened, fit)
    how = "selected on dev" if selected else "the best on search that fits; moeopt select --fit judges it on dev"
    title = f"trial {chosen.number} of {study} ({values_told(opened, chosen)}), {how}"
    return plan_of_trial(chosen, opened), title, (opened, chosen)


def values_told(study: optuna.Study, trial: FrozenTrial) -> str:
    """What a trial gave, by the names of its study's objectives."""
    from moeopt.showing import line
    from moeopt.trials.front import objectives_of

    if trial.values is None:
        return "no loss"
    forms = {"bytes": ",.0f"}
    told = zip(objectives_of(study), trial.values)
    return ", ".join(f"{line(name, 40)} {value:{forms.get(name, '.4f')}}" for name, value in told)


def check_layers(plan: Plan, shape: ModelShape | None) -> None:
    """Raise PlanError for a plan of another number of layers than the model, where its shape is told."""
    if shape is not None and len(plan.layers) != shape.layers:
        raise PlanError(f"the plan is for {len(plan.layers)} MoE layers, the model has {shape.layers}")


def plan_of(study: optuna.Study, which: str) -> tuple[FrozenTrial, Plan]:
    """A trial, by number or as `best`, `best-stock` or `selected`, and its plan."""
    from moeopt.exporting import best_stock_trial, plan_of
    from moeopt.study import best_trial

    if which == "selected":
        from moeopt.results.selection import selected_trial

        winner = selected_trial(study)
        return winner, plan_of(winner, study)
    if which.isdecimal():
        chosen = next((t for t in study.get_trials(deepcopy=False) if t.number == int(which)), None)
        missing = f"study {study.study_name!r} has no trial {which}"
    else:
        chosen = best_trial(study)
        missing = f"study {study.study_name!r} has no completed trial yet"
        if chosen is not None and which == "best-stock":
            chosen = best_stock_trial(study)
    if chosen is None:
        raise StudyError(missing)
    return chosen, plan_of(chosen, study)


def check_outlives(storage: str, workers: int) -> None:
    """Raise StorageError for a database in memory, which ends with the command, and no other process sees."""
    from moeopt.errors import StorageError
    from moeopt.study.storage import hidden, in_memory

    if in_memory(storage):
        why = "a database in memory ends with the search, and all that it found"
        if workers > 1:
            why = "a database in memory is of one process, and --workers are several"
        raise StorageError(f"{why}: give a file, such as sqlite:///moeopt.db, not {hidden(storage)!r}")


def device_map(given: str) -> str:
    """What was given, unless it names a device that is none, or is not here: then ModelError."""
    if given not in ("auto", "cpu"):  # of which PyTorch, slow to import, need not be asked
        from moeopt.models import check_device_map

        check_device_map(given)
    return given


def existing(storage: str, name: str, *, resume: bool) -> optuna.Study | None:
    """The study of that name; None where there is none, and no database file is made.

    Raises:
        StudyError: when there is one, and it is not to be resumed.
        StorageError: when the storage cannot be used.
    """
    from moeopt.study import find
    from moeopt.study.storage import hidden, is_new, open_storage, readable_errors

    if is_new(storage):
        return None
    opened = open_storage(storage)
    with readable_errors(storage):
        study = find(opened, name)
    if study is not None and not resume:
        raise StudyError(
            f"study {name!r} already exists in {hidden(storage)}; leave out --no-resume, or choose another name"
        )
    return study


def stored_description(study: optuna.Study | None) -> dict[str, Any]:
    """What a study says it searches; of none, and of one that moeopt did not make, nothing."""
    from moeopt.trials.description import DESCRIPTION, described, reading

    if study is None:
        return {}
    with reading(study.study_name):
        made_by_us = DESCRIPTION in study.user_attrs
    return described(study) if made_by_us else {}


def for_trials(sampler: str, given: dict[str, Any], trials: int, stored: dict[str, Any]) -> dict[str, Any]:
    """Options of a sampler; where it is EEP or Nevergrad's, those that follow the number of trials are added.

    A study that is resumed keeps its own, however many trials it shall hold now.
    """
    from moeopt.samplers.eep import PUBLISHED, scaled

    its_own = stored.get("sampler") or {}
    if sampler.partition(":")[0] == "nevergrad":
        return {"budget": its_own.get("budget", trials), **given}
    if sampler != "eep":
        return given
    if its_own.get("name") == "eep" and PUBLISHED.keys() <= its_own.keys():
        return {**{name: its_own[name] for name in PUBLISHED}, **given}
    return {**scaled(trials, given), **given}
