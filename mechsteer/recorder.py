"""Recording a set of activations that is too large to hold: shards on disk and running statistics, in bounded memory."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mechsteer.activations import ModelId, SiteMap, check_where
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, open_tensors, save_tensors, stamp
from mechsteer.model import Model
from mechsteer.prompts import Prompts
from mechsteer.site import Site, SiteLike

BATCH_TOKENS = 2000
"""Largest batch that is run at once, padding included; beyond it a CPU spends the gain on allocating."""
_VERSION = 1
_MANIFEST = "manifest.json"
# Where a row comes from, in the order of the columns of an index [row, 3].
_COLUMNS = ("example", "position", "token")

Where = str | Callable[[Prompts], Tensor] | None


class Rows(NamedTuple):
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


def record_stream(
    model: Model,
    prompts: Prompts | Iterable[Prompts],
    sites: Iterable[SiteLike] | SiteLike,
    out: str | os.PathLike[str],
    *,
    where: Where = None,
    dtype: torch.dtype | None = None,
    shard_tokens: int = 65536,
    keep: bool = True,
    top_k: int = 0,
    covariance: bool = False,
    progress: bool = True,
) -> "Recording":
    """Record activations at many tokens, holding no more than one shard of them in memory.

    After each shard, the shard and the statistics so far are on disk. After a kill, the same call continues after the
    last finished shard and ends in the same bits as without the kill; the prompts that were finished are gone through
    again and compared, not run again.

    Args:
        model: what to run.
        prompts: one large `Prompts`, or any iterable of them, which may be longer than memory. They are run in order, in
            right-padded batches of about 2000 tokens.
        sites: what to record, as in `Model.run`, except attention patterns, whose width depends on the prompt.
        out: the folder that receives the recording.
        where: which tokens: None for all real ones, the name of a span such as "user", or a function from `Prompts` (a
            batch, right-padded) to a mask Bool[batch, pos].
        dtype: of the stored rows; None stores them as the model computes them. Statistics are of the rows before.
        shard_tokens: largest number of rows in a shard.
        keep: store the rows; False keeps nothing but the statistics.
        top_k: number of tokens to remember for each feature; BOS and chat scaffolding count unless `where` leaves them
            out.
        covariance: also the covariance of the features, which takes d x d numbers for each site.
        progress: show a bar on stderr when it takes longer than two seconds.

    Raises:
        MechsteerError: an option has no meaning, a value is not finite, `out` holds another recording, or one of other
            prompts, or no token was marked.
    """
    points = sorted(model.sites(sites), key=lambda site: site.order)
    options = _checked_options(
        points, where=where, dtype=dtype, shard_tokens=shard_tokens, keep=keep, top_k=top_k, covariance=covariance
    )
    folder = Path(out)
    progress_on_disk = _Manifest.resume(folder, model, options)
    parts = [prompts] if isinstance(prompts, Prompts) else prompts
    total = sum(int(part.mask.sum()) for part in parts) if isinstance(parts, Sequence) else None

    stream = _stream(model, parts, where)
    with _bar(total, shown=progress) as advance:
        for number in range(len(progress_on_disk.shards)):
            _skip(stream, progress_on_disk, number, advance)
        if progress_on_disk.complete:
            if next(stream, None) is not None:
                raise MechsteerError(
                    f"{folder} holds a finished recording of {progress_on_disk.examples} prompts, and more were passed. "
                    "Pass the same prompts, or another folder."
                )
            return Recording(folder, progress_on_disk)
        return _record(model, points, stream, progress_on_disk, dtype=dtype, advance=advance)


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

    def __init__(self, folder: Path, manifest: "_Manifest") -> None:
        self.folder = folder
        self.model = manifest.model
        self.complete = manifest.complete
        self.options = dict(manifest.options)
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
        manifest = _Manifest.read(Path(folder))
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
        return tuple(Site.of(name) for name in self.options["sites"])

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
        if not self.options["covariance"] or self.n_tokens < 2:
            got = "one token" if self.options["covariance"] else "covariance=False"
            raise MechsteerError(
                f"{self.folder} was recorded with {got} and has no covariance. Record with covariance=True and more than one."
            )
        return SiteMap({s: e.scatter / (self.n_tokens - 1) for s, e in self._statistics.items() if e.scatter is not None})

    @cached_property
    def top_k(self) -> SiteMap[TopK]:
        """For each site the tokens where each feature is largest.

        Raises:
            MechsteerError: it was not recorded.
        """
        if not self.options["top_k"]:
            raise MechsteerError(f"{self.folder} was recorded with top_k=0. Record with top_k of at least 1.")
        k = min(self.options["top_k"], self.n_tokens)
        found = {site: each.top for site, each in self._statistics.items()}
        return SiteMap({site: TopK(top[0][:k], *top[1][:k].unbind(-1)) for site, top in found.items() if top is not None})

    def batches(self, site: SiteLike, *, size: int = 4096) -> Iterator[Rows]:
        """The rows of a site in the order of the stream, shard by shard, read from disk as they are used.

        Args:
            site: one that was recorded.
            size: rows in a batch; the last of each shard may have fewer.

        Raises:
            MissingSiteError: the site was not recorded.
            MechsteerError: it was recorded with keep=False, `size` is no size, or a shard is missing or damaged.
        """
        name = SiteMap({site: str(site) for site in self.sites})[site]
        if not self.options["keep"]:
            raise MechsteerError(f"{self.folder} was recorded with keep=False and holds no rows. Record with keep=True.")
        if size < 1:
            raise MechsteerError(f"batches(size={size}) needs at least one row in a batch.")
        return self._batches(name, size)

    def _batches(self, name: str, size: int) -> Iterator[Rows]:
        for number, shard in enumerate(self._manifest.shards):
            path = _shard_path(self.folder, number)
            with open_tensors(path, format="shard", version=_VERSION) as (file, _):
                columns = [file.get_tensor(column) for column in (name, *_COLUMNS)]
            if {len(column) for column in columns} != {shard.tokens}:
                raise MechsteerError(f"{path} should hold {shard.tokens} rows, but does not. Record again.")
            for start in range(0, shard.tokens, size):
                yield Rows(*(column[start : start + size] for column in columns))

    @cached_property
    def _statistics(self) -> SiteMap["_Statistics"]:
        return _load_statistics(self.folder, self._manifest)

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        names = ", ".join(map(str, self.sites))
        return f"Recording({self.n_tokens} tokens of {self.n_examples} prompts{state}, at {names} of {self.model.name!r})"


class _Batch(NamedTuple):
    """Some prompts of the stream, and the tokens of them that are recorded."""

    prompts: Prompts
    where: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "row 3"]
    """Example, absolute position and token id."""

    @property
    def digest(self) -> bytes:
        """Fingerprint of the prompts and of the choice of tokens."""
        return hashlib.sha256(self.prompts.hash.encode() + self.index.cpu().numpy().tobytes()).digest()


def _stream(model: Model, parts: Iterable[Prompts], where: Where) -> Iterator[_Batch]:
    """The prompts in batches that are small enough to run, always cut alike."""
    first = 0
    for part in parts:
        if not isinstance(part, Prompts):
            raise MechsteerError(
                f"record_stream got prompts of type {type(part).__name__}. Pass Prompts, or an iterable of Prompts."
            )
        for batch in _cut(part):
            given = model.prompts(batch)
            marked = _marked(given, where)
            row, column = torch.where(marked)
            index = torch.stack([row + first, given.positions[row, column], given.tokens[row, column]], 1)
            yield _Batch(given, marked, index)
            first += len(batch)


def _cut(prompts: Prompts) -> Iterator[Prompts]:
    start, widest = 0, 0
    for end, length in enumerate(prompts.lengths.tolist()):
        if end > start and max(widest, length) * (end + 1 - start) > BATCH_TOKENS:
            yield prompts[start:end].padded("right")
            start, widest = end, 0
        widest = max(widest, length)
    if start < len(prompts):
        yield prompts[start:].padded("right")


def _marked(prompts: Prompts, where: Where) -> Bool[Tensor, "batch pos"]:
    if where is None:
        return prompts.mask
    if isinstance(where, str):
        return prompts.span(where)
    marked = where(prompts)
    if not isinstance(marked, Tensor):
        raise MechsteerError(f"where(prompts) gave a {type(marked).__name__}. Return a mask Bool[batch, pos].")
    check_where(marked, prompts)
    return marked.to(prompts.mask.device)


def _skip(stream: Iterator[_Batch], manifest: "_Manifest", number: int, advance: Callable[[int], None]) -> None:
    """Go past the prompts of a finished shard, and refuse others."""
    shard, digest, taken = manifest.shards[number], hashlib.sha256(), 0
    for batch in islice(stream, shard.batches):
        digest.update(batch.digest)
        advance(int(batch.prompts.mask.sum()))
        taken += 1
    if taken < shard.batches or digest.hexdigest() != shard.prompts:
        raise MechsteerError(
            f"{manifest.folder} was recorded with other prompts, or other tokens of them: shard {number} differs. "
            "Pass the same prompts, or another folder."
        )


def _record(
    model: Model,
    sites: Sequence[Site],
    stream: Iterator[_Batch],
    manifest: "_Manifest",
    *,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> "Recording":
    options = manifest.options
    statistics = dict(_load_statistics(manifest.folder, manifest)) if manifest.shards else {}
    buffer = _Buffer(options["shard_tokens"]) if options["keep"] else None
    shard, digest = _Shard(), hashlib.sha256()

    def finish(*, complete: bool) -> _Manifest:
        # The manifest goes last: what it does not name does not count.
        number = len(manifest.shards)
        if buffer is not None:
            save_tensors(_shard_path(manifest.folder, number), buffer.take(), stamp("shard", _VERSION))
        _save_statistics(manifest.folder, number, statistics)
        done = replace(
            manifest, shards=(*manifest.shards, replace(shard, prompts=digest.hexdigest())), complete=complete
        )
        done.write()
        _statistics_path(manifest.folder, number - 1).unlink(missing_ok=True)
        return done

    for batch in stream:
        rows = len(batch.index)
        if shard.tokens and shard.tokens + rows > options["shard_tokens"]:
            manifest = finish(complete=False)
            shard, digest = _Shard(), hashlib.sha256()
        if rows:
            taken = model.run(batch.prompts, record=sites, logits="none").activations.at(batch.where)
            stored = {site: values.to(dtype or values.dtype) for site, values in taken.items()}
            for site, values in stored.items():
                _check_finite(site, values, batch)
            for site, values in taken.items():
                if site not in statistics:
                    statistics[site] = _Statistics.start(values, top_k=options["top_k"], covariance=options["covariance"])
                statistics[site] = statistics[site].updated(values, batch.index)
            if buffer is not None:
                columns = dict(zip(_COLUMNS, batch.index.unbind(1), strict=True))
                buffer.add({str(site): values for site, values in stored.items()} | columns)
        digest.update(batch.digest)
        shard = _Shard(shard.batches + 1, shard.examples + len(batch.prompts), shard.tokens + rows)
        advance(int(batch.prompts.mask.sum()))
    if not manifest.tokens + shard.tokens:
        raise MechsteerError(
            f"record_stream recorded nothing: none of the tokens of {manifest.examples + shard.examples} prompts was "
            "marked. Pass prompts that have such tokens, or another `where`."
        )
    return Recording(manifest.folder, finish(complete=True))


class _Buffer:
    """The rows of the shard that is being filled. Its memory is allocated once, and used again for the next shard."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._columns: dict[str, Tensor] = {}
        self._filled = 0

    def add(self, columns: Mapping[str, Shaped[Tensor, "row ..."]]) -> None:
        start, end = self._filled, self._filled + len(next(iter(columns.values())))
        for name, values in columns.items():
            # A single batch may have more rows than a shard is meant to hold.
            if name not in self._columns or len(self._columns[name]) < end:
                self._columns[name] = torch.empty((max(self._rows, end), *values.shape[1:]), dtype=values.dtype)
            self._columns[name][start:end].copy_(values)
        self._filled = end

    def take(self) -> dict[str, Tensor]:
        filled, self._filled = self._filled, 0
        return {name: values[:filled] for name, values in self._columns.items()}


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Statistics of the rows of one site seen so far.

    Attributes:
        n: number of rows.
        mean: over the rows.
        scatter: sum over rows of the outer product of the deviation from the mean with itself.
        top: the largest values of each feature, and example, position and token of each.
    """

    n: int
    mean: Float[Tensor, "*feature"]
    scatter: Float[Tensor, "d d"] | None
    top: tuple[Float[Tensor, "k *feature"], Int[Tensor, "k *feature 3"]] | None

    @staticmethod
    def start(rows: Float[Tensor, "row *feature"], *, top_k: int, covariance: bool) -> "_Statistics":
        """No rows yet, of features as in `rows`."""
        rows = _on_fp64_device(rows)
        shape, d = rows.shape[1:], rows[0].numel()
        values = rows.new_full((top_k, *shape), -torch.inf)
        return _Statistics(
            n=0,
            mean=rows.new_zeros(shape, dtype=torch.float64),
            scatter=rows.new_zeros((d, d), dtype=torch.float64) if covariance else None,
            top=(values, rows.new_full((top_k, *shape, 3), -1, dtype=torch.int64)) if top_k else None,
        )

    def updated(self, rows: Float[Tensor, "row *feature"], index: Int[Tensor, "row 3"]) -> "_Statistics":
        """With more rows: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1."""
        rows = _on_fp64_device(rows)
        old, new, total = self.n, len(rows), self.n + len(rows)
        mean, exact = self.mean.to(rows.device), rows.double()
        batch_mean = exact.mean(0)
        delta, scatter = batch_mean - mean, self.scatter
        if scatter is not None:
            centred, shift = (exact - batch_mean).flatten(1), delta.flatten()
            scatter = scatter.to(rows.device) + centred.T @ centred + torch.outer(shift, shift) * (old * new / total)
        top = None if self.top is None else _larger(*self.top, rows, index.to(rows.device))
        return _Statistics(total, mean + delta * (new / total), scatter, top)


def _on_fp64_device(rows: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return rows if rows.is_cuda else rows.cpu()  # Apple's GPUs have no fp64.


def _larger(
    values: Float[Tensor, "k *feature"],
    source: Int[Tensor, "k *feature 3"],
    rows: Float[Tensor, "row *feature"],
    index: Int[Tensor, "row 3"],
) -> tuple[Float[Tensor, "k *feature"], Int[Tensor, "k *feature 3"]]:
    """The k largest of the values so far and of more rows, for each feature; the earlier one where they are equal."""
    values, source, k = values.to(rows.device), source.to(rows.device), len(values)
    # After a while few rows hold anything large enough, and sorting these alone is what makes this cheap.
    better = (rows > values[-1]).flatten(1).any(1)
    rows, index = rows[better], index[better]
    if not len(rows):
        return values, source
    merged = torch.cat([values, rows])
    # torch.topk does not say which of equal values it takes.
    order = merged.sort(dim=0, descending=True, stable=True).indices[:k]
    before = source.gather(0, order.clamp(max=k - 1)[..., None].expand_as(source))
    fresh = index[(order - k).clamp(min=0)]
    return merged.gather(0, order), torch.where((order < k)[..., None], before, fresh)


def _save_statistics(folder: Path, number: int, statistics: Mapping[Site, _Statistics]) -> None:
    tensors: dict[str, Tensor] = {}
    for site, each in statistics.items():
        tensors[f"{site}/mean"] = each.mean
        if each.scatter is not None:
            tensors[f"{site}/scatter"] = each.scatter
        if each.top is not None:
            tensors[f"{site}/top.values"], tensors[f"{site}/top.source"] = each.top
    save_tensors(_statistics_path(folder, number), tensors, stamp("statistics", _VERSION))


def _load_statistics(folder: Path, manifest: "_Manifest") -> SiteMap[_Statistics]:
    path = _statistics_path(folder, len(manifest.shards) - 1)
    with open_tensors(path, format="statistics", version=_VERSION) as (file, _):
        found = {}
        # There are none yet where the finished shards had no marked token.
        for name in manifest.options["sites"] if manifest.tokens else ():
            top = (file.get_tensor(f"{name}/top.values"), file.get_tensor(f"{name}/top.source"))
            found[Site.of(name)] = _Statistics(
                n=manifest.tokens,
                mean=file.get_tensor(f"{name}/mean"),
                scatter=file.get_tensor(f"{name}/scatter") if manifest.options["covariance"] else None,
                top=top if manifest.options["top_k"] else None,
            )
        return SiteMap(found)


class _Shard(NamedTuple):
    """What one shard holds; `prompts` is a hash of what was run for it."""

    batches: int = 0
    examples: int = 0
    tokens: int = 0
    prompts: str = ""


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _statistics_path(folder: Path, number: int) -> Path:
    return folder / f"statistics-{number:05d}.safetensors"
