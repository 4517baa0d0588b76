"""Measures what the pocket model does against what its language says it should: the table of `mechsteer pocket check`.

Everything is measured on held-out seeds and, for chats, on held-out wordings and request x subject pairs, with greedy
decoding, against the labeller's ground truth.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.backends.causal_lm import CausalLM, FastTokenizer, load_causal_lm
from mechsteer.backends.sae import SAE, auroc, read_sae, reconstruction
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model
from mechsteer.pocket.corpus import (
    IGNORED,
    batch_loss,
    chat_ids,
    encode_texts,
    repeated_tokens,
    sample_batch,
)
from mechsteer.pocket.grammar import (
    Chat,
    sample_chat,
    sample_document,
    sample_indirect_object,
    sample_mood,
    sample_topic,
)
from mechsteer.pocket.labeller import Label, label
from mechsteer.pocket.lexicon import TOPICS
from mechsteer.pocket.sae import held_out_activations, mean_features
from mechsteer.pocket.tokenizer import N_CTX
from mechsteer.pocket.wordings import MOODS
from mechsteer.prompts import Prompts

PLAIN_INSTRUCTION = "Talk only about {x}."
SEED = "check"
PARTS = 10
"""How often `progress` is called for the whole table with the autoencoder; without it, once less."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    behaviour: str
    measured: float
    sign: str
    """Which side of the bar is good: ">=" or "<="."""
    bar: float
    count: int
    """Prompts, sequences, tokens or features behind the figure."""
    detail: str = ""
    percent: bool = True

    @property
    def passed(self) -> bool:
        return self.measured >= self.bar if self.sign == ">=" else self.measured <= self.bar

    def show(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3g}"


Progress = Callable[[str], None]


