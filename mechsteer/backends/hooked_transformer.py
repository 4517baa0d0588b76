"""TransformerLens's `HookedTransformer`, built from a Hugging Face folder with its weights as they are.

TransformerLens loads only the names on its own list, takes the architecture from the name (a path with "llama" or
"gemma" in it is never looked into), holds the settings of each published Gemma in its source, and caps some contexts.
So the settings of the common architectures are read from their config here, and every one that `HookedTransformer`
cannot express is refused by name. Other architectures go through TransformerLens's own conversion. Either way the
caller compares the logits with transformers' before anybody sees the model.
"""

import copy
import importlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mechsteer.errors import ModelLoadError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from mechsteer.backends.huggingface import Source

# model_type of config.json -> (architecture as TransformerLens calls it, its weight conversion)
_CONVERSIONS = {
    "gpt2": ("GPT2LMHeadModel", "convert_gpt2_weights"),
    "llama": ("LlamaForCausalLM", "convert_llama_weights"),
    "mistral": ("MistralForCausalLM", "convert_mistral_weights"),
    "gemma": ("GemmaForCausalLM", "convert_gemma_weights"),
    "gemma2": ("Gemma2ForCausalLM", "convert_gemma_weights"),
    "gemma3_text": ("Gemma3ForCausalLM", "convert_gemma_weights"),
    "qwen3": ("Qwen3ForCausalLM", "convert_qwen3_weights"),
}


class _LacksError(Exception):
    """A setting that `HookedTransformer` cannot express; the message names it."""


def from_huggingface(
    source: "Source", *, device: torch.device, dtype: torch.dtype, n_devices: int = 1
) -> "HookedTransformer":
    """Build a `HookedTransformer` with unprocessed weights (nothing folded, nothing centred).

    On several devices it is built on the CPU, and its parts are moved to their devices at the end; see `spread`.

    Raises:
        ModelLoadError: `HookedTransformer` lacks something that this model uses; the message names it.
    """
    from transformer_lens import HookedTransformer

    model_type = source.model.config.model_type
    try:
        cfg = _build_config(source, device=torch.device("cpu") if n_devices > 1 else device, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
            # A copy, because TransformerLens sets padding and special tokens on the one it is given.
            hooked = HookedTransformer(cfg, tokenizer=copy.deepcopy(source.tokenizer))
        with torch.no_grad():
            hooked.load_and_process_state_dict(
                _convert_weights(source, cfg),
                fold_ln=False,
                center_writing_weights=False,
                center_unembed=False,
                fold_value_biases=False,
            )
    except Exception as error:  # _LacksError, or whatever TransformerLens raises for what it does not support
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"HookedTransformer of TransformerLens lacks {reason}, which {source.folder} ({model_type}) uses. "
            "Try backend='bridge', which runs transformers' own code."
            if isinstance(error, _LacksError)
            else f"HookedTransformer of TransformerLens cannot load {source.folder} ({model_type}): {reason}. "
            "Try backend='bridge', which runs transformers' own code."
        ) from error
    return spread(hooked.eval(), device, n_devices) if n_devices > 1 else hooked.eval()


