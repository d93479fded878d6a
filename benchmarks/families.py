"""What moeopt does with every MoE type of the installed transformers: writes `docs/families.md`.

    python benchmarks/families.py [TYPE ...] [--jobs 2] [--write]

A tiny model of every type (`tiny_families.py`), with random weights and biases that are not zero, goes through `STEPS`,
on the CPU in float32. An export, loaded again, is held against the model under its plan.
Without `--write` the table is printed; a step that fails other than by a `MoeoptError` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import transformers
from tiny_families import ACTIVE, EXPERTS, moe_types, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import moeopt
from moeopt.errors import MoeoptError
from moeopt.methods import Calibration, plans
from moeopt.models import load_model, routing_rules
from moeopt.plan import LayerPlan, Plan
from moeopt.showing import first_line
from moeopt.tasks import TextTask

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
KEPT, MORE = (0, 2, 5, 7), (0, 1, 2, 4, 5, 7)
"""Experts of a pruned layer, as many from each half."""
TEXTS = ["one text that is long enough to be scored", "another one, which is as long and no longer"]
ROUNDING = 2.0**-20
"""What of the largest logit may differ where the same numbers lie at another place in memory."""
NOT_REACHED = "not reached"


@dataclass
class Tried:
    """One type on its way through the steps.

    Args:
        model_type: as its config.json names it.
        folder: for checkpoints.
        model: the full one: as it was made, then as it was loaded.
    """

    model_type: str
    folder: Path
    model: Any

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")

    def plan(self, **options: Any) -> Plan:
        """A plan of layers that are alike, or, given `w_em`, that mix the kept experts with the others."""
        shape = moeopt.shape_of(self.model)
        rng = np.random.default_rng(0)
        layers = []
        for _ in range(shape.layers):
            part = dict(options)
            for name in ("w_em", "w_rm"):
                if part.get(name) == "dense":
                    part[name] = np.eye(shape.experts)[list(KEPT)] + 0.1 * rng.random((len(KEPT), shape.experts))
                elif part.get(name) == "rows":
                    part[name] = np.eye(shape.experts)[list(KEPT)]
            layers.append(LayerPlan(shape.experts, shape.k, **part))
        return Plan(tuple(layers))

    def exports(self, plan: Plan, form: Any) -> Any:
        """The model under a plan, and what it exports to, loaded again, give the same bits; gives the latter."""
        with moeopt.patched(self.model, plan):
            expected = logits(self.model)
        if torch.equal(expected, self.full) or not bool(expected.isfinite().all()):
            raise AssertionError("the plan changes nothing, or gives numbers that are not finite")
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            small = load_model(moeopt.export(plan, Path(scratch) / "small", model=self.model, form=form))
        check_same(logits(small), expected)
        return small

    @property
    def task(self) -> TextTask:
        return TextTask("toy", search=TEXTS, window=32)

    @cached_property
    def full(self) -> Tensor:
        """Logits of the full model."""
        return logits(self.model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.arange(3, 27)[None] * 5 % 250, use_cache=False).logits
    return output


def check_same(given: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless logits are the same, but for how a library splits sums of numbers lying elsewhere."""
    difference = float((given - expected).abs().max())
    if not difference <= ROUNDING * float(expected.abs().max()):
        raise AssertionError(f"logits differ by {difference:.2g}")


def attach(tried: Tried) -> None:
    """Layers are found, and routing rules learnt."""
    routing_rules(tried.model)


def identity(tried: Tried) -> None:
    """The identity plan changes no bit."""
    shape = moeopt.shape_of(tried.model)
    with moeopt.patched(tried.model, Plan.identity(shape.layers, shape.experts, shape.k)):
        assert torch.equal(logits(tried.model), tried.full)


def load(tried: Tried) -> None:
    """`moeopt.load` gives the model that was saved."""
    tried.model.save_pretrained(tried.folder / "full")
    tried.tokenizer.save_pretrained(tried.folder / "full")
    made, tried.model = tried.model, moeopt.load(tried.folder / "full")[0]
    check_same(logits(tried.model), logits(made))
    vars(tried).pop("full", None)


def stock(tried: Tried) -> None:
    """A pruning: one r and one k for all layers."""
    tried.exports(tried.plan(kept=KEPT), "stock")


def custom(tried: Tried) -> None:
    """A pruning with another r in the first layer."""
    first, *others = tried.plan(kept=KEPT).layers
    layers = (LayerPlan(first.experts, first.k, kept=MORE), *others)
    tried.exports(Plan(layers), "custom")


def rows(tried: Tried) -> None:
    """Merged experts behind router rows that are kept."""
    tried.exports(tried.plan(w_em="dense", w_rm="rows", router="rows"), "stock")


def on_logits(tried: Tried) -> None:
    """Merged experts, W_RM on the logits."""
    tried.exports(tried.plan(w_em="dense", w_rm="dense", router="logit"), "stock")


def on_probabilities(tried: Tried) -> None:
    """Merged experts, W_RM on the probabilities."""
    tried.exports(tried.plan(w_em="dense", w_rm="dense", router="prob"), "custom")


