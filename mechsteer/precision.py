"""Where half precision is not enough: sums, small changes of large values, and decompositions of matrices."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of numbers of this type are made in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def precise(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The values in fp32 at least; the same tensor where they are."""
    return values.to(wide(values.dtype))
