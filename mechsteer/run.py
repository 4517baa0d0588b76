"""What one forward pass gave."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from torch import Tensor

from mechsteer import markup
from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts

# What a notebook shows: prompts, and likeliest next tokens of each.
_PROMPTS, _TOKENS = 10, 5


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What one forward pass gave.

    Attributes:
        prompts: what was run.
        logits: at the tokens in `read`, in the order of (batch, pos).
        read: True for tokens whose logits were computed; all real tokens unless less was asked for.
        activations: the recorded sites.
        example: which row of the prompts that were asked for each row of `prompts` is. Counts up from 0 except inside
            a sweep, where a batch holds one row per cell and example. Objectives that hold a value per example
            (baseline logits, targets) look it up with this.
    """

    prompts: Prompts
    rows: Float[Tensor, "row d_vocab"]
    read: Bool[Tensor, "batch pos"]
    activations: Activations
    example: Int[Tensor, " batch"]

    def logits_at(self, where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "row d_vocab"]:
        """Logits at the tokens that `where` marks, in the order of (batch, pos).

        Raises:
            MechsteerError: some of them were not computed.
        """
        if self.read is where or torch.equal(self.read, where):
            return self.rows
        if bool((where & ~self.read).any()):
            raise MechsteerError(
                f"{int((where & ~self.read).sum())} of the {int(where.sum())} logits asked for were not computed. "
                "Run the model with logits='all'."
            )
        return self.rows[where[self.read]]

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """All logits, in the layout of the prompts; zero at padding.

        Raises:
            MechsteerError: only some were computed.
        """
        if not torch.equal(self.read, self.prompts.mask):
            raise MechsteerError(
                f"logits were computed at {int(self.read.sum())} of {int(self.prompts.mask.sum())} tokens. "
                "Run the model with logits='all', or use logits_at."
            )
        full = self.rows.new_zeros(*self.read.shape, self.rows.shape[-1])
        return full.index_put(torch.where(self.read), self.rows)

    def __repr__(self) -> str:
        read, tokens = int(self.read.sum()), int(self.prompts.mask.sum())
        sites = f", {len(self.activations)} sites recorded" if self.activations else ""
        logits = f"logits {list(self.rows.shape)} at {read} of {tokens} tokens" if read else "no logits"
        return f"Run({len(self.prompts)} prompts, {logits}{sites}; {self.activations.model.name})"

    def _repr_html_(self) -> str:
        parts = [*self._next_tokens(), *([Markup(self.activations._repr_html_())] if self.activations else [])]
        title, about = repr(self)[:-1].split("(", 1)
        return markup.card(title, *parts, about=about)

    def _next_tokens(self) -> list[Markup]:
        """A table of the likeliest tokens after each prompt, before any completion; none where they were not read."""
        first = torch.arange(len(self.prompts), device=self.read.device) < _PROMPTS
        at = self.prompts.at(self.prompts.decision).to(self.read.device) & self.read & first[:, None]
        which = at.nonzero()[:, 0].tolist()
        if not which:
            return []
        top = self.logits_at(at).detach().float().softmax(-1).topk(min(_TOKENS, self.rows.shape[-1]))
        rows = []
        for row, ids, chances in zip(which, top.indices, top.values.tolist(), strict=True):
            texts = zip(self.prompts.shown(ids), chances, strict=True)
            chips = [
                markup.chip(text, f"rgba(40,120,230,{0.1 + 0.5 * p:.2f})") + markup.faded(f" {p:.1%}")
                for text, p in texts
            ]
            label = self.prompts.labels[row] if self.prompts.labels else str(row)
            rows.append([label, *map(markup.code, chips)])
        more = [markup.faded(f"and {len(self.prompts) - _PROMPTS} more")] if len(self.prompts) > _PROMPTS else []
        header = ["prompt", "likeliest next tokens", *[""] * (len(rows[0]) - 2)]
        return [markup.table(header, rows), *more]
