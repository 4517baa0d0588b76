"""How the chapter "How it travels" is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import xarray as xr

from mechsteer.plots.lines import lines
from mechsteer.result import Result
from mechsteer.study.blocks import Block, Cards, Details, Figure, Heading, Paragraph, Table
from mechsteer.study.chapter import Findings
from mechsteer.study.curves import estimate_lines, in_view, named_lines
from mechsteer.study.measures import Estimate, two
from mechsteer.study.sources import source

# Within this of c = 1 and rest = 0 a Jacobian is called nearly the identity.
_MOSTLY = 0.5


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.travel.measure`."""
    summary, results = findings.summary, findings.results
    layers, entry = summary["layers"], summary["entry"]
    codes = {
        name: source("travel", name, entry=entry, first=summary["dyson"][0]["layer"])
        for name in ("cards", "pushes", "predicted", "regime", "identity", "gain", "dyson", "flow", "rank")
    }
    moved = {
        "put in place": summary["change"]["own"], "one mean vector for all": summary["change"]["mean"],
        "random, as long": summary["change"]["random"], "foretold by the gradient": summary["predicted"],
        "foretold by the identity": summary["free"],
    }  # fmt: skip
    # Of few requests the band of random vectors alone can be several times as high as all that is measured.
    view, cut = in_view(moved, units="%") or (None, "")
    radius = [codes["regime"]] if entry in summary["regime"]["layers"] else []
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["cards"], codes["predicted"], codes["identity"]]),
        Paragraph(_fork(summary, results["pushes"].data)),
        Heading("Where the push is, and whether a gradient foretells it"),
        Paragraph(_linear(summary)),
        Figure(
            _curves(
                moved, layers, "before layer", "gap moved", "Share of the gap's change", percent=True
            ).update_yaxes(range=view),
            "What the prefix adds to the stream at the fork before one layer, put there in runs without the prefix: "
            "how much of the logit gap's whole change that brings about, and how much two linear predictions say. "
            f"Bands are 95 % intervals over {summary['n']} held-out requests. {cut}".strip(),
            sources=[codes["pushes"], codes["predicted"]],
        ),
        Figure(
            _scatter(results["pushes"]),
            "The same for each request: predicted by the gradient against the truth, in logits. " + _requests(summary),
            sources=[codes["predicted"]],
        ),
        Figure(
            _curves(
                {
                    "radius along the mean push": summary["regime"]["prefix"],
                    "radius along random directions": summary["regime"]["random"],
                    "length of the mean push": _exact(summary["regime"]["length"], summary["n"]),
                },
                summary["regime"]["layers"], "before layer", "length / stream's length", "The linear regime",
            ).update_yaxes(type="log", dtick=1),
            "The length from which on the gradient's prediction of the gap is 10 % off, beside the length of the mean "
            "push. " + _regime(summary),
            sources=radius,
        ),
        Heading("The identity"),
        Paragraph(_identity(summary)),
        Figure(
            _curves(
                {"c of J = c I + R": summary["identity"]["c"]["end"],
                 "rest |R| / |J|": summary["identity"]["rest"]["end"],
                 "rest of one block": summary["identity"]["rest"]["block"],
                 "rest, norm's scale taken out": summary["identity"]["rest"].get("unscaled", [])},
                layers, "from before layer", "", "From a layer to the end: c = 1 and rest = 0 is the identity",
            ),
            "The Jacobian of the residual stream at the fork, to the end of the last block (or of the layer's own, or "
            f"on through the final norm without its scale). Mean over {summary['n_jacobians']} prompts.",
            sources=[codes["identity"]],
        ),
        Figure(
            _curves(
                {"attention": summary["gain"]["attn"], "MLP": summary["gain"]["mlp"]},
                layers, "layer", "|dF| / sqrt(d)", "What one half of a block adds; the identity beside it has 1",
            ),
            "Root mean square gain of a random push through what attention or MLP adds to the stream at the fork. "
            + _largest(summary),
            sources=[codes["gain"]],
        ),
        Heading("How many blocks act on it"),
        Paragraph(_orders(summary)),
        Figure(
            _series(results["dyson"].data),
            "Terms of the Dyson series of the prefix's own delta: order 0 is the push itself, order n what n blocks "
            "made of it one after the other. All shares add up to 1; single ones can be negative or above 1. Mean over "
            f"{summary['n_jacobians']} prompts.",
            sources=[codes["dyson"]],
        ),
        Heading("From position to position"),
        Paragraph(_positions(summary)),
        Figure(
            Result(_carried(results["flow"].data)).plot(
                "carried", title="Carried by attention to other tokens", limit=100.0
            ),
            "Of random pushes at a token of the prefix before a layer, the share of their squared length at the end "
            f"that stands at other tokens, in percent; mean over {summary['n_jacobians']} prompts.",
            sources=[codes["flow"]],
        ),
        Heading("How many directions"),
        Paragraph(_rank(summary)),
        Figure(
            _curves(
                {"directions of the requests to search on": summary["rank"]["found"],
                 "random directions": summary["rank"]["random"]},
                summary["rank"]["k"], "number of directions k", "gap moved",
                f"What is left before layer {summary['entry']} in k directions", percent=True,
            ),
            "The push of each held-out request, projected on the k directions along which those of the requests to "
            "search on are longest.",
            sources=[codes["rank"]],
        ),
        Details(
            "How this was measured, and numbers",
            [Paragraph(_method(summary)), replace(_table(summary), sources=[codes["cards"]])],
        ),
    ]  # fmt: skip


