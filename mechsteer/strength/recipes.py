"""Two ways to run the measurements of "Towards Understanding Steering Strength": as its code does, and the default."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.prompts import Prompts

RECIPES = ("default", "published")
"""What `recipe=` takes. "published" gives the numbers of the authors' code for one model in fp32:

- texts go to the tokenizer as they are, which puts its own special tokens around them: a text that was decoded with its
  BOS gets a second one, and tokenizers that add none (GPT-2's) leave it out. The default has one BOS where there is one
- vectors: the first 300 tokens of each text; every token counts, BOS too. In batches, the authors average the means of
  batches, which is the mean over texts only where all batches are equally large (their code demands it); here it
  always is
- token probabilities: the first 100 tokens of a context, and `logits[:, -1]` for its last token, which is right for one
  context at a time or with padding on the left; for log-odds they count attended tokens instead, which is right with
  padding on the right only. Here positions are those of real tokens under either padding, so this needs no repeating
- cross entropy: windows of equal length from inside each document (without BOS, followed by EOS): what a window leaves
  over at the end, and every shorter document, is dropped, and nothing tells the model that a text begins. The default
  puts BOS before each window and keeps the rest
- alpha times the vector is added at all positions, BOS too; alpha = 0 joins every grid. Here both recipes do that
"""

_GRIDS = {
    "token probability": (-200.0, 200.0, 1024),
    "cross entropy": (-100.0, 100.0, 128),
    "concept probability": (-40.0, 40.0, 41),
    "multiple choice": (-10.0, 10.0, 200),
}


def check_recipe(recipe: str) -> None:
    """Raise `MechsteerError` unless there is such a recipe."""
    if recipe not in RECIPES:
        raise MechsteerError(f"recipe={recipe!r} does not exist. Pass one of {', '.join(map(repr, RECIPES))}.")


def published_alphas(curve: str) -> list[float]:
    """The grid of the published code for a curve, in fp32, with 0.

    Args:
        curve: "token probability", "cross entropy", "concept probability" or "multiple choice".

    Raises:
        MechsteerError: there is no such curve.
    """
    if curve not in _GRIDS:
        raise MechsteerError(f"published_alphas({curve!r}) does not exist. Pass one of {', '.join(map(repr, _GRIDS))}.")
    low, high, steps = _GRIDS[curve]
    return alpha_grid(torch.linspace(low, high, steps))


def alpha_grid(alphas: Iterable[float | int] | Tensor) -> list[float]:
    """Strengths in ascending order, each once, and with 0: every change is measured from there.

    One that is below a millionth of the largest counts as 0.

    Raises:
        MechsteerError: there are none, or one is not finite.
    """
    given = [float(alpha) for alpha in alphas]
    if not given or not all(abs(alpha) < float("inf") for alpha in given):
        raise MechsteerError(f"alphas got {given}. Pass at least one strength, all of them finite.")
    # The middle of a linspace in fp32 is off 0 by rounding.
    least = 1e-6 * max(map(abs, given))
    return sorted({0.0, *(alpha for alpha in given if abs(alpha) > least)})


def published_prompts(texts: Sequence[str], model: Model, *, max_tokens: int) -> Prompts:
    """Texts tokenised as the published code does: with what the tokenizer itself puts around them, and cut.

    Raises:
        MechsteerError: there are no texts, or one has no tokens.
    """
    if isinstance(texts, str) or not texts:
        raise MechsteerError(f"texts got {texts!r}. Pass a list of texts.")
    ids = _plain_call(model.tokenizer, list(texts), max_tokens)
    return Prompts.from_ids(ids, tokenizer=model.tokenizer)


def _plain_call(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    padding, truncation = backend.padding, backend.truncation
    try:
        return tokenizer(texts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    finally:
        # The call changes what the backend was set to.
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
