"""Whether the ids of a prefix survive as text: decoded and encoded again inside the rendered prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechsteer import rendering
from mechsteer.prompts import Prompts
from mechsteer.vocabulary import insert

# Tokens on either side that a tokenizer looks at while a search goes on; the answer is checked in whole prompts.
_NEAR = 4

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A prefix as text in one rendered prompt.

    Attributes:
        survives: whether that prompt's text encodes to the same ids again.
        text: of the prefix.
        before: text before it.
        after: text after it, up to where the completion starts.
    """

    survives: bool
    text: str
    before: str
    after: str


class RoundTrip:
    """Decodes and encodes prefixes where they stand in prompts.

        trip = RoundTrip(prompts)
        trip.near([(5, 17), (5, 18)])       # quick: with a few tokens around, in the first prompt alone
        trip.survives((5, 17))              # exactly, in every prompt

    A prefix survives if the ids of a rendered prompt are those of its text, the chat template, which may trim what a
    user says, leaves its first character alone, and none is a special token. Without a tokenizer all ids survive.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.tokenizer: Any = prompts.tokenizer
        self._control: set[int] = set()
        if self.tokenizer is not None:
            self._control = {*self.tokenizer.all_special_ids, *rendering.control_tokens(self.tokenizer)}
        right = insert(prompts.without_completions().padded("right"), where="prefix", slots=1)
        self._around: list[tuple[list[int], list[int]]] = []
        for tokens, mask, slots in zip(right.tokens, right.mask, right.slots, strict=True):
            row, at = tokens[mask].tolist(), int(slots.int().argmax())
            self._around.append(self._readable(row[:at], row[at + 1 :]))
        self._near_before = self._last(self._around[0][0])
        self._trims = _trims(self.tokenizer)
        self._placed: dict[Ids, tuple[Placed, ...]] = {}

    def near(self, prefixes: Sequence[Ids]) -> list[Placed]:
        """Each between its nearest tokens of the first prompt: what a search can afford to ask.

        What does not survive here may in the whole prompt only for tokenizers that look further than four tokens.
        """
        if self.tokenizer is None:
            return [_untold(ids) for ids in prefixes]
        before, after = self._near_before, self._around[0][1][:_NEAR]
        return self._place([(before, ids, after) for ids in prefixes])

    def survives(self, ids: Ids) -> tuple[bool, ...]:
        """Whether a prefix survives in each whole prompt."""
        return tuple(each.survives for each in self.placed(ids))

    def text(self, ids: Ids) -> str:
        """What a prefix reads as where it stands; its ids where there is no tokenizer."""
        return self.placed(ids)[0].text

    def placed(self, ids: Ids) -> tuple[Placed, ...]:
        """A prefix in each whole prompt."""
        if ids not in self._placed:
            if self.tokenizer is None:
                self._placed[ids] = (_untold(ids),) * len(self._around)
            else:
                found = self._place([(before, ids, after) for before, after in self._around])
                # A text that differs between prompts is no prefix that one could write down.
                same = len({each.text for each in found}) == 1
                self._placed[ids] = tuple(replace(each, survives=each.survives and same) for each in found)
        return self._placed[ids]

    def _readable(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """What stands around a prefix, up to the nearest special tokens where more would not encode to itself again.

        Some tokenizers put a blank behind every special token, and decode to text that would get a second one. Nothing
        is ever merged across these tokens.
        """
        if self.tokenizer is None:
            return before, after
        places = [i for i, token in enumerate(before) if token in self._control]
        place = next((i for i, token in enumerate(after) if token in self._control), len(after))
        # Right behind a special token it is what follows that gets the second blank: the request tells.
        behind, told = places[-1:] == [len(before) - 1], after[:place]
        doubled = behind and not self._same([*before, *told]) and self._same(told)
        if places and (doubled or not self._same(before)):
            before = before[places[-1] + 1 :]
        return before, after if self._same(after[place:]) else after[:place]

    def _last(self, before: list[int]) -> list[int]:
        """A few last tokens, and as many more as they need to encode to themselves again."""
        sizes = range(min(_NEAR, len(before)), len(before) + 1)
        if self.tokenizer is None:
            return before[-_NEAR:]
        return next((part for size in sizes if self._same(part := before[len(before) - size :])), before)

    def _same(self, ids: list[int]) -> bool:
        return self._encode(self._decode([ids])) == [ids]

    def _place(self, parts: Sequence[tuple[Sequence[int], Ids, Sequence[int]]]) -> list[Placed]:
        rows = [[*before, *ids, *after] for before, ids, after in parts]
        # Decoding from the start keeps the blank that some tokenizers drop before a text's first token.
        befores = {tuple(before): before for before, _, _ in parts}
        starts = dict(zip(befores, self._decode(list(befores.values())), strict=True))
        stops = self._decode([[*before, *ids] for before, ids, _ in parts])
        texts = self._decode(rows)
        out = []
        encoded = self._encode(texts)
        for (before, ids, _), row, text, stop, again in zip(parts, rows, texts, stops, encoded, strict=True):
            start = starts[tuple(before)]
            inner = text[len(start) : len(stop)]
            survives = again == row and not (self._trims and inner != inner.lstrip())
            survives = survives and self._control.isdisjoint(ids)
            out.append(Placed(survives, inner, text[: len(start)], text[len(stop) :]))
        return out

    def _encode(self, texts: list[str]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        if backend.padding or backend.truncation or backend.encode_special_tokens:
            return rendering.tokenize(texts, self.tokenizer).input_ids
        # The same without offsets, in half the time: a search encodes every candidate.
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        decode = self.tokenizer.backend_tokenizer.decode_batch
        return decode([list(row) for row in rows], skip_special_tokens=False)


def _untold(ids: Ids) -> Placed:
    return Placed(True, " ".join(map(str, ids)), "", "")


def _trims(tokenizer: Any) -> bool:
    """Whether the chat template trims the start of what a user says."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    chat = [{"role": "user", "content": "  Zq"}]
    return "  Zq" not in tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
