"""The whole way from a target to words: a soft prefix, its projection, a beam, and a search under constraints."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.found import FoundPrefix
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prefix.projection import decode_beam, project
from mechsteer.prefix.search import search_prefix
from mechsteer.prefix.soft import FoundSoft, optimise_soft_prefix
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.vocabulary import insert, token_texts

# Looks, ten steps apart, without a better loss on the validation prompts after which a soft prefix is done.
_PATIENCE = 3
STAGES = ("soft", "projected", "beam", "final")
FORMAT, VERSION = "match", 1
_FILE, _SOFT, _FOUND, _STAGES = "match.json", "soft.safetensors", "found.safetensors", "stages.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class MatchedPrefix:
    """What a match found, stage by stage.

    Attributes:
        soft: the soft prefix that it began with.
        found: the last search; its `ids` are the answer.
        stages: a Result with `loss` [stage] on the prompts that were searched on, `held_out_loss` [stage] where there
            were others, and `evaluated` [stage], the prefixes of tokens, whole or in part, whose exact loss the stage
            computed; `text` [stage]. "soft" is the soft prefix, "projected" its nearest tokens one by one, "beam" the
            beam's, "final" the answer.
    """

    soft: FoundSoft
    found: FoundPrefix
    stages: Result

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the answer."""
        return self.found.ids

    @property
    def text(self) -> str:
        """Of the answer."""
        return self.found.text

    @property
    def loss(self) -> float:
        """Of the answer, without fluency."""
        return float(self.stages["loss"].sel(stage="final"))

    @property
    def gap_closed(self) -> float:
        """(projected - final) / (projected - soft): 1 where tokens do what the soft prefix does; NaN without a gap."""
        soft, projected, final = (float(self.stages["loss"].sel(stage=each)) for each in ("soft", "projected", "final"))
        return (projected - final) / (projected - soft) if projected > soft else float("nan")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write three safetensors files into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.soft.save(path / _SOFT)
        self.found.save(path / _FOUND)
        self.stages.save(path / _STAGES)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "MatchedPrefix":
        """Read what `save`, or `match_prefix` with `out=`, wrote.

        Raises:
            MechsteerError: a file is missing or damaged.
        """
        path = Path(folder)
        return MatchedPrefix(FoundSoft.load(path / _SOFT), FoundPrefix.load(path / _FOUND), Result.load(path / _STAGES))

    def __repr__(self) -> str:
        losses = " -> ".join(f"{stage} {float(self.stages['loss'].sel(stage=stage)):.3g}" for stage in STAGES)
        return f"MatchedPrefix({self.text!r}: {losses})"

    def _repr_html_(self) -> str:
        data = self.stages.data
        columns = [name for name in ("loss", "held_out_loss", "evaluated") if name in data]
        texts = [str(text) for text in data["text"].values] if "text" in data.variables else [""] * len(data["stage"])
        rows = [
            (str(stage), *(data[name].values[at].item() for name in columns), markup.code(repr(texts[at])))
            for at, stage in enumerate(data["stage"].values)
        ]
        table = markup.table(("stage", *(name.replace("_", " ") for name in columns), "text"), rows)
        return markup.card("MatchedPrefix", table, about=f"{self.text!r}, {self.gap_closed:.0%} of the gap closed")


