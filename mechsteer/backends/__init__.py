"""The only rooms that import transformer_lens, sae_lens or transformers.

Importing `mechsteer.backends` imports none of them: each backend is imported when it is first used.
"""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mechsteer.errors import ModelLoadError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    Hooked = HookedTransformer | TransformerBridge
else:
    # Naming the real classes here would import TransformerLens, which takes seconds.
    Hooked = Any

BACKENDS = ("hooked_transformer", "bridge")


class Loaded(NamedTuple):
    """A hooked model and the tokenizer of its folder, as transformers loads it (untouched by TransformerLens)."""

    hooked: Hooked
    tokenizer: Any


def check_backend(backend: str) -> None:
    """Raise `ModelLoadError` unless `backend` is one that exists."""
    if backend not in BACKENDS:
        raise ModelLoadError(f"backend={backend!r} does not exist. Pass one of {', '.join(map(repr, BACKENDS))}.")


def backend_of(hooked: object) -> str | None:
    """Which backend a hooked model belongs to, or None for an object that is no hooked model."""
    # By name, because an isinstance check would have to import TransformerLens for an object that may not need it.
    names = {cls.__name__ for cls in type(hooked).__mro__}
    if "HookedTransformer" in names:
        return "hooked_transformer"
    if "TransformerBridge" in names:
        return "bridge"
    return None


def is_processed(hooked: Any) -> bool:
    """Whether weights were folded or centred after loading, so that activations differ from Hugging Face's."""
    if backend_of(hooked) == "bridge":
        from mechsteer.backends.bridge import is_processed as check
    else:
        from mechsteer.backends.hooked_transformer import is_processed as check
    return check(hooked)


def hub_folder(name: str, *, shipped: tuple[str, ...] = ()) -> Path:
    """Local snapshot of a hub model that TransformerLens knows; see `mechsteer.backends.huggingface.hub_folder`."""
    _import_transformer_lens()
    from mechsteer.backends import huggingface

    return huggingface.hub_folder(name, shipped=shipped)


def load_folder(folder: Path, *, backend: str, device: str | torch.device | None, dtype: torch.dtype) -> Loaded:
    """Load a Hugging Face folder with unprocessed weights, and check its logits against transformers' own.

    Args:
        folder: holds `config.json`, safetensors weights and a tokenizer. Nothing else is read, nothing is downloaded.
        backend: one of `BACKENDS`.
        device: None means CUDA where there is one, else the CPU.
        dtype: of the weights.

    Raises:
        ModelLoadError: the folder is incomplete or damaged, or the backend cannot compute this model exactly.
    """
    check_backend(backend)
    _import_transformer_lens()
    from mechsteer.backends import huggingface

    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    source = huggingface.read_folder(folder, dtype=dtype)
    tokens = huggingface.probe_tokens(source.model.config)
    expected = huggingface.logits(source.model, tokens)
    if backend == "bridge":
        from mechsteer.backends.bridge import from_huggingface
    else:
        from mechsteer.backends.hooked_transformer import from_huggingface
    hooked = from_huggingface(source, device=target, dtype=dtype)
    with torch.no_grad():
        got = hooked(tokens.to(target))
    huggingface.check_logits(folder, backend=backend, got=got, expected=expected)
    return Loaded(hooked, source.tokenizer)


def _import_transformer_lens() -> None:
    # The import creates millions of objects that stay, and the garbage collector searches them again and again: a
    # quarter of the import time, 1 s of 4. Nothing needs collecting meanwhile.
    enabled = gc.isenabled()
    gc.disable()
    try:
        import transformer_lens  # noqa: F401
    finally:
        if enabled:
            gc.enable()
