"""Models in bf16 and fp16 against the same models in fp32: every tolerance is a number of roundings.

`eps` is what `torch.finfo` says: 2^-7 of bf16, 2^-10 of fp16. A logit is a sum of what every block wrote, each rounded,
and products of rounded weights. With the roundings independent, the root mean square error is a few `eps` times the
logits' spread; `ROUNDINGS` of them are allowed, and for the worst of many numbers `WORST` times that. Two maps whose
entries differ by a share r of their spread have a correlation of 1 - r^2 / 2.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.prefix import optimise_soft_prefix
from mechsteer.prefix.loss import PrefixLoss

ROUNDINGS, WORST = 6, 5
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = (*zoo.ARCHITECTURES, "pocket", "stories260K")
LENGTHS = (12, 12, 9, 14)


@pytest.fixture(scope="module")
def load(zoo_folders: dict[str, Path]) -> Callable[..., ms.Model]:
    """`load(name, dtype)`, each once. Leave them as they are."""

    @cache
    def get(name: str, dtype: torch.dtype = torch.float32) -> ms.Model:
        if name == "stories260K" and not STORIES.is_dir():
            pytest.skip("stories260K is not here")
        folder = {**zoo_folders, "pocket": data_path("models", "pocket"), "stories260K": STORIES}[name]
        return ms.load_model(folder, device="cpu", dtype=dtype)

    return get


# Of these, the tests that run many passes take a few: layer norm, soft caps with norms behind, and trained ones.
FEW = ("gpt2", "gemma2", "stories260K")


@pytest.fixture(params=[(name, half) for name in NAMES for half in HALVES], ids="-".join)
def pair(request: pytest.FixtureRequest, load: Callable[..., ms.Model]) -> tuple[ms.Model, ms.Model]:
    """The model in fp32 and in half precision."""
    name, half = request.param
    return load(name), load(name, HALVES[half])


few = pytest.mark.parametrize("pair", [(name, half) for name in FEW for half in HALVES], ids="-".join, indirect=True)


def some(model: ms.Model, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> ms.Prompts:
    ids = [
        zoo.prompts(batch=1, n_pos=n, d_vocab=min(model.d_vocab, 400), seed=10 * seed + i)[0].tolist()
        for i, n in enumerate(lengths)
    ]
    return ms.Prompts.from_ids(ids, tokenizer=model.tokenizer)


def eps(model: ms.Model) -> float:
    return torch.finfo(model.dtype).eps


def rms(values: Any) -> float:
    return float(np.sqrt((np.asarray(values, dtype=np.float64) ** 2).mean()))


def allowed(full: ms.Model, half: ms.Model) -> float:
    """What rounding may do to a logit, as a root mean square."""
    return ROUNDINGS * eps(half) * float(full.run(some(full)).rows.std())


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def gap(full: ms.Model) -> ms.Objective:
    """Between tokens that the model finds likely: others may have the same logit everywhere."""
    ids = full.run(some(full), logits="last").rows.mean(0).topk(4).indices.tolist()
    return ms.LogitGap(ids[::2], ids[1::2]).named("gap")


def test_logits_and_objectives(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    prompts, noise = some(full), allowed(full, half)
    runs = [model.run(prompts) for model in pair]
    assert runs[1].rows.dtype == half.dtype and half.dtype != torch.float32
    assert rms(runs[1].rows.float() - runs[0].rows) <= noise
    others = some(full, seed=3)
    for measure in (gap(full), ms.TeacherForcedCE(span="all"), ms.TokenProb([5, 6], log=True)):
        values = [measure(run) for run in runs]
        assert values[1].dtype == torch.float32, "sums over tokens and vocabulary are made in fp32"
        assert float((values[1] - values[0]).abs().max()) <= WORST * noise
    kls = [ms.KLFromBaseline(model.run(prompts))(model.run(others)) for model in pair]
    # d KL = sum (dp log p/q + p dlog p/q): of the order of the error of a log-probability, times KL's own size.
    assert float((kls[1] - kls[0]).abs().max()) <= WORST * noise * max(1.0, float(kls[0].max()))
    again = ms.KLFromBaseline(runs[1])(runs[1])
    assert float(again.abs().max()) < 1e-6, "of a run from itself"


def test_packed_pass_is_as_exact_as_transformer_lens(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    tokens = some(full, (min(full.n_ctx, 40),) * 8).tokens
    with torch.no_grad():
        exact = full.hooked(tokens)
        theirs, mine = half.hooked(tokens).float(), half.decoder.whole(tokens).float()
    assert half.decoder is not None
    assert rms(mine - exact) <= 1.5 * rms(theirs - exact)


def grid(model: ms.Model, prompts: ms.Prompts) -> dict[str, Any]:
    """A sweep whose cells start at other layers and positions, few of them late ones."""
    source = model.run(some(model, seed=5), record=["resid_pre", "z"], logits="none").activations
    vector = source["resid_pre", 1][0, 3].float()

    def build(layer: int, pos: int, kind: str) -> ms.Intervention:
        if kind == "add":
            return ms.Add(vector, 0.7, site=("resid_post", layer), at=pos)
        site = ms.Site("resid_pre", layer, pos=pos) if kind == "stream" else ms.Site("z", layer, head=1, pos=pos)
        return ms.Replace(site, source)

    axes = {"layer": [model.n_layers - 1], "pos": [1, 8], "kind": ["add", "stream", "head"]}
    return {"prompts": prompts, "axes": axes, "build": build}


@few
def test_sweep_packed_is_as_exact_as_through_hooks(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    measures: dict[str, ms.Objective] = {"gap": gap(full), "ce": ms.TeacherForcedCE(span="all")}
    found = {}
    for model in pair:
        swept = ms.sweep(model, measure=measures, progress=False, **grid(model, some(model)))
        assert swept.provenance["options"]["engine"] == "packed"
        twin = naive.sweep(model, measures=measures, **grid(model, some(model)))
        found[model.dtype] = swept, twin
    for name in measures:
        exact = found[torch.float32][1][name].numpy()
        packed, hooks = found[half.dtype][0][name].values, found[half.dtype][1][name].numpy()
        noise = allowed(full, half)
        assert rms(packed - exact) <= max(1.5 * rms(hooks - exact), noise / 4), name
        assert rms(packed - exact) <= noise, name


def test_vectors(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    site, groups = ms.Site("resid_post", full.n_layers // 2), [some(full, seed=s) for s in (1, 2)]
    means = [ms.difference_of_means(model, *groups, sites=site, progress=False)[site] for model in pair]
    assert means[1].vectors.dtype == torch.float32 and cosine(means[0].vector, means[1].vector) > 0.999
    firsts = [ms.pca(model, groups[0], k=1, sites=site, progress=False)[site].vector for model in pair]
    assert abs(cosine(*firsts)) > 0.999
    states = [model.run(groups[0], record=site, logits="none").activations for model in pair]
    assert states[1][site].dtype == half.dtype and states[1].mean()[site].dtype == torch.float32
    assert cosine(states[0].mean()[site], states[1].mean()[site]) > 0.999
    likeness = [
        ms.StateMatch(kept, site)(model.run(groups[1], record=site)) for kept, model in zip(states, pair, strict=True)
    ]
    assert float((likeness[0] - likeness[1]).abs().max()) < WORST * ROUNDINGS * eps(half)


@few
def test_alpha_curve(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    site, prompts = ms.Site("resid_post", 1), some(full)
    vector = full.run(some(full, seed=4), record=site, logits="none").activations[site][0, 5]
    curves = [
        ms.sweep(
            model, prompts, axes={"alpha": [-1.0, -0.3, 0.0, 0.3, 1.0, 3.0]}, measure=gap(full), progress=False,
            build=lambda alpha: ms.Add(vector, alpha, site=site),
        )["gap"].values
        for model in pair
    ]  # fmt: skip
    assert rms(curves[1] - curves[0]) <= 2**0.5 * allowed(full, half), "a gap is the difference of two logits"
    assert correlation(*curves) > 1 - 4 * eps(half)


@few
def test_patching_map(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    clean, corrupt, measure = some(full, (10, 10), seed=6), some(full, (10, 10), seed=7), gap(full)
    maps = [
        ms.activation_patching(model, clean, corrupt, measure=measure, progress=False)["effect"].values
        for model in pair
    ]
    assert correlation(*maps) > 1 - 4 * eps(half)
    gradients = [
        ms.attribution_patching(model, clean, corrupt, measure=measure, progress=False)["effect"].values
        for model in pair
    ]
    assert correlation(*gradients) > 1 - 8 * eps(half)


def slotted(model: ms.Model, n: int = 3) -> ms.Prompts:
    prompts = some(model, (12, 12, 12, 12))
    slots = torch.zeros_like(prompts.mask)
    slots[:, 1 : 1 + n] = True
    return replace(prompts, slots=slots)


@few
def test_soft_prefix(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    prompts, measure = slotted(full), ms.TeacherForcedCE(span="all")
    start = 0.3 * torch.randn(2, 3, full.d_model, generator=torch.Generator().manual_seed(0))
    found = [PrefixLoss(model, prompts, measure, n_prefixes=2).gradient(start) for model in pair]
    assert found[1][1].dtype == torch.float32
    assert float((found[1][0] - found[0][0]).abs().max()) <= allowed(full, half)
    assert cosine(found[0][1], found[1][1]) > 1 - 4 * eps(half)
    options: dict[str, Any] = {"n_restarts": 2, "init": start, "lr": 1e-3, "schedule": "constant", "progress": False}
    steps = [optimise_soft_prefix(model, prompts, measure, steps=2, **options) for model in pair]
    # Steps far below bf16's spacing: kept in fp32, none is lost.
    assert steps[1].embeddings.dtype == torch.float32
    moved = [float((each.restarts - start).abs().mean()) for each in steps]
    assert moved[1] > moved[0] / 4 > 0


@few
def test_generation_differs_only_where_rounding_decides(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    prompts = some(full, (8, 8, 6, 7, 8, 8))
    done = [model.generate(prompts, max_new_tokens=10, stop_at_eos=False, progress=False) for model in pair]
    same = 0
    for row in range(len(prompts)):
        n = int(prompts.lengths[row])
        ids = [each.tokens[row][each.mask[row]].tolist()[n:] for each in done]
        first = next((i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b), 10)
        same += first
        if first < 10:
            before = ms.Prompts.from_ids([done[0].tokens[row][done[0].mask[row]].tolist()[: n + first]])
            logits = full.run(before, logits="last").rows[0]
            margin = float(logits[ids[0][first]] - logits[ids[1][first]])
            assert margin <= WORST * 2**0.5 * allowed(full, half), "the likeliest was ahead by more than rounding moves"
    assert same >= 10, "the first tokens at least are the same"


@few
def test_propagator(pair: tuple[ms.Model, ms.Model]) -> None:
    full, half = pair
    prompts, ends = some(full, (8, 9)), (("resid_post", 0), ("resid_post", full.n_layers - 1))
    J = [ms.Propagator(model, prompts, *ends) for model in pair]
    spectra = [each.svd(4) for each in J]
    assert spectra[1].S.dtype == torch.float32
    # Where the stream is rounded, the Jacobian is that of another point: more than its own rounding.
    assert float((spectra[1].S / spectra[0].S - 1).abs().max()) < 16 * eps(half)
    pushes = torch.randn(3, 1, full.d_model, generator=torch.Generator().manual_seed(0))
    assert cosine(J[0].mv(pushes), J[1].mv(pushes)) > 1 - 4 * eps(half)
    assert cosine(J[0].T.mv(pushes), J[1].T.mv(pushes)) > 1 - 4 * eps(half)
    share = [each.identity_share(random=2, spectrum=2) for each in J]
    assert share[1]["c"].values == pytest.approx(share[0]["c"].values, abs=16 * eps(half))
