"""Draws the README's pictures again: `python docs/make_pictures.py`."""

import io
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.console import Console

from mechsteer import cli

IMAGES = Path(__file__).parent / "images"


def pocket_try() -> None:
    """`mechsteer pocket try`, as it looks in a terminal."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    # A spinner would leave all its frames in the picture.
    console.status = lambda *args, **options: nullcontext()  # type: ignore[method-assign]
    cli.Console = lambda *args, **options: console  # type: ignore[misc]
    sys.argv = ["mechsteer", "pocket", "try"]
    with suppress(SystemExit):
        cli.main()
    svg = console.export_svg(title="mechsteer pocket try")
    # The picture names no font to fetch: the reader's own monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code", "ui-monospace")
    (IMAGES / "pocket-try.svg").write_text(svg)


if __name__ == "__main__":
    pocket_try()
