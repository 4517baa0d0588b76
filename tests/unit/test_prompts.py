"""Prompts hold exactly the ids that the tokenizer gives the whole text, one BOS, and the right role for every token."""

import time
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mechsteer.data import data_path
from mechsteer.errors import MechsteerError
from mechsteer.prompts import ROLES, Pair, Prompts

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))

# Each writes a chat in another way: with and without BOS, with and without trimming, with text around the request.
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "trims": "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\\n{% endif %}",
    "nested": "{% if messages[0]['role'] == 'system' %}{% set s = '<<' + messages[0]['content'] + '>> ' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{% if loop.first %}{% set c = s + m['content'] %}{% else %}"
    "{% set c = m['content'] %}{% endif %}{{ '[INST] ' + c.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}",
}


def byte_level(**more: Any) -> PreTrainedTokenizerFast:
    """Like GPT-2's and Llama 3's: byte-level, with offsets that leave out spaces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the cat sat on the mat.\n\nuser: assistant: [INST] hello"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", **more)


def prepending() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a normaliser that puts a space before each stretch of text between special tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["the▁cat▁sat▁on▁the▁mat.\nuser:▁assistant:▁[INST]▁hello"] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def pocket() -> Any:
    return AutoTokenizer.from_pretrained(data_path("models", "pocket"))


@cache
def make(name: str) -> Any:
    if name == "pocket":
        return pocket()
    return (
        {"bytes": byte_level, "prepends": prepending}[name]()
        if name in ("bytes", "prepends")
        else zoo.build_tokenizer(name)
    )


KINDS = ("pocket", "llama", "gpt2", "qwen3", "bytes", "prepends")
kinds = pytest.mark.parametrize("kind", KINDS)
templates = pytest.mark.parametrize("template", TEMPLATES)


def with_template(kind: str, template: str) -> Any:
    tokenizer = make(kind)
    if kind != "pocket":
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


# Pieces that look like the template, like the special tokens, or join with what stands next to them.
pieces = st.sampled_from(
    [
        "cat",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "🙂",
        "user: ",
        "assistant:",
        "[INST]",
        "]\n",
        "\u00a0",
        ".",
        "Zq0text0qZ",
        "{{ 1 }}",
    ]
)
hostile = st.sampled_from(
    ["<s>", "</s>", "<pad>", "<unk>", "<|bos|>", "<|user|>", "<|assistant|>", "<|pad|>", "<s", ">"]
)
texts = st.lists(pieces | st.text(max_size=5), max_size=6).map("".join)
hostile_texts = st.lists(pieces | hostile, max_size=5).map("".join)
sides = st.sampled_from(["left", "right"])


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def ids_of(prompts: Prompts, row: int = 0) -> list[int]:
    return prompts.tokens[row][prompts.mask[row]].tolist()


def roles_of(prompts: Prompts, row: int = 0) -> list[str]:
    return [ROLES[role] for role in prompts.roles[row][prompts.mask[row]].tolist()]


def special_in(text: str, tokenizer: Any) -> bool:
    return any(token.content in text for token in tokenizer.added_tokens_decoder.values())


def same(a: Prompts, b: Prompts) -> bool:
    """Same tokens, mask, roles and slots, whatever stands at padding."""
    a, b = a.padded("right"), b.padded("right")
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("tokens", "roles", "slots")]
    return torch.equal(a.mask, b.mask) and all(torch.equal(x[a.mask], y[b.mask]) for x, y in pairs)


# Strings


@kinds
@quick
@given(texts=st.lists(texts | hostile_texts, min_size=1, max_size=4), padding=sides, twice=st.booleans())
def test_strings_are_tokenised_whole_with_one_bos(kind: str, texts: list[str], padding: Any, twice: bool) -> None:
    tokenizer = make(kind)
    bos = tokenizer.bos_token or ""
    given_texts = [bos + text for text in texts] if twice else texts
    bodies = [text.removeprefix(bos) for text in given_texts]
    if any(special_in(body, tokenizer) for body in bodies):
        with pytest.raises(MechsteerError, match="which the tokenizer reads as a special token"):
            Prompts.from_strings(given_texts, tokenizer)
    elif not bos and "" in bodies:
        with pytest.raises(MechsteerError, match="has no tokens"):
            Prompts.from_strings(given_texts, tokenizer)
    else:
        prompts = Prompts.from_strings(given_texts, tokenizer, padding=padding)
        first = [tokenizer.bos_token_id] if bos else []
        for row, body in enumerate(bodies):
            ids = plain_ids(body, tokenizer)
            assert ids_of(prompts, row) == first + ids
            assert roles_of(prompts, row) == ["scaffold"] * len(first) + ["user"] * len(ids)
        if "" not in bodies:
            without = Prompts.from_strings(given_texts, tokenizer, padding=padding, prepend_bos=False)
            assert [ids_of(without, row) for row in range(len(texts))] == [
                plain_ids(body, tokenizer) for body in bodies
            ]


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_the_tokenizers_own_bos_is_the_only_one(architecture: str) -> None:
    tokenizer = zoo.build_tokenizer(architecture)
    ids = ids_of(Prompts.from_strings("The cat", tokenizer))
    if architecture in zoo.PREPENDS_BOS:
        assert ids == tokenizer("The cat").input_ids
    assert ids.count(tokenizer.bos_token_id) == (0 if architecture == "qwen3" else 1)


def test_a_prefix_stands_between_bos_and_the_text() -> None:
    prompts = Prompts.from_strings("<|bos|> sat on the mat", pocket(), prefix="The cat")
    assert ids_of(prompts) == ids_of(Prompts.from_strings("The cat sat on the mat", pocket()))
    roles = roles_of(prompts)
    assert roles == ["scaffold", "prefix", "prefix", *["user"] * (len(roles) - 3)]


# Chats


def oracle(parts: list[tuple[str, str]], tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and roles of a text whose pieces are known, from the role of each token's first character that shows."""
    text = "".join(part for part, _ in parts)
    owner = [role for part, role in parts for _ in part]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    roles = []
    for start, end in encoded.offset_mapping:
        solid = [at for at in range(start, end) if text[at].strip()]
        roles.append(owner[solid[0] if solid else start if end > start else start - 1])
    return encoded.input_ids, roles


