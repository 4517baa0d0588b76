"""The naive twin of `sweep`: one full forward pass of TransformerLens for every cell."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import mechsteer as ms


def sweep(
    model: ms.Model,
    prompts: Any,
    axes: Mapping[str, Sequence[Any]],
    build: Callable[..., Any],
    measures: Mapping[str, ms.Objective],
) -> dict[str, torch.Tensor]:
    """Values [*axes, prompt] of each objective."""
    out: dict[str, list[torch.Tensor]] = {name: [] for name in measures}
    for values in itertools.product(*axes.values()):
        built = build(**dict(zip(axes, values, strict=True)))
        applied = [] if built is None else [built] if isinstance(built, ms.Intervention) else list(built)
        sites = [site for measure in measures.values() for site in measure.sites()]
        run = model.run(prompts, applied, record=sites)
        for name, measure in measures.items():
            out[name].append(measure(run))
    shape = [len(values) for values in axes.values()]
    return {name: torch.stack(values).view(*shape, -1) for name, values in out.items()}


def assert_same(result: ms.Result, expected: Mapping[str, torch.Tensor], *, tolerance: float = 1e-5) -> None:
    """The result's arrays are the twin's, to the tolerance on the scale of the values."""
    for name, values in expected.items():
        got = torch.from_numpy(result[name].values)
        assert got.shape == values.shape
        worst = float((got - values.detach()).abs().max())
        assert worst <= tolerance * max(1.0, float(values.abs().max())), f"{name}: {worst}"
