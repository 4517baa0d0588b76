"""A folder that all machines of a run see: a local path, or a URL that fsspec knows, such as s3://bucket/run."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.files import open_tensors, save_tensors

MANIFEST = "manifest.json"
"""The file that says what a folder holds."""


class Folder:
    """Files by name in one folder; each is there whole or not at all.

    Attributes:
        url: the path or URL, as it was given.
        local: the path, where it is one; else None.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        """Of a path or a URL.

        Raises:
            MechsteerError: no installed package reads URLs of this kind.
        """
        self.url: str = os.fspath(where)
        protocol, separator, _ = self.url.partition("://")
        self.local: Path | None = None
        self._system: Any = None
        self._path = ""
        if not separator:
            # Workers have other working directories.
            self.local = Path(os.path.abspath(os.path.expanduser(self.url)))
            return
        import fsspec

        try:
            self._system, self._path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise MechsteerError(f"{self.url} cannot be reached: {' '.join(str(error).split())}") from error
        if protocol in ("file", "local"):
            self.local = Path(self._path)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> Any:
        return Folder, (self.url if self.local is None else str(self.local),)

    def names(self) -> list[str]:
        """Names of the files in it, sorted; none where there is no folder."""
        if self.local is not None:
            return sorted(path.name for path in self.local.iterdir()) if self.local.is_dir() else []
        self._system.invalidate_cache()  # others write here too
        if not self._system.exists(self._path):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in self._system.ls(self._path, detail=False))

    def make(self) -> None:
        """Make the folder, where folders have to be made."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)

    def read_text(self, name: str) -> str:
        """Text of a file.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        if self.local is not None:
            return (self.local / name).read_text(encoding="utf-8")
        return self._system.cat_file(f"{self._path}/{name}").decode()

    def write_text(self, name: str, text: str) -> None:
        """Write a file.

        Raises:
            OSError: it cannot be written, such as on a full disk; then nothing of it is left.
        """
        if self.local is None:
            self._system.pipe_file(f"{self._path}/{name}", text.encode())
            return
        fresh = self.local / f"{name}.tmp"
        try:
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, self.local / name)
        finally:
            fresh.unlink(missing_ok=True)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
        """See `mechsteer.files.save_tensors`."""
        with self.written(name) as path:
            save_tensors(path, tensors, manifest)

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write a file to, which becomes the file `name` at the end."""
        if self.local is not None:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory() as here:
            yield Path(here) / name
            self._system.put_file(str(Path(here) / name), f"{self._path}/{name}")

    @contextmanager
    def open_tensors(self, name: str, *, format: str, version: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """See `mechsteer.files.open_tensors`."""
        if self.local is not None:
            with open_tensors(self.local / name, format=format, version=version) as opened:
                yield opened
            return
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / name
            self._system.get_file(f"{self._path}/{name}", str(path))
            with open_tensors(path, format=format, version=version) as opened:
                yield opened
