"""What a forward pass costs: the formulas that the pass which runs counts with, and a plan predicts with.

Nothing here needs torch, so that a plan of a large model is made in a moment. `Counts` says how many rows a packed pass
has (`mechsteer.backends.packing.Pack.counts` counts a real one, `counted` one that is only planned), and `Dims` what a
layer makes of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Groups of items of like width that the attention is computed in, so that little of it is padding.
BUCKETS = 4
# Of a sweep: tokens of prompts whose clean pass is kept at a time, rows that the first batch of cells has, and most
# logits of a batch.
CHUNK = {"cpu": 4096, "cuda": 65536}
ROWS = {"cpu": 1024, "cuda": 16384}
SWEEP_LOGITS = 1 << 25
# Of a batch of candidates: tokens, logits, and how many times the tokens may become in making them equally many for
# every candidate. About 2,000 tokens are fastest on a CPU, where the allocator eats what more would gain.
CANDIDATE_TOKENS = {"cpu": 2048, "cuda": 32768}
CANDIDATE_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}
CANDIDATE_EVEN = 1.1
# Steps of a "mixed" search for one `width` of candidates.
MIXED_PARTS = 4
# Rows of a batch whose graph is held.
GRAPH_ROWS = {"cpu": 4096, "cuda": 65536}
# Rows of the stream that go through one backward pass of a Jacobian side by side.
JACOBIAN_ROWS = {"cpu": 512, "cuda": 16384}
# What a layer's forward pass meets before its attention (0), before its MLP, and after both.
STAGES = {"resid_mid": 1, "mlp_pre": 1, "mlp_pre_linear": 1, "mlp_post": 1, "mlp_out": 1, "resid_post": 2}


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, d_vocab: as TransformerLens names them; `n_kv_heads` is
            `n_heads` without grouped queries.
        gated: whether the MLP has a gate, and so three matrices instead of two.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    gated: bool = True

    @staticmethod
    def of(cfg: Any, d_vocab: int) -> "Dims":
        """Those of a model that is loaded, from TransformerLens's config."""
        return Dims(
            cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head,
            cfg.d_mlp or 4 * cfg.d_model, d_vocab, bool(cfg.gated_mlp),
        )  # fmt: skip

    @property
    def attn_width(self) -> int:
        """Numbers in all heads of one token's query."""
        return self.n_heads * self.d_head

    @property
    def kv_width(self) -> int:
        """Numbers in all heads of one token's key; its value has as many."""
        return self.n_kv_heads * self.d_head

    @property
    def mlp_in(self) -> int:
        """Columns of what the MLP reads with: gate and linear part side by side in a gated one."""
        return self.d_mlp * (2 if self.gated else 1)

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's matrices; its norms and biases are left out."""
        attention = self.d_model * (2 * self.attn_width + 2 * self.kv_width)
        return attention + self.d_model * (self.mlp_in + self.d_mlp)

    @property
    def unembed_flops(self) -> int:
        """Operations of one token's logits."""
        return 2 * self.d_model * self.d_vocab

    def project_flops(self, rows: float | int) -> float:
        """Operations of the queries, keys and values of some rows."""
        return 2.0 * rows * self.d_model * (self.attn_width + 2 * self.kv_width)

    def layer_flops(
        self,
        rows: float | int,
        queries: float | int,
        pairs: float | int,
        *,
        from_mlp: bool = False,
        backward: bool = False,
    ) -> float:
        """Operations of a layer; a product and a sum are two.

        Args:
            rows: tokens that give keys and values.
            queries: tokens that all else is computed for.
            pairs: of query and key.
            from_mlp: without the attention.
            backward: with those of the gradient with respect to what enters. The weights get none, so that each of
                their products comes once more; those of the attention, between two activations, come twice more.
        """
        linear = 2.0 * queries * self.d_model * (self.mlp_in + self.d_mlp)
        between = 0.0
        if not from_mlp:
            linear += 4.0 * rows * self.d_model * self.kv_width + 4.0 * queries * self.d_model * self.attn_width
            between = 4.0 * pairs * self.attn_width
        return 2 * linear + 3 * between if backward else linear + between


