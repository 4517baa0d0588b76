"""Prefixes for the states of each layer: their numbers are those of plain runs, and a stopped sweep goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.judges import judge_of
from mechsteer.prefix import Constraints, MatchedPrefix
from mechsteer.prefix.layer_sweep import match_layers
from mechsteer.vocabulary import insert
from tests.cases import CATS
from tests.cases import model as shipped

REQUESTS = ["Write a haiku on my birthday.", "Tell me something new.", "I want two reasons.", "Describe the sea."]
LAYERS = [0, 3]
STAGES = ["none", "soft", "projected", "beam", "final"]
OPTIONS: dict[str, Any] = {
    "held_out": [2, 3], "evaluations": 20, "soft_steps": 8, "n_restarts": 1, "beam": 1, "top_k": 2,
    "constraints": Constraints(forbidden_words=("cat",)), "max_new_tokens": 6, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return shipped("pocket")


@pytest.fixture(scope="module")
def chats(pocket: ms.Model) -> ms.Prompts:
    return ms.Prompts.from_chats(REQUESTS, pocket, slots=3, labels=REQUESTS)


@pytest.fixture(scope="module")
def plain(pocket: ms.Model) -> ms.Prompts:
    return ms.Prompts.from_chats(REQUESTS, pocket)


@pytest.fixture(scope="module")
def reference(pocket: ms.Model) -> list[int]:
    return pocket.tokenizer.encode(CATS, add_special_tokens=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def found(pocket: ms.Model, chats: ms.Prompts, plain: ms.Prompts, reference: list[int], folder: Path) -> ms.Result:
    return match_layers(
        pocket, chats, reference, layers=LAYERS, plain=plain, judge=judge_of(CATS), out=folder, **OPTIONS
    )


def states(model: ms.Model, prompts: ms.Prompts, layer: int, row: int, edits: Any = ()) -> list[torch.Tensor]:
    """At the tokens of the user's text one by one, and at the last one, each of one prompt run alone."""
    run = model.run(prompts[[row]], edits, record=ms.Site("resid_post", layer))
    values = run.activations[ms.Site("resid_post", layer)][0].double()
    user = run.prompts.span("user")[0].nonzero()[:, 0].tolist()
    return [*(values[at] for at in user), values[int(run.prompts.decision[0])]]


def test_numbers_are_those_of_plain_runs(
    pocket: ms.Model, chats: ms.Prompts, plain: ms.Prompts, reference: list[int], folder: Path, found: ms.Result
) -> None:
    assert found["layer"].values.tolist() == LAYERS and found["stage"].values.tolist() == STAGES
    assert found["prompt"].values.tolist() == REQUESTS
    assert found["split"].values.tolist() == ["search", "search", "held-out", "held-out"]
    told = insert(chats, reference, where="prefix")
    for layer in LAYERS:
        match = MatchedPrefix.load(folder / f"resid_post-{layer}")
        ids = match.stages.provenance["options"]["ids"]
        runs: dict[str, tuple[ms.Prompts, Any]] = {"none": (plain, ()), "soft": (chats, [match.soft.intervention()])}
        runs |= {stage: (insert(chats, ids[stage], where="prefix"), ()) for stage in STAGES[2:]}
        assert str(found["text"].sel(layer=layer, stage="final").values) == match.text
        assert int(found["evaluated"].sel(layer=layer)) == int(match.stages["evaluated"].sum()) <= 20
        assert found.provenance["options"]["ids"][str(layer)] == list(match.ids)
        for row in range(len(REQUESTS)):
            squares: dict[str, float] = {}
            target = states(pocket, told, layer, row)
            for stage, (prompts, edits) in runs.items():
                pairs = list(zip(states(pocket, prompts, layer, row, edits), target, strict=True))
                cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in pairs]
                squared = [float(((x - y) ** 2).mean()) for x, y in pairs]
                # The request's tokens count as one, the last one as much.
                cosine, squares[stage] = ((np.mean(each[:-1]) + each[-1]) / 2 for each in (cosines, squared))
                cell = found.data.sel(layer=layer, stage=stage).isel(prompt=row)
                assert float(cell["cosine"]) == pytest.approx(cosine, abs=1e-5), (layer, stage)
                assert float(cell["squared"]) == pytest.approx(squares[stage], rel=1e-3, abs=1e-6), (layer, stage)
                share = 1 - squares[stage] / squares["none"]
                assert float(cell["explained"]) == pytest.approx(share, rel=1e-3, abs=1e-3)
        searched = found["cosine"].sel(layer=layer).isel(prompt=[0, 1]).mean("prompt")
        for stage in STAGES[1:]:
            loss = float(match.stages["loss"].sel(stage=stage))
            assert float(searched.sel(stage=stage)) == pytest.approx(-loss, abs=1e-5)
        assert float(searched.sel(stage="soft")) > float(searched.sel(stage="none"))