def spread(hooked: Any, device: torch.device, n_devices: int) -> Any:
    """Put a model's blocks on several devices, as TransformerLens's forward pass expects them.

    It hands the residual stream to `get_device_for_block_index` before each block: equal runs of blocks, the first with
    the embeddings, the last with the final norm and the unembedding. `HookedTransformer`'s own
    `move_model_modules_to_device` puts each part where most memory is free instead, and its norms and its unembedding
    then meet a stream on another device.

    The tests run this on devices that are made up; it was not run on real ones.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    hooked.cfg.device, hooked.cfg.n_devices = str(device), n_devices
    places = [get_device_for_block_index(index, hooked.cfg) for index in range(hooked.cfg.n_layers)]
    first, last = [hooked.embed], [hooked.unembed]
    first += [hooked.pos_embed] if hasattr(hooked, "pos_embed") else []
    last += [hooked.ln_final] if hasattr(hooked, "ln_final") else []
    parts = [*((part, places[0]) for part in first), *zip(hooked.blocks, places, strict=True)]
    for part, place in [*parts, *((part, places[-1]) for part in last)]:
        torch.nn.Module.to(part, place)
    return hooked


def layout(
    source: "Source", *, dtype: torch.dtype
) -> "tuple[HookedTransformerConfig, Iterator[tuple[str, torch.Tensor]]] | None":
    """The config and the parameters, in their order, of what `from_huggingface` would make, without making it; None
    where some weight is in none of them. The values share memory with `source.model` where they can."""
    from transformer_lens import HookedTransformer

    cfg = _build_config(source, device=torch.device("cpu"), dtype=dtype)
    cfg.tokenizer_name = None  # else it would be loaded
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        shell = HookedTransformer(cfg, move_to_device=False)
    shapes = {name: parameter.shape for name, parameter in shell.named_parameters()}
    values = _convert_weights(source, cfg)
    for name, shape in shapes.items():
        # What a conversion leaves out is what it is in a new model: norms without gain, and no biases.
        if name not in values:
            kind = name.rpartition(".")[2].lstrip("_").partition("_")[0]
            values[name] = {"w": torch.ones, "b": torch.zeros}[kind](shape)
    if any(values[name].shape != shape for name, shape in shapes.items()):
        return None

    def as_loaded(value: torch.Tensor) -> torch.Tensor:
        # TransformerLens rounds what it loads to fp32.
        return (value.detach().float() if value.dtype == torch.float64 else value.detach()).to(dtype)

    return cfg, ((name, as_loaded(values[name])) for name in shapes)


def is_processed(hooked: Any) -> bool:
    """Whether norms are folded into the weights or the unembedding is centred, as `from_pretrained` does unasked."""
    if str(hooked.cfg.normalization_type).endswith("Pre"):
        return True
    unembed = hooked.unembed.W_U.detach().float()  # [d_model, d_vocab]
    # A trained unembedding has row means far above rounding; a centred one has none, but for that of its own numbers.
    rounding = max(1e-6, torch.finfo(hooked.unembed.W_U.dtype).eps / unembed.shape[1] ** 0.5)
    return bool(unembed.mean(dim=-1).abs().max() < rounding * unembed.abs().max())


def _build_config(source: "Source", *, device: torch.device, dtype: torch.dtype) -> "HookedTransformerConfig":
    from transformer_lens import HookedTransformerConfig

    hf = source.model.config.get_text_config()  # of Gemma 3 with vision, the language model alone
    if hf.model_type in _CONVERSIONS:
        settings = _gpt2(hf) if hf.model_type == "gpt2" else _rotary_family(hf)
        settings["original_architecture"] = _CONVERSIONS[hf.model_type][0]
        settings["default_prepend_bos"] = source.tokenizer.bos_token is not None
    else:
        settings = _settings_of_transformer_lens(source)
    return HookedTransformerConfig.from_dict(
        {
            **settings,
            "model_name": source.folder.name,
            "tokenizer_name": str(source.folder),
            "device": str(device),
            "dtype": dtype,
            # Every weight gets loaded; random ones would only cost time.
            "init_weights": False,
            # TransformerLens turns this on for Qwen 3 and others, and passes it on to the tokenizer.
            "trust_remote_code": False,
        }
    )


def _convert_weights(source: "Source", cfg: "HookedTransformerConfig") -> dict[str, torch.Tensor]:
    """The weights under HookedTransformer's names; they still share memory with `source.model` where they can."""
    model_type = source.model.config.get_text_config().model_type
    if model_type in _CONVERSIONS:
        conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
        return getattr(conversions, _CONVERSIONS[model_type][1])(source.model, cfg)
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    return get_pretrained_state_dict(str(source.folder), cfg, hf_model=source.model, dtype=cfg.dtype)


def _settings_of_transformer_lens(source: "Source") -> dict[str, Any]:
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    # Under a neutral path, because TransformerLens guesses the architecture from words in the path.
    with tempfile.TemporaryDirectory(prefix="config-") as neutral:
        if (source.folder / "config.json").is_file():
            shutil.copy(source.folder / "config.json", neutral)
        else:  # the model of a bridge that was made from a hub name
            source.model.config.save_pretrained(neutral)
        return convert_hf_model_config(neutral, local_files_only=True, trust_remote_code=False)


