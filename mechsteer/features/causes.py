"""Whether a feature is why a prefix moves the behaviour, and whether moving features moves behaviour at all."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError
from mechsteer.features.states import at_counterparts, counterparts, encoded, site_states
from mechsteer.hooks import Intervention
from mechsteer.interventions import Replace
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import FeatureActivation, Objective
from mechsteer.objectives.base import one_of
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.result import Result, bootstrap_ci, provenance
from mechsteer.sweeps import sweep

Shows = Callable[[Sequence[str]], Sequence[bool] | np.ndarray]
"""Whether each of several texts shows the behaviour, such as `Judge.many`."""
TOGETHER, ALL, STATE = "together", "all features", "whole state"
# Numbers of states [part, token, d_in] that are held at a time.
_HELD = {"cpu": 1 << 26, "cuda": 1 << 30}


def mediation(
    model: Model,
    sae: SparseAutoencoder,
    features: Sequence[int] | Mapping[str, Sequence[int]],
    prefixed: PromptsLike,
    plain: PromptsLike,
    *,
    measure: Objective,
    prefix_tokens: str = "keep",
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """How much of what a prefix does goes through SAE features.

        needed = sum (M(prefix) - M(prefix, held)) / sum (M(prefix) - M(plain))
        enough = sum (M(plain, raised) - M(plain)) / sum (M(prefix) - M(plain))         sums over prompts

    "held": with the prefix, each feature has at every later token the activation that it has there without the prefix.
    "raised": without the prefix, the activation that it has with it. Both keep the autoencoder's error. They are the
    natural indirect effect of Vig et al. 2020 ("Investigating gender bias in language models using causal mediation
    analysis", section 3), from either end, as shares of the total effect. 1 means all of it, 0 nothing, and below 0
    that it works against the prefix.

    Besides: "all features" of the autoencoder, which is the most that any choice of features could do; and the "whole
    state" at the site, the features with the error, which is the most that anything at these tokens of this layer could
    do.

    Args:
        model: what to run.
        sae: from `load_sae`.
        features: whose part is asked for: each, and all of them together; or sets of features by name.
        prefixed, plain: the same requests, and the same completions where `measure` reads them, with and without the
            prefix.
        measure: M, such as `-TeacherForcedCE()` of the prefix's own completions, or a `LogitGap`.
        prefix_tokens: what "held" does at the prefix's own tokens, which have no counterpart: "keep" leaves the
            features there as they are, so that only what reached later tokens is taken away; "off" sets them to 0 (not
            those of the whole state).
        seed: of the bootstrap.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        `needed` and `enough` [part] with 95 % intervals (`needed_low`, ...), resampled over prompts; `held` and
        `raised` [part, prompt], and `prefixed` and `plain` [prompt], the objective itself. `part` holds the features'
        numbers as text and "together", or the sets' names; then "all features" and "whole state".

    Raises:
        MechsteerError: the autoencoder does not fit the model, the prompts do not end alike, there are no features, or
            the prefix does not change the objective at all.
    """
    began = time.perf_counter()
    one_of("prefix_tokens", prefix_tokens, ("keep", "off"))
    sae.check_fits(model)
    parts = _parts(sae, features)
    with_it, without = (model.prompts(each).padded("right") for each in (prefixed, plain))
    parts[ALL] = list(range(sae.n_features))
    arrays: dict[str, np.ndarray] = {}
    base: dict[str, np.ndarray] = {}
    states = {"prefixed": site_states(model, sae, with_it), "plain": site_states(model, sae, without)}
    for name, own, prompts, other, source in (
        ("held", "prefixed", with_it, "plain", without), ("raised", "plain", without, "prefixed", with_it),
    ):  # fmt: skip
        off = name == "held" and prefix_tokens == "off"
        changed = _Changed(sae, states[own], prompts, states[other], source, off)
        rows = []
        for some in changed.groups(parts):
            cells: dict[str, Intervention | None] = {"": None} | changed.cells(some, model)
            swept = sweep(
                model, prompts, axes={"part": list(cells)}, build=lambda part, cells=cells: cells[part],
                measure=measure.named("value"), progress=progress,
            )  # fmt: skip
            base[own] = swept["value"].values[0].astype(float)
            rows.append(swept["value"].values[1:].astype(float))
        arrays[name] = np.concatenate(rows)
    total = base["prefixed"] - base["plain"]
    if not (np.isfinite(total).all() and total.sum()):
        raise MechsteerError(
            f"{measure!r} is the same with the prefix and without, or not finite, so that there is no effect to "
            "explain. Choose an objective that the prefix moves."
        )
    shares = {"needed": base["prefixed"] - arrays["held"], "enough": arrays["raised"] - base["plain"]}
    found: dict[str, Any] = {name: (("part", "prompt"), each) for name, each in arrays.items()}
    found |= {name: ("prompt", each) for name, each in base.items()}
    for name, each in shares.items():
        ends = [bootstrap_ci(row, per=total, seed=seed) for row in each]
        found[name] = ("part", each.sum(1) / total.sum(), {"long_name": f"share of the effect {_WORDS[name]}"})
        found |= {f"{name}_{end}": ("part", np.array([e[i] for e in ends])) for i, end in enumerate(("low", "high"))}
    labels = list(with_it.labels) if with_it.labels else np.arange(len(with_it))
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, sae=sae.name, sae_hash=sae.hash,
        measure=repr(measure), prefix_tokens=prefix_tokens,
    )  # fmt: skip
    return Result(xr.Dataset(found, coords={"part": [*parts, STATE], "prompt": labels}), provenance=made)


def _parts(sae: SparseAutoencoder, features: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Sets of features by name."""
    if isinstance(features, Mapping):
        parts = {str(name): list(dict.fromkeys(map(int, each))) for name, each in features.items()}
    else:
        chosen = list(dict.fromkeys(map(int, features)))
        parts = {str(each): [each] for each in chosen} | {TOGETHER: chosen}
    if not all(parts.values()) or not parts:
        raise MechsteerError("mediation got no features. Pass some, such as those that rank_by_contrast puts first.")
    taken = {ALL, STATE, ""} & set(parts)
    if taken:
        raise MechsteerError(f"mediation got a set called {taken.pop()!r}, a name that it uses itself. Pass another.")
    for each in parts.values():
        for feature in each:
            sae.check_feature(feature, "mediation")
    return parts


_WORDS = {"needed": "that goes when it is held back", "enough": "that comes when it is raised"}


def activation_and_behaviour(
    model: Model,
    sae: SparseAutoencoder,
    feature: int,
    plain: PromptsLike,
    pushes: Mapping[str, tuple[PromptsLike, Iterable[Intervention]]],
    *,
    shows: Shows,
    at: int | str = "decision",
    max_new_tokens: int = 24,
    progress: bool = True,
) -> Result:
    """What several pushes do to a feature, and to the behaviour that the feature seems to stand for.

    Args:
        model: what to run.
        sae: from `load_sae`.
        feature: its number.
        plain: requests without any push.
        pushes: by name, the same requests as they are pushed: the prompts (with a prefix, say) and interventions.
        shows: whether each of several completions shows the behaviour, such as `topic_judge("cats").many`.
        at: where the feature is read, before anything is generated; as for `FeatureActivation`.
        max_new_tokens: of the greedy completions that are judged.
        progress: show bars on standard error for what takes longer than two seconds.

    Returns:
        `activation`, `pre_activation` (where the architecture has one) and `behaviour` (0 or 1) [push, prompt], after
        the push's interventions; the first push is "none".

    Raises:
        MechsteerError: a push is called "none" or has other requests, or as for `FeatureActivation`.
    """
    began = time.perf_counter()
    if "none" in pushes:
        raise MechsteerError("activation_and_behaviour adds the push 'none' itself. Give yours another name.")
    base = model.prompts(plain)
    each = {"none": (base, ())} | {
        name: (model.prompts(prompts), tuple(how)) for name, (prompts, how) in pushes.items()
    }
    measures: dict[str, Objective] = {"activation": FeatureActivation(sae, feature, at=at)}
    if getattr(sae.module, "b_enc", None) is not None:
        measures["pre_activation"] = FeatureActivation(sae, feature, at=at, pre=True)
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in (*measures, "behaviour")}
    for name, (prompts, how) in each.items():
        if len(prompts) != len(base):
            raise MechsteerError(
                f"The push {name!r} has {len(prompts)} prompts, and {len(base)} are plain. Pass the same requests."
            )
        swept = sweep(model, prompts, axes={}, build=lambda how=how: how, measure=measures, progress=progress)
        for measured in measures:
            arrays[measured].append(swept[measured].values.astype(float))
        completed = model.generate(prompts, interventions=how, max_new_tokens=max_new_tokens, progress=progress)
        arrays["behaviour"].append(np.asarray(shows(completed.completions), dtype=float))
    data = xr.Dataset(
        {name: (("push", "prompt"), np.stack(rows)) for name, rows in arrays.items()},
        coords={"push": list(each), "prompt": list(base.labels) if base.labels else np.arange(len(base))},
        attrs={"feature": feature},
    )
    seconds = time.perf_counter() - began
    return Result(data, provenance=provenance(model=model.id, seconds=seconds, sae=sae.name, sae_hash=sae.hash, at=at))


