"""Tiny random-weight models, one folder per architecture, in the format that Hugging Face models have.

Every setting that an implementation could overlook is away from its default and big enough to show in the logits: norm
weights are far from one, epsilons are large, soft caps are reached, windows are shorter than the prompts, head sizes
are not d_model / n_heads, and attention scales are not sqrt(d_head).

    folder = write_folder("gemma2", tmp_path)                  # config.json, model.safetensors, tokenizer.json
    tokens = prompts(batch=2, n_pos=40)
    logits = reference_logits(folder, tokens)                  # transformers' own, fp32, eager attention
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)

D_MODEL = 32
D_HEAD = 16
N_LAYERS = 3
N_HEADS = 4
N_KEY_VALUE_HEADS = 2
D_VOCAB = 128
N_CTX = 64
WINDOW = 8

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"

_CORPUS = [
    "The cat sat on the mat and the dog ran to the other cat.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "Talk only about cats. What should I cook for dinner? Give me three ideas!",
    "A feline purrs; Quick zebras jump over lazy foxes, vexing big wolves.",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 - ' : ( ) * \n",
]


def _common(**overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": 3 * D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KEY_VALUE_HEADS,
        "head_dim": D_HEAD,
        "max_position_embeddings": N_CTX,
        "rms_norm_eps": 1e-3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides,
    }


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _gpt2(**overrides: Any) -> PreTrainedConfig:
    settings = {
        "vocab_size": D_VOCAB, "n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS,
        "n_inner": 3 * D_MODEL, "layer_norm_epsilon": 1e-3, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    return GPT2Config(**{**settings, **overrides})


def _llama(**overrides: Any) -> PreTrainedConfig:
    return LlamaConfig(**_common(**{"rope_parameters": _rope(500.0), **overrides}))


def _mistral(**overrides: Any) -> PreTrainedConfig:
    return MistralConfig(**_common(**{"sliding_window": WINDOW, "rope_parameters": _rope(500.0), **overrides}))


def _qwen3(**overrides: Any) -> PreTrainedConfig:
    settings = {"rope_parameters": _rope(500.0), "tie_word_embeddings": True, "bos_token_id": None, **overrides}
    return Qwen3Config(**_common(**settings))


def _gemma(**overrides: Any) -> PreTrainedConfig:
    return GemmaConfig(**_common(**{"rope_parameters": _rope(500.0), **overrides}))


def _gemma2(**overrides: Any) -> PreTrainedConfig:
    settings = {
        "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "rope_parameters": _rope(500.0),
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **overrides,
    }  # fmt: skip
    return Gemma2Config(**_common(**settings))


def _gemma3(**overrides: Any) -> PreTrainedConfig:
    ropes = {"full_attention": _rope(5000.0, rope_type="linear", factor=8.0), "sliding_attention": _rope(100.0)}
    settings = {
        "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "rope_parameters": ropes,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **overrides,
    }  # fmt: skip
    return Gemma3TextConfig(**_common(**settings))


def _gemma3_vision(**overrides: Any) -> PreTrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    # The three ids mark images; they stand above the vocabulary, so that no prompt holds one.
    image_ids: dict[str, Any] = {
        "image_token_index": D_VOCAB,
        "boi_token_index": D_VOCAB + 1,
        "eoi_token_index": D_VOCAB + 2,
    }
    return Gemma3Config(text_config=_gemma3(**overrides), vision_config=vision, mm_tokens_per_image=4, **image_ids)


def _gptj(**overrides: Any) -> PreTrainedConfig:
    # TransformerLens has its epsilon and the width of its MLP in its source.
    settings = {
        "vocab_size": D_VOCAB, "n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS,
        "rotary_dim": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return GPTJConfig(**{**settings, **overrides})


def _neox(**overrides: Any) -> PreTrainedConfig:
    settings = {
        "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "intermediate_size": 3 * D_MODEL, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX, "layer_norm_eps": 1e-3, "bos_token_id": 1,
        "eos_token_id": 2, "use_parallel_residual": True, "tie_word_embeddings": False,
        "rope_parameters": _rope(10_000.0, partial_rotary_factor=0.5),
    }  # fmt: skip
    return GPTNeoXConfig(**{**settings, **overrides})


def _neox_sequential(**overrides: Any) -> PreTrainedConfig:
    return _neox(**{"use_parallel_residual": False, **overrides})


_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "gemma": _gemma,
    "gpt2": _gpt2,
    "llama": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_vision": _gemma3_vision,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gptj": _gptj,
    "neox": _neox,
    "neox_sequential": _neox_sequential,
}
# The ones that every test of the zoo runs on; the others are built by name where they matter.
ARCHITECTURES = ("gpt2", "llama", "gemma2", "gemma3", "qwen3", "mistral")
# Of heads that are rotated in part: GPT-J in adjacent pairs, GPT-NeoX in halves, with the MLP beside the attention or,
# as in Pythia's less common sibling, behind it.
PARTLY_ROTARY = ("gptj", "neox", "neox_sequential")
# Which of them put a beginning-of-sequence token before a text, as their published namesakes do.
PREPENDS_BOS = ("llama", "gemma", "gemma2", "gemma3", "gemma3_vision", "mistral")


def build_config(architecture: str, **overrides: Any) -> PreTrainedConfig:
    """transformers' config of a tiny model; `overrides` are fields of that config."""
    return _CONFIGS[architecture](**overrides)


def build_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A transformers causal language model with random weights that make every setting matter."""
    model = AutoModelForCausalLM.from_config(build_config(architecture, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:  # a norm weight; Gemma's norms add one to theirs
            value = 0.3 * noise + (0.0 if architecture.startswith("gemma") else 1.0)
        parameter.data.copy_(value)
    return model.eval()


def build_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """A real byte-pair tokenizer with at most `D_VOCAB` tokens, trained on a few lines of text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=D_VOCAB, special_tokens=[PAD, BOS, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if architecture in PREPENDS_BOS:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
        )
    bos = {"gpt2": EOS, "qwen3": None}.get(architecture, BOS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=bos, eos_token=EOS, unk_token=UNK, model_max_length=N_CTX
    )


def write_folder(architecture: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny model with its tokenizer to `folder` (created), as Hugging Face models are stored; returns it."""
    build_model(architecture, seed=seed, **overrides).save_pretrained(folder)
    build_tokenizer(architecture).save_pretrained(folder)
    return folder


def prompts(*, batch: int = 2, n_pos: int = 40, d_vocab: int = D_VOCAB, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, n_pos], longer than `WINDOW` by default, without special tokens."""
    return torch.randint(4, d_vocab, (batch, n_pos), generator=torch.Generator().manual_seed(seed))


def reference_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, as transformers loads it."""
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits [batch, pos, d_vocab] in fp32 for the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(tokens, use_cache=False).logits
