"""A decoder-only forward pass on packed rows, with the weights of a `HookedTransformer`.

TransformerLens runs rectangles [batch, pos] from the first layer to the last. A sweep needs less: many cells, each from
its own layer and position on, with the clean keys and values before them. So the same mathematics is written here once
on rows, each of which is one token of one item. Every result is compared with TransformerLens's own forward pass before
it is used (`mechsteer.model`), and architectures that are not covered take the hooks.

The weights are contiguous copies in the order that a matrix product wants: TransformerLens rearranges its own on every
forward pass. Each layer's stay on the device where the model has them. Rows come from the device of the embeddings, go
from one to the next where the layers' devices differ, and return to it, with all that is captured on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from mechsteer.backends.layers import Layer, Linear, Norm, Rotation
from mechsteer.backends.packing import Bucket, Layout, Pack, whole_pack
from mechsteer.costs import Dims, pass_flops
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows
from mechsteer.site import Site

Edits = Mapping[tuple[str, int], Sequence[Callable[[Tensor, Rows], Tensor]]]
# The kinds of site that edits and captures can name, in the order of the forward pass.
KINDS = (
    "embed", "pos_embed", "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_pre",
    "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def key_of(site: Site) -> tuple[str, int]:
    """What edits and captures call a site."""
    return site.kind, -1 if site.layer is None else site.layer


@dataclass
class Cache:
    """Keys (rotated, in the order of `Rotation.order`) and values of each layer [example, head, pos, d_head]."""

    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def empty(decoder: "Decoder", n_examples: int, n_pos: int) -> "Cache":
        """A cache with room for `n_pos` positions, on each layer's device."""
        # In memory by position: what a token has in all heads is written, and copied for many cells, in one piece.
        shape = (n_examples, n_pos, decoder.n_kv_heads, decoder.d_head)

        def make() -> list[Tensor]:
            return [layer.qkv.w.new_zeros(shape).transpose(1, 2) for layer in decoder.layers]

        return Cache(make(), make())


@dataclass(frozen=True)
class Alike:
    """Which rows enter a layer as the same token at the same position, so that its queries, keys and values are too.

    Attributes:
        first: one row of each kind.
        kind: of each row.
    """

    first: Int[Tensor, " kind"]
    kind: Int[Tensor, " row"]

    @staticmethod
    def of(tokens: Int[Tensor, " row"], position: Int[Tensor, " row"]) -> "Alike":
        """The kinds of rows that enter layer 0."""
        both = tokens * (int(position.max()) + 1) + position
        kinds, kind = both.unique(return_inverse=True)
        first = kind.new_empty(kinds.shape[0]).scatter_(0, kind, torch.arange(kind.shape[0], device=kind.device))
        return Alike(first, kind)


@dataclass
class Capture:
    """What a pass leaves besides its result: sites asked for, as rows with their layout."""

    wanted: frozenset[tuple[str, int]] = frozenset()
    taken: dict[tuple[str, int], tuple[Tensor, Layout]] = field(default_factory=dict)


