"""The kernels of a packed pass: what each computes and moves, in the order of `mechsteer.backends.decoder`.

Operations are those of `mechsteer.costs`, divided among the kernels; the rest is bytes. A kernel reads what it works on
from memory and writes what it makes: between kernels nothing is fused, in the engine as here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mechsteer.costs import Counts, Dims


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several alike.

    Attributes:
        kind: "matmul" (with weights), "attention", "norm", "act" (of an MLP), "rotation" (of queries and keys),
            "scatter" for rows that are written to their places, or "move" for what else only moves numbers.
        flops: operations.
        bytes: read and written.
        m, k, n: of a product [m, k] @ [k, n]; of an attention, queries and keys of an item, and d_head.
        times: how many there are.
    """

    kind: str
    flops: float | int
    bytes: float | int
    m: int = 0
    k: int = 0
    n: int = 0
    times: float | int = 1.0


@dataclass(frozen=True)
class Pass:
    """One batch through the engine.

    Attributes:
        counts: its rows.
        first, from_mlp: where it starts; a pass that starts behind the last layer only unembeds.
        logits: rows that are unembedded.
        alike: rows of the first layer that others are the same as, which get no queries, keys and values of their own.
        backward: with the gradient with respect to what entered.
        times: how many such batches there are.
    """

    counts: Counts
    first: int = 0
    from_mlp: bool = False
    logits: int = 0
    alike: int = 0
    backward: bool = False
    times: int = 1

    def flops(self, dims: Dims) -> float:
        """Operations of one of them, as the engine counts them."""
        return sum(
            each.flops * each.times * times for part, times in self.parts(dims) for each in part.kernels(dims, 4)
        )

    def parts(self, dims: Dims) -> "list[tuple[Part, float | int]]":
        """What it is made of, and how often: parts that are equal cost the same."""
        counts, back, last = self.counts, self.backward, dims.n_layers - 1
        made: list[tuple[Part, float | int]] = [(Part("start", counts, backward=back), 1.0)]
        if self.first <= last:
            made.append((Part("masks", counts), 1.0))
            own = self.from_mlp or self.alike or self.first == last
            if own:
                special = Part("layer", counts, self.first == last, self.from_mlp, self.alike, back)
                made.append((special, 1.0))
            between = last - self.first - (1 if own else 0)
            if between > 0:
                made.append((Part("layer", counts, backward=back), float(between)))
            if self.first < last:
                made.append((Part("layer", counts, True, backward=back), 1.0))
        if self.logits:
            made.append((Part("logits", None, rows=self.logits, backward=back), 1.0))
        return made

    def layers(self, dims: Dims) -> int:
        """Layers that one of them runs."""
        return dims.n_layers - self.first

    @property
    def kind(self) -> str:
        """What else it takes depends on: "back" with a gradient, "ragged" where the attention is computed in groups of
        like width, "past" where clean keys stand before its rows, and "plain"."""
        counts = self.counts
        if self.backward:
            return "back"
        if counts.pairs < counts.items * counts.width * counts.keys:
            return "ragged"
        return "past" if counts.n_past > 0 and counts.way != "own" else "plain"


@dataclass(frozen=True)
class Part:
    """A stretch of a pass.

    Attributes:
        name: "start", "masks", "layer" or "logits".
        counts: of the pass; None for logits.
        last, only_mlp: of a layer: whether it is the last one, and whether it begins at its MLP.
        rows: of logits; of a layer, those that get no queries, keys and values of their own.
        backward: with its gradient.
    """

    name: str
    counts: Counts | None
    last: bool = False
    only_mlp: bool = False
    rows: int = 0
    backward: bool = False

    def kernels(self, dims: Dims, itemsize: int) -> list[Kernel]:
        """Its kernels, each number of `itemsize` bytes."""
        counts = self.counts
        if counts is None:
            made = [
                move(4 * self.rows * dims.d_model, itemsize),
                matmul(self.rows, dims.d_model, dims.d_vocab, itemsize),
                # The objective reads them several times, as log-probabilities in fp32.
                move(4 * self.rows * dims.d_vocab, max(itemsize, 4)),
            ]
        elif self.name == "start":
            # Embeddings or kept states are taken, and edited.
            made = [move(2 * counts.rows * dims.d_model, itemsize), move(3 * counts.rows * dims.d_model, itemsize)]
        elif self.name == "masks":
            # What is kept of masks and positions is made once for all layers.
            made = [move(3 * counts.items * counts.width * counts.keys, itemsize)]
        else:
            made = layer(dims, counts, itemsize, last=self.last, only_mlp=self.only_mlp, alike=self.rows)
        return [*made, *_backward(made)] if self.backward else made


def matmul(m: int, k: int, n: int, itemsize: int) -> Kernel:
    """A product of rows with weights, which are read once."""
    return Kernel("matmul", 2.0 * m * k * n, float(itemsize) * (m * k + k * n + m * n), m, k, n)


