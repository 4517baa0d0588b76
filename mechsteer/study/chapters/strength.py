"""How strong the push must be: a strength chosen by the laws and a few exact points, tried on held-out requests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer.directions import Direction
from mechsteer.interventions import Add
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.strength import ChosenAlpha, limit_logits, local_laws
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.behaviour import WITH, WITHOUT
from mechsteer.study.chapters.strength_report import show
from mechsteer.study.measures import CE, ratio, share, weights
from mechsteer.study.pushes import WEIGHT, chosen_vector
from mechsteer.sweeps import sweep

# Multiples of the chosen strength: of the curves, and of the completions that are shown.
CURVE = (-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SHOWN = (0.5, 1.0, 2.0)


def measure(case: Case) -> Findings:
    """Chooses a strength on the requests to search on, and tries it on the held-out ones.

    The vectors, and what is weighed in choosing, are those of `mechsteer.study.pushes.chosen_vector`.

    Results: `chosen` (the evidence of `mechsteer.strength.choose_alpha` for every layer), `side` [alpha, prompt] and
    `laws` (the side effect on held-out requests beside its local law and its plateau), `target` [alpha, prompt], and
    `held_out` [condition, prompt].
    """
    model, seed = case.model, case.settings.seed
    found = chosen_vector(case)
    chosen, name, direction, alpha = found.chosen, found.name, found.direction, found.alpha
    held = case.rows("held-out")
    case.tell(f"{len(CURVE)} strengths on {len(held)} held-out requests")
    alphas = [step * alpha for step in CURVE]
    own = case.unsteered[held]
    side = sweep(
        model, own, axes={"alpha": alphas}, build=lambda alpha: Add(direction, alpha), measure=CE.named("ce")
    ).data.assign(weight=("prompt", weights(own)))
    made = provenance(model=model.id, seed=seed, direction=name, alpha=alpha)
    results = {
        "chosen": chosen.result,
        "side": Result(side, provenance=made),
        "laws": _laws(case, direction, own, alpha, made),
        "target": Result(_target(case, direction, alphas, case.with_reference(case.plain)[held]), provenance=made),
        "held_out": Result(_held_out(case, direction, alpha), provenance=made),
    }
    return Findings(results, _summary(case, chosen, results, name, alpha))


def _laws(case: Case, direction: Direction, own: Prompts, alpha: float, made: dict[str, Any]) -> Result:
    """The local law of the side effect on held-out requests, and where it ends: far out every token is predicted with
    the same probabilities, those of Proposition 4.1 of the steering-strength paper."""
    local = local_laws(case.model, direction, own, objective=CE, where="completion", progress=False)
    pooled = local.data.isel(direction=0).weighted(xr.DataArray(weights(own), dims="prompt")).mean("prompt")
    counts = torch.zeros(case.model.d_vocab, dtype=torch.float64)
    for ids in completion_ids(own):
        weight = torch.full((len(ids),), CE.rest_weight, dtype=torch.float64)
        weight[: CE.first] = CE.first_weight
        counts.index_add_(0, torch.tensor(ids, dtype=torch.long), weight)
    limits = [limit_logits(case.model, direction, sign=sign).double().cpu().log_softmax(-1) for sign in (-1.0, 1.0)]
    ends = [-float(limit @ counts / counts.sum()) - float(pooled["value"]) for limit in limits]
    data = pooled[["kl_curvature", "slope", "scale"]].assign(plateau=("side", ends, {"units": "nats a token"}))
    return Result(data.assign_coords(side=[-1.0, 1.0]), provenance=made)


def _target(case: Case, direction: Direction, alphas: Sequence[float], forced: Prompts) -> xr.Dataset:
    """Held-out: whether greedy completions show the behaviour, and the likelihood of the reference completions."""
    ce = sweep(
        case.model, forced, axes={"alpha": list(alphas)}, build=lambda alpha: Add(direction, alpha),
        measure=CE.named("reference"),
    ).data.assign(weight=("prompt", weights(forced)))  # fmt: skip
    if case.judge is None:
        return ce
    shows = []
    for alpha in alphas:
        done = case.model.generate(
            case.plain[case.rows("held-out")], max_new_tokens=case.max_new_tokens, progress=False,
            interventions=[Add(direction, alpha)],
        )  # fmt: skip
        shows.append([case.judge(text) for text in done.completions])
    return ce.assign(shows=(("alpha", "prompt"), np.array(shows)))


def _held_out(case: Case, direction: Direction, alpha: float) -> xr.Dataset:
    """Completions at, below and above the chosen strength."""
    held = case.rows("held-out")
    texts = {WITH: case.reference[held].completions, WITHOUT: case.unsteered[held].completions}
    for step in SHOWN:
        done = case.model.generate(
            case.plain[held], max_new_tokens=case.max_new_tokens, interventions=[Add(direction, step * alpha)],
            progress=False,
        )  # fmt: skip
        texts[f"times {step * alpha:.3g}"] = done.completions
    arrays: dict[str, Any] = {"completion": (("condition", "prompt"), np.array(list(texts.values()), dtype=object))}
    if case.judge is not None:
        judged = [[case.judge(text) for text in row] for row in texts.values()]
        arrays["shows"] = (("condition", "prompt"), np.array(judged))
    prompts = [case.requests[row].text for row in held]
    return xr.Dataset(arrays, {"condition": list(texts), "prompt": prompts})


def _summary(case: Case, chosen: ChosenAlpha, results: Mapping[str, Result], name: str, alpha: float) -> dict[str, Any]:
    seed, data = case.settings.seed, {key: result.data for key, result in results.items()}
    one, side, target, held = chosen.result.sel(direction=name), data["side"], data["target"], data["held_out"]
    weight = side["weight"].values
    rise = (side["ce"] - side["ce"].sel(alpha=0.0)).transpose("alpha", "prompt").values
    reference = target["reference"].transpose("alpha", "prompt").values
    return {
        "directions": {
            each: {
                "works": chosen.works[each],
                **{key: float(chosen.result[key].sel(direction=each)) for key in ("alpha", "low", "high", "gain")},
            }
            for each in chosen.works
        },
        "picked": name,
        "layer": int(name.rsplit(" ", 1)[1]),
        "alpha": alpha,
        "works": chosen.works[name],
        "band": [float(one["low"]), float(one["high"])],
        "scale": float(one["scale"]),
        "forward_passes": int(one["forward_passes"]),
        "points": int(np.isfinite(one["point_alpha"].values).sum()),
        "weight": WEIGHT,
        "judged": case.judge is not None,
        "shown": None if case.judge is None else case.judge.shown,
        "words": [] if case.judge is None else list(case.judge.words),
        "max_new_tokens": case.max_new_tokens,
        "alphas": side["alpha"].values.tolist(),
        "rise": [ratio(row * weight, weight, seed=seed).as_json for row in rise],
        "reference": [ratio(row * target["weight"].values, target["weight"].values, seed=seed).as_json
                      for row in reference],
        "laws": {key: data["laws"][key].values.tolist() for key in ("kl_curvature", "slope", "scale", "plateau")},
        "target": [share(row).as_json for row in target["shows"].values] if "shows" in target else [],
        "shows": {
            str(each): share(held["shows"].sel(condition=each).values).as_json for each in held["condition"].values
        } if "shows" in held else {},
    }  # fmt: skip


CHAPTER = Chapter(
    name="strength",
    title="How strong",
    question="How strong must the vector be, and what does it cost?",
    measure=measure,
    show=show,
)
