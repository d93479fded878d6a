"""Optimisers as Optuna samplers over moeopt's spaces, one file each. May import plan/, trials/ and spaces/."""

from moeopt.samplers.base import GenomeSampler, Proposal, StartingSampler
from moeopt.samplers.blockcmaes import BlockCMAESSampler
from moeopt.samplers.cmaes import CMAESSampler
from moeopt.samplers.eep import EEPSampler
from moeopt.samplers.guided import GuidedSampler
from moeopt.samplers.history import Observation
from moeopt.samplers.local import LocalSampler
from moeopt.samplers.nevergrad import NevergradSampler
from moeopt.samplers.optunas import GPSampler, NSGAIIISampler, NSGASampler, TPESampler
from moeopt.samplers.random import RandomSampler
from moeopt.samplers.refusing import UnknownSampler
from moeopt.samplers.registry import SAMPLERS, from_settings, get, operators
from moeopt.samplers.shadow import ShadowSampler

__all__ = [
    "SAMPLERS",
    "BlockCMAESSampler",
    "CMAESSampler",
    "EEPSampler",
    "GPSampler",
    "GenomeSampler",
    "GuidedSampler",
    "LocalSampler",
    "NSGAIIISampler",
    "NSGASampler",
    "NevergradSampler",
    "Observation",
    "Proposal",
    "RandomSampler",
    "ShadowSampler",
    "StartingSampler",
    "TPESampler",
    "UnknownSampler",
    "from_settings",
    "get",
    "operators",
]
