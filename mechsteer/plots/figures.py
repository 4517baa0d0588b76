"""Chooses how to draw an array of a Result."""

import plotly.graph_objects as go
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.plots.heatmaps import heatmaps
from mechsteer.plots.labels import name_of, plain
from mechsteer.plots.lines import lines
from mechsteer.plots.scatters import scatter
from mechsteer.plots.themes import theme
from mechsteer.result import Result

# What is drawn of a Result of several arrays, such as a patching map or its significance.
_FIRST = ("effect", "mean")
# Arrays whose mean over prompts `low` and `high` of the same Result are the interval of.
_WITH_INTERVAL = ("effect", "mean", "recovered")


def draw(
    result: Result,
    name: str | None = None,
    *,
    title: str | None = None,
    along: str | None = None,
    facet: str | None = None,
    marks: str | None = None,
    limit: float | None = None,
    against: str | None = None,
    colour: str | None = None,
) -> go.Figure:
    """A figure of one array of a Result.

    A `prompt` dimension is averaged over; lines then carry the 95 % bootstrap interval of that mean. What is left is
    drawn by its dimensions:

    - `alpha` along x with one line for each cell of the others
    - one dimension as a line, or as points where it is of names, which have no order; with a band (or bars)
      where the Result has `<name>_low` and `<name>_high` to the array, or `low`
      and `high` to a drawn `mean`
    - two as a heatmap, the first of them along y with its first value on top, with colours centred at 0 if there are
      values of both signs; or with `along`, which of them is along x of lines
    - three as a heatmap for each value of one of them, all on one scale

    Ticks show tokens where a coordinate `<dim>_token` or `token` lies along the dimension. Names and units are the
    attrs `long_name` and `units` of arrays and coordinates; a coordinate with the attr `scale="log"` has such an axis.

    Args:
        result: holds the array.
        name: of the array; None takes the only one, or "effect", or "mean".
        title: None takes the array's name.
        along: the dimension along x, with one line for each cell of the others; None takes `alpha` or an only one.
        facet: the dimension whose values are drawn apart; None takes `site`, or else the first of three.
        marks: a boolean array; a dot stands on each cell of a heatmap where it is True. None takes "matters", if the
            Result has one of the same dimensions.
        limit: colours of a heatmap end at this value (and at its negative, with both signs), and the colour bar says
            so; None takes all values in.
        against: a second array of the same dimensions: draws a point for each cell, with this one along x, the line
            of equality and the rank correlation.
        colour: a coordinate or array by whose values lines, or such points, are coloured.

    Raises:
        MechsteerError: the array was not named, is not there, is text, or has too many dimensions; or an option does
            not go with it.
    """
    array = _choose(result, name)
    if against is not None:
        figure = scatter(result, _mean(array), _mean(_choose(result, against)), colour)
        return _finished(figure, title or f"{array.name} against {against}", array)
    dims = tuple(str(dim) for dim in array.dims if dim != "prompt")
    if along is None and ("alpha" in dims or len(dims) == 1):
        along = "alpha" if "alpha" in dims else dims[0]
    if along is not None and along not in dims:
        raise MechsteerError(
            f"along={along!r} is no dimension of {array.name!r} that lines could follow, which has "
            f"{', '.join(dims) or 'none'} besides prompt. Pass one of these."
        )
    is_lines = along is not None
    is_map = len(dims) in (2, 3) and not is_lines
    for_maps = {"marks": marks, "limit": limit} if not is_map else {}
    for option, value in (for_maps if is_lines else {"colour": colour} | for_maps).items():
        if value is not None:
            kind = "lines, and for points, which against= draws" if option == "colour" else "heat maps"
            raise MechsteerError(f"{option}={value!r} is for {kind}, and {array.name!r} is drawn otherwise.")
    if facet is not None and (facet not in dims or len(dims) != 3 or not is_map):
        raise MechsteerError(
            f"facet={facet!r} does not go with {array.name!r}, which has {', '.join(dims) or 'no dimension'} besides "
            "prompt: it is one of three dimensions, none of which is along x of lines."
        )
    if not dims and "prompt" in array.dims:  # one number per prompt: each is a point
        figure = lines(array.astype(float), "prompt", mode="markers")
    elif along is not None:
        hues = None if colour is None else result[colour]
        figure = lines(array.astype(float), along, band=_band(result, array), colour=hues)
    elif is_map:
        facet = facet or (None if len(dims) == 2 else "site" if "site" in dims else dims[0])
        dots = _marks(result, array, dims, marks)
        figure = heatmaps(_mean(array), facet, marks=dots, band=_band(result, array), limit=limit)
    else:
        held = ", ".join(map(str, array.dims)) or "no dimension"
        raise MechsteerError(
            f"Result cannot draw {array.name!r} with {held}: it draws one to three dimensions, besides prompt and "
            "alpha. Pick with .sel(...) or average with .mean(...) first."
        )
    return _finished(figure, title, array)


def _finished(figure: go.Figure, title: str | None, array: xr.DataArray) -> go.Figure:
    return theme(figure).update_layout(title_text=plain(title) if title else name_of(array))


def _choose(result: Result, name: str | None) -> xr.DataArray:
    if name is None:
        names = [str(each) for each in result.data.data_vars]
        name = next((first for first in _FIRST if first in names), names[0] if len(names) == 1 else None)
        if name is None:
            raise MechsteerError(f"Result holds {len(names)} arrays ({', '.join(names)}). Name the one to draw.")
    array = result[name]
    if array.dtype.kind not in "bifu":
        raise MechsteerError(f"Result cannot draw {name!r}, which holds {array.dtype} and no numbers.")
    # Dimensions without coordinates count from 0, also in what hovering shows.
    return array.assign_coords({dim: array[dim] for dim in array.dims})


def _mean(array: xr.DataArray) -> xr.DataArray:
    return (array.mean("prompt", keep_attrs=True) if "prompt" in array.dims else array).astype(float)


def _band(result: Result, array: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray] | None:
    """The interval that stands beside a mean: `low` and `high` of a map, or `<name>_low` and `<name>_high`."""
    ends = [f"{array.name}_low", f"{array.name}_high"]
    if not set(ends) <= set(result.data.data_vars):
        ends = ["low", "high"]
        if array.name not in _WITH_INTERVAL or not set(ends) <= set(result.data.data_vars):
            return None
    low, high = (result[end] for end in ends)
    averaged = set(array.dims) - {"prompt"}
    if not set(low.dims) == averaged == set(high.dims) or bool(low.isnull().all()):
        return None
    return low, high


def _marks(result: Result, array: xr.DataArray, dims: tuple[str, ...], name: str | None) -> xr.DataArray | None:
    if name is None and ("matters" not in result.data.data_vars or array.name == "matters"):
        return None
    found = result[name or "matters"]
    if found.dtype.kind == "b" and set(found.dims) == set(dims):
        return found.transpose(*dims)
    if name is None:
        return None
    raise MechsteerError(
        f"marks={name!r} has {found.dtype} with {', '.join(map(str, found.dims)) or 'no dimension'}. Marks on "
        f"{array.name!r} are True and False with {', '.join(dims)}."
    )
