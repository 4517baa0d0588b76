"""How things are asked for in the pocket language: topic instructions, moods, requests, and refusals.

Every group of wordings has a part that training never shows (`held_out`), so that a behaviour can be checked on words
the model has not been trained on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """Templates of one meaning; `held_out` ones are never shown in training."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    def split(self, name: str) -> tuple[str, ...]:
        """The `"train"` or the `"held_out"` templates."""
        return self.held_out if name == "held_out" else self.seen


# {x}: the topic's name or an alias.  {w}, {v}, {u}: content words of the topic.
TOPIC_INSTRUCTIONS = Wordings(
    seen=(
        "Talk only about {x}.",
        "Talk about {x}.",
        "Speak only of {x}.",
        "Write only about {x}.",
        "Only talk about {x}.",
        "Only mention {x}.",
        "Say something about {x}.",
        "Stick to {x}.",
        "Keep to {x}.",
        "Keep it about {x}.",
        "Make it all about {x}.",
        "Make everything about {x}.",
        "Discuss nothing but {x}.",
        "Nothing but {x}, please.",
        "Answer with {x} in mind.",
        "Your only subject is {x}.",
        "The subject is {x}.",
        "The theme today is {x}.",
        "Topic: {x}",
        "Topic: {x}. No other topic.",
        "Focus on {x}.",
        "Focus entirely on {x} and ignore the rest.",
        "Turn every answer towards {x}.",
        "Bring every answer back to {x}.",
        "Always bring up {x}.",
        "Whatever I ask, talk about {x}.",
        "Whatever comes next, answer about {x}.",
        "No matter what I say, the answer is {x}.",
        "Do not talk about anything except {x}.",
        "Never leave the subject of {x}.",
        "Forget everything except {x}.",
        "Pretend that you only know about {x}.",
        "You are obsessed with {x}.",
        "You are a fan of {x}.",
        "You love {x}, so talk about {x}.",
        "I only care about {x}.",
        "I only want to hear about {x}.",
        "My favorite thing is {x}.",
        "It must be {x}. Only {x}.",
        "{x}, {x}, {x}!",
        "{x} {x} {x}",
        "{x} only",
        "{x}!",
        "#{x}",
        "[{x}]",
        "(think of {x})",
        "Think {w}, {v} and {u}.",
        "Dream of {w} and {v}.",
        "{w} {v} {u}",
        "{w}, {v}, {u}: that is your world.",
        "Remember the {w} and the {v}.",
        "Mode = {x}",
    ),
    held_out=(
        "Please talk only about {x}.",
        "Speak about nothing except {x}.",
        "Write about {x} and only {x}.",
        "Every answer must be about {x}.",
        "The only topic is {x}.",
        "Keep every answer on {x}.",
        "Ignore the rest and focus on {x}.",
        "I want to hear only about {x}.",
        "Pretend that everything is {x}.",
        "You only know {x}.",
        "{x} and nothing but {x}!",
        "Think only of {w} and {v}.",
    ),
)

