"""From soft prefixes to tokens: the nearest token of each slot, beam and Viterbi decoding, several slots at once."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.interventions import SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import one_of
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.embedding_space import EmbeddingSpace
from mechsteer.prefix.legal import Legal
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prefix.soft import FoundSoft
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import check_ids, token_texts

Soft = FoundSoft | Float[Tensor, "slot d_model"]
"""A soft prefix that was found, or its embeddings."""
METHODS = ("beam", "viterbi")
# With constraints, so many times `top_k` tokens of a slot are looked at for `top_k` that keep to them.
_PASSED_OVER = 8


@dataclass(frozen=True, eq=False, repr=False)
class Hardened:
    """Tokens in the place of a soft prefix.

    Attributes:
        ids: in their order.
        text: what they read as.
        soft_loss: of the soft prefix.
        nearest_loss: of the tokens that the search started from or would have had without one: the nearest to the soft
            prefix; for `replace_tokens` those that it was given.
        loss: of `ids`; never above that of any other sequence of tokens that was evaluated.
        evaluations: prefixes whose loss was computed on all prompts, soft and half-hard ones among them.
        steps: a Result with `loss` [step], the lowest after each step of the search.
    """

    ids: tuple[int, ...]
    text: str
    soft_loss: float
    nearest_loss: float
    loss: float
    evaluations: int
    steps: Result

    @property
    def gap_closed(self) -> float:
        """(nearest - final) / (nearest - soft): 1 where the tokens do what the soft prefix does, 0 where the search
        gained nothing; NaN where there was no gap."""
        gap = self.nearest_loss - self.soft_loss
        return (self.nearest_loss - self.loss) / gap if gap > 0 else float("nan")

    def __repr__(self) -> str:
        return (
            f"Hardened({self.text!r}: soft {self.soft_loss:.3g}, nearest tokens {self.nearest_loss:.3g}, "
            f"these {self.loss:.3g}; {self.evaluations} evaluations)"
        )

    def _repr_html_(self) -> str:
        rows = {
            "text": markup.code(repr(self.text)),
            "loss": f"soft prefix {self.soft_loss:.4g}, nearest tokens {self.nearest_loss:.4g}, these {self.loss:.4g}",
            "gap closed": f"{self.gap_closed:.0%}",
            "evaluations": self.evaluations,
        }
        return markup.card("Hardened", markup.facts(rows), about=f"{len(self.ids)} tokens")


def project(model: Model, soft: Soft, *, by: str = "cosine", allowed: Sequence[int] | None = None) -> tuple[int, ...]:
    """The token nearest to each embedding of a soft prefix.

    Source: "Steering Prefix Generation", section 3.2, which takes the cosine.

    Args:
        model: whose vocabulary.
        soft: one embedding a slot.
        by: "cosine", "inner_product" or "l2".
        allowed: ids to choose from; None for all but special and chat template tokens.

    Raises:
        MechsteerError: there is no such `by`, or `allowed` is empty or holds what is no id; or another model.
    """
    return tuple(each[0] for each in nearest_tokens(model, soft, k=1, by=by, allowed=allowed))


def nearest_tokens(
    model: Model, soft: Soft, *, k: int, by: str = "cosine", allowed: Sequence[int] | None = None
) -> list[list[int]]:
    """The k tokens nearest to each embedding of a soft prefix, nearest first; options as for `project`."""
    embeddings = _embeddings(model, soft)
    ids, _ = EmbeddingSpace(model, allowed).nearest(embeddings, k, by=by)
    return ids.tolist()


def decode_beam(
    model: Model,
    soft: Soft,
    prompts: PromptsLike,
    objective: Objective,
    *,
    method: str = "beam",
    beam: int = 8,
    top_k: int = 16,
    by: str = "cosine",
    allowed: Sequence[int] | None = None,
    constraints: Constraints | None = None,
    weights: Float[Tensor, " _"] | None = None,
    progress: bool = True,
) -> Hardened:
    """Tokens for a soft prefix, one slot after the other, by the exact objective on all prompts.

        decode_beam(model, found, slotted, ms.TeacherForcedCE())

    Slots become tokens from the first to the last; those still to come stay soft, so that every loss is one of the
    whole prefix: it starts as the soft prefix's and ends as the tokens'. "Steering Prefix Generation", section 6.1,
    names beam search and Viterbi decoding by the likeness of embeddings; here likeness only says what is tried.

    Args:
        model: what to run.
        soft: one embedding a slot.
        prompts: with as many slots.
        objective: one number per prompt, which goes down, as for `optimise_soft_prefix`.
        method: what is kept of the sequences of each length: "beam", the `beam` best; "viterbi", the best one for each
            token of the last slot, as if only neighbouring tokens acted together.
        beam: sequences kept by "beam". With top_k ** (slots - 1) of them the best of all combinations is found.
        top_k: tokens tried in each slot, those nearest to its embedding.
        by, allowed: see `project`.
        constraints: tokens that would break them, or not survive as text, after what stands before are passed over for
            the next nearest. Instead of `allowed`.
        weights: of each prompt in the mean; see `PrefixLoss`.
        progress: show a bar on standard error for what takes longer than two seconds.

    Raises:
        MechsteerError: an option does not exist or is out of range, prompts, prefix and objective do not fit, both
            `allowed` and `constraints` are given, or no token near the soft prefix keeps to the constraints.
    """
    began = time.perf_counter()
    one_of("method", method, METHODS)
    _positive(beam=beam, top_k=top_k)
    if constraints is not None and allowed is not None:
        raise MechsteerError("allowed= and constraints= are both given. Pass one of them.")
    legal = None if constraints is None else Legal(model, model.prompts(prompts), constraints)
    exact = _Exact(model, soft, prompts, objective, weights, legal.allowed if legal else allowed, progress)
    tried = exact.candidates(top_k if legal is None else _PASSED_OVER * top_k, by)
    nearest = tuple(each[0] for each in tried)
    exact.of([(), nearest])
    kept: list[tuple[int, ...]] = [()]
    trail = [exact.known[()]]
    for slot, choices in enumerate(tried):
        longer = _extended(kept, choices, top_k, legal, last=slot + 1 == len(tried))
        if not longer:
            raise MechsteerError(
                f"None of the {len(choices)} tokens nearest to slot {slot} keeps to {constraints} after any of the "
                f"{len(kept)} beginnings. Loosen the constraints, or raise top_k."
            )
        order = np.argsort(exact.of(longer), kind="stable")
        ranked = [longer[place] for place in order]
        if method == "beam":
            kept = ranked[:beam]
        else:
            best: dict[int, tuple[int, ...]] = {}
            for ids in ranked:
                best.setdefault(ids[-1], ids)
            kept = list(best.values())
        trail.append(exact.known[kept[0]])
    options = {"method": method, "beam": beam, "top_k": top_k, "by": by}
    # The nearest tokens are a sequence that was evaluated too, and may break what is asked of a whole prefix.
    whole = None if legal is None else lambda ids: legal.valid([ids])[0]
    return exact.report(nearest, trail, time.perf_counter() - began, whole, **options)


def _extended(
    kept: Sequence[tuple[int, ...]], choices: Sequence[int], top_k: int, legal: Legal | None, *, last: bool
) -> list[tuple[int, ...]]:
    """Each beginning with each of the first `top_k` choices that may follow it."""
    longer: list[tuple[int, ...]] = []
    for ids in kept:
        made = [(*ids, token) for token in choices]
        if legal is not None:
            fine = legal.valid(made) if last else legal.begins(made)
            made = [each for each, good in zip(made, fine, strict=True) if good]
        longer += made[:top_k]
    return longer


def replace_tokens(
    model: Model,
    soft: Soft,
    prompts: PromptsLike,
    objective: Objective,
    *,
    ids: Sequence[int] | None = None,
    at_once: int = 2,
    top_k: int = 8,
    rounds: int = 4,
    tries: int | None = 512,
    by: str = "cosine",
    allowed: Sequence[int] | None = None,
    weights: Float[Tensor, " _"] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Hardened:
    """Tokens for a soft prefix, bettered by exchanging several at once for others that are near the soft prefix.

    Each round evaluates all ways to put tokens of the top-k lists into `at_once` slots (or fewer of them: a token may
    stay), and takes the best, until none is better. "Steering Prefix Generation", section 6.1, third idea.

    Args:
        model, soft, prompts, objective, by, allowed, weights, progress: as for `decode_beam`.
        ids: to start from; None for `project`.
        at_once: slots exchanged together; all of them where there are fewer.
        top_k: tokens tried in each slot, besides the one there.
        rounds: at most this many.
        tries: at most this many prefixes a round, drawn at random where there are more; None for all.
        seed: of the draw.

    Raises:
        MechsteerError: as `decode_beam`, or there is another number of ids than of slots.
    """
    began = time.perf_counter()
    _positive(at_once=at_once, top_k=top_k, rounds=rounds, tries=1 if tries is None else tries)
    exact = _Exact(model, soft, prompts, objective, weights, allowed, progress)
    lists = exact.candidates(top_k, by)
    start = tuple(each[0] for each in lists) if ids is None else tuple(ids)
    if len(start) != exact.n_slots:
        raise MechsteerError(f"ids= has {len(start)} ids for {exact.n_slots} slots. Pass one for each.")
    check_ids(model, start)
    exact.of([(), start])
    here, trail = start, [exact.known[start]]
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        fresh = [each for each in _exchanged(here, lists, at_once) if each not in exact.known]
        if tries is not None and len(fresh) > tries:
            fresh = [fresh[place] for place in sorted(rng.choice(len(fresh), tries, replace=False))]
        if not fresh:
            break
        losses = exact.of(fresh)
        place = int(losses.argmin())
        if not losses[place] < exact.known[here]:
            break
        here = fresh[place]
        trail.append(exact.known[here])
    options = {"at_once": at_once, "top_k": top_k, "rounds": rounds, "by": by, "seed": seed}
    return exact.report(start, trail, time.perf_counter() - began, method="replace", **options)


def _exchanged(here: tuple[int, ...], lists: Sequence[Sequence[int]], at_once: int) -> Iterable[tuple[int, ...]]:
    """All prefixes that differ from `here` in at most `at_once` slots, there by tokens of the slots' lists."""
    seen: dict[tuple[int, ...], None] = {}
    for slots in itertools.combinations(range(len(here)), min(at_once, len(here))):
        for tokens in itertools.product(*[dict.fromkeys((here[slot], *lists[slot])) for slot in slots]):
            changed = dict(zip(slots, tokens, strict=True))
            seen[tuple(changed.get(slot, token) for slot, token in enumerate(here))] = None
    return seen


