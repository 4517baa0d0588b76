"""Interventions: what is done to an activation, where, and how strongly. Frozen values, all of one kind.

Each class says in `_edit` how it changes the activations of some tokens, given as rows [row, ...] of one or of many
cells. Hooks, generation and the sweep engine all call that one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts
from mechsteer.rows import At, Rows, check_at, normalise_at, stack_numbers, touched
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model

Edit = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """A change of the activations at a site. Use `Add`, `Replace`, `Ablate`, `Scale` or `SoftPrefix`.

    Attributes:
        site: where; its head, where it has one, is the only one changed.
        at: which tokens: None for all (BOS and generated ones too), absolute positions, or the name of a span of the
            prompts ("prefix", "user", "completion", "scaffold", "slots"). Generated tokens are of the completion.
    """

    site: Site
    at: At

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        """The hook points that it changes in a model of `n_layers` blocks."""
        return (self.site.point,)

    @property
    def layer(self) -> int:
        """The earliest layer that it touches; -1 before the first."""
        return self.site.order[0]

    @classmethod
    @abstractmethod
    def _edit(cls, cells: Sequence[Any], like: Tensor) -> Edit:
        """The change that each cell's intervention makes, as one function of (values [row, *feature], rows).

        Args:
            cells: interventions of this class, one per cell; rows say which cell they belong to.
            like: gives dtype and device.
        """

    def _check(self, model: "Model", prompts: Prompts) -> None:
        """Refuse values that do not fit the model or the prompts."""

    def fwd_hooks(self, model: "Model", prompts: Prompts | None = None) -> list[tuple[str, Callable[..., Tensor]]]:
        """Plain TransformerLens hooks; see `fwd_hooks`, which takes several interventions."""
        return fwd_hooks([self], model, prompts)


def _site_of(site: SiteLike | None, direction: Direction | None, name: str) -> Site:
    if site is None and direction is None:
        raise MechsteerError(f"{name} got a tensor without a site. Pass site=('resid_post', layer), or a Direction.")
    return Site.of(site) if site is not None else direction.site  # type: ignore[union-attr]


def _number(value: float | Tensor, name: str) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return float(value)
        if value.ndim > 1:
            raise MechsteerError(f"{name} has shape {tuple(value.shape)}. Pass one number, or one per example [batch].")
        if not bool(torch.isfinite(value).all()):
            raise MechsteerError(f"{name} holds NaN or infinity. Pass finite numbers.")
        return value
    number = float(value)
    if number != number or abs(number) == float("inf"):
        raise MechsteerError(f"{name}={number} is not finite. Pass finite numbers.")
    return number


def _check_batch(value: float | Tensor, prompts: Prompts, name: str) -> None:
    if isinstance(value, Tensor) and value.shape[0] != len(prompts):
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
        alpha: float | Float[Tensor, " batch"] = 1.0,
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
            raise MechsteerError(f"Add got {given.vectors.shape[0]} vectors and adds one. Pass them to Ablate, or pick one.")
        where = _site_of(site, given, "Add")
        object.__setattr__(self, "site", where)
        object.__setattr__(self, "at", normalise_at(at, where.pos))
        object.__setattr__(self, "direction", given)
        object.__setattr__(self, "alpha", _number(alpha, "alpha"))

    @classmethod
    def _edit(cls, cells: Sequence["Add"], like: Tensor) -> Edit:
        alphas = stack_numbers([cell.alpha for cell in cells], like)
        vectors, which = _stack_unique([cell.direction.vectors[0] for cell in cells], like)

        def edit(values: Tensor, rows: Rows) -> Tensor:
            alpha = alphas(rows)
            if isinstance(alpha, Tensor):
                alpha = alpha.view(-1, *[1] * (values.ndim - 1))
            if which is None:
                return torch.addcmul(values, alpha, vectors[0]) if isinstance(alpha, Tensor) else values + alpha * vectors[0]
            added = vectors[which[rows.cell]].view(-1, *[1] * (values.ndim - 2), values.shape[-1])
            return values + alpha * added

        return edit

    def _check(self, model: "Model", prompts: Prompts) -> None:
        self.direction.check_fits(model)
        model.check_width(self.site, self.direction.vectors.shape[-1], "Add")
        _check_batch(self.alpha, prompts, "alpha")

    def to_weights(self, model: "Model") -> "Model":
        """A copy of the model with the vector added for good: the MLP output bias of the block gains `alpha * v`.

        Raises:
            MechsteerError: that is not the same function, because it is not added to `resid_post` (or `mlp_out`) at all
                tokens of all examples, or because the architecture has a norm after the MLP.
        """
        if self.site.kind not in ("resid_post", "mlp_out") or self.at is not None or isinstance(self.alpha, Tensor):
            raise MechsteerError(
                f"{self!r} has no equal in the weights: only one alpha at resid_post or mlp_out at all tokens has. "
                "Use it as an intervention."
            )
        self._check(model, Prompts.from_ids([[0]]))
        assert self.site.layer is not None
        return model.with_bias(self.site.layer, self.alpha * self.direction.vectors[0])


def _stack_unique(vectors: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
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
            names one.
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
    def _edit(cls, cells: Sequence["Replace"], like: Tensor) -> Edit:
        unique = {id(cell.value): cell.value for cell in cells}
        keys = list(unique)
        lookups = [_lookup(value, cells[0].site, like) for value in unique.values()]
        which = None
        if len(keys) > 1:
            index = {key: i for i, key in enumerate(keys)}
            which = torch.tensor([index[id(cell.value)] for cell in cells], device=like.device)

        def edit(values: Tensor, rows: Rows) -> Tensor:
            if which is None:
                return lookups[0](values, rows)
            source = which[rows.cell]
            for i, lookup in enumerate(lookups):
                mine = (source == i).nonzero().squeeze(1)
                if mine.numel():
                    values = values.index_put((mine,), lookup(values[mine], rows[mine]))
            return values

        return edit

    def _check(self, model: "Model", prompts: Prompts) -> None:
        if not isinstance(self.value, Activations):
            n_feature = len(self.site.axes) - 2 - (self.site.head is not None)
            if self.value.ndim not in (n_feature, n_feature + 1):
                raise MechsteerError(
                    f"Replace at {self.site} got a value of shape {tuple(self.value.shape)}. "
                    f"Pass {n_feature} axes for all tokens, or [batch, ...] for each example."
                )
            if n_feature and self.site.axes[-1] != "src":
                model.check_width(self.site, self.value.shape[-1], "Replace")
            if self.value.ndim > n_feature:
                _check_batch(self.value, prompts, "value")
            return
        model.check_same(self.value.model, f"The activations for Replace at {self.site}")
        source = self.value.prompts
        if len(source) not in (1, len(prompts)):
            raise MechsteerError(
                f"Replace at {self.site} has activations of {len(source)} prompts, and {len(prompts)} are run. "
                "Record as many, in the same order."
            )
        short = (source.lengths != prompts.lengths).nonzero()
        if self.at is None and len(short):
            row = int(short[0, 0])
            raise MechsteerError(
                f"Replace at {self.site}: prompt {row} has {int(prompts.lengths[row])} tokens and the activations "
                f"{int(source.lengths[min(row, len(source) - 1)])}. Align the prompts, or choose tokens with at=."
            )


def _lookup(value: Activations | Tensor, site: Site, like: Tensor) -> Edit:
    """Values of the site for each row, as a function of (present values, rows)."""
    if isinstance(value, Tensor):
        constant = value.to(like)

        def from_constant(values: Tensor, rows: Rows) -> Tensor:
            return (constant if constant.ndim < values.ndim else constant[rows.example]).expand_as(values)

        return from_constant
    prompts, tensor = value.padded("right").prompts, value.padded("right")[site.point].to(like)
    lengths = prompts.lengths.to(like.device)
    scores = site.axes[-1] == "src"

    def from_activations(values: Tensor, rows: Rows) -> Tensor:
        example = rows.example if len(prompts) > 1 else torch.zeros_like(rows.example)
        position = rows.position.clamp(max=tensor.shape[2 if scores else 1] - 1)
        if scores:
            head = slice(None) if rows.head is None else rows.head
            taken = tensor[example, head, position] if rows.head is not None else tensor[example, :, position]
            n_src = values.shape[-1]
            taken = torch.nn.functional.pad(taken, (0, max(0, n_src - taken.shape[-1])))[..., :n_src]
        else:
            taken = tensor[example, position] if rows.head is None else tensor[example, position, rows.head]
        beyond = rows.position >= lengths[example]
        if bool(beyond.any()):
            taken = torch.where(beyond.view(-1, *[1] * (values.ndim - 1)), values, taken)
        return taken

    return from_activations


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
    basis: Tensor = field(repr=False)
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
    def _edit(cls, cells: Sequence["Ablate"], like: Tensor) -> Edit:
        unique = {id(cell.direction): cell.basis.to(like) for cell in cells}
        bases = list(unique.values())
        which = None
        if len(bases) > 1:
            index = {key: i for i, key in enumerate(unique)}
            which = torch.tensor([index[id(cell.direction)] for cell in cells], device=like.device)

        def project(values: Tensor, basis: Tensor) -> Tensor:
            return values - (values @ basis.T) @ basis

        def edit(values: Tensor, rows: Rows) -> Tensor:
            if which is None:
                return project(values, bases[0])
            mine_of = which[rows.cell]
            for i, basis in enumerate(bases):
                mine = (mine_of == i).nonzero().squeeze(1)
                if mine.numel():
                    values = values.index_put((mine,), project(values[mine], basis))
            return values

        return edit

    def _check(self, model: "Model", prompts: Prompts) -> None:
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
                f"{self!r} has no equal in the weights: Ablate(direction, everywhere=True) at all tokens has. "
                "Use it as an intervention."
            )
        self._check(model, Prompts.from_ids([[0]]))
        return model.orthogonalised(self.basis)


@dataclass(frozen=True, eq=False, init=False)
class Scale(Intervention):
    """Multiply a site's values, such as one head's output, by a factor.

    Attributes:
        factor: one number, or one per example [batch].
    """

    factor: float | Tensor

    def __init__(self, site: SiteLike, factor: float | Float[Tensor, " batch"], *, at: Any = None) -> None:
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
    def _edit(cls, cells: Sequence["Scale"], like: Tensor) -> Edit:
        factors = stack_numbers([cell.factor for cell in cells], like)

        def edit(values: Tensor, rows: Rows) -> Tensor:
            factor = factors(rows)
            return values * (factor.view(-1, *[1] * (values.ndim - 1)) if isinstance(factor, Tensor) else factor)

        return edit

    def _check(self, model: "Model", prompts: Prompts) -> None:
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
    def _edit(cls, cells: Sequence["SoftPrefix"], like: Tensor) -> Edit:
        table = torch.stack([cell.embeddings.to(like) for cell in cells])

        def edit(values: Tensor, rows: Rows) -> Tensor:
            return table[rows.cell, rows.slot]

        return edit

    def _check(self, model: "Model", prompts: Prompts) -> None:
        model.check_width(self.site, self.embeddings.shape[-1], "SoftPrefix")
        slots = prompts.slots.sum(1)
        if bool((slots != self.embeddings.shape[0]).any()):
            row = int((slots != self.embeddings.shape[0]).nonzero()[0, 0])
            raise MechsteerError(
                f"SoftPrefix has {self.embeddings.shape[0]} embeddings, but prompt {row} reserves {int(slots[row])} "
                "slots. Build the prompts with slots= that many."
            )


class Column:
    """One intervention of each cell, all of one class at hook points of one name, as one edit of packed rows."""

    def __init__(self, cells: Sequence[Intervention]) -> None:
        self.cells = cells
        self._edit: Edit | None = None
        self._heads: Tensor | None = None

    def __call__(self, x: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
        """`x` after the edit; out of place."""
        if self._edit is None:
            self._edit = type(self.cells[0])._edit(self.cells, x)
            if self.cells[0].site.head is not None:
                self._heads = torch.tensor([cell.site.head for cell in self.cells], device=x.device)
        keep = touched([cell.at for cell in self.cells], rows)
        if keep is None and self._heads is None:
            return self._edit(x, rows)
        index = torch.arange(x.shape[0], device=x.device) if keep is None else keep.nonzero().squeeze(1)
        if not index.numel():
            return x
        chosen = rows[index]
        where: tuple[Tensor, ...] = (index,)
        if self._heads is not None:
            chosen = chosen.with_head(self._heads[chosen.cell])
            where = (index, chosen.head)  # type: ignore[assignment]
        return x.index_put(where, self._edit(x[where], chosen))


def check(interventions: Sequence[Intervention], model: "Model", prompts: Prompts, *, n_new: int = 0) -> None:
    """Refuse interventions that do not fit the model or the prompts, or that would never fire.

    Args:
        interventions: any number; those that share a value, a site or a rule are checked once.
        model: what they will run on.
        prompts: right-padded.
        n_new: tokens that will be generated after each prompt.

    Raises:
        MechsteerError: with what was passed, what was expected and what to do.
    """
    seen: set[Any] = set()
    for each in interventions:
        name = type(each).__name__
        if each.site not in seen:
            seen.add(each.site)
            for site in each.sites(model.n_layers):
                model.check_site(site)
            model.check_site(each.site)
        if (name, each.at) not in seen:
            seen.add((name, each.at))
            check_at(each.at, prompts, what=f"{name} at {each.site}", n_new=n_new)
        values = (name, each.site.kind, each.at is None, *(id(v) for v in vars(each).values() if _is_value(v)))
        if values not in seen:
            seen.add(values)
            each._check(model, prompts)


def _is_value(value: object) -> bool:
    return isinstance(value, Tensor | Direction | Activations)


def fwd_hooks(
    interventions: Sequence[Intervention], model: "Model", prompts: Prompts | None = None
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Plain TransformerLens hooks for several interventions, in the order given.

        hooked.run_with_hooks(tokens, fwd_hooks=ms.fwd_hooks([Add(v, 4.0)], model, prompts))

    The hooks count the tokens that they have seen, so that positions stay absolute when a KV cache hands them one token
    at a time: a call as wide as the first starts a new pass, a narrower one continues it.

    Args:
        interventions: any number; where two change the same hook point, the first goes first.
        model: checked against.
        prompts: the tokens that will be run, in the same layout; None for tokens without padding, where all of them
            count as prompt.

    Returns:
        (hook name, hook) pairs for `run_with_hooks(fwd_hooks=...)` or `model.hooks(fwd_hooks=...)`.
    """
    if prompts is not None:
        check(interventions, model, prompts.padded("right"))
    by_point: dict[Site, list[Intervention]] = {}
    for each in interventions:
        for point in each.sites(model.n_layers):
            by_point.setdefault(point, []).append(each)
    hooks = [(point, _Hook(point, [Column([each]) for each in edits], prompts)) for point, edits in by_point.items()]
    return _named(hooks, model)


