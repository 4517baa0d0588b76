"""The pocket model's sparse autoencoder: its training on the middle layer's residual stream, and its measures."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from mechsteer.backends.causal_lm import CausalLM, FastTokenizer, load_causal_lm, resid_post
from mechsteer.backends.sae import SAE, new_topk_sae, sae_loss, save_sae
from mechsteer.errors import MechsteerError
from mechsteer.pocket.checkpoint import (
    load_checkpoint,
    load_optimiser_tensors,
    optimiser_tensors,
    remove_checkpoints,
    save_checkpoint,
)
from mechsteer.pocket.corpus import TEXT_MIXTURE, sample_batch
from mechsteer.pocket.tokenizer import N_CTX
from mechsteer.progress import drawn


@dataclass(frozen=True)
class SAERecipe:
    """Everything that decides the trained autoencoder, besides the model."""

    layer: int = 3
    expansion: int = 8
    """Features per dimension of the residual stream."""
    k: int = 32
    chunks: int = 32
    chunk_steps: int = 60
    """Steps whose activations are sampled and shuffled together; a checkpoint follows each chunk."""
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    dead_after: int = 200
    """Steps without a token after which the auxiliary loss tries to revive a feature."""
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.chunks * self.chunk_steps

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    def schedule(self, step: int) -> float:
        """Learning rate at `step` over the largest: linear warm-up, constant, linear fall to zero over a fifth."""
        return min(1.0, (step + 1) / 100, (self.steps - step) / (self.steps / 5))


@torch.inference_mode()
def text_activations(
    model: CausalLM, tokenizer: FastTokenizer, *, layer: int, seed: int | str, rows: int = 32
) -> Iterator[Float[Tensor, "token d_model"]]:
    """Without end: the residual stream after block `layer` on freshly sampled text, one packed batch at a time.

    BOS and padding are left out: BOS has the same outlying activation in every text.
    """
    for step in count():
        batch = sample_batch(
            tokenizer, seed=f"sae:{seed}", step=step, rows=rows, row_length=N_CTX, mixture=TEXT_MIXTURE
        ).to(model.device)
        activations = resid_post(
            model, layer, input_ids=batch.ids, attention_mask=batch.attention_mask(), position_ids=batch.positions
        )
        yield activations[(batch.document >= 0) & (batch.positions > 0)]


def at_least(parts: Iterator[Float[Tensor, "token d_model"]], tokens: int) -> list[Float[Tensor, "_ d_model"]]:
    """The first parts that hold at least `tokens` activations together."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < tokens:
        kept.append(next(parts))
    return kept


def chunk_batches(
    model: CausalLM, tokenizer: FastTokenizer, recipe: SAERecipe, chunk: int
) -> Float[Tensor, "step token d_model"]:
    """The shuffled batches of one chunk: always the same for the same model, recipe and chunk."""
    parts = text_activations(model, tokenizer, layer=recipe.layer, seed=f"{recipe.seed}:{chunk}")
    tokens = recipe.chunk_steps * recipe.batch_tokens
    activations = torch.cat(at_least(parts, tokens))
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + chunk)
    chosen = torch.randperm(len(activations), generator=generator)[:tokens].to(activations.device)
    # Indexing outside inference mode gives ordinary tensors, which training needs.
    return activations[chosen].unflatten(0, (recipe.chunk_steps, recipe.batch_tokens))


