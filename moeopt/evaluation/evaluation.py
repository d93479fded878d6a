"""What evaluating one plan gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of one plan on one split, examples in the task's fixed order.

    `loss` and `accuracy` are the means of `losses` and `correct`, weighted by `weights`; all three arrays are float32
    (examples,). `tokens` counts the non-padding tokens that were run, `layer_tokens` those times the decoder layers
    that each went through, `seconds` the wall time.
    """

    loss: float
    accuracy: float
    losses: NDArray[np.float32]
    weights: NDArray[np.float32]
    correct: NDArray[np.float32]
    tokens: int
    layer_tokens: int
    seconds: float
