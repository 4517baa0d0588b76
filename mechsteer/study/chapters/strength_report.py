"""How the chapter "How strong" is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechsteer.strength import ChosenAlpha
from mechsteer.strength.shapes import SigmoidFit, fit_sigmoid
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Heading, Paragraph, Table
from mechsteer.study.chapter import Findings
from mechsteer.study.curves import estimate_lines
from mechsteer.study.measures import Estimate, two
from mechsteer.study.sources import source


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.strength.measure`."""
    summary, results = findings.summary, findings.results
    held = results["held_out"].data
    codes = {
        name: source("strength", name, picked=summary["picked"], times=f"{summary['alpha']:.3g}")
        for name in ("cards", "chosen", "target", "side", "completions")
    }
    target = Figure(
        _target(summary),
        f"{_what(summary)} at each strength, with 95 % intervals over {held.sizes['prompt']} requests. {_fit(summary)}"
        f"{_band_note(summary)}",
        sources=[codes["completions"] if summary["judged"] else codes["target"]],
    )
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["cards"], codes["side"]]),
        Heading("Choosing it"),
        Paragraph(_choosing(summary)),
        Figure(
            ChosenAlpha(results["chosen"], {}).plot(summary["picked"]).update_layout(height=420),
            "Requests to search on. Points are exact, and curves go through them as the laws have it. The band holds "
            "the strengths that may be best, given the points.",
            height=420,
            sources=[codes["chosen"]],
        ),
        Heading("On held-out requests"),
        Paragraph(_held_out(summary)),
        target,
        Figure(_side(summary), _side_note(summary), sources=[codes["side"]]),
        Columns(
            ("request", *map(str, held["condition"].values)),
            [
                (str(request), *map(str, texts))
                for request, texts in zip(held["prompt"].values, held["completion"].values.T, strict=True)
            ],
            caption=(
                f"Greedy completions of held-out requests, of at most {summary['max_new_tokens']} tokens: below, at "
                "and above the chosen strength."
            ),
            words=summary["words"],
            shown=4,
            sources=[codes["completions"]],
        ),
        Details(
            "How this was measured, and the other layers",
            [Paragraph(_method(summary)), replace(_table(summary), sources=[codes["chosen"]])],
        ),
    ]


def headline(summary: Mapping[str, Any] | Any) -> str:
    """What came out, in sentences."""
    if not summary["works"]:
        return (
            "No strength of any of the vectors is better than none by more than two standard errors, with what it wins "
            f"weighed against what it costs. What follows shows the best that was tried, {summary['alpha']:.3g} times "
            f"the vector {summary['picked']}."
        )
    low, high = summary["band"]
    text = (
        f"The strength to use is {summary['alpha']:.3g} times the vector, added {summary['picked']} (band {low:.3g} to "
        f"{high:.3g})."
    )
    at = _at(summary, 1.0)
    rise = Estimate.of(summary["rise"][at])
    cost = f"what the model says by itself becomes {rise} nats a token less likely ({rise.interval})"
    if summary["judged"]:
        below, here, above = (Estimate.of(summary["target"][_at(summary, step)]) for step in (0.5, 1.0, 2.0))
        return (
            f"{text} On held-out requests {here.percent} of the completions then {summary['shown']} "
            f"({here.percent_interval}), and {cost}. At half of it {below.percent} do; at twice it {above.percent}, "
            f"with {Estimate.of(summary['rise'][_at(summary, 2.0)])} nats."
        )
    plain, here = (Estimate.of(summary["reference"][_at(summary, step)]) for step in (0.0, 1.0))
    return (
        f"{text} On held-out requests the reference completions' cross entropy goes from {plain} to {here} nats a "
        f"token, and {cost}."
    )


def _at(summary: Mapping[str, Any] | Any, step: float) -> int:
    """Where a multiple of the chosen strength stands among the strengths of the curves."""
    return int(np.argmin(np.abs(np.array(summary["alphas"]) - step * summary["alpha"])))


def _what(summary: Mapping[str, Any] | Any) -> str:
    if summary["judged"]:
        return f"Share of the greedy completions of held-out requests that {summary['shown']}"
    return "Cross entropy of the reference completions of held-out requests"


def _cards(summary: Mapping[str, Any] | Any) -> list[tuple[str, str, str]]:
    at = _at(summary, 1.0)
    low, high = summary["band"]
    band = f"band {low:.3g} to {high:.3g}" if summary["works"] else "better than none by less than two standard errors"
    cards = [(f"strength {summary['picked']}", f"{summary['alpha']:.3g}", band)]
    if summary["judged"]:
        found = Estimate.of(summary["target"][at])
        cards.append((f"completions that {summary['shown']}, held out", found.percent, found.percent_interval))
    rise = Estimate.of(summary["rise"][at])
    return [*cards, ("cost on its own completions", f"{rise} nats", f"a token; {rise.interval}")]


def _choosing(summary: Mapping[str, Any] | Any) -> str:
    return (
        f"The vector is as long as what it is added to at a strength of {summary['scale']:.3g}, and its cost starts as "
        f"a parabola that one forward pass gives. From these, {summary['points']} strengths were measured exactly, in "
        f"{summary['forward_passes']:,} forward passes, generated tokens included. The score is "
        + (
            f"the share of completions that {summary['shown']}, less {summary['weight']:g} for each nat a token by "
            "which what the model says by itself becomes less likely."
            if summary["judged"]
            else f"minus the cross entropy of the reference completions, less {summary['weight']:g} times the rise of "
            "that of what the model says by itself."
        )
    )


