"""Objectives that share one computation: several numbers for each prompt from one softmax."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.objectives import Objective
from mechsteer.objectives.base import by_block, check_tokens, decision_mask, predicting
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.run import Run


@dataclass(frozen=True, eq=False, repr=False)
class Table(ABC):
    """Several numbers for each prompt; `objectives` hands them to a sweep one by one, computed together."""

    @abstractmethod
    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """Tokens whose logits it reads."""

    @abstractmethod
    def values(self, run: Run) -> Float[Tensor, "batch column"]:
        """The numbers of each row of `run.prompts`."""

    def objectives(self, names: Iterable[str]) -> dict[str, Objective]:
        """One objective for each column, by these names."""
        return {name: Column(self, index) for index, name in enumerate(names)}

    def of(self, run: Run) -> Float[Tensor, "batch column"]:
        """`values`, computed once for a run."""
        held = getattr(self, "_held", None)
        if held is None or held[0]() is not run:
            held = ref(run), self.values(run)
            object.__setattr__(self, "_held", held)
        return held[1]


@dataclass(frozen=True, eq=False, repr=False)
class Column(Objective):
    """One column of a table."""

    table: Table
    index: int

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens that the table reads."""
        return self.table.reads(prompts)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        return self.table.of(run)[:, self.index]

    def __repr__(self) -> str:
        return f"Column({type(self.table).__name__}, {self.index})"


@dataclass(frozen=True, eq=False, repr=False)
class SetProbabilities(Table):
    """Probability of each of several sets of tokens at the first decoding step: sum_{t in set} softmax(z)_t.

    Attributes:
        sets: token ids.
    """

    sets: tuple[tuple[int, ...], ...]

    @staticmethod
    def of_sets(sets: Sequence[Sequence[int]], *, d_vocab: int) -> "SetProbabilities":
        """Checked against a vocabulary.

        Raises:
            MechsteerError: there are no sets, one is empty, or an id lies outside the vocabulary.
        """
        if not sets or not all(sets):
            raise MechsteerError("A set of tokens is empty. Pass at least one token in each.")
        wrong = sorted({token for each in sets for token in each if not 0 <= token < d_vocab})
        if wrong:
            raise MechsteerError(f"Token id {wrong[0]} does not exist: the model has ids 0 to {d_vocab - 1}.")
        return SetProbabilities(tuple(tuple(dict.fromkeys(each)) for each in sets))

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return decision_mask(prompts)

    def values(self, run: Run) -> Float[Tensor, "batch column"]:
        """Probabilities, in [0, 1]."""
        rows = run.logits_at(decision_mask(run.prompts))
        ids = torch.tensor([token for each in self.sets for token in each], device=rows.device)
        owner = torch.tensor([place for place, each in enumerate(self.sets) for _ in each], device=rows.device)
        probs = torch.cat([F.softmax(block, -1)[:, ids] for block in _blocks(rows)])
        return probs.new_zeros(len(probs), len(self.sets)).index_add(1, owner, probs)


@dataclass(frozen=True, eq=False, repr=False)
class LikeliestTokens(Table):
    """Ids of the `k` likeliest tokens at the first decoding step, the likeliest first, as whole numbers in fp32."""

    k: int

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return decision_mask(prompts)

    def values(self, run: Run) -> Float[Tensor, "batch column"]:
        """Ids."""
        rows = run.logits_at(decision_mask(run.prompts))
        return torch.cat([block.topk(self.k).indices for block in _blocks(rows)]).float()


@dataclass(frozen=True, eq=False, repr=False)
class SummedNLL(Table):
    """Minus the log-probability of each prompt's tokens but the first, summed in fp64, in nats.

    The sum comes as two numbers in fp32, whose sum has the precision of fp64: what a sweep keeps is fp32, and the
    changes that a weak push makes are small beside the sum.
    """

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens that predict another one."""
        return predicting(prompts, "all")

    def values(self, run: Run) -> Float[Tensor, "batch column"]:
        """The sum rounded to fp32, and what rounding left out."""
        mask = self.reads(run.prompts)
        check_tokens(mask, "that predicts another")
        targets = run.prompts.tokens.roll(-1, 1)[mask]
        nll = by_block(partial(F.cross_entropy, reduction="none"), run.logits_at(mask), targets)
        exact = (nll.cpu() if nll.device.type == "mps" else nll).double()  # Apple's GPUs have no fp64
        owner = mask.nonzero()[:, 0].to(exact.device)
        total = exact.new_zeros(len(mask)).index_add(0, owner, exact)
        high = total.float()
        return torch.stack([high, (total - high.double()).float()], 1).to(nll.device)


def _blocks(rows: Float[Tensor, "row d_vocab"]) -> list[Float[Tensor, "block d_vocab"]]:
    """Rows a few at a time, as `by_block` has them."""
    size = max(1, (2**18 if rows.device.type == "cpu" else 2**27) // rows.shape[-1])
    return [precise(block) for block in rows.split(size)]
