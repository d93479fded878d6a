"""The profile itself: workers are opened, checked, inspected one after another, and timed in turn."""

from __future__ import annotations

import os
import platform
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt import __version__
from moeopt.plan import Plan
from moeopt.results.profiling.checks import ProfileError, Setting, check, check_length, check_plan
from moeopt.results.profiling.result import LayerLoad, Profile, Row, Speed, largest
from moeopt.results.profiling.workers import Checkpoint
from moeopt.results.steps import Progress, Steps

if TYPE_CHECKING:
    from moeopt.tasks import Task

Source = str | os.PathLike[str]
HEADROOM = 1.25
"""Memory that models must find free to be loaded together, over that of their weights."""
RANDOM_TOKENS = "random token ids"


def profile(
    models: Source | Sequence[Source] | Mapping[str, Source],
    *,
    plans: Mapping[str, Plan] | None = None,
    batch: Sequence[int] = (1, 8),
    prompt_length: Sequence[int] = (256,),
    new_tokens: int = 32,
    repeats: int = 5,
    task: Task | None = None,
    balance_tokens: int = 2048,
    seed: int = 0,
    device_map: str | None = "auto",
    dtype: str = "auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Parameters, memory, speed and load balance of models and plans side by side, as EEP's profile (arXiv 2407.00945).

    Each checkpoint has a process of its own, and one runs at a time. In each repeat every setting is timed on one
    subject after the other, in turning order, so that whatever else the machine does falls on all of them alike; each
    timing follows a short untimed run, and a whole first repeat is thrown away. Models that do not fit into memory
    together are loaded anew, one after the other, in each repeat.

    Args:
        models: checkpoint folders or hub ids, dense ones too; a mapping names them. The first is the one that others
            are held against.
        plans: on the first model, by name.
        batch, prompt_length: every prompt length is timed with every batch size.
        new_tokens: greedy steps of decoding after each prefill, one token a sequence each, on the KV cache.
        repeats: how often each is timed.
        task: prompts are its test examples (else dev, else search), one behind the other, in tokens of the first model.
            None: random token ids.
        balance_tokens: tokens that load balance and active experts are counted on, at most as many as the task gives.
        seed: of random token ids.
        device_map, dtype, experts_implementation, trust_remote_code: as `moeopt.load`.
        threads: of torch; None: its own default.
        progress: called before each step.

    Raises:
        ProfileError: when a number is out of range, a plan does not fit the first model, or a process failed.
        ModelError: when a checkpoint cannot be loaded.
    """
    settings = check(
        batch=batch, prompt_length=prompt_length, new_tokens=new_tokens, repeats=repeats,
        balance_tokens=balance_tokens, threads=threads,
    )  # fmt: skip
    sources = named(models)
    options = {
        "device_map": device_map, "dtype": dtype, "experts_implementation": experts_implementation,
        "trust_remote_code": trust_remote_code, "threads": threads,
    }  # fmt: skip
    show = Steps(progress)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moeopt-"))
        checkpoints = [
            stack.enter_context(closing(Checkpoint(name, str(source), options))) for name, source in sources.items()
        ]
        show.total = len(checkpoints)
        for checkpoint in checkpoints:
            show(f"{checkpoint.name}: reading its config")
            checkpoint.open()
        subjects = _subjects(checkpoints, plans or {}, Path(folder))
        for checkpoint in checkpoints:
            check_length(checkpoint.source, checkpoint.facts["positions"], settings, new_tokens)
        needed = max(balance_tokens, *(setting.batch * setting.prompt_length for setting in settings))
        stream, tokens = _stream(checkpoints, task, needed, seed, trust_remote_code)
        resident = _fit_together(checkpoints)
        runs = [[setting] for setting in settings] if resident else [list(settings)]
        show.total += len(subjects) * (1 + len(runs) * (repeats + resident))

        def ask(subject: _Subject, what: str, **arguments: Any) -> Any:
            for other in checkpoints:
                if not resident and other is not subject.checkpoint:
                    other.close()
            subject.checkpoint.load(stream)
            return subject.checkpoint.ask(what, plan=subject.file, new_tokens=new_tokens, **arguments)

        most = largest(settings)
        for subject in subjects:
            show(f"{subject.name}: memory and load balance")
            subject.measured = ask(
                subject, "inspect", batch=most.batch, prompt_length=most.prompt_length, balance_tokens=balance_tokens
            )
        for repeat in range(0 if resident else 1, repeats + 1):
            for run in runs:
                for subject in reversed(subjects) if repeat % 2 else subjects:  # the last one is loaded already
                    show(f"{subject.name}: " + (f"repeat {repeat} of {repeats}" if repeat else "warming up"))
                    pairs = [(setting.batch, setting.prompt_length) for setting in run]
                    for setting, seconds in zip(run, ask(subject, "time", settings=pairs, rehearse=not resident)):
                        if repeat:
                            subject.seconds.setdefault(setting, []).append(seconds)
        rows = tuple(subject.row() for subject in subjects)
        machine = _machine(checkpoints[0].weights)
    tokens["balance"] = max((load.tokens for row in rows for load in row.loads), default=0)
    return Profile(rows, settings, new_tokens, repeats, resident, tokens, machine)


@dataclass
class _Subject:
    """What becomes a row: a checkpoint, with a plan or without."""

    name: str
    checkpoint: Checkpoint
    plan: Plan | None = None
    file: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: dict[Setting, list[tuple[float, float]]] = field(default_factory=dict)

    def row(self) -> Row:
        facts, weights, measured = self.checkpoint.facts, self.checkpoint.weights, self.measured
        loads = tuple(
            LayerLoad(load["layer"], tuple(load["experts"]), tuple(load["counts"]), load["tokens"])
            for load in measured["loads"]
        )
        planned = None if self.plan is None else tuple(layer.kept_experts for layer in self.plan.layers)
        sizes = {key: measured[key] for key in ("parameters", "active_parameters", "weight_bytes", "peak_bytes")}
        return Row(
            name=self.name,
            source=self.checkpoint.source,
            plan=self.plan,
            experts=planned or tuple(n for n, _ in facts["layers"]),
            **sizes,
            dtype=weights["dtype"],
            devices=tuple(weights["devices"]),
            loads=loads,
            without_loads=None if loads else facts["reason"] or "its routers are not called as modules",
            speeds=tuple(Speed(setting, *zip(*both)) for setting, both in self.seconds.items()),
        )


def named(models: Source | Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    """Checkpoints by name: their own where none is given, with a number where several share it.

    >>> named(["org/small", "out/small", "org/large"])
    {'small': 'org/small', 'small (2)': 'out/small', 'large': 'org/large'}
    """
    if isinstance(models, Mapping):
        given = [(str(name), source) for name, source in models.items()]
    else:
        alone = isinstance(models, (str, os.PathLike))
        sources: Sequence[Any] = [models] if alone else list(models)  # type: ignore[list-item, arg-type]
        given = [(Path(os.path.abspath(source)).name, source) for source in sources]
    if not given:
        raise ProfileError("give at least one checkpoint to profile")
    return unique(given)


def unique(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by name; a name that is taken gets a number."""
    named: dict[str, Any] = {}
    for name, value in given:
        free = (f"{name} ({i})" if i > 1 else name for i in count(1))
        named[next(each for each in free if each not in named)] = value
    return named


def _subjects(checkpoints: Sequence[Checkpoint], plans: Mapping[str, Plan], folder: Path) -> list[_Subject]:
    """The first checkpoint, the plans on it, the other checkpoints."""
    first, *others = [_Subject(checkpoint.name, checkpoint) for checkpoint in checkpoints]
    planned = []
    for i, (name, plan) in enumerate(plans.items()):
        check_plan(name, plan, first.checkpoint.facts["layers"])
        file = str(folder / f"{i}.safetensors")
        plan.save(file)
        planned.append(_Subject(name, first.checkpoint, plan, file))
    subjects = [first, *planned, *others]
    for subject, name in zip(subjects, unique((subject.name, None) for subject in subjects)):
        subject.name = name
    return subjects


def _stream(
    checkpoints: Sequence[Checkpoint], task: Task | None, needed: int, seed: int, trust_remote_code: bool
) -> tuple[list[int], dict[str, Any]]:
    """Token ids for prompts and load balance, and what they are."""
    vocabulary = min(checkpoint.facts["vocabulary"] for checkpoint in checkpoints)
    if task is None:
        drawn = random.Random(seed).choices(range(vocabulary), k=needed)
        return drawn, {"kind": RANDOM_TOKENS, "seed": seed, "vocabulary": vocabulary}
    from moeopt.models import load_tokenizer

    tokenizer = load_tokenizer(checkpoints[0].source, trust_remote_code=trust_remote_code)
    split = task.splits[-1]
    ids: list[int] = []
    for request in task.requests(split, tokenizer, limit=needed):
        if request.option == 0 and len(ids) < needed:
            ids += request.ids
    if max(ids) >= vocabulary:
        raise ProfileError(
            f"token {max(ids)} of {checkpoints[0].source!r} is none of the {vocabulary} of the smallest vocabulary; "
            "profile models of different tokenizers on random token ids"
        )
    return ids[:needed], {"kind": "task", "task": task.describe(), "split": split}


def _fit_together(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether all weights find memory at the same time."""
    free = min(checkpoint.facts["free_bytes"] for checkpoint in checkpoints)
    return len(checkpoints) == 1 or HEADROOM * sum(checkpoint.facts["bytes"] for checkpoint in checkpoints) <= free


def _machine(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What ran it, as far as speed depends on it."""
    facts = ("threads", "device_names", "experts_implementation", "peak_from", "torch")
    return {
        **{key: weights[key] for key in facts},
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "moeopt": __version__,
    }
