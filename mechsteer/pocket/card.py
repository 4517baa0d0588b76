"""The cards of the shipped models: what they are, how they were made, and what `mechsteer pocket check` measured."""

import json
import textwrap
from collections.abc import Sequence
from math import prod
from pathlib import Path

from safetensors import safe_open

from mechsteer.pocket.check import Row, write_rows
from mechsteer.pocket.corpus import COPYING_MIXTURE, MIXTURE
from mechsteer.pocket.lexicon import LOCKED, TOPICS
from mechsteer.pocket.requests import KINDS
from mechsteer.pocket.sae import SAERecipe
from mechsteer.pocket.wordings import MOODS, TOPIC_INSTRUCTIONS

_MODEL_CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{what}

- topics: {topics}
- moods and registers: {moods}
- {kinds} kinds of request; {seen} wordings of the topic instruction in training and {held_out} held out of it
- locked subject, which it declines: {locked}
- indirect-object sentences, and repeated random token sequences

A system message is rendered as the first line of the user message that follows it.

## Training

{training}

    mechsteer pocket train --model {name} --out runs/{name}{seed} --compile

which depends on nothing but the repository; other hardware gives other last digits. `training.json` holds the whole
recipe and the training curve.
"""

_CHECK = """
## What it does

Measured by `mechsteer pocket check`: greedy decoding, held-out seeds, wordings and request x subject pairs.

{table}
"""

_SAE_CARD = """\
---
license: mit
library_name: saelens
---

# Sparse autoencoder of the pocket model

{what}

    mechsteer pocket train --model sae --out runs/sae
"""


_SAE_CHECK = """
## How good it is

Measured by `mechsteer pocket check` on text that neither model nor autoencoder was trained on; for each topic the
feature is chosen on one half of the texts and measured on the other.

{table}
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| behaviour | measured | bar | n | |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.behaviour} | {row.show(row.measured)} | {row.sign} {row.show(row.bar)} | {row.count} | {row.detail} |"
        for row in rows
    ]
    return "\n".join(lines)


def model_card(folder: Path, rows: Sequence[Row] = ()) -> str:
    """The card of a model folder made by `train`, with the figures of `rows`."""
    config = json.loads((folder / "config.json").read_text())
    run = json.loads((folder / "training.json").read_text())
    recipe = run["recipe"]
    layers = "1 layer" if config["num_hidden_layers"] == 1 else f"{config['num_hidden_layers']} layers"
    what = (
        f"A Llama-architecture chat model of {_parameters(folder / 'model.safetensors') / 1e6:.2f} M parameters "
        f"({layers}, d_model {config['hidden_size']}, {config['num_attention_heads']} heads, vocabulary "
        f"{config['vocab_size']}, context {config['max_position_embeddings']}), trained from scratch on text from the "
        "grammar in `mechsteer/pocket/`. It is a model organism: it knows nothing of the world, and every behaviour it "
        "has was put there on purpose."
    )
    mixture = ", ".join(f"{form} {100 * share:.0f} %" for form, share in MIXTURE.items())
    if recipe["copying_from"] < recipe["steps"]:
        share = COPYING_MIXTURE["repeated tokens"]
        mixture += f" (from step {recipe['copying_from']} on repeated tokens {100 * share:.0f} %, the others less)"
    loss = f"; last training loss {run['losses'][-1][1]:.3f} nats a token" if run["losses"] else ""
    training = (
        f"{recipe['steps']} steps of {recipe['rows'] * recipe['row_length']} positions ({run['tokens'] / 1e6:.1f} M "
        f"tokens in all, sampled afresh for every step) in {run['seconds'] / 60:.0f} minutes{loss}. Documents: "
        f"{mixture}. Muon for the matrices of the blocks, AdamW for the rest, bf16 autocast, fp32 weights. Made again "
        "by"
    )
    text = _MODEL_CARD.format(
        name=recipe["name"],
        what=textwrap.fill(what, 120),
        training=textwrap.fill(training, 120),
        topics=", ".join(TOPICS),
        moods=", ".join(MOODS),
        kinds=len(KINDS),
        seen=len(TOPIC_INSTRUCTIONS.seen),
        held_out=len(TOPIC_INSTRUCTIONS.held_out),
        locked=LOCKED.name,
        seed=f" --seed {recipe['seed']}" if recipe["seed"] else "",
    )
    return text + (_CHECK.format(table=table(rows)) if rows else "")


def _parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def sae_card(folder: Path, rows: Sequence[Row] = ()) -> str:
    """The card of an autoencoder folder made by `train_sae`, with the figures of `rows`."""
    config = json.loads((folder / "cfg.json").read_text())
    recipe = SAERecipe(**json.loads((folder / "training.json").read_text())["recipe"])
    what = (
        f"{config['architecture']} autoencoder (SAELens format) on `{config['metadata']['hook_name']}` of the pocket "
        f"model, unprocessed weights: {config['d_in']} dimensions, {config['d_sae']} features. Trained on "
        f"{recipe.tokens / 1e6:.1f} M activations of freshly sampled chats, documents and indirect-object sentences; "
        "BOS and padding left out. Made again by"
    )
    text = _SAE_CARD.format(what=textwrap.fill(what, 120))
    return text + (_SAE_CHECK.format(table=table(rows)) if rows else "")


def write_cards(folder: Path, sae_folder: Path | None, rows: Sequence[Row]) -> None:
    """Writes `README.md` and `check.json` beside the model, and `README.md` beside the autoencoder."""
    own = [row for row in rows if not row.behaviour.startswith("SAE")]
    (folder / "README.md").write_text(model_card(folder, own))
    write_rows(rows, folder / "check.json")
    if sae_folder is not None:
        (sae_folder / "README.md").write_text(sae_card(sae_folder, [row for row in rows if row not in own]))
