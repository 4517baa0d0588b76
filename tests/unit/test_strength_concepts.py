"""Concepts: what ships, what a model writes, and which tokens belong to one."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import model as pocket

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError
from mechsteer.pocket import concepts as making
from mechsteer.pocket.labeller import label
from mechsteer.pocket.wordings import MOODS
from mechsteer.strength.concepts import PUBLISHED_TEMPLATE, Concept, negatives_from, positives_from, shipped


def test_the_shipped_file_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "pocket.json"
    subprocess.run([sys.executable, "-m", "mechsteer.pocket.concepts", "--out", str(out)], check=True)
    assert out.read_bytes() == data_path("concepts", "pocket.json").read_bytes()
    card = data_path("concepts", "README.md").read_text()
    assert "python -m mechsteer.pocket.concepts --out data/concepts/pocket.json" in card


def test_eight_concepts_whose_texts_show_them() -> None:
    found = shipped()
    assert list(found) == list(MOODS) and len(found) == 8
    for name, concept in found.items():
        assert len(concept.positives) == len(concept.negatives) == making.N_TEXTS
        shown = Counter(label(text).mood for text in concept.positives)
        assert shown[name] >= 0.95 * len(concept.positives), shown
        assert all(label(text).mood is None for text in concept.negatives)


def test_contrastive_negatives_are_the_opposite_moods_texts() -> None:
    random, contrastive = shipped(), shipped(negatives="contrastive")
    assert contrastive["joy"].negatives == random["gloom"].positives
    assert contrastive["uppercase"].negatives == random["uppercase"].negatives
    for name, opposite in making.OPPOSITES.items():
        assert not opposite or contrastive[name].negatives == random[opposite].positives
    with pytest.raises(MechsteerError, match=r"negatives='other' does not exist\. Pass 'random' or 'contrastive'"):
        shipped(negatives="other")


def test_the_same_topics_in_every_group() -> None:
    held = json.loads(data_path("concepts", "pocket.json").read_text())
    groups = [[label(text).topic for text in each["positives"]] for each in held["concepts"]]
    groups.append([label(text).topic for text in held["plain"]])
    assert all(group == groups[0] for group in groups) and len(set(groups[0])) > 8


def test_tokens_that_texts_show() -> None:
    model = pocket()
    concepts = shipped()
    joy = concepts["joy"].token_ids(model, against=concepts.values())
    texts = [model.tokenizer.decode([token]) for token in joy]
    assert {" delight", " laughter", " smile", " glee"} <= set(texts) and "," not in texts and len(joy) <= 32
    assert len(concepts["joy"].token_ids(model, k=3)) == 3
    # Without the other concepts among the negatives, a comma (moods put some before a sentence) counts as joyful.
    assert "," in [model.tokenizer.decode([token]) for token in concepts["joy"].token_ids(model)]
    shared = set(joy) & set(concepts["gloom"].token_ids(model, against=concepts.values()))
    assert not shared


def test_the_order_is_that_of_the_log_odds_ratio() -> None:
    model = pocket()
    positives, negatives = (
        ["cats purr cats purr cats cats", "cats cats and dogs"],
        ["dogs bark and dogs bark and dogs"] * 3,
    )
    counts = [
        Counter(token for text in texts for token in model.tokenizer.encode(text, add_special_tokens=False))
        for texts in (positives, negatives)
    ]
    size = len(counts[0] | counts[1])

    def z(token: int) -> float:
        odds = []
        for count in counts:
            n, total = count[token] + 0.5, sum(count.values()) + 0.5 * size
            odds.append(n / (total - n))
        return math.log(odds[0] / odds[1]) / math.sqrt(1 / (counts[0][token] + 0.5) + 1 / (counts[1][token] + 0.5))

    expected = sorted((token for token in counts[0] if z(token) >= 2), key=lambda token: (-z(token), token))
    assert expected and Concept("cats", tuple(positives), tuple(negatives)).token_ids(model) == expected


def test_given_tokens() -> None:
    model = pocket()
    encode = model.tokenizer.encode
    concept = Concept("x", ("a",), ("b",), tokens=(" cats", "cats", 7, "no such single token"))
    one = encode(" cats", add_special_tokens=False)
    assert len(one) == 1 and set(one) | {7} <= set(concept.token_ids(model))
    assert len(set(concept.token_ids(model))) == len(concept.token_ids(model))
    with pytest.raises(MechsteerError, match=r"none of its words .* is one token of pocket-1l"):
        Concept("x", ("a",), ("b",), tokens=("several words here",)).token_ids(model)
    with pytest.raises(MechsteerError, match="no token is typical of its 1 positives"):
        Concept("x", ("the same",), ("the same",)).token_ids(model)


def test_concepts_need_texts() -> None:
    for positives, negatives, group in (
        ((), ("a",), "positives"),
        (("a",), "text", "negatives"),
        (("",), ("a",), "pos"),
    ):
        with pytest.raises(MechsteerError, match=rf"Concept 'x' got {group}.*Pass texts, none of them empty"):
            Concept("x", positives, negatives)
    assert Concept("x", ["a"], ["b"]).positives == ("a",)


def test_texts_that_an_instruct_model_writes() -> None:
    model = pocket("pocket")
    ask = "Write a poem. {concept}"
    texts = positives_from(model, "Sound joyful.", 3, template=ask, max_new_tokens=24, seed=1)
    assert len(texts) == 3 and sum(label(text).mood == "joy" for text in texts) >= 2
    assert texts == positives_from(model, "Sound joyful.", 3, template=ask, max_new_tokens=24, seed=1)
    assert texts != positives_from(model, "Sound joyful.", 3, template=ask, max_new_tokens=24, seed=2)
    plain = positives_from(model, "joy", 1, max_new_tokens=4, system=None)
    assert plain and "{concept}" in PUBLISHED_TEMPLATE
    with pytest.raises(MechsteerError, match="has no place for the concept"):
        positives_from(model, "joy", 1, template="Be glad.")
    with pytest.raises(MechsteerError, match="n=0 texts were asked for"):
        positives_from(model, "joy", 0)


def test_texts_that_a_model_writes_after_bos(zoo_models: Callable[..., ms.Model]) -> None:
    texts = negatives_from(pocket(), 3, max_new_tokens=20)
    assert len(set(texts)) == 3 and texts == negatives_from(pocket(), 3, max_new_tokens=20)
    qwen = zoo_models("qwen3")  # no BOS: it starts from EOS
    assert qwen.tokenizer.bos_token_id is None and negatives_from(qwen, 2, max_new_tokens=5)
    long = negatives_from(qwen, 1, max_new_tokens=10_000)
    assert len(qwen.tokenizer.encode(long[0])) <= qwen.n_ctx + 5
    with pytest.raises(MechsteerError, match="n=-1 texts were asked for"):
        negatives_from(qwen, -1)


def test_a_tokenizer_without_any_start(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("qwen3")
    bare = ms.Model(model.hooked, tokenizer=_without_eos(model), name="bare")
    with pytest.raises(MechsteerError, match="The tokenizer of bare has neither a BOS nor an EOS token"):
        negatives_from(bare, 1)


def _without_eos(model: ms.Model) -> object:
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.eos_token = None
    return tokenizer