def agreement(cases: Mapping[str, Result], *, reads: str = "activation", seed: int = 0, n: int = 2000) -> Result:
    """Whether pushes that move a feature more move the behaviour more, over several features and behaviours.

    Activations of a case are divided by the largest size of its moves, because features have units of their own.

    Args:
        cases: by topic, what `activation_and_behaviour` gave, with the same pushes.
        reads: "activation" or "pre_activation".
        seed: of the bootstrap over topics.
        n: number of resamples.

    Returns:
        `moved` and `behaviour_moved` [topic, push]: means over prompts minus those of "none"; `share_moved` [topic,
        push], the scaled `moved`; Pearson's `correlation` of it with `behaviour_moved` over all topics and pushes, and
        `correlation_push` [push] over topics, each with its 95 % interval from resampling topics (`correlation_low`,
        ...; NaN where one side is constant).

    Raises:
        MechsteerError: fewer than three cases, or unlike pushes.
    """
    names = list(cases)
    if len(names) < 3:
        raise MechsteerError(
            f"agreement got {len(names)} cases. Pass at least three, or there is nothing to correlate."
        )
    pushes = cases[names[0]]["push"].values.tolist()
    for name in names:
        if cases[name]["push"].values.tolist() != pushes:
            raise MechsteerError(f"The case {name!r} has other pushes than {names[0]!r}. Measure the same in all.")

    def moved(array: str) -> Float[np.ndarray, "topic push"]:
        means = np.stack([cases[name][array].mean("prompt").values for name in names])
        return means[:, 1:] - means[:, :1]

    states, behaviour = moved(reads), moved("behaviour")
    largest = np.abs(states).max(1, keepdims=True)
    share = states / np.where(largest > 0, largest, 1.0)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(n, len(names)))

    def correlations(columns: slice | list[int]) -> tuple[float, float, float]:
        one, other = share[:, columns], behaviour[:, columns]
        resampled = np.array([_pearson(one[rows], other[rows]) for rows in drawn])
        kept = resampled[np.isfinite(resampled)]
        low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (np.nan, np.nan)
        return _pearson(one, other), float(low), float(high)

    overall = correlations(slice(None))
    each = np.array([correlations([column]) for column in range(len(pushes) - 1)])
    dims = ("topic", "push")
    found = {"moved": (dims, states), "share_moved": (dims, share), "behaviour_moved": (dims, behaviour)}
    for i, end in enumerate(("", "_low", "_high")):
        found |= {f"correlation{end}": ((), overall[i]), f"correlation_push{end}": ("push", each[:, i])}
    features = [int(cases[name].data.attrs["feature"]) for name in names]
    coords = {"topic": names, "push": pushes[1:], "feature": ("topic", features)}
    model = cases[names[0]].provenance.get("model")
    return Result(xr.Dataset(found, coords=coords), provenance=provenance(seed=seed, reads=reads, made_with=model))


