"""Identity share and Dyson series against dense Jacobians and listed paths."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
import mechsteer.plots.labels as labels
from mechsteer.propagator.dyson import dyson
from mechsteer.propagator.flow import position_flow
from mechsteer.propagator.identity import identity_pairs, identity_share
from mechsteer.propagator.operator import Propagator

D = zoo.D_MODEL


@pytest.fixture(scope="module")
def wide(zoo_folders: dict[str, Path]) -> Callable[..., ms.Model]:
    """The zoo in fp64."""
    loaded: dict[str, ms.Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> ms.Model:
        key = architecture + backend
        if key not in loaded:
            folder = zoo_folders[architecture]
            loaded[key] = ms.load_model(folder, backend=backend, dtype=torch.float64, device="cpu")
        return loaded[key]

    return get


def ragged() -> ms.Prompts:
    tokens = zoo.prompts(batch=2, n_pos=12).tolist()
    return ms.Prompts.from_ids([tokens[0], tokens[1][:9]])


def jacobian(model: ms.Model, source: Any, target: Any, pos: int | None = None) -> torch.Tensor:
    """By TransformerLens's own forward pass."""
    return Propagator(model, ragged(), source, target, source_pos=pos, target_pos=pos, hooks=True).dense()


def norms(model: ms.Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Jacobians of the final norm, and of the same without scale and gain, by PyTorch."""
    run = model.run(ragged(), record=["resid_post"], logits="none")
    last = run.activations[ms.Site("resid_post", 2)]
    rows = last[torch.arange(2), ragged().decision]
    centred = "RMS" not in type(model.hooked.ln_final).__name__

    def plain(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean() if centred else x
        return x / (x.square().mean() + 1e-3).sqrt()

    def scale(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean() if centred else x
        return (x.square().mean() + 1e-3).sqrt()

    of = torch.autograd.functional.jacobian
    whole = [of(lambda x: model.hooked.ln_final(x[None, None])[0, 0], row) for row in rows]
    return torch.stack(whole), torch.stack([of(plain, row) * scale(row) for row in rows])


def same(got: Any, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.values, expected.detach().numpy(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [*((name, "hooked_transformer") for name in ("gpt2", "llama", "gemma2")), ("llama", "bridge")],
)
def test_identity_share_is_that_of_the_dense_jacobians(
    architecture: str, backend: str, wide: Callable[..., ms.Model]
) -> None:
    model = wide(architecture, backend)
    v = torch.randn(D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    share = identity_share(model, ragged(), vectors={"v": v}, spectrum=5)
    assert share["c"].dims == ("span", "layer", "prompt") and list(share["span"].values)[:2] == ["block", "end"]
    # transformers' norms compute in fp32.
    tolerance = 1e-6 if backend == "hooked_transformer" else 1e-4
    through, unscaled = norms(wide(architecture))
    for layer in range(3):
        end = jacobian(model, ("resid_pre", layer), ("resid_post", 2))
        block = jacobian(model, ("resid_pre", layer), ("resid_post", layer))
        for span, J in {"block": block, "end": end, "norm": through @ end, "unscaled": unscaled @ end}.items():
            got = share.sel(span=span, layer=layer)
            c = J.diagonal(dim1=1, dim2=2).sum(-1) / D
            rest = J - c[:, None, None] * torch.eye(D)
            same(got["c"], c, tolerance)
            same(got["rest"], rest.flatten(1).norm(dim=1) / J.flatten(1).norm(dim=1), tolerance)
            same(got["norm"], J.flatten(1).norm(dim=1) / D**0.5, tolerance)
            same(got["spectrum"], torch.linalg.svdvals(rest)[:, :5].T, tolerance)
            same(got["cos"].sel(vector="v"), torch.cosine_similarity(J @ v, v[None]), tolerance)
        for part, source, target in [("attn", "resid_pre", "resid_mid"), ("mlp", "resid_mid", "resid_post")]:
            added = jacobian(model, (source, layer), (target, layer)) - torch.eye(D)
            got = share.sel(part=part, layer=layer)
            same(got["gain"], added.flatten(1).norm(dim=1) / D**0.5, tolerance)
            same(got["largest"], torch.linalg.svdvals(added)[:, 0], tolerance)
    # Random directions: cos(Jv, v) is c / norm on average where d is large; here within its scatter.
    ratio = (share["cos_random"] - share["c"] / share["norm"]).sel(span="end")
    assert float(abs(ratio).max()) < 0.2


@pytest.mark.parametrize(("architecture", "backend"), [("gpt2", "hooked_transformer"), ("gemma2", "bridge")])
def test_identity_share_of_all_pairs_is_that_of_each(
    architecture: str, backend: str, wide: Callable[..., ms.Model]
) -> None:
    model = wide(architecture, backend)
    v = torch.randn(D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pairs = identity_pairs(model, ragged(), vectors={"v": v}, pos=3)
    assert pairs["c"].dims == ("source", "target", "prompt") and pairs["c"].shape == (3, 3, 2)
    assert pairs["cos"].dims == ("source", "target", "vector", "prompt") and "c_stderr" not in pairs.data
    about = identity_pairs(model, ragged(), vectors={"v": v}, pos=3, probes=200)
    # transformers' norms compute in fp32.
    tolerance = 1e-6 if backend == "hooked_transformer" else 1e-4
    for source, target in itertools.product(range(3), repeat=2):
        got = pairs.sel(source=source, target=target)
        if target < source:
            assert all(np.isnan(array).all() for array in got.data.data_vars.values())
            continue
        J = jacobian(model, ("resid_pre", source), ("resid_post", target), 3)
        c = J.diagonal(dim1=1, dim2=2).sum(-1) / D
        rest = J - c[:, None, None] * torch.eye(D)
        same(got["c"], c, tolerance)
        same(got["rest"], rest.flatten(1).norm(dim=1) / J.flatten(1).norm(dim=1), tolerance)
        same(got["norm"], J.flatten(1).norm(dim=1) / D**0.5, tolerance)
        same(got["cos"].sel(vector="v"), torch.cosine_similarity(J @ v, v[None]), tolerance)
        near = about.sel(source=source, target=target)
        for name in ("c", "rest", "norm"):
            error = abs(near[name] - got[name])
            assert ((error > 0) & (error < 4 * near[f"{name}_stderr"])).all()
        same(near["cos"].sel(vector="v"), torch.cosine_similarity(J @ v, v[None]), tolerance)
    # The diagonal and the last column are spans of identity_share.
    share = identity_share(model, ragged(), pos=3)
    np.testing.assert_allclose(pairs["c"].sel(target=2), share["c"].sel(span="end"), atol=tolerance)
    np.testing.assert_allclose(pairs["cos_random"].sel(target=2), share["cos_random"].sel(span="end"), atol=tolerance)
    for layer in range(3):
        at = pairs["rest"].sel(source=layer, target=layer)
        np.testing.assert_allclose(at, share["rest"].sel(span="block", layer=layer), atol=tolerance)


def test_identity_share_of_a_model_that_adds_nothing_is_one(zoo_folders: dict[str, Path]) -> None:
    model = ms.load_model(zoo_folders["llama"], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for block in model.hooked.blocks:
            block.attn.W_O.zero_()
            block.mlp.W_out.zero_()
    share = identity_share(model, ragged())
    for span in ("block", "end"):
        got = share.sel(span=span)
        same(got["c"], torch.ones(3, 2, dtype=torch.float64), 1e-12)
        same(got["rest"], torch.zeros(3, 2, dtype=torch.float64), 1e-12)
        same(got["cos_random"], torch.ones(3, 2, dtype=torch.float64), 1e-12)
    assert not share["gain"].values.any() and "cos" not in share.data
    for probes in (None, 4):
        pairs = identity_pairs(model, ragged(), probes=probes)
        there = np.tri(3, dtype=bool).T
        for name, value in {"c": 1.0, "rest": 0.0, "norm": 1.0, "cos_random": 1.0}.items():
            np.testing.assert_allclose(pairs[name].values[there], value, atol=1e-12)
    # What the norm alone leaves: all directions but the stream's own, nearly.
    assert abs(float(share.sel(span="unscaled")["c"].mean()) - (1 - 1 / D)) < 1e-3
    free = dyson(model, ragged(), layers=None)
    same(free["share"].sel(order=0), torch.ones(3, 8, 2, dtype=torch.float64), 1e-12)
    assert float(abs(free["share"].sel(order=[1, 2, 3])).max()) < 1e-12


@pytest.mark.parametrize("unit", ["block", "half"])
def test_dyson_terms_are_the_sums_over_listed_paths(unit: str, wide: Callable[..., ms.Model]) -> None:
    model = wide("gemma2")
    eye = torch.eye(D, dtype=torch.float64)
    places = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1), ("resid_pre", 2),
              ("resid_mid", 2), ("resid_post", 2)][:: 2 if unit == "block" else 1]  # fmt: skip
    added = [jacobian(model, source, target, 5) - eye for source, target in itertools.pairwise(places)]
    v = torch.randn(2, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = dyson(model, ragged(), vectors={"v": v}, layers=[1, 0], unit=unit, pos=5, random=1)
    assert found["share"].dims == ("order", "layer", "vector", "prompt")
    assert found["share"].shape == (len(added) + 1, 2, 2, 2)
    for layer in (0, 1):
        left = added[layer * len(added) // 3 :]
        terms = torch.zeros(len(added) + 1, 2, D, dtype=torch.float64)
        for passed in itertools.product([False, True], repeat=len(left)):
            moved = v
            for through, step in zip(passed, left, strict=True):
                moved = torch.einsum("bts,bs->bt", step, moved) if through else moved
            terms[sum(passed)] += moved
        whole = torch.einsum("bts,bs->bt", jacobian(model, ("resid_pre", layer), ("resid_post", 2), 5), v)
        got, size = found.sel(layer=layer, vector="v"), whole.norm(dim=-1)
        same(got["share"], (terms * whole).sum(-1) / size**2, 1e-8)
        same(got["size"], terms.norm(dim=-1) / size, 1e-8)
        same(got["arrives"], size / v.norm(dim=-1), 1e-8)
        same(got["missing"], (whole - terms.cumsum(0)).norm(dim=-1) / size, 1e-8)


def test_the_series_is_exact_at_full_order(architecture: str, zoo_models: Callable[..., ms.Model]) -> None:
    found = dyson(zoo_models(architecture), ragged(), layers=None, unit="half")
    assert float(found["missing"].sel(order=6).max()) < 1e-5
    assert float(found["missing"].sel(order=0).min()) > 1e-2
    np.testing.assert_allclose(found["share"].sum("order").values, 1, atol=1e-5)
    again = dyson(zoo_models(architecture), ragged(), layers=None, unit="half")
    assert found.data.identical(again.data)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_what_arrives_where_is_what_each_pair_of_positions_says(backend: str, wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("gemma3", backend), ragged()
    source, target = ("resid_mid", 0), ("resid_post", 2)
    v = torch.randn(2, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    flow = position_flow(model, prompts, source, target, source_pos=[2, 10, -1], vectors={"v": v}, random=400)
    assert flow["arrived"].dims == ("vector", "src", "dest", "prompt") and flow["arrived"].shape == (2, 3, 12, 2)
    arrived = flow["arrived"]
    for dest in (2, 5, 8):
        J = Propagator(model, prompts, source, target, source_pos=2, target_pos=dest)
        same(arrived.sel(vector="v", src=2, dest=dest), J.mv(v).norm(dim=-1) / v.norm(dim=-1), 1e-4)
        expected = J.frobenius().value / D**0.5
        np.testing.assert_allclose(arrived.sel(vector="random", src=2, dest=dest).values, expected.numpy(), rtol=0.15)
    assert not arrived.sel(src=2, dest=[0, 1]).values.any()
    # The second prompt has 9 tokens.
    assert np.isnan(arrived.sel(src=10, prompt=1)).all() and np.isnan(arrived.sel(dest=9, prompt=1)).all()
    assert np.isnan(flow["same"].sel(src=10, prompt=1)).all()
    square = arrived.sel(vector="v", src=2) ** 2
    np.testing.assert_allclose(flow["same"].sel(vector="v", src=2), square.sel(dest=2) / square.sum("dest"))
    apart = (square.sum("dest") - square.sel(dest=2)) ** 0.5
    np.testing.assert_allclose(flow["others"].sel(vector="v", src=2), apart)
    assert np.isnan(flow["others"].sel(src=10, prompt=1)).all() and not flow["others"].sel(src=-1).values.any()
    # From the last position nothing can go anywhere else.
    np.testing.assert_allclose(flow["same"].sel(src=-1), 1)


def test_a_flow_says_which_tokens_and_is_drawn(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("gpt2")
    prompts = ms.Prompts.from_strings(["The cat sat on the mat", "The dog sat on"], model)
    flow = position_flow(model, prompts, ("resid_pre", 0), ("resid_post", 2), source_pos=[0, -1])
    first, second = (prompts.shown_tokens(row) for row in range(2))
    assert len(second) < len(first) and first[0] == second[0]
    assert flow["src_token"].values.tolist() == [first[0], first[-1] + "…"]
    expected = [a if a == b else a + "…" for a, b in zip(first, second, strict=False)] + first[len(second) :]
    assert flow["dest_token"].values.tolist() == expected
    figure = flow.plot("arrived").to_dict()["layout"]
    assert figure["xaxis"]["title"]["text"] == "arrives at" and figure["yaxis"]["title"]["text"] == "pushed at"
    assert list(figure["yaxis"]["ticktext"]) == [labels.plain(labels.short(text)) for text in flow["src_token"].values]
    assert flow["arrived"].attrs["units"] == "length of the push"
    ids = position_flow(model, ragged(), ("resid_pre", 0), ("resid_post", 2), source_pos=0)
    assert ids["dest_token"].values[11] == str(int(ragged().tokens[0, 11]))


def test_errors_say_what_to_do(wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("llama"), ragged()
    for match, call in [
        ("unit='layer' does not exist. Pass one of 'block', 'half'", lambda: dyson(model, prompts, unit="layer")),
        ("no vectors and random=0", lambda: dyson(model, prompts, random=0)),
        (r"layers=\[3\]: .* has layers 0 to 2", lambda: dyson(model, prompts, layers=3)),
        (r"'v' has shape \[3, 32\]. Pass \[32\], or \[2, 32\]",
         lambda: dyson(model, prompts, vectors={"v": torch.ones(3, 32)})),
        ("'v' is zero or not finite", lambda: identity_share(model, prompts, vectors={"v": torch.zeros(32)})),
        ("No prompt has position 12; the longest has 12 tokens",
         lambda: position_flow(model, prompts, "embed", ("resid_pre", 1), source_pos=12)),
        ("comes after the target", lambda: position_flow(model, prompts, ("resid_mid", 1), ("resid_pre", 1))),
        ("position_flow got no vectors", lambda: position_flow(model, prompts, "embed", ("resid_pre", 1), random=0)),
        ("random=0 and spectrum=1: pass at least 1", lambda: identity_pairs(model, prompts, random=0)),
        ("probes=1 give no standard error", lambda: identity_pairs(model, prompts, probes=1)),
        ("'v' is zero or not finite", lambda: identity_pairs(model, prompts, vectors={"v": torch.zeros(32)})),
        ("random=0 and spectrum=16", lambda: identity_share(model, prompts, random=0)),
    ]:  # fmt: skip
        with pytest.raises(ms.MechsteerError, match=match):
            call()
