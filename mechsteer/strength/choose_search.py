"""The search for a strength: curves through few exact points, in the shapes that the laws of steering give them.

The side effect is a parabola near 0 (Theorem 3.8) that flattens where norms divide the push out (Proposition 4.1): its
square root starts as a straight line. The target is a sigmoid (Theorem 3.6) in the logarithm of alpha, plus what a
Gaussian process makes of its departures, such as the fall behind the bump (Theorem 3.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator

Measure = Callable[[Sequence[float]], np.ndarray]
"""Exact values [alpha, prompt] at these strengths."""

# At the best strength the side effect costs about this share of what there is to gain: between 0.08 and 0.40 for those
# four of the pocket model's concepts, at all layers, on which the search was tuned.
SHARE = 0.25
_GRID = 256
# Of the Gaussian process, in units of log alpha and of what there is to gain; and the least variance of a judged point.
_LENGTH, _AMPLITUDE, _LEAST = 0.3, 0.15, 0.02
# In log alpha: two strengths closer than this tell nothing new of the target; and of the side effect, which is smooth.
_APART, _NEAR = 0.03, 0.06


@dataclass(frozen=True)
class SideLaw:
    """The side effect's rise over alpha, through exact points: monotone cubic in alpha of its signed square root."""

    alphas: Float[np.ndarray, " point"]
    rise: Float[np.ndarray, " point"]
    local: tuple[float, float] | None = None
    """Slope and curvature at 0, where they are known."""

    def __call__(self, alphas: Float[np.ndarray, " alpha"]) -> Float[np.ndarray, " alpha"]:
        """The rise at these strengths; beyond the last point it goes on as the root's last slope."""
        order = np.argsort(self.alphas)
        x, y = self.alphas[order], self.rise[order]
        if self.local is not None:
            # The parabola, where it must still hold: far below the first point.
            near, (slope, curvature) = x[1] / 4, self.local
            x, y = np.insert(x, 1, near), np.insert(y, 1, slope * near + curvature * near**2 / 2)
        root = np.sign(y) * np.sqrt(np.abs(y))
        inner = PchipInterpolator(x, root)(np.clip(alphas, x[0], x[-1]))
        slope = (root[-1] - root[-2]) / (x[-1] - x[-2])
        found = inner + slope * np.clip(alphas - x[-1], 0, None)
        return np.sign(found) * found**2


@dataclass(frozen=True)
class Curve:
    """What is known of a function of log alpha: its mean, and samples of what it may be."""

    u: Float[np.ndarray, " grid"]
    mean: Float[np.ndarray, " grid"]
    cov: Float[np.ndarray, "grid grid"]

    @property
    def sd(self) -> Float[np.ndarray, " grid"]:
        return np.sqrt(np.clip(np.diag(self.cov), 0, None))

    def draws(self, n: int, seed: int) -> Float[np.ndarray, "n grid"]:
        """Samples of the whole curve."""
        values, vectors = np.linalg.eigh(self.cov)
        root = vectors * np.sqrt(np.clip(values, 0, None))
        return self.mean + np.random.default_rng(seed).standard_normal((n, len(self.u))) @ root.T


