"""Proposition 4.1 on models: where steering without end leads."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain import assert_close

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.strength.cross_entropy import cross_entropy_curves
from mechsteer.strength.limits import ce_plateau, limit_curves, limit_logits

CONTEXTS = ["The cat sat on", "When Mary and John went to the store, John gave"]
FAR = [-1e4, -5e3, -2.5e3, -1e3, -10.0, 10.0, 1e3, 2.5e3, 5e3, 1e4]


def direction(model: ms.Model, layer: int) -> ms.Direction:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(7))
    return ms.Direction(vector[None], ms.Site("resid_post", layer))


def by_hand(model: ms.Model, vector: torch.Tensor) -> torch.Tensor:
    """LN(v) W^T from the formula of appendix B.6, with the model's own weights, and no epsilon."""
    hooked, cfg, v = model.hooked, model.cfg, vector.double()
    v = v - v.mean() if cfg.normalization_type == "LN" else v
    normed = v / v.square().mean().sqrt() * hooked.ln_final.w.double()
    if cfg.normalization_type == "LN":
        normed = normed + hooked.ln_final.b.double()
    logits = normed @ hooked.W_U.double() + hooked.b_U.double()
    cap = cfg.output_logits_soft_cap
    return (torch.tanh(logits / cap) * cap if cap and cap > 0 else logits).detach()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_limit_is_the_formula(zoo_models: Callable[..., ms.Model], architecture: str, sign: float) -> None:
    model = zoo_models(architecture)
    for layer in (0, 2):
        found = limit_logits(model, direction(model, layer), sign=3 * sign)
        assert_close(found.double(), by_hand(model, sign * direction(model, layer).vector), 1e-5)
    both = limit_logits(model, direction(model, 1)) - limit_logits(model, direction(model, 1), sign=-1.0)
    assert float(both.abs().max()) > 0.1


def test_every_layer_and_prompt_comes_to_the_same_limit(zoo_models: Callable[..., ms.Model], architecture: str) -> None:
    model = zoo_models(architecture)
    named = {f"layer {i}": direction(model, i) for i in range(model.n_layers)}
    result = limit_curves(model, CONTEXTS, named, FAR)
    distance = result["distance"]
    assert dict(distance.sizes) == {"direction": 3, "alpha": 11, "prompt": 2}
    assert float(distance.sel(alpha=[-1e4, 1e4]).max()) < 0.01
    assert float(result["total_variation"].sel(alpha=[-1e4, 1e4]).max()) < 0.02
    assert float(distance.sel(alpha=[-10.0, 10.0]).max()) > 0.02
    # Bounded R: the distance ends as 1 / alpha at every layer.
    np.testing.assert_allclose(result["rate"].values, -1.0, atol=0.1)


def test_distances_are_those_of_a_forward_pass(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("gpt2")
    push = direction(model, 1)
    result = limit_curves(model, CONTEXTS, {"v": push}, [-4.0, 6.0], at="last")
    for alpha, sign in ((-4.0, -1.0), (0.0, 1.0), (6.0, 1.0)):
        end = limit_logits(model, push, sign=sign)
        for prompt, text in enumerate(CONTEXTS):
            logits = model.run(text, [ms.Add(push, alpha, at=-1)], logits="last").rows[0]
            apart = (logits - logits.mean()) - (end - end.mean())
            expected = float(apart.norm() / (end - end.mean()).norm())
            variation = float((logits.softmax(-1) - end.softmax(-1)).abs().sum() / 2)
            found = result.sel(direction="v", alpha=alpha, prompt=prompt)
            assert float(found["distance"]) == pytest.approx(expected, rel=1e-3)
            assert float(found["total_variation"]) == pytest.approx(variation, rel=1e-3)


def test_behind_the_last_block_the_logits_are_exact_for_every_alpha(zoo_models: Callable[..., ms.Model]) -> None:
    """R = 0 there: y(alpha) = LN(h + alpha v) W^T, and the scale is where both parts are as long."""
    model = zoo_models("llama")
    push = direction(model, model.n_layers - 1)
    stream = model.run(CONTEXTS[0], record=[push.site]).activations[push.site][0, -1]
    eps = model.cfg.eps
    for alpha in (-3.0, 0.0, 0.7, 40.0):
        x = stream + alpha * push.vector
        normed = x / (x.square().mean() + eps).sqrt() * model.hooked.ln_final.w
        logits = model.run(CONTEXTS[0], [ms.Add(push, alpha)], logits="last").rows[0]
        assert_close(logits, (normed @ model.hooked.W_U).detach(), 1e-5)
    result = limit_curves(model, CONTEXTS, push, [1.0])
    assert float(result["scale"][0, 0]) == pytest.approx(float(stream.norm() / push.norm), rel=1e-5)


def test_ce_plateau(zoo_models: Callable[..., ms.Model], architecture: str) -> None:
    model = zoo_models(architecture)
    named = {"a": direction(model, 0), "b": direction(model, 2)}
    found = ce_plateau(model, CONTEXTS, named, 1e4, window=10)
    assert found["alpha"].values.tolist() == [-1e4, 1e4]
    base = float(cross_entropy_curves(model, CONTEXTS, named["a"], [0.0], window=10)["ce"].values[0, 0])
    for name, push in named.items():
        for sign in (-1.0, 1.0):
            log_q = by_hand(model, sign * push.vector).log_softmax(-1)
            ids = [model.tokenizer.encode(text, add_special_tokens=False) for text in CONTEXTS]
            skipped = int(model.tokenizer.bos_token_id is None)  # nothing predicts the first token
            nll = [-float(log_q[token]) for row in ids for first in range(0, len(row), 10)
                   for token in row[first : first + 10][skipped:]]  # fmt: skip
            cell = found.sel(direction=name, alpha=sign * 1e4)
            assert float(cell["predicted"]) == pytest.approx(np.mean(nll) - base, abs=1e-3)
            assert float(cell["delta_ce"]) == pytest.approx(float(cell["predicted"]), abs=0.03)


def test_a_direction_that_the_norm_removes(zoo_models: Callable[..., ms.Model]) -> None:
    ones = ms.Direction(torch.ones(1, 32), ms.Site("resid_post", 1))
    with pytest.raises(MechsteerError, match="is zero for the final norm of gpt2"):
        limit_logits(zoo_models("gpt2"), ones)
    assert limit_logits(zoo_models("llama"), ones).isfinite().all()  # an RMS norm keeps the mean


def test_errors(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    with pytest.raises(MechsteerError, match=r"sign=0\.0 has no limit"):
        limit_logits(model, direction(model, 1), sign=0.0)
    with pytest.raises(MechsteerError, match="The limit is about the residual stream"):
        limit_logits(model, ms.Direction(torch.ones(1, 32), ms.Site("mlp_out", 1)))
    with pytest.raises(MechsteerError, match=r"alpha=-1\.0 is not above 0"):
        ce_plateau(model, CONTEXTS, direction(model, 1), -1.0)
