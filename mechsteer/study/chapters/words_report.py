"""How the chapter "As other words" is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechsteer.markup import printable, quoted
from mechsteer.plots import plain, theme, tokens
from mechsteer.plots.themes import PALETTE
from mechsteer.prefix.evaluation import RANDOM, REFERENCE
from mechsteer.study.blocks import Block, Cards, Cell, Columns, Details, Figure, Heading, Paragraph, Table, View
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.behaviour import WITH
from mechsteer.study.curves import estimate_lines
from mechsteer.study.measures import Estimate, two
from mechsteer.study.sources import source

OURS, BEAM, NEAREST, SOFT, HOTFLIP, NOTHING = (
    "other words", "beam", "nearest tokens", "soft prefix", "HotFlip alone", "no prefix",
)  # fmt: skip
HALVES = ("search", "held-out")
ROWS = (REFERENCE, OURS, BEAM, NEAREST, SOFT, HOTFLIP, RANDOM, NOTHING)
"""Of the table, in their order."""
STAGES = {"soft": SOFT, "projected": NEAREST, "beam": BEAM, "final": OURS}
"""What the stages of a match are called."""

Summary = Mapping[str, Any] | Any


def show(findings: Findings) -> list[Block]:
    """Draws the findings of `mechsteer.study.chapters.words.measure`."""
    summary, results = findings.summary, findings.results
    held, parts = results["held_out"].data, results["tokens"].data
    codes = {name: source("words", name) for name in ("cards", "search", "table", "completions", "tokens", "layers")}
    return [
        Paragraph(headline(summary)),
        Cards(_cards(summary), sources=[codes["cards"], codes["search"]]),
        *(
            [
                View(
                    tokens([printable(str(each)) for each in parts["text"].values], parts["rise"].values),
                    "The other words, token by token. Blue: leaving this token out raises the held-out cross entropy, "
                    f"at most by {two(float(np.abs(parts['rise'].values).max()))} nats a token; red: it lowers it.",
                    sources=[codes["tokens"]],
                )
            ]
            if summary["size"] > 1
            else []
        ),
        Heading("The way there"),
        Paragraph(_way(summary)),
        Figure(
            _search(results["search"].data, summary), _search_caption(summary), height=440, sources=[codes["search"]]
        ),
        Figure(_stages(summary), _stages_caption(summary), height=420, sources=[codes["table"]]),
        Heading("On held-out requests"),
        Paragraph(_equal(summary)),
        replace(_table(summary, ROWS), sources=[codes["table"]]),
        Columns(
            ("request", WITH, OURS, HOTFLIP),
            [
                (str(prompt), *(str(held["completion"].sel(prefix=name)[row].values) for name in _SHOWN))
                for row, prompt in enumerate(held["prompt"].values)
            ],
            f"Greedy completions of held-out requests, of at most {summary['max_new_tokens']} tokens.",
            words=summary["words"],
            shown=4,
            sources=[codes["completions"]],
        ),
        Heading("Layer by layer"),
        Paragraph(_by_layer(summary)),
        replace(_layers(summary), sources=[codes["layers"]]),
        Figure(
            _explained(summary),
            "Share of the change that the prefix makes to the states behind a block, on held-out requests, that a "
            "prefix made for that block explains; bands are 95 % intervals. Without a prefix it is 0.",
            height=360,
            sources=[codes["layers"]],
        ),
        replace(_continuations(results["layers"].data, summary), sources=[codes["layers"]]),
        *([Heading(f"On {summary['transfer']['model']}"), *_transfer(summary)] if summary["transfer"] else []),
        Details(
            "How this was measured, and more measures",
            [Paragraph(_method(summary)), replace(_matches(summary), sources=[codes["table"]])],
        ),
    ]


_SHOWN = (REFERENCE, OURS, HOTFLIP)


# ---- sentences ----


def headline(summary: Summary) -> str:
    """What came out, in sentences."""
    ce = {name: Estimate.of(each) for name, each in summary["cross_entropy"].items()}
    effect, n = Estimate.of(summary["effect"][OURS]), summary["size"]
    levels = (
        f"the reference completions' cross entropy is {ce[OURS]} nats a token, against {ce[REFERENCE]} with the prefix "
        f"and {ce[NOTHING]} without it"
    )
    words = f"{n} other token{'s' * (n > 1)}, {quoted(summary['text'])},"
    if np.isnan(effect.value):
        text = f"With {words} {levels}: the prefix has no effect of which to keep a share."
    else:
        text = (
            f"{words[0].upper()}{words[1:]} {'have' if n > 1 else 'has'} {effect.percent} of the prefix's effect on "
            f"held-out requests ({effect.percent_interval}): {levels}."
        )
    if summary["greedy"]:
        ours, theirs = (Estimate.of(summary["greedy"][name]) for name in (OURS, REFERENCE))
        text += (
            f" Of the completions, {ours.percent} {summary['shown']} ({ours.percent_interval}); with the prefix "
            f"{theirs.percent}."
        )
    return f"{text} {_survival(summary)} {_hardening(summary)}"


def _survival(summary: Summary) -> str:
    kept, n = summary["survives"]
    forbidden = (
        f"They hold none of the {len(summary['forbidden'])} forbidden words and word parts"
        if summary["forbidden"]
        else "No words were forbidden"
    )
    return f"{forbidden}, and as text they encode to the same tokens again in {kept} of {n} held-out prompts."


def _hardening(summary: Summary) -> str:
    searched, held = (Estimate.of(summary["closed"][half]) for half in HALVES)
    if np.isnan(searched.value):
        return "The tokens nearest to the soft prefix lose nothing that could be won back."
    text = (
        f"Of what the nearest tokens lose against the soft prefix, the search wins back {searched.percent} on the "
        f"requests it saw ({searched.percent_interval})"
    )
    if np.isnan(held.value):
        return f"{text}."
    return f"{text} and {held.percent} on held-out ones ({held.percent_interval})."


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    kept, n = summary["survives"]
    note = f"{summary['size']} tokens, which survive in {kept} of {n} held-out prompts"
    cards = [("other words", quoted(summary["text"]), note)]
    effect, closed = Estimate.of(summary["effect"][OURS]), Estimate.of(summary["closed"][HALVES[0]])
    if summary["greedy"]:
        found, theirs = (Estimate.of(summary["greedy"][name]) for name in (OURS, REFERENCE))
        note = f"{found.percent_interval}; with the prefix {theirs.percent}"
        cards.append((f"completions that {summary['shown']}, held out", found.percent, note))
    if not np.isnan(effect.value):
        cards.append(("of the prefix's effect, held out", effect.percent, effect.percent_interval))
    if not np.isnan(closed.value):
        cards.append(("hardening gap closed", closed.percent, f"requests to search on; {closed.percent_interval}"))
    return cards


def _way(summary: Summary) -> str:
    ce = {half: {name: Estimate.of(each) for name, each in summary["ce"][half].items()} for half in HALVES}
    fall = {name: two(ce["held-out"][name].value - ce["search"][name].value) for name in (OURS, SOFT, REFERENCE)}
    return (
        f"A soft prefix of {summary['size']} embeddings was optimised in {summary['steps']} steps on "
        f"{summary['searched']} requests; {_stopped(summary)} The tokens nearest to it, one by one, "
        f"take the cross entropy from {ce['search'][SOFT]} to {ce['search'][NEAREST]} nats a token; a beam that "
        f"puts tokens in slot by slot gets to {ce['search'][BEAM]}, and a search from there, after "
        f"{summary['evaluated']:,} candidates in all, to {ce['search'][OURS]}. HotFlip from random tokens, with as "
        f"many candidates, ends at {ce['search'][HOTFLIP]}. {_against_hotflip(summary)} From the requests that were "
        f"searched on to the held-out ones the cross entropy rises by {fall[OURS]} with the other words, by "
        f"{fall[SOFT]} with the soft prefix, and by {fall[REFERENCE]} with the prefix itself, for which nothing was "
        "searched."
    )


def _stopped(summary: Summary) -> str:
    if not summary["validated"]:
        return "there were no further ones to say when it starts to learn them by heart."
    return f"{summary['validated']} further ones said which step was best."


def _against_hotflip(summary: Summary) -> str:
    above = Estimate.of(summary["above_ours"][HOTFLIP])
    if above.low > 0:
        verdict = "more than the other words"
    elif above.high < 0:
        verdict = "less than the other words"
    else:
        verdict = "which may be chance"
    size = f"{abs(above.value):.3f}"
    way = "above" if above.value >= 0 else "below"
    return (
        f"On held-out requests that is {size} nats a token {way} the other words ({verdict}: 95 % interval of the "
        f"difference {above.low:.3f} to {above.high:.3f})."
    )


def _equal(summary: Summary) -> str:
    exact, first, shared = (Estimate.of(summary[name][OURS]) for name in ("exact", "exact_at", "overlap_at"))
    text = (
        f"Under the other words {exact.percent} of the greedy completions are the prefix's own, word for word "
        f"({exact.percent_interval}), and {first.percent} begin with the same eight tokens; of these eight "
        f"{shared.percent} are among the first eight. "
    )
    if summary["sampled"]:
        ours, theirs = (Estimate.of(summary["sampled"][name]) for name in (OURS, REFERENCE))
        text += (
            f"Drawn at temperature 1, {ours.percent} of them {summary['shown']} ({ours.percent_interval}); with the "
            f"prefix {theirs.percent}. "
        )
    ours, theirs = (summary["perplexity"][name] for name in (OURS, REFERENCE))
    if ours is None or theirs is None:
        return text.strip()
    likely = f"perplexity {_likely(ours)} against {_likely(theirs)} of the prefix"
    if ours > theirs:
        return f"{text}The model itself finds the words unlikely where they stand: {likely}."
    return f"{text}To the model itself they are no odder than the prefix: {likely}."


def _likely(perplexity: float) -> str:
    """As in "4.7", "1,240" and "8.9e+08"."""
    return (
        f"{perplexity:.1f}" if perplexity < 100 else f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.1e}"
    )


def _by_layer(summary: Summary) -> str:
    low = min(summary["layers"], key=lambda each: each["layer"])
    high = max(summary["layers"], key=lambda each: each["layer"])
    soft = [Estimate.of(each["explained"]["soft"]).percent for each in (low, high)]
    final = [Estimate.of(each["explained"]["final"]).percent for each in (low, high)]
    cosines = [each["cosine"]["held-out"]["none"] for each in (low, high)]
    text = (
        "Here words are made for the states behind one block instead of for the completions: the residual stream at "
        "the tokens of the request and at the last one before the answer is to point where it does with the prefix. A "
        f"cosine says little of that, as without any prefix it is {cosines[0]:.3f} behind block {low['layer']} and "
        f"{cosines[1]:.3f} behind block {high['layer']}. Of the change that the prefix makes, a soft prefix explains "
        f"{soft[0]} behind block {low['layer']} and {soft[1]} behind block {high['layer']}, and tokens {final[0]} and "
        f"{final[1]}."
    )
    if all(each["shows"] for each in summary["layers"]):
        shares = {each["layer"]: Estimate.of(each["shows"]).percent for each in summary["layers"]}
        shown = [f"{percent} of those made for block {layer}" for layer, percent in shares.items()]
        theirs = Estimate.of(summary["layers_reference"])
        text += (
            f" Of the completions under the tokens, {', '.join(shown)} {summary['shown']}; with the prefix "
            f"{theirs.percent}."
        )
    return text


def _transfer(summary: Summary) -> list[Block]:
    moved = summary["transfer"]
    effect, ce = Estimate.of(moved["effect"][OURS]), Estimate.of(moved["cross_entropy"][OURS])
    theirs = {name: Estimate.of(moved["cross_entropy"][name]) for name in (REFERENCE, NOTHING)}
    text = (
        f"The same tokens before the same held-out requests, on {moved['model']}, which was no part of the search. The "
        f"completions that the prefix brings about there have a cross entropy of {ce} nats a token under the other "
        f"words, against {theirs[REFERENCE]} with the prefix and {theirs[NOTHING]} without"
    )
    text += "." if np.isnan(effect.value) else f": {effect.percent} of its effect ({effect.percent_interval})."
    if moved["greedy"]:
        ours, own = (Estimate.of(moved["greedy"][name]) for name in (OURS, REFERENCE))
        text += (
            f" Of the completions, {ours.percent} {summary['shown']} ({ours.percent_interval}); with the prefix "
            f"{own.percent}."
        )
    table = _table({**summary, **moved}, [name for name in ROWS if name in moved["cross_entropy"]])
    return [Paragraph(text), replace(table, sources=[source("words", "transfer", model=moved["model"])])]


def _method(summary: Summary) -> str:
    forbidden = ", ".join(summary["forbidden"]) or "none"
    return (
        "Words are searched for on the requests to search on by the cross entropy of the first 32 tokens of the "
        'reference completions, as "Steering Prefix Generation" has it: each counts three times what later ones do. '
        "No candidate may hold, in any casing and in any split into tokens, one of these parts of words: "
        f"{forbidden}; none may hold what does not print; and as text in its place in the prompt each must encode to "
        "the same tokens again. The hardening gap is what lies between the nearest tokens, which keep to the forbidden "
        "words too, and the soft prefix; the effect of the prefix is what lies between the cross entropy with and "
        "without it. The round trip and all numbers of the table are those of held-out requests, on which nothing was "
        "chosen. Random tokens are as many as the prefix has. Intervals are 95 %: percentile bootstrap over requests, "
        "and Wilson's for shares of completions."
    )


# ---- tables ----


def _table(summary: Summary, names: Sequence[str]) -> Table:
    judged = bool(summary["greedy"])
    header = ["prefix", "text", "cross entropy (nats a token)", "95 % interval", "of the effect"]
    header += [summary["shown"], "95 % interval", "sampled"] if judged else []
    rows: list[list[Cell]] = []
    for name in names:
        ce, effect = Estimate.of(summary["cross_entropy"][name]), Estimate.of(summary["effect"][name])
        text = summary["texts"].get(name, "")
        row: list[Cell] = [
            name, quoted(text) if text else "–", ce.value, f"{two(ce.low)} to {two(ce.high)}",
            None if np.isnan(effect.value) else effect.percent,
        ]  # fmt: skip
        if judged:
            greedy, sampled = (Estimate.of(summary[how][name]) for how in ("greedy", "sampled"))
            row += [greedy.percent, f"{100 * greedy.low:.0f} to {100 * greedy.high:.0f} %", sampled.percent]
        rows.append(row)
    return Table(header, rows, f"Held-out requests, n = {summary['held_out']}.")


def _matches(summary: Summary) -> Table:
    header = [
        "prefix",
        "same completion",
        "95 % interval",
        "same first 8",
        "shared of first 8",
        "perplexity",
        "survives",
    ]
    rows: list[list[Cell]] = []
    for name in ROWS:
        exact, first, shared = (Estimate.of(summary[each][name]) for each in ("exact", "exact_at", "overlap_at"))
        likely = summary["perplexity"][name]
        rows.append(
            [
                name, exact.percent, f"{100 * exact.low:.0f} to {100 * exact.high:.0f} %", first.percent,
                shared.percent, None if likely is None else _likely(likely), _survives(summary, name),
            ]
        )  # fmt: skip
    return Table(
        header,
        rows,
        "How like the prefix's own the greedy completions are: the same as a whole, in their first eight tokens, and "
        "how many of its first eight tokens are among theirs; how odd the model finds each prefix where it stands; and "
        "in how many held-out prompts it encodes to the same tokens again.",
    )


def _survives(summary: Summary, name: str) -> str | None:
    return None if name in (SOFT, NOTHING) else f"{100 * summary['survive'][name]:.0f} %"


def _layers(summary: Summary) -> Table:
    judged = all(each["shows"] for each in summary["layers"])
    header = ["block", "cosine, no prefix", "soft", "nearest tokens", "tokens", "soft explains", "tokens explain"]
    header += ["text", *([summary["shown"], "95 % interval"] if judged else [])]
    rows: list[list[Cell]] = []
    for each in summary["layers"]:
        cosine, explained = each["cosine"][HALVES[1]], each["explained"]
        row: list[Cell] = [
            each["layer"], *(f"{cosine[stage]:.3f}" for stage in ("none", "soft", "projected", "final")),
            *(Estimate.of(explained[stage]).percent for stage in ("soft", "final")), quoted(each["text"]),
        ]  # fmt: skip
        if judged:
            found = Estimate.of(each["shows"])
            row += [found.percent, f"{100 * found.low:.0f} to {100 * found.high:.0f} %"]
        rows.append(row)
    evaluated = max(each["evaluated"] for each in summary["layers"])
    return Table(header, rows, f"Held-out requests, n = {summary['held_out']}; up to {evaluated} candidates a block.")


def _continuations(data: xr.Dataset, summary: Summary) -> Columns:
    held = data.isel(prompt=data["split"].values == HALVES[1])
    layers = held["layer"].values.tolist()
    return Columns(
        ("request", WITH, *(f"for block {layer}" for layer in layers)),
        [
            (str(prompt), str(held["reference_completion"][row].values), *map(str, held["completion"][:, row].values))
            for row, prompt in enumerate(held["prompt"].values)
        ],
        "Greedy completions of held-out requests under the tokens that were made for the states behind a block.",
        words=summary["words"],
        shown=3,
    )


# ---- figures ----


def _search(data: xr.Dataset, summary: Summary) -> go.Figure:
    figure = go.Figure()
    at = data["evaluated"].values
    for place, method in enumerate(map(str, data["method"].values)):
        loss, best = (data[name].values[place] for name in ("loss", "best"))
        # An axis whose first values are NaN is none of numbers.
        tried, found, colour = np.isfinite(loss), np.isfinite(best), PALETTE[place]
        figure.add_scatter(
            x=at[tried], y=loss[tried], mode="markers", name=f"{method}, each candidate", hoverinfo="x+y",
            marker={"color": colour, "size": 4, "opacity": 0.3}, showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=at[found], y=best[found], mode="lines", name=method, line={"color": colour, "shape": "hv", "width": 3}
        )
    level = {STAGES[stage]: float(data["level"].sel(stage=stage)) for stage in ("soft", "projected")}
    level[REFERENCE] = Estimate.of(summary["ce"][HALVES[0]][REFERENCE]).value
    for place, (name, value) in enumerate(level.items()):
        line = {"color": PALETTE[place + 2], "dash": ("dash", "dot", "dashdot")[place]}
        figure.add_scatter(
            x=[at[0], at[-1]], y=[value, value], mode="lines", name=f"{name} {two(value)}", line=line
        )  # fmt: skip
    # Most candidates are far above what matters: the axis ends where three in four of the first method's do.
    ours = data["loss"].values[0]
    shown = np.concatenate([data["best"].values[0], list(level.values()), [np.nanquantile(ours, 0.75)]])
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    pad = 0.06 * (high - low) or 0.1
    figure.update_layout(
        title_text="The search", height=440, legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        xaxis={"title": {"text": "prefixes of tokens evaluated"}},
        yaxis={"title": {"text": "cross entropy [nats a token]"}, "range": [low - pad, high + pad]},
    )  # fmt: skip
    return theme(figure)


def _search_caption(summary: Summary) -> str:
    return (
        f"The lowest cross entropy so far on the {summary['searched']} requests that were searched on, and that of "
        "each candidate as a point, where it is low enough to be seen. The search for other words begins when the beam "
        "has used its candidates; HotFlip begins with random tokens. Lines: the soft prefix, the tokens nearest to it, "
        "and the prefix itself."
    )


def _stages(summary: Summary) -> go.Figure:
    names = [name for name in ROWS if name in summary["ce"][HALVES[0]]][::-1]
    figure = go.Figure()
    for place, half in enumerate(HALVES):
        found = [Estimate.of(summary["ce"][half][name]) for name in names]
        figure.add_scatter(
            x=[each.value for each in found], y=np.arange(len(names)) + 0.12 * (1 - 2 * place), mode="markers",
            name=f"{half} requests", marker={"color": PALETTE[place], "size": 9},
            error_x={"type": "data", "symmetric": False, "array": [each.high - each.value for each in found],
                     "arrayminus": [each.value - each.low for each in found], "thickness": 1.5, "width": 4},
            text=[plain(name) for name in names], hovertemplate="%{text}: %{x:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        title_text="From the soft prefix to words", height=420,
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        xaxis={"title": {"text": "cross entropy [nats a token]"}},
        yaxis={"tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]},
    )  # fmt: skip
    return theme(figure)


def _stages_caption(summary: Summary) -> str:
    return (
        "Cross entropy of the whole reference completions under each prefix, on the requests that were searched on "
        f"(n = {summary['searched']}) and on the held-out ones (n = {summary['held_out']}), with 95 % intervals over "
        "requests."
    )


def _explained(summary: Summary) -> go.Figure:
    groups = {
        name: [each["explained"][stage] for each in summary["layers"]]
        for stage, name in (("soft", SOFT), ("beam", BEAM), ("final", "tokens"))
    }
    layers = [each["layer"] for each in summary["layers"]]
    return estimate_lines(
        groups, layers, x_title="block", y_title="change explained", title="States, layer by layer", units="%",
        height=360,
    )  # fmt: skip
