"""Figures show the numbers of a Result, where they belong and under their names, and hostile text as text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from browser import console_and_network, dump_dom, needs_browser

from mechsteer import plots
from mechsteer.errors import MechsteerError
from mechsteer.plots import plain
from mechsteer.plots.labels import hovers
from mechsteer.result import Result, bootstrap_ci

HOSTILE = "<script>alert(1)</script>"


def gaps(**dims: int) -> Result:
    """Random numbers of both signs with the given dimensions; layer and alpha have coordinates."""
    values = np.random.default_rng(0).normal(size=tuple(dims.values()))
    coords = {name: np.linspace(-2.0, 2.0, dims[name]) for name in ("alpha",) if name in dims}
    coords |= {name: np.arange(dims[name]) for name in ("layer",) if name in dims}
    return Result(xr.Dataset({"gap": (tuple(dims), values)}, coords))


# --- lines and maps ---


def drawn(figure: go.Figure, kind: type) -> list[Any]:
    return [trace for trace in figure.data if isinstance(trace, kind)]


def test_one_dimension_is_a_line() -> None:
    result = gaps(layer=4)
    (line,) = drawn(result.plot(), go.Scatter)
    np.testing.assert_array_equal(line.y, result["gap"])
    np.testing.assert_array_equal(line.x, range(4))
    figure = result.plot(title="Where")
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("layer", "gap")
    assert figure.layout.title.text == "Where"


def test_prompts_become_a_mean_with_its_interval() -> None:
    result = gaps(prompt=30, layer=4)
    low, high, line = drawn(result.plot("gap"), go.Scatter)
    np.testing.assert_allclose(line.y, result["gap"].mean("prompt"))
    np.testing.assert_allclose([low.y, high.y], bootstrap_ci(result["gap"].values, seed=0))
    assert (low.fill, high.fill) == (None, "tonexty")
    assert "95 % interval" in line.hovertext[0]
    (alone,) = drawn(gaps(prompt=1, layer=4).plot(), go.Scatter)
    assert "interval" not in alone.hovertext[0]
    (points,) = drawn(gaps(prompt=5).plot(), go.Scatter)
    assert points.mode == "markers" and len(points.x) == 5


def test_alpha_runs_along_x_with_a_line_for_each_other_cell() -> None:
    result = gaps(layer=3, alpha=5)
    lines = drawn(result.plot(), go.Scatter)
    assert [line.name for line in lines] == ["layer=0", "layer=1", "layer=2"]
    for layer, line in enumerate(lines):
        np.testing.assert_array_equal(line.x, result["alpha"])
        np.testing.assert_array_equal(line.y, result["gap"].sel(layer=layer))
    assert len(drawn(gaps(prompt=2, layer=3, head=2, alpha=4).plot(), go.Scatter)) == 3 * 6


def test_along_draws_lines_where_a_heatmap_would_be() -> None:
    result = gaps(prompt=30, layer=3, pos=2)
    low, high, line, *others = drawn(result.plot(along="layer"), go.Scatter)
    np.testing.assert_allclose(line.y, result["gap"].sel(pos=0).mean("prompt"))
    np.testing.assert_allclose([low.y, high.y], bootstrap_ci(result["gap"].sel(pos=0).values, seed=0))
    assert line.name == "pos=0" and others[-1].name == "pos=1" and len(others) == 3
    with pytest.raises(MechsteerError, match=r"along='head' is no dimension of 'gap' that lines could follow, which "):
        result.plot(along="head")
    with pytest.raises(MechsteerError, match=r"facet='pos' does not go with 'gap'"):
        result.plot(along="layer", facet="pos")


def test_numbers_that_are_names_stand_in_their_order() -> None:
    ranked = xr.Dataset({"gap": ("feature", [3.0, 2.0, 1.0])}, {"feature": [766, 2, 509]})
    named = Result(ranked.assign_coords(feature_token=("feature", ["766", "2", "509"]))).plot()
    (line,) = drawn(named, go.Scatter)
    np.testing.assert_array_equal(line.x, [0, 1, 2])
    assert named.layout.xaxis.ticktext == ("766", "2", "509")
    np.testing.assert_array_equal(drawn(Result(ranked).plot(), go.Scatter)[0].x, [766, 2, 509])


@pytest.mark.parametrize(
    ("dim", "coords", "joined"),
    [
        ("push", {"push": ["prefix", "vector", "random"]}, False),
        ("prefix", {"prefix": ["Talk only about cats.", "Nothing but trains.", "Be calm."]}, False),
        ("feature", {"feature": [766, 2, 509], "feature_token": ("feature", ["766", "2", "509"])}, False),
        ("token", {"token": [3, 7, 1504], "text": ("token", [" a", " b", " c"])}, False),
        ("layer", {"layer": [0, 1, 2]}, True),
        ("pos", {"pos": ["0", "user", "-1"]}, True),
        ("pos", {"pos": [0, 1, 2], "token": ("pos", ["<s>", " cat", " cat"])}, True),
    ],
)
def test_lines_join_what_has_an_order_and_names_get_points(dim: str, coords: dict, joined: bool) -> None:
    values = np.random.default_rng(0).normal(size=(3, 20, 2))
    result = Result(xr.Dataset({"gap": ((dim, "prompt", "seed"), values)}, coords))
    figure = result.plot(along=dim)
    means = [trace for trace in figure.data if trace.hovertext is not None]
    assert len(means) == 2 and {trace.mode for trace in means} == {"lines+markers" if joined else "markers"}
    low, high = bootstrap_ci(values.transpose(1, 0, 2)[:, :, 1], seed=0)
    if joined:
        assert len(figure.data) == 6 and figure.layout.scattermode is None
        return
    # Bars end where bands would, and the points of one name stand side by side.
    assert len(figure.data) == 2 and figure.layout.scattermode == "group"
    np.testing.assert_allclose(means[1].y + means[1].error_y.array, high)
    np.testing.assert_allclose(means[1].y - means[1].error_y.arrayminus, low)
    assert all("95 % interval" in text for text in means[1].hovertext)


def test_points_of_one_colour_differ_in_their_shapes() -> None:
    data = xr.Dataset({"gap": (("push", "seed"), np.ones((2, 3)))}, {"push": ["a", "b"]})
    data = data.assign_coords(kind=("seed", ["x", "x", "y"]))
    marks = [(trace.marker.color, trace.marker.symbol) for trace in Result(data).plot(along="push", colour="kind").data]
    assert marks[0][0] == marks[1][0] != marks[2][0] and marks[0][1] != marks[1][1]


def test_curves_over_tokens_are_named_by_their_texts() -> None:
    result = gaps(token=2, alpha=3)
    data = result.data.assign_coords(token=[1504, 7], text=("token", [" delight", HOSTILE]))
    names = [line.name for line in drawn(Result(data).plot(), go.Scatter)]
    assert names == ["token=·delight", "token=&lt;script&gt;alert(1)&lt;/scrip…"]


def test_two_dimensions_are_a_heatmap_of_the_mean() -> None:
    result = gaps(prompt=3, layer=4, pos=2)
    figure = result.plot()
    (heat,) = drawn(figure, go.Heatmap)
    np.testing.assert_allclose(heat.z, result["gap"].mean("prompt"))
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("layer", "pos")
    assert heat.zmid == 0 and "layer: 2<br>pos: 1<br>gap: " in heat.hovertext[2][1].replace("\n", "")
    assert drawn(Result(abs(result.data)).plot(), go.Heatmap)[0].zmid is None


def test_labels_are_text_in_every_place() -> None:
    tokens = [HOSTILE, "12", "2024-01-01", "\n", "same", "same", "$x^2$", "&lt;"]
    values = np.arange(16.0).reshape(2, 8) - 5
    for dims in (("alpha", "token"), ("layer", "token")):
        data = xr.Dataset({"<b>gap": (dims, values)}, {"token": tokens, "note": ("token", tokens)})
        figure = Result(data).plot()
        shown = str(figure.to_dict())
        assert "<script" not in shown and "<b>" not in shown and "$" not in shown
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    axis = figure.layout.xaxis
    assert list(axis.tickvals) == list(range(8))
    assert axis.ticktext == tuple(map(plain, tokens))
    assert "note: same" in figure.data[0].hovertext[1][5]


def test_plain_text() -> None:
    assert plain("a<b>&amp;$\n\u202e\ud800é") == "a&lt;b&gt;&amp;amp;&#36;\\n\\u202e\\ud800é"


def test_long_axes_are_thinned_out() -> None:
    axis = gaps(layer=3, pos=500).plot().layout.xaxis
    assert len(axis.tickvals) <= 60 and axis.tickvals[1] == float(axis.ticktext[1])


def effects(*dims: str, **more: Any) -> Result:
    """A patching map with tokens along its places."""
    sizes = {"site": 3, "layer": 2, "head": 4, "pos": 3, "dest": 3, "src": 3, "prompt": 5}
    shape = tuple(sizes[dim] for dim in dims)
    words = np.array(["<s>", " cat", " cat"], dtype=object)
    coords: dict[str, Any] = {"site": ["resid_pre", "attn_out", "mlp_out"], "layer": [0, 1], "pos": [0, 1, 2]}
    coords = {name: values for name, values in coords.items() if name in dims}
    names = {"pos": "token", "dest": "dest_token", "src": "src_token"}
    coords |= {names[dim]: (dim, words) for dim in dims if dim in names}
    arrays = {"base": 1.0, "effect": (dims, np.random.default_rng(1).normal(size=shape)), **more}
    return Result(xr.Dataset(arrays, coords))


def test_ticks_are_tokens_and_hovering_tells_their_positions() -> None:
    figure = effects("layer", "pos", "prompt").plot()
    assert figure.layout.xaxis.ticktext == ("&lt;s&gt;", "·cat", "·cat")  # twice the same stays twice
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]
    assert figure.data[0].hovertext[1][2].startswith("layer: 1<br>pos: 2<br>token:  cat<br>effect: ")
    figure = effects("dest", "src").plot()
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext == ("&lt;s&gt;", "·cat", "·cat")
    figure = effects("pos").plot()
    assert figure.layout.xaxis.ticktext == ("&lt;s&gt;", "·cat", "·cat")
    long = Result(xr.Dataset({"effect": (("layer", "pos"), np.ones((2, 1)))}, {"token": ("pos", ["a" * 99])}))
    assert long.plot().layout.xaxis.ticktext == ("a" * 23 + "…",)
    assert "a" * 99 in long.plot().data[0].hovertext[0][0]


def test_hovering_tells_each_cell_its_own() -> None:
    data = effects("layer", "pos", "head").data.assign_coords(chosen=(("head", "layer"), np.eye(4, 2) > 0), at="here")
    array = data["effect"].assign_coords({dim: data[dim] for dim in ("layer", "pos", "head")})
    texts = hovers(array)
    for index in np.ndindex(array.shape):  # the naive way: cell by cell
        cell = array.isel(dict(zip(array.dims, index, strict=True)))
        lines = set(texts[index].replace("&lt;", "<").replace("&gt;", ">").split("<br>"))
        told = {f"{name}: {value.values[()]}" for name, value in cell.coords.items()}
        assert lines == told | {f"effect: {float(cell):.4g}"}
    assert texts[0, 0, 0].startswith("layer: 0<br>pos: 0<br>head: 0<br>")


def test_a_map_of_several_arrays_is_drawn_by_its_effect() -> None:
    result = effects("layer", "pos", "prompt")
    np.testing.assert_allclose(drawn(result.plot(), go.Heatmap)[0].z, result["effect"].mean("prompt"))
    mean = Result(result.data.rename(effect="mean").mean("prompt"))
    np.testing.assert_allclose(drawn(mean.plot(), go.Heatmap)[0].z, mean["mean"])


@pytest.mark.parametrize(
    ("dims", "facet", "titles"),
    [
        (("layer", "site", "pos"), None, ["site=resid_pre", "site=attn_out", "site=mlp_out"]),
        (("head", "dest", "src", "prompt"), None, ["head=0", "head=1", "head=2", "head=3"]),
        (("layer", "head", "pos"), "head", ["head=0", "head=1", "head=2", "head=3"]),
    ],
)
def test_a_third_dimension_is_drawn_as_maps_on_one_scale(dims: tuple, facet: str | None, titles: list) -> None:
    result = effects(*dims)
    figure = result.plot(facet=facet)
    assert [note.text for note in figure.layout.annotations] == titles
    maps, array = drawn(figure, go.Heatmap), result["effect"]
    dim = titles[0].split("=")[0]
    array = array.mean("prompt") if "prompt" in dims else array
    for at, each in enumerate(maps):
        np.testing.assert_allclose(each.z, array.isel({dim: at}))
        assert each.hovertext[0][0].endswith(f"effect: {each.z[0][0]:.4g}")
    largest = float(abs(array).max())
    assert {(each.zmin, each.zmax, each.zmid) for each in maps} == {(-largest, largest, 0.0)}
    assert [each.showscale for each in maps] == [True] + [False] * (len(maps) - 1)
    assert {axis.matches for axis in figure.select_xaxes()} == {None, "x"}
    assert {axis.matches for axis in figure.select_yaxes()} == {None, "y"}


def test_maps_that_do_not_fill_a_row_keep_their_labels() -> None:
    result = gaps(head=4, layer=3, pos=25)  # two maps side by side
    figure = Result(result.data.isel(head=slice(3))).plot()
    axes = list(figure.select_xaxes())
    assert len(axes) == 3
    assert [axis.showticklabels for axis in axes] == [False, True, True]
    assert [axis.showticklabels for axis in figure.select_yaxes()] == [True, False, True]


def test_colours_are_strongest_farthest_from_zero() -> None:
    def scale(values: list[float], **options: Any) -> Any:
        return Result(xr.Dataset({"a": (("x", "y"), [values])})).plot(**options).data[0]

    both = scale([-1.0, 4.0, np.nan])
    assert (both.zmin, both.zmax, both.zmid) == (-4.0, 4.0, 0.0)
    assert (scale([1.0, 4.0]).zmin, scale([1.0, 4.0]).zmax) == (1.0, 4.0)
    below = scale([-4.0, -1.0])
    assert (below.zmin, below.zmax) == (-4.0, -1.0) and below.colorscale[0][1] == "rgb(103,0,13)"  # dark
    assert scale([1.0, 2.0]).colorscale[-1][1] == "rgb(8,48,107)"  # dark
    scale([np.nan, np.inf])  # nothing finite


def test_a_limit_is_told_by_the_colour_bar() -> None:
    result = Result(xr.Dataset({"a": (("x", "y"), [[-1.0, 0.5, 90.0]])}))
    free = result.plot().data[0]
    assert free.zmax == 90.0 and free.colorbar.ticktext is None  # one outlier saturates nothing
    cut = result.plot(limit=2.0).data[0]
    assert (cut.zmin, cut.zmax) == (-2.0, 2.0)
    assert cut.colorbar.ticktext == ("-2", "0", "≥ 2")
    assert cut.colorbar.title.text == "a<br>(-1 to 90)"
    with pytest.raises(MechsteerError, match=r"limit=-1.0 is where colours end: pass a number above 0"):
        result.plot(limit=-1.0)


def test_dots_stand_on_the_cells_that_matter() -> None:
    matters = (("layer", "site", "pos"), np.arange(18).reshape(2, 3, 3) % 5 == 0)
    result = effects("site", "layer", "pos", matters=matters)
    figure = result.plot()
    dots = drawn(figure, go.Scatter)
    found = {(int(each.xaxis[1:] or 1) - 1, y, x) for each in dots for y, x in zip(each.y, each.x, strict=True)}
    assert found == {(site, layer, pos) for layer, site, pos in np.argwhere(matters[1])}
    assert [each.showlegend for each in dots] == [True, False, False] and dots[0].name == "matters"
    assert not drawn(result.sel(site="mlp_out").plot("matters"), go.Scatter)
    assert not drawn(effects("layer", "pos", matters=("layer", [True, False])).plot(), go.Scatter)
    with pytest.raises(MechsteerError, match=r"marks='base' has float64 with no dimension. Marks on 'effect' are True"):
        result.plot(marks="base")
    with pytest.raises(MechsteerError, match=r"Result holds no 'best'"):
        result.plot(marks="best")


def test_intervals_that_are_known_are_shown() -> None:
    mean, low, high = (("pos", np.arange(3.0) + shift) for shift in (0.0, -1.0, 1.0))
    result = Result(effects("pos").data.drop_vars("effect").assign(mean=mean, low=low, high=high))
    below, above, line = drawn(result.plot(), go.Scatter)
    np.testing.assert_array_equal([below.y, line.y, above.y], [low[1], mean[1], high[1]])
    assert line.hovertext[1].endswith("mean: 1<br>95 % interval: 0 to 2")
    maps = Result(result.data.expand_dims(layer=2)).plot()
    assert maps.data[0].hovertext[0][1].endswith("mean: 1<br>95 % interval from: 0<br>to: 2")


def test_an_interval_goes_by_the_name_of_its_array() -> None:
    arrays = {f"radius{end}": ("layer", np.arange(3.0) + shift) for end, shift in (("", 0), ("_low", -1), ("_high", 1))}
    below, above, line = drawn(Result(xr.Dataset(arrays)).plot("radius"), go.Scatter)
    np.testing.assert_array_equal(
        [below.y, line.y, above.y], [arrays[f"radius{end}"][1] for end in ("_low", "", "_high")]
    )


@pytest.mark.parametrize(("first", "kind"), [(0.1, "log"), (0.0, None)])
def test_an_axis_is_logarithmic_where_its_numbers_can_be(first: float, kind: str | None) -> None:
    alpha = xr.DataArray([first, 1.0, 10.0], dims="alpha", attrs={"scale": "log"})
    figure = Result(xr.Dataset({"off": ("alpha", np.arange(3.0))}, {"alpha": alpha})).plot("off")
    assert figure.layout.xaxis.type == kind


def test_names_and_units_are_those_of_the_attrs() -> None:
    data = gaps(prompt=3, alpha=4).data
    data["gap"].attrs.update(long_name="logit <gap>", units="nats")
    data["alpha"].attrs["units"] = "norms"
    figure = Result(data).plot()
    assert figure.layout.yaxis.title.text == figure.layout.title.text == "logit &lt;gap&gt; [nats]"
    assert figure.layout.xaxis.title.text == "alpha [norms]"


# --- one array against another ---


def test_estimates_stand_against_what_they_estimate() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(3)
    exact = rng.integers(-3, 4, size=(2, 3, 5)).astype(float)  # with ties
    estimate = exact.transpose(1, 0, 2) + rng.normal(size=(3, 2, 5))
    arrays = {"exact": (("layer", "pos", "prompt"), exact), "estimate": (("pos", "layer", "prompt"), estimate)}
    data = xr.Dataset(arrays, {"chosen": ("pos", ["a", "b", "a"]), "layer": [4, 5]})
    figure = Result(data).plot("exact", against="estimate", colour="chosen")
    equal, first, second = drawn(figure, go.Scatter)
    x, y = estimate.mean(-1).T, exact.mean(-1)
    np.testing.assert_allclose(first.x, x[:, [0, 2]].ravel())
    np.testing.assert_allclose(first.y, y[:, [0, 2]].ravel())
    np.testing.assert_allclose(second.y, y[:, 1])
    assert (first.name, second.name) == ("a", "b")
    assert second.hovertext[1] == f"layer: 5<br>pos: 1<br>chosen: b<br>exact: {y[1, 1]:.4g}<br>estimate: {x[1, 1]:.4g}"
    assert list(equal.x) == list(equal.y) == [min(x.min(), y.min()), max(x.max(), y.max())]
    rho = spearmanr(x.ravel(), y.ravel()).statistic
    assert figure.layout.title.subtitle.text == f"Spearman's ρ = {rho:.3f}, n = 6"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("estimate", "exact")


def test_points_without_both_numbers_are_left_out() -> None:
    data = xr.Dataset({"a": ("x", [1.0, np.nan, 3.0]), "b": ("x", [1.0, 2.0, 3.0]), "c": ("x", [np.nan] * 3)})
    figure = Result(data).plot("a", against="b")
    assert list(figure.data[1].x) == [1.0, 3.0] and not figure.data[1].showlegend
    assert "n = 2" in figure.layout.title.subtitle.text
    flat = Result(data.fillna(0.0)).plot("c", against="b")
    assert flat.layout.title.subtitle.text == "no rank correlation: one side is constant, n = 3"
    with pytest.raises(MechsteerError, match=r"'c' and 'b' have no cell in which both are finite"):
        Result(data).plot("c", against="b")


def test_what_has_no_place_against_another() -> None:
    data = xr.Dataset({"a": ("x", np.arange(30.0)), "b": 1.0, "c": ("y", [1.0])})
    with pytest.raises(
        MechsteerError, match=r"against='b' has no dimension, and 'a' has x. Pass two arrays of the same"
    ):
        Result(data).plot("a", against="b")
    with pytest.raises(
        MechsteerError, match=r"colour='c' has y, and 'a' has x. Pass a coordinate or an array of these"
    ):
        Result(data).plot("a", against="a", colour="c")
    with pytest.raises(MechsteerError, match=r"colour='a' has 30 values; points have up to 20 colours"):
        Result(data).plot("a", against="a", colour="a")


def test_lines_of_a_kind_share_a_colour() -> None:
    result = gaps(alpha=61, layer=3)
    kinds = Result(result.data.assign_coords(kind=("layer", ["<b>", "deep", "<b>"])))
    first, second, third = drawn(kinds.plot(colour="kind"), go.Scatter)
    assert first.line.color == third.line.color != second.line.color
    assert first.line.dash == second.line.dash != third.line.dash
    assert [each.name for each in (first, second)] == ["layer=0, &lt;b&gt;", "layer=1, deep"]
    assert first.mode == "lines" and gaps(alpha=60).plot().data[0].mode == "lines+markers"


@needs_browser
@pytest.mark.parametrize("font", ["serif", "monospace"])
@pytest.mark.parametrize("facet", [None, "site"])
def test_the_title_of_an_axis_stands_beside_long_labels(font: str, facet: str | None, tmp_path: Path) -> None:
    names = [f"Talk only about cats, {at}" for at in range(6)]
    sizes = {"prefix": 6, "layer": 5} if facet is None else {"site": 2, "prefix": 6, "layer": 5}
    figure = Result(gaps(**sizes).data.assign_coords(prefix=names)).plot()
    measure = """
      const edge = (name, side) => [...document.querySelectorAll(name)].map(each => each.getBoundingClientRect()[side]);
      document.title = `${edge(".ytitle", "right")} ${Math.min(...edge(".ytick text", "left"))}`;"""
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_width="900px")
    page = tmp_path / "page.html"
    page.write_text(f"<meta charset=utf-8><body style='font-family: {font}'>{body}<script>{measure}</script>", "utf-8")
    title = dump_dom(page).partition("<title>")[2].partition("</title>")[0]
    right, left = map(float, title.split())
    assert right < left - 3, f"the title ends at {right} and labels begin at {left}"


# --- what is refused ---


def test_what_cannot_be_drawn() -> None:
    two = Result(xr.Dataset({"a": ("x", [1.0]), "b": ("x", ["text"])}))
    with pytest.raises(MechsteerError, match=r"Result holds 2 arrays \(a, b\). Name the one to draw"):
        two.plot()
    with pytest.raises(MechsteerError, match=r"Result cannot draw 'b', which holds .* and no numbers"):
        two.plot("b")
    with pytest.raises(MechsteerError, match=r"cannot draw 'gap' with site, layer, pos, head: it draws one to three"):
        gaps(site=1, layer=2, pos=2, head=2).plot()
    with pytest.raises(MechsteerError, match=r"cannot draw 'gap' with no dimension"):
        gaps(layer=2).sel(layer=1).plot()
    with pytest.raises(MechsteerError, match=r"'gap' as 50 lines .one for each layer and pos.; it draws up to 40"):
        gaps(layer=10, pos=5, alpha=2).plot()
    with pytest.raises(
        MechsteerError, match=r"'gap' as 49 heat maps .one for each head.; it draws up to 48. Pick with"
    ):
        gaps(layer=2, pos=2, head=49).plot(facet="head")
    with pytest.raises(
        MechsteerError, match=r"facet='dest' does not go with 'gap', which has layer, pos, head besides"
    ):
        gaps(layer=2, pos=2, head=2).plot(facet="dest")
    with pytest.raises(
        MechsteerError, match=r"facet='layer' does not go with 'gap', which has layer, pos besides prompt"
    ):
        gaps(layer=2, pos=2).plot(facet="layer")
    with pytest.raises(MechsteerError, match=r"limit=2.0 is for heat maps, and 'gap' is drawn otherwise"):
        gaps(layer=2).plot(limit=2.0)
    with pytest.raises(MechsteerError, match=r"marks='matters' is for heat maps, and 'gap' is drawn otherwise"):
        gaps(layer=2, alpha=3).plot(marks="matters")
    with pytest.raises(MechsteerError, match=r"colour='layer' is for lines, and for points, which against= draws, and"):
        gaps(layer=2, pos=3).plot(colour="layer")
    with pytest.raises(MechsteerError, match=r"colour='alpha' has alpha, and 'gap' has a line for each layer. Pass a"):
        gaps(layer=2, alpha=3).plot(colour="alpha")


# --- looks ---


def test_themes_change_colours_and_nothing_else() -> None:
    figure = effects("site", "layer", "pos").plot()
    dark = plots.theme(figure, dark=True)
    assert json.loads(json.dumps(plots.DARK)) == plots.DARK
    assert dark.layout.template.layout.font.color != figure.layout.template.layout.font.color
    assert dark.data == figure.data
    assert dark.layout.xaxis.ticktext == figure.layout.xaxis.ticktext and dark.layout.height == figure.layout.height
    assert (
        figure.layout.template.to_plotly_json()["layout"] == plots.PAPER["template"]["layout"]
    )  # and nothing of plotly's
    assert plots.theme(dark).layout.template == figure.layout.template
    # Dark text would not be legible on a dark notebook; a page of a report has a ground of its own.
    assert figure.layout.template.layout.paper_bgcolor == "#ffffff"
    assert (
        dark.layout.template.layout.paper_bgcolor
        == "rgba(0,0,0,0)"
        == plots.LIGHT["template"]["layout"]["paper_bgcolor"]
    )


@needs_browser
def test_a_page_of_figures_runs_alone_and_executes_no_label(tmp_path: Path) -> None:
    import plotly

    words = np.array(["<img src=x onerror=document.title='run'>", "</script>", "$x$"], dtype=object)
    data = effects("site", "layer", "pos", matters=(("layer", "site", "pos"), np.ones((2, 3, 3), bool))).data
    figure = Result(data.assign_coords(token=("pos", words))).plot(title="<script>document.title='run'</script>")
    body = figure.to_html(full_html=False, include_plotlyjs=False)
    restyle = f"Plotly.relayout(document.querySelector('.js-plotly-plot'), {json.dumps(plots.DARK)})"
    page = tmp_path / "page.html"
    script = f"<script>{plotly.offline.get_plotlyjs()}</script>"
    page.write_text(f"<meta charset=utf-8><title>quiet</title>{script}{body}<script>{restyle}</script>", "utf-8")
    assert console_and_network(page) == ([], [])
    shown = dump_dom(page)
    assert "<title>quiet</title>" in shown
    shown = shown[shown.index('<svg class="main-svg"') :]
    assert "site=mlp_out" in shown and "&lt;/script&gt;" in shown and "$x$" in shown
    assert "rgb(230, 232, 235)" in shown  # text in the colour of DARK
