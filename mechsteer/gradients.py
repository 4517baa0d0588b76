"""What an objective is in a forward pass under hooks, and its gradients at sites."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsteer.activations import Activations
from mechsteer.hooks import Hooks
from mechsteer.model import Model
from mechsteer.objectives import Objective
from mechsteer.precision import precise
from mechsteer.prompts import Prompts
from mechsteer.run import Run
from mechsteer.site import Site

_TOKENS = {"cpu": 2048, "cuda": 16384}


def graph_tokens(model: Model) -> int:
    """Tokens of a batch whose graph is held, as suits the model's device."""
    return _TOKENS.get(model.device.type, _TOKENS["cuda"])


def measured(
    model: Model,
    prompts: Prompts,
    measure: Objective,
    example: Int[Tensor, " batch"],
    *,
    edits: Hooks = (),
    record: Sequence[Site] = (),
) -> tuple[Float[Tensor, " batch"], dict[Site, Tensor]]:
    """The objective of each prompt, and activations, from one forward pass; in a graph where gradients are enabled.

    Args:
        prompts: right-padded.
        example: which of the prompts that the objective was made for they are.
        edits: hooks.
        record: sites whose activations are wanted; those that the objective reads come with them.
    """
    read = measure.reads(prompts)
    read = torch.zeros_like(prompts.mask) if read is None else read
    wanted = list(dict.fromkeys([*record, *measure.sites()]))
    rows, taken = model.forward(prompts, edits, wanted, read=read)
    held = Activations({site: taken[site] for site in measure.sites()}, prompts=prompts, model=model.id)
    return measure(Run(prompts, rows, read, held, example.to(read.device))), taken


@dataclass(frozen=True)
class Traced:
    """An objective that can be differentiated with respect to the activations of sites.

    Attributes:
        value: of each prompt.
        taken: activations of the sites and of what else was recorded, without a graph.
        points: for each site the tensors in the graph. A HookedTransformer runs hook points of its norms once for each
            of queries, keys and values.
    """

    value: Float[Tensor, " batch"]
    taken: dict[Site, Tensor]
    points: dict[Site, list[Tensor]]

    def gradients(self, *, keep_graph: bool = False) -> dict[Site, Tensor]:
        """d value / d activations of each site that the objective depends on, in fp32 at least."""
        flat = [(site, tensor) for site, each in self.points.items() for tensor in each]
        if not flat or not self.value.requires_grad:
            return {}
        tensors = [tensor for _, tensor in flat]
        ones = torch.ones_like(self.value)
        found = torch.autograd.grad(self.value, tensors, ones, retain_graph=keep_graph, allow_unused=True)
        out: dict[Site, Tensor] = {}
        for (site, _), gradient in zip(flat, found, strict=True):
            if gradient is not None:
                out[site] = out[site] + precise(gradient) if site in out else precise(gradient)
        return out


def traced(
    model: Model,
    prompts: Prompts,
    measure: Objective,
    example: Int[Tensor, " batch"],
    sites: Sequence[Site],
    *,
    edits: Hooks = (),
    gates: Hooks = (),
    record: Sequence[Site] = (),
) -> Traced:
    """Run prompts and keep the graph from the first of the sites on.

    Parameters need not want gradients, and get none.

    Args:
        prompts, measure, example: as for `measured`.
        sites: where gradients are wanted.
        edits: hooks that act before a site's tensor is taken.
        gates: hooks that act after it, on the way into the residual stream.
        record: more sites whose activations are wanted.
    """
    points: dict[Site, list[Tensor]] = {}

    def tap(site: Site, at: Site) -> tuple[str, Callable[..., Tensor]]:
        def take(tensor: Tensor, hook: Any) -> Tensor:
            # The graph begins at the first site, and where nothing before has put a tensor in it. Elsewhere it goes on
            # through a tensor of the site's own: the same one can be that of an earlier site, which the objective may
            # read, and a bridge ignores the values that it shows its hooks unless another one comes back.
            begins = not points or not tensor.requires_grad
            here = tensor.to(model.device)
            point = here.detach().requires_grad_() if begins else here.view_as(here)
            points.setdefault(site, []).append(point)
            return point.to(tensor.device)

        return at.hook_name, take

    # A bridge's hook_resid_mid is the input of the MLP's norm alone. The residual stream is a sum, so that the gradient
    # there is that of its other addend, taken where no gate has acted on it yet.
    moved = [site for site in sites if site.kind == "resid_mid" and model.backend == "bridge"]
    hooks = [*edits, *(tap(site, site) for site in sites if site not in moved), *gates]
    hooks += [tap(site, Site("attn_out", site.layer)) for site in moved]
    with torch.enable_grad():
        value, taken = measured(model, prompts, measure, example, edits=hooks, record=[*sites, *record])
    return Traced(value, {site: taken[site].detach() for site in (*sites, *record)}, points)
