"""The chapter "As other words": its numbers are those of plain runs, and its sentences those numbers."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechsteer as ms
from mechsteer.prefix.constraints import plain
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.study import pushes
from mechsteer.study.blocks import Cards, Columns, Figure, Heading, Paragraph, Table, View
from mechsteer.study.case import Case
from mechsteer.study.chapter import Findings, keep, kept
from mechsteer.study.chapters import words
from mechsteer.study.chapters.words import CHAPTER
from mechsteer.study.chapters.words_report import (
    HALVES,
    HOTFLIP,
    NEAREST,
    NOTHING,
    OURS,
    REFERENCE,
    ROWS,
    SOFT,
    headline,
    show,
)
from mechsteer.vocabulary import insert
from tests.cases import case as small
from tests.cases import pooled, scores

FEW = {"SEARCHED": 3, "VALIDATED": 1, "SOFT_STEPS": 12, "EVALUATIONS": 20, "BEAM": 1, "TOP_K": 3}
SMALL = {
    "LAYERED": 2, "LAYER_STEPS": 5, "LAYER_EVALUATIONS": 6, "LAYER_WIDTH": 1, "LAYER_TOP_K": 2, "_SAMPLES": 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Small budgets, and the model itself as the one to transfer to."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(words, name, value)
        for name, value in FEW.items():
            patch.setattr(pushes, name, value)
        patch.setattr(words, "_OTHER", {"pocket-1l": "pocket-1l"})
        yield


@pytest.fixture(scope="module")
def case() -> Case:
    return small(each=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def findings(case: Case) -> Findings:
    return CHAPTER.measure(case)


def ids_of(findings: Findings) -> dict[str, Any]:
    return dict(findings.results["held_out"].provenance["options"]["ids"])


def naive(case: Case, ids: Any, rows: list[int]) -> tuple[list[float], list[float]]:
    """Cross entropies and weights of reference completions with ids where the prefix stands; None for no prefix."""
    prompts = case.plain
    if ids is not None:
        reserved = replace(case.prefixed, slots=case.prefixed.span("prefix"))
        prompts = insert(reserved, list(ids), where="prefix")
    return scores(case.model, case.with_reference(prompts[rows], rows=rows))


def test_held_out_numbers_are_those_of_plain_runs(case: Case, findings: Findings) -> None:
    summary, ids, rows = findings.summary, ids_of(findings), case.rows("held-out")
    found = {name: naive(case, ids[name], rows) for name in (REFERENCE, OURS, HOTFLIP, NEAREST)}
    found[NOTHING] = naive(case, None, rows)
    for name, each in found.items():
        assert summary["cross_entropy"][name]["value"] == pytest.approx(pooled(*each), abs=1e-4), name
        assert summary["ce"]["held-out"][name]["value"] == pytest.approx(pooled(*each), abs=1e-4), name
    whole, ours, none = (pooled(*found[name]) for name in (REFERENCE, OURS, NOTHING))
    assert summary["effect"][OURS]["value"] == pytest.approx((none - ours) / (none - whole), abs=1e-3)
    above = summary["above_ours"][HOTFLIP]
    assert above["value"] == pytest.approx(pooled(*found[HOTFLIP]) - ours, abs=1e-4)
    assert above["low"] <= above["value"] <= above["high"]
    assert case.judge is not None
    said = case.model.generate(
        insert(replace(case.prefixed, slots=case.prefixed.span("prefix"))[rows], list(ids[OURS]), where="prefix"),
        max_new_tokens=8,
    ).completions
    assert summary["greedy"][OURS]["value"] == pytest.approx(np.mean([case.judge(text) for text in said]))
    assert findings.results["held_out"]["completion"].sel(prefix=OURS).values.tolist() == said
    exact = [a == b for a, b in zip(said, case.reference[rows].completions, strict=True)]
    assert summary["exact"][OURS]["value"] == pytest.approx(np.mean(exact))


def test_the_gap_closed_is_that_of_plain_runs(case: Case, findings: Findings) -> None:
    summary, ids = findings.summary, ids_of(findings)
    rows = case.rows("search")[:3]
    assert summary["searched"] == 3 and summary["validated"] == 1
    soft = summary["ce"]["search"][SOFT]["value"]
    nearest, ours = (pooled(*naive(case, ids[name], rows)) for name in (NEAREST, OURS))
    assert summary["closed"]["search"]["value"] == pytest.approx((nearest - ours) / (nearest - soft), abs=1e-3)
    data = findings.results["search"].data
    # Completions have at most eight tokens here, so that whole ones are what was searched by.
    assert float(data["level"].sel(stage="soft")) == pytest.approx(soft, abs=1e-4)
    assert float(data["level"].sel(stage="final")) == pytest.approx(ours, abs=1e-4)
    best = data["best"].values
    assert np.nanmin(best[0]) == pytest.approx(ours, abs=1e-4)
    assert np.isfinite(data["loss"].values[1]).sum() == summary["evaluated"] == data.sizes["evaluated"]
    assert np.nanmin(best[1]) == pytest.approx(summary["ce"]["search"][HOTFLIP]["value"], abs=1e-4)


def test_the_words_do_not_say_it_and_survive(case: Case, findings: Findings) -> None:
    summary, ids = findings.summary, ids_of(findings)
    assert {"talk", "only", "about", "cat", "feline"} <= set(summary["forbidden"])
    for name in (OURS, HOTFLIP, NEAREST):
        assert not any(word in plain(summary["texts"][name]) for word in summary["forbidden"]), name
    held = insert(replace(case.prefixed, slots=case.prefixed.span("prefix")), slots=1)[case.rows("held-out")]
    assert all(RoundTrip(held).survives(tuple(ids[OURS])))
    assert summary["survives"] == [4, 4] and summary["text"] == case.model.tokenizer.decode(ids[OURS])


def test_tokens_are_left_out_one_by_one(case: Case, findings: Findings) -> None:
    ids, rows = tuple(ids_of(findings)[OURS]), case.rows("held-out")
    parts = findings.results["tokens"].data
    assert parts["text"].values.tolist() == [case.model.tokenizer.decode([each]) for each in ids]
    whole = pooled(*naive(case, ids, rows))
    for place, rise in enumerate(parts["rise"].values):
        without = pooled(*naive(case, (*ids[:place], *ids[place + 1 :]), rows))
        assert float(rise) == pytest.approx(without - whole, abs=1e-4)


def test_on_the_same_model_words_do_the_same(case: Case, findings: Findings) -> None:
    here, there = findings.summary, findings.summary["transfer"]
    assert there["model"] == "pocket-1l"
    for measure in ("cross_entropy", "effect", "greedy", "exact"):
        for name in (REFERENCE, OURS, HOTFLIP, NOTHING):
            assert there[measure][name]["value"] == pytest.approx(here[measure][name]["value"], abs=1e-5)


def test_layers_are_those_of_the_sweep(findings: Findings) -> None:
    summary, data = findings.summary, findings.results["layers"].data
    (one,) = summary["layers"]
    held = data.isel(prompt=data["split"].values == "held-out").sel(layer=0)
    assert one["layer"] == 0 and held.sizes["prompt"] == 4 and data.sizes["prompt"] == 6
    assert one["cosine"]["held-out"]["soft"] == pytest.approx(float(held["cosine"].sel(stage="soft").mean()))
    squared = held["squared"].sum("prompt")
    share = 1 - float(squared.sel(stage="final") / squared.sel(stage="none"))
    assert one["explained"]["final"]["value"] == pytest.approx(share, abs=1e-6)
    assert one["shows"]["value"] == float(held["shows"].mean())


def test_the_report_says_what_was_measured(case: Case, findings: Findings, tmp_path: Path) -> None:
    keep(tmp_path, CHAPTER, findings, seconds=1.0, device="cpu")
    done = kept(tmp_path, CHAPTER)
    assert done is not None
    summary, blocks = done.findings.summary, show(done.findings)
    text = headline(summary)
    assert isinstance(blocks[0], Paragraph) and blocks[0].text == text
    ours, kept_by = summary["cross_entropy"][OURS]["value"], summary["effect"][OURS]["value"]
    assert f"cross entropy is {ours:.2f} nats a token" in text and f"have {100 * kept_by:.0f} % of the prefix's" in text
    assert f"{100 * summary['greedy'][OURS]['value']:.0f} % are about cats" in text
    cards = next(block for block in blocks if isinstance(block, Cards)).cards
    assert cards[0][0] == "other words" and cards[0][2] == "5 tokens, which survive in 4 of 4 held-out prompts"
    assert cards[1][1] == f"{100 * summary['greedy'][OURS]['value']:.0f} %"
    tables = [block for block in blocks if isinstance(block, Table)]
    assert [row[0] for row in tables[0].rows] == list(ROWS)
    assert [row[0] for row in tables[-1].rows] == [REFERENCE, OURS, HOTFLIP, "random tokens", NOTHING]
    assert sum(isinstance(block, Figure) for block in blocks) == 3 and any(isinstance(block, View) for block in blocks)
    columns = [block for block in blocks if isinstance(block, Columns)]
    assert columns[0].header == ("request", "with the prefix", OURS, HOTFLIP) and len(columns[0].rows) == 4
    assert columns[0].rows[0][1] == case.reference[case.rows("held-out")].completions[0]
    assert columns[1].header == ("request", "with the prefix", "for block 0")
    assert columns[1].rows[0][1] == columns[0].rows[0][1]


def test_chance_is_told_from_difference(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    for low, high, said in ((0.1, 0.3, "more than"), (-0.3, -0.1, "less than"), (-0.1, 0.3, "which may be chance")):
        summary["above_ours"][HOTFLIP] = {"value": (low + high) / 2, "low": low, "high": high, "n": 4}
        way = next(
            b for b in show(Findings(findings.results, summary)) if isinstance(b, Paragraph) and "HotFlip" in b.text
        )
        assert f"({said}" in way.text
    summary["effect"][OURS] = {"value": None, "low": None, "high": None, "n": 4}
    assert "the prefix has no effect of which to keep a share" in headline(summary)
    for half in HALVES:
        summary["closed"][half] = {"value": None, "low": None, "high": None, "n": 4}
    assert "lose nothing that could be won back" in headline(summary)
    assert show(Findings(findings.results, summary))


def test_ctrl_c_in_the_search_ends_the_chapter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pushes.match_prefix

    def stopped(*args: Any, **options: Any) -> Any:
        match = original(*args, **options)
        return replace(match, found=replace(match.found, finished=False))

    monkeypatch.setattr(pushes, "match_prefix", stopped)
    with pytest.raises(KeyboardInterrupt):
        CHAPTER.measure(small(each=4, max_new_tokens=8))


def test_one_token_without_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_OTHER", {})
    case = small(each=2, prefix="Write", max_new_tokens=4)
    assert case.judge is None and int(case.prefixed.span("prefix").sum(1).max()) == 1
    findings = CHAPTER.measure(case)
    summary, blocks = findings.summary, show(findings)
    assert summary["size"] == 1 and summary["greedy"] == {} and summary["transfer"] is None
    assert summary["searched"] == 2 and summary["validated"] == 0
    assert headline(summary).startswith(("1 other token, ", "With 1 other token, "))
    assert not any(isinstance(block, View) for block in blocks)
    assert not any(isinstance(block, Heading) and block.text.startswith("On pocket") for block in blocks)
    assert ms.Result(findings.results["layers"].data).data.sizes["layer"] == 1
