"""How strongly to steer: the strength with the best of what is wanted, less what it costs."""

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechsteer import markup
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import check
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import KLFromBaseline, Objective, TeacherForcedCE
from mechsteer.plots import draw
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.rows import At
from mechsteer.strength.choose_points import Points, Work
from mechsteer.strength.choose_search import Found, per_prompt, search
from mechsteer.strength.completions import Judge
from mechsteer.strength.curves import Directions, steered
from mechsteer.strength.local_laws import local_laws, nonzero_directions
from mechsteer.strength.vectors import labels_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LEAST_BUDGET = 5
# A gain of fewer standard errors than this is none.
_ERRORS = 1.0
_DRAWS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class ChosenAlpha:
    """The strengths that `choose_alpha` chose, and why.

        chosen = choose_alpha(model, joy, requests, judge, side_prompts=texts, weight=0.2)
        model.generate(requests, interventions=[chosen.add()])
        chosen.plot().show()
        chosen.result.save("joy.safetensors"), ChosenAlpha.load("joy.safetensors")

    Attributes:
        result: all of it, by direction: `alpha`, `low` and `high` (the band), `works`, `gain` and its standard error
            `gain_error`, `alpha_of_prompt`; the exact points `target`, `side_effect` and `score` at `point_alpha`; the
            curves `target_law`, `side_law`, `score_law` with `score_low` and `score_high` at `law_alpha`; the local
            laws `scale`, `kl_curvature`, `slope` and `side_slope`; and `forward_passes` and `tokens` that it took.
        directions: by name; empty after `load`, because a Result holds none.
    """

    result: Result
    directions: dict[str, Direction]

    @property
    def alphas(self) -> dict[str, float]:
        """The chosen strength of each direction; 0 where none works."""
        names = self.result["direction"].values.tolist()
        return dict(zip(names, self.result["alpha"].values.tolist(), strict=True))

    @property
    def alpha(self) -> float:
        """The chosen strength, where there is one direction.

        Raises:
            MechsteerError: there are several.
        """
        return self.alphas[self._only(None)]

    @property
    def works(self) -> dict[str, bool]:
        """Whether the chosen strength is better than none by more than a standard error."""
        names = self.result["direction"].values.tolist()
        return dict(zip(names, self.result["works"].values.tolist(), strict=True))

    @property
    def forward_passes(self) -> int:
        """Passes of one prompt through the model, generated tokens included, that it took for all directions."""
        return int(self.result["forward_passes"].sum())

    def add(self, direction: str | None = None, *, adaptive: bool = False) -> Add:
        """The intervention that steers with the chosen strength.

        Args:
            direction: its name; None where there is one.
            adaptive: with the strength of each prompt, for the prompts that it was chosen on.

        Raises:
            MechsteerError: there is no such direction, or this was loaded from a file, which holds none.
        """
        name = self._only(direction)
        if name not in self.directions:
            raise MechsteerError(
                f"This ChosenAlpha was loaded without its Direction {name!r}. Use ms.Add(direction, chosen.alpha)."
            )
        picked = self.result.sel(direction=name)
        alpha: float | Tensor = torch.from_numpy(picked["alpha_of_prompt"].values) if adaptive else self.alphas[name]
        return Add(self.directions[name], alpha, at=self._at)

    @property
    def _at(self) -> Any:
        at = self.result.provenance["options"]["at"]
        return steered(tuple(at) if isinstance(at, list) else at)

    def plot(self, direction: str | None = None) -> "go.Figure":
        """The evidence: target, side effect and score over alpha, the exact points, and the chosen strength's band.

        Args:
            direction: its name; None where there is one.
        """
        name = self._only(direction)
        one = self.result.sel(direction=name)
        weight = float(self.result.provenance["options"]["weight"])
        alphas = one["law_alpha"].values
        shown = alphas <= 1.25 * np.nanmax(one["point_alpha"].values)
        cost = weight * one["side_law"]
        parabola = weight * (float(one["side_slope"]) * alphas + float(one["kl_curvature"]) * alphas**2 / 2)
        curves = {"target": one["target_law"].values, "cost": cost.values, "score": one["score_law"].values}
        highest = max(1e-12, float(np.nanmax(cost.values[shown])))
        if self.result.provenance["options"]["fisher"]:
            # Beyond what the cost reaches, the parabola would only flatten everything else.
            curves["cost by its local law"] = np.where(parabola <= highest, parabola, np.nan)
        slope = float(one["slope"])
        if np.isfinite(slope):
            tangent = one["target"].mean("prompt").values[0] + slope * alphas
            low, high = np.nanmin(one["target_law"].values[shown]), np.nanmax(one["target_law"].values[shown])
            curves["target by its slope at 0"] = np.where((tangent >= low) & (tangent <= high), tangent, np.nan)
        laws = xr.DataArray(
            np.stack(list(curves.values()))[:, shown],
            {"curve": list(curves), "alpha": alphas[shown]},
            ("curve", "alpha"),
            name="laws",
        )
        works = bool(one["works"])
        said = f"alpha = {float(one['alpha']):.3g}" if works else "no strength works"
        figure = draw(Result(xr.Dataset({"laws": laws})), "laws", title=f"{name}: {said}")
        figure.update_traces(mode="lines").update_yaxes(title_text="")
        figure.for_each_trace(lambda trace: trace.update(name=trace.name.removeprefix("curve=")))
        traces: Any = figure.data
        colours = {trace.name: trace.line.color for trace in traces}
        points = one["point_alpha"].values
        exact = {
            "target": one["target"].mean("prompt").values,
            "cost": weight * one["side_effect"].values,
            "score": one["score"].values,
        }
        for curve, values in exact.items():
            hover = [f"{curve}, exact<br>alpha={a:.4g}<br>{v:.4g}" for a, v in zip(points, values, strict=True)]
            figure.add_scatter(
                x=points, y=values, mode="markers", marker={"color": colours[curve]},
                hoverinfo="text", hovertext=hover, showlegend=False,
            )  # fmt: skip
        if works:
            figure.add_vrect(x0=float(one["low"]), x1=float(one["high"]), opacity=0.15, line_width=0, fillcolor="gray")
            figure.add_vline(x=float(one["alpha"]), line_dash="dash")
        return figure

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "ChosenAlpha":
        """Read what `result.save` wrote.

        Raises:
            MechsteerError: there is no such file, or it holds something else.
        """
        result = Result.load(path)
        if "alpha_of_prompt" not in result.data:
            raise MechsteerError(f"{os.fspath(path)} holds a Result that choose_alpha did not make.")
        return ChosenAlpha(result, {})

    def _only(self, direction: str | None) -> str:
        names = self.result["direction"].values.tolist()
        if direction is None and len(names) > 1:
            raise MechsteerError(f"There are {len(names)} directions: {', '.join(names)}. Name one of them.")
        if direction is not None and direction not in names:
            raise MechsteerError(f"There is no direction {direction!r} here. There are {', '.join(names)}.")
        return names[0] if direction is None else direction

    def __repr__(self) -> str:
        parts = []
        for name, alpha in self.alphas.items():
            one = self.result.sel(direction=name)
            band = f"{float(one['low']):.3g} to {float(one['high']):.3g}"
            parts.append(f"{name}: {alpha:.3g} ({band})" if self.works[name] else f"{name}: no strength works")
        return f"ChosenAlpha({'; '.join(parts)}; {self.forward_passes} forward passes)"

    def _repr_html_(self) -> str:
        rows = []
        for name, alpha in self.alphas.items():
            one = self.result.sel(direction=name)
            gain = f"{float(one['gain']):.3g} +/- {float(one['gain_error']):.2g}"
            band = f"{float(one['low']):.3g} to {float(one['high']):.3g}"
            works = self.works[name]
            rows.append((name, f"{alpha:.3g}" if works else "no strength works", band if works else "", gain))
        table = markup.table(("direction", "alpha", "band", "gain"), rows)
        options = self.result.provenance.get("options", {})
        asked = {name: options[name] for name in ("objective", "side_effect", "weight", "at") if options.get(name)}
        more = markup.facts({name: markup.shortened(str(value)) for name, value in asked.items()})
        return markup.card("ChosenAlpha", table, more, about=f"{self.forward_passes} forward passes; .plot() draws why")


