"""Which tokens a packed forward pass computes, and how they stand as rows and as rectangles."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechsteer.costs import BUCKETS, Counts, ragged, way_of
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows


class Layout:
    """Rows of items as a rectangle [item, width]: where each row stands in it."""

    def __init__(
        self, rows: Rows, item: Int[Tensor, " row"], slot: Int[Tensor, " row"], n_items: int, width: int
    ) -> None:
        self.rows, self.n_items, self.width = rows, n_items, width
        self.dense = rows.position.shape[0] == n_items * width
        self.index = item * width + slot
        self.item = item
        self._home: Layout | None = None

    def to(self, device: torch.device) -> "Layout":
        """The same layout, known on another device."""
        moved = copy.copy(self)
        moved.rows, moved.index, moved.item = self.rows.to(device), self.index.to(device), self.item.to(device)
        moved._home = self.home
        return moved

    @property
    def home(self) -> "Layout":
        """The layout that this one was moved from."""
        return self if self._home is None else self._home

    def pad(self, x: Float[Tensor, "row *feature"]) -> Float[Tensor, "item width *feature"]:
        """Rows as the rectangle, zero where there is none."""
        shape = (self.n_items, self.width, *x.shape[1:])
        if self.dense:
            return x.view(shape)
        return x.new_zeros(self.n_items * self.width, *x.shape[1:]).index_copy_(0, self.index, x).view(shape)

    def pack(self, x: Float[Tensor, "item width *feature"]) -> Float[Tensor, "row *feature"]:
        """The rectangle's rows."""
        flat = x.reshape(self.n_items * self.width, *x.shape[2:])
        return flat if self.dense else flat.index_select(0, self.index)

    def positions(self, fill: int) -> Int[Tensor, "item width"]:
        """Absolute position at each place; `fill` where there is no row."""
        full = self.index.new_full((self.n_items * self.width,), fill)
        return full.index_copy_(0, self.index, self.rows.position).view(self.n_items, self.width)


