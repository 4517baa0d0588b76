"""SAE features: which ones a push moves, and whether they are why it works."""

from mechsteer.features.causes import activation_and_behaviour, agreement, mediation
from mechsteer.features.directions import feature_direction
from mechsteer.features.ranking import rank_by_attribution, rank_by_contrast, rank_by_similarity

__all__ = [
    "activation_and_behaviour",
    "agreement",
    "feature_direction",
    "mediation",
    "rank_by_attribution",
    "rank_by_contrast",
    "rank_by_similarity",
]
