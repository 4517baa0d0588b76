"""The prefix in other words: a soft prefix made into tokens that do not say it, and how equal they are to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from mechsteer.interventions import SoftPrefix
from mechsteer.model import load_model
from mechsteer.prefix import MatchedPrefix, evaluate_prefixes, search_prefix
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.evaluation import Prefix
from mechsteer.prefix.layer_sweep import match_layers
from mechsteer.prefix.match import beam_evaluations
from mechsteer.result import Result, provenance
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.behaviour import does_nothing
from mechsteer.study.chapters.words_report import (
    BEAM,
    HALVES,
    HOTFLIP,
    NEAREST,
    NOTHING,
    OURS,
    REFERENCE,
    SOFT,
    show,
)
from mechsteer.study.measures import CE, ratio, share, weights
from mechsteer.study.pushes import MATCHED_TOKENS, constraints, matched, matched_rows
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import insert, token_texts

LAYERED, LAYER_STEPS, LAYER_EVALUATIONS, LAYER_WIDTH, LAYER_TOP_K = 6, 40, 80, 2, 4
"""For each layer whose states are matched: requests, steps of the soft prefix, candidates after the beam, the beam."""
_SAMPLES, _K = 3, 8
_OTHER = {"pocket": "pocket-1l"}
"""Models that share a tokenizer, for transfer."""


def measure(case: Case) -> Findings:
    """Searches on the requests to search on, with the words that would say it forbidden, and measures on the others.

    Results: `stages` [prefix, prompt], the cross entropy of the reference completions under each prefix, on the
    requests that were searched on and the held-out ones; `search` [method, evaluated], losses on the way; `held_out`
    and, for a model with a sister, `transfer`, tables of `evaluate_prefixes`; `layers`, of `match_layers`; and
    `tokens` [token], what leaving each token of the answer out does to the held-out cross entropy.
    """
    model, seed, held = case.model, case.settings.seed, case.rows("held-out")
    (rows, others), keep = matched_rows(case), constraints(case)
    reference = _reference(case)
    size = len(reference)
    match = matched(case)
    evaluated = int(match.stages["evaluated"].sum())
    case.tell(f"HotFlip alone, {evaluated} candidates")
    forced = case.with_reference(case.slotted(size)[rows], rows=rows, tokens=MATCHED_TOKENS)
    alone = search_prefix(
        model, forced, CE, method="hotflip", n_tokens=size, evaluations=evaluated, constraints=keep, seed=seed,
        progress=False,
    )  # fmt: skip
    if not alone.finished:
        raise KeyboardInterrupt
    stage = match.stages.provenance["options"]["ids"]
    words: dict[str, Sequence[int]] = {
        OURS: match.ids, BEAM: stage["beam"], NEAREST: stage["projected"], HOTFLIP: alone.ids,
    }  # fmt: skip
    soft = match.soft.embeddings.to(model.device, model.dtype)
    case.tell(f"{len(words) + 4} prefixes on {len(held)} held-out requests")
    told = [completion_ids(case.reference)[row] for row in held]
    table = _table(case, case, words | {SOFT: soft}, reference, told)
    results = {
        "stages": Result(_stages(case, table, words | {SOFT: soft}, rows)),
        "search": Result(_search(match, alone.trajectory.data)),
        "held_out": table,
        "tokens": Result(_tokens(case, match.ids)),
        "layers": layer_words(case),
    }
    if model.name in _OTHER:
        other = load_model(_OTHER[model.name], device=str(model.device), dtype=model.dtype)
        case.tell(f"the same words on {other.name}")
        there = Case.of(case.settings, model=other)
        results["transfer"] = _table(case, there, {OURS: match.ids, HOTFLIP: alone.ids}, reference, None)
    made = provenance(model=model.id, seed=seed, prefix=case.settings.prefix, ids={OURS: list(match.ids)})
    results = {name: each if each.provenance else Result(each.data, provenance=made) for name, each in results.items()}
    about = {
        "size": size, "evaluated": evaluated, "steps": match.soft.history.data.sizes["step"] - 1,
        "forbidden": list(keep.forbidden_words), "searched": len(rows), "validated": len(others),
    }  # fmt: skip
    return Findings(results, _summary(case, results, about))


def _reference(case: Case) -> tuple[int, ...]:
    """The prefix's own ids, where it stands."""
    right = case.prefixed.padded("right")
    return tuple(right.tokens[0][right.span("prefix")[0]].tolist())


