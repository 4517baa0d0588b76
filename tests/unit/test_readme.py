"""The README's code runs."""

import ast
import re
from pathlib import Path

import pytest

from mechsteer.pocket.labeller import label

ROOT = Path(__file__).parents[2]


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    gaps = names["gaps"]["logit_gap"].isel(prompt=0)  # type: ignore[index]
    # Without a patch the answer is John; the name that differs is at position 11, and moves on from there.
    assert gaps.sel(layer=0, pos=3) < 0 < gaps.sel(layer=0, pos=11)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("["))
    assert sum(label(text).on_topic("cats") for text in ast.literal_eval(printed)) == 3
