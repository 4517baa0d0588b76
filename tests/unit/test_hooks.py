"""Interventions as plain hooks in other people's code: `run_with_hooks`, and `generate` with a KV cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from plain import N_POS, PlainHooks, assert_close, by_hand, ids, noise, real, with_spans

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.site import Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
# A bridge says that it computes norms by another formula where they are edited.
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited")


@backends
@pytest.mark.parametrize("side", ["left", "right"])
def test_fwd_hooks_work_in_run_with_hooks(zoo_models: Any, architecture: str, backend: str, side: str) -> None:
    """TransformerLens runs the padded tokens itself, with a mask."""
    model, prompts = zoo_models(architecture, backend), with_spans((5, N_POS)).padded(side)
    sites = [
        Site("resid_pre", 0),
        Site("ln1_normalized", 1),
        Site("z", 1, head=2),
        Site("pattern", 1),
        Site("resid_mid", 2),
    ]
    donors = model.run(with_spans((5, N_POS), seed=1), record=sites).activations
    edits = [
        ms.Add(noise(zoo.D_MODEL), torch.tensor([2.0, -3.0]), site=("resid_post", 0), at="user"),
        *(ms.Replace(site, donors, at=(-1, 1)) for site in sites),
        ms.Ablate(noise(2, zoo.D_MODEL), site=("mlp_out", 2), at="prefix"),
        ms.Scale(("resid_mid", 1), 0.3, at=0),
    ]
    expected = model.run(prompts, edits)
    hooks = ms.fwd_hooks(edits, model, prompts)
    for _ in range(2):  # hooks can be used again
        with torch.no_grad():
            got = model.hooked.run_with_hooks(prompts.tokens, attention_mask=prompts.mask.long(), fwd_hooks=hooks)
        for i, logits in enumerate(real(expected)):
            assert_close(got[i][prompts.mask[i]], logits, 1e-4)
    wide = torch.cat([prompts.tokens, prompts.tokens], 1)
    with pytest.raises(
        MechsteerError, match=r"were made for prompts of shape \[2, 10\] and 0 new tokens, and got activations"
    ):
        model.hooked.run_with_hooks(wide, fwd_hooks=hooks)


def test_hooks_without_prompts_take_any_tokens(zoo_models: Any) -> None:
    model, v = zoo_models("llama"), noise(zoo.D_MODEL)
    for at, site in ((None, "resid_post"), (2, "resid_post"), (-1, "ln1_normalized"), ((0, -2), "pattern")):
        edit = ms.Scale((site, 1), 0.2, at=at) if site == "pattern" else ms.Add(v, 3.0, site=(site, 1), at=at)
        hooks = edit.fwd_hooks(model)
        for n_pos in (5, 5, 9, 7):
            tokens = zoo.prompts(n_pos=n_pos, seed=n_pos)
            if n_pos == 7 and at is not None:
                with pytest.raises(
                    MechsteerError, match=r"were used on 9 tokens and now get 7\. Make new hooks for other"
                ):
                    model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)
                continue
            with torch.no_grad():
                got = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)
            assert_close(got, model.run(tokens, [edit]).logits)
    for at, message in (
        (7, r"touches position 7, but prompt 0 has 5 tokens"),
        ("prefix", r"none of the 2 prompts has a tok"),
    ):
        with pytest.raises(MechsteerError, match=message):
            hooks = ms.Add(v, site=("resid_post", 1), at=at).fwd_hooks(model)
            model.hooked.run_with_hooks(zoo.prompts(n_pos=5), fwd_hooks=hooks)
    with pytest.raises(MechsteerError, match=r"alpha has 3 numbers for 2 prompts"):
        hooks = ms.Add(v, torch.ones(3), site=("resid_post", 1)).fwd_hooks(model)
        model.hooked.run_with_hooks(zoo.prompts(n_pos=5), fwd_hooks=hooks)


def test_hooks_see_values_that_an_optimiser_changed(zoo_models: Any) -> None:
    model, tokens = zoo_models("llama"), zoo.prompts(n_pos=5)
    v = noise(zoo.D_MODEL).requires_grad_()
    alpha = torch.tensor(2.0, requires_grad=True)
    edit = ms.Add(v, alpha, site=("resid_post", 1))
    hooks = edit.fwd_hooks(model)
    for step in range(2):
        logits = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)
        gradients = torch.autograd.grad(logits.square().mean(), [v, alpha])
        assert all(bool(gradient.abs().max() > 1e-5) for gradient in gradients)
        expected = model.run(tokens, [ms.Add((1 + step) * noise(zoo.D_MODEL), 2.0 + step, site=("resid_post", 1))])
        assert_close(logits.detach(), expected.logits)
        with torch.no_grad():
            v *= 2
            alpha += 1


def position_mask(at: Any, n_prompt: int, total: int) -> torch.Tensor:
    """The tokens [1, pos] that a rule means, where the first `n_prompt` are the user's."""
    spans = {None: range(total), "user": range(n_prompt), "completion": range(n_prompt, total)}
    asked = spans[at] if at is None or isinstance(at, str) else np.atleast_1d(at).tolist()
    chosen = {position if position >= 0 else n_prompt + position for position in asked}
    return torch.tensor([[position in chosen for position in range(total)]])


