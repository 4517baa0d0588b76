"""What an executor is, and what it is given."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mechsteer.errors import MechsteerError
from mechsteer.folders import Folder


@runtime_checkable
class Work(Protocol):
    """What workers compute. It is sent to them as it is, so it holds no model."""

    def bind(self, model: Any) -> Callable[[Any], Any]:
        """What computes one item, on a model."""
        ...


@runtime_checkable
class StoredWork(Work, Protocol):
    """Work whose results workers write into a folder."""

    def sink(self, folder: Folder, tag: str) -> Callable[[Sequence[Any]], None]:
        """What writes computed items into a folder, under names that hold `tag`."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why an item was given up."""

    reason: str


@runtime_checkable
class Executor(Protocol):
    """Computes items of work."""

    def run(
        self,
        model: Any,
        work: Work,
        items: Sequence[Any],
        *,
        folder: Folder | None,
        left: Callable[[], Sequence[Any]] | None = None,
    ) -> Generator[tuple[Any, Any], None, None]:
        """Compute items, in any order.

        Args:
            model: the Model to compute with.
            work: what to compute.
            items: of the work: values that can be hashed and compared, each once.
            folder: where workers write what they have computed, as `StoredWork` says; None for nowhere.
            left: which of the items the folder does not hold by now, for an executor whose workers may have gone on
                without this process: what they wrote meanwhile need not come out. None: all of them.

        Yields:
            An item, and what came out; or a Failure, if it failed every time it was tried.

        Raises:
            MechsteerError: nothing can be computed, or nothing written; what is in the folder stays.
        """
        ...


def computed(
    executor: Executor, model: Any, work: Work, items: Sequence[Any], came: Callable[[Any], object] = lambda item: None
) -> Iterator[Any]:
    """What comes out of work whose every item is needed, as it comes.

    Args:
        executor, model, work, items: as for `Executor.run`.
        came: called with each item that came out.

    Raises:
        MechsteerError: an item failed every time; or as `Executor.run`.
    """
    with closing(executor.run(model, work, items, folder=None)) as outcomes:
        for item, outcome in outcomes:
            if isinstance(outcome, Failure):
                raise MechsteerError(f"A worker failed every time it tried: {outcome.reason}")
            came(item)
            yield outcome
