"""From a target to words: every stage against plain runs, constraints, the folder, and the beam under constraints."""

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.prefix import Constraints, MatchedPrefix, RoundTrip, decode_beam, match_prefix, project
from mechsteer.prefix.match import STAGES, beam_evaluations
from mechsteer.prefix.projection import nearest_tokens
from mechsteer.vocabulary import embeddings, insert

REQUESTS = ["Tell me about your day.", "Write a poem.", "Give me some advice.", "Let us talk."]
HELD = ["Sing.", "Tell me a story."]
CE = ms.TeacherForcedCE(first=2)
KEEP = Constraints(forbidden_words=("cat", "purr"), characters="ascii")
SMALL: dict[str, Any] = {
    "evaluations": 24, "soft_steps": 6, "n_restarts": 2, "beam": 2, "top_k": 3, "constraints": KEEP, "progress": False,
}  # fmt: skip


def chats(requests: list[str]) -> ms.Prompts:
    """Requests with two slots and what the model says about cats."""
    model = cases.model()
    taught = model.generate(ms.Prompts.from_chats(requests, model, prefix=cases.CATS), max_new_tokens=4)
    said = [row[keep].tolist() for row, keep in zip(taught.tokens, taught.span("completion"), strict=True)]
    return ms.Prompts.from_chats(requests, model, slots=2).with_completions(said)


@pytest.fixture(scope="module")
def prompts() -> ms.Prompts:
    return chats(REQUESTS)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, float, str]]:
    return []


@pytest.fixture(scope="module")
def match(
    prompts: ms.Prompts, told: list[tuple[str, int, float, str]], tmp_path_factory: pytest.TempPathFactory
) -> MatchedPrefix:
    out = tmp_path_factory.mktemp("match") / "a"
    return match_prefix(
        cases.model(), prompts, CE, held_out=chats(HELD), out=out, tell=lambda *each: told.append(each), **SMALL
    )


def naive(prompts: ms.Prompts, prefix: Any) -> float:
    """One plain run of whole prompts, with ids in them or embeddings in their slots."""
    soft = isinstance(prefix, torch.Tensor)
    filled = prompts if soft else insert(prompts, prefix, where="prefix")
    values = CE(cases.model().run(filled, [ms.SoftPrefix(prefix)] if soft else [])).double()
    weights = CE.total_weight(filled).double()
    return float((values * weights).sum() / weights.sum())


def made(match: MatchedPrefix) -> dict[str, Any]:
    ids = dict(match.stages.provenance["options"]["ids"])
    return ids | {"soft": match.soft.embeddings}


def test_every_stage_has_the_loss_of_plain_runs(match: MatchedPrefix, prompts: ms.Prompts) -> None:
    held = chats(HELD)
    for stage, prefix in made(match).items():
        found = match.stages.data.sel(stage=stage)
        assert float(found["loss"]) == pytest.approx(naive(prompts, prefix), abs=1e-5), stage
        assert float(found["held_out_loss"]) == pytest.approx(naive(held, prefix), abs=1e-5), stage
    assert list(made(match)) == list(STAGES)
    assert made(match)["projected"] == list(project(cases.model(), match.soft, allowed=KEEP.allowed(cases.model())))


def test_stages_get_better_within_the_evaluations(match: MatchedPrefix) -> None:
    loss, evaluated = match.stages["loss"], match.stages["evaluated"]
    soft, projected, beam, final = (float(loss.sel(stage=stage)) for stage in STAGES)
    assert final <= beam <= projected
    assert match.loss == final and match.ids == match.found.ids and match.text == match.found.text
    gap = (projected - final) / (projected - soft)
    assert match.gap_closed == pytest.approx(gap) if projected > soft else np.isnan(match.gap_closed)
    counts = {stage: int(evaluated.sel(stage=stage)) for stage in STAGES}
    assert counts["soft"] == 0 and counts["projected"] == 1 and counts["final"] == match.found.evaluated
    assert 1 + counts["beam"] <= beam_evaluations(2, beam=2, top_k=3) == 11
    assert sum(counts.values()) == SMALL["evaluations"]
    assert repr(match).startswith(f"MatchedPrefix({match.text!r}: soft {soft:.3g} -> projected ")


