"""Directions: vectors that belong to a place in a model."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import ModelId, at_hand
from mechsteer.errors import MechsteerError
from mechsteer.files import open_tensors, save_tensors, stamp
from mechsteer.precision import precise, wide
from mechsteer.prompts import Prompts
from mechsteer.result import Result, as_json, provenance
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

_VERSION = 1
# Numbers in an unembedding that is compared in a moment, and how many tokens a notebook shows.
_SMALL, _NEAREST = 50_000_000, 8


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A vector (or several that span a subspace) at a site of a model, and how it was made.

        happy = difference_of_means(model, happy_texts, plain_texts)[Site("resid_post", 3)]
        model.run(prompts, [Add(happy, 4.0)])
        (happy - 0.5 * sad).unit.save("mood.safetensors")

    Attributes:
        vectors: one row for each vector; [d] is taken as one row. d is the width of the site: `d_head` for q, k, v, z.
        site: where it lives, without a position.
        model: the weights that it was made with; None where it belongs to no particular ones.
        origin: how it was made: method, options, counts; JSON-able.

    Raises:
        MechsteerError: a number is not finite, there are none, the site has a position or holds no vectors, or the
            origin cannot be written as JSON.
    """

    vectors: Float[Tensor, "*k d"]
    site: Site
    model: ModelId | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vectors = self.vectors[None] if self.vectors.ndim == 1 else self.vectors
        if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point():
            raise MechsteerError(
                f"Direction got {vectors.dtype} {list(self.vectors.shape)}, but holds floating-point vectors [k, d]. "
                "Pass one vector [d], or one row for each."
            )
        if not bool(vectors.isfinite().all()):
            count = int((~vectors.isfinite()).sum())
            raise MechsteerError(
                f"Direction at {self.site} has {count} numbers that are NaN or infinite. Make it anew."
            )
        if self.site.pos is not None or self.site.axes[-1] in ("src", "one"):
            raise MechsteerError(
                f"Direction got {self.site!r}, but needs a whole hook point, or a head of one, whose last axis holds "
                "vectors. Say positions with `at` of the intervention that uses it."
            )
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "origin", as_json(self.origin, what="A Direction's origin"))

    # --- one vector

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The vector.

        Raises:
            MechsteerError: there are several.
        """
        if len(self.vectors) != 1:
            raise MechsteerError(
                f"Direction at {self.site} holds {len(self.vectors)} vectors, and one was expected. Use .vectors, or "
                "pick one: direction[0]."
            )
        return self.vectors[0]

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(torch.linalg.vector_norm(precise(self.vector)))

    @property
    def unit(self) -> "Direction":
        """The same direction with length 1.

        Raises:
            MechsteerError: the vector is zero, or there are several.
        """
        if self.norm == 0:
            raise MechsteerError(
                f"Direction at {self.site} is zero, so it has no unit vector. Check what it was made of."
            )
        return self._derived(precise(self.vectors) / self.norm, "unit", norm=self.norm)

    def __mul__(self, factor: float | int) -> "Direction":
        return self._derived(precise(self.vectors) * factor, "scaled", factor=float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> "Direction":
        return self * (1 / divisor)

    def __neg__(self) -> "Direction":
        return self * -1.0

    def __add__(self, other: "Direction") -> "Direction":
        _check_together([self, other])
        mine = precise(self.vector)
        vectors = mine + other.vector.to(mine)
        origin = {"method": "sum", "of": [self.origin, other.origin]}
        return replace(self, vectors=vectors[None], model=self.model or other.model, origin=origin)

    def __sub__(self, other: "Direction") -> "Direction":
        return self + -other

    # --- several

    @staticmethod
    def stack(directions: Sequence["Direction"]) -> "Direction":
        """The subspace that directions at one site span together; the vectors stay as they are.

        Raises:
            MechsteerError: there are none, or they differ in site, model or width.
        """
        if not directions:
            raise MechsteerError("Direction.stack got an empty list. Pass at least one Direction.")
        _check_together(directions)
        first = directions[0]
        vectors = torch.cat([each.vectors.to(first.vectors) for each in directions])
        model = next((each.model for each in directions if each.model is not None), None)
        return Direction(vectors, first.site, model, {"method": "stack", "of": [each.origin for each in directions]})

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> "Direction":
        """One of the vectors."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Direction at {self.site} holds {len(self)} vectors, and [{index}] was asked for.")
        return self._derived(self.vectors[index][None], "picked", index=index)

    def orthonormal(self) -> "Direction":
        """An orthonormal basis of the subspace (QR): the first j rows span what the first j vectors do.

        Raises:
            MechsteerError: the vectors depend on each other linearly.
        """
        exact = self.vectors.double()
        # Lengths say nothing about dependence.
        exact = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny)
        singular = torch.linalg.svdvals(exact)
        rank = int((singular > singular[0] * max(exact.shape) * torch.finfo(self.vectors.dtype).eps).sum())
        if rank < len(self):
            raise MechsteerError(
                f"Direction at {self.site} holds {len(self)} vectors that span only {rank} dimensions. "
                "Leave out those that depend on the others."
            )
        q, r = torch.linalg.qr(exact.T)
        basis = (q * r.diagonal().sign()).T  # the signs make the first row the first vector's own direction
        return self._derived(basis.to(wide(self.vectors.dtype)), "orthonormal")

    def to(self, target: torch.device | torch.dtype | str) -> "Direction":
        """The same direction on a device, or as another floating-point type."""
        return replace(self, vectors=self.vectors.to(target))

    def _derived(self, vectors: Tensor, method: str, **how: Any) -> "Direction":
        return replace(self, vectors=vectors, origin={"method": method, **how, "of": self.origin})

    # --- with a model

    def check_fits(self, model: "Model") -> None:
        """Raise `MechsteerError` unless the model has this site and width, and the weights that this was made with."""
        model.check_site(self.site)
        model.check_width(self.site, self.vectors.shape[1], "Direction")
        model.check_same(self.model, "Direction")

    def nearest_tokens(self, model: "Model", k: int = 10) -> list[tuple[str, float]]:
        """The tokens whose unembedding vectors have the largest cosine with this vector.

        The final norm is left out, also its weights (nostalgebraist 2020, "interpreting GPT: the logit lens").

        Returns:
            `k` pairs of a token's text and its cosine, largest first.

        Raises:
            MechsteerError: it is not as wide as the residual stream, belongs to another model, is zero, or is several
                vectors.
        """
        self.check_fits(model)
        if self.site.axes[-1] != "d_model":
            raise MechsteerError(
                f"nearest_tokens needs a Direction in the residual stream, and this is at {self.site}."
            )
        # Some models have more columns than there are tokens, for round numbers.
        matrix = model.unembedding()[:, : len(model.tokenizer)].detach().float()
        unit = self.unit.vector.detach().to(matrix)
        cosines = unit @ matrix / torch.linalg.vector_norm(matrix, dim=0).clamp(min=torch.finfo(matrix.dtype).tiny)
        values, ids = cosines.topk(min(k, len(cosines)))
        tokens = Prompts.from_ids(ids[:, None], tokenizer=model.tokenizer)
        return [(tokens.str_tokens(row)[0], value) for row, value in enumerate(values.tolist())]

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; `load` reads it."""
        model = None if self.model is None else self.model._asdict()
        about = {"site": str(self.site), "model": model, "origin": self.origin}
        save_tensors(path, {"vectors": self.vectors}, stamp("direction", _VERSION) | about)

    @staticmethod
    def load(path: str | os.PathLike[str], model: "Model | None" = None) -> "Direction":
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: that it must fit; None takes it as it is. On the CPU either way.

        Raises:
            MechsteerError: the file is missing, damaged or of another format, or was made with other weights.
        """
        with open_tensors(path, format="direction", version=_VERSION) as (file, about):
            made_with = None if about["model"] is None else ModelId(**about["model"])
            direction = Direction(file.get_tensor("vectors"), Site.of(about["site"]), made_with, about["origin"])
        if model is not None:
            model.check_same(made_with, os.fspath(path))
            direction.check_fits(model)
        return direction

    def __repr__(self) -> str:
        what = f"norm={self.norm:.4g}" if len(self) == 1 else f"k={len(self)}"
        model = "" if self.model is None else f", model={self.model.name!r}"
        method = f", method={self.origin['method']!r}" if "method" in self.origin else ""
        return f"Direction({self.site!r}, d={self.vectors.shape[1]}, {what}{model}{method})"

    def _repr_html_(self) -> str:
        return markup.card("Direction", markup.facts({"site": markup.code(self.site)} | self.told()))

    def told(self) -> dict[str, object]:
        """What a notebook says of it besides its site: names, and what each is."""
        k, d = self.vectors.shape
        norms = torch.linalg.vector_norm(self.vectors.detach()[:8].float(), dim=1).tolist()
        made_with = "no particular one"
        if self.model is not None:
            made_with = f"{self.model.name} ({self.model.hash[:8]}{', processed' if self.model.processed else ''})"
        rows: dict[str, object] = {
            "width": f"{d}" if k == 1 else f"{k} vectors of {d}",
            "norm": ", ".join(f"{norm:.4g}" for norm in norms) + (", ..." if k > 8 else ""),
            "model": made_with,
            "origin": markup.lines(_steps(self.origin)) if self.origin else markup.faded("not said"),
        }
        if near := self._near:
            chips = (
                markup.chip(text, f"rgba(40,120,230,{min(1.5 * max(cos, 0), 0.8):.2f})", title=f"cosine {cos:.3f}")
                for text, cos in near
            )
            rows["nearest tokens"] = markup.code(Markup(" ").join(chips))
        return rows

    @cached_property
    def _near(self) -> list[tuple[str, float]]:
        """The nearest tokens, where the model is in memory and small enough for them to be found while one looks."""
        model = at_hand(self.model)
        if model is None or model.tokenizer is None or model.d_model * model.d_vocab > _SMALL:
            return []
        # Not of several vectors, of zero, in another space than the stream's, or after the weights changed.
        with suppress(MechsteerError):
            return self.nearest_tokens(model, _NEAREST)
        return []


