"""What this machine can do, measured: rates of products and attention, bandwidth, and what the engine does besides."""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mechsteer.activations import ModelId
from mechsteer.backends.blank import blank
from mechsteer.backends.layers import Norm
from mechsteer.costs import ROWS, Dims
from mechsteer.interventions import Add
from mechsteer.model import Model
from mechsteer.objectives import LogitGap
from mechsteer.plan.devices import Device, Table
from mechsteer.plan.estimate import costed
from mechsteer.plan.pieces import Cells, swept
from mechsteer.plan.pieces import Prompts as In
from mechsteer.plan.shape import Shape
from mechsteer.prompts import Prompts
from mechsteer.site import Site
from mechsteer.sweeps import sweep

Clock = Callable[[], float]
# Sizes that are measured: rows and the square root of a weight's entries; queries and keys; numbers of a tensor.
_ROWS = {"cpu": (1, 8, 64, 256, 1024), "cuda": (16, 256, 1024, 4096, 16384)}
_WEIGHTS = {"cpu": (32, 128, 384, 1024), "cuda": (256, 1024, 4096)}
_ATTENTION = {"cpu": ((8, 16), (32, 32), (128, 128), (256, 512)), "cuda": ((16, 64), (128, 128), (512, 512))}
_NUMBERS = {"cpu": (2**8, 2**12, 2**15, 2**18, 2**20, 2**22, 2**24), "cuda": (2**14, 2**18, 2**22, 2**26)}
# Seconds that each of them is measured for, at least five times.
_SECONDS = 0.012
# Tensors that take turns, and sizes of heads.
_OTHERS, _HEADS = 4, (16, 64)
# Shapes that the engine is run with as a whole: (d_model, d_head, d_mlp).
_WHOLE = {"cpu": ((64, 16, 176), (192, 32, 512), (512, 64, 1408)), "cuda": ((256, 64, 704), (2048, 128, 5632))}
_TINY = {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_head": 16, "d_mlp": 64, "d_vocab": 64, "gated": True}
_LENGTH = 8


def here(*, dtype: str = "float32", clock: Callable[[], float] = time.perf_counter, again: bool = False) -> Device:
    """This machine, as a device to plan for: its GPU where it has one. Measured once in a process, in a few seconds.

    Args:
        dtype: of the weights.
        again: measure anew.
        clock: what to measure with. `time.process_time` with `torch.set_num_threads(1)` says what one core does, also
            on a machine that others use meanwhile.
    """
    if again:
        _here.cache_clear()
    return _here(dtype, clock)


@lru_cache(maxsize=4)
def _here(dtype: str, clock: Clock) -> Device:
    cuda = torch.cuda.is_available()
    kind, at = ("cuda", torch.device("cuda")) if cuda else ("cpu", torch.device("cpu"))
    of = getattr(torch, dtype)
    with torch.no_grad():
        products = [[_product(m, s, of, at, clock) for s in _WEIGHTS[kind]] for m in _ROWS[kind]]
        attended = [[_attended(w, k, d, of, at, clock) for d in _HEADS] for w, k in _ATTENTION[kind]]
        move, slower = _moves(kind, of, at, clock)
    name, memory = ("here", _memory()) if not cuda else (torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
    found = Device(
        name, kind, {dtype: max(max(row) for row in products)}, max(row[0] for row in move.values), float(memory),
        1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, True, Table(_ROWS[kind], _WEIGHTS[kind], products),
        Table([w * k for w, k in _ATTENTION[kind]], _HEADS, attended), move, slower,
    )  # fmt: skip
    found = replace(found, **_host(of, at, clock))
    return replace(found, engine=_engine(found, of, at, clock))


def _timed(run: Callable[[], Any], at: torch.device, clock: Clock, seconds: float | int = _SECONDS) -> float:
    """Seconds of a call: the lower quartile, because what else the machine does only ever slows a call down."""

    def once() -> float:
        began = clock()
        run()
        if at.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    once()
    times = [once() for _ in range(5)]
    while sum(times) < seconds:
        times.append(once())
    return sorted(times)[len(times) // 4]


def _product(m: int, s: int, dtype: torch.dtype, at: torch.device, clock: Clock) -> float:
    # Other rows and weights each time, as in a model: a product of what stands in the cache is faster.
    x, w = (torch.randn(_OTHERS, n, s, device=at).to(dtype) for n in (m, s))
    return 2.0 * m * s * s / _timed(_in_turn(lambda each: x[each] @ w[each]), at, clock)


def _attended(width: int, keys: int, d: int, dtype: torch.dtype, at: torch.device, clock: Clock) -> float:
    items, heads = max(4, (1 << 15) // (width * keys)), 4
    q = torch.randn(items, heads, width, d, device=at).to(dtype)
    k = torch.randn(items, heads // 2, keys, d, device=at).to(dtype)
    mask = torch.zeros(items, 1, width, keys, device=at).to(dtype)
    run = partial(F.scaled_dot_product_attention, q, k, k, attn_mask=mask, enable_gqa=True)
    return 4.0 * items * heads * width * keys * d / _timed(run, at, clock)


def _moves(kind: str, dtype: torch.dtype, at: torch.device, clock: Clock) -> tuple[Table, dict[str, float]]:
    """Bytes a second of a sum of two tensors, without what the smallest one takes; and how much longer than that a norm
    and an activation of as many bytes take."""
    seconds: list[float] = []
    for n in (16, *_NUMBERS[kind]):
        a, b = torch.randn(n, device=at).to(dtype), torch.randn(n, device=at).to(dtype)
        seconds.append(_timed(lambda a=a, b=b: a + b, at, clock))
    size = torch.empty(0, dtype=dtype).element_size()
    moved = [3.0 * n * size for n in _NUMBERS[kind]]
    rates = [[each / max(taken - seconds[0], 0.2 * taken)] for each, taken in zip(moved, seconds[1:], strict=True)]
    table = Table(moved, [1.0], rates)
    x = torch.randn(_OTHERS, 512, 512, device=at).to(dtype)
    norm = Norm(None, None, 1e-5, True)
    taken = {
        "norm": (3, _timed(_in_turn(lambda each: norm(x[each])), at, clock)),
        "act": (1, _timed(_in_turn(lambda each: F.silu(x[each].chunk(2, -1)[0])), at, clock)),
    }
    plain = {name: numbers * size * x[0].numel() for name, (numbers, _) in taken.items()}
    return table, {name: max(1.0, each[1] * table.at(plain[name]) / plain[name]) for name, each in taken.items()}


def _in_turn(run: Callable[[int], Any]) -> Callable[[], Any]:
    """Runs on one of `_OTHERS` after the other."""
    turn = itertools.cycle(range(_OTHERS))
    return lambda: run(next(turn))


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError):  # where there is no sysconf
        return math.inf


# ---- what the engine does besides ----


class _Blank(Model):
    """A model with random weights that only the packed pass runs."""

    def __init__(self, dims: Dims, dtype: torch.dtype, at: torch.device) -> None:
        self._blank, self._at, self._of = blank(dims, device=at, dtype=dtype), at, dtype
        self.name, self.tokenizer = "blank", None
        self._made = ModelId("blank", "0" * 64, False)
        cfg = SimpleNamespace(
            n_layers=dims.n_layers, d_model=dims.d_model, n_heads=dims.n_heads, n_key_value_heads=dims.n_kv_heads,
            d_head=dims.d_head, d_mlp=dims.d_mlp, gated_mlp=dims.gated,
        )  # fmt: skip
        # What sweeps ask of it before they begin: its size, and where it is.
        self.hooked = cast(Any, SimpleNamespace(cfg=cfg, parameters=lambda: iter([torch.empty(0, device=at)])))

    decoder = property(lambda self: self._blank)
    device = property(lambda self: self._at)
    dtype = property(lambda self: self._of)
    id = property(lambda self: self._made)
    n_layers = property(lambda self: self._blank.n_layers)
    d_model = property(lambda self: self._blank.dims.d_model)
    d_vocab = property(lambda self: self._blank.d_vocab)
    n_ctx = property(lambda self: 64)
    has_decoder = property(lambda self: True)

    def check_site(self, site: Site) -> None: ...

    def check_edit(self, site: Site) -> None: ...

    def check_width(self, site: Site, width: int, what: str) -> None: ...


def _host(dtype: torch.dtype, at: torch.device, clock: Clock) -> dict[str, float]:
    """Seconds of a layer, a batch, a cell and a call: from sweeps of models so small that nothing else counts."""
    few, many, cells = 2, 10, 24

    def seconds(layers: int, n: int, rows: int) -> float:
        model = _Blank(Dims(n_layers=layers, **_TINY), dtype, at)
        vector = torch.ones(model.d_model, dtype=dtype, device=at)
        prompts = Prompts.from_ids([[1, 2, 3, 4, 5, 6, 7, 8][:_LENGTH]])

        def run() -> None:
            sweep(
                model, prompts, axes={"alpha": [float(each) for each in range(n)]}, rows=rows, progress=False,
                measure=LogitGap([5], [9]), build=lambda alpha: Add(vector, alpha, site=("resid_pre", 0)),
            )  # fmt: skip

        return _timed(run, at, clock, 0.05)

    shallow, deep = seconds(few, cells, 1), seconds(many, cells, 1)
    # One batch for each cell, and a clean pass.
    layer = (deep - shallow) / ((many - few) * (cells + 1))
    single, all_at_once = seconds(few, 1, 1), seconds(few, 8 * cells, 1 << 20)
    batch = (shallow - single) / (cells - 1) - few * layer
    cell = max(0.0, (all_at_once - single) / (8 * cells - 1))
    batch = max(0.0, batch - cell)
    call = max(0.0, single - 2 * (batch + few * layer) - cell)
    return {"layer_seconds": layer, "batch_seconds": batch, "cell_seconds": cell, "call_seconds": call}


def _engine(device: Device, dtype: torch.dtype, at: torch.device, clock: Clock) -> Table:
    """How many times as long as its kernels by themselves the engine takes, over d_model: caches are colder in it."""
    shares: list[list[float]] = []
    rows, length = ROWS[device.kind], 24
    for d, d_head, d_mlp in _WHOLE[device.kind]:
        shape = Shape(3, d, d // d_head, max(1, d // d_head // 2), d_head, d_mlp, 64, dtype=str(dtype)[6:])
        model = _Blank(shape.dims, dtype, at)
        vector = torch.ones(d, dtype=dtype, device=at)
        prompts = Prompts.from_ids(torch.randint(64, (8, length), generator=torch.Generator().manual_seed(0)))
        n = 2 * max(1, rows // (8 * length))

        def run(model: Model = model, vector: Tensor = vector, n: int = n, on: Prompts = prompts) -> None:
            sweep(
                model, on, axes={"alpha": [float(each) for each in range(n)]}, rows=rows, progress=False,
                measure=LogitGap([5], [9]), build=lambda alpha: Add(vector, alpha, site=("resid_pre", 0)),
            )  # fmt: skip

        taken = _timed(run, at, clock, 0.15)
        group = Cells(0, ((0, n),))
        stage = costed(swept(shape, [group], In.of(8, length), device.kind, rows=rows), shape, device, 1)
        host = device.call_seconds + n * device.cell_seconds
        host += stage.batches * (device.batch_seconds + shape.layers * device.layer_seconds)
        kernels = stage.seconds - host if device.kind == "cpu" else stage.seconds
        shares.append([max(1.0, (taken - host) / kernels) if device.kind == "cpu" else max(1.0, taken / kernels)])
    return Table([each[0] for each in _WHOLE[device.kind]], [1.0], shares)


def told(device: Device) -> Sequence[tuple[str, str]]:
    """What was measured, as names and texts."""
    return [
        ("products", f"{max(device.peak.values()) / 1e9:.3g} GFLOP/s at best"),
        ("memory", f"{device.bandwidth / 1e9:.3g} GB/s at best"),
        ("a layer", f"{1e6 * device.layer_seconds:.3g} us besides"),
        ("a batch", f"{1e6 * device.batch_seconds:.3g} us"),
        ("a cell", f"{1e6 * device.cell_seconds:.3g} us"),
        ("a call", f"{1e3 * device.call_seconds:.3g} ms"),
    ]
