"""How the chapter "Which pushes are the same" is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from mechsteer.study.blocks import Block, Cards, Cell, Columns, Details, Figure, Heading, Paragraph, Table
from mechsteer.study.chapter import Findings
from mechsteer.study.curves import estimate_lines
from mechsteer.study.measures import Estimate, two
from mechsteer.study.sources import source

REFERENCE, NOTHING = "reference prefix", "no push"
# Requests whose completions are shown.
_SHOWN = 3
# Of the prefix's share of completions, from which on a push is said to show the behaviour as often.
_AS_OFTEN = 0.9


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.together.measure`."""
    summary, held = findings.summary, findings.results["held_out"].data
    order = closest_first(summary)
    some = held.isel(prompt=slice(_SHOWN))
    codes = {
        name: source("together", name, layer=summary["layer"]) for name in ("table", "pushes", "states", "completions")
    }
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["pushes"]]),
        replace(_table(summary, order), sources=[codes["table"], codes["pushes"]]),
        *[
            Paragraph(f"Left out: {name}. {why}")
            for name, why in summary["missing"].items()
        ],
        Heading("The same behaviour through the same states?"),
        Paragraph(_states(summary)),
        Figure(
            _distances(summary, order),
            "The residual stream at the tokens that predict the reference completions: its distance from that with the "
            "prefix, in percent of its length there (root mean square), with 95 % intervals over held-out requests.",
            sources=[codes["states"]],
        ),
        Paragraph(_patched(summary)),
        Heading("What is said"),
        Columns(
            ("push", *map(str, some["prompt"].values)),
            [(name, *map(str, some["completion"].sel(push=name).values)) for name in order],
            caption=f"Greedy completions of held-out requests, of at most {summary['max_new_tokens']} tokens.",
            words=summary["words"],
            shown=len(order),
            sources=[codes["completions"]],
        ),
        Details(
            "How this was made and measured, and what was tried",
            [
                Paragraph(_method(summary)),
                replace(_intervals(summary, order), sources=[codes["pushes"]]),
                *_tried(summary),
            ],
        ),
    ]  # fmt: skip


def headline(summary: Mapping[str, Any] | Any) -> str:
    """What came out, in sentences."""
    made = _made(summary)
    closest, others = made[0], made[1:]
    kl, none, closed = _of(summary, closest, "kl"), _of(summary, NOTHING, "kl"), _of(summary, closest, "closed")
    sentences = [
        f"Of {len(made)} other pushes the {closest} {_verb(closest, 'is')} closest to the prefix in what the model "
        f"predicts: along the "
        f"reference completions its predictions are {kl} nats a token away ({kl.interval}), without a push {none}: "
        + _gone(closed)
    ]
    if others:
        rest = [f"the {name} {_of(summary, name, 'closed').percent}" for name in others]
        sentences.append(f"Under the others it is less: {_and(rest)}.")
    if summary["judged"]:
        shares = [f"{_of(summary, name, 'shows').percent} under the {name}" for name in made]
        own = _of(summary, REFERENCE, "shows")
        sentences.append(
            f"Of the completions of held-out requests {own.percent} {summary['shown']} with the prefix "
            f"({own.percent_interval}), {_and(shares)}, and {_of(summary, NOTHING, 'shows').percent} without any."
        )
        often = [name for name in made if _as_often(summary, name) and _of(summary, name, "closed").value < 0.75]
        if often:
            least = min(often, key=lambda name: _of(summary, name, "closed").value)
            sentences.append(
                f"To show the behaviour as often is not to be the same: the {least} {_verb(least, 'does')}, and "
                f"{_left(_of(summary, least, 'closed'))} of the difference in predictions is still there."
            )
    return " ".join(sentences)


def _gone(closed: Estimate) -> str:
    if not closed.value > 0:
        return "none of the difference is gone."
    return f"{closed.percent} of the difference is gone ({closed.percent_interval})."


def _left(closed: Estimate) -> str:
    return f"{100 - round(100 * closed.value)} %"


def _as_often(summary: Mapping[str, Any] | Any, name: str) -> bool:
    return _of(summary, name, "shows").value >= _AS_OFTEN * _of(summary, REFERENCE, "shows").value > 0


