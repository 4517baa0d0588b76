"""The command line: `mechsteer`. One module for each command, `options` for what they share."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from mechsteer.cli import features, models, patch, plan, pocket, prefix, strength, study, terminal, travel, vector
from mechsteer.cli.options import CHAPTERS, epilog, expanded
from mechsteer.errors import MechsteerError

__all__ = ["CHAPTERS", "app", "main"]


app = typer.Typer(
    help="What moves a language model's behaviour, where the push enters, how it travels, how strong it must be.",
    no_args_is_help=True,
    epilog=epilog(
        'mechsteer study "Talk only about cats." --out study-cats',
        "mechsteer patch",
        'mechsteer strength "Talk only about cats." --out strength-cats',
        'mechsteer prefix "Talk only about cats." --out prefix-cats',
        "mechsteer pocket try",
        after="Each command explains itself: mechsteer study --help. For machines: --json.",
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from mechsteer import __version__

        typer.echo(f"mechsteer {__version__}")
        raise typer.Exit()


# In the order of the help.
app.command(epilog=study.EPILOG)(expanded(study.study))
app.command(epilog=patch.EPILOG)(expanded(patch.patch))
app.command(epilog=travel.EPILOG)(expanded(travel.travel))
app.command(epilog=strength.EPILOG)(expanded(strength.strength))
app.command(epilog=prefix.EPILOG)(expanded(prefix.prefix))
app.command(epilog=features.EPILOG)(expanded(features.features))
app.command(epilog=vector.EPILOG)(expanded(vector.vector))
app.command(epilog=models.EPILOG)(expanded(models.models))
app.add_typer(plan.app, name="plan")
app.add_typer(pocket.app, name="pocket")


def main() -> None:
    """Entry point. Exit status 2 for anything wrong with what was asked, 130 after Ctrl-C."""
    try:
        app()
    except MechsteerError as error:
        terminal.err().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
