"""`sweep` gives the numbers of one forward pass per cell, whatever it stacks, skips and reuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mechsteer as ms
from mechsteer import costs
from mechsteer import engine as engine_module

LENGTHS = (12, 20, 16)
# Kinds that exist on both backends and on every architecture of the zoo.
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post", "q", "k", "v", "z", "pattern")
_MODELS: dict[tuple[str, str], ms.Model] = {}


@pytest.fixture(params=["hooked_transformer", "bridge"])
def model(request: pytest.FixtureRequest, architecture: str, zoo_folders: dict[str, Path]) -> ms.Model:
    return loaded(architecture, request.param, zoo_folders)


@pytest.fixture
def llama(zoo_folders: dict[str, Path]) -> ms.Model:
    return loaded("llama", "hooked_transformer", zoo_folders)


def loaded(architecture: str, backend: str, folders: dict[str, Path]) -> ms.Model:
    key = (architecture, backend)
    if key not in _MODELS:
        _MODELS[key] = ms.load_model(folders[architecture], backend=backend)
    return _MODELS[key]


def random_ids(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [zoo.prompts(batch=1, n_pos=n, seed=seed + n)[0].tolist() for n in lengths]


def corrupted(ids: list[list[int]]) -> list[list[int]]:
    return [[(7 * token) % 100 + 5 for token in row] for row in ids]


def random_vector(model: ms.Model, seed: int = 0, kind: str = "resid_post") -> torch.Tensor:
    width = model.width(ms.Site(kind, 0))
    assert width is not None
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def compare(
    model: ms.Model, prompts: Any, axes: dict[str, Any], build: Callable[..., Any], *measures: ms.Objective
) -> None:
    wanted = measures or (ms.LogitGap([5, 6], [7, 9]),)
    named = {f"m{index}": measure for index, measure in enumerate(wanted)}
    result = ms.sweep(model, prompts, axes=axes, build=build, measure=named, progress=False)
    naive.assert_same(result, naive.sweep(model, prompts, axes, build, named))


def some(kinds: tuple[str, ...], model: ms.Model, architecture: str) -> tuple[str, ...]:
    """All of them on a HookedTransformer. On a bridge, whose naive twin takes long, every third: each kind is there on
    two architectures, and each architecture has its weights read through a bridge."""
    return kinds if model.backend != "bridge" else kinds[zoo.ARCHITECTURES.index(architecture) % 3 :: 3]


def test_patching_every_kind_of_site_on_every_architecture_and_backend(model: ms.Model, architecture: str) -> None:
    ids = random_ids(0)
    prompts = ms.Prompts.from_ids(ids)
    kinds = some(KINDS, model, architecture)
    source = model.run(ms.Prompts.from_ids(corrupted(ids)), record=kinds).activations
    for kind in kinds:
        result = ms.sweep(
            model,
            prompts,
            axes={"layer": range(zoo.N_LAYERS), "pos": [0, 3, -1]},
            build=lambda layer, pos, kind=kind: ms.Replace(ms.Site(kind, layer, pos=pos), source),
            measure=ms.LogitGap([5, 6], [7, 9]),
        )
        assert result.provenance["options"]["engine"] == "packed"
        expected = naive.sweep(
            model,
            prompts,
            {"layer": range(zoo.N_LAYERS), "pos": [0, 3, -1]},
            lambda layer, pos, kind=kind: ms.Replace(ms.Site(kind, layer, pos=pos), source),
            {"logit_gap": ms.LogitGap([5, 6], [7, 9])},
        )
        naive.assert_same(result, expected)
        # Some cell does something, or the comparison would be empty.
        assert float(expected["logit_gap"].std((0, 1)).max()) > 1e-3


def test_cells_of_unlike_heads_are_stacked(model: ms.Model, architecture: str) -> None:
    ids = random_ids(1)
    prompts = ms.Prompts.from_ids(ids)
    kinds = some(("q", "k", "v", "z", "pattern"), model, architecture)
    source = model.run(ms.Prompts.from_ids(corrupted(ids)), record=kinds, logits="none").activations
    for kind in kinds:
        heads = zoo.N_HEADS
        if kind in ("k", "v") and model.cfg.n_key_value_heads:
            heads = model.cfg.n_key_value_heads

        def build(layer: int, head: int, kind: str = kind) -> ms.Intervention:
            return ms.Replace(ms.Site(kind, layer, head=head), source)

        compare(model, prompts, {"layer": range(zoo.N_LAYERS), "head": range(heads)}, build)


def test_steering_ablating_and_scaling(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(2))
    vector, other = random_vector(model, 1), random_vector(model, 2)
    axes = {"layer": range(zoo.N_LAYERS), "alpha": [-3.0, 0.0, 0.5, 8.0]}
    compare(model, prompts, axes, lambda layer, alpha: ms.Add(vector, alpha, site=("resid_post", layer)))
    compare(model, prompts, axes, lambda layer, alpha: ms.Add(vector, alpha, site=("resid_pre", layer), at=-1))
    compare(model, prompts, axes, lambda layer, alpha: ms.Scale(("attn_out", layer), alpha, at=[1, 5]))
    subspace = torch.stack([vector, other])
    compare(
        model, prompts, {"layer": range(zoo.N_LAYERS)}, lambda layer: ms.Ablate(subspace, site=("resid_mid", layer))
    )
    compare(model, prompts, {"which": [0, 1]}, lambda which: ms.Ablate((vector, other)[which], everywhere=True))


def test_soft_prefixes_in_slots(llama: ms.Model) -> None:
    ids = random_ids(3)
    prompts = ms.Prompts.from_ids(ids)
    slots = torch.zeros_like(prompts.mask)
    slots[:, 2:5] = True
    prompts = ms.Prompts(prompts.tokens, prompts.mask, prompts.roles, slots)
    embeddings = [torch.randn(3, zoo.D_MODEL, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    compare(llama, prompts, {"which": range(4)}, lambda which: ms.SoftPrefix(embeddings[which]))


def test_double_precision_agrees_to_double_precision(architecture: str, zoo_folders: dict[str, Path]) -> None:
    model = ms.load_model(zoo_folders[architecture], dtype=torch.float64)
    ids = random_ids(16)
    source = model.run(ms.Prompts.from_ids(corrupted(ids)), record=["resid_pre", "z"]).activations
    places: dict[str, int | None] = {"0": 0, "5": 5, "last": -1, "all": None}
    for kind in ("resid_pre", "z"):

        def build(layer: int, pos: str, kind: str = kind) -> ms.Intervention:
            return ms.Replace((kind, layer), source, at=places[pos])

        axes = {"layer": range(3), "pos": list(places)}
        gap = {"gap": ms.LogitGap([5], [7])}
        result = ms.sweep(model, ms.Prompts.from_ids(ids), axes=axes, build=build, measure=gap)
        assert result["gap"].dtype == np.float64 and result.provenance["options"]["engine"] == "packed"
        naive.assert_same(result, naive.sweep(model, ms.Prompts.from_ids(ids), axes, build, gap), tolerance=1e-11)


def test_several_interventions_in_their_order(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(4))
    vector = random_vector(model, 3)

    def build(layer: int, alpha: float) -> list[ms.Intervention]:
        site = ("resid_pre", layer)
        return [
            ms.Add(vector, alpha, site=site, at=2),
            ms.Scale(site, -0.5, at=2),
            ms.Scale(("z", 2), 2.0, at=[0, 4]),
            ms.Ablate(vector, site=("resid_post", 1)),
        ]

    compare(model, prompts, {"layer": [0, 1, 2], "alpha": [1.0, -2.0]}, build)


def objectives(model: ms.Model, prompts: ms.Prompts) -> list[ms.Objective]:
    baseline = model.run(prompts, record=[("resid_post", 1), ("resid_post", 2)])
    return [
        ms.LogitGap([5], [7, 9], reduce="logsumexp"),
        ms.TokenProb([5, 6]),
        ms.TeacherForcedCE(first=3),
        ms.KLFromBaseline(baseline, where="completion"),
        ms.StateMatch(baseline.activations, ("resid_post", 2), at="all"),
        ms.StateMatch(baseline.activations, ("resid_post", 1), at="decision", measure="mse"),
        ms.LogitGap([5], [7]) - 0.1 * ms.KLFromBaseline(baseline),
    ]


def test_every_objective_and_what_it_reads(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(5), completions=random_ids(6, (5, 3, 7)))
    vector = random_vector(model, 4)
    axes = {"layer": range(zoo.N_LAYERS), "pos": [0, 11, -1]}
    compare(
        model,
        prompts,
        axes,
        lambda layer, pos: ms.Add(vector, 3.0, site=("resid_post", layer), at=pos),
        *objectives(model, prompts),
    )
    # Completions: the last token is never read as an input by the cross entropy.
    compare(
        model,
        prompts,
        {"layer": [0, 2]},
        lambda layer: ms.Scale(("mlp_out", layer), 0.0, at="completion"),
        ms.TeacherForcedCE(),
    )


def test_cells_that_touch_nothing_that_is_read(llama: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(7), completions=random_ids(8, (4, 4, 4)))
    # The completion's tokens come after the decision, so that nothing needs to be computed.
    compare(llama, prompts, {"layer": [0, 1]}, lambda layer: ms.Scale(("resid_pre", layer), 3.0, at="completion"))
    compare(llama, prompts, {"x": [0, 1]}, lambda x: None)
    compare(llama, prompts, {"x": [0, 1]}, lambda x: () if x else ms.Scale(("resid_pre", 1), 3.0))


def test_a_span_that_only_some_prompts_have(llama: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(9))
    roles = prompts.roles.clone()
    roles[1, 4:9] = ms.Prompts.from_ids([[5]], completions=[[5]]).roles[0, 1] * 0 + 1
    marked = ms.Prompts(prompts.tokens, prompts.mask, roles, prompts.slots)
    compare(llama, marked, {"layer": [0, 1, 2]}, lambda layer: ms.Scale(("resid_pre", layer), 3.0, at="prefix"))


def test_left_padding_gives_the_same_numbers(llama: ms.Model) -> None:
    ids = random_ids(10)
    source = llama.run(ms.Prompts.from_ids(corrupted(ids), padding="left"), record=["resid_pre", "pattern"]).activations
    for kind in ("resid_pre", "pattern"):
        axes = {"layer": range(3), "pos": [1, -2]}

        def build(layer: int, pos: int, kind: str = kind) -> ms.Intervention:
            return ms.Replace(ms.Site(kind, layer, pos=pos), source)

        gap = {"gap": ms.LogitGap([5], [7])}
        right = naive.sweep(llama, ms.Prompts.from_ids(ids), axes, build, gap)
        for padding in ("left", "right"):
            prompts = ms.Prompts.from_ids(ids, padding=padding)
            naive.assert_same(ms.sweep(llama, prompts, axes=axes, build=build, measure=gap), right)


def test_per_example_alphas(llama: ms.Model) -> None:
    vector = random_vector(llama, 5)
    alphas = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.3, 4.0, -1.0])]
    compare(
        llama,
        ms.Prompts.from_ids(random_ids(11)),
        {"which": [0, 1]},
        lambda which: ms.Add(vector, alphas[which], site=("resid_post", 1)),
    )


@st.composite
def interventions(draw: Any) -> Callable[[ms.Model, ms.Activations, int], ms.Intervention]:
    """An intervention at a random site and positions, as a function of (model, source, seed)."""
    kind = draw(st.sampled_from(KINDS))
    layer = draw(st.integers(0, zoo.N_LAYERS - 1))
    at = draw(st.sampled_from([None, 0, 3, 11, -1, (0, 7), (-2, 1), "user"]))
    what = draw(st.sampled_from(["replace", "scale", "add"]))
    head = draw(st.sampled_from([None, 0, 1])) if kind in ("q", "k", "v", "z", "pattern") else None
    alpha = draw(st.floats(-4, 4, allow_nan=False))

    def make(model: ms.Model, source: ms.Activations, seed: int) -> ms.Intervention:
        site = ms.Site(kind, layer, head=head)
        if what == "replace":
            return ms.Replace(site, source, at=at)
        if what == "scale" or kind == "pattern":
            return ms.Scale(site, alpha, at=at)
        return ms.Add(random_vector(model, seed, kind), alpha, site=site, at=at)

    return make


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_cells(data: Any, zoo_folders: dict[str, Path]) -> None:
    architecture = data.draw(st.sampled_from(zoo.ARCHITECTURES))
    backend = data.draw(st.sampled_from(["hooked_transformer", "bridge"]))
    model = loaded(architecture, backend, zoo_folders)
    lengths = tuple(data.draw(st.lists(st.integers(12, 24), min_size=1, max_size=4)))
    ids = random_ids(data.draw(st.integers(0, 99)), lengths)
    padding = data.draw(st.sampled_from(["left", "right"]))
    source = model.run(ms.Prompts.from_ids(corrupted(ids)), record=KINDS, logits="none").activations
    makers = data.draw(st.lists(interventions(), min_size=1, max_size=4))
    cells = [tuple(make(model, source, seed) for seed in range(1)) for make in makers]
    cells.append(tuple(make(model, source, 7) for make in makers[:2]))
    axes = {"cell": range(len(cells))}
    gap = {"gap": ms.LogitGap([5, 6], [7, 9])}
    prompts = ms.Prompts.from_ids(ids, padding=padding)
    rows = data.draw(st.sampled_from([1, 30, 1000]))
    result = ms.sweep(model, prompts, axes=axes, build=lambda cell: cells[cell], measure=gap, rows=rows, progress=False)
    naive.assert_same(result, naive.sweep(model, prompts, axes, lambda cell: cells[cell], gap))


def test_the_pocket_model_and_a_pretrained_one() -> None:
    folders = ["pocket", "pocket-1l"]
    shared = Path(__file__).parents[3] / "shared/models/stories260K"
    for name in [*folders, *([shared] if shared.exists() else [])]:
        model = ms.load_model(name)
        tokens = torch.randint(4, model.d_vocab, (3, 24), generator=torch.Generator().manual_seed(0))
        source = model.run(tokens.flip(1), record="resid_pre", logits="none").activations
        axes = {"layer": range(model.n_layers), "pos": range(0, 24, 5)}
        compare(
            model,
            tokens,
            axes,
            lambda layer, pos, source=source: ms.Replace(ms.Site("resid_pre", layer, pos=pos), source),
            ms.LogitGap([5], [9]),
            ms.TokenProb([5]),
        )


# ---- what the packed forward pass does not cover ----


def test_sites_and_architectures_beyond_the_packed_pass_take_hooks(llama: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(12))
    axes = {"layer": range(3), "factor": [0.5, -1.0]}
    build: Callable[..., ms.Intervention] = lambda layer, factor: ms.Scale(("ln1_normalized", layer), factor, at=3)  # noqa: E731
    gap = {"gap": ms.LogitGap([5], [7])}
    result = ms.sweep(llama, prompts, axes=axes, build=build, measure=gap)
    assert result.provenance["options"]["engine"] == "hooks"
    naive.assert_same(result, naive.sweep(llama, prompts, axes, build, gap))


def test_an_architecture_with_parallel_attention_takes_hooks() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_mlp=32, d_vocab=50, act_fn="gelu", seed=1,
        normalization_type="LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4,
        model_name="parallel", device="cpu",
    )  # fmt: skip
    model = ms.Model(HookedTransformer(cfg))
    assert model.decoder is None
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    source = model.run(tokens.flip(1), record="resid_pre").activations
    axes = {"layer": [0, 1], "pos": [0, 5]}
    build: Callable[..., ms.Intervention] = lambda layer, pos: ms.Replace(ms.Site("resid_pre", layer, pos=pos), source)  # noqa: E731
    result = ms.sweep(model, tokens, axes=axes, build=build, measure={"gap": ms.LogitGap([5], [7])})
    assert result.provenance["options"]["engine"] == "hooks"
    naive.assert_same(result, naive.sweep(model, tokens, axes, build, {"gap": ms.LogitGap([5], [7])}))


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("architecture", zoo.PARTLY_ROTARY)
def test_heads_that_are_rotated_in_part(architecture: str, backend: str, precise: Callable[..., ms.Model]) -> None:
    model = precise(architecture, backend)
    # Attention and MLP side by side have no resid_mid, which the packed pass goes by: these take hooks.
    assert (model.decoder is None) == (architecture != "neox_sequential")
    deaf = (architecture, backend) == ("gptj", "bridge")
    check_rotation(model, *([] if deaf else ["pattern"]))
    if deaf:
        # TransformerLens does not use what a hook returns for GPT-J's pattern: the logits are those of no intervention.
        ids = torch.tensor(random_ids(5)[:1])
        hook = ("blocks.0.attn.hook_pattern", lambda tensor, hook: 0 * tensor)
        torch.testing.assert_close(
            model.hooked.run_with_hooks(ids, fwd_hooks=[hook]), model.hooked(ids), atol=0, rtol=0
        )
        for kind in ("pattern", "attn_scores"):
            assert model.run(ids, record=kind).activations
            with pytest.raises(ms.MechsteerError, match=r"can be recorded but not changed.*intervene at z"):
                model.run(ids, [ms.Scale(ms.Site(kind, 0), 0.0)])
        with pytest.raises(ms.MechsteerError, match="can be recorded but not changed"):
            ms.attribution_patching(model, ids, ids.flip(1), measure=ms.LogitGap([5], [7]), sites="pattern")


def check_rotation(model: ms.Model, *more: str) -> None:
    """Queries and keys, edited before their rotation, are those of TransformerLens; in fp64 that is sharp."""
    # transformers, which a bridge runs, computes angles in fp32.
    ids, tolerance = random_ids(17), 1e-10 if model.backend == "hooked_transformer" else 1e-6
    prompts = ms.Prompts.from_ids(ids)
    if model.decoder is not None:
        tokens = torch.tensor([ids[0]])
        with torch.no_grad():
            torch.testing.assert_close(model.decoder.whole(tokens), model.hooked(tokens), atol=tolerance, rtol=0)
    kinds = ("q", "k", "z", "resid_pre", *more)
    source = model.run(ms.Prompts.from_ids(corrupted(ids)), record=kinds).activations
    gap = {"gap": ms.LogitGap([5, 6], [7, 9])}
    for kind in kinds:
        axes = {"layer": range(model.n_layers), "pos": [0, 3, -1]}
        build: Callable[..., ms.Intervention] = lambda layer, pos, kind=kind: ms.Replace(  # noqa: E731
            ms.Site(kind, layer, pos=pos), source
        )
        result = ms.sweep(model, prompts, axes=axes, build=build, measure=gap, progress=False)
        assert result.provenance["options"]["engine"] == ("hooks" if model.decoder is None else "packed")
        expected = naive.sweep(model, prompts, axes, build, gap)
        naive.assert_same(result, expected, tolerance=tolerance)
        assert float(expected["gap"].std((0, 1)).max()) > 1e-3


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("adjacent", [True, False])
def test_adjacent_and_split_pairs_of_a_rotation(adjacent: bool, rotary_dim: int) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=64, d_vocab=128, act_fn="gelu_new", seed=1,
        normalization_type="LN", positional_embedding_type="rotary", rotary_dim=rotary_dim,
        rotary_adjacent_pairs=adjacent, model_name="turned", device="cpu", dtype=torch.float64,
    )  # fmt: skip
    model = ms.Model(HookedTransformer(cfg))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.hooked.parameters():  # as large as the zoo's, so that a wrong angle shows
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    assert model.decoder is not None
    check_rotation(model, "pattern")


def test_weights_that_changed_are_seen(zoo_folders: dict[str, Path]) -> None:
    model = ms.load_model(zoo_folders["llama"])
    prompts = ms.Prompts.from_ids(random_ids(13))
    compare(model, prompts, {"layer": [0, 2]}, lambda layer: ms.Scale(("resid_pre", layer), 2.0, at=3))
    with torch.no_grad():
        model.hooked.blocks[1].mlp.W_out.data.mul_(1.5)
    compare(model, prompts, {"layer": [0, 2]}, lambda layer: ms.Scale(("resid_pre", layer), 2.0, at=3))


def test_a_packed_pass_that_disagrees_is_not_used(
    zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechsteer.backends import decoder

    monkeypatch.setitem(decoder._ACTIVATIONS, "silu", torch.nn.functional.relu)
    model = ms.load_model(zoo_folders["llama"])
    with pytest.warns(UserWarning, match="packed forward pass differs by .* and is not used"):
        assert model.decoder is None


# ---- batches, memory, and finished work ----


def scale_at_three(layer: int, factor: float) -> ms.Intervention:
    return ms.Scale(("resid_pre", layer), factor, at=3)


AXES = {"layer": range(3), "factor": [0.0, 0.5, 2.0, -1.0]}
GAP = {"gap": ms.LogitGap([5], [7])}


@pytest.fixture
def expected(llama: ms.Model) -> dict[str, torch.Tensor]:
    return naive.sweep(llama, ms.Prompts.from_ids(random_ids(14)), AXES, scale_at_three, GAP)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of cells in each batch that the engine computed."""
    counts: list[int] = []
    real = engine_module.Engine.batch

    def counted(self: Any, cells: Any, *more: Any) -> Any:
        counts.append(len(cells))
        return real(self, cells, *more)

    monkeypatch.setattr(engine_module.Engine, "batch", counted)
    return counts


