"""What machines can do: published peaks of named GPUs, and the shares of them that are assumed to be reached.

Peaks are dense (without sparsity) and from the vendor's data sheets: "NVIDIA A100 Tensor Core GPU" (2021), "NVIDIA H100
Tensor Core GPU" (SXM, 2022), "NVIDIA H200 Tensor Core GPU" (2023), "NVIDIA L4" (2023), "NVIDIA L40S" (2023), "NVIDIA
Ada GPU architecture" (RTX 4090, bf16 with fp32 accumulation) and "NVIDIA Ampere GA102 GPU architecture" (RTX 3090,
likewise). `mechsteer.plan.here` measures the machine that it runs on instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mechsteer.errors import MechsteerError
from mechsteer.plan.kernels import Kernel

T, G = 1e12, 1e9
# Shares of the peaks that large products and copies are assumed to reach, and the host's seconds: for what a layer, a
# batch and a whole sweep or search do besides. They are assumptions, which `mechsteer plan --device here` replaces by
# measurements on the machine that it runs on.
MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.6, 0.3, 0.75
LAYER_SECONDS, BATCH_SECONDS, CALL_SECONDS = 4e-4, 2e-3, 0.1
# How many times as long a layer and a batch take the host by the kind of the pass (`mechsteer.plan.kernels.Pass.kind`).
LAYER_TIMES = {"plain": 1.0, "past": 1.5, "ragged": 1.5, "back": 3.0}
BATCH_TIMES = {"plain": 1.0, "past": 1.0, "ragged": 1.0, "back": 2.0}


@dataclass(frozen=True)
class Table:
    """Measured values over one or two sizes, read between them on logarithmic scales, and at their ends beyond.

    Attributes:
        x, y: the sizes; one y for values over x alone.
        values: [x][y].
    """

    x: Sequence[float | int]
    y: Sequence[float | int]
    values: Sequence[Sequence[float | int]]

    def at(self, x: float | int, y: float | int = 1.0) -> float:
        """The value between the nearest measured ones."""
        (i, u), (j, v) = _place(self.x, x), _place(self.y, y)

        def value(a: int, b: int) -> float:
            return math.log(self.values[min(a, len(self.x) - 1)][min(b, len(self.y) - 1)])

        low = value(i, j) * (1 - v) + value(i, j + 1) * v
        high = value(i + 1, j) * (1 - v) + value(i + 1, j + 1) * v
        return math.exp(low * (1 - u) + high * u)


def _place(points: Sequence[float | int], x: float | int) -> tuple[int, float]:
    """Between which points, and how far from the first of them."""
    if x <= points[0] or len(points) == 1:
        return 0, 0.0
    for index in range(len(points) - 1):
        if x <= points[index + 1]:
            low, high = math.log(points[index]), math.log(points[index + 1])
            return index, (math.log(x) - low) / (high - low)
    return len(points) - 1, 0.0


@dataclass(frozen=True)
class Device:
    """A machine, as far as the time of a pass depends on it.

    Attributes:
        name: of it.
        kind: "cpu" or "cuda", which says how large the engine makes its batches.
        peak: operations a second of matrix products, by type of the weights; "tf32" for float32 where
            `torch.backends.cuda.matmul.allow_tf32` is set, which PyTorch does not do by itself.
        bandwidth: bytes a second from memory.
        memory: bytes.
        matmul_share, attention_share, bandwidth_share: of the peaks that are reached.
        layer_seconds, batch_seconds, cell_seconds, call_seconds: what the host does for a layer of a pass, a batch, a
            cell, and a whole sweep or search, besides what the device computes.
        layer_times, batch_times: how many times as long as `layer_seconds` and `batch_seconds` these are by the kind of
            a pass: "plain", "past" (behind clean keys), "ragged" (from unlike positions), "back" (with a gradient).
        measured: whether these are measurements of this machine; else shares and seconds are assumptions.
        matmul, attention, move: measured rates over the sizes of a kernel, where there are any: operations a second
            over rows and the square root of the weights; over queries x keys and d_head; bytes a second over bytes.
        slower: how many times as long as a mere move kernels of other kinds take: "norm", "act", "rotation", "scatter".
        engine: how many times as long as their kernels alone the layers of the engine take, by the kind of a pass, over
            the rows of a batch and `d_model`; and under "logits" those of a batch's logits, over their kernels'
            seconds.
    """

    name: str
    kind: str
    peak: Mapping[str, float]
    bandwidth: float | int
    memory: float | int
    matmul_share: float | int = MATMUL_SHARE
    attention_share: float | int = ATTENTION_SHARE
    bandwidth_share: float | int = BANDWIDTH_SHARE
    layer_seconds: float | int = LAYER_SECONDS
    batch_seconds: float | int = BATCH_SECONDS
    cell_seconds: float | int = 5e-5
    call_seconds: float | int = CALL_SECONDS
    layer_times: Mapping[str, float] = field(default_factory=lambda: LAYER_TIMES)
    batch_times: Mapping[str, float] = field(default_factory=lambda: BATCH_TIMES)
    measured: bool = False
    matmul: Table | None = field(default=None, repr=False)
    attention: Table | None = field(default=None, repr=False)
    move: Table | None = field(default=None, repr=False)
    slower: Mapping[str, float] = field(default_factory=dict, repr=False)
    engine: Mapping[str, Table] = field(default_factory=dict, repr=False)

    def seconds(self, kernel: Kernel, dtype: str) -> float:
        """Of the kernel on the device: the longer of computing and moving, as the roofline model has it (Williams,
        Waterman and Patterson 2009)."""
        rate = self.bandwidth * self.bandwidth_share if self.move is None else self.move.at(max(1.0, kernel.bytes))
        moving = kernel.bytes / rate * self.slower.get(kernel.kind, 1.0)
        if not kernel.flops:
            return kernel.times * moving
        peak = self.rate(dtype)
        if kernel.kind == "attention":
            reached = peak * self.attention_share
            if self.attention is not None:
                reached = self.attention.at(max(1.0, kernel.m * kernel.k), kernel.n)
        else:
            reached = peak * self.matmul_share
            if self.matmul is not None:
                reached = self.matmul.at(max(1.0, kernel.m), math.sqrt(kernel.k * kernel.n))
        return kernel.times * max(kernel.flops / reached, moving)

    def rate(self, dtype: str) -> float:
        """Peak operations a second with weights of this type.

        Raises:
            MechsteerError: it has no such type.
        """
        if dtype not in self.peak:
            raise MechsteerError(
                f"{self.name} is not known to compute in {dtype}. Pass one of {', '.join(sorted(self.peak))}."
            )
        return self.peak[dtype]

    def time(
        self,
        kernels: float | int,
        layers: float | int,
        *,
        rest: float | int = 0.0,
        kind: str = "plain",
        rows: float | int = 1,
        d_model: float | int = 1,
    ) -> float:
        """Seconds of a batch.

        Args:
            kernels: seconds that those of its layers take by themselves.
            layers: how many.
            rest: seconds of the kernels of its logits.
            kind: of the pass; see `mechsteer.plan.kernels.Pass.kind`.
            rows: tokens in it.
            d_model: of the model.
        """
        if kind in self.engine:
            kernels = kernels * self.engine[kind].at(rows, d_model)
        if "logits" in self.engine and rest:
            rest = rest * self.engine["logits"].at(rest)
        host = self.batch_times[kind] * self.batch_seconds + self.layer_times[kind] * layers * self.layer_seconds
        # The host runs ahead of a GPU: whichever takes longer.
        return host + kernels + rest if self.kind == "cpu" else max(host, kernels + rest)


def _gpu(
    name: str,
    memory: float | int,
    bandwidth: float | int,
    half: float | int,
    tf32: float | int,
    single: float | int,
    double: float | int,
) -> Device:
    peak = {"bfloat16": half * T, "float16": half * T, "tf32": tf32 * T, "float32": single * T, "float64": double * T}
    return Device(name, "cuda", peak, bandwidth * G, memory * G)


DEVICES: dict[str, Device] = {
    each.name: each
    for each in (
        _gpu("a100-40", 40, 1555, 312, 156, 19.5, 19.5),
        _gpu("a100-80", 80, 2039, 312, 156, 19.5, 19.5),
        _gpu("h100", 80, 3350, 989.4, 494.7, 66.9, 66.9),
        _gpu("h200", 141, 4800, 989.4, 494.7, 66.9, 66.9),
        _gpu("l4", 24, 300, 121, 60, 30.3, 0.47),
        _gpu("l40s", 48, 864, 362, 183, 91.6, 1.43),
        _gpu("rtx4090", 24, 1008, 165.2, 82.6, 82.6, 1.29),
        _gpu("rtx3090", 24, 936, 71, 35.6, 35.6, 0.56),
    )
}
"""Devices by name. Peaks in operations a second, memory and bandwidth in bytes (10^9 to the GB)."""


def device(name: "str | Device", *, dtype: str = "float32", tf32: bool = False) -> Device:
    """A device by name.

    Args:
        name: one of `DEVICES`; "here", which measures this machine for about half a minute; or a Device.
        dtype: that "here" measures with.
        tf32: whether float32 products are those of TF32.

    Raises:
        MechsteerError: there is none of this name.
    """
    if isinstance(name, Device):
        found = name
    elif name in DEVICES:
        found = DEVICES[name]
    elif name == "here":
        from mechsteer.plan.probe import here

        return here(dtype=dtype)
    else:
        raise MechsteerError(f"No device is called {name!r}. Pass here, or one of {', '.join(DEVICES)}.")
    if tf32 and "tf32" in found.peak:
        found = replace(found, peak={**found.peak, "float32": found.peak["tf32"]})
    return found
