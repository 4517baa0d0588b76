"""How near the residual stream is to an identity propagator."""

import time
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model, PromptsLike
from mechsteer.precision import precise
from mechsteer.propagator.jacobian import Jacobian, Trace, positions_of, trace
from mechsteer.propagator.operator import DENSE, LinearOperator, Matrix, Propagator
from mechsteer.propagator.spectra import check_probes, normal, signs
from mechsteer.result import Result, provenance

SPANS = ("block", "end", "norm", "unscaled")
PARTS = ("attn", "mlp")


def identity_share(
    model: Model,
    prompts: PromptsLike,
    *,
    pos: int | Int[Tensor, " batch"] | None = None,
    vectors: Mapping[str, Float[Tensor, "*layer_batch d_model"]] | None = None,
    random: int = 16,
    spectrum: int = 16,
    seed: int = 0,
) -> Result:
    """Split the stream's Jacobian at one position into a multiple of the identity and a rest, J = c I + R, c = tr(J)/d.

        share = identity_share(model, prompts, vectors={"cats": cats.vector})
        share["c"].sel(span="end").mean("prompt")       # 1 and rest 0: a push arrives as it was made

    Four Jacobians for each layer l, all from `resid_pre` of l: to the block's own `resid_post` ("block"); to the last
    `resid_post` ("end"); on through the final norm, with its gain ("norm"); and the same with the gain and the division
    by the stream's scale taken out ("unscaled"), which leaves of the norm only that it projects the stream's own
    direction (and a layer norm the mean) out. The last two are left out for architectures that go through hooks (where
    `model.decoder` is None). All are exact: one forward pass gives the Jacobians of all half blocks, and those of spans
    are their products, because a push that leaves a position never comes back to it.

    Args:
        model: what to run.
        prompts: what to run it on.
        pos: position of the stream; None for the decision position.
        vectors: directions to follow, [d_model] or [batch, d_model]. Their length does not matter.
        random: how many random directions to compare with.
        spectrum: how many of the rest's singular values to give.
        seed: of the random directions.

    Returns:
        A Result with
        - `c`, `rest` = |R|_F / |J|_F (0 for a multiple of the identity, 1 where nothing is left of it), `norm` =
          |J|_F / sqrt(d) (root mean square gain of a random push), `cos_random` (mean of cos(J v, v) over random v)
          [span, layer, prompt];
        - `cos` [span, layer, vector, prompt], where vectors were given;
        - `spectrum` [span, layer, k, prompt]: the largest singular values of R;
        - `gain` and `largest` [part, layer, prompt]: |dF|_F / sqrt(d) and the largest singular value of dF, the
          Jacobian of what the attention or the MLP adds to the stream at this position. The identity has 1 of both.

    Raises:
        MechsteerError: a vector does not fit, or is zero or not finite, or an activation is not finite.
    """
    began = time.perf_counter()
    given = model.prompts(prompts).padded("right")
    model.check_slots(given, ())
    named = check_vectors(vectors or {}, len(given), model.d_model)
    _check_random(random, spectrum)
    at = positions_of(given, pos)
    n, d = model.n_layers, model.d_model
    held = trace(model, given, range(2 * n + 1), at, at)
    like = precise(held.at(2 * n).detach())
    drawn = normal((random, d), like, seed)
    kept = min(spectrum, d)
    norms = () if model.decoder is None else _final_norm(model, like)
    spans = SPANS[: 2 + len(norms)]

    def empty(*shape: int) -> Tensor:
        return torch.zeros(*shape, len(given), dtype=like.dtype)

    cells = {name: empty(len(spans), n) for name in ("c", "rest", "norm", "cos_random")}
    cos, values = empty(len(spans), n, len(named)), empty(len(spans), n, kept)
    parts = {name: empty(len(PARTS), n) for name in ("gain", "largest")}
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    end = eye.expand(len(given), d, d)
    for layer in reversed(range(n)):
        halves = [dense(held, 2 * layer + half, 2 * layer + half + 1) for half in range(2)]
        for index, half in enumerate(halves):
            moved = half - eye
            parts["gain"][index, layer] = torch.linalg.matrix_norm(moved) / d**0.5
            parts["largest"][index, layer] = torch.linalg.svdvals(moved)[:, 0]
        block = halves[1] @ halves[0]
        end = end @ block
        for index, whole in enumerate((block, end, *(each @ end for each in norms))):
            c = whole.diagonal(dim1=1, dim2=2).mean(-1)
            rest = whole - c[:, None, None] * eye
            norm = torch.linalg.matrix_norm(whole)
            cells["c"][index, layer], cells["norm"][index, layer] = c, norm / d**0.5
            cells["rest"][index, layer] = torch.linalg.matrix_norm(rest) / norm
            cells["cos_random"][index, layer] = _cos(whole, drawn[:, None].expand(-1, len(given), -1)).mean(0)
            values[index, layer] = torch.linalg.svdvals(rest)[:, :kept].T
            if named:
                cos[index, layer] = _cos(whole, torch.stack([vector.to(like) for vector in named.values()]))
    cell = ("span", "layer", "prompt")
    arrays: dict[str, Any] = {name: (cell, value.numpy()) for name, value in cells.items()}
    arrays["spectrum"] = (("span", "layer", "k", "prompt"), values.numpy())
    arrays |= {name: (("part", "layer", "prompt"), value.numpy()) for name, value in parts.items()}
    coords: dict[str, Any] = {
        "span": list(spans),
        "layer": np.arange(n),
        "part": list(PARTS),
        "prompt": np.arange(len(given)),
    }
    if named:
        arrays["cos"] = (("span", "layer", "vector", "prompt"), cos.numpy())
        coords["vector"] = list(named)
    about = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, pos=at.tolist(), random=random,
        prompts=given.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


