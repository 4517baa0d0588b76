"""Control vectors that another package reads and writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Its releases were written for numpy 1, which still had this name.
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    return pytest.importorskip("repeng", exc_type=ImportError)


def test_repeng_reads_and_writes_the_same_vectors(repeng: Any, tmp_path: Path) -> None:
    model = ms.load_model("pocket")
    generator = torch.Generator().manual_seed(0)
    vectors = {
        layer: ms.Direction(torch.randn(1, model.d_model, generator=generator), ms.Site("resid_post", layer), model.id)
        for layer in range(1, model.n_layers)
    }
    ms.export_gguf(list(vectors.values()), tmp_path / "ours.gguf", model_hint="llama")
    theirs = repeng.ControlVector.import_gguf(str(tmp_path / "ours.gguf"))
    assert theirs.model_type == "llama" and sorted(theirs.directions) == list(vectors)
    for layer, vector in vectors.items():
        np.testing.assert_array_equal(theirs.directions[layer], vector.vector.numpy())
    theirs.export_gguf(str(tmp_path / "theirs.gguf"))
    back = ms.import_gguf(tmp_path / "theirs.gguf", model=model)
    for layer, vector in vectors.items():
        assert torch.equal(back[ms.Site("resid_post", layer)].vector, vector.vector)
