"""Activations at some tokens from the packed forward pass: nothing is computed for padding, and attention is fused."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.backends.decoder import KINDS, Cache, Capture, Decoder, key_of
from mechsteer.backends.packing import whole_pack
from mechsteer.prompts import Prompts
from mechsteer.site import Site


def covers(cfg: Any, sites: Iterable[Site]) -> bool:
    """Whether the packed forward pass has the same activations at these sites as a hooked model with this config."""
    # A pattern's width is that of its batch. Keys and values that TransformerLens repeats for each head are not here.
    lacks = {"pattern"} | ({"k", "v"} if cfg.ungroup_grouped_query_attention else set())
    return {site.kind for site in sites} <= set(KINDS) - lacks


def states_at(
    decoder: Decoder, prompts: Prompts, sites: Sequence[Site], where: Bool[Tensor, "batch pos"]
) -> dict[Site, Float[Tensor, "row ..."]]:
    """Per site the values at the tokens that `where` marks, in the order of (batch, pos).

    Tokens after a prompt's last marked one are not run, nor layers after the last site's; of the last layer, only
    what the marked tokens need.

    Args:
        decoder: of the model.
        prompts: right-padded.
        sites: whole hook points that `covers` allows.
        where: at least one real token.
    """
    count = torch.arange(where.shape[1], device=where.device) + 1
    index = where.any(1).nonzero().squeeze(1)
    marked = where[index]
    pack = whole_pack(prompts, index, stop=(marked * count).amax(1), read=marked)
    rows, capture = pack.all.rows, Capture(frozenset(key_of(site) for site in sites))
    layers = max((site.layer + 1 for site in sites if site.layer is not None), default=0)
    x = decoder.embed(prompts.tokens[rows.example, rows.position], pack.all, {}, capture)
    cache = Cache.empty(decoder, len(index), pack.n_keys)
    decoder.blocks(x, pack, first=0, stop=layers, own=cache, capture=capture)
    taken = (capture.taken[key_of(site)] for site in sites)
    return {
        site: values[where[layout.rows.example, layout.rows.position]]
        for site, (values, layout) in zip(sites, taken, strict=True)
    }