def train_sae(
    model_folder: Path, out: Path, recipe: SAERecipe, *, device: str = "cpu", console: Console | None = None
) -> Path:
    """Trains the autoencoder, or resumes its training, and writes it to `out` in SAELens format.

    Args:
        model_folder: the pocket model, a Hugging Face folder.
        out: receives `cfg.json`, `sae_weights.safetensors` and `training.json`; holds `checkpoint/` during the run.
        recipe: what to train.
        device: "cpu" or a torch device.
        console: where progress is shown.

    Raises:
        MechsteerError: `out` holds a finished autoencoder or a run of another recipe.
    """
    console = console or Console()
    if (out / "training.json").exists():
        raise MechsteerError(f"{out} holds a finished autoencoder: give another --out, or delete it to train again")
    model, tokenizer = load_causal_lm(model_folder)
    model.to(device)
    d_model = model.config.hidden_size
    metadata = {
        "model_name": "pocket",
        "hook_name": f"blocks.{recipe.layer}.hook_resid_post",
        "context_size": N_CTX,
        "prepend_bos": True,
        "weights_processed": False,
    }
    sae = new_topk_sae(
        d_in=d_model, d_sae=recipe.expansion * d_model, k=recipe.k, seed=recipe.seed, metadata=metadata, device=device
    )
    optimiser = torch.optim.Adam(sae.parameters(), lr=recipe.learning_rate)
    idle = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=device)  # steps since each feature was last active
    progress: dict = {"recipe": asdict(recipe), "chunk": 0, "seconds": 0.0, "scale": None, "losses": []}
    if (checkpoint := load_checkpoint(out)) is not None:
        state, progress = checkpoint
        if progress["recipe"] != asdict(recipe):
            raise MechsteerError(
                f"{out} holds a run of another recipe ({progress['recipe']}): give another --out, or delete it"
            )
        sae.load_state_dict(state["sae"])
        load_optimiser_tensors({"adam": optimiser}, state["optimiser"])
        idle = state["counters"]["idle"].to(device)
        console.print(f"resuming at step {progress['chunk'] * recipe.chunk_steps} of {recipe.steps}")

    started = time.perf_counter() - progress["seconds"]
    with drawn(console) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=progress["chunk"] * recipe.chunk_steps)
        for chunk in range(progress["chunk"], recipe.chunks):
            tick = time.perf_counter()
            batches = chunk_batches(model, tokenizer, recipe, chunk)
            if progress["scale"] is None:
                # Mean norm sqrt(d_model), as SAELens scales its inputs.
                progress["scale"] = d_model**0.5 / float(batches[0].norm(dim=-1).mean())
            losses = []
            for index, batch in enumerate(batches):
                step = chunk * recipe.chunk_steps + index
                loss, fired = sae_loss(sae, batch * progress["scale"], dead=idle > recipe.dead_after, step=step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                optimiser.param_groups[0]["lr"] = recipe.learning_rate * recipe.schedule(step)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                idle = torch.where(fired, 0, idle + 1)
                losses.append(loss.item())
                bar.update(task, advance=1)
            mean = sum(losses) / len(losses)
            rate = len(batches) * recipe.batch_tokens / (time.perf_counter() - tick)
            bar.update(task, description=f"loss {mean:.3f}  {rate:,.0f} tokens/s")
            if not console.is_terminal:
                console.print(f"step {(chunk + 1) * recipe.chunk_steps} loss {mean:.3f} {rate:,.0f} tokens/s")
            progress |= {"chunk": chunk + 1, "seconds": time.perf_counter() - started}
            progress["losses"].append([(chunk + 1) * recipe.chunk_steps, round(mean, 4)])
            state = {
                "sae": sae.state_dict(),
                "optimiser": optimiser_tensors({"adam": optimiser}),
                "counters": {"idle": idle},
            }
            save_checkpoint(out, state, progress)
    save_sae(sae, out, scale=progress["scale"])
    (out / "training.json").write_text(json.dumps(progress, indent=1) + "\n")
    remove_checkpoints(out)
    return out


def held_out_activations(
    model: CausalLM, tokenizer: FastTokenizer, *, layer: int, tokens: int
) -> list[Float[Tensor, "_ d_model"]]:
    """At least `tokens` activations of text that neither model nor autoencoder was trained on."""
    return at_least(text_activations(model, tokenizer, layer=layer, seed="held out"), tokens)


@torch.inference_mode()
def mean_features(
    sae: SAE,
    model: CausalLM,
    tokenizer: FastTokenizer,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    layer: int,
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
