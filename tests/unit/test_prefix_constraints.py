"""Forbidden words in any casing and split, distances against naive twins, and ids that survive as text."""

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError
from mechsteer.prefix.constraints import Constraints, edit_distance, plain, shared_tokens
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.rendering import control_tokens
from mechsteer.vocabulary import allowed_tokens, insert

WORDS = ("cat", "feline")
Load = Callable[..., ms.Model]
ids_ = st.lists(st.integers(0, 5), max_size=7)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(data_path("models", "pocket"))


def says(text: str, **options: Any) -> str | None:
    return Constraints(forbidden_words=WORDS).violation((), text, **options)


# ---- words ----


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WORDS), st.data())
def test_no_casing_and_no_split_into_tokens_hides_a_word(word: str, data: st.DataObject) -> None:
    cased = "".join(data.draw(st.sampled_from([char.lower(), char.upper()])) for char in word)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(word) - 1))))
    pieces = [cased[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)]
    # Each piece by itself, as ids, put together: what a search does, not what the tokenizer would.
    ids = tuple(i for piece in pieces for i in tokenizer().encode(piece, add_special_tokens=False))
    text = tokenizer().decode(list(ids))
    assert text == cased and Constraints(forbidden_words=WORDS).violation(ids, text)
    between = data.draw(st.sampled_from(["", " ", "-", "\N{ZERO WIDTH SPACE}", "  "]))
    left = data.draw(st.sampled_from(["", " ", "talk ", "."]))
    right = data.draw(st.sampled_from(["", " ", " talk", "."]))
    assert says(f"{left}{between.join(pieces)}{right}")


@settings(max_examples=300, deadline=None)
@given(st.text("acftelin -.", max_size=24))
def test_only_texts_that_hold_or_spell_a_word_are_refused(text: str) -> None:
    parts = text.lower().replace("-", " ").replace(".", " ").split()
    spelt = {"".join(parts[a:b]) for a in range(len(parts)) for b in range(a, len(parts) + 1)}
    expected = any(word in text or word in spelt for word in WORDS)
    assert bool(says(text)) is expected


@pytest.mark.parametrize(
    "text",
    ["Ｃａｔ", "CÁT", "c\N{SOFT HYPHEN}at", "fel\N{COMBINING ACUTE ACCENT}ine", "education", "ca ts cat", "f eline"],
)
def test_what_reads_as_the_word_is_the_word(text: str) -> None:
    assert "it says" in (says(text) or "")


@pytest.mark.parametrize("text", ["f", "eline", "c", "at the fence", "ca", "topic attic", "fe linen", "act"])
def test_innocent_pieces_stay(text: str) -> None:
    assert says(text) is None


def test_words_that_arise_only_with_the_text_around() -> None:
    assert says("talk of c") is None and says("talk of c", after="ats") == "it says 'cat'"
    assert says("eline", before="talk: F") == "it says 'feline'"
    # What the request itself says is not the prefix's doing.
    assert says("talk", before="cat ", after=" feline") is None
    whole = Constraints(forbidden_words=("cat",), whole_words=True)
    assert whole.violation((), "education cats") is None
    assert whole.violation((), "a Cat!") == "it says 'cat'"
    assert whole.violation((), "cat", after="s") is None and whole.violation((), "cat", after="\ns")
    assert whole.violation((), "c at") == "it says 'cat' in pieces"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_plain_is_the_same_for_every_casing(text: str) -> None:
    assert plain(plain(text)) == plain(text)
    assume(text.upper().lower() == text.lower())
    assert plain(text.upper()) == plain(text.lower())


# ---- distances, characters, length ----


@settings(max_examples=300, deadline=None)
@given(ids_, ids_)
def test_edit_distance_is_the_shortest_path(a: list[int], b: list[int]) -> None:
    @cache
    def naive(x: tuple[int, ...], y: tuple[int, ...]) -> int:
        if not x or not y:
            return len(x) + len(y)
        return min(naive(x[1:], y) + 1, naive(x, y[1:]) + 1, naive(x[1:], y[1:]) + (x[0] != y[0]))

    assert edit_distance(a, b) == naive(tuple(a), tuple(b))
    assert shared_tokens(a, b) == (Counter(a) & Counter(b)).total()


