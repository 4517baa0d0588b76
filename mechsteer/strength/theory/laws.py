"""The laws of steering strength: bumps and their peaks, limits, concept curves, cross-entropy.

Taimeskhanov, Vaiter and Garreau 2026, section 3 and appendix B. They hold for data of assumption 1 and a model that has
learnt them perfectly (assumption 2).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.strength.theory.data import ContextSets
from mechsteer.strength.theory.steering import (
    extreme_tokens,
    log_odds,
    steered_probs,
    variance_of_log_odds,
)

Shape = Literal["bump", "increasing", "decreasing"]
ConceptShape = Literal["increasing", "decreasing", "vanishing", "undetermined"]
# Doublings and halvings of the search for peaks: more than the digits of a number in fp64.
_DOUBLINGS, _HALVINGS = 1000, 120
# Nodes of the quadrature on each piece.
_NODES = 12


def peaks(sets: ContextSets) -> Float[Tensor, "context token"]:
    """alpha_(j,z), where p(z | c_j, alpha) is largest: the root of E[M(Z)] = M(z) (theorem 3.3, appendix B.3).

    +inf for tokens of the largest log-odds, whose probability only grows, and -inf for those of the smallest. Found by
    doubling and bisection, because E[M(Z)] grows with alpha (eq. 10).
    """
    m = log_odds(sets)
    top, bottom = extreme_tokens(sets)
    inner = (~top & ~bottom).nonzero()[:, 0]
    logs = sets.data.probs.log()[:, None]

    def past(alphas: Tensor) -> Tensor:
        # E[M(Z)] - M(z) in one sum, whose sign is right also where E[M(Z)] rounds to M(z).
        probs = (logs + alphas[..., None] * m).softmax(-1)
        return (probs * (m - m[inner, None])).sum(-1) > 0

    low = torch.full((len(sets.data.contexts), len(inner)), -1.0, dtype=torch.float64)
    high = -low
    for _ in range(_DOUBLINGS):
        above, below = ~past(high), past(low)
        if not bool(above.any() | below.any()):
            break
        low, high = torch.where(below, 2 * low, low), torch.where(above, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        after = past(middle)
        low, high = torch.where(after, low, middle), torch.where(after, middle, high)
    found = torch.where(top, torch.inf, -torch.inf).double().expand(len(low), -1).clone()
    found[:, inner] = (low + high) / 2
    return found


def token_shapes(sets: ContextSets) -> list[Shape]:
    """How each token's probability runs over all alpha, in every context (theorem 3.3).

    A bump is strictly increasing up to its peak and decreasing behind it. Tokens of the largest log-odds increase and
    are target tokens; those of the smallest decrease and are none; all others have a bump. On the instance of appendix
    B.1 *all* target tokens tie for the largest, so no target token has a bump: figure 3 needs data that vary within a
    concept.
    """
    top, bottom = extreme_tokens(sets)
    return ["increasing" if up else "decreasing" if down else "bump" for up, down in zip(top, bottom, strict=True)]


def probability_limits(sets: ContextSets, *, sign: int) -> Float[Tensor, "context token"]:
    """Limits of Delta p(z | c_j, alpha) for alpha -> +inf (`sign` 1) or -inf (-1) (proposition B.1, eq. 5).

    All mass goes to the tokens of the largest (smallest) log-odds, shared in the proportions of p(z | c_j). Eqs. 8 and
    9 of the paper's proof write the probability lost as a_z for every z if c_j is of the target concept, and as b_z
    otherwise. That is right for target tokens only: for the others it is p(z | c_j) of eq. 5, which is b_z where c_j
    is of the target concept and a_z where c_j is of z's own.

    Raises:
        MechsteerError: `sign` is neither.
    """
    if sign not in (1, -1):
        raise MechsteerError(f"probability_limits got sign={sign!r}. It is 1 for alpha -> +inf, and -1 for -inf.")
    left = extreme_tokens(sets)[0 if sign == 1 else 1]
    probs = sets.data.probs
    kept = torch.where(left, probs, 0.0)
    return kept / kept.sum(1, keepdim=True) - probs


def target_lead(sets: ContextSets) -> Float[Tensor, " context"]:
    """Smallest log-odds of a target token minus E[M(Z)] without steering (eq. 11).

    Positive if and only if **all** target tokens peak at a positive alpha in this context (remark 3.4).

    The remark as printed ("the bump pattern for tokens of T occurs only for positive steering strength") holds under
    two conditions that only its proof names: the context is **not** of the target concept, and eps is **small
    enough** (see `target_lead_bound`). In a context of the target concept E[M(Z)] tends, as eps goes to 0, to a mean of
    the target tokens' log-odds, which is above the smallest of them: so there the remark fails for every small eps,
    unless they are all equal and no target token has a bump. Where eps is large it fails in other contexts as well.
    """
    m = log_odds(sets)
    return m[sets.data.tokens_of(sets.target)].min() - sets.data.probs @ m


def target_lead_bound(sets: ContextSets) -> float:
    """A lower bound of `target_lead` in all contexts outside the target concept (F(eps) of appendix B.3).

    min over T of M(z) - beta log(rho / beta), with beta and rho the sums of b and a over T. It holds for all data of
    assumption 1, not only those of appendix B.3. Remark 3.4 follows where it is positive, which is so for eps small
    enough.

    Raises:
        MechsteerError: a depends on the context.
    """
    data, inside = sets.data, sets.data.tokens_of(sets.target)
    if data.a.ndim != 1:
        raise MechsteerError("target_lead_bound takes data whose a does not depend on the context; see appendix B.3.")
    beta, rho = data.b[inside].sum(), data.a[inside].sum()
    return float(log_odds(sets)[inside].min() - beta * (rho / beta).log())


def concept_probs(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha concept"]:
    """F_(C,j)(alpha), the steered probability of any of a concept's tokens (appendix B.4)."""
    members = torch.nn.functional.one_hot(sets.data.concepts).double()
    return steered_probs(sets, alphas) @ members


