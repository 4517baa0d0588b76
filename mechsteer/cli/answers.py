"""What most commands do around their own work: a folder that is theirs, an answer that is kept in it, and how it is
told."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from mechsteer.cli import terminal
from mechsteer.cli.options import Question, Running, plain
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mechsteer.directions import Direction
    from mechsteer.model import Model
    from mechsteer.result import Result
    from mechsteer.study.case import Case
    from mechsteer.study.log import Log
    from mechsteer.study.settings import Settings

FORMAT, VERSION = "command", 1
ASKED, SUMMARY, FIGURES, WORK = "command.json", "summary.json", "figures.html", "unfinished"
COMPLETIONS, LOCK = "completions.json", ".lock"  # names of mechsteer.study.case and mechsteer.study.folder
# What a command leaves that was killed before it claimed the folder, and what it writes first.
_KILLED = (LOCK, f".{ASKED}.tmp")
_OURS = (ASKED, *_KILLED, f".{SUMMARY}.tmp", f"{COMPLETIONS}.tmp")


@dataclass(frozen=True, eq=False)
class Answer:
    """What came out of a command.

    Attributes:
        summary: the numbers, as JSON: what is told, and all that telling needs.
        results: saved under their names.
        figures: of the page.
        lead: what stands above them.
        directions: saved under their names.
        others: further files that the work itself wrote into the folder.
    """

    summary: Mapping[str, Any]
    results: Mapping[str, "Result"]
    figures: Sequence["go.Figure"]
    lead: str
    directions: Mapping[str, "Direction"] = field(default_factory=dict)
    others: Sequence[str] = ()


@dataclass(frozen=True)
class Command:
    """A command with a folder of its own.

    Attributes:
        name: such as "patch".
        title: what it is about, in a line.
        out: its folder.
        asked: all that the answer depends on, as JSON. Another command on the same folder must not differ in it.
        running: its options `json` and `quiet` say how the answer is told.
    """

    name: str
    title: str
    out: Path
    asked: Mapping[str, Any]
    running: Running

    def run(
        self,
        work: Callable[["Log", Path], Answer],
        show: Callable[[Mapping[str, Any]], Sequence[RenderableType]],
    ) -> dict[str, Any]:
        """Make the answer, or take the one that is in the folder, and tell it.

        Args:
            work: makes it; gets something that takes lines, and the folder.
            show: texts and tables of its summary.

        Returns:
            The summary.

        Raises:
            MechsteerError: something that was asked for is wrong or does not fit together, or the folder holds
                something else; nothing was written then.
            KeyboardInterrupt: it was stopped.
        """
        with terminal.for_machines(self.running.json):
            summary = self._kept() or self._made(work)
        if self.running.json:
            terminal.document(summary)
            return summary
        if not self.running.quiet:
            terminal.say(show(summary))
        files = ", ".join(summary["files"])
        terminal.say([Text.assemble("wrote: ", (str(self.out), "bold"), f" ({files})")], whole=True)
        return summary

    def _kept(self) -> dict[str, Any] | None:
        """The finished answer that is in the folder; None where there is none yet."""
        from mechsteer.files import check_stamp
        from mechsteer.study.settings import read_json

        folder = self.out
        if not folder.exists():
            return None
        if not folder.is_dir():
            raise MechsteerError(f"{folder} is a file. Give a folder, new or empty.")
        if not (folder / ASKED).exists():
            others = sorted({each.name for each in folder.iterdir()} - set(_KILLED))
            if others:
                raise MechsteerError(
                    f"{folder} is not empty and holds nothing of `mechsteer {self.name}` (it holds "
                    f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). Give a new or an empty folder."
                )
            return None
        path = folder / ASKED
        about = check_stamp(read_json(path), path, format=FORMAT, version=VERSION)
        there, here = ({"command": each["command"], **each["asked"]} for each in (about, self._claim()))
        for name in {**here, **there}:
            if there.get(name) != here.get(name):
                a, b = (shorten(repr(each.get(name)), 60, placeholder="...") for each in (there, here))
                a, b = ("some", "others") if a == b else (a, b)
                raise MechsteerError(
                    f"{folder} holds another answer ({name}: {a} there, {b} here). Give another --out, or the options "
                    "of that one."
                )
        path = folder / SUMMARY
        if not path.exists():
            return None
        summary = check_stamp(read_json(path), path, format=f"{FORMAT}-summary", version=VERSION)
        return summary | {"out": str(folder)}

    def _claim(self) -> dict[str, Any]:
        return {"command": self.name, "asked": plain(dict(self.asked))}

    def _made(self, work: Callable[["Log", Path], Answer]) -> dict[str, Any]:
        from mechsteer.study import folder as folders
        from mechsteer.study.log import Log

        folder, new = self.out, not self.out.exists()
        free = new or not (folder / ASKED).exists()
        with terminal.status("starting", quiet=self.running.quiet):
            import mechsteer.model  # noqa: F401  (what takes seconds to import)
        log = Log(show=not self.running.quiet)
        log.title(self.title, str(folder))
        with folders.locked(folder):
            kept = self._kept()  # again: another process may have been here before the lock
            if kept is not None:
                return kept
            try:
                summary = self._written(work, log)
            except KeyboardInterrupt:
                finished = [name for name in (WORK, COMPLETIONS) if (folder / name).exists()]
                log.failed("Stopped. The same command " + ("goes on from there." if finished else "begins again."))
                if free and not finished:
                    self._cleared(new)
                raise
            except BaseException:
                if free:
                    self._cleared(new)
                raise
        (folder / LOCK).unlink(missing_ok=True)
        return summary

    def _written(self, work: Callable[["Log", Path], Answer], log: "Log") -> dict[str, Any]:
        from mechsteer.files import stamp
        from mechsteer.study import folder as folders
        from mechsteer.study.page import page

        began, folder = time.perf_counter(), self.out
        folders.write_json(folder / ASKED, stamp(FORMAT, VERSION) | self._claim())
        answer = work(log, folder)
        artefacts: dict[str, Any] = {**answer.results, **answer.directions}
        for name, each in artefacts.items():
            each.save(folder / f"{name}.safetensors")
        folders.write(folder / FIGURES, page(self.title, answer.lead, answer.figures))
        made = [f"{name}.safetensors" for name in artefacts]
        about = {"command": self.name, "out": str(folder), "files": [*made, *answer.others, FIGURES, SUMMARY]}
        about["seconds"] = round(time.perf_counter() - began, 3)
        summary = stamp(f"{FORMAT}-summary", VERSION) | about | plain(dict(answer.summary))
        folders.write_json(folder / SUMMARY, summary)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return summary

    def _cleared(self, new: bool) -> None:
        """Take away what this command put into a folder that was free before it."""
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        for name in (*_OURS, COMPLETIONS):
            (self.out / name).unlink(missing_ok=True)
        if new and not any(self.out.iterdir()):
            self.out.rmdir()


# ---- what several commands begin with ----


def loaded(model: str, device: str | None, dtype: str, log: "Log") -> "Model":
    """The model, loaded.

    Raises:
        MechsteerError: it cannot be, or there is no such device or type.
    """
    import torch

    from mechsteer.cli.options import DTYPES, choice
    from mechsteer.model import load_model
    from mechsteer.study.runner import check_device

    choice(dtype, DTYPES, "--dtype")
    check_device(device, "--device")
    log.line(f"loading {model}")
    return load_model(model, device=device, dtype=getattr(torch, dtype))


def settings_of(prefix: str, question: Question, running: Running, **others: Any) -> "Settings":
    """The settings of a steering question, with the requests of a file or the shipped ones.

    Raises:
        MechsteerError: one of them is wrong.
    """
    from mechsteer.study.requests import shipped
    from mechsteer.study.settings import Settings, as_requests

    requests = question.requests
    return Settings.of(
        prefix=prefix,
        requests=shipped() if requests is None else as_requests(requests, seed=running.seed),
        max_new_tokens=question.max_new_tokens,
        **running.settings,
        **others,
    )


def case_of(settings: "Settings", log: "Log", folder: Path) -> "Case":
    """The case of these settings, whose completions are kept in the folder.

    Raises:
        MechsteerError: the model cannot be loaded, or the prompts do not fit it.
    """
    from mechsteer.study.case import Case

    model = loaded(settings.model, settings.device, settings.dtype, log)
    return Case.of(settings, model=model, folder=folder, tell=log.line)


def identity(settings: "Settings") -> dict[str, Any]:
    """What of the settings decides an answer, for `Command.asked`."""
    return {"model": settings.model, **settings.identity}
