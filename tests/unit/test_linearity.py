"""The linear regime against answers known in closed form, finite differences and plain loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.propagator.linearity import first_off, linear_regime

D = zoo.D_MODEL
LAST = ms.Site("resid_post", zoo.N_LAYERS - 1)


def ragged() -> ms.Prompts:
    tokens = zoo.prompts(batch=3, n_pos=12).tolist()
    return ms.Prompts.from_ids([tokens[0], tokens[1][:9], tokens[2][:10]])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Stream(ms.Objective):
    """A function of what leaves the last block where the prompt decides."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        object.__setattr__(self, "function", function)

    def sites(self) -> tuple[ms.Site, ...]:
        return (LAST,)

    def __call__(self, run: ms.Run) -> torch.Tensor:
        rows = run.activations[LAST][torch.arange(len(run.prompts)), run.prompts.decision]
        return self.function(rows, run.example)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return "Stream()"


def stream(model: ms.Model) -> torch.Tensor:
    run = model.run(ragged(), record=[LAST], logits="none")
    return run.activations[LAST][torch.arange(3), ragged().decision]


def test_a_quadratic_objective_has_the_radius_of_its_formula(precise: Callable[..., ms.Model]) -> None:
    model, v, a, H = precise("llama"), drawn(D), drawn(D, seed=1), drawn(D, D, seed=2)
    x, u = stream(model), v / v.norm()
    quadratic = Stream(lambda rows, example: rows @ a + torch.einsum("bs,st,bt->b", rows, H, rows) / 2)
    # M(x + s u) = M(x) + s g + s^2 h / 2, so that |true / predicted - 1| = s |h / 2g|.
    g, h = a @ u + x @ (H + H.T) @ u / 2, u @ H @ u
    found = linear_regime(
        model, ragged(), measure=quadratic, directions={"v": 7 * v}, layers=2, at=-1, random=0,
        sizes=np.logspace(-5, 4, 10),
    )  # fmt: skip
    np.testing.assert_allclose(found["norm"], [x.norm(dim=-1).mean()])
    at = found.sel(layer=2, direction="v")
    np.testing.assert_allclose(at["prompt_radius"], 0.2 * (g / h).abs(), rtol=1e-6)
    assert not at["prompt_censored"].values.any()
    s = torch.from_numpy(found["length"].sel(layer=2).values)[:, None]
    np.testing.assert_allclose(at["predicted"], s * g, rtol=1e-9)
    np.testing.assert_allclose(at["true"], s * g + s**2 * h / 2, rtol=1e-6, atol=1e-9)
    together = 0.2 * (g.square().mean().sqrt() / h.abs())
    np.testing.assert_allclose(found["radius"].sel(layer=2, group="v"), together, rtol=1e-6)
    for name in ("radius", "radius_low", "radius_high"):
        np.testing.assert_allclose(found[f"relative_{name}"] * found["norm"], found[name])
    low, high = (float(found[name].sel(layer=2, group="v")) for name in ("radius_low", "radius_high"))
    assert float(at["prompt_radius"].min()) <= low < float(together) < high <= float(at["prompt_radius"].max())
    # The tolerance is the one asked for.
    half = linear_regime(
        model, ragged(), measure=quadratic, directions={"v": v}, layers=2, at=-1, random=0,
        sizes=np.logspace(-5, 4, 10), tolerance=0.05,
    )  # fmt: skip
    np.testing.assert_allclose(half["radius"], found["radius"] / 2, rtol=1e-6)


def test_random_directions_are_one_group_of_unit_vectors(precise: Callable[..., ms.Model]) -> None:
    model, a, H = precise("llama"), drawn(D, seed=1), drawn(D, D, seed=2)
    quadratic = Stream(lambda rows, example: rows @ a + torch.einsum("bs,st,bt->b", rows, H, rows) / 2)
    options: dict[str, Any] = {"measure": quadratic, "layers": [2], "at": -1, "sizes": np.logspace(-5, 4, 10)}
    found = linear_regime(model, ragged(), directions={"v": drawn(D)}, random=5, **options)
    assert list(found["direction"].values) == ["v", *(f"random {index}" for index in range(5))]
    assert list(found["group"].values) == ["v", "random"]
    # Per direction: off = s |h / 2g| on each prompt. Together: the root of the sums of squares.
    part = found.sel(layer=2, direction=[f"random {index}" for index in range(5)])
    length = found["length"].sel(layer=2)
    g = (part["predicted"] / length).isel(alpha=-1)
    h = 2 * ((part["true"] - part["predicted"]) / length**2).isel(alpha=-1)
    expected = 0.2 * np.sqrt((g**2).sum() / (h**2).sum())
    np.testing.assert_allclose(found["radius"].sel(layer=2, group="random"), expected, rtol=1e-5)
    np.testing.assert_allclose(part["prompt_radius"], 0.2 * abs(g / h), rtol=1e-5)
    again = linear_regime(model, ragged(), directions={"v": drawn(D)}, random=5, **options)
    assert again.data.identical(found.data)
    other = linear_regime(model, ragged(), directions={"v": drawn(D)}, random=5, seed=1, **options)
    assert float(abs(other["true"] - found["true"]).sel(direction="v").max()) == 0
    assert float(abs(other["true"] - found["true"]).sel(direction="random 0").max()) > 0


