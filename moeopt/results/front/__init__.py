"""The front of a study: trials that no other beats in all objectives, on search and on dev, beside one-shot plans.

It may import rooms up to `study` and `exporting`. Without dev nothing of it loads a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeopt.lazily import homes, lazily

__all__ = ["Front", "Point", "Uniform", "front_of", "uniform_of"]

if TYPE_CHECKING:
    from moeopt.results.front.making import front_of
    from moeopt.results.front.result import Front, Point
    from moeopt.results.front.uniform import Uniform, uniform_of

__getattr__ = lazily(__name__, homes(making="front_of", result="Front Point", uniform="Uniform uniform_of"))
