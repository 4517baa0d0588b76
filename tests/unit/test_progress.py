"""Progress bars: only for long work, only where they can be redrawn, with times from the start of the work."""

import time
from typing import Any

import pytest

from mechsteer import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def work(seconds: float, *, steps: int = 10, show: bool = True, fail: bool = False) -> None:
    with progress.bar("cells", steps, show=show) as bar:
        for _ in range(steps):
            time.sleep(seconds / steps)
            bar.advance()
        if fail:
            raise KeyboardInterrupt


def test_a_bar_appears_late_counts_from_the_start_and_goes(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.6)
    work(1.1)
    shown = capsys.readouterr().err
    assert "cells" in shown and "10/10" in shown
    assert " 1/10" not in shown and " 4/10" not in shown, "shown too early"
    assert "0:00:01" in shown, "half a second passed before it appeared"
    assert shown.endswith("\x1b[2K"), "its line is erased"


def test_short_or_silent_work_shows_nothing(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work(0.01)
    monkeypatch.setattr(progress, "SECONDS", 0)
    work(0.01, show=False)
    work(0.01, steps=1)  # late, but nothing is left to wait for
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(progress, "SECONDS", 0)
    work(0.01)
    assert capsys.readouterr() == ("", "")


def test_an_interruption_takes_the_bar_away_too(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        work(0.01, fail=True)
    assert "\x1b[?25h" in capsys.readouterr().err, "the cursor is back"


def test_bars_inside_one_another_share_a_region(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    with progress.bar("layers", 2) as outer:
        for _ in range(2):
            work(0.3, steps=3)
            outer.advance()
    shown = capsys.readouterr().err
    assert "layers" in shown and "cells" in shown and "2/2" in shown
    assert shown.count("\x1b[?25l") == 1, "one region, which hides the cursor once"
    assert shown.endswith("\x1b[2K") and not progress._open


def test_a_bar_that_was_left_open_by_an_error_leaves_nothing_behind(terminal: None) -> None:
    with pytest.raises(KeyboardInterrupt), progress.bar("layers", 2):
        work(0.0, fail=True)
    assert not progress._open


CELLS = """
import time
from typing import Any
from mechsteer import progress
progress.SECONDS = 0.2

def work(name, seconds, steps=5, **more):
    with progress.bar(name, steps, **more) as bar:
        for _ in range(steps):
            time.sleep(seconds / steps)
            bar.advance()
---
work("short", 0.05)
work("silent", 0.4, show=False)
---
with progress.bar("<b>layers</b>", 2) as outer:
    for _ in range(2):
        work("cells", 0.5)
        outer.advance()
---
try:
    with progress.bar("cells", 10) as bar:
        for _ in range(6):
            time.sleep(0.1)
            bar.advance()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
---
from mechsteer.study.log import Log
log = Log()
log.chapter(1, 2, "The behaviour")
log.line("generating")
"""


def test_in_a_notebook_one_line_stays() -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.strip().split("\n---\n")]
    updates: list[str] = []

    class Client(client.NotebookClient):  # type: ignore[misc, name-defined]
        def process_message(self, msg: Any, *args: Any) -> Any:
            if msg["msg_type"] == "update_display_data":
                updates.append(msg["content"]["data"]["text/html"])
            return super().process_message(msg, *args)

    made = Client(nbformat.v4.new_notebook(cells=cells), kernel_name="python3", timeout=60).execute()
    _, short, nested, stopped, log = ([dict(output) for output in cell.outputs] for cell in made.cells)
    assert short == []
    assert [output["data"]["text/plain"] for output in nested] == ["<b>layers</b> 2/2, 0:01"]
    assert "&lt;b&gt;layers&lt;/b&gt;" in nested[0]["data"]["text/html"]
    both = [page for page in updates if "layers" in page and "cells" in page]
    assert both and all(page.count("<div") == 2 for page in both), "drawn together, in one place"
    assert [output["data"]["text/plain"] for output in stopped] == ["cells 6/10, 0:00, stopped"]
    # Plain lines of one stream, which a notebook shows together and without the ground of warnings.
    assert {output["name"] for output in log} == {"stdout"}
    assert "".join(output["text"] for output in log).count("\n") == 2
