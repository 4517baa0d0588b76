"""Activations that do not fit in memory go to disk by themselves; what calls need is told beforehand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer import memory, offload
from mechsteer.engine import Engine
from mechsteer.prefix import search_prefix

SITES = ["resid_post", "z", "pattern", "embed"]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request: pytest.FixtureRequest, zoo_folders: dict[str, Path]) -> ms.Model:
    return ms.load_model(zoo_folders["llama"], device="cpu", dtype=request.param)


def prompts(model: ms.Model) -> ms.Prompts:
    ids = [zoo.prompts(batch=1, n_pos=n, seed=n)[0].tolist() for n in (9, 12, 7, 12, 10)]
    return ms.Prompts.from_ids(ids, tokenizer=model.tokenizer).padded("left")


def same(one: ms.Run, other: ms.Run) -> None:
    tolerance = 1e-5 if one.rows.dtype == torch.float32 else 0.05
    torch.testing.assert_close(one.rows, other.rows, atol=tolerance, rtol=tolerance)
    assert list(one.activations) == list(other.activations) and one.activations.prompts is one.prompts
    for site, value in one.activations.items():
        assert value.dtype == other.activations[site].dtype
        torch.testing.assert_close(value, other.activations[site], atol=tolerance, rtol=tolerance)


def test_what_does_not_fit_goes_to_disk(
    model: ms.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = prompts(model)
    # Of a batch, each with its own: what depends on a prompt's place must not depend on the batch that it is run in.
    held = model.run(given[[1, 0, 4, 3, 2]].padded("right"), record="resid_post", logits="none").activations
    changes = [
        ms.Add(torch.ones(model.d_model), torch.arange(5.0), site=("resid_post", 0)),
        ms.Replace(("resid_post", 1), held, at=2),
    ]
    plain = model.run(given, changes, record=SITES)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(offload, "_TOKENS", {"cpu": 24, "cuda": 24})
    monkeypatch.setattr(offload, "free_bytes", lambda device: 20_000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    run = model.run(given, changes, record=SITES)
    told = capsys.readouterr().err
    assert "needs about 0." in told and "more than 50% of the 0.0 GB that are free: recorded to disk" in " ".join(
        told.split()
    )
    same(run, plain)
    assert not list(tmp_path.iterdir()), "a temporary file leaves nothing behind"
    small = model.run(given, record="embed", logits="none", memory=1.0).activations
    assert capsys.readouterr().err == "" and len(small) == 1


def test_a_file_of_ones_own(model: ms.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_TOKENS", {"cpu": 24, "cuda": 24})
    given, path = prompts(model), tmp_path / "deep" / "acts.safetensors"
    run = model.run(given, record=SITES, logits="last", out=path)
    same(run, model.run(given, record=SITES, logits="last"))
    again = ms.Activations.load(path, model=model)
    assert again.prompts.hash == given.hash and [*path.parent.iterdir()] == [path]
    for site, value in run.activations.items():
        assert torch.equal(again[site], value)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_shares_that_are_none(zoo_folders: dict[str, Path], share: float) -> None:
    model = ms.load_model(zoo_folders["llama"], device="cpu")
    with pytest.raises(ms.MechsteerError, match=r"^memory=.* is no share of the free memory"):
        model.run(prompts(model), record="embed", memory=share)


def test_errors_come_before_work(zoo_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ms.load_model(zoo_folders["llama"], device="cpu")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ms.MechsteerError, match=r"^The activations take 0\.\d GB on disk, and .* has 0\.0 GB\. Record"):
        model.run(prompts(model), record=SITES, out=tmp_path / "acts.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(
        ms.MechsteerError, match=r"^Loading llama needs about .*: weights .*, and cpu has 0\.000 GB free"
    ):
        ms.load_model(zoo_folders["llama"], device="cpu")
    with pytest.raises(ms.MechsteerError, match=r"^This sweep needs about .* GB: weights .*, packed weights .*, batch"):
        ms.sweep(model, prompts(model), axes={}, build=lambda: None, measure=ms.LogitGap(5, 9), progress=False)


@pytest.mark.parametrize("what", ["This Propagator", "This prefix search"])
def test_gradients_and_searches_that_do_not_fit(
    zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model = ms.load_model(zoo_folders["llama"], device="cpu")

    def begin() -> object:
        if what == "This Propagator":
            return ms.Propagator(model, prompts(model), source=("resid_pre", 0), target=("resid_post", 1)).jacobian
        given = ms.Prompts.from_ids([[2, 3, 4, 5]], completions=[[6, 7]])
        return search_prefix(
            model, given, ms.TeacherForcedCE(), n_tokens=2, evaluations=2, method="gcg", width=2, progress=False
        )

    begin()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(
        ms.MechsteerError, match=rf"^{what} needs about .* GB: weights .* GB free\. Pass fewer or shorter"
    ):
        begin()


def test_needs_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Screen:
        is_interactive = True

        def __init__(self, **options: object) -> None: ...

        def print(self, line: str, **options: object) -> None:
            lines.append(line)

    monkeypatch.setattr(memory, "Console", Screen)
    monkeypatch.setattr(memory, "_told", set())
    for size in (2 * 10**9, 2 * 10**9, 10**6, 3 * 10**9):
        memory.Memory({"weights": size}).announce("Sweep")
    memory.Memory({"weights": 4 * 10**9}).announce("Sweep", show=False)
    assert lines == [
        "Sweep needs about 2.0 GB: weights 2.0",
        "Sweep needs about 3.0 GB: weights 3.0",
    ]


def test_recordings_whose_shards_do_not_fit(
    zoo_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load_model(zoo_folders["llama"], device="cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(
        ms.MechsteerError, match=r"^This recording needs about .* GB: shard .* Pass a smaller shard_tokens"
    ):
        ms.record_stream(model, prompts(model), ["resid_post"], tmp_path / "rows", progress=False)
    found = ms.record_stream(model, prompts(model), ["embed"], tmp_path / "few", shard_tokens=5, progress=False)
    assert found.complete


def test_several_devices_have_room_together(monkeypatch: pytest.MonkeyPatch) -> None:
    need, both = memory.Memory({"packed weights": 1500}), [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    need.check("A sweep", both, "")
    with pytest.raises(ms.MechsteerError, match=r"^A sweep needs .* and cuda:1 has 0\.000 GB free\. Wait\."):
        need.check("A sweep", both[1:], "Wait.")
    with pytest.raises(ms.MechsteerError, match=r"and cuda:0 and cuda:1 have 0\.000 GB free"):
        memory.Memory({"packed weights": 2500}).check("A sweep", both, "")


def test_what_makes_room_when_it_is_needed_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 300\nfile 600\ninactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.free_bytes(torch.device("cpu")) or 0) > 600
    for name, value in {"memory_reserved": 700, "memory_allocated": 300, "mem_get_info": (50, 1000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert memory.free_bytes(torch.device("cuda")) == 450, "what PyTorch keeps of freed tensors, too"


def test_the_line() -> None:
    need = memory.Memory(
        {"weights": 900_000_000, "clean pass": 100_000_000, "batch": 200_000_000}, frozenset({"weights"})
    )
    assert str(need) == "needs about 1.2 GB: weights 0.9, clean pass 0.1, batch 0.2"
    assert need.total == 1_200_000_000 and need.new == 300_000_000


def peak(call: Any) -> int:
    """Bytes of tensors at their most, beyond those at the start."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    at = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        at += event.nbytes()
        most = max(most, at)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_are_close_to_what_is_measured(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = zoo.write_folder(
        "llama", tmp_path / "model", hidden_size=128, intermediate_size=384, num_attention_heads=8, head_dim=16,
        num_key_value_heads=4, num_hidden_layers=4,
    )  # fmt: skip
    model = ms.load_model(folder, device="cpu", dtype=dtype)
    assert memory.of_folder(folder, dtype) == pytest.approx(memory.weights(model)["weights"], rel=0.05)
    # Some folders hold the same weights once more under another name.
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert memory.of_folder(folder, dtype) == pytest.approx(memory.weights(model)["weights"], rel=0.05)
    model.decoder  # noqa: B018 - not part of what is measured
    given = ms.Prompts.from_ids(zoo.prompts(batch=16, n_pos=32))
    gap, vector = ms.LogitGap(5, 9), torch.ones(128)
    options = {"axes": {"alpha": [float(each) for each in range(8)]}, "measure": gap, "rows": 2048, "progress": False}
    build = lambda alpha: ms.Add(vector, alpha, site=("resid_post", 0))  # noqa: E731
    measured = peak(lambda: ms.sweep(model, given, build=build, **options))
    engine = Engine(model, given, {"gap": gap})
    assert engine.memory([2], rows=2048, chunk=4096).new == pytest.approx(measured, rel=0.3)
    recorded = peak(lambda: model.run(given, record="resid_post", logits="none"))
    sites = [ms.Site("resid_post", layer) for layer in range(4)]
    exact = sum(each.nbytes for each in model.run(given, record="resid_post", logits="none").activations.values())
    assert memory.of_activations(model, sites, 16 * 32, width=32) == exact <= recorded
