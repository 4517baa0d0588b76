"""The typed activation cache."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

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
