"""`mechsteer travel`: how the push of a prefix travels through the residual stream."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.cli.answers import Answer, Command, case_of, identity, settings_of
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import torch
    import xarray as xr

    from mechsteer.model import Model
    from mechsteer.prompts import Prompts
    from mechsteer.result import Result
    from mechsteer.study.fork import Forks
    from mechsteer.study.log import Log
    from mechsteer.study.settings import Settings

EPILOG = options.epilog(
    'mechsteer travel "Talk only about cats." --out cats-travel',
    'mechsteer travel "Talk only about cats." --from 2 --to 4 --out two-blocks',
    "mechsteer travel --prefix mine.txt --requests mine.jsonl --model gpt2 --out mine",
    after="The place looked at is the fork: the token at which the completion with the prefix and the one without it "
    "part.",
    s1="",
)


def travel(
    text: options.Text = None,
    first: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=0,
            help="The layer before which the push begins. Default: the first before which it brings "
            "about half of the logit gap's change.",
        ),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--to", min=0, help="The layer behind which it is looked at last. Default: the last.")
    ] = None,
    out: options.Out = Path("travel"),
    *,
    question: options.Question,
    running: options.Running,
) -> None:
    """Follow what a prefix adds to the residual stream: from layer to layer, and as far as a gradient foretells it."""
    if first is not None and last is not None and first > last:
        raise MechsteerError(f"--from {first} comes after --to {last}: give layers in the order of the model")
    about = options.prefix_of(text, question.prefix)
    settings = settings_of(about, question, running)
    asked = identity(settings) | {"from": first, "to": last}

    def work(log: "Log", folder: Path) -> Answer:
        return _followed(settings, first, last, log, folder, progress=not running.quiet)

    Command("travel", f'How it travels: "{about}"', out.expanduser(), asked, running).run(work, _shown)


def _followed(
    settings: "Settings", first: int | None, last: int | None, log: "Log", folder: Path, *, progress: bool
) -> Answer:
    from mechsteer.propagator import identity_pairs
    from mechsteer.study.chapters.travel import MOST_FORKS, MOST_JACOBIANS, N_RANDOM
    from mechsteer.study.fork import forks

    case = case_of(settings, log, folder)
    model = case.model
    for option, layer in (("--from", first), ("--to", last)):
        if layer is not None and layer >= model.n_layers:
            raise MechsteerError(
                f"{option} {layer} is no layer of {model.name}, which has layers 0 to {model.n_layers - 1}"
            )
    held = forks(case, case.rows("held-out")[:MOST_FORKS])
    if held is None:
        raise MechsteerError(
            "No completion parts from what the model says without the prefix: there is nothing to follow. Choose "
            "another prefix, or more requests."
        )
    log.line("what the prefix adds to the stream where the completions part")
    plain, prefixed = (_streams(model, prompts) for prompts in (held.plain, held.prefixed))
    deltas = prefixed - plain
    there = [layer for layer in range(model.n_layers) if bool(deltas[layer].any(-1).all())]
    end = model.n_layers - 1 if last is None else last
    if not there or there[0] > end or (first is not None and first not in there):
        where = f"before layer {end if first is None else first}"
        since = f" It is there from layer {there[0]} on: give --from and --to such layers." if there else ""
        raise MechsteerError(
            f"The prefix adds nothing at the fork {where} of {model.name}: attention has to carry it there first."
            + since
        )
    log.line(f"putting it in place before each of {len(there)} layers")
    moved = _moved(model, held, prefixed, there, settings.seed, progress)
    begin = min(_half(moved), end) if first is None else first
    log.line(f"the push before layer {begin}, put in place, in every later layer")
    push = _push(model, held, plain, deltas, begin, end, settings.seed)
    log.line("the Jacobians between layers, and what is left of the identity")
    few = held.plain[range(min(MOST_JACOBIANS, len(held.rows)))]
    own = deltas[begin][: len(few)]
    share = identity_pairs(model, few, vectors={"prefix": own}, random=N_RANDOM, seed=settings.seed)
    share = share.sel(source=list(range(begin, end + 1)), target=list(range(begin, end + 1)))
    log.line("how far the gradient is right")
    layers = [layer for layer in there if begin <= layer <= end]
    regime = _regime(model, held, deltas.mean(1), layers, settings.seed, progress)
    results = {"moved": moved, "push": push, "identity": share, "regime": regime}
    summary = _summary(results, begin, end, len(held.rows), len(few))
    summary |= {"prefix": settings.prefix, "model": model.id._asdict()}
    return Answer(summary, results, _figures(results, begin), _lead(summary))


def _streams(model: "Model", prompts: "Prompts") -> "torch.Tensor":
    """The stream [layer, prompt, d_model] at the fork: before every layer, and at the end."""
    import torch

    from mechsteer.site import Site

    sites = [*(Site("resid_pre", layer) for layer in range(model.n_layers)), Site("resid_post", model.n_layers - 1)]
    given = prompts.padded("right")
    found = model.states_at(given, sites, given.at(-1))
    return torch.stack([found[site] for site in sites])


def _moved(
    model: "Model", held: "Forks", prefixed: "torch.Tensor", layers: list[int], seed: int, progress: bool
) -> "Result":
    """What the push brings about before every layer: the change of the logit gap, as a share of its whole change."""
    import xarray as xr

    from mechsteer.interventions import Replace
    from mechsteer.patching.activation import objective_of
    from mechsteer.result import Result, provenance
    from mechsteer.site import Site
    from mechsteer.sweeps import sweep

    swept = sweep(
        model, held.plain, axes={"layer": layers}, measure=held.gap.named("gap"), progress=progress,
        build=lambda layer: Replace(Site("resid_pre", layer), prefixed[layer], at=-1),
    )  # fmt: skip
    base, whole = (objective_of(model, prompts, held.gap) for prompts in (held.plain, held.prefixed))
    units = {"units": "logits"}
    arrays = {
        "change": (("layer", "prompt"), swept["gap"].values - base, units),
        "whole": ("prompt", whole - base, units),
    }
    made = provenance(model=model.id, seed=seed, measure="logit gap at the fork")
    return Result(xr.Dataset(arrays, {"layer": layers, "prompt": list(held.rows)}), provenance=made)


def _half(moved: "Result") -> int:
    """The first layer before which the push brings about half of the gap's whole change; the last one if none does."""
    share = moved["change"].sum("prompt") / moved["whole"].sum("prompt")
    enough = share["layer"].values[share.values >= 0.5]
    return int(enough[0]) if len(enough) else int(share["layer"].values[-1])


