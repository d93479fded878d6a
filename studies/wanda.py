"""Wanda beside expert pruning at equal bytes: single weights of experts zeroed, or whole experts left out.

    python studies/wanda.py [--small] [--keep 4] [--methods reap,loss_aware,naee] [--out wanda]
    python studies/wanda.py --model MODEL --task arc_easy --data FOLDER

The form of NAEE's table (arXiv 2402.14800). Wanda (Sun et al., arXiv 2306.11695) zeroes in every output row of a weight
W those of least |W_ij| ||X_j||_2, X_j being what enters column j on the calibration set, layer after layer, each seeing
what the pruned ones before it give; nothing is fitted afterwards. Here the weights are those of experts, and ||X_j|| of
an expert is over the tokens routed to it, as NAEE took it; with `--weights all` every linear layer of the decoder's as
well (attention). An expert that no token was routed to is pruned by |W| alone; how many had fewer tokens than columns
is said.

What zeroes save depends on how they are stored, so a sparsity has several sizes. With b bits a number:

* bitmask: b bits for each that is left, 1 for every place. Share of bytes: (1 - s) + 1 / b.
* CSR: b bits and 16 of column for each that is left, 32 a row. Share: (1 - s) (1 + 16 / b) + 32 / (b columns).
* 2:4 (two of every four in a row are left, what GPUs compute with): b bits and 2 of place for each of them. Share:
  1 / 2 + 1 / b: 56.25 % in bfloat16.

Unstructured sparsities are chosen so that bitmask, or CSR, takes the bytes of `--keep` of the n experts; 2:4 has no
choice, and is held against a number of experts on either side. Plain transformers runs zeroes as any number: only sizes
are compared, not speed. Run it again to go on: finished legs are kept in the folder `--out`.

The shipped model, float32, ``caesar``, `--limit 64 --test-limit 100`; loss on test, 95 % intervals of paired examples:

| | experts' bytes | loss | right | - full |
|---|---|---|---|---|
| full | 100 % | .0203 | 1.000 | |
| reap, 4 of 8 | 50.0 % | 1.0583 | .760 | +1.0380 [.7384, 1.3603] |
| loss_aware, 4 of 8 | 50.0 % | .0203 | 1.000 | -.0000 [-.0005, +.0004] |
| naee, 4 of 8 | 50.0 % | .0204 | 1.000 | +.0001 [-.0002, +.0003] |
| reap, 5 of 8 | 62.5 % | .0210 | 1.000 | +.0007 [.0001, .0014] |
| loss_aware, 5 of 8 | 62.5 % | .0203 | 1.000 | +.0000 [-.0003, +.0003] |
| naee, 5 of 8 | 62.5 % | .0205 | 1.000 | +.0002 [-.0000, +.0004] |
| Wanda, bitmask | 49.9 % | .1514 | .990 | +.1311 [.0889, .1795] |
| Wanda, CSR | 49.6 % | .6052 | .800 | +.5849 [.4754, .7013] |
| Wanda, 2:4 | 53.1 % | .3260 | .930 | +.3057 [.2423, .3758] |

Its experts have one skill each, so leaving out whole ones costs nothing where the right ones stay; Wanda cannot do
that, but beats reap, which picks wrong ones at 4 of 8. FineMoE (12 M parameters, 32 experts, top-4, bfloat16), text of
three kinds, `--keep 16,18 --limit 64 --test-limit 96`:

| | experts' bytes | loss | - full | - reap, 16 of 32 |
|---|---|---|---|---|
| full | 100 % | 3.5237 | | |
| reap, 16 of 32 | 50.0 % | 3.7640 | +.2402 [.2159, .2660] | |
| reap, 18 of 32 | 56.2 % | 3.6621 | +.1384 [.1245, .1532] | -.1018 [-.1163, -.0880] |
| Wanda, bitmask | 50.0 % | 3.6570 | +.1332 [.1174, .1489] | -.1070 [-.1300, -.0856] |

where Wanda stored as a bitmask is better than leaving out whole experts by reap at the same bytes, though 10 experts
had no tokens. CSR and 2:4, other methods there, and SmolMoE are not yet run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import _subject
import numpy as np
import torch
from _legs import Leg, Legs, compare, judge
from torch import Tensor, nn

from moeopt import methods
from moeopt.evaluation import Evaluation
from moeopt.methods.calibration import Stream
from moeopt.methods.layer_activations import LayerActivations
from moeopt.methods.neuron_activations import NeuronActivations
from moeopt.methods.sequences import Batch
from moeopt.methods.statistics import routed
from moeopt.models import describe, fingerprint, layerwise
from moeopt.models.layers import MoELayer, is_transposed, stacked
from moeopt.models.merging import DOWN
from moeopt.models.sizes import Sizes
from moeopt.plan import Plan

Storage = Literal["bitmask", "csr", "2:4"]
COLUMN, ROW, PLACE = 16, 32, 2
"""Bits of a column's number and of a row's start in CSR, and of the place of a number among four."""


def stored_bits(rows: int, columns: int, left: int, bits: int, storage: Storage) -> int:
    """Bits that a sparse matrix takes.

    Args:
        rows, columns: of the matrix.
        left: numbers that are not pruned.
        bits: of a number.
        storage: as this file's head has them.
    """
    if storage == "bitmask":
        return left * bits + rows * columns
    if storage == "csr":
        return left * (bits + COLUMN) + (rows + 1) * ROW
    return left * (bits + PLACE)


def left_of(columns: int, share: float, bits: int, storage: Storage) -> int:
    """How many numbers of a row may be left for the matrix to take at most a share of its dense bytes."""
    room = share * columns * bits
    if storage == "bitmask":
        return max(0, int((room - columns) / bits))
    if storage == "csr":
        return max(0, int((room - ROW) / (bits + COLUMN)))
    return columns // 2


def pruned(weight: Tensor, squares: Tensor, left: int | None) -> Tensor:
    """Which numbers Wanda zeroes, bool (out, in).

    Args:
        weight: W, (out, in).
        squares: ||X_j||^2 of its inputs, (in,).
        left: how many of each row stay; None: two of every four, what the last columns lack of four staying.
    """
    scores = weight.abs().float() * squares.sqrt().float()
    zeroed = torch.zeros_like(scores, dtype=torch.bool)
    if left is not None:
        order = scores.sort(dim=-1, stable=True).indices
        return zeroed.scatter(-1, order[:, : scores.shape[1] - left], True)
    whole = scores.shape[1] // 4 * 4
    fours = scores[:, :whole].unflatten(-1, (-1, 4))
    least = fours.topk(2, dim=-1, largest=False).indices
    zeroed[:, :whole] = zeroed[:, :whole].unflatten(-1, (-1, 4)).scatter(-1, least, True).flatten(-2)
    return zeroed


@dataclass(eq=False)
class Norms:
    """Sums of squares, float64, of what enters the weights of a layer's experts.

    Attributes:
        hidden: what enters W1 and W3, (n, hidden).
        neurons: what enters W2, (n, inner).
        tokens: routed to each expert, int64 (n,).
    """

    layer: MoELayer
    hidden: Tensor = field(init=False)
    neurons: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.experts = NeuronActivations(self.layer, stacked(self.layer.experts, self.layer.n))
        form, n = self.experts.form, self.layer.n
        self.hidden = torch.zeros(n, form.hidden, dtype=torch.float64)
        self.neurons = torch.zeros(n, form.inner, dtype=torch.float64)
        self.tokens = np.zeros(n, np.int64)

    def add(self, acts: LayerActivations) -> None:
        """Add a batch."""
        for j, tokens, gates in routed(acts):
            entering = acts.hidden[tokens]
            inner = self.experts.weighted(j, entering, torch.ones_like(gates))
            self.hidden[j] += entering.double().square().sum(0).cpu()
            self.neurons[j] += inner.double().square().sum(0).cpu()
            self.tokens[j] += len(tokens)

    def weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every expert's weights, (out, in), views, and the sums of squares of their inputs, (in,)."""
        for name, tensor in stacked(self.layer.experts, self.layer.n).items():
            if tensor.ndim < 3:
                continue
            squares = self.neurons if name == DOWN else self.hidden
            for j, weight in enumerate(tensor):
                seen = squares[j] if self.tokens[j] else torch.ones_like(squares[j])
                yield (weight.T if is_transposed(self.layer.experts) else weight), seen.to(weight.device)


