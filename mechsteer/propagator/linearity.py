"""How far a push may go before its first-order prediction is off: the linear regime of an objective."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.gradients import graph_tokens, traced
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import one_of
from mechsteer.precision import precise, wide
from mechsteer.prompts import Prompts
from mechsteer.propagator.spectra import normal
from mechsteer.result import Result, provenance
from mechsteer.rows import check_at, normalise_at, of_like_lengths, tokens_of
from mechsteer.site import Site
from mechsteer.sweeps import sweep

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
BELOW, WITHIN, ABOVE = -1, 0, 1
DirectionLike = Direction | Tensor | Mapping[Site, Direction]
# What rounding makes of the largest value seen: this many units in the last place, 1e-5 of it in fp32; at least two of
# the model's own, where that is coarser.
_ROUNDING = 100
_RESAMPLES = 1000
# The squared error of a run that gave NaN or infinity. Finite, so that a resample without that prompt is unharmed.
_LOST = 1e200


def linear_regime(
    model: Model,
    prompts: PromptsLike,
    *,
    measure: Objective,
    directions: Mapping[str, DirectionLike] | None = None,
    layers: int | Iterable[int] | None = None,
    kind: str = "resid_post",
    at: Any = None,
    sizes: Iterable[float] | None = None,
    random: int = 8,
    seed: int = 0,
    tolerance: float = 0.1,
    progress: bool = True,
) -> Result:
    """Predicted against true change of an objective as a push grows, and the length at which the prediction fails.

        cats = ms.difference_of_means(model, about_cats, about_dogs)
        regime = linear_regime(model, prompts, measure=gap, directions={"cats": cats})
        regime["radius"].sel(group=["cats", "random"])

    With u a direction of length 1, added to a site at the tokens `at`, M_i the objective on prompt i and |delta| the
    length of what is added to each token:

        predicted_i = |delta| sum_t <u, dM_i/dx_t>              true_i = M_i(x + |delta| u) - M_i(x)

    The prediction for a set S of prompts (and directions) is off by

        off_S = sqrt( sum_S (true - predicted)^2 / sum_S predicted^2 )

    and the *radius* is the smallest |delta| with off_S = `tolerance`. For one prompt off is |true / predicted - 1|: how
    far the secant is from the tangent. It is measured against the prediction and not against the truth, because the
    truth passes through 0 where a curve turns back. Where a single prompt predicts nearly nothing (it is saturated, or
    the direction is nearly orthogonal to its gradient), its own radius is small, as it has to be: what happens there is
    of second order. In a set such prompts count as little as they move. Differences below `resolution` are rounding and
    never count as off. An objective at its extremum, such as the divergence from the run itself, has no linear regime.

    One backward pass for each batch of prompts predicts for all layers and directions; the true changes are a sweep.

    Args:
        model: what to run. Its parameters need no gradients, and get none.
        prompts: what to run it on.
        measure: one differentiable number per prompt.
        directions: by name, each a Direction or vector [d_model] for all layers, vectors [layer, d_model] from the
            first layer up, or a Direction for each site, as `ms.difference_of_means` gives them. Their lengths do not
            matter.
        layers: which layers; None for all.
        kind: of the site pushed: resid_pre, resid_mid, resid_post, attn_out or mlp_out.
        at: which tokens are pushed, as for `ms.Add`; None for all.
        sizes: lengths |delta|, ascending, in units of the typical length of the site's own vectors in that layer
            (`norm`), so that layers compare; None for 17 from 1e-3 to 10.
        random: how many random directions to compare with.
        seed: of the random directions and of the interval.
        tolerance: what counts as off; 0.1 is 10 %.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result with
        - `predicted` and `true` [layer, direction, alpha, prompt], in the objective's units. `alpha` is |delta| in
          units of `norm`; random directions are "random 0", ...;
        - `radius` [layer, group], the |delta| for all prompts together, with the 95 % bootstrap interval over prompts
          from `radius_low` to `radius_high` (NaN for one prompt); `relative_radius` is the same in units of `norm`. A
          group is one of the given directions, or "random", all random ones together. `off` [layer, group, alpha] is
          the curve;
        - `censored` [layer, group]: 0 where the radius lies between two sizes (it is interpolated, log off against
          log |delta|); 1 where the prediction still holds at the largest size, so that the radius is *above* the
          number given, which is that size; -1 where it is off at the smallest already and the radius *below* it. Ends
          of the interval that are an end of the sizes may lie beyond it, too;
        - `prompt_radius` and `prompt_censored` [layer, direction, prompt]: each prompt on its own; NaN where a prompt
          has no token `at`. Its radius is the last size before a run that gave NaN or infinity;
        - `norm` [layer]: the median over pushed tokens of the length of the site's vectors, averaged over prompts;
        - `base` and `resolution` [prompt]: the objective without a push, and what is taken for rounding.

    Raises:
        MechsteerError: a layer, kind, position or direction does not fit the model, an option is out of its range, or
            the objective has no gradient or is not finite without a push.
    """
    began = time.perf_counter()
    right = model.prompts(prompts).padded("right")
    model.check_slots(right, ())
    grid = _grid(sizes, random, tolerance)
    sites = _sites(model, kind, layers)
    rule = normalise_at(at)
    check_at(rule, right, what=f"linear_regime(at={at!r})")
    units = _units(model, directions or {}, sites, random, seed)
    names, given = list(units), len(units) - random
    if not names:
        raise MechsteerError("linear_regime got no directions and random=0. Pass directions, or random=1 or more.")
    plain = sweep(
        model, right, axes={"cell": [0]}, build=lambda cell: None, measure=measure.named("value"), progress=progress
    )
    base = plain["value"].values[0].astype(np.float64)
    gradient, norm, touched = _gradients(model, right, measure, sites, rule)
    if not (np.isfinite(base).all() and bool(gradient.isfinite().all())):
        raise MechsteerError(
            f"{measure!r} or its gradient is NaN or infinite on these prompts without any push. Choose an objective "
            "that is finite there."
        )
    vectors = torch.stack([units[name] for name in names], 1)  # [layer, direction, d_model]
    slope = torch.einsum("lpd,lnd->lnp", gradient.double(), vectors.double()).cpu().numpy()
    length = norm[:, None] * grid  # [layer, alpha]
    table = {
        (site.layer, name): Direction(units[name][index], site) for index, site in enumerate(sites) for name in names
    }
    scale = {site.layer: float(each) for site, each in zip(sites, norm, strict=True)}
    swept = sweep(
        model, right,
        axes={"layer": list(scale), "direction": names, "alpha": grid.tolist()},
        build=lambda layer, direction, alpha: Add(table[layer, direction], alpha * scale[layer], at=rule),
        measure=measure.named("value"), progress=progress,
    )  # fmt: skip
    value = swept["value"].values
    predicted = slope[:, :, None] * length[:, None, :, None]
    true = value.astype(np.float64) - base
    largest = np.maximum(np.abs(np.where(np.isfinite(value), value, 0)).max((0, 1, 2)), np.abs(base))
    resolution = max(_ROUNDING * np.finfo(value.dtype).eps, 2 * torch.finfo(model.dtype).eps) * largest
    with np.errstate(over="ignore", invalid="ignore"):
        missed = np.nan_to_num((true - predicted) ** 2, nan=_LOST, posinf=_LOST).clip(max=_LOST)
    # One row for each group: its directions taken together.
    squares = [
        np.stack([*each[:, :given].swapaxes(0, 1), *([each[:, given:].sum(1)] if random else [])], 1)
        for each in (missed, predicted**2, np.broadcast_to(resolution**2, missed.shape))
    ]
    together = [each.sum(-1) for each in squares]  # [layer, group, alpha]
    relative, censored = first_off(*together, sizes=grid, tolerance=tolerance)
    low, high = _interval(squares, grid, tolerance, seed)
    own = [each.swapaxes(2, 3) for each in (missed, predicted**2, np.broadcast_to(resolution**2, missed.shape))]
    alone, alone_censored = first_off(*own, sizes=grid, tolerance=tolerance)
    alone = np.where(touched, alone, np.nan)
    per, cell = norm[:, None], ("layer", "direction", "alpha", "prompt")
    group = ("layer", "group")
    unit = {"units": "length of the vector added"}
    arrays: dict[str, Any] = {
        "predicted": (cell, predicted, {"long_name": f"predicted change of {measure.name}"}),
        "true": (cell, true, {"long_name": f"change of {measure.name}"}),
        "off": ((*group, "alpha"), _off(*together[:2]), {"long_name": "error of the linear prediction"}),
        "radius": (group, relative * per, {"long_name": "radius of the linear regime", **unit}),
        "radius_low": (group, low * per, unit),
        "radius_high": (group, high * per, unit),
        "relative_radius": (group, relative, {"long_name": "radius of the linear regime", "units": "stream's length"}),
        "relative_radius_low": (group, low),
        "relative_radius_high": (group, high),
        "censored": (group, censored),
        "prompt_radius": ((*cell[:2], "prompt"), alone * norm[:, None, None], unit),
        "prompt_censored": ((*cell[:2], "prompt"), alone_censored),
        "norm": ("layer", norm, {"long_name": f"length of {kind}"}),
        "base": ("prompt", base),
        "resolution": ("prompt", resolution),
    }
    coords: dict[str, Any] = {
        "layer": list(scale),
        "direction": names,
        "alpha": ("alpha", grid, {"long_name": "length of the push", "units": "stream's length", "scale": "log"}),
        "group": [*names[:given], *(["random"] if random else [])],
        "prompt": list(right.labels) if right.labels else np.arange(len(right)),
        "length": (("layer", "alpha"), length, {"long_name": "length of the push"}),
    }
    about = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, measure=repr(measure), kind=kind,
        at=list(rule) if isinstance(rule, tuple) else rule, random=random, tolerance=tolerance, prompts=right.hash,
        engine=swept.provenance["options"]["engine"],
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


def first_off(
    missed: Float[np.ndarray, "*cell alpha"],
    predicted: Float[np.ndarray, "*cell alpha"],
    resolution: Float[np.ndarray, "*cell alpha"],
    *,
    sizes: Float[np.ndarray, " alpha"],
    tolerance: float,
) -> tuple[Float[np.ndarray, "*cell"], Int[np.ndarray, "*cell"]]:
    """The first size at which sqrt(missed / predicted) reaches `tolerance`, and where it is censored.

    Args:
        missed, predicted, resolution: sums of squares of errors, of predictions, and of what is rounding.
    """
    ratio = _off(missed, predicted)
    off = (ratio > tolerance) & (missed > resolution)
    first, never = off.argmax(-1), ~off.any(-1)
    before = np.maximum(first - 1, 0)
    # On a straight line between two sizes in log-log, which is exact where one power of |delta| rules.
    logs = np.log(np.clip(ratio, 1e-30, 1e30))
    here, there = (np.take_along_axis(logs, each[..., None], -1)[..., 0] for each in (before, first))
    share = np.clip((np.log(tolerance) - here) / np.where(first > 0, there - here, 1.0), 0, 1)
    # A run that is lost says nothing about how the error grew towards it.
    lost = np.take_along_axis(missed, first[..., None], -1)[..., 0] >= _LOST
    share = np.where(lost, 0.0, share)
    steps = np.log(sizes)
    radius = np.exp(steps[before] + share * (steps[first] - steps[before]))
    radius = np.where(never, sizes[-1], radius)
    return radius, np.where(never, ABOVE, np.where(first == 0, BELOW, WITHIN))


def _off(missed: Float[np.ndarray, "..."], predicted: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """sqrt(missed / predicted); 0 where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(missed > 0, np.sqrt(missed / predicted), 0.0)


