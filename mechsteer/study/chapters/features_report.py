"""How the chapter "As features" is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechsteer.plots import LIGHT, plain, tokens
from mechsteer.plots.themes import PALETTE
from mechsteer.study.blocks import (
    Block,
    Cards,
    Cell,
    Columns,
    Details,
    Figure,
    Heading,
    Paragraph,
    Table,
    View,
)
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.behaviour import WITH, WITHOUT
from mechsteer.study.curves import estimate_lines
from mechsteer.study.measures import Estimate, two
from mechsteer.study.sources import source

CLAMP, ADD = "clamped, times", "added, times"
SOFT, HARD = "soft prefix that raises it", "searched prefix that raises it"
BACK = ", held back"
"""Of a push with the feature held at rest."""
# What a share must reach to be called something, and what it may not to be called nothing.
_SOME = 0.2

Summary = Mapping[str, Any] | Any


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.features.measure`."""
    summary, results = findings.summary, findings.results
    on = results["tokens"].data
    codes = {
        name: source("features", name, feature=summary["feature"], times=f"{summary['chosen'][CLAMP]:g}")
        for name in ("features", "mediation", "tokens", "curve", "prefixes")
    }
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["mediation"], codes["curve"]]),
        Heading("Which features"),
        Paragraph(_autoencoder(summary)),
        replace(_features(results["features"].data), sources=[codes["features"]]),
        View(
            tokens([str(each) for each in on["token"].values], on["activation"].values),
            f"Feature {summary['feature']} on the first held-out request, with the prefix and its answer.",
            sources=[codes["tokens"]],
        ),
        Heading("Whether they are why"),
        Paragraph(_why(summary)),
        Figure(
            _shares(summary),
            "Shares of the effect of the prefix on the log-likelihood of its own answers to held-out requests, with 95 "
            "% intervals. Needed: what goes when the features are held, token by token, at what they are without the "
            "prefix. Enough: what comes without the prefix when they are what they are with it.",
            height=340,
            sources=[codes["mediation"]],
        ),
        Heading("The feature as a push"),
        Paragraph(_push(summary)),
        *(
            [Figure(_curve(summary, "shows"), _shown_caption(summary), sources=[codes["curve"]])]
            if summary["shows"]
            else []
        ),
        Figure(
            _curve(summary, "rise"),
            "Side effect: rise of the cross entropy of what the model says by itself, with 95 % intervals over "
            "held-out requests. The dotted line is the prefix.",
            sources=[codes["curve"]],
        ),
        Heading("Prefixes that raise it"),
        Paragraph(_prefixes(summary)),
        replace(
            _table(summary, [name for name in summary["activation"] if not name.startswith((CLAMP, ADD))]),
            sources=[codes["prefixes"]],
        ),
        Figure(
            _scatter(summary),
            "Each push on held-out requests: how active the feature is before anything is said, and "
            f"{_behaviour(summary)}. Bars are 95 % intervals. {_correlation(summary)}",
            height=440,
            sources=[codes["prefixes"]],
        ),
        replace(_completions(findings), sources=[codes["curve"]]),
        Details(
            "How this was measured, and all pushes",
            [Paragraph(_method()), replace(_table(summary, list(summary["activation"])), sources=[codes["prefixes"]])],
        ),
    ]


# ---- sentences ----


def headline(summary: Summary) -> str:
    """What came out, in sentences."""
    feature, step = summary["feature"], summary["chosen"][CLAMP]
    needed, enough = (_part(summary, share, f"feature {feature}") for share in ("needed", "enough"))
    cost, usual = (Estimate.of(summary["rise"][each]) for each in (f"{CLAMP} {step:g}", WITH))
    back, free = (Estimate.of(_shown(summary)[name]) for name in (HARD + BACK, HARD))
    why = "so that raising it is part of why" if back.high < free.low else "which does not show that raising it is why"
    return (
        f"The prefix raises feature {feature} most, which promotes {summary['promotes']}. The feature "
        f"{verdict(needed, enough)}: held where it is without the prefix, it takes away {needed.percent} of the "
        f"prefix's effect ({needed.percent_interval}); put where the prefix puts it, it brings {enough.percent} "
        f"({enough.percent_interval}). Clamped at {step:g} times its level, {_outcome(summary, f'{CLAMP} {step:g}')}, "
        f"at a cost of {cost} nats a token on what the model says by itself ({cost.interval}; the prefix {usual}). "
        f"With the prefix {summary['hard']!r}, searched to raise it, {_outcome(summary, HARD)}; with the feature held "
        f"back {back.percent} ({back.percent_interval}), {why}."
    )


