"""Tokens as rows: which cell, example and absolute position each row of a packed batch is, and which rows a rule means.

Interventions are written once, on rows. A hook turns [batch, pos, ...] into rows, the sweep engine packs the tokens of
many cells into rows, and generation has one row for each example.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.precision import wide
from mechsteer.prompts import ROLES, Prompts

At = int | tuple[int, ...] | str | None
SPANS = (*ROLES, "slots")


@dataclass(frozen=True, eq=False)
class Rows:
    """What each row of a tensor [row, ...] is.

    Attributes:
        prompts: right-padded; tokens after their end are generated ones.
        example: index into `prompts`.
        position: absolute position.
        cell: index into the cells that were stacked; zeros where there is one.
        head: which head each row is of, where an edit acts on heads.
    """

    prompts: Prompts
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    cell: Int[Tensor, " row"]
    head: Int[Tensor, " row"] | None = None

    def __getitem__(self, index: Int[Tensor, " kept"]) -> "Rows":
        head = None if self.head is None else self.head[index]
        return Rows(self.prompts, self.example[index], self.position[index], self.cell[index], head)

    def with_head(self, head: Int[Tensor, " row"] | None) -> "Rows":
        return replace(self, head=head)

    def to(self, device: torch.device) -> "Rows":
        """The same rows, known on another device."""
        example, position, cell = (each.to(device) for each in (self.example, self.position, self.cell))
        head = None if self.head is None else self.head.to(device)
        return Rows(self.prompts.to(device), example, position, cell, head)

    @cached_property
    def _column(self) -> Int[Tensor, " row"]:
        return self.position.clamp(max=self.prompts.tokens.shape[1] - 1)

    @cached_property
    def generated(self) -> Bool[Tensor, " row"]:
        """True for tokens after the end of the prompts."""
        return self.position >= self.prompts.lengths[self.example]

    def in_span(self, span: str) -> Bool[Tensor, " row"]:
        """True for rows of a span; generated tokens are of the completion."""
        if span == "slots":
            return self.prompts.slots[self.example, self._column] & ~self.generated
        inside = self.prompts.roles[self.example, self._column] == ROLES.index(span)
        return inside | self.generated if span == "completion" else inside & ~self.generated

    @cached_property
    def slot(self) -> Int[Tensor, " row"]:
        """How many slots of the example come before the row."""
        slots = self.prompts.slots
        return (slots.cumsum(1) - slots.long())[self.example, self._column]


def normalise_at(at: object, pos: int | None = None) -> At:
    """`at` in the one form that is stored; `pos` is the position of the site that it goes with.

    Raises:
        MechsteerError: it is neither of the forms, or both are given.
    """
    if pos is not None:
        if at is not None and at != pos:
            raise MechsteerError(f"at={at!r} and Site(pos={pos}) both say where. Give one of them.")
        return pos
    if at is None:
        return at
    if isinstance(at, str):
        if at not in SPANS:
            raise MechsteerError(f"at={at!r} is no span. Pass one of {', '.join(SPANS)}, or absolute positions.")
        return at
    single = hasattr(at, "__index__") and getattr(at, "ndim", 0) == 0  # an int, also of NumPy or PyTorch
    try:
        positions = tuple(sorted({_index(position) for position in ((at,) if single else at)}))  # type: ignore[union-attr]
    except TypeError as error:
        shown = " ".join(repr(at).split())
        raise MechsteerError(
            f"at={shown[:60]} is not understood. Pass None for all tokens, absolute positions, or a span's name."
        ) from error
    if not positions:
        raise MechsteerError("at=[] touches no token. Leave `at` out to touch all of them.")
    return positions[0] if len(positions) == 1 else positions


def _index(position: Any) -> int:
    """A position as an int; a bool or a float is none."""
    if isinstance(position, bool) or "bool" in str(getattr(position, "dtype", "")):
        raise TypeError
    return operator.index(position)


def _absolute(at: int, prompts: Prompts) -> Int[Tensor, " batch"]:
    """Position `at` of every example, counted from the end of the prompt where negative."""
    if at >= 0:
        return torch.full((len(prompts),), at, device=prompts.tokens.device)
    return prompts.decision + 1 + at


def touched(ats: Sequence[At], rows: Rows) -> Bool[Tensor, " row"] | None:
    """Which rows the cells' rules mean; None for all of them.

    Args:
        ats: one rule per cell.
    """
    kinds = set(ats)
    if kinds == {None}:
        return None
    device = rows.position.device
    if all(type(at) is int for at in kinds):
        wanted = torch.tensor(ats, device=device)[rows.cell]
        if min(kinds) < 0:  # type: ignore[type-var]
            end = rows.prompts.decision[rows.example] + 1
            wanted = torch.where(wanted < 0, wanted + end, wanted)
        return rows.position == wanted
    mask = torch.zeros_like(rows.position, dtype=torch.bool)
    for at in kinds:
        if isinstance(at, str):
            means = rows.in_span(at)
        elif at is None:
            means = torch.ones_like(mask)
        else:
            means = torch.zeros_like(mask)
            for position in (at,) if isinstance(at, int) else at:
                means = means | (rows.position == _absolute(position, rows.prompts)[rows.example])
        if len(kinds) > 1:
            means = means & torch.tensor([other == at for other in ats], device=device)[rows.cell]
        mask = mask | means
    return mask


def first_touched(ats: Sequence[At], prompts: Prompts) -> Int[Tensor, "cell batch"]:
    """Earliest position that each cell's rule touches; the prompt's length where it touches none.

    Args:
        ats: one rule per cell.
        prompts: right-padded.
    """
    if all(type(at) is int and at >= 0 for at in ats):
        return torch.tensor(ats, device=prompts.tokens.device)[:, None].expand(-1, len(prompts))
    firsts: dict[At, Tensor] = {}
    for at in set(ats):
        if at is None:
            first = torch.zeros_like(prompts.lengths)
        elif isinstance(at, str):
            inside = prompts.slots if at == "slots" else prompts.span(at)
            first = torch.where(inside.any(1), inside.int().argmax(1), prompts.lengths)
        else:
            each = [_absolute(position, prompts) for position in ((at,) if isinstance(at, int) else at)]
            first = torch.stack(each).amin(0)
        firsts[at] = first
    return torch.stack([firsts[at] for at in ats])


def tokens_of(at: At, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The real tokens that a rule means.

    Args:
        at: the rule.
        prompts: right-padded.
    """
    example, position = torch.where(prompts.mask)
    means = touched([at], Rows(prompts, example, position, torch.zeros_like(example)))
    return prompts.mask if means is None else torch.zeros_like(prompts.mask).masked_scatter(prompts.mask, means)