class Pack:
    """Which tokens a forward pass computes: `cells` cells of every example, each from its own position on.

    Items are ordered by example, then cell; rows by item, then position.

    Attributes:
        n_examples, n_cells: items are their product.
        start: first recomputed position of each item.
        group_of_row: which example, in the order given, each row belongs to.
        all: layout of all rows.
        last: layout of the rows that the last layer is asked for.
    """

    def __init__(
        self,
        rows_of: Callable[[Tensor, Tensor, Tensor], Rows],
        start: Int[Tensor, "group cell"],
        stop: Int[Tensor, "group cell"],
        read: Bool[Tensor, "group cell pos"] | None,
    ) -> None:
        """
        Args:
            rows_of: makes Rows from (which example, position, cell) of each row.
            start: first position to compute.
            stop: one after the last.
            read: positions that the last layer must give; None for all.
        """
        self.start = start
        self.n_examples, self.n_cells = start.shape
        n_items = start.numel()
        width = max(0, int((stop - start).max()))
        offset = torch.arange(width, device=start.device)
        position = start.reshape(-1, 1) + offset
        inside = position < stop.reshape(-1, 1)
        item, slot = inside.nonzero(as_tuple=True)
        position = position[item, slot]
        group, cell = item // self.n_cells, item % self.n_cells
        self.group_of_row = group
        self.all = Layout(rows_of(group, position, cell), item, slot, n_items, width)
        self.last, self.last_index = self.all, None
        if read is not None:
            keep = read.reshape(n_items, -1)[item, position].nonzero().squeeze(1)
            if keep.shape[0] < item.shape[0]:
                kept_item = item[keep]
                count = torch.zeros(n_items, dtype=torch.long, device=start.device)
                count = count.index_add(0, kept_item, torch.ones_like(kept_item))
                before = count.cumsum(0) - count
                kept_slot = torch.arange(len(keep), device=start.device) - before[kept_item]
                self.last = Layout(self.all.rows[keep], kept_item, kept_slot, n_items, max(1, int(count.max())))
                self.last_index = keep
        self.n_past = int(start.max())
        self.n_keys = int(stop.max())
        way = way_of(item.shape[0], n_items, width, self.n_past, self.n_keys)
        self.sparse, self.joined = way == "split", way == "joined"
        self._memo: dict[Any, Any] = {}

    def to(self, device: torch.device) -> "Pack":
        """The same tokens, known on another device; kept, because all layers there ask."""
        if self.start.device == device:
            return self
        key = ("to", device)
        if key not in self._memo:
            moved = copy.copy(self)
            moved._memo = {}
            moved.start, moved.group_of_row = self.start.to(device), self.group_of_row.to(device)
            moved.all = moved.last = self.all.to(device)
            if self.last_index is not None:
                moved.last, moved.last_index = self.last.to(device), self.last_index.to(device)
            self._memo[key] = moved
        return self._memo[key]

    def buckets(self, queries: Layout) -> "list[Bucket]":
        """The items in groups of like width, so that little of the attention is padding."""
        key = ("buckets", queries is self.last)
        if key not in self._memo:
            self._memo[key] = [Bucket(self, queries, items, width) for items, _, width in self._groups(queries)]
        return self._memo[key]

    def _groups(self, queries: Layout) -> list[tuple[Int[Tensor, " item"] | None, int, int]]:
        """Which items are in each bucket (None for all), how many, and the width of its rectangle."""
        key = ("groups", queries is self.last)
        if key not in self._memo:
            n_items = self.all.n_items
            if ragged(n_items, queries.width, queries.item.shape[0]):
                counts = torch.zeros(n_items, dtype=torch.long, device=self.start.device)
                counts = counts.index_add(0, queries.item, torch.ones_like(queries.item))
                counts, order = counts.sort(descending=True, stable=True)
                widest = zip(order.chunk(BUCKETS), counts.chunk(BUCKETS), strict=True)
                self._memo[key] = [(items, items.shape[0], int(width[0])) for items, width in widest]
            else:
                self._memo[key] = [(None, queries.n_items, queries.width)]
        return self._memo[key]

    def counts(self, *, own: bool = False) -> Counts:
        """How many tokens are computed, and how; where `own`, with a cache that the rows' own keys are written to."""
        way = "own" if own else "split" if self.sparse else "joined" if self.joined else "copied"
        keys = self.n_past + self.all.width if way in ("split", "joined") else self.n_keys

        def pairs(queries: Layout) -> float:
            if way == "split":
                return float(queries.n_items * queries.width * keys)
            return float(sum(n_items * width for _, n_items, width in self._groups(queries)) * keys)

        return Counts(
            self.all.n_items, self.all.item.shape[0], self.last.item.shape[0], self.all.width, self.last.width,
            self.n_past, self.n_keys, way, pairs(self.all), pairs(self.last),
        )  # fmt: skip

    def split_mask(self, queries: Layout, window: int | None, dtype: torch.dtype) -> Float[Tensor, "..."] | None:
        """What to add to scores of each query with (clean keys before the item's start, its own keys): 0 or -inf.

        None where every query attends to every key.
        """
        key = ("split", queries is self.last, window)
        if key not in self._memo:
            shape = (self.n_examples, 1, self.n_cells, 1)
            query = queries.positions(-1).view(*shape, queries.width, 1)
            start = self.start.reshape(*shape, 1, 1)
            past = torch.arange(self.n_past, device=start.device).expand(*shape, 1, -1)
            own = self.all.positions(1 << 30).view(*shape, 1, self.all.width)
            allowed = torch.cat([(past < start) & (past <= query), own <= query], -1)
            if window is not None:
                allowed = allowed & torch.cat([past > query - window, own > query - window], -1)
            self._memo[key] = _additive(allowed, query < 0, dtype)
        return self._memo[key]

    def asked(self, x: Float[Tensor, "row *feature"]) -> Float[Tensor, "last *feature"]:
        """Of all rows those that the last layer is asked for."""
        return x if self.last_index is None else x.index_select(0, self.last_index)

    def of_position(self, queries: Layout, table: Shaped[Tensor, "pos ..."]) -> Shaped[Tensor, "row ..."]:
        """What a table says of each row's position; kept, because all layers ask."""
        key = ("of_position", queries is self.last, id(table))
        if key not in self._memo:
            self._memo[key] = table.index_select(0, queries.rows.position)
        return self._memo[key]

    def key_positions(self, items: Int[Tensor, " item"] | None) -> Int[Tensor, "item key"]:
        """Positions of keys that stand as (clean ones, each item's own); past the last where an item has no such key.

        Args:
            items: which; None for all.
        """
        if "key_positions" not in self._memo:
            past = torch.arange(self.n_past, device=self.start.device).expand(self.all.n_items, -1)
            past = past.masked_fill(past >= self.start.reshape(-1, 1), 1 << 30)
            self._memo["key_positions"] = torch.cat([past, self.all.positions(1 << 30)], 1)
        found = self._memo["key_positions"]
        return found if items is None else found[items]


