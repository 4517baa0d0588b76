"""Soft prefixes: embeddings in the place of a prefix's tokens, found by gradient descent, all restarts at once."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import ModelId
from mechsteer.errors import MechsteerError
from mechsteer.files import open_tensors, save_tensors, stamp
from mechsteer.interventions import SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import one_of
from mechsteer.prefix.embedding_space import EmbeddingSpace, Start
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.progress import bar
from mechsteer.result import Result, provenance

FORMAT, VERSION = "soft_prefix", 1
SCHEDULES = ("constant", "linear", "cosine")
# A restart that improves by less than this share of its loss between two checks does not count as improving.
_IMPROVED = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class FoundSoft:
    """A soft prefix that was found, and how.

        found = optimise_soft_prefix(model, slotted, ms.TeacherForcedCE())
        model.generate(slotted.without_completions(), interventions=[found.intervention()])

    Attributes:
        restarts: the best embeddings of each restart.
        losses: of these; on the held-out prompts where there were any, else on all.
        history: `loss` [step, restart] before each step, and after the last; `held_out_loss` and `distance` (to the
            nearest tokens; see `EmbeddingSpace.pull`) [check, restart]; `lr` and `penalty` [step].
        model: the weights it was found for.
    """

    restarts: Float[Tensor, "restart slot d_model"]
    losses: Float[Tensor, " restart"]
    history: Result
    model: ModelId

    @property
    def best_restart(self) -> int:
        """Which restart has the lowest loss."""
        return int(self.losses.argmin())

    @property
    def embeddings(self) -> Float[Tensor, "slot d_model"]:
        """The best ever evaluated."""
        return self.restarts[self.best_restart]

    @property
    def loss(self) -> float:
        """Of `embeddings`, on the held-out prompts where there were any."""
        return float(self.losses[self.best_restart])

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the search."""
        return self.history.provenance["options"]["ended"] == "interrupted"

    def intervention(self) -> SoftPrefix:
        """It as an intervention, for prompts with as many slots."""
        return SoftPrefix(self.embeddings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        data = self.history.data
        arrays = {name: torch.from_numpy(np.array(each.values)) for name, each in data.variables.items()}
        about = {
            "model": dict(self.model._asdict()),
            "dims": {name: list(each.dims) for name, each in data.variables.items()},
            "coordinates": list(map(str, data.coords)),
            "provenance": dict(self.history.provenance),
        }
        tensors = {"restarts": self.restarts, "losses": self.losses}
        save_tensors(
            path,
            tensors | {f"history.{name}": each for name, each in arrays.items()},
            stamp(FORMAT, VERSION) | about,
        )

    @staticmethod
    def load(path: str | os.PathLike[str], model: Model | None = None) -> "FoundSoft":
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: where given, must have the weights it was found for.

        Raises:
            MechsteerError: no such file, a damaged one, one that holds something else, or another model.
        """
        with open_tensors(path, format=FORMAT, version=VERSION) as (file, about):
            made_with = ModelId(**about["model"])
            variables = {
                name: xr.Variable(dims, file.get_tensor(f"history.{name}").numpy())
                for name, dims in about["dims"].items()
            }
            coordinates = {name: variables.pop(name) for name in about["coordinates"]}
            history = Result(xr.Dataset(variables, coordinates), provenance=about["provenance"])
            found = FoundSoft(file.get_tensor("restarts"), file.get_tensor("losses"), history, made_with)
        if model is not None:
            model.check_same(made_with, "This soft prefix")
        return found

    def __repr__(self) -> str:
        n_restarts, n_slots, d_model = self.restarts.shape
        first, steps = float(self.history["loss"].values[0].mean()), self.history.data.sizes["step"] - 1
        return (
            f"FoundSoft({n_slots} slots of {d_model}: loss {first:.3g} -> {self.loss:.3g}, best of {n_restarts} "
            f"restarts after {steps} steps)"
        )

    def _repr_html_(self) -> str:
        rows = [
            (restart, loss, "best" * (restart == self.best_restart))
            for restart, loss in enumerate(self.losses.tolist())
        ]
        about = f"{self.restarts.shape[1]} slots, {self.model.name}{', interrupted' if self.interrupted else ''}"
        return markup.card("FoundSoft", markup.table(("restart", "loss", ""), rows), about=about)


def optimise_soft_prefix(
    model: Model,
    prompts: PromptsLike,
    objective: Objective,
    *,
    n_restarts: int = 4,
    steps: int = 200,
    lr: float = 0.1,
    schedule: str = "cosine",
    warmup: int = 0,
    init: Start = "random tokens",
    noise: float = 0.5,
    held_out: Sequence[int] = (),
    check_every: int = 10,
    patience: int | None = 10,
    until: float | None = None,
    penalty: float = 0.0,
    constraint: str | None = None,
    allowed: Sequence[int] | None = None,
    weights: Float[Tensor, " _"] | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
    progress: bool = True,
) -> FoundSoft:
    """The embeddings in the slots of prompts that make an objective as small as can be, by Adam.

        slotted = ms.Prompts.from_chats(requests, model, slots=5).with_completions(reference)
        optimise_soft_prefix(model, slotted, ms.TeacherForcedCE(), held_out=range(12, 18))      # behaviour matching
        optimise_soft_prefix(model, slotted, -ms.StateMatch(states, site, align="end"))         # state matching

    Source: Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning"; the two objectives are those
    of "Steering Prefix Generation", section 3.1. All restarts are one batch with all prompts, and each has the gradient
    and the steps that it would have alone.

    Args:
        model: its parameters need no gradients, and get none.
        prompts: with slots, all of as many; with completions where the objective reads them.
        objective: one differentiable number per prompt, which goes down: `-StateMatch(...)` raises a cosine,
            `-LogitGap(...)` a gap. Its mean over prompts is the loss.
        n_restarts: how many prefixes are optimised side by side.
        steps: at most this many.
        lr: Adam's step size, in units of the root mean square entry of the allowed tokens' embeddings.
        schedule: of the step size over `steps`: "constant", or "linear" or "cosine" down to 0.
        warmup: steps over which the step size first rises from 0, linearly.
        init, noise: see `EmbeddingSpace.starts`. Embeddings that begin as random tokens seldom leave their
            neighbourhood, so that the nearest tokens of the result are those random ones: to project it, start at
            "mean", with a penalty.
        held_out: rows of `prompts` that no gradient is taken of. Their loss says which embeddings are best, and when to
            stop; without them it is the loss of all prompts.
        check_every: steps between two looks at the held-out prompts.
        patience: stop after this many such looks at which no restart had improved; None never does.
        until: stop when the loss is no more than this.
        penalty: lambda of a pull towards tokens, lambda (step / steps) mean_slot min_t |e - E(t)|^2 / spread, which
            grows from 0; see `EmbeddingSpace.pull`. It counts in full where the best embeddings are chosen.
        constraint: see `EmbeddingSpace.constraint`; applied after each step. With "tokens" the loss and its gradient
            are always taken at the nearest tokens, and the steps made from where the embeddings were (Wen et al. 2023,
            "Hard prompts made easy", algorithm 1): the embeddings that are returned are tokens' own.
        allowed: ids for "random tokens", `penalty` and `constraint`; None for all but special tokens.
        weights: of each prompt in the mean; see `PrefixLoss`.
        batch_rows: see `PrefixLoss`.
        seed: of random tokens and noise.
        tell: called with one line at each look.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        The best embeddings ever evaluated. Ctrl-C ends the search and returns the best so far; see `interrupted`.

    Raises:
        MechsteerError: an option does not exist or is out of range, prompts and objective do not fit, the objective has
            no gradient, or the loss becomes infinite or NaN.
    """
    began = time.perf_counter()
    one_of("schedule", schedule, SCHEDULES)
    for name, value, least in (
        ("n_restarts", n_restarts, 1), ("steps", steps, 1), ("check_every", check_every, 1), ("warmup", warmup, 0),
        ("patience", 1 if patience is None else patience, 1), ("penalty", penalty, 0), ("noise", noise, 0),
    ):  # fmt: skip
        if not value >= least:
            raise MechsteerError(f"{name}={value} is out of range. Pass {least} or more.")
    if not (math.isfinite(lr) and lr > 0):
        raise MechsteerError(f"lr={lr} is no step size. Pass a finite number above 0.")
    right = model.prompts(prompts)
    held = sorted(set(held_out))
    shared = {"n_prefixes": n_restarts, "weights": weights, "batch_rows": batch_rows}
    searched = [row for row in range(len(right)) if row not in held]
    if not searched:
        raise MechsteerError(f"held_out= takes all {len(right)} prompts. Leave some to search on.")
    loss = PrefixLoss(model, right, objective, rows=searched, **shared)
    loss.memory.announce("Soft prefix search", show=progress)
    held_loss = PrefixLoss(model, right, objective, rows=held, **shared) if held else None
    space = EmbeddingSpace(model, allowed)
    bring_back = space.constraint(constraint)
    through = constraint == "tokens"
    at = space.starts(init, n_restarts, loss.n_slots, noise=noise, seed=seed).requires_grad_()
    with torch.no_grad():
        at.copy_(at if through else bring_back(at))
    adam = torch.optim.Adam([at], lr=lr * space.scale)
    trail = _Trail(at.detach())
    ended = "steps"
    try:
        with bar("soft prefix", steps, show=progress) as shown:
            for step in range(steps + 1):
                here = bring_back(at.detach()) if through else at.detach()
                values, gradient = loss.gradient(here) if step < steps else (loss(here), None)
                _check(values, objective, step)
                look = step % check_every == 0 or step == steps
                pull, towards = space.pull(here) if penalty or look else (torch.zeros_like(values), None)
                scored = (held_loss(here) if held_loss else values) if look or not held_loss else None
                rate, weight = _rate(schedule, step, steps, warmup), penalty * step / steps
                trail.add(step, here, values, scored, pull, penalty, lr * rate, weight, look)
                if look and tell is not None:
                    tell(f"step {step}: loss {float(values.min()):.4f}, best {trail.best:.4f}")
                if until is not None and trail.best <= until:
                    ended = "until"
                    break
                if look and patience is not None and trail.idle >= patience:
                    ended = "patience"
                    break
                if gradient is None:
                    break
                at.grad = gradient + weight * towards if penalty and towards is not None else gradient
                adam.param_groups[0]["lr"] = lr * space.scale * rate
                adam.step()
                _check(at.detach().sum((1, 2)), objective, step)
                if constraint is not None and not through:
                    with torch.no_grad():
                        at.copy_(bring_back(at))
                shown.advance()
    except KeyboardInterrupt:
        if not trail.looks:
            raise
        ended = "interrupted"
    made = provenance(
        model=model.id, seed=seed, seconds=time.perf_counter() - began, objective=repr(objective), ended=ended,
        steps=steps, lr=lr, schedule=schedule, warmup=warmup, penalty=penalty, constraint=constraint, noise=noise,
        init=init if isinstance(init, str) else "embeddings" if isinstance(init, Tensor) else list(init),
        held_out=held, prompts=right.hash, flops=loss.flops + (held_loss.flops if held_loss else 0.0),
    )  # fmt: skip
    return FoundSoft(trail.embeddings, trail.losses, Result(trail.dataset(bool(held)), provenance=made), model.id)


def _rate(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The step size as a share of its largest."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def _check(values: Float[Tensor, " restart"], objective: Objective, step: int) -> None:
    if not bool(values.isfinite().all()):
        raise MechsteerError(
            f"{objective!r} or its step is NaN or infinite at step {step} (restart "
            f"{int((~values.isfinite()).int().argmax())}). Pass a smaller lr, or a constraint."
        )


class _Trail:
    """What was seen on the way: the losses, and the best embeddings of each restart."""

    def __init__(self, start: Float[Tensor, "restart slot d_model"]) -> None:
        self.embeddings = start.clone()
        self.losses = torch.full((len(start),), math.inf, dtype=torch.double, device=start.device)
        self._score, self._mark = self.losses.clone(), self.losses.clone()
        self.steps: list[tuple[np.ndarray, float, float]] = []
        self.looks: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.idle = 0

    @property
    def best(self) -> float:
        """The lowest loss so far."""
        return float(self.losses.min())

    def add(
        self,
        step: int,
        here: Float[Tensor, "restart slot d_model"],
        values: Float[Tensor, " restart"],
        scored: Float[Tensor, " restart"] | None,
        pull: Float[Tensor, " restart"],
        penalty: float,
        lr: float,
        weight: float,
        look: bool,
    ) -> None:
        """Take note of a step.

        Args:
            scored: the losses by which the best are chosen, where they were computed.
            penalty: what the distance counts in this choice.
            weight: what it counts in the gradient of this step.
            look: whether this is one of the looks at which patience is counted.
        """
        if scored is not None:
            score = scored + penalty * pull
            better = score < self._score
            self._score = torch.where(better, score, self._score)
            self.losses = torch.where(better, scored, self.losses)
            self.embeddings = torch.where(better[:, None, None], here, self.embeddings)
        self.steps.append((values.cpu().numpy(), lr, weight))
        if look and scored is not None:
            self.looks.append((step, scored.cpu().numpy(), pull.cpu().numpy()))
            gained = self._mark - self._score > _IMPROVED * self._score.abs()
            self.idle = 0 if bool(gained.any()) else self.idle + 1
            self._mark = torch.where(gained, self._score, self._mark)

    def dataset(self, held: bool) -> xr.Dataset:
        values, lr, weight = (np.array(each) for each in zip(*self.steps, strict=True))
        looks, scored, pull = (np.array(each) for each in zip(*self.looks, strict=True))
        arrays = {"loss": (("step", "restart"), values), "lr": ("step", lr), "penalty": ("step", weight)}
        arrays |= {"distance": (("check", "restart"), pull)}
        arrays |= {"held_out_loss": (("check", "restart"), scored)} if held else {}
        sizes = {"step": np.arange(len(values)), "check": looks, "restart": np.arange(values.shape[1])}
        return xr.Dataset(arrays, coords=sizes)
