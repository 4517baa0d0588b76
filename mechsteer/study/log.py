"""What a study says while it runs: plain lines on standard error, in a notebook below the cell, under which the bars of
sweeps come and go."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text


class Log:
    """One line for each step, with the time since its chapter began."""

    def __init__(self, *, show: bool = True) -> None:
        self._notebook = Console().is_jupyter
        # In a notebook lines of one stream stand together; each line that a console shows there is an output of its
        # own, and what goes to standard error looks like a warning.
        notebook = {"force_jupyter": False, "force_terminal": True, "color_system": "standard"}
        self._console = Console(stderr=True, highlight=False, **(notebook if self._notebook else {}))  # type: ignore[arg-type]
        self._show = show
        self._began = time.perf_counter()

    def title(self, prefix: str, *parts: str) -> None:
        """What is being studied."""
        self._say(Text.assemble((prefix, "bold"), ("  " + "  ·  ".join(parts), "dim")))

    def chapter(self, place: int, total: int, title: str) -> None:
        """A chapter begins."""
        self._began = time.perf_counter()
        self._say(Text.assemble((f"[{place}/{total}] ", "cyan"), (title, "bold")))

    def line(self, text: str) -> None:
        """What is being done now."""
        self._step(text, "default")

    def done(self, text: str) -> None:
        """A chapter is finished."""
        self._step(text, "green")

    def failed(self, text: str) -> None:
        """A chapter has no findings."""
        self._step(text, "bold red")

    def stopped(self, finished: Sequence[str], *, what: str = "chapters") -> None:
        """The user stopped the study."""
        kept = ", ".join(finished) or "none"
        self._say(Text(f"Stopped. Finished {what}: {kept}. The same command goes on from there.", "bold yellow"))

    def _step(self, text: str, style: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self._began), 60)
        self._say(Text.assemble((f"  {minutes}:{seconds:02d}  ", "dim"), (text, style)))

    def _say(self, text: Text) -> None:
        if not self._show:
            return
        # Through sys.stderr, which a bar that is on screen has replaced so that lines appear above it; a console of
        # its own would write into the bar.
        with self._console.capture() as captured:
            self._console.print(text, soft_wrap=True)
        stream = sys.stdout if self._notebook else sys.stderr
        stream.write(captured.get())
        stream.flush()
