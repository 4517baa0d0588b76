"""The weights of a decoder's layers as the packed forward pass wants them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Norm:
    """A layer norm or an RMS norm; without gain and shift where these are in the weights behind it."""

    w: Float[Tensor, " d"] | None
    b: Float[Tensor, " d"] | None
    eps: float
    rms: bool

    @staticmethod
    def of(module: Any, order: Int[Tensor, " d"] | None = None) -> "Norm":
        """TransformerLens's norm; `order` of its dimensions."""
        parts = [getattr(module, name, None) for name in ("w", "b")]
        if order is not None:
            order = order.to(module.w.device)
        w, b = (None if x is None else x.detach().clone() if order is None else x.detach()[order] for x in parts)
        return Norm(w, b, float(module.eps), type(module).__name__.startswith("RMS"))

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if self.rms:
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            # One pass over x for the sum of squares, where pow and mean take three.
            square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
            normal = (wide * torch.rsqrt(square + self.eps)).to(x.dtype)
            return normal if self.w is None else normal * self.w
        return F.layer_norm(x, x.shape[-1:], self.w, self.b, self.eps)


@dataclass
class Linear:
    """A linear map, in the order that a matrix product wants."""

    w: Float[Tensor, "d_in d_out"]  # contiguous
    b: Float[Tensor, " d_out"] | None

    @staticmethod
    def of(w: Float[Tensor, "d_in d_out"], b: Float[Tensor, "..."] | None) -> "Linear":
        """A copy; without a bias that is zero."""
        copy = w.detach().clone(memory_format=torch.contiguous_format)
        return Linear(copy, None if b is None else nonzero(b.flatten()))

    def __call__(self, x: Float[Tensor, "row d_in"], part: slice = slice(None)) -> Float[Tensor, "row d_out"]:
        w = self.w[:, part]
        return x @ w if self.b is None else torch.addmm(self.b[part], x, w)


def nonzero(b: Float[Tensor, " d"]) -> Float[Tensor, " d"] | None:
    """A copy of a bias, or None where it does nothing."""
    return b.detach().clone() if bool(b.any()) else None


def folded(norm: Norm, linear: Linear) -> tuple[Norm, Linear]:
    """The same two with the norm's gain and shift in the weights; in half precision as they are, for its rounding."""
    if linear.w.dtype not in (torch.float32, torch.float64):
        return norm, linear
    w, b = linear.w, linear.b
    if norm.b is not None:
        shift = norm.b @ w
        b = shift if b is None else b + shift
    if norm.w is not None:
        w = norm.w[:, None] * w
    return Norm(None, None, norm.eps, norm.rms), Linear(w, b)


