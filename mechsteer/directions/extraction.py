"""Directions from texts and from weights: differences of means, principal components, unembedding vectors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.directions.direction import Direction
from mechsteer.errors import MechsteerError
from mechsteer.precision import precise, wide
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.site import KINDS, Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model

Texts = Prompts | Sequence[str] | Tensor
"""Prompts as they are, or texts for the model's tokenizer."""
Tokens = str | tuple[Bool[Tensor, "_ _"], ...]
"""Which tokens of a text count: "all", "last" (before any completion), a span's name, or a mask for each group."""
_CHUNK = 256  # texts tokenised at a time: what is cut off never needs memory for all of them at once


def difference_of_means(
    model: "Model",
    positives: Texts,
    negatives: Texts,
    *,
    sites: Iterable[SiteLike] | SiteLike = "resid_post",
    tokens: Tokens = "all",
    normalise: bool = False,
    max_tokens: int = 300,
    batch_tokens: int = 2000,
    progress: bool = True,
) -> dict[Site, Direction]:
    """Mean activation over the positives minus mean activation over the negatives.

    v = mean_i mean_t x_t(positive i) - mean_i mean_t x_t(negative i): every text counts the same, however long. With
    the defaults this is the recipe of "A theory of steering strength" (its published code): the residual stream after
    every block, all tokens with BOS, not normalised. Sums are in fp64; activations are reduced batch by batch.

    Args:
        model: to record.
        positives: texts with the concept; BOS is put before texts that lack it, and they are cut at `max_tokens`.
            Prompts, and token ids [batch, pos], are run as they are.
        negatives: texts with the opposite, or any others.
        sites: hook points or heads; a kind without a layer stands for all layers.
        tokens: "all"; "last", each text's last token before any completion; a span's name such as "user"; or a pair of
            masks in the layout of `positives` and `negatives`.
        normalise: whether to scale each vector to length 1.
        max_tokens: of a text, BOS included; the rest of it, and what the context has no room for, is cut.
        batch_tokens: at most this many tokens in a batch, padding included.
        progress: whether to show a bar where it takes long.

    Returns:
        One Direction for each site; its origin holds counts and the norms of both means. Of texts it counts those that
        were cut, too: the last token of such a text is not the one that it ends in.

    Raises:
        MechsteerError: a text is empty or has none of the tokens asked for, or a site does not exist.
    """
    where = _sites(model, sites)
    means, about = [], []
    given = {"positives": positives, "negatives": negatives}
    for group, texts, chosen, known in _groups(model, given, tokens, max_tokens):
        sums: dict[Site, Tensor] = {}
        for _, rows in _means_of_texts(model, texts, where, chosen, batch_tokens, group, progress):
            sums = {site: rows[site].sum(0) + sums.get(site, 0.0) for site in where}
        means.append({site: sums[site] / len(texts) for site in where})
        about.append(known)
    made = {}
    for site in where:
        both = {"positives": means[0][site], "negatives": means[1][site]}
        counts = {
            name: {**count, "norm": float(torch.linalg.vector_norm(both[name]))}
            for name, count in zip(both, about, strict=True)
        }
        origin = {"method": "difference_of_means", "tokens": _words(tokens), **counts}
        difference = both["positives"] - both["negatives"]
        direction = Direction(stored(difference[None], model), site, model.id, origin)
        made[site] = direction.unit if normalise else direction
    return made


