"""The frame of a study: settings and requests, what is kept, whose the folder is, and what a kill leaves."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import mechsteer as ms
from mechsteer.study import Chapter, Findings, Request, Settings, as_requests, load, study
from mechsteer.study import folder as folders
from mechsteer.study.blocks import Block, Cards, Columns, Paragraph, Table
from mechsteer.study.case import Case
from mechsteer.study.chapter import keep, kept, tidy

ASKED = ["Tell me about your day.", "Write a poem.", "What should I cook?", "Give me some advice."]


def counting(name: str = "counts", *, version: int = 1, title: str = "Counting") -> tuple[Chapter, list[str]]:
    """A chapter that needs no forward pass, and the prefixes that it was measured for."""
    runs: list[str] = []

    def measure(case: Case) -> Findings:
        runs.append(case.settings.prefix)
        lengths = case.prefixed.lengths.cpu().numpy()
        result = ms.Result(xr.Dataset({"tokens": ("prompt", lengths)}))
        return Findings({"lengths": result}, {"longest": int(lengths.max())})

    def show(findings: Findings) -> list[Block]:
        longest = findings.summary["longest"]
        assert longest == int(findings.results["lengths"]["tokens"].max())
        return [Paragraph(f"The longest has {longest} tokens."), Cards([("longest", str(longest), "tokens")])]

    return Chapter(name, title, "How long are the prompts?", measure, show, version=version), runs


def failing(name: str, error: BaseException) -> Chapter:
    def measure(case: Case) -> Findings:
        raise error

    return Chapter(name, "Failing", "Does it fail?", measure, lambda findings: [])


@pytest.fixture(scope="module")
def model() -> ms.Model:
    return ms.load_model("pocket-1l", device="cpu")


@pytest.fixture
def run(model: ms.Model, tmp_path: Path) -> Callable[..., Any]:
    def call(*chapters: Chapter, prefix: str = "Talk only about cats.", **options: Any) -> Any:
        given: dict[str, Any] = {"out": tmp_path / "out", "model": model, "requests": ASKED, "progress": False}
        return study(prefix, chapters=chapters, **(given | options))

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- settings and requests


def test_settings_survive_a_file(tmp_path: Path) -> None:
    settings = Settings(prefix="Sound gloomy.\n", requests=as_requests(ASKED, seed=3), words=("sad", "grey"), seed=3)
    settings.save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json") == settings
    with pytest.raises(Exception, match="frozen"):
        settings.seed = 4  # type: ignore[misc]


PAIR = (Request(text="a", split="search"), Request(text="b", split="held-out"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefix": " "}, 'prefix: it is empty. Give an instruction, for example "Talk only about cats."'),
        ({"contrast": ""}, "contrast: it is empty. Give an instruction"),
        ({"words": ("cat", " ")}, 'words: one of them is empty. Give words, for example "cat,cats"'),
        ({"requests": PAIR[:1]}, "requests: 1 to search on and 0 held out. A study needs at least one of each"),
        ({"requests": (*PAIR, PAIR[0])}, "requests: 'a' stands there twice. Leave one out."),
        ({"dtype": "int8"}, "dtype: Input should be 'float32', 'float64', 'bfloat16' or 'float16' (got 'int8')."),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)."),
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than or equal to 1 (got 0)."),
        ({"colour": "red"}, "colour: Extra inputs are not permitted (got 'red')."),
        ({"requests": ({"text": " ", "split": "search"},)}, "requests.0.text: it is empty. Give something to ask"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ms.MechsteerError) as error:
        Settings.of(**({"prefix": "Talk only about cats.", "requests": PAIR} | values))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [2, 7, 12])
def test_requests_without_a_split_are_dealt_into_even_halves(seed: int, count: int) -> None:
    texts = [f"request {place}" for place in range(count)]
    dealt = as_requests(texts, seed=seed)
    assert [request.text for request in dealt] == texts
    search = [request.text for request in dealt if request.split == "search"]
    assert abs(len(search) - (count - len(search))) <= 1
    assert dealt == as_requests(texts, seed=seed)
    if count == 12:
        assert dealt != as_requests(texts, seed=seed + 2)


def test_a_split_that_is_given_stays_and_the_rest_evens_it_out() -> None:
    rows = [{"text": f"held {place}", "split": "held-out"} for place in range(3)] + [f"free {n}" for n in range(5)]
    dealt = as_requests(rows)
    assert all(request.split == "held-out" for request in dealt[:3])
    assert sum(request.split == "search" for request in dealt) == 4


def test_text_files_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.txt"
    path.write_bytes("\ufeffWrite a poem.\r\n\r\n  Où est le chat ?\u2028Et le chien ?  \r\n".encode())
    assert [request.text for request in as_requests(path)] == ["Write a poem.", "Où est le chat ?\u2028Et le chien ?"]


def test_jsonl_files_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    rows = ['"Write a poem."', "", '{"text": "Two\\nlines", "split": "search", "kind": "poem"}', '{"text": "Third"}']
    path.write_text("\n".join(rows))
    found = as_requests(path)
    assert [request.text for request in found] == ["Write a poem.", "Two\nlines", "Third"]
    assert found[1].split == "search"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt cannot be read (No such file or directory). Give a .txt file"),
        ("empty.txt", b" \n\n", "empty.txt holds no requests. Give at least two, one a line."),
        ("empty.jsonl", b"", "empty.jsonl holds no requests."),
        ("latin.txt", b"Stra\xdfe\n", "latin.txt cannot be read (it is no UTF-8 text)"),
        ("broken.jsonl", b'"one"\n{"text": \n', "broken.jsonl line 2 is no JSON ("),
        ("number.jsonl", b'"one"\n\n3\n', 'number.jsonl line 3 holds no text: 3. Give a text, or {"text": ...'),
        ("split.jsonl", b'{"text": "one", "split": "test"}', "split.jsonl line 1 has the split 'test'. It is"),
        ("blank.jsonl", b'"one"\n" "', "blank.jsonl line 2 is empty."),
        ("twice.txt", b"one\ntwo\none\n", "twice.txt line 3: 'one' stands in "),
    ],
)
def test_bad_files_of_requests_are_named_with_the_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ms.MechsteerError) as error:
        as_requests(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_texts_as_requests() -> None:
    with pytest.raises(ms.MechsteerError, match=r"There are no requests. Give at least two"):
        as_requests([])
    with pytest.raises(ms.MechsteerError, match=r"request 1 holds no text: 7"):
        as_requests(["one", 7])


# --- blocks


def test_blocks_of_rows_check_their_lengths() -> None:
    with pytest.raises(ms.MechsteerError, match=r"Table got 1 cells in row 1 and 2 in its header. Give as many."):
        Table(["a", "b"], [["x", 1], ["y"]])
    with pytest.raises(ms.MechsteerError, match=r"Columns got 3 cells in row 0 and 2 in its header"):
        Columns(["a", "b"], [["x", "y", "z"]])


# --- a study and its folder


def test_a_study_keeps_results_summary_and_report(run: Callable[..., Any], tmp_path: Path, model: ms.Model) -> None:
    chapter, _ = counting()
    made = run(chapter)
    lengths = made.results["counts"]["lengths"]["tokens"].values
    assert len(lengths) == len(ASKED)
    stored = ms.Result.load(tmp_path / "out" / "chapters" / "counts" / "lengths.safetensors")
    np.testing.assert_array_equal(stored["tokens"].values, lengths)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == made.summary
    assert summary["format"] == "mechsteer.study-summary" and summary["failures"] == {}
    assert summary["chapters"]["counts"]["summary"] == {"longest": int(lengths.max())}
    assert summary["model"]["hash"] == model.id.hash
    assert summary["settings"]["prefix"] == "Talk only about cats."
    assert f"The longest has {lengths.max()} tokens." in made.report.read_text()
    asked = as_requests(tmp_path / "out" / "requests.jsonl")
    assert asked == made.settings.requests, "the requests can be given to --requests again, splits included"
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_finished_chapters_are_kept_and_others_added(run: Callable[..., Any], tmp_path: Path) -> None:
    first, first_runs = counting("first")
    second, second_runs = counting("second")
    run(first)
    before = contents(tmp_path / "out" / "chapters")
    made = run(first, second)
    assert (len(first_runs), len(second_runs)) == (1, 1)
    assert {name: value for name, value in contents(tmp_path / "out" / "chapters").items() if name in before} == before
    assert list(made.chapters) == ["first", "second"]
    assert made.settings.chapters == ("first", "second")


def test_an_older_version_of_a_chapter_is_measured_again(run: Callable[..., Any]) -> None:
    run(counting()[0])
    newer, runs = counting(version=2)
    run(newer)
    run(newer)
    assert len(runs) == 1


@pytest.mark.parametrize("damage", ["summary.json", "lengths.safetensors"])
def test_a_damaged_chapter_is_measured_again(run: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    chapter, runs = counting()
    run(chapter)
    path = tmp_path / "out" / "chapters" / "counts" / damage
    path.write_bytes(path.read_bytes()[:20])
    made = run(chapter)
    assert len(runs) == 2 and made.failures == {}


def test_a_chapter_that_fails_loses_no_other(run: Callable[..., Any], tmp_path: Path) -> None:
    last, _ = counting("last")
    unable = failing("unable", ms.MechsteerError("The model is too <small>. Take another."))
    made = run(unable, failing("broken", ZeroDivisionError("by zero")), last)
    assert list(made.chapters) == ["last"]
    assert made.failures["unable"] == "The model is too <small>. Take another."
    assert made.failures["broken"].startswith("ZeroDivisionError: by zero (the whole error is in ")
    assert "Traceback" in (tmp_path / "out" / "chapters" / "broken.error.txt").read_text()
    assert made.summary["failures"] == made.failures
    assert "There is no answer here: The model is too &lt;small&gt;. Take another." in made.report.read_text()
    # It is tried again, and once it works nothing is left of the failure.
    works, _ = counting("broken")
    made = run(works, last)
    assert made.failures == {} and list(made.chapters) == ["broken", "last"]
    assert not (tmp_path / "out" / "chapters" / "broken.error.txt").exists()


def test_findings_that_cannot_be_kept_or_shown_are_failures(run: Callable[..., Any]) -> None:
    good, _ = counting()
    odd = Chapter("odd", "Odd", "?", lambda case: Findings({"a/b": ms.Result(xr.Dataset())}), lambda findings: [])
    unjson = Chapter("unjson", "Odd", "?", lambda case: Findings({}, {"x": object()}), lambda findings: [])
    unshown = Chapter("unshown", "Odd", "?", lambda case: Findings({}, {}), lambda findings: [findings.summary["x"]])
    made = run(odd, unjson, unshown, good)
    assert made.failures["odd"] == "Chapter 'odd' has a result called 'a/b'. Use letters, digits, _ and -."
    assert "The summary of chapter 'unjson' must hold numbers, text, lists" in made.failures["unjson"]
    assert made.failures["unshown"].startswith("its findings cannot be shown (KeyError: 'x'). If an older")
    assert list(made.chapters) == ["unshown", "counts"]


def test_a_folder_that_holds_another_study_is_refused_and_left_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    chapter, _ = counting()
    run(chapter)
    before = contents(tmp_path / "out")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"prefix": "Talk only about trains."},
            "holds another study (prefix: 'Talk only about cats.' there, 'Talk only about trains.' here). "
            "Give another folder, or the settings of that study.",
        ),
        ({"requests": ASKED[:2]}, "(requests: 4 of them there, 2 of them here)"),
        ({"requests": [*ASKED[:3], "Something else."]}, "(requests: some there, others here)"),
        ({"words": ["cat"]}, "(words: [] there, ['cat'] here)"),
        ({"max_new_tokens": 7}, "(max_new_tokens: 40 there, 7 here)"),
        ({"model": "pocket"}, "(model: pocket-1l (weights "),
    ]
    for options, message in cases:
        with pytest.raises(ms.MechsteerError) as error:
            run(chapter, **options)
        assert message in str(error.value)
        assert contents(tmp_path / "out") == before


def test_a_model_under_another_name_is_the_same_study(run: Callable[..., Any]) -> None:
    chapter, runs = counting()
    run(chapter)
    run(chapter, model="pocket-1l", device="cpu")
    assert len(runs) == 1


def test_a_folder_of_something_else_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    chapter, runs = counting()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ms.MechsteerError, match=r"is not empty and holds no study \(it holds thesis.tex\)"):
        run(chapter)
    with pytest.raises(ms.MechsteerError, match=r"thesis.tex is a file. Give a folder for the study, new or empty."):
        run(chapter, out=tmp_path / "out" / "thesis.tex")
    assert contents(tmp_path / "out") == {"thesis.tex": b"precious"} and not runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": ""}, "prefix: it is empty"),
        ({"prefix": "cats " * 300}, "the context of pocket-1l is 256"),
        ({"prefix": "<|end|> cats"}, "special token"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"device": "abacus", "model": "pocket-1l"}, "device 'abacus' cannot be used here ("),
        ({"chapters": ["weather"]}, "'weather'"),
        ({"chapters": []}, "Choose from behaviour"),
    ],
)
def test_mistakes_leave_no_folder(
    run: Callable[..., Any], tmp_path: Path, model: ms.Model, options: dict[str, Any], message: str
) -> None:
    if "<|end|>" in options.get("prefix", ""):
        options = {"prefix": f"{model.tokenizer.eos_token} cats"}
    with pytest.raises(ms.MechsteerError) as error:
        run(counting()[0], **options) if "chapters" not in options else study(
            "Talk only about cats.", out=tmp_path / "out", model=model, requests=ASKED, **options
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_load_reads_a_study_of_shipped_chapters(run: Callable[..., Any], tmp_path: Path) -> None:
    made = run("behaviour", counting()[0], max_new_tokens=4)
    back = load(tmp_path / "out")
    assert back.settings == made.settings and back.model == made.model
    assert list(back.chapters) == ["behaviour"], "others' chapters are not known to it"
    assert back.headline() and back.headline() == made.headline()[: len(back.headline())]
    assert repr(back).startswith("Study('Talk only about cats.' on pocket-1l, 4 requests, chapters behaviour, in ")
    with pytest.raises(ms.MechsteerError, match=r"holds no study. Give a folder that `mechsteer study` made."):
        load(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    held = pytest.raises(ms.MechsteerError, match=rf"is in use by process {os.getpid()}. Wait until it ends")
    with folders.locked(tmp_path), held, folders.locked(tmp_path):
        pass
    with folders.locked(tmp_path):
        pass
    # A dead process holds nothing, whatever its file says.
    (tmp_path / folders.LOCK).write_text("1\n")
    with folders.locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ms.MechsteerError, match=r"file/out cannot be written \(.*\). Give another folder.")
    with refused, folders.locked(tmp_path / "file" / "out"):
        pass


# --- kills


def test_half_a_chapter_is_never_read(tmp_path: Path) -> None:
    """Whatever step of keeping a chapter was the last one, the chapter is whole or absent."""
    chapter, _ = counting()
    findings = Findings({"lengths": ms.Result(xr.Dataset({"tokens": ("prompt", [1, 2])}))}, {"longest": 2})

    class Killed(BaseException):
        pass

    for last in range(12):
        home = tmp_path / str(last)
        keep(home, chapter, findings, seconds=1.0, device="cpu")
        with pytest.MonkeyPatch.context() as patch:
            steps = iter(range(last))

            def step() -> None:
                if next(steps, None) is None:  # noqa: B023
                    raise Killed

            for owner, name in ((os, "replace"), (Path, "write_text"), (Path, "mkdir"), (shutil, "rmtree")):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, real=real, **o: (step(), real(*a, **o))[1])
            try:
                keep(home, chapter, findings, seconds=2.0, device="cpu")
                finished = True
            except Killed:
                finished = False
        found = kept(home, chapter)
        assert finished is False or found is not None
        assert found is None or (found.seconds in (1, 2) and found.findings.summary == {"longest": 2})
        tidy(home)
        assert {path.name for path in home.iterdir()} <= {"counts"}
        keep(home, chapter, findings, seconds=3.0, device="cpu")
        assert kept(home, chapter).seconds == 3  # type: ignore[union-attr]
        if finished:
            assert last > 4
            return
    raise AssertionError("keeping a chapter takes more steps than were tried")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that begin with what this one has loaded")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_the_same_call_goes_on_after_a_kill(run: Callable[..., Any], tmp_path: Path, sign: signal.Signals) -> None:
    out, slow_began = tmp_path / "out", tmp_path / "slow"
    (quick, quick_runs), (slow, slow_runs), (last, last_runs) = counting("quick"), counting("slow"), counting("last")

    def forever(case: Case) -> Findings:
        slow_began.touch()
        time.sleep(60)
        return Findings()

    def child() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
        with (tmp_path / "said").open("w") as sys.stderr:
            run(quick, replace(slow, measure=forever), last, progress=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    deadline = time.monotonic() + 60
    while not slow_began.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ms.MechsteerError, match=f"is in use by process {process.pid}"):
        run(last)
    os.kill(process.pid or 0, sign)
    process.join(30)
    assert process.exitcode not in (0, None)
    stopped = "Stopped. Finished chapters: quick. The same command goes on from there."
    assert (stopped in (tmp_path / "said").read_text()) == (sign == signal.SIGINT)
    assert json.loads((out / "summary.json").read_text())["chapters"].keys() == {"quick"}
    assert 'id="quick"' in (out / "report.html").read_text()
    made = run(quick, slow, last)
    assert (quick_runs, len(slow_runs), len(last_runs)) == ([], 1, 1)
    assert list(made.chapters) == ["quick", "slow", "last"] and made.failures == {}
