"""Reading and rewriting the weights of a hooked model: the unembedding, and interventions made permanent."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsteer.backends import Hooked, backend_of, hooks
from mechsteer.errors import MechsteerError


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
    module, name = _mlp_bias(edited, layer)
    old = getattr(module, name)
    if old is None:
        weight = next(module.parameters())
        module.register_parameter(name, nn.Parameter(added.to(weight), requires_grad=weight.requires_grad))
    else:
        old.data.copy_(old.data.double() + added.to(old.device).double())
    _check_equal(edited, expected, "add_bias")
    return edited


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


def _mlp_bias(hooked: Hooked, layer: int) -> tuple[nn.Module, str]:
    mlp: Any = hooked.blocks[layer].mlp
    return (mlp, "b_out") if backend_of(hooked) == "hooked_transformer" else (mlp.out.original_component, "bias")


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
