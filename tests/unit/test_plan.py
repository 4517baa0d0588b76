"""Plans: their operations are those that the engine counts, which are those that PyTorch counts."""

import json
import subprocess
import sys
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mechsteer as ms
from mechsteer.backends.packing import Pack
from mechsteer.backends.random_weights import random_hooked
from mechsteer.batches import Grid
from mechsteer.costs import BatchSize, counted
from mechsteer.engine import Engine
from mechsteer.plan import DEVICES, Device, Plan
from mechsteer.plan.devices import Table
from mechsteer.plan.kernels import Pass
from mechsteer.plan.pieces import Prompts, _batches
from mechsteer.prefix import optimise_soft_prefix, search_prefix
from mechsteer.rows import Rows
from mechsteer.vocabulary import insert

SHAPE = ms.Shape(3, 48, 4, 2, 16, 80, 96, context=64, name="tiny")


@pytest.fixture(scope="module")
def model() -> ms.Model:
    return ms.Model(random_hooked(SHAPE.dims, device="cpu", dtype=torch.float32, n_ctx=64, name="tiny"), name="tiny")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 96, shape, generator=torch.Generator().manual_seed(seed))


def flops(result: ms.Result) -> float:
    return float(result.provenance["options"]["flops"])


def test_the_shape_of_a_model_is_that_of_its_numbers(model: ms.Model) -> None:
    assert ms.Shape.of(model).dims == SHAPE.dims == model.decoder.dims
    matrices = [each for each in model.hooked.parameters() if each.ndim > 1]
    biases = sum(each.numel() for name, each in model.hooked.named_parameters() if "b_" in name and each.ndim > 1)
    assert SHAPE.parameters == sum(each.numel() for each in matrices) - biases


@pytest.mark.parametrize("seed", range(6))
def test_a_planned_pack_counts_what_a_real_one_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(20):
        n_prompts, stop = drawn(1, 5), drawn(6, 30)
        starts = [(drawn(0, stop), drawn(1, 6)) for _ in range(drawn(1, 5))]
        read = sorted({drawn(0, stop) for _ in range(drawn(1, 5))} | {stop - 1})
        prompts = ms.Prompts.from_ids(tokens(n_prompts, stop, seed=seed))
        cells = torch.tensor([start for start, n in starts for _ in range(n)])
        mask = torch.zeros(n_prompts, len(cells), stop, dtype=torch.bool)
        mask[..., read] = True
        start = cells.expand(n_prompts, -1).contiguous()
        pack = Pack(lambda e, p, c, on=prompts: Rows(on, e, p, c), start, torch.full_like(start, stop), mask)
        assert pack.counts() == counted(starts, stop, read, n_prompts)
        # Where attention is computed in buckets, their rectangles are what is counted.
        counts = pack.counts(own=True)
        for queries, pairs in ((pack.all, counts.pairs), (pack.last, counts.last_pairs)):
            assert sum(each.n_items * each.width for each in pack.buckets(queries)) * counts.n_keys == pairs
            for each in pack.buckets(queries):
                # No wider than its widest item, and each row stands in it once.
                padded = each.pad(torch.ones(len(queries.item), 1, 1))
                assert each.width == int(padded.sum((1, 2, 3)).max())
            rows = torch.arange(1.0, len(queries.item) + 1).view(-1, 1, 1)
            assert sum(float(each.pad(rows).sum()) for each in pack.buckets(queries)) == float(rows.sum())


