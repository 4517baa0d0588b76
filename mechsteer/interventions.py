"""Interventions: what is done to an activation, where, and how strongly. Frozen values, all of one kind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention, check
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows, last_touched, normalise_at, stack_numbers
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model


def _site_of(site: SiteLike | None, direction: Direction | None, name: str) -> Site:
    if site is None and direction is None:
        raise MechsteerError(f"{name} got a tensor without a site. Pass site=('resid_post', layer), or a Direction.")
    return Site.of(site) if site is not None else direction.site  # type: ignore[union-attr]


def _number(value: float | Tensor, name: str) -> float | Tensor:
    if isinstance(value, Tensor) and (value.ndim or value.requires_grad):
        if value.ndim > 1:
            raise MechsteerError(f"{name} has shape {list(value.shape)}. Pass one number, or one per example [batch].")
        if not bool(torch.isfinite(value).all()):
            raise MechsteerError(f"{name} holds NaN or infinity. Pass finite numbers.")
        return value
    number = float(value)
    if number != number or abs(number) == float("inf"):
        raise MechsteerError(f"{name}={number} is not finite. Pass finite numbers.")
    return number


def _check_batch(value: float | Tensor, prompts: Prompts, name: str) -> None:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] != len(prompts):
        raise MechsteerError(
            f"{name} has {value.shape[0]} numbers for {len(prompts)} prompts. Pass one number, or one per prompt."
        )


def _as_direction(direction: Direction | Tensor, site: SiteLike | None, name: str) -> Direction:
    """A Direction for what was passed, which checks that it is finite and belongs to the site."""
    if isinstance(direction, Direction):
        return direction
    where = _site_of(site, None, name)
    vectors = direction if direction.ndim == 2 else direction[None]
    return Direction(vectors, site=where.at(pos=None), model=None, origin={})


@dataclass(frozen=True, eq=False, init=False)
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
        given = _as_direction(direction, site, "Add")
        if given.vectors.shape[0] != 1:
            raise MechsteerError(
                f"Add got {given.vectors.shape[0]} vectors and adds one. Pass them to Ablate, or pick one."
            )
        where = _site_of(site, given, "Add")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "direction", given)
        object.__setattr__(self, "alpha", _number(alpha, "alpha"))

    @classmethod
    def _edit(cls, cells: Sequence["Add"], like: Float[Tensor, "..."]) -> Edit:
        alphas = stack_numbers([cell.alpha for cell in cells], like)
        vectors, which = _stack_unique([cell.direction.vectors[0] for cell in cells], like)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            alpha = alphas(rows)
            if isinstance(alpha, Tensor):
                alpha = alpha.view(-1, *[1] * (values.ndim - 1))
            if which is None:
                return (
                    torch.addcmul(values, alpha, vectors[0])
                    if isinstance(alpha, Tensor)
                    else values + alpha * vectors[0]
                )
            added = vectors[which[rows.cell]].view(-1, *[1] * (values.ndim - 2), values.shape[-1])
            return values + alpha * added

        return edit

    def check_model(self, model: "Model") -> None:
        self.direction.check_fits(model)
        model.check_width(self.site, self.direction.vectors.shape[-1], "Add")

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        _check_batch(self.alpha, prompts, "alpha")

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
    table = torch.stack([v.to(like) for v in by_address.values()])
    if len(keys) == 1:
        return table, None
    index = {key: i for i, key in enumerate(keys)}
    which = [index[(v.data_ptr(), v.shape, v.stride())] for v in vectors]
    return table, torch.tensor(which, device=like.device)


@dataclass(frozen=True, eq=False, init=False)
class Replace(Intervention):
    """Put other values in the place of a site's: activation patching, mean ablation, zero ablation.

    Attributes:
        value: activations recorded on as many prompts of the same lengths (each example and absolute position is
            replaced by its own), or a tensor: [*feature] for all tokens, [batch, *feature] for all tokens of an
            example. The feature axes are those of the site without batch and position, and without head where the site
            names one. Of `pattern` and `attn_scores` that is [head, src], or [head, 1] for all sources; later tokens
            and padding stay hidden, whatever the value.
    """

    value: Activations | Tensor

    def __init__(self, site: SiteLike, value: Activations | Tensor, *, at: Any = None) -> None:
        """
        Args:
            site: what to replace.
            value: by what; see the class.
            at: which tokens; None for all tokens that `value` has. See `Intervention`.

        Raises:
            MechsteerError: `value` has no such site, or is not finite.
        """
        where = Site.of(site)
        if isinstance(value, Activations):
            if where.point not in value:
                raise MechsteerError(
                    f"Replace at {where.point} got activations that do not hold it. "
                    f"Record it: model.run(prompts, record=['{where.point}'])."
                )
        elif not bool(torch.isfinite(value).all()):
            raise MechsteerError(f"Replace at {where} got a value with NaN or infinity. Pass finite numbers.")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "value", value)

    @classmethod
    def _edit(cls, cells: Sequence["Replace"], like: Float[Tensor, "..."]) -> Edit:
        unique = {id(cell.value): cell.value for cell in cells}
        keys = list(unique)
        lookups = [_lookup(value, cells[0].site, like) for value in unique.values()]
        which = None
        if len(keys) > 1:
            index = {key: i for i, key in enumerate(keys)}
            which = torch.tensor([index[id(cell.value)] for cell in cells], device=like.device)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            if which is None:
                return lookups[0](values, rows)
            source = which[rows.cell]
            for i, lookup in enumerate(lookups):
                mine = (source == i).nonzero().squeeze(1)
                if mine.numel():
                    values = values.index_put((mine,), lookup(values[mine], rows[mine]))
            return values

        return edit

    @property
    def placed(self) -> bool:
        return super().placed or isinstance(self.value, Activations)

    def check_model(self, model: "Model") -> None:
        if isinstance(self.value, Activations):
            model.check_same(self.value.model, f"The activations for Replace at {self.site}")
            return
        axes = self._feature_axes
        sizes = [model.size(self.site, axis) for axis in axes]
        got = self.value.shape[-len(axes) :]
        fits = all(size in (given, None) for size, given in zip(sizes, got, strict=False))
        if self.value.ndim not in (len(axes), len(axes) + 1) or not fits:
            shape = ", ".join(f"{axis}={size}" if size else axis for axis, size in zip(axes, sizes, strict=True))
            raise MechsteerError(
                f"Replace at {self.site} got a value of shape {list(self.value.shape)}, but {model.name} has [{shape}] "
                "there. Pass that for all tokens, or [batch, ...] for each example."
            )

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        if not isinstance(self.value, Activations):
            if self.value.ndim > len(self._feature_axes):
                _check_batch(self.value, prompts, "value")
            return
        source = self.value.prompts.to(prompts.tokens.device)
        if len(source) not in (1, len(prompts)):
            raise MechsteerError(
                f"Replace at {self.site} has activations of {len(source)} prompts, and {len(prompts)} are run. "
                "Record as many, in the same order."
            )
        wrong = (
            source.lengths != prompts.lengths if self.at is None else last_touched(self.at, prompts) >= source.lengths
        )
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            raise MechsteerError(
                f"Replace at {self.site}: prompt {row} has {int(prompts.lengths[row])} tokens and the activations "
                f"{int(source.lengths[min(row, len(source) - 1)])}. Align the prompts, or choose tokens with at= that "
                "both have."
            )

    @property
    def _feature_axes(self) -> tuple[str, ...]:
        """Axes of the value of one token."""
        tokens = ("batch", "pos", "dest") if self.site.head is None else ("batch", "pos", "dest", "head")
        return tuple(axis for axis in self.site.axes if axis not in tokens)


def _lookup(value: Activations | Tensor, site: Site, like: Float[Tensor, "..."]) -> Edit:
    """Values of the site for each row, as a function of (present values, rows)."""
    scores = site.axes[-1] == "src"
    if isinstance(value, Tensor):
        constant = value.to(like)

        def from_constant(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            taken = constant if constant.ndim < values.ndim else constant[rows.example]
            return _seen(taken, values, rows) if scores else taken.expand_as(values)

        return from_constant
    recorded = value.select(sites=[site.point]).padded("right")
    prompts, tensor = recorded.prompts, recorded[site.point].to(like)
    lengths = prompts.lengths.to(like.device)

    def from_activations(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
        example = rows.example if len(prompts) > 1 else torch.zeros_like(rows.example)
        position = rows.position.clamp(max=tensor.shape[2 if scores else 1] - 1)
        if scores:
            taken = tensor[example, :, position] if rows.head is None else tensor[example, rows.head, position]
            taken = _seen(taken, values, rows)
        else:
            taken = tensor[example, position] if rows.head is None else tensor[example, position, rows.head]
        beyond = rows.position >= lengths[example]
        if bool(beyond.any()):
            taken = torch.where(beyond.view(-1, *[1] * (values.ndim - 1)), values, taken)
        return taken

    return from_activations


def _seen(scores: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Scores [*row, src] where a token may look, and the present values where it may not: later tokens and padding."""
    n_src = values.shape[-1]
    if scores.shape[-1] not in (1, n_src):
        scores = torch.nn.functional.pad(scores, (0, n_src - scores.shape[-1]))
    visible = torch.arange(n_src, device=values.device) <= rows.position[:, None]
    return torch.where(visible if values.ndim == 2 else visible[:, None], scores, values)


