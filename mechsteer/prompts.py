"""Prompts: token ids with the roles that their spans play."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import pad

from mechsteer import markup, rendering
from mechsteer.errors import MechsteerError
from mechsteer.rendering import COMPLETION, ROLES, SCAFFOLD, USER, Chat, Ids, Mask, Row

Side = Literal["left", "right"]
Completions = Sequence[str] | Ids

_SHOWN = 20  # prompts in a notebook
_TOKENS = 160  # of each of them


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Token ids [batch, pos] and what their spans are for.

        Prompts.from_chats(["What should I cook?"], model, prefix="Talk only about cats.")
        Prompts.from_chats(requests, model, slots=8).with_prefix(ids)
        Prompts.from_strings(["The cat sat on"], model, completions=[" the mat"])
        Prompts.from_ids([[1, 5, 8], [1, 9]])

    Attributes:
        tokens: ids; where `mask` is False anything may stand (the pad id as a rule).
        mask: True for real tokens, which are contiguous in every row: padding is on one side only.
        roles: index into `ROLES` of each token's span: BOS, the chat template and a separator are "scaffold".
        slots: True for tokens reserved for a prefix, whose ids or embeddings are to be filled in.
        labels: one name per prompt, or empty.
        tokenizer: turns ids into text; None for prompts that were given as ids without one.

    Raises:
        MechsteerError: there are no prompts, or another number of labels than of prompts.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    roles: Int[Tensor, "batch pos"]
    slots: Bool[Tensor, "batch pos"]
    labels: tuple[str, ...] = ()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise MechsteerError("Prompts got an empty list. Pass at least one prompt.")
        if self.labels and len(self.labels) != len(self):
            raise MechsteerError(
                f"Prompts got {len(self.labels)} labels for {len(self)} prompts. Pass one label per prompt, or none."
            )

    @staticmethod
    def from_strings(
        texts: str | Sequence[str],
        tokenizer: Any,
        *,
        prefix: str | None = None,
        completions: Completions | None = None,
        slots: int = 0,
        prepend_bos: bool = True,
        padding: str = "right",
        labels: Sequence[str] = (),
    ) -> "Prompts":
        """Prompts of plain text: BOS, then prefix or slots, then the text, with nothing between them.

        Args:
            texts: one text or several. One that starts with the BOS token's text does not get a second BOS.
            tokenizer: a fast tokenizer, or a Model that has one.
            prefix: goes in front of every text.
            completions: as `with_completions` takes them.
            slots: how many tokens to reserve where the prefix would be. The text is tokenised apart from them.
            prepend_bos: False leaves BOS out. A tokenizer without a BOS token has none to put in.
            padding: the side of the padding.
            labels: one name per prompt, or none.

        Raises:
            MechsteerError: a text holds a special token or is empty, or an argument does not fit the others.
        """
        tokenizer = rendering.tokenizer_of(tokenizer, "Prompts.from_strings")
        texts = [texts] if isinstance(texts, str) else texts
        marked = rendering.mark_strings(texts, tokenizer, prefix=prefix or "", slots=slots, prepend_bos=prepend_bos)
        rows = rendering.encode(marked, tokenizer, prepend_bos=prepend_bos, slots=slots)
        return Prompts._of_rows(rows, tokenizer, completions, padding, labels)

    @staticmethod
    def from_chats(
        chats: Chat | Sequence[Chat],
        tokenizer: Any,
        *,
        prefix: str = "",
        separator: str = "\n",
        completions: Completions | None = None,
        slots: int = 0,
        padding: str = "right",
        labels: Sequence[str] = (),
    ) -> "Prompts":
        """Chats in the model's own format: template, prefix, separator, request, template, completion.

        The ids are those of the rendered chat tokenised in one go, with one BOS whether or not the template writes it.

        Args:
            chats: what the user asks, or messages ({"role": ..., "content": ...}) of which the last is the user's; one
                or several of them. Texts of users are "user", those of earlier assistant turns and systems "scaffold".
            tokenizer: a fast tokenizer with a chat template, or a Model that has one.
            prefix: goes in front of the last message.
            separator: stands between a prefix (or slots) and the request.
            completions: what the assistant says, as `with_completions` takes them.
            slots, padding, labels: as in `from_strings`.

        Raises:
            MechsteerError: a text holds a special token, the template refuses a chat or rewrites its text, or an
                argument does not fit the others.
        """
        tokenizer = rendering.tokenizer_of(tokenizer, "Prompts.from_chats")
        marked = rendering.mark_chats(chats, tokenizer, prefix=prefix, separator=separator, slots=slots)
        rows = rendering.encode(marked, tokenizer, what="chat", prepend_bos=True, slots=slots)
        return Prompts._of_rows(rows, tokenizer, completions, padding, labels)

    @staticmethod
    def from_ids(
        ids: Ids,
        *,
        mask: Mask | None = None,
        tokenizer: Any = None,
        pad_id: int | None = None,
        completions: Ids | None = None,
        padding: str = "right",
        labels: Sequence[str] = (),
    ) -> "Prompts":
        """Prompts of these ids exactly as they are, with the role "user" (a leading BOS is "scaffold").

        Args:
            ids: one list per prompt, or a tensor [batch, pos].
            mask: True (or 1) for real tokens of a tensor; None means all of them.
            tokenizer: to show the prompts as text and to check the ids; or a Model.
            pad_id: fills up shorter lists; None takes the tokenizer's pad id, or 0.
            completions, padding, labels: as in `from_strings`.

        Raises:
            MechsteerError: an id is none of the tokenizer's, a prompt is empty, or the mask has holes.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        fill = rendering.pad_id(tokenizer) if pad_id is None else pad_id
        tokens, real = rendering.block(ids, mask, tokenizer, fill, "prompt")
        if not bool(real.any(1).all()):
            raise MechsteerError(
                f"prompt {int(real.any(1).int().argmin())} has no tokens. Leave it out, or give it a BOS token."
            )
        bos = getattr(tokenizer, "bos_token_id", None)
        leading = (real.cumsum(1) == 1) & real & (tokens == (-1 if bos is None else bos))
        roles = torch.where(leading, SCAFFOLD, USER)
        prompts = Prompts(tokens, real, roles, torch.zeros_like(real), tuple(labels), tokenizer)
        return prompts._completed(completions, padding)

    @staticmethod
    def _of_rows(
        rows: Sequence[Row], tokenizer: Any, completions: Completions | None, padding: str, labels: Sequence[str]
    ) -> "Prompts":
        prompts = Prompts.from_ids([row.ids for row in rows], tokenizer=tokenizer, labels=labels)
        # Rows are padded on the right still, so that the mask's True come in the rows' order.
        roles = prompts.roles.masked_scatter(prompts.mask, torch.tensor([role for row in rows for role in row.roles]))
        slots = prompts.slots.masked_scatter(prompts.mask, torch.tensor([slot for row in rows for slot in row.slots]))
        return replace(prompts, roles=roles, slots=slots)._completed(completions, padding)

    def _completed(self, completions: Completions | None, padding: str) -> "Prompts":
        return (self if completions is None else self.with_completions(completions)).padded(padding)

    @staticmethod
    def concat(parts: Sequence["Prompts"]) -> "Prompts":
        """All prompts of the parts, with the first part's padding side and device.

        Raises:
            MechsteerError: there are no parts, or their tokenizers differ.
        """
        if not parts:
            raise MechsteerError("Prompts.concat got an empty list. Pass at least one Prompts.")
        tokenizers = [part.tokenizer for part in parts if part.tokenizer is not None]
        if any(each is not tokenizers[0] and each.get_vocab() != tokenizers[0].get_vocab() for each in tokenizers):
            raise MechsteerError("Prompts.concat got prompts of different tokenizers. Their ids mean different tokens.")
        tokenizer = tokenizers[0] if tokenizers else None
        first, width = parts[0], max(part.mask.shape[1] for part in parts)
        parts = [part.padded("right").to(first.mask.device) for part in parts]

        def stack(name: str, fill: int = 0) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])

        tokens = stack("tokens", rendering.pad_id(tokenizer))
        named = any(part.labels for part in parts)
        labels = [label for part in parts for label in part.labels or ("",) * len(part)] if named else ()
        joined = Prompts(tokens, stack("mask"), stack("roles"), stack("slots"), tuple(labels), tokenizer)
        return joined.padded(first.padding_side)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each prompt, its completion included."""
        return self.mask.sum(1)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute position of each token: 0 for the first real one; -1 for padding."""
        return torch.where(self.mask, self.mask.cumsum(1) - 1, -1)

    @property
    def padding_side(self) -> Side:
        """Where padding stands; "right" where there is none."""
        return "left" if bool((~self.mask[:, 0]).any()) else "right"

    @property
    def decision(self) -> Int[Tensor, " batch"]:
        """Absolute position whose logits predict the first token of the completion: the last one before it."""
        return (self.mask & (self.roles != COMPLETION)).sum(1) - 1

    @property
    def n_slots(self) -> int:
        """Number of tokens of each prompt that are reserved for a prefix.

        Raises:
            MechsteerError: prompts differ in it.
        """
        counts = (self.slots & self.mask).sum(1).unique().tolist()
        if len(counts) > 1:
            raise MechsteerError(f"prompts have {counts} slots each; take those with equal numbers apart first.")
        return counts[0]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of tokens, mask and slots; the same for the same prompts under other padding."""
        plain = self.padded("right")
        digest = hashlib.sha256(repr(tuple(plain.mask.shape)).encode())
        for part in (plain.tokens * plain.mask, plain.mask, plain.slots & plain.mask):
            digest.update(part.to("cpu", torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def span(self, name: str) -> Bool[Tensor, "batch pos"]:
        """True for the real tokens of a role.

        Raises:
            MechsteerError: there is no such role.
        """
        if name not in ROLES:
            raise MechsteerError(f"span({name!r}) does not exist: a token's role is one of {', '.join(ROLES)}.")
        return self.mask & (self.roles == ROLES.index(name))

    def at(self, positions: Int[Tensor, " batch"] | int) -> Bool[Tensor, "batch pos"]:
        """True for the tokens at these absolute positions, one for each prompt.

        Args:
            positions: 0 is a prompt's first token, whatever the padding; -1 is its last one before any completion.

        Raises:
            MechsteerError: a prompt has no such position.
        """
        asked = torch.as_tensor(positions, device=self.mask.device).expand(len(self))
        found = torch.where(asked < 0, asked + self.decision + 1, asked)
        outside = (found < 0) | (found >= self.lengths)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise MechsteerError(
                f"position {int(asked[row])} is outside prompt {row}, which has {int(self.lengths[row])} tokens, "
                f"{int(self.decision[row]) + 1} of them before its completion. Positions count from 0 at the first "
                "token, or back from -1 at the last one before the completion."
            )
        return self.mask & (self.positions == found[:, None])

    def padded(self, side: str) -> "Prompts":
        """The same prompts with padding on that side, no wider than the longest.

        Raises:
            MechsteerError: the side is neither "left" nor "right".
        """
        if side not in ("left", "right"):
            raise MechsteerError(f"padding {side!r} is no side: it is 'left' or 'right'.")
        width, longest = self.mask.shape[1], int(self.lengths.max())
        kept = slice(0, longest) if side == "right" else slice(width - longest, width)
        # A stable sort moves the padding to one side and leaves the order of the tokens.
        order = (~self.mask if side == "right" else self.mask).int().argsort(dim=1, stable=True)[:, kept]
        if order.shape[1] == width and bool((order == torch.arange(width, device=order.device)).all()):
            return self
        return self._each(lambda tensor: tensor.gather(1, order))

    def to(self, device: torch.device | str) -> "Prompts":
        """The same prompts on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Prompts":
        """Some of the prompts, in the layout of all; `.padded` then cuts what became needless padding."""
        if isinstance(index, int):
            index = [index]
        elif isinstance(index, Tensor):
            index = index.cpu()
        rows = torch.arange(len(self))[index]
        labels = tuple(self.labels[row] for row in rows.tolist()) if self.labels else ()
        return self._each(lambda tensor: tensor[rows.to(tensor.device)], labels=labels)

    def with_prefix(self, ids: Sequence[int] | Ids | Int[Tensor, " _"]) -> "Prompts":
        """These prompts with ids in their slots; or, where they have a prefix already, in the place of that.

        Args:
            ids: as many as there are slots (or tokens of the prefix), for all prompts alike; or so many for each prompt
                ([batch, slots]).

        Raises:
            MechsteerError: the prompts have neither slots nor a prefix, or another number of them, or an id is none of
                the tokenizer's.
        """
        where = self.slots & self.mask if bool((self.slots & self.mask).any()) else self.span("prefix")
        counts = where.sum(1).unique().tolist()
        slots = counts[0]
        if counts == [0]:
            raise MechsteerError("with_prefix needs prompts with slots. Make them with slots= the number of ids.")
        each: Any = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not any(hasattr(row, "__len__") for row in each):
            each = [each] * len(self)
        prefix, real = rendering.block(each, None, self.tokenizer, 0, "prefix")
        lengths = real.sum(1).unique().tolist()
        if len(prefix) != len(self) or len(counts) > 1 or lengths != [slots]:
            held = " or ".join(map(str, counts))
            raise MechsteerError(
                f"with_prefix got {' or '.join(map(str, lengths))} ids for each of {len(prefix)} prompts, where "
                f"{len(self)} prompts have {held} slots each. Pass {slots} ids for all of them, or {slots} for each."
            )
        tokens = self.tokens.masked_scatter(where, prefix.to(self.tokens))
        return replace(self, tokens=tokens, slots=torch.zeros_like(self.slots))

    def with_completions(self, completions: Sequence[str] | Ids, *, mask: Mask | None = None) -> "Prompts":
        """These prompts with a completion at the end of each, in place of any that they had.

        Args:
            completions: one per prompt: texts, which are tokenised by themselves and get neither BOS nor EOS; or ids,
                which are taken as they are.
            mask: True (or 1) for real tokens, where `completions` is a tensor; None means all of them.

        Raises:
            MechsteerError: there is another number of them than of prompts, a text holds a special token, or an id is
                none of the tokenizer's.
        """
        if len(completions) != len(self) or isinstance(completions, str):
            got = "one string" if isinstance(completions, str) else f"{len(completions)} completions"
            raise MechsteerError(
                f"with_completions got {got} for {len(self)} prompts. Pass a list with one completion for each prompt."
            )
        ids: Any = completions
        if isinstance(completions[0], str):
            tokenizer = rendering.tokenizer_of(self.tokenizer, "with_completions")
            ids = [row.ids for row in rendering.encode(rendering.mark_completions(ids), tokenizer, what="completion")]
        prompts, side, device = self.without_completions(), self.padding_side, self.mask.device
        tokens, real = rendering.block(ids, mask, self.tokenizer, rendering.pad_id(self.tokenizer), "completion")
        return replace(
            prompts,
            tokens=torch.cat([prompts.tokens, tokens.to(device)], 1),
            mask=torch.cat([prompts.mask, real.to(device)], 1),
            roles=torch.cat([prompts.roles, torch.full_like(tokens, COMPLETION, device=device)], 1),
            slots=torch.cat([prompts.slots, torch.zeros_like(real, device=device)], 1),
        ).padded(side)

    def without_completions(self) -> "Prompts":
        """These prompts up to where their completions start."""
        return replace(self, mask=self.mask & (self.roles != COMPLETION)).padded(self.padding_side)

    def paired(self, corrupt: "Prompts") -> "Pair":
        """These prompts and corrupted versions of them that align token by token.

        Args:
            corrupt: as many prompts, of the same lengths and roles.

        Raises:
            MechsteerError: a pair does not align, or does not differ; the message shows the first such pair.
        """
        if len(corrupt) != len(self):
            raise MechsteerError(f"paired got {len(corrupt)} corrupt prompts for {len(self)} clean ones. Pass as many.")
        clean, corrupt = self.padded("right"), corrupt.padded("right").to(self.mask.device)
        # Past its end a prompt has the role -1, so that another length is another role.
        roles = [torch.where(each.mask, each.roles, -1) for each in (clean, corrupt)]
        width = max(each.shape[1] for each in roles)
        apart = torch.ne(*(pad(each, (0, width - each.shape[1]), value=-1) for each in roles))
        if bool(apart.any()):
            row = int(apart.any(1).int().argmax())
            raise MechsteerError(_misaligned(clean, corrupt, row, int(apart[row].int().argmax())))
        differs = clean.mask & (clean.tokens != corrupt.tokens)
        if not bool(differs.any(1).all()):
            row = int(differs.any(1).int().argmin())
            raise MechsteerError(
                f"pair {row} is the same prompt twice: {clean.shown_tokens(row)}. Change one of them, or leave the "
                "pair out."
            )
        return Pair(clean, corrupt, differs)

    @property
    def texts(self) -> list[str]:
        """The text of each prompt, special tokens and completion included.

        Raises:
            MechsteerError: there is no tokenizer.
        """
        return [rendering.decode(row[keep], self.tokenizer) for row, keep in zip(self.tokens, self.mask, strict=True)]

    @property
    def completions(self) -> list[str]:
        """The text of each completion, without special tokens; empty where there is none.

        Raises:
            MechsteerError: there is no tokenizer.
        """
        spans = zip(self.tokens, self.span("completion"), strict=True)
        return [rendering.decode(row[keep], self.tokenizer, special=False) for row, keep in spans]

    def str_tokens(self, index: int) -> list[str]:
        """The text of each real token of one prompt.

        Raises:
            MechsteerError: there is no tokenizer.
        """
        return rendering.str_tokens(self.tokens[index][self.mask[index]], self.tokenizer)

    def __repr__(self) -> str:
        spans = ", ".join(role for role in ROLES if bool(self.span(role).any()))
        slots = " with slots" if bool(self.slots.any()) else ""
        longest = int(self.lengths.max())
        return f"Prompts({len(self)} of at most {longest} tokens: {spans}{slots}; {self.padding_side} padding)"

    def _repr_html_(self) -> str:
        lines = [self._line(row) for row in range(min(len(self), _SHOWN))]
        lengths = self.lengths.tolist()
        span = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
        about = f"{len(self)} of {span} tokens, {self.padding_side} padding"
        return rendering.to_html(lines, more=len(self) - len(lines), about=about)

    def _line(self, row: int) -> rendering.Line:
        """One prompt as it is shown: of a long one the first and the last tokens."""
        real = self.mask[row].nonzero()[:, 0]
        cut, head = max(len(real) - _TOKENS, 0), _TOKENS // 2
        kept = torch.cat([real[:head], real[head + cut :]])
        tokens = self.tokens[row][kept]
        return rendering.Line(
            label=self.labels[row] if self.labels else str(row),
            tokens=self.shown(tokens),
            roles=self.roles[row][kept].tolist(),
            slots=self.slots[row][kept].tolist(),
            padding=(int(real[0]), self.mask.shape[1] - 1 - int(real[-1])),
            head=head,
            cut=cut,
        )

    def shown_tokens(self, index: int) -> list[str]:
        """The tokens of one prompt as text if there is a tokenizer, else as ids."""
        return self.shown(self.tokens[index][self.mask[index]])

    def shown(self, ids: Int[Tensor, " _"]) -> list[str]:
        """These ids as text if there is a tokenizer, else as numbers."""
        return list(map(str, ids.tolist())) if self.tokenizer is None else rendering.str_tokens(ids, self.tokenizer)

    def _each(self, change: Callable[[Tensor], Tensor], **more: Any) -> "Prompts":
        """These prompts with the same change made to all four tensors."""
        names = ("tokens", "mask", "roles", "slots")
        return replace(self, **{name: change(getattr(self, name)) for name in names}, **more)


