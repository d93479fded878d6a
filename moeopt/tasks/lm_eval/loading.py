"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836), and ours in its YAML, loaded by name.

A task folder may hold Python, which runs only when it is trusted. The harness is imported when a task is loaded.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moeopt.errors import TaskError, nearest
from moeopt.tasks.lm_eval.catalogue import FOLDERS, check_name, harness_folder, ours, theirs
from moeopt.tasks.lm_eval.local_data import Data, LocalData, data_set
from moeopt.tasks.lm_eval.trust import sandboxed, trusts, untrusted
from moeopt.tasks.rows import is_missing_file

SEED = 1234
"""The seed from which the harness draws few-shot examples."""
_OF_GROUPS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include")


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of the harness that are ready to run.

    Attributes:
        names: as asked for.
        tasks: the harness's `Task` by name, with `num_fewshot` set; the members of groups and tags one by one.
        groups: the harness's `Group` by name.
        version: the harness's own.
        include_path: the folder of the user's that a task may be from.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    version: str
    include_path: str | Path | None = None


@dataclass
class _Leaf:
    """A task of a group: the names it goes by there, and what the group changes in it."""

    names: set[str]
    changes: dict[str, Any] = field(default_factory=dict)


def load(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    data: Mapping[str, Data] | None = None,
    config: str | None = None,
    subjects: Iterable[str] = (),
    held_out: bool = False,
    num_fewshot: int | None = None,
    unsafe_code: bool = False,
    trust_remote_code: bool = False,
) -> Harness:
    """Tasks, groups and tags of the harness, their data sets read; arguments as for `lm_eval_task`, but:

    Args:
        names: names as on the harness's command line, or of tasks of ours (`moeopt.tasks.lm_eval.catalogue`).
        data: of the task of each name, see `moeopt.tasks.lm_eval.local_data`; or a hub id.
        subjects: empty for all; also without the group's name in front: "stem" is `mmlu_stem`.
        num_fewshot: a task that says 0 keeps 0, with a warning, as in the harness.
        unsafe_code: whether tasks that run code written by the model are allowed.

    Raises:
        TaskError: if a name is unknown, a task or its data cannot be loaded, or a task runs Python that is not trusted.
    """
    names = tuple(dict.fromkeys(names))
    subjects = list(subjects)
    if not names:
        raise TaskError("name at least one lm_eval task, such as arc_easy")
    if isinstance(num_fewshot, bool) or not isinstance(num_fewshot, int | None) or (num_fewshot or 0) < 0:
        raise TaskError(f"num_fewshot must be an integer of at least 0, got {num_fewshot!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"include_path {str(include_path)!r} is not a folder of lm_eval tasks")
    for name in data or {}:
        if name not in names:
            raise TaskError(f"data is given for {name!r}, which is not among the tasks{nearest(name, list(names))}")
    if include_path is None:
        for name in names:
            check_name(name)
    places = {name: _place(place, config) for name, place in (data or {}).items()}
    version = harness_version()
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with contained():
        for name in names:
            trusted = include_path is None or trust_remote_code
            with nullcontext() if trusted else untrusted(str(include_path)):
                manager = _manager(name, include_path)
            trusted |= trusts(manager)
            with nullcontext() if trusted else untrusted(str(include_path)):
                place = places.get(name, {"dataset_name": config} if config else None)
                loaded = _load(manager, name, place, num_fewshot, subjects, held_out)
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups") or {}
        for name, task in tasks.items():
            _set_shots(name, task, num_fewshot)
            if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
                raise TaskError(
                    f"lm_eval task {name!r} runs code that the model writes: allow it with unsafe_code=True"
                )
            if getattr(task, "MULTIMODAL", False):
                raise TaskError(f"lm_eval task {name!r} has images or sounds, which is not supported")
    return Harness(names, tasks, groups, version, include_path)


def judging(docs: Mapping[str, Sequence[Mapping[str, Any]]], version: str) -> Harness:
    """Tasks of the harness, or ours, that judge the answers to documents, by task, without reading their data sets.

    Args:
        docs: the documents as the tasks made them.
        version: of the harness, which must be the one at hand.

    Raises:
        TaskError: if the version is another, or a task cannot be loaded so.
    """
    here = harness_version()
    if here != version:
        raise TaskError(f"answers are judged by lm-evaluation-harness {version}, but {here} is installed")
    tasks: dict[str, Any] = {}
    for name, rows in docs.items():
        check_name(name)
        roles = dict.fromkeys(("training_split", "validation_split", "fewshot_split", "fewshot_config", "process_docs"))
        changes = {
            "task": name,
            "custom_dataset": lambda rows=rows, **_: data_set({"test": rows}),
            "test_split": "test",
            "num_fewshot": 0,
            **roles,
        }
        with failing(name, "cannot be loaded"):
            tasks |= _manager(name, None).load([{"group": f"moeopt {name}", "task": [changes]}])["tasks"]
        if getattr(tasks[name], "UNSAFE_CODE", False):
            raise TaskError(f"lm_eval task {name!r} runs code that the model writes")
    return Harness(tuple(docs), tasks, {}, here)


def harness_version() -> str:
    """The version of lm-evaluation-harness, which is imported."""
    import lm_eval
    import lm_eval.tasks

    sandboxed()
    return str(lm_eval.__version__)


@contextmanager
def contained() -> Iterator[None]:
    """The harness logs nothing below errors, prints to standard error, shows no progress of reading data, and leaves
    Python's random state alone."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, state, shows = logging.getLogger("lm_eval"), random.getstate(), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        if shows:
            enable_progress_bars()


@contextmanager
def failing(task: str, how: str) -> Iterator[None]:
    """Whatever the harness's code raises, as a `TaskError` that names the task."""
    try:
        with contained():
            yield
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"lm_eval task {task!r} {how} ({reason(error)})") from error


