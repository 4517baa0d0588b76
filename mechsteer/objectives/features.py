"""The objective that reads an SAE feature."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError
from mechsteer.objectives.base import Objective, assign, one_of, token_mean, tokens_at
from mechsteer.precision import precise
from mechsteer.prompts import ROLES
from mechsteer.run import Run
from mechsteer.site import Site


@dataclass(frozen=True, eq=False, repr=False, init=False)
class FeatureActivation(Objective):
    """Activation of an SAE feature, as the mean over tokens: mean_t f_i(x_t); higher is more active.

    An activation that is 0 has no gradient, and a TopK autoencoder's is 0 on almost all tokens. To raise a feature from
    nothing take its pre-activation, what it reads before the non-linearity, with `pre`: "Steering Prefix Generation",
    section 4.1, raises such a dot product.

    Args:
        sae: from `load_sae`.
        feature: its number.
        at: at which tokens; as for `StateMatch`.
        pre: the pre-activation instead.

    Raises:
        MechsteerError: no such feature or `at`, or `pre` of an architecture without one. When called: activations of
            another width, or of a model with other processing of weights; or a prompt without such a token.
    """

    sae: SparseAutoencoder
    feature: int
    at: int | str
    pre: bool

    def __init__(self, sae: SparseAutoencoder, feature: int, *, at: int | str | None = None, pre: bool = False) -> None:
        sae.check_feature(feature, "FeatureActivation")
        at = "decision" if at is None else at
        if isinstance(at, str):
            one_of("FeatureActivation(at=)", at, ("decision", "last", "all", *ROLES))
        if pre:
            sae.pre_activation(sae.decoder[:1], feature)  # raises where there is none
        label = f"feature_{feature}_pre" if pre else f"feature_{feature}"
        assign(self, sae=sae, feature=feature, at=at, pre=pre, label=label)

    def sites(self) -> tuple[Site, ...]:
        """The autoencoder's hook point."""
        return (self.sae.site,)

    def __call__(self, run: Run) -> Float[Tensor, " batch"]:
        if run.activations.model.processed != self.sae.processed:
            raise MechsteerError(
                f"FeatureActivation reads the autoencoder {self.sae.name}, and {run.activations.model.name} has "
                "weights that were processed otherwise than those it was trained on. Use load_model, which leaves them "
                "alone."
            )
        mask = tokens_at(run.prompts, self.at)
        x = precise(run.activations[self.sae.site][mask].flatten(1))
        if x.shape[-1] != self.sae.d_in:
            raise MechsteerError(
                f"FeatureActivation reads {self.sae.name}, which takes width {self.sae.d_in}, but {self.sae.site!r} "
                f"has {x.shape[-1]}. Use the autoencoder with the model that it was trained on."
            )
        values = self.sae.pre_activation(x, self.feature) if self.pre else self.sae.encode(x)[:, self.feature]
        return token_mean(values.to(x), mask, mask.to(x.dtype), f"at {self.at!r}")

    def __repr__(self) -> str:
        pre = ", pre=True" if self.pre else ""
        return f"FeatureActivation({self.sae.name!r}, {self.feature}, at={self.at!r}{pre})"
