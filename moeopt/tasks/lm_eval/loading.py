"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836), found and loaded by name.

The only file that knows where the harness keeps its tasks. A task folder may hold Python, which runs only when it is
trusted. The harness is imported when a task is first asked for.
"""

from __future__ import annotations

import logging
import random
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.tasks.folders import WORDS, files_of, splits_named, topmost, warn_passed_over
from moeopt.tasks.formats import form_of
from moeopt.tasks.lm_eval.trust import is_the_harness, sandboxed, untrusted

Data = str | Path
SEED = 1234
"""The seed from which the harness draws few-shot examples."""
_NAMES = re.compile(rb"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#\[\]]+)", re.MULTILINE)
_TAGS = re.compile(rb"^tag:[ \t]*\r?\n((?:[ \t]*-[^\n]*\n?)+)", re.MULTILINE)
_BUILDERS = dict.fromkeys((".jsonl", ".ndjson", ".json"), "json") | {
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""The datasets package's reader of files with such an ending."""
_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of the harness that are ready to run.

    Attributes:
        names: as asked for.
        tasks: the harness's `Task` by name, with `num_fewshot` set; the members of groups and tags one by one.
        groups: the harness's `Group` by name.
        version: the harness's own.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    version: str


def load(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    data: Mapping[str, Data] | None = None,
    num_fewshot: int | None = None,
    unsafe_code: bool = False,
    trust_remote_code: bool = False,
) -> Harness:
    """Tasks, groups and tags of the harness, their data sets read.

    Args:
        names: names as on the harness's command line.
        include_path: a folder with tasks of one's own, whose names go before the harness's.
        data: for the task of each name, local data in its data set's own schema: a .jsonl, .json or .parquet file for
            the split that the harness evaluates, or a folder with a file for every split, named after it, or one that
            `save_to_disk` of the datasets package wrote.
        num_fewshot: examples in front of every question; None for what the task says. A task that says 0 keeps 0, with
            a warning, as in the harness.
        unsafe_code: whether tasks that run code written by the model are allowed.
        trust_remote_code: whether tasks in `include_path` may run Python: `!function`, or a metric of their own.

    Raises:
        TaskError: if the harness is not installed, a name is unknown, a task or its data cannot be loaded, or a task
            runs Python that is not trusted.
    """
    version = harness_version()
    names = tuple(dict.fromkeys(names))
    if not names:
        raise TaskError("name at least one lm_eval task, such as arc_easy")
    if num_fewshot is not None and num_fewshot < 0:
        raise TaskError(f"num_fewshot must be at least 0, got {num_fewshot}")
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"include_path {str(include_path)!r} is not a folder of lm_eval tasks")
    for name in data or {}:
        if name not in names:
            raise TaskError(f"data is given for {name!r}, which is not among the tasks{nearest(name, list(names))}")
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with contained():
        for name in names:
            trusted = include_path is None or trust_remote_code
            with nullcontext() if trusted else untrusted(str(include_path)):
                manager = _manager(name, include_path)
            trusted |= is_the_harness(manager)
            with nullcontext() if trusted else untrusted(str(include_path)):
                found = _load(manager, name, (data or {}).get(name), num_fewshot)
            tasks |= found["tasks"]
            groups |= found.get("groups") or {}
        for name, task in tasks.items():
            _set_shots(name, task, num_fewshot)
            if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
                raise TaskError(
                    f"lm_eval task {name!r} runs code that the model writes: allow it with unsafe_code=True"
                )
            if getattr(task, "MULTIMODAL", False):
                raise TaskError(f"lm_eval task {name!r} has images or sounds, which is not supported")
    return Harness(names, tasks, groups, version)


def harness_version() -> str:
    """The version of lm-evaluation-harness, or a TaskError that says how to install it."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise TaskError(f"lm_eval tasks need lm-evaluation-harness ({error}): pip install 'moeopt[lm-eval]'") from error
    sandboxed()
    return str(lm_eval.__version__)


@contextmanager
def contained() -> Iterator[None]:
    """The harness logs nothing below errors, prints to standard error, and leaves Python's random state alone."""
    logger, state = logging.getLogger("lm_eval"), random.getstate()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)


def reason(error: BaseException) -> str:
    """An error of another library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _manager(name: str, include_path: str | Path | None) -> Any:
    """A task manager that knows the name: of one folder where that is enough, as reading all takes a minute."""
    from lm_eval.tasks import TaskManager

    own = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    if own is not None and _complete(own, name):
        return own
    known, mine = _catalogue(), [] if own is None else own.all_tasks
    if name not in known and name not in mine:
        hint = nearest(name, mine) or nearest(name, list(known))
        there = "" if own is None else f"; {str(include_path)!r} has {', '.join(mine) or 'none'}"
        raise TaskError(f"unknown lm_eval task {name!r}{hint}{there}{_broken(include_path)}")
    if name in known and name not in mine:
        manager = TaskManager(include_path=known[name].parent, include_defaults=False)
        if _complete(manager, name):
            return manager
    return _whole(include_path)


def _complete(manager: Any, name: Any) -> bool:
    """Whether the name is a task, or a group of nothing but tasks, that the manager knows."""
    if name in manager.all_subtasks:
        return True
    members = manager.task_index[name].cfg.get("task") if name in manager.all_groups else None
    return isinstance(members, list) and all(
        isinstance(member, str) and _complete(manager, member) for member in members
    )


@cache
def _catalogue() -> dict[str, Path]:
    """File by name of task, group or tag, for all that the harness ships: found by text, without parsing."""
    import lm_eval.tasks

    found: dict[str, Path] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        text = path.read_bytes()
        names = _NAMES.findall(text) + [
            tag for block in _TAGS.findall(text) for tag in re.findall(rb"-\s*[\"']?([^\s\"'#]+)", block)
        ]
        for name in names:
            found.setdefault(name.decode(), path)
    return found


@cache
def _whole(include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _broken(include_path: str | Path | None) -> str:
    """What is wrong with a file of the user's folder, which the harness would skip silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in [] if include_path is None else sorted(Path(include_path).rglob("*.yaml")):
        try:
            load_yaml(path)
        except Exception as error:
            return f"; {path} cannot be read ({reason(error)})"
    return ""


