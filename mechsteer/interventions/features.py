"""SAE features set to values, with everything that the autoencoder does not explain left as it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention
from mechsteer.precision import precise, wide
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows, last_touched, normalise_at

if TYPE_CHECKING:
    from mechsteer.model import Model

MODES = ("clamp", "add", "scale")
# Features of a cell up to which each token gets its own copy of their decoder rows.
_FEW = 4


@dataclass(frozen=True, eq=False, init=False, repr=False)
class SetFeature(Intervention):
    """Set, raise or multiply the activation of SAE features, and keep the autoencoder's error.

        x' = x + s(x) * sum_i (f'_i - f_i(x)) * decoder_i           f'_i = value, f_i + value, or f_i * value

    With x_hat(f) the decoder's output for features f, that is x_hat(f') + (x - x_hat(f)): what the autoencoder does not
    reconstruct stays (Marks et al. 2024, "Sparse feature circuits", section 2; Templeton et al. 2024, "Scaling
    monosemanticity", methods of feature steering). s(x) is 1 unless the autoencoder normalises each token. Where a
    feature has its value already nothing changes.

        ms.SetFeature(sae, 517, 8.0)                              # clamp, at all tokens
        ms.SetFeature(sae, [517, 91], 0.0, at="completion")       # both off
        ms.SetFeature(sae, 517, 2.0, mode="scale")

    Attributes:
        sae: the autoencoder, whose site it acts at.
        features: their numbers.
        values: [example, pos, feature], where an axis of 1 stands for all.
        mode: "clamp", "add" or "scale".
    """

    sae: SparseAutoencoder
    features: tuple[int, ...]
    values: Float[Tensor, "example pos feature"]
    mode: str
    decoder: Float[Tensor, "all_features d_in"] = field(repr=False)

    def __init__(
        self,
        sae: SparseAutoencoder,
        feature: int | Sequence[int],
        value: float | int | Sequence[float] | Tensor,
        *,
        mode: str = "clamp",
        at: Any = None,
    ) -> None:
        """
        Args:
            sae: from `load_sae`.
            feature: a feature's number, or several.
            value: in units of the features' activations; a factor with mode="scale". One number; for several features
                one for each [feature]; for one feature one for each example [batch]; or a tensor with an axis for each:
                [batch, feature], [batch, pos, feature] with absolute positions. An axis of size 1 stands for all.
            mode: "clamp" to the value, "add" it, or "scale" by it.
            at: which tokens; see `Intervention`.

        Raises:
            MechsteerError: no such feature or mode, a feature twice, or values that do not fit or are not finite.
        """
        if mode not in MODES:
            raise MechsteerError(f"SetFeature got mode={mode!r}. Pass one of {', '.join(map(repr, MODES))}.")
        features = (feature,) if isinstance(feature, int) else tuple(int(each) for each in feature)
        if not features or len(set(features)) != len(features):
            raise MechsteerError(f"SetFeature got features {list(features)}. Pass at least one, and each only once.")
        for each in features:
            sae.check_feature(each, "SetFeature")
        object.__setattr__(self, "site", sae.site)
        object.__setattr__(self, "at", normalise_at(at))
        object.__setattr__(self, "sae", sae)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "values", _table(value, len(features)))
        object.__setattr__(self, "mode", mode)
        # A tensor of its own for each autoencoder, so that checks of many cells are made once for each.
        object.__setattr__(self, "decoder", sae.decoder)

    def _told(self) -> dict[str, Any]:
        one = float(self.values) if self.values.numel() == 1 else self.values
        return {"features": list(self.features), "values": one, "mode": self.mode, "sae": self.sae.name}

    @classmethod
    def _edit(cls, cells: Sequence["SetFeature"], like: Float[Tensor, "..."]) -> Edit:
        saes = list({id(cell.sae): cell.sae for cell in cells}.values())
        edits = [_of_one(sae, [cell if cell.sae is sae else None for cell in cells], like) for sae in saes]
        if len(edits) == 1:
            return edits[0]
        owner = torch.tensor([[cell.sae is sae for sae in saes].index(True) for cell in cells], device=like.device)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            mine_of = owner[rows.cell]
            for i, each in enumerate(edits):
                mine = (mine_of == i).nonzero().squeeze(1)
                if mine.numel():
                    values = values.index_put((mine,), each(values[mine], rows[mine]))
            return values

        return edit

    @property
    def placed(self) -> bool:
        return super().placed or self.values.shape[1] > 1

    def check_model(self, model: "Model") -> None:
        self.sae.check_fits(model)

    def check_prompts(self, prompts: Prompts, *, n_new: int = 0) -> None:
        super().check_prompts(prompts, n_new=n_new)
        n_examples, n_pos, _ = self.values.shape
        if n_examples not in (1, len(prompts)):
            raise MechsteerError(
                f"SetFeature has values for {n_examples} prompts, and {len(prompts)} are run. Pass one number, or one "
                "for each prompt."
            )
        longest = int(last_touched(self.at, prompts).max()) + 1
        if n_new and self.at in (None, "completion"):  # which go on for generated tokens
            longest = int(prompts.lengths.max()) + n_new
        if n_pos != 1 and longest > n_pos:
            raise MechsteerError(
                f"SetFeature has values for {n_pos} positions, and touches {longest}. Pass values for all of them, or "
                "choose other tokens with at=."
            )


def _table(value: Any, n_features: int) -> Float[Tensor, "example pos feature"]:
    """Values as [example, pos, feature]."""
    given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
    if not bool(torch.isfinite(given).all()):
        raise MechsteerError("SetFeature got values with NaN or infinity. Pass finite numbers.")
    if given.ndim == 0 or (given.ndim == 1 and n_features > 1):
        table = given.expand(n_features)[None, None] if given.ndim == 0 else given[None, None]
    elif given.ndim == 1:
        table = given[:, None, None]
    elif given.ndim == 2:
        table = given[:, None]
    else:
        table = given
    if table.ndim != 3 or table.shape[2] not in (1, n_features) or not table.numel():
        raise MechsteerError(
            f"SetFeature got values of shape {list(given.shape)} for {n_features} features. Pass one number, "
            "[feature], [batch, feature] or [batch, pos, feature] (for one feature also [batch])."
        )
    return table * torch.ones(n_features, dtype=torch.promote_types(given.dtype, torch.float16), device=given.device)


def _of_one(sae: SparseAutoencoder, cells: Sequence[SetFeature | None], like: Float[Tensor, "..."]) -> Edit:
    """The edit of cells that share an autoencoder; None stands for a cell of another.

    Every mode is f' = keep * f + put, so cells of different modes and features go together. Cells with fewer features
    than others are filled up with changes of zero.
    """
    most = max(len(cell.features) for cell in cells if cell is not None)
    n_examples, n_pos = (max(cell.values.shape[axis] for cell in cells if cell is not None) for axis in (0, 1))
    shape = (n_examples, n_pos)
    index, keep, put = [], [], []
    for cell in cells:
        n = 0 if cell is None else len(cell.features)
        index.append([*(() if cell is None else cell.features), *[0] * (most - n)])
        filler = like.new_zeros(*shape, most - n, dtype=wide(like.dtype))
        if cell is None:
            keep.append(filler + 1)
            put.append(filler)
            continue
        values = cell.values.to(filler).expand(*shape, n)
        put.append(torch.cat([torch.zeros_like(values) if cell.mode == "scale" else values, filler], -1))
        kept = {"clamp": torch.zeros_like(values), "add": torch.ones_like(values), "scale": values}[cell.mode]
        keep.append(torch.cat([kept, filler + 1], -1))
    reads = any(cell is not None and cell.mode != "add" for cell in cells)
    decoder = sae.decoder.to(like.device)
    shared = index[0] if all(each == index[0] for each in index) else None
    chosen = torch.tensor(index, device=like.device)
    keeps, puts = torch.stack(keep), torch.stack(put)

    def at_rows(table: Float[Tensor, "cell example pos k"], rows: Rows) -> Float[Tensor, "row k"]:
        example = rows.example if n_examples > 1 else torch.zeros_like(rows.example)
        position = rows.position if n_pos > 1 else torch.zeros_like(rows.position)
        return table[rows.cell, example, position]

    def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
        x = precise(values.flatten(1))
        change = at_rows(puts, rows)
        if reads:
            mine: Int[Tensor, "row k"] = chosen[rows.cell]
            features = sae.encode(x).gather(-1, mine).to(x)
            change = change + (at_rows(keeps, rows) - 1) * features
        if shared is not None:
            moved = change @ decoder[shared].to(change)
        elif most <= _FEW:
            moved = torch.einsum("rk,rkd->rd", change, decoder[chosen[rows.cell]].to(change))
        else:
            # A decoder row for each of a token's features would take more memory than all features of the token.
            every = x.new_zeros(len(x), len(decoder)).scatter_add(1, chosen[rows.cell], change)
            moved = (every.to(decoder.dtype) @ decoder).to(x)
        return (x + sae.scale(x) * moved).to(values.dtype).reshape(values.shape)

    return edit
