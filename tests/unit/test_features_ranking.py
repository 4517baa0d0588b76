"""Ranking features by contrast, attribution and similarity, against loops over prompts, tokens and features."""

from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import autoencoder
from plain import assert_close, with_spans

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.features.directions import feature_direction
from mechsteer.features.ranking import rank_by_attribution, rank_by_contrast, rank_by_similarity
from mechsteer.features.states import counterparts

LENGTHS, LONGER = (9, 12, 10, 11), (13, 16, 14, 15)


def pairs(model: ms.Model) -> tuple[ms.Prompts, ms.Prompts]:
    """The same requests with four more tokens before the last six, and without."""
    plain = ms.Prompts.from_ids([[*range(5 + i, 9 + i), *range(40 + i, 46 + i)] for i in range(4)], tokenizer=model)
    pushed = ms.Prompts.from_ids(
        [[*range(5 + i, 9 + i), 90 + i, 91, 92, 93, *range(40 + i, 46 + i)] for i in range(4)], tokenizer=model
    )
    return pushed, plain


def features_of(sae: Any, model: ms.Model, prompts: ms.Prompts, row: int) -> torch.Tensor:
    """[pos, feature] of one prompt, run alone."""
    alone = prompts[row]
    return sae.module.encode(model.run(alone, record=[sae.site]).activations[sae.site][0][alone.mask[0]])


def test_contrast_is_what_loops_give(zoo_models: Any) -> None:
    model = zoo_models("llama")
    sae = autoencoder("topk")
    positive, negative = with_spans(LENGTHS), with_spans(LONGER, seed=3)
    for at in ("user", "decision", "all"):
        result = rank_by_contrast(model, sae, positive, negative, at=at, n=48)
        sides = []
        for prompts in (positive, negative):
            rows = []
            for row in range(4):
                mask = {"user": prompts[row].span("user"), "all": prompts[row].mask}.get(
                    at, prompts[row].at(prompts[row].decision)
                )
                rows.append(features_of(sae, model, prompts, row)[mask[0][prompts[row].mask[0]]].mean(0))
            sides.append(torch.stack(rows))
        order = result["feature"].values
        assert sorted(order.tolist()) == list(range(48))
        difference = (sides[0] - sides[1]).mean(0)[order]
        assert_close(torch.tensor(result["difference"].values), difference)
        assert (np.diff(result["difference"].values) <= 1e-6).all()
        assert_close(torch.tensor(result["change"].values), (sides[0] - sides[1])[:, order].T)
        for place, feature in enumerate(order):
            wins = [
                (a > b) + 0.5 * (a == b) for a in sides[0][:, feature].tolist() for b in sides[1][:, feature].tolist()
            ]
            assert float(result["auroc"].values[place]) == pytest.approx(sum(wins) / 16)
        inside = (result["difference_low"] <= result["difference"]) & (
            result["difference"] <= result["difference_high"]
        )
        assert bool(inside.all())
    assert result["feature"].dims == ("feature",) and result.plot("difference").data


def test_contrast_of_unlike_numbers_of_prompts_and_by_auroc(zoo_models: Any) -> None:
    model, sae = zoo_models("llama"), autoencoder("topk")
    result = rank_by_contrast(model, sae, with_spans(LENGTHS), with_spans((9, 9)), at="user", by="auroc", n=10)
    assert "change" not in result.data
    assert (np.diff(result["auroc"].values) <= 0).all()
    assert bool((result["difference_low"] <= result["difference_high"]).all())
    assert result["difference_high"].values.max() > result["difference"].values.max()


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_attribution_is_the_slope_of_moving_each_feature(precise: Any, kind: str, against: bool, norm: str) -> None:
    model = precise("llama")
    sae = autoencoder(kind, dtype="float64", normalize_activations=norm)
    pushed, plain = pairs(model)
    measure = ms.LogitGap(5, 9)
    result = rank_by_attribution(model, sae, pushed, measure=measure, against=plain if against else None, n=48)
    for feature in result["feature"].values[:4].tolist():
        own = torch.zeros(4, pushed.tokens.shape[1], 1, dtype=torch.float64)
        base = own.clone()
        for row in range(4):
            own[row, :, 0] = features_of(sae, model, pushed, row)[:, feature]
            if against:
                base[row, :, 0] = own[row, :, 0]
                base[row, -6:, 0] = features_of(sae, model, plain, row)[-6:, feature]
        step = 1e-6
        ends = [
            measure(model.run(pushed, [ms.SetFeature(sae, feature, own + sign * step * (base - own))]))
            for sign in (1, -1)
        ]
        slope = -(ends[0] - ends[1]) / (2 * step)
        assert_close(torch.tensor(result["attribution"].sel(feature=feature).values), slope, 1e-5)


def test_exact_is_the_ablation_and_ranks_alike_where_it_is_small(zoo_models: Any) -> None:
    model, prompts, sae = zoo_models("llama"), with_spans(), autoencoder("standard")
    measure = ms.LogitGap(5, 9)
    result = rank_by_attribution(model, sae, prompts, measure=measure, at="user", n=12, exact=5)
    base = measure(model.run(prompts))
    for place, feature in enumerate(result["feature"].values[:5].tolist()):
        gone = base - measure(model.run(prompts, [ms.SetFeature(sae, feature, 0.0, at="user")]))
        assert_close(torch.tensor(result["exact"].values[place]).float(), gone)
    assert np.isnan(result["exact"].values[5:]).all()
    means = np.abs(result["attribution"].mean("prompt").values)
    assert (np.diff(means) <= 1e-7).all()
    low, mean, high = (result[name].values for name in ("attribution_low", "attribution", "attribution_high"))
    assert ((low <= mean.mean(1)) & (mean.mean(1) <= high)).all()
    assert result.plot("attribution").data


