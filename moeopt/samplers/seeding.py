"""Seeds for the random states inside Optuna's samplers."""

from __future__ import annotations

from typing import Any

import numpy as np


def reseed(sampler: Any, seed: int) -> None:
    """Seed every random state that an Optuna sampler and the samplers inside it hold, from one integer."""
    seeds = np.random.SeedSequence(seed)
    seen: set[int] = set()

    def visit(thing: Any, depth: int) -> None:
        if id(thing) in seen or depth > 3:
            return
        seen.add(id(thing))
        for name, value in sorted(vars(thing).items()):
            state = getattr(value, "rng", value) if type(value).__name__ == "LazyRandomState" else value
            if isinstance(state, np.random.RandomState):
                state.seed(seeds.spawn(1)[0].generate_state(4))
            elif isinstance(state, np.random.Generator):
                setattr(thing, name, np.random.default_rng(seeds.spawn(1)[0]))
            elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in ("numpy", "torch"):
                visit(value, depth + 1)

    visit(sampler, 0)