def headline(summary: Mapping[str, Any] | Any) -> str:
    """What came out, in sentences."""
    entry, at = summary["entry"], summary["layers"].index(summary["entry"])
    own, mean = (Estimate.of(summary["change"][name][at]) for name in ("own", "mean"))
    straight, rest = Estimate.of(summary["predicted"][at]), Estimate.of(summary["identity"]["rest"]["end"][at])
    brings = (
        f"What the prefix adds to the residual stream before layer {entry}, put in place at the one token where the "
        f"completions part, brings about {own.percent} of the prefix's whole change of the logit gap "
        f"({own.percent_interval}); one mean vector for all requests brings about {mean.percent}."
    )
    first = next((layer for layer, length in zip(summary["layers"], summary["length"], strict=True) if length > 0), 0)
    if first > 0:
        brings += f" Before layer {first} nothing of the push is at that token: attention has to carry it there."
    said = f"The gradient there foretells {straight.percent}"
    said += ": the push is beyond the linear regime." if off(own, straight) else ", close to the truth."
    if own.value < 0.5:
        brings += " Nowhere is it half: the rest reaches that token in the last block."
    c = Estimate.of(summary["identity"]["c"]["end"][at])
    return (
        f"{brings} {said} From there to the end the stream is {'nearly' if mostly_identity(c, rest) else 'not'} an "
        f"identity propagator: J = c I + R with c = {c}, and the rest R is {two(rest.value)} of the Jacobian "
        f"({rest.interval})."
    )


def mostly_identity(c: Estimate, rest: Estimate) -> bool:
    """Whether a Jacobian c I + R is near the identity."""
    return rest.value < _MOSTLY and abs(c.value - 1) < _MOSTLY


def off(own: Estimate, straight: Estimate) -> bool:
    """Whether a linear prediction misses the truth by more than a tenth of it."""
    return abs(straight.value - own.value) > 0.1 * abs(own.value)


def _cards(summary: Mapping[str, Any] | Any) -> list[tuple[str, str, str]]:
    at, entry = summary["layers"].index(summary["entry"]), summary["entry"]
    own, straight = Estimate.of(summary["change"]["own"][at]), Estimate.of(summary["predicted"][at])
    rest = Estimate.of(summary["identity"]["rest"]["end"][at])
    return [
        (f"gap moved by the push before layer {entry}", own.percent, own.percent_interval),
        ("foretold by the gradient there", straight.percent, straight.percent_interval),
        ("Jacobian to the end that is not identity", f"{two(rest.value)}", rest.interval),
    ]


def _fork(summary: Mapping[str, Any] | Any, pushes: xr.Dataset) -> str:
    first = pushes.isel(prompt=0)
    whole = Estimate.of(summary["whole"])
    common = str(first["common"].values)
    after = f"after {common!r} " if common else ""
    return (
        f"The place looked at is the fork: the last token before the completion with the prefix and the one without it "
        f"part. For the request {str(first['prompt'].values)!r}, {after}they go on with "
        f"{str(first['said_with'].values)!r} and {str(first['said_without'].values)!r}. The logit gap is that of these "
        f"two tokens; the prefix moves it by {whole} logits on average (95 % interval {two(whole.low)} to "
        f"{two(whole.high)}, n = {whole.n} held-out requests). That is 100 %."
    )