def generate(
    model: ms.Model, prompts: ms.Prompts, n_new: int, hooks: PlainHooks, *, cache: bool = True
) -> torch.Tensor:
    """Greedy tokens [batch, new] of TransformerLens's own `generate`."""
    # A HookedTransformer looks for padding on its tokenizer's side.
    tokenizer, mask = model.hooked.tokenizer, {}
    side, tokenizer.padding_side = tokenizer.padding_side, prompts.padding_side
    if model.backend == "bridge":
        mask = {"attention_mask": prompts.mask.long()}
    try:
        with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
            out = model.hooked.generate(
                prompts.tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache,
                verbose=False, return_type="tokens", **mask,
            )  # fmt: skip
    finally:
        tokenizer.padding_side = side
    return out[:, prompts.tokens.shape[1] :]


def assert_greedy(
    model: ms.Model, prompts: ms.Prompts, new: torch.Tensor, hooks: Callable[[int, int, int], PlainHooks]
) -> None:
    """Every token is the likeliest of a whole forward pass over one prompt and its completion, with hooks by hand.

    Args:
        hooks: makes them, given the example, the length of its prompt, and that of the whole.
    """
    for i, completion in enumerate(new):
        n_prompt = int(prompts.lengths[i])
        tokens = torch.cat([prompts.tokens[i][prompts.mask[i]], completion])[None]
        with torch.no_grad():
            logits = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks(i, n_prompt, tokens.shape[1]))
        assert logits[0, n_prompt - 1 : -1].argmax(-1).tolist() == completion.tolist()


def added_by_hand(at: Any, site: Site, v: torch.Tensor) -> Callable[[int, int, int], PlainHooks]:
    return lambda i, n_prompt, total: by_hand(site, position_mask(at, n_prompt, total), lambda x: x + v)


@backends
def test_positions_hold_in_generate(zoo_models: Any, architecture: str, backend: str) -> None:
    """In TransformerLens's own `generate`: first and later new tokens, left padding, with and without a cache."""
    model, n_new = zoo_models(architecture, backend), 4
    prompts = ms.Prompts.from_ids(ids((4, 7))).padded("left")
    v = 4 * noise(zoo.D_MODEL, seed=2)
    plain = generate(model, prompts, n_new, [])
    # HookedTransformer's generate does not run `hook_embed`, and runs `hook_pos_embed` on all tokens every time.
    first = (
        Site("embed") if backend == "bridge" else Site("pos_embed") if architecture == "gpt2" else Site("resid_pre", 0)
    )
    changed = []
    for at in (None, "completion", "user", (0, 5, 7), -1):
        for site in (Site("resid_post", 1), Site("ln1_normalized", 1), first):
            for cache in (True, False) if site.kind == "resid_post" and backend == "hooked_transformer" else (True,):
                hooks = ms.Add(v, site=site, at=at).fwd_hooks(model, prompts, n_new=n_new)
                new = generate(model, prompts, n_new, hooks, cache=cache)
                assert_greedy(model, prompts, new, added_by_hand(at, site, v))
                changed.append(not torch.equal(new, plain))
    assert sum(changed) > len(changed) / 2


