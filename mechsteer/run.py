"""What one forward pass gave."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.errors import MechsteerError
from mechsteer.prompts import Prompts


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
