"""Objectives that read logits."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.objectives.base import (
    Objective,
    assign,
    by_block,
    check_tokens,
    decision_mask,
    examples_of,
    one_of,
    predicting,
    token_mean,
)
from mechsteer.objectives.tokens import Tokens, TokenSet
from mechsteer.precision import precise
from mechsteer.prompts import ROLES, Prompts
from mechsteer.run import Run


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
        one_of("LogitGap(reduce=)", reduce, ("max", "mean", "logsumexp"))
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
        assign(self, positive=plus, negative=minus, reduce=reduce, n_examples=held)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return decision_mask(prompts)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        rows = run.logits_at(decision_mask(run.prompts))
        reduce = {"max": torch.amax, "mean": torch.mean, "logsumexp": torch.logsumexp}[self.reduce]
        positive, negative = (precise(rows.gather(1, tokens.of_rows(run))) for tokens in (self.positive, self.negative))
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
        assign(self, tokens=chosen, log=log, label=label, n_examples=chosen.n_examples)

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The token that predicts the first completion token."""
        return decision_mask(prompts)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        def log_probability(block: Tensor, ids: Tensor) -> Tensor:
            return F.log_softmax(block, -1).gather(1, ids).logsumexp(1)

        log_prob = by_block(log_probability, run.logits_at(decision_mask(run.prompts)), self.tokens.of_rows(run))
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
        one_of("TeacherForcedCE(span=)", self.span, (*ROLES, "all"))
        if self.first < 0:
            raise MechsteerError(f"TeacherForcedCE(first={self.first}) is a number of tokens. Pass 0 or more.")
        for weight in (self.first_weight, self.rest_weight):
            if not (math.isfinite(weight) and weight >= 0):
                raise MechsteerError(f"TeacherForcedCE got the weight {weight}. Pass finite weights of 0 or more.")

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens that predict the span's."""
        return predicting(prompts, self.span)

    def total_weight(self, prompts: Prompts) -> Float[Tensor, " batch"]:
        """sum_t w_t of each prompt, with which values of several prompts are pooled."""
        return self._weights(self.reads(prompts)).sum(1)

    def _weights(self, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        early = mask.cumsum(1) <= self.first
        return mask * torch.where(early, float(self.first_weight), float(self.rest_weight))

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        mask = self.reads(run.prompts)
        targets = run.prompts.tokens.roll(-1, 1)[mask]
        nll = by_block(partial(F.cross_entropy, reduction="none"), run.logits_at(mask), targets)
        span = "other than its first" if self.span == "all" else f"of span {self.span!r}"
        return token_mean(nll, mask, self._weights(mask), f"to predict {span}")

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
        one_of("KLFromBaseline(where=)", where, ("decision", *ROLES, "all"))
        assign(self, where=where, reverse=reverse)
        mask = self.reads(baseline.prompts)
        if not torch.equal(baseline.example.cpu(), torch.arange(len(baseline.prompts))):
            raise MechsteerError("KLFromBaseline needs a run with one row for each prompt. Pass model.run(prompts).")
        check_tokens(mask, f"for KLFromBaseline(where={where!r})")
        log_probs = F.log_softmax(precise(baseline.logits_at(mask).detach()), -1)
        assign(self, log_probs=log_probs, counts=mask.sum(1), n_examples=len(mask))

    def reads(self, prompts: Prompts) -> Bool[Tensor, "batch pos"]:
        """The tokens whose predictions are compared."""
        if self.where == "decision":
            return decision_mask(prompts)
        return prompts.mask if self.where == "all" else predicting(prompts, self.where)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        mask = self.reads(run.prompts)
        example = examples_of(run, self.n_examples)
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

        kl = by_block(divergence, run.logits_at(mask), kept)
        return token_mean(kl, mask, mask.to(kl.dtype), "to compare")

    def __repr__(self) -> str:
        return f"KLFromBaseline(<{self.n_examples} prompts>, where={self.where!r}, reverse={self.reverse})"
