"""Gradients at sites are those that plain PyTorch gives of a push that is added there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain import all_sites, assert_close, ids, noise

import mechsteer as ms
from mechsteer.gradients import measured, traced
from mechsteer.site import Site

Load = Callable[..., ms.Model]
backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
# A bridge says that it computes norms by another formula where hooks hold them.
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited")

ROWS = ids((14, 10))  # more than the zoo's windows
GAP = ms.LogitGap(5, 7)
EXAMPLE = torch.arange(len(ROWS))
STREAM = [Site("embed"), *(Site(kind, 1) for kind in ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out"))]
STREAM += [Site("resid_mid", 2), Site("resid_post", 2)]


def prompts() -> ms.Prompts:
    return ms.Prompts.from_ids(ROWS)


def naive(model: ms.Model, row: list[int], sites: list[Site]) -> tuple[torch.Tensor, dict[Site, torch.Tensor]]:
    """The gap of one prompt, and its gradient with respect to zeros that are added at each site."""
    pushes: dict[Site, torch.Tensor] = {}

    def push(site: Site) -> tuple[str, Callable[..., torch.Tensor]]:
        def add(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            if site not in pushes:
                pushes[site] = torch.zeros_like(tensor, requires_grad=True)
            return tensor + pushes[site]

        return site.hook_name, add

    logits = model.hooked.run_with_hooks(torch.tensor([row]), fwd_hooks=[push(site) for site in sites])[0, -1]
    value = logits[5] - logits[7]
    found = torch.autograd.grad(value, [pushes[site] for site in sites], materialize_grads=True)
    return value.detach(), dict(zip(sites, found, strict=True))


def real(tensor: torch.Tensor, site: Site, row: int) -> torch.Tensor:
    """What stands at one prompt's tokens, of a batch that is padded on the right."""
    n = len(ROWS[row])
    return tensor[[row], :, :n, :n] if "src" in site.axes else tensor[[row], :n]


def test_gradients_are_those_of_pushes_at_every_hook_point(precise: Load, architecture: str) -> None:
    model = precise(architecture)
    sites = all_sites(model)
    run = traced(model, prompts(), GAP, EXAMPLE, sites[::-1])  # in any order
    gradients = run.gradients()
    for row, each in enumerate(ROWS):
        value, expected = naive(model, each, sites)
        assert_close(run.value[row], value, 1e-10)
        for site in sites:
            assert expected[site].any(), site
            assert_close(real(gradients[site], site, row), expected[site], 1e-9)


def test_a_bridge_has_the_same_gradients(precise: Load, architecture: str) -> None:
    """Its hook at resid_mid sees the input of the MLP's norm, and not the stream."""
    run = traced(precise(architecture, "bridge"), prompts(), GAP, EXAMPLE, STREAM)
    gradients = run.gradients()
    for row, each in enumerate(ROWS):
        _, expected = naive(precise(architecture), each, STREAM)
        for site in STREAM:
            assert_close(real(gradients[site], site, row), expected[site], 1e-4)


@backends
def test_values_and_activations_are_those_of_a_run(precise: Load, backend: str) -> None:
    model, other = precise("gemma2", backend), Site("mlp_post", 0)
    run = model.run(prompts(), record=[*STREAM, other])
    traces = traced(model, prompts(), GAP, EXAMPLE, STREAM, record=[other])
    value, taken = measured(model, prompts(), GAP, EXAMPLE, record=[other])
    for got in (traces.value, value):
        assert_close(got.detach(), GAP(run), 1e-10)
    assert set(traces.taken) == {*STREAM, other} and set(taken) == {other}
    for site, found in traces.taken.items():
        assert not found.requires_grad
        for row in range(len(ROWS)):
            assert_close(real(found, site, row), real(run.activations[site], site, row), 1e-10)


@backends
def test_frozen_parameters_and_sites_before_make_no_difference(zoo_folders: dict[str, Path], backend: str) -> None:
    for architecture in ("gpt2", "llama"):
        model = ms.load_model(zoo_folders[architecture], backend=backend, dtype=torch.float64)
        first = [Site("embed"), *([Site("pos_embed")] if architecture == "gpt2" else [])]
        found = traced(model, prompts(), GAP, EXAMPLE, [*first, *STREAM[1:]]).gradients()
        assert all(parameter.grad is None for parameter in model.hooked.parameters())
        model.hooked.requires_grad_(False)
        with torch.no_grad():
            frozen = traced(model, prompts(), GAP, EXAMPLE, [*first, *STREAM[1:]]).gradients()
            late = traced(model, prompts(), GAP, EXAMPLE, STREAM[-2:]).gradients()
            assert not torch.is_grad_enabled()
        assert list(frozen) == list(found) and list(late) == STREAM[-2:]
        for site, gradient in {**frozen, **late}.items():
            torch.testing.assert_close(gradient, found[site], rtol=0, atol=1e-14)


@backends
def test_sites_that_the_objective_does_not_depend_on_are_left_out(precise: Load, backend: str) -> None:
    model = precise("llama", backend)
    read = Site("resid_post", 0)
    early = ms.Projection(ms.Direction(noise(1, model.d_model).double(), read, model.id, {}))
    sites = [Site("resid_pre", 0), Site("resid_pre", 1), Site("resid_post", 2)]
    found = traced(model, prompts(), early, EXAMPLE, sites).gradients()
    # resid_pre of layer 1 is the same tensor as what is read, and comes after it.
    assert list(found) == sites[:1]
    assert traced(model, prompts(), early, EXAMPLE, sites[1:]).gradients() == {}


@backends
def test_edits_act_before_a_site_and_gates_after_it(precise: Load, backend: str) -> None:
    model, sites = precise("llama", backend), [Site("embed"), *STREAM[1:]]

    def double(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        return 2 * tensor

    def close(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        return tensor.detach()

    gates = [(Site(kind, layer).hook_name, close) for layer in range(3) for kind in ("attn_out", "mlp_out")]
    run = traced(model, prompts(), GAP, EXAMPLE, sites, edits=[(Site("embed").hook_name, double)], gates=gates)
    plain = model.run(prompts(), [ms.Scale("embed", 2.0)], record=["embed"])
    assert_close(run.value.detach(), GAP(plain), 1e-10)
    mask = prompts().mask
    assert_close(run.taken[Site("embed")][mask], plain.activations["embed"][mask], 1e-12)
    # Nothing but the stream itself is left of the model, which hands gradients on as they are.
    found = run.gradients()
    assert set(found) == {Site("embed"), *(site for site in STREAM if site.kind.startswith("resid"))}
    for gradient in found.values():
        assert_close(gradient, found[Site("resid_post", 2)], 1e-12)
