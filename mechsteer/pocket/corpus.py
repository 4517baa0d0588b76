"""Training batches of the pocket language: documents sampled afresh for every step and packed into rows.

Step `s` of seed `r` is always the same batch, so that training resumes exactly where it stopped.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from mechsteer.backends.causal_lm import CausalLM, FastTokenizer
from mechsteer.errors import MechsteerError
from mechsteer.pocket.grammar import (
    Chat,
    complete_indirect_object,
    join_prefix,
    sample_chat,
    sample_document,
    sample_indirect_object,
    sample_mood,
    sample_topic,
)
from mechsteer.pocket.lexicon import LOCKED
from mechsteer.pocket.tokenizer import ASSISTANT, N_CTX, SPECIAL_TOKENS, USER

MIXTURE: dict[str, float] = {
    "chat with a topic instruction": 0.46,
    "chat without": 0.20,
    "plain document": 0.18,
    "indirect object": 0.10,
    "repeated tokens": 0.06,
}
"""Share of each form among the sampled documents."""

COPYING_MIXTURE = {
    form: 0.20 if form == "repeated tokens" else share * 0.80 / (1 - MIXTURE["repeated tokens"])
    for form, share in MIXTURE.items()
}
"""The mixture with more random sequences. Answers never use a word twice, which teaches against copying, so without
this induction forms late."""

TEXT_MIXTURE = {form: share for form, share in MIXTURE.items() if form != "repeated tokens"}
"""The mixture without random sequences: what the sparse autoencoder is trained and measured on."""

IGNORED = -100
"""Label of a position without loss: padding, and the unpredictable first half of a repeated random sequence."""


@dataclass(frozen=True)
class Document:
    """Token ids from BOS to EOS; positions before `loss_from` are context without loss."""

    ids: tuple[int, ...]
    loss_from: int = 1


@dataclass(frozen=True)
class Batch:
    """Packed rows; a position attends only to earlier positions of its own document."""

    ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]
    """The next token of each position, `IGNORED` where there is no loss."""
    positions: Int[Tensor, "row pos"]
    """Position within the document."""
    document: Int[Tensor, "row pos"]
    """Which of the row's documents a position belongs to; -1 for padding."""

    def attention_mask(self) -> Bool[Tensor, "row 1 pos pos"]:
        """True where the destination (third axis) may attend to the source (fourth)."""
        same = self.document[:, :, None] == self.document[:, None, :]
        return (same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril())[:, None]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.ids, self.labels, self.positions, self.document)))


def repeated_tokens(rng: random.Random, vocab_size: int, *, shortest: int = 6, longest: int = 60) -> list[int]:
    """A sequence of random ordinary tokens, twice: token ids of even count, the second half equal to the first.

    Args:
        vocab_size: ids below this, special tokens left out, are drawn evenly.
        shortest, longest: length of the half.
    """
    half = [rng.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(rng.randint(shortest, longest))]
    return half + half


def render_user(rng: random.Random, chat: Chat) -> str:
    """The user's message, with the prefix mostly on a line before the request, sometimes beside or after it."""
    where = rng.random()
    if not chat.prefix or where < 0.75:
        return chat.user
    return f"{chat.prefix} {chat.request}" if where < 0.88 else join_prefix(chat.request, chat.prefix)


def sample_training_chat(rng: random.Random, *, instructed: bool) -> Chat:
    """A chat of the training split."""
    topic = None
    if instructed:
        topic = LOCKED.name if rng.random() < 0.02 else sample_topic(rng)
    mood = sample_mood(rng) if rng.random() < 0.4 else None
    return sample_chat(rng, topic=topic, mood=mood, locked=rng.random() < 0.08)