def _cards(summary: Mapping[str, Any] | Any) -> list[tuple[str, str, str]]:
    made, layer = _made(summary), summary["layer"]
    closest = made[0]
    near = min(made, key=lambda name: _far(summary, name).value)
    mild = min(made, key=lambda name: _of(summary, name, "text").value)
    kl, far, text = _of(summary, closest, "kl"), _far(summary, near), _of(summary, mild, "text")
    return [
        ("closest to the prefix in its predictions", closest, f"KL {kl} nats a token; {kl.interval}"),
        (f"closest in its states after block {layer}", near, f"{far.percent} of their length away"),
        ("least harm to unrelated text", mild, f"{_signed(text.value)} nats a token; {text.interval}"),
    ]


def _states(summary: Mapping[str, Any] | Any) -> str:
    made, layer = _made(summary), summary["layer"]
    far = {name: _far(summary, name) for name in [*made, NOTHING]}
    near = min(made, key=lambda name: far[name].value)
    text = (
        f"After block {layer} the residual stream without a push is {far[NOTHING].percent} of its length away from "
        f"what it is with the prefix. Under the {near} it is {far[near].percent} away, the least of all"
    )
    first = made[0]
    text += "." if near == first else f"; under the {first}, whose predictions are the closest, {far[first].percent}."
    further = [name for name in made if far[name].low > far[NOTHING].high]
    if further:
        take = "take" if len(further) > 1 else _verb(further[0], "takes")
        text += f" The {_and(further)} {take} it further away than no push does."
    return text


def _patched(summary: Mapping[str, Any] | Any) -> str:
    made, layer = _made(summary), summary["layer"]
    kept = [f"{_of(summary, name, 'kept').percent} under the {name}" for name in made]
    back = max((_of(summary, name, "back") for name in [*made, NOTHING]), key=lambda each: each.value)
    text = (
        f"Each push's stream after block {layer} at these tokens was put into the prefix's own run, where that of no "
        f"push undoes {_of(summary, NOTHING, 'into')} nats a token. Of this the pushes' states keep {_and(kept)}. Put "
        f"the other way, the prefix's states leave these runs, and that without a push, at most {back} nats a token "
        "from the prefix's own: "
    )
    text += (
        "what is elsewhere, for later blocks to attend to, hardly matters."
        if back.value < 0.05 * _of(summary, NOTHING, "kl").value
        else "what is elsewhere, for later blocks to attend to, matters too."
    )
    if layer == summary["n_layers"] - 1:
        text += " That block is the last one, so that predictions follow from its state alone."
    return text


def _table(summary: Mapping[str, Any] | Any, order: Sequence[str]) -> Table:
    header = ["push", "KL from the prefix", *([summary["shown"]] if summary["judged"] else [])]
    header += ["CE of its completions", "KL from no push", "rise of CE, unrelated text"]
    header += [f"states apart, block {summary['layer']}", "its states put in", "put in its run"]
    rows: list[list[Cell]] = []
    for name in order:
        size = summary["pushes"][name]["size"]
        row: list[Cell] = [f"{name}: {size}" if size else name, _cell(_of(summary, name, "kl"))]
        row += [_percent(_of(summary, name, "shows"))] if summary["judged"] else []
        row += [_short(_of(summary, name, column)) for column in ("reference", "own", "text")]
        row += [_short(_far(summary, name)), *(_short(_of(summary, name, column)) for column in ("into", "back"))]
        rows.append(row)
    n = _of(summary, REFERENCE, "kl").n
    return Table(
        header, rows,
        f"All on held-out requests (n = {n}), the closest to the prefix first; CE (of the prefix's completions) and KL "
        "in nats a token, in brackets 95 % intervals. States apart: the distance from the prefix's, as a share of "
        "their length. The last two columns are the KL from the prefix of the prefix's run with the push's states put "
        "in, and of the push's run with the prefix's. The prefix itself moves what the model would have said, and "
        "unrelated text, as far as its own row says: less than that is not a virtue by itself.",
    )  # fmt: skip


def _intervals(summary: Mapping[str, Any] | Any, order: Sequence[str]) -> Table:
    """The same with all intervals."""
    columns = {
        "closed": "KL from the prefix that is gone", "kept": "the same, its states put in",
        "reference": "CE of the prefix's completions", "own": "KL from no push", "text": "rise of CE, unrelated text",
        "into": "its states put in", "back": "put in its run",
    }  # fmt: skip
    rows = [
        [name, *((_percent if each in ("closed", "kept") else _cell)(_of(summary, name, each)) for each in columns)]
        for name in order
    ]
    return Table(
        ["push", *columns.values()], rows,
        f"With 95 % intervals over {_of(summary, REFERENCE, 'kl').n} requests, of unrelated text over "
        f"{summary['texts']} texts. The first two are shares of what there is without a push.",
    )  # fmt: skip


