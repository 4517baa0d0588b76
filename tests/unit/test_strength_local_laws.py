"""Slopes, curvatures and limits of steering against finite differences in fp64, on every architecture."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.prompts import Prompts
from mechsteer.run import Run
from mechsteer.strength.local_laws import local_laws

STEP = 1e-4


def prompts_of(model: Model) -> Prompts:
    """Three prompts of unlike lengths."""
    tokens = zoo.prompts(batch=3, n_pos=12)
    lengths = torch.tensor([12, 7, 9])
    return Prompts.from_ids(tokens, mask=torch.arange(12) < lengths[:, None], tokenizer=model.tokenizer)


def vector(model: Model, seed: int, kind: str = "resid_post", layer: int = 1, head: int | None = None) -> ms.Direction:
    site = ms.Site(kind, layer, head=head)
    width = model.width(site)
    assert width is not None
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)
    return ms.Direction(drawn, site, model.id)


def along(model: Model, prompts: Prompts, direction: ms.Direction, objective: ms.Objective, at: Any = "all"):
    """The objective as a function of alpha, one hooked forward pass each."""

    def value(alpha: float) -> np.ndarray:
        add = ms.Add(direction, alpha, at={"all": None, "last": -1}.get(at, at) if isinstance(at, str) else at)
        return objective(model.run(prompts, [add], objective.sites())).double().numpy()

    return value


@pytest.mark.parametrize("at", ["all", "last", (1, -1), "user"])
def test_slopes_and_curvatures_are_those_of_finite_differences(
    precise: Callable[..., Model], architecture: str, at: object
) -> None:
    model = precise(architecture)
    prompts = prompts_of(model)
    directions = {"early": vector(model, 0, layer=0), "late": vector(model, 1, "resid_mid", 2)}
    objective = ms.TeacherForcedCE(first=0, span="all") + ms.Projection(vector(model, 2))
    found = local_laws(model, directions, prompts, objective=objective, at=at)
    kl = ms.KLFromBaseline(model.run(prompts), where="all")
    for name, direction in directions.items():
        value, moved = (along(model, prompts, direction, each, at) for each in (objective, kl))
        slope = (value(STEP) - value(-STEP)) / (2 * STEP)
        np.testing.assert_allclose(found["slope"].sel(direction=name), slope, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found["value"].sel(direction=name), value(0.0), rtol=1e-12)
        # KL and its slope are 0 at alpha = 0.
        curvature = (moved(10 * STEP) + moved(-10 * STEP)) / (10 * STEP) ** 2
        np.testing.assert_allclose(found["kl_curvature"].sel(direction=name), curvature, rtol=1e-4, atol=1e-9)
        assert (found["kl_curvature"] > 0).all()


def test_the_expected_curvature_of_the_cross_entropy_is_that_of_kl(precise: Callable[..., Model]) -> None:
    """Theorem 3.8: over tokens that the model itself would write."""
    model = precise("llama")
    prompts, direction = prompts_of(model), vector(model, 0)
    own = model.run(prompts, logits="last").rows.softmax(-1)

    def expected(alpha: float) -> np.ndarray:
        steered = model.run(prompts, [ms.Add(direction, alpha)], logits="last").rows.log_softmax(-1)
        return -(own * steered).sum(-1).numpy()

    step = 1e-3
    curvature = (expected(step) - 2 * expected(0.0) + expected(-step)) / step**2
    found = local_laws(model, direction, prompts, where="decision")["kl_curvature"][0]
    np.testing.assert_allclose(found, curvature, rtol=1e-4)
    assert abs(expected(step) - expected(-step)).max() < 1e-6 * curvature.max()  # and its slope is 0


@pytest.mark.parametrize("kind, head", [("resid_pre", None), ("z", 2), ("q", None), ("k", 1), ("mlp_out", None)])
def test_every_kind_of_site_and_a_bridge(precise: Callable[..., Model], kind: str, head: int | None) -> None:
    model = precise("gpt2", "bridge") if kind == "mlp_out" else precise("gemma2")
    prompts, direction = prompts_of(model), vector(model, 0, kind, 1, head)
    objective = ms.LogitGap(5, 6)
    found = local_laws(model, direction, prompts, objective=objective)
    value = along(model, prompts, direction, objective)
    slope = (value(STEP) - value(-STEP)) / (2 * STEP)
    np.testing.assert_allclose(found["slope"][0], slope, rtol=1e-5, atol=1e-8)
    x = model.run(prompts, record=[direction.site.point]).activations[direction.site.point]
    x = x if head is None else x[:, :, head]
    rows = [x[row, :length].norm(dim=-1).mean() / direction.norm for row, length in enumerate(prompts.lengths.tolist())]
    np.testing.assert_allclose(found["scale"][0], rows, rtol=1e-9)


def test_scale_is_of_the_steered_tokens(precise: Callable[..., Model]) -> None:
    model = precise("llama")
    prompts, direction = prompts_of(model), vector(model, 0)
    x = model.run(prompts, record=[direction.site]).activations[direction.site]
    found = local_laws(model, direction, prompts, at=2)["scale"][0]
    np.testing.assert_allclose(found, x[:, 2].norm(dim=-1) / direction.norm, rtol=1e-9)
    twice = local_laws(model, 2.0 * direction, prompts, at=2)
    np.testing.assert_allclose(twice["scale"][0], found / 2, rtol=1e-9)


def test_laws_scale_with_the_vector_and_name_what_they_are(precise: Callable[..., Model]) -> None:
    model = precise("qwen3")
    prompts, direction = prompts_of(model), vector(model, 0)
    laws = local_laws(model, {"once": direction, "twice": 2.0 * direction}, prompts, objective=ms.LogitGap(5, 6))
    once, twice = laws.sel(direction="once"), laws.sel(direction="twice")
    np.testing.assert_allclose(twice["slope"], 2 * once["slope"], rtol=1e-9)
    np.testing.assert_allclose(twice["kl_curvature"], 4 * once["kl_curvature"], rtol=1e-9)
    assert laws["layer"].values.tolist() == [1, 1]
    assert laws["kl_curvature"].attrs["units"] == "nats / alpha^2"
    options = laws.provenance["options"]
    assert options["forward_passes"] == 2 * 2 * 3
    assert options["tokens"] == 2 * 2 * (12 + 7 + 9)
    assert list(local_laws(model, direction, prompts).data.data_vars) == ["kl_curvature", "scale"]


def test_batches_and_examples_do_not_matter(precise: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise("mistral")
    prompts, direction = prompts_of(model), vector(model, 0)
    # Holds a value for each prompt: the batches must say which prompts they are.
    objective = ms.LogitGap(torch.tensor([5, 6, 7]), 9)
    whole = local_laws(model, direction, prompts, objective=objective)
    # By name, the function of the package would stand in the module's place.
    monkeypatch.setattr(sys.modules["mechsteer.strength.local_laws"], "_TOKENS", {"cpu": 12, "cuda": 12})
    parts = local_laws(model, direction, prompts.padded("left"), objective=objective)
    for name in whole.data.data_vars:
        np.testing.assert_allclose(parts[str(name)], whole[str(name)], rtol=1e-9)


def test_an_objective_without_a_derivative_has_no_slope(precise: Callable[..., Model]) -> None:
    class Winner(ms.Objective):
        def reads(self, prompts: Prompts) -> torch.Tensor:
            return prompts.at(prompts.decision)

        def __call__(self, run: Run) -> torch.Tensor:
            return run.logits_at(self.reads(run.prompts)).argmax(-1).double()

    model = precise("llama")
    laws = local_laws(model, vector(model, 0), prompts_of(model), objective=Winner())
    assert laws["slope"].isnull().all()
    assert laws["value"].notnull().all()


def test_a_push_behind_all_that_is_compared_moves_nothing(precise: Callable[..., Model]) -> None:
    model = precise("llama")
    prompts = Prompts.from_ids([[1, 5, 6]], completions=[[7, 8]])
    laws = local_laws(model, vector(model, 0), prompts, where="decision", at=(4,))
    assert laws["kl_curvature"].values.tolist() == [[0.0]]


def test_errors(precise: Callable[..., Model]) -> None:
    model = precise("llama")
    prompts, direction = prompts_of(model), vector(model, 0)
    with pytest.raises(MechsteerError, match=r"Direction 'flat' is zero: no strength of it does anything"):
        local_laws(model, {"flat": direction * 0.0}, prompts)
    with pytest.raises(MechsteerError, match=r"directions is empty. Pass a Direction, or several by name"):
        local_laws(model, {}, prompts)
    with pytest.raises(MechsteerError, match=r"where='first' is no set of tokens. Pass 'decision', 'all', or one of"):
        local_laws(model, direction, prompts, where="first")
    with pytest.raises(MechsteerError, match=r"Prompt 0 has no token that predicts span 'completion'. Leave it out"):
        local_laws(model, direction, prompts, where="completion")
    with pytest.raises(MechsteerError, match=r"holds values for 2 prompts, and 3 were passed. Make it from the same"):
        local_laws(model, direction, prompts, objective=ms.LogitGap(torch.tensor([5, 6]), 9))
