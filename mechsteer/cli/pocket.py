"""`mechsteer pocket`: try, check and train the pocket model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.errors import MechsteerError

REQUESTS = (
    "Tell me a short story about my holiday.",
    "Give me three bullet points about the meeting.",
    "Write a letter about my new house.",
)

app = typer.Typer(
    help="The pocket model: a small chat model with known behaviours that ships with mechsteer.",
    epilog=options.epilog(
        "mechsteer pocket try",
        "mechsteer pocket check",
        "mechsteer pocket train --out runs/pocket",
        s1="a row falls short",
    ),
    no_args_is_help=True,
)


@app.command(
    "try",
    epilog=options.epilog(
        "mechsteer pocket try",
        'mechsteer pocket try --prefix "Nothing but trains, please." --request "Tell me a joke."',
        'mechsteer pocket try --prefix "Sound gloomy." --json',
        s1="",
    ),
)
def try_(
    prefix: Annotated[
        str,
        typer.Option(
            help="Stands on a line before each request; compared with no prefix.",
            autocompletion=options.complete_prefixes,
        ),
    ] = options.PREFIX,
    request: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help='"pocket", "pocket-1l", or a folder made by `pocket train`.', autocompletion=options.complete_models
        ),
    ] = "pocket",
    device: options.Device = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Print the pocket model's answers to three requests, with and without a prefix."""
    requests = tuple(request or REQUESTS)
    if not prefix.strip():
        raise MechsteerError('--prefix is empty: give an instruction, for example "Talk only about cats."')
    if any(not text.strip() for text in requests):
        raise MechsteerError('a --request is empty: give something to ask, for example "Tell me a joke."')
    folder = options.model_folder(model)
    with terminal.for_machines(json), terminal.status("loading the model", quiet=quiet):
        from mechsteer.model import load_model
        from mechsteer.prompts import Prompts
        from mechsteer.study.runner import check_device

        check_device(device, "--device")
        chat_model = load_model(folder, device=device)
    prompts = Prompts.concat([Prompts.from_chats(requests, chat_model, prefix=given) for given in ("", prefix)])
    longest = int(prompts.lengths.max())
    room = chat_model.n_ctx - longest
    if room < 1:
        raise MechsteerError(
            f"prefix and request are {longest} tokens, and the model reads {chat_model.n_ctx}: shorten --prefix or "
            "--request"
        )
    with terminal.for_machines(json), terminal.status("answering", quiet=quiet):
        answers = chat_model.generate(prompts, max_new_tokens=min(room, 120), progress=False).completions
    halves = answers[: len(requests)], answers[len(requests) :]
    if json:
        rows = [
            dict(zip(("request", "without", "with"), row, strict=True)) for row in zip(requests, *halves, strict=True)
        ]
        terminal.document({"command": "pocket try", "model": model, "prefix": prefix, "answers": rows})
        return
    console = terminal.out()
    for text, plain, steered in zip(requests, *halves, strict=True):
        table = Table(title=Text(text), title_justify="left", expand=True, show_lines=False)
        table.add_column("without a prefix", ratio=1)
        table.add_column(Text(prefix), ratio=1)
        table.add_row(_coloured(plain), _coloured(steered))
        console.print(table)
    console.print("[dim]coloured: words of a topic, one colour for each topic[/]")