@quick
@given(prefix=texts, request=texts, separator=st.sampled_from(["\n", " ", "", "\n\n"]))
def test_chat_of_the_pocket_model(prefix: str, request: str, separator: str) -> None:
    prompts = Prompts.from_chats([request], pocket(), prefix=prefix, separator=separator)
    between = separator if prefix else ""
    parts = [("<|bos|><|user|>", "scaffold"), (prefix, "prefix"), (between, "scaffold"), (request, "user")]
    ids, roles = oracle([*parts, ("<|assistant|>", "scaffold")], pocket())
    assert (ids_of(prompts), roles_of(prompts)) == (ids, roles)


@kinds
@templates
@quick
@given(
    prefix=texts,
    requests=st.lists(texts, min_size=1, max_size=3),
    history=texts.filter(str.strip),  # a blank turn makes "nested" trim its own brackets
    system=st.none() | texts,
    padding=sides,
)
def test_chats_are_tokenised_whole(
    kind: str, template: str, prefix: str, requests: list[str], history: str, system: str | None, padding: Any
) -> None:
    tokenizer = with_template(kind, template)
    messages = [{"role": "user", "content": history}, {"role": "assistant", "content": "Hello."}]
    if system is not None and kind != "pocket":
        messages.insert(0, {"role": "system", "content": system})
    chats = [[*messages, {"role": "user", "content": request}] for request in requests]
    prompts = Prompts.from_chats(chats, tokenizer, prefix=prefix, padding=padding)
    for row, request in enumerate(requests):
        content = f"{prefix}\n{request}" if prefix else request
        whole = [*messages, {"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        expected = plain_ids(rendered, tokenizer)
        if tokenizer.bos_token and not rendered.startswith(tokenizer.bos_token):
            expected = [tokenizer.bos_token_id, *expected]
        assert ids_of(prompts, row) == expected
        roles = roles_of(prompts, row)
        assert roles.count("user") >= bool(request.strip()) + bool(history.strip())
        assert bool(prefix.strip()) <= ("prefix" in roles) <= bool(prefix)
        order = [role for role in roles[::-1] if role in ("prefix", "user")]
        assert order == sorted(order, key=("user", "prefix").index) or "prefix" in order


# Not "prepends": its tokens run across words and line ends, so that text may belong to the span before.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prepends"])
@templates
@quick
@given(
    prefix=st.sampled_from(["cats", "Talk only about cats.", "assistant:", "[INST]", "user: cat"]),
    request=st.sampled_from(["Hi", "cats", "user: cats", "Talk only about cats.", "[INST] cats [/INST]", "]\ncats"]),
    space=st.sampled_from(["", " ", "\n", " \n "]),
)
def test_spans_hold_the_text_that_was_given(kind: str, template: str, prefix: str, request: str, space: str) -> None:
    tokenizer = with_template(kind, template)
    prompts = Prompts.from_chats(f"{space}{request}{space}", tokenizer, prefix=f"{space}{prefix}")

    def text(role: str) -> str:
        keep = prompts.span(role)[0]
        # A separator that joins the request's first token shows as leading space.
        return tokenizer.decode(prompts.tokens[0][keep]).replace("▁", " ").strip()

    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids_of(prompts)
    if not unknown:
        assert (text("prefix"), text("user")) == (prefix.strip(), request.strip())


def test_earlier_turns_of_the_user_are_user_and_the_rest_is_scaffold() -> None:
    chat = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Who are you?")]
    prompts = Prompts.from_chats([[{"role": role, "content": text} for role, text in chat]], pocket())
    said = "".join(
        token for token, role in zip(prompts.str_tokens(0), roles_of(prompts), strict=True) if role == "user"
    )
    assert said == "HelloWho are you?"
    assert roles_of(prompts).count("completion") == 0


@kinds
@quick
@given(text=hostile_texts, where=st.sampled_from(["request", "prefix", "history", "completion"]))
def test_text_never_becomes_a_special_token(kind: str, text: str, where: str) -> None:
    tokenizer = with_template(kind, "plain")
    history = [
        {"role": "user", "content": text if where == "history" else "Hi"},
        {"role": "assistant", "content": "Hi"},
    ]
    chat = [*history, {"role": "user", "content": text if where == "request" else "Hello"}]
    prefix = text if where == "prefix" else ""

    def build() -> Prompts:
        prompts = Prompts.from_chats([chat], tokenizer, prefix=prefix)
        return prompts.with_completions([text]) if where == "completion" else prompts

    if special_in(text, tokenizer):
        role = {"request": "user", "history": "user"}.get(where, where)
        with pytest.raises(MechsteerError, match=f"0 holds '.*' at character [0-9]+ of its {role} text.*Take it out"):
            build()
    else:
        special = {token.content for token in tokenizer.added_tokens_decoder.values()} - {tokenizer.unk_token}
        prompts, role = build(), torch.zeros(1)
        role = ~prompts.span("scaffold")[0]
        names = tokenizer.convert_ids_to_tokens(prompts.tokens[0][role].tolist())
        assert not special & set(names)


def test_added_tokens_that_the_template_writes_are_special_too() -> None:
    tokenizer = byte_level(chat_template="<think>{{ messages[0]['content'] }}</think>")
    tokenizer.add_tokens(["<think>", "</think>", "<table>"])
    with pytest.raises(MechsteerError, match="chat 0 holds '</think>' at character 3 of its user text"):
        Prompts.from_chats("Hi </think>", tokenizer)
    assert "<table>" in Prompts.from_chats("Hi <table>", tokenizer).str_tokens(0)


def test_a_thousand_chats_take_less_than_a_second() -> None:
    requests = [f"What should I cook for dinner {n}? Give me three ideas." for n in range(1000)]
    start = time.perf_counter()
    Prompts.from_chats(requests, pocket(), prefix="Talk only about cats.")
    assert time.perf_counter() - start < 2  # typed shapes are checked here; without that it is well under one


# Slots


@kinds
@templates
@quick
@given(texts=st.lists(texts, min_size=1, max_size=3), k=st.integers(1, 4), padding=sides, data=st.data())
def test_slots_stand_for_a_prefix(kind: str, template: str, texts: list[str], k: int, padding: Any, data: Any) -> None:
    tokenizer = with_template(kind, template)
    chats = Prompts.from_chats(texts, tokenizer, slots=k, padding=padding)
    strings = Prompts.from_strings(texts, tokenizer, slots=k, padding=padding)
    for prompts in (chats, strings):
        assert prompts.n_slots == k
        assert torch.equal(prompts.slots, prompts.span("prefix"))
        assert bool((prompts.tokens[prompts.slots] == (tokenizer.pad_token_id or 0)).all())
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    for row, text in enumerate(texts):
        slots = [tokenizer.pad_token_id or 0] * k
        assert ids_of(strings, row) == bos + slots + plain_ids(text, tokenizer)

    ids = data.draw(st.lists(st.integers(4, 60), min_size=k, max_size=k))
    block = torch.tensor([[token + row for token in ids] for row in range(len(texts))])
    for filled, expected in (
        (chats.with_prefix(ids), block[:1].expand(len(texts), k)),
        (chats.with_prefix(block), block),
    ):
        assert filled.n_slots == 0
        assert torch.equal(filled.tokens[filled.span("prefix")].view(-1, k), expected)
        assert torch.equal(filled.tokens[~chats.slots], chats.tokens[~chats.slots])
        assert torch.equal(filled.roles, chats.roles)


def test_a_filled_prefix_equals_the_same_text() -> None:
    prefix = "Talk only about cats."
    requests = ["What should I cook for dinner?", "Hi"]
    ids = plain_ids(prefix, pocket())
    filled = Prompts.from_chats(requests, pocket(), slots=len(ids)).with_prefix(ids)
    assert same(filled, Prompts.from_chats(requests, pocket(), prefix=prefix))
    assert filled.hash == Prompts.from_chats(requests, pocket(), prefix=prefix).hash
    assert filled.hash != Prompts.from_chats(requests, pocket(), slots=len(ids)).hash


@pytest.mark.parametrize("padding", ["left", "right"])
def test_another_prefix_in_the_place_of_one(padding: str) -> None:
    requests = ["What should I cook for dinner?", "Hi"]
    cats, trains = (
        Prompts.from_chats(requests, pocket(), prefix=f"Talk only about {topic}.", padding=padding)
        for topic in ("cats", "trains")
    )
    assert same(cats.with_prefix(plain_ids("Talk only about trains.", pocket())), trains)
    with pytest.raises(MechsteerError, match="with_prefix got 2 ids for each of 2 prompts, where 2 prompts have 5"):
        cats.with_prefix([5, 6])


def test_slots_of_unlike_number() -> None:
    parts = [Prompts.from_strings("Hi", pocket(), slots=k) for k in (1, 2)]
    with pytest.raises(MechsteerError, match=r"prompts have \[1, 2\] slots each; take those with equal numbers apart"):
        _ = Prompts.concat(parts).n_slots


@pytest.mark.parametrize(
    ("slots", "ids", "text"),
    [
        (0, [5], r"with_prefix needs prompts with slots. Make them with slots="),
        (2, [5], r"with_prefix got 1 ids for each of 2 prompts, where 2 prompts have 2 slots each. Pass 2 ids"),
        (2, [[5, 6], [5]], r"with_prefix got 1 or 2 ids for each of 2 prompts"),
        (2, torch.tensor([[5, 6]]), r"with_prefix got 2 ids for each of 1 prompts"),
        (2, [5, 4000], r"prefix 0 has the id 4000, but the tokenizer's ids run from 0 to 3071"),
    ],
)
def test_prefixes_that_do_not_fit(slots: int, ids: Any, text: str) -> None:
    prompts = Prompts.from_strings(["Hi", "Hello"], pocket(), slots=slots)
    with pytest.raises(MechsteerError, match=text):
        prompts.with_prefix(ids)


@pytest.mark.parametrize(("slots", "prefix"), [(-1, ""), (2, "Hi")])
def test_slots_or_a_prefix(slots: int, prefix: str) -> None:
    for build in (Prompts.from_strings, Prompts.from_chats):
        with pytest.raises(MechsteerError, match=f"slots={slots} with prefix='{prefix}'.*Pass slots=, or prefix="):
            build(["Hi"], pocket(), slots=slots, prefix=prefix)


def test_slots_need_a_special_token() -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["a b"], trainers.BpeTrainer(show_progress=False))
    with pytest.raises(MechsteerError, match="slots need a tokenizer with at least one special token"):
        Prompts.from_strings("a", PreTrainedTokenizerFast(tokenizer_object=bpe), slots=1)


# Ids


id_rows = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=8), min_size=1, max_size=5)


