"""safetensors files with a JSON manifest: written whole or not at all, and read with errors that say what is wrong."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechsteer.errors import MechsteerError


def stamp(format: str, version: int) -> dict[str, Any]:
    """The part of a manifest that says what wrote the file."""
    return {"format": f"mechsteer.{format}", "version": version, "mechsteer": version_of("mechsteer")}


def check_stamp(manifest: Any, path: str | os.PathLike[str], *, format: str, version: int) -> dict[str, Any]:
    """The manifest, if it has this format and version.

    Raises:
        MechsteerError: it has not.
    """
    wanted = f"mechsteer.{format}"
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != wanted:
        raise MechsteerError(
            f"{os.fspath(path)} has format {found!r}, expected {wanted!r}. Pass a file that holds {format}."
        )
    if manifest.get("version") != version:
        raise MechsteerError(
            f"{os.fspath(path)} has version {manifest.get('version')!r} of format {wanted!r}, and this mechsteer reads "
            f"{version}. Use the mechsteer that wrote it ({manifest.get('mechsteer')}), or record again."
        )
    return manifest


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a safetensors file with a JSON manifest, through a temporary file, so that a kill leaves none in part.

    Raises:
        OSError: it cannot be written, such as on a full disk; what was there before stays.
    """
    target = Path(path)
    fresh = target.with_name(f"{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as `resid_post` of a block and `resid_pre` of the next may.
        plain[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
        storages.add(plain[name].untyped_storage().data_ptr())
    fresh.touch()
    mode = fresh.stat().st_mode
    try:
        save_file(plain, fresh, metadata={"mechsteer": json.dumps(manifest)})
        fresh.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        os.replace(fresh, target)
    except SafetensorError as error:
        # What the system says is only in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(target)) from error
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def open_tensors(path: str | os.PathLike[str], *, format: str, version: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open what `save_tensors` wrote, as (safetensors file, manifest).

    Raises:
        MechsteerError: the file is missing or damaged, has no manifest, or has another format or version.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise MechsteerError(f"{name} is no file. Pass one that .save(path) wrote.")
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("mechsteer")
            if text is None:
                raise MechsteerError(f"{name} holds no mechsteer manifest. Pass a file that .save(path) wrote.")
            yield file, check_stamp(json.loads(text), path, format=format, version=version)
    except MechsteerError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MechsteerError(f"{name} is damaged or was copied only in part ({reason}). Record it again.") from error
