"""Numbers that chapters share: pooled cross entropies and shares with intervals, and how sentences say them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives import TeacherForcedCE
from mechsteer.patching.activation import objective_of
from mechsteer.prompts import Prompts
from mechsteer.strength.completions import wilson_interval

CE = TeacherForcedCE()
"""The cross entropy of "Steering Prefix Generation", section 2.3: the first 32 tokens count three times."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value, low, high: NaN where the number does not exist.
        n: requests behind it.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def as_json(self) -> dict[str, float | int | None]:
        """For summaries; None stands for NaN."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(end) else round(end, 6) for name, end in ends.items()} | {"n": self.n}

    @staticmethod
    def of(stored: dict[str, float | int | None]) -> "Estimate":
        """From `as_json`."""
        value, low, high = (math.nan if stored[name] is None else float(stored[name]) for name in _ENDS)  # type: ignore[arg-type]
        return Estimate(value, low, high, int(stored["n"] or 0))

    @property
    def percent_interval(self) -> str:
        """As in "95 % interval 74 to 99 %, n = 18"."""
        return f"95 % interval {_whole(100 * self.low)} to {_whole(100 * self.high)} %, n = {self.n}"

    @property
    def percent(self) -> str:
        """As in "94 %"."""
        return f"{_whole(100 * self.value)} %"

    @property
    def interval(self) -> str:
        """As in "95 % interval 0.48 to 0.60, n = 18"."""
        return f"95 % interval {two(self.low)} to {two(self.high)}, n = {self.n}"

    def __str__(self) -> str:
        return two(self.value)


_ENDS = ("value", "low", "high")


def two(value: float) -> str:
    """A number to two digits after the point, without a minus before zeros."""
    return f"{round(value, 2) + 0.0:.2f}"


def _whole(value: float) -> str:
    return f"{round(value) + 0:d}"


def ratio(
    numerator: Float[np.ndarray, " prompt"], denominator: Float[np.ndarray, " prompt"], *, seed: int, n: int = 2000
) -> Estimate:
    """sum(numerator) / sum(denominator), with the percentile bootstrap over requests.

    A cross entropy pooled over requests is such a ratio (section 2.3 of "Steering Prefix Generation": the numerator is
    w_e * CE_e, the denominator w_e), and so is a share of a gap.

    Returns:
        NaN where the denominator is 0, or could be among as many requests like these.

    Raises:
        MechsteerError: there are no requests.
    """
    if not len(numerator):
        raise MechsteerError("ratio got no requests. Pass at least one.")
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(numerator), np.full(len(numerator), 1 / len(numerator)), size=n)
    top, bottom = numerator.astype(np.float64), denominator.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(top.sum() / bottom.sum())
        resampled = (times @ top) / (times @ bottom)
    if not (math.isfinite(value) and np.isfinite(resampled).all()):
        return Estimate(math.nan, math.nan, math.nan, len(top))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(top))


def share(hits: Bool[np.ndarray, " prompt"] | Sequence[bool]) -> Estimate:
    """Share of requests, with Wilson's score interval (Wilson 1927; Brown, Cai and DasGupta 2001): unlike a bootstrap,
    it does not shrink to nothing where all requests agree.

    Raises:
        MechsteerError: there are no requests.
    """
    n = len(hits)
    if n == 0:
        raise MechsteerError("share got no requests. Pass at least one.")
    p = float(np.mean(np.asarray(hits, dtype=float)))
    low, high = wilson_interval(np.array([p]), n)
    return Estimate(p, float(low[0]), float(high[0]), n)


def cross_entropy(model: Model, prompts: Prompts) -> Float[np.ndarray, " prompt"]:
    """Weighted cross entropy of each prompt's completion, in nats a token."""
    return objective_of(model, prompts, CE).astype(np.float64)


def weights(prompts: Prompts) -> Float[np.ndarray, " prompt"]:
    """The weight of each prompt's completion where several are pooled."""
    return CE.total_weight(prompts).double().cpu().numpy()
