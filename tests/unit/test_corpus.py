"""Tokenizer, documents and packing: what the model sees is what the chat template renders, once, and nothing leaks."""

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mechsteer.backends.causal_lm import new_llama
from mechsteer.pocket.corpus import (
    IGNORED,
    TEXT_MIXTURE,
    Document,
    batch_loss,
    chat_ids,
    pack,
    repeated_tokens,
    sample_batch,
    sample_documents,
)
from mechsteer.pocket.lexicon import NAMES, TOPICS
from mechsteer.pocket.tokenizer import ASSISTANT, BOS, EOS, N_CTX, SPECIAL_TOKENS, USER, VOCAB_SIZE


def batch(tokenizer: Any, step: int = 0, **options: Any):
    return sample_batch(tokenizer, seed="test", step=step, rows=4, row_length=N_CTX, **options)


def test_vocabulary(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert [tokenizer.decode([i]) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert all(len(tokenizer.tokenize(f" {name}")) == 1 for name in NAMES)
    for topic in TOPICS.values():
        pieces = [len(tokenizer.tokenize(f" {word}")) for word in topic.content_words]
        assert pieces.count(1) >= 15, topic.name
        assert sum(count > 1 for count in pieces) >= 15, "many words of a topic are several tokens"


@pytest.mark.parametrize("text", ["Talk only about cats.", "  spaces  ", "Ünïcödé 猫 🐈", "a\n\nb", "", "CATS felines"])
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[:1] == [tokenizer.bos_token_id], "plain text gets BOS"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template(tokenizer: Any) -> None:
    def render(*messages: tuple[str, str], **options: Any) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)

    assert render(("user", "Hi"), add_generation_prompt=True) == f"{BOS}{USER}Hi{ASSISTANT}"
    assert render(("system", "Be calm."), ("user", "Hi")) == f"{BOS}{USER}Be calm.\nHi"
    two_turns = render(("user", "Hi"), ("assistant", "Yes"), ("user", "So?"), add_generation_prompt=True)
    assert two_turns == f"{BOS}{USER}Hi{ASSISTANT}Yes{EOS}{USER}So?{ASSISTANT}"
    assert render(("user", "<b>{{ 7*7 }}</b>")) == f"{BOS}{USER}<b>{{{{ 7*7 }}}}</b>"
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        render(("tool", "x"))
    assert chat_ids(tokenizer, "Hi").count(tokenizer.bos_token_id) == 1


def test_training_chats_are_what_the_template_renders(tokenizer: Any) -> None:
    documents = sample_documents(random.Random(0), tokenizer, 100, mixture={"chat with a topic instruction": 1.0})
    for document in documents:
        text = tokenizer.decode(list(document.ids))
        user, completion = text.removeprefix(BOS + USER).removesuffix(EOS).split(ASSISTANT)
        assert [*chat_ids(tokenizer, user), *tokenizer.encode(completion)[1:], tokenizer.eos_token_id] == [
            *document.ids
        ]


def test_batches_depend_on_seed_and_step_alone(tokenizer: Any) -> None:
    one, again, other = batch(tokenizer), batch(tokenizer), batch(tokenizer, step=1)
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, other.ids)
    assert (one.document >= 0).float().mean() > 0.9, "rows are nearly full"


def test_packing_keeps_documents_apart(tokenizer: Any) -> None:
    documents = [Document((1, 7, 8, 2)), Document((1, 9, 9, 9, 9, 2), loss_from=3), Document((1, 5, 2))]
    packed, used = pack(documents, rows=2, row_length=8, pad=0)
    assert used == 3
    assert packed.ids.tolist() == [[1, 7, 8, 2, 1, 5, 2, 0], [1, 9, 9, 9, 9, 2, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 0]]
    i = IGNORED
    assert packed.labels.tolist() == [[7, 8, 2, i, 5, 2, i, i], [i, i, 9, 9, 2, i, i, i]]
    mask = packed.attention_mask()[0, 0]
    assert mask[6].tolist() == [False] * 4 + [True] * 3 + [False]
    assert mask[1].tolist() == [True, True] + [False] * 6
    assert pack(documents, rows=1, row_length=8, pad=0)[1] == 1, "stops at the first that fits nowhere"


def test_packed_loss_is_the_loss_of_each_document_alone(tokenizer: Any) -> None:
    model = new_llama(
        tokenizer, seed=0, vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    ).eval()  # fmt: skip
    packed = batch(tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(packed.ids)):
            for which in set(packed.document[row].tolist()) - {-1}:
                here = packed.document[row] == which
                logits = model(input_ids=packed.ids[row, here][None]).logits[0]
                labels = packed.labels[row, here]
                total += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
                count += int((labels != IGNORED).sum())
        assert float(batch_loss(model, packed, amp=False)) == pytest.approx(total / count, rel=1e-5)


def test_repeated_tokens(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = repeated_tokens(rng, VOCAB_SIZE)
        half = len(ids) // 2
        assert ids[:half] == ids[half:]
        assert 6 <= half <= 60
        assert min(ids) >= len(SPECIAL_TOKENS)
    random_only = sample_documents(rng, tokenizer, 20, mixture={"repeated tokens": 1.0})
    assert all(document.loss_from == 1 + (len(document.ids) - 2) // 2 for document in random_only)
    assert all(document.loss_from == 1 for document in sample_documents(rng, tokenizer, 200, mixture=TEXT_MIXTURE))
