"""The two corrections of AtP* (Kramár, Lieberum, Shah and Nanda 2024, arXiv:2403.00745) to attribution patching."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.site import Site

# From gradients by site, and tokens by rule, to estimates [rule, batch], and [.., head], and [.., head, src].
Estimator = Callable[[Mapping[Site, Tensor], Tensor], Tensor]
QUERIES, KEYS = ("q", "rot_q"), ("k", "rot_k")


# ---- gradients that flow past a layer: GradDrop ----


class Gate:
    """Lets gradients into what each layer adds to the residual stream, except into that of the layer `dropped`.

    It acts on backward passes, so that one forward pass serves all of them.
    """

    def __init__(self) -> None:
        self.dropped: int | None = None

    def hook(self, layer: int) -> Callable[..., Tensor]:
        """A hook for `attn_out` and `mlp_out` of a layer; values stay the same."""
        return lambda tensor, hook: _Gated.apply(tensor, self, layer)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gate: Gate, layer: int) -> Tensor:
        ctx.gate, ctx.layer = gate, layer
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        return None if ctx.gate.dropped == ctx.layer else gradients[0], None, None


# ---- queries and keys through the softmax: the QK fix ----


def softmax_sites(model: Model, points: Sequence[Site]) -> tuple[list[Site], list[Site]]:
    """What `softmaxed` needs of these points besides themselves: sites to record, and patterns for gradients.

    Raises:
        MechsteerError: the scores of this architecture cannot be computed.
    """
    layers = list(dict.fromkeys(point.layer for point in points if point.kind in (*QUERIES, *KEYS)))
    if layers and model.decoder is None:
        raise MechsteerError(
            f"AtP* computes attention patterns anew, and mechsteer's forward pass does not cover {model.name}. Pass "
            "method='gradient' or 'integrated_gradients', or leave queries and keys out of sites."
        )
    kinds = (*(_as_scored(model, kind) for kind in ("q", "k")), "attn_scores", "pattern")
    return [Site(kind, layer) for layer in layers for kind in kinds], [Site("pattern", layer) for layer in layers]


def softmaxed(
    model: Model, points: Sequence[Site], base: Mapping[Site, Tensor], source: Mapping[Site, Tensor], prompts: Prompts
) -> dict[Site, Estimator]:
    """Estimators of the points that are queries or keys.

    Args:
        base, source: activations of both runs at `softmax_sites`.
        prompts: of the base run, padded on the right.

    Raises:
        MechsteerError: scores computed here do not give the pattern that the model has.
    """
    return {
        point: (_Queries if point.kind in QUERIES else _Keys)(_Attention.of(model, point.layer, base, source, prompts))
        for point in points
        if point.kind in (*QUERIES, *KEYS) and point.layer is not None
    }


def _as_scored(model: Model, kind: str) -> str:
    """The kind at which queries or keys are as the scores take them: after norm and rotation."""
    return f"rot_{kind}" if Site(f"rot_{kind}", 0).hook_name in model.hooked.hook_dict else kind


@dataclass(frozen=True)
class _Attention:
    """One layer's attention in the base run, and its scores with other queries or keys.

    Norm and rotation act on one position at a time, so that a patched query, as the scores take it, is the source's.

    Attributes:
        site: of the pattern.
        scores: -inf where causality or a window hides the source.
        patched_queries: scores of the source run's queries with the base run's keys.
        patched_keys: the other way round.
        n_kv: heads that keys have; consecutive query heads share one.
    """

    site: Site
    scores: Float[Tensor, "batch head dest src"]
    patched_queries: Float[Tensor, "batch head dest src"]
    patched_keys: Float[Tensor, "batch head dest src"]
    n_kv: int

    @staticmethod
    def of(
        model: Model, layer: int, base: Mapping[Site, Tensor], source: Mapping[Site, Tensor], prompts: Prompts
    ) -> "_Attention":
        q, k = (Site(_as_scored(model, kind), layer) for kind in ("q", "k"))
        scale, cap = model.decoder.layers[layer].scale, model.decoder.soft_cap
        recorded = precise(base[Site("attn_scores", layer)])
        hidden = recorded <= torch.finfo(base[Site("attn_scores", layer)].dtype).min / 2

        def scores(queries: Tensor, keys: Tensor) -> Float[Tensor, "batch head dest src"]:
            queries, keys = precise(queries).transpose(1, 2), precise(keys).transpose(1, 2)
            products = queries @ keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1).mT * scale
            products = torch.tanh(products / cap) * cap if cap > 0 else products
            return products.masked_fill(hidden, -torch.inf)

        own = scores(base[q], base[k])
        pattern = base[Site("pattern", layer)]
        wrong = float((own.softmax(-1) - precise(pattern)).transpose(1, 2)[prompts.mask].abs().max())
        if not wrong <= max(1e-4, 10 * torch.finfo(pattern.dtype).eps):
            raise MechsteerError(
                f"AtP* computes attention patterns anew, and those of layer {layer} of {model.name} differ by "
                f"{wrong:.2g} from the model's own. Pass method='gradient' or 'integrated_gradients', or leave queries "
                "and keys out of sites."
            )
        return _Attention(
            Site("pattern", layer), own, scores(source[q], base[k]), scores(base[q], source[k]), base[k].shape[2]
        )

    def gradient(self, gradients: Mapping[Site, Tensor]) -> Float[Tensor, "batch head dest src"]:
        """dM/dP."""
        return gradients[self.site] if self.site in gradients else torch.zeros_like(self.scores)


@dataclass(frozen=True)
class _Queries:
    """<P' - P, dM/dP> (equation 7). A patched query changes its own row of the pattern and no other."""

    attention: _Attention

    def __call__(
        self, gradients: Mapping[Site, Tensor], where: Bool[Tensor, "rule batch pos"]
    ) -> Float[Tensor, "rule batch head"]:
        change = self.attention.patched_queries.softmax(-1) - self.attention.scores.softmax(-1)
        rows = (change * self.attention.gradient(gradients)).sum(-1)
        return torch.einsum("rbd,bhd->rbh", where.to(rows), rows)


