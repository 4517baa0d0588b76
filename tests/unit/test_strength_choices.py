"""Multiple-choice accuracy over alpha, against one forward pass for each option and strength."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.strength.choices import choice_curves, lettered_prompt

PROMPTS = ["The cat sat on", "When Mary and John went to the store, John gave a drink to", "cat"]
OPTIONS = [[" the mat", " a dog and", " Mary"], [" Mary", " John"], [" mat", " t", " to the other cat"]]
ONE_TOKEN = [["A", "W", "T"], ["c", "m"], ["t", "o", "w"]]
ANSWERS = [0, 1, 2]
ALPHAS = [-3.0, 0.0, 5.0]


def directions(model: ms.Model) -> dict[str, ms.Direction]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: ms.Direction(torch.randn(model.d_model, generator=generator), ms.Site("resid_post", layer))
        for name, layer in (("early", 0), ("late", 2))
    }


def one_by_one(
    model: ms.Model, options: list[list[list[int]]], named: dict[str, ms.Direction], at: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The naive twin: log-probabilities [direction, alpha, option, prompt] and numbers of tokens."""
    values = np.full((len(named), len(ALPHAS), 3, 3), np.nan)
    counts = np.ones((3, 3))
    for d, direction in enumerate(named.values()):
        for a, alpha in enumerate(ALPHAS):
            for p, text in enumerate(PROMPTS):
                prompt = model.prompts(text)
                for o, ids in enumerate(options[p]):
                    run = model.run(prompt.with_completions([ids]), [ms.Add(direction, alpha, at=at)])
                    log_probs = run.logits.double().log_softmax(-1)[0, -len(ids) - 1 : -1]
                    values[d, a, o, p] = float(log_probs[torch.arange(len(ids)), ids].sum())
                    counts[o, p] = len(ids)
    return values, counts


@pytest.mark.parametrize(("architecture", "at"), [("gpt2", None), ("gemma3", -1)])
def test_log_probs_are_those_of_one_pass_each(
    zoo_models: Callable[..., ms.Model], architecture: str, at: Any, tmp_path: Path
) -> None:
    model = zoo_models(architecture)
    named = directions(model)
    ids = [[model.tokenizer.encode(text, add_special_tokens=False) for text in texts] for texts in OPTIONS]
    result = choice_curves(
        model, PROMPTS, named, ALPHAS, OPTIONS, ANSWERS, at="last" if at else "all", out=tmp_path / "sweep"
    )
    expected, counts = one_by_one(model, ids, named, at)
    assert counts.max() > 3
    assert result["log_prob"].dims == ("direction", "alpha", "option", "prompt")
    np.testing.assert_allclose(result["log_prob"], expected, atol=2e-4, rtol=1e-5)
    assert np.array_equal(result["n_tokens"], counts)
    for name, scored in (("", expected), ("_per_token", expected / counts)):
        chosen = np.nanargmax(scored, 2)
        assert np.array_equal(result[f"chosen{name}"], chosen)
        assert np.array_equal(result[f"accuracy{name}"], chosen == np.array(ANSWERS))
        assert result[f"accuracy{name}"].dims == ("direction", "alpha", "prompt")
    assert not np.array_equal(result["chosen"], result["chosen_per_token"])
    assert len(np.unique(result["chosen"].sel(direction="early", alpha=5.0) == result["chosen"].sel(alpha=0.0))) == 2
    assert result["layer"].values.tolist() == [0, 2] and result["answer"].values.tolist() == ANSWERS
    result.save(tmp_path / "choices.safetensors")
    assert ms.Result.load(tmp_path / "choices.safetensors").data.identical(result.data)
    result.plot("accuracy")
    again = choice_curves(
        model, PROMPTS, named, ALPHAS, OPTIONS, ANSWERS, at="last" if at else "all", out=tmp_path / "sweep"
    )
    assert again.data.identical(result.data)


