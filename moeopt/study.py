"""Studies: create, resume, reclaim, run."""

from __future__ import annotations

import math
import numbers
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from moeopt import __version__, genome, process, recipe, samplers
from moeopt.defaults import DEFAULT_STORAGE
from moeopt.description import DESCRIPTION as DESCRIPTION
from moeopt.description import FORMAT, check_whole, described, reading
from moeopt.errors import SpaceError, StorageError, StudyError
from moeopt.genome import CALIBRATION as CALIBRATION
from moeopt.genome import METHOD as METHOD
from moeopt.genome import WARM_START as WARM_START
from moeopt.plan import Plan
from moeopt.racing import NOISE_FLOOR, RacingPruner
from moeopt.samplers.shadow import describe
from moeopt.showing import line, shown
from moeopt.spaces import Space, from_description
from moeopt.storage import hidden, open_storage, readable_errors, study_names
from moeopt.storage.rows import NoSlotLeft

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from torch import nn

    from moeopt.methods import Found
    from moeopt.objective import Objective
    from moeopt.samplers import GenomeSampler
    from moeopt.tasks import Task

COMMAND = "command"
"""User attribute of a study that `moeopt search` made: the command, without its storage's password."""
MAY_DIFFER = ("version", "format", "model.name_or_path")
"""Fields of the description that a resumed study need not share: the same weights may lie elsewhere."""
LONGEST_LOOK = 1.0
"""Seconds between two looks for a trial to start, while others run elsewhere."""

Callback = Callable[[optuna.Study, FrozenTrial], None]
WarmStarts = Iterable["Plan | str"] | Mapping[str, "Plan | Found"]


def create_study(
    study_name: str | None = None,
    *,
    objective: Objective,
    storage: str | BaseStorage | None = DEFAULT_STORAGE,
    sampler: str | BaseSampler = "eep",
    seed: int = 0,
    pruner: str | BasePruner | None = None,
    load_if_exists: bool = False,
    warm_starts: WarmStarts = (),
    **sampler_options: Any,
) -> optuna.Study:
    """Create a study for an objective, or resume it: an ordinary `optuna.Study` that minimises the task loss.

    Args:
        study_name: its name in the storage; Optuna makes one up by default.
        objective: what is minimised; the study keeps a description of its model, task and space.
        storage: an SQLAlchemy URL (SQLite, PostgreSQL, MySQL/MariaDB), an Optuna storage, or None for memory.
        sampler: ``"eep"``, ``"cmaes"``, ``"tpe"``, ``"random"``, ``"nevergrad:NAME"``, or any Optuna sampler.
        seed: of the sampler, where it is given by name.
        pruner: ``"racing"`` (`RacingPruner`), any Optuna pruner, or None; one that prunes needs an objective with
            `rungs`. For racing, the noise floor is measured first, on the first rung.
        load_if_exists: resume a study of this name. Trials that died with a worker of this host are queued again.
        warm_starts: what to evaluate next, unless the study did so before: plans, names of `moeopt.methods`, which are
            then calibrated on the objective's examples, or what methods found, by name. Such trials have their
            method's name as user attribute ``method``. EEP counts them among its initial solutions.
        sampler_options: hyperparameters of a sampler given by name.

    Raises:
        StudyError: when the name is taken (and `load_if_exists` is not set), or the study to resume was made with
            another model, task, space, sampler or pruner; the message names the fields that differ. Also when the
            pruner is unknown, or the objective has a single rung.
        StorageError: when the storage cannot be opened or is not Optuna's.
        SamplerError: when the sampler is unknown or its options are.
        MethodError: when a method is unknown.
        SpaceError: when a warm start is not a plan of the objective's space.
    """
    chosen = samplers.get(sampler, objective.space, seed=seed, **sampler_options)
    starts = _warm_starts(warm_starts, objective.space)
    opened = open_storage(storage) if isinstance(storage, str) else storage
    racer = _pruner(pruner, objective)
    description = description_of(objective, chosen, racer)
    with readable_errors(storage):
        existing = _find(opened, study_name)
        if existing is not None:
            if not load_if_exists:
                raise StudyError(
                    f"study {study_name!r} already exists; resume it with load_if_exists=True, or choose another name"
                )
            check_same(existing, description)
    held = [] if existing is None else [trial.user_attrs for trial in existing.get_trials(deepcopy=False)]
    found = _calibrated(starts, objective, held)
    with readable_errors(storage):
        study = optuna.create_study(
            study_name=study_name,
            storage=opened,
            sampler=chosen,
            pruner=racer,
            direction="minimize",
            load_if_exists=load_if_exists,
        )
        if DESCRIPTION not in study.user_attrs:
            study.set_user_attr(DESCRIPTION, {"version": __version__, "format": FORMAT, **description})
            for key, value in summary(description).items():
                study.set_user_attr(key, value)
        if isinstance(racer, RacingPruner) and racer.noise_floor is None and NOISE_FLOOR not in study.user_attrs:
            study.set_user_attr(NOISE_FLOOR, objective.noise_floor().value)
        if opened is not None:
            recipe.write(study, objective, chosen, racer)
        _enqueue_new(study, objective.space, found, held)
        reclaim(study)
    return study


