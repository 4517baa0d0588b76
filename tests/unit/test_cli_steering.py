"""`mechsteer vector`, `strength`, `travel` and `features`: their Results are those of the library, called directly."""

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from browser import console_and_network, needs_browser
from commands import ASKED, Said, asked, contents, loaded_once, run

import mechsteer as ms
from mechsteer.cli.options import concept_names, topic_names
from mechsteer.directions import import_gguf
from mechsteer.features import rank_by_attribution, rank_by_contrast, rank_by_similarity
from mechsteer.pocket.lexicon import TOPICS
from mechsteer.propagator import identity_pairs, linear_regime
from mechsteer.strength import choose_alpha, shipped
from mechsteer.study.case import Case
from mechsteer.study.chapters.travel import N_RANDOM, SIZES
from mechsteer.study.fork import forks
from mechsteer.study.measures import CE
from mechsteer.study.pushes import chosen_vector, mean_vectors
from mechsteer.study.settings import Settings, as_requests

SMALL = ["--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_once(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a quick run that writes to `out`."""
    return ["--requests", asked(tmp_path), *SMALL, "--out", str(tmp_path / "out")]


def case(name: str = "pocket", prefix: str = cases.CATS) -> Case:
    """What the commands are about."""
    settings = Settings.of(model=name, prefix=prefix, requests=as_requests(ASKED), max_new_tokens=8)
    return Case.of(settings, model=cases.model(name))


def same(found: Any, expected: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol)


def told(said: Said) -> None:
    """A finished command's text fits the terminal, but for the line with the folder."""
    assert said.status == 0
    assert max(map(len, said.out.splitlines()[:-1])) <= 100
    assert said.out.splitlines()[-1].startswith("wrote: ")


# ---- vector ----


def test_a_vector_of_a_prefix(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "vector", cases.CATS, "--alpha", "0,4", "--layer", "3", "--gguf", *small, "--json")
    assert said.status == 0 and "loading pocket" in said.err
    one, out, about = case(), tmp_path / "out", said.json
    search = one.rows("search")
    site = ms.Site("resid_post", 3)
    expected = ms.difference_of_means(
        one.model, one.reference[search], one.with_reference(one.plain)[search], sites="resid_post",
        tokens="completion", progress=False,
    )  # fmt: skip
    found = ms.Direction.load(out / "vector.safetensors", model=one.model)
    same(found.vector, expected[site].vector)
    # It is the vector of the study, at a depth that both take.
    same(found.vector, expected[site].vector if 3 not in _depths(one) else mean_vectors(one)["after block 3"].vector)
    assert found.origin["prefix"] == cases.CATS
    assert about["norm"] == pytest.approx(expected[site].norm, rel=1e-4)
    near = [(each["token"], pytest.approx(each["cosine"], abs=1e-4)) for each in about["nearest"]]
    assert expected[site].nearest_tokens(one.model, 10) == near
    held = one.plain[one.rows("held-out")]
    steered = one.model.generate(held, max_new_tokens=8, interventions=[ms.Add(found, 4.0)], progress=False)
    assert [each["steered"][1] for each in about["completions"]] == steered.completions
    assert all(each["plain"] == each["steered"][0] for each in about["completions"])
    assert about["shows"][2] == pytest.approx(float(one.judge.many(steered.completions).mean()))  # type: ignore[union-attr]
    layers = ms.Result.load(out / "layers.safetensors")
    same(layers["norm"].sel(layer=5), expected[ms.Site("resid_post", 5)].norm, 1e-2)
    exported = import_gguf(out / "vector.gguf", model=one.model)
    assert {each.layer for each in exported} == {1, 2, 3, 4, 5}
    same(exported[site].vector, found.vector)


def _depths(one: Case) -> set[int | None]:
    return {each.site.layer for each in mean_vectors(one).values()}


def test_vectors_of_the_last_token_of_a_concept_and_of_texts(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, site = case("pocket-1l"), ms.Site("resid_post", 0)
    joy = shipped(negatives="contrastive")["joy"]
    files = {}
    for name, texts in {"positive": ASKED[:3], "negative": ASKED[3:]}.items():
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(texts) + "\n")
    search = one.rows("search")
    texts = ["--positive", str(files["positive"]), "--negative", str(files["negative"])]
    ways = {
        "last": (["--tokens", "last"], (one.prefixed[search], one.plain[search]), {"tokens": "last"}),
        "joy": (["--concept", "joy", "--negatives", "contrastive"], (joy.positives, joy.negatives), {}),
        "own": (texts, (ASKED[:3], ASKED[3:]), {}),
    }  # fmt: skip
    for name, (arguments, groups, options) in ways.items():
        out = tmp_path / name
        rest = [*small[:-1], str(out), "--model", "pocket-1l", "--alpha", "2"]
        told(run(capsys, "vector", *arguments, *rest, columns=100))
        expected = ms.difference_of_means(one.model, *groups, sites=site, progress=False, **options)[site]
        same(ms.Direction.load(out / "vector.safetensors").vector, expected.vector)
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["shows"] is None) == (name == "own")