def choose_alpha(
    model: Model,
    direction: Directions,
    prompts: PromptsLike,
    objective: Objective | Judge,
    *,
    side_effect: Objective | None = None,
    side_prompts: PromptsLike | None = None,
    weight: float = 1.0,
    budget: int = 7,
    most: float | None = None,
    largest: float | None = None,
    at: At = "all",
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> ChosenAlpha:
    """The strength alpha of `alpha * v` with the best score, from a handful of exact points.

        score(alpha) = mean_prompts target(alpha) - weight * (mean side(alpha) - mean side(0))

    The laws of steering strength (document C) say where to look: the side effect starts as a parabola (Theorem 3.8,
    its curvature from one pass in forward mode) and flattens where norms divide the push out (Proposition 4.1); the
    target is a sigmoid (Theorem 3.6) that may fall again (Theorem 3.3). Few points are enough because the best strength
    is where the side effect has cost about a quarter of what there is to gain. The strength that is returned is one of
    the points measured, so that its score is exact on these prompts.

    Args:
        model: what to run.
        direction: one, or several by name, each of which is searched on its own. Only alpha > 0 is tried: negate a
            direction to steer away.
        prompts: what to steer.
        objective: what is wanted, larger is better: an `Objective`; or a judge, which says of a text how far it shows
            the concept, from 0 to 1: then prompts are completed at every point.
        side_effect: what it may cost, smaller is better. None takes the cross entropy of `side_prompts`, or without
            them KL from the unsteered model's predictions for the prompts' first new token, both in nats.
        side_prompts: what the side effect is measured on; None takes `prompts`.
        weight: of the side effect: how much of the target one unit of it is worth.
        budget: at how many strengths the target is measured, 0 among them; at least 5.
        most: the largest value that an Objective can have, if there is one (1 for a probability): without it the search
            only knows what it has seen. A judge's is 1.
        largest: no strength above this is tried; None takes twice `scale` (see `local_laws`).
        at: which tokens are steered: "all", "last" before any completion, or as `Add` takes it.
        max_new_tokens, temperature, seed: of the completions that a judge reads.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        The choice. Its band holds 95 % of the strengths that are best on curves drawn from what the points leave open;
        where the gain is below one standard error no strength works, and alpha is 0. Strengths of single prompts
        differ from alpha as far as the points tell more about prompts than noise; with one completion each that is
        often nothing.

    Raises:
        MechsteerError: a direction is zero or does not fit, the budget is too small, the weight is negative, objective
            is neither, or a value is not finite.
    """
    named = nonzero_directions(direction)
    if not isinstance(objective, Objective) and not callable(objective):
        raise MechsteerError(
            f"objective got a {type(objective).__name__}. Pass an Objective, or a judge: a function of a text."
        )
    if budget < _LEAST_BUDGET:
        raise MechsteerError(
            f"budget={budget} is too small: it counts the strengths at which the target is measured, 0 among them. "
            f"Pass at least {_LEAST_BUDGET}."
        )
    if not (0 <= weight < float("inf")):
        raise MechsteerError(f"weight={weight} is no weight. Pass a finite number of 0 or more.")
    if largest is not None and not (0 < largest < float("inf")):
        raise MechsteerError(f"largest={largest} leaves no strength to try. Pass a number above 0, or None.")
    if most is not None and not abs(most) < float("inf"):
        raise MechsteerError(f"most={most} is no largest value of the objective. Pass a finite number, or None.")
    wanted = model.prompts(prompts).padded("right")
    beside = wanted if side_prompts is None else model.prompts(side_prompts).padded("right")
    check([Add(each, 0.0, at=steered(at)) for each in named.values()], model, wanted)
    cost, where = _side_effect(model, side_effect, side_prompts is not None, beside)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    began = time.perf_counter()
    parts = []
    with bar("directions", len(named), show=progress) as shown:
        for each in named.values():
            work = Work()
            laws = _laws(model, each, wanted, beside, objective, cost, where, at, work)
            found = search(
                Points(model, each, wanted, objective, steered(at), work, sampling),
                Points(model, each, beside, cost, steered(at), work),
                scale=laws["scale"],
                weight=float(weight),
                budget=budget,
                local=None if where is None else (laws["side_slope"], laws["kl_curvature"]),
                most=most if isinstance(objective, Objective) else 1.0,
                largest=largest,
            )
            parts.append(_evidence(found, laws, work, weight=float(weight), paired=beside is wanted, budget=budget))
            shown.advance()
    data = xr.concat(parts, "direction", join="outer").assign_coords(direction=list(named))
    data = data.assign_coords(prompt=list(wanted.labels) if wanted.labels else np.arange(len(wanted)))
    data = data.assign_coords(labels_of(list(named.values())))
    judged = {"seed": None} if isinstance(objective, Objective) else sampling
    about = provenance(
        model=model.id, seconds=time.perf_counter() - began,
        objective=repr(objective) if isinstance(objective, Objective) else _name(objective),
        side_effect=repr(cost), fisher=where is not None, weight=float(weight), budget=budget,
        at=list(at) if isinstance(at, tuple) else at,
        prompts=wanted.hash, side_prompts=beside.hash, **judged,
    )  # fmt: skip
    return ChosenAlpha(Result(data, provenance=about), named)


def _name(judge: Judge) -> str:
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__))


