"""How a push at one place of the residual stream arrives at another: the Jacobian as a linear operator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.prompts import Prompts
from mechsteer.propagator.jacobian import Jacobian, positions_of, stage_of, trace
from mechsteer.propagator.spectra import (
    SVD,
    Estimate,
    check_probes,
    exactly,
    mean_of,
    n_probes,
    normal,
    randomised_svd,
    signs,
)
from mechsteer.result import Result
from mechsteer.site import Site, SiteLike

# Up to this many backward passes side by side, the whole matrix is cheap.
DENSE = 1024


class LinearOperator(ABC):
    """A linear map for each prompt, known by its products with vectors.

    Attributes:
        batch: number of maps, one for each prompt.
        d_source, d_target: J is d_target x d_source.
    """

    batch: int
    d_source: int
    d_target: int

    @abstractmethod
    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]: ...

    @abstractmethod
    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]: ...

    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the map's dtype and device."""

    def mv(self, v: Float[Tensor, "*k d_source"]) -> Float[Tensor, "*k2 d_target"]:
        """J v: what arrives of a small push v.

        Args:
            v: [d_source], the same for all prompts; [batch, d_source], one for each prompt; or
                [k, batch, d_source], in which batch may be 1 for the same vectors for all prompts.

        Returns:
            [batch, d_target], or [k, batch, d_target].

        Raises:
            MechsteerError: v does not fit, or holds NaN or infinity.
        """
        return self._product(v, self._mv, self.d_source, "mv")

    def rmv(self, u: Float[Tensor, "*k d_target"]) -> Float[Tensor, "*k2 d_source"]:
        """J^T u: the gradient at the source of <u, target>. Shapes and errors are those of `mv`."""
        return self._product(u, self._rmv, self.d_target, "rmv")

    @property
    def T(self) -> "LinearOperator":
        """The transposed map."""
        return _Transposed(self)

    def mean(self) -> "LinearOperator":
        """The mean of the prompts' maps, an operator of batch 1."""
        return _Mean(self)

    def dense(self) -> Float[Tensor, "batch d_target d_source"]:
        """All entries, from as many products as the smaller side is wide."""
        if self.d_target <= self.d_source:
            return self._rmv(self._identity(self.d_target)).transpose(0, 1).contiguous()
        return self._mv(self._identity(self.d_source)).permute(1, 2, 0).contiguous()

    def svd(self, k: int, *, oversample: int | None = None, power: int = 4, seed: int = 0) -> SVD:
        """The k largest singular values with their vectors, without the whole matrix.

        Randomised range finder of Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1, with
        their a posteriori bound of the error (equation 4.3, which fails with a probability of 1e-6).

        Args:
            k: how many.
            oversample: columns of the sketch beyond k; None for k of them, at least 8.
            power: power iterations; each costs (k + oversample) products each way. A flat spectrum needs more of both.
            seed: of the sketch.

        Raises:
            MechsteerError: k is not between 1 and the rank that the shapes allow, or an option is negative.
        """
        most = min(self.d_source, self.d_target)
        oversample = max(8, k) if oversample is None else oversample
        if not 1 <= k <= most or oversample < 0 or power < 0:
            raise MechsteerError(
                f"svd got k={k}, oversample={oversample} and power={power}. This map is {self.d_target} x "
                f"{self.d_source}: k goes from 1 to {most}, the others from 0."
            )
        width = min(k + oversample, most)
        if width == most:
            u, s, vh = torch.linalg.svd(self.dense(), full_matrices=False)
            return SVD(u[..., :k], s[:, :k], vh[:, :k], torch.zeros_like(s[:, 0]))
        drawn = normal((width + n_probes(), self.batch, self.d_source), self._like(), seed)
        return randomised_svd(self._mv, self._rmv, drawn[:width], drawn[width:], k=k, power=power)

    def trace(self, *, probes: int | None = None, seed: int = 0) -> Estimate:
        """Sum of the diagonal.

        Args:
            probes: random signs z for Hutchinson's estimate, the mean of <z, J z> (Hutchinson 1990). None takes the
                whole matrix where that is cheap (1,024 rows or fewer), else 64.
            seed: of the probes.

        Raises:
            MechsteerError: the map is not square, or there are fewer than 2 probes.
        """
        if self.d_source != self.d_target:
            raise MechsteerError(
                f"trace needs a square map, and this one is {self.d_target} x {self.d_source}. Choose a source and a "
                "target of the same width."
            )
        if probes is None and self.d_source <= DENSE:
            return exactly(self.dense().diagonal(dim1=1, dim2=2).sum(-1))
        z = self._signs(probes, seed)
        return mean_of((z * self._mv(z)).sum(-1))

    def frobenius(self, *, probes: int | None = None, seed: int = 0) -> Estimate:
        """Square root of the sum of squared entries; |J|_F^2 is the mean of |J z|^2. Options as for `trace`."""
        if probes is None and min(self.d_source, self.d_target) <= DENSE:
            return exactly(torch.linalg.matrix_norm(self.dense()))
        square, error = mean_of(self._mv(self._signs(probes, seed)).square().sum(-1))
        return Estimate(square.sqrt(), error / (2 * square.sqrt()).clamp(min=torch.finfo(square.dtype).tiny))

    def __repr__(self) -> str:
        return f"{type(self).__name__.lstrip('_')}({self.batch} maps, {self.d_target} x {self.d_source})"

    def _rows(self) -> dict[str, object]:
        """What a notebook says of it."""
        return {"shape": f"{self.d_target} x {self.d_source}, one for each of {self.batch} prompts"}

    def _repr_html_(self) -> str:
        return markup.card(type(self).__name__.lstrip("_"), markup.facts(self._rows()), about=markup.says(self))

    # ---- parts of these ----

    def _signs(self, probes: int | None, seed: int) -> Float[Tensor, "n batch d_source"]:
        check_probes(probes)
        return signs((64 if probes is None else probes, self.batch, self.d_source), self._like(), seed)

    def _identity(self, d: int) -> Float[Tensor, "d batch d"]:
        like = self._like()
        return torch.eye(d, dtype=like.dtype, device=like.device)[:, None].expand(d, self.batch, d)

    def _product(self, v: Tensor, product: Callable[[Tensor], Tensor], d: int, name: str) -> Tensor:
        fits = v.ndim in (1, 2, 3) and v.shape[-1] == d and (v.ndim == 1 or v.shape[-2] in (1, self.batch))
        if not fits:
            raise MechsteerError(
                f"{name} got a tensor of shape {list(v.shape)}. Pass [{d}], [{self.batch}, {d}] or [k, {self.batch}, "
                f"{d}]: a vector for all of the {self.batch} prompts, one for each, or several for each."
            )
        if not bool(torch.isfinite(v).all()):
            raise MechsteerError(f"{name} got a vector with NaN or infinity in it. Pass finite numbers.")
        like = self._like()
        rows = v.detach().to(like).expand(*v.shape[:-2], self.batch, d)
        return product(rows) if rows.ndim == 3 else product(rows[None])[0]


