"""`sweep`: the same measurement over a grid of interventions, as fast as the model allows."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechsteer.batches import Batch, Grid, is_out_of_memory, run_here
from mechsteer.costs import ROWS, BatchSize
from mechsteer.engine import Cell, Engine, Work
from mechsteer.errors import MechsteerError
from mechsteer.executors import Executor, Failure, executor_of
from mechsteer.folders import Folder
from mechsteer.hooks import Intervention, check
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.progress import Bar, bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.store import ShardWriter, Store, Values

Measure = Objective | Mapping[str, Objective] | Sequence[Objective]


def sweep(
    model: Model,
    prompts: PromptsLike,
    *,
    axes: Mapping[str, Iterable[Any]],
    build: Callable[..., Intervention | Iterable[Intervention] | None],
    measure: Measure,
    out: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    executor: "Executor | str | None" = None,
    progress: bool = True,
) -> Result:
    """Measure every cell of a grid of interventions on every prompt.

        gaps = ms.sweep(
            model, corrupt, axes={"layer": range(model.n_layers), "pos": range(12)},
            build=lambda layer, pos: ms.Replace(ms.Site("resid_pre", layer, pos=pos), clean.activations),
            measure=ms.LogitGap(" Mary", " John", tokenizer=model),
        )                                                               # a patching map [layer, pos, prompt]

    The numbers are those of one `model.run` per cell (to 1e-5 in fp32), but little of that is computed: cells that
    differ in values, heads and positions go in one batch; each is computed from the first layer and the first position
    that it touches, with the clean keys and values before; only tokens that the objectives read are unembedded, and the
    last layer is computed for these alone. Architectures and sites that `mechsteer.backends.decoder` does not cover are
    stacked into batches of whole forward passes; `result.provenance["options"]["engine"]` says which it was.

    Args:
        model: what to run.
        prompts: what to run it on.
        axes: names of the grid's dimensions, each with its values. Values that are neither numbers nor strings are
            labelled by their text in the Result.
        build: called once for each cell with its values by name; gives the cell's interventions, in order. None or ()
            for none.
        measure: an Objective, several, or several by name.
        out: a folder for finished work, or its URL (such as s3://bucket/run, for which fsspec's package has to be
            installed), written at least every two seconds. The same sweep with the same folder continues where it
            ended, whatever ended it.
        rows: tokens in a batch; None finds a fast number by measuring, and halves it when memory runs out. With a
            number, the same batches are computed whoever computes them, so that results are equal bit for bit.
        executor: "ray" or an Executor such as `RayExecutor(workers=8)` computes on many processes or machines; None
            takes the one of the surrounding `with using(...)`, or computes here.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result with one array per objective and dimensions (*axes, prompt).

    Raises:
        MechsteerError: an axis, an intervention or an objective does not fit, or `out` holds another sweep. With an
            executor, also when some batches failed every time they were tried: their coordinates, after the others.
    """
    began = time.perf_counter()
    right = model.prompts(prompts).padded("right")
    measures = _named(measure, axes)
    for name, each in measures.items():
        if each.n_examples not in (None, len(right)):
            raise MechsteerError(
                f"Objective {name!r} holds values for {each.n_examples} prompts, and {len(right)} are swept. "
                "Make it from the same prompts."
            )
    values = {name: list(each) for name, each in axes.items()}
    labels = {name: _labels(name, each) for name, each in values.items()}
    cells = [_cell(build, dict(zip(values, each, strict=True))) for each in itertools.product(*values.values())]
    if not cells:
        raise MechsteerError(f"axes={dict(values)!r} has an axis without values. Give each at least one.")
    check([each for cell in cells for each in cell], model, right)
    grid = Grid(Engine(model, right, measures), cells)
    store = Store.open(
        out,
        list(measures),
        (len(cells), len(right)),
        np.float64 if model.dtype == torch.float64 else np.float32,
        lambda: _identity(model, right, values, measures, cells),
    )
    size = BatchSize(rows or ROWS.get(model.device.type, ROWS["cuda"]), fixed=rows is not None)
    with executor_of(executor) as chosen, bar("cells", store.done.size, show=progress) as shown:
        grid.memory(size.rows).announce("Sweep" if chosen is None else "Each worker of the sweep", show=progress)
        shown.advance(int(store.done.sum()))
        if chosen is None:
            run_here(grid, store, size, shown)
        else:
            _run_there(chosen, grid, store, size.rows, shown, lambda cell: _told(values, cell))
    options = {
        "engine": "packed" if all(group.packed for group in grid.groups) else "hooks",
        "axes": {name: _plain(label) for name, label in labels.items()},
        "rows": size.rows,
        "flops": grid.engine.work.done,
        "least_flops": grid.engine.work.least,
    }
    shape = [*(len(each) for each in values.values()), len(right)]
    data = xr.Dataset(
        {name: ((*values, "prompt"), store.values[name].reshape(shape)) for name in measures},
        coords={**labels, "prompt": list(right.labels) if right.labels else np.arange(len(right))},
    )
    result = Result(
        data, provenance=provenance(model=grid.engine.model_id, seconds=time.perf_counter() - began, **options)
    )
    if out is not None:
        assert store.folder is not None
        with store.folder.written("result.safetensors") as path:
            result.save(path)
    return result


@dataclass(frozen=True)
class SweepWork:
    """What a worker of an executor needs to compute batches of a sweep, besides the model."""

    prompts: Prompts
    measures: Mapping[str, Objective]
    cells: Sequence[Cell]
    chunk: int  # tokens; a worker on another kind of device would choose others than the batches are of

    def bind(self, model: Model) -> Callable[[Batch], tuple[list[Values], Work]]:
        """What computes a batch: its values, in halves where memory runs out, and the operations that took."""
        grid = Grid(Engine(model, model.prompts(self.prompts), self.measures), self.cells, chunk=self.chunk)
        grid.check_memory()

        def compute(batch: Batch) -> list[Values]:
            try:
                return [grid.compute(batch)]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if len(batch.places) == 1 or not is_out_of_memory(error):
                    raise
            half = len(batch.places) // 2
            parts = batch.places[:half], batch.places[half:]
            return [values for places in parts for values in compute(replace(batch, places=places))]

        def counted(batch: Batch) -> tuple[list[Values], Work]:
            grid.engine.work = Work()
            return compute(batch), grid.engine.work

        return counted

    def sink(self, folder: Folder, tag: str) -> Callable[[Sequence[tuple[list[Values], Work]]], None]:
        """What writes finished batches to the folder, as one shard."""
        writer = ShardWriter(folder, f"{tag}-")

        def write(finished: Sequence[tuple[list[Values], Work]]) -> None:
            for values, _ in finished:
                for each in values:
                    writer.add(each, flush=False)
            writer.flush()

        return write


def _run_there(executor: Executor, grid: Grid, store: Store, rows: int, shown: Bar, told: Callable[[int], str]) -> None:
    """All that is not done, by the workers of an executor, in batches of `rows` rows.

    Raises:
        MechsteerError: some batches failed every time; the others are done, and in the folder if there is one.
    """
    engine = grid.engine
    batches = grid.batches(store.done, rows)
    work = SweepWork(engine.prompts, engine.measures, grid.cells, grid.chunk)
    failed: list[tuple[Batch, str]] = []

    def left() -> list[Batch]:
        shown.advance(store.refresh())
        return [batch for batch in batches if not grid.is_done(batch, store.done)]

    with closing(executor.run(engine.model, work, batches, folder=store.folder, left=left)) as outcomes:
        for batch, outcome in outcomes:
            if isinstance(outcome, Failure):
                failed.append((batch, outcome.reason))
                continue
            values, spent = outcome
            engine.work.done += spent.done
            engine.work.least += spent.least
            for each in values:
                shown.advance(store.add(each, written=True))
    if failed:
        lines = [f"{_span(grid, batch, told)}: {reason}" for batch, reason in failed[:5]]
        more = f" (and {len(failed) - 5} more)" if len(failed) > 5 else ""
        kept = "" if store.folder is None else f" The others are done and in {store.folder}: the same call tries these."
        raise MechsteerError(
            f"{len(failed)} of {len(batches)} batches failed every time they were tried.{kept} "
            + "; ".join(lines)
            + more
        )
    if not store.done.all():
        raise MechsteerError(f"{executor!r} ended before all was done.")


def _span(grid: Grid, batch: Batch, told: Callable[[int], str]) -> str:
    """Which cells and prompts a batch holds."""
    members, chunk = grid.members(batch), grid.chunks[batch.chunk]
    cells = told(members[0]) if len(members) == 1 else f"{len(members)} cells from {told(members[0])}"
    return f"{cells}, prompts {int(chunk[0])} to {int(chunk[-1])}"


def _told(values: Mapping[str, Sequence[Any]], cell: int) -> str:
    """A cell's values by name."""
    at = np.unravel_index(cell, [len(each) for each in values.values()]) if values else ()
    return ", ".join(f"{name}={each[int(place)]}" for (name, each), place in zip(values.items(), at, strict=True))


