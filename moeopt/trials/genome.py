"""A trial's genotype and facts in its system attributes: pack, read, write. All private Optuna access lives here.

A genotype is a flat float32 vector, kept as one packed attribute (one parameter per number would cost seconds a
trial, see `Space`). System attributes are neither sent to dashboards nor shown in data frames.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import StorageError
from moeopt.showing import line

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from moeopt.study.storage import ResilientStorage
    from moeopt.study.storage.transaction import Taken

Vector = NDArray[np.float32]
Attrs = Mapping[str, Any]
Params = Mapping[str, tuple[Any, "BaseDistribution"]]

GENOME = "moeopt:genome"
ORIGIN = "moeopt:origin"
SCORES = "moeopt:scores"
NOT_FINITE = "moeopt:not_finite"  # what the scores of a trial are of that ended without a finite loss
RETRIES = "retry_history"  # Optuna's own key, as `RetryHeartbeatStaleTrialCallback` writes it
ESTIMATE = "estimate"  # user attribute of a pruned trial: an honest estimate of its loss over all examples
INTERRUPTED = "interrupted"  # user attribute of a trial that Ctrl-C ended
FAILURE = "failure"  # user attribute of a failed trial: why it failed
# User attributes that a trial's repetition gets: fingerprint and method of a warm start, and what that cost beforehand.
WARM_START, METHOD, CALIBRATION = KEPT = "warm_start", "method", "calibration_layer_tokens"
CHUNK = 60_000  # characters; MariaDB and MySQL hold 65,535 bytes an attribute
LARGEST = 1 << 24  # numbers in one vector; anything larger is a damaged or hostile study


def pack(key: str, vector: Vector) -> dict[str, Any]:
    """Attributes that hold a 1-D float32 vector: `key`, after `key.1`, `key.2`, ... when one attribute is too short.

    Written in this order, a vector is there whole or not at all.
    """
    text = base64.b64encode(zlib.compress(np.ascontiguousarray(vector, dtype="<f4").tobytes(), 6)).decode()
    pieces = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    head = {"v": 1, "shape": [int(vector.size)], "dtype": "<f4", "z": pieces[0], "chunks": len(pieces)}
    return {**{f"{key}.{i}": piece for i, piece in enumerate(pieces[1:], start=1)}, key: head}


def unpack(key: str, attrs: Attrs) -> Vector | None:
    """The vector that `pack` stored under `key`, or None when there is none.

    Raises:
        StorageError: when the attribute is there but is not what `pack` writes.
    """
    if key not in attrs:
        return None
    try:
        head = attrs[key]
        size, chunks = head["shape"][0], head.get("chunks", 1)
        if head["v"] != 1 or head["dtype"] != "<f4" or not 0 <= size <= LARGEST or not 1 <= chunks <= LARGEST // CHUNK:
            raise ValueError(f"version {head['v']!r}, dtype {head['dtype']!r}, {size!r} numbers")
        text = head["z"] + "".join(attrs[f"{key}.{i}"] for i in range(1, chunks))
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), 4 * size + 1)
        if len(data) != 4 * size:
            raise ValueError(f"{size} numbers announced, {len(data)} bytes found")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, binascii.Error, zlib.error) as error:
        raise StorageError(
            f"attribute {key!r} is damaged or was written by a newer moeopt: {line(str(error))}"
        ) from None
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def attributes(trial: optuna.trial.BaseTrial) -> Attrs:
    """System attributes of a running `Trial`, as this process knows them, or of a `FrozenTrial`."""
    if hasattr(trial, "system_attrs"):
        return trial.system_attrs  # type: ignore[no-any-return]
    return trial._cached_frozen_trial.system_attrs  # type: ignore[attr-defined,no-any-return]


def read(trial: optuna.trial.BaseTrial) -> Vector | None:
    """The trial's genotype, float32 (space.size,), or None."""
    x = unpack(GENOME, attributes(trial))
    if x is not None and not np.isfinite(x).all():
        raise StorageError(f"attribute {GENOME!r} of trial {trial.number} is damaged: its numbers are not all finite")  # type: ignore[attr-defined]
    return x


