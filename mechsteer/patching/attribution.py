"""Attribution patching: what activation patching measures, estimated for all cells at once from gradients."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.gradients import Traced, graph_tokens, measured, traced
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.patching.atp_star import Estimator, Gate, softmax_sites, softmaxed
from mechsteer.patching.grid import Grid, check_mode
from mechsteer.precision import precise
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.rows import At, of_like_lengths, tokens_of
from mechsteer.site import Site

METHODS = ("gradient", "integrated_gradients", "atp_star")


def attribution_patching(
    model: Model,
    clean: PromptsLike,
    corrupt: PromptsLike,
    *,
    measure: Objective,
    sites: str | Sequence[str] = "resid_pre",
    over: str | Sequence[str] = ("layer", "pos"),
    layers: int | Iterable[int] | None = None,
    at: Any = None,
    mode: str = "denoising",
    method: str = "gradient",
    steps: int = 10,
    tokens: int | None = None,
    progress: bool = True,
) -> Result:
    """Estimate every cell of an activation patching map from a few passes, however many cells there are.

        gap = ms.LogitGap(" Mary", " John", tokenizer=model)
        ms.attribution_patching(model, clean, corrupt, measure=gap, sites=("z", "mlp_out"), over=("layer", "pos"))

    With a the activations of a cell, M the objective, and "base" and "source" as in `activation_patching`, which
    measures the same effects exactly:

    - "gradient": effect = <a_source - a_base, dM/da at base>, from two forward passes and one backward pass (Nanda
      2023, "Attribution patching"; Syed, Rager and Conmy 2023, arXiv:2310.10348).
    - "integrated_gradients": the gradient is the mean over `steps` runs, whose embeddings lie on the straight line from
      base to source, at (i - 1/2) / steps (Sundararajan et al. 2017, arXiv:1703.01365; "EAP-IG (inputs)" of Hanna et
      al. 2024, arXiv:2403.17806). At `embed` the effects of all positions add up to M(source) - M(base) as steps grow.
    - "atp_star": AtP* (Kramár et al. 2024, arXiv:2403.00745). At `q`, `k`, `rot_q` and `rot_k` the effect is
      <P' - P, dM/dP at base>, where P is the attention pattern and P' the pattern with the queries or keys of the cell
      patched, its softmax computed anew (their QK fix); elsewhere it is that of "gradient". A second array, `score`, 0
      or more, is GradDrop (their equation 11): sum_l |effect_l| / (n_layers - 1), in which effect_l is the
      same estimate with gradients that do not flow through what layer l adds to the residual stream (its `attn_out`
      and `mlp_out`). Where a direct and an indirect effect cancel, `effect` is small and `score` is not. It takes one
      more backward pass for each layer. In a model of one layer nothing cancels, and score = |effect|.

    Args:
        model: what to run. Its parameters need no gradients, and get none.
        clean, corrupt, sites, over, layers, at, mode: as for `activation_patching`.
        measure: one differentiable number per prompt.
        method: see above.
        steps: points of integrated gradients.
        tokens: tokens in a batch; None for what suits the device.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Result like that of `activation_patching`: `effect` [*over, prompt] (signed, in the objective's units; NaN
        where a kind has fewer heads than others), `base` [prompt] and `source` [prompt]; with "atp_star" also `score`
        [*over, prompt]. A cell that the objective does not depend on has effect 0.

    Raises:
        MechsteerError: as for `activation_patching`; a method or number of steps does not exist; the objective has no
            gradient; or AtP* cannot recompute this model's attention patterns.
    """
    began = time.perf_counter()
    check_mode(mode)
    _check(method, steps, tokens)
    grid = Grid.of(model, clean, corrupt, sites=sites, over=over, layers=layers, at=at)
    base, source = grid.ends(mode)
    for prompts in (base, source):
        model.check_slots(prompts, ())
    if measure.n_examples not in (None, len(base)):
        raise MechsteerError(
            f"{measure.name} holds values for {measure.n_examples} prompts, and {len(base)} are patched. "
            "Make it from the same prompts."
        )
    cells = _Cells(grid)
    names = ("effect", "score") if method == "atp_star" else ("effect",)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    out = {name: torch.zeros(len(cells), len(base), dtype=dtype) for name in names}
    before = torch.zeros(2, len(base), dtype=dtype)
    passes = {"gradient": 1, "integrated_gradients": steps, "atp_star": model.n_layers + 1}[method]
    width = tokens or graph_tokens(model)
    with bar("gradients", len(base) * passes, show=progress) as shown:
        for example in of_like_lengths(base.lengths, width):
            pair = _Pair(
                model, measure, grid.points, base[example].padded("right"), source[example].padded("right"), example
            )
            if method == "atp_star":
                values, ends = _atp_star(pair, cells, shown.advance)
            elif method == "integrated_gradients":
                values, ends = _integrated(pair, cells, steps, width, shown.advance)
            else:
                values, ends = _gradient(pair, cells, shown.advance)
            for name, value in zip(names, values, strict=True):
                out[name][:, example] = value.to(out[name])
            before[:, example] = ends.to(before)
    about = {
        "mode": mode, "measure": repr(measure), "method": method, "steps": steps, "sites": list(grid.kinds),
        "over": [name for name in grid.axes if name != "site"], "at": _plain(at),
        "layers": list(dict.fromkeys(cell.layer for cell in cells.cells if cell.layer is not None)),
    }  # fmt: skip
    seconds = time.perf_counter() - began
    shape = [len(values) for values in grid.axes.values()]
    maps = [
        grid.result(
            out[name].view(*shape, -1).numpy(), before[0].numpy(), before[1].numpy(),
            provenance(model=model.id, seconds=seconds, **about),
        )
        for name in names
    ]  # fmt: skip
    if method != "atp_star":
        return maps[0]
    return Result(maps[0].data.assign(score=maps[1].data["effect"]), provenance=maps[0].provenance)


def _check(method: str, steps: int, tokens: int | None) -> None:
    if method not in METHODS:
        raise MechsteerError(f"method={method!r} does not exist. Pass one of {', '.join(map(repr, METHODS))}.")
    for name, value in (("steps", steps), ("tokens", tokens)):
        if value is not None and value < 1:
            raise MechsteerError(f"{name}={value} is none. Pass at least 1.")


def _plain(at: Any) -> Any:
    """Places as they were given, in lists, which JSON has."""
    if at is None or isinstance(at, str):
        return at
    return int(at) if hasattr(at, "__index__") and getattr(at, "ndim", 0) == 0 else [_plain(each) for each in at]


# ---- from estimates at hook points to cells ----


class _Cells:
    """The cells of a map, gathered by hook point."""

    def __init__(self, grid: Grid) -> None:
        self.cells = [grid.cell(**values) for values in grid.cells()]
        self._by_point: dict[Site, list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.head is None or cell.head < grid.n_heads(cell.kind):
                self._by_point.setdefault(cell.site.point, []).append(index)

    def __len__(self) -> int:
        return len(self.cells)

    def reduce(
        self, estimates: Mapping[Site, Estimator], gradients: Mapping[Site, Tensor], prompts: Prompts
    ) -> Float[Tensor, "cell batch"]:
        """The estimate of each cell; 0 where the model has no such head."""
        masks: dict[At, Tensor] = {}

        def where(rules: Sequence[At]) -> Bool[Tensor, "rule batch pos"]:
            for rule in rules:
                if rule not in masks:
                    masks[rule] = tokens_of(rule, prompts)
            return torch.stack([masks[rule] for rule in rules])

        out: Tensor | None = None
        for point, members in self._by_point.items():
            cells = [self.cells[index] for index in members]
            rules, sources = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("at", "src"))
            values = estimates[point](gradients, where(rules))  # [rule, batch], and [.., head], and [.., head, src]
            rule = [rules.index(cell.at) for cell in cells]
            if "src" in point.axes:
                values = torch.einsum("rbhs,cbs->rbch", values, where(sources).to(values))
                values = values[rule, :, [sources.index(cell.src) for cell in cells]]
            else:
                values = values[rule]
            if "head" in point.axes:
                heads = [cell.head for cell in cells]
                values = values.sum(-1) if None in heads else values[range(len(cells)), :, heads]
            out = values.new_zeros(len(self), values.shape[1]) if out is None else out
            out[members] = values
        assert out is not None
        return out


# ---- runs with gradients ----


@dataclass(frozen=True)
class _Pair:
    """Some of the prompts, what is measured on them, and where.

    Attributes:
        base, source: padded on the right.
        example: which of all prompts they are.
    """

    model: Model
    measure: Objective
    points: Sequence[Site]
    base: Prompts
    source: Prompts
    example: Int[Tensor, " batch"]

    def plain(self, prompts: Prompts, sites: Sequence[Site]) -> tuple[Float[Tensor, " batch"], dict[Site, Tensor]]:
        """The objective, and activations, without a graph."""
        with torch.no_grad():
            return measured(self.model, prompts, self.measure, self.example, record=sites)

    def traced(
        self,
        prompts: Prompts,
        example: Int[Tensor, " row"],
        sites: Sequence[Site],
        *,
        record: Sequence[Site] = (),
        embed: Float[Tensor, "row pos d_model"] | None = None,
        gate: Gate | None = None,
    ) -> Traced:
        """A run whose objective can be differentiated with respect to sites.

        Args:
            record: more sites whose activations are wanted.
            embed: put in the place of the embeddings.
            gate: through which `attn_out` and `mlp_out` of every layer reach the residual stream.
        """

        def leaf(tensor: Tensor, hook: Any) -> Tensor:
            # The graph begins before the sites, so that an objective that depends on none of them has gradients of 0.
            return (tensor if embed is None else embed).detach().requires_grad_()

        layers, kinds = range(self.model.n_layers), ("attn_out", "mlp_out")
        gates = [] if gate is None else [(Site(kind, at).hook_name, gate.hook(at)) for at in layers for kind in kinds]
        found = traced(
            self.model, prompts, self.measure, example, sites,
            edits=[(Site("embed").hook_name, leaf)], gates=gates, record=record,
        )  # fmt: skip
        if not found.value.requires_grad:
            raise MechsteerError(
                f"{self.measure!r} has no gradient, so that attribution patching cannot estimate it. Use "
                "activation_patching, or an objective computed from logits or activations with PyTorch."
            )
        return found


@dataclass(frozen=True)
class _Linear:
    """<change, dM/da>, the first-order estimate."""

    site: Site
    change: Float[Tensor, "batch ..."]

    def __call__(
        self, gradients: Mapping[Site, Tensor], where: Bool[Tensor, "rule batch pos"]
    ) -> Float[Tensor, "rule batch ..."]:
        if self.site not in gradients:
            change = self.change if "src" in self.site.axes else self.change[..., 0]
            dense = torch.zeros_like(change)
        elif "src" in self.site.axes:
            # Scores that causality hides are -inf in both runs.
            change = torch.where(self.change.isfinite(), self.change, 0)
            dense = change * gradients[self.site]
        else:
            dense = (self.change * gradients[self.site]).sum(-1)
        return torch.einsum("rbd,bhds->rbhs" if "src" in self.site.axes else "rbp,bp...->rb...", where.to(dense), dense)


def _linear(points: Sequence[Site], base: Mapping[Site, Tensor], source: Mapping[Site, Tensor]) -> dict[Site, Any]:
    return {point: _Linear(point, precise(source[point]) - precise(base[point])) for point in points}


_Values = tuple[list[Tensor], Tensor]


def _gradient(pair: _Pair, cells: _Cells, advance: Callable[[int], None]) -> _Values:
    after, source = pair.plain(pair.source, pair.points)
    run = pair.traced(pair.base, pair.example, pair.points)
    estimates = _linear(pair.points, run.taken, source)
    values = cells.reduce(estimates, run.gradients(), pair.base)
    advance(len(pair.base))
    return [values], torch.stack([run.value.detach(), after])


def _integrated(pair: _Pair, cells: _Cells, steps: int, tokens: int, advance: Callable[[int], None]) -> _Values:
    embed, batch = Site("embed"), len(pair.base)
    before, base = pair.plain(pair.base, [*pair.points, embed])
    after, source = pair.plain(pair.source, [*pair.points, embed])
    mean: dict[Site, Tensor] = {}
    # Midpoints of equal parts of the line: the error falls with the square of their number.
    shares = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for part in shares.split(max(1, tokens // pair.base.tokens.numel())):
        start, stop = (precise(each[embed])[None] for each in (base, source))
        line = torch.lerp(start, stop, part.to(start).view(-1, 1, 1, 1)).flatten(0, 1).to(base[embed])
        rows = torch.arange(batch).repeat(len(part))
        run = pair.traced(pair.base[rows], pair.example[rows], pair.points, embed=line)
        for site, gradient in run.gradients().items():
            total = gradient.unflatten(0, (len(part), batch)).sum(0) / steps
            mean[site] = mean[site] + total if site in mean else total
        advance(len(rows))
    return [cells.reduce(_linear(pair.points, base, source), mean, pair.base)], torch.stack([before, after])


def _atp_star(pair: _Pair, cells: _Cells, advance: Callable[[int], None]) -> _Values:
    n_layers, gate = pair.model.n_layers, Gate()
    recorded, patterns = softmax_sites(pair.model, pair.points)
    wanted = [*pair.points, *recorded]
    after, source = pair.plain(pair.source, wanted)
    sites = list(dict.fromkeys([*pair.points, *patterns]))
    run = pair.traced(pair.base, pair.example, sites, record=recorded, gate=gate)
    estimates: dict[Site, Estimator] = _linear(pair.points, run.taken, source)
    estimates |= softmaxed(pair.model, pair.points, run.taken, source, pair.base)

    def estimate(dropped: int | None) -> Float[Tensor, "cell batch"]:
        gate.dropped = dropped
        values = cells.reduce(estimates, run.gradients(keep_graph=True), pair.base)
        advance(len(pair.base))
        return values

    effect = estimate(None)
    # No gradient that a cell uses flows through layers before the first one patched.
    first = min(max(0, min(point.order[0] for point in pair.points)), n_layers)
    advance(first * len(pair.base))
    total = first * effect.abs()
    for layer in range(first, n_layers):
        total = total + estimate(layer).abs()
    score = total / (n_layers - 1) if n_layers > 1 else effect.abs()
    return [effect, score], torch.stack([run.value.detach(), after])