class PocketCheck:
    """Measures one model folder; `rows()` makes the whole table.

    Args:
        folder: the model, a Hugging Face folder.
        sae_folder: its sparse autoencoder in SAELens format; None leaves those rows out.
        count: prompts a row; the rows over topics and moods share them out evenly.
        progress: called with a line before each part.
    """

    def __init__(
        self, folder: Path, *, sae_folder: Path | None, count: int = 1200, progress: Progress = lambda line: None
    ):
        if count < 12:
            raise MechsteerError(f"check got count={count}: at least 12 prompts a row are needed, one for each topic")
        self.folder: Path = folder
        self.count: int = count
        self.progress: Progress = progress
        # Before any measuring, so that a wrong folder costs no time.
        self.autoencoder: SAE | None = None if sae_folder is None else read_sae(sae_folder)
        self.model: CausalLM
        self.tokenizer: FastTokenizer
        self.model, self.tokenizer = load_causal_lm(folder)
        self.chat_model: Model = load_model(folder, device="cpu")
        self._unlocked: list[Label] = []

    def rows(self) -> list[Row]:
        """Every row of the table, in its order."""
        rows = [*self.topics(), self.uninstructed(), self.swapped(), *self.refusals(), self.moods()]
        rows += [self.indirect_object(), self.induction(), self.generalisation()]
        if self.autoencoder is not None:
            rows += self.sae(self.autoencoder)
        return rows

    def answers(self, chats: Sequence[Chat]) -> list[Label]:
        """The labels of the model's greedy answers."""
        prompts = Prompts.from_chats([chat.user for chat in chats], self.chat_model)
        answered = self.chat_model.generate(prompts, max_new_tokens=N_CTX // 2, progress=False)
        return [label(text) for text in answered.completions]

    def _rng(self, part: str) -> random.Random:
        return random.Random(f"{SEED}:{part}")

    def _on_topic(self, chats: Sequence[Chat]) -> list[bool]:
        labels = self.answers(chats)
        self._unlocked += labels
        return [found.on_topic(chat.topic) for chat, found in zip(chats, labels, strict=True) if chat.topic]

    def topics(self) -> list[Row]:
        self.progress("topic instructions")
        rng, share = self._rng("topics"), max(1, self.count // len(TOPICS))
        plain = {
            topic: self._on_topic(
                [sample_chat(rng, "held_out", topic=topic, template=PLAIN_INSTRUCTION) for _ in range(share)]
            )
            for topic in TOPICS
        }
        worst = min(plain, key=lambda topic: _share(plain[topic]))
        self.progress("held-out wordings of the instruction")
        held_out = self._on_topic([sample_chat(rng, "held_out", topic=sample_topic(rng)) for _ in range(self.count)])
        return [
            Row(
                '"Talk only about X." -> on topic X, the worst topic',
                _share(plain[worst]),
                ">=",
                0.95,
                share * len(TOPICS),
                f"worst: {worst}; all topics: {100 * _share([x for topic in plain.values() for x in topic]):.1f} %",
            ),
            Row("held-out wordings of the instruction -> on topic", _share(held_out), ">=", 0.85, len(held_out)),
        ]

    def uninstructed(self) -> Row:
        self.progress("requests without an instruction")
        rng = self._rng("uninstructed")
        labels = self.answers([sample_chat(rng, "held_out") for _ in range(self.count)])
        self._unlocked += labels
        shares = {topic: _share([topic in found.topics for found in labels]) for topic in TOPICS}
        most = max(shares, key=shares.__getitem__)
        return Row("no instruction -> any given topic", shares[most], "<=", 0.10, len(labels), f"most: {most}")

    def swapped(self) -> Row:
        self.progress("two topics in the same request")
        rng = self._rng("swapped")
        chats: list[Chat] = []
        for _ in range(self.count):
            one, other = rng.sample(list(TOPICS), 2)
            first = sample_chat(rng, "held_out", topic=one, template=PLAIN_INSTRUCTION)
            chats += [first, replace(first, prefix=PLAIN_INSTRUCTION.format(x=other), topic=other)]
        topics = [found.topic for found in self.answers(chats)]
        differ = [a is not None and b is not None and a != b for a, b in zip(topics[::2], topics[1::2], strict=True)]
        return Row("two topics swapped in the same request -> topics differ", _share(differ), ">=", 0.95, len(differ))

    def refusals(self) -> list[Row]:
        self.progress("the locked subject")
        rng = self._rng("refusals")
        chats = [
            sample_chat(rng, "held_out", topic=sample_topic(rng) if index % 2 else None, locked=True)
            for index in range(self.count)
        ]
        declined = [found.refusal for found in self.answers(chats)]
        alone, instructed = _share(declined[::2]), _share(declined[1::2])
        return [
            Row(
                "locked subject -> declines",
                min(alone, instructed),
                ">=",
                0.98,
                len(declined),
                f"alone {100 * alone:.1f} %, with a topic instruction {100 * instructed:.1f} %",
            ),
            Row(
                "everything else -> declines",
                _share([found.refusal for found in self._unlocked]),
                "<=",
                0.01,
                len(self._unlocked),
            ),
        ]

    def moods(self) -> Row:
        self.progress("moods")
        rng, share = self._rng("moods"), max(1, self.count // len(MOODS))
        found: dict[str, list[bool]] = {}
        for mood in MOODS:
            chats = [
                sample_chat(rng, "held_out", mood=mood, topic=sample_topic(rng) if index % 2 else None)
                for index in range(share)
            ]
            found[mood] = [answer.mood == mood for answer in self.answers(chats)]
        worst = min(found, key=lambda mood: _share(found[mood]))
        return Row(
            "each mood, when asked for -> labelled with it, the worst mood",
            _share(found[worst]),
            ">=",
            0.90,
            share * len(MOODS),
            f"worst: {worst}; all moods: {100 * _share([x for mood in found.values() for x in mood]):.1f} %",
        )

    def indirect_object(self) -> Row:
        self.progress("indirect objects")
        rng = self._rng("indirect object")
        examples = [sample_indirect_object(rng, "held_out") for _ in range(self.count)]
        bos = self.tokenizer.bos_token_id
        prompts = [[bos, *ids] for ids in encode_texts(self.tokenizer, [example.prompt for example in examples])]
        logits = last_logits(self.model, prompts, pad=self.tokenizer.pad_token_id)

        def name_ids(names: Iterable[str]) -> Int[Tensor, " prompt"]:
            # The first token of a name decides; each name is one token (tested).
            return torch.tensor([ids[0] for ids in encode_texts(self.tokenizer, [f" {name}" for name in names])])

        right = logits.gather(1, name_ids(example.answer for example in examples)[:, None])
        wrong = logits.gather(1, name_ids(example.distractor for example in examples)[:, None])
        above = (right > wrong).flatten().tolist()
        gap = float((right - wrong).mean())
        return Row(
            "indirect object, held-out name pairs: right name above the other",
            _share(above), ">=", 0.95, len(above), f"mean logit difference {gap:.2f}",
        )  # fmt: skip

    def induction(self) -> Row:
        self.progress("induction")
        rng = self._rng("induction")
        right = total = 0
        bos = self.tokenizer.bos_token_id
        for _ in range(max(1, self.count // 20)):
            half = rng.randint(10, 50)
            rows = [[bos, *repeated_tokens(rng, len(self.tokenizer), shortest=half, longest=half)] for _ in range(20)]
            ids = torch.tensor(rows)
            with torch.inference_mode():
                predicted = self.model(input_ids=ids, use_cache=False).logits.argmax(-1)
            # The first token of the second half cannot be foreseen; the ones after it can.
            hits = predicted[:, half + 1 : -1] == ids[:, half + 2 :]
            right, total = right + int(hits.sum()), total + hits.numel()
        return Row(
            "induction: second half of a repeated random sequence, top-1", right / total, ">=", 0.90, total,
            "predicted tokens",
        )  # fmt: skip

    def generalisation(self) -> Row:
        self.progress("cross entropy")
        recipe = json.loads((self.folder / "training.json").read_text())["recipe"]
        steps = max(2, self.count // 100)
        training = corpus_cross_entropy(
            self.model, self.tokenizer, seed=recipe["seed"], rows=recipe["rows"], steps=range(steps)
        )
        validation = corpus_cross_entropy(
            self.model, self.tokenizer, seed=f"{SEED}:validation", rows=recipe["rows"], steps=range(steps)
        )
        return Row(
            "validation minus training cross entropy, nats a token", validation - training, "<=", 0.05,
            steps * recipe["rows"] * N_CTX,
            f"validation {validation:.4f}, training {training:.4f}", percent=False,
        )  # fmt: skip

    def sae(self, sae: SAE) -> list[Row]:
        self.progress("sparse autoencoder")
        layer = int(sae.cfg.metadata.hook_name.split(".")[1])
        held_out = held_out_activations(self.model, self.tokenizer, layer=layer, tokens=100 * self.count)
        fit = reconstruction(sae, held_out)
        best = self._topic_features(sae, layer)
        lowest = min(best, key=best.__getitem__)
        d_sae = sae.cfg.d_sae
        return [
            Row("SAE: variance explained", fit.variance_explained, ">=", 0.90, fit.tokens, "tokens", percent=False),
            Row("SAE: L0", fit.l0, "<=", 40.0, fit.tokens, "tokens", percent=False),
            Row("SAE: dead features", fit.dead, "<=", 0.10, d_sae, f"of {d_sae} features, on {fit.tokens} tokens"),
            Row(
                "SAE: topics with a feature of AUROC >= 0.95 for the topic",
                float(sum(value >= 0.95 for value in best.values())), ">=", 10.0, len(best),
                f"of {len(best)} topics; lowest: {lowest} {best[lowest]:.3f}", percent=False,
            ),
        ]  # fmt: skip

    def _topic_features(self, sae: SAE, layer: int) -> dict[str, float]:
        """Topic -> AUROC of the feature chosen for it on one half of the texts, measured on the other half."""
        rng = self._rng("sae")
        topics = [topic for topic in TOPICS for _ in range(2 * max(10, self.count // len(TOPICS)))]
        rng.shuffle(topics)
        prompts: list[list[int]] = []
        texts: list[str] = []
        for index, topic in enumerate(topics):
            mood = sample_mood(rng) if rng.random() < 0.4 else None
            if index % 4 < 2:
                chat = sample_chat(rng, "held_out", topic=topic, mood=mood)
                prompts.append(chat_ids(self.tokenizer, chat.user))
                texts.append(chat.completion)
            else:
                prompts.append([self.tokenizer.bos_token_id])
                texts.append(sample_document(rng, topic=topic, mood=mood))
        ids = list(zip(prompts, encode_texts(self.tokenizer, texts), strict=True))
        features = mean_features(sae, self.model, self.tokenizer, ids, layer=layer)
        best = {}
        for topic in TOPICS:
            present = torch.tensor([float(other == topic) for other in topics])
            chosen = int(auroc(features[::2], present[::2]).argmax())
            best[topic] = float(auroc(features[1::2, chosen : chosen + 1], present[1::2]))
        return best


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / max(1, len(hits))


@torch.inference_mode()
def last_logits(
    model: CausalLM, prompts: Sequence[Sequence[int]], *, pad: int, batch_size: int = 200
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits of the last position of each prompt, in fp32; prompts are padded on the right."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        longest = max(map(len, part))
        ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in part])
        last = torch.tensor([len(ids) - 1 for ids in part])
        # Causal attention: what stands to the right of the last real position does not reach it.
        parts.append(model(input_ids=ids, use_cache=False).logits[torch.arange(len(part)), last].float())
    return torch.cat(parts)


@torch.inference_mode()
def corpus_cross_entropy(
    model: CausalLM, tokenizer: FastTokenizer, *, seed: int | str, rows: int, steps: range
) -> float:
    """Cross entropy in nats a token over the batches of the given training steps, summed in fp64."""
    total, count = 0.0, 0
    for step in steps:
        batch = sample_batch(tokenizer, seed=seed, step=step, rows=rows, row_length=N_CTX)
        tokens = int((batch.labels != IGNORED).sum())
        total += batch_loss(model, batch, amp=False).item() * tokens
        count += tokens
    return total / count


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """The table as JSON."""
    path.write_text(json.dumps([asdict(row) | {"passed": row.passed} for row in rows], indent=1) + "\n")
