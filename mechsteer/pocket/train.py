"""Trains the pocket models from scratch: seeded, checkpointed, resumable, on CPU or GPU.

A run's folder holds its latest checkpoint (`checkpoint/`: safetensors and JSON) and, at its end, the model as a
Hugging Face folder. The same command on the same folder resumes at the last checkpoint; the batch of a step depends
only on the seed and the step, so a resumed run sees the same data as one that was never stopped.
"""

import ctypes
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from mechsteer.backends.causal_lm import CausalLM, FastTokenizer, new_llama, save_folder
from mechsteer.errors import MechsteerError
from mechsteer.pocket.checkpoint import (
    load_checkpoint,
    load_optimiser_tensors,
    optimiser_tensors,
    remove_checkpoints,
    save_checkpoint,
)
from mechsteer.pocket.corpus import COPYING_MIXTURE, MIXTURE, batch_loss, sample_batch
from mechsteer.pocket.tokenizer import N_CTX, VOCAB_SIZE, train_tokenizer
from mechsteer.progress import drawn


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights."""

    name: str
    n_layers: int
    steps: int
    seed: int = 0
    d_model: int = 192
    n_heads: int = 6
    d_mlp: int = 512
    rows: int = 32
    row_length: int = N_CTX
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup: int = 100
    copying_from: int = 1500
    """From this step on, batches are of `COPYING_MIXTURE`."""
    cooldown: float = 0.4
    """Share of the steps at the end over which the learning rate falls linearly to zero."""

    def schedule(self, step: int) -> float:
        """Learning rate at `step` over the largest: linear warm-up, constant, linear fall to zero."""
        start = self.steps * (1 - self.cooldown)
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / max(1.0, self.steps - start)))

    def mixture(self, step: int) -> Mapping[str, float]:
        """The shares of document forms in the batch of a step."""
        return MIXTURE if step < self.copying_from else COPYING_MIXTURE


RECIPES: dict[str, Recipe] = {
    "pocket": Recipe("pocket", n_layers=6, steps=3600),
    "pocket-1l": Recipe("pocket-1l", n_layers=1, steps=1000),
}


def build_model(recipe: Recipe, tokenizer: FastTokenizer) -> CausalLM:
    """The untrained model of a recipe; its weights depend on nothing but the recipe."""
    return new_llama(
        tokenizer,
        seed=recipe.seed,
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=N_CTX,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )


def build_optimisers(model: CausalLM, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, unembedding and norms.

    Raises:
        MechsteerError: this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise MechsteerError(
            f"training needs torch.optim.Muon, and torch {torch.__version__} is older than 2.9: upgrade torch"
        )
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    inside = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in inside]
    lr, decay = recipe.learning_rate, recipe.weight_decay
    return {
        "muon": torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    }


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one: large blocks go back to the system otherwise, and touching
    them anew costs time in every step on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 250,
    compile_model: bool = False,
    tokenizer: FastTokenizer = None,
    console: Console | None = None,
) -> Path:
    """Trains a model, or resumes its training, and writes it to `out` as a Hugging Face folder.

    Args:
        recipe: what to train.
        out: the run's folder; holds `checkpoint/` during the run and the model at its end.
        device: "cpu" or a torch device; bf16 autocast is used on either.
        checkpoint_every: steps between checkpoints; Ctrl-C writes one too.
        compile_model: use `torch.compile` (about 1.2 times the throughput; needs a C++ compiler).
        tokenizer: the one that `train_tokenizer` gives; None trains it first.
        console: where progress is shown.

    Returns:
        `out`.

    Raises:
        MechsteerError: the folder holds a finished model or a run of another recipe, or torch is too old.
        KeyboardInterrupt: after the checkpoint was written.
    """
    console = console or Console()
    if (out / "training.json").exists():
        raise MechsteerError(f"{out} holds a finished model: give another --out, or delete it to train again")
    _keep_freed_memory()
    where = torch.device(device)
    tokenizer = tokenizer or train_tokenizer()
    model = build_model(recipe, tokenizer).to(where)
    optimisers = build_optimisers(model, recipe)
    progress: dict = {"recipe": asdict(recipe), "step": 0, "seconds": 0.0, "tokens": 0, "losses": []}
    if (checkpoint := load_checkpoint(out)) is not None:
        state, saved = checkpoint
        # The length of a run may be changed on the way: it only moves where the learning rate falls.
        if saved["recipe"] | {"steps": recipe.steps} != asdict(recipe):
            raise MechsteerError(
                f"{out} holds a run of another recipe ({saved['recipe']}): give another --out, or delete it"
            )
        progress = saved | {"recipe": asdict(recipe)}
        model.load_state_dict(state["model"])
        load_optimiser_tensors(optimisers, state["optimiser"])
        console.print(f"resuming {recipe.name} at step {progress['step']} of {recipe.steps}")
    console.print(f"{recipe.name}: {model.num_parameters() / 1e6:.2f} M parameters, {recipe.steps} steps, {where}")

    def save() -> None:
        save_checkpoint(out, {"model": model.state_dict(), "optimiser": optimiser_tensors(optimisers)}, progress)

    model.train()
    forward = torch.compile(model, dynamic=False) if compile_model else model
    started = time.perf_counter() - progress["seconds"]
    try:
        with drawn(console) as bar:
            task = bar.add_task("training", total=recipe.steps, completed=progress["step"])
            window: list[float] = []
            for step in range(progress["step"], recipe.steps):
                tick = time.perf_counter()
                batch = sample_batch(
                    tokenizer,
                    seed=recipe.seed,
                    step=step,
                    rows=recipe.rows,
                    row_length=recipe.row_length,
                    mixture=recipe.mixture(step),
                ).to(where)
                loss = batch_loss(forward, batch, amp=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimiser in optimisers.values():
                    for group in optimiser.param_groups:
                        group["lr"] = recipe.learning_rate * recipe.schedule(step)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                value = loss.item()
                if not math.isfinite(value):
                    raise MechsteerError(f"the loss of {recipe.name} is {value} at step {step}: lower the rate")
                window = [*window[-49:], value]
                tokens = int((batch.document >= 0).sum())
                progress["step"] = step + 1
                progress["tokens"] += tokens
                progress["seconds"] = time.perf_counter() - started
                rate = tokens / (time.perf_counter() - tick)
                mean = sum(window) / len(window)
                bar.update(task, advance=1, description=f"loss {mean:.3f}  {rate:,.0f} tokens/s")
                if (step + 1) % 50 == 0:
                    progress["losses"].append([step + 1, round(mean, 4)])
                    if not console.is_terminal:
                        console.print(f"step {step + 1} loss {mean:.4f} {rate:,.0f} tokens/s")
                if (step + 1) % checkpoint_every == 0:
                    save()
    except KeyboardInterrupt:
        save()
        console.print(f"stopped at step {progress['step']}; the same command resumes")
        raise
    save_folder(model.eval().cpu(), tokenizer, out)
    (out / "training.json").write_text(json.dumps(progress, indent=1) + "\n")
    remove_checkpoints(out)
    return out
