"""What the tests of the export room share: a full checkpoint, and one plan of every kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moeopt
from moeopt.plan import LayerPlan, Plan


def save(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return moeopt.load(folder)[0]


def exported(full: Any, plan: Plan, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model under a plan, and those of what it exports to a folder, loaded by the family's own class."""

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 43)[None] * 5 % 250).logits

    with moeopt.patched(full, plan):
        patched = logits(full)
    moeopt.export(plan, folder, model=full)
    return patched, logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


@pytest.fixture
def saved() -> Callable[..., Any]:
    """A function: the model as `moeopt.load` gives it back from a folder that it is saved to."""
    return save


@pytest.fixture
def full(make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """A Mixtral of 3 layers and 6 experts in bfloat16, loaded from tmp_path / "full"."""
    return save(make_mixtral(layers=3, experts=6, dtype=torch.bfloat16), tiny_tokenizer, tmp_path / "full")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies a checkpoint's code into its cache; tests have one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)  # before those of other modules' tests, for what files import of each other
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        yield


def build_plans(n: int = 6, layers: int = 3) -> dict[str, Plan]:
    """One plan of every kind that no stock checkpoint expresses."""
    rng = np.random.default_rng(0)

    def dense(r: int, k: int, **kind: Any) -> Plan:
        pairs = [np.eye(n)[rng.permutation(n)[:r]] + 0.1 * rng.standard_normal((2, r, n)) for _ in range(layers)]
        return Plan(tuple(LayerPlan(n, k, w_em=w_em, w_rm=w_rm, **kind) for w_em, w_rm in pairs))

    def novices(i: int, k: int = 2) -> LayerPlan:
        constants = rng.standard_normal((n - 2 - i, 32))  # as wide as the hidden states of these models
        return LayerPlan(n, k, kept=(4, 1, 3, 0)[: 2 + i], router="whole", novices=constants.astype(np.float32))

    alias = np.zeros((3, n))
    alias[np.arange(n) % 3, np.arange(n)] = 1
    pruned = Plan.one_hot([[0, 2, 5]] * layers, experts=n, k=2)
    return {
        "mixed-r": Plan(tuple(LayerPlan(n, 2, kept=tuple(range(1, 4 + i))) for i in range(layers))),
        "mixed-k": Plan(tuple(LayerPlan(n, 1 + i, kept=(0, 2, 4)) for i in range(layers))),
        "prob": dense(3, 2, router="prob"),
        "prob-eep": dense(3, 2, router="prob", negative="eep"),
        "alias": Plan((LayerPlan(n, 2, w_em=alias * 3 / n, w_rm=alias, router="alias"),) * layers),
        "alias-kept": Plan((LayerPlan(n, 2, kept=(0, 1, 2), w_rm=alias, router="alias"),) * layers),
        "novices": Plan(tuple(novices(i) for i in range(layers))),
        "novices-skip": Plan(tuple(novices(i, k=3) for i in range(layers))).with_skip(0.5),
        "skip": pruned.with_skip([0.9, 0.0, 0.8][:layers]),
        "prob-skip": dense(3, 3, router="prob").with_skip(0.5),
        "everything": Plan(
            (
                LayerPlan(n, 2, kept=(0, 1, 2), w_rm=alias, router="alias", skip=0.6),
                dense(4, 3, router="prob").layers[1],
                LayerPlan(n, 1, kept=(5,)),
            )[:layers]
        ),
    }  # fmt: skip


@pytest.fixture
def plans() -> dict[str, Plan]:
    """One plan of every kind that no stock checkpoint expresses, for 3 layers of 6 experts."""
    return build_plans()


@pytest.fixture
def make_plans() -> Callable[..., dict[str, Plan]]:
    return build_plans
