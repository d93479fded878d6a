"""Exports can be trained further: gradients, load balancing, transformers' Trainer, peft's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting.conftest import build_plans
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moeopt
from moeopt.models import load_model
from moeopt.plan import LayerPlan, Plan
from moeopt.plan.down import DownProjections

IDS = torch.arange(3, 43).reshape(2, 20) * 5 % 250
MASK = torch.ones_like(IDS)
MASK[1, -6:] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
NOT_TRAINED = ("w_rm", "aliases", "places", "novices")


def plans_of_both_forms() -> dict[str, Plan]:
    """Those of `build_plans`, and of stock form one that prunes, one that merges, and one of refitted experts."""
    rng = np.random.default_rng(1)
    w_em, w_rm = (0.3 * rng.standard_normal((3, 6)).astype(np.float32) for _ in range(2))
    down = DownProjections(whole=rng.standard_normal((3, 32, 48)).astype(np.float32) * 0.1)
    stock = {
        "pruned": LayerPlan(6, 2, kept=(0, 2, 5)),
        "merged": LayerPlan(6, 2, w_em=w_em, w_rm=w_rm, router="logit"),
        "refitted": LayerPlan(6, 2, kept=(0, 2, 5), down=down),
    }
    return {kind: Plan((layer,) * 3) for kind, layer in stock.items()} | build_plans()


PLANS = plans_of_both_forms()


@pytest.fixture(scope="module")
def folders(make_mixtral: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Mixtral of 3 layers and 6 experts, ``full``, and what it exports under every plan, by kind."""
    folder = tmp_path_factory.mktemp("trained")
    make_mixtral(layers=3, experts=6, router_aux_loss_coef=0.5).save_pretrained(folder / "full")
    tiny_tokenizer.save_pretrained(folder / "full")
    for kind, plan in PLANS.items():
        moeopt.export(plan, folder / kind, model=folder / "full")
    return folder


def loaded(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)


def expected_balance(logits: list[np.ndarray], plan: Plan, mask: np.ndarray) -> float:
    """The load balancing loss of Switch Transformers over top-k, token by token; of layers that differ, their mean."""

    def shares(layer_logits: np.ndarray, layer: LayerPlan) -> np.ndarray:
        p = np.exp(layer_logits - layer_logits.max())
        p /= p.sum()
        if layer.router == "prob":
            p = np.maximum(layer.router_matrix @ p, 0)
        if layer.router == "logit":  # the checkpoint has r rows already
            assert len(p) == layer.kept_experts
        return p / p.sum()

    sums: list[tuple[np.ndarray, np.ndarray, float]] = []
    for layer_logits, layer in zip(logits, plan.layers):
        tokens = [shares(row, layer) for row, there in zip(layer_logits, mask) if there]
        picks = np.zeros(len(tokens[0]))
        for p in tokens:
            picks[np.argsort(-p, kind="stable")[: layer.k]] += 1
        sums.append((picks, np.sum(tokens, axis=0), float(len(tokens))))
    if len({(len(picks), layer.k) for (picks, _, _), layer in zip(sums, plan.layers)}) == 1:
        sums = [tuple(sum(parts) for parts in zip(*sums))]  # type: ignore[list-item]
    return float(np.mean([len(f) * (f / count) @ (p / count) for f, p, count in sums]))


@pytest.mark.parametrize("kind", PLANS)
def test_the_load_balancing_loss_is_that_of_the_experts_there_are(folders: Path, kind: str) -> None:
    small, full = loaded(folders / kind), load_model(folders / "full")
    with torch.no_grad():
        output = small(**INPUTS, output_router_logits=True)
        plain = small(**INPUTS)
        with moeopt.patched(full, PLANS[kind]):
            patched = full(**INPUTS, output_router_logits=True)
    logits = [layer.double().numpy() for layer in output.router_logits]
    expected = expected_balance(logits, PLANS[kind], MASK.flatten().numpy())
    assert float(output.aux_loss) == pytest.approx(expected, rel=1e-5)
    assert float(patched.aux_loss) == pytest.approx(expected, rel=1e-5)
    assert float(output.loss) == pytest.approx(float(plain.loss) + 0.5 * expected, rel=1e-5)
    assert plain.aux_loss is None
    small.config.output_router_logits = True
    assert isinstance(small(**INPUTS, return_dict=False), tuple)
    assert torch.equal(small(**INPUTS).loss, output.loss)


