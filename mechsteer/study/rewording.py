"""One prefix in other words, from the requests to a folder with the answer: what `mechsteer prefix` does."""

import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from mechsteer.activations import ModelId
from mechsteer.backends.autoencoder import load_sae
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.judges import telltale_words
from mechsteer.markup import quoted
from mechsteer.model import Model, load_model
from mechsteer.objectives import FeatureActivation, Objective, StateMatch
from mechsteer.prefix import Constraints, MatchedPrefix, RoundTrip, evaluate_prefixes, match_prefix
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.match import beam_evaluations
from mechsteer.prompts import Prompts
from mechsteer.result import Result
from mechsteer.site import Site
from mechsteer.study import folder as folders
from mechsteer.study import rewording_report as report
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.log import Log
from mechsteer.study.measures import CE
from mechsteer.study.requests import shipped
from mechsteer.study.rewording_report import NOTHING, OURS, SOFT
from mechsteer.study.runner import check_device
from mechsteer.study.settings import SPLITS, Settings, as_requests, read_json
from mechsteer.study.watch import Watch

FORMAT, VERSION = "rewording", 1
FILE, SUMMARY, MATCH = "prefix.json", "summary.json", "match"
TARGETS = "behaviour, state:LAYER, feature:NUMBER"
# The pocket models share their tokenizer.
_SISTERS = {"pocket": "pocket-1l", "pocket-1l": "pocket"}
# One in so many of the requests to search on says when the soft prefix stops.
_VALIDATED = 3


@dataclass(frozen=True)
class Options:
    """How other words are searched for.

    Attributes:
        tokens: how many; None for as many as the reference has.
        evaluations: prefixes of tokens whose exact loss is computed.
        steps: of the soft prefix.
        restarts: soft prefixes side by side.
        forbid: words that the answer may not hold; None for `mechsteer.judges.telltale_words` of the
            reference.
        characters: as in `Constraints`; None for any.
        fluency: weight of the answer's own negative log likelihood in the search.
        target: "behaviour", the cross entropy of the reference's greedy completions; "state:3", the state behind block
            3 at the deciding token under the reference, by cosine; or "feature:17", the pre-activation of a feature of
            the shipped autoencoder there.
        samples: completions drawn for each request in the evaluation.
        transfer: another model with the same tokenizer to try the prefixes on; None for the other pocket model where
            the model is one, "none" for none.

    Raises:
        MechsteerError: a value is out of range, or there is no such target or script.
    """

    tokens: int | None = None
    evaluations: int = 1000
    steps: int = 100
    restarts: int = 3
    forbid: tuple[str, ...] | None = None
    characters: str | None = "printable"
    fluency: float | int = 0.0
    target: str = "behaviour"
    samples: int = 4
    transfer: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "evaluations", "steps", "restarts", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MechsteerError(f"{name}: {value} is none. Give 1 or more.")
        if not re.fullmatch(r"behaviour|(state|feature):\d+", self.target):
            raise MechsteerError(f"target: {self.target!r} is none of {TARGETS}. Give one, such as state:3.")
        if self.characters not in (None, "printable", "ascii") and not _is_script(str(self.characters).upper()):
            raise MechsteerError(
                f"characters: no letter is called {self.characters!r} in Unicode. Give ascii, printable, any, or a "
                "script such as latin or cyrillic."
            )
        Constraints(forbidden_words=self.forbid or (), fluency=self.fluency)


@dataclass(frozen=True, eq=False)
class Rewording:
    """Other words for a prefix, on disk.

    Attributes:
        folder: that holds them.
        settings: the reference, the model and the requests.
        options: of the search.
        match: the answer, stage by stage.
        evaluation: of the prefixes on the held-out requests; see `evaluate_prefixes`.
        transfer: the same on another model; None where there is none.
        summary: what `summary.json` holds.
    """

    folder: Path
    settings: Settings
    options: Options
    match: MatchedPrefix
    evaluation: Result
    transfer: Result | None
    summary: dict[str, Any]

    @property
    def text(self) -> str:
        """The answer."""
        return self.match.text