def _interval(
    squares: Sequence[Float[np.ndarray, "layer group alpha prompt"]],
    sizes: Float[np.ndarray, " alpha"],
    tolerance: float,
    seed: int,
) -> tuple[Float[np.ndarray, "layer group"], Float[np.ndarray, "layer group"]]:
    """Percentile bootstrap interval of the radius: prompts are drawn anew, and the sums with them."""
    n = squares[0].shape[-1]
    if n == 1:
        nothing = np.full(squares[0].shape[:2], np.nan)
        return nothing, nothing
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float64)
    sums = [np.moveaxis(each @ times.T, -1, 0) for each in squares]
    radii, _ = first_off(*sums, sizes=sizes, tolerance=tolerance)
    low, high = np.quantile(radii, [0.025, 0.975], axis=0)
    return low, high


def _gradients(
    model: Model, right: Prompts, measure: Objective, sites: Sequence[Site], rule: Any
) -> tuple[Float[Tensor, "layer prompt d_model"], Float[np.ndarray, " layer"], Bool[np.ndarray, " prompt"]]:
    """dM/dx at each site summed over the pushed tokens, the typical length of x there, and who has such tokens."""
    where = tokens_of(rule, right)
    shape = (len(sites), len(right))
    gradient = torch.zeros(*shape, model.d_model, dtype=wide(model.dtype), device=model.device)
    norms = gradient.new_full(shape, torch.nan)
    for example in of_like_lengths(right.lengths, graph_tokens(model)):
        part = right[example].padded("right")
        mask = where[example, : part.tokens.shape[1]]
        run = traced(model, part, measure, example, sites)
        found = run.gradients()
        if not found:
            raise MechsteerError(
                f"{measure!r} has no gradient at {sites[0].kind} of layer {sites[0].layer} or later, so that nothing "
                "predicts it. Choose earlier layers, or an objective computed from logits or activations with PyTorch."
            )
        for index, site in enumerate(sites):
            if site in found:
                gradient[index, example] = (found[site] * mask[..., None]).sum(1)
            lengths = precise(run.taken[site]).norm(dim=-1)
            norms[index, example] = lengths.masked_fill(~mask, torch.nan).nanmedian(1).values
    return gradient, norms.nanmean(1).double().cpu().numpy(), where.any(1).cpu().numpy()


