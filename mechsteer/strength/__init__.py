"""How strong a push must be: curves over alpha, their laws, and the strength to use."""

from mechsteer.strength.choices import choice_curves, lettered_prompt
from mechsteer.strength.choose import ChosenAlpha, choose_alpha
from mechsteer.strength.completions import completion_curves
from mechsteer.strength.concepts import Concept, negatives_from, positives_from, shipped
from mechsteer.strength.cross_entropy import cross_entropy_curves
from mechsteer.strength.curves import concept_curves, token_curves
from mechsteer.strength.limits import ce_plateau, limit_curves, limit_logits
from mechsteer.strength.local_laws import local_laws
from mechsteer.strength.vectors import concept_vectors, resampled_vectors

__all__ = [
    "ChosenAlpha",
    "Concept",
    "ce_plateau",
    "choice_curves",
    "choose_alpha",
    "completion_curves",
    "concept_curves",
    "concept_vectors",
    "cross_entropy_curves",
    "lettered_prompt",
    "limit_curves",
    "limit_logits",
    "local_laws",
    "negatives_from",
    "positives_from",
    "resampled_vectors",
    "shipped",
    "token_curves",
]
