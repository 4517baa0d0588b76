"""Draws a Result with plotly. Nothing else in mechsteer draws."""

import html
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from mechsteer.errors import MechsteerError
from mechsteer.result import Result, bootstrap_ci

_MOST_LINES = 40
_MOST_TICKS = 60


def draw(result: Result, name: str | None = None, *, title: str | None = None) -> go.Figure:
    """A figure of one array of a Result.

    A `prompt` dimension is averaged over; lines then carry the 95 % bootstrap interval of that mean. What is left is
    drawn by its dimensions: `alpha` along x with one line for each cell of the others; else one dimension as a line
    and two as a heatmap, the first of them along y, with colours centred at 0 if there are values of both signs.

    Args:
        result: holds the array.
        name: of the array; None if there is only one.
        title: None takes the array's name.

    Raises:
        MechsteerError: the array was not named, is not there, is text, or has too many dimensions.
    """
    array = _choose(result, name)
    dims = tuple(str(dim) for dim in array.dims if dim != "prompt")
    if not dims and "prompt" in array.dims:  # one number per prompt: each is a point
        figure = _lines(array.astype(float), "prompt", mode="markers")
    elif len(dims) == 1 or "alpha" in dims:
        figure = _lines(array.astype(float), "alpha" if "alpha" in dims else dims[0])
    elif len(dims) == 2:
        averaged = array.astype(float).mean("prompt", keep_attrs=True) if "prompt" in array.dims else array
        figure = _heatmap(averaged.astype(float))
    else:
        held = ", ".join(map(str, array.dims)) or "no dimension"
        raise MechsteerError(
            f"Result cannot draw {array.name!r} with {held}: it draws one or two dimensions, besides prompt and alpha. "
            "Pick with .sel(...) or average with .mean(...) first."
        )
    return figure.update_layout(title={"text": plain(title or str(array.name))}, template="simple_white")


def plain(text: str) -> str:
    """Text as plotly shows it literally: plotly reads HTML tags, entities and $TeX$ in every label.

    Characters that do not print (line breaks, direction marks, half-decoded bytes) are shown as escapes.
    """
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return html.escape(shown, quote=False).replace("$", "&#36;")


def _choose(result: Result, name: str | None) -> xr.DataArray:
    if name is None:
        names = [str(each) for each in result.data.data_vars]
        if len(names) != 1:
            raise MechsteerError(f"Result holds {len(names)} arrays ({', '.join(names)}). Name the one to draw.")
        name = names[0]
    array = result[name]
    if array.dtype.kind not in "bifu":
        raise MechsteerError(f"Result cannot draw {name!r}, which holds {array.dtype} and no numbers.")
    # Dimensions without coordinates count from 0, also in what hovering shows.
    return array.assign_coords({dim: array[dim] for dim in array.dims})


def _lines(array: xr.DataArray, along: str, *, mode: str = "lines+markers") -> go.Figure:
    figure = go.Figure()
    averaged = "prompt" in array.dims and along != "prompt"
    others = [str(dim) for dim in array.dims if dim not in (along, "prompt")]
    cells = list(itertools.product(*(range(array.sizes[dim]) for dim in others)))
    if len(cells) > _MOST_LINES:
        raise MechsteerError(
            f"Result cannot draw {array.name!r} as {len(cells)} lines (one for each {' and '.join(others)}); "
            f"it draws up to {_MOST_LINES}. Pick with .sel(...) or average with .mean(...) first."
        )
    x, axis = _axis(array, along)
    for index, cell in enumerate(cells):
        line = array.isel(dict(zip(others, cell, strict=True)))
        mean = line.mean("prompt", keep_attrs=True) if averaged else line
        label = ", ".join(f"{dim}={_shown(array[dim].values[at])}" for dim, at in zip(others, cell, strict=True))
        colour = qualitative.D3[index % len(qualitative.D3)]
        style: dict[str, Any] = {"legendgroup": str(index), "line": {"color": colour}, "marker": {"color": colour}}
        hover = [_hover(mean.isel({along: at})) for at in range(len(x))]
        if averaged and array.sizes["prompt"] > 1:
            low, high = bootstrap_ci(line.transpose("prompt", along).values, seed=0)
            hover = [
                f"{text}<br>95 % interval: {a:.4g} to {b:.4g}" for text, a, b in zip(hover, low, high, strict=True)
            ]
            # Two traces, because a band that is one closed outline breaks where a value is NaN.
            edge = {"x": x, "mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
            edge |= {"legendgroup": str(index), "showlegend": False}
            figure.add_scatter(y=low, **edge)
            figure.add_scatter(y=high, fill="tonexty", fillcolor=_faint(colour), **edge)
        figure.add_scatter(
            x=x, y=mean.values, mode=mode, name=plain(label), showlegend=bool(others), hoverinfo="text",
            hovertext=hover, **style,
        )  # fmt: skip
    return figure.update_layout(xaxis=axis, yaxis={"title": {"text": plain(str(array.name))}})


def _heatmap(array: xr.DataArray) -> go.Figure:
    rows, columns = map(str, array.dims)
    (x, x_axis), (y, y_axis) = _axis(array, columns, even=True), _axis(array, rows, even=True)
    finite = array.values[np.isfinite(array.values)]
    signed = finite.size > 0 and finite.min() < 0 < finite.max()
    colours = {"colorscale": "RdBu", "zmid": 0.0} if signed else {"colorscale": "Blues"}
    hover = [[_hover(array.isel({rows: i, columns: j})) for j in range(len(x))] for i in range(len(y))]
    figure = go.Figure(
        go.Heatmap(
            x=x, y=y, z=array.values, hoverinfo="text", hovertext=hover,
            colorbar={"title": {"text": plain(str(array.name))}}, **colours,
        )
    )  # fmt: skip
    return figure.update_layout(xaxis=x_axis, yaxis=y_axis)


def _axis(array: xr.DataArray, dim: str, *, even: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Where the cells of a dimension stand, and plotly's settings of the axis; `even` spaces numbers as steps."""
    values = array[dim].values
    axis: dict[str, Any] = {"title": {"text": plain(dim)}}
    if values.dtype.kind in "bifu" and not even:
        return values.astype(float), axis
    # Numbered by hand, because plotly merges equal labels and reads text such as "12" or "2024-01" as what it is not.
    places = np.arange(len(values))
    ticks = places[:: max(1, -(-len(values) // _MOST_TICKS))]
    labels = [plain(_shown(values[at])) for at in ticks]
    return places, axis | {"tickmode": "array", "tickvals": ticks, "ticktext": labels}


def _hover(cell: xr.DataArray) -> str:
    """All coordinates of a cell, and its value."""
    coordinates: Mapping[Any, Any] = {name: value.values for name, value in cell.coords.items() if not value.dims}
    parts = [f"{plain(str(name))}: {plain(_shown(value[()]))}" for name, value in coordinates.items()]
    return "<br>".join([*parts, f"{plain(str(cell.name))}: {float(cell):.4g}"])


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
