"""Refit: what pruning or merging took from a layer, given back in closed form.

Experts are f_i(x) = W2_i a_i(x), with a_i all that comes before the down projection W2_i. Once a plan says which
experts there are and how the router weighs them, the layer's output is linear in W2 = [W2_1 .. W2_r]: it is A W2' with
A = [g_1 a_1 .. g_r a_r], (tokens, r inner), g_i the weight that expert i gets. So W2 is fitted by ridge regression to
give the full model's hidden states behind the layer, h, in place of the small model's, h':

    D = (A'A + lam I)^-1 A' (h - h'),   W2' <- W2' + D.

Layer by layer, the earlier layers being refitted already: so each one also makes up for what those before it lost,
which gives back more than fitting it to what the full model's own layer adds (`benchmarks/refit.py`). No derivative, no
training loop; the result is an ordinary checkpoint. Related: MergeMoE (arXiv 2510.14436), which fits merged experts.

lam is chosen for each layer among `RIDGES` times the mean of A'A's diagonal, on a quarter of the sequences that the
layer's fit has not seen; a layer that no lam makes better there keeps its weights. The weights are then those of all
sequences, so that what is measured on the quarter flatters later layers, as the earlier ones have seen it.

Statistics are added up over batches: A'A, or A itself where tokens are fewer than columns, which gives the same D by
D = A' (A A' + lam I)^-1 (h - h'). Experts of more than `COLUMNS` columns together are fitted a few at a time, each to
what the others leave, `layer_fitting.SWEEPS` times in turn (block Gauss-Seidel). So beside the model, memory is that of
`COLUMNS` squared (of one expert's columns, where it has more), some ten times the hidden states of the calibration, and
the fitted weights, in float32.

The router's rows stay as they are: fitting them to the full model's logits of the same experts, by least squares on
what enters the small model's router, gives little back before a refit and nothing after one (`benchmarks/refit.py`).

A solution of low rank q takes q (hidden + inner) numbers an expert: D_i V V', V being the first q right singular
vectors of A_i D_i, is the nearest to D_i of that rank in what the expert gives.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeopt.errors import MethodError, ModelError
from moeopt.methods.calibration import Calibration, Stream
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.layer_fitting import LayerFit, LayerFitting
from moeopt.methods.sequences import Batch
from moeopt.models import MoELayer, check_makes, fingerprint, layerwise, patched
from moeopt.plan import LayerPlan, Plan

RIDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""What lam may be, in means of A'A's diagonal."""
HELD_OUT = 4
"""Of so many sequences one is what lam is chosen on."""
COLUMNS = 8192
"""Of A that are fitted at once."""
LOUDER, NEARLY = 9, 0.1
"""How many times what the experts give is what tells whether it is added to the hidden states, and how exactly."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Refit:
    """What `refit` gives.

    Args:
        plan: with down projections of its own.
        layers: what became of each layer.
        layer_tokens: what it cost: tokens times decoder layers, experts that run again for A counting as a layer.
        seconds: wall time.
        calibrated: task, split, sequences and tokens that it was fitted to, and its options, as JSON.
    """

    plan: Plan
    layers: tuple[LayerFit, ...]
    layer_tokens: int
    seconds: float
    calibrated: Mapping[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What was fitted to what, as JSON; an export's model card tells it."""
        return {"refit": {**self.calibrated, "layers": [asdict(fit) for fit in self.layers]}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as `Plan.save`, with `about`."""
        self.plan.save(path, about=self.about)

    def lines(self) -> list[str]:
        """The same for people."""
        fitted = [fit for fit in self.layers if fit.ridge is not None]
        whole = [i for i, fit in enumerate(self.layers) if fit.ridge is None]
        before, after = (np.mean([getattr(fit, name) for fit in self.layers]) for name in ("before", "after"))
        lines = [
            f"refitted {len(fitted)} of {len(self.layers)} layers; on the quarter of the sequences held out of each "
            f"layer's fit, the squared distance from the full model's hidden states is {after:.3f} of what its experts "
            f"give, was {before:.3f}"
        ]
        if whole:
            lines.append(f"not better there, so that they keep their weights: layers {', '.join(map(str, whole))}")
        alone = [i for i, fit in enumerate(self.layers) if fit.factor is None]
        if alone:
            lines.append(f"fitted to what the full model's own layer gives: layers {', '.join(map(str, alone))}")
        return lines


def refit(
    plan: Plan,
    calibration: Calibration,
    *,
    ridges: Sequence[float] = RIDGES,
    rank: int | None = None,
    columns: int = COLUMNS,
    parts: str | Path | None = None,
    progress: Progress | None = None,
) -> Refit:
    """The plan with the down projections of its experts fitted to the full model; see the top of this file.

    Args:
        plan: any plan of the model: pruned, merged, searched, of different r or k by layer, with skipping, or refitted.
        calibration: the full model, and the sequences to fit to.
        ridges: what lam may be, in means of A'A's diagonal.
        rank: q, of the change, for each expert; None: any. A plan that is refitted already keeps whole matrices.
        columns: most columns of A that are fitted at once; memory is some 16 of their squares, in bytes.
        parts: a folder, made where there is none, that keeps every layer that is done, so that the same call goes on
            where it was cut off.
        progress: called with the layers done, all of them, and what comes.

    Raises:
        MethodError: for fewer than four sequences, ridges that are not above 0, a rank below 1, a model that does not
            run layer by layer, or a folder of parts that cannot be written.
        PlanError: when the plan does not fit the model.
        ModelError: when the model's experts are quantised, or take no down projections of a plan.
    """
    started = time.perf_counter()
    if not isinstance(plan, Plan):
        raise MethodError(f"refit takes a Plan, got {type(plan).__name__}")
    if not isinstance(ridges, Sequence) or not ridges or not all(map(_above_0, ridges)):
        raise MethodError(f"ridges must be numbers above 0, got {ridges!r}")
    for name, value in (("rank", rank), ("columns", columns)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise MethodError(f"{name} must be an integer of at least 1, got {value!r}")
    check_refit(calibration, plan)
    options = {"ridges": [float(ridge) for ridge in ridges], "rank": rank, "columns": columns}
    done = _Parts(None if parts is None else Path(parts), _digest(plan, calibration, options))
    with calibration.ready():
        run = _Run(plan, calibration, ridges, rank, columns)
        for index in range(run.full.depth):
            if index in run.full.moe and progress is not None:
                number = run.full.moe.index(index)
                progress(number, len(plan.layers), f"refit: layer {number}")
            run.advance(index, done)
    if progress is not None:
        progress(len(plan.layers), len(plan.layers), "refit: done")
    calibrated = {
        "task": calibration.task.describe(),
        "split": calibration.split,
        "sequences": calibration.sequences,
        "tokens": calibration.tokens,
        **options,
    }
    cost = round(calibration.tokens * (2 * run.full.depth + run.runs))
    return Refit(run.plan, tuple(run.fits), cost, time.perf_counter() - started, calibrated)


def check_refit(calibration: Calibration, plan: Plan | None = None) -> None:
    """Raise what `refit` would for this model, these sequences, and a plan; to be asked before any long work."""
    if calibration.sequences < HELD_OUT:
        raise MethodError(
            f"a refit needs at least {HELD_OUT} sequences, to choose its ridge on one of {HELD_OUT}; there are "
            f"{calibration.sequences}"
        )
    with calibration.ready():
        check_makes(calibration.model)
        if plan is not None:
            with patched(calibration.model, plan):
                pass
        try:
            layerwise(calibration.model)
        except ModelError as error:
            raise MethodError(f"refit goes layer by layer, which this model does not allow: {error}") from error


def _above_0(ridge: Any) -> bool:
    return isinstance(ridge, Real) and not isinstance(ridge, bool) and 0 < float(ridge) < np.inf


class _Run:
    """The calibration on its way through the full model and the small one.

    Attributes:
        full, small: both.
        layers: of the plan, fitted so far.
        fits: what became of them.
        runs: layers that ran beyond the two passes.
    """

    def __init__(
        self, plan: Plan, calibration: Calibration, ridges: Sequence[float], rank: int | None, columns: int
    ) -> None:
        self.calibration, self.options = calibration, (ridges, rank, columns)
        self.full, self.small = Stream(calibration), Stream(calibration)
        self.layers, self.fits, self.runs = list(plan.layers), list[LayerFit](), 0.0
        # drawn, as rows of a mixture come by turns; the same ones for every layer
        self.held = torch.zeros(calibration.sequences, dtype=torch.bool)
        drawn = np.random.default_rng(0).permutation(calibration.sequences)
        self.held[torch.from_numpy(drawn[: calibration.sequences // HELD_OUT])] = True

    @property
    def plan(self) -> Plan:
        return Plan(tuple(self.layers))

    def advance(self, index: int, done: _Parts) -> None:
        """Both through decoder layer `index`, fitted if it has experts."""
        if index not in self.full.moe:
            self.full.advance(index, _nothing)
            self.small.advance(index, _nothing)
            return
        number = self.full.moe.index(index)
        stored = done.get(number)
        if stored is None:
            self.fits.append(self._fitted(index, number))
            done.put(number, self.layers[number], self.fits[-1])
            return
        self.layers[number], fit = stored
        self.fits.append(fit)
        self.full.advance(index, _nothing)
        self.small.advance(index, _nothing, self.plan)

    def _fitted(self, index: int, number: int) -> LayerFit:
        layer, original, batches = self.calibration.layers[number], list[Tensor](), list[LayerActivations]()
        with self.calibration.watching(lambda acts: original.append(acts.routed)) as watch:
            self.full.advance(index, watch)
        entering = list(self.small.states)
        with patched(self.calibration.model, self.plan):  # first, so that its routing is what is seen
            with self.calibration.watching(batches.append) as watch:
                self.small.advance(index, watch)
            factor = self._factor(index, layer, entering[0], batches[0])
        if factor is None:
            gaps = [there.float() - here.routed.float() for there, here in zip(original, batches)]
        else:
            gaps = [
                _real(there - here, batch).float() / factor
                for there, here, batch in zip(self.full.states, self.small.states, self.calibration.batches)
            ]
        with self.small.loaded(index):
            held = [self.held[acts.sequence].to(gap.device) for acts, gap in zip(batches, gaps)]
            given = sum(float(y[out].double().square().sum()) for y, out in zip(original, held))
            fitting = LayerFitting(layer, self.layers[number], batches, gaps, held, given)
            self.layers[number], fit = fitting.run(*self.options)
        self.runs += 1 + fitting.runs
        if fit.ridge is not None:
            self.small.states = entering
            self.small.advance(index, _nothing, self.plan)
        return replace(fit, factor=factor)

    def _factor(self, index: int, layer: MoELayer, entering: Tensor, acts: LayerActivations) -> float | None:
        """c, if a change y of what the experts give changes what leaves the decoder layer by c y; else None.

        It does not where a norm follows the experts. Told by making them `LOUDER` on the first batch.
        """

        def louder(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return LOUDER * output

        handle = layer.experts.register_forward_hook(louder)
        try:
            there = self.small.first(index, entering)
        finally:
            handle.remove()
        change = _real(there - self.small.states[0], self.calibration.batches[0]).double().flatten()
        added = (LOUDER - 1) * acts.routed.double().flatten()
        c = float(change @ added) / max(float(added @ added), torch.finfo(torch.float64).tiny)
        linear = float((change - c * added).norm()) <= NEARLY * float(change.norm())
        return c if linear and c > 0 else None


def _real(states: Tensor, batch: Batch) -> Tensor:
    """The hidden states of tokens that are not padding, (tokens, hidden)."""
    return states[batch.mask.bool().to(states.device)]


def _nothing(_batch: Any) -> None:
    pass


class _Parts:
    """Layers that are done, a plan file each, in a folder of `folder` that is named after what is refitted to what."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self.folder = None if folder is None else folder / digest
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MethodError(f"cannot keep layers in {str(folder)!r}: {error.strerror or error}") from None

    def get(self, number: int) -> tuple[LayerPlan, LayerFit] | None:
        """A layer that is done, and what became of it."""
        if self.folder is None or not self._file(number).is_file():
            return None
        file = self._file(number)
        return Plan.load(file).layers[0], LayerFit(**Plan.about(file)["fit"])

    def put(self, number: int, layer: LayerPlan, fit: LayerFit) -> None:
        if self.folder is not None:
            Plan((layer,)).save(self._file(number), about={"fit": asdict(fit)})

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer-{number}.safetensors"


def _digest(plan: Plan, calibration: Calibration, options: dict[str, Any]) -> str:
    """Names model, plan, sequences and options."""
    digest = hashlib.sha256(f"{fingerprint(calibration.model)},{plan.prefixes()[-1].hex()},{options}".encode())
    for batch in calibration.batches:
        digest.update(batch.ids.numpy().tobytes() + batch.mask.numpy().tobytes() + batch.numbers.numpy().tobytes())
    return digest.hexdigest()[:32]
