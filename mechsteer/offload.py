"""Activations that do not fit in memory: recorded a few prompts at a time, into a file that is then memory-mapped."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor

from mechsteer.activations import Activations, manifest_of, prompt_tensors
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Intervention, columns_of, stacked_hooks
from mechsteer.memory import Memory, free_bytes, of_activations
from mechsteer.prompts import Prompts
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

# Tokens of a forward pass, padding included.
_TOKENS = {"cpu": 4096, "cuda": 65536}
_TYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
    torch.bool: "BOOL", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip
"""What safetensors calls them."""


def too_large(model: "Model", prompts: Prompts, sites: Sequence[Site], share: float) -> bool:
    """Whether recorded activations would take more than a share of the memory that is free now; says so.

    Raises:
        MechsteerError: the share is none.
    """
    if not 0 < share <= 1:
        raise MechsteerError(f"memory={share} is no share of the free memory. Pass a number above 0 and up to 1.")
    width = prompts.tokens.shape[1]
    need = Memory({"activations": of_activations(model, sites, prompts.tokens.numel(), width=width)})
    free = free_bytes(model.device)
    if free is None or need.total <= share * free:
        return False
    Console(stderr=True).print(
        f"{need}, more than {share:.0%} of the {free / 1e9:.1f} GB that are free: recorded to disk", highlight=False
    )
    return True


def recorded(
    model: "Model",
    given: Prompts,
    interventions: Sequence[Intervention],
    sites: Sequence[Site],
    read: Bool[Tensor, "batch pos"],
    out: str | os.PathLike[str] | None,
) -> tuple[Float[Tensor, "row d_vocab"], Activations]:
    """Logits at `read`, and activations in a file.

    Args:
        given: in the layout that the activations get.
        read: in the layout of the right-padded prompts.
        out: the file, as `Activations.save` writes it; None for one that is gone with the activations.

    Raises:
        MechsteerError: the disk has no room for it.
    """
    folder = None if out is not None else Path(tempfile.mkdtemp(prefix="activations-"))
    path = Path(out) if out is not None else folder / "activations.safetensors"  # type: ignore[operator]
    fresh = path.with_name(f"{path.name}.tmp")
    right = given.padded("right")
    columns, rows = columns_of([tuple(interventions)], model.n_layers), []
    places: dict[str, np.ndarray] = {}
    size = max(1, _TOKENS.get(model.device.type, _TOKENS["cuda"]) // right.tokens.shape[1])
    try:
        for index in torch.arange(len(right), device=right.tokens.device).split(size):
            items = replace(right, labels=())[index]
            hooks = stacked_hooks(columns, model, base=right, items=items, example=index, cell=torch.zeros_like(index))
            with torch.no_grad():
                some, taken = model.forward(items, hooks, sites, read=read[index])
            rows.append(some)
            part = replace(given, labels=())[index]
            values = {str(site): relay(taken[site], site, items, part) for site in sites}
            if not places:
                places = _file(fresh, model, given, sites, values)
            for name, value in values.items():
                raw = value.detach().cpu().contiguous().view(torch.uint8).flatten(1).numpy()
                places[name][int(index[0]) : int(index[-1]) + 1] = raw
        for place in places.values():
            place.flush()  # type: ignore[attr-defined]
        places.clear()
        os.replace(fresh, path)
        held = Activations.load(path)
        return torch.cat(rows), Activations({site: held[site] for site in sites}, prompts=given, model=model.id)
    finally:
        fresh.unlink(missing_ok=True)
        if folder is not None:
            # What is mapped stays readable until the last tensor is gone.
            shutil.rmtree(folder, ignore_errors=True)


def _file(
    path: Path, model: "Model", given: Prompts, sites: Sequence[Site], values: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """A safetensors file of all prompts' activations, and where the bytes of each prompt stand in it."""
    fixed = {name: each.detach().cpu().contiguous() for name, each in prompt_tensors(given).items()}
    shapes = {name: (value.dtype, (len(given), *value.shape[1:])) for name, value in values.items()}
    shapes |= {name: (each.dtype, tuple(each.shape)) for name, each in fixed.items()}
    header: dict[str, object] = {"__metadata__": {"mechsteer": json.dumps(manifest_of(given, model.id, sites))}}
    start, starts = 0, {}
    # The widest first, as safetensors has them, so that all are aligned.
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda each: (-each[1][0].itemsize, each[0])):
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        starts[name], start = start, stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(path.parent).free
    if start > room:
        raise MechsteerError(
            f"The activations take {start / 1e9:.1f} GB on disk, and {path.parent} has {room / 1e9:.1f} GB. Record "
            "fewer sites or prompts, pass out= on another disk, or keep statistics alone: ms.record_stream(keep=False)."
        )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    base = 8 + len(text)

    def place(name: str) -> np.ndarray:
        dtype, shape = shapes[name]
        width = prod(shape[1:]) * dtype.itemsize
        return np.memmap(path, dtype=np.uint8, mode="r+", offset=base + starts[name], shape=(shape[0], width))

    for name, each in fixed.items():
        place(name)[:] = each.view(torch.uint8).flatten(1).numpy()
    return {name: place(name) for name in values}


def relay(tensor: Float[Tensor, "batch ..."], site: Site, right: Prompts, given: Prompts) -> Float[Tensor, "batch ..."]:
    """Activations of right-padded prompts in the layout of `given`, zero at padding.

    Rows of padding hold what the model made of it, which would differ with the amount of padding.
    """
    dest_axis = 2 if site.axes[-1] == "src" else 1
    if bool(right.mask.all()) and right.mask.shape == given.mask.shape:
        return tensor
    out = _relay_axis(tensor, dest_axis, right, given)
    return _relay_axis(out, 3, right, given) if dest_axis == 2 else out


def _relay_axis(
    tensor: Float[Tensor, "batch ..."], axis: int, right: Prompts, given: Prompts
) -> Float[Tensor, "batch ..."]:
    index = given.positions.clamp(min=0)
    shape = [index.shape[0], *[1] * (tensor.ndim - 1)]
    shape[axis] = index.shape[1]
    size = list(tensor.shape)
    size[axis] = index.shape[1]
    moved = tensor.gather(axis, index.view(shape).expand(size))
    return torch.where(given.mask.view(shape), moved, 0)