def pca(
    model: "Model",
    positives: Texts,
    negatives: Texts | None = None,
    *,
    sites: Iterable[SiteLike] | SiteLike = "resid_post",
    tokens: Tokens = "last",
    k: int = 1,
    centre: bool = True,
    max_tokens: int = 300,
    batch_tokens: int = 2000,
    progress: bool = True,
) -> dict[Site, Direction]:
    """Principal components of the texts' mean activations, or of the differences of pairs (Zou et al. 2023,
    "Representation engineering", section 3.1).

    Signs are such that positives lie higher than negatives on average; without negatives, such that the component's
    largest entry is positive.

    Args:
        model: to record.
        positives: as in `difference_of_means`.
        negatives: the partner of each positive; None takes the components of the positives alone.
        sites: hook points or heads; a kind without a layer stands for all layers.
        tokens: whose mean stands for a text; as in `difference_of_means`, with one mask for each group.
        k: number of components.
        centre: whether to subtract the mean row first, as PCA does. The differences of pairs lose what they have in
            common by that; False keeps it.
        max_tokens: of a text, BOS included.
        batch_tokens: at most this many tokens in a batch, padding included.
        progress: whether to show a bar where it takes long.

    Returns:
        One Direction for each site with k orthonormal vectors, the strongest first; its origin holds the share of the
        rows' squared length that each explains, and counts as in `difference_of_means`.

    Raises:
        MechsteerError: groups differ in size, the rows span fewer than k dimensions, or as in `difference_of_means`.
    """
    where, given = _sites(model, sites), {"positives": positives}
    if negatives is not None:
        given["negatives"] = negatives
    groups, about = [], {}
    for group, texts, chosen, known in _groups(model, given, tokens, max_tokens):
        groups.append(_rows_of_texts(model, texts, where, chosen, batch_tokens, group, progress))
        about[group] = known
    if len({count["texts"] for count in about.values()}) > 1:
        counts = " and ".join(f"{count['texts']} {name}" for name, count in about.items())
        raise MechsteerError(f"pca got {counts}, but takes pairs. Pass as many of both, or positives alone.")
    made = {}
    for site in where:
        rows = groups[0][site] - groups[1][site] if len(groups) > 1 else groups[0][site]
        components, shares = _principal(rows, k=k, centre=centre, site=site)
        signs = (components @ rows.mean(0)).sign() if len(groups) > 1 else torch.zeros(k)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))[:, 0].sign()
        components = components * torch.where(signs == 0, largest, signs.to(largest))[:, None]
        origin = {"method": "pca", "tokens": _words(tokens), "centre": centre, "explained": shares, **about}
        made[site] = Direction(stored(components, model), site, model.id, origin)
    return made


def text_means(
    model: "Model",
    texts: Texts,
    *,
    sites: Iterable[SiteLike] | SiteLike = "resid_post",
    tokens: Tokens = "all",
    max_tokens: int = 300,
    batch_tokens: int = 2000,
    progress: bool = True,
) -> dict[Site, Float[Tensor, "text d"]]:
    """Mean activation over the tokens of each text, from one pass: what `difference_of_means` averages over texts.

    Args:
        model: to record.
        texts, sites, tokens, max_tokens, batch_tokens, progress: as in `difference_of_means`, with one mask.

    Returns:
        For each site one row in fp64 for each text, in the order of the texts.

    Raises:
        MechsteerError: as in `difference_of_means`.
    """
    where = _sites(model, sites)
    ((group, prompts, chosen, _),) = _groups(model, {"texts": texts}, tokens, max_tokens)
    return _rows_of_texts(model, prompts, where, chosen, batch_tokens, group, progress)


def from_unembedding(
    model: "Model", token: str | int, *, minus: str | int | None = None, site: SiteLike | None = None
) -> Direction:
    """What the residual stream must contain for a token's logit to rise: its column of the unembedding matrix.

    The final norm stands between; its weights are not multiplied in.

    Args:
        model: whose unembedding.
        token: text that is one token, or its id.
        minus: a token whose column is subtracted, for the direction of a logit difference.
        site: None takes the residual stream after the last block.

    Raises:
        MechsteerError: a text is not one token, or there is no such id.
    """
    where = Site("resid_post", model.n_layers - 1) if site is None else Site.of(site)
    matrix, token_id = model.unembedding(), _token_id(model, token)
    origin: dict[str, Any] = {"method": "unembedding", "token": token, "id": token_id}
    vector = precise(matrix[:, token_id])
    if minus is not None:
        other = _token_id(model, minus)
        origin |= {"minus": minus, "minus_id": other}
        vector = vector - precise(matrix[:, other])
    direction = Direction(vector.detach().clone()[None], where, model.id, origin)
    direction.check_fits(model)
    return direction