def wanda(
    calibration: methods.Calibration, storage: Storage, share: float, weights: Literal["experts", "all"] = "experts"
) -> dict[str, Any]:
    """Prune a model in place.

    Args:
        calibration: of the model, and what its inputs are of.
        storage: that the bytes are of.
        share: of their dense bytes, that weights may take at most; 2:4 takes what it takes.
        weights: those of experts, or every linear layer of the decoder's too.

    Returns:
        The share of the experts' bytes and of the whole model's that are left, the share of numbers that were zeroed,
        and how many experts had no tokens, and fewer than columns; JSON.
    """
    model, decoder = calibration.model, layerwise(calibration.model).layers
    dense = sparse = whole = zeroed = starved = few = 0
    with calibration.ready():
        stream = Stream(calibration)
        for index, layer in enumerate(decoder):
            norms, squares = entering(calibration, stream, index, layer if weights == "all" else None)
            for each in norms:
                starved += int((each.tokens == 0).sum())
                few += int((each.tokens < each.experts.form.hidden).sum())
            for weight, inputs in [*(pair for each in norms for pair in each.weights()), *squares.items()]:
                bits, (rows, columns) = weight.element_size() * 8, weight.shape
                mask = pruned(weight, inputs, None if storage == "2:4" else left_of(columns, share, bits, storage))
                weight.masked_fill_(mask, 0)
                count = int(mask.sum())
                whole, zeroed, dense = whole + mask.numel(), zeroed + count, dense + mask.numel() * bits
                sparse += stored_bits(rows, columns, mask.numel() - count, bits, storage)
            stream.advance(index, lambda batch: None)
    total = sum(p.numel() * p.element_size() * 8 for p in model.parameters())
    return {
        "bytes": sparse / dense,
        "model": (total - dense + sparse) / total,
        "zeroed": zeroed / whole,
        "without tokens": starved,
        "few tokens": few,
    }


