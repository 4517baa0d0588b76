"""Judges by words: the pocket language's labeller, and a lexicon."""

import re
from collections.abc import Sequence

from mechsteer.errors import MechsteerError
from mechsteer.judges.judge import Judge
from mechsteer.pocket.labeller import label
from mechsteer.pocket.lexicon import TOPICS
from mechsteer.pocket.wordings import MOOD_WORDS, MOODS

_PLURAL = re.compile(r"(?:ies|(?<=[cs]h)es|(?<!s)s)$")
NO_JUDGE = (
    "Whether a completion shows the behaviour is not judged, because the prefix names no topic or mood that the pocket "
    'model\'s labeller knows. Give words that show it, for example --words "cat,cats,kitten".'
)


def judge_of(prefix: str, words: Sequence[str] = ()) -> Judge | None:
    """The judge of a prefix: by the words if there are any; else by the pocket language's labeller, where the prefix
    names exactly one of its topics or asks for one of its moods; else None.

    Args:
        prefix: the instruction.
        words: a completion shows the behaviour if it holds one of them as a whole word, whatever its case.
    """
    if words:
        return lexicon_judge(words)
    topics = topics_of(prefix)
    if len(topics) == 1:
        return topic_judge(topics[0])
    moods = [mood for mood, wordings in MOODS.items() if _names(prefix, *wordings.seen, *wordings.held_out)]
    return mood_judge(moods[0]) if len(moods) == 1 and not topics else None


def topics_of(prefix: str) -> list[str]:
    """The topics of the pocket language that an instruction names, or hints at with two words."""
    hinted = label(prefix).topics
    return [
        topic.name
        for topic in TOPICS.values()
        # One word that is not the name, such as "stars", may mean anything.
        if _names(prefix, topic.name, *topic.aliases) or hinted.get(topic.name, 0) >= 2
    ]


def telltale_words(prefix: str) -> tuple[str, ...]:
    """Words with which a text would say what an instruction asks for, to be forbidden where it shall not say so.

    These are the instruction's own words of more than three letters, and every name of a topic of the pocket language
    that it names; without endings of the plural, so that as parts of words they stand for both forms.
    """
    texts = [prefix, *(each for topic in topics_of(prefix) for each in (topic, *TOPICS[topic].aliases))]
    found = (word for text in texts for word in re.findall(r"[^\W\d_]+", text.casefold()) if len(word) > 3)
    return tuple(dict.fromkeys(_PLURAL.sub("", word) for word in found))


def topic_judge(topic: str) -> Judge:
    """Whether a text is about a topic of the pocket language, by its labeller.

    Raises:
        MechsteerError: the labeller knows no such topic.
    """
    if topic not in TOPICS:
        raise MechsteerError(f"The labeller knows no topic {topic!r}. Pass one of {', '.join(TOPICS)}.")
    words = (topic, *sorted(TOPICS[topic].content_words))
    name = f"the pocket language's labeller: at least two words of {topic}, and four in five content words of {topic}"
    return Judge.by_test(name, f"are about {topic}", words, lambda text: label(text).on_topic(topic))


def mood_judge(mood: str) -> Judge:
    """Whether a text has a mood of the pocket language, by its labeller.

    Raises:
        MechsteerError: the labeller knows no such mood.
    """
    if mood not in MOODS:
        raise MechsteerError(f"The labeller knows no mood {mood!r}. Pass one of {', '.join(MOODS)}.")
    markers = MOOD_WORDS.get(mood)
    words = (*markers.openers, *markers.closers) if markers else ()
    phrases = tuple(phrase.strip(",") for phrase in words)
    name = f"the pocket language's labeller: {mood} is the mood with the most markers"
    return Judge.by_test(name, f"have the mood {mood}", phrases, lambda text: label(text).mood == mood)


def lexicon_judge(words: Sequence[str]) -> Judge:
    """Whether a text holds at least one of several words or phrases, as a whole word, whatever its case.

    Raises:
        MechsteerError: there are no words, or they are one string.
    """
    kept = () if isinstance(words, str) else tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not kept:
        raise MechsteerError(f"lexicon_judge got words={words!r}. Pass a list with at least one word.")
    patterns = [_whole(word) for word in kept]
    shown = ", ".join(kept[:4]) + (", ..." if len(kept) > 4 else "")
    return Judge.by_test(
        f"at least one of {len(kept)} words ({shown})" if len(kept) > 1 else f"the word {shown}",
        f"hold one of the words {shown}" if len(kept) > 1 else f"hold the word {shown}",
        kept,
        lambda text: any(pattern.search(text) for pattern in patterns),
    )


def _names(text: str, *phrases: str) -> bool:
    return any(_whole(phrase).search(text) for phrase in phrases)


def _whole(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
