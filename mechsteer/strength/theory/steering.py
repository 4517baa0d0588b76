"""Steered probabilities in closed form, and the log-odds that govern them.

Taimeskhanov, Vaiter and Garreau 2026, definition 3.2 and appendix B.2. All in fp64; log-odds and alpha are without unit
(nats per alpha).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.strength.theory.data import ContextSets

# Log-odds this close, relative to the largest, count as equal: sums in another order differ by less.
_TIES = 1e-11


def log_odds(sets: ContextSets) -> Float[Tensor, " token"]:
    """M(z), the mean over P minus the mean over N of log p(z | c) (definition 3.2).

    Where a does not depend on the context, M(z) = log(a_z / b_z) within the target concept and -(q_z / q) log(a_z /
    b_z) outside it, with q_z how many contexts of N share z's concept (lemma B.4): so M(z) > 0 if and only if z is a
    target token. The same sign holds where a depends on the context and b does not (appendix B.1).
    """
    logs = sets.data.probs.log()
    return logs[sets.positive].mean(0) - logs[sets.negative].mean(0)


def extreme_tokens(sets: ContextSets) -> tuple[Bool[Tensor, " token"], Bool[Tensor, " token"]]:
    """Which tokens attain the largest log-odds and which the smallest: M-bar and M-underbar (definition 3.2)."""
    m = log_odds(sets)
    near = _TIES * float(m.abs().max())
    return m >= m.max() - near, m <= m.min() + near


def shifted_logits(
    logits: Float[Tensor, "context token"], sets: ContextSets, alphas: Float[Tensor, " alpha"]
) -> Float[Tensor, "context alpha token"]:
    """Steered logits from unsteered ones alone: l_j + alpha / q (sum over P of l - sum over N of l) (lemma B.2)."""
    shift = (logits[sets.positive].sum(0) - logits[sets.negative].sum(0)) / len(sets.positive)
    return logits[:, None] + alphas.double()[:, None] * shift


def steered_probs(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha token"]:
    """sigma_z(f_alpha(c_j)) = p(z | c_j) e^(alpha M(z)) / sum over z' of the same (lemma B.3).

    In the contrastive setting, and where a does not depend on the context, alpha = 1 turns the probabilities after a
    context of the opposite concept into those after one of the target concept, since M(z) is the log of their ratio.
    """
    exponents = sets.data.probs.log()[:, None] + alphas.double()[:, None] * log_odds(sets)
    return exponents.softmax(-1)


def mean_log_odds(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha"]:
    """E[M(Z)] of the steered model's next token Z; its slope in alpha is Var[M(Z)] > 0 (eq. 10)."""
    return steered_probs(sets, alphas) @ log_odds(sets)


def variance_of_log_odds(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha"]:
    """Var[M(Z)] of the steered model's next token Z (eq. 10)."""
    probs, m = steered_probs(sets, alphas), log_odds(sets)
    off = m - (probs @ m)[..., None]
    return (probs * off.square()).sum(-1)


def probability_slope(sets: ContextSets, alphas: Float[Tensor, " alpha"]) -> Float[Tensor, "context alpha token"]:
    """Slope of Delta p(z | c_j, alpha) in alpha: sigma_z (M(z) - E[M(Z)]) (lemma B.5)."""
    probs = steered_probs(sets, alphas)
    return probs * (log_odds(sets) - mean_log_odds(sets, alphas)[..., None])