def sample_documents(
    rng: random.Random, tokenizer: FastTokenizer, count: int, *, mixture: Mapping[str, float] = MIXTURE
) -> list[Document]:
    """`count` documents, their forms drawn from a mixture."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in (USER, ASSISTANT))
    forms = rng.choices(list(mixture), list(mixture.values()), k=count)
    texts: list[str] = []
    plans: list[tuple[str, list[int]]] = []
    for form in forms:
        if form.startswith("chat"):
            chat = sample_training_chat(rng, instructed=form == "chat with a topic instruction")
            texts += [render_user(rng, chat), chat.completion]
            plans.append(("chat", []))
        elif form == "repeated tokens":
            longest = (N_CTX - 2) // 2 if rng.random() < 0.1 else 60
            plans.append(("ids", repeated_tokens(rng, len(tokenizer), longest=longest)))
        else:
            texts.append(
                complete_indirect_object(rng, sample_indirect_object(rng))
                if form == "indirect object"
                else sample_document(rng, mood=sample_mood(rng) if rng.random() < 0.6 else None)
            )
            plans.append(("text", []))
    encoded = iter(encode_texts(tokenizer, texts))
    documents = []
    for plan, ids in plans:
        if plan == "chat":
            documents.append(Document((bos, user, *next(encoded), assistant, *next(encoded), eos)))
        elif plan == "text":
            # The longest documents are cut where the context ends, and so have no EOS.
            documents.append(Document((bos, *next(encoded), eos)[:N_CTX]))
        else:
            documents.append(Document((bos, *ids, eos), loss_from=1 + len(ids) // 2))
    return documents


def chat_ids(tokenizer: FastTokenizer, user: str) -> list[int]:
    """Token ids of a chat up to where the answer begins, as the chat template renders it.

    Raises:
        MechsteerError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise MechsteerError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: pass a chat model"
        )
    messages = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def encode_texts(tokenizer: FastTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and without padding."""
    return tokenizer(list(texts), add_special_tokens=False, padding=False, verbose=False).input_ids if texts else []


def pack(documents: Sequence[Document], rows: int, row_length: int, *, pad: int) -> tuple[Batch, int]:
    """Packs documents into rows, each into the first row with room; stops at the first that fits nowhere.

    Returns:
        the batch, and how many of the documents it holds.
    """
    ids = torch.full((rows, row_length), pad)
    labels = torch.full((rows, row_length), IGNORED)
    positions = torch.zeros((rows, row_length), dtype=torch.long)
    which = torch.full((rows, row_length), -1)
    used = [0] * rows
    for index, document in enumerate(documents):
        length = len(document.ids)
        row = next((row for row in range(rows) if used[row] + length <= row_length), None)
        if row is None:
            return Batch(ids, labels, positions, which), index
        span = slice(used[row], used[row] + length)
        tokens = torch.tensor(document.ids)
        ids[row, span] = tokens
        labels[row, span.start + document.loss_from - 1 : span.stop - 1] = tokens[document.loss_from :]
        positions[row, span] = torch.arange(length)
        which[row, span] = index
        used[row] += length
    return Batch(ids, labels, positions, which), len(documents)


def sample_batch(
    tokenizer: FastTokenizer,
    *,
    seed: int | str,
    step: int,
    rows: int,
    row_length: int,
    mixture: Mapping[str, float] = MIXTURE,
) -> Batch:
    """The batch of one training step: always the same for the same seed and step."""
    rng = random.Random(f"{seed}:{step}")
    documents: list[Document] = []
    # A little more than fits, so that every row ends up nearly full.
    while sum(len(document.ids) for document in documents) < rows * row_length * 1.02:
        documents += sample_documents(rng, tokenizer, 64, mixture=mixture)
    return pack(documents, rows, row_length, pad=tokenizer.pad_token_id)[0]


def batch_loss(model: CausalLM, batch: Batch, *, amp: bool) -> Float[Tensor, ""]:
    """Mean cross entropy (nats) over the batch's labelled positions, under bf16 autocast if `amp`."""
    device = batch.ids.device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()
    with autocast:
        logits = model(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask(),
            position_ids=batch.positions,
            use_cache=False,
        ).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED)