def match_prefix(
    model: Model,
    prompts: PromptsLike,
    objective: Objective,
    *,
    n_tokens: int | None = None,
    evaluations: int = 1000,
    soft_steps: int = 100,
    n_restarts: int = 3,
    init: str = "random tokens",
    beam: int = 4,
    top_k: int = 8,
    constraints: Constraints | None = None,
    validation: Prompts | None = None,
    held_out: Prompts | None = None,
    held_out_objective: Objective | None = None,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str, int, float, str], None] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> MatchedPrefix:
    """Words that do what a target says: the pipeline of "Steering Prefix Generation", section 4.3, with a beam in it.

        prompts = ms.Prompts.from_chats(requests, model, slots=6, completions=reference_completions)
        match = match_prefix(model, prompts, ms.TeacherForcedCE(), constraints=Constraints(forbidden_words=("cat",)))

    A soft prefix is optimised, `decode_beam` makes tokens of it slot by slot, and `search_prefix` goes on from these.
    Each stage keeps to the constraints: the soft prefix has no tokens to break them with, the projection and the beam
    choose among those that keep to them, and the search evaluates no others.

    Args:
        model: what to run.
        prompts: with completions where the objective reads them. The prefix takes the place of slots, or stands in
            front of the user's text.
        objective: one differentiable number for each prompt, lower is better: `TeacherForcedCE()` of a reference's
            completions, `-StateMatch(...)`, `-FeatureActivation(...)`, `-LogitGap(...)`, or a sum of them.
        n_tokens: of the prefix; None for as many as there are slots, and no other number: with slots of another number
            the prompts are laid out again.
        evaluations: prefixes of tokens, those of the beam included, whose exact loss is computed.
        soft_steps: steps of the soft prefix.
        n_restarts: soft prefixes side by side, of which the best goes on.
        init: of the soft prefix; "random tokens" or "mean". See `EmbeddingSpace.starts`.
        beam, top_k: of `decode_beam`.
        constraints: on the tokens; None for none but to survive as text.
        validation: other prompts, which say when the soft prefix stops, and which one is best. Without them it learns
            the completions by heart: few requests have fewer tokens than it has numbers.
        held_out: yet other prompts, on which each stage is measured and nothing is chosen.
        held_out_objective: for these; None for `objective`.
        seed: of all draws.
        progress: show bars on standard error for what takes longer than two seconds.
        tell: called with the stage, the prefixes of tokens evaluated so far, the stage's best loss and its text: after
            each stage, also one that an earlier call finished, and while the search goes on. While the soft prefix is
            optimised, and when the beam begins, the loss is NaN, and the text one line on where that stands.
        out: a folder. A match that was stopped goes on from the last finished stage, the search from where it was.

    Returns:
        All stages. Ctrl-C during the search ends it with the best so far; before that there is no answer, and it is
        raised.

    Raises:
        MechsteerError: an option is out of range, the evaluations do not reach beyond the beam, the objective has no
            gradient, nothing that is allowed is found, or `out` holds another match.
        KeyboardInterrupt: before the search.
    """
    began = time.perf_counter()
    given = model.prompts(prompts)
    size = n_tokens or given.n_slots
    if not size or size < 1:
        raise MechsteerError("How long the prefix is to be is not said. Pass n_tokens=, or prompts with slots.")
    most = beam_evaluations(size, beam=beam, top_k=top_k)
    if evaluations <= most:
        raise MechsteerError(
            f"evaluations={evaluations} are used up by a beam of {beam} x {top_k} over {size} slots, which may take "
            f"{most}. Pass more, or a smaller beam."
        )
    keep = constraints or Constraints()
    slotted = insert(given, where="prefix", slots=size)
    options = {
        "n_tokens": size, "soft_steps": soft_steps, "n_restarts": n_restarts, "init": init, "beam": beam,
        "top_k": top_k, "constraints": repr(keep), "seed": seed,
        "validation": None if validation is None else validation.hash,
    }  # fmt: skip
    text = json.dumps([model.id.hash, slotted.hash, repr(objective), options])
    store = None if out is None else _Folder(Path(out), sha256(text.encode()).hexdigest())
    say = tell or (lambda stage, done, loss, text: None)

    trained, stopped_by = slotted, None
    if validation is not None:
        trained = Prompts.concat([slotted, insert(model.prompts(validation), where="prefix", slots=size)])
        stopped_by = range(len(slotted), len(trained))
    soft = store.soft(model) if store else None
    if soft is not None:
        _check_same(
            soft, PrefixLoss(model, trained, objective, n_prefixes=len(soft.restarts), rows=stopped_by), out
        )  # fmt: skip
    else:
        allowed = keep.allowed(model)
        soft = optimise_soft_prefix(
            model, trained, objective, n_restarts=n_restarts, steps=soft_steps, init=init, allowed=allowed,
            held_out=stopped_by or (), patience=_PATIENCE, seed=seed, progress=progress,
            tell=lambda line: say("soft", 0, float("nan"), line),
        )  # fmt: skip
        if soft.interrupted:
            raise KeyboardInterrupt
        if store:
            store.keep_soft(soft)
    losses = CandidateLosses(model, slotted, objective)
    rows = store.rows() if store else {}
    if "beam" not in rows:
        nearest = project(model, soft, allowed=keep.allowed(model))
        say("beam", 0, float("nan"), "making tokens of the soft prefix")
        hard = decode_beam(
            model, soft, slotted, objective, beam=beam, top_k=top_k, constraints=keep, progress=progress
        )  # fmt: skip
        at = float(losses.of([nearest])[0])
        rows["soft"] = {"ids": None, "loss": hard.soft_loss, "evaluated": 0}
        rows["projected"] = {"ids": list(nearest), "loss": at, "evaluated": 1}
        # Among what the beam evaluated are the soft prefix alone, which is none of tokens, and the projection.
        rows["beam"] = {"ids": list(hard.ids), "loss": hard.loss, "evaluated": hard.evaluations - 2}
        if store:
            store.keep_rows(rows)
    spent = rows["projected"]["evaluated"] + rows["beam"]["evaluated"]
    for stage, done in (("soft", 0), ("projected", 1), ("beam", spent)):
        say(stage, done, rows[stage]["loss"], "".join(token_texts(model, rows[stage]["ids"] or ())))
    found = search_prefix(
        model, slotted, objective, start=rows["beam"]["ids"], evaluations=evaluations - spent, constraints=keep,
        seed=seed, progress=progress, tell=lambda done, loss, text: say("final", spent + done, loss, text),
        out=None if store is None else store.path / "search",
    )  # fmt: skip
    rows["final"] = {
        "ids": list(found.ids), "loss": float(losses.of([found.ids])[0]), "evaluated": found.evaluated,
    }  # fmt: skip
    say("final", spent + found.evaluated, rows["final"]["loss"], found.text)
    other = None
    if held_out is not None:
        other = _held_out(model, held_out, held_out_objective or objective, soft, rows, size)
    made = provenance(
        model=model.id, seconds=time.perf_counter() - began, objective=repr(objective),
        evaluations=evaluations, finished=found.finished, ids={stage: rows[stage]["ids"] for stage in STAGES},
        **options,
    )  # fmt: skip
    match = MatchedPrefix(soft, found, Result(_dataset(model, found, rows, other), provenance=made))
    if out is not None:
        match.save(out)
    return match


