"""Progress bars: on standard error, and only for work that takes longer than two seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 2.0


def drawn(console: Console, *, transient: bool = False) -> Progress:
    """How all bars look: description, bar, count, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )


class Bar:
    """Counts finished work, shows itself once two seconds have passed and more is to come, and goes when closed.

    It needs a terminal or a notebook: in a file, where nothing can be redrawn, it stays hidden.
    """

    def __init__(self, what: str, total: int | None, show: bool) -> None:
        console = Console(stderr=True)
        # Made now, so that a bar that appears later has counted all the time.
        self._progress = drawn(console, transient=True)
        self._task = self._progress.add_task(what, total=total)
        self._began = time.perf_counter()
        self._may_show = show and (console.is_interactive or console.is_jupyter)
        self._shown = False

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self._progress.advance(self._task, steps)
        late = time.perf_counter() - self._began > SECONDS
        if self._may_show and not self._shown and late and not self._progress.finished:
            self._shown = True
            self._progress.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._shown:
            self._progress.stop()


@contextmanager
def bar(what: str, total: int | None, *, show: bool = True) -> Iterator[Bar]:
    """A bar for `total` steps of work; None where nobody knows how many."""
    made = Bar(what, total, show)
    try:
        yield made
    finally:
        made.close()
