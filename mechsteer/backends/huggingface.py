"""Reading a Hugging Face folder safely: local files, safetensors and code that is already installed, nothing else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechsteer.errors import ModelLoadError

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_NEEDS = f"config.json, {_WEIGHTS} and tokenizer.json"
# What a hub snapshot needs. No *.py: code from the hub is never run; no *.bin: unpickling runs code too.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class Source(NamedTuple):
    """A folder's contents as transformers sees them: the model (on the CPU) and the tokenizer."""

    folder: Path
    model: Any
    tokenizer: Any


def hub_folder(name: str, *, shipped: tuple[str, ...] = ()) -> Path:
    """Download (or find in the cache) the snapshot of a hub model that is on TransformerLens's list.

    Args:
        name: official name or TransformerLens alias, such as "gpt2" or "gemma-2-2b-it".
        shipped: names that `load_model` resolves itself, to be offered among the nearest names.

    Raises:
        ModelLoadError: the name is unknown, or the snapshot is neither cached nor downloadable.
    """
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    known = make_model_alias_map()
    official = known.get(name.lower())
    if official is None:
        nearest = get_close_matches(name.lower(), [*shipped, *known], n=3, cutoff=0.4)
        hint = f"The nearest known names are {', '.join(map(repr, nearest))}" if nearest else "No known name is near it"
        raise ModelLoadError(
            f"No folder and no known model is called {name!r}. {hint}; or pass a folder with {_NEEDS}."
        )

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(official, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub client raises a dozen unrelated types: offline, gated, missing, disk full
        raise ModelLoadError(
            f"{official!r} is neither in the local Hugging Face cache nor downloadable ({_first_line(error)}). "
            f"Connect to the network (and log in, for a gated model), or pass a folder with {_NEEDS}."
        ) from error


def hub_config(name: str) -> dict[str, Any]:
    """The config of a hub model, from the local cache or the network, without its weights.

    Raises:
        ModelLoadError: it is in neither, or transformers does not understand it.
    """
    from transformers import AutoConfig

    try:
        with quietly():
            return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except Exception as error:  # the hub client and transformers raise a dozen unrelated types
        raise ModelLoadError(
            f"{name!r} is no folder, and its config is neither in the local Hugging Face cache nor to be had "
            f"({_first_line(error)}). Connect to the network, pass a folder with a config.json, or numbers such as "
            "layers=26,d_model=2304,heads=8,vocab=256000."
        ) from error


def read_folder(
    folder: Path, *, dtype: torch.dtype, attention: str = "eager", auto: str = "AutoModelForCausalLM"
) -> Source:
    """Read config, tokenizer and weights of `folder`, refusing whatever would make them wrong or unsafe.

    Args:
        folder: a Hugging Face folder.
        dtype: of the weights.
        attention: transformers' attention kernel. Eager by default: the others hide scores and patterns, and differ
            from it by up to 1e-3.
        auto: transformers' class that makes the model.

    Raises:
        ModelLoadError: with one line that names the folder, what is wrong and what to do.
    """
    import transformers

    local = {"local_files_only": True, "trust_remote_code": False}
    _check_config(folder)
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelLoadError(
            f"{folder} holds no tokenizer (expected tokenizer.json). Save the model's tokenizer there."
        )
    with quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **local)
        except Exception as error:  # transformers raises many types for a config it does not understand
            raise ModelLoadError(
                f"transformers does not understand {folder / 'config.json'} ({_first_line(error)}). Pass a folder "
                "whose architecture the installed transformers knows; code from a model folder is never run."
            ) from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            raise ModelLoadError(
                f"The tokenizer in {folder} does not load ({_first_line(error)}). Copy the tokenizer files again."
            ) from error
        _check_tokenizer(folder, tokenizer, config)
        try:
            made_by: Any = getattr(transformers, auto)  # the stubs do not know output_loading_info
            model, info = made_by.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=attention,
                use_safetensors=True, output_loading_info=True, **local,
            )  # fmt: skip
        except Exception as error:
            raise ModelLoadError(
                f"The weights in {folder} do not load as config.json describes them ({_first_line(error)}). "
                "Copy config.json and the weights again, from the same model."
            ) from error
    # transformers fills absent weights with random numbers and only logs it.
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"The weights in {folder} lack {len(missing)} of the tensors that config.json asks for, such as "
            f"{missing[0]!r}. Copy config.json and the weights again, from the same model."
        )
    return Source(folder, model.eval(), tokenizer)