def test_each_limit_says_what_is_wrong() -> None:
    reference = (3, 4, 5)
    for options, ids, text, reason in (
        ({"min_edit_distance": 2, "reference": reference}, (3, 9, 5), "x", "it is 1 tokens from the reference, fewer"),
        ({"max_shared": 1, "reference": reference}, (5, 9, 3), "x", "it shares 2 tokens with the reference, more"),
        ({"min_tokens": 3}, (1,), "x", "it has 1 tokens, fewer than 3"),
        ({"max_tokens": 1}, (1, 2), "x", "it has 2 tokens, more than 1"),
        ({"characters": "ascii"}, (), "naïve", "it holds 'ï', which is not ascii"),
        ({"characters": "ascii"}, (), "a\nb", "it holds '\\n', which is not ascii"),
        ({"characters": "printable"}, (), "a\N{REPLACEMENT CHARACTER}", "which is not printable"),
        ({"characters": "latin"}, (), "naïve кот", "it holds 'к', which is not latin"),
    ):
        assert reason in (Constraints(**options).violation(ids, text) or "")
    fine = Constraints(reference=reference, min_edit_distance=2, max_shared=1, min_tokens=3, max_tokens=3)
    assert fine.violation((9, 4, 9), "кот") is None
    assert Constraints(characters="cyrillic").violation((), "кот 12!") is None


def test_allowed_tokens_are_those_that_violate_nothing_alone(zoo_models: Load) -> None:
    model = zoo_models("llama")
    every = allowed_tokens(model)
    texts = {i: model.tokenizer.decode([i]) for i in every}
    kept = Constraints(forbidden_words=("a",), characters="ascii").allowed(model)
    expected = [i for i in every if texts[i].isascii() and texts[i].isprintable() and "a" not in texts[i].lower()]
    assert kept == expected and 0 < len(kept) < len(every)
    whole = Constraints(forbidden_words=("a",), whole_words=True).allowed(model)
    assert whole == every
    reference = (every[3], every[9])
    far = set(Constraints(reference=reference, max_cosine=0.2).allowed(model))
    assert not far & set(reference) and far < set(every)
    with pytest.raises(MechsteerError, match="leaves none of the"):
        Constraints(reference=reference, max_cosine=-1.0).allowed(model)
    with pytest.raises(MechsteerError, match="token id 999 is none of"):
        Constraints(reference=(999,)).allowed(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forbidden_words": "cat"}, "forbidden_words='cat' is one string. Pass a list"),
        ({"forbidden_words": ("cat", " ")}, "forbidden_words holds ' ', which is no word"),
        ({"max_shared": 0}, "max_shared needs a reference"),
        ({"min_edit_distance": 1}, "min_edit_distance needs a reference"),
        ({"max_cosine": 0.0}, "max_cosine needs a reference"),
        ({"min_tokens": 0}, "min_tokens=0 is out of range. Pass 1 or more"),
        ({"max_shared": -1, "reference": (1,)}, "max_shared=-1 is out of range"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens=3 is above max_tokens=2"),
        ({"fluency": -1.0}, "fluency=-1.0 would reward nonsense"),
    ],
)
def test_errors_say_what_to_do(options: Any, text: str) -> None:
    with pytest.raises(MechsteerError) as caught:
        Constraints(**options)
    assert text in str(caught.value)


# ---- round trip ----

REQUESTS = ["Write a haiku on my birthday.", "eline", "s of my exam"]


