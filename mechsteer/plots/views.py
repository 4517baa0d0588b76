"""Tokens and attention with CircuitsVis, from the script that is installed with it: nothing is asked of a network."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.markup import printable
from mechsteer.plots.labels import short
from mechsteer.result import Result
from mechsteer.site import Site

# Red and blue of plotly's "RdBu", which heat maps use.
_COLOURS = {"negativeColor": "rgb(178,24,43)", "positiveColor": "rgb(33,102,172)"}
# CircuitsVis draws every cell of every head twice, and a browser stands about this many.
_MOST_CELLS = 300_000
# The large map is as high as it is wide.
_WIDTH = "760px"


@dataclass(frozen=True)
class View:
    """A drawing of CircuitsVis. Jupyter shows it; a page takes `bundle()` once and the `element` of every view.

    Attributes:
        component: of CircuitsVis, such as "AttentionHeads".
        props: what the component takes; JSON-able.
    """

    component: str
    props: Mapping[str, Any] = field(repr=False)

    @property
    def element(self) -> str:
        """HTML of the drawing alone: a place for it, and the script that draws once `bundle()` has been read."""
        props = _script_json(self.props)
        name = hashlib.sha256(f"{self.component} {props}".encode()).hexdigest()[:12]
        # The same view may stand on a page twice: each script takes the first place that is still without an id.
        # White like the colour of 0, on dark pages too.
        style = f"background:#fff;color:#1f2328;padding:8px;max-width:{_WIDTH};overflow:auto"
        return f"""<div class="mechsteer-view" style="{style}"><div data-view="{name}"></div></div>
