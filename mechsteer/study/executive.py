"""The executive summary: what the study asks, answered in plain sentences from the numbers of the findings alone."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.behaviour import WITH, WITHOUT, does_nothing
from mechsteer.study.chapters.features_report import BACK, CLAMP, HARD, verdict
from mechsteer.study.chapters.together_report import NOTHING, REFERENCE, closest_first
from mechsteer.study.chapters.travel_report import mostly_identity, off
from mechsteer.study.chapters.vector_report import JUDGED, PUSHED
from mechsteer.study.chapters.words_report import OURS
from mechsteer.study.measures import Estimate
from mechsteer.study.sentences import Sentence, Telling, listed, plain, prose

# From so many requests on an interval is not called wide for their number alone.
_MANY = 30
# What a summary that lacks something leads to.
_UNTOLD = (KeyError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Answer:
    """A question that the study asks, and what came out.

    Attributes:
        question: as a reader would put it.
        sentences: the answer.
    """

    question: str
    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The answer as a paragraph."""
        return " ".join(sentence.text for sentence in self.sentences)


def executive(findings: Mapping[str, Findings], failures: Mapping[str, str] | None = None) -> tuple[Answer, ...]:
    """The study's questions in their order, each with its answer, and what to keep in mind last.

    Chapters of someone's own have no part in this, and questions whose chapters were not asked have no answer.

    Args:
        findings: of the finished chapters, by name.
        failures: why chapters have no findings, by name.
    """
    failures = {} if failures is None else failures
    tellings: dict[str, Telling] = {}
    answers = []
    for question, parts in QUESTIONS.items():
        sentences: list[Sentence] = []
        for name, tell in parts.items():
            if name in findings:
                telling = Telling(name, findings[name].summary)
                sentences += _told(telling, tell)
                tellings[name] = telling
            elif name in failures:
                sentences.append(Sentence((f"There is no answer from this: {failures[name]}",), name))
        if sentences:
            answers.append(Answer(question, tuple(sentences)))
    if not answers:
        return ()
    return (*answers, Answer("What to keep in mind", tuple(_caveats(tellings, failures))))


def as_text(answers: Sequence[Answer], width: int = 100) -> str:
    """The summary for a terminal."""
    parts = [f"{each.question}\n{wrapped(each.text, width)}" for each in answers]
    return "\n\n".join(parts)


def wrapped(text: str, width: int) -> str:
    """Text in lines, "95 %" and "n = 18" whole."""
    return textwrap.fill(prose(text), width, break_on_hyphens=False).replace("\u00a0", " ")


def _told(telling: Telling, tell: Callable[[Telling], None]) -> list[Sentence]:
    try:
        tell(telling)
    except _UNTOLD as error:
        # A chapter that another mechsteer made; the report says the same of how it is shown.
        return [
            Sentence(
                (f"The findings of this chapter cannot be put into sentences ({type(error).__name__}: {error}).",),
                telling.chapter,
            )
        ]
    return telling.sentences


# ---- what moves the behaviour, and how much ----


def _behaviour(about: Telling) -> None:
    gap = about.estimate("gap", "held-out")
    if about.value("shows"):
        shown = _shown(about, "judge", "shown")
        with_it, without = (about.estimate("shows", "held-out", name) for name in (WITH, WITHOUT))
        shares = [("shows", "held-out", name) for name in (WITH, WITHOUT)]
        about.say(
            f"With the prefix {about.percent(*shares[0], 'value')} of the completions of held-out requests {shown} "
            f"{about.interval(*shares[0], percent=True, zero=False)}, without it {about.percent(*shares[1], 'value')} "
            f"{about.interval(*shares[1], percent=True, zero=False)}: {_compared(with_it, without)}.",
            at="cards",
        )
    ce = [about.two("ce", "held-out", name, "value") for name in (WITHOUT, WITH)]
    size = f"{about.two('gap', 'held-out', 'value')} nats a token {about.interval('gap', 'held-out')}"
    levels = f"{ce[0]} nats a token without the prefix and {ce[1]} with it"
    if gap.high < 0:
        about.say(
            f"What the model says with the prefix is likelier without it: its cross entropy is {levels}, a gap of "
            f"{size}.",
            at="ce",
        )
    elif does_nothing(gap):
        about.say(
            "The prefix does nothing that can be measured to how likely its completions are: their cross entropy is "
            f"{levels}, a gap of {size}.",
            at="ce",
        )
    else:
        about.say(
            f"The cross entropy of what the model says with the prefix is {levels}; this gap of {size} is the whole "
            "effect, of which other pushes bring about a share.",
            at="ce",
        )