@dataclass(frozen=True)
class _Keys:
    """<P' - P, dM/dP> (equation 10). A patched key changes one column of the scores, and so all rows of the pattern."""

    attention: _Attention

    def __call__(
        self, gradients: Mapping[Site, Tensor], where: Bool[Tensor, "rule batch pos"]
    ) -> Float[Tensor, "rule batch head"]:
        gradient = self.attention.gradient(gradients)
        columns = self._one_at_a_time(gradient).sum(2)
        values = torch.einsum("rbs,bhs->rbh", where.to(columns), columns)
        # Keys of several positions meet in one softmax.
        several = (where.sum(-1) > 1).any(-1).nonzero()[:, 0].tolist()
        before = self.attention.scores.softmax(-1)
        for rule in several:
            columns = where[rule][:, None, None, :]
            scores = torch.where(columns, self.attention.patched_keys, self.attention.scores)
            values[rule] = ((scores.softmax(-1) - before) * gradient).sum((2, 3))
        return values.unflatten(-1, (self.attention.n_kv, -1)).sum(-1)

    def _one_at_a_time(self, gradient: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        """sum_j (P'_ij - P_ij) G_ij for a key patched at each source t alone, for each destination i, without a softmax
        for each pair.

        The other sources keep their ratios, and so their mean m_it of G, weighted with P. What t gains, they lose:

            (P'_it - P_it) (G_it - m_it),    P'_it = sigmoid(s'_it - r_it),    r_it = log sum_{j != t} exp(s_ij)
        """
        scores = self.attention.scores
        p = scores.softmax(-1)
        weighted = p * gradient
        rest = scores.logsumexp(-1, keepdim=True) + torch.log1p(-p)
        mean = (weighted.sum(-1, keepdim=True) - weighted) / (1 - p)
        # The largest may hold the whole weight to all digits: what is left without it is added up anew. All others hold
        # a half at most, and subtracting them is safe.
        top = scores.argmax(-1, keepdim=True)
        others = scores.scatter(-1, top, -torch.inf)
        rest = rest.scatter(-1, top, others.logsumexp(-1, keepdim=True))
        # A first token has no others: NaN, and no change whatever their mean.
        alone = (others.softmax(-1).nan_to_num() * gradient).sum(-1, keepdim=True)
        mean = mean.scatter(-1, top, alone)
        change = (self.attention.patched_keys - rest).sigmoid() - (scores - rest).sigmoid()
        return change * (gradient - mean)
