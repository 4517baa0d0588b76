"""What a search for other words leaves in its folder: the answer, a table, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup

from mechsteer.markup import quoted
from mechsteer.plots import theme
from mechsteer.plots.labels import plain
from mechsteer.plots.lines import lines
from mechsteer.plots.themes import PALETTE
from mechsteer.prefix import MatchedPrefix
from mechsteer.prefix.evaluation import RANDOM, REFERENCE
from mechsteer.result import Result
from mechsteer.study.case import Case
from mechsteer.study.folder import write as write_file
from mechsteer.study.page import page

OURS, SOFT, NOTHING = "ours", "soft prefix", "no prefix"
STAGES = {"soft": SOFT, "projected": "projected", "beam": "beam", "final": OURS}
"""What the stages of a match are called."""
ORDER = (REFERENCE, OURS, "beam", "projected", SOFT, RANDOM, NOTHING)
"""Of the table's rows."""
LOSSES = {"behaviour": "cross entropy (nats a token)", "state": "minus the cosine", "feature": "minus pre-activation"}
"""What the loss of a target is."""
_HALVES = ("search", "held-out")
_MOST_POINTS = 4000


def table(evaluations: Mapping[str, Result], losses: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """One row for each prefix on each model, in the columns of `evaluate_prefixes`, pooled over held-out requests.

    Args:
        evaluations: by the model's name, that of the search first.
        losses: of the target, by prefix and half of the requests, on the first model.
    """
    rows = []
    for model, evaluation in evaluations.items():
        data, first = evaluation.data, model == next(iter(evaluations))
        for name in [each for each in ORDER if each in data["prefix"].values.tolist()]:
            one = data.sel(prefix=name)
            ids = evaluation.provenance["options"]["ids"].get(name)
            row: dict[str, Any] = {"model": model, "prefix": name, "text": str(one["text"].values)}
            row["tokens"] = None if ids is None else len(ids)
            for half in _HALVES:
                row[f"{half.replace('-', '_')}_loss"] = losses.get(name, {}).get(half) if first else None
            for value in ("cross_entropy", "cross_entropy_low", "cross_entropy_high", "perplexity"):
                row[value] = float(one[value])
            row["exact_match"] = float(one["exact_match"].mean())
            for k in data["k"].values.tolist():
                for value in ("exact_at", "overlap_at"):
                    row[f"{value}_{k}"] = float(one[value].sel(k=k).mean())
            for value in ("adherence_greedy", "adherence_sampled"):
                row[value] = float(one[value].mean()) if value in data else None
            row["survives"] = float(one["survives"].mean()) if ids else None
            rows.append(row)
    return pd.DataFrame(rows)


def summarised(
    case: Case,
    match: MatchedPrefix,
    transfer: Result | None,
    reference: Mapping[str, float],
    survives: Mapping[str, Sequence[bool]],
    target: str,
) -> dict[str, Any]:
    """What `summary.json` holds: the answer, losses of the target by stage and half, and the round trip."""
    stages = match.stages.data
    losses: dict[str, dict[str, float]] = {REFERENCE: dict(reference)}
    for stage, name in STAGES.items():
        found = stages.sel(stage=stage)
        losses[name] = {"search": float(found["loss"]), "held-out": float(found["held_out_loss"])}
    gap = match.gap_closed
    return {
        "reference": case.settings.prefix,
        "target": target,
        "loss": LOSSES[target.partition(":")[0]],
        "text": match.text,
        "ids": list(match.ids),
        "losses": losses,
        "gap_closed": None if np.isnan(gap) else gap,
        "evaluated": {name: int(stages["evaluated"].sel(stage=stage)) for stage, name in STAGES.items()},
        "round_trip": {half: [sum(each), len(each)] for half, each in survives.items()},
        "models": [case.model.name, *([] if transfer is None else [transfer.provenance["model"]["name"]])],
        "judge": None if case.judge is None else case.judge.name,
        "shown": None if case.judge is None else case.judge.shown,
    }


def write(
    folder: Path, match: MatchedPrefix, evaluation: Result, transfer: Result | None, summary: Mapping[str, Any]
) -> None:
    """`prefix.txt`, `table.csv`, `figures.html` and the Results."""
    evaluation.save(folder / "evaluation.safetensors")
    if transfer is not None:
        transfer.save(folder / "transfer.safetensors")
    frame = table(evaluations(summary, evaluation, transfer), summary["losses"])
    write_file(folder / "table.csv", frame.to_csv(index=False))
    write_file(folder / "prefix.txt", f"{match.text}\n")
    lead = Markup("in other words: <strong>{}</strong>").format(quoted(summary["text"]))
    figures = [search_figure(match, summary), stages_figure(summary)]
    write_file(folder / "figures.html", page(quoted(summary["reference"]), lead, figures))


def evaluations(summary: Mapping[str, Any], evaluation: Result, transfer: Result | None) -> dict[str, Result]:
    """By the names of their models."""
    found = [evaluation, *([] if transfer is None else [transfer])]
    return dict(zip(summary["models"], found, strict=True))


def search_figure(match: MatchedPrefix, summary: Mapping[str, Any]) -> go.Figure:
    """The lowest loss against the candidates evaluated, with every candidate's own, and the losses of the reference,
    the soft prefix and the beam as lines."""
    found, losses = match.found.trajectory.data, summary["losses"]
    before = summary["evaluated"]["projected"] + summary["evaluated"]["beam"]
    at = before + found["evaluated"].values
    level = {name: losses[name]["search"] for name in (REFERENCE, SOFT, "beam")}
    values = np.stack([found["best"].values, *(np.full(len(at), value) for value in level.values())])
    names = ["best so far", *(f"{name} {value:.3g}" for name, value in level.items())]
    array = xr.DataArray(
        values, dims=("line", "candidates"), name="loss", attrs={"long_name": summary["loss"]},
        coords={"line": names, "candidates": ("candidates", at, {"long_name": "prefixes evaluated"})},
    )  # fmt: skip
    figure = lines(array, "candidates", mode="lines")
    drawn: Any = figure.data
    for place, trace in enumerate(drawn):
        trace.update(name=plain(names[place]), line={"dash": "dash" if place else "solid", "shape": "hv"})
    some = np.unique(np.linspace(0, len(at) - 1, min(len(at), _MOST_POINTS)).astype(int))
    dots = go.Scatter(
        x=at[some], y=found["loss"].values[some], mode="markers", name="candidate", hoverinfo="x+y",
        marker={"color": PALETTE[0], "size": 4, "opacity": 0.25},
    )  # fmt: skip
    figure = go.Figure([dots, *drawn], figure.layout)
    # Many candidates are far above what matters.
    shown = np.concatenate([values.ravel(), np.quantile(found["loss"].values, [0.0, 0.5])])
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    pad = 0.05 * (high - low) or 0.1
    figure.update_yaxes(range=[low - pad, high + pad])
    return _finished(figure, "The search, on the requests to search on")


def stages_figure(summary: Mapping[str, Any]) -> go.Figure:
    """The loss of each stage on the requests to search on and on those held out."""
    names = [REFERENCE, *STAGES.values()]
    figure = go.Figure()
    for half, colour in zip(_HALVES, PALETTE, strict=False):
        values = [summary["losses"][name][half] for name in names]
        figure.add_bar(
            x=names, y=values, name=f"{half} requests", marker={"color": colour}, texttemplate="%{y:.3g}",
            textposition="outside", cliponaxis=False,
        )  # fmt: skip
    figure.update_layout(barmode="group", yaxis={"title": {"text": summary["loss"]}})
    return _finished(figure, "The stages, lower is better")


def _finished(figure: go.Figure, title: str) -> go.Figure:
    return theme(figure).update_layout(
        title_text=title, height=440, legend={"orientation": "h", "y": -0.2, "yanchor": "top"}
    )
