"""Whatever is wrong with a name or a folder, the user gets one line that says what, and what to do."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from mechsteer.data import data_path
from mechsteer.errors import MechsteerError, ModelLoadError
from mechsteer.model import load_model


@pytest.fixture
def folder(zoo_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(zoo_folders["llama"], tmp_path / "model"))


def error_of(name: str | os.PathLike[str], **options) -> str:
    """The message that `load_model` gives, which has to be one line."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Names


def test_unknown_name() -> None:
    message = error_of("gpt2-smal")
    assert message.startswith(
        "No folder and no known model is called 'gpt2-smal'. The nearest known names are 'gpt2-small', "
    )
    assert message.endswith("; or pass a folder with config.json, model.safetensors and tokenizer.json.")
    assert "The nearest known names are 'pocket'" in error_of("poket")
    assert "No known name is near it; or pass a folder" in error_of("zzzzqqqq")
    assert "'no-such/org-model'" in error_of("no-such/org-model")
    assert error_of(" ").startswith("load_model got an empty name. Pass 'pocket'")


def test_known_name_without_network() -> None:
    message = error_of("EleutherAI/pythia-70m")
    assert message.startswith("'EleutherAI/pythia-70m' is neither in the local Hugging Face cache nor downloadable (")
    assert message.endswith("or pass a folder with config.json, model.safetensors and tokenizer.json.")


def test_unknown_backend() -> None:
    expected = "backend='jax' does not exist. Pass one of 'hooked_transformer', 'bridge'."
    assert error_of("pocket", backend="jax") == expected


def test_shipped_data_that_is_missing() -> None:
    with pytest.raises(MechsteerError, match=r"^data/models/no-such does not ship with this copy of mechsteer \("):
        data_path("models", "no-such")


# Folders


@pytest.mark.parametrize("as_string", [True, False])
def test_missing_folder(tmp_path: Path, as_string: bool) -> None:
    path = tmp_path / "absent"
    expected = f"There is no folder {path}. Check the path; a model folder holds config.json, model.safetensors and "
    assert error_of(str(path) if as_string else path).startswith(expected)
    assert error_of("./absent").startswith("There is no folder absent.")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    path = folder / "config.json"
    assert error_of(path).startswith(f"{path} is a file, not a folder. Pass the folder that holds config.json, ")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert error_of(folder).startswith(
        f"{folder} holds no config.json. Pass a Hugging Face model folder: config.json, "
    )


def test_broken_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:50])
    assert re.match(rf"{path} is not readable JSON \(.*\)\. Copy the file again\.$", error_of(folder))
    path.write_text("{}")
    assert error_of(folder).startswith(f"{path} names no model_type")


def test_architecture_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="warp_drive")
    assert error_of(folder).startswith(f"transformers does not understand {folder / 'config.json'} (")


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_config(folder, model_type="warp_drive", auto_map=names)
    assert "code from a model folder is never run" in error_of(folder)
    assert not ran.exists()


# Weights


@pytest.mark.parametrize("keep", [0, 5, 300, -1000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert re.match(rf"{path} is damaged or truncated \(\d+ bytes; .+\)\. Copy the file again\.$", error_of(folder))


def test_corrupt_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    assert error_of(folder).startswith(f"{path} is damaged or truncated (")


def test_git_lfs_pointer(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = error_of(folder)
    assert message.startswith(f"{path} is a git-lfs pointer, not the weights (")
    assert message.endswith("Run git lfs pull.")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert error_of(folder).startswith(f"{folder} holds no weights (expected model.safetensors or ")


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert error_of(folder) == (
        f"{folder} holds its weights only as pytorch_model.bin, a pickle, and unpickling can run any code. "
        "Convert it to model.safetensors (model.save_pretrained with transformers)."
    )


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    expected = f"{folder} lacks 1 of 2 weight files, such as model-00002-of-00002.safetensors. Copy them."
    assert error_of(folder) == expected
    (folder / "model.safetensors.index.json").write_text("{}")
    assert error_of(folder).startswith(f"{folder / 'model.safetensors.index.json'} is damaged (")


def test_missing_tensor_is_not_filled_with_random_numbers(folder: Path) -> None:
    path, lost = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path, metadata={"format": "pt"})
    assert error_of(folder).startswith(
        f"The weights in {folder} lack 1 of the tensors that config.json asks for, such as '{lost}'."
    )


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    assert error_of(folder).startswith(f"The weights in {folder} do not load as config.json describes them (")


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_weights_that_are_not_finite(folder: Path, backend: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    expected = f"The weights in {folder} give logits that are not finite. Copy the weight file again."
    assert error_of(folder, backend=backend) == expected


# Tokenizers


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert error_of(folder).startswith(f"{folder} holds no tokenizer (expected tokenizer.json).")


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert error_of(folder).startswith(f"The tokenizer in {folder} does not load (")


def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    folder = zoo.write_folder("llama", tmp_path / "model", vocab_size=100)
    assert error_of(folder) == (
        f"The tokenizer in {folder} does not fit the model: it gives token ids up to 127, and the model's vocab_size "
        "is 100. Put the tokenizer there that the model was trained with."
    )


def test_spare_special_token_above_the_vocabulary_is_harmless(folder: Path) -> None:
    tokenizer = zoo.build_tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3 1B has one
    tokenizer.save_pretrained(folder)
    assert max(load_model(folder).tokenizer.get_vocab().values()) == zoo.D_VOCAB
    load_model(folder, backend="bridge")
    tokenizer.add_tokens(["plainword"])
    tokenizer.save_pretrained(folder)
    assert "does not fit the model: it gives token ids up to 129" in error_of(folder)
