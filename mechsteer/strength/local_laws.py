"""What steering does for small and for infinite strength, from one forward pass each: cheap, and exact."""

import time
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import check
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import predicting
from mechsteer.precision import precise, wide
from mechsteer.progress import bar
from mechsteer.prompts import ROLES, Prompts
from mechsteer.result import Result, provenance
from mechsteer.rows import At, of_like_lengths, tokens_of
from mechsteer.run import Run
from mechsteer.strength.curves import Directions, named_directions, steered
from mechsteer.strength.vectors import labels_of

# Tokens of a pass, whose logits are kept together with their derivatives.
_TOKENS = {"cpu": 2048, "cuda": 16384}


def local_laws(
    model: Model,
    directions: Directions,
    prompts: PromptsLike,
    *,
    objective: Objective | None = None,
    where: str = "all",
    at: At = "all",
    progress: bool = True,
) -> Result:
    """Slope, curvature and scale of steering with `alpha * v` around alpha = 0, exact, from one pass a direction.

    The pass is in forward mode: along with every logit z it gives z' = dz / dalpha, the logits' Jacobian times v. The
    Fisher form v^T F v of document C's Theorem 3.8 is then the variance of z' under the model's own predictions:

        KL(alpha) = v^T F v alpha^2 / 2 + o(alpha^2),        v^T F v = mean_t Var_{z ~ p_t}[z'_t]

    which is also the curvature of the cross entropy of text that the model itself would write; on other text the cross
    entropy has a slope too, which `objective=TeacherForcedCE(...)` gives.

    Args:
        model: what to run.
        directions: one vector each, at sites of the model; names are the mapping's keys, else the site.
        prompts: what to run it on.
        objective: whose slope is asked for; None for none.
        where: at which tokens predictions are compared: "decision", "all", or those that predict a span of `ROLES`.
        at: which tokens are steered: "all", "last" before any completion, or as `Add` takes it.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result with, by [direction, prompt],
        - `kl_curvature`: v^T F v, in nats per alpha^2;
        - `scale`: mean_t |x_t| / |v| over the steered tokens, the alpha at which the push is as long as what it is
          added to. Norms divide that length out, so that far beyond it nothing changes any more (Proposition 4.1);
        - with an objective, `value` at alpha = 0 and `slope`, its derivative there (NaN where it has none, because it
          goes through something that cannot be differentiated).
        `provenance["options"]` counts what was run: `forward_passes` of a prompt, and `tokens`; a pass with its
        derivative counts as two.

    Raises:
        MechsteerError: a direction is zero, holds several vectors or belongs elsewhere, `where` has no such name, or a
            prompt has no such token.
    """
    began = time.perf_counter()
    named = nonzero_directions(directions)
    right = model.prompts(prompts).padded("right")
    model.check_slots(right, ())
    if where not in ("decision", "all", *ROLES):
        raise MechsteerError(f"where={where!r} is no set of tokens. Pass 'decision', 'all', or one of {list(ROLES)}.")
    if objective is not None and objective.n_examples not in (None, len(right)):
        raise MechsteerError(
            f"The objective holds values for {objective.n_examples} prompts, and {len(right)} were passed. "
            "Make it from the same prompts."
        )
    steer = steered(at)
    check([Add(direction, 0.0, at=steer) for direction in named.values()], model, right)
    compared = _compared(right, where)
    names = ["kl_curvature", "scale", *(["value", "slope"] if objective else [])]
    values = {name: np.full((len(named), len(right)), np.nan) for name in names}
    with bar("laws", len(named) * len(right), show=progress) as shown:
        for place, direction in enumerate(named.values()):
            for index in of_like_lengths(right.lengths, _TOKENS.get(model.device.type, _TOKENS["cuda"])):
                found = _laws_of(model, direction, right[index].padded("right"), index, objective, where, steer)
                for name, each in found.items():
                    values[name][place, index.numpy()] = each.double().cpu().numpy()
                shown.advance(len(index))
    about = {
        "kl_curvature": {"long_name": "curvature of KL, v^T F v", "units": "nats / alpha^2"},
        "scale": {"long_name": "length of the stream over that of the vector", "units": "alpha"},
        "value": {"long_name": f"{objective.name if objective else ''} at alpha = 0"},
        "slope": {"long_name": f"slope of {objective.name if objective else ''} at alpha = 0", "units": "1 / alpha"},
    }
    arrays = {name: (("direction", "prompt"), array, about[name]) for name, array in values.items()}
    data = xr.Dataset(arrays, {"direction": list(named), "prompt": list(right.labels) or np.arange(len(right))})
    data = data.assign_coords(labels_of(list(named.values())))
    work = {
        "forward_passes": 2 * len(named) * len(right),
        "tokens": 2 * len(named) * int(right.lengths.sum()),
        "where": where,
        "tokens_compared": int(compared.sum()),
        "at": list(at) if isinstance(at, tuple) else at,
    }
    return Result(data, provenance=provenance(model=model.id, seconds=time.perf_counter() - began, **work))


