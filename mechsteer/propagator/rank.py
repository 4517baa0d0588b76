"""The rank of a behaviour: how many directions of the residual stream it takes to remove it, or to bring it about."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.hooks import Intervention
from mechsteer.interventions import Ablate, Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import KLFromBaseline, Objective, TeacherForcedCE
from mechsteer.objectives.base import one_of
from mechsteer.precision import precise
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.propagator.intervals import check_finite, with_intervals
from mechsteer.result import Result, provenance
from mechsteer.run import Run
from mechsteer.sweeps import sweep

Judge = Callable[[str], bool | float]
"""Whether, or how much, a completion shows the behaviour."""

PUSHES = ("ablate", "add")
FORMS = ("hooks", "weights")


# ---- how many directions they span ----


def spectrum(rows: Mapping[str, Direction] | Direction) -> Result:
    """Singular values of rows, and how many directions that is.

    With p_i = s_i^2 / sum_j s_j^2, the share of the rows' squared length along component i:

        effective_rank = exp(-sum_i p_i log p_i)        Roy & Vetterli 2007, there for s_i instead of s_i^2
        participation_ratio = 1 / sum_i p_i^2
        rank_90 = the fewest components with a share of at least 0.9

    The mean is not subtracted: what all rows have in common is what a single direction can stand for.

    Args:
        rows: one Direction, or several by name, such as those of `paired_differences` and `prompt_gradients`.

    Returns:
        `singular` and `share` [direction, component]; `effective_rank`, `participation_ratio`, `rank_90` and
        `mean_share`, the share of the rows' squared length along their mean, [direction].

    Raises:
        MechsteerError: there are none, or all rows of one are zero.
    """
    named = {"rows": rows} if isinstance(rows, Direction) else dict(rows)
    if not named:
        raise MechsteerError("spectrum got no directions. Pass at least one.")
    width = max(min(each.vectors.shape) for each in named.values())
    values, shares, numbers = [], [], []
    for name, each in named.items():
        exact = each.vectors.detach().double().cpu()
        singular = torch.linalg.svdvals(exact)
        total = (singular**2).sum()
        if not total > 0:
            raise MechsteerError(f"All rows of {name!r} are zero, so they span nothing. Check what they were made of.")
        share = singular**2 / total
        mean = exact.mean(0)
        along = exact @ mean / torch.linalg.vector_norm(mean).clamp(min=torch.finfo(exact.dtype).tiny)
        numbers.append(
            {
                "effective_rank": float(torch.special.entr(share).sum().exp()),
                "participation_ratio": float(1 / (share**2).sum()),
                # Rounding must not make the last component needed.
                "rank_90": int((share.cumsum(0) < 0.9 - 1e-12).sum()) + 1,
                "mean_share": float((along**2).sum() / total),
            }
        )
        for kept, row in ((values, singular), (shares, share)):
            kept.append(np.pad(row.numpy(), (0, width - len(row)), constant_values=np.nan))
    data = xr.Dataset(
        {
            "singular": (("direction", "component"), np.stack(values)),
            "share": (("direction", "component"), np.stack(shares)),
            **{name: ("direction", np.array([each[name] for each in numbers])) for name in numbers[0]},
        },
        coords={"direction": list(named), "component": np.arange(1, width + 1)},
    )
    origins = {name: dict(each.origin) for name, each in named.items()}
    return Result(data, provenance=provenance(model=next(iter(named.values())).model, origins=origins))


def principal(rows: Direction, k: int) -> Direction:
    """An orthonormal basis of the k directions along which rows are longest: their first right singular vectors.

    The first points where the mean of the rows does.

    Raises:
        MechsteerError: the rows span fewer than k dimensions.
    """
    exact = rows.vectors.detach().double()
    _, singular, basis = torch.linalg.svd(exact, full_matrices=False)
    rank = int((singular > singular[0] * max(exact.shape) * torch.finfo(rows.vectors.dtype).eps).sum())
    if not 1 <= k <= rank:
        raise MechsteerError(
            f"{k} directions were asked for, but the rows at {rows.site} span {rank}. Pass 1 to {rank}."
        )
    signs = torch.where(basis[:k] @ exact.mean(0) < 0, -1.0, 1.0)[:, None]
    origin = {"method": "principal", "k": k, "of": rows.origin}
    return Direction((signs * basis[:k]).to(precise(rows.vectors)), rows.site, rows.model, origin)


# ---- what removing or adding them does ----


def rank_test(
    model: Model,
    prompts: PromptsLike,
    rows: Direction,
    *,
    behaviour: Objective | Judge,
    push: str = "ablate",
    form: str = "hooks",
    ks: Sequence[int] = (0, 1, 2, 4, 8),
    unrelated: PromptsLike | None = None,
    everywhere: bool = True,
    at: Any = None,
    alpha: float = 1.0,
    n_random: int = 3,
    seed: int = 0,
    max_new_tokens: int = 40,
    progress: bool = True,
) -> Result:
    """Ablate or add the top-k subspace of rows, and as many random subspaces, and measure what that does.

    With the orthonormal basis U = `principal(rows, k)`, m the mean of the rows, and random orthonormal rows R:

        ablate    x - U^T U x       against x - R^T R x, of the same dimension k
        add       x + alpha U^T c   against x + alpha R^T c with c = U m, of the same dimension and length

    Ablated everywhere with k = 1, and added at one layer, this is the test of Arditi et al. 2024, "Refusal in language
    models is mediated by a single direction", sections 2.4 and 3.

    Args:
        model: to run.
        prompts: whose behaviour is measured: those that show it when it is ablated, others when it is added.
        rows: one row for each prompt of another set, or a single vector; see `paired_differences`.
        behaviour: an Objective, or a judge of completions, which are then generated greedily.
        push: "ablate" or "add".
        form: "hooks", or "weights": each cell is a copy of the model with the same push in its weights, which gives the
            same numbers where there is such a copy; see `Ablate.to_weights` and `Add.to_weights`.
        ks: numbers of directions; 0 for no intervention.
        unrelated: texts without the behaviour, on which side effects are measured; None leaves them out. Their
            unsteered log-probabilities are kept: d_vocab numbers for each token.
        everywhere: ablate from all that is written to the residual stream; else at the rows' site alone.
        at: which tokens; see `Intervention`. None for all, also those generated. Side effects are on texts' tokens
            before the ones touched 0 by construction, so that `at=-1` says nothing about texts without completions.
        alpha: of what is added.
        n_random: how many random subspaces.
        seed: of the random subspaces.
        max_new_tokens: of the completions that a judge sees.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        `behaviour` [subspace, k, prompt]: the objective, or 1 where the judge says yes; and with `unrelated`
        `cross_entropy` (its rise over the unsteered run, of what `TeacherForcedCE(first=0)` reads: completions, or of
        texts without any all but the first token) and `kl` (from the unsteered run, mean over the tokens that predict
        these), both in nats a token, [subspace, k, text]. `subspace` is "found", "random 0", ... The 95 % bootstrap
        interval of each mean over prompts or texts is `behaviour_low`, `behaviour_high`, ... [subspace, k].

    Raises:
        MechsteerError: an unknown push or form, too many directions, numbers that are not finite, prompts and
            interventions that do not fit the model, or a push that no edit of the weights equals.
    """
    began = time.perf_counter()
    one_of("push", push, PUSHES)
    one_of("form", form, FORMS)
    rows.check_fits(model)
    counts = list(dict.fromkeys(ks))
    if not counts or min(counts) < 0 or n_random < 0:
        raise MechsteerError(
            f"rank_test got ks={list(ks)} and n_random={n_random}. Pass numbers of 0 or more, one k at least."
        )
    given = model.prompts(prompts)
    bases = _bases(rows, max(counts), n_random, seed)
    mean = rows.vectors.detach().double().mean(0)

    def build(subspace: str, k: int) -> list[Intervention]:
        if k == 0:
            return []
        basis = bases[subspace][:k]
        if push == "ablate":
            part = Direction(basis.to(precise(rows.vectors)), rows.site, rows.model, {"method": "rank_test", "k": k})
            return [Ablate(part, everywhere=everywhere, at=at)]
        vector = (bases["found"][:k] @ mean) @ basis
        added = Direction(vector.to(precise(rows.vectors)), rows.site, rows.model, {"method": "rank_test"})
        return [Add(added, alpha, at=at)]

    axes = {"subspace": list(bases), "k": counts}
    texts = None if unrelated is None else _Texts.of(model, unrelated)

    def measured(on: Model, axes: Mapping[str, list], build: Build, progress: bool) -> xr.Dataset:
        if isinstance(behaviour, Objective):
            named = {"behaviour": behaviour}
            data = sweep(on, given, axes=axes, build=build, measure=named, progress=progress).data
            check_finite(data["behaviour"], repr(behaviour))
        else:
            data = _judged(on, given, axes, build, behaviour, max_new_tokens, progress)
        return data if texts is None else data.merge(texts.measured(on, axes, build, progress))

    if form == "hooks":
        data = measured(model, axes, build, progress)
    else:
        data = _of_weights(model, axes, build, measured, progress)
    data["k"].attrs["long_name"] = "number of directions"
    data = with_intervals(data, ["behaviour"], seed=seed)
    if texts is not None:
        data = with_intervals(data, ["cross_entropy", "kl"], over="text", seed=seed)
    about = {
        "push": push, "form": form, "everywhere": everywhere and push == "ablate", "at": repr(at), "alpha": alpha,
        "behaviour": repr(behaviour) if isinstance(behaviour, Objective) else getattr(behaviour, "__name__", "judge"),
        "site": str(rows.site), "rows": dict(rows.origin), "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    seconds = time.perf_counter() - began
    return Result(data, provenance=provenance(model=model.id, seed=seed, seconds=seconds, **about))


def least_rank(result: Result, *, behaviour: float, cross_entropy: float | None = None) -> int | None:
    """The smallest k of a `rank_test` whose found subspace does it.

    Args:
        result: of `rank_test`.
        behaviour: the mean over prompts must be at most this after "ablate", and at least this after "add".
        cross_entropy: its mean rise on unrelated texts must be below this, in nats a token; None lets it be anything.

    Returns:
        k, or None where no k of the result does it.

    Raises:
        MechsteerError: `cross_entropy` is asked for and the test had no unrelated texts.
    """
    found = result.data.sel(subspace="found")
    mean = found["behaviour"].mean("prompt")
    does = mean <= behaviour if result.provenance["options"]["push"] == "ablate" else mean >= behaviour
    if cross_entropy is not None:
        if "cross_entropy" not in found:
            raise MechsteerError("This rank_test had no unrelated texts. Pass unrelated= to it, or cross_entropy=None.")
        does = does & (found["cross_entropy"].mean("text") < cross_entropy)
    return min((int(k) for k in does["k"].values[does.values]), default=None)


def _bases(rows: Direction, most: int, n_random: int, seed: int) -> dict[str, Float[Tensor, "k d"]]:
    """Orthonormal rows by name; the first k of each span its subspace of dimension k."""
    found = principal(rows, max(1, most)).vectors.double()
    generator = torch.Generator().manual_seed(seed)
    out = {"found": found}
    for index in range(n_random):
        drawn = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        out[f"random {index}"] = torch.linalg.qr(drawn.T).Q.T.to(found)
    return out


Build = Callable[[str, int], list[Intervention]]


def _of_weights(
    model: Model,
    axes: Mapping[str, list],
    build: Build,
    measured: Callable[[Model, Mapping[str, list], Build, bool], xr.Dataset],
    progress: bool,
) -> xr.Dataset:
    """The same cells, each measured on a copy of the model that holds the push in its weights, one copy at a time."""
    columns: list[xr.Dataset] = []
    with bar("edited models", len(axes["subspace"]) * len(axes["k"]), show=progress) as shown:
        for subspace in axes["subspace"]:
            cells: list[xr.Dataset] = []
            for k in axes["k"]:
                edited = model
                for each in build(subspace, k):
                    assert isinstance(each, Ablate | Add)
                    edited = each.to_weights(edited)
                cells.append(measured(edited, {"subspace": [subspace], "k": [k]}, lambda subspace, k: [], False))
                shown.advance()
            columns.append(xr.concat(cells, "k"))
    return xr.concat(columns, "subspace")


def _judged(
    model: Model, prompts: Prompts, axes: Mapping[str, list], build: Build, judge: Judge, n_new: int, progress: bool
) -> xr.Dataset:
    values = np.zeros((*(len(each) for each in axes.values()), len(prompts)))
    with bar("completions", values.size, show=progress) as shown:
        for i, subspace in enumerate(axes["subspace"]):
            for j, k in enumerate(axes["k"]):
                if k == 0 and i > 0:
                    values[i, j] = values[0, j]  # no intervention, whatever the subspace
                else:
                    done = model.generate(
                        prompts, interventions=build(subspace, k), max_new_tokens=n_new, progress=False
                    )
                    values[i, j] = [float(judge(text)) for text in done.completions]
                shown.advance(len(prompts))
    names = list(prompts.labels) if prompts.labels else np.arange(len(prompts))
    data = xr.Dataset({"behaviour": (("subspace", "k", "prompt"), values)}, {**axes, "prompt": names})
    check_finite(data["behaviour"], getattr(judge, "__name__", "The judge"))
    return data


class _Texts:
    """Unrelated texts, and what the model makes of them without a push."""

    def __init__(self, texts: Prompts, span: str, unsteered: Run) -> None:
        self.texts = texts
        self.measures = {
            "cross_entropy": TeacherForcedCE(first=0, span=span), "kl": KLFromBaseline(unsteered, where=span),
        }  # fmt: skip
        self.before = self.measures["cross_entropy"](unsteered).double().cpu().numpy()

    @staticmethod
    def of(model: Model, texts: PromptsLike) -> "_Texts":
        right = model.prompts(texts).padded("right")
        span = "completion" if bool(right.span("completion").any(1).all()) else "all"
        return _Texts(right, span, model.run(right))

    def measured(self, model: Model, axes: Mapping[str, list], build: Build, progress: bool) -> xr.Dataset:
        found = sweep(model, self.texts, axes=axes, build=build, measure=self.measures, progress=progress).data
        found = found.rename(prompt="text")
        return found.assign(cross_entropy=found["cross_entropy"] - self.before)
