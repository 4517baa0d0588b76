"""Candidates that the gradient preselects, and forward passes that are counted, against plain loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain import ids

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.propagator.gap import gap_gradient
from mechsteer.propagator.token_search import search_tokens
from mechsteer.vocabulary import embeddings, insert

GAP = ms.LogitGap([5, 6], [7, 9], reduce="logsumexp")
FEW = [5, 11, 17, 30, 44, 63, 90]
Load = Callable[..., ms.Model]


class Counted(ms.Objective):
    """The gap, and of how many prompts it was asked for; objectives made of it add to the same list."""

    reads = GAP.reads
    asked: list[int]

    def __init__(self) -> None:
        object.__setattr__(self, "asked", [])

    def __call__(self, run: ms.Run) -> torch.Tensor:
        self.asked.append(len(run.prompts))
        return GAP(run)


def some(model: ms.Model) -> ms.Prompts:
    return ms.Prompts.from_ids(ids((12, 9)), tokenizer=model.tokenizer, padding="left")


def exact(model: ms.Model, prompts: ms.Prompts, tokens: Any, where: str) -> float:
    return float(GAP(model.run(insert(prompts, tokens, where=where), logits="last")).mean())


def first_order(model: ms.Model, prompts: ms.Prompts, before: tuple[int, ...], where: str, n: int) -> list[int]:
    """The n candidates with the largest <g, E(t) - f>, the gradient g found by hand where the mean embedding stands."""
    table = embeddings(model)
    filler = table.mean(0)
    slotted = insert(prompts, before, where=where, slots=1)

    def slope(token: int) -> float:
        way = 1e-4 * (table[token] - filler)
        up, down = (
            GAP(model.run(slotted, [ms.SoftPrefix((filler + sign * way)[None])], logits="last")).mean()
            for sign in (1, -1)
        )
        return float(up - down)

    return sorted(FEW, key=slope, reverse=True)[:n]


@pytest.mark.parametrize("where", ["suffix", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_decides_exactly_among_what_the_gradient_puts_first(precise: Load, name: str, where: str) -> None:
    model = precise(name)
    prompts, chosen = some(model), ()
    tried = []
    for _ in range(2):
        tried.append(first_order(model, prompts, chosen, where, 3))
        chosen = (*chosen, max(tried[-1], key=lambda token: exact(model, prompts, (*chosen, token), where)))
    found = search_tokens(model, prompts, measure=GAP, where=where, n_tokens=2, candidates=FEW, preselect=3)
    assert found.ids == chosen
    assert abs(float(found.gaps["gap"][-1].mean()) - exact(model, prompts, chosen, where)) < 1e-5
    assert all(set(each) != set(FEW) for each in tried)


def test_preselecting_all_changes_nothing_but_a_few_changes_the_cost(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model)
    for method, few, whole in (
        ("greedy", 1 + 2 * (1 + 3), 1 + 2 * 7),
        ("beam", 1 + (1 + 3) + 2 * (1 + 3), 1 + 7 + 2 * 7),
        ("sorted", 1 + (1 + 3) + 2, 1 + 7 + 2),
    ):
        options: dict[str, Any] = {"measure": GAP, "method": method, "n_tokens": 2, "beam": 2, "candidates": FEW}
        every = search_tokens(model, prompts, **options)
        assert every.forward_passes == 2 * whole
        same = search_tokens(model, prompts, preselect=len(FEW), **options)
        assert same.ids == every.ids and same.forward_passes == every.forward_passes
        less = search_tokens(model, prompts, preselect=3, **options)
        assert less.forward_passes == 2 * few
        assert set(less.ids) <= set(FEW)
        one = search_tokens(model, prompts, preselect=1, **options)
        assert one.ids[0] == first_order(model, prompts, (), "suffix", 1)[0]


@pytest.mark.parametrize("preselect", [None, 3])
@pytest.mark.parametrize("method", ["projection", "greedy", "beam", "sorted"])
def test_forward_passes_are_how_often_the_objective_was_asked(
    precise: Load, method: str, preselect: int | None
) -> None:
    model, counted = precise("gpt2"), Counted()
    found = search_tokens(
        model, some(model), measure=counted, method=method, n_tokens=2, beam=2, candidates=FEW, preselect=preselect
    )
    assert len(found.ids) == 2
    assert found.forward_passes == sum(counted.asked)
    # A beam of sequences that were found together scores each candidate once after each of them.
    until = float(found.gaps["gap"][1].min()) - 1e-6
    if method != "projection" and float(found.gaps["gap"][0].min()) < until:
        again = Counted()
        cut = search_tokens(
            model, some(model), measure=again, method=method, n_tokens=2, beam=2, candidates=FEW, until=until
        )
        assert len(cut.ids) == 1 and cut.forward_passes == sum(again.asked)


def test_the_gradient_is_that_of_the_mean_over_prompts(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model)
    slope = gap_gradient(model, insert(prompts, slots=1), measure=GAP).slots.mean(0)[0]
    order = np.argsort([-float(embeddings(model)[token] @ slope) for token in FEW], kind="stable")[:4]
    assert [FEW[index] for index in order] == first_order(model, prompts, (), "suffix", 4)


def test_errors_say_what_to_do(precise: Load) -> None:
    model = precise("llama")

    class Flat(ms.Objective):
        def __call__(self, run: ms.Run) -> torch.Tensor:
            return torch.zeros(len(run.prompts))

    for options, text in (
        ({"preselect": 0}, "preselect=0 is none. Pass at least 1"),
        ({"beam": 0}, "beam=0 is none"),
        ({"by": "l2", "method": "projection"}, "by got 'l2'"),
        ({"measure": Flat(), "preselect": 2}, "has no gradient at the embeddings"),
        ({"preselect": 2, "filler": 999}, "filler=999 is no id"),
        ({"candidates": [500]}, "token id 500 is none of"),
    ):
        with pytest.raises(MechsteerError) as caught:
            search_tokens(model, some(model), **{"measure": GAP, "candidates": FEW, **options})
        assert text in str(caught.value)
