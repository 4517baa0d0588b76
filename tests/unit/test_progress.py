"""Progress bars: only for long work, only where they can be redrawn, with times from the start of the work."""

import time

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
