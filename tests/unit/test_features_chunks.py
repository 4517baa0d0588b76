"""Many features: never more than some activations [token, feature] at a time, and the numbers do not depend on it."""

from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import autoencoder
from test_features_ranking import pairs

import mechsteer as ms
from mechsteer import gradients
from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.features import causes, states
from mechsteer.features.causes import mediation
from mechsteer.features.ranking import rank_by_attribution, rank_by_contrast

GAP = ms.LogitGap(5, 9)
FEW = 3  # tokens with all 48 features


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of `encode`."""
    sizes: list[int] = []
    real = SparseAutoencoder.encode

    def encode(self: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return real(self, x)

    monkeypatch.setattr(SparseAutoencoder, "encode", encode)
    return sizes


def unlike(model: ms.Model) -> tuple[ms.Prompts, ms.Prompts]:
    """Requests of unlike lengths with two more tokens before the last six, and without."""
    ends = [([*range(5, 9 + 2 * i)], [*range(40 + i, 46 + i)]) for i in (2, 0, 1)]
    pushed = [[*start, 90, 91, *end] for start, end in ends]
    plain = [[*start, *end] for start, end in ends]
    return ms.Prompts.from_ids(pushed, tokenizer=model), ms.Prompts.from_ids(plain, tokenizer=model)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(states._HELD, "cpu", FEW * 48 + 1)
    monkeypatch.setitem(states._TOKENS, "cpu", 20)
    monkeypatch.setitem(gradients._TOKENS, "cpu", 20)
    monkeypatch.setitem(causes._HELD, "cpu", 1)


def same(one: ms.Result, other: ms.Result) -> None:
    assert set(one.data.data_vars) == set(other.data.data_vars)
    for name in set(one.data.data_vars) - {"auroc"}:  # which counts ties, and rounding unties them
        np.testing.assert_allclose(one[name].values, other[name].values, atol=1e-4, err_msg=str(name))


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_small_chunk_gives_the_same_numbers(
    zoo_models: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, sae = zoo_models("llama"), autoencoder(kind, normalize_activations="layer_norm")
    pushed, plain = unlike(model)
    parts = {"one": [7], "few": [1, 2, 30, 47]}

    def measured() -> list[ms.Result]:
        return [
            rank_by_contrast(model, sae, pushed, plain, at="all", n=48),
            rank_by_attribution(model, sae, pushed, measure=GAP, n=48),
            rank_by_attribution(model, sae, pushed, measure=GAP, against=plain, n=48),
            mediation(model, sae, parts, pushed, plain, measure=GAP),
            mediation(model, sae, parts, pushed, plain, measure=GAP, prefix_tokens="off"),
        ]

    whole = measured()
    assert max(encoded) > 30
    encoded.clear()
    shrink(monkeypatch)
    for one, other in zip(whole, measured(), strict=True):
        if "feature" in one.data.dims:  # features that are as good stand in either order
            one, other = (ms.Result(each.data.sortby("feature"), provenance={}) for each in (one, other))
        same(one, other)
    assert encoded and max(encoded) == FEW


@pytest.mark.parametrize("site", ["heads", "stream"])
def test_mediation_is_setting_each_feature(zoo_models: Any, site: str) -> None:
    model = zoo_models("llama")
    sae = (
        autoencoder("topk", d_in=64, hook="blocks.2.attn.hook_z", reshape_activations="hook_z")
        if site == "heads"
        else autoencoder("jumprelu", normalize_activations="layer_norm")
    )
    pushed, plain = pairs(model)
    features = [3, 17, 40]
    every = list(range(48))
    found = mediation(model, sae, features, pushed, plain, measure=GAP)
    own = {
        name: sae.encode(model.run(side, record=[sae.site]).activations[sae.site].flatten(2))
        for name, side in (("pushed", pushed), ("plain", plain))
    }
    held, raised = own["pushed"].clone(), own["plain"].clone()
    held[:, -6:], raised[:, -6:] = own["plain"][:, -6:], own["pushed"][:, -6:]
    for part, ids in {**{str(each): [each] for each in features}, "together": features, "all features": every}.items():
        for name, prompts, table in (("held", pushed, held), ("raised", plain, raised)):
            expected = GAP(model.run(prompts, [ms.SetFeature(sae, ids, table[..., ids])]))
            np.testing.assert_allclose(found.sel(part=part)[name].values, expected, atol=5e-5)
    assert not np.allclose(found.sel(part="all features")["held"].values, found["prefixed"].values, atol=1e-2)
    exact = rank_by_attribution(model, sae, pushed, measure=GAP, against=plain, n=5, exact=4)
    for place, feature in enumerate(exact["feature"].values[:4].tolist()):
        gone = GAP(model.run(pushed)) - GAP(model.run(pushed, [ms.SetFeature(sae, feature, held[..., [feature]])]))
        np.testing.assert_allclose(exact["exact"].values[place], gone, atol=5e-5)
