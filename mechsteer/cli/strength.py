"""`mechsteer strength`: how strongly to steer."""

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
    from mechsteer.directions import Direction
    from mechsteer.judges import Judge
    from mechsteer.study.case import Case
    from mechsteer.study.log import Log
    from mechsteer.study.settings import Settings

EPILOG = options.epilog(
    'mechsteer strength "Talk only about cats." --out cats-strength',
    "mechsteer strength --vector joy/vector.safetensors --out joy-strength",
    "mechsteer strength --vector mine/vector.safetensors --words moon,lunar --weight 0.5 --out moon-strength",
    after="A strength works if it gains more than a standard error.",
    s1="no strength works",
)


def strength(
    text: options.Text = None,
    vector: Annotated[
        Path | None, typer.Option(help="A vector that `mechsteer vector` or Direction.save wrote, instead of PREFIX.")
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(
            help="Completions about this topic of the pocket language are wanted. Default: what PREFIX, or the "
            "vector's origin, names.",
            autocompletion=options.complete_topics,
        ),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="What a nat a token on the model's own completions may cost of the share that shows the "
            "behaviour. Default: 0.25.",
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=5, help="Strengths that are tried exactly, 0 among them. Default: 7.")
    ] = None,
    out: options.Out = Path("strength"),
    words: options.Words = "",
    *,
    question: options.Question,
    running: options.Running,
) -> None:
    """Choose how strongly to steer: the strength of a vector that gains most of what is wanted, less what it costs."""
    if vector is not None and (text is not None or question.prefix is not None):
        raise MechsteerError("a prefix and --vector are given: give the one whose strength is wanted")
    if topic is not None:
        options.choice(topic, options.topic_names(), "--topic")
    if topic is not None and words:
        raise MechsteerError("--topic and --words are given: give the one that says what is wanted")
    about = options.prefix_of(text, question.prefix) if vector is None else "-"
    settings = settings_of(about, question, running, words=tuple(options.names(words)))
    how = {"vector": None if vector is None else options.sha256(vector)}
    asked = identity(settings) | how | {"topic": topic, "weight": weight, "budget": budget}

    def work(log: "Log", folder: Path) -> Answer:
        return _chosen(settings, vector, asked, log, folder, progress=not running.quiet)

    title = f'How strong: "{about}"' if vector is None else f"How strong: {vector.name}"
    command = Command("strength", title, out.expanduser(), asked, running)
    if not command.run(work, _shown)["works"]:
        raise typer.Exit(1)


