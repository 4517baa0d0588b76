"""Whether `mechsteer plan` foretells what work takes, and how cost grows: predicted beside measured.

    python benchmarks/scale.py                   # four sizes, three workloads, then the exponents
    python benchmarks/scale.py --check           # exit status 1 where operations or seconds are off by more than 25 %
    python benchmarks/scale.py --quick           # one small size, in seconds
    python benchmarks/scale.py --study           # the chapters of a study of the pocket model instead

In each of --rounds rounds this machine is measured (`mechsteer.plan.here`), predictions are made, and then the work is
run, again and again for a second and a half where it is brief. A machine may be a third faster or slower from one
minute to the next: so medians of predictions stand beside medians of measurements, and *one by one* says how far apart
they were in a round. Models have random weights and the shape of Llamas with grouped queries. Exponents are slopes of a
line through logarithms, one quantity varied at a time.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.backends.random_weights import random_hooked
from mechsteer.plan import Device, here
from mechsteer.plan.estimate import Plan
from mechsteer.plan.probe import told
from mechsteer.prefix import optimise_soft_prefix, search_prefix

SIZES = {
    "0.2M": ms.Shape(4, 64, 4, 2, 16, 176, 512, name="0.2M"),
    "3M": ms.Shape(6, 192, 6, 2, 32, 512, 2048, name="3M"),
    "16M": ms.Shape(8, 384, 6, 2, 64, 1024, 4096, name="16M"),
    "60M": ms.Shape(12, 640, 10, 5, 64, 1728, 8192, name="60M"),
}
BAR = 0.25
# Seconds that a workload is run for, again and again where it takes less.
LEAST = 1.5


class Setting(NamedTuple):
    """How large a workload is; one of these is varied at a time for the exponents."""

    prompts: int = 8
    positions: int = 24
    completion: int = 12
    alphas: int = 21
    tokens: int = 4
    candidates: int = 128
    steps: int = 10


# Given a model, prepares the work; what comes back does it, and gives the operations that the engine counted.
Work = Callable[[ms.Model], Callable[[], float]]


class Measured(NamedTuple):
    flops: float
    seconds: float


class Outcome(NamedTuple):
    """The predictions and the measurements of all rounds."""

    work: str
    model: str
    plans: Sequence[Plan]
    measured: Sequence[Measured]

    @property
    def flops(self) -> tuple[float, float]:
        """Predicted and measured: they are the same in every round."""
        return self.plans[0].flops, self.measured[0].flops

    @property
    def seconds(self) -> tuple[float, float]:
        """Predicted and measured, medians."""
        return (
            statistics.median(each.seconds for each in self.plans),
            statistics.median(each.seconds for each in self.measured),
        )

    @property
    def ratios(self) -> tuple[float, float]:
        """Predicted over measured: operations, seconds."""
        return self.flops[0] / self.flops[1], self.seconds[0] / self.seconds[1]

    @property
    def missed(self) -> bool:
        return any(not 1 / (1 + BAR) <= ratio <= 1 + BAR for ratio in self.ratios)


def model_of(shape: ms.Shape, device: str | None = None, dtype: torch.dtype = torch.float32) -> ms.Model:
    """A random model of this shape, without a tokenizer."""
    at, name = device or ("cuda" if torch.cuda.is_available() else "cpu"), f"random {shape.name}"
    return ms.Model(random_hooked(shape.dims, device=at, dtype=dtype, name=name), name=name)


def tokens(model: ms.Model, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, model.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- the workloads: a plan, and what does the work ----


def patching(shape: ms.Shape, at: Setting, device: Device) -> tuple[Plan, Work]:
    """Every layer and position of one set of prompts patched into another."""
    axes = {"layer": shape.layers, "pos": at.positions}
    plan = ms.plan_sweep(shape, axes=axes, prompts=at.prompts, positions=at.positions, device=device)

    def work(model: ms.Model) -> Callable[[], float]:
        source = model.run(tokens(model, at.prompts, at.positions, seed=1), record="resid_pre", logits="none")

        def run() -> float:
            swept = ms.sweep(
                model, tokens(model, at.prompts, at.positions), axes={name: range(n) for name, n in axes.items()},
                build=lambda layer, pos: ms.Replace(ms.Site("resid_pre", layer, pos=pos), source.activations),
                measure=ms.LogitGap([5], [9]), progress=False,
            )  # fmt: skip
            return swept.provenance["options"]["flops"]

        return run

    return plan, work


def alphas(shape: ms.Shape, at: Setting, device: Device) -> tuple[Plan, Work]:
    """A vector behind every layer at many strengths, and the cross entropy of completions."""
    axes = {"layer": shape.layers, "alpha": at.alphas}
    plan = ms.plan_sweep(
        shape, axes=axes, kind="resid_post", prompts=at.prompts, positions=at.positions, completion=at.completion,
        device=device,
    )  # fmt: skip

    def work(model: ms.Model) -> Callable[[], float]:
        vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)).to(model.device) * 0.1
        prompts = ms.Prompts.from_ids(
            tokens(model, at.prompts, at.positions),
            completions=tokens(model, at.prompts, at.completion, seed=1).tolist(),
        )

        def run() -> float:
            swept = ms.sweep(
                model, prompts, axes={"layer": range(shape.layers), "alpha": [0.1 * n for n in range(at.alphas)]},
                build=lambda layer, alpha: ms.Add(vector, alpha, site=("resid_post", layer)),
                measure=ms.TeacherForcedCE(), progress=False,
            )  # fmt: skip
            return swept.provenance["options"]["flops"]

        return run

    return plan, work


def prefix(shape: ms.Shape, at: Setting, device: Device) -> tuple[Plan, Work]:
    """A soft prefix, and a search (GCG) from random tokens."""
    plan = ms.plan_prefix(
        shape, tokens=at.tokens, evaluations=at.candidates, steps=at.steps, restarts=1, beam=0, method="gcg", width=32,
        prompts=at.prompts, positions=at.positions, before=0, completion=at.completion, device=device, text=False,
    )  # fmt: skip

    def work(model: ms.Model) -> Callable[[], float]:
        prompts = ms.Prompts.from_ids(
            tokens(model, at.prompts, at.positions),
            completions=tokens(model, at.prompts, at.completion, seed=1).tolist(),
        )
        slotted = insert(prompts, at.tokens)

        def run() -> float:
            found = optimise_soft_prefix(
                model, slotted, ms.TeacherForcedCE(), n_restarts=1, steps=at.steps, patience=None, progress=False
            )
            search = search_prefix(
                model, slotted, ms.TeacherForcedCE(), method="gcg", evaluations=at.candidates, width=32, progress=False
            )
            provenance = found.history.provenance, search.trajectory.provenance
            return sum(each["options"]["flops"] for each in provenance)

        return run

    return plan, work


def insert(prompts: ms.Prompts, n: int) -> ms.Prompts:
    from mechsteer.vocabulary import insert as put

    return put(prompts, where="prefix", slots=n)


WORKLOADS = {"layer x position patching": patching, "alphas x layers": alphas, "prefix search": prefix}


# What seconds are taken with.
_clock = time.perf_counter


def measured(work: Work, model: ms.Model, runs: int = 1) -> Measured:
    """Operations by the engine's own counter, and median seconds of so many runs, and of more where these are brief; a
    run before builds the packed weights."""
    run = work(model)
    flops = run()
    times: list[float] = []
    while len(times) < runs or sum(times) < LEAST:
        began = _clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(_clock() - began)
    return Measured(flops, statistics.median(times))


# ---- how cost grows ----

BASE = ms.Shape(4, 256, 4, 2, 64, 704, 2048, name="base")
# What is varied: the workload that it is varied in, and its values.
VARIED: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers": ("alphas x layers", (2, 4, 8)),
    "positions": ("layer x position patching", (16, 32, 64)),
    "vocabulary": ("alphas x layers", (2048, 8192, 32768)),
    "prompts": ("alphas x layers", (4, 8, 16, 32)),
    "alphas": ("alphas x layers", (8, 16, 32, 64)),
    "candidates": ("prefix search", (64, 128, 256)),
}


def setting(name: str, value: int) -> tuple[ms.Shape, Setting]:
    from dataclasses import replace

    if name in ("layers", "vocabulary"):
        return replace(BASE, **{"layers": value} if name == "layers" else {"vocab": value}), Setting()
    return BASE, Setting()._replace(**{name: value})


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through the logarithms."""
    a, b = ([math.log(each) for each in values] for values in (x, y))
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    top = sum((one - mean_a) * (other - mean_b) for one, other in zip(a, b, strict=True))
    return top / sum((one - mean_a) ** 2 for one in a)


