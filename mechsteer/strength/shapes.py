"""What shape a curve has: bump, sigmoid, parabola, each measured against what it could be instead."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from mechsteer.errors import MechsteerError

SHAPES = ("bump", "rising", "falling", "dip", "flat", "other")


def curve_shape(values: Float[np.ndarray, " alpha"], *, tolerance: float = 0.05, flat: float = 1e-4) -> str:
    """The shape of a curve over ascending strengths, as theorem 3.3 of "Towards Understanding Steering Strength" tells
    token probabilities apart.

    A curve has a shape when the moves against it, added up, are at most `tolerance` of its range: a "rising" curve's
    moves down, a "falling" one's moves up, for a "bump" the moves down before its peak and up after it, and for a "dip"
    the other way round. The first of these that fits is the shape, so that a bump falls by more than the tolerance on
    both sides of its peak. "other" is none of them.

    Args:
        values: of the curve.
        tolerance: share of the range.
        flat: a curve with a smaller range than this is "flat"; 1e-4 for probabilities.

    Raises:
        MechsteerError: there are fewer than three values, or one is not finite.
    """
    _check(values)
    moves = np.diff(values.astype(np.float64))
    ups, downs = np.maximum(moves, 0.0), np.maximum(-moves, 0.0)
    spread = float(values.max() - values.min())
    if spread < flat:
        return "flat"
    allowed = tolerance * spread
    if downs.sum() <= allowed:
        return "rising"
    if ups.sum() <= allowed:
        return "falling"
    if _against(downs, ups) <= allowed:
        return "bump"
    return "dip" if _against(ups, downs) <= allowed else "other"


def _against(before: Float[np.ndarray, " move"], after: Float[np.ndarray, " move"]) -> float:
    """The least sum of `before` up to a turning point and of `after` from there on."""
    return float((np.r_[0.0, before.cumsum()] + np.r_[after[::-1].cumsum()[::-1], 0.0]).min())


@dataclass(frozen=True)
class SigmoidFit:
    """A logistic curve low + (high - low) / (1 + exp(-(alpha - centre) / width)), and what it is measured against.

    Attributes:
        low, high: the values at both ends; `high` is the one at plus infinity, so that it may be the lower.
        centre: the strength half-way between them.
        width: over which the curve rises; above 0.
        r2: share of the variance explained.
        monotone_r2: the share that the best monotone curve of all explains, in the same direction: no curve that only
            rises explains more.
        line_r2: the share that a straight line explains.
        p_value: the share of random smooth monotone curves that a logistic curve fits as well as this one (plus one of
            both counts).
    """

    low: float
    high: float
    centre: float
    width: float
    r2: float
    monotone_r2: float
    line_r2: float
    p_value: float


def fit_sigmoid(
    alphas: Float[np.ndarray, " alpha"], values: Float[np.ndarray, " _"], *, null: int = 200, seed: int = 0
) -> SigmoidFit:
    """The best logistic curve: theorem 3.6 of "Towards Understanding Steering Strength", with nu linear in alpha.

    Every curve that only rises looks a little like a sigmoid. The null is what tells: `null` random curves with slopes
    exp(g), g a Gaussian process with standard deviation 2 and a correlation length of a fifth of the grid. They rise
    smoothly, faster here and slower there, once or several times; the curve at hand is more of a sigmoid than they are
    if its r2 lies above most of theirs.

    Args:
        alphas: strengths, ascending.
        values: of the curve.
        null: number of random curves.
        seed: of the random curves.

    Raises:
        MechsteerError: the arrays differ in length, have fewer than five values, or are constant or not finite.
    """
    x, y = _pair(alphas, values, least=5)
    if float(np.ptp(y)) == 0:
        raise MechsteerError("fit_sigmoid got a constant curve, and a sigmoid rises or falls. Leave it out.")
    centre, width, r2 = _closest(x, y)
    curve = _logistic(x, centre, width)
    centred = curve - curve.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    offset = float(y.mean() - slope * curve.mean())
    return SigmoidFit(
        low=offset, high=offset + slope, centre=centre, width=width, r2=r2,
        monotone_r2=_r2(y, monotone(y if slope > 0 else -y) * (1 if slope > 0 else -1)),
        line_r2=float((_standard(x) @ _standard(y)) ** 2),
        p_value=float((1 + (_null(tuple(x.tolist()), null, seed) >= r2).sum()) / (1 + null)),
    )  # fmt: skip


def monotone(values: Float[np.ndarray, " alpha"]) -> Float[np.ndarray, " alpha"]:
    """The rising curve that is closest in mean square: isotonic regression by pooling adjacent violators (Barlow et al.
    1972, "Statistical inference under order restrictions")."""
    pools: list[list[float]] = []
    for value in values.tolist():
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, m), (b, n) = pools[-2], pools[-1]
            pools[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([np.full(int(n), mean) for mean, n in pools])


@dataclass(frozen=True)
class QuadraticFit:
    """linear * alpha + curvature / 2 * alpha^2 near 0, by least squares through 0.

    Attributes:
        linear: slope at 0; 0 by theorem 3.8.
        curvature: second derivative at 0; a variance by theorem 3.8, so not negative.
        r2: share of the squared values that the best curvature / 2 * alpha^2 alone explains; below 0 where it is worse
            than none.
        r2_with_linear: the same with the linear term.
        asymmetry: |linear| over |linear| + |curvature| / 2 * radius: 0 for a parabola with its vertex at 0, 1 for a
            line.
        radius: largest |alpha| that was fitted.
    """

    linear: float
    curvature: float
    r2: float
    r2_with_linear: float
    asymmetry: float
    radius: float


def local_quadratic(
    alphas: Float[np.ndarray, " alpha"], delta: Float[np.ndarray, " _"], *, radius: float
) -> QuadraticFit:
    """How well a parabola fits Delta CE near 0: theorem 3.8 of "Towards Understanding Steering Strength".

    Args:
        alphas: strengths.
        delta: Delta CE, which is 0 at 0.
        radius: strengths up to this far from 0 are fitted.

    Raises:
        MechsteerError: fewer than two strengths other than 0 are within the radius, or all of delta is 0 there.
    """
    x, y = _pair(alphas, delta, least=3)
    near = np.abs(x) <= radius * (1 + 1e-9)
    x, y = x[near], y[near]
    if np.count_nonzero(x) < 2 or not y.any():
        raise MechsteerError(
            f"radius={radius} leaves {np.count_nonzero(x)} strengths other than 0 with changes up to "
            f"{float(np.abs(y).max(initial=0.0))}. Pass a larger one, or a finer grid."
        )
    both, *_ = np.linalg.lstsq(np.stack([x, x**2], 1), y, rcond=None)
    alone = float((x**2 @ y) / (x**2 @ x**2))
    slope, bend = abs(float(both[0])), abs(float(both[1])) * radius
    return QuadraticFit(
        linear=float(both[0]), curvature=2 * float(both[1]), r2=_r2_through_0(y, alone * x**2),
        r2_with_linear=_r2_through_0(y, both[0] * x + both[1] * x**2),
        asymmetry=slope / (slope + bend) if slope + bend else 0.0, radius=float(np.abs(x).max()),
    )  # fmt: skip


def quadratic_radius(alphas: Float[np.ndarray, " alpha"], delta: Float[np.ndarray, " _"], *, r2: float = 0.95) -> float:
    """The largest radius up to which a parabola with its vertex at 0 explains at least `r2` of Delta CE, else 0.

    Every smaller radius with as many as four strengths in it has to do so too.
    """
    x, _ = _pair(alphas, delta, least=3)
    reached = 0.0
    for radius in np.unique(np.abs(x[x != 0])):
        if np.count_nonzero((np.abs(x) <= radius) & (x != 0)) < 4:
            continue
        if local_quadratic(alphas, delta, radius=float(radius)).r2 < r2:
            break
        reached = float(radius)
    return reached


def _logistic(x: Float[np.ndarray, "..."], centre: object, width: object) -> Float[np.ndarray, "..."]:
    return 0.5 * (1 + np.tanh((x - centre) / (2 * np.asarray(width))))  # type: ignore[operator]


def _parameters(x: Float[np.ndarray, " alpha"]) -> tuple[Float[np.ndarray, " curve"], Float[np.ndarray, " curve"]]:
    """Centres and widths of the lattice of logistic curves: centres up to a quarter of the grid beyond its ends, widths
    from a fifth of a step to the whole grid."""
    span = x[-1] - x[0]
    centres = np.linspace(x[0] - span / 4, x[-1] + span / 4, 121)
    widths = np.geomspace(0.2 * float(np.diff(x).min()), span, 30)
    return np.repeat(centres, len(widths)), np.tile(widths, len(centres))


def _closest(x: Float[np.ndarray, " alpha"], y: Float[np.ndarray, " alpha"]) -> tuple[float, float, float]:
    """Centre, width and r2 of the best logistic curve: the best of the lattice, polished."""
    target = _standard(y)
    best = int(((_basis(tuple(x.tolist())) @ target) ** 2).argmax())
    centres, widths = _parameters(x)

    def misfit(at: Any) -> float:
        curve = np.tanh((x - at[0]) / (2 * np.exp(at[1])))
        curve = curve - curve.mean()
        length = float(curve @ curve)
        return -(float(curve @ target) ** 2) / length if length > 1e-12 else 0.0

    start = np.array([centres[best], np.log(widths[best])])
    found = minimize(misfit, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 400})
    return float(found.x[0]), float(np.exp(found.x[1])), min(1.0, -float(found.fun))


@lru_cache(maxsize=8)
def _basis(x: tuple[float, ...]) -> Float[np.ndarray, "curve alpha"]:
    """The lattice's curves less their means, each of length 1; 0 for those that are constant on the grid."""
    grid = np.array(x)
    centres, widths = _parameters(grid)
    curves = _logistic(grid, centres[:, None], widths[:, None])
    curves = curves - curves.mean(1, keepdims=True)
    lengths = np.linalg.norm(curves, axis=1, keepdims=True)
    return np.where(lengths > 1e-6, curves / np.maximum(lengths, 1e-6), 0.0)


