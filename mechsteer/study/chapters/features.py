"""The prefix as features of a sparse autoencoder: which it moves, whether they are why, and what moving them does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.directions import difference_of_means
from mechsteer.errors import MechsteerError
from mechsteer.features import (
    feature_direction,
    mediation,
    rank_by_attribution,
    rank_by_contrast,
    rank_by_similarity,
)
from mechsteer.features.states import mean_features, token_features
from mechsteer.hooks import Intervention
from mechsteer.interventions import Add, SetFeature
from mechsteer.objectives import FeatureActivation
from mechsteer.prefix import Constraints, optimise_soft_prefix, search_prefix
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance, rank_correlation
from mechsteer.strength import limit_logits
from mechsteer.study.autoencoder import autoencoder
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.behaviour import WITH, WITHOUT, does_nothing
from mechsteer.study.chapters.features_report import ADD, BACK, CLAMP, HARD, SOFT, show
from mechsteer.study.measures import CE, Estimate, cross_entropy, ratio, share, weights
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import insert, token_texts

SIZES = (8, 64)
"""Of the sets of features, those of the largest attributions, whose part in the effect is measured."""
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Of the pushes, in multiples of the feature's level."""
# Features of each ranking that are shown, and tokens that each makes likeliest.
_LISTED, _TOKENS = 6, 4
# Of the prefixes that raise the feature: tokens, soft steps, candidates, and requests that they are searched on.
_SLOTS, _STEPS, _EVALUATIONS, _REQUESTS = 4, 40, 300, 9

Push = tuple[Prompts, Sequence[Intervention]]


def measure(case: Case) -> Findings:
    """Ranks, picks and searches on the requests to search on, and measures on the held-out ones.

    Results: `features` [feature], those that the three rankings put first; `mediation` [part, prompt], as
    `mechsteer.features.mediation` gives it; `tokens` [pos], the feature on one held-out answer; `curve` [push, prompt],
    the feature as a push at several strengths, on all requests; `prefixes` [push, prompt], prefixes that raise it, also
    with the feature held at rest.
    """
    model, search, held = case.model, case.rows("search"), case.rows("held-out")
    case.tell("looking for a sparse autoencoder of the model")
    sae, explained = autoencoder(case)
    forced = case.with_reference(case.plain)
    weight, ce = weights(forced), [cross_entropy(model, each) for each in (forced, case.reference)]
    if does_nothing(ratio(weight * (ce[0] - ce[1]), weight, seed=case.settings.seed)):
        raise MechsteerError(
            "What the model says with the prefix is as likely without it: there is nothing that features could "
            "explain. Choose another prefix."
        )
    case.tell(f"ranking {sae.n_features:,} features in three ways")
    features, sets = ranked(case, sae, forced)
    feature = int(features["feature"][0])
    about = _levels(case, sae, feature)
    case.tell("whether features are why the prefix works")
    parts = {f"feature {each}": [each] for each in (feature, sets[0])}
    parts |= {f"{size} features": sets[:size] for size in SIZES if size < sae.n_features}
    shares = mediation(model, sae, parts, case.reference[held], forced[held], measure=-CE, progress=False)
    reads = FeatureActivation(sae, feature)
    case.tell(f"feature {feature} as a push at {len(STRENGTHS)} strengths")
    row = feature_direction(sae, feature, model=model)
    pushes: dict[str, Push] = {WITHOUT: (case.plain, ())}
    for step in STRENGTHS:
        value = step * about["level"]
        pushes[f"{CLAMP} {step:g}"] = case.plain, [SetFeature(sae, feature, value)]
        pushes[f"{ADD} {step:g}"] = case.plain, [Add(row, value)]
    curve = _tried(case, case.rows("all"), reads, pushes)
    chosen = {kind: _chosen(case, curve, kind) for kind in (CLAMP, ADD)}
    found, prefixes = _prefixes(case, sae, feature, about["rest"])
    case.tell("what the prefixes do, and what they do with the feature held back")
    tried = _tried(case, held, reads, prefixes)
    made = provenance(model=model.id, seed=case.settings.seed, sae=sae.name, sae_hash=sae.hash, feature=feature)
    results = {
        "features": Result(features, provenance=made),
        "mediation": shares,
        "tokens": Result(_tokens(case, sae, feature), provenance=made),
        "curve": Result(curve, provenance=made),
        "prefixes": Result(tried, provenance=made),
    }
    summary = {
        "sae": {"name": sae.name, "site": str(sae.site), "features": sae.n_features, "explained": explained.as_json},
        **about,
        "promotes": str(features["promotes"][0].item()),
        "moved": {
            name: Estimate(*(float(features[f"{name}{end}"][0]) for end in _ENDS), n=len(search)).as_json
            for name in ("difference", "attribution")
        },
        "with": float(features["with"][0]),
        "without": float(features["without"][0]),
        **found,
        "chosen": chosen,
        "mediation": {
            share: {str(part): _estimate(shares, share, part) for part in shares["part"].values}
            for share in ("needed", "enough")
        },
        **_behaviour(case, curve.isel(prompt=held), tried),
    }
    return Findings(results, summary)