def _linear(summary: Mapping[str, Any] | Any) -> str:
    own, straight, free = (
        [Estimate.of(each) for each in found]
        for found in (summary["change"]["own"], summary["predicted"], summary["free"])
    )
    layers, entry = summary["layers"], summary["layers"].index(summary["entry"])
    fits = [layer for layer, a, b in zip(layers, own, straight, strict=True) if a.value > 0.1 and not off(a, b)]
    text = (
        f"Before layer {layers[entry]} the gradient foretells {straight[entry].percent} where the truth is "
        f"{own[entry].percent}, and a stream that hands on everything as it is would give {free[entry].percent}; "
        f"before the last layer these are {straight[-1].percent}, {own[-1].percent} and {free[-1].percent}."
    )
    if fits:
        text += f" The gradient is within a tenth of the truth before {_named(fits)}."
    else:
        text += " Before no layer that moves the gap by a tenth or more is the gradient within a tenth of the truth."
    longest = max(range(len(layers)), key=lambda place: summary["length"][place])
    return text + (
        f" The push is {two(summary['length'][entry])} times as long as the stream itself before layer "
        f"{layers[entry]}, and {two(summary['length'][longest])} times before layer {layers[longest]}."
    )


def _regime(summary: Mapping[str, Any] | Any) -> str:
    regime, entry = summary["regime"], summary["entry"]
    if entry not in regime["layers"]:
        return ""
    at = regime["layers"].index(entry)
    (own, bound), (random, _) = (
        (Estimate.of(regime[group][at]), regime[group][at]["censored"]) for group in ("prefix", "random")
    )
    where = {-1: "below ", 0: "", 1: "above "}[bound]
    times = regime["length"][at] / own.value
    return (
        f"Before layer {entry} that is {where}{two(own.value)} of the stream's length along the mean push and "
        f"{two(random.value)} along random directions; the mean push is {times:.1f} times as long as its radius."
    )


def _exact(values: Sequence[float], n: int) -> list[dict[str, Any]]:
    return [Estimate(value, value, value, n).as_json for value in values]


def _requests(summary: Mapping[str, Any] | Any) -> str:
    known = [
        f"{two(value)} before layer {layer}"
        for layer, value in zip(summary["layers"], summary["correlation"], strict=True)
        if value is not None and layer >= summary["entry"]
    ]
    return f"Over requests the two correlate by {', '.join(known)}." if known else ""


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} " + ", ".join(map(str, layers))


def _identity(summary: Mapping[str, Any] | Any) -> str:
    c, rest = ([Estimate.of(each) for each in summary["identity"][name]["end"]] for name in ("c", "rest"))
    arrives, layers = summary["arrives"], summary["layers"]
    cos = [Estimate.of(each).value for each in arrives["cos"]]
    return (
        f"If the stream were an identity propagator, its Jacobian J = c I + R would have c = 1 and no R. From before "
        f"layer {layers[0]} to the end c is {c[0]} and R makes up {rest[0]} of |J|; from before the last layer they "
        f"are {c[-1]} and {rest[-1]}. What the prefix adds arrives with a cosine of {two(min(cos))} to "
        f"{two(max(cos))} to itself."
    )


def _largest(summary: Mapping[str, Any] | Any) -> str:
    strongest = max(
        ((Estimate.of(each).value, layer, part) for part, found in summary["gain"].items()
         for layer, each in zip(summary["layers"], found, strict=True)),
        key=lambda each: each[0],
    )  # fmt: skip
    part = {"attn": "attention", "mlp": "MLP"}[strongest[2]]
    return f"The largest is that of {part} {strongest[1]}: {two(strongest[0])}."


def _orders(summary: Mapping[str, Any] | Any) -> str:
    found = summary["dyson"]
    free = [each["layer"] for each in found if each["largest"] == 0]
    text = (
        f"From before layer {found[0]['layer']} the largest term of what arrives is of order {found[0]['largest']} "
        f"({two(found[0]['share'])} of it, and the push itself {two(found[0]['free'])}); from before layer "
        f"{found[-1]['layer']} it is of order {found[-1]['largest']} ({two(found[-1]['share'])}, the push itself "
        f"{two(found[-1]['free'])})."
    )
    if free:
        return f"{text} Free propagation is the largest term from before {_named(free)} alone."
    return f"{text} Free propagation is the largest term from no layer: what arrives is mostly the blocks' work."


def _carried(flow: xr.Dataset) -> xr.Dataset:
    """What is at other tokens, under its own name: it was computed from what stays."""
    carried = flow["carried"].transpose("layer", "pos", "prompt")
    return flow.assign(carried=carried.assign_attrs(long_name="share at other tokens"))


