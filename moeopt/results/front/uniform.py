"""The best plan that servers read which ask for one number of experts in all layers, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import NonFiniteLossError, StudyError
from moeopt.results.front.checks import METHODS, TOP, check_arguments
from moeopt.results.steps import Progress, Steps
from moeopt.showing import line
from moeopt.statistics import Interval, paired_bootstrap

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

    from moeopt.plan import Plan
    from moeopt.results.front.judging import Judging
    from moeopt.results.selection.candidates import TrialSizes
    from moeopt.spaces import Space
    from moeopt.study.guards import Guarded
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task

LARGEST = 2
"""Of every one-shot method, so many of the largest numbers of experts that fit are judged."""


@dataclass(frozen=True, eq=False)
class Uniform:
    """A plan of one r and k in all layers, without skipping, in place of a chosen one.

    Args:
        name: where it is from.
        plan: it.
        chosen: number of the trial that it stands in for.
        bytes, chosen_bytes: of the weights of both as checkpoints.
        against_chosen, against_full: its loss on dev, less that of the chosen plan, and less the full model's; paired.
        examples: of dev.
        candidates: how many were judged.
        guards: the plan on the study's guards on dev; of those judged one that breaks none is taken, if there is one.
    """

    name: str
    plan: Plan = field(repr=False)
    chosen: int
    bytes: float
    chosen_bytes: float
    against_chosen: Interval
    against_full: Interval
    examples: int
    candidates: int
    guards: tuple[Guarded, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What it is, and what it costs."""
        return [
            f"uniform plan: {line(self.name, 80)}, {self.plan.layers[0].kept_experts} experts in every layer, "
            f"the best of {self.candidates} on {self.examples:,} dev examples",
            f"uniform - chosen (trial {self.chosen}): {self.bytes - self.chosen_bytes:+,.0f} bytes, loss on dev "
            f"{self.against_chosen}; uniform - full model: {self.against_full}",
            *map(str, self.guards),
        ]


def uniform_of(
    study: optuna.Study,
    chosen: FrozenTrial,
    model: PreTrainedModel | Objective,
    tokenizer: Any = None,
    task: Task | None = None,
    *,
    fit: int | str | None = None,
    methods: Sequence[str] = METHODS,
    dev_limit: int | None = None,
    top: int = TOP,
    serve_on: str | Sequence[str] = (),
    serve_parallel: int = 1,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Uniform:
    """The plan of least loss on dev among those that an ordinary checkpoint holds and that are no larger.

    Candidates are trials of the study, the chosen plan with one number of experts in all layers where its space has
    that, and uniform plans of one-shot methods (the largest that fit). What the study knows of them is not run again.

    Args:
        study, model, tokenizer, task, dev_limit, batch_tokens, progress: as for `front_of`.
        chosen: what it stands in for: a trial of the study.
        fit: bytes that it may have; None: as many as the chosen plan.
        methods: one-shot methods that prune.
        top: trials that are judged at most, the best on search.
        serve_on, serve_parallel: what is refused by these servers is no candidate (`moeopt.spaces.demands`).

    Raises:
        StudyError: as `front_of`, or when nothing that fits is uniform.
        NonFiniteLossError: when the chosen plan or the full model has no finite loss on dev.
    """
    check_arguments(methods, top=top, dev_limit=dev_limit, batch_tokens=batch_tokens)
    from moeopt.exporting import why_not_stock
    from moeopt.models import without_plan
    from moeopt.results.front.judging import Judging
    from moeopt.results.selection.candidates import TrialSizes, ranked_trials
    from moeopt.spaces.serving import check_servers, demands
    from moeopt.study.guards import broken
    from moeopt.trials.objectives import size_of

    servers = check_servers(serve_on, serve_parallel)
    judging = Judging(study, model, tokenizer, task, dev_limit, batch_tokens)
    space, config = judging.space, judging.model.config.to_dict()
    with without_plan(judging.model):
        sizes = TrialSizes(study, judging.model)
        chosen_plan = space.plan(chosen)
        chosen_bytes = sizes(chosen, chosen_plan)
        most = int(chosen_bytes) if fit is None else size_of(fit)
        candidates: dict[str, tuple[str, Plan, float]] = {}
        for each in ranked_trials(study, top, True, sizes, most, np.nan):
            candidates[each.plan.fingerprint] = (f"trial {each.trial.number}", each.plan, sizes(each.trial, each.plan))
        for name, plan in (*_levelled(space, chosen, sizes, most), *_one_shot(judging, methods, sizes, most)):
            candidates.setdefault(plan.fingerprint, (name, plan, sizes.of_plan(plan)))
        servable = [
            (name, plan, size)
            for name, plan, size in candidates.values()
            if why_not_stock(plan) is None
            and not (servers and any(d.refused for d in demands(plan, servers, serve_parallel, config)))
        ]
        if not servable:
            raise StudyError(f"no plan of at most {most:,} bytes keeps the same number of experts in every layer")
        steps = Steps(progress, len(servable) + 2)
        steps("full model: dev")
        full = judging.evaluators.evaluate(None, "dev")
        steps(f"trial {chosen.number}: dev")
        reference = judging.evaluators.evaluate(chosen_plan, "dev")
        judged = []
        for name, plan, size in servable:
            steps(f"{name}: dev")
            try:
                judged.append((judging.evaluators.evaluate(plan, "dev"), name, plan, size))
            except NonFiniteLossError:
                continue
        if not judged:
            raise NonFiniteLossError("no uniform plan has a finite loss on dev", layer=None)
        judged.sort(key=lambda each: (each[0].loss, each[3], each[1]))
        best = next((each for each in judged if not broken(judging.guards(each[2], "dev"))), judged[0])
        guards = tuple(judging.guards(best[2], "dev"))
    steps.finish()
    evaluation, name, plan, size = best
    return Uniform(
        name, plan, chosen.number, size, chosen_bytes, paired_bootstrap(evaluation, reference),
        paired_bootstrap(evaluation, full), len(full.losses), len(judged), guards,
    )  # fmt: skip


def _levelled(space: Space, chosen: FrozenTrial, sizes: TrialSizes, most: int) -> Iterator[tuple[str, Plan]]:
    """A trial's plan with one number of experts in all layers, the largest that fits; its spare experts come back."""
    if space.keep_range is None:
        return
    x = space.vector(chosen)
    for keep in range(space.keep_range.high, space.keep_range.low - 1, -1):
        plan = space.decode(space.with_counts(x, keep)).with_skip(0)
        if len({layer.kept_experts for layer in plan.layers}) == 1 and sizes.of_plan(plan) <= most:
            yield f"trial {chosen.number} with {plan.layers[0].kept_experts} experts everywhere", plan
            return


def _one_shot(judging: Judging, methods: Sequence[str], sizes: TrialSizes, most: int) -> Iterator[tuple[str, Plan]]:
    from moeopt.plan import Plan
    from moeopt.results.front.one_shot import one_shot_name, uniform_keeps

    shape = judging.space.shape
    fitting = [
        keep
        for keep in uniform_keeps(judging.space, most=None)
        if sizes.of_plan(Plan.one_hot([range(keep)] * shape.layers, experts=shape.experts, k=judging.space.k)) <= most
    ]
    plans, _ = judging.one_shot_plans(methods, fitting[-LARGEST:])
    for (method, keep), plan in plans.items():
        yield one_shot_name(method, keep, shape.experts), plan
