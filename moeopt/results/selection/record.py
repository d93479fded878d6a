"""What a selection gave: numbers, intervals, a verdict, and the small record of them that the study keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from moeopt import __version__
from moeopt.errors import StudyError
from moeopt.showing import Shown, line, listed, shown
from moeopt.statistics import paired_bootstrap
from moeopt.study.guards import broken
from moeopt.trials.description import FORMAT, reading
from moeopt.trials.selected import FULL, SEARCH_BEST, WINNER, recorded

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from moeopt.evaluation import Evaluation, Interval
    from moeopt.plan import Plan
    from moeopt.study.guards import Guarded

Verdict = Literal["holds", "shrank", "vanished", "reversed", "none"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan of the study's best, judged on dev.

    Args:
        trial: number of the first trial that had the plan.
        plan: the plan.
        search_loss: the trial's value.
        dev: what it gives on dev; None where the loss is not finite there.
        bytes: of its weights as a checkpoint; None where it was not asked for.
        against_full: on dev, its loss less the full model's; None where it was not asked for.
    """

    trial: int
    plan: Plan
    search_loss: float
    dev: Evaluation | None
    bytes: float | None = None
    against_full: Interval | None = None


@dataclass(frozen=True, eq=False)
class Selection(Shown):
    """What `moeopt.select` returns.

    A loss is what the study minimised: with an `active_weight`, active experts are weighed in.

    Args:
        study: its name.
        metric: what `Evaluation.accuracy` is called for the task; ``"agreement"`` for a label-free score.
        settings: top, dev_limit, test_limit, score and stock_only, as asked for; fit and loss_within where they were.
        examples: for each split the number of examples (``"count"``) and the name of model and examples (``"of"``).
        candidates: the winner first; then the least loss on dev, then the least on search, then the lowest number.
        evaluations: by split, then ``"full"``, ``"winner"`` and, where that is another plan and its loss is
            finite, ``"search_best"``.
        looks: how many selections of this study have run something on test so far.
        evaluated: plans that this call ran, each on one split; 0: all was on record.
        layer_tokens: what that cost.
        full_bytes: of the full model's weights; None where it was not asked for.
        guards: the winner on the study's guards, on dev and on test.
        not_judged: guards that could not be judged on one of these, and why.
        passed_over: candidates that would have won if they did not break a guard on dev.
        health: `Health.record` of the winner; None where it was not asked for.
    """

    study: str
    metric: str
    settings: Mapping[str, Any]
    examples: Mapping[str, Mapping[str, Any]]
    candidates: tuple[Candidate, ...]
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    looks: int
    evaluated: int
    layer_tokens: int
    full_bytes: float | None = None
    guards: tuple[Guarded, ...] = ()
    not_judged: tuple[str, ...] = ()
    passed_over: int = 0
    health: Mapping[str, Any] | None = None

    @property
    def winner(self) -> Candidate:
        """The candidate of least loss on dev; with `loss_within` the smallest that is surely within it there."""
        return self.candidates[0]

    @property
    def search_best(self) -> Candidate:
        """The candidate of least loss on search; with `loss_within`, which seeks no least loss, the winner."""
        if self.loss_within is not None:
            return self.winner
        return min(self.candidates, key=lambda candidate: (candidate.search_loss, candidate.trial))

    def gain(self, split: str) -> float:
        """Loss of the full model minus that of the winner: above 0, the winner is better."""
        return self.evaluations[split][FULL].loss - self.evaluations[split][WINNER].loss

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """On test, the winner minus ``"full"`` and ``"search_best"``: of ``"loss"``, and of the metric by its name."""
        test = self.evaluations["test"]
        return {
            name: {
                "loss": paired_bootstrap(test[WINNER], test[name]),
                self.metric: paired_bootstrap(test[WINNER], test[name], of="accuracy"),
            }
            for name in (FULL, SEARCH_BEST)
            if name in test
        }

    @property
    def test_gain(self) -> Interval:
        """`gain("test")` with its 95% interval."""
        return -self.intervals[FULL]["loss"]

    @property
    def verdict(self) -> Verdict:
        """See `verdict`."""
        return verdict(self.gain("search"), self.test_gain)

    @property
    def sentence(self) -> str:
        """What became on test of the gain on search."""
        return sentence(self.gain("search"), self.test_gain)

    @property
    def loss_within(self) -> float | None:
        """What the winner may lose against the full model, where that was asked for."""
        return self.settings.get("loss_within")

    @property
    def faults(self) -> list[str]:
        """The guards that the winner breaks, and the health report that it fails; a good plan has none."""
        named = [f"guard {line(each.name, 80)} ({each.split})" for each in broken(self.guards)]
        return named + ["its health report"] * (self.health is not None and self.health["verdict"] == "broken")

    @property
    def good(self) -> bool:
        """Whether the winner keeps all that was to be kept, as far as that was judged."""
        return not self.faults

    @property
    def warnings(self) -> list[str]:
        """Why not to trust the result; empty when nothing speaks against it."""
        lost = [f"The winner is no good plan: it fails {listed(self.faults)}."] if self.faults else []
        lost += [text for text, holds in self._kept if not holds]
        lost += [self.sentence] if self.verdict in ("vanished", "reversed") else []
        lost += [] if self.loss_within is None or self._stays_within else [self._within(self.loss_within)]
        return [*lost, *([look_warning(self.looks)] if self.looks > 1 else [])]

    @property
    def _stays_within(self) -> bool:
        return self.loss_within is not None and -self.test_gain.low <= self.loss_within

    def _within(self, loss: float) -> str:
        told = f"on dev {self.winner.against_full}, on test {-self.test_gain}"
        if self._stays_within:
            return f"Winner - full model stays within {loss:g}: {told}."
        return f"That the winner costs no more than {loss:g} does not hold on test: {told}."

    @property
    def _kept(self) -> list[tuple[str, bool]]:
        """What was to be kept, in sentences, and whether it surely is."""
        told = [(_sentence(str(each)), each.verdict == "holds") for each in self.guards]
        told += [(_sentence(why), False) for why in self.not_judged]
        if self.health is not None:
            told.append((f"Health: {self.health['told']}.", self.health["verdict"] == "holds"))
        return told

    @property
    def _goal(self) -> list[str]:
        """What was asked for of its size, and what it has; empty where nothing was."""
        if self.winner.bytes is None or self.full_bytes is None:
            return []
        share = f"{100 * self.winner.bytes / self.full_bytes:.0f}% of the full model's {self.full_bytes:,.0f} bytes"
        fit = self.settings.get("fit")
        asked = "" if fit is None else f", of {fit:,} that it may have"
        within = [] if self.loss_within is None else [self._within(self.loss_within)]
        return [f"The winner has {self.winner.bytes:,.0f} bytes of weights{asked}: {share}.", *within]

    @property
    def sentences(self) -> list[str]:
        """The verdict, and how the winner stands to the full model in the metric and to the best plan of the search."""
        best, changed = self.search_best, self.intervals[FULL][self.metric]
        sentences = [self.sentence, f"Winner - full model on test, {self.metric}: {changed}.", *self._goal]
        sentences += [text for text, _ in self._kept]
        if self.passed_over:
            many = "" if self.passed_over == 1 else "s"
            sentences.append(f"Passed over for breaking a guard on dev: {self.passed_over} candidate{many}.")
        if self.loss_within is not None:
            return sentences
        if best is self.winner:
            return [*sentences, "The best plan of the search is also the best on dev."]
        if SEARCH_BEST not in self.intervals:
            return [*sentences, f"The best of the search (trial {best.trial}) has no finite loss on test."]
        changed = self.intervals[SEARCH_BEST]["loss"]
        return [*sentences, f"Winner - best of the search (trial {best.trial}) on test, loss: {changed}."]

    @cached_property
    def record(self) -> dict[str, Any]:
        """All but plans and examples' scores, as JSON of at most about 50 kB; candidates' losses in 6 digits."""
        dev = [candidate.dev for candidate in self.candidates]
        candidates = {
            "trial": [candidate.trial for candidate in self.candidates],
            "search_loss": [_short(candidate.search_loss) for candidate in self.candidates],
            "dev_loss": [None if e is None else _short(e.loss) for e in dev],
            f"dev_{self.metric}": [None if e is None else _short(e.accuracy) for e in dev],
        }
        if self.full_bytes is not None:
            candidates["bytes"] = [candidate.bytes for candidate in self.candidates]
        kept: dict[str, Any] = {}
        if self.guards:
            kept["guards"] = [each.record for each in self.guards]
        if self.health is not None:
            kept["health"] = dict(self.health)
        return {
            "moeopt": __version__,
            "format": FORMAT,
            "metric": self.metric,
            "settings": dict(self.settings),
            "examples": {split: dict(about) for split, about in self.examples.items()},
            "candidates": candidates,
            WINNER: self.winner.trial,
            SEARCH_BEST: self.search_best.trial,
            "plans": {name: plan.fingerprint for name, plan in self._tested.items()},
            "scores": {
                split: {name: self._scores(e) for name, e in by_name.items()}
                for split, by_name in self.evaluations.items()
            },
            "test_minus": {
                name: {what: asdict(i) for what, i in changes.items()} for name, changes in self.intervals.items()
            },
            "gain": {split: self.gain(split) for split in self.evaluations} | {"test_interval": asdict(self.test_gain)},
            "verdict": self.verdict,
            "sentences": self.sentences,
            "warnings": self.warnings,
            "looks": self.looks,
            **({"good": self.good} | kept if kept else {}),
        }  # fmt: skip

    @property
    def _tested(self) -> dict[str, Plan]:
        best = {SEARCH_BEST: self.search_best.plan} if SEARCH_BEST in self.evaluations["test"] else {}
        return {WINNER: self.winner.plan, **best}

    def _scores(self, e: Evaluation) -> dict[str, float]:
        metrics = {name: float(value) for name, value in e.metrics.items()}
        return {"loss": e.loss, self.metric: e.accuracy, **metrics, "active": e.active}


