"""The logit gap's gradient at the embeddings, the tokens nearest to it, and how well it says what tokens really do.

The gap is `LogitGap`, or any other Objective, which goes up; `-gap` goes down.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from markupsafe import Markup
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import ModelId
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.gradients import graph_tokens, traced
from mechsteer.hooks import Intervention
from mechsteer.interventions import Add, Replace, SoftPrefix
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import check_examples, one_of, tokens_at
from mechsteer.precision import precise, wide
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.propagator.intervals import check_finite, with_intervals
from mechsteer.result import Result, provenance
from mechsteer.rows import of_like_lengths
from mechsteer.site import Site
from mechsteer.sweeps import sweep
from mechsteer.vocabulary import (
    Filler,
    allowed_tokens,
    check_ids,
    embeddings,
    filling,
    insert,
    token_texts,
)

# ---- the gradient ----


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingGradient:
    """The gradient of an objective with respect to the embeddings, in the objective's units for each embedding unit.

    Attributes:
        prompts: right-padded.
        value: the objective.
        gradient: of each prompt's objective with respect to its own embeddings; 0 at padding.
        embed: what stood there: the tokens' embeddings, and the filler in slots.
        model: the weights.
        measure: the objective's text.
    """

    prompts: Prompts
    value: Float[Tensor, " prompt"]
    gradient: Float[Tensor, "prompt pos d_model"]
    embed: Float[Tensor, "prompt pos d_model"]
    model: ModelId
    measure: str

    @property
    def slots(self) -> Float[Tensor, "prompt slot d_model"]:
        """delta* of each slot: the gradient there.

        Raises:
            MechsteerError: the prompts have no slots, or differ in their number.
        """
        if not self.prompts.n_slots:
            raise MechsteerError("The prompts have no slots. Make them with slots=, or with insert(prompts, slots=1).")
        return self.gradient[self.prompts.slots].unflatten(0, (len(self.prompts), -1))

    def target(self, at: int | str = "slots") -> Float[Tensor, "prompt d_model"]:
        """delta* of each prompt: the gradient with respect to one vector added at all tokens `at`.

        Source: "The Mechanism of Logit Gap Steering", section 4, steps 1 and 2.

        Args:
            at: "slots", "decision", "all", a span's name, or an absolute position.
        """
        if at == "slots":
            return self.slots.sum(1)
        return (self.gradient * tokens_at(self.prompts, at)[..., None]).sum(1)

    def direction(self, at: int | str = "slots") -> Direction:
        """The mean delta* over prompts, at the embeddings."""
        origin = {"method": "gap gradient", "measure": self.measure, "at": at, "prompts": len(self.prompts)}
        return Direction(self.target(at).mean(0), site=Site("embed"), model=self.model, origin=origin)

    def __repr__(self) -> str:
        return f"EmbeddingGradient({self.measure}, {self.prompts!r})"

    def _repr_html_(self) -> str:
        norms = torch.linalg.vector_norm(self.gradient[:10].detach(), dim=-1)
        rows = []
        for row, (value, mask) in enumerate(zip(self.value[:10].tolist(), self.prompts.mask[:10], strict=True)):
            lengths = norms[row][mask].tolist()
            most = max(lengths) or 1.0
            texts = zip(self.prompts.shown_tokens(row), lengths, strict=True)
            chips = [
                markup.chip(text, f"rgba(230,140,0,{0.7 * n / most:.2f})", title=f"length {n:.4g}") for text, n in texts
            ]
            rows.append((row, value, markup.code(Markup().join(chips))))
        more = [markup.faded(f"and {len(self.value) - 10} more")] if len(self.value) > 10 else []
        table = markup.table(("prompt", "objective", "tokens by the length of their gradient"), rows)
        return markup.card("EmbeddingGradient", table, *more, about=f"of {self.measure}, {self.model.name}")


def gap_gradient(
    model: Model,
    prompts: PromptsLike,
    *,
    measure: Objective,
    filler: Filler = None,
    tokens: int | None = None,
    progress: bool = True,
) -> EmbeddingGradient:
    """The gradient of a logit gap at the embeddings, for every position and for slots: delta*.

        gap = ms.LogitGap(" yes", " no", tokenizer=model)
        gap_gradient(model, insert(prompts, slots=1), measure=gap).direction()

    Source: "The Mechanism of Logit Gap Steering", section 4, step 1.

    Args:
        model: what to run. Its parameters need no gradients, and get none.
        prompts: with slots where the gradient of tokens that are not there yet is wanted; see `insert`.
        measure: one differentiable number per prompt.
        filler: what stands in slots; None for the mean embedding.
        tokens: tokens in a batch; None for what suits the device.
        progress: show a bar on standard error when it takes longer than two seconds.

    Raises:
        MechsteerError: the objective has no gradient, holds values for another number of prompts, or is not finite.
    """
    right = model.prompts(prompts).padded("right")
    check_examples(measure, right)
    stands = filling(embeddings(model), filler) if filler is not None or bool(right.slots.any()) else None
    shape = (*right.tokens.shape, model.d_model)
    gradient, embed = (torch.zeros(shape, dtype=wide(model.dtype), device=model.device) for _ in range(2))
    value = gradient.new_zeros(len(right))
    with bar("gradients", len(right), show=progress) as shown:
        for example in of_like_lengths(right.lengths, tokens or graph_tokens(model)):
            part = right[example].padded("right")
            width = part.tokens.shape[1]
            value[example], gradient[example, :width], embed[example, :width] = _gradient(
                model, part, measure, example, stands
            )
            shown.advance(len(example))
    if not bool(value.isfinite().all() and gradient.isfinite().all()):
        row = int((~(value.isfinite() & gradient.isfinite().all(2).all(1))).int().argmax())
        raise MechsteerError(
            f"{measure!r} or its gradient is NaN or infinite on prompt {row}. Choose an objective that is finite there."
        )
    return EmbeddingGradient(right, value, gradient, embed, model.id, repr(measure))


def _gradient(
    model: Model,
    prompts: Prompts,
    measure: Objective,
    example: Int[Tensor, " batch"],
    stands: Float[Tensor, " d_model"] | None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
    embed = Site("embed")

    def fill(tensor: Tensor, hook: object) -> Tensor:
        return tensor if stands is None else torch.where(prompts.slots[..., None], stands.to(tensor), tensor)

    run = traced(model, prompts, measure, example, [embed], edits=[(embed.hook_name, fill)])
    gradients = run.gradients()
    if embed not in gradients:
        raise MechsteerError(
            f"{measure!r} has no gradient at the embeddings. Use an objective computed from logits or activations "
            "with PyTorch."
        )
    keep = prompts.mask[..., None]
    return run.value.detach(), gradients[embed] * keep, precise(run.taken[embed]) * keep


# ---- from a vector to tokens ----


def nearest_tokens(
    model: Model,
    target: Direction | Float[Tensor, " width"],
    *,
    by: str = "cosine",
    n: int = 10,
    forbidden: Iterable[int | str] = (),
) -> Result:
    """The tokens whose embeddings point most along a vector.

    Source: "The Mechanism of Logit Gap Steering", section 4, step 3: argmax_t cos(E(t), delta*). With delta* a gradient
    the inner product is what the linear prediction of the change rises with.

    Args:
        model: whose vocabulary.
        target: a vector at the embeddings, such as `EmbeddingGradient.direction()`.
        by: "cosine" or "inner_product".
        n: how many.
        forbidden: see `allowed_tokens`.

    Returns:
        `cosine` [token] and `inner_product` [token], best first, with the ids as `token` and their `text`.

    Raises:
        MechsteerError: the vector has another width or belongs to another model or site, or there is no such `by`.
    """
    one_of("by", by, ("cosine", "inner_product"))
    if isinstance(target, Direction):
        target.check_fits(model)
        if target.site != Site("embed"):
            raise MechsteerError(f"nearest_tokens got a direction at {target.site}. Pass one at the embeddings.")
    vector = target.vector if isinstance(target, Direction) else target
    ids, table = allowed_tokens(model, forbidden=forbidden), embeddings(model)
    model.check_width(Site("embed"), len(vector), "nearest_tokens")
    rows = precise(table[ids])
    vector = vector.detach().to(rows)
    scores = {"inner_product": rows @ vector, "cosine": cosines(rows, vector)}
    best = scores[by].argsort(descending=True, stable=True)[:n].tolist()
    chosen = [ids[each] for each in best]
    data = xr.Dataset(
        {name: ("token", scores[name][best].float().cpu().numpy()) for name in ("cosine", "inner_product")},
        coords={"token": chosen, "text": ("token", token_texts(model, chosen))},
    )
    return Result(data, provenance=provenance(model=model.id, by=by))


def cosines(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> Float[Tensor, " row"]:
    """Cosine of each row with a vector; 0 for a row of zeros."""
    return torch.nn.functional.cosine_similarity(rows, vector[None], dim=1)


# ---- the linear prediction against the truth ----


def linear_prediction(
    model: Model,
    prompts: PromptsLike,
    candidates: Sequence[int] | Sequence[Sequence[int]],
    *,
    measure: Objective,
    where: str = "suffix",
    filler: Filler = None,
    patterns: bool | str = False,
    progress: bool = True,
) -> Result:
    """How well the gradient, and the sum of embeddings, say what tokens do to an objective M when they are put in.

    With g_i the gradient at slot i where fillers f stand, and E(t) a token's embedding:

        predicted = sum_i <g_i, E(t_i) - f>                     true = M(tokens in the slots) - M(fillers in them)

    and for the document's claim that a suffix acts as delta = sum_t E(t) at the input ("The Mechanism of Logit Gap
    Steering", section 1):

        as_sum = M(delta added to the decision token's embedding) - M(prompt)       inserted = M(tokens) - M(prompt)

    Args:
        model, measure, progress: as for `gap_gradient`.
        prompts: what the tokens are put into; see `insert`.
        candidates: ids, or lists of as many ids each; what comes twice counts once.
        where: as for `insert`.
        filler: as for `gap_gradient`.
        patterns: also measure `fixed_patterns` [token, prompt]: the true change while all attention patterns stay
            those of the fillers. What `true` has beyond it came about because attention looked elsewhere. "layers" also
            measures `fixed_layer` [layer, token, prompt], with the patterns of one layer held: one more run for each.

    Returns:
        These arrays [token, prompt]; `base` (fillers) and `plain` [prompt]; and over candidates, for each prompt
        (NaN where nothing varies):

            correlation, correlation_as_sum    Pearson's, of true and predicted, and of inserted and as_sum
            explained, explained_as_sum        1 - sum (true - predicted)^2 / sum true^2, and the same of the other two;
                                               below 0 where no change at all would be the better prediction
            attention_share                    sum (true - fixed) true / sum true^2: the share of the change that
                                               attention adds by looking elsewhere; with "layers" also
                                               attention_share_layer [layer, prompt], of each layer's patterns alone

        with the 95 % bootstrap interval of each one's mean over prompts in `correlation_low`, `correlation_high`, ...
        `token` has the ids' text in `text`.

    Raises:
        MechsteerError: candidates are none, of unlike lengths, or no ids of the model; `patterns` is something else; or
            as for `gap_gradient`.
    """
    began = time.perf_counter()
    if patterns not in (False, True, "layers"):
        raise MechsteerError(f"patterns got {patterns!r}. Pass False, True or 'layers'.")
    rows = list(dict.fromkeys((each,) if isinstance(each, int) else tuple(each) for each in candidates))
    sizes = sorted({len(row) for row in rows})
    if len(sizes) != 1 or not sizes[0]:
        raise MechsteerError(
            f"candidates have {' or '.join(map(str, sizes)) or 'no'} tokens. Pass at least one, all of one length."
        )
    check_ids(model, [each for row in rows for each in row])
    given = model.prompts(prompts)
    slotted, plain = insert(given, where=where, slots=sizes[0]), insert(given)
    gradient = gap_gradient(model, slotted, measure=measure, filler=filler, progress=progress)
    table = embeddings(model)
    stands = filling(table, filler)
    steps = precise(table[torch.tensor(rows, device=table.device)]) - stands  # [token, slot, d_model]
    predicted = torch.einsum("psd,tsd->tp", gradient.slots, steps.to(gradient.slots))
    base = gradient.value.cpu().numpy()

    def measured(run: Prompts, edits: dict[str, list[Intervention]]) -> Float[np.ndarray, "token prompt"]:
        swept = sweep(
            model, run, axes={"token": list(edits)}, build=lambda token: edits[token],
            measure=measure.named("value"), progress=progress,
        )  # fmt: skip
        check_finite(swept.data["value"], repr(measure))
        return swept.data["value"].values

    labels = [" ".join(map(str, row)) for row in rows]
    soft: dict[str, list[Intervention]] = {
        label: [SoftPrefix(step + stands)] for label, step in zip(labels, steps, strict=True)
    }
    sums: dict[str, list[Intervention]] = {
        label: [Add(precise(table[list(row)]).sum(0), site=Site("embed"), at=-1)]
        for label, row in zip(labels, rows, strict=True)
    }
    true = measured(slotted, soft) - base
    before = sweep(model, plain, axes={"cell": [0]}, build=lambda cell: None, measure=measure.named("value"))
    start = before.data["value"].values[0]
    arrays = {"true": true, "predicted": predicted.cpu().numpy(), "inserted": true + base - start}
    arrays["as_sum"] = measured(plain, sums) - start
    one_layer = []
    if patterns:
        fill = SoftPrefix(stands.expand(sizes[0], -1))
        held = model.run(slotted, [fill], record="pattern", logits="none").activations
        fixed = [Replace(Site("pattern", layer), held) for layer in range(model.n_layers)]
        arrays["fixed_patterns"] = measured(slotted, {label: [*each, *fixed] for label, each in soft.items()}) - base
        if patterns == "layers":
            one_layer = [
                measured(slotted, {label: [*each, layer] for label, each in soft.items()}) - base for layer in fixed
            ]
    data = xr.Dataset(
        {name: (("token", "prompt"), array) for name, array in arrays.items()}
        | {"base": ("prompt", base), "plain": ("prompt", start)}
        | ({"fixed_layer": (("layer", "token", "prompt"), np.stack(one_layer))} if patterns == "layers" else {}),
        coords={
            "token": labels, "text": ("token", ["".join(token_texts(model, row)) for row in rows]),
            "prompt": list(given.labels) if given.labels else np.arange(len(given)),
        },
    )  # fmt: skip
    if patterns == "layers":
        data = data.assign_coords(layer=range(model.n_layers))
    data = _agreement(data)
    seconds = time.perf_counter() - began
    return Result(data, provenance=provenance(model=model.id, seconds=seconds, measure=repr(measure), where=where))


def _agreement(data: xr.Dataset) -> xr.Dataset:
    """How far predictions and truth agree over candidates, for each prompt, with intervals of the mean over prompts."""

    def share(part: xr.DataArray, whole: xr.DataArray) -> xr.DataArray:
        total = (whole**2).sum("token")
        return (part * whole).sum("token") / total.where(total > 0)

    found = {}
    for suffix, truth, guess in (("", "true", "predicted"), ("_as_sum", "inserted", "as_sum")):
        off, total = data[truth] - data[guess], (data[truth] ** 2).sum("token")
        found["correlation" + suffix] = xr.corr(data[truth], data[guess], "token")
        found["explained" + suffix] = 1 - (off**2).sum("token") / total.where(total > 0)
    for name, fixed in (("attention_share", "fixed_patterns"), ("attention_share_layer", "fixed_layer")):
        if fixed in data:
            found[name] = share(data["true"] - data[fixed], data["true"]).transpose(..., "prompt")
    return with_intervals(data.assign(found), found)
