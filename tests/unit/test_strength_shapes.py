"""Shapes of curves that are known."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mechsteer.errors import MechsteerError
from mechsteer.strength import shapes
from mechsteer.strength.shapes import curve_shape, fit_sigmoid, local_quadratic, monotone, quadratic_radius

X = np.linspace(-20, 20, 81)


def logistic(x: np.ndarray, centre: float = 0.0, width: float = 3.0) -> np.ndarray:
    return 1 / (1 + np.exp(-(x - centre) / width))


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (np.exp(-((X - 5) ** 2) / 20), "bump"),
        (np.exp(-((X - 19) ** 2) / 20), "rising"),  # it falls by less than 5 % of its range after the peak
        (np.exp(-((X - 17) ** 2) / 20), "bump"),
        (logistic(X), "rising"),
        (logistic(-X), "falling"),
        (-np.exp(-((X - 5) ** 2) / 20), "dip"),
        (np.sin(X / 2), "other"),
        (np.full(81, 0.3), "flat"),
        (5e-5 * logistic(X), "flat"),
        (np.exp(-((X - 8) ** 2) / 9) + np.exp(-((X + 8) ** 2) / 9), "other"),
        (np.exp(-((X - 8) ** 2) / 9) + 0.03 * np.exp(-((X + 8) ** 2) / 9), "bump"),
    ],
)
def test_curve_shape(values: np.ndarray, shape: str) -> None:
    assert curve_shape(values) == shape
    turned = {"rising": "falling", "falling": "rising"}.get(shape, shape)
    assert curve_shape(values[::-1]) == turned  # steering against the vector
    upside_down = {"rising": "falling", "falling": "rising", "bump": "dip", "dip": "bump"}.get(shape, shape)
    assert curve_shape(-values) == upside_down
    assert shape in shapes.SHAPES


def test_noise_within_the_tolerance_does_not_change_the_shape() -> None:
    noise = 0.0005 * np.random.default_rng(0).standard_normal(81)
    assert curve_shape(logistic(X) + noise) == "rising"
    assert curve_shape(logistic(X) + 50 * noise) == "other"
    assert curve_shape(logistic(X) + 50 * noise, tolerance=2.0) == "rising"


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=9))
def test_the_turning_point_is_the_best_of_all(values: list[int]) -> None:
    moves = np.diff(np.array(values, dtype=float))
    ups, downs = np.maximum(moves, 0), np.maximum(-moves, 0)
    every = [downs[:place].sum() + ups[place:].sum() for place in range(len(values))]
    assert shapes._against(downs, ups) == pytest.approx(min(every))


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_monotone_is_isotonic_regression(values: list[float]) -> None:
    expected = scipy.optimize.isotonic_regression(np.array(values)).x
    np.testing.assert_allclose(monotone(np.array(values)), expected, atol=1e-9)


def test_fit_sigmoid_finds_what_made_the_curve() -> None:
    for low, high, centre, width in [(0.1, 0.7, 4.0, 1.5), (0.9, 0.2, -6.0, 3.0), (0.0, 1e-3, 0.0, 0.6)]:
        fit = fit_sigmoid(X, low + (high - low) * logistic(X, centre, width), null=100)
        found = [fit.low, fit.high, fit.centre, fit.width]
        np.testing.assert_allclose(found, [low, high, centre, width], rtol=1e-3, atol=1e-3)
        assert fit.r2 > 0.999999 and fit.p_value < 0.02 and fit.line_r2 < 0.95
        assert fit.monotone_r2 == pytest.approx(1.0)


def test_other_monotone_curves_are_no_sigmoids() -> None:
    twice = logistic(X, -12, 0.7) + logistic(X, 10, 0.7)  # rises in two steps
    fit = fit_sigmoid(X, twice, null=100)
    assert fit.monotone_r2 == pytest.approx(1.0) and fit.r2 < 0.95 and fit.p_value > 0.5
    bump = fit_sigmoid(X, np.exp(-(X**2) / 20), null=100)
    assert bump.r2 < 0.4 and bump.monotone_r2 < 0.6 and bump.p_value == 1.0


def test_the_null_holds_its_level() -> None:
    """Of curves drawn from the null itself, a share p has a p-value of at most p."""
    x = tuple(np.linspace(-5, 5, 21).tolist())
    reference, fresh = shapes._null(x, 100, 0), shapes._null(x, 100, 1)
    p = [(1 + (reference >= score).sum()) / 101 for score in fresh]
    for level in (0.05, 0.25, 0.5):
        assert abs(np.mean(np.array(p) <= level) - level) < 0.15
    assert fit_sigmoid(np.array(x), logistic(np.array(x)), null=100, seed=0) == fit_sigmoid(
        np.array(x), logistic(np.array(x)), null=100, seed=0
    )


def test_local_quadratic() -> None:
    fit = local_quadratic(X, 0.3 * X**2 / 2, radius=4.0)
    assert fit.curvature == pytest.approx(0.3) and fit.linear == pytest.approx(0, abs=1e-12)
    assert fit.r2 == pytest.approx(1) and fit.asymmetry < 1e-12 and fit.radius == 4.0
    tilted = local_quadratic(X, 0.5 * X + 0.3 * X**2 / 2, radius=2.0)
    assert tilted.linear == pytest.approx(0.5) and tilted.curvature == pytest.approx(0.3)
    assert tilted.r2_with_linear == pytest.approx(1) and tilted.r2 < 0.5
    assert tilted.asymmetry == pytest.approx(0.5 / (0.5 + 0.15 * 2))
    assert local_quadratic(X, -np.abs(X), radius=3.0).curvature < 0


def test_quadratic_radius() -> None:
    saturating = 1 - np.exp(-(X**2) / 50)
    radius = quadratic_radius(X, saturating)
    assert 3 < radius < 12
    assert quadratic_radius(X, saturating, r2=0.999) < radius < quadratic_radius(X, saturating, r2=0.8)
    assert local_quadratic(X, saturating, radius=radius).r2 >= 0.95
    assert quadratic_radius(X, X**2) == 20.0 and quadratic_radius(X, X) == 0.0


def test_errors() -> None:
    with pytest.raises(MechsteerError, match="Pass at least 3, all of them finite"):
        curve_shape(np.array([1.0, 2.0]))
    with pytest.raises(MechsteerError, match="Pass at least 3, all of them finite"):
        curve_shape(np.array([1.0, 2.0, np.nan]))
    with pytest.raises(MechsteerError, match="got 3 strengths and 2 values"):
        local_quadratic(np.arange(3.0), np.arange(2.0), radius=1.0)
    with pytest.raises(MechsteerError, match="at least 5, strengths ascending"):
        fit_sigmoid(X[::-1].copy(), logistic(X))
    with pytest.raises(MechsteerError, match="got a constant curve"):
        fit_sigmoid(X, np.ones(81))
    with pytest.raises(MechsteerError, match=r"radius=0\.1 leaves 0 strengths other than 0"):
        local_quadratic(X, X**2, radius=0.1)
