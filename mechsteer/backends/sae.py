"""Sparse autoencoders through SAELens: training on a stream of activations, loading, and measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    from sae_lens import SAE, TopKTrainingSAE

    TrainingSAE = TopKTrainingSAE
else:
    # Naming the real classes here would import SAELens, which takes seconds.
    SAE = Any
    TrainingSAE = Any


def new_topk_sae(
    *, d_in: int, d_sae: int, k: int, seed: int, metadata: dict[str, Any], device: str = "cpu"
) -> TrainingSAE:
    """An untrained TopK autoencoder (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        k: features active on a token.
        seed: of the initial weights; the global random state is left as it was.
        metadata: what to record with the weights (model name, hook name, ...).
        device: a torch device.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            # Dense products are faster than sparse ones at small widths.
            use_sparse_activations=False,
            normalize_activations="expected_average_only_in",
            device=device,
            metadata=SAEMetadata(**metadata),
        )
        return TopKTrainingSAE(config)


def sae_loss(
    sae: TrainingSAE, scaled: Float[Tensor, "token d_in"], *, dead: Bool[Tensor, " feature"], step: int
) -> tuple[Float[Tensor, ""], Bool[Tensor, " feature"]]:
    """The training loss on a batch of activations, and which features were active on it.

    Args:
        sae: from `new_topk_sae`.
        scaled: activations times the factor that `save_sae` takes.
        dead: features that the auxiliary loss is to revive.
        step: number of steps so far.
    """
    from sae_lens.saes.sae import TrainStepInput

    output = sae.training_forward_pass(
        TrainStepInput(sae_in=scaled, coefficients={}, dead_neuron_mask=dead, n_training_steps=step,
                       is_logging_step=False)
    )  # fmt: skip
    return output.loss, (output.feature_acts > 0).any(0)


def save_sae(sae: TrainingSAE, folder: Path, *, scale: float) -> None:
    """Folds the factor that activations were multiplied with into the weights, and writes `cfg.json` and
    `sae_weights.safetensors`."""
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(folder)


def read_sae(folder: Path, *, device: str = "cpu") -> SAE:
    """An autoencoder from a SAELens folder.

    Raises:
        MechsteerError: the folder lacks `cfg.json` or `sae_weights.safetensors`.
    """
    missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not (folder / name).is_file()]
    if missing:
        raise MechsteerError(f"{folder} holds no {' and no '.join(missing)}: expected a SAELens folder with both")
    from sae_lens import SAE

    return SAE.load_from_disk(folder, device=device)


@dataclass(frozen=True)
class Reconstruction:
    """How well an autoencoder stands for activations it was not trained on."""

    variance_explained: float
    """1 - sum |x - x_hat|^2 / sum |x - mean x|^2, over tokens and dimensions."""
    l0: float
    """Mean number of active features a token."""
    dead: float
    """Share of the features that are active on none of the tokens."""
    tokens: int


@torch.inference_mode()
def reconstruction(sae: SAE, activations: Sequence[Float[Tensor, "_ d_in"]]) -> Reconstruction:
    """Measures an autoencoder on batches of activations (of any lengths); sums are kept in fp64."""
    mean = torch.cat(list(activations)).double().mean(0)
    residual = total = active = 0.0
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    count = 0
    for part in activations:
        features = sae.encode(part)
        residual += float((part - sae.decode(features)).double().square().sum())
        total += float((part.double() - mean).square().sum())
        active += float((features > 0).sum())
        fired |= (features > 0).any(0)
        count += len(part)
    return Reconstruction(1 - residual / total, active / count, 1 - float(fired.float().mean()), count)


def auroc(scores: Float[Tensor, "example feature"], positive: Float[Tensor, " example"]) -> Float[Tensor, " feature"]:
    """Area under the ROC curve of each feature's score for the positive examples: the probability that a positive
    example scores above a negative one, ties counted half (Mann-Whitney U)."""
    ordered, order = scores.double().sort(dim=0)
    ranks = torch.empty_like(ordered)
    rising = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    for feature in range(scores.shape[1]):
        # Equal scores share the mean of their ranks.
        _, group, sizes = ordered[:, feature].unique_consecutive(return_inverse=True, return_counts=True)
        mean_rank = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group, rising) / sizes
        ranks[order[:, feature], feature] = mean_rank[group]
    count = float(positive.sum())
    above = (ranks * positive.double()[:, None]).sum(0) - count * (count + 1) / 2
    return above / (count * (len(scores) - count))
