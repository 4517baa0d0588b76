"""The objective, the intervention and the chapter that CONTRIBUTING.md shows work."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples define, run one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        names["done"] = names["done"].report.read_text(encoding="utf-8"), names["done"].summary
    return names


def entropy(logits: torch.Tensor) -> float:
    return float(torch.distributions.Categorical(logits=logits.double()).entropy())


def test_the_objective_is_the_entropy_of_the_next_token(names: dict[str, Any]) -> None:
    model, prompts = names["model"], names["prompts"]
    found = names["halved"].data["entropy"]
    assert found.dims == ("factor", "prompt")
    for factor in (1.0, 0.5, 0.0):
        for row in range(len(prompts)):
            ids = prompts.tokens[row][prompts.mask[row]]
            scaled = ("blocks.0.hook_mlp_out", lambda x, hook, factor=factor: x * factor)
            with torch.no_grad():
                logits = model.hooked.run_with_hooks(ids[None], fwd_hooks=[scaled])[0, -1]
            assert float(found.sel(factor=factor)[row]) == pytest.approx(entropy(logits), abs=1e-4)


def test_the_intervention_caps_norms_in_a_run_and_in_a_sweep(names: dict[str, Any]) -> None:
    model, prompts, site = names["model"], names["prompts"], names["site"]
    plain = model.run(prompts, record=site).activations[site][prompts.mask]
    assert float(plain.norm(dim=-1).min()) > 3.0, "the example would show nothing"
    capped = names["run"].activations[site][prompts.mask]
    torch.testing.assert_close(capped, plain * 3 / plain.norm(dim=-1, keepdim=True))
    found = names["capped"].data["entropy"]
    one = names["Entropy"]()(names["run"])
    np.testing.assert_allclose(found.sel(limit=3.0), one.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.sel(limit=1e6), names["halved"].data["entropy"].sel(factor=1.0), atol=1e-4)
    with pytest.raises(ms.MechsteerError, match=r"CapNorm got limit=0\. Pass a length above 0\."):
        names["CapNorm"](site, 0)


def test_the_chapter_is_in_the_report(names: dict[str, Any]) -> None:
    report, summary = names["done"]
    found = summary["chapters"]["openness"]
    sure = "surer" if found["summary"]["with"] < found["summary"]["without"] else "no surer"
    assert f"With the prefix the model is {sure} of its first word than without." in report
    assert "How open" in report and f"{found['summary']['with']:.2f}" in report
