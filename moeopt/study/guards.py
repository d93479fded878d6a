"""Guards: tasks on which what a search finds must not lose much, whatever it gains on its own.

Of a plan's losses l_i on a guard's examples, weighted, and the full model's f_i on the same ones, the mean of l_i - f_i
less what is allowed is a constraint of the trial, as Optuna's are: ``guard:NAME``, at most 0 where the guard holds.
Samplers and `best_trial` heed it as any other; a trial that racing ends has none. The full model is scored once, and a
study keeps its losses and those of every trial, so that differences can be told with intervals. What trials spend on
guards counts in their `layer_tokens`.

On the examples that were searched a plan is the best of many. The study's recipe holds the guards' examples of dev and
test, too, on which selections and fronts judge plans (`moeopt.results.guarding`): a guard *holds* where the whole
interval of the difference is within what is allowed, is *broken* where the mean is beyond, and *unclear* in between.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from moeopt.defaults import Score
from moeopt.errors import NonFiniteLossError, StorageError, StudyError, TaskError, got
from moeopt.showing import line, shown
from moeopt.statistics import Interval, Standing, bootstrap
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.description import described, reading
from moeopt.trials.objectives import PREFIX

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.evaluation import Evaluator
    from moeopt.models import MergedCache
    from moeopt.plan import Plan
    from moeopt.tasks import Task

ALLOWED, LIMIT = 0.02, 64
"""Loss that a plan may have beyond the full model's, and examples that tell it, unless said otherwise."""
SCORES = "moeopt:guard:"
"""System attributes of a study, with the name behind it: the full model's losses and weights; and of its trials: the
plan's losses."""
CONSTRAINT = "guard:"
"""Constraints of trials, with the name behind it."""
LONGEST_NAME = 80


@dataclass(frozen=True, eq=False)
class Guard:
    """A task on which a plan may lose only so much to the full model.

    Args:
        task: it, with a search split.
        loss: how far the plan's mean loss may lie above the full model's; at least 0.
        limit: use so many examples of each split (text: windows); None: all.
        score: what a loss is, as for `Evaluator`.
        name: what to call it; the task's name by default.
        recorded: by split, the task where a study holds it.

    Raises:
        StudyError: when an argument is not what it should be.
    """

    task: Task
    loss: float = ALLOWED
    limit: int | None = LIMIT
    score: Score = "likelihood"
    name: str = ""
    recorded: Mapping[str, Task] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        from moeopt.tasks import Task

        if not isinstance(self.task, Task):
            raise StudyError(f"a guard is of a moeopt.tasks.Task, got {got(self.task)}")
        object.__setattr__(self, "name", self.name or self.task.name)
        if not isinstance(self.name, str) or not self.name.isprintable() or not 0 < len(self.name) <= LONGEST_NAME:
            raise StudyError(f"a guard's name is printable, of at most {LONGEST_NAME} characters: {shown(self.name)}")
        if isinstance(self.loss, bool) or not isinstance(self.loss, (int, float)) or not 0 <= self.loss < math.inf:
            raise StudyError(f"guard {self.name!r}: loss must be a finite number of at least 0, got {self.loss!r:.80}")
        if self.score not in get_args(Score):
            raise StudyError(
                f"guard {self.name!r}: score must be one of {', '.join(get_args(Score))}, got {self.score!r}"
            )

    def on(self, split: str) -> Task | None:
        """The task, where it has this split."""
        if split in self.recorded:
            return self.recorded[split]
        return self.task if split in self.task.splits else None

    def evaluator(self, split: str, model: PreTrainedModel, tokenizer: Any, **options: Any) -> Evaluator:
        """What scores its examples of a split; further arguments are for `Evaluator`.

        Raises:
            TaskError: as `Evaluator`.
        """
        from moeopt.evaluation import Evaluator

        task = self.on(split) or self.task
        return Evaluator(model, tokenizer, task, split=split, limit=self.limit, score=self.score, **options)


