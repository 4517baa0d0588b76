"""The propagator against finite differences, PyTorch's own Jacobian, and the laws of linear maps."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.propagator.dyson import dyson
from mechsteer.propagator.identity import split
from mechsteer.propagator.operator import LinearOperator, Propagator
from mechsteer.propagator.spectra import signs

SOURCE, TARGET = ("resid_mid", 0), ("resid_pre", 2)


@pytest.fixture(scope="module")
def wide(zoo_folders: dict[str, Path]) -> Callable[..., ms.Model]:
    """The zoo in fp64."""
    loaded: dict[tuple[str, str], ms.Model] = {}

    def get(architecture: str, backend: str = "hooked_transformer") -> ms.Model:
        if (architecture, backend) not in loaded:
            folder = zoo_folders[architecture]
            loaded[architecture, backend] = ms.load_model(folder, backend=backend, dtype=torch.float64, device="cpu")
        return loaded[architecture, backend]

    return get


def ragged() -> ms.Prompts:
    tokens = zoo.prompts(batch=3, n_pos=12).tolist()
    return ms.Prompts.from_ids([tokens[0], tokens[1][:9], tokens[2][:10]])


def pushed(model: ms.Model, prompts: ms.Prompts, source: ms.Site, at: torch.Tensor, push: torch.Tensor) -> list[Any]:
    """Hooks that add push [batch, d_model] at one position of each prompt."""
    batch = torch.arange(len(prompts))

    def add(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor.index_put((batch, at), push, accumulate=True)

    # A bridge's hook_resid_mid is not the whole stream: its other addend is moved.
    moved = ms.Site("attn_out", source.layer) if source.kind == "resid_mid" and model.backend == "bridge" else source
    return [(moved.hook_name, add)]


def reached(model: ms.Model, prompts: ms.Prompts, source: Any, target: Any, at: Any, to: Any) -> Any:
    """The target [batch, d] as a function of the push, run by the model's own hooks."""
    batch, begin = torch.arange(len(prompts)), ms.Site.of(source)

    def run(push: torch.Tensor) -> torch.Tensor:
        edits = pushed(model, prompts, begin, at, push)
        if target == "logits":
            return model.forward(prompts, edits, [], read=prompts.at(to))[0]
        goal = ms.Site.of(target)
        taken = model.forward(prompts, edits, [goal], read=torch.zeros_like(prompts.mask))[1]
        return taken[goal][batch, to]

    return run


