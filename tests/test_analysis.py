"""The numbers behind the figures, on the demo model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moeopt
from moeopt import methods
from moeopt.errors import MethodError
from moeopt.models import moe_layers, patched
from moeopt.plan import LayerPlan, Plan
from moeopt.results import analysis


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = moeopt.load(str(moeopt.demo.MODEL))
    task = moeopt.demo.skill_task("caesar")
    return model, tokenizer, task, methods.Calibration(model, tokenizer, task, limit=12)


def counted(model, calibration, plan):
    """Picks of every expert number, (layers, n), by hooks on the routers, sequence by sequence."""
    counts = np.zeros((calibration.shape.layers, 8))

    def note(layer, output):
        _, weights, index = output
        np.add.at(counts[layer], index[weights != 0].numpy(), 1)

    with patched(model, plan), torch.no_grad():
        handles = [
            x.router.register_forward_hook(lambda _m, _i, output, i=x.index: note(i, output)) for x in moe_layers(model)
        ]
        for batch in calibration.batches:
            for ids, mask in zip(batch.ids, batch.mask):
                model(ids[mask.bool()][None])
        for handle in handles:
            handle.remove()
    return counts / calibration.tokens


def test_activation_shares(demo):
    model, _, _, calibration = demo
    full = analysis.activation_shares(calibration)
    np.testing.assert_allclose(full, counted(model, calibration, Plan.identity(6, 8, 2)))
    np.testing.assert_allclose(full.sum(axis=1), 2)
    pruned = methods.plan("naee", calibration, keep=4)
    for plan in (pruned, methods.skipping(pruned, calibration)):
        shares = analysis.activation_shares(calibration, plan)
        expected = counted(model, calibration, plan)
        for row, wanted, part in zip(shares, expected, plan.layers):
            assert set(np.flatnonzero(~np.isnan(row))) == set(part.kept)
            np.testing.assert_allclose(row[list(part.kept)], wanted[list(part.kept)])
    merged = methods.plan("m_smoe_summed", calibration, keep=4)
    shares = analysis.activation_shares(calibration, merged)
    expected = counted(model, calibration, merged)
    for row, wanted, part in zip(shares, expected, merged.layers):
        leads = np.abs(part.expert_matrix).argmax(axis=1)
        np.testing.assert_allclose(row[leads], wanted[:4])
        assert np.isnan(np.delete(row, leads)).all()


def test_ensemble_losses(demo):
    model, tokenizer, task, calibration = demo
    evaluator = moeopt.Evaluator(model, tokenizer, task, limit=12)
    curves = analysis.ensemble_losses(evaluator, calibration, layers=[2])
    assert list(curves) == ["all layers", "layer 2"]
    for evaluations in curves.values():
        assert len(evaluations) == 8
        assert evaluations[-1].loss == evaluator.evaluate().loss
    single = methods.plan("soft_activation", calibration, keep=1, k=1)
    assert curves["all layers"][0].loss == evaluator.evaluate(single).loss
    everything = LayerPlan(8, 2, kept=tuple(range(8)))
    alone = Plan(tuple(single.layers[i] if i == 2 else everything for i in range(6)))
    assert curves["layer 2"][0].loss == evaluator.evaluate(alone).loss
    assert curves["all layers"][0].loss > curves["all layers"][3].loss


def test_kept_set_errors(demo):
    calibration = demo[3]
    layers = analysis.kept_set_errors(calibration, keep=4)
    plan = methods.plan("naee", calibration, keep=4)
    assert [len(errors) for errors in layers] == [70] * 6
    assert [min(errors, key=errors.get) for errors in layers] == [part.kept for part in plan.layers]
    (nothing_lost,) = analysis.kept_set_errors(calibration, keep=8)[0].values()
    assert nothing_lost < 1e-5 * min(layers[0].values())


def test_bad_input(demo):
    model, tokenizer, task, calibration = demo
    evaluator = moeopt.Evaluator(model, tokenizer, task, limit=2)
    with pytest.raises(MethodError, match="layers must be between 0 and 5, got 6"):
        analysis.ensemble_losses(evaluator, calibration, layers=[6])
    with pytest.raises(MethodError, match="m_smoe does more than prune"):
        analysis.ensemble_losses(evaluator, calibration, method="m_smoe")
    with pytest.raises(MethodError, match="keep must be an integer between 1 and the 8 experts"):
        analysis.kept_set_errors(calibration, keep=9)