class Rotation:
    """Rotary position embeddings (Su et al. 2021, eq. 34), as one complex product.

    For that the two dimensions of a pair stand side by side. In most models a head's dimension i is paired with
    i + rotary_dim / 2, so queries and keys are kept in another order than the model's; `pair` and `unpair` change
    between the two. Scores do not depend on the order.

    Attributes:
        order: of a head's dimensions as they are kept; None for the model's own.
    """

    def __init__(self, cfg: Any) -> None:
        self.dim, self.d_head = cfg.rotary_dim, cfg.d_head
        self.order: Tensor | None = None
        self._back: Tensor | None = None
        self._tables: dict[Any, Tensor] = {}
        self._part = slice(None, None, 2)  # of the tables: both of a pair have the same angle
        if cfg.positional_embedding_type == "rotary" and not cfg.rotary_adjacent_pairs:
            dims = torch.arange(self.d_head)
            self.order = torch.cat([dims[: self.dim].view(2, -1).T.flatten(), dims[self.dim :]])
            self._back = self.order.argsort()
            self._part = slice(self.dim // 2)

    def pair(self, x: Float[Tensor, "*shape d_head"]) -> Float[Tensor, "*shape d_head"]:
        """From the model's order of a head's dimensions to the one kept here."""
        return x if self.order is None else x[..., self.order.to(x.device)]

    def unpair(self, x: Float[Tensor, "*shape d_head"]) -> Float[Tensor, "*shape d_head"]:
        """And back."""
        return x if self._back is None else x[..., self._back.to(x.device)]

    def table(self, attn: Any, device: torch.device) -> Float[Tensor, "pos pair 2"] | Complex[Tensor, "pos pair"]:
        """cos + i sin of all positions of the context, as two reals where there are no complex numbers of this kind.

        Layers of one kind on one device share theirs.
        """
        base = float(attn._rotary_base())
        key = (base, attn.attn_type, device)
        if key not in self._tables:
            sin, cos = (table[:, self._part].to(device).contiguous() for table in _whole_tables(attn, base))
            real = sin.dtype not in (torch.float32, torch.float64) or device.type == "mps"
            self._tables[key] = torch.stack([cos, sin], -1) if real else torch.complex(cos, sin)
        return self._tables[key]

    def __call__(self, x: Float[Tensor, "row head d_head"], turn: Shaped[Tensor, "row ..."]) -> Float[Tensor, "..."]:
        """Rotate each row by its own of the table's rows."""
        part = x[..., : self.dim].unflatten(-1, (-1, 2))
        if turn.is_complex():
            # A third of the time of the products one by one.
            turned = torch.view_as_real(torch.view_as_complex(part) * turn[:, None])
        else:
            first, second = part.unbind(-1)
            cos, sin = turn[:, None].unbind(-1)
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        turned = turned.flatten(-2)
        return turned if self.dim == self.d_head else torch.cat([turned, x[..., self.dim :]], -1)


@dataclass
class Layer:
    """One layer's weights."""

    ln1: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    ln1_post: Norm | None
    ln2: Norm
    mlp_in: Linear  # gate and linear part side by side in a gated MLP
    b_in: Tensor | None  # added after the gate, as TransformerLens does
    mlp_out: Linear
    ln2_post: Norm | None
    scale: float
    window: int | None
    turns: Tensor | None  # what `Rotation.table` gives

    @staticmethod
    def of(block: Any, rotation: Rotation, *, gated: bool, rotary: bool) -> "Layer":
        """Of TransformerLens's block."""
        attn, mlp = block.attn, block.mlp
        grouped = hasattr(attn, "_W_K")
        k, v = (attn._W_K, attn._W_V) if grouped else (attn.W_K, attn.W_V)
        b_k, b_v = (attn._b_K, attn._b_V) if grouped else (attn.b_K, attn.b_V)
        pair = rotation.pair
        qkv = torch.cat([w.permute(1, 0, 2).flatten(1) for w in (pair(attn.W_Q), pair(k), v)], 1)
        b_qkv = torch.cat([b.flatten() for b in (pair(attn.b_Q), pair(b_k), b_v)])
        mlp_in = torch.cat([mlp.W_gate, mlp.W_in], 1) if gated else mlp.W_in
        ln1, into_attn = folded(Norm.of(block.ln1), Linear.of(qkv, b_qkv))
        ln2, into_mlp = folded(Norm.of(block.ln2), Linear.of(mlp_in, None if gated else mlp.b_in))
        return Layer(
            ln1=ln1,
            qkv=into_attn,
            q_norm=None if attn.q_norm is None else Norm.of(attn.q_norm, rotation.order),
            k_norm=None if attn.k_norm is None else Norm.of(attn.k_norm, rotation.order),
            out=Linear.of(attn.W_O.flatten(0, 1), attn.b_O),
            ln1_post=Norm.of(block.ln1_post) if hasattr(block, "ln1_post") else None,
            ln2=ln2,
            mlp_in=into_mlp,
            b_in=nonzero(mlp.b_in) if gated else None,
            mlp_out=Linear.of(mlp.W_out, mlp.b_out),
            ln2_post=Norm.of(block.ln2_post) if hasattr(block, "ln2_post") else None,
            scale=1.0 / float(attn.attn_scale),
            window=int(attn.cfg.window_size) if attn.attn_type == "local" else None,
            turns=rotation.table(attn, qkv.device) if rotary else None,
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.qkv.w.device


def _whole_tables(attn: Any, base: float) -> tuple[Tensor, Tensor]:
    """Sine and cosine of all positions of the context [pos, rotary_dim]."""
    # The module's own as far as they go: they may have been computed in another precision than they are stored in.
    own = attn.rotary_sin, attn.rotary_cos
    n_own = own[0].shape[0]
    if n_own >= attn.cfg.n_ctx:
        return own
    full = attn.calculate_sin_cos_rotary(attn.cfg.rotary_dim, attn.cfg.n_ctx, base=base, dtype=attn.cfg.dtype)
    return tuple(torch.cat([mine, more.to(mine)[n_own:]]) for mine, more in zip(own, full, strict=True))  # type: ignore
