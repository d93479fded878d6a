"""What a study holds, as checked values: nothing that a stranger wrote into it is trusted, and nothing of it can fail.

A trial that cannot be read is a row without what is missing. What is wrong with the study as a whole is said in
`Digest.problems`, one line each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import MoeoptError, StudyError
from moeopt.report import facts
from moeopt.showing import line
from moeopt.spaces import Space, from_description
from moeopt.spaces.rows import range_names
from moeopt.study import CALIBRATION, DESCRIPTION, METHOD
from moeopt.study.reference import Reference, of_facts
from moeopt.trials import genome
from moeopt.trials.description import FINITE, full_model, held_facts

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from moeopt.plan import Plan

Floats = NDArray[np.float64]

SELECTION = "selection"
"""User attribute of a study: what `moeopt select` left."""
MOST_TRIALS = 20_000
"""Studies of more trials get a note, but no figures."""
MOST_NUMBERS = 1 << 20
"""Numbers of a trial; larger search spaces are taken for damage: large models have 100 layers and 500 experts."""
LONGEST = 80
"""Characters of a name that are shown."""


@dataclass(frozen=True)
class Row:
    """A trial that ended.

    Args:
        number: it.
        loss: of a complete trial, or the estimate of a pruned one; NaN where there is none.
        pruned: whether it is an estimate.
        cost: layer-tokens, calibration included; at least 0.
        operator: that made its genotype; empty when unknown.
        parents: their numbers, at most 8.
        mass: (groups, n), the absolute weights with which each expert goes into kept ones; 1 where it is kept as it is.
        features: (size,), the sums over rows of W_EM and W_RM by group, then what is searched beyond them.
    """

    number: int
    loss: float
    pruned: bool
    cost: float
    operator: str
    parents: tuple[int, ...]
    mass: NDArray[np.float32] | None = None
    features: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Digest:
    """A study, read.

    Args:
        name: of the study.
        about: the description that moeopt keeps in it; empty where it cannot be read.
        space: what it searches; None where that cannot be read.
        rows: its ended trials by number, those left out that were run again.
        best: the complete trial of least loss, the first of equals.
        accuracy: its accuracy, 0 to 1, NaN when unknown.
        plan: its plan.
        full: what the full model gives; None where that is unknown or cannot be read.
        selection: the record that `moeopt select` left, unchecked.
        blocks: name and place in `Row.features` of every choice that is searched.
        problems: what is wrong, in lines for the user.
        held: what became of its gain on dev, of the form `description.GAIN`; None where that is unknown.
    """

    name: str
    about: Mapping[str, Any]
    space: Space | None = None
    rows: tuple[Row, ...] = ()
    best: Row | None = None
    accuracy: float = math.nan
    plan: Plan | None = None
    full: Reference | None = None
    selection: Mapping[str, Any] | None = None
    blocks: tuple[tuple[str, slice], ...] = ()
    problems: tuple[str, ...] = ()
    held: Mapping[str, Any] | None = None

    def part(self, *path: str) -> Any:
        """A field of the description, or None."""
        return facts.part(self.about, *path)


def digest(study: optuna.Study, read: dict[int, Row] | None = None) -> Digest:
    """Read a study of moeopt.

    Args:
        read: rows of earlier calls by trial number, which do not change any more; new ones are added.
    """
    read = {} if read is None else read
    attrs = study.user_attrs
    problems: list[str] = []

    def attempt(what: str, reader: Callable[[], Any]) -> Any:
        """What the reader gives; None, and a problem, whatever a stranger's attribute does to it."""
        try:
            return reader()
        except Exception as error:
            problems.append(f"{what} cannot be read: {line(str(error) or type(error).__name__)}")
            return None

    about = attrs.get(DESCRIPTION)
    if not isinstance(about, dict):
        problems.append(f"its description is {_kind(about)}, not what moeopt writes")
        about = {}
    space = attempt("its search space", lambda: _space(about.get("space")))
    trials = study.get_trials(deepcopy=False)
    name, single = line(study.study_name, LONGEST), len(study.directions) == 1
    if not single or len(trials) > MOST_TRIALS:
        many = f"it has {len(trials):,} trials; figures are drawn up to {MOST_TRIALS:,}"
        problems.append(many if single else "it has several objectives: the Pareto front is the dashboard's own plot")
        return Digest(name, about, space, problems=tuple(problems))
    repeated = {number for trial in trials for number in _ints(trial.system_attrs.get(genome.RETRIES))}
    ended = {t.number: t for t in trials if t.state.is_finished() and t.number not in repeated}
    for trial_number in ended.keys() - read.keys():
        read[trial_number] = _row(ended[trial_number], space)
    rows = [read[trial_number] for trial_number in ended]
    with_loss = [row for row in rows if not math.isnan(row.loss)]
    unreadable = 0 if space is None else sum(row.features is None for row in with_loss)
    if unreadable:
        problems.append(f"the plans of {unreadable} of {len(rows)} trials cannot be read")
    best = min((row for row in with_loss if not row.pruned), key=lambda row: row.loss, default=None)
    plan, accuracy = None, math.nan
    if best is not None:
        accuracy = number(ended[best.number].user_attrs.get("accuracy"))
        if space is not None and best.features is not None:
            plan = space.plan(ended[best.number])
    full = attempt("what its full model gives", lambda: _full(attrs, study.study_name))
    held = attempt("what of its gain held", lambda: held_facts(attrs, study.study_name))
    selection = attrs.get(SELECTION)
    if selection is not None and not isinstance(selection, dict):
        problems.append(f"its selection is {_kind(selection)}, not what moeopt select writes")
        selection = None
    return Digest(
        name=name, about=about, space=space, rows=tuple(rows), best=best, accuracy=accuracy, plan=plan, full=full,
        selection=selection, blocks=() if space is None else feature_blocks(space), problems=tuple(problems), held=held,
    )  # fmt: skip


