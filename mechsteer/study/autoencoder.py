"""The sparse autoencoder of a study's model."""

from weakref import WeakKeyDictionary

import torch

from mechsteer.backends.autoencoder import SHIPPED_SAES, SparseAutoencoder, load_sae
from mechsteer.errors import MechsteerError
from mechsteer.features.states import encoded, site_states
from mechsteer.study.case import Case
from mechsteer.study.measures import Estimate, ratio

LEAST_EXPLAINED = 0.5
"""Share of the variance of the site's activations that an autoencoder must reconstruct to be asked."""
_FOUND: WeakKeyDictionary[Case, tuple[SparseAutoencoder, Estimate]] = WeakKeyDictionary()


def autoencoder(case: Case) -> tuple[SparseAutoencoder, Estimate]:
    """The autoencoder that fits the model, and the share of the variance that it explains on held-out requests; looked
    for once for a case.

    Raises:
        MechsteerError: none does.
    """
    if case in _FOUND:
        return _FOUND[case]
    held = case.reference[case.rows("held-out")].padded("right")
    for name in SHIPPED_SAES:
        try:
            sae = load_sae(name, model=case.model, device=case.model.device.type)
        except MechsteerError:
            continue
        # Width and layer may fit by chance: the activations themselves say whose autoencoder it is. BOS is not among
        # what autoencoders are trained on.
        x = site_states(case.model, sae, held)
        inside = held.mask & (held.positions > 0)
        error, spread = (torch.zeros(len(held), dtype=torch.double) for _ in range(2))
        row, x = torch.where(inside)[0].cpu(), x[inside]
        mean = x.double().mean(0)
        for some, features in encoded(sae, x):
            left = (x[some] - sae.reconstruct(x[some], features)).double().square().sum(1)
            error.index_add_(0, row[some], left.cpu())
            spread.index_add_(0, row[some], (x[some].double() - mean).square().sum(1).cpu())
        explained = ratio((spread - error).numpy(), spread.numpy(), seed=case.settings.seed)
        if explained.value >= LEAST_EXPLAINED:
            _FOUND[case] = sae, explained
            return _FOUND[case]
    raise MechsteerError(
        f"No sparse autoencoder that ships with mechsteer belongs to {case.model.name}: there is nothing to take "
        "features from. Ask this of the model 'pocket'."
    )
