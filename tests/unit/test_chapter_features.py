"""The chapter "As features": its numbers are those of plain runs, and its sentences those numbers."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import autoencoder
from cases import case as small
from cases import model as shipped_model
from cases import requests

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.result import rank_correlation
from mechsteer.study.blocks import Cards, Columns, Figure, Paragraph, Table, View
from mechsteer.study.case import Case
from mechsteer.study.chapter import Findings, keep, kept
from mechsteer.study.chapters import features
from mechsteer.study.chapters.behaviour import WITH, WITHOUT
from mechsteer.study.chapters.features import CHAPTER
from mechsteer.study.chapters.features_report import ADD, BACK, CLAMP, HARD, SOFT, headline, show
from mechsteer.study.measures import CE, Estimate, weights
from mechsteer.study.settings import Settings

STRENGTHS = (1.0, 2.0)


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Fewer strengths, steps and candidates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STRENGTHS", STRENGTHS)
        patch.setattr(features, "_STEPS", 12)
        patch.setattr(features, "_EVALUATIONS", 24)
        patch.setattr(features, "_REQUESTS", 2)
        yield


@pytest.fixture(scope="module")
def case() -> Case:
    return small("pocket", each=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def findings(case: Case) -> Findings:
    return CHAPTER.measure(case)


@pytest.fixture(scope="module")
def sae() -> ms.SparseAutoencoder:
    return ms.load_sae("pocket")


def encoded(case: Case, sae: Any, prompts: ms.Prompts, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [token, feature] of one prompt, from TransformerLens's own cache; and which tokens are said."""
    ids = prompts.tokens[row][prompts.mask[row]]
    _, cache = case.model.hooked.run_with_cache(ids[None])
    said = torch.arange(len(ids)) > int(prompts[row].padded("right").decision)
    return sae.module.encode(cache[sae.site.hook_name][0]), said


def pooled(values: Any, weight: np.ndarray) -> float:
    return float((values.double().numpy() * weight).sum() / weight.sum())


def test_the_rankings_are_those_of_plain_loops(case: Case, findings: Findings, sae: Any) -> None:
    found, search = findings.results["features"].data, case.rows("search")
    forced = case.with_reference(case.plain)
    means = {}
    for name, prompts in (("with", case.reference), ("without", forced), ("own", case.unsteered)):
        rows = [encoded(case, sae, prompts, row) for row in search]
        means[name] = torch.stack([each[said].mean(0) for each, said in rows]).mean(0)
    listed = found["feature"].values.tolist()
    for name, mean in means.items():
        np.testing.assert_allclose(found[name].values, mean[listed], atol=2e-3)
    order = (means["with"] - means["without"]).argsort(descending=True).tolist()
    assert findings.summary["feature"] == order[0] == listed[0]
    assert [place + 1 for place in range(6)] == found["contrast_rank"].values[:6].tolist()
    # Similarity: the decoder row's cosine with the difference of means.
    states = []
    for prompts in (case.reference, forced):
        run = case.model.run(prompts[search], record=sae.site)
        span = run.prompts.span("completion")[..., None]
        states.append(((run.activations[sae.site] * span).sum(1) / span.sum(1)).mean(0))
    cosine = torch.nn.functional.cosine_similarity(sae.decoder, (states[0] - states[1])[None])
    np.testing.assert_allclose(found["cosine"].values, cosine[listed], atol=1e-4)
    assert listed[found["similarity_rank"].values.tolist().index(1)] == int(cosine.abs().argmax())
    assert set(found["attribution_rank"].values.tolist()) >= {1, 2, 3, 4, 5, 6}


