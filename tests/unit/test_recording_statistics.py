"""Running statistics: those of the whole set, however it is cut."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechsteer.recording.statistics import RunningStatistics


@st.composite
def row_batches(draw: st.DrawFn) -> list[Tensor]:
    """Batches of rows with few different values, so that many are equal, far from zero."""
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    offset = draw(st.sampled_from([0, 1_000_000]))
    return [torch.randint(-3, 4, (size, *shape), generator=generator).float() + offset for size in sizes]


@given(row_batches(), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_running_statistics_are_those_of_the_whole_set(batches: list[Tensor], k: int) -> None:
    running, seen = RunningStatistics.start(batches[0], top_k=k, covariance=True), 0
    for batch in batches:
        index = torch.stack([torch.arange(seen, seen + len(batch)) + shift for shift in (0, 100, 200)], 1)
        running, seen = running.updated(batch, index), seen + len(batch)
    rows = torch.cat(batches).double().flatten(1).numpy()
    assert running.n == seen
    np.testing.assert_allclose(running.mean.flatten(), rows.mean(0), rtol=1e-14, atol=1e-14)
    assert running.scatter is not None and running.top is not None
    centred = rows - rows.mean(0)
    np.testing.assert_allclose(
        running.scatter, centred.T @ centred, rtol=1e-12, atol=1e-7 if rows.max() > 99 else 1e-12
    )
    values, source = (part.flatten(1, len(batches[0].shape) - 1) for part in running.top)
    for feature in range(rows.shape[1]):
        first = sorted(range(seen), key=lambda row: (-rows[row, feature], row))[:k]
        kept = min(k, seen)
        assert values[:kept, feature].tolist() == [rows[row, feature] for row in first]
        assert source[:kept, feature].tolist() == [[row, row + 100, row + 200] for row in first], "ties: the first wins"


def test_covariance_far_from_zero_keeps_its_digits() -> None:
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e8
    running = RunningStatistics.start(rows, top_k=0, covariance=True)
    for batch in rows.split(100):
        running = running.updated(batch, torch.zeros(len(batch), 3, dtype=torch.int64))
    assert running.scatter is not None
    # The sum of squares minus the square of the sum would have no correct digit here.
    torch.testing.assert_close(running.scatter / 3999, torch.cov(rows.T), rtol=1e-6, atol=1e-6)
