"""The public names: what they are, that a change of them is meant, and that having one imports no more than needed."""

import subprocess
import sys

import public_api
import pytest

import mechsteer as ms
import mechsteer.study

HEAVY = ("torch", "numpy", "transformers", "transformer_lens", "sae_lens", "plotly", "xarray", "pandas", "jaxtyping")


def test_the_public_names_and_signatures_are_those_of_the_list() -> None:
    found, listed = public_api.listed(), public_api.LIST.read_text(encoding="utf-8")
    new, gone = set(found.splitlines()) - set(listed.splitlines()), set(listed.splitlines()) - set(found.splitlines())
    assert found == listed, (
        f"The public API changed: new {sorted(new)}, gone {sorted(gone)}. If that is meant, run "
        "`python tests/public_api.py` and say so in CHANGELOG.md."
    )


def test_a_change_of_a_signature_or_a_name_shows_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(source: str, *, backend: str = "bridge") -> None: ...

    before = public_api.listed()
    monkeypatch.setitem(vars(ms), "load_model", load_model)
    after = public_api.listed()
    assert "\nload_model(source, *, backend='bridge')\n" in after and after != before
    monkeypatch.setattr(ms, "__all__", [*ms.__all__, "MORE"])
    monkeypatch.setitem(vars(ms), "MORE", 1)
    assert "\nMORE: int\n" in public_api.listed()


@pytest.mark.parametrize("package", [ms, mechsteer.study])
def test_every_public_name_can_be_had_and_is_shown(package: object) -> None:
    assert set(package.__all__) <= set(dir(package))  # type: ignore[attr-defined]
    assert all(getattr(package, name) is not None for name in package.__all__)  # type: ignore[attr-defined]


def imported(code: str) -> set[str]:
    """Which of the heavy packages a fresh process has imported after some code."""
    code += "\nimport sys; print('|' + ' '.join(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split("|")[-1].split()) & {*HEAVY, "mechsteer.site", "mechsteer.model"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import mechsteer; dir(mechsteer); mechsteer.__version__") == set()


def test_a_name_is_imported_when_it_is_first_used() -> None:
    assert imported("from mechsteer import Site") == {"mechsteer.site"}
    assert imported("from mechsteer import Model") >= {"mechsteer.model", "torch"}


@pytest.mark.parametrize("command", [[], ["study"], ["prefix"], ["pocket", "train"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
from mechsteer.cli import main
sys.argv = ["mechsteer", *{command}, "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code
"""
    assert imported(code) == set()
