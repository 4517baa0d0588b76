"""HTML for notebooks: one look for everything that is shown, with no script, no style sheet and nothing from a network.

Text inherits the page's colour and grounds are thin, so that it reads on light and on dark pages alike. All text is
escaped here: what is not `Markup` already is text.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

_LINE = "1px solid rgba(128,128,128,.3)"
_CELL = "text-align:left;vertical-align:top;padding:1px 14px 1px 0;border:0"
_LONGEST = 120


def printable(text: str) -> str:
    """Text in which whatever does not print (line breaks, direction marks, half-decoded bytes) is an escape, such as
    \\n."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def quoted(text: str) -> str:
    """A text in one line: in quotes, with escapes for what does not print."""
    return f'"{printable(text)}"'


def shown(value: object) -> Markup:
    """A value as HTML: markup as it is, anything else as escaped text."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def brief(value: Any) -> str:
    """A value in a few words: tensors and arrays by type and shape, anything else by its repr, cut if it is long."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    first, *more = repr(value).splitlines() or [""]
    return shortened(first + " …" * bool(more))


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Text, cut if it is long."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def told(name: str, parts: Mapping[str, Any]) -> str:
    """A repr of one line: the name, and each part in a few words."""
    return f"{name}({', '.join(f'{part}={brief(value)}' for part, value in parts.items())})"


def says(value: object) -> str:
    """What the first sentence of its class's docstring says that it is."""
    first = (inspect.getdoc(type(value)) or "").split("\n\n")[0].split(". ")[0]
    return first.replace("\n", " ").replace("`", "").rstrip(".")


def size(n_bytes: int) -> str:
    """Such as "1.5 MB"."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= one:
            return f"{n_bytes / one:.3g} {unit}"
    return f"{n_bytes} B"


def faded(value: object) -> Markup:
    """Less important than what is around it."""
    return Markup('<span style="opacity:.65">{}</span>').format(shown(value))


def strong(value: object) -> Markup:
    """What the eye should find first."""
    return Markup("<b>{}</b>").format(shown(value))


def code(value: object) -> Markup:
    """In a font for code."""
    return Markup('<span style="font-family:monospace;white-space:pre-wrap">{}</span>').format(shown(value))


def chip(value: object, colour: str, *, title: str = "", more: str = "") -> Markup:
    """Text on a ground of its own; `title` is shown when pointing at it."""
    hint = Markup(' title="{}"').format(shown(title)) if title else Markup()
    style = f"background:{colour};border-radius:3px;padding:1px 0;margin-right:1px;{more}"
    return Markup('<span{} style="{}">{}</span>').format(hint, style, shown(value))


def lines(values: Iterable[object]) -> Markup:
    """One below the other."""
    return Markup("<br>").join(map(shown, values))


def facts(rows: Mapping[str, object]) -> Markup:
    """Names and what they are, one a line."""
    body = Markup().join(
        Markup('<tr style="background:none"><td style="{}">{}</td><td style="{}">{}</td></tr>').format(
            f"{_CELL};white-space:nowrap", faded(name), _CELL, shown(value)
        )
        for name, value in rows.items()
    )
    return Markup('<table style="border-collapse:collapse;margin:2px 0">{}</table>').format(body)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table with a line under its header; numbers are set flush right."""
    kept = [list(row) for row in rows]
    right = [bool(kept) and all(isinstance(row[at], int | float) for row in kept) for at in range(len(header))]

    def styled(at: int, more: str = "") -> str:
        return _CELL.replace("left", "right" if right[at] else "left", 1) + more

    def cell(value: object) -> object:
        return f"{value:.4g}" if isinstance(value, float) else value

    head = Markup().join(
        Markup('<th style="{}">{}</th>').format(styled(at, f";border-bottom:{_LINE}"), shown(name))
        for at, name in enumerate(header)
    )
    body = Markup().join(
        Markup('<tr style="background:none">{}</tr>').format(
            Markup().join(
                Markup('<td style="{}">{}</td>').format(styled(at), shown(cell(value))) for at, value in enumerate(row)
            )
        )
        for row in kept
    )
    return Markup(
        '<table style="border-collapse:collapse;margin:4px 0"><thead><tr style="background:none">{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(head, body)


def link(path: Path, text: object) -> Markup:
    """A link to a file, relative to the working directory where it lies in it: notebooks serve files next to them."""
    here = path.resolve()
    with suppress(ValueError):
        here = here.relative_to(Path.cwd())
    href = here.as_uri() if here.is_absolute() else quote(here.as_posix())
    return Markup('<a href="{}" target="_blank">{}</a>').format(href, shown(text))


def details(summary: object, *parts: object) -> Markup:
    """Parts that unfold."""
    return Markup('<details style="margin-top:4px"><summary style="cursor:pointer">{}</summary>{}</details>').format(
        faded(summary), Markup().join(map(shown, parts))
    )


def card(title: object, *parts: object, about: object = "") -> str:
    """What `_repr_html_` gives: a title, a word about it, and parts below one another."""
    said = Markup(" {}").format(faded(about)) if about else Markup()
    body = Markup().join(Markup("<div>{}</div>").format(shown(part)) for part in parts)
    return str(
        Markup('<div style="line-height:1.5;margin:2px 0"><div><b>{}</b>{}</div>{}</div>').format(
            shown(title), said, body
        )
    )
