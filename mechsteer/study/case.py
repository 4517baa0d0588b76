"""What all chapters of a study share: the model, the requests with and without the prefix, and the completions."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.judges import Judge, judge_of, telltale_words
from mechsteer.model import Model, load_model
from mechsteer.prompts import Prompts
from mechsteer.study.settings import Request, Settings, read_json
from mechsteer.vocabulary import insert

FILE = "completions.json"
FORMAT, VERSION = "completions", 1


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One steering question: a model, a prefix, and requests.

        case = Case.of(Settings(prefix="Talk only about cats.", requests=shipped()))
        case.reference.completions            # what the model says with the prefix
        case.with_reference(case.plain)       # the same completions after the requests alone, to be scored

    All prompts have one row for each request, in the same order, and the requests' texts as labels.

    Attributes:
        settings: of the study.
        model: under study.
        plain: the requests alone; in the model's chat format where it has one, else plain text.
        prefixed: the prefix in front of each.
        tell: takes one line on what is being done now.
        folder: where completions are kept; None keeps them in memory only.
    """

    settings: Settings
    model: Model
    plain: Prompts
    prefixed: Prompts
    tell: Callable[[str], None] = field(default=_silent, kw_only=True)
    folder: Path | None = field(default=None, kw_only=True)

    @staticmethod
    def of(
        settings: Settings,
        *,
        model: Model | None = None,
        folder: str | os.PathLike[str] | None = None,
        tell: Callable[[str], None] = _silent,
    ) -> "Case":
        """The case of these settings. Nothing is written before completions are asked for.

        Args:
            settings: of the study.
            model: None loads the one that the settings name.
            folder: keeps completions, so that they are generated once. It is made when needed.
            tell: takes one line before each piece of work.

        Raises:
            MechsteerError: the model cannot be loaded, a text holds a special token, or the prefix and a request leave
                no room for a completion in the model's context, or the contrast has another number of tokens than the
                prefix.
        """
        if model is None:
            tell(f"loading {settings.model}")
            model = load_model(settings.model, device=settings.device, dtype=getattr(torch, settings.dtype))
        case = Case(
            settings,
            model,
            _prompts(settings, model, None),
            _prompts(settings, model, settings.prefix),
            tell=tell,
            folder=None if folder is None else Path(folder),
        )
        if settings.contrast is not None:
            counts = [case.with_prefix(settings.contrast), case.prefixed]
            other, own = (int(prompts.span("prefix").sum(1).max()) for prompts in counts)
            if other != own:
                raise MechsteerError(
                    f"The contrast {settings.contrast!r} has {other} tokens and the prefix {own}: patching compares "
                    "them token by token. Give one of as many, or none."
                )
        return case

    @property
    def requests(self) -> tuple[Request, ...]:
        """What is asked."""
        return self.settings.requests

    @property
    def max_new_tokens(self) -> int:
        """Length of the completions: what the settings ask for, or what the context has room for."""
        return min(self.settings.max_new_tokens, self.model.n_ctx - int(self.prefixed.lengths.max()))

    def rows(self, split: str) -> list[int]:
        """Which requests belong to a half.

        Args:
            split: "search", "held-out", or "all" for both.

        Raises:
            MechsteerError: it is none of these.
        """
        if split not in ("search", "held-out", "all"):
            raise MechsteerError(f"rows({split!r}) is no half: it is 'search', 'held-out' or 'all'.")
        return [row for row, request in enumerate(self.requests) if split in ("all", request.split)]

    @cached_property
    def judge(self) -> Judge | None:
        """Says whether a completion shows the behaviour; None where nothing is known about the prefix."""
        return judge_of(self.settings.prefix, self.settings.words)

    @property
    def telltale(self) -> tuple[str, ...]:
        """Words that would say what the prefix asks for, which other words for it may not hold."""
        return tuple(dict.fromkeys([*telltale_words(self.settings.prefix), *self.settings.words]))

    def slotted(self, n: int) -> Prompts:
        """The requests with n reserved slots where the prefix stands."""
        return insert(replace(self.prefixed, slots=self.prefixed.span("prefix")), slots=n)

    def with_prefix(self, prefix: str) -> Prompts:
        """The requests with another prefix in front of each, laid out as `prefixed` is.

        Raises:
            MechsteerError: the prefix holds a special token.
        """
        return _prompts(self.settings, self.model, prefix)

    # --- completions

    @property
    def reference(self) -> Prompts:
        """`prefixed` with its greedy completions, which steering is to bring about without the prefix."""
        return self._completed[0]

    @property
    def unsteered(self) -> Prompts:
        """`plain` with its greedy completions."""
        return self._completed[1]

    def with_reference(
        self, prompts: Prompts, *, rows: Sequence[int] | None = None, tokens: int | None = None
    ) -> Prompts:
        """Prompts completed with the reference completions.

        Args:
            prompts: one for each request, or for each of `rows`.
            rows: which requests the prompts are of; None for all.
            tokens: only so many of a completion's first tokens; None for all.

        Raises:
            MechsteerError: there are as many prompts as neither, or `tokens` is below 1.
        """
        rows = self.rows("all") if rows is None else list(rows)
        if len(prompts) != len(rows):
            raise MechsteerError(f"with_reference got {len(prompts)} prompts for {len(rows)} requests. Pass as many.")
        if tokens is not None and tokens < 1:
            raise MechsteerError(f"with_reference got tokens={tokens}. Pass 1 or more, or None for all.")
        ids = completion_ids(self.reference)
        return prompts.with_completions([ids[row][:tokens] for row in rows])

    @cached_property
    def _completed(self) -> tuple[Prompts, Prompts]:
        path = None if self.folder is None else self.folder / FILE
        kept = None if path is None or not path.exists() else _Completions.read(path)
        if kept is None:
            kept = self._generate()
            if path is not None:
                kept.write(path)
        elif kept.identity != self._identity:
            differing = [key for key, value in self._identity.items() if kept.identity.get(key) != value]
            raise MechsteerError(
                f"{path} holds completions of another study ({', '.join(differing) or 'more'} differ). Choose another "
                "folder, or remove the file."
            )
        return self.prefixed.with_completions(kept.reference), self.plain.with_completions(kept.unsteered)

    @property
    def _identity(self) -> dict[str, str | int]:
        return {
            "weights": self.model.id.hash,
            "requests": self.plain.hash,
            "requests with the prefix": self.prefixed.hash,
            "max_new_tokens": self.max_new_tokens,
        }

    def _generate(self) -> "_Completions":
        made = []
        for what, prompts in (("with the prefix", self.prefixed), ("without it", self.plain)):
            self.tell(f"completing {len(prompts)} requests {what}")
            made.append(self.model.generate(prompts, max_new_tokens=self.max_new_tokens))
        reference, unsteered = made
        return _Completions(
            identity=self._identity,
            reference=completion_ids(reference),
            unsteered=completion_ids(unsteered),
            texts={"reference": reference.completions, "unsteered": unsteered.completions},
        )

    def __repr__(self) -> str:
        return f"Case({self.settings.prefix!r}, {self.model.name}, {len(self.requests)} requests)"