def _pearson(one: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."]) -> float:
    first, second = one.ravel() - one.mean(), other.ravel() - other.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float(first @ second) / size if size > 1e-12 else float("nan")


class _Changed:
    """The site's activations in some prompts, with the features that they have in others.

    All that is changed lies at one site and depends on nothing after it, so that each set of features is a state, which
    is made once: a table of all features at all tokens would be larger by their number over the site's width.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        own: Float[Tensor, "prompt pos d_in"],
        prompts: Prompts,
        other: Float[Tensor, "prompt other_pos d_in"],
        source: Prompts,
        off: bool,
    ) -> None:
        """
        Args:
            sae: whose features.
            own: what the site has in `prompts`.
            prompts: in which features are changed.
            other: what the site has in `source`.
            source: the same requests, with the features that they are changed to.
            off: whether features are 0 at tokens of `prompts` whose counterparts `source` lacks.
        """
        moved, self._end = at_counterparts(other, source, prompts)
        self._sae, self._own, self._prompts = sae, own, prompts
        self._whole = torch.where(self._end[..., None], moved, own)
        self._off = prompts.mask & ~self._end & ~counterparts(source, prompts)[2] & off

    def groups(self, parts: Mapping[str, list[int]]) -> Iterator[dict[str, list[int]]]:
        """Sets of features whose states fit into memory together; with the last ones an empty set for the state."""
        size = max(1, _HELD.get(self._own.device.type, _HELD["cuda"]) // self._own.numel())
        every = [*parts.items(), (STATE, [])]
        for start in range(0, len(every), size):
            yield dict(every[start : start + size])

    def cells(self, parts: Mapping[str, list[int]], model: Model) -> dict[str, Intervention]:
        """What puts the states of sets of features in the place of the site."""
        touched = self._end | self._off
        x, whole, off = self._own[touched], self._whole[touched], self._off[touched]
        values = {name: self._own.clone() for name in parts if name != STATE}
        change = {name: torch.empty_like(precise(x)) for name in values}
        decoder = self._sae.decoder
        for rows, features in encoded(self._sae, x):
            there = torch.where(off[rows, None], 0.0, self._sae.encode(whole[rows]))
            moved = there - features
            for name, each in change.items():
                each[rows] = (moved[:, parts[name]].to(decoder) @ decoder[parts[name]]).to(each)
        for name, each in values.items():
            each[touched] = (x + self._sae.scale(precise(x)) * change[name]).to(each)
        if STATE in parts:
            values[STATE] = self._whole
        return {name: Replace(self._sae.site, self._activations(each, model)) for name, each in values.items()}

    def _activations(self, values: Float[Tensor, "prompt pos d_in"], model: Model) -> Activations:
        site = self._sae.site
        heads = model.size(site, "head") if "head" in site.axes else None
        shaped = values if heads is None else values.unflatten(-1, (heads, -1))
        return Activations({site: shaped}, prompts=self._prompts, model=model.id)
