"""An SAE feature as a Direction, for every other chapter."""

from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives.base import one_of


def feature_direction(
    sae: SparseAutoencoder, feature: int, *, model: Model | None = None, side: str = "decoder"
) -> Direction:
    """What a feature writes, or what it reads, as a vector at the autoencoder's site.

        cats = feature_direction(sae, 766, model=model)
        model.generate(prompts, interventions=[ms.Add(cats, 60.0)])       # as SetFeature(sae, 766, 60.0, mode="add")

    Args:
        sae: from `load_sae`.
        feature: its number.
        model: that the direction is to belong to; checked.
        side: "decoder", the row that one unit of activation adds to the site; or "encoder", the column that a feature
            reads, which is the gradient of its pre-activation.

    Raises:
        MechsteerError: no such feature or side; the autoencoder does not fit the model; or its site has several heads.
    """
    one_of("feature_direction(side=)", side, ("decoder", "encoder"))
    sae.check_feature(feature, "feature_direction")
    if model is not None:
        sae.check_fits(model)
    if "head" in sae.site.axes:
        raise MechsteerError(
            f"The autoencoder {sae.name} is at {sae.site}, whose heads it takes together, so that a feature is no "
            "vector of one head. Use SetFeature instead of a Direction."
        )
    vector = sae.decoder[feature] if side == "decoder" else sae.encoder[:, feature]
    origin = {"method": f"sae {side}", "sae": sae.name, "sae_hash": sae.hash, "feature": feature}
    return Direction(vector.clone(), sae.site, None if model is None else model.id, origin)
