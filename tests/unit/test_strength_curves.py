"""Curves of next-token probabilities against the strength, beside one full forward pass for each."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import assert_close

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.strength.concepts import Concept
from mechsteer.strength.curves import concept_curves, over_seeds, token_curves
from mechsteer.strength.recipes import alpha_grid, published_alphas
from mechsteer.strength.tables import SetProbabilities
from mechsteer.strength.vectors import concept_vectors, resampled_vectors

CONTEXTS = ["The cat sat on", "When Mary and John went to the store, John gave", "dogs"]
ALPHAS = [-6.0, -1.0, 2.0, 5.0]
CATS = Concept("cats", ("The cat sat on the mat", "A feline purrs"), ("Mary went to the store", "Quick zebras jump"))


def directions(model: ms.Model) -> dict[str, ms.Direction]:
    return concept_vectors(model, CATS, layers=[0, 1, model.n_layers - 1])


def probabilities(model: ms.Model, context: str, direction: ms.Direction, alpha: float, at: str) -> torch.Tensor:
    """All next-token probabilities [d_vocab] under a plain TransformerLens hook."""

    def add(resid: torch.Tensor, hook: object) -> torch.Tensor:
        mask = torch.zeros(resid.shape[1], 1)
        mask[-1 if at == "last" else slice(None)] = 1
        return resid + alpha * mask * direction.vector

    tokens = ms.Prompts.from_strings(context, model).tokens
    with torch.no_grad():
        logits = model.hooked.run_with_hooks(tokens, fwd_hooks=[(direction.site.hook_name, add)])
    return logits[0, -1].softmax(-1)


def naive(model: ms.Model, named: dict[str, ms.Direction], alphas: list[float], at: str) -> torch.Tensor:
    """[direction, alpha, d_vocab, prompt]."""
    cells = [
        torch.stack([probabilities(model, context, each, alpha, at) for context in CONTEXTS], 1)
        for each in named.values()
        for alpha in alphas
    ]
    return torch.stack(cells).view(len(named), len(alphas), -1, len(CONTEXTS))


@pytest.mark.parametrize("at", ["all", "last"])
def test_token_curves_are_those_of_one_forward_for_each(
    zoo_models: Callable[..., ms.Model], architecture: str, at: str
) -> None:
    model, tokens = zoo_models(architecture), [5, 9, 77]
    named = directions(model)
    result = token_curves(model, CONTEXTS, named, ALPHAS, tokens=tokens, at=at)
    assert result["alpha"].values.tolist() == [-6.0, -1.0, 0.0, 2.0, 5.0]  # with 0
    assert dict(result["p"].sizes) == {"direction": 3, "alpha": 5, "token": 3, "prompt": 3}
    expected = naive(model, named, [-6.0, -1.0, 0.0, 2.0, 5.0], at)[:, :, tokens]
    assert_close(torch.tensor(result["p"].values), expected, 1e-5)
    assert_close(torch.tensor(result["delta_p"].values), expected - expected[:, 2:3], 1e-5)
    assert float(abs(result["delta_p"]).max()) > 0.01
    assert result["layer"].dims == ("direction",) and result["layer"].values.tolist() == [0, 1, model.n_layers - 1]
    assert set(result["concept"].values) == {"cats"} and "seed" not in result.data.coords
    texts = [ms.Prompts.from_ids([[token]], tokenizer=model).str_tokens(0)[0] for token in tokens]
    assert result["text"].values.tolist() == texts and result["p"].attrs["units"] == "1"


def test_the_top_tokens_at_both_ends(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    named = directions(model)
    result = token_curves(model, CONTEXTS, named, ALPHAS, top=4)
    expected = naive(model, named, [-6.0, 5.0], "all")
    ids = result["token"].values
    assert len(set(ids)) == len(ids)
    for end, flag in enumerate(("is_top_low", "is_top_high")):
        for d in range(len(named)):
            for prompt in range(len(CONTEXTS)):
                top = set(ids[result[flag].values[d, :, prompt]].tolist())
                assert top == set(expected[d, end, :, prompt].topk(4).indices.tolist())
    every = result["is_top_low"].values | result["is_top_high"].values
    assert every.any((0, 2)).all()  # no token without a reason
    one_sided = token_curves(model, CONTEXTS, named, [0.0, 5.0], top=2)
    unsteered = naive(model, named, [0.0], "all")[0, 0]
    low = one_sided["token"].values[one_sided["is_top_low"].values[0, :, 0]]
    assert set(low.tolist()) == set(unsteered[:, 0].topk(2).indices.tolist())


def test_concept_curves_are_sums_over_sets(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("gpt2")
    named, sets = directions(model), {"a": [5, 9, 9, 60], "b": [77]}
    result = concept_curves(model, CONTEXTS, named, ALPHAS, sets)
    expected = naive(model, named, [-6.0, -1.0, 0.0, 2.0, 5.0], "all")
    total = torch.stack([expected[:, :, [5, 9, 60]].sum(2), expected[:, :, 77]], 2)
    assert result["n_tokens"].values.tolist() == [3, 1] and result["token_set"].values.tolist() == ["a", "b"]
    assert_close(torch.tensor(result["p"].values), total, 1e-5)
    delta = (total - total[:, 2:3]) / torch.tensor([3.0, 1.0])[:, None]  # definition 3.5: the mean over the set
    assert_close(torch.tensor(result["delta_p"].values).float(), delta, 1e-5)


def test_one_direction_needs_no_name(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    direction = directions(model)["cats, layer 1"]
    alone = token_curves(model, CONTEXTS, direction, ALPHAS, tokens=[5])
    assert alone["direction"].values.tolist() == ["blocks.1.hook_resid_post"]
    named = token_curves(model, CONTEXTS, {"cats": direction}, torch.tensor(ALPHAS), tokens=[5])
    np.testing.assert_array_equal(alone["p"].values, named["p"].values)


def test_it_goes_on_where_it_ended(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    model = zoo_models("llama")
    named = directions(model)
    first = token_curves(model, CONTEXTS, named, ALPHAS, tokens=[5, 9], out=tmp_path / "sweep")
    shards = list((tmp_path / "sweep").glob("shard-*"))
    assert shards
    again = token_curves(model, CONTEXTS, named, ALPHAS, tokens=[5, 9], out=tmp_path / "sweep")
    np.testing.assert_array_equal(first["p"].values, again["p"].values)
    assert again.provenance["options"]["flops"] == 0
    with pytest.raises(MechsteerError, match="holds another sweep"):
        token_curves(model, CONTEXTS, named, ALPHAS, tokens=[5, 10], out=tmp_path / "sweep")
    first.save(tmp_path / "curves.safetensors")
    loaded = ms.Result.load(tmp_path / "curves.safetensors")
    np.testing.assert_array_equal(loaded["delta_p"].values, first["delta_p"].values)
    assert loaded["text"].values.tolist() == first["text"].values.tolist()
    assert first.sel(token=5).plot("delta_p").data


def test_mean_and_sd_over_resamples(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    resampled = resampled_vectors(model, CATS, n=3, layers=[1, 2])
    curves = token_curves(model, CONTEXTS, resampled, ALPHAS, tokens=[5, 9])
    assert curves["seed"].values.tolist() == [0, 0, 1, 1, 2, 2]
    result = over_seeds(curves)
    assert result["direction"].values.tolist() == ["cats, layer 1", "cats, layer 2"]
    assert result["layer"].values.tolist() == [1, 2]
    parts = curves["p"].values[1::2]
    np.testing.assert_allclose(result["p"].values[1], parts.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result["p_sd"].values[1], parts.std(0, ddof=1), rtol=1e-4, atol=1e-8)
    assert float(result["p_sd"].max()) > 1e-4 and result["text"].dims == ("token",)
    with pytest.raises(MechsteerError, match="over_seeds needs curves of resampled directions"):
        over_seeds(token_curves(model, CONTEXTS, directions(model), ALPHAS, tokens=[5]))


def test_the_softmax_is_taken_once_for_all_tokens(
    zoo_models: Callable[..., ms.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = zoo_models("llama"), []
    values = SetProbabilities.values
    monkeypatch.setattr(SetProbabilities, "values", lambda self, run: calls.append(run) or values(self, run))
    token_curves(model, CONTEXTS, directions(model), ALPHAS, tokens=list(range(50)))
    assert len(calls) == len({id(run) for run in calls}) <= 3


def test_grids() -> None:
    assert alpha_grid([3, -1.5, 3]) == [-1.5, 0.0, 3.0]
    assert alpha_grid([-0.0, 1.0]) == [0.0, 1.0]
    assert alpha_grid(torch.linspace(-1, 1, 5)) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    linspace = torch.linspace(-4, 4, 21)
    assert float(linspace[10]) != 0.0 and alpha_grid(linspace)[10] == 0.0 and len(alpha_grid(linspace)) == 21
    assert alpha_grid([0.0]) == [0.0]
    assert len(published_alphas("cross entropy")) == 129 and 0.0 in published_alphas("cross entropy")
    for wrong in ([], [float("nan")], [float("inf")]):
        with pytest.raises(MechsteerError, match="Pass at least one strength, all of them finite"):
            alpha_grid(wrong)
    with pytest.raises(MechsteerError, match=r"published_alphas\('mmlu'\) does not exist"):
        published_alphas("mmlu")


def test_errors(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    named = directions(model)
    for wrong, message in (
        (lambda: token_curves(model, CONTEXTS, {}, ALPHAS), "directions is empty. Pass a Direction"),
        (lambda: token_curves(model, CONTEXTS, named, ALPHAS, top=0), "top=0 of 128 tokens were asked for"),
        (lambda: token_curves(model, CONTEXTS, named, ALPHAS, tokens=[128]), "Token id 128 does not exist"),
        (lambda: token_curves(model, CONTEXTS, named, ALPHAS, tokens=torch.tensor([1, 2, 3])), "curves take one set"),
        (lambda: token_curves(model, CONTEXTS, named, ALPHAS, recipe="x"), "recipe='x' does not exist"),
        (lambda: token_curves(model, [], named, ALPHAS, recipe="published"), r"texts got \[\]. Pass a list"),
        (lambda: concept_curves(model, CONTEXTS, named, ALPHAS, {}), "token_sets holds no set"),
        (lambda: concept_curves(model, CONTEXTS, named, ALPHAS, {"a": []}), "a is an empty set of tokens"),
        (lambda: token_curves(model, CONTEXTS, named, ALPHAS, at="nowhere"), "at='nowhere' is no span"),
    ):
        with pytest.raises(MechsteerError, match=message):
            wrong()
