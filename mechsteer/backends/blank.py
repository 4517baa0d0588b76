"""A packed forward pass with random weights, made from sizes alone, to measure how long the engine takes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mechsteer.backends.decoder import Decoder
from mechsteer.backends.layers import Layer, Linear, Norm, Rotation
from mechsteer.costs import Dims


class _Cfg:
    """What a rotation asks of a config."""

    positional_embedding_type = "rotary"
    rotary_adjacent_pairs = False

    def __init__(self, d_head: int) -> None:
        self.rotary_dim = self.d_head = d_head


def blank(dims: Dims, *, device: torch.device, dtype: torch.dtype, n_ctx: int = 64, seed: int = 0) -> Decoder:
    """A Llama-like decoder of these sizes, whose layers share one layer's weights.

    Args:
        dims: of the model.
        device, dtype: of the weights.
        n_ctx: most positions.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Float[Tensor, "..."]:
        return (torch.randn(*shape, generator=generator) / shape[0] ** 0.5).to(device, dtype)

    made = object.__new__(Decoder)
    made.n_heads, made.n_kv_heads, made.d_head = dims.n_heads, dims.n_kv_heads, dims.d_head
    made.n_layers, made.d_vocab, made.gated = dims.n_layers, dims.d_vocab, dims.gated
    made.soft_cap = made.logit_cap = 0.0
    made.act, made.dims, made.unembed_flops = F.silu, dims, dims.unembed_flops
    made.rotation = Rotation(_Cfg(dims.d_head))
    made.W_E, made.W_pos = drawn(dims.d_vocab, dims.d_model), None
    angles = torch.outer(torch.arange(n_ctx) + 0.0, torch.rand(dims.d_head // 2, generator=generator)).to(device)
    wide = dtype in (torch.float32, torch.float64)
    turns = torch.polar(torch.ones_like(angles), angles) if wide else torch.stack([angles.cos(), angles.sin()], -1)
    turns = turns.to(torch.complex128) if dtype == torch.float64 else turns if wide else turns.to(dtype)
    norm = Norm(None, None, 1e-5, True)
    one = Layer(
        ln1=norm, qkv=Linear(drawn(dims.d_model, dims.attn_width + 2 * dims.kv_width), None), q_norm=None, k_norm=None,
        out=Linear(drawn(dims.attn_width, dims.d_model), None), ln1_post=None, ln2=norm,
        mlp_in=Linear(drawn(dims.d_model, dims.mlp_in), None), b_in=None,
        mlp_out=Linear(drawn(dims.d_mlp, dims.d_model), None), ln2_post=None, scale=dims.d_head**-0.5, window=None,
        turns=turns,
    )  # fmt: skip
    made.layers, made.ln_final = [one] * dims.n_layers, norm
    made.unembed = Linear(drawn(dims.d_model, dims.d_vocab), None)
    return made