def test_the_answer_keeps_to_the_constraints_and_survives(match: MatchedPrefix, prompts: ms.Prompts) -> None:
    placed = RoundTrip(prompts).placed(match.ids)
    assert all(each.survives for each in placed) and match.found.round_trip == (True,) * len(REQUESTS)
    assert all(KEEP.violation(match.ids, each.text, before=each.before, after=each.after) is None for each in placed)
    assert set(match.ids) <= set(KEEP.allowed(cases.model())) and placed[0].text == match.text


def test_tell_hears_of_every_stage(match: MatchedPrefix, told: list[tuple[str, int, float, str]]) -> None:
    assert [stage for stage, _, loss, _ in told if np.isnan(loss)] == ["soft", "soft", "beam"]  # two looks: 0 and 6
    finished = {stage: (done, loss, text) for stage, done, loss, text in told if not np.isnan(loss)}
    assert list(finished) == list(STAGES)
    for stage, (done, loss, _) in finished.items():
        assert loss == pytest.approx(float(match.stages["loss"].sel(stage=stage)), abs=1e-5)
        upto = STAGES[: STAGES.index(stage) + 1]
        assert done == sum(int(match.stages["evaluated"].sel(stage=each)) for each in upto)
    assert finished["final"][2] == match.text and told[0][3].startswith("step 0: loss ")


def test_it_is_saved_and_loaded(match: MatchedPrefix, tmp_path: Path) -> None:
    match.save(tmp_path / "kept")
    again = MatchedPrefix.load(tmp_path / "kept")
    assert repr(again) == repr(match) and again.ids == match.ids and again.stages.data.equals(match.stages.data)
    assert torch.equal(again.soft.embeddings, match.soft.embeddings)
    with pytest.raises(MechsteerError, match=r"soft\.safetensors is no file"):
        MatchedPrefix.load(tmp_path)


