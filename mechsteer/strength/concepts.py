"""Concepts: texts that show one, texts that do not, and the tokens that belong to it."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from markupsafe import Markup

from mechsteer import markup
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.prompts import Prompts

PUBLISHED_TEMPLATE = (
    "Describe the concept: {concept}. Begin with a one-sentence definition. "
    "Then give several natural first-person examples that demonstrate the concept in an unmistakable way. "
    "Write as if you are the concept itself. Your examples must make the concept obvious through what you say or do "
    "— for example, if the concept is *lying*, give clearly false statements (e.g., claiming impossible facts or "
    "events).\n"
    "Do not use third-person references. Do not explain anything. "
    "After the definition, output only the examples as simple first-person sentences that fully embody the concept."
)
"""What is asked of an instruct model for P: quoted from "Towards Understanding Steering Strength", appendix A."""
PUBLISHED_SYSTEM = "You are an assistant."


@dataclass(frozen=True, repr=False)
class Concept:
    """A concept to steer towards: the sets P and N of equation (3), and its tokens (the set C of definition 3.5).

        joy = shipped()["joy"]
        Concept("evil", positives_from(instruct, "evil", 500), negatives_from(model, 500))

    Attributes:
        name: what curves call it.
        positives: texts that show it.
        negatives: texts that do not: of the opposite concept, or any.
        tokens: ids, or words that are one token each with or without a leading space; empty takes those that
            the texts show, see `token_ids`.

    Raises:
        MechsteerError: there are no positives or no negatives.
    """

    name: str
    positives: Sequence[str]
    negatives: Sequence[str]
    tokens: Sequence[int | str] = ()

    def __post_init__(self) -> None:
        for group in ("positives", "negatives"):
            texts = getattr(self, group)
            if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise MechsteerError(f"Concept {self.name!r} got {group}={texts!r}. Pass texts, none of them empty.")
            object.__setattr__(self, group, tuple(texts))
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def __repr__(self) -> str:
        sizes = f"{len(self.positives)} positives, {len(self.negatives)} negatives"
        return f"Concept({self.name!r}, {sizes}, {len(self.tokens) or 'no'} tokens of its own)"

    def _repr_html_(self) -> str:
        def few(texts: Sequence[str]) -> Markup:
            rest = [markup.faded(f"and {len(texts) - 3} more")] if len(texts) > 3 else []
            return markup.lines([*(markup.shortened(text) for text in texts[:3]), *rest])

        rows = {"positives": few(self.positives), "negatives": few(self.negatives)}
        if self.tokens:
            rows["tokens"] = markup.code(markup.brief(list(self.tokens)))
        return markup.card("Concept", markup.facts(rows), about=self.name)

    def token_ids(self, model: Model, *, against: Iterable["Concept"] = (), k: int = 32) -> list[int]:
        """The tokens that belong to the concept.

        Without `tokens` these are the (up to) `k` tokens that most surely come more often in the positives than in the
        negatives, by the z-score of their log-odds ratio; in the paper's partition, a_z > b_z (assumption 1).
        Source: Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 and 22, with half a count for each token
        as the prior.

        Args:
            model: whose tokens.
            against: concepts to whose positives these are compared too, each on its own: the lowest z counts, so that
                no token belongs to two of them. Itself is left out.
            k: how many, where the texts decide. Tokens with z below 2 are left out.

        Raises:
            MechsteerError: none of the words is a token of the model, or no token is typical of the positives.
        """
        if self.tokens:
            found = [each for token in self.tokens for each in _ids_of(token, model)]
            if not found:
                raise MechsteerError(
                    f"Concept {self.name!r}: none of its words ({', '.join(map(repr, self.tokens[:5]))}) is one token "
                    f"of {model.name}. Pass ids, or leave tokens out to take those that its texts show."
                )
            return list(dict.fromkeys(found))
        groups = [self.negatives, *(each.positives for each in against if each.name != self.name)]
        compared = [_typical(self.positives, group, model) for group in groups]
        scores = {token: min(scores[token] for scores in compared) for token in compared[0]}
        chosen = sorted((token for token, z in scores.items() if z >= 2.0), key=lambda token: (-scores[token], token))
        if not chosen:
            raise MechsteerError(
                f"Concept {self.name!r}: no token is typical of its {len(self.positives)} positives. "
                "Pass more texts, or tokens=."
            )
        return chosen[:k]


def shipped(*, negatives: str = "random") -> dict[str, Concept]:
    """The eight concepts in `data/concepts/`: the moods and registers of the pocket model, by name.

    Args:
        negatives: "random" takes plain documents without a mood; "contrastive" those of the opposite mood, as the two
            settings of section 4 of the paper.

    Raises:
        MechsteerError: `negatives` is neither, or this copy of mechsteer lacks the file.
    """
    if negatives not in ("random", "contrastive"):
        raise MechsteerError(f"negatives={negatives!r} does not exist. Pass 'random' or 'contrastive'.")
    plain, entries = _shipped()
    texts = {name: positives for name, (positives, _) in entries.items()}
    return {
        name: Concept(name, positives, plain if negatives == "random" else texts.get(opposite, plain))
        for name, (positives, opposite) in entries.items()
    }


@cache
def _shipped() -> tuple[tuple[str, ...], dict[str, tuple[tuple[str, ...], str]]]:
    """Plain texts, and each concept's texts and the name of its opposite ("" for the plain ones)."""
    held = json.loads(data_path("concepts", "pocket.json").read_text(encoding="utf-8"))
    entries = {each["name"]: (tuple(each["positives"]), str(each["opposite"])) for each in held["concepts"]}
    return tuple(held["plain"]), entries


