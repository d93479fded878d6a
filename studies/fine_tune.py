"""How much of the loss does training bring back? The full model and exports of prunings, trained alike.

    pip install 'moeopt[training]'
    python studies/fine_tune.py [--small] [--methods reap,hc_smoe] [--keep 4] [--steps 200] [--out fine-tune]
    python studies/fine_tune.py --model MODEL --task arc_easy --data FOLDER --how lora --optimiser adafactor

Experts are pruned, or merged, by one-shot methods on the task's search split and exported, in the form that the plan
needs. Every checkpoint, and the full model, is then trained by transformers' Trainer on the same search examples in the
same order, once in all its weights (``plain``) and once with peft's LoRA on attention and experts (``lora``), with the
family's load balancing loss. They are judged on test, which neither methods nor training saw. Run it again to
go on: checkpoints and finished legs are kept in the folder `--out`.

The shipped model, `--limit 200 --steps 60 --batch 4 --test-limit 200` (8 experts to 4 for ``caesar``; 240 examples seen
in training, AdamW, float32, one seed). Loss and accuracy on 200 test questions, with 95 % intervals; "so trained" is
the full model trained in the same way:

| | form | loss | right | - untrained | - full so trained |
|---|---|---|---|---|---|
| full | | .0222 | 1.000 | | |
| full, plain | | .0107 | 1.000 | -.0115 [-.0126, -.0105] | |
| full, lora | | .0095 | 1.000 | -.0127 [-.0139, -.0117] | |
| reap | stock | .9142 | .800 | | +.8920 [.6841, 1.1145] |
| reap, plain | stock | .8525 | .805 | -.0617 [-.0825, -.0427] | +.8418 [.6447, 1.0498] |
| reap, lora | stock | .8467 | .800 | -.0675 [-.0893, -.0472] | +.8372 [.6415, 1.0434] |
| hc_smoe | custom | 3.0928 | .455 | | +3.0706 [2.7626, 3.4136] |
| hc_smoe, plain | custom | 1.4275 | .730 | -1.6654 [-1.8690, -1.4716] | +1.4168 [1.1840, 1.6723] |
| hc_smoe, lora | custom | 1.4254 | .735 | -1.6674 [-1.8846, -1.4548] | +1.4160 [1.1812, 1.6659] |

Both trainings bring back 6 % of what pruning cost and 54 % of what merging cost, which is still worse than pruning
untrained; LoRA, which trains a tenth of the numbers, is as good as training all. 60 steps are few: how far more of them
get, and other rates, was not looked at. On larger models it was not run to its end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _subject
import torch
from _legs import Leg, Legs, compare, judge
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import moeopt
from moeopt import methods
from moeopt.evaluation import Evaluation
from moeopt.evaluation.store import digest
from moeopt.models import describe, fingerprint

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IGNORED = -100
"""The label of tokens that a loss leaves out."""


def main() -> None:
    args = arguments()
    if args.small:
        args.steps, args.batch, args.limit, args.test_limit, args.methods = 3, 2, 8, 6, "hc_smoe"
    model, tokenizer, task = _subject.load(args)
    calibration = methods.Calibration(model, tokenizer, task, limit=args.limit)
    rows = [
        {
            "input_ids": list(request.ids),
            "labels": [IGNORED] * request.scored_from + list(request.ids[request.scored_from :]),
        }
        for request in task.solutions("search", calibration.requests)
    ]
    settings = {
        "model": describe(model),
        "weights": fingerprint(model),
        "dtype": args.dtype,
        "task": task.describe(),
        "limits": [args.limit, args.test_limit],
        "keep": args.keep,
    }
    legs, names = Legs(args.out, settings), args.methods.split(",")
    checkpoints = {name: args.out / f"{name}-{digest(settings)}" for name in names}
    absent = [name for name in names if not checkpoints[name].is_dir()]
    for name, made in methods.plans(absent, calibration, keep=args.keep).items():
        moeopt.export(made.plan, checkpoints[name], model=model)
    whole = sum(p.numel() for p in model.parameters())
    del model, calibration
    sources = {"full": args.model, **checkpoints}
    results = {}
    for name, source in sources.items():
        for how in ("untrained", *args.how.split(",")):
            about = {} if how == "untrained" else training(args, how)

            def make(name: str = name, source: Any = source, how: str = how) -> tuple[Evaluation, dict[str, Any]]:
                model, share = trained(source, tokenizer, rows, args, how)
                size = sum(p.numel() for p in model.parameters()) / whole
                form = json.loads((source / "moeopt.json").read_text())["form"] if name != "full" else ""
                return judge(model, tokenizer, task, args.test_limit), {"form": form, "size": size, "trained": share}

            results[name, how] = legs.get(f"{name}-{how}", about, make)
            print(f"{name}, {how}: {results[name, how].evaluation.loss:.4f}", flush=True)
    losses = {key: leg.evaluation.loss for key, leg in results.items()}
    of = {leg.name: key for key, leg in results.items()}

    def back(leg: Leg) -> str:
        """The share of what pruning cost that training brings back, the full model being trained too."""
        name, how = of[leg.name]
        lost = losses[name, "untrained"] - losses["full", "untrained"]
        left = losses[name, how] - losses["full", how]
        return "" if name == "full" or how == "untrained" or lost <= 0 else f"{1 - left / lost:.0%}"

    compare(
        f"{task.name}: {args.steps} steps of {args.batch} examples; test losses minus those of others, 95% intervals",
        list(results.values()),
        [
            ("- full", lambda leg: results["full", "untrained"]),
            ("- full so trained", lambda leg: results["full", of[leg.name][1]]),
            ("- untrained", lambda leg: results[of[leg.name][0], "untrained"]),
        ],
        [
            ("form", lambda leg: leg.facts["form"]),
            ("size", lambda leg: f"{leg.facts['size']:.0%}"),
            ("trained", lambda leg: f"{leg.facts['trained']:.1%}"),
            ("seconds", lambda leg: f"{leg.facts['seconds']:.0f}"),
            ("back", back),
        ],
    )


def training(args: argparse.Namespace, how: str) -> dict[str, Any]:
    """What decides how a model is trained, JSON."""
    return {
        "steps": args.steps,
        "batch": args.batch,
        "rate": args.lora_rate if how == "lora" else args.rate,
        "optimiser": args.optimiser,
        "rank": args.rank if how == "lora" else None,
    }


def trained(
    source: Any, tokenizer: Any, rows: list[dict[str, list[int]]], args: argparse.Namespace, how: str
) -> tuple[PreTrainedModel, float]:
    """A checkpoint after training, and the share of its numbers that were trained."""
    model, _ = moeopt.load(source, device_map=args.device_map, dtype=args.dtype)
    if how == "untrained":
        return model, 0.0
    settings, subject = training(args, how), model
    model.config.get_text_config().output_router_logits = True  # and with them the load balancing loss
    if how == "lora":
        lora = LoraConfig(
            r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=ATTENTION, target_parameters=EXPERTS
        )
        torch.manual_seed(0)
        subject = get_peft_model(model, lora)
    counts = [p.numel() for p in subject.parameters() if p.requires_grad]
    share = sum(counts) / sum(p.numel() for p in subject.parameters())
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch"],
            learning_rate=settings["rate"],
            lr_scheduler_type="cosine",
            warmup_steps=settings["steps"] // 10,
            optim=settings["optimiser"],
            seed=0,
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, settings["steps"] // 10),
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        if args.checkpointing:
            subject.gradient_checkpointing_enable()
        Trainer(subject, options, train_dataset=rows, data_collator=padded).train()
    if how == "lora":
        model = subject.merge_and_unload()
    model.config.get_text_config().output_router_logits = False
    return model.eval(), share


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of token ids and labels as a batch, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _subject.add_arguments(parser, device_map=None)
    parser.add_argument("--methods", default="reap,hc_smoe", help="one-shot methods, whose plans are exported")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--how", default="plain,lora", help="of plain and lora")
    parser.add_argument("--limit", type=int, help="search examples, to calibrate and to train on; default: all")
    parser.add_argument("--test-limit", type=int, default=300, help="test examples")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="examples a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of plain training")
    parser.add_argument("--lora-rate", type=float, default=1e-3, help="learning rate of LoRA")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument(
        "--optimiser", default="adamw_torch", help="as transformers names it: adafactor and sgd are small"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--out", type=Path, default=Path("fine-tune"))
    parser.add_argument("--small", action="store_true", help="a quick run of everything")
    return parser.parse_args()


if __name__ == "__main__":
    main()
