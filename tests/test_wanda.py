"""studies/wanda.py against Wanda's formula, number by number (arXiv 2306.11695)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeopt import methods
from moeopt.tasks import TextTask

TEXT = TextTask("text", search=["".join(chr(40 + i * j % 83) for i in range(59 - j)) for j in range(1, 13)], window=60)


@pytest.fixture
def wanda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "studies"))
    import wanda

    return wanda


def by_the_formula(weight: np.ndarray, norms: np.ndarray, left: int | None) -> np.ndarray:
    """|W_ij| ||X_j||, compared within each output row: the least go; or of every four the least two."""
    zeroed = np.zeros(weight.shape, bool)
    for i, row in enumerate(weight):
        scores = [(abs(w) * x, j) for j, (w, x) in enumerate(zip(row, norms))]
        parts = [scores] if left is not None else [scores[c : c + 4] for c in range(0, len(scores) // 4 * 4, 4)]
        for part in parts:
            for _, j in sorted(part)[: len(part) - (2 if left is None else left)]:
                zeroed[i, j] = True
    return zeroed


@pytest.mark.parametrize("left", [None, 0, 3, 10])
def test_zeroes_are_those_of_least_weight_times_norm(wanda: Any, left: int | None) -> None:
    rng = np.random.default_rng(0)
    weight, squares = rng.standard_normal((6, 10)).astype(np.float32), rng.random(10) * 9
    mask = wanda.pruned(torch.from_numpy(weight), torch.from_numpy(squares), left)
    assert (mask.numpy() == by_the_formula(weight, np.sqrt(squares), left)).all()


@pytest.mark.parametrize("storage", ["bitmask", "csr", "2:4"])
@pytest.mark.parametrize("weights", ["experts", "all"])
def test_a_model_is_pruned_by_what_enters_its_experts(
    wanda: Any, make_mixtral: Any, tiny_tokenizer: Any, storage: str, weights: str
) -> None:
    """Of the first layer, which sees the same in both; an expert sees the tokens that are routed to it."""
    model, before = make_mixtral(layers=2, experts=4), make_mixtral(layers=2, experts=4)
    calibration = methods.Calibration(before, tiny_tokenizer, TEXT)
    block, attention, entered, queried = before.model.layers[0].mlp, before.model.layers[0].self_attn, [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0])),
        attention.q_proj.register_forward_pre_hook(lambda _, args: queried.append(args[0])),
    ]
    with torch.no_grad():
        for batch in calibration.batches:
            before(**batch.inputs(torch.device("cpu")))
    for handle in handles:
        handle.remove()
    masks = [batch.mask.bool() for batch in calibration.batches]
    tokens = torch.cat([hidden[mask] for hidden, mask in zip(entered, masks)])
    with torch.no_grad():
        index = block.gate(tokens)[2]

    facts = wanda.wanda(methods.Calibration(model, tiny_tokenizer, TEXT), storage, 0.5, weights)
    of = {"bitmask": lambda c: int((0.5 * 32 * c - c) / 32), "csr": lambda c: int((0.5 * 32 * c - 32) / 48)}
    for j in range(4):
        x = tokens[(index == j).any(1)]
        gate, up = (block.experts.gate_up_proj[j].detach() @ x.T).chunk(2)
        inner = torch.nn.functional.silu(gate) * up
        for name, norms in (("gate_up_proj", x.norm(dim=0)), ("down_proj", inner.norm(dim=1))):
            weight = getattr(block.experts, name)[j].detach().numpy()
            left = of[storage](weight.shape[1]) if storage in of else None
            zeroed = by_the_formula(weight, norms.numpy(), left)
            after = getattr(model.model.layers[0].mlp.experts, name)[j].detach().numpy()
            assert ((after == 0) == zeroed).mean() > 0.999  # ties of rounded norms
            assert (after[~zeroed & (after != 0)] == weight[~zeroed & (after != 0)]).all()
    q_proj, whole = model.model.layers[0].self_attn.q_proj.weight.detach(), attention.q_proj.weight.detach()
    if weights == "all":
        norms = torch.cat([states[mask] for states, mask in zip(queried, masks)]).norm(dim=0)
        left = of[storage](32) if storage in of else None
        assert ((q_proj == 0).numpy() == by_the_formula(whole.numpy(), norms.numpy(), left)).mean() > 0.999
    else:
        assert torch.equal(q_proj, whole)
    assert facts["bytes"] <= 0.5 if storage in of else facts["bytes"] == 0.5 + 1 / 32
    assert facts["few tokens"] >= facts["without tokens"]


def test_stored_bits_are_counted_entry_by_entry(wanda: Any) -> None:
    matrix = np.array([[1.5, 0, 0, -2, 3, 0, 1, 0], [0, 1, 4, 0, 0, 0, 2, 5]], np.float16)
    left = int((matrix != 0).sum())
    csr = sum(16 + 16 for value in matrix.flat if value) + 32 * 3  # with columns; where rows start and end
    assert wanda.stored_bits(2, 8, left, 16, "csr") == csr
    assert wanda.stored_bits(2, 8, left, 16, "bitmask") == sum(1 + 16 * bool(value) for value in matrix.flat)
    assert wanda.stored_bits(2, 8, left, 16, "2:4") == 8 * (16 + 2)
    for storage in ("bitmask", "csr"):
        for columns in (64, 576, 1536):
            most = wanda.left_of(columns, 0.5, 16, storage)
            bits = [wanda.stored_bits(100, columns, 100 * count, 16, storage) for count in (most, most + 1)]
            assert bits[0] - 32 <= 0.5 * 100 * columns * 16 < bits[1]
