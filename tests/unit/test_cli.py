"""The command line: help with examples, one clear line for a mistake, exit statuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mechsteer
from mechsteer import cli


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mechsteer", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


def test_importing_the_package_and_the_command_line_needs_no_torch() -> None:
    code = "import sys, mechsteer, mechsteer.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names() -> None:
    assert set(mechsteer.__all__) <= set(dir(mechsteer))
    assert all(getattr(mechsteer, name) is not None for name in mechsteer.__all__)
    with pytest.raises(AttributeError, match="No mechsteer attribute lode_model"):
        _ = mechsteer.lode_model  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command", [[], ["study"], ["prefix"], ["pocket"], ["pocket", "try"], ["pocket", "train"], ["pocket", "check"]]
)
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "Usage" in out
    if command and command != ["pocket"]:
        assert "Examples" in out
        assert f"mechsteer {' '.join(command)}" in out.split("Examples")[1]


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"mechsteer {mechsteer.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pocket", "try", "--prefix", " "], "--prefix is empty: give an instruction"),
        (["pocket", "try", "--request", ""], "a --request is empty"),
        (["pocket", "try", "--model", "nowhere"], 'nowhere is neither "pocket", "pocket-1l" nor a folder'),
        (["pocket", "train", "--model", "huge", "--out", "runs/x"], "--model 'huge' is none of pocket, pocket-1l, sae"),
        (["pocket", "train", "--device", "abacus", "--out", "runs/x"], "--device 'abacus' cannot be used here ("),
        (["pocket", "train", "--out", __file__], "is a file: give a folder for the run"),
        (["pocket", "check", "--sae", "nowhere"], "nowhere holds no cfg.json"),
        (["pocket", "check", "--count", "3"], "--count"),
        (["pocket", "train"], "--out"),
        (["pocket", "fly"], "fly"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert message in captured.err.replace("\n", " ")
    assert "Traceback" not in captured.err


def test_try_answers_with_and_without_the_prefix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mechsteer.pocket.lexicon import TOPICS

    monkeypatch.setattr(sys, "argv", ["mechsteer", "pocket", "try", "--request", "Give me some advice about my exam."])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        cli.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    plain, steered = (" ".join(row.split("│")[column] for row in rows) for column in (1, 2))
    cats = {"cats", *TOPICS["cats"].content_words}
    assert not cats & set(plain.lower().replace(".", "").split())
    assert len(cats & set(steered.lower().replace(".", "").split())) >= 2


def test_a_prompt_longer_than_the_context_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pocket", "try", "--prefix", "cats " * 300, monkeypatch=monkeypatch) == 2
    assert "and the model reads 256: shorten --prefix or --request" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_named(
    zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pocket", "try", "--model", str(zoo_folders["gpt2"]), monkeypatch=monkeypatch) == 2
    assert "has no chat template" in capsys.readouterr().err.replace("\n", " ")


def test_train_writes_a_model_that_try_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from mechsteer.pocket import train

    tiny = replace(train.RECIPES["pocket-1l"], d_model=16, n_heads=2, d_mlp=32, rows=2)
    monkeypatch.setitem(train.RECIPES, "pocket-1l", tiny)
    out = str(tmp_path / "run")
    assert run("pocket", "train", "--model", "pocket-1l", "--out", out, "--steps", "2", monkeypatch=monkeypatch) == 0
    assert json.loads((tmp_path / "run" / "training.json").read_text())["step"] == 2
    assert run("pocket", "try", "--model", out, monkeypatch=monkeypatch) == 0
    assert run("pocket", "train", "--model", "pocket-1l", "--out", out, monkeypatch=monkeypatch) == 2
    assert "holds a finished model" in capsys.readouterr().err.replace("\n", " ")
