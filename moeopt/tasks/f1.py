"""F1 of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def class_f1(chosen: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """F1 of one class, from whether it was chosen and whether it is true, both (examples,); 0 where undefined."""
    both = int(np.sum(chosen & true))
    return 2 * both / max(int(np.sum(chosen)) + int(np.sum(true)), 1)
