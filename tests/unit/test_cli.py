"""The command line: help with examples, one clear line for a mistake, exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "command",
    [
        [], ["study"], ["patch"], ["travel"], ["strength"], ["prefix"], ["features"], ["vector"], ["models"],
        ["plan", "sweep"], ["plan", "prefix"], ["plan", "study"],
        ["pocket"], ["pocket", "try"], ["pocket", "train"], ["pocket", "check"],
    ],
)  # fmt: skip
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "Usage" in out
    assert "Exit status: 0 done" in " ".join(out.split()) and "130 stopped with Ctrl-C" in " ".join(out.split())
    if command != ["pocket"]:
        assert "--json" in out
    if command[:1] == ["pocket"] and command != ["pocket"]:
        assert "--quiet" in out and ("--device" in out or command[1] == "check")
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
        (["pocket", "try", "--device", "abacus"], "--device 'abacus' cannot be used here ("),
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
    from functools import partial

    from mechsteer.pocket import train

    # The grammar's text for the tokenizer takes most of the time.
    monkeypatch.setattr(train, "train_tokenizer", partial(train.train_tokenizer, documents=4000))
    tiny = replace(train.RECIPES["pocket-1l"], d_model=16, n_heads=2, d_mlp=32, rows=2)
    monkeypatch.setitem(train.RECIPES, "pocket-1l", tiny)
    out = str(tmp_path / "run")
    assert run("pocket", "train", "--model", "pocket-1l", "--out", out, "--steps", "2", monkeypatch=monkeypatch) == 0
    assert json.loads((tmp_path / "run" / "training.json").read_text())["step"] == 2
    assert "2 steps" in capsys.readouterr().out
    assert run("pocket", "try", "--model", out, "--device", "cpu", "--quiet", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert said.err == "" and "without a prefix" in said.out
    quiet = ["--model", "pocket-1l", "--out", f"{out}-quiet", "--steps", "2", "--quiet"]
    assert run("pocket", "train", *quiet, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr() == (f"wrote {out}-quiet\n", "")
    assert run("pocket", "train", "--model", "pocket-1l", "--out", out, monkeypatch=monkeypatch) == 2
    assert "holds a finished model" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mechsteer pa", {"patch"}),
        ("mechsteer patch --site resid_p", {"resid_pre", "resid_post"}),
        ("mechsteer patch --site z,resid_m", {"z,resid_mid"}),
        ("mechsteer patch --over layer,h", {"layer,head"}),
        ("mechsteer study --chapters behaviour,tr", {"behaviour,travel"}),
        ("mechsteer vector --concept j", {"joy"}),
        ("mechsteer strength --topic ca", {"cats"}),
        ("mechsteer travel --model pocket-", {"pocket-1l"}),
    ],
)
def test_the_shell_completes_without_torch(typed: str, offered: set[str]) -> None:
    code = (
        "import sys\nfrom mechsteer.cli import app\n"
        "try:\n    app(prog_name='mechsteer')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    words = {"_MECHSTEER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered and done.stderr.strip() == "False"


def test_json_is_one_document_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def document(*arguments: str, status: int = 0) -> Any:
        assert run(*arguments, "--json", monkeypatch=monkeypatch) == status
        return json.loads(capsys.readouterr().out)

    (tmp_path / "asked.txt").write_text("Tell me about your day.\nWrite a poem.\n")
    answers = document("pocket", "try", "--request", "Write a poem.", "--model", "pocket-1l")["answers"]
    assert [each["request"] for each in answers] == ["Write a poem."] and answers[0]["without"] and answers[0]["with"]
    about = document("models", "pocket-1l")
    model = mechsteer.load_model("pocket-1l", device="cpu")
    assert about["hash"] == model.id.hash and about["layers"] == 1 and about["d_model"] == model.d_model
    assert about["logits_agree"] is True and about["tokenizer"]["chat_template"] is True
    small = ["--requests", str(tmp_path / "asked.txt"), "--model", "pocket-1l", "--max-new-tokens", "4"]
    study = document("study", "--chapters", "behaviour", "--out", str(tmp_path / "study"), *small)
    assert study["command"] == "study" and Path(study["report"]).is_file() and study["headline"][0]["value"]


def test_check_prints_and_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mechsteer.pocket import check

    rows = [check.Row("answers", 0.5, ">=", 0.9, 12), check.Row("declines", 0.1, "<=", 0.2, 12)]
    monkeypatch.setattr(check.PocketCheck, "__init__", lambda self, *args, **options: None)
    monkeypatch.setattr(check.PocketCheck, "rows", lambda self: rows)
    out = tmp_path / "check.json"
    assert run("pocket", "check", "--json", "--out", str(out), monkeypatch=monkeypatch) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == json.loads(out.read_text()) and printed["passed"] is False
    assert [row["passed"] for row in printed["rows"]] == [True, False][::-1]
    assert run("pocket", "check", "--out", str(tmp_path / "no" / "x.json"), monkeypatch=monkeypatch) == 2
    assert "cannot be written: give a file in a folder that exists" in capsys.readouterr().err
