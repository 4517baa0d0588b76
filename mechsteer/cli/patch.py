"""`mechsteer patch`: the map of where a prompt matters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.cli.answers import WORK, Answer, Command, loaded
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mechsteer.model import Model
    from mechsteer.prompts import Prompts
    from mechsteer.result import Result
    from mechsteer.study.log import Log

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
METHODS, MODES = ("exact", "attribution", "path"), ("denoising", "noising")
CORRECTIONS = ("max_t", "holm", "fdr_bh", "none")  # of mechsteer.patching.significance
EPILOG = options.epilog(
    "mechsteer patch",
    "mechsteer patch --site z --over layer,head --method attribution --out heads",
    'mechsteer patch "The Eiffel Tower is in" "The Colosseum is in" --answer " Paris" --other " Rome" --model gpt2',
    "mechsteer patch clean.txt corrupt.txt --answer right.txt --other wrong.txt --site attn_out,mlp_out --out pairs",
    "mechsteer patch clean.txt corrupt.txt --answer right.txt --other wrong.txt --significance 0.05 --out marked",
    after="In a file each line is a prompt of its own, or the answer to the prompt of that line. The same command on "
    "the same folder goes on where it was stopped; where it is finished, it shows what came out.",
    s1="",
)


def patch(
    clean: Annotated[
        str | None, typer.Argument(metavar="CLEAN", help=f'A prompt, or a file of them. Default: "{CLEAN}"')
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Argument(metavar="CORRUPT", help=f'The same tokens but for what makes the difference: "{CORRUPT}"'),
    ] = None,
    answer: Annotated[
        str, typer.Option(help="The token that follows CLEAN, with its leading space; or a file, one a line.")
    ] = " Mary",
    other: Annotated[str, typer.Option(help="The token that follows CORRUPT; or a file.")] = " John",
    site: Annotated[
        str | None,
        typer.Option(
            help='What is patched: "resid_pre", "attn_out", "z", "pattern", ..., or several with commas. Default: '
            'resid_pre; for --method path "z", the senders.',
            autocompletion=options.complete_kinds,
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            help='Dimensions of the map: "layer,pos", "layer,head", "dest,src", ... Default: layer and head where SITE '
            "has heads, else layer and position.",
            autocompletion=options.complete_dims,
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help='Only these, such as "3" or "0-5,8". Default: all.')] = None,
    method: Annotated[
        str,
        typer.Option(
            help='"exact" runs every cell; "attribution" estimates all from one gradient; "path" sends what SITE '
            "writes to --receivers alone.",
            autocompletion=options.one_of(*METHODS),
        ),
    ] = "exact",
    mode: Annotated[
        str,
        typer.Option(
            help='"denoising" puts CLEAN into CORRUPT and finds what is enough; "noising" the other way round finds '
            "what is needed.",
            autocompletion=options.one_of(*MODES),
        ),
    ] = "denoising",
    receivers: Annotated[
        str, typer.Option(help='Of --method path: "logits", or hook names such as "blocks.4.attn.hook_q[head=2]".')
    ] = "logits",
    chat: Annotated[bool, typer.Option("--chat", help="The prompts are requests, in the model's chat format.")] = False,
    significance: Annotated[
        float | None,
        typer.Option(
            metavar="LEVEL",
            help="Mark the cells whose mean effect over the pairs of prompts is more than chance at this level, such "
            "as 0.05: a sign-flip test, which takes six pairs or more.",
        ),
    ] = None,
    correction: Annotated[
        str | None,
        typer.Option(
            help='Of --significance, for testing every cell of the map: "max_t" (the default), "holm", "fdr_bh" or '
            '"none".',
            autocompletion=options.one_of(*CORRECTIONS),
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Cells in the table.")] = 10,
    out: options.Out = Path("patch"),
    *,
    running: options.Running,
) -> None:
    """Map where a prompt matters: put activations of one prompt into the run of another, place by place."""
    if (clean is None) != (corrupt is None):
        raise MechsteerError("CORRUPT is missing: give both prompts, CLEAN and CORRUPT, or none for the example")
    options.choice(method, METHODS, "--method")
    options.choice(mode, MODES, "--mode")
    sites = _kinds("z" if site is None and method == "path" else "resid_pre" if site is None else site)
    dims = _dims(over, sites)
    if method == "path" and (over is not None or layers is not None):
        raise MechsteerError("--method path has a cell for every sender: leave out --over and --layers")
    if method != "path" and receivers != "logits":
        raise MechsteerError(f"--receivers {receivers!r} is for --method path: leave it out, or add that")
    asked: dict[str, Any] = {
        "model": running.model, "clean": _prompts(CLEAN if clean is None else clean, "CLEAN"),
        "corrupt": _prompts(CORRUPT if corrupt is None else corrupt, "CORRUPT"), "answer": _answers(answer, "--answer"),
        "other": _answers(other, "--other"), "site": sites, "over": dims, "layers": _layers(layers), "method": method,
        "mode": mode, "receivers": options.names(receivers), "chat": chat, "top": top,
        "dtype": running.dtype, "seed": running.seed,
        "significance": significance, "correction": _correction(significance, correction),
    }  # fmt: skip
    if len(asked["clean"]) != len(asked["corrupt"]):
        counts = " and ".join(str(len(asked[each])) for each in ("clean", "corrupt"))
        raise MechsteerError(f"CLEAN and CORRUPT are {counts} prompts: give as many, each beside its partner")
    for name in ("answer", "other"):
        if len(asked[name]) not in (1, len(asked["clean"])):
            raise MechsteerError(
                f"--{name} holds {len(asked[name])} tokens for {len(asked['clean'])} prompts: give one for all, or one "
                "for each"
            )
    if significance is not None:
        _check_pairs(significance, len(asked["clean"]))

    def work(log: "Log", folder: Path) -> Answer:
        return _mapped(asked, running.device, log, folder, progress=not running.quiet)

    title = f"Where the prompt matters: {', '.join(sites)}"
    Command("patch", title, out.expanduser(), asked, running).run(work, _shown)


def _mapped(asked: Mapping[str, Any], device: str | None, log: "Log", folder: Path, *, progress: bool) -> Answer:
    from mechsteer.objectives import LogitGap
    from mechsteer.patching import activation_patching, attribution_patching, path_patching, recovered
    from mechsteer.patching.significance import significant
    from mechsteer.plots import plain

    model = loaded(asked["model"], device, asked["dtype"], log)
    clean, corrupt = (_laid_out(asked[each], model, asked["chat"]) for each in ("clean", "corrupt"))
    measure = LogitGap(*(_tokens(asked[each], model, f"--{each}") for each in ("answer", "other")), tokenizer=model)
    both = {"measure": measure, "mode": asked["mode"], "progress": progress}
    places = {"sites": asked["site"], "over": asked["over"], "layers": asked["layers"]}
    log.line(f"{', '.join(asked['site'])}: {asked['method']}")
    if asked["method"] == "path":
        senders = asked["site"][0] if len(asked["site"]) == 1 else asked["site"]
        to = "logits" if asked["receivers"] == ["logits"] else asked["receivers"]
        found = path_patching(model, clean, corrupt, senders=senders, receivers=to, out=folder / WORK, **both)
    elif asked["method"] == "exact":
        found = activation_patching(model, clean, corrupt, out=folder / WORK, **places, **both)
    else:
        found = attribution_patching(model, clean, corrupt, **places, **both)
    shares, tested = recovered(found, seed=asked["seed"]), None
    if asked["significance"] is not None:
        how = {"level": asked["significance"], "correction": asked["correction"], "seed": asked["seed"]}
        tested = significant(found, **how)
    ends = {name: float(found[name].mean()) for name in ("base", "source")}
    cells = _strongest(found, shares, tested, asked["top"])
    summary = {**asked, "model": model.id._asdict(), "prompts": found.data.sizes["prompt"], **ends, "cells": cells}
    results = {"effect": found, "recovered": shares}
    if tested is not None:
        results["significance"] = tested
        summary["matter"] = {"cells": int(tested["matters"].sum()), "of": int(tested["p"].notnull().sum())}
    lead = f"Clean: {asked['clean'][0]}\nCorrupt: {asked['corrupt'][0]}\n" + _ends(summary)
    lead += f"\n{_marked(summary)}" if tested is not None else ""
    figure = _figure(shares, tested, plain(f"{', '.join(asked['site'])}: share of the whole effect"), asked)
    return Answer(summary, results, [figure], lead)


def _figure(shares: "Result", tested: "Result | None", title: str, asked: Mapping[str, Any]) -> "go.Figure":
    from mechsteer.result import Result

    if tested is None or tested["matters"].ndim not in (2, 3):  # dots stand on the cells of maps
        return shares.plot("recovered", title=title)
    name = f"p <= {asked['significance']:g}"
    return Result(shares.data.assign({name: tested["matters"]})).plot("recovered", title=title, marks=name)


def _strongest(found: "Result", shares: "Result", tested: "Result | None", n: int) -> list[dict[str, Any]]:
    """The cells with the largest mean effects, largest first."""
    import numpy as np

    mean = shares["recovered"].mean("prompt")
    effect = found["effect"].mean("prompt")
    values = np.where(np.isnan(mean.values), 0.0, mean.values)
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[: min(n, values.size)]
    cells = []
    for flat in order:
        at = np.unravel_index(flat, values.shape)
        where: dict[str, Any] = {str(dim): mean[dim].values[place] for dim, place in zip(mean.dims, at, strict=True)}
        for dim, place in zip(mean.dims, at, strict=True):
            label = "token" if dim == "pos" else f"{dim}_token"
            if label in mean.coords:
                where[label] = str(mean[label].values[place])
        low, high = (float(shares[end].values[at]) for end in ("low", "high"))
        cells.append(
            {"at": where, "effect": float(effect.values[at]), "share": float(values[at]), "low": low, "high": high}
        )
        if tested is not None:
            test = {each: tested[each].transpose(*mean.dims).values[at] for each in ("p", "matters")}
            cells[-1] |= {"p": float(test["p"]), "matters": bool(test["matters"])}
    return cells


def _shown(summary: Mapping[str, Any]) -> list[RenderableType]:
    names = list(summary["cells"][0]["at"]) if summary["cells"] else []
    several = summary["prompts"] > 1
    tested = summary.get("significance") is not None
    columns = [*names, "effect", "share", *(["95 % interval"] if several else []), *(["p"] if tested else [])]
    rows = []
    for cell in summary["cells"]:
        interval = [f"{cell['low']:.0f} to {cell['high']:.0f} %"] if several else []
        p = [f"{cell['p']:.3g}{' *' if cell['matters'] else '  '}"] if tested else []
        rows.append([*cell["at"].values(), f"{cell['effect']:+.2f}", f"{cell['share']:.0f} %", *interval, *p])
    title = f"strongest cells: {', '.join(summary['site'])}, {summary['method']}, {summary['mode']}"
    numbers = ("layer", "head", "pos", "dest", "src", "effect", "share", "95 % interval", "p")
    marked = [Text(_marked(summary))] if tested else []
    return [Text(_ends(summary)), *marked, Text(title, "bold"), terminal.table(columns, rows, numbers=numbers)]


def _marked(summary: Mapping[str, Any]) -> str:
    """How many cells are more than chance."""
    how = "not corrected" if summary["correction"] == "none" else f"corrected over the map by {summary['correction']}"
    return (
        f"{summary['matter']['cells']} of {summary['matter']['of']} cells have an effect with p <= "
        f"{summary['significance']:g} over {summary['prompts']} pairs (sign flips, {how}): these are marked."
    )


def _ends(summary: Mapping[str, Any]) -> str:
    into, of = ("corrupt", "clean") if summary["mode"] == "denoising" else ("clean", "corrupt")
    answer, other = (summary[each][0] if len(summary[each]) == 1 else f"the {each}" for each in ("answer", "other"))
    return (
        f"logit of {answer!r} minus that of {other!r}: {summary['base']:+.2f} in the {into} run, that is patched into, "
        f"and {summary['source']:+.2f} in the {of} run; the share of a cell is of this difference."
    )


# ---- reading what was asked ----


def _prompts(value: str, what: str) -> list[str]:
    """The lines of a file of this name, or the one prompt."""
    if len(value) < 256 and Path(value).is_file():
        return options.lines_of(Path(value), what)
    text = options.text_or_file(value, what, "the prompt")
    if not text.strip():
        raise MechsteerError(f"{what} is empty: give a prompt, or a file with one a line")
    return [text]


def _answers(value: str, option: str) -> list[str]:
    """Tokens as they stand, leading spaces kept."""
    if len(value) < 256 and Path(value).is_file():
        return options.lines_of(Path(value), option)
    if value == "":
        raise MechsteerError(f'{option} is empty: give a token, such as " Mary" with its leading space')
    return [value]


def _kinds(listed: str) -> list[str]:
    from mechsteer.site import Site

    kinds = options.names(listed)
    if not kinds:
        raise MechsteerError("--site is empty: give a kind, such as resid_pre")
    for kind in kinds:
        try:
            Site(kind, 0)
        except MechsteerError as error:
            if "lies outside the blocks" not in str(error):
                raise MechsteerError(f"--site {kind!r}: {error}") from error
    return kinds


def _dims(over: str | None, kinds: Sequence[str]) -> list[str]:
    from mechsteer.site import KINDS

    if over is None:
        return ["layer", "head" if all("head" in KINDS[kind].axes for kind in kinds) else "pos"]
    dims = options.names(over)
    for dim in dims:
        options.choice(dim, ("layer", "head", "pos", "dest", "src"), "--over")
    if not dims or len(set(dims)) < len(dims) or len(dims) + (len(kinds) > 1) > 3:
        raise MechsteerError(
            f"--over {over!r} cannot be drawn: give one to three different dimensions, several sites counting as one"
        )
    return dims


def _layers(listed: str | None) -> list[int] | None:
    if listed is None:
        return None
    found: list[int] = []
    for part in options.names(listed):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise MechsteerError(f'--layers {listed!r} cannot be read: give numbers such as "3" or "0-5,8"')
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise MechsteerError(f'--layers {listed!r} names none: give numbers such as "3" or "0-5,8"')
    return list(dict.fromkeys(found))


def _correction(level: float | None, correction: str | None) -> str | None:
    """Of significance, where that is asked for."""
    if level is None:
        if correction is not None:
            raise MechsteerError(f"--correction {correction} is for --significance: leave it out, or add that")
        return None
    return options.choice("max_t" if correction is None else correction, CORRECTIONS, "--correction")


def _check_pairs(level: float, n: int) -> None:
    """Refuse a level that so few pairs cannot reach, before anything is run."""
    from mechsteer.patching.significance import prompts_needed

    if not 0 < level < 1:
        raise MechsteerError(f"--significance {level:g} is no level: give a number between 0 and 1, such as 0.05")
    if n < prompts_needed(level):
        raise MechsteerError(
            f"--significance {level:g} takes {prompts_needed(level)} pairs of prompts, and {n} "
            f"{'is' if n == 1 else 'are'} given: with fewer no effect could reach it. Give files with one prompt a line"
        )


def _laid_out(texts: Sequence[str], model: "Model", chat: bool) -> "Prompts":
    from mechsteer.prompts import Prompts

    several = list(texts) if len(texts) > 1 else []
    if chat:
        return Prompts.from_chats(list(texts), model, labels=several)
    return Prompts.from_strings(list(texts), model, labels=several)


def _tokens(texts: Sequence[str], model: "Model", option: str) -> Any:
    """One set for all prompts, or one id for each."""
    import torch

    from mechsteer.objectives import TokenSet

    ids = [int(TokenSet.of(text, tokenizer=model, what=option).ids) for text in texts]
    return texts[0] if len(texts) == 1 else torch.tensor(ids, device=model.device)
