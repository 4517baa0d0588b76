"""Autoencoders are loaded from the package, a folder and the hub, and refused where they do not belong."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autoencoders import HOOK, autoencoder, module
from huggingface_hub.errors import EntryNotFoundError
from plain import assert_close

import mechsteer as ms
from mechsteer.backends.autoencoder import SparseAutoencoder
from mechsteer.errors import MechsteerError, ModelLoadError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module("topk").save_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes entries of `metadata`, or of the config where it has them."""
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        (config if name in config else config["metadata"])[name] = value
    path.write_text(json.dumps(config))


def test_a_folder_is_loaded_with_its_site(folder: Path) -> None:
    sae = ms.load_sae(folder)
    assert (sae.name, sae.site, sae.n_features, sae.d_in, sae.processed) == ("tiny", ms.Site.of(HOOK), 48, 32, False)
    x = torch.randn(7, 32)
    own = module("topk")
    assert_close(sae.encode(x), own.encode(x))
    assert_close(sae.reconstruct(x, sae.encode(x)), own.decode(own.encode(x)))
    assert not any(parameter.requires_grad for parameter in sae.module.parameters())
    assert repr(sae) == f"SparseAutoencoder(name='tiny', site={ms.Site.of(HOOK)!r}, processed=False)"
    assert sae.hash == ms.load_sae(folder).hash != autoencoder("topk", seed=1).hash


def test_the_shipped_one_fits_the_pocket_model() -> None:
    sae = ms.load_sae("pocket")
    assert (sae.site, sae.n_features, sae.d_in) == (ms.Site("resid_post", 3), 1536, 192)
    # Rows with the decoder's scaling in them: what one unit of activation adds.
    one = torch.zeros(1, 1536)
    one[0, 5] = 1.0
    x = torch.zeros(1, 192)
    assert_close(sae.reconstruct(x, one) - sae.reconstruct(x, 0 * one), sae.decoder[5][None])


def test_a_release_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def download(repo_id: str, filename: str, **options: Any) -> str:  # the hub's stand-in
        asked.append((repo_id, filename))
        path = folder / Path(filename).name
        if not path.exists():
            raise EntryNotFoundError(f"no {filename}", SimpleNamespace(headers={}, request=None))
        return str(path)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    sae = ms.load_sae("someone/saes", "layer_1")
    assert {("someone/saes", "layer_1/cfg.json"), ("someone/saes", "layer_1/sae_weights.safetensors")} <= set(asked)
    assert (sae.name, sae.site) == ("someone/saes/layer_1", ms.Site.of(HOOK))
    assert sae.hash == ms.load_sae(folder).hash
    rewrite(folder, weights_processed=True)
    with pytest.raises(MechsteerError, match="someone/saes/layer_1 was trained on folded or centred weights"):
        ms.load_sae("someone/saes", "layer_1")


def test_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    for arguments, message in (
        (
            ("nowhere",),
            "load_sae got 'nowhere', which is no folder. Pass 'pocket', a SAELens folder, or a release with its "
            "sae_id.",
        ),
        (
            (tmp_path,),
            f"{tmp_path} holds no cfg.json and no sae_weights.safetensors: expected a SAELens folder with both",
        ),
        (
            ("gemma-scope-2b-pt-rse", "x"),
            "SAELens lists no release 'gemma-scope-2b-pt-rse'. The nearest are 'gemma-scope-2b-pt-res'",
        ),
        (("gemma-scope-2b-pt-res", "layer_99"), "'gemma-scope-2b-pt-res' has no sae_id 'layer_99'. The nearest are "),
        (
            ("gpt2-small-hook-z-kk", "blocks.0.hook_z"),
            "The weights of 'gpt2-small-hook-z-kk' are pickles, which mechsteer does not read.",
        ),
        (("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"), "could not be loaded ("),
    ):
        with pytest.raises(ModelLoadError) as error:
            ms.load_sae(*arguments)
        assert message in str(error.value)


def test_a_damaged_folder_is_one_line(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelLoadError, match=r"^The autoencoder in .*tiny is damaged \(.*\)\.$"):
        ms.load_sae(folder)


@pytest.mark.parametrize("said", [{"weights_processed": True}, {"model_from_pretrained_kwargs": {"fold_ln": True}}])
def test_one_trained_on_processed_weights_is_refused(folder: Path, zoo_models: Any, said: dict[str, Any]) -> None:
    rewrite(folder, **said)
    with pytest.raises(MechsteerError, match="tiny was trained on folded or centred weights, and load_model leaves"):
        ms.load_sae(folder)
    with pytest.raises(
        MechsteerError, match="was trained on folded or centred weights, and llama here has unprocessed"
    ):
        ms.load_sae(folder, model=zoo_models("llama"))