def concept_drift(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha concept"]:
    """nu_j(alpha), the integral from 0 to alpha of E[M(Z) | Z in C] - E[M(Z) | Z not in C] (appendix B.4).

    By Gauss-Legendre quadrature on pieces of a width of at most 1 / (max M - min M). Sums of positive p e^(alpha M)
    have no zero within pi / (max M - min M) of the real line, so the integrand is analytic there, and 12 nodes a piece
    leave nothing but rounding.
    """
    m = log_odds(sets)
    alphas = alphas.double()
    span = float(m.max() - m.min())
    ends = torch.cat([alphas, torch.zeros(1, dtype=torch.float64)]).unique()
    pieces = max(int((ends.diff() * span).max().ceil()), 1) if len(ends) > 1 else 1
    steps = torch.arange(pieces, dtype=torch.float64) / pieces
    starts = ends[:-1, None] + ends.diff()[:, None] * steps  # [gap, piece]
    widths = ends.diff()[:, None] / pieces
    nodes, weights = _gauss_legendre(_NODES)
    at = starts[..., None] + widths[..., None] * nodes  # [gap, piece, node]
    values = _concept_contrast(sets, at.flatten()).unflatten(1, at.shape)  # [context, gap, piece, node, concept]
    gaps = torch.einsum("cgpnk,n,gp->cgk", values, weights, widths.expand(-1, pieces))
    whole = torch.nn.functional.pad(gaps.cumsum(1), (0, 0, 1, 0))  # the integral from the first end on
    at_zero = int((ends == 0).nonzero()[0, 0])
    return (whole - whole[:, at_zero, None])[:, torch.searchsorted(ends, alphas)]


def concept_increase_tanh(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha concept"]:
    """Delta p(C | c_j, alpha) = (tanh((nu_j(alpha) + r_j) / 2) - r'_j) / (2 |C|) (theorem 3.6).

    r_j is the logit of the concept's probability without steering, and r'_j = tanh(r_j / 2) (appendix B.4).

    nu_j is not linear in alpha, and so the theorem proves a curve that increases (for the target concept), not one of
    sigmoidal shape as its discussion says: with nearly tied log-odds around 0 it can have several points of inflection.
    Nor does a concept without extreme tokens "converge back to its unsteered value": by the theorem's own limit its
    probability goes to 0 at both ends.
    """
    r = concept_probs(sets, torch.zeros(1)).logit()
    sizes = torch.bincount(sets.data.concepts)
    return (((concept_drift(sets, alphas) + r) / 2).tanh() - (r / 2).tanh()) / (2 * sizes)


def concept_shapes(sets: ContextSets) -> list[ConceptShape]:
    """What theorem 3.6 says about each concept's curve, in every context.

    "increasing" for the target concept; "decreasing" where all log-odds of the concept are at most all others;
    "vanishing" where the concept has no token of extreme log-odds, so that its probability goes to 0 at both ends;
    "undetermined" where the theorem is silent.
    """
    m = log_odds(sets)
    top, bottom = extreme_tokens(sets)
    shapes: list[ConceptShape] = []
    for concept in range(sets.data.n_concepts):
        own = sets.data.tokens_of(concept)
        if concept == sets.target:
            shapes.append("increasing")
        elif bool(m[own].max() <= m[~own].min()):
            shapes.append("decreasing")
        else:
            shapes.append("undetermined" if bool((own & (top | bottom)).any()) else "vanishing")
    return shapes


def cross_entropies(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, " alpha"]:
    """Delta CE(alpha) in nats: cross-entropy on the training data, steered minus unsteered (definition 3.7).

    -alpha times the mean of M(Z) plus the mean of the log of sum p e^(alpha M): convex, 0 at 0, and so at least 0 at
    every alpha. Without normalisation it has no plateau: it grows like |alpha| (M_max - mean of M), or with M_min.
    """
    m, probs, pi = log_odds(sets), sets.data.probs, sets.data.pi
    alphas = alphas.double()
    normaliser = (probs.log()[:, None] + alphas[:, None] * m).logsumexp(-1)
    return pi @ (normaliser - alphas * (probs @ m)[:, None])


def cross_entropy_curvature(
    sets: ContextSets, alphas: Float[Tensor, " alpha"] | None = None
) -> Float[Tensor, " alpha"]:
    """Second derivative of Delta CE at alpha = 0 (None) or elsewhere: the mean of Var_j[M(Z)] (theorem 3.8).

    Delta CE(alpha) = alpha^2 / 2 times this at 0, and o(alpha^2); the slope at 0 is 0. Rests on assumption 2 alone: a
    model that has not learnt the data perfectly has a slope.
    """
    return sets.data.pi @ variance_of_log_odds(sets, torch.zeros(1) if alphas is None else alphas)


def _concept_contrast(sets: ContextSets, alphas: Tensor) -> Tensor:
    """E[M(Z) | Z in C] - E[M(Z) | Z not in C] [context, alpha, concept]."""
    m = log_odds(sets)
    exponents = sets.data.probs.log()[:, None] + alphas[:, None] * m
    contrasts = []
    for concept in range(sets.data.n_concepts):
        own = sets.data.tokens_of(concept)
        # A softmax of its own for each side: a side's share of the whole may be too small for fp64.
        inside, outside = exponents[..., own].softmax(-1) @ m[own], exponents[..., ~own].softmax(-1) @ m[~own]
        contrasts.append(inside - outside)
    return torch.stack(contrasts, -1)


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