def test_an_attribution_is_the_slope_towards_the_prefix(case: Case, findings: Findings, sae: Any) -> None:
    found, search, feature = findings.results["features"].data, case.rows("search"), findings.summary["feature"]
    forced, reference = case.with_reference(case.plain)[search].padded("right"), case.reference[search]
    own = torch.zeros(*forced.tokens.shape, 1)
    aim = own.clone()
    for row in range(len(search)):
        here, _ = encoded(case, sae, forced, row)
        there, _ = encoded(case, sae, reference, row)
        own[row, : len(here), 0] = aim[row, : len(here), 0] = here[:, feature]
        # All but BOS and what opens the user's turn, which stand before the prefix.
        same = min(len(here) - 2, len(there))
        aim[row, len(here) - same : len(here), 0] = there[-same:, feature]
    step = 1e-2
    ends = [CE(case.model.run(forced, [ms.SetFeature(sae, feature, own + s * step * (aim - own))])) for s in (1, -1)]
    slope = float(-(ends[0] - ends[1]).double().mean() / (2 * step))
    one = found.sel(feature=feature)
    assert float(one["attribution"]) == pytest.approx(slope, rel=0.05)
    assert slope > 0 and float(one["attribution_low"]) <= float(one["attribution"]) <= float(one["attribution_high"])


def test_the_level_the_rest_and_what_the_autoencoder_explains(case: Case, findings: Findings, sae: Any) -> None:
    summary, feature = findings.summary, findings.summary["feature"]
    said, own = (
        torch.cat([each[mask][:, feature] for each, mask in (encoded(case, sae, p, r) for r in case.rows("search"))])
        for p in (case.reference, case.unsteered)
    )
    assert summary["level"] == pytest.approx(float(said[said > 0].quantile(0.9)), rel=1e-4)
    assert summary["rest"] == pytest.approx(float(own.mean()), abs=1e-3)
    states = []
    for row in case.rows("held-out"):
        ids = case.reference.tokens[row][case.reference.mask[row]]
        states.append(case.model.hooked.run_with_cache(ids[None])[1][sae.site.hook_name][0, 1:])
    x = torch.cat(states)
    error = (x - sae.module.decode(sae.module.encode(x))).square().sum()
    share = 1 - float(error / (x - x.mean(0)).square().sum())
    assert summary["sae"]["explained"]["value"] == pytest.approx(share, abs=1e-4)
    assert 0.9 < share < 1


def test_mediation_is_of_held_out_requests_and_of_the_right_sets(case: Case, findings: Findings) -> None:
    summary, shares = findings.summary, findings.results["mediation"]
    held = case.rows("held-out")
    assert shares["prompt"].values.tolist() == [case.requests[row].text for row in held]
    parts = list(summary["mediation"]["needed"])
    assert parts[0] == f"feature {summary['feature']}" and parts[-4:] == [
        "8 features", "64 features", "all features", "whole state"
    ]  # fmt: skip
    np.testing.assert_allclose(shares["prefixed"].values, -CE(case.model.run(case.reference[held])), atol=1e-4)
    forced = case.with_reference(case.plain)[held]
    np.testing.assert_allclose(shares["plain"].values, -CE(case.model.run(forced)), atol=1e-4)
    enough = [summary["mediation"]["enough"][part]["value"] for part in ("8 features", "64 features")]
    assert 0.3 < enough[0] < enough[1] + 0.1


def pushes(case: Case, findings: Findings, sae: Any) -> dict[str, tuple[ms.Prompts, list[Any]]]:
    """What each push of the chapter is, made anew; but for the soft prefix, which is not kept."""
    summary, held = findings.summary, case.rows("held-out")
    feature, texts = summary["feature"], [case.requests[row].text for row in case.rows("held-out")]
    tokens = case.model.tokenizer.encode(summary["hard"], add_special_tokens=False)
    made = {
        HARD: (ms.Prompts.from_chats(texts, case.model, prefix=summary["hard"], labels=texts), []),
        WITH: (case.prefixed[held], []),
    }
    assert len(tokens) == summary["size"]
    back = ms.SetFeature(sae, feature, summary["rest"])
    made |= {name + BACK: (prompts, [back]) for name, (prompts, _) in made.items()}
    for step in STRENGTHS:
        value = step * summary["level"]
        made[f"{CLAMP} {step:g}"] = case.plain[held], [ms.SetFeature(sae, feature, value)]
        vector = sae.module.W_dec[feature] / sae.module.W_dec[feature].norm()
        made[f"{ADD} {step:g}"] = case.plain[held], [ms.Add(vector, value, site=sae.site)]
    return made


