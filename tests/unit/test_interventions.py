"""Each intervention is the plain TransformerLens hook that one would write by hand."""

from typing import Any

import pytest
import torch
import zoo
from plain import N_POS, all_sites, assert_close, assert_is_by_hand, by_hand, heads_of, noise, with_spans

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.site import Site

backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
# A bridge says that it computes norms by another formula where they are edited.
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited")


# ---- each class against a hook written by hand ----

RULES = [None, "user", "completion", 3, -1, (0, 2, -1, -3)]


@backends
@pytest.mark.parametrize("at", RULES, ids=str)
def test_add_is_what_one_would_write(zoo_models: Any, architecture: str, backend: str, at: Any) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    site = Site("resid_post", 1)
    assert_is_by_hand(
        model, prompts, ms.Add(v, -2.5, site=site, at=at), lambda mask: by_hand(site, mask, lambda x: x - 2.5 * v)
    )


@backends
def test_per_example_alphas_are_each_examples_own(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    site, alphas = Site("mlp_out", 1), torch.tensor([1.5, -3.0, 40.0])
    assert_is_by_hand(
        model, prompts, ms.Add(v, alphas, site=site),
        lambda mask: by_hand(site, mask, lambda x: x + alphas[:2, None, None] * v),
    )  # fmt: skip


@backends
def test_replace_patches_every_kind_of_site(zoo_models: Any, architecture: str, backend: str) -> None:
    """Activation patching, whole and by head; on a bridge `resid_mid` too, where no plain hook has that effect."""
    model, prompts = zoo_models(architecture, backend), with_spans()
    sites = all_sites(model)
    donors = model.run(with_spans(seed=1), record=sites).activations
    with torch.no_grad():
        _, cache = model.hooked.run_with_cache(donors.prompts[:2].padded("right").tokens)
    for site in sites:
        # All prompts have the same position embeddings.
        if site.kind == "pos_embed" or (site.kind == "resid_mid" and backend == "bridge"):
            continue
        # By head on one backend, whole on the other.
        here = site.at(head=heads_of(model, site)[-1 if backend == "hooked_transformer" else 0])
        intervention = ms.Replace(here, donors, at=(1, -2) if here.head is None else None)
        assert_is_by_hand(
            model, prompts, intervention, lambda mask, here=here: by_hand(here, mask, lambda x: cache[here.hook_name])
        )


def test_resid_mid_means_the_same_on_a_bridge(zoo_models: Any, architecture: str) -> None:
    """Alone, several times, among edits of both its addends, recorded, and with gradients."""
    v, w = noise(zoo.D_MODEL), noise(zoo.D_MODEL, seed=1).requires_grad_()
    results = []
    for backend in ("hooked_transformer", "bridge"):
        model, prompts = zoo_models(architecture, backend), with_spans()
        mid, out, pre = Site("resid_mid", 1), Site("attn_out", 1), Site("resid_pre", 1)
        donors = model.run(with_spans(seed=1), record=mid).activations
        edits = [
            [ms.Add(w, 2.0, site=mid, at=(1, -1))],
            [ms.Replace(mid, donors, at="user"), ms.Add(w, site=mid)],
            [
                ms.Ablate(v, site=mid),
                ms.Scale(out, 0.5),
                ms.Add(w, 3.0, site=pre, at="prefix"),
                ms.Scale(mid, 1.5, at=2),
            ],
            [ms.Add(w, site=out, at=0), ms.Ablate(w, site=mid), ms.Ablate(v, everywhere=True)],
        ]
        runs = [model.run(prompts, each, record=[pre, out, mid, ("mlp_pre", 1)], grad=True) for each in edits]
        tensors = [value for run in runs for value in (run.logits, *run.activations.values())]
        tensors += torch.autograd.grad(sum(run.logits.square().sum() for run in runs), w)
        results.append(tensors)
    for one, other in zip(*results, strict=True):
        assert_close(other, one, 1e-4)


@backends
def test_replace_by_constants(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    n_kv = model.size(Site("v", 0), "head")
    constants = [
        (Site("resid_pre", 1), (zoo.D_MODEL,)),
        (Site("mlp_post", 1), (96,)),
        (Site("v", 1), (n_kv, model.cfg.d_head)),
        (Site("v", 1, head=1), (model.cfg.d_head,)),
        (Site("pattern", 1, head=2), (N_POS + 3,)),
        (Site("pattern", 1), (zoo.N_HEADS, 1)),
    ]
    for site, shape in constants:
        value = noise(*shape) if backend == "bridge" else noise(3, *shape)  # one for all, or each example's own
        each = value[:2] if value.ndim > len(shape) else value.expand(2, *shape)
        each = each[:, None] if site.head is None else each[:, None, None]  # [example, pos, ...]
        # A token looks at no later one, whatever the value.
        seen = site.axes[-1] != "src" or torch.ones(N_POS, N_POS).tril().bool()
        each = each if seen is True else each[..., :N_POS].transpose(1, 2)
        assert_is_by_hand(
            model, prompts, ms.Replace(site, value, at=(2, -1)),
            lambda mask, site=site, each=each, seen=seen: by_hand(
                site, mask, lambda x: torch.where(torch.as_tensor(seen), each, x)
            ),
        )  # fmt: skip


@backends
def test_ablate_projects_a_subspace_out(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    vectors = noise(3, zoo.D_MODEL)
    d_head = model.cfg.d_head
    for site, basis in (
        (Site("resid_pre", 1), vectors[:1]),
        (Site("mlp_out", 1), vectors),
        (Site("z", 1), noise(2, d_head)),
        (Site("k", 1, head=1), noise(2, d_head)),
    ):
        # The projection matrix, by the normal equations.
        off = torch.eye(basis.shape[1]) - basis.T @ torch.linalg.inv(basis @ basis.T) @ basis
        for at in (None, "prefix"):
            intervention = ms.Ablate(basis[0] if len(basis) == 1 else basis, site=site, at=at)
            assert_is_by_hand(
                model, prompts, intervention, lambda mask, s=site, p=off: by_hand(s, mask, lambda x: x @ p)
            )


@backends
def test_ablate_everywhere_projects_all_writes(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts, v = zoo_models(architecture, backend), with_spans(), noise(zoo.D_MODEL)
    off = torch.eye(zoo.D_MODEL) - v.outer(v) / v.dot(v)
    writes = [Site("resid_pre", 0), *(Site(kind, layer) for layer in range(3) for kind in ("attn_out", "mlp_out"))]
    assert_is_by_hand(
        model, prompts, ms.Ablate(v, everywhere=True),
        lambda mask: [hook for site in writes for hook in by_hand(site, mask, lambda x: x @ off)],
    )  # fmt: skip
    residuals = model.run(prompts, [ms.Ablate(v, everywhere=True)], record="resid_post").activations
    for value in residuals.values():
        assert (value @ v).abs().max() < 1e-4 * value.abs().max() * v.norm()


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "hooked_transformer") for name in zoo.ARCHITECTURES), ("gemma3", "bridge")]
)
def test_scale_multiplies_a_site_or_a_head(zoo_models: Any, name: str, backend: str) -> None:
    model, prompts = zoo_models(name, backend), with_spans()
    factors = torch.tensor([0.25, -1.5, 3.0])

    def change(x: torch.Tensor) -> torch.Tensor:
        # What causality hides stays hidden.
        return torch.where(x.isneginf(), x, x * factors[:2].view(-1, *[1] * (x.ndim - 1)))

    for site in all_sites(model):
        if site.kind == "resid_mid" and backend == "bridge":
            continue
        here = site.at(head=heads_of(model, site)[-1])
        assert_is_by_hand(model, prompts, ms.Scale(here, factors), lambda mask, here=here: by_hand(here, mask, change))


