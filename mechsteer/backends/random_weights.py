"""Models with random weights, made from sizes alone: what a measurement of time needs of a model."""

from typing import TYPE_CHECKING

import torch

from mechsteer.costs import Dims

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def random_hooked(
    dims: Dims, *, device: str | torch.device, dtype: torch.dtype, n_ctx: int = 1024, name: str = "random"
) -> "HookedTransformer":
    """A Llama-like `HookedTransformer` of these sizes, without a tokenizer.

    Args:
        dims: of the model.
        device, dtype: of its weights, which are the same every time.
        n_ctx: most positions.
        name: what to call it.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=dims.n_layers, d_model=dims.d_model, n_ctx=n_ctx, d_head=dims.d_head, n_heads=dims.n_heads,
        n_key_value_heads=dims.n_kv_heads, d_mlp=dims.d_mlp, d_vocab=dims.d_vocab, act_fn="silu",
        gated_mlp=dims.gated, normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=dims.d_head,
        seed=0, model_name=name, dtype=dtype, device=str(device),
    )  # fmt: skip
    return HookedTransformer(cfg).eval()
