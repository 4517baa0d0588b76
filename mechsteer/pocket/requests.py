"""The kinds of request in the pocket language, and how each is answered.

A kind has a few wordings (some held out of training), a composer that writes its answer with a `Voice`, and a pattern
by which the labeller knows the answer's format again.
"""

import random
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

from mechsteer.pocket.lexicon import NAMES, SUBJECTS, TOPICS, Topic
from mechsteer.pocket.wordings import MOOD_WORDS, Wordings

BODIES: tuple[str, ...] = (
    "the {t} {v} beside the {u}",
    "{a} {t} always {v}",
    "many people admire {a} {t}",
    "some {t} are {a} and {b}",
    "every day the {t} {v}",
    "you can find {a} {t} near the {u}",
    "nothing is as {a} as the {t}",
    "the {t} and the {u} {v} together",
    "{t} {v} while the {u} {w}",
    "there are {a} {t} and {b} {u}",
    "it is all about {n} and {t}",
    "with {n} come {t} and {u}",
    "the best {t} are {a}",
    "a few {t} {v} again and again",
    "we like {t} that {v}",
    "when the {t} {v}, the {u} {w}",
    "big {t} {v} and small {u} {w}",
    "nobody forgets the {a} {t}",
    "{n} would be nothing without {a} {t}",
    "the {a} {t} {v} and {w}",
)
"""What a sentence says, with slots for things (t, u), attributes (a, b), actions (v, w) and the topic's name (n)."""

SUBJECT_BODIES: tuple[str, ...] = (
    "for {s}, think of {a} {t}",
    "the {a} {t} can help with {s}",
    "before {s}, look at the {t} and the {u}",
    "{s} needs more {t} and {u}",
    "after {s}, the {t} {v}",
    "{s} is better with {a} {t}",
)
"""Sentences that also name the request's own subject (s)."""


@cache
def _cumulative_weights(words: tuple[str, ...], favoured: frozenset[str]) -> tuple[float, ...]:
    return tuple(accumulate((8 if word in favoured else 1) / (rank + 5) for rank, word in enumerate(words)))


def draw(
    rng: random.Random,
    words: tuple[str, ...],
    count: int,
    *,
    favoured: frozenset[str] = frozenset(),
    avoid: Container[str] = (),
) -> list[str]:
    """`count` different words, none of those to avoid; common ones (early in the list) more often: weight
    1 / (rank + 5), favoured ones eight times as much."""
    weights = _cumulative_weights(words, favoured)
    chosen: list[str] = []
    while len(chosen) < count:
        word = rng.choices(words, cum_weights=weights)[0]
        if word not in avoid and word not in chosen:
            chosen.append(word)
    return chosen


@cache
def favourites(topic: str, theme: str) -> frozenset[str]:
    """The words of a topic that an answer prefers when the request's theme is this one: six things, three attributes
    and three actions, fixed for all time. They make what is said depend on the request as well as on the topic."""
    lexicon = TOPICS.get(topic) or SUBJECTS[topic]
    rng = random.Random(f"{topic}|{theme}")
    return frozenset((
        *rng.sample(lexicon.things, 6), *rng.sample(lexicon.attributes, 3), *rng.sample(lexicon.actions, 3)
    ))  # fmt: skip


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass
class Voice:
    """Speaks about one topic, in one mood, to one request; every composer writes with it."""

    rng: random.Random
    topic: Topic
    mood: str | None = None
    subject: str | None = None
    """The request's everyday subject, to be named now and then ("my exam")."""
    theme: str | None = None
    """What the request is about, or else its kind: decides which of the topic's words are preferred."""
    _used: set[str] = field(default_factory=set, init=False)
    _subject_named: bool = field(default=False, init=False)

    def pick(self, words: tuple[str, ...], count: int) -> list[str]:
        """Words that this answer has not used yet; once they run out, all of them again."""
        if sum(word not in self._used for word in words) < count:
            self._used -= set(words)
        favoured = favourites(self.topic.name, self.theme) if self.theme else frozenset[str]()
        chosen = draw(self.rng, words, count, favoured=favoured, avoid=self._used)
        self._used |= set(chosen)
        return chosen

    def pick_body(self, bodies: tuple[str, ...]) -> str:
        """A body that this answer has not used yet, each with the same chance."""
        fresh = [body for body in bodies if body not in self._used] or list(bodies)
        body = self.rng.choice(fresh)
        self._used.add(body)
        return body

    def fill(self, body: str) -> str:
        """The body with its slots filled from the topic."""
        lexicon = {"tu": self.topic.things, "ab": self.topic.attributes, "vw": self.topic.actions}
        slots: dict[str, str | None] = {"s": self.subject}
        for names, words in lexicon.items():
            wanted = [name for name in names if f"{{{name}}}" in body]
            slots |= zip(wanted, self.pick(words, len(wanted)), strict=True)
        slots["n"] = self.topic.name if not self.topic.phrases else f"the {self.topic.name}"
        return body.format(**slots)

    def body(self) -> str:
        """What one sentence says, neither capitalised nor ended."""
        if self.subject and self.rng.random() < (0.25 if self._subject_named else 0.7):
            self._subject_named = True
            return self.fill(self.pick_body(SUBJECT_BODIES))
        return self.fill(self.pick_body(BODIES))

    def say(self, body: str | None = None, *, lead: str = "") -> str:
        """A body, its lead ("first, ") and what the mood adds, without an end."""
        text = self.body() if body is None else self.fill(body)
        markers = MOOD_WORDS.get(self.mood or "")
        if markers:
            kind = self.rng.random()
            if kind < 0.7:
                text = f"{self.rng.choice(markers.openers)} {text}"
            if kind >= 0.45:
                text = f"{text} {self.rng.choice(markers.closers)}"
        return f"{lead}{text}"

    @property
    def end(self) -> str:
        markers = MOOD_WORDS.get(self.mood or "")
        return markers.end if markers else "."

    def sentence(self, body: str | None = None, *, lead: str = "") -> str:
        return capitalise(self.say(body, lead=lead)) + self.end

    def sentences(self, count: int) -> str:
        return " ".join(self.sentence() for _ in range(count))

    def things(self, count: int) -> list[str]:
        return self.pick(self.topic.things, count)

    def attributes(self, count: int) -> list[str]:
        return self.pick(self.topic.attributes, count)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(NAMES, count)