def of_like_lengths(lengths: Int[Tensor, " prompt"], tokens: int) -> Iterator[Int[Tensor, " _"]]:
    """Indices of prompts of like lengths, at most `tokens` tokens with their padding at a time."""
    order = lengths.argsort(stable=True)
    part: list[int] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if part and (len(part) + 1) * length > tokens:
            yield torch.tensor(part)
            part = []
        part.append(index)
    yield torch.tensor(part)


def last_touched(at: At, prompts: Prompts) -> Int[Tensor, " batch"]:
    """Latest position of each prompt that a rule touches; -1 where it touches none.

    Args:
        at: the rule.
        prompts: right-padded.
    """
    position = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    return torch.where(tokens_of(at, prompts), position, -1).amax(1)


def check_at(at: At, prompts: Prompts, *, what: str, n_new: int = 0) -> None:
    """Refuse positions outside a prompt and spans that no prompt has.

    Args:
        at: the rule.
        prompts: right-padded.
        what: names the intervention in the message.
        n_new: tokens that will be generated after each prompt.
    """
    if at is None:
        return
    if isinstance(at, str):
        inside = prompts.slots if at == "slots" else prompts.span(at)
        if not bool(inside.any()) and not (at == "completion" and n_new):
            raise MechsteerError(
                f"{what} would never fire: none of the {len(prompts)} prompts has a token in span {at!r}. "
                "Build the prompts with that span, or choose other tokens with at=."
            )
        return
    for position in (at,) if isinstance(at, int) else at:
        where = _absolute(position, prompts)
        outside = (where < 0) | (where >= prompts.lengths + n_new)
        if bool(outside.any()):
            example = int(outside.nonzero()[0, 0])
            length = int(prompts.lengths[example])
            new = f" and {n_new} new ones" if n_new else ""
            raise MechsteerError(
                f"{what} touches position {position}, but prompt {example} has {length} tokens{new}. "
                f"Positions count from 0 at the first real token; -1 is the prompt's last."
            )


def stack_numbers(
    numbers: Sequence[float | Tensor], like: Float[Tensor, "..."]
) -> Callable[[Rows], Float[Tensor, " row"] | float]:
    """Looks up the number of each row, where every cell has one for all examples or one for each.

    Args:
        numbers: per cell a float or a tensor [batch].
        like: gives device and dtype, of which fp32 is the least: an alpha in half precision has three digits.
    """
    dtype = wide(like.dtype)
    if not any(isinstance(number, Tensor) for number in numbers):
        if len(set(numbers)) == 1:
            return lambda rows: numbers[0]
        table = torch.tensor(numbers, dtype=dtype, device=like.device)
        return lambda rows: table[rows.cell]
    batch = max(number.numel() for number in numbers if isinstance(number, Tensor))
    table = torch.stack([torch.as_tensor(number).to(like.device, dtype).expand(batch) for number in numbers])
    return lambda rows: table[rows.cell, rows.example if batch > 1 else 0]
