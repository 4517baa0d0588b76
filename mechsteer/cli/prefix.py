"""`mechsteer prefix`: a prefix in other words."""

from pathlib import Path
from typing import Annotated

import typer

from mechsteer.cli import options, terminal
from mechsteer.errors import MechsteerError

EPILOG = options.epilog(
    'mechsteer prefix "Talk only about cats." --out prefix-cats',
    'mechsteer prefix "Talk only about cats." --tokens 6 --evaluations 400 --steps 60 --characters ascii',
    'mechsteer prefix "Sound gloomy." --forbid "gloom,sad" --target state:3 --out gloomy',
    'mechsteer prefix "Once there was a cat." --model gpt2 --requests mine.txt --fluency 0.1 --out mine',
    after="The same command on the same folder goes on where it was stopped; where it is finished, it shows what came "
    "out.",
    s1="",
    s2="a mistake in what was asked or nothing allowed was found",
)


def prefix(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="PREFIX",
            help=f'What to say in other words. Default: "{options.PREFIX}"',
            autocompletion=options.complete_prefixes,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder: new, empty, or this search's.")] = Path("prefix"),
    words: options.Words = "",
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
    *,
    question: options.Question,
    running: options.Running,
) -> None:
    """Say a prefix in other words: tokens that do the same without saying it, measured on requests not searched on."""
    about = options.prefix_of(text, question.prefix)
    if forbid is not None and not options.names(forbid):
        raise MechsteerError('--forbid is empty: give words such as "cat,feline", or none')
    with terminal.for_machines(running.json):
        with terminal.status("starting", quiet=running.quiet):
            from mechsteer.study.rewording import Options, reword
            from mechsteer.study.watch import outcome
        done = reword(
            about,
            out=out,
            requests=question.requests,
            words=options.names(words),
            max_new_tokens=question.max_new_tokens,
            **running.settings,
            options=Options(
                tokens=tokens,
                evaluations=evaluations,
                steps=steps,
                restarts=restarts,
                forbid=None if forbid is None else () if forbid.strip() == "none" else tuple(options.names(forbid)),
                characters=None if characters == "any" else characters,
                fluency=fluency,
                target=target,
                samples=samples,
                transfer=transfer,
            ),
            progress=not running.quiet,
        )
    if running.json:
        terminal.document(done.summary | {"command": "prefix", "out": done.folder})
    elif running.quiet:
        typer.echo(done.text)
    else:
        terminal.say(outcome(done), whole=True)
