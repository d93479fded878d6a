"""Custom form: every plan is exported with the class it needs, and computes what the patched original does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting.conftest import build_plans
from tiny_families import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MixtralForCausalLM

import moeopt
from moeopt.errors import ExportError, ModelError
from moeopt.exporting import verify, why_not_stock
from moeopt.models import gate, load_model
from moeopt.plan import LayerPlan, Plan

KINDS = tuple(build_plans())
FLOAT_KINDS = ("prob", "novices", "skip", "everything")
IDS = torch.arange(3, 29).reshape(2, 13) * 5 % 96


def computed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and a greedy continuation with a key-value cache."""
    with torch.no_grad():
        return model(input_ids=IDS).logits, model.generate(IDS, max_new_tokens=6, do_sample=False)


def reloaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.bfloat16) for kind in KINDS), *((kind, torch.float32) for kind in FLOAT_KINDS)],
    ids=lambda value: str(value),
)
def test_the_reloaded_checkpoint_is_the_patched_model(
    saved: Any, make_mixtral: Any, tiny_tokenizer: Any, plans: dict[str, Plan], tmp_path: Path, kind: str, dtype: Any
) -> None:
    full = saved(make_mixtral(layers=3, experts=6, dtype=dtype), tiny_tokenizer, tmp_path / "full")
    moeopt.export(plans[kind], tmp_path / "small", model=tmp_path / "full")
    record = json.loads((tmp_path / "small" / "moeopt.json").read_text())
    assert record["form"] == "custom"
    assert record["why_custom"] == why_not_stock(plans[kind])
    assert Plan.load(tmp_path / "small" / "plan.safetensors") == plans[kind]
    small = reloaded(tmp_path / "small")
    assert small.dtype == dtype
    for backend in ("eager", "grouped_mm"):
        full.set_experts_implementation(backend)
        small.set_experts_implementation(backend)
        with moeopt.patched(full, plans[kind]):
            expected = computed(full)
        assert all(map(torch.equal, computed(small), expected)), backend


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_moeopt_loads_and_evaluates_what_it_exported(
    full: Any, tiny_tokenizer: Any, plans: dict[str, Plan], tmp_path: Path, kind: str
) -> None:
    task = moeopt.tasks.TextTask("t", search=[f"{word} sat on the mat" for word in ("a cat", "the dog", "no one")])
    expected = moeopt.Evaluator(full, tiny_tokenizer, task).evaluate(plans[kind])
    moeopt.export(plans[kind], tmp_path / "small", model=full)
    for trusted in (False, True):  # its code is moeopt's own, which needs no trust
        small, tokenizer = moeopt.load(tmp_path / "small", trust_remote_code=trusted)
        evaluation = moeopt.Evaluator(small, tokenizer, task).evaluate()
        assert evaluation.losses.tolist() == expected.losses.tolist()


