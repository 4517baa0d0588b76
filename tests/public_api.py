"""The public names with their signatures, as `public_api.txt` lists them. Run this file to write the list again."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_suffix(".txt")
PACKAGES = (
    "mechsteer",
    "mechsteer.directions",
    "mechsteer.features",
    "mechsteer.interventions",
    "mechsteer.judges",
    "mechsteer.objectives",
    "mechsteer.patching",
    "mechsteer.plan",
    "mechsteer.plots",
    "mechsteer.prefix",
    "mechsteer.propagator",
    "mechsteer.recording",
    "mechsteer.strength",
    "mechsteer.strength.theory",
    "mechsteer.study",
)


def public() -> Iterator[tuple[str, str, Any]]:
    """(package, name, object) of every public name."""
    for package in PACKAGES:
        module = import_module(package)
        for name in sorted(module.__all__):
            yield package, name, getattr(module, name)


def paths() -> set[str]:
    """Full names, where they are public and where they are defined."""
    found = {f"{package}.{name}" for package, name, _ in public()}
    return found | {
        f"{each.__module__}.{each.__qualname__}" for _, _, each in public() if hasattr(each, "__qualname__")
    }


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters; pyright minds the types."""
    given = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def members(cls: type) -> Iterator[str]:
    """Public methods, properties and fields of a class, those of its mechsteer ancestors too."""
    found: dict[str, str] = {}
    for each in reversed([one for one in cls.__mro__ if one.__module__.startswith("mechsteer")]):
        for name in (*getattr(each, "__annotations__", {}), *vars(each)):
            if not name.startswith("_"):
                value = inspect.getattr_static(each, name, None)
                function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                found[name] = name + (signature(function) if inspect.isfunction(function) else "")
    return iter(sorted(found.values()))


def listed() -> str:
    """The list, as text."""
    lines: list[str] = []
    for package, name, each in public():
        if f"[{package}]" not in lines:
            lines += ["", f"[{package}]"] if lines else [f"[{package}]"]
        home = getattr(each, "__module__", package)
        elsewhere = package != "mechsteer" and name in import_module("mechsteer").__all__
        if elsewhere:
            lines.append(f"{name}: as mechsteer.{name}")
        elif inspect.isclass(each):
            lines.append(f"class {name}" + ("" if issubclass(each, Exception) else signature(each)))
            lines += [f"    {member}" for member in members(each)]
        elif inspect.isfunction(each):
            lines.append(name + signature(each))
        else:
            lines.append(f"{name}: {type(each).__name__ if home == package else home}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    LIST.write_text(listed(), encoding="utf-8")
    print(f"{LIST}: {len(list(public()))} public names")
