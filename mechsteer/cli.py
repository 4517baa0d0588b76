"""The command line: `mechsteer`."""

import sys
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mechsteer.errors import MechsteerError

app = typer.Typer(
    help="What moves a language model's behaviour, where the push enters, how it travels, how strong it must be.",
    no_args_is_help=True,
    epilog="[bold]Examples[/]\n\n"
    '  mechsteer study "Talk only about cats." --out study-cats\n\n'
    '  mechsteer prefix "Talk only about cats." --out prefix-cats\n\n'
    "  mechsteer pocket try\n\n"
    "Each command explains itself: mechsteer study --help",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
pocket = typer.Typer(
    help="The pocket model: a small chat model with known behaviours that ships with mechsteer.",
    epilog="[bold]Examples[/]\n\n"
    "  mechsteer pocket try\n\n"
    "  mechsteer pocket check\n\n"
    "  mechsteer pocket train --out runs/pocket",
    no_args_is_help=True,
)
app.add_typer(pocket, name="pocket")

# Here and not in mechsteer.study, which takes seconds to import: the help shows them.
PREFIX = "Talk only about cats."
CHAPTERS = ("behaviour", "entry", "travel", "vector", "strength", "features", "words", "together")
REQUESTS = (
    "Tell me a short story about my holiday.",
    "Give me three bullet points about the meeting.",
    "Write a letter about my new house.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from mechsteer import __version__

        typer.echo(f"mechsteer {__version__}")
        raise typer.Exit()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    '  mechsteer study "Talk only about cats." --out study-cats\n\n'
    '  mechsteer study "Sound gloomy." --chapters behaviour,vector --out gloomy\n\n'
    '  mechsteer study "Praise the moon." --words moon,lunar --model gpt2 --out moon\n\n'
    "  mechsteer study --prefix prefix.txt --requests mine.jsonl --out mine --open\n\n"
    "The same command on the same folder goes on where it was stopped; with other --chapters it adds them. "
    "Exit status: 0 done, 1 a chapter has no findings, 2 a mistake in what was asked, 130 stopped with Ctrl-C.",
)
def study(
    text: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help=f'The instruction under study. Default: "{PREFIX}"')
    ] = None,
    out: Annotated[Path, typer.Option(help="The study's folder: new, empty, or this study's.")] = Path("study"),
    model: Annotated[str, typer.Option(help='"pocket", "pocket-1l", a hub name, or a folder.')] = "pocket",
    prefix: Annotated[str | None, typer.Option(help="The same as PREFIX, or a file that holds it.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="A .txt file with one request a line, or a .jsonl file. Default: shipped ones.")
    ] = None,
    contrast: Annotated[
        str | None, typer.Option(help="A prefix of as many tokens to compare with. Default: a neutral filler.")
    ] = None,
    words: Annotated[
        str, typer.Option(help='Words that show the behaviour, such as "cat,cats", for prefixes of no known topic.')
    ] = "",
    chapters: Annotated[str | None, typer.Option(help=f"Some of {', '.join(CHAPTERS)}. Default: all.")] = None,
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda", ... Default: CUDA where there is one.')] = None,
    dtype: Annotated[str, typer.Option(help='Of the weights: "float32", "bfloat16", ...')] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completions.")] = 40,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser when done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing on the way.")] = False,
) -> None:
    """Study what a prefix does to a model, where it enters and what else does the same: one report, with the data."""
    about = _prefix(text, prefix)
    console = Console()
    with Console(stderr=True).status("starting") if not quiet else nullcontext():
        from mechsteer.study import study as run_study
    done = run_study(
        about,
        out=out,
        model=model,
        requests=requests,
        contrast=contrast,
        words=_names(words),
        chapters=None if chapters is None else _names(chapters),
        device=device,
        dtype=dtype,
        seed=seed,
        max_new_tokens=max_new_tokens,
        progress=not quiet,
    )
    if not quiet:
        _print_headline(console, done.headline())
        summary = Text(f"\n{done.summary_text}\n")
        summary.highlight_words([answer.question for answer in done.answers], "bold")
        console.print(summary, soft_wrap=True)
    for name, reason in done.failures.items():
        Console(stderr=True).print(Text.assemble((f"{name}: ", "bold red"), reason), soft_wrap=True)
    console.print(Text.assemble("report: ", (str(done.report), "bold")), soft_wrap=True)
    if open_report:
        import webbrowser

        webbrowser.open(done.report.resolve().as_uri())
    if done.failures:
        raise typer.Exit(1)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    '  mechsteer prefix "Talk only about cats." --out prefix-cats\n\n'
    '  mechsteer prefix "Talk only about cats." --tokens 6 --evaluations 400 --steps 60 --characters ascii\n\n'
    '  mechsteer prefix "Sound gloomy." --forbid "gloom,sad" --target state:3 --out gloomy\n\n'
    '  mechsteer prefix "Once there was a cat." --model gpt2 --requests mine.txt --fluency 0.1 --out mine\n\n'
    "The same command on the same folder goes on where it was stopped; where it is finished, it shows what came out. "
    "Exit status: 0 done, 2 a mistake in what was asked or nothing allowed was found, 130 stopped with Ctrl-C.",
)
def prefix(
    text: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help=f'What to say in other words. Default: "{PREFIX}"')
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder: new, empty, or this search's.")] = Path("prefix"),
    model: Annotated[str, typer.Option(help='"pocket", "pocket-1l", a hub name, or a folder.')] = "pocket",
    prefix: Annotated[str | None, typer.Option(help="The same as PREFIX, or a file that holds it.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="A .txt file with one request a line, or a .jsonl file. Default: shipped ones.")
    ] = None,
    words: Annotated[
        str, typer.Option(help='Words that show the behaviour, such as "cat,cats", for prefixes of no known topic.')
    ] = "",
    tokens: Annotated[int | None, typer.Option(min=1, help="How many. Default: as many as PREFIX has.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Prefixes whose exact loss is computed.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Of the soft prefix that the search begins with.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, help="Soft prefixes side by side, of which the best goes on.")] = 3,
    forbid: Annotated[
        str | None,
        typer.Option(
            help='What the answer may not hold, in any casing and in pieces, such as "cat,feline"; or "none". Default: '
            "the words of PREFIX and, where that names a topic of the pocket model, of its name and aliases."
        ),
    ] = None,
    characters: Annotated[
        str, typer.Option(help='Of the answer: "ascii", "printable", a script such as "latin", or "any".')
    ] = "printable",
    fluency: Annotated[
        float, typer.Option(min=0, help="Weight of the answer's own surprise (nats a token) in the search.")
    ] = 0.0,
    target: Annotated[
        str,
        typer.Option(
            help='What is matched: "behaviour", the completions with PREFIX; "state:LAYER", the residual stream behind '
            'a block at the last token; "feature:NUMBER" of the shipped autoencoder, to be raised there.'
        ),
    ] = "behaviour",
    samples: Annotated[int, typer.Option(min=1, help="Completions drawn for each held-out request.")] = 4,
    transfer: Annotated[
        str | None,
        typer.Option(
            help='A model with the same tokenizer to try the prefixes on; or "none". Default: for a pocket model the '
            "other one."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda", ... Default: CUDA where there is one.')] = None,
    dtype: Annotated[str, typer.Option(help='Of the weights: "float32", "bfloat16", ...')] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completions.")] = 40,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing on the way.")] = False,
) -> None:
    """Say a prefix in other words: tokens that do the same without saying it, measured on requests not searched on."""
    about = _prefix(text, prefix)
    if forbid is not None and not _names(forbid):
        raise MechsteerError('--forbid is empty: give words such as "cat,feline", or none')
    with Console(stderr=True).status("starting") if not quiet else nullcontext():
        from mechsteer.study.rewording import Options, reword
        from mechsteer.study.watch import outcome
    done = reword(
        about,
        out=out,
        model=model,
        requests=requests,
        words=_names(words),
        device=device,
        dtype=dtype,
        seed=seed,
        max_new_tokens=max_new_tokens,
        options=Options(
            tokens=tokens,
            evaluations=evaluations,
            steps=steps,
            restarts=restarts,
            forbid=None if forbid is None else () if forbid.strip() == "none" else tuple(_names(forbid)),
            characters=None if characters == "any" else characters,
            fluency=fluency,
            target=target,
            samples=samples,
            transfer=transfer,
        ),
        progress=not quiet,
    )
    if quiet:
        typer.echo(done.text)
        return
    for part in outcome(done):
        Console().print(part, soft_wrap=isinstance(part, Text))


@pocket.command(
    "try",
    epilog="[bold]Examples[/]\n\n"
    "  mechsteer pocket try\n\n"
    '  mechsteer pocket try --prefix "Nothing but trains, please." --request "Tell me a joke."\n\n'
    '  mechsteer pocket try --prefix "Sound gloomy."',
)
def try_(
    prefix: Annotated[
        str, typer.Option(help="Stands on a line before each request; compared with no prefix.")
    ] = "Talk only about cats.",
    request: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    model: Annotated[str, typer.Option(help='"pocket", "pocket-1l", or a folder made by `pocket train`.')] = "pocket",
) -> None:
    """Print the pocket model's answers to three requests, with and without a prefix."""
    console = Console()
    requests = tuple(request or REQUESTS)
    if not prefix.strip():
        raise MechsteerError('--prefix is empty: give an instruction, for example "Talk only about cats."')
    if any(not text.strip() for text in requests):
        raise MechsteerError('a --request is empty: give something to ask, for example "Tell me a joke."')
    folder = _model_folder(model)
    with console.status("loading the model"):
        from mechsteer.model import load_model
        from mechsteer.prompts import Prompts

        chat_model = load_model(folder, device="cpu")
    prompts = Prompts.concat([Prompts.from_chats(requests, chat_model, prefix=given) for given in ("", prefix)])
    longest = int(prompts.lengths.max())
    room = chat_model.n_ctx - longest
    if room < 1:
        raise MechsteerError(
            f"prefix and request are {longest} tokens, and the model reads {chat_model.n_ctx}: shorten --prefix or "
            "--request"
        )
    with console.status("answering"):
        answers = chat_model.generate(prompts, max_new_tokens=min(room, 120), progress=False).completions
    halves = answers[: len(requests)], answers[len(requests) :]
    for text, plain, steered in zip(requests, *halves, strict=True):
        table = Table(title=Text(text), title_justify="left", expand=True, show_lines=False)
        table.add_column("without a prefix", ratio=1)
        table.add_column(Text(prefix), ratio=1)
        table.add_row(_coloured(plain), _coloured(steered))
        console.print(table)
    console.print("[dim]coloured: words of a topic, one colour for each topic[/]")


@pocket.command(
    epilog="[bold]Examples[/]\n\n"
    "  mechsteer pocket train --out runs/pocket\n\n"
    "  mechsteer pocket train --model pocket-1l --out runs/pocket-1l --device cuda\n\n"
    "  mechsteer pocket train --model sae --pocket runs/pocket --out runs/sae",
)
def train(
    out: Annotated[Path, typer.Option(help="The run's folder. The same command on the same folder resumes.")],
    model: Annotated[str, typer.Option(help='What to train: "pocket", "pocket-1l" (one layer), or "sae".')] = "pocket",
    pocket_folder: Annotated[
        str, typer.Option("--pocket", help='For "sae": the model whose activations to use.')
    ] = "pocket",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Decides weights and data.")] = 0,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", ...')] = "cpu",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: faster, needs a C++ compiler.")
    ] = False,
) -> None:
    """Train a pocket model, or its sparse autoencoder, from scratch: seeded, checkpointed and resumable."""
    from dataclasses import replace

    from mechsteer.pocket.card import model_card, sae_card
    from mechsteer.study.runner import check_device

    check_device(device, "--device")
    if out.exists() and not out.is_dir():
        raise MechsteerError(f"--out {out} is a file: give a folder for the run")
    if model == "sae":
        from mechsteer.pocket.sae import SAERecipe, train_sae

        recipe = SAERecipe(seed=seed)
        if steps is not None:
            recipe = replace(recipe, chunks=max(1, steps // recipe.chunk_steps))
        train_sae(_model_folder(pocket_folder), out, recipe, device=device)
        card = sae_card(out)
    else:
        from mechsteer.pocket.train import RECIPES
        from mechsteer.pocket.train import train as train_model

        if model not in RECIPES:
            raise MechsteerError(f"--model {model!r} is none of {', '.join([*RECIPES, 'sae'])}")
        recipe = replace(RECIPES[model], seed=seed, steps=steps or RECIPES[model].steps)
        train_model(recipe, out, device=device, checkpoint_every=checkpoint_every, compile_model=compile_model)
        card = model_card(out)
    (out / "README.md").write_text(card)
    Console().print(f"wrote {escape(str(out))}")


@pocket.command(
    epilog="[bold]Examples[/]\n\n"
    "  mechsteer pocket check\n\n"
    "  mechsteer pocket check --model runs/pocket --sae runs/sae --json check.json\n\n"
    "Exit status: 0 if every row reaches its bar, 1 if one falls short, 2 for a wrong argument.",
)
def check(
    model: Annotated[str, typer.Option(help='"pocket" or a folder made by `pocket train`.')] = "pocket",
    sae: Annotated[str, typer.Option(help='"pocket", a folder, or "none" to leave it out.')] = "pocket",
    count: Annotated[int, typer.Option(min=12, help="Prompts a row.")] = 1200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here as JSON too.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the figures into the cards of the model and the autoencoder.")
    ] = False,
) -> None:
    """Measure every behaviour of the pocket model on held-out wordings, and compare each with its bar."""
    console = Console()
    folder = _model_folder(model)
    sae_folder = None
    if sae != "none":
        from mechsteer.data import data_path

        sae_folder = data_path("saes", "pocket") if sae == "pocket" else Path(sae)
    from mechsteer.pocket.check import PARTS, PocketCheck, write_rows

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        # The first part begins when the model is loaded: `completed` counts the parts that are done.
        task = bar.add_task("loading the model", total=PARTS - (sae_folder is None), completed=-1)
        rows = PocketCheck(
            folder,
            sae_folder=sae_folder,
            count=count,
            progress=lambda part: bar.update(task, description=part, advance=1),
        ).rows()
    table = Table("behaviour", "measured", "bar", "n", "", title=f"pocket check: {escape(model)}")
    for row in rows:
        colour = "green" if row.passed else "bold red"
        table.add_row(
            escape(row.behaviour),
            f"[{colour}]{row.show(row.measured)}[/]",
            f"{row.sign} {row.show(row.bar)}",
            str(row.count),
            escape(row.detail),
        )
    console.print(table)
    if json_file is not None:
        write_rows(rows, json_file)
    if card:
        from mechsteer.pocket.card import write_cards

        write_cards(folder, sae_folder, rows)
    short = [row.behaviour for row in rows if not row.passed]
    if short:
        console.print(f"[bold red]{len(short)} of {len(rows)} rows fall short[/]")
        raise typer.Exit(1)
    console.print(f"[green]all {len(rows)} rows reach their bars[/]")


def _model_folder(name: str) -> Path:
    """The folder of a shipped model's name, or the folder itself."""
    if name in ("pocket", "pocket-1l"):
        from mechsteer.data import data_path

        return data_path("models", name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise MechsteerError(f'{name} is neither "pocket", "pocket-1l" nor a folder with a config.json')
    return folder


def _prefix(text: str | None, prefix: str | None) -> str:
    """The prefix of a command that takes it as an argument and as an option."""
    if text is not None and prefix is not None:
        raise MechsteerError(f"the prefix is given twice, as {text!r} and as --prefix {prefix!r}: give one of them")
    return text if text is not None else _text_or_file(PREFIX if prefix is None else prefix)


def _text_or_file(value: str) -> str:
    """The text of a file of this name, or the value itself."""
    path = Path(value)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, ValueError) as error:  # also a text too long for a file's name, and a file that is no UTF-8
        if len(value) < 256:
            raise MechsteerError(f"--prefix {value}: this file cannot be read as text ({error})") from error
    if path.suffix in (".txt", ".md") and not any(char.isspace() for char in value):
        raise MechsteerError(f"--prefix {value} names no file: give a file that exists, or the prefix itself")
    return value


def _names(listed: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def _print_headline(console: Console, rows: list[tuple[str, str, str, str]]) -> None:
    """A short table for each chapter."""
    for chapter, group in groupby(rows, key=lambda row: row[0]):
        console.print(Text(chapter, "bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        for _, label, value, note in group:
            table.add_row(Text(f"  {value}", "cyan"), Text(label), Text(note, "dim"))
        console.print(table)


def _coloured(answer: str) -> Text:
    """The answer, with the words of a topic in that topic's colour."""
    import re

    from mechsteer.pocket.lexicon import TOPICS

    text = Text(answer)
    colours = ("magenta", "yellow", "cyan", "green", "red", "blue")
    for index, topic in enumerate(TOPICS.values()):
        words = {topic.name, *topic.content_words}
        for match in re.finditer(r"[A-Za-z]+", answer):
            if match.group().lower() in words:
                text.stylize(colours[index % len(colours)], *match.span())
    return text


def main() -> None:
    """Entry point. Exit status 2 for anything wrong with what was asked, 130 after Ctrl-C."""
    try:
        app()
    except MechsteerError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