# ---- what was asked for ----


def _grid(sizes: Iterable[float] | None, random: int, tolerance: float) -> Float[np.ndarray, " alpha"]:
    grid = np.logspace(-3, 1, 17) if sizes is None else np.array([float(size) for size in sizes])
    if grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all() or grid[0] <= 0 or (np.diff(grid) <= 0).any():
        raise MechsteerError(
            f"sizes={sizes!r}: pass at least two finite lengths above 0, ascending, such as numpy.logspace(-3, 1, 17)."
        )
    if random < 0 or not 0 < tolerance < float("inf"):
        raise MechsteerError(
            f"random={random} and tolerance={tolerance}: pass random=0 or more, and a finite tolerance above 0, such "
            "as 0.1 for 10 %."
        )
    return grid


def _sites(model: Model, kind: str, layers: int | Iterable[int] | None) -> list[Site]:
    one_of("linear_regime(kind=)", kind, KINDS)
    wanted = [layers] if isinstance(layers, int) else list(range(model.n_layers) if layers is None else layers)
    if not wanted or len(set(wanted)) < len(wanted) or any(not 0 <= layer < model.n_layers for layer in wanted):
        raise MechsteerError(
            f"layers={wanted}: {model.name} has layers 0 to {model.n_layers - 1}. Choose among these, each once."
        )
    sites = [Site(kind, layer) for layer in sorted(wanted)]
    for site in sites:
        model.check_site(site)
    return sites