def _side_effect(model: Model, given: Objective | None, apart: bool, beside: Prompts) -> tuple[Objective, str | None]:
    """The side effect, and at which tokens KL has its curvature; None where it is something else."""
    if given is not None:
        return given, given.where if isinstance(given, KLFromBaseline) else None
    if apart:
        return TeacherForcedCE(first=0, span="all"), "all"
    return KLFromBaseline(model.run(beside, logits="last")), "decision"


def _laws(
    model: Model,
    direction: Direction,
    wanted: Prompts,
    beside: Prompts,
    objective: Objective | Judge,
    cost: Objective,
    where: str | None,
    at: At,
    work: Work,
) -> dict[str, float]:
    """Local laws, as means over prompts: those of the side effect, and the target's slope where it is an Objective."""

    def mean(prompts: Prompts, what: Objective, **options: Any) -> xr.Dataset:
        laws = local_laws(model, direction, prompts, objective=what, at=at, progress=False, **options)
        work.add(laws.provenance["options"]["forward_passes"], laws.provenance["options"]["tokens"])
        return laws.data.isel(direction=0).mean("prompt")

    side = mean(beside, cost, where=where or "all")
    laws = {"scale": float(side["scale"]), "kl_curvature": float(side["kl_curvature"]), "slope": np.nan}
    laws["side_slope"] = float(side["slope"])
    if isinstance(objective, Objective):
        laws["slope"] = float(mean(wanted, objective)["slope"])
    return laws


