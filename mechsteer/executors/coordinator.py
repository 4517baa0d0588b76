"""A sweep on a running Ray cluster that goes on when the process that asked for it leaves."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from mechsteer.errors import MechsteerError
from mechsteer.executors.crew import LOG, Crew, environment_of, hide_gpus, reason_of
from mechsteer.executors.ray_executor import NAMESPACE
from mechsteer.executors.transport import Parcel, gpus_of, share_tensors
from mechsteer.folders import Folder

if TYPE_CHECKING:
    from mechsteer.executors.base import Work
    from mechsteer.executors.ray_executor import RayExecutor

# Seconds for which what came out can be asked for after the end; then it is only in the folder.
_LINGER = 60.0
_POLL = 0.25
# How often a coordinator may be lost, and the seconds until the cluster has noticed.
_LOSSES = 3
_GONE = 60.0
# Seconds for which a coordinator waits for its work.
_UNBEGUN = 1800.0


class Coordinator:
    """Runs a crew, and keeps what came out until it is asked for. A detached actor."""

    def __init__(self, name: str, unbegun: float) -> None:
        hide_gpus()
        share_tensors()
        self._name = name
        self._events: list[tuple[Any, Any]] = []
        self._crew: Crew | None = None
        self._error: str | None = None
        self._ended = False
        self._lock = threading.Lock()
        threading.Thread(target=self._left, args=(unbegun,), daemon=True).start()

    def start(
        self, executor: "RayExecutor", model: Parcel, gpus: int, environment: dict[str, str], work: "Work",
        items: Sequence[Any], folder: Folder,
    ) -> None:  # fmt: skip
        """Begin, unless it has begun."""
        with self._lock:
            if self._crew is not None:
                return
            # Put again, from here: what the asking process has put goes when it goes.
            self._crew = Crew(executor, [ray.put(model)], gpus, environment)
        threading.Thread(target=self._run, args=(work, items, folder), daemon=True).start()

    def state(self) -> tuple[bool, bool]:
        """Whether it was started, and whether it has ended."""
        return self._crew is not None, self._ended

    def events(self, since: int, told: int) -> tuple[list[tuple[Any, Any]], list[tuple[int, str]], bool, str | None]:
        """What came out after the first `since` items; the log's lines after the first `told`; whether all has ended,
        and the error that it ended with."""
        ended = self._ended  # before the events are read: none is missed
        log = [] if self._crew is None else self._crew.log[told:]
        return self._events[since:], log, ended, self._error

    def _left(self, seconds: float) -> None:
        """End where nobody begins: who wanted to may have died before it could."""
        time.sleep(seconds)
        if self._crew is None:
            ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))

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
        ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))


def follow(
    executor: "RayExecutor", name: str, model: Any, work: "Work", left: Callable[[], Sequence[Any]], folder: Folder
) -> Generator[tuple[Any, Any], None, None]:
    """Start the coordinator of this name, or join the one there is, and tell what comes out.

    One that is lost, such as with its machine, is started again with what has not come out. What `left` does not give
    any more, when one is to be started, is in the folder and does not come out.

    Raises:
        MechsteerError: the coordinator is lost again and again, or ended with an error.
    """
    came: set[Any] = set()
    for attempt in range(1, _LOSSES + 1):
        coordinator = None
        try:
            coordinator = _coordinator(name)
            begun, ended = ray.get(coordinator.state.remote())
            if ended:
                # Nobody took what came out: it is in the folder, and what failed is tried again.
                _stop(coordinator, name)
                coordinator, begun = _coordinator(name), False
            if not begun:
                # Asked now: what came last may be newer than the caller's look into the folder.
                items = [item for item in left() if item not in came]
                if not items:
                    return
                how = Parcel.of(model), gpus_of(model), environment_of()
                ray.get(coordinator.start.remote(executor, *how, work, items, folder))
            with closing(_told(coordinator)) as outcomes:
                for item, outcome in outcomes:
                    came.add(item)
                    yield item, outcome
            return
        except RayTaskError as error:
            raise MechsteerError(
                f"The sweep's coordinator on the Ray cluster failed: {reason_of(error.cause)}"
            ) from error
        except RayError as error:
            LOG.info("the coordinator is lost (%s)", reason_of(error))
            if attempt == _LOSSES:
                raise MechsteerError(
                    f"The coordinator of this sweep was lost {attempt} times ({reason_of(error)}). What is finished is "
                    f"in {folder}: the same call goes on."
                ) from error
        finally:  # also after Ctrl-C, and for a consumer that wants no more
            if coordinator is not None:
                with suppress(RayError):
                    _stop(coordinator, name)


def _told(coordinator: Any) -> Generator[tuple[Any, Any], None, None]:
    """What comes out of a coordinator, until all has.

    Raises:
        MechsteerError: it ended with an error.
    """
    seen = told = 0
    ended, error = False, None
    while not ended:
        events, log, ended, error = ray.get(coordinator.events.remote(seen, told))
        for level, line in log:
            LOG.log(level, line)
        seen, told = seen + len(events), told + len(log)
        yield from events
        if not ended:
            time.sleep(_POLL)
    if error is not None:
        raise MechsteerError(error)


def _coordinator(name: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the process that asks, which often is where a cluster stands longest.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(Coordinator)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=4,
            scheduling_strategy=here,
        )
        .remote(name, _UNBEGUN)
    )


def _stop(coordinator: Any, name: str) -> None:
    """Stop a coordinator, and wait until its name is free."""
    ray.kill(coordinator)
    until = time.monotonic() + _GONE
    while time.monotonic() < until:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(_POLL)
