"""Shapes of models: all that a plan needs to know of one, read without its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechsteer import markup
from mechsteer.costs import Dims
from mechsteer.data import data_path
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    from mechsteer.model import Model

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# What configs of transformers call it.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
# Types of model whose MLP has two matrices; those of all others that the engine covers have three.
_UNGATED = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2", "codegen", "xglm"}
# Whose input and output embeddings are one matrix where the config does not say.
_TIED = {"gpt2", "gemma", "gemma2", "gemma3_text", "bloom", "opt"}
_NEEDED = ("layers", "d_model", "heads", "vocab")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from which every cost follows.

        Shape.of("google/gemma-2-9b-it"), Shape.of("./my-folder"), Shape.of(model)
        Shape.of("layers=26,d_model=2304,heads=8,kv_heads=4,d_head=256,d_mlp=9216,vocab=256000")

    Attributes:
        layers: blocks.
        d_model: width of the residual stream.
        heads, kv_heads: of queries, and of keys and values; fewer of these under grouped queries.
        d_head: numbers of a head.
        d_mlp: hidden neurons of an MLP.
        vocab: tokens.
        gated: whether the MLP has a gate.
        tied: whether embedding and unembedding are one matrix on disk.
        dtype: of the weights: "float32", "bfloat16", "float16" or "float64".
        context: most positions.
        name: what to call it.
    """

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    gated: bool = True
    tied: bool = False
    dtype: str = "float32"
    context: int = 8192
    name: str = ""

    def __post_init__(self) -> None:
        for each in ("layers", "d_model", "heads", "kv_heads", "d_head", "d_mlp", "vocab", "context"):
            value = getattr(self, each)
            if not (isinstance(value, int) and value >= 1):
                raise MechsteerError(f"Shape got {each}={value!r}. Pass a whole number of 1 or more.")
        if self.heads % self.kv_heads:
            raise MechsteerError(f"Shape got heads={self.heads} and kv_heads={self.kv_heads}, which do not divide it.")
        if self.dtype not in ITEMSIZE:
            raise MechsteerError(f"Shape got dtype={self.dtype!r}. Pass one of {', '.join(ITEMSIZE)}.")

    def _repr_html_(self) -> str:
        return markup.card("Shape", markup.facts(self.as_json()), about=self.name)

    @property
    def dims(self) -> Dims:
        """What `mechsteer.costs` computes with."""
        return Dims(
            self.layers, self.d_model, self.heads, self.kv_heads, self.d_head, self.d_mlp, self.vocab, self.gated
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def parameters(self) -> int:
        """Entries of all matrices, as they are on disk; norms and biases, which are few, are left out."""
        return self.layers * self.dims.layer_weights + self.vocab * self.d_model * (1 if self.tied else 2)

    def with_dtype(self, dtype: str | None) -> "Shape":
        """The same with weights of another type; None for as it is.

        Raises:
            MechsteerError: there is no such type.
        """
        return self if dtype is None else replace(self, dtype=dtype)

    @staticmethod
    def of(model: "Shape | Model | str | PathLike[str] | Mapping[str, Any]", *, dtype: str | None = None) -> "Shape":
        """The shape of a model, without its weights.

        Args:
            model: a Shape; a loaded `Model`; "pocket" or "pocket-1l"; a folder with a config.json, or that file; a name
                on the hub, whose config is read from the cache or the network; numbers such as
                "layers=26,d_model=2304,heads=8,vocab=256000", with the fields of this class (kv_heads is heads where it
                is left out, d_head is d_model / heads, d_mlp is 4 d_model); or a config as a mapping.
            dtype: that the weights will be loaded with; None for what the config says, or float32.

        Raises:
            MechsteerError: there is no such model, its config cannot be read here, or a number is missing or wrong.
        """
        if isinstance(model, Shape):
            return model.with_dtype(dtype)
        if isinstance(model, Mapping):
            return _of_config(model, str(model.get("_name_or_path") or "a config")).with_dtype(dtype)
        if hasattr(model, "hooked"):
            return _of_model(model).with_dtype(dtype)
        text = fspath(model)  # type: ignore[arg-type]
        if "=" in text and not Path(text).exists():
            return _of_numbers(text).with_dtype(dtype)
        folder = data_path("models", text) if text in ("pocket", "pocket-1l") else Path(text).expanduser()
        if folder.is_file() or (folder / "config.json").is_file():
            return _of_file(folder if folder.is_file() else folder / "config.json", text).with_dtype(dtype)
        if folder.is_dir():
            raise MechsteerError(f"{text} holds no config.json. Pass a Hugging Face model folder.")
        from mechsteer.backends import hub_config

        return _of_config(hub_config(text), text).with_dtype(dtype)

    def as_json(self) -> dict[str, Any]:
        """For documents."""
        return {**asdict(self), "parameters": self.parameters}


def _of_numbers(text: str) -> Shape:
    known = {each.name: each.type for each in fields(Shape)}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        if name not in known:
            raise MechsteerError(f"{part.strip()!r} is no number of a shape. Give {', '.join(known)}, as in layers=12.")
        if name in ("gated", "tied"):
            if value.lower() not in ("true", "false", "1", "0"):
                raise MechsteerError(f"{name}={value!r} is neither true nor false.")
            found[name] = value.lower() in ("true", "1")
        elif name in ("dtype", "name"):
            found[name] = value
        else:
            try:
                found[name] = int(value)
            except ValueError as error:
                raise MechsteerError(f"{name}={value!r} is no whole number. Give one of 1 or more.") from error
    return _filled(found, "The shape")


def _of_file(path: Path, name: str) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MechsteerError(f"{path} is not readable JSON. Copy the file again.") from error
    if not isinstance(config, dict):
        raise MechsteerError(f"{path} holds no config of a model. Copy the file again.")
    return _of_config(config, name)


def _of_config(config: Mapping[str, Any], name: str) -> Shape:
    outer, config = config, config.get("text_config") or config  # of a model that sees, the language model alone
    experts = next((config[each] for each in ("num_local_experts", "num_experts", "n_routed_experts")
                    if config.get(each)), None)  # fmt: skip
    if experts:
        raise MechsteerError(
            f"{name} has {experts} experts, which the packed pass does not cover: what it costs is not modelled."
        )
    found = {
        name: next((config[each] for each in names if config.get(each) is not None), None)
        for name, names in _NAMES.items()
    }
    kind = str(config.get("model_type") or outer.get("model_type") or "")
    if config.get("multi_query"):
        found["kv_heads"] = 1
    dtype = config.get("dtype") or config.get("torch_dtype") or outer.get("dtype") or outer.get("torch_dtype")
    dtype = str(dtype or "float32").removeprefix("torch.")
    tied = config.get("tie_word_embeddings", outer.get("tie_word_embeddings"))
    found |= {
        "gated": kind not in _UNGATED, "tied": kind in _TIED if tied is None else bool(tied),
        "dtype": dtype if dtype in ITEMSIZE else "float32", "name": name,
    }  # fmt: skip
    return _filled({key: value for key, value in found.items() if value is not None}, f"The config of {name}")


def _of_model(model: Any) -> Shape:
    dims = Dims.of(model.cfg, model.d_vocab)
    return Shape(
        *astuple(dims), tied=False, dtype=str(model.dtype).removeprefix("torch."), context=model.n_ctx, name=model.name
    )


def _filled(found: dict[str, Any], what: str) -> Shape:
    """With what follows from other numbers.

    Raises:
        MechsteerError: one that does not is missing.
    """
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise MechsteerError(f"{what} lacks {', '.join(missing)}. Give at least {', '.join(_NEEDED)}.")
    found.setdefault("kv_heads", found["heads"])
    if "d_head" not in found:
        if found["heads"] < 1 or found["d_model"] % found["heads"]:
            raise MechsteerError(
                f"{what} has d_model={found['d_model']}, which its {found['heads']} heads do not divide, and no d_head."
            )
        found["d_head"] = found["d_model"] // found["heads"]
    found.setdefault("d_mlp", 4 * found["d_model"])
    return Shape(**found)
