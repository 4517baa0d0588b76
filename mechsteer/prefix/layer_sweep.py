"""What a layer knows of a prefix, as words: for every layer a prefix that brings about the same states there."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsteer.errors import MechsteerError
from mechsteer.hooks import Intervention
from mechsteer.interventions import SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective, StateMatch
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.match import STAGES, MatchedPrefix, match_prefix
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.site import Site
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import check_ids, insert

if TYPE_CHECKING:
    from mechsteer.judges import Judge

NONE = "none"
"""The stage without a prefix."""


def match_layers(
    model: Model,
    prompts: PromptsLike,
    reference: Sequence[int],
    *,
    layers: Iterable[int] | None = None,
    kind: str = "resid_post",
    at: Sequence[int | str] = ("user", "decision"),
    measure: str = "cosine",
    held_out: Iterable[int] = (),
    plain: Prompts | None = None,
    judge: "Judge | None" = None,
    n_tokens: int | None = None,
    evaluations: int = 500,
    soft_steps: int = 150,
    n_restarts: int = 2,
    init: str = "mean",
    beam: int = 4,
    top_k: int = 8,
    constraints: Constraints | None = None,
    max_new_tokens: int = 40,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[int, str, int, float, str], None] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Result:
    """For every layer, words that bring about the states of a reference prefix there, and what the model then says.

        prompts = ms.Prompts.from_chats(requests, model, slots=5)
        found = match_layers(model, prompts, ids, held_out=range(12, 18), judge=judge_of("Talk only about cats."))
        found["text"].sel(stage="final"), found["explained"].sel(stage="soft").mean("prompt")

    Source: "Steering Prefix Generation", sections 3.1 and 4.2 (Fig. 2). Each layer's prefix goes through all stages of
    `match_prefix`, whose loss is how unlike the states behind that layer are to those under the reference, at tokens
    after the prefix. A cosine of two states of the residual stream is near 1 anyway, because most of either is what the
    request alone makes of it. So there is also the share of the change that is explained: with states x under the
    prefix, y under the reference and p without any, and means over features and the tokens that are matched,

        explained = 1 - mean (x - y)^2 / mean (p - y)^2         1 where x = y, 0 without a prefix, below 0 further off

    Args:
        model: what to run.
        prompts: requests without completions, with slots, or with a user's text to stand before.
        reference: ids of the reference prefix.
        layers: which; None for all.
        kind: of the site that is matched at each layer, one with features for every token.
        at: tokens that are matched, each as `StateMatch` takes it, and their mean the objective. The target's tokens
            are those as far from the prompt's last.
        measure: what the search makes best, "cosine" or "mse".
        held_out: rows of `prompts` on which nothing is searched.
        plain: the same prompts without a prefix; None for `prompts` with nothing in its place, where what separates it
            from the request stays.
        judge: says whether a continuation shows the behaviour.
        n_tokens, evaluations, soft_steps, n_restarts, init, beam, top_k, constraints: of each layer's `match_prefix`.
        max_new_tokens: at most so many tokens a continuation.
        seed: of all draws.
        progress: show bars on standard error for what takes longer than two seconds.
        tell: called with the layer and what `match_prefix` tells.
        out: a folder with one for each layer. A sweep that was stopped goes on from there.

    Returns:
        A Result over `layer`, `stage` ("none" for no prefix, and those of `MatchedPrefix`) and `prompt`, with the
        coordinates `split` [prompt], "search" or "held-out", and `text` [layer, stage]:

            cosine, squared [layer, stage, prompt]     of the states with those under the reference: mean cosine, and
                                                       mean squared difference, over tokens
            explained [layer, stage, prompt]           see above
            evaluated [layer]                          prefixes of tokens whose exact loss was computed
            completion [layer, prompt]                 greedy continuation with the final prefix, as text
            shows [layer, prompt]                      whether it shows the behaviour, where there is a judge
            reference_completion, reference_shows [prompt]  the same with the reference

    Raises:
        MechsteerError: an option is out of range or does not fit the prompts, nothing that is allowed is found, or
            `out` holds other matches.
        KeyboardInterrupt: it was stopped.
    """
    began = time.perf_counter()
    if model.tokenizer is None:
        raise MechsteerError(f"{model.name} has no tokenizer, and continuations are text. Pass a model with one.")
    given = model.prompts(prompts)
    rows, held = _split(len(given), held_out)
    chosen = _layers(model, layers)
    check_ids(model, reference)
    if not len(reference) or not len(at):
        raise MechsteerError(f"reference={list(reference)} and at={list(at)}: pass at least one token of either.")
    if plain is not None and len(plain) != len(given):
        raise MechsteerError(f"plain has {len(plain)} prompts, and {len(given)} were passed. Pass the same ones.")
    told = insert(given, list(reference), where="prefix")
    without = insert(given, where="prefix") if plain is None else model.prompts(plain)
    cells: dict[str, list[np.ndarray]] = {name: [] for name in ("cosine", "squared", "evaluated", "completion")}
    texts: list[list[str]] = []
    ids: dict[str, Any] = {}
    for layer in chosen:
        site = Site(kind, layer)
        match = match_prefix(
            model, given[rows], _objective(model, told[rows], site, at, measure), n_tokens=n_tokens,
            evaluations=evaluations, soft_steps=soft_steps, n_restarts=n_restarts, init=init, beam=beam, top_k=top_k,
            constraints=constraints, seed=seed, progress=progress,
            tell=None if tell is None else lambda *args, layer=layer: tell(layer, *args),
            out=None if out is None else Path(out) / f"{kind}-{layer}",
        )  # fmt: skip
        if not match.found.finished:
            raise KeyboardInterrupt
        placed = [(without, []), *_placed(model, given, match)]
        both = {"cosine": "cosine", "squared": "mse"}
        wanted = {name: _likeness(model, told, site, at, each) for name, each in both.items()}
        found = [_measured(model, where, edits, wanted) for where, edits in placed]
        for name in both:
            cells[name].append(np.stack([each[name] for each in found]))
        cells["evaluated"].append(match.stages["evaluated"].sum().values)
        done = model.generate(placed[-1][0], max_new_tokens=max_new_tokens, progress=progress)
        cells["completion"].append(np.array(done.completions, dtype=object))
        texts.append(["", *map(str, match.stages["text"].values)])
        ids[str(layer)] = list(match.ids)
    said = model.generate(told, max_new_tokens=max_new_tokens, progress=progress).completions
    data = _dataset({name: np.stack(each) for name, each in cells.items()}, said, judge)
    labels = list(given.labels) if given.labels else np.arange(len(given))
    coords = {
        "layer": chosen, "stage": [NONE, *STAGES], "prompt": labels, "text": (("layer", "stage"), np.array(texts)),
        "split": ("prompt", ["held-out" if row in held else "search" for row in range(len(given))]),
    }  # fmt: skip
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, reference=list(reference), kind=kind,
        at=list(at), measure=measure, evaluations=evaluations, soft_steps=soft_steps, n_restarts=n_restarts, init=init,
        beam=beam, top_k=top_k, constraints=repr(constraints or Constraints()), ids=ids, max_new_tokens=max_new_tokens,
        judge=None if judge is None else judge.name,
    )  # fmt: skip
    return Result(data.assign_coords(coords), provenance=made)


def _split(n: int, held_out: Iterable[int]) -> tuple[list[int], set[int]]:
    """Rows to search on, and the others."""
    held = set(held_out)
    if not all(0 <= row < n for row in held):
        raise MechsteerError(f"held_out={sorted(held)} are no rows of {n} prompts, counted from 0. Pass some of them.")
    rows = [row for row in range(n) if row not in held]
    if not rows:
        raise MechsteerError(f"held_out= takes all {n} prompts. Leave some to search on.")
    return rows, held


def _layers(model: Model, layers: Iterable[int] | None) -> list[int]:
    chosen = list(dict.fromkeys(range(model.n_layers) if layers is None else layers))
    if not chosen or not all(0 <= layer < model.n_layers for layer in chosen):
        raise MechsteerError(
            f"layers={chosen} are none, or not all of {model.name}, which has layers 0 to {model.n_layers - 1}."
        )
    return chosen


def _likeness(model: Model, told: Prompts, site: Site, at: Sequence[int | str], measure: str) -> Objective:
    """The mean over `at` of how like the states are to those that the prompts with the reference have."""
    target = model.run(told, record=[site], logits="none").activations
    parts = [StateMatch(target, site, at=each, measure=measure, align="end") for each in at]
    return sum(parts[1:], start=1.0 * parts[0]) / len(parts)


def _objective(model: Model, told: Prompts, site: Site, at: Sequence[int | str], measure: str) -> Objective:
    """What goes down as they get more alike."""
    likeness = _likeness(model, told, site, at, measure)
    return likeness if measure == "mse" else -likeness


def _placed(
    model: Model, given: Prompts, match: MatchedPrefix
) -> list[tuple[Prompts, Sequence[Intervention]]]:  # fmt: skip
    """The prompts under the prefix of each stage, and the interventions that it takes."""
    ids = match.stages.provenance["options"]["ids"]
    soft = match.soft.embeddings.to(model.device, model.dtype)
    slotted = insert(given, where="prefix", slots=len(soft))
    return [(slotted, [SoftPrefix(soft)]), *((insert(given, ids[stage], where="prefix"), []) for stage in STAGES[1:])]


def _measured(
    model: Model, prompts: Prompts, edits: Sequence[Intervention], wanted: dict[str, Objective]
) -> dict[str, Float[np.ndarray, " prompt"]]:
    found = sweep(model, prompts, axes={}, build=lambda: list(edits), measure=wanted, progress=False)
    return {name: found[name].values.astype(np.float64) for name in wanted}


def _dataset(cells: dict[str, np.ndarray], said: Sequence[str], judge: "Judge | None") -> xr.Dataset:
    names = {
        "cosine": "cosine with the states under the reference",
        "squared": "mean squared difference from the states under the reference",
        "explained": "share of the change explained",
    }
    squared = cells["squared"]
    with np.errstate(divide="ignore", invalid="ignore"):
        cells["explained"] = 1 - squared / squared[:, :1]  # the first stage is none
    dims = ("layer", "stage", "prompt")
    arrays: dict[str, xr.Variable] = {
        name: xr.Variable(dims, cells[name], {"long_name": text}) for name, text in names.items()
    }
    arrays["evaluated"] = xr.Variable("layer", cells["evaluated"])
    arrays["completion"] = xr.Variable(("layer", "prompt"), cells["completion"])
    arrays["reference_completion"] = xr.Variable("prompt", np.array(said, dtype=object))
    if judge is not None:
        arrays["shows"] = xr.Variable(
            ("layer", "prompt"), np.stack([judge.many(row.tolist()) for row in cells["completion"]])
        )
        arrays["reference_shows"] = xr.Variable("prompt", judge.many(said))
    return xr.Dataset(arrays)
