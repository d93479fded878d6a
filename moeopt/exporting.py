"""Export: a plan and the full checkpoint in, a smaller stock checkpoint out."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError

from moeopt import __version__
from moeopt.errors import ExportError, PlanError
from moeopt.plan import LayerPlan, Matrix, Plan

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from torch import Tensor
    from transformers import PreTrainedModel

SHARD_BYTES = 5 << 30
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

NOT_RENORMALISED = (
    "the plan selects rows of the router's probabilities, but {name!r} does not renormalise its top-k, so a smaller "
    "stock model would weigh experts differently; prune with PruneSpace, which searches the stock rule"
)

_EXPERT = re.compile(r"^(?P<block>.*\blayers\.(?P<layer>\d+)\..*?)\.experts\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)$")


def export(
    plan: Plan | FrozenTrial,
    out_dir: str | Path,
    *,
    model: PreTrainedModel | str | Path,
    study: optuna.Study | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model that a plan describes as a stock checkpoint, which needs nothing of moeopt to load.

    Expressible are plans whose layers all have the same r and k, with experts pruned or merged, and router rows
    selected (one-hot) or mapped on the logits. Tensors are streamed from the full checkpoint one expert tensor at a
    time, names and dtypes kept; the original ``config.json`` is edited, not rewritten; tokenizer and chat template are
    copied; ``moeopt.json`` and a model card say what was done. The folder appears whole or not at all.

    Args:
        plan: a plan, or a finished trial of `study`.
        out_dir: a folder that does not exist yet, or is empty.
        model: the full model as `moeopt.load` returned it, or its checkpoint folder or hub name.
        study: the study the trial belongs to; with it, scores and the study's description go into ``moeopt.json``.
        shard_bytes: largest size of one weight file.

    Returns:
        The folder written.

    Raises:
        ExportError: when a stock checkpoint cannot express the plan (the message says what would), the folder is not
            empty or not writable, or the full checkpoint is not readable.
    """
    record: dict[str, Any] = {"moeopt": __version__}
    if not isinstance(plan, Plan):
        if study is None:
            raise ExportError("to export a trial, give its study too: export(trial, out_dir, study=study, model=model)")
        record |= _trial_record(plan, study)
        if plan.value is None:
            raise ExportError(f"trial {plan.number} ended without a loss ({plan.state.name}); export a completed one")
        _check_model(model, study)
        plan = plan_of(plan, study)
    stock = stock_form(plan)
    out = Path(out_dir).resolve()
    check_folder(out)
    source = _source(model)
    config = _edited_config(source, stock, selects_probabilities=any(layer.router == "prob" for layer in plan.layers))
    record |= {"plan": _plan_record(stock), "fingerprint": plan.fingerprint}
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        total = _write_weights(source, stock, temporary, shard_bytes)
        _write_json(temporary / "config.json", config)
        _copy_companions(source, temporary)
        _write_json(temporary / "moeopt.json", record)
        (temporary / "README.md").write_text(_card(source, stock, record, total), encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(out)  # also over an empty folder
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ExportError(f"cannot write {str(out)!r} from {str(source)!r}: {str(error).splitlines()[0]}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def _check_model(model: PreTrainedModel | str | Path, study: optuna.Study) -> None:
    """Raise ExportError unless the study searched this model; of a mere path only the shape is compared."""
    from moeopt.models import check_checkpoint, describe
    from moeopt.study import DESCRIPTION

    description = study.user_attrs.get(DESCRIPTION, {})
    if isinstance(model, (str, Path)):
        found_shape, shape = vars(check_checkpoint(model)), description.get("space", {}).get("shape")
        if shape is not None and found_shape != shape:
            raise ExportError(f"{str(model)!r} has {found_shape}, the study searched {shape}")
        return
    searched = description.get("model", {})
    found = describe(model)
    differing = [key for key in ("config_hash", "weights") if key in searched and searched[key] != found[key]]
    if differing:
        name = searched.get("name_or_path")
        raise ExportError(f"study {study.study_name!r} searched another model ({name}): {', '.join(differing)} differ")


def plan_of(trial: FrozenTrial, study: optuna.Study) -> Plan:
    """The plan of a finished trial, from the space that its study describes.

    Raises:
        ExportError: when the study does not say what it searched.
    """
    from moeopt.study import space_of

    return space_of(study).plan(trial)


def why_not_stock(plan: Plan) -> str | None:
    """Why no stock checkpoint expresses the plan, and the nearest thing that would; None when one does."""
    first = plan.layers[0]
    for i, layer in enumerate(plan.layers):
        if (layer.kept_experts, layer.k) != (first.kept_experts, first.k):
            return (
                f"layer {i} has (r, k) = {(layer.kept_experts, layer.k)}, layer 0 {(first.kept_experts, first.k)}: "
                "a stock checkpoint has one r and one k for all layers; search with one keep= and one k="
            )
        if layer.skip:
            return (
                f"layer {i} skips experts token by token (skip={layer.skip:g}), which a stock checkpoint has no place "
                "for; export the same plan without skipping: plan.with_skip(0)"
            )
        if layer.router == "alias":
            return (
                f"layer {i} lets its router choose among all {layer.experts} experts and aliases its picks, which a "
                'stock checkpoint has no place for; a pruning exports, and so does a merging with router="logit"'
            )
        if layer.router == "prob" and layer.router_rows is None:
            return (
                f"layer {i} maps router probabilities by a dense W_RM, which a stock checkpoint has no place for; "
                'search with router="logit", or export the best pruning of the study'
            )
    return None


def stock_form(plan: Plan) -> Plan:
    """The plan with every one-hot mapping of probabilities written as selected router rows; else as it is.

    Raises:
        ExportError: with `why_not_stock`.
    """
    reason = why_not_stock(plan)
    if reason:
        raise ExportError(f"a stock checkpoint cannot express this plan: {reason}")
    return Plan(tuple(_as_rows(layer) for layer in plan.layers))


def _as_rows(layer: LayerPlan) -> LayerPlan:
    if layer.router_rows is None:
        return layer
    return LayerPlan(layer.experts, layer.k, kept=layer.kept, w_em=layer.w_em, w_rm=layer.w_rm, router="rows")


def best_stock_trial(study: optuna.Study) -> FrozenTrial:
    """The completed trial of least loss whose plan a stock checkpoint expresses.

    Raises:
        ExportError: when the study has none.
    """
    from optuna.trial import TrialState

    from moeopt.study import space_of

    space = space_of(study)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in sorted(trials, key=lambda t: (t.value, t.number)):
        if why_not_stock(space.plan(trial)) is None:
            return trial
    raise ExportError(f"study {study.study_name!r} has no completed trial that a stock checkpoint can express")


def check_folder(out: Path) -> None:
    """Raise ExportError unless a checkpoint can be written to `out`: new or empty, in a writable folder."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{str(out)!r} is a file; give a folder to write the checkpoint to")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{str(out)!r} is not empty; give a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ExportError(f"cannot write to {str(out.parent)!r}: {error.strerror or error}") from None


def _source(model: PreTrainedModel | str | Path) -> Path:
    name = str(model if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "") or "")
    if not name:
        raise ExportError("the model was not loaded from a checkpoint, and export reads one: save it and load it first")
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, ignore_patterns=["*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"]))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"no folder {name!r} is here, and the hub does not give it: {reason}") from None
    return Path(name)


_Readers: TypeAlias = dict[str, Callable[[str], "Tensor"]]
"""For each tensor of a checkpoint, by name, the function that reads it."""


def _open_tensors(source: Path, stack: ExitStack) -> _Readers:
    from safetensors import safe_open

    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "*.bin"),
    ):
        if (source / index).is_file():
            named = json.loads((source / index).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({source / file for file in named.values()})
        else:
            files = sorted(source.glob("model.safetensors" if pattern == "*.safetensors" else "pytorch_model.bin"))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ExportError(f"{str(source)!r} lacks the weight files {', '.join(missing)} that its index names")
        if not files:
            continue
        if pattern == "*.safetensors":
            opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            return {name: handle.get_tensor for handle in opened for name in handle.keys()}  # noqa: SIM118
        import torch

        states = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        return {name: state.__getitem__ for state in states for name in state}
    raise ExportError(f"{str(source)!r} holds neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _planned(readers: _Readers, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the smaller checkpoint, in the order of the full one."""
    import torch

    from moeopt.models import merge

    def read(name: str) -> Tensor:
        if name not in readers:
            raise ExportError(f"the full checkpoint has no tensor {name!r}; it is incomplete")
        return readers[name](name)

    found: dict[int, str] = {}
    for name in readers:
        match = _EXPERT.match(name)
        if match:
            found[int(match["layer"])] = match["block"]
    if len(found) != len(plan.layers):
        raise PlanError(f"the plan is for {len(plan.layers)} MoE layers, the checkpoint has {len(found)}")
    layer_of = {number: plan.layers[i] for i, number in enumerate(sorted(found))}
    router = re.compile(rf"^(?:{'|'.join(re.escape(block) for block in found.values())})\.(?:gate|router)\..+$")

    def mix(layer: LayerPlan, matrix: Matrix, rows: tuple[int, ...] | None, stack: Tensor) -> Tensor:
        if stack.shape[0] != layer.experts:
            raise PlanError(f"the plan is for {layer.experts} experts, the checkpoint has {stack.shape[0]}")
        return stack[list(rows)].clone() if rows is not None else merge(torch.from_numpy(matrix.copy()), stack)

    merged: dict[tuple[str, str], Tensor] = {}
    for name in readers:
        match = _EXPERT.match(name)
        if match is None:
            if router.match(name):
                layer = layer_of[int(re.search(r"\blayers\.(\d+)\.", name)[1])]  # type: ignore[index]
                if layer.router_rows is None and not name.endswith((".weight", ".bias")):
                    raise ExportError(f"{name!r} corrects the choice of experts, and cannot be mapped by a dense W_RM")
                yield name, mix(layer, layer.router_matrix, layer.router_rows, read(name))
            else:
                yield name, read(name)
            continue
        layer = layer_of[int(match["layer"])]
        if match["expert"] is None:
            yield name, mix(layer, layer.expert_matrix, layer.kept, read(name))
        elif int(match["expert"]) < layer.kept_experts:
            i = int(match["expert"])
            head, tail = f"{match['block']}.experts.", f".{match['rest']}"
            if layer.kept is not None:
                yield name, read(f"{head}{layer.kept[i]}{tail}")
            else:
                if (head, tail) not in merged:
                    stacked = torch.stack([read(f"{head}{j}{tail}") for j in range(layer.experts)])
                    merged[head, tail] = merge(torch.from_numpy(layer.expert_matrix.copy()), stacked)
                yield name, merged[head, tail][i].clone()
                if i == layer.kept_experts - 1:
                    del merged[head, tail]


def _write_weights(source: Path, plan: Plan, folder: Path, shard_bytes: int) -> int:
    """Write the planned tensors as safetensors shards with an index; returns their bytes."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        shards.append(list(pending))
        save_file(pending, str(folder / f"shard-{len(shards)}"), metadata={"format": "pt"})
        pending.clear()

    with ExitStack() as stack:
        for name, tensor in _planned(_open_tensors(source, stack), plan):
            sizes[name] = tensor.numel() * tensor.element_size()
            if pending and sum(sizes[other] for other in pending) + sizes[name] > shard_bytes:
                flush()
            pending[name] = tensor.contiguous()
        flush()
    total = sum(sizes.values())
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _edited_config(source: Path, plan: Plan, *, selects_probabilities: bool) -> dict[str, Any]:
    """The checkpoint's config with r and k in place of n and its k, readable by transformers 4 as well as 5."""
    path = source / "config.json"
    if not path.is_file():
        raise ExportError(f"{str(source)!r} has no config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    layer = plan.layers[0]
    text = config.get("text_config", config)
    experts = [key for key in EXPERT_KEYS if text.get(key) == layer.experts]
    if not experts:
        raise ExportError(f"{str(path)!r} does not say that the model has {layer.experts} experts; is the plan for it?")
    if selects_probabilities and text.get("norm_topk_prob") is False:
        raise ExportError(NOT_RENORMALISED.format(name=str(source)))
    if "quantization_config" in config:
        raise ExportError(
            f"{str(source)!r} is quantised; export from the unquantised checkpoint and quantise the result"
        )
    active = [key for key in ACTIVE_KEYS if key in text]
    if not active and layer.k != 2:
        active = [ACTIVE_KEYS[0]]
    text.update(dict.fromkeys(experts, layer.kept_experts) | dict.fromkeys(active, layer.k))
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])  # transformers 4 knows only this key
        if rope.get("rope_type", "default") != "default":
            text.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    return config


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation config, custom code: every file that is neither weights nor replaced."""
    ours = {"config.json", "moeopt.json", "README.md"}
    for file in sorted(source.iterdir()):
        if file.is_dir() or file.name.startswith(".") or file.name in ours or file.name.endswith(".index.json"):
            continue
        if not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy(file, folder / file.name)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        config = json.loads(tokenizer.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 knows the class by its old name only
            _write_json(tokenizer, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _plan_record(plan: Plan) -> dict[str, Any]:
    first = plan.layers[0]
    layers = [
        {"kept": list(layer.kept)} if layer.kept is not None else {"w_em": layer.expert_matrix.tolist()}
        for layer in plan.layers
    ]
    for layer, entry in zip(plan.layers, layers):
        if layer.router_rows != layer.kept:
            entry["w_rm"] = layer.router_matrix.tolist()
    return {"experts": first.experts, "r": first.kept_experts, "k": first.k, "router": first.router, "layers": layers}


def _trial_record(trial: FrozenTrial, study: optuna.Study) -> dict[str, Any]:
    from moeopt.study import DESCRIPTION

    attrs = {key: trial.user_attrs[key] for key in ("accuracy", "operator", "phase") if key in trial.user_attrs}
    return {
        "study": {"name": study.study_name, **study.user_attrs.get(DESCRIPTION, {})},
        "trial": {"number": trial.number, "loss": trial.value, **attrs},
    }


def _card(source: Path, plan: Plan, record: dict[str, Any], total: int) -> str:
    first = plan.layers[0]
    pruned = all(layer.kept is not None for layer in plan.layers)
    original = sum(
        file.stat().st_size for pattern in ("*.safetensors", "pytorch_model*.bin") for file in source.glob(pattern)
    )
    name = source.name
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mixture-of-experts, moeopt, pruning]",
        "---",
        f"# {name}, {first.experts} to {first.kept_experts} experts",
        "",
        f"Each of the {len(plan.layers)} MoE layers of `{name}` {'keeps' if pruned else 'merges its experts into'} "
        f"{first.kept_experts} of {first.experts} experts, {first.k} active per token: "
        f"{total / 2**20:.1f} MiB of weights, from {original / 2**20:.1f} MiB. "
        "An ordinary checkpoint: it loads with plain transformers.",
    ]
    if "trial" in record:
        study, trial = record["study"], record["trial"]
        task = study.get("task", {})
        lines += [
            "",
            f"Found by moeopt {record['moeopt']}: study `{study['name']}`, trial "
            f"{trial['number']}, task `{task.get('name')}`, loss {trial['loss']:.4f} on the `{task.get('split')}` "
            "split that the search minimised; expect a higher loss on unseen data.",
        ]
    return "\n".join([*lines, "", "`moeopt.json` holds the plan, layer by layer.", ""])


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