def test_all_kinds_of_edits_hold_in_generate(zoo_models: Any, architecture: str) -> None:
    """What was recorded at the prompt's positions, heads and sources of attention, with left padding and a cache."""
    model, n_new = zoo_models(architecture), 4
    prompts = ms.Prompts.from_ids(ids((4, 7))).padded("left")
    resid, pattern, head = Site("resid_post", 1), Site("pattern", 1), Site("z", 1, head=1)
    donors = model.run(ms.Prompts.from_ids(ids((4, 7), seed=1)), record=[resid, pattern]).activations
    v = noise(zoo.D_MODEL)
    off = torch.eye(zoo.D_MODEL) - v.outer(v) / v.dot(v)
    writes = [Site("resid_pre", 0), *(Site(kind, layer) for layer in range(3) for kind in ("attn_out", "mlp_out"))]

    def patched(i: int, n_prompt: int, total: int) -> PlainHooks:
        def into_resid(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([donors[resid][i : i + 1, :n_prompt], x[:, n_prompt:]], 1)

        return by_hand(resid, torch.ones(1, total, dtype=torch.bool), into_resid)

    def patched_pattern(i: int, n_prompt: int, total: int) -> PlainHooks:
        def into_pattern(x: torch.Tensor) -> torch.Tensor:
            full = x.clone()
            full[:, :, :n_prompt, :n_prompt] = donors[pattern][i : i + 1, :, :n_prompt, :n_prompt]
            return full

        return by_hand(pattern, torch.ones(1, total, dtype=torch.bool), into_pattern)

    def projected(i: int, n_prompt: int, total: int) -> PlainHooks:
        everywhere = torch.ones(1, total, dtype=torch.bool)
        return [hook for site in writes for hook in by_hand(site, everywhere, lambda x: x @ off)]

    def scaled(i: int, n_prompt: int, total: int) -> PlainHooks:
        return by_hand(head, position_mask("completion", n_prompt, total), lambda x: 4 * x)

    cases = [
        (ms.Replace(resid, donors), patched),
        (ms.Replace(pattern, donors), patched_pattern),
        (ms.Ablate(v, everywhere=True), projected),
        (ms.Scale(head, 4.0, at="completion"), scaled),
    ]
    for edit, by_plain_hooks in cases:
        new = generate(model, prompts, n_new, edit.fwd_hooks(model, prompts, n_new=n_new))
        assert_greedy(model, prompts, new, by_plain_hooks)


def test_the_pocket_model_is_steered_alike_by_both_ways_of_generating() -> None:
    """Chats of unlike lengths, a prefix, and steering at spans: TransformerLens's `generate` and mechsteer's."""
    model = ms.load_model("pocket")
    requests = ["What should I cook for dinner?", "Hello", "Tell me about the weather today, please."]
    prompts = ms.Prompts.from_chats(requests, model, prefix="Talk only about cats.", padding="left")
    v = 6 * noise(model.d_model)
    for at in (None, "prefix", "user", "completion", -1):
        edits = [ms.Add(v, 0.5, site=("resid_post", 3), at=at), ms.Ablate(v, site=("mlp_out", 4), at=at)]
        hooks = ms.fwd_hooks(edits, model, prompts, n_new=8)
        steered = model.generate(prompts, interventions=edits, max_new_tokens=8, stop_at_eos=False, progress=False)
        expected = steered.tokens[steered.span("completion")].view(3, 8)
        assert generate(model, prompts, 8, hooks).tolist() == expected.tolist()


def test_generation_from_one_token_counts_on(zoo_models: Any) -> None:
    """The call that starts and those that go on are all one token wide."""
    model, v = zoo_models("gpt2"), 4 * noise(zoo.D_MODEL)
    prompts = ms.Prompts.from_ids([[7], [9]])
    for known in (prompts, None):
        for site in (Site("resid_post", 1), Site("ln1_normalized", 1)):
            for at in (0, "completion", (1, 3), None):
                hooks = ms.Add(v, site=site, at=at).fwd_hooks(model, known, n_new=4)
                assert_greedy(model, prompts, generate(model, prompts, 4, hooks), added_by_hand(at, site, v))
    # One token in a run of mechsteer's own.
    run, everywhere = (
        model.run(prompts, [ms.Add(v, site=("ln1_normalized", 1), at=at)]).logits for at in (0, None)
    )  # fmt: skip
    assert_close(run, everywhere, 1e-6)
    assert (run - model.run(prompts).logits).abs().max() > 0.1
