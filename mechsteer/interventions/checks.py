"""What the interventions check of their arguments."""

import torch
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts
from mechsteer.site import Site, SiteLike


def site_of(site: SiteLike | None, direction: Direction | None, name: str) -> Site:
    if site is None and direction is None:
        raise MechsteerError(f"{name} got a tensor without a site. Pass site=('resid_post', layer), or a Direction.")
    return Site.of(site) if site is not None else direction.site  # type: ignore[union-attr]


def finite(value: float | Tensor, name: str) -> float | Tensor:
    if isinstance(value, Tensor) and (value.ndim or value.requires_grad):
        if value.ndim > 1:
            raise MechsteerError(f"{name} has shape {list(value.shape)}. Pass one number, or one per example [batch].")
        if not bool(torch.isfinite(value).all()):
            raise MechsteerError(f"{name} holds NaN or infinity. Pass finite numbers.")
        return value
    number = float(value)
    if number != number or abs(number) == float("inf"):
        raise MechsteerError(f"{name}={number} is not finite. Pass finite numbers.")
    return number


def check_batch(value: float | Tensor, prompts: Prompts, name: str) -> None:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] != len(prompts):
        raise MechsteerError(
            f"{name} has {value.shape[0]} numbers for {len(prompts)} prompts. Pass one number, or one per prompt."
        )


def as_direction(direction: Direction | Tensor, site: SiteLike | None, name: str) -> Direction:
    """A Direction for what was passed, which checks that it is finite and belongs to the site."""
    if isinstance(direction, Direction):
        return direction
    where = site_of(site, None, name)
    vectors = direction if direction.ndim == 2 else direction[None]
    return Direction(vectors, site=where.at(pos=None), model=None, origin={})