def is_number(value: Any) -> bool:
    """Whether a result of the harness is a number, rather than a list or text that its task aggregates."""
    return isinstance(value, int | float | np.number)


def reason(error: BaseException) -> str:
    """An error of another library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(data: Data, config: str | None) -> LocalData | dict[str, Any]:
    """Local data, or the part of a task's configuration that makes it read another data set of the hub."""
    if Path(data).exists() or is_missing_file(data):
        if config is not None:
            raise TaskError(f"config is of hub data sets, and {str(data)!r} is none")
        return LocalData(Path(data))
    return {"dataset_path": str(data), "dataset_name": config}


def _manager(name: str, include_path: str | Path | None) -> Any:
    """A task manager that knows the name: of one folder where that is enough, as reading all takes a minute."""
    from lm_eval.tasks import TaskManager

    user = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    if user is not None:
        if name in user.task_index and _complete(user, name, Path(str(include_path))):
            return user
        if name not in user.task_index and name not in ours() and name not in theirs():
            there = f"{str(include_path)!r} has {', '.join(user.all_tasks) or 'none'}"
            hint = nearest(name, user.all_tasks) or nearest(name, list(theirs()))
            raise TaskError(f"unknown task {name!r}{hint}; {there}{_broken(include_path)}")
    if user is None or name not in user.task_index:
        if name in ours():
            manager = TaskManager(include_path=str(ours()[name].parent), include_defaults=False)
            return _with_subjects(manager, name)
        folder = Path(os.path.commonpath([path.parent for path in theirs()[name]]))
        if folder != harness_folder():
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            if _complete(manager, name, folder):
                return manager
    return _whole(include_path)


def _complete(manager: Any, name: Any, folder: Path) -> bool:
    """Whether the name is a task that the manager of a folder knows, or a group or tag of nothing but such tasks."""
    if name in manager.all_subtasks:
        return True
    if name in manager.all_tags:  # which other folders may have, too
        return all(path.suffix == ".yaml" and path.is_relative_to(folder) for path in theirs().get(name, ()))
    members = manager.task_index[name].cfg.get("task") if name in manager.all_groups else None
    return isinstance(members, list) and all(
        isinstance(member, str) and _complete(manager, member, folder) for member in members
    )


def _with_subjects(manager: Any, name: str) -> Any:
    """The manager, with EEP's MMLU as a group of a task for each subject, as the harness's is."""
    from lm_eval.tasks._index import Entry, Kind

    if name == "eep_mmlu":
        index, base = manager.task_index, manager.task_index[name]
        index[name] = Entry(name, Kind.GROUP, None, {"group": name, "task": []})
        for category in ("stem", "humanities", "social_sciences", "other"):
            files = theirs()[f"mmlu_{category}_tasks"]
            subjects = [path.stem.removeprefix("mmlu_") for path in files]
            group = {"group": f"{name}_{category}", "task": [_subject(name, subject) for subject in subjects]}
            index[name].cfg["task"].append(group["group"])
            index[group["group"]] = Entry(str(group["group"]), Kind.GROUP, None, group)
            for subject in subjects:
                index[f"{name}_{subject}"] = Entry(f"{name}_{subject}", Kind.TASK, base.yaml_path, base.cfg)
    return manager


def _subject(group: str, subject: str) -> dict[str, str]:
    return {"task": f"{group}_{subject}", "dataset_name": subject}