def _table(
    case: Case,
    on: Case,
    prefixes: Mapping[str, Prefix],
    reference: Sequence[int],
    completions: Sequence[Sequence[int]] | None,
) -> Result:
    """Prefixes on the held-out requests of a case, beside the reference, random tokens and nothing.

    Args:
        case: whose judge and seed.
        on: whose model.
        completions: to compare with; None for those that the reference brings about on that model.
    """
    held = case.rows("held-out")
    options: Any = {
        "judge": case.judge, "k": (_K,), "samples": _SAMPLES, "max_new_tokens": on.max_new_tokens,
        "seed": case.settings.seed, "progress": False,
    }  # fmt: skip
    told = completion_ids(on.reference[held]) if completions is None else completions
    table = evaluate_prefixes(
        on.model, on.slotted(len(reference))[held], prefixes, reference=reference, completions=told, **options
    )
    # Apart: without a prefix nothing separates it from the request.
    none = evaluate_prefixes(on.model, on.plain[held], {NOTHING: []}, completions=told, n_random=0, **options)
    data = xr.concat([table.data, none.data], "prefix", data_vars="minimal", coords="minimal", join="exact")
    return Result(data, provenance=table.provenance)


def _stages(case: Case, table: Result, prefixes: Mapping[str, Prefix], rows: Sequence[int]) -> xr.Dataset:
    """Cross entropies on the requests that were searched on beside those on the held-out ones."""
    names = [name for name in table["prefix"].values.tolist() if name in (REFERENCE, NOTHING, *prefixes)]
    rows = list(rows)
    forced = case.with_reference(case.plain)[rows]
    searched = []
    for name in names:
        prompts, edits = case.plain if name == NOTHING else case.prefixed, []
        if name in prefixes:
            prefix = prefixes[name]
            prompts = case.slotted(len(prefix))
            if isinstance(prefix, torch.Tensor):
                edits = [SoftPrefix(prefix)]
            else:
                prompts = insert(prompts, list(prefix), where="prefix")
        scored = case.with_reference(prompts[rows], rows=rows)
        swept = sweep(
            case.model, scored, axes={}, build=lambda e=edits: e, measure=CE.named("ce"), progress=False
        )  # fmt: skip
        searched.append(swept["ce"].values.astype(np.float64))
    held = table.data.sel(prefix=names)
    arrays = {
        "ce": (("prefix", "prompt"), np.concatenate([np.stack(searched), held["ce"].values], 1)),
        "weight": ("prompt", np.concatenate([weights(forced), held["weight"].values])),
    }
    coords = {
        "prefix": names,
        "prompt": [case.requests[row].text for row in [*rows, *case.rows("held-out")]],
        "split": ("prompt", [HALVES[0]] * len(rows) + [HALVES[1]] * held.sizes["prompt"]),
    }
    return xr.Dataset(arrays, coords)


