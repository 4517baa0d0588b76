"""Turns strings and chats into token ids that know which span each of them belongs to, and those into HTML."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import pad

from mechsteer import markup
from mechsteer.errors import MechsteerError

# What a token is there for; `Prompts.roles` holds indices into this.
ROLES = ("scaffold", "prefix", "user", "completion")
SCAFFOLD, PREFIX, USER, COMPLETION = range(4)

# Background of each role's tokens, thin enough for light and dark pages.
_COLOURS = ("rgba(128,128,128,.18)", "rgba(230,140,0,.35)", "rgba(40,120,230,.25)", "rgba(30,160,80,.28)")

# A user's request, or messages such as {"role": "user", "content": "Hello"}.
Chat = str | Sequence[Mapping[str, Any]]
Ids = Sequence[Sequence[int]] | Int[Tensor, "_ _"]
Mask = Bool[Tensor, "_ _"] | Int[Tensor, "_ _"]


class Span(NamedTuple):
    """Characters [start, end) that somebody wrote, as against a chat template or a caller's separator."""

    start: int
    end: int
    role: int


class Marked(NamedTuple):
    """A text as it is to be tokenised, in one go. Characters in no span are scaffolding; `hole` is where slots go."""

    text: str
    spans: list[Span]
    hole: Span | None = None


class Row(NamedTuple):
    """One prompt's ids, and the role of each and whether it is a slot."""

    ids: list[int]
    roles: list[int]
    slots: list[bool]


class Line(NamedTuple):
    """One prompt as it is shown: the text, role and slot of each token; `padding` on its left and on its right.

    Tokens of a long one are left out between `head` and the rest: `cut` of them.
    """

    label: str
    tokens: list[str]
    roles: list[int]
    slots: list[bool]
    padding: tuple[int, int] = (0, 0)
    head: int = 0
    cut: int = 0


def tokenizer_of(source: Any, caller: str) -> Any:
    """The fast tokenizer that `source`, a tokenizer or a Model, is or has.

    Raises:
        MechsteerError: there is none.
    """
    tokenizer = getattr(source, "tokenizer", source)
    if tokenizer is None:
        raise MechsteerError(f"{caller} got no tokenizer. Pass the model's tokenizer, or the Model itself.")
    if not getattr(tokenizer, "is_fast", False):
        raise MechsteerError(
            f"{caller} got a {type(tokenizer).__name__}, which cannot say where in a text its tokens are. Pass a fast "
            "tokenizer (AutoTokenizer gives one where the folder has a tokenizer.json), or ids to Prompts.from_ids."
        )
    return tokenizer


def mark_strings(texts: Sequence[str], tokenizer: Any, *, prefix: str, slots: int, prepend_bos: bool) -> list[Marked]:
    """Plain texts, each behind the prefix or the hole, which stand behind a BOS that the text starts with."""
    hole = _hole_text(tokenizer, prefix, slots)
    bos = tokenizer.bos_token or ""
    marked = []
    for text in texts:
        lead = bos if prepend_bos and text.startswith(bos) else ""
        text = text.removeprefix(bos)
        first, second = len(lead), len(lead) + len(prefix or hole)
        spans = [Span(second, second + len(text), USER)]
        if prefix:
            spans.insert(0, Span(first, second, PREFIX))
        marked.append(Marked(lead + (prefix or hole) + text, spans, Span(first, second, PREFIX) if hole else None))
    return marked


def mark_completions(texts: Sequence[str]) -> list[Marked]:
    """Texts that are completions from end to end."""
    return [Marked(text, [Span(0, len(text), COMPLETION)]) for text in texts]


