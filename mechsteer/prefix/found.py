"""What a search for a prefix gives, and what it keeps in a folder on the way."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechsteer import markup
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.prefix.moves import Ids
from mechsteer.result import Result

FILE = "search.json"
_VERSION = 1
# Seconds of finished work that a kill may cost.
_SAVE_SECONDS = 2.0


@dataclass(frozen=True, eq=False, repr=False)
class FoundPrefix:
    """The best prefix of a search, on ids that survive as text.

    Attributes:
        ids: of its tokens.
        text: what they read as where they stand.
        loss: the pooled objective, fluency included; exact.
        trajectory: a Result with `loss` [evaluated], the exact loss of each candidate in the order of the search, and
            `best` [evaluated], the lowest so far of one that may be returned; NaN while there is none. The first
            candidate is what the search started from.
        evaluated: how many candidates that was.
        round_trip: for each prompt, whether its text with the prefix encodes to the same ids again: True throughout.
        method: by which it was found.
        finished: False where the search was interrupted.
    """

    ids: Ids
    text: str
    loss: float
    trajectory: Result
    evaluated: int
    round_trip: tuple[bool, ...]
    method: str
    finished: bool = True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the trajectory, and the rest in its provenance."""
        self.trajectory.save(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "FoundPrefix":
        """Read what `save` wrote.

        Raises:
            MechsteerError: there is no such file, it is damaged, or it holds no found prefix.
        """
        trajectory = Result.load(path)
        found = trajectory.provenance.get("options", {}).get("found")
        if not isinstance(found, dict):
            raise MechsteerError(f"{os.fspath(path)} holds no found prefix. Pass a file that FoundPrefix.save wrote.")
        return found_prefix(trajectory, found)

    def __repr__(self) -> str:
        start = float(self.trajectory["loss"].values[0])
        return (
            f"FoundPrefix({self.text!r} by {self.method}: loss {start:.3g} -> {self.loss:.3g}, "
            f"{self.evaluated} candidates{'' if self.finished else ', interrupted'})"
        )

    def _repr_html_(self) -> str:
        start = float(self.trajectory["loss"].values[0])
        rows = {
            "text": markup.code(repr(self.text)),
            "ids": markup.code(markup.brief(list(self.ids))),
            "loss": f"{start:.4g} at the start, {self.loss:.4g} now",
            "candidates": f"{self.evaluated}{'' if self.finished else ', interrupted'}",
            "survives as text in": f"{sum(self.round_trip)} of {len(self.round_trip)} prompts",
        }
        return markup.card("FoundPrefix", markup.facts(rows), about=f"by {self.method}")


def found_prefix(trajectory: Result, found: dict[str, Any]) -> FoundPrefix:
    """Of a trajectory, and what `found` in its provenance says."""
    return FoundPrefix(
        tuple(found["ids"]), found["text"], found["loss"], trajectory, trajectory.data.sizes["evaluated"],
        tuple(found["round_trip"]), found["method"], found["finished"],
    )  # fmt: skip


class SearchFolder:
    """Where a search stands, in a folder.

    Attributes:
        path: of the file in it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str) -> None:
        """
        Args:
            folder: made when something is saved.
            identity: a text that differs where searches do.
        """
        self.path, self._identity = Path(folder) / FILE, identity
        self._saved = time.perf_counter()

    def load(self, restore: Callable[[dict[str, Any]], None]) -> None:
        """Hand what was saved to `restore`, if anything was.

        Raises:
            MechsteerError: it is of another search, or damaged.
        """
        if not self.path.exists():
            return
        try:
            found = check_stamp(json.loads(self.path.read_text()), self.path, format="search", version=_VERSION)
            if found["identity"] != self._identity:
                raise MechsteerError(
                    f"{self.path.parent} holds another search: model, prompts, objective or options differ. Choose "
                    "another folder for out=, or delete this one."
                )
            restore(found)
        except MechsteerError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise MechsteerError(f"{self.path} is damaged ({error}). Choose another folder.") from error

    def save(self, content: Callable[[], dict[str, Any]], *, due: bool = False) -> None:
        """Write, whole or not at all; with `due` only if the last time is two seconds ago."""
        if due and time.perf_counter() - self._saved < _SAVE_SECONDS:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{FILE}.tmp")
        fresh.write_text(json.dumps({**stamp("search", _VERSION), "identity": self._identity, **content()}))
        os.replace(fresh, self.path)
        self._saved = time.perf_counter()