def _compared(one: Estimate, other: Estimate) -> str:
    if one.low > other.high:
        return "the prefix brings the behaviour about"
    if one.high < other.low:
        return "the prefix does the opposite of what it asks for"
    return "the intervals overlap, so that this may be chance"


def _shown(about: Telling, *path: str) -> str:
    """What a judged completion does, as in "are about cats"."""
    return about.cite(*path)


# ---- where the push enters ----


def _entry(about: Telling) -> None:
    best, head = about.value("best"), about.value("heads")[0]
    chance = best["low"] <= 0 <= best["high"]
    about.say(
        f"The strongest place is the token {about.quote('best', 'token')} before layer {about.cite('best', 'layer')}: "
        f"its residual stream alone, taken from the run with the prefix, brings back {about.whole('best', 'share')} of "
        f"the effect {_percent_interval(about, 'best')}{', which may be chance' if chance else ''}.",
        at="sites",
    )
    if head["low"] <= 0 <= head["high"]:
        needed = "what it brings back may be chance"
    elif head["lost"] < 0.2 * head["share"]:
        needed = "it suffices and is hardly needed"
    elif head["lost"] < 0.5 * head["share"]:
        needed = "the rest of the model makes up for most of it"
    else:
        needed = "it is needed too"
    about.say(
        f"Of the attention heads, {about.cite('heads', 0, 'name')} brings back most, {about.whole('heads', 0, 'share')}"
        f" {_percent_interval(about, 'heads', 0)}, and taking it away costs {about.whole('heads', 0, 'lost')}: "
        f"{needed}.",
        at="heads",
    )
    if about.value("moved"):
        moved, whole, contrast = (("moved", name) for name in ("moved", "prefix", "contrast"))
        about.say(
            f"With nothing but that one place moved, {about.percent(*moved, 'value')} of the completions "
            f"{_shown(about, 'shown')} {about.interval(*moved, percent=True, zero=False)}; with the whole prefix "
            f"{about.percent(*whole, 'value')}, with the contrast in its place {about.percent(*contrast, 'value')}.",
            at="moved",
        )


def _percent_interval(about: Telling, *path: str | int) -> str:
    """Of shares that are in percent, and of the requests that are patched."""
    low, high = (about.cite(*path, end, form=lambda value: f"{round(value) + 0:d}") for end in ("low", "high"))
    return f"(95 % interval {low} to {high} %, n = {about.cite('n_requests')})"


# ---- how it travels ----


def _travel(about: Telling) -> None:
    at = about.value("layers").index(about.value("entry"))
    own, mean, predicted = ("change", "own", at), ("change", "mean", at), ("predicted", at)
    rest, c = ("identity", "rest", "end", at), ("identity", "c", "end", at)
    layer = about.cite("entry")
    about.say(
        f"What the prefix adds to the stream before layer {layer}, put in place at the one token where the completions "
        f"part, brings about {about.percent(*own, 'value')} of the prefix's change of the logit gap "
        f"{about.interval(*own, percent=True)}; one mean vector for all requests brings about "
        f"{about.percent(*mean, 'value')}.",
        at="pushes",
    )
    beyond = off(about.estimate(*own), about.estimate(*predicted))
    about.say(
        f"The gradient there foretells {about.percent(*predicted, 'value')} {about.interval(*predicted, percent=True)}"
        f": {'the push is beyond the linear regime' if beyond else 'close to the truth, the push is nearly linear'}.",
        at="pushes",
    )
    identity = mostly_identity(about.estimate(*c), about.estimate(*rest))
    about.say(
        f"From there to the end the stream is {'nearly' if identity else 'not'} an identity propagator: in J = c I + "
        f"R, c is {about.two(*c, 'value')}, and R is {about.two(*rest, 'value')} of the Jacobian's length "
        f"{about.interval(*rest)}.",
        at="identity",
    )


