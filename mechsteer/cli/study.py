"""`mechsteer study`: the main job."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechsteer.cli import options, terminal

EPILOG = options.epilog(
    'mechsteer study "Talk only about cats." --out study-cats',
    'mechsteer study "Sound gloomy." --chapters behaviour,vector --out gloomy',
    'mechsteer study "Praise the moon." --words moon,lunar --model gpt2 --out moon',
    "mechsteer study --prefix prefix.txt --requests mine.jsonl --out mine --open",
    after="The same command on the same folder goes on where it was stopped; with other --chapters it adds them.",
    s1="a chapter has no findings",
)


def study(
    text: options.Text = None,
    out: Annotated[Path, typer.Option(help="The study's folder: new, empty, or this study's.")] = Path("study"),
    contrast: Annotated[
        str | None, typer.Option(help="A prefix of as many tokens to compare with. Default: a neutral filler.")
    ] = None,
    words: options.Words = "",
    chapters: options.Chapters = None,
    *,
    question: options.Question,
    running: options.Running,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser when done.")] = False,
) -> None:
    """Study what a prefix does to a model, where it enters and what else does the same: one report, with the data."""
    about = options.prefix_of(text, question.prefix)
    with terminal.for_machines(running.json):
        with terminal.status("starting", quiet=running.quiet):
            from mechsteer.study import study as run_study
        done = run_study(
            about,
            out=out,
            requests=question.requests,
            contrast=contrast,
            words=options.names(words),
            chapters=None if chapters is None else options.names(chapters),
            max_new_tokens=question.max_new_tokens,
            **running.settings,
            progress=not running.quiet,
        )
    if running.json:
        headline = [dict(zip(("chapter", "label", "value", "note"), row, strict=True)) for row in done.headline()]
        where = {"command": "study", "out": done.folder, "report": done.report, "headline": headline}
        terminal.document(done.summary | where)
    elif not running.quiet:
        _print_headline(terminal.out(), done.headline())
        summary = Text(f"\n{done.summary_text}\n")
        summary.highlight_words([answer.question for answer in done.answers], "bold")
        terminal.out().print(summary, soft_wrap=True)
    for name, reason in done.failures.items():
        terminal.err().print(Text.assemble((f"{name}: ", "bold red"), reason), soft_wrap=True)
    if not running.json:
        terminal.out().print(Text.assemble("report: ", (str(done.report), "bold")), soft_wrap=True)
    if open_report:
        import webbrowser

        webbrowser.open(done.report.resolve().as_uri())
    if done.failures:
        raise typer.Exit(1)


def _print_headline(console: Console, rows: list[tuple[str, str, str, str]]) -> None:
    """A short table for each chapter."""
    for chapter, group in groupby(rows, key=lambda row: row[0]):
        console.print(Text(chapter, "bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        for _, label, value, note in group:
            table.add_row(Text(f"  {value}", "cyan"), Text(label), Text(note, "dim"))
        console.print(table)
