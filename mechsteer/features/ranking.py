"""Which features a push moves, which carry an objective, and which resemble a vector."""

import time
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.backends.sae import auroc
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.features.states import at_counterparts, encoded, mean_features, site_states, token_features
from mechsteer.gradients import graph_tokens, traced
from mechsteer.interventions import SetFeature
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import check_examples, one_of
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.result import Result, bootstrap_ci, provenance
from mechsteer.rows import normalise_at, of_like_lengths, tokens_of
from mechsteer.sweeps import sweep


def rank_by_contrast(
    model: Model,
    sae: SparseAutoencoder,
    positive: PromptsLike,
    negative: PromptsLike,
    *,
    at: int | str = "decision",
    by: str = "difference",
    n: int = 20,
    seed: int = 0,
) -> Result:
    """Features that are more active on some prompts than on others, such as the same requests with a prefix.

        difference_i = mean f_i(positive) - mean f_i(negative)          auroc_i = P(f_i(positive) > f_i(negative))

    f_i is the mean activation over the tokens of a prompt that `at` means; in the AUROC ties count half. Where there
    are as many prompts on both sides they are pairs, and the interval is that of the mean difference of pairs.

    Args:
        model: what to run.
        sae: from `load_sae`.
        positive, negative: prompts, such as with and without a prefix.
        at: at which tokens; as for `FeatureActivation`.
        by: what they are sorted by, largest first: "difference", or "auroc" (ties by difference).
        n: how many features to keep.
        seed: of the bootstrap.

    Returns:
        `difference` [feature] with its 95 % interval `difference_low` and `difference_high`, `auroc`, `positive` and
        `negative` (the two means), and for pairs `change` [feature, prompt].

    Raises:
        MechsteerError: the autoencoder does not fit the model, there is no such `by` or `at`, or a prompt has no such
            token.
    """
    began = time.perf_counter()
    one_of("by", by, ("difference", "auroc"))
    sae.check_fits(model)
    with_it, without = (
        mean_features(model, sae, model.prompts(each).padded("right"), at).cpu() for each in (positive, negative)
    )
    area = auroc(torch.cat([with_it, without]), torch.cat([torch.ones(len(with_it)), torch.zeros(len(without))]))
    difference = with_it.mean(0) - without.mean(0)
    # A stable sort by the second criterion, then by the first.
    order = difference.argsort(descending=True, stable=True)
    if by == "auroc":
        order = order[area[order].argsort(descending=True, stable=True)]
    best = order[:n]
    paired = len(with_it) == len(without)
    arrays: dict[str, Any] = {
        "difference": ("feature", difference[best].numpy()),
        "auroc": ("feature", area[best].numpy()),
        "positive": ("feature", with_it[:, best].mean(0).numpy()),
        "negative": ("feature", without[:, best].mean(0).numpy()),
    }
    if paired:
        change = (with_it - without)[:, best].numpy()
        arrays["change"] = (("feature", "prompt"), change.T)
        low, high = bootstrap_ci(change, seed=seed)
    else:
        low, high = _unpaired(with_it[:, best].numpy(), without[:, best].numpy(), seed=seed)
    arrays |= {"difference_low": ("feature", low), "difference_high": ("feature", high)}
    data = xr.Dataset(arrays, coords=_coords(best))
    data["difference"].attrs = {"long_name": "activation with minus without", "units": "feature activation"}
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, sae=sae.name, sae_hash=sae.hash, at=at, by=by
    )
    return Result(data, provenance=made)