class _Completions(BaseModel):
    """The file: ids, which count, and their texts, which are for people."""

    model_config = ConfigDict(frozen=True, strict=True)

    identity: dict[str, str | int]
    reference: list[list[int]]
    unsteered: list[list[int]]
    texts: dict[str, list[str]]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.tmp")
        text = _Written(**stamp(FORMAT, VERSION), completions=self).model_dump_json(indent=1)
        fresh.write_text(text + "\n", encoding="utf-8")
        os.replace(fresh, path)

    @staticmethod
    def read(path: Path) -> "_Completions":
        found = check_stamp(read_json(path), path, format=FORMAT, version=VERSION)
        try:
            return _Completions.model_validate(found.get("completions"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise MechsteerError(
                f"{path} is damaged ({where}: {first['msg']}). Remove it, and the completions are made again."
            ) from error


class _Written(BaseModel):
    format: str
    version: int
    mechsteer: str
    completions: _Completions


def completion_ids(prompts: Prompts) -> list[list[int]]:
    """The ids of each completion, for `Prompts.with_completions`."""
    spans = zip(prompts.tokens, prompts.span("completion"), strict=True)
    return [row[keep].tolist() for row, keep in spans]


def _prompts(settings: Settings, model: Model, prefix: str | None) -> Prompts:
    texts = [request.text for request in settings.requests]
    if getattr(model.tokenizer, "chat_template", None):
        made = Prompts.from_chats(texts, model, prefix=prefix or "", labels=texts)
    else:
        joined = texts if prefix is None else [_after(prefix, text) for text in texts]
        made = Prompts.from_strings(joined, model, prefix=prefix, labels=texts)
    row, longest = int(made.lengths.argmax()), int(made.lengths.max())
    if longest >= model.n_ctx:
        text, added = shorten(texts[row], 60, placeholder="..."), "" if prefix is None else " with the prefix"
        raise MechsteerError(
            f"Request {text!r} has {longest} tokens{added}, and the context of {model.name} is {model.n_ctx}: no room "
            f"for a completion. Shorten {'one of them' if added else 'it'}."
        )
    return model.prompts(made)


def _after(prefix: str, text: str) -> str:
    """The text with a space before it, where neither side has any."""
    return text if prefix[-1:].isspace() or text[:1].isspace() else f" {text}"
