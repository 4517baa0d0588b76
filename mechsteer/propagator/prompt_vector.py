"""A few tokens as one vector at each layer, what is lost when one replaces the other, and the way back to tokens."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import ModelId
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add, Replace, SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import KLFromBaseline, Objective
from mechsteer.objectives.base import assign, decision_mask, examples_of
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.propagator.intervals import check_finite, with_intervals
from mechsteer.result import Result, provenance
from mechsteer.run import Run
from mechsteer.site import Site
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import allowed_tokens, check_ids, embeddings, insert, token_texts


@dataclass(frozen=True, eq=False, repr=False)
class PromptVector:
    """What tokens add to the residual stream where the prompt's first completion token is decided.

    Attributes:
        ids: the tokens.
        where: on which side of the user's text, or in whose slots, they stood; see `insert`.
        deltas: resid_post at the decision position with the tokens, minus without them.
        model: the weights.
    """

    ids: tuple[int, ...]
    where: str
    deltas: Float[Tensor, "layer prompt d_model"]
    model: ModelId

    def direction(self, layer: int) -> Direction:
        """The mean over prompts at one layer, which `Add(direction, at=-1)` puts in the tokens' place.

        Raises:
            MechsteerError: there is no such layer.
        """
        if not 0 <= layer < len(self.deltas):
            raise MechsteerError(f"PromptVector has no layer {layer}. Its layers are 0 to {len(self.deltas) - 1}.")
        origin = {"method": "measured prompt delta", "ids": list(self.ids), "where": self.where}
        origin["prompts"] = self.deltas.shape[1]
        return Direction(self.deltas[layer].mean(0), site=Site("resid_post", layer), model=self.model, origin=origin)

    def __repr__(self) -> str:
        layers, prompts, _ = self.deltas.shape
        return f"PromptVector(ids={list(self.ids)} as {self.where}, {layers} layers, {prompts} prompts)"

    def _repr_html_(self) -> str:
        norms = torch.linalg.vector_norm(self.deltas.detach().mean(1), dim=-1).tolist()
        table = markup.table(("layer", "norm of the mean"), list(enumerate(norms)))
        title, about = repr(self)[:-1].split("(", 1)
        return markup.card(title, table, about=f"{about}; {self.model.name}")


def prompt_vector(model: Model, prompts: PromptsLike, ids: Sequence[int], *, where: str = "suffix") -> PromptVector:
    """The vector at each layer that a prefix or suffix amounts to, measured: delta_l = h_l(with) - h_l(without).

    Source: "The Mechanism of Logit Gap Steering", section 1 (prompting = vector steering + constant), there at layer 0.

    Args:
        model: what to run.
        prompts: what the tokens are put into; see `insert`.
        ids: of the tokens.
        where: as for `insert`.

    Raises:
        MechsteerError: no ids, or ids that the model lacks.
    """
    if not len(ids):
        raise MechsteerError("prompt_vector got no ids. Pass at least one token.")
    check_ids(model, ids)
    given = model.prompts(prompts)
    before, after = (_decisions(model, insert(given, each, where=where)) for each in ((), ids))
    return PromptVector(tuple(ids), where, after - before, model.id)


def _decisions(model: Model, prompts: Prompts) -> Float[Tensor, "layer prompt d_model"]:
    """resid_post at the decision positions."""
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    parts = []
    for rows in torch.arange(len(prompts)).split(64):  # bounds the memory
        run = model.run(prompts[rows].padded("right"), record=sites, logits="none")
        mask = decision_mask(run.prompts)
        parts.append(torch.stack([precise(run.activations[site][mask]) for site in sites]))
    return torch.cat(parts, 1)


def replacement_loss(
    model: Model, prompts: PromptsLike, vector: PromptVector, *, measure: Objective, progress: bool = True
) -> Result:
    """What is lost when a vector at one layer takes the place of tokens, at the decision position alone.

    Two vectors are tried at each layer: "mean", that of `vector`, the same for all prompts, which may be other ones
    than it was measured on; and "own", what the tokens add on each of these prompts. "own" restores the decision
    position of that layer wholly, and so loses nothing at the last layer; what it lacks before is what later layers
    would have read from the tokens' own positions.

    Args:
        model: what to run.
        prompts: to measure on; see `insert`.
        vector: of `prompt_vector`.
        measure: the gap, or another objective.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        `gap` [vector, layer, prompt]: the objective; `kl` [vector, layer, prompt]: KL(with tokens || with the vector)
        at the decision position, in nats; `loss` [vector, layer, prompt], the gap with the tokens minus the gap with
        the vector; `gap_tokens`, `gap_plain` and `kl_plain` [prompt]: with the tokens, and with neither; `cosine`
        [layer, prompt] of own and mean; `norm` [layer] of the mean. The 95 % bootstrap interval of each mean over
        prompts is `loss_low`, `loss_high`, `gap_low`, ...

    Raises:
        MechsteerError: the vector was made with other weights, or the objective is NaN or infinite.
    """
    began = time.perf_counter()
    model.check_same(vector.model, "PromptVector")
    given = model.prompts(prompts)
    plain, filled = (insert(given, each, where=vector.where) for each in ((), vector.ids))
    own = prompt_vector(model, given, vector.ids, where=vector.where).deltas
    whole = _decisions(model, filled)
    measures = {"gap": measure, "kl": KLFromBaseline(model.run(filled, logits="last"))}
    directions = [vector.direction(layer) for layer in range(model.n_layers)]

    def build(vector: str, layer: int) -> Add | Replace:
        if vector == "mean":
            return Add(directions[layer], at=-1)
        return Replace(Site("resid_post", layer), whole[layer], at=-1)

    axes: dict[str, list[Any]] = {"vector": ["mean", "own"], "layer": list(range(model.n_layers))}
    swept = sweep(model, plain, axes=axes, build=build, measure=measures, progress=progress)
    ends = {
        name: sweep(model, each, axes={"cell": [0]}, build=lambda cell: None, measure=measures).data.isel(cell=0)
        for name, each in (("tokens", filled), ("plain", plain))
    }
    mean = vector.deltas.mean(1)
    cosine = torch.nn.functional.cosine_similarity(own, mean[:, None].to(own), dim=-1)
    data = swept.data.assign(
        gap_tokens=ends["tokens"]["gap"], gap_plain=ends["plain"]["gap"], kl_plain=ends["plain"]["kl"],
        cosine=(("layer", "prompt"), _numpy(cosine)), norm=("layer", _numpy(mean.norm(dim=-1))),
    ).drop_vars("cell")  # fmt: skip
    for name in ("gap", "gap_tokens", "gap_plain"):
        check_finite(data[name], repr(measure))
    data["loss"] = (data["gap_tokens"] - data["gap"]).transpose(*data["gap"].dims)
    data = with_intervals(data, ["gap", "kl", "loss", "gap_tokens", "gap_plain", "kl_plain", "cosine"])
    made = provenance(
        model=model.id, seconds=time.perf_counter() - began, ids=list(vector.ids), where=vector.where,
        measure=repr(measure),
    )  # fmt: skip
    return Result(data, provenance=made)


def tokens_like(
    model: Model,
    prompts: PromptsLike,
    direction: Direction,
    *,
    where: str = "suffix",
    candidates: Iterable[int] | None = None,
    forbidden: Iterable[int | str] = (),
    progress: bool = True,
) -> Result:
    """The way back: which single tokens do to the residual stream what a vector does.

    cosine_t = cos(h(with token t) - h(without), v) at the decision position of the vector's site.

    Args:
        model: what to run.
        prompts: what each token is put into; see `insert`.
        direction: one vector v at a site such as resid_post.
        where: as for `insert`.
        candidates: ids; None for all of `allowed_tokens`.
        forbidden: see `allowed_tokens`.
        progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
        `cosine` and `norm` (of what the token adds) [token, prompt], the largest mean cosine first; `token` holds ids,
        and `text` theirs.

    Raises:
        MechsteerError: the vector is of other weights or several, or no candidate is left.
    """
    began = time.perf_counter()
    direction.check_fits(model)
    allowed = allowed_tokens(model, forbidden=forbidden)
    if candidates is not None:
        asked = list(candidates)
        check_ids(model, asked)
        allowed = sorted(set(allowed) & set(asked))
        if not allowed:
            raise MechsteerError(f"All {len(asked)} candidates are forbidden or special tokens. Pass others.")
    given, table = model.prompts(prompts), embeddings(model)
    run = model.run(insert(given, where=where), record=direction.site, logits="none")
    before = run.activations[direction.site.point][decision_mask(run.prompts)]
    swept = sweep(
        model, insert(given, where=where, slots=1), axes={"token": allowed}, progress=progress,
        build=lambda token: SoftPrefix(table[token][None]),
        measure={name: _Turn(direction, before, name) for name in ("cosine", "norm")},
    )  # fmt: skip
    data = swept.data.assign_coords(text=("token", token_texts(model, allowed)))
    order = np.argsort(-data["cosine"].mean("prompt").values, kind="stable")
    made = provenance(model=model.id, seconds=time.perf_counter() - began, where=where, site=str(direction.site))
    return Result(data.isel(token=order), provenance=made)


@dataclass(frozen=True, eq=False, repr=False, init=False)
class _Turn(Objective):
    """The norm of what was added at the decision position since `before`, or its cosine with a direction."""

    direction: Direction
    before: Float[Tensor, "example d_model"]
    part: str

    def __init__(self, direction: Direction, before: Float[Tensor, "example d_model"], part: str) -> None:
        assign(self, direction=direction, before=before, part=part, n_examples=len(before))

    def sites(self) -> tuple[Site, ...]:
        return (self.direction.site.point,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        now = precise(run.activations[self.direction.site.point][decision_mask(run.prompts)])
        added = now - self.before.to(now)[examples_of(run, self.n_examples)]
        if self.part == "norm":
            return added.norm(dim=-1)
        return torch.nn.functional.cosine_similarity(added, self.direction.vector.to(now)[None], dim=-1)


def _numpy(values: Tensor) -> np.ndarray:
    return precise(values).detach().cpu().numpy()  # numpy has no bfloat16
