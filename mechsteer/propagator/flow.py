"""Where a push arrives: at its own position, or carried to others by attention."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model, PromptsLike
from mechsteer.precision import precise
from mechsteer.propagator.identity import check_vectors
from mechsteer.propagator.jacobian import Jacobian, positions_of, stage_of, trace
from mechsteer.propagator.spectra import normal
from mechsteer.result import Result, provenance
from mechsteer.site import Site, SiteLike


def position_flow(
    model: Model,
    prompts: PromptsLike,
    source: SiteLike,
    target: SiteLike,
    *,
    source_pos: int | Iterable[int] | None = None,
    vectors: Mapping[str, Float[Tensor, "*layer_batch d_model"]] | None = None,
    random: int = 16,
    seed: int = 0,
) -> Result:
    """How much of a push at one position arrives at the same position and how much at later ones.

        flow = position_flow(model, prompts, ("resid_pre", 1), ("resid_post", 5))
        flow["same"].mean("prompt")       # share that stays where the push was made

    Args:
        model: what to run.
        prompts: what to run it on.
        source, target: sites of the residual stream.
        source_pos: positions that pushes are made at, one after the other; None for all of the longest prompt.
            Negative ones count back from a prompt's last.
        vectors: pushes [d_model] or [batch, d_model] by name; their length does not matter.
        random: how many random pushes; together they are the vector "random".
        seed: of the random pushes.

    Returns:
        A Result with
        - `arrived` [vector, src, dest, prompt] = |J v| / |v| at position dest, v pushed at src; for "random" the root
          of the mean square, which estimates |J|_F / sqrt(d). 0 before the push, NaN where a prompt has no such
          position;
        - `others` [vector, src, prompt]: the root of sum_(dest > src) arrived^2, which attention carried to others;
        - `same` [vector, src, prompt]: the share of sum_dest arrived^2 that dest = src has.
        `src` holds positions as they were asked for, `dest` absolute ones; `src_token` and `dest_token` say what stands
        there in the first prompt that is long enough, with dots where prompts differ. `flow.plot("arrived")` draws a
        map for each vector, in whose rows a push spreads from the diagonal to the right.

    Raises:
        MechsteerError: the source comes after the target or is not on the residual stream, no prompt has a position, a
            vector does not fit, or an activation is not finite.
    """
    began = time.perf_counter()
    given = model.prompts(prompts).padded("right")
    model.check_slots(given, ())
    begin, end = Site.of(source).point, Site.of(target).point
    first, last = stage_of(begin), stage_of(end)
    for site in (begin, end):
        model.check_site(site)
    if first > last:
        raise MechsteerError(f"The source {begin!r} comes after the target {end!r}, and nothing propagates back.")
    named = check_vectors(vectors or {}, len(given), model.d_model)
    if random < 0 or not (named or random):
        raise MechsteerError(f"position_flow got no vectors and random={random}. Pass vectors, or random=1 or more.")
    width = given.mask.shape[1]
    asked = [source_pos] if isinstance(source_pos, int) else list(range(width) if source_pos is None else source_pos)
    from_end = given.decision + 1
    places = [torch.where(torch.full_like(from_end, pos) < 0, from_end + pos, pos) for pos in asked]
    for pos, place in zip(asked, places, strict=True):
        if not bool(((place >= 0) & (place < given.lengths)).any()):
            raise MechsteerError(f"No prompt has position {pos}; the longest has {width} tokens. Choose another.")
    decision = positions_of(given, None)
    held = trace(model, given, [first, last], decision, decision, hooks=True)
    reached, moved = held.points[last][0], held.points[first][1]
    like = precise(reached.detach())
    drawn = normal((random, 1, model.d_model), like, seed).expand(-1, len(given), -1)
    pushes = torch.stack([*(vector.to(like) for vector in named.values()), *drawn])
    pushes = pushes / pushes.norm(dim=-1, keepdim=True)
    batch = torch.arange(len(given), device=decision.device)
    names = [*named, *(["random"] if random else [])]
    arrived = torch.full((len(names), len(asked), width, len(given)), torch.nan, dtype=like.dtype)
    same, others = (torch.full((len(names), len(asked), len(given)), torch.nan, dtype=like.dtype) for _ in range(2))
    for index, place in enumerate(places):
        there = (place >= 0) & (place < given.lengths)
        at = torch.where(there, place, 0)
        square = Jacobian(reached, moved, (batch, at)).jvp(pushes).square().sum(-1)
        parts = [*square[: len(named)], *([square[len(named) :].mean(0)] if random else [])]
        rows = torch.stack(parts).masked_fill(~given.mask, 0)  # [vector, batch, pos]
        here = rows[:, batch, at]
        same[:, index] = (here / rows.sum(-1)).masked_fill(~there, torch.nan)
        apart = rows.index_put((torch.arange(len(rows))[:, None], batch, at), here.new_zeros(()))
        others[:, index] = apart.sum(-1).sqrt().masked_fill(~there, torch.nan)
        seen = rows.sqrt().masked_fill(~(given.mask & there[:, None]), torch.nan)
        arrived[:, index] = seen.transpose(1, 2)
    cell = ("vector", "src", "prompt")
    length = {"units": "length of the push"}
    arrays: dict[str, Any] = {
        "arrived": (
            ("vector", "src", "dest", "prompt"),
            arrived.numpy(),
            {"long_name": "length that arrives"} | length,
        ),
        "others": (cell, others.numpy(), {"long_name": "length carried to other positions"} | length),
        "same": (cell, same.numpy(), {"long_name": "share at the push's own position"}),
    }
    texts = [given.shown_tokens(row) for row in range(len(given))]
    coords: dict[str, Any] = {
        "vector": names,
        "src": ("src", asked, {"long_name": "pushed at"}),
        "dest": ("dest", np.arange(width), {"long_name": "arrives at"}),
        "src_token": ("src", _shown(texts, [place.tolist() for place in places])),
        "dest_token": ("dest", _shown(texts, [[pos] * len(given) for pos in range(width)])),
        "prompt": list(given.labels) if given.labels else np.arange(len(given)),
    }
    about = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, source=str(begin), target=str(end),
        random=random, prompts=given.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


def _shown(texts: Sequence[Sequence[str]], places: Iterable[Sequence[int]]) -> np.ndarray:
    """What stands at each place, given as a position of each prompt."""
    out = []
    for place in places:
        there = [row[at] for row, at in zip(texts, place, strict=True) if 0 <= at < len(row)]
        out.append(there[0] + ("…" if len(set(there)) > 1 else ""))
    return np.array(out, dtype=object)
