"""The theory's curves over alpha as Results, which `.plot()` draws as the paper's figures 3, 4, 5 and B.1.

Taimeskhanov, Vaiter and Garreau 2026, definitions 3.1, 3.5 and 3.7.
"""

from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.result import Result, provenance
from mechsteer.strength.theory.data import ContextSets
from mechsteer.strength.theory.laws import (
    concept_shapes,
    cross_entropies,
    cross_entropy_curvature,
    peaks,
    token_shapes,
)
from mechsteer.strength.theory.steering import log_odds, steered_probs
from mechsteer.strength.theory.ufm import UFM

_Alphas = Sequence[float] | Float[Tensor, " alpha"]


def probability_increase(sets: ContextSets, alphas: _Alphas, *, context: int, ufm: UFM | None = None) -> Result:
    """Delta p(z | c_j, alpha) of every token after one context (definition 3.1; figures 3 and B.1).

        probability_increase(sets, torch.linspace(0, 6, 241), context=5).plot(colour="role")

    Args:
        sets: what the steering vector is made of.
        alphas: steering strengths.
        context: j, index of the context.
        ufm: the model to steer; None takes the closed form (lemma B.3).

    Returns:
        `increase` [alpha, token], with coordinates of each token: `concept`, `role` ("target" or "off-target"), `shape`
        ("bump", "increasing" or "decreasing", theorem 3.3), `log_odds` (definition 3.2) and `peak` (alpha_(j,z), which
        may be infinite).

    Raises:
        MechsteerError: there is no such context.
    """
    grid = _grid(sets, alphas, context)
    increase = (_probs(sets, grid, ufm) - _probs(sets, torch.zeros(1), ufm))[context]
    inside = sets.data.tokens_of(sets.target).tolist()
    along = {
        "concept": sets.data.concepts.numpy(),
        "role": ["target" if own else "off-target" for own in inside],
        "shape": token_shapes(sets),
        "log_odds": log_odds(sets).numpy(),
        "peak": peaks(sets)[context].numpy(),
    }
    return _result("token", increase, along, grid, "probability increase", context)


def concept_increase(sets: ContextSets, alphas: _Alphas, *, context: int, ufm: UFM | None = None) -> Result:
    """Delta p(C | c_j, alpha) of every concept, the mean over its tokens (definition 3.5; figure 4).

    Args:
        sets: as in `probability_increase`.
        alphas: as in `probability_increase`.
        context: as in `probability_increase`.
        ufm: as in `probability_increase`.

    Returns:
        `increase` [alpha, concept], with coordinates `role` and `shape` (theorem 3.6; see `concept_shapes`).

    Raises:
        MechsteerError: there is no such context.
    """
    grid = _grid(sets, alphas, context)
    members = torch.nn.functional.one_hot(sets.data.concepts).double()
    increase = (_probs(sets, grid, ufm) - _probs(sets, torch.zeros(1), ufm))[context] @ (members / members.sum(0))
    roles = ["target" if concept == sets.target else "off-target" for concept in range(sets.data.n_concepts)]
    along = {"role": roles, "shape": concept_shapes(sets)}
    return _result("concept", increase, along, grid, "mean probability increase", context)


def cross_entropy_increase(sets: ContextSets, alphas: _Alphas, *, ufm: UFM | None = None) -> Result:
    """Delta CE(alpha) on the training data, beside the parabola of theorem 3.8 (definition 3.7; figure 5).

    Args:
        sets: as in `probability_increase`.
        alphas: as in `probability_increase`.
        ufm: as in `probability_increase`.

    Returns:
        `increase` [alpha, curve] in nats, curve "exact" or "quadratic".
    """
    grid = _grid(sets, alphas, 0)
    if ufm is None:
        exact = cross_entropies(sets, grid)
    else:
        data, logs = sets.data, ufm.steered_logits(ufm.steering_vector(sets), grid).log_softmax(-1)
        exact = -(data.pi @ (data.probs[:, None] * logs).sum(-1)) - ufm.cross_entropy(data)
    both = torch.stack([exact, cross_entropy_curvature(sets) / 2 * grid.square()], 1)
    return _result("curve", both, {}, grid, "cross-entropy increase", None, units="nats", names=["exact", "quadratic"])


def _grid(sets: ContextSets, alphas: _Alphas, context: int) -> Tensor:
    if not 0 <= context < len(sets.data.contexts):
        raise MechsteerError(f"There is no context {context}: they are 0 to {len(sets.data.contexts) - 1}.")
    return torch.as_tensor(alphas, dtype=torch.float64)


def _probs(sets: ContextSets, alphas: Tensor, ufm: UFM | None) -> Tensor:
    """Steered probabilities [context, alpha, token], of the model or in closed form."""
    if ufm is None:
        return steered_probs(sets, alphas)
    return ufm.steered_logits(ufm.steering_vector(sets), alphas).softmax(-1)


def _result(
    dim: str,
    increase: Tensor,
    along: dict,
    alphas: Tensor,
    long_name: str,
    context: int | None,
    *,
    units: str | None = None,
    names: list[str] | None = None,
) -> Result:
    attrs = {"long_name": long_name} | ({"units": units} if units else {})
    coords = {"alpha": ("alpha", alphas.numpy(), {"long_name": "steering strength α"})}
    coords |= {dim: (dim, names or list(range(increase.shape[1])))}
    coords |= {name: (dim, values) for name, values in along.items()}
    data = xr.Dataset({"increase": (("alpha", dim), increase.numpy(), attrs)}, coords)
    return Result(data, provenance=provenance(theory="unconstrained features model", context=context))
