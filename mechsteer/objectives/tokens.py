"""Sets of tokens, for all prompts or one for each."""

from collections.abc import Collection
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.objectives.base import examples_of
from mechsteer.run import Run

Tokens = int | str | Collection[int | str] | Tensor
"""An id or a one-token string, a set of these for all prompts, or a tensor with one id for each prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenSet:
    """Token ids that an objective sums or compares.

    Attributes:
        ids: one row for all prompts, or with `per_example` one row for each.
        per_example: whether each example has its own.
        texts: the ids as they were given, for messages.
    """

    ids: Int[Tensor, "set token"]
    per_example: bool
    texts: tuple[int | str, ...]

    @staticmethod
    def of(tokens: Tokens, *, tokenizer: Any = None, what: str = "tokens") -> "TokenSet":
        """Reads ids, or strings that are one token each.

        Args:
            tokens: an id or a string, several of them (one set for all prompts, duplicates removed), or an integer
                tensor with one id for each prompt.
            tokenizer: for strings; a `Model` stands for its tokenizer.
            what: the argument's name, for messages.

        Raises:
            MechsteerError: no tokens, negative ids, strings without a tokenizer, or strings that are not one token.
        """
        if isinstance(tokens, Tensor):
            if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool or not len(tokens):
                raise MechsteerError(
                    f"{what} got a tensor of {tokens.dtype} with shape {list(tokens.shape)}. A tensor holds one id for "
                    "each prompt; pass a list for one set of tokens for all prompts."
                )
            given: tuple[int | str, ...] = tuple(tokens.tolist())
        else:
            given = tuple(dict.fromkeys((tokens,) if isinstance(tokens, int | str) else tokens))
        if not given:
            raise MechsteerError(f"{what} is an empty set of tokens. Pass at least one id or one-token string.")
        ids = [_single_token(token, tokenizer, what) if isinstance(token, str) else index(token) for token in given]
        if min(ids) < 0:
            raise MechsteerError(f"{what} got the token id {min(ids)}. Ids count from 0.")
        if isinstance(tokens, Tensor):
            return TokenSet(tokens.detach().long()[:, None], True, given)
        return TokenSet(torch.tensor([list(dict.fromkeys(ids))]), False, given)

    @property
    def n_examples(self) -> int | None:
        """How many prompts it has ids for; None for any number."""
        return len(self.ids) if self.per_example else None

    def of_rows(self, run: Run) -> Int[Tensor, "batch token"]:
        """The ids of each row of a run.

        Raises:
            MechsteerError: an id lies outside the vocabulary, or an example has none.
        """
        d_vocab, largest = run.rows.shape[-1], int(self.ids.max())
        if largest >= d_vocab:
            raise MechsteerError(
                f"Token id {largest} lies outside the vocabulary of the model (d_vocab={d_vocab}). "
                "Make the objective with the model's own tokenizer."
            )
        ids = self.ids.to(run.rows.device)
        return ids[examples_of(run, len(ids))] if self.per_example else ids.expand(len(run.prompts), -1)

    def __repr__(self) -> str:
        shown = ", ".join(repr(token) for token in self.texts[:6]) + (", ..." if len(self.texts) > 6 else "")
        return f"<{len(self.ids)} ids, one a prompt>" if self.per_example else f"[{shown}]"


def _single_token(text: str, tokenizer: Any, what: str) -> int:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise MechsteerError(f"{what} got the string {text!r} but no tokenizer. Pass tokenizer=model, or token ids.")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids)
        found = f"{len(ids)} tokens: {pieces}. Pass one of them." if ids else "no token. Pass a token's text or its id."
        raise MechsteerError(f"{what}: {text!r} is {found}")
    if ids[0] == getattr(tokenizer, "unk_token_id", None) and text != tokenizer.unk_token:
        raise MechsteerError(f"{what}: {text!r} is unknown to the tokenizer. Pass a token's text or its id.")
    return ids[0]