@final
class _Transposed(LinearOperator):
    def __init__(self, of: LinearOperator) -> None:
        self.of = of
        self.batch, self.d_source, self.d_target = of.batch, of.d_target, of.d_source

    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]:
        return self.of._rmv(v)

    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]:
        return self.of._mv(u)

    def _like(self) -> Tensor:
        return self.of._like()

    @property
    def T(self) -> LinearOperator:
        """The map that this is the transpose of."""
        return self.of

    def _rows(self) -> dict[str, object]:
        return {"of": markup.code(repr(self.of)), **super()._rows()}


@final
class Matrix(LinearOperator):
    """A map whose entries are known."""

    def __init__(self, entries: Float[Tensor, "batch d_target d_source"]) -> None:
        self.entries: Float[Tensor, "batch d_target d_source"] = entries
        self.batch: int = entries.shape[0]
        self.d_target: int = entries.shape[1]
        self.d_source: int = entries.shape[2]

    def dense(self) -> Float[Tensor, "batch d_target d_source"]:
        """The entries."""
        return self.entries

    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]:
        return (v.transpose(0, 1) @ self.entries.mT).transpose(0, 1)

    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]:
        return (u.transpose(0, 1) @ self.entries).transpose(0, 1)

    def _like(self) -> Tensor:
        return self.entries


