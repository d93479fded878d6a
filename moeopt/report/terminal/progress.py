"""What is shown while something runs: one live line; without terminal and notebook, a line now and then."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from html import escape
from typing import TYPE_CHECKING, Any, Self

from moeopt.report.terminal.terminal import consoles
from moeopt.showing import line
from moeopt.trials.description import DESCRIPTION, objective_names
from moeopt.trials.genome import ESTIMATE
from moeopt.trials.objectives import LOSS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from rich.console import Console
    from rich.progress import ProgressColumn

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw on."""
REDRAWN = 0.1
"""Seconds between two states of a notebook's line."""
KERNEL = "JPY_PARENT_PID"
"""Variable that Jupyter sets for kernels: what a cell starts with ! draws into a notebook, which gets all it draws."""


class LiveLine:
    """A line that is drawn again and again, and vanishes at the end; without a terminal, one every 10 s.

    In a notebook it is one output, redrawn in its place, which stays; that needs no ipywidgets.

    Args:
        console: where to draw; None: standard error, or the notebook.
        columns: of rich, before the text.
        last: when the last line was written, on the clock of `time.monotonic`.
        quiet: show nothing.
    """

    def __init__(self, console: Console | None, *columns: ProgressColumn, last: float, quiet: bool = False) -> None:
        from rich.progress import Progress, TextColumn

        console = consoles()[1] if console is None else console
        self.console, self.quiet, self.shown = console, quiet, last
        self.cell: Any = None
        self.missed: str | None = None
        text = TextColumn("{task.description}", markup=False)
        rate = 1 if KERNEL in os.environ else 10
        self.live = Progress(*columns, text, console=console, transient=True, refresh_per_second=rate)
        self.bar = self.live.add_task("", total=None)

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.quiet:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal and not self.quiet:
            self.live.stop()
        if self.missed is not None:
            self._redraw(self.missed, at_once=True)

    def draw(self, text: str, done: int, total: int | None, *, plain: str | None = None, at_once: bool = False) -> None:
        """Draw a text after `done` of `total`; without a terminal `plain`, if it is time or `at_once`."""
        if self.console.is_terminal:
            self.live.update(self.bar, completed=done, total=total, description=text)
        elif self.console.is_jupyter:
            bar = "" if total is None else f'<progress value="{done}" max="{total}"></progress> '
            self._redraw(f"{bar}<code>{escape(text if plain is None else plain)}</code>", at_once)
        elif at_once or time.monotonic() - self.shown >= LINE_EVERY:
            self.shown = time.monotonic()
            self.console.print(text if plain is None else plain, markup=False, soft_wrap=True)

    def _redraw(self, html: str, at_once: bool) -> None:
        from IPython.display import HTML, display

        self.missed = None
        if self.cell is None:
            self.cell = display(HTML(html), display_id=True)
        elif at_once or time.monotonic() - self.shown >= REDRAWN:
            self.cell.update(HTML(html))
        else:
            self.missed = html
            return
        self.shown = time.monotonic()


class Steps(LiveLine):
    """How many steps of something are done, as `moeopt.results.steps.Progress` is told."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
        super().__init__(console, *columns, last=time.monotonic())

    def __call__(self, done: int, total: int, what: str) -> None:
        self.draw(what, done, total, plain=f"{done} of {total} steps · {what}")


class SearchProgress(LiveLine):
    """An Optuna callback that shows trial, phase, loss, best and time left, from `with` to its end.

        with moeopt.report.terminal.SearchProgress(trials=100) as progress:
            moeopt.optimize(study, objective, n_trials=100, callbacks=[progress])

    Args:
        console: where to draw; None: standard error, or the notebook.
        trials: finished trials the study shall hold, for the time left; None when it is not known.
        timeout: seconds this run may take.
        quiet: show nothing.
    """

    def __init__(
        self,
        console: Console | None = None,
        trials: int | None = None,
        timeout: float | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        from rich.progress import BarColumn, SpinnerColumn

        super().__init__(console, SpinnerColumn(), BarColumn(20), last=-LINE_EVERY, quiet=quiet)
        self.live.update(self.bar, description="first trial", total=trials)
        self.trials, self.timeout = trials, timeout
        self.before: int | None = None
        self.started = self.since = time.monotonic()

    def say(self, text: str) -> None:
        """A line above the live one."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

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
        self.draw(self.line(study, trial, done), done, self.trials, at_once=done == self.trials)

    def line(self, study: optuna.Study, trial: FrozenTrial, done: int) -> str:
        """What is said of a trial."""
        from moeopt.study import best_trials

        best, left, several = best_trials(study), self.left(done), len(study.directions) > 1
        parts = [
            f"trial {done}" + (f"/{self.trials}" if self.trials else ""),
            line(trial.user_attrs.get("phase") or trial.user_attrs.get("operator") or "", 40),
            _outcome(trial, objective_names(study.user_attrs.get(DESCRIPTION) or {})),
            f"best {best[0].values[0]:.4f} (trial {best[0].number})" if best and not several else "",
            f"front of {len(best)}" if best and several else "",
            f"{timedelta(seconds=round(left))} left" if left is not None else "",
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


def _outcome(trial: FrozenTrial, names: Sequence[str]) -> str:
    if trial.state.name == "PRUNED":
        estimate = trial.user_attrs.get(ESTIMATE)
        return f"pruned, about {estimate:.4f}" if isinstance(estimate, float) else "pruned"
    if not trial.values:
        return "failed"
    told = zip(names, trial.values)
    return ", ".join(f"{line(name, 40)} {value:{'.4f' if name == LOSS else ',.6g'}}" for name, value in told)
