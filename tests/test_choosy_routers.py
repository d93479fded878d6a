"""Routers that correct their choice by a bias, or choose groups of experts first, from a search to its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import build, build_tokenizer
from torch import Tensor

import moeopt
from moeopt import methods
from moeopt.errors import MethodError, PlanError, SpaceError
from moeopt.exporting import project
from moeopt.methods import naee
from moeopt.methods.names import ROUTERS
from moeopt.models import moe_layers, routing_rules, shape_of
from moeopt.plan import AMONG_ALL, LayerPlan, Plan
from moeopt.tasks import TextTask

N, R = 16, 8
GROUPED = ("glm4_moe", "deepseek_v2", "deepseek_v3", "dots1")
MODELS = [("ernie4_5_moe", 1), *zip(GROUPED, (1, 2, 4, 2)), ("deepseek_v2", 1), ("deepseek_v3", 1)]
GREEDY = ("deepseek_v2", 1)
"""Neither bias nor groups."""
ROUTED = (None, "rows", "logit", "prob")
LINES = ["".join(chr(40 + i * j % 50) for i in range(60)) for j in (3, 7, 9, 11)]
TEXT = TextTask("t", search=LINES[:3], dev=LINES[3:], window=30)
IDS = torch.arange(3, 43).reshape(2, 20) * 7 % 250

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:task 't' has no test")]


class Checkpoint:
    """A family's model with so many groups, biases that are not zero, saved and loaded."""

    def __init__(self, family: str, groups: int, folder: Path) -> None:
        self.family, self.groups, self.folder = family, groups, folder
        self.tokenizer = build_tokenizer()
        build(family, N, corrected=True, vocabulary=300, groups=groups).save_pretrained(folder / "full")
        self.tokenizer.save_pretrained(folder / "full")
        self.model = moeopt.load(folder / "full")[0]
        self.layers = len(moe_layers(self.model))

    def plan(self, router: Any = None) -> Plan:
        """A pruning, or, with a router, a merging near one; as many experts of each group."""
        rng, size, share = np.random.default_rng(0), N // self.groups, R // self.groups
        layers = []
        for _ in range(self.layers):
            rows = [g * size + np.sort(rng.permutation(size)[:share]) for g in range(self.groups)]
            pruning = np.eye(N)[np.concatenate(rows)]
            noise = 0.1 * rng.standard_normal((2, R, N)) * (router is not None)
            w_rm = pruning if router in (None, "rows") else pruning + noise[1]
            layers.append(LayerPlan(N, 2, w_em=pruning + noise[0], w_rm=w_rm, router=router or "rows"))
        return Plan(tuple(layers))

    def objective(self, space: Any, **options: Any) -> moeopt.Objective:
        return moeopt.Objective(self.model, self.tokenizer, TEXT, space, limit=3, reference=False, **options)