def methods(tried: Tried) -> None:
    """frequency, reap and naee."""
    shape = moeopt.shape_of(tried.model)
    calibration = Calibration(tried.model, tried.tokenizer, tried.task)
    for plan in plans(["frequency", "reap", "naee"], calibration, keep=shape.experts // 2).values():
        with moeopt.patched(tried.model, plan.plan):
            assert logits(tried.model).isfinite().all()


def search(tried: Tried) -> None:
    """EEP's two phases with the default space, and `local`; the best plan exports."""
    shape = moeopt.shape_of(tried.model)
    cases: dict[str, dict[str, Any]] = {"eep": {"initial": 2, "prune_until": 4}, "local": {}}
    for sampler, options in cases.items():
        space = moeopt.EEPSpace.of(tried.model, keep=shape.experts // 2)
        objective = moeopt.Objective(tried.model, tried.tokenizer, tried.task, space)
        study = moeopt.create_study(objective=objective, storage=None, sampler=sampler, seed=0, **options)
        moeopt.optimize(study, objective, n_trials=6)
        states = {trial.state.name for trial in study.trials}
        assert states == {"COMPLETE"}, f"{sampler}: {states}"
        with tempfile.TemporaryDirectory(dir=tried.folder) as scratch:
            moeopt.export(study.best_trial, Path(scratch) / "small", study=study, model=tried.model)


def generate(tried: Tried) -> None:
    """What the pruned model generates under its plan, its export generates."""
    plan, ids = tried.plan(kept=KEPT), torch.arange(3, 15)[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with moeopt.patched(tried.model, plan):
        expected = tried.model.generate(ids, **options)
    assert torch.equal(tried.exports(plan, "auto").generate(ids, **options), expected)


STEPS: dict[str, tuple[Callable[[Tried], None], tuple[str, ...]]] = {
    "attach": (attach, ()),
    "identity": (identity, ("attach",)),
    "load": (load, ()),
    "stock": (stock, ("attach", "load")),
    "custom": (custom, ("attach", "load")),
    "merge, rows": (rows, ("attach", "load")),
    "merge, logits": (on_logits, ("attach", "load")),
    "merge, probabilities": (on_probabilities, ("attach", "load")),
    "methods": (methods, ("attach", "load")),
    "search": (search, ("attach", "load")),
    "generate": (generate, ("attach", "load")),
}
"""By name, what is done, and which steps must have passed before."""


def tried(model_type: str, steps: Iterable[str] = tuple(STEPS)) -> dict[str, str | None]:
    """For every step None where it passed, else why not."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        transformers.dynamic_module_utils.HF_MODULES_CACHE = f"{scratch}/modules"
        try:
            state = Tried(model_type, Path(scratch), tiny_model(model_type))
            if not state.model.config.is_encoder_decoder:
                logits(state.model)
        except Exception as error:
            return dict.fromkeys(steps, f"no tiny model of it runs on text alone: {shortened(error, state=None)}")
        for name in steps:
            step, needed = STEPS[name]
            if any(results[other] is not None for other in needed):
                results[name] = NOT_REACHED
                continue
            try:
                step(state)
                results[name] = None
            except MoeoptError as error:
                results[name] = shortened(error, state)
            except Exception as error:
                results[name] = f"ERROR {type(error).__name__}: {shortened(error, state)}"
    return results


def shortened(error: Exception, state: Tried | None) -> str:
    """The first line of an error without names of this run's files, classes and layers."""
    text = first_line(error)
    if state is not None:
        text = text.replace(str(state.folder), "")
    text = re.sub(r"^'[^']*': ", "", text)
    text = re.sub(r"^(the MoE layers of )?\w*(model|encoder|decoder)(\.\w+)+: ", "", text)
    text = re.sub(r"\b(its router )?[A-Z]\w+(Router|Gate)\b", r"the router", text)
    text = re.sub(r"\b[A-Z]\w+For[A-Z]\w+\b", "the model", text)
    text = re.sub(r"<class '[\w.]+'>", "", text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def page(results: dict[str, dict[str, str | None]]) -> str:
    """`docs/families.md`."""
    classes = moe_types()
    counts = {step: sum(row[step] is None for row in results.values()) for step in STEPS}
    whole = sum(not any(row.values()) for row in results.values())
    lines = [
        "# Families",
        "",
        "<!-- written by benchmarks/families.py; do not edit -->",
        "",
        f"Every model type of transformers {transformers.__version__} that generates text and has experts: a tiny",
        f"model of it, {EXPERTS} experts, top-{ACTIVE}, random weights and biases that are not zero, taken through all",
        "that moeopt does, on a CPU in float32. Exports, loaded again, must give the logits of the model under its",
        "plan (to the last bits, which hang on where numbers lie in memory).",
        "`python benchmarks/families.py --write` makes this page.",
        "",
        *(f"* **{name}**: {step.__doc__}" for name, (step, _) in STEPS.items()),
        "",
        "| type | class | " + " | ".join(STEPS) + " |",
        "|---|---|" + "---|" * len(STEPS),
    ]
    reasons: dict[str, int] = {}
    for model_type, row in results.items():
        cells = []
        for step in STEPS:
            reason = row[step]
            if reason is None:
                cells.append("yes")
            elif reason == NOT_REACHED:
                cells.append("")
            else:
                cells.append(f"no [{reasons.setdefault(reason, len(reasons) + 1)}]")
        lines.append(f"| {model_type} | {classes[model_type]} | " + " | ".join(cells) + " |")
    lines.append(
        f"| **{len(results)} types** | **{whole} pass every step** | " + " | ".join(map(str, counts.values())) + " |"
    )
    lines += ["", "Why not:", ""]
    lines += [f"{number}. {reason.replace('|', chr(92) + '|')}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def run(types: Iterable[str], jobs: int) -> dict[str, dict[str, str | None]]:
    """The results of types, in their order."""
    types = list(types)
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(types, pool.map(tried, types)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in place of printing")
    parser.add_argument("--json", type=Path, help="results as JSON, to this file")
    options = parser.parse_args()
    results = run(options.types or moe_types(), options.jobs)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.write:
        PAGE.write_text(page(results), encoding="utf-8")
    else:
        print(page(results))


if __name__ == "__main__":
    main()
