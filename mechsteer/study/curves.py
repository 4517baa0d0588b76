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


def named_lines(figure: go.Figure, prefix: str, title: str, *, height: int = 420) -> go.Figure:
    """A figure of lines whose names lose a prefix such as "layer=", with its title, and the legend below."""
    figure.for_each_trace(lambda trace: trace.update(name=(trace.name or "").removeprefix(prefix)))
    return theme(figure).update_layout(
        title_text=title, legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, height=height
    )
