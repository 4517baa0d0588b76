"""Laws that interventions keep at any site, on any tokens, under any padding and in any batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import N_POS, assert_close, heads_of, noise, real, where, with_spans

import mechsteer as ms
from mechsteer.rows import Rows, first_touched, last_touched, touched
from mechsteer.site import KINDS, Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])

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