# ---- which vector does the same, and how strong it must be ----


def _vector(about: Telling) -> None:
    closed = ("closed", PUSHED)
    push = (
        f"One vector, times {about.three('picked', 'alpha')} and added at every token after block "
        f"{about.cite('picked', 'layer')}"
    )
    if about.exists(*closed):
        found = about.estimate(*closed)
        if found.high < 0:
            did = "widens the gap: it closes"
        elif found.low > 0:
            did = "closes"
        else:
            did = "closes no more of the gap than chance would:"
        text = (
            f"{push}, {did} {about.percent(*closed, 'value')} of the prefix's gap on held-out requests "
            f"{about.interval(*closed, percent=True)}"
        )
        if about.exists("closed_by_random"):
            text += f"; a random vector as long closes {about.percent('closed_by_random', 'value')}"
        about.say(f"{text}.", at="cards")
    else:
        about.say(
            f"{push}, takes the cross entropy of the reference completions to "
            f"{about.two('ce', PUSHED, 'value')} nats a token; the prefix leaves no gap of which to close a share.",
            at="cards",
        )
    if about.value("shows"):
        best = JUDGED if JUDGED in about.value("shows") else PUSHED
        times = about.three("judged") if best == JUDGED else about.three("picked", "alpha")
        about.say(
            f"Times {times}, {about.percent('shows', best, 'value')} of the completions {_shown(about, 'shown')} "
            f"{about.interval('shows', best, percent=True, zero=False)}, with the prefix "
            f"{about.percent('shows', WITH, 'value')}.",
            at="completions",
        )


def _strength(about: Telling) -> None:
    alphas, alpha = about.value("alphas"), about.value("alpha")
    at = int(np.argmin(np.abs(np.array(alphas) - alpha)))
    size = f"{about.three('alpha')} times the vector {about.cite('picked')}"
    cost = (
        f"what the model says by itself becomes {about.two('rise', at, 'value')} nats a token less likely "
        f"{about.interval('rise', at)}"
    )
    if not about.value("works"):
        about.say(
            "With its cost weighed, no strength of any vector that was tried is better than none by more than two "
            f"standard errors; at the best of them, {size}, {cost}.",
            at="cards",
        )
        return
    if about.value("judged"):
        does = (
            f"{about.percent('target', at, 'value')} of the completions then {_shown(about, 'shown')} "
            f"{about.interval('target', at, percent=True, zero=False)}"
        )
    else:
        none = int(np.argmin(np.abs(np.array(alphas))))
        does = (
            f"the cross entropy of the reference completions goes from {about.two('reference', none, 'value')} to "
            f"{about.two('reference', at, 'value')} nats a token"
        )
    about.say(
        f"Weighed against its cost, the strength to use is {size} (anything from {about.three('band', 0)} to "
        f"{about.three('band', 1)} may be best): {does}, and {cost}.",
        at="cards",
    )


# ---- which features, and whether they are why ----


