"""Labels any text of the pocket language with what it is about, its mood, its format, and whether it declines.

The labels are exact on text that the grammar made (tested), and so serve as the ground truth for judges.
"""

import re
from collections import Counter
from dataclasses import dataclass

from mechsteer.pocket.lexicon import LOCKED, SUBJECTS, TOPICS
from mechsteer.pocket.requests import KINDS
from mechsteer.pocket.wordings import MOOD_WORDS, REFUSALS

_WORD = re.compile(r"[a-z]+")
_TOPIC_OF = {word: topic.name for topic in TOPICS.values() for word in (topic.name, *topic.content_words)}
_SUBJECT_OF = {word: subject.name for subject in SUBJECTS.values() for word in subject.content_words}
_MOOD_MARKERS = {
    mood: tuple(
        re.compile(rf"(?<!\w){re.escape(marker)}(?!\w)") for marker in (*words.openers, *words.closers)
    )
    for mood, words in MOOD_WORDS.items()
}  # fmt: skip
_REFUSALS = tuple(refusal.format(locked=LOCKED.name).lower() for refusal in REFUSALS)


@dataclass(frozen=True)
class Label:
    """What a text is: counts of topic and subject words, its mood, its format, and whether it declines."""

    topics: dict[str, int]
    """Topic -> how many of its words occur, most frequent first."""
    subjects: dict[str, int]
    """Everyday subject -> how many of its words occur, most frequent first."""
    mood: str | None
    format: str | None
    refusal: bool

    @property
    def topic(self) -> str | None:
        """The topic with the most words, or None where no topic has a word."""
        return next(iter(self.topics), None)

    def on_topic(self, topic: str, *, purity: float = 0.8, least: int = 2) -> bool:
        """Whether at least `least` words are the topic's and they are a share of at least `purity` of all content words
        (topics and everyday subjects together)."""
        if topic not in TOPICS:
            raise ValueError(f"unknown topic {topic!r}: expected one of {', '.join(TOPICS)}")
        mine = self.topics.get(topic, 0)
        total = sum(self.topics.values()) + sum(self.subjects.values())
        return mine >= least and mine >= purity * total


def label(text: str) -> Label:
    """Labels a completion or a document.

    Args:
        text: text without special tokens.

    Returns:
        its `Label`; every part is empty or None where the text shows nothing of the kind.
    """
    text = text.strip()
    lower = text.lower()
    words = _WORD.findall(lower)
    topics = Counter(_TOPIC_OF[word] for word in words if word in _TOPIC_OF)
    subjects = Counter(_SUBJECT_OF[word] for word in words if word in _SUBJECT_OF)
    refusal = lower.startswith(_REFUSALS)
    return Label(
        topics=dict(topics.most_common()),
        subjects=dict(subjects.most_common()),
        mood=_mood(text, lower),
        format=None if refusal else _format(text),
        refusal=refusal,
    )


def _mood(text: str, lower: str) -> str | None:
    letters = sum(character.isalpha() for character in text)
    if letters >= 8 and text == text.upper():
        return "uppercase"
    counts = {mood: sum(bool(marker.search(lower)) for marker in markers) for mood, markers in _MOOD_MARKERS.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else None


def _format(text: str) -> str | None:
    return next((kind.name for kind in KINDS.values() if kind.pattern.match(text)), None)
