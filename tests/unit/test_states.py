"""Activations at marked tokens: the packed forward pass against the hooked one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo

from mechsteer import backends
from mechsteer.backends.decoder import KINDS
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model
from mechsteer.prompts import Prompts
from mechsteer.site import Site

LENGTHS = (9, 1, 14, 3, 14, 6, 12, 8, 13)  # more than one bucket of widths in the attention


def some_prompts(side: str = "right", seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, zoo.D_VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    return Prompts.from_ids(ids, padding=side)  # type: ignore[arg-type]


def all_sites(model: Model) -> list[Site]:
    """Every site that the packed forward pass has and the model runs."""
    found = []
    for kind in KINDS:
        try:
            found += model.sites(kind)
        except MechsteerError:
            continue
    return [site for site in found if site.kind != "pattern"]


def marks(prompts: Prompts, which: str) -> torch.Tensor:
    """All real tokens, the last of each prompt, or some of them: of some prompts none, of none the end."""
    if which == "all":
        return prompts.mask
    if which == "last":
        return prompts.at(prompts.decision)
    position = prompts.positions
    return prompts.mask & (position % 3 == 1) & (position < 8) & (prompts.lengths[:, None] != 14)


def count_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each forward pass of the hooked model."""
    passes: list[Any] = []
    real = backends.logits_at
    monkeypatch.setattr(backends, "logits_at", lambda *args, **kw: passes.append(args[1].shape) or real(*args, **kw))
    return passes


# In fp64 a bridge keeps transformers' fp32 rotary tables, which the packed weights do not have.
@pytest.mark.parametrize(
    ("architecture", "backend", "dtype"),
    [
        *((name, "hooked_transformer", dtype) for name in zoo.ARCHITECTURES for dtype in ("fp32", "fp64")),
        ("gpt2", "bridge", "fp64"),
        ("gemma3", "bridge", "fp32"),
    ],
)
def test_states_are_those_of_the_hooked_pass(
    zoo_models: Any, precise: Any, architecture: str, backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = dtype == "fp64"
    model = (precise if double else zoo_models)(architecture, backend)
    assert model.decoder is not None
    sites = all_sites(model)
    assert len(sites) >= 11 * zoo.N_LAYERS
    for which, side in (("all", "right"), ("last", "left"), ("some", "left")):
        prompts = some_prompts(side)
        where = marks(prompts, which)
        expected = model.run(prompts, record=sites, logits="none").activations.at(where)
        with monkeypatch.context() as patch:
            passes = count_passes(model, patch)
            found = model.states_at(prompts, sites, where)
        assert not passes, "the hooked model was run"
        assert list(found) == sites
        for site in sites:
            assert found[site].shape == expected[site].shape and found[site].dtype == expected[site].dtype, site
            largest = float(expected[site].abs().max())
            tolerance = (1e-10 if double else 1e-5) * max(1.0, largest)
            assert float((found[site] - expected[site]).abs().max()) <= tolerance, (site, which)


def test_few_sites_and_layers(zoo_models: Callable[..., Model]) -> None:
    model, prompts = zoo_models("llama"), some_prompts()
    for sites in (["embed"], ["resid_pre"], [("resid_post", 0)], [("mlp_post", 1), ("k", 2)], [("resid_pre", 0)]):
        where = marks(prompts, "some")
        expected = model.run(prompts, record=sites, logits="none").activations.at(where)
        found = model.states_at(prompts, sites, where)
        assert list(found) == model.sites(sites)
        for site, values in found.items():
            torch.testing.assert_close(values, expected[site], atol=1e-5, rtol=1e-5)
            assert not values.requires_grad


def test_what_only_hooks_can_give(zoo_models: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns, sites that the packed pass lacks, the user's own hooks, repeated keys, and no token at all."""
    model, prompts = zoo_models("llama"), some_prompts()
    where, site = marks(prompts, "last"), Site("resid_post", 1)
    plain = model.states_at(prompts, site, where)[site]
    passes = count_passes(model, monkeypatch)
    lacked = [Site("pattern", 1), Site("attn_scores", 0), Site("rot_q", 1)]
    found = model.states_at(prompts, [*lacked, site], where)
    expected = model.run(prompts, record=[*lacked, site], logits="none").activations.at(where)
    assert len(passes) == 2 and list(found) == [*lacked, site]
    assert all(torch.equal(found[each], expected[each]) for each in lacked)
    nothing = model.states_at(prompts, site, torch.zeros_like(where))[site]
    assert nothing.shape == (0, zoo.D_MODEL)
    model.hooked.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda tensor, hook: tensor + 1.0)
    try:
        moved = model.states_at(prompts, site, where)[site]
    finally:
        model.hooked.reset_hooks()
    assert float((moved - plain).abs().max()) > 0.1
    torch.testing.assert_close(model.states_at(prompts, site, where)[site], plain)


def test_repeated_keys_are_those_of_transformer_lens(zoo_folders: Any) -> None:
    model, prompts = load_model(zoo_folders["llama"], device="cpu"), some_prompts()
    sites = [Site("k", 1), Site("v", 1), Site("q", 1)]
    assert model.states_at(prompts, sites, prompts.mask)[sites[0]].shape[1] == zoo.N_KEY_VALUE_HEADS
    model.cfg.ungroup_grouped_query_attention = True
    expected = model.run(prompts, record=sites, logits="none").activations.at(prompts.mask)
    found = model.states_at(prompts, sites, prompts.mask)
    for site in sites:
        assert found[site].shape[1] == zoo.N_HEADS
        torch.testing.assert_close(found[site], expected[site], atol=1e-5, rtol=1e-5)


def test_new_weights_are_seen(zoo_folders: Any) -> None:
    model, prompts, site = load_model(zoo_folders["gpt2"], device="cpu"), some_prompts(), Site("resid_post", 2)
    before = model.states_at(prompts, site, prompts.mask)[site]
    model.hooked.blocks[1].mlp.b_out.data += 1.0
    after = model.states_at(prompts, site, prompts.mask)[site]
    assert float((after - before).abs().max()) > 0.5
    expected = model.run(prompts, record=site, logits="none").activations.at(prompts.mask)[site]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_what_has_no_states(zoo_models: Callable[..., Model]) -> None:
    model, prompts = zoo_models("llama"), some_prompts()
    with pytest.raises(MechsteerError, match=r"`where` marks 46 padding tokens, which have no meaning"):
        model.states_at(prompts, "resid_post", torch.ones_like(prompts.mask))
    with pytest.raises(MechsteerError, match=r"`where` is bool \[9, 2\], but marks tokens of prompts .* = \[9, 14\]"):
        model.states_at(prompts, "resid_post", prompts.mask[:, :2])
    with pytest.raises(MechsteerError, match=r"Site\('resid_post', 7\) does not exist: llama has layers 0 to 2"):
        model.states_at(prompts, ("resid_post", 7), prompts.mask)
    slotted = replace(prompts, slots=prompts.at(prompts.decision))
    with pytest.raises(MechsteerError, match=r"The prompts reserve 1 slots that nothing fills"):
        model.states_at(slotted, "resid_post", prompts.mask)