def _features(about: Telling) -> None:
    part = f"feature {about.value('feature')}"
    needed, enough = (("mediation", share, part) for share in ("needed", "enough"))
    about.say(
        f"The prefix raises feature {about.cite('feature')} most, which promotes {about.cite('promotes')}. It "
        f"{verdict(about.estimate(*needed), about.estimate(*enough))}: held where it is without the prefix, it takes "
        f"away {about.percent(*needed, 'value')} of the effect {about.interval(*needed, percent=True)}; put where the "
        f"prefix puts it, it brings {about.percent(*enough, 'value')} {about.interval(*enough, percent=True)}.",
        at="mediation",
    )
    step = f"{CLAMP} {about.value('chosen', CLAMP):g}"
    which = "shows" if about.value("shows") else "closed"
    does = f"of the completions {_shown(about, 'shown')}" if which == "shows" else "of the gap is closed"

    def outcome(push: str) -> str:
        interval = about.interval(which, push, percent=True, zero=which == "closed")
        return f"{about.percent(which, push, 'value')} {does} {interval}"

    about.say(
        f"Clamped at {about.three('chosen', CLAMP)} times its level, {outcome(step)}, at a cost of "
        f"{about.two('rise', step, 'value')} nats a token {about.interval('rise', step)} on what the model says by "
        "itself.",
        at="curve",
    )
    about.say(
        f"Under the prefix {about.quote('hard')}, searched only to raise it, {outcome(HARD)}; with the feature held "
        f"back {about.percent(which, HARD + BACK, 'value')}.",
        at="prefixes",
    )


# ---- which other words ----


def _words(about: Telling) -> None:
    effect, one = ("effect", OURS), about.value("size") == 1
    words = f"{about.cite('size')} other token{'' if one else 's'}, {about.quote('text')},"
    if about.exists(*effect):
        found = about.estimate(*effect)
        doubt = ", which is no more than chance" if found.low <= 0 <= found.high else ""
        doubt = ": the opposite of it" if found.high < 0 else doubt
        about.say(
            f"{words} {'has' if one else 'have'} {about.percent(*effect, 'value')} of the prefix's effect on held-out "
            f"requests {about.interval(*effect, percent=True)}{doubt}.",
            at="cards",
        )
    else:
        ce = [about.two("cross_entropy", name, "value") for name in (OURS, "reference", "no prefix")]
        about.say(
            f"With {words} the cross entropy of the reference completions is {ce[0]} nats a token, with the prefix "
            f"{ce[1]} and without it {ce[2]}: there is no effect of which to keep a share.",
            at="cards",
        )
    if about.value("greedy"):
        about.say(
            f"Of the completions under these words, {about.percent('greedy', OURS, 'value')} {_shown(about, 'shown')} "
            f"{about.interval('greedy', OURS, percent=True, zero=False)}; with the prefix "
            f"{about.percent('greedy', 'reference', 'value')}.",
            at="table",
        )
    they, hold, encode = ("it", "holds", "encodes") if one else ("they", "hold", "encode")
    none = f"{they.capitalize()} {hold} none of the forbidden words"
    about.say(
        f"{none if about.value('forbidden') else 'No words were forbidden'}, and as text {they} {encode} to the same "
        f"tokens in {about.cite('survives', 0)} of "
        f"{about.cite('survives', 1)} held-out prompts.",
        at="cards",
    )


# ---- how equal ----


def _together(about: Telling) -> None:
    made = [name for name in closest_first(about.summary) if name not in (REFERENCE, NOTHING)]

    def push(name: str, column: str, form: str = "percent") -> str:
        return getattr(about, form)("pushes", name, column, "value")

    first = made[0]
    gone = about.estimate("pushes", first, "closed")
    did = "of the difference that the prefix makes is gone" if gone.low > 0 else "of the difference is gone, if any"
    about.say(
        f"Closest to the prefix in what the model predicts {'are' if first.endswith('s') else 'is'} the {first}: "
        f"{push(first, 'kl', 'two')} nats a token {about.interval('pushes', first, 'kl', zero=False)} from the "
        f"prefix's predictions, where no push is {push(NOTHING, 'kl', 'two')} away, so that "
        f"{push(first, 'closed')} {did}.",
        at="table",
    )
    if made[1:]:
        rest = [f"{push(name, 'closed')} under the {name}" for name in made[1:]]
        about.say(f"Of the same difference, {listed(rest)} {'is' if len(rest) == 1 else 'are'} gone.", at="table")
    if about.value("judged"):
        shares = [f"{push(name, 'shows')} under the {name}" for name in made]
        n = about.cite("pushes", REFERENCE, "shows", "n")
        about.say(
            f"Of the completions, {listed(shares)} {_shown(about, 'shown')}; {push(REFERENCE, 'shows')} do with the "
            f"prefix and {push(NOTHING, 'shows')} without any push (n = {n}).",
            at="table",
        )
    after = about.cite("layer")
    near = min(made, key=lambda name: about.estimate("pushes", name, "distance", about.value("layer")).value)
    states = [about.percent("pushes", name, "distance", about.value("layer"), "value") for name in (near, NOTHING)]
    about.say(
        f"None of this makes the states the same: after block {after} the residual stream is {states[0]} of its length "
        f"away from the prefix's under the {near}, the nearest, and {states[1]} without a push.",
        at="states",
    )


