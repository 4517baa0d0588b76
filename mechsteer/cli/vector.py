"""`mechsteer vector`: a steering vector, as a file that other commands and other tools read."""

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
    import xarray as xr

    from mechsteer.directions import Direction
    from mechsteer.site import Site
    from mechsteer.study.case import Case
    from mechsteer.study.log import Log
    from mechsteer.study.settings import Settings

TOKENS = ("completion", "last")
NEGATIVES = ("random", "contrastive")
# Completions that are shown in the terminal, and tokens near the vector.
_ASKED, _NEAREST = 3, 10
EPILOG = options.epilog(
    'mechsteer vector "Talk only about cats." --out cats',
    "mechsteer vector --concept joy --alpha 6 --out joy",
    "mechsteer vector --positive joyful.txt --negative plain.txt --layer 3 --gguf --out mine",
    "mechsteer strength --vector joy/vector.safetensors --out joy-strength",
    after='In Python: ms.Add(ms.Direction.load("cats/vector.safetensors"), 2.0).',
    s1="",
)


def vector(
    text: options.Text = None,
    positive: Annotated[Path | None, typer.Option(help="A file of texts that show what is wanted, one a line.")] = None,
    negative: Annotated[Path | None, typer.Option(help="A file of texts that do not.")] = None,
    concept: Annotated[
        str | None,
        typer.Option(
            help="A mood or register whose texts ship with mechsteer, such as joy.",
            autocompletion=options.complete_concepts,
        ),
    ] = None,
    negatives: Annotated[
        str,
        typer.Option(
            help='What --concept is compared with: "random", plain texts, or "contrastive", the opposite mood.',
            autocompletion=options.one_of(*NEGATIVES),
        ),
    ] = "random",
    tokens: Annotated[
        str,
        typer.Option(
            help='Of PREFIX: "completion", the mean over the tokens that predict the same completion, with it and '
            'without; or "last", the last token of the prompt.',
            autocompletion=options.one_of(*TOKENS),
        ),
    ] = "completion",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Behind which block. Default: halfway through the model.")
    ] = None,
    alpha: Annotated[
        str, typer.Option(help="How many times the vector is added in the completions shown: one number, or several.")
    ] = "1,2,4,8",
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write the vectors of all blocks from 1 on as vector.gguf too (llama.cpp).")
    ] = False,
    out: options.Out = Path("vector"),
    words: options.Words = "",
    *,
    question: options.Question,
    running: options.Running,
) -> None:
    """Make a steering vector, the difference of mean activations: a prefix against none, a concept, or your texts."""
    ways = {"a prefix": text is not None or question.prefix is not None, "--concept": concept is not None}
    ways["--positive and --negative"] = positive is not None or negative is not None
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise MechsteerError(f"{' and '.join(given)} are given: a vector is made of one of them")
    if (positive is None) != (negative is None):
        raise MechsteerError("--positive and --negative go together: give a file of texts to each")
    options.choice(tokens, TOKENS, "--tokens")
    options.choice(negatives, NEGATIVES, "--negatives")
    alphas = _alphas(alpha)
    if concept is not None:
        options.choice(concept, options.concept_names(), "--concept")
    if gguf:
        _check_gguf()
    of = _of(concept, negatives, positive, negative)
    # A vector of texts has no prefix: the case is then about the requests alone.
    about = options.prefix_of(text, question.prefix) if of is None else "-"
    settings = settings_of(about, question, running, words=tuple(options.names(words)))
    how = {"layer": layer, "alphas": alphas, "gguf": gguf}
    asked = identity(settings) | ({"tokens": tokens} if of is None else {"texts": of}) | how
    name = about if of is None else str(of["name"])

    def work(log: "Log", folder: Path) -> Answer:
        return _vector(settings, asked, name, log, folder, progress=not running.quiet)

    Command("vector", f'A vector for "{name}"', out.expanduser(), asked, running).run(work, _shown)


def _of(concept: str | None, negatives: str, positive: Path | None, negative: Path | None) -> dict[str, Any] | None:
    """The texts that the vector is made of; None for a prefix."""
    if concept is not None:
        return {"name": concept, "concept": concept, "negatives": negatives}
    if positive is None or negative is None:
        return None
    groups = {"positives": options.lines_of(positive, "--positive")}
    groups["negatives"] = options.lines_of(negative, "--negative")
    return {"name": positive.stem, "concept": None, **groups}


