"""Activations of features on prompts: read, averaged over tokens, and lined up between prompts of unlike length."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives.base import check_tokens, tokens_at
from mechsteer.prompts import Prompts
from mechsteer.rows import of_like_lengths

# Tokens whose features are held at a time.
_TOKENS = {"cpu": 4096, "cuda": 65536}


def token_features(
    model: Model, sae: SparseAutoencoder, prompts: Prompts, features: list[int]
) -> Float[Tensor, "prompt pos feature"]:
    """Activations of some features at every token of right-padded prompts; 0 in the padding."""
    out = torch.zeros(*prompts.tokens.shape, len(features), device=model.device)
    for part in _parts(model, prompts):
        batch = prompts[part].padded("right")
        encoded = sae.encode(_states(model, sae, batch)[batch.mask])[:, features]
        width = batch.tokens.shape[1]
        filled = out.new_zeros(*batch.tokens.shape, len(features))
        filled[batch.mask] = encoded.to(out)
        out[part, :width] = filled
    return out


def mean_features(
    model: Model, sae: SparseAutoencoder, prompts: Prompts, at: int | str
) -> Float[Tensor, "prompt feature"]:
    """Mean activation of every feature over the tokens that `at` means, of right-padded prompts."""
    out = torch.zeros(len(prompts), sae.n_features, device=model.device)
    check_tokens(tokens_at(prompts, at), f"at {at!r}")
    for part in _parts(model, prompts):
        batch = prompts[part].padded("right")
        mask = tokens_at(batch, at)
        encoded = sae.encode(_states(model, sae, batch)[mask]).to(out)
        row = torch.where(mask)[0]
        out[part] = torch.zeros(len(part), sae.n_features, device=out.device).index_add(0, row, encoded)
        out[part] /= mask.sum(1)[:, None]
    return out


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


def carried(
    values: Float[Tensor, "prompt pos feature"],
    source: Prompts,
    own: Float[Tensor, "prompt new_pos feature"],
    target: Prompts,
    *,
    off: bool = False,
) -> Float[Tensor, "prompt new_pos feature"]:
    """Activations of `source` at their counterparts in `target`; elsewhere its own, or 0 where they differ (`off`)."""
    end, index, start = counterparts(source, target)
    moved = values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
    rest = torch.where(start[..., None], own, 0.0) if off else own
    return torch.where(end[..., None], moved, rest)


def _states(model: Model, sae: SparseAutoencoder, prompts: Prompts) -> Float[Tensor, "prompt pos d_in"]:
    return model.run(prompts, record=[sae.site], logits="none").activations[sae.site].flatten(2)


def _parts(model: Model, prompts: Prompts) -> list[Tensor]:
    return list(of_like_lengths(prompts.lengths.cpu(), _TOKENS.get(model.device.type, _TOKENS["cuda"])))