def _load(manager: Any, name: str, data: Data | None, num_fewshot: int | None) -> dict[str, Any]:
    config = manager.task_index[name].cfg or {}
    spec: Any = name
    if data is not None:
        if name not in manager.all_subtasks:
            raise TaskError(f"{name!r} is a group of lm_eval tasks: data can only be given for single tasks")
        local = _local(name, config, Path(data), num_fewshot)
        spec = {"group": f"moeopt {name}", "task": [{"task": name, **local}]}
    try:
        found: dict[str, Any] = manager.load([spec])
    except TaskError:
        raise
    except Exception as error:
        where = f" (data set {config['dataset_path']!r})" if data is None and config.get("dataset_path") else ""
        offline = isinstance(error, OSError) or "Connect" in type(error).__name__ or "offline" in str(error).lower()
        hint = "; without a network, give its data as local files, or a task folder of your own" if offline else ""
        raise TaskError(f"lm_eval task {name!r}{where} cannot be loaded ({reason(error)}){hint}") from error
    return found if data is None else {"tasks": found["tasks"]}


def _local(name: str, config: Mapping[str, Any], data: Path, num_fewshot: int | None) -> dict[str, Any]:
    """The part of a task's configuration that makes it read local files; roles without a file are dropped."""
    roles = {role: config[role] for role in (*_SPLITS, "fewshot_split") if config.get(role)}
    evaluated = roles.get("test_split") or roles.get("validation_split")
    if data.is_dir():
        splits = set(roles.values())
        files = {split: found for split in splits if (found := _files_of(data, split, splits))}
    else:
        files = {evaluated: [data]}
    if not files.get(evaluated):
        have = ", ".join(sorted(path.name for path in data.iterdir()))
        raise TaskError(
            f"data folder {data} has no {evaluated}.jsonl, .json, .parquet or .csv, which lm_eval task {name!r} is"
            f" evaluated on (it has {have or 'nothing'})"
        )
    for path in (path for paths in files.values() for path in paths):
        if not path.is_file():
            raise TaskError(f"data file {path} does not exist")
    builders = {_BUILDERS.get(form_of(path) or path.suffix, "") for paths in files.values() for path in paths}
    if len(builders) > 1 or "" in builders:
        have = ", ".join(sorted(path.name for paths in files.values() for path in paths))
        raise TaskError(f"data {data} must be .jsonl or .json files, or .parquet files, or .csv files, got {have}")
    if data.is_dir() and not (data / "dataset_dict.json").is_file():
        warn_passed_over(data, files_of(data, hidden=True), files)
    shots = config.get("num_fewshot") if num_fewshot is None else num_fewshot
    if shots and roles.get("fewshot_split", evaluated) not in files:
        raise TaskError(
            f"data {data} has no file for split {roles['fewshot_split']!r}, from which lm_eval task {name!r} takes its"
            f" {shots} few-shot examples"
        )
    return {
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(path) for path in paths] for split, paths in files.items()}},
        "custom_dataset": None,
        **{role: split if split in files else None for role, split in roles.items()},
    }


def _files_of(folder: Path, split: str, roles: Collection[str]) -> list[Path]:
    """The files of a split: `test.jsonl`, shards as `test-00000-of-00002.parquet`, or those in `test/` that datasets'
    `save_to_disk` wrote; of a split that the harness calls as others do, also `dev.jsonl` for "validation"."""
    if (folder / split / "state.json").is_file():
        return sorted((folder / split).glob("data-*.arrow"))
    files = [path for path in files_of(folder) if form_of(path)]
    mine = [path for path in files if _is_called(path, split)]
    if not mine and split in WORDS:
        free = (path for path in files if not any(_is_called(path, role) for role in roles))
        mine = [path for path in free if splits_named(path.relative_to(folder)) == {WORDS[split]}]
    return topmost(folder, split, mine) if mine else []


def _is_called(path: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![a-z])", path.name, re.IGNORECASE) is not None


def _set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    default = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", default or 0)
    elif default == 0 and num_fewshot:
        warnings.warn(f"lm_eval task {name!r} sets num_fewshot to 0 itself: {num_fewshot} is ignored", stacklevel=3)
    else:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(SEED)
