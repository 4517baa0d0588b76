"""Which cells of a map are more than chance."""

import math

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsteer.errors import MechsteerError
from mechsteer.result import Result, bootstrap_ci

CORRECTIONS = ("max_t", "holm", "fdr_bh", "none")
# Entries of [flip, cell] that are held at a time: 64 MB.
_HELD = 1 << 23


def significant(
    result: Result,
    name: str = "effect",
    *,
    level: float = 0.05,
    correction: str = "max_t",
    n: int = 10_000,
    seed: int = 0,
) -> Result:
    """Mean over prompts of every cell of a map, its interval, and whether it is more than chance.

        patched = activation_patching(model, clean, corrupt, measure=gap)
        significant(patched).plot("matters")

    Sign-flip permutation test (Fisher 1935): if a cell does nothing, its effect is as likely to be above 0 as below,
    and flipping the signs of whole prompts changes nothing but chance. The statistic is one-sample |t|; the p-value is
    the share of flips under which it is at least as large. A map has hundreds of cells, some of which look large by
    chance, so p-values are corrected over all of its cells; `result.sel(...)` first tests fewer of them.

    - "max_t" compares each cell with the largest |t| of the whole map under each flip, so that the probability of even
      one false cell is at most `level`, however the cells hang together (Westfall and Young 1993, the single-step
      procedure; Nichols and Holmes 2002, section 2.3).
    - "holm" bounds the same probability from the single p-values (Holm 1979). It needs many more prompts and flips.
    - "fdr_bh" bounds the expected share of false cells among those found (Benjamini and Hochberg 1995).
    - "none": one cell in 1 / `level` is found where there is nothing.

    All flips are enumerated, and the test is exact, where there are at most `n`: 2^(prompts - 1) up to a sign that |t|
    does not see. Otherwise `n` are drawn, and the data as they are count as one more (Phipson and Smyth 2010).

    Args:
        result: a map, or any Result with a dimension `prompt`.
        name: which of its arrays. Its null hypothesis is a mean of 0.
        level: bound on errors, and where `matters` begins.
        correction: see above.
        n: largest number of flips.
        seed: of flips and resamples.

    Returns:
        Without the dimension `prompt`: `mean`; `low` and `high`, the 95 % bootstrap interval of the mean
        (`bootstrap_ci`, not corrected); `p`, two-sided and corrected; `matters`, p <= level. A prompt that is NaN in a
        cell is left out there; a cell of nothing but NaN has NaN and does not matter. Effects that are no larger than
        rounding (100 units in the last place of the largest objective) count as 0, and a cell of zeros has p = 1.

    Raises:
        MechsteerError: the array does not exist, has no prompts or holds infinity, an option is out of its range, or
            no cell could reach `level`, however large, because there are too few prompts or flips.
    """
    array = result[name]
    if correction not in CORRECTIONS:
        raise MechsteerError(f"correction={correction!r} is none of {', '.join(map(repr, CORRECTIONS))}.")
    if not 0 < level < 1 or n < 1:
        raise MechsteerError(f"significant got level={level} and n={n}. Pass a level between 0 and 1, and n from 1.")
    if "prompt" not in array.dims:
        raise MechsteerError(
            f"{name!r} has the dimensions {', '.join(map(str, array.dims)) or 'none'}, and significance is over "
            "prompts. Pass a map as patching or sweep gives it, before any mean over prompts."
        )
    values = array.transpose("prompt", ...).values
    if np.isinf(values).any():
        raise MechsteerError(f"{name!r} holds infinity, which has no mean. Choose an objective that stays finite.")
    cells = values.reshape(len(values), -1).astype(np.float64)
    present = ~np.isnan(cells)
    tested = present.any(0)
    _check_possible(len(cells), n, int(tested.sum()), level, correction)
    cells = np.where(present & (np.abs(cells) > _rounding(result, array)), cells, 0.0)
    p = np.full(cells.shape[1], np.nan)
    p[tested] = _p_values(cells[:, tested], _flips(len(cells), n, seed), correction)

    dims = [dim for dim in array.dims if dim != "prompt"]
    shape = [array.sizes[dim] for dim in dims]
    low, high = bootstrap_ci(values, seed=seed)
    arrays = {"mean": array.mean("prompt").values, "low": low, "high": high}
    arrays |= {"p": p.reshape(shape), "matters": (p <= level).reshape(shape)}
    coords = {key: coord for key, coord in array.coords.items() if "prompt" not in coord.dims}
    how = {"name": name, "level": level, "correction": correction, "n": n, "seed": seed, "n_prompts": len(cells)}
    data = xr.Dataset({key: (dims, value) for key, value in arrays.items()}, coords)
    return Result(data, provenance={**result.provenance, "significance": how})


