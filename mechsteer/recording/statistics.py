"""Mean, covariance and largest values of rows that are seen once, in batches."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RunningStatistics:
    """Statistics of the rows of one site seen so far.

    Attributes:
        n: number of rows.
        mean: over the rows.
        scatter: sum over rows of the outer product of the deviation from the mean with itself.
        top: the largest values of each feature, and example, position and token of each.
    """

    n: int
    mean: Float[Tensor, "*feature"]
    scatter: Float[Tensor, "d d"] | None
    top: tuple[Float[Tensor, "k *feature"], Int[Tensor, "k *feature 3"]] | None

    @staticmethod
    def read(n: int, tensors: Mapping[str, Tensor]) -> "RunningStatistics":
        """What `tensors` gave, for `n` rows."""
        top = (tensors["top.values"], tensors["top.source"]) if "top.values" in tensors else None
        return RunningStatistics(n, tensors["mean"], tensors.get("scatter"), top)

    def tensors(self) -> dict[str, Tensor]:
        """All of it but `n`, by name."""
        found: dict[str, Tensor | None] = {"mean": self.mean, "scatter": self.scatter}
        if self.top is not None:
            found |= dict(zip(("top.values", "top.source"), self.top, strict=True))
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def start(rows: Float[Tensor, "row *feature"], *, top_k: int, covariance: bool) -> "RunningStatistics":
        """No rows yet, of features as in `rows`."""
        rows = _on_fp64_device(rows)
        shape, d = rows.shape[1:], rows[0].numel()
        values = rows.new_full((top_k, *shape), -torch.inf)
        return RunningStatistics(
            n=0,
            mean=rows.new_zeros(shape, dtype=torch.float64),
            scatter=rows.new_zeros((d, d), dtype=torch.float64) if covariance else None,
            top=(values, rows.new_full((top_k, *shape, 3), -1, dtype=torch.int64)) if top_k else None,
        )

    def updated(self, rows: Float[Tensor, "row *feature"], index: Int[Tensor, "row 3"]) -> "RunningStatistics":
        """With more rows: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1."""
        rows = _on_fp64_device(rows)
        old, new, total = self.n, len(rows), self.n + len(rows)
        mean, exact = self.mean.to(rows.device), rows.double()
        batch_mean = exact.mean(0)
        delta, scatter = batch_mean - mean, self.scatter
        if scatter is not None:
            centred, shift = (exact - batch_mean).flatten(1), delta.flatten()
            scatter = scatter.to(rows.device) + centred.T @ centred + torch.outer(shift, shift) * (old * new / total)
        top = None if self.top is None else _larger(*self.top, rows, index.to(rows.device))
        return RunningStatistics(total, mean + delta * (new / total), scatter, top)


def _on_fp64_device(rows: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return rows if rows.is_cuda else rows.cpu()  # Apple's GPUs have no fp64.


def _larger(
    values: Float[Tensor, "k *feature"],
    source: Int[Tensor, "k *feature 3"],
    rows: Float[Tensor, "row *feature"],
    index: Int[Tensor, "row 3"],
) -> tuple[Float[Tensor, "k *feature"], Int[Tensor, "k *feature 3"]]:
    """The k largest of the values so far and of more rows, for each feature; the earlier one where they are equal."""
    values, source, k = values.to(rows.device), source.to(rows.device), len(values)
    # After a while few rows hold anything large enough, and sorting these alone is what makes this cheap.
    better = (rows > values[-1]).flatten(1).any(1)
    rows, index = rows[better], index[better]
    if not len(rows):
        return values, source
    merged = torch.cat([values, rows])
    # torch.topk does not say which of equal values it takes.
    order = merged.sort(dim=0, descending=True, stable=True).indices[:k]
    before = source.gather(0, order.clamp(max=k - 1)[..., None].expand_as(source))
    fresh = index[(order - k).clamp(min=0)]
    return merged.gather(0, order), torch.where((order < k)[..., None], before, fresh)
