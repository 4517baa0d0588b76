"""Directions: their algebra, their files, and the ways to make them against naive loops over texts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import load_file, save_file

from mechsteer.activations import ModelId
from mechsteer.directions import Direction, cosine_table
from mechsteer.directions.extraction import difference_of_means, from_unembedding, pca
from mechsteer.directions.gguf import export_gguf, import_gguf
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model
from mechsteer.prompts import Prompts
from mechsteer.site import Site

SITE = Site("resid_post", 1)
ID = ModelId("tiny", "ab12", False)
POSITIVE = ["The cat sat on the mat", "A feline purrs", "cat", "The dog ran to the other cat and sat on the mat"]
NEGATIVE = ["John gave a drink to Mary", "Quick zebras jump", "What should I cook for dinner? Give me three ideas!"]


def direction(*rows: Any, site: Site = SITE, model: ModelId | None = ID) -> Direction:
    return Direction(torch.tensor(rows, dtype=torch.float32), site, model, {"method": "test"})


def noise(k: int, d: int = zoo.D_MODEL, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama(zoo_folders: dict[str, Path]) -> Model:
    return load_model(zoo_folders["llama"], device="cpu")


# --- the noun

vectors = npst.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32))


@given(vectors, vectors, st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
def test_algebra_is_that_of_vectors(a: np.ndarray, b: np.ndarray, factor: float) -> None:
    u, v = Direction(torch.tensor(a), SITE, ID), Direction(torch.tensor(b), SITE)
    torch.testing.assert_close((u + v).vector, u.vector + v.vector)
    torch.testing.assert_close((factor * u - v).vector, u.vector * factor - v.vector, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((-u).vector, -u.vector)
    torch.testing.assert_close((u / 2).vector, u.vector / 2)
    assert (u + v).model == (v + u).model == ID and (u + v).site == SITE
    assert u.norm == pytest.approx(float(np.linalg.norm(a.astype(np.float64))), rel=1e-5)
    assert torch.equal(u.vector, torch.tensor(a)), "operations changed their operand"
    if u.norm > 1e-3:
        assert u.unit.norm == pytest.approx(1.0, abs=1e-6)
        torch.testing.assert_close(u.unit.vector * u.norm, u.vector, rtol=1e-5, atol=1e-5)


def test_history_is_kept() -> None:
    made = (direction([1.0, 2.0]) * 2.0 - direction([0.0, 1.0])).unit
    first, second = made.origin["of"]["of"]
    assert made.origin["method"] == "unit" and first["factor"] == 2.0 and first["of"] == {"method": "test"}
    assert second["factor"] == -1.0
    assert made.model == ID


@pytest.mark.parametrize(
    ("vectors", "site", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            SITE,
            r"Direction got torch.float32 \[2, 3, 4\], but holds floating-point vectors \[k, d\]",
        ),
        (torch.ones(3, dtype=torch.int64), SITE, r"Direction got torch.int64 \[3\], but holds floating-point vectors"),
        (torch.ones(0, 3), SITE, r"Direction got torch.float32 \[0, 3\], but holds"),
        (torch.tensor([1.0, torch.nan, torch.inf]), SITE, r"resid_post has 2 numbers that are NaN or infinite"),
        (torch.ones(3), SITE.at(pos=2), r"Direction got Site\('resid_post', 1, pos=2\), but needs a whole hook point"),
        (torch.ones(3), Site("pattern", 1), r"Direction got Site\('pattern', 1\), but needs a whole hook point"),
    ],
)
def test_what_is_no_direction(vectors: torch.Tensor, site: Site, message: str) -> None:
    # Without the type checks of these tests, which refuse integers first.
    make: Any = Direction.__init__
    with pytest.raises(MechsteerError, match=message):
        make.__wrapped__(object.__new__(Direction), vectors, site)


def test_origin_is_json() -> None:
    with pytest.raises(MechsteerError, match=r"A Direction's origin must hold numbers, text, .* and 'x' does not"):
        Direction(torch.ones(3), SITE, None, {"x": object()})


def test_one_vector_where_one_is_needed() -> None:
    two = direction([1.0, 0.0], [0.0, 2.0])
    for use in (lambda: two.vector, lambda: two.norm, lambda: two.unit, lambda: two + two):
        with pytest.raises(
            MechsteerError, match=r"hook_resid_post holds 2 vectors, and one was expected\. Use \.vectors"
        ):
            use()
    assert two[1].norm == 2.0 and [each.norm for each in two] == [1.0, 2.0]
    with pytest.raises(MechsteerError, match=r"hook_resid_post is zero, so it has no unit vector"):
        direction([0.0, 0.0]).unit  # noqa: B018


def test_directions_that_do_not_combine() -> None:
    one = direction([1.0, 0.0])
    with pytest.raises(MechsteerError, match=r"Directions at blocks\.1\.hook_resid_post and hook_embed do not combine"):
        one + direction([1.0, 0.0], site=Site("embed"))
    with pytest.raises(MechsteerError, match=r"Directions of width 2 and 3 do not combine\. Make them from the same"):
        one - direction([1.0, 0.0, 0.0])
    with pytest.raises(MechsteerError, match=r"of tiny \(weights ab12\) and big \(weights cd34\) do not combine"):
        one + direction([1.0, 0.0], model=ModelId("big", "cd34", False))
    with pytest.raises(MechsteerError, match=r"Direction\.stack got an empty list"):
        Direction.stack([])


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_orthonormal_basis_of_the_same_subspace(k: int, seed: int) -> None:
    rows = noise(k, 7, seed) * 10.0 ** torch.arange(-3, k - 3)[:, None]
    basis = Direction(rows, SITE).orthonormal().vectors
    torch.testing.assert_close(basis @ basis.T, torch.eye(k), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows @ basis.T @ basis, rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis[0], rows[0] / rows[0].norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0], [0, 1], [1, 1]]])
def test_dependent_vectors_have_no_orthonormal_basis(rows: list) -> None:
    rank = np.linalg.matrix_rank(rows)
    with pytest.raises(MechsteerError, match=rf"holds {len(rows)} vectors that span only {rank} dimensions"):
        direction(*rows).orthonormal()


def test_stack_and_cosines() -> None:
    a, b = direction([3.0, 4.0]), direction([0.0, -2.0])
    both = Direction.stack([a, b])
    assert torch.equal(both.vectors, torch.tensor([[3.0, 4.0], [0.0, -2.0]])) and len(both.origin["of"]) == 2
    table = cosine_table({"a": a, "b": b})
    assert table["cosine"].dims == ("direction", "other")
    np.testing.assert_allclose(table["cosine"].values, [[1.0, -0.8], [-0.8, 1.0]], atol=1e-6)
    assert float(table.sel(direction="a", other="b")["cosine"]) == pytest.approx(-0.8)
    layers = cosine_table([a, direction([1.0, 0.0], site=Site("resid_post", 2))])
    assert list(layers["other"].values) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    with pytest.raises(MechsteerError, match="cosine_table got no directions"):
        cosine_table({})


def test_repr() -> None:
    assert repr(direction([3.0, 4.0])) == "Direction(Site('resid_post', 1), d=2, norm=5, model='tiny', method='test')"
    assert repr(Direction(torch.eye(2), SITE)) == "Direction(Site('resid_post', 1), d=2, k=2)"


# --- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("site", [SITE, Site("z", 2, head=3), Site("embed")])
def test_files_return_the_same(dtype: torch.dtype, site: Site, tmp_path: Path) -> None:
    before = Direction(noise(2).to(dtype), site, ID, {"texts": ["<b>", "\ud800"], "norm": 0.1})
    before.save(tmp_path / "d.safetensors")
    after = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(after.vectors, before.vectors) and after.vectors.dtype == dtype
    assert (after.site, after.model, after.origin) == (site, ID, before.origin)
    assert torch.equal(load_file(tmp_path / "d.safetensors")["vectors"], before.vectors)


def test_files_of_another_model_are_refused(llama: Model, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    Direction(noise(1), SITE, llama.id).save(path)
    assert Direction.load(path, llama).model == llama.id
    for change, message in (
        (
            {"hash": "cd34"},
            r"d\.safetensors was made with llama \(weights cd34\), and this is llama \(weights \w{12}\)",
        ),
        (
            {"hash": "cd34", "processed": True},
            r"was made with folded or centred weights of llama, and llama here has unp",
        ),
    ):
        Direction(noise(1), SITE, llama.id._replace(**change)).save(path)
        with pytest.raises(MechsteerError, match=message):
            Direction.load(path, llama)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": "mechsteer.result", "version": 1}, "has format 'mechsteer.result', expected 'mechsteer.direction'"),
        (
            {"format": "mechsteer.direction", "version": 9},
            "has version 9 of format 'mechsteer.direction', and this mech",
        ),
        ({"format": "mechsteer.direction", "version": 1}, "is damaged or was copied only in part"),
        (
            {"format": "mechsteer.direction", "version": 1, "site": "nowhere", "model": None, "origin": {}},
            "no site that",
        ),
    ],
)
def test_other_files_are_refused(about: dict, message: str, tmp_path: Path) -> None:
    save_file({"vectors": torch.ones(1, 2)}, tmp_path / "d.safetensors", {"mechsteer": json.dumps(about)})
    with pytest.raises(MechsteerError, match=message):
        Direction.load(tmp_path / "d.safetensors")


# --- with a model


def test_what_does_not_fit(llama: Model) -> None:
    with pytest.raises(MechsteerError, match=r"Direction got d_model=5, but Site\('resid_post', 1\) of llama has 32"):
        Direction(torch.ones(5), SITE).check_fits(llama)
    with pytest.raises(MechsteerError, match=r"Site\('resid_post', 3\) does not exist: llama has layers 0 to 2"):
        Direction(torch.ones(32), Site("resid_post", 3)).check_fits(llama)
    with pytest.raises(MechsteerError, match=r"Direction was made with tiny \(weights ab12\), and this is llama"):
        Direction(torch.ones(32), SITE, ID).check_fits(llama)
    Direction(torch.ones(16), Site("z", 0, head=3)).check_fits(llama)


def test_tokens_of_the_unembedding(llama: Model) -> None:
    token = llama.tokenizer.encode("cat", add_special_tokens=False)
    assert len(token) == 1
    made = from_unembedding(llama, "cat")
    assert made.site == Site("resid_post", 2) and made.model == llama.id
    assert torch.equal(made.vector, llama.hooked.W_U[:, token[0]])
    minus = from_unembedding(llama, token[0], minus=7, site=SITE)
    torch.testing.assert_close(minus.vector, llama.hooked.W_U[:, token[0]] - llama.hooked.W_U[:, 7])
    assert (minus.site, minus.origin["id"], minus.origin["minus_id"]) == (SITE, token[0], 7)
    found = made.nearest_tokens(llama, k=3)
    assert found[0] == (" cat", pytest.approx(1.0, abs=1e-5))
    matrix = llama.hooked.W_U.detach()
    cosines = torch.cosine_similarity(matrix.T, made.vector[None], dim=1).sort(descending=True).values
    assert [value for _, value in found] == pytest.approx(cosines[:3].tolist(), abs=1e-5)
    assert len(made.nearest_tokens(llama, k=1000)) == len(llama.tokenizer)


def test_tokens_that_are_none(llama: Model) -> None:
    with pytest.raises(
        MechsteerError, match=r"'cat purrs' is \d tokens of llama \(.*\)\. Pass a text that is one token"
    ):
        from_unembedding(llama, "cat purrs")
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [3], unk_token_id=3, unk_token="<unk>")
    with pytest.raises(MechsteerError, match=r"'é' is unknown to the tokenizer of tiny\. Pass another text, or an id"):
        from_unembedding(Model(llama.hooked, tokenizer=tokenizer, name="tiny"), "é")
    with pytest.raises(MechsteerError, match=r"Token id 128 does not exist: llama has ids 0 to 127"):
        from_unembedding(llama, 4, minus=128)
    with pytest.raises(MechsteerError, match=r"nearest_tokens needs a Direction in the residual stream, and this is"):
        Direction(torch.ones(16), Site("z", 0, head=1)).nearest_tokens(llama)


# --- from texts


def naive_means(model: Model, texts: list[str], name: str, tokens: str = "all", limit: int = 300) -> torch.Tensor:
    """Mean over texts of each text's mean, one text at a time, without batches, padding or truncation."""
    rows = []
    for text in texts:
        ids = Prompts.from_strings(text, model.tokenizer).tokens[:, :limit]
        with torch.no_grad():
            value = model.hooked.run_with_cache(ids)[1][name][0].double()
        rows.append(value[-1] if tokens == "last" else value.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
def test_difference_of_means_is_the_naive_one(name: str, backend: str, zoo_folders: dict[str, Path]) -> None:
    model = load_model(zoo_folders[name], backend=backend, device="cpu")
    made = difference_of_means(model, POSITIVE, NEGATIVE, batch_tokens=40, progress=False)
    assert list(made) == [Site("resid_post", layer) for layer in range(zoo.N_LAYERS)]
    for site, each in made.items():
        expected = naive_means(model, POSITIVE, str(site)).mean(0) - naive_means(model, NEGATIVE, str(site)).mean(0)
        torch.testing.assert_close(each.vector.double(), expected, atol=1e-4, rtol=0)
        assert expected.norm() > 1.0 and each.site == site and each.model == model.id


def test_difference_of_means_is_that_of_transformers(zoo_folders: dict[str, Path]) -> None:
    """The published recipe on transformers' own model: hidden states after block 1, cut at 6 tokens, BOS counted."""
    from transformers import AutoModelForCausalLM

    folder = zoo_folders["llama"]
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), zoo.reference_tokenizer(folder)
    means = []
    for texts in (POSITIVE, NEGATIVE):
        tokenizer.padding_side = "left"
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=6)
        assert (batch.input_ids == tokenizer.bos_token_id).sum() == len(texts)
        with torch.no_grad():
            states = hf(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states[
                2
            ]
        real = batch.attention_mask[..., None]
        means.append(((states * real).sum(1) / real.sum(1)).mean(0))
    made = difference_of_means(load_model(folder), POSITIVE, NEGATIVE, sites=SITE, max_tokens=6, progress=False)
    torch.testing.assert_close(made[SITE].vector.cpu(), means[0] - means[1], atol=1e-4, rtol=0)


def test_origin_says_what_went_in(llama: Model) -> None:
    made = difference_of_means(llama, POSITIVE, NEGATIVE, sites=["resid_post", "embed"], progress=False)
    origin = made[SITE].origin
    assert origin["method"] == "difference_of_means" and origin["tokens"] == "all"
    prompts = Prompts.from_strings(NEGATIVE, llama.tokenizer)
    assert origin["negatives"]["texts"] == 3 and origin["negatives"]["tokens"] == int(prompts.lengths.sum())
    assert origin["negatives"]["prompts"] == prompts.hash
    expected = naive_means(llama, NEGATIVE, str(SITE)).mean(0).norm()
    assert origin["negatives"]["norm"] == pytest.approx(float(expected), rel=1e-4)
    assert Site("embed") in made and len(made) == 4


def test_origin_counts_texts_that_were_cut(llama: Model) -> None:
    lengths = Prompts.from_strings(POSITIVE, llama.tokenizer).lengths
    limit = int(lengths.sort().values[-2])  # the longest alone is cut
    for make in (difference_of_means, pca):

        def made(*groups: Any, tokens: str = "last", make: Any = make, **options: Any) -> dict[str, Any]:
            return make(llama, *groups, sites=SITE, tokens=tokens, progress=False, **options)[SITE].origin

        cut = made(POSITIVE, [*NEGATIVE, "cat"], max_tokens=limit)
        shorter = Prompts.from_strings([*NEGATIVE, "cat"], llama.tokenizer).lengths > limit
        assert cut["positives"]["cut"] == 1 and cut["negatives"]["cut"] == int(shorter.sum())
        assert made(POSITIVE, POSITIVE[::-1], max_tokens=limit - 1, tokens="all")["negatives"]["cut"] >= 2
        whole = made(POSITIVE, [*NEGATIVE, "cat"])
        assert whole["positives"]["cut"] == whole["negatives"]["cut"] == 0
        # The context's end cuts, too; what is passed as Prompts is never cut, and says nothing of it.
        assert made(["cat " * 100, *POSITIVE[1:]], [*NEGATIVE, "cat"])["positives"]["cut"] == 1
        assert "cut" not in made(Prompts.from_strings(POSITIVE, llama.tokenizer), [*NEGATIVE, "cat"])["positives"]


def test_laws_of_the_difference(llama: Model) -> None:
    def made(*groups: Any, **options: Any) -> torch.Tensor:
        return difference_of_means(llama, *groups, sites=SITE, progress=False, **options)[SITE].vector

    forth = made(POSITIVE, NEGATIVE)
    torch.testing.assert_close(made(NEGATIVE, POSITIVE), -forth)
    torch.testing.assert_close(made(POSITIVE, NEGATIVE, batch_tokens=1), forth, atol=1e-5, rtol=0)
    torch.testing.assert_close(made(POSITIVE, NEGATIVE, normalise=True), forth / forth.norm(), atol=1e-6, rtol=0)
    assert made(POSITIVE, POSITIVE[::-1]).norm() < 1e-4
    left, right = (Prompts.from_strings(POSITIVE, llama.tokenizer, padding=side) for side in ("left", "right"))
    torch.testing.assert_close(made(left, NEGATIVE), made(right, NEGATIVE), atol=1e-5, rtol=0)
    masks = left.mask & (left.positions > 0), Prompts.from_strings(NEGATIVE, llama.tokenizer).span("user")
    torch.testing.assert_close(
        made(left, Prompts.from_strings(NEGATIVE, llama.tokenizer), tokens=masks),
        made(POSITIVE, NEGATIVE, tokens="user"),
        atol=1e-5,
        rtol=0,
    )


def test_tokens_choose_what_counts(llama: Model) -> None:
    last = difference_of_means(llama, POSITIVE, NEGATIVE, tokens="last", progress=False)[SITE]
    expected = [naive_means(llama, texts, str(SITE), "last").mean(0) for texts in (POSITIVE, NEGATIVE)]
    torch.testing.assert_close(last.vector.double(), expected[0] - expected[1], atol=1e-4, rtol=0)
    # The decision is made before the completion, which does not change it.
    long = Prompts.from_strings(POSITIVE, llama.tokenizer, completions=["and the dog"] * 4)
    again = difference_of_means(llama, long, NEGATIVE, tokens="last", progress=False)[SITE]
    torch.testing.assert_close(again.vector, last.vector, atol=1e-4, rtol=0)
    # Token ids are run as they are.
    ids = Prompts.from_strings(POSITIVE[:1], llama.tokenizer).tokens
    made = difference_of_means(llama, POSITIVE[:1], NEGATIVE[:1], tokens="last", progress=False)[SITE]
    same = difference_of_means(llama, ids, NEGATIVE[:1], tokens="last", progress=False)[SITE]
    torch.testing.assert_close(same.vector, made.vector, atol=1e-5, rtol=0)
    spoken = difference_of_means(llama, long, long[[0]], tokens="completion", progress=False)[SITE]
    assert spoken.origin["positives"]["tokens"] == int(long.span("completion").sum())


def test_one_head(llama: Model) -> None:
    site = Site("z", 1, head=2)
    made = difference_of_means(llama, POSITIVE, NEGATIVE, sites=[site, Site("v", 0, head=1)], progress=False)
    means = []
    for texts in (POSITIVE, NEGATIVE):
        rows = [llama.hooked.run_with_cache(Prompts.from_strings(text, llama.tokenizer).tokens)[1] for text in texts]
        means.append(torch.stack([row["blocks.1.attn.hook_z"][0, :, 2].mean(0) for row in rows]).mean(0))
    torch.testing.assert_close(made[site].vector, (means[0] - means[1]).detach(), atol=1e-5, rtol=0)
    assert [len(each.vector) for each in made.values()] == [zoo.D_HEAD, zoo.D_HEAD]


def test_what_gives_no_difference(llama: Model) -> None:
    def make(positives: Any, negatives: Any = NEGATIVE, **options: Any) -> None:
        difference_of_means(llama, positives, negatives, progress=False, **options)

    with pytest.raises(MechsteerError, match=r"positives got \[\]\. Pass a list of texts, Prompts, or ids"):
        make([])
    with pytest.raises(MechsteerError, match=r"negatives got 'one text'\. Pass a list of texts, Prompts, or ids"):
        make(POSITIVE, "one text")
    with pytest.raises(MechsteerError, match=r"Text 0 of the positives has no token that tokens='completion' means"):
        make(POSITIVE, tokens="completion")
    with pytest.raises(MechsteerError, match=r"span\('end'\) does not exist"):
        make(POSITIVE, tokens="end")
    prompts = Prompts.from_strings(POSITIVE, llama.tokenizer)
    with pytest.raises(MechsteerError, match=r"tokens got 1 masks\. Pass one for each of positives and negatives"):
        make(prompts, prompts, tokens=(prompts.mask,))
    with pytest.raises(MechsteerError, match=r"tokens got a mask of shape \[4, 2\] for positives of shape \[4, \d+\]"):
        make(prompts, prompts, tokens=(prompts.mask[:, :2], prompts.mask))
    with pytest.raises(
        MechsteerError, match=r"Site\('z', 1\) holds no vector for each token\. Choose one head of q, k, v"
    ):
        make(POSITIVE, sites=("z", 1))
    with pytest.raises(MechsteerError, match=r"Site\('pattern', 1, head=0\) holds no vector for each token"):
        make(POSITIVE, sites=Site("pattern", 1, head=0))


# --- principal components


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("paired", [True, False])
def test_pca_is_numpys_svd(llama: Model, centre: bool, paired: bool) -> None:
    negatives = [*NEGATIVE, "Mary went to the store"] if paired else None
    made = pca(llama, POSITIVE, negatives, k=2, centre=centre, batch_tokens=30, progress=False)[SITE]
    positive = naive_means(llama, POSITIVE, str(SITE), "last")
    rows = positive - naive_means(llama, negatives, str(SITE), "last") if negatives else positive
    centred = rows - rows.mean(0) if centre else rows
    _, singular, components = np.linalg.svd(centred.numpy(), full_matrices=False)
    for found, expected in zip(made.vectors.double().numpy(), components[:2], strict=True):
        assert abs(found @ expected) == pytest.approx(1.0, abs=1e-4)
        if paired:
            assert found @ rows.mean(0).numpy() > 0
        else:
            assert found[np.abs(found).argmax()] > 0
    np.testing.assert_allclose(made.origin["explained"], singular[:2] ** 2 / (singular**2).sum(), rtol=1e-3)
    torch.testing.assert_close(made.vectors @ made.vectors.T, torch.eye(2), atol=1e-5, rtol=0)


def test_pca_refuses(llama: Model) -> None:
    with pytest.raises(MechsteerError, match=r"pca got 4 positives and 3 negatives, but takes pairs"):
        pca(llama, POSITIVE, NEGATIVE, progress=False)
    for k in (4, 0):
        with pytest.raises(
            MechsteerError, match=rf"pca got k={k}, but the 4 rows at .* less their mean span 3 dimensi"
        ):
            pca(llama, POSITIVE, k=k, sites=SITE, progress=False)


# --- GGUF


def control(layers: tuple[int, ...] = (1, 2), model: ModelId | None = ID) -> list[Direction]:
    return [Direction(noise(1, seed=layer), Site("resid_post", layer), model, {"of": layer}) for layer in layers]


def test_control_vectors_return(llama: Model, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    given = {each.site: each for each in control(model=llama.id)}
    export_gguf(given, path, model_hint="llama")
    back = import_gguf(path, model=llama)
    assert list(back) == list(given)
    for site, each in back.items():
        assert torch.equal(each.vectors, given[site].vectors)
        assert (each.site, each.model, each.origin) == (site, llama.id, given[site].origin)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_control_vectors_as_others_read_them(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    export_gguf(control((2, 1, 5)), path, model_hint="llama")
    assert path.read_bytes()[:8] == b"GGUF" + (3).to_bytes(4, "little")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.2", "direction.5"}
    for tensor in reader.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.ndim == 1
        np.testing.assert_array_equal(tensor.data, noise(1, seed=layer)[0])


def write_gguf(path: Path, tensors: dict[str, np.ndarray], *, architecture: str = "controlvector") -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "mistral")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_control_vectors_of_others(llama: Model, tmp_path: Path) -> None:
    value = noise(1)[0].numpy()
    path = write_gguf(tmp_path / "v.gguf", {"direction.2": value, "direction.1": 2 * value})
    found = import_gguf(path, model=llama)
    assert list(found) == [Site("resid_post", 1), Site("resid_post", 2)]
    np.testing.assert_array_equal(found[Site("resid_post", 1)].vector, 2 * value)
    assert found[SITE].model is None and found[SITE].origin == {"method": "gguf", "model_hint": "mistral"}


def test_what_a_control_vector_cannot_hold(tmp_path: Path) -> None:
    def export(*directions: Direction) -> None:
        export_gguf(directions, tmp_path / "v.gguf", model_hint="llama")

    with pytest.raises(
        MechsteerError, match=r"cannot hold Site\('resid_post', 0\): llama.cpp adds to resid_post of blo"
    ):
        export(*control((0, 1)))
    with pytest.raises(MechsteerError, match=r"cannot hold Site\('resid_pre', 2\)"):
        export(Direction(noise(1), Site("resid_pre", 2)))
    with pytest.raises(MechsteerError, match=r"holds one vector a layer, and Site\('resid_post', 1\) came twice"):
        export(*control((1, 1)))
    with pytest.raises(MechsteerError, match=r"holds vectors of one width, and these have \[4, 32\]"):
        export(*control((1,)), Direction(noise(1, 4), Site("resid_post", 2)))
    with pytest.raises(MechsteerError, match=r"holds vectors of one width, and these have none"):
        export()
    with pytest.raises(MechsteerError, match=r"holds 2 vectors, and one was expected"):
        export(Direction(noise(2), SITE))
    assert not list(tmp_path.iterdir())


def test_gguf_files_that_are_no_control_vectors(llama: Model, tmp_path: Path) -> None:
    value = noise(1)[0].numpy()
    with pytest.raises(MechsteerError, match=r"missing\.gguf is no file\. Pass a GGUF control vector"):
        import_gguf(tmp_path / "missing.gguf")
    with pytest.raises(MechsteerError, match=r"a\.gguf holds 'llama', and a control vector was expected"):
        import_gguf(write_gguf(tmp_path / "a.gguf", {"direction.1": value}, architecture="llama"))
    for name, tensor in (("token_embd", value), ("direction.x", value), ("direction.1", value.astype(np.float16))):
        with pytest.raises(
            MechsteerError, match=rf"b\.gguf holds '{name}' \(F\d+ \[32\]\), and a control vector holds F32"
        ):
            import_gguf(write_gguf(tmp_path / "b.gguf", {name: tensor}))
    with pytest.raises(MechsteerError, match=r"Direction got d_model=4, but Site\('resid_post', 1\) of llama has 32"):
        import_gguf(write_gguf(tmp_path / "c.gguf", {"direction.1": value[:4]}), model=llama)
    with pytest.raises(MechsteerError, match=r"has 1 numbers that are NaN or infinite"):
        import_gguf(write_gguf(tmp_path / "d.gguf", {"direction.1": np.float32([1, np.nan])}))


def test_damaged_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    export_gguf(control(), path, model_hint="llama")
    whole = path.read_bytes()
    # Every length, and every byte of the header set to its largest value: sizes, counts and offsets that lie.
    damaged = [whole[:keep] for keep in range(0, len(whole), 7)]
    damaged += [whole[:at] + b"\xff" + whole[at + 1 :] for at in range(0, 500, 3)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            import_gguf(path)
        except MechsteerError:
            refused += 1
    assert refused > len(range(0, len(whole), 7))


def test_counts_that_lie_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    key, many = b"x", (2**60).to_bytes(8, "little")
    array = (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + many  # an array of 2**60 numbers
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(header + len(key).to_bytes(8, "little") + key + array)
    with pytest.raises(MechsteerError, match=r"v\.gguf is no complete GGUF file \(it ends too early\)"):
        import_gguf(path)


def test_gguf_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        MechsteerError, match=r"GGUF control vectors need the gguf package\. Install it with pip install"
    ):
        export_gguf(control(), tmp_path / "v.gguf", model_hint="llama")
