"""What a forward pass gave: logits, and the typed activation cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts
from mechsteer.site import Site, SiteLike


class ModelId(NamedTuple):
    """Which weights something was made with: two models with the same `hash` compute the same."""

    name: str
    hash: str
    processed: bool


class Activations(Mapping[Site, Tensor]):
    """Immutable mapping Site -> tensor, laid out as the prompts are ([batch, pos, ...] or [batch, head, dest, src])."""

    def __init__(self, values: Mapping[Site, Tensor], *, prompts: Prompts, model: ModelId) -> None:
        self._values = dict(sorted(values.items(), key=lambda item: item[0].order))
        self.prompts = prompts
        self.model = model

    def __getitem__(self, site: SiteLike) -> Tensor:
        return self._values[Site.of(site)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What one forward pass gave.

    Attributes:
        prompts: what was run.
        logits: at the tokens in `read`, in the order of (batch, pos).
        read: True for tokens whose logits were computed; all real tokens unless less was asked for.
        activations: the recorded sites.
        example: which row of the prompts that were asked for each row of `prompts` is. Counts up from 0 except inside
            a sweep, where a batch holds one row per cell and example. Objectives that hold a value per example
            (baseline logits, targets) look it up with this.
    """

    prompts: Prompts
    rows: Float[Tensor, "row d_vocab"]
    read: Bool[Tensor, "batch pos"]
    activations: Activations
    example: Int[Tensor, " batch"]