def _estimate(shares: Result, name: str, part: str) -> dict[str, Any]:
    found = shares.data.sel(part=part)
    values = (float(found[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return Estimate(*values, n=shares.data.sizes["prompt"]).as_json


def ranked(case: Case, sae: SparseAutoencoder, forced: Prompts, *, most: int = _LISTED) -> tuple[xr.Dataset, list[int]]:
    """What the three rankings put first, `most` of each, with the numbers of all three; and all features, largest
    attribution first.

    `attribution` [feature] is the first-order estimate of what the log-likelihood of the reference completions gains,
    in nats a token, when the feature goes to what it is with the prefix.

    Raises:
        MechsteerError: the prefix raises no feature.
    """
    model, search, seed, n = case.model, case.rows("search"), case.settings.seed, sae.n_features
    reference, same = case.reference[search], forced[search]
    vector = difference_of_means(model, reference, same, sites=[sae.site], tokens="completion", progress=False)
    rankings = {
        "contrast": rank_by_contrast(model, sae, reference, same, at="completion", n=n, seed=seed),
        # From the requests alone: with the prefix features stand in for each other, and slopes there are near 0.
        "attribution": rank_by_attribution(
            model, sae, same, against=reference, measure=-CE, n=n, seed=seed, progress=False
        ),
        "similarity": rank_by_similarity(sae, vector[sae.site], n=n),
    }
    if not float(rankings["contrast"]["difference"][0]) > 0:
        raise MechsteerError("The prefix raises no feature of the autoencoder: there is nothing to push.")
    first = [feature for each in rankings.values() for feature in each["feature"].values[:most].tolist()]
    listed = list(dict.fromkeys(first))
    own = mean_features(model, sae, case.unsteered[search].padded("right"), "completion")[:, listed].mean(0)
    contrast, attribution, similarity = (each.data.sel(feature=listed) for each in rankings.values())
    arrays: dict[str, Any] = {
        "with": contrast["positive"], "without": contrast["negative"], "own": ("feature", own.double().cpu().numpy()),
        **{f"difference{end}": contrast[f"difference{end}"] for end in _ENDS}, "auroc": contrast["auroc"],
        # What comes as the feature goes to what it is with the prefix: the other way round than it was attributed.
        "attribution": -attribution["attribution"].mean("prompt"),
        "attribution_low": -attribution["attribution_high"], "attribution_high": -attribution["attribution_low"],
        "cosine": similarity["decoder"],
        "promotes": ("feature", np.array([_promoted(case, sae, each) for each in listed], dtype=object)),
    }  # fmt: skip
    for name, each in rankings.items():
        place = {feature: rank for rank, feature in enumerate(each["feature"].values.tolist(), start=1)}
        arrays[f"{name}_rank"] = ("feature", [place[feature] for feature in listed])
    plain = {name: each if isinstance(each, tuple) else ("feature", each.values) for name, each in arrays.items()}
    return xr.Dataset(plain, {"feature": listed}), rankings["attribution"]["feature"].values.tolist()


_ENDS = ("", "_low", "_high")


def _promoted(case: Case, sae: SparseAutoencoder, feature: int) -> str:
    """The tokens that the feature makes likeliest where it is all that there is, printable ones only."""
    logits = limit_logits(case.model, feature_direction(sae, feature, model=case.model))
    texts = token_texts(case.model, logits.topk(4 * _TOKENS).indices.tolist())
    kept = [text.strip() for text in texts if text.strip() and text.isprintable()]
    return ", ".join(list(dict.fromkeys(kept))[:_TOKENS])


def _levels(case: Case, sae: SparseAutoencoder, feature: int) -> dict[str, Any]:
    """The feature's level, which one in ten of the tokens of reference completions reaches where it is active; and what
    it is at rest, on average over what the model says without the prefix."""
    search = case.rows("search")
    reference, plain = (each[search].padded("right") for each in (case.reference, case.unsteered))
    said, own = (
        token_features(case.model, sae, each, [feature])[..., 0][each.span("completion")] for each in (reference, plain)
    )
    return {"feature": feature, "level": float(said[said > 0].quantile(0.9)), "rest": float(own.mean())}


def _tokens(case: Case, sae: SparseAutoencoder, feature: int) -> xr.Dataset:
    """The feature on the first held-out request and its reference completion."""
    one = case.reference[case.rows("held-out")[:1]].padded("right")
    values = token_features(case.model, sae, one, [feature])[0, :, 0][one.mask[0]]
    return xr.Dataset(
        {"activation": ("pos", values.double().cpu().numpy())},
        {"token": ("pos", np.array(one.shown_tokens(0), dtype=object))},
    )


def _tried(case: Case, rows: list[int], reads: FeatureActivation, pushes: Mapping[str, Push]) -> xr.Dataset:
    """What pushes do on some requests.

    `activation` [push, prompt] of the feature at the decision token, with the push; `completion`, `shows` (where there
    is a judge), and cross entropies [push, prompt]: of the `reference` completions and of the model's `own` ones under
    the push, and of what is `said` under the push, by the model with the prefix and without the push.
    """
    model, own, n = case.model, completion_ids(case.unsteered[rows]), len(rows)
    arrays = {name: np.full((len(pushes), n), np.nan) for name in ("activation", "reference", "own", "said")}
    texts = np.empty((len(pushes), n), dtype=object)
    for place, (prompts, how) in enumerate(pushes.values()):
        room = min(case.max_new_tokens, model.n_ctx - int(prompts.lengths.max()))
        done = model.generate(prompts, max_new_tokens=room, interventions=how, progress=False)
        texts[place] = done.completions
        arrays["said"][place] = cross_entropy(model, case.prefixed[rows].with_completions(completion_ids(done)))
    # Pushes that share their prompts are one sweep.
    together: dict[int, list[int]] = {}
    every = list(pushes.values())
    for place, (prompts, _) in enumerate(every):
        together.setdefault(id(prompts), []).append(place)
    for places in together.values():
        prompts = every[places[0]][0]
        measured = {"activation": (prompts, reads), "reference": (case.with_reference(prompts, rows=rows), CE)}
        measured["own"] = prompts.with_completions(own), CE
        for name, (each, objective) in measured.items():
            swept = sweep(
                model, each, axes={"push": places}, build=lambda push: every[push][1],
                measure=objective.named("value"), progress=False,
            )  # fmt: skip
            arrays[name][places] = swept["value"].values
    found: dict[str, Any] = {name: (("push", "prompt"), each) for name, each in arrays.items()}
    found["completion"] = ("push", "prompt"), texts
    if case.judge is not None:
        found["shows"] = ("push", "prompt"), np.stack([case.judge.many(row.tolist()) for row in texts])
    found["weight"] = "prompt", weights(case.reference[rows])
    found["own_weight"] = "prompt", weights(case.unsteered[rows])
    return xr.Dataset(found, {"push": list(pushes), "prompt": [case.requests[row].text for row in rows]})


def _chosen(case: Case, curve: xr.Dataset, kind: str) -> float:
    """The strength under which most completions of requests to search on show the behaviour; of several, the one whose
    completions are likeliest with the prefix. Without a judge, the one with the likeliest reference completions."""
    part = curve.isel(prompt=case.rows("search"))

    def worth(step: float) -> tuple[float, float]:
        one = part.sel(push=f"{kind} {step:g}")
        if "shows" not in one:
            return -float(one["reference"].weighted(one["weight"]).mean()), 0.0
        return float(one["shows"].sum()), -float(one["said"].mean())

    return max(STRENGTHS, key=worth)


def _prefixes(case: Case, sae: SparseAutoencoder, feature: int, rest: float) -> tuple[dict[str, Any], dict[str, Push]]:
    """Prefixes that raise the feature at the decision token, made on requests to search on; and the pushes that are
    tried on the held-out ones: the prefix itself and these, each also with the feature held at rest."""
    held, few, seed = case.rows("held-out"), case.rows("search")[:_REQUESTS], case.settings.seed
    size = min(_SLOTS, int(case.prefixed.span("prefix").sum(1).min()))
    slotted, raises = case.slotted(size), -FeatureActivation(sae, feature, pre=True)
    case.tell(f"a soft prefix of {size} embeddings that raises feature {feature}")
    soft = optimise_soft_prefix(case.model, slotted[few], raises, n_restarts=1, steps=_STEPS, seed=seed, progress=False)
    case.tell(f"a prefix of {size} tokens that raises it, from {_EVALUATIONS} candidates")
    forbidden = () if case.judge is None else case.judge.words
    hard = search_prefix(
        case.model, slotted[few], raises, evaluations=_EVALUATIONS, seed=seed, progress=False,
        constraints=Constraints(forbidden_words=forbidden, whole_words=True, characters="printable"),
    )  # fmt: skip
    pushes: dict[str, Push] = {
        WITHOUT: (case.plain[held], ()),
        WITH: (case.prefixed[held], ()),
        SOFT: (slotted[held], [soft.intervention()]),
        HARD: (insert(slotted[held], hard.ids), ()),
    }
    back = SetFeature(sae, feature, rest)
    pushes |= {f"{name}{BACK}": (prompts, [*how, back]) for name, (prompts, how) in list(pushes.items())[1:]}
    return {"hard": hard.text, "size": size, "evaluated": hard.evaluated, "steps": _STEPS}, pushes


def _behaviour(case: Case, curve: xr.Dataset, tried: xr.Dataset) -> dict[str, Any]:
    """What each push does on the held-out requests."""
    seed = case.settings.seed
    both = xr.concat([tried, curve.drop_sel(push=WITHOUT)], "push", data_vars="minimal", coords="minimal", join="exact")
    names, weight, own_weight = list(map(str, both["push"].values)), both["weight"].values, both["own_weight"].values
    numbers = {
        name: both[name].transpose("push", "prompt").values for name in ("activation", "reference", "own", "said")
    }
    at = {name: place for place, name in enumerate(names)}
    one = np.ones_like(weight)

    def estimates(name: str, scale: Float[np.ndarray, " prompt"], less: bool = False) -> dict[str, Any]:
        base = numbers[name][at[WITHOUT]] * less
        return {each: ratio((numbers[name][at[each]] - base) * scale, scale, seed=seed).as_json for each in names}

    gap = weight * (numbers["reference"][at[WITHOUT]] - numbers["reference"][at[WITH]])
    closed = {each: weight * (numbers["reference"][at[WITHOUT]] - numbers["reference"][at[each]]) for each in names}
    summary: dict[str, Any] = {
        "activation": estimates("activation", one),
        "rise": estimates("own", own_weight, less=True),
        "said": estimates("said", one),
        "closed": {each: ratio(value, gap, seed=seed).as_json for each, value in closed.items()},
        "shows": {},
        "shown": None if case.judge is None else case.judge.shown,
        "words": [] if case.judge is None else list(case.judge.words),
        "max_new_tokens": case.max_new_tokens,
    }
    behaviour = np.stack(list(closed.values()))
    if case.judge is not None:
        behaviour = both["shows"].transpose("push", "prompt").values.astype(float)
        summary["shows"] = {each: share(behaviour[at[each]] > 0).as_json for each in names}
    free = [place for name, place in at.items() if not name.endswith(BACK)]
    summary["correlation"] = _correlation(numbers["activation"][free], behaviour[free], seed).as_json
    summary["pushes"] = len(free) - 1
    return summary


def _correlation(
    activation: Float[np.ndarray, "push prompt"], behaviour: Float[np.ndarray, "push prompt"], seed: int, n: int = 500
) -> Estimate:
    """Spearman's correlation over pushes of the mean activation with the mean behaviour, the interval over requests."""
    drawn = np.random.default_rng(seed).integers(activation.shape[1], size=(n, activation.shape[1]))

    def of(rows: Any) -> float:
        return rank_correlation(activation[:, rows].mean(1), behaviour[:, rows].mean(1))

    each = np.array([of(rows) for rows in drawn])
    each = each[np.isfinite(each)]
    low, high = np.quantile(each, [0.025, 0.975]) if len(each) else (np.nan, np.nan)
    return Estimate(of(slice(None)), float(low), float(high), activation.shape[1])


CHAPTER = Chapter(
    name="features",
    title="As features",
    question="Which features of a sparse autoencoder does the prefix move, and are they why it works?",
    measure=measure,
    show=show,
)
