"""Exact points of a search: what they measure, and how many forward passes that took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add
from mechsteer.model import Model
from mechsteer.objectives import Objective
from mechsteer.prompts import Prompts
from mechsteer.rows import At
from mechsteer.strength.completions import Judge, scores
from mechsteer.sweeps import sweep


@dataclass
class Work:
    """What was run.

    Attributes:
        forward_passes: one for each prompt that goes through the model once, and one for each generated token. A pass
            that carries a derivative along counts as two.
        tokens: that went through the model, those before a generated one only once (their keys and values are kept).
    """

    forward_passes: int = 0
    tokens: int = 0

    def add(self, forward_passes: int, tokens: int) -> None:
        self.forward_passes += forward_passes
        self.tokens += tokens


@dataclass(frozen=True)
class Points:
    """Measures an objective, or what a judge says of completions, at strengths of one direction.

    Attributes:
        model, direction, prompts, at: what is run.
        what: an Objective, or a judge.
        work: counts what was run.
        sampling: options of `Model.generate`, for a judge.
    """

    model: Model
    direction: Direction
    prompts: Prompts
    what: Objective | Judge
    at: At
    work: Work
    sampling: dict[str, Any] = field(default_factory=dict)

    def __call__(self, alphas: Sequence[float]) -> Float[np.ndarray, "alpha prompt"]:
        """Values at these strengths.

        Raises:
            MechsteerError: one is not finite.
        """
        values = self._objective(alphas) if isinstance(self.what, Objective) else self._judged(alphas)
        if not bool(np.isfinite(values).all()):
            place = int((~np.isfinite(values)).any(1).argmax())
            name = self.what.name if isinstance(self.what, Objective) else "judge"
            raise MechsteerError(
                f"{name} is not finite at alpha={alphas[place]:g} of {self.direction!r}. Pass largest= below that, or "
                "another objective."
            )
        return values

    def _objective(self, alphas: Sequence[float]) -> np.ndarray:
        assert isinstance(self.what, Objective)
        swept = sweep(
            self.model, self.prompts, axes={"alpha": alphas},
            build=lambda alpha: Add(self.direction, float(alpha), at=self.at),
            measure=self.what.named("value"), progress=False,
        )  # fmt: skip
        self.work.add(len(alphas) * len(self.prompts), len(alphas) * int(self.prompts.lengths.sum()))
        return swept["value"].values.astype(np.float64)

    def _judged(self, alphas: Sequence[float]) -> np.ndarray:
        assert not isinstance(self.what, Objective)
        rows = []
        for alpha in alphas:
            # The same draws at every strength: what differs is the strength alone.
            done = self.model.generate(
                self.prompts, interventions=[Add(self.direction, float(alpha), at=self.at)], progress=False,
                **self.sampling,
            )  # fmt: skip
            new = int((done.lengths - self.prompts.lengths).sum())
            self.work.add(new, int(self.prompts.lengths.sum()) + new - len(self.prompts))
            rows.append(scores(self.what, done.completions))
        return np.stack(rows)
