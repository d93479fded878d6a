"""A trial's genotype and facts as its system attributes hold them: packed and read; `study.storage` writes them.

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
    from optuna.trial import FrozenTrial

Vector = NDArray[np.float32]
Attrs = Mapping[str, Any]

GENOME = "moeopt:genome"
ORIGIN = "moeopt:origin"
SCORES = "moeopt:scores"
NOT_FINITE = "moeopt:not_finite"  # what the scores of a trial are of that ended without a finite loss
RETRIES = "retry_history"  # Optuna's own key, as `RetryHeartbeatStaleTrialCallback` writes it
ESTIMATE = "estimate"  # user attribute of a pruned trial: an honest estimate of its loss over all examples
INTERRUPTED = "interrupted"  # user attribute of a trial that Ctrl-C ended
FAILURE = "failure"  # user attribute of a failed trial: why it failed
WARM_START = "warm_start"
"""Trial attribute of a warm start: the fingerprint of its plan."""
METHOD = "method"
"""Trial attribute of a warm start: the one-shot method that made its plan."""
CALIBRATION = "calibration_layer_tokens"
"""Trial attribute of a warm start: what its method ran beforehand, in layer-tokens."""
INHERITED = (WARM_START, METHOD, CALIBRATION)
"""User attributes that a trial's repetition gets."""
CHUNK = 60_000  # characters; MariaDB and MySQL hold 65,535 bytes an attribute
LARGEST = 1 << 24  # numbers in one vector; anything larger is a damaged or hostile study
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, binascii.Error, zlib.error)


def pack_bytes(key: str, data: bytes, head: Attrs, level: int = 6) -> dict[str, Any]:
    """Attributes that hold bytes: `key`, with `head`, after `key.1`, `key.2`, ... when one attribute is too short.

    Written in this order, they are there whole or not at all.
    """
    text = base64.b64encode(zlib.compress(data, level)).decode()
    pieces = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    following = {f"{key}.{i}": piece for i, piece in enumerate(pieces[1:], start=1)}
    return {**following, key: {**head, "z": pieces[0], "chunks": len(pieces)}}


def unpack_bytes(key: str, attrs: Attrs, size: int) -> bytes:
    """The `size` bytes that `pack_bytes` stored under `key`; one of DAMAGE where they are not there."""
    head = attrs[key]
    chunks = head.get("chunks", 1)
    if type(chunks) is not int or not 1 <= chunks <= LARGEST // CHUNK:
        raise ValueError(f"{chunks!r:.40} pieces")
    text = head["z"] + "".join(attrs[f"{key}.{i}"] for i in range(1, chunks))
    data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    if len(data) != size:
        raise ValueError(f"{size} bytes announced, {len(data)} found")
    return data


def pack(key: str, vector: Vector) -> dict[str, Any]:
    """`pack_bytes` of a 1-D float32 vector."""
    head = {"v": 1, "shape": [int(vector.size)], "dtype": "<f4"}
    return pack_bytes(key, np.ascontiguousarray(vector, dtype="<f4").tobytes(), head)


def unpack(key: str, attrs: Attrs) -> Vector | None:
    """The vector that `pack` stored under `key`, or None when there is none.

    Raises:
        StorageError: when the attribute is there but is not what `pack` writes.
    """
    if key not in attrs:
        return None
    try:
        head = attrs[key]
        size = head["shape"][0]
        if head["v"] != 1 or head["dtype"] != "<f4" or not 0 <= size <= LARGEST:
            raise ValueError(f"version {head['v']!r}, dtype {head['dtype']!r}, {size!r} numbers")
        data = unpack_bytes(key, attrs, 4 * size)
    except DAMAGE as error:
        raise StorageError(
            f"attribute {key!r} is damaged or was written by a newer moeopt: {line(str(error))}"
        ) from None
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def read(trial: FrozenTrial) -> Vector | None:
    """The trial's genotype, float32 (space.size,), or None."""
    x = unpack(GENOME, trial.system_attrs)
    if x is not None and not np.isfinite(x).all():
        raise StorageError(f"attribute {GENOME!r} of trial {trial.number} is damaged: its numbers are not all finite")
    return x


def read_scores(trial: FrozenTrial) -> NDArray[np.float32] | None:
    """Loss, weight and correctness of the examples that the trial has evaluated so far, float32 (3, examples), or None.

    Examples stand in the task's fixed order, so that those of any two trials of a study are paired.
    """
    numbers = unpack(SCORES, trial.system_attrs)
    if numbers is None:
        return None
    scores = numbers[: numbers.size // 3 * 3].reshape(3, -1)
    if not (np.isfinite(scores[1]) & (scores[1] > 0)).all():
        raise StorageError(f"attribute {SCORES!r} is damaged: the weights of examples are not all positive")
    return scores


def scores_of(trial: FrozenTrial) -> str | None:
    """Names the model, task and examples that a trial's scores are of; None where its objective does not say."""
    head = trial.system_attrs.get(SCORES)
    return head.get("of") if isinstance(head, dict) else None


def origin(trial: FrozenTrial) -> dict[str, Any]:
    """Where the trial's genotype came from: slot, operator, parents, plan fingerprint, worker; empty when unknown."""
    noted = trial.system_attrs.get(ORIGIN, {})
    return noted if isinstance(noted, dict) else {}


def slot(trial: FrozenTrial, trials: Iterable[FrozenTrial]) -> int:
    """The trial's place in the sequence of proposals: its number, not counting retries of dead trials before it.

    A retried trial keeps the slot of the trial it repeats, so a resumed study draws what an uninterrupted one would.
    """
    noted = origin(trial).get("slot")
    if isinstance(noted, int):
        return noted
    number = int((trial.system_attrs.get(RETRIES) or [trial.number])[0])
    return number - sum(1 for t in trials if t.number < number and t.system_attrs.get(RETRIES))


def waiting(attrs: Attrs, user_attrs: Attrs) -> FrozenTrial:
    """A trial to `study.add_trial`, in one transaction, that the next worker picks up with its genotype attached."""
    from optuna.trial import TrialState, create_trial

    return create_trial(state=TrialState.WAITING, system_attrs=dict(attrs), user_attrs=dict(user_attrs))


def retry(trial: FrozenTrial) -> FrozenTrial:
    """A waiting trial that repeats a dead one under a new number, marked as Optuna marks its own retries.

    Of its user attributes it gets those INHERITED, its parameters where it has no genotype.
    """
    history = [*trial.system_attrs.get(RETRIES, []), trial.number]
    noted = {key: value for key, value in origin(trial).items() if key not in ("worker", "claim")}
    attrs = {**trial.system_attrs, "failed_trial": history[0], RETRIES: history, ORIGIN: noted}
    repetition = waiting(attrs, {key: trial.user_attrs[key] for key in INHERITED if key in trial.user_attrs})
    if GENOME not in attrs:
        repetition.params, repetition.distributions = trial.params, trial.distributions
    return repetition
