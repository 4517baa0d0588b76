"""Each intervention is the plain TransformerLens hook that one would write by hand, and keeps the laws of its kind."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import N_POS, all_sites, assert_close, assert_is_by_hand, by_hand, heads_of, noise, real, where, with_spans

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.rows import Rows, first_touched, last_touched, touched
from mechsteer.site import KINDS, Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])


# ---- each class against a hook written by hand ----

RULES = [None, "prefix", "user", "completion", 0, 3, -1, (0, 2, -1, -3)]


@backends
@pytest.mark.parametrize("at", RULES, ids=str)
def test_add_is_what_one_would_write(zoo_models: Any, architecture: str, backend: str, at: Any) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    site = Site("resid_post", 1)
    assert_is_by_hand(
        model, prompts, ms.Add(v, -2.5, site=site, at=at), lambda mask: by_hand(site, mask, lambda x: x - 2.5 * v)
    )


@backends
def test_per_example_alphas_are_each_examples_own(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    site, alphas = Site("mlp_out", 1), torch.tensor([1.5, -3.0, 40.0])
    assert_is_by_hand(
        model, prompts, ms.Add(v, alphas, site=site),
        lambda mask: by_hand(site, mask, lambda x: x + alphas[:2, None, None] * v),
    )  # fmt: skip


@backends
def test_replace_patches_every_kind_of_site(zoo_models: Any, architecture: str, backend: str) -> None:
    """Activation patching, whole and by head; on a bridge `resid_mid` too, where no plain hook has that effect."""
    model, prompts = zoo_models(architecture, backend), with_spans()
    sites = all_sites(model)
    donors = model.run(with_spans(seed=1), record=sites).activations
    with torch.no_grad():
        _, cache = model.hooked.run_with_cache(donors.prompts[:2].padded("right").tokens)
    for site in sites:
        # All prompts have the same position embeddings.
        if site.kind == "pos_embed" or (site.kind == "resid_mid" and backend == "bridge"):
            continue
        for head in heads_of(model, site):
            here = site.at(head=head)
            intervention = ms.Replace(here, donors, at=(1, -2) if head is None else None)
            assert_is_by_hand(
                model,
                prompts,
                intervention,
                lambda mask, here=here: by_hand(here, mask, lambda x: cache[here.hook_name]),
            )


@pytest.mark.parametrize("grad", [False, True])
def test_resid_mid_means_the_same_on_a_bridge(zoo_models: Any, architecture: str, grad: bool) -> None:
    """Alone, several times, among edits of both its addends, recorded, and with gradients."""
    v, w = noise(zoo.D_MODEL), noise(zoo.D_MODEL, seed=1).requires_grad_(grad)
    results = []
    for backend in ("hooked_transformer", "bridge"):
        model, prompts = zoo_models(architecture, backend), with_spans()
        mid, out, pre = Site("resid_mid", 1), Site("attn_out", 1), Site("resid_pre", 1)
        donors = model.run(with_spans(seed=1), record=mid).activations
        edits = [
            [ms.Add(w, 2.0, site=mid, at=(1, -1))],
            [ms.Replace(mid, donors, at="user"), ms.Add(w, site=mid)],
            [
                ms.Ablate(v, site=mid),
                ms.Scale(out, 0.5),
                ms.Add(w, 3.0, site=pre, at="prefix"),
                ms.Scale(mid, 1.5, at=2),
            ],
            [ms.Add(w, site=out, at=0), ms.Ablate(w, site=mid), ms.Ablate(v, everywhere=True)],
        ]
        runs = [model.run(prompts, each, record=[pre, out, mid, ("mlp_pre", 1)], grad=grad) for each in edits]
        tensors = [value for run in runs for value in (run.logits, *run.activations.values())]
        if grad:
            tensors += torch.autograd.grad(sum(run.logits.square().sum() for run in runs), w)
        results.append(tensors)
    for one, other in zip(*results, strict=True):
        assert_close(other, one, 1e-4)


@backends
def test_replace_by_constants(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    n_kv = model.size(Site("v", 0), "head")
    constants = [
        (Site("resid_pre", 1), (zoo.D_MODEL,)),
        (Site("mlp_post", 1), (96,)),
        (Site("v", 1), (n_kv, model.cfg.d_head)),
        (Site("v", 1, head=1), (model.cfg.d_head,)),
        (Site("pattern", 1, head=2), (N_POS + 3,)),
        (Site("pattern", 1), (zoo.N_HEADS, 1)),
    ]
    for site, shape in constants:
        for value in (noise(*shape), noise(3, *shape)):
            each = value[:2] if value.ndim > len(shape) else value.expand(2, *shape)
            each = each[:, None] if site.head is None else each[:, None, None]  # [example, pos, ...]
            # A token looks at no later one, whatever the value.
            seen = site.axes[-1] != "src" or torch.ones(N_POS, N_POS).tril().bool()
            each = each if seen is True else each[..., :N_POS].transpose(1, 2)
            assert_is_by_hand(
                model, prompts, ms.Replace(site, value, at=(2, -1)),
                lambda mask, site=site, each=each, seen=seen: by_hand(
                    site, mask, lambda x: torch.where(torch.as_tensor(seen), each, x)
                ),
            )  # fmt: skip


@backends
def test_ablate_projects_a_subspace_out(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    vectors = noise(3, zoo.D_MODEL)
    d_head = model.cfg.d_head
    for site, basis in (
        (Site("resid_pre", 1), vectors[:1]),
        (Site("mlp_out", 1), vectors),
        (Site("z", 1), noise(2, d_head)),
        (Site("k", 1, head=1), noise(2, d_head)),
    ):
        # The projection matrix, by the normal equations.
        off = torch.eye(basis.shape[1]) - basis.T @ torch.linalg.inv(basis @ basis.T) @ basis
        for at in (None, "prefix"):
            intervention = ms.Ablate(basis[0] if len(basis) == 1 else basis, site=site, at=at)
            assert_is_by_hand(
                model, prompts, intervention, lambda mask, s=site, p=off: by_hand(s, mask, lambda x: x @ p)
            )


@backends
def test_ablate_everywhere_projects_all_writes(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    off = torch.eye(zoo.D_MODEL) - v.outer(v) / v.dot(v)
    writes = [Site("resid_pre", 0), *(Site(kind, layer) for layer in range(3) for kind in ("attn_out", "mlp_out"))]
    assert_is_by_hand(
        model, prompts, ms.Ablate(v, everywhere=True),
        lambda mask: [hook for site in writes for hook in by_hand(site, mask, lambda x: x @ off)],
    )  # fmt: skip
    residuals = model.run(prompts, [ms.Ablate(v, everywhere=True)], record="resid_post").activations
    for value in residuals.values():
        assert (value @ v).abs().max() < 1e-4 * value.abs().max() * v.norm()


@backends
def test_scale_multiplies_a_site_or_a_head(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    factors = torch.tensor([0.25, -1.5, 3.0])

    def change(x: torch.Tensor) -> torch.Tensor:
        # What causality hides stays hidden.
        return torch.where(x.isneginf(), x, x * factors[:2].view(-1, *[1] * (x.ndim - 1)))

    for site in all_sites(model):
        if site.kind == "resid_mid" and backend == "bridge":
            continue
        here = site.at(head=heads_of(model, site)[-1])
        assert_is_by_hand(model, prompts, ms.Scale(here, factors), lambda mask, here=here: by_hand(here, mask, change))


@backends
def test_a_soft_prefix_of_real_tokens_is_those_tokens(zoo_models: Any, architecture: str, backend: str) -> None:
    model = zoo_models(architecture, backend)
    tokens = zoo.prompts(batch=1, n_pos=3)[0]
    for side in ("right", "left"):
        reserved = ms.Prompts.from_strings(["The cat sat on", "Give me"], model, slots=3, padding=side)
        written = reserved.with_prefix(tokens)
        expected = model.run(written, record="embed")
        embeddings = expected.activations["embed"][reserved.slots].view(2, 3, zoo.D_MODEL)[1].clone().requires_grad_()
        run = model.run(reserved, [ms.SoftPrefix(embeddings)], grad=True)
        assert_close(run.logits, expected.logits)
        (gradient,) = torch.autograd.grad(run.logits.sum(), embeddings)
        assert (gradient.abs().amax(1) > 1e-4).all()
        wrong = model.run(reserved, [ms.SoftPrefix(embeddings.flip(0).detach())])
        assert (wrong.logits - expected.logits).abs().max() > 0.1


# ---- laws ----

VECTOR_KINDS = [kind for kind, entry in KINDS.items() if entry.axes[-1] not in ("src", "one") and kind != "pos_embed"]
lengths_ = st.lists(st.integers(7, 14), min_size=1, max_size=3)
ats = st.sampled_from([None, "user", "completion", 0, 2, -1, (0, -1), (-2, 1)])
alphas_ = st.floats(-8, 8).filter(lambda alpha: abs(alpha) > 0.1)
sides = st.sampled_from(["left", "right"])
laws = settings(max_examples=20, deadline=None)
# A model without and one with rotation, gated MLP, grouped queries and norms after attention.
names = st.sampled_from(["gpt2", "gemma3"])


def draw_site(data: Any, model: ms.Model, kinds: Sequence[str] = VECTOR_KINDS) -> Site:
    kind = data.draw(
        st.sampled_from([kind for kind in kinds if KINDS[kind].hook.format(layer=0) in model.hooked.hook_dict])
    )
    site = Site(kind, data.draw(st.integers(0, 2)) if "{layer}" in KINDS[kind].hook else None)
    return site.at(head=data.draw(st.sampled_from(heads_of(model, site))))


def draw_vector(data: Any, model: ms.Model, site: Site, *rows: int) -> torch.Tensor:
    width = model.width(site)
    assert width is not None
    return noise(*rows, width, seed=data.draw(st.integers(0, 1000)))


def assert_same(model: ms.Model, prompts: ms.Prompts, one: Any, other: Any, tolerance: float = 2e-5) -> None:
    assert_close(model.run(prompts, one).logits, model.run(prompts, other).logits, tolerance)


@laws
@given(data=st.data(), name=names, lengths=lengths_, side=sides, at=ats, a=alphas_, b=alphas_)
def test_addition_is_linear_in_alpha(
    zoo_models: Any, data: Any, name: str, lengths: list[int], side: str, at: Any, a: float, b: float
) -> None:
    model, prompts = zoo_models(name), with_spans(lengths).padded(side)
    site = draw_site(data, model)
    v = draw_vector(data, model, site)
    assert_same(model, prompts, [ms.Add(v, 0.0, site=site, at=at)], [], 1e-6)
    both = [ms.Add(v, a, site=site, at=at), ms.Add(v, b, site=site, at=at)]
    assert_same(model, prompts, both, [ms.Add(v, a + b, site=site, at=at)], 1e-4)
    assert_same(model, prompts, [ms.Add(v, -a, site=site, at=at)], [ms.Add(-v, a, site=site, at=at)], 1e-6)
    direction = ms.Direction(v, site.at(head=None), model.id)
    assert_same(model, prompts, [ms.Add(direction * a, site=site, at=at)], [ms.Add(v, a, site=site, at=at)])


@laws
@given(data=st.data(), name=names, lengths=lengths_, side=sides, at=ats)
def test_ablation_is_a_projection(
    zoo_models: Any, data: Any, name: str, lengths: list[int], side: str, at: Any
) -> None:
    model, prompts = zoo_models(name), with_spans(lengths).padded(side)
    site = draw_site(data, model)
    vectors = draw_vector(data, model, site, data.draw(st.integers(1, 3)))
    once = ms.Ablate(vectors, site=site, at=at)
    run = model.run(prompts, [once], record=site)
    touched_ = where(prompts, at)
    left = run.activations[site][touched_] @ vectors.T
    assert left.abs().max() < 1e-4 * max(1.0, float(run.activations[site].abs().max())) * vectors.norm()
    assert_close(model.run(prompts, [once, once]).logits, run.logits)
    mixed = torch.linalg.qr(noise(len(vectors), len(vectors), seed=5))[0] @ vectors * 7.0
    assert_close(model.run(prompts, [ms.Ablate(mixed, site=site, at=at)]).logits, run.logits, 1e-4)
    one_by_one = [ms.Ablate(row, site=site, at=at) for row in once.basis]
    assert_close(model.run(prompts, one_by_one[::-1]).logits, run.logits, 1e-4)


@laws
@given(data=st.data(), name=names, lengths=lengths_, side=sides, at=ats, a=alphas_)
def test_interventions_act_in_the_order_given(
    zoo_models: Any, data: Any, name: str, lengths: list[int], side: str, at: Any, a: float
) -> None:
    model, prompts = zoo_models(name), with_spans(lengths).padded(side)
    site = draw_site(data, model)
    v = draw_vector(data, model, site)
    add, ablate, double = ms.Add(v, a, site=site, at=at), ms.Ablate(v, site=site, at=at), ms.Scale(site, 2.0, at=at)
    assert_same(model, prompts, [add, ablate], [ablate], 1e-4)
    first = model.run(prompts, [ablate, add], record=site).activations[site][where(prompts, at)]
    assert_close(first @ v / v.dot(v), torch.full(first.shape[:-1], a), 1e-4)
    assert_same(model, prompts, [add, double], [double, ms.Add(v, 2 * a, site=site, at=at)], 1e-4)
    # At unlike hook points the model's own order counts, not the list's.
    other = draw_site(data, model)
    if other.point != site.point:
        halve = ms.Scale(other, 0.5)
        assert_same(model, prompts, [add, halve], [halve, add], 1e-6)


@laws
@given(data=st.data(), name=names, lengths=lengths_, side=sides, at=ats)
def test_scaling_by_one_and_replacing_by_itself_change_nothing(
    zoo_models: Any, data: Any, name: str, lengths: list[int], side: str, at: Any
) -> None:
    model, prompts = zoo_models(name), with_spans(lengths).padded(side)
    site = draw_site(data, model, [kind for kind in KINDS if kind != "pos_embed"])
    plain = model.run(prompts, record=site)
    # Activations know their positions, so that they fit prompts that are padded otherwise.
    for activations in (plain.activations, model.run(prompts.padded("right"), record=site).activations):
        assert_close(model.run(prompts, [ms.Replace(site, activations, at=at)]).logits, plain.logits, 1e-6)
    assert_close(model.run(prompts, [ms.Scale(site, 1.0, at=at)]).logits, plain.logits, 1e-6)
    assert_same(
        model, prompts, [ms.Scale(site, 0.5, at=at), ms.Scale(site, 3.0, at=at)], [ms.Scale(site, 1.5, at=at)], 1e-4
    )


@laws
@given(data=st.data(), name=names, lengths=lengths_, at=ats)
def test_batched_under_any_padding_is_one_by_one(
    zoo_models: Any, data: Any, name: str, lengths: list[int], at: Any
) -> None:
    model, prompts = zoo_models(name), with_spans(lengths)
    site = draw_site(data, model)
    v, numbers = draw_vector(data, model, site), noise(len(lengths), seed=3)
    donors = model.run(with_spans(lengths, seed=4), record=site).activations
    constant = noise(len(lengths), *donors[site].shape[2:], seed=6)

    def edits(i: Any) -> list[ms.Intervention]:
        return [
            ms.Replace(site, donors.example(i), at=at),
            ms.Add(v, numbers[i], site=site, at=at),
            ms.Ablate(v + 1, site=site, at=at),
            ms.Scale(site, numbers[i]),
            ms.Replace(Site("mlp_out", 2), constant[i] if site.kind == "mlp_out" else noise(zoo.D_MODEL), at=0),
        ]

    left, right = (real(model.run(prompts.padded(side), edits(slice(None)))) for side in ("left", "right"))
    for i in range(len(lengths)):
        alone = model.run(prompts[i].padded("right"), edits(slice(i, i + 1))).logits[0]
        assert_close(left[i], alone, 1e-4)
        assert_close(right[i], alone, 1e-4)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_, rules=st.lists(ats | st.integers(-3, 2), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rows_are_touched_as_their_cells_say(lengths: list[int], rules: list[Any], seed: int) -> None:
    prompts = with_spans(lengths).padded("right")
    generator = torch.Generator().manual_seed(seed)
    n_rows = 30
    example = torch.randint(len(lengths), (n_rows,), generator=generator)
    position = torch.randint(max(lengths) + 3, (n_rows,), generator=generator)
    cell = torch.randint(len(rules), (n_rows,), generator=generator)
    got = touched(rules, Rows(prompts, example, position, cell))
    masks = [where(prompts, at) for at in rules]
    for row in range(n_rows):
        e, p, at = int(example[row]), int(position[row]), rules[int(cell[row])]
        if p < lengths[e]:
            expected = bool(masks[int(cell[row])][e, p])
        else:
            expected = at in (None, "completion") or p in (at if isinstance(at, tuple) else (at,))
        assert bool(got is None or got[row]) == expected
    firsts = first_touched(rules, prompts)
    for at, mask, first in zip(rules, masks, firsts, strict=True):
        columns = [row.nonzero().squeeze(1).tolist() for row in mask]
        assert first.tolist() == [each[0] if each else n for each, n in zip(columns, lengths, strict=True)]
        assert last_touched(at, prompts).tolist() == [each[-1] if each else -1 for each in columns]


# ---- attention scores ----


@backends
def test_edits_of_scores_leave_the_future_hidden(zoo_models: Any, architecture: str, backend: str) -> None:
    """Recorded scores of padded prompts hold zeros at padding, and zero times minus infinity is no number."""
    model, prompts = zoo_models(architecture, backend), with_spans((5, N_POS))
    site = Site("attn_scores", 1)
    donors = model.run(with_spans((5, N_POS), seed=1), record=site).activations
    factor = torch.tensor(0.0, requires_grad=True)
    for edits in ([ms.Replace(site, donors)], [ms.Scale(site, 0.0)], [ms.Scale(site.at(head=1), -1.0, at=-1)]):
        run = model.run(prompts, edits, record=("pattern", 1))
        pattern = run.activations["pattern", 1]
        assert_close(pattern.sum(-1)[prompts.mask[:, None].expand(-1, zoo.N_HEADS, -1)], torch.ones(4 * (5 + N_POS)))
        assert not pattern.triu(1).any()
    run = model.run(prompts, [ms.Scale(site, factor)], grad=True)
    (gradient,) = torch.autograd.grad(run.logits.square().sum(), factor)
    assert bool(gradient.isfinite()) and gradient.abs() > 1e-4


# ---- weights ----

DIRECT = ("gpt2", "llama", "qwen3", "mistral")


@backends
def test_weights_that_hold_an_intervention(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    v = ms.Direction(noise(zoo.D_MODEL), Site("resid_post", 1), model.id)
    two = noise(2, zoo.D_MODEL, seed=3)
    everywhere = ms.Ablate(two, everywhere=True)
    edits = [everywhere, ms.Add(v, -2.0), ms.Add(v, 3.0, site=("mlp_out", 2))]
    for edit in edits:
        if architecture not in DIRECT:
            with pytest.raises(
                MechsteerError, match=r"norms after attention and MLP, so no edit of its weights equals"
            ):
                edit.to_weights(model)
            continue
        before = model.run(prompts).logits
        edited = edit.to_weights(model)
        expected = model.run(prompts, [edit]).logits
        assert (expected - before).abs().max() > 0.1
        assert_close(edited.run(prompts).logits, expected, 1e-4)
        assert torch.equal(model.run(prompts).logits, before)
        assert edited.id.hash != model.id.hash and edited.name.startswith(model.name)


def test_what_no_weights_can_hold_is_refused(zoo_models: Any) -> None:
    model, v = zoo_models("llama"), noise(zoo.D_MODEL)
    add = r"has no equal in the weights: one alpha for all tokens of all examples at resid_post or mlp_out has\. Use"
    for edit in (
        ms.Add(v, site=("resid_pre", 1)),
        ms.Add(v, site=("resid_post", 1), at="user"),
        ms.Add(v, torch.ones(2), site=("resid_post", 1)),
    ):
        with pytest.raises(MechsteerError, match=add):
            edit.to_weights(model)
    ablate = r"has no equal in the weights: Ablate\(direction, everywhere=True\) at all tokens has\. Use it as"
    for edit in (ms.Ablate(v, site=("resid_pre", 1)), ms.Ablate(v, everywhere=True, at=0)):
        with pytest.raises(MechsteerError, match=ablate):
            edit.to_weights(model)
    with pytest.raises(MechsteerError, match=r"llama has layers 0 to 2"):
        ms.Add(v, site=("resid_post", 3)).to_weights(model)
    with pytest.raises(MechsteerError, match=r"got d_model=5"):
        ms.Add(v[:5], site=("resid_post", 1)).to_weights(model)


def test_nothing_that_was_passed_is_changed(zoo_models: Any) -> None:
    model, prompts, v = zoo_models("llama"), with_spans(), noise(zoo.D_MODEL)
    site = Site("resid_post", 1)
    donors = model.run(prompts, record=site).activations
    kept = (v.clone(), donors[site].clone(), prompts.tokens.clone(), prompts.mask.clone())
    model.run(
        prompts,
        [ms.Replace(site, donors), ms.Add(v, 2.0, site=site, at=0), ms.Scale(site, 3.0), ms.Ablate(v, site=site)],
    )
    for before, after in zip(kept, (v, donors[site], prompts.tokens, prompts.mask), strict=True):
        assert torch.equal(before, after)
    with pytest.raises(AttributeError):
        ms.Add(v, site=site).alpha = 3.0  # type: ignore[misc]
