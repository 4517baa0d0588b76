"""What steering without end leads to: proposition 4.1 on real networks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add, Scale
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives.base import decision_mask
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.result import Result
from mechsteer.rows import At
from mechsteer.run import Run
from mechsteer.site import Site
from mechsteer.strength.cross_entropy import cross_entropy_curves, text_windows
from mechsteer.strength.curves import Alphas, Directions, contexts, named_directions, strength_sweep
from mechsteer.strength.recipes import alpha_grid
from mechsteer.strength.tables import SummedNLL, Table
from mechsteer.strength.vectors import labels_of

# How long the vector is that stands for an infinite one, in multiples of sqrt(d_model): its mean square dwarfs any
# epsilon of a norm, and fp32 still holds it.
_FAR = 1e4
_SIDES = (-1.0, 1.0)


def limit_logits(model: Model, direction: Direction, *, sign: float = 1.0) -> Float[Tensor, " d_vocab"]:
    """Logits that steering tends to: LN(sign * v) W^T.

    Proposition 4.1 of "Towards Understanding Steering Strength": the logits of the steered model, for every prompt, as
    alpha goes to plus or minus infinity. What it rests on is that blocks read the stream through norms, so that what
    they add to h + alpha v, R(alpha), stays bounded while alpha v does not. LN is the final norm with its own weights,
    biases and soft cap, without its epsilon, which vanishes beside alpha v. A norm that subtracts the mean (layer norm)
    takes the mean of v out too.

    Args:
        model: to steer; it has to have a final norm.
        direction: a vector in the residual stream, at any layer: the limit does not depend on the layer.
        sign: of alpha; only whether it is above or below 0 counts.

    Raises:
        MechsteerError: the direction does not fit the model, is not in the residual stream, or is zero after the norm's
            centring; or `sign` is 0.
    """
    direction.check_fits(model)
    if direction.site.kind not in ("resid_pre", "resid_mid", "resid_post"):
        raise MechsteerError(f"The limit is about the residual stream, and the direction is at {direction.site}.")
    if sign == 0 or sign != sign:
        raise MechsteerError(f"sign={sign} has no limit. Pass 1.0 or -1.0.")
    vector = precise(direction.vector.detach())
    centred = vector - vector.mean() if str(model.cfg.normalization_type).startswith("LN") else vector
    if float(torch.linalg.vector_norm(centred)) <= 1e-6 * float(torch.linalg.vector_norm(vector)):
        raise MechsteerError(
            f"Direction at {direction.site} is zero for the final norm of {model.name}, so that steering along it has "
            "no limit. Pass another."
        )
    last = Site("resid_post", model.n_layers - 1)
    far = _FAR * len(vector) ** 0.5 / float(torch.linalg.vector_norm(centred))
    # fp16 ends at 65504.
    far = min(far, torch.finfo(model.dtype).max / 4 / float(vector.abs().max())) * (1.0 if sign > 0 else -1.0)
    # The model's own code behind the last block, on nothing but the vector.
    pushed = [Scale(last, 0.0), Add(Direction(vector[None], last), far)]
    run = model.run(Prompts.from_ids([[0]], tokenizer=model.tokenizer), pushed, logits="last")
    return precise(run.rows[0]).detach()


def limit_curves(
    model: Model,
    prompts: PromptsLike,
    directions: Directions,
    alphas: Alphas,
    *,
    at: At = "all",
    progress: bool = True,
) -> Result:
    """How far steered predictions are from their limit LN(+-v) W^T, against the strength.

    The limit (proposition 4.1) is the same at every layer, but how fast it comes is not. Behind the last block R = 0:
    the logits are LN(h + alpha v) W^T exactly, for every alpha. Before it, the later blocks add R(alpha), which is
    bounded but may be long, and turns towards what they make of a stream of nothing but v. Either way the distance ends
    as 1 / alpha, once |alpha v| is well above |h + R|: a `rate` of -1.

    Args:
        model, prompts, directions, alphas, progress: as in `token_curves`.
        at: which tokens are steered; the last one has to be among them.

    Returns:
        [direction, alpha, prompt]: `distance`, the length of the difference of the centred logits at the last token
        over that of the limit's, and `total_variation` between the probabilities, both to the limit with the sign of
        alpha (plus at 0). [direction, prompt]: `scale`, the length of the unsteered stream behind the last block over
        that of the direction, the strength at which both are as long. [direction, side]: `rate`, the slope of the log
        of the mean distance against that of |alpha|, over the outermost quarter of the strengths on that side.

    Raises:
        MechsteerError: as in `limit_logits` and `token_curves`.
    """
    named, grid = named_directions(directions), alpha_grid(alphas)
    given = contexts(model, prompts, "default")
    positive = np.array(grid) >= 0
    distances, variations, last = [], [], Site("resid_post", model.n_layers - 1)
    swept = None
    for name, direction in named.items():
        ends = torch.stack([limit_logits(model, direction, sign=side) for side in _SIDES])
        swept = strength_sweep(model, given, {name: direction}, grid, ToLimits(ends), 4, at=at, progress=progress)
        sides = [
            np.where(positive[:, None], swept[plus].values[0], swept[minus].values[0]) for minus, plus in ("01", "23")
        ]
        distances.append(sides[0])
        variations.append(sides[1])
    assert swept is not None
    stream = model.run(given, record=[last], logits="none").activations[last]
    lengths = torch.linalg.vector_norm(precise(stream[decision_mask(given)]), dim=-1).cpu().numpy()
    scale = np.stack([lengths / float(torch.linalg.vector_norm(each.vector)) for each in named.values()])
    distance = np.stack(distances)
    rates = [[_rate(np.array(grid), curve.mean(-1), side) for side in _SIDES] for curve in distance]
    dims = ("direction", "alpha", "prompt")
    data = xr.Dataset(
        {
            "distance": (dims, distance, {"long_name": "distance of the logits to their limit", "units": "1"}),
            "total_variation": (dims, np.stack(variations), {"long_name": "total variation to the limit"}),
            "scale": (("direction", "prompt"), scale, {"long_name": "stream's length in lengths of the direction"}),
            "rate": (("direction", "side"), np.array(rates)),
        },
        coords={
            "direction": list(named), "alpha": grid, "prompt": swept.data.coords["prompt"], "side": list(_SIDES),
            **labels_of(list(named.values())),
        },
    )  # fmt: skip
    data["alpha"].attrs = {"long_name": "strength", "units": "lengths of the direction"}
    return Result(data, provenance=swept.provenance)


def ce_plateau(
    model: Model,
    texts: Prompts | Sequence[str],
    directions: Directions,
    alpha: float,
    *,
    window: int = 128,
    progress: bool = True,
) -> Result:
    """Where Delta CE ends: as proposition 4.1 predicts it, and as it is at a large strength.

    In the limit every token is predicted with the same probabilities q = softmax(LN(+-v) W^T), so that the cross
    entropy is - sum_t log q(y_t) / T, which takes no forward pass: only how often each token comes.

    Args:
        model, texts, directions, window, progress: as in `cross_entropy_curves`.
        alpha: the large strength, above 0; both signs are measured.

    Returns:
        [direction, alpha], alpha both signs: `delta_ce`, measured, and `predicted`, the limit, in nats a token.

    Raises:
        MechsteerError: `alpha` is not positive; or as in `cross_entropy_curves` and `limit_logits`.
    """
    if not alpha > 0:
        raise MechsteerError(f"alpha={alpha} is not above 0. Pass a large strength; both signs are measured.")
    named = named_directions(directions)
    windows = texts if isinstance(texts, Prompts) else text_windows(model, texts, window=window)
    windows = model.prompts(windows).padded("right")
    curves = cross_entropy_curves(model, windows, named, [-alpha, alpha], progress=progress)
    mask = SummedNLL().reads(windows)
    counts = torch.bincount(windows.tokens.roll(-1, 1)[mask], minlength=model.d_vocab).double().cpu()
    rows = []
    for direction in named.values():
        ends = torch.stack([limit_logits(model, direction, sign=side) for side in _SIDES]).double().cpu()
        rows.append(-(F.log_softmax(ends, -1) @ counts) / counts.sum())
    base = curves["ce"].sel(alpha=0.0).values[:, None]
    data = curves.sel(alpha=[-alpha, alpha]).data[["delta_ce"]]
    data["predicted"] = ("direction", "alpha"), torch.stack(rows).numpy() - base, {"units": "nats a token"}
    return Result(data, provenance=curves.provenance)


@dataclass(frozen=True, eq=False, repr=False)
class ToLimits(Table):
    """Distance of the centred logits at the last token to two sets of them, and total variation to their softmax.

    Columns: distance to the first and second limit, total variation to the first and second.
    """

    limits: Float[Tensor, "2 d_vocab"]

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return decision_mask(prompts)

    def values(self, run: Run) -> Float[Tensor, "batch column"]:
        """Relative distances, and total variations in [0, 1]."""
        rows = precise(run.logits_at(decision_mask(run.prompts)))
        centred = rows - rows.mean(-1, keepdim=True)
        columns = []
        for limit in self.limits.to(rows):
            end = limit - limit.mean()
            columns.append(torch.linalg.vector_norm(centred - end, dim=-1) / torch.linalg.vector_norm(end))
        probs = rows.softmax(-1)
        columns += [(probs - limit.softmax(-1)).abs().sum(-1) / 2 for limit in self.limits.to(rows)]
        return torch.stack(columns, 1)


def _rate(alphas: Float[np.ndarray, " alpha"], distance: Float[np.ndarray, " alpha"], side: float) -> float:
    """Slope of log distance against log |alpha| over the outermost quarter of the strengths of a sign."""
    where = np.sign(alphas) == side
    x, y = np.abs(alphas[where]), distance[where]
    order = np.argsort(x)[-max(2, len(x) // 4) :]
    x, y = x[order], y[order]
    if len(x) < 2 or not (y > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
