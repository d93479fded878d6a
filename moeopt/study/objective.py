"""The objective of a search: trial -> plan -> loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray

from moeopt.errors import NonFiniteLossError, StudyError, without_storage
from moeopt.evaluation import Evaluation, Evaluator, NoiseFloor, noise_floor
from moeopt.evaluation.checks import check_parts
from moeopt.evaluation.memory import ran_out
from moeopt.models import MergedWeights, describe
from moeopt.samplers import racing
from moeopt.spaces import Space
from moeopt.study import recipe
from moeopt.study.checks import check_options, check_space, warn_of_too_little
from moeopt.study.goals import Goals
from moeopt.study.guards import Guard, Guards, Judged
from moeopt.study.guides import Guides
from moeopt.study.reference import FullModel, Reference
from moeopt.study.scores import COPIED_FROM, FINISHED, active_experts, evaluated_before, packed, penalty
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.objectives import LOSS, PREFIX, Direction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeopt.evaluation import Compression
    from moeopt.evaluation.evaluator import Score
    from moeopt.tasks import Task

Report = Literal["mean", "block"]

SPENT = "spent"
BACKENDS = {"attention": "attn", "experts": "experts"}


class Objective:
    """`objective(trial)`: the task loss of the trial's plan, or several numbers of it; works with any `study.optimize`.

    With several `objectives` it gives a tuple, in their order, to studies of as many `directions`
    (``optuna.create_study(directions=objective.directions)``); `moeopt.create_study` makes such a study. Constraints
    are Optuna's: numbers by name that are at most 0 where they hold (`FrozenTrial.constraints`), of which every trial
    is told; samplers prefer what keeps them.

    With `active_weight` it is the task loss plus so much for every expert that a token runs in an MoE layer, on
    average: without it, an `ActiveSpace` would be searched for as many active experts as may be.

    Every trial keeps, as user attributes, `accuracy` (0 to 1), `active` (the mean number of experts that a token ran in
    an MoE layer, see `Evaluation`), `seconds`, `tokens` (non-padding tokens run), `layer_tokens` (decoder layers that
    they went through, summed: what the trial cost), `operator`, `phase` and
    `parents` where the sampler names them, `spent` (the layer-tokens of the study when it ended, its own included and
    those of its reference: the axis on which studies of one task compare), and `drift` (mean absolute distance of the
    genotype from the start); the scores of every example are packed in a system attribute.

    With several `rungs` the trial is raced: after each rung but the last it reports its loss so far, with the number of
    examples as step, and any pruner of Optuna may end it. A pruned trial keeps, as `estimate`, what its loss over all
    examples would be: the incumbent's plus the mean paired difference so far, which moeopt's samplers read.

    Before its first trial of a study it scores the full model, unless the study holds that already (`reference`).

    No plan is evaluated twice: what a finished trial of the study, of whichever worker, knows of the plan on the same
    examples is taken from it (`copied_from`), at no cost. A plan whose loss is NaN or infinite, or that runs out of
    memory, makes the trial fail, with the reason in `failure`; the search goes on.

    Args:
        model, tokenizer: the full model, as `moeopt.load` returns them. Its parameters are never changed.
        task: what to score.
        space: what to search; for a model of the same shape.
        split: ``"search"`` unless you know better; ``"dev"`` and ``"test"`` are for afterwards.
        limit: use only so many examples (text: windows), the same ones every time.
        batch_tokens: padded tokens a forward pass. None: as for `Evaluator`; studies keep the number, and whoever goes
            on with one takes it from there (1,024 where an older one holds none).
        max_length: tokens a sequence may have; longer prompts lose their beginning.
        rungs: how often a trial may be stopped, the end included; 1: never.
        report: ``"mean"``: rungs grow by 2, and what is reported is the mean so far, for `moeopt.RacingPruner`,
            Hyperband and the like; ``"block"``: rungs are equal blocks, and what is reported is the block's own mean,
            as Optuna's `WilcoxonPruner` takes it (some 20 blocks suit it).
        active_weight: what one more active expert per token and layer must gain in loss; at least 0.
        prefix_memory, prefix_device, merged_weights, score, compression: as for `Evaluator`.
        reference: whether a study gets the full model's scores, for one evaluation.
        objectives: what is optimised, names of `moeopt.trials.objectives`: ``"loss"``, ``"metric"`` (the accuracy),
            ``"bytes"`` of the exported checkpoint, ``"active"`` experts a token runs, ``"latency"``; of a mixture
            ``"worst"``, its worst member's loss over the full model's, and ``"loss:NAME"`` and ``"metric:NAME"``.
        constraints: bounds of any of these, as ``"bytes <= 24GB"`` or ``"metric >= 0.8"``.
        guards: tasks on which a plan may lose only so much to the full model (`moeopt.Guard`): constraints as well,
            ``guard:NAME``. What they cost counts in a trial's `layer_tokens`; one that is raced and stopped has none.
        guide: the largest share of the study's layer-tokens that guides may take, the first one aside, where trials
            are counted as if they reused nothing; 0: there are none. After a trial the objective may leave, packed,
            what each expert taken out of the best pruning so far, or back in, would change of the loss
            (`moeopt.trials.guide`), which the sampler ``"guided"`` reads. The trial's `layer_tokens` count it, and its
            `guide_layer_tokens` say how many of them it was.

    Warns:
        UserWarning: when the task has no dev or no test split, or fewer distinct examples than `limit`.

    Raises:
        SpaceError: when the space is none, or for a model of another shape, or has plans that the model does not take;
            the message says why, and what it takes.
        TaskError, ModelError: as `Evaluator`.
        StudyError: when `rungs`, `report`, `active_weight` or `guide` is out of range, guides cannot be made, or an
            objective or constraint is none, or not one of this task.
    """

    @without_storage
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        space: Space,
        *,
        split: str = "search",
        limit: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        rungs: int = 1,
        report: Report = "mean",
        active_weight: float = 0.0,
        prefix_memory: int | None = None,
        prefix_device: str | None = None,
        merged_weights: MergedWeights = "auto",
        score: Score = "likelihood",
        compression: Compression | None = None,
        reference: bool = True,
        guide: float = 0.0,
        objectives: Sequence[str] = (LOSS,),
        constraints: Sequence[str] = (),
        guards: Sequence[Guard] = (),
    ) -> None:
        check_parts(model, tokenizer, task)
        check_space(space, model)
        check_options(rungs=rungs, report=report, active_weight=active_weight, guide=guide)
        self.active_weight, self.guide = float(active_weight), float(guide)
        self.model, self.tokenizer, self.task, self.space, self.split = model, tokenizer, task, space, split
        self.report: Report = report
        sizes = racing.rung_sizes if report == "mean" else racing.blocks
        self.evaluator = Evaluator(
            model, tokenizer, task, split=split, limit=limit, batch_tokens=batch_tokens, max_length=max_length,
            rungs=lambda examples: sizes(examples, rungs), prefix_memory=prefix_memory, prefix_device=prefix_device,
            merged_weights=merged_weights, score=score, compression=compression,
        )  # fmt: skip
        if not task.recorded:
            warn_of_too_little(task, split, limit, self.evaluator.examples)
        self.goals = Goals(self.evaluator, objectives, constraints, self.active_weight)
        if self.goals.needs_reference and not reference:
            raise StudyError("objective 'worst' is relative to the full model: it needs reference=True")
        self._full_model = FullModel(self.evaluator, self.active_weight, wanted=reference)
        self._checked: tuple[Callable[[], optuna.Study | None], object, object] = (lambda: None, None, None)
        self._limits: dict[str, Any] = {"split": split, "limit": limit, "max_length": max_length}
        self.settings: dict[str, Any] = {
            **self._limits, "batch_tokens": self.evaluator.batch_tokens, "rungs": rungs, "report": report,
            "active_weight": self.active_weight, "prefix_memory": prefix_memory, "score": score,
        }  # fmt: skip
        if compression is not None:
            self.settings |= {"top_p": compression.top_p, "memory": compression.memory}
        if not reference:
            self.settings["reference"] = False
        self.settings |= self.goals.settings
        self.guards = Guards(
            guards, model, tokenizer, cache=self.evaluator.passes.cache, batch_tokens=self.evaluator.batch_tokens,
            max_length=max_length, prefix_memory=prefix_memory, prefix_device=prefix_device,
            merged_weights=merged_weights,
        )  # fmt: skip
        self._measured = batch_tokens is None
        self._guides: Guides | None = None
        for extreme in space.extremes() if self.goals.quantities else ():
            self.goals.early(extreme)  # what cannot be told of plans is found out now
        if guide:
            if LOSS not in self.objectives:
                raise StudyError(f"guides are derivatives of the loss, which is none of {', '.join(self.objectives)}")
            self.settings["guide"] = self.guide
            self._guides = Guides(self.evaluator, space, self._full_model.scores_name, self.guide)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Their names, in the order of trials' values."""
        return self.goals.objectives

    @property
    def directions(self) -> list[Direction]:
        """Whether each is minimised or maximised, as `optuna.create_study` takes it."""
        return self.goals.directions

    def __call__(self, trial: optuna.trial.BaseTrial) -> float | tuple[float, ...]:
        """The loss of the trial's plan, active experts weighed in, or a number for each objective; NaN without one.

        Raises:
            StudyError: when the study has other directions, or does not go on as it was made (`check`); the trial has
                failed, and is run again once the study does.
            optuna.TrialPruned: when the study's pruner says so.
        """
        study = getattr(trial, "study", None)
        if study is not None and [each.name.lower() for each in study.directions] != self.directions:
            raise StudyError(
                f"the objective gives {', '.join(self.objectives)}: create the study with "
                + (f"directions={self.directions}" if len(self.objectives) > 1 else f"direction={self.directions[0]!r}")
            )
        if study is not None:
            try:
                self.check(study)
            except StudyError as error:
                trial.set_user_attr(genome.INTERRUPTED, True)
                trial.set_user_attr(genome.FAILURE, str(error))
                raise
        try:
            return self._evaluate(trial, study)
        except KeyboardInterrupt:
            trial.set_user_attr(genome.INTERRUPTED, True)
            raise
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr(genome.FAILURE, f"{type(error).__name__}: {error!s:.500}")
            raise

    def check(self, study: optuna.Study) -> None:
        """Raise StudyError, naming what differs, unless a study goes on as it was made: this objective, its sampler
        and its pruner. A study of plain `optuna.create_study` notes its sampler, and is held against that from then on.
        """
        checked, sampler, pruner = self._checked
        if checked() is study and sampler is study.sampler and pruner is study.pruner:
            return
        from moeopt.study import check_goes_on

        check_goes_on(study, self)
        self.go_on_as(study)
        self._checked = weakref.ref(study), study.sampler, study.pruner

    def go_on_as(self, study: optuna.Study, otherwise: int | None = None) -> None:
        """Run as many tokens a forward pass as a study does, or `otherwise`, unless it is given how many.

        Kernels round otherwise in batches of another shape: what a study compares is computed alike.
        """
        recorded = recipe.stored(study) if self._measured else None
        batch_tokens = recorded.objective.get("batch_tokens") if recorded else otherwise
        if self._measured and batch_tokens:
            self.settings["batch_tokens"] = batch_tokens
            self.evaluator.passes.repack(batch_tokens)
            self.guards.repack(batch_tokens)

    def _evaluate(self, trial: optuna.trial.BaseTrial, study: optuna.Study | None) -> float | tuple[float, ...]:
        if study is not None:
            self._full_model.begin(study)
        if self.goals.latency is not None:
            self.goals.latency.begin(study)
        self.guards.begin(study)
        started = self.evaluator.clock()
        x = self.space.vector(trial)
        plan = self.space.decode(x)
        facts = _facts(genome.origin(attributes.frozen_trial(trial)))
        attrs: dict[str, Any] = {}
        early = self.goals.early(plan)
        evaluation: Evaluation | None = None
        pruned, examples, name = False, self.evaluator.examples, self._full_model.scores_name
        try:
            earlier = None if study is None else evaluated_before(study, trial, plan, name, facts)
            for evaluation in self.evaluator.race(plan, earlier):
                attrs = packed(evaluation, name, self.active_weight)
                n = len(evaluation.losses)
                if len(self.evaluator.rungs) > 1:
                    if study is not None and n < examples:
                        attributes.write(study, trial, attrs)  # for the pruner
                    finished = n == examples or (earlier is not None and len(earlier.losses) == examples)
                    if self._is_beaten(trial, study, evaluation, early, finished):
                        pruned = True
                        break
            guarded = Judged() if pruned else self.guards.judge(plan, study, facts.get(COPIED_FROM))
        except (NonFiniteLossError, RuntimeError, MemoryError) as error:
            finite = not isinstance(error, NonFiniteLossError)
            if finite and not ran_out(error):
                raise
            attrs = {} if finite else {genome.NOT_FINITE: name}
            self._note(study, trial, attrs, facts | {genome.FAILURE: str(error).partition("\n")[0]})
            return self.goals.values(dict.fromkeys(self.objectives, float("nan")))
        assert evaluation is not None
        loss = evaluation.loss + penalty(self.active_weight, evaluation)
        facts |= {
            "accuracy": evaluation.accuracy,
            "active": active_experts(evaluation),
            "seconds": round(self.evaluator.clock() - started, 4),
            "tokens": evaluation.tokens + guarded.tokens,
            "layer_tokens": evaluation.layer_tokens + guarded.layer_tokens,
            "drift": round(self.space.drift(x), 6),
        }
        reference = self._reference_scores(study) if self.goals.needs_reference and not pruned else None
        numbers = early if pruned else self.goals.numbers(plan, evaluation, reference)
        facts |= {name: numbers[name] for name in self.goals.quantities if name in numbers}
        attrs |= self.goals.constraint_attributes(numbers) | guarded.attrs
        if pruned:
            facts[genome.ESTIMATE] = self._estimate(study, evaluation, early)
        elif study is not None and self._guides is not None:
            feasible = all(value <= 0 for key, value in attrs.items() if key.startswith(PREFIX))
            attrs |= self._guides.next(study, plan, loss if feasible else math.inf, facts)
        self._note(study, trial, attrs, facts)
        if pruned:
            raise optuna.TrialPruned
        return self.goals.values(numbers)

    def reference(self, study: optuna.Study) -> Reference:
        """The full model's scores on the objective's examples: those that the study holds, or made here and kept there.

        Raises:
            NonFiniteLossError: when its loss is not finite.
            OutOfMemoryError: when a single sequence does not fit.
            StudyError, StorageError: when what the study holds is damaged.
        """
        return self._full_model.reference(study)

    def _note(
        self, study: optuna.Study | None, trial: optuna.trial.BaseTrial, attrs: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        if study is not None:
            ended = study.get_trials(deepcopy=False, states=FINISHED)
            costs = [trial.user_attrs.get("layer_tokens") for trial in ended] + [facts.get("layer_tokens")]
            references = self._full_model.layer_tokens + self.guards.layer_tokens
            spent = references + sum(cost for cost in costs if isinstance(cost, int))
            attributes.write(study, trial, attrs, facts | {SPENT: spent})
            return
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        for key, value in attrs.items():
            if key.startswith(PREFIX):
                trial.set_constraint(key.removeprefix(PREFIX), value)

    def _reference_scores(self, study: optuna.Study | None) -> NDArray[np.float32] | None:
        """The full model's scores, (3, examples)."""
        return self.evaluator.full_model().scores if study is None else self._full_model.reference(study).scores

    def _is_beaten(
        self,
        trial: optuna.trial.BaseTrial,
        study: optuna.Study | None,
        evaluation: Evaluation,
        early: Mapping[str, float],
        finished: bool,
    ) -> bool:
        """Whether a trial is to end here. What there is so far is reported, where Optuna lets a trial report."""
        if len(self.objectives) == 1:
            if self.objectives == (LOSS,):
                self._report(trial, evaluation)
                return not finished and trial.should_prune()
            return False
        pruner = None if study is None else study.pruner
        if finished or study is None or not isinstance(pruner, racing.RacingPruner) or not self.goals.races:
            return False
        values = [early.get(name) for name in self.objectives]
        return pruner.dominated(study, attributes.frozen_trial(trial), self.evaluator.rungs, values)

    def _report(self, trial: optuna.trial.BaseTrial, evaluation: Evaluation) -> None:
        n, rungs = len(evaluation.losses), self.evaluator.rungs
        first = ([0, *rungs])[rungs.index(n)] if self.report == "block" else 0
        losses, weights = evaluation.losses[first:].astype(np.float64), evaluation.weights[first:]
        trial.report(float(np.average(losses, weights=weights)) + penalty(self.active_weight, evaluation), n)

    def _estimate(
        self, study: optuna.Study | None, evaluation: Evaluation, early: Mapping[str, float]
    ) -> float | list[float]:
        """What a pruned trial would give over all examples."""
        values = [early.get(name) for name in self.objectives]
        best = None
        if study is not None:
            best = racing.incumbent(study, evaluation.scores, self._full_model.scores_name, values)
        reference = None if best is None else genome.read_scores(best)
        loss = evaluation.loss if reference is None else racing.honest_estimate(evaluation.scores, reference)
        loss += penalty(self.active_weight, evaluation)
        estimates = [loss if value is None else value for value in values]
        return estimates if len(estimates) > 1 else loss

    def noise_floor(self) -> NoiseFloor:
        """How much the full model's loss on the first rung moves with experts backend and batch size.

        Where losses are distances from the full model, it is that of the space's start.
        """
        teacher = self.evaluator.teacher
        return noise_floor(
            self.model, self.tokenizer, self.task, score=self.evaluator.score,
            plan=None if teacher is None else self.space.decode(self.space.start()),
            compression=None if teacher is None else teacher.compression, batch_tokens=self.evaluator.batch_tokens,
            **self._limits | {"limit": self.evaluator.rungs[0]},
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Model, task, space and evaluation as JSON: what a study must agree on to be resumed."""
        config = self.model.config
        backends = {kind: getattr(config, f"_{key}_implementation", None) for kind, key in BACKENDS.items()}
        score: dict[str, Any] = {"score": self.evaluator.score} if self.evaluator.score != "likelihood" else {}
        if self.evaluator.teacher is not None:
            score |= {"top_p": self.evaluator.teacher.compression.top_p, "kept_tokens": self.evaluator.teacher.most}
        weight = {"active_weight": self.active_weight} if self.active_weight else {}
        weight |= {"guide": self.guide} if self.guide else {}
        return {
            "model": describe(self.model),
            "task": {**self.task.describe(), **self._limits},
            "space": self.space.describe(),
            "evaluation": {
                "rungs": list(self.evaluator.rungs),
                "report": self.report,
                **backends,
                **score,
                **weight,
                **self.goals.describe(),
                **self.guards.describe(),
            },
        }


def _facts(origin: dict[str, Any]) -> dict[str, Any]:
    facts = {key: origin[key] for key in ("operator", "phase") if origin.get(key) is not None}
    if origin.get("parents"):
        facts["parents"] = origin["parents"]
    return facts
