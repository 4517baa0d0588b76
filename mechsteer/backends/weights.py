"""Reading and rewriting the weights of a hooked model: the unembedding, and interventions made permanent."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsteer.backends import Hooked, backend_of, hooks
from mechsteer.errors import MechsteerError
from mechsteer.precision import precise
from mechsteer.site import Site

RANK_KINDS = ("mlp_post", "mlp_out", "z", "attn_out")
"""What an edit of rank k reads."""


class _Writer(NamedTuple):
    """A weight whose rows or columns are added to the residual stream."""

    module: nn.Module
    name: str
    dim: int  # along which the weight is as wide as the residual stream


def unembedding(hooked: Hooked) -> Float[Tensor, "d_model d_vocab"]:
    """The matrix that turns the normed residual stream into logits. It shares memory with the model."""
    return hooked.W_U


def orthogonalise(hooked: Hooked, basis: Float[Tensor, "k d_model"]) -> Hooked:
    """A copy of the model that cannot write to a subspace of the residual stream.

    Every matrix and bias that writes there is projected: W <- W (1 - U^T U), where the rows of W are in the residual
    stream. This equals projecting the embeddings and every `attn_out` and `mlp_out`: Arditi et al. 2024, "Refusal in
    language models is mediated by a single direction", section 4.1.

    Args:
        hooked: is left as it is.
        basis: orthonormal rows U.

    Raises:
        MechsteerError: the basis is not orthonormal, or the two are not the same function in this architecture.
    """
    d_model, exact = hooked.cfg.d_model, basis.detach().double()
    one = torch.eye(len(exact)).to(exact)
    if exact.shape[1] != d_model or not torch.allclose(exact @ exact.T, one, atol=1e-4, rtol=0):
        raise MechsteerError(
            f"orthogonalise got a basis {list(basis.shape)}, but takes orthonormal rows [k, {d_model}]. "
            "Use Direction.orthonormal()."
        )
    _check_writes_directly(hooked)
    edited = _copy(hooked)

    def project(tensor: Tensor, hook: Any) -> Tensor:
        rows = exact.to(tensor)
        return tensor - (tensor @ rows.T) @ rows

    blocks = [f"blocks.{layer}.hook_{kind}_out" for layer in range(hooked.cfg.n_layers) for kind in ("attn", "mlp")]
    names = [name for name in ("hook_embed", "hook_pos_embed", *blocks) if name in edited.hook_dict]
    expected = _probe(edited, [(name, project) for name in names])
    _untie(edited)
    for module, name, dim in _writers(edited):
        weight = getattr(module, name).data
        wide = weight.double().movedim(dim, -1)
        rows = exact.to(wide)
        weight.copy_((wide - (wide @ rows.T) @ rows).movedim(-1, dim))
    _check_equal(edited, expected, "orthogonalise")
    return edited


def add_bias(hooked: Hooked, layer: int, vector: Float[Tensor, " d_model"]) -> Hooked:
    """A copy of the model that adds a vector to `resid_post` of a block at every token.

    Args:
        hooked: is left as it is.
        layer: the block, whose MLP gets the vector added to its output bias (or gets such a bias).
        vector: what to add.

    Raises:
        MechsteerError: there is no such block, or the two are not the same function in this architecture.
    """
    if not 0 <= layer < hooked.cfg.n_layers or vector.shape != (hooked.cfg.d_model,):
        raise MechsteerError(
            f"add_bias got layer {layer} and a vector of shape {list(vector.shape)}, but the model has layers 0 to "
            f"{hooked.cfg.n_layers - 1} and width {hooked.cfg.d_model}. Make the vector from the same model."
        )
    _check_writes_directly(hooked)
    edited = _copy(hooked)
    added = vector.detach()
    expected = _probe(edited, [(f"blocks.{layer}.hook_resid_post", lambda tensor, hook: tensor + added.to(tensor))])
    module, name, _ = _writer_of(edited, layer, "mlp")
    old = getattr(module, name)
    if old is None:
        weight = next(module.parameters())
        module.register_parameter(name, nn.Parameter(added.to(weight), requires_grad=weight.requires_grad))
    else:
        old.data.copy_(old.data.double() + added.to(old.device).double())
    _check_equal(edited, expected, "add_bias")
    return edited


def add_rank(
    hooked: Hooked,
    layer: int,
    kind: str,
    reads: Float[Tensor, "k d_in"],
    writes: Float[Tensor, "_ d_model"],
    *,
    head: int | None = None,
) -> Hooked:
    """A copy of the model in which a block writes more: an edit of rank k of the matrix that it writes with.

        out(x) + sum_i (x . read_i) write_i

    With x what the matrix is applied to (`mlp_post`, or `z` of a head), W <- W + sum_i read_i (x) write_i. With x what
    the module writes, bias and all (`mlp_out`, `attn_out`), W <- W + W read_i (x) write_i and the same for the bias;
    reads = -writes = an orthonormal basis is then the projection of that module's output. Source: the form of Meng et
    al. 2022, "Locating and editing factual associations in GPT" (equation 2).

    Args:
        hooked: is left as it is.
        layer: the block.
        kind: "mlp_post", "mlp_out", "z" or "attn_out": the hook point that is read.
        reads: rows that are read.
        writes: rows that are written.
        head: which head's `z`; None for the other kinds.

    Raises:
        MechsteerError: there is no such place, sizes do not fit, or the two are not the same function in this
            architecture.
    """
    cfg = hooked.cfg
    d_in = {"mlp_post": cfg.d_mlp, "z": cfg.d_head}.get(kind, cfg.d_model)
    has_head = head is not None and 0 <= head < cfg.n_heads if kind == "z" else head is None
    fits = reads.shape[1] == d_in and writes.shape == (len(reads), cfg.d_model)
    if kind not in RANK_KINDS or not 0 <= layer < cfg.n_layers or not has_head or not fits:
        raise MechsteerError(
            f"add_rank got reads {list(reads.shape)} of {kind!r} (layer {layer}, head {head}) and writes "
            f"{list(writes.shape)}. It takes reads [k, d] of {', '.join(map(repr, RANK_KINDS))} (z of one head) and as "
            f"many writes [k, {cfg.d_model}]."
        )
    _check_writes_directly(hooked)
    edited = _copy(hooked)
    expected = _probe(edited, rank_hooks(layer, kind, reads, writes, head=head))
    module, name, weight = _writer_of(edited, layer, "mlp" if kind.startswith("mlp") else "attn")
    exact_reads, exact_writes = (each.detach().to(weight.device).double() for each in (reads, writes))
    wide = weight.double().reshape(-1, cfg.d_model)
    if kind in ("mlp_out", "attn_out"):
        wide = wide + (wide @ exact_reads.T) @ exact_writes
        bias = getattr(module, name)
        if bias is not None:
            bias.data.copy_(bias.data.double() + (bias.data.double() @ exact_reads.T) @ exact_writes)
    else:
        first = 0 if head is None else head * d_in
        wide = wide + nn.functional.pad(exact_reads, (first, len(wide) - first - d_in)).T @ exact_writes
    weight.copy_(wide.reshape(weight.shape))
    _check_equal(edited, expected, "add_rank")
    return edited


def rank_hooks(
    layer: int,
    kind: str,
    reads: Float[Tensor, "k d_in"],
    writes: Float[Tensor, "_ d_model"],
    *,
    head: int | None = None,
) -> list[tuple[str, Callable[..., Any]]]:
    """Plain hooks that compute what `add_rank` writes into the weights."""
    out = Site("mlp_out" if kind.startswith("mlp") else "attn_out", layer)
    kept: list[Tensor] = []

    def push(x: Tensor) -> Tensor:
        x = precise(x)
        return (x @ reads.to(x).T) @ writes.to(x)

    def take(tensor: Tensor, hook: Any) -> None:
        kept[:] = [tensor if head is None else tensor[:, :, head]]

    def add(tensor: Tensor, hook: Any) -> Tensor:
        return (tensor + push(kept.pop() if kept else tensor).to(tensor.device)).to(tensor.dtype)

    taken = [] if kind == out.kind else [(Site(kind, layer).hook_name, take)]
    return [*taken, (out.hook_name, add)]


def _check_writes_directly(hooked: Hooked) -> None:
    """Refuse models with something between the weights and the residual stream."""
    cfg, name, block = hooked.cfg, hooked.cfg.model_name, hooked.blocks[0]
    why = None
    if cfg.use_normalization_before_and_after or hasattr(block, "ln1_post") or hasattr(block, "ln2_post"):
        why = "norms after attention and MLP"
    elif getattr(cfg, "post_embedding_ln", False):
        why = "a norm after the embedding"
    elif cfg.positional_embedding_type not in ("standard", "rotary", "alibi"):
        why = f"positional embeddings of type {cfg.positional_embedding_type!r}"
    elif getattr(cfg, "num_experts", None):
        why = "mixtures of experts"
    elif getattr(cfg, "attn_only", False):
        why = "no MLPs"
    elif backend_of(hooked) == "bridge" and getattr(hooked, "_weights_processed", False):
        why = "weights that TransformerBridge processed and keeps twice"
    if why:
        raise MechsteerError(
            f"{name} has {why}, so no edit of its weights equals the intervention. Use it as an intervention."
        )


def _writers(hooked: Hooked) -> Iterator[_Writer]:
    """All weights that write to the residual stream."""
    if backend_of(hooked) == "hooked_transformer":
        yield _Writer(hooked.embed, "W_E", -1)
        if hooked.cfg.positional_embedding_type == "standard":
            yield _Writer(hooked.pos_embed, "W_pos", -1)
        for block in hooked.blocks:
            yield from (_Writer(block.attn, name, -1) for name in ("W_O", "b_O"))
            yield from (_Writer(block.mlp, name, -1) for name in ("W_out", "b_out"))
        return
    bridge: Any = hooked
    yield _Writer(bridge.embed.original_component, "weight", -1)
    if bridge.cfg.positional_embedding_type == "standard":
        yield _Writer(bridge.pos_embed.original_component, "weight", -1)
    for block in bridge.blocks:
        for linear in (block.attn.o.original_component, block.mlp.out.original_component):
            # transformers' Conv1D, of GPT-2, holds [in, out]; nn.Linear holds [out, in].
            yield _Writer(linear, "weight", -1 if type(linear).__name__ == "Conv1D" else 0)
            if linear.bias is not None:
                yield _Writer(linear, "bias", -1)


def _writer_of(hooked: Hooked, layer: int, part: str) -> tuple[nn.Module, str, Float[Tensor, "*d_in d_model"]]:
    """The module that a block's "attn" or "mlp" writes with, the name of its bias, and its matrix, not copied."""
    block: Any = hooked.blocks[layer]
    if backend_of(hooked) == "hooked_transformer":
        if part == "mlp":
            return block.mlp, "b_out", block.mlp.W_out.data
        return block.attn, "b_O", block.attn.W_O.data  # [head, d_head, d_model]
    linear = (block.mlp.out if part == "mlp" else block.attn.o).original_component
    # transformers' Conv1D, of GPT-2, holds [in, out]; nn.Linear holds [out, in].
    return linear, "bias", linear.weight.data if type(linear).__name__ == "Conv1D" else linear.weight.data.T


