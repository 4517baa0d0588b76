"""What all interventions have in common, and the TransformerLens hooks that apply them.

Each intervention says in `_edit` how it changes the activations of some tokens, given as rows [row, ...] of one or of
many cells. Hooks, generation and the sweep engine all call that one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import Activations
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts
from mechsteer.rows import At, Rows, check_at, touched
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

Edit = Callable[[Tensor, Rows], Tensor]
Hooks = Sequence[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True, eq=False, repr=False)
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
    def _edit(cls, cells: Sequence[Any], like: Float[Tensor, "..."]) -> Edit:
        """The change that each cell's intervention makes, as one function of (values [row, *feature], rows).

        Args:
            cells: interventions of this class, one per cell; rows say which cell they belong to.
            like: gives dtype and device.
        """

    @property
    def placed(self) -> bool:
        """Whether it does something else to different tokens of a prompt."""
        return self.at is not None

    @abstractmethod
    def check_model(self, model: "Model") -> None:
        """Raise `MechsteerError` unless values fit the model."""

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        """Raise `MechsteerError` unless values fit the prompts, and it touches some token.

        Args:
            prompts: right-padded.
            n_new: tokens that will be generated after each prompt.
        """
        check_at(self.at, prompts, what=f"{type(self).__name__} at {self.site}", n_new=n_new)

    def fwd_hooks(
        self, model: "Model", prompts: Prompts | None = None, *, n_new: int = 0
    ) -> list[tuple[str, Callable[..., Any]]]:
        """Plain TransformerLens hooks; see `fwd_hooks`, which takes several interventions."""
        return fwd_hooks([self], model, prompts, n_new=n_new)

    def _told(self) -> dict[str, Any]:
        """What a repr says of it besides where it acts."""
        names = (each.name for each in fields(self) if each.repr and each.name not in ("site", "at"))
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        at = {} if self.at is None else {"at": self.at}
        return markup.told(type(self).__name__, {"site": self.site} | self._told() | at)

    def _repr_html_(self) -> str:
        rows: dict[str, Any] = {
            "site": markup.code(self.site),
            "tokens": "all" if self.at is None else markup.brief(self.at),
        }
        for name, value in self._told().items():
            if isinstance(value, Direction):
                rows |= value.told()
            else:
                rows[name] = markup.code(markup.brief(value))
        return markup.card(type(self).__name__, markup.facts(rows), about=markup.says(self))


class Column:
    """One intervention of each cell, all of one class at hook points of one name, as one edit of packed rows."""

    def __init__(self, cells: Sequence[Intervention]) -> None:
        self.cells = cells
        # By device, because one column can act in layers on several; with the head of each cell.
        self._edits: dict[torch.device, tuple[Edit, Tensor | None]] = {}

    def __call__(self, x: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
        """`x` after the edit; out of place."""
        if x.device not in self._edits:
            heads = None
            if self.cells[0].site.head is not None:
                heads = torch.tensor([cell.site.head for cell in self.cells], device=x.device)
            self._edits[x.device] = type(self.cells[0])._edit(self.cells, x), heads
        edit, heads = self._edits[x.device]
        keep = touched([cell.at for cell in self.cells], rows)
        if keep is None and heads is None:
            return edit(x, rows)
        index = torch.arange(x.shape[0], device=x.device) if keep is None else keep.nonzero().squeeze(1)
        if not index.numel():
            return x
        chosen = rows[index]
        where: tuple[Tensor, ...] = (index,)
        if heads is not None:
            head = heads[chosen.cell]
            chosen, where = chosen.with_head(head), (index, head)
        return x.index_put(where, edit(x[where], chosen))


def columns_of(cells: Sequence[Sequence[Intervention]], n_layers: int) -> dict[Site, list[Column]]:
    """The edits of each hook point, in the order of the interventions.

    Args:
        cells: the interventions of each cell; those in one place are of one class at hook points of one name.
        n_layers: of the model.
    """
    columns: dict[Site, list[Column]] = {}
    for place, first in enumerate(cells[0]):
        column = Column([cell[place] for cell in cells])
        for site in first.sites(n_layers):
            columns.setdefault(site, []).append(column)
    return columns


def check(interventions: Sequence[Intervention], model: "Model", prompts: Prompts | None, *, n_new: int = 0) -> None:
    """Refuse interventions that do not fit the model or the prompts, or that would never fire.

    Args:
        interventions: any number; those that share a value, a site or a rule are checked once.
        model: what they will run on.
        prompts: right-padded; None where they are not known yet.
        n_new: tokens that will be generated after each prompt.

    Raises:
        MechsteerError: with what was passed, what was expected and what to do.
    """
    seen: set[Any] = set()
    for each in interventions:
        if each.site not in seen:
            seen.add(each.site)
            model.check_site(each.site)
            for site in each.sites(model.n_layers):
                model.check_edit(site)
        values = (
            type(each),
            each.site.kind,
            each.site.head is None,
            *(id(v) for v in vars(each).values() if _is_value(v)),
        )
        if values not in seen:
            seen.add(values)
            each.check_model(model)
        if prompts is not None and (*values, each.at) not in seen:
            seen.add((*values, each.at))
            each.check_prompts(prompts, n_new=n_new)


def _is_value(value: object) -> bool:
    return isinstance(value, Tensor | Direction | Activations)


def fwd_hooks(
    interventions: Sequence[Intervention], model: "Model", prompts: Prompts | None = None, *, n_new: int = 0
) -> list[tuple[str, Callable[..., Any]]]:
    """Plain TransformerLens hooks for several interventions, in the order given.

        hooked.run_with_hooks(tokens, fwd_hooks=ms.fwd_hooks([Add(v, 4.0)], model, prompts))

        with hooked.hooks(fwd_hooks=ms.fwd_hooks([Add(v, 4.0, at="completion")], model, prompts, n_new=20)):
            hooked.generate(prompts.tokens, max_new_tokens=20)

    The hooks count the tokens that they have seen, so that positions stay absolute when a KV cache hands them one token
    at a time: except on the first call, one token goes on after those before, and several start a new pass.
    `HookedTransformer.generate` does not run `hook_embed`, so what acts there (`SoftPrefix`) needs `Model.generate`.

    Args:
        interventions: any number; where two change the same hook point, the first goes first.
        model: checked against.
        prompts: the tokens that will be run, in the same layout; None for tokens without padding, where all of them
            count as the user's.
        n_new: tokens that will be generated after each prompt.

    Returns:
        (hook name, hook) pairs for `run_with_hooks(fwd_hooks=...)` or `model.hooks(fwd_hooks=...)`.

    Raises:
        MechsteerError: an intervention does not fit the model or the prompts, or would never fire. Without `prompts`
            the hooks raise what depends on them when they are run.
    """
    right = None if prompts is None else prompts.padded("right")
    if right is not None:
        model.check_slots(right, interventions)
    check(interventions, model, right, n_new=n_new)
    columns = columns_of([interventions], model.n_layers)
    return _named([(point, Hook(point, edits, model, prompts, n_new=n_new)) for point, edits in columns.items()], model)


def stacked_hooks(
    columns: Mapping[Site, Sequence[Column]],
    model: "Model",
    *,
    base: Prompts,
    items: Prompts,
    example: Int[Tensor, " item"],
    cell: Int[Tensor, " item"],
) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks for a batch of items, each of which is one cell on one of the prompts `base`.

    Args:
        columns: what to do at each hook point.
        model: that the hooks are for.
        base: right-padded; what examples and spans refer to.
        items: the batch that is run, right-padded.
        example: index into `base` of each item.
        cell: index into the columns' cells of each item.
    """
    more = {"base": base, "example": example, "cell": cell}
    return _named([(point, Hook(point, edits, model, items, **more)) for point, edits in columns.items()], model)


