"""What every notebook keeps to, checked without running it. `.ci/run` runs them: `pytest --nbmake notebooks`."""

import ast
import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Folders of one machine, in whatever a notebook says.
_OF_A_MACHINE = re.compile(r"(?:^|[\s\"'(=])(?:/(?:home|Users|tmp|root|mnt|work|content|usr)/|~/|[A-Za-z]:\\)")


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a notebook, one line each."""
    found = []
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    if "widgets" in notebook.metadata:
        found.append("it stores the state of widgets")
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \S", first.source):
        found.append("its first cell is no title")
    for number, cell in enumerate(notebook.cells):
        where = f"cell {number}"
        if _OF_A_MACHINE.search(cell.source):
            found.append(f"{where} names a folder of one machine")
        if cell.cell_type != "code":
            continue
        if cell.outputs or cell.execution_count is not None or cell.metadata:
            found.append(f"{where} stores outputs, a count or metadata")
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            found.append(f"{where} is no Python: {error}")
            continue
        found += [f"{where} {fault}" for node in ast.walk(tree) for fault in _faults_of(node)]
    return found


def _faults_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [fault for alias in node.names for fault in _import_faults(alias.name, None)]
    if isinstance(node, ast.ImportFrom):
        return [fault for alias in node.names for fault in _import_faults(node.module or "", alias.name)]
    if isinstance(node, ast.Attribute):
        if node.attr.startswith("_"):
            return [f"uses the private {node.attr}"]
        if isinstance(node.value, ast.Name) and node.value.id == "ms" and node.attr not in _public("mechsteer"):
            return [f"uses ms.{node.attr}, which mechsteer does not list"]
    return []


def _import_faults(module: str, name: str | None) -> list[str]:
    top = module.split(".")[0]
    if top != "mechsteer":
        # What mechsteer itself needs is there for whoever can open the notebook.
        known = top in sys.stdlib_module_names or any(_plain(each) in _dependencies() for each in _homes(top))
        return [] if known else [f"imports {top or name}, which mechsteer does not depend on"]
    if any(part.startswith("_") for part in f"{module}.{name or ''}".split(".") if part):
        return [f"imports the private {module}.{name or ''}"]
    if name is None or (ROOT / module.replace(".", "/") / name).is_dir():
        return []  # a room, whose own names are checked where they are imported
    listed = _public(module)
    return [] if name in listed else [f"imports {name} from {module}, which does not list it"]


def _public(module: str) -> set[str]:
    """The names that a module lists in `__all__`; of a module without it, those that it defines."""
    loaded = import_module(module)
    defined = {name for name in vars(loaded) if not name.startswith("_")}
    return set(getattr(loaded, "__all__", defined))


def _homes(top: str) -> list[str]:
    return packages_distributions().get(top, [top])


def _dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[\s<>=!~\[;]", each)[0] for each in project["dependencies"]}
    return {_plain(each) for each in named} | {"numpy"}  # which torch, scipy, xarray and pandas all bring


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean_and_uses_what_is_public(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_readme_lists_a_notebook(path: Path):
    assert f"(notebooks/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import mechsteer as ms\nms.run_everything()", "uses ms.run_everything, which mechsteer does not list"),
        ("from mechsteer.patching.grid import _cells", "imports the private mechsteer.patching.grid._cells"),
        ("from mechsteer.patching import numpy", "imports numpy from mechsteer.patching, which does not list it"),
        ("model.hooked._modules", "uses the private _modules"),
        ("import seaborn", "imports seaborn, which mechsteer does not depend on"),
        ('open("/home/somebody/cats.json")', "names a folder of one machine"),
        ("%matplotlib inline", "is no Python"),
    ],
)
def test_a_fault_in_a_cell_is_found(source: str, told: str):
    title, code = nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell(source)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    (fault,) = faults(nbformat.v4.new_notebook(cells=[title, code], metadata=kernel))
    assert told in fault


def test_what_a_run_leaves_behind_is_found():
    code = nbformat.v4.new_code_cell("1 + 1", execution_count=1)
    code.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1)]
    assert faults(nbformat.v4.new_notebook(cells=[code], metadata={"widgets": {}})) == [
        "its kernel is not python3",
        "it stores the state of widgets",
        "its first cell is no title",
        "cell 0 stores outputs, a count or metadata",
    ]
