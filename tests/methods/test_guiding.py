"""Guides: every expert of every layer taken out of a pruning, or back in, one patched layer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from methods.test_loss_aware import changes_by_patching, gradients_of

from moeopt.evaluation import Evaluator
from moeopt.methods.guiding import Guiding
from moeopt.models import moe_layers
from moeopt.plan import Plan
from moeopt.tasks import TextTask


@pytest.fixture(scope="module")
def text():
    return TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7, 11)], window=30)


@pytest.mark.parametrize("keep", [4, 2])
def test_a_guide_is_what_patched_layers_change(family, build_family, tiny_tokenizer, text, keep):
    model = build_family(family, vocabulary=300, corrected=True)
    layers = moe_layers(model)
    n, k = layers[0].n, layers[0].k
    keep = max(keep, k)
    plan = Plan.one_hot([[(i + j) % n for j in range(keep)] for i in range(len(layers))], experts=n, k=k)
    evaluator = Evaluator(model, tiny_tokenizer, text, limit=3)
    guiding = Guiding(evaluator, "these")
    guide = guiding.guide(plan)
    assert (guide.plan, guide.of) == (plan.fingerprint, "these")
    weights = float(evaluator.evaluate().weights.sum())
    by_layer, _ = gradients_of(evaluator, plan)
    for layer, acts in zip(layers, by_layer):
        kept = plan.layers[layer.index].kept
        for expert in range(n):
            toggled = tuple(sorted({*kept} ^ {expert}))
            active = min(k, len(toggled)) if expert not in kept else min(k, keep - 1)
            if not toggled:
                continue
            d = torch.cat([changes_by_patching(model, layer, s, g.double(), [toggled], active, kept) for s, g in acts])
            got = float(guide.signed[layer.index, expert]), float(guide.squared[layer.index, expert])
            assert got[0] == pytest.approx(
                float(d.sum()) / weights, rel=1e-3, abs=1e-4 * float(d.abs().sum()) / weights
            )
            assert got[1] == pytest.approx(float((d**2).sum()) / weights, rel=1e-3, abs=1e-9)


def test_what_it_costs_is_said_before(make_mixtral, tiny_tokenizer, text):
    guiding = Guiding(Evaluator(make_mixtral(), tiny_tokenizer, text, limit=3), "these")
    # Forth, forth again, back, and all n experts in place of k.
    assert guiding.layer_tokens == guiding._gradients.tokens * (3 * 3 + 3 * 8 // 2)


def test_of_distances_only_the_curvature_is_told(make_mixtral, tiny_tokenizer, text):
    guide = Guiding(Evaluator(make_mixtral(), tiny_tokenizer, text, limit=3, score="kl"), "these").guide(
        Plan.one_hot([[0, 2, 3, 5]] * 3, experts=8, k=2)
    )
    assert not guide.signed.any()
    assert (guide.squared > 0).mean() > 0.9
    assert np.isfinite(guide.squared).all()
