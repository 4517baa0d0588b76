"""Hands items of work out to workers on a Ray cluster, replaces workers that are lost, and tries again what failed."""

import errno
import logging
import os
import socket
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from mechsteer.errors import MechsteerError
from mechsteer.executors.base import Failure
from mechsteer.executors.transport import Parcel, gpus_of, share_tensors
from mechsteer.folders import Folder

if TYPE_CHECKING:
    from mechsteer.executors.base import Work
    from mechsteer.executors.ray_executor import RayExecutor

LOG = logging.getLogger("mechsteer.executors")
LOG_NAME = "executor.log"
"""The file in a sweep's folder that says what happened to workers and items, also in earlier runs."""

# What a worker is given at once should take it about so many seconds: little is lost with a worker, and little time
# goes into handing out.
_SECONDS = 2.0
# Beginnings of the names of variables that workers get.
_ENVIRONMENT = ("HF_", "TRANSFORMERS_")
# Seconds without a worker after which that is told.
_WAIT = 60.0
# Seconds between two writings of the log, which is written whole.
_LOGGED = 2.0
# Starts of workers that may fail one after the other.
_STARTS = 3
# Errors that mean that nothing can be written any more, whoever tries.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Report:
    """What became of an item.

    Attributes:
        index: of the item.
        value: what came out; None where it failed.
        error: why it failed, or "".
        seconds: that it took.
    """

    index: int
    value: Any
    error: str
    seconds: float


class DiskFull(Exception):
    """A worker could not write what it had computed."""


class Refused(Exception):
    """A worker cannot do this work at all."""