def positives_from(
    model: Model,
    concept: str,
    n: int,
    *,
    template: str = PUBLISHED_TEMPLATE,
    system: str | None = PUBLISHED_SYSTEM,
    max_new_tokens: int = 300,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> tuple[str, ...]:
    """Texts that show a concept, written by an instruct model: the set P of section 4, by nucleus sampling.

    The contrastive N is the same with the negated concept ("not joyful").

    Args:
        model: with a chat template; it need not be the one to steer.
        concept: what it is asked to write.
        n: how many texts. Empty answers are left out, so that there may be fewer.
        template: the request, with `{concept}` in it.
        system: the system message; None for none, as templates that refuse one need.
        max_new_tokens, temperature, top_p, seed, progress: as in `Model.generate`; 300 tokens as the paper.

    Raises:
        MechsteerError: the template lacks `{concept}`, `n` is not positive, every answer is empty, or the model has no
            chat template or one that refuses a system message.
    """
    if "{concept}" not in template:
        raise MechsteerError(f"template={template[:60]!r} has no place for the concept. Put {{concept}} in it.")
    _check_count(n)
    chat = [{"role": "user", "content": template.replace("{concept}", concept)}]
    if system is not None:
        chat = [{"role": "system", "content": system}, *chat]
    return _sampled(
        model, Prompts.from_chats([chat] * n, model), f"{concept!r}", max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed, progress=progress,
    )  # fmt: skip


def negatives_from(
    model: Model,
    n: int,
    *,
    max_new_tokens: int = 300,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> tuple[str, ...]:
    """Texts that a model writes after nothing but BOS: the random N of section 4, from the model to steer.

    Args:
        model: to sample. One without a BOS token starts from its end-of-sequence token.
        n: how many texts. Empty ones are left out, so that there may be fewer.
        max_new_tokens, temperature, top_p, seed, progress: as in `Model.generate`.

    Raises:
        MechsteerError: `n` is not positive, every text is empty, or the tokenizer has neither token.
    """
    _check_count(n)
    tokenizer = model.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise MechsteerError(
            f"The tokenizer of {model.name} has neither a BOS nor an EOS token to start from. "
            "Pass negatives of another source."
        )
    prompts = Prompts.from_ids([[start]] * n, tokenizer=tokenizer)
    return _sampled(
        model, prompts, "nothing", max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        progress=progress,
    )  # fmt: skip


def _check_count(n: int) -> None:
    if n < 1:
        raise MechsteerError(f"n={n} texts were asked for. Pass 1 or more.")


def _sampled(model: Model, prompts: Prompts, what: str, *, max_new_tokens: int, **options: object) -> tuple[str, ...]:
    room = model.n_ctx - int(prompts.lengths.max())
    done = model.generate(prompts, max_new_tokens=min(max_new_tokens, room), **options)  # type: ignore[arg-type]
    texts = tuple(text.strip() for text in done.completions if text.strip())
    if not texts:
        raise MechsteerError(f"{model.name} wrote nothing about {what} in {len(prompts)} samples. Use another model.")
    return texts


def _ids_of(token: int | str, model: Model) -> list[int]:
    """The id, or those of a word that is one token alone or after a space."""
    if isinstance(token, int):
        return [token]
    forms = (model.tokenizer.encode(form, add_special_tokens=False) for form in (token, f" {token}"))
    return [ids[0] for ids in forms if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id]


def _typical(positives: Sequence[str], negatives: Sequence[str], model: Model) -> dict[int, float]:
    """z-score of each token's log-odds ratio between two groups of texts."""
    counts = []
    for texts in (positives, negatives):
        ids = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        counts.append(Counter(token for row in ids for token in row))
    prior, totals = 0.5, [sum(each.values()) for each in counts]
    size = len(set(counts[0]) | set(counts[1]))

    def log_odds(group: int, token: int) -> float:
        count = counts[group][token] + prior
        return math.log(count / (totals[group] + prior * size - count))

    return {
        token: (log_odds(0, token) - log_odds(1, token))
        / math.sqrt(1 / (counts[0][token] + prior) + 1 / (counts[1][token] + prior))
        for token in counts[0]
    }