def _push(
    model: "Model", held: "Forks", plain: "torch.Tensor", deltas: "torch.Tensor", begin: int, end: int, seed: int
) -> "Result":
    """Where the push is behind every block, in truth and by the Propagator."""
    import torch
    import xarray as xr

    from mechsteer.interventions import Replace
    from mechsteer.propagator import Propagator
    from mechsteer.result import Result, provenance
    from mechsteer.site import Site

    source, own = Site("resid_pre", begin), deltas[begin]
    sites = [Site("resid_post", layer) for layer in range(begin, end + 1)]
    run = model.run(held.plain, [Replace(source, plain[begin] + own, at=-1)], record=sites, logits="none")
    fork = run.prompts.at(-1)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in _ARRAYS}
    for site in sites:
        # Behind a block is before the next one.
        true = run.activations[site][fork] - plain[int(site.layer or 0) + 1]
        linear = Propagator(model, held.plain, source, site, source_pos=-1, target_pos=-1).mv(own)
        whole = deltas[int(site.layer or 0) + 1]
        size = own.norm(dim=-1)
        columns["length"].append(true.norm(dim=-1) / size)
        columns["linear_length"].append(linear.norm(dim=-1) / size)
        columns["cos"].append(torch.cosine_similarity(true, own, dim=-1))
        columns["linear_cos"].append(torch.cosine_similarity(linear, true, dim=-1))
        columns["prefix_cos"].append(torch.cosine_similarity(whole, true, dim=-1))
    arrays = {
        name: (("layer", "prompt"), torch.stack(each).double().cpu().numpy(), {"long_name": _ARRAYS[name]})
        for name, each in columns.items()
    }
    coords = {"layer": ("layer", list(range(begin, end + 1)), {"long_name": "behind block"}), "prompt": list(held.rows)}
    return Result(xr.Dataset(arrays, coords), provenance=provenance(model=model.id, seed=seed, source=str(source)))


_ARRAYS = {
    "length": "length / its length at the start",
    "cos": "cosine with itself at the start",
    "linear_length": "length by the Propagator / length at the start",
    "linear_cos": "cosine of the Propagator's with the true one",
    "prefix_cos": "cosine with what the whole prefix adds there",
}


def _regime(
    model: "Model", held: "Forks", mean: "torch.Tensor", layers: list[int], seed: int, progress: bool
) -> "Result":
    """The linear regime of the logit gap along the mean push."""
    from mechsteer.directions import Direction
    from mechsteer.propagator import linear_regime
    from mechsteer.result import Result
    from mechsteer.site import Site
    from mechsteer.study.chapters.travel import N_RANDOM, SIZES

    sites = {Site("resid_pre", layer): mean[layer] for layer in layers}
    found = linear_regime(
        model, held.plain, measure=held.gap, kind="resid_pre", layers=layers, at=-1, sizes=SIZES, random=N_RANDOM,
        directions={"prefix": {site: Direction(each, site, model.id) for site, each in sites.items()}}, seed=seed,
        progress=progress,
    )  # fmt: skip
    length = mean[layers].norm(dim=-1).double().cpu().numpy()
    return Result(found.data.assign(length=("layer", length / found["norm"].values)), provenance=found.provenance)


