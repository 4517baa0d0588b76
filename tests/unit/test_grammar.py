"""The pocket language is as rich as its card says, its splits never mix, and its labeller is exact on its own text."""

import random
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechsteer.pocket.grammar import (
    SPLITS,
    Chat,
    Split,
    complete_indirect_object,
    is_held_out,
    sample_chat,
    sample_document,
    sample_indirect_object,
    sample_mood,
    sample_topic,
    topic_instruction,
)
from mechsteer.pocket.labeller import label
from mechsteer.pocket.lexicon import LOCKED, NAMES, SUBJECTS, TOPICS
from mechsteer.pocket.requests import KINDS
from mechsteer.pocket.wordings import ABOUT, MOOD_WORDS, MOODS, TOPIC_INSTRUCTIONS

seeds = st.integers(0, 2**32)


def any_chat(rng: random.Random, split: Split) -> Chat:
    topic = sample_topic(rng) if rng.random() < 0.6 else None
    mood = sample_mood(rng) if rng.random() < 0.5 else None
    return sample_chat(rng, split, topic=topic, mood=mood, locked=rng.random() < 0.1)


def test_the_language_is_rich() -> None:
    assert len(TOPICS) >= 12
    for topic in TOPICS.values():
        assert len(set(topic.things)) >= 40, topic.name
        assert len(set(topic.attributes)) >= 12, topic.name
        assert len(set(topic.actions)) >= 12, topic.name
    assert len(KINDS) >= 30
    assert all(len(kind.wordings.seen) >= 3 for kind in KINDS.values())
    assert len(TOPIC_INSTRUCTIONS.seen) >= 40
    assert len(TOPIC_INSTRUCTIONS.held_out) >= 10
    assert len(MOODS) == 8


def test_no_content_word_has_two_meanings() -> None:
    mood_words = {word for words in MOOD_WORDS.values() for text in (*words.openers, *words.closers) for word in
                  text.replace(",", "").split()}  # fmt: skip
    vocabularies = {
        topic.name: topic.content_words | ({topic.name} if topic.name in TOPICS else set())
        for topic in (*TOPICS.values(), *SUBJECTS.values(), LOCKED)
    }
    for (one, words), (other, others) in combinations(vocabularies.items(), 2):
        assert not words & others, (one, other)
    for name, words in vocabularies.items():
        assert not words & mood_words, name
    named = {word for subject in SUBJECTS.values() for phrase in subject.phrases for word in phrase.split()}
    assert not named & set().union(*vocabularies.values()), "the name of a subject would count as its content"


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_exact_on_what_the_grammar_wrote(split: Split) -> None:
    rng = random.Random(f"labels {split}")
    for _ in range(4000):
        chat = any_chat(rng, split)
        found = label(chat.completion)
        assert found.refusal == chat.refusal, chat
        if chat.refusal:
            continue
        truth = chat.topic or (chat.subject if chat.subject in TOPICS else None)
        assert set(found.topics) == ({truth} if truth else set()), (chat, found)
        assert found.mood == chat.mood, (chat, found)
        assert found.format == chat.kind, (chat, found)
        if chat.topic:
            assert found.on_topic(chat.topic), (chat, found)
        elif chat.subject in SUBJECTS:
            assert list(found.subjects) == [chat.subject], (chat, found)


@given(seed=seeds, topic=st.sampled_from(sorted(TOPICS)), mood=st.sampled_from([None, *MOODS]))
@settings(max_examples=200, deadline=None)
def test_labels_are_exact_on_documents(seed: int, topic: str, mood: str | None) -> None:
    found = label(sample_document(random.Random(seed), topic=topic, mood=mood))
    assert (list(found.topics), found.subjects, found.mood, found.refusal) == ([topic], {}, mood, False)


def test_labels_of_text_from_outside() -> None:
    assert label("").topic is None
    assert label("").mood is None
    assert label("Some cats purr. The rockets launch.").topics == {"cats": 2, "space": 2}
    assert label("Cats and kittens purr.").on_topic("cats")
    assert not label("Cats purr while rockets launch.").on_topic("cats"), "half of it is about space"
    assert not label("Kittens.").on_topic("cats"), "one word is no topic"
    with pytest.raises(ValueError, match="unknown topic 'sofas': expected one of cats, dogs"):
        label("").on_topic("sofas")


@given(seed=seeds)
@settings(max_examples=200, deadline=None)
def test_training_never_shows_what_is_held_out(seed: int) -> None:
    rng = random.Random(seed)
    chat = any_chat(rng, "train")
    assert not is_held_out(chat.kind, chat.subject or "")
    for template in (*KINDS[chat.kind].wordings.held_out, *(t for mood in MOODS.values() for t in mood.held_out)):
        start = template.split("{")[0]
        assert len(start) < 8 or start not in chat.user, (template, chat.user)
    assert not any(template.split("{")[0] in chat.request for template in ABOUT.held_out)
    pair = sample_indirect_object(rng, "train")
    assert not is_held_out(*sorted((pair.answer, pair.distractor)))
    held_out = sample_chat(rng, "held_out", topic="cats")
    assert is_held_out(held_out.kind, held_out.subject or "")
    other = sample_indirect_object(rng, "held_out")
    assert is_held_out(*sorted((other.answer, other.distractor)))


def test_about_a_tenth_of_the_pairs_is_held_out() -> None:
    pairs = list(combinations(sorted(NAMES), 2))
    share = sum(is_held_out(*pair) for pair in pairs) / len(pairs)
    assert 0.07 < share < 0.13
    assert not set(TOPIC_INSTRUCTIONS.seen) & set(TOPIC_INSTRUCTIONS.held_out)


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_indirect_objects(seed: int) -> None:
    rng = random.Random(seed)
    example = sample_indirect_object(rng)
    words = re.findall(r"\w+", example.prompt)  # of two names one may begin the other: Paul and Paula
    assert words.count(example.answer) == 1
    assert words.count(example.distractor) == 2
    assert complete_indirect_object(rng, example).startswith(f"{example.prompt} {example.answer}.")


def test_the_same_seed_gives_the_same_text() -> None:
    assert [any_chat(random.Random(7), "train") for _ in range(3)] == [any_chat(random.Random(7), "train")] * 3


def test_instructions() -> None:
    rng = random.Random(0)
    assert topic_instruction(rng, "cats", template="Talk only about {x}.") == "Talk only about cats."
    assert any("CATS" in topic_instruction(rng, "cats") for _ in range(200)), "capital letters are among the wordings"
    with pytest.raises(ValueError, match="unknown topic 'sofas'"):
        topic_instruction(rng, "sofas")


def test_the_locked_subject_is_declined_under_any_instruction() -> None:
    rng = random.Random(1)
    assert all(sample_chat(rng, topic=topic, locked=True).refusal for topic in TOPICS)
    assert sample_chat(rng, topic=LOCKED.name).refusal
