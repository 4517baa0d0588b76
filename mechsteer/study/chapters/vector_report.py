"""What the chapter on vectors shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from mechsteer.plots import LIGHT, draw
from mechsteer.plots.themes import PALETTE
from mechsteer.result import Result
from mechsteer.study.blocks import Block, Cards, Cell, Columns, Details, Figure, Paragraph, Table
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.behaviour import WITH, WITHOUT, does_nothing
from mechsteer.study.measures import Estimate, share, two
from mechsteer.study.sources import source

PUSHED, JUDGED = "pushed", "pushed, strength chosen by the judge"
VECTORS = {
    "last prompt token": "at the last token of the prompt",
    "own completions": "over the completion, each run with its own",
    "same completion": "over the completion, both runs with the reference completion",
}
"""Where activations with the prefix and without it are averaged before they are subtracted."""
_CAPTION = (
    "The picked vector at other strengths, on held-out requests. Bands are 95 % intervals over requests; the dashed "
    "line is the picked strength, the dotted one what the prefix does."
)


_LINES = (
    "Left, the length of each kind of vector after each block; right, how alike two kinds point. Both on the requests "
    "to search on."
)


def show(findings: Findings) -> list[Block]:
    summary, data = findings.summary, {name: result.data for name, result in findings.results.items()}
    held, best = data["held_out"], best_of_each(data["grid"])
    codes = {
        name: source("vector", name, alpha=summary["picked"]["alpha"])
        for name in ("cards", "grid", "curve", "completions", "vectors")
    }
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["cards"]]),
        Paragraph(_more(summary)),
        Figure(
            _maps(data["grid"], summary["picked"]),
            "How far each vector at each layer and strength moves the cross entropy of the reference completions "
            "towards that with the prefix, in nats a token, on the requests to search on. The dot marks what was "
            "picked.",
            sources=[codes["grid"]],
        ),
        *(
            [Figure(_shares(data["curve"], summary), _CAPTION, sources=[codes["completions"]])]
            if summary["shows"]
            else []
        ),
        Figure(
            _curves(data["curve"], summary),
            _CAPTION + " Here requests count alike, whatever their length.",
            height=460,
            sources=[codes["curve"]],
        ),
        Columns(
            ("request", *map(str, held["condition"].values)),
            [
                (str(request), *map(str, texts))
                for request, texts in zip(held["prompt"].values, held["completion"].values.T, strict=True)
            ],
            caption=f"Greedy completions of held-out requests, of at most {summary['max_new_tokens']} tokens.",
            words=summary["words"],
            sources=[codes["completions"]],
        ),
        Details(
            "How this was measured, the three vectors, and all numbers",
            [
                Paragraph(_method(summary)),
                replace(_table(summary), sources=[codes["cards"]]),
                replace(_best_table(best), sources=[codes["grid"]]),
                Figure(_lines(data["vectors"]), _LINES, height=340, sources=[codes["vectors"]]),
            ],
        ),
    ]


def headline(summary: Mapping[str, Any]) -> str:
    """What came out, in sentences."""
    picked, ce = summary["picked"], {name: Estimate.of(value) for name, value in summary["ce"].items()}
    gap, closed = Estimate.of(summary["gap"]), Estimate.of(summary["closed"][PUSHED])
    added = f"One vector, times {picked['alpha']:g} and added at every token after block {picked['layer']},"
    levels = f"{ce[PUSHED]} nats a token, against {ce[WITH]} with the prefix and {ce[WITHOUT]} without it"
    if does_nothing(gap):
        sentences = [
            f"{added} leads to a cross entropy of {levels}: the prefix leaves no gap of which to close a share."
        ]
    else:
        did = "closes" if closed.low > 0 else "closes no part of the gap that is more than chance:"
        sentences = [
            f"{added} {did} {closed.percent} of the gap on held-out requests ({closed.percent_interval}): {levels}."
        ]
    if summary["shows"]:
        shows = {name: Estimate.of(value) for name, value in summary["shows"].items()}
        sentences.append(
            f"Of the completions, {shows[PUSHED].percent} then {summary['shown']} ({shows[PUSHED].percent_interval}); "
            f"with the prefix {shows[WITH].percent}, without either {shows[WITHOUT].percent}."
        )
        if JUDGED in shows:
            sentences.append(
                f"Times {summary['judged']:g}, chosen as the strength at which most completions of the requests to "
                f"search on do so, {shows[JUDGED].percent} do ({shows[JUDGED].percent_interval})."
            )
            if not does_nothing(gap):
                sentences.append(f"The gap is then {_effect(Estimate.of(summary['closed'][JUDGED]))}.")
    return " ".join(sentences)


def _effect(closed: Estimate) -> str:
    """As in "closed by 20 %"."""
    return f"widened by {closed.percent.removeprefix('-')}" if closed.value < 0 else f"closed by {closed.percent}"


def _more(summary: Mapping[str, Any]) -> str:
    picked, own = summary["picked"], {name: Estimate.of(value) for name, value in summary["own"].items()}
    sentences = [
        f"The vector is the difference of mean activations {VECTORS[picked['vector']]}, with the prefix minus without "
        f"it; its length is {picked['norm']:.3g}, {two(picked['relative_norm'])} of the mean activation's. Vector, "
        "layer and strength were picked on the requests to search on, by the cross entropy of the reference "
        "completions."
    ]
    random = Estimate.of(summary["closed_by_random"])
    if not np.isnan(random.value):
        sentences.append(
            f"With a random vector of the same length at the same place the gap is {_effect(random)} (mean of 5)."
        )
    sentences.append(
        "Side effect: what the model says without the prefix goes from a cross entropy of "
        f"{own[WITHOUT]} nats a token to {own[PUSHED]} under the push, and to {own[WITH]} under the prefix."
    )
    said = [f"{Estimate.of(value)} {name}" for name, value in summary["said"].items()]
    sentences.append(
        f"To the model with the prefix, what is said costs {_and(said)} (nats a token, mean over held-out requests): "
        "much more under a push than with the prefix means that the push breaks the text."
    )
    if picked["edge"]:
        sentences.append("The strength picked is the largest that was tried: a larger one may do better.")
    return " ".join(sentences)


def _and(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    picked, closed = summary["picked"], Estimate.of(summary["closed"][PUSHED])
    where = f"times {picked['alpha']:g}, after block {picked['layer']}"
    cards = []
    if not np.isnan(closed.value):
        cards.append(("gap closed by one vector", closed.percent, f"{where}; {closed.percent_interval}"))
    for name in summary["closed"] if summary["shows"] else ():
        found = Estimate.of(summary["shows"][name])
        strength = picked["alpha"] if name == PUSHED else summary["judged"]
        cards.append(
            (
                f"completions that {summary['shown']}, pushed",
                found.percent,
                f"times {strength:g}; {found.percent_interval}",
            )
        )
    found = Estimate.of(summary["ce"][PUSHED])
    cards.append(("cross entropy, pushed", f"{found} nats", f"a token; {found.interval}"))
    return cards


def _method(summary: Mapping[str, Any]) -> str:
    text = (
        "A push adds alpha times the vector, as it is, to the residual stream after one block, at every token of the "
        "prompt and of the completion. The cross entropy is that of the first chapter: of the reference completions, "
        "here after the requests alone. The gap is what lies between it with and without the prefix, and the share "
        "closed is pooled over requests by the same weights. Intervals are 95 % over held-out requests, for the push "
        "as it was picked: percentile bootstrap, and Wilson's for shares of completions. The cross entropy of what is "
        "said, under the model with the prefix and without the push, is low where the pushed model says what the "
        "prefixed one might, and high where it stammers."
    )
    if summary["judged"] is not None:
        text += (
            " The strength chosen by the judge is the one on the curve under which most completions of the requests to "
            "search on show the behaviour; among equals, the one whose completions are likeliest with the prefix."
        )
    return text


def _table(summary: Mapping[str, Any]) -> Table:
    header = ["held-out requests", "n", "cross entropy (nats a token)", "95 % interval", "gap closed"]
    header += ["share that shows it", "95 % interval"] if summary["shows"] else []
    rows: list[list[Cell]] = []
    for name, stored in summary["ce"].items():
        ce, closed = Estimate.of(stored), summary["closed"].get(name)
        share_closed = None if closed is None or closed["value"] is None else Estimate.of(closed).percent
        row: list[Cell] = [name, ce.n, ce.value, f"{ce.low:.3f} to {ce.high:.3f}", share_closed]
        if summary["shows"]:
            found = Estimate.of(summary["shows"][name])
            row += [found.percent, f"{100 * found.low:.0f} to {100 * found.high:.0f} %"]
        rows.append(row)
    return Table(header, rows)


def pooled(grid: xr.Dataset) -> xr.DataArray:
    """Cross entropy [vector, layer, alpha] of the requests to search on, pooled by their weights."""
    weight = grid["weight"]
    return (grid["ce"] * weight).sum("prompt") / weight.sum()


def best_of_each(grid: xr.Dataset) -> list[tuple[str, int, float, float]]:
    """Vector, layer, alpha and pooled cross entropy of the best push with each kind of vector."""
    ce = pooled(grid).sel(alpha=grid["alpha"] > 0)
    found = []
    for name in map(str, ce["vector"].values):
        part = ce.sel(vector=name)
        best = part.isel(part.argmin(...))  # type: ignore[arg-type]
        found.append((name, int(best["layer"]), float(best["alpha"]), float(best)))
    return found


def _best_table(best: Sequence[tuple[str, int, float, float]]) -> Table:
    rows = [(f"{name}: {VECTORS[name]}", layer, alpha, ce) for name, layer, alpha, ce in best]
    header = ("mean activations", "best layer", "best alpha", "cross entropy (nats a token)")
    return Table(header, rows, "The best push with each vector, on the requests to search on.")


def _maps(grid: xr.Dataset, picked: Mapping[str, Any]) -> go.Figure:
    ce = pooled(grid)
    closer = (ce.sel(alpha=0.0, drop=True) - ce).assign_attrs(long_name="closer to the prefix", units="nats")
    here = [closer[name] == picked[name] for name in ("vector", "layer", "alpha")]
    # Under the name of alpha, strengths would be drawn along lines.
    data = xr.Dataset({"closer": closer, "picked": here[0] & here[1] & here[2]}).rename(alpha="strength")
    data["strength"].attrs["long_name"] = "alpha"
    # Strong pushes do so much harm that they would leave no colour for the rest.
    most = max(float(closer.max()), 1e-3)
    return draw(Result(data), "closer", facet="vector", marks="picked", limit=most, title="Where the vectors act")


def _shares(curve: xr.Dataset, summary: Mapping[str, Any]) -> go.Figure:
    held = curve.sel(prompt=curve["split"] == "held-out")
    found = [share(row) for row in held["shows"].transpose("alpha", "prompt").values]
    ends = {name: ("alpha", [100 * getattr(each, end) for each in found]) for name, end in _ENDS.items()}
    data = xr.Dataset(ends, coords={"alpha": held["alpha"].values})
    data["mean"].attrs |= {"long_name": "completions", "units": "%"}
    figure = draw(Result(data), "mean", title=f"Completions that {summary['shown']}")
    figure.add_hline(y=100 * Estimate.of(summary["shows"][WITH]).value, line={"dash": "dot"})
    figure.add_vline(x=summary["picked"]["alpha"], line={"dash": "dash"})
    return figure.update_yaxes(range=[-2, 102])


_ENDS = {"mean": "value", "low": "low", "high": "high"}
_TEXTS = {
    "reference": "what it says with the prefix",
    "own": "what it says without prefix and push",
    "said": "what it says under the push, scored with the prefix",
}


def _curves(curve: xr.Dataset, summary: Mapping[str, Any]) -> go.Figure:
    held = curve.sel(prompt=curve["split"] == "held-out").drop_vars("split")
    texts = xr.DataArray(list(_TEXTS.values()), dims="text", name="text")
    ce = xr.concat([held[name] for name in _TEXTS], dim=texts).assign_attrs(
        long_name="cross entropy", units="nats a token"
    )
    figure = draw(Result(xr.Dataset({"ce": ce})), "ce", title="Cross entropy under the push")
    figure.for_each_trace(lambda trace: trace.update(name=(trace.name or "").removeprefix("text=")))
    figure.add_hline(y=Estimate.of(summary["ce"][WITH]).value, line={"dash": "dot"})
    figure.add_vline(x=summary["picked"]["alpha"], line={"dash": "dash"})
    return figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"}).update_yaxes(
        rangemode="tozero"
    )


def _lines(vectors: xr.Dataset) -> go.Figure:
    """Lengths beside the mean activation's, and cosines between the kinds of vector, by layer."""
    titles = ["length, as a share of the mean activation's", "cosine between vectors"]
    figure = make_subplots(1, 2, subplot_titles=titles)
    names, layers = list(map(str, vectors["vector"].values)), vectors["layer"].values
    pairs = [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    lengths = {name: vectors["relative_norm"].sel(vector=name) for name in names}
    cosines = {" and ".join(pair): vectors["cosine"].sel(vector=pair[0], other=pair[1]) for pair in pairs}
    for column, group in ((1, lengths), (2, cosines)):
        for place, (name, values) in enumerate(group.items()):
            style = {"color": PALETTE[place + 3 * (column - 1)], "dash": ("solid", "dash")[column - 1]}
            figure.add_scatter(
                x=layers, y=values.values, mode="lines+markers", name=name, line=style, row=1, col=column
            )
    figure.update_layout(LIGHT, legend={"orientation": "h", "y": -0.25, "yanchor": "top"})
    figure.update_xaxes(title={"text": "layer"}, dtick=max(1, len(layers) // 12))
    return figure.update_yaxes(rangemode="tozero")