@quick
@given(rows=id_rows, padding=sides, pad_id=st.integers(0, 5), data=st.data())
def test_ids_stay_as_they_are(rows: list[list[int]], padding: Any, pad_id: int, data: Any) -> None:
    prompts = Prompts.from_ids(rows, pad_id=pad_id, padding=padding)
    assert [ids_of(prompts, row) for row in range(len(rows))] == rows
    assert prompts.lengths.tolist() == [len(row) for row in rows]
    assert prompts.padding_side == (padding if len({len(row) for row in rows}) > 1 else "right")
    assert bool((prompts.tokens[~prompts.mask] == pad_id).all())
    for row, length in enumerate(map(len, rows)):
        assert prompts.positions[row][prompts.mask[row]].tolist() == list(range(length))
    assert bool((prompts.positions[~prompts.mask] == -1).all())
    # The same rows as a block with padding anywhere around them.
    width = max(map(len, rows)) + 2
    starts = [data.draw(st.integers(0, width - len(row))) for row in rows]
    block, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for n, (row, start) in enumerate(zip(rows, starts, strict=True)):
        block[n, start : start + len(row)], mask[n, start : start + len(row)] = torch.tensor(row), 1
    for given_mask in (mask, mask.bool()):
        again = Prompts.from_ids(block, mask=given_mask, padding=padding)
        assert same(again, prompts)
        assert again.tokens.shape == prompts.tokens.shape


