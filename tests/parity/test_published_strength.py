"""`recipe="published"` gives the numbers of an independent implementation of the recipe in plain transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from published_strength import Plain, grid

import mechsteer as ms
from mechsteer.strength.concepts import Concept
from mechsteer.strength.cross_entropy import cross_entropy_curves, text_windows
from mechsteer.strength.curves import token_curves
from mechsteer.strength.recipes import published_alphas
from mechsteer.strength.vectors import concept_vectors

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
GLAD = [
    "One day, a happy girl smiled at the big sun. She laughed and danced with joy.",
    "Tom was so glad! He hugged his friend and they had fun all day.",
    "It was a wonderful day.",
]
SAD = [
    "One day, a sad boy cried in the rain. He lost his toy and was all alone.",
    "Mia was very sad. Her dog was sick, and she wept.",
]
STORY = (
    "Once upon a time there was a little cat who lived in a small house near the forest. Every morning the cat went "
    "out to look for a friend. One day it met a dog. The dog was big, but it was kind. They played with a ball. "
)


@pytest.fixture(scope="module", params=["stories260K", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Llama shape whose tokenizer adds BOS, and a random GPT-2 shape whose tokenizer does not."""
    if request.param == "gpt2":
        return zoo.write_folder("gpt2", tmp_path_factory.mktemp("gpt2"))
    if not STORIES.exists():
        pytest.skip("stories260K is not here")
    return STORIES


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> ms.Model:
    return ms.load_model(folder, device="cpu")


