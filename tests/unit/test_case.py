"""Cases, judges and the shipped requests."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.judges import judge_of
from mechsteer.pocket.labeller import label
from mechsteer.pocket.lexicon import LOCKED, SUBJECTS, TOPICS
from mechsteer.pocket.requests import KINDS
from mechsteer.study.case import FILE, Case
from mechsteer.study.requests import make, shipped, to_jsonl
from mechsteer.study.settings import Request, Settings


def _ids(prompts: ms.Prompts) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]


# --- the case


def test_prompts_are_those_of_a_chat_and_completions_are_greedy() -> None:
    case = cases.case()
    texts = [request.text for request in cases.requests()]
    for prompts, prefix in ((case.plain, ""), (case.prefixed, cases.CATS)):
        expected = ms.Prompts.from_chats(texts, case.model, prefix=prefix)
        assert _ids(prompts) == _ids(expected)
        assert prompts.labels == tuple(texts)
    for completed, prompts in ((case.reference, case.prefixed), (case.unsteered, case.plain)):
        assert _ids(completed) == _ids(case.model.generate(prompts, max_new_tokens=8))
    assert _ids(case.with_prefix("Be calm.")) == _ids(ms.Prompts.from_chats(texts, case.model, prefix="Be calm."))
    assert repr(case) == "Case('Talk only about cats.', pocket-1l, 4 requests)"


def test_rows_are_the_halves() -> None:
    mixed = [
        Request(text=text, split=split) for text, split in (("A.", "held-out"), ("B.", "search"), ("C.", "held-out"))
    ]  # type: ignore[arg-type]
    case = cases.case(requests=mixed)
    assert (case.rows("search"), case.rows("held-out"), case.rows("all")) == ([1], [0, 2], [0, 1, 2])
    with pytest.raises(ms.MechsteerError, match=r"rows\('test'\) is no half: it is 'search', 'held-out' or 'all'"):
        case.rows("test")


def test_reference_completions_go_after_any_of_the_prompts() -> None:
    case = cases.case()
    reference = [ids[int(end) + 1 :] for ids, end in zip(_ids(case.reference), case.reference.decision, strict=True)]
    for rows, tokens in ((None, None), ([2, 0], None), ([1], 3)):
        prompts = case.plain if rows is None else case.plain[rows]
        made = case.with_reference(prompts, rows=rows, tokens=tokens)
        for got, plain, row in zip(_ids(made), _ids(prompts), rows or range(4), strict=True):
            assert got == plain + reference[row][:tokens]
    with pytest.raises(ms.MechsteerError, match=r"got 4 prompts for 2 requests. Pass as many."):
        case.with_reference(case.plain, rows=[0, 1])
    with pytest.raises(ms.MechsteerError, match=r"got tokens=0. Pass 1 or more, or None for all."):
        case.with_reference(case.plain, tokens=0)


def test_a_model_without_a_chat_template_gets_plain_text(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    texts = ["The cat", " sat on", "the mat"]
    asked = [
        Request(text=text, split=split) for text, split in zip(texts, ("search", "held-out", "search"), strict=True)
    ]  # type: ignore[arg-type]
    case = Case.of(Settings(prefix="When Mary", requests=tuple(asked), max_new_tokens=3), model=model)
    assert _ids(case.plain) == _ids(ms.Prompts.from_strings(texts, model))
    whole = ["When Mary The cat", "When Mary sat on", "When Mary the mat"]
    assert _ids(case.prefixed) == _ids(ms.Prompts.from_strings(whole, model))
    assert int(case.prefixed.span("prefix").sum()) > 0
    # A prefix that ends in a space, or a line break, gets no other.
    line = Case.of(Settings(prefix="When Mary\n", requests=tuple(asked)), model=model)
    assert _ids(line.prefixed)[0] == _ids(ms.Prompts.from_strings("When Mary\nThe cat", model))[0]
    assert set(case.reference.span("completion").sum(1).tolist()) <= {1, 2, 3}


def test_completions_are_as_long_as_the_context_allows() -> None:
    model = cases.model()
    request = " ".join(["cats"] * (model.n_ctx - 30))
    case = cases.case(
        requests=(Request(text=request, split="search"), Request(text="B.", split="held-out")), max_new_tokens=40
    )
    room = model.n_ctx - int(case.prefixed.lengths.max())
    assert 0 < room < 40
    assert case.max_new_tokens == room
    assert int(case.reference.lengths.max()) <= model.n_ctx
    for more, words in ((room, "256 tokens with the prefix"), (2 * room, "tokens")):
        with pytest.raises(
            ms.MechsteerError,
            match=rf"Request 'cats [cats ]*\.\.\.' has .*{words}.*, and the context of pocket-1l is 256: no room",
        ):
            cases.case(
                requests=(Request(text=request + " cats" * more, split="search"), Request(text="B.", split="held-out"))
            )


def test_a_contrast_has_as_many_tokens_as_the_prefix() -> None:
    assert cases.case(contrast="Talk only about trains.").settings.contrast == "Talk only about trains."
    with pytest.raises(
        ms.MechsteerError, match=r"The contrast 'Hi\.' has 3 tokens and the prefix 5: patching compares"
    ):
        cases.case(contrast="Hi.")


def test_a_special_token_in_a_text_is_refused() -> None:
    end = cases.model().tokenizer.eos_token
    with pytest.raises(ms.MechsteerError, match=re.escape(f"chat 0 holds {end!r} at character 21 of its prefix")):
        cases.case(prefix=f"{cases.CATS}{end}")


# --- completions on disk


def _stored(folder: Path, **settings: object) -> tuple[Case, list[str]]:
    told: list[str] = []
    made = Settings.of(**{"prefix": cases.CATS, "requests": cases.requests(), "max_new_tokens": 8, **settings})
    return Case.of(made, model=cases.model(), folder=folder, tell=told.append), told


def test_completions_are_generated_once_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "study"
    first, told = _stored(folder)
    assert not folder.exists()  # nothing is written before completions are asked for
    reference = _ids(first.reference)
    assert told == ["completing 4 requests with the prefix", "completing 4 requests without it"]
    stored = json.loads((folder / FILE).read_text())
    assert stored["format"] == "mechsteer.completions"
    assert stored["completions"]["texts"]["reference"] == first.reference.completions
    assert [path.name for path in folder.iterdir()] == [FILE]

    again, told = _stored(folder)
    assert _ids(again.reference) == reference and _ids(again.unsteered) == _ids(first.unsteered)
    assert told == []
    # What counts are the ids in the file: nothing was generated again.
    stored["completions"]["reference"][0] = [5, 6]
    (folder / FILE).write_text(json.dumps(stored))
    changed, _ = _stored(folder)
    assert _ids(changed.reference)[0] == _ids(first.prefixed)[0] + [5, 6]


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"prefix": "Talk only about dogs."}, "requests with the prefix"),
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"requests": cases.requests(1)}, "requests, requests with the prefix"),
    ],
)
def test_completions_of_another_study_are_refused(tmp_path: Path, settings: dict[str, object], differs: str) -> None:
    _stored(tmp_path)[0].reference  # noqa: B018
    with pytest.raises(
        ms.MechsteerError, match=rf"holds completions of another study \({differs} differ\). Choose another"
    ):
        _stored(tmp_path, **settings)[0].reference  # noqa: B018


def test_damaged_completions_are_refused(tmp_path: Path) -> None:
    _stored(tmp_path)[0].reference  # noqa: B018
    path = tmp_path / FILE
    whole = path.read_text()
    stored = json.loads(whole)
    for change, message in (
        (whole[: len(whole) // 2], "cannot be read"),
        (
            json.dumps({**stored, "format": "mechsteer.other"}),
            "has format 'mechsteer.other', expected 'mechsteer.completions'",
        ),
        (
            json.dumps({**stored, "completions": {**stored["completions"], "reference": [["x"]]}}),
            r"is damaged \(reference.0.0: .*integer",
        ),
        (
            json.dumps({**stored, "completions": {**stored["completions"], "reference": [[5]]}}),
            "with_completions got 1 completions for 4",
        ),
    ):
        path.write_text(change)
        with pytest.raises(ms.MechsteerError, match=message):
            _stored(tmp_path)[0].reference  # noqa: B018


# --- judges


def test_a_topic_is_judged_as_the_labeller_does() -> None:
    judge = judge_of(cases.CATS)
    assert judge is not None and judge.shown == "are about cats" and "kittens" in judge.words
    texts = ["The kittens purr.", "The kittens", "Kittens purr while locomotives rumble and whistle.", ""]
    assert (
        [judge(text) for text in texts]
        == [label(text).on_topic("cats") for text in texts]
        == [True, False, False, False]
    )


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("Stick to felines.", "are about cats"),
        ("WRITE ABOUT OUTER SPACE!", "are about space"),
        ("Think whiskers, claws and purr.", "are about cats"),
        ("Be gloomy.", "have the mood gloom"),
        ("Talk about cats and trains.", None),
        ("See the stars.", None),  # one word that is no name may mean anything
        ("Concatenate.", None),
        ("Once upon a time there was a cat.", None),
    ],
)
def test_the_judge_of_a_prefix(prefix: str, shown: str | None) -> None:
    judge = judge_of(prefix)
    assert (None if judge is None else judge.shown) == shown


def test_a_mood_is_judged_as_the_labeller_does() -> None:
    judge = judge_of("Be gloomy.")
    assert judge is not None and judge("Alas, the walls move in bitter grief.") and not judge("Hooray, the walls move!")
    assert "alas" in judge.words


def test_words_are_whole_words_of_any_case_and_come_before_topics() -> None:
    judge = judge_of(cases.CATS, ["cat", "big dog", "c++", "cat"])
    assert judge is not None and judge.name == "at least one of 3 words (cat, big dog, c++)"
    shown = {
        "My CAT.": True,
        "cats": False,
        "A Big Dog!": True,
        "big": False,
        "in C++, of course": True,
        "kittens purr": False,
    }
    assert {text: judge(text) for text in shown} == shown
    only = judge_of("", ["cat"])
    assert only is not None and only.shown == "hold the word cat"


# --- the shipped requests


def test_the_shipped_requests_are_made_again(tmp_path: Path) -> None:
    stored = data_path("requests", "pocket.jsonl").read_text()
    assert to_jsonl(make()) == stored
    out = tmp_path / "again.jsonl"
    command = [sys.executable, "-m", "mechsteer.study.requests", "--out"]
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert out.read_text() == stored
    failed = subprocess.run([*command, str(tmp_path / "no" / "x")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "is no folder. Make it first" in failed.stderr


def test_the_shipped_requests_are_balanced_and_new() -> None:
    rows = [json.loads(line) for line in data_path("requests", "pocket.jsonl").read_text().splitlines()]
    assert [(request.text, request.split) for request in shipped()] == [(row["text"], row["split"]) for row in rows]
    assert len({row["text"] for row in rows}) == len(rows) == 36
    for kind in {row["kind"] for row in rows}:
        halves = Counter(row["split"] for row in rows if row["kind"] == kind)
        assert halves["search"] == halves["held-out"] == (2 if kind == "" else 1)
    banned = {word for topic in (*TOPICS.values(), LOCKED) for word in (topic.name, *topic.aliases, *topic.things)}
    for row in rows:
        assert not any(f" {word}" in f" {row['text'].lower()}" for word in banned)
        if row["subject"]:
            # Its wording, with the subject taken out, is one that was held out of training.
            assert any(phrase in row["text"] for phrase in SUBJECTS[row["subject"]].phrases)
            stems = [wording.split("{about}")[0] for wording in KINDS[row["kind"]].wordings.held_out]
            assert any(row["text"].startswith(stem) for stem in stems)


def test_a_case_loads_the_model_that_the_settings_name() -> None:
    told: list[str] = []
    settings = Settings.of(
        model="pocket-1l", prefix=cases.CATS, requests=cases.requests(1), device="cpu", dtype="float64"
    )
    case = Case.of(settings, tell=told.append)
    assert told == ["loading pocket-1l"]
    assert case.model.dtype == torch.float64 and case.model.name == "pocket-1l"