def test_ids_with_a_tokenizer_get_no_bos_but_know_one() -> None:
    prompts = Prompts.from_ids([[0, 900, 0], [900, 901]], tokenizer=SimpleNamespace(tokenizer=pocket()))
    assert (ids_of(prompts), ids_of(prompts, 1)) == ([0, 900, 0], [900, 901])
    assert (roles_of(prompts), roles_of(prompts, 1)) == (["scaffold", "user", "user"], ["user", "user"])


@quick
@given(rows=id_rows, data=st.data())
def test_padding_changes_nothing(rows: list[list[int]], data: Any) -> None:
    n = len(rows)
    completions = data.draw(st.lists(st.lists(st.integers(0, 500), max_size=4), min_size=n, max_size=n))
    right = Prompts.from_ids(rows, completions=completions)
    left = Prompts.from_ids(rows, completions=completions, padding="left")
    assert left.hash == right.hash == left.padded("right").hash == right.padded("left").hash
    assert same(left, right)
    assert torch.equal(left.padded("right").tokens, right.tokens)
    assert left.padded("left") is left
    assert left.lengths.tolist() == right.lengths.tolist()
    assert left.decision.tolist() == right.decision.tolist() == [len(row) - 1 for row in rows]
    for name in ROLES:
        assert torch.equal(left.tokens[left.span(name)], right.tokens[right.span(name)])
    at = torch.tensor(
        [
            data.draw(st.integers(-len(row), len(row) + len(more) - 1))
            for row, more in zip(rows, completions, strict=True)
        ]
    )
    for prompts in (left, right):
        picked = [
            [*row, *more][n] if n >= 0 else row[n] for row, more, n in zip(rows, completions, at.tolist(), strict=True)
        ]
        assert prompts.tokens[prompts.at(at)].tolist() == picked
        assert torch.equal(prompts.positions[prompts.at(-1)], prompts.decision)
        assert not bool((prompts.span("user") & prompts.span("completion")).any())


