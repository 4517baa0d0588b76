"""Sampling: draws follow the filtered softmax, and depend on the seed and the example alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechsteer as ms
from mechsteer.generation import Choice, filtered, uniform_draws


@pytest.fixture(scope="module")
def model(zoo_folders: dict[str, Path]) -> ms.Model:
    return ms.load_model(zoo_folders["gemma2"], device="cpu")


def generate(model: ms.Model, prompts: ms.Prompts, n: int = 6, **options: Any) -> list[list[int]]:
    out = model.generate(prompts, max_new_tokens=n, stop_at_eos=False, progress=False, **options)
    return [row[keep].tolist() for row, keep in zip(out.tokens, out.span("completion"), strict=True)]


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """How far counts are from what probabilities predict, in standard deviations of Pearson's statistic."""
    expected = probs.double() * counts.sum()
    assert int(counts[probs == 0].sum()) == 0, "a token without probability was drawn"
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    expected = torch.cat([expected[common], expected[~common].sum()[None]]).clamp(min=1e-9)
    freedom = max(1, int((expected > 1e-3).sum()) - 1)
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def plain_filter(logits: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """Probabilities of the tokens, by the definition."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = torch.tensor(logits, dtype=torch.float64)[order].softmax(0).tolist()
    kept, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if top_p is None or total < top_p:
            kept.append((token, weight))
        total += weight
    mass = sum(weight for _, weight in kept)
    probs = [0.0] * len(logits)
    for token, weight in kept:
        probs[token] = weight / mass
    return probs


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.4, None, None), (2.0, 12, None), (1.0, None, 0.7), (1.5, 30, 0.8), (1e-30, None, None)],
)
def test_draws_follow_the_softmax(temperature: float, top_k: int | None, top_p: float | None, model: ms.Model) -> None:
    n = 4000
    prompts = ms.Prompts.from_ids(zoo.prompts(batch=1, n_pos=5).repeat(n, 1), tokenizer=model)
    drawn = torch.tensor(
        generate(model, prompts, 2, temperature=temperature, top_k=top_k, top_p=top_p, seed=5, batch_size=2000)
    )

    def expected(text: ms.Prompts) -> Tensor:
        logits = model.run(text, logits=text.at(text.lengths - 1)).rows[0].double()
        scaled = (logits - logits.max()) / temperature
        return torch.tensor(plain_filter(scaled.tolist(), top_k, top_p))

    counts = torch.bincount(drawn[:, 0], minlength=model.d_vocab)
    assert abs(chi_square(counts, expected(prompts[0]))) < 4
    # The second token, after the likeliest first: each step has a draw of its own.
    first = int(counts.argmax())
    second = torch.bincount(drawn[drawn[:, 0] == first, 1], minlength=model.d_vocab)
    assert abs(chi_square(second, expected(prompts[0].with_completions([[first]])))) < 4


@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(1, 15),
    st.none() | st.floats(0.01, 1.0),
)
@settings(max_examples=300, deadline=None)
def test_filtered_keeps_the_tokens_that_the_definition_keeps(
    tenths: list[int], top_k: int | None, top_p: float | None
) -> None:
    logits = [value / 10 for value in tenths]
    got = filtered(torch.tensor([logits, logits[::-1]]), top_k, top_p).softmax(-1)
    expected = plain_filter(logits, top_k, top_p)
    ranked = torch.tensor(plain_filter(logits, top_k, None)).sort(descending=True).values.cumsum(0)
    assume(top_p is None or bool(((ranked - top_p).abs() > 1e-5).all()))
    torch.testing.assert_close(got[0].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], got[0].flip(0))


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    draws = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert Choice(1.0, None, None)(logits.expand(4, -1), draws).tolist() == [1, 1, 3, 3]


def test_seeds_decide_and_the_global_random_state_does_not(model: ms.Model) -> None:
    prompts = ms.Prompts.from_ids(zoo.prompts(batch=6, n_pos=9), tokenizer=model)
    torch.manual_seed(1)
    first, after = generate(model, prompts, temperature=1.0, seed=3), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after), "the global random state was used"
    torch.manual_seed(2)
    assert generate(model, prompts, temperature=1.0, seed=3) == first
    assert generate(model, prompts, temperature=1.0, seed=4) != first
    assert generate(model, prompts, temperature=1.0, top_k=1) == generate(model, prompts)


def test_every_example_has_a_stream_of_its_own_that_goes_on() -> None:
    some = uniform_draws(7, torch.tensor([4, 0, 2]), 40)
    assert torch.equal(some[:, :5], uniform_draws(7, torch.tensor([4, 0, 2]), 5))
    assert torch.equal(some[[1]], uniform_draws(7, torch.tensor([0]), 40))
    # First draws of neighbours are uniform and unrelated: correlations of n draws scatter by n ** -0.5.
    first = uniform_draws(0, torch.arange(4000), 2)
    other = uniform_draws(1, torch.arange(4000), 1)
    assert abs(float(first.mean()) - 0.5) < 0.02 and float(first.min()) >= 0 and float(first.max()) < 1
    columns = torch.stack([first[:-1, 0], first[1:, 0], first[:-1, 1], other[:-1, 0]])
    assert float((torch.corrcoef(columns) - torch.eye(4)).abs().max()) < 0.06
