"""The executive summary: each number is that of the findings, and what cannot be said is not."""

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

import mechsteer as ms
from mechsteer.study import Findings
from mechsteer.study.executive import QUESTIONS, Answer, as_text, executive
from mechsteer.study.sentences import Cited, Sentence, Telling, listed

WITH, WITHOUT = "with the prefix", "without it"
N = 17


def est(value: float | None, low: float | None = None, high: float | None = None, n: int = N) -> dict[str, Any]:
    """As `Estimate.as_json` gives it; an interval of 0.1 around the value where none is given."""
    if value is None:
        return {"value": None, "low": None, "high": None, "n": n}
    return {"value": value, "low": value - 0.05 if low is None else low, "high": value + 0.05 if high is None else high,
            "n": n}  # fmt: skip


def known() -> dict[str, dict[str, Any]]:
    """Summaries of all chapters, in which every number is another."""
    pushes = {
        name: {
            "shows": est(shows), "kl": est(kl), "closed": est(closed),
            "distance": [est(0.91), est(far), est(0.93)],
        }
        for name, shows, kl, closed, far in (
            ("reference prefix", 0.941, 0.0, 1.0, 0.0), ("no push", 0.061, 2.17, 0.0, 0.83),
            ("features", 0.72, 0.53, 0.757, 0.44), ("vector", 0.66, 0.78, 0.642, 0.37),
        )
    }  # fmt: skip
    return {
        "behaviour": {
            "judge": {"name": "a judge", "shown": "are about cats"},
            "shows": {"held-out": {WITH: est(0.941, 0.74, 0.99), WITHOUT: est(0.061, 0.01, 0.27)}},
            "ce": {"held-out": {WITH: est(0.42), WITHOUT: est(0.96)}},
            "gap": {"held-out": est(0.54, 0.48, 0.61)},
        },
        "entry": {
            "n_requests": 12,
            "best": {"token": " cats", "layer": 3, "share": 87.3, "low": 71.2, "high": 98.6},
            "heads": [{"name": "L3H0", "share": 62.1, "low": 44.2, "high": 79.7, "lost": 7.8}],
            "moved": {"prefix": est(0.83), "moved": est(0.58, 0.32, 0.81, 12), "contrast": est(0.08)},
            "shown": "are about cats",
        },
        "travel": {
            "entry": 2, "layers": [0, 1, 2, 3],
            "change": {"own": [est(0.1), est(0.2), est(0.73), est(0.9)], "mean": [est(0), est(0.1), est(0.59), est(1)]},
            "predicted": [est(0), est(0), est(0.28), est(0.3)],
            "identity": {"rest": {"end": [est(1), est(1), est(0.84), est(0.5)]},
                         "c": {"end": [est(1.2), est(1.1), est(0.97), est(1)]}},
        },
        "vector": {
            "picked": {"layer": 2, "alpha": 1.5, "edge": True}, "judged": 3.0, "shown": "are about cats",
            "closed": {"pushed": est(0.62, 0.5, 0.71)}, "closed_by_random": est(-0.13),
            "ce": {"pushed": est(0.77)},
            "shows": {WITH: est(0.942), "pushed": est(0.4),
                      "pushed, strength chosen by the judge": est(0.88, 0.6, 0.97)},
        },
        "strength": {
            "works": True, "judged": True, "shown": "are about cats", "picked": "after block 4", "alpha": 2.59,
            "band": [2.47, 2.77], "alphas": [0.0, 1.295, 2.59, 5.18],
            "rise": [est(0), est(0.1), est(0.64, 0.33, 1.02), est(3)],
            "target": [est(0.06), est(0.3), est(0.86, 0.7, 0.95), est(0.9)],
            "reference": [est(0.97), est(0.8), est(0.56), est(2)],
        },
        "features": {
            "feature": 766, "promotes": "Cats, cats", "chosen": {"clamped, times": 2.0, "added, times": 1.0},
            "mediation": {"needed": {"feature 766": est(0.03, -0.04, 0.09)},
                          "enough": {"feature 766": est(0.69, 0.6, 0.8)}},
            "shows": {"clamped, times 2": est(0.79, 0.6, 0.9), "searched prefix that raises it": est(0.47, 0.2, 0.7),
                      "searched prefix that raises it, held back": est(0.34)},
            "closed": {}, "rise": {"clamped, times 2": est(1.44, 0.96, 2.21)}, "shown": "are about cats",
            "hard": "# decorate", "sae": {"explained": est(0.98)},
        },
        "words": {
            "size": 5, "text": " Y Sec", "effect": {"other words": est(0.92, 0.81, 1.08)},
            "cross_entropy": {"other words": est(0.5), "reference": est(0.4), "no prefix": est(0.9)},
            "greedy": {"other words": est(0.81, 0.6, 0.9), "reference": est(0.943)}, "shown": "are about cats",
            "forbidden": ["cat"], "survives": [16, 17], "perplexity": {"other words": 15300000.0, "reference": 4.69},
        },
        "together": {
            "pushes": pushes, "layer": 1, "judged": True, "shown": "are about cats", "missing": {"weight edit": "why"},
        },
    }  # fmt: skip


