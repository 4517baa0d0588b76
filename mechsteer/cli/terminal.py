"""What commands write to: people's consoles, and the one JSON document for machines."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mechsteer.cli.options import plain


def out() -> Console:
    """Standard output."""
    return Console()


def err() -> Console:
    """Standard error: progress and mistakes."""
    return Console(stderr=True)


def status(what: str, *, quiet: bool = False) -> AbstractContextManager[Any]:
    """A spinner on standard error."""
    return nullcontext() if quiet else err().status(what)


class _Lines(logging.Handler):
    """Records as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        err().print(Text(f"  {record.getMessage()}"), style="dim")


@contextmanager
def logged(name: str, *, quiet: bool = False) -> Iterator[None]:
    """Inside, what a logger of this name tells is shown on standard error: with `quiet` only warnings."""
    log, handler = logging.getLogger(name), _Lines(logging.WARNING if quiet else logging.INFO)
    before = log.level, log.propagate
    log.setLevel(handler.level)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


@contextmanager
def for_machines(json: bool) -> Iterator[None]:
    """With `json` whatever is printed meanwhile goes to standard error: standard output is for the document alone."""
    if not json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def document(value: Any) -> None:
    """Print JSON. In ASCII, which every terminal and pipe takes, also halves of characters that tokens can be."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def say(parts: Iterable[RenderableType], *, whole: bool = False) -> None:
    """Print texts and tables.

    Args:
        parts: in this order.
        whole: leave it to the terminal to break texts, so that they can be copied from.
    """
    console = out()
    for part in parts:
        console.print(part, soft_wrap=whole and isinstance(part, Text), highlight=False)


def table(
    columns: Iterable[str], rows: Iterable[Iterable[Any]], *, numbers: Iterable[str] = (), whole: Iterable[str] = ()
) -> Table:
    """A table whose texts stand as they are.

    Args:
        columns: their names.
        rows: texts and numbers.
        numbers: columns that are set flush right and never broken.
        whole: others that are never broken.
    """
    flush = set(numbers)
    made = Table()
    for name in columns:
        justify = "right" if name in flush else "left"
        made.add_column(Text(name), justify=justify, no_wrap=name in {*flush, *whole}, overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and their values, without lines."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(value))
    return made