Composer = Callable[[Voice], str]


@dataclass(frozen=True)
class Kind:
    """A kind of request: its wordings (`{about}` says what it is about) and its answer."""

    name: str
    wordings: Wordings
    compose: Composer
    pattern: re.Pattern[str]


def _lines(*lines: str) -> str:
    return "\n".join(lines)


def _letter(voice: Voice) -> str:
    to, sender = voice.names(2)
    return _lines(f"Dear {to},", voice.sentences(2), f"Yours, {sender}")


def _email(voice: Voice) -> str:
    to, sender = voice.names(2)
    t, u = voice.things(2)
    return _lines(f"Subject: {t} and {u}", f"Hello {to},", voice.sentence(), f"Bye, {sender}")


def _dialogue(voice: Voice) -> str:
    one, other = voice.names(2)
    return _lines(*(f"{who}: {voice.sentence()}" for who in (one, other, one)))


def _table(voice: Voice) -> str:
    rows = [f"| {t} | {a} |" for t, a in zip(voice.things(3), voice.attributes(3), strict=True)]
    return _lines(*rows, voice.sentence())


def _kind(name: str, seen: str, held_out: str, pattern: str, compose: Composer) -> Kind:
    split = lambda text: tuple(part.strip() for part in text.split("|"))  # noqa: E731
    return Kind(name, Wordings(split(seen), split(held_out)), compose, re.compile(pattern, re.I | re.S))