@quick
@given(rows=id_rows, data=st.data())
def test_selecting_and_joining(rows: list[list[int]], data: Any) -> None:
    prompts = Prompts.from_ids(rows, labels=[f"p{n}" for n in range(len(rows))], padding=data.draw(sides))
    picked = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), min_size=1, max_size=6))
    some = prompts[picked]
    assert [ids_of(some, row) for row in range(len(picked))] == [rows[n] for n in picked]
    assert some.labels == tuple(prompts.labels[n] for n in picked)
    assert some.tokens.shape[1] == prompts.tokens.shape[1]
    assert torch.equal(prompts[torch.tensor(picked)].tokens, some.tokens)
    joined = Prompts.concat(list(prompts))
    assert same(joined, prompts)
    assert (joined.hash, joined.labels) == (prompts.hash, prompts.labels)
    cut = data.draw(st.integers(1, len(rows)))
    halves = [half for half in (slice(0, cut), slice(cut, None)) if rows[half]]
    parts = [prompts[half].padded(data.draw(sides)) for half in halves]
    assert same(Prompts.concat(parts), prompts)
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[picked] = True
    assert len(prompts[chosen]) == len({n % len(rows) for n in picked})


def test_hash_tells_prompts_apart() -> None:
    base = Prompts.from_ids([[5, 6], [7]])
    others = [[[5, 6], [8]], [[5, 6], [7, 0]], [[5, 6]], [[7], [5, 6]], [[5], [6, 7]], [[5, 6], [7], [7]]]
    assert len({base.hash, *(Prompts.from_ids(rows).hash for rows in others)}) == len(others) + 1
    assert base.hash == Prompts.from_ids([[5, 6], [7]], pad_id=9, labels=["a", "b"]).hash


