"""Answers that a model writes under a plan, held against those of the full model to the same prompts.

Automated scores can hold while answers fall apart: a model that still tells right options from wrong ones may write in
circles, stop at once, or never. Both models answer greedily; of every answer are told

- `repeated`: the share of its sequences of four tokens that it wrote before (seq-rep-4 of Welleck et al. 2020,
  arXiv 1908.04319);
- `loops`: whether it ends in one piece written at least three times, 12 tokens or more of it;
- `empty`: whether nothing in it is visible;
- `early`: whether it ends by itself in less than half of the tokens of the full model's;
- `overlong`: whether it does not end by itself where the full model's does;
- `differs`: the share of the first eight tokens of the full model's answer that are not written, from the first other
  one on;
- `length`: its tokens, which nothing is decided by.

Each is a difference to the full model, paired over the prompts. It holds where its whole 95% interval is within what is
allowed, is broken where its mean is beyond, and is unclear in between, or where there are fewer than 30 prompts: what
no one of n prompts showed may still happen to 3 / n of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeopt.showing import Shown
from moeopt.statistics import Interval, Standing, bootstrap

PROMPTS = 32
"""Prompts that are answered, unless said otherwise."""
NEW_TOKENS = 64
"""Most tokens of an answer, unless said otherwise."""
ENOUGH = 30
"""Prompts below which nothing is shown to hold."""
GRAM, FIRST = 4, 8
LOOP = 12
"""Tokens at the end of an answer that are a loop where they are one piece at least three times."""
LIMITS: Mapping[str, float] = {
    "repeated": 0.1,
    "loops": 0.1,
    "empty": 0.1,
    "early": 0.1,
    "overlong": 0.1,
    "differs": 0.75,
}
"""What of each is allowed beyond the full model's."""
MEASURES = (*LIMITS, "length")
"""What of an answer is measured."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt: text, token ids, and whether it ended by itself before the most tokens."""

    text: str
    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, eq=False)
class Measure:
    """One thing told of every answer, float64 (prompts,), of the full model's and of the plan's.

    `limit` is how much of it the plan may have beyond the full model on average; None: nothing is decided by it.
    """

    name: str
    full: NDArray[np.float64]
    small: NDArray[np.float64]
    limit: float | None

    @cached_property
    def change(self) -> Interval:
        """Its mean under the plan less the full model's, with the 95% interval over prompts."""
        return bootstrap(self.small - self.full, np.ones(len(self.full)))

    @property
    def verdict(self) -> Standing | None:
        """Whether the change is within the limit; None without one."""
        if self.limit is None:
            return None
        verdict = self.change.within(self.limit)
        return "unclear" if verdict == "holds" and len(self.full) < ENOUGH else verdict


@dataclass(frozen=True, eq=False)
class Health(Shown):
    """Answers of the full model and of a plan to the same prompts, and what was told of them.

    Args:
        plan: the plan's fingerprint.
        of: names model, prompts and limits.
        source: what the prompts are of.
        prompts: as the model reads them.
        full, small: the answers, in the order of the prompts.
        new_tokens: most tokens of an answer.
        measures: by name, in the order of `MEASURES`.
    """

    plan: str
    of: str
    source: str
    prompts: tuple[str, ...]
    full: tuple[Answer, ...]
    small: tuple[Answer, ...]
    new_tokens: int
    measures: Mapping[str, Measure]

    @property
    def verdict(self) -> Standing:
        """`broken` where any measure is, `holds` where all do."""
        verdicts = {measure.verdict for measure in self.measures.values()}
        return "broken" if "broken" in verdicts else "unclear" if "unclear" in verdicts else "holds"

    @property
    def reasons(self) -> list[str]:
        """What does not hold, a sentence each; empty where all does."""
        unlike = [m for m in self.measures.values() if m.verdict in ("broken", "unclear")]
        sentences = [
            f"{m.name}: {m.change} beyond the full model's, of {m.limit:g} allowed"
            for m in sorted(unlike, key=lambda m: m.verdict != "broken")
            if m.verdict == self.verdict
        ]
        if self.verdict == "unclear" and len(self.prompts) < ENOUGH:
            return [f"{len(self.prompts)} prompts are too few to show that anything holds: take {ENOUGH} or more"]
        return sentences

    def __str__(self) -> str:
        words = {"holds": "its answers hold", "broken": "its answers fall apart", "unclear": "not clear"}
        return f"{words[self.verdict]} on {len(self.prompts)} prompts" + "".join(f"; {r}" for r in self.reasons)

    @property
    def record(self) -> dict[str, Any]:
        """All of it as JSON; numbers of single answers are those of `rows`."""
        return {
            "plan": self.plan,
            "of": self.of,
            "told": str(self),
            "source": self.source,
            "prompts": len(self.prompts),
            "new_tokens": self.new_tokens,
            "verdict": self.verdict,
            "reasons": self.reasons,
            "measures": {
                name: {
                    "full": float(m.full.mean()), "small": float(m.small.mean()), "change": asdict(m.change),
                    "limit": m.limit, "verdict": m.verdict,
                }
                for name, m in self.measures.items()
            },
        }  # fmt: skip

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of every prompt: its text, both answers, and what was told of them."""
        return [
            {"prompt": prompt, "full": full.text, "small": small.text}
            | {
                f"{who}_{name}": float(getattr(m, who)[i])
                for name, m in self.measures.items()
                for who in ("full", "small")
            }
            for i, (prompt, full, small) in enumerate(zip(self.prompts, self.full, self.small))
        ]

    @property
    def worst(self) -> list[int]:
        """Prompts by how much the plan's answer is worse, in units of what is allowed, the worst first."""
        judged = [m for m in self.measures.values() if m.limit is not None]
        beyond = sum((m.small - m.full) / (m.limit or 1.0) for m in judged)
        return [int(i) for i in np.argsort(-np.asarray(beyond), kind="stable")]


def repeated(ids: Sequence[int]) -> float:
    """1 less the share of distinct ones among the sequences of four tokens; 0 where there is none.

    >>> repeated([1, 2, 3, 4, 5]), repeated([7] * 8)
    (0.0, 0.8)
    """
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether it ends in one piece written at least three times, and for 12 tokens at least.

    >>> loops([9, 5, *[1, 2] * 6]), loops([1, 2] * 5)
    (True, False)
    """
    for period in range(1, len(ids) // 3 + 1):
        end = ids[-period * max(3, math.ceil(LOOP / period)) :]
        if len(end) >= LOOP and len(end) % period == 0 and end[period:] == end[:-period]:
            return True
    return False


def told(answer: Answer, full: Answer) -> dict[str, float]:
    """The measures of an answer, held against the full model's."""
    first = full.ids[:FIRST]
    alike = next((i for i, (a, b) in enumerate(zip(first, answer.ids)) if a != b), min(len(first), len(answer.ids)))
    return {
        "repeated": repeated(answer.ids),
        "loops": float(loops(answer.ids)),
        "empty": float(not answer.text.strip()),
        "early": float(answer.ended and 2 * len(answer.ids) < len(full.ids)),
        "overlong": float(full.ended and not answer.ended),
        "differs": 1 - alike / len(first) if first else float(bool(answer.ids)),
        "length": len(answer.ids),
    }
