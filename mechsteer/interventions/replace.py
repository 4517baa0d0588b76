"""Activation patching: other values in the place of a site's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention
from mechsteer.interventions.checks import check_batch
from mechsteer.prompts import Prompts
from mechsteer.rows import At, Rows, check_at, last_touched, normalise_at, touched
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Replace(Intervention):
    """Put other values in the place of a site's: activation patching, mean ablation, zero ablation.

    Attributes:
        value: activations recorded on as many prompts of the same lengths (each example and absolute position is
            replaced by its own), or a tensor: [*feature] for all tokens, [batch, *feature] for all tokens of an
            example. The feature axes are those of the site without batch and position, and without head where the site
            names one. Of `pattern` and `attn_scores` that is [head, src], or [head, 1] for all sources; later tokens
            and padding stay hidden, whatever the value.
        src: of `pattern` and `attn_scores`: which source tokens, said as for `at`, which means the destinations there.
            None for all.
    """

    value: Activations | Tensor
    src: At

    def __init__(self, site: SiteLike, value: Activations | Tensor, *, at: Any = None, src: Any = None) -> None:
        """
        Args:
            site: what to replace.
            value: by what; see the class.
            at: which tokens; None for all tokens that `value` has. See `Intervention`.
            src: which source tokens of `pattern` and `attn_scores`; None for all.

        Raises:
            MechsteerError: `value` has no such site, or is not finite, or `src` is given where there are no sources.
        """
        where = Site.of(site)
        if src is not None and where.axes[-1] != "src":
            raise MechsteerError(
                f"Replace at {where} got src={src!r}, but only pattern and attn_scores have source tokens. "
                "Say with at= which tokens are replaced."
            )
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
        object.__setattr__(self, "src", normalise_at(src))

    def _told(self) -> dict[str, Any]:
        return {"value": self.value} | ({} if self.src is None else {"src": self.src})

    @classmethod
    def _edit(cls, cells: Sequence["Replace"], like: Float[Tensor, "..."]) -> Edit:
        if any(cell.src is not None for cell in cells):
            return _of_sources([cell.src for cell in cells], cls._whole(cells, like))
        return cls._whole(cells, like)

    @classmethod
    def _whole(cls, cells: Sequence["Replace"], like: Float[Tensor, "..."]) -> Edit:
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
        check_at(self.src, prompts, what=f"Replace at {self.site} with src={self.src!r}", n_new=n_new)
        if not isinstance(self.value, Activations):
            if self.value.ndim > len(self._feature_axes):
                check_batch(self.value, prompts, "value")
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


def _of_sources(srcs: Sequence[At], edit: Edit) -> Edit:
    """An edit of scores [row, *head, src] that leaves all but each cell's own source tokens as they are."""
    unique = list(dict.fromkeys(srcs))
    which = torch.tensor([unique.index(src) for src in srcs])
    masks: dict[int, Bool[Tensor, "unique example src"]] = {}

    def chosen(rows: Rows, n_src: int) -> Bool[Tensor, "unique example src"]:
        device, n = rows.position.device, len(rows.prompts)
        position = torch.arange(n_src, device=device).repeat(n)
        tokens = Rows(
            rows.prompts,
            torch.arange(n, device=device).repeat_interleave(n_src),
            position,
            torch.zeros_like(position),
        )
        each = [touched([src], tokens) for src in unique]
        return torch.stack(
            [(torch.ones_like(position, dtype=torch.bool) if mask is None else mask).view(n, n_src) for mask in each]
        )

    def masked(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
        n_src = values.shape[-1]
        if n_src not in masks:
            masks[n_src] = chosen(rows, n_src)
        mask = masks[n_src][which.to(rows.cell.device)[rows.cell], rows.example]
        return torch.where(mask if values.ndim == 2 else mask[:, None], edit(values, rows), values)

    return masked


def _seen(scores: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Scores [*row, src] where a token may look, and the present values where it may not: later tokens and padding."""
    n_src = values.shape[-1]
    if scores.shape[-1] not in (1, n_src):
        scores = torch.nn.functional.pad(scores, (0, n_src - scores.shape[-1]))
    visible = torch.arange(n_src, device=values.device) <= rows.position[:, None]
    return torch.where(visible if values.ndim == 2 else visible[:, None], scores, values)
