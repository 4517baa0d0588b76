"""Checkpoints of a training run: safetensors and JSON, written so that a kill leaves a whole one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = Mapping[str, Mapping[str, Tensor]]
"""Name of a file -> its tensors."""


def save_checkpoint(folder: Path, state: State, progress: Mapping[str, Any]) -> None:
    """Writes `folder/checkpoint`: one safetensors file for each part of `state`, and `progress.json`.

    It is written beside the old one and then swapped in, so that a kill leaves one of the two whole.
    """
    fresh, final, old = (folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    fresh.mkdir(parents=True, exist_ok=True)
    for name, tensors in state.items():
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, fresh / f"{name}.safetensors")
    (fresh / "progress.json").write_text(json.dumps(progress))
    if final.exists():
        _remove(old)
        os.replace(final, old)
    os.replace(fresh, final)
    _remove(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """State and progress of the latest whole checkpoint in `folder`, or None."""
    for name in ("checkpoint", "checkpoint.old"):
        path = folder / name
        if (path / "progress.json").exists():
            state = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
            return state, json.loads((path / "progress.json").read_text())
    return None


def remove_checkpoints(folder: Path) -> None:
    """Removes what `save_checkpoint` left in a run's folder."""
    for name in ("checkpoint", "checkpoint.old", "checkpoint.new"):
        _remove(folder / name)


def optimiser_tensors(optimisers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' states as named tensors, so that they can be kept in safetensors."""
    return {
        f"{name}.{index}.{key}": torch.as_tensor(value)
        for name, optimiser in optimisers.items()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimiser_tensors(optimisers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimiser_tensors` gave."""
    for name, optimiser in optimisers.items():
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, index, field = key.split(".", 2)
            if part == name:
                states.setdefault(int(index), {})[field] = value
        optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


def _remove(folder: Path) -> None:
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
