"""Workers on a Ray cluster: each holds the model once and computes many items.

Ray is an optional dependency (`pip install 'mechsteer[ray]'`), imported when a RayExecutor is first run.
"""

import hashlib
import os
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mechsteer.errors import MechsteerError
from mechsteer.folders import MANIFEST, Folder

if TYPE_CHECKING:
    from mechsteer.executors.base import Work
    from mechsteer.executors.crew import Crew

NAMESPACE = "mechsteer"
_STARTS = 3
# Seconds in which a machine of the cluster takes up a connection.
_PATIENCE = 10.0


@dataclass(eq=False)
class RayExecutor:
    """Computes on a Ray cluster: the one of `address` or of the variable RAY_ADDRESS, or one on this machine.

        result = ms.sweep(..., out="s3://bucket/run", executor=ms.RayExecutor(workers=16, gpus=0.5))

    A worker is an actor that holds the model once: its weights come through Ray's object store, where workers of one
    machine share them while they are on the CPU. Items are handed out as workers ask for them. A worker or machine that
    is lost is replaced, and what it had begun is computed again; an item that fails `attempts` times is reported at the
    end. On a cluster that was there before, a sweep with `out=` goes on when this process dies or is killed, and the
    same call joins it again; Ctrl-C stops it. What is finished is in `out`, in either case.

    Results are those of `sweep(..., rows=...)` in this process bit for bit, if that has as many threads
    (`torch.set_num_threads`) as a worker, which has as many as `cpus`.

    Attributes:
        workers: how many; None takes as many as the cluster has room for.
        cpus: processors of each.
        gpus: that each takes, or the share of one, such as 0.5; None takes as many as the model is on.
        address: of the cluster, such as "auto" or "10.0.0.1:6379"; None as said above.
        attempts: how often an item is tried.
    """

    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None
    address: str | None = None
    attempts: int = 3
    _crew: "tuple[tuple[str, int], Crew] | None" = field(default=None, init=False, repr=False)
    _started: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.cpus <= 0 or self.attempts < 1:
            raise MechsteerError(
                f"RayExecutor got workers={self.workers}, cpus={self.cpus}, attempts={self.attempts}: give at least 1 "
                "worker and 1 attempt, and more than 0 cpus."
            )
        if self.gpus is not None and (self.gpus < 0 or (self.gpus > 1 and self.gpus % 1)):
            raise MechsteerError(
                f"RayExecutor got gpus={self.gpus}: give a share of a GPU, such as 0.5, or a whole number of them."
            )

    def run(
        self,
        model: Any,
        work: "Work",
        items: Sequence[Any],
        *,
        folder: Folder | None,
        left: Callable[[], Sequence[Any]] | None = None,
    ) -> Generator[tuple[Any, Any], None, None]:
        """See `mechsteer.executors.Executor.run`.

        Raises:
            MechsteerError: Ray is not installed, no cluster answers, no worker can start, or results cannot be written.
        """
        if not items:
            return
        self.connect()
        if folder is not None and not self._started:
            yield from self._joined(model, work, left or (lambda: items), folder)
            return
        crew = self._crew_for(model)
        yield from crew.run(work, items, folder)

    def connect(self) -> None:
        """Join the cluster, or start one on this machine.

        Raises:
            MechsteerError: Ray is not installed, or no cluster answers at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise MechsteerError("Ray is not installed: pip install 'mechsteer[ray]'.") from error
        from mechsteer.executors.transport import share_tensors

        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            options: dict[str, Any] = {"address": address, "namespace": NAMESPACE, "logging_level": "warning"}
            # What happens to workers is in the log; their output would mix with the results of a command.
            options["log_to_driver"] = False
            if address == "local":
                options["include_dashboard"] = False
            _check_answers(address)
            for attempt in range(_STARTS):
                try:
                    ray.init(**options)
                    break
                except Exception as error:  # of many types, a plain Exception among them
                    ray.shutdown()
                    # A busy machine may not start a cluster within the time that Ray gives it.
                    if address == "local" and attempt + 1 < _STARTS:
                        continue
                    reason = " ".join(str(error).split())
                    raise MechsteerError(f"No Ray cluster answers at {address} ({reason}).") from error
            self._started = address == "local"
        share_tensors()

    def close(self) -> None:
        """Stop the workers, and the cluster if this executor started it."""
        self._dismiss()
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _dismiss(self) -> None:
        if self._crew is not None:
            self._crew[1].close()
            self._crew = None

    def _crew_for(self, model: Any) -> "Crew":
        """The workers that hold this model: those of before, or new ones."""
        from mechsteer.executors.crew import Crew
        from mechsteer.executors.transport import gpus_of

        key = model.id.hash, gpus_of(model)
        if self._crew is not None and self._crew[0] != key:
            self._dismiss()
        if self._crew is None:
            self._crew = key, Crew.of(self, model)
        return self._crew[1]

    def _joined(
        self, model: Any, work: "Work", left: Callable[[], Sequence[Any]], folder: Folder
    ) -> Generator[tuple[Any, Any], None, None]:
        """Through a coordinator that outlives this process; the folder, and what is in it, tell which."""
        from mechsteer.executors.coordinator import follow

        self._dismiss()  # the coordinator's workers take the room of those of this process
        about = "\n".join(
            [str(folder.local or folder.url), *(folder.read_text(name) for name in folder.names() if name == MANIFEST)]
        )
        name = hashlib.sha256(about.encode()).hexdigest()[:24]
        yield from follow(self, f"mechsteer-{name}", model, work, left, folder)


def _check_answers(address: str) -> None:
    """Raise `MechsteerError` where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise MechsteerError(f"No Ray cluster answers at {address} ({error}).") from error
