"""Loaded models compute what transformers computes on the same folder, under HookedTransformer's hook names."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from mechsteer import backends as mechsteer_backends
from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError, ModelLoadError
from mechsteer.interventions import Add
from mechsteer.model import Model, load_model
from mechsteer.site import Site

BACKENDS = ("hooked_transformer", "bridge")
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

backends = pytest.mark.parametrize("backend", BACKENDS)


@torch.no_grad()
def assert_same_logits(model: Model, folder: Path) -> None:
    tokens = zoo.prompts(batch=2, n_pos=40, d_vocab=model.d_vocab)
    expected = zoo.reference_logits(folder, tokens)
    assert expected.std() > 0.5, "logits this flat would hide a wrong setting"
    torch.testing.assert_close(model.hooked(tokens), expected, atol=1e-4, rtol=0)


@backends
def test_logits_equal_transformers(zoo_folder: Path, backend: str) -> None:
    model = load_model(zoo_folder, backend=backend)
    assert_same_logits(model, zoo_folder)
    assert (model.backend, model.processed) == (backend, False)
    assert (model.n_layers, model.d_model, model.d_vocab) == (zoo.N_LAYERS, zoo.D_MODEL, zoo.D_VOCAB)
    assert model.n_ctx == zoo.N_CTX
    assert (model.device.type, model.dtype) == ("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


@backends
@pytest.mark.parametrize("architecture", zoo.PARTLY_ROTARY)
def test_logits_equal_transformers_where_heads_are_rotated_in_part(
    architecture: str, backend: str, zoo_folders: dict[str, Path]
) -> None:
    assert_same_logits(load_model(zoo_folders[architecture], backend=backend), zoo_folders[architecture])


@backends
@pytest.mark.skipif(not STORIES.is_dir(), reason="the trained model is not beside this checkout")
def test_logits_equal_transformers_on_a_trained_model(backend: str) -> None:
    assert_same_logits(load_model(STORIES, backend=backend), STORIES)


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"num_key_value_heads": zoo.N_HEADS}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_parameters": LINEAR_ROPE}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"num_key_value_heads": zoo.N_HEADS}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma3", {"final_logit_softcapping": 3.0}),
        ("gemma", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": zoo.WINDOW, "max_window_layers": 1}),
        ("qwen3", {"num_key_value_heads": zoo.N_HEADS, "tie_word_embeddings": False}),
    ],
)
def test_settings_of_the_config_are_honoured(architecture: str, overrides: dict, tmp_path: Path) -> None:
    folder = zoo.write_folder(architecture, tmp_path / "model", **overrides)
    assert_same_logits(load_model(folder), folder)


@pytest.mark.parametrize(
    ("architecture", "overrides", "lacks"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"rope_parameters": {**LINEAR_ROPE, "rope_type": "dynamic"}}, "rope_type='dynamic'"),
        ("mistral", {"rope_parameters": LINEAR_ROPE}, "rope_type='linear' in layers with a sliding window"),
    ],
)
def test_what_hooked_transformer_lacks_is_named_and_the_bridge_has_it(
    architecture: str, overrides: dict, lacks: str, tmp_path: Path
) -> None:
    folder = zoo.write_folder(architecture, tmp_path / "model", **overrides)
    with pytest.raises(ModelLoadError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.startswith(f"HookedTransformer of TransformerLens lacks {lacks}")
    assert message.endswith("Try backend='bridge', which runs transformers' own code.")
    assert_same_logits(load_model(folder, backend="bridge"), folder)


@backends
def test_words_in_the_path_do_not_choose_the_architecture(
    backend: str, zoo_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(zoo_folders["gpt2"], tmp_path / "not-a-llama-nor-gemma-2-2b")
    assert_same_logits(load_model(str(folder), backend=backend), folder)


def test_language_model_of_a_model_with_vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started a program: {args}")

    # TransformerLens's bridge answers such a model with `pip install torchvision`.
    monkeypatch.setattr("subprocess.check_call", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    folder = zoo.write_folder("gemma3_vision", tmp_path / "model")
    assert_same_logits(load_model(folder), folder)
    with pytest.raises(ModelLoadError, match=r"^backend='bridge' takes text models, and .* Try backend='hooked_trans"):
        load_model(folder, backend="bridge")


def test_a_wrong_setting_does_not_get_through(zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mechsteer.backends import hooked_transformer

    monkeypatch.setattr(hooked_transformer, "_rope", lambda hf, windowed: {"rotary_base": 10_000.0})
    with pytest.raises(ModelLoadError, match=r"computes other logits for .* than transformers does"):
        load_model(zoo_folders["llama"])


def test_bridge_has_the_hooks_of_hooked_transformer_with_the_same_values(zoo_folder: Path) -> None:
    tokens = zoo.prompts()
    with torch.no_grad():
        _, hooked = load_model(zoo_folder).hooked.run_with_cache(tokens)
        _, bridge = load_model(zoo_folder, backend="bridge").hooked.run_with_cache(tokens)
    assert set(hooked.keys()) <= set(bridge.keys())
    for name in hooked:
        if "q_norm" in name or "k_norm" in name:
            continue  # HookedTransformer flattens [batch, pos, head] inside these two norms
        # Masked scores are -inf in one and the lowest finite number in the other.
        left, right = hooked[name].clamp(min=-1e30), bridge[name].clamp(min=-1e30)
        torch.testing.assert_close(left, right, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_values_at_the_hooks_are_those_of_transformers(zoo_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = zoo.prompts()
    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(zoo_folder)(tokens, output_hidden_states=True).hidden_states
        _, cache = load_model(zoo_folder).hooked.run_with_cache(tokens)
    for layer in range(zoo.N_LAYERS):
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], states[layer], atol=1e-4, rtol=0)


@backends
def test_tokenizer_is_the_folders_own(zoo_folder: Path, architecture: str, backend: str) -> None:
    tokenizer, expected = load_model(zoo_folder, backend=backend).tokenizer, zoo.reference_tokenizer(zoo_folder)
    text = "Talk only about cats."
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert (tokenizer(text).input_ids[0] == 1) == (architecture in zoo.PREPENDS_BOS)


@backends
def test_nothing_is_printed_or_left_changed(backend: str, zoo_folders: dict[str, Path], capfd) -> None:
    from transformers.utils import logging

    random_state, before = torch.get_rng_state(), (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_model(zoo_folders["llama"], backend=backend)
    assert capfd.readouterr() == ("", "")
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())
    assert torch.equal(random_state, torch.get_rng_state())


def test_lower_precision(zoo_folder: Path) -> None:
    model = load_model(zoo_folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(model.hooked(zoo.prompts())).all()


def test_shipped_names_resolve_to_the_data_folder(
    zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("mechsteer.model.data_path", lambda *parts: asked.append(parts) or zoo_folders["llama"])
    assert [load_model(name).name for name in ("pocket", "pocket-1l")] == ["pocket", "pocket-1l"]
    assert asked == [("models", "pocket"), ("models", "pocket-1l")]


def test_hub_names_take_a_snapshot_without_code_or_pickles(
    zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        return str(zoo_folders["gpt2"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("gpt2-small").name == "gpt2-small"
    assert asked == ["gpt2"]  # TransformerLens's short name stands for the official one


class TestModel:
    def test_wraps_a_model_that_exists(self, zoo_folders: dict[str, Path]) -> None:
        hooked = load_model(zoo_folders["gpt2"]).hooked
        model = Model(hooked)
        assert model.hooked is hooked
        assert model.tokenizer is hooked.tokenizer
        assert Model(hooked, tokenizer="mine", name="my-gpt2").tokenizer == "mine"

    def test_repr(self, zoo_folders: dict[str, Path]) -> None:
        assert repr(load_model(zoo_folders["gpt2"], device="cpu")) == (
            "Model('gpt2', backend='hooked_transformer', n_layers=3, d_model=32, d_vocab=128, "
            "unprocessed float32 weights on cpu)"
        )

    def test_knows_processed_weights(self, zoo_folders: dict[str, Path]) -> None:
        folded: Any = load_model(zoo_folders["gpt2"]).hooked
        folded.process_weights_()
        assert Model(folded).processed
        centred: Any = load_model(zoo_folders["gpt2"]).hooked
        centred.process_weights_(fold_ln=False, center_writing_weights=False)
        assert Model(centred).processed
        bridge: Any = load_model(zoo_folders["gpt2"], backend="bridge").hooked
        bridge.enable_compatibility_mode()
        assert Model(bridge).processed

    def test_refuses_anything_else(self) -> None:
        linear: Any = torch.nn.Linear(2, 2)
        with pytest.raises(MechsteerError, match="Model got a Linear, but wraps a HookedTransformer or a Transformer"):
            Model(linear)


class TestIdentity:
    """It is that of the weights and of what was done to them, whatever they are wrapped in."""

    @pytest.mark.parametrize("architecture", (*zoo.ARCHITECTURES, *zoo.PARTLY_ROTARY))
    def test_what_is_made_on_one_backend_goes_to_the_other(
        self, architecture: str, zoo_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        hooked, bridge = (load_model(zoo_folders[architecture], backend=backend) for backend in BACKENDS)
        assert hooked.id == bridge.id
        site, tokens = Site("resid_post", 1), zoo.prompts()
        for one, other in ((hooked, bridge), (bridge, hooked)):
            state = one.run(tokens, record=site).activations[site][0, -1]
            Direction(state, site, one.id).save(tmp_path / "state.safetensors")
            steered = [Add(Direction.load(tmp_path / "state.safetensors", other), 0.5)]
            torch.testing.assert_close(
                other.run(tokens, steered).logits, one.run(tokens, steered).logits, atol=1e-4, rtol=0
            )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_in_other_precision(self, dtype: torch.dtype, zoo_folders: dict[str, Path]) -> None:
        # Gemma's embedding is scaled, and gains of its norms are shifted, in the precision of the weights.
        one, other = (load_model(zoo_folders["gemma2"], backend=backend, dtype=dtype) for backend in BACKENDS)
        assert one.id == other.id != load_model(zoo_folders["gemma2"]).id

    def test_a_hooked_transformers_is_that_of_its_own_config_and_parameters(self, zoo_folders: dict[str, Path]) -> None:
        # As it always was: artefacts are older than this.
        hooked: Any = load_model(zoo_folders["gpt2"]).hooked
        ignored = set(mechsteer_backends._NOT_COMPUTED_WITH.split())
        settings = {key: str(value) for key, value in hooked.cfg.to_dict().items() if key not in ignored}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, parameter in hooked.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().numpy().tobytes())
        assert Model(hooked).id.hash == digest.hexdigest()

    @backends
    def test_other_weights_and_processed_ones_are_others(self, backend: str, zoo_folders: dict[str, Path]) -> None:
        model = load_model(zoo_folders["gpt2"], backend=backend)
        seen = {model.id.hash}
        processed: Any = load_model(zoo_folders["gpt2"], backend=backend).hooked
        processed.process_weights_() if backend == "hooked_transformer" else processed.enable_compatibility_mode()
        seen.add(Model(processed).id.hash)
        assert len(seen) == 2 and Model(processed).id.processed
        with torch.no_grad():
            next(iter(model.hooked.parameters())).mul_(1.5)
        seen.add(model.id.hash)
        biased = model.with_bias(1, torch.ones(zoo.D_MODEL))
        assert len({*seen, biased.id.hash}) == 4
        direction = Direction(torch.ones(zoo.D_MODEL), Site("resid_post", 1), model.id)
        with pytest.raises(MechsteerError, match=r"was made with unprocessed weights of .* Make it again"):
            Model(processed).run(zoo.prompts(), [Add(direction)])

    def test_a_bridge_is_hashed_without_a_second_copy_of_its_weights(
        self, zoo_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mechsteer.backends import bridge as bridges

        bridge = load_model(zoo_folders["llama"], backend="bridge").hooked
        found = bridges.classic_weights(bridge)
        assert found is not None
        own = {parameter.data_ptr() for parameter in bridge.parameters()}
        copies = {name for name, value in found[1] if value.untyped_storage().data_ptr() not in own}
        assert copies and not any(".W_" in name or "._W_" in name for name in copies)  # absent biases alone
        monkeypatch.setattr(bridges, "classic_weights", lambda hooked: None)
        assert len(Model(bridge).id.hash) == 64  # what has no classic form is still told from others
