"""Interventions that add to a site, scale it, or fill a prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer import markup
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention, check
from mechsteer.interventions.checks import as_direction, check_batch, finite, site_of
from mechsteer.precision import precise, wide
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows, normalise_at, stack_numbers
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Add(Intervention):
    """Add `alpha` times a direction: activation steering.

    With the defaults this is `x + alpha * v` at every token, the vector as it is (not normalised): Turner et al. 2023,
    "Activation addition", and the steering of "A theory of steering strength" (section 2).

    Attributes:
        direction: one vector [d].
        alpha: its multiple, or one per example [batch].
    """

    direction: Direction
    alpha: float | Tensor

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d"],
        alpha: float | Float[Tensor, ""] | Float[Tensor, " batch"] = 1.0,
        *,
        site: SiteLike | None = None,
        at: Any = None,
    ) -> None:
        """
        Args:
            direction: a Direction, or a plain vector together with `site`.
            alpha: its multiple, or one per example [batch].
            site: None takes the direction's own.
            at: which tokens; see `Intervention`.

        Raises:
            MechsteerError: no site, several vectors, or a number that is not finite.
        """
        given = as_direction(direction, site, "Add")
        if given.vectors.shape[0] != 1:
            raise MechsteerError(
                f"Add got {given.vectors.shape[0]} vectors and adds one. Pass them to Ablate, or pick one."
            )
        where = site_of(site, given, "Add")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "direction", given)
        object.__setattr__(self, "alpha", finite(alpha, "alpha"))

    @classmethod
    def _edit(cls, cells: Sequence["Add"], like: Float[Tensor, "..."]) -> Edit:
        alphas = stack_numbers([cell.alpha for cell in cells], like)
        vectors, which = _stack_unique([cell.direction.vectors[0] for cell in cells], like)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            alpha = alphas(rows)
            if isinstance(alpha, Tensor):
                alpha = alpha.view(-1, *[1] * (values.ndim - 1))
            # Rounded once, where the model is in half precision: after the sum.
            x = precise(values)
            if which is None:
                moved = torch.addcmul(x, alpha, vectors[0]) if isinstance(alpha, Tensor) else x + alpha * vectors[0]
            else:
                added = vectors[which[rows.cell]].view(-1, *[1] * (values.ndim - 2), values.shape[-1])
                moved = x + alpha * added
            return moved.to(values.dtype)

        return edit

    def check_model(self, model: "Model") -> None:
        self.direction.check_fits(model)
        model.check_width(self.site, self.direction.vectors.shape[-1], "Add")

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        check_batch(self.alpha, prompts, "alpha")

    def _repr_html_(self) -> str:
        rows: dict[str, Any] = {
            "site": markup.code(self.site),
            "tokens": "all" if self.at is None else markup.brief(self.at),
        }
        rows["alpha"] = markup.brief(self.alpha)
        if not isinstance(self.alpha, Tensor):
            rows["alpha"] += f" (adds a vector of length {abs(self.alpha) * self.direction.norm:.4g})"
        return markup.card("Add", markup.facts(rows | self.direction.told()), about=markup.says(self))

    def to_weights(self, model: "Model") -> "Model":
        """A copy of the model with the vector added for good: the MLP output bias of the block gains `alpha * v`.

        Raises:
            MechsteerError: that is not the same function, because it is not added to `resid_post` (or `mlp_out`) at all
                tokens of all examples, or because the architecture has a norm after the MLP.
        """
        if self.site.kind not in ("resid_post", "mlp_out") or self.at is not None or isinstance(self.alpha, Tensor):
            raise MechsteerError(
                f"Add at {self.site} with at={self.at!r} has no equal in the weights: one alpha for all tokens of all "
                "examples at resid_post or mlp_out has. Use it as an intervention."
            )
        check([self], model, None)
        assert self.site.layer is not None
        return model.with_bias(self.site.layer, self.alpha * self.direction.vectors[0])


def _stack_unique(
    vectors: Sequence[Float[Tensor, "_"]], like: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "unique d"], Int[Tensor, " cell"] | None]:
    """The different vectors as one tensor, and which of them each cell has; None where there is only one."""
    unique = {id(vector): vector for vector in vectors}
    # Slices of one tensor are new objects each time they are taken.
    by_address = {(v.data_ptr(), v.shape, v.stride()): v for v in unique.values()}
    keys = list(by_address)
    table = torch.stack([v.to(like.device, wide(like.dtype)) for v in by_address.values()])
    if len(keys) == 1:
        return table, None
    index = {key: i for i, key in enumerate(keys)}
    which = [index[(v.data_ptr(), v.shape, v.stride())] for v in vectors]
    return table, torch.tensor(which, device=like.device)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Scale(Intervention):
    """Multiply a site's values, such as one head's output, by a factor.

    Attributes:
        factor: one number, or one per example [batch].
    """

    factor: float | Tensor

    def __init__(
        self, site: SiteLike, factor: float | Float[Tensor, ""] | Float[Tensor, " batch"], *, at: Any = None
    ) -> None:
        """
        Args:
            site: what to scale.
            factor: one number, or one per example [batch].
            at: which tokens; see `Intervention`.

        Raises:
            MechsteerError: a factor is not finite.
        """
        where = Site.of(site)
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "factor", finite(factor, "factor"))

    @classmethod
    def _edit(cls, cells: Sequence["Scale"], like: Float[Tensor, "..."]) -> Edit:
        factors = stack_numbers([cell.factor for cell in cells], like)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            factor = factors(rows)
            factor = factor.view(-1, *[1] * (values.ndim - 1)) if isinstance(factor, Tensor) else factor
            return (precise(values) * factor).to(values.dtype)

        return edit

    def check_model(self, model: "Model") -> None:
        """Any model will do."""

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        check_batch(self.factor, prompts, "factor")


@dataclass(frozen=True, eq=False, init=False, repr=False)
class SoftPrefix(Intervention):
    """Put embeddings, which need be no token's, into the slots that the prompts reserve: Lester et al. 2021.

    Attributes:
        embeddings: [slot, d_model], as they leave `hook_embed`; position embeddings are added by the model.
    """

    embeddings: Float[Tensor, "slot d_model"]

    def __init__(self, embeddings: Float[Tensor, "slot d_model"]) -> None:
        """
        Args:
            embeddings: one row per slot; gradients flow to them.

        Raises:
            MechsteerError: a number is not finite.
        """
        if not bool(torch.isfinite(embeddings).all()):
            raise MechsteerError("SoftPrefix got embeddings with NaN or infinity. Pass finite numbers.")
        object.__setattr__(self, "site", Site("embed"))
        object.__setattr__(self, "at", "slots")
        object.__setattr__(self, "embeddings", embeddings)

    @classmethod
    def _edit(cls, cells: Sequence["SoftPrefix"], like: Float[Tensor, "..."]) -> Edit:
        table = torch.stack([cell.embeddings.to(like.device, wide(like.dtype)) for cell in cells])

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            # Rounded after the choice, so that gradients of many prompts are summed before they are rounded.
            return table[rows.cell, rows.slot].to(values.dtype)

        return edit

    def check_model(self, model: "Model") -> None:
        model.check_width(self.site, self.embeddings.shape[-1], "SoftPrefix")

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        slots = prompts.slots.sum(1)
        if bool((slots != self.embeddings.shape[0]).any()):
            row = int((slots != self.embeddings.shape[0]).nonzero()[0, 0])
            raise MechsteerError(
                f"SoftPrefix has {self.embeddings.shape[0]} embeddings, but prompt {row} reserves {int(slots[row])} "
                "slots. Build the prompts with slots= that many."
            )