def _full(attrs: Mapping[str, Any], name: str) -> Reference | None:
    facts = full_model(attrs, name)
    return None if facts is None else of_facts(facts)


def feature_blocks(space: Space) -> tuple[tuple[str, slice], ...]:
    """Names of the choices of a space, and where each stands in `Row.features`."""
    n, blocks = space.shape.experts, []
    searched = space.matrices(space.start()).shape[2] > 0
    for g, name in enumerate(space.group_names()):
        blocks.append((name, slice(2 * n * g, 2 * n * (g + 1) if searched else 2 * n * g)))
    at, count = 2 * n * len(space.groups), len(space.extra_groups)
    kinds = [name.split(".")[0] for name in space.names[space.extras]][:: count or 1]
    for kind in kinds:
        for name in range_names(space.extra_groups):
            blocks.append((f"{kind} {name}", slice(at, at + 1)))
            at += 1
    return tuple(block for block in blocks if block[1].stop > block[1].start)


def _row(trial: FrozenTrial, space: Space | None) -> Row:
    attrs = trial.user_attrs
    pruned = trial.state.name == "PRUNED"
    costs = (number(attrs.get(key)) for key in ("layer_tokens", CALIBRATION))
    operator = attrs.get(METHOD) or attrs.get("operator")
    row = Row(
        number=trial.number,
        loss=number(attrs.get(genome.ESTIMATE) if pruned else (trial.values or [None])[0]),
        pruned=pruned,
        cost=sum(max(0.0, cost) for cost in costs if not math.isnan(cost)),
        operator=line(operator, LONGEST) if operator else "",
        parents=tuple(parent for parent in _ints(attrs.get("parents")) if parent < trial.number),
    )
    if space is None or math.isnan(row.loss):
        return row
    try:
        x = space.vector(trial)
        matrices = space.matrices_in_force(space.snap(x))
        mass = np.abs(matrices[:, 0]).sum(axis=1, dtype=np.float32)
        features = np.concatenate([matrices.sum(axis=2, dtype=np.float32).reshape(-1), x[space.extras]])
    except (MoeoptError, ValueError, TypeError, KeyError, OverflowError):
        return row
    return replace(row, mass=mass, features=features)


def _space(description: Any) -> Space:
    """The space of a description, unless every trial of it would fill much of the memory."""
    space = from_description(description)
    if 2 * len(space.groups) * space.shape.experts > MOST_NUMBERS:
        raise StudyError(f"{space.shape} in {len(space.groups)} groups is larger than any model that moeopt knows")
    return space


def number(value: Any) -> float:
    """A finite float, or NaN."""
    return float(value) if FINITE.holds(value) else math.nan


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> tuple[int, ...]:
    values = value[:64] if isinstance(value, (list, tuple)) else ()
    return tuple(n for n in values if _is_int(n) and 0 <= n < 1 << 31)[:8]
