"""Control vectors for llama.cpp: GGUF files that it and repeng read and write.

The tensor `direction.N` is added to the output of block N, counted from 0: to `resid_post` of that block. llama.cpp
adds nothing to the output of block 0, so there is no way to write a direction for it.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechsteer.activations import ModelId
from mechsteer.directions.direction import Direction
from mechsteer.errors import MechsteerError
from mechsteer.site import Site

if TYPE_CHECKING:
    from mechsteer.model import Model

_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d{1,4})")
# What llama.cpp and repeng pass over: the weights that the vectors belong to, and how they were made.
_ABOUT = "mechsteer.directions"


def export_gguf(
    directions: Mapping[Any, Direction] | Iterable[Direction], path: str | os.PathLike[str], *, model_hint: str
) -> None:
    """Write directions as a control vector.

    Args:
        directions: one vector for each layer, at `resid_post` of blocks from 1 on; what `difference_of_means` returns,
            without layer 0.
        path: of the file; one that is there is replaced.
        model_hint: transformers' name of the model's architecture, such as "llama" or "gemma2", as repeng writes it.

    Raises:
        MechsteerError: a direction is elsewhere, a layer has two, widths differ, or the gguf package is not installed.
    """
    gguf = _package()
    by_layer: dict[int, Direction] = {}
    for each in directions.values() if isinstance(directions, Mapping) else directions:
        if each.site != Site("resid_post", each.site.layer) or each.site.layer == 0:
            raise MechsteerError(
                f"A GGUF control vector cannot hold {each.site!r}: llama.cpp adds to resid_post of blocks from 1 on. "
                "Leave it out, or make it there."
            )
        if each.site.layer in by_layer:
            raise MechsteerError(f"A GGUF control vector holds one vector a layer, and {each.site!r} came twice.")
        by_layer[int(each.site.layer or 0)] = each
    widths = sorted({len(each.vector) for each in by_layer.values()})
    if len(widths) != 1:
        raise MechsteerError(
            f"A GGUF control vector holds vectors of one width, and these have {widths or 'none'}. "
            "Pass at least one direction, all of the same model."
        )
    models = {str(layer): each.model and each.model._asdict() for layer, each in by_layer.items()}
    origins = {str(layer): each.origin for layer, each in by_layer.items()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.tmp")
    writer = gguf.GGUFWriter(fresh, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(by_layer))
    writer.add_string(_ABOUT, json.dumps({"models": models, "origins": origins}))
    for layer, each in sorted(by_layer.items()):
        writer.add_tensor(f"direction.{layer}", each.vector.detach().float().cpu().contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def import_gguf(path: str | os.PathLike[str], *, model: "Model | None" = None) -> dict[Site, Direction]:
    """Read a control vector that mechsteer, repeng or llama.cpp wrote.

    Args:
        path: of the file.
        model: that the directions must fit; None takes them as they are.

    Returns:
        A Direction for each layer, at its `resid_post`. Those that mechsteer wrote know model and origin; in others the
        origin holds the hint at the model's architecture.

    Raises:
        MechsteerError: the file is missing, damaged or no control vector, it does not fit the model, or the gguf
            package is not installed.
    """
    gguf = _package()
    name = os.fspath(path)
    if not Path(path).is_file():
        raise MechsteerError(f"{name} is no file. Pass a GGUF control vector.")

    class Reader(gguf.GGUFReader):
        # The package takes what lies beyond the end as empty, and counts to any number that the file claims.
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError("it ends too early")
            return values

    try:
        reader = Reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: (tensor.tensor_type, torch.tensor(tensor.data)) for tensor in reader.tensors}
    except Exception as error:  # the package raises whatever numpy does with nonsense
        raise MechsteerError(f"{name} is no complete GGUF file ({' '.join(str(error).split())}).") from error
    if fields.get("general.architecture") != _ARCHITECTURE:
        raise MechsteerError(f"{name} holds {fields.get('general.architecture')!r}, and a control vector was expected.")
    models, origins = _about(fields.get(_ABOUT), name)
    hint = {"method": "gguf", "model_hint": str(fields.get(f"{_ARCHITECTURE}.model_hint"))}
    made: dict[Site, Direction] = {}
    for key, (kind, values) in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None or kind != gguf.GGMLQuantizationType.F32 or values.ndim != 1:
            raise MechsteerError(
                f"{name} holds {key!r} ({kind.name} {list(values.shape)}), and a control vector holds F32 vectors "
                "called direction.N."
            )
        site = Site("resid_post", int(match[1]))
        made[site] = Direction(values[None], site, models.get(match[1]), origins.get(match[1], hint))
        if model is not None:
            made[site].check_fits(model)
    return dict(sorted(made.items(), key=lambda item: item[0].order))


def _about(text: Any, name: str) -> tuple[dict[str, ModelId], dict[str, dict[str, Any]]]:
    """Models and origins by layer, as `export_gguf` wrote them."""
    if text is None:
        return {}, {}
    try:
        about = json.loads(text)
        models = {layer: ModelId(**model) for layer, model in about["models"].items() if model is not None}
        return models, {layer: dict(origin) for layer, origin in about["origins"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MechsteerError(f"{name} has a note {_ABOUT!r} that cannot be read ({error}).") from error


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MechsteerError(
            "GGUF control vectors need the gguf package. Install it with pip install 'mechsteer[gguf]'."
        ) from error
    return gguf
