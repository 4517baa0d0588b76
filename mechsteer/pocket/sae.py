"""The pocket model's sparse autoencoder: its training on the middle layer's residual stream, and its measures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.backends.causal_lm import CausalLM, FastTokenizer, load_causal_lm, resid_post
from mechsteer.backends.sae import train_topk_sae
from mechsteer.errors import MechsteerError
from mechsteer.pocket.corpus import TEXT_MIXTURE, sample_batch
from mechsteer.pocket.tokenizer import N_CTX


@dataclass(frozen=True)
class SAERecipe:
    """Everything that decides the trained autoencoder, besides the model."""

    layer: int = 3
    expansion: int = 8
    """Features per dimension of the residual stream."""
    k: int = 32
    tokens: int = 4_000_000
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    seed: int = 0


@torch.inference_mode()
def text_activations(
    model: CausalLM, tokenizer: FastTokenizer, *, layer: int, seed: int | str, rows: int = 32
) -> Iterator[Float[Tensor, "token d_model"]]:
    """Without end: the residual stream after block `layer` on freshly sampled text, one packed batch at a time.

    BOS and padding are left out: BOS has the same outlying activation in every text.
    """
    step = 0
    while True:
        batch = sample_batch(
            tokenizer, seed=f"sae:{seed}", step=step, rows=rows, row_length=N_CTX, mixture=TEXT_MIXTURE
        ).to(model.device)
        activations = resid_post(
            model, layer, input_ids=batch.ids, attention_mask=batch.attention_mask(), position_ids=batch.positions
        )
        yield activations[(batch.document >= 0) & (batch.positions > 0)]
        step += 1


def shuffled(
    parts: Iterator[Float[Tensor, "token d_model"]], *, batch_tokens: int, buffer_tokens: int, seed: int
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Batches drawn at random from a buffer of `buffer_tokens` or more, refilled when half is used."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    for part in parts:
        kept.append(part)
        if sum(map(len, kept)) < buffer_tokens:
            continue
        buffer = torch.cat(kept)
        buffer = buffer[torch.randperm(len(buffer), generator=generator)]
        while len(buffer) - batch_tokens > buffer_tokens // 2:
            # A copy outside inference mode: training needs ordinary tensors.
            yield buffer[:batch_tokens].clone()
            buffer = buffer[batch_tokens:]
        kept = [buffer]


def train_sae(model_folder: Path, out: Path, recipe: SAERecipe, *, device: str = "cpu") -> Path:
    """Trains the autoencoder and writes it to `out` in SAELens format.

    Args:
        model_folder: the pocket model, a Hugging Face folder.
        out: receives `cfg.json`, `sae_weights.safetensors` and `training.json`.
        recipe: what to train.
        device: "cpu" or a torch device.

    Raises:
        MechsteerError: `out` holds a finished autoencoder.
    """
    if (out / "cfg.json").exists():
        raise MechsteerError(f"{out} holds a finished autoencoder: give another --out, or delete it to train again")
    model, tokenizer = load_causal_lm(model_folder)
    model.to(device)
    d_model = model.config.hidden_size
    train_topk_sae(
        shuffled(
            text_activations(model, tokenizer, layer=recipe.layer, seed=recipe.seed),
            batch_tokens=recipe.batch_tokens,
            buffer_tokens=16 * recipe.batch_tokens,
            seed=recipe.seed,
        ),
        d_in=d_model,
        d_sae=recipe.expansion * d_model,
        k=recipe.k,
        tokens=recipe.tokens,
        batch_tokens=recipe.batch_tokens,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        metadata={
            "model_name": "pocket",
            "hook_name": f"blocks.{recipe.layer}.hook_resid_post",
            "context_size": N_CTX,
            "prepend_bos": True,
            "weights_processed": False,
        },
        out=out,
        device=device,
    )
    (out / "training.json").write_text(json.dumps({"recipe": asdict(recipe)}, indent=1) + "\n")
    return out


def held_out_activations(
    model: CausalLM, tokenizer: FastTokenizer, *, layer: int, tokens: int
) -> list[Float[Tensor, "token d_model"]]:
    """At least `tokens` activations of text that neither model nor autoencoder was trained on."""
    parts, count = [], 0
    for part in text_activations(model, tokenizer, layer=layer, seed="held out"):
        parts.append(part)
        count += len(part)
        if count >= tokens:
            return parts
    raise AssertionError("text_activations never ends")


@torch.inference_mode()
def mean_features(
    sae, model: CausalLM, tokenizer: FastTokenizer, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, layer: int
) -> Float[Tensor, "text feature"]:
    """Mean activation of every feature over the answer or document part of each text.

    Args:
        texts: (prompt ids, text ids); only the positions of the second count.
    """
    rows = []
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, texts[index])))
    for start in range(0, len(order), 100):
        part = [texts[index] for index in order[start : start + 100]]
        longest = max(len(prompt) + len(text) for prompt, text in part)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[*p, *t, *[pad] * (longest - len(p) - len(t))] for p, t in part])
        # Causal attention: padding on the right does not reach the positions that count.
        features = [
            sae.encode(row[len(p) : len(p) + len(t)]).mean(0)
            for row, (p, t) in zip(resid_post(model, layer, input_ids=ids), part, strict=True)
        ]
        rows += features
    result = torch.empty(len(texts), sae.cfg.d_sae)
    result[torch.tensor(order)] = torch.stack(rows)
    return result

