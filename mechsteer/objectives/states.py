"""Objectives that read activations."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechsteer.activations import Activations, ModelId
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.objectives.base import Objective, assign, examples_of, one_of, token_mean, tokens_at
from mechsteer.precision import precise
from mechsteer.prompts import ROLES, Prompts
from mechsteer.run import Run
from mechsteer.site import Site, SiteLike


@dataclass(frozen=True, eq=False, repr=False, init=False)
class StateMatch(Objective):
    """How like a target the activations at a site are, as the mean over tokens.

        cosine: mean_t <x_t, y_t> / (|x_t| |y_t|)        in [-1, 1], higher is closer
        mse:    mean_t |x_t - y_t|^2 / d                 0 or more, lower is closer

    x are the run's activations and y the target's; without a head, those of all heads of a site are put end to end.
    With the activations under a reference prefix as the target this is the state matching of "Steering Prefix
    Generation", section 3.1.

    Args:
        target: activations of as many prompts, at the same site of the same model.
        site: where; its position, if it has one, stands for `at`.
        at: at which tokens: "decision" (the default) or "last", the prompt's last one before any completion; "all"; a
            span's name; or an absolute position.
        measure: "cosine" or "mse".
        align: which of the target's tokens a token is compared with: "start", the one at the same absolute position, or
            "end", the one as far from the prompt's last before any completion, for prefixes of unlike lengths.

    Raises:
        MechsteerError: an option has no such value, or the target lacks the site. When called: another model, a prompt
            without such a token, or one whose counterpart lies outside the target's prompt.
    """

    states: Float[Tensor, "example pos feature"]
    prompts: Prompts
    model: ModelId
    site: Site
    at: int | str
    measure: str
    align: str

    def __init__(
        self,
        target: Activations,
        site: SiteLike,
        *,
        at: int | str | None = None,
        measure: str = "cosine",
        align: str = "start",
    ) -> None:
        one_of("StateMatch(measure=)", measure, ("cosine", "mse"))
        one_of("StateMatch(align=)", align, ("start", "end"))
        place, at = _place(site, at, "StateMatch")
        assign(self, site=place, at=at, measure=measure, align=align)
        assign(self, states=target[place].detach().flatten(2), prompts=target.prompts, model=target.model)
        assign(self, n_examples=len(target.prompts))

    def sites(self) -> tuple[Site, ...]:
        """The hook point that is compared."""
        return (self.site.point,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        _check_model(self, self.model, run)
        prompts, then = run.prompts, self.prompts
        example = examples_of(run, self.n_examples)
        mask = tokens_at(prompts, self.at)
        position = prompts.positions
        if self.align == "end":
            position = position + (then.decision.to(position.device)[example] - prompts.decision)[:, None]
        lengths, starts = (values.to(position.device)[example] for values in (then.lengths, then.mask.int().argmax(1)))
        outside = mask & ((position < 0) | (position >= lengths[:, None]))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise MechsteerError(
                f"StateMatch(at={self.at!r}, align={self.align!r}) compares prompt {int(example[row])} with position "
                f"{int(position[row, column])} of its target, which has {int(lengths[row])} tokens. "
                "Pass align='end' for prefixes of unlike lengths, or other tokens with at=."
            )
        current = precise(run.activations[self.site].flatten(2)[mask])
        rows, columns = example[:, None].expand_as(mask)[mask], (position + starts[:, None])[mask]
        wanted = self.states[rows.to(self.states.device), columns.to(self.states.device)].to(current)
        if self.measure == "cosine":
            likeness = F.cosine_similarity(current, wanted, dim=-1)
        else:
            likeness = (current - wanted).square().mean(-1)
        return token_mean(likeness, mask, mask.to(likeness.dtype), f"at {self.at!r}")

    def __repr__(self) -> str:
        options = f"at={self.at!r}, measure={self.measure!r}, align={self.align!r}"
        return f"StateMatch(<{self.n_examples} prompts>, {self.site!r}, {options})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Projection(Objective):
    """How far the activations reach along a direction: mean_t <x_t, v / |v|>, in the activations' own units.

    Args:
        direction: one vector, of which only where it points counts; read at its site.
        at: at which tokens; as for `StateMatch`.

    Raises:
        MechsteerError: several vectors, a vector of zeros, or no such `at`. When called: another model or width, or a
            prompt without such a token.
    """

    direction: Direction
    site: Site
    at: int | str

    def __init__(self, direction: Direction, *, at: int | str | None = None) -> None:
        site, at = _place(direction.site, at, "Projection")
        assign(self, direction=direction.unit, site=site, at=at)

    def sites(self) -> tuple[Site, ...]:
        """The direction's hook point."""
        return (self.site.point,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        _check_model(self, self.direction.model, run)
        mask = tokens_at(run.prompts, self.at)
        values = precise(run.activations[self.site].flatten(2)[mask])
        vector = self.direction.vector.detach().to(values)
        if len(vector) != values.shape[-1]:
            raise MechsteerError(
                f"Projection has a direction of width {len(vector)} but {self.site!r} has {values.shape[-1]}. "
                "Make the direction with the same model."
            )
        return token_mean(values @ vector, mask, mask.to(values.dtype), f"at {self.at!r}")

    def __repr__(self) -> str:
        return f"Projection({self.site!r}, at={self.at!r})"


def _place(site: SiteLike, at: int | str | None, what: str) -> tuple[Site, int | str]:
    """The site without its position, and where to read it."""
    place = Site.of(site)
    if place.axes[1] != "pos":
        raise MechsteerError(
            f"{what} got {place!r}, which has no features for each token. Pass a site such as resid_post."
        )
    if at is not None and place.pos is not None and at != place.pos:
        raise MechsteerError(f"{what}: at={at!r} and {place!r} both say where. Give one of them.")
    at = place.pos if at is None else at
    at = "decision" if at is None else at
    if isinstance(at, str):
        one_of(f"{what}(at=)", at, ("decision", "last", "all", *ROLES))
    return place.at(pos=None), at


def _check_model(objective: Objective, made_with: ModelId | None, run: Run) -> None:
    if made_with is not None and made_with.hash != run.activations.model.hash:
        here = run.activations.model
        raise MechsteerError(
            f"{type(objective).__name__} was made with {made_with.name} (weights {made_with.hash[:12]}), and the run "
            f"is of {here.name} (weights {here.hash[:12]}). Make it again from the model that you run."
        )
