"""The pocket model's tokenizer: byte-level BPE trained on the pocket language, with a chat template."""

import random
from collections.abc import Iterator

from mechsteer.backends.causal_lm import FastTokenizer, wrap_tokenizer
from mechsteer.pocket.grammar import (
    complete_indirect_object,
    sample_chat,
    sample_document,
    sample_indirect_object,
    sample_mood,
    sample_topic,
)
from mechsteer.pocket.lexicon import NAMES

BOS, EOS, PAD, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
VOCAB_SIZE = 3072
N_CTX = 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] -%}
{%- elif message['role'] == 'user' -%}
<|user|>{{ ns.system + '\\n' if ns.system else '' }}{{ message['content'] }}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
<|assistant|>{{ message['content'] }}{{ eos_token }}
{%- else -%}
{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
"""A system message is the prefix of the user message that follows it, on a line of its own."""


def train_tokenizer(*, seed: int = 0, documents: int = 40_000) -> FastTokenizer:
    """Trains the tokenizer on sampled text, so that common words are one token and rare ones are several.

    Args:
        seed: seed of the sample.
        documents: how many chats, documents and sentences to sample.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample_texts(random.Random(f"tokenizer {seed}"), documents), trainer)
    # Plain text gets BOS, as in Llama's and Gemma's tokenizers; a rendered chat template already holds it.
    bpe.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return wrap_tokenizer(
        bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=N_CTX,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _sample_texts(rng: random.Random, documents: int) -> Iterator[str]:
    # Every name as one token, as the indirect-object sentences use it.
    yield from (f" {name}" for name in NAMES for _ in range(documents // 100))
    for _ in range(documents):
        draw = rng.random()
        mood = sample_mood(rng) if rng.random() < 0.4 else None
        if draw < 0.7:
            chat = sample_chat(rng, topic=sample_topic(rng) if rng.random() < 0.7 else None, mood=mood)
            yield chat.user
            yield chat.completion
        elif draw < 0.95:
            yield sample_document(rng, mood=mood)
        else:
            yield complete_indirect_object(rng, sample_indirect_object(rng))
