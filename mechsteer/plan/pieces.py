"""The pieces that all work is made of, batch by batch as the engine makes them: sweeps, generation, gradients."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mechsteer.costs import (
    CHUNK,
    GRAPH_ROWS,
    ROWS,
    STAGES,
    SWEEP_LOGITS,
    BatchSize,
    Counts,
    Dims,
    counted,
    kept_bytes,
    whole,
)
from mechsteer.plan.devices import Device
from mechsteer.plan.estimate import Work, batch_memory, taken
from mechsteer.plan.kernels import Part, Pass
from mechsteer.plan.shape import Shape

# Prompts that are generated side by side.
GENERATED = 128


@dataclass(frozen=True)
class Prompts:
    """Prompts that are alike.

    Attributes:
        n: how many.
        length: tokens of each, completions included.
        read: positions whose logits are read.
    """

    n: int
    length: int
    read: tuple[int, ...]

    @staticmethod
    def of(n: int, length: int, completion: int = 0) -> "Prompts":
        """With a completion that is scored, of which the tokens before it and in it are read; without one the last
        token is."""
        if completion:
            return Prompts(n, length + completion, tuple(range(length - 1, length + completion - 1)))
        return Prompts(n, length, (length - 1,))

    @property
    def stop(self) -> int:
        """One after the last position that is computed."""
        return self.read[-1] + 1 if self.read else 0


@dataclass(frozen=True)
class Cells:
    """Cells of a sweep that are stacked with each other.

    Attributes:
        stage: where they start; see `stage_of`.
        starts: (first position that they touch, how many).
    """

    stage: int
    starts: tuple[tuple[int, int], ...]

    @property
    def n(self) -> int:
        """How many."""
        return sum(cells for _, cells in self.starts)


def stage_of(kind: str, layer: int | None) -> int:
    """When a pass meets a site: 2 for each layer before it, and one more from `resid_mid` on; embeddings at -1."""
    return -1 if layer is None else 2 * layer + STAGES.get(kind, 0)


def nothing(dims: Dims) -> Cells:
    """One cell that touches nothing: a plain measurement."""
    return Cells(2 * dims.n_layers, ((1 << 30, 1),))


def swept(
    shape: Shape,
    groups: Sequence[Cells],
    prompts: Prompts,
    device: Device,
    *,
    name: str = "sweep",
    rows: int | None = None,
    note: str = "",
) -> Work:
    """A sweep.

    Args:
        shape: of the model.
        groups: all its cells.
        prompts: that it is over.
        device: that it is on.
        name: of the stage.
        rows: of a batch; None for what the engine finds to be fast, as it is foretold to be.
        note: of the stage.
    """
    dims = shape.dims
    groups = [Cells(each.stage, tuple((min(start, prompts.stop), n) for start, n in each.starts)) for each in groups]
    per = max(1, CHUNK[device.kind] // prompts.length)
    parts = {min(per, prompts.n): prompts.n // per if prompts.n > per else 1}
    if prompts.n > per and prompts.n % per:
        parts[prompts.n % per] = 1
    stages = {each.stage for each in groups}
    needs_logits = any(start > prompts.read[0] for each in groups for start, _ in each.starts)
    # Late starts need the last layer whole; else only its keys and values are used.
    late = max(stages) >= 2 * dims.n_layers - 1
    size, known = BatchSize(rows or ROWS[device.kind], fixed=rows is not None), {}
    passes: list[Pass] = []
    for n, times in parts.items():
        read = None if late else prompts.read if needs_logits else ()
        logits = n * len(prompts.read) if needs_logits else 0
        passes.append(Pass(whole(n, prompts.length, read), logits=logits, times=times))
        if not size.settled:
            # The size is searched for in the first batches, the very first of which waits for the clean pass.
            waited = taken(passes[-1], shape, device, known)[2]
            passes += _passes(shape, groups, prompts, n, size, device, known, waited)
            times -= 1
        if times:
            last = BatchSize(size.rows, fixed=True)
            found = _passes(shape, groups, prompts, n, last, device, known)
            passes += [replace(each, times=each.times * times) for each in found]
    largest = max(parts)
    kept = kept_bytes(
        dims, shape.itemsize, largest * prompts.length, states=sum(stage >= 0 for stage in stages),
        logits=largest * len(prompts.read) if needs_logits else 0,
    )  # fmt: skip
    batch = max(batch_memory(dims, each, shape.itemsize) for each in passes)
    cells = sum(each.n for each in groups)
    return Work(name, passes, cells=cells, splits=cells > 1, kept=kept, batch=batch, note=note)


def _passes(
    shape: Shape, groups: Sequence[Cells], prompts: Prompts, n: int, size: BatchSize, device: Device,
    known: dict[Part, tuple[float, float, float]], waited: float | int = 0.0,
) -> list[Pass]:  # fmt: skip
    """The batches of all groups on n of the prompts.

    Args:
        size: of a batch. It changes as that of the engine does, to which each batch tells how fast it was.
        waited: seconds that the first batch has to wait.
    """
    passes: list[Pass] = []
    made: dict[tuple[tuple[int, int], ...], list[tuple[Counts, int, int]]] = {}
    for group in groups:
        stage, settled = group.stage, size.settled
        batches = made.get(group.starts) if settled else None
        if batches is None:
            batches = []
            for cells, many in _batches(shape.dims, group.starts, prompts, n, size):
                if all(start >= prompts.stop for start, _ in cells):
                    continue
                counts = counted(cells, prompts.stop, prompts.read, n)
                logits = n * sum(k * sum(at >= start for at in prompts.read) for start, k in cells)
                batches.append((counts, logits, many))
                if not size.settled:
                    one = _pass(stage, counts, logits, many)
                    flops, _, seconds = taken(one, shape, device, known)
                    size.report(counts.rows, flops, seconds + waited)
                    waited = 0.0
            if settled:
                made[group.starts] = batches
        passes += [_pass(stage, *each) for each in batches]
    return passes


def _pass(stage: int, counts: Counts, logits: int, many: int) -> Pass:
    return Pass(counts, max(0, stage) // 2, stage > 0 and stage % 2 == 1, logits, times=many)


def _batches(
    dims: Dims, starts: Iterable[tuple[int, int]], prompts: Prompts, n: int, size: BatchSize
) -> Iterator[tuple[tuple[tuple[int, int], ...], int]]:
    """(starts of a batch's cells, how many such batches there are), as `mechsteer.batches` fills them: cells with most
    rows first, as many as there is room for."""
    most = max(1, SWEEP_LOGITS // (max(1, n * len(prompts.read)) * dims.d_vocab))
    left = deque(sorted(starts))
    while left:
        batch: list[tuple[int, int]] = []
        cells = used = 0
        many = 1
        while left and many == 1:
            start, there = left[0]
            cost = (prompts.stop - start) * n
            room = most - cells if not cost else min(most - cells, (size.rows - used) // cost)
            room = room if cells else max(1, room)
            if room < 1:
                break
            fit = min(there, room)
            if not cells and size.settled:
                # Full batches with the same start, all at once, but for one that others might still fit into.
                many = max(1, (there - 1) // room)
            batch.append((start, fit))
            cells, used = cells + fit, used + fit * cost
            left.popleft()
            if there > fit * many:
                left.appendleft((start, there - fit * many))
                break
        yield tuple(batch), many


def scored(shape: Shape, prompts: Prompts, device: Device, name: str = "scores", times: int = 1) -> Work:
    """Plain measurements of an objective, one sweep of one cell each."""
    return repeated(swept(shape, [nothing(shape.dims)], prompts, device, name=name), times)


def generated(shape: Shape, n: int, length: int, new: int, name: str = "completions", times: int = 1) -> Work:
    """Completions of `new` tokens of n prompts, all of them to the end."""
    dims = shape.dims
    passes: list[Pass] = []
    kept = 0
    parts = {min(n, GENERATED): max(1, n // GENERATED)}
    if n > GENERATED and n % GENERATED:
        parts[n % GENERATED] = 1
    for many, batches in parts.items():
        passes.append(Pass(whole(many, length, (length - 1,)), logits=many, times=batches * times))
        if new > 1:
            # One token each; on average half of the completion stands before it.
            keys = length + new // 2
            counts = Counts(many, many, many, 1, 1, 0, keys, "own", float(many * keys), float(many * keys))
            passes.append(Pass(counts, logits=many, times=batches * times * (new - 1)))
        kept = max(kept, kept_bytes(dims, shape.itemsize, many * (length + new)))
    batch = max(batch_memory(dims, each, shape.itemsize) for each in passes)
    return Work(name, passes, calls=times, kept=kept, batch=batch)


def recorded(shape: Shape, n: int, length: int, kinds: float | int, name: str = "states", times: int = 1) -> Work:
    """Whole forward passes through TransformerLens's hooks that keep `kinds` numbers of d_model at every layer."""
    dims = shape.dims
    one = Pass(whole(n, length, ()), times=times)
    kept = shape.itemsize * kinds * dims.n_layers * dims.d_model * n * length
    return Work(name, [one], calls=0, kept=kept, batch=batch_memory(dims, one, shape.itemsize))


def gradients(
    shape: Shape, n: int, prompts: Prompts, first: int, device: Device, *, cells: int = 1, name: str = "gradients"
) -> Work:
    """n forward and backward passes of all prompts from position `first` on, cells side by side."""
    dims = shape.dims
    cost = (prompts.stop - first) * cells
    per = max(1, min(prompts.n, GRAPH_ROWS[device.kind] // max(1, cost)))
    parts = {per: prompts.n // per} | ({prompts.n % per: 1} if prompts.n % per else {})
    passes = [
        Pass(
            counted([(first, cells)], prompts.stop, prompts.read, many), backward=True,
            logits=many * cells * len(prompts.read), times=batches * n,
        )
        for many, batches in parts.items()
    ]  # fmt: skip
    kept = kept_bytes(dims, shape.itemsize, prompts.n * prompts.length)
    batch = max(batch_memory(dims, each, shape.itemsize) for each in passes)
    return Work(name, passes, calls=0, kept=kept, batch=batch)


def repeated(work: Work, times: int) -> Work:
    """The same work several times, one after the other."""
    passes = [Pass(**{**vars(each), "times": each.times * times}) for each in work.passes]
    return Work(
        work.name, passes, work.cells * times, work.calls * times, work.host * times, work.splits, work.kept,
        work.batch, work.note, [*work.extra] * times,
    )  # fmt: skip


def together(name: str, parts: Sequence[Work], note: str = "") -> Work:
    """One stage of several pieces, one after the other."""
    return Work(
        name, [each for part in parts for each in part.passes], sum(part.cells for part in parts),
        sum(part.calls for part in parts), sum(part.host for part in parts), any(part.splits for part in parts),
        max(part.kept for part in parts), max(part.batch for part in parts), note,
        [each for part in parts for each in part.extra],
    )  # fmt: skip


def grid(axes: Mapping[str, int], layers: Sequence[int], kind: str, starts: Sequence[int]) -> list[Cells]:
    """The cells of a grid: for every layer all starts, each as often as the product of the other axes says."""
    many = 1
    for name, n in axes.items():
        many *= 1 if name in ("layer", "pos") else n
    return [Cells(stage_of(kind, layer), tuple((start, many) for start in starts)) for layer in layers]
