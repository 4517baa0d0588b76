"""The report: everything in one file, hostile texts shown as text, and drawn in a browser without a complaint."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from browser import console_and_network, dump_dom, needs_browser, screenshot

import mechsteer as ms
from mechsteer import plots
from mechsteer.activations import ModelId
from mechsteer.study import Chapter, Findings, Settings, as_requests
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Heading, Paragraph, Source, Table, View
from mechsteer.study.chapter import Finished
from mechsteer.study.executive import Answer
from mechsteer.study.report import Section, cell, headline, marked, prose, render, safe_json
from mechsteer.study.sentences import Cited, Sentence

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028' {{ 7 * 7 }} \ud800"
SHOWN = html.escape(HOSTILE, quote=False).split(">&amp;amp;")[0]


def section(blocks: Sequence[Block], *, name: str = "first", failure: str | None = None) -> Section:
    chapter = Chapter(name, f"Title {name}", "Why?", lambda case: Findings(), lambda findings: blocks)
    return Section.of(chapter, Finished(Findings(), 1.25, "2026-01-02T03:04:05+00:00", "cpu", "0.1.0"), failure)


def page(*sections: Section, answers: Sequence[Answer] = (), **settings: Any) -> str:
    given = Settings.of(
        **({"prefix": "Talk only about cats.", "requests": as_requests(["a", "b", "c"], seed=0)} | settings)
    )
    commands = {"shell": "mechsteer study 'Talk'", "python": "study('Talk')"}
    return render(given, ModelId("pocket", "0123456789abcdef", False), sections, commands=commands, answers=answers)


def figure(text: str = "layer") -> go.Figure:
    data = xr.Dataset({"effect": (("layer", "pos"), np.linspace(-1, 1, 12).reshape(3, 4))})
    data = data.assign_coords(pos_token=("pos", [text, "b", "c", "d"]))
    return plots.draw(ms.Result(data))


def every_block(text: str) -> list[Block]:
    attention = np.tril(np.ones((2, 3, 3))) / 3
    return [
        Paragraph(text),
        Heading(text),
        Cards([(text, text, text)], sources=[Source("cards", text, text, text)]),
        Table([text, "n"], [[text, 1], [text, None]], text, sources=[Source("table", text, text, text)]),
        Columns([text, text], [[text, text]] * 8, text, words=["owned"], shown=2),
        Figure(figure(text), text),
        View(plots.attention(attention, [text, "b", "c"]), text),
        View(plots.tokens([text, "b"], [0.5, -1.0]), text, height=120),
        Details(text, [Paragraph(text), Figure(figure(text), text)]),
    ]


def own_markup(text: str) -> str:
    """A page without plotly's and CircuitsVis's own code."""
    return "".join(part for part in re.split(r"(<script\b.*?</script>)", text, flags=re.DOTALL) if len(part) < 200_000)


# --- pieces


def test_marked_escapes_and_marks_whole_words_in_any_case() -> None:
    assert marked("A <b>Cat</b> & catnip; cat-flap", ["cat"]) == (
        "A &lt;b&gt;<mark>Cat</mark>&lt;/b&gt; &amp; catnip; <mark>cat</mark>-flap"
    )
    assert marked("C++ and c, big cats", ["c", "C++", "big cats"]) == (
        "<mark>C++</mark> and <mark>c</mark>, <mark>big cats</mark>"
    )
    assert marked("amp & lt <", ["amp", "lt"]) == "<mark>amp</mark> &amp; <mark>lt</mark> &lt;"
    assert marked("<i>", []) == "&lt;i&gt;"


def test_numbers_stay_with_their_signs() -> None:
    assert prose("94 % (n = 18), in 3 s, column = 4") == "94\u00a0% (n\u00a0=\u00a018), in 3 s, column = 4"


def test_cells() -> None:
    assert [cell(value) for value in (3, 123456, 0.123456, 1e-9, float("nan"), None, "x")] == [
        "3", "123456", "0.1235", "1e-09", "–", "–", "x",
    ]  # fmt: skip


def test_json_in_a_script_cannot_end_it_and_reads_back() -> None:
    value = {"text": HOSTILE, "comment": "<!-- <script>", "nan": float("nan"), "array": np.arange(3)}
    text = str(safe_json(value))
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == {"text": HOSTILE, "comment": "<!-- <script>", "nan": None, "array": [0, 1, 2]}
    assert json.loads(str(safe_json(figure()))).keys() >= {"data", "layout"}


def test_what_came_out_is_the_first_paragraph_and_headlines_are_the_first_cards() -> None:
    first = section([Heading("h"), Paragraph("It moves."), Cards([("a", "1", "n")]), Cards([("b", "2", "")])])
    assert first.lead == "It moves." and [type(block) for block in first.blocks] == [Heading, Cards, Cards]
    assert headline([first, section([])]) == [("Title first", "a", "1", "n")]
    assert own_markup(page(first)).count("It moves.") == 2


def test_scripts_are_only_there_where_something_needs_them() -> None:
    sizes = [len(page(section(blocks))) for blocks in ([], [Figure(figure())], [View(plots.tokens(["a"], [1.0]))])]
    assert sizes[0] < 50_000 < sizes[2] < sizes[1]
    twice = page(section([Figure(figure()), Details("more", [Figure(figure()), View(plots.tokens(["a"], [1.0]))])]))
    assert len(twice) < sizes[1] + sizes[2]


def test_hostile_texts_stay_text() -> None:
    shown = page(
        section(every_block(HOSTILE)), section([], name="second", failure=HOSTILE), prefix=HOSTILE, contrast=HOSTILE
    )
    text = own_markup(shown)
    assert "<img" not in text
    assert text.count("&lt;/script&gt;&lt;img src=x onerror=") > 20
    assert "{{ 7 * 7 }}" in text and "49" not in re.sub(r"[0-9a-f.]{3,}", "", text)
    shown.encode("utf-8")
    # Every script that begins ends once, so no text ended one early.
    assert len(re.findall(r"<script\b", text)) == len(re.findall(r"</script>", text))


def test_the_executive_summary_is_text_and_leads_to_what_shows_it() -> None:
    said = Sentence((HOSTILE, Cited(HOSTILE, "first", (HOSTILE,), strong=True)), "first", "table")
    nowhere = Sentence(("It is not shown.",), "absent", "cards")
    shown = page(section(every_block("cats")), answers=(Answer(HOSTILE, (said, nowhere)),))
    text = own_markup(shown)
    assert "<img" not in text and "It is not shown." in text and 'href="#absent' not in text
    assert 'href="#first-table" aria-label="Shown in chapter 1, Title first"' in text
    assert text.count('id="first-table"') == 1 == text.count('id="first-cards"')
    assert "<b title=" in text and len(re.findall(r"<script\b", text)) == len(re.findall(r"</script>", text))


def test_code_is_a_program_with_its_imports_first() -> None:
    source = Source("x", "Numbers", "study.results", "import numpy as np\n\nfrom a import b\n\nx = b()\n\nx + 1")
    assert source.loading("out") == "from mechsteer.study import load\n\nstudy = load('out')\nstudy.results"
    assert source.measuring("o'ut") == (
        "import numpy as np\n\nfrom a import b\nfrom mechsteer.study import load\n\n"
        'study = load("o\'ut")\ncase = study.case()\nx = b()\n\nx + 1'
    )


def test_a_chapter_that_cannot_be_shown_says_why() -> None:
    broken = Chapter("b", "B", "?", lambda case: Findings(), lambda findings: [1 / 0])  # type: ignore[list-item]
    finished = Finished(Findings(), 1.0, "2026-01-02T03:04:05+00:00", "cpu", "0.1.0")
    made = Section.of(broken, finished, None)
    assert made.failure == (
        "its findings cannot be shown (ZeroDivisionError: division by zero). If an older mechsteer made them, "
        "remove chapters/b and run the study again."
    )
    assert "There is no answer here: its findings cannot be shown" in page(made)


def test_the_page_forbids_itself_the_network() -> None:
    text = page(section(every_block("cats")))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'") and "http" not in policy[1]
    assert not re.search(r'(?:src|href|action)="(?!#|data:)', own_markup(text))


# --- in a browser


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    failed = section([], name="third", failure="It could not be asked.")
    first, second = section(every_block("cats owned")), replace(section(every_block(HOSTILE), name="second"))
    path.write_text(page(first, second, failed), encoding="utf-8")
    return path


@needs_browser
def test_a_browser_draws_every_chapter_without_a_complaint_or_a_request(written: Path, tmp_path: Path) -> None:
    dom = dump_dom(written)
    assert 'data-ready="true"' in dom
    assert "<title>Talk only about cats." in dom and "owned</title>" not in dom
    for name in ("first", "second"):
        part = dom.split(f'<section class="chapter" id="{name}"')[1].split("</section>")[0]
        assert part.count('class="main-svg"') >= 2, "plotly drew"
        assert part.count('class="mechsteer-view"') == 2 == part.count('id="view-'), "CircuitsVis drew"
        assert "<img" not in part
    console, addresses = console_and_network(written)
    assert console == [] and addresses == []
    assert screenshot(written, tmp_path / "report.png", width=1280).stat().st_size > 20_000


PROBE = """<!doctype html><body><iframe id="page" style="width:390px;height:900px" src="data:,"></iframe>
<script>
window.addEventListener("message", (event) => document.body.setAttribute("data-told", JSON.stringify(event.data)));
</script>"""

# Runs in the page itself: what a reader of 390 px has, and what the buttons do.
TOLD = """<script>window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement, plot = document.querySelector(".plot");
  const told = { wide: root.scrollWidth, theme: root.dataset.theme, ink: plot._fullLayout.font.color };
  document.getElementById("theme").click();
  const folded = document.querySelector("details.more .plot");
  told.before = folded.childElementCount;
  document.querySelector("details.more").open = true;
  setTimeout(() => {
    told.other = root.dataset.theme;
    told.otherInk = plot._fullLayout.font.color;
    told.after = folded.childElementCount;
    told.foldedWidth = folded.querySelector(".main-svg")?.clientWidth;
    told.wideAfter = root.scrollWidth;
    parent.postMessage(told, "*");
  }, 1500);
}, 1500))</script>"""


@needs_browser
def test_on_a_phone_nothing_hangs_over_and_the_theme_turns(written: Path, tmp_path: Path) -> None:
    text = written.read_text().replace("</body>", f"{TOLD}</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE.replace("data:,", "page.html"))
    dom = dump_dom(tmp_path / "probe.html", seconds=12)
    told = json.loads(html.unescape(re.search(r'data-told="([^"]*)"', dom)[1]))  # type: ignore[index]
    assert told["wide"] <= 390 and told["wideAfter"] <= 390
    assert {told["theme"], told["other"]} == {"light", "dark"}
    assert told["ink"] == plots.LIGHT["template"]["layout"]["font"]["color"]
    assert told["otherInk"] == plots.DARK["template"]["layout"]["font"]["color"]
    assert told["before"] == 0 and told["after"] > 0 and 200 < told["foldedWidth"] <= 390