def mark_chats(
    chats: Chat | Sequence[Chat], tokenizer: Any, *, prefix: str, separator: str, slots: int
) -> list[Marked]:
    """Chats as the template renders them, up to where the assistant starts to speak.

    Raises:
        MechsteerError: there is no chat template, a chat is not one that ends with the user, or the template refuses
            it or does more to a message's text than trim it.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise MechsteerError(
            f"{type(tokenizer).__name__} has no chat template, so Prompts.from_chats cannot lay out a chat. "
            "Use a chat model's tokenizer, or Prompts.from_strings for plain text."
        )
    hole = _hole_text(tokenizer, prefix, slots)
    before = (prefix or hole) + separator if prefix or slots else ""
    single = isinstance(chats, str) or (len(chats) > 0 and isinstance(chats[0], Mapping))
    messages = [_messages(chat, i) for i, chat in enumerate([chats] if single else chats)]  # type: ignore[arg-type]
    if not messages:
        return []
    for chat in messages:
        chat[-1] = {"role": "user", "content": before + chat[-1]["content"]}
    scaffolds: dict[tuple[str, ...], list[str]] = {}
    marked = []
    for i, (chat, text) in enumerate(zip(messages, _render(messages, tokenizer), strict=True)):
        speakers = tuple(message["role"] for message in chat)
        if speakers not in scaffolds:
            scaffolds[speakers] = _scaffold(speakers, tokenizer)
        found = _find(text, scaffolds[speakers], [message["content"] for message in chat])
        if found is None:
            raise MechsteerError(
                f"the chat template changes what chat {i} says by more than trimming it, so its spans cannot be told. "
                "Change the text that the template treats specially, or pass ids to Prompts.from_ids."
            )
        # What earlier turns and a system message say is neither the prefix nor the request that are being studied.
        spans = [
            Span(start, start + len(kept), USER if speaker == "user" else SCAFFOLD)
            for speaker, (start, _, kept) in zip(speakers, found, strict=True)
        ]
        start, end, _ = spans.pop()
        zero = start - found[-1][1]  # where the last message would start, had the template not trimmed it
        at = [min(max(zero + n, start), end) for n in (len(prefix or hole), len(before))]
        parts = Span(start, at[0], PREFIX), Span(at[1], end, USER)
        marked.append(Marked(text, [*spans, parts[1]] if hole else [*spans, *parts], parts[0] if hole else None))
    return marked


def encode(
    marked: Sequence[Marked], tokenizer: Any, *, what: str = "prompt", prepend_bos: bool = False, slots: int = 0
) -> list[Row]:
    """Tokenises each text in one go, and gives each token the role of its first character that is not a space.

    Args:
        marked: the texts.
        tokenizer: a fast one; it is left as it was.
        what: what the texts are, for errors.
        prepend_bos: put one BOS first where the text does not start with it and the tokenizer has one.
        slots: how many tokens stand for each hole.

    Raises:
        MechsteerError: what somebody wrote holds a special token.
    """
    if not marked:
        return []
    encoded = tokenize([each.text for each in marked], tokenizer)
    control = control_tokens(tokenizer)
    rows = []
    for i, (each, ids, offsets) in enumerate(zip(marked, encoded.input_ids, encoded.offset_mapping, strict=True)):
        owners: list[Span | None] = [None] * len(each.text)
        for span in each.spans:
            owners[span.start : span.end] = [span] * (span.end - span.start)
        row, seen = Row([], [], []), False
        bos = tokenizer.bos_token_id if prepend_bos else None
        for token, (start, end) in zip(ids, offsets, strict=True):
            if each.hole and (start, end) == each.hole[:2]:
                row.ids.extend([pad_id(tokenizer)] * slots)
                row.roles.extend([PREFIX] * slots)
                row.slots.extend([True] * slots)
                seen = True
                continue
            # A token of spaces only may come with no characters at all, at its end.
            inside = (at for at in range(start, end) if not each.text[at].isspace())
            first = next(inside, start if start < end else max(start - 1, 0))
            owner = owners[first]
            unknown = token == tokenizer.unk_token_id and not each.text.startswith(control.get(token, ""), first)
            if owner is not None and token in control and not unknown:
                raise MechsteerError(
                    f"{what} {i} holds {control[token]!r} at character {first - owner.start} of its "
                    f"{ROLES[owner.role] if owner.role else 'other'} text, which the tokenizer reads as a special "
                    "token. Take it out of the text, or pass ids if it is meant."
                )
            seen = seen or owner is not None
            bos = None if token == bos and not seen else bos
            row.ids.append(token)
            row.roles.append(owner.role if owner else SCAFFOLD)
            row.slots.append(False)
        if bos is not None:
            row = Row([bos, *row.ids], [SCAFFOLD, *row.roles], [False, *row.slots])
        rows.append(row)
    return rows


def tokenize(texts: list[str], tokenizer: Any) -> Any:
    """Ids and offsets of texts as they are, special tokens in them read as such; a fast tokenizer is left as it was."""
    backend = tokenizer.backend_tokenizer
    padding, truncation, literal = backend.padding, backend.truncation, backend.encode_special_tokens
    try:
        return tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, split_special_tokens=False,
            return_offsets_mapping=True, return_attention_mask=False, verbose=False,
        )  # fmt: skip
    finally:
        # The call above clears what the backend was set to.
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
        backend.encode_special_tokens = literal


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that a model takes as structure: special ones, and added ones that the chat template writes."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in template)
    }


def _hole_text(tokenizer: Any, prefix: str, slots: int) -> str:
    """A special token that stands for the slots while the text around them is tokenised: text never joins across it."""
    if slots < 0 or (slots and prefix):
        raise MechsteerError(
            f"slots={slots} with prefix={prefix!r}: slots are a number of tokens reserved in place of a prefix. "
            "Pass slots=, or prefix=, or neither."
        )
    if slots == 0:
        return ""
    names = [tokenizer.pad_token, *(token.content for token in tokenizer.added_tokens_decoder.values())]
    plain = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.lstrip or token.rstrip or token.single_word)
    }
    if not plain:
        raise MechsteerError(
            f"slots need a tokenizer with at least one special token, and {type(tokenizer).__name__} has none. "
            "Add one to the tokenizer, such as a pad token."
        )
    return next(name for name in names if name in plain)


def _messages(chat: Chat, index: int) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else [dict(message) for message in chat]
    for message in messages:
        # A template may paste the role itself between the brackets of a special token.
        if set(message) != {"role", "content"} or not (
            isinstance(message["content"], str) and isinstance(message["role"], str) and message["role"].isidentifier()
        ):
            raise MechsteerError(
                f"chat {index} has the message {message!r}, but a message is "
                "{'role': ..., 'content': ...} with a one-word role and a string of text. Pass ids for anything else."
            )
    if not messages or messages[-1]["role"] != "user":
        last = f"ends with a message of the {messages[-1]['role']}" if messages else "has no messages"
        raise MechsteerError(
            f"chat {index} {last}, but the last message must be the user's. "
            "Pass what the assistant says as completions=."
        )
    return messages


def _render(messages: list[list[dict[str, str]]], tokenizer: Any) -> list[str]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise MechsteerError(
            f"the chat template refuses a chat: {' '.join(str(error).split())}. Change the messages' roles or order."
        ) from error


def _scaffold(speakers: tuple[str, ...], tokenizer: Any) -> list[str]:
    """What the template writes before, between and after the messages' texts."""
    marks = [f"Zq{i}text{i}qZ" for i in range(len(speakers))]
    messages = [{"role": speaker, "content": mark} for speaker, mark in zip(speakers, marks, strict=True)]
    pieces, rest = [], _render([messages], tokenizer)[0]
    for mark in marks:
        if rest.count(mark) != 1:
            raise MechsteerError(
                f"the chat template leaves out, repeats or reorders the messages of a chat of {', '.join(speakers)}, "
                "so their spans cannot be told. Use other roles, or pass ids to Prompts.from_ids."
            )
        piece, rest = rest.split(mark)
        pieces.append(piece)
    return [*pieces, rest]