@pytest.mark.parametrize(
    ("axes", "options", "build"),
    [
        (
            {"layer": 3, "pos": 12}, {},
            lambda layer, pos: ms.Scale(ms.Site("resid_pre", layer, pos=pos), 0.5),
        ),
        (
            {"layer": 3, "head": 4}, {"kind": "z"},
            lambda layer, head: ms.Scale(ms.Site("z", layer, head=head), 0.5),
        ),
        (
            {"layer": 3, "alpha": 9}, {"kind": "resid_post", "completion": 5},
            lambda layer, alpha: ms.Scale(ms.Site("resid_post", layer), 0.1 * alpha),
        ),
        ({"alpha": 40}, {"kind": "mlp_out", "at": "last"}, lambda alpha: ms.Scale(("mlp_out", 1), 0.1 * alpha, at=-1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [64, 300])
def test_operations_of_a_sweep_are_those_that_the_engine_counts(
    model: ms.Model, axes: dict[str, int], options: dict[str, Any], build: Any, rows: int
) -> None:
    completion = options.get("completion", 0)
    prompts = ms.Prompts.from_ids(
        tokens(7, 12), completions=tokens(7, completion, seed=1).tolist() if completion else None
    )
    measure = ms.TeacherForcedCE() if completion else ms.LogitGap([5], [9])
    done = ms.sweep(
        model, prompts, axes={name: range(n) for name, n in axes.items()}, build=build, measure=measure, rows=rows,
        progress=False,
    )  # fmt: skip
    plan = ms.plan_sweep(SHAPE, axes=axes, prompts=7, positions=12, rows=rows, **options)
    assert plan.flops == pytest.approx(flops(done), rel=0.01)


@pytest.mark.parametrize("rows", [40, 200, 1000])
def test_batches_of_a_plan_are_those_of_the_engine(model: ms.Model, rows: int) -> None:
    prompts = ms.Prompts.from_ids(tokens(3, 12))
    cells = [(ms.Scale(ms.Site("resid_pre", 1, pos=pos), 0.5),) for pos in range(12) for _ in range(5)]
    grid = Grid(Engine(model, prompts, {"gap": ms.LogitGap([5], [9])}), cells)
    made = grid.batches(np.zeros((len(cells), 3), dtype=bool), rows)
    plan = ms.plan_sweep(SHAPE, axes={"pos": 12, "alpha": 5}, layer=1, prompts=3, positions=12, rows=rows)
    assert plan.stages[0].batches == len(made) + 1  # and the clean pass
    planned = _batches(SHAPE.dims, [(pos, 5) for pos in range(12)], Prompts.of(3, 12), 3, BatchSize(rows, fixed=True))
    sizes = [sum(n for _, n in starts) for starts, many in planned for _ in range(many)]
    assert sizes == [len(batch.places) for batch in made]


def test_a_plan_looks_for_the_batch_size_as_the_engine_does() -> None:
    grid: dict[str, Any] = {"axes": {"alpha": 400}, "prompts": 8, "positions": 12}
    # Where only batches cost, larger ones are faster, and are doubled after each of the first ones.
    host = Device("host", "cpu", {"float32": 1e15}, 1e15, 1e12, layer_seconds=0.0, batch_seconds=1.0)
    assert ms.plan_sweep(SHAPE, **grid, device=host).stages[0].batches == 1 + 6  # 10, 21, 42, 85, 170 cells, the rest
    # Where nothing but operations cost, the first size is as good as any.
    plain = Device("plain", "cpu", {"float32": 1e9}, 1e15, 1e12, layer_seconds=0.0, batch_seconds=0.0)
    fixed = ms.plan_sweep(SHAPE, **grid, device=plain, rows=1024)
    found = ms.plan_sweep(SHAPE, **grid, device=plain)
    assert fixed.stages[0].batches == 41 and 20 < found.stages[0].batches < 90
    assert found.flops == fixed.flops
    # Workers share batches of one size.
    assert ms.plan_sweep(SHAPE, **grid, device=host, workers=2).stages[0].batches == 41


def test_a_pass_has_one_kind_and_its_own_seconds() -> None:
    read = [10, 11]
    plain, past, ragged = (
        counted(starts, 12, read, 3) for starts in ([(0, 9)], [(4, 9)], [(at, 1) for at in range(9)])
    )
    made = [Pass(each) for each in (plain, past, ragged)] + [Pass(past, backward=True)]
    assert [each.kind for each in made] == ["plain", "past", "ragged", "back"]
    # What is computed in groups of like width is.
    pack = Pack(
        lambda example, position, cell: Rows(ms.Prompts.from_ids(tokens(3, 12)), example, position, cell),
        torch.arange(9).expand(3, 9), torch.full((3, 9), 12), None,
    )  # fmt: skip
    assert len(pack.buckets(pack.all)) > 1

    times = {"plain": 1.0, "past": 2.0, "ragged": 3.0, "back": 4.0}
    slower = {kind: Table([1e-6, 1e-3], [1.0], [[each], [each]]) for kind, each in times.items()}
    device = Device(
        "table", "cpu", {"float32": 1e9}, 1e15, 1e12, layer_seconds=1.0, batch_seconds=0.0, layer_times=times,
        engine=slower,
    )  # fmt: skip
    for each in made:
        # Three layers, and kernels of 0.1 s.
        expected = 3 * times[each.kind] + 0.1 * times[each.kind]
        assert device.time(0.1, each.layers(SHAPE.dims), kind=each.kind) == pytest.approx(expected)
    # Cells behind the last layer run none.
    axes = {"layer": 3, "alpha": 2}
    assert ms.plan_sweep(SHAPE, axes=axes, kind="resid_post", prompts=3, positions=12, device=device).seconds > 0


def test_operations_of_a_prefix_search_are_those_that_it_counts(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(tokens(6, 10), completions=tokens(6, 8, seed=1).tolist())
    slotted = insert(prompts, where="prefix", slots=4)
    options = {"tokens": 4, "prompts": 6, "positions": 10, "before": 0, "completion": 8, "beam": 0, "restarts": 2}
    soft = optimise_soft_prefix(
        model, slotted, ms.TeacherForcedCE(), n_restarts=2, steps=5, patience=None, progress=False
    )
    plan = ms.plan_prefix(SHAPE, steps=5, evaluations=128, method="gcg", width=32, **options)
    assert plan.stages[0].flops == pytest.approx(flops(soft.history), rel=0.01)
    found = search_prefix(model, slotted, ms.TeacherForcedCE(), method="gcg", evaluations=128, width=32, progress=False)
    # Which slots candidates differ in is drawn: a plan has their mean.
    assert plan.stages[1].flops == pytest.approx(flops(found.trajectory), rel=0.1)


def test_the_engine_counts_what_pytorch_counts(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(tokens(4, 16))
    engine = Engine(model, prompts, {"gap": ms.LogitGap([5], [9])})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        engine.clean(torch.arange(4), [0], logits=True)
    assert engine.work.done == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_engine_counts_gradients_as_pytorch_does(model: ms.Model) -> None:
    from mechsteer.prefix.candidates import CandidateLosses

    prompts = ms.Prompts.from_ids(tokens(4, 12), completions=tokens(4, 8, seed=1).tolist())
    losses = CandidateLosses(model, insert(prompts, where="prefix", slots=4), ms.TeacherForcedCE())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses.gradient((5, 6, 7, 8))
    assert losses.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("alphas", [4, 40])
def test_the_memory_of_a_plan_is_that_which_the_engine_announces(model: ms.Model, alphas: int) -> None:
    prompts = ms.Prompts.from_ids(tokens(7, 12))
    engine = Engine(model, prompts, {"gap": ms.LogitGap([5], [9])})
    plan = ms.plan_sweep(
        model, axes={"alpha": alphas}, kind="resid_post", prompts=7, positions=12, rows=7 * 12 * alphas
    )
    assert plan.memory == pytest.approx(engine.memory([4], rows=7 * 12 * alphas, chunk=4096).total, rel=0.1)


def test_kernels_share_out_the_operations_of_a_pass() -> None:
    from mechsteer.costs import pass_flops

    counts = counted([(2, 5), (7, 1)], 12, [10, 11], 3)
    for first in range(3):
        for from_mlp in (False, True):
            one = Pass(counts, first, from_mlp, logits=6)
            expected = pass_flops(SHAPE.dims, counts, first=first, from_mlp=from_mlp) + 6 * SHAPE.dims.unembed_flops
            assert one.flops(SHAPE.dims) == pytest.approx(expected)


# ---- what a plan says ----

NINE_B = "layers=42,d_model=3584,heads=16,kv_heads=8,d_head=256,d_mlp=14336,vocab=256000,tied=true,dtype=bfloat16"


def test_a_plan_of_a_large_model_is_made_in_a_moment() -> None:
    # In a process of its own: here every call is checked, which takes ten times as long.
    code = f"""
import sys, time
import mechsteer as ms
ms.plan_sweep, ms.plan_prefix
began = time.process_time()
ms.plan_sweep({NINE_B!r}, axes={{"layer": 42, "pos": 256}}, prompts=1000, positions=256, workers=8)
ms.plan_prefix({NINE_B!r}, prompts=100, positions=64)
sys.exit(time.process_time() - began > 2 or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_plan_of_a_large_model_counts_all_of_it() -> None:
    plan = ms.plan_sweep(NINE_B, axes={"layer": 42, "pos": 8}, prompts=1000, positions=8, workers=8, device="h200")
    assert 8e9 < plan.shape.parameters < 10e9
    assert plan.flops > 1000 * 42 * 8 * plan.shape.parameters
    assert plan.gpu_hours == pytest.approx(8 * plan.seconds / 3600) and plan.fits


def test_more_work_costs_more_and_more_workers_take_less_time() -> None:
    def plan(**more: Any) -> Plan:
        options: dict[str, Any] = {"axes": {"layer": 12, "alpha": 41}, "prompts": 64, "positions": 32, "device": "l4"}
        return ms.plan_sweep("layers=12,d_model=768,heads=12,vocab=50257", **options | more)

    base = plan()
    for more in ({"prompts": 128}, {"positions": 64}, {"axes": {"layer": 12, "alpha": 82}}, {"completion": 20}):
        assert plan(**more).flops > 1.5 * base.flops
    # Twice the prompts are twice the work.
    assert plan(prompts=128).flops == pytest.approx(2 * base.flops)
    assert plan(positions=64).flops > 1.9 * base.flops
    many = plan(workers=4)
    assert base.seconds / 4 <= many.seconds < base.seconds and many.gpu_hours >= base.gpu_hours
    assert plan(device="h100").seconds < base.seconds
    assert plan(dtype="bfloat16").memory < base.memory and plan(dtype="bfloat16").seconds < base.seconds


def test_a_plan_says_where_memory_does_not_suffice() -> None:
    plan = ms.plan_sweep(NINE_B, axes={"alpha": 8}, device="rtx4090")
    assert not plan.fits and plan.memory > 24e9


def test_a_study_has_a_stage_for_each_chapter() -> None:
    plan = ms.plan_study("pocket")
    names = ["completions", "behaviour", "entry", "travel", "vector", "strength", "features", "words", "together"]
    assert [stage.name for stage in plan.stages] == names
    assert all(stage.flops > 0 and stage.seconds > 0 for stage in plan.stages)
    assert plan.seconds == pytest.approx(sum(stage.seconds for stage in plan.stages))
    notes = {stage.name: stage.note for stage in plan.stages}
    assert "took 2.2 x as long as predicted" in notes["travel"] and not notes["vector"]
    other = ms.plan_study(NINE_B, chapters=["vector", "features"])
    assert [stage.name for stage in other.stages] == ["completions", "vector", "features"]
    assert other.stages[2].flops == 0 and "no autoencoder ships" in other.stages[2].note


def test_a_plan_shows_itself() -> None:
    plan = ms.plan_sweep("pocket", axes={"layer": 6, "pos": 16}, prompts=20, positions=16)
    assert "sweep of layer 6 x pos 16" in repr(plan) and "device-hours" in repr(plan)
    assert "published peaks" in plan._repr_html_()
    assert json.loads(json.dumps(plan.as_json()))["stages"][0]["flops"] == plan.flops
    assert len(plan.rows()) == 1 and len(ms.plan_prefix("pocket").rows()) == 4


def test_peaks_are_in_order() -> None:
    for each in DEVICES.values():
        peak = each.peak
        assert peak["bfloat16"] >= peak["tf32"] >= peak["float32"] >= peak["float64"] and not each.measured


def test_the_model_that_ships_has_the_shape_of_its_config() -> None:
    assert ms.Shape.of("pocket").dims == ms.Shape.of(cases.model("pocket")).dims