@cache
def _whole(include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    user = [] if include_path is None else [include_path]
    return TaskManager(include_path=[*map(str, FOLDERS), *map(str, user)])


def _broken(include_path: str | Path | None) -> str:
    """What is wrong with a file of the user's folder, which the harness would skip silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in [] if include_path is None else sorted(Path(include_path).rglob("*.yaml")):
        try:
            load_yaml(path)
        except Exception as error:
            return f"; {path} cannot be read ({reason(error)})"
    return ""


def _load(
    manager: Any,
    name: str,
    place: LocalData | Mapping[str, Any] | None,
    num_fewshot: int | None,
    subjects: Sequence[str],
    held_out: bool,
) -> dict[str, Any]:
    spec: Any = name
    changed = place is not None or subjects or held_out
    if changed:
        leaves = _chosen(name, _leaves(manager.task_index, name), subjects, held_out)
        members = []
        for leaf, about in leaves.items():
            changes = dict(about.changes)
            if isinstance(place, LocalData):
                whole = {**manager.task_index[leaf].cfg, **changes}
                local = place.changes(leaf, whole, num_fewshot)
                if local is None and len(leaves) > 1:
                    continue  # of which the data have no row
                changes |= place.required(leaf, whole, local)
            members.append({"task": leaf, **changes, **(place if isinstance(place, Mapping) else {})})
        if not members and isinstance(place, LocalData):
            place.required(name, whole, None)
        missing = [s for s in subjects if not held_out and not any(_is(name, s, leaves[m["task"]]) for m in members)]
        if missing:
            raise TaskError(f"{place} has no question of {missing[0]!r}")
        spec = {"group": f"moeopt {name}", "task": members}
    try:
        loaded: dict[str, Any] = manager.load([spec])
    except TaskError:
        raise
    except Exception as error:
        source = (manager.task_index[name].cfg or {}).get("dataset_path") if place is None else None
        where = f" (data set {source!r})" if source else ""
        offline = isinstance(error, OSError) or "Connect" in type(error).__name__ or "offline" in str(error).lower()
        hint = "; without a network, give its data as local files, or a task folder of your own" if offline else ""
        if isinstance(place, LocalData):
            hint = f"; the rows of {place} have the columns {place.columns}"
        raise TaskError(f"lm_eval task {name!r}{where} cannot be loaded ({reason(error)}){hint}") from error
    return {"tasks": loaded["tasks"]} if changed else loaded


def _leaves(index: Mapping[str, Any], name: str) -> dict[str, _Leaf]:
    """The tasks of a task, group or tag, by name."""
    entry = index[name]
    kind, config = entry.kind.name, entry.cfg or {}
    if kind == "TAG":
        members: Any = sorted(entry.tags)
    elif kind == "GROUP":
        members = config.get("task")
    else:
        return {name: _Leaf({name})}
    leaves: dict[str, _Leaf] = {}
    for member in members if isinstance(members, list) else ():
        changes = {key: value for key, value in config.items() if key not in _OF_GROUPS}
        if isinstance(member, dict):
            changes |= {key: value for key, value in member.items() if key not in ("task", "group")}
            member = member.get("group", member.get("task"))
        if member not in index:
            raise TaskError(f"{name!r} has a task within it, {member!r}: neither data nor subjects can be given for it")
        for leaf, about in _leaves(index, member).items():
            about_leaf = leaves.setdefault(leaf, _Leaf({name}))
            about_leaf.names |= about.names
            about_leaf.changes |= {**about.changes, **changes}
    return leaves


def _chosen(name: str, leaves: dict[str, _Leaf], subjects: Sequence[str], held_out: bool) -> dict[str, _Leaf]:
    """Those of the tasks of a group that are among the subjects, or with `held_out` those that are not."""
    for subject in subjects:
        if not any(_is(name, subject, about) for about in leaves.values()):
            short = {
                n.removeprefix(f"{name}_").removesuffix("_tasks") for about in leaves.values() for n in about.names
            }
            raise TaskError(f"unknown subject {subject!r} of {name!r}{nearest(subject, sorted(short))}")
    chosen = {leaf: about for leaf, about in leaves.items() if any(_is(name, s, about) for s in subjects)}
    if not subjects and not held_out:
        return leaves
    rest = {leaf: about for leaf, about in leaves.items() if leaf not in chosen}
    if held_out and (not subjects or not rest):
        raise TaskError("held_out needs the subjects that were searched, which must not be all")
    return rest if held_out else chosen


def _is(group: str, subject: str, leaf: _Leaf) -> bool:
    return bool(leaf.names & {subject, f"{group}_{subject}", f"{group}_{subject}_tasks"})


def _set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    default = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", default or 0)
    elif default == 0 and num_fewshot:
        warnings.warn(f"lm_eval task {name!r} sets num_fewshot to 0 itself: {num_fewshot} is ignored", stacklevel=3)
    else:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(SEED)