def _search(match: MatchedPrefix, alone: xr.Dataset) -> xr.Dataset:
    """The exact losses of candidates in their order, and the lowest so far; NaN while the beam is at work."""
    before = int(match.stages["evaluated"].sel(stage=["projected", "beam"]).sum())
    ours = match.found.trajectory.data
    n = max(before + ours.sizes["evaluated"], alone.sizes["evaluated"])
    arrays = {}
    for name in ("loss", "best"):
        values = np.full((2, n), np.nan)
        values[0, before : before + ours.sizes["evaluated"]] = ours[name].values
        values[1, : alone.sizes["evaluated"]] = alone[name].values
        arrays[name] = ("method", "evaluated"), values
    arrays["level"] = "stage", match.stages["loss"].values
    coords = {"method": [OURS, HOTFLIP], "evaluated": np.arange(1, n + 1), "stage": match.stages["stage"].values}
    return xr.Dataset(arrays, coords)


def _tokens(case: Case, ids: Sequence[int]) -> xr.Dataset:
    """How much the held-out cross entropy of the reference completions rises where one token is left out."""
    held = case.rows("held-out")
    losses = CandidateLosses(case.model, case.with_reference(case.slotted(len(ids))[held], rows=held), CE)
    left = [(*ids[:place], *ids[place + 1 :]) for place in range(len(ids))]
    rise = losses.of(left) - losses.of([tuple(ids)]) if len(ids) > 1 else np.full(1, np.nan)
    texts = np.array(token_texts(case.model, ids), dtype=object)
    return xr.Dataset({"rise": ("token", rise)}, {"text": ("token", texts)})


