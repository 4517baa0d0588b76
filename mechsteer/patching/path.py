"""Path patching: what one part of the model tells another directly, through the residual stream alone."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Edit, Intervention
from mechsteer.interventions import Replace
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.patching.activation import objective_of
from mechsteer.patching.grid import check_mode, map_of
from mechsteer.precision import precise
from mechsteer.progress import Bar, bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.rows import At, Rows, check_at, normalise_at, tokens_of
from mechsteer.site import KINDS, Site, SiteLike
from mechsteer.sweeps import sweep

Sites = SiteLike | Sequence[SiteLike]

# The residual stream is at stage 2 * layer where attention reads it (`resid_pre`), at 2 * layer + 1 where the MLP does
# (`resid_mid`), and at 2 * n_layers where the unembedding does. Stages that kinds write after and read at, less
# 2 * layer:
_WRITES = {"embed": -1, "z": 0, "attn_out": 0, "mlp_out": 1}
_READS: dict[str, int] = dict.fromkeys(("resid_pre", "q", "k", "v", "z", "attn_out"), 0)
_READS |= dict.fromkeys(("resid_mid", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out"), 1) | {"resid_post": 2}
# Tokens of a forward pass, and numbers held at a time (512 MB in fp32).
_TOKENS = {"cpu": 2048, "cuda": 65536}
_HELD = 1 << 27


class Place(NamedTuple):
    """A sender or a receiver: a hook point, or one head of it, at some tokens."""

    site: Site
    at: At

    @property
    def writes(self) -> int:
        """The stage after which the residual stream holds what the sender writes."""
        return _WRITES[self.site.kind] + 2 * (self.site.layer or 0)

    @property
    def reads(self) -> int:
        """The stage of the residual stream that the receiver is computed from."""
        return _READS[self.site.kind] + 2 * (self.site.layer or 0)

    @property
    def label(self) -> str:
        """Such as "z 3.1", "mlp_out 2" or "embed @ user"."""
        head = "" if self.site.head is None else f".{self.site.head}"
        layer = "" if self.site.layer is None else f" {self.site.layer}{head}"
        return f"{self.site.kind}{layer}" + ("" if self.at is None else f" @ {self.where}")

    @property
    def where(self) -> str:
        """The tokens as text."""
        each = self.at if isinstance(self.at, tuple) else ("all" if self.at is None else self.at,)
        return ",".join(map(str, each))


Senders = frozenset[Place]


def path_patching(
    model: Model,
    clean: PromptsLike,
    corrupt: PromptsLike,
    *,
    senders: Sites | Mapping[str, Sites],
    receivers: Sites,
    measure: Objective,
    mode: str = "denoising",
    together: bool = False,
    at: Any = None,
    out: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    progress: bool = True,
) -> Result:
    """How much of the objective each sender carries to the receivers directly, through the residual stream alone.

        gap = ms.LogitGap(" Mary", " John", tokenizer=model)
        path_patching(model, clean, corrupt, senders="z", receivers="logits", measure=gap).plot()     # layer x head
        path_patching(model, clean, corrupt, senders="z", receivers=[Site("q", 5, head=2)], measure=gap)
        path_patching(model, clean, corrupt, senders=["embed", ("mlp_out", 0)], receivers="logits", measure=gap)

    effect = M(base run with receivers as the senders make them) - M(base run). A sender's output is taken from the
    source run, and all other attention and MLP outputs stay those of the base run, so that its change reaches the
    receivers' inputs by no other way than the residual stream. The receivers take what they compute from these inputs,
    and everything after them is computed anew. Source: Wang et al. 2022, "Interpretability in the wild", appendix B,
    who leave MLPs between sender and receiver unfrozen; with the MLPs frozen, as here, these are the paths of one edge
    of Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching".

    With receivers at several layers none sees what another makes of its input: all inputs are computed with everything
    frozen, and all receivers are replaced at once.

    Args:
        model: what to run.
        clean, corrupt: as many prompts, which align token by token. They may have completions.
        senders: a kind: "z" for every head (the map is layer x head), "attn_out" or "mlp_out" for every layer; or one
            or several sites or kinds, with one cell for each: "embed", `("mlp_out", 2)`, `Site("z", 3, head=1)`; or
            a dictionary that names sets of them, with one cell for each set.
        receivers: "logits" for the final residual stream; or one or several sites, which all receive at once. Any site
            that is computed from the stream that enters its attention layer or MLP: `q`, `k` and `v`, whole or of one
            head (under grouped-query attention `k` and `v` have key-value heads); `z` for a head's q, k and v together;
            `attn_out` for the input of an attention layer, `mlp_out` for that of an MLP (of which `mlp_pre`,
            `mlp_pre_linear` and `mlp_post` are parts); `resid_pre`, `resid_mid` and `resid_post` for the stream itself.
            A kind without a layer stands for all layers. A receiver with a position receives there only.
        measure: one number per prompt.
        mode: "denoising" sends the clean run's values in the corrupt run, "noising" the corrupt run's in the clean run.
        together: all senders as one set instead of a cell for each.
        at: tokens at which senders send that have no position of their own; None for all. See `Intervention`.
        out: a folder for finished work, as for `sweep`.
        rows: tokens in a batch; None for a fast number.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result with `effect` [layer, head, prompt], [layer, prompt], or [sender, prompt] with the senders' `site`,
        `layer`, `head` (-1 for none) and `at` along `sender`; [prompt] where `together`. The effect of a sender at or
        after all receivers is 0. `low` and `high` are the 95 % bootstrap interval of its mean over prompts. `base` and
        `source` [prompt] are the objective of the two runs. Units are the objective's.

    Raises:
        MechsteerError: prompts do not align, a sender or receiver does not exist or does not write to or read from the
            residual stream, or none of the senders comes before any receiver.
    """
    began = time.perf_counter()
    check_mode(mode)
    pair = model.prompts(clean).paired(model.prompts(corrupt))
    base, source = (pair.corrupt, pair.clean) if mode == "denoising" else (pair.clean, pair.corrupt)
    cells, coords = _cells(model, senders, at, together)
    wanted = _receivers(model, receivers)
    for each in dict.fromkeys(place for cell in cells for place in cell):
        check_at(each.at, base, what=f"The sender {each.site}")
    for each in wanted:
        check_at(each.at, base, what=f"The receiver {each.site}")
    reaching = [index for index, cell in enumerate(cells) if _reached(cell, wanted)]
    if not reaching:
        first = min((place for cell in cells for place in cell), key=lambda place: place.writes)
        last = max(wanted, key=lambda place: place.reads)
        raise MechsteerError(
            f"None of the senders has a direct path to a receiver: {first.label} is the first to write, "
            f"and {last.label}, the last receiver, reads before that. Choose senders that come before a receiver."
        )
    paths = _Paths.of(model, base, source, [cells[index] for index in reaching], wanted, rows)
    value, options = measure.named("value"), {}
    effect = np.zeros((len(cells), len(base)), np.float64 if model.dtype == torch.float64 else np.float32)
    unpatched = objective_of(model, base, value, progress=progress)
    with bar("senders", len(reaching), show=progress) as shown:
        for start in range(0, len(reaching), paths.size):
            part = reaching[start : start + paths.size]
            received = dict(zip(part, paths.received([cells[index] for index in part], shown), strict=True))
            folder = None if out is None else Path(out) / f"part-{start}" if len(reaching) > paths.size else out
            swept = sweep(
                model, base, axes={"cell": part}, build=lambda cell, received=received: received[cell],
                measure=value, out=folder, rows=rows, progress=progress,
            )  # fmt: skip
            options = swept.provenance["options"]
            effect[part] = swept.data["value"].values - unpatched
    dims = {name: len(values) for name, values in coords.items() if not isinstance(values, tuple)}
    coords["prompt"] = list(pair.clean.labels) or np.arange(len(base))
    about = {"mode": mode, "measure": repr(measure), "receivers": [each.label for each in wanted]}
    about |= {"senders": sorted({place.label for cell in cells for place in cell}), "together": together}
    about |= {key: options[key] for key in ("engine", "rows")}
    end = objective_of(model, source, value, progress=progress)
    seconds = time.perf_counter() - began
    effect = effect.reshape(*dims.values(), len(base))
    return map_of(tuple(dims), effect, unpatched, end, coords, provenance(model=model.id, seconds=seconds, **about))


# ---- what was asked for ----


def _cells(model: Model, senders: Any, at: Any, together: bool) -> tuple[list[Senders], dict[str, Any]]:
    """The senders of each cell, and the coordinates of the map's dimensions."""
    if isinstance(senders, Mapping):
        named = {str(name): frozenset(_places(model, each, at, _WRITES, "senders")) for name, each in senders.items()}
        if not named:
            raise MechsteerError("senders={} is empty. Pass at least one set of senders.")
        if together:
            return [frozenset[Place]().union(*named.values())], {}
        return list(named.values()), {"sender": list(named)}
    places = _places(model, senders, at, _WRITES, "senders")
    coords: dict[str, Any]
    if isinstance(senders, str) and senders == "z":
        coords = {"layer": list(range(model.n_layers)), "head": list(range(model.cfg.n_heads))}
    elif isinstance(senders, str) and senders in ("attn_out", "mlp_out"):
        coords = {"layer": list(range(model.n_layers))}
    else:
        places = list(dict.fromkeys(places))
        sites = [place.site for place in places]
        coords = {
            "sender": [place.label for place in places],
            "site": ("sender", [site.kind for site in sites]),
            "layer": ("sender", [-1 if site.layer is None else site.layer for site in sites]),
            "head": ("sender", [-1 if site.head is None else site.head for site in sites]),
            "at": ("sender", [place.where for place in places]),
        }
    return ([frozenset(places)], {}) if together else ([frozenset([place]) for place in places], coords)


