"""The loss of embeddings in the slots of many prompts, and its gradient: every restart in the same batch."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.costs import GRAPH_ROWS
from mechsteer.engine import Clean, Engine
from mechsteer.errors import MechsteerError
from mechsteer.interventions import SoftPrefix
from mechsteer.memory import Memory, devices_of
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import Objective
from mechsteer.prompts import Prompts


class PrefixLoss:
    """The weighted mean over prompts of an objective, for several prefixes at once.

        loss = PrefixLoss(model, slotted, ms.TeacherForcedCE(), n_prefixes=8)
        losses, gradient = loss.gradient(embeddings)                # [prefix], [prefix, slot, d_model]

    Rows are prefixes x prompts. Keys and values of what stands before the slots are computed once, only positions from
    the slots on are run, and only what the objective reads is unembedded. The model's parameters get no gradients.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptsLike,
        objective: Objective,
        *,
        n_prefixes: int,
        rows: Sequence[int] | None = None,
        weights: Float[Tensor, " _"] | None = None,
        batch_rows: int | None = None,
    ) -> None:
        """
        Args:
            model: what to run.
            prompts: with slots, all of as many.
            objective: one number per prompt. Lower is better.
            n_prefixes: how many prefixes there will be in a batch.
            rows: which of the prompts count; None for all.
            weights: of each of `prompts` in the mean. None for the objective's own `total_weight(prompts)` where it has
                one, as `TeacherForcedCE` has for the pooled cross entropy of "Steering Prefix Generation", section 2.3,
                and for equal ones else, as for sums of objectives.
            batch_rows: tokens in one forward and backward pass, over which gradients are summed; None for what suits
                the device. A batch holds at least one prompt with all prefixes.

        Raises:
            MechsteerError: the prompts have no slots or unlike numbers of them, the objective or the weights hold
                values for another number of prompts, or there is no such row.
        """
        right = model.prompts(prompts).padded("right")
        if not right.n_slots:
            raise MechsteerError("A soft prefix needs prompts with slots. Make them with slots= its number of vectors.")
        if objective.n_examples not in (None, len(right)):
            raise MechsteerError(
                f"{objective!r} holds values for {objective.n_examples} prompts, and {len(right)} were passed. "
                "Make it from the same prompts, held-out ones included."
            )
        chosen = list(range(len(right)) if rows is None else rows)
        if not chosen or not all(0 <= row < len(right) for row in chosen):
            raise MechsteerError(
                f"rows {chosen} were asked for of {len(right)} prompts, counted from 0. Pass at least one of them."
            )
        self.prompts, self.objective, self.n_slots = right, objective, right.n_slots
        device = right.tokens.device
        self._engine = Engine(model, right, {"loss": objective})
        blank = torch.zeros(self.n_slots, model.d_model, device=device)
        self._packed = self._engine.packs((SoftPrefix(blank),))
        self._n_prefixes, self._shape = n_prefixes, (n_prefixes, self.n_slots, model.d_model)
        start = self._engine.starts([(SoftPrefix(blank),)])[0]
        self._parts: list[tuple[Tensor, Tensor, Clean | None, Tensor]] = []
        share = self.shares(right, objective, weights)
        share = share / share[chosen].sum()
        limit = GRAPH_ROWS.get(device.type, GRAPH_ROWS["cuda"]) if batch_rows is None else batch_rows
        self.memory: Memory = self._engine.memory([-1], rows=limit, chunk=limit // n_prefixes, grad=True)
        self.memory.check(
            "This prefix search", devices_of(model), "Pass batch_rows= with fewer tokens, or n_restarts=1."
        )
        for part in self._split(torch.tensor(chosen, device=device), start, limit):
            clean = None
            if self._packed:
                read = torch.where(self._engine.read[part], 1, 0)
                before = read.any(1) & (read.argmax(1) < start[part])
                clean = self._engine.clean(part, [-1], logits=bool(before.any()))
            self._parts.append((part, start[part].expand(n_prefixes, -1), clean, share[part]))

    @property
    def flops(self) -> float:
        """Operations done so far, if the packed pass does them."""
        return self._engine.work.done

    @staticmethod
    def shares(prompts: Prompts, objective: Objective, weights: Float[Tensor, " _"] | None) -> Float[Tensor, " prompt"]:
        """What each prompt's objective counts in the mean; arguments as above.

        Raises:
            MechsteerError: there is another number of weights than of prompts, or one is not above 0.
        """
        total = getattr(objective, "total_weight", None)
        if weights is not None:
            given: Tensor = weights.detach()
        else:
            given = torch.ones(len(prompts)) if total is None else total(prompts)
        if len(given) != len(prompts) or not bool((given > 0).all()):
            raise MechsteerError(
                f"weights= has {len(given)} numbers for {len(prompts)} prompts. Pass one above 0 for each of them."
            )
        return (given.double() / given.double().sum()).to(prompts.tokens.device)

    def _split(self, chosen: Int[Tensor, " row"], start: Int[Tensor, " prompt"], limit: int) -> Iterator[Tensor]:
        """Prompts of like lengths, as many as `limit` tokens of all prefixes allow."""
        counts = (self._engine.stop - start)[chosen] if self._packed else self.prompts.lengths[chosen]
        order = counts.argsort(stable=True)
        part: list[int] = []
        total = 0
        for row, count in zip(chosen[order].tolist(), counts[order].tolist(), strict=True):
            if part and total + count * self._n_prefixes > limit:
                yield torch.tensor(part, device=chosen.device)
                part, total = [], 0
            part.append(row)
            total += count * self._n_prefixes
        yield torch.tensor(part, device=chosen.device)

    def _cells(self, embeddings: Float[Tensor, "prefix slot d_model"]) -> list[tuple[SoftPrefix]]:
        if embeddings.shape != self._shape:
            wanted = ", ".join(map(str, self._shape))
            raise MechsteerError(
                f"embeddings have shape {list(embeddings.shape)}. Pass [prefix, slot, d_model] = [{wanted}]."
            )
        return [(SoftPrefix(each),) for each in embeddings]

    def __call__(self, embeddings: Float[Tensor, "prefix slot d_model"]) -> Float[Tensor, " prefix"]:
        """The loss of each prefix, without a graph.

        Raises:
            MechsteerError: the embeddings have another shape.
        """
        total = torch.zeros(self._n_prefixes, dtype=torch.double, device=embeddings.device)
        for part, start, clean, share in self._parts:
            cells = self._cells(embeddings.detach())
            total = total + self._engine.batch(cells, part, start, clean)["loss"].double() @ share
        return total

    def gradient(
        self, embeddings: Float[Tensor, "prefix slot d_model"]
    ) -> tuple[Float[Tensor, " prefix"], Float[Tensor, "prefix slot d_model"]]:
        """The loss of each prefix, and the gradient of each with respect to its own embeddings.

        Raises:
            MechsteerError: the objective has no gradient, or the embeddings have another shape.
        """
        leaf = embeddings.detach().requires_grad_()
        total = torch.zeros(self._n_prefixes, dtype=torch.double, device=leaf.device)
        gradient = torch.zeros_like(leaf)
        for part, start, clean, share in self._parts:
            with torch.enable_grad():
                cells = self._cells(leaf)
                values = self._engine.batch(cells, part, start, clean, grad=True)["loss"]
                values = values.to(leaf.dtype) @ share.to(leaf.dtype)
                if not values.requires_grad:
                    raise MechsteerError(
                        f"{self.objective!r} has no gradient at the embeddings. Use an objective computed from logits "
                        "or activations with PyTorch."
                    )
                (found,) = torch.autograd.grad(values.sum(), leaf)
            total, gradient = total + values.detach().double(), gradient + found
        return total, gradient
