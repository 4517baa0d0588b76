"""Tokens of a model's vocabulary: their embeddings, which of them a search may use, and where they go in prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer import rendering
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives import TokenSet
from mechsteer.objectives.base import one_of
from mechsteer.precision import precise, wide
from mechsteer.prompts import Prompts
from mechsteer.rendering import PREFIX, USER
from mechsteer.site import Site

Filler = int | Float[Tensor, " width"] | None
"""What stands in slots: a token's id, an embedding, or None for the mean embedding of the vocabulary."""

PLACES = ("suffix", "prefix")


def insert(prompts: Prompts, ids: Sequence[int] = (), *, where: str = "suffix", slots: int = 0) -> Prompts:
    """The prompts with ids put into each as they are, nothing tokenised again, and then reserved slots.

    Args:
        prompts: those that reserve slots get ids and slots in the place of these, whatever their number.
        ids: of the tokens put in; none for the prompts without tokens.
        where: "suffix", after the user's text, or "prefix", before it, in prompts that reserve no slots.
        slots: how many slots to reserve after the ids.

    Returns:
        Right-padded prompts. What is put in has the role "prefix", on either side of the user's text.

    Raises:
        MechsteerError: no such place, a prompt without user text, or an id that is none of the tokenizer's.
    """
    one_of("where", where, PLACES)
    right = prompts.padded("right")
    rows: dict[str, list[list[int]]] = {"tokens": [], "roles": [], "slots": []}
    for row in range(len(right)):
        n = int(right.lengths[row])
        tokens, roles, reserved = (each[row, :n].tolist() for each in (right.tokens, right.roles, right.slots))
        if True in reserved:
            start = reserved.index(True)
            stop = start + sum(reserved)
        elif USER in roles:
            start = stop = roles.index(USER) if where == "prefix" else n - roles[::-1].index(USER)
        else:
            raise MechsteerError(f"prompt {row} has neither slots nor user text to put tokens at. Make it with slots=.")
        size = len(ids) + slots
        new = {
            "tokens": [*ids, *[rendering.pad_id(right.tokenizer)] * slots],
            "roles": [PREFIX] * size,
            "slots": [False] * len(ids) + [True] * slots,
        }
        for name, old in (("tokens", tokens), ("roles", roles), ("slots", reserved)):
            rows[name].append([*old[:start], *new[name], *old[stop:]])
    made = Prompts.from_ids(rows["tokens"], tokenizer=right.tokenizer, labels=right.labels)

    def placed(name: str, like: Tensor) -> Tensor:
        return like.masked_scatter(made.mask, torch.tensor([each for row in rows[name] for each in row]).to(like))

    made = replace(made, roles=placed("roles", made.roles), slots=placed("slots", made.slots))
    return made.to(right.tokens.device)


def embeddings(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """What each token of the vocabulary is where it enters, at `hook_embed`, without its position."""
    rows = torch.arange(model.d_vocab).split(model.n_ctx)
    runs = (model.run(Prompts.from_ids([row.tolist()]), record="embed", logits="none") for row in rows)
    return torch.cat([run.activations[Site("embed")][0] for run in runs])


def allowed_tokens(model: Model, *, forbidden: Iterable[int | str] = ()) -> list[int]:
    """Ids that a search may use: those that the tokenizer has a token for, without special and chat template tokens.

    Args:
        model: whose vocabulary.
        forbidden: further ids, or strings that are one token, to leave out.

    Raises:
        MechsteerError: nothing is left, or a string is not one token.
    """
    given = list(forbidden)
    out = set(TokenSet.of(given, tokenizer=model, what="forbidden").ids.flatten().tolist()) if given else set()
    known = set(range(model.d_vocab))
    if model.tokenizer is not None:
        known &= set(model.tokenizer.get_vocab().values())
        out |= {*model.tokenizer.all_special_ids, *rendering.control_tokens(model.tokenizer)}
    if not known - out:
        raise MechsteerError(f"forbidden= leaves none of the {model.d_vocab} tokens of {model.name}. Forbid fewer.")
    return sorted(known - out)


def token_texts(model: Model, ids: Sequence[int]) -> list[str]:
    """The text of each token; its id where there is no tokenizer."""
    if model.tokenizer is None:
        return [str(each) for each in ids]
    return rendering.str_tokens(torch.tensor(list(ids), dtype=torch.long), model.tokenizer)


def filling(table: Float[Tensor, "d_vocab d_model"], filler: Filler) -> Float[Tensor, " d_model"]:
    """The embedding that a filler means.

    Raises:
        MechsteerError: it has another width than the model, or is no id of it.
    """
    if filler is None:
        return table.mean(0, dtype=wide(table.dtype))
    if isinstance(filler, Tensor):
        if filler.shape != table.shape[1:]:
            raise MechsteerError(
                f"filler has shape {list(filler.shape)}, but d_model is {table.shape[1]}. Pass one embedding [d_model]."
            )
        return filler.detach().to(table.device, wide(table.dtype))
    if not 0 <= filler < len(table):
        raise MechsteerError(f"filler={filler} is no id: the vocabulary has ids from 0 to {len(table) - 1}.")
    return precise(table[filler])


def check_ids(model: Model, ids: Sequence[int]) -> None:
    """Raise `MechsteerError` unless all are ids of the model."""
    wrong = [each for each in ids if not 0 <= each < model.d_vocab]
    if wrong:
        raise MechsteerError(
            f"token id {wrong[0]} is none of {model.name}, with ids 0 to {model.d_vocab - 1}. Pass one of these."
        )
