"""Each intervention is the plain TransformerLens hook that one would write by hand, under any padding and KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.rows import Rows, first_touched, last_touched, touched
from mechsteer.site import KINDS, Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
N_POS = 10  # more than the zoo's attention windows
PlainHooks = list[tuple[str, Callable[..., torch.Tensor]]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    return [zoo.prompts(batch=1, n_pos=n, seed=100 * seed + i)[0].tolist() for i, n in enumerate(lengths)]


def with_spans(lengths: Sequence[int] = (N_POS, N_POS, N_POS + 3), seed: int = 0) -> ms.Prompts:
    """Left-padded prompts: one token of scaffold, two of prefix, the user's, and two of completion."""
    prompts = ms.Prompts.from_ids(ids(lengths, seed))
    end = prompts.lengths[:, None]
    roles = torch.full_like(prompts.tokens, 2)
    for role, where in (
        (0, prompts.positions == 0),
        (1, (prompts.positions - 1) // 2 == 0),
        (3, prompts.positions >= end - 2),
    ):
        roles = torch.where(where & prompts.mask, role, roles)
    return replace(prompts, roles=roles).padded("left")


def all_sites(model: ms.Model, layer: int = 1) -> list[Site]:
    """Every hook point of one layer that this model runs, and those outside the blocks."""
    known = [Site(kind, layer if "{layer}" in entry.hook else None) for kind, entry in KINDS.items()]
    rotary = model.cfg.positional_embedding_type == "rotary"
    return [
        site for site in known if site.hook_name in model.hooked.hook_dict and not (rotary and site.kind == "pos_embed")
    ]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


def real(run: ms.Run) -> list[torch.Tensor]:
    """Logits of each prompt's real tokens."""
    return [logits[mask] for logits, mask in zip(run.logits, run.prompts.mask, strict=True)]


def where(prompts: ms.Prompts, at: Any) -> torch.Tensor:
    """Real tokens [batch, pos] that a rule means, worked out token by token."""
    out = torch.zeros_like(prompts.mask)
    for row, col in prompts.mask.nonzero().tolist():
        position = int(prompts.mask[row, :col].sum())
        before = int((prompts.mask[row] & (prompts.roles[row] != 3)).sum())
        if at is None:
            means = True
        elif isinstance(at, str):
            means = ("scaffold", "prefix", "user", "completion")[int(prompts.roles[row, col])] == at
        else:
            means = position in [p if p >= 0 else before + p for p in ([at] if isinstance(at, int) else at)]
        out[row, col] = means
    return out


def by_hand(site: Site, mask: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> PlainHooks:
    """A plain hook that puts `change` of the activation where `mask` [batch, pos] says, and at the site's head only."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        scores, head = site.axes[-1] == "src", site.head
        # [batch, pos, ...] or [batch, head, dest, src]
        chosen = mask[:, None, :, None] if scores else mask.view(*mask.shape, *[1] * (tensor.ndim - 2))
        if head is not None:
            n_heads = tensor.shape[1 if scores else 2]
            only = torch.arange(n_heads) == head
            chosen = chosen & (only.view(1, -1, 1, 1) if scores else only.view(1, 1, -1, 1))
        return torch.where(chosen, change(tensor), tensor)

    return [(site.hook_name, hook)]


def assert_is_by_hand(
    model: ms.Model, prompts: ms.Prompts, intervention: ms.Intervention, hooks: Callable[..., Any]
) -> None:
    """`model.run` on padded prompts gives what plain hooks give on the first two of them, which need no padding."""
    two = prompts[:2].padded("right")
    assert bool(two.mask.all()) and not bool(prompts.mask.all())
    mask = where(two, intervention.at)
    target = model.hooked
    with torch.no_grad():
        expected = target.run_with_hooks(two.tokens, fwd_hooks=hooks(mask))
        plain = target(two.tokens)
    # An effect that cannot be seen would hide an error.
    assert (expected - plain).abs().max() > 1e-4 * plain.abs().max(), "no effect"
    got = real(model.run(prompts, [intervention]))
    for i in range(2):
        assert_close(got[i], expected[i])


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


def heads_of(model: ms.Model, site: Site) -> list[int | None]:
    n_heads = model.size(site, "head")
    return [None, n_heads - 1] if "head" in site.axes and n_heads else [None]


@backends
def test_replace_patches_every_kind_of_site(zoo_models: Any, architecture: str, backend: str) -> None:
    """Activation patching, whole and by head; on a bridge `resid_mid` too, where no plain hook has that effect."""
    model, prompts = zoo_models(architecture, backend), with_spans()
    sites = all_sites(model)
    donors = model.run(with_spans(seed=1), record=sites).activations
    with torch.no_grad():
        _, cache = model.hooked.run_with_cache(donors.prompts[:2].padded("right").tokens)
    for site in sites:
        if site.kind == "resid_mid" and backend == "bridge":
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
        for per_example in (False, True):
            value = noise(3, *shape) if per_example else noise(*shape)

            def change(x: torch.Tensor, site: Site = site, value: torch.Tensor = value, per: bool = per_example) -> Any:
                head_axis = 1 if site.axes[-1] == "src" else 2
                v = (value[:2] if per else value).unsqueeze(1 if per else 0)  # [batch or 1, 1, ...]
                if site.axes[-1] == "src":
                    v = v[..., : x.shape[-1]]
                    v = v[:, :, None] if site.head is not None else v.transpose(1, 2) if per else v[0][None, :, None]
                elif site.head is not None:
                    v = v.unsqueeze(head_axis)
                return v.expand_as(x)

            assert_is_by_hand(
                model, prompts, ms.Replace(site, value, at=(2, -1)), lambda mask, s=site, c=change: by_hand(s, mask, c)
            )


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
    factors = torch.tensor([0.0, -1.5, 3.0])
    for site in all_sites(model):
        if site.kind == "resid_mid" and backend == "bridge":
            continue
        masked = site.kind == "attn_scores"
        for head in heads_of(model, site):
            here = site.at(head=head)
            assert_is_by_hand(
                model, prompts, ms.Scale(here, factors),
                lambda mask, here=here, masked=masked: by_hand(
                    here, mask,
                    # What causality hides stays hidden.
                    lambda x: torch.where(x.isneginf(), x, x * factors[:2].view(-1, *[1] * (x.ndim - 1)))
                    if masked
                    else x * factors[:2].view(-1, *[1] * (x.ndim - 1)),
                ),
            )  # fmt: skip


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
lengths_ = st.lists(st.integers(3, 14), min_size=1, max_size=4)
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


# ---- plain hooks in other people's code ----


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
            model.hooked.run_with_hooks(zoo.prompts(n_pos=5), fwd_hooks=ms.Add(v, site=("z", 1), at=at).fwd_hooks(model)
                                        if False else ms.Add(v, site=("resid_post", 1), at=at).fwd_hooks(model))  # fmt: skip
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


GENERATE_RULES = [None, "completion", "user", 0, -1, (0, 6, 8), (-2, 11)]


def greedy(model: ms.Model, prompts: ms.Prompts, n_new: int, hook: Callable[..., Any]) -> list[list[int]]:
    """Each prompt alone, a whole forward pass for every token, under plain hooks made for the present tokens."""
    out = []
    for row, mask in zip(prompts.tokens, prompts.mask, strict=True):
        tokens = row[mask].tolist()
        for _ in range(n_new):
            with torch.no_grad():
                logits = model.hooked.run_with_hooks(
                    torch.tensor([tokens]), fwd_hooks=hook(int(mask.sum()), len(tokens))
                )
            tokens.append(int(logits[0, -1].argmax()))
        out.append(tokens[-n_new:])
    return out


@pytest.fixture
def left_padding(request: pytest.FixtureRequest) -> Any:
    """Lets `HookedTransformer.generate` see padding on the left of tokens; it goes by its tokenizer's side."""
    changed: list[tuple[Any, str]] = []

    def prepare(model: ms.Model) -> None:
        changed.append((model.hooked.tokenizer, model.hooked.tokenizer.padding_side))
        model.hooked.tokenizer.padding_side = "left"

    yield prepare
    for tokenizer, side in changed:
        tokenizer.padding_side = side


@backends
@pytest.mark.parametrize("cache", [True, False])
def test_positions_hold_in_generate(
    zoo_models: Any, architecture: str, backend: str, cache: bool, left_padding: Any
) -> None:
    """In TransformerLens's own `generate`: the first generated token, later ones, left padding, with and without cache."""
    model, n_new = zoo_models(architecture, backend), 5
    left_padding(model)
    prompts = ms.Prompts.from_ids(ids((4, 7))).padded("left")
    v = 4 * noise(zoo.D_MODEL, seed=2)
    plain = greedy(model, prompts, n_new, lambda *_: [])
    changed = 0
    for at in GENERATE_RULES:
        for site in (Site("resid_post", 1), Site("ln1_normalized", 1), Site("embed")):

            def by_position(n: int, total: int, at: Any = at, site: Site = site) -> PlainHooks:
                # The first n tokens are the user's, and all positions count from the first token.
                spans = {None: range(total), "user": range(n), "completion": range(n, total)}
                chosen = (
                    spans[at]
                    if at is None or isinstance(at, str)
                    else [p % n if p < 0 else p for p in np.atleast_1d(at)]
                )
                mask = torch.tensor([[position in chosen for position in range(total)]])
                return by_hand(site, mask, lambda x: x + v)

            kind: dict[str, Any] = {"attention_mask": prompts.mask.long()} if backend == "bridge" else {}
            edit = ms.Add(v, site=site, at=at)
            with torch.no_grad(), model.hooked.hooks(fwd_hooks=edit.fwd_hooks(model, prompts, n_new=n_new)):
                out = model.hooked.generate(
                    prompts.tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache,
                    verbose=False, return_type="tokens", **kind,
                )  # fmt: skip
            expected = greedy(model, prompts, n_new, by_position)
            assert out[:, prompts.tokens.shape[1] :].tolist() == expected, (at, site)
            changed += expected != plain
            if not cache and backend == "bridge":
                break
    assert changed > len(GENERATE_RULES) / 2


def test_generation_from_one_token_counts_on(zoo_models: Any) -> None:
    """The call that starts and those that go on are all one token wide."""
    model, v = zoo_models("gpt2"), 4 * noise(zoo.D_MODEL)
    for prompts in (ms.Prompts.from_ids([[7], [9]]), None):
        for site in (Site("resid_post", 1), Site("ln1_normalized", 1)):
            for at in (0, "completion", (1, 3), None):
                edit = ms.Add(v, site=site, at=at)

                def by_position(n: int, total: int, at: Any = at, site: Site = site) -> PlainHooks:
                    chosen = {None: range(total), "completion": range(1, total)}.get(at) or np.atleast_1d(at)
                    return by_hand(site, torch.tensor([[p in chosen for p in range(total)]]), lambda x: x + v)

                tokens = torch.tensor([[7], [9]])
                with torch.no_grad(), model.hooked.hooks(fwd_hooks=edit.fwd_hooks(model, prompts, n_new=4)):
                    out = model.hooked.generate(
                        tokens,
                        max_new_tokens=4,
                        do_sample=False,
                        stop_at_eos=False,
                        verbose=False,
                        return_type="tokens",
                    )
                assert out[:, 1:].tolist() == greedy(model, ms.Prompts.from_ids(tokens), 4, by_position), (at, site)
    # One token in a run of mechsteer's own.
    run = model.run(torch.tensor([[7]]), [ms.Add(v, site=("ln1_normalized", 1), at=0)])
    assert_close(run.logits, model.run(torch.tensor([[7]]), [ms.Add(v, site=("ln1_normalized", 1))]).logits, 1e-6)
    assert (run.logits - model.run(torch.tensor([[7]])).logits).abs().max() > 0.1


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
    add = r"has no equal in the weights: one alpha for all tokens of all examples at resid_post or mlp_out has\. Use it as"
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


# ---- what is refused ----

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ms.Add(torch.ones(4)),
            r"Add got a tensor without a site\. Pass site=\('resid_post', layer\), or a Dir",
        ),
        (lambda: ms.Ablate(torch.ones(4)), r"Ablate got a tensor without a site"),
        (lambda: ms.Add(torch.tensor([1.0, NAN]), site=("resid_pre", 0)), r"has 1 numbers that are NaN or infinite"),
        (lambda: ms.Ablate(torch.tensor([NAN]), site=("resid_pre", 0)), r"NaN or infinite"),
        (lambda: ms.Add(torch.ones(4), NAN, site=("resid_pre", 0)), r"alpha=nan is not finite\. Pass finite numbers"),
        (lambda: ms.Add(torch.ones(4), torch.tensor([1, NAN]), site=("z", 0)), r"alpha holds NaN or infinity"),
        (lambda: ms.Scale(("z", 0), float("inf")), r"factor=inf is not finite"),
        (lambda: ms.Scale(("z", 0), torch.tensor([1, NAN])), r"factor holds NaN or infinity"),
        (lambda: ms.Replace(("z", 0), torch.tensor([NAN])), r"Replace at blocks\.0\.attn\.hook_z got a value with NaN"),
        (lambda: ms.SoftPrefix(torch.full((2, 4), NAN)), r"SoftPrefix got embeddings with NaN or infinity"),
        (
            lambda: ms.Add(ms.Direction(torch.ones(2, 4), Site("z", 0))),
            r"Add got 2 vectors and adds one\. Pass them to Ablate, or pick one",
        ),
        (lambda: ms.Ablate(torch.ones(2, 4), site=("z", 0)), r"2 vectors that span only 1 dimensions"),
        (
            lambda: ms.Ablate(torch.ones(4), site=("z", 0), everywhere=True),
            r"everywhere=True and site=\('z', 0\)\. Give one",
        ),
        (
            lambda: ms.Add(torch.ones(4), site=("pattern", 0)),
            r"needs a whole hook point, or a head of one, whose last axis",
        ),
        (
            lambda: ms.Scale(("z", 0), 1.0, at="assistant"),
            r"at='assistant' is no span\. Pass one of scaffold, prefix, user",
        ),
        (lambda: ms.Scale(("z", 0), 1.0, at=[]), r"at=\[\] touches no token\. Leave `at` out"),
        (
            lambda: ms.Scale(("z", 0), 1.0, at=1.5),
            r"at=1\.5 is not understood\. Pass None for all tokens, absolute pos",
        ),
        (lambda: ms.Scale(("z", 0), 1.0, at=True), r"at=True is not understood"),
        (lambda: ms.Scale(("z", 0), 1.0, at=["user"]), r"at=\['user'\] is not understood"),
        (lambda: ms.Scale(("z", 0), 1.0, at=[0, 1.5]), r"at=\[0, 1\.5\] is not understood"),
        (
            lambda: ms.Scale(("z", 0), 1.0, at=torch.ones(2, 30, dtype=torch.bool)),
            r"at=tensor\(\[\[True.* is not underst",
        ),
        (lambda: ms.Scale(("z", 0), 1.0, at=torch.tensor([True, False])), r"is not understood"),
        (lambda: ms.Scale(Site("z", 0, pos=2), 1.0, at=3), r"at=3 and Site\(pos=2\) both say where\. Give one of them"),
        (lambda: ms.Scale(("zz", 0), 1.0), r"kind 'zz' does not exist\. Nearest: z"),
    ],
)
def test_values_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MechsteerError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_alphas_with_axes_are_refused() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # nobody checks shapes for the user
    try:
        with pytest.raises(MechsteerError, match=r"alpha has shape \[2, 1\]\. Pass one number, or one per example"):
            ms.Add(torch.ones(4), torch.ones(2, 1), site=("z", 0))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_positions_may_be_any_integers() -> None:
    def at(value: Any) -> Any:
        return ms.Scale(("z", 0), 1.0, at=value).at

    assert at(np.int64(3)) == at(torch.tensor(3)) == at([3]) == at((3, 3)) == at(torch.tensor([3])) == 3
    assert at(np.array([2, 1])) == at(torch.tensor([1, 2])) == at(range(1, 3)) == at({2, 1}) == (1, 2)
    assert ms.Scale(Site("z", 0, pos=-1), 1.0).at == -1 and ms.Scale(Site("z", 0, pos=2), 1.0, at=2).at == 2


