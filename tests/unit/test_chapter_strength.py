"""The chapter "How strong": its numbers are those of plain runs, and its sentences those numbers."""

from copy import deepcopy

import numpy as np
import pytest

import mechsteer as ms
from mechsteer.study.blocks import Cards, Columns, Figure, Paragraph
from mechsteer.study.case import Case
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.strength import CHAPTER, CURVE, SHOWN, WEIGHT
from mechsteer.study.chapters.strength_report import headline, show
from mechsteer.study.measures import CE, weights
from tests.cases import case as small


@pytest.fixture(scope="module")
def case() -> Case:
    return small("pocket", each=6, max_new_tokens=16)


@pytest.fixture(scope="module")
def findings(case: Case) -> Findings:
    return CHAPTER.measure(case)


def _direction(case: Case, findings: Findings) -> ms.Direction:
    """The picked vector, from the mean activations of plain runs."""
    layer, search = findings.summary["layer"], case.rows("search")
    site, means = ms.Site("resid_post", layer), []
    for prompts in (case.reference[search], case.with_reference(case.plain)[search]):
        run = case.model.run(prompts, record=site)
        span = run.prompts.span("completion")[..., None]
        each = (run.activations[site] * span).sum(1) / span.sum(1)
        means.append(each.mean(0))
    return ms.Direction(means[0] - means[1], site, case.model.id)


def test_held_out_numbers_are_those_of_plain_runs(case: Case, findings: Findings) -> None:
    model, summary, held = case.model, findings.summary, case.rows("held-out")
    direction, own = _direction(case, findings), case.unsteered[held]
    assert case.judge is not None
    for step in SHOWN:
        alpha = step * summary["alpha"]
        at = CURVE.index(step)
        assert summary["alphas"][at] == pytest.approx(alpha)
        add = ms.Add(direction, alpha)
        weight = weights(own)
        rise = (CE(model.run(own, [add])) - CE(model.run(own))).double().numpy()
        assert summary["rise"][at]["value"] == pytest.approx(float((rise * weight).sum() / weight.sum()), abs=1e-3)
        done = model.generate(case.plain[held], interventions=[add], max_new_tokens=16)
        shown = [case.judge(text) for text in done.completions]
        assert summary["target"][at]["value"] == pytest.approx(np.mean(shown), abs=1e-6)
        column = findings.results["held_out"]["completion"].sel(condition=f"times {alpha:.3g}")
        assert column.values.tolist() == done.completions


def test_the_score_at_the_chosen_strength_is_what_was_weighed(case: Case, findings: Findings) -> None:
    model, summary, search = case.model, findings.summary, case.rows("search")
    one = findings.results["chosen"].data.sel(direction=summary["picked"])
    add = ms.Add(_direction(case, findings), summary["alpha"])
    own = case.unsteered[search]
    cost = float((CE(model.run(own, [add])) - CE(model.run(own))).mean())
    assert case.judge is not None
    done = model.generate(
        case.plain[search], interventions=[add], max_new_tokens=16, temperature=1.0, seed=case.settings.seed
    )
    share = np.mean([case.judge(text) for text in done.completions])
    at = int(np.nanargmin(np.abs(one["point_alpha"].values - summary["alpha"])))
    assert float(one["score"][at]) == pytest.approx(share - WEIGHT * cost, abs=0.01)
    assert float(one["score"][at]) >= float(np.nanmax(one["score"].values)) - 1e-9


def test_the_local_law_is_that_of_small_strengths(case: Case, findings: Findings) -> None:
    model, laws, own = case.model, findings.summary["laws"], case.unsteered[case.rows("held-out")]
    direction, weight = _direction(case, findings), weights(own)
    step = 0.05

    def ce(alpha: float) -> float:
        value = CE(model.run(own, [ms.Add(direction, alpha)])).double().numpy()
        return float((value * weight).sum() / weight.sum())

    assert (ce(step) - ce(-step)) / (2 * step) == pytest.approx(laws["slope"], abs=2e-3)
    far = 200 * laws["scale"]
    assert ce(far) - ce(0.0) == pytest.approx(laws["plateau"][1], rel=0.1)


def test_the_report_says_what_was_measured(findings: Findings) -> None:
    summary, blocks = findings.summary, show(findings)
    text = headline(summary)
    assert isinstance(blocks[0], Paragraph) and blocks[0].text == text
    at = CURVE.index(1.0)
    assert f"{summary['alpha']:.3g} times the vector, added after block {summary['layer']}" in text
    assert f"{100 * summary['target'][at]['value']:.0f} % of the completions then are about cats" in text
    assert sum(isinstance(block, Figure) for block in blocks) == 3
    cards = next(block for block in blocks if isinstance(block, Cards)).cards
    assert cards[0][1] == f"{summary['alpha']:.3g}"
    columns = next(block for block in blocks if isinstance(block, Columns))
    assert columns.header[1:3] == ("with the prefix", "without it") and len(columns.header) == 6


def test_a_push_that_does_not_work_is_told(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    summary["works"] = False
    text = headline(summary)
    assert text.startswith("No strength of any of the vectors is better than none")
    cards = next(block for block in show(Findings(findings.results, summary)) if isinstance(block, Cards)).cards
    assert cards[0][2] == "better than none by less than two standard errors"


def test_without_a_judge_the_reference_completions_count() -> None:
    case = small("pocket-1l", each=3, prefix="Be kind to everyone you meet.", max_new_tokens=6)
    assert case.judge is None
    findings = CHAPTER.measure(case)
    assert findings.summary["shows"] == {} and not findings.summary["judged"]
    assert "cross entropy goes from" in headline(findings.summary) or not findings.summary["works"]
    held = case.rows("held-out")
    forced, weight = case.with_reference(case.plain)[held], weights(case.with_reference(case.plain)[held])
    plain = CE(case.model.run(forced)).double().numpy()
    expected = float((plain * weight).sum() / weight.sum())
    assert findings.summary["reference"][CURVE.index(0.0)]["value"] == pytest.approx(expected, abs=1e-4)
    assert sum(isinstance(block, Figure) for block in show(findings)) == 3
