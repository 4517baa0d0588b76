"""What the engine takes besides its kernels, measured: the host's seconds, and how much slower kernels are inside it.

Sweeps and gradients of small models with random weights are run side by side, in turns, so that a machine that is
faster one second and slower the next is so for all of them. Their plans say which batches, layers and cells they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from mechsteer.activations import ModelId
from mechsteer.backends.blank import blank
from mechsteer.costs import GRAPH_ROWS, ROWS, Dims
from mechsteer.interventions import Add
from mechsteer.model import Model
from mechsteer.objectives import LogitGap, TeacherForcedCE
from mechsteer.plan.clock import Timer
from mechsteer.plan.devices import LAYER_TIMES, Device, Table
from mechsteer.plan.estimate import Work, costed
from mechsteer.plan.pieces import Cells, gradients, swept
from mechsteer.plan.pieces import Prompts as Planned
from mechsteer.plan.shape import Shape
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prompts import Prompts
from mechsteer.site import Site
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import insert

# Models so small that hardly anything but the host counts, of few and of many layers; and (d_model, d_head, d_mlp) of
# those whose kernels count.
_FEW, _MANY = 2, 10
_WHOLE = {"cpu": ((64, 16, 176), (192, 32, 512), (512, 64, 1408)), "cuda": ((256, 64, 704), (2048, 128, 5632))}
_DEEP, _VOCAB = 3, 64
# Prompts and their tokens; and d_model at which several batches of them are still brief.
_PROMPTS, _LENGTH = 8, 24
_BRIEF = {"cpu": 192, "cuda": 2048}
# Rows of a batch that holds whatever there is.
_ALL = 1 << 20
# Kinds of passes with clean keys.
_BEHIND = ("past", "ragged")
# Turns that everything is run in, and calls in each.
_TURNS, _CALLS = 6, 2
_GAP = LogitGap([5], [9])


@dataclass(frozen=True, eq=False)
class _Trial:
    """Something that is planned and run."""

    shape: Shape
    work: Work
    run: Callable[[], Any]

    @property
    def layers(self) -> float:
        return sum(one.layers(self.shape.dims) * one.times for one in self.work.passes)

    @property
    def past(self) -> float:
        """Layers behind clean keys."""
        return sum(one.layers(self.shape.dims) * one.times for one in self.work.passes if one.kind in _BEHIND)

    @property
    def batches(self) -> int:
        return sum(one.times for one in self.work.passes)

    def seconds(self, device: Device) -> float:
        """What its plan says."""
        return costed(self.work, self.shape, device, 1).seconds


def calibrated(device: Device, timer: Timer, dtype: torch.dtype, at: torch.device) -> Device:
    """The device, whose kernels by themselves are measured, with what the engine does besides."""

    def shape(layers: int, d: int, d_head: int, d_mlp: int) -> Shape:
        heads = d // d_head
        return Shape(layers, d, heads, max(1, heads // 2), d_head, d_mlp, _VOCAB, dtype=str(dtype)[6:])

    few, many = (shape(layers, 32, 16, 64) for layers in (_FEW, _MANY))
    whole = [shape(_DEEP, *sizes) for sizes in _WHOLE[device.kind]]
    sweeps = [
        _sweep(each, device, dtype, at, n_prompts=1, length=8, cells=cells, rows=rows, starts=starts)
        for each, cells, rows, starts in (
            (few, 1, 1, (0,)), (few, 16, 1, (0,)), (few, 192, _ALL, (0,)), (many, 1, 1, (0,)), (many, 16, 1, (0,)),
            # Behind clean keys: all from the same token on, and from every one.
            (many, 16, 1, (4,)), (many, 32, _ALL, range(8)),
        )
    ]  # fmt: skip
    back = {each: _gradient(each, device, dtype, at, n_prompts=1, length=8) for each in (few, many)}
    large = [
        {
            "plain": _large_sweep(each, device, dtype, at),
            "ragged": _ragged_sweep(each, device, dtype, at),
            "back": _large_gradient(each, device, dtype, at),
        }
        for each in whole
    ]
    trials = [*sweeps, *back.values(), *(trial for each in large for trial in each.values())]
    taken = timer.in_turns({trial: trial.run for trial in trials}, _TURNS, _CALLS)
    bare = replace(
        device, layer_seconds=0.0, batch_seconds=0.0, cell_seconds=0.0, call_seconds=0.0, engine={},
    )  # fmt: skip
    # What kernels take by themselves, and the rest of small ones, which is the host's.
    kernels = {trial: trial.seconds(bare) for trial in trials}
    host = {trial: max(taken[trial] - kernels[trial], 0.2 * taken[trial]) for trial in trials}
    found = replace(bare, **_host([(trial, host[trial]) for trial in sweeps]))
    layer = max(found.layer_seconds, (host[back[many]] - host[back[few]]) / (_MANY - _FEW))
    batch = max(found.batch_seconds, host[back[few]] - _FEW * layer)
    found = replace(
        found, layer_times={**found.layer_times, "back": layer / found.layer_seconds},
        batch_times={**found.batch_times, "back": batch / found.batch_seconds},
    )  # fmt: skip

    def slower(trials: Sequence[_Trial]) -> Table:
        # The host runs ahead of a GPU.
        besides = [each.seconds(found) - kernels[each] if device.kind == "cpu" else 0.0 for each in trials]
        ratios = [(taken[each] - other) / kernels[each] for each, other in zip(trials, besides, strict=True)]
        of_layer = [kernels[each] / each.layers for each in trials]
        return Table(of_layer, [1.0], [[max(0.3, ratio)] for ratio in ratios])

    engine = {kind: slower([each[kind] for each in large]) for kind in large[0]}
    return replace(found, engine={**engine, "past": engine["plain"]})


def _host(trials: list[tuple[_Trial, float]]) -> dict[str, Any]:
    """Seconds of a call, a batch, a layer and a cell, and what clean keys add to a layer: least squares of relative
    errors."""
    rows = [
        [part / taken for part in (each.work.calls, each.batches, each.layers, each.past, each.work.cells)]
        for each, taken in trials
    ]
    solved = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.double), torch.ones(len(rows), 1, dtype=torch.double))
    call, batch, layer, past, cell = (max(1e-7, float(each)) for each in solved.solution.flatten())
    return {
        "call_seconds": call, "batch_seconds": batch, "layer_seconds": layer, "cell_seconds": cell,
        "layer_times": {**LAYER_TIMES, **dict.fromkeys(_BEHIND, 1 + past / layer)},
    }  # fmt: skip


def _sweep(
    shape: Shape, device: Device, dtype: torch.dtype, at: torch.device, *, n_prompts: int, length: int, cells: int,
    rows: int, starts: Sequence[int] = (0,),
) -> _Trial:  # fmt: skip
    """A vector in front of the first layer, at many strengths and some positions."""
    model, prompts = _Blank(shape.dims, dtype, at), Prompts.from_ids(_ids(n_prompts, length))
    vector = torch.ones(shape.d_model, dtype=dtype, device=at)
    each = cells // len(starts)

    def run() -> None:
        sweep(
            model, prompts, axes={"start": starts, "alpha": [float(alpha) for alpha in range(each)]}, rows=rows,
            measure=_GAP, build=lambda start, alpha: Add(vector, alpha, site=("resid_pre", 0), at=start),
            progress=False,
        )  # fmt: skip

    planned = Cells(0, tuple((start, each) for start in starts))
    return _Trial(shape, swept(shape, [planned], Planned.of(n_prompts, length), device, rows=rows), run)


def _large_sweep(shape: Shape, device: Device, dtype: torch.dtype, at: torch.device) -> _Trial:
    """All cells start at the first token."""
    rows = ROWS[at.type]
    # Few batches where each takes long.
    batches = max(1, min(4, _BRIEF[at.type] // shape.d_model))
    cells = batches * max(1, rows // (_PROMPTS * _LENGTH))
    return _sweep(shape, device, dtype, at, n_prompts=_PROMPTS, length=_LENGTH, cells=cells, rows=rows)


def _ragged_sweep(shape: Shape, device: Device, dtype: torch.dtype, at: torch.device) -> _Trial:
    """Cells start at every token, all in one batch."""
    each = max(1, ROWS[at.type] // (_PROMPTS * _LENGTH * _LENGTH // 2))
    return _sweep(
        shape, device, dtype, at, n_prompts=_PROMPTS, length=_LENGTH, cells=each * _LENGTH, rows=_ALL,
        starts=range(_LENGTH),
    )  # fmt: skip


def _large_gradient(shape: Shape, device: Device, dtype: torch.dtype, at: torch.device) -> _Trial:
    many = max(_PROMPTS, GRAPH_ROWS[at.type] // (_PROMPTS * _LENGTH))
    return _gradient(shape, device, dtype, at, n_prompts=many, length=_LENGTH)


def _gradient(
    shape: Shape, device: Device, dtype: torch.dtype, at: torch.device, *, n_prompts: int, length: int
) -> _Trial:
    """The gradient of a completion's cross entropy at two soft tokens."""
    slots, completion = 2, length // 3
    before = length - slots - completion
    ids = Prompts.from_ids(_ids(n_prompts, before), completions=_ids(n_prompts, completion).tolist())
    loss = PrefixLoss(
        _Blank(shape.dims, dtype, at), insert(ids, where="prefix", slots=slots), TeacherForcedCE(), n_prefixes=1
    )
    soft = torch.randn(1, slots, shape.d_model, generator=torch.Generator().manual_seed(0)).to(at)
    work = gradients(shape, 1, Planned.of(n_prompts, before + slots, completion), 0, device)
    return _Trial(shape, work, lambda: loss.gradient(soft))


def _ids(n: int, length: int) -> torch.Tensor:
    return torch.randint(4, _VOCAB, (n, length), generator=torch.Generator().manual_seed(0))


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
