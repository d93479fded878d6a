"""Export: a plan and the full checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moeopt import __version__
from moeopt.errors import ExportError, ModelError, PlanError
from moeopt.exporting.base import BASE_CARD, CARD, Base, base_of, check_base
from moeopt.exporting.card import Weights, card
from moeopt.exporting.companions import companions
from moeopt.exporting.custom import check_loads, custom_config, rule_of
from moeopt.exporting.dequantising import dequantised
from moeopt.exporting.folders import SOURCE, check_folder, locate, real
from moeopt.exporting.layout import Layout, Roles, check_understood, lay_out, placed_parts
from moeopt.exporting.quantised import Quantised, edit_settings
from moeopt.exporting.record import plan_record
from moeopt.exporting.source import Source
from moeopt.exporting.stock import Form, chosen_form, read_config, stock_config, stock_form
from moeopt.exporting.trials import check_model, plan_of, trial_record
from moeopt.exporting.unread import Unread, disagreeing, unfulfilled, unread, without_prediction
from moeopt.exporting.writing import (
    appearing,
    copy_companions,
    needs,
    room_for,
    write_json,
    write_text,
    write_weights,
)
from moeopt.models import empty_model, moe_layers
from moeopt.models.gate import CODE, auto_class, code_for
from moeopt.plan import Plan
from moeopt.showing import listed, public, public_command
from moeopt.spaces.serving import Server, check_servers, demands

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.exporting.projecting import Projection

SHARD_BYTES = 5 << 30
"""Largest size of a file of weights, unless said otherwise: 5 GiB."""


def export(
    plan: Plan | FrozenTrial,
    out_dir: str | Path,
    *,
    model: PreTrainedModel | str | Path,
    study: optuna.Study | None = None,
    form: Form = "auto",
    about: Mapping[str, Any] | None = None,
    projection: Projection | None = None,
    shard_bytes: int = SHARD_BYTES,
    serve_on: str | Sequence[str] = (),
    serve_parallel: int = 1,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the model that a plan describes as a checkpoint that needs nothing of moeopt to load.

    A plan whose layers all have the same r and k, with experts pruned or merged, and router rows selected (one-hot) or
    mapped on the logits, becomes a **stock** checkpoint: the model's own class loads it. Every other plan becomes a
    **custom** one: the class it needs, a file of its own that imports torch and transformers 5 only, ships inside, and
    ``from_pretrained(out_dir, trust_remote_code=True)`` loads it; without ``trust_remote_code``, and in the stock
    class, loading fails.

    Tensors are streamed a few MiB at a time from disk to disk, names and dtypes kept; the original ``config.json`` is
    edited, not rewritten; tokenizer, chat templates, settings of generation and licence are copied, but no link out of
    the checkpoint is followed; ``plan.safetensors`` holds the plan, ``moeopt.json`` says what was done. ``README.md``
    is a model card: the full model and its licence, what was changed, the scores that the study holds, how to load it;
    the full model's own card lies beside it as ``BASE_MODEL_CARD.md``. Paths of this machine are in none of these.
    Blocks of experts that the model's class does not read, such as one for multi-token prediction, are left out. A
    warning says what else was left out. The folder appears whole or not at all.

    Args:
        plan: a plan, or a finished trial of `study`.
        out_dir: a folder that does not exist yet, or is empty.
        model: the full model as `moeopt.load` returned it, or its checkpoint folder or hub name.
        study: the study the trial belongs to; with it, scores and the study's description go into ``moeopt.json``.
        form: ``"stock"`` or ``"custom"``; ``"auto"`` is stock where that expresses the plan. ``moeopt.json`` says which
            it became.
        about: what the plan's file says of it (`Plan.about`), to be recorded; of a refit the model card tells it.
        projection: what it cost to make the plan one that a stock checkpoint expresses, to be recorded.
        shard_bytes: largest size of one weight file.
        serve_on: servers that shall load it, of ``"vllm"``, ``"sglang"`` and ``"llama.cpp"``; a warning says what they
            ask for beside that (`moeopt.spaces.demands`).
        serve_parallel: over how many ranks they divide the experts of a layer.
        trust_remote_code: whether code that comes with the full checkpoint may run. If so, the class that it names is
            the model's own: its files and ``auto_map`` are copied as they are, and the stock form loads with
            ``trust_remote_code=True``, too. There is no custom form of such a model.
        base_model: the full model's id on the hub, for the card; None: what its place in the hub's cache says, if it
            lies there.
        command: the command that asks for it, for the card.

    Returns:
        The folder written.

    Raises:
        ExportError: when the form cannot express the plan (the message says what would), the folder is not empty or
            not writable, the full checkpoint is incomplete, not readable or of a class whose code is not trusted, or a
            server of `serve_on` cannot load it.
        PlanError: when the plan is not for this model.
    """
    if form not in get_args(Form):
        raise ExportError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    servers = check_servers(serve_on, serve_parallel)
    check_base(base_model)
    record: dict[str, Any] = {"moeopt": __version__}
    if not isinstance(plan, Plan):
        if study is None:
            raise ExportError("to export a trial, give its study too: export(trial, out_dir, study=study, model=model)")
        trial = plan
        if trial.values is None:
            raise ExportError(f"trial {trial.number} ended without a loss ({trial.state.name}); export a completed one")
        check_model(model, study, trust_remote_code=trust_remote_code)
        plan = plan_of(trial, study)
        record |= trial_record(trial, study, plan.fingerprint)
    if form == "stock":
        stock_form(plan)
    out = Path(out_dir).resolve()
    check_folder(out)
    folder = locate(model)
    asked = demands(plan, servers, serve_parallel, read_config(folder)) if servers else []
    refusals = [str(demand) for demand in asked if demand.refused]
    if refusals:
        raise ExportError("; ".join(refusals))
    form, reason = chosen_form(plan, folder, form)
    if servers and form == "custom":
        raise ExportError(f"{', '.join(servers)} read checkpoints of the model's own class alone: {reason}")
    record |= {"form": form, **({} if reason is None else {"why_custom": reason})}
    base = base_of(folder, base_model)
    record |= {"base_model": base.hub_id, "base_revision": base.revision, "fingerprint": plan.fingerprint}
    if command is not None:
        record["command"] = public_command(command)
    if about:
        record["about"] = dict(about)
    if projection is not None:
        record["projection"] = asdict(projection)
    try:
        with Source(folder) as source:
            prepared = prepare(source, plan, form, trust_remote_code=trust_remote_code)
            record |= prepared.notes
            files = sum(real(folder, name).stat().st_size for name in prepared.files)
            size = prepared.layout.nbytes + files + plan.nbytes
            if size > shutil.disk_usage(out.parent).free:
                raise ExportError(f"cannot write {str(out)!r}: {needs(size, out.parent)}")
            with appearing(out) as temporary:
                _write(temporary, out.name, source, prepared, plan, base, public(record), shard_bytes)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        file = error.filename2 or error.filename
        which = f" ({file})" if file else ""
        raise ExportError(f"cannot write {str(out)!r} from {str(folder)!r}: {reason}{which}") from error
    said = [*prepared.said(), *map(str, asked)]
    if said:
        warnings.warn(f"{str(out)!r}: {'; '.join(said)}", stacklevel=2)
    return out


