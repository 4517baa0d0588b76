"""How much memory a call needs, how much there is, and one line about it before work starts."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mechsteer.errors import MechsteerError
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

# Below this a line about memory would only be in the way.
TOLD = 10**9
_GROUP = Path("/sys/fs/cgroup")
# Lines that were told: what is done a hundred times with the same needs says so once.
_told: set[str] = set()


@dataclass(frozen=True)
class Memory:
    """Bytes that a call holds at its largest, by part.

    Attributes:
        parts: such as "weights", "clean pass" and "batch".
        held: names of parts that are in memory already.
    """

    parts: Mapping[str, int]
    held: frozenset[str] = frozenset()

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def new(self) -> int:
        """What is not in memory yet."""
        return sum(size for name, size in self.parts.items() if name not in self.held)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.parts.items() if size)
        return f"needs about {_gb(self.total)} GB: {parts}"

    def announce(self, what: str, *, show: bool = True) -> None:
        """Tell it on standard error, where a bar would be drawn and it is 1 GB or more; each line once in a process."""
        line = f"{what} {self}"
        if not show or self.total < TOLD or line in _told:
            return
        console = Console(stderr=True)
        if console.is_interactive or console.is_jupyter:
            _told.add(line)
            console.print(line, highlight=False)

    def check(self, what: str, devices: Iterable[torch.device], advice: str) -> None:
        """
        Raises:
            MechsteerError: it cannot fit in what is free now on these devices together.
        """
        free = {device: free_bytes(device) for device in devices}
        known = [each for each in free.values() if each is not None]
        if len(known) == len(free) and self.new > sum(known):
            names, have = " and ".join(map(str, free)), "has" if len(free) == 1 else "have"
            raise MechsteerError(f"{what} {self}, and {names} {have} {_gb(sum(known))} GB free. {advice}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.{1 if size >= 5e7 else 3}f}"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device now; None where nobody says. On a CPU, what a container allows counts too."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        # PyTorch keeps what was freed, and gives it again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    found = [_available(), _allowed()]
    known = [each for each in found if each is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _allowed() -> int | None:
    """What the control group of this process has left, its cache of files, which makes room, not counted."""
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(parts.get("inactive_file", 0))
    except (OSError, ValueError):  # "max" is no limit
        return None


def devices_of(model: "Model") -> list[torch.device]:
    """Those that a model's weights are on."""
    return list(dict.fromkeys(each.device for each in model.hooked.parameters()))


def weights(model: "Model") -> dict[str, int]:
    """Of the model, and of the packed forward pass, which holds the weights in an order of its own."""
    size = sum(each.nbytes for each in model.hooked.parameters())
    return {"weights": size, "packed weights": size}


def held(model: "Model") -> frozenset[str]:
    """Which of these are there already."""
    return frozenset({"weights"} | ({"packed weights"} if model.has_decoder else set()))


def of_activations(model: "Model", sites: Iterable[Site], tokens: int, *, width: int) -> int:
    """Bytes of whole hook points at so many tokens.

    Args:
        tokens: padding included.
        width: of the batch, for sites with an entry for each source token.
    """
    sizes = {"src": width, "one": 1}
    total = 0
    for site in sites:
        numbers = 1
        for axis in site.axes:
            if axis not in ("batch", "pos", "dest"):
                numbers *= model.size(site, axis) or sizes.get(axis, 1)
        total += numbers * tokens * model.dtype.itemsize
    return total


def of_folder(folder: Path, dtype: torch.dtype) -> int | None:
    """Bytes of the weights in a folder once they are loaded; None where their headers are not readable."""
    from safetensors import safe_open

    count = 0
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():  # some folders hold the same weights once more under other names
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            names = {"model.safetensors"} if (folder / "model.safetensors").is_file() else {"*.safetensors"}
        for path in sorted(path for name in names for path in folder.glob(name)):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    shape: Any = file.get_slice(name).get_shape()
                    count += int(torch.Size(shape).numel())
    except Exception:  # what loading says of it is clearer
        return None
    return count * dtype.itemsize or None
