"""The report: one HTML file that holds everything it shows and asks no address for anything."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from mechsteer.activations import ModelId
from mechsteer.plots import DARK, LIGHT, bundle
from mechsteer.study.blocks import Block, Cards, Cell, Details, Figure, Paragraph, View
from mechsteer.study.chapter import Chapter, Finished
from mechsteer.study.executive import QUESTIONS, Answer
from mechsteer.study.sentences import Sentence, prose
from mechsteer.study.settings import Settings

_FOLDER = Path(__file__).parent / "page"
_HEIGHT = 380
# In JSON inside a script: what could end it or start a comment in HTML, or a line in JavaScript.
_UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Section:
    """A chapter as the report shows it.

    Attributes:
        blocks: what it shows, without the first paragraph.
        lead: the first paragraph, which says what came out; empty where there is none.
        finished: how the findings came about; None if there are none.
        failure: why there is nothing to show, or None.
    """

    chapter: Chapter
    blocks: tuple[Block, ...]
    lead: str
    finished: Finished | None
    failure: str | None

    @staticmethod
    def of(chapter: Chapter, finished: Finished | None, failure: str | None) -> "Section":
        """Show a chapter. Whatever goes wrong in that is this chapter's failure, and not the report's."""
        blocks: list[Block] = []
        if failure is None and finished is not None:
            try:
                blocks = list(chapter.show(finished.findings))
            except Exception as error:
                failure = (
                    f"its findings cannot be shown ({type(error).__name__}: {error}). If an older mechsteer made them, "
                    f"remove chapters/{chapter.name} and run the study again."
                )
        lead = next((block for block in blocks if isinstance(block, Paragraph)), None)
        rest = tuple(block for block in blocks if block is not lead)
        return Section(chapter, rest, lead.text if lead else "", finished, failure)


def headline(sections: Sequence[Section]) -> list[tuple[str, str, str, str]]:
    """The first cards of each chapter: (chapter's title, label, value, note)."""
    rows = []
    for section in sections:
        cards = next((block.cards for block in section.blocks if isinstance(block, Cards)), ())
        rows += [(section.chapter.title, *card) for card in cards]
    return rows


def render(
    settings: Settings,
    model: ModelId,
    sections: Sequence[Section],
    *,
    commands: Mapping[str, str],
    answers: Sequence[Answer] = (),
    folder: str = "",
) -> str:
    """The report as HTML.

    Args:
        settings: of the study.
        model: name and hash of the weights.
        sections: its chapters, in order.
        commands: how to make it again: "shell" and "python".
        answers: the executive summary; chapters that have no part in it stand behind it with their first paragraph.
        folder: of the study, for code that loads it.
    """
    figures: dict[int, str] = {}
    numbers = count()

    def figure_id(block: Figure) -> int:
        number = next(numbers)
        figures[number] = safe_json(block.figure)
        return number

    anchors = {section.chapter.name: _anchors(section) for section in sections}
    known = {*anchors, *(anchor for each in anchors.values() for anchor in each.values())}
    answering = {name for parts in QUESTIONS.values() for name in parts} if answers else set()

    def link(sentence: Sentence) -> str | None:
        return next((each for each in (sentence.link, sentence.chapter) if each in known), None)

    finished = [section.finished for section in sections if section.finished is not None]
    kinds = {type(block) for section in sections for block in _flat(section.blocks)}
    html = (
        _environment()
        .get_template("report.html")
        .render(
            settings=settings,
            model=model,
            sections=sections,
            commands=commands,
            answers=answers,
            others=[section for section in sections if section.chapter.name not in answering],
            places={section.chapter.name: number for number, section in enumerate(sections, start=1)},
            titles={section.chapter.name: section.chapter.title for section in sections},
            link=link,
            anchor=lambda block: next((each[id(block)] for each in anchors.values() if id(block) in each), None),
            folder=folder,
            counts={split: len(settings.split(split)) for split in ("search", "held-out")},
            date=max((each.date for each in finished), default=""),
            seconds=sum(each.seconds for each in finished),
            devices=sorted({each.device for each in finished}),
            versions={name: version(name) for name in ("mechsteer", "torch", "transformer-lens", "transformers")},
            figure_id=figure_id,
            figures=figures,
            kind=lambda block: type(block).__name__.lower(),
            height=lambda block: block.height or block.figure.layout.height or _HEIGHT,
            least_width=_least_width,
            css=Markup(_text("report.css")),
            script=Markup(_text("report.js")),
            plotly=Markup(get_plotlyjs()) if Figure in kinds else None,
            templates=safe_json({"light": LIGHT["template"], "dark": DARK["template"]}),
            bundle=Markup(bundle()) if View in kinds else None,
        )
    )
    # Texts from half-decoded tokens can hold lone surrogates, which no file can.
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def _anchors(section: Section) -> dict[int, str]:
    """The name of each block that has sources, by the block's id: that of its first source, which the first figure or
    table with it has, and the cards only where none has it."""
    blocks = [block for block in _flat(section.blocks) if getattr(block, "sources", ())]
    found: dict[str, int] = {}
    for block in sorted(blocks, key=lambda block: isinstance(block, Cards)):
        found.setdefault(block.sources[0].name, id(block))  # type: ignore[union-attr]
    return {block: f"{section.chapter.name}-{name}" for name, block in found.items()}


def _least_width(block: Figure) -> int:
    """Below this many pixels a figure scrolls in its own box: small multiples cannot be squeezed onto a phone."""
    layout = block.figure.to_dict()["layout"]
    lefts = {round((axis.get("domain") or [0])[0], 3) for name, axis in layout.items() if name.startswith("xaxis")}
    return 160 + 160 * len(lefts) if len(lefts) > 1 else 0


def safe_json(value: Any) -> Markup:
    """JSON (of a plotly figure, or of plain values) that can stand inside a <script> element."""
    plain = value.to_dict() if hasattr(value, "to_dict") else value
    return Markup(json.dumps(_rounded(plain), cls=PlotlyJSONEncoder).translate(_UNSAFE))


def _rounded(value: Any) -> Any:
    """The same with six digits of each float: more than any screen shows, and half as long."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def marked(text: str, words: Sequence[str]) -> Markup:
    """Text with these words marked, where they stand as whole words in any case; all of it escaped."""
    if not words:
        return escape(text)
    longest_first = sorted(words, key=len, reverse=True)
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)"
    parts = re.split(pattern, text, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )


def capitalised(text: str) -> str:
    """With a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def shortened(text: str) -> str:
    """The first sentence of a caption, as a name for what it stands under."""
    return text.split(". ")[0].removesuffix(".")


def cell(value: Cell) -> str:
    """A cell of a table: text as it is, numbers to four digits, None and NaN as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    """Whether a column of a table holds numbers, and is set flush right."""
    return any(isinstance(row[column], int | float) for row in rows) and not any(
        isinstance(row[column], str) for row in rows
    )


def _flat(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, those that unfold included."""
    return [
        each for block in blocks for each in ([block, *_flat(block.blocks)] if isinstance(block, Details) else [block])
    ]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "marked": marked,
        "cell": cell,
        "prose": prose,
        "capitalised": capitalised,
        "shortened": shortened,
    }
    environment.globals |= {"numeric": numeric}
    return environment


@cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