@pytest.mark.parametrize("kind", PLANS)
def test_training_reaches_every_weight_and_is_saved(folders: Path, tmp_path: Path, kind: str) -> None:
    """In bfloat16, with gradient checkpointing and the load balancing loss."""
    small = loaded(folders / kind, torch.bfloat16).train()
    constants = {name: tensor.clone() for name, tensor in small.named_buffers()}
    assert not [name for name, _ in small.named_parameters() if name.endswith(NOT_TRAINED)]
    small(**INPUTS, output_router_logits=True).loss.backward()
    plain = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    small.gradient_checkpointing_enable()
    small(**INPUTS, output_router_logits=True).loss.backward()
    for (name, p), layers in ((item, PLANS[kind].layers) for item in small.named_parameters()):
        assert torch.equal(p.grad, plain[name])
        assert p.grad.isfinite().all()
        part = next((layer for i, layer in enumerate(layers) if f"layers.{i}.mlp.gate" in name), None)
        if part is None or part.kept_experts > 1:  # a softmax over one expert is 1
            assert p.grad.abs().sum() > 0, name
        p.data -= 0.1 * p.grad
    small.save_pretrained(tmp_path / "trained")
    assert all(torch.equal(tensor, constants[name]) for name, tensor in small.named_buffers())
    small.eval()
    with torch.no_grad():
        expected = small(IDS).logits
        for again in (loaded(tmp_path / "trained", "auto"), load_model(tmp_path / "trained")):
            assert torch.equal(again(IDS).logits, expected)
        assert not torch.equal(loaded(folders / kind, torch.bfloat16)(IDS).logits, expected)


def outside_and_kept(plan: Plan, name: str) -> list[int] | slice | None:
    """Where a parameter's gradient lies in the full model's: None for routers and experts that are made of several."""
    layer = plan.layers[int(name.split(".")[2])] if ".mlp." in name else None
    if layer is None:
        return slice(None)
    return list(layer.kept) if ".experts." in name and layer.kept and not layer.makes_experts else None


@pytest.mark.parametrize("kind", ["pruned", "merged", "mixed-r", "prob", "alias-kept", "novices-skip", "everything"])
def test_gradients_are_those_of_the_full_model_under_the_plan(folders: Path, kind: str) -> None:
    small, full = loaded(folders / kind), loaded(folders / "full")
    for model in (small, full):
        model.set_experts_implementation("eager")
    small(**INPUTS).loss.backward()
    with moeopt.patched(full.eval(), PLANS[kind]):
        full(**INPUTS).loss.backward()
    places = {name: outside_and_kept(PLANS[kind], name) for name, _ in small.named_parameters()}
    assert len([place for place in places.values() if place is not None]) >= 21
    for name, place in places.items():
        if place is not None:
            expected = full.get_parameter(name).grad[place]
            torch.testing.assert_close(small.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["pruned", "merged", "prob", "alias", "novices", "skip"])
def test_gradients_of_what_a_plan_selects_or_merges_follow_the_chain_rule(folders: Path, kind: str) -> None:
    """dL/dE_j = sum over i of W_EM[i, j] dL/dE'_i, against differences of the full model's loss under the plan."""
    small, full, layer = (
        loaded(folders / kind).double(),
        loaded(folders / "full").double().eval(),
        PLANS[kind].layers[1],
    )
    for model in (small, full):
        model.set_experts_implementation("eager")
    small(**INPUTS).loss.backward()
    w_em = torch.from_numpy(layer.expert_matrix.astype(np.float64))
    selects = layer.router in ("rows", "logit")  # else the router is whole
    w_rm = torch.from_numpy(layer.router_matrix.astype(np.float64)) if selects else torch.eye(6, dtype=torch.float64)
    for name, made in (("experts.gate_up_proj", w_em), ("experts.down_proj", w_em), ("gate.weight", w_rm)):
        weight = full.get_parameter(f"model.layers.1.mlp.{name}")
        grad = torch.einsum("ij,i...->j...", made, small.get_parameter(f"model.layers.1.mlp.{name}").grad)
        step, losses = grad / grad.norm(), []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 2e-4 * step
                with moeopt.patched(full, PLANS[kind]):
                    losses.append(float(full(**INPUTS).loss))
                weight -= sign * 2e-4 * step
        assert (losses[0] - losses[1]) / 4e-4 == pytest.approx(float(grad.norm()), rel=1e-2, abs=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "everything", "novices"])
def test_transformers_trains_it_and_peft_adapts_it(folders: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 2
    small, losses, trainers = loaded(folders / kind), [], []
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "gate.weight"])
    torch.manual_seed(0)
    for place, subject in (("plain", small), ("lora", get_peft_model(loaded(folders / kind), lora))):
        options = TrainingArguments(
            str(tmp_path / place), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            bf16=place == "plain", use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", seed=0,
        )  # fmt: skip
        trainer = Trainer(subject, options, train_dataset=rows)
        trainer.train()
        trainers.append(trainer)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(str(tmp_path / place))
    assert all(each[-1] < each[0] for each in losses)
    with torch.no_grad():
        small = trainers[0].accelerator.unwrap_model(small.eval(), keep_fp32_wrapper=False)  # nor autocast
        assert torch.equal(loaded(tmp_path / "plain")(IDS).logits, small(IDS).logits)
        expected = subject.eval()(IDS).logits
        adapted = PeftModel.from_pretrained(loaded(folders / kind), tmp_path / "lora")
        torch.testing.assert_close(adapted(IDS).logits, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-3, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(tmp_path / "merged")(IDS).logits, merged(IDS).logits)
