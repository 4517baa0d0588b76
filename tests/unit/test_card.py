"""`benchmarks/card.py` at a small size: what it compares gives the same values, and what it counts is there."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import card  # pyright: ignore[reportMissingImports]

    return card


def test_both_sides_do_the_same_work(card: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "small", "--device", "cpu", "--dtype", "float32", "--runs", "1"]
    kept: list[object] = []
    real = card.measured
    card.measured = lambda arguments: kept.append(real(arguments)) or kept[-1]
    assert card.main(words) == 0
    (lines, rate) = kept[0]  # type: ignore[misc]
    assert [line.work for line in lines][-1] == "GCG, candidates" and len(lines) == 5
    for line in lines[:-1]:
        assert line.difference < 1e-4 and line.ratio == pytest.approx(line.theirs / line.ours)
    sweeps = [line for line in lines if line.work.startswith(("layer", "41"))]
    # A whole forward pass of each cell takes more: what is counted is what is done.
    cells = {"layer x position map": 3 * 32 * 32, "41 alphas, all positions": 41 * 16 * 32,
             "41 alphas, last position": 41 * 16 * 32}  # fmt: skip
    shape = card.SHAPES["small"]
    per_token = 2 * shape.layers * (3 * shape.d_model * shape.d_mlp)
    assert all(0 < line.flops < 3 * per_token * cells[line.work] for line in sweeps)
    assert lines[-1].flops > 0 and 0 < max(line.flops / line.ours for line in sweeps) < rate
    assert "matrix product" in capsys.readouterr().out


def test_no_runs_are_refused(card: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        card.main(["--runs", "0"])
    assert "--runs takes one or more." in capsys.readouterr().err


def test_half_precision_runs(card: ModuleType) -> None:
    import torch

    model = card.model_of(card.SHAPES["small"], "cpu", torch.bfloat16)
    line = card.swept("map", card.layer_by_position(model), 1, "cpu")
    assert model.dtype == torch.bfloat16 and line.difference < 0.2


def test_a_peer_gets_a_llama_of_the_same_shape_and_a_tokenizer(card: ModuleType, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = card.SHAPES["small"]
    template = card.write_llama(shape, tmp_path, torch.bfloat16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == shape.layers and model.config.vocab_size == len(tokenizer) == shape.vocab
    ids = tokenizer("w7 w8 w9", add_special_tokens=False)["input_ids"]
    assert ids == [7, 8, 9] and tokenizer.decode(ids) == "w7 w8 w9" and "bos_token" in template
    assert "prefix" in sys.modules
