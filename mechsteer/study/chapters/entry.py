"""Where the prefix enters: which tokens, layers and heads carry it, and what these heads attend to."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.interventions import Replace
from mechsteer.patching import activation_patching, attribution_patching, places, recovered, significant
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance, rank_correlation
from mechsteer.rows import At
from mechsteer.site import Site
from mechsteer.study.case import Case
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.entry_report import show
from mechsteer.study.measures import CE, cross_entropy, share

SITES = ("resid_pre", "attn_out", "mlp_out")
MAPS: dict[str, dict[str, Any]] = {
    "sites": {"sites": SITES, "over": ("layer", "pos")},
    "heads": {"sites": "z", "over": ("layer", "head")},
}
MAP_NAMES = {"sites": "layers and tokens", "heads": "heads"}
METHODS = ("gradient", "integrated_gradients")
# Requests and completion tokens behind each map: enough for intervals, few enough for minutes.
MOST_REQUESTS, MOST_TOKENS = 12, 24
# With fewer the test over requests finds next to nothing, however large: flips of n signs give no p below 2^(1 - n).
LEAST_REQUESTS = 8
# Cells below this share (in percent) are not marked, however sure it is that they differ from 0.
LEAST_SHARE = 5
N_HEADS = 4
# Tokens that, repeated in the prefix's place, may say nothing; and how many random ones are tried besides.
FILLERS, N_RANDOM = (".", ",", "\n", " the", " and", " a", " of", "-"), 8


def measure(case: Case) -> Findings:
    """Patches the run with the prefix, place by place, into a run with a contrast in the prefix's place, and back.

    The objective is the log-likelihood of the reference completion: minus the weighted cross entropy, in nats a token.
    Results: `fillers` (where no contrast was given), `sites` and `heads` (maps in percent of the whole effect),
    `attribution` (first-order estimates beside exact effects), `attention` and `pattern` (of the strongest heads), and
    `moved` (completions after moving the one strongest place).
    """
    results: dict[str, Result] = {}
    other, about = _contrast(case, results)
    clean, corrupt = _pair(case, other)
    gap = float((cross_entropy(case.model, corrupt) - cross_entropy(case.model, clean)).mean())
    if not gap > 0.005:
        raise MechsteerError(
            f"What the model says with the prefix is {gap:.4f} nats a token likelier than with the contrast "
            f"{about['text']!r} in its place: there is nothing to trace. Choose another prefix, or a --contrast."
        )
    patch = {"measure": -CE, "model": case.model, "clean": clean, "corrupt": corrupt}
    exact: dict[str, Result] = {}
    for name, which in MAPS.items():
        case.tell(f"patching every {'layer and token' if name == 'sites' else 'head'}")
        exact[name] = activation_patching(**patch, **which)
    case.tell("patching every head the other way")
    lost = activation_patching(**patch, **MAPS["heads"], mode="noising")
    results["sites"] = _tested(case, exact["sites"])
    results["heads"] = _by_mode({"denoising": _tested(case, exact["heads"]), "noising": _tested(case, lost)})
    case.tell("estimating the same maps from gradients")
    results["attribution"] = _estimated(patch, exact)
    heads = _strongest(results["heads"])
    case.tell("recording what the strongest heads attend to")
    results |= _attention(case, clean, heads)
    best = _best(results["sites"], clean)
    results["moved"] = _moved(case, other, best)
    return Findings(results, _summary(case, about, gap, len(clean), results, heads, best))


# ---- the contrast ----


def runs(case: Case) -> tuple[Prompts, Prompts]:
    """The prompts that are patched: requests to search on with the prefix, and with the contrast in its place, both
    with the first tokens of the reference completions."""
    return _pair(case, contrast(case))


def contrast(case: Case) -> Prompts:
    """All requests with the contrast in the prefix's place; where the user gave none, it is looked for."""
    return _contrast(case, {})[0]


def _pair(case: Case, other: Prompts) -> tuple[Prompts, Prompts]:
    rows = case.rows("search")[:MOST_REQUESTS]
    clean, corrupt = (case.with_reference(each[rows], rows=rows, tokens=MOST_TOKENS) for each in (case.prefixed, other))
    return clean, corrupt


