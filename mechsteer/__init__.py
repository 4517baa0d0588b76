"""mechsteer: what it takes to move a language model's behaviour, measured on TransformerLens hook points."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechsteer.activations import Activations, ModelId
    from mechsteer.directions import Direction
    from mechsteer.errors import MechsteerError, ModelLoadError
    from mechsteer.interventions import Ablate, Add, Intervention, Replace, Scale, SoftPrefix, fwd_hooks
    from mechsteer.model import Model, load_model
    from mechsteer.objectives import (
        KLFromBaseline,
        LogitGap,
        Objective,
        Projection,
        StateMatch,
        TeacherForcedCE,
        TokenProb,
    )
    from mechsteer.prompts import Prompts
    from mechsteer.result import Result
    from mechsteer.run import Run
    from mechsteer.site import Site
    from mechsteer.sweeps import sweep

__version__ = version("mechsteer")

# Names are imported when first used: `import mechsteer` and `mechsteer --help` need neither torch nor TransformerLens.
_HOMES = {
    "Ablate": "mechsteer.interventions",
    "Activations": "mechsteer.activations",
    "Add": "mechsteer.interventions",
    "Direction": "mechsteer.directions",
    "Intervention": "mechsteer.interventions",
    "KLFromBaseline": "mechsteer.objectives",
    "LogitGap": "mechsteer.objectives",
    "MechsteerError": "mechsteer.errors",
    "Model": "mechsteer.model",
    "ModelId": "mechsteer.activations",
    "ModelLoadError": "mechsteer.errors",
    "Objective": "mechsteer.objectives",
    "Projection": "mechsteer.objectives",
    "Prompts": "mechsteer.prompts",
    "Replace": "mechsteer.interventions",
    "Result": "mechsteer.result",
    "Run": "mechsteer.run",
    "Scale": "mechsteer.interventions",
    "Site": "mechsteer.site",
    "SoftPrefix": "mechsteer.interventions",
    "StateMatch": "mechsteer.objectives",
    "TeacherForcedCE": "mechsteer.objectives",
    "TokenProb": "mechsteer.objectives",
    "fwd_hooks": "mechsteer.interventions",
    "load_model": "mechsteer.model",
    "sweep": "mechsteer.sweeps",
}
__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Direction",
    "Intervention",
    "KLFromBaseline",
    "LogitGap",
    "MechsteerError",
    "Model",
    "ModelId",
    "ModelLoadError",
    "Objective",
    "Projection",
    "Prompts",
    "Replace",
    "Result",
    "Run",
    "Scale",
    "Site",
    "SoftPrefix",
    "StateMatch",
    "TeacherForcedCE",
    "TokenProb",
    "fwd_hooks",
    "load_model",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechsteer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