def summary(description: dict[str, Any]) -> dict[str, str | int]:
    """What tells studies apart, one user attribute each, for tables that cut the description short."""
    sampler, space, model = description["sampler"], description["space"], description["model"]
    seed = {"seed": sampler["seed"]} if isinstance(sampler.get("seed"), int) else {}
    return {
        "optimiser": str(sampler.get("name")),
        **seed,
        "task": str(description["task"].get("name")),
        "model": str(model.get("name_or_path")),
        "space": f"{space['kind']}, {space['keep']} of {space['shape']['experts']} experts"
        if "keep" in space
        else str(space["kind"]),
    }


def _warm_starts(given: WarmStarts, space: Space) -> list[tuple[str | None, Plan | Found | None]]:
    """Method and plan of every warm start, checked; a method that has yet to be run comes without a plan."""
    if isinstance(given, Mapping):
        starts: list[tuple[str | None, Plan | Found | None]] = list(given.items())
    else:
        starts = [(start, None) if isinstance(start, str) else (None, start) for start in given]
    for name, found in starts:
        if found is not None:
            space.encode(found if isinstance(found, Plan) else found.plan)
        else:
            assert name is not None
            check_expressible(name, space)
    return starts


def check_expressible(method: str, space: Space) -> None:
    """Raise MethodError for an unknown method, SpaceError for one whose plans the space does not hold."""
    from moeopt.methods.names import PROGRESSIVE, ROUTERS, check

    check(method)
    router = ROUTERS[method]
    if router == "alias":
        raise SpaceError(
            f"{method} aliases what the router picks, which no search space expresses; start from {method}_summed"
        )
    if router == "prob" and (space.router != "prob" or "merge" not in space.phases):
        raise SpaceError(f"{method} maps probabilities, which this space does not; search an EEPSpace(router='prob')")
    if method in PROGRESSIVE and len(space.groups) < space.shape.layers:
        raise SpaceError(f"{method} goes layer by layer, but layers share a choice in this space's groups")


def _calibrated(
    starts: list[tuple[str | None, Plan | Found | None]], objective: Objective, held: list[dict[str, Any]]
) -> list[tuple[str | None, Plan | Found]]:
    """The warm starts with their plans; methods that the study already ran are left out."""
    run = {attrs.get(METHOD) for attrs in held}
    new = [name for name, found in starts if found is None and name is not None and name not in run]
    made = objective.calibrated(new) if new else {}
    found = [(name, made.get(name or "") if start is None else start) for name, start in starts]
    return [(name, start) for name, start in found if start is not None]


def _enqueue_new(
    study: optuna.Study, space: Space, starts: list[tuple[str | None, Plan | Found]], held: list[dict[str, Any]]
) -> None:
    """Queue the warm starts that the study does not hold yet, each once however many workers do so at the same time."""
    team = genome.shared(study)
    for name, found in starts:
        plan = found if isinstance(found, Plan) else found.plan
        attrs: dict[str, Any] = {WARM_START: plan.fingerprint}
        if name is not None:
            attrs[METHOD] = name
        if any(attrs.items() <= known.items() for known in held):
            continue
        cost = {} if isinstance(found, Plan) else {CALIBRATION: found.layer_tokens}
        if team is None:
            enqueue(study, space, plan, **attrs, **cost)
        else:
            team[0].create_once(team[1], _waiting(space, plan, {**attrs, **cost}), attrs)