@lru_cache(maxsize=32)
def _null(x: tuple[float, ...], n: int, seed: int) -> Float[np.ndarray, " null"]:
    """r2 of the best logistic curve for each of `n` random smooth monotone curves."""
    grid = np.array(x)
    middle = (grid[1:] + grid[:-1]) / 2
    near = (middle[:, None] - middle[None]) / ((grid[-1] - grid[0]) / 5)
    covariance = 4.0 * np.exp(-0.5 * near**2) + 1e-8 * np.eye(len(middle))
    noise = np.random.default_rng(seed).standard_normal((n, len(middle)))
    slopes = np.exp(noise @ np.linalg.cholesky(covariance).T)
    curves = np.concatenate([np.zeros((n, 1)), (slopes * np.diff(grid)).cumsum(1)], 1)
    return np.array([_closest(grid, curve)[2] for curve in curves])


def _standard(values: Float[np.ndarray, " alpha"]) -> Float[np.ndarray, " alpha"]:
    centred = values - values.mean()
    return centred / np.linalg.norm(centred)


def _r2(y: Float[np.ndarray, " alpha"], fitted: Float[np.ndarray, " alpha"]) -> float:
    return 1.0 - float(((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _r2_through_0(y: Float[np.ndarray, " alpha"], fitted: Float[np.ndarray, " alpha"]) -> float:
    return 1.0 - float(((y - fitted) ** 2).sum() / (y**2).sum())


def _pair(
    alphas: Float[np.ndarray, " _"], values: Float[np.ndarray, " _"], *, least: int
) -> tuple[Float[np.ndarray, " alpha"], Float[np.ndarray, " alpha"]]:
    x, y = np.asarray(alphas, np.float64), np.asarray(values, np.float64)
    if x.shape != y.shape or len(x) < least or not (np.diff(x) > 0).all() or not np.isfinite(y).all():
        raise MechsteerError(
            f"A curve got {len(x)} strengths and {len(y)} values. Pass as many of both, at least {least}, strengths "
            "ascending and values finite."
        )
    return x, y


def _check(values: Float[np.ndarray, " alpha"]) -> None:
    if len(values) < 3 or not np.isfinite(values).all():
        raise MechsteerError(f"A curve has {len(values)} values. Pass at least 3, all of them finite.")