def direction_of(model: ms.Model, name: str = "other", processed: bool = False) -> ms.Direction:
    return ms.Direction(torch.ones(zoo.D_MODEL), Site("resid_post", 1), ms.ModelId(name, "ab" * 32, processed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: ms.Add(direction_of(m)),
            r"Direction was made with other \(weights abababababab\), and this is llama \(weights \w{12}\)\. Make it again",
        ),
        (
            lambda m: ms.Ablate(direction_of(m, processed=True)),
            r"Direction was made with folded or centred weights of other, and llama here has unprocessed weights",
        ),
        (
            lambda m: ms.Add(torch.ones(7), site=("resid_post", 1)),
            r"got d_model=7, but Site\('resid_post', 1\) of llama has 32",
        ),
        (
            lambda m: ms.Ablate(torch.ones(7), everywhere=True),
            r"got d_model=7, but Site\('resid_pre', 0\) of llama has 32",
        ),
        (lambda m: ms.Add(torch.ones(32), site=("z", 1)), r"got d_head=32, but Site\('z', 1\) of llama has 16"),
        (
            lambda m: ms.Add(ms.Direction(torch.ones(32), Site("resid_post", 1)), site=("mlp_post", 1)),
            r"Add got d_mlp=32, but Site\('mlp_post', 1\) of llama has 96",
        ),
        (lambda m: ms.Add(torch.ones(32), site=("resid_post", 3)), r"llama has layers 0 to 2"),
        (lambda m: ms.Scale(Site("k", 1, head=2), 1.0), r"k of llama has heads 0 to 1"),
        (
            lambda m: ms.Replace(("resid_post", 1), torch.ones(7)),
            r"got a value of shape \[7\], but llama has \[d_model=32\] there\. Pass that for all tokens, or \[batch, \.\.\.\]",
        ),
        (
            lambda m: ms.Replace(("z", 1), torch.ones(16)),
            r"got a value of shape \[16\], but llama has \[head=4, d_head=16\]",
        ),
        (lambda m: ms.Replace(("z", 1), torch.ones(3, 16)), r"shape \[3, 16\], but llama has \[head=4, d_head=16\]"),
        (lambda m: ms.Replace(Site("z", 1, head=0), torch.ones(3, 3, 16)), r"but llama has \[d_head=16\] there"),
        (
            lambda m: ms.Replace(("pattern", 1), torch.ones(3, 5)),
            r"shape \[3, 5\], but llama has \[head=4, src\] there",
        ),
        (lambda m: ms.SoftPrefix(torch.ones(2, 7)), r"SoftPrefix got d_model=7"),
    ],
)
@backends
def test_what_does_not_fit_the_model_is_refused(zoo_models: Any, backend: str, make: Any, message: str) -> None:
    model = zoo_models("llama", backend)
    with pytest.raises(MechsteerError, match=message) as raised:
        model.run(zoo.prompts(), [make(model)])
    assert "\n" not in str(raised.value)
    with pytest.raises(MechsteerError, match=message):
        make(model).fwd_hooks(model)


