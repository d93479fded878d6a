"""How long a plan takes a token, by a cost model that a study measures once.

Seconds of single trials differ more from run to run than plans do, and a study that is resumed, or searched by many
machines, must tell the same of a plan. So the full model and a few of its prunings, of few and many experts and of
every k, are timed once on the evaluator's own batch: in rounds, each of them in each round, in turn, so that what slows
the machine slows all alike. Each has the median over rounds of its time over the full model's of the same round, q.
Then, with a plan's active experts a (of the full model's k) and its kept experts r (of n), both means over layers,

    q = c_0 + c_1 a / k + c_2 r / n,    c >= 0, by least squares,

times the full model's seconds a token, is the plan's latency. Coefficients, error and device are kept in the study.
"""

from __future__ import annotations

import itertools
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch

from moeopt.errors import StudyError
from moeopt.models import patched
from moeopt.models.devices import is_accelerator
from moeopt.models.layerwise import input_device
from moeopt.plan import Plan
from moeopt.showing import line, shown
from moeopt.study.scores import active_experts
from moeopt.study.storage import attributes
from moeopt.trials.description import COUNT, FINITE, TEXT, check

if TYPE_CHECKING:
    import optuna

    from moeopt.evaluation import Evaluation, Evaluator

LATENCY = "moeopt:latency"
"""System attribute of a study: its cost model."""
FORM = {
    "coefficients": [FINITE], "seconds": FINITE, "error": FINITE, "plans": COUNT, "tokens": COUNT, "device": TEXT,
}  # fmt: skip
ROUNDS = 7


class Latency:
    """Seconds a token, at the evaluator's batch size, by the cost model of the study; see the top of this file."""

    needs_evaluation = True

    def __init__(self, evaluator: Evaluator, clock: Callable[[], float] = time.perf_counter) -> None:
        self._evaluator, self._clock = evaluator, clock
        self._model: Mapping[str, Any] | None = None
        self._study: Callable[[], optuna.Study | None] = lambda: None

    def begin(self, study: optuna.Study | None) -> None:
        """Take a study's cost model, or measure one and keep it there.

        Raises:
            StudyError: when what the study keeps is none.
        """
        if self._model is not None and self._study() is study:
            return
        held = None if study is None else self._held(study)
        if held is None:
            held = self._measured()
            warnings.warn(
                f"latency is that of a cost model, fitted to {held['plans']} plans on {held['device']}: its largest "
                f"error is {held['error']:.1%} of the full model's {held['seconds'] * 1e6:,.1f} us a token",
                stacklevel=4,
            )
            if study is not None:
                attributes.write_study(study, {LATENCY: held})
                held = self._held(study)  # another worker may have measured meanwhile: the last that was written
        self._model, self._study = held, (lambda: None) if study is None else weakref.ref(study)

    def __call__(self, plan: Plan, evaluation: Evaluation | None) -> float:
        assert evaluation is not None
        assert self._model is not None, "begin first"
        features = _features(plan, active_experts(evaluation), self._k)
        return float(np.array(self._model["coefficients"]) @ features * self._model["seconds"])

    def describe(self) -> Any:
        return None

    @property
    def _k(self) -> float:
        return float(np.mean([layer.k for layer in self._evaluator.passes.moe]))

    def _held(self, study: optuna.Study) -> dict[str, Any] | None:
        held = attributes.study_attributes(study).get(LATENCY)
        if held is None:
            return None
        where = f"study {shown(study.study_name)}: its attribute {LATENCY!r}"
        check(held, FORM, where)
        if len(held["coefficients"]) != 3 or min(held["coefficients"]) < 0 or held["seconds"] <= 0:
            raise StudyError(f"{where} is no cost model: {line(str(held), 200)}")
        return dict(held)

    def _measured(self) -> dict[str, Any]:
        model, moe = self._evaluator.model, self._evaluator.passes.moe
        n, k, blocks = moe[0].n, moe[0].k, self._blocks
        least = -(-k // blocks) * blocks
        counts = sorted({n, (n + least) // 2 // blocks * blocks, least})
        shares = [(r, active) for r, active in itertools.product(counts, sorted({k, 1}))]
        plans = [_pruned(len(moe), n, r, active, blocks) for r, active in shares]
        batch = max(self._evaluator.passes.batches[0], key=lambda each: each.ids.numel())
        ids = batch.ids.to(input_device(model))
        times: list[list[float]] = [[] for _ in plans]
        for round_ in range(ROUNDS + 1):
            for i in np.roll(np.arange(len(plans)), round_).tolist():
                with patched(model, plans[i]), torch.inference_mode():
                    self._wait()
                    started = self._clock()
                    model(input_ids=ids, use_cache=False)
                    self._wait()
                    spent = self._clock() - started
                if round_:  # the first one warms up
                    times[i].append(spent)
        whole = shares.index((n, k))
        ratios = np.array([median(a / b for a, b in zip(each, times[whole])) for each in times])
        rows = np.stack([_features(plan, active, k) for plan, (_, active) in zip(plans, shares)])
        coefficients = scipy.optimize.nnls(rows, ratios)[0]
        return {
            "coefficients": coefficients.tolist(), "seconds": median(times[whole]) / ids.numel(),
            "error": float(np.abs(rows @ coefficients - ratios).max()), "plans": len(plans), "tokens": ids.numel(),
            "device": str(ids.device),
        }  # fmt: skip

    @property
    def _blocks(self) -> int:
        from moeopt.models import shape_of

        return shape_of(self._evaluator.model).router_groups

    def _wait(self) -> None:
        device = input_device(self._evaluator.model)
        if is_accelerator(device):
            torch.accelerator.synchronize(device)


def _features(plan: Plan, active: float, k: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    kept = np.mean([layer.kept_experts / layer.experts for layer in plan.layers])
    return np.array([1.0, active / k, float(kept)])


def _pruned(layers: int, n: int, r: int, k: int, blocks: int) -> Plan:
    """The plan that keeps the first r experts of every layer, as many of each group that routers choose first."""
    kept = [b * (n // blocks) + i for b in range(blocks) for i in range(r // blocks)]
    return Plan.one_hot([kept] * layers, experts=n, k=k)
