"""Generating text under interventions, many prompts at once."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.backends.decoder import KINDS as PACKED_KINDS
from mechsteer.backends.decoder import Cache, Capture, Decoder, key_of
from mechsteer.backends.packing import whole_pack
from mechsteer.errors import MechsteerError
from mechsteer.executors import computed, executor_of
from mechsteer.hooks import Column, Intervention, check, columns_of, stacked_hooks
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

Columns = dict[Site, list[Column]]


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
    samples: int = 1,
    streams: Sequence[int] | None = None,
) -> Prompts:
    """See `Model.generate`.

    Args:
        samples: completions of each prompt, which is run once for all of them; they stand one after another in what is
            returned. At least so many rows share a batch.
        streams: seeds of the draws, one for each completion; None takes `seed` and the place.
    """
    applied = tuple(interventions)
    right = prompts.padded("right")
    choose = Choice(temperature, top_k, top_p)
    _check_room(model, right, max_new_tokens, batch_size)
    if samples < 1 or (streams is not None and len(streams) != len(right) * samples):
        raise MechsteerError(
            f"samples={samples} of {len(right)} prompts got {'no' if streams is None else len(streams)} streams. Pass "
            "at least one sample, and one stream for each completion or none."
        )
    model.check_slots(right, applied)
    # The last new token is never fed to the model, so that nothing can act on it.
    check(applied, model, right, n_new=max_new_tokens - 1)
    eos = getattr(model.tokenizer, "eos_token_id", None) if stop_at_eos else None
    given = None if streams is None else tuple(streams)
    work = _Generation(right, applied, choose, max_new_tokens, samples, seed, given, eos, _n_ids(prompts.tokenizer))
    # Prompts of like length share a batch.
    order = right.lengths.argsort(stable=True)
    batches = [tuple(once.tolist()) for once in order.split(max(1, batch_size // samples))]
    new: list[list[int]] = [[] for _ in range(len(right) * samples)]
    with executor_of(None) as executor, bar("tokens", len(new) * max_new_tokens, show=progress) as shown:
        if executor is None or len(batches) == 1:
            compute = work.bind(model, shown.advance)
            found = (compute(batch) for batch in batches)
        else:
            found = computed(executor, model, work, batches, lambda b: shown.advance(len(b) * samples * max_new_tokens))
        for written in found:
            for row, tokens in written:
                new[row] = tokens
    copied = prompts if samples == 1 else prompts[torch.arange(len(prompts)).repeat_interleave(samples)]
    return copied.with_completions(new)


@dataclass(frozen=True, eq=False)
class _Generation:
    """What a process needs to complete batches of prompts, besides the model; arguments as of `generate`.

    Attributes:
        eos: the token that ends a completion; None for none.
        n_ids: ids that may be generated; None for all.
    """

    right: Prompts
    applied: tuple[Intervention, ...]
    choose: "Choice"
    max_new_tokens: int
    samples: int
    seed: int
    streams: tuple[int, ...] | None
    eos: int | None
    n_ids: int | None

    def bind(
        self, model: "Model", advance: Callable[[int], object] = lambda n: None
    ) -> Callable[[tuple[int, ...]], list[tuple[int, list[int]]]]:
        """What completes a batch, given the places of its prompts: places in what is returned, with their tokens."""
        right = model.prompts(self.right)
        columns = columns_of([self.applied], model.n_layers)
        decoder = model.decoder if {site.kind for site in columns} <= set(PACKED_KINDS) else None
        device = right.tokens.device

        def completed(batch: tuple[int, ...]) -> list[tuple[int, list[int]]]:
            once = torch.tensor(batch, device=device)
            step = (
                _Packed(decoder, right, once, columns, self.max_new_tokens)
                if decoder
                else _Hooked(model, right, once, columns)
            )
            with torch.no_grad():
                return self._completed(step, once, model, advance)

        return completed

    def _completed(
        self, step: "_Packed | _Hooked", once: Int[Tensor, " batch"], model: "Model", advance: Callable[[int], object]
    ) -> list[tuple[int, list[int]]]:
        samples, n_new = self.samples, self.max_new_tokens
        first = step.logits(None)
        # Of each row: its prompt, and its place in what is returned.
        index = once.repeat_interleave(samples)
        rows = index * samples + torch.arange(samples, device=index.device).repeat(len(once))
        if samples > 1:
            copies = torch.arange(len(once), device=index.device).repeat_interleave(samples)
            step.keep(copies)
            first = first[copies]
        if self.choose.greedy:
            draws = None
        elif self.streams is None:
            draws = uniform_draws(self.seed, rows, n_new)
        else:
            draws = stream_draws([self.streams[row] for row in rows.tolist()], n_new)
        written = torch.full((len(index), n_new), -1, device=index.device)
        # Of the rows that the model still runs: places in the batch, whether they go on, and their last tokens.
        place, token = torch.arange(len(index), device=index.device), None
        alive = torch.ones_like(place, dtype=torch.bool)
        for n in range(n_new):
            logits = (first if token is None else step.logits(token))[:, : self.n_ids]
            _check_finite(logits, index[place], n, model)
            token = self.choose(logits, None if draws is None else draws[place.cpu(), n])
            written[place, n] = torch.where(alive, token, -1)
            advance(len(index))
            if self.eos is None:
                continue
            alive = alive & (token != self.eos)
            n_alive = int(alive.sum())
            if n_alive == 0:
                advance(len(index) * (n_new - n - 1))
                break
            if n_alive <= 0.75 * len(alive):  # Leaving rows out copies the cache of those that stay.
                kept = alive.nonzero().squeeze(1)
                step.keep(kept)
                place, token, alive = place[kept], token[kept], alive[kept]
        return [
            (row, [token for token in tokens if token >= 0])
            for row, tokens in zip(rows.tolist(), written.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Choice:
    """Picks the next token: the likeliest at temperature 0, else a sample."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise MechsteerError(
                f"temperature={self.temperature} is no number from 0 up. Pass 0 for greedy decoding, or more to sample."
            )
        if self.top_k is not None and self.top_k < 1:
            raise MechsteerError(f"top_k={self.top_k} leaves no token. Pass at least 1, or None for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise MechsteerError(f"top_p={self.top_p} is no probability above 0. Pass one up to 1, or None for all.")
        if self.greedy and (self.top_k, self.top_p) != (None, None):
            raise MechsteerError(
                f"top_k={self.top_k} and top_p={self.top_p} are for sampling, but temperature=0 takes the likeliest "
                "token. Pass temperature=1.0 or another, or leave them out."
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __call__(
        self, logits: Float[Tensor, "batch d_vocab"], uniform: Float[Tensor, " batch"] | None
    ) -> Int[Tensor, " batch"]:
        """One token per row: the one at which the cumulative probability passes `uniform`, of [0, 1)."""
        if uniform is None:
            return logits.argmax(-1)
        # The likeliest becomes 0, which no temperature can overflow.
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probs = filtered(scaled, self.top_k, self.top_p).softmax(-1)
        exact = (probs if probs.is_cuda else probs.cpu()).double()  # Apple's GPUs have no fp64.
        cumulative = exact.cumsum(-1)
        target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1).to(logits.device)


def filtered(
    logits: Float[Tensor, "batch d_vocab"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch d_vocab"]:
    """Logits with -inf for tokens outside the `top_k` likeliest, and then outside the fewest that reach `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        ordered, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True)
    else:
        return logits
    if top_p is not None:
        probs = ordered.softmax(-1)
        # A token stays if those likelier than it do not reach top_p; the likeliest always stays.
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered)


def uniform_draws(seed: int, index: Int[Tensor, " batch"], n: int) -> Float[Tensor, "batch n"]:
    """`n` fp64 numbers of [0, 1) for each example, on the CPU.

    Every example has its own random stream, so that what it gets does not depend on the batch that it is in.
    """
    return stream_draws([seed * 1_000_003 + example for example in index.tolist()], n)


def stream_draws(streams: Sequence[int], n: int) -> Float[Tensor, "batch n"]:
    """`n` fp64 numbers of [0, 1) of each stream, on the CPU."""
    generators = [torch.Generator().manual_seed(stream % (1 << 62)) for stream in streams]
    return torch.stack([torch.rand(n, generator=generator, dtype=torch.float64) for generator in generators])


class _Packed:
    """The packed forward pass with a cache of keys and values: one new row per example and step."""

    def __init__(
        self, decoder: Decoder, prompts: Prompts, index: Int[Tensor, " batch"], columns: Columns, n_new: int
    ) -> None:
        self._decoder, self._prompts, self._index = decoder, prompts, index
        self._start, self._stop = torch.zeros_like(index), prompts.lengths[index]
        self._cache = Cache.empty(decoder, len(index), int(self._stop.max()) + n_new - 1)
        self._edits = {key_of(site): each for site, each in columns.items()}

    def logits(self, token: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch d_vocab"]:
        """Logits for the next token: of the prompts, or after `token` has been appended."""
        decoder, read = self._decoder, None
        if token is None:
            positions = torch.arange(self._prompts.tokens.shape[1], device=self._stop.device)
            read = positions == self._stop[:, None] - 1
        pack = whole_pack(self._prompts, self._index, self._start, self._stop, read=read)
        if token is None:
            token = self._prompts.tokens[pack.all.rows.example, pack.all.rows.position]
        x = decoder.embed(token, pack.all, self._edits, Capture())
        x = decoder.blocks(x, pack, first=0, stop=decoder.n_layers, own=self._cache, edits=self._edits)
        self._start, self._stop = self._stop, self._stop + 1
        return decoder.logits(x)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows only."""
        self._index, self._start, self._stop = self._index[rows], self._start[rows], self._stop[rows]
        kept = ([each[rows.to(each.device)] for each in part] for part in (self._cache.keys, self._cache.values))
        self._cache = Cache(*kept)


class _Hooked:
    """A whole forward pass per step through TransformerLens's hooks, for what the packed one does not cover."""

    def __init__(self, model: "Model", prompts: Prompts, index: Int[Tensor, " batch"], columns: Columns) -> None:
        self._model, self._prompts, self._index, self._columns = model, prompts, index, columns
        self._items = prompts[index].padded("right")
        self._tokens = index.new_empty(len(index), 0)

    def logits(self, token: Int[Tensor, " batch"] | None) -> Float[Tensor, "batch d_vocab"]:
        """Logits for the next token: of the prompts, or after `token` has been appended."""
        items, example = self._items, self._index
        if token is not None:
            self._tokens = torch.cat([self._tokens, token[:, None]], 1)
            items = items.with_completions(self._tokens)
        hooks = stacked_hooks(
            self._columns, self._model, base=self._prompts, items=items, example=example, cell=torch.zeros_like(example)
        )
        return self._model.forward(items, hooks, (), read=items.at(items.lengths - 1))[0]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows only."""
        self._items, self._index, self._tokens = self._items[rows], self._index[rows], self._tokens[rows]


def _check_room(model: "Model", right: Prompts, max_new_tokens: int, batch_size: int) -> None:
    if max_new_tokens < 1:
        raise MechsteerError(f"max_new_tokens={max_new_tokens} generates nothing. Pass at least 1.")
    if batch_size < 1:
        raise MechsteerError(f"batch_size={batch_size} runs nothing. Pass at least 1.")
    if bool(right.span("completion").any()):
        raise MechsteerError(
            "The prompts hold completions already. Generate from prompts.without_completions(), or make prompts of the "
            "whole texts to go on from there."
        )
    longest = int(right.lengths.max())
    room = model.n_ctx - longest
    if max_new_tokens > room:
        advice = f"Shorten it, or pass max_new_tokens={room} or less." if room else "Shorten it."
        raise MechsteerError(
            f"Prompt {int(right.lengths.argmax())} has {longest} tokens and {max_new_tokens} are to follow, but the "
            f"context of {model.name} is {model.n_ctx}. {advice}"
        )


def _check_finite(
    logits: Float[Tensor, "batch d_vocab"], example: Int[Tensor, " batch"], n: int, model: "Model"
) -> None:
    wrong = ~logits.amax(-1).isfinite()
    if bool(wrong.any()):
        raise MechsteerError(
            f"Prompt {int(example[wrong][0])} has logits that are not finite after {n} new tokens. Make the "
            f"interventions weaker, or load {model.name} with a wider dtype than {str(model.dtype)[6:]}."
        )


def _n_ids(tokenizer: Any) -> int | None:
    """How many ids the tokenizer can have tokens for: some models' vocabularies end in ids without one."""
    return None if tokenizer is None else max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))