def _sites(model: "Model", sites: Iterable[SiteLike] | SiteLike) -> list[Site]:
    """Each site once; other than `model.sites`, with its head."""
    short = isinstance(sites, tuple) and len(sites) == 2 and isinstance(sites[1], int)
    found: dict[Site, None] = {}
    for item in [sites] if short or isinstance(sites, str | Site) else sites:  # type: ignore[union-attr]
        of_kind = isinstance(item, str) and item in KINDS
        found |= dict.fromkeys(model.sites(item) if of_kind else [Site.of(item)])  # type: ignore[arg-type]
    for site in found:
        model.check_site(site)
        if "head" in site.axes and (site.head is None or site.axes[-1] != "d_head"):
            raise MechsteerError(
                f"{site!r} holds no vector for each token. Choose one head of q, k, v or z, such as "
                f"Site('z', {site.layer}, head=0), or a site of the residual stream."
            )
    return list(found)


def _groups(
    model: "Model", given: Mapping[str, Texts], tokens: Tokens, max_tokens: int
) -> Iterator[tuple[str, Prompts, Bool[Tensor, "batch pos"], dict[str, int | str]]]:
    """Name, right-padded prompts, mask of the tokens that count, and what an origin says of them, for each group."""
    if not isinstance(tokens, str) and len(tokens) != len(given):
        raise MechsteerError(f"tokens got {len(tokens)} masks. Pass one for each of {' and '.join(given)}.")
    for index, (group, texts) in enumerate(given.items()):
        cut = {}
        if isinstance(texts, Tensor):
            texts = model.prompts(texts)
        if not isinstance(texts, Prompts):
            if isinstance(texts, str) or not texts:
                raise MechsteerError(f"{group} got {texts!r}. Pass a list of texts, Prompts, or ids [batch, pos].")
            limit = min(max_tokens, model.n_ctx)
            parts, cut = [], {"cut": 0}
            for start in range(0, len(texts), _CHUNK):
                part = Prompts.from_strings(texts[start : start + _CHUNK], model.tokenizer)
                cut["cut"] += int((part.lengths > limit).sum())
                parts.append(_cut(part, limit))
            texts = Prompts.concat(parts)
        if isinstance(tokens, str):
            prompts = model.prompts(texts).padded("right")
            chosen = _chosen(prompts, tokens)
        else:
            if tokens[index].shape != texts.mask.shape:
                raise MechsteerError(
                    f"tokens got a mask of shape {list(tokens[index].shape)} for {group} of shape "
                    f"{list(texts.mask.shape)}. Pass Prompts, and masks in their layout."
                )
            prompts = model.prompts(texts).padded("right")
            chosen = torch.zeros_like(prompts.mask)
            # Real tokens come in the same order under every padding.
            chosen[prompts.mask] = tokens[index].to(chosen.device)[texts.mask.to(chosen.device)]
        if not bool(chosen.any(1).all()):
            row = int(chosen.any(1).int().argmin())
            raise MechsteerError(
                f"Text {row} of the {group} has no token that tokens={_words(tokens)!r} means. Leave it out, or choose "
                "others."
            )
        counts = {"texts": len(prompts), "tokens": int(chosen.sum()), "prompts": prompts.hash, **cut}
        yield group, prompts, chosen, counts


def _chosen(prompts: Prompts, tokens: str) -> Bool[Tensor, "batch pos"]:
    if tokens == "all":
        return prompts.mask
    return prompts.at(prompts.decision) if tokens == "last" else prompts.span(tokens)


def _cut(prompts: Prompts, limit: int) -> Prompts:
    """Right-padded prompts without what comes after their first `limit` tokens."""
    parts = {name: getattr(prompts, name)[:, :limit] for name in ("tokens", "mask", "roles", "slots")}
    return replace(prompts, **parts)


