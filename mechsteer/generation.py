"""Generating text under interventions, many prompts at once."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.backends.decoder import KINDS as PACKED_KINDS
from mechsteer.backends.decoder import Cache, Capture, Decoder
from mechsteer.backends.packing import whole_pack
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Column, Intervention, check, stacked_hooks
from mechsteer.progress import bar
from mechsteer.prompts import Prompts

if TYPE_CHECKING:
    from mechsteer.model import Model


def generate(
    model: "Model",
    prompts: Prompts,
    *,
    max_new_tokens: int,
    interventions: Iterable[Intervention],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_at_eos: bool,
    batch_size: int,
    progress: bool,
) -> Prompts:
    """See `Model.generate`."""
    applied = tuple(interventions)
    right = prompts.padded("right")
    if max_new_tokens < 1:
        raise MechsteerError(f"max_new_tokens={max_new_tokens} generates nothing. Pass at least 1.")
    if bool(right.span("completion").any()):
        raise MechsteerError(
            "The prompts hold completions already. Generate from prompts.without_completions(), or make prompts of the "
            "whole texts to go on from there."
        )
    longest = int(right.lengths.max())
    if longest + max_new_tokens > model.n_ctx:
        raise MechsteerError(
            f"Prompt {int(right.lengths.argmax())} has {longest} tokens and {max_new_tokens} are to follow, but the "
            f"context of {model.name} is {model.n_ctx}. Shorten it, or pass max_new_tokens={model.n_ctx - longest} or "
            "less."
        )
    choose = Choice(temperature, top_k, top_p, seed, right.tokens.device)
    model.check_slots(right, applied)
    check(applied, model, right, n_new=max_new_tokens)
    eos = _eos_ids(model) if stop_at_eos else []
    kinds = {site.kind for each in applied for site in each.sites(model.n_layers)}
    decoder = model.decoder if kinds <= set(PACKED_KINDS) else None
    # Prompts of like length share a batch.
    order = right.lengths.argsort(stable=True)
    new: list[list[int]] = [[] for _ in range(len(right))]
    with torch.no_grad(), bar("tokens", len(right) * max_new_tokens, show=progress) as shown:
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            step = (
                _Packed(decoder, right, index, applied, max_new_tokens)
                if decoder
                else _Hooked(model, right, index, applied)
            )
            alive = torch.ones(len(index), dtype=torch.bool, device=index.device)
            stops = torch.tensor(eos, device=index.device, dtype=torch.long)
            tokens: list[Tensor] = []
            lengths = torch.zeros_like(index)
            for n in range(max_new_tokens):
                token = choose(step.logits(tokens[-1] if tokens else None), index)
                tokens.append(token)
                lengths = lengths + alive
                alive = alive & ~torch.isin(token, stops)
                shown.advance(len(index))
                if not bool(alive.any()):
                    shown.advance(len(index) * (max_new_tokens - n - 1))
                    break
            for place, row, length in zip(
                index.tolist(), torch.stack(tokens, 1).tolist(), lengths.tolist(), strict=True
            ):
                new[place] = row[:length]
    return prompts.with_completions(new)


class Choice:
    """Picks the next token: the likeliest at temperature 0, else a sample.

    Every example draws from its own random stream, so that what it gets does not depend on the batch it is in.
    """

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int, device: torch.device
    ) -> None:
        if temperature < 0 or temperature != temperature:
            raise MechsteerError(
                f"temperature={temperature} is negative. Pass 0 for greedy decoding, or more to sample."
            )
        if top_k is not None and top_k < 1:
            raise MechsteerError(f"top_k={top_k} leaves no token. Pass at least 1, or None for all.")
        if top_p is not None and not 0 < top_p <= 1:
            raise MechsteerError(f"top_p={top_p} is no probability above 0. Pass one up to 1, or None for all.")
        self._temperature, self._top_k, self._top_p, self._seed = temperature, top_k, top_p, seed
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits: Float[Tensor, "batch d_vocab"], index: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """One token per row; `index` says which example each row is."""
        if self._temperature == 0:
            return logits.argmax(-1)
        probs = filtered(logits.float() / self._temperature, self._top_k, self._top_p).softmax(-1)
        uniform = torch.tensor([self._draw(example) for example in index.tolist()], dtype=torch.float64)
        cumulative = probs.double().cumsum(-1)
        target = uniform.to(probs.device)[:, None] * cumulative[:, -1:]
        # Rounding may put the target at the very end, where only tokens without probability are left.
        likely = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
        return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(-1), likely)

    def _draw(self, example: int) -> float:
        if example not in self._generators:
            # Seeds that differ in little give unlike streams.
            self._generators[example] = torch.Generator().manual_seed((self._seed * 1_000_003 + example) % (1 << 62))
        return float(torch.rand((), generator=self._generators[example], dtype=torch.float64))


def filtered(
    logits: Float[Tensor, "batch d_vocab"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch d_vocab"]:
    """Logits with -inf for tokens outside the `top_k` likeliest, and then outside the fewest that reach `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        # A token stays if those likelier than it do not reach top_p; the likeliest always stays.
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
    return logits


class _Packed:
    """The packed forward pass with a cache of keys and values: one new row per example and step."""

    def __init__(
        self, decoder: Decoder, prompts: Prompts, index: Tensor, interventions: tuple[Intervention, ...], n_new: int
    ) -> None:
        self._decoder, self._prompts, self._index = decoder, prompts, index
        self._lengths = prompts.lengths[index]
        self._cache = Cache.empty(decoder, len(index), int(self._lengths.max()) + n_new)
        self._n = 0
        self._edits: dict[tuple[str, int], list[Any]] = {}
        for each in interventions:
            column = Column([each])
            for site in each.sites(decoder.n_layers):
                self._edits.setdefault((site.kind, -1 if site.layer is None else site.layer), []).append(column)

    def logits(self, token: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch d_vocab"]:
        """Logits for the next token, after `token` has been appended."""
        decoder = self._decoder
        if token is None:
            stop = self._lengths
            read = torch.arange(self._prompts.tokens.shape[1], device=stop.device) == (stop - 1)[:, None]
            pack = whole_pack(self._prompts, self._index, torch.zeros_like(stop), stop, read=read)
            ids = self._prompts.tokens[pack.all.rows.example, pack.all.rows.position]
        else:
            start = self._lengths + self._n
            pack = whole_pack(self._prompts, self._index, start, start + 1)
            ids = token
            self._n += 1
        x = decoder.embed(ids, pack.all, self._edits, Capture())
        x = decoder.blocks(x, pack, first=0, stop=decoder.n_layers, own=self._cache, edits=self._edits)
        return decoder.logits(x)


class _Hooked:
    """A whole forward pass per step through TransformerLens's hooks, for what the packed one does not cover."""

    def __init__(
        self, model: "Model", prompts: Prompts, index: Tensor, interventions: tuple[Intervention, ...]
    ) -> None:
        self._model, self._prompts, self._index, self._interventions = model, prompts, index, interventions
        self._tokens: list[Tensor] = []

    def logits(self, token: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch d_vocab"]:
        """Logits for the next token, after `token` has been appended."""
        if token is not None:
            self._tokens.append(token)
        items = self._prompts[self._index.tolist()]
        if self._tokens:
            items = items.with_completions(torch.stack(self._tokens, 1))
        columns: dict[Any, list[Column]] = {}
        for each in self._interventions:
            for site in each.sites(self._model.n_layers):
                columns.setdefault(site, []).append(Column([each]))
        hooks = stacked_hooks(
            columns,
            self._model,
            base=self._prompts,
            items=items,
            example=self._index,
            cell=torch.zeros_like(self._index),
        )
        last = items.positions == items.lengths[:, None] - 1
        return self._model.forward(items, hooks, (), read=last)[0]


def _eos_ids(model: "Model") -> list[int]:
    eos = getattr(model.tokenizer, "eos_token_id", None)
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