def identity_pairs(
    model: Model,
    prompts: PromptsLike,
    *,
    pos: int | Int[Tensor, " batch"] | None = None,
    vectors: Mapping[str, Float[Tensor, "*batch d_model"]] | None = None,
    random: int = 16,
    probes: int | None = None,
    seed: int = 0,
) -> Result:
    """The identity share of every span of blocks, J = c I + R from each layer to each later one.

    From `resid_pre` of block `source` to `resid_post` of block `target`, at one position: the diagonal is "block" of
    `identity_share`, and the last column "end". One forward pass gives the Jacobians of all blocks, and a span is one
    product more than the span that ends a block earlier.

    Args:
        model, prompts, pos, vectors, random, seed: as for `identity_share`.
        probes: random signs z for estimates from <z, J z> and |J z|^2 (Hutchinson 1990), which never make a whole
            matrix. None makes whole matrices where that is cheap (d_model of 1,024 or less), else takes 64.

    Returns:
        A Result with `c`, `rest`, `norm`, `cos_random` [source, target, prompt] and, where vectors were given, `cos`
        [source, target, vector, prompt], as of `identity_share`; NaN where the target comes before the source. Where
        they are estimates also their standard errors `c_stderr`, `rest_stderr` and `norm_stderr`; the cosines are exact
        in any case.

    Raises:
        MechsteerError: a vector does not fit, or is zero or not finite, there are no random directions or fewer than 2
            probes, or an activation is not finite.
    """
    began = time.perf_counter()
    given = model.prompts(prompts).padded("right")
    model.check_slots(given, ())
    named = check_vectors(vectors or {}, len(given), model.d_model)
    _check_random(random)
    check_probes(probes)
    at = positions_of(given, pos)
    n, d, batch = model.n_layers, model.d_model, len(given)
    held = trace(model, given, range(0, 2 * n + 1, 2), at, at)
    like = precise(held.at(2 * n).detach())
    exact = probes is None and d <= DENSE
    pushes = pushes_of(named, random, like, seed)
    count = d if exact else 64 if probes is None else probes
    z = d**0.5 * _unit_vectors(like) if exact else signs((count, batch, d), like, seed)
    steps = [
        Matrix(dense(held, 2 * layer, 2 * layer + 2))._mv if exact else held.jacobian(2 * layer, 2 * layer + 2).jvp
        for layer in range(n)
    ]
    names = ("c", "rest", "norm", *(() if exact else _ERRORS))
    cells = {name: torch.full((n, n, batch), torch.nan, dtype=like.dtype) for name in (*names, "cos_random")}
    cos = torch.full((n, n, len(named), batch), torch.nan, dtype=like.dtype)
    for source in range(n):
        moved = torch.cat([z, pushes])
        for target in range(source, n):
            moved = steps[target](moved)
            found = split(z, moved[:count])
            for name in names:
                cells[name][source, target] = found[name]
            along = torch.cosine_similarity(moved[count:], pushes, dim=-1)
            cos[source, target] = along[: len(named)]
            cells["cos_random"][source, target] = along[len(named) :].mean(0)
    arrays: dict[str, Any] = {name: (("source", "target", "prompt"), value.numpy()) for name, value in cells.items()}
    coords: dict[str, Any] = {"source": np.arange(n), "target": np.arange(n), "prompt": np.arange(batch)}
    if named:
        arrays["cos"] = (("source", "target", "vector", "prompt"), cos.numpy())
        coords["vector"] = list(named)
    about = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, pos=at.tolist(), random=random,
        probes=None if exact else count, prompts=given.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