def test_every_push_does_on_held_out_requests_what_plain_runs_say(case: Case, findings: Findings, sae: Any) -> None:
    model, summary, held = case.model, findings.summary, case.rows("held-out")
    own, weight = case.unsteered[held], weights(case.reference[held])
    own_ids = [row[keep].tolist() for row, keep in zip(own.tokens, own.span("completion"), strict=True)]
    base = CE(model.run(case.with_reference(case.plain)[held])).double()
    gap = pooled(base - CE(model.run(case.reference[held])).double(), weight)
    assert case.judge is not None
    for name, (prompts, how) in pushes(case, findings, sae).items():
        done = model.generate(prompts, interventions=how, max_new_tokens=12)
        shown = [case.judge(text) for text in done.completions]
        assert summary["shows"][name]["value"] == pytest.approx(np.mean(shown), abs=1e-6), name
        run = model.run(prompts, how, record=sae.site)
        last = run.activations[sae.site][prompts.at(prompts.decision)]
        active = float(sae.module.encode(last)[:, summary["feature"]].mean())
        assert summary["activation"][name]["value"] == pytest.approx(active, abs=2e-2), name
        scored = CE(model.run(case.with_reference(prompts, rows=held), how)).double()
        assert summary["closed"][name]["value"] == pytest.approx(pooled(base - scored, weight) / gap, abs=2e-3), name
        rise = CE(model.run(prompts.with_completions(own_ids), how)) - CE(model.run(own))
        assert summary["rise"][name]["value"] == pytest.approx(pooled(rise, weights(own)), abs=2e-3), name
        ids = [row[keep].tolist() for row, keep in zip(done.tokens, done.span("completion"), strict=True)]
        said = float(CE(model.run(case.prefixed[held].with_completions(ids))).mean())
        assert summary["said"][name]["value"] == pytest.approx(said, abs=2e-3), name
    texts = findings.results["prefixes"].data["completion"].sel(push=WITH).values.tolist()
    assert texts == case.reference[held].completions


def test_the_prefixes_raise_the_feature_and_say_no_word_of_the_behaviour(case: Case, findings: Findings) -> None:
    active = {name: each["value"] for name, each in findings.summary["activation"].items()}
    assert active[SOFT] > active[WITHOUT] + 20
    assert case.judge is not None and not any(f" {word}" in findings.summary["hard"] for word in case.judge.words)
    assert active[HARD + BACK] < max(active[HARD], 1)


def test_the_correlation_is_over_pushes(findings: Findings) -> None:
    summary = findings.summary
    free = [name for name in summary["activation"] if not name.endswith(BACK)]
    assert summary["pushes"] == len(free) - 1 == 3 + 2 * len(STRENGTHS)
    sides = [np.array([summary[each][name]["value"] for name in free]) for each in ("activation", "shows")]
    found = Estimate.of(summary["correlation"])
    assert found.value == pytest.approx(rank_correlation(*sides), abs=1e-5)
    assert found.low <= found.value <= found.high


def test_the_report_says_what_was_measured(findings: Findings, tmp_path: Any) -> None:
    summary, blocks = findings.summary, show(findings)
    text = headline(summary)
    assert isinstance(blocks[0], Paragraph) and blocks[0].text == text
    needed = Estimate.of(summary["mediation"]["needed"][f"feature {summary['feature']}"])
    assert f"it takes away {needed.percent} of the prefix's effect ({needed.percent_interval})" in text
    found = Estimate.of(summary["shows"][HARD])
    assert f"{summary['hard']!r}, searched to raise it, {found.percent} of the completions" in text
    cards = next(block for block in blocks if isinstance(block, Cards)).cards
    assert [card[1] for card in cards[::3]] == [needed.percent, found.percent]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert tables[0].rows[0][0] == str(summary["feature"]) and len(tables[1].rows) == 7
    assert sum(isinstance(block, Figure) for block in blocks) == 4 and any(isinstance(block, View) for block in blocks)
    columns = next(block for block in blocks if isinstance(block, Columns))
    assert columns.header == (
        "request",
        WITH,
        WITHOUT,
        f"{CLAMP} {summary['chosen'][CLAMP]:g}",
        HARD,
        HARD + BACK,
        SOFT,
    )
    keep(tmp_path, CHAPTER, findings, seconds=1.0, device="cpu")
    again = kept(tmp_path, CHAPTER)
    assert again is not None and headline(again.findings.summary) == text and len(show(again.findings)) == len(blocks)