def test_joining_keeps_the_rest() -> None:
    labelled = Prompts.from_ids([[1, 2]], labels=["a"])
    assert Prompts.concat([labelled, Prompts.from_ids([[3]])]).labels == ("a", "")
    text = Prompts.from_strings("Hi there", pocket(), padding="left")
    both = Prompts.concat([Prompts.from_ids([[5]]), text])
    assert (both.tokenizer, both.labels) == (pocket(), ())
    with pytest.raises(MechsteerError, match="prompts of different tokenizers"):
        Prompts.concat([text, Prompts.from_strings("Hi", make("llama"))])
    with pytest.raises(MechsteerError, match=r"Prompts.concat got an empty list. Pass at least one Prompts."):
        Prompts.concat([])
    assert both.to("meta").tokens.device.type == "meta"


# Completions


@kinds
@quick
@given(texts=st.lists(texts, min_size=1, max_size=3), padding=sides, data=st.data())
def test_completions_come_last(kind: str, texts: list[str], padding: Any, data: Any) -> None:
    tokenizer = with_template(kind, "plain")
    completions = [data.draw(st.sampled_from([" cat", "The cat sat on the mat.", "é", "", "\n"])) for _ in texts]
    bare = Prompts.from_chats(texts, tokenizer, padding=padding)
    prompts = Prompts.from_chats(texts, tokenizer, completions=completions, padding=padding)
    for row, completion in enumerate(completions):
        assert ids_of(prompts, row) == ids_of(bare, row) + plain_ids(completion, tokenizer)
        assert roles_of(prompts, row)[len(ids_of(bare, row)) :] == ["completion"] * len(
            plain_ids(completion, tokenizer)
        )
    assert prompts.decision.tolist() == (bare.lengths - 1).tolist()
    assert same(prompts.without_completions(), bare)
    assert same(bare.with_completions([" other"] * len(texts)).with_completions(completions), prompts)
    ids = [plain_ids(completion, tokenizer) for completion in completions]
    assert same(bare.with_completions(ids), prompts)
    block = Prompts.from_ids([[0, *row] for row in ids])
    assert same(bare.with_completions(block.tokens[:, 1:], mask=block.mask[:, 1:]), prompts)


def test_texts() -> None:
    prompts = Prompts.from_chats(
        ["Hi"], pocket(), prefix="Be brief.", completions=[[*plain_ids("Yes, cats.", pocket()), 1]]
    )
    assert prompts.texts == ["<|bos|><|user|>Be brief.\nHi<|assistant|>Yes, cats.<|eos|>"]
    assert prompts.completions == ["Yes, cats."]
    assert "".join(prompts.str_tokens(0)) == prompts.texts[0]
    assert prompts.padded("left").str_tokens(0) == prompts.str_tokens(0)
    assert "".join(Prompts.from_strings("The cat sat", make("llama")).str_tokens(0)) == "<s> The cat sat"


# Pairs


def test_pairs_tell_where_they_differ() -> None:
    clean = Prompts.from_strings(["When Mary gave it to John", "Hi Mary"], pocket(), padding="left")
    corrupt = Prompts.from_strings(["When John gave it to John", "Hi John"], pocket())
    pair = clean.paired(corrupt)
    assert isinstance(pair, Pair)
    assert pair.clean.padding_side == pair.corrupt.padding_side == "right"
    assert torch.equal(pair.differs, pair.clean.mask & (pair.clean.tokens != pair.corrupt.tokens))
    differing = [pair.clean.str_tokens(row)[at] for row, at in pair.differs.nonzero().tolist()]
    assert differing == [" Mary", " Mary"]


