"""Causal language models as transformers runs them: to train and check the pocket models.

Analyses use a hooked model (`mechsteer.model`); this room is for work that needs no hooks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.backends.huggingface import read_folder

# transformers' own annotations do not describe calling, moving and padding well enough to check against.
CausalLM = Any
"""A transformers causal language model of the Llama family, such as `LlamaForCausalLM`."""
FastTokenizer = Any
"""A transformers tokenizer backed by the tokenizers library."""


def new_llama(tokenizer: FastTokenizer, *, seed: int, **shape: Any) -> CausalLM:
    """A Llama with random weights that depend on `seed` alone.

    Args:
        tokenizer: gives the special tokens' ids.
        seed: of the weights; the global random state is left as it was.
        shape: fields of transformers' `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**settings | shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def wrap_tokenizer(tokenizer: Any, **options: Any) -> FastTokenizer:
    """A transformers tokenizer around one of the tokenizers library."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def load_causal_lm(folder: Path) -> tuple[CausalLM, FastTokenizer]:
    """The model (fp32, evaluation mode) and tokenizer of a local Hugging Face folder.

    Raises:
        ModelLoadError: the folder is incomplete or damaged.
    """
    # sdpa takes the boolean masks of packed rows; eager attention would add them to the scores as numbers.
    source = read_folder(folder, dtype=torch.float32, attention="sdpa")
    return source.model, source.tokenizer


@contextmanager
def _capture(block: torch.nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


@torch.inference_mode()
def resid_post(model: CausalLM, layer: int, **inputs: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after block `layer`: `blocks.{layer}.hook_resid_post` of the hooked model."""
    with _capture(model.model.layers[layer]) as caught:
        model.model(**inputs, use_cache=False)
    return caught[0]


def save_folder(model: CausalLM, tokenizer: FastTokenizer, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format, without transformers' progress bars."""
    from mechsteer.backends.huggingface import quietly

    with quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