def _untie(hooked: Hooked) -> None:
    """Give the unembedding a matrix of its own, where it is the embedding's."""
    if backend_of(hooked) == "hooked_transformer":
        return  # which never shares them
    bridge: Any = hooked
    head = bridge.unembed.original_component
    if head.weight is bridge.embed.original_component.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (bridge.cfg, bridge.original_model.config):
        config.tie_word_embeddings = False


def _copy(hooked: Hooked) -> Hooked:
    """A deep copy without hooks, except for the tokenizer, which is shared."""
    memo: dict[int, Any] = {id(hooked.tokenizer): hooked.tokenizer}
    for module in hooked.modules():
        # What the last run left behind cannot be copied if gradients could flow.
        left = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(value): value.detach() for value in left}
    twin = copy.deepcopy(hooked, memo)
    for point in twin.hook_dict.values():
        point.remove_hooks("both", including_permanent=True)
    for module in twin.modules():
        # A bridge's own hooks point to the blocks they were made for; the next run makes new ones.
        teardown: Any = getattr(module, "_teardown_capture_hooks", None)
        if teardown is not None:
            teardown()
    return twin


def _probe(hooked: Any, fwd_hooks: list[Any]) -> Float[Tensor, "1 pos d_vocab"]:
    """Logits on a few tokens."""
    size, d_vocab = (1, min(hooked.cfg.n_ctx, 16)), hooked.cfg.d_vocab
    tokens = torch.randint(d_vocab, size, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(hooked.parameters()).device)
    with torch.no_grad(), hooks(hooked, fwd_hooks):
        return hooked(tokens, attention_mask=torch.ones_like(tokens))


def _check_equal(edited: Hooked, expected: Float[Tensor, "1 pos d_vocab"], what: str) -> None:
    """Refuse an edit that computes something else than the hooks did: what was overlooked above shows here."""
    worst = float((_probe(edited, []) - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    # Where weights are rounded to half precision, so is the edit of them.
    if not worst <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1):
        raise MechsteerError(
            f"{what} cannot write the intervention into the weights of {edited.cfg.model_name}: logits would differ by "
            f"{worst:.2g} of their size. Use it as an intervention."
        )