def entering(
    calibration: methods.Calibration, stream: Stream, index: int, linears: nn.Module | None
) -> tuple[list[Norms], dict[Tensor, Tensor]]:
    """What enters the weights of a decoder layer: of its experts, if it has any, and of the linear modules in a module.

    Of the latter the weights, and sums of squares of their inputs, float64 (in,).
    """
    norms = [Norms(calibration.layers[i]) for i, place in enumerate(stream.moe) if place == index]
    squares: dict[Tensor, Tensor] = {}
    current: list[Batch] = []

    def add(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        inputs = args[0][current[0].mask.bool().to(args[0].device)]
        squares[module.weight] = squares.get(module.weight, 0) + inputs.double().square().sum(0)

    with calibration.watching(lambda acts: norms[0].add(acts)) as watch, ExitStack() as stack:

        def seen(batch: Batch) -> None:
            current[:] = [batch]
            watch(batch)

        for module in linears.modules() if linears is not None else ():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(add).remove)
        stream.look(index, seen)
    return norms, squares


def main() -> None:
    args = arguments()
    if args.small:
        args.limit, args.test_limit, args.methods = 6, 8, "reap"
    model, tokenizer, task = _subject.load(args)
    calibration = methods.Calibration(model, tokenizer, task, limit=args.limit)
    sizes, n, keeps = Sizes(model), calibration.shape.experts, [int(keep) for keep in args.keep.split(",")]
    settings = {
        "model": describe(model),
        "weights": fingerprint(model),
        "task": task.describe(),
        "limits": [args.limit, args.test_limit],
    }
    legs = Legs(args.out, settings)
    results: list[Leg] = []

    def add(name: str, about: dict[str, Any], make: Callable[[], tuple[Evaluation, Any]]) -> None:
        results.append(legs.get(name, about, make))
        print(f"{name}: {results[-1].evaluation.loss:.4f}", flush=True)

    def under(plan: Plan | None) -> tuple[Evaluation, Any]:
        share = 1.0 if plan is None else plan.layers[0].kept_experts / n
        facts = {"bytes": share, "model": sizes.under(plan).bytes / sizes.under().bytes}
        return judge(model, tokenizer, task, args.test_limit, plan), facts

    def zeroed(storage: Storage) -> tuple[Evaluation, Any]:
        model, _, _ = _subject.load(args)
        seen = methods.Calibration(model, tokenizer, task, limit=args.limit)
        facts = wanda(seen, storage, keeps[0] / n, args.weights)
        return judge(model, tokenizer, task, args.test_limit), facts

    add("full", {}, lambda: under(None))
    for keep in keeps:
        for name in args.methods.split(","):
            add(f"{name} {keep} of {n}", {}, lambda: under(methods.plan(name, calibration, keep=keep)))  # noqa: B023
    for storage in get_args(Storage):
        share = {} if storage == "2:4" else {"share": keeps[0] / n}
        name = f"wanda {args.weights} {storage.replace(':', '-')}"
        add(name, share, lambda: zeroed(storage))  # noqa: B023
    compare(
        f"{task.name}: test losses, and minus those of others, 95% intervals",
        results,
        [("- full", lambda leg: results[0]), (f"- {results[1].name}", lambda leg: results[1])],
        [
            ("experts' bytes", lambda leg: f"{leg.facts['bytes']:.1%}"),
            ("model's", lambda leg: f"{leg.facts['model']:.1%}"),
            ("zeroed", lambda leg: f"{leg.facts['zeroed']:.1%}" if "zeroed" in leg.facts else ""),
            ("few tokens", lambda leg: str(leg.facts.get("few tokens", ""))),
        ],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _subject.add_arguments(parser, device_map=None)
    parser.add_argument("--methods", default="reap,loss_aware,naee", help="of expert pruning")
    parser.add_argument("--keep", default="4,5", help="experts; the first also says what unstructured zeroes may take")
    parser.add_argument("--weights", choices=("experts", "all"), default="experts", help="that Wanda prunes")
    parser.add_argument("--limit", type=int, default=128, help="search examples, to calibrate on")
    parser.add_argument("--test-limit", type=int, default=300, help="test examples")
    parser.add_argument("--out", type=Path, default=Path("wanda"))
    parser.add_argument("--small", action="store_true", help="a quick run of everything")
    return parser.parse_args()


if __name__ == "__main__":
    main()