def texts_for(model: ms.Model, texts: list[str]) -> list[str]:
    """Texts that a tiny context holds; one starts with BOS, as texts that were decoded with it do."""
    cut = [text[: 2 * model.n_ctx // 3] for text in texts]
    bos = model.tokenizer.bos_token
    return [bos + cut[0], *cut[1:]] if bos in model.tokenizer.all_special_tokens and model.n_ctx > 64 else cut


def assert_close(got: np.ndarray | torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    exact = torch.as_tensor(got).double()
    assert exact.shape == expected.shape
    assert float((exact - expected.double()).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def vectors(model: ms.Model, *, recipe: str = "published", max_tokens: int = 300) -> dict[str, ms.Direction]:
    concept = Concept("glad", tuple(texts_for(model, GLAD)), tuple(texts_for(model, SAD)))
    return concept_vectors(model, concept, recipe=recipe, max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", [300, 7])
def test_vectors_at_all_layers(model: ms.Model, plain: Plain, max_tokens: int) -> None:
    limit = min(max_tokens, model.n_ctx)
    expected = plain.vectors(texts_for(model, GLAD), texts_for(model, SAD), max_tokens=limit)
    found = vectors(model, max_tokens=max_tokens)
    assert list(found) == [f"glad, layer {layer}" for layer in range(model.n_layers)]
    got = torch.stack([direction.vector for direction in found.values()])
    assert_close(got / expected.norm(), expected / expected.norm(), 1e-5)
    default = torch.stack([each.vector for each in vectors(model, recipe="default", max_tokens=max_tokens).values()])
    # The quirk that is fixed shows: a second BOS, or none.
    assert float((default - expected).norm()) > 1e-3 * float(expected.norm())


@pytest.mark.parametrize("at", ["all", "last"])
def test_token_curves_and_the_top_tokens_at_both_ends(model: ms.Model, plain: Plain, at: str) -> None:
    layer = model.n_layers // 2
    name, alphas = f"glad, layer {layer}", grid(-200, 200, 32)
    vector = plain.vectors(texts_for(model, GLAD), texts_for(model, SAD), max_tokens=model.n_ctx)[layer]
    context = STORY[:60]
    expected = plain.token_probabilities(context, layer, vector, alphas, last=at == "last")
    result = token_curves(
        model, [context], {name: vectors(model)[name]}, alphas, top=20, at=-1 if at == "last" else "all",
        recipe="published",
    )  # fmt: skip
    np.testing.assert_array_equal(result["alpha"].values, alphas.double())
    for end, flag in ((-1, "is_top_high"), (0, "is_top_low")):
        top = result["token"].values[result[flag].values[0, :, 0]]
        chosen = expected[end].topk(20)
        # Tokens as likely as one another may change places.
        assert float(expected[end][torch.tensor(top)].min()) >= float(chosen.values[-1]) - 1e-6 and len(top) == 20
    ids = torch.tensor(result["token"].values)
    assert_close(result["p"].values[0, :, :, 0], expected[:, ids])
    zero = int((alphas == 0).nonzero())
    assert_close(result["delta_p"].values[0, :, :, 0], expected[:, ids] - expected[zero, ids])
    assert float(result["delta_p"].max()) > 0.05, "an effect this weak would hide an error"


def test_a_long_context_is_cut_at_100_tokens(model: ms.Model, plain: Plain) -> None:
    if model.n_ctx <= 100:
        pytest.skip("the context is shorter")
    vector, alphas = plain.vectors(GLAD, SAD)[1], torch.tensor([-3.0, 0.0, 3.0])
    expected = plain.token_probabilities(STORY * 3, 1, vector, alphas)
    direction = ms.Direction(vector[None], ms.Site("resid_post", 1))
    result = token_curves(model, [STORY * 3], direction, alphas, tokens=list(range(40)), recipe="published")
    assert_close(result["p"].values[0, :, :, 0], expected[:, :40])
    whole = token_curves(model, [STORY * 3], direction, alphas, tokens=list(range(40)))
    assert float(abs(whole["p"] - result["p"]).max()) > 1e-3


def test_delta_ce(model: ms.Model, plain: Plain) -> None:
    layer, window = model.n_layers // 2, 128 if model.n_ctx > 128 else 24
    vector = plain.vectors(texts_for(model, GLAD), texts_for(model, SAD), max_tokens=model.n_ctx)[layer]
    documents = [STORY * 3, "Too short.", STORY[::-1] * 2, STORY * 2]
    alphas = grid(-100, 100, 8)
    expected = plain.delta_ce(documents, layer, vector, alphas, window=window)
    direction = ms.Direction(vector[None], ms.Site("resid_post", layer))
    result = cross_entropy_curves(model, documents, direction, alphas, window=window, recipe="published")
    assert_close(result["delta_ce"].values[0], expected)
    assert set(result["n_tokens"].values) == {window}
    default = text_windows(model, documents, window=window)
    assert int(default.lengths.min()) < window and bool((default.tokens[:, 0] == model.tokenizer.bos_token_id).all())


def test_grids() -> None:
    for curve, (low, high, steps) in {
        "token probability": (-200, 200, 1024), "cross entropy": (-100, 100, 128), "concept probability": (-40, 40, 41),
        "multiple choice": (-10, 10, 200),
    }.items():  # fmt: skip
        assert published_alphas(curve) == grid(low, high, steps).tolist()
    assert [len(published_alphas(curve)) for curve in ("token probability", "concept probability")] == [1025, 41]


def test_the_plain_implementation_needs_no_mechsteer() -> None:
    text = (Path(__file__).parent / "published_strength.py").read_text()
    assert "import mechsteer" not in text and "from mechsteer" not in text


def test_left_padding_tokenizers_give_the_same(
    tmp_path: Path, zoo_models: Callable[..., ms.Model], zoo_folders: dict[str, Path]
) -> None:
    """The right-padding assumption: a tokenizer that pads on the left changes no number here."""
    folder = tmp_path / "left"
    folder.mkdir()
    for path in zoo_folders["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    left, right = ms.load_model(folder, device="cpu"), zoo_models("llama")
    assert left.tokenizer.padding_side == "left"
    contexts, alphas = ["The cat sat", "When Mary and John went to the store, John"], [-4.0, 4.0]
    curves = []
    for model in (left, right):
        v = concept_vectors(model, Concept("a", ("A cat sat on", "Mary"), ("zebras jump over lazy foxes",)), layers=[1])
        curves.append(token_curves(model, contexts, v, alphas, tokens=list(range(4, 30)), recipe="published"))
    np.testing.assert_array_equal(curves[0]["p"].values, curves[1]["p"].values)
