"""Plans: what a piece of work will take, stage by stage, and how it is shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mechsteer import markup
from mechsteer.costs import Dims, batch_bytes
from mechsteer.plan.devices import Device
from mechsteer.plan.kernels import Kernel, Part, Pass
from mechsteer.plan.shape import Shape


@dataclass(frozen=True)
class Work:
    """A stage before it is costed.

    Attributes:
        name: of the stage.
        passes: batches, alike ones together.
        cells: that the host makes and measures one by one.
        calls: sweeps or searches that it is made of.
        host: seconds that the host needs besides, on one worker.
        splits: whether its batches can be shared among workers.
        kept: bytes that stay while it runs: clean states, keys and values.
        batch: bytes of its largest batch.
        note: what the numbers leave out.
        extra: kernels that belong to no pass.
    """

    name: str
    passes: Sequence[Pass]
    cells: float | int = 0.0
    calls: float | int = 1.0
    host: float | int = 0.0
    splits: bool = False
    kept: float | int = 0.0
    batch: float | int = 0.0
    note: str = ""
    extra: Sequence[Kernel] = ()


@dataclass(frozen=True)
class Stage:
    """What a stage will take.

    Attributes:
        name: of it.
        flops: operations.
        bytes: read and written by its kernels: weights once for each batch, activations, keys and values.
        memory: bytes at its peak, weights included.
        seconds: of wall time, on all workers.
        batches: how many.
        note: what the numbers leave out.
    """

    name: str
    flops: float | int
    bytes: float | int
    memory: float | int
    seconds: float | int
    batches: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a piece of work will take.

        plan = ms.plan_sweep("google/gemma-2-9b-it", axes={"layer": 42, "pos": 64}, prompts=100, positions=64,
                             device="h100", dtype="bfloat16")
        plan.seconds, plan.gpu_hours, plan.memory

    Attributes:
        work: what is planned, in words.
        shape: of the model.
        device: that it is planned for.
        workers: how many of these.
        stages: one after the other.
        notes: what is assumed.
    """

    work: str
    shape: Shape
    device: Device
    workers: int
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def flops(self) -> float:
        """Floating-point operations, a product and a sum being two."""
        return sum(stage.flops for stage in self.stages)

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def memory(self) -> float:
        """Bytes at the peak of one worker."""
        return max((stage.memory for stage in self.stages), default=0.0)

    @property
    def seconds(self) -> float:
        """Wall time, on all workers; without loading the model."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Hours of one device that are paid for: workers x wall time."""
        return self.workers * self.seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether the peak fits the device's memory."""
        return self.memory <= self.device.memory

    def as_json(self) -> dict[str, Any]:
        """All of it, for documents."""
        return {
            "work": self.work, "model": self.shape.as_json(), "device": self.device.name,
            "measured": self.device.measured, "workers": self.workers, "flops": self.flops, "bytes": self.bytes,
            "memory": self.memory, "device_memory": self.device.memory, "fits": self.fits, "seconds": self.seconds,
            "gpu_hours": self.gpu_hours, "stages": [asdict(stage) for stage in self.stages], "notes": list(self.notes),
        }  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """A table of texts: stage, operations, bytes, memory, wall time, and notes; of several stages the sum last."""
        rows = [_row(stage.name, stage, stage.note) for stage in self.stages]
        return [*rows, _row("all", self, "")] if len(rows) > 1 else rows

    def __repr__(self) -> str:
        return (
            f"Plan({self.work} on {self.workers} x {self.device.name}: {quantity(self.flops, 'FLOP')}, "
            f"{size(self.memory)}, {duration(self.seconds)}, {self.gpu_hours:.2g} device-hours)"
        )

    def _repr_html_(self) -> str:
        table = markup.table(("stage", "operations", "bytes moved", "memory", "wall time", ""), self.rows())
        about = f"{self.work}; {self.workers} x {self.device.name}, {self.gpu_hours:.2g} device-hours"
        return markup.card("Plan", table, markup.lines(self.notes), about=about)


def _row(name: str, one: "Stage | Plan", note: str) -> tuple[str, ...]:
    return name, quantity(one.flops, "FLOP"), size(one.bytes), size(one.memory), duration(one.seconds), note


