"""How tensors travel to workers: as arrays in Ray's object store, which processes of one machine read in place."""

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

# numpy has no such types: their bytes travel as integers.
_AS = {torch.bfloat16: torch.int16}
# Arrays on their way, by address, type and shape: an array keeps its memory, so no address has two owners.
_PACKED: "WeakValueDictionary[tuple[Any, ...], np.ndarray]" = WeakValueDictionary()
_done = False


def share_tensors() -> None:
    """Let Ray move tensors without a copy for each worker; once in a process."""
    global _done
    if _done:
        return
    from ray.util import register_serializer

    register_serializer(Tensor, serializer=pack, deserializer=unpack)
    register_serializer(nn.Parameter, serializer=pack, deserializer=unpack)
    _done = True


def gpus_of(model: Any) -> int:
    """On how many GPUs a model is."""
    return len({each.device for each in model.hooked.parameters() if each.is_cuda})


def pack(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, str, bool, bool]:
    """A tensor's values in the CPU's memory, its type, device, and whether it is trained and a parameter."""
    plain = tensor.detach().cpu().contiguous()
    array = plain.view(_AS.get(plain.dtype, plain.dtype)).numpy()
    if plain.data_ptr() == tensor.data_ptr():
        # Tensors that share their memory share it there too: one vector of a thousand cells is one vector.
        array = _PACKED.setdefault((plain.data_ptr(), plain.dtype, *plain.shape), array)
    return array, tensor.dtype, str(tensor.device), tensor.requires_grad, isinstance(tensor, nn.Parameter)


def unpack(packed: tuple[np.ndarray, torch.dtype, str, bool, bool]) -> Tensor:
    """The tensor. On the CPU it shares read-only memory: nothing may be written to it in place. Of another device it is
    on the one of the same number, counted round where there are fewer."""
    array, dtype, device, trained, parameter = packed
    with warnings.catch_warnings():
        # Tensors know no read-only memory: torch warns of an array that is.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        tensor = torch.from_numpy(array).view(dtype)
    if device != "cpu" and torch.cuda.is_available():
        tensor = tensor.to(torch.device("cuda", (torch.device(device).index or 0) % torch.cuda.device_count()))
    return nn.Parameter(tensor, requires_grad=trained) if parameter else tensor.requires_grad_(trained)


@dataclass(frozen=True)
class Parcel:
    """An object on its way from one process of a cluster to another, as Ray itself would send it. Who only hands it on
    need not open it, nor have the devices that its tensors are for.

    Attributes:
        data: all but the tensors' values.
        buffers: these.
    """

    data: bytes
    buffers: tuple[np.ndarray, ...]

    @staticmethod
    def of(value: Any) -> "Parcel":
        from ray.cloudpickle import cloudpickle

        share_tensors()
        buffers: list[Any] = []
        data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        return Parcel(data, tuple(np.frombuffer(each.raw(), dtype=np.uint8) for each in buffers))

    def open(self) -> Any:
        """The object; its tensors on the CPU are where the buffers are."""
        from ray import cloudpickle

        return cloudpickle.loads(self.data, buffers=self.buffers)
