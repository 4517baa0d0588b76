"""Mediation through features, and activation against behaviour, against runs made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from autoencoders import autoencoder
from test_features_ranking import features_of, pairs

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.features.causes import activation_and_behaviour, agreement, mediation

GAP = ms.LogitGap(5, 9)


def by_hand(model: ms.Model, sae: Any, prompts: ms.Prompts, row: int, change: Any) -> float:
    """The gap of one prompt with `change(x)` in place of the site's activations [pos, d]."""
    alone = prompts[row]
    ids = alone.tokens[alone.mask][None]

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return change(x[0])[None]

    logits = model.hooked.run_with_hooks(ids, fwd_hooks=[(sae.site.hook_name, hook)])[0, -1]
    return float(logits[5] - logits[9])


def swapped(sae: Any, features: Any, other: torch.Tensor, *, off: slice | None = None) -> Any:
    """The last six tokens' features become those in `other`; those of tokens `off` become 0."""

    def change(x: torch.Tensor) -> torch.Tensor:
        own = sae.module.encode(x)
        error = x - sae.module.decode(own)
        new = own.clone()
        new[-6:, features] = other[-6:, features]
        if off is not None:
            new[off, features] = 0.0
        return sae.module.decode(new) + error

    return change


@pytest.mark.parametrize("prefix_tokens", ["keep", "off"])
def test_mediation_is_what_runs_by_hand_give(zoo_models: Any, prefix_tokens: str) -> None:
    model, sae = zoo_models("llama"), autoencoder("topk")
    pushed, plain = pairs(model)
    every = list(range(48))
    active = [
        torch.stack([features_of(sae, model, side, row).mean(0) for row in range(4)]).mean(0)
        for side in (pushed, plain)
    ]
    chosen = sum(active).topk(3).indices.tolist()
    result = mediation(model, sae, chosen, pushed, plain, measure=GAP, prefix_tokens=prefix_tokens)
    parts = {str(each): [each] for each in chosen} | {"together": chosen, "all features": every}
    assert result["part"].values.tolist() == [*parts, "whole state"]
    off = slice(4, 8) if prefix_tokens == "off" else None
    base = {
        name: [by_hand(model, sae, side, row, lambda x: x) for row in range(4)]
        for name, side in (("prefixed", pushed), ("plain", plain))
    }
    for name, values in base.items():
        np.testing.assert_allclose(result[name].values, values, atol=2e-5)
    total = np.array(base["prefixed"]) - base["plain"]
    for part, features in parts.items():
        held, raised = [], []
        for row in range(4):
            at_plain, at_pushed = (features_of(sae, model, side, row) for side in (plain, pushed))
            held.append(by_hand(model, sae, pushed, row, swapped(sae, features, at_plain, off=off)))
            raised.append(by_hand(model, sae, plain, row, swapped(sae, features, at_pushed)))
        got = result.sel(part=part)
        np.testing.assert_allclose(got["held"].values, held, atol=5e-5)
        np.testing.assert_allclose(got["raised"].values, raised, atol=5e-5)
        assert float(got["needed"]) == pytest.approx((base["prefixed"] - np.array(held)).sum() / total.sum(), abs=1e-3)
        assert float(got["enough"]) == pytest.approx((np.array(raised) - base["plain"]).sum() / total.sum(), abs=1e-3)
    # The whole state: everything that later tokens carry at this layer.
    whole = []
    for row in range(4):
        state = model.run(plain[row], record=[sae.site]).activations[sae.site][0][plain[row].mask[0]]
        whole.append(by_hand(model, sae, pushed, row, lambda x, state=state: torch.cat([x[:-6], state[-6:]])))
    np.testing.assert_allclose(result.sel(part="whole state")["held"].values, whole, atol=5e-5)
    assert not np.allclose(result["held"].values, result["prefixed"].values[None])
    assert result.plot("needed").data
    sets = mediation(
        model, sae, {"a": chosen[:1], "b": chosen}, pushed, plain, measure=GAP, prefix_tokens=prefix_tokens
    )
    assert sets["part"].values.tolist() == ["a", "b", "all features", "whole state"]
    for name, part in (("a", str(chosen[0])), ("b", "together")):
        np.testing.assert_allclose(sets.sel(part=name)["held"].values, result.sel(part=part)["held"].values, atol=2e-5)


def test_after_the_last_attention_the_state_is_everything(zoo_models: Any) -> None:
    # What the last block wrote at the decision token is all that its logits come from.
    model, sae = zoo_models("gpt2"), autoencoder("topk", hook="blocks.2.hook_resid_post")
    pushed, plain = pairs(model)
    state = mediation(model, sae, [1], pushed, plain, measure=GAP).sel(part="whole state")
    for name in ("needed", "enough", "needed_low", "enough_high"):
        assert float(state[name]) == pytest.approx(1.0, abs=1e-4)
    # And a feature that is active in neither run carries nothing.
    both = torch.cat([features_of(sae, model, side, row) for side in (pushed, plain) for row in range(4)])
    silent = int(both.amax(0).argmin())
    assert float(both[:, silent].max()) == 0
    nothing = mediation(model, sae, [silent], pushed, plain, measure=GAP).sel(part=str(silent))
    assert float(nothing["needed"]) == pytest.approx(0, abs=1e-5)


