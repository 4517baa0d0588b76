"""Exact losses of many candidate prefixes over a batch of requests, and the gradient at a prefix's embeddings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.backends.decoder import Alike, Cache, Capture
from mechsteer.backends.packing import Pack, whole_pack
from mechsteer.costs import CANDIDATE_EVEN, CANDIDATE_LOGITS, CANDIDATE_TOKENS
from mechsteer.engine import Engine
from mechsteer.errors import MechsteerError
from mechsteer.executors import computed, executor_of
from mechsteer.memory import Memory
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.objectives.base import check_examples
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.rows import Rows
from mechsteer.run import Run
from mechsteer.site import Site
from mechsteer.vocabulary import embeddings, insert

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """The prompts with room for a prefix of one length.

    Attributes:
        prompts: right-padded, with any ids where the prefix stands.
        first: position of the prefix's first token in each.
        read: tokens whose logits the objective reads.
        begin: first position that it reads.
        stop: one after the last.
    """

    prompts: Prompts
    first: Int[Tensor, " prompt"]
    read: Bool[Tensor, "prompt pos"]
    begin: Int[Tensor, " prompt"]
    stop: Int[Tensor, " prompt"]


@dataclass(frozen=True, eq=False)
class _Base:
    """Keys and values of everything up to the end of one prefix, for each chunk of the prompts."""

    ids: Ids
    width: int
    caches: list[Cache]


@dataclass(frozen=True)
class Part:
    """Candidates of one length on some of the prompts, which are computed at once.

    Attributes:
        chunk: of the prompts.
        places: of the candidates among all.
        ids: of each candidate.
        same: how many first tokens each shares with `base`.
        base: a prefix.
    """

    chunk: int
    places: tuple[int, ...]
    ids: tuple[Ids, ...]
    same: tuple[int, ...]
    base: Ids


@dataclass(frozen=True, eq=False)
class _Work:
    """What a worker needs to compute parts, besides the model."""

    prompts: Prompts
    objective: Objective
    limits: tuple[int, int]  # a worker on another kind of device would choose others than the parts are of

    def bind(self, model: Model) -> Callable[[Part], tuple[Part, Float[np.ndarray, "candidate prompt"], float]]:
        losses = CandidateLosses(model, self.prompts, self.objective)
        losses._tokens, losses._logits = self.limits
        return losses.part


class CandidateLosses:
    """The loss of a prefix: an objective over all prompts with the prefix in place, lower is better.

        losses = CandidateLosses(model, prompts, ms.TeacherForcedCE())
        losses.of([(5, 17, 9), (5, 18, 9)], base=(5, 17, 9))          # exact, [candidate]

    Prompts are pooled as `Objective.total_weight` says where there is one ("Steering Prefix Generation", section 2.3),
    else by their mean. Candidates are computed in batches: each from the first token on in which it differs from
    `base`, whose keys and values stand before, and only what the objective reads is unembedded.

    Attributes:
        prompts: what the prefix goes into; see `insert`.
        table: embeddings of the vocabulary.
        fluency: weight of the prefix's own mean negative log likelihood (nats a token) in the loss.
        flops: operations that the packed pass did so far.
    """

    def __init__(self, model: Model, prompts: PromptsLike, objective: Objective, *, fluency: float = 0.0) -> None:
        self.model, self.objective, self.fluency = model, objective, fluency
        self.prompts = model.prompts(prompts).padded("right")
        check_examples(objective, self.prompts)
        self.table = embeddings(model)
        # The packed pass leaves no activations behind; objectives that read some take whole forward passes.
        self.decoder = None if objective.sites() else model.decoder
        self._id = model.id
        self._layouts: dict[int, Layout] = {}
        self._weights: dict[int, Tensor] = {}
        self._chunked: dict[int, Sequence[Tensor]] = {}
        self._base: _Base | None = None
        self.flops = 0.0
        device = model.device.type
        self._tokens = CANDIDATE_TOKENS.get(device, CANDIDATE_TOKENS["cuda"])
        self._logits = CANDIDATE_LOGITS.get(device, CANDIDATE_LOGITS["cuda"])
        self._work = _Work(self.prompts, objective, (self._tokens, self._logits))

    def layout(self, n: int) -> Layout:
        """For prefixes of n tokens."""
        if n not in self._layouts:
            slotted, filled = (
                insert(self.prompts, where="prefix", slots=n),
                insert(self.prompts, [0] * n, where="prefix"),
            )
            self.model.prompts(filled)
            read = self.objective.reads(filled)
            read = torch.zeros_like(filled.mask) if read is None else read
            position = torch.arange(read.shape[1], device=read.device)
            stop = (read * (position + 1)).amax(1)
            begin = torch.where(read, position, 1 << 30).amin(1)
            first = slotted.slots.int().argmax(1)
            self._layouts[n] = Layout(filled, first, read, begin, stop)
        return self._layouts[n]

    def weights(self, n: int) -> Float[Tensor, " prompt"]:
        """How much each prompt counts, summing to 1."""
        if n not in self._weights:
            total = getattr(self.objective, "total_weight", None)
            prompts = self.layout(n).prompts
            weights = torch.ones(len(prompts), device=prompts.tokens.device) if total is None else total(prompts)
            self._weights[n] = weights.double() / weights.double().sum()
        return self._weights[n]

    def memory(self, n: int) -> Memory:
        """What candidates of n tokens, and a gradient, hold at their largest."""
        prompts, stop = self.layout(n).prompts, self.layout(n).stop
        engine = Engine(self.model, prompts, {"loss": self.objective})
        # The clean keys and values of all prompts are kept, and the graph of the largest chunk.
        rows = max(int(stop[chunk].sum()) for chunk in self._chunks(n))
        tokens = int(prompts.lengths.sum())
        return max(
            engine.memory([-1], rows=rows, chunk=tokens, grad=True),
            engine.memory([-1], rows=self._tokens, chunk=tokens),
            key=lambda memory: memory.total,
        )

    def of(self, candidates: Sequence[Ids], *, base: Ids | None = None) -> Float[np.ndarray, " candidate"]:
        """Exact losses.

        Args:
            candidates: of any lengths from 1.
            base: the prefix that they differ from in a few tokens; None for the first candidate.

        Raises:
            MechsteerError: a prompt with a candidate is longer than the context, or a loss is NaN.
        """
        if not candidates:
            return np.zeros(0)
        values = self.values(candidates, base=base)
        weights = torch.stack([self.weights(len(ids)) for ids in candidates])
        losses = (values.double() * weights).sum(1)
        if self.fluency:
            losses = losses + self.fluency * self.surprise(candidates).to(losses)
        if not bool(losses.isfinite().all()):
            worst = candidates[int((~losses.isfinite()).int().argmax())]
            raise MechsteerError(
                f"{self.objective!r} is NaN or infinite with the prefix {list(worst)}. Choose another objective."
            )
        return losses.cpu().numpy()

    def values(self, candidates: Sequence[Ids], *, base: Ids | None = None) -> Float[Tensor, "candidate prompt"]:
        """The objective itself, of every candidate on every prompt; by the workers of the surrounding `using`."""
        out = torch.zeros(len(candidates), len(self.prompts), dtype=torch.float64, device=self.model.device)
        parts = list(self._parts(candidates, base or candidates[0]))
        with executor_of(None) as executor:
            if executor is None or len(parts) == 1:
                found = (self.part(each) for each in parts)
            else:
                found = computed(executor, self.model, self._work, parts)
            for part, values, flops in found:
                self.flops += flops
                where = self._chunks(len(part.ids[0]))[part.chunk].cpu()
                out[torch.tensor(part.places)[:, None], where[None]] = torch.from_numpy(values).to(out)
        return out

    def _parts(self, candidates: Sequence[Ids], base: Ids) -> Iterator["Part"]:
        """The candidates in batches, for each chunk of the prompts."""
        same = [_common(ids, base) for ids in candidates]
        for n in sorted({len(ids) for ids in candidates}):
            # Those that start at the same place stand next to each other: less padding.
            members = sorted((i for i, ids in enumerate(candidates) if len(ids) == n), key=lambda i: -same[i])
            for number, chunk in enumerate(self._chunks(n)):
                layout = self.layout(n)
                cost = max(1, int((layout.stop - layout.first)[chunk].clamp(min=1).sum()))
                reads = max(1, int(layout.read[chunk].sum())) * self.model.d_vocab
                size = max(1, min(self._tokens // cost, self._logits // reads))
                for start in range(0, len(members), size):
                    places = tuple(members[start : start + size])
                    ids = tuple(tuple(candidates[i]) for i in places)
                    yield Part(number, places, ids, tuple(same[i] for i in places), tuple(base))

    def part(self, part: "Part") -> tuple["Part", Float[np.ndarray, "candidate prompt"], float]:
        """The objective of a batch of candidates, and the operations that it took."""
        before, device = self.flops, self.model.device
        layout, n = self.layout(len(part.ids[0])), len(part.places)
        chunk = self._chunks(len(part.ids[0]))[part.chunk]
        ids, same = torch.tensor(part.ids, device=device), torch.tensor(part.same, device=device)
        with torch.no_grad():
            run = self._run(layout, chunk, part.chunk, ids, same, part.base)
            values = self.objective(run).view(len(chunk), n).T.double().cpu().numpy()
        flops, self.flops = self.flops - before, before
        return part, values, flops

    def gradient(self, ids: Ids) -> tuple[float, Float[Tensor, "slot d_model"]]:
        """The loss of a prefix (without fluency), and its gradient with respect to the prefix's embeddings.

        Raises:
            MechsteerError: the objective has no gradient, or it is not finite.
        """
        n = len(ids)
        layout, weights = self.layout(n), self.weights(n)
        rows = torch.tensor([ids], device=self.model.device)
        total, gradient = 0.0, torch.zeros(n, self.model.d_model, dtype=torch.float64, device=self.model.device)
        for number, chunk in enumerate(self._chunks(n)):
            leaf = precise(self.table[list(ids)].detach().clone()).requires_grad_()
            with torch.enable_grad():
                start = torch.zeros(1, dtype=torch.long, device=rows.device)
                run = self._run(layout, chunk, number, rows, start, ids, leaf)
                loss = (precise(self.objective(run)).double() * weights[chunk]).sum()
                if not loss.requires_grad:
                    raise MechsteerError(
                        f"{self.objective!r} has no gradient at the embeddings. Use an objective computed from logits "
                        "or activations with PyTorch."
                    )
                (found,) = torch.autograd.grad(loss, [leaf])
            total, gradient = total + float(loss.detach()), gradient + found.double()
        if not bool(gradient.isfinite().all()):
            raise MechsteerError(f"The gradient of {self.objective!r} is not finite. Choose another objective.")
        return total, gradient

    def next_tokens(self, ids: Ids) -> Float[Tensor, "slot d_vocab"]:
        """Log-probabilities of the token at each place of a prefix, after what stands before it in the first prompt."""
        return self._log_probs([ids])[0]

    def surprise(self, candidates: Sequence[Ids]) -> Float[Tensor, " candidate"]:
        """Mean negative log likelihood of each prefix's tokens, in nats, after what stands before in the first prompt.

        Its exponential is the prefix's perplexity.
        """
        out = torch.zeros(len(candidates), dtype=torch.float64, device=self.model.device)
        for n in {len(ids) for ids in candidates}:
            index = [i for i, ids in enumerate(candidates) if len(ids) == n]
            size = max(1, self._logits // (n * self.model.d_vocab))
            for part in (index[at : at + size] for at in range(0, len(index), size)):
                chosen = [candidates[i] for i in part]
                found = self._log_probs(chosen).gather(2, torch.tensor(chosen, device=out.device)[..., None])
                out[part] = -found[..., 0].double().mean(1)
        return out

    # ---- passes ----

    def _log_probs(self, candidates: Sequence[Ids]) -> Float[Tensor, "candidate slot d_vocab"]:
        n = len(candidates[0])
        layout = self.layout(n)
        first = int(layout.first[0])
        before = layout.prompts.tokens[0, :first].tolist()
        prompts = Prompts.from_ids([[*before, *ids] for ids in candidates]).to(self.model.device)
        # Nothing predicts a prefix that stands first of all: its first token then counts as certain.
        read = torch.zeros_like(prompts.mask)
        read[:, max(first - 1, 0) : first + n - 1] = True
        with torch.no_grad():
            rows, _ = self.model.forward(prompts, [], [], read=read)
            found = F.log_softmax(precise(rows), -1).view(len(candidates), -1, self.model.d_vocab)
        return found if first else F.pad(found, (0, 0, 1, 0))

    def _chunks(self, n: int) -> Sequence[Int[Tensor, " _"]]:
        """Indices of prompts that are computed together; the same ones for every length."""
        if n not in self._chunked:
            layout = self.layout(n)
            count = len(layout.prompts)
            # From the prompts without a prefix, so that caches fit candidates of other lengths.
            longest, reads = int(self.prompts.lengths.max()), max(1, int(layout.read.sum(1).max()))
            size = max(1, min(count, self._tokens // longest, self._logits // (reads * self.model.d_vocab)))
            self._chunked[n] = torch.arange(count, device=layout.prompts.tokens.device).split(size)
        return self._chunked[n]

    def _items(self, layout: Layout, chunk: Int[Tensor, " _"], ids: Int[Tensor, "cell slot"]) -> Prompts:
        """The prompts of a chunk with each prefix in place, ordered by prompt, then prefix."""
        n_cells, n = ids.shape
        example = chunk.repeat_interleave(n_cells)
        prompts = replace(layout.prompts, labels=())[example]
        where = layout.first[example][:, None] + torch.arange(n, device=chunk.device)
        return replace(prompts, tokens=prompts.tokens.scatter(1, where, ids.repeat(len(chunk), 1)))

    def _run(
        self,
        layout: Layout,
        chunk: Int[Tensor, " _"],
        number: int,
        ids: Int[Tensor, "cell slot"],
        same: Int[Tensor, " cell"],
        base: Ids,
        leaf: Float[Tensor, "slot d_model"] | None = None,
    ) -> Run:
        """The Run of prefixes that agree with `base` in their first `same` tokens; `leaf` stands for the embeddings."""
        items, n_cells = self._items(layout, chunk, ids), len(ids)
        example = chunk.repeat_interleave(n_cells)
        read, first, n = layout.read[example], layout.first, ids.shape[1]

        def put(values: Tensor, example: Tensor, position: Tensor) -> Tensor:
            """The embeddings with the leaf's rows where the prefix stands."""
            if leaf is None:
                return values
            slot = position - first[example]
            inside = (slot >= 0) & (slot < n)
            # Rounded after the choice, so that gradients of many prompts are summed before they are rounded.
            return torch.where(inside[..., None], leaf[slot.clamp(0, n - 1)].to(values), values)

        if self.decoder is None:
            position = torch.arange(read.shape[1], device=read.device).expand_as(read)

            def hook(tensor: Float[Tensor, "..."], hook: object) -> Float[Tensor, "..."]:
                return put(tensor, example[:, None].expand_as(read), position)

            hooks = [] if leaf is None else [(Site("embed").hook_name, hook)]
            rows, taken = self.model.forward(items, hooks, list(self.objective.sites()), read=read)
            return Run(items, rows, read, Activations(taken, prompts=items, model=self._id), example)
        past = self._past(base, items.tokens.shape[1]).caches[number]
        start = torch.minimum(first[chunk][:, None] + same, layout.begin[chunk][:, None])
        stop = layout.stop[chunk][:, None].expand_as(start)
        # A few clean tokens computed again cost less than rows of unlike lengths.
        earliest = start.amin(1, keepdim=True).expand_as(start)
        if int((stop - earliest).sum()) <= CANDIDATE_EVEN * int((stop - start).sum()):
            start = earliest
        pack = Pack(
            lambda group, position, cell: Rows(layout.prompts, chunk[group], position, cell),
            start.contiguous(), stop, layout.read[chunk][:, None].expand(-1, n_cells, -1),
        )  # fmt: skip
        rows = pack.all.rows
        edit = {("embed", -1): [lambda values, rows: put(values, rows.example, rows.position)]}
        tokens = items.tokens[pack.all.item, rows.position]
        x = self.decoder.embed(tokens, pack.all, {} if leaf is None else edit, Capture())
        # Candidates differ in a token or two: what layer 0 makes of the others by themselves is the same.
        alike = Alike.of(tokens, rows.position) if leaf is None else None
        x = self.decoder.blocks(x, pack, first=0, stop=self.decoder.n_layers, alike=alike, past=past)
        self.flops += self.decoder.flops(pack, first=0, backward=leaf is not None)
        self.flops += self.decoder.unembed_flops * x.shape[0] * (1 if leaf is None else 2)
        if alike is not None:
            self.flops -= self.decoder.dims.project_flops(len(alike.kind) - len(alike.first))
        # Rows stand in the order of (item, position), and the last layer was computed for those that are read.
        activations = Activations({}, prompts=items, model=self._id)
        return Run(items, self.decoder.logits(x), read, activations, example)

    def _past(self, base: Ids, width: int) -> _Base:
        """Keys and values up to the end of `base` in every chunk, in caches at least so wide."""
        kept = self._base
        if kept is None or kept.ids != base or kept.width < width:
            n = len(base)
            layout = self.layout(n)
            width = max(width, layout.prompts.tokens.shape[1] + 4)
            ids = torch.tensor([base], device=self.model.device)
            caches = []
            for chunk in self._chunks(n):
                prompts = self._items(layout, chunk, ids)
                pack = whole_pack(prompts, stop=layout.first[chunk] + n, read=torch.zeros_like(prompts.mask))
                decoder, rows = self.decoder, pack.all.rows
                assert decoder is not None
                cache = Cache.empty(decoder, len(chunk), width)
                with torch.no_grad():
                    x = decoder.embed(prompts.tokens[rows.example, rows.position], pack.all, {}, Capture())
                    decoder.blocks(x, pack, first=0, stop=decoder.n_layers, own=cache)
                self.flops += decoder.flops(pack, first=0, own=True)
                caches.append(cache)
            self._base = kept = _Base(base, width, caches)
        return kept


def _common(ids: Ids, base: Ids) -> int:
    """How many first tokens two prefixes share."""
    return next((i for i, (a, b) in enumerate(zip(ids, base, strict=False)) if a != b), min(len(ids), len(base)))