def _evidence(
    found: Found, laws: dict[str, float], work: Work, *, weight: float, paired: bool, budget: int
) -> xr.Dataset:
    """What a search found, as arrays of one direction."""
    n = len(found.alphas)
    rise = found.side - found.side[0]
    # Between exact points a prompt's side effect is a straight line, bent so that the mean is the curve's.
    each = np.stack([np.interp(found.alphas, found.side_alphas, column) for column in rise.T], 1)
    each = each + (found.rise - each.mean(1))[:, None]
    scores = found.target - weight * (each if paired else found.rise[:, None])
    best = int(found.score.argmax())
    alpha, gain = float(found.alphas[best]), float(found.score[best] - found.score[0])
    error = np.hypot(_error(scores[best] - scores[0]), 0.0 if paired else weight * _error(each[best]))
    works = bool(best > 0 and gain > _ERRORS * error)
    score_law = found.target_law.mean - weight * found.side_law
    curves = found.target_law.draws(_DRAWS, seed=0) - weight * found.side_law
    near = (found.grid >= found.alphas[1]) & (found.grid <= found.alphas[-1])
    ends = np.quantile(found.grid[near][curves[:, near].argmax(1)], [0.025, 0.975])
    low, high = min(ends[0], alpha), max(ends[1], alpha)
    of_prompt = per_prompt(found, scores, best)

    def row(values: Any, *dims: str, **attrs: str) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
        return ("direction", *dims), np.asarray(values)[None], attrs

    def padded(values: np.ndarray) -> np.ndarray:
        # A search can end before its budget does.
        return np.pad(values.astype(float), [(0, budget - n), *[(0, 0)] * (values.ndim - 1)], constant_values=np.nan)

    return xr.Dataset({
        "alpha": row(alpha if works else 0.0, long_name="chosen strength", units="alpha"),
        "low": row(low if works else 0.0, long_name="lower end of the band", units="alpha"),
        "high": row(high if works else 0.0, long_name="upper end of the band", units="alpha"),
        "works": row(works),
        "gain": row(gain, long_name="score of the best point less that of alpha = 0"),
        "gain_error": row(error, long_name="standard error of the gain"),
        "alpha_of_prompt": row(of_prompt if works else np.zeros(len(of_prompt)), "prompt", units="alpha"),
        "point_alpha": row(padded(found.alphas), "point", units="alpha"),
        "target": row(padded(found.target), "point", "prompt"),
        "side_effect": row(padded(found.rise), "point", long_name="rise of the side effect"),
        "score": row(padded(found.score), "point"),
        "law_alpha": row(found.grid, "grid", units="alpha"),
        "target_law": row(found.target_law.mean, "grid"),
        "side_law": row(found.side_law, "grid"),
        "score_law": row(score_law, "grid"),
        "score_low": row(score_law - 1.96 * found.target_law.sd, "grid"),
        "score_high": row(score_law + 1.96 * found.target_law.sd, "grid"),
        "scale": row(laws["scale"], units="alpha"),
        "kl_curvature": row(laws["kl_curvature"], units="nats / alpha^2"),
        "slope": row(laws["slope"], long_name="slope of the target at 0", units="1 / alpha"),
        "side_slope": row(laws["side_slope"], long_name="slope of the side effect at 0", units="1 / alpha"),
        "forward_passes": row(work.forward_passes),
        "tokens": row(work.tokens),
    })  # fmt: skip


def _error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
