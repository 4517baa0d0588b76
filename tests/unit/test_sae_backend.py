"""The autoencoder's training, its file format and the measures, against naive twins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

import mechsteer.pocket.sae as pocket_sae
from mechsteer.backends.causal_lm import new_llama, resid_post
from mechsteer.backends.sae import auroc, new_topk_sae, read_sae, reconstruction, sae_loss, save_sae
from mechsteer.errors import MechsteerError
from mechsteer.pocket.sae import SAERecipe, chunk_batches, mean_features, text_activations, train_sae

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
    metadata = {"model_name": "toy", "hook_name": "blocks.1.hook_resid_post"}
    sae = new_topk_sae(d_in=D_IN, d_sae=D_SAE, k=K, seed=0, metadata=metadata)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    scale = 2.5
    for step, batch in zip(range(600), sparse_activations(), strict=False):
        loss, fired = sae_loss(sae, batch * scale, dead=dead, step=step)
        assert fired.shape == dead.shape
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    save_sae(sae, out, scale=scale)
    return out


def test_training_explains_what_is_sparse(trained: Path) -> None:
    sae = read_sae(trained)
    parts = [part for part, _ in zip(sparse_activations(), range(4), strict=False)]
    fit = reconstruction(sae, parts)
    assert fit.variance_explained > 0.8
    assert fit.l0 <= K
    assert fit.tokens == 4 * 256
    # Naive twin: one pass over everything at once.
    x = torch.cat(parts)
    features = sae.encode(x).detach()
    left = (x - sae.decode(features).detach()).square().sum() / (x - x.mean(0)).square().sum()
    assert fit.variance_explained == pytest.approx(1 - float(left), abs=1e-5)
    assert fit.dead == pytest.approx(float((features <= 0).all(0).float().mean()))


def test_saelens_reads_the_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    sae = SAE.load_from_disk(trained)
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D_IN, D_SAE)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_initial_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (new_topk_sae(d_in=D_IN, d_sae=D_SAE, k=K, seed=seed, metadata={}) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state is left alone"
    assert torch.equal(one.W_dec, again.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MechsteerError, match=r"holds no cfg.json and no sae_weights.safetensors: expected a SAELens"):
        read_sae(tmp_path)


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
    sae = read_sae(trained)
    texts = [
        (tokenizer.encode("Tell me a joke."), tokenizer.encode(text)[1:]) for text in ("Cats purr.", "Why not? No.")
    ]
    together = mean_features(sae, model, tokenizer, texts, layer=1)
    for row, (prompt, text) in zip(together, texts, strict=True):
        alone = resid_post(model, 1, input_ids=torch.tensor([[*prompt, *text]]))[0, len(prompt) :]
        torch.testing.assert_close(row, sae.encode(alone).mean(0), atol=1e-5, rtol=1e-4)


TINY = SAERecipe(layer=1, expansion=4, k=3, chunks=3, chunk_steps=4, batch_tokens=64)


@pytest.fixture(scope="module")
def model_folder(model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_stopped_run_ends_in_the_same_weights(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_sae(model_folder, tmp_path / "whole", TINY)
    asked = []

    def stop_once(*args):
        asked.append(args[-1])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return chunk_batches(*args)

    monkeypatch.setattr(pocket_sae, "chunk_batches", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train_sae(model_folder, tmp_path / "stopped", TINY)
    stopped = train_sae(model_folder, tmp_path / "stopped", TINY)
    assert asked == [0, 1, 2, 2], "resumed at the chunk where it stopped"
    names = {path.name for path in stopped.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "training.json"}
    for one, other in zip(read_sae(whole).parameters(), read_sae(stopped).parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_and_finished_runs_are_refused(model_folder: Path, tmp_path: Path) -> None:
    def stop(*args, **options):
        raise KeyboardInterrupt

    train_sae(model_folder, tmp_path / "run", TINY)
    with pytest.raises(MechsteerError, match="holds a finished autoencoder: give another --out"):
        train_sae(model_folder, tmp_path / "run", TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket_sae, "save_sae", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sae(model_folder, tmp_path / "other", TINY)
    with pytest.raises(MechsteerError, match="holds a run of another recipe"):
        train_sae(model_folder, tmp_path / "other", replace(TINY, seed=1))


def test_chunks_mix_many_documents(model, tokenizer) -> None:
    batches = chunk_batches(model, tokenizer, TINY, 0)
    assert batches.shape == (TINY.chunk_steps, TINY.batch_tokens, D_IN)
    assert torch.equal(batches, chunk_batches(model, tokenizer, TINY, 0))
    assert not torch.equal(batches, chunk_batches(model, tokenizer, TINY, 1))
    assert len(batches.flatten(0, 1).unique(dim=0)) > 0.5 * TINY.chunk_steps * TINY.batch_tokens
    in_order = next(text_activations(model, tokenizer, layer=1, seed="0:0"))[: TINY.batch_tokens]
    assert not torch.equal(batches[0], in_order), "shuffled"