def _contrast(case: Case, results: dict[str, Result]) -> tuple[Prompts, dict[str, Any]]:
    """The requests with as many other tokens in the prefix's place, and what they are.

    Without one that the user gave, it is one token repeated, of those that are tried the one under which the model says
    most nearly what it says without any prefix ("symmetric token replacement" with a neutral counterpart: Zhang and
    Nanda 2024, "Towards best practices of activation patching").
    """
    model, n = case.model, int(case.prefixed.span("prefix").sum(1)[0])
    rows = case.rows("search")[:MOST_REQUESTS]
    plain = case.unsteered[rows]
    said = {"tokens": plain.tokens, "mask": plain.span("completion")}

    def ce(prompts: Prompts) -> float:
        completed = prompts[rows].with_completions(said["tokens"], mask=said["mask"])
        return float(cross_entropy(model, completed).mean())

    about: dict[str, Any] = {"n_tokens": n, "ce_plain": ce(case.plain), "ce_prefix": ce(case.prefixed)}
    if case.settings.contrast is not None:
        other = case.with_prefix(case.settings.contrast)
        case.prefixed.paired(other)
        return other, about | {"text": case.settings.contrast, "given": True, "ce_contrast": ce(other)}
    candidates = _fillers(case)
    case.tell(f"finding a neutral filler among {len(candidates)} tokens")
    tried = [case.prefixed.with_prefix([token] * n) for token in candidates]
    scores = np.array([ce(prompts) for prompts in tried])
    texts = [model.tokenizer.decode([token]) for token in candidates]
    data = xr.Dataset({"ce": ("token", scores, {"units": "nats a token"})}, {"token": np.array(texts, dtype=object)})
    results["fillers"] = Result(data, provenance=provenance(model=model.id, seed=case.settings.seed))
    best = int(scores.argmin())
    return tried[best], about | {"text": texts[best] * n, "given": False, "ce_contrast": float(scores[best])}


def _fillers(case: Case) -> list[int]:
    tokenizer = case.model.tokenizer
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in FILLERS]
    single = [ids[0] for ids in encoded if len(ids) == 1]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [token for token in range(min(len(tokenizer), case.model.d_vocab)) if token not in special]
    drawn = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(case.settings.seed))[:N_RANDOM]
    return list(dict.fromkeys([*single, *(ordinary[place] for place in drawn.tolist())]))


# ---- maps ----


def _tested(case: Case, patched: Result) -> Result:
    """A map in percent of the whole effect, and the cells that matter where enough requests were patched to tell."""
    shares = recovered(patched, seed=case.settings.seed)
    if shares.data.sizes["prompt"] < LEAST_REQUESTS:
        return shares
    tested = significant(patched, correction="fdr_bh", seed=case.settings.seed).data
    large = abs(shares["recovered"].mean("prompt")) >= LEAST_SHARE
    return Result(shares.data.assign(p=tested["p"], matters=tested["matters"] & large), provenance=shares.provenance)


def _by_mode(maps: dict[str, Result]) -> Result:
    data = xr.concat(
        [each.data for each in maps.values()], "mode", coords="minimal", compat="override", join="override"
    )
    return Result(data.assign_coords(mode=list(maps)), provenance=maps["denoising"].provenance)


def _estimated(patch: dict[str, Any], exact: dict[str, Result]) -> Result:
    """Estimates of all maps, beside the exact means over requests in percent, one cell after the other."""
    found: dict[str, list[Any]] = {name: [] for name in ("exact", *METHODS, "map", "cell")}
    for name, which in MAPS.items():
        mean = recovered(exact[name])["recovered"].mean("prompt")
        found["exact"] += mean.values.ravel().tolist()
        for method in METHODS:
            estimate = recovered(attribution_patching(**patch, **which, method=method))["recovered"].mean("prompt")
            found[method] += estimate.values.ravel().tolist()
        found["map"] += [MAP_NAMES[name]] * mean.size
        cells = itertools.product(*(mean[dim].values.tolist() for dim in mean.dims))
        found["cell"] += [", ".join(f"{dim} {value}" for dim, value in zip(mean.dims, at, strict=True)) for at in cells]
    percent = {"units": "%"}
    data = xr.Dataset(
        {name: ("cell", np.array(found[name], dtype=np.float32), percent) for name in ("exact", *METHODS)},
        {name: ("cell", np.array(found[name], dtype=object)) for name in ("cell", "map")},
    )
    return Result(data, provenance=exact["sites"].provenance)


