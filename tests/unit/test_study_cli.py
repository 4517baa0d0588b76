"""`mechsteer study`: one clear line for a mistake, exit statuses, and a kill in the middle."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mechsteer import cli
from mechsteer.study import Chapter, Findings, chapters, load
from mechsteer.study.blocks import Cards, Paragraph

SMALL = ["--model", "pocket-1l", "--device", "cpu", "--max-new-tokens", "4", "--chapters", "behaviour"]


def run(*arguments: str) -> int:
    """Exit status of `mechsteer study ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mechsteer", "study", *arguments])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return int(exit.value.code or 0)


@pytest.fixture
def asked(tmp_path: Path) -> str:
    path = tmp_path / "asked.txt"
    path.write_text("Tell me about your day.\nWrite a poem.\n")
    return str(path)


def test_help_has_examples_and_comes_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert 'mechsteer study "Talk only about cats." --out study-cats' in out.split("Examples")[1]
    monkeypatch.setattr(sys, "argv", ["mechsteer", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert 'mechsteer study "Talk only about cats." --out study-cats' in out.split("Examples")[1]
    commands = out.split("Commands")[1]
    assert commands.index("study") < commands.index("pocket")


def test_the_chapters_that_the_help_names_are_those_that_there_are() -> None:
    assert cli.CHAPTERS == chapters.NAMES


def test_a_study_is_made_told_and_goes_on(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["Talk only about cats.", "--out", str(out), "--requests", asked, *SMALL]
    assert run(*command) == 0
    said = capsys.readouterr()
    assert "[1/1] The behaviour" in said.err and "done in" in said.err
    assert f"report: {out / 'report.html'}" in said.out
    study = load(out)
    label, value = study.headline()[0][1:3]
    assert label in said.out and value in said.out
    assert json.loads((out / "summary.json").read_text())["settings"]["max_new_tokens"] == 4
    assert run(*command) == 0
    assert "kept from before" in capsys.readouterr().err
    # The command that the report gives goes on with the same study, and --quiet says no more than where the report is.
    again = study.report.read_text().split("<pre>mechsteer study ")[1].split("</pre>")[0]
    assert again.startswith("&#39;Talk only about cats.&#39; --out ") and "--chapters behaviour" in again
    assert run(*command, "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out == f"report: {out / 'report.html'}\n"


def test_a_prefix_from_a_file(asked: str, tmp_path: Path) -> None:
    (tmp_path / "prefix.txt").write_bytes("\ufeffTalk only about trains.\r\n".encode())
    out = str(tmp_path / "out")
    assert run("--prefix", str(tmp_path / "prefix.txt"), "--out", out, "--requests", asked, "--quiet", *SMALL) == 0
    assert load(out).settings.prefix == "Talk only about trains."
    assert load(out).settings.words == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "{folder}/empty.txt"], "empty.txt holds no requests. Give at least two, one a line."),
        (["--requests", "{folder}/none.txt"], "none.txt cannot be read (No such file or directory)"),
        (["--requests", "{folder}/one.txt"], "A study needs at least one of each, so at least two requests"),
        ([" "], "prefix: it is empty. Give an instruction"),
        (["--prefix", ""], "prefix: it is empty. Give an instruction"),
        (["cats " * 300], "the context of pocket-1l is 256"),
        (["One.", "--prefix", "Two."], "the prefix is given twice, as 'One.' and as --prefix 'Two.': give one of them"),
        (["--prefix", "{folder}/none.txt"], "none.txt names no file: give a file that exists, or the prefix itself"),
        (["--prefix", "{folder}/latin.txt"], "latin.txt: this file cannot be read as text"),
        (["--model", "{folder}/model"], "model"),
        (["--model", "{folder}/broken"], "broken"),
        (["--out", "{folder}/other"], "is not empty and holds no study (it holds thesis.tex)"),
        (["--out", "{folder}/one.txt"], "one.txt is a file. Give a folder for the study"),
        (["--chapters", "behaviour,weather"], f"'weather'. Choose from {', '.join(chapters.NAMES)}."),
        (["--chapters", ","], f"Choose from {', '.join(chapters.NAMES)}."),
        (["--device", "abacus"], "device 'abacus' cannot be used here ("),
        (["--dtype", "int3"], "dtype: Input should be 'float32', 'float64', 'bfloat16' or 'float16' (got 'int3')."),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {"empty.txt": b"\n \n", "one.txt": b"one\n", "latin.txt": b"Stra\xdfe\n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = [argument.format(folder=tmp_path) for argument in arguments]
    defaults = {"--model": "pocket-1l", "--out": str(tmp_path / "out")}
    rest = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    assert run(*given, *rest, "--quiet") == 2
    said = capsys.readouterr()
    assert message in said.err.replace("\n", " ") and "Traceback" not in said.err
    if "--seed" not in given:  # typer's own errors stand in a box
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_another_study_in_the_folder_is_refused(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--out", str(tmp_path / "out"), "--requests", asked, "--quiet", *SMALL]
    assert run("Talk only about cats.", *rest) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("Talk only about trains.", *rest) == 2
    assert "(prefix: 'Talk only about cats.' there, 'Talk only about trains.' here)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("error", "status"), [(ValueError("wrong"), 1), (KeyboardInterrupt(), 130)])
def test_exit_status_of_a_chapter_that_fails_and_of_ctrl_c(
    error: BaseException,
    status: int,
    asked: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(case: Any) -> Findings:
        raise error

    good = Chapter(
        "behaviour", "Good", "?", lambda case: Findings(), lambda findings: [Paragraph("."), Cards([("a", "7 %", "n")])]
    )
    bad = Chapter("entry", "Bad", "?", fails, lambda findings: [])
    monkeypatch.setattr("mechsteer.study.runner.shipped_chapters", lambda names=None: [good, bad])
    rest = ["--out", str(tmp_path / "out"), "--requests", asked, "--model", "pocket-1l", "--device", "cpu"]
    assert run("Talk only about cats.", *rest) == status
    said = capsys.readouterr()
    if status == 1:
        assert "entry: ValueError: wrong (the whole error is in entry.error.txt)" in said.err and "7 %" in said.out
    else:
        assert "Stopped. Finished chapters: behaviour. The same command goes on from there." in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "out" / "chapters" / "behaviour" / "summary.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin with what this one has loaded")
def test_the_same_command_goes_on_after_kill_9(asked: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["Talk only about cats.", "--out", str(out), "--requests", asked, "--quiet", *SMALL]
    command[-3:-2] = ["40"]
    for wait in ("study.json", "completions.json", "chapters/behaviour/summary.json"):
        process = multiprocessing.get_context("fork").Process(target=run, args=command)
        process.start()
        deadline = time.monotonic() + 60
        while not (out / wait).exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(30)
        assert (out / wait).exists()
    assert run(*command) == 0
    assert list(load(out).chapters) == ["behaviour"] and (out / "report.html").stat().st_size > 1_000_000