def _means_of_texts(
    model: "Model",
    prompts: Prompts,
    sites: Sequence[Site],
    chosen: Bool[Tensor, "batch pos"],
    batch_tokens: int,
    group: str,
    progress: bool,
) -> Iterator[tuple[Tensor, dict[Site, Float[Tensor, "part d"]]]]:
    """Mean activation over the chosen tokens of each text in fp64, batch by batch: (which texts, rows at each site)."""
    # Texts of like length share a batch, so that little is spent on padding.
    order = prompts.lengths.argsort(descending=True).cpu()
    points = list(dict.fromkeys(site.point for site in sites))
    with bar(group, len(order), show=progress) as shown:
        while len(order):
            size = max(1, batch_tokens // int(prompts.lengths[order[0]]))
            part, order = order[:size], order[size:]
            batch = prompts[part].padded("right")
            mask = chosen[part.to(chosen.device), : batch.mask.shape[1]]
            states = model.states_at(batch, points, mask)
            values = {s: states[s.point] if s.head is None else states[s.point][:, s.head] for s in sites}
            yield part, {site: _row_means(values[site], mask) for site in sites}
            shown.advance(len(part))


def _rows_of_texts(
    model: "Model",
    prompts: Prompts,
    sites: Sequence[Site],
    chosen: Bool[Tensor, "batch pos"],
    batch_tokens: int,
    group: str,
    progress: bool,
) -> dict[Site, Float[Tensor, "text d"]]:
    """What `_means_of_texts` gives, in the order of the texts."""
    parts = list(_means_of_texts(model, prompts, sites, chosen, batch_tokens, group, progress))
    back = torch.cat([order for order, _ in parts]).argsort()
    return {site: torch.cat([rows[site] for _, rows in parts])[back] for site in sites}


def _row_means(values: Float[Tensor, "token d"], mask: Bool[Tensor, "part pos"]) -> Float[Tensor, "part d"]:
    """Mean of each row's tokens, which are those that the mask marks, in fp64."""
    exact = (values if values.is_cuda else values.cpu()).double()  # Apple's GPUs have no fp64
    counts, text = mask.sum(1, keepdim=True).to(exact.device), mask.nonzero()[:, 0].to(exact.device)
    return exact.new_zeros(len(mask), exact.shape[1]).index_add(0, text, exact) / counts


def _principal(
    rows: Float[Tensor, "n d"], *, k: int, centre: bool, site: Site
) -> tuple[Float[Tensor, "k d"], list[float]]:
    """The first k right singular vectors, and the share of the rows' squared length along each."""
    rows = rows - rows.mean(0) if centre else rows
    _, singular, components = torch.linalg.svd(rows, full_matrices=False)
    rank = int((singular > singular[0] * max(rows.shape) * torch.finfo(torch.float32).eps).sum())
    if not 1 <= k <= rank:
        raise MechsteerError(
            f"pca got k={k}, but the {len(rows)} rows at {site}{' less their mean' if centre else ''} span {rank} "
            "dimensions. Pass more texts, or a smaller k of at least 1."
        )
    return components[:k], (singular[:k] ** 2 / (singular**2).sum()).tolist()


def stored(vectors: Float[Tensor, "k d"], model: "Model") -> Float[Tensor, "k d"]:
    """Where the model is and in its type, but at least fp32: half precision would lose most of a small difference."""
    return vectors.to(model.device, wide(model.dtype))


def _words(tokens: Tokens) -> str:
    return tokens if isinstance(tokens, str) else "mask"


def _token_id(model: "Model", token: str | int) -> int:
    if isinstance(token, str):
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [model.tokenizer.decode([each]) for each in ids]
            raise MechsteerError(
                f"{token!r} is {len(ids)} tokens of {model.name} ({', '.join(map(repr, pieces))}). Pass a text that is "
                "one token, or an id."
            )
        if ids[0] == model.tokenizer.unk_token_id and token != model.tokenizer.unk_token:
            raise MechsteerError(f"{token!r} is unknown to the tokenizer of {model.name}. Pass another text, or an id.")
        return ids[0]
    if not 0 <= token < model.d_vocab:
        raise MechsteerError(f"Token id {token} does not exist: {model.name} has ids 0 to {model.d_vocab - 1}.")
    return token
