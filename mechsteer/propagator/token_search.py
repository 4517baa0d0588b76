"""Searches for a few tokens that move an objective: one-step projection, greedy, beam, and sorted single tokens."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.interventions import SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import one_of
from mechsteer.prompts import Prompts
from mechsteer.propagator.gap import cosines, gap_gradient
from mechsteer.propagator.intervals import check_finite
from mechsteer.result import Result, provenance
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import Filler, allowed_tokens, check_ids, embeddings, insert, token_texts

METHODS = ("projection", "greedy", "beam", "sorted")


@dataclass(frozen=True, eq=False, repr=False)
class FoundTokens:
    """Tokens that a search found, and what they did.

    Attributes:
        ids: in their order.
        text: what they read as.
        gaps: a Result with `gap` [step, prompt]: the objective with the first `step` tokens in place, from step 0
            without any. `token` along it is the text of the step's token.
        forward_passes: how often the objective was evaluated on a prompt with some tokens, however little of that pass
            had to be computed; a gradient counts as one.
        round_trip: for each prompt, whether its text with the tokens in place encodes to the same ids again; empty
            without a tokenizer.
        method: by which they were found.
    """

    ids: tuple[int, ...]
    text: str
    gaps: Result
    forward_passes: int
    round_trip: tuple[bool, ...]
    method: str

    def __repr__(self) -> str:
        means = self.gaps["gap"].mean("prompt").values
        return (
            f"FoundTokens({self.text!r} by {self.method}: mean {means[0]:.3g} -> {means[-1]:.3g}, "
            f"{self.forward_passes} forward passes)"
        )

    def _repr_html_(self) -> str:
        means = self.gaps["gap"].mean("prompt").values.tolist()
        tokens = ["none", *map(str, self.gaps["token"].values[1:])]
        rows = [
            (step, markup.code(repr(token)), mean) for step, (token, mean) in enumerate(zip(tokens, means, strict=True))
        ]
        kept = f"{sum(self.round_trip)} of {len(self.round_trip)} prompts" if self.round_trip else "no tokenizer to ask"
        facts = {
            "text": markup.code(repr(self.text)),
            "survives as text in": kept,
            "forward passes": self.forward_passes,
        }
        table = markup.table(("step", "token", "mean objective"), rows)
        return markup.card("FoundTokens", markup.facts(facts), table, about=f"by {self.method}")


def search_tokens(
    model: Model,
    prompts: PromptsLike,
    *,
    measure: Objective,
    method: str = "greedy",
    n_tokens: int = 3,
    until: float | None = None,
    where: str = "suffix",
    by: str = "cosine",
    beam: int = 4,
    candidates: Iterable[int] | None = None,
    preselect: int | None = None,
    forbidden: Iterable[int | str] = (),
    filler: Filler = None,
    progress: bool = True,
) -> FoundTokens:
    """Search for a short suffix or prefix, the same for all prompts, that raises an objective's mean over prompts.

        gap = ms.LogitGap(" cats", " dogs", tokenizer=model)
        search_tokens(model, prompts, measure=gap, method="beam", where="prefix", until=0.0)

    - "projection": the one step of "The Mechanism of Logit Gap Steering", section 4. `n_tokens` slots hold the filler;
      each gets the token whose embedding is nearest to the mean gradient there.
    - "greedy": one token after the other, each the best of all candidates by the exact objective.
    - "beam": the same, keeping the `beam` best sequences of each length.
    - "sorted": the forward-only search of the later paper (arXiv:2506.24056): every candidate alone by the exact
      objective, sorted, added one by one in this order.

    With `preselect`, "greedy", "beam" and "sorted" measure that many candidates of each slot instead of all: those that
    the gradient g at the slot, where the filler f stands, puts first by <g, E(t) - f>, the first-order change of the
    mean over prompts (the candidates of Wallace et al. 2019, "Universal adversarial triggers"). Exact values then
    decide among these.

    Candidates are measured through `sweep`: keys and values of what stands before the slot are computed once.

    Args:
        model: what to run.
        prompts: what the tokens are put into; see `insert`.
        measure: what to raise; `-gap` lowers a gap. "projection" and `preselect` need its gradient.
        method: see above.
        n_tokens: at most this many.
        until: stop when the objective is at least this on every prompt, such as 0.0 for a closed gap; None goes on to
            `n_tokens`.
        where: "suffix" or "prefix", as for `insert`. New tokens come after the ones found, on either side.
        by: of "projection": "cosine" or "inner_product".
        beam: sequences kept by "beam".
        candidates: ids to choose from; None for all of `allowed_tokens`.
        preselect: candidates of each slot that are measured; None for all. It needs the objective's gradient.
        forbidden: see `allowed_tokens`; special tokens always are, also among `candidates`.
        filler: what stands in slots where the gradient is taken; see `gap_gradient`.
        progress: show a bar on standard error for what takes longer than two seconds.

    Raises:
        MechsteerError: an option does not exist or is out of range, no candidate is left, or the objective is NaN.
    """
    began = time.perf_counter()
    one_of("method", method, METHODS)
    one_of("by", by, ("cosine", "inner_product"))
    for name, value in (("n_tokens", n_tokens), ("beam", beam), ("preselect", preselect)):
        if value is not None and value < 1:
            raise MechsteerError(f"{name}={value} is none. Pass at least 1.")
    allowed = allowed_tokens(model, forbidden=forbidden)
    if candidates is not None:
        asked = list(dict.fromkeys(candidates))
        check_ids(model, asked)
        allowed = sorted(set(allowed) & set(asked))
        if not allowed:
            raise MechsteerError(
                f"All {len(asked)} candidates are forbidden or special tokens. Pass other candidates, or forbid fewer."
            )
    scores = _Scores(model, model.prompts(prompts), measure, where, filler, progress)

    def few(ids: tuple[int, ...]) -> list[int]:
        """The candidates that are measured after these ids."""
        if preselect is None or preselect >= len(allowed):
            return allowed
        first_order = scores.table[allowed].double() @ scores.gradients(ids, 1)[0]
        best = first_order.argsort(descending=True, stable=True)[:preselect].tolist()
        return sorted(allowed[each] for each in best)

    def closed(gap: np.ndarray) -> bool:
        return until is not None and bool((gap >= until).all())

    found = _Found((), [scores.of(())])
    if closed(found.gaps[0]):
        pass
    elif method in ("greedy", "beam"):
        found = _beam(scores, found, few, n_tokens, beam if method == "beam" else 1, closed)
    else:
        if method == "sorted":
            tried = few(())
            means = scores.extended((), tried).mean(1)
            order = [tried[index] for index in np.argsort(-means, kind="stable")[:n_tokens]]
        else:
            order = _projected(scores, allowed, n_tokens, by)
        for token in order:
            ids = (*found.ids, token)
            found = _Found(ids, [*found.gaps, scores.of(ids)])
            if closed(found.gaps[-1]):
                break
    return _report(scores, found, method, time.perf_counter() - began)


@dataclass(frozen=True)
class _Found:
    """Ids, and the objective [prompt] after each step."""

    ids: tuple[int, ...]
    gaps: list[Float[np.ndarray, " prompt"]]


class _Scores:
    """The exact objective of prompts with tokens put in, and how often it was asked for."""

    def __init__(
        self, model: Model, prompts: Prompts, measure: Objective, where: str, filler: Filler, progress: bool
    ) -> None:
        self.model, self.prompts, self.where, self.progress = model, prompts, where, progress
        self.filler = filler
        self.measure = measure.named("value")
        self.table = embeddings(model)
        self.forward_passes = 0

    def of(self, ids: Sequence[int]) -> Float[np.ndarray, " prompt"]:
        """With these ids in place."""
        filled = insert(self.prompts, ids, where=self.where)
        swept = sweep(self.model, filled, axes={"cell": [0]}, build=lambda cell: None, measure=self.measure)
        return self._checked(swept)[0]

    def extended(self, ids: Sequence[int], candidates: Sequence[int]) -> Float[np.ndarray, "candidate prompt"]:
        """With these ids in place and one candidate after them."""
        slotted = insert(self.prompts, ids, where=self.where, slots=1)
        swept = sweep(
            self.model, slotted, axes={"token": candidates}, measure=self.measure, progress=self.progress,
            build=lambda token: SoftPrefix(self.table[token][None]),
        )  # fmt: skip
        return self._checked(swept)

    def gradients(self, ids: Sequence[int], slots: int) -> Float[Tensor, "slot d_model"]:
        """Of the mean over prompts at slots after these ids, where the filler stands."""
        slotted = insert(self.prompts, ids, where=self.where, slots=slots)
        found = gap_gradient(self.model, slotted, measure=self.measure, filler=self.filler, progress=self.progress)
        self.forward_passes += len(slotted)
        return found.slots.mean(0).double()

    def _checked(self, swept: Result) -> Float[np.ndarray, "cell prompt"]:
        values = swept.data["value"].values
        self.forward_passes += values.size
        check_finite(swept.data["value"], repr(self.measure))
        return values


def _beam(
    scores: _Scores,
    start: _Found,
    few: Callable[[tuple[int, ...]], list[int]],
    n_tokens: int,
    size: int,
    closed: Callable[..., bool],
) -> _Found:
    kept = [start]
    for _ in range(n_tokens):
        tried = [few(each.ids) for each in kept]
        gaps = [scores.extended(each.ids, tokens) for each, tokens in zip(kept, tried, strict=True)]
        longer = [
            _Found((*each.ids, token), [*each.gaps, gap])
            for each, tokens, found in zip(kept, tried, gaps, strict=True)
            for token, gap in zip(tokens, found, strict=True)
        ]
        best = np.argsort([-each.gaps[-1].mean() for each in longer], kind="stable")[:size]
        kept = [longer[index] for index in best]
        done = [each for each in kept if closed(each.gaps[-1])]
        if done:
            return done[0]
    return kept[0]


def _projected(scores: _Scores, allowed: Sequence[int], n_tokens: int, by: str) -> list[int]:
    table = scores.table[list(allowed)].double()
    return [
        allowed[int((cosines(table, target) if by == "cosine" else table @ target).argmax())]
        for target in scores.gradients((), n_tokens)
    ]


def _report(scores: _Scores, found: _Found, method: str, seconds: float) -> FoundTokens:
    model = scores.model
    filled = insert(scores.prompts.without_completions(), found.ids, where=scores.where)
    trips: tuple[bool, ...] = ()
    if model.tokenizer is not None:
        rows = [row[keep].tolist() for row, keep in zip(filled.tokens, filled.mask, strict=True)]
        trips = tuple(
            model.tokenizer.encode(text, add_special_tokens=False) == row
            for text, row in zip(filled.texts, rows, strict=True)
        )
    texts = token_texts(model, found.ids)
    data = xr.Dataset(
        {"gap": (("step", "prompt"), np.stack(found.gaps))},
        coords={
            "step": np.arange(len(found.gaps)), "token": ("step", ["", *texts]),
            "prompt": list(filled.labels) if filled.labels else np.arange(len(filled)),
        },
    )  # fmt: skip
    made = provenance(
        model=model.id, seconds=seconds, method=method, where=scores.where, measure=repr(scores.measure),
        ids=list(found.ids), forward_passes=scores.forward_passes,
    )  # fmt: skip
    text = "".join(texts)
    return FoundTokens(found.ids, text, Result(data, provenance=made), scores.forward_passes, trips, method)
