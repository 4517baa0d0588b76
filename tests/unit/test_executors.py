"""Sweeps by executors: the numbers are those of this process; folders may be URLs. Ray itself: `test_ray`."""

import errno
import uuid
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import torch
from elsewhere import moved

import mechsteer as ms
from mechsteer import batches, memory
from mechsteer.executors import Failure, executor_of
from mechsteer.folders import Folder
from mechsteer.prefix import candidates
from mechsteer.store import ShardWriter, Values


class Elsewhere:
    """An executor whose worker has a model, work and items that went through a pickle, and takes them backwards."""

    def __init__(self, fails: int = -1, limits: int | None = None) -> None:
        """`limits`: what a worker on another device would take for chunks of prompts and candidates."""
        self.fails, self.n, self.limits = fails, 0, limits

    def run(
        self, model: ms.Model, work: Any, items: Sequence[Any], *, folder: Folder | None, left: Any = None
    ) -> Generator[tuple[Any, Any], None, None]:
        limits = {} if self.limits is None else {"cpu": self.limits}
        others = (batches.CHUNK, candidates.CANDIDATE_TOKENS, candidates.CANDIDATE_LOGITS)
        with ExitStack() as there:
            for each in others:
                there.enter_context(mock.patch.dict(each, limits))
            compute = moved(work).bind(moved(model))
        write = None if folder is None else work.sink(moved(folder), uuid.uuid4().hex[:8])
        for index in reversed(range(len(items))):
            self.n += 1
            if index == self.fails:
                yield items[index], Failure("no luck")
                continue
            value = compute(moved(items[index]))
            if write is not None:
                write([value])
            yield items[index], value


def options(model: ms.Model) -> dict[str, Any]:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    prompts = ms.Prompts.from_chats(["Tell me a joke.", "Write a poem.", "Give me some advice."], model)
    return {
        "prompts": prompts,
        "axes": {"layer": range(model.n_layers), "alpha": [0.0, 1.0, 4.0]},
        "build": lambda layer, alpha: ms.Add(ms.Direction(vector, ms.Site("resid_post", layer)), alpha),
        "measure": [ms.LogitGap(" cats", " dogs", tokenizer=model), ms.TokenProb(" cats", tokenizer=model)],
        "rows": 64,
        "progress": False,
    }


@pytest.fixture(scope="module")
def model() -> ms.Model:
    return cases.model("pocket")


@pytest.fixture(scope="module")
def here(model: ms.Model) -> ms.Result:
    return ms.sweep(model, **options(model))


def same(a: ms.Result, b: ms.Result) -> None:
    for name in a.data.data_vars:
        assert np.array_equal(a.data[name].values, b.data[name].values), name


def test_numbers_are_those_of_this_process_bit_for_bit(model: ms.Model, here: ms.Result) -> None:
    executor = Elsewhere()
    same(ms.sweep(model, executor=executor, **options(model)), here)
    assert executor.n > model.n_layers
    # On a worker of another kind, too, whose own chunks of the prompts would be others.
    same(ms.sweep(model, executor=Elsewhere(limits=8), **options(model)), here)
    naive = ms.sweep(model, **(options(model) | {"rows": 1}))
    for name in here.data.data_vars:
        np.testing.assert_allclose(here.data[name].values, naive.data[name].values, atol=1e-5)


def test_using_reaches_the_sweeps_inside_and_ends(model: ms.Model) -> None:
    executor = Elsewhere()
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupt = "When Mary and John went to the store, Mary gave a drink to"
    gap = ms.LogitGap(" Mary", " John", tokenizer=model)
    call = lambda: ms.activation_patching(model, clean, corrupt, measure=gap, layers=[3, 4], progress=False)  # noqa: E731
    with ms.using(executor):
        inside = call()
    assert executor.n > 0
    counted = executor.n
    np.testing.assert_allclose(inside["effect"].values, call()["effect"].values, atol=1e-5)
    assert executor.n == counted
    with ms.using(executor), ms.using("local"), executor_of(None) as chosen:
        assert chosen is None


