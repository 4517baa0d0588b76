"""What products with vectors tell about a linear map: leading singular values, trace, Frobenius norm."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.errors import MechsteerError

_Product = Callable[[Tensor], Tensor]
# Probes of the error estimate; it fails with a probability of 10 ** -_PROBES.
_PROBES = 6


class SVD(NamedTuple):
    """Leading singular values and vectors of each prompt's map: J is about U diag(S) Vh.

    Attributes:
        error: bound on the spectral norm of J - Q Q^T J, where Q spans what the sketch found; no singular value is
            further off than this. 0 where J was computed whole.
    """

    U: Float[Tensor, "batch d_target k"]
    S: Float[Tensor, "batch k"]
    Vh: Float[Tensor, "batch k d_source"]
    error: Float[Tensor, " batch"]

    def __repr__(self) -> str:
        return markup.told("SVD", self._asdict())

    def _repr_html_(self) -> str:
        batch, k = self.S.shape
        rows = [
            (row, *values, error)
            for row, (values, error) in enumerate(zip(self.S[:10, :8].tolist(), self.error[:10].tolist(), strict=True))
        ]
        header = ("prompt", *[f"s{i + 1}" for i in range(min(k, 8))], "bound of the error")
        about = f"k={k} of {batch} maps, U {list(self.U.shape)}, Vh {list(self.Vh.shape)}"
        return markup.card("SVD", markup.table(header, rows), about=about)


class Estimate(NamedTuple):
    """A number for each prompt and its standard error, which is 0 where it is exact."""

    value: Float[Tensor, " batch"]
    stderr: Float[Tensor, " batch"]

    def __repr__(self) -> str:
        exact = "exact" if not bool(self.stderr.any()) else f"+/- {self.stderr.detach().mean().item():.3g}"
        return f"Estimate(mean {self.value.detach().mean().item():.6g} of {len(self.value)} prompts, {exact})"

    def _repr_html_(self) -> str:
        pairs = zip(self.value[:20].tolist(), self.stderr[:20].tolist(), strict=True)
        rows = [(row, value, error) for row, (value, error) in enumerate(pairs)]
        more = [markup.faded(f"and {len(self.value) - 20} more")] if len(self.value) > 20 else []
        return markup.card("Estimate", markup.table(("prompt", "value", "standard error"), rows), *more)


def check_probes(probes: int | None) -> None:
    """
    Raises:
        MechsteerError: there are too few for a standard error.
    """
    if probes is not None and probes < 2:
        raise MechsteerError(f"probes={probes} give no standard error. Pass 2 or more, or None.")


def normal(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that are the same on every device."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(like)


def signs(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Independent +1 and -1."""
    drawn = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(like)


def randomised_svd(
    mv: _Product,
    rmv: _Product,
    omega: Float[Tensor, "p batch d_source"],
    probes: Float[Tensor, "r batch d_source"],
    *,
    k: int,
    power: int,
) -> SVD:
    """The k leading singular triples from a sketch J omega.

    Halko, Martinsson and Tropp 2011 (arXiv:0909.4061): algorithms 4.4 (power iterations with an orthonormal basis in
    between) and 5.1; the error bound is their equation 4.3 with `probes`.
    """
    basis = _orthonormal(mv(omega))
    for _ in range(power):
        basis = _orthonormal(mv(_orthonormal(rmv(basis))))
    small = rmv(basis).transpose(0, 1)  # Q^T J of each prompt [batch, p, d_source]
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    columns = basis.permute(1, 2, 0)  # [batch, d_target, p]
    seen = mv(probes).permute(1, 2, 0)
    rest = (seen - columns @ (columns.mT @ seen)).norm(dim=1).amax(-1)
    return SVD(columns @ u[..., :k], s[:, :k], vh[:, :k], 10 * math.sqrt(2 / math.pi) * rest)


def n_probes() -> int:
    """How many probes the error bound takes."""
    return _PROBES


def _orthonormal(rows: Float[Tensor, "p batch d"]) -> Float[Tensor, "p batch d"]:
    """Orthonormal rows with the same span, for each prompt."""
    return torch.linalg.qr(rows.permute(1, 2, 0)).Q.permute(2, 0, 1)


def mean_of(samples: Float[Tensor, "n batch"]) -> Estimate:
    """Mean over independent samples with its standard error."""
    return Estimate(samples.mean(0), samples.std(0) / math.sqrt(len(samples)))


def exactly(value: Float[Tensor, " batch"]) -> Estimate:
    return Estimate(value, torch.zeros_like(value))
