"""Which pushes are the same: prefix, vector, features, soft prefix, other tokens and edited weights, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Replace
from mechsteer.model import Model
from mechsteer.objectives import KLFromBaseline, Objective, TeacherForcedCE
from mechsteer.objectives.base import predicting
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.site import Site
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.together_report import NOTHING, REFERENCE, show
from mechsteer.study.measures import CE, Estimate, ratio, share, weights
from mechsteer.study.pushes import (
    WEIGHT,
    Push,
    features,
    matched,
    nothing,
    prefixes,
    reference,
    unrelated,
    vector,
    weight_edit,
)
from mechsteer.sweeps import sweep

# The cross entropy of unrelated text: every token alike.
_TEXT = TeacherForcedCE(first=0)

States = Float[Tensor, "layer token d_model"]


def measure(case: Case) -> Findings:
    """Makes every push on the requests to search on, and compares all of them with the prefix on the held-out ones.

    Results: `held_out` [push, prompt] with `shows`, `completion`, `reference` (cross entropy of the reference
    completions), `kl` (from the prefixed model along the reference completions), `own` (KL from the unpushed model
    along what it says by itself), `into` and `back` (`kl` of the prefix's run with the push's states put into it, and
    of the push's run with those of the prefix's), and `distance` [push, layer, prompt] beside `power` [layer, prompt]
    (sums over tokens of the squared difference of the residual stream from the prefix's, and of its square); `texts`
    [push, text], the rise of the cross entropy of unrelated text; and `tried`, what was chosen among.
    """
    pushes, tried, missing, match = _made(case)
    held = case.rows("held-out")
    layer = max([case.model.n_layers // 2 - 1, *(push.layer for push in pushes)])
    found = _held_out(case, pushes, held, layer)
    texts = unrelated(case, "to measure on")
    case.tell(f"{len(texts)} unrelated texts under each push")
    entropy = np.stack([_scored(push, push.on(texts), {"ce": _TEXT})["ce"] for push in pushes])
    names = [push.name for push in pushes]
    rise = xr.Dataset(
        {
            "rise": (("push", "text"), entropy - entropy[names.index(NOTHING)], {"units": "nats a token"}),
            "weight": ("text", _TEXT.total_weight(texts).double().cpu().numpy()),
        },
        {"push": names, "text": [text[:80] for text in texts.texts]},
    )
    made = provenance(model=case.model.id, seed=case.settings.seed, layer=layer)
    results = {"held_out": Result(found, provenance=made), "texts": Result(rise, provenance=made)}
    summary = _summary(case, pushes, results, layer) | {"tried": tried, "missing": missing, "match": match}
    return Findings(results, summary)


def _made(case: Case) -> tuple[list[Push], dict[str, list[dict[str, Any]]], dict[str, str], dict[str, Any] | None]:
    """The pushes; for those that were chosen among several, all of these; why others could not be made; and how the
    search for tokens went."""
    pushes, tried, missing, about = [reference(case), nothing(case), vector(case)], {}, {}, None
    for name, make, what in (
        ("features", features, "features of an autoencoder, held at values"),
        ("weight edit", weight_edit, "edits of the weights"),
    ):
        case.tell(what)
        try:
            chosen = make(case)
        except MechsteerError as error:
            missing[name] = str(error)
            continue
        pushes.append(chosen.push)
        tried[name] = list(chosen.tried)
    case.tell("a soft prefix, and from there one of tokens")
    try:
        pushes += prefixes(case)
        match = matched(case)
        stages = match.stages.data
        about = {
            "loss": {str(stage): float(stages["loss"].sel(stage=stage)) for stage in stages["stage"].values},
            "evaluated": int(stages["evaluated"].sum()),
            "steps": match.soft.history.data.sizes["step"] - 1,
            "forbidden": list(case.telltale),
        }
    except MechsteerError as error:
        missing["soft prefix and searched prefix"] = str(error)
    return pushes, tried, missing, about


def _held_out(case: Case, pushes: Sequence[Push], held: Sequence[int], layer: int) -> xr.Dataset:
    told, own = (completion_ids(each[list(held)]) for each in (case.reference, case.unsteered))
    model = case.model
    baselines = {
        "kl": _baseline(model, case.reference[list(held)]),
        "own": _baseline(model, case.unsteered[list(held)]),
    }
    arrays: dict[str, list[Any]] = {}
    said: dict[str, Prompts] = {push.name: push.prompts[list(held)].with_completions(told) for push in pushes}
    states = {REFERENCE: _states(pushes[0], said[REFERENCE])}
    prompts = [case.requests[row].text for row in held]
    for push in pushes:
        case.tell(f"{push.name} on {len(held)} held-out requests")
        done = push.model.generate(
            push.prompts[list(held)], max_new_tokens=case.max_new_tokens, interventions=push.interventions,
            progress=False,
        )  # fmt: skip
        here = states[REFERENCE] if push.name == REFERENCE else _states(push, said[push.name])
        row: dict[str, Any] = _scored(push, said[push.name], {"reference": CE, "kl": baselines["kl"]})
        row |= _scored(push, push.prompts[list(held)].with_completions(own), {"own": baselines["own"]})
        row["completion"] = np.array(done.completions, dtype=object)
        if case.judge is not None:
            row["shows"] = case.judge.many(done.completions)
        apart = (here - states[REFERENCE]).double().square().sum(-1)
        row["distance"] = _of_prompts(apart, said[push.name])
        for name, host, guest in (("into", pushes[0], here), ("back", push, states[REFERENCE])):
            row[name] = _patched(host, said[host.name], guest[layer], layer, baselines["kl"])
        for name, values in row.items():
            arrays.setdefault(name, []).append(values)
    dims = {"distance": ("push", "layer", "prompt")}
    data = {name: (dims.get(name, ("push", "prompt")), np.stack(rows)) for name, rows in arrays.items()}
    power = _of_prompts(states[REFERENCE].double().square().sum(-1), said[REFERENCE])
    tokens = [np.array([len(ids) for ids in each], dtype=np.float64) for each in (told, own)]
    data |= {
        "power": (("layer", "prompt"), power),
        "weight": (("prompt",), weights(said[REFERENCE])),
        "tokens": (("prompt",), tokens[0]),
        "own_tokens": (("prompt",), tokens[1]),
    }
    return xr.Dataset(data, {"push": list(said), "layer": list(range(model.n_layers)), "prompt": prompts})


def _baseline(model: Model, prompts: Prompts) -> KLFromBaseline:
    """How far from what this model predicts along these completions."""
    return KLFromBaseline(model.run(prompts, logits=predicting(prompts, "completion")), where="completion")


def _scored(push: Push, prompts: Prompts, measures: Mapping[str, Objective]) -> dict[str, Float[np.ndarray, " prompt"]]:
    """Objectives of prompts under a push."""
    found = sweep(
        push.model, prompts, axes={}, build=lambda: push.interventions, measure=dict(measures), progress=False
    )
    return {name: found[name].values.astype(np.float64) for name in measures}


def _states(push: Push, prompts: Prompts) -> States:
    """The residual stream after every block, at the tokens that predict the completions."""
    sites = [Site("resid_post", layer) for layer in range(push.model.n_layers)]
    run = push.model.run(prompts, push.interventions, record=sites, logits="none")
    chosen = predicting(run.prompts, "completion")
    return torch.stack([run.activations[site][chosen] for site in sites])


def _of_prompts(values: Float[Tensor, "layer token"], prompts: Prompts) -> Float[np.ndarray, "layer prompt"]:
    """Sums over the tokens that predict each prompt's completion."""
    row = torch.where(predicting(prompts, "completion"))[0].to(values.device)
    return values.new_zeros(len(values), len(prompts)).index_add(1, row, values).cpu().numpy()


def _patched(
    host: Push, prompts: Prompts, guest: Float[Tensor, "token d_model"], layer: int, measure: Objective
) -> Float[np.ndarray, " prompt"]:
    """An objective of a push's run in which the stream after one block is another run's at the tokens that predict the
    completions; everything else, such as what earlier tokens hold, stays the host's."""
    site = Site("resid_post", layer)
    run = host.model.run(prompts, host.interventions, record=[site], logits="none")
    chosen = predicting(run.prompts, "completion")[..., None]
    own = run.activations[site]
    mixed = own.masked_scatter(chosen.expand_as(own), guest.to(own))
    put = Replace(site, Activations({site: mixed}, prompts=run.prompts, model=host.model.id))
    found = sweep(
        host.model, run.prompts, axes={}, build=lambda: (*host.interventions, put), measure=measure.named("value"),
        progress=False,
    )  # fmt: skip
    return found["value"].values.astype(np.float64)


def _summary(case: Case, pushes: Sequence[Push], results: Mapping[str, Result], layer: int) -> dict[str, Any]:
    seed, data, texts = case.settings.seed, results["held_out"].data, results["texts"].data
    tokens, own_tokens, weight = (data[name].values for name in ("tokens", "own_tokens", "weight"))
    power = data["power"].values
    none = data.sel(push=NOTHING)

    def of(push: Push) -> dict[str, Any]:
        one = data.sel(push=push.name)
        rise, text_weight = texts["rise"].sel(push=push.name).values, texts["weight"].values
        far = [ratio(apart, whole, seed=seed) for apart, whole in zip(one["distance"].values, power, strict=True)]
        return {
            "size": push.size,
            "shows": share(one["shows"].values).as_json if "shows" in one else None,
            "reference": ratio(one["reference"].values * weight, weight, seed=seed).as_json,
            "own": ratio(one["own"].values * own_tokens, own_tokens, seed=seed).as_json,
            "text": ratio(rise * text_weight, text_weight, seed=seed).as_json,
            **{name: ratio(one[name].values * tokens, tokens, seed=seed).as_json for name in ("kl", "into", "back")},
            # What of the difference between the prefix and no push is gone.
            "closed": ratio((none["kl"] - one["kl"]).values * tokens, none["kl"].values * tokens, seed=seed).as_json,
            "kept": ratio((none["into"] - one["into"]).values * tokens, none["into"].values * tokens,
                          seed=seed).as_json,
            "distance": [_root(each).as_json for each in far],
        }  # fmt: skip

    return {
        "pushes": {push.name: of(push) for push in pushes},
        "layer": layer,
        "n_layers": case.model.n_layers,
        "judged": case.judge is not None,
        "shown": None if case.judge is None else case.judge.shown,
        "words": [] if case.judge is None else list(case.judge.words),
        "max_new_tokens": case.max_new_tokens,
        "weight": WEIGHT,
        "texts": int(texts.sizes["text"]),
    }


def _root(square: Estimate) -> Estimate:
    """Of a share of squares, the share of lengths."""
    value, low, high = (max(each, 0.0) ** 0.5 for each in (square.value, square.low, square.high))
    return Estimate(value, low, high, square.n)


CHAPTER = Chapter(
    name="together",
    title="Which pushes are the same",
    question="Does a vector, a feature, another prefix or an edit of the weights do the same as the prefix, and in the "
    "same way?",
    measure=measure,
    show=show,
)