def rank_by_attribution(
    model: Model,
    sae: SparseAutoencoder,
    prompts: PromptsLike,
    *,
    measure: Objective,
    against: PromptsLike | None = None,
    at: Any = None,
    n: int = 20,
    exact: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Features that an objective M hangs on: activation times gradient, and for the top ones the truth.

        attribution_i = sum_t (f_i(x_t) - b_it) * <dM/dx_t, s(x_t) * decoder_i>        exact_i = M - M(f_it = b_it)

    The first is the first-order estimate of the second (Marks et al. 2024, "Sparse feature circuits", equation 1), and
    needs one forward and one backward pass for all features. b is 0, so that features are switched off; or, with
    `against`, what the features are in other prompts: `against=plain` says through which features a prefix acts. Where
    several of them do each other's work, none is missed alone, and slopes under the prefix are near 0: the other way
    round, `rank_by_attribution(model, sae, plain, against=prefixed)`, minus the attribution is what each would bring.

    Args:
        model: what to run. Its parameters need no gradients, and get none.
        sae: from `load_sae`.
        prompts: what to run it on.
        measure: one differentiable number per prompt.
        against: the same requests (and completions) without the prefix. Tokens that only one side has do not count.
        at: which tokens count; as for `Intervention`. None for all.
        n: how many features to keep: those whose mean over prompts is furthest from 0.
        exact: for how many of them, from the first, to measure what switching them off does.
        seed: of the bootstrap.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        `attribution` [feature, prompt] with `attribution_low` and `attribution_high` [feature], the 95 % interval of
        the mean over prompts; `activation` [feature, prompt], summed over the tokens; and with `exact` also `exact`
        [feature, prompt] with its interval, NaN for features that were not measured.

    Raises:
        MechsteerError: the autoencoder does not fit the model; `against` does not end like the prompts; or the
            objective has no gradient, holds values for another number of prompts, or is not finite.
    """
    began = time.perf_counter()
    sae.check_fits(model)
    right = model.prompts(prompts).padded("right")
    check_examples(measure, right)
    rule = normalise_at(at)
    others = None if against is None else model.prompts(against).padded("right")
    there = None if others is None else at_counterparts(site_states(model, sae, others), others, right)
    scores = torch.zeros(len(right), sae.n_features, dtype=torch.float64)
    active = torch.zeros_like(scores)
    for part in of_like_lengths(right.lengths.cpu(), graph_tokens(model)):
        batch = right[part].padded("right")
        width = batch.tokens.shape[1]
        other = None if there is None else (there[0][part, :width], there[1][part, :width])
        scores[part], active[part] = _attributed(model, sae, batch, measure, part, tokens_of(rule, batch), other)
    best = scores.mean(0).abs().argsort(descending=True, stable=True)[:n]
    arrays: dict[str, Any] = {"attribution": (("feature", "prompt"), scores[:, best].T.numpy())}
    arrays["activation"] = (("feature", "prompt"), active[:, best].T.numpy())
    ends = {"attribution": scores[:, best].numpy()}
    if exact:
        tested = best[:exact].tolist()
        base = None if others is None else _base(model, sae, others, right, tested)
        swept = sweep(
            model, right, axes={"feature": [-1, *tested]}, measure=measure.named("value"), progress=progress,
            build=lambda feature: None if feature < 0 else SetFeature(
                sae, feature, 0.0 if base is None else base[..., tested.index(feature), None], at=rule),
        )  # fmt: skip
        value = swept["value"].values
        truth = np.full((len(best), len(right)), np.nan)
        truth[: len(tested)] = value[0] - value[1:]
        arrays["exact"], ends["exact"] = (("feature", "prompt"), truth), truth.T
    for name, values in ends.items():
        low, high = bootstrap_ci(values, seed=seed)
        arrays |= {f"{name}_low": ("feature", low), f"{name}_high": ("feature", high)}
    coords = _coords(best) | {"prompt": list(right.labels) if right.labels else np.arange(len(right))}
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, sae=sae.name, sae_hash=sae.hash,
        measure=repr(measure), at=repr(rule),
    )  # fmt: skip
    return Result(xr.Dataset(arrays, coords=coords), provenance=made)


def rank_by_similarity(sae: SparseAutoencoder, direction: Direction, *, by: str = "decoder", n: int = 20) -> Result:
    """Features that write, or read, along a vector: cosines with all decoder rows and encoder columns.

    Args:
        sae: from `load_sae`.
        direction: one vector at the autoencoder's site.
        by: "decoder" or "encoder": which cosine they are sorted by, by its size, so that opposite features count too.
        n: how many features to keep.

    Returns:
        `decoder` and `encoder` [feature].

    Raises:
        MechsteerError: the vector lives at another site, has another width or is zero, or there is no such `by`.
    """
    one_of("by", by, ("decoder", "encoder"))
    if direction.site != sae.site or len(direction.vector) != sae.d_in:
        raise MechsteerError(
            f"rank_by_similarity got a direction of width {len(direction.vector)} at {direction.site}, and the "
            f"autoencoder {sae.name} takes width {sae.d_in} at {sae.site} apart. Take the direction at that site."
        )
    unit = direction.unit.vector.detach().to(sae.decoder)
    cosines = {
        "decoder": torch.nn.functional.cosine_similarity(sae.decoder, unit[None], dim=1),
        "encoder": torch.nn.functional.cosine_similarity(sae.encoder, unit[:, None], dim=0),
    }
    best = cosines[by].abs().argsort(descending=True, stable=True)[:n].cpu()
    data = xr.Dataset(
        {name: ("feature", values.cpu().float()[best].numpy(), {"long_name": f"cosine with the {name}"})
         for name, values in cosines.items()},
        coords=_coords(best),
    )  # fmt: skip
    return Result(data, provenance=provenance(model=direction.model, sae=sae.name, sae_hash=sae.hash, by=by))


def _attributed(
    model: Model,
    sae: SparseAutoencoder,
    prompts: Prompts,
    measure: Objective,
    example: Int[Tensor, " prompt"],
    where: Bool[Tensor, "prompt pos"],
    other: tuple[Float[Tensor, "prompt pos d_in"], Bool[Tensor, "prompt pos"]] | None,
) -> tuple[Float[Tensor, "prompt feature"], Float[Tensor, "prompt feature"]]:
    """Attributions and activations of all features, summed over the tokens `where`. `other` holds what the site has at
    these tokens without the prefix, and which of them count."""
    run = traced(model, prompts, measure, example, [sae.site])
    gradients = run.gradients()
    if sae.site not in gradients:
        raise MechsteerError(
            f"{measure!r} has no gradient at {sae.site}. Use an objective computed from later logits or activations "
            "with PyTorch."
        )
    x, slope = (precise(each[sae.site].flatten(2)[where]) for each in (run.taken, gradients))
    if not bool(run.value.isfinite().all() and slope.isfinite().all()):
        raise MechsteerError(f"{measure!r} or its gradient is NaN or infinite. Choose an objective that is finite.")
    row, decoder = torch.where(where)[0], sae.decoder.to(x)
    scores, active = torch.zeros(2, len(prompts), sae.n_features, device=x.device, dtype=x.dtype)
    for some, found in encoded(sae, x):
        features = found.to(x)
        away = features
        if other is not None:
            before, counts = (each[where][some] for each in other)
            away = torch.where(counts[:, None], features - sae.encode(before.to(x)).to(x), 0.0)
        slopes = (sae.scale(x) * slope)[some] @ decoder.T
        scores.index_add_(0, row[some], away * slopes)
        active.index_add_(0, row[some], features)
    return scores.cpu().double(), active.cpu().double()


def _base(
    model: Model, sae: SparseAutoencoder, source: Prompts, target: Prompts, features: list[int]
) -> Float[Tensor, "prompt pos feature"]:
    """Activations of features in `source` at the tokens of `target`; where it has no such token, the target's."""
    values, own = (token_features(model, sae, prompts, features) for prompts in (source, target))
    moved, end = at_counterparts(values, source, target)
    return torch.where(end[..., None], moved, own)


def _coords(features: Int[Tensor, " feature"]) -> dict[str, Any]:
    """The feature axis, with texts as ticks: numbers would be placed by size and not by rank."""
    return {"feature": features.numpy(), "feature_token": ("feature", [str(each) for each in features.tolist()])}


def _unpaired(
    positive: Float[np.ndarray, "one feature"],
    negative: Float[np.ndarray, "other feature"],
    *,
    seed: int,
    n: int = 1000,
) -> tuple[Float[np.ndarray, " feature"], Float[np.ndarray, " feature"]]:
    """Percentile bootstrap interval of the difference of two groups' means, each resampled for itself."""
    rng = np.random.default_rng(seed)
    means = [
        rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=n) @ group / len(group)
        for group in (positive, negative)
    ]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975], axis=0)
    return low, high