def verdict(needed: Estimate, enough: Estimate) -> str:
    """What the two shares of a mediation say about a feature."""
    if needed.low > _SOME:
        return "is part of why the prefix works"
    if enough.low > _SOME and needed.high < _SOME:
        return "helps and is not needed"
    if enough.high < _SOME and needed.high < _SOME:
        return "is not why the prefix works"
    return "may be part of why the prefix works"


def _part(summary: Summary, share: str, part: str) -> Estimate:
    return Estimate.of(summary["mediation"][share][part])


def _shown(summary: Summary) -> Mapping[str, Any]:
    """The behaviour of each push: shares of completions, or without a judge shares of the gap that are closed."""
    return summary["shows"] or summary["closed"]


def _outcome(summary: Summary, name: str) -> str:
    """As in "94 % of the completions of held-out requests are about cats (95 % interval ..., n = 18)"."""
    if summary["shows"]:
        found = Estimate.of(summary["shows"][name])
        return f"{found.percent} of the completions of held-out requests {summary['shown']} ({found.percent_interval})"
    found = Estimate.of(summary["closed"][name])
    return f"{found.percent} of the gap in cross entropy is closed on held-out requests ({found.percent_interval})"


def _short(summary: Summary, name: str) -> str:
    found = Estimate.of(_shown(summary)[name])
    return f"{found.percent} ({found.percent_interval})"


def _autoencoder(summary: Summary) -> str:
    about, explained = summary["sae"], Estimate.of(summary["sae"]["explained"])
    return (
        f"The autoencoder {about['name']!r} takes the activations at {about['site']} apart into {about['features']:,} "
        f"features and explains {explained.percent} of their variance on held-out requests "
        f"({explained.percent_interval}). Three rankings, each on the requests to search on, say which features the "
        "prefix acts through; what the rankings put first stands in one table."
    )


def _why(summary: Summary) -> str:
    sentences = []
    for part in summary["mediation"]["needed"]:
        needed, enough = (_part(summary, share, part) for share in ("needed", "enough"))
        if part not in (f"feature {summary['feature']}", "whole state"):
            sentences.append(
                f"{part[0].upper()}{part[1:]}: {needed.percent} needed ({needed.percent_interval}), {enough.percent} "
                f"enough ({enough.percent_interval})."
            )
    return (
        "Sets are those of the largest attributions; all features is the most that any choice of them could do, and "
        "the whole state the most that anything at these tokens of this layer could. " + " ".join(sentences)
    )


def _push(summary: Summary) -> str:
    text = (
        f"The feature's level is {summary['level']:.3g}, which one in ten of the answers' tokens reaches where it is "
        "active. Clamping puts the feature there at all tokens and keeps what the autoencoder does not explain; adding "
        f"adds the feature's decoder row so often. The best of the strengths on the requests to search on is "
        f"{summary['chosen'][CLAMP]:g} times the level clamped, and {summary['chosen'][ADD]:g} times added. "
    )
    said = {
        name: Estimate.of(summary["said"][name]) for name in (WITH, f"{CLAMP} {summary['chosen'][CLAMP]:g}", WITHOUT)
    }
    if summary["chosen"][CLAMP] == max(_strengths(summary)):
        text += "A clamp stronger than the largest that was tried may do better. "
    return text + (
        f"To the model with the prefix, what is then said costs {list(said.values())[1]} nats a token; what it says "
        f"with the prefix {said[WITH]}, without {said[WITHOUT]}: much more under a push than with the prefix means "
        "that the push breaks the text."
    )


def _prefixes(summary: Summary) -> str:
    before, usual, raised, soft = (Estimate.of(summary["activation"][name]) for name in (WITHOUT, WITH, HARD, SOFT))
    forbid = " The tokens may hold no word of the behaviour." if summary["words"] else ""
    what = "of the completions show the behaviour" if summary["shows"] else "of the gap is closed"
    free, back = ({name: _short(summary, name + end) for name in (WITH, SOFT)} for end in ("", BACK))
    return (
        f"A soft prefix of {summary['size']} embeddings ({summary['steps']} steps of Adam) and a prefix of as many "
        f"tokens ({summary['evaluated']} candidates) were made to raise the feature's pre-activation at the last token "
        f"before the answer, and for nothing else.{forbid} On held-out requests they take its activation there from "
        f"{before.value:.3g} to {soft.value:.3g} and {raised.value:.3g}; the prefix under study takes it to "
        f"{usual.value:.3g}. Held back, the feature is {summary['rest']:.3g} at all tokens, its mean over what the "
        f"model says without the prefix. With the soft prefix {free[SOFT]} {what}, and {back[SOFT]} with the feature "
        f"held back; with the prefix under study {free[WITH]}, and {back[WITH]} held back. {_correlation(summary)}"
    )


