"""The chapter "Which pushes are the same": its numbers are those of plain loops, and its sentences those numbers."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.study import pushes as making
from mechsteer.study.blocks import Cards, Columns, Details, Figure, Paragraph, Table
from mechsteer.study.case import Case, completion_ids
from mechsteer.study.chapter import Findings
from mechsteer.study.chapters import together
from mechsteer.study.chapters.together import CHAPTER
from mechsteer.study.chapters.together_report import NOTHING, REFERENCE, headline, show
from mechsteer.study.pushes import Push
from tests.cases import case as small
from tests.cases import pooled, scores

SMALL = {
    "BUDGET": 5, "DEPTHS": (0.5,), "FEATURES": (1, 2), "TIMES": (3.0,), "EDIT_DEPTHS": (0.6,), "EDIT_TIMES": (1.0,),
    "SEARCHED": 2, "VALIDATED": 0, "MATCHED_TOKENS": 4, "SOFT_STEPS": 3, "EVALUATIONS": 20, "BEAM": 1, "TOP_K": 2,
    "TEXTS": 3, "TEXT_TOKENS": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_budgets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(making, name, value)
        yield


@pytest.fixture(scope="module")
def case(small_budgets: None) -> Case:
    return small("pocket", each=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def measured(case: Case) -> tuple[Findings, dict[str, Push]]:
    """The findings, and the pushes that were made on the way."""
    made, make = [], together._made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_made", lambda asked: made.append(make(asked)) or made[-1])
        findings = CHAPTER.measure(case)
    return findings, {push.name: push for push in made[0][0]}


@pytest.fixture(scope="module")
def findings(measured: tuple[Findings, dict[str, Push]]) -> Findings:
    return measured[0]


@pytest.fixture(scope="module")
def pushes(measured: tuple[Findings, dict[str, Push]]) -> dict[str, Push]:
    return measured[1]


def _plain(
    push: Push, row: int, ids: list[int], put: tuple[int, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [token, d_vocab] and states [layer, token, d_model] at the tokens that predict a completion, of
    one request, from TransformerLens alone; `put` says after which block other states stand there."""
    prompts = push.prompts[[row]].with_completions([ids]).padded("right")
    first = int(prompts.decision[0])
    here = slice(first, first + len(ids))
    states: dict[int, torch.Tensor] = {}

    def replaced(x: torch.Tensor, hook: Any) -> torch.Tensor:
        assert put is not None
        return torch.cat([x[:, :first], put[1][None], x[:, first + len(ids) :]], 1)

    def recorded(x: torch.Tensor, hook: Any) -> None:
        states[hook.layer()] = x[0, here]

    hooks: Any = list(ms.fwd_hooks(list(push.interventions), push.model, prompts))
    hooks += [] if put is None else [(f"blocks.{put[0]}.hook_resid_post", replaced)]
    hooks += [(f"blocks.{layer}.hook_resid_post", recorded) for layer in range(push.model.n_layers)]
    with torch.no_grad():
        logits = push.model.hooked.run_with_hooks(prompts.tokens, fwd_hooks=hooks)[0, here]
    return logits.double().log_softmax(-1), torch.stack([states[layer] for layer in sorted(states)]).double()


def _kl(true: torch.Tensor, other: torch.Tensor) -> float:
    return float((true.exp() * (true - other)).sum(-1).mean())


def test_every_kind_of_push_is_there(pushes: dict[str, Push]) -> None:
    assert list(pushes) == [
        REFERENCE, NOTHING, "vector", "features", "weight edit", "soft prefix", "searched prefix",
    ]  # fmt: skip


def test_the_searched_prefix_does_not_say_what_it_must_not(case: Case, pushes: dict[str, Push]) -> None:
    text = case.model.tokenizer.decode(pushes["searched prefix"].ids).lower()
    assert not any(word in text for word in case.telltale)
    n = len(pushes[REFERENCE].ids)
    assert len(pushes["searched prefix"].ids) == pushes["soft prefix"].slots == n
    assert f": {case.model.tokenizer.decode(pushes['searched prefix'].ids)!r}" in pushes["searched prefix"].size