def _find(text: str, scaffold: list[str], contents: list[str]) -> list[tuple[int, int, str]] | None:
    """Where each content stands in `text`, how many of its first characters were trimmed, and what is left of it."""
    # Every place where one can be after a message, and how one gets there: trimming is ambiguous until the end.
    ways: dict[int, list[tuple[int, int, str]]] = {0: []}
    for piece, content in zip(scaffold, contents, strict=False):
        left = len(content) - len(content.lstrip())
        trims = {content.strip(): left, content.lstrip(): left, content.rstrip(): 0, content: 0}
        ways = {
            at + len(piece) + len(kept): [*way, (at + len(piece), cut, kept)]
            for at, way in ways.items()
            for kept, cut in trims.items()
            if text.startswith(piece + kept, at)
        }
    return next((way for at, way in ways.items() if text[at:] == scaffold[-1]), None)


def pad_id(tokenizer: Any) -> int:
    """What stands at padding and in slots."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def block(
    ids: Ids, mask: Mask | None, tokenizer: Any, fill: int, what: str
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Ids as one tensor, and which of them are real, checked."""
    if isinstance(ids, Tensor):
        tokens = ids.long()
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)
        if real.shape != tokens.shape:
            raise MechsteerError(
                f"{what} ids have shape {tuple(tokens.shape)} and their mask {tuple(real.shape)}. "
                "Pass a mask with one entry for each id."
            )
    elif mask is not None:
        raise MechsteerError(f"mask= goes with a tensor, but the {what} ids are lists. Leave the mask out.")
    else:
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
        real = torch.arange(max(map(len, ids), default=0)) < lengths[:, None]
        tokens = torch.full(real.shape, fill).masked_scatter(
            real, torch.tensor([token for row in ids for token in row], dtype=torch.int64)
        )
    runs = (real & ~pad(real[:, :-1], (1, 0))).sum(1)
    if bool((runs > 1).any()):
        raise MechsteerError(
            f"the mask of {what} {int(runs.argmax())} has a hole. Mark one unbroken run of tokens in each row."
        )
    # Added tokens may stand above a gap.
    n_ids = tokenizer and max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))
    wrong = real & ((tokens < 0) | (tokens >= (n_ids or torch.iinfo(torch.int64).max)))
    if bool(wrong.any()):
        row = int(wrong.any(1).int().argmax())
        known = f"the tokenizer's ids run from 0 to {n_ids - 1}" if n_ids else "ids count from 0"
        raise MechsteerError(
            f"{what} {row} has the id {int(tokens[row][wrong[row]][0])}, but {known}. Use the model's own tokenizer."
        )
    return tokens, real