# ---- heads ----


@dataclass(frozen=True)
class Head:
    layer: int
    head: int

    @property
    def name(self) -> str:
        return f"L{self.layer}H{self.head}"


def _strongest(heads: Result) -> list[Head]:
    """The heads with the largest effects in denoising, largest first."""
    mean = heads.data["recovered"].sel(mode="denoising").mean("prompt").values
    order = np.argsort(-np.abs(mean), axis=None)[:N_HEADS]
    return [Head(*map(int, np.unravel_index(place, mean.shape))) for place in order]


def _attention(case: Case, clean: Prompts, heads: Sequence[Head]) -> dict[str, Result]:
    """Where the heads look from the tokens that predict the completion: per place over all requests, and the whole
    pattern of the first request."""
    layers = list(dict.fromkeys(head.layer for head in heads))
    taken = case.model.run(clean, record=[("pattern", layer) for layer in layers], logits="none").activations
    patterns = torch.stack(
        [taken[Site("pattern", head.layer)][:, head.head] for head in heads]
    )  # [head, batch, dest, src]
    reads = CE.reads(clean).to(patterns.dtype)
    mean = torch.einsum("h b d s, b d -> b h s", patterns, reads) / reads.sum(1)[:, None, None]
    found = places(clean)
    masks = [*(clean.at(at) if isinstance(at, int) else clean.span(str(at)) for at in found), clean.span("completion")]
    by_place = torch.stack([(mean * mask[:, None]).sum(-1) for mask in masks], -1)  # [batch, head, place]
    names = [head.name for head in heads]
    made = provenance(model=case.model.id, prefix=case.settings.prefix)
    texts = [_text(clean, at) for at in found] + ["[completion]"]
    data = xr.Dataset(
        {"attention": (("head", "place", "prompt"), by_place.permute(1, 2, 0).cpu().float().numpy())},
        {"head": names, "token": ("place", np.array(texts, dtype=object)), "prompt": list(clean.labels)},
    )
    tokens = np.array(clean.str_tokens(0), dtype=object)
    one = patterns[:, 0, : len(tokens), : len(tokens)].cpu().float().numpy()
    whole = xr.Dataset(
        {"pattern": (("head", "dest", "src"), one)},
        {"head": names, "dest_token": ("dest", tokens), "src_token": ("src", tokens)},
    )
    return {"attention": Result(data, provenance=made), "pattern": Result(whole, provenance=made)}


def _text(prompts: Prompts, at: Any) -> str:
    return (
        prompts.str_tokens(0)[at if at >= 0 else int(prompts.decision[0]) + 1 + at]
        if isinstance(at, int)
        else f"[{at}]"
    )


# ---- the strongest place ----


@dataclass(frozen=True)
class Best:
    """The place of the residual stream with the largest effect, and the last layer before which it is as large.

    Attributes:
        place: counts along `pos`.
        at: the same as a rule for interventions.
        token: what stands there in the first prompt.
    """

    layer: int
    place: int
    at: At
    token: str


def _best(sites: Result, clean: Prompts) -> Best:
    mean = sites.data["recovered"].sel(site="resid_pre").mean("prompt")
    place = int(mean.max("layer").values.argmax())
    column = mean.isel(pos=place).values
    # As large: nine tenths. Before layer 0 it is the token itself that moves, later what the model made of it.
    layer = np.flatnonzero(column >= 0.9 * column.max())[-1]
    at = places(clean)[place]
    return Best(int(mean["layer"].values[layer]), place, at, _text(clean, at))


