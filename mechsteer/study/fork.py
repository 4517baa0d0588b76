"""Forks: the first token at which what the model says with the prefix parts from what it says without it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mechsteer.objectives import LogitGap
from mechsteer.prompts import Prompts
from mechsteer.rendering import COMPLETION, SCAFFOLD
from mechsteer.study.case import Case, completion_ids


@dataclass(frozen=True, eq=False)
class Forks:
    """Prompts that end just before the completions part, and the logit gap between the two tokens that follow.

    Attributes:
        rows: the requests that have a fork: those whose completions differ.
        prefixed, plain: with and without the prefix, up to the fork; what both completions begin with belongs to them.
        gap: logit of the token that the prefixed run chose minus that of the one the plain run chose.
        tokens: the two tokens' texts, for each row.
        common: what both completions begin with, for each row.
    """

    rows: tuple[int, ...]
    prefixed: Prompts
    plain: Prompts
    gap: LogitGap
    tokens: tuple[tuple[str, str], ...]
    common: tuple[str, ...]


def forks(case: Case, rows: Sequence[int]) -> Forks | None:
    """The forks of these requests; None where no completion parts from the other before either ends."""
    ids = [completion_ids(each) for each in (case.reference, case.unsteered)]
    at = {row: _parting(ids[0][row], ids[1][row]) for row in rows}
    kept = [row for row in rows if at[row] is not None]
    if not kept:
        return None
    common = [ids[0][row][: at[row]] for row in kept]
    prefixed, plain = (_with(prompts[kept], common) for prompts in (case.prefixed, case.plain))
    chosen = [torch.tensor([each[row][at[row] or 0] for row in kept], device=case.model.device) for each in ids]
    decode = case.model.tokenizer.decode
    return Forks(
        tuple(kept), prefixed, plain, LogitGap(chosen[0], chosen[1]),
        tuple((decode([one]), decode([other])) for one, other in zip(*(each.tolist() for each in chosen), strict=True)),
        tuple(decode(each) for each in common),
    )  # fmt: skip


def _parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _with(prompts: Prompts, ids: Sequence[Sequence[int]]) -> Prompts:
    """The prompts with these ids behind them, as part of the prompt: their last token is the deciding one."""
    longer = prompts.with_completions(ids)
    return replace(longer, roles=torch.where(longer.roles == COMPLETION, SCAFFOLD, longer.roles)).padded("right")
