"""Moves of a discrete search: which prefixes to try next to the present one."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

Ids = tuple[int, ...]
MOVES = ("replace", "insert", "delete", "swap", "cross")


def replacements(ids: Ids, top: Sequence[Sequence[int]], slot: int) -> list[Ids]:
    """One slot replaced by each of its top tokens, best first: a step of HotFlip (Ebrahimi et al. 2018)."""
    return [(*ids[:slot], token, *ids[slot + 1 :]) for token in top[slot] if token != ids[slot]]


def random_replacements(
    ids: Ids, top: Sequence[Sequence[int]], n: int, rng: np.random.Generator, *, steep: bool = False
) -> list[Ids]:
    """n times one slot, drawn evenly, replaced by one of its top tokens: Zou et al. 2023, algorithm 1.

    Args:
        top: of each slot, best first.
        steep: draw the r-th best token with a probability that falls as 1 / (r + 4) instead of evenly.
    """
    out = []
    for _ in range(n):
        slot = int(rng.integers(len(ids)))
        token = _drawn(top[slot], rng, steep)
        out.append((*ids[:slot], token, *ids[slot + 1 :]))
    return out


def mixed(
    ids: Ids,
    top: Sequence[Sequence[int]],
    n: int,
    rng: np.random.Generator,
    *,
    moves: Sequence[str],
    others: Sequence[Ids] = (),
    shortest: int,
    longest: int,
) -> list[Ids]:
    """n prefixes a move away: tokens replaced in one slot or two, put in, taken out or exchanged.

    "cross" takes every token from here or from one of `others` of the same length, with even odds. Where the length is
    fixed, "insert" and "delete" come together: a token
    goes in at one place and out at another.
    """
    size = len(ids)
    mates = [each for each in others if len(each) == size and each != ids]
    both = "insert" in moves and "delete" in moves
    doable = {
        "replace": "replace" in moves,
        "two": "replace" in moves and size > 1,
        "insert": "insert" in moves and size < longest,
        "delete": "delete" in moves and size > shortest,
        "shift": both and size > 1,
        "swap": "swap" in moves and size > 1,
        "cross": "cross" in moves and bool(mates),
    }
    shares = {"replace": 10.0, "two": 3.0, "insert": 2.0, "delete": 1.0, "shift": 2.0, "swap": 1.0, "cross": 2.0}
    kinds = [kind for kind, able in doable.items() if able]
    odds = np.array([shares[kind] for kind in kinds])
    out = []
    for kind in rng.choice(kinds, size=n, p=odds / odds.sum()) if kinds else ():
        made = list(ids)
        for _ in range({"replace": 1, "two": 2}.get(str(kind), 0)):
            slot = int(rng.integers(size))
            made[slot] = _drawn(top[slot], rng, True)
        if kind in ("delete", "shift"):
            del made[int(rng.integers(size))]
        if kind in ("insert", "shift"):
            slot = int(rng.integers(len(made) + 1))
            # The gradient at a place that does not exist yet is taken for that of its neighbour.
            made.insert(slot, _drawn(top[min(slot, size - 1)], rng, True))
        if kind == "swap":
            a, b = rng.choice(size, size=2, replace=False)
            made[a], made[b] = made[b], made[a]
        if kind == "cross":
            mate, taken = mates[int(rng.integers(len(mates)))], rng.random(size) < 0.5
            made = [b if take else a for a, b, take in zip(made, mate, taken, strict=True)]
        out.append(tuple(made))
    return out


def merges(ids: Ids, better: Sequence[Ids]) -> list[Ids]:
    """Several replacements at once: the best with each of the next, and the best two, three, ... together.

    Args:
        better: of the length of `ids` and different from it in one slot, best first.
    """
    changes: dict[int, int] = {}
    for each in better:
        slot = next(i for i, (a, b) in enumerate(zip(ids, each, strict=True)) if a != b)
        changes.setdefault(slot, each[slot])
    slots = list(changes)
    sets = [slots[:n] for n in range(2, len(slots) + 1)] + [[slots[0], slot] for slot in slots[2:]]
    return [tuple(changes[i] if i in chosen else token for i, token in enumerate(ids)) for chosen in sets]


def kicked(ids: Ids, n: int, top: Sequence[Sequence[int]], rng: np.random.Generator) -> Ids:
    """n slots replaced by one of their top tokens, drawn evenly."""
    made = list(ids)
    for slot in rng.choice(len(ids), size=min(n, len(ids)), replace=False):
        made[slot] = _drawn(top[slot], rng, False)
    return tuple(made)


def built(
    ranked: Sequence[Sequence[int]], valid: Callable[[Sequence[Ids]], Sequence[bool]], *, block: int = 32
) -> Ids | None:
    """Slot by slot the first of its tokens with which the prefix so far is valid; None where there is none."""
    ids: Ids = ()
    for tokens in ranked:
        for at in range(0, len(tokens), block):
            tried = [(*ids, token) for token in tokens[at : at + block]]
            good = [each for each, fine in zip(tried, valid(tried), strict=True) if fine]
            if good:
                ids = good[0]
                break
        else:
            return None
    return ids


def _drawn(tokens: Sequence[int], rng: np.random.Generator, steep: bool) -> int:
    if not steep:
        return int(tokens[int(rng.integers(len(tokens)))])
    return int(tokens[int(_steep(len(tokens)).searchsorted(rng.random(), side="right"))])


@lru_cache
def _steep(n: int) -> Float[np.ndarray, " n"]:
    """Chances that a draw with probabilities that fall as 1 / (r + 4) is at most the r-th."""
    odds = 1 / (np.arange(n) + 4.0)
    chances = (odds / odds.sum()).cumsum()
    return chances / chances[-1]
