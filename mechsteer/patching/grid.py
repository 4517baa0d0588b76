"""The cells of a patching map: which kinds of site, over which of layer, head and position."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Replace
from mechsteer.model import Model
from mechsteer.prompts import ROLES, Pair, Prompts
from mechsteer.result import Result, bootstrap_ci
from mechsteer.rows import At, check_at, normalise_at
from mechsteer.site import KINDS, Site

AXES = ("layer", "head", "pos", "dest", "src")
MODES = ("denoising", "noising")
_PLACES = ("pos", "dest", "src")
_USER = ROLES.index("user")


class Cell(NamedTuple):
    """One cell of a map; None stands for all heads, all tokens, all sources."""

    kind: str
    layer: int | None
    head: int | None
    at: At
    src: At

    @property
    def site(self) -> Site:
        """Where it patches; its tokens are `at`."""
        return Site(self.kind, self.layer, head=self.head)


@dataclass(frozen=True, eq=False)
class Grid:
    """Turns what a map ranges over into axes for `sweep`, interventions, and coordinates for its Result.

    Attributes:
        model: whose activations are patched.
        pair: the clean and corrupt prompts, padded on the right.
        kinds: of sites.
        axes: values of each dimension of the map, in order, without prompt. Positions are as `at` of an `Intervention`.
    """

    model: Model
    pair: Pair
    axes: dict[str, list[Any]]
    kinds: tuple[str, ...]
    _layer: int | None
    _at: At

    @staticmethod
    def of(
        model: Model,
        clean: Any,
        corrupt: Any,
        *,
        sites: str | Sequence[str],
        over: Sequence[str],
        layers: int | Iterable[int] | None = None,
        at: Any = None,
    ) -> "Grid":
        """The grid for these kinds, dimensions, layers and positions.

        Args:
            model: whose layers and heads are meant.
            clean, corrupt: prompts that align token by token.
            sites: one kind of site, or several, which become the dimension `site`.
            over: dimensions of the map, of `AXES`.
            layers: which layers; None for all. One number where `over` has no layer.
            at: positions or spans along the position dimension; None for `places`. Without such a dimension, the
                tokens that every cell patches, None for all.

        Raises:
            MechsteerError: prompts do not align, or a kind, dimension, layer or position does not exist.
        """
        pair = model.prompts(clean).paired(model.prompts(corrupt))
        kinds = (sites,) if isinstance(sites, str) else tuple(sites)
        _check(kinds, over := (over,) if isinstance(over, str) else tuple(over))
        in_blocks = [kind for kind in kinds if "{layer}" in KINDS[kind].hook]
        chosen: list[int] = []
        if in_blocks:
            given = range(model.n_layers) if layers is None else (layers,) if isinstance(layers, int) else layers
            chosen = list(dict.fromkeys(int(layer) for layer in given))
            for kind in in_blocks:
                for layer in chosen:
                    model.check_edit(Site(kind, layer))
            if not chosen or ("layer" not in over and len(chosen) > 1):
                raise MechsteerError(
                    f"layers={layers!r} stands for {len(chosen)} layers. Name at least one, and only one where `over` "
                    "has no 'layer'."
                )
        for kind in kinds:
            if kind not in in_blocks:
                model.check_edit(Site(kind))
        heads = max(_n_heads(model, kind) for kind in kinds)
        if any(name in _PLACES for name in over):
            found = places(pair.clean) if at is None else [_rule(each) for each in _several(at)]
            rule = None
        else:
            found, rule = [], _rule(at)
        for each in (*found, rule):
            check_at(each, pair.clean, what=f"at={each!r}")
        values: dict[str, list[Any]] = {"layer": chosen, "head": list(range(heads))} | dict.fromkeys(_PLACES, found)
        axes = ({"site": list(kinds)} if len(kinds) > 1 else {}) | {name: values[name] for name in over}
        return Grid(model, pair, axes, kinds, chosen[0] if chosen else None, rule)

    @property
    def points(self) -> list[Site]:
        """The whole hook points that the cells are at."""
        layers = self.axes.get("layer", [self._layer])
        sites = [
            Site(kind, layer if "{layer}" in KINDS[kind].hook else None) for kind in self.kinds for layer in layers
        ]
        return list(dict.fromkeys(sites))

    def ends(self, mode: str) -> tuple[Prompts, Prompts]:
        """The prompts patched into (base) and those patched from (source)."""
        return (self.pair.corrupt, self.pair.clean) if mode == "denoising" else (self.pair.clean, self.pair.corrupt)

    def cells(self) -> Iterator[dict[str, Any]]:
        """The values of the axes of every cell, the last axis fastest."""
        return (dict(zip(self.axes, each, strict=True)) for each in itertools.product(*self.axes.values()))

    def cell(self, **values: Any) -> Cell:
        """The cell at these values of the axes."""
        kind = values.get("site", self.kinds[0])
        layer = values.get("layer", self._layer) if "{layer}" in KINDS[kind].hook else None
        at = values.get("dest", values.get("pos", self._at))
        return Cell(kind, layer, values.get("head"), at, values.get("src"))

    def replace(self, source: Activations, **values: Any) -> Replace | None:
        """The intervention of a cell; None where the model has no such head (keys and values of grouped-query attention
        have fewer than queries)."""
        cell = self.cell(**values)
        if cell.head is not None and cell.head >= self.n_heads(cell.kind):
            return None
        return Replace(cell.site, source, at=cell.at, src=cell.src)

    def result(
        self,
        effect: Float[np.ndarray, "*axes prompt"],
        base: Float[np.ndarray, " prompt"],
        source: Float[np.ndarray, " prompt"],
        about: Mapping[str, Any],
    ) -> Result:
        """A map: NaN where the model has no such head, with intervals and coordinates."""
        cells = [self.cell(**values) for values in self.cells()]
        there = np.array([cell.head is None or cell.head < self.n_heads(cell.kind) for cell in cells])
        shape = tuple(len(values) for values in self.axes.values())
        effect = np.where(there.reshape(*shape, 1), effect, np.nan)
        return map_of(tuple(self.axes), effect, base, source, self.coords, about)

    def n_heads(self, kind: str) -> int:
        """How many heads a kind has; 0 where it has none."""
        return _n_heads(self.model, kind)

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of the dimensions, with the text of each place beside its position."""
        coords: dict[str, Any] = {}
        for name, values in self.axes.items():
            if name not in _PLACES:
                coords[name] = values
                continue
            plain = all(isinstance(value, int) and value >= 0 for value in values)
            coords[name] = values if plain else [_shown(value) for value in values]
            texts = np.array([self._text(value) for value in values], dtype=object)
            coords["token" if name == "pos" else f"{name}_token"] = (name, texts)
        coords["prompt"] = list(self.pair.clean.labels) or np.arange(len(self.pair.clean))
        return coords

    def _text(self, at: At) -> str:
        """What stands at a place: the token, the clean and the corrupt one where they differ; the first prompt's, and
        dots, where prompts differ."""
        if not isinstance(at, int):
            return f"[{_shown(at)}]"
        texts = [
            [row[at if at >= 0 else end + 1 + at] for row, end in zip(rows, self._before, strict=True)]
            for rows in self._tokens
        ]
        firsts = dict.fromkeys(each[0] for each in texts)
        same = all(len(set(each)) == 1 for each in texts)
        return "|".join(firsts) + ("" if same else "…")

    @cached_property
    def _tokens(self) -> list[list[list[str]]]:
        """The tokens of each clean prompt and of each corrupt one, as text."""
        ends = self.pair.clean, self.pair.corrupt
        return [[prompts.shown_tokens(row) for row in range(len(prompts))] for prompts in ends]

    @cached_property
    def _before(self) -> list[int]:
        """Where the clean prompts decide, which is where the corrupt ones do."""
        return self.pair.clean.decision.tolist()


