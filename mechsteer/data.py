"""Where the data that ships with mechsteer lies."""

from pathlib import Path

from mechsteer.errors import MechsteerError

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel carries the repository's data/ as mechsteer/_data/; a source checkout has it beside the package.
_ROOTS = (_PACKAGE / "_data", _PACKAGE.parent / "data")


def data_path(*parts: str) -> Path:
    """Path of a file or folder that ships with mechsteer, for example `data_path("models", "pocket")`.

    Works in a source checkout and in an installed wheel. Without parts it is the data folder itself.

    Raises:
        MechsteerError: nothing of that name ships with this copy of mechsteer.
    """
    for root in _ROOTS:
        path = root.joinpath(*parts)
        if path.exists():
            return path
    wanted = "/".join(("data", *parts))
    raise MechsteerError(
        f"{wanted} does not ship with this copy of mechsteer (looked in {' and '.join(str(root) for root in _ROOTS)}). "
        "Reinstall the wheel, or check out the repository with its data/ folder."
    )