def estimate(
    work: str, stages: Sequence[Work], shape: Shape, device: Device, workers: int, notes: Sequence[str] = ()
) -> Plan:
    """The plan of some stages."""
    return Plan(
        work, shape, device, workers, tuple(costed(stage, shape, device, workers) for stage in stages), tuple(notes)
    )


def costed(work: Work, shape: Shape, device: Device, workers: int) -> Stage:
    """What a stage will take on a device."""
    flops = moved = 0.0
    units: list[tuple[float, int]] = []
    known: dict[Part, tuple[float, float, float]] = {}
    for one in work.passes:
        found = taken(one, shape, device, known)
        flops += found[0] * one.times
        moved += found[1] * one.times
        units.append((found[2], one.times))
    cells = work.cells * device.cell_seconds
    # Each call looks whether the weights are still the same, which reads them once.
    extra = [*work.extra, Kernel("move", 0.0, weights_memory(shape) / 2, times=work.calls)]
    flops += sum(each.flops * each.times for each in extra)
    moved += sum(each.bytes * each.times for each in extra)
    alone = work.calls * device.call_seconds + work.host + sum(device.seconds(each, shape.dtype) for each in extra)
    total = sum(seconds * times for seconds, times in units) + cells
    if workers > 1 and work.splits and total:
        # Shards are dealt out whole: one worker ends at most one of them later than the mean.
        longest = max(seconds for seconds, _ in units)
        batches = sum(times for _, times in units)
        total = max(total * math.ceil(batches / workers) / batches, total / workers, longest)
    memory = weights_memory(shape) + work.kept + work.batch
    return Stage(work.name, flops, moved, memory, alone + total, sum(one.times for one in work.passes), work.note)


def taken(
    one: Pass, shape: Shape, device: Device, known: dict[Part, tuple[float, float, float]]
) -> tuple[float, float, float]:
    """Operations, bytes and seconds of one batch; `known` keeps those of its parts, which many batches have."""
    dims = shape.dims
    flops = moved = kernels = rest = 0.0
    for part, often in one.parts(dims):
        if part not in known:
            made = part.kernels(dims, shape.itemsize)
            known[part] = (
                sum(each.flops * each.times for each in made), sum(each.bytes * each.times for each in made),
                sum(device.seconds(each, shape.dtype) for each in made),
            )  # fmt: skip
        found = known[part]
        flops, moved = flops + found[0] * often, moved + found[1] * often
        if part.name == "logits":
            rest += found[2] * often
        else:
            kernels += found[2] * often
    seconds = device.time(
        kernels, one.layers(dims), rest=rest, kind=one.kind, rows=one.counts.rows, d_model=dims.d_model
    )
    return flops, moved, seconds


def weights_memory(shape: Shape) -> float:
    """Bytes of the weights while the engine runs: TransformerLens's, and the packed pass's copies of the matrices in
    the order that a product wants. Untied, as TransformerLens has them."""
    dims = shape.dims
    return 2.0 * shape.itemsize * (dims.n_layers * dims.layer_weights + 2 * dims.d_vocab * dims.d_model)


def batch_memory(dims: Dims, one: Pass, itemsize: int) -> int:
    """Bytes that a batch needs at once."""
    counts = one.counts
    return batch_bytes(
        dims, itemsize, counts.rows, logits=one.logits,
        keys=counts.items * counts.keys if counts.way in ("joined", "copied") else 0,
        scores=2 * counts.items * counts.width * counts.keys if counts.way == "split" else 0,
        graph=max(1, dims.n_layers - one.first) if one.backward else 0,
    )  # fmt: skip


# ---- how numbers read ----


def _scaled(value: float | int, units: Sequence[str], step: float | int) -> str:
    place = 0
    while value >= step and place < len(units) - 1:
        value, place = value / step, place + 1
    return f"{value:.3g} {units[place]}"


def quantity(value: float | int, unit: str) -> str:
    """A count with a prefix, as in "3.2 TFLOP"."""
    return _scaled(value, [f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")], 1000.0)


def size(value: float | int) -> str:
    """Bytes, 10^9 to the GB."""
    return _scaled(value, ["B", "kB", "MB", "GB", "TB", "PB", "EB"], 1000.0)


def duration(seconds: float | int) -> str:
    """Wall time, as in "2.5 min"."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} us"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def told(options: Mapping[str, Any]) -> str:
    """Options in words, as in "layer 26 x pos 32"."""
    return " x ".join(f"{name} {value}" for name, value in options.items())
