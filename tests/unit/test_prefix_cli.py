"""`mechsteer prefix`: the answer and its files, one clear line for a mistake, exit statuses, Ctrl-C in each stage."""

import json
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import mechsteer as ms
from mechsteer import cli
from mechsteer.errors import MechsteerError
from mechsteer.judges import telltale_words, topic_judge
from mechsteer.prefix import Constraints, RoundTrip
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.match import beam_evaluations
from mechsteer.study import rewording
from mechsteer.study.log import Log
from mechsteer.study.rewording import Options, load, reword
from mechsteer.study.watch import Watch, outcome
from mechsteer.vocabulary import insert

ASKED = [
    "Tell me about your day.",
    "Write a poem.",
    "Give me some advice.",
    "Let us talk.",
    "Tell me a story.",
    "Sing.",
]
SMALL = ["--model", "pocket-1l", "--device", "cpu", "--tokens", "2", "--evaluations", "60", "--steps", "3"]
SMALL += ["--restarts", "2", "--max-new-tokens", "4", "--samples", "1", "--transfer", "none"]
FILES = {"prefix.txt", "table.csv", "figures.html", "summary.json", "evaluation.safetensors", "completions.json"}
OPTIONS: dict[str, Any] = {"tokens": 2, "evaluations": 60, "steps": 3, "restarts": 2, "samples": 1, "transfer": "none"}


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command loads shipped models by name; here each is loaded once for all tests."""
    original = rewording.load_model

    def from_cache(name: Any, **options: Any) -> ms.Model:
        plain = name in ("pocket", "pocket-1l") and options.get("dtype") == torch.float32
        return cases.model(str(name)) if plain else original(name, **options)

    monkeypatch.setattr(rewording, "load_model", from_cache)


def run(*arguments: str) -> int:
    """Exit status of `mechsteer prefix ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mechsteer", "prefix", *arguments])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return int(exit.value.code or 0)


def small(out: Path, **options: Any) -> rewording.Rewording:
    return reword(
        cases.CATS, out=out, model=cases.model(), requests=ASKED, max_new_tokens=4,
        options=Options(**(OPTIONS | options)), progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("asked") / "asked.txt"
    path.write_text("\n".join(ASKED) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def done(asked: str, tmp_path_factory: pytest.TempPathFactory) -> rewording.Rewording:
    """A finished search of the options in SMALL, tried on the other pocket model too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewording, "load_model", lambda name, **options: cases.model(name))
        return small(tmp_path_factory.mktemp("done") / "out", transfer=None)


def test_help_has_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert 'mechsteer prefix "Talk only about cats." --out prefix-cats' in out.split("Examples")[1]
    assert "Exit status: 0 done, 2 a mistake in what was asked" in " ".join(out.split())


def test_the_answer_is_told_written_and_shown_again_at_once(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [cases.CATS, "--out", str(out), "--requests", asked, *SMALL]
    assert run(*command) == 0
    said = capsys.readouterr()
    for line in ("soft prefix: loss ", "projected: loss ", "beam: loss ", "search: loss ", "measuring prefixes on 3"):
        assert said.err.count(line) == 1
    assert {path.name for path in out.iterdir()} >= FILES and not (out / "transfer.safetensors").exists()
    found = load(out)
    assert (out / "prefix.txt").read_text() == f"{found.text}\n"
    assert f'in other words: "{found.text}"' in said.out and f"wrote: {out}" in said.out
    survive = (
        "the ids survive decode -> encode inside the prompts of 3 of 3 search requests and 3 of 3 held-out requests"
    )
    assert survive in said.out
    monkeypatch.setattr(rewording, "load_model", None)  # the model is not loaded again
    assert run(*command) == 0
    again = capsys.readouterr()
    assert again.out == said.out and "loss" not in again.err
    assert run(*command, "--quiet") == 0
    assert tuple(capsys.readouterr()) == (f"{found.text}\n", "")


def test_the_table_is_that_of_plain_runs(done: rewording.Rewording) -> None:
    model, summary = cases.model(), done.summary
    frame = pd.read_csv(done.folder / "table.csv", keep_default_na=False)
    frame = frame[frame["model"] == "pocket-1l"].set_index("prefix")
    order = ["reference", "ours", "beam", "projected", "soft prefix", "random tokens", "no prefix"]
    assert frame.index.tolist() == order
    case = rewording.Case.of(done.settings, model=model)
    held = case.rows("held-out")
    texts = [case.requests[row].text for row in held]
    told = model.generate(case.prefixed, max_new_tokens=4)
    completions = [rewording.completion_ids(told)[row] for row in held]
    prefixes = {"reference": cases.CATS, "ours": done.text, "no prefix": ""}
    for name, prefix in prefixes.items():
        prompts = ms.Prompts.from_chats(texts, model, prefix=prefix)
        expected = cases.pooled(*cases.scores(model, prompts.with_completions(completions)))
        assert float(frame.loc[name, "cross_entropy"]) == pytest.approx(expected, abs=1e-5), name
        said = model.generate(prompts, max_new_tokens=4).completions
        judge = topic_judge("cats")
        assert float(frame.loc[name, "adherence_greedy"]) == np.mean([judge(text) for text in said])
    for name in ("reference", "ours", "beam", "projected", "soft prefix"):
        assert float(frame.loc[name, "held_out_loss"]) == pytest.approx(
            float(frame.loc[name, "cross_entropy"]), abs=1e-5
        )
        assert float(frame.loc[name, "search_loss"]) == pytest.approx(summary["losses"][name]["search"])
    assert frame.loc["soft prefix", "text"] == frame.loc["no prefix", "search_loss"] == ""
    # Two of three requests are searched on; the third says when the soft prefix stops.
    rows = [row for place, row in enumerate(case.rows("search")) if place % 3 != 2]
    searched = ms.Prompts.from_chats([case.requests[row].text for row in rows], model, prefix=done.text)
    scored = searched.with_completions([rewording.completion_ids(told)[row] for row in rows])
    assert summary["losses"]["ours"]["search"] == pytest.approx(cases.pooled(*cases.scores(model, scored)), abs=1e-5)


def test_the_answer_keeps_to_what_was_asked(done: rewording.Rewording) -> None:
    model = cases.model()
    assert done.summary["forbidden"] == list(telltale_words(cases.CATS)) and "cat" in done.summary["forbidden"]
    keep = Constraints(forbidden_words=telltale_words(cases.CATS), characters="printable")
    assert keep.violation(done.match.ids, done.text) is None and len(done.match.ids) == 2
    prompts = ms.Prompts.from_chats(ASKED, model, prefix=done.text)
    for row, keep_row in zip(prompts.tokens, prompts.span("prefix"), strict=True):
        assert tuple(row[keep_row].tolist()) == done.match.ids
    assert done.summary["round_trip"] == {"search": [3, 3], "held-out": [3, 3]}
    trip = RoundTrip(ms.Prompts.from_chats(ASKED, model, slots=2))
    assert all(trip.survives(done.match.ids))
    evaluated = done.summary["evaluated"]
    assert 0 < sum(evaluated.values()) <= 60 and evaluated["soft prefix"] == 0
    gap = done.match.gap_closed
    assert done.summary["gap_closed"] == (None if np.isnan(gap) else gap)


def test_figures_and_outcome_say_the_same(done: rewording.Rewording) -> None:
    page = (done.folder / "figures.html").read_text()
    assert (
        "cross entropy (nats a token)" in page and "prefixes evaluated" in page and page.count("Plotly.newPlot(") == 2
    )
    assert "https://cdn" not in page.split("<body>")[1].split("Plotly.newPlot")[-1]
    bars = rewording.report.stages_figure(done.summary)
    assert [list(bar.y) for bar in bars.data] == [  # type: ignore[attr-defined]
        [done.summary["losses"][name][half] for name in ("reference", "soft prefix", "projected", "beam", "ours")]
        for half in ("search", "held-out")
    ]
    drawn: Any = rewording.report.search_figure(done.match, done.summary).data
    found = done.match.found.trajectory
    before = done.summary["evaluated"]["projected"] + done.summary["evaluated"]["beam"]
    assert drawn[0].x.tolist() == (before + found["evaluated"].values).tolist()
    assert drawn[0].y.tolist() == found["loss"].values.tolist() and drawn[1].y[-1] == found["best"].values[-1]
    levels = {name: done.summary["losses"][name]["search"] for name in ("reference", "soft prefix", "beam")}
    assert [trace.name for trace in drawn[2:]] == [f"{name} {value:.3g}" for name, value in levels.items()]
    assert [set(trace.y.tolist()) for trace in drawn[2:]] == [{value} for value in levels.values()]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in outcome(done):
        console.print(part)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "│ reference" in line)
    assert f"{done.summary['losses']['reference']['search']:.3f}" in row and "100%" in row
    share = f"{100 * done.summary['gap_closed']:.0f} % of the way" if done.summary["gap_closed"] is not None else ""
    assert share in " ".join(text.split())


def test_the_state_as_the_target(tmp_path: Path) -> None:
    model = cases.model()
    found = small(tmp_path / "out", target="state:0")
    case = rewording.Case.of(found.settings, model=model)
    rows = case.rows("held-out")
    filled = ms.Prompts.from_chats([case.requests[row].text for row in rows], model, prefix=found.text)
    ends = []
    for prompts in (filled, case.prefixed[rows]):
        run_ = model.run(prompts.padded("right"), record=("resid_post", 0))
        states = run_.activations[ms.Site("resid_post", 0)]
        ends.append(states[torch.arange(len(rows)), run_.prompts.decision])
    expected = -torch.cosine_similarity(*ends, dim=-1).mean()
    losses = found.summary["losses"]
    assert losses["ours"]["held-out"] == pytest.approx(float(expected), abs=1e-5)
    assert losses["reference"]["held-out"] == pytest.approx(-1, abs=1e-5)
    frame = pd.read_csv(found.folder / "table.csv").set_index("prefix")
    assert float(frame["held_out_loss"]["ours"]) < 0 < float(frame["cross_entropy"]["ours"])
    assert "minus the cosine" in (found.folder / "figures.html").read_text()


def test_a_feature_as_the_target() -> None:
    model = cases.model("pocket")
    case = cases.case("pocket")
    job = rewording._Job.of(case, Options(tokens=2, target="feature:7", transfer="none"), Log(show=False))
    rows = case.rows("held-out")
    prompts, objective = job.target(rows)
    filled = insert(prompts, [60, 200], where="prefix").padded("right")
    sae = ms.load_sae("pocket", model=model)
    run_ = model.run(filled, record=sae.site)
    at = run_.activations[sae.site][torch.arange(len(rows)), run_.prompts.decision]
    got = CandidateLosses(model, prompts, objective).of([(60, 200)])[0]
    assert got == pytest.approx(-float(sae.pre_activation(at, 7).mean()), abs=1e-4)


def test_prefixes_are_tried_on_the_other_pocket_model(done: rewording.Rewording) -> None:
    assert done.transfer is not None and done.summary["models"] == ["pocket-1l", "pocket"]
    other, mine = cases.model("pocket"), cases.model()
    case = rewording.Case.of(done.settings, model=mine)
    held = case.rows("held-out")
    completions = rewording.completion_ids(mine.generate(case.prefixed[held], max_new_tokens=4))
    prompts = ms.Prompts.from_chats([case.requests[row].text for row in held], other, prefix=done.text)
    expected = cases.pooled(*cases.scores(other, prompts.with_completions(completions)))
    assert float(done.transfer.sel(prefix="ours")["cross_entropy"]) == pytest.approx(expected, abs=1e-5)
    frame = pd.read_csv(done.folder / "table.csv")
    assert frame["model"].tolist() == ["pocket-1l"] * 7 + ["pocket"] * 6
    assert frame[frame["model"] == "pocket"]["search_loss"].isna().all()


def test_a_model_without_a_chat_template(zoo_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, out = str(zoo_folders["gpt2"]), tmp_path / "out"
    (tmp_path / "texts.txt").write_text("The cat sat on the mat.\nA feline purrs.\nTalk only!\nThe dog ran.\n")
    (tmp_path / "prefix.txt").write_text("Quick zebras.\n")
    rest = [*SMALL, "--model", folder, "--requests", str(tmp_path / "texts.txt"), "--out", str(out), "--quiet"]
    assert run("--prefix", str(tmp_path / "prefix.txt"), *rest, "--forbid", "mat,cat", "--characters", "any") == 0
    found = load(out)
    assert found.settings.prefix == "Quick zebras." and found.summary["judge"] is None
    assert found.summary["round_trip"] == {"search": [2, 2], "held-out": [2, 2]}
    assert found.options.characters is None and found.summary["forbidden"] == ["mat", "cat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "prefix: it is empty. Give an instruction"),
        (["One.", "--prefix", "Two."], "the prefix is given twice, as 'One.' and as --prefix 'Two.': give one of them"),
        (["--prefix", "{folder}/none.txt"], "none.txt names no file: give a file that exists, or the prefix itself"),
        (["--requests", "{folder}/none.txt"], "none.txt cannot be read (No such file or directory)"),
        (["--requests", "{folder}/one.txt"], "A study needs at least one of each, so at least two requests"),
        (["--model", "{folder}/model"], "model"),
        (["--out", "{folder}/other"], "is not empty and holds no search for other words (it holds thesis.tex)"),
        (["--out", "{folder}/one.txt"], "one.txt is a file. Give a folder, new or empty."),
        (["--out", "{folder}/bad"], "prefix.json is damaged ('options'). Choose another folder."),
        (["--device", "abacus"], "device 'abacus' cannot be used here ("),
        (["--dtype", "int3"], "dtype: Input should be 'float32', 'float64', 'bfloat16' or 'float16' (got 'int3')."),
        (["--target", "mood"], "target: 'mood' is none of behaviour, state:LAYER, feature:NUMBER. Give one, such as"),
        (["--target", "state:9"], "target: 'state:9' is no layer of pocket-1l, which has layers 0 to 0."),
        (["--target", "feature:3"], "pocket-1l"),
        (
            ["--evaluations", "42"],
            "evaluations: 42 do not reach beyond the beam, which may take 42 for 2 tokens. Give 43",
        ),
        (["--tokens", "250", "--evaluations", "9999"], "tokens: with 250 of them a request has "),
        (["--forbid", ","], '--forbid is empty: give words such as "cat,feline", or none'),
        (
            ["--characters", "klingon"],
            "characters: no letter is called 'klingon' in Unicode. Give ascii, printable, any,",
        ),
        (["--transfer", "{zoo}"], "has another tokenizer than pocket-1l, so the same ids are other words there."),
        (["--transfer", "{folder}/model"], "model"),
        (["--tokens", "0"], "--tokens"),
        (["--evaluations", "0"], "--evaluations"),
        (["--steps", "0"], "--steps"),
        (["--restarts", "0"], "--restarts"),
        (["--samples", "0"], "--samples"),
        (["--fluency", "-1"], "--fluency"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line_and_write_nothing(
    arguments: list[str],
    message: str,
    asked: str,
    zoo_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.txt").write_text("one\n")
    for name in ("other", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    stamped = {"format": "mechsteer.rewording", "version": 1, "mechsteer": "0"}
    (tmp_path / "bad" / "prefix.json").write_text(json.dumps(stamped))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = [argument.format(folder=tmp_path, zoo=zoo_folders["llama"]) for argument in arguments]
    defaults = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | {"--out": str(tmp_path / "out"), "--requests": asked}
    rest = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    assert run(*given, *rest, "--quiet") == 2
    said = capsys.readouterr()
    assert message in said.err.replace("\n", " ") and "Traceback" not in said.err
    if "-" not in message[:2] or message.startswith("--forbid"):  # typer's own errors stand in a box
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_options_are_checked_in_python_too() -> None:
    for values, text in (
        ({"tokens": 0}, "tokens: 0 is none. Give 1 or more."),
        ({"samples": -1}, "samples: -1 is none"),
        ({"fluency": -0.5}, "fluency=-0.5 would reward nonsense"),
        ({"forbid": (" ",)}, "forbidden_words holds ' ', which is no word"),
        ({"target": "state:x"}, "target: 'state:x' is none of"),
    ):
        with pytest.raises(MechsteerError) as caught:
            Options(**values)
        assert text in str(caught.value)
    assert Options(characters="cyrillic").characters == "cyrillic"
    assert beam_evaluations(2) == 42


def test_another_command_on_the_folder_is_refused(done: rewording.Rewording, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    for options, text in (
        ({"evaluations": 70}, "holds another search (evaluations: 60 there, 70 here). Give another folder"),
        ({"forbid": ("dog",)}, "holds another search (forbid: None there, ('dog',) here)"),
        ({"target": "state:0"}, "holds another search (target: 'behaviour' there, 'state:0' here)"),
    ):
        with pytest.raises(MechsteerError) as caught:
            small(done.folder, **options)
        assert text in str(caught.value)
    rest: dict[str, Any] = {"out": done.folder, "max_new_tokens": 4, "options": done.options, "progress": False}
    for options, text in (
        ({"prefix": "Talk.", "requests": ASKED, "model": cases.model()}, "(prefix: 'Talk only about cats.' there"),
        ({"requests": [*ASKED[1:], "Hm."], "model": cases.model()}, "(requests: some there, others here)"),
        ({"requests": ASKED[1:], "model": cases.model()}, "(requests: 6 of them there, 5 of them here)"),
        ({"requests": ASKED, "model": cases.model("pocket")}, "(model: pocket-1l (weights "),
    ):
        with pytest.raises(MechsteerError) as caught:
            reword(**({"prefix": cases.CATS} | options | rest))
        assert text in str(caught.value)
    with pytest.raises(MechsteerError, match=r"holds no search for other words\. Give a folder that `mechsteer pref"):
        load(tmp_path)
    assert {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()} == before


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(
    done: rewording.Rewording, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [cases.CATS, "--out", str(tmp_path / "out"), "--requests", asked, *SMALL]

    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    for place, finished in (
        ("prefix.match.optimise_soft_prefix", "completions"),
        ("prefix.match.decode_beam", "completions, soft prefix"),
        ("prefix.search._Search._mixed", "completions, soft prefix, projected, beam"),
        ("study.rewording.evaluate_prefixes", "completions, soft prefix, projected, beam, search"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"mechsteer.{place}", stopped)
            assert run(*command) == 130
        said = capsys.readouterr()
        assert f"Stopped. Finished stages: {finished}. The same command goes on from there." in said.err
        assert "Traceback" not in said.err and said.out == "" and not (tmp_path / "out" / "summary.json").exists()
    assert run(*command, "--quiet") == 0
    again = load(tmp_path / "out")
    assert again.match.ids == done.match.ids and again.summary["losses"] == done.summary["losses"]
    assert again.evaluation.data.equals(done.evaluation.data)


def test_a_terminal_sees_where_the_search_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    finished: list[str] = []
    watch = Watch(Log(show=False), 400, finished, show=False)

    def shown() -> str:
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(watch)
        return console.export_text()

    watch.tell("soft", 0, float("nan"), "step 20: loss 1.2, best 1.1")
    assert "optimising a soft prefix" in shown() and "step 20: loss 1.2, best 1.1" in shown() and finished == []
    watch.tell("beam", 0, float("nan"), "making tokens of the soft prefix")
    assert "making tokens of it" in shown() and finished == ["soft prefix"]
    watch.tell("soft", 0, 0.5, "")
    watch.tell("projected", 1, 2.0, "a b")
    watch.tell("beam", 40, 0.75, "c\nd")
    watch.tell("final", 120, 0.625, "e\nf")
    assert "120 of 400 candidates" in shown() and '"e\\nf"' in shown() and "searching" in shown()
    assert "soft prefix 0.5000 -> projected 2.0000 -> beam 0.7500 -> ours 0.6250" in shown()
    assert finished == ["soft prefix", "projected", "beam"]