def probe_tokens(config: Any) -> Int[Tensor, "1 pos"]:
    """Token ids to compare two implementations on: longer than a small sliding window, and in no special order."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    n_pos = window + 8 if window and window <= 256 else 24
    n_pos = min(n_pos, getattr(config, "max_position_embeddings", None) or n_pos)
    # A multiplicative walk through the vocabulary: deterministic without touching any random state.
    return (torch.arange(1, n_pos + 1)[None] * 7919) % config.vocab_size


@torch.no_grad()
def logits(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a transformers causal language model."""
    return model(tokens.to(model.device), use_cache=False).logits


def check_logits(
    folder: Path,
    *,
    backend: str,
    got: Float[Tensor, "batch pos d_vocab"],
    expected: Float[Tensor, "batch pos d_vocab"],
) -> None:
    """Refuse a model whose logits are not transformers' own, or not finite.

    Raises:
        ModelLoadError: some weight is not finite, or (in fp32 and fp64) the largest difference of a logit is above
            1e-3 of the largest logit. In lower precision rounding alone can reach that, so nothing is compared there.
    """
    if not torch.isfinite(expected).all():
        raise ModelLoadError(f"The weights in {folder} give logits that are not finite. Copy the weight file again.")
    if expected.dtype not in (torch.float32, torch.float64):
        return
    error = (got.detach().to(expected.device) - expected).abs().max().item()
    if not error <= 1e-3 * max(1.0, expected.abs().max().item()):  # "not <=", so that NaN is caught too
        other = "bridge" if backend == "hooked_transformer" else "hooked_transformer"
        raise ModelLoadError(
            f"backend={backend!r} computes other logits for {folder} than transformers does (largest difference "
            f"{error:.2g}), so TransformerLens lacks something this architecture uses. Try backend={other!r}."
        )


def _check_config(folder: Path) -> None:
    if not folder.exists():
        raise ModelLoadError(f"There is no folder {folder}. Check the path; a model folder holds {_NEEDS}.")
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is a file, not a folder. Pass the folder that holds {_NEEDS}.")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} holds no config.json. Pass a Hugging Face model folder: {_NEEDS}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable JSON ({_first_line(error)}). Copy the file again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelLoadError(f"{path} names no model_type, so it describes no Hugging Face model. Copy the file again.")


def _check_weights(folder: Path) -> None:
    if (folder / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    elif (folder / _WEIGHTS_INDEX).is_file():
        try:
            names = sorted(
                set(json.loads((folder / _WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(
                f"{folder / _WEIGHTS_INDEX} is damaged ({_first_line(error)}). Copy it again."
            ) from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{folder} lacks {len(absent)} of {len(names)} weight files, such as {absent[0]}. Copy them."
            )
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelLoadError(
                f"{folder} holds its weights only as {pickles[0]}, a pickle, and unpickling can run any code. "
                f"Convert it to {_WEIGHTS} (model.save_pretrained with transformers)."
            )
        raise ModelLoadError(f"{folder} holds no weights (expected {_WEIGHTS} or {_WEIGHTS_INDEX}). Copy them there.")
    for name in names:
        path = folder / name
        try:
            # Reads the header only, and compares the sizes it declares with the size of the file.
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            with path.open("rb") as file:
                is_pointer = file.read(40).startswith(b"version https://git-lfs")
            what = "is a git-lfs pointer, not the weights" if is_pointer else "is damaged or truncated"
            do = "Run git lfs pull." if is_pointer else "Copy the file again."
            raise ModelLoadError(f"{path} {what} ({path.stat().st_size} bytes; {_first_line(error)}). {do}") from error


def _check_tokenizer(folder: Path, tokenizer: Any, config: Any) -> None:
    d_vocab = config.get_text_config().vocab_size
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    vital = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    # Some published models (Gemma 3 1B) carry a special token of a larger sibling just above their vocabulary. Text
    # cannot produce it, so only ordinary tokens and the ones that get added unasked have to fit.
    needed = (set(tokenizer.get_vocab().values()) - special) | (vital - {None})
    highest = max(needed, default=-1)
    if highest >= d_vocab:
        raise ModelLoadError(
            f"The tokenizer in {folder} does not fit the model: it gives token ids up to {highest}, and the model's "
            f"vocab_size is {d_vocab}. Put the tokenizer there that the model was trained with."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200].rstrip(".") if lines else type(error).__name__


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from printing load reports and progress bars; what is wrong becomes an exception instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
