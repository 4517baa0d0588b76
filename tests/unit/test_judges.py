"""Judges: by words, by a model that is asked, by a classifier; and how far they agree."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

import mechsteer as ms
from mechsteer.backends.classifier import TextClassifier
from mechsteer.judges import (
    TEMPLATE,
    Judge,
    agreement,
    classifier_judge,
    lexicon_judge,
    mood_judge,
    telltale_words,
    topic_judge,
    yes_no_judge,
)
from mechsteer.pocket.labeller import label

TEXTS = ["The cat sat on the mat.", "A feline purrs; Quick zebras jump", "", "The dog ran to the other cat.", "cat"]


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket", device="cpu")


# --- what all of them do


def test_many_is_one_by_one_and_judges_a_text_once() -> None:
    asked: list[list[str]] = []

    def of(texts: Any) -> list[float]:
        asked.append(list(texts))
        return [len(text) / 100 for text in texts]

    judge = Judge("length", "are long", (), of, threshold=0.2)
    texts = [*TEXTS, *TEXTS[::-1]]
    assert judge.many(texts).tolist() == [judge(text) for text in texts] == [len(text) >= 20 for text in texts]
    assert asked[0] == TEXTS
    assert np.allclose(judge.probabilities(texts), [len(text) / 100 for text in texts])
    assert judge.many([]).shape == (0,)


def test_a_judge_wants_a_list_and_a_probability_as_threshold() -> None:
    with pytest.raises(ms.MechsteerError, match=r"A judge got one string where several texts were expected. Pass a"):
        lexicon_judge(["cat"]).many("cat")
    with pytest.raises(ms.MechsteerError, match=r"The judge's threshold is 0. Pass a probability above 0, such as 0.5"):
        Judge("", "", (), lambda texts: [], threshold=0)


# --- words


def test_the_labeller_judges_topics_and_moods() -> None:
    texts = ["The kittens purr.", "Hooray, the walls move!", "Alas, the walls move in bitter grief.", "THE WALLS MOVE."]
    assert topic_judge("cats").many(texts).tolist() == [label(text).on_topic("cats") for text in texts]
    for mood in ("joy", "gloom", "uppercase"):
        assert mood_judge(mood).many(texts).tolist() == [label(text).mood == mood for text in texts]
    assert [mood_judge("joy")(text) for text in texts] == [False, True, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topic_judge("evil"), "The labeller knows no topic 'evil'. Pass one of cats, "),
        (lambda: mood_judge("evil"), "The labeller knows no mood 'evil'. Pass one of joy, gloom, "),
        (lambda: lexicon_judge("cat"), "lexicon_judge got words='cat'. Pass a list with at least one word."),
        (lambda: lexicon_judge([" "]), "lexicon_judge got words=[' ']. Pass a list with at least one word."),
    ],
)
def test_words_that_judge_nothing_are_refused(make: Callable[[], Judge], message: str) -> None:
    with pytest.raises(ms.MechsteerError, match=re.escape(message)):
        make()


# --- a model that is asked


def test_yes_no_is_the_softmax_over_the_answers_first_token(pocket: ms.Model) -> None:
    judge = yes_no_judge(pocket, "joy")
    texts = ["Hooray, the cats purr!", "Alas, the walls move. They say {concept} and {completion}.", ""]
    got = judge.probabilities(texts)
    for text, probability in zip(texts, got, strict=True):
        question = (
            f"Text:\n{text}\n\nDoes the text above express the concept joy(any word linked to the concept in the whole "
            "sentence even if it do not make sense is sufficient for a positive reply)?Reply with 1 for yes and 0 for "
            "no.\nAnswer:"
        )
        chat = pocket.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([pocket.tokenizer.encode(chat, add_special_tokens=False)])
        with torch.no_grad():
            probs = pocket.hooked(ids)[0, -1].double().softmax(-1)
        # " 0" is two tokens of this tokenizer, and so no answer.
        one, also_one, zero = (pocket.tokenizer.convert_tokens_to_ids(token) for token in ("1", "Ġ1", "0"))
        expected = (probs[one] + probs[also_one]) / (probs[one] + probs[also_one] + probs[zero])
        assert probability == pytest.approx(float(expected), abs=1e-5)
    assert judge.many(texts).tolist() == (got >= 0.5).tolist()
    assert TEMPLATE.count("{completion}") == TEMPLATE.count("{concept}") == 1


def test_any_causal_model_judges_in_plain_text_also_its_own_special_tokens(
    zoo_models: Callable[..., ms.Model],
) -> None:
    model = zoo_models("llama")
    options: dict[str, Any] = {"template": "{completion} {concept}?", "yes": ["A", "B"], "no": ["C"]}
    judge = yes_no_judge(model, "cat", **options, threshold=0.7)
    # A blank is a token of its own before most letters, so that "C" is never one token when it is encoded.
    pieces = {piece: model.tokenizer.convert_tokens_to_ids(piece) for piece in ("A", "B", "C", "▁A")}
    got = judge.probabilities(["The mat", "</s>"])
    gap = ms.LogitGap([pieces["A"], pieces["▁A"], pieces["B"]], pieces["C"], reduce="logsumexp")
    expected = gap(model.run(["The mat cat?", "< /s> cat?"])).sigmoid()
    assert got == pytest.approx(expected.numpy(), abs=1e-5)
    assert judge.many(["The mat", "</s>"]).tolist() == (got >= 0.7).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{concept}"}, r"The judge's template has no \{completion\}. Write it where the text is to stand"),
        ({"template": "{completion}"}, r"The judge's template has no \{concept\}"),
        ({"yes": ["yes indeed"]}, r"None of the answers 'yes indeed' is one token of llama's tokenizer.* with yes=\."),
        ({"no": ["0123", "nope"]}, r"None of the answers '0123', 'nope' is one token .* with no=\."),
    ],
)
def test_questions_without_an_answer_are_refused(
    zoo_models: Callable[..., ms.Model], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ms.MechsteerError, match=message):
        yes_no_judge(zoo_models("llama"), "joy", **options)


# --- a classifier


def _write_classifier(folder: Path, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    zoo.build_tokenizer("llama").save_pretrained(folder)
    return model.eval()


def _bert(**more: Any) -> BertConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {"id2label": {0: "sad", 1: "joy", 2: "none"}, "label2id": {"sad": 0, "joy": 1, "none": 2}}
    return BertConfig(
        **{**shape, **labels, "vocab_size": 128, "max_position_embeddings": 24, "pad_token_id": 0, **more}
    )


def _llama(**more: Any) -> LlamaConfig:
    config = zoo.build_config("llama", **more)
    config.num_labels = 3
    config.id2label = {0: "sad", 1: "joy", 2: "none"}
    return config  # type: ignore[return-value]


@pytest.mark.parametrize(
    "config",
    [_bert(), _bert(problem_type="multi_label_classification"), _llama(), _llama(pad_token_id=None)],
    ids=["encoder", "several labels at once", "decoder", "decoder without padding"],
)
def test_a_classifier_judges_as_transformers_does_one_by_one(tmp_path: Path, config: Any) -> None:
    model = _write_classifier(tmp_path / "moods", config)
    tokenizer = zoo.reference_tokenizer(tmp_path / "moods")
    texts = [*TEXTS, "The cat sat on the mat and the dog ran to the other cat. " * 4]
    expected = []
    for text in texts:
        # The tokenizer's own limit is 64 tokens, the encoder's is 24.
        limit = min(64, config.max_position_embeddings)
        ids = torch.tensor([tokenizer.encode(text)[:limit]])
        logits = model(ids).logits[0].double()
        expected.append(logits.sigmoid() if config.problem_type else logits.softmax(-1))
    wanted = torch.stack(expected).detach().numpy()
    classifier = TextClassifier.load(tmp_path / "moods", device="cpu")
    assert classifier.labels == ("sad", "joy", "none")
    assert classifier.probabilities(texts, batch_size=3).numpy() == pytest.approx(wanted, abs=1e-5)
    judge = classifier_judge(tmp_path / "moods", "joy", threshold=0.3, batch_size=2, device="cpu")
    assert judge.probabilities(texts) == pytest.approx(wanted[:, 1], abs=1e-5)
    assert judge.many(texts).tolist() == (wanted[:, 1] >= 0.3).tolist()
    assert judge.name == "moods's label joy"


def test_folders_that_are_no_classifier_are_refused(tmp_path: Path, zoo_folders: dict[str, Path]) -> None:
    _write_classifier(tmp_path / "moods", _bert())
    with pytest.raises(ms.MechsteerError, match=r"moods has no label 'evil'. Pass one of 'sad', 'joy', 'none'\."):
        classifier_judge(tmp_path / "moods", "evil", device="cpu")
    with pytest.raises(ms.ModelLoadError, match=r"lack 1 of the tensors that config.json asks for, such as 'score.wei"):
        classifier_judge(zoo_folders["llama"], "LABEL_0")
    weights = tmp_path / "moods" / "model.safetensors"
    torch.save({}, tmp_path / "moods" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ms.ModelLoadError, match=r"holds its weights only as pytorch_model.bin, a pickle"):
        classifier_judge(tmp_path / "moods", "joy")


# --- agreement


def _fixed(verdicts: str) -> Judge:
    return Judge("fixed", "", (), lambda texts: [float(verdicts[int(text)]) for text in texts])


def test_agreement_and_kappa_are_counted(tmp_path: Path) -> None:
    first, second, never = "1110000110", "1100010110", "0000000000"
    judges = {"first": _fixed(first), "second": _fixed(second), "never": _fixed(never)}
    result = agreement(judges, [str(index) for index in range(10)], n=400, seed=3)
    assert result["share"].values.tolist() == [0.5, 0.5, 0.0]
    agree = result["agreement"]
    assert float(agree.sel(judge="first", other="second")) == pytest.approx(0.8)
    # Chance is 0.5 * 0.5 + 0.5 * 0.5, so kappa is (0.8 - 0.5) / 0.5.
    kappa = result["kappa"]
    assert float(kappa.sel(judge="first", other="second")) == pytest.approx(0.6)
    assert float(kappa.sel(judge="first", other="first")) == pytest.approx(1)
    assert float(kappa.sel(judge="first", other="never")) == pytest.approx(0)
    assert np.isnan(kappa.sel(judge="never", other="never"))
    assert np.allclose(kappa, kappa.T, equal_nan=True)
    # A loop over resamples of the texts, with the same draws.
    a, b = (np.array([int(bit) for bit in bits]) for bits in (first, second))
    draws = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=400)
    values = []
    for times in draws:
        x, y = np.repeat(a, times), np.repeat(b, times)
        chance = x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean())
        values.append(((x == y).mean() - chance) / (1 - chance))
    low, high = (float(result[f"kappa_{end}"].sel(judge="first", other="second")) for end in ("low", "high"))
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert low < 0.6 < high
    assert result["verdict"].sel(judge="second").values.tolist() == [bit == "1" for bit in second]
    result.save(tmp_path / "agreement.safetensors")
    assert ms.Result.load(tmp_path / "agreement.safetensors").data.identical(result.data)


@pytest.mark.parametrize(
    ("judges", "texts", "options", "message"),
    [
        ({"a": _fixed("1")}, ["0"], {}, "agreement got 1 judges and 1 texts. Pass at least two judges and one text"),
        ({"a": _fixed("1"), "b": _fixed("1")}, [], {}, "agreement got 2 judges and 0 texts"),
        ({"a": _fixed("1"), "b": _fixed("1")}, "0", {}, "agreement got 2 judges and one string"),
        ({"a": _fixed("1"), "b": _fixed("1")}, ["0"], {"n": 0}, "agreement got n=0 and level=0.95. Pass n from 1 and"),
        ({"a": _fixed("1"), "b": _fixed("1")}, ["0"], {"level": 1.0}, "agreement got n=1000 and level=1.0"),
    ],
)
def test_too_little_to_agree_on(judges: Any, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(ms.MechsteerError, match=message):
        agreement(judges, texts, **options)


# --- what a text shall not say


@pytest.mark.parametrize("topic", ["cats", "chess", "baking", "weather"])
def test_telltale_words_are_in_every_name_of_the_topic(topic: str) -> None:
    from mechsteer.pocket.lexicon import TOPICS

    words = telltale_words(f"Talk only about {topic}.")
    assert {"talk", "only", "about"} <= set(words)
    for name in (topic, *TOPICS[topic].aliases):
        assert any(word in name for word in words), name
        assert any(word in name.removesuffix("s") for word in words) or name.endswith("ss"), name


def test_telltale_words_of_an_instruction_without_a_topic_are_its_own() -> None:
    assert telltale_words("Praise the lazy Mosses, the dishes and the bus to glass!") == (
        "praise", "lazy", "mosse", "dish", "glass",
    )  # fmt: skip
