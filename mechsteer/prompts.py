"""Prompts: token ids with the roles that their spans play."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# What a token is there for; `Prompts.roles` holds indices into this.
ROLES = ("scaffold", "prefix", "user", "completion")


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Token ids [batch, pos] and what their spans are for.

    Attributes:
        tokens: ids; where `mask` is False anything may stand (the pad id as a rule).
        mask: True for real tokens, which are contiguous in every row: padding is on one side only.
        roles: index into `ROLES` of each token's span.
        slots: True for tokens reserved for a prefix, whose ids or embeddings are to be filled in.
        labels: one name per prompt, or empty.
        tokenizer: turns ids into text; None for prompts that were given as ids without one.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    roles: Int[Tensor, "batch pos"]
    slots: Bool[Tensor, "batch pos"]
    labels: tuple[str, ...] = ()
    tokenizer: Any = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(1)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute position of each token: 0 for the first real one; -1 for padding."""
        return torch.where(self.mask, self.mask.cumsum(1) - 1, -1)