def _short(found: Estimate) -> float:
    return round(found.value, 3) + 0.0


def _percent(found: Estimate) -> str:
    return f"{found.value:.0%}".replace("%", "\u00a0%") + f" ({100 * found.low:.0f}–{100 * found.high:.0f})"


def _cell(found: Estimate) -> str:
    return f"{found} ({two(found.low)}–{two(found.high)})"


def _signed(value: float) -> str:
    return ("+" if round(value, 2) > 0 else "") + two(value)


def _distances(summary: Mapping[str, Any] | Any, order: Sequence[str]) -> go.Figure:
    groups = {name: summary["pushes"][name]["distance"] for name in order if name != REFERENCE}
    return estimate_lines(
        groups, list(range(summary["n_layers"])), x_title="after block", y_title="distance", units="%",
        title="How far from the prefix's states",
    ).update_yaxes(rangemode="tozero")  # fmt: skip


def _method(summary: Mapping[str, Any] | Any) -> str:
    score = (
        f"the share of greedy completions that {summary['shown']}, less {summary['weight']:g} for each nat a token by "
        "which what the model says by itself becomes less likely"
        if summary["judged"]
        else f"minus the cross entropy of the reference completions, less {summary['weight']:g} times the rise of that "
        "of what the model says by itself"
    )
    return (
        "Every push was made on the requests to search on. The vector is a difference of means with the strength of "
        "choose_alpha, at every token. Features are those that the prefix raises most over its completions, held at "
        "every token at a multiple of their mean there. The weight edit adds, at tokens like those of the reference "
        "completions without the prefix, what the prefix adds behind its block, and changes unrelated documents least "
        "(fit_edit); its block and strength were chosen on requests that the tried edits were not made from. What is "
        f"best was chosen by {score}. {_match(summary)}KL from the prefix is that from the prefixed model's "
        "predictions to the pushed one's along the reference completions, KL from no push that from the model alone "
        "along what it says by itself. Unrelated texts are plain documents behind what the push puts first; their "
        "first token is given. Intervals are 95 %: percentile bootstrap over requests or texts, and Wilson's for "
        "shares of completions."
    )


def _match(summary: Mapping[str, Any] | Any) -> str:
    match = summary["match"]
    if match is None:
        return ""
    loss = {stage: two(value) for stage, value in match["loss"].items()}
    return (
        f"The soft prefix has the reference's number of tokens and took {match['steps']} steps of Adam; the searched "
        f"one starts from it, took {match['evaluated']} candidates, and may hold neither words of the behaviour nor "
        f"of the prefix. On the first tokens of the completions that they were sought with, the loss is {loss['soft']} "
        f"for the soft prefix, {loss['projected']} for its nearest tokens, {loss['beam']} for a beam's and "
        f"{loss['final']} for the searched prefix. "
    )


def _tried(summary: Mapping[str, Any] | Any) -> list[Block]:
    target = "target: share of completions" if summary["judged"] else "target: minus cross entropy"
    return [
        Table(
            ("setting", target, "rise of the model's own", "score"),
            [(each["setting"], each["target"], each["rise"], each["score"]) for each in tried],
            f"{name[0].upper()}{name[1:]}: what was tried, on requests to search on. The score is the target less "
            f"{summary['weight']:g} for each nat a token of the rise.",
            sources=[source("together", name.replace(" ", "_"))],
        )
        for name, tried in summary["tried"].items()
    ]


# ---- the numbers ----


def _of(summary: Mapping[str, Any] | Any, name: str, column: str) -> Estimate:
    return Estimate.of(summary["pushes"][name][column])


def _far(summary: Mapping[str, Any] | Any, name: str) -> Estimate:
    """The distance from the prefix's states, where states are exchanged."""
    return Estimate.of(summary["pushes"][name]["distance"][summary["layer"]])


def closest_first(summary: Mapping[str, Any] | Any) -> list[str]:
    """All pushes: the prefix, then the others in the order of how close their predictions are to it."""
    return sorted(summary["pushes"], key=lambda name: (name != REFERENCE, _of(summary, name, "kl").value))


def _made(summary: Mapping[str, Any] | Any) -> list[str]:
    """The pushes that are neither the prefix nor none."""
    return [name for name in closest_first(summary) if name not in (REFERENCE, NOTHING)]


def _verb(name: str, singular: str) -> str:
    """The form of a verb that goes with a push's name."""
    return {"is": "are", "does": "do", "takes": "take"}[singular] if name.endswith("s") else singular


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
