"""`sweep`: the same measurement over a grid of interventions, as fast as the model allows."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.engine import Cell, Clean, Engine, first_stage, shape_of
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, open_tensors, save_tensors, stamp
from mechsteer.hooks import Intervention, check
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.progress import Bar, bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance

Measure = Objective | Mapping[str, Objective] | Sequence[Objective]
_VERSION = 1
# Tokens of prompts whose clean pass is kept at a time, and rows that the first batch of cells has.
_CHUNK = {"cpu": 4096, "cuda": 65536}
_ROWS = {"cpu": 1024, "cuda": 16384}
# Seconds of finished work that a kill may cost.
_SHARD_SECONDS = 2.0


def sweep(
    model: Model,
    prompts: PromptsLike,
    *,
    axes: Mapping[str, Iterable[Any]],
    build: Callable[..., Intervention | Iterable[Intervention] | None],
    measure: Measure,
    out: str | os.PathLike[str] | None = None,
    rows: int | None = None,
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
        out: a folder for finished work, written at least every two seconds. The same sweep with the same folder
            continues where it ended, whatever ended it.
        rows: tokens in a batch; None finds a fast number by measuring, and halves it when memory runs out.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result with one array per objective and dimensions (*axes, prompt).

    Raises:
        MechsteerError: an axis, an intervention or an objective does not fit, or `out` holds another sweep.
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
    by_shape: dict[Any, list[int]] = {}
    for index, cell in enumerate(cells):
        by_shape.setdefault(shape_of(cell), []).append(index)
    for members in by_shape.values():
        model.check_slots(right, cells[members[0]])
    engine = Engine(model, right, measures)
    groups = [Group.of(engine, members, cells) for members in by_shape.values()]
    store = Store.open(
        out,
        list(measures),
        (len(cells), len(right)),
        np.float64 if model.dtype == torch.float64 else np.float32,
        lambda: _identity(model, right, values, measures, cells),
    )
    device = model.device.type
    stages, chunk = [group.stage for group in groups], _CHUNK.get(device, _CHUNK["cuda"])
    engine.memory(stages, rows=rows or _ROWS.get(device, _ROWS["cuda"]), chunk=chunk).announce("Sweep", show=progress)
    least = engine.memory(stages, rows=int(right.lengths.max()), chunk=1)
    least.check("This sweep", model.device, "Pass shorter prompts, or load the model with dtype=torch.bfloat16.")
    with bar("cells", len(cells) * len(right), show=progress) as shown:
        shown.advance(int(store.done.sum()))
        size = BatchSize(rows or _ROWS.get(device, _ROWS["cuda"]), fixed=rows is not None)
        try:
            for chunk in _chunks(right, _CHUNK.get(device, _CHUNK["cuda"])):
                _run_chunk(engine, groups, cells, chunk, store, size, shown)
        finally:
            store.flush()
    options = {
        "engine": "packed" if all(group.packed for group in groups) else "hooks",
        "axes": {name: _plain(label) for name, label in labels.items()},
        "rows": size.rows,
        "flops": engine.work.done,
        "least_flops": engine.work.least,
    }
    shape = [*(len(each) for each in values.values()), len(right)]
    data = xr.Dataset(
        {name: ((*values, "prompt"), store.values[name].reshape(shape)) for name in measures},
        coords={**labels, "prompt": list(right.labels) if right.labels else np.arange(len(right))},
    )
    result = Result(data, provenance=provenance(model=model.id, seconds=time.perf_counter() - began, **options))
    if out is not None:
        result.save(Path(out) / "result.safetensors")
    return result


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


@dataclass
class BatchSize:
    """How many rows a batch has: doubled or halved as long as that is faster, and halved when memory runs out."""

    rows: int
    fixed: bool = False
    _best: float = 0.0
    _factor: float = 2.0
    _tried: int = 0

    def report(self, rows: int, flops: float, seconds: float) -> None:
        """Learn from a batch, unless it was too small to tell or the search is over."""
        if self.fixed or self._tried > 6 or rows < 0.7 * self.rows:
            return
        speed = flops / seconds
        if speed > 1.03 * self._best:
            self._best = speed
            self.rows = max(64, int(self.rows * self._factor))
        else:
            # Back to the best so far; then the other direction, once.
            self.rows = int(self.rows / self._factor)
            if self._factor > 1 and self._tried <= 2:
                self._factor = 0.5
                self.rows = max(64, int(self.rows * self._factor))
            else:
                self.fixed = True
        self._tried += 1

    def out_of_memory(self) -> None:
        self.rows, self.fixed = max(1, self.rows // 2), True


def _run_chunk(
    engine: Engine,
    groups: Sequence[Group],
    cells: Sequence[Cell],
    chunk: Int[Tensor, " example"],
    store: "Store",
    size: BatchSize,
    shown: Bar,
) -> None:
    """All cells on some of the prompts."""
    local = chunk.cpu().numpy()
    todo = []
    for group in groups:
        left = [place for place, index in enumerate(group.members) if not store.done[index, local].all()]
        if left:
            todo.append((group, left))
    if not todo:
        return
    clean = _clean(engine, [group for group, _ in todo if group.packed], chunk)
    stop, reads = engine.stop[chunk], int(engine.read[chunk].sum())
    # Logits of more tokens than this would take more memory than everything else.
    most = max(1, (1 << 25) // (max(1, reads) * engine.model.d_vocab)) if reads else 1 << 30
    for group, left in todo:
        starts = group.starts[:, chunk]
        counts = (stop - starts).sum(1)
        if not group.packed:
            counts = torch.full_like(counts, engine.prompts.tokens[chunk].numel())
        counts_list = counts.tolist()
        # Cells with as many rows next to each other: less padding.
        left.sort(key=lambda place: -counts_list[place])
        while left:
            n_cells, n_rows = 0, 0
            while n_cells < min(len(left), most) and (not n_cells or n_rows + counts_list[left[n_cells]] <= size.rows):
                n_rows += counts_list[left[n_cells]]
                n_cells += 1
            places = left[:n_cells]
            members = [group.members[place] for place in places]
            before, began = engine.work.least, time.perf_counter()
            try:
                values = engine.batch(
                    [cells[index] for index in members], chunk, starts[places], clean if group.packed else None
                )
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if n_cells == 1 or not _is_out_of_memory(error):
                    raise
                size.out_of_memory()
                size.rows = min(size.rows, max(1, n_rows // 2))
                continue
            arrays = {name: _numpy(value) for name, value in values.items()}
            seconds = time.perf_counter() - began
            size.report(n_rows, engine.work.least - before if group.packed else float(n_rows), seconds)
            store.add(members, local, arrays)
            shown.advance(n_cells * len(local))
            left = left[n_cells:]


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


def _is_out_of_memory(error: BaseException) -> bool:
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


class Store:
    """Values of the cells that are done [cell, prompt], in memory and, where there is a folder, in shards on disk."""

    def __init__(self, folder: Path | None, names: Sequence[str], shape: tuple[int, int], dtype: Any) -> None:
        self._folder = folder
        self.values: dict[str, np.ndarray] = {name: np.full(shape, np.nan, dtype=dtype) for name in names}
        self.done: np.ndarray = np.zeros(shape, dtype=bool)
        self._fresh: dict[str, Tensor] = {}
        self._n_fresh = self._n_shards = 0
        self._flushed = time.perf_counter()

    @staticmethod
    def open(
        out: str | os.PathLike[str] | None,
        names: Sequence[str],
        shape: tuple[int, int],
        dtype: Any,
        identity: Callable[[], str],
    ) -> "Store":
        """A new store, or what a folder holds of the same sweep.

        Raises:
            MechsteerError: the folder holds something else.
        """
        if out is None:
            return Store(None, names, shape, dtype)
        folder, manifest = Path(out), Path(out) / "manifest.json"
        store, wanted = Store(folder, names, shape, dtype), identity()
        if manifest.exists():
            try:
                found = check_stamp(json.loads(manifest.read_text()), manifest, format="sweep", version=_VERSION)
            except ValueError as error:
                if isinstance(error, MechsteerError):
                    raise
                raise MechsteerError(f"{manifest} is damaged ({error}). Choose another folder.") from error
            if found["identity"] != wanted:
                raise MechsteerError(
                    f"{folder} holds another sweep: model, prompts, axes, interventions or objectives differ. "
                    "Choose another folder for out=, or delete this one."
                )
            for path in sorted(folder.glob("shard-*.safetensors")):
                store._read(path)
        elif folder.exists() and any(folder.iterdir()):
            raise MechsteerError(f"{folder} is not empty and holds no sweep. Choose another folder for out=.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = manifest.with_suffix(".tmp")
            fresh.write_text(json.dumps({**stamp("sweep", _VERSION), "identity": wanted}))
            os.replace(fresh, manifest)
        return store

    def add(self, cells: Sequence[int], prompts: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Values [cell, prompt] of some cells on some prompts."""
        where = np.ix_(np.asarray(cells), prompts)  # pyright: ignore
        self.done[where] = True
        for name, value in values.items():
            self.values[name][where] = value
        if self._folder is None:
            return
        batch = {"cells": np.asarray(cells), "prompts": prompts, **{f"value.{name}": v for name, v in values.items()}}
        self._fresh |= {
            f"{self._n_fresh}.{key}": torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()
        }
        self._n_fresh += 1
        if time.perf_counter() - self._flushed > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet as one shard."""
        if self._folder is None or not self._n_fresh:
            return
        path = self._folder / f"shard-{self._n_shards:05d}.safetensors"
        save_tensors(path, self._fresh, {**stamp("sweep shard", _VERSION), "batches": self._n_fresh})
        self._n_shards, self._n_fresh, self._fresh = self._n_shards + 1, 0, {}
        self._flushed = time.perf_counter()

    def _read(self, path: Path) -> None:
        with open_tensors(path, format="sweep shard", version=_VERSION) as (file, manifest):
            for index in range(manifest["batches"]):
                cells, prompts = (file.get_tensor(f"{index}.{key}").numpy() for key in ("cells", "prompts"))
                where = np.ix_(cells, prompts)
                self.done[where] = True
                for name, array in self.values.items():
                    array[where] = file.get_tensor(f"{index}.value.{name}").numpy()
        self._n_shards = int(path.stem.removeprefix("shard-")) + 1


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