def places(prompts: Prompts) -> list[At]:
    """Positions that mean the same in every prompt, in order, without completions.

    Prompts of one length: every position. Otherwise the positions before the user's text counted from the start, the
    span "user" as one place, and those after it counted back from the end; a template's tokens between two messages of
    the user are in none of them.

    Args:
        prompts: padded on the right.
    """
    before = (prompts.decision + 1).tolist()
    if len(set(before)) == 1:
        return list(range(before[0]))
    rows = [roles[mask][:end].tolist() for roles, mask, end in zip(prompts.roles, prompts.mask, before, strict=True)]

    def alike(columns: Iterable[tuple[int, ...]]) -> int:
        return len(list(takewhile(lambda column: len(set(column)) == 1 and column[0] != _USER, columns)))

    first = alike(zip(*rows, strict=False))
    last = alike(zip(*(row[first:][::-1] for row in rows), strict=False))
    middle: list[At] = ["user"] if any(_USER in row for row in rows) else []
    return [*range(first), *middle, *range(-last, 0)]


def map_of(
    dims: Sequence[str],
    effect: Float[np.ndarray, "*axes prompt"],
    base: Float[np.ndarray, " prompt"],
    source: Float[np.ndarray, " prompt"],
    coords: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Result:
    """The Result that all maps are: effects, the 95 % bootstrap interval of their mean over prompts (NaN for a single
    prompt, which tells nothing about others), and both ends."""
    low, high = bootstrap_ci(np.moveaxis(effect, -1, 0), seed=0)
    if effect.shape[-1] == 1:
        low, high = low * np.nan, high * np.nan
    arrays = {"effect": ((*dims, "prompt"), effect), "low": (tuple(dims), low), "high": (tuple(dims), high)}
    arrays |= {"base": ("prompt", base), "source": ("prompt", source)}
    return Result(xr.Dataset(arrays, coords), provenance=about)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise MechsteerError(
            f"mode={mode!r} is not understood. 'denoising' patches the clean run into the corrupt one, 'noising' the "
            "corrupt run into the clean one."
        )


def _check(kinds: Sequence[str], over: Sequence[str]) -> None:
    if not kinds or not over:
        raise MechsteerError(f"A map needs at least one kind of site and one dimension, got {kinds} over {over}.")
    for kind in kinds:
        Site(kind, 0 if kind not in KINDS or "{layer}" in KINDS[kind].hook else None)
    unknown = [name for name in over if name not in AXES]
    if unknown or len(set(over)) < len(over):
        raise MechsteerError(f"over={tuple(over)!r} is not understood. Pick different ones of {', '.join(AXES)}.")
    if "pos" in over and "dest" in over:
        raise MechsteerError("over holds 'pos' and 'dest', which are the same for a pattern. Pass one of them.")
    for kind in kinds:
        has = {"head": "head" in KINDS[kind].axes, "layer": "{layer}" in KINDS[kind].hook}
        has |= dict.fromkeys(("dest", "src"), "src" in KINDS[kind].axes)
        lacking = [name for name in over if not has.get(name, True)]
        if lacking:
            raise MechsteerError(
                f"{kind} has no {lacking[0]}. Leave it out of over={tuple(over)!r}, or {kind} of sites."
            )


def _n_heads(model: Model, kind: str) -> int:
    return (model.size(Site(kind, 0), "head") or 0) if "head" in KINDS[kind].axes else 0


def _several(at: Any) -> list[Any]:
    if isinstance(at, str) or hasattr(at, "__index__"):
        return [at]
    return list(at)


def _rule(at: Any) -> At:
    return normalise_at(at)


def _shown(at: At) -> str:
    return (
        at
        if isinstance(at, str)
        else "all"
        if at is None
        else ",".join(map(str, at if isinstance(at, tuple) else (at,)))
    )
