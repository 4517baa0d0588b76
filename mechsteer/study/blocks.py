"""What a chapter of the report is made of.

All texts are plain text, which the report's template escapes. Only a `View` holds HTML, that of `mechsteer.plots`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mechsteer.errors import MechsteerError

Cell = str | int | float | None
"""Of a table: text as it is, numbers to four digits, None as a dash."""


@dataclass(frozen=True)
class Source:
    """How numbers of a block are made again: two pieces of Python that end in the same numbers.

    Attributes:
        name: of the place in the report, within its chapter: letters, digits, "_" and "-".
        title: which numbers.
        load: reads them; `study` is the loaded study.
        measure: measures them anew; `study` is the loaded study, `case` is `study.case()`.
    """

    name: str
    title: str
    load: str
    measure: str

    def loading(self, folder: str) -> str:
        """Lines that read the numbers in a fresh interpreter."""
        return _program(folder, self.load)

    def measuring(self, folder: str) -> str:
        """Lines that measure them in a fresh interpreter."""
        return _program(folder, self.measure, "case = study.case()")


def _program(folder: str, code: str, *setup: str) -> str:
    """Imports, the study, and the code."""
    head, _, body = code.partition("\n\n") if code.startswith(("from ", "import ")) else ("", "", code)
    while body.startswith(("from ", "import ")):  # the standard library's and others' come in two paragraphs
        more, _, body = body.partition("\n\n")
        head = f"{head}\n\n{more}"
    imports = f"{head}\nfrom mechsteer.study import load" if head else "from mechsteer.study import load"
    return "\n".join([imports, "", f"study = load({folder!r})", *setup, body])


def _sources() -> Any:
    return field(default=(), kw_only=True, repr=False)


@dataclass(frozen=True)
class Paragraph:
    """Sentences. The first one of a chapter says what came out: it also stands at the head of the report."""

    text: str


@dataclass(frozen=True)
class Heading:
    """Of a part of a chapter."""

    text: str


@dataclass(frozen=True)
class Cards:
    """A few numbers to read at a glance: (label, value, note). Those of each chapter are also shown in the terminal.

    Cards([("answers about cats", "94 %", "with the prefix, n = 18"), ...])
    """

    cards: Sequence[tuple[str, str, str]]
    sources: Sequence[Source] = _sources()


@dataclass(frozen=True)
class Table:
    """Rows under a header; a column of numbers is set flush right.

    Raises:
        MechsteerError: a row has another number of cells than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    sources: Sequence[Source] = _sources()

    def __post_init__(self) -> None:
        _check_rows(self.header, self.rows, "Table")


@dataclass(frozen=True)
class Columns:
    """Texts side by side, such as one request's completions: a row for each request, a column for each condition.

    Attributes:
        header: of the columns; the first one names what the rows are.
        rows: texts of several lines.
        words: are marked where they stand as whole words, whatever their case.
        shown: rows to show at once; the others unfold.

    Raises:
        MechsteerError: a row has another number of texts than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: Sequence[str] = ()
    shown: int = 6
    sources: Sequence[Source] = _sources()

    def __post_init__(self) -> None:
        _check_rows(self.header, self.rows, "Columns")


@dataclass(frozen=True)
class Figure:
    """A plotly figure. Its width follows the page; its colours follow light and dark.

    Attributes:
        figure: a `plotly.graph_objects.Figure`; texts from a model or a user in it went through `plots.plain`.
        height: in pixels; None takes the figure's own, or 380.
    """

    figure: Any = field(repr=False)
    caption: str = ""
    height: int | None = None
    sources: Sequence[Source] = _sources()


@dataclass(frozen=True)
class View:
    """An interactive drawing of CircuitsVis, as `mechsteer.plots` makes it."""

    view: Any = field(repr=False)
    caption: str = ""
    height: int | None = None
    sources: Sequence[Source] = _sources()


@dataclass(frozen=True)
class Details:
    """Blocks that unfold under a line, for what only some readers want: how it was measured, all rows of a table."""

    summary: str
    blocks: Sequence["Block"]


Block = Paragraph | Heading | Cards | Table | Columns | Figure | View | Details


def _check_rows(header: Sequence[str], rows: Sequence[Sequence[Any]], what: str) -> None:
    for place, row in enumerate(rows):
        if len(row) != len(header):
            raise MechsteerError(
                f"{what} got {len(row)} cells in row {place} and {len(header)} in its header. Give as many."
            )
