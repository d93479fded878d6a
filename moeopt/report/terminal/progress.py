"""What is shown while something runs: one live line, or where there is no terminal a line now and then."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from moeopt.showing import line
from moeopt.trials.genome import ESTIMATE

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from rich.console import Console

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw on."""


class SearchProgress:
    """An Optuna callback that shows trial, phase, loss, best and time left: one live line, or a line now and then.

    Args:
        console: where to draw; the live line vanishes at the end.
        trials: finished trials the study shall hold, for the time left; None when it is not known.
        timeout: seconds this run may take.
        quiet: show nothing.
    """

    def __init__(
        self, console: Console, trials: int | None, timeout: float | None = None, *, quiet: bool = False
    ) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console, self.trials, self.timeout, self.quiet = console, trials, timeout, quiet
        text = TextColumn("{task.description}", markup=False)
        self.live = Progress(SpinnerColumn(), BarColumn(20), text, console=console, transient=True)
        self.bar = self.live.add_task("first trial", total=trials)
        self.before: int | None = None
        self.started = self.since = time.monotonic()
        self.shown = -LINE_EVERY

    def __enter__(self) -> SearchProgress:
        if self.console.is_terminal and not self.quiet:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal and not self.quiet:
            self.live.stop()

    def say(self, line: str) -> None:
        """A line above the live one."""
        self.console.print(line, style="yellow", markup=False, soft_wrap=True)

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        from moeopt.study import finished

        if self.quiet:
            return
        done = finished(study)
        if self.before is None:
            self.before, spent = done - 1, trial.duration
            self.since = time.monotonic() - (spent.total_seconds() if spent else 0.0)
        if trial.state.name == "FAIL":
            reason = trial.user_attrs.get("failure", "its loss is not a number")
            self.say(f"trial {trial.number} failed: {line(reason, 1000)}")
        text = self.line(study, trial, done)
        if self.console.is_terminal:
            self.live.update(self.bar, completed=done, description=text)
        elif time.monotonic() - self.shown >= LINE_EVERY or done == self.trials:
            self.shown = time.monotonic()
            self.console.print(text, markup=False, soft_wrap=True)

    def line(self, study: optuna.Study, trial: FrozenTrial, done: int) -> str:
        from moeopt.study import best_trial

        best = best_trial(study)
        parts = [
            f"trial {done}" + (f"/{self.trials}" if self.trials else ""),
            line(trial.user_attrs.get("phase") or trial.user_attrs.get("operator") or "", 40),
            _outcome(trial),
            f"best {best.value:.4f} (trial {best.number})" if best is not None else "",
            f"{timedelta(seconds=round(left))} left" if (left := self.left(done)) is not None else "",
        ]
        return " · ".join(part for part in parts if part)

    def left(self, done: int) -> float | None:
        """Seconds until the trials or the time are used up, whichever is first."""
        elapsed = time.monotonic() - self.started
        limits = [] if self.timeout is None else [max(0.0, self.timeout - elapsed)]
        if self.trials is not None:
            searched = time.monotonic() - self.since
            limits.append(searched / max(1, done - (self.before or 0)) * max(0, self.trials - done))
        return min(limits, default=None)


def _outcome(trial: FrozenTrial) -> str:
    if trial.state.name == "PRUNED":
        estimate = trial.user_attrs.get(ESTIMATE)
        return f"pruned, about {estimate:.4f}" if isinstance(estimate, float) else "pruned"
    return "failed" if trial.value is None else f"loss {trial.value:.4f}"


class Steps:
    """How many steps are done: one live line, or where there is no terminal a line now and then."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.shown = console, time.monotonic()
        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self.live = Progress(*columns, console=console, transient=True)
        self.bar = self.live.add_task("")

    def __enter__(self) -> Steps:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.console.is_terminal:
            self.live.update(self.bar, completed=done, total=total, description=what)
        elif time.monotonic() - self.shown >= LINE_EVERY:
            self.shown = time.monotonic()
            self.console.print(f"{done} of {total} steps · {what}", markup=False, soft_wrap=True)
