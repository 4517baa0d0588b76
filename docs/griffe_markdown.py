"""Docstrings as Markdown sees them: asterisks of shapes stay asterisks, and a list begins where its first dash is."""

import re
from typing import Any

import griffe

_LIST = re.compile(r"^(\s*)- ")


class Markdown(griffe.Extension):
    """Rewrites docstrings before they are parsed. Blocks of code, which are indented, stay as they are."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        code = line.startswith("    ") and "- " not in line[:12] and lines and not lines[-1].strip()
        if not code:
            # `[*over, prompt]` would begin an emphasis, `<Jv, u>` a tag.
            line = re.sub(r"(?<=\[)\*|(?<=\()\*(?=\w)", r"\\*", line)
            line = re.sub(r"<(?=[A-Za-z_])", r"\\<", line)
        begins = _LIST.match(line)
        if begins and lines and lines[-1].strip() and not _LIST.match(lines[-1]) and not _in_list(lines, begins[1]):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _in_list(lines: list[str], indent: str) -> bool:
    """Whether the lines before are the continuation of a list item that begins at the same indent."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if _LIST.match(line):
            return _LIST.match(line)[1] == indent  # type: ignore[index]
        if len(line) - len(line.lstrip()) <= len(indent):
            return False
    return False