class Decoder:
    """The forward pass; `Decoder.of(hooked)` makes one, or gives None for architectures that it does not cover."""

    def __init__(self, hooked: Any) -> None:
        cfg = hooked.cfg
        self.n_heads, self.d_head, self.n_layers = cfg.n_heads, cfg.d_head, cfg.n_layers
        self.n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
        self.soft_cap = float(cfg.attn_scores_soft_cap or 0)
        self.logit_cap = float(cfg.output_logits_soft_cap or 0)
        self.gated = bool(cfg.gated_mlp)
        self.act = _ACTIVATIONS[cfg.act_fn]
        self.rotation = Rotation(cfg)
        with torch.no_grad():
            self.W_E = hooked.embed.W_E.detach().clone()
            self.W_pos = (
                hooked.pos_embed.W_pos.detach().clone() if cfg.positional_embedding_type == "standard" else None
            )
            rotary = self.W_pos is None
            self.layers = [Layer.of(block, self.rotation, gated=self.gated, rotary=rotary) for block in hooked.blocks]
            self.ln_final = Norm.of(hooked.ln_final)
            self.unembed = Linear.of(hooked.unembed.W_U, hooked.unembed.b_U)
        self.d_vocab = self.unembed.w.shape[1]
        d_model, d_mlp = self.W_E.shape[1], self.layers[0].mlp_out.w.shape[0]
        # What its cost is computed from, here and in plans of models that are not loaded.
        self.dims = Dims(
            self.n_layers, d_model, self.n_heads, self.n_kv_heads, self.d_head, d_mlp, self.d_vocab, self.gated
        )
        self.unembed_flops = self.dims.unembed_flops

    @staticmethod
    def of(hooked: Any) -> "Decoder | None":
        """The decoder of a `HookedTransformer`, or None where it does something that is not written here."""
        cfg = hooked.cfg
        odd = (
            cfg.attn_only or cfg.parallel_attn_mlp or cfg.num_experts or cfg.post_embedding_ln or cfg.load_in_4bit
            or cfg.use_attention_sinks or cfg.use_logn_attn or cfg.use_dynamic_ntk_rope or cfg.clip_qkv is not None
        )  # fmt: skip
        known = (
            cfg.attention_dir == "causal"
            and cfg.positional_embedding_type in ("standard", "rotary")
            and cfg.act_fn in _ACTIVATIONS
            and cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre")
            and "Olmo" not in str(cfg.original_architecture)
        )
        return Decoder(hooked) if known and not odd else None

    # ---- the forward pass ----

    def embed(
        self, tokens: Int[Tensor, " row"], layout: Layout, edits: Edits, capture: Capture
    ) -> Float[Tensor, "row d_model"]:
        """The residual stream that enters layer 0."""
        x = _tap("embed", -1, self.W_E.index_select(0, tokens), layout, edits, capture)
        if self.W_pos is None:
            return x
        return x + _tap("pos_embed", -1, self.W_pos.index_select(0, layout.rows.position), layout, edits, capture)

    def logits(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Final norm and unembedding of rows."""
        out = self.unembed(self.ln_final(x.to(self.unembed.w.device))).to(x.device)
        return torch.tanh(out / self.logit_cap) * self.logit_cap if self.logit_cap > 0 else out

    def whole(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of whole prompts without padding."""
        batch, n_pos = tokens.shape
        pack = whole_pack(Prompts.from_ids(tokens))
        x = self.embed(tokens.flatten(), pack.all, {}, Capture())
        x = self.blocks(x, pack, first=0, stop=self.n_layers, own=Cache.empty(self, batch, n_pos))
        return self.logits(x).view(batch, n_pos, -1)

    def blocks(
        self,
        x: Float[Tensor, "row d_model"],
        pack: Pack,
        *,
        first: int,
        stop: int,
        from_mlp: bool = False,
        alike: Alike | None = None,
        past: Cache | None = None,
        own: Cache | None = None,
        edits: Edits | None = None,
        capture: Capture | None = None,
        keep: Callable[[int, str, Tensor], None] | None = None,
    ) -> Float[Tensor, "kept d_model"]:
        """Layers `first` to `stop - 1`.

        Args:
            x: `resid_pre` of layer `first` at all rows of `pack`; its `resid_mid` where `from_mlp`.
            alike: rows of `x` that are the same at the same position; their queries, keys and values in layer `first`
                are then computed once.
            past: clean keys and values before each item's start; not written.
            own: a cache that the rows' keys and values are written to, and that they attend to, instead of `past`.
                One cell per example.
            edits: what to do at (kind, layer).
            capture: sites to take.
            keep: called with (layer, "resid_pre" or "resid_mid", rows).

        Returns:
            `resid_post` of layer `stop - 1`: at the rows of `pack.last` where that is the last layer, else at all.
        """
        edits, capture, home = edits or {}, capture or Capture(), x.device
        for index in range(first, stop):
            layer = self.layers[index]
            x, pack = x.to(layer.device), pack.to(layer.device)
            mid = x
            final = index == self.n_layers - 1
            queries = pack.last if final else pack.all
            if not (from_mlp and index == first):
                x = _tap("resid_pre", index, x, pack.all, edits, capture)
                if keep:
                    keep(index, "resid_pre", x.to(home))
                same = alike if index == first else None
                attn_out = self._attention(layer, index, x, pack, queries, same, past, own, edits, capture)
                if layer.ln1_post is not None:
                    attn_out = layer.ln1_post(attn_out)
                attn_out = _tap("attn_out", index, attn_out, queries, edits, capture)
                if queries is not pack.all:
                    x = pack.asked(x)
                mid = x + attn_out
            elif queries is not pack.all:
                mid = pack.asked(x)
            mid = _tap("resid_mid", index, mid, queries, edits, capture)
            if keep:
                keep(index, "resid_mid", mid.to(home))
            x = _tap(
                "resid_post",
                index,
                mid + self._mlp(layer, index, mid, queries, edits, capture),
                queries,
                edits,
                capture,
            )
        return x.to(home)

    # ---- what it costs ----

    def flops(
        self, pack: Pack, *, first: int, from_mlp: bool = False, own: bool = False, backward: bool = False
    ) -> float:
        """Floating-point operations that `blocks` does, padding of the attention included.

        Args:
            backward: those of the gradient with respect to what entered, too.
        """
        return pass_flops(self.dims, pack.counts(own=own), first=first, from_mlp=from_mlp, backward=backward)

    def least_flops(
        self,
        start: Int[Tensor, "example cell"],
        stop: Int[Tensor, "example cell"],
        first: int,
        from_mlp: bool,
        read: Bool[Tensor, "example cell pos"],
    ) -> float:
        """The least that items from `start` to `stop - 1` need from layer `first` on, when `read` is unembedded."""
        n_pos = read.shape[-1]
        position = torch.arange(n_pos, device=start.device)
        inside = (position >= start[..., None]) & (position < stop[..., None])
        fresh = inside & read
        rows, asked = int(inside.sum()), int(fresh.sum())
        pairs = [float(((position + 1) * chosen).sum()) for chosen in (inside, fresh)]
        total = float(asked * self.unembed_flops)
        for index in range(first, self.n_layers):
            last = index == self.n_layers - 1
            mlp_only = from_mlp and index == first
            total += self.dims.layer_flops(rows, asked if last else rows, pairs[last], from_mlp=mlp_only)
        return total

    def _mlp(
        self,
        layer: Layer,
        index: int,
        mid: Float[Tensor, "row d_model"],
        layout: Layout,
        edits: Edits,
        capture: Capture,
    ) -> Float[Tensor, "row d_model"]:
        pre = layer.mlp_in(layer.ln2(mid))
        if self.gated:
            gate, linear = pre.chunk(2, -1)
            gate = _tap("mlp_pre", index, gate, layout, edits, capture)
            linear = _tap("mlp_pre_linear", index, linear, layout, edits, capture)
            post = self.act(gate)
            # In place where nothing else holds it: a new tensor of this size costs more than the product.
            post = post * linear if torch.is_grad_enabled() else post.mul_(linear)
            if layer.b_in is not None:
                post = post + layer.b_in
        else:
            post = self.act(_tap("mlp_pre", index, pre, layout, edits, capture))
        post = _tap("mlp_post", index, post, layout, edits, capture)
        out = layer.mlp_out(post)
        if layer.ln2_post is not None:
            out = layer.ln2_post(out)
        return _tap("mlp_out", index, out, layout, edits, capture)

    def _attention(
        self, layer: Layer, index: int, x: Float[Tensor, "row d_model"], pack: Pack, queries: Layout,
        alike: Alike | None, past: Cache | None, own: Cache | None,
        edits: Edits, capture: Capture,
    ) -> Tensor:  # fmt: skip
        n_q, d = self.n_heads, self.d_head
        q, k, v = self._queries_keys_values(layer, index, x, pack, queries, alike, edits, capture)
        seen = ("pattern", index) in edits or ("pattern", index) in capture.wanted
        if own is None and pack.sparse and not seen:
            assert past is not None
            z = self._attend_split(layer, index, q, k, v, pack, queries, past)
        else:
            rows = pack.all.rows
            joined = own is None and pack.joined and not seen
            if own is not None:
                # Rows are ordered by item: an item's place in the cache is its own, whatever prompt it comes from.
                own.keys[index][pack.all.item, :, rows.position] = k
                own.values[index][pack.all.item, :, rows.position] = v
                keys, values = (part[index][:, :, : pack.n_keys] for part in (own.keys, own.values))
            else:
                assert past is not None
                put = self._joined if joined else self._with_own
                keys, values = (put(p[index], x, pack) for p, x in ((past.keys, k), (past.values, v)))
            z = self._attend(layer, index, q, keys, values, pack, queries, joined, edits, capture, seen)
        z = _tap("z", index, z, queries, edits, capture)
        return layer.out(z.reshape(-1, n_q * d))

    def _queries_keys_values(
        self, layer: Layer, index: int, x: Float[Tensor, "row d_model"], pack: Pack, queries: Layout,
        alike: Alike | None, edits: Edits, capture: Capture,
    ) -> tuple[Float[Tensor, "query head d"], Float[Tensor, "row kv d"], Float[Tensor, "row kv d"]]:  # fmt: skip
        """Queries, keys and values; the first two normalised and rotated where the model does that."""
        n_q, n_kv, d = self.n_heads, self.n_kv_heads, self.d_head
        tapped = any((kind, index) in edits or (kind, index) in capture.wanted for kind in "qkv")
        whole = queries is pack.all
        if alike is not None and whole and not tapped:
            first, kind = alike.first.to(x.device), alike.kind.to(x.device)
            qkv = layer.qkv(layer.ln1(x.index_select(0, first))).view(-1, n_q + 2 * n_kv, d)
            turn = None if layer.turns is None else layer.turns[pack.all.rows.position[first]]
            q, k = self._turned(layer, qkv[:, :n_q], qkv[:, n_q : n_q + n_kv], turn, turn)
            return q.index_select(0, kind), k.index_select(0, kind), qkv[:, n_q + n_kv :].index_select(0, kind)
        normal = layer.ln1(x)
        if whole:
            q, k, v = layer.qkv(normal).view(-1, n_q + 2 * n_kv, d).split([n_q, n_kv, n_kv], 1)
        else:
            k, v = layer.qkv(normal, slice(n_q * d, None)).view(-1, 2 * n_kv, d).split([n_kv, n_kv], 1)
            q = layer.qkv(pack.asked(normal), slice(n_q * d)).view(-1, n_q, d)
        if tapped:
            q = self.rotation.pair(_tap("q", index, self.rotation.unpair(q), queries, edits, capture))
            k = self.rotation.pair(_tap("k", index, self.rotation.unpair(k), pack.all, edits, capture))
            v = _tap("v", index, v, pack.all, edits, capture)
        turns = [None if layer.turns is None else pack.of_position(rows, layer.turns) for rows in (queries, pack.all)]
        return *self._turned(layer, q, k, *turns), v

    def _turned(
        self,
        layer: Layer,
        q: Float[Tensor, "query head d"],
        k: Float[Tensor, "row kv_head d"],
        of_q: Shaped[Tensor, "query ..."] | None,
        of_k: Shaped[Tensor, "row ..."] | None,
    ) -> tuple[Float[Tensor, "query head d"], Float[Tensor, "row kv_head d"]]:
        """Queries and keys after their norms and rotations."""
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if of_q is None or of_k is None:
            return q, k
        return self.rotation(q, of_q), self.rotation(k, of_k)

    def _with_own(
        self, clean: Float[Tensor, "example head pos d_head"], x: Float[Tensor, "row head d_head"], pack: Pack
    ) -> Float[Tensor, "item head key d_head"]:
        """Clean keys or values of every item [item, head, key, d], with the item's own in their places."""
        e, m = pack.n_examples, pack.n_cells
        if pack.n_past == 0 and pack.all.dense:
            return x.view(e * m, pack.all.width, *x.shape[1:]).transpose(1, 2)
        shape = (e, m, self.n_kv_heads, pack.n_keys, self.d_head)
        full = clean[:, None, :, : pack.n_keys].expand(shape).reshape(e * m, *shape[2:])
        # A copy by now, unless there is one item alone.
        full = full.clone() if full.data_ptr() == clean.data_ptr() else full
        full[pack.all.item, :, pack.all.rows.position] = x
        return full

    def _joined(
        self, clean: Float[Tensor, "example head pos d_head"], x: Float[Tensor, "row head d_head"], pack: Pack
    ) -> Float[Tensor, "item head key d_head"]:
        """Clean keys or values before any item's start, and behind them each item's own, at `Pack.key_positions`."""
        e, m, n_past = pack.n_examples, pack.n_cells, pack.n_past
        own = pack.all.pad(x).unflatten(0, (e, m))
        before = clean[:, :, :n_past].transpose(1, 2)[:, None].expand(e, m, n_past, *x.shape[1:])
        return torch.cat([before, own], 2).flatten(0, 1).transpose(1, 2)

    def _scores(self, scores: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        scores = scores * scale
        return torch.tanh(scores / self.soft_cap) * self.soft_cap if self.soft_cap > 0 else scores

    def _attend(
        self, layer: Layer, index: int, q: Float[Tensor, "query head d_head"],
        keys: Float[Tensor, "item kv_head key d_head"], values: Float[Tensor, "item kv_head key d_head"],
        pack: Pack, queries: Layout, joined: bool, edits: Edits, capture: Capture, seen: bool,
    ) -> Float[Tensor, "query head d_head"]:  # fmt: skip
        """Attention of each item's queries to its keys and values, as `_joined` gives them or at absolute positions."""
        n_kv, group = self.n_kv_heads, self.n_heads // self.n_kv_heads
        buckets = pack.buckets(queries)
        if seen:
            buckets = [Bucket(pack, queries, None, queries.width)]
        out = q.new_empty(q.shape) if len(buckets) > 1 else None
        for bucket in buckets:
            mine_k, mine_v = (x if bucket.items is None else x.index_select(0, bucket.items) for x in (keys, values))
            padded, mask = bucket.pad(q), bucket.mask(layer.window, q.dtype, joined)
            if not seen and self.soft_cap <= 0:
                z = F.scaled_dot_product_attention(
                    padded, mine_k, mine_v, attn_mask=mask, scale=layer.scale, enable_gqa=group > 1
                )
            else:
                shape = (bucket.n_items, n_kv, group * bucket.width)
                scores = self._scores(padded.reshape(*shape, self.d_head) @ mine_k.mT, layer.scale)
                scores = scores.view(bucket.n_items, self.n_heads, bucket.width, -1)
                pattern = (scores if mask is None else scores + mask).softmax(-1)
                if seen:
                    rows = queries.pack(pattern.transpose(1, 2))
                    pattern = queries.pad(_tap("pattern", index, rows, queries, edits, capture)).transpose(1, 2)
                z = (pattern.reshape(*shape, -1) @ mine_v).view(*padded.shape)
            out = bucket.pack_into(out, z)
        assert out is not None
        return out

    def _attend_split(
        self,
        layer: Layer,
        index: int,
        q: Float[Tensor, "query head d_head"],
        k: Float[Tensor, "row kv_head d_head"],
        v: Float[Tensor, "row kv_head d_head"],
        pack: Pack,
        queries: Layout,
        past: Cache,
    ) -> Float[Tensor, "query head d_head"]:
        """Attention of cells with few rows each: to clean keys, which an example's cells share, and to their own."""
        e, m, n_kv, group, d = (
            pack.n_examples,
            pack.n_cells,
            self.n_kv_heads,
            self.n_heads // self.n_kv_heads,
            self.d_head,
        )
        width, own_width, n_past = queries.width, pack.all.width, pack.n_past
        q6 = queries.pad(q).view(e, m, width, n_kv, group, d).permute(0, 3, 1, 4, 2, 5).contiguous()
        k5 = pack.all.pad(k).view(e, m, own_width, n_kv, d).permute(0, 3, 1, 2, 4)
        v5 = pack.all.pad(v).view(e, m, own_width, n_kv, d).permute(0, 3, 1, 2, 4)
        own_scores = (q6.view(e, n_kv, m, group * width, d) @ k5.mT).view(e, n_kv, m, group, width, own_width)
        keys, values = past.keys[index][:, :, :n_past], past.values[index][:, :, :n_past]
        past_scores = (q6.view(e, n_kv, m * group * width, d) @ keys.mT).view(e, n_kv, m, group, width, n_past)
        scores = self._scores(torch.cat([past_scores, own_scores], -1), layer.scale)
        mask = pack.split_mask(queries, layer.window, q.dtype)
        pattern = (scores if mask is None else scores + mask).softmax(-1)
        z = (pattern[..., n_past:].reshape(e, n_kv, m, group * width, own_width) @ v5).view(e, n_kv, -1, d)
        z = z + pattern[..., :n_past].reshape(e, n_kv, m * group * width, n_past) @ values
        z = z.view(e, n_kv, m, group, width, d).permute(0, 2, 4, 1, 3, 5).reshape(e * m, width, self.n_heads, d)
        return queries.pack(z)


def _tap(
    kind: str, layer: int, x: Float[Tensor, "row *feature"], layout: Layout, edits: Edits, capture: Capture
) -> Float[Tensor, "row *feature"]:
    """What flows on from a site: after its edits; taken where it is wanted, to where the rows come from."""
    for edit in edits.get((kind, layer), ()):
        x = edit(x, layout.rows)
    if (kind, layer) in capture.wanted:
        taken = x.to(layout.home.index.device)
        capture.taken[kind, layer] = (taken, layout.home)
        x = taken.to(x.device)  # so that what is taken is in the graph of what follows
    return x
