"""Steering vectors of concepts: differences of means at all layers, from all texts or from resampled ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer.directions import Direction, difference_of_means
from mechsteer.directions.extraction import stored, text_means
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.site import Site
from mechsteer.strength.concepts import Concept
from mechsteer.strength.recipes import check_recipe, published_prompts


def concept_vectors(
    model: Model,
    concepts: Concept | Iterable[Concept],
    *,
    layers: Iterable[int] | None = None,
    normalise: bool = False,
    recipe: str = "default",
    max_tokens: int = 300,
    batch_tokens: int = 2000,
    progress: bool = True,
) -> dict[str, Direction]:
    """Steering vectors of concepts at `resid_post`, all layers in one pass over the texts.

    v = mean_i mean_t h_t(positive i) - mean_i mean_t h_t(negative i): equation (3) of "Towards Understanding Steering
    Strength", with the token-wise average of section 4; h is the residual stream behind a block.

    Args:
        model: to record, and to steer.
        concepts: one, or several.
        layers: which blocks; None for all.
        normalise: scale each vector to length 1 (figure A.1 of the paper); alpha is then in units of the stream.
        recipe: "published" tokenises as the authors' code does; see `mechsteer.strength.recipes.RECIPES`.
        max_tokens: where a text is cut, BOS included.
        batch_tokens: at most this many tokens in a batch, padding included.
        progress: show a bar where it takes long.

    Returns:
        Directions by name ("joy, layer 3"), whose origin knows their concept.

    Raises:
        MechsteerError: there is no such recipe or layer, no concepts, or two of one name; or as in
            `difference_of_means`.
    """
    check_recipe(recipe)
    sites = _sites(model, layers)
    made = {}
    for concept in _named(concepts):
        positives, negatives = (
            _texts(model, texts, recipe, max_tokens) for texts in (concept.positives, concept.negatives)
        )
        found = difference_of_means(
            model, positives, negatives, sites=sites, normalise=normalise, max_tokens=max_tokens,
            batch_tokens=batch_tokens, progress=progress,
        )  # fmt: skip
        for site, direction in found.items():
            made[direction_name(concept.name, site)] = _noted(direction, concept=concept.name, recipe=recipe)
    return made


def resampled_vectors(
    model: Model,
    concepts: Concept | Iterable[Concept],
    *,
    n: int = 5,
    size: int | None = None,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    normalise: bool = False,
    recipe: str = "default",
    max_tokens: int = 300,
    batch_tokens: int = 2000,
    progress: bool = True,
) -> dict[str, Direction]:
    """Steering vectors from resampled sets P and N (figure A.3 of the paper), still from one pass over the texts.

    Args:
        model, concepts, layers, normalise, recipe, max_tokens, batch_tokens, progress: as in `concept_vectors`.
        n: number of resamples.
        size: texts in each P and in each N, drawn without replacement, as where many texts are at hand; None draws as
            many as there are with replacement (the bootstrap).
        seed: of the draws, which are the same for all concepts with as many texts.

    Returns:
        Directions by name ("joy, layer 3, seed 0"), whose origin knows their concept and seed, the resample's number.

    Raises:
        MechsteerError: `n` is not positive, a set has fewer than `size` texts, or as in `concept_vectors`.
    """
    check_recipe(recipe)
    if n < 1 or (size is not None and size < 1):
        raise MechsteerError(f"resampled_vectors got n={n} and size={size}. Pass 1 or more of each.")
    sites = _sites(model, layers)
    made = {}
    for concept in _named(concepts):
        rows = []
        for group in ("positives", "negatives"):
            texts = getattr(concept, group)
            if size is not None and len(texts) < size:
                raise MechsteerError(
                    f"size={size} of the {group} of {concept.name!r} were asked for, and there are {len(texts)}. "
                    "Pass more texts, or size=None to draw with replacement."
                )
            rows.append(
                text_means(
                    model, _texts(model, texts, recipe, max_tokens), sites=sites, max_tokens=max_tokens,
                    batch_tokens=batch_tokens, progress=progress,
                )
            )  # fmt: skip
        rng = np.random.default_rng(seed)
        for number in range(n):
            picked = [_draw(rng, len(group[sites[0]]), size) for group in rows]
            for site in sites:
                means = [
                    group[site][torch.from_numpy(which)].mean(0) for group, which in zip(rows, picked, strict=True)
                ]
                origin = {"method": "difference_of_means", "tokens": "all", "resample": {"seed": seed, "size": size}}
                direction = Direction(stored((means[0] - means[1])[None], model), site, model.id, origin)
                name = f"{direction_name(concept.name, site)}, seed {number}"
                direction = direction.unit if normalise else direction
                made[name] = _noted(direction, concept=concept.name, recipe=recipe, seed=number)
    return made


def direction_name(concept: str, site: Site) -> str:
    """What a concept's vector at a site is called in curves."""
    return f"{concept}, layer {site.layer}"


