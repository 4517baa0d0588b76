"""Shares of sampled completions over alpha, against one generation per prompt and strength."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import mechsteer as ms
from mechsteer.generation import generate
from mechsteer.judges import mood_judge
from mechsteer.strength.completions import _stream, completion_curves, scores, wilson_interval

PROMPTS = ["The cat sat on", "When Mary and John went to the store, John", "cat"]
ALPHAS = [-3.0, 0.0, 4.0]


def directions(model: ms.Model, *layers: int) -> dict[str, ms.Direction]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"random {layer}": ms.Direction(torch.randn(model.d_model, generator=generator), ms.Site("resid_post", layer))
        for layer in layers
    }


def vowels(text: str) -> bool:
    return sum(letter in "aeiou" for letter in text) >= 2


def one_by_one(
    model: ms.Model, prompts: ms.Prompts, named: dict[str, ms.Direction], alphas: list[float], **options: Any
) -> np.ndarray:
    """The naive twin: one generation for each completion, with hooks of one strength."""
    samples, seed, at = options.pop("samples"), options.pop("seed"), options.pop("at", None)
    texts = np.empty((len(named), len(alphas), samples, len(prompts)), dtype=object)
    for d, name in enumerate(named):
        for a, alpha in enumerate(alphas):
            for p in range(len(prompts)):
                for s in range(samples):
                    done = generate(
                        model, prompts[p], interventions=[ms.Add(named[name], alpha, at=at)], stop_at_eos=True,
                        batch_size=1, progress=False, seed=0, streams=[_stream(seed, name, alpha, p, s)], **options,
                    )  # fmt: skip
                    texts[d, a, s, p] = done.completions[0]
    return texts


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_completions_are_those_of_one_generation_each(
    zoo_models: Callable[..., ms.Model], architecture: str, tmp_path: Path
) -> None:
    model = zoo_models(architecture)
    prompts, named = model.prompts(PROMPTS), directions(model, 0, 2)
    result = completion_curves(
        model, prompts, named, [4.0, -3.0], vowels, samples=3, max_new_tokens=6, seed=7, top_k=20, batch_size=5
    )
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20, "top_p": None}
    expected = one_by_one(model, prompts, named, ALPHAS, samples=3, seed=7, **options)
    assert result["completion"].dims == ("direction", "alpha", "sample", "prompt")
    assert result["completion"].values.tolist() == expected.tolist()
    assert len(set(expected.ravel())) > 0.8 * expected.size
    verdict = np.vectorize(vowels)(expected)
    assert 0 < verdict.mean() < 1
    assert np.array_equal(result["verdict"], verdict)
    assert np.allclose(result["share"], verdict.mean(2))
    assert result["share"].dims == ("direction", "alpha", "prompt")
    assert result["alpha"].values.tolist() == ALPHAS and result["layer"].values.tolist() == [0, 2]
    low, high = wilson_interval(verdict.mean(2), 3)
    assert np.array_equal(result["share_low"], low) and np.array_equal(result["share_high"], high)
    options = result.provenance["options"]
    assert options["judge"] == "vowels" and options["samples"] == 3 and options["top_k"] == 20
    result.save(tmp_path / "curve.safetensors")
    assert ms.Result.load(tmp_path / "curve.safetensors").data.identical(result.data)
    result.plot("share")


def test_some_of_a_grid_gives_the_numbers_of_the_whole(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    named = directions(model, 0, 1)
    options: dict[str, Any] = {"samples": 4, "max_new_tokens": 5, "progress": False}
    whole = completion_curves(model, PROMPTS, named, ALPHAS, vowels, **options)
    part = completion_curves(
        model, PROMPTS[:2], {"random 1": named["random 1"]}, [4.0], vowels, batch_size=1, **options
    )
    assert part["alpha"].values.tolist() == [0.0, 4.0]
    same = whole.data["completion"].isel(direction=[1], alpha=[1, 2], prompt=[0, 1])
    assert part["completion"].values.tolist() == same.values.tolist()
    other = completion_curves(model, PROMPTS, named, ALPHAS, vowels, seed=1, **options)
    assert float((other["completion"] == whole["completion"]).mean()) < 0.2
    # Each direction draws anew, so that their curves are independent where alpha is 0.
    assert float((whole["completion"][0, 1] == whole["completion"][1, 1]).mean()) < 0.5


def test_where_hooks_are_needed_the_completions_are_the_same(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama", "bridge")
    prompts, named = model.prompts(PROMPTS), directions(model, 1)
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9}
    result = completion_curves(model, prompts, named, [2.0], vowels, at="last", seed=3, **options)
    expected = one_by_one(model, prompts, named, [0.0, 2.0], at=-1, seed=3, top_k=None, **options)
    assert result["completion"].values.tolist() == expected.tolist()


def test_the_published_recipe_judges_the_samples_of_a_prompt_together(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    named = directions(model, 1)
    asked: list[str] = []

    def judge(text: str) -> bool:
        asked.append(text)
        return "w" in text

    options: dict[str, Any] = {"max_new_tokens": 4, "progress": False}
    prompts = ["The cat sat on the mat. " * 30, "cat"]
    with pytest.raises(ms.MechsteerError, match="4 are to follow"):
        completion_curves(model, prompts, named, ALPHAS, judge, recipe="published", **options)
    prompts = ["The cat sat on the mat.", "cat"]
    result = completion_curves(model, prompts, named, ALPHAS, judge, recipe="published", **options)
    texts = result["completion"].values
    assert texts.shape == (1, 3, 12, 2)
    assert asked == ["\n".join(texts[0, a, :, p]) for a in range(3) for p in range(2)]
    any_of_12 = np.vectorize(lambda text: "w" in text)(texts).any(2)
    assert np.array_equal(result["share"], any_of_12) and result["verdict"].dims == result["share"].dims
    options = result.provenance["options"]
    assert (options["temperature"], options["top_k"], options["top_p"]) == (0.9, 50, 0.95)
    # The same completions, judged singly.
    singly = completion_curves(
        model, model.prompts(prompts), named, ALPHAS, judge, samples=12, max_new_tokens=4, temperature=0.9, top_k=50,
        top_p=0.95,
    )  # fmt: skip
    assert np.array_equal(singly["completion"], result["completion"])
    assert bool((singly["share"] <= result["share"]).all()) and float(singly["share"].mean()) < any_of_12.mean()


def test_the_defaults_are_the_papers(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    result = completion_curves(model, ["cat"], directions(model, 1), [1.0], vowels, max_new_tokens=1)
    options = result.provenance["options"]
    assert (options["samples"], options["temperature"], options["top_k"], options["top_p"]) == (32, 1.0, None, None)


def test_steering_to_joy_is_seen_by_the_labeller() -> None:
    model = ms.load_model("pocket", device="cpu")
    requests = ["Tell me about your day.", "What should I cook for dinner?", "Write a poem.", "Give me some advice."]
    plain = ms.Prompts.from_chats(requests, model)
    joyful = ms.Prompts.from_chats(requests, model, prefix="Be joyful.")
    site = ms.Site("resid_post", 3)
    joy = ms.difference_of_means(model, joyful, plain, sites=site, tokens="last")[site]
    result = completion_curves(
        model, plain, {"joy": joy}, [-2.0, 4.0], mood_judge("joy"), samples=8, max_new_tokens=24, progress=False
    )
    curve = result["share"].mean("prompt").sel(direction="joy").values
    assert curve[0] <= curve[1] <= 0.1 and curve[2] > 0.8
    assert result.provenance["options"]["judge"].startswith("the pocket language's labeller: joy")


# --- a folder


def test_a_killed_run_goes_on_where_it_ended(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    model = zoo_models("llama")
    named = directions(model, 1)
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 4, "progress": False, "batch_size": 1}
    whole = completion_curves(model, PROMPTS, named, ALPHAS, vowels, **options)
    path = tmp_path / "joy" / "completions.jsonl"
    completion_curves(model, PROMPTS, named, ALPHAS, vowels, out=tmp_path / "joy", **options)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 9
    # As after a kill: three cells, one of them changed by hand to see that it is taken, and a part of a line.
    kept = json.loads(lines[2])
    lines[2] = json.dumps({**kept, "texts": ["kept", "aeiou"]}) + "\n"
    path.write_text("".join(lines[:4]) + lines[4][:9])
    again = completion_curves(model, PROMPTS, named, ALPHAS, vowels, out=tmp_path / "joy", **options)
    direction, alpha, prompt = kept["cell"]
    assert again["completion"].values[direction, alpha, :, prompt].tolist() == ["kept", "aeiou"]
    assert again["verdict"].values[direction, alpha, :, prompt].tolist() == [0, 1]
    differing = again["completion"].values != whole["completion"].values
    assert differing.sum() == 2
    assert path.read_text().splitlines(keepends=True)[2] == lines[2]
    assert sorted(path.read_text().splitlines()[3:]) == sorted(line.strip() for line in lines[3:])
    # Another judge needs no new completions.
    rejudged = completion_curves(model, PROMPTS, named, ALPHAS, lambda text: 1, out=tmp_path / "joy", **options)
    assert bool((rejudged["share"] == 1).all())


def test_a_folder_of_something_else_is_refused(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    model = zoo_models("llama")
    named = directions(model, 1)

    def run(alphas: list[float], **options: Any) -> ms.Result:
        return completion_curves(
            model, PROMPTS, named, alphas, vowels, out=tmp_path, samples=1, max_new_tokens=2, progress=False, **options
        )

    run([1.0])
    with pytest.raises(ms.MechsteerError, match=r"holds other completions \(alphas, seed differ\). Choose"):
        run([2.0], seed=5)
    path = tmp_path / "completions.jsonl"
    text = path.read_text()
    for change, message in (
        ("", "has format None, expected 'mechsteer.steered completions'"),
        (text.replace("mechsteer.steered completions", "mechsteer.other"), "has format 'mechsteer.other', expected"),
        (text + "nonsense\n", r"completions.jsonl is damaged \(.*\). Choose another folder, or remove it"),
        (text + "{}\n", r"is damaged \('cell'\)"),
    ):
        path.write_text(change)
        with pytest.raises(ms.MechsteerError, match=message):
            run([1.0])


# --- judges and intervals


def test_any_function_of_a_text_judges() -> None:
    class Batched:
        def many(self, texts: list[str]) -> list[bool]:
            return [len(text) > 1 for text in texts]

        def __call__(self, text: str) -> bool:
            raise AssertionError("many is there")

    assert scores(Batched(), ["a", "ab"]).tolist() == [0, 1]
    assert scores(lambda text: 0.25, ["a", "ab"]).tolist() == [0.25, 0.25]
    with pytest.raises(ms.MechsteerError, match=r"The judge gave 2.0 for 2 texts. It gives True or False, or a probab"):
        scores(lambda text: len(text), ["a", "ab"])
    with pytest.raises(ms.MechsteerError, match=r"The judge gave nan for 1 texts"):
        scores(lambda text: float("nan"), ["a"])
    Batched.many = lambda self, texts: [True]  # type: ignore[method-assign]
    with pytest.raises(ms.MechsteerError, match=re.escape("The judge gave (1,) for 2 texts")):
        scores(Batched(), ["a", "ab"])


def test_wilson_intervals_are_scipys() -> None:
    counts = np.array([[0, 1, 5], [16, 31, 32]])
    for level in (0.95, 0.8):
        low, high = wilson_interval(counts / 32, 32, level=level)
        for place, count in np.ndenumerate(counts):
            expected = binomtest(int(count), 32).proportion_ci(level, method="wilson")
            assert (low[place], high[place]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "completion_curves got samples=0, temperature=1.0 and level=0.95. Pass at least 1 sample, a"),
        ({"temperature": 0}, "got samples=32, temperature=0 and level=0.95"),
        ({"level": 1.0}, "temperature=1.0 and level=1.0"),
        ({"recipe": "mine"}, "recipe='mine' does not exist. Pass one of 'default', 'published'."),
    ],
)
def test_options_out_of_range_are_refused(
    zoo_models: Callable[..., ms.Model], options: dict[str, Any], message: str
) -> None:
    model = zoo_models("llama")
    with pytest.raises(ms.MechsteerError, match=re.escape(message)):
        completion_curves(model, ["cat"], directions(model, 1), [1.0], vowels, **options)


def test_samples_of_a_prompt_and_their_streams(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("qwen3")
    prompts = model.prompts(PROMPTS)
    options: dict[str, Any] = {
        "max_new_tokens": 5, "interventions": (), "temperature": 1.0, "top_k": None, "top_p": None, "stop_at_eos": True,
        "progress": False, "seed": 4,
    }  # fmt: skip
    done = generate(model, prompts, samples=3, batch_size=2, **options)
    repeated = generate(model, prompts[[0, 0, 0, 1, 1, 1, 2, 2, 2]], batch_size=128, **options)
    assert done.completions == repeated.completions and done.texts == repeated.texts
    with pytest.raises(ms.MechsteerError, match=r"samples=2 of 3 prompts got 5 streams. Pass at least one sa"):
        generate(model, prompts, samples=2, batch_size=2, streams=[1, 2, 3, 4, 5], **options)
    with pytest.raises(ms.MechsteerError, match="samples=0 of 3 prompts got no streams"):
        generate(model, prompts, samples=0, batch_size=2, **options)
