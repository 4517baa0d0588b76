"""What jaxtyping's import hook does, in less time.

The hook checks every function as one whose annotations name axes: with two compiled checkers, and by binding the
arguments of each call. A function that names no axes needs beartype alone, which finds the same mistakes.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ForwardRef, get_args

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped  # type: ignore[attr-defined]


def names_axes(annotation: Any) -> bool:
    """Whether an annotation holds one such as `Float[Tensor, "batch pos"]`.

    True of text, which jaxtyping reads in its own way: it checks nothing where only a type checker imports the name.
    """
    if isinstance(annotation, str | ForwardRef):
        return True
    if isinstance(annotation, list):  # the arguments of a Callable
        return any(map(names_axes, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(names_axes, get_args(annotation)))


def jaxtyped(fn: Any = None, *, typechecker: Callable[..., Any] | None) -> Any:
    """A function whose arguments and result are checked. Takes the place of jaxtyping's own."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if dataclasses.is_dataclass(fn) and "__init__" in vars(fn) and inspect.isfunction(fn.__init__):
        if typechecker is not None and not any(names_axes(field.type) for field in dataclasses.fields(fn)):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)  # type: ignore[misc]
            return fn
        return _jaxtyped(fn, typechecker=typechecker)
    if typechecker is None or not inspect.isfunction(fn) or any(map(names_axes, fn.__annotations__.values())):
        return _jaxtyped(fn, typechecker=typechecker)
    typed = typechecker(fn)

    @wraps(fn)
    def checked(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        return (fn if jaxtyping.config.jaxtyping_disable else typed)(*args, **options)

    return checked


def install() -> None:
    """Have every function of mechsteer checked. Before anything imports mechsteer."""
    jaxtyping.install_import_hook("mechsteer", "beartype.beartype")
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[attr-defined]  # the hook looks it up here
