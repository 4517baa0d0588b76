"""Activations of features on prompts: read, averaged over tokens, and lined up between prompts of unlike length.

Only a few tokens have all their features in memory at a time: with 16,000 of them, those of one prompt can take more
than all that the site itself holds.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives.base import check_tokens, tokens_at
from mechsteer.prompts import Prompts
from mechsteer.rows import of_like_lengths

# Tokens that are run at a time, and activations of features [token, feature] that are held at a time.
_TOKENS = {"cpu": 4096, "cuda": 65536}
_HELD = {"cpu": 1 << 23, "cuda": 1 << 28}


def site_states(model: Model, sae: SparseAutoencoder, prompts: Prompts) -> Float[Tensor, "prompt pos d_in"]:
    """The site's activations at every token of right-padded prompts, heads end to end; 0 in the padding."""
    out = torch.zeros(*prompts.tokens.shape, sae.d_in, device=model.device, dtype=model.dtype)
    for part in of_like_lengths(prompts.lengths.cpu(), _TOKENS.get(model.device.type, _TOKENS["cuda"])):
        batch = prompts[part].padded("right")
        found = model.run(batch, record=[sae.site], logits="none").activations[sae.site].flatten(2)
        out[part, : found.shape[1]] = torch.where(batch.mask[..., None], found, 0.0)
    return out


def encoded(sae: SparseAutoencoder, x: Float[Tensor, "token d_in"]) -> Iterator[tuple[slice, Tensor]]:
    """Activations of all features [token, feature], of some tokens after the others, and which tokens these are."""
    size = max(1, _HELD.get(x.device.type, _HELD["cuda"]) // sae.n_features)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield rows, sae.encode(x[rows])


def token_features(
    model: Model, sae: SparseAutoencoder, prompts: Prompts, features: list[int]
) -> Float[Tensor, "prompt pos feature"]:
    """Activations of some features at every token of right-padded prompts; 0 in the padding."""
    x = site_states(model, sae, prompts)[prompts.mask]
    out = torch.zeros(*prompts.tokens.shape, len(features), device=x.device)
    out[prompts.mask] = torch.cat([each[:, features] for _, each in encoded(sae, x)]).to(out)
    return out


def mean_features(
    model: Model, sae: SparseAutoencoder, prompts: Prompts, at: int | str
) -> Float[Tensor, "prompt feature"]:
    """Mean activation of every feature over the tokens that `at` means, of right-padded prompts."""
    mask = tokens_at(prompts, at)
    check_tokens(mask, f"at {at!r}")
    x, row = site_states(model, sae, prompts)[mask], torch.where(mask)[0]
    out = torch.zeros(len(prompts), sae.n_features, device=x.device)
    for rows, each in encoded(sae, x):
        out.index_add_(0, row[rows], each.to(out))
    return out / mask.sum(1)[:, None]


def counterparts(
    source: Prompts, target: Prompts
) -> tuple[Bool[Tensor, "prompt pos"], Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    """Which tokens of `target` stand in `source` too, where both end alike: requests with and without a prefix.

    Args:
        source, target: right-padded.

    Returns:
        Tokens of `target` in the longest common end (completions included), their positions in `source`, and tokens in
        the longest common start, whose activations are the same anyway.

    Raises:
        MechsteerError: other requests or completions.
    """
    if len(source) != len(target):
        raise MechsteerError(
            f"{len(target)} prompts and {len(source)} to compare them with were passed. Pass the same requests twice, "
            "with a prefix and without."
        )
    width = source.tokens.shape[1]
    there = target.positions + (source.decision - target.decision)[:, None]
    known = target.mask & (there >= 0) & (there < source.lengths[:, None])
    index = there.clamp(0, width - 1)
    same = known & (source.tokens.gather(1, index) == target.tokens)
    end = (same | ~target.mask).flip(1).cumprod(1).flip(1).bool() & target.mask
    after = source.lengths - source.decision != target.lengths - target.decision
    wrong = after | ~(end & target.at(target.decision)).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise MechsteerError(
            f"Prompt {row} does not end like the one that it is compared with: {target.texts[row][-60:]!r} and "
            f"{source.texts[row][-60:]!r}. Pass the same requests and the same completions twice, with a prefix and "
            "without."
        )
    here = target.positions.clamp(0, width - 1)
    alike = target.mask & (target.positions < source.lengths[:, None])
    start = (alike & (source.tokens.gather(1, here) == target.tokens)).int().cumprod(1).bool()
    return end, index, start


def at_counterparts(
    values: Float[Tensor, "prompt pos *each"], source: Prompts, target: Prompts
) -> tuple[Float[Tensor, "prompt new_pos *each"], Bool[Tensor, "prompt new_pos"]]:
    """What tokens of `source` have, at their counterparts in the end of `target`, and which tokens those are."""
    end, index, _ = counterparts(source, target)
    rows = torch.arange(len(target), device=index.device)[:, None]
    return values[rows, index], end
