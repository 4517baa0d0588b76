"""Progress bars: only for work that takes longer than two seconds, on standard error or below a notebook's cell."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from markupsafe import Markup
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mechsteer import markup

SECONDS = 2.0
# Between two drawings in a notebook, each of which is a message to the page.
_PAUSE = 0.1


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


class _Region:
    """Where the bars that are open at one time are drawn, one below the other."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.notebook = console.is_jupyter
        self.can_draw = console.is_interactive or console.is_jupyter
        self.progress = drawn(console, transient=True)
        self.bars: list[Bar] = []
        self._display: _Display | None = None
        self._live = False

    def refresh(self, *, force: bool = False) -> None:
        """Draw what is to be seen now."""
        if self.notebook:
            self._display = self._display or _Display()
            self._display.draw([task for task in self.progress.tasks if task.visible], force=force)
        elif not self._live:
            self._live = True
            self.progress.start()

    def finish(self, last: Task) -> None:
        """The last bar was closed: nothing stays in a terminal, and one line in a notebook."""
        if self._display is not None:
            self._display.finish(last)
        elif self._live:
            self.progress.stop()


class _Display:
    """One output of a notebook, drawn over again; plain HTML, so that it needs no widgets and is kept with the notebook
    as one line."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)
        self._drawn = -_PAUSE

    def draw(self, tasks: list[Task], *, force: bool) -> None:
        now = time.perf_counter()
        if force or now - self._drawn >= _PAUSE:
            self._drawn = now
            self._update([_row(task) for task in tasks], "; ".join(map(_said, tasks)))

    def finish(self, task: Task) -> None:
        text = f"{_said(task)}{'' if task.finished or task.total is None else ', stopped'}"
        self._update([markup.faded(text)], text)

    def _update(self, rows: list[Markup], text: str) -> None:
        html = Markup("").join(Markup('<div style="font-family:monospace">{}</div>').format(row) for row in rows)
        if self._handle is not None:
            self._handle.update({"text/html": str(html), "text/plain": text}, raw=True)


def _said(task: Task) -> str:
    """Such as "cells 3/10, 0:12"."""
    count = f"{task.completed:g}" + ("" if task.total is None else f"/{task.total:g}")
    return f"{task.description} {count}, {_clock(task.elapsed)}"


def _row(task: Task) -> Markup:
    """A bar as HTML, of grounds that show on light and on dark pages."""
    share = 0.0 if task.total is None else task.percentage
    left = "" if task.time_remaining is None else f", {_clock(task.time_remaining)} left"
    return Markup(
        '<span style="display:inline-block;vertical-align:middle;width:200px;height:8px;margin-right:10px;'
        'border-radius:4px;background:rgba(128,128,128,.3)"><span style="display:block;height:8px;border-radius:4px;'
        'background:rgb(40,120,230);width:{:.1f}%"></span></span>{}'
    ).format(share, markup.shown(_said(task) + left))


def _clock(seconds: float | None) -> str:
    minutes, rest = divmod(int(seconds or 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


# Of the bars that are open now; a bar inside another joins it.
_open: list[_Region] = []


class Bar:
    """Counts finished work, shows itself once two seconds have passed and more is to come, and goes when closed.

    It needs a terminal or a notebook: in a file, where nothing can be redrawn, it stays hidden. Bars inside one another
    are drawn together. In a notebook one line stays, which says how much was done in what time.
    """

    def __init__(self, what: str, total: int | None, show: bool) -> None:
        self._region = _open[-1] if _open else _Region()
        if not _open:
            _open.append(self._region)
        self._region.bars.append(self)
        # Made now, so that a bar that appears later has counted all the time.
        self._task = self._region.progress.add_task(what, total=total, visible=False)
        self._began = time.perf_counter()
        self._may_show = show and self._region.can_draw

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self._region.progress.advance(self._task, steps)
        if not self._may_show:
            return
        if not self._state.visible and not self._state.finished:
            for bar in self._region.bars:  # those around this one are as late
                bar._appear()
        if self._state.visible:
            self._region.refresh(force=self._state.finished)

    def close(self) -> None:
        """Take the bar away."""
        region, last = self._region, self._state
        if self not in region.bars:
            return
        region.bars.remove(self)
        if region.bars:
            region.progress.remove_task(self._task)
        else:
            _open.remove(region)
            region.finish(last)

    @property
    def _state(self) -> Task:
        return self._region.progress.tasks[self._region.progress.task_ids.index(self._task)]

    def _appear(self) -> None:
        if self._may_show and time.perf_counter() - self._began > SECONDS:
            self._region.progress.update(self._task, visible=True)


@contextmanager
def bar(what: str, total: int | None, *, show: bool = True) -> Iterator[Bar]:
    """A bar for `total` steps of work; None where nobody knows how many."""
    made = Bar(what, total, show)
    try:
        yield made
    finally:
        made.close()
