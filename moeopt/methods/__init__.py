"""One-shot methods of the literature: calibration data in, one `Plan` out."""

from moeopt.methods.base import Method, Wanted
from moeopt.methods.calibration import Calibration, Seen
from moeopt.methods.registry import METHODS, Found, get, plan, plans
from moeopt.methods.skipping import skipping

__all__ = ["METHODS", "Calibration", "Found", "Method", "Seen", "Wanted", "get", "plan", "plans", "skipping"]
