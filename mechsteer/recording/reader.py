"""What `record_stream` leaves on disk, and how it is read."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mechsteer import markup
from mechsteer.activations import ModelId, SiteMap
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, open_tensors, stamp
from mechsteer.model import Model
from mechsteer.recording.statistics import RunningStatistics
from mechsteer.site import Site, SiteLike

VERSION = 1
# Where a row comes from, in the order of the columns of an index [row, 3].
COLUMNS = ("example", "position", "token")
_MANIFEST = "manifest.json"


class TokenRows(NamedTuple):
    """Activations at some tokens, and which tokens these are.

    Attributes:
        values: [row, *feature].
        example: which prompt of the whole stream, [row].
        position: absolute position in it, [row].
        token: id, [row].
    """

    values: Tensor
    example: Tensor
    position: Tensor
    token: Tensor

    def __repr__(self) -> str:
        return markup.told("TokenRows", self._asdict())


class TopK(NamedTuple):
    """The tokens where each feature is largest, in descending order; of equal values the first in the stream.

    Attributes:
        values: [k, *feature].
        example: which prompt of the whole stream, [k, *feature].
        position: absolute position in it, [k, *feature].
        token: id, [k, *feature].
    """

    values: Tensor
    example: Tensor
    position: Tensor
    token: Tensor

    def __repr__(self) -> str:
        return markup.told("TopK", self._asdict())


class Options(NamedTuple):
    """What decides the content of a recording, besides model and prompts; see `record_stream`."""

    sites: list[str]
    where: str | None
    dtype: str | None
    shard_tokens: int
    keep: bool
    top_k: int
    covariance: bool


class Recording:
    """What `record_stream` left in a folder.

        recording = Recording.load("runs/chats")
        recording.mean["resid_post", 3]                              # [d_model]
        for rows in recording.batches(("resid_post", 3)):            # rows.values [row, d_model]

    Attributes:
        folder: where it is.
        model: the model that was recorded.
        complete: False after a kill, when only the finished shards are there; call `record_stream` again to continue.
        options: what `record_stream` was called with.
    """

    def __init__(self, folder: Path, manifest: "Manifest") -> None:
        self.folder: Path = folder
        self.model: ModelId = manifest.model
        self.complete: bool = manifest.complete
        self.options: Options = manifest.options
        self._manifest = manifest

    @staticmethod
    def load(folder: str | os.PathLike[str], *, model: Model | None = None) -> "Recording":
        """Open a recording.

        Args:
            folder: where `record_stream` wrote it.
            model: must be the model that was recorded; None leaves that unchecked.

        Raises:
            MechsteerError: there is no recording, it is damaged or of another format, or of another model.
        """
        manifest = Manifest.read(Path(folder))
        if manifest is None:
            raise MechsteerError(
                f"{os.fspath(folder)} holds no {_MANIFEST}. Pass a folder where record_stream finished a shard."
            )
        if model is not None:
            model.check_same(manifest.model, os.fspath(folder))
        return Recording(Path(folder), manifest)

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was recorded."""
        return tuple(Site.of(name) for name in self.options.sites)

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        return self._manifest.tokens

    @property
    def n_examples(self) -> int:
        """Number of prompts that were run, also those of which no token was marked."""
        return self._manifest.examples

    @cached_property
    def mean(self) -> SiteMap[Tensor]:
        """Mean row of each site, fp64 [*feature]."""
        return SiteMap({site: each.mean for site, each in self._statistics.items()})

    @cached_property
    def covariance(self) -> SiteMap[Tensor]:
        """Covariance of each site's features, flattened to one axis where they have two, fp64 [d, d].

        Divided by n - 1, as numpy.cov and torch.cov do.

        Raises:
            MechsteerError: it was not recorded, or there is one row only.
        """
        if not self.options.covariance or self.n_tokens < 2:
            got = "one token" if self.options.covariance else "covariance=False"
            raise MechsteerError(
                f"{self.folder} was recorded with {got} and has no covariance. "
                "Record more than one token with covariance=True."
            )
        return SiteMap(
            {s: e.scatter / (self.n_tokens - 1) for s, e in self._statistics.items() if e.scatter is not None}
        )

    @cached_property
    def top_k(self) -> SiteMap[TopK]:
        """For each site the tokens where each feature is largest.

        Raises:
            MechsteerError: it was not recorded.
        """
        if not self.options.top_k:
            raise MechsteerError(f"{self.folder} was recorded with top_k=0. Record with top_k of at least 1.")
        k = min(self.options.top_k, self.n_tokens)
        found = {site: each.top for site, each in self._statistics.items()}
        return SiteMap(
            {site: TopK(top[0][:k], *top[1][:k].unbind(-1)) for site, top in found.items() if top is not None}
        )

    def batches(self, site: SiteLike, *, size: int = 4096) -> Iterator[TokenRows]:
        """The rows of a site in the order of the stream, shard by shard, read from disk as they are used.

        Args:
            site: one that was recorded.
            size: rows in a batch; the last of each shard may have fewer.

        Raises:
            MissingSiteError: the site was not recorded.
            MechsteerError: it was recorded with keep=False, `size` is no size, or a shard is missing or damaged.
        """
        name = SiteMap({site: str(site) for site in self.sites})[site]
        if not self.options.keep:
            raise MechsteerError(
                f"{self.folder} was recorded with keep=False and holds no rows. Record with keep=True."
            )
        if size < 1:
            raise MechsteerError(f"batches(size={size}) needs at least one row in a batch.")
        return self._batches(name, size)

    def _batches(self, name: str, size: int) -> Iterator[TokenRows]:
        for number, shard in enumerate(self._manifest.shards):
            if not shard.tokens:
                continue
            path = shard_path(self.folder, number)
            with open_tensors(path, format="shard", version=VERSION) as (file, _):
                columns = [file.get_tensor(column) for column in (name, *COLUMNS)]
            if {len(column) for column in columns} != {shard.tokens}:
                raise MechsteerError(f"{path} should hold {shard.tokens} rows, but does not. Record again.")
            for start in range(0, shard.tokens, size):
                yield TokenRows(*(column[start : start + size] for column in columns))

    @cached_property
    def _statistics(self) -> dict[Site, RunningStatistics]:
        return load_statistics(self.folder, self._manifest)

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        names = ", ".join(map(str, self.sites))
        return (
            f"Recording({self.n_tokens} tokens of {self.n_examples} prompts{state}, at {names} of {self.model.name!r})"
        )

    def _repr_html_(self) -> str:
        shards = self._manifest.shards
        state = "complete" if self.complete else "unfinished: call record_stream again to go on"
        rows = {
            "model": f"{self.model.name} ({self.model.hash[:8]})",
            "rows": f"{self.n_tokens:,} tokens of {self.n_examples:,} prompts, {state}",
            "sites": markup.lines(map(markup.code, self.sites)),
            "kept": f"{len(shards)} shards" if self.options.keep else "statistics only",
            "folder": markup.code(self.folder),
        }
        return markup.card("Recording", markup.facts(rows))