@dataclass(frozen=True)
class Counts:
    """How many tokens a packed pass computes, and how its attention is laid out.

    Attributes:
        items: prompts x cells.
        rows: tokens in all items.
        last: tokens that the last layer is asked for.
        width, last_width: most rows of an item, and most that the last layer is asked for.
        n_past: clean keys before the latest start; 0 where items start at their first token.
        n_keys: one after the last position.
        way: how keys are had. "own": written to a cache and read from it; "split": clean keys, which cells share, and
            own ones apart; "joined": clean ones in front of own ones; "copied": own ones in the place of clean ones.
        pairs, last_pairs: of query and key, padding included.
    """

    items: int
    rows: int
    last: int
    width: int
    last_width: int
    n_past: int
    n_keys: int
    way: str
    pairs: float | int
    last_pairs: float | int

    @property
    def keys(self) -> int:
        """Keys that stand before each query, those that it may not see included."""
        return self.n_past + self.width if self.way in ("split", "joined") else self.n_keys


def pass_flops(dims: Dims, counts: Counts, *, first: int = 0, from_mlp: bool = False, backward: bool = False) -> float:
    """Operations of layers `first` to the last; from the MLP of the first on where `from_mlp`. `backward` as above."""
    total = 0.0
    for index in range(first, dims.n_layers):
        last = index == dims.n_layers - 1
        queries, pairs = (counts.last, counts.last_pairs) if last else (counts.rows, counts.pairs)
        mlp_only = from_mlp and index == first
        total += dims.layer_flops(counts.rows, queries, pairs, from_mlp=mlp_only, backward=backward)
    return total


def way_of(rows: int, items: int, width: int, n_past: int, n_keys: int) -> str:
    """How a pass with clean keys has its keys; see `Counts`."""
    # Recomputing few of many positions, cells share the clean keys; else each gets its own copy of all keys.
    if 4 * rows < items * n_keys:
        return "split"
    # Clean keys first and own ones behind them: a copy in two pieces, if that adds few keys that nobody sees.
    return "joined" if n_past > 0 and 5 * (n_past + width) <= 6 * n_keys else "copied"


def ragged(items: int, width: int, rows: int) -> bool:
    """Whether the attention of items of unlike width is computed in several groups."""
    return items * width > 1.3 * rows and items >= 2 * BUCKETS and width >= 8


def counted(starts: Iterable[tuple[int, int]], stop: int, read: Sequence[int] | None, n_prompts: int) -> Counts:
    """What a pack of like prompts counts.

    Args:
        starts: (first position that is computed, how many cells start there).
        stop: one after the last position.
        read: positions that the last layer is asked for, where they are computed; None for all.
        n_prompts: prompts, each with all cells.
    """
    runs = [(start, cells * n_prompts) for start, cells in starts]
    sizes = [(stop - start, items) for start, items in runs]
    asked = [] if read is None else [(sum(start <= at < stop for at in read), items) for start, items in runs]
    asked = asked or sizes
    items = sum(n for _, n in runs)
    rows, last = (sum(size * n for size, n in each) for each in (sizes, asked))
    width = max(size for size, _ in sizes)
    last_width = width if last == rows else max(1, *(size for size, _ in asked))
    n_past = max(start for start, _ in runs)
    way = way_of(rows, items, width, n_past, stop)
    keys = n_past + width if way in ("split", "joined") else stop

    def pairs(wide: int, all_sizes: list[tuple[int, int]], n: int) -> float:
        places = items * wide if way == "split" or not ragged(items, wide, n) else _bucketed(all_sizes, items)
        return float(places * keys)

    return Counts(
        items, rows, last, width, last_width, n_past, stop, way, pairs(width, sizes, rows),
        pairs(last_width, asked, last),
    )  # fmt: skip