def move(numbers: float | int, itemsize: int, times: float | int = 1.0, kind: str = "move") -> Kernel:
    """So many numbers read and written."""
    return Kernel(kind, 0.0, float(itemsize) * numbers, times=times)


def layer(
    dims: Dims, counts: Counts, itemsize: int, *, last: bool = False, only_mlp: bool = False, alike: int = 0
) -> list[Kernel]:
    """The kernels of a layer.

    Args:
        dims, counts: of model and pass.
        itemsize: bytes of a number.
        last: whether it is the last one, which computes only what is asked of it.
        only_mlp: without the attention.
        alike: rows that get no queries, keys and values of their own.
    """
    d, h, kv, f = dims.d_model, dims.attn_width, dims.kv_width, dims.d_mlp
    rows, queries = counts.rows, counts.last if last else counts.rows
    width, pairs = (counts.last_width, counts.last_pairs) if last else (counts.width, counts.pairs)
    made: list[Kernel] = []
    if not only_mlp:
        made.append(move(3 * rows * d, itemsize, kind="norm"))
        if last and queries < rows:
            made += [
                matmul(rows, d, 2 * kv, itemsize),
                matmul(queries, d, h, itemsize),
                move(2 * queries * d, itemsize),
            ]
        else:
            made.append(matmul(rows - alike, d, h + 2 * kv, itemsize))
        if alike:
            made.append(move(2 * rows * (h + 2 * kv), itemsize))
        made += [move(2 * size, itemsize, kind="rotation") for size in (queries * h, rows * kv)]
        made += _attention(dims, counts, itemsize, queries, width, pairs)
        made += [matmul(queries, h, d, itemsize), move(3 * queries * d, itemsize)]
    made += [move(3 * queries * d, itemsize, kind="norm"), matmul(queries, d, dims.mlp_in, itemsize)]
    made.append(move(2 * queries * f, itemsize, kind="act"))
    if dims.gated:
        made.append(move(3 * queries * f, itemsize))
    return [*made, matmul(queries, f, d, itemsize), move(3 * queries * d, itemsize)]


def _attention(
    dims: Dims, counts: Counts, itemsize: int, queries: int, width: int, pairs: float | int
) -> Iterable[Kernel]:
    h, kv, items, keys = dims.attn_width, dims.kv_width, counts.items, counts.keys
    flops = 4.0 * pairs * h
    places = pairs / max(1, keys)
    # A rectangle's places are emptied, and rows written into them; from there they are read.
    own = [move(items * counts.width * kv, itemsize, times=2), move(2 * counts.rows * kv, itemsize, 2, "scatter")]
    own = own if counts.rows < items * counts.width else []
    gaps = places > queries
    padded = [move(places * h, itemsize), move(2 * queries * h, itemsize, kind="scatter")] if gaps else []
    read = 4 if gaps else 2
    if counts.way == "split":
        # Scores of clean and own keys, joined, scaled, masked and made into a pattern one after the other.
        scores = items * width * keys * dims.n_heads
        yield Kernel("attention", flops, itemsize * 2.0 * (places * h + items * keys * kv), width, keys, dims.d_head)
        yield move(2 * scores, itemsize, times=5)
        yield from (
            *own,
            *padded,
            move(2 * places * h, itemsize),
            move(2 * items * counts.width * kv, itemsize, times=2),
        )
        # What clean and own values give is summed and put in order.
        yield move((3 + read) * places * h, itemsize)
        return
    written = move(2 * counts.rows * kv, itemsize, 2, "scatter")
    if counts.way == "own":
        yield written
    elif counts.n_past or counts.rows < items * counts.width:
        yield move(2 * items * keys * kv, itemsize, times=2)
        yield from own if counts.way == "joined" else [written]
    if places < items * width:
        # Groups of items take their queries, keys and values, and put what they give in its place.
        yield from (move(2 * items * keys * kv, itemsize, times=2), move(2 * queries * h, itemsize))
        yield move(2 * queries * h, itemsize, kind="scatter")
    yield from padded
    yield Kernel(
        "attention", flops, itemsize * (2.0 * places * h + 2.0 * items * keys * kv + places * keys), width, keys,
        dims.d_head,
    )  # fmt: skip
    yield move(read * places * h, itemsize)


def _backward(forward: Iterable[Kernel]) -> Iterable[Kernel]:
    """The kernels of a gradient with respect to what entered: each product with weights once more, those of the
    attention twice, and what is moved once more."""
    for each in forward:
        if each.kind == "attention":
            yield replace(each, flops=2 * each.flops, bytes=2 * each.bytes)
        elif each.kind == "matmul":
            yield replace(each, k=each.n, n=each.k)
        else:
            yield replace(each, bytes=1.5 * each.bytes)
