"""Sweeps on Ray clusters of several nodes on this machine: the same numbers, whatever happens to workers and driver."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import mechsteer as ms
from mechsteer.folders import Folder

pytestmark = [
    pytest.mark.slow,
    # One cluster after the other, in one process: each takes all processors of a small machine.
    pytest.mark.xdist_group("ray"),
]
ray = pytest.importorskip("ray")


@dataclass(frozen=True, eq=False, repr=False)
class Troubled(ms.Objective):
    """A logit gap that takes its time, and on the way meets with what `trouble` says, where a marker file allows."""

    gap: ms.Objective
    marker: Path
    trouble: str = ""
    seconds: float = 0.1
    n_calls: list[int] = field(default_factory=lambda: [0])

    def reads(self, prompts: ms.Prompts) -> Bool[Tensor, "batch pos"] | None:
        return self.gap.reads(prompts)

    def sites(self) -> tuple[ms.Site, ...]:
        return self.gap.sites()

    def __call__(self, run: Any) -> Float[Tensor, " batch"]:
        time.sleep(self.seconds)
        self.n_calls[0] += 1
        if self.trouble == "kill" and self.n_calls[0] == 3 and self.marker.exists():
            self.marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        values = self.gap(run)
        while self.trouble == "wait" and self.marker.exists():
            time.sleep(0.05)
        if self.trouble == "raise" and self.marker.exists() and bool((values > 1e4).any()):
            raise ValueError("too large to be true")
        return values


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that computes nothing, and two nodes with a processor each."""
    from ray.cluster_utils import Cluster

    try:
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            made.add_node(num_cpus=1)
    except Exception as error:  # of many types: some machines have no room or no ports for Ray's processes
        pytest.skip(f"no Ray cluster starts here: {error}")
    yield made
    made.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> Iterator[Any]:
    """The nodes, which nobody has joined yet."""
    yield nodes
    ray.shutdown()


@pytest.fixture(scope="module")
def model() -> ms.Model:
    return cases.model("pocket")


ALPHAS = tuple(float(alpha) for alpha in range(12))


def options(model: ms.Model, marker: Path, trouble: str = "", seconds: float = 0.1) -> dict[str, Any]:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    gap = ms.LogitGap(" cats", " dogs", tokenizer=model)
    return {
        "prompts": ms.Prompts.from_chats(["Tell me a joke.", "Write a poem.", "Give me some advice."], model),
        "axes": {"layer": range(model.n_layers), "alpha": ALPHAS},
        "build": lambda layer, alpha: ms.Add(ms.Direction(vector, ms.Site("resid_post", layer)), alpha),
        "measure": {"gap": Troubled(gap, marker, trouble, seconds)},
        "rows": 64,
        "progress": False,
    }


def expected(model: ms.Model, tmp_path: Path) -> np.ndarray:
    return ms.sweep(model, **options(model, tmp_path / "none", seconds=0.0)).data["gap"].values


def shards(out: Path) -> list[str]:
    return [name for name in Folder(out).names() if name.startswith("shard-")]


def times_written(out: Path, shape: tuple[int, ...]) -> np.ndarray:
    """How often each cell of each prompt stands in the shards [cell, prompt]."""
    counts = np.zeros((int(np.prod(shape[:-1])), shape[-1]), dtype=int)
    for name in shards(out):
        with Folder(out).open_tensors(name, format="sweep shard", version=1) as (file, manifest):
            for index in range(manifest["batches"]):
                cells, prompts = (file.get_tensor(f"{index}.{key}").numpy() for key in ("cells", "prompts"))
                counts[np.ix_(cells, prompts)] += 1
    return counts


