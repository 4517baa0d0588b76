"""Sentences whose numbers are known to the last one: each piece that was measured says where it stands in the findings.

about = Telling("behaviour", findings.summary)
about.say(f"The gap is {about.two('gap', 'held-out', 'value')} nats a token.", at="cards")
about.sentences[0].text, about.sentences[0].cited
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechsteer.errors import MechsteerError
from mechsteer.study.measures import Estimate, two

Path = tuple[str | int, ...]
"""Keys and places that lead to a value in a chapter's summary."""


@dataclass(frozen=True)
class Cited:
    """A piece of a sentence that stands in the findings.

    Attributes:
        text: as the sentence has it.
        chapter: whose summary it is from.
        path: to the value in `findings.summary`.
        strong: whether it is what the sentence is about, and not its interval or a name.
    """

    text: str
    chapter: str
    path: Path
    strong: bool = False

    @property
    def code(self) -> str:
        """The expression that gives the value, where `study` is the loaded study."""
        return f"study.findings[{self.chapter!r}].summary" + "".join(f"[{step!r}]" for step in self.path)


@dataclass(frozen=True)
class Sentence:
    """One or more sentences with one source.

    Attributes:
        parts: text, and what is cited, in order.
        chapter: that it comes from; None for what is said of the study as a whole.
        at: name of the block of that chapter that shows the numbers; None for the chapter's head.
    """

    parts: tuple[str | Cited, ...]
    chapter: str | None = None
    at: str | None = None

    @property
    def text(self) -> str:
        """As it is read."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    @property
    def shown(self) -> tuple[tuple[str, Cited | None], ...]:
        """The parts as the report has them, "95 %" and "n = 18" whole, each with what it cites."""
        text, shown, at = prose(self.text), [], 0
        for part in self.parts:
            cited = part if isinstance(part, Cited) else None
            end = at + len(part.text if isinstance(part, Cited) else part)
            shown.append((text[at:end], cited))
            at = end
        return tuple(shown)

    @property
    def cited(self) -> tuple[Cited, ...]:
        """What of it stands in the findings."""
        return tuple(part for part in self.parts if isinstance(part, Cited))

    @property
    def link(self) -> str | None:
        """The place in the report that shows it."""
        return self.chapter if self.at is None else f"{self.chapter}-{self.at}"

    @property
    def as_json(self) -> dict[str, Any]:
        """For `summary.json`."""
        numbers = [{"text": each.text, "chapter": each.chapter, "path": list(each.path)} for each in self.cited]
        return {"text": self.text, "chapter": self.chapter, "link": self.link, "cited": numbers}


_MARK = re.compile("\x00([0-9]+)\x00")


@dataclass
class Telling:
    """Makes sentences from one chapter's summary, and remembers what they cite.

    Each method that gives a piece takes the path to its value. A value that is missing from the summary raises
    `KeyError`; one that does not exist as a number (None) is said to be "not defined".

    Attributes:
        chapter: its name.
        summary: `findings.summary`.
        sentences: those that were made so far.
    """

    chapter: str
    summary: Mapping[str, Any]
    sentences: list[Sentence] = field(default_factory=list)
    _cited: list[Cited] = field(default_factory=list)

    def say(self, text: str, *, at: str | None = None) -> None:
        """Add a sentence; `at` names the block that shows its numbers."""
        pieces = _MARK.split(text)
        parts = [self._cited[int(piece)] if place % 2 else piece for place, piece in enumerate(pieces)]
        self.sentences.append(Sentence(tuple(part for part in parts if part), self.chapter, at))

    # ---- what there is

    def value(self, *path: str | int) -> Any:
        """What stands at a path; not cited by this."""
        found: Any = self.summary
        for step in path:
            found = found[step]
        return found

    def estimate(self, *path: str | int) -> Estimate:
        """A number with its interval; not cited by this."""
        return Estimate.of(self.value(*path))

    def exists(self, *path: str | int) -> bool:
        """Whether an estimate is a number."""
        return math.isfinite(self.estimate(*path).value)

    # ---- pieces

    def cite(self, *path: str | int, form: Callable[[Any], str] = str, strong: bool = False) -> str:
        """A value in a form."""
        value = self.value(*path)
        undefined = value is None or (isinstance(value, float) and not math.isfinite(value))
        text = "not defined" if undefined else form(value).replace("\x00", "")
        self._cited.append(Cited(text, self.chapter, path, strong))
        return f"\x00{len(self._cited) - 1}\x00"

    def quote(self, *path: str | int) -> str:
        """A text from the model or the user, in quotes, in one line."""
        return self.cite(*path, form=repr)

    def two(self, *path: str | int) -> str:
        """A number to two digits after the point."""
        return self.cite(*path, form=two, strong=True)

    def three(self, *path: str | int) -> str:
        """A number to three digits."""
        return self.cite(*path, form=lambda value: f"{value:.3g}", strong=True)

    def whole(self, *path: str | int) -> str:
        """A number that is in percent already, without digits after the point."""
        return self.cite(*path, form=lambda value: f"{round(value) + 0:d} %", strong=True)

    def percent(self, *path: str | int) -> str:
        """A share, in percent."""
        return self.cite(*path, form=lambda value: f"{round(100 * value) + 0:d} %", strong=True)

    def interval(self, *path: str | int, percent: bool = False, zero: bool = True) -> str:
        """The interval of an estimate and its n, in brackets.

        Args:
            path: to the estimate.
            percent: whether it is a share.
            zero: say so where the interval holds 0, which means that there may be no effect.
        """
        found = self.estimate(*path)
        form = (lambda value: f"{round(100 * value) + 0:d}") if percent else two
        ends = " to ".join(self.cite(*path, end, form=form) for end in ("low", "high"))
        unit = " %" if percent else ""
        n = self.cite(*path, "n")
        if not math.isfinite(found.value):
            return f"(no interval, n = {n})"
        holds = ", which holds 0" if zero and found.low <= 0 <= found.high else ""
        return f"(95 % interval {ends}{unit}{holds}, n = {n})"


def plain(text: str) -> Sentence:
    """A sentence that cites nothing."""
    return Sentence((text,))


def listed(parts: Sequence[str]) -> str:
    """As in "a", "a and b", "a, b and c".

    Raises:
        MechsteerError: there are none.
    """
    if not parts:
        raise MechsteerError("listed got no parts. Pass at least one.")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def prose(text: str) -> str:
    """Text in which "95 %" and "n = 18" stay on one line."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bn) (?== \d)|(?<=\bn =) (?=\d)", "\u00a0", text)
