"""Values as they arrive in another process of an executor."""

import io
from typing import Any

import cloudpickle
import torch

from mechsteer.executors import transport


class Pickler(cloudpickle.CloudPickler):
    """What Ray does with the tensors of an object that it moves."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (torch.Tensor, torch.nn.Parameter):
            return transport.unpack, (transport.pack(obj),)
        return super().reducer_override(obj)


def moved(value: Any) -> Any:
    """As it arrives in another process."""
    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return cloudpickle.loads(buffer.getvalue())