@final
class _Mean(LinearOperator):
    def __init__(self, of: LinearOperator) -> None:
        self.of = of
        self.batch, self.d_source, self.d_target = 1, of.d_source, of.d_target

    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]:
        return self.of._mv(v.expand(-1, self.of.batch, -1)).mean(1, keepdim=True)

    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]:
        return self.of._rmv(u.expand(-1, self.of.batch, -1)).mean(1, keepdim=True)

    def _like(self) -> Tensor:
        return self.of._like()

    def _rows(self) -> dict[str, object]:
        return {"of": markup.code(repr(self.of)), **super()._rows()}


@final
class Propagator(LinearOperator):
    """The Jacobian between two sites of the residual stream, for each prompt: what arrives of a small push.

        J = Propagator(model, prompts, ("resid_post", 1), ("resid_post", 5))
        J.mv(cats.vector)                     # [batch, d_model]: where the push is after layer 5
        J.T.mv(u), J.svd(16), J.trace(), J.mean().dense()
        Propagator(model, prompts, "embed", "logits")
        Propagator(model, prompts, ("resid_post", 1), ms.LogitGap(" cats", " dogs", tokenizer=model))

    One forward pass, whose graph is kept; each product is then one backward pass, also that of `mv` (see
    `Jacobian.jvp`), and many vectors ride side by side. Where source and target are at the same position, only that
    position's stream moves: the keys and values of the others are those of the clean run. The derivative is exact for
    the model as it runs.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptsLike,
        source: SiteLike,
        target: SiteLike | Objective,
        *,
        source_pos: int | Int[Tensor, " batch"] | None = None,
        target_pos: int | Int[Tensor, " batch"] | None = None,
        hooks: bool = False,
    ) -> None:
        """
        Args:
            model: what to run.
            prompts: one map each.
            source: where the push is made: embed, resid_pre, resid_mid or resid_post.
            target: where it arrives: one of these, "logits" (through the final norm), or an objective (one number).
            source_pos: position of the push, one for all prompts or one for each; None for the decision position.
                Positions count from 0 at the first token, or back from -1 at the prompt's last. A site may have it too.
            target_pos: the same for where it arrives. An objective has its own.
            hooks: use TransformerLens's forward pass also where mechsteer's own, which is faster, applies.

        Raises:
            MechsteerError: a site does not exist or is not on the residual stream; the source comes after the target,
                in layers or in positions; the objective has no gradient or does not depend on the source; or an
                activation is not finite.
        """
        given = model.prompts(prompts).padded("right")
        model.check_slots(given, ())
        begin, start = _place(model, source, source_pos, "source")
        self.model: Model = model
        self.prompts: Prompts = given
        at = positions_of(given, start)
        stop, end, last = at, None, None
        if isinstance(target, Objective):
            if target_pos is not None:
                raise MechsteerError(
                    f"target_pos={target_pos} goes with a site, and {target!r} has positions of its own. Leave it out."
                )
            if target.n_examples not in (None, len(given)):
                raise MechsteerError(
                    f"{target.name} holds values for {target.n_examples} prompts, and there are {len(given)}. Make it "
                    "from the same prompts."
                )
            end = target
        elif target == "logits":
            end, stop = "logits", positions_of(given, target_pos)
        else:
            last, pos = _place(model, target, target_pos, "target")
            stop = positions_of(given, pos)
            if stage_of(begin) > stage_of(last):
                raise MechsteerError(
                    f"The source {begin!r} comes after the target {last!r}, and nothing propagates back. Swap them; "
                    ".T is the transposed map."
                )
        if bool((at > stop).any()):
            row = int((at > stop).int().argmax())
            raise MechsteerError(
                f"The source is at position {int(at[row])} of prompt {row} and the target at {int(stop[row])}: no "
                "position attends to later ones. Choose a target position at or after the source's."
            )
        first = stage_of(begin)
        goal = None if last is None else stage_of(last)
        found = trace(model, given, [first] if goal is None else [first, goal], at, stop, end=end, hooks=hooks)
        self.jacobian: Jacobian = found.jacobian(first, goal)
        if isinstance(target, Objective) and not self.jacobian.reaches():
            raise MechsteerError(
                f"{target!r} does not depend on {begin!r}: it reads only what comes before. Choose an earlier source."
            )
        self.source: Site = begin
        self.target: SiteLike | Objective = target if last is None else last
        self.source_pos: Int[Tensor, " batch"] = at
        self.target_pos: Int[Tensor, " batch"] = stop
        self.hooks: bool = hooks
        self.batch: int = len(given)
        self.d_source: int = model.d_model
        self.d_target: int = self.jacobian.y.shape[-1]

    def identity_share(
        self,
        *,
        vectors: Mapping[str, Float[Tensor, "*batch d_model"]] | None = None,
        random: int = 16,
        spectrum: int = 16,
        probes: int | None = None,
        seed: int = 0,
    ) -> Result:
        """Split this J into a multiple of the identity and a rest, J = c I + R with c = tr(J) / d.

        What `identity_share` and `identity_pairs` give for spans of blocks, for this source and target, which may also
        lie within a block.

        Args:
            vectors: directions to follow, [d_model] or [batch, d_model]. Their length does not matter.
            random: how many random directions to compare with.
            spectrum: how many of the rest's singular values to give.
            probes: as for `trace`.
            seed: of random directions and probes.

        Returns:
            A Result with `c`, `rest`, `norm` and `cos_random` [prompt], `cos` [vector, prompt] where vectors were given
            and `spectrum` [k, prompt], as of `identity_share`; and standard errors `c_stderr`, `rest_stderr` and
            `norm_stderr` [prompt], 0 where J was computed whole.

        Raises:
            MechsteerError: the target is not of the stream's width, a vector does not fit, or is zero or not finite, or
                an option is out of its range.
        """
        from mechsteer.propagator.identity import share_of

        return share_of(self, vectors=vectors, random=random, spectrum=spectrum, probes=probes, seed=seed)

    def dyson(
        self,
        *,
        vectors: Mapping[str, Float[Tensor, "*batch d_model"]] | None = None,
        random: int = 8,
        unit: str = "block",
        seed: int = 0,
    ) -> Result:
        """What arrives at this target of a push at this source, sorted by how many blocks it passed through.

        The series of `dyson`, there to the last block, between any two sites of the stream at one position. A part of
        a block at either end counts as a block.

        Args:
            vectors, random, unit, seed: as for `dyson`.

        Returns:
            A Result with `share`, `size` and `missing` [order, vector, prompt] and `arrives` [vector, prompt].

        Raises:
            MechsteerError: the target is not on the stream or at another position than the source; or as for `dyson`.
        """
        from mechsteer.propagator.dyson import series_of

        return series_of(self, vectors=vectors, random=random, unit=unit, seed=seed)

    def _mv(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch d_target"]:
        return self.jacobian.jvp(v)

    def _rmv(self, u: Float[Tensor, "k batch d_target"]) -> Float[Tensor, "k batch d_source"]:
        return self.jacobian.vjp(u)

    def _like(self) -> Tensor:
        return self.jacobian.like

    def _rows(self) -> dict[str, object]:
        return {
            "source": _told(self.source, self.source_pos),
            "target": _told(self.target, self.target_pos),
            **super()._rows(),
            "model": self.model.name + (", through TransformerLens's hooks" if self.hooks else ""),
            "computed": f"a backward pass for each product, many side by side; .dense() takes "
            f"{min(self.d_target, self.d_source)} of them",
        }

    def __repr__(self) -> str:
        return (
            f"Propagator({self.model.name!r}, {self.source!r} -> {self.target!r}, {self.batch} prompts, "
            f"{self.d_target} x {self.d_source})"
        )


def _told(place: Any, pos: Int[Tensor, " batch"]) -> Markup:
    """A source or target, and its position in the prompts."""
    ends = sorted({int(pos.min()), int(pos.max())})
    return markup.code(place) + Markup(" ") + markup.faded(f"at position {' to '.join(map(str, ends))}")


def _place(
    model: Model, given: SiteLike, pos: int | Int[Tensor, " batch"] | None, what: str
) -> tuple[Site, int | Int[Tensor, " batch"] | None]:
    """A site of the model's residual stream, and the position asked for."""
    site = Site.of(given)
    stage_of(site)
    model.check_site(site)
    if site.pos is not None and pos is not None:
        raise MechsteerError(f"{site!r} and {what}_pos={pos} both say where. Give one of them.")
    return site.point, site.pos if pos is None else pos
