"""`Model.run` computes what TransformerLens and transformers do, whatever the padding, and leaves no hook behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.site import KINDS, Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
LENGTHS = (12, 5, 1, 9)
TOLERANCE = 2e-5


def rows(lengths: Any = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Random ids, one list per prompt; most are longer than the zoo's attention windows."""
    return [zoo.prompts(batch=1, n_pos=n, seed=seed + i)[0].tolist() for i, n in enumerate(lengths)]


def all_sites(model: ms.Model, layer: int = 2) -> list[Site]:
    """Every hook point of one layer that this model runs, and those outside the blocks."""
    known = [Site(kind, layer if "{layer}" in entry.hook else None) for kind, entry in KINDS.items()]
    rotary = model.cfg.positional_embedding_type == "rotary"
    return [
        site for site in known if site.hook_name in model.hooked.hook_dict and not (rotary and site.kind == "pos_embed")
    ]


def by_prompt(run: ms.Run, site: Site) -> list[torch.Tensor]:
    """What was recorded for each prompt at its real tokens, by absolute position."""
    out = []
    for value, mask in zip(run.activations[site], run.prompts.mask, strict=True):
        out.append(value[:, mask][:, :, mask] if site.axes[-1] == "src" else value[mask])
    return out


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to the tolerance on the scale of the values; -inf, which masked attention scores are, where expected."""
    assert got.shape == expected.shape
    assert torch.equal(got.isneginf(), expected.isneginf())
    got, expected = got.masked_fill(got.isneginf(), 0), expected.masked_fill(expected.isneginf(), 0)
    torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


# ---- what is computed ----


@backends
def test_logits_are_those_of_transformer_lens_and_transformers(
    zoo_models: Any, zoo_folder: Any, architecture: str, backend: str
) -> None:
    model, tokens = zoo_models(architecture, backend), zoo.prompts()
    run = model.run(tokens)
    with torch.no_grad():
        assert_close(run.logits, model.hooked(tokens))
    assert_close(run.logits, zoo.reference_logits(zoo_folder, tokens), 1e-4)
    assert run.rows.shape == (tokens.numel(), zoo.D_VOCAB) and torch.equal(run.read, run.prompts.mask)
    assert not run.logits.requires_grad and torch.is_grad_enabled()


@backends
def test_activations_are_those_of_run_with_cache(zoo_models: Any, architecture: str, backend: str) -> None:
    model, tokens = zoo_models(architecture, backend), zoo.prompts(n_pos=11)
    sites = all_sites(model)
    with torch.no_grad():
        _, cache = model.hooked.run_with_cache(tokens)
    recorded = model.run(tokens, record=sites).activations
    assert set(recorded) == set(sites)
    for site in sites:
        assert_close(recorded[site], cache[site.hook_name])
    assert recorded.model == model.id


@backends
def test_padding_and_batch_change_nothing(zoo_models: Any, architecture: str, backend: str) -> None:
    model = zoo_models(architecture, backend)
    sites = all_sites(model)
    alone = [model.run(ms.Prompts.from_ids([row]), record=sites) for row in rows()]
    prompts = ms.Prompts.from_ids(rows())
    for layout in (prompts, ms.Prompts.from_ids([*rows((15,)), *rows()]).padded("left")[1:]):
        run = model.run(layout, record=sites)
        assert run.prompts.padding_side == layout.padding_side and run.logits.shape[:2] == layout.tokens.shape
        for i, single in enumerate(alone):
            assert_close(run.logits[i][layout.mask[i]], single.logits[0])
            assert not run.logits[i][~layout.mask[i]].any()
            for site in sites:
                assert_close(by_prompt(run, site)[i], by_prompt(single, site)[0])
    for site in sites:  # nothing of the padding is left to be averaged by mistake
        padding = ~layout.mask[:, :, None] if site.axes[1] == "pos" else ~layout.mask[:, None, :, None]
        value = run.activations[site].flatten(2) if site.axes[1] == "pos" else run.activations[site]
        assert not value.masked_select(padding.expand_as(value)).any()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 100),
    name=st.sampled_from(["gpt2", "gemma3"]),
)
def test_any_batch_is_its_prompts_one_by_one(
    zoo_models: Any, lengths: list[int], side: str, seed: int, name: str
) -> None:
    model, ids = zoo_models(name), rows(lengths, seed)
    site = Site("resid_mid", 1)
    run = model.run(ms.Prompts.from_ids(ids).padded(side), record=site)
    for i, row in enumerate(ids):
        single = model.run(torch.tensor([row]), record=site)
        assert_close(run.logits[i][run.prompts.mask[i]], single.logits[0])
        assert_close(by_prompt(run, site)[i], single.activations[site][0])


def test_prompts_are_taken_as_text_ids_or_prompts() -> None:
    model = ms.load_model("pocket")
    texts = ["The cat sat", "A"]
    prompts = ms.Prompts.from_strings(texts, model)
    expected = model.run(prompts).logits
    assert torch.equal(model.run(texts).logits, expected)
    assert_close(model.run("A").logits[0], expected[1, : prompts.lengths[1]])
    assert_close(model.run(prompts.tokens[:1]).logits, expected[:1])
    chats = ms.Prompts.from_chats(["What should I cook?", "Hello"], model, padding="left")
    for i in range(2):
        assert_close(model.run(chats[i].padded("right")).logits[0], model.run(chats).logits[i][chats.mask[i]])
    assert (chats.tokens == model.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


# ---- what is read ----


@backends
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_given_where_they_are_asked_for(zoo_models: Any, backend: str, side: str) -> None:
    model = zoo_models("llama", backend)
    prompts = ms.Prompts.from_ids(rows()).with_completions(rows((3, 1, 2, 4), seed=9)).padded(side)
    full = model.run(prompts)
    last = model.run(prompts, logits="last")
    decision = prompts.at(prompts.decision)
    assert torch.equal(last.read, decision)
    assert_close(last.rows, full.logits[decision])
    assert prompts.decision.tolist() == [length - 1 for length in LENGTHS]
    none = model.run(prompts, logits="none")
    assert none.rows.shape == (0, zoo.D_VOCAB) and not none.read.any()
    where = prompts.mask & (torch.rand(prompts.mask.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
    some = model.run(prompts, logits=where)
    assert_close(some.rows, full.logits[where])
    part = where & (prompts.positions % 2 == 0)
    assert torch.equal(some.logits_at(part), some.rows[part[where]])
    assert_close(some.logits_at(part), full.logits_at(part))
    assert torch.equal(some.logits_at(where), some.rows)
    with pytest.raises(MechsteerError, match=r"of the \d+ logits asked for were not computed\. Run the model with"):
        some.logits_at(prompts.mask)
    with pytest.raises(
        MechsteerError, match=r"logits were computed at 4 of 37 tokens\. Run the model with logits='all'"
    ):
        _ = last.logits


def test_what_nobody_reads_is_not_computed(zoo_models: Any) -> None:
    model, reached = zoo_models("llama"), []
    for layer in range(3):
        model.hooked.add_hook(f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: reached.append(hook.layer()))
    try:
        for record, layers in (("embed", []), (("resid_post", 0), [0]), (["embed", ("q", 1)], [0, 1]), ((), [])):
            reached.clear()
            model.run(zoo.prompts(), record=record, logits="none")
            assert reached == layers
        reached.clear()
        model.run(zoo.prompts(), record="ln_final_scale", logits="none")
        assert reached == [0, 1, 2]
    finally:
        model.hooked.reset_hooks()


def test_sites_are_recorded_by_any_name(zoo_models: Any) -> None:
    model, tokens = zoo_models("llama"), zoo.prompts()
    everywhere = [Site("resid_post", layer) for layer in range(3)]
    assert model.sites("resid_post") == everywhere == list(model.run(tokens, record="resid_post").activations)
    assert model.sites(("z", 1)) == model.sites([("z", 1)]) == model.sites("blocks.1.attn.hook_z") == [Site("z", 1)]
    assert model.sites(Site("z", 1, head=3, pos=-1)) == [Site("z", 1)]
    mixed = model.sites(["resid_post", "blocks.1.hook_resid_post", "embed", ("q", 0), Site("q", 0, head=1)])
    assert mixed == [*everywhere, Site("embed"), Site("q", 0)]
    assert model.sites(()) == []


@backends
def test_what_is_recorded_is_what_flows_on(zoo_models: Any, backend: str) -> None:
    """After all interventions at the site, before those at later ones; both backends agree."""
    model, tokens = zoo_models("llama", backend), zoo.prompts()
    vector = torch.linspace(-1, 1, zoo.D_MODEL)
    sites = [Site(kind, 1) for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    clean = model.run(tokens, record=sites).activations
    for changed in sites:
        steered = model.run(tokens, [ms.Add(vector, 2.0, site=changed), ms.Add(vector, site=changed)], record=sites)
        for site in sites:
            if site.order < changed.order:
                assert_close(steered.activations[site], clean[site])
        assert_close(steered.activations[changed], clean[changed] + 3 * vector)
        acts = {site.kind: steered.activations[site] for site in sites}
        assert_close(
            acts["resid_mid"] - 3 * vector * (changed.kind == "resid_mid"), acts["resid_pre"] + acts["attn_out"]
        )
        assert_close(
            acts["resid_post"] - 3 * vector * (changed.kind == "resid_post"), acts["resid_mid"] + acts["mlp_out"]
        )


# ---- gradients ----


@backends
def test_gradients_equal_those_of_plain_hooks(zoo_models: Any, architecture: str, backend: str) -> None:
    model, tokens = zoo_models(architecture, backend), zoo.prompts(n_pos=10)
    site = Site("resid_post", 1)
    prompts = ms.Prompts.from_ids(tokens).padded("left")
    vector = torch.linspace(-1, 1, zoo.D_MODEL).requires_grad_()
    weight = next(parameter for parameter in model.hooked.parameters() if parameter.shape == (zoo.D_VOCAB, zoo.D_MODEL))

    def gradients(logits: torch.Tensor, recorded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = logits.log_softmax(-1)[:, -1, 7].sum() + recorded.square().mean()
        return torch.autograd.grad(loss, [vector, weight])

    run = model.run(prompts, [ms.Add(vector, 2.0, site=site)], record=site, grad=True)
    got = gradients(run.logits, run.activations[site])
    seen: list[torch.Tensor] = []

    def plain(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(tensor + 2 * vector)
        return seen[0]

    expected = gradients(model.hooked.run_with_hooks(tokens, fwd_hooks=[(site.hook_name, plain)]), seen[0])
    assert expected[0].abs().max() > 1e-3 and expected[1].abs().max() > 1e-3
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    frozen = model.run(prompts, [ms.Add(vector, 2.0, site=site)], record=site)
    assert not frozen.logits.requires_grad and not frozen.activations[site].requires_grad


# ---- hooks ----


@backends
def test_the_users_own_hooks_act_and_stay(zoo_models: Any, backend: str) -> None:
    model, tokens = zoo_models("llama", backend), zoo.prompts()
    vector = torch.linspace(-1, 1, zoo.D_MODEL)
    name = Site("resid_post", 1).hook_name
    expected = model.run(tokens, [ms.Add(vector, 3.0, site=name)], record=name)
    point = model.hooked.hook_dict[name]
    point.add_hook(lambda tensor, hook: tensor + vector)
    try:
        before = list(point.fwd_hooks)
        # Attached first, so it acts first: the projection takes away what it adds.
        both = model.run(tokens, [ms.Add(vector, 2.0, site=name)], record=name)
        assert_close(both.logits, expected.logits)
        assert_close(both.activations[name], expected.activations[name])
        ablated = model.run(tokens, [ms.Ablate(vector, site=name)], record=name).activations[name]
        assert (ablated @ vector).abs().max() < 1e-4
        assert point.fwd_hooks == before
    finally:
        model.hooked.reset_hooks()
    assert (model.run(tokens).logits - expected.logits).abs().max() > 0.1


class Boom(Exception):
    pass


@backends
@pytest.mark.parametrize("grad", [False, True])
def test_no_hook_survives_an_exception(zoo_models: Any, backend: str, grad: bool) -> None:
    model, tokens = zoo_models("llama", backend), zoo.prompts()
    plain = model.run(tokens).logits

    class Failing(ms.Scale):
        @classmethod
        def _edit(cls, cells: Any, like: torch.Tensor) -> Callable[..., torch.Tensor]:
            raise Boom

    every = [ms.Scale(("resid_post", layer), 2.0) for layer in range(3)]
    with pytest.raises(Boom):
        model.run(tokens, [*every, Failing(("mlp_out", 1), 1.0)], record=["resid_pre", "pattern"], grad=grad)
    with pytest.raises(MechsteerError):
        model.run(tokens, [*every, ms.Scale(("mlp_out", 7), 1.0)], record="resid_pre", grad=grad)
    with pytest.raises(MechsteerError):
        model.run(tokens, every, record=("resid_pre", 7), grad=grad)
    assert not [name for name, point in model.hooked.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    assert torch.equal(model.run(tokens).logits, plain)
    assert torch.is_grad_enabled()


def test_a_hook_point_that_is_never_run_is_refused(zoo_folders: Any) -> None:
    model, tokens = ms.load_model(zoo_folders["llama"], device="cpu"), zoo.prompts()
    model.hooked.blocks[1].attn.hook_z = torch.nn.Identity()  # in hook_dict still
    with pytest.raises(
        MechsteerError, match=r"llama has a hook point blocks\.1\.attn\.hook_z, but never runs it\. Choose"
    ):
        model.run(tokens, [ms.Scale(("z", 1), 0.5)])
    with pytest.raises(MechsteerError, match=r"has a hook point blocks\.1\.attn\.hook_z, but never runs it"):
        model.run(tokens, record=("z", 1))
    model.run(tokens, [ms.Scale(("z", 1), 0.5)], record=("resid_pre", 0), logits="none")  # what follows was not run


# ---- what is refused ----


def of_width(width: int) -> torch.Tensor:
    return torch.ones(width)


SITE_ERRORS: list[tuple[Any, str]] = [
    ("blocks.1.hook_resid_pst", r"no site that mechsteer knows\. Nearest: blocks\.1\.hook_resid_post"),
    ("resid_pst", r"no site that mechsteer knows\. Nearest: .*resid_p"),
    (("resid_post", 3), r"Site\('resid_post', 3\) does not exist: llama has layers 0 to 2\. Choose one of these\."),
    (Site("z", 0, head=4), r"Site\('z', 0, head=4\) does not exist: z of llama has heads 0 to 3\. Choose"),
    (Site("pattern", 0, head=4), r"pattern of llama has heads 0 to 3"),
    (Site("k", 0, head=2), r"Site\('k', 0, head=2\) does not exist: k of llama has heads 0 to 1"),
    (Site("v", 0, head=3), r"v of llama has heads 0 to 1"),
    (Site("rot_k", 0, head=2), r"rot_k of llama has heads 0 to 1"),
    (
        "pos_embed",
        r"Site\('pos_embed'\) does not exist: llama has no hook point hook_pos_embed\. It has embed, resid_pre, ",
    ),
]


@backends
@pytest.mark.parametrize(("site", "message"), SITE_ERRORS)
def test_sites_that_the_model_lacks_are_refused(zoo_models: Any, backend: str, site: Any, message: str) -> None:
    model = zoo_models("llama", backend)
    with pytest.raises(MechsteerError, match=message):
        model.run(zoo.prompts(), record=[site])
    with pytest.raises(MechsteerError, match=message):
        model.run(zoo.prompts(), [ms.Scale(site, 0.5)])
    with pytest.raises(MechsteerError, match=message):
        ms.Scale(site, 0.5).fwd_hooks(model)


@backends
def test_models_without_gated_mlps_say_what_they_have(zoo_models: Any, backend: str) -> None:
    with pytest.raises(
        MechsteerError, match=r"gpt2 has no hook point blocks\.1\.mlp\.hook_pre_linear\. It has embed, pos_"
    ):
        zoo_models("gpt2", backend).run("The cat", record=("mlp_pre_linear", 1))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"Prompts got an empty list|at least one"),
        ("", r"empty|no tokens"),
        (torch.zeros(0, 4, dtype=torch.long), r"Prompts got an empty list"),
        (torch.zeros(2, 0, dtype=torch.long), r"prompt 0 has no tokens"),
        (zoo.prompts(n_pos=65), r"Prompt 0 has 65 tokens, but the context of qwen3 is 64\. Shorten it\."),
        (
            ms.Prompts.from_ids([[5], [128]]),
            r"holds token id 128, but the vocabulary of qwen3 has 128 tokens\. Make the",
        ),
        (torch.tensor([[5, 128]]), r"the id 128, but"),
        (torch.tensor([[5, -1]]), r"the id -1, but"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(zoo_models: Any, prompts: Any, message: str) -> None:
    with pytest.raises(MechsteerError, match=message):
        zoo_models("qwen3").run(prompts)


def test_ids_in_the_padding_do_not_matter(zoo_models: Any) -> None:
    prompts = ms.Prompts.from_ids([[5, 6], [7]], pad_id=10_000)
    assert_close(
        zoo_models("llama").run(prompts).logits[1, 0], zoo_models("llama").run(torch.tensor([[7]])).logits[0, 0]
    )


def test_masks_and_names_of_logits_that_do_not_fit_are_refused(zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), ms.Prompts.from_ids([[5, 6], [7]])
    with pytest.raises(
        MechsteerError, match=r"logits='first' is not understood\. Pass 'all', 'last', 'none' or a mask"
    ):
        model.run(prompts, logits="first")
    with pytest.raises(
        MechsteerError, match=r"is bool \[2, 3\], but marks tokens of prompts \[batch, pos\] = \[2, 2\]"
    ):
        model.run(prompts, logits=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(MechsteerError, match=r"marks 1 padding tokens"):
        model.run(prompts, logits=torch.ones(2, 2, dtype=torch.bool))


def test_unfilled_slots_are_refused() -> None:
    model = ms.load_model("pocket")
    prompts = ms.Prompts.from_chats(["Hello"], model, slots=3)
    with pytest.raises(
        MechsteerError, match=r"The prompts reserve 3 slots that nothing fills\. Fill them with prompts\."
    ):
        model.run(prompts)
    with pytest.raises(MechsteerError, match=r"reserve 3 slots that nothing fills"):
        ms.Add(of_width(192), site=("resid_pre", 1)).fwd_hooks(model, prompts)
    model.run(prompts.with_prefix([5, 6, 7]))
    model.run(prompts, [ms.SoftPrefix(torch.zeros(3, 192))])
