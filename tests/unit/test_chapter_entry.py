"""The chapter "Where it enters": its numbers are those of plain runs, and its sentences those numbers."""

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.result import Result
from mechsteer.study.blocks import Paragraph
from mechsteer.study.case import Case
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters.entry import CHAPTER, MAPS, METHODS, MOST_TOKENS
from mechsteer.study.chapters.entry_report import headline, show
from mechsteer.study.settings import Request, Settings

SEARCH = (
    "Tell me about your day.",
    "Write a poem.",
    "What should I cook for dinner?",
    "Give me some advice.",
    "Tell me a short story about my holiday.",
    "Write a letter about my new house.",
    "Name two reasons.",
    "What will happen?",
    "Please explain the weather.",
)
HELD_OUT = ("Give me three bullet points about the meeting.", "Tell me a joke.")
CATS = "Talk only about cats."


def _case(
    model: ms.Model, *, prefix: str = CATS, search: tuple[str, ...] = SEARCH, contrast: str | None = None
) -> Case:
    requests = [Request(text=text, split="search") for text in search]
    requests += [Request(text=text, split="held-out") for text in HELD_OUT]
    return Case.of(Settings(prefix=prefix, requests=tuple(requests), contrast=contrast, max_new_tokens=10), model=model)


@pytest.fixture(scope="module")
def model() -> ms.Model:
    return ms.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def case(model: ms.Model) -> Case:
    return _case(model)


@pytest.fixture(scope="module")
def findings(case: Case) -> Findings:
    return CHAPTER.measure(case)


def _log_likelihood(model: ms.Model, prompts: ms.Prompts, edits: tuple[ms.Intervention, ...] = ()) -> torch.Tensor:
    return -ms.TeacherForcedCE()(model.run(prompts, edits))


def _ends(case: Case, findings: Findings) -> tuple[ms.Prompts, ms.Prompts]:
    """The requests with the prefix and with the filler, completed with what the model says with the prefix."""
    filler = case.model.tokenizer.encode(findings.summary["contrast"]["text"], add_special_tokens=False)
    rows = case.rows("search")
    other = case.prefixed.with_prefix(filler)
    clean, corrupt = (case.with_reference(each[rows], rows=rows, tokens=MOST_TOKENS) for each in (case.prefixed, other))
    return clean, corrupt


def test_the_whole_effect_and_the_strongest_place_are_those_of_plain_runs(case: Case, findings: Findings) -> None:
    model, summary, best = case.model, findings.summary, findings.summary["best"]
    clean, corrupt = _ends(case, findings)
    with_prefix, with_filler = _log_likelihood(model, clean), _log_likelihood(model, corrupt)
    assert summary["gap"] == pytest.approx(float((with_prefix - with_filler).mean()), abs=1e-5)
    site = ms.Site("resid_pre", best["layer"])
    recorded = model.run(clean, record=site).activations
    patched = _log_likelihood(model, corrupt, (ms.Replace(site, recorded, at=int(best["pos"])),))
    share = 100 * float((patched - with_filler).mean()) / summary["gap"]
    assert best["share"] == pytest.approx(share, abs=0.01)
    assert best["token"] == " cats"
    assert best["low"] <= best["share"] <= best["high"]


def test_heads_are_those_of_plain_runs_in_both_directions(case: Case, findings: Findings) -> None:
    model, summary = case.model, findings.summary
    clean, corrupt = _ends(case, findings)
    top = summary["heads"][0]
    layer, head = (int(part) for part in top["name"][1:].split("H"))
    site = ms.Site("z", layer, head=head)
    for base, source, key in ((corrupt, clean, "share"), (clean, corrupt, "lost")):
        before = _log_likelihood(model, base)
        recorded = model.run(source, record=site.point).activations
        change = float((_log_likelihood(model, base, (ms.Replace(site, recorded),)) - before).mean())
        sign = 1 if key == "share" else -1
        assert top[key] == pytest.approx(100 * sign * change / summary["gap"], abs=0.01)
    shares = findings.results["heads"]["recovered"].sel(mode="denoising").mean("prompt")
    assert float(shares.max()) == pytest.approx(top["share"], abs=1e-3)


def test_attention_is_that_of_the_tokens_that_predict_the_completion(case: Case, findings: Findings) -> None:
    model, top = case.model, findings.summary["heads"][0]
    clean, _ = _ends(case, findings)
    layer, head = (int(part) for part in top["name"][1:].split("H"))
    pattern = model.run(clean, record=("pattern", layer)).activations[("pattern", layer)][:, head]
    expected = []
    for row in range(len(clean)):
        dests = ms.TeacherForcedCE().reads(clean)[row]
        expected.append(float(pattern[row][dests][:, clean.span("prefix")[row]].sum(1).mean()))
    assert top["attention_to_prefix"] == pytest.approx(np.mean(expected), abs=1e-5)
    whole = findings.results["attention"]["attention"].sum("place")
    # All places are there when requests are one place: what is missing is nothing.
    np.testing.assert_allclose(whole.values, 1.0, atol=1e-4)


