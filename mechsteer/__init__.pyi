"""The public names and where they live; read by type checkers, by editors, and when one is first used."""

from .activations import Activations as Activations
from .activations import ModelId as ModelId
from .backends.autoencoder import SparseAutoencoder as SparseAutoencoder
from .backends.autoencoder import load_sae as load_sae
from .directions import Direction as Direction
from .directions import cosine_table as cosine_table
from .directions import difference_of_means as difference_of_means
from .directions import export_gguf as export_gguf
from .directions import from_unembedding as from_unembedding
from .directions import import_gguf as import_gguf
from .directions import pca as pca
from .errors import MechsteerError as MechsteerError
from .errors import ModelLoadError as ModelLoadError
from .executors import RayExecutor as RayExecutor
from .executors import using as using
from .hooks import Intervention as Intervention
from .hooks import fwd_hooks as fwd_hooks
from .interventions import Ablate as Ablate
from .interventions import Add as Add
from .interventions import Replace as Replace
from .interventions import Scale as Scale
from .interventions import SetFeature as SetFeature
from .interventions import SoftPrefix as SoftPrefix
from .model import Model as Model
from .model import load_model as load_model
from .objectives import FeatureActivation as FeatureActivation
from .objectives import KLFromBaseline as KLFromBaseline
from .objectives import LogitGap as LogitGap
from .objectives import Objective as Objective
from .objectives import Projection as Projection
from .objectives import StateMatch as StateMatch
from .objectives import TeacherForcedCE as TeacherForcedCE
from .objectives import TokenProb as TokenProb
from .patching import activation_patching as activation_patching
from .patching import attribution_patching as attribution_patching
from .patching import path_patching as path_patching
from .prompts import Prompts as Prompts
from .propagator import Propagator as Propagator
from .recording import Recording as Recording
from .recording import record_stream as record_stream
from .result import Result as Result
from .run import Run as Run
from .site import Site as Site
from .sweeps import sweep as sweep

__version__: str
