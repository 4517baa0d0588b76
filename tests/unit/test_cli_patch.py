"""`mechsteer patch`: its maps are those of the library; files, kept answers, Ctrl-C, and one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import xarray as xr
from browser import console_and_network, needs_browser
from commands import contents, loaded_once, run

import mechsteer as ms
from mechsteer.cli.patch import CLEAN, CORRUPT
from mechsteer.patching import recovered, significant

OFF = "When Mary and John went to the shop, John gave a drink to"


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_once(monkeypatch)


def maps(method: str, **options: Any) -> ms.Result:
    """The same map from the library."""
    model = cases.model("pocket")
    gap = ms.LogitGap(" Mary", " John", tokenizer=model)
    call = {"exact": ms.activation_patching, "attribution": ms.attribution_patching, "path": ms.path_patching}[method]
    return call(model, CLEAN, CORRUPT, measure=gap, progress=False, **options)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        ([], "exact", {}),
        (["--site", "z", "--layers", "3-4"], "exact", {"sites": "z", "over": ("layer", "head"), "layers": [3, 4]}),
        (["--site", "attn_out,mlp_out", "--method", "attribution"], "attribution", {"sites": ["attn_out", "mlp_out"]}),
        (["--mode", "noising", "--over", "pos", "--layers", "2"], "exact",
         {"over": "pos", "layers": [2], "mode": "noising"}),
        (["--method", "path"], "path", {"senders": "z", "receivers": "logits"}),
        (["--method", "path", "--site", "mlp_out", "--receivers", "blocks.5.attn.hook_q[head=3]"], "path",
         {"senders": "mlp_out", "receivers": ["blocks.5.attn.hook_q[head=3]"]}),
    ],
)  # fmt: skip
def test_the_map_is_that_of_the_library(
    arguments: list[str],
    method: str,
    options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    said = run(capsys, "patch", "--out", str(out), *arguments, "--json", "--quiet")
    assert said.status == 0 and said.err == ""
    effect, expected = ms.Result.load(out / "effect.safetensors"), maps(method, **options)
    assert effect["effect"].dims == expected["effect"].dims
    np.testing.assert_allclose(effect["effect"].values, expected["effect"].values, atol=1e-4)
    shares = recovered(expected)
    assert ms.Result.load(out / "recovered.safetensors")["recovered"].values == pytest.approx(
        shares["recovered"].values, abs=1e-2
    )
    # The first cell of the table is the largest of the map, at its place.
    mean, first = shares["recovered"].mean("prompt"), said.json["cells"][0]
    assert abs(first["share"]) == pytest.approx(float(abs(mean).max()), abs=1e-2)
    where = {name: value for name, value in first["at"].items() if name in mean.dims}
    assert float(mean.sel(where)) == pytest.approx(first["share"], abs=1e-2)
    assert {path.name for path in out.iterdir()} == {*said.json["files"], "command.json"}


def test_alone_it_finds_the_indirect_object_and_shows_it_again_without_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run(capsys, "patch", "--out", str(out), columns=100)
    assert first.status == 0 and "resid_pre: exact" in first.err
    assert "+13.32 in the clean run" in " ".join(first.out.split())
    assert "John| Mary" in first.out and f"wrote: {out} (effect.safetensors" in first.out
    assert max(map(len, first.out.splitlines()[:-1])) <= 100
    monkeypatch.setattr("mechsteer.model.load_model", None)
    assert run(capsys, "patch", "--out", str(out), columns=100).out == first.out


@needs_browser
def test_the_page_draws_needs_no_network_and_takes_tokens_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hostile = tmp_path / "out", "<script>alert(1)</script>"
    pair = [f"{hostile} John gave a drink to", f"{hostile} Mary gave a drink to"]
    assert run(capsys, "patch", *pair, "--out", str(out), "--quiet", "--layers", "1").status == 0
    page = (out / "figures.html").read_text()
    assert hostile not in page and "&lt;script&gt;alert(1)" in page
    errors, asked = console_and_network(out / "figures.html")
    assert errors == [] and asked == []


def test_several_pairs_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "clean": [CLEAN, CORRUPT], "corrupt": [CORRUPT, CLEAN],
        "right": [" Mary", " John"], "wrong": [" John", " Mary"],
    }  # fmt: skip
    paths = {}
    for name, lines in files.items():
        paths[name] = str(tmp_path / f"{name}.txt")
        Path(paths[name]).write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    said = run(
        capsys, "patch", paths["clean"], paths["corrupt"], "--answer", paths["right"], "--other", paths["wrong"],
        "--out", str(out), "--layers", "0,1", "--quiet", "--json",
    )  # fmt: skip
    assert said.status == 0 and said.json["prompts"] == 2
    effect = ms.Result.load(out / "effect.safetensors")
    alone = maps("exact", layers=[0, 1])["effect"].isel(prompt=0)
    np.testing.assert_allclose(effect["effect"].isel(prompt=0).values, alone.values, atol=1e-4)
    assert effect["source"].values[0] == pytest.approx(13.32, abs=0.01) and effect["base"].values[1] < 0
    assert said.json["cells"][0]["low"] <= said.json["cells"][0]["share"] <= said.json["cells"][0]["high"]


def eight_pairs(folder: Path) -> list[str]:
    """Arguments of eight pairs in two files."""
    text = "When Mary and John went to the {}, {} gave a {} to"
    things = [(place, thing) for place in ("store", "park") for thing in ("drink", "book", "ring", "key")]
    for name, who in (("clean", "John"), ("corrupt", "Mary")):
        (folder / f"{name}.txt").write_text("".join(text.format(a, who, b) + "\n" for a, b in things))
    return [str(folder / "clean.txt"), str(folder / "corrupt.txt")]


@pytest.mark.parametrize("correction", [None, "fdr_bh"])
def test_cells_that_are_more_than_chance_are_marked(
    correction: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = [*eight_pairs(tmp_path), "--site", "z", "--significance", "0.05", "--top", "36", "--out", str(out)]
    asked += [] if correction is None else ["--correction", correction]
    said = run(capsys, "patch", *asked, "--quiet", "--json")
    assert said.status == 0
    effect = ms.Result.load(out / "effect.safetensors")
    expected = significant(effect, correction=correction or "max_t")
    xr.testing.assert_identical(ms.Result.load(out / "significance.safetensors").data, expected.data)
    matters = expected["matters"]
    assert said.json["matter"] == {"cells": int(matters.sum()), "of": matters.size} and 0 < matters.sum() < matters.size
    for cell in said.json["cells"]:
        assert cell["matters"] == bool(matters.sel(cell["at"])) and cell["p"] == float(expected["p"].sel(cell["at"]))
    # The figure has a dot on each of them, and the table a star.
    drawn = (out / "figures.html").read_text()
    assert "p \\u003c= 0.05" in drawn or "p &lt;= 0.05" in drawn or "p \\u0026lt;= 0.05" in drawn
    shown = run(capsys, "patch", *asked).out
    assert (
        shown.count(" *") == matters.sum()
        and f"{int(matters.sum())} of 36 cells have an effect with p <= 0.05" in shown
    )


def test_an_answer_from_before_marks_is_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    first = run(capsys, "patch", "--out", str(out), "--layers", "0")
    for name in ("command.json", "summary.json"):
        held = json.loads((out / name).read_text())
        for key in ("significance", "correction"):
            (held.get("asked") or held).pop(key)
        (out / name).write_text(json.dumps(held))
    again = run(capsys, "patch", "--out", str(out), "--layers", "0")
    assert again.status == 0 and again.out == first.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--significance", "0.05"], "--significance 0.05 takes 6 pairs of prompts, and 1 is given"),
        (["--significance", "2"], "--significance 2 is no level: give a number between 0 and 1"),
        (["--correction", "holm"], "--correction holm is for --significance: leave it out, or add that"),
        (
            ["--significance", "0.05", "--correction", "bonferroni"],
            "--correction 'bonferroni' is none of max_t, holm, fdr_bh, none",
        ),
        (["One."], "CORRUPT is missing: give both prompts, CLEAN and CORRUPT, or none for the example"),
        ([" ", "x"], "CLEAN is empty: give a prompt, or a file with one a line"),
        ([CLEAN, "Mary"], "align"),
        (["{folder}/none.txt", "x"], "none.txt names no file: give a file that exists, or the prompt itself"),
        (["{folder}/empty.txt", "x"], "empty.txt is empty: give a file with one text a line"),
        (["{folder}/two.txt", CORRUPT], "CLEAN and CORRUPT are 2 and 1 prompts: give as many"),
        (["--answer", "{folder}/two.txt"], "--answer holds 2 tokens for 1 prompts: give one for all, or one for each"),
        (["--answer", " Marybelle Smith"], "--answer"),
        (["--answer", ""], '--answer is empty: give a token, such as " Mary" with its leading space'),
        (["--site", "resid_per"], "--site 'resid_per': Site kind 'resid_per' does not exist. Nearest: resid_pre"),
        (["--site", ","], "--site is empty: give a kind, such as resid_pre"),
        (["--over", "layer,posi"], "--over 'posi' is none of layer, head, pos, dest, src"),
        (["--over", "layer,layer"], "--over 'layer,layer' cannot be drawn: give one to three different dimensions"),
        (["--over", "layer,head"], "head"),
        (["--layers", "x"], "--layers 'x' cannot be read: give numbers such as"),
        (["--layers", "9"], "9"),
        (["--method", "guess"], "--method 'guess' is none of exact, attribution, path"),
        (["--mode", "both"], "--mode 'both' is none of denoising, noising"),
        (["--method", "path", "--over", "layer"], "--method path has a cell for every sender: leave out --over"),
        (["--receivers", "q"], "--receivers 'q' is for --method path: leave it out, or add that"),
        (["--method", "path", "--receivers", "blocks.0.hook_nothing"], "hook_nothing"),
        (["--top", "0"], "--top"),
        (["--dtype", "int3"], "--dtype 'int3' is none of float32, float64, bfloat16, float16"),
        (["--executor", "spark"], "--executor 'spark' is none of local, ray"),
        (["--gpus", "0.5"], "--gpus is for --executor ray: leave it out, or add that"),
        (["--workers", "2"], "--workers is for --executor ray: leave it out, or add that"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here ("),
        (["--model", "{folder}/model"], "model"),
        (["--out", "{folder}/other"], "is not empty and holds nothing of `mechsteer patch` (it holds thesis.tex)"),
        (["--out", "{folder}/two.txt"], "two.txt is a file. Give a folder, new or empty."),
    ],
)
def test_mistakes_end_with_status_2_and_one_line_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "two.txt").write_text(f"{CLEAN}\n{OFF}\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    given = [argument.format(folder=tmp_path) for argument in arguments]
    rest = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    said = run(capsys, "patch", *given, *rest, "--quiet", "--json")
    assert said.status == 2 and said.out == ""
    assert message in said.err.replace("\n", " ") and "Traceback" not in said.err
    if message != "--top":  # typer's own errors stand in a box
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_another_command_on_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(capsys, "patch", "--out", out, "--layers", "0", "--quiet").status == 0
    before = contents(tmp_path)
    said = run(capsys, "patch", "--out", out, "--layers", "1", "--quiet")
    assert said.status == 2
    assert "holds another answer (layers: [0] there, [1] here). Give another --out, or the options of" in said.err
    said = run(capsys, "models", "--json")
    assert said.status == 0 and [each["name"] for each in said.json["models"]][:2] == ["pocket", "pocket-1l"]
    said = run(capsys, "vector", "--out", out, "--quiet")
    assert said.status == 2 and "holds another answer (command: 'patch' there, 'vector' here)" in said.err
    assert contents(tmp_path) == before


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mechsteer.patching import activation

    out, command = tmp_path / "out", ["patch", "--out", str(tmp_path / "out"), "--layers", "0,1"]
    done = activation.sweep

    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "sweep", stopped)
        said = run(capsys, *command)
    assert said.status == 130 and said.out == "" and "Traceback" not in said.err
    assert "Stopped. The same command begins again." in said.err and not out.exists()

    def stopped_after(*args: Any, **options: Any) -> Any:
        done(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "sweep", stopped_after)
        said = run(capsys, *command)
    assert said.status == 130 and "Stopped. The same command goes on from there." in said.err
    assert (out / "unfinished").is_dir() and not (out / "summary.json").exists()
    assert run(capsys, *command, "--quiet").status == 0
    assert not (out / "unfinished").exists()
    found = ms.Result.load(out / "effect.safetensors")["effect"].values
    np.testing.assert_allclose(found, maps("exact", layers=[0, 1])["effect"].values, atol=1e-4)