def test_what_survives_is_what_encodes_again_in_every_rendered_chat() -> None:
    prompts = ms.Prompts.from_chats(REQUESTS, tokenizer(), slots=1, completions=[[9], [9, 8], [7]])
    trip, rng = RoundTrip(prompts), random.Random(0)
    vocabulary = sorted(set(range(len(tokenizer()))) - set(control_tokens(tokenizer())))
    found = Counter()
    for _ in range(150):
        ids = tuple(rng.choices(vocabulary, k=3))
        filled = insert(prompts, ids, where="prefix").without_completions()
        rows = [row[keep].tolist() for row, keep in zip(filled.tokens, filled.mask, strict=True)]
        same = [tokenizer().encode(tokenizer().decode(row), add_special_tokens=False) == row for row in rows]
        assert list(trip.survives(ids)) == same
        assert trip.near([ids])[0].survives == same[0]
        found[all(same)] += 1
        if all(same):
            again = ms.Prompts.from_chats(REQUESTS, tokenizer(), prefix=trip.text(ids))
            assert again.tokens[again.mask].tolist() == filled.tokens[filled.mask].tolist()
    assert found[True] > 20 and found[False] > 20
    user = next(iter(control_tokens(tokenizer())))
    assert not any(trip.survives((user,))) and not trip.near([(user,)])[0].survives


def prepending() -> Any:
    """Like Llama 2's: a blank behind every special token, which decoding keeps but for the first of a text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["the▁cat▁sat▁on▁the▁mat.\n▁user:▁my▁exam▁[/INST]"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{% for each in messages %}{{ bos_token }}user: {{ each['content'] }}{{ eos_token }} [/INST]{% endfor %}"
    )
    return made


def test_special_tokens_that_add_a_blank_do_not_forbid_everything() -> None:
    loaded, rng = prepending(), random.Random(0)
    requests = ["the cat", "sat on my mat.", "exam"]
    prompts = ms.Prompts.from_chats(requests, loaded, slots=1)
    # As text the whole prompt gets a second blank behind each special token.
    assert loaded.encode(loaded.decode(prompts.tokens[0]), add_special_tokens=False) != prompts.tokens[0].tolist()
    trip, found = RoundTrip(prompts), Counter()
    vocabulary = sorted(set(range(len(loaded))) - set(control_tokens(loaded)) - {loaded.unk_token_id})
    for _ in range(200):
        ids = tuple(rng.choices(vocabulary, k=2))
        filled = insert(prompts, ids, where="prefix")
        # The slots are such a token too, so that a blank follows them.
        again = ms.Prompts.from_chats(requests, loaded, prefix=trip.text(ids), separator=" \n")
        same = [
            one[keep].tolist() == other[real].tolist()
            for one, keep, other, real in zip(filled.tokens, filled.mask, again.tokens, again.mask, strict=True)
        ]
        assert list(trip.survives(ids)) == same, (ids, trip.placed(ids))
        assert trip.near([ids])[0].survives == same[0]
        found[all(same)] += 1
    assert found[True] > 20 and found[False] > 20


def test_a_prefix_is_lost_where_the_template_trims_it() -> None:
    loaded = AutoTokenizer.from_pretrained(data_path("models", "pocket"))
    ids = next(
        (i,) for i in range(len(loaded)) if loaded.decode([i]).startswith(" ") and loaded.decode([i])[1:].isalpha()
    )
    assert all(RoundTrip(ms.Prompts.from_chats(REQUESTS, loaded, slots=1)).survives(ids))
    loaded.chat_template = loaded.chat_template.replace("message['content'] }}", "message['content'] | trim }}")
    assert not any(RoundTrip(ms.Prompts.from_chats(REQUESTS, loaded, slots=1)).survives(ids))


def test_without_a_tokenizer_ids_are_all_there_is() -> None:
    trip = RoundTrip(ms.Prompts.from_ids([[1, 2, 3], [1, 2]]))
    assert trip.survives((5, 6)) == (True, True) and trip.text((5, 6)) == "5 6"
    assert [each.survives for each in trip.near([(5,), (6, 7)])] == [True, True]