def differences(run: Any, v: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    with torch.no_grad():
        return (run(step * v) - run(-step * v)) / (2 * step)


def test_where_gradients_are_switched_off(wide: Callable[..., ms.Model]) -> None:
    """As users of TransformerLens have them for a whole notebook."""
    model, prompts = wide("llama"), ragged()
    v = torch.randn(model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def made() -> list[torch.Tensor]:
        J = ms.Propagator(model, prompts, SOURCE, TARGET)
        gap = ms.Propagator(model, prompts, SOURCE, ms.LogitGap([5], [7]))
        found = [J.mv(v), J.rmv(v), J.svd(3).S, gap.dense(), J.identity_share().data["rest"].values]
        return [torch.as_tensor(each) for each in found]

    expected = made()
    with torch.no_grad():
        found = made()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert not torch.allclose(expected[0], v.expand_as(expected[0]))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    worst = float((got - expected).abs().max())
    assert worst <= tolerance * max(1.0, float(expected.abs().max())), worst


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("hooks", [False, True])
def test_products_are_finite_differences_on_the_zoo(
    architecture: str, backend: str, hooks: bool, wide: Callable[..., ms.Model]
) -> None:
    model, prompts = wide(architecture, backend), ragged()
    last = prompts.lengths - 1
    cases = [
        (SOURCE, TARGET, last, last),
        (("resid_pre", 1), "logits", last - 2, last),
        ("embed", ("resid_mid", 1), torch.tensor([3, 0, 8]), torch.tensor([3, 4, 9])),
        (("resid_mid", 1), ("resid_post", 2), last, last),
    ]
    for source, target, at, to in cases:
        J = Propagator(model, prompts, source, target, source_pos=at, target_pos=to, hooks=hooks)
        v, u = vectors(2, 3, J.d_source), vectors(2, 3, J.d_target, seed=1)
        Jv, JTu = J.mv(v), J.rmv(u)
        run = reached(model, prompts, source, target, at, to)
        # A bridge runs transformers' norms, which compute in fp32 whatever the weights are.
        step, tolerance = (1e-5, 1e-6) if backend == "hooked_transformer" else (3e-3, 3e-3)
        close(Jv[0], differences(run, v[0], step), tolerance)
        close((Jv * u).sum(-1), (v * JTu).sum(-1), 1e-5 if backend == "bridge" and hooks else 1e-10)


@pytest.mark.parametrize("hooks", [False, True])
def test_products_are_those_of_forward_mode(architecture: str, hooks: bool, wide: Callable[..., ms.Model]) -> None:
    """The twin of `mv`: PyTorch's forward mode through TransformerLens's forward pass."""
    model, prompts = wide(architecture), ragged()
    last = prompts.lengths - 1
    v = vectors(4, 3, 32)
    for source, target, at in [(SOURCE, TARGET, last), ("embed", "logits", torch.tensor([3, 0, 8]))]:
        J = Propagator(model, prompts, source, target, source_pos=at, hooks=hooks)
        run = reached(model, prompts, source, target, at, last)

        def pushed_along(tangent: torch.Tensor, run: Any = run) -> torch.Tensor:
            return torch.func.jvp(run, (torch.zeros(3, 32, dtype=torch.float64),), (tangent,))[1]

        with torch.no_grad():
            close(J.mv(v), torch.func.vmap(pushed_along)(v), 1e-10)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_dense_is_that_of_autograd_functional_jacobian(
    architecture: str, backend: str, wide: Callable[..., ms.Model]
) -> None:
    model = wide(architecture, backend)
    tokens = zoo.prompts(batch=1, n_pos=10)
    prompts = ms.Prompts.from_ids(tokens)
    at = torch.tensor([9])
    run = reached(model, prompts, SOURCE, TARGET, at, at)
    expected = torch.autograd.functional.jacobian(run, torch.zeros(1, model.d_model, dtype=torch.float64))[:, :, 0]
    for hooks in (False, True):
        close(Propagator(model, prompts, SOURCE, TARGET, hooks=hooks).dense(), expected, 1e-5)
    # Wider than it is long: by forward products.
    run = reached(model, prompts, SOURCE, "logits", at, at)
    expected = torch.autograd.functional.jacobian(run, torch.zeros(1, model.d_model, dtype=torch.float64))[:, :, 0]
    close(Propagator(model, prompts, SOURCE, "logits").dense(), expected, 1e-5)


def test_an_objective_is_a_map_of_one_row(wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("llama"), ragged()
    gap = ms.LogitGap(5, 7)
    J = Propagator(model, prompts, ("resid_post", 0), gap, source_pos=2)
    assert (J.d_target, J.d_source) == (1, 32)
    v, at = vectors(3, 32), torch.full((3,), 2)

    def run(push: torch.Tensor) -> torch.Tensor:
        read = gap.reads(prompts)
        assert read is not None
        rows, _ = model.forward(prompts, pushed(model, prompts, ms.Site("resid_post", 0), at, push), [], read=read)
        return (rows[:, 5] - rows[:, 7])[:, None]

    close(J.mv(v), differences(run, v), 1e-6)
    close(J.dense()[:, 0], J.rmv(torch.ones(1, dtype=torch.float64)), 1e-12)


def test_sites_that_are_the_same_place_give_the_identity(wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("gpt2"), ragged()
    eye = torch.eye(32, dtype=torch.float64).expand(3, 32, 32)
    for hooks in (False, True):
        for source, target in [
            ("embed", "embed"),
            ("embed", ("resid_pre", 0)),
            (("resid_pre", 1), ("resid_post", 0)),
            (("resid_post", 0), ("resid_pre", 1)),
            (("resid_post", 2), ("resid_post", 2)),
        ]:
            close(Propagator(model, prompts, source, target, hooks=hooks).dense(), eye, 1e-12)
        apart = Propagator(model, prompts, ("resid_pre", 1), ("resid_post", 0), source_pos=1, target_pos=2, hooks=hooks)
        assert not apart.dense().any()


def test_the_chain_rule_holds_at_one_position(wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("gemma2"), ragged()
    first, second, both = (
        Propagator(model, prompts, source, target).dense()
        for source, target in [
            (("resid_pre", 0), ("resid_mid", 1)),
            (("resid_mid", 1), ("resid_post", 2)),
            (("resid_pre", 0), ("resid_post", 2)),
        ]
    )
    close(second @ first, both, 1e-10)


def test_shapes_of_products_and_what_the_mean_is(wide: Callable[..., ms.Model]) -> None:
    J = Propagator(wide("llama"), ragged(), SOURCE, TARGET)
    dense = J.dense()
    v = vectors(4, 3, 32)
    torch.testing.assert_close(J.mv(v), torch.einsum("bts,kbs->kbt", dense, v))
    torch.testing.assert_close(J.mv(v[0]), torch.einsum("bts,bs->bt", dense, v[0]))
    torch.testing.assert_close(J.mv(v[0, 0]), dense @ v[0, 0])
    torch.testing.assert_close(J.mv(v[:, :1]), torch.einsum("bts,ks->kbt", dense, v[:, 0]))
    torch.testing.assert_close(J.T.mv(v), torch.einsum("bts,kbt->kbs", dense, v))
    torch.testing.assert_close(J.T.dense(), dense.mT)
    assert J.T.T is J
    torch.testing.assert_close(J.mean().dense(), dense.mean(0, keepdim=True))
    torch.testing.assert_close(J.mean().T.mv(v[0, 0]), (dense.mean(0).T @ v[0, 0])[None])
    torch.testing.assert_close(J.mean().frobenius().value, dense.mean(0).norm()[None])


def test_svd_is_the_dense_one_and_its_error_is_a_bound(wide: Callable[..., ms.Model]) -> None:
    J: LinearOperator = Propagator(wide("mistral"), ragged(), ("resid_pre", 0), ("resid_post", 2))
    dense = J.dense()
    exact = torch.linalg.svdvals(dense)
    found = J.svd(4, oversample=4, power=3)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((3, 32, 4), (3, 4), (3, 4, 32))
    assert ((found.S - exact[:, :4]).abs() <= 0.02 * exact[:, :4]).all()
    assert (found.error >= exact[:, 8]).all() and (found.error <= 10 * exact[:, 0]).all()
    torch.testing.assert_close(found.U.mT @ dense, found.S[..., None] * found.Vh)
    whole = J.svd(30)
    torch.testing.assert_close(whole.S, exact[:, :30])
    assert not whole.error.any()
    gap = Propagator(wide("mistral"), ragged(), ("resid_pre", 0), ms.LogitGap(5, 7))
    torch.testing.assert_close(gap.svd(1).S[:, 0], gap.frobenius().value)


def test_trace_and_norm_are_exact_or_within_their_standard_errors(wide: Callable[..., ms.Model]) -> None:
    J = Propagator(wide("qwen3"), ragged(), ("resid_pre", 0), ("resid_post", 2))
    dense = J.dense()
    for exact, got, estimated in [
        (dense.diagonal(dim1=1, dim2=2).sum(1), J.trace(), J.trace(probes=400)),
        (torch.linalg.matrix_norm(dense), J.frobenius(), J.frobenius(probes=400)),
    ]:
        torch.testing.assert_close(got.value, exact)
        assert not got.stderr.any()
        assert (estimated.stderr > 0).all()
        z = (estimated.value - exact) / estimated.stderr
        assert (z.abs() < 4).all() and (z != 0).all()
    assert torch.equal(J.trace(probes=8, seed=3).value, J.trace(probes=8, seed=3).value)
    # The standard error is the spread over seeds.
    spread = torch.stack([J.trace(probes=16, seed=seed).value for seed in range(60)]).std(0)
    claimed = torch.stack([J.trace(probes=16, seed=seed).stderr for seed in range(60)]).mean(0)
    assert (spread / claimed > 0.7).all() and (spread / claimed < 1.4).all()


@pytest.mark.parametrize(("source", "target", "pos"), [(SOURCE, TARGET, None), ("embed", ("resid_post", 2), 4)])
def test_the_identity_share_of_one_operator(
    source: Any, target: Any, pos: int | None, wide: Callable[..., ms.Model]
) -> None:
    J = Propagator(wide("gemma3"), ragged(), source, target, source_pos=pos, target_pos=pos)
    dense, v, eye = J.dense(), vectors(3, 32), torch.eye(32, dtype=torch.float64)
    share = J.identity_share(vectors={"v": v}, spectrum=5, random=300)
    c = dense.diagonal(dim1=1, dim2=2).mean(1)
    rest, norm = dense - c[:, None, None] * eye, torch.linalg.matrix_norm(dense)
    expected = {"c": c, "norm": norm / 32**0.5, "rest": torch.linalg.matrix_norm(rest) / norm}
    expected["spectrum"] = torch.linalg.svdvals(rest)[:, :5].T
    expected["cos"] = torch.cosine_similarity(torch.einsum("bts,bs->bt", dense, v), v, dim=-1)[None]
    for name, value in expected.items():
        np.testing.assert_allclose(share[name].values, value, rtol=1e-9)
    assert not any(share[f"{name}_stderr"].values.any() for name in ("c", "rest", "norm"))
    assert float(abs(share["cos_random"] - share["c"] / share["norm"]).max()) < 0.1
    # Without whole matrices.
    about = J.identity_share(probes=200, spectrum=5)
    for name in ("c", "rest", "norm"):
        error = abs(about[name] - share[name])
        assert ((error > 0) & (error < 4 * about[f"{name}_stderr"])).all()
    np.testing.assert_allclose(about["spectrum"], share["spectrum"], rtol=0.1)
    same = J.identity_share(vectors={"v": v}, probes=2)
    np.testing.assert_allclose(same["cos"], share["cos"], rtol=1e-9)


def test_standard_errors_of_the_share_are_the_spread_over_seeds() -> None:
    J = vectors(2, 32, 32) / 8 + torch.eye(32)
    exact = share_parts(32**0.5 * torch.eye(32, dtype=torch.float64)[:, None].expand(32, 2, 32), J)
    c = J.diagonal(dim1=1, dim2=2).mean(1)
    close(exact["c"], c, 1e-12)
    rest = torch.linalg.matrix_norm(J - c[:, None, None] * torch.eye(32)) / torch.linalg.matrix_norm(J)
    close(exact["rest"], rest, 1e-12)
    drawn = [share_parts(signs((24, 2, 32), J, seed), J) for seed in range(300)]
    for name in ("c", "rest", "norm"):
        errors = torch.stack([each[name] - exact[name] for each in drawn])
        claimed = torch.stack([each[f"{name}_stderr"] for each in drawn]).mean(0)
        assert (errors.mean(0).abs() < claimed / 2).all()
        assert ((errors.std(0) / claimed - 1).abs() < 0.2).all(), name


def share_parts(z: torch.Tensor, J: torch.Tensor) -> dict[str, torch.Tensor]:
    return split(z, torch.einsum("bts,nbs->nbt", J, z))


def test_the_dyson_series_of_one_operator(wide: Callable[..., ms.Model]) -> None:
    model, v = wide("gemma2"), vectors(3, 32)

    def at(source: Any, target: Any, **options: Any) -> Propagator:
        return Propagator(model, ragged(), source, target, source_pos=5, target_pos=5, **options)

    whole = dyson(model, ragged(), vectors={"v": v}, layers=1, random=1, pos=5)
    series = at(("resid_pre", 1), ("resid_post", 2)).dyson(vectors={"v": v}, random=1)
    for name in ("share", "size", "missing"):
        np.testing.assert_allclose(series[name], whole[name].sel(layer=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(series["arrives"], whole["arrives"].sel(layer=1), rtol=1e-9)
    # From within a block to within a later one: by listed paths.
    for unit, hooks, places in [
        ("block", False, [("resid_mid", 0), ("resid_pre", 1), ("resid_pre", 2), ("resid_mid", 2)]),
        ("half", True, ["embed", ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1)]),
        ("half", False, ["embed", ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1)]),
        ("block", False, ["embed", ("resid_pre", 0)]),
    ]:
        eye = torch.eye(32, dtype=torch.float64)
        added = [at(*pair, hooks=True).dense() - eye for pair in itertools.pairwise(places)]
        terms = torch.zeros(len(places), 3, 32, dtype=torch.float64)
        for passed in itertools.product([False, True], repeat=len(added)):
            moved = v
            for through, step in zip(passed, added, strict=True):
                moved = torch.einsum("bts,bs->bt", step, moved) if through else moved
            terms[sum(passed)] += moved
        J = at(places[0], places[-1], hooks=hooks)
        found, arrived = J.dyson(vectors={"v": v}, random=0, unit=unit), J.mv(v)
        size = arrived.norm(dim=-1)
        assert found["share"].dims == ("order", "vector", "prompt") and found["share"].shape == (len(places), 1, 3)
        close(torch.from_numpy(found["share"].values[:, 0]), (terms * arrived).sum(-1) / size**2, 1e-9)
        close(torch.from_numpy(found["size"].values[:, 0]), terms.norm(dim=-1) / size, 1e-9)
        assert float(found["missing"].isel(order=-1).max()) < 1e-9
    np.testing.assert_allclose(at(SOURCE, SOURCE).dyson()["share"], np.ones((1, 8, 3)))


def test_the_model_and_its_padding_are_left_alone(zoo_models: Callable[..., ms.Model]) -> None:
    model, prompts = zoo_models("llama"), ragged()
    left = prompts.padded("left")
    v = vectors(3, 32).float()
    got = [Propagator(model, each, SOURCE, TARGET).mv(v) for each in (prompts, left)]
    assert torch.equal(*got)
    for row in range(3):
        alone = Propagator(model, prompts[row].padded("right"), SOURCE, TARGET).mv(v[row])
        close(alone, got[0][row : row + 1], 1e-5)
    assert all(parameter.grad is None for parameter in model.hooked.parameters())


class Halted(ms.Objective):
    def reads(self, prompts: ms.Prompts) -> torch.Tensor:
        return prompts.mask

    def __call__(self, run: ms.Run) -> torch.Tensor:
        return run.logits.detach().sum((1, 2))

    def __repr__(self) -> str:
        return "Halted()"


def test_errors_say_what_to_do(wide: Callable[..., ms.Model]) -> None:
    model, prompts = wide("llama"), ragged()

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ms.MechsteerError, match=match):
            Propagator(model, prompts, *arguments, **options)

    refused("comes after the target .* Swap them", TARGET, SOURCE)
    refused("is off the path.*embed, resid_pre, resid_mid and resid_post", ("z", 0), TARGET)
    refused("is off the path", SOURCE, ("mlp_out", 1))
    refused("layers 0 to 2", ("resid_pre", 3), "logits")
    refused("position 5 of prompt 0 and the target at 4: no position attends to later", SOURCE, TARGET,
            source_pos=5, target_pos=4)  # fmt: skip
    refused("position 11 is outside prompt 1", SOURCE, TARGET, source_pos=11)
    refused(r"both say where", ms.Site("resid_pre", 0, pos=1), TARGET, source_pos=2)
    refused(r"Halted\(\) has no gradient", SOURCE, Halted())
    refused("target_pos=3 goes with a site", SOURCE, ms.LogitGap(5, 7), target_pos=3)
    early = ms.Projection(ms.Direction(torch.ones(32), site=ms.Site("resid_pre", 1)), at="last")
    refused("does not depend on .*Choose an earlier source", ("resid_mid", 1), early)
    J = Propagator(model, prompts, SOURCE, TARGET)
    with pytest.raises(ms.MechsteerError, match=r"mv got a tensor of shape \[2, 32\]. Pass \[32\], \[3, 32\]"):
        J.mv(torch.zeros(2, 32))
    with pytest.raises(ms.MechsteerError, match="rmv got a vector with NaN or infinity"):
        J.rmv(torch.full((32,), torch.nan))
    with pytest.raises(ms.MechsteerError, match="k goes from 1 to 32"):
        J.svd(33)
    with pytest.raises(ms.MechsteerError, match="probes=1 give no standard error"):
        J.trace(probes=1)
    with pytest.raises(ms.MechsteerError, match="trace needs a square map, and this one is 128 x 32"):
        Propagator(model, prompts, SOURCE, "logits").trace()
    with pytest.raises(
        ms.MechsteerError, match="no share of the identity: it leads to 128 numbers, and the stream has"
    ):
        Propagator(model, prompts, SOURCE, "logits").identity_share()
    with pytest.raises(ms.MechsteerError, match="random=0 and spectrum=16: pass at least 1 of each"):
        J.identity_share(random=0)
    with pytest.raises(ms.MechsteerError, match="probes=1 give no standard error"):
        J.identity_share(probes=1)
    with pytest.raises(ms.MechsteerError, match=r"'v' has shape \[2, 32\]"):
        J.identity_share(vectors={"v": torch.ones(2, 32)})
    with pytest.raises(ms.MechsteerError, match="no Dyson series: its target is not on the residual stream"):
        Propagator(model, prompts, SOURCE, "logits").dyson()
    with pytest.raises(
        ms.MechsteerError, match=r"leads from positions \[2, 2, 2\] to \[11, 8, 9\], and the Dyson series"
    ):
        Propagator(model, prompts, SOURCE, TARGET, source_pos=2).dyson()
    with pytest.raises(ms.MechsteerError, match="unit='layer' does not exist"):
        J.dyson(unit="layer")
    assert repr(J).startswith("Propagator(") and "32 x 32" in repr(J)


def test_a_run_with_nan_has_no_jacobian(zoo_folders: dict[str, Path]) -> None:
    model = ms.load_model(zoo_folders["llama"], device="cpu")
    with torch.no_grad():
        model.hooked.blocks[1].mlp.W_out.fill_(torch.nan)
    with pytest.raises(ms.MechsteerError, match="a value that is infinite or NaN"):
        Propagator(model, ragged(), SOURCE, TARGET, hooks=True)
