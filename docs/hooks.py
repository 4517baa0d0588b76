"""What the pages cannot say for themselves: the command line, read from the program, and links to the reference."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND_LINE = "<!-- command line -->"
PUBLIC = re.compile(r"<!-- public names of (mechsteer[\w.]*)(, with what they inherit)? -->")
# A name in backticks, such as `mechsteer.strength.theory.peaks`, outside of blocks of code.
NAME = re.compile(r"(?<!\[)`(mechsteer(?:\.\w+)+)`(?!\])")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the command line and the lists of public names, and links names to the reference."""
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, command_line())
    markdown = PUBLIC.sub(lambda found: reference(found[1], inherited=bool(found[2])), markdown)
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else NAME.sub(link, part) for part in parts)


def reference(module: str, *, inherited: bool) -> str:
    """A mkdocstrings entry for each name in a module's `__all__`."""
    options = "\n    options:\n      inherited_members: true" if inherited else ""
    return "\n\n".join(f"::: {identifier(module, name)}{options}" for name in importlib.import_module(module).__all__)


def identifier(module: str, name: str) -> str:
    """The path under which the reference has a public name: that of its room, which has a page, rather than mechsteer's
    own; and where a file of the room has the same name, the path within that file."""
    if module == "mechsteer":
        room = ".".join(getattr(importlib.import_module(module), name).__module__.split(".")[:2])
        if name in getattr(importlib.import_module(room), "__all__", ()):
            module = room
    is_package = hasattr(importlib.import_module(module), "__path__")
    hidden = is_package and importlib.util.find_spec(f"{module}.{name}") is not None
    return f"{module}.{name}.{name}" if hidden else f"{module}.{name}"


def link(found: re.Match[str]) -> str:
    """A name that the reference has, without its module and as a link to it; other names as they are."""
    place = public_place(found[1])
    if place is None:
        return found[0]
    module, name, *member = place
    return f"[`{'.'.join((name, *member))}`][{'.'.join((identifier(module, name), *member))}]"


def public_place(path: str) -> tuple[str, ...] | None:
    """Module, name and perhaps member of a dotted path, if the name is in the module's `__all__`."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return (module.__name__, *parts[cut:]) if parts[cut] in getattr(module, "__all__", ()) else None
    return None


def command_line() -> str:
    """The help of every command, as typer writes it down, with its examples as code."""
    command = [sys.executable, "-m", "typer", "mechsteer.cli", "utils", "docs", "--name", "mechsteer"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^# `mechsteer`\n", "", text)
    text = re.sub(r"\[bold\](.*?)\[/(?:bold)?\]", r"**\1**", text)
    # Examples are lines of their own, indented by two spaces, with an empty line between them.
    text = re.sub(r"(?:^  \S.*\n\n?)+", lambda found: _block(found[0]), text, flags=re.MULTILINE)
    return text


def _block(lines: str) -> str:
    code = "\n".join(line.strip() for line in lines.splitlines() if line.strip())
    return f"```sh\n{code}\n```\n\n"
