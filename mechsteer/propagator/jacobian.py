"""Jacobians of the residual stream as products with vectors, from one forward pass whose graph is kept.

The stream is met at *stages*: 2 * layer is what enters a block (`resid_pre`), 2 * layer + 1 what enters its MLP
(`resid_mid`), 2 * n_layers what leaves the last block; -1 is `embed`. A `Trace` holds the stream at several stages of
one pass, so that the Jacobians of all pairs of them share it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechsteer import markup
from mechsteer.backends.decoder import Capture
from mechsteer.backends.packing import Layout, Pack
from mechsteer.costs import JACOBIAN_ROWS
from mechsteer.engine import Engine
from mechsteer.errors import MechsteerError
from mechsteer.gradients import measured
from mechsteer.memory import devices_of
from mechsteer.model import Model
from mechsteer.objectives import Objective
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows
from mechsteer.site import Site

_OFFSET = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}


def stage_of(site: Site) -> int:
    """When a forward pass meets a site of the residual stream.

    Raises:
        MechsteerError: the site is not on the residual stream.
    """
    if site.kind == "embed":
        return -1
    if site.kind not in _OFFSET or site.layer is None:
        raise MechsteerError(
            f"{site!r} is off the path: a Propagator joins sites of the residual stream, which are embed, resid_pre, "
            "resid_mid and resid_post. Choose one of these, or pass an Objective as the target."
        )
    return 2 * site.layer + _OFFSET[site.kind]


def positions_of(prompts: Prompts, pos: int | Int[Tensor, " batch"] | None) -> Int[Tensor, " batch"]:
    """Absolute positions in right-padded prompts; None is the decision position.

    Raises:
        MechsteerError: a prompt has no such position.
    """
    return prompts.at(-1 if pos is None else pos).int().argmax(1)


@dataclass(frozen=True, repr=False)
class Jacobian:
    """dy/dx of every prompt, as products with vectors.

    Vectors come and go in fp32 at least, also where the model is in half precision: what is made of them are sums and
    decompositions, which PyTorch does not have in bf16. Between the two sites everything is as the model computes it.

    Attributes:
        y: in the graph of x.
        x: the tensor that is moved.
        index: which row of x is moved for each prompt.
    """

    y: Float[Tensor, "batch *out d_target"]
    x: Float[Tensor, "*rows d_source"]
    index: tuple[Int[Tensor, " batch"], ...]

    def vjp(self, u: Float[Tensor, "k batch *out d_target"]) -> Float[Tensor, "k batch d_source"]:
        """J^T u for k rows of vectors at a time: one backward pass for as many as fit side by side."""
        return torch.cat([precise(self._vjp(part.to(self.y))) for part in u.split(self._width)])

    def jvp(self, v: Float[Tensor, "k batch d_source"]) -> Float[Tensor, "k batch *out d_target"]:
        """J v.

        u -> J^T u is linear, and the transpose of that map is v -> J v. So the graph that is kept serves both
        directions, and J v costs what J^T u does, without another forward pass. PyTorch's own forward mode
        (`torch.func.jvp` under `vmap`), with which the tests compare, runs the model again for each product: on one
        core it takes 5 times as long for one vector, 3 times for 16 and about as long for 192.
        """
        return torch.cat([precise(self._jvp(part.to(self.x))) for part in v.split(self._width)])

    @property
    def like(self) -> Tensor:
        """A tensor of the type and device of what the products give."""
        return precise(self.y.detach())

    def reaches(self) -> bool:
        """Whether y depends on x at all."""
        ones = torch.ones_like(self.y)
        return torch.autograd.grad(self.y, self.x, ones, retain_graph=True, allow_unused=True)[0] is not None

    def __repr__(self) -> str:
        return markup.told("Jacobian", {"y": self.y, "x": self.x})

    @property
    def _width(self) -> int:
        rows = self.x.numel() // self.x.shape[-1]
        return max(1, JACOBIAN_ROWS.get(self.x.device.type, JACOBIAN_ROWS["cuda"]) // rows)

    def _vjp(self, u: Tensor) -> Tensor:
        # For k = 1 without vmap, which then costs more than it saves.
        many = len(u) > 1
        (found,) = torch.autograd.grad(
            self.y, self.x, u if many else u[0], is_grads_batched=many, retain_graph=True, allow_unused=True
        )
        if found is None:
            return u.new_zeros(len(u), len(self.y), self.x.shape[-1])
        return (found if many else found[None])[:, *self.index]

    def _jvp(self, v: Tensor) -> Tensor:
        u, g = self._transposed
        many = len(v) > 1
        found = None
        if g is not None and g.requires_grad:
            (found,) = torch.autograd.grad(
                g, u, v if many else v[0], is_grads_batched=many, retain_graph=True, allow_unused=True
            )
        if found is None:
            return v.new_zeros(len(v), *self.y.shape)
        return found if many else found[None]

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            u = torch.zeros_like(self.y, requires_grad=True)
            (g,) = torch.autograd.grad(self.y, self.x, u, create_graph=True, allow_unused=True)
            return u, None if g is None else g[self.index]


@dataclass(frozen=True, repr=False)
class Trace:
    """The residual stream at several stages of one forward pass, in its graph.

    Attributes:
        start, stop: positions of each prompt that pushes start from and arrive at.
        points: for each stage, the tensor and a function that says where a position of each prompt is in it.
        end: what lies behind the stream (logits or an objective) [batch, d], where it was asked for.
    """

    prompts: Prompts
    start: Int[Tensor, " batch"]
    stop: Int[Tensor, " batch"]
    points: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, ...]]]]
    end: Tensor | None

    def at(self, stage: int) -> Float[Tensor, "batch d_model"]:
        """The stream at a stage where pushes arrive."""
        value, _, where = self.points[stage]
        with torch.enable_grad():  # whatever the caller does: this is part of the graph
            return value[where(self.stop)]

    def jacobian(self, source: int, target: int | None) -> Jacobian:
        """From one stage to a later one, or to the end (None)."""
        _, moved, where = self.points[source]
        y = self.end if target is None else self.at(target)
        assert y is not None
        return Jacobian(y, moved, where(self.start))


def trace(
    model: Model,
    prompts: Prompts,
    stages: Iterable[int],
    start: Int[Tensor, " batch"],
    stop: Int[Tensor, " batch"],
    *,
    end: Objective | str | None = None,
    hooks: bool = False,
) -> Trace:
    """Run prompts and keep the graph between stages.

    Only the stream from `start` to `stop` can carry a push from the one to the other: keys and values before it are the
    clean run's, so that the packed forward pass computes these positions alone.

    Args:
        prompts: right-padded.
        end: "logits" at `stop`, or an objective.
        hooks: go through TransformerLens's hooks, at all positions.

    Raises:
        MechsteerError: an activation is not finite, the objective has no gradient, or the graph does not fit in memory.
    """
    wanted = sorted(set(stages))
    # Fused attention has no second derivative, which products with vectors use.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if hooks or model.decoder is None or isinstance(end, Objective):
            found = _hooked(model, prompts, wanted, start, stop, end)
        else:
            found = _packed(model, prompts, wanted, start, stop, end is not None)
    for value in [*(value for value, _, _ in found.points.values()), *([] if found.end is None else [found.end])]:
        if not bool(torch.isfinite(value).all()):
            raise MechsteerError(
                f"{model.name} gave a value that is infinite or NaN on these prompts, so that it has no Jacobian "
                "there. Look at model.run(prompts), or load the model with a wider dtype."
            )
    return found


def _packed(
    model: Model,
    prompts: Prompts,
    stages: list[int],
    start: Int[Tensor, " batch"],
    stop: Int[Tensor, " batch"],
    logits: bool,
) -> Trace:
    decoder, final = model.decoder, 2 * model.n_layers
    # Where this forward pass applies, what enters layer 0 is `embed` plus a constant.
    inner = sorted({max(0, stage) for stage in stages})
    first, last = inner[0], final if logits else inner[-1]
    engine, rows = Engine(model, prompts, {}), int((stop + 1 - start).sum())
    width = rows + JACOBIAN_ROWS.get(start.device.type, JACOBIAN_ROWS["cuda"])  # and what goes back side by side
    memory = engine.memory([first], rows=width, chunk=prompts.tokens.numel(), grad=True)
    memory.check("This Propagator", devices_of(model), "Pass fewer or shorter prompts.")
    memory.announce("Propagator")
    clean = engine.clean(torch.arange(len(prompts), device=start.device), [first], logits=False)
    pack = Pack(
        lambda example, position, cell: Rows(prompts, example, position, cell),
        start[:, None],
        stop[:, None] + 1,
        prompts.at(stop)[:, None],
    )
    # Clean keys and own ones apart: the form of the attention that is made of plain products.
    pack.sparse = True
    rows = pack.all.rows
    x = clean.resid[first][rows.example, rows.position].detach().requires_grad_()
    found: dict[int, tuple[Tensor, Layout]] = {first: (x, pack.all)}
    if last > first:
        keys = {_key(stage): stage for stage in inner if stage > first and (stage % 2 or stage < last)}
        capture = Capture(frozenset(keys))
        x = decoder.blocks(
            x, pack, first=first // 2, stop=(last + 1) // 2, from_mlp=first % 2 == 1, past=clean.cache, capture=capture
        )
        found |= {keys[key]: taken for key, taken in capture.taken.items()}
        if last % 2 == 0:
            found[last] = x, pack.last if last == final else pack.all

    def locate(layout: Layout) -> Callable[[Tensor], tuple[Tensor, ...]]:
        at = layout.rows
        return lambda pos: torch.where(at.position == pos[at.example])

    points = {}
    for stage in stages:
        value, layout = found[max(0, stage)]
        points[stage] = value, value, locate(layout)
    end = None
    if logits:
        value, layout = found[final] if final in found else found[last]
        end = decoder.logits(value[locate(layout)(stop)])
    return Trace(prompts, start, stop, points, end)


def _key(stage: int) -> tuple[str, int]:
    return ("resid_mid" if stage % 2 else "resid_pre"), stage // 2


def _hooked(
    model: Model,
    prompts: Prompts,
    stages: list[int],
    start: Int[Tensor, " batch"],
    stop: Int[Tensor, " batch"],
    end: Objective | str | None,
) -> Trace:
    taps: dict[Site, Tensor] = {}

    def tap(site: Site) -> tuple[str, Callable[..., Tensor]]:
        def take(tensor: Tensor, hook: Any) -> Tensor:
            # Of its own: one tensor can be that of several sites. A bridge ignores what its hooks see unless another
            # tensor comes back.
            here = tensor.to(model.device)
            taps[site] = here.detach().requires_grad_() if site.kind == "embed" else here.view_as(here)
            return taps[site].to(tensor.device)

        return site.hook_name, take

    moved = {stage: _site(stage, model.n_layers) for stage in stages}
    sites = [Site("embed"), *moved.values()]
    # A bridge's hook_resid_mid is the input of the MLP's norm alone; the stream there is a sum, whose other addend
    # moves it whole.
    halves = {stage: stage // 2 for stage in stages if stage > 0 and stage % 2 and model.backend == "bridge"}
    for stage, layer in halves.items():
        moved[stage] = Site("attn_out", layer)
        sites = [each for each in sites if each != Site("resid_mid", layer)]
        sites += [Site("resid_pre", layer), moved[stage]]
    sites = list(dict.fromkeys(sites))
    edits = [tap(site) for site in sites]
    batch = torch.arange(len(prompts), device=start.device)
    if isinstance(end, Objective):
        value = measured(model, prompts, end, batch, edits=edits, record=sites)[0][:, None]
        if not value.requires_grad:
            raise MechsteerError(
                f"{end!r} has no gradient, so that nothing propagates to it. Pass an objective that is computed from "
                "logits or activations with PyTorch."
            )
    else:
        read = torch.zeros_like(prompts.mask) if end is None else prompts.at(stop)
        rows, _ = model.forward(prompts, edits, sites, read=read)
        value = None if end is None else rows
    values = {stage: taps[site] for stage, site in moved.items()}
    values |= {stage: taps[Site("resid_pre", layer)] + taps[moved[stage]] for stage, layer in halves.items()}
    points = {stage: (values[stage], taps[moved[stage]], lambda pos: (batch, pos)) for stage in stages}
    return Trace(prompts, start, stop, points, value)


def _site(stage: int, n_layers: int) -> Site:
    if stage < 0:
        return Site("embed")
    return Site("resid_post", n_layers - 1) if stage == 2 * n_layers else Site(*_key(stage))