def vector_spread(directions: Mapping[str, Direction]) -> Result:
    """How much resampled vectors differ.

    Args:
        directions: from `resampled_vectors`.

    Returns:
        For each concept and layer, over resamples: `norm` and `norm_sd`; `cosine` and `cosine_sd`, of a vector with the
        mean of all; and `noise`, the root mean square length of the deviation from that mean over its length.

    Raises:
        MechsteerError: a direction's origin knows no resample, or a group has only one.
    """
    groups: dict[str, list[Direction]] = {}
    for name, direction in directions.items():
        if note(direction, "seed") is None:
            raise MechsteerError(f"{name!r} is not from resampled texts. Pass what resampled_vectors made.")
        groups.setdefault(direction_name(note(direction, "concept"), direction.site), []).append(direction)
    rows = []
    for name, group in groups.items():
        if len(group) < 2:
            raise MechsteerError(f"{name!r} has one resample, and a spread needs two. Pass n=2 or more.")
        vectors = torch.stack([each.vector.double().cpu() for each in group]).detach()
        mean = vectors.mean(0)
        norms = torch.linalg.vector_norm(vectors, dim=1)
        cosines = vectors @ mean / (norms * torch.linalg.vector_norm(mean))
        noise = (vectors - mean).square().sum(1).mean().sqrt() / torch.linalg.vector_norm(mean)
        rows.append([norms.mean(), norms.std(), cosines.mean(), cosines.std(), noise])
    names = ("norm", "norm_sd", "cosine", "cosine_sd", "noise")
    table = np.array([[float(value) for value in row] for row in rows])
    firsts = [group[0] for group in groups.values()]
    data = xr.Dataset(
        {name: ("direction", table[:, place]) for place, name in enumerate(names)},
        coords={"direction": list(groups), **labels_of(firsts)},
    )
    return Result(data, provenance=provenance(model=firsts[0].model, resamples=len(directions) // len(groups)))


def note(direction: Direction, key: str) -> Any:
    """What a direction's origin, or that of what it was derived from, says about `key`; None where it does not."""
    origin: Any = direction.origin
    while isinstance(origin, Mapping):
        if key in origin:
            return origin[key]
        origin = origin.get("of")
    return None


def labels_of(directions: Sequence[Direction]) -> dict[str, tuple[str, list[Any]]]:
    """Coordinates `layer`, `concept` and `seed` along `direction`, those that all directions know."""
    found = {
        "layer": [each.site.layer for each in directions],
        "concept": [note(each, "concept") for each in directions],
        "seed": [note(each, "seed") for each in directions],
    }
    return {name: ("direction", values) for name, values in found.items() if None not in values}


def _noted(direction: Direction, **notes: Any) -> Direction:
    return replace(direction, origin={**direction.origin, **notes})


def _named(concepts: Concept | Iterable[Concept]) -> list[Concept]:
    each = [concepts] if isinstance(concepts, Concept) else list(concepts)
    names = [concept.name for concept in each]
    if not each or len(set(names)) < len(names):
        raise MechsteerError(f"concepts got {names}. Pass at least one, each with its own name.")
    return each


def _sites(model: Model, layers: Iterable[int] | None) -> list[Site]:
    sites = [Site("resid_post", layer) for layer in (range(model.n_layers) if layers is None else layers)]
    if not sites:
        raise MechsteerError("layers=[] leaves no layer. Pass at least one, or None for all.")
    for site in sites:
        model.check_site(site)
    return list(dict.fromkeys(sites))


def _texts(model: Model, texts: Sequence[str], recipe: str, max_tokens: int) -> Prompts | Sequence[str]:
    if recipe == "published":
        return published_prompts(texts, model, max_tokens=min(max_tokens, model.n_ctx))
    return list(texts)


def _draw(rng: np.random.Generator, n: int, size: int | None) -> np.ndarray:
    return rng.integers(n, size=n) if size is None else rng.permutation(n)[:size]
