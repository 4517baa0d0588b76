"""Objectives: one number per prompt from a run, which say beforehand what they read."""

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechsteer.activations import Activations, ModelId
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.prompts import ROLES, Prompts
from mechsteer.run import Run
from mechsteer.site import Site, SiteLike

Tokens = int | str | Collection[int | str] | Tensor
"""An id or a one-token string, a set of these for all prompts, or a tensor with one id for each prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class Objective(ABC):
    """One number per prompt, from a `Run`.

        score = LogitGap(" cats", " dogs", tokenizer=model) - 0.1 * KLFromBaseline(baseline)
        score(model.run(prompts, logits=score.reads(prompts), record=score.sites()))

    `a + b`, `a - 0.1 * b`, `-a` and `a / 3` are objectives too. Numbers are differentiable with respect to the logits
    and activations of the run; they are fp32 when those are of a smaller type.

    Attributes:
        label: a name other than the class's own.
        n_examples: how many prompts it holds a value for; None when it fits any number of prompts.
    """

    label: str | None = field(default=None, init=False)
    n_examples: int | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """What a result calls it: the class in snake case unless `named` said otherwise."""
        return self.label or re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def named(self, name: str) -> "Objective":
        """The same objective under another name."""
        return _assign(copy.copy(self), label=name)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"] | None:
        """Tokens whose logits it reads, in the layout of `prompts`; None when it reads no logits."""
        return None

    def sites(self) -> tuple[Site, ...]:
        """Hook points whose activations it reads."""
        return ()

    @abstractmethod
    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        """One number for each row of `run.prompts`."""

    def __add__(self, other: object) -> "Objective":
        return _sum(self, other, 1.0) if isinstance(other, Objective) else NotImplemented

    def __sub__(self, other: object) -> "Objective":
        return _sum(self, other, -1.0) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: object) -> "Objective":
        # So that the built-in sum() works, which starts at 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, weight: object) -> "Objective":
        return Sum(((float(weight), self),)) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, weight: object) -> "Objective":
        if not isinstance(weight, Real):
            return NotImplemented
        return self * (1 / float(weight) if weight else math.inf)

    def __neg__(self) -> "Objective":
        return self * -1.0


def _assign(objective: Any, **values: object) -> Any:
    for name, value in values.items():
        object.__setattr__(objective, name, value)
    return objective


def _sum(left: Objective, right: Objective, sign: float) -> "Sum":
    return Sum(((1.0, left), (sign, right)))


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Objective):
    """sum_i weight_i * objective_i; what `a - 0.1 * b` makes. Sums of sums are flattened.

    Attributes:
        terms: weights and objectives.

    Raises:
        MechsteerError: a weight is not finite, or two terms hold values for different numbers of prompts.
    """

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        for weight, term in self.terms:
            if not math.isfinite(weight):
                raise MechsteerError(f"{term!r} got the weight {weight}. Pass a finite number.")
        flat = tuple(
            (weight * inner, part)
            for weight, term in self.terms
            for inner, part in (term.terms if isinstance(term, Sum) else ((1.0, term),))
        )
        held = {part.n_examples: part.name for _, part in flat if part.n_examples is not None}
        if len(held) > 1:
            counts = ", ".join(f"{name} for {count}" for count, name in held.items())
            raise MechsteerError(
                f"A sum of objectives holds values for different numbers of prompts: {counts}. "
                "Make them from the same prompts."
            )
        _assign(self, terms=flat, n_examples=next(iter(held), None))

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"] | None:
        """The union of what the terms read."""
        masks = [mask for _, part in self.terms if (mask := part.reads(prompts)) is not None]
        return torch.stack(masks).any(0) if masks else None

    def sites(self) -> tuple[Site, ...]:
        """The union of the terms' sites."""
        return tuple(dict.fromkeys(site for _, part in self.terms for site in part.sites()))

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        return torch.stack([weight * part(run) for weight, part in self.terms]).sum(0)

    def __repr__(self) -> str:
        parts = [("- " if w < 0 else "+ ") + ("" if abs(w) == 1 else f"{abs(w):g} * ") + repr(p) for w, p in self.terms]
        return " ".join(parts).removeprefix("+ ")


