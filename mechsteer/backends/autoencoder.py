"""A sparse autoencoder that knows where it belongs: the noun around SAELens's modules, and how to load one."""

import hashlib
import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer import markup
from mechsteer.backends.sae import read_sae
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError, ModelLoadError
from mechsteer.site import Site, SiteLike

if TYPE_CHECKING:
    from mechsteer.model import Model

# Autoencoders that ship with mechsteer, by the name that `load_sae` takes.
SHIPPED_SAES = ("pocket",)
# What SAELens can be told to do to a model's weights before it trains on its activations.
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
_PROCESSING += ("refactor_factored_attn_matrices",)
# Converters of SAELens that read safetensors or plain arrays; the others unpickle.
_SAFE_CONVERTERS = ("sae_lens", "gemma_2", "gemma_3", "llama_scope", "llama_scope_r1_distill", "sparsify")
# Normalisation that SAELens expects to be folded into the weights before use, and otherwise leaves out silently.
_FOLDED_FIRST = ("expected_average_only_in", "covariance_whitening")


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder at a site: features f(x), and x_hat = s(x) * (f @ decoder) + what does not depend on f.

    s(x) is 1 unless the autoencoder normalises each token, by its norm or standard deviation.

    Attributes:
        name: what it was loaded as.
        site: the hook point whose activations it takes apart. Heads are put end to end.
        processed: whether it was trained on a model with folded or centred weights.
        decoder: rows [feature, d_in]: what one unit of a feature's activation adds to the site.
        encoder: columns [d_in, feature]: what a feature reads.
        hash: of the weights.
        module: SAELens's own.
    """

    name: str
    site: Site
    processed: bool
    decoder: Float[Tensor, "feature d_in"] = field(repr=False)
    encoder: Float[Tensor, "d_in feature"] = field(repr=False)
    hash: str = field(repr=False)
    module: Any = field(repr=False)

    @staticmethod
    def of(module: Any, *, name: str, site: SiteLike | None = None) -> "SparseAutoencoder":
        """Wrap SAELens's module, whose weights stay as they are and get no gradients.

        Args:
            module: a `sae_lens.SAE`.
            name: what it is called in messages and results.
            site: where it is used; None takes the hook point in its config.

        Raises:
            MechsteerError: it was trained for another site, its config names none, its decoder is not affine in the
                features, or it normalises activations in a way that was not folded into its weights.
        """
        cfg = module.cfg
        kind = cfg.architecture()
        if "transcoder" in kind or kind == "temporal":
            what = "reads one site and writes another" if "transcoder" in kind else "reads other tokens too"
            raise MechsteerError(
                f"The autoencoder {name} is of the architecture {kind!r}, which {what}. Pass an SAE that takes the "
                "activations of one token at one site apart."
            )
        if cfg.normalize_activations in _FOLDED_FIRST:
            raise MechsteerError(
                f"The autoencoder {name} was trained on activations scaled with "
                f"normalize_activations={cfg.normalize_activations!r}, and the scale is not folded into its weights. "
                "Fold it (SAELens: fold_activation_norm_scaling_factor, fold_activation_whitening) and save it again."
            )
        module.turn_off_forward_pass_hook_z_reshaping()  # heads are put end to end before it sees them
        module.eval().requires_grad_(False)
        decoder = module.W_dec.detach()
        encoder = module.W_enc.detach()
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            norms = decoder.norm(dim=-1)
            decoder, encoder = decoder / norms[:, None], encoder * norms
        sha = hashlib.sha256(repr(sorted(cfg.to_dict().items(), key=str)).encode())
        for key, tensor in sorted(module.state_dict().items()):
            sha.update(key.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        sae = SparseAutoencoder(
            name, _site(cfg.metadata, site, name), _processed(cfg.metadata), decoder, encoder, sha.hexdigest(), module
        )
        sae._check_affine()
        return sae

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.decoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations, all heads together."""
        return self.decoder.shape[1]

    def _repr_html_(self) -> str:
        weights = "folded or centred weights" if self.processed else "unprocessed weights"
        rows = {
            "site": markup.code(self.site),
            "features": f"{self.n_features:,}, of activations of width {self.d_in}",
            "trained on": weights,
            "architecture": self.module.cfg.architecture(),
            "hash": markup.code(self.hash[:12]),
        }
        return markup.card("SparseAutoencoder", markup.facts(rows), about=self.name)

    def encode(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row feature"]:
        """Activations of all features."""
        return self.module.encode(x)

    def reconstruct(
        self, x: Float[Tensor, "*row d_in"], features: Float[Tensor, "*row feature"]
    ) -> Float[Tensor, "*row d_in"]:
        """The decoder's output for these features of the activations `x`, whose normalisation it undoes."""
        self.module.run_time_activation_norm_fn_in(x)  # keeps what `decode` undoes
        return self.module.decode(features)

    def scale(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row 1"] | float:
        """s(x): what the decoder's output is multiplied by for each token."""
        kind = self.module.cfg.normalize_activations
        if kind == "layer_norm":
            return x.std(dim=-1, keepdim=True)
        if kind == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return 1.0

    def pre_activation(self, x: Float[Tensor, "*row d_in"], feature: int) -> Float[Tensor, "*row"]:
        """What a feature reads before its non-linearity: unlike its activation, it has a gradient everywhere.

        Raises:
            MechsteerError: the architecture has no single pre-activation.
        """
        bias = getattr(self.module, "b_enc", None)
        if bias is None:
            raise MechsteerError(
                f"The autoencoder {self.name} ({self.module.cfg.architecture()}) has no encoder bias, so its features "
                "have no single pre-activation. Use the activation itself, or Projection on the feature's Direction."
            )
        norm = self.module.W_dec[feature].norm() if self._rescales else 1.0
        return self.module.process_sae_in(x) @ self.encoder[:, feature] + bias[feature] * norm

    @property
    def _rescales(self) -> bool:
        return bool(getattr(self.module.cfg, "rescale_acts_by_decoder_norm", False))

    def check_feature(self, feature: int, what: str) -> None:
        """Raise `MechsteerError` unless there is such a feature."""
        if not 0 <= feature < self.n_features:
            raise MechsteerError(
                f"{what} got feature {feature}, but the autoencoder {self.name} has features 0 to "
                f"{self.n_features - 1}. Choose one of these."
            )

    def check_fits(self, model: "Model") -> None:
        """Raise `MechsteerError` unless the model has this site and width, and weights like those that it was trained
        on."""
        if self.processed != model.processed:
            words = {True: "folded or centred weights", False: "unprocessed weights"}
            raise MechsteerError(
                f"The autoencoder {self.name} was trained on {words[self.processed]}, and {model.name} here has "
                f"{words[model.processed]}, so that its activations are others. Use an autoencoder and a model of the "
                "same kind: load_model never processes weights."
            )
        model.check_site(self.site)
        heads = model.size(self.site, "head") if "head" in self.site.axes else 1
        width = model.width(self.site)
        expected = None if width is None or heads is None else width * heads
        if expected is not None and expected != self.d_in:
            raise MechsteerError(
                f"The autoencoder {self.name} takes activations of width {self.d_in} apart, but {self.site!r} of "
                f"{model.name} has {expected}. Use it with the model that it was trained on."
            )

    def _check_affine(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, self.d_in, generator=generator).to(self.decoder)
        features = torch.rand(2, self.n_features, generator=generator).to(self.decoder)
        with torch.no_grad():
            change = self.reconstruct(x, features) - self.reconstruct(x, torch.zeros_like(features))
            expected = self.scale(x) * (features @ self.decoder)
        tolerance = 1e-3 if self.decoder.dtype in (torch.float32, torch.float64) else 0.05
        if not bool((change - expected).norm() <= tolerance * expected.norm()):
            raise MechsteerError(
                f"The decoder of the autoencoder {self.name} ({self.module.cfg.architecture()}) is not affine in its "
                "features, so that one feature cannot be changed with the error term kept. Use another architecture."
            )


def load_sae(
    name_or_path: str | os.PathLike[str],
    sae_id: str | None = None,
    *,
    model: "Model | None" = None,
    site: SiteLike | None = None,
    device: str = "cpu",
) -> SparseAutoencoder:
    """Load a sparse autoencoder with SAELens.

        ms.load_sae("pocket", model=model)
        ms.load_sae("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
        ms.load_sae("./my-sae")

    Args:
        name_or_path: "pocket", which ships with mechsteer; a folder with `cfg.json` and `sae_weights.safetensors`; or,
            with `sae_id`, a release that SAELens lists or a hub repository, which is downloaded unless it is in the
            local cache. Nothing is unpickled.
        sae_id: which autoencoder of a release.
        model: that it will be used with; checked. None means a model as `load_model` gives it, with unprocessed
            weights.
        site: that it will be used at; None takes the one that it was trained on.
        device: a torch device.

    Raises:
        ModelLoadError: there is no such folder or release, it is damaged, or it cannot be downloaded.
        MechsteerError: it was trained for another site, on processed weights, or for another model; or its decoder does
            not allow an error term to be kept.
    """
    if sae_id is not None:
        module, name = _from_hub(str(name_or_path), sae_id, device), f"{name_or_path}/{sae_id}"
    else:
        folder, name = _folder(name_or_path)
        try:
            module = read_sae(folder, device=device)
        except MechsteerError as error:
            raise ModelLoadError(str(error)) from error
        except Exception as error:  # SAELens raises what json, safetensors and dataclasses do
            raise ModelLoadError(f"The autoencoder in {folder} is damaged ({_first_line(error)}).") from error
    sae = SparseAutoencoder.of(module, name=name, site=site)
    if model is not None:
        sae.check_fits(model)
    elif sae.processed:
        raise MechsteerError(
            f"The autoencoder {name} was trained on folded or centred weights, and load_model leaves weights as they "
            "are, so that activations differ. Pass model= with a model whose weights were processed in the same way."
        )
    return sae


def _folder(name_or_path: str | os.PathLike[str]) -> tuple[Path, str]:
    name = os.fspath(name_or_path)
    if name in SHIPPED_SAES:
        return data_path("saes", name), name
    path = Path(name).expanduser()
    if not path.is_dir():
        shipped = ", ".join(map(repr, SHIPPED_SAES))
        raise ModelLoadError(
            f"load_sae got {name!r}, which is no folder. Pass {shipped}, a SAELens folder, or a release with its "
            "sae_id."
        )
    return path, path.resolve().name


def _from_hub(release: str, sae_id: str, device: str) -> Any:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory()
    if release not in listed and "/" not in release:
        nearest = get_close_matches(release, list(listed), n=3, cutoff=0.4)
        hint = f"The nearest are {', '.join(map(repr, nearest))}" if nearest else "None is near it"
        raise ModelLoadError(f"SAELens lists no release {release!r}. {hint}; or pass a folder without sae_id.")
    if release in listed:
        entry = listed[release]
        if sae_id not in entry.saes_map:
            nearest = get_close_matches(sae_id, list(entry.saes_map), n=3, cutoff=0.0)
            raise ModelLoadError(f"{release!r} has no sae_id {sae_id!r}. The nearest are {', '.join(nearest)}.")
        if (entry.conversion_func or "sae_lens") not in _SAFE_CONVERTERS:
            raise ModelLoadError(
                f"The weights of {release!r} are pickles, which mechsteer does not read. Convert them with SAELens "
                "(save_model) and pass the folder."
            )
    try:
        return SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelLoadError(
            f"{release!r} with sae_id {sae_id!r} could not be loaded ({_first_line(error)}). Connect to the network "
            "where it is not in the local Hugging Face cache, or pass a folder."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _site(metadata: Any, site: SiteLike | None, name: str) -> Site:
    trained = None if metadata.hook_name is None else Site.of(metadata.hook_name)
    where = trained if site is None else Site.of(site)
    if where is None:
        raise MechsteerError(f"The config of the autoencoder {name} names no hook point. Pass it as site=.")
    if trained not in (None, where):
        raise MechsteerError(
            f"The autoencoder {name} was trained on {trained}, and is to be used at {where}, where activations are "
            "others. Leave site= out, or load one that was trained there."
        )
    if where != where.point or where.axes[-1] in ("src", "one"):
        raise MechsteerError(
            f"The autoencoder {name} is to be used at {where!r}. Pass a whole hook point that holds vectors."
        )
    return where


def _processed(metadata: Any) -> bool:
    options = metadata.model_from_pretrained_kwargs or {}
    return bool(metadata.weights_processed) or any(bool(options.get(option)) for option in _PROCESSING)
