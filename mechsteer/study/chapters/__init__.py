"""The chapters of a study, one module each, which holds a `CHAPTER`."""

from collections.abc import Iterable
from importlib import import_module

from mechsteer.errors import MechsteerError
from mechsteer.study.chapter import Chapter

NAMES = ("behaviour", "entry", "travel", "vector", "strength", "features", "words", "together")
"""In the order of the report, which is also the order of reading."""


def chapters(names: Iterable[str] | None = None) -> list[Chapter]:
    """The chapters of these names, in the report's order, each once; None for all.

    Raises:
        MechsteerError: there are no names, or there is no chapter of one.
    """
    asked = list(NAMES if names is None else names)
    unknown = next((name for name in asked if name not in NAMES), None)
    if unknown is not None or not asked:
        got = "no names" if unknown is None else repr(unknown)
        raise MechsteerError(f"chapters got {got}. Choose from {', '.join(NAMES)}.")
    return [import_module(f"{__name__}.{name}").CHAPTER for name in NAMES if name in asked]
