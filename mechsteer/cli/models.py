"""`mechsteer models`: what can be loaded, and what one model is."""

import json as json_module
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.data import data_path

EPILOG = options.epilog(
    "mechsteer models",
    "mechsteer models pocket",
    "mechsteer models ./my-model --device cuda --dtype bfloat16 --json",
    s1="",
)
OTHERS = (
    "Wherever a model is asked for, give a name from above; a Hugging Face folder with config.json, safetensors "
    'weights and a tokenizer, such as ./my-model; or a hub name that TransformerLens knows, such as "gpt2", which is '
    "downloaded once. Only safetensors are read, and no code from a model's folder is run."
)
_SHAPE = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""What configs of transformers call it."""


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A model to load and describe. Default: list what there is.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """List the models that can be loaded; or load one, and tell its shape and whether it computes what it should."""
    if name is None:
        _list(json)
        return
    with terminal.for_machines(json):
        about = _described(name, device, dtype, quiet)
    if json:
        terminal.document({"command": "models", **about})
        return
    terminal.say([Text(about["name"], "bold"), terminal.pairs(_lines(about))])


def _list(json: bool) -> None:
    found = [_of_folder(name, data_path("models", name), "shipped") for name in options.shipped_models()]
    found += [_of_folder(name, folder, "in the cache") for name, folder in options.cached_models().items()]
    if json:
        terminal.document({"command": "models", "models": found, "others": OTHERS})
        return
    columns = ("name", "parameters", "layers", "d_model", "heads", "vocabulary", "context", "where")
    rows = [
        [each["name"], _millions(each["parameters"]), *(_shown(each[key]) for key in columns[2:-1]), each["where"]]
        for each in found
    ]
    terminal.say([terminal.table(columns, rows, numbers=columns[1:-1], whole=("name", "where")), Text(OTHERS)])
    terminal.say([Text(f"shipped ones lie in {data_path('models')}", "dim")], whole=True)


def _of_folder(name: str, folder: Path, where: str) -> dict[str, Any]:
    """What config.json and the weights' headers tell, without loading anything."""
    try:
        config = json_module.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    config = config.get("text_config", config)
    shape = {key: next((config[each] for each in names if each in config), None) for key, names in _SHAPE.items()}
    return {
        "name": name, "architecture": (config.get("architectures") or [None])[0], "parameters": _parameters(folder),
        **shape, "where": where, "folder": str(folder),
    }  # fmt: skip


def _parameters(folder: Path) -> int | None:
    """Numbers in the safetensors files, by their headers: 8 bytes with a header's length, and the header in JSON."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json_module.loads(file.read(int.from_bytes(file.read(8), "little")))
            count += sum(prod(each["shape"]) for key, each in header.items() if key != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
            return None
    return count or None


def _folder(name: str) -> Path:
    return (
        data_path("models", name) if name in options.shipped_models() else options.cached_models().get(name, Path(name))
    )


def _described(name: str, device: str | None, dtype: str, quiet: bool) -> dict[str, Any]:
    with terminal.status(f"loading {name}", quiet=quiet):
        import torch

        from mechsteer.model import load_model
        from mechsteer.study.runner import check_device

        options.choice(dtype, options.DTYPES, "--dtype")
        check_device(device, "--device")
        model = load_model(name, device=device, dtype=getattr(torch, dtype))
        tokenizer, cfg = model.tokenizer, model.cfg
        special = {key: tokenizer.special_tokens_map.get(f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
        return {
            "name": model.name,
            "architecture": getattr(cfg, "original_architecture", None),
            "parameters": _parameters(_folder(name)) or sum(each.numel() for each in model.hooked.parameters()),
            "layers": model.n_layers, "d_model": model.d_model, "heads": cfg.n_heads,
            "key_value_heads": cfg.n_key_value_heads or cfg.n_heads, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp,
            "vocabulary": model.d_vocab, "context": model.n_ctx,
            "positions": cfg.positional_embedding_type, "norm": cfg.normalization_type,
            "tokenizer": {
                "class": type(tokenizer).__name__, "tokens": len(tokenizer), "special": special,
                "chat_template": bool(getattr(tokenizer, "chat_template", None)),
            },
            "hash": model.id.hash, "processed": model.processed, "backend": model.backend,
            "device": str(model.device), "dtype": dtype,
            # load_model refuses a model whose logits are others; in lower precision rounding hides them.
            "logits_agree": True if dtype in ("float32", "float64") else None,
            "packed": model.decoder is not None,
        }  # fmt: skip


def _lines(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    tokenizer = about["tokenizer"]
    special = ", ".join(f"{key} {token!r}" for key, token in tokenizer["special"].items() if token is not None)
    agree = {
        True: "agree with transformers' own, to 1e-3 of the largest (compared when loading)",
        None: f"not compared with transformers' in {about['dtype']}: load it in float32 for that",
    }[about["logits_agree"]]
    weights = "folded or centred" if about["processed"] else "as they are, nothing folded, nothing centred"
    way = "the packed forward pass" if about["packed"] else "hooks, which is slower: the packed pass lacks something"
    return [
        ("architecture", _shown(about["architecture"])),
        ("parameters", _millions(about["parameters"])),
        ("layers", str(about["layers"])),
        ("d_model, d_mlp", f"{about['d_model']}, {_shown(about['d_mlp'])}"),
        ("heads", f"{about['heads']} of {about['d_head']}; {about['key_value_heads']} for keys and values"),
        ("vocabulary, context", f"{about['vocabulary']:,}, {about['context']:,} tokens"),
        ("positions, norm", f"{about['positions']}, {about['norm']}"),
        ("tokenizer", f"{tokenizer['class']}, {tokenizer['tokens']:,} tokens; {special or 'no special ones'}"),
        ("chat template", "yes" if tokenizer["chat_template"] else "no: prompts are plain text"),
        ("weights", f"{weights}; {about['dtype']} on {about['device']}"),
        ("hash", about["hash"]),
        ("logits", agree),
        ("sweeps run through", way),
    ]


def _millions(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
