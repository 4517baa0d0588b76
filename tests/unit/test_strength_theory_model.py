"""The unconstrained features model: data of concepts, training to the entropy bound, steering three ways, figures."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer.strength.theory as theory
from mechsteer.errors import MechsteerError
from mechsteer.result import Result

F64 = torch.float64
ALPHAS = torch.linspace(-15, 15, 61, dtype=F64)
# The vocabulary of eq. 2: a b c | A B C | alpha beta gamma.
EQ_2 = torch.arange(3).repeat_interleave(3)


def varied(*, eps: float = 0.05, seed: int = 0, **options: Any) -> theory.ConceptData:
    gamma, omega = (0.5 + torch.rand(3, 3, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 50))
    return theory.ConceptData.varied(gamma, omega, eps=eps, **options)


def uneven() -> theory.ConceptData:
    """Concepts of 2, 4 and 3 tokens, contexts of unlike weights, a that depends on the context (appendix B.1)."""
    concepts = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    b = torch.tensor([0.02, 0.05, 0.01, 0.03, 0.02, 0.04, 0.06, 0.01, 0.01], dtype=F64)
    contexts = theory.data.random_contexts(concepts, per_concept=3, length=2, seed=4)
    shares = 0.2 + torch.rand(9, 9, generator=torch.Generator().manual_seed(1), dtype=F64)
    own = concepts[contexts[:, 0]][:, None] == concepts
    shares = shares * own / (shares * own).sum(1, keepdim=True)
    a = b + (1 - b.sum()) * shares
    weights = torch.arange(1, 10, dtype=F64) / 45
    return theory.ConceptData(a, b, concepts, contexts, weights)


# ---- data ----


def test_the_paper_s_instance_has_its_entropy() -> None:
    data = theory.ConceptData.smoothed(3, 3, eps=0.05)
    by_hand = -(0.95 * math.log(0.95 / 3) + 0.05 * math.log(0.05 / 6))
    assert data.entropy == pytest.approx(by_hand, abs=1e-12)
    assert math.floor(data.entropy * 1e4) / 1e4 == 1.3317  # 1.33178, cut and not rounded
    assert data.entropy < 1.3317 + 1e-4
    assert torch.equal(data.concepts, EQ_2) and data.contexts.shape == (12, 3)
    assert repr(data) == "ConceptData(9 tokens in 3 concepts, 12 contexts, entropy 1.33178 nats)"


@pytest.mark.parametrize("data", [varied(), varied(eps=0.3), uneven()])
def test_probabilities_follow_assumption_1(data: theory.ConceptData) -> None:
    np.testing.assert_allclose(data.probs.sum(1), 1, atol=1e-12)
    for j, context in enumerate(data.contexts.tolist()):
        (concept,) = {int(data.concepts[token]) for token in context}
        for z in range(len(data.b)):
            own = int(data.concepts[z]) == concept
            a = data.a[z] if data.a.ndim == 1 else data.a[j, z]
            assert float(data.probs[j, z]) == float(a if own else data.b[z])
            assert not own or 1 > float(data.probs[j, z]) > float(data.b[z]) > 0
    assert len({tuple(row) for row in data.contexts.tolist()}) == len(data.contexts)


def test_appendix_b3_shares_stay_within_their_concepts() -> None:
    gamma, omega = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 4.0]])
    data = theory.ConceptData.varied(gamma, omega, eps=0.1)
    np.testing.assert_allclose(data.a, [0.9 * 0.25, 0.9 * 0.75, 0.45, 0.45])
    np.testing.assert_allclose(data.b, [0.05, 0.05, 0.02, 0.08])


def test_pairs_are_counted() -> None:
    data = theory.ConceptData.smoothed(2, 2, eps=0.2, contexts_per_concept=2, length=2)
    counts = (data.probs * 20).round().long()
    pairs = [(j, z) for j in range(4) for z in range(4) for _ in range(int(counts[j, z]) * (j + 1))]
    contexts, tokens = data.contexts[[j for j, _ in pairs]], torch.tensor([z for _, z in pairs])
    read = theory.ConceptData.from_pairs(contexts, tokens, data.concepts)
    places = [data.contexts.tolist().index(row) for row in read.contexts.tolist()]
    np.testing.assert_allclose(read.probs, data.probs[places], atol=1e-12)
    np.testing.assert_allclose(read.pi, (torch.tensor(places) + 1) / 10, atol=1e-12)
    with pytest.raises(MechsteerError, match=r"after contexts of other concepts, token \d comes with probabilities up"):
        theory.ConceptData.from_pairs(contexts[:-1], tokens[:-1], data.concepts)


def test_sets_are_drawn_from_their_side() -> None:
    data = varied(contexts_per_concept=5)
    contrastive, random = data.sets(1, opposite=2, seed=3), data.sets(1, size=4, seed=3)
    assert set(data.context_concepts[contrastive.negative].tolist()) == {2} and len(contrastive.negative) == 5
    assert set(data.context_concepts[random.positive].tolist()) == {1} and len(random.positive) == 4
    drawn = torch.cat([data.context_concepts[data.sets(1, size=4, seed=seed).negative] for seed in range(9)])
    assert set(drawn.tolist()) == {0, 2}
    assert torch.equal(random.negative, data.sets(1, size=4, seed=3).negative)
    assert repr(random) == "ContextSets(target 1, 4 contexts each)"


def test_what_breaks_the_assumptions_is_refused() -> None:
    data = theory.ConceptData.smoothed(3, 3, eps=0.05)
    a, b, of, contexts = data.a, data.b, data.concepts, data.contexts
    make = theory.ConceptData
    cases = [
        (lambda: make(b, a, of, contexts), r"a=0.00833333 and b=0.316667 for token 0. Assumption 1 asks for 1 > a > b"),
        (lambda: make(a, b * 0.5, of, contexts), r"probabilities of sum 0.975 after context 0. They sum to 1 where"),
        (lambda: make(a.expand(5, 9), b, of, contexts), r"9 tokens in concepts, 12 contexts, a \[5, 9\], b \[9\] and"),
        (lambda: make(a, b, of, contexts, torch.ones(12)), r"weights from 1 with sum 12. Each context's weight is"),
        (lambda: make(a, b, of, torch.tensor([[0, 4]])), r"context 0 with tokens of concepts \[0, 1\]. The theory"),
        (lambda: make(a, b, of, torch.tensor([[0, 1], [0, 1]])), r"the same context twice. Pass each once"),
        (lambda: make(a, b, of, torch.tensor([[9]])), r"contexts with tokens 9 to 9, and there are 9 tokens"),
        (lambda: make(a, b, of, torch.zeros(1, 0, dtype=torch.long)), r"contexts of shape \[1, 0\]. It takes at least"),
        (lambda: make(a, b, of * 2, contexts), r"got concepts \[0, 2, 4\]. Tokens are numbered by concept 0, 1"),
        (lambda: make.smoothed(3, 3, eps=0.7), r"3 concepts of 3 tokens and eps=0.7. It takes at least two concepts"),
        (lambda: make.smoothed(1, 3, eps=0.1), r"1 concepts of 3 tokens and eps=0.1"),
        (lambda: make.smoothed(3, 2, eps=0.1, length=1), r"There are 2 contexts of length 1 from the 2 tokens of"),
        (lambda: make.from_shares(b * 20, b, of), r"got b of sum 1.5 and shares from 0.00833333. The sum of b is"),
        (lambda: data.sets(3), r"has no concept 3: it has 0 to 2"),
        (lambda: data.sets(0, opposite=0), r"got target=0 and opposite=0. Pick two concepts"),
        (lambda: data.sets(0, size=5), r"size=5, and there are 4 positive and 8 negative contexts. Take a size"),
        (lambda: sets([0], [4, 5]), r"got 1 positive and 2 negative contexts, 3 of them distinct. Both take the same"),
        (lambda: sets([0, 0], [4, 5]), r"got 2 positive and 2 negative contexts, 3 of them distinct"),
        (lambda: sets([0], [12]), r"got contexts 0 to 12, and there are 0 to 11"),
        (lambda: sets([4], [5]), r"got positive context 4, which does not belong to the target concept 0"),
        (lambda: sets([0], [1]), r"got negative context 1, which belongs to the target concept 0. Positive"),
    ]  # fmt: skip

    def sets(positive: list[int], negative: list[int]) -> theory.ContextSets:
        return theory.ContextSets(data, 0, torch.tensor(positive), torch.tensor(negative))

    for call, text in cases:
        with pytest.raises(MechsteerError, match=text):
            call()


# ---- the model ----


@pytest.mark.parametrize("momentum", [True, False])
def test_gradient_descent_reaches_the_entropy(momentum: bool) -> None:
    data = theory.ConceptData.smoothed(3, 3, eps=0.05)
    ufm = theory.UFM.train(data, momentum=momentum, progress=False)
    losses = ufm.losses
    assert losses is not None and float(losses[0]) > data.entropy + 0.1
    assert bool((losses.diff() <= 0).all())
    assert ufm.cross_entropy(data) <= 1.3317 + 1e-4
    assert ufm.cross_entropy(data) == pytest.approx(data.entropy, abs=1e-12)
    assert float(losses[-1]) == pytest.approx(ufm.cross_entropy(data), abs=1e-12)
    naive = -sum(
        float(pi) * float(p[z]) * math.log(math.exp(float(x[z])) / sum(math.exp(float(each)) for each in x))
        for pi, p, x in zip(data.pi, data.probs, ufm.logits, strict=True)
        for z in range(9)
    )
    assert ufm.cross_entropy(data) == pytest.approx(naive, abs=1e-12)
    assert ufm.error(data) < 1e-9
    assert torch.equal(theory.UFM.train(data, momentum=momentum, progress=False).W, ufm.W)
    assert not torch.equal(theory.UFM.train(data, momentum=momentum, seed=1, progress=False).W, ufm.W)


@pytest.mark.parametrize("data", [theory.ConceptData.smoothed(3, 3, eps=0.05), varied(eps=0.2), uneven()])
@pytest.mark.parametrize("opposite", [None, 2])
def test_three_ways_to_steer_agree(data: theory.ConceptData, opposite: int | None) -> None:
    sets = data.sets(0, opposite=opposite, size=2)
    closed = theory.steered_probs(sets, ALPHAS)
    for ufm in (theory.UFM.exact(data), theory.UFM.train(data, progress=False)):
        v = torch.stack([ufm.H[:, j] for j in sets.positive.tolist()]).sum(0) / 2
        v = v - torch.stack([ufm.H[:, j] for j in sets.negative.tolist()]).sum(0) / 2
        moved = torch.stack([torch.stack([ufm.W @ (h + alpha * v) for alpha in ALPHAS]) for h in ufm.H.T])
        np.testing.assert_allclose(ufm.steered_logits(ufm.steering_vector(sets), ALPHAS), moved, atol=1e-9)
        np.testing.assert_allclose(moved.softmax(-1), closed, atol=1e-6)  # definition against lemma B.3
        shifted = theory.shifted_logits(ufm.logits, sets, ALPHAS).softmax(-1)
        np.testing.assert_allclose(shifted, closed, atol=1e-6)  # lemma B.2 against lemma B.3
    assert float((closed - data.probs[:, None]).abs().max()) > 0.3  # it moves


def test_the_exact_model_takes_the_least_dimensions() -> None:
    even, other = theory.ConceptData.smoothed(4, 3, eps=0.1), varied()
    assert (theory.least_d_model(even), theory.least_d_model(other)) == (3, 3)
    assert theory.UFM.exact(even).error(even) < 1e-14 and theory.UFM.exact(even, d_model=7).error(even) < 1e-14
    assert repr(theory.UFM.exact(even)) == "UFM(12 tokens, 16 contexts, d_model 3)"
    for build in (theory.UFM.exact, theory.UFM.train):
        with pytest.raises(MechsteerError, match=r"UFM got d_model=2, and these data take 3 for assumption 2"):
            build(even, d_model=2)
    # At the least number, descent still gets there; with one dimension fewer nothing could.
    tight = theory.UFM.train(even, d_model=3, progress=False)
    assert tight.W.shape == (12, 3) and tight.error(even) < 1e-9


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(MechsteerError, match=r"UFM.train is \S+ off after 5 steps, and tolerance=1e-09 was asked for"):
        theory.UFM.train(varied(), max_steps=5, progress=False)


# ---- curves as Results ----


def test_figures_hold_the_definitions() -> None:
    data = varied(eps=0.2)
    sets = data.sets(0, opposite=1)
    ufm = theory.UFM.exact(data)
    v = ufm.steering_vector(sets)
    start = ufm.probs[5]
    steered = torch.stack([(ufm.W @ (ufm.H[:, 5] + alpha * v)).softmax(0) for alpha in ALPHAS])
    for model in (None, ufm):
        tokens = theory.probability_increase(sets, ALPHAS.tolist(), context=5, ufm=model)
        np.testing.assert_allclose(tokens["increase"], steered - start, atol=1e-12)
        concepts = theory.concept_increase(sets, ALPHAS, context=5, ufm=model)
        means = torch.stack([(steered - start)[:, data.concepts == k].mean(1) for k in range(3)], 1)
        np.testing.assert_allclose(concepts["increase"], means, atol=1e-12)
        loss = theory.cross_entropy_increase(sets, ALPHAS, ufm=model).sel(curve="exact")
        all_steered = ufm.steered_logits(v, ALPHAS).log_softmax(-1)
        naive = -(data.pi[:, None, None] * data.probs[:, None] * all_steered).sum((0, 2)) - data.entropy
        np.testing.assert_allclose(loss["increase"], naive, atol=1e-10)
    assert tokens["role"].values.tolist() == ["target"] * 3 + ["off-target"] * 6
    assert tokens["increase"].dims == ("alpha", "token") and concepts["increase"].dims == ("alpha", "concept")
    np.testing.assert_array_equal(tokens["peak"], theory.peaks(sets)[5])
    assert concepts["shape"].values.tolist() == ["increasing", "decreasing", "vanishing"]
    quadratic = theory.cross_entropy_increase(sets, ALPHAS).sel(curve="quadratic")["increase"]
    np.testing.assert_allclose(quadratic, float(theory.cross_entropy_curvature(sets)) / 2 * ALPHAS**2)


def test_figures_are_drawn_and_saved(tmp_path: Any) -> None:
    sets = varied().sets(0, opposite=1)
    tokens = theory.probability_increase(sets, ALPHAS, context=5)
    figure = tokens.plot(colour="role")
    assert len(figure.data) == 9 and len({trace.line.color for trace in figure.data}) == 2
    assert figure.layout.xaxis.title.text == "steering strength α"
    np.testing.assert_allclose(figure.data[4].y, tokens["increase"][:, 4])
    loss = theory.cross_entropy_increase(sets, ALPHAS)
    assert loss.plot().layout.yaxis.title.text == "cross-entropy increase [nats]"
    assert len(theory.concept_increase(sets, ALPHAS, context=0).plot().data) == 3
    tokens.save(tmp_path / "tokens.safetensors")
    again = Result.load(tmp_path / "tokens.safetensors")
    assert again["shape"].values.tolist() == tokens["shape"].values.tolist()
    with pytest.raises(MechsteerError, match=r"There is no context 12: they are 0 to 11"):
        theory.concept_increase(sets, ALPHAS, context=12)