@app.command(
    epilog=options.epilog(
        "mechsteer pocket train --out runs/pocket",
        "mechsteer pocket train --model pocket-1l --out runs/pocket-1l --device cuda",
        "mechsteer pocket train --model sae --pocket runs/pocket --out runs/sae",
        s1="",
    ),
)
def train(
    out: Annotated[Path, typer.Option(help="The run's folder. The same command on the same folder resumes.")],
    model: Annotated[
        str,
        typer.Option(
            help='What to train: "pocket", "pocket-1l" (one layer), or "sae".',
            autocompletion=options.one_of("pocket", "pocket-1l", "sae"),
        ),
    ] = "pocket",
    pocket_folder: Annotated[
        str,
        typer.Option(
            "--pocket", help='For "sae": the model whose activations to use.', autocompletion=options.complete_models
        ),
    ] = "pocket",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Decides weights and data.")] = 0,
    device: Annotated[
        str, typer.Option(help='"cpu", "cuda", ...', autocompletion=options.one_of("cpu", "cuda"))
    ] = "cpu",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: faster, needs a C++ compiler.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train a pocket model, or its sparse autoencoder, from scratch: seeded, checkpointed and resumable."""
    with terminal.for_machines(json):
        from mechsteer.study.runner import check_device

        check_device(device, "--device")
        if out.exists() and not out.is_dir():
            raise MechsteerError(f"--out {out} is a file: give a folder for the run")
        console = Console(quiet=quiet)
        if model == "sae":
            card = _train_sae(options.model_folder(pocket_folder), out, steps, seed, device, console)
        else:
            card = _train_model(model, out, steps, seed, device, checkpoint_every, compile_model, console)
        (out / "README.md").write_text(card)
    if json:
        terminal.document(
            {"command": "pocket train", "model": model, "out": out, "files": sorted(p.name for p in out.iterdir())}
        )
    else:
        terminal.out().print(f"wrote {escape(str(out))}")


def _train_sae(model: Path, out: Path, steps: int | None, seed: int, device: str, console: Console) -> str:
    """Train it, and give its card."""
    from dataclasses import replace

    from mechsteer.pocket.card import sae_card
    from mechsteer.pocket.sae import SAERecipe, train_sae

    recipe = SAERecipe(seed=seed)
    if steps is not None:
        recipe = replace(recipe, chunks=max(1, steps // recipe.chunk_steps))
    train_sae(model, out, recipe, device=device, console=console)
    return sae_card(out)


def _train_model(
    name: str,
    out: Path,
    steps: int | None,
    seed: int,
    device: str,
    checkpoint_every: int,
    compile_model: bool,
    console: Console,
) -> str:
    """Train it, and give its card."""
    from dataclasses import replace

    from mechsteer.pocket.card import model_card
    from mechsteer.pocket.train import RECIPES, train

    if name not in RECIPES:
        raise MechsteerError(f"--model {name!r} is none of {', '.join([*RECIPES, 'sae'])}")
    recipe = replace(RECIPES[name], seed=seed, steps=steps or RECIPES[name].steps)
    train(recipe, out, device=device, checkpoint_every=checkpoint_every, compile_model=compile_model, console=console)
    return model_card(out)


@app.command(
    epilog=options.epilog(
        "mechsteer pocket check",
        "mechsteer pocket check --model runs/pocket --sae runs/sae --out check.json",
        "mechsteer pocket check --json",
        s1="a row falls short of its bar",
    ),
)
def check(
    model: Annotated[
        str,
        typer.Option(help='"pocket" or a folder made by `pocket train`.', autocompletion=options.complete_models),
    ] = "pocket",
    sae: Annotated[str, typer.Option(help='"pocket", a folder, or "none" to leave it out.')] = "pocket",
    count: Annotated[int, typer.Option(min=12, help="Prompts a row.")] = 1200,
    out: Annotated[Path | None, typer.Option(help="A file to write the table to, as JSON.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the figures into the cards of the model and the autoencoder.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Measure every behaviour of the pocket model on held-out wordings, and compare each with its bar."""
    folder = options.model_folder(model)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise MechsteerError(f"--out {out} cannot be written: give a file in a folder that exists")
    sae_folder = None
    if sae != "none":
        from mechsteer.data import data_path

        sae_folder = data_path("saes", "pocket") if sae == "pocket" else Path(sae)
    with terminal.for_machines(json):
        from mechsteer.pocket.check import PARTS, PocketCheck, write_rows

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=terminal.err(), transient=True, disable=quiet) as bar:
            # The first part begins when the model is loaded: `completed` counts the parts that are done.
            task = bar.add_task("loading the model", total=PARTS - (sae_folder is None), completed=-1)
            rows = PocketCheck(
                folder,
                sae_folder=sae_folder,
                count=count,
                progress=lambda part: bar.update(task, description=part, advance=1),
            ).rows()
    if out is not None:
        write_rows(rows, out)
    if card:
        from mechsteer.pocket.card import write_cards

        write_cards(folder, sae_folder, rows)
    short = [row.behaviour for row in rows if not row.passed]
    if json:
        from dataclasses import asdict

        held = [asdict(row) | {"passed": row.passed} for row in rows]
        terminal.document({"command": "pocket check", "model": model, "passed": not short, "rows": held})
    else:
        console = terminal.out()
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
        if short:
            console.print(f"[bold red]{len(short)} of {len(rows)} rows fall short[/]")
        else:
            console.print(f"[green]all {len(rows)} rows reach their bars[/]")
    if short:
        raise typer.Exit(1)


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