def _receivers(model: Model, receivers: Any) -> list[Place]:
    last = Site("resid_post", model.n_layers - 1)
    given = [receivers] if _is_one(receivers) else list(receivers)
    given = [last if isinstance(each, str) and each == "logits" else each for each in given]
    return list(dict.fromkeys(_places(model, given, None, _READS, "receivers")))


def _places(model: Model, sites: Any, at: Any, kinds: Mapping[str, int], what: str) -> list[Place]:
    """Sites as places, where a kind stands for all its layers, and "z" as a sender for all heads of these."""
    found: list[Site] = []
    for each in [sites] if _is_one(sites) else sites:
        if isinstance(each, str) and each in KINDS and "{layer}" in KINDS[each].hook:
            heads = range(model.cfg.n_heads) if kinds is _WRITES and each == "z" else [None]
            found += [Site(each, layer, head=head) for layer in range(model.n_layers) for head in heads]
        else:
            found.append(Site.of(each))
    if not found:
        raise MechsteerError(f"{what}={sites!r} is empty. Pass at least one site.")
    for site in found:
        if site.kind not in kinds:
            does = "writes to" if kinds is _WRITES else "is read from"
            raise MechsteerError(
                f"{what} got {site!r}, but no {site.kind} {does} the residual stream. Pass some of {', '.join(kinds)}."
            )
        model.check_site(site)
    return [Place(site.at(pos=None), normalise_at(at, site.pos)) for site in found]