QUESTIONS: dict[str, dict[str, Callable[[Telling], None]]] = {
    "What moves the behaviour, and how much?": {"behaviour": _behaviour},
    "Where does the push enter?": {"entry": _entry},
    "How does it travel?": {"travel": _travel},
    "Which vector does the same, and how strong must it be?": {"vector": _vector, "strength": _strength},
    "Which features does it use, and are they why?": {"features": _features},
    "Which other words do the same?": {"words": _words},
    "How equal are all of these?": {"together": _together},
}
"""What a study asks, in order, and the chapters that answer."""


# ---- what to keep in mind ----


def _caveats(tellings: Mapping[str, Telling], failures: Mapping[str, str]) -> list[Sentence]:
    found: list[Sentence] = []
    for name, caveat in _CAVEATS.items():
        if name in tellings:
            telling = Telling(name, tellings[name].summary)
            # What cannot be told has been told.
            with suppress(*_UNTOLD):
                caveat(telling)
            found += telling.sentences
    missing = [name for parts in QUESTIONS.values() for name in parts if name not in {*tellings, *failures}]
    for names, what in ((list(failures), "failed"), (missing, "not asked for or not finished")):
        if names:
            be = "" if what == "failed" else "was " if len(names) == 1 else "were "
            chapters = "The chapter" if len(names) == 1 else "The chapters"
            found.append(plain(f"{chapters} {listed(names)} {be}{what}."))
    found.append(
        plain(
            "All of this is one model, one seed and greedy completions of these requests: intervals are over requests "
            "and say nothing of other models."
        )
    )
    return found


def _behaviour_caveat(about: Telling) -> None:
    n = about.value("gap", "held-out", "n")
    few = "" if n >= _MANY else ", so that intervals are wide"
    about.say(
        f"Numbers on held-out requests rest on {about.cite('gap', 'held-out', 'n')} "
        f"request{'' if n == 1 else 's'}{few}.",
        at="table",
    )
    if about.value("judge") is None:
        about.say("No judge knows this behaviour, so that completions are compared by their likelihood alone.")


def _vector_caveat(about: Telling) -> None:
    if about.value("picked", "edge"):
        about.say(
            f"The vector's strength {about.three('picked', 'alpha')} is the largest that was tried: a larger one may "
            "do better.",
            at="grid",
        )


def _features_caveat(about: Telling) -> None:
    about.say(
        f"The autoencoder explains {about.percent('sae', 'explained', 'value')} of its layer's variance; what it "
        "leaves is in no feature.",
        at="features",
    )


def _words_caveat(about: Telling) -> None:
    ours, theirs = (about.value("perplexity", name) for name in (OURS, "reference"))
    if ours is not None and theirs is not None and ours > theirs:
        about.say(
            f"The other words are odd to the model: perplexity {about.three('perplexity', OURS)} against "
            f"{about.three('perplexity', 'reference')} of the prefix.",
            at="table",
        )


def _together_caveat(about: Telling) -> None:
    for name in about.value("missing"):
        about.say(f"Left out of the comparison, because it could not be made: {name}.", at="table")


_CAVEATS: dict[str, Callable[[Telling], Any]] = {
    "behaviour": _behaviour_caveat,
    "vector": _vector_caveat,
    "features": _features_caveat,
    "words": _words_caveat,
    "together": _together_caveat,
}
