"""What a person sees of a running sweep: a table that is drawn again at each change, or a line for each where nobody watches."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_sd.config.sweep import LOSSES
from ray_sd.tune.results import Sweep, Trial

MOST_ROWS = 20
"""Trials in the table: those at work, and of the others the newest."""
LINES_AROUND = 6
"""Of a terminal, for the table's frame, its heads and what is written meanwhile."""
STYLES = {"running": "cyan", "finished": "green", "stopped": "dim", "failed": "red"}


@contextmanager
def watching() -> Iterator[None]:
    """Let `show` show this thread's sweep meanwhile."""
    watcher = Watcher()
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)
        watcher.stop()


def show(sweep: Sweep) -> None:
    """Show a sweep as it stands. A function of the module, since Tune keeps what it calls in a file."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.show(sweep)


class Watcher:
    """Follows a sweep in the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: dict[str, tuple[str, int]] = {}

    def show(self, sweep: Sweep) -> None:
        if self._live is not None:
            if not self._live.is_started:
                self._live.start()
                _follow_stderr()
            rows = min(MOST_ROWS, max(1, self._console.height - LINES_AROUND))
            self._live.update(table(sweep, rows), refresh=True)
            return
        for number, trial in enumerate(sweep.trials, start=1):
            state = (trial.status, trial.step)
            if self._told.get(trial.id) != state:
                self._told[trial.id] = state
                self._console.print(
                    f"trial {number}: {line(sweep, trial)}", soft_wrap=True, highlight=False, markup=False
                )

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            _follow_stderr()


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
"""Of the sweep under way in a thread: beside it others may go on in the same process."""


def _follow_stderr() -> None:
    """Let log lines go where errors go now: rich writes them above its table, which they would tear otherwise."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)


def table(sweep: Sweep, most_rows: int = MOST_ROWS) -> Table:
    """Trials with their settings, how far they are and what they came to; the best one marked."""
    best = sweep.best()
    counts = ", ".join(f"{count} {status}" for status, count in sweep.counts().items())
    drawn = Table(title=Text(f"{sweep.name}: {counts}"), title_justify="left", expand=False)
    drawn.add_column("", justify="right")
    for path in sweep.paths:
        drawn.add_column(path.rsplit(".", 1)[-1], justify="right")
    measured = _measured(sweep)
    for name in ("step", *measured, "minutes"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    numbered = list(enumerate(sweep.trials, start=1))
    over = [one for one in numbered if one[1].status != "running"]
    at_work = [one for one in numbered if one[1].status == "running"]
    room = max(0, most_rows - len(at_work))
    for number, trial in sorted([*over[len(over) - min(room, len(over)) :], *at_work], key=lambda one: one[0]):
        cells = (
            f"{'* ' if best is not None and trial.id == best.id else ''}{number}",
            *(_short(trial.settings.get(path)) for path in sweep.paths),
            f"{trial.step}/{sweep.max_steps}",
            *(_short(trial.last(metric)) for metric in measured),
            f"{trial.seconds / 60:.1f}",
            f"{trial.status}{f': {trial.reason}' if trial.reason else ''}",
        )
        # As it is: Rich would read `[…]` in a value or a reason as its markup.
        drawn.add_row(*map(Text, cells), style=STYLES.get(trial.status, ""))
    return drawn


def line(sweep: Sweep, trial: Trial) -> str:
    """A trial's state in one line."""
    parts = [f"{path}={_short(value)}" for path, value in trial.settings.items()]
    parts += [f"step {trial.step}/{sweep.max_steps}"] if trial.reports else []
    for metric in _measured(sweep):
        value = trial.last(metric)
        parts += [] if value is None else [f"{metric} {_short(value)}"]
    return f"{trial.status}{f' ({trial.reason})' if trial.reason else ''}: {', '.join(parts)}"


def _measured(sweep: Sweep) -> tuple[str, ...]:
    """The metrics that are shown: what counts, and where that is no loss, that of rows held out, or else that of training."""
    goals = tuple(goal.metric for goal in sweep.objectives)
    reported = {metric for trial in sweep.trials for report in trial.reports for metric in report}
    losses = [] if set(goals) & set(LOSSES) else [loss for loss in reversed(LOSSES) if loss in reported]
    return goals + tuple(losses[:1])


def _short(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
