"""Draws the README's pictures again: `python docs/make_pictures.py`."""

import io
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import screenshot

from mechsteer import cli
from mechsteer.cli import terminal
from mechsteer.study import study

IMAGES = Path(__file__).parent / "images"


def pocket_try() -> None:
    """`mechsteer pocket try`, as it looks in a terminal."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    # A spinner would leave all its frames in the picture.
    console.status = lambda *args, **options: nullcontext()  # type: ignore[method-assign]
    terminal.Console = lambda *args, **options: console  # type: ignore[misc]
    sys.argv = ["mechsteer", "pocket", "try"]
    with suppress(SystemExit):
        cli.main()
    svg = console.export_svg(title="mechsteer pocket try")
    # The picture names no font to fetch: the reader's own monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code", "ui-monospace")
    (IMAGES / "pocket-try.svg").write_text(svg)


def study_entry() -> None:
    """The chapter "Where it enters" of the report that the README's first command makes."""
    with TemporaryDirectory() as folder:
        report = study("Talk only about cats.", out=Path(folder) / "study-cats", device="cpu").report
        page = report.with_name("chapter.html")
        rest = "header, nav, footer, main > section:not(#entry) { display: none !important }"
        text = report.read_text(encoding="utf-8").replace("</head>", f"<style>{rest}</style></head>")
        page.write_text(text, encoding="utf-8")
        screenshot(page, IMAGES / "study-entry.png", width=900, height=1222)


if __name__ == "__main__":
    pocket_try()
    study_entry()