def stacked_hooks(
    columns: Mapping[Site, Sequence[Column]],
    model: "Model",
    *,
    base: Prompts,
    items: Prompts,
    example: Int[Tensor, " item"],
    cell: Int[Tensor, " item"],
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks for a batch of items, each of which is one cell on one of the prompts `base`.

    Args:
        columns: what to do at each hook point.
        model: that the hooks are for.
        base: right-padded; what examples and spans refer to.
        items: the batch that is run, right-padded.
        example: index into `base` of each item.
        cell: index into the columns' cells of each item.
    """
    return _named([(point, _Hook(point, edits, items, base, example, cell)) for point, edits in columns.items()], model)


def _named(
    hooks: Sequence[tuple[Site, Callable[..., Tensor]]], model: "Model"
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks by the names of their hook points.

    A bridge's `hook_resid_mid` is the input of the MLP's norm alone: what a hook changes there never reaches the
    residual stream. So that the site means the same everywhere, its edits move to `attn_out`, the other addend.
    """
    named: list[tuple[str, Callable[..., Any]]] = []
    moved: list[tuple[str, Callable[..., Any]]] = []
    for point, hook in hooks:
        if point.kind == "resid_mid" and model.backend == "bridge":
            keep, edit = _through_attn_out(hook)
            moved += [(Site("resid_pre", point.layer).hook_name, keep), (Site("attn_out", point.layer).hook_name, edit)]
        else:
            named.append((point.hook_name, hook))
    return [*named, *moved]


def _through_attn_out(hook: Callable[..., Tensor]) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """Hooks at `resid_pre` and `attn_out` that have the effect of `hook` on their sum."""
    held: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any = None) -> None:
        held[:] = [tensor]

    def edit(attn_out: Tensor, hook: Any = None, *, inner: Callable[..., Tensor] = hook) -> Tensor:
        resid_pre = held.pop()
        return inner(resid_pre + attn_out) - resid_pre

    return keep, edit