def _rounding(result: Result, array: xr.DataArray) -> float:
    """Differences of objectives that are no larger are arithmetic: a patch that changes nothing leaves such."""
    terms = [result.data[key] for key in ("base", "source") if key in result.data] or [array]
    largest = max(float(np.nanmax(np.abs(term.values), initial=0.0)) for term in terms)
    precision = np.finfo(array.dtype).eps if array.dtype.kind == "f" else 0.0
    return 100 * float(precision) * largest


def prompts_needed(level: float, *, correction: str = "max_t", n_cells: int = 1) -> int:
    """The fewest prompts with which some cell of a map could reach p <= level."""
    return 1 + math.ceil(math.log2(_flips_needed(level, correction, n_cells)))


def _flips_needed(level: float, correction: str, n_cells: int) -> int:
    """k flips give no p below 1/k, times the number of cells under Holm's."""
    return math.ceil((max(1, n_cells) if correction == "holm" else 1) / level)


def _check_possible(n_prompts: int, n: int, n_cells: int, level: float, correction: str) -> None:
    """Refuse what could find nothing."""
    needed = _flips_needed(level, correction, n_cells)
    prompts = prompts_needed(level, correction=correction, n_cells=n_cells)
    if n_prompts < prompts or n < min(needed, 2 ** (n_prompts - 1)):
        other = " correction='max_t' needs fewer." if correction == "holm" else ""
        raise MechsteerError(
            f"significant got {n_prompts} prompts and n={n} flips: with correction={correction!r} over {n_cells} cells "
            f"no effect could reach p <= {level}, however large. That takes {prompts} prompts and n={needed}.{other}"
        )


def _flips(n_prompts: int, n: int, seed: int) -> Float[np.ndarray, "flip prompt"]:
    """Signs of the prompts; the first row is the data as they are. The first prompt keeps its sign, as |t| allows."""
    if n_prompts - 1 <= math.log2(n):
        bits = np.arange(2 ** (n_prompts - 1))[:, None] >> np.arange(n_prompts - 1) & 1
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, size=(n, n_prompts - 1))
        bits = np.concatenate([np.zeros_like(drawn[:1]), drawn])
    return np.concatenate([np.ones((len(bits), 1)), 1.0 - 2.0 * bits], 1)


def _p_values(
    cells: Float[np.ndarray, "prompt cell"], flips: Float[np.ndarray, "flip prompt"], correction: str
) -> Float[np.ndarray, " cell"]:
    # Flips leave the sum of squares q, so that |t| = sqrt(k - 1) u / sqrt(k - u^2) grows with u = |sum| / sqrt(q),
    # which is finite also where all k prompts have the same effect.
    root = np.sqrt((cells**2).sum(0))
    scaled = cells / np.where(root > 0, root, 1.0)
    size = max(1, _HELD // len(flips))
    starts = range(0, scaled.shape[1], size)
    # Equal sums in another order must count as equal.
    observed = np.abs(scaled.sum(0)) - 1e-9
    if correction == "max_t":
        largest = np.zeros(len(flips))
        for start in starts:
            np.maximum(largest, np.abs(flips @ scaled[:, start : start + size]).max(1), out=largest)
        largest.sort()
        return (len(flips) - np.searchsorted(largest, observed, side="left")) / len(flips)
    parts = [
        (np.abs(flips @ scaled[:, start : start + size]) >= observed[start : start + size]).mean(0) for start in starts
    ]
    p = np.concatenate(parts) if parts else np.zeros(0)
    return p if correction == "none" else _step(p, correction)


def _step(p: Float[np.ndarray, " cell"], correction: str) -> Float[np.ndarray, " cell"]:
    """Adjusted p-values: Holm's step down, or Benjamini and Hochberg's step up."""
    order = np.argsort(p)
    count, rank = len(p), np.arange(1, len(p) + 1)
    if correction == "holm":
        adjusted = np.maximum.accumulate(p[order] * (count + 1 - rank))
    else:
        adjusted = np.minimum.accumulate((p[order] * count / rank)[::-1])[::-1]
    out = np.empty_like(p)
    out[order] = np.minimum(adjusted, 1.0)
    return out