def _alphas(listed: str) -> list[float]:
    try:
        found = [float(each) for each in options.names(listed)]
    except ValueError:
        found = []
    if not found or not all(abs(each) < float("inf") for each in found):
        raise MechsteerError(f'--alpha {listed!r} cannot be read: give finite numbers, such as "4" or "1,2,4,8"')
    return list(dict.fromkeys(found))


def _vector(
    settings: "Settings", asked: Mapping[str, Any], name: str, log: "Log", folder: Path, *, progress: bool
) -> Answer:
    from mechsteer.directions import cosine_table, export_gguf
    from mechsteer.interventions import Add
    from mechsteer.plots import plain
    from mechsteer.result import Result, provenance
    from mechsteer.site import Site

    case = case_of(settings, log, folder)
    model, of = case.model, asked.get("texts")
    layer = round(0.5 * (model.n_layers - 1)) if asked["layer"] is None else asked["layer"]
    site = Site("resid_post", layer)
    model.check_site(site)
    if of is None:
        vectors = of_prefix(case, asked["tokens"])
    else:
        log.line("differences of means at every layer")
        vectors = _of_texts(case, of, progress)
    direction = vectors[site]
    if direction.norm == 0:
        raise MechsteerError(
            f"The vector behind block {layer} is zero: there the two groups of activations do not differ. Choose "
            "another --layer, or other texts."
        )
    judge = _judge(case, of)
    rows = case.rows("held-out")
    alphas = asked["alphas"]
    log.line(f"completing {len(rows)} requests with the vector behind block {layer}, at {len(alphas)} strengths")
    room = min(case.max_new_tokens, model.n_ctx - int(case.plain.lengths.max()))
    said = [
        model.generate(case.plain[rows], max_new_tokens=room, interventions=pushes, progress=progress).completions
        for pushes in ([], *([Add(direction, each)] for each in alphas))
    ]
    shows = None if judge is None else [float(judge.many(each).mean()) for each in said]
    texts = [case.requests[row].text for row in rows]
    made = provenance(model=model.id, seed=settings.seed, site=str(site))
    results = {"layers": Result(_layers(vectors), provenance=made), "cosines": cosine_table(_nonzero(vectors))}
    others = []
    if asked["gguf"]:
        log.line("writing vector.gguf")
        kept = [each for each in vectors.values() if each.site.layer != 0]
        export_gguf(kept, folder / "vector.gguf", model_hint=_architecture(model.cfg))
        others = ["vector.gguf"]
    about = {
        "name": name, "model": model.id._asdict(), "site": str(site), "layer": layer, "alphas": alphas,
        "norm": direction.norm, "relative_norm": float(results["layers"]["relative_norm"].sel(layer=layer)),
        "origin": dict(direction.origin), "shown": None if judge is None else judge.shown, "shows": shows,
        "nearest": [{"token": token, "cosine": cosine} for token, cosine in direction.nearest_tokens(model, _NEAREST)],
        "completions": [
            {"request": text, "plain": before, "steered": steered}
            for text, before, *steered in zip(texts, *said, strict=True)
        ],
    }  # fmt: skip
    figures = [
        results["layers"].plot("relative_norm", title="Length of the vector, in lengths of the stream"),
        results["cosines"].plot("cosine", title=plain("Cosines between the vectors of the blocks")),
    ]
    return Answer(about, results, figures, _lead(about), {"vector": direction}, others)


def of_prefix(case: "Case", tokens: str = "completion") -> "dict[Site, Direction]":
    """The difference of means behind every block, with the prefix against without it, over the requests to search on.

    Args:
        case: the prefix and the requests.
        tokens: "completion", over the tokens that predict the reference completion, as the study's pushes are made; or
            "last", the prompt's last.
    """
    from mechsteer.directions import difference_of_means

    search = case.rows("search")
    if tokens == "last":
        groups = case.prefixed[search], case.plain[search]
    else:
        groups = case.reference[search], case.with_reference(case.plain)[search]
    case.tell("differences of means at every layer")
    found = difference_of_means(case.model, *groups, sites="resid_post", tokens=tokens, progress=False)
    return {site: _said(direction, prefix=case.settings.prefix) for site, direction in found.items()}