def _named(measure: Measure, axes: Mapping[str, Any]) -> dict[str, Objective]:
    if isinstance(measure, Objective):
        measures = {measure.name: measure}
    elif isinstance(measure, Mapping):
        measures = dict(measure)
    else:
        measures = {each.name: each for each in measure}
        if len(measures) != len(measure):
            names = ", ".join(each.name for each in measure)
            raise MechsteerError(f"Two objectives have the same name ({names}). Pass a dictionary of names.")
    clash = {"prompt", *axes} & set(measures) | ({"prompt"} & set(axes))
    if clash:
        raise MechsteerError(
            f"The name {sorted(clash)[0]!r} is used twice among axes, objectives and 'prompt'. Rename."
        )
    if not measures:
        raise MechsteerError("measure= is empty. Pass at least one Objective.")
    return measures


def _cell(build: Callable[..., Any], coords: Mapping[str, Any]) -> Cell:
    try:
        built = build(**coords)
    except Exception as error:
        error.add_note(f"raised by build() for {', '.join(f'{name}={value!r}' for name, value in coords.items())}")
        raise
    if built is None:
        return ()
    return (built,) if isinstance(built, Intervention) else tuple(built)


def _labels(name: str, values: Sequence[Any]) -> np.ndarray:
    labels = [value if isinstance(value, bool | int | float | str | np.number) else str(value) for value in values]
    if len(set(labels)) < len(labels):
        raise MechsteerError(f"Axis {name!r} has the same value twice. Give each cell its own.")
    return np.asarray(labels)