def _steps(origin: Mapping[str, Any]) -> list[str]:
    """How a direction came about, the last step first."""
    steps = []
    while origin:
        told = "; ".join(_words(name, value) for name, value in origin.items() if name not in ("method", "of"))
        of = origin.get("of")
        many = f" of {len(of)} directions" if isinstance(of, list) else ""
        steps.append(f"{origin.get('method', 'made')}{many}" + (f": {told}" if told else ""))
        origin = of if isinstance(of, Mapping) else {}
    return steps


def _words(name: str, value: Any) -> str:
    """One entry of an origin."""
    if isinstance(value, Mapping):
        return f"{name} ({', '.join(_words(*each) for each in value.items())})"
    if isinstance(value, str):
        return f"{name} {value[:8] if re.fullmatch('[0-9a-f]{32,}', value) else markup.shortened(value)}"
    return f"{name} {markup.brief(value)}"


def cosine_table(directions: Mapping[Any, Direction] | Sequence[Direction]) -> Result:
    """Cosines between all pairs of directions.

    Args:
        directions: single vectors of one width; they may be at different sites. Names are the mapping's keys, else the
            sites.

    Returns:
        `cosine` [direction, other].

    Raises:
        MechsteerError: they differ in width or model, or one is zero.
    """
    named = list(directions.items()) if isinstance(directions, Mapping) else [(each.site, each) for each in directions]
    if not named:
        raise MechsteerError("cosine_table got no directions. Pass at least one.")
    each = [direction for _, direction in named]
    _check_together(each, sites=False)
    units = torch.stack([direction.unit.vector.double().cpu() for direction in each])
    cosines = (units @ units.T).detach().numpy()
    names = [str(name) for name, _ in named]
    data = xr.Dataset({"cosine": (("direction", "other"), cosines)}, {"direction": names, "other": names})
    return Result(data, provenance=provenance(model=each[0].model))


def _check_together(directions: Sequence[Direction], *, sites: bool = True) -> None:
    """Raise unless directions can be combined."""
    first = directions[0]
    known = next((each.model for each in directions if each.model is not None), None)
    for each in directions:
        if sites and each.site != first.site:
            raise MechsteerError(f"Directions at {first.site} and {each.site} do not combine. Take both at one site.")
        if each.vectors.shape[1] != first.vectors.shape[1]:
            raise MechsteerError(
                f"Directions of width {first.vectors.shape[1]} and {each.vectors.shape[1]} do not combine. "
                "Make them from the same model."
            )
        if each.model is not None and known is not None and each.model.hash != known.hash:
            raise MechsteerError(
                f"Directions of {known.name} (weights {known.hash[:12]}) and {each.model.name} (weights "
                f"{each.model.hash[:12]}) do not combine. Make them from the same model."
            )