def _named(hooks: Sequence[tuple[Site, "Hook"]], model: "Model") -> list[tuple[str, Callable[..., Any]]]:
    """Hooks by the names of their hook points.

    A bridge's `hook_resid_mid` is the input of the MLP's norm alone: what a hook changes there never reaches the
    residual stream. So that the site means the same everywhere, its edits move to `attn_out`, the other addend.
    """
    plain: list[tuple[str, Callable[..., Any]]] = []
    moved: list[tuple[str, Callable[..., Any]]] = []
    for point, hook in hooks:
        if point.kind == "resid_mid" and model.backend == "bridge":
            edit = _Moved(hook)
            moved += [
                (Site("resid_pre", point.layer).hook_name, edit.keep),
                (Site("attn_out", point.layer).hook_name, edit),
            ]
        else:
            plain.append((point.hook_name, hook))
    return [*plain, *moved]


class _Moved:
    """A hook at `attn_out` with the effect of another on `resid_pre + attn_out`; `keep` is its hook at `resid_pre`."""

    def __init__(self, inner: "Hook") -> None:
        self._inner = inner
        self._resid_pre: list[Tensor] = []

    @property
    def fired(self) -> bool:
        return self._inner.fired

    def keep(self, tensor: Float[Tensor, "..."], hook: Any = None) -> None:
        self._resid_pre = [tensor]

    def __call__(self, tensor: Float[Tensor, "*shape"], hook: Any = None) -> Float[Tensor, "*shape"]:
        resid_pre = self._resid_pre.pop()
        return self._inner(resid_pre + tensor) - resid_pre