def _plain(labels: np.ndarray) -> list[Any]:
    return labels.tolist()


def _identity(model: Model, prompts: Prompts, axes: Mapping[str, Any], measures: Mapping[str, Any], cells: Any) -> str:
    """What makes two sweeps the same, as a hash."""
    seen: dict[int, str] = {}
    parts = [model.id.hash, prompts.hash, str([(name, [str(v) for v in values]) for name, values in axes.items()])]
    parts += [name + _digest(each, seen) for name, each in measures.items()]
    parts += [_digest(cell, seen) for cell in cells]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(value: Any, seen: dict[int, str]) -> str:
    """A text that differs where the value does; tensors by their bytes, objects by their fields."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            # Axes of size 1 may have any stride, and a number has no axis: neither can be viewed as bytes as it is.
            flat = value.detach().cpu().contiguous().as_strided((value.numel(),), (1,))
            raw = flat.view(torch.uint8).numpy().data if len(flat) else b""
            seen[id(value)] = f"{tuple(value.shape)}{value.dtype}{hashlib.sha256(raw).hexdigest()}"
        return seen[id(value)]
    if isinstance(value, Prompts):
        return value.hash
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_digest(k, seen)}:{_digest(v, seen)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(_digest(each, seen) for each in value) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ",".join(f"{f.name}={_digest(getattr(value, f.name), seen)}" for f in fields(value))
        return f"{type(value).__name__}({inner})"
    return repr(value)
