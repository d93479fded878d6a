"""Optimisers as Optuna samplers over moeopt's spaces."""

from moeopt.samplers.base import GenomeSampler, Proposal, Told
from moeopt.samplers.cmaes import CMAESSampler
from moeopt.samplers.eep import EEPSampler
from moeopt.samplers.nevergrad import NevergradSampler
from moeopt.samplers.random import RandomSampler
from moeopt.samplers.registry import SAMPLERS, get
from moeopt.samplers.shadow import ShadowSampler, TPESampler

__all__ = [
    "SAMPLERS",
    "CMAESSampler",
    "EEPSampler",
    "GenomeSampler",
    "NevergradSampler",
    "Proposal",
    "RandomSampler",
    "ShadowSampler",
    "TPESampler",
    "Told",
    "get",
]
