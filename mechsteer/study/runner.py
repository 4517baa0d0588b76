"""The main job: a study of one prefix on one model, chapter by chapter, resumable, as one report."""

import shlex
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from mechsteer import markup
from mechsteer.activations import ModelId
from mechsteer.errors import MechsteerError
from mechsteer.files import stamp
from mechsteer.model import Model, load_model
from mechsteer.result import Result
from mechsteer.study import folder as folders
from mechsteer.study.case import Case
from mechsteer.study.chapter import Chapter, Findings, Finished, keep, kept, tidy
from mechsteer.study.chapters import NAMES
from mechsteer.study.chapters import chapters as shipped_chapters
from mechsteer.study.executive import Answer, as_text, executive
from mechsteer.study.log import Log
from mechsteer.study.report import Section, headline, render
from mechsteer.study.requests import shipped
from mechsteer.study.settings import Settings, as_requests, read_json


@dataclass(frozen=True)
class Study:
    """A study on disk.

    Attributes:
        folder: that holds it.
        settings: that it was made with.
        model: name and hash of the weights.
        chapters: the finished ones, by name.
        failures: why chapters have no findings or cannot be shown, by name.
    """

    folder: Path
    settings: Settings
    model: ModelId
    chapters: Mapping[str, Finished]
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The report: one HTML file that needs no other."""
        return self.folder / "report.html"

    @property
    def results(self) -> dict[str, dict[str, Result]]:
        """The Results behind the report, by chapter and name."""
        return {name: dict(chapter.findings.results) for name, chapter in self.chapters.items()}

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return read_json(self.folder / "summary.json")

    @property
    def findings(self) -> dict[str, Findings]:
        """The findings of the finished chapters, by name."""
        return {name: chapter.findings for name, chapter in self.chapters.items()}

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The executive summary: each question of the study with its answer, computed from the findings."""
        return executive(self.findings, self.failures)

    @property
    def summary_text(self) -> str:
        """The executive summary as plain text, in lines of at most 100 characters."""
        return as_text(self.answers)

    def case(self) -> Case:
        """The model, requests and options of the study, to measure something again or something else: the model is
        loaded, and completions are generated when they are asked for.

        Raises:
            MechsteerError: the model cannot be loaded, or has other weights than the study was made with.
        """
        case = Case.of(self.settings)
        if case.model.id.hash != self.model.hash:
            raise MechsteerError(
                f"{self.settings.model} now has the weights {case.model.id.hash[:12]}, and this study was made with "
                f"{self.model.hash[:12]}. Load those, and call Case.of(study.settings, model=...)."
            )
        return case

    def headline(self) -> list[tuple[str, str, str, str]]:
        """The numbers to read first: (chapter, label, value, note)."""
        return headline(_sections(self, _known(self.chapters)))

    def __repr__(self) -> str:
        return (
            f"Study({self.settings.prefix!r} on {self.model.name}, {len(self.settings.requests)} requests, "
            f"chapters {', '.join(self.chapters) or 'none'}, in {str(self.folder)!r})"
        )

    def _repr_html_(self) -> str:
        parts: list[object] = []
        with suppress(MechsteerError):  # no summary yet, or one that cannot be read
            rows = [(chapter, label, markup.strong(value), note) for chapter, label, value, note in self._headline()]
            parts += [markup.table(("chapter", "", "", ""), rows)] if rows else []
        if not parts:
            parts += [markup.facts({name: f"{done.seconds:.1f} s" for name, done in self.chapters.items()})]
        parts += [markup.lines(f"{name}: {why}" for name, why in self.failures.items())]
        parts += [markup.link(self.report, "report.html") if self.report.exists() else markup.faded("no report yet")]
        requests = f"{len(self.settings.requests)} requests, {len(self.chapters)} chapters"
        return markup.card("Study", *parts, about=f'"{self.settings.prefix}" on {self.model.name}, {requests}')

    def _headline(self) -> list[list[str]]:
        """What `headline` gave when the report was written: to ask the chapters again takes seconds."""
        return self.summary.get("headline", [])