def beam_evaluations(n_tokens: int, *, beam: int = 4, top_k: int = 8) -> int:
    """How many prefixes of tokens `match_prefix` evaluates at most before its search: the beam's and the projection."""
    return 2 + top_k + (n_tokens - 1) * beam * top_k


def _check_same(soft: FoundSoft, losses: PrefixLoss, out: str | os.PathLike[str] | None) -> None:
    """Raise `MechsteerError` unless the soft prefix has the losses that it had: what an objective compares with, such
    as the states of `StateMatch`, is no part of its name."""
    eps = torch.finfo(soft.restarts.dtype).eps
    now = losses(soft.restarts.to(losses.prompts.tokens.device)).to(soft.losses)
    if not torch.allclose(now, soft.losses, rtol=8 * eps, atol=max(1e-4, 8 * eps)):
        raise MechsteerError(
            f"{out} holds a match of another objective: its soft prefix has the loss {float(now.min()):.4g} here, and "
            f"had {soft.loss:.4g}. Choose another folder for out=, or delete this one."
        )


def _held_out(
    model: Model, prompts: Prompts, objective: Objective, soft: FoundSoft, rows: dict[str, Any], size: int
) -> list[float]:
    """The loss of each stage on other prompts."""
    slotted = insert(prompts, where="prefix", slots=size)
    hard = CandidateLosses(model, slotted, objective)
    first = float(PrefixLoss(model, slotted, objective, n_prefixes=1)(soft.embeddings[None].to(model.device))[0])
    return [first, *(float(hard.of([tuple(rows[stage]["ids"])])[0]) for stage in STAGES[1:])]


def _dataset(model: Model, found: FoundPrefix, rows: dict[str, Any], other: Sequence[float] | None) -> xr.Dataset:
    texts = ["", *("".join(token_texts(model, rows[stage]["ids"])) for stage in STAGES[1:3]), found.text]
    data = {
        "loss": ("stage", np.array([rows[stage]["loss"] for stage in STAGES])),
        "evaluated": ("stage", np.array([rows[stage]["evaluated"] for stage in STAGES])),
    }
    if other is not None:
        data["held_out_loss"] = ("stage", np.array(other))
    return xr.Dataset(data, coords={"stage": list(STAGES), "text": ("stage", texts)})


class _Folder:
    """The stages that are finished, in a folder."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._identity = path, identity
        self._found: dict[str, Any] = {}
        file = path / _FILE
        if file.exists():
            try:
                found = check_stamp(json.loads(file.read_text()), file, format=FORMAT, version=VERSION)
                self._found = {stage: dict(row) for stage, row in found["stages"].items()}
                same = found["identity"] == identity
            except MechsteerError:
                raise
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise MechsteerError(f"{file} is damaged ({error}). Choose another folder.") from error
            if not same:
                raise MechsteerError(
                    f"{path} holds another match: model, prompts, objective or options differ. Choose another folder "
                    "for out=, or delete this one."
                )

    def soft(self, model: Model) -> FoundSoft | None:
        file = self.path / _SOFT
        return FoundSoft.load(file, model) if (self.path / _FILE).exists() and file.exists() else None

    def keep_soft(self, soft: FoundSoft) -> None:
        soft.save(self.path / _SOFT)
        self.keep_rows({})

    def rows(self) -> dict[str, Any]:
        return {stage: dict(row) for stage, row in self._found.items()}

    def keep_rows(self, rows: dict[str, Any]) -> None:
        self._found = {stage: dict(row) for stage, row in rows.items()}
        file = self.path / _FILE
        fresh = file.with_name(f"{_FILE}.tmp")
        content = {**stamp(FORMAT, VERSION), "identity": self._identity, "stages": self._found}
        fresh.write_text(json.dumps(content))
        os.replace(fresh, file)