def read_scores(trial: optuna.trial.BaseTrial) -> NDArray[np.float32] | None:
    """Loss, weight and correctness of the examples that the trial has evaluated so far, float32 (3, examples), or None.

    Examples stand in the task's fixed order, so that those of any two trials of a study are paired.
    """
    found = unpack(SCORES, attributes(trial))
    if found is None:
        return None
    scores = found[: found.size // 3 * 3].reshape(3, -1)
    if not (np.isfinite(scores[1]) & (scores[1] > 0)).all():
        raise StorageError(f"attribute {SCORES!r} is damaged: the weights of examples are not all positive")
    return scores


def scores_of(trial: optuna.trial.BaseTrial) -> str | None:
    """Names the model, task and examples that a trial's scores are of; None where its objective does not say."""
    head = attributes(trial).get(SCORES)
    return head.get("of") if isinstance(head, dict) else None


def origin(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Where the trial's genotype came from: slot, operator, parents, plan fingerprint, worker; empty when unknown."""
    found = attributes(trial).get(ORIGIN, {})
    return found if isinstance(found, dict) else {}


def write(
    study: optuna.Study,
    trial: Any,
    attrs: Attrs,
    user: Attrs | None = None,
    params: Params | None = None,
    unless: Taken | None = None,
) -> bool:
    """Set attributes and new parameters of a running trial, also in the copy at hand; in a database all or none.

    Returns False where `unless` kept it from writing, as only a `ResilientStorage` can.
    """
    from moeopt.study.storage import transaction

    storage, user, params = study._storage, user or {}, params or {}
    database = getattr(storage, "_backend", storage)
    if (team := shared(study)) is not None:
        if not team[0].write_trial(trial._trial_id, attrs, user, params, unless):
            return False
    elif transaction.serves(database):
        transaction.write(database, trial._trial_id, attrs, user, params)
    else:
        for key, value in attrs.items():
            storage.set_trial_system_attr(trial._trial_id, key, value)
        for key, value in user.items():
            storage.set_trial_user_attr(trial._trial_id, key, value)
        for name, (value, distribution) in params.items():
            storage.set_trial_param(trial._trial_id, name, distribution.to_internal_repr(value), distribution)
    known = getattr(trial, "_cached_frozen_trial", trial)
    known.system_attrs.update(attrs)
    known.user_attrs.update(user)
    known.params.update({name: value for name, (value, _) in params.items()})
    known.distributions.update({name: distribution for name, (_, distribution) in params.items()})
    return True


def shared(study: optuna.Study) -> tuple[ResilientStorage, int] | None:
    """The study's storage and its key there, where that is one of moeopt's."""
    from moeopt.study.storage import ResilientStorage

    database = getattr(study._storage, "_backend", study._storage)
    return (database, study._study_id) if isinstance(database, ResilientStorage) else None


def key(trial: Any) -> int:
    """A trial's key in its storage."""
    return int(trial._trial_id)


def taken(study: optuna.Study, plan: str, trials: Iterable[FrozenTrial]) -> Taken:
    """That another trial of a study got a plan since these were read."""
    from moeopt.study.storage.transaction import Taken

    known = [(trial._trial_id, "plan" in origin(trial)) for trial in trials]
    return Taken(study._study_id, plan, max((i for i, _ in known), default=-1), [i for i, has in known if not has])


def whole_study(study: optuna.Study) -> optuna.Study:
    """The study itself where Optuna hands a sampler one Hyperband bracket of it."""
    return getattr(study, "_study", study)  # type: ignore[no-any-return]


def slot(trial: FrozenTrial, trials: Iterable[FrozenTrial]) -> int:
    """The trial's place in the sequence of proposals: its number, not counting retries of dead trials before it.

    A retried trial keeps the slot of the trial it repeats, so a resumed study draws what an uninterrupted one would.
    """
    known = origin(trial).get("slot")
    if isinstance(known, int):
        return known
    number = int((trial.system_attrs.get(RETRIES) or [trial.number])[0])
    return number - sum(1 for t in trials if t.number < number and t.system_attrs.get(RETRIES))


def mark_interrupted(study: optuna.Study, trial: FrozenTrial) -> None:
    """Note on a trial that it is to be run again, whatever becomes of it."""
    study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)


def waiting(attrs: Attrs, user_attrs: Attrs) -> FrozenTrial:
    """A trial to `study.add_trial`, in one transaction, that the next worker picks up with its genotype attached."""
    from optuna.trial import TrialState, create_trial

    return create_trial(state=TrialState.WAITING, system_attrs=dict(attrs), user_attrs=dict(user_attrs))


def study_attributes(study: optuna.Study) -> Attrs:
    """System attributes of a study, as its storage has them now."""
    return study._storage.get_study_system_attrs(study._study_id)


def write_study(study: optuna.Study, attrs: Attrs) -> None:
    """Set system attributes of a study; in a database all or none."""
    from moeopt.study.storage import transaction

    database = getattr(study._storage, "_backend", study._storage)
    if (team := shared(study)) is not None:
        team[0].waiting(lambda: transaction.write_study(database, study._study_id, attrs))
    elif transaction.serves(database):
        transaction.write_study(database, study._study_id, attrs)
    else:
        for key, value in attrs.items():
            study._storage.set_study_system_attr(study._study_id, key, value)


def retry(trial: FrozenTrial) -> FrozenTrial:
    """A waiting trial that repeats a dead one under a new number, marked as Optuna marks its own retries.

    Of its user attributes it gets those KEPT, its parameters where it has no genotype.
    """
    history = [*trial.system_attrs.get(RETRIES, []), trial.number]
    came = {key: value for key, value in origin(trial).items() if key not in ("worker", "claim")}
    attrs = {**trial.system_attrs, "failed_trial": history[0], RETRIES: history, ORIGIN: came}
    found = waiting(attrs, {key: trial.user_attrs[key] for key in KEPT if key in trial.user_attrs})
    if GENOME not in attrs:
        found.params, found.distributions = trial.params, trial.distributions
    return found
