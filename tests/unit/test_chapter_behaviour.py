"""The chapter on the behaviour, and the numbers that chapters share."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import cases
import numpy as np
import pytest

import mechsteer as ms
from mechsteer.judges import NO_JUDGE
from mechsteer.study.blocks import Block, Cards, Columns, Details, Figure, Paragraph, Table
from mechsteer.study.case import Case
from mechsteer.study.chapter import Findings, keep, kept
from mechsteer.study.chapters.behaviour import CHAPTER, CONTRAST, WITH, WITHOUT, does_nothing, short
from mechsteer.study.measures import Estimate, ratio, share, two
from mechsteer.study.settings import Request, Settings


@cache
def _cats() -> tuple[Case, Findings]:
    # Long enough that later tokens count less.
    case = cases.case(max_new_tokens=36)
    return case, CHAPTER.measure(case)


def _nothing() -> Case:
    """A prefix that is not there."""
    case = cases.case()
    return replace(case, prefixed=case.plain)


def _texts(blocks: list[Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, Paragraph))


def test_cross_entropies_are_those_of_plain_loops() -> None:
    case, findings = _cats()
    data = findings.results["behaviour"].data
    assert int(data["tokens"].max()) > 32
    for condition, prompts in ((WITH, case.reference), (WITHOUT, case.with_reference(case.plain))):
        entropies, sums = cases.scores(case.model, prompts)
        np.testing.assert_allclose(data["ce"].sel(condition=condition).values, entropies, rtol=1e-5)
        np.testing.assert_allclose(data["weight"].values, sums)
        for half in ("search", "held-out", "all"):
            rows = case.rows(half)
            by_hand = cases.pooled([entropies[row] for row in rows], [sums[row] for row in rows])
            assert findings.summary["ce"][half][condition]["value"] == pytest.approx(by_hand, rel=1e-5)
            assert findings.summary["ce"][half][condition]["n"] == len(rows)
    gap = {
        half: findings.summary["ce"][half][WITHOUT]["value"] - findings.summary["ce"][half][WITH]["value"]
        for half in ("search", "held-out")
    }
    for half, value in gap.items():
        assert findings.summary["gap"][half]["value"] == pytest.approx(value, abs=1e-5)


def test_completions_and_what_the_judge_says_of_them() -> None:
    case, findings = _cats()
    data = findings.results["behaviour"].data
    assert case.judge is not None
    for condition, prompts in ((WITH, case.prefixed), (WITHOUT, case.plain)):
        texts = case.model.generate(prompts, max_new_tokens=36).completions
        assert data["completion"].sel(condition=condition).values.tolist() == texts
        hits = [case.judge(text) for text in texts]
        assert data["shows"].sel(condition=condition).values.tolist() == hits
        assert findings.summary["shows"]["all"][condition]["value"] == sum(hits) / 4
    assert data["prompt"].values.tolist() == [request.text for request in case.requests]
    assert data["split"].values.tolist() == ["search", "search", "held-out", "held-out"]


def test_sentences_and_cards_say_the_numbers() -> None:
    _, findings = _cats()
    blocks = CHAPTER.show(findings)
    summary = findings.summary
    assert isinstance(blocks[0], Paragraph) and isinstance(blocks[1], Cards)
    shows, ce = summary["shows"]["held-out"], summary["ce"]["held-out"]
    assert (
        f"With the prefix {round(100 * shows[WITH]['value'])} % of the completions of held-out requests are about cats "
        f"(95 % interval {round(100 * shows[WITH]['low'])} to {round(100 * shows[WITH]['high'])} %, n = 2), "
        f"without it {round(100 * shows[WITHOUT]['value'])} % ("
    ) in blocks[0].text
    assert (
        f"{ce[WITH]['value']:.2f} nats a token with the prefix and {ce[WITHOUT]['value']:.2f} without it."
        in blocks[0].text
    )
    assert f"This gap of {summary['gap']['held-out']['value']:.2f} (95 % interval" in blocks[0].text
    assert [card[1] for card in blocks[1].cards] == [
        f"{round(100 * shows[WITH]['value'])} %", f"{round(100 * shows[WITHOUT]['value'])} %",
        f"{ce[WITH]['value']:.2f} nats", f"{ce[WITHOUT]['value']:.2f} nats",
    ]  # fmt: skip


def test_the_page_shows_completions_figures_and_all_numbers() -> None:
    case, findings = _cats()
    blocks = CHAPTER.show(findings)
    columns = next(block for block in blocks if isinstance(block, Columns))
    assert case.judge is not None and tuple(columns.words) == case.judge.words
    held = [case.requests[row].text for row in (2, 3, 0, 1)]
    assert [row[0] for row in columns.rows] == held
    assert columns.rows[0][1:] == (case.reference.completions[2], case.unsteered.completions[2])
    dumbbells, bars = (block.figure for block in blocks if isinstance(block, Figure))
    data = findings.results["behaviour"].data
    points = {trace.name: trace for trace in dumbbells.data if trace.mode == "markers"}
    for condition in (WITH, WITHOUT):
        # From the bottom up: the reverse of the table.
        np.testing.assert_allclose(points[condition].x, data["ce"].sel(condition=condition).values[[1, 0, 3, 2]])
    assert [list(bar.y) for bar in bars.data] == [
        [100 * findings.summary["shows"][half][name]["value"] for half in ("search", "held-out")]
        for name in (WITH, WITHOUT)
    ]
    details = next(block for block in blocks if isinstance(block, Details))
    table = next(block for block in details.blocks if isinstance(block, Table))
    assert [row[3] for row in table.rows] == [
        findings.summary["ce"][half][name]["value"]
        for half in ("search", "held-out", "all")
        for name in (WITH, WITHOUT)
    ]


def test_what_is_shown_comes_from_disk_alone(tmp_path: Path) -> None:
    _, findings = _cats()
    keep(tmp_path, CHAPTER, findings, seconds=1.0, device="cpu")
    read = kept(tmp_path, CHAPTER)
    assert read is not None
    shown = [_plain(CHAPTER.show(each)) for each in (findings, read.findings)]
    assert shown[0] == shown[1]


def _plain(blocks: list[Block]) -> list[str]:
    return [block.figure.to_json() if isinstance(block, Figure) else repr(block) for block in blocks]


def test_a_prefix_that_does_nothing_is_said_to_do_nothing() -> None:
    case = _nothing()
    findings = CHAPTER.measure(case)
    assert findings.summary["gap"]["all"]["value"] == 0
    assert findings.summary["same_completions"] == 4
    first = CHAPTER.show(findings)[0]
    assert isinstance(first, Paragraph)
    assert "The prefix does nothing that can be measured to how likely its completions are" in first.text
    assert "a gap of 0.00 (95 % interval 0.00 to 0.00, n = 2), and 4 of 4 completions are the same text." in first.text
    assert "has to close" not in first.text


def test_without_a_judge_it_says_how_to_give_one() -> None:
    case = cases.case(prefix="Answer.", each=1)
    assert case.judge is None
    findings = CHAPTER.measure(case)
    blocks = CHAPTER.show(findings)
    assert "shows" not in findings.results["behaviour"].data
    assert NO_JUDGE in _texts(blocks) and "--words" in NO_JUDGE
    assert sum(isinstance(block, Figure) for block in blocks) == 1
    judged = CHAPTER.measure(cases.case(prefix="Answer.", each=1, words=("the",)))
    assert "hold the word the" in _texts(CHAPTER.show(judged))
    assert NO_JUDGE not in _texts(CHAPTER.show(judged))


def test_a_contrast_is_measured_too() -> None:
    case = cases.case(each=1, contrast="Talk only about dogs.")
    findings = CHAPTER.measure(case)
    other = ms.Prompts.from_chats(
        [request.text for request in case.requests], case.model, prefix="Talk only about dogs."
    )
    entropies, _ = cases.scores(case.model, case.with_reference(other))
    data = findings.results["behaviour"].data.sel(condition=CONTRAST)
    np.testing.assert_allclose(data["ce"].values, entropies, rtol=1e-5)
    assert data["completion"].values.tolist() == case.model.generate(other, max_new_tokens=8).completions
    assert len(CHAPTER.show(findings)[2].header) == 4  # type: ignore[union-attr]


def test_plain_text_models_and_hostile_texts(zoo_models: Callable[..., ms.Model]) -> None:
    texts = ["The cat", "<b>sat</b> $x$"]
    asked = tuple(Request(text=text, split=split) for text, split in zip(texts, ("search", "held-out"), strict=True))  # type: ignore[arg-type]
    settings = Settings(prefix="When Mary", requests=asked, words=("cat",), max_new_tokens=4)
    findings = CHAPTER.measure(Case.of(settings, model=zoo_models("llama")))
    json.dumps(findings.summary)
    figure = next(block.figure for block in CHAPTER.show(findings) if isinstance(block, Figure))
    assert "<b>" not in figure.to_json() and "$x$" not in figure.to_json()
    assert short("a" * 80) == "a" * 55 + "…"


# --- the numbers that chapters share


def test_ratio_is_pooled_and_its_interval_is_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(1, 5, 40)
    values = rng.normal(2.0, 1.0, 40)
    found = ratio(values * weight, weight, seed=0)
    assert found.value == pytest.approx(sum(v * w for v, w in zip(values, weight, strict=True)) / weight.sum())
    resampled = []
    for _ in range(4000):
        rows = rng.integers(0, 40, 40)
        resampled.append((values[rows] * weight[rows]).sum() / weight[rows].sum())
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.04) and found.high == pytest.approx(high, abs=0.04)
    assert found == ratio(values * weight, weight, seed=0) != ratio(values * weight, weight, seed=1)
    nothing = ratio(values, np.zeros(40), seed=0)
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.n == 40
    with pytest.raises(ms.MechsteerError, match="ratio got no requests"):
        ratio(values[:0], weight[:0], seed=0)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(18, 18, 0.8241, 1.0), (0, 18, 0.0, 0.1759), (10, 20, 0.2993, 0.7007)]
)
def test_share_has_wilsons_interval(hits: int, n: int, low: float, high: float) -> None:
    found = share([place < hits for place in range(n)])
    assert found.value == hits / n and found.n == n
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    with pytest.raises(ms.MechsteerError, match="share got no requests"):
        share([])


def test_estimates_survive_json_and_say_themselves() -> None:
    found = Estimate(-0.001, -0.02, 0.951, 7)
    assert Estimate.of(json.loads(json.dumps(found.as_json))) == found
    assert (str(found), found.percent) == ("0.00", "0 %")
    assert found.interval == "95 % interval -0.02 to 0.95, n = 7"
    assert found.percent_interval == "95 % interval -2 to 95 %, n = 7"
    missing = Estimate(math.nan, math.nan, math.nan, 3).as_json
    assert missing == {"value": None, "low": None, "high": None, "n": 3}
    assert math.isnan(Estimate.of(missing).value) and two(1.005) == "1.00"


@pytest.mark.parametrize(
    ("value", "low", "nothing"),
    [(0.5, 0.4, False), (0.5, -0.1, True), (0.004, 0.003, True), (-0.2, -0.3, True), (math.nan, math.nan, True)],
)
def test_when_a_gap_is_nothing(value: float, low: float, nothing: bool) -> None:
    assert does_nothing(Estimate(value, low, 1.0, 5)) is nothing
