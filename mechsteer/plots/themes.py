"""Looks: a figure alone is on white, so that it reads anywhere; in a page it is transparent, takes the page's font, and
changes between light and dark as a whole."""

from typing import Any

import plotly.graph_objects as go

from mechsteer.plots.labels import plain

# Okabe and Ito's colours, which colour-blind readers tell apart, without the two that vanish on white or on black.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


# plotly measures labels in the page's font and draws them in its own where a figure says "inherit", so that the title
# of an axis could stand on long labels. A report sets both to its font; of other pages nobody knows.
_FONT = '"Open Sans", verdana, arial, sans-serif'


def _template(
    text: str, line: str, grid: str, ground: str, *, paper: str = "rgba(0,0,0,0)", font: str = "inherit"
) -> dict[str, Any]:
    axis = {
        "automargin": True, "gridcolor": grid, "linecolor": line, "tickcolor": line, "zeroline": False,
        "showline": True, "showgrid": False, "ticks": "outside", "ticklen": 4, "title": {"standoff": 8},
    }  # fmt: skip
    clear = "rgba(0,0,0,0)"
    return {
        "layout": {
            "paper_bgcolor": paper,
            "plot_bgcolor": clear,
            "font": {"family": font, "color": text, "size": 12},
            "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}}
            | {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
            "margin": {"t": 72, "r": 24},
            "colorway": list(PALETTE),
            "xaxis": axis,
            "yaxis": axis,
            "annotationdefaults": {"font": {"color": text}},
            "shapedefaults": {"line": {"color": line}},
            "hoverlabel": {"bgcolor": ground, "bordercolor": line, "align": "left", "font": {"color": text}},
            "legend": {"bgcolor": clear},
            "modebar": {"bgcolor": clear, "color": line, "activecolor": text},
        }
    }


# What `Plotly.relayout(div, ...)` takes.
LIGHT: dict[str, Any] = {"template": _template("#1f2328", "#8a929a", "#e3e6ea", "#ffffff")}
# For notebooks, whose ground nobody knows.
PAPER: dict[str, Any] = {"template": _template("#1f2328", "#8a929a", "#e3e6ea", "#ffffff", paper="#ffffff", font=_FONT)}
DARK: dict[str, Any] = {"template": _template("#e6e8eb", "#7d858e", "#33393f", "#1c2024")}


def theme(figure: go.Figure, *, dark: bool = False) -> go.Figure:
    """A copy of a figure on white, or for a dark page.

    In a page that has the figure already, `Plotly.relayout(div, plots.DARK)` (or `plots.LIGHT`, as JSON) does it.
    """
    # Overwritten, because plotly would mix it with its own.
    return go.Figure(figure).update_layout(DARK if dark else PAPER, overwrite=True)


def captioned(figure: go.Figure, text: str) -> go.Figure:
    """A copy of a figure with a line of text, as it is, below its title."""
    return go.Figure(figure).update_layout(title_subtitle={"text": plain(text), "font": {"size": 11}})