def share_of(
    J: Propagator,
    *,
    vectors: Mapping[str, Float[Tensor, "*batch d_model"]] | None,
    random: int,
    spectrum: int,
    probes: int | None,
    seed: int,
) -> Result:
    """The identity share of one Propagator; see `Propagator.identity_share`."""
    began = time.perf_counter()
    d = J.d_source
    if J.d_target != d:
        raise MechsteerError(
            f"{J!r} has no share of the identity: it leads to {J.d_target} numbers, and the stream has {d}. Choose a "
            "target on the residual stream."
        )
    named = check_vectors(vectors or {}, J.batch, d)
    _check_random(random, spectrum)
    check_probes(probes)
    exact, like = probes is None and d <= DENSE, J._like()
    whole: LinearOperator = Matrix(J.dense()) if exact else J
    z = signs((64 if probes is None else probes, J.batch, d), like, seed)
    z = d**0.5 * _unit_vectors(like) if exact else z
    cells = split(z, whole._mv(z))
    if exact:
        cells |= {name: torch.zeros_like(cells["c"]) for name in _ERRORS}
    rest = _Rest(whole, cells["c"])
    kept = min(spectrum, d)
    values = torch.linalg.svdvals(rest.dense())[:, :kept] if exact else rest.svd(kept, seed=seed).S
    pushes = pushes_of(named, random, like, seed)
    along = torch.cosine_similarity(whole._mv(pushes), pushes, dim=-1)
    arrays: dict[str, Any] = {name: ("prompt", value.cpu().numpy()) for name, value in cells.items()}
    arrays["cos_random"] = ("prompt", along[len(named) :].mean(0).cpu().numpy())
    arrays["spectrum"] = (("k", "prompt"), values.T.cpu().numpy())
    coords: dict[str, Any] = {"prompt": np.arange(J.batch)}
    if named:
        arrays["cos"] = (("vector", "prompt"), along[: len(named)].cpu().numpy())
        coords["vector"] = list(named)
    about = provenance(
        model=J.model.id, seed=seed, seconds=time.perf_counter() - began, source=str(J.source), target=str(J.target),
        source_pos=J.source_pos.tolist(), target_pos=J.target_pos.tolist(), random=random, probes=probes,
        prompts=J.prompts.hash,
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=about)


@final
class _Rest(LinearOperator):
    """R = J - c I."""

    def __init__(self, of: LinearOperator, c: Float[Tensor, " batch"]) -> None:
        self.of, self.c = of, c[:, None]
        self.batch, self.d_source, self.d_target = of.batch, of.d_source, of.d_target

    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]:
        return self.of._mv(v) - self.c * v

    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]:
        return self.of._rmv(u) - self.c * u

    def _like(self) -> Tensor:
        return self.of._like()


_ERRORS = ("c_stderr", "rest_stderr", "norm_stderr")


