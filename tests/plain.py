"""Interventions written by hand as plain TransformerLens hooks, and prompts with spans to try them on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import zoo

import mechsteer as ms
from mechsteer.site import KINDS, Site

N_POS = 10  # more than the zoo's attention windows
PlainHooks = list[tuple[str, Callable[..., torch.Tensor]]]
_UNCHANGED: dict[tuple[str, str, str], torch.Tensor] = {}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    return [zoo.prompts(batch=1, n_pos=n, seed=100 * seed + i)[0].tolist() for i, n in enumerate(lengths)]


def with_spans(lengths: Sequence[int] = (N_POS, N_POS, N_POS + 3), seed: int = 0) -> ms.Prompts:
    """Left-padded prompts: one token of scaffold, two of prefix, the user's, and two of completion."""
    prompts = ms.Prompts.from_ids(ids(lengths, seed))
    end = prompts.lengths[:, None]
    roles = torch.full_like(prompts.tokens, 2)
    for role, where in (
        (0, prompts.positions == 0),
        (1, (prompts.positions - 1) // 2 == 0),
        (3, prompts.positions >= end - 2),
    ):
        roles = torch.where(where & prompts.mask, role, roles)
    return replace(prompts, roles=roles).padded("left")


def all_sites(model: ms.Model, layer: int = 1) -> list[Site]:
    """Every hook point of one layer that this model runs, and those outside the blocks."""
    known = [Site(kind, layer if "{layer}" in entry.hook else None) for kind, entry in KINDS.items()]
    rotary = model.cfg.positional_embedding_type == "rotary"
    return [
        site for site in known if site.hook_name in model.hooked.hook_dict and not (rotary and site.kind == "pos_embed")
    ]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.shape == expected.shape
    expected = expected.detach()
    torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


def real(run: ms.Run) -> list[torch.Tensor]:
    """Logits of each prompt's real tokens."""
    return [logits[mask] for logits, mask in zip(run.logits, run.prompts.mask, strict=True)]


def where(prompts: ms.Prompts, at: Any) -> torch.Tensor:
    """Real tokens [batch, pos] that a rule means, worked out token by token."""
    out = torch.zeros_like(prompts.mask)
    for row, col in prompts.mask.nonzero().tolist():
        position = int(prompts.mask[row, :col].sum())
        before = int((prompts.mask[row] & (prompts.roles[row] != 3)).sum())
        if at is None:
            means = True
        elif isinstance(at, str):
            means = ("scaffold", "prefix", "user", "completion")[int(prompts.roles[row, col])] == at
        else:
            means = position in [p if p >= 0 else before + p for p in ([at] if isinstance(at, int) else at)]
        out[row, col] = means
    return out


def by_hand(site: Site, mask: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> PlainHooks:
    """A plain hook that puts `change` of the activation where `mask` [batch, pos] says, and at the site's head only."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        scores, head = site.axes[-1] == "src", site.head
        # [batch, pos, ...] or [batch, head, dest, src]
        chosen = mask[:, None, :, None] if scores else mask.view(*mask.shape, *[1] * (tensor.ndim - 2))
        if head is not None:
            n_heads = tensor.shape[1 if scores else 2]
            only = torch.arange(n_heads) == head
            chosen = chosen & (only.view(1, -1, 1, 1) if scores else only.view(1, 1, -1, 1))
        return torch.where(chosen, change(tensor), tensor)

    return [(site.hook_name, hook)]


def assert_is_by_hand(
    model: ms.Model, prompts: ms.Prompts, intervention: ms.Intervention, hooks: Callable[[torch.Tensor], PlainHooks]
) -> None:
    """`model.run` on padded prompts gives what plain hooks give on the first two of them, which need no padding.

    Args:
        hooks: makes them, given the tokens [batch, pos] that the intervention means.
    """
    two = prompts[:2].padded("right")
    assert bool(two.mask.all()) and not bool(prompts.mask.all())
    mask = where(two, intervention.at)
    with torch.no_grad():
        expected = model.hooked.run_with_hooks(two.tokens, fwd_hooks=hooks(mask))
        key = model.name, model.backend, two.hash
        if key not in _UNCHANGED:
            _UNCHANGED[key] = model.hooked(two.tokens)
    unchanged = _UNCHANGED[key]
    assert (expected - unchanged).abs().max() > 1e-4 * unchanged.abs().max(), "an effect this weak would hide an error"
    run = model.run(prompts, [intervention])
    assert_close(torch.stack(real(run)[:2]), expected)


def heads_of(model: ms.Model, site: Site) -> list[int | None]:
    n_heads = model.size(site, "head")
    return [None, n_heads - 1] if "head" in site.axes and n_heads else [None]
