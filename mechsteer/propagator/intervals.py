"""Error bars of means over prompts, and the refusal of numbers that have none."""

from collections.abc import Iterable

import numpy as np
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.result import bootstrap_ci


def with_intervals(data: xr.Dataset, names: Iterable[str], *, over: str = "prompt", seed: int = 0) -> xr.Dataset:
    """The same data with `{name}_low` and `{name}_high`: the 95 % bootstrap interval of the mean.

    Args:
        data: arrays that have the dimension.
        names: of the arrays.
        over: what is averaged over and resampled.
        seed: of the resampling.
    """
    ends = {}
    for name in names:
        array = data[name]
        rest = [dim for dim in array.dims if dim != over]
        bounds = bootstrap_ci(array.transpose(over, ...).values.astype(np.float64), seed=seed)
        ends |= {f"{name}_{end}": (rest, values) for end, values in zip(("low", "high"), bounds, strict=True)}
    return data.assign(ends)


def check_finite(data: xr.DataArray, what: str, *, over: str = "prompt") -> None:
    """Refuse an objective that is NaN or infinite somewhere.

    Args:
        data: its values.
        what: which objective.
        over: dimension to name a place of.

    Raises:
        MechsteerError: a number is not finite.
    """
    bad = ~np.isfinite(data.transpose(over, ...).values)
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).argmax())
        raise MechsteerError(f"{what} is NaN or infinite on {over} {row}. Choose an objective that is finite there.")