def test_distances_and_patches_are_those_of_plain_runs(case: Case, pushes: dict[str, Push], findings: Findings) -> None:
    data, layer = findings.results["held_out"].data, findings.summary["layer"]
    assert layer == max(case.model.n_layers // 2 - 1, *(push.layer for push in pushes.values()))
    prefix = pushes[REFERENCE]
    for name, push in pushes.items():
        one = data.sel(push=name)
        for place, row in enumerate(case.rows("held-out")):
            told = completion_ids(case.reference)[row]
            true, theirs = _plain(prefix, row, told)
            mine, states = _plain(push, row, told)
            assert float(one["kl"][place]) == pytest.approx(_kl(true, mine), abs=2e-4)
            apart = (states - theirs).square().sum((1, 2)).numpy()
            np.testing.assert_allclose(one["distance"][:, place], apart, rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(data["power"][:, place], theirs.square().sum((1, 2)).numpy(), rtol=1e-4)
            into, _ = _plain(prefix, row, told, (layer, states[layer].float()))
            back, _ = _plain(push, row, told, (layer, theirs[layer].float()))
            assert float(one["into"][place]) == pytest.approx(_kl(true, into), abs=2e-4)
            assert float(one["back"][place]) == pytest.approx(_kl(true, back), abs=2e-4)
            said = completion_ids(case.unsteered)[row]
            alone, _ = _plain(pushes[NOTHING], row, said)
            assert float(one["own"][place]) == pytest.approx(_kl(alone, _plain(push, row, said)[0]), abs=2e-4)


def test_what_is_said_and_how_likely_is_that_of_plain_runs(
    case: Case, pushes: dict[str, Push], findings: Findings
) -> None:
    data, held = findings.results["held_out"].data, case.rows("held-out")
    assert case.judge is not None
    for name, push in pushes.items():
        done = push.model.generate(push.prompts[held], interventions=push.interventions, max_new_tokens=6)
        assert data["completion"].sel(push=name).values.tolist() == done.completions
        shown = [case.judge(text) for text in done.completions]
        assert findings.summary["pushes"][name]["shows"]["value"] == pytest.approx(np.mean(shown), abs=1e-6)
        if name != "soft prefix":  # TransformerLens's hooks count slots only when told of the prompts
            forced = case.with_reference(push.prompts[held], rows=held)
            expected = pooled(*scores(push.model, forced, push.interventions))
            assert findings.summary["pushes"][name]["reference"]["value"] == pytest.approx(expected, abs=2e-4)
    assert data["completion"].sel(push=REFERENCE).values.tolist() == case.reference[held].completions


def test_unrelated_texts_are_those_of_plain_runs(case: Case, pushes: dict[str, Push], findings: Findings) -> None:
    texts, data = making.unrelated(case, "to measure on"), findings.results["texts"].data
    ids = completion_ids(texts)
    for name in ("vector", "searched prefix", "weight edit", REFERENCE):
        push = pushes[name]
        for place in range(len(texts)):
            nll = []
            for each in (push, pushes[NOTHING]):
                prompts = each.on(texts[[place]]).padded("right")
                first = int(prompts.decision[0])
                hooks: Any = ms.fwd_hooks(list(each.interventions), each.model)
                with torch.no_grad():
                    logits = each.model.hooked.run_with_hooks(prompts.tokens, fwd_hooks=hooks)[0, first:-1]
                likely = logits.double().log_softmax(-1)
                nll.append(-float(likely[torch.arange(len(ids[place])), ids[place]].mean()))
            assert float(data["rise"].sel(push=name)[place]) == pytest.approx(nll[0] - nll[1], abs=2e-4)
    rise, weight = data["rise"].sel(push="vector").values, np.array([len(each) for each in ids])
    assert findings.summary["pushes"]["vector"]["text"]["value"] == pytest.approx((rise * weight).sum() / weight.sum())


def test_the_prefix_is_equal_to_itself_and_no_push_changes_nothing(findings: Findings) -> None:
    own, none = (findings.summary["pushes"][name] for name in (REFERENCE, NOTHING))
    for column in ("kl", "into", "back"):
        assert own[column]["value"] == pytest.approx(0, abs=1e-5)
    assert [each["value"] for each in own["distance"]] == [0.0] * findings.summary["n_layers"]
    assert own["closed"]["value"] == pytest.approx(1, abs=1e-5) and own["kept"]["value"] == pytest.approx(1, abs=1e-5)
    assert none["own"]["value"] == pytest.approx(0, abs=1e-5) and none["text"]["value"] == 0
    assert none["closed"]["value"] == 0 and none["kept"]["value"] == 0
    assert own["own"]["value"] > 0 and none["kl"]["value"] > 0


def test_estimates_are_pooled_over_tokens(findings: Findings) -> None:
    data = findings.results["held_out"].data
    tokens = data["tokens"].values
    for name in data["push"].values:
        one, found = data.sel(push=name), findings.summary["pushes"][name]
        none = data.sel(push=NOTHING)
        assert found["kl"]["value"] == pytest.approx((one["kl"].values * tokens).sum() / tokens.sum(), abs=1e-5)
        closed = 1 - (one["kl"].values * tokens).sum() / (none["kl"].values * tokens).sum()
        assert found["closed"]["value"] == pytest.approx(closed, abs=1e-5)
        far = np.sqrt(one["distance"].sum("prompt").values / data["power"].sum("prompt").values)
        np.testing.assert_allclose([each["value"] for each in found["distance"]], far, atol=1e-5)


def test_the_report_says_what_was_measured(findings: Findings) -> None:
    summary, blocks = findings.summary, show(findings)
    text = headline(summary)
    assert isinstance(blocks[0], Paragraph) and blocks[0].text == text
    table = next(block for block in blocks if isinstance(block, Table))
    kl = {name: each["kl"]["value"] for name, each in summary["pushes"].items()}
    order = [str(row[0]).split(":")[0] for row in table.rows]
    assert table.rows[0][0] == "reference prefix: 5 tokens"
    assert order[0] == REFERENCE and order[1:] == sorted(order[1:], key=lambda name: kl[name])
    closest = next(name for name in order if name not in (REFERENCE, NOTHING))
    assert f"Of 5 other pushes the {closest} {'are' if closest == 'features' else 'is'} closest to the prefix" in text
    assert f"its predictions are {kl[closest]:.2f} nats a token away" in text
    assert f"{100 * summary['pushes'][REFERENCE]['shows']['value']:.0f} % are about cats with the prefix" in text
    cards = next(block for block in blocks if isinstance(block, Cards)).cards
    assert cards[0][1] == closest
    near = min((n for n in order if n not in (REFERENCE, NOTHING)),
               key=lambda n: summary["pushes"][n]["distance"][summary["layer"]]["value"])  # fmt: skip
    assert cards[1][1] == near
    figure = next(block for block in blocks if isinstance(block, Figure)).figure
    named = {trace.name for trace in figure.data if trace.mode and "markers" in trace.mode}
    assert named == set(order) - {REFERENCE}
    columns = next(block for block in blocks if isinstance(block, Columns))
    assert [row[0] for row in columns.rows] == order and len(columns.header) == 3  # of two requests


def test_what_could_not_be_made_is_told(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    summary["missing"] = {"features": "No autoencoder fits."}
    summary["match"] = None
    blocks = show(Findings(findings.results, summary))
    assert any(isinstance(block, Paragraph) and block.text == "Left out: features. No autoencoder fits."
               for block in blocks)  # fmt: skip


def test_the_way_to_tokens_and_what_was_tried_are_told(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    summary["match"] = {
        "loss": {"soft": 0.5, "projected": 2.25, "beam": 1.0, "final": 0.75}, "evaluated": 123, "steps": 7,
        "forbidden": ["cats"],
    }  # fmt: skip
    summary["tried"] = {"features": [{"setting": "feature 7", "target": 0.5, "rise": 0.1, "score": 0.475}]}
    details = show(Findings(findings.results, summary))[-1]
    assert isinstance(details, Details)
    method, _, table = details.blocks
    assert isinstance(method, Paragraph) and isinstance(table, Table)
    assert "took 7 steps of Adam" in method.text and "took 123 candidates" in method.text
    assert "0.50 for the soft prefix, 2.25 for its nearest tokens, 1.00 for a beam's and 0.75" in method.text
    assert table.rows == [("feature 7", 0.5, 0.1, 0.475)] and table.caption.startswith("Features: what was tried")


def test_a_push_that_shows_the_behaviour_and_is_another_is_told(findings: Findings) -> None:
    summary = deepcopy(dict(findings.summary))
    for name, each in summary["pushes"].items():
        each["shows"] = {"value": 1.0, "low": 0.5, "high": 1.0, "n": 3}
        each["closed"] = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 3}
        if name == "vector":
            each["closed"] = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 3}
    assert headline(summary).endswith(
        "To show the behaviour as often is not to be the same: the vector does, and 60 % of the difference in "
        "predictions is still there."
    )
    for each in summary["pushes"].values():
        each["closed"] = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 3}
    assert "not to be the same" not in headline(summary)
    for each in summary["pushes"].values():
        each["closed"] = {"value": -0.5, "low": -0.8, "high": -0.1, "n": 3}
    assert "none of the difference is gone." in headline(summary)


def test_a_model_without_an_autoencoder_or_a_judge(small_budgets: None) -> None:
    other = small("pocket-1l", each=2, prefix="Be kind to everyone you meet.", max_new_tokens=4)
    assert other.judge is None
    found = CHAPTER.measure(other)
    assert "features" not in found.summary["pushes"]
    assert found.summary["missing"]["features"].startswith("No sparse autoencoder that ships with mechsteer belongs to")
    blocks = show(found)
    table = next(block for block in blocks if isinstance(block, Table))
    assert table.header[:3] == ["push", "KL from the prefix", "CE of its completions"]
    assert any(isinstance(b, Paragraph) and "That block is the last one" in b.text for b in blocks)
    data = found.results["held_out"].data
    np.testing.assert_allclose(data["into"].values, data["kl"].values, atol=1e-4)
    np.testing.assert_allclose(data["back"].values, 0, atol=1e-4)
    assert found.summary["match"]["evaluated"] > 0