def kernel(a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"]) -> Float[np.ndarray, "a b"]:
    """Squared exponential with the process's length."""
    return np.exp(-0.5 * ((a[:, None] - b) / _LENGTH) ** 2)


def target_curve(
    u: Float[np.ndarray, " point"],
    y: Float[np.ndarray, " point"],
    noise: Float[np.ndarray, " point"],
    grid: Float[np.ndarray, " grid"],
    *,
    base: float,
    reach: float,
    centre: float,
    loose: Callable[[np.ndarray], np.ndarray],
) -> Curve:
    """The target over log alpha: a sigmoid from `base`, and a Gaussian process around it.

    It is the mean over all sigmoids on a grid of heights, places and steepnesses, each as likely as points and
    noise make it; before them, the likeliest gains most of `reach` a little below `centre`.

    Args:
        u: log alpha of the points.
        y: the target there.
        noise: variance of each.
        grid: where the curve is wanted.
        base: the target at alpha = 0.
        reach: what it can gain.
        centre: log alpha at which the side effect costs `SHARE`.
        loose: how far the target may depart from the sigmoid, as a share of what it may anywhere. A push that hardly
            changes predictions cannot change the target either: by Pinsker's inequality not by more than the root of
            half the KL.
    """
    heights, steeps, places = np.meshgrid(
        np.array([0.0, 0.15, 0.3, 0.5, 0.75, 1.0]) * reach,
        np.array([4.0, 7.0, 12.0]),
        centre + np.log(np.geomspace(0.2, 1.5, 16)),
        indexing="ij",
    )
    parameters = np.stack([heights.ravel(), steeps.ravel(), places.ravel()])

    def sigmoids(at: np.ndarray, which: np.ndarray) -> np.ndarray:
        height, steep, place = (each[:, None] for each in which)
        return base + height / (1 + np.exp(-np.clip(steep * (at - place), -60, 60)))

    def process(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (_AMPLITUDE * reach) ** 2 * np.outer(loose(first), loose(second)) * kernel(first, second)

    cov = process(u, u) + np.diag(noise)
    residuals = y - sigmoids(u, parameters)
    fit = (residuals * np.linalg.solve(cov, residuals.T).T).sum(1)
    prior = ((parameters[0] / reach - 0.75) / 0.35) ** 2 + ((parameters[2] - centre - np.log(0.85)) / 0.35) ** 2
    likely = np.exp(-(fit + prior - (fit + prior).min()) / 2)
    likely = likely / likely.sum()
    across = process(grid, u)
    means = sigmoids(grid, parameters) + residuals @ np.linalg.solve(cov, across.T)
    mean = likely @ means
    between = (means - mean).T @ (likely[:, None] * (means - mean))
    within = process(grid, grid) - across @ np.linalg.solve(cov, across.T)
    return Curve(grid, mean, within + between)


@dataclass(frozen=True)
class Found:
    """What a search saw.

    Attributes:
        alphas: strengths at which the target was measured, ascending, 0 first.
        target: [point, prompt].
        side_alphas: strengths at which the side effect was measured, ascending, 0 first.
        side: [side point, side prompt].
        grid: strengths of the curves.
        target_law: the target's curve.
        side_law: mean rise of the side effect on the grid.
        rise: of the side effect at each point: exact at the best of them and where it was measured, else by its curve.
        score: of each point: mean target less the weighted mean rise.
        reach: what the target could gain, as far as was known in the end.
    """

    alphas: Float[np.ndarray, " point"]
    target: Float[np.ndarray, "point prompt"]
    side_alphas: Float[np.ndarray, " side_point"]
    side: Float[np.ndarray, "side_point side_prompt"]
    grid: Float[np.ndarray, " grid"]
    target_law: Curve
    side_law: Float[np.ndarray, " grid"]
    rise: Float[np.ndarray, " point"]
    score: Float[np.ndarray, " point"]
    reach: float


def search(
    target: Measure,
    side: Measure,
    *,
    scale: float,
    weight: float,
    budget: int,
    local: tuple[float, float] | None = None,
    most: float | None = None,
    largest: float | None = None,
) -> Found:
    """Look for the strength with the best mean target less weighted rise of the side effect.

    1. The side effect at 0, and at 0.4 and 0.8 of the scale. With slope and curvature at 0 that gives its curve.
    2. The target at 0; and where the side effect costs `SHARE` of what there is to gain. Where nobody knows how much
       that is, at a quarter, half and the whole of the scale first.
    3. Where the curves put the largest score within one standard deviation, until the budget is spent. Strengths whose
       side effect alone costs all that there is to gain are never tried.

    Args:
        target: measures it.
        side: measures the side effect.
        scale: strength at which the push is as long as what it is added to.
        weight: of the side effect.
        budget: strengths at which the target is measured, 0 among them.
        local: slope and curvature of the side effect at 0, if known.
        most: the largest value that the target can have, if known.
        largest: no strength above this is tried; None for twice the scale.
    """
    top = 2 * scale if largest is None else largest
    seen = {0.0: target([0.0])[0]}
    base = float(seen[0.0].mean())
    first = [alpha for alpha in (0.4 * scale, 0.8 * scale) if alpha <= top] or [top / 2, top]
    beside = dict(zip((0.0, *first), side([0.0, *first]), strict=True))
    if most is None:
        places = [min(share, top / scale) * scale for share in (0.25, 0.5, 1.0)]
        seen |= dict(zip(places, target(places), strict=True))
        beside |= _new(side, [alpha for alpha in places if alpha not in beside])
    u = np.log(np.geomspace(top / 64, top, _GRID))
    while True:
        law = SideLaw(np.array(list(beside)), _rise(beside), local)
        rise = law(np.exp(u))
        reach = max((_within_reach(seen) if most is None else most) - base, 1e-6)
        centre = _where(u, weight * rise, SHARE * reach, otherwise=np.log(min(scale / 2, top)))
        tried = np.array(sorted(alpha for alpha in seen if alpha > 0))
        y = np.array([float(seen[alpha].mean()) for alpha in tried])

        def loose(at: np.ndarray, cost: np.ndarray = weight * rise, at_centre: float = SHARE * reach) -> np.ndarray:
            return np.sqrt(np.clip(np.interp(at, u, cost) / at_centre, 0.01, 1)) if weight else np.ones_like(at)

        curve = target_curve(
            np.log(tried), y, _noise(seen, reach)[1:], u, base=base, reach=reach, centre=centre, loose=loose
        )
        if len(seen) >= budget:
            break
        if not len(tried):
            chosen = float(np.exp(centre))
        else:
            hope = curve.mean - weight * rise + curve.sd
            apart = np.abs(u[:, None] - np.log(tried)).min(1) >= _APART
            worth = (weight * rise < reach) & (u > centre - np.log(4)) & apart
            if not worth.any():
                break
            chosen = float(np.exp(u[np.where(worth, hope, -np.inf).argmax()]))
        seen |= _new(target, [chosen])
        # Next to one that is known the curve says enough.
        known = np.log([alpha for alpha in beside if alpha > 0])
        if np.abs(known - np.log(chosen)).min() > _NEAR:
            beside |= _new(side, [chosen])
    alphas = sorted(seen)
    while True:
        risen = SideLaw(np.array(list(beside)), _rise(beside), local)(np.array(alphas))
        score = np.array([float(seen[alpha].mean()) for alpha in alphas]) - weight * risen
        best = alphas[int(score.argmax())]
        if best in beside:
            break
        beside |= _new(side, [best])
    side_alphas = sorted(beside)
    return Found(
        np.array(alphas), np.stack([seen[alpha] for alpha in alphas]),
        np.array(side_alphas), np.stack([beside[alpha] for alpha in side_alphas]),
        np.exp(u), curve, rise, risen, score, reach,
    )  # fmt: skip


def _within_reach(seen: dict[float, np.ndarray]) -> float:
    """The largest target so far; or half as much again, from that at 0 on, where it is the strongest push's."""
    means = {alpha: float(values.mean()) for alpha, values in seen.items()}
    peak = max(means.values())
    return peak + (0.5 * (peak - means[0.0]) if peak == means[max(means)] else 0.0)


def _new(measure: Measure, alphas: Sequence[float]) -> dict[float, np.ndarray]:
    return dict(zip(alphas, measure(alphas), strict=True)) if alphas else {}


def _rise(beside: dict[float, np.ndarray]) -> Float[np.ndarray, " point"]:
    return np.array([float((values - beside[0.0]).mean()) for values in beside.values()])


def _where(u: np.ndarray, cost: np.ndarray, wanted: float, *, otherwise: float) -> float:
    """The first place at which the cost reaches what is wanted."""
    reached = cost >= wanted
    return float(u[reached.argmax()]) if reached.any() else otherwise


def _noise(seen: dict[float, np.ndarray], reach: float) -> Float[np.ndarray, " point"]:
    """Variance of the mean over prompts at each point, besides what moves all points of a prompt alike."""
    values = np.stack([seen[alpha] for alpha in sorted(seen)])
    apart = doubly_centred(values)
    n = values.shape[1]
    return np.maximum(apart.var(1, ddof=1) if n > 1 else 0.0, _LEAST * reach**2) / n


def doubly_centred(values: Float[np.ndarray, "point prompt"]) -> Float[np.ndarray, "point prompt"]:
    """What is left of each value beside its point's and its prompt's mean."""
    return values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()


def per_prompt(found: Found, scores: Float[np.ndarray, "point prompt"], best: int) -> Float[np.ndarray, " prompt"]:
    """The best of the strengths tried for each prompt, as far as its scores tell more than noise.

    A prompt's score departs from the mean one by a Gaussian process around 0. How large such departures are is read off
    the products of departures at different points, which noise leaves at 0. A prompt gets another strength than the
    common one where its score there is larger by two standard deviations of what the points leave open.

    Args:
        found: the search.
        scores: of each prompt at each point.
        best: index of the point that is best for all of them together.
    """
    common = np.full(scores.shape[1], found.alphas[best])
    tried = found.alphas > 0
    if scores.shape[1] < 2 or tried.sum() < 3 or best == 0:
        return common
    u, apart = np.log(found.alphas[tried]), doubly_centred(scores[tried])
    like, best = kernel(u, u), best - 1
    centring = np.eye(len(u)) - 1 / len(u)
    # Centring takes the part out that all points share.
    expected, products = centring @ like @ centring, apart @ apart.T / (apart.shape[1] - 1)
    other = ~np.eye(len(u), dtype=bool)
    variance = float((products * expected)[other].sum() / np.square(expected)[other].sum())
    if variance <= 0:
        return common
    noise = np.maximum(np.diag(products) - variance * np.diag(expected), 1e-6 * variance)
    gain = variance * like @ np.linalg.inv(variance * like + np.diag(noise))
    rest = variance * like - gain @ (variance * like)
    open_still = np.sqrt(np.clip(np.diag(rest) + rest[best, best] - 2 * rest[best], 0, None))
    means = found.score[tried]
    better = (means - means[best])[:, None] + gain @ apart - (gain @ apart)[best]
    # Where nothing is surely better, the common one has 0.
    return found.alphas[tried][(better - 2 * open_still[:, None]).argmax(0)]
