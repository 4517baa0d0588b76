"""The autoencoder's training, its file format and the measures, against naive twins."""

from itertools import count
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from mechsteer.backends.causal_lm import new_llama
from mechsteer.backends.sae import auroc, load_sae, reconstruction, train_topk_sae
from mechsteer.errors import MechsteerError
from mechsteer.pocket.sae import mean_features, shuffled, text_activations

D_IN, D_SAE, K = 16, 64, 3


def sparse_activations(batch: int = 256):
    """Sums of three of 32 fixed directions: what a small autoencoder can learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, D_IN, generator=generator), dim=-1)
    while True:
        codes = torch.zeros(batch, 32).scatter_(
            1, torch.rand(batch, 32, generator=generator).topk(3).indices, 1 + torch.rand(batch, 3, generator=generator)
        )
        yield codes @ directions


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sae") / "tiny"
    train_topk_sae(
        sparse_activations(), d_in=D_IN, d_sae=D_SAE, k=K, tokens=256 * 600, batch_tokens=256, learning_rate=3e-3,
        seed=0, metadata={"model_name": "toy", "hook_name": "blocks.1.hook_resid_post"}, out=out,
    )  # fmt: skip
    return out


def test_training_explains_what_is_sparse(trained: Path) -> None:
    sae = load_sae(trained)
    parts = [part for part, _ in zip(sparse_activations(), range(4), strict=False)]
    fit = reconstruction(sae, parts)
    assert fit.variance_explained > 0.8
    assert fit.l0 <= K
    assert fit.tokens == 4 * 256
    # Naive twin: one pass over everything at once.
    x = torch.cat(parts)
    features = sae.encode(x)
    left = (x - sae.decode(features)).square().sum() / (x - x.mean(0)).square().sum()
    assert fit.variance_explained == pytest.approx(1 - float(left), abs=1e-5)
    assert fit.dead == pytest.approx(float((features <= 0).all(0).float().mean()))


def test_saelens_reads_the_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    sae = SAE.load_from_disk(trained)
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D_IN, D_SAE)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train_topk_sae(
        sparse_activations(64), d_in=D_IN, d_sae=D_SAE, k=K, tokens=640, batch_tokens=64, learning_rate=1e-3, seed=0,
        metadata={}, out=tmp_path / "sae",
    )  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MechsteerError, match=r"holds no cfg.json and no sae_weights.safetensors: expected a SAELens"):
        load_sae(tmp_path)


def naive_auroc(scores: Tensor, positive: Tensor) -> float:
    pairs = [(a, b) for a in scores[positive > 0] for b in scores[positive == 0]]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 5, (40, 7), generator=generator).float()  # many ties
    positive = (torch.rand(40, generator=generator) < 0.3).float()
    expected = [naive_auroc(scores[:, feature], positive) for feature in range(7)]
    assert auroc(scores, positive).tolist() == pytest.approx(expected)
    assert auroc(positive[:, None], positive).item() == 1.0
    assert auroc(torch.zeros(40, 1), positive).item() == 0.5


def test_shuffled_batches_mix_and_lose_nothing_twice() -> None:
    parts = (torch.arange(100 * i, 100 * (i + 1)).float()[:, None] for i in count())
    batches = [batch for batch, _ in zip(shuffled(parts, batch_tokens=32, buffer_tokens=256, seed=0), range(40),
                                         strict=False)]  # fmt: skip
    seen = torch.cat(batches).flatten()
    assert all(batch.shape == (32, 1) for batch in batches)
    assert len(seen.unique()) == len(seen), "no activation twice"
    assert batches[0].max() - batches[0].min() > 150, "one batch mixes several parts"


@pytest.fixture(scope="module")
def model(tokenizer):
    return new_llama(
        tokenizer, seed=0, vocab_size=len(tokenizer), hidden_size=D_IN, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, initializer_range=0.3,
    ).eval()  # fmt: skip


def test_activations_are_the_hooked_models_resid_post(model, tokenizer, tmp_path: Path) -> None:
    from mechsteer.model import load_model

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hooked = load_model(tmp_path).hooked
    ids = torch.tensor([tokenizer.encode("The cats purr beside the kittens.")])
    from mechsteer.backends.causal_lm import resid_post

    for layer in range(3):
        _, cache = hooked.run_with_cache(ids)
        expected = cache[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(resid_post(model, layer, input_ids=ids), expected, atol=1e-4, rtol=1e-4)


def test_text_activations_leave_out_bos_and_padding(model, tokenizer) -> None:
    from mechsteer.pocket.corpus import TEXT_MIXTURE, sample_batch
    from mechsteer.pocket.tokenizer import N_CTX

    part = next(text_activations(model, tokenizer, layer=1, seed=0, rows=2))
    batch = sample_batch(tokenizer, seed="sae:0", step=0, rows=2, row_length=N_CTX, mixture=TEXT_MIXTURE)
    real = (batch.document >= 0) & (batch.ids != tokenizer.bos_token_id)
    assert part.shape == (int(real.sum()), D_IN)


def test_mean_features_are_those_of_each_text_alone(model, tokenizer, trained: Path) -> None:
    from mechsteer.backends.causal_lm import resid_post

    sae = load_sae(trained)
    texts = [(tokenizer.encode("Tell me a joke."), tokenizer.encode(text)) for text in ("Cats purr.", "Why not? No.")]
    together = mean_features(sae, model, tokenizer, texts, layer=1)
    for row, (prompt, text) in zip(together, texts, strict=True):
        alone = resid_post(model, 1, input_ids=torch.tensor([[*prompt, *text]]))[0, len(prompt) :]
        torch.testing.assert_close(row, sae.encode(alone).mean(0), atol=1e-5, rtol=1e-4)
