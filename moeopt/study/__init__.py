"""Studies: the objective, the recipe, create, load, run. Imports `samplers`, `methods`, `study.storage` and below."""

from typing import TYPE_CHECKING

from moeopt.lazily import lazily

if TYPE_CHECKING:
    from moeopt.spaces import space_of
    from moeopt.study.checks import check_goes_on, check_study, description_of
    from moeopt.study.creating import create_study, serving_demands
    from moeopt.study.foreign import foreign_trials
    from moeopt.study.needs import needs_of
    from moeopt.study.opening import check_name, find, load_study, read_study
    from moeopt.study.progress import best_trial, best_trials, finished, stalled
    from moeopt.study.reclaiming import reclaim
    from moeopt.study.running import LONGEST_LOOK, Callback, check_limits, optimize
    from moeopt.study.tracking import Tracking
    from moeopt.study.warm_starts import WarmStarts, automatic, check_expressible, enqueue
    from moeopt.trials.description import COMMAND, DESCRIPTION, MAY_DIFFER, check_same, differences_of, summary
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
    "Tracking",
    "WarmStarts",
    "automatic",
    "best_trial",
    "best_trials",
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
    "needs_of",
    "optimize",
    "read_study",
    "reclaim",
    "serving_demands",
    "space_of",
    "stalled",
    "summary",
]

_HOMES = {
    "moeopt.spaces": ("space_of",),
    "moeopt.trials.description": ("COMMAND", "DESCRIPTION", "MAY_DIFFER", "check_same", "differences_of", "summary"),
    "moeopt.trials.genome": ("CALIBRATION", "METHOD", "WARM_START"),
    "checks": ("check_goes_on", "check_study", "description_of"),
    "creating": ("create_study", "serving_demands"),
    "foreign": ("foreign_trials",),
    "needs": ("needs_of",),
    "opening": ("check_name", "find", "load_study", "read_study"),
    "progress": ("best_trial", "best_trials", "finished", "stalled"),
    "reclaiming": ("reclaim",),
    "running": ("LONGEST_LOOK", "Callback", "check_limits", "optimize"),
    "tracking": ("Tracking",),
    "warm_starts": ("WarmStarts", "automatic", "check_expressible", "enqueue"),
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