def test_what_does_not_fit_the_prompts_is_refused(zoo_models: Any) -> None:
    model, v = zoo_models("llama"), torch.ones(zoo.D_MODEL)
    site = Site("resid_post", 1)
    prompts = ms.Prompts.from_ids(ids((4, 7))).padded("left")
    activations = model.run(ms.Prompts.from_ids(ids((4, 6))), record=site).activations
    other = zoo_models("mistral").run(prompts, record=site).activations
    refused = [
        (
            ms.Add(v, site=site, at=4),
            r"Add at blocks\.1\.hook_resid_post touches position 4, but prompt 0 has 4 tokens\. Pos",
        ),
        (ms.Add(v, site=site, at=(0, 5)), r"touches position 5, but prompt 0 has 4 tokens"),
        (ms.Add(v, site=site, at=-5), r"touches position -5, but prompt 0 has 4 tokens\. .* -1 is the prompt's last"),
        (ms.Add(v, site=Site("resid_post", 1, pos=9)), r"touches position 9"),
        (
            ms.Scale(site, 1.0, at="prefix"),
            r"would never fire: none of the 2 prompts has a token in span 'prefix'\. Build",
        ),
        (ms.Scale(site, 1.0, at="completion"), r"none of the 2 prompts has a token in span 'completion'"),
        (ms.Scale(site, 1.0, at="slots"), r"none of the 2 prompts has a token in span 'slots'"),
        (ms.SoftPrefix(torch.ones(2, 32)), r"SoftPrefix at hook_embed would never fire: .* in span 'slots'"),
        (
            ms.Add(v, torch.ones(3), site=site),
            r"alpha has 3 numbers for 2 prompts\. Pass one number, or one per prompt",
        ),
        (ms.Scale(site, torch.ones(3)), r"factor has 3 numbers for 2 prompts"),
        (ms.Replace(site, torch.ones(3, 32)), r"value has 3 numbers for 2 prompts"),
        (
            ms.Replace(site, activations),
            r"prompt 1 has 7 tokens and the activations 6\. Align the prompts, or choose tokens",
        ),
        (ms.Replace(site, activations, at=-1), r"prompt 1 has 7 tokens and the activations 6"),
        (ms.Replace(site, activations, at="user"), r"prompt 1 has 7 tokens and the activations 6"),
        (
            ms.Replace(site, activations.example([0, 1, 1])),
            r"has activations of 3 prompts, and 2 are run\. Record as many",
        ),
        (ms.Replace(site, other), r"The activations for Replace at .* was made with mistral"),
    ]
    for edit, message in refused:
        with pytest.raises(MechsteerError, match=message) as raised:
            model.run(prompts, [edit])
        assert "\n" not in str(raised.value)
    with pytest.raises(
        MechsteerError, match=r"Replace at blocks\.0\.hook_resid_post got activations that do not hold it\. Rec"
    ):
        ms.Replace(("resid_post", 0), activations)
    # What both have can be patched, and what is only generated can be touched.
    model.run(prompts, [ms.Replace(site, activations, at=(0, -2))])
    model.run(prompts, [ms.Replace(site, activations.example(0), at=0)])
    for at in ("completion", 9):
        ms.Add(v, site=site, at=at).fwd_hooks(model, prompts, n_new=6)
    with pytest.raises(MechsteerError, match=r"touches position 10, but prompt 0 has 4 tokens and 6 new ones"):
        ms.Add(v, site=site, at=10).fwd_hooks(model, prompts, n_new=6)
    reserved = ms.Prompts.from_strings(["The cat", "A"], model, slots=2)
    with pytest.raises(
        MechsteerError, match=r"SoftPrefix has 3 embeddings, but prompt 0 reserves 2 slots\. Build the prom"
    ):
        model.run(reserved, [ms.SoftPrefix(torch.ones(3, 32))])
    with pytest.raises(MechsteerError, match=r"would never fire: .* in span 'slots'"):
        model.run(reserved.with_prefix([5, 6]), [ms.SoftPrefix(torch.ones(2, 32))])


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