def _summary(results: Mapping[str, "Result"], begin: int, end: int, n: int, n_jacobians: int) -> dict[str, Any]:
    push, share, regime = (results[name].data for name in ("push", "identity", "regime"))
    moved = results["moved"]["change"].sum("prompt") / results["moved"]["whole"].sum("prompt")
    rows = []
    for layer in push["layer"].values.tolist():
        one, pair = push.sel(layer=layer).mean("prompt"), share.sel(source=begin, target=layer).mean("prompt")
        rows.append(
            {"layer": layer} | {name: float(one[name]) for name in _ARRAYS}
            | {"c": float(pair["c"]), "rest": float(pair["rest"])}
        )  # fmt: skip
    radii = [
        {
            "layer": layer,
            "length": float(regime["length"].sel(layer=layer)),
            "moved": float(moved.sel(layer=layer)),
            **{group: float(regime["relative_radius"].sel(layer=layer, group=group)) for group in ("prefix", "random")},
            "censored": int(regime["censored"].sel(layer=layer, group="prefix")),
        }
        for layer in regime["layer"].values.tolist()
    ]
    return {"from": begin, "to": end, "n": n, "n_jacobians": n_jacobians, "behind": rows, "regime": radii}


def _figures(results: Mapping[str, "Result"], begin: int) -> "list[go.Figure]":
    push, share, regime = results["push"], results["identity"], results["regime"]
    along = push.data[["cos", "linear_cos", "prefix_cos"]].to_array("line")
    lengths = push.data[["length", "linear_length"]].to_array("line")
    radius = regime.data["relative_radius"].transpose("group", "layer")
    length = regime.data["length"].expand_dims(group=["length of the mean push"])
    import xarray as xr

    names = {"prefix": "radius along the mean push", "random": "radius along random directions"}
    radius = radius.assign_coords(group=[names.get(str(each), str(each)) for each in radius["group"].values])
    both = xr.concat([radius, length], "group").rename("value")
    figures = [
        _lines(_called(along), f"Where the push before layer {begin} points", "cosine", "behind block"),
        _lines(_called(lengths), "How long it is", "length / its length at the start", "behind block"),
        share.plot("rest", title="What is not identity: |R| / |J| of J = c I + R, from before a layer to behind one"),
        share.plot("c", title="The multiple of the identity: c of J = c I + R"),
        _lines(both.rename(group="line"), "The linear regime", "length / stream's length", "before layer"),
    ]
    figures[-1].update_yaxes(type="log")
    return figures


def _called(array: "xr.DataArray") -> "xr.DataArray":
    return array.assign_coords(line=[_ARRAYS[str(each)] for each in array["line"].values])


def _lines(array: "xr.DataArray", title: str, y: str, x: str) -> "go.Figure":
    from mechsteer.plots.lines import lines
    from mechsteer.study.curves import named_lines

    array = array.transpose("line", "layer", ...).rename("value")
    array.attrs = {"long_name": y}  # which names its units
    array["layer"].attrs["long_name"] = x
    return named_lines(lines(array, "layer"), "line=", title).update_xaxes(dtick=1)


def _lead(summary: Mapping[str, Any]) -> str:
    first, last = summary["behind"][0], summary["behind"][-1]
    start = next(row for row in summary["regime"] if row["layer"] == summary["from"])
    where = {-1: "below ", 0: "", 1: "above "}[start["censored"]]
    return (
        f"What the prefix adds before layer {summary['from']} at the fork, put in place in runs without the prefix, "
        f"brings about {100 * start['moved']:.0f} % of the prefix's change of the logit gap. It is "
        f"{first['length']:.2f} times as long behind that block and {last['length']:.2f} times behind block "
        f"{summary['to']}, with a cosine of {first['cos']:.2f} and {last['cos']:.2f} to itself "
        f"(n = {summary['n']} held-out requests). The Propagator to there, J = c I + R, has c = {last['c']:.2f}, and "
        f"the rest R is {last['rest']:.2f} of it; what it makes of the push has a cosine of {last['linear_cos']:.2f} "
        "with the true one. "
        f"The gradient of the gap there is 10 % off from {where}{start['prefix']:.2f} of the stream's length on along "
        f"the mean push, which is {start['length']:.2f} long."
    )


def _shown(summary: Mapping[str, Any]) -> list[RenderableType]:
    radii = {row["layer"]: row for row in summary["regime"]}
    rows = []
    for row in summary["behind"]:
        numbers = [row[name] for name in ("length", "cos", "linear_length", "linear_cos", "prefix_cos", "c", "rest")]
        radius = radii.get(row["layer"])
        bound = "" if radius is None else {-1: "< ", 0: "", 1: "> "}[radius["censored"]] + f"{radius['prefix']:.2f}"
        mean, moved = ("", "") if radius is None else (f"{radius['length']:.2f}", f"{100 * radius['moved']:.0f} %")
        rows.append([row["layer"], *(f"{each:.2f}" for each in numbers), moved, mean, bound])
    columns = ("layer", "length", "cos", "J length", "J cos", "prefix", "c", "rest", "moved", "mean", "radius")
    note = Text(
        "Behind each block: length and cosine of the push to itself at the start; the same as the Propagator J "
        "foretells it (cosine with the true one); cosine with what the whole prefix adds there; c and the rest of "
        "J = c I + R. Before it: share of the logit gap's change that the prefix's own push there brings about; "
        "length of the mean push, and where the gradient is 10 % off, in lengths of the stream.",
        "dim",
    )
    return [Text(_lead(summary)), terminal.table(columns, rows, numbers=columns), note]