@dataclass(frozen=True, eq=False, repr=False)
class TokenSet:
    """Token ids that an objective sums or compares.

    Attributes:
        ids: one row for all prompts, or with `per_example` one row for each.
        per_example: whether each example has its own.
        texts: the ids as they were given, for messages.
    """

    ids: Int[Tensor, "set token"]
    per_example: bool
    texts: tuple[int | str, ...]

    @staticmethod
    def of(tokens: Tokens, *, tokenizer: Any = None, what: str = "tokens") -> "TokenSet":
        """Reads ids, or strings that are one token each.

        Args:
            tokens: an id or a string, several of them (one set for all prompts, duplicates removed), or an integer
                tensor with one id for each prompt.
            tokenizer: for strings; a `Model` stands for its tokenizer.
            what: the argument's name, for messages.

        Raises:
            MechsteerError: no tokens, negative ids, strings without a tokenizer, or strings that are not one token.
        """
        if isinstance(tokens, Tensor):
            if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool or not len(tokens):
                raise MechsteerError(
                    f"{what} got a tensor of {tokens.dtype} with shape {list(tokens.shape)}. A tensor holds one id for "
                    "each prompt; pass a list for one set of tokens for all prompts."
                )
            given: tuple[int | str, ...] = tuple(tokens.tolist())
        else:
            given = tuple(dict.fromkeys((tokens,) if isinstance(tokens, int | str) else tokens))
        if not given:
            raise MechsteerError(f"{what} is an empty set of tokens. Pass at least one id or one-token string.")
        ids = [_single_token(token, tokenizer, what) if isinstance(token, str) else index(token) for token in given]
        if min(ids) < 0:
            raise MechsteerError(f"{what} got the token id {min(ids)}. Ids count from 0.")
        if isinstance(tokens, Tensor):
            return TokenSet(tokens.detach().long()[:, None], True, given)
        return TokenSet(torch.tensor([list(dict.fromkeys(ids))]), False, given)

    @property
    def n_examples(self) -> int | None:
        """How many prompts it has ids for; None for any number."""
        return len(self.ids) if self.per_example else None

    def of_rows(self, run: Run) -> Int[Tensor, "batch token"]:
        """The ids of each row of a run.

        Raises:
            MechsteerError: an id lies outside the vocabulary, or an example has none.
        """
        d_vocab, largest = run.rows.shape[-1], int(self.ids.max())
        if largest >= d_vocab:
            raise MechsteerError(
                f"Token id {largest} lies outside the vocabulary of the model (d_vocab={d_vocab}). "
                "Make the objective with the model's own tokenizer."
            )
        ids = self.ids.to(run.rows.device)
        return ids[_examples(run, len(ids))] if self.per_example else ids.expand(len(run.prompts), -1)

    def __repr__(self) -> str:
        shown = ", ".join(repr(token) for token in self.texts[:6]) + (", ..." if len(self.texts) > 6 else "")
        return f"<{len(self.ids)} ids, one a prompt>" if self.per_example else f"[{shown}]"


def _single_token(text: str, tokenizer: Any, what: str) -> int:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise MechsteerError(f"{what} got the string {text!r} but no tokenizer. Pass tokenizer=model, or token ids.")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids)
        found = f"{len(ids)} tokens: {pieces}. Pass one of them." if ids else "no token. Pass a token's text or its id."
        raise MechsteerError(f"{what}: {text!r} is {found}")
    if ids[0] == getattr(tokenizer, "unk_token_id", None) and text != tokenizer.unk_token:
        raise MechsteerError(f"{what}: {text!r} is unknown to the tokenizer. Pass a token's text or its id.")
    return ids[0]


def _examples(run: Run, held: int | None) -> Int[Tensor, " batch"]:
    """`run.example`, when an objective that holds values for `held` prompts has one for each of them."""
    largest = int(run.example.max())
    if held is not None and largest >= held:
        raise MechsteerError(
            f"The objective holds values for {held} prompts but the run has prompt number {largest} (counted from 0). "
            "Make the objective from the prompts that are run."
        )
    return run.example


