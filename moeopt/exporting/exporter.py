"""Export: a plan and the full checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moeopt import __version__
from moeopt.errors import ExportError, ModelError
from moeopt.exporting.custom import CODE, check_corrections, check_loads, code_for, custom_config, rule_of
from moeopt.exporting.layout import Layout, lay_out
from moeopt.exporting.record import card, plan_record
from moeopt.exporting.source import Source, locate
from moeopt.exporting.stock import (
    check_takes,
    read_config,
    stock_config,
    stock_form,
    why_not_renormalised,
    why_not_stock,
)
from moeopt.exporting.trials import check_model, plan_of, trial_record
from moeopt.exporting.writing import appearing, check_folder, copy_companions, write_json, write_weights
from moeopt.plan import Plan

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.exporting.projecting import Projection

SHARD_BYTES = 5 << 30
Form = Literal["auto", "stock", "custom"]


def export(
    plan: Plan | FrozenTrial,
    out_dir: str | Path,
    *,
    model: PreTrainedModel | str | Path,
    study: optuna.Study | None = None,
    form: Form = "auto",
    projection: Projection | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model that a plan describes as a checkpoint that needs nothing of moeopt to load.

    A plan whose layers all have the same r and k, with experts pruned or merged, and router rows selected (one-hot) or
    mapped on the logits, becomes a **stock** checkpoint: the model's own class loads it. Every other plan becomes a
    **custom** one: the class it needs, a file of its own that imports torch and transformers 5 only, ships inside, and
    ``from_pretrained(out_dir, trust_remote_code=True)`` loads it; without ``trust_remote_code``, and in the stock
    class, loading fails.

    Tensors are streamed a few MiB at a time from disk to disk, names and dtypes kept; the original ``config.json`` is
    edited, not rewritten; tokenizer and chat template are copied; ``plan.safetensors`` holds the plan, ``moeopt.json``
    and a model card say what was done. The folder appears whole or not at all.

    Args:
        plan: a plan, or a finished trial of `study`.
        out_dir: a folder that does not exist yet, or is empty.
        model: the full model as `moeopt.load` returned it, or its checkpoint folder or hub name.
        study: the study the trial belongs to; with it, scores and the study's description go into ``moeopt.json``.
        form: ``"stock"`` or ``"custom"``; ``"auto"`` is stock where that expresses the plan. ``moeopt.json`` says which
            it became.
        projection: what it cost to make the plan one that a stock checkpoint expresses, to be recorded.
        shard_bytes: largest size of one weight file.

    Returns:
        The folder written.

    Raises:
        ExportError: when the form cannot express the plan (the message says what would), the folder is not empty or
            not writable, or the full checkpoint is incomplete or not readable.
        PlanError: when the plan is not for this model.
    """
    if form not in get_args(Form):
        raise ExportError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    record: dict[str, Any] = {"moeopt": __version__}
    if not isinstance(plan, Plan):
        if study is None:
            raise ExportError("to export a trial, give its study too: export(trial, out_dir, study=study, model=model)")
        record |= trial_record(plan, study)
        if plan.value is None:
            raise ExportError(f"trial {plan.number} ended without a loss ({plan.state.name}); export a completed one")
        check_model(model, study)
        plan = plan_of(plan, study)
    if form == "stock":
        stock_form(plan)
    out = Path(out_dir).resolve()
    check_folder(out)
    folder = locate(model)
    form, reason = chosen_form(plan, folder, form)
    record |= {"form": form, **({} if reason is None else {"why_custom": reason})}
    record |= {"source": str(folder.resolve()), "fingerprint": plan.fingerprint}
    if projection is not None:
        record["projection"] = asdict(projection)
    try:
        with Source(folder) as source:
            prepared = prepare(source, plan, form)
            _check_space(out, prepared.layout)
            with appearing(out) as temporary:
                _write(temporary, source, prepared, plan, record, shard_bytes)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        which = f" ({error.filename})" if error.filename else ""
        raise ExportError(f"cannot write {str(out)!r} from {str(folder)!r}: {reason}{which}") from error
    return out


def chosen_form(plan: Plan, source: Path, form: Form = "auto") -> tuple[Literal["stock", "custom"], str | None]:
    """Which form the plan of a checkpoint takes, and why it is not stock, if it is not.

    Raises:
        ExportError: when it is to be stock and cannot.
    """
    reason = why_not_stock(plan) or why_not_renormalised(plan, source)
    if form == "stock" and reason is not None:
        raise ExportError(f"a stock checkpoint cannot express this plan: {reason}")
    if form == "custom" and reason is None:
        return "custom", "it was asked for"
    return ("stock", None) if reason is None else ("custom", reason)


class Prepared:
    """All that is decided before the first byte is written.

    Attributes:
        config: what config.json will hold.
        code: of the class that a custom checkpoint brings, else None.
        layout: of its tensors.
        unread: names of tensors of the full checkpoint that its model has no place for.
        written: the plan as the form expresses it.
    """

    def __init__(self, source: Source, plan: Plan, form: Literal["stock", "custom"]) -> None:
        from moeopt.models import empty_model, moe_layers, placed

        folder, self.code = source.folder, None
        written = stock_form(plan) if form == "stock" else plan
        if form == "stock":
            self.config = stock_config(folder, written)
        try:
            model = empty_model(folder)
            layers = moe_layers(model)
            rule = rule_of(folder)
        except ModelError as error:
            raise ExportError(str(error)) from error
        places = placed(model, source.tensors)
        self.unread = [name for name in source.tensors if name not in places]
        if form == "custom":
            self.code = code_for(str(read_config(folder).get("model_type")))
            self.config = custom_config(folder, written, rule)
            by_parameter = {place.name: name for name, place in places.items()}
            check_corrections(
                model, layers, written, rule, lambda name: not bool(source.tensor(by_parameter[name]).any())
            )
        self.layout: Layout = lay_out(source, written, model, layers, form=form)
        self.written = written


def prepare(source: Source, plan: Plan, form: Literal["stock", "custom"]) -> Prepared:
    """The checkpoint of a plan before anything is written, held against the class that will load it."""
    import tempfile

    prepared = Prepared(source, plan, form)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json(folder / "config.json", prepared.config)
        if prepared.code is None:
            check_takes(folder, prepared.written)
        else:
            (folder / CODE).write_bytes(prepared.code)
            check_loads(folder, prepared.config, set(prepared.layout.tensors), prepared.written)
    return prepared


def _write(
    folder: Path, source: Source, prepared: Prepared, plan: Plan, record: dict[str, Any], shard_bytes: int
) -> None:
    write_weights(prepared.layout, source, folder, shard_bytes)
    copy_companions(source.folder, folder)
    write_json(folder / "config.json", prepared.config)
    if prepared.code is not None:
        (folder / CODE).write_bytes(prepared.code)
    plan.save(folder / "plan.safetensors")
    write_json(folder / "moeopt.json", record | {"plan": plan_record(prepared.written)})
    text = card(source.folder, prepared.written, record, prepared.layout.nbytes, source.nbytes)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _check_space(out: Path, layout: Layout) -> None:
    free = shutil.disk_usage(out.parent).free
    if layout.nbytes > free:
        raise ExportError(
            f"the checkpoint takes {layout.nbytes / 2**30:.2f} GiB, and {str(out.parent)!r} has only "
            f"{free / 2**30:.2f} GiB left"
        )
