"""Lines with bands, and points with bars where no line may join them."""

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.plots.labels import axis, cell_name, hovers, in_order, name_of, plain, shown
from mechsteer.plots.themes import PALETTE
from mechsteer.result import bootstrap_ci

_MOST_LINES = 40
_MOST_MARKERS = 60
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Of markers without lines, in the place of dashes.
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")
_Band = tuple[xr.DataArray, xr.DataArray]


def lines(
    array: xr.DataArray,
    along: str,
    *,
    mode: str | None = None,
    band: _Band | None = None,
    colour: xr.DataArray | None = None,
) -> go.Figure:
    """One line along a dimension for each cell of the others; the mean over `prompt` with its 95 % bootstrap interval.

    Args:
        array: of numbers.
        along: the dimension of x.
        mode: of plotly's scatter; None draws markers on lines of up to 60 points, and along names, which have no order,
            markers alone, those of several cells side by side.
        band: lower and upper end of an interval that is known already, in the dimensions of `array`.
        colour: lines of which this has the same value share a colour, and differ in their dashes.
    """
    figure = go.Figure()
    averaged = "prompt" in array.dims and along != "prompt"
    others = [str(dim) for dim in array.dims if dim not in (along, "prompt")]
    cells = list(itertools.product(*(range(array.sizes[dim]) for dim in others)))
    if len(cells) > _MOST_LINES:
        raise MechsteerError(
            f"Result cannot draw {array.name!r} as {len(cells)} lines (one for each {' and '.join(others)}); "
            f"it draws up to {_MOST_LINES}. Pick with .sel(...) or average with .mean(...) first."
        )
    x, x_axis = axis(array, along)
    joined = in_order(array, along)
    mode = mode or ("markers" if not joined else "lines+markers" if len(x) <= _MOST_MARKERS else "lines")
    looks = _looks(array, others, cells, colour)
    for index, cell in enumerate(cells):
        at = dict(zip(others, cell, strict=True))
        line = array.isel(at)
        mean = line.mean("prompt", keep_attrs=True) if averaged else line
        ends = None
        if averaged and array.sizes["prompt"] > 1:
            ends = bootstrap_ci(line.transpose("prompt", along).values, seed=0)
        elif band is not None:
            ends = band[0].isel(at).values, band[1].isel(at).values
        hue, dash, value = looks[index]
        label = ", ".join([*(cell_name(array, dim, place) for dim, place in at.items()), *value])
        _add(figure, x, mean, ends, mode=mode, label=label, group=index, line={"color": hue, "dash": dash})
    if not joined:
        figure.update_layout(scattermode="group", scattergap=0.5)
        x_axis = x_axis | {"range": [x.min() - 0.5, x.max() + 0.5]}
    return figure.update_layout(xaxis=x_axis, yaxis={"title": {"text": name_of(array)}})


def _add(
    figure: go.Figure,
    x: np.ndarray,
    mean: xr.DataArray,
    ends: tuple[np.ndarray, np.ndarray] | None,
    *,
    mode: str,
    label: str,
    group: int,
    line: dict[str, str],
) -> None:
    colour = line["color"]
    hover, bars = hovers(mean), {}
    if ends is not None:
        low, high = ends
        hover = [f"{text}<br>95 % interval: {a:.4g} to {b:.4g}" for text, a, b in zip(hover, low, high, strict=True)]
        if mode == "markers":
            bars = {"type": "data", "symmetric": False, "array": high - mean.values, "arrayminus": mean.values - low}
            bars |= {"thickness": 1.5, "width": 4, "color": colour}
        else:
            # Two traces, because a band that is one closed outline breaks where a value is NaN.
            edge: dict[str, Any] = {"x": x, "mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
            edge |= {"legendgroup": str(group), "showlegend": False}
            figure.add_scatter(y=low, **edge)
            figure.add_scatter(y=high, fill="tonexty", fillcolor=_faint(colour), **edge)
    marker = {"color": colour} | ({"symbol": _SYMBOLS[_DASHES.index(line["dash"])]} if mode == "markers" else {})
    figure.add_scatter(
        x=x, y=mean.values, mode=mode, name=label, showlegend=bool(label), hoverinfo="text", hovertext=hover,
        legendgroup=str(group), line=line, marker=marker, error_y=bars,
    )  # fmt: skip


def _looks(
    array: xr.DataArray, dims: list[str], cells: list[tuple[int, ...]], colour: xr.DataArray | None
) -> list[tuple[str, str, list[str]]]:
    """Colour, dash, and what the legend says of the colour, for each line."""
    n = len(PALETTE)
    if colour is None:
        return [(PALETTE[index % n], _DASHES[index // n % len(_DASHES)], []) for index in range(len(cells))]
    if not set(colour.dims) <= set(dims):
        raise MechsteerError(
            f"colour={colour.name!r} has {', '.join(map(str, colour.dims))}, and {array.name!r} has a line for each "
            f"{' and '.join(dims) or 'array'}. Pass a coordinate or an array of these dimensions."
        )
    values = [
        colour.isel({dim: at for dim, at in zip(dims, cell, strict=True) if dim in colour.dims}) for cell in cells
    ]
    told = [shown(value.item()) for value in values]
    hues = {value: PALETTE[index % n] for index, value in enumerate(dict.fromkeys(told))}
    dashes = [_DASHES[told[:index].count(value) % len(_DASHES)] for index, value in enumerate(told)]
    return [(hues[value], dash, [plain(value)]) for value, dash in zip(told, dashes, strict=True)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
