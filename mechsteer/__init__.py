"""mechsteer: what it takes to move a language model's behaviour, measured on TransformerLens hook points."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechsteer.activations import Activations, ModelId
    from mechsteer.backends.autoencoder import SparseAutoencoder, load_sae
    from mechsteer.directions import (
        Direction,
        cosine_table,
        difference_of_means,
        export_gguf,
        from_unembedding,
        import_gguf,
        pca,
    )
    from mechsteer.errors import MechsteerError, ModelLoadError
    from mechsteer.hooks import Intervention, fwd_hooks
    from mechsteer.interventions import Ablate, Add, Replace, Scale, SetFeature, SoftPrefix
    from mechsteer.model import Model, load_model
    from mechsteer.objectives import (
        FeatureActivation,
        KLFromBaseline,
        LogitGap,
        Objective,
        Projection,
        StateMatch,
        TeacherForcedCE,
        TokenProb,
    )
    from mechsteer.patching import activation_patching, attribution_patching, path_patching
    from mechsteer.prompts import Prompts
    from mechsteer.propagator import Propagator
    from mechsteer.recording import Recording, record_stream
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
    "FeatureActivation": "mechsteer.objectives",
    "Intervention": "mechsteer.hooks",
    "KLFromBaseline": "mechsteer.objectives",
    "LogitGap": "mechsteer.objectives",
    "MechsteerError": "mechsteer.errors",
    "Model": "mechsteer.model",
    "ModelId": "mechsteer.activations",
    "ModelLoadError": "mechsteer.errors",
    "Objective": "mechsteer.objectives",
    "Projection": "mechsteer.objectives",
    "Prompts": "mechsteer.prompts",
    "Propagator": "mechsteer.propagator",
    "Recording": "mechsteer.recording",
    "Replace": "mechsteer.interventions",
    "Result": "mechsteer.result",
    "Run": "mechsteer.run",
    "Scale": "mechsteer.interventions",
    "SetFeature": "mechsteer.interventions",
    "Site": "mechsteer.site",
    "SoftPrefix": "mechsteer.interventions",
    "SparseAutoencoder": "mechsteer.backends.autoencoder",
    "StateMatch": "mechsteer.objectives",
    "TeacherForcedCE": "mechsteer.objectives",
    "TokenProb": "mechsteer.objectives",
    "activation_patching": "mechsteer.patching",
    "attribution_patching": "mechsteer.patching",
    "cosine_table": "mechsteer.directions",
    "difference_of_means": "mechsteer.directions",
    "export_gguf": "mechsteer.directions",
    "from_unembedding": "mechsteer.directions",
    "fwd_hooks": "mechsteer.hooks",
    "import_gguf": "mechsteer.directions",
    "load_model": "mechsteer.model",
    "load_sae": "mechsteer.backends.autoencoder",
    "path_patching": "mechsteer.patching",
    "pca": "mechsteer.directions",
    "record_stream": "mechsteer.recording",
    "sweep": "mechsteer.sweeps",
}
__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Direction",
    "FeatureActivation",
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
    "Propagator",
    "Recording",
    "Replace",
    "Result",
    "Run",
    "Scale",
    "SetFeature",
    "Site",
    "SoftPrefix",
    "SparseAutoencoder",
    "StateMatch",
    "TeacherForcedCE",
    "TokenProb",
    "activation_patching",
    "attribution_patching",
    "cosine_table",
    "difference_of_means",
    "export_gguf",
    "from_unembedding",
    "fwd_hooks",
    "import_gguf",
    "load_model",
    "load_sae",
    "path_patching",
    "pca",
    "record_stream",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechsteer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
