"""Lines of estimates with their intervals, as several chapters draw them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechsteer.plots import theme
from mechsteer.plots.lines import lines
from mechsteer.study.measures import Estimate


def estimate_lines(
    groups: Mapping[str, Sequence[dict[str, Any]]],
    x: Sequence[float | int],
    *,
    x_title: str,
    y_title: str,
    title: str,
    units: str | None = None,
    height: int = 420,
) -> go.Figure:
    """A line with its interval for each group of estimates in the form of `Estimate.as_json`; groups without any are
    left out. With the units "%" estimates are shares."""
    shown = {name: [Estimate.of(each) for each in found] for name, found in groups.items() if found}
    scale = 100 if units == "%" else 1

    def array(end: str) -> xr.DataArray:
        values = [[scale * getattr(each, end) for each in found] for found in shown.values()]
        about = {"long_name": y_title or "value"} | ({"units": units} if units else {})
        coords = {"line": list(shown), "x": ("x", list(x), {"long_name": x_title})}
        return xr.DataArray(np.array(values), dims=("line", "x"), coords=coords, attrs=about, name="value")

    return named_lines(lines(array("value"), "x", band=(array("low"), array("high"))), "line=", title, height=height)


def in_view(
    groups: Mapping[str, Sequence[dict[str, Any]]], *, units: str | None = None
) -> tuple[list[float], str] | None:
    """Ends of a y axis on which the lines of `estimate_lines` keep their shapes where some interval is so wide that it
    would flatten them, and a sentence that says which bands are cut and how far they reach; None where none is.

    The axis takes in all estimates, and of intervals what lies within half the range of these beyond them.
    """
    scale = 100 if units == "%" else 1
    shown = {name: [Estimate.of(each) for each in found] for name, found in groups.items() if found}
    values = [scale * each.value for found in shown.values() for each in found if np.isfinite(each.value)]
    if not values:
        return None
    room = 0.5 * (max(values) - min(values))
    floor, roof = min(values) - room, max(values) + room
    reach = {
        name: (scale * np.nanmin([each.low for each in found]), scale * np.nanmax([each.high for each in found]))
        for name, found in shown.items()
        if np.isfinite([(each.low, each.high) for each in found]).any(0).all()
    }
    cut = {name: ends for name, ends in reach.items() if ends[0] < floor or ends[1] > roof}
    if not cut or room == 0:
        return None
    ends = [max(floor, min(low for low, _ in reach.values())), min(roof, max(high for _, high in reach.values()))]
    margin = 0.03 * (ends[1] - ends[0])
    unit = f" {units}" if units else ""
    told = "; ".join(f"{name}: {low:.3g} to {high:.3g}{unit}" for name, (low, high) in cut.items())
    return [ends[0] - margin, ends[1] + margin], f"Bands that reach beyond the axis are cut ({told})."


def named_lines(figure: go.Figure, prefix: str, title: str, *, height: int = 420) -> go.Figure:
    """A figure of lines whose names lose a prefix such as "layer=", with its title, and the legend below."""
    figure.for_each_trace(lambda trace: trace.update(name=(trace.name or "").removeprefix(prefix)))
    return theme(figure).update_layout(
        title_text=title, legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, height=height
    )