class _Exact:
    """The exact loss of prefixes whose first slots are tokens and whose others are soft, each computed once.

    Attributes:
        known: the loss of what was evaluated, by the ids of its first slots.
    """

    def __init__(
        self,
        model: Model,
        soft: Soft,
        prompts: PromptsLike,
        objective: Objective,
        weights: Float[Tensor, " _"] | None,
        allowed: Sequence[int] | None,
        progress: bool,
    ) -> None:
        self._model, self._objective, self._progress = model, objective, progress
        self._soft = _embeddings(model, soft)
        self._prompts: Prompts = model.prompts(prompts).padded("right")
        self._space = EmbeddingSpace(model, allowed)
        self.n_slots = len(self._soft)
        if self._prompts.n_slots != self.n_slots:
            raise MechsteerError(
                f"The soft prefix has {self.n_slots} embeddings, and the prompts reserve {self._prompts.n_slots} "
                "slots. Build the prompts with slots= that many."
            )
        self._share = PrefixLoss.shares(self._prompts, objective, weights).cpu().numpy()
        self.known: dict[tuple[int, ...], float] = {}

    def candidates(self, k: int, by: str) -> list[list[int]]:
        return self._space.nearest(self._soft, k, by=by)[0].tolist()

    def of(self, prefixes: Sequence[tuple[int, ...]]) -> Float[np.ndarray, " prefix"]:
        """The loss of each."""
        fresh = [each for each in dict.fromkeys(prefixes) if each not in self.known]
        if fresh:
            table, soft = self._space.table, self._soft.to(self._space.table)
            swept = sweep(
                self._model, self._prompts, axes={"prefix": range(len(fresh))}, measure=self._objective.named("loss"),
                build=lambda prefix: SoftPrefix(torch.cat([table[list(fresh[prefix])], soft[len(fresh[prefix]) :]])),
                progress=self._progress,
            )  # fmt: skip
            losses = swept["loss"].values.astype(np.float64) @ self._share
            if not np.isfinite(losses).all():
                shown = fresh[int((~np.isfinite(losses)).argmax())]
                raise MechsteerError(f"{self._objective!r} is NaN or infinite with the ids {shown}. Choose another.")
            self.known |= dict(zip(fresh, losses.tolist(), strict=True))
        return np.array([self.known[each] for each in prefixes])

    def report(
        self,
        nearest: tuple[int, ...],
        trail: Sequence[float],
        seconds: float,
        fine: Callable[[tuple[int, ...]], bool] | None = None,
        **options: Any,
    ) -> Hardened:
        ranked = sorted((ids for ids in self.known if len(ids) == self.n_slots), key=lambda ids: self.known[ids])
        best = next(ids for ids in ranked if fine is None or fine(ids))
        made = provenance(
            model=self._model.id, seconds=seconds, objective=repr(self._objective), ids=list(best),
            evaluations=len(self.known), prompts=self._prompts.hash, **options,
        )  # fmt: skip
        data = xr.Dataset({"loss": ("step", np.array(trail))}, coords={"step": np.arange(len(trail))})
        return Hardened(
            best, "".join(token_texts(self._model, best)), self.known[()], self.known[nearest], self.known[best],
            len(self.known), Result(data, provenance=made),
        )  # fmt: skip


def _embeddings(model: Model, soft: Soft) -> Float[Tensor, "slot d_model"]:
    if isinstance(soft, FoundSoft):
        model.check_same(soft.model, "This soft prefix")
        soft = soft.embeddings
    SoftPrefix(soft).check_model(model)
    return soft.detach().to(model.device)


def _positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise MechsteerError(f"{name}={value} is none. Pass at least 1.")
