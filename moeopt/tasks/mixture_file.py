"""Mixtures from a JSON file: `moeopt search ... --task mixture --data mixture.json`.

{"tasks": [{"task": "boolq", "data": "boolq.jsonl", "weight": 2, "options": {"num_fewshot": 2}},
           {"task": "text", "data": "notes/", "weight": 1, "name": "notes"}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError, nearest
from moeopt.showing import shown
from moeopt.tasks.base import Task
from moeopt.tasks.mixture import MixtureTask, Use
from moeopt.tasks.own import is_own
from moeopt.tasks.rows import is_missing_file

MIXTURE = "mixture"
ENTRY = ("task", "data", "weight", "options", "name")


def read_mixture(data: str | Path, task_named: Callable[..., Task], *, use: Use = "share") -> MixtureTask:
    """As `moeopt.tasks.registry.mixture_task`, with `moeopt.tasks.get` as `task_named`.

    Each task of the file has "task", a name that `moeopt.tasks.get` takes but no Python file, and may have "data",
    where that is a path from the file's folder, "weight" (1), "options" of the task, and "name" (the task's).
    """
    path = Path(data)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TaskError(f"cannot read mixture file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"mixture file {path} is not JSON: {shown(error)}") from error
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"tasks"}:
        raise TaskError(f'mixture file {path} must be {{"tasks": [{{"task": ..., "data": ..., "weight": ...}}, ...]}}')
    members: dict[str, tuple[Task, float]] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, task {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
            raise TaskError(f'{where}: expected an object with a "task", got {shown(entry)}')
        for key in entry:
            if key not in ENTRY:
                raise TaskError(
                    f"{where}: unknown {shown(key)}{nearest(key, list(ENTRY))} (there are {', '.join(ENTRY)})"
                )
        kind, options, name = entry["task"], entry.get("options", {}), entry.get("name", entry["task"])
        if is_own(kind) or kind == MIXTURE:
            raise TaskError(f"{where}: a mixture's file takes neither Python files nor mixtures, got {shown(kind)}")
        if isinstance(options, dict) and "trust_remote_code" in options:
            raise TaskError(f"{where}: a mixture's file does not say what code is trusted: leave trust_remote_code out")
        if not isinstance(options, dict) or options.keys() & set(ENTRY) or not isinstance(name, str):
            raise TaskError(
                f'{where}: "options" must be the task\'s own and "name" a text, got {shown(options)} and {shown(name)}'
            )
        if name in members:
            raise TaskError(f'{where}: a task before is called {name!r} already; give it a "name" of its own')
        try:
            task = task_named(kind, _beside(path, entry.get("data")), **options)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from error
        members[name] = task, entry.get("weight", 1)
    return MixtureTask(members, use=use)


def _beside(file: Path, data: Any) -> Any:
    """What an entry calls its data: paths start from the file's folder, hub ids stay as they are."""
    if isinstance(data, list):
        return [_beside(file, part) for part in data]
    if not isinstance(data, str):
        if data is None:
            return None
        raise TaskError(f'"data" must be a path, a list of paths or a hub id, got {shown(data)}')
    path = file.parent / data
    return str(path) if path.exists() or is_missing_file(data) else data