def layer_words(case: Case) -> Result:
    """Words that bring about the states behind the first, the middle and the last block: `match_layers` on the first
    requests to search on."""
    reference = _reference(case)
    last, size = case.model.n_layers - 1, len(reference)
    slotted = case.slotted(size)
    layers = list(dict.fromkeys([0, last // 2, last]))
    rows = [*case.rows("search")[:LAYERED], *case.rows("held-out")]
    n = len(rows) - len(case.rows("held-out"))

    def tell(layer: int, stage: str, done: int, loss: float, text: str) -> None:
        if stage == "beam" and done:
            case.tell(f"words for the states behind block {layer}: cosine {-loss:.3f} after {done} candidates")

    return match_layers(
        case.model, slotted[rows], reference, layers=layers, held_out=range(n, len(rows)), plain=case.plain[rows],
        judge=case.judge, soft_steps=LAYER_STEPS, n_restarts=1, beam=LAYER_WIDTH, top_k=LAYER_TOP_K,
        evaluations=beam_evaluations(size, beam=LAYER_WIDTH, top_k=LAYER_TOP_K) + LAYER_EVALUATIONS,
        constraints=constraints(case), max_new_tokens=case.max_new_tokens, seed=case.settings.seed, progress=False,
        tell=tell,
    )  # fmt: skip


# ---- the numbers of the text ----


def _summary(case: Case, results: Mapping[str, Result], about: Mapping[str, Any]) -> dict[str, Any]:
    seed, table = case.settings.seed, results["held_out"].data
    stages, layers = results["stages"].data, results["layers"].data
    halves = {half: stages.isel(prompt=stages["split"].values == half) for half in HALVES}
    names = list(map(str, table["prefix"].values))
    texts = {name: str(table["text"].sel(prefix=name).values) for name in names}
    summary = {
        **about,
        "text": texts[OURS],
        "texts": texts,
        "held_out": table.sizes["prompt"],
        "ce": {half: _pooled(data, seed) for half, data in halves.items()},
        "closed": {half: _closed(data, seed) for half, data in halves.items()},
        "survives": [int(table["survives"].sel(prefix=OURS).sum()), table.sizes["prompt"]],
        **_equal(table, seed),
        "layers": [_layer(layers.sel(layer=layer), seed) for layer in layers["layer"].values],
        "transfer": None,
        "shown": None if case.judge is None else case.judge.shown,
        "words": [] if case.judge is None else list(case.judge.words),
        "max_new_tokens": case.max_new_tokens,
    }
    if "reference_shows" in layers:
        summary["layers_reference"] = share(_held(layers["reference_shows"]).values.astype(bool)).as_json
    if "transfer" in results:
        moved = results["transfer"]
        name = moved.provenance["model"]["name"]
        summary["transfer"] = {"model": name, **_equal(moved.data, seed)}
    return summary


def _pooled(data: xr.Dataset, seed: int) -> dict[str, Any]:
    weight = data["weight"].values
    return {
        str(name): ratio(data["ce"].sel(prefix=name).values * weight, weight, seed=seed).as_json
        for name in data["prefix"].values
    }


def _closed(data: xr.Dataset, seed: int) -> dict[str, Any]:
    """(nearest tokens - final) / (nearest tokens - soft)."""
    nearest, soft, ours = (data["ce"].sel(prefix=name).values for name in (NEAREST, SOFT, OURS))
    weight = data["weight"].values
    return ratio(weight * (nearest - ours), weight * (nearest - soft), seed=seed).as_json


def _equal(table: xr.Dataset, seed: int) -> dict[str, Any]:
    """How equal each prefix is to the reference, by name."""
    names = list(map(str, table["prefix"].values))
    at = {name: table.sel(prefix=name) for name in names}
    weight = table["weight"].values
    ce = {name: at[name]["ce"].values for name in names}
    gap = weight * (ce[NOTHING] - ce[REFERENCE])
    nothing = does_nothing(ratio(gap, weight, seed=seed))
    one = np.ones(len(weight))

    def means(values: Mapping[str, Float[np.ndarray, " prompt"]]) -> dict[str, Any]:
        return {name: ratio(each.astype(np.float64), one, seed=seed).as_json for name, each in values.items()}

    measures: dict[str, Any] = {
        "cross_entropy": {name: ratio(ce[name] * weight, weight, seed=seed).as_json for name in names},
        # A share of a gap that may be 0 means nothing.
        "effect": {
            name: ratio(weight * (ce[NOTHING] - ce[name]), gap * (not nothing), seed=seed).as_json for name in names
        },
        "above_ours": {
            name: ratio(weight * (ce[name] - ce[OURS]), weight, seed=seed).as_json for name in names if name != OURS
        },
        "exact": {name: share(at[name]["exact_match"].values).as_json for name in names},
        "exact_at": {name: share(at[name]["exact_at"].sel(k=_K).values).as_json for name in names},
        "overlap_at": means({name: at[name]["overlap_at"].sel(k=_K).values for name in names}),
        "perplexity": {name: _number(at[name]["perplexity"].values) for name in names},
        "survive": {name: float(at[name]["survives"].mean()) for name in names},
        "greedy": {},
        "sampled": {},
    }
    if "adherence_greedy" in table:
        measures["greedy"] = {name: share(at[name]["adherence_greedy"].values).as_json for name in names}
        measures["sampled"] = means({name: at[name]["adherence_sampled"].values for name in names})
    return measures


def _layer(one: xr.Dataset, seed: int) -> dict[str, Any]:
    held = one.isel(prompt=one["split"].values == HALVES[1])
    base = held["squared"].sel(stage="none").values
    squared = {str(stage): held["squared"].sel(stage=stage).values for stage in one["stage"].values}
    return {
        "layer": int(one["layer"]),
        "cosine": {half: {stage: float(one["cosine"].sel(stage=stage)[one["split"].values == half].mean())
                          for stage in squared} for half in HALVES},
        "explained": {stage: ratio(base - each, base, seed=seed).as_json for stage, each in squared.items()},
        "text": str(one["text"].sel(stage="final").values),
        "evaluated": int(one["evaluated"]),
        "shows": share(held["shows"].values).as_json if "shows" in held else None,
    }  # fmt: skip


def _held(values: xr.DataArray) -> xr.DataArray:
    return values[values["split"].values == HALVES[1]]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


CHAPTER = Chapter(
    name="words",
    title="As other words",
    question="Which other words do what the prefix does, without saying it, and how equal are they to it?",
    measure=measure,
    show=show,
)