def exponents(device: Device, names: Sequence[str]) -> Table:
    table = Table(title="how cost grows: exponents, predicted and measured")
    for column in ("quantity", "values", "in", "operations", "measured", "seconds", "measured"):
        table.add_column(column)
    for name in names:
        work, values = VARIED[name]
        rows = []
        for value in values:
            shape, at = setting(name, value)
            plan, doing = WORKLOADS[work](shape, at, device)
            done = measured(doing, model_of(shape), 3)
            rows.append((plan.flops, done.flops, plan.seconds, done.seconds))
        slopes = [slope(values, column) for column in zip(*rows, strict=True)]
        table.add_row(name, ", ".join(map(str, values)), work, *(f"{each:.2f}" for each in slopes))
        print(f"{name}: measured", file=sys.stderr)
    return table


# ---- the chapters of a study ----


def chapters(device: Device) -> Table:
    """The predicted and the measured seconds of each chapter of the default study of the pocket model."""
    from mechsteer.study.case import Case
    from mechsteer.study.chapters import chapters as shipped_chapters
    from mechsteer.study.requests import shipped
    from mechsteer.study.settings import Settings

    model = ms.load_model("pocket", device="cpu")
    case = Case.of(Settings(prefix="Talk only about cats.", requests=shipped()), model=model)
    plain, long = (float(each.lengths.float().mean()) for each in (case.plain, case.prefixed))
    plan = ms.plan_study(
        model, requests=len(shipped()), positions=round(plain), tokens=round(long - plain), device=device
    )
    seconds: dict[str, float] = {}
    for chapter in shipped_chapters():
        began = _clock()
        chapter.measure(case)
        seconds[chapter.name] = _clock() - began
        print(f"{chapter.name}: measured", file=sys.stderr)
    table = Table(title="a study of the pocket model, chapter by chapter")
    for column in ("chapter", "predicted, s", "measured, s", "ratio", ""):
        table.add_column(column)
    stages = {stage.name: stage for stage in plan.stages}
    # Completions are made in the first chapter that needs them.
    predicted = {name: stages[name].seconds for name in seconds}
    first = next(iter(seconds))
    predicted[first] += stages["completions"].seconds
    for name, taken in seconds.items():
        ratio = predicted[name] / taken
        table.add_row(name, f"{predicted[name]:.2f}", f"{taken:.2f}", f"{ratio:.2f}", stages[name].note)
    whole = sum(seconds.values())
    table.add_row("all", f"{plan.seconds:.2f}", f"{whole:.2f}", f"{plan.seconds / whole:.2f}", "")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a prediction is off")
    parser.add_argument("--quick", action="store_true", help="one small size, and no exponents")
    parser.add_argument("--study", action="store_true", help="the chapters of a study instead")
    parser.add_argument(
        "--rounds", type=int, default=5, help="each measures the machine, predicts, and runs; medians count"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--exponents", nargs="*", default=list(VARIED), choices=list(VARIED), help="which; none for none"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="on one thread, for a machine that others use meanwhile"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds takes one or more.")
    global _clock
    if arguments.processor_time:
        torch.set_num_threads(1)
        _clock = time.process_time
    device = here(clock=_clock)
    console = Console(width=170)
    about = Table(title="this machine")
    about.add_column("what")
    about.add_column("measured")
    for row in told(device):
        about.add_row(*row)
    console.print(about)
    if arguments.study:
        console.print(chapters(device))
        return 0
    at = Setting(prompts=2, positions=8, alphas=3, candidates=32, steps=2) if arguments.quick else Setting()
    rounds = 1 if arguments.quick else arguments.rounds
    models = {name: model_of(SIZES[name]) for name in (arguments.sizes[:1] if arguments.quick else arguments.sizes)}
    found: dict[tuple[str, str], list[tuple[Plan, Measured]]] = {
        (name, work): [] for name in models for work in WORKLOADS
    }
    # All sizes in every round, so that a minute in which the machine is slow is no size's own.
    for turn in range(rounds):
        if turn:
            device = here(clock=_clock, again=True)
        for (name, work), pairs in found.items():
            plan, doing = WORKLOADS[work](SIZES[name], at, device)
            pairs.append((plan, measured(doing, models[name])))
        print(f"round {turn + 1} of {rounds}: measured", file=sys.stderr)
    outcomes = [Outcome(work, name, *zip(*each, strict=True)) for (name, work), each in found.items()]
    table = Table(title=f"predicted beside measured, medians of {rounds}")
    for column in ("work", "model", "GFLOP", "measured", "ratio", "seconds", "measured", "ratio", "one by one", ""):
        table.add_column(column)
    for each in outcomes:
        (flops, done), (seconds, taken), ratios = each.flops, each.seconds, each.ratios
        spread = [plan.seconds / one.seconds for plan, one in zip(each.plans, each.measured, strict=True)]
        table.add_row(
            each.work, each.model, f"{flops / 1e9:.3f}", f"{done / 1e9:.3f}", f"{ratios[0]:.3f}", f"{seconds:.3f}",
            f"{taken:.3f}", f"{ratios[1]:.2f}", f"{min(spread):.2f} to {max(spread):.2f}",
            "missed" if each.missed else "",
        )  # fmt: skip
    console.print(table)
    if not arguments.quick and arguments.exponents:
        console.print(exponents(device, arguments.exponents))
    return int(arguments.check and any(each.missed for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
