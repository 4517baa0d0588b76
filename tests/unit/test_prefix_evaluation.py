"""The table of prefixes against the same numbers from plain runs."""

from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.judges import lexicon_judge
from mechsteer.prefix.evaluation import evaluate_prefixes
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.vocabulary import embeddings, insert

REQUESTS = ["Write a haiku on my birthday.", "Tell me something new.", "I want two reasons."]
JUDGE = lexicon_judge(["cat", "cats", "kitten", "kittens", "tomcats"])
CE = ms.TeacherForcedCE()


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket-1l", device="cpu")


@pytest.fixture(scope="module")
def requests(pocket: ms.Model) -> ms.Prompts:
    return ms.Prompts.from_chats(REQUESTS, pocket, slots=1, labels=REQUESTS)


@pytest.fixture(scope="module")
def reference(pocket: ms.Model) -> list[int]:
    return pocket.tokenizer.encode("Talk only about cats.", add_special_tokens=False)


@pytest.fixture(scope="module")
def table(pocket: ms.Model, requests: ms.Prompts, reference: list[int]) -> ms.Result:
    soft = embeddings(pocket)[reference]
    prefixes: dict[str, Any] = {"other": [30, 400], "none": [], "soft": soft}
    return evaluate_prefixes(
        pocket, requests, prefixes, reference=reference, judge=JUDGE, k=(1, 4), samples=3, max_new_tokens=8, n_random=2
    )


def said(prompts: ms.Prompts) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.span("completion"), strict=True)]


def test_the_table_is_that_of_plain_runs(
    pocket: ms.Model, requests: ms.Prompts, reference: list[int], table: ms.Result
) -> None:
    made = pocket.generate(ms.Prompts.from_chats(REQUESTS, pocket, prefix="Talk only about cats."), max_new_tokens=8)
    targets = said(made)
    assert table["prefix"].values.tolist() == [
        "reference",
        "other",
        "none",
        "soft",
        "random tokens 1",
        "random tokens 2",
    ]
    assert table["prompt"].values.tolist() == REQUESTS
    ids = table.provenance["options"]["ids"]
    assert ids["soft"] is None and len(ids["random tokens 1"]) == len(reference) != ids["random tokens 2"]
    for name in ("reference", "other", "none", "random tokens 2"):
        row = table.sel(prefix=name)
        scored = insert(requests, ids[name], where="prefix").with_completions(targets)
        ce, weight = CE(pocket.run(scored)), CE.total_weight(scored)
        assert np.abs(row["ce"].values - ce.numpy()).max() < 1e-5
        assert abs(float(row["cross_entropy"]) - float((ce * weight).sum() / weight.sum())) < 1e-5
        assert float(row["cross_entropy_low"]) <= float(row["cross_entropy"]) <= float(row["cross_entropy_high"])
        greedy = pocket.generate(insert(requests, ids[name], where="prefix"), max_new_tokens=8)
        assert row["completion"].values.tolist() == greedy.completions
        for place, (a, b) in enumerate(zip(said(greedy), targets, strict=True)):
            assert bool(row["exact_match"][place]) is (a == b)
            for k in (1, 4):
                cell = row.sel(k=k)
                assert bool(cell["exact_at"][place]) is (a[:k] == b[:k])
                rest, shared = list(a[:k]), 0
                for token in b[:k]:
                    if token in rest:
                        rest.remove(token)
                        shared += 1
                assert float(cell["overlap_at"][place]) == shared / len(b[:k])
            assert bool(row["adherence_greedy"][place]) is JUDGE(greedy.completions[place])
        if ids[name]:
            assert row["survives"].values.tolist() == list(RoundTrip(requests).survives(tuple(ids[name])))
            filled = insert(requests, ids[name], where="prefix").padded("right")
            start = int(requests.padded("right").slots[0].int().argmax())
            logits = pocket.run(filled[0]).logits[0].log_softmax(-1)
            nll = -float(np.mean([logits[start + i - 1, token] for i, token in enumerate(ids[name])]))
            assert float(row["perplexity"]) == pytest.approx(np.exp(nll), rel=1e-4)