def _decision(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    return prompts.at(prompts.decision)


def _precise(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _by_block(
    function: Callable[..., Tensor], rows: Float[Tensor, "row d_vocab"], *others: Shaped[Tensor, "row ..."]
) -> Float[Tensor, " row"]:
    """`function`, which gives one number a row, of as many rows at a time as fit a processor's cache: several times as
    fast on a CPU as all at once."""
    size = max(1, (2**18 if rows.device.type == "cpu" else 2**27) // rows.shape[-1])
    blocks = zip(*(tensor.split(size) for tensor in (rows, *others)), strict=True)
    return torch.cat([function(_precise(block), *more) for block, *more in blocks])


@dataclass(frozen=True, eq=False, repr=False, init=False)
class LogitGap(Objective):
    """How far a set of tokens is ahead of another at the first decoding step.

        gap = R_{a in positive} z_a - R_{b in negative} z_b

    z are the logits (nats) at the token that predicts the completion's first one and R is `reduce`. Above 0 the
    positive set leads; adding a constant to all logits changes nothing. With one token on each side it is their
    log-odds. Source: "The Mechanism of Logit Gap Steering", section 0 (arXiv:2506.24056), there for two sets of tokens
    that stand for two behaviours; the top logit of each set is what later versions of that paper compare.

    Args:
        positive: an id, a string that is one token (mind the leading space), a list of these, or an integer tensor with
            one id for each prompt, such as the right name of each sentence.
        negative: the same. A list goes with any number of prompts, also beside a tensor.
        reduce: "max", "mean" or "logsumexp" (the gap is then the log-odds of the sets) over each set.
        tokenizer: for strings; a `Model` stands for its tokenizer.

    Raises:
        MechsteerError: a set is empty, a string is not one token, or a token is in both sets. When called: an id lies
            outside the vocabulary.
    """

    positive: TokenSet
    negative: TokenSet
    reduce: str

    def __init__(self, positive: Tokens, negative: Tokens, *, reduce: str = "max", tokenizer: Any = None) -> None:
        _one_of("LogitGap(reduce=)", reduce, ("max", "mean", "logsumexp"))
        plus = TokenSet.of(positive, tokenizer=tokenizer, what="positive")
        minus = TokenSet.of(negative, tokenizer=tokenizer, what="negative")
        if plus.per_example and minus.per_example and len(plus.ids) != len(minus.ids):
            raise MechsteerError(
                f"positive has ids for {len(plus.ids)} prompts and negative for {len(minus.ids)}. "
                "Pass one id for each prompt in both."
            )
        both = plus.ids[:, :, None] == minus.ids.to(plus.ids.device)[:, None, :]
        if bool(both.any()):
            shared = plus.ids.expand(len(both), -1)[both.any(2)].unique().tolist()
            raise MechsteerError(f"Token ids {shared} are in both positive and negative. Take them out of one.")
        held = plus.n_examples if plus.per_example else minus.n_examples
        _assign(self, positive=plus, negative=minus, reduce=reduce, n_examples=held)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return _decision(prompts)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        rows = run.logits_at(_decision(run.prompts))
        reduce = {"max": torch.amax, "mean": torch.mean, "logsumexp": torch.logsumexp}[self.reduce]
        positive, negative = (
            _precise(rows.gather(1, tokens.of_rows(run))) for tokens in (self.positive, self.negative)
        )
        return reduce(positive, 1) - reduce(negative, 1)

    def __repr__(self) -> str:
        return f"LogitGap({self.positive}, {self.negative}, reduce={self.reduce!r})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class TokenProb(Objective):
    """Probability of a set of tokens at the first decoding step.

        p(set) = sum_{t in set} softmax(z)_t        in [0, 1]; with `log` its natural logarithm, in nats

    z are the logits at the token that predicts the completion's first one. Its change from the unsteered run is
    Delta p(z | c, alpha) of the steering-strength paper (Definition 3.1) for one token. The paper's Delta p of a
    concept (Definition 3.5) is the mean over its tokens: divide by their number.

    Args:
        tokens: as for `LogitGap`.
        log: give log p.
        tokenizer: for strings; a `Model` stands for its tokenizer.

    Raises:
        MechsteerError: the set is empty or a string is not one token. When called: an id lies outside the vocabulary.
    """

    tokens: TokenSet
    log: bool

    def __init__(self, tokens: Tokens, *, log: bool = False, tokenizer: Any = None) -> None:
        chosen = TokenSet.of(tokens, tokenizer=tokenizer)
        label = "token_log_prob" if log else None
        _assign(self, tokens=chosen, log=log, label=label, n_examples=chosen.n_examples)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return _decision(prompts)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        def log_probability(block: Tensor, ids: Tensor) -> Tensor:
            return F.log_softmax(block, -1).gather(1, ids).logsumexp(1)

        log_prob = _by_block(log_probability, run.logits_at(_decision(run.prompts)), self.tokens.of_rows(run))
        return log_prob if self.log else log_prob.exp()

    def __repr__(self) -> str:
        return f"TokenProb({self.tokens}, log={self.log})"


@dataclass(frozen=True, eq=False, repr=False)
class TeacherForcedCE(Objective):
    """Weighted teacher-forced cross entropy over a span, in nats; lower is better.

        CE_e = sum_t w_t (-log p(y_t | everything before t)) / sum_t w_t        t over the span's tokens of prompt e

    w_t is `first_weight` for the span's first `first` tokens and `rest_weight` for later ones. The defaults are those
    of "Steering Prefix Generation", section 2.3, which pools all prompts: its CE is the mean of CE_e weighted with
    `total_weight(prompts)`, that is `(ce * weight).sum() / weight.sum()`. `first=0` is the plain mean, and with
    `span="all"` the CE of a text, whose change from the unsteered run is Delta CE of the steering-strength paper
    (Definition 3.7).

    Attributes:
        first: how many tokens count as early; 32 as in section 2.3.
        first_weight: weight of an early token.
        rest_weight: weight of a later token.
        span: "completion", another span of `ROLES`, or "all" for every token but the prompt's first, which nothing
            predicts. Slots, which stand for a prefix, are never among the tokens to predict.

    Raises:
        MechsteerError: the span has no such name, `first` is negative, or a weight is negative or not finite. When
            called: a prompt has no token of the span with a weight above 0.
    """

    first: int = field(default=32, kw_only=True)
    first_weight: float | int = field(default=3.0, kw_only=True)
    rest_weight: float | int = field(default=1.0, kw_only=True)
    span: str = field(default="completion", kw_only=True)

    def __post_init__(self) -> None:
        _one_of("TeacherForcedCE(span=)", self.span, (*ROLES, "all"))
        if self.first < 0:
            raise MechsteerError(f"TeacherForcedCE(first={self.first}) is a number of tokens. Pass 0 or more.")
        for weight in (self.first_weight, self.rest_weight):
            if not (math.isfinite(weight) and weight >= 0):
                raise MechsteerError(f"TeacherForcedCE got the weight {weight}. Pass finite weights of 0 or more.")

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens that predict the span's."""
        return _predicting(prompts, self.span)

    def total_weight(self, prompts: Prompts) -> Float[Tensor, " batch"]:
        """sum_t w_t of each prompt, with which values of several prompts are pooled."""
        return self._weights(self.reads(prompts)).sum(1)

    def _weights(self, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        early = mask.cumsum(1) <= self.first
        return mask * torch.where(early, float(self.first_weight), float(self.rest_weight))

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        mask = self.reads(run.prompts)
        targets = run.prompts.tokens.roll(-1, 1)[mask]
        nll = _by_block(partial(F.cross_entropy, reduction="none"), run.logits_at(mask), targets)
        span = "other than its first" if self.span == "all" else f"of span {self.span!r}"
        return _token_mean(nll, mask, self._weights(mask), f"to predict {span}")

    def __repr__(self) -> str:
        weights = f"first={self.first}, first_weight={self.first_weight:g}, rest_weight={self.rest_weight:g}"
        return f"TeacherForcedCE({weights}, span={self.span!r})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class KLFromBaseline(Objective):
    """How far the predictions moved from another run's, in nats: 0 where they are equal, never below.

        KL_e = mean_t sum_v p_t(v) log(p_t(v) / q_t(v))        p the baseline's, q the current; exchanged with `reverse`

    Args:
        baseline: a run of the same prompts, whose log-probabilities are kept: d_vocab numbers for each token read.
        where: at which tokens: "decision", the one that predicts the first completion token; "completion" (or another
            span of `ROLES`), those that predict the span; or "all" real ones.
        reverse: KL(current || baseline) instead.

    Raises:
        MechsteerError: `where` has no such name, the baseline lacks logits or has other rows than one for each prompt,
            or a prompt has no such token. When called: a prompt has another number of such tokens than in the baseline.
    """

    where: str
    reverse: bool
    log_probs: Float[Tensor, "token d_vocab"]
    counts: Int[Tensor, " example"]

    def __init__(self, baseline: Run, *, where: str = "decision", reverse: bool = False) -> None:
        _one_of("KLFromBaseline(where=)", where, ("decision", *ROLES, "all"))
        _assign(self, where=where, reverse=reverse)
        mask = self.reads(baseline.prompts)
        if not torch.equal(baseline.example.cpu(), torch.arange(len(baseline.prompts))):
            raise MechsteerError("KLFromBaseline needs a run with one row for each prompt. Pass model.run(prompts).")
        _check_tokens(mask, f"for KLFromBaseline(where={where!r})")
        log_probs = F.log_softmax(_precise(baseline.logits_at(mask).detach()), -1)
        _assign(self, log_probs=log_probs, counts=mask.sum(1), n_examples=len(mask))

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens whose predictions are compared."""
        if self.where == "decision":
            return _decision(prompts)
        return prompts.mask if self.where == "all" else _predicting(prompts, self.where)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        mask = self.reads(run.prompts)
        example = _examples(run, self.n_examples)
        counts, starts = self.counts.to(mask.device), (self.counts.cumsum(0) - self.counts).to(mask.device)
        found = mask.sum(1)
        if bool((found != counts[example]).any()):
            row = int((found != counts[example]).nonzero()[0])
            raise MechsteerError(
                f"KLFromBaseline(where={self.where!r}) compares {int(counts[example[row]])} tokens of prompt "
                f"{int(example[row])} in the baseline with {int(found[row])} now. "
                "Make the baseline from prompts of the same lengths, or use where='decision'."
            )
        kept = (starts[example][:, None] + mask.cumsum(1) - 1)[mask].to(self.log_probs.device)

        def divergence(block: Tensor, kept: Tensor) -> Tensor:
            current = F.log_softmax(block, -1)
            baseline = self.log_probs[kept].to(current)
            first, second = (current, baseline) if self.reverse else (baseline, current)
            return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)

        kl = _by_block(divergence, run.logits_at(mask), kept)
        return _token_mean(kl, mask, mask.to(kl.dtype), "to compare")

    def __repr__(self) -> str:
        return f"KLFromBaseline(<{self.n_examples} prompts>, where={self.where!r}, reverse={self.reverse})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class StateMatch(Objective):
    """How like a target the activations at a site are, as the mean over tokens.

        cosine: mean_t <x_t, y_t> / (|x_t| |y_t|)        in [-1, 1], higher is closer
        mse:    mean_t |x_t - y_t|^2 / d                 0 or more, lower is closer

    x are the run's activations and y the target's; without a head, those of all heads of a site are put end to end.
    With the activations under a reference prefix as the target this is the state matching of "Steering Prefix
    Generation", section 3.1.

    Args:
        target: activations of as many prompts, at the same site of the same model.
        site: where; its position, if it has one, stands for `at`.
        at: at which tokens: "decision" (the default) or "last", the prompt's last one before any completion; "all"; a
            span's name; or an absolute position.
        measure: "cosine" or "mse".
        align: which of the target's tokens a token is compared with: "start", the one at the same absolute position, or
            "end", the one as far from the prompt's last before any completion, for prefixes of unlike lengths.

    Raises:
        MechsteerError: an option has no such value, or the target lacks the site. When called: another model, a prompt
            without such a token, or one whose counterpart lies outside the target's prompt.
    """

    states: Float[Tensor, "example pos feature"]
    prompts: Prompts
    model: ModelId
    site: Site
    at: int | str
    measure: str
    align: str

    def __init__(
        self,
        target: Activations,
        site: SiteLike,
        *,
        at: int | str | None = None,
        measure: str = "cosine",
        align: str = "start",
    ) -> None:
        _one_of("StateMatch(measure=)", measure, ("cosine", "mse"))
        _one_of("StateMatch(align=)", align, ("start", "end"))
        place, at = _place(site, at, "StateMatch")
        _assign(self, site=place, at=at, measure=measure, align=align)
        _assign(self, states=target[place].detach().flatten(2), prompts=target.prompts, model=target.model)
        _assign(self, n_examples=len(target.prompts))

    def sites(self) -> tuple[Site, ...]:
        """The hook point that is compared."""
        return (self.site.point,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        _check_model(self, self.model, run)
        prompts, then = run.prompts, self.prompts
        example = _examples(run, self.n_examples)
        mask = _tokens_at(prompts, self.at)
        position = prompts.positions
        if self.align == "end":
            position = position + (then.decision.to(position.device)[example] - prompts.decision)[:, None]
        lengths, starts = (values.to(position.device)[example] for values in (then.lengths, then.mask.int().argmax(1)))
        outside = mask & ((position < 0) | (position >= lengths[:, None]))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise MechsteerError(
                f"StateMatch(at={self.at!r}, align={self.align!r}) compares prompt {int(example[row])} with position "
                f"{int(position[row, column])} of its target, which has {int(lengths[row])} tokens. "
                "Pass align='end' for prefixes of unlike lengths, or other tokens with at=."
            )
        current = _precise(run.activations[self.site].flatten(2)[mask])
        rows, columns = example[:, None].expand_as(mask)[mask], (position + starts[:, None])[mask]
        wanted = self.states[rows.to(self.states.device), columns.to(self.states.device)].to(current)
        if self.measure == "cosine":
            likeness = F.cosine_similarity(current, wanted, dim=-1)
        else:
            likeness = (current - wanted).square().mean(-1)
        return _token_mean(likeness, mask, mask.to(likeness.dtype), f"at {self.at!r}")

    def __repr__(self) -> str:
        options = f"at={self.at!r}, measure={self.measure!r}, align={self.align!r}"
        return f"StateMatch(<{self.n_examples} prompts>, {self.site!r}, {options})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Projection(Objective):
    """How far the activations reach along a direction: mean_t <x_t, v / |v|>, in the activations' own units.

    Args:
        direction: one vector, of which only where it points counts; read at its site.
        at: at which tokens; as for `StateMatch`.

    Raises:
        MechsteerError: several vectors, a vector of zeros, or no such `at`. When called: another model or width, or a
            prompt without such a token.
    """

    direction: Direction
    site: Site
    at: int | str

    def __init__(self, direction: Direction, *, at: int | str | None = None) -> None:
        site, at = _place(direction.site, at, "Projection")
        _assign(self, direction=direction.unit, site=site, at=at)

    def sites(self) -> tuple[Site, ...]:
        """The direction's hook point."""
        return (self.site.point,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        _check_model(self, self.direction.model, run)
        mask = _tokens_at(run.prompts, self.at)
        values = _precise(run.activations[self.site].flatten(2)[mask])
        vector = self.direction.vector.detach().to(values)
        if len(vector) != values.shape[-1]:
            raise MechsteerError(
                f"Projection has a direction of width {len(vector)} but {self.site!r} has {values.shape[-1]}. "
                "Make the direction with the same model."
            )
        return _token_mean(values @ vector, mask, mask.to(values.dtype), f"at {self.at!r}")

    def __repr__(self) -> str:
        return f"Projection({self.site!r}, at={self.at!r})"


def _one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise MechsteerError(f"{option} got {value!r}. Pass one of {', '.join(map(repr, allowed))}.")


def _place(site: SiteLike, at: int | str | None, what: str) -> tuple[Site, int | str]:
    """The site without its position, and where to read it."""
    place = Site.of(site)
    if place.axes[1] != "pos":
        raise MechsteerError(
            f"{what} got {place!r}, which has no features for each token. Pass a site such as resid_post."
        )
    if at is not None and place.pos is not None and at != place.pos:
        raise MechsteerError(f"{what}: at={at!r} and {place!r} both say where. Give one of them.")
    at = place.pos if at is None else at
    at = "decision" if at is None else at
    if isinstance(at, str):
        _one_of(f"{what}(at=)", at, ("decision", "last", "all", *ROLES))
    return place.at(pos=None), at


def _tokens_at(prompts: Prompts, at: int | str) -> Bool[Tensor, "batch pos"]:
    if isinstance(at, int):
        return prompts.at(at)
    if at in ("decision", "last"):
        return _decision(prompts)
    return prompts.mask if at == "all" else prompts.span(at)


def _predicting(prompts: Prompts, span: str) -> Bool[Tensor, "batch pos"]:
    """Tokens whose logits predict the tokens of a span."""
    targets = (prompts.mask if span == "all" else prompts.span(span)) & ~prompts.slots
    return F.pad(targets[:, 1:] & prompts.mask[:, :-1], (0, 1))


def _check_model(objective: Objective, made_with: ModelId | None, run: Run) -> None:
    if made_with is not None and made_with.hash != run.activations.model.hash:
        here = run.activations.model
        raise MechsteerError(
            f"{type(objective).__name__} was made with {made_with.name} (weights {made_with.hash[:12]}), and the run "
            f"is of {here.name} (weights {here.hash[:12]}). Make it again from the model that you run."
        )


def _check_tokens(mask: Tensor, what: str) -> None:
    """Refuse prompts for which no token is marked."""
    empty = ~mask.any(1)
    if bool(empty.any()):
        rows = empty.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise MechsteerError(f"{len(rows)} of {len(mask)} prompts (row {shown}) have no token {what}. Leave them out.")


def _token_mean(
    values: Float[Tensor, " row"], mask: Bool[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"], what: str
) -> Float[Tensor, " batch"]:
    """Weighted mean over each prompt's tokens of one value a marked token."""
    _check_tokens(weights, what)
    placed = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return (placed * weights).sum(1) / weights.sum(1)
