"""Search for a prefix made of tokens: HotFlip, GCG, and both with more moves."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from heapq import nsmallest
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer.costs import MIXED_PARTS
from mechsteer.errors import MechsteerError
from mechsteer.memory import devices_of
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import one_of
from mechsteer.prefix import moves as make
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.found import FoundPrefix, SearchFolder, found_prefix
from mechsteer.prefix.legal import Legal
from mechsteer.prefix.moves import MOVES, Ids
from mechsteer.progress import bar
from mechsteer.result import Result, provenance
from mechsteer.vocabulary import check_ids

METHODS = ("hotflip", "gcg", "mixed")
# "mixed": prefixes that it goes back to, and steps without a new best before it does.
_ELITE, _PATIENCE = 8, 6
# Steps that evaluate nothing new after which a search ends.
_DRY = 25
# Tokens that a random start is chosen from in each slot.
_DRAWN = 256


def search_prefix(
    model: Model,
    prompts: PromptsLike,
    objective: Objective,
    *,
    method: str = "mixed",
    start: Sequence[int] | None = None,
    n_tokens: int | None = None,
    evaluations: int = 2000,
    width: int = 64,
    top_k: int = 64,
    steps: int | None = None,
    restarts: int = 1,
    moves: Iterable[str] = MOVES,
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[int, float, str], None] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> FoundPrefix:
    """Search for the prefix, the same for all prompts, that has the lowest loss.

        prompts = ms.Prompts.from_chats(requests, model, slots=6, completions=reference_completions)
        found = search_prefix(model, prompts, ms.TeacherForcedCE(), constraints=Constraints(forbidden_words=("cat",)))

    The gradient g at the prefix's embeddings ranks, for each slot, the tokens t by <g, E(t)>; exact losses over all
    prompts decide among the `top_k` first (see `CandidateLosses`).

    - "hotflip": coordinate descent. One slot after the other takes the best of its top tokens, if that is better
      (Ebrahimi et al. 2018; section 3.3 of "Steering Prefix Generation"). After a round without gain it starts again.
    - "gcg": `width` replacements of one slot by one top token, both drawn evenly; the best becomes the present prefix,
      better or not (Zou et al. 2023, algorithm 1).
    - "mixed": as "gcg" in steps of a quarter of `width`, which need more gradients and fewer candidates, with tokens
      drawn by their rank, moves of all kinds in `moves`, and those replacements that helped also several at once.
      After six steps without a new best it goes back to one of the eight best.

    Candidates that violate the constraints or would not survive as text are not evaluated, and none is twice. A start
    that does neither is mended slot by slot; what it had been is still the trajectory's first loss.

    Args:
        model: what to run.
        prompts: with completions where the objective reads them. The prefix takes the place of slots, or stands in
            front of the user's text; see `mechsteer.vocabulary.insert`.
        objective: one differentiable number for each prompt, lower is better. Prompts are pooled by its `total_weight`
            where it has one, as `TeacherForcedCE` has.
        start: ids to begin with, such as a projected soft prefix; None for random tokens.
        n_tokens: how many; None for as many as `start`, or as there are slots. Lengths change only within the
            constraints' `min_tokens` and `max_tokens`.
        evaluations: candidates whose exact loss is computed, in all.
        width: candidates a step.
        top_k: tokens a slot.
        steps: at most so many steps in all; None for as many as `evaluations` allows.
        restarts: how many starts share the evaluations; all but the first are random.
        moves: of "mixed": "replace" (one token or two), "insert", "delete", "swap", and "cross" (with one of the best).
        seed: of all draws.
        progress: show a bar on standard error when it takes longer than two seconds.
        tell: called after each step with the candidates so far, the best loss and its text.
        out: a folder. A search that was stopped goes on from there, and ends as it would have without the stop.

    Returns:
        The best prefix ever evaluated that survives in every prompt. Ctrl-C ends the search early.

    Raises:
        MechsteerError: an option is out of range, the objective has no gradient, no allowed prefix can be made, `out`
            holds another search, or it cannot fit in memory.
    """
    began = time.perf_counter()
    one_of("method", method, METHODS)
    chosen_moves = tuple(moves)
    for each in chosen_moves:
        one_of("moves", each, MOVES)
    limits = {"evaluations": evaluations, "width": width, "top_k": top_k, "restarts": restarts, "n_tokens": n_tokens}
    for name, value in (limits | {"steps": steps}).items():
        if value is not None and value < 1:
            raise MechsteerError(f"{name}={value} is none. Pass at least 1.")
    if method == "mixed" and not set(chosen_moves) - {"swap", "cross"}:
        raise MechsteerError(f"moves={chosen_moves} change no token. Pass 'replace' too.")
    keep = constraints or Constraints()
    given = model.prompts(prompts)
    first = None if start is None else tuple(int(each) for each in start)
    if first is not None:
        check_ids(model, first)
        if not first or n_tokens not in (None, len(first)):
            raise MechsteerError(f"start has {len(first)} tokens and n_tokens={n_tokens}. Pass one of them.")
    size = n_tokens or (len(first) if first else given.n_slots)
    if not size:
        raise MechsteerError("How long the prefix is to be is not said. Pass n_tokens=, start=, or prompts with slots.")
    keep = replace(keep, min_tokens=keep.min_tokens or size, max_tokens=keep.max_tokens or size)
    options = {
        "method": method, "start": first, "n_tokens": size, "width": width, "top_k": top_k, "restarts": restarts,
        "evaluations": evaluations, "moves": chosen_moves, "seed": seed, "constraints": repr(keep),
    }  # fmt: skip
    search = _Search(model, given, objective, keep, **{**options, "constraints": keep})
    text = json.dumps([model.id.hash, given.hash, repr(objective), {**options, "evaluations": 0}])
    store = None if out is None else SearchFolder(out, sha256(text.encode()).hexdigest())
    if store is not None:
        store.load(search.restore)
    search.memory.announce("Prefix search", show=progress)
    finished, done = True, len(search.tried)
    with bar("candidates", evaluations, show=progress) as shown:
        shown.advance(done)
        try:
            while len(search.tried) < evaluations and (steps is None or search.state.steps < steps) and search.step():
                shown.advance(len(search.tried) - done)
                done = len(search.tried)
                if tell is not None and search.best is not None:
                    tell(done, search.seen[search.best], search.trip.text(search.best))
                if store is not None:
                    store.save(search.as_json, due=True)
        except KeyboardInterrupt:
            finished = False
        finally:
            if store is not None:
                store.save(search.as_json)
    return search.report(time.perf_counter() - began, finished, {**options, "objective": repr(objective)})


@dataclass
class _State:
    """Where a search stands, besides the candidates that were tried."""

    run: int = 0
    steps: int = 0
    turn: int = 0
    idle: int = 0
    dry: int = 0
    current: Ids = ()
    first: int = 0
    origin: Ids = ()


@dataclass
class _Search:
    """A search under way. Every step draws from a generator of its own, so that one redone after a stop is the same."""

    model: Model
    prompts: Any
    objective: Objective
    keep: Constraints
    method: str
    start: Ids | None
    n_tokens: int
    width: int
    top_k: int
    restarts: int
    evaluations: int
    moves: tuple[str, ...]
    seed: int
    constraints: Constraints
    state: _State = field(default_factory=_State)
    seen: dict[Ids, float] = field(default_factory=dict)
    tried: list[Ids] = field(default_factory=list)
    bests: list[float] = field(default_factory=list)
    best: Ids | None = None

    def __post_init__(self) -> None:
        self.losses = CandidateLosses(self.model, self.prompts, self.objective, fluency=float(self.keep.fluency))
        # Refused now where it does not fit the context, or memory.
        self.memory = self.losses.memory(self.keep.max_tokens or self.n_tokens)
        self.memory.check("This prefix search", devices_of(self.model), "Pass fewer or shorter prompts.")
        self.legal = Legal(self.model, self.losses.prompts, self.keep)
        self.trip = self.legal.trip
        self.allowed = torch.tensor(self.legal.allowed, device=self.model.device)
        self.table = self.losses.table[self.allowed].double()
        self._top: tuple[Ids, list[list[int]]] = ((), [])

    # ---- one step ----

    def step(self) -> bool:
        """Go on by one step, wholly or, where it is interrupted, not at all; False where nothing is left to do."""
        kept, done, best = replace(self.state), len(self.tried), self.best
        try:
            return self._step()
        except BaseException:
            for ids in self.tried[done:]:
                del self.seen[ids]
            self.state, self.best = kept, best
            del self.tried[done:], self.bests[done:]
            raise

    def _step(self) -> bool:
        state = self.state
        rng = np.random.default_rng([self.seed, state.run, state.steps])
        share = self.evaluations * (state.run + 1) // self.restarts
        if len(self.tried) >= share and state.run + 1 < self.restarts:
            state.run, state.current, state.first = state.run + 1, (), len(self.tried)
        before = len(self.tried)
        if not state.current:
            self._begin(rng)
        else:
            {"hotflip": self._hotflip, "gcg": self._gcg, "mixed": self._mixed}[self.method](rng)
        state.steps += 1
        state.dry = 0 if len(self.tried) > before else state.dry + 1
        return state.dry < _DRY

    def _begin(self, rng: np.random.Generator) -> None:
        state, ids = self.state, None
        if self.start is not None and not state.run and self.start not in self.seen:
            self.evaluate([self.start], self.start)
            ids = self.start if self.legal.valid([self.start])[0] else self._mended(self.start)
        for _ in range(8):
            if ids is not None and self.legal.valid([ids])[0]:
                break
            ids = self._random(rng)
        else:
            raise MechsteerError(
                f"No prefix of {self.n_tokens} tokens that survives as text and keeps to {self.keep} was found. "
                "Loosen the constraints."
            )
        self.evaluate([ids], ids)
        if ids in self.seen:
            state.current = state.origin = ids
            state.turn = state.idle = 0

    def _random(self, rng: np.random.Generator) -> Ids | None:
        allowed, n = self.allowed.cpu().numpy(), min(_DRAWN, len(self.allowed))
        return make.built(
            [rng.choice(allowed, size=n, replace=False).tolist() for _ in range(self.n_tokens)], self.legal.begins
        )

    def _mended(self, ids: Ids) -> Ids | None:
        """The start with the tokens replaced that keep it from surviving, each by the first that the gradient ranks."""
        legal = set(self.allowed.tolist())
        top = self.top(ids)
        ranked = [[*([token] if token in legal else []), *top[slot]] for slot, token in enumerate(ids)]
        return make.built(ranked, self.legal.begins)

    def _hotflip(self, rng: np.random.Generator) -> None:
        state = self.state
        slot = state.turn % len(state.current)
        flips = make.replacements(state.current, self.top(state.current), slot)
        self._move(self.evaluate(self.fresh(flips)[: self.width], state.current))
        state.turn += 1
        if state.idle >= len(state.current):
            # A round without gain: on from where it began with a third of it redrawn, or from random tokens.
            own = self.start is not None and not state.run
            self._elsewhere(state.origin if own else None, max(1, self.n_tokens // 3), rng)

    def _gcg(self, rng: np.random.Generator) -> None:
        top, state = self.top(self.state.current), self.state
        found = self._drawn(lambda n: make.random_replacements(state.current, top, n, rng), self.width)
        if found:
            state.current = found[0][1]

    def _mixed(self, rng: np.random.Generator) -> None:
        state = self.state
        own = [ids for ids in self.tried[state.first :] if ids != self.start or self.legal.valid([ids])[0]]
        elite = nsmallest(_ELITE, own, key=self.seen.__getitem__)
        odds = 1 / (np.arange(len(elite)) + 1.0)
        if state.idle >= _PATIENCE:
            # Back from where the walk led to one of the best.
            state.current, state.idle = elite[rng.choice(len(elite), p=odds / odds.sum())], 0
        ids = state.current
        top, here = self.top(ids), self.seen[ids]
        shortest, longest = self.keep.min_tokens or 1, self.keep.max_tokens or len(ids)
        options: dict[str, Any] = {"moves": self.moves, "shortest": shortest, "longest": longest}
        # The gradient is worth most right after a move: a few at a time.
        found = self._drawn(
            lambda n: make.mixed(ids, top, n, rng, others=elite, **options), max(1, self.width // MIXED_PARTS)
        )
        better = [
            each
            for loss, each in found
            if loss < here and len(each) == len(ids) and sum(a != b for a, b in zip(ids, each, strict=True)) == 1
        ]
        if len(better) > 1:
            found = sorted(found + self.evaluate(self.fresh(make.merges(ids, better)), ids))
        # As in GCG the walk goes on also where that is no better, so that it leaves local minima.
        state.idle = 0 if found and found[0][0] < self.seen[elite[0]] else state.idle + 1
        state.current = found[0][1] if found else ids

    def _move(self, found: list[tuple[float, Ids]]) -> None:
        state = self.state
        if found and found[0][0] < self.seen[state.current]:
            state.current, state.idle = found[0][1], 0
        else:
            state.idle += 1

    def _elsewhere(self, base: Ids | None, n: int, rng: np.random.Generator) -> None:
        """Go on from a prefix with n tokens redrawn, or from a random one."""
        state = self.state
        state.idle = state.turn = 0
        if base is None:
            made = self._random(rng)
            fresh = [] if made is None else self.fresh([made])
        else:
            fresh = self.fresh([make.kicked(base, n, self.top(base), rng) for _ in range(32)])
        found = self.evaluate(fresh[:1], fresh[0]) if fresh else []
        if found:
            state.current = found[0][1]

    def _drawn(self, draw: Callable[[int], list[Ids]], width: int) -> list[tuple[float, Ids]]:
        """So many valid candidates that were not tried yet, evaluated, best first."""
        kept: dict[Ids, None] = {}
        for _ in range(4):
            kept |= dict.fromkeys(self.fresh(draw(width)))
            if len(kept) >= width:
                break
        return self.evaluate(list(kept)[:width], self.state.current)

    # ---- candidates ----

    def top(self, ids: Ids) -> list[list[int]]:
        """For each slot the tokens that the loss falls with most, to first order, best first."""
        if self._top[0] != ids:
            _, gradient = self.losses.gradient(ids)
            scores = gradient @ self.table.T
            if self.keep.fluency:
                likely = self.losses.next_tokens(ids)[:, self.allowed].double()
                scores = scores - float(self.keep.fluency) / len(ids) * likely
            best = scores.topk(min(self.top_k, scores.shape[1]), largest=False).indices
            self._top = ids, self.allowed[best].tolist()
        return self._top[1]

    def evaluate(self, candidates: Sequence[Ids], base: Ids) -> list[tuple[float, Ids]]:
        """Exact losses, best first, of as many as the search has left; those that were tried cost nothing."""
        fresh = [each for each in dict.fromkeys(candidates) if each not in self.seen]
        fresh = fresh[: max(0, self.evaluations - len(self.tried))]
        for ids, loss in zip(fresh, self.losses.of(fresh, base=base).tolist(), strict=True):
            self.seen[ids] = loss
            self.tried.append(ids)
        ordered = sorted((self.seen[ids], ids) for ids in dict.fromkeys(candidates) if ids in self.seen)
        lowest = math.nan if self.best is None else self.seen[self.best]
        for loss, ids in ordered:
            if loss >= lowest:
                break
            if self.legal.approved(ids):
                self.best = ids
                break
        now = math.nan if self.best is None else self.seen[self.best]
        last = self.bests[-1] if self.bests else math.nan
        for ids in fresh:
            last = now if ids == self.best else last
            self.bests.append(last)
        return ordered

    def fresh(self, candidates: Iterable[Ids]) -> list[Ids]:
        """Those that may be tried and were not."""
        new = [each for each in dict.fromkeys(candidates) if each not in self.seen]
        return [each for each, fine in zip(new, self.legal.valid(new), strict=True) if fine]

    # ---- in a folder ----

    def as_json(self) -> dict[str, Any]:
        """What was tried, and where the search stands."""
        return {
            "tried": self.tried, "losses": [self.seen[ids] for ids in self.tried], "best": self.best,
            "bests": [None if math.isnan(each) else each for each in self.bests], "state": vars(self.state),
        }  # fmt: skip

    def restore(self, found: dict[str, Any]) -> None:
        """Stand where `as_json` was written."""
        self.tried = [tuple(each) for each in found["tried"]]
        self.seen = dict(zip(self.tried, found["losses"], strict=True))
        self.bests = [math.nan if each is None else each for each in found["bests"]]
        self.best = None if found["best"] is None else tuple(found["best"])
        state: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["state"].items()}
        self.state = _State(**state)
        if self.tried and abs(self.losses.of(self.tried[:1])[0] - self.seen[self.tried[0]]) > 1e-4:
            raise MechsteerError(
                "out= holds a search of another objective: its first loss differs. Choose another folder."
            )

    # ---- the answer ----

    def report(self, seconds: float, finished: bool, options: dict[str, Any]) -> FoundPrefix:
        if self.best is None:
            raise MechsteerError(
                f"None of {len(self.tried)} candidates survives as text in every prompt and keeps to {self.keep}. "
                "Evaluate more, or loosen the constraints."
            )
        data = xr.Dataset(
            {
                "loss": ("evaluated", np.array([self.seen[ids] for ids in self.tried])),
                "best": ("evaluated", self.bests),
            },
            coords={"evaluated": np.arange(1, len(self.tried) + 1)},
        )
        found = {
            "ids": list(self.best), "text": self.trip.text(self.best), "loss": self.seen[self.best],
            "round_trip": list(self.trip.survives(self.best)), "method": self.method, "finished": finished,
        }  # fmt: skip
        options = {**options, "flops": self.losses.flops}
        made = provenance(model=self.model.id, seconds=seconds, found=found, **options)
        return found_prefix(Result(data, provenance=made), found)
