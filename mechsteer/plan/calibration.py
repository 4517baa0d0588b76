"""What the engine takes besides its kernels, measured: the host's seconds, and how much slower kernels are inside it.

Sweeps and gradients of small models with random weights are run side by side, in turns, so that a machine that is
faster one second and slower the next is so for all of them. Their plans say which batches, layers and cells they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mechsteer.backends.random_weights import random_hooked
from mechsteer.costs import GRAPH_ROWS, ROWS
from mechsteer.interventions import Add
from mechsteer.model import Model
from mechsteer.objectives import LogitGap, TeacherForcedCE
from mechsteer.plan.clock import Timer
from mechsteer.plan.devices import LAYER_TIMES, Device, Table
from mechsteer.plan.estimate import Work, costed
from mechsteer.plan.pieces import Cells, gradients, stage_of, swept
from mechsteer.plan.pieces import Prompts as Planned
from mechsteer.plan.shape import Shape
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prompts import Prompts
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import insert

# Models so small that hardly anything but the host counts, of few and of many layers; and (d_model, d_head, d_mlp) of
# those whose kernels count.
_FEW, _MANY = 2, 10
_WHOLE = {"cpu": ((64, 16, 176), (192, 32, 512), (512, 64, 1408)), "cuda": ((256, 64, 704), (2048, 128, 5632))}
_DEEP, _VOCAB = 3, 64
# How many times as many rows as the first batch of a sweep has the batches of small models grow to.
_GROWN = 5
# Of the measurement of logits: tokens of the vocabulary for each number of d_model, and most cells.
_WORDS, _MOST = 8, 21
# Prompts and their tokens; and most positions of the models.
_PROMPTS, _LENGTH, _CONTEXT = 8, 24, 64
# Batches of a sweep, the first of which finds memory that it has to ask for, and rows of one that holds all there is.
_BATCHES, _ALL = 3, 1 << 20
# Turns that everything is run in.
_TURNS = 12
_GAP = LogitGap([5], [9])


@dataclass(frozen=True, eq=False)
class _Trial:
    """Something that is planned and run."""

    shape: Shape
    work: Work
    run: Callable[[], Any]

    def layers(self, *kinds: str) -> int:
        """How many run, in passes of these kinds; in all of them if none is given."""
        passes = [one for one in self.work.passes if not kinds or one.kind in kinds]
        return sum(one.layers(self.shape.dims) * one.times for one in passes)

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
    plain = [_large_sweep(each, device, dtype, at) for each in whole]
    # The widest one's grown batch would take too long to measure: its first one stands for it.
    grown = [_large_sweep(each, device, dtype, at, grown=True) for each in whole[:-1]]
    ragged = [_ragged_sweep(each, device, dtype, at) for each in whole]
    large_back = [_large_gradient(each, device, dtype, at) for each in whole]
    logits = [_logits_sweep(each, device, dtype, at) for each in whole]
    trials = [*sweeps, *back.values(), *plain, *grown, *ragged, *large_back, *logits]
    taken = timer.in_turns({trial: trial.run for trial in trials}, _TURNS)
    widths = [each.d_model for each in whole]
    bare = replace(
        device, layer_seconds=0.0, batch_seconds=0.0, cell_seconds=0.0, call_seconds=0.0, engine={},
    )  # fmt: skip
    found = bare

    def slower(kind: str, trials: Sequence[_Trial], known: Device) -> list[float]:
        return [_slower(kind, each, taken[each], known) for each in trials]

    # Once more, with what the kernels of small trials are now known to take. A GPU's are hidden behind the host.
    for _ in range(2 if device.kind == "cpu" else 1):
        kernels = replace(bare, engine=found.engine)
        # The rest is the host's.
        host = {each: max(taken[each] - each.seconds(kernels), 0.2 * taken[each]) for each in (*sweeps, *back.values())}
        found = replace(bare, **_host([(trial, host[trial]) for trial in sweeps]))
        layer = max(found.layer_seconds, (host[back[many]] - host[back[few]]) / (_MANY - _FEW))
        batch = max(found.batch_seconds, host[back[few]] - _FEW * layer)
        found = replace(
            found, layer_times={**found.layer_times, "back": layer / found.layer_seconds},
            batch_times={**found.batch_times, "back": batch / found.batch_seconds},
        )  # fmt: skip

        first, later = (slower("plain", trials, found) for trials in (plain, grown))
        rows = [trials[0].work.passes[-1].counts.rows for trials in (plain, grown)]
        over = Table(rows, widths, [first, [*later, first[-1]]])
        found = replace(found, engine={"plain": over, "past": over})
        seconds = [_logits_seconds(each, bare) for each in logits]
        of_logits = Table(seconds, [1.0], [[times] for times in slower("logits", logits, found)])
        found = replace(found, engine={**found.engine, "logits": of_logits})
        others = {"ragged": ragged, "back": large_back}
        engine = {kind: Table([1.0], widths, [slower(kind, trials, found)]) for kind, trials in others.items()}
        found = replace(found, engine={**found.engine, **engine})
    return found


def _slower(kind: str, trial: _Trial, taken: float, device: Device) -> float:
    """How many times as long as by themselves the kernels of such passes took, if all else took what it is planned to.

    A plan's seconds grow in proportion to it, so that two plans say what it is.
    """
    if device.kind == "cuda":  # the host runs ahead
        device = replace(device, layer_seconds=0.0, batch_seconds=0.0)
    one, two = (
        trial.seconds(replace(device, engine={**device.engine, kind: Table([1.0], [1.0], [[times]])}))
        for times in (1.0, 2.0)
    )
    return max(0.3, 1 + (taken - one) / (two - one))


def _host(trials: list[tuple[_Trial, float]]) -> dict[str, Any]:
    """Seconds of a call, a batch, a layer and a cell, and what clean keys add to a layer, where all items start at one
    token and where not: least squares of relative errors."""
    rows = [
        [
            part / taken
            for part in (
                each.work.calls, each.batches, each.layers(), each.layers("past"), each.layers("ragged"),
                each.work.cells,
            )
        ]
        for each, taken in trials
    ]  # fmt: skip
    solved = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.double), torch.ones(len(rows), 1, dtype=torch.double))
    call, batch, layer, past, ragged, cell = (max(1e-7, float(each)) for each in solved.solution.flatten())
    return {
        "call_seconds": call, "batch_seconds": batch, "layer_seconds": layer, "cell_seconds": cell,
        "layer_times": {**LAYER_TIMES, "past": 1 + past / layer, "ragged": 1 + ragged / layer},
    }  # fmt: skip


def _sweep(
    shape: Shape, device: Device, dtype: torch.dtype, at: torch.device, *, n_prompts: int, length: int, cells: int,
    rows: int, starts: Sequence[int] = (0,),
) -> _Trial:  # fmt: skip
    """A vector in front of the first layer, at many strengths and some positions."""
    model, prompts = _model(shape, dtype, at), Prompts.from_ids(_ids(n_prompts, length))
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


def _large_sweep(
    shape: Shape, device: Device, dtype: torch.dtype, at: torch.device, *, grown: bool = False
) -> _Trial:  # fmt: skip
    """All cells start at the first token."""
    rows = ROWS[at.type] * (_GROWN if grown else 1)
    cells = (1 if grown else _BATCHES) * max(1, rows // (_PROMPTS * _LENGTH))
    return _sweep(shape, device, dtype, at, n_prompts=_PROMPTS, length=_LENGTH, cells=cells, rows=rows)


def _ragged_sweep(shape: Shape, device: Device, dtype: torch.dtype, at: torch.device) -> _Trial:
    """Cells start at every token, all in one batch."""
    each = max(1, ROWS[at.type] // (_PROMPTS * _LENGTH * _LENGTH // 2))
    return _sweep(
        shape, device, dtype, at, n_prompts=_PROMPTS, length=_LENGTH, cells=each * _LENGTH, rows=_ALL,
        starts=range(_LENGTH),
    )  # fmt: skip


def _logits_sweep(shape: Shape, device: Device, dtype: torch.dtype, at: torch.device) -> _Trial:
    """Cells behind the only layer, and the cross entropy of completions: hardly anything but logits."""
    shape = replace(shape, layers=1, vocab=_WORDS * shape.d_model)
    completion, model = _LENGTH // 2, _model(shape, dtype, at)
    prompts = Prompts.from_ids(_ids(_PROMPTS, _LENGTH), completions=_ids(_PROMPTS, completion).tolist())
    vector = torch.ones(shape.d_model, dtype=dtype, device=at)
    # Fewer where each takes long.
    cells = max(_MOST // 4, min(_MOST, _MOST * _WHOLE[device.kind][0][0] // shape.d_model))

    def run() -> None:
        sweep(
            model, prompts, axes={"alpha": [float(alpha) for alpha in range(cells)]}, rows=_ALL,
            measure=TeacherForcedCE(), build=lambda alpha: Add(vector, alpha, site=("resid_post", 0)), progress=False,
        )  # fmt: skip

    planned = [Cells(stage_of("resid_post", 0), ((0, cells),))]
    return _Trial(
        shape, swept(shape, planned, Planned.of(_PROMPTS, _LENGTH, completion), device, rows=_ALL), run
    )  # fmt: skip


def _logits_seconds(trial: _Trial, bare: Device) -> float:
    """Of the kernels of a batch's logits by themselves."""
    parts = trial.work.passes[-1].parts(trial.shape.dims)
    return sum(
        times * bare.seconds(kernel, trial.shape.dtype)
        for part, times in parts
        if part.name == "logits"
        for kernel in part.kernels(trial.shape.dims, trial.shape.itemsize)
    )


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
        _model(shape, dtype, at), insert(ids, where="prefix", slots=slots), TeacherForcedCE(), n_prefixes=1
    )
    soft = torch.randn(1, slots, shape.d_model, generator=torch.Generator().manual_seed(0)).to(at)
    work = gradients(shape, 1, Planned.of(n_prompts, before + slots, completion), 0, device)
    return _Trial(shape, work, lambda: loss.gradient(soft))


def _ids(n: int, length: int) -> torch.Tensor:
    return torch.randint(4, _VOCAB, (n, length), generator=torch.Generator().manual_seed(0))


def _model(shape: Shape, dtype: torch.dtype, at: torch.device) -> Model:
    return Model(random_hooked(shape.dims, device=at, dtype=dtype, n_ctx=_CONTEXT), name="random")
