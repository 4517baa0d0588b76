"""How equal prefixes are to a reference, on requests that they were not made for."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.hooks import Intervention
from mechsteer.interventions import SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import TeacherForcedCE
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.prompts import Prompts
from mechsteer.result import Result, bootstrap_ci, provenance
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import allowed_tokens, check_ids, insert

if TYPE_CHECKING:
    from mechsteer.judges import Judge

Prefix = Sequence[int] | Float[Tensor, "slot d_model"]
"""Ids of tokens, or embeddings of a soft prefix."""

REFERENCE, RANDOM = "reference", "random tokens"


def evaluate_prefixes(
    model: Model,
    prompts: PromptsLike,
    prefixes: Mapping[str, Prefix],
    *,
    reference: Sequence[int] | None = None,
    completions: Sequence[Sequence[int]] | None = None,
    judge: "Judge | None" = None,
    ce: TeacherForcedCE | None = None,
    k: Sequence[int] = (8, 32),
    n_random: int = 1,
    samples: int = 4,
    temperature: float | int = 1.0,
    max_new_tokens: int = 40,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """One table of what prefixes do, with the reference itself and random tokens beside them.

        held_out = ms.Prompts.from_chats(requests, model, slots=1)
        table = evaluate_prefixes(model, held_out, {"ours": found.ids}, reference=ids, judge=judge)
        table["cross_entropy"].to_series()

    Measures are those of "Steering Prefix Generation", section 2.3, and what its section 6.3 asks for. To see how a
    prefix transfers, pass another model with the same tokenizer, and the first one's completions.

    Args:
        model: what to run.
        prompts: requests with slots, whose number does not matter, or with a user's text to stand before.
        prefixes: by name: ids, none of them for no prefix, or embeddings of a soft prefix.
        reference: ids of the reference prefix; measured as "reference".
        completions: ids that the reference brought about for each prompt; None for those that the prompts hold, or
            else the greedy ones of `reference`.
        judge: says whether a completion shows the behaviour; None for no adherence.
        ce: how tokens are weighted; None for section 2.3's.
        k: lengths of the beginnings that are compared.
        n_random: how many prefixes of random tokens, as many as the reference has or else the first prefix.
        samples: completions drawn for each prompt for `adherence_sampled`.
        temperature: of these.
        max_new_tokens: at most so many tokens a completion.
        seed: of random tokens, draws and intervals.
        progress: show bars on standard error for what takes longer than two seconds.

    Returns:
        A Result over `prefix`, `prompt` and `k`:

            ce [prefix, prompt]                 weighted cross entropy of the reference completion, in nats a token
            weight [prompt]                     with which prompts are pooled
            cross_entropy [prefix]              pooled, with a 95 % bootstrap interval over prompts in `_low`, `_high`
            exact_match [prefix, prompt]        whether the greedy completion is the reference's
            exact_at [prefix, prompt, k]        whether its first k tokens are, where completions end before that too
            overlap_at [prefix, prompt, k]      share of the reference's first k tokens, counted with repetition, that
                                                are among its first k
            adherence_greedy [prefix, prompt]   whether the judge says that the greedy completion shows the behaviour
            adherence_sampled [prefix, prompt]  share of sampled ones
            perplexity [prefix]                 of the prefix after what stands before it; NaN where it has no tokens
            survives [prefix, prompt]           whether its ids survive as text; False for embeddings
            completion [prefix, prompt]         the greedy one as text, and `text` [prefix] of each prefix

    Raises:
        MechsteerError: there is nothing to compare with, a name is taken, or an option is out of range.
    """
    began = time.perf_counter()
    given = model.prompts(prompts).padded("right")
    plain = given.without_completions()
    if model.tokenizer is None:
        raise MechsteerError(f"{model.name} has no tokenizer, and completions are compared as text too. Pass one.")
    if not k or min(k) < 1 or samples < 1 or n_random < 0:
        raise MechsteerError(f"k={list(k)}, samples={samples}, n_random={n_random}: pass k and samples from 1.")
    every = _named(model, prefixes, reference, n_random, seed)
    options = {"max_new_tokens": max_new_tokens, "progress": progress}
    targets = [list(each) for each in completions] if completions is not None else _completions(given)
    if not any(targets):
        if reference is None:
            raise MechsteerError("There is nothing to compare with. Pass completions=, or reference= to make them.")
        targets = _completions(model.generate(insert(plain, reference, where="prefix"), **options))
    ce = ce or TeacherForcedCE()
    trip, surprise = RoundTrip(plain), CandidateLosses(model, plain, ce).surprise
    rows: dict[str, list[np.ndarray]] = {}
    weight = np.zeros(0)
    for prefix in every.values():
        filled, edits = _placed(plain, prefix)
        scored = filled.with_completions(targets)
        swept = sweep(model, scored, axes={}, build=lambda e=edits: e, measure=ce.named("ce"), progress=progress)
        weight = ce.total_weight(scored).double().cpu().numpy()
        greedy = model.generate(filled, interventions=edits, **options)
        ids = None if isinstance(prefix, Tensor) else tuple(prefix)
        row = {"ce": swept["ce"].values.astype(np.float64), **_matches(_completions(greedy), targets, k)}
        row["perplexity"] = np.array(float(surprise([ids])[0].exp()) if ids else np.nan)
        row["survives"] = np.array([ids is not None] * len(plain) if not ids else trip.survives(ids))
        row["completion"] = np.array(greedy.completions, dtype=object)
        row["text"] = np.array("" if not ids else trip.text(ids), dtype=object)
        if judge is not None:
            many = Prompts.concat([filled] * samples)
            drawn = model.generate(many, interventions=edits, temperature=temperature, seed=seed, **options)
            row["adherence_greedy"] = judge.many(greedy.completions)
            row["adherence_sampled"] = judge.many(drawn.completions).reshape(samples, -1).mean(0)
        for name, values in row.items():
            rows.setdefault(name, []).append(values)
    dims = {"exact_at": ("prompt", "k"), "overlap_at": ("prompt", "k"), "perplexity": (), "text": ()}
    arrays = {name: (("prefix", *dims.get(name, ("prompt",))), np.stack(values)) for name, values in rows.items()}
    values = np.stack(rows["ce"])
    low, high = bootstrap_ci((values * weight).T, per=weight, seed=seed)
    arrays |= {
        "weight": (("prompt",), weight),
        "cross_entropy": (("prefix",), values @ weight / weight.sum()),
        "cross_entropy_low": (("prefix",), low),
        "cross_entropy_high": (("prefix",), high),
    }
    labels = list(plain.labels) if plain.labels else np.arange(len(plain))
    text = arrays.pop("text")
    coords = {"prefix": list(every), "prompt": labels, "k": list(k), "text": text}
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, ce=repr(ce), samples=samples,
        temperature=temperature, max_new_tokens=max_new_tokens, judge=None if judge is None else judge.name,
        ids={name: None if isinstance(each, Tensor) else list(each) for name, each in every.items()},
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords), provenance=made)


def _named(
    model: Model, prefixes: Mapping[str, Prefix], reference: Sequence[int] | None, n_random: int, seed: int
) -> dict[str, Prefix]:
    """The prefixes with the baselines."""
    out: dict[str, Prefix] = {} if reference is None else {REFERENCE: list(reference)}
    given: dict[str, Prefix] = {
        name: each if isinstance(each, Tensor) else [int(i) for i in each] for name, each in prefixes.items()
    }
    names = [RANDOM] if n_random == 1 else [f"{RANDOM} {index + 1}" for index in range(n_random)]
    taken = sorted(set(given) & {*out, *names})
    if taken:
        raise MechsteerError(f"A prefix is called {taken[0]!r}, which is the name of a baseline. Rename it.")
    out |= given
    for each in out.values():
        if not isinstance(each, Tensor):
            check_ids(model, each)
    size = len(next(iter(out.values()), ()))
    allowed, rng = allowed_tokens(model), np.random.default_rng(seed)
    out |= {name: rng.choice(allowed, size=size).tolist() for name in names if size}
    if not out:
        raise MechsteerError("evaluate_prefixes got no prefixes. Pass at least one, or reference=.")
    return out


def _placed(plain: Prompts, prefix: Prefix) -> tuple[Prompts, list[Intervention]]:
    if isinstance(prefix, Tensor):
        return insert(plain, where="prefix", slots=len(prefix)), [SoftPrefix(prefix)]
    return insert(plain, list(prefix), where="prefix"), []


def _completions(prompts: Prompts) -> list[list[int]]:
    spans = zip(prompts.tokens, prompts.span("completion"), strict=True)
    return [row[keep].tolist() for row, keep in spans]


def _matches(
    found: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], k: Sequence[int]
) -> dict[str, np.ndarray]:
    """Exact match, exact@k and token overlap@k of "Steering Prefix Generation", section 2.3."""
    pairs = list(zip(found, targets, strict=True))

    def overlap(a: Sequence[int], b: Sequence[int]) -> float:
        shared = sum(min(a.count(token), b.count(token)) for token in set(b))
        return shared / len(b) if b else float(not a)

    return {
        "exact_match": np.array([list(a) == list(b) for a, b in pairs]),
        "exact_at": np.array([[list(a[:n]) == list(b[:n]) for n in k] for a, b in pairs]),
        "overlap_at": np.array([[overlap(list(a[:n]), list(b[:n])) for n in k] for a, b in pairs]),
    }