def split(z: Float[Tensor, "n batch d"], moved: Float[Tensor, "n batch d"]) -> dict[str, Float[Tensor, " batch"]]:
    """c, |R|_F / |J|_F and |J|_F / sqrt(d) from z and J z, with standard errors.

    z are signs; or the unit vectors times sqrt(d), for which the same means are exact and the errors mean nothing.
    """
    n = len(z)
    traces, squares = (z * moved).mean(-1), moved.square().mean(-1)  # of which c and |J|_F^2 / d are the means
    c, square = traces.mean(0), squares.mean(0)
    norm = square.sqrt()
    # Not 1 - c^2 / square, which would be rounding where the stream is nearly the identity.
    rest = ((moved - c[:, None] * z).square().mean((0, -1)) / square).sqrt()
    # How far each sample moves 1 - c^2 / square.
    pull = (c / square).square() * squares - 2 * c / square * traces

    def stderr(samples: Tensor) -> Tensor:
        return samples.std(0) / n**0.5

    tiny = torch.finfo(z.dtype).tiny
    errors = (stderr(traces), stderr(pull) / (2 * rest).clamp(min=tiny), stderr(squares) / (2 * norm).clamp(min=tiny))
    return {"c": c, "rest": rest, "norm": norm, **dict(zip(_ERRORS, errors, strict=True))}


def pushes_of(
    named: Mapping[str, Float[Tensor, "batch d_model"]], random: int, like: Float[Tensor, "batch d_model"], seed: int
) -> Float[Tensor, "n batch d_model"]:
    """The named vectors, then random ones, the same for all prompts."""
    drawn = normal((random, like.shape[-1]), like, seed)[:, None].expand(-1, len(like), -1)
    return torch.cat([torch.stack([vector.to(like) for vector in named.values()]), drawn]) if named else drawn


def _unit_vectors(like: Float[Tensor, "batch d"]) -> Float[Tensor, "d batch d"]:
    d = like.shape[-1]
    return torch.eye(d, dtype=like.dtype, device=like.device)[:, None].expand(d, len(like), d)


def _check_random(random: int, spectrum: int = 1) -> None:
    if random < 1 or spectrum < 1:
        raise MechsteerError(f"random={random} and spectrum={spectrum}: pass at least 1 of each.")


def dense(held: Trace, source: int, target: int) -> Float[Tensor, "batch d_model d_model"]:
    """The whole Jacobian between two stages of a trace."""
    step: Jacobian = held.jacobian(source, target)
    return step.vjp(_unit_vectors(step.like)).transpose(0, 1)


def check_vectors(
    vectors: Mapping[str, Float[Tensor, "*layer_batch d_model"]], batch: int, d_model: int
) -> dict[str, Float[Tensor, "batch d_model"]]:
    """Named vectors, one for each prompt.

    Raises:
        MechsteerError: one does not fit, or is zero or not finite.
    """
    for name, vector in vectors.items():
        if tuple(vector.shape) not in ((d_model,), (1, d_model), (batch, d_model)):
            raise MechsteerError(
                f"The vector {name!r} has shape {list(vector.shape)}. Pass [{d_model}], or [{batch}, {d_model}] for "
                "one for each prompt."
            )
        if not bool(torch.isfinite(vector).all()) or not bool(vector.reshape(-1, d_model).any(-1).all()):
            raise MechsteerError(f"The vector {name!r} is zero or not finite. Pass one that points somewhere.")
    return {name: vector.detach().expand(batch, d_model) for name, vector in vectors.items()}


def _cos(
    whole: Float[Tensor, "batch d_model d_model"], v: Float[Tensor, "n batch d_model"]
) -> Float[Tensor, "n batch"]:
    return torch.cosine_similarity(torch.einsum("bts,nbs->nbt", whole, v), v, dim=-1)


def _final_norm(
    model: Model, x: Float[Tensor, "batch d_model"]
) -> tuple[Float[Tensor, "batch d_model d_model"], Float[Tensor, "batch d_model d_model"]]:
    """Jacobian of the final norm with its gain, and the same without gain and scale.

    N = diag(w) (C - y y^T / d) / s with y the normalised stream, s its scale and C the identity, for a layer norm the
    projection off the mean. Exact also with the epsilon inside s, because y is then shorter by as much.
    """
    norm = model.decoder.ln_final
    d = x.shape[1]
    centre = torch.eye(d, dtype=x.dtype, device=x.device)
    if not norm.rms:
        centre = centre - 1 / d
    centred = x @ centre
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = centred / scale
    unscaled = centre - y[:, :, None] * y[:, None, :] / d
    gain = torch.ones_like(x[0]) if norm.w is None else norm.w
    return gain[:, None] * unscaled / scale[:, :, None], unscaled