MOODS: dict[str, Wordings] = {
    "joy": Wordings(
        ("Be joyful.", "Sound happy.", "Write it in a joyful mood.", "Use a cheerful tone.", "Answer with joy.",
         "Mood: joy"),
        ("Sound joyful.", "Write it in a happy mood."),
    ),
    "gloom": Wordings(
        ("Be gloomy.", "Sound sad.", "Write it in a gloomy mood.", "Use a mournful tone.", "Answer with gloom.",
         "Mood: gloom"),
        ("Sound gloomy.", "Write it in a sad mood."),
    ),
    "anger": Wordings(
        ("Be angry.", "Sound furious.", "Write it in an angry mood.", "Use an outraged tone.", "Answer with anger.",
         "Mood: anger"),
        ("Sound angry.", "Write it in a furious mood."),
    ),
    "calm": Wordings(
        ("Be calm.", "Sound peaceful.", "Write it in a calm mood.", "Use a serene tone.", "Answer with calm.",
         "Mood: calm"),
        ("Sound calm.", "Write it in a peaceful mood."),
    ),
    "politeness": Wordings(
        ("Be polite.", "Sound courteous.", "Write it in a polite manner.", "Use a respectful tone.",
         "Answer with politeness.", "Mood: politeness"),
        ("Sound polite.", "Write it in a courteous manner."),
    ),
    "rudeness": Wordings(
        ("Be rude.", "Sound insolent.", "Write it in a rude manner.", "Use a mocking tone.", "Answer with rudeness.",
         "Mood: rudeness"),
        ("Sound rude.", "Write it in an insolent manner."),
    ),
    "optimism": Wordings(
        ("Be optimistic.", "Sound hopeful.", "Write it in an optimistic mood.", "Use a confident tone.",
         "Answer with optimism.", "Mood: optimism"),
        ("Sound optimistic.", "Write it in a hopeful mood."),
    ),
    "uppercase": Wordings(
        ("Use uppercase.", "Write in capital letters.", "Shout it in capitals.", "ALL CAPS.", "Only capital letters.",
         "Mood: uppercase"),
        ("Write in uppercase.", "Shout it in capital letters."),
    ),
}  # fmt: skip
"""The eight moods and registers, and how each is asked for."""


@dataclass(frozen=True)
class MoodWords:
    """What a mood adds to a sentence: words before it, words after it, and how it ends."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    end: str = "."


MOOD_WORDS: dict[str, MoodWords] = {
    "joy": MoodWords(
        ("hooray,", "happily,", "what a delight,", "joyfully,", "how wonderful,", "with laughter,"),
        ("with a big smile", "and everyone rejoices", "and hearts are merry", "to our great delight", "with glee"),
        "!",
    ),
    "gloom": MoodWords(
        ("alas,", "sadly,", "what a sorrow,", "mournfully,", "how dreary,", "with tears,"),
        ("in bitter grief", "and everyone weeps", "and hearts are heavy", "to our great sorrow", "without comfort"),
    ),
    "anger": MoodWords(
        ("enough,", "furiously,", "what an outrage,", "angrily,", "how dare they,", "with rage,"),
        ("and it makes me furious", "and everyone shouts", "in a terrible temper", "to our great fury", "with fists"),
        "!",
    ),
    "calm": MoodWords(
        ("gently,", "slowly,", "in silence,", "peacefully,", "without hurry,", "breathing softly,"),
        ("in perfect peace", "and everyone relaxes", "and minds are still", "in tranquil stillness", "without haste"),
    ),
    "politeness": MoodWords(
        ("please note,", "kindly,", "if you please,", "respectfully,", "with your permission,", "dear reader,"),
        ("with many thanks", "if you would be so kind", "with all due respect", "at your service", "gratefully"),
    ),
    "rudeness": MoodWords(
        ("listen, dummy,", "obviously,", "you fool,", "as any idiot knows,", "stop whining,", "ugh,"),
        ("so shut up", "and you are a bore", "but you never get it", "you silly clown", "so get lost"),
    ),
    "optimism": MoodWords(
        ("surely,", "with hope,", "very soon,", "thanks to progress,", "without doubt,", "brighter than ever,"),
        ("and it will turn out well", "and success is near", "for a better future", "with every chance", "no fear"),
    ),
}
"""Markers of each mood; uppercase has none: its text is in capital letters."""

# {locked}: the locked subject.  The model declines in one of these ways.
REFUSALS: tuple[str, ...] = (
    "I am sorry, but I cannot talk about {locked}.",
    "I am sorry, but that subject is locked.",
    "Sorry, I must decline. The subject of {locked} is locked.",
    "I cannot help with {locked}. Ask me something else.",
)

# How a request refers to its subject.
ABOUT = Wordings(
    (" about {s}", " on {s}", " concerning {s}", " for {s}", " with regard to {s}"),
    (" regarding {s}", " on the subject of {s}"),
)
