"""A study's trials sent to MLflow, Weights & Biases or TensorBoard, each once, as they end."""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import StudyError, nearest
from moeopt.showing import first_line, line
from moeopt.study.scores import COPIED_FROM, FINISHED
from moeopt.study.storage import attributes
from moeopt.study.storage.urls import scrub
from moeopt.study.trackers import TRACKERS, About, Sent, Tracker, seconds
from moeopt.trials import genome, process
from moeopt.trials.description import (
    COMMAND,
    DESCRIPTION,
    FINITE,
    TEXT,
    Maybe,
    check,
    described,
    full_model,
    objective_names,
)
from moeopt.trials.description import summary as told_apart
from moeopt.trials.front import is_feasible

if TYPE_CHECKING:
    import optuna

ATTRIBUTE = "moeopt:tracking"
"""System attribute of a study: its id among runs, and which trials were sent to each place, as ``"0-11,13"``."""
FORM = Maybe({"id": TEXT, "sent": {TEXT: TEXT}})
PAUSE = 30.0
"""Seconds until a tracker that failed is tried again, at least; and ten times what the failure took."""
WORDS = ("operator", "phase", genome.METHOD, genome.FAILURE)
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
LONGEST = 500


class Tracking:
    """An Optuna callback that sends every finished trial of a study to trackers, whichever worker ran it.

        with moeopt.study.Tracking("mlflow", "tensorboard=runs") as tracking:
            moeopt.optimize(study, objective, n_trials=100, callbacks=[tracking])

    Give it to one process of a study: it sends the trials of all workers, in order of their numbers, and those that
    ended before it began. A study has one run in each place, with which the next process goes on. The study notes what
    was sent, so that nothing is sent twice, whenever the process is killed.

    Of a trial are sent: its objectives, `best_loss` so far where there is one objective, what it notes in numbers
    (`accuracy`, `layer_tokens`, `spent`, `active`, ...), its constraints (at most 0 where they hold), its state,
    operator, phase, method, parents, plan and why it failed. Of the study, once: model, task, space, sampler, seed, all
    settings, and what the full model gives. Genotypes stay in the study.

    A tracker that fails never stops a search: that is told once, and it is tried again later, after ten times as long
    as the failure took, and then gets what it missed.

    Args:
        trackers: ``"mlflow"``, ``"wandb"`` or ``"tensorboard"``, each as it stands or with its place after ``=``: a
            tracking URI of MLflow, a folder for files of W&B, or for those of TensorBoard. Without one, MLflow goes by
            MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, W&B by WANDB_MODE, WANDB_PROJECT, WANDB_DIR and so on, and
            is offline where nobody is logged in; TensorBoard writes to ``runs``. None: nothing is sent.
        tell: is told of failures, in a line each.

    Raises:
        StudyError: when a tracker is none of these, is named twice, or its package is not installed.
    """

    def __init__(self, *trackers: str, tell: Callable[[str], None] = warnings.warn) -> None:
        self.tell, self._lock, self._began = tell, threading.Lock(), time.time()
        self._lines = [_Line(name, TRACKERS[name](where)) for name, where in _parsed(trackers)]
        self._study: optuna.Study | None = None
        self._about: About | None = None

    def begin(self, study: optuna.Study) -> list[str]:
        """Send what ended before; returns where to look, in a line for each tracker that answers."""
        self(study)
        return [f"{each.name}: {line(each.tracker.told, LONGEST)}" for each in self._lines if each.opened]

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """Send what ended and was not sent yet.

        Raises:
            StudyError, StorageError: when the study cannot be read or written; never for a tracker's sake.
        """
        self._send(study, last=False)

    def close(self) -> None:
        """Send what is left, and end the runs for now."""
        if self._study is not None:
            self._send(self._study, last=True)
        self._end()

    def _end(self) -> None:
        for each in self._lines:
            if each.opened:
                with self._failing(each):
                    each.tracker.close()
                each.opened, each.sent = False, set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:  # the database may be away, or the user in a hurry: what is left is sent when the search goes on
            self._end()

    def _send(self, study: optuna.Study, *, last: bool) -> None:
        if not self._lines:
            return
        with self._lock:
            if study is not self._study:
                self._end()
                self._study, self._about = study, None
            trials = study.get_trials(deepcopy=False)
            ended = [*_ended(study, trials, self._began, last)]
            noted = _noted(study)
            for each in self._lines:
                if not last and time.monotonic() < each.again:
                    continue
                if all(trial.number in each.sent for trial in ended) and each.opened:
                    continue
                about = self._about = self._about or _about(study, noted["id"])
                before, earlier = set(each.sent), _numbers(noted["sent"].get(each.key, ""), len(trials))
                with self._failing(each):
                    if not each.opened:
                        each.sent, each.opened = each.tracker.open(about, earlier), True
                    for trial in _records(about, ended, frozenset(each.sent)):
                        each.tracker.send(trial)
                        each.sent.add(trial.number)
                if each.sent != before:
                    noted["sent"][each.key] = _ranges(each.sent)
                    attributes.write_study(study, {ATTRIBUTE: noted})
                left = sum(trial.number not in each.sent for trial in ended)
                if last and left:
                    self.tell(f"{each.name} lacks {left} trials, which it gets when the search goes on")

    @contextmanager
    def _failing(self, each: _Line) -> Iterator[None]:
        """Whatever a tracker raises is told, the first time, and is no more than that."""
        started = time.monotonic()
        try:
            yield
            each.failed = False
        except Exception as error:
            each.again = time.monotonic() + max(PAUSE, 10 * (time.monotonic() - started))
            if not each.failed:
                why = line(scrub(first_line(error)), LONGEST)
                self.tell(f"{each.name} failed, and is tried again later; the search goes on: {why}")
            each.failed = True


