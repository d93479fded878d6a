"""Studies: create, resume, reclaim, run."""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.spaces import space_of
    from moeopt.study.checks import check_goes_on, check_study, description_of
    from moeopt.study.creating import COMMAND, create_study
    from moeopt.study.foreign import foreign_trials
    from moeopt.study.opening import check_name, find, load_study, read_study
    from moeopt.study.progress import best_trial, finished, stalled
    from moeopt.study.reclaiming import reclaim
    from moeopt.study.running import LONGEST_LOOK, Callback, check_limits, optimize
    from moeopt.study.warm_starts import WarmStarts, automatic, check_expressible, enqueue
    from moeopt.trials.description import DESCRIPTION, MAY_DIFFER, check_same, differences_of, summary
    from moeopt.trials.genome import CALIBRATION, METHOD, WARM_START

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
    "automatic",
    "best_trial",
    "check_expressible",
    "check_goes_on",
    "check_limits",
    "check_name",
    "check_same",
    "check_study",
    "create_study",
    "description_of",
    "differences_of",
    "enqueue",
    "find",
    "finished",
    "foreign_trials",
    "load_study",
    "optimize",
    "read_study",
    "reclaim",
    "space_of",
    "stalled",
    "summary",
]

__getattr__ = lazily(
    __name__,
    {
        "CALIBRATION": "moeopt.trials.genome",
        "COMMAND": "creating",
        "Callback": "running",
        "DESCRIPTION": "moeopt.trials.description",
        "LONGEST_LOOK": "running",
        "MAY_DIFFER": "moeopt.trials.description",
        "METHOD": "moeopt.trials.genome",
        "WARM_START": "moeopt.trials.genome",
        "WarmStarts": "warm_starts",
        "automatic": "warm_starts",
        "best_trial": "progress",
        "check_expressible": "warm_starts",
        "check_goes_on": "checks",
        "check_limits": "running",
        "check_name": "opening",
        "check_same": "moeopt.trials.description",
        "check_study": "checks",
        "create_study": "creating",
        "description_of": "checks",
        "differences_of": "moeopt.trials.description",
        "enqueue": "warm_starts",
        "find": "opening",
        "finished": "progress",
        "foreign_trials": "foreign",
        "load_study": "opening",
        "optimize": "running",
        "read_study": "opening",
        "reclaim": "reclaiming",
        "space_of": "moeopt.spaces",
        "stalled": "progress",
        "summary": "moeopt.trials.description",
    },
)