def run_sweep(model: ms.Model, **options: Any) -> ms.Result:
    prompts = ms.Prompts.from_ids(random_ids(14))
    return ms.sweep(model, prompts, axes=AXES, build=scale_at_three, measure=GAP, progress=False, **options)


def test_batch_sizes_do_not_matter(llama: ms.Model, expected: Any, batches: list[int]) -> None:
    for rows, largest in ((1, 1), (100, 2), (10_000, 4)):
        batches.clear()
        naive.assert_same(run_sweep(llama, rows=rows), expected)
        assert max(batches) == largest and sum(batches) == 12


def test_batches_halve_when_memory_runs_out(llama: ms.Model, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = engine_module.Engine.batch

    def small_memory(self: Any, cells: Any, *more: Any) -> Any:
        sizes.append(len(cells))
        if len(cells) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, cells, *more)

    monkeypatch.setattr(engine_module.Engine, "batch", small_memory)
    naive.assert_same(run_sweep(llama, rows=10_000), expected)
    assert sizes[0] == 4 and sizes.count(1) == 12

    def no_memory(self: Any, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module.Engine, "batch", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run_sweep(llama)


def test_the_size_of_batches_is_searched_by_speed() -> None:
    size = costs.BatchSize(1024)
    # 2048 is the fastest: 1 us an operation there, 2 us elsewhere.
    for _ in range(12):
        size.report(size.rows, 1000.0, 1000e-6 if size.rows == 2048 else 2000e-6)
    assert size.rows == 2048
    size = costs.BatchSize(1024)
    for _ in range(12):
        size.report(size.rows, 1000.0, 1e-9 * size.rows)
    assert size.rows < 1024


def test_finished_work_is_kept_and_not_done_again(
    llama: ms.Model, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    folder = tmp_path / "sweep"
    done = 0
    real = engine_module.Engine.batch

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal done
        if done == 5:
            raise KeyboardInterrupt
        done += 1
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module.Engine, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(llama, out=folder, rows=1)
    assert [path.name for path in sorted(folder.iterdir())] == ["manifest.json", "shard-00000.safetensors"]
    batches.clear()
    result = run_sweep(llama, out=folder, rows=1)
    assert sum(batches) == 12 - 5
    naive.assert_same(result, expected)
    batches.clear()
    again = run_sweep(llama, out=folder)
    assert batches == []
    assert np.array_equal(again["gap"].values, result["gap"].values)
    assert np.array_equal(ms.Result.load(folder / "result.safetensors")["gap"].values, result["gap"].values)


def test_another_sweep_in_the_folder_is_refused(llama: ms.Model, zoo_folders: dict[str, Path], tmp_path: Path) -> None:
    run_sweep(llama, out=tmp_path / "sweep")
    prompts = ms.Prompts.from_ids(random_ids(14))
    others: list[dict[str, Any]] = [
        {"axes": {**AXES, "factor": [0.0, 0.5, 2.0, -2.0]}},
        {"build": lambda layer, factor: ms.Scale(("resid_pre", layer), factor, at=4)},
        {"measure": {"gap": ms.LogitGap([5], [8])}},
        {"prompts": ms.Prompts.from_ids(random_ids(15))},
        {"model": ms.load_model(zoo_folders["mistral"])},
    ]
    for other in others:
        options = {"axes": AXES, "build": scale_at_three, "measure": GAP, "model": llama, "prompts": prompts, **other}
        with pytest.raises(
            ms.MechsteerError, match="holds another sweep: model, prompts, axes, interventions or objectives"
        ):
            ms.sweep(options.pop("model"), options.pop("prompts"), out=tmp_path / "sweep", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ms.MechsteerError, match=r"is not empty and holds no sweep\. Choose another folder"):
        run_sweep(llama, out=tmp_path / "full")
    (tmp_path / "sweep" / "manifest.json").write_text("{")
    with pytest.raises(ms.MechsteerError, match="is damaged"):
        run_sweep(llama, out=tmp_path / "sweep")


def test_a_damaged_shard_is_an_error_and_not_a_hole(llama: ms.Model, tmp_path: Path) -> None:
    run_sweep(llama, out=tmp_path / "sweep")
    shard = tmp_path / "sweep" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ms.MechsteerError, match="damaged"):
        run_sweep(llama, out=tmp_path / "sweep")


_KILLED = """
import sys, time
import mechsteer as ms
from mechsteer import engine, store
store._SHARD_SECONDS = 0.0
real = engine.Engine.batch
def slow(self, cells, *more):
    time.sleep(0.2)
    return real(self, cells, *more)
engine.Engine.batch = slow
model = ms.load_model("pocket-1l")
ms.sweep(
    model, ms.Prompts.from_ids([[5, 6, 7, 8]]), axes={"factor": [x / 10 for x in range(60)]}, out=sys.argv[1], rows=1,
    build=lambda factor: ms.Scale(("resid_pre", 0), factor), measure=ms.LogitGap([5], [7]),
)
"""


def test_a_killed_sweep_goes_on_where_it_ended(tmp_path: Path, batches: list[int]) -> None:
    folder = tmp_path / "sweep"
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(folder)], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(folder.glob("shard-*.safetensors")))
    assert 3 <= kept < 60
    model = ms.load_model("pocket-1l")
    axes = {"factor": [x / 10 for x in range(60)]}
    build: Callable[..., ms.Intervention] = lambda factor: ms.Scale(("resid_pre", 0), factor)  # noqa: E731
    prompts = ms.Prompts.from_ids([[5, 6, 7, 8]])
    result = ms.sweep(model, prompts, axes=axes, build=build, measure=ms.LogitGap([5], [7]), out=folder, rows=1)
    assert sum(batches) <= 60 - kept
    naive.assert_same(result, naive.sweep(model, prompts, axes, build, {"logit_gap": ms.LogitGap([5], [7])}))