def test_a_stopped_match_goes_on_as_if_it_had_not(match: MatchedPrefix, prompts: ms.Prompts, tmp_path: Path) -> None:
    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    options = {**SMALL, "out": tmp_path / "a"}
    for stage in ("match.optimise_soft_prefix", "match.decode_beam"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"mechsteer.prefix.{stage}", stopped)
            match_prefix(cases.model(), prompts, CE, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechsteer.prefix.search._Search._mixed", stopped)
        part = match_prefix(cases.model(), prompts, CE, **options)
    assert not part.found.finished and part.found.evaluated < match.found.evaluated
    with pytest.MonkeyPatch.context() as patch:  # neither is done again
        for name in ("optimise_soft_prefix", "decode_beam"):
            patch.setattr(f"mechsteer.prefix.match.{name}", stopped)
        whole = match_prefix(cases.model(), prompts, CE, held_out=chats(HELD), **options)
    assert whole.found.finished and whole.ids == match.ids and whole.stages.data.equals(match.stages.data)
    assert MatchedPrefix.load(tmp_path / "a").ids == match.ids


def test_folders_of_others_are_refused(match: MatchedPrefix, prompts: ms.Prompts, tmp_path: Path) -> None:
    model, out = cases.model(), tmp_path / "a"
    plain = prompts.without_completions()
    states = {name: ms.Prompts.from_chats(REQUESTS, model, prefix=name) for name in (cases.CATS, "Talk of trains.")}
    targets = {
        name: -ms.StateMatch(model.run(each, record=("resid_post", 0)).activations, ("resid_post", 0), align="end")
        for name, each in states.items()
    }
    match_prefix(model, plain, targets[cases.CATS], **SMALL, out=out)
    # The two have the same name, and differ in the states that they compare with.
    with pytest.raises(MechsteerError, match=r"holds a match of another objective: its soft prefix has the loss "):
        match_prefix(model, plain, targets["Talk of trains."], **SMALL, out=out)
    with pytest.raises(MechsteerError, match="holds another match: model, prompts, objective or options differ"):
        match_prefix(model, plain, targets[cases.CATS], **{**SMALL, "seed": 1}, out=out)
    file = out / "match.json"
    about = json.loads(file.read_text())
    for content, text in (
        ("{", r"match\.json is damaged \("),
        (json.dumps({**about, "stages": [1]}), r"match\.json is damaged \("),
        (
            json.dumps({**about, "format": "mechsteer.poem"}),
            r"has format 'mechsteer\.poem', expected 'mechsteer\.match'",
        ),
    ):
        file.write_text(content)
        with pytest.raises(MechsteerError, match=text):
            match_prefix(model, plain, targets[cases.CATS], **SMALL, out=out)


def test_what_cannot_be_is_said(prompts: ms.Prompts) -> None:
    model = cases.model()
    with pytest.raises(MechsteerError, match="How long the prefix is to be is not said"):
        match_prefix(model, ms.Prompts.from_chats(REQUESTS, model), CE, **SMALL)
    with pytest.raises(MechsteerError, match="evaluations=11 are used up by a beam of 2 x 3 over 2 slots, which may"):
        match_prefix(model, prompts, CE, **{**SMALL, "evaluations": 11})


# ---- the beam under constraints ----


def test_a_wide_beam_under_constraints_is_brute_force(prompts: ms.Prompts) -> None:
    model, top_k = cases.model(), 3
    table = embeddings(model)
    soft = (table[[60, 200]] + table[[300, 90]]) / 2
    free = Constraints(characters="ascii")
    # The words that it would take without them are forbidden.
    first = nearest_tokens(model, soft, k=2, allowed=free.allowed(model))
    words = {text.strip() for row in first for text in ms.vocabulary.token_texts(model, row) if text.strip()}
    keep = Constraints(forbidden_words=tuple(sorted(words)), characters="ascii")
    found = decode_beam(model, soft, prompts, CE, beam=99, top_k=top_k, constraints=keep, progress=False)
    trip, lists = RoundTrip(prompts), nearest_tokens(model, soft, k=8 * top_k, allowed=keep.allowed(model))

    def fine(ids: tuple[int, ...]) -> bool:
        placed = trip.near([ids])[0]
        said = keep.violation(ids, placed.text, before=placed.before, after=placed.after)
        return placed.survives and said is None

    kept: list[tuple[int, ...]] = [()]
    for choices in lists:
        kept = [each for ids in kept for each in [(*ids, t) for t in choices if fine((*ids, t))][:top_k]]
    nearest = tuple(row[0] for row in lists)
    losses = {ids: naive(prompts, ids) for ids in {*kept, *([nearest] if fine(nearest) else [])}}
    best = min(losses, key=lambda ids: losses[ids])
    assert found.ids == best and found.loss == pytest.approx(losses[best], abs=1e-5)
    assert fine(found.ids) and not any(word.lower() in found.text.lower() for word in words)
    loose = decode_beam(model, soft, prompts, CE, beam=99, top_k=top_k, constraints=free, progress=False)
    assert loose.ids != found.ids


def test_the_beams_errors(prompts: ms.Prompts) -> None:
    model = cases.model()
    soft = embeddings(model)[[60, 200]]
    with pytest.raises(MechsteerError, match=r"allowed= and constraints= are both given\. Pass one of them\."):
        decode_beam(model, soft, prompts, CE, allowed=[5], constraints=KEEP)
    with pytest.raises(MechsteerError, match=r"None of the 16 tokens nearest to slot 1 keeps to .*Loosen the constr"):
        decode_beam(model, soft, prompts, CE, beam=2, top_k=2, constraints=Constraints(min_tokens=3), progress=False)