@backends
def test_a_soft_prefix_of_real_tokens_is_those_tokens(zoo_models: Any, architecture: str, backend: str) -> None:
    model = zoo_models(architecture, backend)
    tokens = zoo.prompts(batch=1, n_pos=3)[0]
    for side in ("right", "left"):
        reserved = ms.Prompts.from_strings(["The cat sat on", "Give me"], model, slots=3, padding=side)
        written = reserved.with_prefix(tokens)
        expected = model.run(written, record="embed")
        embeddings = expected.activations["embed"][reserved.slots].view(2, 3, zoo.D_MODEL)[1].clone().requires_grad_()
        run = model.run(reserved, [ms.SoftPrefix(embeddings)], grad=True)
        assert_close(run.logits, expected.logits)
        (gradient,) = torch.autograd.grad(run.logits.sum(), embeddings)
        assert (gradient.abs().amax(1) > 1e-4).all()
        wrong = model.run(reserved, [ms.SoftPrefix(embeddings.flip(0).detach())])
        assert (wrong.logits - expected.logits).abs().max() > 0.1


# ---- weights ----

DIRECT = ("gpt2", "llama", "qwen3", "mistral")


@backends
def test_weights_that_hold_an_intervention(zoo_models: Any, architecture: str, backend: str) -> None:
    model, prompts = zoo_models(architecture, backend), with_spans()
    v = ms.Direction(noise(zoo.D_MODEL), Site("resid_post", 1), model.id)
    two = noise(2, zoo.D_MODEL, seed=3)
    everywhere = ms.Ablate(two, everywhere=True)
    edits = [everywhere, ms.Add(v, -2.0), ms.Add(v, 3.0, site=("mlp_out", 2))]
    for edit in edits:
        if architecture not in DIRECT:
            with pytest.raises(
                MechsteerError, match=r"norms after attention and MLP, so no edit of its weights equals"
            ):
                edit.to_weights(model)
            continue
        before = model.run(prompts).logits
        edited = edit.to_weights(model)
        expected = model.run(prompts, [edit]).logits
        assert (expected - before).abs().max() > 0.1
        assert_close(edited.run(prompts).logits, expected, 1e-4)
        assert torch.equal(model.run(prompts).logits, before)
        assert edited.id.hash != model.id.hash and edited.name.startswith(model.name)


def test_what_no_weights_can_hold_is_refused(zoo_models: Any) -> None:
    model, v = zoo_models("llama"), noise(zoo.D_MODEL)
    add = r"has no equal in the weights: one alpha for all tokens of all examples at resid_post or mlp_out has\. Use"
    for edit in (
        ms.Add(v, site=("resid_pre", 1)),
        ms.Add(v, site=("resid_post", 1), at="user"),
        ms.Add(v, torch.ones(2), site=("resid_post", 1)),
    ):
        with pytest.raises(MechsteerError, match=add):
            edit.to_weights(model)
    ablate = r"has no equal in the weights: Ablate\(direction, everywhere=True\) at all tokens has\. Use it as"
    for edit in (ms.Ablate(v, site=("resid_pre", 1)), ms.Ablate(v, everywhere=True, at=0)):
        with pytest.raises(MechsteerError, match=ablate):
            edit.to_weights(model)
    with pytest.raises(MechsteerError, match=r"llama has layers 0 to 2"):
        ms.Add(v, site=("resid_post", 3)).to_weights(model)
    with pytest.raises(MechsteerError, match=r"got d_model=5"):
        ms.Add(v[:5], site=("resid_post", 1)).to_weights(model)
