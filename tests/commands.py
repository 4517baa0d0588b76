"""Commands as a shell runs them, in this process."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest

from mechsteer import cli

ASKED = [
    "Tell me about your day.",
    "Write a poem.",
    "Give me some advice.",
    "Let us talk.",
    "Tell me a story about my holiday.",
    "What should I cook for dinner?",
]


class Said(NamedTuple):
    """What a command left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one document that it is."""
        return json.loads(self.out)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, columns: int = 200) -> Said:
    """`mechsteer ...`."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mechsteer", *arguments])
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return Said(int(exit.value.code or 0), *capsys.readouterr())


def loaded_once(patch: pytest.MonkeyPatch) -> None:
    """Shipped models, which commands load by their names, are each loaded once for all tests."""
    import torch

    from mechsteer import model

    original = model.load_model
    for name in ("pocket", "pocket-1l"):
        cases.model(name)

    def load(name: Any, **options: Any) -> Any:
        plain = name in ("pocket", "pocket-1l") and options.get("dtype", torch.float32) == torch.float32
        return cases.model(str(name)) if plain else original(name, **options)

    patch.setattr(model, "load_model", load)


def asked(folder: Path) -> str:
    """A file of a few requests."""
    path = folder / "asked.txt"
    path.write_text("\n".join(ASKED) + "\n")
    return str(path)


def contents(folder: Path) -> dict[Path, bytes]:
    """All files, to be compared."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