def _positions(summary: Mapping[str, Any] | Any) -> str:
    flow = summary["flow"]
    first, last = (
        f"before layer {layer}, {stays:.0f} % of the squared length is still at that token at the end and {fork:.1f} % "
        "is at the fork"
        for layer, stays, fork in [(flow["layers"][end], flow["stays"][end], flow["fork"][end]) for end in (0, -1)]
    )
    return (
        "A push that stays at its token never reaches another one. Of random pushes at the prefix's tokens "
        f"{first}; {last}."
    )


def _rank(summary: Mapping[str, Any] | Any) -> str:
    rank, at = summary["rank"], summary["layers"].index(summary["entry"])
    found, random = ([Estimate.of(each) for each in rank[name]] for name in ("found", "random"))
    whole = Estimate.of(summary["change"]["own"][at])
    return (
        f"Before layer {summary['entry']} the requests' pushes have {two(rank['mean_share'])} of their squared length "
        f"along their mean, and {rank['rank_90']} directions hold 90 % of it. The first direction alone brings about "
        f"{found[0].percent} of the gap's change, {rank['k'][-1]} directions {found[-1].percent} and all of the push "
        f"{whole.percent}; {rank['k'][-1]} random directions {random[-1].percent}."
    )


def _method(summary: Mapping[str, Any] | Any) -> str:
    return (
        "The push before layer l is the residual stream at the fork with the prefix minus without it; it is put in "
        "place at that token alone, in runs without the prefix, on held-out requests. The gradient is that of the gap "
        "with respect to the stream there, in the run without the prefix; the prediction by the identity takes the "
        "gradient behind the last block instead. The mean vector and the directions come from the requests to search "
        f"on. Jacobians are exact and of the runs without the prefix, of the first {summary['n_jacobians']} held-out "
        "requests; flow is of their runs with the prefix. Intervals are 95 % percentile bootstrap over requests; "
        "shares are pooled over requests."
    )


def _table(summary: Mapping[str, Any] | Any) -> Table:
    def cell(stored: dict[str, Any]) -> str:
        found = Estimate.of(stored)
        return f"{found.percent} ({100 * found.low:.0f} to {100 * found.high:.0f})"

    rows = [
        (layer, two(summary["length"][place]), cell(summary["change"]["own"][place]),
         cell(summary["change"]["mean"][place]), cell(summary["change"]["random"][place]),
         cell(summary["predicted"][place]), cell(summary["free"][place]))
        for place, layer in enumerate(summary["layers"])
    ]  # fmt: skip
    header = ("before layer", "length / stream", "own", "mean", "random", "gradient", "identity")
    return Table(header, rows, "Share of the gap's change, with 95 % intervals.")


# ---- figures ----


def _curves(
    groups: Mapping[str, Sequence[dict[str, Any]]],
    x: Sequence[int],
    x_title: str,
    y_title: str,
    title: str,
    *,
    percent: bool = False,
) -> go.Figure:
    units = "%" if percent else None
    figure = estimate_lines(groups, x, x_title=x_title, y_title=y_title, title=title, units=units)
    return figure.update_xaxes(dtick=max(1, len(x) // 12))


def _series(series: xr.Dataset) -> go.Figure:
    share = series["share"].sel(vector="prefix", drop=True).transpose("layer", "order", "prompt")
    share = share.assign_attrs(long_name="share of what arrives").assign_coords(
        layer=[f"before layer {layer}" for layer in share["layer"].values]
    )
    # Orders that a later layer lacks are no zeros to be drawn.
    last = {layer: n for layer, n in zip(share["layer"].values, _n_orders(series), strict=True)}
    share = share.where(share["order"] <= xr.DataArray([last[each] for each in share["layer"].values], dims="layer"))
    share["order"].attrs["long_name"] = "order: how many blocks acted"
    return named_lines(lines(share, "order"), "layer=", "Dyson series by layer").update_xaxes(dtick=1)


def _n_orders(series: xr.Dataset) -> list[int]:
    """The highest order that each layer has: one for each block from it to the end."""
    top = int(series["order"].max()) + int(series["layer"].min())
    return [top - int(layer) for layer in series["layer"].values]


def _scatter(pushes: Result) -> go.Figure:
    own = pushes.data.sel(push="own", drop=True).rename(prompt="request")
    data = own[["change", "predicted"]].rename(change="true change", predicted="predicted change")
    data = data.assign_coords(before=("layer", [f"layer {layer}" for layer in data["layer"].values]))
    return Result(data).plot(
        "true change", against="predicted change", colour="before", title="True and predicted, by request"
    )
