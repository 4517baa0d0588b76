"""How a push travels: the Jacobian between sites, the logit gap at the embeddings, and the rank of a behaviour."""

from mechsteer.propagator.activation_rows import paired_differences, prompt_gradients, token_rows, whitened
from mechsteer.propagator.dyson import dyson
from mechsteer.propagator.flow import position_flow
from mechsteer.propagator.gap import gap_gradient, linear_prediction, nearest_tokens
from mechsteer.propagator.identity import identity_pairs, identity_share
from mechsteer.propagator.linearity import linear_regime
from mechsteer.propagator.operator import Propagator
from mechsteer.propagator.prompt_vector import prompt_vector, replacement_loss, tokens_like
from mechsteer.propagator.rank import least_rank, principal, rank_test, spectrum
from mechsteer.propagator.token_search import search_tokens
from mechsteer.propagator.weight_edit import RankEdit, fit_edit

__all__ = [
    "Propagator",
    "RankEdit",
    "dyson",
    "fit_edit",
    "gap_gradient",
    "identity_pairs",
    "identity_share",
    "least_rank",
    "linear_prediction",
    "linear_regime",
    "nearest_tokens",
    "paired_differences",
    "position_flow",
    "principal",
    "prompt_gradients",
    "prompt_vector",
    "rank_test",
    "replacement_loss",
    "search_tokens",
    "spectrum",
    "token_rows",
    "tokens_like",
    "whitened",
]
