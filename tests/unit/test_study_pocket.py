"""The main job for real, small: every chapter that ships, from the question to a page in a browser."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import console_and_network, dump_dom, needs_browser, screenshot
from cases import CATS, model, requests
from markupsafe import escape

import mechsteer as ms
from mechsteer.study import Study, load, study
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Source, Table, View
from mechsteer.study.chapters import NAMES, chapters
from mechsteer.study.executive import QUESTIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("study") / "cats"
    return study(
        CATS, out=out, model=model("pocket"), requests=requests(3), max_new_tokens=8, progress=False, device="cpu"
    )


def test_every_chapter_has_findings_and_a_summary(done: Study) -> None:
    assert not done.failures
    assert list(done.results) == list(NAMES) == list(done.summary["chapters"])
    assert all(done.results[name] for name in NAMES)


def test_what_is_on_disk_is_the_study(done: Study) -> None:
    again = load(done.report.parent)
    assert again.summary["chapters"] == done.summary["chapters"]
    for name in NAMES:
        for key, result in done.results[name].items():
            assert again.results[name][key].data.identical(result.data)


# --- the executive summary


def test_every_number_of_the_executive_summary_is_on_disk(done: Study) -> None:
    written = json.loads((done.folder / "summary.json").read_text())
    assert [each["question"] for each in written["answers"]] == [*QUESTIONS, "What to keep in mind"]
    page = re.sub(r"<script\b.*?</script>", "", done.report.read_text(), flags=re.DOTALL)
    places = set(re.findall(r'\bid="([^"]+)"', page))
    assert len(places) == len(re.findall(r'\bid="', page)), "no place has the name of another"
    for answer in written["answers"]:
        for sentence in answer["sentences"]:
            assert sentence["text"] in done.summary_text.replace("\n", " ")
            assert sentence["link"] is None or sentence["link"] in places
            assert sentence["link"] is None or f'href="#{sentence["link"]}"' in page
            rest = sentence["text"]
            for cited in sentence["cited"]:
                value: Any = written["chapters"][cited["chapter"]]["summary"]
                for step in cited["path"]:
                    value = value[step]
                rest = rest.replace(cited["text"], "", 1)
                if isinstance(value, str):
                    assert cited["text"] in (value, repr(value))
                elif value is not None:
                    shown = float(cited["text"].removesuffix(" %"))
                    # Two digits after the point, three of a number, or whole percent of a share or of percent.
                    near = [abs(shown - scale * value) <= max(0.5001, 0.005 * abs(shown)) for scale in (1, 100)]
                    assert any(near), cited
            assert not re.search(r"\d", re.sub(r"95 % interval|holds 0", "", rest)), sentence
    assert "cannot be put into sentences" not in done.summary_text


def test_the_report_and_the_folder_are_small(done: Study) -> None:
    page = done.report.read_text()
    own = "".join(each for each in re.split(r"(<script\b.*?</script>)", page, flags=re.DOTALL) if len(each) < 1_000_000)
    # plotly and CircuitsVis take 6.2 MB, whatever a study holds.
    assert len(page.encode()) < 7_500_000 and len(own.encode()) < 900_000


# --- the code that makes numbers again


def blocks_of(name: str, done: Study) -> Iterator[Block]:
    (chapter,) = chapters([name])

    def flat(blocks: Any) -> Iterator[Block]:
        for block in blocks:
            yield block
            if isinstance(block, Details):
                yield from flat(block.blocks)

    return flat(chapter.show(done.findings[name]))


def last_value(code: str) -> Any:
    """What the last line of code gives in a fresh interpreter's namespace."""
    tree = ast.parse(code)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(tree, "code of the report", "exec"), names)
    return eval(compile(ast.Expression(last.value), "code of the report", "eval"), names)


def same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple) and one and isinstance(one[0], dict):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif np.asarray(one).dtype.kind in "OUb":
        assert np.asarray(one).tolist() == np.asarray(other).tolist()
    else:
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_table_and_card_has_code_that_loads_its_numbers(name: str, done: Study) -> None:
    page, found = done.report.read_text(), {}
    for block in blocks_of(name, done):
        if isinstance(block, Cards | Table | Columns | Figure | View):
            assert block.sources, f"{type(block).__name__} {getattr(block, 'caption', '')!r} says how it is made again"
            found |= {source.name: source for source in block.sources}
    assert len(found) >= 4
    for source in found.values():
        value = np.asarray(last_value(source.loading(str(done.folder))))
        assert value.size and (value.dtype.kind != "f" or np.isfinite(value).any())
        code = source.measuring(str(done.folder))
        # What is imported is there; what is filled in is.
        for line in ast.parse(code).body:
            if isinstance(line, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([line], []), "imports", "exec"), {})
        assert not re.search(r"\{(entry|first|feature|times|picked|alpha|model)\}", code.replace('f"blocks', ""))
        assert f"<pre>{escape(code)}</pre>" in page


# One number of each chapter is measured again; the searches are too slow for that.
AGAIN = {
    "behaviour": "table", "entry": "heads", "travel": "cards", "vector": "cards", "strength": "completions",
    "features": "prefixes", "words": "cards", "together": "states",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_the_same_when_it_is_measured_again(
    name: str, done: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Loading the model is tested elsewhere, and takes longest.
    monkeypatch.setattr("mechsteer.study.case.load_model", lambda name, **options: model(name))
    sources = [source for block in blocks_of(name, done) for source in getattr(block, "sources", ())]
    source: Source = next(each for each in sources if each.name == AGAIN[name])
    same(last_value(source.loading(str(done.folder))), last_value(source.measuring(str(done.folder))))


def test_a_case_of_other_weights_is_refused(done: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechsteer.study.case.load_model", lambda name, **options: model("pocket-1l"))
    with pytest.raises(ms.MechsteerError, match=r"pocket now has the weights \w{12}, and this study was made with"):
        done.case()


@needs_browser
def test_a_browser_shows_every_chapter_without_a_complaint_or_a_request(done: Study, tmp_path: Path) -> None:
    dom = dump_dom(done.report)
    assert 'data-ready="true"' in dom
    for name in NAMES:
        part = dom.split(f'<section class="chapter" id="{name}"')[1].split("</section>")[0]
        assert part.count('class="main-svg"') >= 2, f"plotly drew in {name}"
        assert "Failed" not in part
    assert 'class="mechsteer-view"' in dom, "CircuitsVis drew"
    console, addresses = console_and_network(done.report)
    assert console == [] and addresses == []
    assert screenshot(done.report, tmp_path / "report.png", width=1280).stat().st_size > 20_000


def test_a_base_model_without_a_chat_template(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    asked = ["One day a girl", "The sun was", "They went to", "A dog ran"]
    base = zoo_models("llama")
    done = study("Once upon a time.", out=tmp_path / "s", model=base, requests=asked, max_new_tokens=4, progress=False)
    # Random weights: the prefix may do nothing, which is then said, and nothing else goes wrong.
    assert "behaviour" in done.results and done.report.exists()
    assert all("there is nothing" in reason for reason in done.failures.values())