@pytest.mark.slow
def test_every_family_has_a_custom_form(
    family: str, build_family: Any, make_plans: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    build_family(family, vocabulary=300).save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    full = moeopt.load(tmp_path / "full")[0]
    for kind in ("everything", "novices", "novices-skip"):
        plan = make_plans(n=7, layers=2)[kind]
        moeopt.export(plan, tmp_path / kind, model=full)
        with moeopt.patched(full, plan):
            logits, tokens = computed(full)
        small_logits, small_tokens = computed(reloaded(tmp_path / kind))
        assert torch.allclose(small_logits, logits, rtol=0, atol=1e-5)
        assert torch.equal(small_tokens, tokens)


def test_an_exported_model_saves_and_loads_again(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    """With its code, whether its own or moeopt's copy of it ran."""
    moeopt.export(plans["everything"], tmp_path / "small", model=full)
    for place, small in (("again", reloaded(tmp_path / "small")), ("ours", moeopt.load(tmp_path / "small")[0])):
        small.save_pretrained(tmp_path / place)
        for name in ("num_local_experts", "num_experts_per_tok", "moeopt", "model_type", "auto_map"):
            configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("small", place)]
            assert configs[0][name] == configs[1][name]
        assert (tmp_path / place / "modeling_moeopt.py").is_file()
        assert all(map(torch.equal, computed(moeopt.models.load_model(tmp_path / place)), computed(small)))
        assert all(map(torch.equal, computed(reloaded(tmp_path / place)), computed(small)))


def test_a_loaded_model_may_be_cast(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    moeopt.export(plans["prob"], tmp_path / "small", model=full)
    small = reloaded(tmp_path / "small").float()
    small.set_experts_implementation("eager")
    expected = computed(small)[0]
    assert torch.allclose(computed(small.double())[0].float(), expected, atol=1e-4)
    assert computed(small.bfloat16())[0].dtype == torch.bfloat16


def test_a_checkpoint_that_balances_load_goes_on_doing_so(
    saved: Any, make_mixtral: Any, tiny_tokenizer: Any, plans: dict[str, Plan], tmp_path: Path
) -> None:
    full = saved(make_mixtral(experts=6, output_router_logits=True), tiny_tokenizer, tmp_path / "full")
    moeopt.export(plans["mixed-r"], tmp_path / "small", model=full)
    small = reloaded(tmp_path / "small")
    with moeopt.patched(full, plans["mixed-r"]):
        assert all(map(torch.equal, computed(small), computed(full)))
        assert small(IDS, labels=IDS).aux_loss == full(IDS, labels=IDS).aux_loss
    logits = small(IDS).router_logits
    assert [layer.shape[1] for layer in logits] == [part.kept_experts for part in plans["mixed-r"].layers]


def test_experts_that_a_token_skips_do_not_run(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    moeopt.export(plans["skip"], tmp_path / "small", model=full)
    small = reloaded(tmp_path / "small")
    block, ran = small.model.layers[0].mlp, []
    run = type(block.experts).__mro__[2].forward

    def counted(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ran.append(index.numel())
        return run(module, hidden, index, weights)

    type(block.experts).__bases__[1].forward, before = counted, run
    try:
        hidden = torch.randn(1, 64, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            _, weights, _ = block.gate(hidden[0])
            block(hidden)
    finally:
        type(block.experts).__bases__[1].forward = before
    assert ran == [int((weights != 0).sum())]
    assert 64 <= ran[0] < 128
    with moeopt.patched(full, plans["skip"]) as state:
        full.model.layers[0].mlp(hidden)
    assert state.active[0] == ran[0] / 64


@pytest.mark.parametrize("kind", ["mixed-k", "skip", "alias"])
def test_loading_without_trust_or_as_the_stock_class_fails(
    full: Any, plans: dict[str, Plan], tmp_path: Path, kind: str
) -> None:
    moeopt.export(plans[kind], tmp_path / "small", model=full)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=False)
    with pytest.raises(Exception, match=r"num_(local_experts|experts_per_tok)"):
        MixtralForCausalLM.from_pretrained(tmp_path / "small")


def test_a_lost_mapping_is_an_error_on_loading(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for kind, lost in (("prob", "gate.w_rm"), ("novices", "gate.places"), ("novices", "experts.novices")):
        moeopt.export(plans[kind], tmp_path / lost, model=full)
        state = load_file(tmp_path / lost / "model.safetensors")
        del state[f"model.layers.1.block_sparse_moe.{lost}"]
        save_file(state, tmp_path / lost / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks model\.layers\.1\.mlp\.{lost}"):
            reloaded(tmp_path / lost)


def test_what_an_earlier_version_exported_loads_untrusted(
    full: Any, plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is another, and its rule lacks fields; today's class gives the same logits."""
    moeopt.export(plans["prob"], tmp_path / "small", model=full)
    before = load_model(tmp_path / "small")(input_ids=IDS).logits
    template = (Path(gate.__file__).parent / gate.CODE).read_bytes() + b"# of yore\n"
    (tmp_path / "small" / gate.CODE).write_bytes(template)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    for since in ("groups", "returns_scores", "multiplier", "jitter", "factor"):
        del config["moeopt"]["rule"][since]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not, byte for byte, what this moeopt ships"):
        load_model(tmp_path / "small")
    monkeypatch.setattr(gate, "EARLIER", {hashlib.sha256(template).hexdigest()})
    assert torch.equal(load_model(tmp_path / "small")(input_ids=IDS).logits, before)


def test_the_form_is_chosen_or_refused(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    stock = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)
    moeopt.export(stock, tmp_path / "auto", model=full)
    moeopt.export(stock, tmp_path / "custom", model=full, form="custom")
    assert not (tmp_path / "auto" / "modeling_moeopt.py").exists()
    assert all(map(torch.equal, computed(moeopt.load(tmp_path / "auto")[0]), computed(reloaded(tmp_path / "custom"))))
    assert "ordinary checkpoint" in (tmp_path / "auto" / "README.md").read_text()
    with pytest.raises(ExportError, match="form must be one of auto, stock, custom"):
        moeopt.export(stock, tmp_path / "other", model=full, form="onnx")  # type: ignore[arg-type]
    card = moeopt.export(plans["prob"], tmp_path / "prob", model=full) / "README.md"
    assert "trust_remote_code=True" in card.read_text()


@pytest.mark.slow
def test_a_model_of_images_and_text_is_exported_whole(saved: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    full, key = saved(tiny_model("qwen3_vl_moe"), tiny_tokenizer, tmp_path / "full"), "num_local_experts"
    stock = Plan.one_hot([[0, 2, 5]] * 3, experts=8, k=2)
    others = stock.layers[1:]
    custom = Plan((LayerPlan(8, 1, kept=(0, 1, 3, 4), w_rm=np.eye(8)[1:5] + 0.1, router="prob"), *others))
    for plan, form in ((stock, "stock"), (custom, "custom")):
        moeopt.export(plan, tmp_path / form, model=full)
        small = json.loads((tmp_path / form / "config.json").read_text())
        assert small["text_config"][key] == (3 if form == "stock" else [4, 3, 3])
        assert key not in small
        assert verify(tmp_path / form).ok  # as transformers alone loads it
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / form, trust_remote_code=form == "custom")
        assert any("visual" in name for name, _ in model.named_parameters())
        model.save_pretrained(tmp_path / f"{form} again")
        again = load_model(tmp_path / f"{form} again")
        torch.testing.assert_close(computed(again), computed(model.eval()))


def test_families_that_need_code_of_their_own_are_refused_before_writing(full: Any, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    plan = Plan((LayerPlan(6, 1, kept=(0, 1)), *Plan.one_hot([[0, 2, 5]] * 2, experts=6, k=2).layers))
    with pytest.raises(ExportError, match="code of its own"):
        moeopt.export(plan, tmp_path / "small", model=tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