def with_recorders(edits: Hooks, recorders: Hooks) -> list[tuple[str, Callable[..., Any]]]:
    """Both as one list, in which each recorder comes after the edits of its own site."""
    # What moved to `attn_out` belongs to `resid_mid`, which follows.
    moved = [pair for pair in edits if isinstance(pair[1], _Moved)]
    return [*(pair for pair in edits if not isinstance(pair[1], _Moved)), *recorders, *moved]


def never_fired(edits: Hooks) -> list[str]:
    """Names of the hook points that were not run."""
    return [name for name, hook in edits if isinstance(hook, Hook | _Moved) and not hook.fired]


class Hook:
    """A TransformerLens hook: turns [batch, pos, ...] or [batch, head, dest, src] into rows, edits them, turns back."""

    def __init__(
        self,
        point: Site,
        columns: Sequence[Column],
        model: "Model",
        prompts: Prompts | None,
        *,
        base: Prompts | None = None,
        example: Int[Tensor, " item"] | None = None,
        cell: Int[Tensor, " item"] | None = None,
        n_new: int = 0,
    ) -> None:
        self.fired: bool = False
        self._point, self._scores = point, point.axes[-1] == "src"
        self._columns = columns
        self._given, self._n_new = prompts, n_new
        self._prompts: Prompts | None = None
        self._base, self._example, self._cell = base, example, cell
        self._seen = 0
        # A HookedTransformer norms queries, keys and values apart: three calls are about the same tokens.
        self._n_calls = 3 if point.kind.startswith("ln1") and model.backend == "hooked_transformer" else 1
        self._calls = 0

    def __call__(self, tensor: Float[Tensor, "*shape"], hook: Any = None) -> Float[Tensor, "*shape"]:
        self.fired = True
        if self._point.kind == "attn_scores":
            # What causality hides (-inf) stays hidden, whatever the edit makes of it.
            hidden = tensor.isneginf()
            return self._edited(tensor.masked_fill(hidden, 0)).masked_fill(hidden, -torch.inf)
        return self._edited(tensor)

    def _edited(self, tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
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
        example = item if self._example is None else self._example.to(x.device)[item]
        cell = torch.zeros_like(item) if self._cell is None else self._cell.to(x.device)[item]
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
        self._calls += 1
        if prompts is not None and self._calls % self._n_calls != 1 % self._n_calls:
            return prompts
        # A KV cache hands on one token at a time.
        if prompts is None or width > 1 or batch != len(prompts):
            self._prompts = prompts = self._start(batch, width, device)
            self._seen = 0
        self._seen += width
        return prompts

    def _start(self, batch: int, width: int, device: torch.device) -> Prompts:
        """A new pass over prompts, with or without tokens that were generated since."""
        # Values are looked up anew, because an optimiser may have changed them since the last pass.
        self._columns = [Column(column.cells) for column in self._columns]
        prompts = self._prompts if self._given is None else self._given
        if prompts is None or len(prompts) != batch or not 0 <= width - prompts.tokens.shape[1] <= self._n_new:
            prompts = self._others(prompts, batch, width)
        prompts = prompts.to(device)
        self._right = prompts.padded("right") if self._base is None else self._base.to(device)
        return prompts

    def _others(self, prompts: Prompts | None, batch: int, width: int) -> Prompts:
        """Prompts other than those of the last pass, where the hook was made for any."""
        if self._given is not None:
            raise MechsteerError(
                f"The hooks were made for prompts of shape {list(self._given.tokens.shape)} and {self._n_new} new "
                f"tokens, and got activations of {batch} by {width} tokens. Make them with the prompts that are run."
            )
        each = [each for column in self._columns for each in column.cells]
        # Narrower can mean a shorter prompt, or that several tokens go on after a prefix in a KV cache.
        if prompts is not None and width < prompts.tokens.shape[1] and any(one.placed for one in each):
            raise MechsteerError(
                f"The hooks at {self._point} depend on positions; they were used on {prompts.tokens.shape[1]} tokens "
                f"and now get {width}. Make new hooks for other prompts."
            )
        prompts = Prompts.from_ids(torch.zeros(batch, width, dtype=torch.long))
        for one in each:
            one.check_prompts(prompts, n_new=self._n_new)
        return prompts

    def _shift(
        self, x: Float[Tensor, "batch dest head src"], prompts: Prompts, sign: int
    ) -> Float[Tensor, "batch dest head src"]:
        """Turn the source axis of [batch, dest, head, src] so that sources are absolute (-1), or back (1)."""
        if prompts.padding_side == "right":
            return x
        pad = prompts.tokens.shape[1] - prompts.lengths
        index = (torch.arange(x.shape[-1], device=x.device)[None] - sign * pad[:, None]) % x.shape[-1]
        return x.gather(-1, index[:, None, None].expand_as(x))