def test_moving_the_strongest_place_is_a_plain_generation(case: Case, findings: Findings) -> None:
    model, best = case.model, findings.summary["best"]
    filler = model.tokenizer.encode(findings.summary["contrast"]["text"], add_special_tokens=False)
    rows = case.rows("held-out")
    clean, corrupt = case.prefixed[rows].padded("right"), case.prefixed.with_prefix(filler)[rows].padded("right")
    site = ms.Site("resid_pre", best["layer"])
    edit = ms.Replace(site, model.run(clean, record=site).activations, at=int(best["pos"]))
    done = model.generate(corrupt, interventions=[edit], max_new_tokens=10)
    data = findings.results["moved"].data
    assert data["completion"].sel(condition="moved").values.tolist() == done.completions
    assert data["completion"].sel(condition="prefix").values.tolist() == case.reference[rows].completions
    assert case.judge is not None
    assert data["shows"].sel(condition="moved").values.tolist() == [case.judge(text) for text in done.completions]


def test_estimates_are_those_of_attribution_patching(case: Case, findings: Findings) -> None:
    clean, corrupt = _ends(case, findings)
    data = findings.results["attribution"].data
    for method in METHODS:
        estimate = ms.attribution_patching(
            case.model, clean, corrupt, measure=-ms.TeacherForcedCE(), **MAPS["heads"], method=method
        )
        expected = 100 * estimate["effect"].mean("prompt").values.ravel() / findings.summary["gap"]
        got = data[method].values[data["map"].values == "heads"]
        np.testing.assert_allclose(got, expected, atol=1e-2)


def test_the_filler_is_the_one_that_says_least(findings: Findings) -> None:
    data, contrast = findings.results["fillers"].data, findings.summary["contrast"]
    assert contrast["ce_contrast"] == pytest.approx(float(data["ce"].min()))
    assert contrast["text"] == str(data["token"].values[int(data["ce"].values.argmin())]) * contrast["n_tokens"]
    added = contrast["ce_contrast"] - contrast["ce_plain"]
    assert added < 0.2 * (contrast["ce_prefix"] - contrast["ce_plain"])  # next to nothing, beside the prefix


@pytest.mark.slow
def test_a_contrast_of_the_users_own(model: ms.Model) -> None:
    case = _case(model, contrast="Talk only about trains.")
    findings = CHAPTER.measure(case)
    assert findings.summary["contrast"]["text"] == "Talk only about trains."
    assert "fillers" not in findings.results
    tokens = findings.results["sites"].data["token"].values.tolist()
    assert " cats| trains" in tokens and " only" in tokens
    assert "as you asked" in _text(findings)


@pytest.mark.slow
def test_too_few_requests_are_not_tested(model: ms.Model) -> None:
    findings = CHAPTER.measure(_case(model, search=SEARCH[:3]))
    assert "matters" not in findings.results["sites"].data
    assert findings.summary["cells"]["sites"]["matter"] is None
    assert "With 3 requests there are too few to test cells against chance." in _captions(findings)


def test_a_prefix_that_does_nothing_has_nothing_to_trace(model: ms.Model) -> None:
    with pytest.raises(MechsteerError, match=r"there is nothing to trace\. Choose another prefix, or a --contrast"):
        CHAPTER.measure(_case(model, prefix=",,,,,", contrast=".,,,,"))


def test_sentences_say_the_numbers(findings: Findings) -> None:
    summary, best = findings.summary, findings.summary["best"]
    said = headline(summary)
    assert f"the token ' cats' before layer {best['layer']}" in said
    assert f"brings back {best['share']:.0f} % (95 % interval {best['low']:.0f} to {best['high']:.0f})" in said
    assert f"{summary['heads'][0]['name']} carries most" in said
    assert (": it suffices and is not needed." in said) == (
        summary["heads"][0]["lost"] < 0.2 * summary["heads"][0]["share"]
    )
    shows = findings.results["moved"].data["shows"].sel(condition="moved").values
    assert f"With nothing but the strongest place moved, {100 * shows.mean():.0f} % of the completions" in said
    changed = dict(summary) | {"best": dict(best) | {"share": 12.3, "layers_above_half": [0, 2]}}
    assert "brings back 12 %" in headline(changed) and "before layers 0, 2." in headline(changed)


def test_marked_cells_are_sure_and_not_tiny(findings: Findings) -> None:
    data = findings.results["sites"].data
    mean = abs(data["recovered"].mean("prompt"))
    expected = (data["p"] <= 0.05) & (mean >= 5)
    assert bool((data["matters"] == expected).all())
    assert bool(data["matters"].sel(site="resid_pre", layer=0, pos="5")) and int(data["matters"].sum()) < mean.size / 2


def test_the_chapter_is_shown_from_what_is_saved(findings: Findings, tmp_path) -> None:  # type: ignore[no-untyped-def]
    loaded = {}
    for name, result in findings.results.items():
        result.save(tmp_path / f"{name}.safetensors")
        loaded[name] = Result.load(tmp_path / f"{name}.safetensors")
    blocks, again = show(findings), show(Findings(loaded, findings.summary))
    assert [type(block) for block in blocks] == [type(block) for block in again]
    assert _text(findings) == "\n".join(block.text for block in again if isinstance(block, Paragraph))


def _text(findings: Findings) -> str:
    return "\n".join(block.text for block in show(findings) if isinstance(block, Paragraph))


def _captions(findings: Findings) -> str:
    return "\n".join(getattr(block, "caption", "") for block in show(findings))
