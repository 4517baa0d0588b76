"""The sweep engine: many cells in one batch, each from the layer and position that it touches first.

A cell is a tuple of interventions. Cells whose interventions differ only in values, heads, positions and examples share
a *shape* and are stacked: the residual stream where they start comes from one clean pass, which also gives the keys and
values of the positions before. `mechsteer.sweeps` decides which cells go together and when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer import memory
from mechsteer.activations import Activations, ModelId
from mechsteer.backends.decoder import KINDS as PACKED_KINDS
from mechsteer.backends.decoder import Cache, Capture, Decoder, key_of
from mechsteer.backends.packing import Pack, whole_pack
from mechsteer.costs import STAGES, Dims, batch_bytes, kept_bytes
from mechsteer.hooks import Intervention, columns_of, stacked_hooks
from mechsteer.memory import Memory
from mechsteer.model import Model
from mechsteer.objectives import Objective
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows, first_touched
from mechsteer.run import Run
from mechsteer.site import Site

Cell = tuple[Intervention, ...]


def shape_of(cell: Cell) -> tuple[Any, ...]:
    """What has to be equal for two cells to be stacked."""
    return tuple(
        (type(each), each.site.kind, each.site.layer, each.site.head is None, getattr(each, "everywhere", False))
        for each in cell
    )


def _stage(site: Site) -> int:
    """When a forward pass meets a site: 2 for each layer before it, and one more from `resid_mid` on.

    `resid_post` of a layer is met when the next one starts; embeddings are at -1.
    """
    return -1 if site.layer is None else 2 * site.layer + STAGES.get(site.kind, 0)


def first_stage(cell: Cell, n_layers: int) -> int:
    """The stage from which a cell has to be recomputed; the one after all layers where it touches nothing."""
    stages = [_stage(site) for each in cell for site in each.sites(n_layers)]
    return min(stages, default=2 * n_layers)


@dataclass
class Work:
    """Floating-point operations: done, those of gradients too, and the least that a pass from the cells' own layers and
    positions on needs."""

    done: float = 0.0
    least: float = 0.0


@dataclass
class Clean:
    """One pass over a chunk of the prompts without interventions, as far as the cells need it.

    Attributes:
        resid: what enters each stage that a cell starts at [example, pos, d_model].
        cache: keys and values of all layers.
        rows: logits at the read tokens, where some cell leaves one of them as it is.
        sites: activations that objectives read.
    """

    cache: Cache
    resid: dict[int, Tensor]
    rows: Float[Tensor, "read d_vocab"] | None
    sites: dict[tuple[str, int], Tensor]


@dataclass
class Engine:
    """Computes objectives of cells on prompts.

    Attributes:
        prompts: right-padded.
        read: tokens whose logits some objective reads.
        sites: hook points that some objective reads.
    """

    model: Model
    prompts: Prompts
    measures: Mapping[str, Objective]
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        masks = [mask for each in self.measures.values() if (mask := each.reads(self.prompts)) is not None]
        none = torch.zeros_like(self.prompts.mask)
        self.read: Bool[Tensor, "batch pos"] = torch.stack(masks).any(0) if masks else none
        self.sites: list[Site] = list(dict.fromkeys(site for each in self.measures.values() for site in each.sites()))
        for site in self.sites:
            self.model.check_site(site)
        self.decoder: Decoder | None = self.model.decoder
        self.model_id: ModelId = self.model.id
        # Parameters are found by walking all modules, which a brief sweep would feel each time.
        self._weights = memory.weights(self.model)
        if any(site.kind not in PACKED_KINDS for site in self.sites):
            self.decoder = None
        n_pos = self.prompts.tokens.shape[1]
        needed = self.prompts.mask if self.sites else self.read
        counts = torch.arange(n_pos, device=needed.device) + 1
        # Nothing after the last token that an objective reads needs computing.
        self.stop: Int[Tensor, " batch"] = (needed * counts).amax(1)

    def memory(self, stages: Sequence[int], *, rows: int, chunk: int, grad: bool = False) -> Memory:
        """What a sweep, or with `grad` a search, holds at its largest.

        Args:
            stages: that the cells start at.
            rows: tokens in a batch of cells.
            chunk: tokens of prompts whose clean pass is kept at a time.
            grad: whether the batch's graph is kept.
        """
        model, lengths = self.model, self.prompts.lengths
        tokens = int(lengths.sum())
        kept = min(tokens, max(chunk, int(lengths.max())))
        share = float(self.read.sum()) / tokens
        dims, size = Dims.of(model.cfg, model.d_vocab), model.dtype.itemsize
        parts = dict(self._weights) if self.decoder is not None else {"weights": self._weights["weights"]}
        parts["clean pass"] = kept_bytes(dims, size, kept, states=sum(stage >= 0 for stage in set(stages)))
        whole = batch_bytes(dims, size, kept, logits=int(share * kept))
        graph = dims.n_layers if grad else 0
        parts["batch"] = max(whole, batch_bytes(dims, size, rows, logits=int(share * rows), graph=graph))
        return Memory(parts, memory.held(model))

    def packs(self, cell: Cell) -> bool:
        """Whether the packed forward pass covers the cell; otherwise it takes TransformerLens's hooks."""
        kinds = {site.kind for each in cell for site in each.sites(self.model.n_layers)}
        return self.decoder is not None and kinds <= set(PACKED_KINDS)

    def starts(self, cells: Sequence[Cell]) -> Int[Tensor, "cell batch"]:
        """First position that each cell, all of one shape, changes in each example; `stop` where it changes none."""
        if not cells[0]:
            return self.stop.expand(len(cells), -1)
        firsts = [first_touched([cell[i].at for cell in cells], self.prompts) for i in range(len(cells[0]))]
        return torch.minimum(torch.stack(firsts).amin(0), self.stop)

    # ---- the clean pass ----

    def clean(self, chunk: Int[Tensor, " example"], stages: Sequence[int], *, logits: bool) -> Clean:
        """Run prompts `chunk` without interventions, and keep what cells that start at `stages` need."""
        decoder = self.decoder
        assert decoder is not None
        prompts = _take(self.prompts, chunk)
        # Objectives and late starts need the last layer whole; else only its keys and values are used.
        if self.sites or max(stages, default=0) >= 2 * decoder.n_layers - 1:
            pack = whole_pack(prompts)
        else:
            pack = whole_pack(prompts, read=self.read[chunk] if logits else torch.zeros_like(prompts.mask))
        capture = self._capture()
        resid: dict[int, Tensor] = {}
        slots = pack.all.rows

        def keep(layer: int, kind: str, x: Float[Tensor, "row d_model"]) -> None:
            stage = 2 * layer + (kind == "resid_mid")
            if stage in stages and x.shape[0] == slots.position.shape[0]:
                resid[stage] = _spread(x, slots, prompts)

        with torch.no_grad():
            cache = Cache.empty(decoder, *prompts.tokens.shape)
            x = decoder.embed(prompts.tokens[slots.example, slots.position], pack.all, {}, capture)
            x = decoder.blocks(x, pack, first=0, stop=decoder.n_layers, own=cache, capture=capture, keep=keep)
            self.work.done += decoder.flops(pack, first=0, own=True)
            if 2 * decoder.n_layers in stages:
                resid[2 * decoder.n_layers] = _spread(x, slots, prompts)
            rows = None
            if logits:
                read = self.read[chunk][pack.last.rows.example, pack.last.rows.position]
                rows = decoder.logits(x if bool(read.all()) else x[read])
                self.work.done += decoder.unembed_flops * rows.shape[0]
            sites = {key: _spread(taken, layout.rows, prompts) for key, (taken, layout) in capture.taken.items()}
        return Clean(cache, resid, rows, sites)

    def _capture(self) -> Capture:
        return Capture(frozenset(key_of(site) for site in self.sites))

    # ---- a batch of cells ----

    def batch(
        self,
        cells: Sequence[Cell],
        chunk: Int[Tensor, " example"],
        start: Int[Tensor, "cell example"],
        clean: Clean | None,
        *,
        grad: bool = False,
    ) -> dict[str, Float[Tensor, "cell example"]]:
        """Objectives of cells of one shape on the prompts `chunk`.

        Args:
            start: from `starts`, for these prompts.
            clean: from `clean`; None takes TransformerLens's hooks.
            grad: whether gradients can flow to what the interventions hold.
        """
        with torch.set_grad_enabled(grad):
            run = self._hooked(cells, chunk) if clean is None else self._packed(cells, chunk, start, clean)
            values = {name: measure(run) for name, measure in self.measures.items()}
        # Items are ordered by example, then cell.
        return {name: value.view(len(chunk), len(cells)).T for name, value in values.items()}

    def _packed(
        self,
        cells: Sequence[Cell],
        chunk: Int[Tensor, " example"],
        start: Int[Tensor, "cell example"],
        clean: Clean,
    ) -> Run:
        decoder, n_cells = self.decoder, len(cells)
        assert decoder is not None
        n_layers = decoder.n_layers
        start = start.T.contiguous()
        stop = self.stop[chunk][:, None].expand_as(start)
        read = self.read[chunk]
        item_read = read[:, None].expand(-1, n_cells, -1)
        pack = Pack(
            lambda example, position, cell: Rows(self.prompts, chunk[example], position, cell),
            start,
            stop,
            None if self.sites else item_read,
        )
        capture = self._capture()
        edits = {key_of(site): edit for site, edit in columns_of(cells, n_layers).items()}
        stage = first_stage(cells[0], n_layers)
        rows = pack.all.rows
        local = pack.group_of_row
        if stage < 0:
            x = decoder.embed(self.prompts.tokens[rows.example, rows.position], pack.all, edits, capture)
        elif stage < 2 * n_layers or cells[0]:
            kept = clean.resid[stage]
            x = kept.flatten(0, 1).index_select(0, local * kept.shape[1] + rows.position)
        else:
            x = decoder.W_E.new_zeros(0, decoder.W_E.shape[1])
        first, from_mlp = max(0, stage) // 2, stage > 0 and stage % 2 == 1
        before = ("resid_post", first - 1)
        if not from_mlp:
            for edit in edits.get(before, ()):
                x = edit(x, rows)
            if before in edits and before in capture.wanted:
                capture.taken[before] = (x, pack.all)
        computed = rows
        if first < n_layers and x.shape[0]:
            x = decoder.blocks(
                x, pack, first=first, stop=n_layers, from_mlp=from_mlp, past=clean.cache, edits=edits, capture=capture
            )
            computed = pack.last.rows
            grad = torch.is_grad_enabled()
            self.work.done += decoder.flops(pack, first=first, from_mlp=from_mlp, backward=grad)
        self.work.least += decoder.least_flops(start, stop, first, from_mlp, item_read)
        return self._run(n_cells, chunk, start, x, computed, pack, clean, capture)

    def _run(
        self, n_cells: int, chunk: Int[Tensor, " example"], start: Int[Tensor, "example cell"],
        x: Float[Tensor, "computed d_model"], computed: Rows, pack: Pack, clean: Clean,
        capture: Capture,
    ) -> Run:  # fmt: skip
        """The Run whose rows are the items, with clean values where nothing was computed."""
        decoder = self.decoder
        assert decoder is not None
        example = chunk.repeat_interleave(n_cells)
        prompts = _take(self.prompts, example)
        read = self.read[example]
        logits = x.new_zeros(0, decoder.d_vocab)
        if bool(self.read.any()):
            wanted = self.read[computed.example, computed.position]
            logits = decoder.logits(x if bool(wanted.all()) else x[wanted])
            self.work.done += decoder.unembed_flops * logits.shape[0] * (2 if torch.is_grad_enabled() else 1)
            n_pos = read.shape[1]
            fresh = read & (torch.arange(n_pos, device=read.device) >= start.reshape(-1, 1))
            if not torch.equal(fresh, read):
                assert clean.rows is not None
                # Which of the chunk's clean logits belongs to each read token of each item.
                place = torch.full((len(chunk), n_pos), -1, device=read.device)
                place[self.read[chunk]] = torch.arange(clean.rows.shape[0], device=read.device)
                rows = clean.rows[place.repeat_interleave(n_cells, 0)[read]]
                logits = rows.index_put((fresh[read].nonzero().squeeze(1),), logits)
        values: dict[Site, Tensor] = {}
        for site in self.sites:
            key = key_of(site)
            full = clean.sites[key].repeat_interleave(n_cells, 0)
            if key in capture.taken:
                taken, layout = capture.taken[key]
                full = _put(full, taken, layout.item, layout.rows.position, site)
            values[site] = full.transpose(1, 2) if site.axes[-1] == "src" else full
        activations = Activations(values, prompts=prompts, model=self.model_id)
        return Run(prompts, logits, read, activations, example)

    def _hooked(self, cells: Sequence[Cell], chunk: Int[Tensor, " example"]) -> Run:
        """The same through full forward passes with TransformerLens's hooks, all items in one batch."""
        n_cells = len(cells)
        example = chunk.repeat_interleave(n_cells)
        prompts = _take(self.prompts, example)
        cell = torch.arange(n_cells, device=chunk.device).repeat(len(chunk))
        columns = columns_of(cells, self.model.n_layers)
        hooks = stacked_hooks(columns, self.model, base=self.prompts, items=prompts, example=example, cell=cell)
        read = self.read[example]
        rows, taken = self.model.forward(prompts, hooks, self.sites, read=read)
        return Run(prompts, rows, read, Activations(taken, prompts=prompts, model=self.model_id), example)


def _take(prompts: Prompts, index: Int[Tensor, " row"]) -> Prompts:
    """Prompts by index, as wide as they were."""
    return replace(prompts, labels=())[index]


def _spread(x: Float[Tensor, "row *feature"], rows: Rows, prompts: Prompts) -> Float[Tensor, "batch pos *feature"]:
    """Rows [row, ...] of whole prompts as [batch, pos, ...]."""
    full = x.new_zeros(*prompts.tokens.shape, *x.shape[1:])
    return full.index_put((rows.example, rows.position), x)


def _put(
    full: Float[Tensor, "item pos ..."],
    x: Float[Tensor, "row ..."],
    item: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
    site: Site,
) -> Float[Tensor, "item pos ..."]:
    if site.axes[-1] == "src":
        n_src = full.shape[-1]
        x = torch.nn.functional.pad(x, (0, max(0, n_src - x.shape[-1])))[..., :n_src]
    return full.index_put((item, position), x)
