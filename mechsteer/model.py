"""The model noun: a hooked model with its tokenizer, and how to load one."""

import os
from pathlib import Path
from typing import Any

import torch

from mechsteer import backends
from mechsteer.backends import Hooked
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError, ModelLoadError

# Models that ship with mechsteer, by the name that `load_model` takes.
SHIPPED_MODELS = ("pocket", "pocket-1l")


class Model:
    """A TransformerLens model and its tokenizer.

    `load_model` makes one from a name or a folder. To use a model that you already have, wrap it:
    `Model(HookedTransformer.from_pretrained_no_processing("gpt2"))`.

    Attributes:
        hooked: the `HookedTransformer` or `TransformerBridge`; both have hook names like `blocks.3.hook_resid_pre`.
        tokenizer: turns text into token ids. After `load_model` it is the one that transformers loads, unchanged.
        name: what the model was loaded as, for reports and errors.
        backend: "hooked_transformer" or "bridge".
        processed: whether weights were folded or centred after loading. `load_model` never does that, so that
            activations match Hugging Face's and published SAEs.
    """

    def __init__(self, hooked: Hooked, *, tokenizer: Any = None, name: str | None = None) -> None:
        """Wrap a model.

        Args:
            hooked: a `HookedTransformer` or a `TransformerBridge`.
            tokenizer: a transformers tokenizer; None takes the hooked model's own.
            name: None takes the name in the hooked model's config.

        Raises:
            MechsteerError: `hooked` is neither of the two.
        """
        backend = backends.backend_of(hooked)
        if backend is None:
            raise MechsteerError(
                f"Model got a {type(hooked).__name__}, but wraps a HookedTransformer or a TransformerBridge. "
                "Pass one of those, or use load_model with a name or folder."
            )
        self.hooked = hooked
        self.tokenizer: Any = hooked.tokenizer if tokenizer is None else tokenizer
        self.name = str(hooked.cfg.model_name) if name is None else name
        self.backend = backend
        self.processed = backends.is_processed(hooked)

    @property
    def cfg(self) -> Any:
        """TransformerLens's config of the model."""
        return self.hooked.cfg

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return self.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.cfg.d_model

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model can embed."""
        return self.cfg.d_vocab

    @property
    def n_ctx(self) -> int:
        """Largest number of positions."""
        return self.cfg.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hooked.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.hooked.parameters()).dtype

    def __repr__(self) -> str:
        weights = "processed" if self.processed else "unprocessed"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}, backend={self.backend!r}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"d_vocab={self.d_vocab}, {weights} {dtype} weights on {self.device})"
        )


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    backend: str = "hooked_transformer",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model with unprocessed weights, and check that its logits are those of transformers.

    Args:
        name_or_path: "pocket" or "pocket-1l", which ship with mechsteer; a Hugging Face folder with `config.json`,
            safetensors weights and a tokenizer; or a hub name that TransformerLens knows, such as "gpt2", which is
            downloaded unless it is in the local cache. Code from a folder or from the hub is never run.
        backend: "hooked_transformer", or "bridge" for a `TransformerBridge` with the same hook names, which runs
            transformers' own code and so covers more architectures.
        device: None means CUDA where there is one, else the CPU.
        dtype: of the weights. The check of the logits is made in fp32 and fp64.

    Raises:
        ModelLoadError: with one line that says what is wrong with the name, folder or backend, and what to do.
        MechsteerError: a shipped model is missing from this copy of mechsteer.
    """
    backends.check_backend(backend)
    folder, name = _resolve(name_or_path)
    loaded = backends.load_folder(folder, backend=backend, device=device, dtype=dtype)
    return Model(loaded.hooked, tokenizer=loaded.tokenizer, name=name)


def _resolve(name_or_path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder that a name or path stands for, and what to call the model: a folder's own name, not its path."""
    name = os.fspath(name_or_path)
    if not name.strip():
        raise ModelLoadError(
            "load_model got an empty name. Pass 'pocket', a model folder, or a hub name such as 'gpt2'."
        )
    if name in SHIPPED_MODELS:
        return data_path("models", name), name
    path = Path(name).expanduser()
    # "org/name" can be either, so it is a folder only if it exists; these can be nothing but paths.
    path_like = not isinstance(name_or_path, str) or name.startswith((".", "~", os.sep)) or path.is_absolute()
    if path_like or path.exists() or name.count("/") > 1 or "\\" in name:
        return path, path.resolve().name
    return backends.hub_folder(name, shipped=SHIPPED_MODELS), name
