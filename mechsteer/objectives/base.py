"""What an objective is, sums of them, and what several of them need."""

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.run import Run
from mechsteer.site import Site


@dataclass(frozen=True, eq=False, repr=False)
class Objective(ABC):
    """One number per prompt, from a `Run`.

        score = LogitGap(" cats", " dogs", tokenizer=model) - 0.1 * KLFromBaseline(baseline)
        score(model.run(prompts, logits=score.reads(prompts), record=score.sites()))

    `a + b`, `a - 0.1 * b`, `-a` and `a / 3` are objectives too. Numbers are differentiable with respect to the logits
    and activations of the run; they are fp32 when those are of a smaller type.

    Attributes:
        label: a name other than the class's own.
        n_examples: how many prompts it holds a value for; None when it fits any number of prompts.
    """

    label: str | None = field(default=None, init=False)
    n_examples: int | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """What a result calls it: the class in snake case unless `named` said otherwise."""
        return self.label or re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def named(self, name: str) -> "Objective":
        """The same objective under another name."""
        return assign(copy.copy(self), label=name)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"] | None:
        """Tokens whose logits it reads, in the layout of `prompts`; None when it reads no logits."""
        return None

    def sites(self) -> tuple[Site, ...]:
        """Hook points whose activations it reads."""
        return ()

    @abstractmethod
    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        """One number for each row of `run.prompts`."""

    def _repr_html_(self) -> str:
        rows: dict[str, object] = {"measures": markup.says(self), "as": markup.code(markup.shortened(repr(self), 400))}
        rows["reads"] = markup.code(", ".join(map(str, self.sites()))) if self.sites() else "logits"
        if self.n_examples is not None:
            rows["holds values for"] = f"{self.n_examples} prompts"
        return markup.card(type(self).__name__, markup.facts(rows), about=self.name)

    def __add__(self, other: object) -> "Objective":
        return _sum(self, other, 1.0) if isinstance(other, Objective) else NotImplemented

    def __sub__(self, other: object) -> "Objective":
        return _sum(self, other, -1.0) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: object) -> "Objective":
        # So that the built-in sum() works, which starts at 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, weight: object) -> "Objective":
        return Sum(((float(weight), self),)) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, weight: object) -> "Objective":
        if not isinstance(weight, Real):
            return NotImplemented
        return self * (1 / float(weight) if weight else math.inf)

    def __neg__(self) -> "Objective":
        return self * -1.0


def assign(objective: Any, **values: object) -> Any:
    for name, value in values.items():
        object.__setattr__(objective, name, value)
    return objective


def _sum(left: Objective, right: Objective, sign: float) -> "Sum":
    return Sum(((1.0, left), (sign, right)))


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Objective):
    """sum_i weight_i * objective_i; what `a - 0.1 * b` makes. Sums of sums are flattened.

    Attributes:
        terms: weights and objectives.

    Raises:
        MechsteerError: a weight is not finite, or two terms hold values for different numbers of prompts.
    """

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        for weight, term in self.terms:
            if not math.isfinite(weight):
                raise MechsteerError(f"{term!r} got the weight {weight}. Pass a finite number.")
        flat = tuple(
            (weight * inner, part)
            for weight, term in self.terms
            for inner, part in (term.terms if isinstance(term, Sum) else ((1.0, term),))
        )
        held = {part.n_examples: part.name for _, part in flat if part.n_examples is not None}
        if len(held) > 1:
            counts = ", ".join(f"{name} for {count}" for count, name in held.items())
            raise MechsteerError(
                f"A sum of objectives holds values for different numbers of prompts: {counts}. "
                "Make them from the same prompts."
            )
        assign(self, terms=flat, n_examples=next(iter(held), None))

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"] | None:
        """The union of what the terms read."""
        masks = [mask for _, part in self.terms if (mask := part.reads(prompts)) is not None]
        return torch.stack(masks).any(0) if masks else None

    def sites(self) -> tuple[Site, ...]:
        """The union of the terms' sites."""
        return tuple(dict.fromkeys(site for _, part in self.terms for site in part.sites()))

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        return torch.stack([weight * part(run) for weight, part in self.terms]).sum(0)

    def _repr_html_(self) -> str:
        rows = [(weight, part.name, markup.code(repr(part)), markup.says(part)) for weight, part in self.terms]
        shown = markup.table(("weight", "objective", "as", "measures"), rows)
        return markup.card("Sum", shown, about=f"{self.name}, of {len(rows)} objectives")

    def __repr__(self) -> str:
        parts = [("- " if w < 0 else "+ ") + ("" if abs(w) == 1 else f"{abs(w):g} * ") + repr(p) for w, p in self.terms]
        return " ".join(parts).removeprefix("+ ")


def examples_of(run: Run, held: int | None) -> Int[Tensor, " batch"]:
    """`run.example`, when an objective that holds values for `held` prompts has one for each of them."""
    largest = int(run.example.max())
    if held is not None and largest >= held:
        raise MechsteerError(
            f"The objective holds values for {held} prompts but the run has prompt number {largest} (counted from 0). "
            "Make the objective from the prompts that are run."
        )
    return run.example


def check_examples(objective: Objective, prompts: Prompts) -> None:
    """Refuse another number of prompts than the objective holds values for."""
    if objective.n_examples not in (None, len(prompts)):
        raise MechsteerError(
            f"{objective!r} holds values for {objective.n_examples} prompts, and {len(prompts)} were passed. Make it "
            "from the same prompts."
        )


def decision_mask(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    return prompts.at(prompts.decision)


def by_block(
    function: Callable[..., Tensor], rows: Float[Tensor, "row d_vocab"], *others: Shaped[Tensor, "row ..."]
) -> Float[Tensor, " row"]:
    """`function`, which gives one number a row, of as many rows at a time as fit a processor's cache: several times as
    fast on a CPU as all at once."""
    size = max(1, (2**18 if rows.device.type == "cpu" else 2**27) // rows.shape[-1])
    blocks = zip(*(tensor.split(size) for tensor in (rows, *others)), strict=True)
    return torch.cat([function(precise(block), *more) for block, *more in blocks])


def one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise MechsteerError(f"{option} got {value!r}. Pass one of {', '.join(map(repr, allowed))}.")


def predicting(prompts: Prompts, span: str) -> Bool[Tensor, "batch pos"]:
    """Tokens whose logits predict the tokens of a span."""
    targets = (prompts.mask if span == "all" else prompts.span(span)) & ~prompts.slots
    return F.pad(targets[:, 1:] & prompts.mask[:, :-1], (0, 1))


def tokens_at(prompts: Prompts, at: int | str) -> Bool[Tensor, "batch pos"]:
    if isinstance(at, int):
        return prompts.at(at)
    if at in ("decision", "last"):
        return decision_mask(prompts)
    return prompts.mask if at == "all" else prompts.span(at)


def check_tokens(mask: Tensor, what: str) -> None:
    """Refuse prompts for which no token is marked."""
    empty = ~mask.any(1)
    if bool(empty.any()):
        rows = empty.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise MechsteerError(f"{len(rows)} of {len(mask)} prompts (row {shown}) have no token {what}. Leave them out.")


def token_mean(
    values: Float[Tensor, " row"], mask: Bool[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"], what: str
) -> Float[Tensor, " batch"]:
    """Weighted mean over each prompt's tokens of one value a marked token."""
    check_tokens(weights, what)
    placed = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return (placed * weights).sum(1) / weights.sum(1)
