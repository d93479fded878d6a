"""What a profile holds, and the numbers that follow from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeopt.plan import Plan
from moeopt.results.profiling.checks import Setting
from moeopt.showing import Shown

Part = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Ratio:
    """A row's speed over the first row's, from runs side by side in each repeat.

    Args:
        median, low, high: of the paired ratios, one a repeat; `low` and `high` are the least and the largest.
        lower, upper: their quartiles.
    """

    median: float
    low: float
    high: float
    lower: float
    upper: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        several = ratios if len(ratios) > 1 else [*ratios, *ratios]
        lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, min(ratios), max(ratios), lower, upper)


@dataclass(frozen=True)
class Speed:
    """Wall seconds of one row in one setting, one a repeat, the warm-up left out.

    Args:
        setting: it.
        prefill: of the forward pass over the prompts.
        decode: of all steps after it.
    """

    setting: Setting
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of a layer spread over its experts.

    Args:
        layer: the layer's name.
        experts: their numbers; under a plan that keeps experts, those of the full model.
        counts: tokens that each ran for.
        tokens: all tokens.
    """

    layer: str
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: int

    @property
    def active(self) -> float:
        """Mean number of experts run per token."""
        return sum(self.counts) / self.tokens

    @property
    def shares(self) -> tuple[float, ...]:
        """Each expert's share of all that ran; they sum to 1."""
        total = max(1, sum(self.counts))
        return tuple(count / total for count in self.counts)

    @property
    def cv(self) -> float:
        """Coefficient of variation: standard deviation of the counts over their mean. 0: all equally busy."""
        mean = statistics.fmean(self.counts)
        return statistics.pstdev(self.counts) / mean if mean else 0.0

    @property
    def max_over_mean(self) -> float:
        """The busiest expert's count over the mean count. 1: all equally busy."""
        mean = statistics.fmean(self.counts)
        return max(self.counts) / mean if mean else 1.0

    @property
    def entropy(self) -> float:
        """Entropy of the shares over the largest there can be, between 0 and 1. 1: all equally busy."""
        if len(self.counts) == 1:
            return 1.0
        return -sum(share * math.log(share) for share in self.shares if share) / math.log(len(self.counts))

    @property
    def busiest(self) -> int:
        """The expert that ran for most tokens."""
        return self.experts[self.counts.index(max(self.counts))]

    @property
    def idlest(self) -> int:
        """The expert that ran for fewest tokens."""
        return self.experts[self.counts.index(min(self.counts))]


@dataclass(frozen=True)
class Row:
    """A checkpoint, or a plan on the first one.

    Args:
        name: what the tables call it.
        source: folder or hub id of the checkpoint that was measured.
        plan: the plan in force. Then `weight_bytes` and `peak_bytes` are computed: those of the checkpoint that the
            plan would be exported to, that is, `peak_bytes` is measured on the patched full model, less the experts
            that the plan does not keep.
        experts: number of experts of each MoE layer.
        parameters: of the model.
        active_parameters: those that a token uses: all but the experts that do not run for it; the mean, where experts
            are skipped. None: unknown, as the model's experts have no interface that moeopt knows.
        weight_bytes: of the parameters in memory.
        peak_bytes: memory at its peak, weights included, in the profile's largest setting.
        dtype: of the first parameter.
        devices: where the weights are.
        loads: the load of each MoE layer; empty where there is none that can be seen.
        without_loads: why not.
        speeds: one a setting.
    """

    name: str
    source: str
    plan: Plan | None
    experts: tuple[int, ...]
    parameters: int
    active_parameters: int | None
    weight_bytes: int
    peak_bytes: int
    dtype: str
    devices: tuple[str, ...]
    loads: tuple[LayerLoad, ...]
    without_loads: str | None
    speeds: tuple[Speed, ...]

    @property
    def computed(self) -> bool:
        """Whether `weight_bytes` and `peak_bytes` are computed rather than measured."""
        return self.plan is not None

    @property
    def active_experts(self) -> float | None:
        """Experts run per token, mean over tokens and layers; None without loads."""
        return statistics.fmean(load.active for load in self.loads) if self.loads else None


@dataclass(frozen=True)
class Profile(Shown):
    """Models side by side; the first row is what the others are held against.

    Args:
        rows: one a model or plan.
        settings: what was timed.
        new_tokens: steps of decoding.
        repeats: how often each was timed.
        resident: whether all models were in memory at once and took turns in each setting; otherwise each was loaded
            again in each repeat.
        tokens: which token ids were used.
        machine: threads, devices, versions.
    """

    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    new_tokens: int
    repeats: int
    resident: bool
    tokens: Mapping[str, Any]
    machine: Mapping[str, Any]

    @property
    def largest(self) -> Setting:
        """The setting in which peak memory is measured."""
        return largest(self.settings)

    def rate(self, row: Row, setting: Setting, part: Part) -> float:
        """Median tokens per second, all prompts of the batch together."""
        return self._tokens(setting, part) / statistics.median(self._seconds(row, setting, part))

    def ratio(self, row: Row, setting: Setting, part: Part) -> Ratio:
        """The row's speed over the first row's, each repeat held against the same repeat; above 1 is faster."""
        first, others = (self._seconds(each, setting, part) for each in (self.rows[0], row))
        return Ratio.of([theirs / mine for theirs, mine in zip(first, others)])

    def _tokens(self, setting: Setting, part: Part) -> int:
        return setting.batch * (setting.prompt_length if part == "prefill" else self.new_tokens)

    @staticmethod
    def _seconds(row: Row, setting: Setting, part: Part) -> tuple[float, ...]:
        speed = next(speed for speed in row.speeds if speed.setting == setting)
        return speed.prefill if part == "prefill" else speed.decode


def largest(settings: Sequence[Setting]) -> Setting:
    """The setting of most tokens."""
    return max(settings, key=lambda setting: (setting.batch * setting.prompt_length, setting.batch))
