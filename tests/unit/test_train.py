"""Training: the same weights whether or not it was stopped, nothing but safetensors and JSON, clear refusals."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mechsteer.pocket.train as training
from mechsteer.errors import MechsteerError
from mechsteer.pocket.train import RECIPES, Recipe, train

TINY = Recipe("tiny", n_layers=2, steps=6, d_model=16, n_heads=2, d_mlp=32, rows=2, warmup=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, tmp_path_factory.mktemp("runs") / "whole", tokenizer=tokenizer)


def test_a_stopped_run_ends_in_the_same_weights(
    uninterrupted: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training.sample_batch, []

    def stop_at_step_4(*args, step: int, **options):
        calls.append(step)
        if step == 4 and calls.count(4) == 1:
            raise KeyboardInterrupt
        return real(*args, step=step, **options)

    monkeypatch.setattr(training, "sample_batch", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "stopped", checkpoint_every=3, tokenizer=tokenizer)
    kept = sorted(path.name for path in (tmp_path / "stopped" / "checkpoint").iterdir())
    assert kept == ["model.safetensors", "optimiser.safetensors", "progress.json"]
    train(TINY, tmp_path / "stopped", checkpoint_every=3, tokenizer=tokenizer)
    assert calls == [0, 1, 2, 3, 4, 4, 5], "resumed where it stopped"
    expected = weights(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "stopped").items())


def test_a_finished_folder_is_a_hugging_face_folder_without_pickles(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    assert not any("checkpoint" in name for name in names)


@pytest.mark.slow
def test_the_loss_falls(tokenizer, tmp_path: Path) -> None:
    import json

    out = train(replace(TINY, steps=100, warmup=10), tmp_path / "run", tokenizer=tokenizer)
    losses = dict(json.loads((out / "training.json").read_text())["losses"])
    assert losses[100] < losses[50] < 8.1, "below the entropy of a uniform guess over the vocabulary, and falling"


def test_a_finished_run_is_not_trained_over(uninterrupted: Path) -> None:
    before = weights(uninterrupted)
    with pytest.raises(MechsteerError, match="holds a finished model"):
        train(TINY, uninterrupted)
    assert all(torch.equal(value, before[name]) for name, value in weights(uninterrupted).items())


def test_another_recipes_run_is_refused(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "sample_batch", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", tokenizer=tokenizer)
    with pytest.raises(MechsteerError, match="holds a run of another recipe"):
        train(replace(TINY, seed=1), tmp_path / "run", tokenizer=tokenizer)


def test_schedule() -> None:
    recipe = RECIPES["pocket"]
    rates = [recipe.schedule(step) for step in range(recipe.steps)]
    assert rates[0] == 1 / recipe.warmup
    assert max(rates) == 1.0
    falling = rates[int(recipe.steps * (1 - recipe.cooldown)) :]
    assert all(a > b for a, b in pairwise(falling))
    assert 0 < rates[-1] < 0.01


def test_old_torch_is_named(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MechsteerError, match=r"training needs torch.optim.Muon.*upgrade torch"):
        train(TINY, tmp_path / "run", tokenizer=tokenizer)


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda *args, **options: real(*args, **options) * float("nan"))
    with pytest.raises(MechsteerError, match="the loss of tiny is nan at step 0: lower the rate"):
        train(TINY, tmp_path / "run", tokenizer=tokenizer)
