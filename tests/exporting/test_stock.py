"""Stock form: the written checkpoint is the patched model, and the family's own class loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeopt
from moeopt.errors import ExportError, PlanError
from moeopt.exporting import best_stock_trial, why_not_stock
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import TextTask

optuna.logging.set_verbosity(optuna.logging.WARNING)

IDS = torch.arange(3, 43)[None] * 5 % 250


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pruning(router: Any = "rows") -> Plan:
    return Plan.one_hot([[0, 2, 5], [1, 2, 3], [3, 4, 5]], experts=6, k=2, router=router)


def merging(router: Any = "logit", seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    matrices = [np.eye(6)[rng.permutation(6)[:3]] + 0.1 * rng.standard_normal((2, 3, 6)) for _ in range(3)]
    return Plan(tuple(LayerPlan(6, 2, w_em=m[0], w_rm=m[1], router=router) for m in matrices))


def rows_of_merged() -> Plan:
    layers = merging().layers
    return Plan(tuple(LayerPlan(6, 2, w_em=p.w_em, w_rm=np.eye(6)[[4, 1, 0]], router="rows") for p in layers))


@pytest.mark.parametrize(
    "plan",
    [
        pruning(),
        pruning("prob"),
        pruning("logit"),
        merging(),
        rows_of_merged(),
        pruning().with_k(1),
        Plan.identity(3, 6, 2),
    ],
    ids=["rows", "prob", "logit", "merged", "merged-rows", "k1", "identity"],
)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000], ids=["one-file", "sharded"])
def test_the_reloaded_checkpoint_is_the_patched_model(full: Any, tmp_path: Path, plan: Plan, shard_bytes: int) -> None:
    with moeopt.patched(full, plan):
        expected = logits(full)
    moeopt.export(plan, tmp_path / "small", model=full, shard_bytes=shard_bytes)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").eval()
    assert small.dtype == torch.bfloat16
    assert small.config.num_local_experts == plan.layers[0].kept_experts
    assert small.config.num_experts_per_tok == plan.layers[0].k
    assert torch.equal(logits(small), expected)
    original, copied = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("full", "small"))
    assert copied("zebra, ünïcode") == original("zebra, ünïcode")


def test_dtype_names_and_companions_are_kept(full: Any, tmp_path: Path) -> None:
    (tmp_path / "full" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "full" / "additional_chat_templates").mkdir()
    (tmp_path / "full" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    config["something_of_the_users"] = [1, 2]
    (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    moeopt.export(pruning(), tmp_path / "small", model=tmp_path / "full")
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    changed = {key for key in config.keys() | small.keys() if config.get(key) != small.get(key)}
    assert changed == {"num_local_experts", "rope_theta", "torch_dtype"}
    assert small["rope_theta"] == config["rope_parameters"]["rope_theta"]
    templates = AutoTokenizer.from_pretrained(tmp_path / "small").chat_template
    assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names >= {"chat_template.jinja", "tokenizer.json", "moeopt.json", "README.md", "model.safetensors"}
    record = json.loads((tmp_path / "small" / "moeopt.json").read_text())
    assert [layer["kept"] for layer in record["plan"]["layers"]] == [[0, 2, 5], [1, 2, 3], [3, 4, 5]]
    from safetensors import safe_open

    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert "model.layers.2.block_sparse_moe.experts.2.w1.weight" in set(file.keys())
        assert not any(".experts.3." in name for name in file.keys())  # noqa: SIM118


def test_a_family_that_does_not_renormalise_exports_by_the_stock_rule(
    saved: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=False, decoder_sparse_step=1,
    )  # fmt: skip
    full = saved(Qwen3MoeForCausalLM(config).eval(), tiny_tokenizer, tmp_path / "full")
    plan = Plan.one_hot([[0, 2, 5], [1, 2, 3]], experts=6, k=2)
    with moeopt.patched(full, plan):
        expected = logits(full)
    moeopt.export(plan, tmp_path / "small", model=full)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()), expected)
    with pytest.raises(ExportError, match="does not renormalise"):
        moeopt.export(
            Plan.one_hot([[0, 2, 5], [1, 2, 3]], experts=6, k=2, router="prob"),
            tmp_path / "other",
            model=full,
            form="stock",
        )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_old_bin_checkpoints_are_read(full: Any, tmp_path: Path, zipped: bool) -> None:
    from safetensors.torch import load_file

    state = load_file(tmp_path / "full" / "model.safetensors")
    torch.save(state, tmp_path / "full" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "full" / "model.safetensors").unlink()
    moeopt.export(pruning(), tmp_path / "small", model=tmp_path / "full")
    with moeopt.patched(full, pruning()):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()), logits(full))


@pytest.mark.parametrize("content", [{"model": {}}, {"step": 3}, torch.ones(2)], ids=["nested", "number", "tensor"])
def test_bin_files_of_something_else_are_refused(full: Any, tmp_path: Path, content: Any) -> None:
    (tmp_path / "full" / "model.safetensors").unlink()
    torch.save(content, tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pytorch_model\.bin' must hold tensors by name and nothing else"):
        moeopt.export(pruning(), tmp_path / "small", model=tmp_path / "full")


def test_what_a_stock_checkpoint_cannot_express_is_refused(full: Any, plans: dict[str, Plan], tmp_path: Path) -> None:
    mixed_k = Plan((*pruning().layers[:2], pruning().with_k(1).layers[2]))
    w_rm = np.eye(3, 6, dtype=np.float32)
    w_rm[0, 3:] = 1
    aliased = Plan((LayerPlan(6, 2, kept=(0, 1, 2), w_rm=w_rm, router="alias"),) * 3)
    cases = {
        'search with router="logit"': merging("prob"),
        "one r and one k": mixed_k,
        "plan.with_skip(0)": pruning().with_skip(0.5),
        "a pruning exports": aliased,
        "--project stock leaves them out": plans["novices"],
    }
    for reason, plan in cases.items():
        assert reason in str(why_not_stock(plan))
        with pytest.raises(ExportError, match="cannot express"):
            moeopt.export(plan, tmp_path / "small", model=full, form="stock")
    assert not (tmp_path / "small").exists()


def test_a_number_of_experts_that_the_family_cannot_route_to_is_refused(
    build_family: Any, saved: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """DeepSeek-V3 ranks groups of experts by the two best of each."""
    full = saved(build_family("deepseek_v3", vocabulary=300), tiny_tokenizer, tmp_path / "full")
    moeopt.export(Plan.one_hot([[2, 5]] * 2, experts=7, k=1), tmp_path / "two", model=full)
    with pytest.raises(ExportError, match=r"'deepseek_v3' cannot route to 1 of 1 experts; keep another number"):
        moeopt.export(Plan.one_hot([[2]] * 2, experts=7, k=1), tmp_path / "one", model=full)
    assert not (tmp_path / "one").exists()


def test_a_family_whose_routing_is_not_known_is_refused_before_anything_is_written(
    full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = type(full.model.layers[0].mlp.gate)
    stock = router.forward

    def unlike_any(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = stock(self, hidden)
        return logits, weights.sqrt(), index

    monkeypatch.setattr(router, "forward", unlike_any)
    with pytest.raises(ExportError, match="does not know the routing rule of MixtralTopKRouter"):
        moeopt.export(pruning(), tmp_path / "out", model=tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_bad_folders_and_models_are_refused(full: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("x")
    with pytest.raises(ExportError, match="not empty"):
        moeopt.export(pruning(), tmp_path / "taken", model=full)
    with pytest.raises(ExportError, match="is a file"):
        moeopt.export(pruning(), tmp_path / "taken" / "precious.txt", model=full)
    with pytest.raises(ExportError, match="experts; is the plan for it"):
        moeopt.export(Plan.one_hot([[0, 1]] * 3, experts=5, k=2), tmp_path / "small", model=full)
    with pytest.raises(PlanError, match=r"2 MoE layers, the checkpoint has 3"):
        moeopt.export(Plan.one_hot([[0, 1]] * 2, experts=6, k=2), tmp_path / "small", model=full)
    (tmp_path / "full" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="neither"):
        moeopt.export(pruning(), tmp_path / "small", model=full)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "taken"}


def test_an_interrupted_export_leaves_nothing(full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeopt.exporting.exporter.copy_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moeopt.export(pruning(), tmp_path / "small", model=full)
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_a_trial_is_exported_with_its_scores(full: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    task = TextTask("toy", search=["one text that is long enough"] * 1 + ["another one, also long"], window=32)
    objective = moeopt.Objective(full, tiny_tokenizer, task, moeopt.EEPSpace.of(full, keep=3))
    study = moeopt.create_study("s", objective=objective, storage=None, initial=3, prune_until=6)
    study.optimize(objective, n_trials=12)
    trial = best_stock_trial(study)
    assert trial.value == min(t.value for t in study.trials if why_not_stock(objective.space.plan(t)) is None)
    moeopt.export(trial, tmp_path / "small", study=study, model=full)
    record = json.loads((tmp_path / "small" / "moeopt.json").read_text())
    assert record["trial"]["number"] == trial.number
    assert record["trial"]["loss"] == trial.value
    assert record["study"]["task"]["name"] == "toy"
    assert "trial" in (tmp_path / "small" / "README.md").read_text()
    small, tokenizer = moeopt.load(tmp_path / "small")
    evaluation = moeopt.Evaluator(small, tokenizer, task).evaluate(None)
    assert evaluation.loss == trial.value
    with pytest.raises(ExportError, match="give its study"):
        moeopt.export(trial, tmp_path / "other", model=full)


def test_a_trial_is_exported_only_from_the_model_it_was_searched_on(
    full: Any, saved: Any, make_mixtral: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    task = TextTask("toy", search=["one text that is long enough", "another one, also long"], window=32)
    objective = moeopt.Objective(full, tiny_tokenizer, task, moeopt.EEPSpace.of(full, keep=3))
    study = moeopt.create_study("s", objective=objective, storage=None, sampler="random")
    study.optimize(objective, n_trials=1)
    other = saved(make_mixtral(layers=3, experts=6, seed=1, dtype=torch.bfloat16), tiny_tokenizer, tmp_path / "other")
    wider = saved(make_mixtral(layers=3, experts=8, dtype=torch.bfloat16), tiny_tokenizer, tmp_path / "wider")
    for model in (other, wider, tmp_path / "wider"):
        with pytest.raises(ExportError, match=r"the study searched|searched another model"):
            moeopt.export(study.best_trial, tmp_path / "small", study=study, model=model)
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    with pytest.raises(ExportError, match="ended without a loss"):
        moeopt.export(study.trials[1], tmp_path / "small", study=study, model=full)


def test_awkward_folders_and_damaged_checkpoints(full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    moeopt.export(pruning(), ".", model=full)
    assert (tmp_path / "here" / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    moeopt.export(pruning(), tmp_path / "link", model=full)
    assert (tmp_path / "link" / "model.safetensors").is_file()
    (tmp_path / "full" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match=r"left behind: gone\.txt"):
        moeopt.export(pruning(), tmp_path / "small", model=full)
    weights = tmp_path / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ExportError, match="truncated"):
        moeopt.export(pruning(), tmp_path / "other", model=tmp_path / "full")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_servers_read_of_a_config_and_transformers_does_not_write_is_written(
    build_family: Any, saved: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Of a DeepSeek-V3 without them llama.cpp and vLLM take a softmax for the sigmoid, and no correction."""
    full = saved(build_family("deepseek_v3", vocabulary=300), tiny_tokenizer, tmp_path / "full")
    assert "scoring_func" not in json.loads((tmp_path / "full" / "config.json").read_text())
    layers, n = len(moeopt.models.moe_layers(full)), moeopt.models.moe_layers(full)[0].n
    small = moeopt.export(Plan.one_hot([range(n - 1)] * layers, experts=n, k=2), tmp_path / "small", model=full)
    config = json.loads((small / "config.json").read_text())
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
