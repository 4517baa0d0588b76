"""How many blocks a push passes through on its way: the Dyson series of the residual stream."""

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model, PromptsLike
from mechsteer.precision import precise
from mechsteer.propagator.identity import check_vectors, pushes_of
from mechsteer.propagator.jacobian import Jacobian, positions_of, stage_of, trace
from mechsteer.propagator.operator import Propagator
from mechsteer.result import Result, provenance
from mechsteer.site import Site

UNITS = ("block", "half")


def dyson(
    model: Model,
    prompts: PromptsLike,
    *,
    layers: int | Iterable[int] | None = 0,
    vectors: Mapping[str, Float[Tensor, "*layer_batch d_model"]] | None = None,
    random: int = 8,
    unit: str = "block",
    pos: int | Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> Result:
    """What arrives of a push after the last block, sorted by how many blocks it passed through.

    At one position J = prod_l (I + A_l), where A_l is the Jacobian of what block l adds to the stream. Multiplied out,
    order 0 is the push itself (free propagation), order 1 is what one block made of it and the others handed on, and
    so on; the order of all blocks completes J v exactly. With w_n what has passed through n blocks so far, block l
    turns it into w_n + A_l w_(n-1): paths are never listed, and L blocks take L^2 / 2 products (the expansion of Dyson
    1949 for propagators).

    Args:
        model: what to run.
        prompts: what to run it on.
        layers: pushes are made at `resid_pre` of these layers; None for all.
        vectors: pushes [d_model] or [batch, d_model], by name.
        random: how many random pushes to add, named "random 0", ...
        unit: what counts as one passage: a "block", or a "half" block (attention or MLP).
        pos: position of the stream; None for the decision position.
        seed: of the random pushes.

    Returns:
        A Result with dims (order, layer, vector, prompt), in which w_n is the term of order n:
        - `share` = <w_n, J v> / |J v|^2: what the order adds to what arrives; over all orders 1, single ones may be
          negative or above 1;
        - `size` = |w_n| / |J v|;
        - `missing` = |J v - w_0 - ... - w_n| / |J v|: what the orders up to this one leave out.
        and `arrives` [layer, vector, prompt] = |J v| / |v|. Orders that a later layer lacks are 0.

    Raises:
        MechsteerError: a layer or unit does not exist, a vector does not fit, there are none, or an activation is not
            finite.
    """
    began = time.perf_counter()
    given = model.prompts(prompts).padded("right")
    model.check_slots(given, ())
    named = _checked(vectors, random, unit, len(given), model.d_model)
    n, stride = model.n_layers, 2 if unit == "block" else 1
    wanted = [layers] if isinstance(layers, int) else list(range(n) if layers is None else layers)
    outside = [layer for layer in wanted if not 0 <= layer < n]
    if outside or not wanted:
        raise MechsteerError(f"layers={wanted}: {model.name} has layers 0 to {n - 1}. Choose among these.")
    at = positions_of(given, pos)
    stages = list(range(2 * min(wanted), 2 * n + 1, stride))
    held = trace(model, given, stages, at, at)
    steps = [held.jacobian(source, source + stride) for source in stages[:-1]]
    like = precise(held.at(2 * n).detach())
    pushes = pushes_of(named, random, like, seed)
    shape = (len(steps) + 1, len(wanted), len(pushes), len(given))
    found = {name: torch.zeros(shape, dtype=like.dtype) for name in ("share", "size", "missing")}
    arrives = torch.zeros(shape[1:], dtype=like.dtype)
    for index, layer in enumerate(wanted):
        passed = steps[(2 * layer - stages[0]) // stride :]
        parts, arrives[index] = _orders(passed, held.jacobian(2 * layer, 2 * n), pushes)
        for name, value in parts.items():
            found[name][: len(value), index] = value
    dims = ("order", "layer", "vector", "prompt")
    arrays: dict[str, Any] = {name: (dims, value.numpy()) for name, value in found.items()}
    arrays["arrives"] = (dims[1:], arrives.numpy())
    coords: dict[str, Any] = {
        "order": np.arange(shape[0]),
        "layer": np.array(wanted),
        "vector": _names(named, random),
        "prompt": np.arange(len(given)),
    }
    about = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, pos=at.tolist(), unit=unit,
        prompts=given.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


def series_of(
    J: Propagator,
    *,
    vectors: Mapping[str, Float[Tensor, "*batch d_model"]] | None,
    random: int,
    unit: str,
    seed: int,
) -> Result:
    """The Dyson series of one Propagator; see `Propagator.dyson`."""
    began = time.perf_counter()
    if not isinstance(J.target, Site):
        raise MechsteerError(
            f"{J!r} has no Dyson series: its target is not on the residual stream. Choose embed, resid_pre, resid_mid "
            "or resid_post."
        )
    if not torch.equal(J.source_pos, J.target_pos):
        raise MechsteerError(
            f"{J!r} leads from positions {J.source_pos.tolist()} to {J.target_pos.tolist()}, and the Dyson series "
            "follows one position. Leave target_pos out, or make it the source's."
        )
    named = _checked(vectors, random, unit, J.batch, J.d_source)
    first, last = stage_of(J.source), stage_of(J.target)
    stride = 2 if unit == "block" else 1
    # The embedding belongs to the first block: from there to resid_pre nothing happens to a push.
    stages = [first, *(stage for stage in range(0, last, stride) if stage > max(first, 0)), *([last] * (last > first))]
    held = trace(J.model, J.prompts, stages, J.source_pos, J.target_pos, hooks=J.hooks)
    pushes = pushes_of(named, random, J._like(), seed)
    steps = [held.jacobian(source, target) for source, target in itertools.pairwise(stages)]
    found, arrives = _orders(steps, J.jacobian, pushes)
    dims = ("order", "vector", "prompt")
    arrays: dict[str, Any] = {name: (dims, value.cpu().numpy()) for name, value in found.items()}
    arrays["arrives"] = (dims[1:], arrives.cpu().numpy())
    coords: dict[str, Any] = {"vector": _names(named, random), "prompt": np.arange(J.batch)}
    about = provenance(
        model=J.model.id, seed=seed, seconds=time.perf_counter() - began, source=str(J.source), target=str(J.target),
        pos=J.source_pos.tolist(), unit=unit, prompts=J.prompts.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords | {"order": np.arange(len(stages))}), provenance=about)


def _checked(
    vectors: Mapping[str, Float[Tensor, "*layer_batch d_model"]] | None, random: int, unit: str, batch: int, d: int
) -> dict[str, Float[Tensor, "batch d_model"]]:
    if unit not in UNITS:
        raise MechsteerError(f"unit={unit!r} does not exist. Pass one of {', '.join(map(repr, UNITS))}.")
    named = check_vectors(vectors or {}, batch, d)
    if random < 0 or not (named or random):
        raise MechsteerError(f"dyson got no vectors and random={random}. Pass vectors, or random=1 or more.")
    return named


def _names(named: Mapping[str, Tensor], random: int) -> list[str]:
    return [*named, *(f"random {index}" for index in range(random))]


def _orders(
    steps: list[Jacobian], whole: Jacobian, pushes: Float[Tensor, "n batch d_model"]
) -> tuple[dict[str, Float[Tensor, "order n batch"]], Float[Tensor, "n batch"]]:
    """`share`, `size` and `missing` of each order, and `arrives`."""
    # All pushes pass side by side; J v on its own, so that the sum is checked against it and not against itself.
    arrived, terms = whole.jvp(pushes), _terms(steps, pushes)
    size = arrived.norm(dim=-1)
    parts = {
        "share": (terms * arrived).sum(-1) / size.square(),
        "size": terms.norm(dim=-1) / size,
        "missing": (arrived - terms.cumsum(0)).norm(dim=-1) / size,
    }
    return parts, size / pushes.norm(dim=-1)


def _terms(steps: list[Jacobian], pushes: Float[Tensor, "n batch d_model"]) -> Float[Tensor, "order n batch d_model"]:
    """What has passed through 0, 1, ..., all of the steps."""
    terms = pushes[None]
    for step in steps:
        added = step.jvp(terms.flatten(0, 1)).view_as(terms) - terms
        nothing = torch.zeros_like(pushes)[None]
        terms = torch.cat([terms, nothing]) + torch.cat([nothing, added])
    return terms