class _Hook:
    """A TransformerLens hook: turns [batch, pos, ...] or [batch, head, dest, src] into rows, edits them, turns back."""

    def __init__(
        self,
        point: Site,
        columns: Sequence[Column],
        prompts: Prompts | None,
        base: Prompts | None = None,
        example: Tensor | None = None,
        cell: Tensor | None = None,
    ) -> None:
        self._scores = point.axes[-1] == "src"
        self._columns = columns
        self._given = self._prompts = prompts
        self._base, self._example, self._cell = base, example, cell
        self._seen = self._width = 0

    def __call__(self, tensor: Tensor, hook: Any = None) -> Tensor:
        x = tensor.transpose(1, 2) if self._scores else tensor
        batch, width = x.shape[:2]
        prompts = self._advance(batch, width, x.device)
        first, total = self._seen - width, prompts.tokens.shape[1]
        # Absolute position of each column; columns after the prompts hold generated tokens.
        given = prompts.positions[:, first:total]
        column = torch.arange(first, self._seen, device=x.device).expand(batch, width)
        new = prompts.lengths[:, None] + column[:, given.shape[1] :] - total
        position = torch.cat([given, new], 1).reshape(-1)
        x = self._shift(x, prompts, -1) if self._scores else x
        real = (position >= 0).nonzero().squeeze(1)
        item = torch.arange(batch, device=x.device).repeat_interleave(width)[real]
        example = item if self._example is None else self._example[item]
        cell = torch.zeros_like(item) if self._cell is None else self._cell[item]
        rows = Rows(self._right, example, position[real], cell)
        flat = x.reshape(batch * width, *x.shape[2:])
        values = flat[real]
        for column_edit in self._columns:
            values = column_edit(values, rows)
        out = flat.index_put((real,), values).reshape(x.shape)
        return self._shift(out, prompts, 1).transpose(1, 2) if self._scores else out

    def _advance(self, batch: int, width: int, device: torch.device) -> Prompts:
        """The prompts that are run; counts the columns that have been seen."""
        prompts = self._prompts
        if self._given is None and (prompts is None or width >= self._width or len(prompts) != batch):
            self._prompts = prompts = Prompts.from_ids(torch.zeros(batch, width, dtype=torch.long))
            self._seen = 0
        assert prompts is not None
        if self._given is not None and width >= prompts.tokens.shape[1]:
            self._seen = 0
        if self._seen == 0:
            self._width = width
            self._prompts = prompts = prompts.to(device)
            self._right = prompts.padded("right") if self._base is None else self._base
            if tuple(prompts.tokens.shape) != (batch, width):
                raise MechsteerError(
                    f"The hooks were made for prompts of shape {tuple(prompts.tokens.shape)} and got activations of "
                    f"{batch} by {width} tokens. Make them with the prompts that are run."
                )
        self._seen += width
        return prompts

    def _shift(self, x: Tensor, prompts: Prompts, sign: int) -> Tensor:
        """Turn the source axis of [batch, dest, head, src] so that sources are absolute (-1), or back (1)."""
        if prompts.padding_side == "right":
            return x
        pad = prompts.tokens.shape[1] - prompts.lengths
        index = (torch.arange(x.shape[-1], device=x.device)[None] - sign * pad[:, None]) % x.shape[-1]
        return x.gather(-1, index[:, None, None].expand_as(x))
