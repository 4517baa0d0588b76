"""How the chapter "Where it enters" is shown."""

from typing import Any

from mechsteer.plots import attention
from mechsteer.result import Result
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Heading, Paragraph, Table, View
from mechsteer.study.chapter import Findings
from mechsteer.study.measures import Estimate
from mechsteer.study.sources import source

CONDITIONS = {
    "prefix": "with the prefix",
    "contrast": "with the contrast",
    "moved": "contrast, the strongest place moved",
    "elsewhere": "contrast, another place moved",
}


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.entry.measure`."""
    summary, results = findings.summary, findings.results
    layer, head = summary["heads"][0]["name"].removeprefix("L").split("H")
    attended = source("entry", "attention", layer=layer, head=head)
    blocks: list[Block] = [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[source("entry", "sites"), source("entry", "heads")]),
        Paragraph(_contrast(summary)),
        Heading("Layers and tokens"),
        Figure(
            results["sites"].plot("recovered", title="Effect of patching one layer and place"),
            "Percent of the whole effect that returns when this one activation is taken from the run with the prefix. "
            "resid_pre is what enters a layer, attn_out and mlp_out what its two halves add. "
            + _counted(summary, "sites"),
            sources=[source("entry", "sites")],
        ),
        Heading("Heads"),
        Figure(
            results["heads"].plot("recovered", facet="mode", title="Effect of patching one head"),
            "Denoising: percent of the effect that returns when the head's output (z, all tokens) is taken from the "
            "run with the prefix. Noising: percent that is lost when it is taken from the run with the contrast. "
            + _counted(summary, "heads"),
            sources=[source("entry", "heads")],
        ),
        _heads(summary),
        Figure(
            results["attention"].plot("attention", title="Attention of the strongest heads", limit=1.0),
            "Where the heads look from the tokens that predict the completion, mean over "
            f"{summary['n_requests']} requests: the share of a head's attention that goes to each place.",
            sources=[attended],
        ),
        View(
            attention(results["pattern"], names=[head["name"] for head in summary["heads"]], causal=True),
            "Their whole patterns on the first request.",
            sources=[attended],
        ),
    ]
    blocks += _moved(findings)
    blocks += [
        Heading("Gradients against patching"),
        Paragraph(_attribution(summary)),
        Figure(
            results["attribution"].plot("exact", against="gradient", colour="map", title="Estimated and exact effects"),
            "One point for each cell of the two maps above, percent of the whole effect, mean over "
            f"{summary['n_requests']} requests.",
            sources=[source("entry", "attribution")],
        ),
        Details("How this was measured", [Paragraph(_method(summary)), *_fillers(results)]),
    ]
    return blocks


def headline(summary: dict[str, Any] | Any) -> str:
    """What came out, in two or three sentences."""
    best, heads = summary["best"], summary["heads"]
    text = (
        f"The strongest place is the token {best['token']!r} before layer {best['layer']}: taking only this residual "
        f"stream from the run with the prefix brings back {_percent(best)} of the prefix's effect on how likely the "
        f"model finds what it says with it."
    )
    held = best["layers_above_half"]
    if len(held) > 1:
        text += f" More than half of the effect is found there before {_layers(held)}."
    top = heads[0]
    text += (
        f" Of the heads, {top['name']} carries most: its output alone brings back {_percent(top)}, and taking it away "
        f"costs {top['lost']:.0f} %"
    )
    text += ": it suffices and is not needed." if top["lost"] < 0.2 * top["share"] else "."
    if summary["moved"]:
        moved, whole = (Estimate.of(summary["moved"][name]) for name in ("moved", "prefix"))
        text += (
            f" With nothing but the strongest place moved, {moved.percent} of the completions of held-out requests "
            f"{summary['shown']} ({moved.percent_interval}); with the whole prefix {whole.percent}."
        )
    return text


def _percent(part: dict[str, Any]) -> str:
    return f"{part['share']:.0f} % (95 % interval {part['low']:.0f} to {part['high']:.0f})"


def _layers(held: list[int]) -> str:
    if held == list(range(held[0], held[-1] + 1)):
        return f"layers {held[0]} to {held[-1]}"
    return "layers " + ", ".join(map(str, held))


def _cards(summary: dict[str, Any] | Any) -> list[tuple[str, str, str]]:
    best, top = summary["best"], summary["heads"][0]
    cards = [
        (f"back through {best['token']!r}, layer {best['layer']}", f"{best['share']:.0f} %",
         f"95 % interval {best['low']:.0f} to {best['high']:.0f}, n = {summary['n_requests']} requests"),
        (f"back through head {top['name']}", f"{top['share']:.0f} %",
         f"95 % interval {top['low']:.0f} to {top['high']:.0f}, n = {summary['n_requests']} requests"),
    ]  # fmt: skip
    if summary["moved"]:
        found = Estimate.of(summary["moved"]["moved"])
        note = f"{found.percent_interval} held-out requests"
        cards.append((f"{summary['shown']}, that place moved", found.percent, note))
    return cards


def _contrast(summary: dict[str, Any] | Any) -> str:
    about = summary["contrast"]
    what = (
        f"The contrast is the prefix {about['text']!r}, as you asked."
        if about["given"]
        else f"The contrast is a neutral filler of as many tokens as the prefix has, {about['text']!r}."
    )
    return (
        f"Patching needs a second run that differs in the prefix alone. {what} Under it the model's own completions "
        f"without a prefix have a cross entropy of {about['ce_contrast']:.2f} nats a token; it is "
        f"{about['ce_plain']:.2f} with nothing in front and {about['ce_prefix']:.2f} with the prefix. With the "
        f"prefix, what the model says with it is {summary['gap']:.2f} nats a token likelier than with the contrast: "
        "this is the whole effect, 100 %."
    )


def _counted(summary: dict[str, Any] | Any, name: str) -> str:
    cells = summary["cells"][name]
    if cells["matter"] is None:
        return f"With {summary['n_requests']} requests there are too few to test cells against chance."
    return (
        f"Dots mark the {cells['matter']} of {cells['n']} cells that carry at least {summary['least_share']} % and "
        "differ from 0; of cells found so, at most 5 % are expected to be chance."
    )


def _heads(summary: dict[str, Any] | Any) -> Table:
    rows = [
        (head["name"], f"{head['share']:.0f} %", f"{head['low']:.0f} to {head['high']:.0f}",
         f"{round(head['lost']) + 0} %", f"{100 * head['attention_to_prefix']:.0f} %")
        for head in summary["heads"]
    ]  # fmt: skip
    header = ("head", "brings back", "95 % interval", "taken away, costs", "attention to the prefix")
    return Table(
        header,
        rows,
        f"The heads with the largest effects, mean over {summary['n_requests']} requests.",
        sources=[source("entry", "heads")],
    )


def _moved(findings: Findings) -> list[Block]:
    summary, data = findings.summary, findings.results["moved"].data
    best = summary["best"]
    text = (
        f"If the push is where the map says, moving that one place moves the behaviour. Held-out requests with the "
        f"contrast are completed while the residual stream before layer {best['layer']} at {best['token']!r} is what "
        f"it is with the prefix; for comparison, the same is done at {summary['elsewhere']!r}."
    )
    if summary["moved"]:
        found = {name: Estimate.of(value) for name, value in summary["moved"].items()}
        text += (
            f" Of the completions, {found['moved'].percent} {summary['shown']} ({found['moved'].percent_interval}); "
            f"with the other place moved {found['elsewhere'].percent}, with the contrast alone "
            f"{found['contrast'].percent}, with the whole prefix {found['prefix'].percent}."
        )
    rows = [
        (str(row["prompt"].values), *(str(row["completion"].sel(condition=name).values) for name in CONDITIONS))
        for row in (data.isel(prompt=place) for place in range(data.sizes["prompt"]))
    ]
    columns = Columns(
        ("request", *CONDITIONS.values()),
        rows,
        "Greedy completions of held-out requests.",
        summary["words"],
        3,
        sources=[source("entry", "moved")],
    )
    return [Heading("Moving it"), Paragraph(text), columns]


def _attribution(summary: dict[str, Any] | Any) -> str:
    ranks = " and ".join(
        f"{by['gradient']:.2f} for {name} ({by['integrated_gradients']:.2f} with integrated gradients)"
        for name, by in summary["attribution"]["spearman"].items()
    )
    return (
        "Attribution patching estimates all cells at once from two forward passes and one backward pass, where exact "
        f"patching runs each of the {summary['attribution']['n_cells']} cells. Spearman's rank correlation of the two "
        f"is {ranks}. Points far from the dotted line are cells where the estimate misleads."
    )


def _method(summary: dict[str, Any] | Any) -> str:
    return (
        f"Maps are measured on {summary['n_requests']} requests of the search half, each with the first "
        f"{summary['n_tokens']} tokens of its reference completion. The objective is the log-likelihood of these "
        "tokens: minus the weighted cross entropy. An effect is the objective of the patched run minus that of the run "
        "patched into, divided by the mean difference between the two runs. Requests differ in length, so their own "
        "tokens are patched as one place, [user]. Intervals are 95 % percentile bootstrap over requests. Cells are "
        "tested by sign flips over requests, and p-values corrected for the number of cells (Benjamini and Hochberg "
        "1995)."
    )


def _fillers(results: dict[str, Result] | Any) -> list[Block]:
    if "fillers" not in results:
        return []
    data = results["fillers"].data.sortby("ce")
    rows = [(repr(str(token)), float(ce)) for token, ce in zip(data["token"].values, data["ce"].values, strict=True)]
    caption = "Fillers that were tried: cross entropy of what the model says without a prefix, in nats a token."
    return [Table(("token, repeated", "cross entropy"), rows, caption, sources=[source("entry", "fillers")])]
