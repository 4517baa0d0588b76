"""Each law of steering strength on random data of assumption 1, against the exact model steered as defined.

The model's own logits W (h + alpha v) say what is true; the closed forms of the laws must agree.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

import mechsteer.strength.theory as theory
from mechsteer.errors import MechsteerError

F64 = torch.float64
laws = settings(deadline=None, max_examples=30, derandomize=True)


@st.composite
def steerings(draw: st.DrawFn, *, of_context: bool = False) -> theory.ContextSets:
    """Any data of assumption 1 (concepts of unlike sizes, ties included) in the random or the contrastive setting.

    `of_context` lets a depend on the context, the generalisation of appendix B.1.
    """
    sizes = draw(st.lists(st.integers(2, 4), min_size=2, max_size=4))
    concepts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    numbers = st.lists(st.integers(1, 12), min_size=len(concepts), max_size=len(concepts))
    b = torch.tensor(draw(numbers), dtype=F64)
    b = b / b.sum() * draw(st.sampled_from([0.02, 0.2, 0.6, 0.9]))
    share = torch.tensor(draw(numbers), dtype=F64)
    seed = draw(st.integers(0, 99))
    data = theory.ConceptData.from_shares(b, share, concepts, contexts_per_concept=3, length=2, seed=seed)
    if of_context:
        own, n = data.own, len(data.contexts)
        shares = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=F64) * own
        a = b + (1 - b.sum()) * shares / shares.sum(1, keepdim=True)
        weights = torch.arange(1, n + 1, dtype=F64)
        data = theory.ConceptData(a, b, concepts, data.contexts, weights / weights.sum())
    target = draw(st.integers(0, len(sizes) - 1))
    others = [None, *(k for k in range(len(sizes)) if k != target)]
    return data.sets(target, opposite=draw(st.sampled_from(others)), size=draw(st.integers(1, 3)), seed=seed)


any_steering = st.one_of(steerings(), steerings(of_context=True))


def log_probs(sets: theory.ContextSets, alphas: torch.Tensor) -> torch.Tensor:
    """Of the exact model, steered as section 3.1 says [context, alpha, token]."""
    ufm = theory.UFM.exact(sets.data)
    return ufm.steered_logits(ufm.steering_vector(sets), alphas.double()).log_softmax(-1)


def naive_log_odds(sets: theory.ContextSets) -> np.ndarray:
    """The products of definition 3.2, as they stand."""
    q = len(sets.positive)
    top, bottom = (sets.data.probs[side].prod(0) for side in (sets.positive, sets.negative))
    return ((top / bottom).log() / q).numpy()


def spread(sets: theory.ContextSets) -> float:
    m = naive_log_odds(sets)
    return float(m.max() - m.min())


# ---- log-odds (definition 3.2, lemmas B.3 to B.5) ----


@laws
@given(any_steering)
def test_log_odds_separate_target_tokens_by_their_sign(sets: theory.ContextSets) -> None:
    m = theory.log_odds(sets)
    np.testing.assert_allclose(m, naive_log_odds(sets), atol=1e-10)
    inside = sets.data.tokens_of(sets.target)
    assert bool((m[inside] > 1e-6).all()) and bool((m[~inside] <= 1e-12).all())
    top, bottom = theory.extreme_tokens(sets)
    np.testing.assert_array_equal(top, m.numpy() > m.numpy().max() - 1e-9)
    np.testing.assert_array_equal(bottom, m.numpy() < m.numpy().min() + 1e-9)
    assert not bool((top & ~inside).any()) and not bool((bottom & inside).any())


@laws
@given(steerings())
def test_log_odds_have_lemma_b4_s_form(sets: theory.ContextSets) -> None:
    data, q = sets.data, len(sets.positive)
    ratio = (data.a / data.b).log()
    for z, m in enumerate(theory.log_odds(sets).tolist()):
        concept = int(data.concepts[z])
        shared = sum(int(data.context_concepts[j]) == concept for j in sets.negative.tolist())
        expected = float(ratio[z]) * (1 if concept == sets.target else -shared / q)
        assert m == pytest.approx(expected, abs=1e-10)


@laws
@given(any_steering, st.floats(-8, 8))
def test_closed_form_of_steered_probabilities(sets: theory.ContextSets, alpha: float) -> None:
    weights = sets.data.probs.numpy() * np.exp(alpha * naive_log_odds(sets))
    expected = weights / weights.sum(1, keepdims=True)
    alphas = torch.tensor([alpha], dtype=F64)
    np.testing.assert_allclose(theory.steered_probs(sets, alphas)[:, 0], expected, atol=1e-10)
    np.testing.assert_allclose(log_probs(sets, alphas)[:, 0].exp(), expected, atol=1e-10)
    exact = theory.UFM.exact(sets.data)
    np.testing.assert_allclose(
        theory.shifted_logits(exact.logits, sets, alphas)[:, 0].softmax(-1), expected, atol=1e-10
    )


@laws
@given(any_steering, st.floats(-4, 4))
def test_slopes_are_finite_differences(sets: theory.ContextSets, alpha: float) -> None:
    h = 1e-5
    at, around = torch.tensor([alpha], dtype=F64), torch.tensor([alpha - h, alpha + h], dtype=F64)
    probs = log_probs(sets, around).exp()
    slope = (probs[:, 1] - probs[:, 0]) / (2 * h)
    np.testing.assert_allclose(theory.probability_slope(sets, at)[:, 0], slope, atol=1e-7 * (1 + spread(sets)))
    means = probs @ torch.from_numpy(naive_log_odds(sets))
    np.testing.assert_allclose(theory.mean_log_odds(sets, around), means, atol=1e-9 * (1 + spread(sets)))
    change = (means[:, 1] - means[:, 0]) / (2 * h)  # eq. 10
    np.testing.assert_allclose(theory.variance_of_log_odds(sets, at)[:, 0], change, atol=1e-6 * (1 + spread(sets)) ** 3)


def test_in_the_contrastive_setting_alpha_1_leads_from_one_concept_to_the_other() -> None:
    gamma, omega = (
        torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]]),
        torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]]),
    )
    data = theory.ConceptData.varied(gamma, omega, eps=0.2)
    sets = data.sets(0, opposite=1)
    inside, opposite = (data.context_concepts == k for k in (0, 1))
    steered = theory.steered_probs(sets, torch.tensor([1.0]))[:, 0]
    np.testing.assert_allclose(steered[opposite], data.probs[inside], atol=1e-12)
    peaks = theory.peaks(sets)
    np.testing.assert_allclose(peaks[opposite], peaks[inside] + 1, atol=1e-9)


# ---- theorem 3.3 and proposition B.1 ----


@laws
@given(any_steering)
def test_probabilities_have_one_peak_and_targets_peak_last(sets: theory.ContextSets) -> None:
    """Theorem 3.3: bump, peak position, monotone ends."""
    peaks, inside = theory.peaks(sets), sets.data.tokens_of(sets.target)
    m = theory.log_odds(sets)
    unit = 1 / spread(sets)
    steps = unit * torch.tensor([-8.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 8.0], dtype=F64)
    grid = unit * torch.linspace(-30, 30, 121, dtype=F64)
    everywhere = log_probs(sets, grid)
    for z, shape in enumerate(theory.token_shapes(sets)):
        if shape == "bump":
            assert bool(peaks[:, z].isfinite().all())
            grids = peaks[:, z, None] + steps
            there = log_probs(sets, grids.flatten())[..., z].unflatten(1, grids.shape)
            rises = there.diagonal().T.diff(dim=1)  # each context at its own peak
            assert bool((rises[:, :5] > -1e-11).all()) and bool((rises[:, 5:] < 1e-11).all())
            assert bool((rises[:, 0] > 1e-9).all()) and bool((rises[:, -1] < -1e-9).all())
        else:
            sign = 1.0 if shape == "increasing" else -1.0
            assert bool((peaks[:, z] == sign * math.inf).all())
            assert bool(inside[z]) == (sign == 1)
            rises = sign * everywhere[:, :, z].diff(dim=1)
            assert bool((rises > -1e-11).all()) and bool((rises.amax(1) > 1e-6).all())
    assert bool((peaks[:, inside].amin(1) > peaks[:, ~inside].amax(1)).all())
    order = m.argsort()  # and in the order of the log-odds within each side, as E[M] grows
    assert bool((peaks[:, order].diff(dim=1).nan_to_num(0.0) >= -1e-7 * unit).all())


def test_peaks_are_the_maxima_that_a_plain_search_finds() -> None:
    gamma, omega = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 2.0]])
    sets = theory.ConceptData.varied(gamma, omega, eps=0.1).sets(0)
    peaks = theory.peaks(sets)
    assert sorted(theory.token_shapes(sets)) == ["bump"] * 4 + ["decreasing", "increasing"]
    for j in (0, 7):
        for z in peaks[j].isfinite().nonzero()[:, 0].tolist():
            curve = lambda alpha, j=j, z=z: -float(log_probs(sets, torch.tensor([alpha]))[j, 0, z])  # noqa: E731
            found = minimize_scalar(curve, bounds=(-60, 60), method="bounded", options={"xatol": 1e-9})
            assert float(peaks[j, z]) == pytest.approx(found.x, abs=1e-5)


def test_on_the_uniform_instance_no_target_token_has_a_bump() -> None:
    sets = theory.ConceptData.smoothed(3, 3, eps=0.05).sets(0, opposite=1)
    assert theory.token_shapes(sets) == ["increasing"] * 3 + ["decreasing"] * 3 + ["bump"] * 3


@laws
@given(any_steering, st.sampled_from([1, -1]))
def test_limits_of_probabilities(sets: theory.ContextSets, sign: int) -> None:
    """Proposition B.1 (eq. 5)."""
    m = sign * naive_log_odds(sets)
    short = m.max() - m
    gap = short[short > 1e-9].min()
    assume(gap > 1e-3)
    far = log_probs(sets, torch.tensor([sign * 40 / gap]))[:, 0].exp() - sets.data.probs
    np.testing.assert_allclose(theory.probability_limits(sets, sign=sign), far, atol=1e-7)


def test_tied_tokens_share_the_mass_as_they_did_before() -> None:
    """Equal log-odds from unequal probabilities; log-odds a millionth apart are no tie."""
    concepts = torch.tensor([0, 0, 0, 1, 1])
    b = torch.tensor([0.01, 0.02, 0.01, 0.05, 0.05], dtype=F64)
    share = torch.tensor([1.0, 2.0, 1.0 - 1e-5, 2.0, 2.0 + 1e-5], dtype=F64)
    sets = theory.ConceptData.from_shares(b, share, concepts, contexts_per_concept=2).sets(0)
    assert theory.token_shapes(sets) == ["increasing", "increasing", "bump", "bump", "decreasing"]
    steered = theory.probability_limits(sets, sign=1) + sets.data.probs
    np.testing.assert_allclose(steered, torch.tensor([1 / 3, 2 / 3, 0, 0, 0]).double().expand(4, -1), atol=1e-9)
    assert bool(theory.peaks(sets)[:, 3].isfinite().all())


def test_the_printed_eq_8_is_right_for_target_tokens_only() -> None:
    sets = theory.ConceptData.smoothed(3, 3, eps=0.05).sets(0, opposite=1)
    data = sets.data
    limit = theory.probability_limits(sets, sign=1)
    printed = torch.where((data.context_concepts == 0)[:, None], -data.a, -data.b)  # of tokens outside M-bar
    outside = ~data.tokens_of(0)
    in_target, elsewhere = 0, int((data.context_concepts == 1).nonzero()[0, 0])
    np.testing.assert_allclose(limit[in_target, outside], -data.b[outside], atol=1e-12)
    assert float((limit - printed)[in_target, outside].abs().min()) > 0.3  # a_z - b_z
    own = data.tokens_of(1)
    np.testing.assert_allclose((limit - printed)[elsewhere, own], data.b[own] - data.a[own], atol=1e-12)
    with pytest.raises(MechsteerError, match=r"probability_limits got sign=0. It is 1 for alpha -> \+inf, and -1 for"):
        theory.probability_limits(sets, sign=0)


# ---- remark 3.4 ----


@laws
@given(any_steering)
def test_target_tokens_peak_above_0_exactly_where_eq_11_holds(sets: theory.ContextSets) -> None:
    lead = theory.target_lead(sets)
    lowest = theory.peaks(sets)[:, sets.data.tokens_of(sets.target)].amin(1)
    clear = lead.abs() > 1e-9
    assert bool(((lowest > 0) == (lead > 0))[clear].all())


@laws
@given(steerings())
def test_bound_of_the_lead_outside_the_target_concept(sets: theory.ContextSets) -> None:
    outside = sets.data.context_concepts != sets.target
    assert theory.target_lead_bound(sets) <= float(theory.target_lead(sets)[outside].min()) + 1e-12


def test_the_bound_is_the_paper_s_f_of_eps() -> None:
    gamma, omega, eps = torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.1
    ratio = 0.25 / 0.5  # gamma / omega of z_1, the target token of the smallest log-odds
    expected = math.log((1 - eps) / eps * ratio) - eps * math.log((1 - eps) / eps)
    bound = theory.target_lead_bound(theory.ConceptData.varied(gamma, omega, eps=eps).sets(0))
    assert bound == pytest.approx(expected, abs=1e-12)


SHARES: Any = (torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
def test_remark_3_4_fails_within_the_target_concept(eps: float) -> None:
    """As printed it has no condition; its proof takes contexts outside T. Inside, it fails for the smallest eps too."""
    data = theory.ConceptData.varied(*SHARES, eps=eps)
    sets = data.sets(0, opposite=1)
    inside, targets = data.context_concepts == 0, data.tokens_of(0)
    bumps = torch.tensor([shape == "bump" for shape in theory.token_shapes(sets)]) & targets
    peaks = theory.peaks(sets)
    assert int(bumps.sum()) == 1 and bool((peaks[inside][:, bumps] < 0).all())
    assert bool((peaks[~inside][:, bumps] > 0).all()) and theory.target_lead_bound(sets) > 0


def test_remark_3_4_takes_a_small_eps() -> None:
    """Data of appendix B.3 and a context outside the target concept, with a target token that peaks below 0."""
    gamma = torch.tensor([[0.101, 0.899], [0.49, 0.51], [0.5, 0.5]], dtype=F64)
    omega = torch.tensor([[0.2, 0.8], [0.96, 0.04], [0.5, 0.5]], dtype=F64)
    peaks, bounds = {}, {}
    for eps in (0.5, 0.01):
        data = theory.ConceptData.varied(gamma, omega, eps=eps)
        sets = data.sets(0, opposite=1)
        assert theory.token_shapes(sets)[0] == "bump"
        peaks[eps] = theory.peaks(sets)[data.context_concepts == 2, 0]
        bounds[eps] = theory.target_lead_bound(sets)
    assert bool((peaks[0.5] < 0).all()) and bounds[0.5] < 0
    assert bool((peaks[0.01] > 0).all()) and bounds[0.01] > 0


def test_the_bound_takes_one_a_for_all_contexts() -> None:
    data = theory.ConceptData.smoothed(2, 2, eps=0.1)
    general = theory.ConceptData(data.a.expand(len(data.contexts), -1), data.b, data.concepts, data.contexts)
    with pytest.raises(MechsteerError, match=r"target_lead_bound takes data whose a does not depend on the context"):
        theory.target_lead_bound(general.sets(0))


# ---- theorem 3.6 ----


@laws
@given(any_steering)
def test_concepts_follow_the_tanh_form(sets: theory.ContextSets) -> None:
    unit = 1 / spread(sets)
    alphas = unit * torch.tensor([7.0, -11.0, -2.0, 0.0, 0.4, 0.4, 25.0], dtype=F64)  # in no order, one twice
    probs = log_probs(sets, alphas).exp()
    start = sets.data.probs
    got = theory.concept_increase_tanh(sets, alphas)
    drift = theory.concept_drift(sets, alphas)
    for concept in range(sets.data.n_concepts):
        own = sets.data.tokens_of(concept)
        mean = (probs - start[:, None])[..., own].mean(-1)
        np.testing.assert_allclose(got[..., concept], mean, atol=1e-9)
    assert bool((drift[:, 3] == 0).all())
    assert bool((drift.abs() <= (spread(sets) * alphas.abs())[:, None] + 1e-9).all())


def test_the_quadrature_is_that_of_a_plain_one() -> None:
    sets = theory.ConceptData.varied(*SHARES, eps=0.05).sets(0, opposite=1)
    own = sets.data.tokens_of(0).numpy()
    m, p = naive_log_odds(sets), sets.data.probs[5].numpy()

    def contrast(t: float) -> float:
        weights = p * np.exp(t * m)
        return float((weights @ (m * own)) / (weights @ own) - (weights @ (m * ~own)) / (weights @ ~own))

    for alpha in (-9.0, 0.3, 6.0):
        whole, _ = quad(contrast, 0, alpha, epsabs=1e-12)
        assert float(theory.concept_drift(sets, torch.tensor([alpha], dtype=F64))[5, 0, 0]) == pytest.approx(
            whole, abs=1e-9
        )


@laws
@given(any_steering)
def test_concepts_move_as_theorem_3_6_says(sets: theory.ContextSets) -> None:
    m = naive_log_odds(sets)
    unit = 1 / spread(sets)
    members = torch.nn.functional.one_hot(sets.data.concepts).double()
    logs = log_probs(sets, unit * torch.linspace(-20, 20, 81, dtype=F64))
    curves = (logs.exp() @ members).clamp(1e-300)
    odds = torch.stack(
        [
            logs[..., own].logsumexp(-1) - logs[..., ~own].logsumexp(-1)  # increases with the probability, never flat
            for own in members.T.bool()
        ],
        -1,
    )
    np.testing.assert_allclose(theory.concept_probs(sets, torch.tensor([2.0 * unit])),
                               log_probs(sets, torch.tensor([2.0 * unit])).exp() @ members, atol=1e-9)  # fmt: skip
    shapes = theory.concept_shapes(sets)
    assert [k for k, shape in enumerate(shapes) if shape == "increasing"] == [sets.target]
    for concept, shape in enumerate(shapes):
        own = sets.data.tokens_of(concept).numpy()
        if shape == "increasing":
            assert bool((odds[..., concept].diff(dim=1) > 0).all())
        elif shape == "decreasing":
            assert m[own].max() <= m[~own].min() + 1e-9
            assert bool((odds[..., concept].diff(dim=1) < 0).all())
        elif shape == "vanishing":
            short = min((m.max() - m[own]).min(), (m[own] - m.min()).min())
            assert short > 1e-9
            if short > 1e-3:
                ends = log_probs(sets, torch.tensor([-60 / short, 60 / short])).exp()[..., own]
                limit = -sets.data.probs[:, own].mean(1)
                increase = (ends - sets.data.probs[:, None, own]).mean(-1)
                np.testing.assert_allclose(increase, limit[:, None].expand(-1, 2), atol=1e-6)
        else:
            extremes = np.isclose(m, m.max(), atol=1e-9) | np.isclose(m, m.min(), atol=1e-9)
            assert bool((own & extremes).any()) and m[own].max() > m[~own].min()
    assert bool((curves > 0).all())


def test_a_concept_with_one_extreme_token_is_left_open() -> None:
    concepts = torch.tensor([0, 0, 1, 1, 2, 2])
    b = torch.tensor([0.05, 0.05, 0.001, 0.3, 0.05, 0.05], dtype=F64)
    data = theory.ConceptData.from_shares(b, torch.ones(6, dtype=F64), concepts, contexts_per_concept=2)
    sets = theory.ContextSets(data, 0, torch.tensor([0, 1]), torch.tensor([2, 4]))
    assert theory.concept_shapes(sets) == ["increasing", "undetermined", "vanishing"]


def test_the_target_s_curve_need_not_be_sigmoidal() -> None:
    """It increases, as proved; but with nearly tied log-odds it has three points of inflection, not one."""
    b = torch.tensor([0.4, 1e-9, 0.4, 0.1], dtype=F64)
    concepts, share = torch.tensor([0, 0, 1, 1]), torch.tensor([0.01, 0.99, 0.01, 0.99], dtype=F64)
    data = theory.ConceptData.from_shares(b, share, concepts, contexts_per_concept=2, length=1)
    curve = theory.concept_probs(data.sets(0, opposite=1), torch.linspace(-10, 10, 801, dtype=F64))[2, :, 0]
    assert bool((curve.diff() > -1e-15).all())
    bends = curve.diff().diff()
    signs = bends[bends.abs() > 1e-10].sign()
    assert int((signs.diff() != 0).sum()) == 3


# ---- theorem 3.8 ----


def naive_cross_entropy(sets: theory.ContextSets, alphas: torch.Tensor) -> torch.Tensor:
    logs, data = log_probs(sets, alphas), sets.data
    return torch.stack(
        [-sum(data.pi[j] * (data.probs[j] * logs[j, i]).sum() for j in range(len(data.pi))) for i in range(len(alphas))]
    )


@laws
@given(any_steering)
def test_cross_entropy_is_locally_the_parabola(sets: theory.ContextSets) -> None:
    unit = 1 / spread(sets)
    h = 1e-3 * unit
    alphas = torch.tensor([0.0, h, -h, 3 * unit, -8 * unit], dtype=F64)
    naive = naive_cross_entropy(sets, alphas)
    np.testing.assert_allclose(theory.cross_entropies(sets, alphas), naive - naive[0], atol=1e-10)
    assert float(naive[0]) == pytest.approx(sets.data.entropy, abs=1e-12)
    curvature = theory.cross_entropy_curvature(sets)
    second = (naive[1] + naive[2] - 2 * naive[0]) / h**2
    np.testing.assert_allclose(curvature * unit**2, second[None] * unit**2, atol=1e-6)
    assert float(curvature) > 0
    assert abs(float(naive[1] - naive[2]) / (2 * h)) * unit < 1e-6  # no slope
    # Not only locally: it is convex, so that steering costs cross-entropy at every alpha.
    everywhere = theory.cross_entropies(sets, unit * torch.linspace(-20, 20, 41, dtype=F64))
    assert bool((everywhere.diff().diff() > -1e-10).all()) and bool((everywhere > -1e-12).all())
    at = torch.tensor([3 * unit], dtype=F64)
    beside = naive_cross_entropy(sets, torch.tensor([3 * unit - h, 3 * unit, 3 * unit + h], dtype=F64))
    elsewhere = (beside[0] + beside[2] - 2 * beside[1]) / h**2
    np.testing.assert_allclose(theory.cross_entropy_curvature(sets, at) * unit**2, elsewhere[None] * unit**2, atol=1e-6)


def test_variance_of_log_odds_by_hand() -> None:
    """Two concepts of two tokens on the uniform instance: M = +-log 9 with probabilities 0.9 and 0.1."""
    sets = theory.ConceptData.smoothed(2, 2, eps=0.1).sets(0)
    assert float(theory.cross_entropy_curvature(sets)) == pytest.approx(4 * 0.9 * 0.1 * math.log(9) ** 2, abs=1e-12)