def test_options_of_one_token_are_scored_in_one_pass(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("gpt2")
    named = directions(model)
    ids = [[model.tokenizer.encode(text, add_special_tokens=False) for text in texts] for texts in ONE_TOKEN]
    assert all(len(each) == 1 for texts in ids for each in texts)
    result = choice_curves(model, PROMPTS, named, ALPHAS, ONE_TOKEN, ANSWERS)
    expected, _ = one_by_one(model, ids, named, None)
    np.testing.assert_allclose(result["log_prob"], expected, atol=1e-4, rtol=1e-5)
    assert np.array_equal(result["chosen"], np.nanargmax(expected, 2))
    assert np.array_equal(result["chosen"], result["chosen_per_token"])


def test_a_direction_to_a_name_makes_the_pocket_model_choose_it() -> None:
    model = ms.load_model("pocket", device="cpu")
    prompts = [
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
    ]
    names = [model.tokenizer.encode(name, add_special_tokens=False)[0] for name in (" Mary", " John")]
    unembedding = model.unembedding()
    to_john = ms.Direction(unembedding[:, names[1]] - unembedding[:, names[0]], ms.Site("resid_post", 5))
    result = choice_curves(model, prompts, to_john, [-50.0, 50.0], [" Mary", " John"], [0, 1], at="last")
    assert result["accuracy"].sel(alpha=0.0).values.tolist() == [[1, 1]]
    assert result["chosen"].sel(alpha=50.0).values.tolist() == [[1, 1]]
    assert result["chosen"].sel(alpha=-50.0).values.tolist() == [[0, 0]]
    assert result["accuracy"].mean("prompt").values.tolist() == [[0.5, 1.0, 0.5]]
    # One token each, so that no second pass is needed; all options at once give the same as each behind its prompt.
    unlike = choice_curves(model, prompts, to_john, [-50.0, 50.0], [" Mary", " John", " the store"], [0, 1], at="last")
    np.testing.assert_allclose(unlike["log_prob"].values[:, :, :2], result["log_prob"], atol=1e-4, rtol=1e-5)


def test_the_published_recipe_reads_a_letter_and_counts_none_as_a(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    vocabulary, unembedding = model.tokenizer.get_vocab(), model.unembedding()
    named = directions(model) | {
        # Strong pushes towards one token.
        name: ms.Direction(unembedding[:, vocabulary[name]] - unembedding.mean(1), ms.Site("resid_post", 2))
        for name in ("▁T", "C", "x")
    }
    prompts = ["The cat sat on", "cat"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    options = [[f" {letter}" for letter in letters], [" A", " B", " C"]]
    result = choice_curves(model, prompts, named, [1e4], options, [19, 0], recipe="published")
    pushed = result.data.sel(alpha=1e4)
    assert pushed["completion"].sel(direction="▁T").values.tolist() == ["T T T T T T T T"] * 2
    assert pushed["completion"].sel(direction="C").values.tolist() == ["CCCCCCCC"] * 2
    # T is an option of the first prompt only; the C that is found is a part of a word.
    expected = {"▁T": ([19, 0], [True, False]), "C": ([0, 0], [False, False]), "x": ([0, 0], [False, False])}
    for name, (chosen, parsed) in expected.items():
        assert pushed["chosen"].sel(direction=name).values.tolist() == chosen
        assert pushed["parsed"].sel(direction=name).values.tolist() == parsed
    assert pushed["accuracy"].sel(direction="▁T").values.tolist() == [1, 1]
    assert pushed["accuracy"].sel(direction="x").values.tolist() == [0, 1]
    greedy = model.generate(prompts, interventions=[ms.Add(named["early"], 1e4)], max_new_tokens=8)
    assert pushed["completion"].sel(direction="early").values.tolist() == greedy.completions


def test_lettered_prompts() -> None:
    one = lettered_prompt("What purrs?", ["cats", "trains"])
    assert one == "What purrs?\nA. cats\nB. trains\nAnswer:"
    shots = lettered_prompt("What purrs?", ["cats", "trains"], examples=[("What rumbles?", ["cats", "trains"], 1)])
    assert shots == "What rumbles?\nA. cats\nB. trains\nAnswer: B\n\n" + one


@pytest.mark.parametrize(
    ("options", "answers", "more", "message"),
    [
        (
            " A",
            [0, 0, 0],
            {},
            "choice_curves got a string and answers for 3 of 3 prompts. Pass one list of options for",
        ),
        ([[" A"]], [0, 0, 0], {}, "choice_curves got options for 1 and answers for 3 of 3 prompts"),
        ([" A", " B"], [0], {}, "choice_curves got options for 3 and answers for 1 of 3 prompts"),
        ([], [0, 0, 0], {}, "choice_curves got options for 3 and answers for 3 of 3"),
        ([" A", " B"], [0, 2, 0], {}, "The answer 2 of prompt 1 is none of its 2 options (from 0)."),
        ([" A", ""], [0, 0, 0], {}, "An option is empty. Give each at least one token."),
        ([" A"], [0, 0, 0], {"recipe": "published", "out": "x"}, 'out= keeps sweeps, and recipe="published" makes'),
        ([" A"], [0, 0, 0], {"recipe": "mine"}, "recipe='mine' does not exist."),
    ],
)
def test_options_that_do_not_fit_are_refused(
    zoo_models: Callable[..., ms.Model], options: Any, answers: Any, more: dict[str, Any], message: str
) -> None:
    model = zoo_models("gpt2")
    with pytest.raises(ms.MechsteerError, match=re.escape(message)):
        choice_curves(model, PROMPTS, directions(model), [1.0], options, answers, **more)


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ([], [], "lettered_prompt got 0 options. Pass from 1 to 26"),
        (["x"] * 27, [], "lettered_prompt got 27 options."),
        (["x"], [("q", ["a"], 1)], "lettered_prompt got 1 options and the answer 1. Pass from 1 to 26, and an answer"),
    ],
)
def test_letters_that_do_not_exist_are_refused(options: Any, examples: Any, message: str) -> None:
    with pytest.raises(ms.MechsteerError, match=re.escape(message)):
        lettered_prompt("question", options, examples=examples)