def test_sentences_follow_the_numbers(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    part = f"feature {summary['feature']}"

    def estimate(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 4}

    for needed, enough, verdict in (
        (0.5, 0.5, "The feature is part of why the prefix works"), (0.0, 0.5, "The feature helps and is not needed"),
        (0.0, 0.1, "The feature is not why the prefix works"),
        (0.2, 0.2, "The feature may be part of why the prefix works"),
    ):  # fmt: skip
        summary["mediation"]["needed"][part], summary["mediation"]["enough"][part] = estimate(needed), estimate(enough)
        assert verdict in headline(summary)
    for free, back, verdict in ((0.9, 0.4, "is part of why."), (0.9, 0.85, "does not show that raising it is why.")):
        summary["shows"][HARD], summary["shows"][HARD + BACK] = estimate(free), estimate(back)
        assert headline(summary).endswith(verdict)
    for step, told in ((1.0, False), (2.0, True)):
        summary["chosen"] = {CLAMP: step, ADD: 1.0}
        texts = [block.text for block in show(Findings(findings.results, summary)) if isinstance(block, Paragraph)]
        assert any("stronger than the largest that was tried" in text for text in texts) is told
    summary["correlation"] = {"value": None, "low": None, "high": None, "n": 4}
    texts = [block.text for block in show(Findings(findings.results, summary)) if isinstance(block, Paragraph)]
    assert any("One side is the same for all pushes" in text for text in texts)


@pytest.mark.slow
def test_without_a_judge_the_gap_counts() -> None:
    case = small("pocket", each=3, max_new_tokens=8)
    case.__dict__["judge"] = None
    findings = CHAPTER.measure(case)
    summary = findings.summary
    assert summary["shows"] == {} and "of the gap in cross entropy is closed on held-out requests" in headline(summary)
    assert summary["closed"][WITH]["value"] == pytest.approx(1) and summary["closed"][WITHOUT]["value"] == 0
    reference = findings.results["curve"]["reference"].isel(prompt=case.rows("search"))
    weight = findings.results["curve"]["weight"].isel(prompt=case.rows("search"))
    for kind in (CLAMP, ADD):
        ce = {step: float((reference.sel(push=f"{kind} {step:g}") * weight).sum()) for step in STRENGTHS}
        assert summary["chosen"][kind] == min(ce, key=lambda step: ce[step])
    assert sum(isinstance(block, Figure) for block in show(findings)) == 3


def test_a_model_without_an_autoencoder_is_told_so(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    message = (
        "No sparse autoencoder that ships with mechsteer belongs to {}: there is nothing to take features from. Ask "
        "this of the model 'pocket'."
    )
    with pytest.raises(MechsteerError) as error:
        CHAPTER.measure(small("pocket-1l"))
    assert str(error.value) == message.format("pocket-1l")
    # One that fits by its width and layer alone does not belong to the model either.
    stranger = autoencoder("topk", d_in=192, hook="blocks.3.hook_resid_post")
    monkeypatch.setattr(sys.modules["mechsteer.study.autoencoder"], "load_sae", lambda *_, **__: stranger)
    with pytest.raises(MechsteerError) as error:
        CHAPTER.measure(small("pocket"))
    assert str(error.value) == message.format("pocket")


def test_what_cannot_be_asked_is_told(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    values = {"prefix": "Talk only about cats.", "requests": requests(2), "max_new_tokens": 4}
    same = Case.of(Settings.of(model="pocket", **values), model=shipped_model("pocket"))
    object.__setattr__(same, "prefixed", same.plain)
    with pytest.raises(MechsteerError, match="is as likely without it: there is nothing that features could explain"):
        CHAPTER.measure(same)
    real = features.rank_by_contrast

    def lowered(model: Any, sae: Any, positive: Any, negative: Any, **options: Any) -> ms.Result:
        found = real(model, sae, positive, negative, **options)
        return ms.Result(found.data.assign(difference=-abs(found["difference"])), provenance={})

    monkeypatch.setattr(features, "rank_by_contrast", lowered)
    with pytest.raises(MechsteerError, match="raises no feature of the autoencoder: there is nothing to push"):
        CHAPTER.measure(case)
