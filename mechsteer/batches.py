"""The cells of a sweep in batches: which are stacked, in what order, how many at a time."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.costs import CHUNK, SWEEP_LOGITS, BatchSize
from mechsteer.engine import Cell, Clean, Engine, first_stage, shape_of
from mechsteer.memory import Memory, devices_of
from mechsteer.progress import Bar
from mechsteer.prompts import Prompts
from mechsteer.store import Store, Values


@dataclass
class Group:
    """Cells of one shape.

    Attributes:
        members: their indices.
        starts: first position that each changes in each prompt [cell, batch].
        packed: whether the packed forward pass covers them.
        stage: see `mechsteer.engine.first_stage`.
    """

    members: list[int]
    starts: Int[Tensor, "cell batch"]
    packed: bool
    stage: int

    @staticmethod
    def of(engine: Engine, members: list[int], cells: Sequence[Cell]) -> "Group":
        own = [cells[index] for index in members]
        stage = first_stage(own[0], engine.model.n_layers)
        packed = engine.packs(own[0])
        starts = engine.starts(own) if packed else torch.zeros(len(own), len(engine.prompts), dtype=torch.long)
        return Group(members, starts.to(engine.prompts.tokens.device), packed, stage)


@dataclass(frozen=True)
class Batch:
    """Cells of one shape on some of the prompts: what is computed at once, so that its numbers depend on nothing else.

    Attributes:
        chunk, group: of the grid.
        places: of the cells among the group's members.
    """

    chunk: int
    group: int
    places: tuple[int, ...]


class Grid:
    """The cells of a sweep, in groups of one shape, and its prompts, in chunks.

    Attributes:
        engine: what computes them.
        cells: all of them.
        groups: those that can be stacked.
        chunk: how many tokens these have, at most.
        chunks: indices of prompts whose clean pass is kept at a time.
    """

    def __init__(self, engine: Engine, cells: Sequence[Cell], *, chunk: int | None = None) -> None:
        by_shape: dict[Any, list[int]] = {}
        for index, cell in enumerate(cells):
            by_shape.setdefault(shape_of(cell), []).append(index)
        for members in by_shape.values():
            engine.model.check_slots(engine.prompts, cells[members[0]])
        self.engine, self.cells = engine, cells
        self.groups = [Group.of(engine, members, cells) for members in by_shape.values()]
        self.chunk = chunk or CHUNK.get(engine.model.device.type, CHUNK["cuda"])
        self.chunks = list(_chunks(engine.prompts, self.chunk))
        # Of the chunk, and of the chunk and group, that are computed now: every batch of them asks.
        self._clean: tuple[int, Clean | None] = (-1, None)
        self._counted: tuple[tuple[int, int], tuple[list[int], int]] = ((-1, -1), ([], 0))

    def memory(self, rows: int) -> Memory:
        """What is held at its largest with batches of so many rows."""
        return self.engine.memory([group.stage for group in self.groups], rows=rows, chunk=self.chunk)

    def check_memory(self) -> None:
        """Refuse what does not fit in the memory that is free, whatever the batches.

        Raises:
            MechsteerError: it does not.
        """
        stages, longest = [group.stage for group in self.groups], int(self.engine.prompts.lengths.max())
        least = self.engine.memory(stages, rows=longest, chunk=1)
        advice = "Pass shorter prompts, or load the model with dtype=torch.bfloat16."
        least.check("This sweep", devices_of(self.engine.model), advice)

    def counts(self, chunk: int, group: int) -> tuple[list[int], int]:
        """Tokens that each cell of a group computes in a chunk, and how many tokens of the chunk are read."""
        if self._counted[0] != (chunk, group):
            index, stacked = self.chunks[chunk], self.groups[group]
            if stacked.packed:
                rows = (self.engine.stop[index] - stacked.starts[:, index]).sum(1).tolist()
            else:
                rows = [self.engine.prompts.tokens[index].numel()] * len(stacked.members)
            self._counted = (chunk, group), (rows, int(self.engine.read[index].sum()))
        return self._counted[1]

    def left(self, chunk: int, group: int, done: np.ndarray) -> list[int]:
        """Places of a group's cells that are not done on a chunk; those with as many rows next to each other."""
        local, (rows, _) = self.chunks[chunk].cpu().numpy(), self.counts(chunk, group)
        left = [place for place, cell in enumerate(self.groups[group].members) if not done[cell, local].all()]
        return sorted(left, key=lambda place: -rows[place])

    def first(self, chunk: int, group: int, left: Sequence[int], rows: int) -> tuple[Batch, int]:
        """The batch that the cells at `left` begin with, of at most `rows` rows if it has several cells; its rows."""
        counts, reads = self.counts(chunk, group)
        # Logits of more tokens than this would take more memory than everything else.
        most = max(1, SWEEP_LOGITS // (reads * self.engine.model.d_vocab)) if reads else len(left)
        n_cells, n_rows = 0, 0
        while n_cells < min(len(left), most) and (not n_cells or n_rows + counts[left[n_cells]] <= rows):
            n_rows += counts[left[n_cells]]
            n_cells += 1
        return Batch(chunk, group, tuple(left[:n_cells])), n_rows

    def batches(self, done: np.ndarray, rows: int) -> list[Batch]:
        """Those of the grid's batches of `rows` rows that are not done.

        They are the same whatever is done: which cells share a batch has a part in the last bits of their numbers.
        """
        found: list[Batch] = []
        nothing = np.zeros_like(done)
        for chunk in range(len(self.chunks)):
            for group in range(len(self.groups)):
                left = self.left(chunk, group, nothing)
                while left:
                    batch, _ = self.first(chunk, group, left, rows)
                    left = left[len(batch.places) :]
                    if not self.is_done(batch, done):
                        found.append(batch)
        return found

    def is_done(self, batch: Batch, done: np.ndarray) -> bool:
        """Whether all cells of a batch are done on all of its prompts."""
        return bool(done[np.asarray(self.members(batch))[:, None], self.prompts(batch)].all())

    def members(self, batch: Batch) -> list[int]:
        """Indices of a batch's cells."""
        return [self.groups[batch.group].members[place] for place in batch.places]

    def prompts(self, batch: Batch) -> np.ndarray:
        """Indices of a batch's prompts."""
        return self.chunks[batch.chunk].cpu().numpy()

    def compute(self, batch: Batch) -> Values:
        """The objectives of a batch."""
        group, chunk, members = self.groups[batch.group], self.chunks[batch.chunk], self.members(batch)
        clean = self._clean_of(batch.chunk) if group.packed else None
        starts = group.starts[list(batch.places)][:, chunk]
        values = self.engine.batch([self.cells[cell] for cell in members], chunk, starts, clean)
        return Values(members, self.prompts(batch), {name: _numpy(value) for name, value in values.items()})

    def _clean_of(self, chunk: int) -> Clean | None:
        if self._clean[0] != chunk:
            self._clean = -1, None  # the one before need not be kept beside it
            groups = [group for group in self.groups if group.packed]
            self._clean = chunk, _clean(self.engine, groups, self.chunks[chunk])
        return self._clean[1]


def run_here(grid: Grid, store: Store, size: BatchSize, shown: Bar) -> None:
    """All that is not done, in this process, in batches whose size is searched by speed.

    Raises:
        MechsteerError: not even the smallest batch fits in memory.
    """
    work = grid.engine.work
    if not store.done.all():
        grid.check_memory()
    try:
        for chunk, group in itertools.product(range(len(grid.chunks)), range(len(grid.groups))):
            left = grid.left(chunk, group, store.done)
            while left:
                batch, n_rows = grid.first(chunk, group, left, size.rows)
                before, began = work.least, time.perf_counter()
                try:
                    values = grid.compute(batch)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if len(batch.places) == 1 or not is_out_of_memory(error):
                        raise
                    size.out_of_memory()
                    size.rows = min(size.rows, max(1, n_rows // 2))
                    continue
                packed = grid.groups[group].packed
                size.report(n_rows, work.least - before if packed else float(n_rows), time.perf_counter() - began)
                shown.advance(store.add(values))
                left = left[len(batch.places) :]
    finally:
        store.flush()


def _numpy(value: Float[Tensor, "cell example"]) -> np.ndarray:
    # numpy has no bfloat16.
    return (value if value.dtype == torch.float64 else value.float()).cpu().numpy()


def _clean(engine: Engine, groups: Sequence[Group], chunk: Int[Tensor, " example"]) -> Clean | None:
    if not groups:
        return None
    counts = torch.arange(engine.read.shape[1], device=chunk.device)
    read = engine.read[chunk]
    first_read = torch.where(read, counts, 1 << 30).amin(1)
    logits = any(bool((group.starts[:, chunk] > first_read).any()) for group in groups)
    return engine.clean(chunk, [group.stage for group in groups], logits=logits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _chunks(prompts: Prompts, tokens: int) -> Iterator[Tensor]:
    """Indices of prompts, about `tokens` tokens at a time."""
    part: list[int] = []
    total = 0
    for index, length in enumerate(prompts.lengths.tolist()):
        if part and total + length > tokens:
            yield torch.tensor(part, device=prompts.tokens.device)
            part, total = [], 0
        part.append(index)
        total += length
    yield torch.tensor(part, device=prompts.tokens.device)
