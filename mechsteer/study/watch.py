"""What a search for other words shows: where it stands, in a terminal, or a line for each stage, elsewhere; and what
came out."""

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mechsteer.markup import quoted
from mechsteer.study.log import Log
from mechsteer.study.rewording_report import OURS, STAGES, evaluations, table

if TYPE_CHECKING:
    from mechsteer.study.rewording import Rewording

_DOING = {"soft": "optimising a soft prefix", "beam": "making tokens of it", "final": "searching"}


class Watch:
    """Takes what `match_prefix` tells, as its `tell`.

    with Watch(log, evaluations, finished, show=True) as watch:
        match_prefix(..., progress=False, tell=watch.tell)
    """

    def __init__(self, log: Log, evaluations: int, finished: list[str], *, show: bool) -> None:
        """
        Args:
            log: takes a line for each stage.
            evaluations: how many there will be.
            finished: takes the names of stages that are over.
            show: in a terminal, where the search stands too.
        """
        self._log, self._evaluations, self._finished = log, evaluations, finished
        self._began = time.perf_counter()
        self._now, self._detail, self._text = "soft", "", ""
        self._done = 0
        self._losses: dict[str, float] = {}
        self._spinner = Spinner("dots")
        console = Console(stderr=True)
        self._live = Live(self, console=console, transient=True) if show and console.is_terminal else None

    def tell(self, stage: str, done: int, loss: float, text: str) -> None:
        """Take note of where a match stands; arguments as `match_prefix` has them."""
        self._done = done
        if stage == "final":
            self._now, self._text = stage, text
            self._losses[stage] = loss
        elif math.isnan(loss):
            self._now, self._detail = stage, text if stage == "soft" else ""
            if stage == "beam":
                self._over("soft")
        else:
            self._now, self._detail = "final", ""
            self._losses[stage] = loss
            self._over(stage)
            self._log.done(f"{STAGES[stage]}: loss {loss:.4f}" + (f", {quoted(text)}" if text else ""))

    def _over(self, stage: str) -> None:
        if STAGES[stage] not in self._finished:
            self._finished.append(STAGES[stage])

    def __rich__(self) -> RenderableType:
        minutes, seconds = divmod(int(time.perf_counter() - self._began), 60)
        self._spinner.update(text=Text.assemble(f"{_DOING[self._now]}  ", (f"{minutes}:{seconds:02d}", "dim")))
        view = Table.grid(padding=(0, 1))
        view.add_row(self._spinner)
        if self._detail:
            view.add_row(Text(f"  {self._detail}"))
        if self._now == "final":
            bar = Table.grid(padding=(0, 1))
            counted = f"{self._done} of {self._evaluations} candidates"
            bar.add_row(" ", ProgressBar(total=self._evaluations, completed=self._done, width=32), Text(counted))
            view.add_row(bar)
        losses = [f"{STAGES[stage]} {loss:.4f}" for stage, loss in self._losses.items()]
        if losses:
            view.add_row(Text(f"  loss: {' -> '.join(losses)}"))
        if self._text:
            view.add_row(Text.assemble("  ", (quoted(self._text), "bold")))
        return view

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def outcome(done: "Rewording") -> list[RenderableType]:
    """The answer, a table for each model, how much of the gap is closed, the round trip, and the files."""
    summary = done.summary
    rows = table(evaluations(summary, done.evaluation, done.transfer), summary["losses"]).to_dict("records")
    parts: list[RenderableType] = [Text.assemble("in other words: ", (quoted(done.text), "bold cyan"))]
    parts += [_table(name, [row for row in rows if row["model"] == name], summary) for name in summary["models"]]
    if summary["gap_closed"] is not None:
        share = f"{100 * summary['gap_closed']:.0f} %"
        parts.append(Text(f"hardening gap closed: {share} of the way from the projection back to the soft prefix"))
    counts = [f"{n} of {total} {half} requests" for half, (n, total) in summary["round_trip"].items()]
    parts.append(Text(f"round trip: the ids survive decode -> encode inside the prompts of {' and '.join(counts)}"))
    files = ["prefix.txt", "table.csv", "figures.html", "evaluation.safetensors"]
    return [*parts, Text.assemble("wrote: ", (str(done.folder), "bold"), f" ({', '.join(files)}, ...)")]


def _table(model: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> Table:
    """The columns of a table that fit a terminal, those without any value left out."""
    shown = summary["shown"]
    columns = {
        "loss": ("search_loss", ".3f"), "held out": ("held_out_loss", ".3f"), "CE": ("cross_entropy", ".3f"),
        "shared": ("overlap_at_8", ".0%"), "shows": ("adherence_greedy", ".0%"),
        "sampled": ("adherence_sampled", ".0%"),
    }  # fmt: skip
    if summary["target"] == "behaviour":
        del columns["held out"]  # it is the cross entropy
    kept = {name: each for name, each in columns.items() if not all(pd.isna(row[each[0]]) for row in rows)}
    loss = f"loss: {summary['loss']} on requests searched on; the others held out. " if "loss" in kept else ""
    said = "" if shown is None else f" shows: completions that {shown}, sampled: of drawn ones."
    made = Table(
        "prefix", title=f"on {model}", title_justify="left", caption_justify="left",
        caption=f"{loss}CE: of the reference's completions. shared: of their first 8 tokens.{said}",
    )  # fmt: skip
    made.columns[0].no_wrap = True
    made.add_column("text", overflow="fold", min_width=12)
    for name in kept:
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = ["" if pd.isna(row[key]) else format(row[key], form) for key, form in kept.values()]
        text = quoted(row["text"]) if row["text"] else ""
        made.add_row(*map(Text, (row["prefix"], text, *cells)), style="bold cyan" if row["prefix"] == OURS else None)
    return made
