"""What a comparison allows to say, in sentences that claim no more than its corrected tests."""

from __future__ import annotations

from collections.abc import Sequence

from moeopt import statistics
from moeopt.report.formatting import count, loss, quantity
from moeopt.results.optimiser_comparison import OptimiserComparison, Pair
from moeopt.showing import line, listed
from moeopt.statistics import ALPHA


def conclusions(c: OptimiserComparison) -> list[str]:
    """Sentences: what may be concluded and what may not, what would be needed, and what all rests on."""
    if len(c.optimisers) == 1:
        alone = f"There is one optimiser, {line(c.optimisers[0].name)}, and nothing to compare it with."
        return [alone, *_left_out(c)]
    return [
        *_orders(c.pairs, c.measure),
        *_equality(c),
        *_same(c),
        *_held_out(c),
        _budget(c),
        *_left_out(c),
        "All of this is about one model, one task, one space and one budget.",
    ]


def _left_out(c: OptimiserComparison) -> list[str]:
    reasons = {
        "without a finished trial": c.left_out,
        "with trials that another sampler than their own made": c.foreign,
    }
    return [f"Left out, {why}: {_all(names)}." for why, names in reasons.items() if names]


def _equality(c: OptimiserComparison) -> list[str]:
    if c.friedman is None:
        return []
    told = "is refuted" if c.friedman <= ALPHA else "is not refuted"
    seeds = count(len(c.seeds), "seed")
    return [
        f"That all {len(c.optimisers)} optimisers are equal in {c.measure} {told} "
        f"(Friedman's test over {seeds}, {p_value(c.friedman)})."
    ]


def _same(c: OptimiserComparison) -> list[str]:
    """Pairs that did not part within the budget, such as two that begin with the same random trials."""
    what = c.measure.removeprefix("search ")
    return [
        f"Within this budget {line(pair.first)} and {line(pair.second)} found the same {what} on every common seed."
        for pair in c.pairs
        if len(pair.differences) > 1 and not pair.differences.any()
    ]


def _orders(pairs: Sequence[Pair], what: str) -> list[str]:
    """Which optimiser is better than which, or why that cannot be said and what would be needed."""
    seeds = max(len(pair.differences) for pair in pairs)
    if seeds == 0:
        return [f"No order by {what} can be concluded: no two optimisers share a seed on which both found one."]
    decided = [pair for pair in pairs if pair.better is not None]
    sentences = []
    for name in dict.fromkeys(pair.better for pair in decided):
        won = [pair for pair in decided if pair.better == name]
        worse = [pair.second if pair.first == name else pair.first for pair in won]
        worst = max(pair.corrected for pair in won)
        limit = f"corrected {p_value(worst)}" if len(won) == 1 else f"corrected p at most {max(worst, 0.001):.3f}"
        sentences.append(f"{line(str(name))} reaches a lower {what} than {_all(worse)} ({limit}).")
    if len(decided) == len(pairs):
        return sentences
    if decided:
        rest = "the one other" if len(pairs) - len(decided) == 1 else f"the other {len(pairs) - len(decided)}"
        return [
            *sentences,
            f"Of {count(len(pairs), 'pair')}, {rest} cannot be ordered by {what}: no claim is made there.",
        ]
    return [_undecided(pairs, seeds, what)]


def _undecided(pairs: Sequence[Pair], seeds: int, what: str) -> str:
    least = statistics.least_p(seeds)
    corrected = min(1.0, least * len(pairs))
    start = f"No order of these optimisers by {what} can be concluded from {count(seeds, 'seed')}"
    if corrected > ALPHA:
        needed = statistics.seeds_to_conclude(len(pairs))
        many = f", and after Holm's correction for {len(pairs)} pairs not below {_plain(corrected)}"
        return (
            f"{start}, whatever the losses: an exact paired test then gives no p below {_plain(least)}"
            f"{many if len(pairs) > 1 else ''}. At least {needed} common seeds are needed."
        )
    closest = min(pairs, key=lambda pair: pair.corrected)
    names = f"{line(closest.first)} and {line(closest.second)}"
    text = f"{start}: the least corrected p is {closest.corrected:.3f}, of {names}. That does not make them equal."
    more = statistics.seeds_for_power(closest.differences, len(pairs))
    if more is not None and more > seeds:
        text += (
            f" If these two differ as much as they seem to, by {loss(abs(closest.mean))}, about {more} seeds show it."
        )
    return text


def _held_out(c: OptimiserComparison) -> list[str]:
    if c.bounds is not None:
        return ["Only fronts on search are compared, which flatters them: moeopt front shows that of a study on dev."]
    runs = c.runs
    tested = [run.held_out for run in runs if run.held_out is not None]
    if c.held_out_pairs:
        about = f"On test ({count(tested[0].examples, 'example')}, what moeopt select chose of each whole study): "
        first, *rest = _orders(c.held_out_pairs, "test loss")
        return [about + first, *rest]
    only = "Only search loss is compared, which flatters the trial that it chose"
    if not tested:
        return [f"{only}: moeopt select on every study would tell whether an order holds on test."]
    if len(tested) < len(runs):
        return [f"{only}: {len(tested)} of {len(runs)} studies have a test loss, moeopt select on the rest is missing."]
    return [f"{only}: the studies' test losses are of different examples or scores."]


def _budget(c: OptimiserComparison) -> str:
    shortest = min(c.runs, key=lambda run: run.spent(c.cost))
    longest = max(run.spent(c.cost) for run in c.runs)
    text = f"All are compared at {quantity(c.budget, c.cost)}, which every study reached"
    if longest > 1.05 * c.budget:
        text += (
            f"; {line(shortest.study)} ended there, others went on to up to {quantity(longest, c.cost)}, which "
            "does not count"
        )
    return text + "."


def _plain(p: float) -> str:
    return f"{p:.4g}"


def p_value(p: float) -> str:
    """
    >>> p_value(0.0625), p_value(0.00002)
    ('p = 0.062', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _all(names: Sequence[str]) -> str:
    return listed(map(line, names), most=len(names))
