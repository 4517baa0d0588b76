"""How far judges agree."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsteer.errors import MechsteerError
from mechsteer.judges.judge import Judge
from mechsteer.result import Result, provenance


def agreement(
    judges: Mapping[str, Judge],
    texts: Sequence[str],
    *,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Result:
    """What several judges say of the same texts, and how far each two agree.

        agreement({"labeller": mood_judge("joy"), "model": yes_no_judge(model, "joy")}, texts)["kappa"]

    Cohen's kappa is (agreement - chance) / (1 - chance), where chance is the agreement of two judges who say yes as
    often as these and know nothing of the text (Cohen 1960, equation 1). It is NaN where chance alone agrees always:
    both judges say the same of every text.

    Args:
        judges: by name; at least two.
        texts: at least one. In the Result they are the coordinate `string`.
        n: number of bootstrap resamples of the texts.
        level: share of resamples inside an interval.
        seed: of the resampling.

    Returns:
        A Result with `verdict` and `probability` [judge, text]; `share` [judge] that shows the behaviour; `agreement`
        (share of texts of which two judges say the same) and `kappa` [judge, other]; and `_low` and `_high` ends of
        percentile bootstrap intervals of the latter three.

    Raises:
        MechsteerError: there are fewer than two judges or no texts, or `n` or `level` is out of range.
    """
    if len(judges) < 2 or not len(texts) or isinstance(texts, str):
        got = "one string" if isinstance(texts, str) else f"{len(texts)} texts"
        raise MechsteerError(f"agreement got {len(judges)} judges and {got}. Pass at least two judges and one text.")
    if n < 1 or not 0 < level < 1:
        raise MechsteerError(f"agreement got n={n} and level={level}. Pass n from 1 and a level between 0 and 1.")
    names = list(judges)
    probability = np.stack([judge.probabilities(texts) for judge in judges.values()])
    verdict = probability >= np.array([judge.threshold for judge in judges.values()])[:, None]
    times = np.random.default_rng(seed).multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=n)
    whole = _measures(verdict, np.ones((1, len(texts))))
    resampled = _measures(verdict, times.astype(np.float64))
    dims = {"share": ("judge",), "agreement": ("judge", "other"), "kappa": ("judge", "other")}
    names_long = {"share": "share of texts judged to show it", "agreement": "agreement", "kappa": "Cohen's kappa"}
    arrays: dict[str, xr.Variable] = {
        "verdict": xr.Variable(("judge", "text"), verdict),
        "probability": xr.Variable(("judge", "text"), probability),
    }
    for name, values in resampled.items():
        arrays[name] = xr.Variable(dims[name], whole[name][0], {"long_name": names_long[name], "units": "1"})
        for end, quantile in (("low", (1 - level) / 2), ("high", (1 + level) / 2)):
            arrays[f"{name}_{end}"] = xr.Variable(dims[name], _quantile(values, quantile))
    coords = {"judge": names, "other": names, "string": ("text", np.array(list(texts), dtype=object))}
    coords["text"] = np.arange(len(texts))
    about = {name: {"judge": judge.name, "threshold": judge.threshold} for name, judge in judges.items()}
    return Result(xr.Dataset(arrays, coords), provenance=provenance(seed=seed, judges=about, n=n, level=level))


def _measures(
    verdict: np.ndarray, times: Float[np.ndarray, "resample text"]
) -> dict[str, Float[np.ndarray, "resample ..."]]:
    """Share, agreement and kappa with each text counted so many times."""
    yes = verdict.astype(np.float64)
    total = times.sum(1)
    share = times @ yes.T / total[:, None]
    both = np.einsum("rt,jt,kt->rjk", times, yes, yes, optimize=True) / total[:, None, None]
    first, second = share[:, :, None], share[:, None, :]
    agree = 1 - first - second + 2 * both
    chance = first * second + (1 - first) * (1 - second)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Rounding must not turn "both always say the same" into a number.
        kappa = np.where(1 - chance > 1e-12, (agree - chance) / (1 - chance), np.nan)
    return {"share": share, "agreement": agree, "kappa": kappa}


def _quantile(values: Float[np.ndarray, "resample ..."], quantile: float) -> Float[np.ndarray, "..."]:
    """Over the resamples that have a value; NaN where none has."""
    none = np.isnan(values).all(0)
    ends = np.nanquantile(np.where(none, 0.0, values), quantile, axis=0)
    return np.where(none, np.nan, ends)