def _moved(case: Case, other: Prompts, best: Best) -> Result:
    """Held-out requests with the contrast, completed while one place of the residual stream is what it is with the
    prefix; and, for comparison, another place of the same layer."""
    rows, model = case.rows("held-out")[:MOST_REQUESTS], case.model
    clean, corrupt = case.prefixed[rows].padded("right"), other[rows].padded("right")
    site = Site("resid_pre", best.layer)
    source = model.run(clean, record=site, logits="none").activations
    elsewhere = [place for place in places(clean) if place != best.at]
    drawn = torch.randint(len(elsewhere), (), generator=torch.Generator().manual_seed(case.settings.seed))
    conditions: dict[str, list[Replace]] = {
        "contrast": [],
        "moved": [Replace(site, source, at=best.at)],
        "elsewhere": [Replace(site, source, at=elsewhere[int(drawn)])],
    }
    texts = {"prefix": [case.reference.completions[row] for row in rows]}
    for name, edits in conditions.items():
        case.tell(f"completing held-out requests: {name}")
        done = model.generate(corrupt, interventions=edits, max_new_tokens=case.max_new_tokens)
        texts[name] = done.completions
    arrays: dict[str, Any] = {"completion": (("condition", "prompt"), np.array(list(texts.values()), dtype=object))}
    if case.judge is not None:
        shows = [[case.judge(text) for text in row] for row in texts.values()]
        arrays["shows"] = (("condition", "prompt"), np.array(shows))
    data = xr.Dataset(arrays, {"condition": list(texts), "prompt": [case.requests[row].text for row in rows]})
    about = provenance(model=model.id, seed=case.settings.seed, elsewhere=_text(clean, elsewhere[int(drawn)]))
    return Result(data, provenance=about)


# ---- numbers ----


def _summary(
    case: Case,
    contrast: dict[str, Any],
    gap: float,
    n: int,
    results: dict[str, Result],
    heads: Sequence[Head],
    best: Best,
) -> dict[str, Any]:
    sites, both = results["sites"].data, results["heads"].data
    stream = sites.sel(site="resid_pre")
    at_best = stream.isel(pos=best.place)
    mean = at_best["recovered"].mean("prompt")
    held = [int(layer) for layer, value in zip(mean["layer"].values, mean.values, strict=True) if value >= 50]
    top = at_best.sel(layer=best.layer)
    compared = results["attribution"].data
    rank = {
        str(name): {method: rank_correlation(part["exact"].values, part[method].values) for method in METHODS}
        for name, part in compared.groupby("map")
    }
    attention, inside = results["attention"].data["attention"].mean("prompt"), _in_prefix(case, results)
    moved = results["moved"].data
    return {
        "contrast": contrast,
        "gap": gap,
        "n_requests": n,
        "n_tokens": MOST_TOKENS,
        "best": {
            "layer": best.layer,
            "pos": str(top["pos"].values),
            "token": best.token,
            "share": float(top["recovered"].mean()),
            "low": float(top["low"]),
            "high": float(top["high"]),
            "layers_above_half": held,
        },
        "least_share": LEAST_SHARE,
        "cells": {name: _counted(data) for name, data in (("sites", sites), ("heads", both.sel(mode="denoising")))},
        "heads": [
            {
                "name": head.name,
                **{
                    key: float(both[name].sel(mode=mode, layer=head.layer, head=head.head).mean())
                    for key, name, mode in (
                        ("share", "recovered", "denoising"), ("low", "low", "denoising"), ("high", "high", "denoising"),
                        ("lost", "recovered", "noising"),
                    )
                },
                "attention_to_prefix": float(attention.sel(head=head.name).values[inside].sum()),
            }
            for head in heads
        ],
        "attribution": {"spearman": rank, "n_cells": int(compared.sizes["cell"])},
        "moved": {
            str(name): share(moved["shows"].sel(condition=name).values).as_json for name in moved["condition"].values
        } if "shows" in moved else {},
        "shown": None if case.judge is None else case.judge.shown,
        "words": [] if case.judge is None else list(case.judge.words),
        "elsewhere": results["moved"].provenance["options"]["elsewhere"],
    }  # fmt: skip


def _in_prefix(case: Case, results: dict[str, Result]) -> list[int]:
    """Which places of the attention are tokens of the prefix."""
    inside = case.prefixed.span("prefix")[0][case.prefixed.mask[0]].nonzero().squeeze(1).tolist()
    return [place for place in inside if place < results["attention"].data.sizes["place"]]


def _counted(data: xr.Dataset) -> dict[str, int | None]:
    n = int(np.isfinite(data["recovered"].mean("prompt")).sum())
    return {"n": n, "matter": int(data["matters"].sum()) if "matters" in data else None}


CHAPTER = Chapter(
    name="entry",
    title="Where it enters",
    question="Which tokens, layers and heads carry what the prefix does, and what do these heads attend to?",
    measure=measure,
    show=show,
)