@pytest.fixture(scope="module", params=MODELS, ids=lambda value: f"{value[0]}-{value[1]}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(*request.param, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, 4, tmp_path_factory.mktemp("full"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def balanced(plan: Plan, groups: int) -> bool:
    rows = [part.router_rows or tuple(part.expert_matrix.argmax(1)) for part in plan.layers]
    return all([row // (N // groups) for row in r] == [i // (len(r) // groups) for i in range(len(r))] for r in rows)


def test_every_plan_is_what_its_export_computes(checkpoint: Checkpoint) -> None:
    model, groups = checkpoint.model, checkpoint.groups
    assert {(rule.groups, rule.correction is None) for rule in routing_rules(model)} == {
        (groups, checkpoint.family == "deepseek_v2")
    }
    shape = shape_of(model)
    assert (shape.router_groups, shape.router) == (groups, "prob" if (checkpoint.family, groups) == GREEDY else "logit")
    stock = logits(model)
    with moeopt.patched(model, Plan.identity(checkpoint.layers, N, 2)):
        assert torch.equal(logits(model), stock)
    for router, form in ((None, "stock"), ("rows", "stock"), ("logit", "stock"), *((r, "custom") for r in ROUTED)):
        plan, folder = checkpoint.plan(router), checkpoint.folder / f"{router}-{form}"
        moeopt.export(plan, folder, model=model, form=form)
        small = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
        if groups > 1:
            assert (small.config.n_group, small.config.topk_group) == (groups, groups // 2)
        with moeopt.patched(model, plan):
            assert torch.equal(logits(model), logits(small)), (router, form)


@pytest.mark.parametrize("sampler", ["eep", "local", "guided"])
def test_the_default_search_runs_to_its_end_and_exports(checkpoint: Checkpoint, sampler: str, tmp_path: Path) -> None:
    space = moeopt.EEPSpace.of(checkpoint.model, keep=R)
    objective = checkpoint.objective(space, guide=0.3 if sampler == "guided" else 0.0)
    options: dict[str, Any] = {"initial": 2, "prune_until": 4} if sampler == "eep" else {}
    starts = ["naee"] if sampler == "eep" else []
    study = moeopt.create_study(objective=objective, storage=None, sampler=sampler, warm_starts=starts, **options)
    moeopt.optimize(study, objective, n_trials=8)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
    plans = [space.plan(trial) for trial in study.trials]
    assert len({plan.fingerprint for plan in plans}) == 8
    assert all(balanced(plan, checkpoint.groups) for plan in plans if plan.is_one_hot)
    assert sampler != "eep" or any(part.makes_experts for part in plans[-1].layers)
    last = study.trials[-1]
    moeopt.export(last, tmp_path / "small", study=study, model=checkpoint.model)
    small = moeopt.load(tmp_path / "small")[0]
    with moeopt.patched(checkpoint.model, space.plan(last)):
        assert torch.equal(logits(checkpoint.model), logits(small))


@pytest.mark.parametrize("name", ROUTERS)
def test_methods_keep_as_many_experts_of_each_group(limited: Checkpoint, name: str) -> None:
    calibration = methods.Calibration(limited.model, limited.tokenizer, TEXT)
    plan = methods.plan(name, calibration, keep=R)
    assert balanced(plan, 4)
    assert sum(part.kept_experts for part in plan.layers) == 2 * R
    assert np.isfinite(moeopt.Evaluator(limited.model, limited.tokenizer, TEXT).evaluate(plan).loss)
    if ROUTERS[name] not in AMONG_ALL:
        with pytest.raises(MethodError, match=r"keep=6 experts .* keep 4 or 8"):
            methods.plan(name, calibration, keep=6)


def test_naee_errors_are_those_of_the_layer_as_it_is_pruned(limited: Checkpoint) -> None:
    """Of some of the sets that may be kept, against the block itself under the plan."""
    model, errors = limited.model, naee.SetErrors(N, r=R, active=2, groups=4)
    calibration = methods.Calibration(model, limited.tokenizer, TEXT, limit=1)
    seen: list[Tensor] = []

    def look(acts: Any) -> None:
        if acts.layer.index == 0:
            errors.add(acts)
            seen.append(acts.hidden)

    calibration.run(look, all_outputs=True)
    assert len(errors.sets) == 6**4
    block, (hidden,) = moe_layers(model)[0].block, seen
    for kept in errors.sets[::97]:
        with torch.inference_mode():
            full = block(hidden[None])
            with moeopt.patched(model, Plan.one_hot([kept] * 2, experts=N, k=2)):
                error = float((block(hidden[None]) - full).norm())
        assert errors.errors[errors.sets.index(kept)] == pytest.approx(error, rel=1e-3, abs=1e-4)


def test_what_a_model_does_not_take_is_refused_before_a_study(limited: Checkpoint) -> None:
    with pytest.raises(SpaceError, match=r"as many of each of the 4 groups .*: keep 4 or 8"):
        moeopt.PruneSpace.of(limited.model, keep=6)
    space = moeopt.PruneSpace.of(limited.model, keep=4)
    if limited.family == "deepseek_v3":  # which ranks a group by its best two
        with pytest.raises(
            SpaceError, match="2 at least to be ranked: r must be a multiple of 4, such as 8, the plan has r=4"
        ):
            limited.objective(space)
    else:
        limited.objective(space)
    with pytest.raises(PlanError, match="must keep 2 of each"):
        moeopt.export(Plan.one_hot([range(R)] * 2, experts=N, k=2), limited.folder / "no", model=limited.model)


@pytest.mark.parametrize("kind", ["two sizes", "probabilities", "hc_smoe", "mone"])
def test_a_projected_plan_has_as_many_experts_of_each_group(limited: Checkpoint, kind: str, tmp_path: Path) -> None:
    sizes = Plan.one_hot([[g * 4 + i for g in range(4) for i in range(n)] for n in (2, 3)], experts=N, k=2)
    calibration = methods.Calibration(limited.model, limited.tokenizer, TEXT)
    made = {"two sizes": lambda: sizes, "probabilities": lambda: limited.plan("prob")}
    plan = made[kind]() if kind in made else methods.plan(kind, calibration, keep=R)
    projected, projection = project(plan, limited.model, limited.tokenizer, TEXT)
    assert balanced(projected, 4)
    assert (projection.r, projection.k) == (12 if kind == "two sizes" else R, 2)
    if kind == "two sizes":
        assert projected.layers[1] == sizes.layers[1]
        assert set(sizes.layers[0].kept or ()) < set(projected.layers[0].expert_matrix.argmax(1).tolist())
    moeopt.export(projected, tmp_path / "small", model=limited.model, form="stock")
    with moeopt.patched(limited.model, projected):
        assert torch.equal(logits(limited.model), logits(moeopt.load(tmp_path / "small")[0]))


def test_a_worker_goes_on_with_a_search_of_grouped_experts(limited: Checkpoint, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    space = moeopt.ActiveSpace(moeopt.EEPSpace.of(limited.model, keep=R, router="rows"), k=(1, 2), skip=True)
    objective = limited.objective(space)
    study = moeopt.create_study("grouped", objective=objective, storage=url, sampler="local")
    moeopt.optimize(study, objective, n_trials=3)
    moeopt.run_worker(url, "grouped", model=limited.folder / "full", n_trials=6)
    trials = moeopt.load_study("grouped", url).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    assert moeopt.study.space_of(study).describe() == space.describe()
    assert all(balanced(space.plan(trial), 4) for trial in trials)
    with pytest.raises(SpaceError, match="3 at least to run k=6"):
        limited.objective(moeopt.PruneSpace.of(limited.model, keep=R, k=6))