@dataclass
class _Line:
    """A tracker, what it was sent, and how that goes."""

    name: str
    tracker: Tracker
    sent: set[int] = field(default_factory=set)
    opened: bool = False
    failed: bool = False
    again: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.name}: {self.tracker.place}"


def _parsed(trackers: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names of trackers, and their places."""
    names: list[str] = []
    for text in trackers:
        name, equals, where = text.partition("=") if isinstance(text, str) else (repr(text), "", "")
        if name not in TRACKERS or (equals and not where):
            raise StudyError(
                f"a tracker is one of {', '.join(TRACKERS)}, or such a name and a place, as tensorboard=runs, got "
                f"{line(text)!r}{nearest(name, [*TRACKERS])}"
            )
        if name in names:
            raise StudyError(f"tracker {name} is named twice")
        if find_spec(name) is None:
            raise StudyError(f"tracker {name} needs its package: pip install 'moeopt[tracking]'")
        names.append(name)
        yield name, where or None


def _ended(study: optuna.Study, trials: Sequence[FrozenTrial], began: float, last: bool) -> Iterator[FrozenTrial]:
    """Finished trials, by number; until the last time those of lower numbers than any that still runs somewhere.

    A chart draws them in the order that they are sent.
    """
    for trial in trials:
        if trial.state in FINISHED:
            yield trial
        elif trial.state == TrialState.RUNNING and not last:
            worker = genome.origin(trial).get("worker")
            gone = process.is_dead(worker) if worker else seconds(trial.datetime_start, began) < began
            if not gone:
                return


def _noted(study: optuna.Study) -> dict[str, Any]:
    """What a study says of its tracking, with an id that it gets now if it has none."""
    noted = attributes.study_attributes(study).get(ATTRIBUTE)
    check(noted, FORM, f"study {line(study.study_name)!r}: its attribute {ATTRIBUTE!r}")
    if noted is None:
        noted = {"id": secrets.token_hex(8), "sent": {}}
        attributes.write_study(study, {ATTRIBUTE: noted})
    if not re.fullmatch("[0-9a-f]{16}", noted["id"]):
        raise StudyError(
            f"study {line(study.study_name)!r}: {ATTRIBUTE!r}.id must be 16 digits, got {line(noted['id'])!r}"
        )
    return {"id": noted["id"], "sent": dict(noted["sent"])}


def _numbers(text: str, trials: int) -> set[int]:
    """Numbers of trials, of a study that has so many.

    >>> sorted(_numbers("0-2,4", 5))
    [0, 1, 2, 4]
    """
    if not re.fullmatch(r"(\d{1,9}(-\d{1,9})?(,(?!$)|$))*", text):
        raise StudyError(f"trials that were sent must be as 0-11,13, got {line(text)!r}")
    ends = [part.split("-") for part in text.split(",") if part]
    return {number for each in ends for number in range(int(each[0]), min(int(each[-1]) + 1, trials))}


def _ranges(numbers: set[int]) -> str:
    """
    >>> _ranges({0, 1, 2, 4})
    '0-2,4'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda each: each[1] - each[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _about(study: optuna.Study, run: str) -> About:
    """What is sent of a study."""
    about = described(study) if DESCRIPTION in study.user_attrs else {}
    config: dict[str, str | float] = {"study": study.study_name}
    if about:
        config |= told_apart(about)
        config |= _flat({part: inner for part, inner in about.items() if part not in ("version", "format")})
        config["moeopt"] = str(about["version"])
    config |= _flat({"full_model": full_model(study.user_attrs, study.study_name) or {}})
    if isinstance(command := study.user_attrs.get(COMMAND), str):
        config["command"] = command
    names: Sequence[str] = study.metric_names or (objective_names(about) if about or len(study.directions) == 1 else ())
    names = [_name(name) for name in names] or [f"value_{i}" for i in range(len(study.directions))]
    config = {_name(key): line(v, LONGEST) if isinstance(v, str) else v for key, v in config.items()}
    maximised = (direction == StudyDirection.MAXIMIZE for direction in study.directions)
    return About(line(study.study_name, 120), run, config, dict(zip(names, maximised)))


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str | float]:
    """Texts and numbers of nested objects by dotted key; lists as JSON."""
    flat: dict[str, str | float] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{before}{key}.")
        elif inner is not None:
            flat[f"{before}{key}"] = inner if isinstance(inner, (str, int, float)) else json.dumps(inner)
    return flat


def _name(text: str) -> str:
    """A name that all trackers take.

    >>> _name("constraint/bytes <= 24000000000"), _name("loss:boolq")
    ('constraint/bytes_at_most_24000000000', 'loss.boolq')
    """
    text = text.replace("<=", "at most").replace(">=", "at least").replace(":", ".")
    return re.sub(r"[^\w./-]+", "_", text, flags=re.ASCII)[:200]


def _records(about: About, ended: Sequence[FrozenTrial], sent: Collection[int]) -> Iterator[Sent]:
    """What is sent of the trials that were not."""
    objectives = [*about.objectives]
    better = max if about.objectives[objectives[0]] else min
    best: float | None = None
    for trial in ended:
        metrics = dict(zip(objectives, trial.values or ()))
        if len(objectives) == 1:
            if trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0]) and is_feasible(trial):
                best = trial.values[0] if best is None else better(best, trial.values[0])
            if best is not None:
                metrics[f"best_{objectives[0]}"] = best
        if trial.number in sent:
            continue
        metrics |= {_name(k): v for k, v in trial.user_attrs.items() if FINITE.holds(v) and k != COPIED_FROM}
        if isinstance(estimates := trial.user_attrs.get(genome.ESTIMATE), list):
            metrics |= {f"estimate_{name}": value for name, value in zip(objectives, estimates) if FINITE.holds(value)}
        metrics |= {_name(f"constraint/{name}"): value for name, value in trial.constraints.items()}
        origin = genome.origin(trial)
        words: dict[str, Any] = {"state": STATES[trial.state]}
        words |= {name: trial.user_attrs.get(name) for name in (*WORDS, COPIED_FROM)}
        words |= {"parents": " ".join(map(str, origin.get("parents") or ())), "plan": origin.get("plan")}
        yield Sent(
            trial.number, words["state"], {name: float(value) for name, value in metrics.items()},
            {name: line(value, LONGEST) for name, value in words.items() if value not in (None, "")},
            began := seconds(trial.datetime_start, 0.0), seconds(trial.datetime_complete, began),
        )  # fmt: skip