def test_pairs_that_do_not_align() -> None:
    clean = Prompts.from_chats(["Hi Mary", "Hello there Mary"], pocket())
    corrupt = Prompts.from_chats(["Hi John", "Hello Mary\n\n"], pocket())
    with pytest.raises(MechsteerError) as caught:
        clean.paired(Prompts.from_chats(["Hi John", "Hello"], pocket()))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("pair 1 does not align: clean has 6 tokens, and at position 3 of [..['<|bos|>', ")
    assert "' there' is user; corrupt has 4 tokens, and at position 3 of " in text
    assert "'<|assistant|>' is scaffold. Choose words with equal numbers of tokens" in text
    assert clean[:1].paired(corrupt[:1]).differs.any()
    with pytest.raises(MechsteerError, match=r"at position 3 of \[\.\.\['0', '5', '6'\]\.\.\] it has ended"):
        Prompts.from_ids([[0, 5, 6, 7]]).paired(Prompts.from_ids([[0, 5, 6]]))
    with pytest.raises(MechsteerError, match=r"paired got 1 corrupt prompts for 2 clean ones. Pass as many"):
        clean.paired(corrupt[0])
    with pytest.raises(MechsteerError, match=r"pair 1 is the same prompt twice: \['<|bos|>'.*Change one of them"):
        clean.paired(Prompts.from_chats(["Hi John", "Hello there Mary"], pocket()))


# What a notebook shows


def test_repr() -> None:
    prompts = Prompts.from_chats(["Hi there", "Hello"], pocket(), slots=3, padding="left")
    longest = int(prompts.lengths.max())
    assert repr(prompts) == f"Prompts(2 of at most {longest} tokens: scaffold, prefix, user with slots; left padding)"


def test_html_is_harmless() -> None:
    text = "<script>alert(1)</script>\n\u202eevil\" onmouseover='x"
    prompts = Prompts.from_chats([text] * 23, pocket(), slots=1, labels=["<b>&"] * 23)
    page = prompts._repr_html_()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "<b>&lt;b&gt;&amp;</b>" in page
    assert "\\n" in page
    assert 'title="position 2, prefix, slot"' in page
    assert page.count("<b>&lt;b&gt;") == 20
    assert "and 3 more" in page
    # Every quote and bracket is of our own making.
    assert page.count('"') == 2 * (page.count("title=") + page.count("style="))
    assert page.count("<span") == page.count("</span>")
    ids = Prompts.from_ids([[5, 6]])._repr_html_()
    assert ">5</span>" in ids
    assert "more" not in ids


# Errors