def _correlation(summary: Summary) -> str:
    found = Estimate.of(summary["correlation"])
    if np.isnan(found.value):
        return "One side is the same for all pushes, so that there is no correlation."
    return (
        f"Over {summary['pushes']} pushes and none, the feature's activation and the behaviour have a rank correlation "
        f"of {found} (95 % interval over requests {two(found.low)} to {two(found.high)})."
    )


def _behaviour(summary: Summary) -> str:
    return f"how many completions {summary['shown']}" if summary["shows"] else "how much of the gap is closed"


def _method() -> str:
    return (
        "Contrast: mean activation over the tokens of the reference completions, after the prefixed request minus "
        "after the request alone, both sides with the same text. Attribution: first-order estimate of what the "
        "log-likelihood of the reference completions gains when the feature alone goes to what it is with the prefix "
        "(Marks et al. 2024, equation 1, with the gradient at the request alone: with the prefix features stand in for "
        "each other). Similarity: cosine of the decoder row with the difference of mean activations over the same "
        "tokens. Needed and enough are the natural indirect effects of Vig et al. 2020 from either end, over the total "
        "effect; both keep the autoencoder's error. Features are ranked, strengths chosen and prefixes searched on the "
        "requests to search on; held-out requests only measure. A strength is the one under which most completions "
        "show the behaviour, among equals the one whose completions are likeliest with the prefix; without a judge the "
        "one with the likeliest reference completions. Cross entropies are in nats a token, the first 32 tokens "
        "counted three times and requests pooled by these weights; intervals are 95 %: percentile bootstrap over "
        "requests, and Wilson's for shares of completions. Tokens that a feature promotes are those of its decoder row "
        "through the final norm and the unembedding."
    )


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    feature = summary["feature"]
    needed, enough = (_part(summary, share, f"feature {feature}") for share in ("needed", "enough"))
    cards = [
        (f"of the effect needs feature {feature}", needed.percent, needed.percent_interval),
        (f"of the effect comes from feature {feature} alone", enough.percent, enough.percent_interval),
    ]
    what = f"completions that {summary['shown']}" if summary["shows"] else "gap closed"
    for name, label in ((f"{CLAMP} {summary['chosen'][CLAMP]:g}", "feature clamped"), (HARD, "prefix that raises it")):
        found = Estimate.of(_shown(summary)[name])
        cards.append((f"{what}, {label}", found.percent, found.percent_interval))
    return cards


# ---- tables and figures ----


def _features(data: Any) -> Table:
    header = (
        "feature", "promotes", "with the prefix", "without", "without, own answers", "difference (95 % interval)",
        "attribution, nats a token (95 % interval)", "cosine with the vector", "rank by each",
    )  # fmt: skip
    rows: list[list[Cell]] = []
    for place, feature in enumerate(data["feature"].values.tolist()):
        one = {str(name): each.values[place] for name, each in data.data_vars.items()}
        rows.append([
            str(feature), str(one["promotes"]), float(one["with"]), float(one["without"]), float(one["own"]),
            f"{one['difference']:.3g} ({one['difference_low']:.3g} to {one['difference_high']:.3g})",
            f"{one['attribution']:.3f} ({one['attribution_low']:.3f} to {one['attribution_high']:.3f})",
            two(float(one["cosine"])),
            f"{one['contrast_rank']}, {one['attribution_rank']}, {one['similarity_rank']}",
        ])  # fmt: skip
    return Table(
        header,
        rows,
        "Features that come first by contrast, by attribution or by similarity to the difference of means, on the "
        "requests to search on: mean activations over the reference completions (in the third column of numbers, over "
        "what the model says by itself). Ranks are in this order.",
    )


def _table(summary: Summary, names: Sequence[str]) -> Table:
    header = ["held-out requests", "feature before the answer"]
    header += ["completions that show it"] if summary["shows"] else []
    header += ["gap closed", "side effect, nats a token", "what is said, nats a token"]
    rows: list[list[Cell]] = []
    for name in names:
        activation, rise, said = (Estimate.of(summary[each][name]) for each in ("activation", "rise", "said"))
        row: list[Cell] = [name, f"{activation.value:.3g} ({activation.low:.3g} to {activation.high:.3g})"]
        for each in ("shows", "closed") if summary["shows"] else ("closed",):
            found = Estimate.of(summary[each][name])
            row.append(f"{found.percent} ({100 * found.low:.0f} to {100 * found.high:.0f} %)")
        row += [f"{each} ({two(each.low)} to {two(each.high)})" for each in (rise, said)]
        rows.append(row)
    return Table(header, rows, "95 % intervals in brackets.")


