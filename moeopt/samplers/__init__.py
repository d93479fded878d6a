"""Optimisers as Optuna samplers over moeopt's spaces."""

from moeopt.samplers.base import GenomeSampler, Proposal, Told
from moeopt.samplers.blockcmaes import BlockCMAESSampler
from moeopt.samplers.cmaes import CMAESSampler
from moeopt.samplers.eep import EEPSampler
from moeopt.samplers.local import LocalSampler
from moeopt.samplers.nevergrad import NevergradSampler
from moeopt.samplers.random import RandomSampler
from moeopt.samplers.registry import SAMPLERS, from_settings, get
from moeopt.samplers.shadow import ShadowSampler, TPESampler

__all__ = [
    "SAMPLERS",
    "BlockCMAESSampler",
    "CMAESSampler",
    "EEPSampler",
    "GenomeSampler",
    "LocalSampler",
    "NevergradSampler",
    "Proposal",
    "RandomSampler",
    "ShadowSampler",
    "TPESampler",
    "Told",
    "from_settings",
    "get",
]