def _gpt2(hf: Any) -> dict[str, Any]:
    if hf.add_cross_attention:
        raise _LacksError("cross-attention in GPT-2")
    return {
        "d_model": hf.n_embd,
        "d_head": hf.n_embd // hf.n_head,
        "n_heads": hf.n_head,
        "d_mlp": hf.n_inner or 4 * hf.n_embd,
        "n_layers": hf.n_layer,
        "n_ctx": hf.n_positions,
        "eps": hf.layer_norm_epsilon,
        "d_vocab": hf.vocab_size,
        "act_fn": _activation(hf.activation_function),
        "use_attn_scale": hf.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _rotary_family(hf: Any) -> dict[str, Any]:
    """Llama and its descendants: RMS norms, rotary positions, gated MLPs, grouped keys and values."""
    for flag in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(hf, flag, False):
            raise _LacksError(f"{flag}=True")
    gemma = hf.model_type.startswith("gemma")
    grouped = hf.num_key_value_heads != hf.num_attention_heads
    settings = {
        "d_model": hf.hidden_size,
        "d_head": hf.head_dim,
        "n_heads": hf.num_attention_heads,
        # The conversions of Mistral and Gemma always write grouped keys and values, those of Llama and Qwen if needed.
        "n_key_value_heads": hf.num_key_value_heads if grouped or gemma or hf.model_type == "mistral" else None,
        "d_mlp": hf.intermediate_size,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": hf.max_position_embeddings,
        "eps": hf.rms_norm_eps,
        "d_vocab": hf.vocab_size,
        "act_fn": _activation(getattr(hf, "hidden_activation", None) or hf.hidden_act),
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "use_normalization_before_and_after": hf.model_type in ("gemma2", "gemma3_text"),
        "use_qk_norm": hf.model_type in ("gemma3_text", "qwen3"),
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": hf.head_dim,
        **_attention_windows(hf),
    }
    if hf.model_type in ("gemma2", "gemma3_text"):
        settings["attn_scale"] = hf.query_pre_attn_scalar**0.5
        if hf.attn_logit_softcapping is not None:
            settings["attn_scores_soft_cap"] = hf.attn_logit_softcapping
        if hf.final_logit_softcapping is not None:
            settings["output_logits_soft_cap"] = hf.final_logit_softcapping
    return {**settings, **_rope(hf, windowed="local" in settings.get("attn_types", ()))}


def _attention_windows(hf: Any) -> dict[str, Any]:
    window = getattr(hf, "sliding_window", None)
    if not window:
        return {}
    # Mistral uses its window in every layer; the others say which layers do.
    kinds = ["sliding_attention"] * hf.num_hidden_layers if hf.model_type == "mistral" else hf.layer_types
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise _LacksError(f"attention layers of type {sorted(unknown)[0]!r}")
    if "sliding_attention" not in kinds:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in kinds],
    }


def _rope(hf: Any, *, windowed: bool) -> dict[str, Any]:
    """Rotary settings; `windowed` says whether some layer has a sliding window."""
    rope = hf.rope_parameters
    settings = {}
    if "full_attention" in rope:  # one set for each kind of layer (Gemma 3)
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise _LacksError(f"rope_type={local['rope_type']!r} in layers with a sliding window")
        settings["rotary_base_local"] = local["rope_theta"]
    settings["rotary_base"] = rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _LacksError(f"partial_rotary_factor={rope['partial_rotary_factor']} in this architecture")
    if kind == "linear":
        # HookedTransformer stretches positions in global layers only, which is what Gemma 3 does.
        if windowed and "rotary_base_local" not in settings:
            raise _LacksError("rope_type='linear' in layers with a sliding window")
        settings["rotary_scaling_factor"] = rope["factor"]
    elif kind == "llama3":
        if "rotary_base_local" in settings:
            raise _LacksError("rope_type='llama3' in only some of the layers")
        settings |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise _LacksError(f"rope_type={kind!r} in this architecture")
    return settings


def _activation(name: str) -> str:
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    if name not in SUPPORTED_ACTIVATIONS:
        raise _LacksError(f"the activation function {name!r}")
    return name