def error_cases() -> list[tuple[Any, str]]:
    hi = Prompts.from_strings(["Hi", "Hello there"], pocket())
    return [
        (lambda: Prompts.from_strings([], pocket()), "Prompts got an empty list. Pass at least one prompt."),
        (lambda: Prompts.from_chats([], pocket()), "Prompts got an empty list"),
        (lambda: Prompts.from_ids([]), "Prompts got an empty list"),
        (lambda: hi[[]], "Prompts got an empty list"),
        (lambda: Prompts.from_ids([[5], []]), "prompt 1 has no tokens. Leave it out, or give it a BOS token."),
        (lambda: Prompts.from_strings(["Hi", ""], pocket(), prepend_bos=False), "prompt 1 has no tokens"),
        (lambda: Prompts.from_ids([[5], [-2]]), "prompt 1 has the id -2, but ids count from 0"),
        (
            lambda: Prompts.from_ids([[5, 3072]], tokenizer=pocket()),
            "prompt 0 has the id 3072, but the tokenizer's ids run from 0 to 3071. Use the model's own tokenizer.",
        ),
        (
            lambda: Prompts.from_ids(torch.ones(2, 3).long(), mask=torch.tensor([[1, 1, 0], [1, 0, 1]])),
            "the mask of prompt 1 has a hole. Mark one unbroken run of tokens in each row.",
        ),
        (
            lambda: Prompts.from_ids(torch.ones(2, 3).long(), mask=torch.ones(2, 2).bool()),
            r"prompt ids have shape \(2, 3\) and their mask \(2, 2\). Pass a mask with one entry for each id.",
        ),
        (
            lambda: Prompts.from_ids([[1]], mask=torch.ones(1, 1).bool()),
            "mask= goes with a tensor, but the prompt ids are lists. Leave the mask out.",
        ),
        (lambda: Prompts.from_ids([[5]], labels=["a", "b"]), "got 2 labels for 1 prompts. Pass one label per prompt"),
        (lambda: hi.span("system"), r"span\('system'\) does not exist.*one of scaffold, prefix, user, completion"),
        (lambda: hi.padded("middle"), "padding 'middle' is no side: it is 'left' or 'right'"),
        (lambda: hi.at(3), r"position 3 is outside prompt 0, which has 3 tokens, 3 of them before its completion"),
        (
            lambda: hi.with_completions([[5, 6], [5, 6]]).at(torch.tensor([3, -4])),
            r"position -4 is outside prompt 1, which has 5 tokens, 3 of them before.*Positions count from 0",
        ),
        (lambda: hi.with_completions(["a"]), "with_completions got 1 completions for 2 prompts. Pass a list"),
        (lambda: hi.with_completions("ab"), "with_completions got one string for 2 prompts"),
        (lambda: hi.with_completions([[5], [9999]]), "completion 1 has the id 9999, but the tokenizer's ids"),
        (lambda: Prompts.from_ids([[5]]).with_completions(["a"]), "with_completions got no tokenizer. Pass the"),
        (lambda: Prompts.from_strings("Hi", None), "Prompts.from_strings got no tokenizer. Pass the model's"),
        (lambda: Prompts.from_chats("Hi", SimpleNamespace(tokenizer=None)), "Prompts.from_chats got no tokenizer"),
        (
            lambda: Prompts.from_strings("Hi", SimpleNamespace(is_fast=False)),
            "got a SimpleNamespace, which cannot say where in a text its tokens are. Pass a fast tokenizer",
        ),
        (lambda: Prompts.from_ids([[5]]).texts, "prompts of ids without a tokenizer have no text. Pass tokenizer="),
        (lambda: Prompts.from_ids([[5]]).completions, "without a tokenizer have no text"),
        (lambda: Prompts.from_ids([[5]]).str_tokens(0), "without a tokenizer have no text"),
        (lambda: Prompts.from_chats("Hi", zoo.build_tokenizer("llama")), "has no chat template.*Prompts.from_strings"),
        (lambda: Prompts.from_chats([[]], pocket()), "chat 0 has no messages, but the last message must be the user's"),
        (
            lambda: Prompts.from_chats(["Hi", [{"role": "assistant", "content": "Yes"}]], pocket()),
            "chat 1 ends with a message of the assistant.*Pass what the assistant says as completions=",
        ),
        (
            lambda: Prompts.from_chats([{"role": "user", "content": ["Hi"]}], pocket()),
            r"chat 0 has the message \{.*\}, but a message is.*Pass ids for anything else",
        ),
        (lambda: Prompts.from_chats([{"role": "user|>", "content": "Hi"}], pocket()), "with a one-word role"),
        (
            lambda: Prompts.from_chats([{"role": "tool", "content": ""}, {"role": "user", "content": ""}], pocket()),
            "the chat template refuses a chat: roles are system, user and assistant, not tool. Change the messages'",
        ),
        (
            lambda: Prompts.from_chats("Hi", byte_level(chat_template="{{ messages[0]['content'] | upper }}")),
            "the chat template leaves out, repeats or reorders the messages of a chat of user",
        ),
        (
            lambda: Prompts.from_chats("a b", byte_level(chat_template="{{ messages[0].content.replace(' ', '') }}")),
            "the chat template changes what chat 0 says by more than trimming it",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("act", "text"), error_cases())
def test_errors_say_what_to_do(act: Any, text: str) -> None:
    with pytest.raises(MechsteerError, match=text) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_path("models", "pocket"))
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=9, pad_id=2, pad_token="<|pad|>", direction="left")
    backend.enable_truncation(max_length=3)
    backend.encode_special_tokens = True
    before = (backend.to_str(), backend.encode_special_tokens, tokenizer.padding_side, dict(tokenizer.init_kwargs))
    warned = dict(getattr(tokenizer, "deprecation_warnings", {}))
    prompts = Prompts.from_chats(
        ["Hello there, who are you? " * 60, "Hi"], tokenizer, slots=2, completions=["a", "b c"]
    )
    assert same(
        prompts,
        Prompts.from_chats(["Hello there, who are you? " * 60, "Hi"], pocket(), slots=2, completions=["a", "b c"]),
    )
    assert (
        backend.to_str(),
        backend.encode_special_tokens,
        tokenizer.padding_side,
        dict(tokenizer.init_kwargs),
    ) == before
    assert dict(getattr(tokenizer, "deprecation_warnings", {})) == warned