def _pruner(pruner: str | BasePruner | None, objective: Objective) -> BasePruner:
    if pruner is None or isinstance(pruner, optuna.pruners.NopPruner):
        return optuna.pruners.NopPruner()
    if not isinstance(pruner, BasePruner) and pruner != "racing":
        raise StudyError(f"a pruner is 'racing', an Optuna pruner object or None, got {pruner!r}")
    if len(objective.evaluator.rungs) == 1:
        raise StudyError(
            f"pruner {pruner if isinstance(pruner, str) else type(pruner).__name__!r} has nothing to prune: the "
            f"objective scores its {objective.evaluator.examples} examples in one rung; give it Objective(rungs=5)"
        )
    return pruner if isinstance(pruner, BasePruner) else RacingPruner()


def enqueue(study: optuna.Study, space: Space, plan: Plan, **user_attrs: Any) -> None:
    """Queue a plan as the study's next trial.

    Raises:
        SpaceError: when the plan is not one of the space.
    """
    study.add_trial(_waiting(space, plan, user_attrs))


def _waiting(space: Space, plan: Plan, user_attrs: dict[str, Any]) -> FrozenTrial:
    return genome.waiting(genome.pack(genome.GENOME, space.encode(plan)), user_attrs)


def optimize(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float],
    *,
    trials: int | None = None,
    timeout: float | None = None,
    patience: int | None = None,
    callbacks: Iterable[Callback] = (),
) -> None:
    """`study.optimize` until the study as a whole holds `trials` finished trials, so that a resumed run does the rest.

    Any number of workers may call it for one study, whose storage is of `open_storage`: each starts the next trial
    while fewer than `trials` were started, so that none is one too many. A worker that finds no trial to start waits
    for those that run elsewhere, as their workers may die, and returns when they have ended.

    The first Ctrl-C lets the running trial finish and returns; a second one interrupts it, and the trial is queued
    again when the study is resumed. While the database is away, the first Ctrl-C returns at once, and so does the end
    of the timeout: what was evaluated is stored by the next worker of this host.

    Args:
        trials: finished trials the study shall hold, those of earlier runs included.
        timeout: seconds for this run.
        patience: stop after so many trials without a better one.

    Raises:
        StudyError: when none of the three says when to stop, or one cannot.
        StorageError: when the database was away for longer than its storage waits.
    """
    check_limits(trials, timeout, patience)
    until = None if timeout is None else time.monotonic() + timeout
    team = genome.shared(study)

    def enough() -> bool:
        return (trials is not None and finished(study) >= trials) or (
            patience is not None and stalled(study) >= patience
        )

    stop = _Stop()

    def stop_when_done(study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        if stop.asked or ((patience is not None or team is None) and enough()):
            study.stop()

    def left() -> float | None:
        return None if until is None else max(0.0, until - time.monotonic())

    with _stoppable(study, stop, until):
        if trials is not None or patience is not None:
            recipe.want(study, trials, patience)
        reclaim(study)
        while not stop.asked and not enough():
            try:
                with nullcontext() if team is None else team[0].slots(trials):
                    study.optimize(_held(study, objective), timeout=left(), callbacks=[*callbacks, stop_when_done])
                return
            except NoSlotLeft:
                if not _wait_for_others(study, trials, stop, left):
                    return


def check_limits(trials: Any = None, timeout: Any = None, patience: Any = None) -> None:
    """Raise StudyError unless these, of `optimize`, say when to stop."""
    if trials is None and timeout is None and patience is None:
        raise StudyError("say when to stop: trials, timeout or patience")
    for name, count in (("trials", trials), ("patience", patience)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1):
            raise StudyError(f"{name} must be an integer of at least 1, got {count!r}")
    if timeout is not None and (not isinstance(timeout, numbers.Real) or not float(timeout) >= 0):
        raise StudyError(f"timeout must be a number of seconds of at least 0, got {timeout!r}")


def _held(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> Callable[[optuna.Trial], float]:
    """The objective; what it gives is on this host's disk before Optuna tells the storage, which may be away."""
    team = genome.shared(study)
    if team is None:
        return objective
    storage = team[0]

    def evaluated(trial: optuna.Trial) -> float:
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            storage.hold(genome.key(trial), TrialState.PRUNED)
            raise
        if isinstance(value, numbers.Real) and not math.isnan(value):
            storage.hold(genome.key(trial), TrialState.COMPLETE, [float(value)])
        else:
            storage.hold(genome.key(trial), TrialState.FAIL)
        return value

    return evaluated


def _wait_for_others(study: optuna.Study, trials: int | None, stop: _Stop, left: Callable[[], float | None]) -> bool:
    """Wait until there is a trial to start; False when there will be none, or it is time to stop."""
    team = genome.shared(study)
    assert team is not None
    storage, study_id = team
    delay = 0.05
    while not stop.asked and left() != 0.0:
        reclaim(study)
        if trials is not None and finished(study) >= trials:
            return False
        with storage.slots(trials):
            if storage.claimable(study_id):
                return True
        remaining = left()
        time.sleep(delay * random.uniform(0.5, 1.0) if remaining is None else min(delay, remaining))
        delay = min(2 * delay, LONGEST_LOOK)
    return False


def finished(study: optuna.Study) -> int:
    """Trials that ended, each counted once however often it was retried."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state.is_finished() for t in trials) - sum(bool(t.system_attrs.get(genome.RETRIES)) for t in trials)


def stalled(study: optuna.Study) -> int:
    """Finished trials since the best one."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    best = best_trial(study)
    return len(done) if best is None else sum(t.number > best.number for t in done)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial of least loss, the first of equals."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.value is not None]
    return min(done, key=lambda t: (t.value, t.number), default=None)


def reclaim(study: optuna.Study, *, other_hosts: bool = False) -> list[int]:
    """Queue again the trials whose worker died, or was interrupted; returns their numbers.

    The dead trial is marked failed, and a waiting copy keeps its genotype and its slot; in a storage of `open_storage`
    both in one transaction, and not more often than its `retries`. What dead workers of this host had evaluated and
    could not store is stored first.

    Args:
        study: of moeopt, or a plain one with a sampler of moeopt.
        other_hosts: also take running trials of other hosts for dead, where it cannot be seen. Say so only when no
            worker runs there (a container that was started anew has another host name).
    """
    team = genome.shared(study)
    if team is not None:
        team[0].recover(team[1], other_hosts)
    trials = study.get_trials(deepcopy=False)
    before = len(trials)
    retried = {number for trial in trials for number in trial.system_attrs.get(genome.RETRIES, [])}
    reclaimed = []
    for trial in trials:
        if trial.number in retried:
            continue
        running = trial.state == TrialState.RUNNING
        dead = running and process.is_dead(genome.origin(trial).get("worker"), other_hosts)
        if not dead and not (trial.state == TrialState.FAIL and trial.user_attrs.get(genome.INTERRUPTED)):
            continue
        if team is not None:
            if team[0].take_over(team[1], genome.key(trial), "its worker died") is not None:
                reclaimed.append(trial.number)
            continue
        if dead:
            genome.mark_interrupted(study, trial)
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # it ended, or another worker reclaimed it, in the meantime
                continue
        study.add_trial(genome.retry(trial))
        reclaimed.append(trial.number)
    if team is not None:
        team[0].take_over_stale(team[1])
        now = study.get_trials(deepcopy=False)[before:]
        stale = {t.system_attrs[genome.RETRIES][-1] for t in now if t.system_attrs.get(genome.RETRIES)}
        reclaimed += sorted(stale - set(reclaimed))
    return reclaimed


def description_of(objective: Objective, sampler: GenomeSampler, pruner: BasePruner) -> dict[str, Any]:
    """What a study must agree on to be resumed, JSON: model, task, space, evaluation, sampler and pruner."""
    return {**objective.describe(), "sampler": sampler.settings(), "pruner": describe(pruner)}


def check_same(study: optuna.Study, description: dict[str, Any]) -> None:
    """Raise StudyError, naming the fields that differ, unless the study was made with this description."""
    with reading(study.study_name):
        attrs = study.user_attrs
        empty = not attrs and not study.get_trials(deepcopy=False)
    if DESCRIPTION not in attrs:
        if not empty:
            raise StudyError(f"study {study.study_name!r} was not made by moeopt; choose another name")
        return
    stored = check_whole(study)
    differences = [found for found in differences_of(stored, description) if found[0] not in MAY_DIFFER]
    if any(path == "sampler.name" for path, _, _ in differences):  # its hyperparameters differ, too
        differences = [found for found in differences if found[0] == "sampler.name" or found[0][:8] != "sampler."]
    if differences:
        listed = "; ".join(f"{path}: study has {shown(old)}, now {shown(new)}" for path, old, new in differences)
        raise StudyError(f"study {study.study_name!r} cannot be resumed with something else. {listed}")


def check_study(
    study: optuna.Study, task: Task, model: nn.Module | None = None, unseen: Sequence[str] = ("test",)
) -> None:
    """Raise StudyError, naming what differs, unless a study searched this task and this model.

    Args:
        study: it.
        task: its examples must be the same.
        model: None: not loaded yet, not compared.
        unseen: splits that the study must not have searched.
    """
    found = described(study)
    about, own = found["task"], task.describe()
    if about["fingerprint"] != own["fingerprint"]:
        raise StudyError(
            f"study {study.study_name!r} searched another task: {shown(about['name'])} with examples "
            f"{shown(about['fingerprint'][:16])}, here is {own['name']!r} with {own['fingerprint'][:16]}"
        )
    if about["split"] in unseen:
        raise StudyError(
            f"study {study.study_name!r} searched the {about['split']} split: its result there would mean nothing"
        )
    if model is not None:
        from moeopt.models import describe

        ours = describe(model)
        differing = [key for key in ("config_hash", "weights") if found["model"][key] != ours[key]]
        if differing:
            raise StudyError(
                f"study {study.study_name!r} searched another model ({shown(found['model']['name_or_path'])}): "
                + ", ".join(f"{key} {shown(found['model'][key][:16])}, here {ours[key][:16]}" for key in differing)
                + ("; the same weights in another dtype count as others" if differing == ["weights"] else "")
            )


def differences_of(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, old and new value of every field in which two descriptions differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences_of(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new and not (isinstance(old, list) and isinstance(new, (list, tuple)) and old == list(new)):
        yield path, old, new


def _find(storage: BaseStorage | None, study_name: str | None) -> optuna.Study | None:
    if storage is None or study_name is None:
        return None
    try:
        return optuna.load_study(study_name=study_name, storage=storage)
    except KeyError:
        return None


def load_study(study_name: str, storage: str | BaseStorage) -> optuna.Study:
    """Open a study of moeopt to read it; all of it is read and checked.

    Raises:
        StudyError: when there is no such study (the nearest name is suggested), moeopt did not make it, a newer one
            did, or a trial is not of the form that moeopt writes.
        StorageError: when the storage cannot be opened, or the study is damaged.
    """
    from moeopt.errors import nearest

    opened = open_storage(storage, create=False) if isinstance(storage, str) else storage
    with readable_errors(storage):
        study = _find(opened, study_name)
        if study is None:
            with reading(study_name):
                names = study_names(opened)
            hint = nearest(study_name, [str(name) for name in names])
            raise StudyError(f"no study {study_name!r} in {hidden(storage)}{hint}")
        check_whole(study)
    return study


def space_of(study: optuna.Study) -> Space:
    """The space that a study of moeopt searches, rebuilt from its description.

    Raises:
        StudyError: when moeopt did not make the study, a newer one did, or no space is described so.
    """
    description = described(study)["space"]
    try:
        return from_description(description)
    except SpaceError as error:
        raise StudyError(
            f"study {study.study_name!r}: its attribute {DESCRIPTION!r}.space: {line(str(error), 500)}"
        ) from None


@dataclass
class _Stop:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


def _storage_error(error: BaseException | None) -> StorageError | None:
    """The StorageError behind an error: Optuna stumbles when a storage fails while it ends a trial."""
    while error is not None and not isinstance(error, StorageError):
        error = error.__context__
    return error


@contextmanager
def _stoppable(study: optuna.Study, stop: _Stop, until: float | None) -> Iterator[None]:
    """Within it, the first Ctrl-C lets the running trial finish; the second raises KeyboardInterrupt.

    While the database is away, neither it nor the end of the time (`until`, `time.monotonic`) is waited out.
    """
    team = genome.shared(study)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None

    def finish_trial(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.asked = True
        if team is not None:
            team[0].waiting.stopped = True
        with suppress(RuntimeError):  # before the first trial, or while others run the last ones
            study.stop()

    if team is not None:
        team[0].waiting.deadline = until
    if main:
        signal.signal(signal.SIGINT, finish_trial)
    try:
        yield
    except (StorageError, UnboundLocalError) as error:
        found = _storage_error(error)
        if found is None:
            raise
        if not stop.asked and (until is None or time.monotonic() < until):
            raise found from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
        if team is not None:
            team[0].waiting.deadline = None
            team[0].waiting.stopped = False
