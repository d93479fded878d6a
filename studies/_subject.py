"""The model and the task that a study is about, as its command line says them: by default the demo's."""

from __future__ import annotations

import argparse
import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moeopt
from moeopt.tasks import Task


def add_arguments(parser: argparse.ArgumentParser, *, device_map: str | None = "auto") -> None:
    """The arguments that `load` reads."""
    parser.add_argument("--model", default=str(moeopt.demo.MODEL), help="folder or hub name; default: the demo model")
    parser.add_argument("--device-map", default=device_map, help='"auto" spreads the model over devices')
    parser.add_argument("--dtype", default="auto", help="of the weights; default: the checkpoint's")
    parser.add_argument("--skill", default=moeopt.demo.DEFAULT_SKILL, help="of the demo model, where no task is given")
    parser.add_argument("--task")
    parser.add_argument("--data", help="file or folder of the task")
    parser.add_argument("--task-options", default="{}", help='JSON, such as {"suffixes": [".py"]}')


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """Model, tokenizer and task."""
    model, tokenizer = moeopt.load(args.model, device_map=args.device_map, dtype=args.dtype)
    if args.task is None:
        return model, tokenizer, moeopt.demo.skill_task(args.skill)
    return model, tokenizer, moeopt.tasks.get(args.task, data=args.data, **json.loads(args.task_options))
