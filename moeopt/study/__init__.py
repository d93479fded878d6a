"""Studies: create, resume, reclaim, run."""

from moeopt.description import DESCRIPTION
from moeopt.genome import CALIBRATION, METHOD, WARM_START
from moeopt.study.checks import MAY_DIFFER, check_same, check_study, description_of, differences_of
from moeopt.study.creating import COMMAND, create_study, summary
from moeopt.study.opening import load_study, space_of
from moeopt.study.progress import best_trial, finished, stalled
from moeopt.study.reclaiming import reclaim
from moeopt.study.running import LONGEST_LOOK, Callback, check_limits, optimize
from moeopt.study.warm_starts import WarmStarts, check_expressible, enqueue

__all__ = [
    "CALIBRATION",
    "COMMAND",
    "DESCRIPTION",
    "LONGEST_LOOK",
    "MAY_DIFFER",
    "METHOD",
    "WARM_START",
    "Callback",
    "WarmStarts",
    "best_trial",
    "check_expressible",
    "check_limits",
    "check_same",
    "check_study",
    "create_study",
    "description_of",
    "differences_of",
    "enqueue",
    "finished",
    "load_study",
    "optimize",
    "reclaim",
    "space_of",
    "stalled",
    "summary",
]
