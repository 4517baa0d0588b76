"""What a study is about: its settings, checked, and the requests that it asks."""

import json
import random
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mechsteer.errors import MechsteerError

Split: TypeAlias = Literal["search", "held-out"]
SPLITS: tuple[Split, Split] = ("search", "held-out")


class _Frozen(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")


class Request(_Frozen):
    """Something to ask the model.

    Attributes:
        text: as a user would type it.
        split: "search" for requests that anything may be fitted or chosen on, "held-out" for those that only measure.
    """

    text: str
    split: Split

    @field_validator("text")
    @classmethod
    def _some_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("it is empty. Give something to ask, or leave it out")
        return text


class Settings(_Frozen):
    """All that decides what a study measures. The same settings, model weights and code give the same numbers.

    Attributes:
        model: "pocket", "pocket-1l", a hub name, or a folder.
        prefix: the instruction under study; stands in front of every request.
        requests: at least one of each split, no text twice.
        contrast: a prefix of as many tokens to compare with; None: a neutral filler is found.
        words: words that show the behaviour, where the labeller knows no topic for the prefix.
        chapters: names of the chapters that were asked for.
        device: "cpu", "cuda", ...; None takes CUDA where there is one.
        dtype: of the weights: "float32", "float64", "bfloat16" or "float16".
        seed: of all randomness.
        max_new_tokens: length of the completions.
    """

    model: str = "pocket"
    prefix: str
    requests: tuple[Request, ...]
    contrast: str | None = None
    words: tuple[str, ...] = ()
    chapters: tuple[str, ...] = ()
    device: str | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_new_tokens: int = Field(default=40, ge=1)

    @field_validator("prefix", "contrast")
    @classmethod
    def _not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError('it is empty. Give an instruction, for example "Talk only about cats."')
        return text

    @field_validator("words")
    @classmethod
    def _some_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if not all(word.strip() for word in words):
            raise ValueError('one of them is empty. Give words, for example "cat,cats"')
        return words

    @model_validator(mode="after")
    def _both_splits(self) -> "Settings":
        texts = [request.text for request in self.requests]
        twice = next((text for place, text in enumerate(texts) if text in texts[:place]), None)
        if twice is not None:
            raise ValueError(f"requests: {twice!r} stands there twice. Leave one out")
        counts = {split: len(self.split(split)) for split in SPLITS}
        if not all(counts.values()):
            raise ValueError(
                f"requests: {counts['search']} to search on and {counts['held-out']} held out. "
                "A study needs at least one of each, so at least two requests"
            )
        return self

    def split(self, split: Split) -> tuple[Request, ...]:
        """The requests of one half."""
        return tuple(request for request in self.requests if request.split == split)

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must share to be one study. How it is run (chapters, device) and what the model is called are
        no part of it; which model it is, the hash of its weights says."""
        return self.model_dump(mode="json", exclude={"chapters", "device", "model"})

    @staticmethod
    def of(**values: Any) -> "Settings":
        """Checked settings.

        Raises:
            MechsteerError: with one line that names the first value that is wrong.
        """
        try:
            return Settings(**values)
        except ValidationError as error:
            raise MechsteerError(_first(error)) from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write them as JSON."""
        Path(path).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | PathLike[str]) -> "Settings":
        """Read what `save` wrote.

        Raises:
            MechsteerError: there is no such file, or it holds no settings.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise MechsteerError(f"{fspath(path)} holds no settings of a study. Pass a file that Settings.save wrote.")
        return Settings.of(**values)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, as one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    shown = f" (got {first['input']!r})" if where and not first["msg"].startswith("Value error") else ""
    return f"{where}: {reason}{shown}." if where else f"{reason}."


def as_requests(requests: str | PathLike[str] | Iterable[Any], *, seed: int = 0) -> tuple[Request, ...]:
    """Requests from a file, or from texts and `Request`s; those without a split are dealt into two halves.

    Args:
        requests: a `.jsonl` file with one text or one {"text": ..., "split": "search" or "held-out"} a line; a file of
            any other name with one request a line; or texts, such objects, or Requests. Empty lines are skipped.
        seed: decides which half a request without a split goes to; both halves are of one size, or differ by one.

    Raises:
        MechsteerError: the file cannot be read, or a line holds no request; the message names file and line.
    """
    if isinstance(requests, str | PathLike):
        rows = _read(Path(requests))
    else:
        rows = [(f"request {place}", row) for place, row in enumerate(requests)]
    if not rows:
        where = f"{fspath(requests)} holds" if isinstance(requests, str | PathLike) else "There are"
        raise MechsteerError(f"{where} no requests. Give at least two, one a line.")
    parsed = [_parse(where, row) for where, row in rows]
    first: dict[str, str] = {}
    for (where, _), (text, _split) in zip(rows, parsed, strict=True):
        if text in first:
            raise MechsteerError(f"{where}: {text!r} stands in {first[text]} already. Leave one out.")
        first[text] = where
    undealt = [place for place, (_, split) in enumerate(parsed) if split is None]
    # In a shuffled order, because files are often sorted by kind or alternate between two.
    random.Random(seed).shuffle(undealt)
    # A half that is short by what the file says gets the first of them.
    counts = {split: sum(each == split for _, each in parsed) for split in SPLITS}
    dealt: dict[int, Split] = {}
    for place in undealt:
        dealt[place] = min(SPLITS, key=lambda split: counts[split])
        counts[dealt[place]] += 1
    return tuple(
        Request(text=text, split=split if split is not None else dealt[place])
        for place, (text, split) in enumerate(parsed)
    )


def read_json(path: str | PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        MechsteerError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MechsteerError(f"{fspath(path)} cannot be read ({reason}).") from error


def _read(path: Path) -> list[tuple[str, Any]]:
    """The lines of a file of requests, each with where it stands."""
    try:
        # "utf-8-sig" takes a byte order mark away; splitlines() would also cut at characters inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise MechsteerError(
            f"{path} cannot be read ({reason}). Give a .txt file with one request a line, or a .jsonl file."
        ) from error
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        text, where = line.strip(), f"{path} line {number}"
        if not text:
            continue
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            rows.append((where, text))
            continue
        try:
            rows.append((where, json.loads(text)))
        except ValueError as error:
            raise MechsteerError(
                f'{where} is no JSON ({error}). Each line is a text in quotes, or {{"text": ..., "split": "search"}}.'
            ) from error
    return rows


def _parse(where: str, row: Any) -> tuple[str, Split | None]:
    if isinstance(row, Request):
        return row.text, row.split
    if isinstance(row, Mapping):
        text, split = row.get("text"), row.get("split")
    else:
        text, split = row, None
    if not isinstance(text, str):
        raise MechsteerError(
            f'{where} holds no text: {row!r}. Give a text, or {{"text": ..., "split": "search" or "held-out"}}.'
        )
    if not text.strip():
        raise MechsteerError(f"{where} is empty. Give something to ask, or leave it out.")
    if split is not None and split not in SPLITS:
        raise MechsteerError(f'{where} has the split {split!r}. It is "search" or "held-out", or left out.')
    return text, split
