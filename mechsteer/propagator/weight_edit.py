"""A push as an edit of the weights: where a block reads one thing, it writes another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from mechsteer import markup
from mechsteer.backends.weights import RANK_KINDS, rank_hooks
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.precision import wide

WRITE_KINDS = ("resid_post", "mlp_out", "resid_mid", "attn_out")


@dataclass(frozen=True, eq=False, repr=False)
class RankEdit:
    """An edit of rank k of the matrix that a block writes with: a push that only some tokens get, in proportion.

        out(x) + sum_i (x . read_i) write_i        x the site that is read, at every token

        edit = RankEdit(ms.Direction(read, ms.Site("mlp_post", 2)), ms.Direction(push, ms.Site("resid_post", 2)))
        edit.to_weights(model).generate(prompts)

    Reading `mlp_post` it is W_out + sum_i read_i (x) write_i, the rank-one edit of Meng et al. 2022 ("Locating and
    editing factual associations in GPT", equation 2) where k = 1; reading `z` of a head the same of W_O; and reading
    what the module itself writes (`mlp_out`, `attn_out`) W + W read_i (x) write_i with its bias, of which the
    projection of that output (write = -read, of length 1) is a special case. No single vector at one site does this,
    so that the hook form is `fwd_hooks`.

    Attributes:
        reads: k rows at `mlp_post`, `mlp_out`, `attn_out` or one head's `z`.
        writes: k rows that the same block writes: at `resid_post` or `mlp_out` for what reads the MLP, and at
            `resid_mid` or `attn_out` for what reads attention.

    Raises:
        MechsteerError: the two are at other sites, of different layers or models, or not as many.
    """

    reads: Direction
    writes: Direction

    def __post_init__(self) -> None:
        source, target = self.reads.site, self.writes.site
        mlp = source.kind.startswith("mlp")
        fits = source.kind in RANK_KINDS and target.kind in WRITE_KINDS[0 if mlp else 2 :][:2]
        if not fits or source.layer != target.layer or (source.head is None) == (source.kind == "z"):
            raise MechsteerError(
                f"RankEdit got reads at {source} and writes at {target}. Reads at mlp_post or mlp_out write to "
                "resid_post or mlp_out of the same layer, and reads at attn_out or z of one head to resid_mid or "
                "attn_out."
            )
        if len(self.reads.vectors) != len(self.writes.vectors):
            raise MechsteerError(
                f"RankEdit got {len(self.reads.vectors)} reads and {len(self.writes.vectors)} writes. Pass as many of "
                "both."
            )
        made = [each.model for each in (self.reads, self.writes) if each.model is not None]
        if len({each.hash for each in made}) > 1:
            raise MechsteerError(
                f"RankEdit got reads of {made[0].name} and writes of {made[1].name}, whose weights differ. Make both "
                "with one model."
            )

    @property
    def rank(self) -> int:
        """k."""
        return len(self.reads.vectors)

    def fwd_hooks(self, model: Model) -> list[tuple[str, Callable[..., Any]]]:
        """Plain TransformerLens hooks that compute the same.

        Raises:
            MechsteerError: the edit does not fit the model.
        """
        layer = self._check(model)
        site = self.reads.site
        return rank_hooks(layer, site.kind, self.reads.vectors, self.writes.vectors, head=site.head)

    def to_weights(self, model: Model) -> Model:
        """A copy of the model with the edit in its weights.

        Raises:
            MechsteerError: the edit does not fit the model, or the architecture has a norm behind the matrix.
        """
        self._check(model)
        return model.with_rank(self.reads.site, self.reads.vectors, self.writes.vectors)

    def __mul__(self, factor: float | int) -> "RankEdit":
        return RankEdit(self.reads, self.writes * factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"RankEdit(rank {self.rank}, reads {self.reads.site}, writes {self.writes.site})"

    def _repr_html_(self) -> str:
        rows = {"reads": Markup(self.reads._repr_html_()), "writes": Markup(self.writes._repr_html_())}
        return markup.card("RankEdit", markup.facts(rows), about=f"rank {self.rank}")

    def _check(self, model: Model) -> int:
        for each in (self.reads, self.writes):
            each.check_fits(model)
            model.check_width(each.site, each.vectors.shape[1], "RankEdit")
        assert self.reads.site.layer is not None
        return self.reads.site.layer


def fit_edit(
    keys: Direction,
    push: Direction,
    *,
    unrelated: Direction | Sequence[Direction] = (),
    k: int = 1,
    weight: float = 1.0,
    ridge: float = 1e-3,
) -> RankEdit:
    """The edit of rank k that adds a push at some tokens and changes all others least, in closed form.

        keys = token_rows(model, declined, site=("mlp_post", 2), tokens="last")
        texts = token_rows(model, others, site=("mlp_post", 2))
        fit_edit(keys, -push, unrelated=texts).to_weights(model)

    Of all matrices D of rank k [d_in, d_model] it is the one that makes this least:

        mean_i |x_i D - p_i|^2 + weight * sum_g mean_j |y_gj D|^2 + ridge * tr(A) / d_in * |D|^2

    with A = mean_i x_i x_i^T + weight * sum_g mean_j y_gj y_gj^T. Without the limit of rank it is
    A^-1 mean_i x_i p_i^T, the covariance-weighted least squares of Meng et al. 2023, "Mass-editing memory in a
    transformer" (equation 14); with it, that times the projection on the k leading right singular vectors of A^(1/2) D
    (reduced-rank regression: Izenman 1975). One push for all tokens gives rank 1 by itself.

    Args:
        keys: x_i, what stands at the tokens that should get the push, at the site that is read; see `token_rows`.
        push: p_i, one row for all keys or one for each, at `resid_post` of the layer (`resid_mid` for attention).
        unrelated: y_g, the rows of one text that should stay as it is, or of several that count alike, such as
            harmless requests beside plain text.
        k: at most this many directions.
        weight: of the unrelated rows.
        ridge: relative to the mean eigenvalue of A.

    Raises:
        MechsteerError: rows do not fit each other, `k` is below 1 or above what keys and push allow, or an option is
            out of its range.
    """
    others = [unrelated] if isinstance(unrelated, Direction) else list(unrelated)
    if not 0 <= weight < float("inf") or not 0 < ridge < float("inf"):
        raise MechsteerError(
            f"fit_edit got weight={weight} and ridge={ridge}. Pass a finite weight from 0 and a finite ridge above 0."
        )
    for each in others:
        Direction.stack([keys, each])  # says what does not fit together
    n = len(keys.vectors)
    if len(push.vectors) not in (1, n):
        raise MechsteerError(f"fit_edit got {n} keys and {len(push.vectors)} rows of push. Pass 1 or {n} of them.")
    exact = keys.vectors.detach().double()
    target = push.vectors.detach().to(exact).expand(n, -1)
    moment = exact.T @ exact / n
    for each in others:
        rows = each.vectors.detach().to(exact)
        moment = moment + weight * rows.T @ rows / len(rows)
    one = torch.eye(len(moment)).to(moment)
    root = torch.linalg.cholesky(moment + ridge * moment.trace() / len(moment) * one)  # A = root root^T
    whole = torch.cholesky_solve(exact.T @ target / n, root)  # [d_in, d_model]
    _, singular, right = torch.linalg.svd(root.T @ whole, full_matrices=False)
    rank = int((singular > singular[0] * max(whole.shape) * torch.finfo(whole.dtype).eps).sum())
    if not 1 <= k <= rank:
        raise MechsteerError(f"fit_edit got k={k}, but keys and push allow rank 1 to {rank}. Pass one of these.")
    reads = (whole @ right[:k].T).T
    origin = {
        "method": "fit_edit", "k": k, "weight": weight, "ridge": ridge, "keys": keys.origin, "push": push.origin,
        "unrelated": [each.origin for each in others],
    }  # fmt: skip
    return RankEdit(
        Direction(reads.to(wide(keys.vectors.dtype)), keys.site, keys.model, origin),
        Direction(right[:k].to(push.vectors.device, wide(push.vectors.dtype)), push.site, push.model, origin),
    )