def nonzero_directions(directions: Directions) -> dict[str, Direction]:
    """Directions by name.

    Raises:
        MechsteerError: there are none, or one is zero or holds several vectors.
    """
    named = named_directions(directions)
    for name, each in named.items():
        if not bool(each.vector.any()):
            raise MechsteerError(f"Direction {name!r} is zero: no strength of it does anything. Make it anew.")
    return named


def _laws_of(
    model: Model,
    direction: Direction,
    part: Prompts,
    index: Int[Tensor, " batch"],
    objective: Objective | None,
    where: str,
    at: At,
) -> dict[str, Tensor]:
    """The laws of some of the prompts; `index` says which they are."""
    compared = _compared(part, where)
    reads = None if objective is None else objective.reads(part)
    read = compared if reads is None else compared | reads
    record = [direction.site.point, *(() if objective is None else objective.sites())]
    found: dict[str, Tensor] = {}
    with torch.no_grad(), forward_ad.dual_level():
        zero = torch.zeros(len(part), dtype=wide(model.dtype), device=model.device)
        alpha = forward_ad.make_dual(zero, torch.ones_like(zero))
        run = model.run(part, [Add(direction, alpha, at=at)], record, logits=read)
        run = replace(run, example=index.to(run.example.device))
        if objective is not None:
            dual = forward_ad.unpack_dual(objective(run))
            found["value"] = dual.primal
            # No tangent: it does not depend on the logits in a way that PyTorch can follow.
            found["slope"] = torch.full_like(zero, torch.nan) if dual.tangent is None else dual.tangent
        logits, moved = forward_ad.unpack_dual(run.logits_at(compared))
        found["kl_curvature"] = _token_mean(_variance(logits, moved), compared)
        found["scale"] = _scale(run, direction, at)
    return found


def _variance(
    logits: Float[Tensor, "row d_vocab"], moved: Float[Tensor, "row d_vocab"] | None
) -> Float[Tensor, " row"]:
    """Var_{z ~ softmax(logits)}[moved_z]; a steered token after all that are read moves nothing."""
    if moved is None:
        return precise(logits).new_zeros(len(logits))
    probs, change = precise(logits).softmax(-1), precise(moved)
    mean = (probs * change).sum(-1, keepdim=True)
    return (probs * (change - mean).square()).sum(-1)


def _scale(run: Run, direction: Direction, at: At) -> Float[Tensor, " batch"]:
    """mean_t |x_t| / |v| over the tokens that are steered."""
    x = forward_ad.unpack_dual(run.activations[direction.site.point]).primal
    if x.ndim == 4:  # [batch, pos, head, d_head]
        x = x if direction.site.head is None else x[:, :, [direction.site.head]]
    lengths = torch.linalg.vector_norm(precise(x), dim=-1)
    lengths = lengths.mean(-1) if lengths.ndim == 3 else lengths
    steered = tokens_of(at, run.prompts)
    return _token_mean(lengths[steered] / direction.norm, steered)


def _token_mean(values: Float[Tensor, " row"], mask: Tensor) -> Float[Tensor, " batch"]:
    """NaN for prompts without such a token."""
    placed = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return placed.sum(1) / mask.sum(1)


def _compared(prompts: Prompts, where: str) -> Tensor:
    if where == "decision":
        return prompts.at(prompts.decision)
    mask = prompts.mask if where == "all" else predicting(prompts, where)
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise MechsteerError(f"Prompt {row} has no token that predicts span {where!r}. Leave it out, or compare 'all'.")
    return mask