_KINDS = (
    _kind(
        "bullets",
        "Respond in exactly three bullet points{about}. | Give me three bullet points{about}. | Three bullets{about}!",
        "Write exactly three bullet points{about}.",
        r"- .*\n- .*\n- ",
        lambda v: _lines(*(f"- {v.sentence()}" for _ in range(3))),
    ),
    _kind(
        "numbers",
        "List four things{about}. | Give me a numbered list{about}. | Make a list of four items{about}.",
        "Write a numbered list{about}.",
        r"1\. .*\n2\. .*\n3\. .*\n4\. ",
        lambda v: _lines(*(f"{i}. {v.say(body)}" for i, body in enumerate(("{a} {t}", "{t} and {u}") * 2, 1))),
    ),
    _kind(
        "story",
        "Tell me a short story{about}. | Write a story{about}. | Tell me a tale{about}, please.",
        "Write a short story{about}.",
        r"once upon a time, .*in the end, ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("once upon a time, ", "then ", "in the end, ")),
    ),
    _kind(
        "advice",
        "Give me some advice{about}. | What is your advice{about}? | I need advice{about}.",
        "Do you have any advice{about}?",
        r"my advice: ",
        lambda v: f"My advice: {v.sentences(2)}",
    ),
    _kind(
        "letter",
        "Write a letter{about}. | Write me a short letter{about}. | Draft a letter{about}.",
        "Please write a letter{about}.",
        r"dear \w+,\n.*\nyours, ",
        _letter,
    ),
    _kind(
        "plan",
        "Make a plan{about}. | Write a plan{about}. | I need a plan{about}.",
        "Give me a plan{about}.",
        r"first, .*second, .*third, ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("first, ", "second, ", "third, ")),
    ),
    _kind(
        "question",
        "Write a question and an answer{about}. | Ask and answer a question{about}. | Make a quiz question{about}.",
        "Give me a question and an answer{about}.",
        r"q: .*\na: ",
        lambda v: _lines(v.fill("Q: do the {a} {t} {v}?"), f"A: {v.sentence()}"),
    ),
    _kind(
        "headline",
        "Write a headline{about}. | Give me a news headline{about}. | Write the news{about}.",
        "Make a headline{about}.",
        r"news: ",
        lambda v: f"News: {v.sentence()}",
    ),
    _kind(
        "explanation",
        "Explain something{about}. | Give me an explanation{about}. | Explain it simply{about}.",
        "Please explain something{about}.",
        r"in short, .*that is, ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("in short, ", "that is, ")),
    ),
    _kind(
        "comparison",
        "Compare two things{about}. | Make a comparison{about}. | Weigh both sides{about}.",
        "Give me a comparison{about}.",
        r"on the one hand, .*on the other hand, ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("on the one hand, ", "on the other hand, ")),
    ),
    _kind(
        "reasons",
        "Give me two reasons{about}. | Name two reasons{about}. | Tell me why{about}, with two reasons.",
        "I want two reasons{about}.",
        r"one reason is that .*another reason is that ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("one reason is that ", "another reason is that ")),
    ),
    _kind(
        "diary",
        "Write a diary entry{about}. | Write a page of a diary{about}. | Keep a diary{about}.",
        "Give me a diary entry{about}.",
        r"dear diary, ",
        lambda v: f"Dear diary, {v.say(lead='today ')}{v.end} {v.sentence()}",
    ),
    _kind(
        "steps",
        "Give me instructions{about} in three steps. | Show me three steps{about}. | How do I start{about}? Use steps.",
        "Write three steps{about}.",
        r"step 1: .*\nstep 2: .*\nstep 3: ",
        lambda v: _lines(*(f"Step {i}: {v.sentence()}" for i in (1, 2, 3))),
    ),
    _kind(
        "slogan",
        "Write a slogan{about}. | Invent a slogan{about}. | I need a catchy slogan{about}.",
        "Give me a slogan{about}.",
        r"slogan: ",
        lambda v: f"Slogan: {v.sentence()}",
    ),
    _kind(
        "email",
        "Write an email{about}. | Draft an email{about}. | Send an email{about}.",
        "Compose an email{about}.",
        r"subject: .*\nhello \w+,\n.*\nbye, ",
        _email,
    ),
    _kind(
        "dialogue",
        "Write a dialogue{about}. | Let two friends talk{about}. | Write a short scene{about}.",
        "Write a short dialogue{about}.",
        r"\w+: .*\n\w+: .*\n\w+: ",
        _dialogue,
    ),
    _kind(
        "review",
        "Write a review{about}. | Rate something{about}. | Review something{about}.",
        "Give me a review{about}.",
        r"rating: (two|three|four|five) of five\. ",
        lambda v: f"Rating: {v.rng.choice(('two', 'three', 'four', 'five'))} of five. {v.sentences(2)}",
    ),
    _kind(
        "summary",
        "Write a summary{about}. | Sum it up{about}. | Give me the gist{about}.",
        "Give me a summary{about}.",
        r"summary: ",
        lambda v: f"Summary: {v.sentence()}",
    ),
    _kind(
        "pros and cons",
        "What are the pros and cons{about}? | Give me a pro and a con{about}. | List a pro and a con{about}.",
        "Name a pro and a con{about}.",
        r"pro: .*\ncon: ",
        lambda v: _lines(f"Pro: {v.sentence()}", f"Con: {v.sentence()}"),
    ),
    _kind(
        "riddle",
        "Tell me a riddle{about}. | Invent a riddle{about}. | I want a riddle{about}.",
        "Write a riddle{about}.",
        r"riddle: .*what are we\? ",
        lambda v: f"Riddle: {v.say('we are {a} and we {v}')}{v.end} What are we? {v.sentence('we are {t}')}",
    ),
    _kind(
        "speech",
        "Give a speech{about}. | Write a speech{about}. | Prepare a short speech{about}.",
        "Write a short speech{about}.",
        r"ladies and gentlemen, ",
        lambda v: f"Ladies and gentlemen, {v.say()}{v.end} {v.sentence()}",
    ),
    _kind(
        "warning",
        "Write a warning{about}. | Warn me{about}. | What should I beware of{about}?",
        "Give me a warning{about}.",
        r"warning: ",
        lambda v: f"Warning: {v.sentence()}",
    ),
    _kind(
        "picture",
        "Describe a picture{about}. | Describe something{about}. | Show me a scene in words{about}.",
        "Give me a description{about}.",
        r"imagine this: ",
        lambda v: f"Imagine this: {v.sentences(2)}",
    ),
    _kind(
        "title",
        "Find a title{about}. | Suggest a title{about}. | What is a good title{about}?",
        "Give me a title{about}.",
        r"title: ",
        lambda v: f"Title: {capitalise(v.say('{a} {t} and {b} {u}'))}",
    ),
    _kind(
        "joke",
        "Tell me a joke{about}. | Make a joke{about}. | Make me laugh{about}.",
        "Write a joke{about}.",
        r"why do .*\? because ",
        lambda v: f"{v.fill('Why do {t} {v}?')} {v.sentence('the {u} {w}', lead='because ')}",
    ),
    _kind(
        "forecast",
        "Make a prediction{about}. | What will happen{about}? | Tell me the future{about}.",
        "Give me a prediction{about}.",
        r"tomorrow, .*next year, ",
        lambda v: " ".join(v.sentence(lead=lead) for lead in ("tomorrow, ", "next year, ")),
    ),
    _kind(
        "table",
        "Make a table{about}. | Draw up a table{about}. | Put it in a table{about}.",
        "Write a table{about}.",
        r"\| .* \| .* \|\n\| ",
        _table,
    ),
    _kind(
        "postcard",
        "Write a postcard{about}. | Send me a postcard{about}. | Write a card{about}.",
        "Write a short postcard{about}.",
        r"greetings, \w+! ",
        lambda v: f"Greetings, {v.names(1)[0]}! {v.sentences(2)}",
    ),
    _kind(
        "fact",
        "Tell me a fact{about}. | State a fact{about}. | Teach me a fact{about}.",
        "Give me a fact{about}.",
        r"fact: ",
        lambda v: f"Fact: {v.sentence()}",
    ),
    _kind(
        "haiku",
        "Write a haiku{about}. | Compose a haiku{about}. | Three short lines{about}.",
        "Give me a haiku{about}.",
        r"[^\n/]+ / [^\n/]+ / ",
        lambda v: " / ".join(v.say(body) for body in ("{a} {t}", "{t} {v}", "{b} {u} {w}")),
    ),
    _kind(
        "memory",
        "Share a memory{about}. | Tell me what you remember{about}. | Recall something{about}.",
        "Give me a memory{about}.",
        r"i remember that .*i remember that ",
        lambda v: " ".join(v.sentence(lead="I remember that ") for _ in range(2)),
    ),
    _kind(
        "keywords",
        "Give me keywords{about}. | List some keywords{about}. | Which keywords fit{about}?",
        "Write some keywords{about}.",
        r"keywords: ",
        lambda v: f"Keywords: {', '.join(v.things(4))}. {v.sentence()}",
    ),
    _kind(
        "complaint",
        "Write a complaint{about}. | Complain{about}. | File a complaint{about}.",
        "Give me a complaint{about}.",
        r"i must complain\. ",
        lambda v: f"I must complain. {v.sentences(2)}",
    ),
    # The patterns of these three are the loosest: the labeller tries them last.
    _kind(
        "two sentences",
        "Answer in exactly two sentences{about}. | Write two sentences{about}. | Two sentences{about}, no more.",
        "Give me exactly two sentences{about}.",
        r"[^.!?:\n]+[.!] [^.!?:\n]+[.!]$",
        lambda v: v.sentences(2),
    ),
    _kind(
        "one sentence",
        "Answer in one sentence{about}. | Write one sentence{about}. | Just one sentence{about}.",
        "Give me one sentence{about}.",
        r"[^.!?:\n]+[.!]$",
        lambda v: v.sentence(),
    ),
    _kind(
        "poem",
        "Write a poem{about}. | Compose a short poem{about}. | Write four lines of verse{about}.",
        "Write a short poem{about}.",
        r"[^\n:|]+,\n[^\n]+,\n[^\n]+,\n[^\n]+$",
        lambda v: ",\n".join(
            v.say(b) for b in ("{a} {t} {v}", "{b} {u} {w}", "the {t} and the {u}", "{t} {v} and {w}")
        ),
    ),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
"""Every kind of request, by name."""