def wait_for(what: Callable[[], object], seconds: float = 300.0) -> None:
    """A driver, its coordinator and two workers load PyTorch first: a minute and more on a small, busy machine."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_numbers_are_those_of_this_process_bit_for_bit(
    workers: int, cluster: Any, model: ms.Model, tmp_path: Path
) -> None:
    executor = ms.RayExecutor(workers=workers, address=cluster.address)
    made = ms.sweep(model, executor=executor, **options(model, tmp_path / "none", seconds=0.0))
    assert np.array_equal(made.data["gap"].values, expected(model, tmp_path))
    executor.close()


def test_a_worker_that_is_killed_is_replaced(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    (marker := tmp_path / "marker").touch()
    out, executor = tmp_path / "out", ms.RayExecutor(address=cluster.address)
    made = ms.sweep(model, executor=executor, out=out, **options(model, marker, "kill"))
    assert not marker.exists(), "no worker was killed"
    assert np.array_equal(made.data["gap"].values, expected(model, tmp_path))
    assert (times_written(out, made.data["gap"].shape) == 1).all()
    log = Folder(out).read_text("executor.log")
    assert log.count("lost the worker") == 1 and "attempt 1: its worker was lost" in log
    started = log.count("worker on") - log.count("lost the worker on")
    assert started >= 2, "nobody took its place"


def test_a_node_that_is_lost(cluster: Any, model: ms.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    caplog.set_level(logging.INFO, logger="mechsteer.executors")

    def lose() -> None:
        # Both have begun.
        wait_for(lambda: len({name.split("-")[1] for name in shards(out)}) == 2)
        # Not the one that this process and the coordinator are on, which may be any of them.
        here = ray.get_runtime_context().get_node_id()
        cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id != here), allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    executor = ms.RayExecutor(address=cluster.address)
    made = ms.sweep(model, executor=executor, out=out, **options(model, tmp_path / "none", seconds=1.2))
    losing.join()
    cluster.add_node(num_cpus=1)
    assert np.array_equal(made.data["gap"].values, expected(model, tmp_path))
    # A coordinator that goes with its node takes with it what it knew of its workers, and is started again.
    assert "lost the worker" in Folder(out).read_text("executor.log") or "the coordinator is lost" in caplog.text
    # What the lost worker wrote and could not tell any more is computed again, with the same numbers.
    assert (times_written(out, made.data["gap"].shape) >= 1).all()


def test_a_coordinator_that_is_lost_is_started_again(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    out, killed = tmp_path / "out", []

    def lose() -> None:
        wait_for(lambda: out.exists() and shards(out))
        (name,) = ray.util.list_named_actors()
        ray.kill(ray.get_actor(name))
        killed.append(name)

    losing = threading.Thread(target=lose)
    losing.start()
    executor = ms.RayExecutor(address=cluster.address)
    made = ms.sweep(model, executor=executor, out=out, **options(model, tmp_path / "none", seconds=0.4))
    losing.join()
    assert killed and np.array_equal(made.data["gap"].values, expected(model, tmp_path))
    assert (times_written(out, made.data["gap"].shape) >= 1).all() and not ray.util.list_named_actors()


def test_batches_that_raise_every_time_are_told_at_the_end(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    (marker := tmp_path / "marker").touch()
    given = options(model, marker, "raise", seconds=0.0)
    # One cell in the middle is bad.
    bad = ms.Direction(torch.full((model.d_model,), 1e9), ms.Site("resid_post", 5))
    build = given["build"]
    given["build"] = lambda layer, alpha: ms.Add(bad, 1.0) if (layer, alpha) == (5, 3.0) else build(layer, alpha)
    object.__setattr__(given["measure"]["gap"], "gap", _Huge(given["measure"]["gap"].gap))
    out, executor = tmp_path / "out", ms.RayExecutor(address=cluster.address, attempts=2)
    with pytest.raises(ms.MechsteerError) as caught:
        ms.sweep(model, executor=executor, out=out, **given)
    told = str(caught.value)
    assert (
        told.startswith("1 of ") and "layer=5" in told and "prompts 0 to 2" in told and "too large to be true" in told
    )
    shape = (model.n_layers, len(ALPHAS), 3)
    counts = times_written(out, shape)
    failed = np.argwhere(counts.sum(1) == 0)[:, 0]
    assert 5 * len(ALPHAS) + 3 in failed and len(failed) < len(counts) / 2
    assert (counts[np.setdiff1d(np.arange(len(counts)), failed)] == 1).all()
    assert Folder(out).read_text("executor.log").count("too large to be true") == 2
    # The same call tries those again, and no others.
    marker.unlink()
    made = ms.sweep(model, executor=executor, out=out, **given).data["gap"].values
    assert (times_written(out, shape) == 1).all()
    assert np.array_equal(made, ms.sweep(model, **given).data["gap"].values) and (made[5, 3] > 1e4).all()


@dataclass(frozen=True, eq=False, repr=False)
class _Huge(ms.Objective):
    """An objective, or 1e6 where the logits are those of a state far out of all range."""

    gap: ms.Objective

    def reads(self, prompts: ms.Prompts) -> Bool[Tensor, "batch pos"] | None:
        return self.gap.reads(prompts)

    def sites(self) -> tuple[ms.Site, ...]:
        return (ms.Site("resid_post", 5),)

    def __call__(self, run: Any) -> Float[Tensor, " batch"]:
        far = run.activations[ms.Site("resid_post", 5)].abs().flatten(1).amax(1) > 1e8
        return torch.where(far, 1e6, self.gap(run))


_DRIVER = """
import logging, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_ray, cases, torch
import mechsteer as ms
torch.set_num_threads(1)
logging.getLogger("mechsteer.executors").setLevel("INFO")
logging.getLogger("mechsteer.executors").addHandler(logging.StreamHandler(sys.stdout))
model, given = cases.model("pocket"), Path({tmp!r})
executor = ms.RayExecutor(address={address!r})
made = ms.sweep(model, executor=executor, out=given / "out", **test_ray.options(model, given / "hold", "wait", 0.6))
made.save(given / "made.safetensors")
"""


@dataclass
class Driver:
    """A process that makes a sweep on a cluster, into `folder`/out; it waits there while `folder`/hold exists."""

    folder: Path
    address: str
    process: "subprocess.Popen[bytes]" = field(init=False)

    def start(self) -> None:
        tests = Path(__file__).parent
        code = _DRIVER.format(tests=str(tests), tmp=str(self.folder), address=self.address)
        path = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
        with open(self.folder / "told", "w") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=told
            )

    def leave(self) -> None:
        """Start, be killed as soon as there are results, and come back when there are more."""
        out = self.folder / "out"
        self.start()
        wait_for(lambda: out.exists() and shards(out))
        self.process.kill()
        self.process.wait()
        there = len(shards(out))
        # The work goes on without it.
        wait_for(lambda: len(shards(out)) > there)


def test_a_driver_that_is_killed_and_started_again_joins_what_goes_on(
    cluster: Any, model: ms.Model, tmp_path: Path
) -> None:
    driver, out = Driver(tmp_path, cluster.address), tmp_path / "out"
    driver.leave()
    (tmp_path / "hold").touch()
    driver.start()
    wait_for(lambda: "worker on" in (tmp_path / "told").read_text())
    assert (times_written(out, (model.n_layers, len(ALPHAS), 3)) == 0).any(), "nothing was left to join"
    (tmp_path / "hold").unlink()
    assert driver.process.wait(timeout=240) == 0
    made = ms.Result.load(tmp_path / "made.safetensors").data["gap"].values
    assert np.array_equal(made, expected(model, tmp_path))
    assert (times_written(out, made.shape) == 1).all()
    assert Folder(out).read_text("executor.log").count("items in") == 1


@pytest.mark.parametrize("gone", [False, True])
def test_what_is_finished_between_a_look_into_the_folder_and_the_joining_is_not_computed_again(
    gone: bool, cluster: Any, model: ms.Model, tmp_path: Path
) -> None:
    driver, out = Driver(tmp_path, cluster.address), tmp_path / "out"
    driver.leave()
    ended = lambda: "items in" in Folder(out).read_text("executor.log")  # noqa: E731

    class Late(ms.RayExecutor):
        def run(self, *given: Any, **named: Any) -> Iterator[tuple[Any, Any]]:
            assert not ended()
            wait_for(ended)
            if gone:
                self.connect()
                (name,) = ray.util.list_named_actors()
                ray.kill(ray.get_actor(name))
            return super().run(*given, **named)

    executor, given = Late(address=cluster.address), options(model, tmp_path / "hold", "wait", 0.6)
    made = ms.sweep(model, executor=executor, out=out, **given).data["gap"].values
    assert np.array_equal(made, expected(model, tmp_path))
    assert (times_written(out, made.shape) == 1).all()
    assert not ray.util.list_named_actors()


def test_ctrl_c_stops_the_work_on_the_cluster(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    driver, out = Driver(tmp_path, cluster.address), tmp_path / "out"
    driver.start()
    wait_for(lambda: out.exists() and shards(out))
    driver.process.send_signal(signal.SIGINT)
    assert driver.process.wait(timeout=60) != 0
    time.sleep(4)
    left = shards(out)
    time.sleep(4)
    assert shards(out) == left and not (out / "result.safetensors").exists()
    written = times_written(out, (model.n_layers, len(ALPHAS), 3))
    assert (written == 0).any()  # it did not simply end


def test_commands_take_an_executor(tmp_path: Path) -> None:
    def said(*arguments: str) -> tuple[Any, str]:
        words = [sys.executable, "-c", "from mechsteer.cli import main; main()", "patch", "--layers", "2,3", "--json"]
        done = subprocess.run([*words, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    ray_said, told = said("--executor", "ray", "--workers", "2", "--out", str(tmp_path / "ray"))
    assert "worker on" in told and "items in" in told and "lost the worker" not in told
    here, told = said("--out", str(tmp_path / "here"))
    assert "worker on" not in told
    assert [each["share"] for each in ray_said["cells"]] == pytest.approx(
        [each["share"] for each in here["cells"]], abs=1e-4
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for very little."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_what_was_finished_stays(
    cluster: Any, model: ms.Model, small_disk: Path, tmp_path: Path
) -> None:
    out, executor = small_disk / "out", ms.RayExecutor(address=cluster.address)
    given = options(model, tmp_path / "none", seconds=0.3)
    with pytest.raises(
        ms.MechsteerError, match=r"cannot be written to \(No space left on device\).*when that is mended"
    ):
        ms.sweep(model, executor=executor, out=out, **given)
    before = times_written(out, (model.n_layers, len(ALPHAS), 3))
    assert 0 < (before == 1).sum() < before.size and not (before > 1).any()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    made = ms.sweep(model, executor=executor, out=out, **given).data["gap"].values
    assert np.array_equal(made, expected(model, tmp_path))
    assert (times_written(out, made.shape) == 1).all()


def test_what_keeps_a_cluster_from_working_is_told(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    given = options(model, tmp_path / "none", seconds=0.0)
    with pytest.raises(ms.MechsteerError, match=r"No Ray cluster answers at 127\.0\.0\.1:1 "):
        ms.sweep(model, executor=ms.RayExecutor(address="127.0.0.1:1"), **given)
    executor = ms.RayExecutor(workers=1, address=cluster.address)
    broken = ms.Model(model.hooked, tokenizer=_Unwilling(), name="broken")
    with pytest.raises(ms.MechsteerError, match=r"No worker starts on the Ray cluster: .*will not be read"):
        ms.sweep(broken, executor=executor, **given)


def test_where_there_is_no_room_the_sweep_waits_and_says_so(
    cluster: Any, model: ms.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mechsteer.executors import crew

    monkeypatch.setattr(crew, "_WAIT", 0.5)
    caplog.set_level(logging.WARNING, logger="mechsteer.executors")
    # More processors than a node has.
    executor = ms.RayExecutor(workers=1, cpus=4.0, address=cluster.address)

    def say() -> list[str]:
        return [each.message for each in caplog.records if "no worker has started" in each.message]

    ending = threading.Thread(target=lambda: (wait_for(say), executor.close()))
    ending.start()
    with pytest.raises(ms.MechsteerError, match="The executor was closed before all was computed"):
        ms.sweep(model, executor=executor, **options(model, tmp_path / "none", seconds=0.0))
    ending.join()
    assert len(say()) == 1 and "the cluster may have no room" in say()[0]


def test_a_coordinator_that_is_lost_again_and_again(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    out, done = tmp_path / "out", threading.Event()

    def lose() -> None:
        while not done.is_set():
            if ray.is_initialized():
                for name in ray.util.list_named_actors():
                    with suppress(ValueError):
                        ray.kill(ray.get_actor(name))
            time.sleep(0.5)

    losing = threading.Thread(target=lose)
    losing.start()
    executor = ms.RayExecutor(address=cluster.address)
    given = options(model, tmp_path / "none", seconds=0.3)
    try:
        with pytest.raises(
            ms.MechsteerError, match=r"(?s)lost 3 times .* What is finished is in .*the same call goes on"
        ):
            ms.sweep(model, executor=executor, out=out, **given)
    finally:
        done.set()
        losing.join()
    made = ms.sweep(model, executor=executor, out=out, **given).data["gap"].values
    assert np.array_equal(made, expected(model, tmp_path))


def test_work_that_no_coordinator_can_read(cluster: Any, model: ms.Model, tmp_path: Path) -> None:
    given = options(model, tmp_path / "none", seconds=0.0)
    given["measure"] = {"gap": _Unreadable(given["measure"]["gap"], tmp_path / "none")}
    executor = ms.RayExecutor(workers=1, address=cluster.address)
    with pytest.raises(ms.MechsteerError, match=r"coordinator on the Ray cluster failed: .*will not be read"):
        ms.sweep(model, executor=executor, out=tmp_path / "out", **given)
    assert not ray.util.list_named_actors()


class _Unreadable(Troubled):
    """An objective that no other process can read."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def test_a_coordinator_that_nobody_begins_ends(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechsteer.executors import coordinator

    ms.RayExecutor(address=cluster.address).connect()
    monkeypatch.setattr(coordinator, "_UNBEGUN", 0.5)
    left = coordinator._coordinator("mechsteer-left")
    assert ray.get(left.state.remote()) == (False, False)
    wait_for(lambda: not ray.util.list_named_actors(), 30)


class _Unwilling:
    """A tokenizer that no other process can read."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("will not be read")