def test_on_a_linear_objective_the_estimate_is_exact(zoo_models: Any) -> None:
    model, prompts, sae = zoo_models("gpt2"), with_spans(), autoencoder("topk")
    along = ms.Direction(
        torch.randn(32, generator=torch.Generator().manual_seed(4)), ms.Site("resid_post", 1), model.id
    )
    result = rank_by_attribution(model, sae, prompts, measure=ms.Projection(along, at="user"), n=8, exact=8)
    assert_close(torch.tensor(result["exact"].values), torch.tensor(result["attribution"].values), 1e-4)


def test_similarity_is_the_cosine_with_rows_and_columns() -> None:
    sae = autoencoder("topk")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    for by in ("decoder", "encoder"):
        result = rank_by_similarity(sae, ms.Direction(vector, sae.site), by=by, n=48)
        for place, feature in enumerate(result["feature"].values.tolist()):
            for side, other in (("decoder", sae.module.W_dec[feature]), ("encoder", sae.module.W_enc[:, feature])):
                cosine = float(torch.dot(vector, other) / vector.norm() / other.norm())
                assert float(result[side].values[place]) == pytest.approx(cosine, abs=1e-6)
        assert (np.diff(np.abs(result[by].values)) <= 1e-6).all()
    own = rank_by_similarity(sae, feature_direction(sae, 21), n=1)
    assert own["feature"].values.tolist() == [21]
    assert float(own["decoder"].values[0]) == pytest.approx(1.0)


def test_a_feature_is_a_direction_that_says_where_it_came_from(zoo_models: Any) -> None:
    model, sae = zoo_models("llama"), autoencoder("topk")
    row, column = feature_direction(sae, 3, model=model), feature_direction(sae, 3, side="encoder")
    one = torch.zeros(1, 48)
    one[0, 3] = 1.0
    x = torch.zeros(1, 32)
    assert_close(row.vector, (sae.module.decode(one) - sae.module.decode(0 * one))[0])
    assert row.site == sae.site and row.model == model.id and column.model is None
    assert row.origin == {"method": "sae decoder", "sae": "tiny", "sae_hash": sae.hash, "feature": 3}
    slope = torch.func.grad(lambda x: sae.pre_activation(x, 3).sum())(x)[0]
    assert_close(column.vector, slope)


def test_counterparts_are_the_common_end(zoo_models: Any) -> None:
    pushed, plain = pairs(zoo_models("llama"))
    end, index, start = counterparts(plain, pushed)
    for row in range(4):
        assert end[row].tolist() == [False] * 8 + [True] * 6
        assert index[row][end[row]].tolist() == [4, 5, 6, 7, 8, 9]
        assert start[row].tolist() == [True] * 4 + [False] * 10
    end, index, start = counterparts(pushed, plain)
    assert end[0].tolist() == [False] * 4 + [True] * 6
    assert index[0][end[0]].tolist() == [8, 9, 10, 11, 12, 13]
    with pytest.raises(MechsteerError, match="Prompt 0 does not end like the one that it is compared with: "):
        counterparts(plain, plain[[1, 2, 3, 0]])
    with pytest.raises(
        MechsteerError, match=r"4 prompts and 2 to compare them with were passed. Pass the same requests"
    ):
        counterparts(plain[:2], pushed)


def test_errors_say_what_to_do(zoo_models: Any) -> None:
    model, sae, prompts = zoo_models("llama"), autoencoder("topk"), with_spans()
    early = ms.Projection(ms.Direction(torch.ones(32), ms.Site("resid_post", 0)))
    for call, message in (
        (
            lambda: rank_by_contrast(model, sae, prompts, prompts, by="size"),
            "by got 'size'. Pass one of 'difference', 'auroc'.",
        ),
        (
            lambda: rank_by_attribution(model, sae, prompts, measure=early),
            "has no gradient at blocks.1.hook_resid_post. Use an objective computed from later",
        ),
        (
            lambda: rank_by_attribution(model, sae, prompts, measure=ms.KLFromBaseline(model.run(prompts[:2]))),
            "holds values for 2 prompts, and 3 were passed. Make it from the same prompts.",
        ),
        (
            lambda: rank_by_similarity(sae, ms.Direction(torch.ones(32), ms.Site("resid_post", 0))),
            "got a direction of width 32 at blocks.0.hook_resid_post, and the autoencoder tiny takes width 32 at "
            "blocks.1.hook_resid_post apart. Take the direction at that site.",
        ),
        (
            lambda: feature_direction(sae, 99),
            "feature_direction got feature 99, but the autoencoder tiny has features 0 to 47.",
        ),
        (
            lambda: feature_direction(sae, 1, side="row"),
            "feature_direction(side=) got 'row'. Pass one of 'decoder', 'encoder'.",
        ),
        (
            lambda: feature_direction(autoencoder("topk", d_in=64, hook="blocks.2.attn.hook_z"), 1),
            "whose heads it takes together, so that a feature is no vector of one head.",
        ),
    ):
        with pytest.raises(MechsteerError) as error:
            call()
        assert message in str(error.value)
