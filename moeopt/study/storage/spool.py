"""Results on the local disk until their storage has them: one JSON file a trial, in a folder a study.

The folder is ``$MOEOPT_SPOOL``, or ``moeopt/spool`` in the user's state folder (``$XDG_STATE_HOME``, by default
``~/.local/state``; ``~/Library/Application Support``; ``%LOCALAPPDATA%``). A study is known by the random identity that
its storage keeps, never by a path or a name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from moeopt.trials.description import COUNT, TEXT, Maybe, Of, check

logger = logging.getLogger("moeopt.study.storage")

VARIABLE = "MOEOPT_SPOOL"
STATES = ("COMPLETE", "PRUNED", "FAIL")
IDENTITY = re.compile(r"[0-9a-f]{32}")
TRIES = 5
"""How often a file is written anew whose folder another process removed in the meantime."""
LARGEST = 1 << 28
"""Bytes of one file; anything larger is not one of ours."""
FORM = {
    "study": TEXT, "number": COUNT, "worker": {"pid": COUNT}, "plan": Maybe(TEXT),
    "state": Maybe(Of("a state", STATES.__contains__)),
    "values": Maybe([Of("a float", lambda value: type(value) is float and value == value)]), "started": Maybe(TEXT),
    "attrs": {}, "user_attrs": {},
}  # fmt: skip


@dataclass
class Result:
    """What is known of a trial and not stored yet.

    Args:
        study: identity of its study, 32 hex digits.
        number: the trial's.
        worker: the process that evaluated it (`process.this_worker`).
        plan: fingerprint of its plan, where it has one.
        state: of STATES; None: not evaluated to the end.
        values: of a COMPLETE trial.
        attrs, user_attrs: system and user attributes.
        started: when the trial was, UTC in ISO format; in a database that was set back another one may have its number.
    """

    study: str
    number: int
    worker: Mapping[str, Any]
    plan: str | None = None
    state: str | None = None
    values: list[float] | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    started: str | None = None

    @property
    def since(self) -> datetime | None:
        """UTC, without a time zone, as Optuna stores it."""
        return None if self.started is None else datetime.fromisoformat(self.started)

    def is_of(self, started: datetime | None) -> bool:
        """Whether it is of the trial that was started then."""
        return same_start(self.since, started)

    @property
    def file(self) -> Path:
        return folder() / self.study / f"{self.number}-{self.worker['pid']}.json"

    def save(self) -> None:
        """Write it under a temporary name and rename; where that cannot be, say so and go on."""
        file = self.file
        draft = file.with_suffix(".tmp")
        for left in reversed(range(TRIES + 1)):
            try:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with open(draft, "w", encoding="utf-8", opener=_private) as stream:
                    json.dump({"v": 1, **asdict(self)}, stream)
                draft.replace(file)
                return
            except OSError as error:
                removed = isinstance(error, (FileExistsError, FileNotFoundError))  # by `remove` of another process
                if not (left and removed):
                    logger.warning("cannot keep the result of trial %d in %s: %s", self.number, file.parent, error)
                    return

    def remove(self) -> None:
        """Delete the file, where there is one, and the study's folder with its last file."""
        try:
            self.file.unlink(missing_ok=True)
            self.file.parent.rmdir()
        except OSError:  # not empty, or not there
            pass


def same_start(started: datetime | None, stored: datetime | None) -> bool:
    """Whether a trial is the one that was started then; another gets its key when a database is set back.

    MySQL rounds to whole seconds, MariaDB down to them.
    """
    if started is None or stored is None or stored.microsecond:
        return started in (None, stored)
    return abs(stored - started) < timedelta(seconds=1)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def folder() -> Path:
    """Where results are kept on this host."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "moeopt" / "spool"


def results(study: str) -> Iterator[Result]:
    """What is kept of a study; files that are none of ours are named once and left alone."""
    try:
        files = sorted((folder() / study).glob("*.json")) if IDENTITY.fullmatch(study) else []
    except OSError:
        return
    for file in files:
        try:
            result = _read(file, study)
        except FileNotFoundError:  # stored by another worker in the meantime
            continue
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            if file not in _damaged:
                _damaged.add(file)
                logger.warning("%s is not a result of moeopt's and is left alone: %s", file, error)
            continue
        yield result


_damaged: set[Path] = set()


def _read(file: Path, study: str) -> Result:
    if file.stat().st_size > LARGEST:
        raise ValueError("it is too large")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("v", None) != 1:
        raise ValueError("another version wrote it")
    check(content, FORM, "it")
    result = Result(**content)
    since = result.since
    same = result.study == study and result.file == file and (since is None or since.tzinfo is None)
    if not same or (result.state == "COMPLETE") != bool(result.values):
        raise ValueError("its fields are not of a result")
    return result