def load_statistics(folder: Path, manifest: "Manifest") -> dict[Site, RunningStatistics]:
    """The statistics of all rows in the finished shards."""
    if not manifest.shards:
        return {}
    path = statistics_path(folder, len(manifest.shards) - 1)
    with open_tensors(path, format="statistics", version=VERSION) as (file, _):
        found: dict[str, dict[str, Tensor]] = {name: {} for name in manifest.options.sites}
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            site, name = key.split("/")
            found[site][name] = file.get_tensor(key)
        return {Site.of(site): RunningStatistics.read(manifest.tokens, tensors) for site, tensors in found.items()}


class Shard(NamedTuple):
    """What one shard holds; `prompts` is a hash of what was run for it."""

    batches: int = 0
    examples: int = 0
    tokens: int = 0
    prompts: str = ""


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def statistics_path(folder: Path, number: int) -> Path:
    return folder / f"statistics-{number:05d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What is on disk: the finished shards, and what they were recorded from."""

    folder: Path
    model: ModelId
    options: Options
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)

    @staticmethod
    def read(folder: Path) -> "Manifest | None":
        """The manifest in a folder; None where there is none."""
        path = folder / _MANIFEST
        if not path.exists():
            return None
        try:
            content = check_stamp(json.loads(path.read_text()), path, format="recording", version=VERSION)
            shards = tuple(Shard(**shard) for shard in content["shards"])
            return Manifest(
                folder, ModelId(**content["model"]), Options(**content["options"]), shards, content["complete"]
            )
        except MechsteerError:
            raise
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise MechsteerError(f"{path} is damaged ({error}). Remove {folder} and record again.") from error

    @staticmethod
    def resume(folder: Path, model: Model, options: Options) -> "Manifest":
        """The manifest in a folder, or a new one; refuses one of another model or of other options."""
        if folder.exists() and not folder.is_dir():
            raise MechsteerError(f"{folder} is a file. Pass a folder to record into.")
        found = Manifest.read(folder)
        if found is None:
            return Manifest(folder, model.id, options)
        model.check_same(found.model, f"The recording in {folder}")
        for name, value in options._asdict().items():
            held = getattr(found.options, name)
            if held != value:
                raise MechsteerError(
                    f"{folder} holds a recording with {name}={held!r}, and this call has {value!r}. "
                    "Pass the same options to continue it, or another folder."
                )
        return found

    def write(self) -> None:
        content = {"model": self.model._asdict(), "options": self.options._asdict(), "complete": self.complete}
        content["shards"] = [shard._asdict() for shard in self.shards]
        fresh = self.folder / f"{_MANIFEST}.tmp"
        fresh.write_text(json.dumps(stamp("recording", VERSION) | content, indent=1))
        os.replace(fresh, self.folder / _MANIFEST)