def test_the_reference_is_its_own_equal(table: ms.Result) -> None:
    row = table.sel(prefix="reference")
    assert row["exact_match"].values.all() and row["exact_at"].values.all() and (row["overlap_at"].values == 1).all()
    assert str(row["text"].values) == "Talk only about cats." and row["survives"].values.all()
    assert row["adherence_greedy"].values.any() and 0 < row["adherence_sampled"].values.mean() <= 1
    other = table.sel(prefix="random tokens 1")
    assert float(other["cross_entropy"]) > float(row["cross_entropy"])
    # Its embeddings in slots do what its tokens do, and have no text.
    soft = table.sel(prefix="soft")
    for name in ("ce", "exact_match", "adherence_greedy", "adherence_sampled"):
        assert np.allclose(soft[name].values, row[name].values, atol=1e-5), name
    assert np.isnan(float(soft["perplexity"])) and not soft["survives"].values.any() and str(soft["text"].values) == ""
    assert np.isnan(float(table.sel(prefix="none")["perplexity"])) and table.sel(prefix="none")["survives"].values.all()


def test_samples_are_drawn_for_every_prompt(
    pocket: ms.Model, requests: ms.Prompts, reference: list[int], table: ms.Result
) -> None:
    filled = ms.Prompts.concat([insert(requests, reference, where="prefix")] * 3)
    drawn = pocket.generate(filled, temperature=1.0, seed=0, max_new_tokens=8).completions
    expected = [np.mean([JUDGE(drawn[row + 3 * sample]) for sample in range(3)]) for row in range(3)]
    assert np.allclose(table.sel(prefix="reference")["adherence_sampled"].values, expected)
    assert len(set(drawn)) > 3


def test_another_models_completions_are_compared_with(
    pocket: ms.Model, requests: ms.Prompts, reference: list[int], tmp_path: Any
) -> None:
    targets = [[50, 60], [70], [80, 90, 100]]
    given = evaluate_prefixes(pocket, requests, {"ours": reference}, completions=targets, n_random=0, max_new_tokens=4)
    held = evaluate_prefixes(
        pocket, requests.with_completions(targets), {"ours": reference}, n_random=0, max_new_tokens=4
    )
    expected = CE(pocket.run(insert(requests, reference, where="prefix").with_completions(targets))).numpy()
    for table in (given, held):
        assert np.abs(table["ce"].values[0] - expected).max() < 1e-5
        assert "adherence_greedy" not in table.data
    given.save(tmp_path / "table.safetensors")
    assert ms.Result.load(tmp_path / "table.safetensors").data.equals(given.data)


def test_errors_say_what_to_do(pocket: ms.Model, requests: ms.Prompts, reference: list[int]) -> None:
    for prefixes, options, text in (
        ({"a": [5]}, {}, "There is nothing to compare with. Pass completions=, or reference="),
        ({}, {"completions": [[5]] * 3}, "evaluate_prefixes got no prefixes"),
        (
            {"reference": [5]},
            {"reference": reference},
            "A prefix is called 'reference', which is the name of a baseline",
        ),
        ({"random tokens": [5]}, {"reference": reference}, "A prefix is called 'random tokens'"),
        ({"a": [99999]}, {"reference": reference}, "token id 99999 is none of"),
        ({"a": [5]}, {"reference": reference, "k": []}, "pass k and samples from 1"),
        ({"a": torch.zeros(2, 3)}, {"reference": reference, "max_new_tokens": 2}, "d_model"),
    ):
        with pytest.raises(MechsteerError) as caught:
            evaluate_prefixes(pocket, requests, prefixes, **options)
        assert text in str(caught.value), text
    bare = ms.Model(pocket.hooked, tokenizer=None, name="bare")
    bare.tokenizer = None
    with pytest.raises(MechsteerError, match="bare has no tokenizer"):
        evaluate_prefixes(bare, ms.Prompts.from_ids([[1, 2]]), {"a": [5]}, completions=[[3]])