def whole(n_prompts: int, length: int, read: Sequence[int] | None) -> Counts:
    """What a pass over whole prompts counts, which keeps its own keys; arguments as above."""
    last = n_prompts * (length if read is None else len(read))
    last_width = length if last == n_prompts * length else max(1, last // n_prompts)
    rows = n_prompts * length
    return Counts(
        n_prompts, rows, last, length, last_width, 0, length, "own", float(rows * length),
        float(n_prompts * last_width * length),
    )  # fmt: skip


# ---- batches ----


@dataclass
class BatchSize:
    """How many rows a batch has: doubled or halved as long as that is faster, and halved when memory runs out."""

    rows: int
    fixed: bool = False
    _best: float = 0.0
    _factor: float = 2.0
    _tried: int = 0

    @property
    def settled(self) -> bool:
        """Whether it changes no more."""
        return self.fixed or self._tried > 6

    def report(self, rows: int, flops: float, seconds: float) -> None:
        """Learn from a batch, unless it was too small to tell or the search is over."""
        if self.settled or rows < 0.7 * self.rows:
            return
        speed = flops / seconds
        if speed > 1.03 * self._best:
            self._best = speed
            self.rows = max(64, int(self.rows * self._factor))
        else:
            # Back to the best so far; then the other direction, once.
            self.rows = int(self.rows / self._factor)
            if self._factor > 1 and self._tried <= 2:
                self._factor = 0.5
                self.rows = max(64, int(self.rows * self._factor))
            else:
                self.fixed = True
        self._tried += 1

    def out_of_memory(self) -> None:
        self.rows, self.fixed = max(1, self.rows // 2), True


# ---- memory ----


def kept_bytes(dims: Dims, itemsize: int, tokens: int, *, states: int = 0, logits: int = 0) -> int:
    """What stays of a clean pass while batches are computed from it.

    Args:
        itemsize: bytes of a number.
        tokens: whose keys and values are kept, in all layers.
        states: stages before which the residual stream of these tokens is kept.
        logits: rows of logits that are kept.
    """
    return itemsize * (tokens * (2 * dims.n_layers * dims.kv_width + states * dims.d_model) + logits * dims.d_vocab)


def batch_bytes(
    dims: Dims,
    itemsize: int,
    rows: int,
    *,
    logits: int,
    keys: int | None = None,
    scores: int = 0,
    graph: int = 0,
) -> int:
    """What one batch of the packed pass holds at its largest: of the layer that is computed, or a graph of many layers.

    Args:
        itemsize: bytes of a number.
        rows: tokens that are computed.
        logits: rows of logits that are computed.
        keys: in all items, that are copied for the attention; None for as many as rows.
        scores: pairs of query and key whose scores are written out.
        graph: layers whose graph is kept for a backward pass; 0 for none.
    """
    # What is summed is in fp32 at least: norms, and log-probabilities of what a gradient goes back from.
    wide = max(itemsize, 4)
    if graph:
        # Saved by each layer: what its norms read, queries, and the MLP's products with what its non-linearity gave.
        # Weights get no gradients, so that what they are multiplied with need not be kept.
        layer = 2 * dims.d_model * wide + itemsize * (dims.attn_width + (3 if dims.gated else 1) * dims.d_mlp)
        return rows * graph * layer + logits * dims.d_vocab * (itemsize + wide)
    # The stream, its norm, and the MLP's products, or the queries, keys and values with their copies.
    copies = (rows if keys is None else keys) * 4 * dims.kv_width + scores * dims.n_heads
    attention = rows * 2 * (dims.attn_width + dims.kv_width) + copies
    numbers = rows * 3 * dims.d_model + max(rows * (dims.mlp_in + dims.d_mlp), attention)
    return itemsize * (numbers + logits * dims.d_vocab)


def _bucketed(sizes: Sequence[tuple[int, int]], items: int) -> int:
    """Places of the rectangles that items of these sizes (size, how many) are computed in: largest ones first, in
    `BUCKETS` groups as `torch.chunk` makes them."""
    room = -(-items // BUCKETS)
    places, left, widest = 0, 0, 0
    for size, n in sorted(sizes, reverse=True):
        while n:
            if not left:
                left, widest = room, size
            taken = min(left, n)
            places, left, n = places + taken * widest, left - taken, n - taken
    return places