def test_continuations_are_those_of_plain_runs(
    pocket: ms.Model, chats: ms.Prompts, reference: list[int], found: ms.Result
) -> None:
    judge = judge_of(CATS)
    assert judge is not None
    for layer in LAYERS:
        ids = found.provenance["options"]["ids"][str(layer)]
        assert not any("cat" in pocket.tokenizer.decode([each]).lower() for each in ids)
        said = pocket.generate(insert(chats, ids, where="prefix"), max_new_tokens=6).completions
        assert found["completion"].sel(layer=layer).values.tolist() == said
        assert found["shows"].sel(layer=layer).values.tolist() == [judge(text) for text in said]
    told = pocket.generate(ms.Prompts.from_chats(REQUESTS, pocket, prefix=CATS), max_new_tokens=6).completions
    assert found["reference_completion"].values.tolist() == told
    assert found["reference_shows"].values.tolist() == [judge(text) for text in told]


def test_it_is_kept_and_drawn(found: ms.Result, tmp_path: Path) -> None:
    found.save(tmp_path / "layers.safetensors")
    loaded = ms.Result.load(tmp_path / "layers.safetensors")
    assert loaded.data.equals(found.data)
    figure = loaded.sel(stage="final").plot("explained")
    assert np.allclose(figure.data[-1].y, found["explained"].sel(stage="final").mean("prompt").values)


def test_the_squared_error_can_be_what_is_searched_by(
    pocket: ms.Model, chats: ms.Prompts, reference: list[int], tmp_path: Path
) -> None:
    options = {**OPTIONS, "evaluations": 12}
    found = match_layers(
        pocket, chats, reference, layers=[2], at=("decision",), measure="mse", n_tokens=2, out=tmp_path, **options
    )
    match = MatchedPrefix.load(tmp_path / "resid_post-2")
    assert len(match.ids) == 2 and "shows" not in found.data
    searched = found["squared"].sel(layer=2, stage="final").isel(prompt=[0, 1])
    assert float(searched.mean()) == pytest.approx(match.loss, rel=1e-4)
    # Without plain prompts, what separates prefix and request stays.
    bare = insert(chats, where="prefix")
    assert bare.lengths.tolist() == [n - 3 for n in chats.lengths.tolist()]
    told, site = insert(chats, reference, where="prefix"), ms.Site("resid_post", 2)
    target, none = (pocket.run(each, record=site).activations[site] for each in (told, bare))
    for row, last in enumerate(bare.decision.tolist()):
        squared = (none[row, last] - target[row, last + len(reference)]).square().mean()
        assert float(found["squared"].sel(layer=2, stage="none")[row]) == pytest.approx(float(squared), rel=1e-3)


def test_a_stopped_sweep_goes_on(
    pocket: ms.Model, chats: ms.Prompts, plain: ms.Prompts, reference: list[int], found: ms.Result, tmp_path: Path
) -> None:
    seen: list[tuple[int, str]] = []
    stops = ["beam", "final"]  # before the search, and in it, where a match alone ends with the best so far

    def stop(layer: int, stage: str, done: int, loss: float, text: str) -> None:
        seen.append((layer, stage))
        if layer == LAYERS[1] and stops and stage == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    options: dict[str, Any] = {"layers": LAYERS, "plain": plain, "judge": judge_of(CATS), "out": tmp_path, **OPTIONS}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            match_layers(pocket, chats, reference, tell=stop, **options)
    assert (LAYERS[0], "final") in seen and not stops
    again = match_layers(pocket, chats, reference, **options)
    assert again.data.equals(found.data)
    with pytest.raises(MechsteerError, match="holds a"):
        match_layers(pocket, chats, reference, **{**options, "seed": 1})


def test_errors_say_what_to_do(pocket: ms.Model, chats: ms.Prompts, reference: list[int]) -> None:
    for ids, options, text in (
        (reference, {"layers": []}, "layers=[] are none, or not all of pocket, which has layers 0 to 5"),
        (reference, {"layers": [6]}, "layers=[6] are none, or not all of pocket"),
        (reference, {"held_out": [4]}, "held_out=[4] are no rows of 4 prompts, counted from 0"),
        (reference, {"held_out": range(4)}, "held_out= takes all 4 prompts. Leave some to search on"),
        ([], {}, "reference=[] and at=['user', 'decision']: pass at least one token of either"),
        (reference, {"at": []}, "at=[]: pass at least one token of either"),
        ([99999], {}, "token id 99999 is none of pocket"),
        (reference, {"plain": chats[[0]]}, "plain has 1 prompts, and 4 were passed. Pass the same ones"),
        (reference, {"measure": "l1"}, "StateMatch(measure=) got 'l1'"),
        (reference, {"kind": "pattern"}, "which has no features for each token"),
    ):
        with pytest.raises(MechsteerError) as caught:
            match_layers(pocket, chats, ids, **{**OPTIONS, **options})
        assert text in str(caught.value), text
    bare = ms.Model(pocket.hooked, tokenizer=None, name="bare")
    bare.tokenizer = None
    with pytest.raises(MechsteerError, match="bare has no tokenizer, and continuations are text"):
        match_layers(bare, ms.Prompts.from_ids([[1, 2]]), [3])