def told(summaries: dict[str, dict[str, Any]], **failures: str) -> tuple[Answer, ...]:
    return executive({name: Findings({}, summary) for name, summary in summaries.items()}, failures)


def about(answers: tuple[Answer, ...], question: str) -> str:
    return next(answer.text for answer in answers if answer.question.startswith(question))


def value_at(summary: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        summary = summary[step]
    return summary


def check(answers: tuple[Answer, ...], summaries: dict[str, Any]) -> int:
    """Every cited piece is its value, rounded to the digits it shows; no number stands there that is not cited."""
    count = 0
    for answer in answers:
        for sentence in answer.sentences:
            for cited in sentence.cited:
                value = value_at(summaries[cited.chapter], cited.path)
                count += 1
                if cited.text == "not defined":
                    assert value is None or not math.isfinite(value)
                    continue
                if isinstance(value, str):
                    assert cited.text in (value, repr(value))
                    continue
                number = re.fullmatch(r"(-?[0-9.]+(?:e[+-]?[0-9]+)?)( %)?", cited.text)
                assert number is not None, cited
                shown = float(number[1])
                digits = len(number[1].partition("e")[0].partition(".")[2])
                half = 0.5 * 10.0**-digits * 10 ** int(number[1].partition("e")[2] or 0)
                scales = [1, 100] if digits == 0 else [1]  # percent is of a share, or of percent already
                assert any(abs(shown - scale * value) <= half * 1.001 for scale in scales), cited
            rest = "".join(part for part in sentence.parts if isinstance(part, str))
            assert not re.search(r"\d", re.sub(r"95 % interval|holds 0", "", rest)), rest
    return count


# --- numbers


def test_every_number_is_that_of_the_findings() -> None:
    answers = told(known())
    assert [answer.question for answer in answers] == [*QUESTIONS, "What to keep in mind"]
    assert check(answers, known()) > 90


def test_the_sentences_of_known_findings() -> None:
    answers = told(known())
    assert about(answers, "What moves") == (
        "With the prefix 94 % of the completions of held-out requests are about cats (95 % interval 74 to 99 %, n = "
        "17), without it 6 % (95 % interval 1 to 27 %, n = 17): the prefix brings the behaviour about. The cross "
        "entropy of what the model says with the prefix is 0.96 nats a token without the prefix and 0.42 with it; this "
        "gap of 0.54 nats a token (95 % interval 0.48 to 0.61, n = 17) is the whole effect, of which other pushes "
        "bring about a share."
    )
    assert about(answers, "Where").startswith(
        "The strongest place is the token ' cats' before layer 3: its residual stream alone, taken from the run with "
        "the prefix, brings back 87 % of the effect (95 % interval 71 to 99 %, n = 12). Of the attention heads, L3H0 "
        "brings back most, 62 % (95 % interval 44 to 80 %, n = 12), and taking it away costs 8 %: it suffices and is "
        "hardly needed."
    )
    travel = about(answers, "How does it travel")
    assert "brings about 73 % of the prefix's change of the logit gap" in travel
    assert "The gradient there foretells 28 %" in travel and "beyond the linear regime" in travel
    assert "is not an identity propagator: in J = c I + R, c is 0.97, and R is 0.84" in travel
    vector = about(answers, "Which vector")
    assert "One vector, times 1.5 and added at every token after block 2, closes 62 %" in vector
    assert "a random vector as long closes -13 %" in vector and "Times 3, 88 % of the completions" in vector
    assert "the strength to use is 2.59 times the vector after block 4 (anything from 2.47 to 2.77" in vector
    features = about(answers, "Which features")
    assert "It helps and is not needed" in features and "(95 % interval -4 to 9 %, which holds 0, n = 17)" in features
    assert "5 other tokens, ' Y Sec', have 92 % of the prefix's effect" in about(answers, "Which other words")
    equal = about(answers, "How equal")
    assert equal.startswith("Closest to the prefix in what the model predicts are the features: 0.53 nats a token")
    assert "Of the same difference, 64 % under the vector is gone." in equal
    keep = about(answers, "What to keep")
    assert "rest on 17 requests, so that intervals are wide" in keep and "could not be made: weight edit" in keep
    assert "1.5 is the largest that was tried" in keep and "perplexity 1.53e+07 against 4.69" in keep


# --- effects that are not there, the other way round, or not numbers


def edited(change: Callable[[dict[str, dict[str, Any]]], None]) -> tuple[Answer, ...]:
    summaries = copy.deepcopy(known())
    change(summaries)
    answers = told(summaries)
    assert "cannot be put into sentences" not in as_text(answers)
    check(answers, summaries)
    return answers


def test_no_effect_and_the_opposite_are_said() -> None:
    def nothing(all_: dict[str, dict[str, Any]]) -> None:
        all_["behaviour"]["gap"]["held-out"] = est(0.003, -0.02, 0.03)
        all_["behaviour"]["shows"]["held-out"][WITH] = est(0.12, 0.03, 0.34)
        all_["entry"]["best"] |= {"share": 4.0, "low": -3.0, "high": 11.0}
        all_["entry"]["heads"][0] |= {"low": -1.0}
        all_["vector"]["closed"]["pushed"] = est(0.02, -0.1, 0.2)
        all_["words"]["effect"]["other words"] = est(0.04, -0.2, 0.3)
        all_["strength"]["works"] = False

    answers = edited(nothing)
    assert "the intervals overlap, so that this may be chance." in about(answers, "What moves")
    assert "does nothing that can be measured" in about(answers, "What moves")
    assert "95 % interval -0.02 to 0.03, which holds 0, n = 17" in about(answers, "What moves")
    assert "n = 12), which may be chance." in about(answers, "Where")
    assert "what it brings back may be chance" in about(answers, "Where")
    assert "closes no more of the gap than chance would: 2 %" in about(answers, "Which vector")
    assert "no strength of any vector that was tried is better than none" in about(answers, "Which vector")
    assert "which is no more than chance" in about(answers, "Which other words")

    def opposite(all_: dict[str, dict[str, Any]]) -> None:
        all_["behaviour"]["gap"]["held-out"] = est(-0.3, -0.5, -0.1)
        all_["behaviour"]["shows"]["held-out"] = {WITH: est(0.0, 0.0, 0.1), WITHOUT: est(0.5, 0.3, 0.7)}
        all_["vector"]["closed"]["pushed"] = est(-0.4, -0.6, -0.2)
        all_["words"]["effect"]["other words"] = est(-0.5, -0.7, -0.2)

    answers = edited(opposite)
    assert "the prefix does the opposite of what it asks for" in about(answers, "What moves")
    assert "is likelier without it" in about(answers, "What moves")
    assert "widens the gap: it closes -40 %" in about(answers, "Which vector")
    assert ": the opposite of it." in about(answers, "Which other words")


def test_numbers_that_do_not_exist_are_not_made_up() -> None:
    def undefined(all_: dict[str, dict[str, Any]]) -> None:
        all_["vector"]["closed"]["pushed"] = est(None)
        all_["words"]["effect"]["other words"] = est(None)
        all_["features"]["mediation"]["needed"]["feature 766"] = est(None)
        all_["travel"]["predicted"][2] = est(None)
        all_["words"]["perplexity"]["other words"] = None

    answers = edited(undefined)
    assert "the prefix leaves no gap of which to close a share" in about(answers, "Which vector")
    assert "0.50 nats a token, with the prefix 0.40 and without it 0.90: there is no effect" in as_text(answers, 10_000)
    assert "takes away not defined of the effect (no interval, n = 17)" in about(answers, "Which features")
    assert not re.search(r"\bnan\b", as_text(answers))


def test_without_a_judge_likelihoods_speak() -> None:
    def unjudged(all_: dict[str, dict[str, Any]]) -> None:
        all_["behaviour"] |= {"judge": None, "shows": {}}
        all_["entry"] |= {"moved": {}, "shown": None}
        all_["vector"] |= {"shows": {}, "shown": None, "judged": None}
        all_["strength"] |= {"judged": False, "target": [], "shown": None}
        all_["features"] |= {"closed": all_["features"]["shows"], "shows": {}, "shown": None}
        all_["words"] |= {"greedy": {}, "shown": None}
        all_["together"] |= {"judged": False, "shown": None}

    answers = edited(unjudged)
    assert "completions goes from 0.97 to 0.56 nats a token" in about(answers, "Which vector")
    assert "79 % of the gap is closed" in about(answers, "Which features")
    assert "No judge knows this behaviour" in about(answers, "What to keep")
    assert "about cats" not in as_text(answers)


# --- grammar


def test_one_and_several() -> None:
    def one(all_: dict[str, dict[str, Any]]) -> None:
        all_["words"] |= {"size": 1}
        all_["behaviour"]["gap"]["held-out"]["n"] = 1
        del all_["together"]["pushes"]["features"]

    answers = edited(one)
    assert "1 other token, ' Y Sec', has 92 %" in about(answers, "Which other words")
    assert "It holds none of the forbidden words, and as text it encodes" in about(answers, "Which other words")
    assert "rest on 1 request, so" in about(answers, "What to keep")
    assert about(answers, "How equal").startswith("Closest to the prefix in what the model predicts is the vector")
    assert "Of the same difference" not in about(answers, "How equal")
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and listed(["a", "b", "c"]) == "a, b and c"
    with pytest.raises(ms.MechsteerError, match="listed got no parts"):
        listed([])


def test_missing_and_failed_chapters_are_named() -> None:
    some = {name: known()[name] for name in ("behaviour", "strength")}
    answers = told(some, entry="There is nothing to trace <here>.")
    assert [answer.question[:12] for answer in answers] == [
        "What moves t", "Where does t", "Which vector", "What to keep",
    ]  # fmt: skip
    assert about(answers, "Where") == "There is no answer from this: There is nothing to trace <here>."
    keep = about(answers, "What to keep")
    assert "The chapter entry failed." in keep
    assert "The chapters travel, vector, features, words and together were not asked for or not finished." in keep
    assert executive({}) == () and executive({"own": Findings()}) == ()


def test_findings_of_another_mechsteer_lose_their_chapter_alone() -> None:
    broken = known()
    del broken["words"]["effect"]
    answers = told(broken)
    assert about(answers, "Which other words") == (
        "The findings of this chapter cannot be put into sentences (KeyError: 'effect')."
    )
    assert about(answers, "How equal").startswith("Closest")


# --- pieces


def test_a_sentence_knows_its_parts_and_writes_them() -> None:
    telling = Telling("own", {"share": est(0.5), "list": [{"x": 3}], "text": "a\x00b", "none": None})
    telling.say(f"Half is {telling.percent('share', 'value')}, of {telling.cite('list', 0, 'x')}.", at="cards")
    (sentence,) = telling.sentences
    assert sentence.parts == (
        "Half is ", Cited("50 %", "own", ("share", "value"), True), ", of ", Cited("3", "own", ("list", 0, "x")), ".",
    )  # fmt: skip
    assert sentence.text == "Half is 50 %, of 3." and sentence.link == "own-cards"
    assert [text for text, _ in sentence.shown] == ["Half is ", "50\u00a0%", ", of ", "3", "."]
    assert sentence.cited[0].code == "study.findings['own'].summary['share']['value']"
    assert json.loads(json.dumps(sentence.as_json))["cited"][1] == {
        "text": "3", "chapter": "own", "path": ["list", 0, "x"],
    }  # fmt: skip
    telling.say(f"{telling.quote('text')} {telling.cite('text')} {telling.two('none')}")
    assert telling.sentences[1].text == r"'a\x00b' ab not defined"
    assert Sentence(("x",)).link is None
    with pytest.raises(KeyError):
        telling.cite("absent")


def test_as_text_keeps_numbers_whole() -> None:
    text = as_text((Answer("Why?", (Sentence(("It is 95 % of " * 20,)),)),), width=40)
    assert text.startswith("Why?\nIt is 95 %") and all(len(line) <= 40 for line in text.splitlines())
    assert not re.search(r"95\n", text) and "\u00a0" not in text