def test_a_linear_objective_is_linear_at_every_size(precise: Callable[..., ms.Model]) -> None:
    model = precise("gpt2")
    along = ms.Projection(ms.Direction(drawn(D), site=LAST))
    found = linear_regime(model, ragged(), measure=along, directions={"v": drawn(D, seed=3)}, layers=2, random=2)
    assert (found["censored"].values == 1).all() and (found["prompt_censored"].values == 1).all()
    np.testing.assert_allclose(found["relative_radius"], 10)
    for name in ("radius", "radius_low", "radius_high"):
        np.testing.assert_allclose(found[name], 10 * float(found["norm"][0]))
    np.testing.assert_allclose(found["true"], found["predicted"], atol=1e-9)
    # What comes after the site that is read changes nothing, as predicted.
    early = ms.Projection(ms.Direction(drawn(D), site=ms.Site("resid_pre", 1)))
    found = linear_regime(model, ragged(), measure=early, directions={"v": drawn(D)}, layers=[0, 1], random=0)
    assert (found["true"].sel(layer=0) > 0).all() and float(abs(found["true"].sel(layer=1)).max()) < 1e-12
    assert not found["predicted"].sel(layer=1).values.any() and int(found["censored"].sel(layer=1, group="v")) == 1


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize(("kind", "at"), [("resid_mid", None), ("resid_post", -2), ("mlp_out", (0, 3))])
def test_both_sides_are_a_plain_loop_with_hooks(
    kind: str, at: Any, backend: str, precise: Callable[..., ms.Model]
) -> None:
    model, prompts, gap = precise("gemma2", backend), ragged(), ms.LogitGap(5, 7)
    vectors = drawn(2, D)
    sizes = [0.001, 0.1, 3.0]
    found = linear_regime(
        model, prompts, measure=gap, directions={"v": vectors}, layers=[2, 0], kind=kind, at=at, sizes=sizes, random=1
    )
    assert found["true"].dims == ("layer", "direction", "alpha", "prompt") and found["true"].shape == (2, 2, 3, 3)
    base = gap(model.run(prompts))
    np.testing.assert_allclose(found["base"], base.detach(), rtol=1e-9 if backend == "hooked_transformer" else 1e-5)

    def change(layer: int, v: torch.Tensor, length: float) -> torch.Tensor:
        push = ms.Add(v, length, site=ms.Site(kind, layer), at=at)
        return (gap(model.run(prompts, [push])) - base).detach()

    # A bridge runs transformers' norms, which compute in fp32 whatever the weights are.
    step, tolerance = (1e-5, 1e-6) if backend == "hooked_transformer" else (3e-3, 3e-3)
    for index, layer in enumerate([0, 2]):
        u = vectors[index] / vectors[index].norm()
        got = found.sel(layer=layer, direction="v")
        slope = (change(layer, u, step) - change(layer, u, -step)) / (2 * step)
        norm = float(found["norm"].sel(layer=layer))
        for alpha in sizes:
            scale = max(1.0, float(slope.abs().max())) * alpha * norm
            here = got.sel(alpha=alpha)
            np.testing.assert_allclose(here["predicted"], slope * alpha * norm, atol=tolerance * scale)
            np.testing.assert_allclose(here["true"], change(layer, u, alpha * norm), atol=1e-5)
    # The site's own vectors, whole also where a bridge's hook point shows a part.
    whole = precise("gemma2").run(prompts, record=[ms.Site(kind, 2)], logits="none").activations[ms.Site(kind, 2)]
    chosen = {None: prompts.mask, -2: prompts.at(-2), (0, 3): prompts.at(0) | prompts.at(3)}[at]
    medians = [float(rows[keep].norm(dim=-1).sort().values[(int(keep.sum()) - 1) // 2]) for rows, keep in zip(whole, chosen, strict=True)]  # noqa: E501  # fmt: skip
    np.testing.assert_allclose(float(found["norm"].sel(layer=2)), np.mean(medians), rtol=1e-5)


def test_the_radius_is_where_a_search_on_the_model_finds_it(precise: Callable[..., ms.Model]) -> None:
    model, prompts, gap = precise("qwen3"), ragged(), ms.LogitGap(5, 7)
    v = drawn(D, seed=4)
    found = linear_regime(model, prompts, measure=gap, directions={"v": v}, layers=1, at=-1, random=0)
    base, u = gap(model.run(prompts)).detach(), v / v.norm()
    at = found.sel(layer=1, direction="v")
    slope = at["predicted"].isel(alpha=0).values / float(found["length"][0, 0])

    def off(length: float) -> np.ndarray:
        true = (gap(model.run(prompts, [ms.Add(u, length, site=("resid_post", 1), at=-1)])).detach() - base).numpy()
        return np.abs(true / (slope * length) - 1)

    radii = at["prompt_radius"].values
    assert not at["prompt_censored"].values.any() and radii.min() * 1.2 < radii.max()
    for row, radius in enumerate(radii):
        low, high = radius / 2, 2 * radius
        assert all(off(size)[row] < 0.1 for size in np.geomspace(1e-3 * radius, low, 6))
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if off(middle)[row] > 0.1 else (middle, high)
        assert abs(low / radius - 1) < 0.05
    # The curve for all prompts is the root of the sums of squares.
    square = ((found["true"] - found["predicted"]) ** 2).sum("prompt") / (found["predicted"] ** 2).sum("prompt")
    np.testing.assert_allclose(found["off"].values, np.sqrt(square.values))


def test_every_prompt_is_measured_alone_and_batches_do_not_matter(
    precise: Callable[..., ms.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gap = precise("mistral"), ms.LogitGap(5, 7)
    tokens = torch.randint(4, 100, (3, 4), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = ms.Prompts.from_ids([tokens[0], tokens[1][:2], tokens[2]]).with_completions([[5], [6, 7], [8]])
    loss, options = ms.TeacherForcedCE() + 0.1 * gap, {"directions": {"v": drawn(D)}, "random": 1, "sizes": [0.01, 1.0]}
    whole = linear_regime(model, prompts.padded("left"), measure=loss, **options)
    monkeypatch.setattr("mechsteer.gradients._TOKENS", {"cpu": 5, "cuda": 5})
    apart = linear_regime(model, prompts, measure=loss, **options)
    for name in whole.data.data_vars:
        np.testing.assert_allclose(apart[str(name)], whole[str(name)], rtol=1e-8, atol=1e-12)
    row = linear_regime(model, prompts[1:2], measure=loss, **options)
    np.testing.assert_allclose(
        row["predicted"] / row["length"], (whole["predicted"] / whole["length"]).isel(prompt=[1]), rtol=1e-8
    )
    assert np.isnan(row["radius_low"]).all() and np.isnan(row["radius_high"]).all()
    assert all(parameter.grad is None for parameter in model.hooked.parameters())


def test_frozen_parameters_make_no_difference(zoo_folders: dict[str, Path], precise: Callable[..., ms.Model]) -> None:
    frozen = ms.load_model(zoo_folders["llama"], dtype=torch.float64, device="cpu")
    frozen.hooked.requires_grad_(False)
    options: dict[str, Any] = {"measure": ms.LogitGap(5, 7), "directions": {"v": drawn(D)}, "sizes": [0.01, 1.0]}
    found = [linear_regime(model, ragged(), **options) for model in (frozen, precise("llama"))]
    assert found[0].data.identical(found[1].data)


def test_rounding_is_not_taken_for_an_error(
    zoo_models: Callable[..., ms.Model], precise: Callable[..., ms.Model]
) -> None:
    # In fp32 the smallest pushes change less than rounding does: alone, they would look 10 % off.
    gap, options = ms.LogitGap(5, 7), {"directions": {"v": drawn(D)}, "random": 0, "sizes": np.logspace(-7, 1, 33)}
    rough = linear_regime(zoo_models("llama"), ragged(), measure=gap, **options)
    exact = linear_regime(precise("llama"), ragged(), measure=gap, **options)
    assert float((rough["off"] > 0.1).isel(alpha=slice(8)).mean()) > 0.5
    assert not rough["censored"].values.any() and not exact["censored"].values.any()
    np.testing.assert_allclose(rough["radius"], exact["radius"], rtol=0.02)
    assert float(rough["resolution"].max()) > 1e6 * float(exact["resolution"].max()) > 0


def test_what_cannot_be_interpolated_is_censored(precise: Callable[..., ms.Model]) -> None:
    model, a = precise("llama"), drawn(D, seed=1)
    u = a / a.norm()
    x = stream(model) @ u
    options: dict[str, Any] = {"directions": {"a": a}, "layers": 2, "at": -1, "random": 0}
    # Off already at the smallest size; at an extremum nothing is of first order.
    steep = linear_regime(
        model, ragged(), measure=Stream(lambda rows, example: (rows @ u - x[example]).square()), **options
    )
    assert int(steep["censored"].item()) == -1 and (steep["prompt_censored"].values == -1).all()
    np.testing.assert_allclose(steep["relative_radius"], 1e-3)
    # Lost from 1 on: the radius is the last size at which there was a number.
    lost = Stream(lambda rows, example: torch.where(rows @ u - x[example] > 1, torch.nan, 1.0) * (rows @ u))
    found = linear_regime(model, ragged(), measure=lost, sizes=[1e-4, 1e-3, 10.0], **options)
    np.testing.assert_allclose(found["prompt_radius"].values, 1e-3 * float(found["norm"][0]), rtol=1e-9)
    assert not found["censored"].values.any() and np.isnan(found["true"].isel(alpha=2)).all()
    # Only one prompt is lost: those resamples that lack it end above the grid.
    one = Stream(
        lambda rows, example: torch.where((rows @ u - x[example] > 1) & (example == 0), torch.nan, 1.0) * (rows @ u)
    )
    found = linear_regime(model, ragged(), measure=one, sizes=[1e-4, 1e-3, 10.0], **options)
    norm = float(found["norm"][0])
    np.testing.assert_allclose(found["prompt_radius"].values.ravel() / norm, [1e-3, 10, 10], rtol=1e-9)
    assert found["prompt_censored"].values.ravel().tolist() == [0, 1, 1]
    np.testing.assert_allclose(
        [found["radius_low"].item() / norm, found["radius_high"].item() / norm], [1e-3, 10], rtol=1e-9
    )


def test_a_prompt_without_the_tokens_has_no_radius(precise: Callable[..., ms.Model]) -> None:
    model = precise("llama")
    completed = ms.Prompts.from_ids([[5, 6, 7], [8, 9, 10]]).with_completions([[11], []])
    found = linear_regime(
        model, completed, measure=Stream(lambda rows, example: rows.sum(1)), directions={"v": drawn(D)}, at="completion"
    )
    assert np.isnan(found["prompt_radius"].isel(prompt=1)).all()
    assert np.isfinite(found["radius"]).all()


def test_first_off_by_hand() -> None:
    sizes = np.array([1.0, 10.0, 100.0])

    def at(off: list[float], resolution: float = 0.0) -> tuple[float, int]:
        missed = np.array(off) ** 2
        radius, censored = first_off(missed, np.ones(3), np.full(3, resolution), sizes=sizes, tolerance=0.1)
        return float(radius), int(censored)

    assert at([0.01, 1.0, 2.0]) == (pytest.approx(10**0.5), 0)
    assert at([0.0, 0.2, 2.0]) == (pytest.approx(10, rel=0.03), 0)
    assert at([0.5, 0.05, 2.0]) == (1.0, -1)
    assert at([0.05, 0.06, 0.1]) == (100.0, 1)
    # It crosses twice: the first counts.
    assert at([0.02, 0.5, 0.02]) == (pytest.approx(10**0.5), 0)
    # The smallest is rounding.
    assert at([0.5, 0.05, 0.2], resolution=0.26) == (100.0, 1)
    assert at([0.5, 0.05, 0.2], resolution=0.01) == (1.0, -1)
    zero = np.zeros(3)
    assert first_off(zero, zero, zero, sizes=sizes, tolerance=0.1)[1] == 1
    assert first_off(np.array([0, 1.0, 1]), zero, zero, sizes=sizes, tolerance=0.1) == (
        pytest.approx(10**0.5, rel=0.1),
        0,
    )


def test_it_is_drawn_saved_and_loaded(precise: Callable[..., ms.Model], tmp_path: Path) -> None:
    found = linear_regime(precise("llama"), ragged(), measure=ms.LogitGap(5, 7), directions={"v": drawn(D)}, random=2)
    figure = found.sel(layer=1).plot("true").to_dict()
    named = [trace["name"] for trace in figure["data"] if trace.get("showlegend")]
    assert named == ["direction=v", "direction=random 0", "direction=random 1"]
    assert figure["layout"]["xaxis"]["title"]["text"] == "length of the push [stream's length]"
    heatmap: Any = found.plot("radius")
    assert np.shape(heatmap.data[0].z) == (3, 2)
    found.sel(group="v").plot("relative_radius")
    found.save(tmp_path / "regime.safetensors")
    assert ms.Result.load(tmp_path / "regime.safetensors").data.identical(found.data)


class Halted(ms.Objective):
    def reads(self, prompts: ms.Prompts) -> torch.Tensor:
        return prompts.mask

    def __call__(self, run: ms.Run) -> torch.Tensor:
        return run.logits.detach().sum((1, 2))

    def __repr__(self) -> str:
        return "Halted()"


def test_errors_say_what_to_do(precise: Callable[..., ms.Model]) -> None:
    model, v, gap = precise("llama"), drawn(D), ms.LogitGap(5, 7)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ms.MechsteerError, match=match):
            linear_regime(model, ragged(), **{"measure": gap, "directions": {"v": v}, **options})

    refused(r"sizes=\[1.0\]: pass at least two finite lengths above 0, ascending", sizes=[1.0])
    refused("ascending", sizes=[1.0, 0.5])
    refused("above 0", sizes=[0.0, 0.5])
    refused("random=-1 and tolerance=0.1: pass random=0 or more", random=-1)
    refused("finite tolerance above 0, such as 0.1 for 10 %", tolerance=0.0)
    refused("no directions and random=0. Pass directions, or random=1", directions={}, random=0)
    refused(r"linear_regime\(kind=\) got 'z'. Pass one of 'resid_pre'", kind="z")
    refused(r"layers=\[3\]: .* has layers 0 to 2. Choose among these, each once", layers=3)
    refused(r"layers=\[0, 0\]", layers=[0, 0])
    refused(r"linear_regime\(at=40\) touches position 40, but prompt 0 has 12 tokens", at=40)
    refused(r"'v' has shape \[2, 32\]. Pass \[32\], or \[3, 32\] for one for each layer", directions={"v": drawn(2, D)})
    refused("'v' is zero or not finite", directions={"v": 0 * v})
    refused("'random 3' has the name of the random ones. Rename it", directions={"random 3": v})
    there = ms.Direction(v, site=ms.Site("resid_post", 1), model=model.id)
    refused(r"'v' has none at Site\('resid_post', 0\). Make it at that site, or leave layer 0 out",
            directions={"v": {there.site: there}})  # fmt: skip
    other = ms.Direction(v, site=there.site, model=precise("gpt2").id)
    refused("gpt2|another model|weights", directions={"v": other})
    refused(r"Halted\(\) has no gradient at resid_post of layer 0 or later", measure=Halted())
    early = ms.Projection(ms.Direction(v, site=ms.Site("resid_pre", 1)))
    refused("has no gradient at resid_post of layer 1 or later.*Choose earlier layers", measure=early, layers=[1, 2])
    refused(r"Stream\(\) or its gradient is NaN or infinite .* without any push",
            measure=Stream(lambda rows, example: rows.sum(1) * torch.nan))  # fmt: skip
    held = ms.KLFromBaseline(model.run(ragged()[:2]))
    refused("holds values for 2 prompts, and 3 are swept", measure=held)


def test_each_way_to_say_directions(precise: Callable[..., ms.Model]) -> None:
    model = precise("llama")
    options: dict[str, Any] = {"measure": ms.LogitGap(5, 7), "random": 0, "sizes": [0.01, 0.1], "layers": [0, 2]}
    rows = drawn(2, D)
    sites = [ms.Site("resid_post", layer) for layer in (0, 2)]
    named = {
        "same": rows[:1].expand(2, -1),
        "one": rows[0],
        "own": ms.Direction(rows[0], site=sites[0], model=model.id),
    }
    found = linear_regime(model, ragged(), directions=named, **options)
    for name in ("one", "own"):
        np.testing.assert_allclose(found["true"].sel(direction=name), found["true"].sel(direction="same"), rtol=1e-9)
    each = {site: ms.Direction(row, site=site) for site, row in zip(sites, rows, strict=True)}
    found = linear_regime(model, ragged(), directions={"rows": rows, "sites": each}, **options)
    np.testing.assert_allclose(found["true"].sel(direction="rows"), found["true"].sel(direction="sites"), rtol=1e-9)
