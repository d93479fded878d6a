"""Search spaces: numbers on one side, plans on the other. May import plan/ and trials/."""

from moeopt.spaces.active import ActiveSpace
from moeopt.spaces.base import NAMED_AT_MOST, Space
from moeopt.spaces.described import from_description, space_of
from moeopt.spaces.eep import EEPSpace
from moeopt.spaces.merge import MergeSpace
from moeopt.spaces.prune import PruneSpace
from moeopt.spaces.rows import layer_groups
from moeopt.spaces.serving import Demand, Server, demands

__all__ = [
    "NAMED_AT_MOST",
    "ActiveSpace",
    "Demand",
    "EEPSpace",
    "MergeSpace",
    "PruneSpace",
    "Server",
    "Space",
    "demands",
    "from_description",
    "layer_groups",
    "space_of",
]