class Bucket:
    """Some items of a pack, and where their rows stand in rectangles of their own.

    Attributes:
        items: which, in the order of the rectangle; None for all in order.
        width: of the rectangle: as many as the queries of the item with the most.
        rows: their rows among the queries; None for all in order.
        place: where each of them stands in [item, width]; None where the rectangle is full.
    """

    def __init__(self, pack: Pack, queries: Layout, items: Int[Tensor, " item"] | None, width: int) -> None:
        self.items, self.pack, self.width = items, pack, width
        self.n_items = queries.n_items if items is None else items.shape[0]
        if items is None:
            self.rows = None
            self.place = None if queries.dense else queries.index
            self._query = queries.positions(-1)
        else:
            self._query = queries.positions(-1)[items, :width]
            full = queries.index.new_full((queries.n_items * queries.width,), -1)
            full = full.index_copy_(0, queries.index, torch.arange(queries.index.shape[0], device=items.device))
            row = full.view(queries.n_items, queries.width)[items, :width].reshape(-1)
            self.place = (row >= 0).nonzero().squeeze(1)
            self.rows = row[self.place]
            if self.place.shape[0] == row.shape[0]:
                self.place = None
        self._masks: dict[tuple[int | None, bool], Tensor | None] = {}

    def pad(self, x: Float[Tensor, "query head d"]) -> Float[Tensor, "item head width d"]:
        """Query rows [row, head, d] as [item, head, width, d]."""
        own = x if self.rows is None else x.index_select(0, self.rows)
        if self.place is not None:
            own = x.new_zeros(self.n_items * self.width, *x.shape[1:]).index_copy_(0, self.place, own)
        return own.view(self.n_items, self.width, *x.shape[1:]).transpose(1, 2)

    def pack_into(
        self, out: Float[Tensor, "query head d"] | None, padded: Float[Tensor, "item head width d"]
    ) -> Float[Tensor, "query head d"]:
        """[item, head, width, d] as query rows, in `out` where other buckets have theirs."""
        flat = padded.transpose(1, 2).reshape(self.n_items * self.width, padded.shape[1], padded.shape[3])
        own = flat if self.place is None else flat.index_select(0, self.place)
        if self.rows is None or out is None:
            return own
        return out.index_copy_(0, self.rows, own)

    def mask(
        self, window: int | None, dtype: torch.dtype, joined: bool = False
    ) -> Float[Tensor, "item 1 width key"] | None:
        """What to add to the scores [item, 1, width, key]: 0 or -inf; None for nothing.

        Args:
            joined: keys stand as `Pack.key_positions` says, and not each at its absolute position.
        """
        if (window, joined) not in self._masks:
            query = self._query[:, None, :, None]
            if joined:
                key = self.pack.key_positions(self.items)[:, None, None]
            else:
                key = torch.arange(self.pack.n_keys, device=query.device)
            allowed = key <= query
            if window is not None:
                allowed = allowed & (key > query - window)
            self._masks[window, joined] = _additive(allowed, query < 0, dtype)
        return self._masks[window, joined]


def _additive(
    allowed: Bool[Tensor, "*shape key"], empty: Bool[Tensor, "*shape one"], dtype: torch.dtype
) -> Float[Tensor, "*shape key"] | None:
    """A mask as what is added to scores. A place without a query attends to all, so that no softmax is over nothing.

    Of the scores' own dtype: PyTorch's attention on a CPU takes an fp32 mask with fp64 queries, and misreads it.
    """
    allowed = allowed | empty
    if bool(allowed.all()):
        return None
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))


def whole_pack(
    prompts: Prompts,
    index: Int[Tensor, " item"] | None = None,
    start: Int[Tensor, " item"] | None = None,
    stop: Int[Tensor, " item"] | None = None,
    *,
    read: Bool[Tensor, "item pos"] | None = None,
) -> Pack:
    """One item for each of the right-padded prompts in `index` (None: all), from `start` to before `stop`."""
    device = prompts.tokens.device
    which = torch.arange(len(prompts), device=device) if index is None else index
    first = torch.zeros_like(which) if start is None else start
    last = prompts.lengths[which] if stop is None else stop
    wanted = None if read is None else read[:, None]
    return Pack(lambda e, p, c: Rows(prompts, which[e], p, c), first[:, None], last[:, None], wanted)
