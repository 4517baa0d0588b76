"""Vectors for a behaviour, one row for each prompt or token: differences of pairs, gradients, activations."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.gradients import graph_tokens, traced
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import check_tokens, tokens_at
from mechsteer.precision import precise, wide
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.site import Site, SiteLike


def paired_differences(
    model: Model,
    positives: PromptsLike,
    negatives: PromptsLike,
    *,
    site: SiteLike,
    tokens: int | str = "last",
) -> Direction:
    """What the first of two prompts has at a site more than the second, for each pair.

    row_i = mean_t x_t(positive i) - mean_t x_t(negative i), t over the chosen tokens. The mean over rows is the
    difference of means (`ms.difference_of_means` of the same prompts).

    Args:
        model: to record.
        positives: prompts that show the behaviour.
        negatives: as many that do not, such as the same requests about something else.
        site: in the residual stream.
        tokens: "last" (before any completion), "all", a span's name, or a position.

    Returns:
        A Direction with one row for each pair, in their order, on the model's device.

    Raises:
        MechsteerError: there are more of one than of the other, or a prompt lacks the tokens.
    """
    where = _residual(model, site, "paired_differences")
    both = [model.prompts(each).padded("right") for each in (positives, negatives)]
    if len(both[0]) != len(both[1]):
        raise MechsteerError(
            f"paired_differences got {len(both[0])} positives and {len(both[1])} negatives. Pass pairs: as many of "
            "both."
        )
    means = [_token_means(model, prompts, where, tokens) for prompts in both]
    origin = {"method": "paired_differences", "tokens": tokens, "prompts": [prompts.hash for prompts in both]}
    return Direction(means[0] - means[1], where, model.id, origin)


def prompt_gradients(
    model: Model,
    prompts: PromptsLike,
    measure: Objective,
    *,
    site: SiteLike,
    tokens: int | str = "last",
    progress: bool = True,
) -> Direction:
    """The gradient of an objective with respect to the residual stream, for each prompt.

    row_i = sum_t dM_i / dx_t(prompt i), t over the chosen tokens: the first-order effect of a vector that is added to
    all of them. With a `LogitGap` it is the gap gradient of "The Mechanism of Logit Gap Steering", sections 1 and 4.

    Args:
        model: to run.
        prompts: with completions where the objective reads them.
        measure: differentiable.
        site: in the residual stream.
        tokens: "last" (before any completion), "all", a span's name, or a position.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        A Direction with one row for each prompt, in their order, on the model's device.

    Raises:
        MechsteerError: the objective has no gradient there, or a prompt lacks the tokens.
    """
    where = _residual(model, site, "prompt_gradients")
    right = model.prompts(prompts).padded("right")
    rows = []
    with bar("gradients", len(right), show=progress) as shown:
        for part in _parts(model, right):
            batch = right[part].padded("right")
            chosen = _chosen(batch, tokens)
            gradients = traced(model, batch, measure, part, [where]).gradients()
            if where not in gradients:
                raise MechsteerError(
                    f"{measure!r} has no gradient at {where}. Choose an earlier site, or an objective computed from "
                    "logits or later activations with PyTorch."
                )
            rows.append((gradients[where] * chosen[:, :, None]).sum(1))
            shown.advance(len(part))
    origin = {"method": "prompt_gradients", "measure": repr(measure), "tokens": tokens, "prompts": right.hash}
    return Direction(torch.cat(rows), where, model.id, origin)


def token_rows(model: Model, texts: PromptsLike, *, site: SiteLike, tokens: int | str = "all") -> Direction:
    """Activations of the chosen tokens of texts, one row for each token.

    Args:
        model: to record.
        texts: what to run.
        site: of vectors: the residual stream, `mlp_post`, `z` of one head, ...
        tokens: "all", "last" (before any completion), a span's name, or a position.

    Raises:
        MechsteerError: a text lacks the tokens.
    """
    where = Site.of(site)
    model.check_site(where)
    if where.pos is not None or where.axes[-1] in ("src", "one") or ("head" in where.axes and where.head is None):
        raise MechsteerError(
            f"token_rows got {where!r}, but records vectors at chosen tokens. Pass a site such as ('resid_post', 2) or "
            "Site('z', 2, head=0), and the tokens with tokens=."
        )
    right = model.prompts(texts).padded("right")
    rows = torch.cat([values[chosen] for values, chosen in _recorded(model, right, where, tokens)])  # in fp32 at least
    return Direction(rows, where, model.id, {"method": "token_rows", "tokens": tokens, "texts": right.hash})


def whitened(rows: Direction, texts: Direction | Sequence[Direction], *, ridge: float = 1.0) -> Direction:
    """Rows turned away from the directions along which unrelated texts are long, so that to ablate them costs less.

        w_i proportional to (C + ridge * tr(C) / d * 1)^-1 v_i        C = mean_g mean_j y_gj y_gj^T

    y_gj are the rows of text g: what must not change, such as plain text and the model's answers to other requests.

    Of all vectors with the same inner product with v_i, w_i takes least from the texts when it is projected out, up to
    the ridge: Fisher's discriminant; Marks & Tegmark 2023, "The geometry of truth" (their mass-mean probe). One common
    factor leaves the rows' total length as it was. Ablate what this gives; add the rows as they were.

    Args:
        rows: what is turned.
        texts: activations of unrelated texts at the same site, or of several sets that count alike; see `token_rows`.
        ridge: above 0; large values leave the rows as they are.

    Raises:
        MechsteerError: `ridge` is not above 0, or the two are at different sites, of different widths or models.
    """
    if not ridge > 0 or ridge == float("inf"):
        raise MechsteerError(f"whitened got ridge={ridge}. Pass a finite number above 0; 1.0 is a good start.")
    groups = [texts] if isinstance(texts, Direction) else list(texts)
    Direction.stack([rows, *groups])  # says what does not fit together
    exact, *others = (each.vectors.detach().double() for each in (rows, *groups))
    if not others:
        raise MechsteerError("whitened got no texts. Pass the rows of at least one; see token_rows.")
    moment = torch.stack([each.T @ each / len(each) for each in others]).mean(0)
    one = torch.eye(len(moment)).to(moment)
    turned = torch.linalg.solve(moment + ridge * moment.trace() / len(moment) * one, exact.T).T
    turned = turned * (torch.linalg.matrix_norm(exact) / torch.linalg.matrix_norm(turned))
    origin = {"method": "whitened", "ridge": ridge, "texts": [each.origin for each in groups], "of": rows.origin}
    return Direction(turned.to(wide(rows.vectors.dtype)), rows.site, rows.model or groups[0].model, origin)


def _token_means(model: Model, right: Prompts, site: Site, tokens: int | str) -> Float[Tensor, "batch d_model"]:
    return torch.cat(
        [
            (values * chosen[:, :, None]).sum(1) / chosen.sum(1, keepdim=True)
            for values, chosen in _recorded(model, right, site, tokens)
        ]
    )


def _recorded(
    model: Model, right: Prompts, site: Site, tokens: int | str
) -> Iterator[tuple[Float[Tensor, "part pos d_model"], Bool[Tensor, "part pos"]]]:
    """Activations of some of the prompts at a time, and which of their tokens are chosen."""
    for part in _parts(model, right):
        batch = right[part].padded("right")
        chosen = _chosen(batch, tokens)
        yield precise(model.run(batch, record=site, logits="none").activations[site]), chosen


def _parts(model: Model, right: Prompts) -> Sequence[Int[Tensor, " part"]]:
    size = max(1, graph_tokens(model) // right.tokens.shape[1])
    return torch.arange(len(right)).split(size)


def _chosen(prompts: Prompts, tokens: int | str) -> Bool[Tensor, "batch pos"]:
    mask = tokens_at(prompts, tokens)
    check_tokens(mask, f"that tokens={tokens!r} means")
    return mask


def _residual(model: Model, site: SiteLike, name: str) -> Site:
    where = Site.of(site)
    model.check_site(where)
    if where.axes[-1] != "d_model" or where.pos is not None:
        raise MechsteerError(
            f"{name} got {where!r}, but works on the residual stream at chosen tokens. Pass a site such as "
            "('resid_post', 2), and the tokens with tokens=."
        )
    return where
