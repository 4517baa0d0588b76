"""Results: named arrays, and how they came about."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.files import open_tensors, save_tensors, stamp

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mechsteer.activations import ModelId

_LIBRARIES = ("mechsteer", "torch", "transformer-lens", "transformers", "sae-lens")
# What safetensors holds; text is held beside it.
_NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NUMBERS += ("float16", "float32", "float64", "complex64")
_VERSION = 1


@cache
def _versions() -> Mapping[str, str]:
    # Read once: it parses a file for each library.
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def provenance(
    *, model: "ModelId | None" = None, seed: int | None = None, seconds: float | None = None, **options: Any
) -> dict[str, Any]:
    """How something was computed: now, with the libraries that are installed here.

    Args:
        model: `Model.id`.
        seed: that fixed all randomness.
        seconds: wall time.
        options: what else it takes to do it again; JSON-able.
    """
    return {
        "model": None if model is None else dict(model._asdict()),
        "seed": seed,
        "seconds": seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(_versions()),
        "options": options,
    }


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Arrays with named dimensions (layer, pos, head, alpha, seed, prompt, token, ...), and how they came about.

        result = Result(xr.Dataset({"gap": (("layer", "pos"), gaps)}), provenance=provenance(model=model.id, seed=0))
        result["gap"].max("pos")                   # an xarray.DataArray
        result.sel(layer=3).plot()
        result.save("gap.safetensors"), Result.load("gap.safetensors")

    Attributes:
        data: the arrays and the coordinates of their dimensions.
        provenance: model, library versions, seed, wall time in seconds, date and options; see `provenance`.

    Raises:
        MechsteerError: the provenance cannot be written as JSON.
    """

    data: xr.Dataset
    provenance: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", as_json(self.provenance, what="A Result's provenance"))

    def __getitem__(self, name: str) -> xr.DataArray:
        """One array, or one coordinate.

        Raises:
            MechsteerError: there is none of this name.
        """
        if name not in self.data.variables:
            held = [*map(str, self.data.data_vars), *map(str, self.data.coords)]
            raise MechsteerError(f"Result holds no {name!r}. It holds {', '.join(held) or 'nothing'}.")
        return self.data[name]

    def sel(self, **coordinates: Any) -> "Result":
        """The part at these coordinates, such as `layer=3` or `alpha=[0.0, 1.0]`; see `xarray.Dataset.sel`.

        Raises:
            MechsteerError: a dimension does not exist, or it has no such coordinate.
        """
        for name, wanted in coordinates.items():
            self._check_dimension(name)
            try:
                self.data.sel({name: wanted})
            except (KeyError, IndexError) as error:
                there = ", ".join(map(repr, self.data[name].values[:8].tolist()))
                more = ", ..." if self.data.sizes[name] > 8 else ""
                raise MechsteerError(f"Result has no {name}={wanted!r}. Its {name} are {there}{more}.") from error
        return Result(self.data.sel(coordinates), provenance=self.provenance)

    def mean(self, dimension: str) -> "Result":
        """The mean over a dimension; NaN is left out, and text is dropped.

        Raises:
            MechsteerError: the dimension does not exist.
        """
        self._check_dimension(dimension)
        return Result(self.data.mean(dimension, keep_attrs=True), provenance=self.provenance)

    def to_frame(self) -> "pd.DataFrame":
        """A tidy pandas table: one row for each cell, one column for each dimension, coordinate and array."""
        if not self.data.dims:
            return self.data.expand_dims("row").to_dataframe().reset_index(drop=True)
        return self.data.to_dataframe().reset_index()

    def plot(self, name: str | None = None, **options: Any) -> "go.Figure":
        """A plotly figure of one array; see `mechsteer.plots.draw` for the options.

        Args:
            name: of the array; None if there is only one.
        """
        from mechsteer.plots import draw

        return draw(self, name, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: numbers as tensors under the arrays' names, all else as JSON.

        Raises:
            MechsteerError: an array holds neither numbers nor text.
        """
        tensors, variables = {}, []
        for name, variable in self.data.variables.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise MechsteerError(f"Result cannot save an array called {name!r}. Rename it in `data`.")
            tensors[name], dtype = _encode(name, variable.values)
            attrs = as_json(_named(variable.attrs), what=f"The attrs of {name!r}")
            variables.append({"name": name, "dims": list(variable.dims), "dtype": dtype, "attrs": attrs})
            variables[-1] |= {"shape": list(variable.shape), "coordinate": name in self.data.coords}
        attrs = as_json(_named(self.data.attrs), what="The attrs of a Result's data")
        about = {"variables": variables, "attrs": attrs, "provenance": self.provenance}
        save_tensors(path, tensors, stamp("result", _VERSION) | about)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Result":
        """Read what `save` wrote.

        Raises:
            MechsteerError: there is no such file, it is damaged, it holds something else, or a mechsteer with another
                format wrote it.
        """
        with open_tensors(path, format="result", version=_VERSION) as (file, about):
            variables, coordinates = {}, {}
            for entry in about["variables"]:
                values = _decode(file.get_tensor(entry["name"]), entry["dtype"], entry["shape"])
                home = coordinates if entry["coordinate"] else variables
                home[entry["name"]] = xr.Variable(entry["dims"], values, entry["attrs"])
            return Result(xr.Dataset(variables, coordinates, about["attrs"]), provenance=about["provenance"])

    def __repr__(self) -> str:
        shapes = [
            f"{name} [{', '.join(f'{dim} {size}' for dim, size in array.sizes.items())}]"
            for name, array in self.data.data_vars.items()
        ]
        return f"Result({'; '.join([', '.join(shapes) or 'empty', *self._made()])})"

    def _repr_html_(self) -> str:
        return markup.card("Result", *self._tables(), about=", ".join(self._made()))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """A figure where it can be drawn, for notebooks that draw plotly's; the tables for all others."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        figure = self._figure()
        return bundle if figure is None else bundle | figure._repr_mimebundle_()

    def _ipython_display_(self) -> None:
        """The figure and then the tables, where plotly was told to draw with a script of its own in the page.

        `pio.renderers.default = "plotly_mimetype+notebook"` is such a case, which nbconvert needs. Only `show` has
        plotly write that script, of 5 MB, once and not for every figure.
        """
        import plotly.io as pio
        from plotly.io.base_renderers import HtmlRenderer

        names = (pio.renderers.default or "").split("+")
        scripted = any(isinstance(pio.renderers[name], HtmlRenderer) for name in names if name)
        figure = self._figure() if scripted else None
        if figure is None:
            raise NotImplementedError  # IPython then takes what `_repr_mimebundle_` gives
        from IPython.display import HTML, display

        pio.show(figure)
        display(HTML(str(markup.details("the numbers", Markup(self._repr_html_())))))

    def _figure(self) -> "go.Figure | None":
        """What a notebook shows; None where one array cannot be chosen, or has too many dimensions or no numbers."""
        from mechsteer.plots import captioned

        try:
            figure = self.plot()
        except MechsteerError:
            return None
        others = [str(name) for name in self.data.data_vars]
        return captioned(
            figure, ", ".join([*self._made(), *([f"holds {', '.join(others)}"] if len(others) > 1 else [])])
        )

    def _ipython_key_completions_(self) -> list[str]:
        """What Tab offers inside the brackets."""
        return list(map(str, self.data.variables))

    def _tables(self) -> list[Markup]:
        """The arrays as xarray shows them, and how they were made."""
        known = {name: value for name, value in self.provenance.items() if value not in (None, {}, [])}
        rows = {name: markup.brief(value) if not isinstance(value, str) else value for name, value in known.items()}
        made = [markup.details("how it was made", markup.facts(rows))] if rows else []
        return [Markup(self.data._repr_html_()), *made]

    def _made(self) -> list[str]:
        model = self.provenance.get("model")
        parts = [str(model["name"])] if isinstance(model, dict) and "name" in model else []
        parts += [f"{key} {self.provenance[key]}" for key in ("seed", "date") if self.provenance.get(key) is not None]
        return parts

    def _check_dimension(self, name: str) -> None:
        if name not in self.data.dims:
            raise MechsteerError(
                f"Result has no dimension {name!r}. It has {', '.join(map(str, self.data.dims)) or 'none'}."
            )


def bootstrap_ci(
    values: Float[np.ndarray, "prompt ..."],
    *,
    per: Float[np.ndarray, " prompt"] | None = None,
    seed: int,
    n: int = 1000,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Percentile bootstrap interval of the mean over prompts (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one row for each prompt. NaN is left out.
        per: what each prompt's values are out of: the interval is then that of sum(values) / sum(per), a share of a
            total or a weighted mean, both resampled together.
        seed: of the resampling.
        n: number of resamples, the same for all columns.
        level: share of resampled means inside the interval.

    Returns:
        Lower and upper end.

    Raises:
        MechsteerError: there are no prompts, or `level` is no share.
    """
    if len(values) == 0 or n < 1 or not 0 < level < 1:
        raise MechsteerError(
            f"bootstrap_ci got {len(values)} prompts, n={n} and level={level}. "
            "It takes at least one prompt, n from 1 and a level between 0 and 1."
        )
    if len(values) == 1:  # all resamples are the same
        only = values[0] if per is None else values[0] / per[0]
        return only.copy(), only.copy()
    columns = values.reshape(len(values), -1).astype(np.float64)
    out_of = (np.ones(len(values)) if per is None else per.astype(np.float64))[:, None]
    # Resampling rows with replacement = drawing how often each row comes. As floats, whose products are fast.
    times = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=n)
    times = times.astype(np.float64)
    ends = np.empty((2, columns.shape[1]))
    for start in range(0, columns.shape[1], 1024):  # bounds the memory for [n, column]
        part = columns[:, start : start + 1024]
        absent = np.isnan(part)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = times @ np.where(absent, 0.0, part) / (times @ np.where(absent, 0.0, out_of))
            # A resample that drew only NaN has no mean and does not count.
            none = np.isnan(means).all(0)
            means[:, none] = 0.0
            quantile = np.nanquantile if np.isnan(means).any() else np.quantile  # the latter is faster
            ends[:, start : start + 1024] = quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
            ends[:, start : start + 1024][:, none] = np.nan
    low, high = ends.reshape(2, *values.shape[1:])
    return np.asarray(low, values.dtype), np.asarray(high, values.dtype)


def rank_correlation(first: Float[np.ndarray, " cell"], second: Float[np.ndarray, " cell"]) -> float:
    """Spearman's rank correlation, ties sharing their rank; NaN where one side is constant."""
    import pandas as pd

    return float(pd.DataFrame({"first": first, "second": second}).rank().corr().iloc[0, 1])  # type: ignore[arg-type]


def as_json(value: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """A copy of `value` as it will be after saving and loading: tuples become lists.

    Raises:
        MechsteerError: something in it has no JSON form; `what` names it.
    """
    for key, entry in value.items():
        try:
            json.dumps({key: entry})
        except (TypeError, ValueError, RecursionError) as error:
            raise MechsteerError(
                f"{what} must hold numbers, text, lists and dicts of these, and {key!r} does not: {error}."
            ) from error
    return json.loads(json.dumps(dict(value)))


def _encode(name: str, values: np.ndarray) -> tuple[Tensor, str]:
    """The tensor that the file holds for `values`, and what to make of it when reading."""
    if values.dtype.name in _NUMBERS:
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="))), values.dtype.name
    flat = values.ravel().tolist()
    if values.dtype.kind not in "OUT" or not all(isinstance(text, str) for text in flat):
        kinds = sorted({type(item).__name__ for item in flat}) if values.dtype.kind == "O" else [str(values.dtype)]
        raise MechsteerError(
            f"Result saves numbers and text, and {name!r} holds {', '.join(kinds)}. Convert or drop it in `data`."
        )
    dtype = {"O": "object", "U": f"U{values.dtype.itemsize // 4}", "T": "text"}[values.dtype.kind]
    # JSON in ASCII, so that lone surrogates of half-decoded tokens survive; as a tensor, because headers are limited.
    return torch.frombuffer(bytearray(json.dumps(flat).encode("ascii")), dtype=torch.uint8), dtype


def _decode(tensor: Tensor, dtype: str, shape: list[int]) -> np.ndarray:
    array = tensor.numpy()
    if dtype in _NUMBERS:
        if array.dtype.name != dtype:
            raise ValueError(f"{array.dtype.name} where {dtype} was announced")
        return array.reshape(shape)
    texts = json.loads(array.tobytes())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no text where text was announced")
    if dtype not in ("object", "text") and np.dtype(dtype).kind != "U":
        raise ValueError(f"dtype {dtype!r} is neither a number nor text")
    kind: Any = {"object": object, "text": np.dtypes.StringDType()}.get(dtype, dtype)
    return np.array(texts, dtype=kind).reshape(shape)


def _named(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes with text as keys, and numpy's scalars and arrays as plain numbers and lists."""
    plain = (np.ndarray, np.generic)
    return {str(key): value.tolist() if isinstance(value, plain) else value for key, value in attrs.items()}