def test_activation_and_behaviour_of_each_push(zoo_models: Any) -> None:
    model, sae = zoo_models("llama"), autoencoder("topk")
    pushed, plain = pairs(model)
    feature = int(features_of(sae, model, pushed, 0)[-1].argmax())
    clamp = ms.SetFeature(sae, feature, 9.0)
    seen: list[list[str]] = []

    def shows(texts: Any) -> list[bool]:
        seen.append(list(texts))
        return [len(text) % 2 == 0 for text in texts]

    pushes = {"prefix": (pushed, ()), "clamp": (plain, [clamp])}
    result = activation_and_behaviour(model, sae, feature, plain, pushes, shows=shows, max_new_tokens=4)
    assert result["push"].values.tolist() == ["none", "prefix", "clamp"]
    assert result.data.attrs["feature"] == feature
    for place, (prompts, how) in enumerate([(plain, []), (pushed, []), (plain, [clamp])]):
        run = model.run(prompts, how, record=[sae.site])
        last = run.activations[sae.site][prompts.at(prompts.decision)]
        np.testing.assert_allclose(result["activation"].values[place], sae.encode(last)[:, feature], atol=1e-4)
        pre = ms.FeatureActivation(sae, feature, pre=True)(run)
        np.testing.assert_allclose(result["pre_activation"].values[place], pre, atol=1e-4)
        texts = model.generate(prompts, interventions=how, max_new_tokens=4).completions
        assert seen[place] == texts
        assert result["behaviour"].values[place].tolist() == [float(len(text) % 2 == 0) for text in texts]


def case(activation: Any, behaviour: Any, feature: int = 1) -> ms.Result:
    """A measured case with the same value for two prompts."""
    arrays = {
        name: (("push", "prompt"), np.repeat(np.array(values, dtype=float)[:, None], 2, 1))
        for name, values in (("activation", activation), ("behaviour", behaviour))
    }
    return ms.Result(xr.Dataset(arrays, {"push": ["none", "a", "b"]}, {"feature": feature}), provenance={})


def test_agreement_is_the_correlation_of_moves() -> None:
    rng = np.random.default_rng(0)
    moves, behaviours = rng.normal(size=(2, 6, 2))
    cases = {str(i): case([5, *(5 + moves[i])], [0.5, *(0.5 + behaviours[i])], i) for i in range(6)}
    result = agreement(cases)
    share = moves / np.abs(moves).max(1, keepdims=True)
    np.testing.assert_allclose(result["moved"].values, moves)
    np.testing.assert_allclose(result["behaviour_moved"].values, behaviours)
    assert float(result["correlation"]) == pytest.approx(np.corrcoef(share.ravel(), behaviours.ravel())[0, 1])
    for push in range(2):
        expected = np.corrcoef(share[:, push], behaviours[:, push])[0, 1]
        assert float(result["correlation_push"].values[push]) == pytest.approx(expected)
    assert float(result["correlation_low"]) < float(result["correlation"]) < float(result["correlation_high"])
    assert result["feature"].values.tolist() == list(range(6))
    # Units of a feature do not matter, and where they go together exactly there is no doubt left.
    perfect = {str(i): case([0, 1.0 * 10**i, 2.0 * 10**i], [0, 0.5, 1.0]) for i in range(3)}
    same = agreement(perfect)
    assert [float(same[f"correlation{end}"]) for end in ("", "_low", "_high")] == pytest.approx([1, 1, 1])
    flat = agreement({str(i): case([0, 1, 2], [1, 1, 1]) for i in range(3)})
    assert np.isnan(float(flat["correlation"]))
    assert result.plot("behaviour_moved", against="share_moved", colour="push").data


def test_errors_say_what_to_do(zoo_models: Any) -> None:
    model, sae = zoo_models("llama"), autoencoder("topk")
    pushed, plain = pairs(model)
    never = lambda texts: [False] * len(texts)  # noqa: E731
    for call, message in (
        (
            lambda: mediation(model, sae, [], pushed, plain, measure=GAP),
            "mediation got no features. Pass some, such as those that rank_by_contrast puts first.",
        ),
        (lambda: mediation(model, sae, {"a": []}, pushed, plain, measure=GAP), "mediation got no features."),
        (
            lambda: mediation(model, sae, {"whole state": [1]}, pushed, plain, measure=GAP),
            "mediation got a set called 'whole state', a name that it uses itself. Pass another.",
        ),
        (
            lambda: mediation(model, sae, [48], pushed, plain, measure=GAP),
            "mediation got feature 48, but the autoencoder tiny has features 0 to 47.",
        ),
        (
            lambda: mediation(model, sae, [1], plain, plain, measure=GAP),
            "is the same with the prefix and without, or not finite, so that there is no effect to explain.",
        ),
        (
            lambda: mediation(model, sae, [1], pushed, plain, measure=GAP, prefix_tokens="zero"),
            "prefix_tokens got 'zero'. Pass one of 'keep', 'off'.",
        ),
        (
            lambda: mediation(model, sae, [1], pushed, plain[[1, 0, 2, 3]], measure=GAP),
            "Prompt 0 does not end like the one that it is compared with",
        ),
        (
            lambda: activation_and_behaviour(model, sae, 1, plain, {"none": (plain, ())}, shows=never),
            "adds the push 'none' itself. Give yours another name.",
        ),
        (
            lambda: activation_and_behaviour(model, sae, 1, plain, {"a": (plain[:2], ())}, shows=never),
            "The push 'a' has 2 prompts, and 4 are plain. Pass the same requests.",
        ),
        (
            lambda: agreement({"a": case([0, 1, 2], [0, 1, 1])}),
            "agreement got 1 cases. Pass at least three, or there is nothing to correlate.",
        ),
        (
            lambda: agreement(
                {
                    "a": case([0, 1, 2], [0, 1, 1]),
                    "b": case([0, 1, 2], [0, 1, 1]),
                    "c": ms.Result(case([0, 1, 2], [0, 1, 1]).data.assign_coords(push=["none", "a", "c"])),
                }
            ),
            "The case 'c' has other pushes than 'a'. Measure the same in all.",
        ),
    ):
        with pytest.raises(MechsteerError) as error:
            call()
        assert message in str(error.value)