# ---- the Result ----


def test_what_the_result_says(llama: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(14), labels=["a", "b", "c"])
    vectors = {"x": random_vector(llama, 1), "y": random_vector(llama, 2)}
    result = ms.sweep(
        llama,
        prompts,
        axes={"layer": range(3), "which": vectors},
        build=lambda layer, which: ms.Add(vectors[which], 2.0, site=("resid_post", layer)),
        measure=[ms.LogitGap([5], [7]), ms.TokenProb([5])],
    )
    assert result["logit_gap"].dims == ("layer", "which", "prompt")
    assert result["token_prob"].sel(layer=1, which="y", prompt="b").shape == ()
    assert result.provenance["model"]["hash"] == llama.id.hash
    options = result.provenance["options"]
    assert options["flops"] >= options["least_flops"] > 0
    assert options["flops"] < 4 * options["least_flops"]


def test_mistakes(llama: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(random_ids(14))
    good: dict[str, Any] = {"axes": {"layer": [0]}, "build": lambda layer: None, "measure": ms.LogitGap([5], [7])}

    def wrong(match: str, **options: Any) -> None:
        with pytest.raises(ms.MechsteerError, match=match):
            ms.sweep(llama, prompts, **{**good, **options})

    wrong("axis without values", axes={"layer": []})
    wrong("name 'prompt' is used twice", axes={"prompt": [0]}, build=lambda prompt: None)
    wrong("name 'layer' is used twice", measure={"layer": ms.LogitGap([5], [7])})
    wrong("Axis 'layer' has the same value twice", axes={"layer": [1, 1]})
    wrong("have the same name", measure=[ms.LogitGap([5], [7]), ms.LogitGap([5], [8])])
    wrong("measure= is empty", measure={})
    wrong("layers 0 to 2", build=lambda layer: ms.Scale(("resid_pre", 3), 1.0))
    wrong("touches position 12, but prompt 0 has 12 tokens", build=lambda layer: ms.Scale(("resid_pre", 0), 1.0, at=12))
    wrong("would never fire", build=lambda layer: ms.Scale(("resid_pre", 0), 1.0, at="prefix"))
    with pytest.raises(ZeroDivisionError) as caught:
        ms.sweep(llama, prompts, **{**good, "build": lambda layer: 1 / 0})
    assert "raised by build() for layer=0" in "".join(caught.value.__notes__)


def test_the_manifest_is_json(llama: ms.Model, tmp_path: Path) -> None:
    run_sweep(llama, out=tmp_path / "sweep")
    manifest = json.loads((tmp_path / "sweep" / "manifest.json").read_text())
    assert manifest["format"] == "mechsteer.sweep"
