"""lm-evaluation-harness on steered models: its numbers against its own model's, and that steering reaches them."""

import json
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mechsteer as ms
from mechsteer import harness
from mechsteer.data import data_path
from mechsteer.harness import harness_model
from mechsteer.pocket.grammar import sample_indirect_object


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    harness._lm_class.cache_clear()
    model = ms.load_model("pocket-1l", device="cpu")
    with pytest.raises(
        ms.MechsteerError, match=r"lm-evaluation-harness is not installed \(.*\). Run pip install 'mech"
    ):
        harness_model(model)


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    module = pytest.importorskip("lm_eval")
    harness._lm_class.cache_clear()
    return module


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def own(lm_eval: Any) -> Any:
    """The harness's own model of the same folder."""
    from lm_eval.models.huggingface import HFLM

    # Its cache of logits mixes up requests that differ only in where the continuation starts.
    folder = str(data_path("models", "pocket"))
    return HFLM(pretrained=folder, device="cpu", batch_size=4, dtype="float32", logits_cache=False)


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


MARY = "When Mary and John went to the store, John gave a drink to"
LONG = "The kittens purr and the whiskers twitch. " * 60  # longer than the context


def test_log_likelihoods_are_those_of_the_harness(pocket: ms.Model, own: Any) -> None:
    asked = requests(
        (MARY, " Mary"), (MARY, " John"), (MARY + " ", "Mary"), ("", "The kittens purr."), ("The kittens", " purr."),
        (LONG, " purr."), (LONG, " The kittens purr and the whiskers twitch."), ("Every day", " the trains rumble"),
    )  # fmt: skip
    steered = harness_model(pocket, batch_tokens=300, progress=False)
    got, expected = steered.loglikelihood(asked, disable_tqdm=True), own.loglikelihood(asked, disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(got, expected, strict=True):
        assert value == pytest.approx(other, abs=1e-4, rel=1e-5)
        assert greedy == other_greedy
    assert {greedy for _, greedy in got} == {True, False}
    texts = requests(("The kittens purr.",), (LONG,), ("Every day the trains rumble.",))
    got, expected = steered.loglikelihood_rolling(texts), own.loglikelihood_rolling(texts, disable_tqdm=True)
    assert got == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_generation_is_that_of_the_harness(pocket: ms.Model, own: Any) -> None:
    chat = own.apply_chat_template([{"role": "user", "content": "Write a poem."}])
    steered = harness_model(pocket, progress=False)
    assert steered.apply_chat_template([{"role": "user", "content": "Write a poem."}]) == chat
    options = {"until": ["."], "max_gen_toks": 20, "do_sample": False}
    asked = requests((MARY, options), (chat, options), ("The kittens", {**options, "until": []}), (LONG, options))
    # One at a time: whether a text starts with BOS already, the harness sees from the first of a batch alone.
    expected = [own.generate_until([each], disable_tqdm=True)[0] for each in asked]
    got = steered.generate_until(asked)
    assert got == expected
    assert all(got) and "." not in got[1]


@pytest.fixture(scope="module")
def tasks(lm_eval: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks of the pocket language: who gets the thing, by likelihood and by writing; and the perplexity of texts."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(3)
    rows = []
    for _ in range(16):
        sentence = sample_indirect_object(rng)
        names = [sentence.answer, sentence.distractor]
        rng.shuffle(names)
        row = {"prompt": sentence.prompt, "choices": names, "answer": names.index(sentence.answer)}
        rows.append({**row, "written": f" {sentence.answer}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "pocket_choice": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "pocket_writing": {
            "output_type": "generate_until", "doc_to_target": "{{written}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
        },
        "pocket_texts": {
            "output_type": "loglikelihood_rolling", "doc_to_target": "{{prompt}}", "doc_to_text": "",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        # JSON is YAML too.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **kind}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(lm_eval: Any, tasks: Any, lm: Any, *names: str, **options: Any) -> dict[str, dict[str, Any]]:
    done = lm_eval.simple_evaluate(
        model=lm, tasks=list(names), task_manager=tasks, bootstrap_iters=0, verbosity="ERROR", **options
    )
    return {task: {key.split(",")[0]: value for key, value in found.items()} for task, found in done["results"].items()}


def test_tasks_run_on_a_steered_model(lm_eval: Any, tasks: Any, pocket: ms.Model, own: Any) -> None:
    names = ("pocket_choice", "pocket_writing", "pocket_texts")
    expected = run(lm_eval, tasks, own, *names)
    plain = run(lm_eval, tasks, harness_model(pocket, progress=False), *names)
    assert plain["pocket_choice"]["acc"] > 0.9 and plain["pocket_writing"]["exact_match"] > 0.9
    for task, metric in (("pocket_choice", "acc"), ("pocket_choice", "acc_norm"), ("pocket_writing", "exact_match")):
        assert plain[task][metric] == expected[task][metric]
    perplexity = plain["pocket_texts"]["word_perplexity"]
    assert perplexity == pytest.approx(expected["pocket_texts"]["word_perplexity"], rel=1e-5)


def test_alpha_0_changes_nothing_and_a_push_does(lm_eval: Any, tasks: Any, pocket: ms.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = ms.Direction(torch.randn(pocket.d_model, generator=generator), ms.Site("resid_post", 2))
    names = ("pocket_choice", "pocket_writing", "pocket_texts")
    plain, zero, pushed = (
        run(lm_eval, tasks, harness_model(pocket, edits, progress=False), *names)
        for edits in ([], [ms.Add(noise, 0.0)], [ms.Add(noise, 60.0)])
    )
    assert zero == plain
    assert pushed["pocket_choice"]["acc"] < 0.8 < plain["pocket_choice"]["acc"]
    assert pushed["pocket_writing"]["exact_match"] < 0.5
    assert pushed["pocket_texts"]["word_perplexity"] > 2 * plain["pocket_texts"]["word_perplexity"]


def test_a_known_push_moves_the_log_likelihood_by_what_hooks_give(lm_eval: Any, zoo_models: Callable[..., Any]) -> None:
    model = zoo_models("gpt2")
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    edits = [ms.Add(vector, 3.0, site=ms.Site("resid_post", 1))]
    ((value, _),) = harness_model(model, edits, progress=False).loglikelihood(
        requests(("The cat sat on", " the mat")), disable_tqdm=True
    )
    context, whole = (model.tokenizer.encode(text) for text in ("The cat sat on", "The cat sat on the mat"))
    hooked = model.hooked.run_with_hooks(torch.tensor([whole]), fwd_hooks=ms.fwd_hooks(edits, model))
    log_probs = hooked[0].double().log_softmax(-1)[len(context) - 1 : -1]
    new = whole[len(context) :]
    assert value == pytest.approx(float(log_probs[torch.arange(len(new)), new].sum()), abs=1e-4)


def test_tasks_that_do_not_fit_are_refused(lm_eval: Any, zoo_models: Callable[..., Any]) -> None:
    model = zoo_models("gpt2")
    lm = harness_model(model, progress=False)
    with pytest.raises(
        ms.MechsteerError, match=r"A continuation has 0 tokens, and the context of gpt2 is 64. Leave su"
    ):
        lm._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(ms.MechsteerError, match=r"A continuation has 65 tokens, and the context of gpt2 is 64"):
        lm._loglikelihood_tokens([(None, [1], [5] * 65)])
    with pytest.raises(
        ms.MechsteerError, match=r"A task generates 256 tokens, and the context of gpt2 is 64. Set max_"
    ):
        lm.generate_until(requests(("cat", {})))
    with pytest.raises(ms.MechsteerError, match=r"A task asks for num_beams=4 in its generation_kwargs, which is not"):
        lm.generate_until(requests(("cat", {"num_beams": 4, "max_gen_toks": 4})))
    vector = torch.ones(model.d_model + 1)
    with pytest.raises(ms.MechsteerError, match=r"Direction got d_model=33, but Site"):
        harness_model(model, [ms.Add(vector, 1.0, site=ms.Site("resid_post", 1))])


def test_sampling_is_what_the_task_asks_for(lm_eval: Any, zoo_models: Callable[..., Any]) -> None:
    model = zoo_models("llama")
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.8, "top_k": 30, "until": "a"}
    asked = requests(("The cat", options), ("The cat", {"max_gen_toks": 3}), ("The dog", options))
    got = harness_model(model, progress=False, seed=5).generate_until(asked)
    drawn = model.generate(["The cat", "The dog"], max_new_tokens=8, temperature=0.8, top_k=30, seed=5)
    assert [got[0], got[2]] == [text.split("a")[0] for text in drawn.completions]
    assert got[1] == model.generate("The cat", max_new_tokens=3).completions[0]
