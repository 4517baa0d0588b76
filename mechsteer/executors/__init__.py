"""Where the batches of a sweep are computed: in this process, or by an executor's workers on other processors.

An executor gets work, which says what to compute with a model, and items of it. Its numbers are those of this process,
item for item, whatever the number of workers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mechsteer.errors import MechsteerError
from mechsteer.executors.base import Executor, Failure, StoredWork, Work, computed
from mechsteer.executors.ray_executor import RayExecutor

__all__ = ["Executor", "Failure", "RayExecutor", "StoredWork", "Work", "computed", "executor_of", "using"]


_CURRENT: ContextVar[Executor | None] = ContextVar("executor", default=None)


@contextmanager
def using(executor: "Executor | str | None") -> Iterator[Executor | None]:
    """Let an executor's workers do the work inside: sweeps, also those that patching, strength curves and the study
    make; completions of many prompts; and the candidates of a prefix search.

        with ms.using("ray"):
            ms.activation_patching(model, clean, corrupt, measure=gap)

    Args:
        executor: an Executor; "ray", for `RayExecutor()`; or None or "local", for this process. Workers that were
            started inside are stopped at the end, unless the executor was yours.

    Raises:
        MechsteerError: there is no executor of this name.
    """
    chosen = _named(executor) if isinstance(executor, str) else executor
    token = _CURRENT.set(chosen)
    try:
        yield chosen
    finally:
        _CURRENT.reset(token)
        if isinstance(executor, str) and isinstance(chosen, RayExecutor):
            chosen.close()


@contextmanager
def executor_of(executor: "Executor | str | None") -> Iterator[Executor | None]:
    """The executor of a function's `executor=`: None is that of the surrounding `using`, or this process."""
    if executor is None:
        yield _CURRENT.get()
        return
    with using(executor) as chosen:
        yield chosen


def _named(name: str) -> Executor | None:
    if name == "local":
        return None
    if name == "ray":
        return RayExecutor()
    raise MechsteerError(f'There is no executor {name!r}. Give "ray", "local", or an executor such as RayExecutor().')