def decode(ids: Int[Tensor, " _"], tokenizer: Any, *, special: bool = True) -> str:
    """The text of ids, with or without special tokens.

    Raises:
        MechsteerError: there is no tokenizer.
    """
    if tokenizer is None:
        raise MechsteerError("prompts of ids without a tokenizer have no text. Pass tokenizer= when making them.")
    return tokenizer.decode(ids.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def str_tokens(ids: Int[Tensor, " _"], tokenizer: Any) -> list[str]:
    """The text of each id."""
    texts = [decode(ids[at : at + 1], tokenizer) for at in range(len(ids))]
    # Tokenizers that mark spaces with "▁" take a token by itself for the start of a text, and drop its space.
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    dropped = [name.startswith("▁") and not text.startswith(" ") for name, text in zip(names, texts, strict=True)]
    return [" " * drop + text for drop, text in zip(dropped, texts, strict=True)]


def to_html(lines: Sequence[Line], *, more: int, about: str = "") -> str:
    """Tokens on the colours of their roles, with position and role as a tooltip, completions in a column of their own.

    Args:
        lines: the prompts to show.
        more: how many prompts are not shown.
        about: a line about all of them.
    """
    present = sorted({role for line in lines for role in line.roles})
    legend = [markup.chip(f" {ROLES[role]} ", _COLOURS[role], more="margin-right:6px") for role in present]
    if any(True in line.slots for line in lines):
        legend.append(markup.chip(" slot ", _COLOURS[PREFIX], more="outline:1px dashed;margin-right:6px"))
    columns = [""] + (["prompt", "completion"] if COMPLETION in present else ["prompt"])
    rows = []
    for line in lines:
        chips = _chips(line)
        split = line.roles.index(COMPLETION) if COMPLETION in line.roles else len(chips)
        left, right = ([markup.faded(f"{n} padding")] if n else [] for n in line.padding)
        parts = [[*left, *chips[:split]], chips[split:]] if len(columns) > 2 else [[*left, *chips]]
        parts[-1] += right
        rows.append([markup.strong(line.label), *map(_run_of, parts)])
    rest = [markup.faded(f"and {more} more")] if more else []
    return markup.card("Prompts", Markup().join(legend), markup.table(columns, rows), *rest, about=about)


def _chips(line: Line) -> list[Markup]:
    """One for each token that is shown, with the count of those that are left out before the first after them."""
    chips = []
    for at, (token, role, slot) in enumerate(zip(line.tokens, line.roles, line.slots, strict=True)):
        position = at + (line.cut if line.cut and at >= line.head else 0)
        title = f"position {position}, {ROLES[role]}{', slot' * slot}"
        made = markup.chip(token, _COLOURS[role], title=title, more="outline:1px dashed;" * slot)
        gap = line.cut and at == line.head
        chips.append(markup.faded(f" … {line.cut} tokens … ") + made if gap else made)
    return chips


def _run_of(chips: Sequence[Markup]) -> Markup:
    # Tokens may break anywhere, as their text does; monospace tells one space from two.
    style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere"
    return Markup('<span style="{}">{}</span>').format(style, Markup().join(chips))