def _of_texts(case: "Case", of: Mapping[str, Any], progress: bool) -> "dict[Site, Direction]":
    from mechsteer.directions import difference_of_means
    from mechsteer.strength import shipped

    texts = shipped(negatives=of["negatives"])[of["concept"]] if of["concept"] is not None else None
    positives, negatives = (
        (texts.positives, texts.negatives) if texts is not None else (of["positives"], of["negatives"])
    )
    found = difference_of_means(case.model, positives, negatives, sites="resid_post", progress=progress)
    return {site: _said(each, concept=of["concept"], texts=of["name"]) for site, each in found.items()}


def _said(direction: "Direction", **about: Any) -> "Direction":
    """The direction, whose origin tells what it is for too."""
    from dataclasses import replace

    return replace(direction, origin={**direction.origin, **{key: each for key, each in about.items() if each}})


def _judge(case: "Case", of: Mapping[str, Any] | None) -> Any:
    """Says whether a completion shows what the vector is for; None where nobody knows."""
    from mechsteer.judges import lexicon_judge, mood_judge

    if of is None or case.settings.words:
        return case.judge if of is None else lexicon_judge(case.settings.words)
    return mood_judge(of["concept"]) if of["concept"] is not None else None


def _nonzero(vectors: "Mapping[Site, Direction]") -> "dict[str, Direction]":
    return {f"block {site.layer}": each for site, each in vectors.items() if each.norm > 0}


def _layers(vectors: "Mapping[Site, Direction]") -> "xr.Dataset":
    """The vectors behind all blocks, their lengths, and these beside that of the mean that they start from."""
    import numpy as np
    import xarray as xr

    values = np.stack([each.vector.double().cpu().numpy() for each in vectors.values()])
    norm = np.linalg.norm(values, axis=-1)
    stream = np.array([each.origin["negatives"]["norm"] for each in vectors.values()])
    arrays = {
        "value": (("layer", "d_model"), values.astype(np.float32)),
        "norm": ("layer", norm, {"long_name": "length"}),
        "relative_norm": ("layer", norm / stream, {"long_name": "length / stream's length"}),
    }
    return xr.Dataset(arrays, {"layer": [site.layer for site in vectors]})


def _architecture(cfg: Any) -> str:
    """transformers' name of the architecture, as repeng writes it: "llama", "gemma2"."""
    import re

    return re.sub(r"(ForCausalLM|LMHeadModel)$", "", str(cfg.original_architecture)).lower()


def _check_gguf() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise MechsteerError("--gguf needs the gguf package: pip install 'mechsteer[gguf]'")


def _lead(summary: Mapping[str, Any]) -> str:
    text = (
        f"Behind block {summary['layer']}, {summary['norm']:.3g} long, which is {summary['relative_norm']:.2f} of the "
        "length of the residual stream there."
    )
    if summary["shows"] is not None:
        before, *steered = (f"{100 * share:.0f} %" for share in summary["shows"])
        each = [f"{share} with {alpha:g}" for alpha, share in zip(summary["alphas"], steered, strict=True)]
        text += (
            f" Of {len(summary['completions'])} completions {before} {summary['shown']} without it, and "
            f"{', '.join(each)} times the vector added."
        )
    return text


def _shown(summary: Mapping[str, Any]) -> list[RenderableType]:
    from mechsteer.plots.labels import printable

    near = ", ".join(f"{printable(each['token'])!r} {each['cosine']:.2f}" for each in summary["nearest"])
    table = terminal.table(("times", "completion"), (), numbers=("times",))
    table.columns[1].ratio = 1
    for each in summary["completions"][:_ASKED]:
        table.add_row("", Text(each["request"], "bold"))
        for times, said in zip((0.0, *summary["alphas"]), (each["plain"], *each["steered"]), strict=True):
            table.add_row(f"{times:g}", Text(said))
        table.add_section()
    title = Text("completions of held-out requests, with the vector added so many times", "bold")
    return [Text(_lead(summary)), Text(f"nearest tokens: {near}"), title, table]
