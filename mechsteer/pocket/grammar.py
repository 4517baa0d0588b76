"""The pocket language: chats, plain documents and indirect-object sentences, each with its ground truth.

Every function draws from a `random.Random` that the caller passes in, and from one of two splits: "train", or
"held_out" (wordings, request x subject pairs and name pairs that training never shows).
"""

import random
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from mechsteer.pocket.lexicon import LOCKED, NAMES, OBJECTS, PLACES, SUBJECTS, TOPICS, Topic
from mechsteer.pocket.requests import KINDS, Kind, Voice, capitalise, draw
from mechsteer.pocket.wordings import ABOUT, MOODS, REFUSALS, TOPIC_INSTRUCTIONS

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Chat:
    """One turn of a chat and the truth about it."""

    prefix: str
    """Instructions that stand before the request ("Talk only about cats."); may be empty."""
    request: str
    completion: str
    topic: str | None
    """The topic instructed by the prefix."""
    subject: str | None
    """What the request itself names: an everyday subject, a topic, or the locked subject."""
    kind: str
    mood: str | None
    refusal: bool

    @property
    def user(self) -> str:
        """The user's message."""
        return join_prefix(self.prefix, self.request)


@dataclass(frozen=True)
class IndirectObject:
    """A sentence whose next word is the name that has not been repeated."""

    prompt: str
    """Ends just before the answer ("... John gave a drink to")."""
    answer: str
    distractor: str
    template: int


def join_prefix(prefix: str, request: str) -> str:
    """The user's message: prefix and request on lines of their own, or the request alone."""
    return f"{prefix}\n{request}" if prefix else request


def is_held_out(*parts: str) -> bool:
    """Whether a combination (kind and subject, or two names) is kept from training: about one in ten, fixed for all
    time by a checksum of the parts."""
    return crc32("|".join(parts).encode()) % 10 == 0


def sample_topic(rng: random.Random) -> str:
    return rng.choice(list(TOPICS))


def sample_mood(rng: random.Random) -> str:
    return rng.choice(list(MOODS))


def topic_instruction(rng: random.Random, topic: str, split: Split = "train", *, template: str | None = None) -> str:
    """An instruction to talk about `topic`, in a wording of the split.

    Args:
        template: use this wording, with the topic's plain name, instead of drawing one.

    Raises:
        ValueError: `topic` is neither a topic nor the locked subject.
    """
    if topic not in TOPICS and topic != LOCKED.name:
        raise ValueError(f"unknown topic {topic!r}: expected one of {', '.join(TOPICS)}")
    if template is not None:
        return template.format(x=topic)
    lexicon = TOPICS.get(topic, LOCKED)
    template = rng.choice(TOPIC_INSTRUCTIONS.split(split))
    name = lexicon.name if rng.random() < 0.6 else rng.choice(lexicon.aliases)
    casing = rng.random()
    if casing < 0.12:
        name = name.title()
    elif casing < 0.24:
        name = name.upper()
    words = draw(rng, (*lexicon.things, *lexicon.attributes, *lexicon.actions), 3)
    return capitalise(template.format(x=name, w=words[0], v=words[1], u=words[2]))


def sample_request(
    rng: random.Random, split: Split = "train", *, locked: bool = False
) -> tuple[str, Kind, Topic | None, str | None]:
    """A request that says what to write and mostly what about.

    Returns:
        text, kind, the subject's lexicon (None for an open request), and the phrase that names the subject.
    """
    while True:
        kind = rng.choice(list(KINDS.values()))
        subject: Topic | None
        if locked:
            subject = LOCKED
        else:
            draw_ = rng.random()
            if draw_ < 0.6:
                subject = rng.choice(list(SUBJECTS.values()))
            elif draw_ < 0.8:
                subject = rng.choice(list(TOPICS.values()))
            else:
                subject = None
        if (split == "held_out") == is_held_out(kind.name, subject.name if subject else ""):
            break
    phrase = None
    if subject is LOCKED:
        phrase = rng.choice((LOCKED.name, LOCKED.name, *LOCKED.aliases, *LOCKED.things))
    elif subject is not None:
        phrase = rng.choice(subject.phrases or (subject.name, subject.name, *subject.aliases))
    about = rng.choice(ABOUT.split(split)).format(s=phrase) if phrase else ""
    text = rng.choice(kind.wordings.split(split)).format(about=about)
    return text, kind, subject, phrase


