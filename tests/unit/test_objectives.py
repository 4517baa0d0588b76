"""Objectives against plain loops, and the laws that every objective keeps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechsteer.activations import Activations, ModelId
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add
from mechsteer.model import load_model
from mechsteer.objectives import (
    KLFromBaseline,
    LogitGap,
    Objective,
    Projection,
    StateMatch,
    Sum,
    TeacherForcedCE,
    TokenProb,
    TokenSet,
)
from mechsteer.prompts import Prompts, Side
from mechsteer.run import Run
from mechsteer.site import Site

D_VOCAB, D_MODEL, N_HEADS, D_HEAD = 11, 6, 2, 3
MODEL = ModelId("tiny", "0123456789abcdef", False)
RESID, Z = Site("resid_post", 1), Site("z", 2)

# Tokens of each role in order, with spans of several lengths, one of them a single token.
SHAPES = ((1, 2, 3, 5), (1, 0, 1, 1), (2, 3, 4, 2), (1, 1, 2, 4))


@dataclass
class Case:
    """Prompts with what a model would have computed at each of their tokens, free of padding."""

    tokens: list[Tensor]
    shapes: tuple[tuple[int, ...], ...]
    logits: list[Tensor]
    resid: list[Tensor]
    z: list[Tensor]

    def prompts(self, side: Side = "right") -> Prompts:
        width = max(len(row) for row in self.tokens)
        mask = torch.tensor([[i < len(row) for i in range(width)] for row in self.tokens])
        roles = torch.tensor(
            [[r for r, n in enumerate(s) for _ in range(n)] + [0] * (width - sum(s)) for s in self.shapes]
        )
        tokens = torch.stack([F.pad(row, (0, width - len(row))) for row in self.tokens])
        return Prompts(tokens, mask, roles, torch.zeros_like(mask)).padded(side)

    def run(
        self,
        side: Side = "right",
        *,
        example: list[int] | None = None,
        read: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        model: ModelId = MODEL,
    ) -> Run:
        """A run of some examples; what stands at padding is not a number."""
        prompts = self.prompts(side)
        index = torch.arange(len(prompts)) if example is None else torch.tensor(example)
        prompts = prompts[index]
        read = prompts.mask if read is None else read
        rows = lay(prompts, [self.logits[i] for i in index])[read]
        values = {
            RESID: lay(prompts, [self.resid[i] for i in index]).to(dtype),
            Z: lay(prompts, [self.z[i] for i in index]).to(dtype),
        }
        return Run(prompts, rows.to(dtype), read, Activations(values, prompts=prompts, model=model), index)


def lay(prompts: Prompts, rows: list[Tensor]) -> Tensor:
    full = torch.full((*prompts.mask.shape, *rows[0].shape[1:]), math.nan, dtype=rows[0].dtype)
    return full.index_put(torch.where(prompts.mask), torch.cat(rows))


def make_case(seed: int = 0, shapes: tuple[tuple[int, ...], ...] = SHAPES, scale: float = 2.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = [sum(shape) for shape in shapes]
    return Case(
        [torch.randint(0, D_VOCAB, (n,), generator=generator) for n in lengths],
        shapes,
        [noise(n, D_VOCAB) for n in lengths],
        [noise(n, D_MODEL) for n in lengths],
        [noise(n, N_HEADS, D_HEAD) for n in lengths],
    )


CASE, OTHER = make_case(0), make_case(1)
VECTOR = torch.linspace(-1, 2, D_MODEL, dtype=torch.float64)[None]
ANSWERS, DISTRACTORS = torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9, 2, 6])


def direction(vectors: Tensor = VECTOR, site: Site = RESID, model: ModelId | None = MODEL) -> Direction:
    return Direction(vectors, site=site, model=model, origin={})


def target(case: Case = OTHER, model: ModelId = MODEL, side: Side = "right") -> Activations:
    return case.run(side, model=model).activations


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "gap max": lambda: LogitGap([1, 2, 3], [4, 5]),
    "gap mean": lambda: LogitGap([1, 2, 3], [4, 5], reduce="mean"),
    "gap logsumexp": lambda: LogitGap([1, 2, 3], [4, 5], reduce="logsumexp"),
    "gap per example": lambda: LogitGap(ANSWERS, DISTRACTORS),
    "gap mixed": lambda: LogitGap(ANSWERS, [0, 7]),
    "prob": lambda: TokenProb([1, 2]),
    "log prob": lambda: TokenProb([1, 2], log=True),
    "prob per example": lambda: TokenProb(ANSWERS),
    "ce": lambda: TeacherForcedCE(first=2),
    "ce plain": lambda: TeacherForcedCE(first=0, span="user"),
    "ce all": lambda: TeacherForcedCE(first=3, first_weight=0.5, span="all"),
    "kl decision": lambda: KLFromBaseline(OTHER.run()),
    "kl completion": lambda: KLFromBaseline(OTHER.run(), where="completion"),
    "kl all reverse": lambda: KLFromBaseline(OTHER.run("left"), where="all", reverse=True),
    "match cosine": lambda: StateMatch(target(), RESID),
    "match all": lambda: StateMatch(target(side="left"), RESID, at="all", measure="mse"),
    "match span, heads": lambda: StateMatch(target(), Z, at="completion"),
    "match head, last": lambda: StateMatch(target(), Z.at(head=1), at="last", align="end"),
    "projection": lambda: Projection(direction(), at="user"),
    "projection, position": lambda: Projection(direction(), at=1),
    "sum": lambda: LogitGap(1, 2) - 0.1 * KLFromBaseline(OTHER.run()) + StateMatch(target(), RESID) / 3,
}  # fmt: skip


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=1e-6, rtol=1e-6)


# Laws that every objective keeps


def test_one_number_for_each_prompt_in_the_type_of_the_run(objective: Objective) -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32),
                            (torch.bfloat16, torch.float32)):  # fmt: skip
        values = objective(CASE.run(dtype=dtype))
        assert values.shape == (4,)
        assert values.dtype == expected
        torch.testing.assert_close(values.double(), objective(CASE.run()), atol=0.3, rtol=0.1)


def test_padding_does_not_matter(objective: Objective) -> None:
    close(objective(CASE.run("left")), objective(CASE.run("right")))


def test_rows_follow_their_example(objective: Objective) -> None:
    alone = objective(CASE.run())
    for example in ([3, 1, 0, 2], [2, 2, 0, 2, 1, 3, 3], [1]):
        close(objective(CASE.run(example=example)), alone[example])
        close(objective(CASE.run("left", example=example)), alone[example])


def test_only_what_it_says_is_read(objective: Objective) -> None:
    run = CASE.run()
    prompts = run.prompts
    read = objective.reads(prompts)
    read = torch.zeros_like(prompts.mask) if read is None else read
    assert not bool((read & ~prompts.mask).any())
    values = {site: run.activations[site] for site in objective.sites()}
    less = Activations(values, prompts=prompts, model=MODEL)
    close(objective(Run(prompts, run.logits_at(read), read, less, run.example)), objective(run))


def test_everything_it_says_is_read_matters(objective: Objective) -> None:
    run = CASE.run()
    read = objective.reads(run.prompts)
    rows = run.rows.clone().requires_grad_()
    states = {site: values.nan_to_num().requires_grad_() for site, values in run.activations.items()}
    again = Run(run.prompts, rows, run.read, Activations(states, prompts=run.prompts, model=MODEL), run.example)
    total = objective(again).sum()
    wanted = [rows] if read is not None else []
    gradients = torch.autograd.grad(total, [*wanted, *(states[site] for site in objective.sites())])
    assert all(bool(gradient.any()) for gradient in gradients)
    if read is not None:
        # A token that is read moves the value, any other does not.
        assert torch.equal(gradients[0].abs().sum(1) > 0, read[run.read])


def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    run = CASE.run()
    sites = objective.sites()
    read = objective.reads(run.prompts)

    def value(rows: Tensor, *states: Tensor) -> Tensor:
        activations = Activations(dict(zip(sites, states, strict=True)), prompts=run.prompts, model=MODEL)
        mask = torch.zeros_like(run.read) if read is None else read
        return objective(Run(run.prompts, rows, mask, activations, run.example))

    rows = run.rows[:0] if read is None else run.logits_at(read)
    inputs = [rows, *(run.activations[site].nan_to_num() for site in sites)]
    assert torch.autograd.gradcheck(value, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True)


def test_objectives_are_immutable_and_can_be_renamed(objective: Objective) -> None:
    renamed = objective.named("score")
    assert (renamed.name, type(renamed)) == ("score", type(objective))
    assert objective.name != "score"
    close(renamed(CASE.run()), objective(CASE.run()))
    with pytest.raises(AttributeError):
        objective.label = "score"  # type: ignore[misc]


def test_prompts_without_a_value_are_refused(objective: Objective) -> None:
    if objective.n_examples is None:
        objective(CASE.run())
        return
    assert objective.n_examples == 4
    run = CASE.run()
    more = Run(run.prompts, run.rows, run.read, run.activations, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(MechsteerError, match=r"holds values for 4 prompts but the run has prompt number 4 \(counted"):
        objective(more)


# Sums


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(-5, 5), min_size=3, max_size=3), names=st.permutations(sorted(OBJECTIVES)))
def test_sums_are_linear(weights: list[float], names: list[str]) -> None:
    a, b, c = (OBJECTIVES[name]() for name in names[:3])
    run = CASE.run()
    x, y, z = weights
    close((x * a + y * b - c * z)(run), x * a(run) + y * b(run) - z * c(run))
    close((-(a - 2 * b) / 4)(run), (2 * b(run) - a(run)) / 4)
    close(sum([a, b, c])(run), a(run) + b(run) + c(run))  # type: ignore[operator]


def test_sums_are_flat_and_read_what_their_terms_read() -> None:
    gap, ce, match, projection = (OBJECTIVES[name]() for name in ("gap max", "ce", "match cosine", "projection"))
    total = 2 * (gap - 0.5 * (ce + match)) - projection
    assert isinstance(total, Sum)
    assert [(weight, part) for weight, part in total.terms] == [
        (2.0, gap), (-1.0, ce), (-1.0, match), (-1.0, projection)
    ]  # fmt: skip
    assert total.sites() == (RESID,)
    prompts = CASE.prompts("left")
    gap_reads, ce_reads = gap.reads(prompts), ce.reads(prompts)
    assert gap_reads is not None and ce_reads is not None
    assert torch.equal(total.reads(prompts), gap_reads | ce_reads)  # type: ignore[arg-type]
    assert (match + projection).reads(prompts) is None
    assert (match + projection).n_examples == 4
    assert (total.name, total.named("score").name) == ("sum", "score")


def test_what_cannot_be_summed() -> None:
    gap = LogitGap(1, 2)
    for weight in (math.nan, math.inf):
        with pytest.raises(
            MechsteerError, match=r"LogitGap\(\[1\], \[2\], reduce='max'\) got the weight .*finite number"
        ):
            _ = weight * gap
    with pytest.raises(MechsteerError, match="weight inf"):
        _ = gap / 0
    with pytest.raises(
        MechsteerError, match=r"numbers of prompts: kl_from_baseline for 4, token_prob for 2\. Make them"
    ):
        _ = KLFromBaseline(CASE.run()) + TokenProb(torch.tensor([1, 2]))
    with pytest.raises(MechsteerError, match="numbers of prompts: token_prob for 3, token_prob for 2"):
        _ = TokenProb(torch.tensor([1, 2, 3])) + TokenProb(torch.tensor([1, 2]))
    for wrong in (lambda: gap + 1, lambda: gap - "x", lambda: gap * gap, lambda: gap / "2", lambda: 1 + gap):
        with pytest.raises(TypeError):
            wrong()


# Each against a plain loop


def each_decision(case: Case) -> list[Tensor]:
    return [logits[sum(shape[:3]) - 1] for logits, shape in zip(case.logits, case.shapes, strict=True)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ids=st.permutations(range(D_VOCAB)),
    n_positive=st.integers(1, 5),
    n_negative=st.integers(1, 5),
    reduce=st.sampled_from(["max", "mean", "logsumexp"]),
    shift=st.floats(-50, 50),
)
def test_logit_gap(seed: int, ids: list[int], n_positive: int, n_negative: int, reduce: str, shift: float) -> None:
    case = make_case(seed)
    positive, negative = ids[:n_positive], ids[n_positive : n_positive + n_negative]
    reducer: Callable[[list[float]], float] = {
        "max": max,
        "mean": lambda values: sum(values) / len(values),
        "logsumexp": lambda values: math.log(sum(map(math.exp, values))),
    }[reduce]
    expected = [
        reducer([float(row[a]) for a in positive]) - reducer([float(row[b]) for b in negative])
        for row in each_decision(case)
    ]
    gap = LogitGap(positive, negative, reduce=reduce)
    values = gap(case.run())
    close(values, torch.tensor(expected))
    close(LogitGap(negative, positive, reduce=reduce)(case.run()), -values)
    case.logits = [logits + shift for logits in case.logits]
    close(gap(case.run()), values)


def test_ids_for_each_example_are_those_of_one_example_at_a_time() -> None:
    run = CASE.run()
    gaps = [LogitGap(int(a), int(b))(run)[i] for i, (a, b) in enumerate(zip(ANSWERS, DISTRACTORS, strict=True))]
    close(LogitGap(ANSWERS, DISTRACTORS)(run), torch.stack(gaps))
    mixed = [LogitGap(int(a), [0, 7])(run)[i] for i, a in enumerate(ANSWERS)]
    close(LogitGap(ANSWERS, [0, 7])(run), torch.stack(mixed))
    probs = [TokenProb(int(a))(run)[i] for i, a in enumerate(ANSWERS)]
    close(TokenProb(ANSWERS)(run), torch.stack(probs))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ids=st.sets(st.integers(0, D_VOCAB - 1), min_size=1))
def test_token_prob(seed: int, ids: set[int]) -> None:
    case = make_case(seed)
    expected = torch.tensor([sum(float(row.softmax(0)[i]) for i in ids) for row in each_decision(case)])
    close(TokenProb(sorted(ids))(case.run()), expected)
    close(TokenProb(sorted(ids), log=True)(case.run()), expected.log())
    close(TokenProb(range(D_VOCAB))(case.run()), torch.ones(4))


def test_log_probability_of_a_token_far_from_the_top_is_finite() -> None:
    case = make_case(0)
    case.logits = [200 * logits for logits in case.logits]
    values = TokenProb(3, log=True)(case.run(dtype=torch.float32))
    close(values, torch.stack([row.log_softmax(0)[3] for row in each_decision(case)]))
    assert bool(values.isfinite().all()) and float(values.min()) < -200


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    first=st.integers(0, 4),
    first_weight=st.floats(0.1, 5),
    rest_weight=st.floats(0.1, 5),
    span=st.sampled_from(["completion", "user", "all"]),
)
def test_teacher_forced_ce(seed: int, first: int, first_weight: float, rest_weight: float, span: str) -> None:
    case = make_case(seed)
    expected, totals = [], []
    for tokens, logits, shape in zip(case.tokens, case.logits, case.shapes, strict=True):
        start, stop = {
            "completion": (sum(shape[:3]), sum(shape)),
            "user": (sum(shape[:2]), sum(shape[:3])),
            "all": (1, sum(shape)),
        }[span]
        loss = weight = 0.0
        for i, t in enumerate(range(start, stop)):
            w = first_weight if i < first else rest_weight
            loss += w * float(F.cross_entropy(logits[t - 1], tokens[t]))
            weight += w
        expected.append(loss / weight)
        totals.append(weight)
    ce = TeacherForcedCE(first=first, first_weight=first_weight, rest_weight=rest_weight, span=span)
    close(ce(case.run()), torch.tensor(expected))
    close(ce.total_weight(case.prompts("left")), torch.tensor(totals))


def test_pooled_with_its_weights_it_is_the_cross_entropy_of_the_document() -> None:
    # One sum over all completion tokens of all examples, as in section 2.3 of "Steering Prefix Generation".
    case = make_case(3, shapes=((1, 2, 3, 40), (1, 0, 1, 1), (2, 3, 4, 33)))
    above = below = 0.0
    for tokens, logits, shape in zip(case.tokens, case.logits, case.shapes, strict=True):
        start = sum(shape[:3])
        nll = F.cross_entropy(logits[start - 1 : -1], tokens[start:], reduction="none")
        weights = torch.tensor([3.0] * 32 + [1.0] * 8)[: shape[3]]
        above, below = above + float((weights * nll).sum()), below + float(weights.sum())
    ce = TeacherForcedCE()
    weight = ce.total_weight(case.prompts())
    pooled = (ce(case.run()) * weight).sum() / weight.sum()
    assert float(pooled) == pytest.approx(above / below, rel=1e-6)


def test_the_cross_entropy_of_equal_logits_is_that_of_the_vocabulary() -> None:
    case = make_case(0, scale=0.0)
    for span in ("completion", "user", "all"):
        close(TeacherForcedCE(span=span)(case.run()), torch.full((4,), math.log(D_VOCAB)))


def test_slots_are_no_tokens_to_predict() -> None:
    prompts = CASE.prompts()
    slots = prompts.at(2)
    with_slots = Prompts(prompts.tokens, prompts.mask, prompts.roles, slots)
    reads = TeacherForcedCE(span="all").reads(prompts)
    assert torch.equal(TeacherForcedCE(span="all").reads(with_slots), reads & ~prompts.at(1))


@settings(max_examples=20, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    where=st.sampled_from(["decision", "completion", "user", "all"]),
    scale=st.floats(0.01, 8),
)
def test_kl_from_baseline(seeds: tuple[int, int], where: str, scale: float) -> None:
    case, base = (make_case(seed, scale=scale) for seed in seeds)
    expected: dict[bool, list[float]] = {False: [], True: []}
    for ours, theirs, shape in zip(case.logits, base.logits, case.shapes, strict=True):
        edges = [0, *(sum(shape[: i + 1]) for i in range(4))]
        start, stop = {
            "decision": (edges[3] - 1, edges[3]),
            "completion": (edges[3] - 1, edges[4] - 1),
            "user": (edges[2] - 1, edges[3] - 1),
            "all": (0, edges[4]),
        }[where]
        q, p = ours[start:stop].softmax(1), theirs[start:stop].softmax(1)
        expected[False].append(float((p * (p / q).log()).sum(1).mean()))
        expected[True].append(float((q * (q / p).log()).sum(1).mean()))
    for reverse in (False, True):
        kl = KLFromBaseline(base.run("left"), where=where, reverse=reverse)
        values = kl(case.run())
        close(values, torch.tensor(expected[reverse]))
        assert float(values.min()) >= -1e-12
        close(kl(base.run()), torch.zeros(4))


def test_a_large_vocabulary_is_no_different() -> None:
    # So large that a few rows are taken at a time.
    run, d_vocab = CASE.run(), 100_000
    read = TeacherForcedCE().reads(run.prompts)
    ours, theirs = torch.randn(2, int(read.sum()), d_vocab, generator=torch.Generator().manual_seed(0))
    run, base = (Run(run.prompts, rows, read, run.activations, run.example) for rows in (ours, theirs))
    first = torch.tensor([0, 5, 6, 8])  # where each completion starts
    close(TokenProb([3, 99_999])(run), ours.softmax(1)[first][:, [3, 99_999]].sum(1))
    nll = F.cross_entropy(ours, run.prompts.tokens[run.prompts.span("completion")], reduction="none")
    close(TeacherForcedCE()(run), torch.stack([part.mean() for part in nll.tensor_split(first[1:])]))
    kl = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1)
    expected = torch.stack([part.mean() for part in kl.tensor_split(first[1:])])
    torch.testing.assert_close(KLFromBaseline(base, where="completion")(run), expected, atol=1e-5, rtol=1e-4)


def test_the_baseline_may_have_computed_fewer_logits() -> None:
    read = TeacherForcedCE().reads(OTHER.prompts())
    less = KLFromBaseline(OTHER.run(read=read), where="completion")
    close(less(CASE.run()), KLFromBaseline(OTHER.run(), where="completion")(CASE.run()))


@pytest.mark.parametrize("measure", ["cosine", "mse"])
@pytest.mark.parametrize("at", ["decision", "last", "all", "user", "completion", 1, -2])
@pytest.mark.parametrize("head", [None, 1])
def test_state_match(measure: str, at: str | int, head: int | None) -> None:
    expected = []
    for ours, theirs, shape in zip(CASE.z, OTHER.z, CASE.shapes, strict=True):
        edges = [0, *(sum(shape[: i + 1]) for i in range(4))]
        wanted = {
            "decision": [edges[3] - 1], "last": [edges[3] - 1], "all": range(edges[4]),
            "completion": range(edges[3], edges[4]), "user": range(edges[2], edges[3]), 1: [1], -2: [edges[3] - 2],
        }[at]  # fmt: skip
        each = []
        for t in wanted:
            x, y = (values[t].flatten() if head is None else values[t, head] for values in (ours, theirs))
            each.append(float(x @ y / (x.norm() * y.norm()) if measure == "cosine" else ((x - y) ** 2).mean()))
        expected.append(sum(each) / len(each))
    match = StateMatch(target(side="left"), Z.at(head=head), at=at, measure=measure)
    close(match(CASE.run()), torch.tensor(expected))


def test_a_state_matches_itself_best() -> None:
    for at in ("decision", "all", 0):
        close(StateMatch(target(CASE), RESID, at=at)(CASE.run("left")), torch.ones(4))
        close(StateMatch(target(CASE), RESID, at=at, measure="mse")(CASE.run()), torch.zeros(4))


def test_states_are_counted_from_the_end_when_prefixes_differ_in_length() -> None:
    # The same states after a prefix that is two tokens longer, and before one more token of completion.
    longer = make_case(0)
    longer.shapes = tuple((s[0], s[1] + 2, s[2], s[3] + 1) for s in longer.shapes)
    for name in ("tokens", "resid", "z", "logits"):
        setattr(longer, name, [torch.cat([v[:2], v, v[-1:]]) for v in getattr(longer, name)])
    for at in ("decision", "user", "completion", "last", -1):
        match = StateMatch(target(longer), RESID, at=at, align="end")
        close(match(CASE.run("left")), torch.ones(4))
        assert float(StateMatch(target(longer), RESID, at=at)(CASE.run()).abs().min()) < 0.9


def test_projection() -> None:
    unit = VECTOR[0] / VECTOR[0].norm()
    expected = []
    for values, shape in zip(CASE.resid, CASE.shapes, strict=True):
        each = [sum(float(a) * float(b) for a, b in zip(values[t], unit, strict=True)) for t in range(sum(shape))]
        expected.append(sum(each) / len(each))
    close(Projection(direction(), at="all")(CASE.run()), torch.tensor(expected))
    close(Projection(direction(5 * VECTOR), at="all")(CASE.run()), torch.tensor(expected))
    close(Projection(direction(-VECTOR), at="all")(CASE.run()), -torch.tensor(expected))


def test_a_position_of_the_site_says_where() -> None:
    close(
        StateMatch(target(), RESID.at(pos=1))(CASE.run()),
        StateMatch(target(), RESID, at=1)(CASE.run()),
    )
    assert StateMatch(target(), RESID.at(pos=1)).sites() == (RESID,)
    assert StateMatch(target(), "blocks.1.hook_resid_post").site == StateMatch(target(), ("resid_post", 1)).site


# Names and errors


def test_names_and_reprs() -> None:
    found = {name: (make().name, repr(make())) for name, make in OBJECTIVES.items()}
    assert found["gap max"] == ("logit_gap", "LogitGap([1, 2, 3], [4, 5], reduce='max')")
    assert found["gap per example"][1] == "LogitGap(<4 ids, one a prompt>, <4 ids, one a prompt>, reduce='max')"
    assert found["prob"] == ("token_prob", "TokenProb([1, 2], log=False)")
    assert found["log prob"][0] == "token_log_prob"
    assert found["ce"] == (
        "teacher_forced_ce", "TeacherForcedCE(first=2, first_weight=3, rest_weight=1, span='completion')"
    )  # fmt: skip
    assert found["kl decision"] == ("kl_from_baseline", "KLFromBaseline(<4 prompts>, where='decision', reverse=False)")
    assert found["match head, last"] == (
        "state_match", "StateMatch(<4 prompts>, Site('z', 2, head=1), at='last', measure='cosine', align='end')"
    )  # fmt: skip
    assert found["projection"] == ("projection", "Projection(Site('resid_post', 1), at='user')")
    assert repr(-LogitGap(1, 2) + 0.5 * TokenProb(range(20))) == (
        "- LogitGap([1], [2], reduce='max') + 0.5 * TokenProb([0, 1, 2, 3, 4, 5, ...], log=False)"
    )


class Words:
    """A tokenizer of a few tokens."""

    unk_token, unk_token_id = "<unk>", 9
    pieces = ("<unk>", " cats", " dogs", " f", "eline", "\n")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        known = {" cats": [1], "cats": [1], " dogs": [2], " feline": [3, 4], "\n": [5], "": []}
        return known.get(text, [9])

    def decode(self, ids: list[int]) -> str:
        return self.pieces[ids[0]]


def test_strings_stand_for_their_one_token() -> None:
    holder = type("Model", (), {"tokenizer": Words()})()
    gap = LogitGap([" cats", "cats", " cats"], [" dogs", "\n"], tokenizer=holder)
    assert (gap.positive.ids.tolist(), gap.negative.ids.tolist()) == ([[1]], [[2, 5]])
    assert repr(gap) == r"LogitGap([' cats', 'cats'], [' dogs', '\n'], reduce='max')"
    close(gap(CASE.run()), LogitGap(1, {2, 5})(CASE.run()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens is an empty set of tokens. Pass at least one"),
        (" feline", "tokens: ' feline' is 2 tokens: ' f', 'eline'. Pass one of them."),
        ("", "tokens: '' is no token. Pass a token's text or its id."),
        (" lynx", "tokens: ' lynx' is unknown to the tokenizer."),
        ([3, -1], r"tokens got the token id -1. Ids count from 0."),
        (torch.tensor([[1, 2]]), r"tensor of torch.int64 with shape \[1, 2\]. A tensor holds one id for each prompt"),
        (torch.tensor([1.0]), r"tensor of torch.float32 with shape \[1\]"),
        (torch.tensor([], dtype=torch.long), r"shape \[0\]"),
    ],
)
def test_tokens_that_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(MechsteerError, match=message):
        TokenSet.of(tokens, tokenizer=Words())
    with pytest.raises(MechsteerError, match=r"string ' cats' but no tokenizer. Pass tokenizer=model, or token ids."):
        TokenProb(" cats")


def test_sets_that_are_refused() -> None:
    with pytest.raises(MechsteerError, match=r"Token ids \[2, 3\] are in both positive and negative"):
        LogitGap([1, 2, 3], [3, 2, 7])
    with pytest.raises(MechsteerError, match=r"Token ids \[5\] are in both"):
        LogitGap(torch.tensor([1, 5, 2]), torch.tensor([2, 5, 1]))
    with pytest.raises(MechsteerError, match=r"Token ids \[5\] are in both"):
        LogitGap([5, 6], torch.tensor([2, 5, 1]))
    with pytest.raises(MechsteerError, match="positive has ids for 3 prompts and negative for 2"):
        LogitGap(torch.tensor([1, 5, 2]), torch.tensor([3, 4]))
    with pytest.raises(MechsteerError, match=r"LogitGap\(reduce=\) got 'sum'. Pass one of 'max', 'mean', 'logsumexp'"):
        LogitGap(1, 2, reduce="sum")
    for objective in (LogitGap(1, 11), LogitGap(torch.tensor([1, 2, 3, 11]), 0), TokenProb([3, 11])):
        with pytest.raises(MechsteerError, match=r"id 11 lies outside the vocabulary of the model \(d_vocab=11\)"):
            objective(CASE.run())


def test_cross_entropies_that_are_refused() -> None:
    with pytest.raises(MechsteerError, match=r"span=\) got 'answer'. Pass one of 'scaffold', 'prefix', 'user'"):
        TeacherForcedCE(span="answer")
    with pytest.raises(MechsteerError, match=r"first=-1\) is a number of tokens"):
        TeacherForcedCE(first=-1)
    for weight in (math.nan, math.inf, -1.0):
        with pytest.raises(MechsteerError, match=f"got the weight {weight}. Pass finite weights of 0 or more"):
            TeacherForcedCE(rest_weight=weight)
    bare = make_case(0, shapes=((1, 0, 3, 0), (1, 0, 2, 3), (1, 0, 1, 0)))
    with pytest.raises(
        MechsteerError, match=r"2 of 3 prompts \(row 0, 2\) have no token to predict of span 'completion'"
    ):
        TeacherForcedCE()(bare.run())
    with pytest.raises(MechsteerError, match=r"1 of 1 prompts \(row 0\) have no token to predict other than its first"):
        TeacherForcedCE(span="all")(make_case(0, shapes=((0, 0, 1, 0),)).run())
    with pytest.raises(MechsteerError, match=r"1 of 4 prompts .* have no token to predict"):
        TeacherForcedCE(first=1, first_weight=0.0)(CASE.run())  # the second completion is one token long


def test_baselines_that_are_refused() -> None:
    with pytest.raises(MechsteerError, match=r"where=\) got 'last'. Pass one of 'decision', 'scaffold'"):
        KLFromBaseline(OTHER.run(), where="last")
    with pytest.raises(MechsteerError, match=r"one row for each prompt. Pass model.run\(prompts\)"):
        KLFromBaseline(OTHER.run(example=[1, 0, 2, 3]))
    with pytest.raises(MechsteerError, match=r"were not computed. Run the model with logits='all'"):
        KLFromBaseline(OTHER.run(read=OTHER.prompts().at(-1)), where="completion")
    with pytest.raises(MechsteerError, match=r"no token for KLFromBaseline\(where='completion'\)"):
        KLFromBaseline(make_case(0, shapes=((1, 0, 3, 0),)).run(), where="completion")
    other = make_case(0, shapes=((1, 2, 3, 5), (1, 0, 1, 2)))
    with pytest.raises(
        MechsteerError, match=r"compares 1 tokens of prompt 1 in the baseline with 2 now. Make the base"
    ):
        KLFromBaseline(OTHER.run(), where="completion")(other.run())


def test_states_that_are_refused() -> None:
    with pytest.raises(MechsteerError, match=r"measure=\) got 'dot'. Pass one of 'cosine', 'mse'"):
        StateMatch(target(), RESID, measure="dot")
    with pytest.raises(MechsteerError, match=r"align=\) got 'left'. Pass one of 'start', 'end'"):
        StateMatch(target(), RESID, align="left")
    with pytest.raises(MechsteerError, match=r"StateMatch\(at=\) got 'answer'. Pass one of 'decision', 'last', 'all'"):
        StateMatch(target(), RESID, at="answer")
    with pytest.raises(MechsteerError, match="resid_pre"):
        StateMatch(target(), ("resid_pre", 0))
    with pytest.raises(MechsteerError, match=r"Site\('pattern', 0\), which has no features for each token"):
        StateMatch(target(), ("pattern", 0))
    with pytest.raises(MechsteerError, match=r"at=2 and Site\('resid_post', 1, pos=1\) both say where"):
        StateMatch(target(), RESID.at(pos=1), at=2)
    with pytest.raises(
        MechsteerError, match=r"made with big \(weights ffff00001111\), and the run is of tiny \(weights 0123456789ab\)"
    ):
        StateMatch(target(model=ModelId("big", "ffff00001111", False)), RESID)(CASE.run())
    longer = make_case(0, shapes=((1, 2, 6, 5), *SHAPES[1:]))
    with pytest.raises(MechsteerError, match=r"compares prompt 0 with position 11 of its target, which has 11 tokens"):
        StateMatch(target(), RESID, at="all")(longer.run())
    with pytest.raises(MechsteerError, match=r"align='end'.* compares prompt 0 with position -3 of its target"):
        StateMatch(target(), RESID, at="all", align="end")(longer.run("left"))
    with pytest.raises(MechsteerError, match=r"1 of 4 prompts \(row 1\) have no token at 'prefix'"):
        StateMatch(target(), RESID, at="prefix")(CASE.run())


def test_projections_that_are_refused() -> None:
    with pytest.raises(MechsteerError, match=r"holds 2 vectors, and one was expected"):
        Projection(direction(torch.eye(2, D_MODEL)))
    with pytest.raises(MechsteerError, match=r"is zero, so it has no unit vector"):
        Projection(direction(0 * VECTOR))
    with pytest.raises(MechsteerError, match=r"direction of width 4 but Site\('resid_post', 1\) has 6"):
        Projection(direction(VECTOR[:, :4], model=None))(CASE.run())
    with pytest.raises(MechsteerError, match=r"Projection was made with big"):
        Projection(direction(model=ModelId("big", "ffff00001111", False)))(CASE.run())


# On models


def hand_reduced(model: Any, texts: list[str]) -> list[Tensor]:
    """TransformerLens's own logits of each text alone, at its last token."""
    ids = [model.prompts(text).tokens for text in texts]
    with torch.no_grad():
        return [model.hooked(row)[0, -1] for row in ids]


