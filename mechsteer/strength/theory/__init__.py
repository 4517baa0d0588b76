"""How strong, on paper: the unconstrained features model, in which every law of steering strength can be checked.

    data = ConceptData.smoothed(3, 3, eps=0.05)         # three concepts of three tokens
    sets = data.sets(target=0, opposite=1)              # contexts of a difference of means
    ufm = UFM.train(data)
    peaks(sets)                                         # alpha of the highest probability of every context and token
    probability_increase(sets, [0, 1, 2], context=5, ufm=ufm).plot()

Taimeskhanov, Vaiter and Garreau 2026, "Towards Understanding Steering Strength".
"""

from mechsteer.strength.theory.curves import concept_increase, cross_entropy_increase, probability_increase
from mechsteer.strength.theory.data import ConceptData, ContextSets
from mechsteer.strength.theory.laws import (
    concept_drift,
    concept_increase_tanh,
    concept_probs,
    concept_shapes,
    cross_entropies,
    cross_entropy_curvature,
    peaks,
    probability_limits,
    target_lead,
    target_lead_bound,
    token_shapes,
)
from mechsteer.strength.theory.steering import (
    extreme_tokens,
    log_odds,
    mean_log_odds,
    probability_slope,
    shifted_logits,
    steered_probs,
    variance_of_log_odds,
)
from mechsteer.strength.theory.ufm import UFM, least_d_model

__all__ = [
    "UFM",
    "ConceptData",
    "ContextSets",
    "concept_drift",
    "concept_increase",
    "concept_increase_tanh",
    "concept_probs",
    "concept_shapes",
    "cross_entropies",
    "cross_entropy_curvature",
    "cross_entropy_increase",
    "extreme_tokens",
    "least_d_model",
    "log_odds",
    "mean_log_odds",
    "peaks",
    "probability_increase",
    "probability_limits",
    "probability_slope",
    "shifted_logits",
    "steered_probs",
    "target_lead",
    "target_lead_bound",
    "token_shapes",
    "variance_of_log_odds",
]
