"""What figures say in words: names, units, ticks, and what hovering shows."""

import html
import re
import textwrap
from typing import Any

import numpy as np
import xarray as xr

from mechsteer.markup import printable

_MOST_TICKS = 60
_LONGEST_TICK = 24
# Dimensions whose texts are tokens in the order of the prompt.
_PLACES = ("pos", "dest", "src")


def plain(text: str) -> str:
    """Text as plotly shows it literally: plotly reads HTML tags, entities and $TeX$ in every label.

    Characters that do not print (line breaks, direction marks, half-decoded bytes) are shown as escapes.
    """
    return html.escape(printable(text), quote=False).replace("$", "&#36;")


def short(token: str) -> str:
    """A token's text as a tick: cut if it is long, and with dots for the spaces at its ends."""
    text = printable(re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), token))
    return text if len(text) <= _LONGEST_TICK else text[: _LONGEST_TICK - 1] + "…"


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def name_of(array: xr.DataArray, *, width: int = 1000) -> str:
    """Its `long_name`, or else its name, and its `units` in brackets, as xarray has it; in lines of some width."""
    units = array.attrs.get("units")
    text = str(array.attrs.get("long_name", array.name)) + (f" [{units}]" if units else "")
    return "<br>".join(plain(line) for line in textwrap.wrap(text, width))


def cell_name(array: xr.DataArray, dim: str, at: int) -> str:
    """Such as "layer=3"; of a token its text, where that is known."""
    texts = _token_texts(array, dim)
    return plain(f"{dim}={shown(array[dim].values[at]) if texts is None else short(texts[at])}")


def axis(array: xr.DataArray, dim: str, *, even: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Where the cells of a dimension stand, and plotly's settings of the axis; `even` spaces numbers as steps. An attr
    `scale` of "log" makes it logarithmic, where all numbers are above 0.

    Ticks show the texts of a coordinate `<dim>_token` or `token` along the dimension, if there is one.
    """
    values = array[dim].values
    settings: dict[str, Any] = {"title": {"text": name_of(array[dim])}}
    texts = _token_texts(array, dim)
    numbers = values.dtype.kind in "bifu" and not even and not _are_names(values, texts)
    places = values.astype(float) if numbers else np.arange(len(values))
    if numbers and array[dim].attrs.get("scale") == "log" and (places > 0).all():
        settings["type"] = "log"
    if numbers and texts is None:
        return places, settings
    # Numbered by hand, because plotly merges equal labels and reads text such as "12" or "2024-01" as what it is not.
    every = slice(None, None, max(1, -(-len(values) // _MOST_TICKS)))
    labels = (
        [plain(shown(value)) for value in values[every]]
        if texts is None
        else [plain(short(text)) for text in texts[every]]
    )
    settings |= {"tickmode": "array", "tickvals": places[every], "ticktext": labels}
    return places, settings


def in_order(array: xr.DataArray, dim: str) -> bool:
    """Whether the values of a dimension follow one another, so that lines may join them: numbers, and the places of a
    prompt; not names, such as those of prefixes, nor tokens that stand side by side."""
    if dim in _PLACES:
        return True
    values, texts = array[dim].values, _token_texts(array, dim)
    return values.dtype.kind in "bifu" and not _are_names(values, texts) and (texts is None or dim != "token")


def hovers(array: xr.DataArray, more: dict[str, xr.DataArray] | None = None) -> np.ndarray:
    """For each cell, all of its coordinates, and its value with those of `more` arrays of the same dimensions."""
    names = [*array.dims, *(name for name in array.coords if name not in array.dims)]
    parts = [_lines(array[name], str(name), array) for name in names]
    parts += [
        _lines(each, label, array, form=_value) for label, each in ({str(array.name): array} | (more or {})).items()
    ]
    texts = np.empty(array.shape, dtype=object)
    for index in np.ndindex(array.shape):
        texts[index] = "<br>".join(str(part[index]) for part in parts)
    return texts


def _are_names(values: np.ndarray, texts: list[str] | None) -> bool:
    """Whether they are numbers with texts that do not rise, such as features by rank: these stand as they come."""
    return texts is not None and values.dtype.kind in "bifu" and not bool((np.diff(values.astype(float)) > 0).all())


def _token_texts(array: xr.DataArray, dim: str) -> list[str] | None:
    # Where ids stand along `token`, as in curves over tokens, `text` has their texts.
    for name in (f"{dim}_token", "token", *(["text"] if dim == "token" else [])):
        if name != dim and name in array.coords and array[name].dims == (dim,) and array[name].dtype.kind in "OUT":
            return [str(text) for text in array[name].values]
    return None


def _lines(values: xr.DataArray, label: str, array: xr.DataArray, *, form: Any = shown) -> np.ndarray:
    """For each cell of `array`, the line of its hover that tells `values`."""
    # One text for each of the values, which are few, and not for each of the cells.
    texts = np.empty(values.shape, dtype=object)
    for index in np.ndindex(values.shape):
        texts[index] = f"{plain(label)}: {plain(form(values.values[index]))}"
    dims = [dim for dim in array.dims if dim in values.dims]
    lined = xr.DataArray(texts, dims=values.dims).transpose(*dims).values
    spread = lined.reshape([array.sizes[dim] if dim in dims else 1 for dim in array.dims])
    return np.broadcast_to(spread, array.shape)


def _value(value: Any) -> str:
    return f"{float(value):.4g}"
