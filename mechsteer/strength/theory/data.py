"""Data partitioned into concepts, and the context sets of a difference of means.

Taimeskhanov, Vaiter and Garreau 2026, "Towards Understanding Steering Strength", section 2.1 and appendix B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError

# How far sums of probabilities may be from 1; in fp64 a sum over a vocabulary is good to about 1e-13.
_SUMS = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class ConceptData:
    """Next-token probabilities in which a token is likelier in its own concept (definition 2.1, assumption 1).

        data = ConceptData.smoothed(3, 3, eps=0.05)                  # appendix B.1, on the vocabulary of eq. 2
        data = ConceptData(a, b, concepts, contexts)                 # any a_z, b_z

    p(z | c_j) is a_z where token z and context c_j belong to the same concept, else b_z, with 1 > a_z > b_z > 0.

    **What the paper leaves unsaid**: the probabilities of each context sum to 1, so a and b are not free. With a
    context in each concept k, sum over C_k of (a_z - b_z) = 1 - sum over all z of b_z: each concept gains the same.
    All data of assumption 1 are therefore a_z = b_z + (1 - sum b) * share_z, with `share` positive and of sum 1 in
    each concept, which is how `from_shares` makes them. Concepts may differ in size here (the paper has s = V / G
    tokens in each; nothing rests on it).

    Attributes:
        a: probability of each token after a context of its own concept; [context, token] where it depends on the
            context as well (appendix B.1), of which only the places within the context's own concept count.
        b: probability of each token after all other contexts.
        concepts: the concept of each token, counted from 0.
        contexts: distinct contexts as tokens, each of one concept only.
        weights: how often each context comes, of sum 1; None makes them all the same.
        pi: these weights, filled in (appendix B.5).
        probs: p(z | c_j).

    Raises:
        MechsteerError: assumption 1 does not hold, probabilities do not sum to 1, or a context repeats or mixes
            concepts.
    """

    a: Float[Tensor, "... token"]
    b: Float[Tensor, " token"]
    concepts: Int[Tensor, " token"]
    contexts: Int[Tensor, "context pos"]
    weights: Float[Tensor, " context"] | None = None
    pi: Float[Tensor, " context"] = field(init=False)
    probs: Float[Tensor, "context token"] = field(init=False)

    def __post_init__(self) -> None:
        n_contexts, n_tokens = len(self.contexts), len(self.concepts)
        a, b = self.a.double(), self.b.double()
        even = torch.full((n_contexts,), 1 / max(n_contexts, 1), dtype=torch.float64)
        pi = even if self.weights is None else self.weights.double()
        fits = b.shape == (n_tokens,) and a.shape in ((n_tokens,), (n_contexts, n_tokens))
        if not fits or pi.shape != (n_contexts,):
            raise MechsteerError(
                f"ConceptData got {n_tokens} tokens in concepts, {n_contexts} contexts, a {list(a.shape)}, "
                f"b {list(b.shape)} and weights {list(pi.shape)}. a takes [token] or [context, token], b [token] and "
                "weights [context]."
            )
        _check_concepts(self.concepts)
        _check_contexts(self.contexts, self.concepts)
        if not bool((pi > 0).all()) or abs(float(pi.sum()) - 1) > _SUMS:
            raise MechsteerError(
                f"ConceptData got weights from {float(pi.min()):.6g} with sum {float(pi.sum()):.6g}. Each context's "
                "weight is above 0, and together they are 1."
            )
        probs = torch.where(self.own, a, b)
        _check_assumption_1(a.expand(n_contexts, n_tokens), b, self.own)
        _check_sums(probs)
        for name, value in {"a": a, "b": b, "pi": pi, "probs": probs}.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def smoothed(
        n_concepts: int, concept_size: int, *, eps: float, contexts_per_concept: int = 4, length: int = 3, seed: int = 0
    ) -> "ConceptData":
        """The instance of appendix B.1: a_z = (1 - eps) / s, b_z = eps / ((G - 1) s).

        `ConceptData.smoothed(3, 3, eps=0.05)` has the paper's entropy: log 3 + h(0.05) + 0.05 log 2 = 1.33178 nats. The
        paper prints 1.3317, which is cut, not rounded; of all G, s up to 26 and eps in steps of 0.001, only this
        one and G = 24, s = 2, eps = 0.1 come within 1e-4 of 1.3317.

        Args:
            n_concepts: G, two at least.
            concept_size: s, tokens in each concept.
            eps: smoothing in (0, (G - 1) / G): the probability of leaving the context's concept.
            contexts_per_concept: distinct contexts of each concept, drawn at random.
            length: tokens in each context.
            seed: of the contexts.

        Raises:
            MechsteerError: `eps` is outside its interval, or there are not so many distinct contexts.
        """
        even = torch.ones(max(n_concepts, 0), max(concept_size, 0), dtype=torch.float64)
        return ConceptData.varied(
            even, even, eps=eps, contexts_per_concept=contexts_per_concept, length=length, seed=seed
        )

    @staticmethod
    def varied(
        gamma: Float[Tensor, "concept size"],
        omega: Float[Tensor, "concept size"],
        *,
        eps: float,
        contexts_per_concept: int = 4,
        length: int = 3,
        seed: int = 0,
    ) -> "ConceptData":
        """The instance of appendix B.3: a_z = (1 - eps) gamma_z, b_z = eps / (G - 1) omega_z.

        Args:
            gamma: positive; scaled to sum 1 in each concept.
            omega: as `gamma`.
            eps: in (0, (G - 1) / G); the closer to its end, the fewer `gamma` and `omega` keep a_z > b_z.
            contexts_per_concept: as in `smoothed`.
            length: as in `smoothed`.
            seed: as in `smoothed`.

        Raises:
            MechsteerError: as `smoothed`; or a_z > b_z fails for some token.
        """
        n_concepts, size = gamma.shape
        if n_concepts < 2 or size < 1 or not 0 < eps < (n_concepts - 1) / n_concepts:
            raise MechsteerError(
                f"ConceptData got {n_concepts} concepts of {size} tokens and eps={eps}. It takes at least two concepts "
                "of at least one token, and eps in (0, (G - 1) / G) for G concepts."
            )
        gamma, omega = gamma.double(), omega.double()
        a = (1 - eps) * gamma / gamma.sum(1, keepdim=True)
        b = eps / (n_concepts - 1) * omega / omega.sum(1, keepdim=True)
        concepts = torch.arange(n_concepts).repeat_interleave(size)
        contexts = random_contexts(concepts, per_concept=contexts_per_concept, length=length, seed=seed)
        return ConceptData(a.flatten(), b.flatten(), concepts, contexts)

    @staticmethod
    def from_shares(
        b: Float[Tensor, " token"],
        share: Float[Tensor, " token"],
        concepts: Int[Tensor, " token"],
        *,
        contexts_per_concept: int = 4,
        length: int = 3,
        seed: int = 0,
    ) -> "ConceptData":
        """Any a, b of assumption 1: a_z = b_z + (1 - sum b) * share_z, with `share` scaled to sum 1 in each concept.

        Raises:
            MechsteerError: sum b is not below 1, or `share` or `b` is not positive.
        """
        b, share = b.double(), share.double()
        if float(b.sum()) >= 1 or float(share.min()) <= 0:
            raise MechsteerError(
                f"ConceptData.from_shares got b of sum {float(b.sum()):.6g} and shares from {float(share.min()):.6g}. "
                "The sum of b is below 1 and each share above 0."
            )
        _check_concepts(concepts)
        sums = torch.zeros(int(concepts.max()) + 1, dtype=torch.float64).index_add(0, concepts, share)
        contexts = random_contexts(concepts, per_concept=contexts_per_concept, length=length, seed=seed)
        return ConceptData(b + (1 - b.sum()) * share / sums[concepts], b, concepts, contexts)

    @staticmethod
    def from_pairs(
        contexts: Int[Tensor, "pair pos"], next_tokens: Int[Tensor, " pair"], concepts: Int[Tensor, " token"]
    ) -> "ConceptData":
        """Counts of training pairs (c_i, z_i) (definition 2.1): probabilities and the weights pi_j (appendix B.5).

        Raises:
            MechsteerError: the counts break assumption 1, as all but a complete design does.
        """
        distinct, which = contexts.unique(dim=0, return_inverse=True)
        counts = torch.zeros(len(distinct), len(concepts), dtype=torch.float64)
        counts = counts.index_put((which, next_tokens), torch.ones(len(which), dtype=torch.float64), accumulate=True)
        totals = counts.sum(1)
        probs = counts / totals[:, None]
        own = concepts[distinct[:, 0]][:, None] == concepts
        b = torch.where(own, 0.0, probs).sum(0) / (~own).sum(0)
        off = ((probs - b).abs() * ~own).amax(0)
        if bool((off > _SUMS).any()):
            raise MechsteerError(
                f"ConceptData.from_pairs: after contexts of other concepts, token {int(off.argmax())} comes with "
                f"probabilities up to {float(off.max()):.3g} from their mean. Assumption 1 asks for one b_z; balance "
                "the pairs, or pass a and b."
            )
        return ConceptData(probs, b, concepts, distinct, totals / totals.sum())

    @property
    def context_concepts(self) -> Int[Tensor, " context"]:
        """The concept of each context."""
        return self.concepts[self.contexts[:, 0]]

    @property
    def own(self) -> Tensor:
        """True where a token belongs to the context's concept [context, token]."""
        return self.context_concepts[:, None] == self.concepts

    @property
    def n_concepts(self) -> int:
        return int(self.concepts.max()) + 1

    @property
    def entropy(self) -> float:
        """Mean entropy of the next token in nats: no model has a lower cross-entropy (appendix B.1)."""
        return float(-(self.pi * (self.probs * self.probs.log()).sum(1)).sum())

    def tokens_of(self, concept: int) -> Tensor:
        """True for the tokens of a concept [token].

        Raises:
            MechsteerError: there is no such concept.
        """
        if not 0 <= concept < self.n_concepts:
            raise MechsteerError(f"ConceptData has no concept {concept}: it has 0 to {self.n_concepts - 1}.")
        return self.concepts == concept

    def sets(
        self, target: int, *, opposite: int | None = None, size: int | None = None, seed: int = 0
    ) -> "ContextSets":
        """Contexts for a difference of means, drawn at random without replacement (section 2.2).

        Args:
            target: the concept T to steer toward: all positive contexts belong to it.
            opposite: the concept of all negative contexts (the *contrastive* setting); None draws them from all
                concepts but `target` (the *random* setting).
            size: q, contexts in each set; None takes as many as there are on the smaller side.
            seed: of the draw.

        Raises:
            MechsteerError: there is no such concept, `opposite` is `target`, or there are fewer than q contexts.
        """
        inside = self.tokens_of(target)[self.contexts[:, 0]]
        outside = ~inside if opposite is None else self.tokens_of(opposite)[self.contexts[:, 0]]
        if opposite == target:
            raise MechsteerError(f"ConceptData.sets got target={target} and opposite={opposite}. Pick two concepts.")
        most = min(int(inside.sum()), int(outside.sum()))
        q = most if size is None else size
        if not 1 <= q <= most:
            raise MechsteerError(
                f"ConceptData.sets got size={size}, and there are {int(inside.sum())} positive and "
                f"{int(outside.sum())} negative contexts. Take a size from 1 to {most}."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            side.nonzero()[:, 0][torch.randperm(int(side.sum()), generator=generator)[:q]] for side in (inside, outside)
        ]
        return ContextSets(self, target, drawn[0], drawn[1])

    def __repr__(self) -> str:
        return (
            f"ConceptData({len(self.b)} tokens in {self.n_concepts} concepts, {len(self.contexts)} contexts, "
            f"entropy {self.entropy:.6g} nats)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ContextSets:
    """Which contexts a steering vector is made of: P within the target concept, N outside it (section 2.2, eq. 3).

    Attributes:
        data: what the contexts are of.
        target: the concept T.
        positive: P, indices of contexts; each stands once.
        negative: N, as many.

    Raises:
        MechsteerError: the sets are empty, of unlike size, overlap or repeat, or one of them holds a wrong concept.
    """

    data: ConceptData
    target: int
    positive: Int[Tensor, " n_positive"]
    negative: Int[Tensor, " n_negative"]

    def __post_init__(self) -> None:
        n_contexts = len(self.data.contexts)
        inside = self.data.tokens_of(self.target)[self.data.contexts[:, 0]]
        both = torch.cat([self.positive, self.negative])
        q = len(self.positive)
        if q == 0 or len(self.negative) != q or len(both.unique()) != 2 * q:
            raise MechsteerError(
                f"ContextSets got {q} positive and {len(self.negative)} negative contexts, {len(both.unique())} of "
                "them distinct. Both take the same number, at least one, and no context twice."
            )
        if int(both.min()) < 0 or int(both.max()) >= n_contexts:
            raise MechsteerError(
                f"ContextSets got contexts {int(both.min())} to {int(both.max())}, and there are 0 to {n_contexts - 1}."
            )
        for side, indices, wanted in (("positive", self.positive, True), ("negative", self.negative, False)):
            wrong = indices[inside[indices] != wanted]
            if len(wrong):
                where = "belongs" if not wanted else "does not belong"
                raise MechsteerError(
                    f"ContextSets got {side} context {int(wrong[0])}, which {where} to the target concept "
                    f"{self.target}. Positive contexts do, negative ones do not."
                )

    def __repr__(self) -> str:
        return f"ContextSets(target {self.target}, {len(self.positive)} contexts each)"


def random_contexts(
    concepts: Int[Tensor, " token"], *, per_concept: int, length: int, seed: int
) -> Int[Tensor, "context pos"]:
    """Distinct contexts of tokens of one concept each, the concepts in order.

    Raises:
        MechsteerError: a concept has fewer distinct contexts of this length.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for concept in range(int(concepts.max()) + 1):
        own = (concepts == concept).nonzero()[:, 0]
        there = len(own) ** max(length, 0)
        if length < 1 or not 1 <= per_concept <= there:
            raise MechsteerError(
                f"There are {there if length > 0 else 0} contexts of length {length} from the {len(own)} tokens of "
                f"concept {concept}, and {per_concept} were asked for. Take at least one and at most these."
            )
        chosen: dict[tuple[int, ...], None] = {}  # in the order drawn
        if there <= 4 * per_concept:  # few: numbered, and the numbers shuffled
            for number in torch.randperm(there, generator=generator)[:per_concept].tolist():
                chosen[tuple(number // len(own) ** place % len(own) for place in range(length))] = None
        while len(chosen) < per_concept:
            chosen[tuple(torch.randint(len(own), (length,), generator=generator).tolist())] = None
        rows.append(own[torch.tensor(list(chosen))])
    return torch.cat(rows)


def _check_concepts(concepts: Tensor) -> None:
    there: Sequence[int] = concepts.unique().tolist()
    if len(there) < 2 or there != list(range(len(there))):
        raise MechsteerError(
            f"ConceptData got concepts {there[:8]}. Tokens are numbered by concept 0, 1, ... with none left out, and "
            "there are at least two."
        )


def _check_contexts(contexts: Tensor, concepts: Tensor) -> None:
    if contexts.shape[0] < 1 or contexts.shape[1] < 1:
        raise MechsteerError(f"ConceptData got contexts of shape {list(contexts.shape)}. It takes at least one token.")
    if int(contexts.min()) < 0 or int(contexts.max()) >= len(concepts):
        raise MechsteerError(
            f"ConceptData got contexts with tokens {int(contexts.min())} to {int(contexts.max())}, and there are "
            f"{len(concepts)} tokens."
        )
    held = concepts[contexts]
    mixed = (held != held[:, :1]).any(1).nonzero()[:, 0]
    if len(mixed):
        raise MechsteerError(
            f"ConceptData got context {int(mixed[0])} with tokens of concepts {held[mixed[0]].unique().tolist()}. The "
            "theory takes contexts of a single concept."
        )
    if len(contexts.unique(dim=0)) < len(contexts):
        raise MechsteerError(
            "ConceptData got the same context twice. Pass each once, and how often it comes as weights."
        )


def _check_assumption_1(a: Tensor, b: Tensor, own: Tensor) -> None:
    wrong = (own & ~((a > b) & (a < 1))) | ~(b > 0)
    if bool(wrong.any()):
        context, token = wrong.nonzero()[0].tolist()
        raise MechsteerError(
            f"ConceptData got a={float(a[context, token]):.6g} and b={float(b[token]):.6g} for token {token}. "
            "Assumption 1 asks for 1 > a > b > 0."
        )


def _check_sums(probs: Tensor) -> None:
    sums = probs.sum(1)
    wrong = ((sums - 1).abs() > _SUMS).nonzero()[:, 0]
    if len(wrong):
        raise MechsteerError(
            f"ConceptData got probabilities of sum {float(sums[wrong[0]]):.9g} after context {int(wrong[0])}. They sum "
            "to 1 where each concept's sum of a - b is 1 - sum(b); see ConceptData.from_shares."
        )
