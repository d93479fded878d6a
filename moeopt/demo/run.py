"""The demo: a guided search on the small model that comes with moeopt, held against what needs no search; exported."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moeopt.demo.result import FULL, RANDOM, REFIT, SEARCH, DemoResult, Entry, view
from moeopt.demo.skills import DEFAULT_SKILL, MODEL
from moeopt.demo.task import skill_task
from moeopt.errors import StudyError
from moeopt.evaluation import Evaluation, Evaluator, paired_bootstrap
from moeopt.exporting import check_folder, export
from moeopt.methods import Calibration, refit
from moeopt.models import Sizes, load
from moeopt.plan import Plan
from moeopt.report.terminal import SearchProgress
from moeopt.samplers.guided import SHARE
from moeopt.samplers.local import RUNGS
from moeopt.spaces import PruneSpace
from moeopt.study import best_trial, create_study, finished, optimize
from moeopt.study.objective import Objective
from moeopt.study.warm_starts import CHOICE
from moeopt.trials.genome import METHOD

KEEP = 2
TRIALS = 150
DRAWS = 20
EXAMPLES = {"search": 96, "test": 250}
WINDOWS = {"search": 24, "test": 96}
"""Examples, and windows of text, that the demo scores of each split."""


def run(
    out_dir: str | Path,
    *,
    skill: str = DEFAULT_SKILL,
    trials: int = TRIALS,
    seed: int = 0,
    storage: str | None = None,
    console: Console | None = None,
    svg: Path | None = None,
    examples: dict[str, int] | None = None,
) -> DemoResult:
    """Search, compare on held-out examples, export and reload; run again, it goes on where it stopped.

    Args:
        out_dir: gets the study (unless `storage` is given) and the exported model.
        skill: one of `moeopt.demo.SKILLS`.
        trials: finished trials of the search, its starts included.
        seed: of the search and of the random prunings; each has its own study.
        storage: an SQLAlchemy URL instead of an SQLite file in `out_dir`.
        console: where progress and table are printed; by default nowhere.
        svg: also write the table as a picture.
        examples: how many to score of ``"search"`` and ``"test"`` (windows for text); a study is bound to the former.

    Raises:
        TaskError: when the skill is unknown.
        StudyError: when `trials` is too small to compare anything.
        ExportError: when `out_dir` holds something else under the exported model's name.
        KeyboardInterrupt: after Ctrl-C, once the running trial is finished.
    """
    started = time.perf_counter()
    console = console or Console(file=io.StringIO())
    task = skill_task(skill)
    if trials <= len(CHOICE):
        raise StudyError(f"the demo needs at least {len(CHOICE) + 1} trials, {len(CHOICE)} to start from, got {trials}")
    out = Path(out_dir)
    folder = out / f"{skill}-{KEEP}-experts"
    name = f"{skill}-8to{KEEP}-guided-seed{seed}"
    if not _is_ours(folder, name):
        check_folder(folder)
    sizes = examples or (WINDOWS if skill == "text" else EXAMPLES)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _one_thread(), _no_bars():
        model, tokenizer = load(MODEL)
        space = PruneSpace.of(model, keep=KEEP)
        objective = Objective(model, tokenizer, task, space, limit=sizes["search"], rungs=RUNGS, guide=SHARE)
        study = create_study(
            name,
            objective=objective,
            storage=storage or f"sqlite:///{out / 'study.db'}",
            sampler="guided",
            pruner="racing",
            seed=seed,
            load_if_exists=True,
            warm_starts="auto",
        )
        console.print(
            f"Skill {skill}: searching {KEEP} of {space.shape.experts} experts in each of "
            f"{space.shape.layers} layers on {sizes['search']} examples, study {study.study_name} in {out}",
            markup=False,
        )
        with SearchProgress(console, trials) as progress:
            optimize(study, objective, n_trials=trials, callbacks=[progress])
        if finished(study) < trials:
            console.print("Interrupted; the same command goes on from here.")
            raise KeyboardInterrupt
        test = Evaluator(model, tokenizer, task, split="test", limit=sizes["test"])
        with console.status(f"scoring on {sizes['test']} held-out examples"):
            full = _entry(FULL, model, None, objective.reference(study).loss, test)
            rng = np.random.default_rng(seed)
            drawn = [space.decode(space.sample(rng)) for _ in range(DRAWS)]
            random = tuple(_entry(RANDOM, model, plan, objective.evaluator.evaluate(plan).loss, test) for plan in drawn)
            starts = [trial for trial in study.get_trials(deepcopy=False) if METHOD in trial.user_attrs]
            one_shot = tuple(_of_trial(trial.user_attrs[METHOD], trial, space, model, test) for trial in starts)
            best = best_trial(study)
            assert best is not None
            search = _of_trial(f"{SEARCH} (trial {best.number})", best, space, model, test)
            calibration = Calibration(model, tokenizer, task, limit=sizes["search"])
            plans = {entry.name: entry.plan for entry in (*one_shot, search)}
            refits = {name: refit(plan, calibration) for name, plan in plans.items() if plan is not None}
            fitted = tuple(
                _entry(f"{start}{REFIT}", model, made.plan, objective.evaluator.evaluate(made.plan).loss, test)
                for start, made in refits.items()
            )
            if _is_ours(folder, name):
                shutil.rmtree(folder)
            made = refits[search.name]
            export(made.plan, folder, model=model, about={**made.about, "study": name, "trial": best.number})
            reloaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
            again = Evaluator(reloaded, tokenizer, task, split="test", limit=sizes["test"]).evaluate()
    others = {FULL: full.test, RANDOM: _mean([entry.test for entry in random])}
    others |= {entry.name: entry.test for entry in (*one_shot, search, *fitted[:-1])}
    result = DemoResult(
        title=f"moeopt demo, skill {skill}: {space.shape.experts} experts to {KEEP}, {finished(study)} trials",
        full=full,
        random=random,
        one_shot=one_shot,
        search=search,
        refits=fitted,
        sizes=sizes,
        differences={name: paired_bootstrap(fitted[-1].test, other) for name, other in others.items()},
        exported=folder,
        reloaded_loss=again.loss,
        seconds=time.perf_counter() - started,
    )
    console.print(view(result))
    console.print(f"\n{folder} holds it; {result.seconds:.0f} s in all.", markup=False, soft_wrap=True)
    if svg is not None:
        picture = Console(record=True, width=110, file=io.StringIO(), highlight=False)
        picture.print(view(result))
        picture.save_svg(str(svg), title="moeopt demo")
    return result


def _is_ours(folder: Path, study_name: str) -> bool:
    """Whether an earlier run of the same demo wrote the folder, which a new one may then replace."""
    try:
        record = json.loads((folder / "moeopt.json").read_text(encoding="utf-8"))
        return bool(record["about"]["study"] == study_name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _of_trial(name: str, trial: FrozenTrial, space: PruneSpace, model: PreTrainedModel, test: Evaluator) -> Entry:
    assert trial.value is not None
    return _entry(name, model, space.plan(trial), trial.value, test)


def _entry(name: str, model: PreTrainedModel, plan: Plan | None, search_loss: float, test: Evaluator) -> Entry:
    sizes = Sizes(model)
    parameters = sizes.under(plan).parameters
    stored = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    share = parameters / sizes.under().parameters
    return Entry(name, plan, search_loss, test.evaluate(plan), parameters, stored * share)


def _mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over plans of each example's loss and correctness, as if one plan had given it."""
    losses, correct = np.stack([[e.losses, e.correct] for e in evaluations]).mean(axis=0)
    return replace(evaluations[0], losses=losses, correct=correct)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The demo's matrices are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