def _is_one(sites: Any) -> bool:
    """Whether this is a single site or kind: ("mlp_out", 2) is, ["mlp_out", "embed"] is not."""
    return isinstance(sites, str | Site) or (
        isinstance(sites, tuple) and len(sites) == 2 and isinstance(sites[0], str) and hasattr(sites[1], "__index__")
    )


def _reached(cell: Senders, receivers: Sequence[Place]) -> list[Place]:
    """The receivers that a sender of the cell comes before."""
    return [receiver for receiver in receivers if any(sender.writes < receiver.reads for sender in cell)]


# ---- what the receivers get ----


@dataclass(frozen=True, eq=False, repr=False)
class Received(Intervention):
    """Puts what one cell's receiver was computed to be in its place.

    Attributes:
        table: of all cells, so that they are stacked without copying [cell, batch, pos, *feature].
        index: of the cell.
    """

    table: Tensor
    index: int

    @classmethod
    def _edit(cls, cells: Sequence["Received"], like: Float[Tensor, "..."]) -> Edit:
        which = torch.tensor([cell.index for cell in cells], device=like.device)
        table = cells[0].table.to(like.device)

        def edit(values: Float[Tensor, "row *feature"], rows: Rows) -> Float[Tensor, "row *feature"]:
            return table[which[rows.cell], rows.example, rows.position]

        return edit

    def check_model(self, model: Model) -> None:
        """Made with the model that it is for."""