def _shares(summary: Summary) -> go.Figure:
    figure = go.Figure()
    for place, name in enumerate(("needed", "enough")):
        found = {part: Estimate.of(each) for part, each in summary["mediation"][name].items()}
        figure.add_bar(
            x=list(found), y=[100 * each.value for each in found.values()], name=name, marker={"color": PALETTE[place]},
            error_y={
                "type": "data", "symmetric": False,
                "array": [100 * (each.high - each.value) for each in found.values()],
                "arrayminus": [100 * (each.value - each.low) for each in found.values()],
            },
        )  # fmt: skip
    return figure.update_layout(LIGHT).update_layout(
        barmode="group", yaxis={"title": {"text": "share of the effect (%)"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip


def _strengths(summary: Summary) -> list[float]:
    return [float(name.removeprefix(CLAMP)) for name in summary["activation"] if name.startswith(CLAMP)]


def _curve(summary: Summary, what: str) -> go.Figure:
    steps = _strengths(summary)
    groups = {
        kind.split(",")[0]: [summary[what][WITHOUT], *(summary[what][f"{kind} {step:g}"] for step in steps)]
        for kind in (CLAMP, ADD)
    }
    shares = what == "shows"
    figure = estimate_lines(
        groups, [0.0, *steps], x_title="times the feature's level", y_title="completions" if shares else "rise",
        units="%" if shares else "nats a token", height=380,
        title=f"Completions that {summary['shown']}" if shares else "Side effect",
    )  # fmt: skip
    level = Estimate.of(summary[what][WITH]).value * (100 if shares else 1)
    figure.add_vline(x=summary["chosen"][CLAMP], line={"dash": "dash"})
    return figure.add_hline(y=level, line={"dash": "dot"})


def _shown_caption(summary: Summary) -> str:
    return (
        f"Share of the greedy completions of held-out requests that {summary['shown']}, with 95 % intervals. The "
        "dashed line is the strength chosen for clamping, the dotted one what the prefix does."
    )


_LOOKS = {
    CLAMP: ("circle", PALETTE[0]), ADD: ("diamond", PALETTE[1]), WITHOUT: ("square", "#8a929a"),
    WITH: ("square", PALETTE[2]), SOFT: ("square", PALETTE[3]), HARD: ("square", PALETTE[4]),
}  # fmt: skip


def _scatter(summary: Summary) -> go.Figure:
    """A point for each push, with both intervals."""
    figure, shown = go.Figure(), _shown(summary)
    for kind, (symbol, colour) in _LOOKS.items():
        names = [name for name in summary["activation"] if name.startswith(kind) and not name.endswith(BACK)]
        x, y = ([Estimate.of(source[name]) for name in names] for source in (summary["activation"], shown))
        figure.add_scatter(
            x=[each.value for each in x], y=[100 * each.value for each in y], mode="markers", name=kind.split(",")[0],
            marker={"symbol": symbol, "color": colour, "size": 9}, hoverinfo="text",
            hovertext=[f"{n}: {a.value:.3g}, {b.percent}" for n, a, b in zip(names, x, y, strict=True)],
            error_x=_error(x, 1), error_y=_error(y, 100),
        )  # fmt: skip
    title = f"completions that {summary['shown']} (%)" if summary["shows"] else "gap closed (%)"
    return figure.update_layout(LIGHT).update_layout(
        xaxis={"title": {"text": f"activation of feature {summary['feature']} before the answer"}},
        yaxis={"title": {"text": plain(title)}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )


def _error(found: Sequence[Estimate], scale: int) -> dict[str, Any]:
    ends = {"array": [scale * (each.high - each.value) for each in found]}
    ends["arrayminus"] = [scale * (each.value - each.low) for each in found]
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 2, **ends}


def _completions(findings: Findings) -> Columns:
    summary, tried = findings.summary, findings.results["prefixes"].data
    clamped = f"{CLAMP} {summary['chosen'][CLAMP]:g}"
    texts = {name: tried["completion"].sel(push=name).values for name in (WITH, WITHOUT)}
    curve = findings.results["curve"].data.sel(prompt=tried["prompt"])
    texts[clamped] = curve["completion"].sel(push=clamped).values
    texts |= {name: tried["completion"].sel(push=name).values for name in (HARD, HARD + BACK, SOFT)}
    return Columns(
        ("request", *texts),
        [
            (str(request), *(str(each[place]) for each in texts.values()))
            for place, request in enumerate(tried["prompt"].values)
        ],
        caption=f"Greedy completions of held-out requests, of at most {summary['max_new_tokens']} tokens.",
        words=summary["words"],
        shown=4,
    )