def reword(
    prefix: str,
    *,
    out: str | PathLike[str],
    model: str | PathLike[str] | Model = "pocket",
    requests: str | PathLike[str] | Iterable[Any] | None = None,
    words: Sequence[str] = (),
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_new_tokens: int = 40,
    options: Options | None = None,
    progress: bool = True,
) -> Rewording:
    """Other words that do what a prefix does: searched for on one half of the requests, measured on the other.

        reword("Talk only about cats.", out="cats").text

    The folder then holds `prefix.txt`, the answer; `table.csv`, it beside the reference and baselines; `figures.html`;
    `summary.json`; the Results `evaluation.safetensors` and `transfer.safetensors`; and `match/` with all stages. A
    call that was stopped goes on from there; one that is finished gives what is in the folder, without the model.

    Args:
        prefix: the reference.
        out: new, empty, or of the same call.
        model, requests, words, device, dtype, seed, max_new_tokens: as for `mechsteer.study.study`.
        options: of the search.
        progress: tell on standard error what is being done.

    Raises:
        MechsteerError: something that was asked for is wrong or does not fit together, or the folder holds something
            else; nothing was written then. Or nothing that is allowed was found.
        KeyboardInterrupt: it was stopped.
    """
    folder, options = Path(out).expanduser(), options or Options()
    settings = Settings.of(
        model=model.name if isinstance(model, Model) else fspath(model),
        prefix=prefix,
        requests=shipped() if requests is None else as_requests(requests, seed=seed),
        words=tuple(words),
        device=str(model.device) if isinstance(model, Model) else device,
        dtype=str(model.dtype).removeprefix("torch.") if isinstance(model, Model) else dtype,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    _check(folder, settings, options)
    if (folder / SUMMARY).exists() and _is(model, folder):
        return load(folder)
    check_device(settings.device)
    log = Log(show=progress)
    log.title(f'"{settings.prefix}"', settings.model, options.target, fspath(folder))
    if not isinstance(model, Model):
        log.line(f"loading {settings.model}")
        model = load_model(model, device=device, dtype=getattr(torch, settings.dtype))
    job = _Job.of(Case.of(settings, model=model, folder=folder, tell=log.line), options, log)
    _check(folder, settings, options, model.id)
    finished: list[str] = []
    try:
        with folders.locked(folder):
            _check(folder, settings, options, model.id)  # again: another process may have been here before the lock
            if (folder / SUMMARY).exists():
                return load(folder)
            _claim(folder, settings, options, model.id)
            return job.run(finished, progress=progress)
    except KeyboardInterrupt:
        log.stopped(finished, what="stages")
        raise


def load(folder: str | PathLike[str]) -> Rewording:
    """What a finished call of `reword` left in a folder.

    Raises:
        MechsteerError: there is none, or a file is damaged.
    """
    folder = Path(folder).expanduser()
    settings, options, _ = _read(folder)
    summary = check_stamp(read_json(folder / SUMMARY), folder / SUMMARY, format="rewording-summary", version=VERSION)
    moved = folder / "transfer.safetensors"
    return Rewording(
        folder, settings, options, MatchedPrefix.load(folder / MATCH), Result.load(folder / "evaluation.safetensors"),
        Result.load(moved) if moved.exists() else None, summary,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """A search that fits together: everything is checked that can be before something is written.

    Attributes:
        case: model, requests and completions.
        options: of the search.
        keep: its constraints.
        size: tokens of the prefix.
        reference: ids of the prefix as it stands in the prompts.
        slotted: all requests with slots in its place.
        other: the model that prefixes are transferred to, and its requests with slots.
    """

    case: Case
    options: Options
    keep: Constraints
    size: int
    reference: tuple[int, ...]
    slotted: Prompts
    other: tuple[Model, Prompts] | None
    log: Log

    @staticmethod
    def of(case: Case, options: Options, log: Log) -> "_Job":
        right = case.prefixed.padded("right")
        reference = tuple(right.tokens[0][right.span("prefix")[0]].tolist())
        size = options.tokens or len(reference)
        least = beam_evaluations(size) + 1
        if options.evaluations < least:
            raise MechsteerError(
                f"evaluations: {options.evaluations} do not reach beyond the beam, which may take {least - 1} for "
                f"{size} tokens. Give {least} or more, or fewer tokens."
            )
        slotted = case.slotted(size)
        longest, n_ctx = int(slotted.lengths.max()), case.model.n_ctx
        if longest + case.max_new_tokens > n_ctx:
            raise MechsteerError(
                f"tokens: with {size} of them a request has {longest} tokens, and the context of {case.model.name}, "
                f"{n_ctx}, has no room for a completion of {case.max_new_tokens}. Give fewer tokens, or a smaller "
                "max_new_tokens."
            )
        forbid = telltale_words(case.settings.prefix) if options.forbid is None else options.forbid
        keep = Constraints(forbidden_words=forbid, characters=options.characters, fluency=options.fluency)
        keep.allowed(case.model)
        name = _SISTERS.get(case.settings.model, "none") if options.transfer is None else options.transfer
        other = None if name == "none" else _other(case, name, size, log)
        job = _Job(case, options, keep, size, reference, slotted, other, log)
        if options.target != "behaviour":
            job.target(case.rows("search"))
        return job

    def target(self, rows: list[int]) -> tuple[Prompts, Objective]:
        """Prompts of some of the requests, and what is to become small on them."""
        case = self.case
        kind, _, number = self.options.target.partition(":")
        if kind == "behaviour":
            return case.with_reference(self.slotted[rows], rows=rows), CE
        if kind == "state":
            if not int(number) < case.model.n_layers:
                raise MechsteerError(
                    f"target: {self.options.target!r} is no layer of {case.model.name}, which has layers 0 to "
                    f"{case.model.n_layers - 1}."
                )
            site = Site("resid_post", int(number))
            run = case.model.run(case.prefixed[rows], record=[site], logits="none")
            return self.slotted[rows], -StateMatch(run.activations, site, align="end")
        sae = load_sae("pocket", model=case.model, device=str(case.model.device))
        return self.slotted[rows], -FeatureActivation(sae, int(number), pre=True)

    def run(self, finished: list[str], *, progress: bool) -> Rewording:
        """All of it, from where the folder stands.

        Args:
            finished: takes the names of the stages that are over.
            progress: show what is being done.
        """
        began = time.perf_counter()
        case, folder = self.case, self.case.folder
        assert folder is not None
        completions = completion_ids(case.reference)
        finished.append("completions")
        every = case.rows("search")
        # An objective that holds values for its prompts cannot be asked of others.
        spared = [] if self.options.target.startswith("state") else every[_VALIDATED - 1 :: _VALIDATED]
        searched = {"search": [row for row in every if row not in spared], "held-out": case.rows("held-out")}
        targets = {half: self.target(rows) for half, rows in searched.items()}
        (prompts, objective), (held, held_objective) = targets.values()
        with Watch(self.log, self.options.evaluations, finished, show=progress) as watch:
            match = match_prefix(
                case.model, prompts, objective, evaluations=self.options.evaluations, soft_steps=self.options.steps,
                n_restarts=self.options.restarts, constraints=self.keep,
                validation=self.target(spared)[0] if spared else None, held_out=held,
                held_out_objective=held_objective, seed=case.settings.seed, progress=False, tell=watch.tell,
                out=folder / MATCH,
            )  # fmt: skip
        if not match.found.finished:
            raise KeyboardInterrupt
        finished.append("search")
        self.log.done(f"search: loss {match.loss:.4f}, {quoted(match.text)}")
        losses = {
            half: float(CandidateLosses(case.model, *targeted).of([self.reference])[0])
            for half, targeted in targets.items()
        }
        rows = searched["held-out"]
        told = [completions[row] for row in rows]
        self.log.line(f"measuring prefixes on {len(rows)} held-out requests")
        stages = {stage: match.stages.provenance["options"]["ids"][stage] for stage in ("projected", "beam")}
        words = {OURS: match.ids, **stages}
        soft = {SOFT: match.soft.embeddings.to(case.model.device, case.model.dtype)}
        evaluation = self._evaluated(case.model, case.plain[rows], self.slotted[rows], words | soft, told, progress)
        transfer = None
        if self.other is not None:
            model, slotted = self.other
            self.log.line(f"measuring them on {model.name}")
            plain = Case.of(case.settings, model=model).plain
            transfer = self._evaluated(model, plain[rows], slotted[rows], words, told, progress)
        # Of all requests: those of the table, those searched on, and those that said when the soft prefix stops.
        alive = RoundTrip(self.slotted).survives(match.ids)
        survives = {half: [alive[row] for row in case.rows(half)] for half in SPLITS}
        summary = report.summarised(case, match, transfer, losses, survives, self.options.target)
        summary["forbidden"] = list(self.keep.forbidden_words)
        summary["seconds"] = round(time.perf_counter() - began, 3)
        report.write(folder, match, evaluation, transfer, summary)
        folders.write_json(folder / SUMMARY, stamp("rewording-summary", VERSION) | summary)
        return load(folder)

    def _evaluated(
        self,
        model: Model,
        plain: Prompts,
        slotted: Prompts,
        prefixes: dict[str, Any],
        completions: list[list[int]],
        progress: bool,
    ) -> Result:
        """The prefixes on held-out requests, with the reference, random tokens, and no prefix."""
        options: Any = {
            "completions": completions, "judge": self.case.judge, "samples": self.options.samples,
            "max_new_tokens": self.case.max_new_tokens, "seed": self.case.settings.seed, "progress": progress,
        }  # fmt: skip
        table = evaluate_prefixes(model, slotted, prefixes, reference=self.reference, **options)
        # Apart: in its place between the template and the request no prefix would leave what separates them.
        none = evaluate_prefixes(model, plain, {NOTHING: []}, n_random=0, **options)
        return Result(xr.concat([table.data, none.data], "prefix", data_vars="minimal"), provenance=table.provenance)


def _other(case: Case, name: str, size: int, log: Log) -> tuple[Model, Prompts]:
    log.line(f"loading {name}, to try the prefixes on")
    model = load_model(name, device=case.settings.device, dtype=getattr(torch, case.settings.dtype))
    mine, theirs = (dict(each.tokenizer.get_vocab()) for each in (case.model, model))
    if mine != theirs:
        raise MechsteerError(
            f"transfer: {model.name} has another tokenizer than {case.model.name}, so the same ids are other words "
            "there. Give a model with the same one, or none."
        )
    return model, Case.of(case.settings, model=model).slotted(size)


# ---- the folder ----


def _check(folder: Path, settings: Settings, options: Options, model: ModelId | None = None) -> None:
    """Raise `MechsteerError` unless the folder is free, or that of this call (and, where given, of this model)."""
    if not folders.claimed(folder, FILE, holds="search for other words", give="a folder"):
        return
    theirs, searched, made_with = _read(folder)
    there, here = (one.identity | asdict(two) for one, two in ((theirs, searched), (settings, options)))
    difference = folders.differing(there, here, made_with, model)
    if difference:
        raise MechsteerError(
            f"{folder} holds another search ({difference}). Give another folder, or the options of that search."
        )


def _is(model: str | PathLike[str] | Model, folder: Path) -> bool:
    """Whether it is the model that a folder's results are of, as far as one can tell without loading it."""
    settings, _, there = _read(folder)
    return model.id.hash == there.hash if isinstance(model, Model) else fspath(model) == settings.model


def _claim(folder: Path, settings: Settings, options: Options, model: ModelId) -> None:
    about = {"settings": settings.model_dump(mode="json"), "options": asdict(options), "model": dict(model._asdict())}
    folders.write_json(folder / FILE, stamp(FORMAT, VERSION) | about)


def _read(folder: Path) -> tuple[Settings, Options, ModelId]:
    path = folder / FILE
    if not path.is_file():
        raise MechsteerError(f"{folder} holds no search for other words. Give a folder that `mechsteer prefix` made.")
    about = check_stamp(read_json(path), path, format=FORMAT, version=VERSION)
    try:
        options = dict(about["options"])
        forbid = options.pop("forbid")
        searched = Options(**options, forbid=None if forbid is None else tuple(forbid))
        return Settings.of(**about["settings"]), searched, ModelId(**about["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise MechsteerError(f"{path} is damaged ({error}). Choose another folder.") from error


@cache
def _is_script(name: str) -> bool:
    """Whether Unicode has letters of this script."""
    letters = (chr(code) for code in range(0x110000))
    return any(unicodedata.name(char, "").startswith(f"{name} ") for char in letters if char.isalpha())
