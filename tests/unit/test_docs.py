"""The pages: their code runs and prints what they show, the names they give exist, and their pictures are light."""

import importlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

import mechsteer as ms

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
# A block of Python, and the block of output behind it that is shown and compared, if there is one.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)
MAPS = ("propagator.md", "prefix.md", "strength.md")


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page loads the pocket model; here it is loaded once."""
    monkeypatch.setattr(ms, "load_model", _load)


_real_load = ms.load_model


@cache
def _load(*what: object, **options: object) -> ms.Model:
    return _real_load(*what, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_python_of_a_page_runs_and_prints_what_it_shows(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) == page.read_text(encoding="utf-8").count("```python")
    names: dict[str, object] = {}
    for number, (code, shown) in enumerate(blocks, 1):
        printed = io.StringIO()
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        if shown:
            assert lines(printed.getvalue()) == lines(shown), f"block {number} of {page.name}"


def test_pages_show_what_they_print() -> None:
    """Were no output compared, the test above could hardly fail."""
    assert sum(bool(shown) for page in WITH_CODE for _, shown in BLOCK.findall(page.read_text())) >= 20


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def names_in(page: Path) -> Iterator[str]:
    """Dotted names in backticks, outside of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`(mechsteer(?:\.\w+)+)`", text)


def resolve(path: str) -> object:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_name_in_the_pages_exists(page: Path) -> None:
    missing = []
    for path in sorted(set(names_in(page))):
        try:
            resolve(path)
        except (ModuleNotFoundError, AttributeError):
            missing.append(path)
    assert not missing


def test_the_maps_of_the_documents_name_functions() -> None:
    named = {page: len(set(names_in(DOCS / page))) for page in MAPS}
    assert all(count >= 10 for count in named.values()), named


def test_every_benchmark_has_a_row_and_every_command_a_script() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (DOCS.parent / "benchmarks").glob("*.py")}
    assert set(re.findall(r"benchmarks/(\w+\.py)", text)) == scripts


def test_pictures_are_light_and_have_words() -> None:
    heavy = {path.name: path.stat().st_size for path in (DOCS / "images").iterdir() if path.stat().st_size > 200_000}
    assert not heavy
    unsaid = [page.name for page in PAGES for said in re.findall(r"!\[(.*?)\]\(", page.read_text()) if not said]
    assert not unsaid
