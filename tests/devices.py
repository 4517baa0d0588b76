"""Devices that are made up: everything is computed on the CPU, and every tensor carries the name of a device.

Where an operation meets tensors of two devices it raises, as CUDA would. So that what is said about several GPUs can be
tested without any.

    with Pretend():
        x = torch.zeros(3).to("cuda:1")
        x + torch.ones(3)                          # AssertionError: ... cuda:1 and cpu
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CPU = torch.device("cpu")
# Reads of what needs no data, and what takes tensors of any device.
_FREE = (
    "_has_compatible_shallow_copy_type",
    "__get__",
    "__set__",
    "__repr__",
    "is_floating_point",
    "dim",
    "size",
    "numel",
    "element_size",
    "stride",
)


class Pretend(TorchFunctionMode):
    """While it is on, devices like "cuda:1" exist.

    Attributes:
        moved: (from, to) of everything that was moved between two devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of = WeakTensorKeyDictionary()
        self.moved: list[tuple[torch.device, torch.device]] = []

    def of(self, tensor: Tensor) -> torch.device:
        return self._of.get(tensor, CPU)

    def put(self, tensor: Tensor, device: torch.device) -> None:
        self._of[tensor] = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if func == Tensor.device.__get__:
            return self.of(args[0])
        if func == Tensor.is_cuda.__get__:
            return self.of(args[0]).type == "cuda"
        if func == Tensor.data.__set__:
            self.put(args[0], self.of(args[1]))
            return func(*args)
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self._move(name, args, kwargs)
        made = kwargs.get("device")
        if made is not None:
            kwargs["device"] = CPU
        tensors = list(_tensors((args, kwargs)))
        device = CPU if made is None else torch.device(made)
        if tensors and made is None:
            device = self._common(func, name, tensors)
        if name == "numpy" and device != CPU:
            raise AssertionError(f"numpy() of a tensor on {device}")
        out = func(*args, **kwargs)
        if func is torch.autograd.grad:
            wanted = list(_tensors(args[1] if len(args) > 1 else kwargs["inputs"]))
            for each, source in zip(out, wanted, strict=True):
                if each is not None:
                    self.put(each, self.of(source))
            return out
        for tensor in _tensors(out):
            # What comes back as it went in stays where it was.
            if not any(tensor is each for each in tensors):
                self.put(tensor, device)
        return out

    def _move(self, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, rest = args[0], list(args[1:])
        target = CPU if name == "cpu" else torch.device("cuda", 0) if name == "cuda" else self.of(source)
        for place, each in enumerate(rest):
            if isinstance(each, Tensor):
                target, rest[place] = self.of(each), each.dtype
            elif isinstance(each, str | torch.device):
                target, rest[place] = torch.device(each), CPU
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), CPU
        out = source if name != "to" else source.to(*rest, **kwargs)
        if target != self.of(source):
            self.moved.append((self.of(source), target))
            out = out.clone() if out is source else out
        elif out is source:
            return source
        self.put(out, target)
        return out

    def _common(self, func: Any, name: str, tensors: list[Tensor]) -> torch.device:
        found = dict.fromkeys(self.of(each) for each in tensors if each.ndim)
        if name in _FREE or func is torch.autograd.grad:
            return self.of(tensors[0])
        # Indices may be on the CPU, as they may with CUDA.
        if name in ("__getitem__", "__setitem__", "index_put") and self.of(tensors[0]) != CPU:
            found = dict.fromkeys(each for each in found if each != CPU)
        if len(found) > 1:
            raise AssertionError(f"{name} got tensors on {' and '.join(map(str, found))}")
        return next(iter(found), self.of(tensors[0]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
