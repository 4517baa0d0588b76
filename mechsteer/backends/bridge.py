"""TransformerLens's `TransformerBridge`: transformers' own modules under HookedTransformer's hook names."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechsteer.errors import ModelLoadError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

    from mechsteer.backends.huggingface import Source


def from_huggingface(source: "Source", *, device: torch.device, dtype: torch.dtype) -> "TransformerBridge":
    """Wrap a transformers model, without copying its weights or changing them.

    Raises:
        ModelLoadError: TransformerLens has no bridge for this architecture, or the model is not a text model.
    """
    config = source.model.config
    if config.get_text_config() is not config:
        # For these TransformerLens runs `pip install torchvision` by itself when that is absent, which can replace
        # the torch that is installed. Loading a model never changes anybody's environment.
        raise ModelLoadError(
            f"backend='bridge' takes text models, and {source.folder} ({config.model_type}) takes more than text, for "
            "which TransformerLens installs packages by itself. Try backend='hooked_transformer'."
        )
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(
            str(source.folder),
            hf_model=source.model.to(device),
            # A copy, because TransformerLens sets padding side and special tokens on the one it is given.
            tokenizer=copy.deepcopy(source.tokenizer),
            device=device,
            dtype=dtype,
        )
        # Only for the classic hook names: no_processing leaves every weight as it is.
        bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    except Exception as error:  # TransformerLens raises many types for what it does not support
        raise ModelLoadError(
            f"TransformerBridge of TransformerLens lacks {config.model_type!r} as used in {source.folder} "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}). "
            "Try backend='hooked_transformer'."
        ) from error
    return bridge.eval()


def is_processed(bridge: Any) -> bool:
    """Whether the bridge's weights were folded or centred (`enable_compatibility_mode` without `no_processing`)."""
    return bool(getattr(bridge, "_weights_processed", False))


def hooked_twin(bridge: Any) -> Any:
    """A `HookedTransformer` with the weights of a bridge, or None where it cannot be made.

    For code that reads weights by TransformerLens's classic names; the bridge's own config lacks most settings.
    """
    from mechsteer.backends import hooked_transformer

    weight = next(bridge.parameters())
    if len({each.device for each in bridge.parameters()}) > 1:
        return None  # its copy might fit on no device alone
    try:
        source = _source(bridge)
        if source is None:
            return None
        return hooked_transformer.from_huggingface(source, device=weight.device, dtype=weight.dtype)
    except Exception:  # whatever transformers or TransformerLens raise for what they do not cover
        return None


def classic_weights(bridge: Any) -> "tuple[HookedTransformerConfig, Iterator[tuple[str, Tensor]]] | None":
    """Config, and names and values of all parameters, of the `HookedTransformer` that `hooked_twin` would make; None
    where it would make none. Nothing that large models have much of is copied: what is given are views."""
    from mechsteer.backends import hooked_transformer

    try:
        source = _source(bridge)
        return None if source is None else hooked_transformer.layout(source, dtype=next(bridge.parameters()).dtype)
    except Exception:  # as above
        return None


def _source(bridge: Any) -> "Source | None":
    """The transformers model inside a bridge, under its own names and with the same tensors; None where the weights
    are no longer those of its architecture."""
    from transformers import AutoModelForCausalLM

    from mechsteer.backends.huggingface import Source

    if is_processed(bridge):
        return None
    config = bridge.original_model.config
    # The bridge wraps each of transformers' modules; without its wrappers the names are transformers' own.
    values = {key.replace("._original_component", ""): v for key, v in bridge.original_model.state_dict().items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(bridge.parameters()).dtype)
    wanted = model.state_dict()
    gained = (key for key in values if key not in wanted and f"{key.removesuffix('bias')}weight" in wanted)
    if any(bool(values[key].any()) for key in gained):
        return None  # a module has a bias that the architecture lacks
    model.load_state_dict({key: values[key] for key in wanted}, assign=True)
    return Source(Path(str(bridge.cfg.model_name)), model.eval(), copy.deepcopy(bridge.tokenizer))
