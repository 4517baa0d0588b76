"""Directional ablation: a subspace projected out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention, check
from mechsteer.interventions.checks import as_direction, site_of
from mechsteer.precision import precise, wide
from mechsteer.rows import Rows, normalise_at
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Ablate(Intervention):
    """Project a direction, or the subspace of several, out of a site: `x - (x U^T) U` with orthonormal rows U.

    Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.4. With
    `everywhere=True` it acts on all that is written to the residual stream (the embeddings, every `attn_out` and every
    `mlp_out`), which is what orthogonalised weights do.

    Attributes:
        basis: orthonormal rows [k, d] of the ablated subspace.
        everywhere: all writes to the residual stream, instead of one site.
    """

    direction: Direction
    basis: Float[Tensor, "k d"] = field(repr=False)
    everywhere: bool

    def __init__(
        self,
        direction: Direction | Float[Tensor, "k d"] | Float[Tensor, " d"],
        *,
        site: SiteLike | None = None,
        everywhere: bool = False,
        at: Any = None,
    ) -> None:
        """
        Args:
            direction: one or several vectors, which need be neither normalised nor orthogonal.
            site: None takes the direction's own.
            everywhere: act on all writes to the residual stream; then `site` is left out.
            at: which tokens; see `Intervention`.

        Raises:
            MechsteerError: no site, linearly dependent vectors, or a number that is not finite.
        """
        if everywhere and site is not None:
            raise MechsteerError(f"Ablate got everywhere=True and site={site!r}. Give one of them.")
        given = as_direction(direction, ("resid_pre", 0) if everywhere and site is None else site, "Ablate")
        where = Site("resid_pre", 0) if everywhere else site_of(site, given, "Ablate")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "direction", given)
        object.__setattr__(self, "basis", given.orthonormal().vectors)
        object.__setattr__(self, "everywhere", everywhere)

    def _told(self) -> dict[str, Any]:
        rank = {"rank": self.basis.shape[0]}
        return {"direction": self.direction} | rank | ({"everywhere": True} if self.everywhere else {})

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        if not self.everywhere:
            return (self.site.point,)
        writes = [Site(kind, layer) for layer in range(n_layers) for kind in ("attn_out", "mlp_out")]
        return (Site("resid_pre", 0), *writes)

    @classmethod
    def _edit(cls, cells: Sequence["Ablate"], like: Float[Tensor, "..."]) -> Edit:
        unique = {id(cell.direction): cell.basis.to(like.device, wide(like.dtype)) for cell in cells}
        bases = list(unique.values())
        which = None
        if len(bases) > 1:
            index = {key: i for i, key in enumerate(unique)}
            which = torch.tensor([index[id(cell.direction)] for cell in cells], device=like.device)

        def project(values: Float[Tensor, "*rows d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*rows d"]:
            x = precise(values)
            return (x - (x @ basis.T) @ basis).to(values.dtype)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            if which is None:
                return project(values, bases[0])
            mine_of = which[rows.cell]
            for i, basis in enumerate(bases):
                mine = (mine_of == i).nonzero().squeeze(1)
                if mine.numel():
                    values = values.index_put((mine,), project(values[mine], basis))
            return values

        return edit

    def check_model(self, model: "Model") -> None:
        self.direction.check_fits(model)
        model.check_width(self.site, self.basis.shape[-1], "Ablate")

    def to_weights(self, model: "Model") -> "Model":
        """A copy of the model whose writing matrices are orthogonal to the direction.

        Raises:
            MechsteerError: that is not the same function: it acts on chosen tokens or one site, or the architecture has
                norms between the matrices and the residual stream.
        """
        if not self.everywhere or self.at is not None:
            raise MechsteerError(
                f"Ablate at {self.site} with at={self.at!r} has no equal in the weights: Ablate(direction, "
                "everywhere=True) at all tokens has. Use it as an intervention."
            )
        check([self], model, None)
        return model.orthogonalised(self.basis)
