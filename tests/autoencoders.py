"""Tiny autoencoders with random weights, one of each of SAELens's kinds."""

from typing import Any

import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from zoo import D_MODEL

from mechsteer.backends.autoencoder import SparseAutoencoder

HOOK = "blocks.1.hook_resid_post"
_CLASSES: dict[str, Any] = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
}


def module(
    kind: str = "topk",
    *,
    d_in: int = D_MODEL,
    d_sae: int = 48,
    seed: int = 0,
    hook: str | None = HOOK,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """SAELens's own, with weights all of which matter."""
    cls, config, defaults = _CLASSES[kind]
    about = SAEMetadata(model_name="tiny", **({} if hook is None else {"hook_name": hook}), **(metadata or {}))
    made = cls(config(d_in=d_in, d_sae=d_sae, metadata=about, **(defaults | options)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise.abs() * 0.3 if name == "threshold" else noise * (0.4 if noise.ndim > 1 else 0.3))
    return made


def autoencoder(kind: str = "topk", *, site: Any = None, **options: Any) -> SparseAutoencoder:
    return SparseAutoencoder.of(module(kind, **options), name="tiny", site=site)