class Worker:
    """Holds a model on one machine, and computes items. An actor: one process."""

    def __init__(self, parcel: Parcel, device: str, threads: int, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        if device == "cpu":
            hide_gpus()
        import torch

        torch.set_num_threads(threads)
        share_tensors()
        model = parcel.open()
        if model.device.type != device:
            model.hooked.to(device)
        self._model = model
        self._bound: tuple[str, Any, Any] = ("", None, None)
        self._tag = uuid.uuid4().hex[:8]

    def where(self) -> str:
        """Machine and process, to be told."""
        return f"{socket.gethostname()} (process {os.getpid()})"

    def compute(
        self, name: str, work: "list[ray.ObjectRef]", items: Sequence[tuple[int, Any]], folder: Folder | None
    ) -> list[Report]:
        """Compute items, and write them to the folder.

        Raises:
            DiskFull: they cannot be written.
            Refused: none of them can be computed here, such as for want of memory.
        """
        if self._bound[0] != name:
            self._bound = "", None, None  # what was computed before goes first
            given = ray.get(work[0])
            sink = None if folder is None else given.sink(folder, f"{self._tag}-{name[:4]}")
            try:
                self._bound = name, given.bind(self._model), sink
            except MechsteerError as error:
                raise Refused(str(error)) from error
        _, compute, sink = self._bound
        reports = []
        for index, item in items:
            began = time.perf_counter()
            try:
                reports.append(Report(index, compute(item), "", time.perf_counter() - began))
            except Exception as error:
                reports.append(Report(index, None, reason_of(error), time.perf_counter() - began))
        if sink is not None:
            try:
                sink([report.value for report in reports if not report.error])
            except OSError as error:
                if error.errno in _FULL:
                    raise DiskFull(f"{folder} cannot be written to ({error.strerror})") from error
                raise
        return reports


class Crew:
    """Workers that hold one model.

    Attributes:
        log: levels, and lines that say what happened to workers and items.
    """

    def __init__(
        self, executor: "RayExecutor", model: "list[ray.ObjectRef]", gpus: int, environment: dict[str, str]
    ) -> None:
        self.log: list[tuple[int, str]] = []
        self._model, self._attempts = model, executor.attempts
        share = float(gpus) if executor.gpus is None else executor.gpus
        self._options = {"num_cpus": executor.cpus, "num_gpus": share, "max_restarts": 0, "max_task_retries": 0}
        self._device = "cuda" if share else "cpu"
        self._threads = max(1, int(executor.cpus))
        self._workers, self._environment = executor.workers, environment
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # by the reference that is ready when the worker is
        self._failed_starts, self._why = 0, ""  # and why the last one did
        self._where: dict[Any, str] = {}
        self._closed = threading.Event()
        self._sent: tuple[Any, str, list[ray.ObjectRef]] = None, "", []  # the work of before, which may come again
        self._kept: tuple[Folder | None, str] = (None, "")  # where the log goes, and what stood there before
        self._written = 0, 0.0  # lines of the log that are in the folder, and since when

    @staticmethod
    def of(executor: "RayExecutor", model: Any) -> "Crew":
        """Workers that will hold this model, started when they are needed."""
        return Crew(executor, [ray.put(Parcel.of(model))], gpus_of(model), environment_of())

    def run(self, work: "Work", items: Sequence[Any], folder: Folder | None) -> Generator[tuple[Any, Any], None, None]:
        """See `mechsteer.executors.Executor.run`."""
        self._keep_log(folder)
        began = time.perf_counter()
        if self._sent[0] is not work:
            self._sent = work, uuid.uuid4().hex, [ray.put(work)]
        _, name, reference = self._sent
        pending = deque(enumerate(items))
        tries = [0] * len(items)
        alone: set[int] = set()  # items that a worker died of, or may have: one at a time, to tell which
        busy: dict[Any, tuple[Any, list[tuple[int, Any]]]] = {}
        seconds, computed, told = 0.0, 0, False
        self._failed_starts = 0
        # Those of before may be gone meanwhile: an item is not to be tried in vain for that.
        self._starting |= {worker.where.remote(): worker for worker in self._idle}
        self._idle = []
        try:
            while (pending or busy) and not self._closed.is_set():
                self._start(min(len(pending) + len(busy), self._room()) - len(busy))
                if not (busy or self._idle or self._starting):
                    raise MechsteerError(f"No worker starts on the Ray cluster: {self._why}")
                while self._idle and pending:
                    share = self._share(pending, alone, seconds / computed if computed else None, len(busy) + 1)
                    worker = self._idle.pop()
                    busy[worker.compute.remote(name, reference, share, folder)] = worker, share
                if not busy and not self._idle and time.perf_counter() - began > _WAIT and not told:
                    told = True
                    self._tell(f"no worker has started in {_WAIT:.0f} s: the cluster may have no room", logging.WARNING)
                waiting = [*busy, *self._starting]
                ready, _ = ray.wait(waiting, num_returns=1, timeout=1.0)
                if time.monotonic() - self._written[1] > _LOGGED:
                    self._write_log()
                for each in ready:
                    if self._closed.is_set():  # by another thread, which forgets all workers
                        break
                    if each in self._starting:
                        self._started(each)
                        continue
                    worker, share = busy.pop(each)
                    try:
                        reports: list[Report] = ray.get(each)
                    except RayTaskError as error:
                        self._idle.append(worker)
                        if isinstance(error.cause, Refused):
                            raise MechsteerError(str(error.cause)) from None
                        if isinstance(error.cause, DiskFull):
                            raise MechsteerError(
                                f"{error.cause}. What was finished before is kept: when that is mended, the same call "
                                "goes on."
                            ) from None
                        reports = [Report(index, None, reason_of(error.cause), 0.0) for index, _ in share]
                    except RayError as error:  # the worker, or its machine, is gone
                        self._lost(worker, error)
                        alone |= {index for index, _ in share}
                        gone = f"its worker was lost ({type(error).__name__})"
                        reports = [Report(index, None, gone, 0.0) for index, _ in share]
                    else:
                        self._idle.append(worker)
                        seconds += sum(report.seconds for report in reports if not report.error)
                        computed += sum(not report.error for report in reports)
                    for report in reports:
                        if not report.error:
                            yield items[report.index], report.value
                            continue
                        tries[report.index] += 1
                        self._tell(f"item {report.index}, attempt {tries[report.index]}: {report.error}")
                        if tries[report.index] < self._attempts:
                            pending.append((report.index, items[report.index]))
                        else:
                            yield items[report.index], Failure(report.error)
            if pending or busy:
                raise MechsteerError("The executor was closed before all was computed.")
            spent = f"{computed} items in {time.perf_counter() - began:.0f} s, {seconds:.0f} s of work"
            # Work without a folder comes in many small pieces.
            self._tell(spent, logging.DEBUG if folder is None else logging.INFO)
        finally:
            self._idle += [worker for worker, _ in busy.values()]
            self._write_log()

    def close(self) -> None:
        """Stop all workers."""
        self._closed.set()
        for worker in {*self._where, *self._starting.values()}:
            ray.kill(worker)
        self._idle, self._starting, self._where = [], {}, {}

    def _keep_log(self, folder: Folder | None) -> None:
        """Write the lines of the log to the folder from now on, after those that are there."""
        there = folder is not None and LOG_NAME in folder.names()
        self._kept = folder, folder.read_text(LOG_NAME) if folder is not None and there else ""
        self._written = 0, 0.0
        self.log.clear()

    def _tell(self, line: str, level: int = logging.INFO) -> None:
        LOG.log(level, line)
        self.log.append((level, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"))

    def _write_log(self) -> None:
        folder, before = self._kept
        if folder is None or self._written[0] == len(self.log):
            return
        self._written = len(self.log), time.monotonic()
        with suppress(OSError):  # a full disk is told of when results cannot be written
            folder.write_text(LOG_NAME, before + "".join(f"{each}\n" for _, each in self.log))

    def _room(self) -> int:
        """How many workers the cluster has room for, or were asked for."""
        if self._workers is not None:
            return self._workers
        total, options = ray.cluster_resources(), self._options
        rooms = [total.get("CPU", 0) / options["num_cpus"]]
        if options["num_gpus"]:
            rooms.append(total.get("GPU", 0) / options["num_gpus"])
        return max(1, int(min(rooms)))

    def _start(self, wanted: int) -> None:
        """Have so many workers that are idle or on their way."""
        if self._failed_starts >= _STARTS:  # the others go on
            return
        for _ in range(wanted - len(self._idle) - len(self._starting)):
            worker = (
                ray.remote(Worker)
                .options(**self._options)
                .remote(self._model[0], self._device, self._threads, self._environment)
            )
            self._starting[worker.where.remote()] = worker

    def _started(self, ready: Any) -> None:
        """A worker is there, or is not."""
        worker = self._starting.pop(ready)
        try:
            where = str(ray.get(ready))
        except RayError as error:
            if worker in self._where:
                self._lost(worker, error)
                return
            self._failed_starts += 1
            self._why = reason_of(error)
            self._tell(f"a worker did not start: {self._why}")
            return
        self._failed_starts = 0
        self._idle.append(worker)
        if worker not in self._where:
            self._where[worker] = where
            self._tell(f"worker on {where}")

    def _lost(self, worker: Any, error: Exception) -> None:
        self._tell(f"lost the worker on {self._where.pop(worker, 'a machine')} ({type(error).__name__})")
        ray.kill(worker)  # one that only does not answer may still hold a GPU

    def _share(
        self, pending: "deque[tuple[int, Any]]", alone: set[int], each: float | None, workers: int
    ) -> list[tuple[int, Any]]:
        """What a worker gets next: about two seconds of work, and less towards the end."""
        most = 1 if each is None else max(1, round(_SECONDS / max(each, 1e-6)))
        most = min(most, -(-len(pending) // (2 * workers)))
        share = [pending.popleft()]
        while len(share) < most and pending and share[0][0] not in alone and pending[0][0] not in alone:
            share.append(pending.popleft())
        return share


def environment_of() -> dict[str, str]:
    """Variables of this process that decide whether a model may be loaded, and from where."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


def hide_gpus() -> None:
    """Let this process see none: Ray shows all of them to one that asked for none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def reason_of(error: BaseException | None) -> str:
    """An error as one line, with the place where it arose."""
    if error is None:
        return "unknown"
    if isinstance(error, RayError):
        return " ".join(str(error).split())[-500:]
    last = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = f" ({os.path.basename(last[0].filename)}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
