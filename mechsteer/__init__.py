"""mechsteer: what it takes to move a language model's behaviour, measured on TransformerLens hook points."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechsteer.errors import MechsteerError, ModelLoadError
    from mechsteer.model import Model, load_model

__version__ = version("mechsteer")
__all__ = ["MechsteerError", "Model", "ModelLoadError", "load_model"]

# Names are imported when first used: `import mechsteer` and `mechsteer --help` need neither torch nor TransformerLens.
_HOMES = {
    "MechsteerError": "mechsteer.errors",
    "Model": "mechsteer.model",
    "ModelLoadError": "mechsteer.errors",
    "load_model": "mechsteer.model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechsteer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