def study(
    prefix: str,
    *,
    out: str | PathLike[str],
    model: str | PathLike[str] | Model = "pocket",
    requests: str | PathLike[str] | Iterable[Any] | None = None,
    contrast: str | None = None,
    words: Sequence[str] = (),
    chapters: Sequence[str | Chapter] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_new_tokens: int = 40,
    progress: bool = True,
) -> Study:
    """What a prefix does to a model, where it enters, and what else does the same: measured, and told in a report.

        cats = study("Talk only about cats.", out="study-cats")
        cats.report, cats.results["behaviour"], cats.summary

    The folder `out` then holds `report.html`, `summary.json`, and `chapters/<name>/` with the Results behind them.
    Finished chapters are kept when the process is stopped or killed, and the same call goes on from there; a call with
    other chapters adds them. A chapter that fails loses no other.

    Args:
        prefix: the instruction under study.
        out: the study's folder: new, empty, or the same study's.
        model: "pocket", "pocket-1l", a hub name, a folder, or a loaded Model.
        requests: a file or texts, see `mechsteer.study.as_requests`; None takes those that ship with mechsteer.
        contrast: a prefix of as many tokens to compare with; None: a neutral filler is found.
        words: words that show the behaviour, where the labeller knows no topic for the prefix.
        chapters: names, or Chapters of your own; None takes all that ship with mechsteer.
        device: to load the model on; None takes CUDA where there is one, else the CPU.
        dtype: of the weights to load.
        seed: of all randomness, also of dealing requests into halves.
        max_new_tokens: length of the completions.
        progress: tell on standard error what is being done.

    Raises:
        MechsteerError: something that was asked for is wrong or does not fit together, or the folder holds something
            else; nothing was written then.
    """
    asked = _asked(chapters)
    folder = Path(out).expanduser()
    settings = Settings.of(
        model=model.name if isinstance(model, Model) else fspath(model),
        prefix=prefix,
        requests=shipped() if requests is None else as_requests(requests, seed=seed),
        contrast=contrast,
        words=tuple(words),
        chapters=tuple(chapter.name for chapter in asked),
        device=str(model.device) if isinstance(model, Model) else device,
        dtype=str(model.dtype).removeprefix("torch.") if isinstance(model, Model) else dtype,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    folders.check(folder, settings)
    check_device(settings.device)
    log = Log(show=progress)
    log.title(
        f'"{shorten(settings.prefix, 80, placeholder="...")}"',
        settings.model,
        f"{len(settings.requests)} requests",
        fspath(folder),
    )
    if not isinstance(model, Model):
        log.line("loading the model")
        model = load_model(model, device=device, dtype=getattr(torch, settings.dtype))
    case = Case.of(settings, model=model, folder=folder, tell=log.line)
    folders.check(folder, settings, model.id)
    with folders.locked(folder):
        folders.check(folder, settings, model.id)  # again: another process may have been here before the lock
        return _run(folder, settings, case, asked, log)


def load(folder: str | PathLike[str]) -> Study:
    """A study that is on disk, with the chapters that are finished.

    Raises:
        MechsteerError: the folder holds none.
    """
    folder = Path(folder).expanduser()
    settings, model = folders.read(folder)
    finished, failures = _on_disk(folder, _known(settings.chapters))
    return Study(folder, settings, model, finished, failures)


def check_device(name: str | None, option: str = "device") -> None:
    """Raise `MechsteerError` unless torch can use the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MechsteerError(
            f'{option} {name!r} cannot be used here ({reason}): give "cpu" or one torch sees'
        ) from error


def _run(folder: Path, settings: Settings, case: Case, asked: Sequence[Chapter], log: Log) -> Study:
    home = folder / "chapters"
    home.mkdir(exist_ok=True)
    tidy(home)
    before = folders.read(folder)[0].chapters if (folder / folders.STUDY).exists() else ()
    settings = settings.model_copy(update={"chapters": tuple(dict.fromkeys([*before, *settings.chapters]))})
    folders.claim(folder, settings, case.model.id)
    names = {chapter.name for chapter in asked}
    others = [chapter for chapter in _known(before) if chapter.name not in names]
    finished, failures = _on_disk(folder, others)
    order = sorted([*asked, *others], key=lambda each: NAMES.index(each.name) if each.name in NAMES else len(NAMES))

    def write() -> Study:
        made = {chapter.name: finished[chapter.name] for chapter in order if chapter.name in finished}
        study = Study(folder, settings, case.model.id, made, dict(failures))
        return _write(study, order)

    try:
        for place, chapter in enumerate(asked, start=1):
            log.chapter(place, len(asked), chapter.title)
            done = _kept(home, chapter, log)
            if done is None:
                done = _measured(home, chapter, case, log, failures)
            if done is not None:
                finished[chapter.name] = done
            write()
        return write()
    except KeyboardInterrupt:
        log.stopped(list(finished))
        raise


def _asked(chapters: Sequence[str | Chapter] | None) -> list[Chapter]:
    if chapters is None:
        return shipped_chapters()
    names = [each for each in chapters if isinstance(each, str)]
    own = [each for each in chapters if isinstance(each, Chapter)]
    return [*(shipped_chapters(names) if names or not own else []), *own]


def _kept(home: Path, chapter: Chapter, log: Log) -> Finished | None:
    try:
        done = kept(home, chapter)
    except MechsteerError as error:
        log.line(f"measuring it again: {error}")
        return None
    if done is not None:
        log.done(f"kept from before ({done.seconds:.1f} s)")
    elif (home / chapter.name).exists():
        log.line("measuring it again: an older version of this chapter made what is there")
    return done


def _measured(home: Path, chapter: Chapter, case: Case, log: Log, failures: dict[str, str]) -> Finished | None:
    """The chapter's findings, kept; None if it failed, and then why is among the failures."""
    trace = home / f"{chapter.name}.error.txt"
    trace.unlink(missing_ok=True)
    began = time.perf_counter()
    try:
        findings = chapter.measure(case)
        seconds = time.perf_counter() - began
        done = keep(home, chapter, findings, seconds=seconds, device=str(case.model.device))
    except MechsteerError as error:
        failures[chapter.name] = str(error)
        log.failed(f"not possible here: {error}")
        return None
    except Exception as error:
        # Whatever went wrong in one chapter, the others are still worth having.
        folders.write(trace, traceback.format_exc())
        failures[chapter.name] = f"{type(error).__name__}: {error} (the whole error is in {trace.name})"
        log.failed(f"failed: {type(error).__name__}: {error} (see {trace})")
        return None
    log.done(f"done in {seconds:.1f} s")
    return done


def _write(study: Study, chapters: Sequence[Chapter]) -> Study:
    """Write the report and the summary anew. Chapters that cannot be shown join the failures."""
    sections = _sections(study, chapters)
    again = commands(study.settings, study.folder)
    failures = {section.chapter.name: section.failure for section in sections if section.failure is not None}
    shown = Study(study.folder, study.settings, study.model, study.chapters, failures)
    page = render(
        study.settings, study.model, sections, answers=shown.answers, folder=str(study.folder), commands=again
    )
    folders.write(study.report, page)
    about = {
        "settings": study.settings.model_dump(mode="json"),
        "model": dict(study.model._asdict()),
        "seconds": round(sum(done.seconds for done in study.chapters.values()), 3),
        "chapters": {
            name: {"seconds": done.seconds, "date": done.date, "device": done.device, "mechsteer": done.mechsteer}
            | {"results": sorted(done.findings.results), "summary": done.findings.summary}
            for name, done in study.chapters.items()
        },
        "failures": failures,
        "headline": headline(sections),
        "answers": [
            {"question": each.question, "sentences": [sentence.as_json for sentence in each.sentences]}
            for each in shown.answers
        ],
        "versions": {"mechsteer": version("mechsteer"), "torch": torch.__version__},
    }
    folders.write_json(study.folder / "summary.json", stamp("study-summary", 1) | about)
    return shown


def commands(settings: Settings, folder: Path) -> dict[str, str]:
    """How to make a study again, from the shell and from Python."""
    own: dict[str, Any] = {}
    with suppress(MechsteerError):
        own = {} if settings.requests == shipped() else {"requests": str(folder / "requests.jsonl")}
    plain = Settings.model_fields
    for name in ("model", "contrast", "words", "device", "dtype", "seed", "max_new_tokens"):
        if getattr(settings, name) != plain[name].default:
            own[name] = getattr(settings, name)
    known = [name for name in NAMES if name in settings.chapters]
    if known and known != list(NAMES):
        own["chapters"] = tuple(known)
    shell = ["mechsteer", "study", settings.prefix, "--out", str(folder)]
    for name, value in own.items():
        shell += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
    python = "".join(f", {name}={value!r}" for name, value in own.items())
    return {
        "shell": shlex.join(shell),
        "python": "from mechsteer.study import study\n\n"
        f"result = study({settings.prefix!r}, out={str(folder)!r}{python})",
    }


def _sections(study: Study, chapters: Sequence[Chapter]) -> list[Section]:
    shown = [each for each in chapters if each.name in study.chapters or each.name in study.failures]
    return [Section.of(each, study.chapters.get(each.name), study.failures.get(each.name)) for each in shown]


def _known(names: Iterable[str]) -> list[Chapter]:
    """Those of the chapters that ship with mechsteer; there may be others, of someone's own."""
    known = [name for name in NAMES if name in names]
    return shipped_chapters(known) if known else []


def _on_disk(folder: Path, chapters: Sequence[Chapter]) -> tuple[dict[str, Finished], dict[str, str]]:
    """What is there of these chapters, and what is wrong with those that cannot be read."""
    finished: dict[str, Finished] = {}
    failures: dict[str, str] = {}
    for chapter in chapters:
        try:
            done = kept(folder / "chapters", chapter)
        except MechsteerError as error:
            failures[chapter.name] = str(error)
            continue
        if done is not None:
            finished[chapter.name] = done
    return finished, failures