def keep(guard: Guard, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """The JSON from which `restored` makes a guard that scores the same examples of every split.

    Raises:
        TaskError: as `moeopt.study.recorded_tasks.keep`.
    """
    from moeopt.study.recorded_tasks import Use, keep
    from moeopt.tasks.base import SPLITS

    tasks = {split: task for split in SPLITS if (task := guard.on(split)) is not None}
    kept = {split: keep(task, Use(split, tokenizer, guard.limit, max_length)) for split, task in tasks.items()}
    return {"name": guard.name, "loss": guard.loss, "limit": guard.limit, "score": guard.score, "tasks": kept}


def restored(record: Mapping[str, Any]) -> Guard:
    """The guard that `keep` wrote down.

    Raises:
        StudyError: if it is not what `keep` writes.
    """
    from moeopt.study.recorded_tasks import restored

    try:
        tasks = {split: restored(task, split) for split, task in record["tasks"].items()}
        settings = {key: record[key] for key in ("loss", "limit", "score", "name")}
        return Guard(tasks["search"], **settings, recorded=tasks)
    except (TaskError, KeyError, TypeError) as error:
        raise StudyError(f"a guard kept in the study cannot be used: {error!s:.300}") from None


@dataclass(frozen=True)
class Guarded:
    """A plan on a guard.

    Args:
        name: of the guard.
        split: whose examples they are.
        examples: how many.
        change: the plan's mean loss less the full model's, with its 95% interval over them.
        allowed: how much that may be.
    """

    name: str
    split: str
    examples: int
    change: Interval
    allowed: float

    @property
    def verdict(self) -> Standing:
        """Whether the change is within what is allowed (`Interval.within`)."""
        return self.change.within(self.allowed)

    @property
    def record(self) -> dict[str, Any]:
        """All of it as JSON, where infinite numbers are null."""
        ends = {name: value if math.isfinite(value) else None for name, value in asdict(self.change).items()}
        return {**asdict(self), "change": ends, "verdict": self.verdict}

    def __str__(self) -> str:
        words = {"holds": "holds", "unclear": "is not clear", "broken": "is broken"}[self.verdict]
        return (
            f"guard {line(self.name, LONGEST_NAME)} {words}: loss {self.change} beyond the full model's on "
            f"{self.examples:,} {self.split} examples, {self.allowed:g} allowed"
        )


def broken(guarded: Iterable[Guarded]) -> list[Guarded]:
    """Those that are broken."""
    return [each for each in guarded if each.verdict == "broken"]


@dataclass
class Judged:
    """What a trial's plan gave on the guards: attributes of the trial, and what they cost."""

    attrs: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    layer_tokens: int = 0


class Guards:
    """The guards of an objective, scored on their search splits.

    Args:
        guards: with names of their own.
        model, tokenizer: the full model.
        cache: of merged experts, the objective's.
        options: of evaluators.

    Attributes:
        layer_tokens: what the full model's scores cost in the study that is searched.

    Raises:
        StudyError: when two have one name, or one is none.
        TaskError, ModelError: as `Evaluator`.
    """

    def __init__(
        self, guards: Iterable[Guard], model: PreTrainedModel, tokenizer: Any, *, cache: MergedCache, **options: Any
    ) -> None:
        self.guards = tuple(guards)
        for guard in self.guards:
            if not isinstance(guard, Guard):
                raise StudyError(f"guards are moeopt.Guard(task, loss=0.02), got {got(guard)}")
        names = [guard.name for guard in self.guards]
        for name in names:
            if names.count(name) > 1:
                raise StudyError(f"two guards are called {name!r}: give them names of their own, name=")
        self.model, self.layer_tokens = model, 0
        self.evaluators = {g.name: g.evaluator("search", model, tokenizer, **options) for g in self.guards}
        for evaluator in self.evaluators.values():
            evaluator.passes.cache = cache  # experts that a plan merges are made once for all
        self._references: dict[str, NDArray[np.float32]] = {}
        self._searched: Callable[[], optuna.Study | None] = lambda: None

    @cached_property
    def _names(self) -> dict[str, str]:
        """By guard, `moeopt.evaluation.store.scores_name` of its evaluator."""
        from moeopt.evaluation.store import scores_name
        from moeopt.models import fingerprint

        model = fingerprint(self.model)
        return {name: scores_name(evaluator, model) for name, evaluator in self.evaluators.items()}

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        from moeopt.models import lock_of

        return lock_of(self.model)

    def begin(self, study: optuna.Study | None) -> None:
        """Once a study: it gets the full model's scores, unless it holds them, and nothing run before is reused.

        Raises:
            StudyError: when the full model's loss on a guard is not finite.
            StorageError: when what the study holds is damaged.
        """
        if not self.guards or (self._references and self._searched() is study):
            return
        with self._lock:
            self.layer_tokens = 0
            for guard in self.guards:
                held = None if study is None else _reference(study, guard.name, self._names[guard.name])
                if held is None:
                    held = self._measured(guard, study)
                self._references[guard.name] = held.scores
                self.layer_tokens += held.layer_tokens
            self._searched = (lambda: None) if study is None else weakref.ref(study)

    def _measured(self, guard: Guard, study: optuna.Study | None) -> _Reference:
        evaluator = self.evaluators[guard.name]
        evaluator.clear(keep_teacher=True)
        try:
            evaluation = evaluator.full_model()
        except NonFiniteLossError as error:
            raise StudyError(f"guard {guard.name!r} can hold nothing against the full model: {error}") from None
        evaluator.clear(keep_teacher=True)  # what trials cost does not depend on where this was run
        scores = evaluation.scores[:2]
        if study is not None:
            key = SCORES + guard.name
            attrs = genome.pack(key, scores.reshape(-1))
            attrs[key] |= {"of": self._names[guard.name], "layer_tokens": evaluation.layer_tokens}
            attributes.write_study(study, attrs)
        return _Reference(scores, evaluation.layer_tokens, self._names[guard.name])

    def judge(self, plan: Plan, study: optuna.Study | None, copied_from: int | None) -> Judged:
        """What a plan gives on the guards.

        Args:
            plan: it.
            study: that is searched.
            copied_from: the trial of it that had this plan, whose losses are taken where it has them.

        Raises:
            NonFiniteLossError: naming the guard, when a loss is not finite.
            OutOfMemoryError: when a single sequence does not fit.
        """
        made = Judged()
        trials = study.get_trials(deepcopy=False) if study is not None and copied_from is not None else []
        earlier = next((trial for trial in trials if trial.number == copied_from), None)
        for guard in self.guards:
            losses = None if earlier is None else _losses(earlier, guard.name, self._names[guard.name])
            if losses is None:
                try:
                    evaluation = self.evaluators[guard.name].evaluate(plan)
                except NonFiniteLossError as error:
                    raise NonFiniteLossError(f"guard {guard.name!r}: {error}", layer=error.layer) from None
                losses = evaluation.losses
                made.tokens += evaluation.tokens
                made.layer_tokens += evaluation.layer_tokens
            key = SCORES + guard.name
            made.attrs |= genome.pack(key, losses)
            made.attrs[key]["of"] = self._names[guard.name]
            full, weights = self._references[guard.name].astype(np.float64)
            change = float(np.average(losses.astype(np.float64) - full, weights=weights))
            made.attrs[PREFIX + CONSTRAINT + guard.name] = change - guard.loss
        return made

    def told(self) -> Iterator[str]:
        """What guards are, a line each, once a study has begun."""
        for guard in self.guards:
            losses, weights = self._references[guard.name].astype(np.float64)
            loss, evaluator = np.average(losses, weights=weights), self.evaluators[guard.name]
            yield (
                f"guard {line(guard.name, LONGEST_NAME)}: full model's loss {loss:.4f} on {len(losses):,} examples, "
                f"{guard.loss:g} beyond it allowed; {evaluator.tokens * evaluator.layers:,} layer-tokens a trial"
            )

    def repack(self, batch_tokens: int) -> None:
        """Go on with so many padded tokens a forward pass."""
        for evaluator in self.evaluators.values():
            evaluator.passes.repack(batch_tokens)

    def describe(self) -> dict[str, Any]:
        """What a study must agree on, JSON; empty without guards."""
        about = [
            {
                "name": guard.name, "loss": float(guard.loss), "limit": guard.limit, "score": guard.score,
                "task": guard.task.describe(), "scored": self.evaluators[guard.name].fingerprint,
            }
            for guard in self.guards
        ]  # fmt: skip
        return {"guards": about} if about else {}


@dataclass(frozen=True, eq=False)
class _Reference:
    """The full model on a guard: losses and weights, float32 (2, examples), and what they cost."""

    scores: NDArray[np.float32]
    layer_tokens: int
    of: str


def _reference(study: optuna.Study, name: str, of: str | None = None) -> _Reference | None:
    """What a study holds of the full model on a guard; None where that is nothing, or of something else than `of`."""
    key, where = SCORES + name, f"study {shown(study.study_name)}: its attribute {shown(SCORES + name)}"
    with reading(study.study_name):
        attrs = attributes.study_attributes(study)
    packed = genome.unpack(key, attrs)
    if packed is None or (of is not None and attrs[key].get("of") != of):
        return None
    cost = attrs[key].get("layer_tokens")
    if not packed.size or packed.size % 2 or type(cost) is not int or not 0 <= cost <= 1 << 53:
        raise StorageError(f"{where} is damaged: {packed.size} numbers, {shown(cost)} layer-tokens")
    scores = packed.reshape(2, -1)
    if not (np.isfinite(scores).all() and (scores[1] > 0).all()):
        raise StorageError(f"{where} is damaged: losses are not all finite, or weights not positive")
    return _Reference(scores, cost, str(attrs[key].get("of")))


def _losses(trial: FrozenTrial, name: str, of: str) -> NDArray[np.float32] | None:
    """A trial's losses on a guard; None where it has none, or of something else than `of`."""
    key = SCORES + name
    losses = genome.unpack(key, trial.system_attrs)
    return None if losses is None or trial.system_attrs[key].get("of") != of else losses


def guards_of(study: optuna.Study) -> dict[str, float]:
    """The guards of a study by name, each with the loss that it allows; empty where it has none.

    Raises:
        StudyError: as `moeopt.trials.description.described`.
    """
    guards = (described(study).get("evaluation") or {}).get("guards") or []
    return {guard["name"]: float(guard["loss"]) for guard in guards}


def changes(study: optuna.Study, trial: FrozenTrial) -> list[Guarded]:
    """A trial on the guards of its study, on the examples that were searched; those that it was not scored on are none.

    Raises:
        StudyError, StorageError: when what is stored is damaged.
    """
    made = []
    for name, allowed in guards_of(study).items():
        reference = _reference(study, name)
        losses = None if reference is None else _losses(trial, name, reference.of)
        if reference is None or losses is None:
            continue
        full, weights = reference.scores.astype(np.float64)
        if len(losses) != len(full):
            where = f"trial {trial.number}: {shown(SCORES + name)}"
            raise StorageError(f"{where} is damaged: {len(losses)} losses of {len(full)} examples")
        change = bootstrap(losses.astype(np.float64) - full, weights)
        made.append(Guarded(name, "search", len(full), change, allowed))
    return made