class Prepared:
    """All that is decided before the first byte is written.

    Attributes:
        source: the full checkpoint, with those weights dequantised that new ones are made of.
        config: what config.json will hold.
        code: of the class that a custom checkpoint brings, else None.
        layout: of its tensors.
        names: of its weights, as if none were quantised.
        dequantised: names of the modules whose experts are floats now and were quantised.
        unread: tensors of the full checkpoint that its model has no place for.
        ignored: names of those among them that are copied.
        unfulfilled: keys of the config that spoke of a block for multi-token prediction that is not there.
        written: the plan as the form expresses it.
        files: names of the other files that are copied.
        files_left: names of those that are not.
    """

    def __init__(
        self, source: Source, plan: Plan, form: Literal["stock", "custom"], *, trust_remote_code: bool = False
    ) -> None:
        folder, self.code = source.folder, None
        written = stock_form(plan) if form == "stock" else plan
        if form == "stock":
            self.config = stock_config(folder, written, trust_remote_code=trust_remote_code)
        try:
            model = empty_model(folder, trust_remote_code=trust_remote_code)
            layers = moe_layers(model)
            rule = rule_of(folder, trust_remote_code=trust_remote_code)
        except ModelError as error:
            raise ExportError(str(error)) from error
        if len(plan.layers) != len(layers):
            raise PlanError(f"the plan is for {len(plan.layers)} MoE layers, the checkpoint has {len(layers)}")
        for layer, part in zip(layers, written.layers):
            rule.check(part, layer.name)
        full = read_config(folder)
        quantised = Quantised.among(full, source.tensors)
        places = placed_parts(model, source.tensors, quantised)
        roles = Roles(model, layers)
        experts = check_understood(source, places, roles, quantised)
        self.unread: Unread = unread(source.tensors, places, layers[0].n, layers[0].hidden)
        self.ignored = [name for name in source.tensors if name not in places and name not in self.unread.tensors]
        if form == "custom":
            self.config = custom_config(folder, written, rule)
            self.code = code_for(str(read_config(folder).get("model_type")))
        if self.unread.prediction:
            without_prediction(self.config)
        text = model.config.get_text_config().to_dict()
        self.unfulfilled = unfulfilled(text, source.tensors, self.unread)
        self.config.get("text_config", self.config).update(dict.fromkeys(self.unfulfilled, 0))
        plans = {module: written.layers[layer.index] for module, layer in experts.items()}
        self.source, self.dequantised = dequantised(source, quantised, plans, model)
        remaining = Quantised.among(full, self.source.tensors)
        self.layout: Layout = lay_out(
            self.source, written, model, layers, form=form, quantised=remaining, left_out=self.unread.tensors
        )
        remaining = Quantised.among(full, self.layout.tensors)
        modules = {name.rpartition(".")[0] for name in quantised.plain(source.tensors)}
        self.names = set(remaining.plain(self.layout.tensors))
        edit_settings(self.config, plans, modules, remaining, custom=form == "custom")
        wrong = disagreeing(self.config, self.layout.tensors)
        if wrong:
            raise ExportError(f"{str(folder)!r} holds experts that the plan is not for: {listed(wrong, 2)}")
        self.written = written
        self.files, self.files_left = companions(folder, source.files, trust_remote_code=trust_remote_code)

    @property
    def notes(self) -> dict[str, Any]:
        """What moeopt.json says of tensors and files that are left out, copied though nothing reads them, or written
        otherwise than they were."""
        lists: dict[str, Sequence[str]] = {
            "left_out": self.unread.left_out,
            "copied_unread": self.unread.copied,
            "files_left_out": self.files_left,
            "dequantised": self.dequantised,
        }
        notes: dict[str, Any] = {key: list(names) for key, names in lists.items() if names}
        return notes | ({"trust_remote_code": True} if self.needs_trust else {})

    @property
    def needs_trust(self) -> bool:
        """Whether a stock checkpoint loads as the full one's class, whose code comes with it."""
        return self.code is None and "auto_map" in self.config

    def said(self) -> list[str]:
        """The same for people."""
        files = listed(self.files_left)
        return [*self.remarks, *([f"files that are not the model's were left behind: {files}"] if files else [])]

    @property
    def remarks(self) -> list[str]:
        """What the model card says of tensors."""
        lines = self.unread.lines()
        if self.unfulfilled:
            lines.append(f"no block for multi-token prediction is there, so config.json has {self.unfulfilled[0]} of 0")
        if self.dequantised:
            names = listed(self.dequantised)
            lines.append(f"new experts are no longer quantised, as those that they are made of are: {names}")
        return lines