def _units(
    model: Model, directions: Mapping[str, DirectionLike], sites: Sequence[Site], random: int, seed: int
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Directions of length 1 at each site, the given ones first."""
    like = torch.zeros(0, dtype=wide(model.dtype), device=model.device)
    out: dict[str, Tensor] = {}
    for name, given in directions.items():
        if name == "random" or name.startswith("random "):
            raise MechsteerError(f"The direction {name!r} has the name of the random ones. Rename it.")
        vectors = _vectors(model, name, given, sites).detach().to(like)
        size = vectors.norm(dim=-1, keepdim=True)
        if not bool(size.isfinite().all() and (size > 0).all()):
            raise MechsteerError(f"The direction {name!r} is zero or not finite. Pass one that points somewhere.")
        out[name] = vectors / size
    drawn = normal((random, 1, model.d_model), like, seed).expand(-1, len(sites), -1)
    return out | {f"random {index}": each / each.norm(dim=-1, keepdim=True) for index, each in enumerate(drawn)}


def _vectors(model: Model, name: str, given: DirectionLike, sites: Sequence[Site]) -> Float[Tensor, "layer d_model"]:
    if isinstance(given, Tensor):
        vectors = given
    elif isinstance(given, Direction):
        given.check_fits(model)
        vectors = given.vector
    else:
        missing = [site for site in sites if site not in given]
        if missing:
            raise MechsteerError(
                f"The direction {name!r} has none at {missing[0]!r}. Make it at that site, or leave layer "
                f"{missing[0].layer} out of layers=."
            )
        for site in sites:
            given[site].check_fits(model)
        vectors = torch.stack([given[site].vector for site in sites])
    if tuple(vectors.shape) not in ((model.d_model,), (len(sites), model.d_model)):
        raise MechsteerError(
            f"The direction {name!r} has shape {list(vectors.shape)}. Pass [{model.d_model}], or [{len(sites)}, "
            f"{model.d_model}] for one for each layer."
        )
    return vectors.expand(len(sites), model.d_model)
