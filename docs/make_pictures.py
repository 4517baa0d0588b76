"""Draws the pictures of the README and the pages again: `python docs/make_pictures.py`.

With a folder, `python docs/make_pictures.py study-cats`, the study there is gone on with, or read if it is finished.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import screenshot

from mechsteer.study import Study, study
from mechsteer.study.blocks import Block, Details, Figure
from mechsteer.study.chapters import chapters

IMAGES = Path(__file__).parent / "images"
WIDTH, COLUMNS = 900, 110
# Figures of chapters by how their titles begin, and the pictures that are made of them.
FIGURES = {
    "travel": {"Share of the gap's change": "study-arrives.png", "From a layer to the end": "study-identity.png"},
    "words": {"From the soft prefix to words": "study-stages.png"},
    "strength": {"Behaviour": "study-behaviour.png", "Side effect": "study-side-effect.png"},
}


def pocket_try() -> None:
    """`mechsteer pocket try`, as it looks in a terminal."""
    code = "from mechsteer.cli import main; main()"
    colours = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-c", code, "pocket", "try"]
    done = subprocess.run(command, env=colours, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    # A spinner would leave all its frames in the picture: only what comes after the cursor is shown again counts.
    printed = re.sub(r"\r|\x1b\[\d*[AK]", "", done.stdout.rpartition("\x1b[?25h")[2])
    console.print(Text.from_ansi(printed.strip("\n")))
    svg = console.export_svg(title="mechsteer pocket try")
    # The picture names no font to fetch: the reader's own monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code", "ui-monospace")
    (IMAGES / "pocket-try.svg").write_text(svg)


def entry(cats: Study) -> None:
    """The chapter "Where it enters" of the report that the README's first command makes."""
    page = cats.report.with_name("chapter.html")
    rest = "header, nav, footer, main > section:not(#entry) { display: none !important }"
    text = cats.report.read_text(encoding="utf-8").replace("</head>", f"<style>{rest}</style></head>")
    page.write_text(text, encoding="utf-8")
    screenshot(page, IMAGES / "study-entry.png", width=WIDTH, height=1250)
    page.unlink()


def figures(cats: Study, folder: Path) -> None:
    """Single figures of chapters, as the report draws them."""
    for chapter in chapters(FIGURES):
        found = list(flat(chapter.show(cats.chapters[chapter.name].findings)))
        for begins, name in FIGURES[chapter.name].items():
            block = next(each for each in found if str(each.figure.layout.title.text).startswith(begins))
            height = block.height or block.figure.layout.height or 380
            page = folder / f"{name}.html"
            body = block.figure.update_layout(height=height, width=WIDTH, paper_bgcolor="white").to_html(
                full_html=False, include_plotlyjs=True, config={"displayModeBar": False}
            )
            text = f"<body style='margin:0;font-family:system-ui,sans-serif'>{body}</body>"
            page.write_text(text, encoding="utf-8")
            screenshot(page, IMAGES / name, width=WIDTH, height=int(height))


def flat(blocks: Iterable[Block]) -> Iterator[Figure]:
    """The figures among blocks, also folded ones."""
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Details):
            yield from flat(block.blocks)


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else None
    pocket_try()
    with TemporaryDirectory() as folder:
        cats = study("Talk only about cats.", out=given or Path(folder) / "study-cats", device="cpu")
        entry(cats)
        figures(cats, Path(folder))


if __name__ == "__main__":
    main()
