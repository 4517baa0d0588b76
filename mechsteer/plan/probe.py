"""What this machine can do, measured: rates of products and attention, bandwidth, and what the engine does besides."""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from mechsteer.backends.decoder import Decoder
from mechsteer.backends.layers import Norm
from mechsteer.backends.random_weights import random_hooked
from mechsteer.costs import Dims
from mechsteer.plan.calibration import calibrated
from mechsteer.plan.clock import Timer
from mechsteer.plan.devices import Device, Table

Clock = Callable[[], float]
# Sizes that are measured: rows and the square root of a weight's entries; queries and keys; numbers of a tensor.
_ROWS = {"cpu": (1, 8, 64, 256, 1024), "cuda": (16, 256, 1024, 4096, 16384)}
_WEIGHTS = {"cpu": (32, 128, 384, 1024), "cuda": (256, 1024, 4096)}
# Lengths of texts are not round: attention to a multiple of 16 keys is up to three times as fast.
_ATTENTION = {"cpu": ((7, 20), (22, 24), (100, 110), (250, 500)), "cuda": ((15, 60), (120, 125), (500, 510))}
_NUMBERS = {"cpu": (2**8, 2**12, 2**15, 2**18, 2**20, 2**22, 2**24), "cuda": (2**14, 2**18, 2**22, 2**26)}
# Tensors that take turns, numbers of the largest of these, and sizes of heads.
_OTHERS, _CACHED, _HEADS = 4, 2**22, (16, 64)


def here(*, dtype: str = "float32", clock: Callable[[], float] = time.perf_counter, again: bool = False) -> Device:
    """This machine, as a device to plan for: its GPU where it has one. Measured once in a process, in about half a
    minute.

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
    of, timer = getattr(torch, dtype), Timer(at, clock)
    with torch.no_grad():
        # What calling a kernel takes is the host's, and measured with it.
        one = torch.ones(1, 1, device=at, dtype=of)
        called = timer.alone(lambda: one @ one)
        products = [[_product(m, s, of, timer, called) for s in _WEIGHTS[kind]] for m in _ROWS[kind]]
        attended = [[_attended(w, k, d, of, timer, called) for d in _HEADS] for w, k in _ATTENTION[kind]]
        move, slower = _moves(kind, of, timer)
    name, memory = ("here", _memory()) if not cuda else (torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
    alone = Device(
        name, kind, {dtype: max(max(row) for row in products)}, max(row[0] for row in move.values), float(memory),
        1.0, 1.0, 1.0, measured=True, matmul=Table(_ROWS[kind], _WEIGHTS[kind], products),
        attention=Table([w * k for w, k in _ATTENTION[kind]], _HEADS, attended), move=move, slower=slower,
    )  # fmt: skip
    return calibrated(alone, timer, of, at)


def _without(taken: float, called: float) -> float:
    """Seconds without those of the call, which they cannot be told from where they are few."""
    return max(taken - called, 0.2 * taken)


def _product(m: int, s: int, dtype: torch.dtype, timer: Timer, called: float) -> float:
    # Other rows and weights each time, as in a model: a product of what stands in the cache is faster.
    x, w = (torch.randn(_OTHERS, n, s, device=timer.at).to(dtype) for n in (m, s))
    return 2.0 * m * s * s / _without(timer.alone(_in_turn(lambda each: x[each] @ w[each])), called)


def _attended(width: int, keys: int, d: int, dtype: torch.dtype, timer: Timer, called: float) -> float:
    items, heads = max(4, (1 << 15) // (width * keys)), 4
    q = torch.randn(items, heads, width, d, device=timer.at).to(dtype)
    k = torch.randn(items, heads // 2, keys, d, device=timer.at).to(dtype)
    mask = torch.zeros(items, 1, width, keys, device=timer.at).to(dtype)
    run = partial(F.scaled_dot_product_attention, q, k, k, attn_mask=mask, enable_gqa=True)
    return 4.0 * items * heads * width * keys * d / _without(timer.alone(run), called)


def _moves(kind: str, dtype: torch.dtype, timer: Timer) -> tuple[Table, dict[str, float]]:
    """Bytes a second of a sum of two tensors, without what the smallest one takes; and how much longer than that other
    kinds of kernels take for as many bytes."""
    seconds: list[float] = []
    for n in (16, *_NUMBERS[kind]):
        # Other ones each time, as in a model, but for such as no cache holds anyway.
        others = _OTHERS if n <= _CACHED else 1
        a, b = (torch.randn(others, n, device=timer.at).to(dtype) for _ in range(2))
        seconds.append(timer.alone(_in_turn(lambda each, a=a, b=b: a[each] + b[each], others)))
    size = torch.empty(0, dtype=dtype).element_size()
    moved = [3.0 * n * size for n in _NUMBERS[kind]]
    rates = [[each / _without(taken, seconds[0])] for each, taken in zip(moved, seconds[1:], strict=True)]
    table = Table(moved, [1.0], rates)
    x = torch.randn(_OTHERS, 512, 512, device=timer.at).to(dtype)
    norm, order, there = Norm(None, None, 1e-5, True), torch.randperm(512, device=timer.at), torch.empty_like(x[0])
    decoder = Decoder(random_hooked(Dims(1, 512, 8, 8, 64, 64, 64), device=timer.at, dtype=dtype, n_ctx=64))
    turns = decoder.layers[0].turns
    assert turns is not None
    heads, turn = x.view(_OTHERS, 512, 8, 64), turns.index_select(0, order % len(turns))
    taken = {
        "norm": (3, timer.alone(_in_turn(lambda each: norm(x[each])))),
        "act": (1, timer.alone(_in_turn(lambda each: F.silu(x[each].chunk(2, -1)[0])))),
        "rotation": (2, timer.alone(_in_turn(lambda each: decoder.rotation(heads[each], turn)))),
        "scatter": (2, timer.alone(_in_turn(lambda each: there.index_copy_(0, order, x[each])))),
    }
    plain = {name: numbers * size * x[0].numel() for name, (numbers, _) in taken.items()}
    return table, {name: max(1.0, each[1] * table.at(plain[name]) / plain[name]) for name, each in taken.items()}


def _in_turn(run: Callable[[int], Any], others: int = _OTHERS) -> Callable[[], Any]:
    """Runs on one of so many after the other."""
    turn = itertools.cycle(range(others))
    return lambda: run(next(turn))


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError):  # where there is no sysconf
        return math.inf


def told(device: Device) -> Sequence[tuple[str, str]]:
    """What was measured, as names and texts."""
    return [
        ("products", f"{max(device.peak.values()) / 1e9:.3g} GFLOP/s at best"),
        ("memory", f"{device.bandwidth / 1e9:.3g} GB/s at best"),
        ("a layer", f"{1e6 * device.layer_seconds:.3g} us besides"),
        ("a batch", f"{1e6 * device.batch_seconds:.3g} us"),
        ("a layer behind clean keys", f"{device.layer_times['past']:.3g} x a layer"),
        ("a layer's gradient", f"{device.layer_times['back']:.3g} x a layer, forward pass included"),
        ("a gradient's batch", f"{device.batch_times['back']:.3g} x a batch"),
        ("a cell", f"{1e6 * device.cell_seconds:.3g} us"),
        ("a call", f"{1e3 * device.call_seconds:.3g} ms"),
    ]