class Pair(NamedTuple):
    """Clean and corrupt prompts, laid out alike with padding on the right, and where their ids differ."""

    clean: Prompts
    corrupt: Prompts
    differs: Bool[Tensor, "batch pos"]

    def __repr__(self) -> str:
        counts = self.differs.sum(1).tolist()
        return f"Pair({len(self.clean)} pairs that differ in {min(counts)} to {max(counts)} tokens)"

    def _repr_html_(self) -> str:
        parts = [
            Markup("<div>{}</div>{}").format(name, Markup(each._repr_html_()))
            for name, each in (("clean", self.clean), ("corrupt", self.corrupt))
        ]
        return markup.card("Pair", *parts, about=repr(self).removeprefix("Pair(")[:-1])


def _misaligned(clean: Prompts, corrupt: Prompts, row: int, at: int) -> str:
    def around(prompts: Prompts) -> str:
        tokens = prompts.shown_tokens(row)
        here = f"{tokens[at]!r} is {ROLES[prompts.roles[row, at]]}" if at < len(tokens) else "it has ended"
        return f"{len(tokens)} tokens, and at position {at} of [..{tokens[max(at - 3, 0) : at + 4]}..] {here}"

    return (
        f"pair {row} does not align: clean has {around(clean)}; corrupt has {around(corrupt)}. "
        "Choose words with equal numbers of tokens, or leave the pair out."
    )
