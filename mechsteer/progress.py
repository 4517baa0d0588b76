"""Progress bars: on standard error, and only for work that takes longer than two seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Counts finished work, and shows itself once two seconds have passed and more is to come."""

    def __init__(self, what: str, total: int, show: bool) -> None:
        self._what, self._total, self._show = what, total, show
        self._done = 0
        self._began = time.perf_counter()
        self._progress: Progress | None = None

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress is None and self._show and time.perf_counter() - self._began > 2 and self._done < self._total:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._progress.add_task(self._what, total=self._total)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def bar(what: str, total: int, *, show: bool = True) -> Iterator[Bar]:
    """A bar for `total` steps of work."""
    made = Bar(what, total, show)
    try:
        yield made
    finally:
        made.close()