<script>(() => {{
  const draw = () => {{
    const place = document.querySelector('[data-view="{name}"]:not([id])');
    if (!place) return;
    place.id = "view-{name}-" + document.querySelectorAll('[data-view="{name}"][id]').length;
    CircuitsVis.render(place.id, CircuitsVis.{self.component}, {props});
  }};
  window.CircuitsVis ? draw() : window.addEventListener("load", draw);
}})();</script>"""

    @property
    def html(self) -> str:
        """HTML of the drawing with all it needs (1.3 MB): a page of several takes `element` and one `bundle()`."""
        return f"{bundle()}\n{self.element}"

    def _repr_html_(self) -> str:
        return self.html


@cache
def bundle() -> str:
    """The script that draws views, as an HTML element (1.3 MB)."""
    source = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # A browser would look for the source map; and an HTML parser ends the script at the first "</script".
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE)
    source = source.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    return f"<script>{source.strip()}</script>"


def tokens(
    prompts: Any, values: Any, *, index: int | None = None, name: str | None = None, limit: float | None = None
) -> View:
    """Tokens with a colour for each: blue above 0, red below, white at 0.

        plots.tokens(prompts, result.sel(layer=3), index=0)
        plots.tokens(["The", " cat"], [0.5, -1.0])

    Args:
        prompts: Prompts, or the texts of the tokens.
        values: one number for each token: a list, an array or tensor [pos], or one [batch, pos] in the layout of
            `prompts`; or a Result with these dimensions, of which [prompt, ...] is indexed as well.
        index: which of the prompts; None if there is only one.
        name: which array of a Result; None if there is only one.
        limit: value of the full colour, and its negative; None takes the largest there is.

    Raises:
        MechsteerError: there are no tokens, another number of values than of tokens, values that are not finite, or it
            is not said which prompt is meant.
    """
    texts, row = _texts(prompts, index, "plots.tokens")
    numbers = _array(values, name, "plots.tokens")
    if numbers.ndim == 2 and row is not None and numbers.shape[0] == len(prompts):
        numbers = numbers[row]
        if len(numbers) == prompts.mask.shape[1]:  # in the layout of the prompts, padding included
            numbers = numbers[prompts.mask[row].cpu().numpy()]
    if numbers.shape != (len(texts),):
        raise MechsteerError(
            f"plots.tokens got {len(texts)} tokens and values of shape {list(numbers.shape)}. Pass one for each token."
        )
    return View("ColoredTokens", {"tokens": [_literal(text) for text in texts], "values": _rounded(numbers)}
                | _scale(numbers, limit, "plots.tokens"))  # fmt: skip


def attention(
    patterns: Any,
    tokens: Any = None,
    *,
    layer: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    kind: str = "pattern",
    index: int | None = None,
    name: str | None = None,
    names: Sequence[str] | None = None,
    causal: bool | None = None,
    limit: float | None = None,
) -> View:
    """Attention of several heads: small maps to choose from, and the chosen one large. Dots are spaces.

        plots.attention(run.activations, layer=3, heads=[0, 4], index=0)
        plots.attention(patterns, ["The", " cat"])                                  # [head, dest, src]

    Args:
        patterns: Activations that hold attention; an array, tensor or list [head, dest, src] or [dest, src]; or a
            Result with these dimensions, whose `prompt` is averaged over unless `index` is given.
        tokens: Prompts, or the texts of the tokens; None takes those of the Activations, or the Result's coordinate
            `dest_token`.
        layer: of Activations: one or several; None takes all that were recorded.
        heads: which heads, of every layer; None takes all.
        kind: of Activations: "pattern" or "attn_scores".
        index: which of the prompts; None if there is only one.
        name: which array of a Result; None if there is only one.
        names: of the heads drawn; None takes such as "L3H4", or "head 4".
        causal: greys out sources after their destination; None does where all of these are 0.
        limit: value of the full colour, and its negative; None takes 1 for probabilities, else the largest there is.

    Raises:
        MechsteerError: there are no tokens or no heads, sizes do not fit, values are not finite, or it is not said
            which prompt is meant.
    """
    if hasattr(patterns, "prompts"):
        numbers, made, tokens, index = _recorded(patterns, tokens, layer, heads, kind, index)
    else:
        if isinstance(patterns, Result | xr.DataArray):
            tokens = _dest_tokens(patterns) if tokens is None else tokens
        numbers = _array(patterns, name, "plots.attention", prompt=index)
        numbers = numbers[None] if numbers.ndim == 2 else numbers
        if numbers.ndim != 3:
            raise MechsteerError(f"plots.attention got values of shape {list(numbers.shape)}. Pass [head, dest, src].")
        chosen = _heads(heads, len(numbers))
        numbers, made = numbers[chosen], [f"head {head}" for head in chosen]
    if tokens is None:
        raise MechsteerError("plots.attention got no tokens. Pass Prompts, or the text of each token.")
    texts, _ = _texts(tokens, index, "plots.attention")
    names = made if names is None else list(names)
    if numbers.shape[1:] != (len(texts), len(texts)) or len(names) != len(numbers) or not len(numbers):
        raise MechsteerError(
            f"plots.attention got {len(texts)} tokens, {len(names)} names of heads and values of shape "
            f"{list(numbers.shape)}. It takes [head, dest, src], with a name for each head and as many dest and src "
            "as tokens."
        )
    if numbers.size > _MOST_CELLS:
        raise MechsteerError(
            f"plots.attention got {numbers.size:,} cells, and a browser draws up to {_MOST_CELLS:,}. Choose fewer "
            "heads=, or a shorter prompt."
        )
    later = numbers[:, *np.triu_indices(len(texts), 1)]
    causal = bool((later == 0).all()) if causal is None else causal
    # attn_scores are -inf where the mask is; nobody sees these cells.
    drawn = np.where(np.tri(len(texts), dtype=bool), numbers, 0.0) if causal else numbers
    is_share = limit is None and drawn.size > 0 and drawn.min() >= 0 and 0.5 < drawn.max() <= 1 + 1e-6
    scale = _scale(drawn, 1.0 if is_share else limit, "plots.attention")
    props = {"tokens": [short(text) for text in texts], "attention": _rounded(drawn)}
    return View(
        "AttentionHeads",
        props | {"attentionHeadNames": [printable(each) for each in names], "maskUpperTri": causal} | scale,
    )


def _recorded(
    activations: Any,
    tokens: Any,
    layer: int | Sequence[int] | None,
    heads: Sequence[int] | None,
    kind: str,
    index: int | None,
) -> tuple[np.ndarray, list[str], Any, int | None]:
    """Attention [head, dest, src] among the real tokens of one prompt, and the names of the heads."""
    prompts = activations.prompts
    _, row = _texts(prompts if tokens is None else tokens, index, "plots.attention")
    row = index if row is None else row
    recorded = [site.layer for site in activations if site.kind == kind]
    layers = recorded if layer is None else [layer] if isinstance(layer, int) else list(layer)
    if not layers:
        raise MechsteerError(f"plots.attention got activations without {kind!r}. Record it: record={kind!r}.")
    row = 0 if row is None and len(prompts) == 1 else row
    if row is None:
        raise MechsteerError(f"plots.attention got {len(prompts)} prompts. Say which: index=0.")
    mask = prompts.mask[row].cpu().numpy()
    maps, names = [], []
    for each in layers:
        values = activations[Site(kind, each)][row].detach().float().cpu().numpy()[:, mask][:, :, mask]
        chosen = _heads(heads, len(values))
        maps.append(values[chosen])
        names += [f"L{each}H{head}" for head in chosen]
    return np.concatenate(maps), names, prompts if tokens is None else tokens, row


def _heads(heads: Sequence[int] | None, n: int) -> list[int]:
    chosen = list(range(n)) if heads is None else list(heads)
    if any(not 0 <= head < n for head in chosen):
        raise MechsteerError(f"plots.attention got heads={chosen}. There are {n}, counted from 0.")
    return chosen


def _dest_tokens(patterns: Result | xr.DataArray) -> list[str] | None:
    coords = patterns.data.coords if isinstance(patterns, Result) else patterns.coords
    return [str(text) for text in coords["dest_token"].values] if "dest_token" in coords else None


def _texts(prompts: Any, index: int | None, caller: str) -> tuple[list[str], int | None]:
    """The texts of the tokens, and the row of the prompts that they are."""
    if hasattr(prompts, "str_tokens"):
        if index is None and len(prompts) > 1:
            raise MechsteerError(f"{caller} got {len(prompts)} prompts. Say which: index=0.")
        row = index or 0
        if not -len(prompts) <= row < len(prompts):
            raise MechsteerError(f"{caller} got index={row} and {len(prompts)} prompts.")
        texts, row = prompts.str_tokens(row), row % len(prompts)
    elif isinstance(prompts, str):
        raise MechsteerError(f"{caller} got one text. Pass Prompts, or a list with the text of each token.")
    else:
        texts, row = [str(text) for text in prompts], None
    if not texts:
        raise MechsteerError(f"{caller} got no tokens. Pass at least one.")
    return texts, row


def _array(values: Any, name: str | None, caller: str, *, prompt: int | None = None) -> np.ndarray:
    """Numbers of a list, an array, a tensor or a Result."""
    if isinstance(values, Result):
        names = [str(each) for each in values.data.data_vars]
        if name is None and len(names) != 1:
            name = "effect" if "effect" in names else name
        if name is None and len(names) != 1:
            raise MechsteerError(
                f"{caller} got a Result of {len(names)} arrays ({', '.join(names)}). Name the one to draw."
            )
        values = values[name or names[0]]
    if isinstance(values, xr.DataArray):
        if "prompt" in values.dims and prompt is not None:
            values = values.isel(prompt=prompt)
        elif "prompt" in values.dims and "dest" in values.dims:
            values = values.mean("prompt")
        order = [dim for dim in ("prompt", "head", "pos", "dest", "src") if dim in values.dims]
        values = values.transpose(..., *order).values
    elif hasattr(values, "detach"):  # a tensor
        values = values.detach().float().cpu().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MechsteerError(f"{caller} got values that are no numbers or of unequal lengths: {error}.") from error


def _scale(numbers: np.ndarray, limit: float | None, caller: str) -> dict[str, Any]:
    if not np.isfinite(numbers).all():
        missing = int((~np.isfinite(numbers)).sum())
        raise MechsteerError(f"{caller} got {missing} values that are NaN or infinite. Fill them in or leave them out.")
    if limit is not None and not limit > 0:
        raise MechsteerError(f"{caller} got limit={limit}. Pass a number above 0.")
    end = limit or float(np.abs(numbers).max(initial=0.0)) or 1.0
    return {"maxValue": end, "minValue": -end, **_COLOURS}


def _rounded(numbers: np.ndarray) -> Any:
    """As lists, with four digits: a page shows no more, and a view of many heads would be megabytes."""
    flat = [float(f"{value:.4g}") for value in numbers.ravel()]
    return np.array(flat).reshape(numbers.shape).tolist()


def _literal(token: str) -> str:
    """A token that CircuitsVis shows as it is.

    Its coloured tokens go into the page as HTML, and into what hovering shows as text, so that entities would be right
    in one and wrong in the other. A tag or an entity begins with a letter or a sign right after "<" or "&"; after an
    invisible word joiner it is neither. Line breaks are shown as escapes, and then break the line.
    """
    text = "".join("\\n\n" if char == "\n" else printable(char) for char in token)
    return re.sub("[<&]", lambda sign: sign[0] + "\u2060", text)


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element: only ASCII, and nothing that an HTML parser reads."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
