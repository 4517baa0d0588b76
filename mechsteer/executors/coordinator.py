"""A sweep on a running Ray cluster that goes on when the process that asked for it leaves."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from mechsteer.errors import MechsteerError
from mechsteer.executors.crew import LOG, Crew
from mechsteer.executors.transport import gpus_of, share_tensors
from mechsteer.folders import Folder

if TYPE_CHECKING:
    from mechsteer.executors.base import Work
    from mechsteer.executors.ray_executor import RayExecutor

# Seconds for which what came out can be asked for after the end; then it is only in the folder.
_LINGER = 60.0
_POLL = 0.25


class Coordinator:
    """Runs a crew, and keeps what came out until it is asked for. A detached actor."""

    def __init__(self, name: str) -> None:
        share_tensors()
        self._name = name
        self._events: list[tuple[Any, Any]] = []
        self._crew: Crew | None = None
        self._error: str | None = None
        self._ended = False
        self._lock = threading.Lock()

    def start(
        self, executor: "RayExecutor", model: "list[ray.ObjectRef]", gpus: int, work: "Work", items: Sequence[Any],
        folder: Folder,
    ) -> None:  # fmt: skip
        """Begin, unless it has begun."""
        with self._lock:
            if self._crew is not None:
                return
            self._crew = Crew(executor, model, gpus)
        threading.Thread(target=self._run, args=(work, items, folder), daemon=True).start()

    def state(self) -> tuple[bool, bool]:
        """Whether it was started, and whether it has ended."""
        return self._crew is not None, self._ended

    def events(self, since: int, told: int) -> tuple[list[tuple[Any, Any]], list[str], bool, str | None]:
        """What came out after the first `since` items; the log's lines after the first `told`; whether all has ended,
        and the error that it ended with."""
        ended = self._ended  # before the events are read: none is missed
        log = [] if self._crew is None else self._crew.log[told:]
        return self._events[since:], log, ended, self._error

    def _run(self, work: "Work", items: Sequence[Any], folder: Folder) -> None:
        assert self._crew is not None
        try:
            for event in self._crew.run(work, items, folder):
                self._events.append(event)
        except Exception as error:
            self._error = str(error)
        finally:
            self._crew.close()
            self._ended = True
        time.sleep(_LINGER)
        ray.kill(ray.get_actor(self._name))


def follow(
    executor: "RayExecutor", name: str, model: Any, work: "Work", items: Sequence[Any], folder: Folder
) -> Iterator[tuple[Any, Any]]:
    """Start the coordinator of this name, or join the one there is, and tell what comes out.

    Raises:
        MechsteerError: the coordinator is lost, or ended with an error.
    """
    coordinator = _coordinator(name)
    begun, ended = ray.get(coordinator.state.remote())
    if ended:  # what came out of it is in the folder, and what failed there is tried again
        ray.kill(coordinator)
        coordinator, begun = _coordinator(name), False
    try:
        if not begun:
            # The coordinator owns the model, which then outlives this process.
            reference = [ray.put(model, _owner=coordinator)]
            ray.get(coordinator.start.remote(executor, reference, gpus_of(model), work, list(items), folder))
        seen = told = 0
        while True:
            events, log, ended, error = ray.get(coordinator.events.remote(seen, told))
            for line in log:
                LOG.info(line)
            seen, told = seen + len(events), told + len(log)
            yield from events
            if ended:
                break
            time.sleep(_POLL)
    except RayError as error:
        raise MechsteerError(
            f"The coordinator of this sweep is lost ({type(error).__name__}). What is finished is in {folder}: the "
            "same call goes on."
        ) from error
    except BaseException:  # also Ctrl-C, and a consumer that wants no more
        ray.kill(coordinator)
        raise
    ray.kill(coordinator)
    if error is not None:
        raise MechsteerError(error)


def _coordinator(name: str) -> Any:
    return (
        ray.remote(Coordinator)
        .options(name=name, lifetime="detached", get_if_exists=True, num_cpus=0, max_concurrency=4)
        .remote(name)
    )
