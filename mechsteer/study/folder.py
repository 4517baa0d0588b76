"""A study's folder: whose it is, one process at a time, and files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechsteer.activations import ModelId
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.study.settings import Settings, read_json

try:
    import fcntl
except ImportError:  # no such locks on Windows; there the folder goes unguarded
    fcntl = None

FORMAT, VERSION = "study", 1
STUDY, LOCK = "study.json", ".lock"


def write(path: Path, text: str) -> None:
    """Write a text file through a temporary one, so that a kill leaves the old text or the new."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The same for JSON."""
    write(path, json.dumps(value, indent=2) + "\n")


def read(folder: Path) -> tuple[Settings, ModelId]:
    """Settings and model of the study in a folder.

    Raises:
        MechsteerError: it holds none, or a mechsteer with another format made it.
    """
    path = folder / STUDY
    if not path.is_file():
        raise MechsteerError(f"{folder} holds no study. Give a folder that `mechsteer study` made.")
    about = check_stamp(read_json(path), path, format=FORMAT, version=VERSION)
    try:
        return Settings.of(**about["settings"]), ModelId(**about["model"])
    except (KeyError, TypeError) as error:
        raise MechsteerError(f"{path} is damaged ({error}). Make the study in another folder.") from error


def claim(folder: Path, settings: Settings, model: ModelId) -> None:
    """Make the folder this study's."""
    held = {"settings": settings.model_dump(mode="json"), "model": dict(model._asdict())}
    write_json(folder / STUDY, stamp(FORMAT, VERSION) | held)
    rows = [json.dumps(request.model_dump(), ensure_ascii=False) for request in settings.requests]
    write(folder / "requests.jsonl", "".join(f"{row}\n" for row in rows))


def check(folder: Path, settings: Settings, model: ModelId | None = None) -> None:
    """Raise `MechsteerError` unless the folder is free, or holds this study (and, where given, of this model)."""
    if not claimed(folder, STUDY, holds="study", give="a folder for the study"):
        return
    theirs, made_with = read(folder)
    difference = differing(theirs.identity, settings.identity, made_with, model)
    if difference:
        raise MechsteerError(
            f"{folder} holds another study ({difference}). Give another folder, or the settings of that study."
        )


def claimed(folder: Path, file: str, *, holds: str, give: str) -> bool:
    """Whether something has made the folder its own with `file`; False where it is free.

    Raises:
        MechsteerError: it is a file, or not empty and not claimed.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise MechsteerError(f"{folder} is a file. Give {give}, new or empty.")
    if (folder / file).exists():
        return True
    # What a run leaves that was killed before it claimed the folder.
    others = sorted({each.name for each in folder.iterdir()} - {LOCK, f".{file}.tmp"})
    if others:
        raise MechsteerError(
            f"{folder} is not empty and holds no {holds} (it holds {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}). Give a new or an empty folder."
        )
    return False


def differing(there: Mapping[str, Any], here: Mapping[str, Any], made_with: ModelId, model: ModelId | None) -> str:
    """The first setting in which a folder differs from what is asked for, or else its model where that is known; ""
    where neither does."""
    for name in here:
        if there[name] != here[name]:
            a, b = (f"{len(each[name])} of them" if name == "requests" else repr(each[name]) for each in (there, here))
            if a == b:  # as many requests, but others
                a, b = "some", "others"
            return f"{name}: {a} there, {b} here"
    if model is not None and model.hash != made_with.hash:
        a, b = (f"{each.name} (weights {each.hash[:12]})" for each in (made_with, model))
        return f"model: {a} there, {b} here"
    return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there. The lock ends with the process, however that ends.

    Raises:
        MechsteerError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="ascii")
    except OSError as error:
        raise MechsteerError(f"{folder} cannot be written ({error.strerror}). Give another folder.") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise MechsteerError(
                f"{folder} is in use by process {file.read().strip() or '(unknown)'}. Wait until it ends, or stop it; "
                "the same command then goes on from there."
            ) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
