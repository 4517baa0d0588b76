"""The models that ship: they load everywhere, do what their cards say, and are what the recipe makes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechsteer as ms
from mechsteer.backends.sae import read_sae, reconstruction
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError
from mechsteer.pocket.card import model_card, sae_card
from mechsteer.pocket.check import PARTS, PocketCheck, Row, last_logits
from mechsteer.pocket.corpus import chat_ids, encode_texts
from mechsteer.pocket.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("pocket", "pocket-1l")
BACKENDS = ("hooked_transformer", "bridge")


@pytest.fixture(scope="module")
def check() -> PocketCheck:
    return PocketCheck(data_path("models", "pocket"), sae_folder=data_path("saes", "pocket"), count=120)


def card_rows() -> list[Row]:
    rows = json.loads((data_path("models", "pocket") / "check.json").read_text())
    return [Row(**{key: value for key, value in row.items() if key != "passed"}) for row in rows]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers(name: str, backend: str) -> None:
    model = ms.load_model(name, backend=backend, device="cpu")
    folder = data_path("models", name)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    texts = ["The kittens purr beside the whiskers.", "When Mary and John went to the store, John gave a drink to"]
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(model.hooked(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_both_backends_have_the_same_activations_under_the_same_names() -> None:
    models = [ms.load_model("pocket", backend=backend, device="cpu") for backend in BACKENDS]
    ids = models[0].tokenizer("Talk only about cats.", return_tensors="pt").input_ids
    caches = [model.hooked.run_with_cache(ids)[1] for model in models]
    for name in ("hook_embed", "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post", "blocks.5.attn.hook_pattern",
                 "blocks.2.attn.hook_z", "blocks.4.hook_mlp_out"):  # fmt: skip
        torch.testing.assert_close(caches[0][name], caches[1][name], atol=1e-4, rtol=1e-4)


def test_shapes_and_sizes() -> None:
    model = ms.load_model("pocket", device="cpu")
    assert model.n_layers >= 6
    assert ms.load_model("pocket-1l", device="cpu").n_layers == 1
    n_params = AutoModelForCausalLM.from_pretrained(data_path("models", "pocket")).num_parameters()
    assert 2e6 <= n_params <= 6e6
    assert sum(file.stat().st_size for file in data_path("models", "pocket").iterdir()) <= 20e6
    assert all(file.stat().st_size < 25e6 for file in data_path().rglob("*"))


def model_of(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def setup_of(tokenizer: Any) -> Any:
    every = json.loads(tokenizer.backend_tokenizer.to_str())
    return {part: every[part] for part in ("pre_tokenizer", "decoder", "post_processor", "added_tokens")}


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_grammar_gives() -> None:
    trained = train_tokenizer()
    for name in SHIPPED:
        shipped = AutoTokenizer.from_pretrained(data_path("models", name))
        assert shipped.get_vocab() == trained.get_vocab()
        assert model_of(shipped) == model_of(trained)
        text = "Felines and kittens PURR."
        assert shipped.encode(text) == trained.encode(text)


def test_the_shipped_tokenizer_is_set_up_as_a_trained_one_and_knows_what_it_knows() -> None:
    trained = train_tokenizer(documents=1000)
    learnt = {token for token in trained.get_vocab() if token[:1] == "Ġ"}
    assert len(learnt) > 500
    for name in SHIPPED:
        shipped = AutoTokenizer.from_pretrained(data_path("models", name))
        assert shipped.chat_template == trained.chat_template
        assert shipped.special_tokens_map == trained.special_tokens_map
        assert (shipped.model_max_length, shipped.padding_side) == (trained.model_max_length, trained.padding_side)
        ours, theirs = setup_of(shipped), setup_of(trained)
        assert ours == theirs
        # The grammar's words: what little text teaches is in what much text taught, but for chance at the rim.
        assert len(learnt & set(shipped.get_vocab())) > 0.8 * len(learnt)


# Few prompts a row here: a bar that a sample of 120 misses by chance would be a flaky test, and the samples are seeded.
@pytest.mark.parametrize(
    "part", ["topics", "uninstructed", "swapped", "refusals", "moods", "indirect_object", "induction",
             "generalisation", "sae"],
)  # fmt: skip
def test_behaviour(check: PocketCheck, part: str) -> None:
    found = check.sae(check.autoencoder) if part == "sae" else getattr(check, part)()
    for row in found if isinstance(found, list) else [found]:
        assert row.passed, row


@pytest.mark.slow
def test_the_whole_table() -> None:
    parts: list[str] = []
    check = PocketCheck(data_path("models", "pocket"), sae_folder=data_path("saes", "pocket"), progress=parts.append)
    rows = check.rows()
    assert len(parts) == PARTS
    assert all(row.passed for row in rows)
    for row, written in zip(rows, card_rows(), strict=True):
        assert row.measured == pytest.approx(written.measured, abs=0.02, rel=0.05), row.behaviour


def test_cards_show_the_measured_figures() -> None:
    rows = card_rows()
    assert all(row.passed for row in rows)
    assert all(row.count >= 500 for row in rows if "SAE" not in row.behaviour)
    own = [row for row in rows if not row.behaviour.startswith("SAE")]
    folder, sae_folder = data_path("models", "pocket"), data_path("saes", "pocket")
    assert (folder / "README.md").read_text() == model_card(folder, own)
    assert (sae_folder / "README.md").read_text() == sae_card(sae_folder, [row for row in rows if row not in own])
    one_layer = data_path("models", "pocket-1l")
    assert (one_layer / "README.md").read_text() == model_card(one_layer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_autoencoder_fits_the_hooked_models_activations(check: PocketCheck, backend: str) -> None:
    model = ms.load_model("pocket", backend=backend, device="cpu")
    sae = read_sae(data_path("saes", "pocket"))
    assert sae.cfg.d_sae >= 8 * model.d_model
    texts = ["Tell me a short story about my exam.", "Talk only about trains.\nWrite a letter about my holiday."]
    parts = []
    for text in texts:
        ids = torch.tensor([chat_ids(model.tokenizer, text)])
        _, cache = model.hooked.run_with_cache(ids, names_filter=sae.cfg.metadata.hook_name)
        parts.append(cache[sae.cfg.metadata.hook_name][0, 1:])
    assert reconstruction(sae, parts).variance_explained > 0.8


def test_no_shipped_file_is_a_pickle() -> None:
    allowed = {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".txt"}
    assert {path.suffix for path in data_path().rglob("*") if path.is_file()} <= allowed


def test_padding_set_by_somebody_else_does_not_reach_the_ids(tokenizer) -> None:
    tokenizer(["a", "a longer text"], padding=True)
    assert encode_texts(tokenizer, ["a", "a longer text"])[0] == tokenizer("a", add_special_tokens=False).input_ids


def test_last_logits_of_a_padded_batch_are_those_of_each_prompt(check: PocketCheck) -> None:
    prompts = [check.tokenizer.encode(text) for text in ("The kittens", "When Mary and John went to the park, John")]
    together = last_logits(check.model, prompts, pad=check.tokenizer.pad_token_id)
    for row, prompt in zip(together, prompts, strict=True):
        with torch.no_grad():
            alone = check.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(MechsteerError, match="check got count=11: at least 12 prompts a row are needed"):
        PocketCheck(data_path("models", "pocket"), sae_folder=None, count=11)