@dataclass(frozen=True, eq=False, init=False)
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
        given = _as_direction(direction, ("resid_pre", 0) if everywhere and site is None else site, "Ablate")
        where = Site("resid_pre", 0) if everywhere else _site_of(site, given, "Ablate")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "direction", given)
        object.__setattr__(self, "basis", given.orthonormal().vectors)
        object.__setattr__(self, "everywhere", everywhere)

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        if not self.everywhere:
            return (self.site.point,)
        writes = [Site(kind, layer) for layer in range(n_layers) for kind in ("attn_out", "mlp_out")]
        return (Site("resid_pre", 0), *writes)

    @classmethod
    def _edit(cls, cells: Sequence["Ablate"], like: Float[Tensor, "..."]) -> Edit:
        unique = {id(cell.direction): cell.basis.to(like) for cell in cells}
        bases = list(unique.values())
        which = None
        if len(bases) > 1:
            index = {key: i for i, key in enumerate(unique)}
            which = torch.tensor([index[id(cell.direction)] for cell in cells], device=like.device)

        def project(values: Float[Tensor, "*rows d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*rows d"]:
            return values - (values @ basis.T) @ basis

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


@dataclass(frozen=True, eq=False, init=False)
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
        object.__setattr__(self, "factor", _number(factor, "factor"))

    @classmethod
    def _edit(cls, cells: Sequence["Scale"], like: Float[Tensor, "..."]) -> Edit:
        factors = stack_numbers([cell.factor for cell in cells], like)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            factor = factors(rows)
            return values * (factor.view(-1, *[1] * (values.ndim - 1)) if isinstance(factor, Tensor) else factor)

        return edit

    def check_model(self, model: "Model") -> None:
        """Any model will do."""

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        _check_batch(self.factor, prompts, "factor")


@dataclass(frozen=True, eq=False, init=False)
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
        table = torch.stack([cell.embeddings.to(like) for cell in cells])

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            return table[rows.cell, rows.slot]

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
