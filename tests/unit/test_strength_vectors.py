"""Steering vectors of concepts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import assert_close

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.strength.concepts import Concept
from mechsteer.strength.vectors import concept_vectors, note, resampled_vectors, vector_spread

TEXTS = (
    "The cat sat on the mat", "A feline purrs", "Mary went to the store", "Quick zebras jump over lazy foxes", "dogs",
    "When Mary and John went to the store, John gave a drink",
)  # fmt: skip
CATS = Concept("cats", TEXTS[:3], TEXTS[3:])
DOGS = Concept("dogs", TEXTS[2:5], TEXTS[:2])


def plain_means(model: ms.Model, texts: tuple[str, ...] | list[str]) -> torch.Tensor:
    """Mean over texts of the mean over tokens behind each block [layer, d], text by text."""
    rows = []
    for text in texts:
        _, cache = model.hooked.run_with_cache(ms.Prompts.from_strings(text, model).tokens)
        rows.append(torch.stack([cache[f"blocks.{i}.hook_resid_post"][0].mean(0) for i in range(model.n_layers)]))
    return torch.stack(rows).mean(0)


def test_vectors_are_differences_of_means(zoo_models: Callable[..., ms.Model], architecture: str) -> None:
    model = zoo_models(architecture)
    found = concept_vectors(model, [CATS, DOGS])
    assert list(found) == [f"{name}, layer {i}" for name in ("cats", "dogs") for i in range(model.n_layers)]
    for concept in (CATS, DOGS):
        expected = plain_means(model, concept.positives) - plain_means(model, concept.negatives)
        for layer in range(model.n_layers):
            direction = found[f"{concept.name}, layer {layer}"]
            assert direction.site == ms.Site("resid_post", layer) and note(direction, "concept") == concept.name
            assert_close(direction.vector, expected[layer])
    unit = concept_vectors(model, CATS, layers=[1], normalise=True)
    assert list(unit) == ["cats, layer 1"] and unit["cats, layer 1"].norm == pytest.approx(1, abs=1e-5)
    assert_close(unit["cats, layer 1"].vector, found["cats, layer 1"].unit.vector)


def test_origin_survives_files_and_algebra(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    model = zoo_models("llama")
    direction = concept_vectors(model, CATS, layers=[0], recipe="published")["cats, layer 0"]
    direction.save(tmp_path / "v.safetensors")
    loaded = 2 * ms.Direction.load(tmp_path / "v.safetensors", model)
    assert (note(loaded, "concept"), note(loaded, "recipe"), note(loaded, "seed")) == ("cats", "published", None)
    assert note(ms.Direction(torch.ones(3), ms.Site("resid_post", 0)), "concept") is None


def test_recipes_differ_in_special_tokens_only(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    same = concept_vectors(model, CATS), concept_vectors(model, CATS, recipe="published")
    for name in same[0]:  # the tokenizer puts BOS where the default does
        assert_close(same[1][name].vector, same[0][name].vector)
    twice = Concept("cats", tuple(f"<s>{text}" for text in CATS.positives), CATS.negatives)
    fixed = concept_vectors(model, twice)
    doubled = concept_vectors(model, twice, recipe="published")
    for name in fixed:
        assert_close(fixed[name].vector, same[0][name].vector)
        assert float((doubled[name].vector - fixed[name].vector).norm()) > 0.05 * fixed[name].norm
    state = model.tokenizer.backend_tokenizer
    assert state.truncation is None and state.padding is None


def test_resamples_are_the_vectors_of_the_drawn_texts(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("gpt2")
    found = resampled_vectors(model, CATS, n=3, seed=5, layers=[0, 2])
    assert list(found) == [f"cats, layer {layer}, seed {n}" for n in range(3) for layer in (0, 2)]
    rng = np.random.default_rng(5)
    for n in range(3):
        drawn = [[texts[i] for i in rng.integers(3, size=3)] for texts in (CATS.positives, CATS.negatives)]
        expected = plain_means(model, drawn[0]) - plain_means(model, drawn[1])
        for layer in (0, 2):
            direction = found[f"cats, layer {layer}, seed {n}"]
            assert_close(direction.vector, expected[layer])
            assert note(direction, "seed") == n and note(direction, "resample") == {"seed": 5, "size": None}
    again = resampled_vectors(model, CATS, n=3, seed=5, layers=[0, 2])
    other = resampled_vectors(model, CATS, n=3, seed=6, layers=[0, 2])
    assert all(torch.equal(found[name].vector, again[name].vector) for name in found)
    assert any(not torch.equal(found[name].vector, other[name].vector) for name in found)
    # All of the texts without replacement: the vector itself.
    whole = resampled_vectors(model, CATS, n=2, size=3, layers=[1], normalise=True)
    for direction in whole.values():
        assert_close(direction.vector, concept_vectors(model, CATS, layers=[1])["cats, layer 1"].unit.vector)


def test_vector_spread(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    found = resampled_vectors(model, [CATS, DOGS], n=4, layers=[1, 2])
    spread = vector_spread(found)
    assert spread["direction"].values.tolist() == [f"{c}, layer {i}" for c in ("cats", "dogs") for i in (1, 2)]
    assert spread["layer"].values.tolist() == [1, 2, 1, 2] and spread["concept"].values.tolist()[0] == "cats"
    vectors = torch.stack([found[f"dogs, layer 2, seed {n}"].vector for n in range(4)]).double()
    mean = vectors.mean(0)
    got = spread.sel(direction="dogs, layer 2")
    assert float(got["norm"]) == pytest.approx(float(vectors.norm(dim=1).mean()))
    assert float(got["norm_sd"]) == pytest.approx(float(vectors.norm(dim=1).std()))
    cosines = torch.cosine_similarity(vectors, mean, dim=1)
    assert float(got["cosine"]) == pytest.approx(float(cosines.mean())) and float(got["cosine_sd"]) > 0
    noise = sum(float((v - mean).norm()) ** 2 for v in vectors) / 4
    assert float(got["noise"]) == pytest.approx(noise**0.5 / float(mean.norm()))


def test_errors(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    for wrong, message in (
        (lambda: concept_vectors(model, CATS, recipe="theirs"), "recipe='theirs' does not exist"),
        (lambda: concept_vectors(model, []), r"concepts got \[\]. Pass at least one, each with its own name"),
        (lambda: concept_vectors(model, [CATS, CATS]), "each with its own name"),
        (lambda: concept_vectors(model, CATS, layers=[]), r"layers=\[\] leaves no layer"),
        (lambda: concept_vectors(model, CATS, layers=[9]), "has layers 0 to 2"),
        (lambda: resampled_vectors(model, CATS, n=0), "got n=0 and size=None"),
        (lambda: resampled_vectors(model, CATS, size=4), "size=4 of the positives of 'cats' were asked for.* are 3"),
        (lambda: vector_spread(concept_vectors(model, CATS)), "'cats, layer 0' is not from resampled texts"),
        (lambda: vector_spread(resampled_vectors(model, CATS, n=1)), "has one resample, and a spread needs two"),
    ):
        with pytest.raises(MechsteerError, match=message):
            wrong()