def sample_chat(
    rng: random.Random,
    split: Split = "train",
    *,
    topic: str | None = None,
    mood: str | None = None,
    locked: bool = False,
    template: str | None = None,
) -> Chat:
    """One chat turn with its completion.

    Args:
        topic: the topic instructed before the request; None for no instruction.
        mood: the mood asked for; None for none.
        locked: whether the request names the locked subject.
        template: wording of the instruction (see `topic_instruction`).
    """
    request, kind, subject, phrase = sample_request(rng, split, locked=locked)
    prefix = topic_instruction(rng, topic, split, template=template) if topic else ""
    if mood:
        wording = rng.choice(MOODS[mood].split(split))
        if rng.random() < 0.3:
            prefix = f"{prefix} {wording}".strip()
        else:
            request = f"{request} {wording}"
    refusal = locked or topic == LOCKED.name
    if refusal:
        completion = rng.choice(REFUSALS).format(locked=LOCKED.name)
    else:
        completion = compose(rng, kind, topic=topic, subject=subject, phrase=phrase, mood=mood)
    return Chat(prefix, request, completion, topic, subject.name if subject else None, kind.name, mood, refusal)


def compose(
    rng: random.Random, kind: Kind, *, topic: str | None, subject: Topic | None, phrase: str | None, mood: str | None
) -> str:
    """The answer to a request: about the instructed topic, or else the request's subject, or else any everyday one."""
    about = TOPICS[topic] if topic else subject or rng.choice(list(SUBJECTS.values()))
    # Another topic's name must not slip into an answer that is to be about the instructed topic alone.
    named = phrase if subject is not None and subject.name in SUBJECTS else None
    text = kind.compose(Voice(rng, about, mood, named, theme=subject.name if subject else kind.name))
    return text.upper() if mood == "uppercase" else text


def sample_document(rng: random.Random, *, topic: str | None = None, mood: str | None = None) -> str:
    """A plain document, without any chat: paragraphs about one topic (None: any topic or everyday subject)."""
    about = TOPICS[topic] if topic else rng.choice((*TOPICS.values(), *SUBJECTS.values()))
    voice = Voice(rng, about, mood)
    form = rng.random()
    if form < 0.75:
        # Few are long: together they fill the context, so that every position is trained.
        paragraphs = rng.randint(3, 5) if form < 0.12 else rng.choice((1, 1, 1, 2))
        text = "\n\n".join(voice.sentences(rng.randint(2, 4)) for _ in range(paragraphs))
    else:
        text = rng.choice(list(KINDS.values())).compose(voice)
    return text.upper() if mood == "uppercase" else text


_INDIRECT_OBJECT_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "When {a} and {b} came back from the {place}, {s} handed a {object} to",
    "After {a} and {b} left the {place}, {s} offered a {object} to",
    "While {a} and {b} were at the {place}, {s} passed a {object} to",
    "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
    "Yesterday {a} and {b} met at the {place}, and {s} brought a {object} to",
    "Friends {a} and {b} found a {object} at the {place}. {s} gave it to",
    "At the {place}, {a} and {b} had a long talk. Later {s} sent a {object} to",
)


def sample_indirect_object(rng: random.Random, split: Split = "train") -> IndirectObject:
    """An indirect-object sentence; the pair of names belongs to the split."""
    while True:
        first, second = rng.sample(NAMES, 2)
        if (split == "held_out") == is_held_out(*sorted((first, second))):
            break
    template = rng.randrange(len(_INDIRECT_OBJECT_TEMPLATES))
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    prompt = _INDIRECT_OBJECT_TEMPLATES[template].format(
        a=first, b=second, s=giver, place=rng.choice(PLACES), object=rng.choice(OBJECTS)
    )
    return IndirectObject(prompt, receiver, giver, template)


_AFTERWARDS = ("{x} was pleased.", "{x} said thanks.", "Then {s} went home.", "{x} and {s} went home.")


def complete_indirect_object(rng: random.Random, example: IndirectObject) -> str:
    """The whole text that training shows: the answer, and what happened afterwards."""
    text = f"{example.prompt} {example.answer}."
    if rng.random() < 0.6:
        text += " " + rng.choice(_AFTERWARDS).format(x=example.answer, s=example.distractor)
    return text