def _chosen(
    settings: "Settings", file: Path | None, asked: Mapping[str, Any], log: "Log", folder: Path, *, progress: bool
) -> Answer:
    from mechsteer.directions import Direction
    from mechsteer.strength import choose_alpha
    from mechsteer.study.measures import CE
    from mechsteer.study.pushes import BUDGET, WEIGHT, mean_vectors

    case = case_of(settings, log, folder)
    search = case.rows("search")
    vectors = mean_vectors(case) if file is None else _one(Direction.load(file, model=case.model), file)
    judge = _judge(case, asked["topic"], vectors, file)
    wanted = case.plain[search] if judge is not None else case.with_reference(case.plain)[search]
    if file is None:
        unsteered = case.unsteered[search]
    else:
        log.line(f"completing {len(search)} requests")
        room = min(case.max_new_tokens, case.model.n_ctx - int(case.plain.lengths.max()))
        unsteered = case.model.generate(case.plain[search], max_new_tokens=room, progress=progress)
    weight, budget = asked["weight"], asked["budget"]
    weight, budget = WEIGHT if weight is None else weight, BUDGET if budget is None else budget
    log.line(f"choosing the strength of {len(vectors)} vector{'s' * (len(vectors) > 1)}, {budget} exact points each")
    # As mechsteer.study.pushes.chosen_vector, which the study takes, weighs it.
    chosen = choose_alpha(
        case.model, vectors, wanted, -CE if judge is None else judge, side_effect=CE,
        side_prompts=unsteered, weight=weight, budget=budget, max_new_tokens=case.max_new_tokens,
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    rows = []
    for name, alpha in chosen.alphas.items():
        one = chosen.result.sel(direction=name)
        numbers = {key: float(one[key]) for key in ("low", "high", "gain", "gain_error", "scale")}
        site = vectors[name].site
        rows.append({"vector": name, "layer": site.layer, "alpha": alpha, "works": chosen.works[name]} | numbers)
        rows[-1] |= {"share_of_stream": alpha / numbers["scale"], "tried": one["point_alpha"].values}
    works = [row for row in rows if row["works"]]
    best = max(works or rows, key=lambda row: row["gain"])
    summary = {
        "prefix": None if file is not None else settings.prefix, "model": case.model.id._asdict(), "weight": weight,
        "budget": budget, "requests": len(search), "shown": None if judge is None else judge.shown, "vectors": rows,
        "best": best["vector"], "alpha": best["alpha"], "works": bool(works),
        "forward_passes": chosen.forward_passes,
    }  # fmt: skip
    figures = [chosen.plot(name) for name in chosen.alphas]
    picked = {} if file is not None else {"vector": vectors[best["vector"]]}
    return Answer(summary, {"strength": chosen.result}, figures, _lead(summary), picked)


def _one(direction: "Direction", file: Path) -> "dict[str, Direction]":
    if len(direction) != 1:
        raise MechsteerError(f"--vector {file} holds {len(direction)} vectors: give a file with one")
    return {f"{file.stem} at {direction.site}": direction}


def _judge(case: "Case", topic: str | None, vectors: "Mapping[str, Direction]", file: Path | None) -> "Judge | None":
    """Says whether a completion shows what is wanted.

    Raises:
        MechsteerError: nobody knows what a vector from a file is for.
    """
    from mechsteer.judges import judge_of, mood_judge, topic_judge
    from mechsteer.pocket.wordings import MOODS

    if topic is not None:
        return topic_judge(topic)
    if file is None or case.settings.words:
        return case.judge
    origin = next(iter(vectors.values())).origin
    if origin.get("concept") in MOODS:
        return mood_judge(origin["concept"])
    judge = judge_of(str(origin.get("prefix", "")))
    if judge is None:
        raise MechsteerError(
            f"Nothing says what {file} is for: its origin names no topic or mood that the pocket model's labeller "
            'knows. Give --words that show it, such as "moon,lunar", or a --topic.'
        )
    return judge


def _lead(summary: Mapping[str, Any]) -> str:
    best = next(row for row in summary["vectors"] if row["vector"] == summary["best"])
    wanted = (
        "the log-likelihood of what the prefix makes the model say"
        if summary["shown"] is None
        else f"the share of completions that {summary['shown']}"
    )
    rule = (
        f"What counts is {wanted}, less {summary['weight']:g} for every nat a token that the model's own completions "
        f"become less likely, on {summary['requests']} requests."
    )
    if not summary["works"]:
        return f"No strength works: none gains more than a standard error. {rule}"
    return (
        f"{best['vector']}: alpha = {best['alpha']:.3g} (95 % band {best['low']:.3g} to {best['high']:.3g}), which is "
        f"{best['share_of_stream']:.2f} of the stream's length and gains {best['gain']:.2f}. {rule}"
    )


def _shown(summary: Mapping[str, Any]) -> list[RenderableType]:
    rows = []
    for row in summary["vectors"]:
        alpha, band = ("none works", "") if not row["works"] else (
            f"{row['alpha']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}"
        )  # fmt: skip
        gain = f"{row['gain']:+.3f} ± {row['gain_error']:.3f}"
        tried = ", ".join(f"{each:.3g}" for each in row["tried"] if each is not None)
        rows.append([row["vector"], alpha, band, gain, tried])
    columns = ("vector", "alpha", "95 % band", "gain", "strengths tried")
    note = Text(f"from {summary['forward_passes']:,} forward passes of one prompt", "dim")
    return [Text(_lead(summary)), terminal.table(columns, rows, numbers=columns[1:-1], whole=columns[:1]), note]