# ---- strength ----


def test_the_strength_of_a_prefix_is_that_of_the_study(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "strength", cases.CATS, *small, "--model", "pocket-1l", "--quiet", "--json")
    about, expected = said.json, chosen_vector(case("pocket-1l"))
    assert said.err == "" and said.status == (0 if about["works"] else 1)
    found = ms.Result.load(tmp_path / "out" / "strength.safetensors")
    same(found["alpha"], expected.chosen.result["alpha"])
    same(found["target"], expected.chosen.result["target"])
    assert about["best"] == expected.name
    same(ms.Direction.load(tmp_path / "out" / "vector.safetensors").vector, expected.direction.vector)
    page = (tmp_path / "out" / "figures.html").read_text()
    assert page.count('class="plotly-graph-div"') == len(expected.vectors)


def test_the_strength_of_a_vector_from_a_file(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, made = case("pocket-1l"), tmp_path / "made"
    rest = [*small, "--model", "pocket-1l"]
    assert run(capsys, "vector", *small[:-1], str(made), "--model", "pocket-1l", "--quiet").status == 0
    file = made / "vector.safetensors"
    said = run(capsys, "strength", "--vector", str(file), "--weight", "0.5", "--budget", "5", *rest, columns=100)
    assert said.status in (0, 1) and "with the prefix" not in said.err
    search = one.rows("search")
    own = one.model.generate(one.plain[search], max_new_tokens=8, progress=False)
    direction = ms.Direction.load(file, model=one.model)
    expected = choose_alpha(
        one.model, direction, one.plain[search], one.judge, side_effect=CE, side_prompts=own, weight=0.5, budget=5,  # type: ignore[arg-type]
        max_new_tokens=8, progress=False,
    )  # fmt: skip
    found = ms.Result.load(tmp_path / "out" / "strength.safetensors")
    same(found["point_alpha"], expected.result["point_alpha"])
    same(found["score"], expected.result["score"])
    assert said.status == int(not any(expected.works.values()))
    # What it is for is known from the vector's own account of itself, or said; else it is asked for.
    nameless = ms.Direction(direction.vectors, direction.site, direction.model)
    nameless.save(tmp_path / "nameless.safetensors")
    again = [
        "strength",
        "--vector",
        str(tmp_path / "nameless.safetensors"),
        *rest[:-3],
        str(tmp_path / "x"),
        *rest[-2:],
    ]
    said = run(capsys, *again, "--quiet")
    assert said.status == 2 and "Nothing says what" in said.err and "or a --topic." in said.err
    assert not (tmp_path / "x").exists()
    assert run(capsys, *again, "--quiet", "--topic", "cats", "--budget", "5").status in (0, 1)


# ---- travel ----


def test_travel_is_what_the_propagator_says(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told(run(capsys, "travel", cases.CATS, "--from", "3", "--to", "4", *small, columns=100))
    one = case()
    held = forks(one, one.rows("held-out"))
    assert held is not None
    model = one.model

    def stream(prompts: ms.Prompts, site: ms.Site) -> torch.Tensor:
        run_ = model.run(prompts, record=site, logits="none")
        return run_.activations[site][run_.prompts.at(-1)]

    source, target = ms.Site("resid_pre", 3), ms.Site("resid_post", 4)
    before = stream(held.plain, source)
    own = stream(held.prefixed, source) - before
    push = ms.Result.load(out / "push.safetensors").sel(layer=4)
    run_ = model.run(
        held.plain, [ms.Replace(source, stream(held.prefixed, source), at=-1)], record=target, logits="none"
    )
    true = run_.activations[target][run_.prompts.at(-1)] - stream(held.plain, target)
    linear = ms.Propagator(model, held.plain, source, target, source_pos=-1, target_pos=-1).mv(own)
    cosine = torch.nn.functional.cosine_similarity
    same(push["length"], true.norm(dim=-1) / own.norm(dim=-1))
    same(push["cos"], cosine(true, own))
    same(push["linear_cos"], cosine(linear, true))
    # Before the last of the blocks looked at, what is put in place there is whole.
    assert push["prefix_cos"].values.min() > 0.3
    share = identity_pairs(model, held.plain, vectors={"prefix": own}, random=N_RANDOM)
    found = ms.Result.load(out / "identity.safetensors")
    assert found["rest"].sizes["source"] == found["rest"].sizes["target"] == 2
    for name in ("c", "rest"):
        same(found[name].sel(source=3, target=4), share[name].sel(source=3, target=4))
    same(found["cos"].sel(source=3, target=4), share["cos"].sel(source=3, target=4))
    mean = own.mean(0)
    regime = linear_regime(
        model, held.plain, measure=held.gap, kind="resid_pre", layers=[3], at=-1, sizes=SIZES, random=N_RANDOM,
        directions={"prefix": {source: ms.Direction(mean, source, model.id)}}, progress=False,
    )  # fmt: skip
    kept = ms.Result.load(out / "regime.safetensors").sel(layer=3)
    same(kept["true"].sel(direction="prefix"), regime["true"].sel(layer=3, direction="prefix"), 1e-3)
    same(kept["relative_radius"].sel(group="prefix"), regime["relative_radius"].sel(layer=3, group="prefix"), 1e-3)
    moved = ms.Result.load(out / "moved.safetensors")
    gaps = [held.gap(model.run(prompts, edits, logits="last")) for prompts, edits in (
        (held.plain, []), (held.plain, [ms.Replace(source, stream(held.prefixed, source), at=-1)]), (held.prefixed, [])
    )]  # fmt: skip
    same(moved["change"].sel(layer=3), gaps[1] - gaps[0], 1e-3)
    same(moved["whole"], gaps[2] - gaps[0], 1e-3)


# ---- features ----


def test_features_are_the_three_rankings(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    said = run(capsys, "features", cases.CATS, "--top", "3", "--sort", "attribution", *small, "--json")
    assert said.status == 0
    one, about = case(), said.json
    sae = ms.load_sae("pocket", model=one.model)
    search = one.rows("search")
    reference, same_words = one.reference[search], one.with_reference(one.plain)[search]
    data = ms.Result.load(out / "features.safetensors").data
    contrast = rank_by_contrast(one.model, sae, reference, same_words, at="completion", n=sae.n_features)
    for name, key in {"difference": "difference", "with": "positive", "without": "negative"}.items():
        same(data[name], contrast.data[key].sel(feature=data["feature"]))
    attribution = rank_by_attribution(
        one.model, sae, same_words, against=reference, measure=-CE, n=sae.n_features, progress=False
    ).data["attribution"].mean("prompt")  # fmt: skip
    same(data["attribution"], -attribution.sel(feature=data["feature"]))
    vector = ms.difference_of_means(one.model, reference, same_words, sites=[sae.site], tokens="completion")
    similarity = rank_by_similarity(sae, vector[sae.site], n=sae.n_features).data["decoder"]
    same(data["cosine"], similarity.sel(feature=data["feature"]))
    ranks = data["attribution_rank"].values.tolist()
    assert ranks[:3] == [1, 2, 3] and ranks == sorted(ranks)
    assert [each["feature"] for each in about["features"]] == data["feature"].values.tolist()
    assert {1, 2, 3} <= set(data["contrast_rank"].values.tolist()) & set(data["similarity_rank"].values.tolist())
    # From a folder it is the same.
    folder = str(Path(cases.__file__).parents[1] / "data" / "saes" / "pocket")
    again = run(
        capsys, "features", cases.CATS, "--top", "3", "--sae", folder, *small[:-1], str(tmp_path / "x"), columns=100
    )
    told(again)
    other = ms.Result.load(tmp_path / "x" / "features.safetensors").data
    assert set(other["feature"].values.tolist()) == set(data["feature"].values.tolist())
    assert again.out.index(str(about["features"][0]["feature"])) > 0


# ---- all of them ----


@needs_browser
def test_pages_draw_and_need_no_network(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = [*small[:-1], str(tmp_path / "out"), "--quiet"]
    assert run(capsys, "vector", "--concept", "joy", "--model", "pocket-1l", *rest).status == 0
    assert console_and_network(tmp_path / "out" / "figures.html") == ([], [])


def test_names_that_help_and_completion_offer_are_those_that_there_are() -> None:
    assert concept_names() == list(shipped()) and topic_names() == list(TOPICS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["vector", " "], "prefix: it is empty. Give an instruction"),
        (["vector", cases.CATS, "--concept", "joy"], "a prefix and --concept are given: a vector is made of one of"),
        (["vector", "--positive", "{folder}/one.txt"], "--positive and --negative go together: give a file of texts"),
        (["vector", "--positive", "{folder}/no.txt", "--negative", "{folder}/one.txt"], "cannot be read (No such file"),
        (["vector", "--positive", "{folder}/empty.txt", "--negative", "{folder}/one.txt"], "empty.txt is empty"),
        (["vector", "--concept", "envy"], "--concept 'envy' is none of joy, gloom"),
        (["vector", "--concept", "joy", "--negatives", "few"], "--negatives 'few' is none of random, contrastive"),
        (["vector", "--tokens", "all"], "--tokens 'all' is none of completion, last"),
        (["vector", "--alpha", "much"], "--alpha 'much' cannot be read: give finite numbers"),
        (["vector", "--alpha", "nan"], "--alpha 'nan' cannot be read: give finite numbers"),
        (["vector", "--layer", "1"], "has layers 0 to 0"),
        (["strength", cases.CATS, "--vector", "{folder}/one.txt"], "a prefix and --vector are given: give the one"),
        (["strength", "--vector", "{folder}/no.safetensors"], "no.safetensors cannot be read (No such file"),
        (["strength", "--vector", "{folder}/one.txt"], "one.txt"),
        (["strength", "--topic", "physics"], "--topic 'physics' is none of cats, dogs"),
        (["strength", "--topic", "cats", "--words", "cat"], "--topic and --words are given: give the one that says"),
        (["strength", "--budget", "4"], "--budget"),
        (["strength", "--weight", "-1"], "--weight"),
        (["travel", "--from", "4", "--to", "2"], "--from 4 comes after --to 2: give layers in the order of the model"),
        (["travel", "--from", "4"], "--from 4 is no layer of pocket-1l, which has layers 0 to 0"),
        (["travel"], "The prefix adds nothing at the fork before layer 0 of pocket-1l: attention has to carry it"),
        (["features"], "No sparse autoencoder that ships with mechsteer belongs to pocket-1l"),
        (["features", "--sae", "{folder}/nowhere"], "nowhere is no folder: give one in SAELens's format"),
        (["features", "--sae", "pocket"], "pocket"),
        (["features", "--sort", "size"], "--sort 'size' is none of contrast, attribution, similarity"),
        (["features", "One.", "--prefix", "Two."], "the prefix is given twice, as 'One.' and as --prefix 'Two.'"),
        (["travel", "--requests", "{folder}/one.txt"], "A study needs at least one of each, so at least two requests"),
        (["strength", "--out", "{folder}/other"], "is not empty and holds nothing of `mechsteer strength` (it holds"),
        (["features", "--dtype", "int3"], "dtype: Input should be 'float32'"),
    ],
)  # fmt: skip
def test_mistakes_end_with_status_2_and_one_line_and_write_nothing(
    command: list[str], message: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"one.txt": "one\n", "empty.txt": "\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "completions.json").write_text("precious")
    before = contents(tmp_path)
    given = [argument.format(folder=tmp_path) for argument in command]
    defaults = dict(zip(small[::2], small[1::2], strict=True)) | {"--model": "pocket-1l"}
    rest = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    said = run(capsys, *given, *rest, "--quiet", "--json")
    assert said.status == 2 and said.out == ""
    assert message in said.err.replace("\n", " ") and "Traceback" not in said.err
    if not message.startswith("--") or " " in message:  # typer's own errors stand in a box
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_completions(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    command = ["vector", cases.CATS, "--model", "pocket-1l", "--alpha", "1", *small]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechsteer.directions.difference_of_means", stopped)
        said = run(capsys, *command)
    assert said.status == 130 and said.out == "" and "Stopped. The same command goes on from there." in said.err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"completions.json", "command.json"}
    monkeypatch.setattr(Case, "_generate", stopped)
    assert run(capsys, *command, "--quiet").status == 0