def test_one_for_unprocessed_weights_is_refused_on_processed_ones(folder: Path, zoo_folders: dict[str, Path]) -> None:
    hooked = ms.load_model(zoo_folders["gpt2"]).hooked
    hooked.process_weights_(fold_ln=False, center_writing_weights=True)
    processed = ms.Model(hooked, name="gpt2")
    assert processed.processed
    with pytest.raises(MechsteerError, match="was trained on unprocessed weights, and gpt2 here has folded or centred"):
        ms.load_sae(folder, model=processed)
    with pytest.raises(MechsteerError, match="was trained on unprocessed weights, and gpt2 here has folded or centred"):
        processed.run(torch.tensor([[5, 6]]), [ms.SetFeature(ms.load_sae(folder), 1, 1.0)])
    with pytest.raises(MechsteerError, match="FeatureActivation reads the autoencoder tiny, and gpt2 has weights"):
        run = processed.run(torch.tensor([[5, 6]]), record=[HOOK])
        ms.FeatureActivation(ms.load_sae(folder), 1)(run)
    # The other way round it fits.
    rewrite(folder, weights_processed=True)
    assert ms.load_sae(folder, model=processed).processed


def test_another_site_is_refused(folder: Path, zoo_models: Any) -> None:
    with pytest.raises(MechsteerError) as error:
        ms.load_sae(folder, site=("resid_post", 2))
    assert str(error.value) == (
        "The autoencoder tiny was trained on blocks.1.hook_resid_post, and is to be used at blocks.2.hook_resid_post, "
        "where activations are others. Leave site= out, or load one that was trained there."
    )
    assert ms.load_sae(folder, site=HOOK).site == ms.Site.of(HOOK)
    rewrite(folder, hook_name=None)
    with pytest.raises(
        MechsteerError, match=r"The config of the autoencoder tiny names no hook point. Pass it as site="
    ):
        ms.load_sae(folder)
    assert ms.load_sae(folder, site=("resid_pre", 0)).site == ms.Site("resid_pre", 0)
    with pytest.raises(MechsteerError, match=r"is to be used at .* Pass a whole hook point that holds vectors"):
        ms.load_sae(folder, site=("pattern", 0))
    rewrite(folder, hook_name="blocks.9.hook_resid_post")
    with pytest.raises(MechsteerError, match="llama has layers 0 to 2"):
        ms.load_sae(folder, model=zoo_models("llama"))


def test_a_model_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(MechsteerError, match=r"tiny takes activations of width 32 apart, but .* of pocket has 192"):
        ms.load_sae(folder, model=ms.load_model("pocket"))


def test_scales_that_were_not_folded_are_refused(folder: Path) -> None:
    rewrite(folder, normalize_activations="expected_average_only_in")
    with pytest.raises(MechsteerError, match=r"the scale is not folded into its weights. Fold it"):
        ms.load_sae(folder)


def test_a_decoder_that_is_not_affine_is_refused() -> None:
    raw = module("standard")
    plain = raw.decode
    raw.decode = lambda features: plain(features.square())
    with pytest.raises(MechsteerError, match=r"tiny \(standard\) is not affine in its features"):
        SparseAutoencoder.of(raw, name="tiny")
    from sae_lens import Transcoder, TranscoderConfig

    with pytest.raises(
        MechsteerError, match="of the architecture 'transcoder', which reads one site and writes another"
    ):
        SparseAutoencoder.of(
            Transcoder(TranscoderConfig(d_in=32, d_sae=48, d_out=32, apply_b_dec_to_input=False)), name="tiny"
        )


def test_a_sweep_on_disk_knows_autoencoders_apart(tmp_path: Path, zoo_models: Any) -> None:
    model, prompts = zoo_models("llama"), torch.tensor([[5, 6, 7]])

    def swept(sae: SparseAutoencoder) -> ms.Result:
        return ms.sweep(
            model, prompts, axes={"feature": [1, 2]}, build=lambda feature: ms.SetFeature(sae, feature, 2.0),
            measure=ms.LogitGap(5, 9), out=tmp_path / "sweep",
        )  # fmt: skip

    first = swept(autoencoder("topk"))
    assert (swept(autoencoder("topk"))["logit_gap"] == first["logit_gap"]).all()
    with pytest.raises(MechsteerError, match="holds another sweep"):
        swept(autoencoder("topk", seed=1))