TEXTS = [
    "The cat sat on the mat",
    "When Mary and John went to the store, John gave a drink to",
    "A feline purrs; Quick",
]


def test_on_every_architecture(zoo_folder: Path) -> None:
    model = load_model(zoo_folder, device="cpu")
    alone = torch.stack(hand_reduced(model, TEXTS))
    run = model.run(TEXTS, record=[RESID])
    torch.testing.assert_close(LogitGap([5, 9], [7])(run), alone[:, [5, 9]].amax(1) - alone[:, 7], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(TokenProb(5)(run), alone.softmax(1)[:, 5], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        losses = [model.hooked(model.prompts(text).tokens, return_type="loss") for text in TEXTS]
    ce = TeacherForcedCE(first=0, span="all")
    torch.testing.assert_close(ce(run), torch.stack(losses), atol=1e-4, rtol=1e-4)
    assert float(KLFromBaseline(run, where="all")(model.run(TEXTS)).abs().max()) < 1e-6
    close(StateMatch(run.activations, RESID, at="all")(run), torch.ones(3))
    # Steering moves the projection by as much as was added, and the predictions with it.
    vector = torch.linspace(-1, 2, model.d_model)
    steered = model.run(TEXTS, [Add(vector, 0.5, site=RESID)], record=[RESID])
    projection = Projection(Direction(vector[None], site=RESID))
    moved = projection(steered) - projection(run)
    torch.testing.assert_close(moved, 0.5 * vector.norm().expand(3), atol=1e-4, rtol=1e-4)
    assert float(KLFromBaseline(run)(steered).min()) > 1e-4


def greedy(model: Any, prompt: Prompts, count: int) -> Tensor:
    ids = prompt.tokens
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model.hooked(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, -count:]


def test_on_chats_with_completions() -> None:
    model = load_model("pocket", device="cpu")
    requests = ["What should I cook for dinner?", "Tell me about the weather."]
    prompts = Prompts.from_chats(requests, model, prefix="Talk only about cats.")
    completions = torch.stack([greedy(model, prompts[i].padded("right"), 10) for i in range(2)])
    prompts = prompts.with_completions(completions)
    plain = Prompts.from_chats(requests, model).with_completions(completions)
    ce = TeacherForcedCE()
    run, without = (
        model.run(each, logits=ce.reads(each), record=[("resid_post", 4)]) for each in (prompts, plain)
    )  # fmt: skip
    expected = []
    for i in range(2):
        row = prompts[[i]].padded("right")
        with torch.no_grad():
            nll = model.hooked(row.tokens, return_type="loss", loss_per_token=True)[0]
        expected.append(nll[row.span("completion")[0, 1:]].mean())
    torch.testing.assert_close(ce(run), torch.stack(expected), atol=1e-4, rtol=1e-4)
    close(ce(model.run(prompts.padded("left"))), ce(model.run(prompts.padded("right"))))
    # What is said under the prefix is less likely without it, and the states differ.
    assert bool((ce(without) > ce(run)).all())
    match = StateMatch(run.activations, ("resid_post", 4), at="completion", align="end")
    close(match(run), torch.ones(2))
    assert 0 < float(match(without).min()) < float(match(without).max()) < 0.999


def test_strings_of_the_pocket_model() -> None:
    model = load_model("pocket", device="cpu")
    gap = LogitGap([" cats", " kittens"], " dogs", tokenizer=model)
    cats = [model.tokenizer.encode(text, add_special_tokens=False)[0] for text in (" cats", " kittens", " dogs")]
    assert [*gap.positive.ids[0].tolist(), *gap.negative.ids[0].tolist()] == cats
    with pytest.raises(
        MechsteerError, match=r"positive: ' xylophone' is 6 tokens: ' ', 'x', .*, 'one'\. Pass one of them\."
    ):
        LogitGap(" xylophone", " dogs", tokenizer=model)
