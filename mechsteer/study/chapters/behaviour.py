"""What the prefix does: completions with and without it, their cross entropy, and how many show the behaviour."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechsteer.judges import NO_JUDGE
from mechsteer.plots import LIGHT, plain
from mechsteer.plots.themes import PALETTE
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Paragraph, Table
from mechsteer.study.case import Case
from mechsteer.study.chapter import Chapter, Findings
from mechsteer.study.measures import Estimate, cross_entropy, ratio, share, weights
from mechsteer.study.sources import source

WITH, WITHOUT, CONTRAST = "with the prefix", "without it", "with the contrast"
COLOURS = {WITH: PALETTE[0], WITHOUT: "#8a929a", CONTRAST: PALETTE[1]}
HALVES = ("search", "held-out")


def measure(case: Case) -> Findings:
    """Scores the reference completions under every condition, and judges what each condition says by itself.

    The Result has `ce` [condition, prompt] in nats a token, of the same reference completions under each condition;
    `weight` [prompt], with which they are pooled; `completion` [condition, prompt], what is said greedily; and `shows`
    [condition, prompt], the judge's word, where there is a judge.
    """
    conditions: dict[str, tuple[Prompts, Prompts]] = {
        WITH: (case.prefixed, case.reference),
        WITHOUT: (case.plain, case.unsteered),
    }
    if case.settings.contrast is not None:
        other = case.with_prefix(case.settings.contrast)
        case.tell(f"completing {len(other)} requests with the contrast")
        conditions[CONTRAST] = other, case.model.generate(other, max_new_tokens=case.max_new_tokens)
    case.tell("scoring the reference completions")
    scored = [case.with_reference(prompts) for prompts, _ in conditions.values()]
    texts = [completed.completions for _, completed in conditions.values()]
    arrays: dict[str, Any] = {
        "ce": (("condition", "prompt"), np.stack([cross_entropy(case.model, prompts) for prompts in scored])),
        "weight": ("prompt", weights(scored[0])),
        "tokens": ("prompt", scored[0].span("completion").sum(1).cpu().numpy()),
        "completion": (("condition", "prompt"), np.array(texts, dtype=object)),
    }
    if case.judge is not None:
        arrays["shows"] = (("condition", "prompt"), np.array([[case.judge(text) for text in row] for row in texts]))
    data = xr.Dataset(
        arrays,
        coords={
            "condition": list(conditions),
            "prompt": [request.text for request in case.requests],
            "split": ("prompt", [request.split for request in case.requests]),
        },
    )
    made = provenance(model=case.model.id, seed=case.settings.seed, prefix=case.settings.prefix)
    return Findings({"behaviour": Result(data, provenance=made)}, _summary(case, data))


def _summary(case: Case, data: xr.Dataset) -> dict[str, Any]:
    seed = case.settings.seed
    parts = {half: data.isel(prompt=case.rows(half)) for half in (*HALVES, "all")}
    ce, weight = data["ce"], data["weight"]
    summary: dict[str, Any] = {
        "prefix": case.settings.prefix,
        "contrast": case.settings.contrast,
        "judge": None if case.judge is None else {"name": case.judge.name, "shown": case.judge.shown},
        "words": [] if case.judge is None else list(case.judge.words),
        "max_new_tokens": case.max_new_tokens,
        "same_completions": int(
            (data["completion"].sel(condition=WITH) == data["completion"].sel(condition=WITHOUT)).sum()
        ),
        "ce": {},
        "gap": {},
        "shows": {},
    }
    for half, part in parts.items():
        ce, weight = part["ce"], part["weight"].values
        pooled = {
            name: ratio(ce.sel(condition=name).values * weight, weight, seed=seed) for name in part["condition"].values
        }
        gap = (ce.sel(condition=WITHOUT) - ce.sel(condition=WITH)).values
        summary["ce"][half] = {str(name): estimate.as_json for name, estimate in pooled.items()}
        summary["gap"][half] = ratio(gap * weight, weight, seed=seed).as_json
        if "shows" in part:
            shares = {str(name): share(part["shows"].sel(condition=name).values) for name in part["condition"].values}
            summary["shows"][half] = {name: estimate.as_json for name, estimate in shares.items()}
    return summary


def show(findings: Findings) -> list[Block]:
    summary, data = findings.summary, findings.results["behaviour"].data
    judged = [source("behaviour", "shows")] if summary["shows"] else []
    blocks: list[Block] = [
        Paragraph(_headline(summary)),
        Cards(_cards(summary), sources=[source("behaviour", "cards"), *judged]),
    ]
    if summary["judge"] is None:
        blocks.append(Paragraph(NO_JUDGE))
    blocks.append(
        Columns(
            ("request", *map(str, data["condition"].values)),
            [(str(row["prompt"].values), *map(str, row["completion"].values)) for row in _rows(data)],
            caption=f"Greedy completions of at most {summary['max_new_tokens']} tokens, held-out requests first."
            + (" Words of the behaviour are marked." if summary["words"] else ""),
            words=summary["words"],
            sources=[source("behaviour", "completions")],
        )
    )
    blocks.append(
        Figure(
            _dumbbells(data),
            "Cross entropy of the completion that the model gives with the prefix, with and without the prefix before "
            "it. The further apart, the more of that completion is the prefix's doing.",
            height=150 + 22 * data.sizes["prompt"],
            sources=[source("behaviour", "ce")],
        )
    )
    if summary["shows"]:
        caption = f"Share of completions that {summary['judge']['shown']}, with 95 % intervals."  # pyright: ignore
        blocks.append(Figure(_bars(summary["shows"]), caption, height=320, sources=judged))
    blocks.append(Details("How this was measured, and all numbers", [Paragraph(_method(summary)), _table(summary)]))
    return blocks


def _headline(summary: Mapping[str, Any]) -> str:
    gap = Estimate.of(summary["gap"]["held-out"])
    ce = {name: Estimate.of(value) for name, value in summary["ce"]["held-out"].items()}
    sentences = []
    if summary["shows"]:
        found = {name: Estimate.of(value) for name, value in summary["shows"]["held-out"].items()}
        sentences.append(
            f"With the prefix {found[WITH].percent} of the completions of held-out requests "
            f"{summary['judge']['shown']} ({found[WITH].percent_interval}), without it {found[WITHOUT].percent} "
            f"({found[WITHOUT].percent_interval})."
        )
    if does_nothing(gap):
        sentences.append(
            "The prefix does nothing that can be measured to how likely its completions are: their cross entropy is "
            f"{ce[WITH]} nats a token with the prefix and {ce[WITHOUT]} without it, a gap of {gap} ({gap.interval}), "
            f"and {summary['same_completions']} of {summary['ce']['all'][WITH]['n']} completions are the same text."
        )
    else:
        sentences.append(
            f"What the model says with the prefix has a cross entropy of {ce[WITH]} nats a token with the prefix and "
            f"{ce[WITHOUT]} without it. This gap of {gap} ({gap.interval}) is what another push has to close."
        )
    return " ".join(sentences)


def does_nothing(gap: Estimate) -> bool:
    """Whether no gap between with and without is left to close: its interval reaches down to 0, or it is too small for
    a share of it to mean anything."""
    return not (gap.low > 0 and gap.value > 0.005)


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    cards = []
    for name in (WITH, WITHOUT) if summary["shows"] else ():
        found = Estimate.of(summary["shows"]["held-out"][name])
        cards.append((f"completions that {summary['judge']['shown']}, {name}", found.percent, found.percent_interval))
    for name in (WITH, WITHOUT):
        found = Estimate.of(summary["ce"]["held-out"][name])
        cards.append((f"cross entropy, {name}", f"{found} nats", f"a token; {found.interval}"))
    return cards


def _method(summary: Mapping[str, Any]) -> str:
    judge = f" A completion is judged by {summary['judge']['name']}." if summary["judge"] else ""
    return (
        "The reference completion of a request is the model's greedy completion with the prefix. Its cross entropy "
        "under a condition is teacher-forced, in nats a token; the first 32 tokens count three times, and requests are "
        'pooled by these weights ("Steering Prefix Generation", section 2.3). Intervals are 95 %: percentile '
        "bootstrap over requests for cross entropies, Wilson's for shares." + judge + " Requests to search on are the "
        "ones that later chapters choose on; held-out ones only measure."
    )


def _table(summary: Mapping[str, Any]) -> Table:
    header = ["requests", "condition", "n", "cross entropy (nats a token)", "95 % interval"]
    header += ["share that shows it", "95 % interval"] if summary["shows"] else []
    rows = []
    for half in (*HALVES, "all"):
        for name, stored in summary["ce"][half].items():
            ce = Estimate.of(stored)
            row = [half, name, ce.n, ce.value, f"{ce.low:.3f} to {ce.high:.3f}"]
            if summary["shows"]:
                found = Estimate.of(summary["shows"][half][name])
                row += [f"{100 * found.value:.0f} %", f"{100 * found.low:.0f} to {100 * found.high:.0f} %"]
            rows.append(row)
    return Table(header, rows, sources=[source("behaviour", "table")])


def _rows(data: xr.Dataset) -> list[xr.Dataset]:
    """One for each request, held-out ones first."""
    order = sorted(range(data.sizes["prompt"]), key=lambda row: str(data["split"].values[row]) == "search")
    return [data.isel(prompt=row) for row in order]


def short(text: str, most: int = 56) -> str:
    """A request as an axis label, as plotly shows it literally."""
    return plain(text if len(text) <= most else f"{text[: most - 1]}…")


def _dumbbells(data: xr.Dataset) -> go.Figure:
    rows = _rows(data)[::-1]  # plotly counts from the bottom
    figure = go.Figure()
    ends = [row["ce"].sel(condition=[WITH, WITHOUT]).values for row in rows]
    x = [end for pair in ends for end in (*pair, None)]
    y = [place for place in range(len(rows)) for _ in range(3)]
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": "#8a929a", "width": 2}, hoverinfo="skip", showlegend=False
    )
    for name in map(str, data["condition"].values):
        values = [float(row["ce"].sel(condition=name)) for row in rows]
        hover = [
            f"{plain(str(row['prompt'].values))}<br>{row['split'].values}, {int(row['tokens'])} tokens"
            f"<br>{name}: {value:.3f} nats a token"
            for row, value in zip(rows, values, strict=True)
        ]
        figure.add_scatter(
            x=values, y=list(range(len(rows))), mode="markers", name=name, hoverinfo="text", hovertext=hover,
            marker={"color": COLOURS[name], "size": 10},
        )  # fmt: skip
    ticks = [short(str(row["prompt"].values)) for row in rows]
    return figure.update_layout(LIGHT).update_layout(
        xaxis={"title": {"text": "cross entropy of the reference completion (nats a token)"}, "rangemode": "tozero"},
        yaxis={"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": ticks}
        | {"range": [-0.7, len(rows) - 0.3]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )


def _bars(shows: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure()
    halves: Sequence[str] = [half for half in HALVES if half in shows]
    for name in shows["all"]:
        found = [Estimate.of(shows[half][name]) for half in halves]
        figure.add_bar(
            x=[f"{half} (n = {each.n})" for half, each in zip(halves, found, strict=True)],
            y=[100 * each.value for each in found], name=name, marker={"color": COLOURS[name]},
            error_y={
                "type": "data", "symmetric": False, "array": [100 * (each.high - each.value) for each in found],
                "arrayminus": [100 * (each.value - each.low) for each in found],
            },
        )  # fmt: skip
    return figure.update_layout(LIGHT).update_layout(
        barmode="group", yaxis={"title": {"text": "share (%)"}, "range": [0, 102]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip


CHAPTER = Chapter(
    name="behaviour",
    title="The behaviour",
    question="What does the model say with the prefix that it does not say without it?",
    measure=measure,
    show=show,
)