def _held_out(summary: Mapping[str, Any] | Any) -> str:
    at, laws = _at(summary, 1.0), summary["laws"]
    rise = Estimate.of(summary["rise"][at])
    parabola = _parabola(laws, summary["alpha"])
    plateau = laws["plateau"][1]
    return (
        f"At the chosen strength the cost is {rise} nats a token, where its local law, exact for small strengths, says "
        f"{two(parabola)}; far out it would end at {plateau:.1f}, where every token gets the same prediction."
    )


def _parabola(laws: Mapping[str, Any], alpha: float) -> float:
    return laws["slope"] * alpha + laws["kl_curvature"] * alpha**2 / 2


def _side_note(summary: Mapping[str, Any] | Any) -> str:
    return (
        "Rise of the cross entropy of what the model says by itself, with 95 % intervals over requests, beside its "
        "local law (slope and Fisher curvature at 0, from one pass); the dotted line is its plateau for large "
        f"strengths (Proposition 4.1 of the steering-strength paper). {_band_note(summary)}"
    )


def _fit(summary: Mapping[str, Any] | Any) -> str:
    fitted = _sigmoid(summary)
    if fitted is None:
        return ""
    return (
        "The law for the probability of a concept is a sigmoid (Theorem 3.6 of the steering-strength paper); a "
        f"logistic curve explains {100 * fitted.r2:.0f} % of the variance, the best rising curve of any shape "
        f"{100 * fitted.monotone_r2:.0f} %. "
    )


def _band_note(summary: Mapping[str, Any] | Any) -> str:
    return "The dashed line is the chosen strength." if summary["works"] else "The dashed line is the best one tried."


def _method(summary: Mapping[str, Any] | Any) -> str:
    return (
        "Vectors are differences of mean activations over the reference completions, with the prefix and without it, "
        "at three depths; a push adds alpha times one of them, as it is, after one block at every token. Strengths are "
        "chosen on the requests to search on, from sampled completions where there is a judge; the layer is the one "
        "whose chosen strength gains most. Held-out requests are only measured. Cross entropies are in nats a token, "
        "the first 32 tokens counted three times; intervals are 95 %: percentile bootstrap over requests, and Wilson's "
        "for shares of completions."
    )


def _table(summary: Mapping[str, Any] | Any) -> Table:
    rows = [
        (
            name,
            "yes" if each["works"] else "no",
            each["alpha"],
            f"{each['low']:.3g} to {each['high']:.3g}",
            each["gain"],
        )
        for name, each in summary["directions"].items()
    ]
    return Table(("vector", "works", "alpha", "band", "gain in score"), rows, "The three depths.")


def _sigmoid(summary: Mapping[str, Any] | Any) -> SigmoidFit | None:
    """The logistic curve through the shares; None where there are none, or they are all the same."""
    values = np.array([Estimate.of(each).value for each in summary["target"]])
    if not len(values) or not np.ptp(values):
        return None
    return fit_sigmoid(np.array(summary["alphas"]), values, null=1)


# ---- figures ----


def _target(summary: Mapping[str, Any] | Any) -> go.Figure:
    found = summary["target"] if summary["judged"] else summary["reference"]
    if summary["judged"]:
        figure = _curve(summary, {f"that {summary['shown']}": found}, "completions", "%", "Behaviour")
        fitted = _sigmoid(summary)
        if fitted is not None:
            x = np.linspace(min(summary["alphas"]), max(summary["alphas"]), 200)
            y = 100 * (fitted.low + (fitted.high - fitted.low) / (1 + np.exp(-(x - fitted.centre) / fitted.width)))
            figure.add_scatter(x=x, y=y, mode="lines", name="sigmoid", line={"dash": "dash"}, showlegend=True)
        return figure
    return _curve(summary, {"reference completions": found}, "cross entropy", "nats a token", "Behaviour")


def _side(summary: Mapping[str, Any] | Any) -> go.Figure:
    laws, alphas = summary["laws"], np.array(summary["alphas"])
    figure = _curve(summary, {"measured": summary["rise"]}, "rise", "nats a token", "Side effect")
    fine = np.linspace(alphas.min(), alphas.max(), 200)
    parabola = np.array([_parabola(laws, alpha) for alpha in fine])
    most = max(Estimate.of(each).high for each in summary["rise"])
    shown = np.where(parabola <= most, parabola, np.nan)
    figure.add_scatter(x=fine, y=shown, mode="lines", name="local law", line={"dash": "dash"}, showlegend=True)
    figure.update_traces(showlegend=True, selector={"name": "measured"})
    return figure.add_hline(y=laws["plateau"][1], line={"dash": "dot"})


def _curve(
    summary: Mapping[str, Any] | Any, groups: Mapping[str, Sequence[dict[str, Any]]], label: str, units: str, title: str
) -> go.Figure:
    """Estimates over alpha, with a line at the chosen one."""
    figure = estimate_lines(
        groups, summary["alphas"], x_title="alpha", y_title=label, title=title, units=units, height=380
    )
    return figure.add_vline(x=summary["alpha"], line={"dash": "dash"})
