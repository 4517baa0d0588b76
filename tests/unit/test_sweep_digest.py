"""What makes two sweeps the same: tensors by their values, however they lie in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.sweeps import _digest


def strided(values: list[float], shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.as_strided(torch.tensor(values), shape, stride)


def test_the_layout_does_not_matter_and_the_values_and_shape_do() -> None:
    plain = torch.arange(6.0).reshape(2, 3)
    alike = [plain, plain.T.contiguous().T, torch.arange(12.0)[::2].div(2).reshape(2, 3), plain.clone()]
    assert len({_digest(each, {}) for each in alike}) == 1
    ones = [strided([3.0, 4.0], (1,), stride) for stride in ((1,), (0,), (7,))]
    ones += [torch.tensor(3.0).expand(1), torch.tensor([3.0])]
    assert len({_digest(each, {}) for each in ones}) == 1
    columns = [strided([3.0, 4.0], (2, 1), (1, stride)) for stride in (0, 1, 7)]
    assert len({_digest(each, {}) for each in columns}) == 1
    unlike = [
        plain, plain.T, plain.flatten(), plain.double(), plain + 1, torch.tensor(3.0), torch.tensor([3.0]),
        torch.tensor([[3.0]]), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(True), torch.zeros(0),
        strided([4.0, 3.0], (1,), (0,)), torch.zeros(0, 2),
    ]  # fmt: skip
    assert len({_digest(each, {}) for each in unlike}) == len(unlike)


@pytest.mark.parametrize("alpha", [torch.tensor(2.0), torch.tensor(2.0).expand(1)], ids=["no axis", "stride 0"])
def test_a_sweep_of_such_a_strength_is_kept(zoo_models: Any, tmp_path: Path, alpha: torch.Tensor) -> None:
    model = zoo_models("llama")
    prompts = ms.Prompts.from_ids([[5, 6, 7, 8]])
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))

    def swept(strength: Any) -> ms.Result:
        return ms.sweep(
            model, prompts, axes={"layer": range(2)}, measure=ms.LogitGap([5], [9]), out=tmp_path / "sweep",
            build=lambda layer: ms.Add(vector, strength, site=("resid_post", layer)),
        )  # fmt: skip

    first = swept(alpha)
    name = next(iter(first.data.data_vars))
    np.testing.assert_array_equal(swept(alpha.clone())[name].values, first[name].values)
    with pytest.raises(MechsteerError, match="holds another sweep"):
        swept(alpha + 1)
