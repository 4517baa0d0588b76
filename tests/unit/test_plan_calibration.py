"""Measuring a machine: what is found of one whose speed is known, and how measurements are read."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import mechsteer as ms
from mechsteer.backends.random_weights import random_hooked
from mechsteer.plan.calibration import _Trial, calibrated
from mechsteer.plan.clock import Timer
from mechsteer.plan.devices import Device, Table

BARE = Device("true", "cpu", {"float32": 1e11}, 1e10, 1e12, 1.0, 1.0, 1.0)
_PLAIN = Table([960, 4992], [64, 192, 512], [[1.8, 1.4, 1.2], [1.5, 1.3, 1.2]])
TRUE = replace(
    BARE, layer_seconds=3e-4, batch_seconds=1.2e-3, cell_seconds=8e-5, call_seconds=3e-3,
    layer_times={"plain": 1.0, "past": 1.2, "ragged": 1.7, "back": 2.2},
    batch_times={"plain": 1.0, "past": 1.0, "ragged": 1.0, "back": 2.0},
    engine={
        "plain": _PLAIN, "past": _PLAIN, "ragged": Table([1.0], [64, 192, 512], [[1.7, 1.5, 1.3]]),
        "back": Table([1.0], [64, 192, 512], [[2.0, 1.6, 1.2]]), "logits": Table([1e-3, 1e-2], [1.0], [[2.5], [1.5]]),
    },
)  # fmt: skip


class Known(Timer):
    """A timer of a machine that is as fast as `TRUE`."""

    def in_turns(self, runs: Any, turns: int) -> Any:
        self.trials.extend(runs)
        return {trial: trial.seconds(TRUE) for trial in runs}

    @property
    def trials(self) -> list[_Trial]:
        return vars(self).setdefault("_trials", [])


@pytest.fixture(scope="module")
def measured() -> tuple[Device, list[_Trial]]:
    timer = Known(torch.device("cpu"))
    return calibrated(BARE, timer, torch.float32, torch.device("cpu")), timer.trials


def test_everything_that_is_measured_is_planned_as_long_as_it_took(measured: tuple[Device, list[_Trial]]) -> None:
    device, trials = measured
    assert len(trials) > 20
    for trial in trials:
        assert trial.seconds(device) == pytest.approx(trial.seconds(TRUE), rel=0.03), trial.work


def test_a_machine_of_known_speed_is_found(measured: tuple[Device, list[_Trial]]) -> None:
    device, _ = measured
    for name in ("call_seconds", "batch_seconds", "layer_seconds", "cell_seconds"):
        assert getattr(device, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
    for kind, times in TRUE.layer_times.items():
        assert device.layer_times[kind] == pytest.approx(times, rel=0.1), kind
    for kind in ("plain", "past", "ragged", "back"):
        for rows in (100, 960, 2000, 6000):
            for width in (32, 64, 100, 512, 2048):
                expected = TRUE.engine[kind].at(rows, width)
                assert device.engine[kind].at(rows, width) == pytest.approx(expected, rel=0.1), (kind, rows, width)
    assert device.measured is BARE.measured


def test_kernels_are_slower_by_the_size_of_a_batch_and_logits_by_their_own() -> None:
    tables = {
        "plain": Table([10, 1000], [8, 64], [[4.0, 2.0], [2.0, 1.0]]),
        "logits": Table([0.1, 1.0], [1.0], [[3.0], [1.0]]),
    }  # fmt: skip
    device = replace(BARE, engine=tables, layer_seconds=0.0, batch_seconds=0.0)
    for rows, d_model, slower in ((10, 8, 4), (1, 1, 4), (1000, 64, 1), (1e6, 4096, 1), (10, 64, 2), (100, 8, 8**0.5)):
        assert device.time(0.1, 3, rows=rows, d_model=d_model) == pytest.approx(0.1 * slower)
    assert device.time(0.0, 0, rest=0.1) == pytest.approx(0.3)
    assert device.time(0.1, 3, rest=1.0, rows=10, d_model=8) == pytest.approx(0.4 + 1.0)


def test_of_a_turn_a_long_call_counts_and_the_second_of_two_brief_ones() -> None:
    calls: list[str] = []
    now = iter(range(10**6))
    seconds = {"long": 3, "brief": 0}

    def run(name: str) -> None:
        calls.append(name)
        for _ in range(seconds[name]):
            next(now)

    clock = Timer(torch.device("cpu"), clock=lambda: 0.02 * next(now))
    found = clock.in_turns({name: lambda name=name: run(name) for name in seconds}, turns=3)
    assert calls == ["long", "brief", "brief"] * 3
    assert found["long"] > found["brief"] > 0


@pytest.mark.parametrize("gated", [True, False])
def test_random_models_have_the_sizes_that_were_asked_for(gated: bool) -> None:
    shape = ms.Shape(2, 32, 4, 2, 8, 48, 64, gated=gated)
    model = ms.Model(random_hooked(shape.dims, device="cpu", dtype=torch.float32, n_ctx=16), name="random")
    assert ms.Shape.of(model).dims == shape.dims == model.decoder.dims and model.n_ctx == 16
    again = random_hooked(shape.dims, device="cpu", dtype=torch.float32, n_ctx=16)
    assert torch.equal(model.hooked.W_E, again.W_E)
