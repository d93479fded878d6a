"""What can be judged before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeopt.errors import MoeoptError
from moeopt.plan import Plan


class ProfileError(MoeoptError, ValueError):
    """A profile cannot be made as asked, or the process that measures a model failed."""


@dataclass(frozen=True)
class Setting:
    """One thing that is timed: prefill of `batch` prompts of `prompt_length` tokens, then decoding."""

    batch: int
    prompt_length: int


def check(
    *, batch: Sequence[int], prompt_length: Sequence[int], threads: int | None, **counts: int
) -> tuple[Setting, ...]:
    """Every prompt length with every batch size.

    Raises:
        ProfileError: naming a number that is none, or less than 1.
    """
    named = {"batch": batch, "prompt_length": prompt_length, "threads": [1 if threads is None else threads]}
    for name, values in {**named, **{name: [value] for name, value in counts.items()}}.items():
        if not values:
            raise ProfileError(f"{name} must name at least one number")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ProfileError(f"{name} must be a number of at least 1, got {value!r}")
    return tuple(dict.fromkeys(Setting(size, length) for length in prompt_length for size in batch))


def check_plan(name: str, plan: Plan, layers: Sequence[Sequence[int]]) -> None:
    """Raise ProfileError unless a plan is for MoE layers of these (n, k)."""
    if not layers:
        raise ProfileError(
            f"plan {name!r} needs a model with MoE layers, and the first one has none that moeopt can use"
        )
    if len(plan.layers) != len(layers):
        raise ProfileError(f"plan {name!r} is for {len(plan.layers)} MoE layers, the first model has {len(layers)}")
    for i, (part, (n, _)) in enumerate(zip(plan.layers, layers)):
        if part.experts != n:
            raise ProfileError(f"layer {i} of plan {name!r} is for {part.experts} experts, the first model has {n}")


def check_length(source: str, positions: int | None, settings: Sequence[Setting], new_tokens: int) -> None:
    """Raise ProfileError when a checkpoint has fewer positions than the longest prompts and what follows them need."""
    longest = max(setting.prompt_length for setting in settings)
    if positions is not None and longest + new_tokens > positions:
        raise ProfileError(
            f"prompts of {longest} tokens and {new_tokens} new ones exceed the {positions} positions of {source!r}"
        )


def check_out(out: Path) -> None:
    """Raise ProfileError unless a JSON file, and a CSV file beside it, can be written here."""
    if out.suffix != ".json":
        raise ProfileError(f"--out must be a .json file (a .csv is written beside it), got {str(out)!r}")
    if not out.parent.is_dir():
        raise ProfileError(f"no folder {str(out.parent)!r} to write {out.name!r} to")