@pytest.mark.parametrize("drawn", [False, True])
def test_completions_are_those_of_this_process(model: ms.Model, drawn: bool) -> None:
    asked = ["Tell me a joke.", "Write a poem.", "Give me some advice about the garden.", "Let us talk.", "Hello."]
    prompts = ms.Prompts.from_chats(asked, model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 2, "progress": False}
    how |= {"interventions": [ms.Add(ms.Direction(vector, ms.Site("resid_post", 3)), 2.0)]}
    how |= {"temperature": 1.0, "seed": 7} if drawn else {}
    expected = model.generate(prompts, **how).completions
    with ms.using(executor := Elsewhere()):
        assert model.generate(prompts, **how).completions == expected
    assert executor.n == 3 and len(set(expected)) > 1
    with ms.using(Elsewhere(fails=1)), pytest.raises(ms.MechsteerError, match="failed every time it tried: no luck"):
        model.generate(prompts, **how)


def test_losses_of_candidates_are_those_of_this_process_bit_for_bit(
    model: ms.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(candidates.CANDIDATE_TOKENS, "cpu", 128)  # several batches
    prompts = ms.Prompts.from_chats(["Tell me a joke.", "Write a poem.", "Hello."], model)
    prompts = prompts.with_completions(model.generate(prompts, max_new_tokens=6, progress=False).completions)
    generator = torch.Generator().manual_seed(0)
    tried = [tuple(row) for row in torch.randint(10, 3000, (12, 3), generator=generator).tolist()]
    tried += [each[:2] for each in tried[:3]]
    losses = candidates.CandidateLosses(model, prompts, ms.TeacherForcedCE())
    expected, flops = losses.of(tried, base=tried[4]), losses.flops
    again = candidates.CandidateLosses(model, prompts, ms.TeacherForcedCE())
    with ms.using(executor := Elsewhere(limits=32)):
        assert np.array_equal(again.of(tried, base=tried[4]), expected)
    assert executor.n > 2 and again.flops > 0.9 * flops
    one = candidates.CandidateLosses(model, prompts, ms.TeacherForcedCE())
    np.testing.assert_allclose([one.of([ids])[0] for ids in tried], expected, atol=1e-5)


def test_an_executor_that_ends_early_is_told(model: ms.Model) -> None:
    class Lazy(Elsewhere):
        def run(self, *given: Any, **named: Any) -> Generator[tuple[Any, Any], None, None]:
            yield from list(super().run(*given, **named))[:-1]

    with pytest.raises(ms.MechsteerError, match="ended before all was done"):
        ms.sweep(model, executor=Lazy(), **options(model))


def test_what_workers_wrote_meanwhile_is_taken_from_the_folder(
    model: ms.Model, here: ms.Result, tmp_path: Path
) -> None:
    class Meanwhile(Elsewhere):
        def run(
            self, model: ms.Model, work: Any, items: Sequence[Any], *, folder: Folder | None, left: Any = None
        ) -> Generator[tuple[Any, Any], None, None]:
            list(super().run(model, work, items[1:], folder=folder))  # nobody hears of these
            yield from super().run(model, work, still := left(), folder=folder)
            assert still == items[:1] and len(items) > 2

    same(ms.sweep(model, executor=Meanwhile(), out=tmp_path / "sweep", **options(model)), here)


def test_what_fails_is_told_at_the_end_with_its_place_and_tried_again(
    model: ms.Model, here: ms.Result, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    with pytest.raises(ms.MechsteerError, match=r"1 of \d+ batches failed .*layer=\d, alpha=[\d.]+.*prompts.*no luck"):
        ms.sweep(model, executor=Elsewhere(fails=2), out=out, **options(model))
    again = Elsewhere()
    same(ms.sweep(model, executor=again, out=out, **options(model)), here)
    assert again.n == 1
    assert ms.sweep(model, executor=(none := Elsewhere()), out=out, **options(model)) and none.n == 0


def test_a_folder_may_be_a_url_and_goes_on_there(model: ms.Model, here: ms.Result) -> None:
    import fsspec

    fsspec.filesystem("memory").rm("/runs", recursive=True) if fsspec.filesystem("memory").exists("/runs") else None
    url = "memory://runs/one"
    with pytest.raises(ms.MechsteerError, match="failed every time"):
        ms.sweep(model, executor=Elsewhere(fails=0), out=url, **options(model))
    names = Folder(url).names()
    assert "manifest.json" in names and any(name.startswith("shard-") for name in names)
    again = Elsewhere()
    same(ms.sweep(model, executor=again, out=url, **options(model)), here)
    assert again.n == 1 and "result.safetensors" in Folder(url).names()
    with pytest.raises(ms.MechsteerError, match="holds another sweep"):
        ms.sweep(model, out=url, **(options(model) | {"axes": {"layer": [0], "alpha": [1.0]}}))


def test_a_worker_refuses_what_does_not_fit_in_its_memory(model: ms.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in options(model).items() if name not in ("rows", "progress")}
    with (
        pytest.raises(ms.MechsteerError, match=r"^This sweep needs about .* Pass shorter prompts"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(memory, "free_bytes", lambda device: 1000)
        ms.sweep(model, executor=Elsewhere(), progress=False, **given)


def test_a_folder_of_an_unknown_kind_is_refused(model: ms.Model) -> None:
    with pytest.raises(ms.MechsteerError, match="cannot be reached"):
        ms.sweep(model, out="nowhere://x/y", **options(model))


def test_a_full_disk_leaves_nothing_in_part_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(Folder(tmp_path))
    values = Values([0, 1], np.arange(3), {"gap": np.ones((2, 3), dtype=np.float32)})
    writer.add(values, flush=False)

    def full(*arguments: Any, **named: Any) -> None:
        (tmp_path / "shard-00000.safetensors.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mechsteer.files.save_file", full)
        with pytest.raises(OSError, match="No space"):
            writer.flush()
    assert list(tmp_path.iterdir()) == []
    writer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_models_and_tensors_arrive_as_they_were(model: ms.Model) -> None:
    other = moved(model)
    assert other.id == model.id and other._decoder is None
    prompts = ms.Prompts.from_chats(["Tell me a joke."], model)
    assert torch.equal(other.run(prompts).logits, model.run(prompts).logits)
    for tensor in (
        torch.randn(3, 4).T, torch.randn(5, dtype=torch.bfloat16), torch.tensor(2.5), torch.arange(3),
        torch.zeros(0, 3), torch.tensor([True, False]), torch.randn(2, dtype=torch.float64, requires_grad=True),
    ):  # fmt: skip
        got = moved(tensor)
        assert torch.equal(got, tensor) and (got.dtype, got.requires_grad) == (tensor.dtype, tensor.requires_grad)
    vector = torch.randn(4)
    first, second = moved((vector[:], vector[:]))
    assert first.data_ptr() == second.data_ptr()  # one vector of many cells stays one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "at least 1 worker"),
        ({"cpus": 0.0}, "more than 0 cpus"),
        ({"gpus": -1.0}, "share of a GPU"),
        ({"gpus": 1.5}, "a whole number of them"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ms.MechsteerError, match=message):
        ms.RayExecutor(**arguments)


def test_an_unknown_executor_is_refused(model: ms.Model) -> None:
    with pytest.raises(ms.MechsteerError, match="no executor 'spark'"):
        ms.sweep(model, executor="spark", **options(model))


def test_without_ray_one_line_says_what_to_install(model: ms.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ms.MechsteerError, match=r"pip install 'mechsteer\[ray\]'"):
        ms.sweep(model, executor=ms.RayExecutor(), **options(model))