def check_takes(folder: Path, plan: Plan, *, trust_remote_code: bool = False) -> None:
    """Raise ExportError unless the class that the config.json in `folder` names routes to k of r experts.

    It does not where routers rank groups of experts by their best two, as in DeepSeek-V3, and r leaves these too small.
    """
    r, k = plan.layers[0].kept_experts, plan.layers[0].k
    try:
        model = empty_model(folder, trust_remote_code=trust_remote_code)
        takes = {(layer.n, layer.k) for layer in moe_layers(model)} == {(r, k)}
    except ModelError as error:
        if trust_remote_code:
            raise ExportError(f"the class that the checkpoint brings cannot be what is exported: {error}") from error
        takes = False
    if not takes:
        model_type = read_config(folder).get("model_type")
        raise ExportError(f"models of type {model_type!r} cannot route to {k} of {r} experts; keep another number")


def prepare(
    source: Source, plan: Plan, form: Literal["stock", "custom"], *, trust_remote_code: bool = False
) -> Prepared:
    """The checkpoint of a plan before anything is written, held against the class that will load it."""
    prepared = Prepared(source, plan, form, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json(folder / "config.json", prepared.config)
        if prepared.code is None:
            copy_companions(source.folder, [name for name in prepared.files if name.endswith(".py")], folder)
            check_takes(folder, prepared.written, trust_remote_code=prepared.needs_trust)
        else:
            check_loads(folder, prepared.config, prepared.names, prepared.written)
    return prepared


def _write(
    folder: Path,
    name: str,
    source: Source,
    prepared: Prepared,
    plan: Plan,
    base: Base,
    record: dict[str, Any],
    shard_bytes: int,
) -> None:
    write_weights(prepared.layout, prepared.source, folder, shard_bytes)
    copy_companions(source.folder, prepared.files, folder)
    write_json(folder / "config.json", prepared.config)
    if prepared.code is not None:
        write_text(folder / CODE, prepared.code.decode())
    with room_for(folder / "plan.safetensors", plan.nbytes):
        plan.save(folder / "plan.safetensors", about=record.get("about"))
    write_json(folder / "moeopt.json", record | {"plan": plan_record(prepared.written)})
    write_json(folder / SOURCE, {"source": str(source.folder.resolve())})
    if base.card is not None:
        write_text(folder / BASE_CARD, base.card.read_text(encoding="utf-8", errors="replace"))
    config = read_config(source.folder)
    packed = "quantization_config" in config.get("text_config", config) or "quantization_config" in config
    full, small = (
        Weights(size, None if packed else sum(tensor.size for tensor in tensors.values()))
        for size, tensors in ((source.nbytes, source.tensors), (prepared.layout.nbytes, prepared.layout.tensors))
    )
    stock = prepared.code is None
    asked = map(str, demands(prepared.written, get_args(Server), 1, config)) if stock else ()
    auto = auto_class(prepared.config).__name__
    text = card(
        name, base, prepared.written, record, full, small, remarks=prepared.remarks, asked=[*asked], auto_class=auto
    )
    write_text(folder / CARD, text)
