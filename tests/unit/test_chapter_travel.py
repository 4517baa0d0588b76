"""The chapter "How it travels": its numbers are those of plain runs, and its sentences those numbers."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.study.blocks import Figure, Paragraph
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.travel import CHAPTER
from mechsteer.study.chapters.travel_report import headline, show
from mechsteer.study.fork import forks
from tests.cases import case as small


@pytest.fixture(scope="module")
def case() -> Case:
    return small("pocket", each=5)


@pytest.fixture(scope="module")
def findings(case: Case) -> Findings:
    return CHAPTER.measure(case)


def _plain_logits(model: ms.Model, ids: list[int], fwd_hooks: tuple = ()) -> torch.Tensor:
    """At the last token, from TransformerLens alone."""
    with torch.no_grad():
        return model.hooked.run_with_hooks(torch.tensor([ids]), fwd_hooks=list(fwd_hooks))[0, -1]


def _fork_of(case: Case, row: int) -> tuple[list[int], list[int], int, int]:
    """Ids with and without the prefix up to the fork, and the two tokens, by going through the completions."""
    one, other = (completion_ids(each)[row] for each in (case.reference, case.unsteered))
    at = 0
    while one[at] == other[at]:
        at += 1
    ids = [prompts.tokens[row][prompts.mask[row]].tolist() + one[:at] for prompts in (case.prefixed, case.plain)]
    return ids[0], ids[1], one[at], other[at]


def _kept(case: Case) -> list[int]:
    found = forks(case, case.rows("held-out"))
    assert found is not None
    return list(found.rows)


def test_forks_are_where_greedy_completions_part(case: Case) -> None:
    found = forks(case, case.rows("all"))
    assert found is not None
    with_prefix, without = (case.model.run(each, logits="last") for each in (found.prefixed, found.plain))
    assert bool((found.gap(with_prefix) > 0).all()) and bool((found.gap(without) < 0).all())
    decode = case.model.tokenizer.decode
    for place, row in enumerate(found.rows):
        prefixed, plain, one, other = _fork_of(case, row)
        assert found.prefixed.tokens[place][found.prefixed.mask[place]].tolist() == prefixed
        assert found.plain.tokens[place][found.plain.mask[place]].tolist() == plain
        assert found.tokens[place] == (decode([one]), decode([other]))
        # Both tokens are what greedy decoding chooses there.
        assert int(_plain_logits(case.model, prefixed).argmax()) == one
        assert int(_plain_logits(case.model, plain).argmax()) == other


def test_requests_whose_completions_agree_have_no_fork(case: Case) -> None:
    same = deepcopy(case)
    same.__dict__["_completed"] = (case.reference, case.prefixed.with_completions(completion_ids(case.reference)))
    assert forks(same, same.rows("all")) is None
    with pytest.raises(MechsteerError, match="Fewer than 2 completions of each half part"):
        CHAPTER.measure(same)


def test_the_push_and_its_change_are_those_of_plain_runs(case: Case, findings: Findings) -> None:
    model, pushes = case.model, findings.results["pushes"].data
    for layer in (2, 4):
        for place, row in enumerate(_kept(case)[:2]):
            prefixed, plain, one, other = _fork_of(case, row)
            streams = []
            for ids in (prefixed, plain):
                _, cache = model.hooked.run_with_cache(torch.tensor([ids]))
                streams.append(cache["resid_pre", layer][0, -1])
            delta = streams[0] - streams[1]

            def put(stream: torch.Tensor, hook: object, value: torch.Tensor = streams[0]) -> torch.Tensor:
                stream[:, -1] = value
                return stream

            before, after, whole = (
                _plain_logits(model, ids, hooks)
                for ids, hooks in (
                    (plain, ()), (plain, ((f"blocks.{layer}.hook_resid_pre", put),)), (prefixed, ()),
                )
            )  # fmt: skip
            gap = [float(each[one] - each[other]) for each in (before, after, whole)]
            here = pushes.isel(prompt=place).sel(layer=layer)
            assert float(here["change"].sel(push="own")) == pytest.approx(gap[1] - gap[0], abs=1e-3)
            assert float(here["whole"]) == pytest.approx(gap[2] - gap[0], abs=1e-3)
            assert float(here["length"]) == pytest.approx(float(delta.norm()), rel=1e-4)


def test_predictions_are_finite_differences(case: Case, findings: Findings) -> None:
    model, pushes = case.model, findings.results["pushes"].data
    row = _kept(case)[0]
    prefixed, plain, one, other = _fork_of(case, row)
    at = {"predicted": "blocks.3.hook_resid_pre", "free": f"blocks.{model.n_layers - 1}.hook_resid_post"}
    deltas = [model.hooked.run_with_cache(torch.tensor([ids]))[1]["resid_pre", 3][0, -1] for ids in (prefixed, plain)]
    delta = deltas[0] - deltas[1]
    for name, hook_name in at.items():
        gaps = []
        for sign in (1, -1):

            def push(stream: torch.Tensor, hook: object, step: float = sign * 1e-2) -> torch.Tensor:
                stream[:, -1] += step * delta
                return stream

            logits = _plain_logits(model, plain, ((hook_name, push),))
            gaps.append(float(logits[one] - logits[other]))
        expected = (gaps[0] - gaps[1]) / 2e-2
        assert float(pushes[name].sel(layer=3)[0]) == pytest.approx(expected, abs=0.02)


def test_the_prediction_is_a_tenth_off_at_the_radius(case: Case, findings: Findings) -> None:
    model, entry, site = case.model, findings.summary["entry"], ms.Site("resid_pre", findings.summary["entry"])
    regime = findings.summary["regime"]
    at = regime["layers"].index(entry)
    assert regime["prefix"][at]["censored"] == 0
    search, held = (forks(case, case.rows(split)) for split in ("search", "held-out"))
    assert search is not None and held is not None

    def stream(prompts: ms.Prompts) -> torch.Tensor:
        run = model.run(prompts, record=site)
        return run.activations[site][run.prompts.at(-1)]

    mean = (stream(search.prefixed) - stream(search.plain)).mean(0)
    here = stream(held.plain)
    norm = float(findings.results["regime"]["norm"].sel(layer=entry))
    assert norm == pytest.approx(float(here.norm(dim=-1).mean()), rel=1e-3)
    assert regime["length"][at] == pytest.approx(float(mean.norm()) / norm, rel=1e-3)

    def gap(length: float) -> torch.Tensor:
        edit = ms.Replace(site, here + length * norm * mean / mean.norm(), at=-1)
        return held.gap(model.run(held.plain, [edit], logits="last")).double()

    radius, step = regime["prefix"][at]["value"], 1e-3
    predicted = (gap(step) - gap(-step)) / (2 * step) * radius
    off = float((gap(radius) - gap(0.0) - predicted).norm() / predicted.norm())
    assert 0.05 < off < 0.2  # the radius is interpolated between sizes


def test_rank_keeps_only_the_fitted_directions(case: Case, findings: Findings) -> None:
    model, entry, rank = case.model, findings.summary["entry"], findings.results["rank"].data
    site = ms.Site("resid_pre", entry)

    def deltas(split: str) -> torch.Tensor:
        found = forks(case, case.rows(split))
        assert found is not None
        streams = []
        for prompts in (found.prefixed, found.plain):
            run = model.run(prompts, record=site)
            streams.append(run.activations[site][run.prompts.at(-1)])
        return streams[0] - streams[1]

    fitted, own = deltas("search").double(), deltas("held-out").double()
    basis = torch.linalg.svd(fitted, full_matrices=False).Vh[:2]
    held = forks(case, case.rows("held-out"))
    assert held is not None
    kept = (own @ basis.T @ basis).float()
    run = model.run(held.plain, record=site, logits="last")
    edit = ms.Replace(site, run.activations[site][run.prompts.at(-1)] + kept, at=-1)
    expected = held.gap(model.run(held.plain, [edit], logits="last")) - held.gap(run)
    np.testing.assert_allclose(rank["change"].sel(subspace="found", k=2).values, expected.numpy(), atol=1e-3)


def test_shares_of_a_flow_and_of_a_series_are_whole(findings: Findings) -> None:
    flow, series = findings.results["flow"].data, findings.results["dyson"].data
    np.testing.assert_allclose((flow["stays"] + flow["carried"]).values, 100)
    assert bool((flow["fork"] <= flow["carried"] + 1e-3).all())
    assert [str(token) for token in flow["token"].values] == ["Talk", " only", " about", " cats", "."]
    np.testing.assert_allclose(series["share"].sel(vector="prefix").sum("order").values, 1, atol=1e-3)
    # The deciding token is the same one with the prefix and without it: before layer 0 nothing is there.
    assert 0 not in series["layer"].values
    assert findings.summary["change"]["own"][0]["value"] == 0


def test_entry_is_the_first_layer_that_brings_half(findings: Findings) -> None:
    shares = [each["value"] for each in findings.summary["change"]["own"]]
    assert findings.summary["entry"] == next(layer for layer, share in enumerate(shares) if share >= 0.5)


def test_the_report_says_what_was_measured(findings: Findings) -> None:
    summary = findings.summary
    at = summary["layers"].index(summary["entry"])
    text = headline(summary)
    share, predicted = summary["change"]["own"][at]["value"], summary["predicted"][at]["value"]
    assert f"before layer {summary['entry']}" in text and f"brings about {100 * share:.0f} %" in text
    assert f"foretells {100 * predicted:.0f} %: the push is beyond the linear regime" in text
    assert "Before layer 1 nothing of the push is at that token" in text
    assert "is not an identity propagator" in text
    blocks = show(findings)
    assert isinstance(blocks[0], Paragraph) and blocks[0].text == text
    assert sum(isinstance(block, Figure) for block in blocks) == 8
    rank = next(block.text for block in blocks if isinstance(block, Paragraph) and "directions hold 90 %" in block.text)
    assert f"{100 * summary['rank']['found'][0]['value']:.0f} % of the gap's change" in rank


def test_the_report_follows_other_numbers(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    at = summary["layers"].index(summary["entry"])
    summary["predicted"][at] = dict(summary["change"]["own"][at])
    summary["identity"]["rest"]["end"][at] |= {"value": 0.1, "low": 0.05, "high": 0.15}
    for each in summary["dyson"]:
        each["largest"] = 0
    text = headline(summary)
    assert "close to the truth" in text and "nearly an identity propagator" in text
    blocks = show(Findings(findings.results, summary))
    texts = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert any("Free propagation is the largest term from before layers" in each for each in texts)
    fits = next(each for each in texts if "within a tenth of the truth before layer" in each)
    assert str(summary["entry"]) in fits.split("within a tenth of the truth before")[1].split(".")[0]
    assert "Nowhere is it half" not in text
    summary["change"]["own"][at] |= {"value": 0.3}
    assert "Nowhere is it half" in headline(summary)


def test_a_wide_band_is_cut_and_the_curves_keep_their_shapes(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))

    def drawn() -> Figure:
        blocks = show(Findings(findings.results, summary))
        return next(
            block
            for block in blocks
            if isinstance(block, Figure) and "gap's change" in str(block.figure.layout.title.text)
        )

    lines = ("own", "mean", "random")
    for name in lines:
        for each in summary["change"][name]:
            each |= {"low": each["value"] - 0.05, "high": each["value"] + 0.05}
    for each in summary["predicted"] + summary["free"]:
        each |= {"low": each["value"], "high": each["value"]}
    narrow = drawn()
    assert narrow.figure.layout.yaxis.range is None and "are cut" not in narrow.caption
    summary["change"]["random"][-1] |= {"low": -31.4, "high": 27.2}
    wide = drawn()
    values = [
        100 * each["value"]
        for each in (
            *(one for name in lines for one in summary["change"][name]),
            *summary["predicted"],
            *summary["free"],
        )
    ]
    spread = max(values) - min(values)
    low, high = wide.figure.layout.yaxis.range
    assert low <= min(values) and max(values) <= high and high - low < 2.2 * spread
    assert "Bands that reach beyond the axis are cut (random, as long: -3.14e+03 to 2.72e+03 %)." in wide.caption
    # What is cut is still told, and the table below has all of it.
    told = [text for trace in wide.figure.data for text in trace.hovertext or ()]
    assert any("95 % interval: -3140 to 2720" in text for text in told)


def test_a_model_of_one_layer_is_refused() -> None:
    with pytest.raises(MechsteerError, match="the prefix adds nothing at the tokens where the completions part"):
        CHAPTER.measure(small("pocket-1l", each=5))
