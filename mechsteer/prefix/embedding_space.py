"""Where soft prefixes start, how far from the vocabulary's embeddings they may go, and what pulls them back."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives.base import one_of
from mechsteer.precision import precise
from mechsteer.vocabulary import allowed_tokens, check_ids, embeddings

Start = str | Sequence[int] | Tensor
"""What `EmbeddingSpace.starts` takes."""

CONSTRAINTS = ("norm", "ellipsoid", "tokens")
DISTANCES = ("cosine", "inner_product", "l2")
# Numbers in a block of distances [vector, token].
_BLOCK = 1 << 24
# Share of the allowed tokens that the constraints leave out on a side, so that no odd token decides.
_TAIL = 0.05


class EmbeddingSpace:
    """The embeddings of the tokens that a prefix may be made of.

    Attributes:
        table: of the whole vocabulary.
        ids: of the allowed tokens, ascending.
        scale: root mean square of an entry of their embeddings.
        spread: mean squared distance of an allowed token from their mean.
    """

    def __init__(self, model: Model, allowed: Sequence[int] | None = None) -> None:
        """
        Args:
            model: whose vocabulary.
            allowed: ids; None for all but special and chat template tokens.

        Raises:
            MechsteerError: there are none, or one is no id of the model.
        """
        self._model = model
        self.ids = allowed_tokens(model) if allowed is None else sorted(set(allowed))
        if not self.ids:
            raise MechsteerError("allowed=[] leaves no token. Pass ids, or None for all but special tokens.")
        check_ids(model, self.ids)
        self.table: Float[Tensor, "d_vocab d_model"] = precise(embeddings(model).detach())
        self.allowed: Float[Tensor, "token d_model"] = self.table[self.ids]
        self._centre = self.allowed.mean(0)
        self.scale = float(self.allowed.square().mean().sqrt())
        self.spread = float((self.allowed - self._centre).square().sum(1).mean())

    # ---- where to start ----

    def starts(
        self, init: Start, n_prefixes: int, n_slots: int, *, noise: float, seed: int
    ) -> Float[Tensor, "prefix slot d_model"]:
        """A first embedding for every slot of every prefix.

        Args:
            init: "random tokens", other ones for each prefix; "mean", the mean embedding of the allowed tokens; any
                other text, or ids, at most one a slot, the rest being random tokens; or embeddings [slot, d_model], or
                [prefix, slot, d_model] with one for each prefix.
            n_prefixes: how many.
            n_slots: of each.
            noise: standard deviation of Gaussian noise, in units of `scale`, added to all prefixes but the first where
                they would be the same.
            seed: of random tokens and noise.

        Raises:
            MechsteerError: text or ids are none or more than slots, or embeddings have another shape.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.ids), (n_prefixes, n_slots), generator=generator)
        random = self.allowed[drawn.to(self.table.device)]
        if isinstance(init, Tensor):
            out = init.detach().to(self.table)
            wanted = (n_slots, self.table.shape[1])
            if out.shape == (n_prefixes, *wanted):
                return out.clone()
            if out.shape != wanted:
                raise MechsteerError(
                    f"init has shape {list(out.shape)}. Pass [slot {n_slots}, d_model {wanted[1]}], or one of these "
                    f"for each of the {n_prefixes} restarts."
                )
            same = out.expand(n_prefixes, -1, -1)
        elif init == "random tokens":
            return random
        elif init == "mean":
            same = self._centre.expand_as(random)
        else:
            ids = self._ids_of(init)
            if not 0 < len(ids) <= n_slots:
                raise MechsteerError(f"init={init!r} is {len(ids)} tokens for {n_slots} slots. Pass 1 to {n_slots}.")
            same = torch.cat([self.table[ids].expand(n_prefixes, -1, -1), random[:, len(ids) :]], 1)
        added = torch.randn(same.shape, generator=generator, dtype=torch.float64) * noise * self.scale
        added[0] = 0
        return same + added.to(same)

    def _ids_of(self, init: str | Sequence[int]) -> list[int]:
        if not isinstance(init, str):
            check_ids(self._model, list(init))
            return list(init)
        if self._model.tokenizer is None:
            raise MechsteerError(f"init={init!r} needs a tokenizer, and {self._model.name} has none. Pass ids.")
        return self._model.tokenizer.encode(init, add_special_tokens=False)

    # ---- what is near ----

    def nearest(
        self, vectors: Float[Tensor, "vector d_model"], k: int = 1, *, by: str = "l2"
    ) -> tuple[Int[Tensor, "vector k"], Float[Tensor, "vector k"]]:
        """Ids of the nearest allowed tokens, nearest first, and how near: higher is nearer.

        Args:
            vectors: in the space of the embeddings.
            k: how many; all of them where there are fewer.
            by: "cosine"; "inner_product"; or "l2", for which the second is minus the squared distance.

        Raises:
            MechsteerError: there is no such `by`, or k is below 1.
        """
        one_of("by", by, DISTANCES)
        if k < 1:
            raise MechsteerError(f"k={k} is no number of tokens. Pass 1 or more.")
        ids = torch.tensor(self.ids, device=self.table.device)
        found = [self._near(block, by).topk(min(k, len(ids)), 1) for block in self._blocks(vectors)]
        return ids[torch.cat([each.indices for each in found])], torch.cat([each.values for each in found])

    def _blocks(self, vectors: Float[Tensor, "vector d_model"]) -> Iterator[Float[Tensor, "part d_model"]]:
        yield from vectors.detach().to(self.table).split(max(1, _BLOCK // len(self.ids)))

    def _near(self, vectors: Float[Tensor, "vector d_model"], by: str) -> Float[Tensor, "vector token"]:
        products = vectors @ self.allowed.T
        if by == "inner_product":
            return products
        squares, own = self.allowed.square().sum(1), vectors.square().sum(1, keepdim=True)
        if by == "cosine":
            return products / (squares.sqrt() * own.sqrt()).clamp(min=torch.finfo(products.dtype).tiny)
        return (2 * products - squares - own).clamp(max=0)

    def hardened(self, prefixes: Float[Tensor, "prefix slot d_model"]) -> Float[Tensor, "prefix slot d_model"]:
        """The nearest allowed token of each vector, by distance."""
        ids, _ = self.nearest(prefixes.flatten(0, 1))
        return self.table[ids[:, 0]].view_as(prefixes).to(prefixes)

    def pull(
        self, prefixes: Float[Tensor, "prefix slot d_model"]
    ) -> tuple[Float[Tensor, " prefix"], Float[Tensor, "prefix slot d_model"]]:
        """How far each prefix is from tokens, and the gradient of that:

            mean_slot min_t |e - E(t)|^2 / spread

        0 on tokens, 1 for a prefix as far from its nearest tokens as tokens are from their mean.
        """
        away = prefixes - self.hardened(prefixes)
        unit = self.spread * prefixes.shape[1]
        return away.square().sum((1, 2)).double() / unit, 2 * away / unit

    # ---- how far to go ----

    def constraint(
        self, name: str | None
    ) -> Callable[[Float[Tensor, "prefix slot d_model"]], Float[Tensor, "prefix slot d_model"]]:
        """What brings embeddings back to where they may be.

        Args:
            name: None for anywhere; "norm", the norms that the middle 90 % of tokens have; "ellipsoid", no farther from
                the mean token than 95 % of tokens are, by the tokens' own covariance (Mahalanobis 1936); or "tokens",
                on tokens alone, for which see `optimise_soft_prefix`.

        Raises:
            MechsteerError: there is no such constraint.
        """
        if name is None:
            return lambda prefixes: prefixes
        one_of("constraint", name, CONSTRAINTS)
        if name == "tokens":
            return self.hardened
        if name == "norm":
            norms = self.allowed.norm(dim=1)
            low, high = norms.quantile(_TAIL), norms.quantile(1 - _TAIL)

            def scaled(prefixes: Tensor) -> Tensor:
                own = prefixes.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(prefixes.dtype).tiny)
                return prefixes * (own.clamp(min=float(low), max=float(high)) / own)

            return scaled
        centred = (self.allowed - self._centre).double()
        covariance = centred.T @ centred / len(centred)
        # Directions that tokens hardly use would else count without end.
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=1e-3 * float(values.mean()))
        whiten = (vectors / values.sqrt()).to(self.table)
        reach = (centred.to(whiten) @ whiten).norm(dim=1).quantile(1 - _TAIL)

        def inside(prefixes: Tensor) -> Tensor:
            away = prefixes - self._centre.to(prefixes)
            distance = (away @ whiten.to(away)).norm(dim=-1, keepdim=True)
            return self._centre.to(prefixes) + away * (reach.to(away) / distance.clamp(min=1e-12)).clamp(max=1)

        return inside
