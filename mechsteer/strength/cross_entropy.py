"""What steering costs: the cross entropy of texts against the strength."""

import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.prompts import Prompts
from mechsteer.result import Result
from mechsteer.rows import At
from mechsteer.strength.curves import Alphas, Directions, named_directions, strength_sweep
from mechsteer.strength.recipes import alpha_grid, check_recipe
from mechsteer.strength.tables import SummedNLL
from mechsteer.strength.vectors import labels_of

_CHUNK = 256  # texts tokenised at a time


def cross_entropy_curves(
    model: Model,
    texts: Prompts | Sequence[str],
    directions: Directions,
    alphas: Alphas,
    *,
    window: int = 128,
    at: At = "all",
    recipe: str = "default",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Cross entropy of texts, in nats a token, against the strength of steering.

        Delta CE(alpha) = CE(f_alpha) - CE(f)

    Definition 3.7 of "Towards Understanding Steering Strength": all tokens of all texts count the same. Sums are in
    fp64. Memory does not grow with the texts but for their ids and one number for each window and strength.

    Args:
        model: to steer.
        texts: texts, which are cut into windows; or Prompts, each of which is a window: all tokens but the first count.
        directions: one, or several by name.
        alphas: strengths; 0 is put in where it is missing.
        window: predictions in a window.
        at: which tokens are steered: "all", "last", or as for `Add`.
        recipe: how texts are cut into windows; see `text_windows`.
        out: a folder where a stopped measurement goes on, see `sweep`.
        progress: show a bar where it takes long.

    Returns:
        `ce` and `delta_ce` [direction, alpha] over all tokens; `delta_ce_se`, the standard error of the latter over
        windows; and `nll` [direction, alpha, prompt], each window's sum, with its number of tokens `n_tokens` [prompt].

    Raises:
        MechsteerError: an argument does not fit; see `text_windows`, `Add` and `sweep`.
    """
    named, grid = named_directions(directions), alpha_grid(alphas)
    check_recipe(recipe)
    windows = texts if isinstance(texts, Prompts) else text_windows(model, texts, window=window, recipe=recipe)
    windows = model.prompts(windows).padded("right")
    table = SummedNLL()
    swept = strength_sweep(model, windows, named, grid, table, 2, at=at, out=out, progress=progress)
    nll = swept["0"].values.astype(np.float64) + swept["1"].values
    counts = table.reads(windows).sum(1).cpu().numpy()
    total = counts.sum()
    ce = nll.sum(-1) / total
    base = grid.index(0.0)
    delta = ce - ce[:, base : base + 1]
    # The standard error of a ratio of sums over windows.
    excess = nll - nll[:, base : base + 1] - delta[..., None] * counts
    n = len(counts)
    se = np.sqrt((excess**2).sum(-1) * n / max(n - 1, 1)) / total if n > 1 else np.full_like(delta, np.nan)
    dims = ("direction", "alpha")
    nats = {"units": "nats a token"}
    data = xr.Dataset(
        {
            "ce": (dims, ce, {"long_name": "cross entropy", **nats}),
            "delta_ce": (dims, delta, {"long_name": "change of the cross entropy", **nats}),
            "delta_ce_se": (dims, se, {"long_name": "standard error of the change", **nats}),
            "nll": ((*dims, "prompt"), nll, {"long_name": "minus log-probability of a window", "units": "nats"}),
            "n_tokens": ("prompt", counts, {"long_name": "predicted tokens"}),
        },
        coords={name: swept.data.coords[name] for name in (*dims, "prompt")} | labels_of(list(named.values())),
    )
    data["alpha"].attrs = {"long_name": "strength", "units": "lengths of the direction"}
    return Result(data, provenance=swept.provenance)


def text_windows(
    model: Model, texts: Sequence[str], *, window: int = 128, recipe: str = "default", max_tokens: int = 4096
) -> Prompts:
    """Texts cut into windows for `cross_entropy_curves`.

    Args:
        model: whose tokenizer and context.
        texts: each on its own: no window holds two.
        window: predictions in a window.
        recipe: "default" puts BOS (where the tokenizer has one) before each stretch of `window` tokens, so that all are
            predicted, and keeps the last stretch of a text, however short. "published" takes windows of `window + 1`
            tokens, each starting at the last token of the one before, from the text's tokens without BOS and with EOS
            at the end, and drops the rest of the text.
        max_tokens: of a text; what follows is left out.

    Raises:
        MechsteerError: there is no such recipe, `window` does not fit the context, a text is empty, or none is long
            enough for a window.
    """
    check_recipe(recipe)
    if not 1 <= window < model.n_ctx + (recipe != "default"):
        raise MechsteerError(f"window={window} does not fit: the context of {model.name} is {model.n_ctx} tokens.")
    if isinstance(texts, str) or not texts:
        raise MechsteerError(f"texts got {texts!r}. Pass a list of texts.")
    tokenizer, rows = model.tokenizer, []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(texts), _CHUNK):
        for ids in tokenizer(list(texts[start : start + _CHUNK]), add_special_tokens=False)["input_ids"]:
            ids = ids[:max_tokens]
            if recipe == "default":
                rows += [[*bos, *ids[first : first + window]] for first in range(0, len(ids), window)]
            else:
                ids = [*ids, *eos]
                rows += [ids[first : first + window + 1] for first in range(0, len(ids) - window, window)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise MechsteerError(
            f"None of the {len(texts)} texts is long enough for a window of {window} predictions. Pass longer ones, a "
            "smaller window, or recipe='default', which keeps short ones."
        )
    return Prompts.from_ids(rows, tokenizer=tokenizer)
