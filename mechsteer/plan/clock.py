"""Timing for the probe: kernels by themselves, and whole runs in turns."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

K = TypeVar("K", bound=Hashable)
# Seconds that a kernel is measured for, at least five times.
_SECONDS = 0.012
# Seconds of a long call.
_LONG = 0.05


@dataclass(frozen=True)
class Timer:
    """Seconds of calls.

    Attributes:
        at: the device that they run on, which is waited for.
        clock: what they are measured with.
    """

    at: torch.device
    clock: Callable[[], float] = time.perf_counter

    def once(self, run: Callable[[], Any]) -> float:
        """Of one call."""
        began = self.clock()
        run()
        if self.at.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - began

    def alone(self, run: Callable[[], Any]) -> float:
        """Of a call again and again: the lower quartile, because what else the machine does only ever slows it."""
        self.once(run)
        times = [self.once(run) for _ in range(5)]
        while sum(times) < _SECONDS:
            times.append(self.once(run))
        return sorted(times)[len(times) // 4]

    def in_turns(self, runs: Mapping[K, Callable[[], Any]], turns: int) -> dict[K, float]:
        """The median of each of many, which take turns.

        A brief call is made twice, and the second one counts: the first one finds the memory and the caches that
        another left, which costs it up to 40 %, where real work goes on as it began.
        """
        times: dict[K, list[float]] = {key: [] for key in runs}
        for _ in range(turns):
            for key, run in runs.items():
                first = self.once(run)
                times[key].append(first if first >= _LONG else self.once(run))
        return {key: statistics.median(each) for key, each in times.items()}
