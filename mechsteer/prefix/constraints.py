"""What a prefix may not be: words in any split into tokens, near copies of a reference, odd characters."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.vocabulary import allowed_tokens, check_ids, embeddings, token_texts

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Constraints:
    """What a prefix must keep to.

        reference = tuple(model.tokenizer.encode("Talk only about cats.", add_special_tokens=False))
        Constraints(forbidden_words=("cat", "feline"), reference=reference, max_shared=1, characters="ascii")

    Attributes:
        forbidden_words: that the text may not hold, in any casing, width, accent or with invisible characters between:
            as any part of the text, so that "cat" forbids "Cats" and "education" too; with `whole_words`, as words of
            their own. Any split into tokens is caught, also where blanks or hyphens stand between the pieces
            (" f" + " eline"), and a word that only arises together with the text around the prefix. The pieces alone
            stay allowed.
        whole_words: see there.
        reference: ids to keep away from.
        min_edit_distance: at least so many tokens must be replaced, put in or taken out to get from the reference to
            the prefix (Levenshtein).
        max_shared: at most so many tokens, counted with repetition, may be those of the reference.
        max_cosine: no token's embedding may have a cosine above this with that of one of the reference's tokens.
        characters: "printable"; "ascii", which is printable too; or the script that all letters must be of, as their
            Unicode names begin, such as "latin" or "cyrillic", which are printable too. None allows all.
        fluency: weight of the prefix's mean negative log likelihood (nats a token) in the loss of a search.
        min_tokens, max_tokens: length; None is the length that a search starts from.

    Raises:
        MechsteerError: a number is out of range, a word is empty, or there is no reference to keep away from.
    """

    forbidden_words: Sequence[str] = ()
    whole_words: bool = False
    reference: Sequence[int] = ()
    min_edit_distance: int = 0
    max_shared: int | None = None
    max_cosine: float | None = None
    characters: str | None = None
    fluency: float | int = 0.0
    min_tokens: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.forbidden_words, str):
            raise MechsteerError(f"forbidden_words={self.forbidden_words!r} is one string. Pass a list of words.")
        empty = [word for word in self.forbidden_words if not plain(word).strip()]
        if empty:
            raise MechsteerError(f"forbidden_words holds {empty[0]!r}, which is no word. Leave it out.")
        for name, least in (("min_edit_distance", 0), ("max_shared", 0), ("min_tokens", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MechsteerError(f"{name}={value} is out of range. Pass {least} or more.")
        if self.fluency < 0:
            raise MechsteerError(f"fluency={self.fluency} would reward nonsense. Pass 0 or more.")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise MechsteerError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}. Exchange them.")
        far = {"min_edit_distance": self.min_edit_distance or None, "max_shared": self.max_shared}
        asked = [name for name, value in (far | {"max_cosine": self.max_cosine}).items() if value is not None]
        if asked and not self.reference:
            raise MechsteerError(f"{asked[0]} needs a reference. Pass its ids with reference=.")
        object.__setattr__(self, "forbidden_words", tuple(self.forbidden_words))
        object.__setattr__(self, "reference", tuple(int(each) for each in self.reference))

    def allowed(self, model: Model) -> list[int]:
        """Tokens that do not violate anything by themselves, without special ones.

        A token that is only a part of a character is no printable text, and is left out where `characters` is given.

        Raises:
            MechsteerError: nothing is left.
        """
        check_ids(model, self.reference)
        ids = torch.tensor(allowed_tokens(model))
        keep = torch.ones(len(ids), dtype=torch.bool)
        if model.tokenizer is not None:
            texts = token_texts(model, ids.tolist())
            words = self._words
            keep = torch.tensor([self._character(text) is None and not _holds(text, words) for text in texts])
        if self.max_cosine is not None:
            keep = keep & (self._nearness(model) <= self.max_cosine)[ids]
        if not bool(keep.any()):
            raise MechsteerError(f"{self} leaves none of the {len(ids)} tokens of {model.name}. Allow more.")
        return ids[keep].tolist()

    def violation(self, ids: Ids, text: str | None = None, *, before: str = "", after: str = "") -> str | None:
        """What is wrong with a prefix, or None. `max_cosine` and special tokens are up to `allowed`.

        Args:
            ids: of the prefix.
            text: of the prefix; None where there is no tokenizer.
            before: the text before it in a rendered prompt.
            after: the text after it.
        """
        if self.min_tokens is not None and len(ids) < self.min_tokens:
            return f"it has {len(ids)} tokens, fewer than {self.min_tokens}"
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            return f"it has {len(ids)} tokens, more than {self.max_tokens}"
        if self.reference:
            shared = shared_tokens(ids, self.reference)
            if self.max_shared is not None and shared > self.max_shared:
                return f"it shares {shared} tokens with the reference, more than {self.max_shared}"
            distance = edit_distance(ids, self.reference) if self.min_edit_distance else 0
            if distance < self.min_edit_distance:
                return f"it is {distance} tokens from the reference, fewer than {self.min_edit_distance}"
        return None if text is None else self._character(text) or self._said(text, before, after)

    @property
    def _words(self) -> tuple[str, ...]:
        """What may not be part of any text; words that must stand alone to count are found in context only."""
        return () if self.whole_words else tuple(plain(word).strip() for word in self.forbidden_words)

    def _character(self, text: str) -> str | None:
        if self.characters is None:
            return None
        # A search asks of every candidate, and nearly all are fine.
        clean = text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
        if clean and (self.characters == "printable" or (text.isascii() and self.characters == "ascii")):
            return None
        odd = [char for char in text if not char.isprintable() or char == "\N{REPLACEMENT CHARACTER}"]
        if self.characters == "ascii":
            odd += [char for char in text if not char.isascii()]
        elif self.characters != "printable":
            script = self.characters.upper()
            odd += [char for char in text if char.isalpha() and not unicodedata.name(char, "").startswith(script)]
        return f"it holds {odd[0]!r}, which is not {self.characters}" if odd else None

    def _said(self, text: str, before: str, after: str) -> str | None:
        if not self.forbidden_words:
            return None
        # Only so much of the surroundings that a word could begin or end in the prefix.
        room = 2 * max(len(word) for word in self.forbidden_words) + 1
        left, inner, right = plain(before[-room:]), plain(text), plain(after[:room])
        whole, start, stop = left + inner + right, len(left), len(left) + len(inner)
        parts = [(part[0], part.start(), part.end()) for part in re.finditer(r"[^\W_]+", whole)]
        for word in self.forbidden_words:
            wanted = plain(word).strip()
            at = whole.find(wanted)
            while at >= 0:
                end = at + len(wanted)
                alone = not (whole[max(at - 1, 0) : at].isalnum() or whole[end : end + 1].isalnum())
                if at < stop and end > start and (alone or not self.whole_words):
                    return f"it says {word!r}"
                at = whole.find(wanted, at + 1)
            spelt = _spelt(parts, "".join(re.findall(r"[^\W_]+", wanted)))
            if any(at < stop and end > start for at, end in spelt):
                return f"it says {word!r} in pieces"
        return None

    def _nearness(self, model: Model) -> Float[Tensor, " d_vocab"]:
        """Of each token, the largest cosine of its embedding with that of a reference token."""
        table = torch.nn.functional.normalize(embeddings(model).float(), dim=1)
        return (table @ table[list(self.reference)].T).amax(1).cpu()


def plain(text: str) -> str:
    """A text without casing, width, accents and invisible characters, in which words are looked for."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(char for char in folded if unicodedata.category(char) not in ("Mn", "Cf"))


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein's distance: fewest tokens to replace, put in or take out."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common, in any order, counted with repetition."""
    return sum(min(list(a).count(token), list(b).count(token)) for token in set(a))


def _holds(text: str, words: Sequence[str]) -> bool:
    return any(word in plain(text) for word in words)


def _spelt(parts: Sequence[tuple[str, int, int]], word: str) -> list[tuple[int, int]]:
    """Where neighbouring parts (text, start, end), without what stands between them, are the word."""
    found = []
    for first, (_, start, _) in enumerate(parts):
        joined = ""
        for part, _, end in parts[first:]:
            joined += part
            if joined == word:
                found.append((start, end))
            if not word.startswith(joined) or joined == word:
                break
    return found
