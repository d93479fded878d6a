"""How what is public goes: one warning that says since when, when it is gone, and what to use."""

from __future__ import annotations

import warnings


def deprecated(what: str, use: str, *, since: str, until: str, stacklevel: int = 2) -> None:
    """Warn of a former way to call something; called by the public function that still takes it.

    The warning is a FutureWarning, which Python shows to everybody. A test fails once `until` is the version at hand,
    so that what was promised to go is taken out.

    Args:
        what: the former way, as in "optimize(trials=)".
        use: what to write instead, as in "n_trials=".
        since: the version of moeopt that first warned.
        until: the first version that does not take it any more.
        stacklevel: as of `warnings.warn`, counted from the caller: 2 is whoever called the public function.
    """
    warnings.warn(
        f"{what} is deprecated since moeopt {since} and is gone in {until}: use {use}",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )
