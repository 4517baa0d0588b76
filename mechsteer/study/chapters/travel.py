"""How the push travels: linear prediction, propagator to the end, flow between positions, number of directions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Replace
from mechsteer.model import Model
from mechsteer.patching.activation import objective_of
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.propagator import (
    Propagator,
    dyson,
    identity_share,
    linear_regime,
    position_flow,
    principal,
    spectrum,
)
from mechsteer.result import Result, provenance
from mechsteer.site import Site
from mechsteer.study.case import Case
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.chapters.travel_report import show
from mechsteer.study.fork import Forks, forks
from mechsteer.study.measures import Estimate, ratio
from mechsteer.sweeps import sweep

# Enough forks to fit and to test on, and enough prompts for Jacobians, which are the costly part.
MOST_FORKS, MOST_JACOBIANS = 18, 6
LEAST_FORKS = 2
# Layers that Jacobians start from: in deeper models only so many, evenly spaced.
MOST_LAYERS = 12
# Lengths that the linear regime is looked for at, in units of the stream's own.
SIZES = tuple(np.geomspace(0.01, 4.0, 9).tolist())
KS = (1, 2, 4, 8)
N_RANDOM = 4


def measure(case: Case) -> Findings:
    """Follows what the prefix adds to the residual stream at the fork, where the completions with and without it part.

    With h_l the residual stream before layer l at the fork, delta_l = h_l(with the prefix) - h_l(without it) is the
    prefix's own push there. Everything is a share of the gap's whole change, from the plain run to the prefixed one.

    Results: `pushes` [push, layer, prompt] (true changes of the gap, in logits, of the `own` delta, its `mean` over the
    requests to search on, and a `random` vector of the same length), with two linear predictions for the own delta: by
    the gradient there (`predicted`), and by the gradient behind the last block, as if all between were the identity
    (`free`); `regime` of the mean push, `identity` and `dyson` (see `mechsteer.propagator`); `arrives` [layer, prompt]
    (cosine and gain of what arrives of the own delta at the end); `flow` [layer, pos, prompt]; `spectrum` and `rank`.
    """
    model, seed = case.model, case.settings.seed
    search, held = (forks(case, case.rows(split)[:MOST_FORKS]) for split in ("search", "held-out"))
    if search is None or held is None or min(len(search.rows), len(held.rows)) < LEAST_FORKS:
        raise MechsteerError(
            f"Fewer than {LEAST_FORKS} completions of each half part from what the model says without the prefix: "
            "there is nothing to follow. Choose another prefix, or more requests."
        )
    layers = list(range(model.n_layers))
    case.tell("what the prefix adds to the stream where the completions part")
    deltas = {name: _deltas(model, each) for name, each in (("search", search), ("held-out", held))}
    if not bool(deltas["held-out"][-1].any()):
        raise MechsteerError(
            f"Before the last of the {model.n_layers} layers of {model.name} the prefix adds nothing at the tokens "
            "where the completions part: attention carries it there within that layer, and there is nothing left to "
            "travel through."
        )
    results = {"pushes": _pushes(case, held, deltas, layers)}
    case.tell("how far the gradient is right")
    results["regime"] = _regime(case, held, deltas["search"], layers)
    some = _spaced(layers)
    few = held.plain[range(min(MOST_JACOBIANS, len(held.rows)))]
    own = deltas["held-out"][:, : len(few)]
    case.tell("the Jacobian of every layer, and what is left of the identity")
    results["identity"] = identity_share(model, few, random=N_RANDOM, spectrum=4, seed=seed)
    moving = [layer for layer in some if bool(own[layer].any(-1).all())]
    case.tell(f"the Dyson series from {len(moving)} layers")
    results |= _series(model, few, own, moving, seed)
    case.tell("how much leaves the prefix's own positions")
    results["flow"] = _flow(case, held.prefixed[range(len(few))], some)
    entry = _entry(results["pushes"])
    case.tell(f"how many directions it takes before layer {entry}")
    results |= _rank(case, held, deltas, layers, entry)
    return Findings(results, _summary(case, held, results, entry))


def _deltas(model: Model, of: Forks) -> Float[Tensor, "layer prompt d_model"]:
    """What the prefix adds before each layer, at the fork."""
    with_prefix, without = (streams(model, prompts) for prompts in (of.prefixed, of.plain))
    return with_prefix - without


def streams(model: Model, prompts: Prompts) -> Float[Tensor, "layer prompt d_model"]:
    """The residual stream before each layer, at the last token of each prompt."""
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    run = model.run(prompts, record=sites, logits="none")
    fork = run.prompts.at(-1)
    return torch.stack([precise(run.activations[site][fork]) for site in sites])


def _pushes(
    case: Case, held: Forks, deltas: Mapping[str, Float[Tensor, "layer _ d_model"]], layers: Sequence[int]
) -> Result:
    model, own = case.model, deltas["held-out"]
    plain = streams(model, held.plain)
    generator = torch.Generator().manual_seed(case.settings.seed)
    drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own)
    added = {
        "own": own,
        "mean": deltas["search"].mean(1, keepdim=True).expand_as(own),
        "random": drawn / drawn.norm(dim=-1, keepdim=True) * own.norm(dim=-1, keepdim=True),
    }
    case.tell(f"putting it in place before each of {len(layers)} layers")
    base, whole = (objective_of(model, prompts, held.gap) for prompts in (held.plain, held.prefixed))
    swept = sweep(
        model, held.plain, axes={"push": list(added), "layer": list(layers)}, measure=held.gap.named("gap"),
        build=lambda push, layer: Replace(Site("resid_pre", layer), plain[layer] + added[push][layer], at=-1),
    )  # fmt: skip
    case.tell("its linear prediction from each layer")
    points = [Site("resid_pre", layer) for layer in layers] + [Site("resid_post", model.n_layers - 1)]
    one = torch.ones(1, dtype=own.dtype, device=own.device)
    gradients = torch.stack([Propagator(model, held.plain, at, held.gap, source_pos=-1).rmv(one) for at in points])
    predicted, free = (
        (each * own).sum(-1).double().cpu().numpy() for each in (gradients[:-1], gradients[-1:].expand_as(own))
    )
    logits = {"units": "logits"}
    data = xr.Dataset(
        {
            "change": (("push", "layer", "prompt"), swept["gap"].values - base, logits),
            "predicted": (("layer", "prompt"), predicted, logits),
            "free": (("layer", "prompt"), free, logits),
            "whole": ("prompt", whole - base, logits),
            "length": (("layer", "prompt"), own.norm(dim=-1).double().cpu().numpy()),
            "stream": (("layer", "prompt"), plain.norm(dim=-1).double().cpu().numpy()),
        },
        coords={
            "push": list(added), "layer": list(layers), "prompt": [case.requests[row].text for row in held.rows],
            "said_with": ("prompt", [one for one, _ in held.tokens]),
            "said_without": ("prompt", [other for _, other in held.tokens]), "common": ("prompt", list(held.common)),
        },
    )  # fmt: skip
    return Result(data, provenance=provenance(model=model.id, seed=case.settings.seed, measure="logit gap at the fork"))


def _regime(case: Case, held: Forks, search: Float[Tensor, "layer prompt d_model"], layers: Sequence[int]) -> Result:
    """The linear regime of the gap along the mean push."""
    model, mean = case.model, search.mean(1)
    sites = {layer: Site("resid_pre", layer) for layer in layers if bool(mean[layer].any())}
    found = linear_regime(
        model, held.plain, measure=held.gap, kind="resid_pre", layers=list(sites), at=-1, sizes=SIZES,
        directions={"prefix": {site: Direction(mean[layer], site, model.id) for layer, site in sites.items()}},
        random=N_RANDOM, seed=case.settings.seed,
    )  # fmt: skip
    length = mean[list(sites)].norm(dim=-1).double().cpu().numpy()
    data = found.data.assign(length=("layer", length / found["norm"].values))
    return Result(data, provenance=found.provenance)


def _series(
    model: Model, prompts: Prompts, own: Float[Tensor, "layer prompt d_model"], layers: Sequence[int], seed: int
) -> dict[str, Result]:
    """The Dyson series of the own delta of each layer, and how it arrives at the end as a whole."""
    parts, cosines, gains = [], [], []
    end = Site("resid_post", model.n_layers - 1)
    for layer in layers:
        push = own[layer]
        parts.append(dyson(model, prompts, layers=layer, vectors={"prefix": push}, random=N_RANDOM, seed=seed))
        arrived = Propagator(model, prompts, Site("resid_pre", layer), end, source_pos=-1, target_pos=-1).mv(push)
        cosines.append(torch.cosine_similarity(arrived, push, dim=-1).double().cpu().numpy())
        gains.append((arrived.norm(dim=-1) / push.norm(dim=-1)).double().cpu().numpy())
    joined: Any = xr.concat([part.data for part in parts], "layer", join="outer", fill_value=0.0)
    data = xr.Dataset(
        {"cos": (("layer", "prompt"), np.stack(cosines)), "gain": (("layer", "prompt"), np.stack(gains))},
        {"layer": list(layers)},
    )
    return {
        "dyson": Result(joined, provenance=parts[0].provenance),
        "arrives": Result(data, provenance=parts[0].provenance),
    }


def _flow(case: Case, prompts: Prompts, layers: Sequence[int]) -> Result:
    """Of what random pushes at the prefix's tokens become by the end: the shares that stay, that reach the fork, and
    that reach other tokens."""
    model, end = case.model, Site("resid_post", case.model.n_layers - 1)
    places = prompts.span("prefix")[0].nonzero().flatten().tolist()
    texts = prompts.shown_tokens(0)
    shares = []
    for layer in layers:
        flow = position_flow(
            model, prompts, Site("resid_pre", layer), end, source_pos=places, random=N_RANDOM, seed=case.settings.seed
        ).data.sel(vector="random")
        square = flow["arrived"] ** 2
        fork = xr.DataArray(prompts.decision.cpu().numpy(), dims="prompt", coords={"prompt": flow["prompt"]})
        shares.append((flow["same"], square.sel(dest=fork).drop_vars("dest") / square.sum("dest")))
    percent = {"units": "%"}
    arrays = {
        name: xr.concat([100 * each[index] for each in shares], "layer").rename(src="pos")
        for index, name in enumerate(("stays", "fork"))
    }
    arrays["carried"] = 100 - arrays["stays"]
    data = xr.Dataset({name: each.assign_attrs(percent) for name, each in arrays.items()})
    data = data.assign_coords(layer=list(layers), token=("pos", [texts[place] for place in places])).drop_vars("vector")
    return Result(data, provenance=provenance(model=model.id, seed=case.settings.seed, target=str(end)))


def _rank(
    case: Case,
    held: Forks,
    deltas: Mapping[str, Float[Tensor, "layer _ d_model"]],
    layers: Sequence[int],
    entry: int,
) -> dict[str, Result]:
    """How many directions the deltas of the requests to search on span, and what is left of the effect on held-out ones
    if theirs are projected on the k largest."""
    model = case.model
    rows = {
        f"layer {layer}": Direction(deltas["search"][layer], Site("resid_pre", layer), model.id)
        for layer in layers
        if bool(deltas["search"][layer].any())
    }
    fitted, own = rows[f"layer {entry}"], deltas["held-out"][entry]
    ks = [k for k in KS if k <= min(fitted.vectors.shape) - 1]
    basis = principal(fitted, max(ks)).vectors.double()
    generator = torch.Generator().manual_seed(case.settings.seed)
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64).to(basis)
    bases = {"found": basis, "random": torch.linalg.qr(drawn.T).Q.T}
    plain = streams(model, held.plain)[entry]

    def build(subspace: str, k: int) -> Replace:
        rows = bases[subspace][:k]
        kept = (own.double() @ rows.T) @ rows
        return Replace(Site("resid_pre", entry), plain + kept.to(plain), at=-1)

    swept = sweep(
        model, held.plain, axes={"subspace": list(bases), "k": ks}, build=build, measure=held.gap.named("gap")
    )
    base = objective_of(model, held.plain, held.gap)
    change = (swept.data["gap"] - base).rename("change").assign_attrs(units="logits")
    left = {name: (own.double() @ each[:1].T).norm(dim=-1).square() for name, each in bases.items()}
    data = change.to_dataset().assign(
        along_first=(("subspace", "prompt"), torch.stack([*left.values()]).div(own.double().norm(dim=-1) ** 2).numpy())
    )
    made = provenance(model=model.id, seed=case.settings.seed, layer=entry)
    return {"spectrum": spectrum(rows), "rank": Result(data, provenance=made)}


def _entry(pushes: Result) -> int:
    """The first layer before which the own delta brings about half of the whole change; the last one if none does."""
    restored = pushes["change"].sel(push="own").sum("prompt") / pushes["whole"].sum("prompt")
    enough = restored["layer"].values[restored.values >= 0.5]
    return int(enough[0]) if len(enough) else int(restored["layer"].values[-1])


def _spaced(layers: Sequence[int]) -> list[int]:
    places = np.linspace(0, len(layers) - 1, min(MOST_LAYERS, len(layers))).round().astype(int)
    return [layers[place] for place in dict.fromkeys(places.tolist())]


def _summary(case: Case, held: Forks, results: Mapping[str, Result], entry: int) -> dict[str, Any]:
    seed, data = case.settings.seed, {name: result.data for name, result in results.items()}
    pushes, whole = data["pushes"], data["pushes"]["whole"].values

    def shares(values: xr.DataArray) -> list[dict[str, Any]]:
        return [ratio(row, whole, seed=seed).as_json for row in values.transpose(..., "prompt").values]

    def means(values: xr.DataArray) -> list[dict[str, Any]]:
        rows = values.transpose(..., "prompt").values.astype(float)
        return [ratio(row, np.ones_like(row), seed=seed).as_json for row in rows]

    layers = pushes["layer"].values.tolist()
    change = {str(push): shares(pushes["change"].sel(push=push)) for push in pushes["push"].values}
    own, predicted = pushes["change"].sel(push="own"), pushes["predicted"]
    spans = [str(span) for span in data["identity"]["span"].values]
    identity = data["identity"]
    return {
        "n": len(held.rows),
        "n_jacobians": int(identity.sizes["prompt"]),
        "layers": layers,
        "entry": entry,
        "whole": ratio(whole, np.ones_like(whole), seed=seed).as_json,
        "change": change,
        "predicted": shares(predicted),
        "free": shares(pushes["free"]),
        "correlation": [_correlation(own.sel(layer=layer), predicted.sel(layer=layer)) for layer in layers],
        "length": (pushes["length"] / pushes["stream"]).mean("prompt").values.tolist(),
        "regime": {
            "layers": data["regime"]["layer"].values.tolist(),
            "length": data["regime"]["length"].values.tolist(),
            **{group: _radii(data["regime"].sel(group=group), len(held.rows)) for group in ("prefix", "random")},
        },
        "identity": {
            name: {span: means(identity[name].sel(span=span)) for span in spans} for name in ("c", "rest", "norm")
        },
        "gain": {str(part): means(identity["gain"].sel(part=part)) for part in identity["part"].values},
        "arrives": {
            "layers": data["arrives"]["layer"].values.tolist(),
            "cos": means(data["arrives"]["cos"]),
            "gain": means(data["arrives"]["gain"]),
        },
        "dyson": _orders(data["dyson"]),
        "flow": {
            "layers": data["flow"]["layer"].values.tolist(),
            **{name: data["flow"][name].mean(("pos", "prompt")).values.tolist() for name in ("stays", "fork")},
        },
        "rank": {
            "k": data["rank"]["k"].values.tolist(),
            "found": shares(data["rank"]["change"].sel(subspace="found")),
            "random": shares(data["rank"]["change"].sel(subspace="random")),
            "effective": dict(
                zip(
                    map(str, data["spectrum"]["direction"].values),
                    data["spectrum"]["effective_rank"].values.tolist(),
                    strict=True,
                )
            ),
            "rank_90": int(data["spectrum"]["rank_90"].sel(direction=f"layer {entry}")),
            "mean_share": float(data["spectrum"]["mean_share"].sel(direction=f"layer {entry}")),
        },
    }


def _radii(regime: xr.Dataset, n: int) -> list[dict[str, Any]]:
    """The radius before each layer, in units of the stream's length; `censored` as in `linear_regime`."""
    scaled = [regime[f"relative_radius{end}"] for end in ("", "_low", "_high")]
    rows = zip(*(each.values.tolist() for each in scaled), regime["censored"].values.tolist(), strict=True)
    return [Estimate(value, low, high, n).as_json | {"censored": int(bound)} for value, low, high, bound in rows]


def _correlation(one: xr.DataArray, other: xr.DataArray) -> float | None:
    if not (one.std() > 0 and other.std() > 0):
        return None
    return float(np.corrcoef(one.values, other.values)[0, 1])


def _orders(series: xr.Dataset) -> list[dict[str, Any]]:
    """For each layer: the order that adds most of what arrives of the prefix's own delta, and the share of order 0."""
    mean = series.sel(vector="prefix")["share"].mean("prompt")
    found = []
    for layer in series["layer"].values:
        share = mean.sel(layer=layer)
        found.append(
            {
                "layer": int(layer),
                "largest": int(share["order"][int(np.argmax(share.values))]),
                "free": float(share.sel(order=0)),
                "share": float(share.max()),
            }
        )
    return found


CHAPTER = Chapter(
    name="travel",
    title="How it travels",
    question="How does what the prefix adds travel through the residual stream to the token that it changes?",
    measure=measure,
    show=show,
)
