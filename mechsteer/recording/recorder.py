"""Recording a set of activations too large to hold: shards on disk and running statistics, in bounded memory."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechsteer.activations import check_where
from mechsteer.errors import MechsteerError
from mechsteer.files import save_tensors, stamp
from mechsteer.memory import Memory, of_activations
from mechsteer.model import Model
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.recording.reader import (
    COLUMNS,
    VERSION,
    Manifest,
    Options,
    Recording,
    Shard,
    load_statistics,
    shard_path,
    statistics_path,
)
from mechsteer.recording.statistics import RunningStatistics
from mechsteer.site import Site, SiteLike

BATCH_TOKENS = 2000
"""Largest batch that is run at once, padding included; beyond it a CPU spends the gain on allocating."""

Where = str | Callable[[Prompts], Tensor] | None


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
) -> Recording:
    """Record activations at many tokens, holding no more than one shard of them in memory.

    After each shard, the shard and the statistics so far are on disk. After a kill, the same call continues after the
    last finished shard and ends in the same bits as without the kill. The prompts that were finished are gone through
    again and compared, not run again.

    Args:
        model: what to run.
        prompts: one large `Prompts`, or any iterable of them, which may be longer than memory. They are run in
            order, in right-padded batches of about 2000 tokens.
        sites: whole hook points, as in `Model.run`; not attention patterns, whose width depends on the prompt.
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
    options = Options(
        sites=[str(site) for site in points],
        where=where if where is None or isinstance(where, str) else "a function",
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        shard_tokens=shard_tokens,
        keep=keep,
        top_k=top_k,
        covariance=covariance,
    )
    _check(options, points, dtype)
    manifest = Manifest.resume(Path(out), model, options)
    parts = [prompts] if isinstance(prompts, Prompts) else prompts
    known = [part for part in parts if isinstance(part, Prompts)] if isinstance(parts, list) else None
    total = None if known is None else sum(int(part.mask.sum()) for part in known)
    if keep and not manifest.complete:
        rows = shard_tokens if total is None else min(shard_tokens, total)
        shard = Memory({"shard": of_activations(model, points, rows, width=1)})
        shard.announce("Recording", show=progress)
        shard.check("This recording", [torch.device("cpu")], "Pass a smaller shard_tokens=, or fewer sites.")
    stream = _stream(model, parts, where)
    with bar("tokens", total, show=progress) as shown:
        advance = shown.advance
        for number in range(len(manifest.shards)):
            _skip(stream, manifest, number, advance)
        if manifest.complete and next(stream, None) is not None:
            raise MechsteerError(
                f"{manifest.folder} holds a finished recording of {manifest.examples} prompts, and more were passed. "
                "Pass the same prompts, or another folder."
            )
        if not manifest.complete:
            manifest = _record(model, points, stream, manifest, dtype=dtype, advance=advance)
    return Recording(manifest.folder, manifest)


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


def _skip(stream: Iterator[_Batch], manifest: Manifest, number: int, advance: Callable[[int], None]) -> None:
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
    manifest: Manifest,
    *,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> Manifest:
    options = manifest.options
    statistics = load_statistics(manifest.folder, manifest)
    buffer = _Buffer(options.shard_tokens) if options.keep else None
    shard, digest = Shard(), hashlib.sha256()
    for batch in stream:
        if shard.tokens and shard.tokens + len(batch.index) > options.shard_tokens:
            manifest = _finish(manifest, shard._replace(prompts=digest.hexdigest()), statistics, buffer)
            shard, digest = Shard(), hashlib.sha256()
        if len(batch.index):
            taken = model.states_at(batch.prompts, sites, batch.where)
            stored = {site: values.to(dtype or values.dtype) for site, values in taken.items()}
            for site, values in taken.items():
                _check_finite(site, values, stored[site], batch)
                if site not in statistics:
                    statistics[site] = RunningStatistics.start(
                        values, top_k=options.top_k, covariance=options.covariance
                    )
                statistics[site] = statistics[site].updated(values, batch.index)
            if buffer is not None:
                columns = dict(zip(COLUMNS, batch.index.unbind(1), strict=True))
                buffer.add({str(site): values for site, values in stored.items()} | columns)
        digest.update(batch.digest)
        shard = Shard(shard.batches + 1, shard.examples + len(batch.prompts), shard.tokens + len(batch.index))
        advance(int(batch.prompts.mask.sum()))
    if not manifest.tokens + shard.tokens:
        raise MechsteerError(
            f"record_stream recorded nothing: none of the tokens of {manifest.examples + shard.examples} prompts was "
            "marked. Pass prompts that have such tokens, or another `where`."
        )
    if shard.batches:
        manifest = _finish(manifest, shard._replace(prompts=digest.hexdigest()), statistics, buffer)
    manifest = replace(manifest, complete=True)
    manifest.write()
    return manifest


def _finish(
    manifest: Manifest, shard: Shard, statistics: Mapping[Site, RunningStatistics], buffer: "_Buffer | None"
) -> Manifest:
    """Write a shard and the statistics up to it. The manifest goes last: what it does not name does not count."""
    number = len(manifest.shards)
    if buffer is not None and shard.tokens:
        save_tensors(shard_path(manifest.folder, number), buffer.take(), stamp("shard", VERSION))
    tensors = {f"{site}/{name}": value for site, each in statistics.items() for name, value in each.tensors().items()}
    save_tensors(statistics_path(manifest.folder, number), tensors, stamp("statistics", VERSION))
    done = replace(manifest, shards=(*manifest.shards, shard))
    done.write()
    for path in set(manifest.folder.glob("statistics-*")) - {statistics_path(manifest.folder, number)}:
        path.unlink()
    return done


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


def _check(options: Options, sites: Sequence[Site], dtype: torch.dtype | None) -> None:
    if not sites or any("src" in site.axes for site in sites):
        got = ", ".join(options.sites) or "no sites"
        raise MechsteerError(
            f"record_stream got {got}. Pass sites whose width is the same for all prompts: "
            "all but pattern and attn_scores."
        )
    if options.shard_tokens < 1 or options.top_k < 0:
        raise MechsteerError(
            f"record_stream got shard_tokens={options.shard_tokens} and top_k={options.top_k}. "
            "Pass shard_tokens of at least 1 and top_k of at least 0."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise MechsteerError(
            f"dtype={dtype} cannot hold activations. Pass a floating-point one, such as torch.float16."
        )


def _check_finite(
    site: Site, values: Float[Tensor, "row ..."], stored: Float[Tensor, "row ..."], batch: _Batch
) -> None:
    bad = ~torch.isfinite(stored).flatten(1).all(1)
    if not bool(bad.any()):
        return
    row = int(bad.int().argmax())
    example, position, _ = batch.index[row].tolist()
    where = f"{site} at position {position} of prompt {example}"
    if bool(torch.isfinite(values[row]).all()):
        raise MechsteerError(
            f"{where} reaches {float(values[row].abs().max()):.4g}, too large for dtype={stored.dtype}. "
            "Pass a wider one, or leave dtype out."
        )
    raise MechsteerError(f"{where} is NaN or infinite. Leave out that prompt, or run the model in a wider dtype.")
