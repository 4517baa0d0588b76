"""Weights that hold an intervention compute what the hooks of that intervention compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from mechsteer.backends.weights import add_bias, add_rank, orthogonalise, rank_hooks, unembedding
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model

# Gemma 2 and 3 have norms between the weights and the residual stream.
DIRECT = ("gpt2", "llama", "qwen3", "mistral", "gemma")
POST_NORM = ("gemma2", "gemma3")

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
direct = pytest.mark.parametrize("name", DIRECT)


@pytest.fixture(scope="module")
def models(zoo_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Hooked models by architecture and backend, each loaded once: nothing here may change one."""
    folders = {**zoo_folders, "gemma": zoo.write_folder("gemma", tmp_path_factory.mktemp("zoo") / "gemma")}
    loaded: dict[Any, Any] = {}

    def get(name: str, backend: str = "hooked_transformer", dtype: torch.dtype = torch.float32) -> Any:
        key = name, backend, dtype
        if key not in loaded:
            loaded[key] = load_model(folders[name], backend=backend, device="cpu", dtype=dtype).hooked
        return loaded[key]

    return get


def random_basis(k: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(zoo.D_MODEL, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].T.float()


def projections(hooked: Any, basis: torch.Tensor) -> list[tuple[str, Callable[..., torch.Tensor]]]:
    """Plain TransformerLens hooks that ablate the subspace wherever something is written to the residual stream."""

    def project(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor - tensor @ basis.T @ basis

    names = [f"blocks.{layer}.hook_{kind}_out" for layer in range(zoo.N_LAYERS) for kind in ("attn", "mlp")]
    names += [name for name in ("hook_embed", "hook_pos_embed") if name in hooked.hook_dict]
    return [(name, project) for name in names]


@torch.no_grad()
def assert_same_function(edited: Any, hooked: Any, fwd_hooks: list[Any]) -> None:
    tokens = zoo.prompts()
    before = hooked(tokens)
    expected = hooked.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
    assert (before - expected).abs().max() > 0.3, "an edit this weak would hide an error"
    torch.testing.assert_close(edited(tokens), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(hooked(tokens), before, atol=0, rtol=0)


@backends
@direct
def test_orthogonalised_weights_equal_ablation_at_every_write(models: Any, name: str, backend: str) -> None:
    hooked, basis = models(name, backend), random_basis(2)
    edited = orthogonalise(hooked, basis)
    assert_same_function(edited, hooked, projections(hooked, basis))
    _, cache = edited.run_with_cache(zoo.prompts())
    for layer in range(zoo.N_LAYERS):
        residual = cache[f"blocks.{layer}.hook_resid_post"]
        assert (residual @ basis.T).abs().max() < 1e-4 * residual.abs().max()


@backends
@direct
def test_orthogonalising_leaves_the_unembedding_and_what_reads(models: Any, name: str, backend: str) -> None:
    hooked, basis = models(name, backend), random_basis(2)
    edited = orthogonalise(hooked, basis)
    assert torch.equal(unembedding(edited), unembedding(hooked))
    old, new = dict(hooked.named_parameters()), dict(edited.named_parameters())
    assert old.keys() <= new.keys()  # an untied unembedding comes to light
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    written = ("W_E", "W_pos", "W_O", "W_out", "wte", "wpe", "embed_tokens", "o_proj", "down_proj", "c_proj", ".o.")
    biases = ("b_O", "b_out")
    assert changed and all(any(part in name for part in written + biases) for name in changed)


@backends
@direct
@pytest.mark.parametrize("layer", [0, 2])
def test_a_bias_equals_adding_to_resid_post(models: Any, name: str, backend: str, layer: int) -> None:
    hooked = models(name, backend)
    vector = 3 * random_basis(1)[0]
    edited = add_bias(hooked, layer, vector)
    assert_same_function(edited, hooked, [(f"blocks.{layer}.hook_resid_post", lambda tensor, hook: tensor + vector)])
    tokens = zoo.prompts()
    with torch.no_grad():
        twice = add_bias(edited, layer, -vector)(tokens)
        torch.testing.assert_close(twice, hooked(tokens), atol=1e-4, rtol=0)


RANKS = [("mlp_post", None), ("mlp_out", None), ("z", 1), ("attn_out", None)]


def read_and_write(hooked: Any, kind: str, k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    width = {"mlp_post": hooked.cfg.d_mlp, "z": hooked.cfg.d_head}.get(kind, zoo.D_MODEL)
    generator = torch.Generator().manual_seed(len(kind))
    return torch.randn(k, width, generator=generator), torch.randn(k, zoo.D_MODEL, generator=generator)


def plain_push(layer: int, kind: str, head: int | None, reads: torch.Tensor, writes: torch.Tensor) -> list[Any]:
    """What is read, kept by one plain hook, and what is written, added by another, one direction at a time."""
    kept = {}
    read = {"mlp_post": "mlp.hook_post", "z": "attn.hook_z"}.get(kind, f"hook_{kind}")
    write = "hook_mlp_out" if "mlp" in kind else "hook_attn_out"

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        kept["x"] = (tensor if head is None else tensor[:, :, head]).clone()

    def push(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor + sum((kept["x"] @ r)[..., None] * w for r, w in zip(reads, writes, strict=True))

    return [(f"blocks.{layer}.{read}", keep), (f"blocks.{layer}.{write}", push)]


@backends
@pytest.mark.parametrize("name", ["gpt2", "llama"])  # Conv1D and a plain Linear; grouped keys and values
@pytest.mark.parametrize(("kind", "head"), RANKS)
def test_a_rank_edit_equals_the_push_of_two_plain_hooks(
    models: Any, name: str, backend: str, kind: str, head: int | None
) -> None:
    hooked = models(name, backend)
    reads, writes = read_and_write(hooked, kind)
    edited = add_rank(hooked, 1, kind, reads, writes, head=head)
    assert_same_function(edited, hooked, plain_push(1, kind, head, reads, writes))
    assert_same_function(edited, hooked, rank_hooks(1, kind, reads, writes, head=head))
    old, new = dict(hooked.named_parameters()), dict(edited.named_parameters())
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    written = (
        ("W_out", "b_out", "down_proj", "mlp.out", "c_proj")
        if "mlp" in kind
        else ("W_O", "b_O", "c_proj", "o_proj", ".o.")
    )
    assert 1 <= len(changed) <= 2 and all(any(part in each for part in written) for each in changed), changed


@backends
def test_a_rank_edit_of_all_outputs_is_orthogonalising(models: Any, backend: str) -> None:
    """With reads = -writes = an orthonormal basis, at every output of every block."""
    hooked, basis = models("gpt2", backend), random_basis(2)
    edited = hooked
    for layer in range(zoo.N_LAYERS):
        for kind in ("attn_out", "mlp_out"):
            edited = add_rank(edited, layer, kind, basis, -basis)
    fwd_hooks = [each for each in projections(hooked, basis) if "blocks" in each[0]]
    assert_same_function(edited, hooked, fwd_hooks)
    twice = add_rank(edited, 1, "mlp_out", basis, -basis)
    with torch.no_grad():
        torch.testing.assert_close(twice(zoo.prompts()), edited(zoo.prompts()), atol=1e-4, rtol=0)


@backends
def test_copies_have_hooks_of_their_own(models: Any, backend: str) -> None:
    hooked, tokens = models("llama", backend), zoo.prompts()
    with torch.no_grad():
        plain = hooked(tokens)
        hooked.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: 0 * tensor)
        try:
            edited = orthogonalise(hooked, random_basis(1)[:0])  # of no dimensions: the same function
            torch.testing.assert_close(edited(tokens), plain, atol=1e-5, rtol=0)
            assert (hooked(tokens) - plain).abs().max() > 0.1
        finally:
            hooked.reset_hooks()
        edited.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: 0 * tensor)
        assert (edited(tokens) - plain).abs().max() > 0.1
        torch.testing.assert_close(hooked(tokens), plain, atol=0, rtol=0)
    assert edited.tokenizer is hooked.tokenizer


@backends
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_copies_share_nothing_with_the_model(models: Any, name: str, backend: str) -> None:
    hooked, tokens = models(name, backend), zoo.prompts()
    edited = orthogonalise(hooked, random_basis(1))
    # A run that keeps gradients leaves tensors behind: in the copy, not in the model, and they hinder no other copy.
    edited(tokens)
    for module in hooked.modules():
        assert all(value.is_leaf for value in vars(module).values() if isinstance(value, torch.Tensor))
    hooked(tokens)
    orthogonalise(hooked, random_basis(1))
    pointers = {parameter.data_ptr() for parameter in hooked.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in edited.parameters()}


@backends
def test_half_precision(models: Any, backend: str) -> None:
    hooked, basis = models("llama", backend, torch.bfloat16), random_basis(1)
    edited = orthogonalise(hooked, basis)
    assert next(edited.parameters()).dtype == torch.bfloat16
    tokens = zoo.prompts()
    with torch.no_grad():
        exact = orthogonalise(models("llama", backend), basis)(tokens)
        assert (edited(tokens).float() - exact).abs().max() < 0.1 * exact.abs().max()
        add_bias(hooked, 1, basis[0])(tokens)


@backends
def test_edited_models_are_models(models: Any, backend: str) -> None:
    edited = Model(orthogonalise(models("qwen3", backend), random_basis(1)))
    assert edited.backend == backend and not edited.processed


@backends
def test_unembedding_is_that_of_transformers(models: Any, architecture: str, zoo_folder: Path, backend: str) -> None:
    from transformers import AutoModelForCausalLM

    head = AutoModelForCausalLM.from_pretrained(zoo_folder, dtype=torch.float32).get_output_embeddings()
    assert torch.equal(unembedding(models(architecture, backend)), head.weight.T)


@backends
@pytest.mark.parametrize("name", POST_NORM)
def test_norms_after_the_blocks_are_refused(models: Any, name: str, backend: str) -> None:
    hooked = models(name, backend)
    message = r"has norms after attention and MLP, so no edit of its weights equals the intervention\. Use it as an int"
    with pytest.raises(MechsteerError, match=message):
        orthogonalise(hooked, random_basis(1))
    with pytest.raises(MechsteerError, match=message):
        add_bias(hooked, 0, random_basis(1)[0])
    with pytest.raises(MechsteerError, match=message):
        add_rank(hooked, 0, "mlp_out", random_basis(1), random_basis(1))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("post_embedding_ln", True, "a norm after the embedding"),
        ("positional_embedding_type", "shortformer", "positional embeddings of type 'shortformer'"),
        ("num_experts", 4, "mixtures of experts"),
        ("attn_only", True, "no MLPs"),
    ],
)
def test_other_architectures_are_refused(
    models: Any, field: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = models("gpt2")
    monkeypatch.setattr(hooked.cfg, field, value)
    with pytest.raises(MechsteerError, match=f"has {reason}, so no edit of its weights equals the intervention"):
        orthogonalise(hooked, random_basis(1))


def test_a_processed_bridge_is_refused(zoo_folders: dict[str, Path]) -> None:
    hooked: Any = load_model(zoo_folders["gpt2"], backend="bridge").hooked
    hooked.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(MechsteerError, match="has weights that TransformerBridge processed and keeps twice, so no"):
        add_bias(hooked, 0, random_basis(1)[0])


@backends
def test_what_was_overlooked_is_found_by_running(models: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechsteer.backends import weights

    writers = weights._writers
    monkeypatch.setattr(weights, "_writers", lambda hooked: list(writers(hooked))[:-1])
    with pytest.raises(
        MechsteerError, match=r"orthogonalise cannot write the intervention into the weights of .* diff"
    ):
        orthogonalise(models("llama" if backend == "bridge" else "gpt2", backend), random_basis(1))


def test_wrong_arguments(models: Any) -> None:
    hooked = models("gpt2")
    for wrong in (2 * random_basis(1), torch.ones(2, zoo.D_MODEL), torch.eye(3)):
        with pytest.raises(MechsteerError, match=r"orthogonalise got a basis \[\d, \d+\], but takes orthonormal rows"):
            orthogonalise(hooked, wrong)
    for layer, width in ((3, zoo.D_MODEL), (-1, zoo.D_MODEL), (0, 5)):
        with pytest.raises(MechsteerError, match=rf"add_bias got layer {layer} and a vector of shape \[{width}\], but"):
            add_bias(hooked, layer, torch.ones(width))
    one, wide = random_basis(1), torch.ones(1, hooked.cfg.d_mlp)
    for layer, kind, reads, writes, head in (
        (3, "mlp_out", one, one, None),
        (-1, "mlp_out", one, one, None),
        (0, "resid_post", one, one, None),
        (0, "mlp_post", one, one, None),
        (0, "mlp_post", wide, random_basis(2), None),
        (0, "mlp_post", wide, one, 0),
        (0, "z", torch.ones(1, hooked.cfg.d_head), one, None),
        (0, "z", torch.ones(1, hooked.cfg.d_head), one, hooked.cfg.n_heads),
    ):
        message = rf"add_rank got reads \[1, \d+\] of '{kind}' \(layer {layer}, head {head}\) and writes \[\d, 32\]"
        with pytest.raises(MechsteerError, match=message):
            add_rank(hooked, layer, kind, reads, writes, head=head)