@dataclass(frozen=True, eq=False)
class _Paths:
    """Computes what receivers get, for many cells.

    Attributes:
        model: what is run.
        base: of the run patched into, the stream where receivers read and what senders write.
        source: of the run patched from, what senders write.
        receivers: of every cell.
        size: cells to hold at a time.
        tokens: of a forward pass.
    """

    model: Model
    base: Activations
    source: Activations
    receivers: list[Place]
    size: int
    tokens: int

    @staticmethod
    def of(
        model: Model, base: Prompts, source: Prompts, cells: Iterable[Senders], receivers: list[Place], rows: int | None
    ) -> "_Paths":
        """Record both runs."""
        senders = {place for cell in cells for place in cell}
        written = {_written(place.writes) for place in senders} | {place.site.point for place in senders}
        streams = {_stream(place.reads, model.n_layers) for place in receivers}
        width = model.d_model * (1 + len(streams))
        for site in (place.site for place in receivers):
            width += (model.width(site) or 0) * (model.size(site, "head") or 1 if site.head is None else 1)
        return _Paths(
            model,
            model.run(base, record=written | streams, logits="none").activations,
            model.run(source, record=written, logits="none").activations,
            receivers,
            max(1, _HELD // (base.tokens.numel() * width)),
            rows or _TOKENS.get(model.device.type, _TOKENS["cuda"]),
        )

    def received(self, cells: Sequence[Senders], shown: Bar) -> list[list[Received]]:
        """For each cell the interventions that put its receivers' values in place."""
        writes = self._writes(cells)
        streams: dict[int, Tensor] = {}
        for stage in {receiver.reads for receiver in self.receivers}:
            before = self.base[_stream(stage, self.model.n_layers)]
            arrived = [[change for at, change in each.items() if at < stage] for each in writes]
            streams[stage] = torch.stack([sum(changes, precise(before)).to(before) for changes in arrived])
        tables = {place: streams[place.reads] for place in self.receivers if place.site.kind.startswith("resid")}
        computed = [place for place in self.receivers if place not in tables]
        points = {place.site.point for place in computed}
        parts: dict[Place, list[Tensor]] = {place: [] for place in computed}
        for some in self._batches(len(cells) if computed else 0):
            # All inputs are given, so that none depends on what another layer makes of its own.
            inputs = {
                _stream(stage, self.model.n_layers): streams[stage][some].flatten(0, 1)
                for stage in {place.reads for place in computed}
            }
            taken = self._run(inputs, points)
            for place in computed:
                parts[place].append(taken[place.site].unflatten(0, (-1, len(self.base.prompts))))
        tables |= {place: torch.cat(part) for place, part in parts.items()}
        shown.advance(len(cells))
        return [
            [Received(place.site, place.at, tables[place], index) for place in _reached(cell, self.receivers)]
            for index, cell in enumerate(cells)
        ]

    def _writes(self, cells: Sequence[Senders]) -> list[dict[int, Float[Tensor, "batch pos d_model"]]]:
        """Per cell the change of what is written to the stream after each stage."""
        jobs: list[dict[int, Senders]] = []
        for cell in cells:
            stages = sorted({place.writes for place in cell})
            jobs.append({stage: frozenset(place for place in cell if place.writes == stage) for stage in stages})
        through = self._through_heads([job for each in jobs for job in each.values()])
        return [{stage: self._change(stage, job, through) for stage, job in each.items()} for each in jobs]

    def _change(
        self, stage: int, job: Senders, through: Mapping[Senders, Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        # Embeddings are compared in the stream: the hook point of some models is before they are scaled.
        site = _written(stage)
        after = through.get(job, self.base[site])
        for place in job:
            if place.site.kind != "z":
                after = torch.where(tokens_of(place.at, self.base.prompts)[..., None], self.source[site], after)
        return precise(after) - precise(self.base[site])  # summed over senders, and rounded after that

    def _through_heads(self, jobs: Iterable[Senders]) -> dict[Senders, Float[Tensor, "batch pos d_model"]]:
        """`attn_out` with the source run's values of the senders among the layer's heads; each job is of one layer.

        What attention writes depends on its heads' outputs alone, so that one pass has room for a job in every layer.
        """
        by_layer: dict[int, list[Senders]] = {}
        for job in dict.fromkeys(jobs):
            for layer in {place.site.layer for place in job if place.site.kind == "z"}:
                by_layer.setdefault(layer, []).append(job)  # type: ignore[arg-type]
        found: dict[Senders, Tensor] = {}
        for some in self._batches(max(map(len, by_layer.values()), default=0)):
            chosen = {layer: own[some] for layer, own in by_layer.items() if own[some]}
            longest = max(map(len, chosen.values()))
            mixed = {
                Site("z", layer): torch.cat(
                    [self._mixed(layer, job) for job in [*own, *own[:1] * (longest - len(own))]]
                )
                for layer, own in chosen.items()
            }
            taken = self._run(mixed, {Site("attn_out", layer) for layer in chosen})
            for layer, own in chosen.items():
                written = taken["attn_out", layer].unflatten(0, (longest, -1))
                found |= dict(zip(own, written, strict=False))
        return found

    def _mixed(self, layer: int, job: Senders) -> Float[Tensor, "batch pos head d_head"]:
        """The base run's heads, with the source run's values for those that send."""
        base, source = self.base["z", layer], self.source["z", layer]
        for place in job:
            if place.site.kind == "z":
                head = torch.arange(base.shape[2], device=base.device)
                mine = torch.ones_like(head, dtype=torch.bool) if place.site.head is None else head == place.site.head
                base = torch.where((tokens_of(place.at, self.base.prompts)[..., None] & mine)[..., None], source, base)
        return base

    def _run(self, values: Mapping[Site, Float[Tensor, "..."]], record: Iterable[Site]) -> Activations:
        """Record sites of runs that have these values; the prompts are those of `base`, as often as it takes."""
        n = len(self.base.prompts)
        times = next(iter(values.values())).shape[0] // n
        prompts = replace(self.base.prompts, labels=())[torch.arange(n).repeat(times)]
        given = Activations(values, prompts=prompts, model=self.model.id)
        return self.model.run(prompts, [Replace(site, given) for site in values], record, logits="none").activations

    def _batches(self, count: int) -> Iterator[slice]:
        """Cells that are run side by side."""
        size = max(1, self.tokens // self.base.prompts.tokens.numel())
        return (slice(start, start + size) for start in range(0, count, size))


def _stream(stage: int, n_layers: int) -> Site:
    """Where the residual stream of a stage is."""
    layer, mid = divmod(stage, 2)
    if mid:
        return Site("resid_mid", layer)
    return Site("resid_pre", layer) if layer < n_layers else Site("resid_post", n_layers - 1)


def _written(stage: int) -> Site:
    """What is written to the residual stream after a stage."""
    return Site("resid_pre", 0) if stage < 0 else Site(("attn_out", "mlp_out")[stage % 2], stage // 2)
