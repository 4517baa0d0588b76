"""Finished work of a sweep: in memory, and in shards in a folder, so that nothing is computed twice."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.folders import MANIFEST, Folder

_VERSION = 1
# Seconds of finished work that a kill may cost.
_SHARD_SECONDS = 2.0


@dataclass(frozen=True)
class Values:
    """What came out of some cells on some prompts.

    Attributes:
        cells, prompts: their indices.
        arrays: by objective [cell, prompt].
    """

    cells: Sequence[int]
    prompts: np.ndarray
    arrays: Mapping[str, np.ndarray]


@dataclass
class ShardWriter:
    """Collects values, and writes them as shards.

    Attributes:
        folder: where to.
        tag: part of the shards' names: writers into one folder each have their own.
        number: of the next shard.
    """

    folder: Folder
    tag: str = ""
    number: int = 0
    _fresh: dict[str, Tensor] = field(default_factory=dict)
    _n_fresh: int = 0
    _flushed: float = field(default_factory=time.perf_counter)

    def add(self, values: Values, *, flush: bool = True) -> None:
        """Take values; with `flush`, write what there is once two seconds have passed."""
        batch = {"cells": np.asarray(values.cells), "prompts": values.prompts}
        batch |= {f"value.{name}": array for name, array in values.arrays.items()}
        self._fresh |= {
            f"{self._n_fresh}.{key}": torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()
        }
        self._n_fresh += 1
        if flush and time.perf_counter() - self._flushed > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not in the folder yet as one shard.

        Raises:
            OSError: it cannot be written, such as on a full disk; it is kept for the next call.
        """
        if not self._n_fresh:
            return
        name = f"shard-{self.tag}{self.number:05d}.safetensors"
        self.folder.save_tensors(name, self._fresh, {**stamp("sweep shard", _VERSION), "batches": self._n_fresh})
        self.number, self._n_fresh, self._fresh = self.number + 1, 0, {}
        self._flushed = time.perf_counter()


class Store:
    """Values of the cells that are done [cell, prompt].

    Attributes:
        folder: that of the shards; None keeps all in memory.
        values: by objective; NaN where nothing is done.
        done: which are.
    """

    def __init__(self, folder: Folder | None, names: Iterable[str], shape: tuple[int, int], dtype: Any) -> None:
        self.folder = folder
        self.values: dict[str, np.ndarray] = {name: np.full(shape, np.nan, dtype=dtype) for name in names}
        self.done: np.ndarray = np.zeros(shape, dtype=bool)
        self._writer = None if folder is None else ShardWriter(folder)
        self._read: set[str] = set()

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
            MechsteerError: the folder holds something else, or is of a kind that is not known.
        """
        if out is None:
            return Store(None, names, shape, dtype)
        folder = Folder(out)
        store, wanted, there = Store(folder, names, shape, dtype), identity(), folder.names()
        if MANIFEST in there:
            where = f"{folder}/{MANIFEST}"
            try:
                found = check_stamp(json.loads(folder.read_text(MANIFEST)), where, format="sweep", version=_VERSION)
            except ValueError as error:
                if isinstance(error, MechsteerError):
                    raise
                raise MechsteerError(f"{where} is damaged ({error}). Choose another folder.") from error
            if found["identity"] != wanted:
                raise MechsteerError(
                    f"{folder} holds another sweep: model, prompts, axes, interventions or objectives differ. "
                    "Choose another folder for out=, or delete this one."
                )
            store.refresh()
        elif there:
            raise MechsteerError(f"{folder} is not empty and holds no sweep. Choose another folder for out=.")
        else:
            folder.make()
            folder.write_text(MANIFEST, json.dumps({**stamp("sweep", _VERSION), "identity": wanted}))
        return store

    def add(self, values: Values, *, written: bool = False) -> int:
        """Take values, to be written to the folder unless somebody else did; how many of them are new."""
        where = np.ix_(np.asarray(values.cells), values.prompts)  # pyright: ignore
        new = int(np.count_nonzero(~self.done[where]))
        self.done[where] = True
        for name, value in values.arrays.items():
            self.values[name][where] = value
        if self._writer is not None and not written:
            self._writer.add(values)
        return new

    def flush(self) -> None:
        """Write what is not in the folder yet."""
        if self._writer is not None:
            self._writer.flush()

    def refresh(self) -> int:
        """Take the values of shards in the folder that were not there the last time; how many of them are new.

        Raises:
            MechsteerError: one is missing or damaged.
        """
        if self.folder is None or self._writer is None:
            return 0
        shards = {name for name in self.folder.names() if name.startswith("shard-") and name.endswith(".safetensors")}
        new = 0
        for name in sorted(shards - self._read):
            with self.folder.open_tensors(name, format="sweep shard", version=_VERSION) as (file, manifest):
                for index in range(manifest["batches"]):
                    cells, prompts = (file.get_tensor(f"{index}.{key}").numpy() for key in ("cells", "prompts"))
                    arrays = {each: file.get_tensor(f"{index}.value.{each}").numpy() for each in self.values}
                    new += self.add(Values(cells.tolist(), prompts, arrays), written=True)
            number = name.removeprefix("shard-").removesuffix(".safetensors")
            if number.isdecimal():
                self._writer.number = max(self._writer.number, int(number) + 1)
            self._read.add(name)
        return new