def verdict(search: float, test: Interval) -> Verdict:
    """What became on test of a gain on search (loss of the full model minus that of the winner).

    - ``none``: there was none to lose, `search` <= 0;
    - ``reversed``: the interval on test lies wholly below 0;
    - ``vanished``: it includes 0;
    - ``shrank``: it lies wholly above 0, and wholly below `search`;
    - ``holds``: it lies wholly above 0, and reaches `search` or begins above it.
    """
    if search <= 0:
        return "none"
    if test.high < 0:
        return "reversed"
    if test.low <= 0:
        return "vanished"
    return "shrank" if test.high < search else "holds"


def sentence(search: float, test: Interval) -> str:
    """`verdict` in words, with the numbers that it rests on."""
    there = f"{test.mean:.4f} [{test.low:.4f}, {test.high:.4f}]"
    gained, changed = f"The gain on search ({search:.4f})", -test
    words = {
        "none": f"No gain on search to lose: winner - full is {-search:+.4f} there, {changed} on test.",
        "reversed": f"{gained} reversed on test ({there}): the winner is worse than the full model.",
        "vanished": f"{gained} vanished on test ({there})",
        "shrank": f"{gained} shrank to {there} on test.",
        "holds": f"{gained} holds on test ({there}).",
    }
    became = verdict(search, test)
    if became != "vanished":
        return words[became]
    unclear = ", which excludes neither 0 nor the gain on search: more test examples would tell"
    return words[became] + (unclear if search <= test.high else "") + "."


def look_warning(looks: int) -> str:
    """What it means that test was looked at more than once."""
    return (
        f"The test split has now been looked at {looks} times for this study: who picks among the results makes the "
        "best of them too good."
    )


def selected_trial(study: optuna.Study) -> FrozenTrial:
    """The winner of the study's latest selection.

    Raises:
        StudyError: when there was none, or as `recorded`.
    """
    record = recorded(study)
    if record is None:
        raise StudyError(f"nothing was selected from study {study.study_name!r} yet; `moeopt select` does it")
    with reading(study.study_name):
        trials = study.get_trials(deepcopy=False)
    winner = next((trial for trial in trials if trial.number == record[WINNER]), None)
    if winner is None:
        raise StudyError(f"study {shown(study.study_name)} has no trial {record[WINNER]}, which its selection names")
    return winner


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _short(value: float) -> float:
    return float(f"{value:.6g}")
