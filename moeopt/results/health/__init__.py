"""Whether a model under a plan still answers as the full one does: generated answers, both to the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = ["LIMITS", "MEASURES", "NEW_TOKENS", "PROMPTS", "Answer", "Health", "HealthCheck", "Measure"]

if TYPE_CHECKING:
    from moeopt.results.health.answers import LIMITS, MEASURES, NEW_TOKENS, PROMPTS, Answer, Health, Measure
    from moeopt.results.health.check import HealthCheck

__getattr__ = lazily(
    __name__, homes(answers="LIMITS MEASURES NEW_TOKENS PROMPTS Answer Health Measure", check="HealthCheck")
)
"""A report can be shown without torch."""
