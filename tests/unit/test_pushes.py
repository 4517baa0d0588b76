"""How pushes are made from a case: what may stand in them, what they act on, and how they are weighed."""

from typing import Any

import pytest
import torch

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.propagator.weight_edit import RankEdit
from mechsteer.study import pushes
from mechsteer.study.case import Case
from tests.cases import case as small
from tests.cases import model, pooled, scores


@pytest.fixture(scope="module")
def case() -> Case:
    return small("pocket-1l", each=3, max_new_tokens=6)


def _edit(case: Case, size: float = 0.3) -> RankEdit:
    generator = torch.Generator().manual_seed(0)
    read, write = ms.Site("mlp_post", 0), ms.Site("resid_post", 0)
    reads = torch.randn(2, case.model.cfg.d_mlp, generator=generator) * size
    writes = torch.randn(2, case.model.d_model, generator=generator) * size
    return RankEdit(ms.Direction(reads, read, case.model.id), ms.Direction(writes, write, case.model.id))


def test_telltale_words_are_those_of_the_prefix_and_those_that_were_given(case: Case) -> None:
    assert {"cat", "feline", "talk", "about"} <= set(case.telltale) and len(set(case.telltale)) == len(case.telltale)
    other = small("pocket-1l", each=1, prefix="Be as kind as can be to everyone.", words=["gentle", "kind"])
    assert other.telltale == ("kind", "everyone", "gentle")


def test_slots_stand_where_the_prefix_does(case: Case) -> None:
    n = int(case.prefixed.span("prefix").sum(1).max())
    filled = case.slotted(n).with_prefix(list(pushes.reference(case).ids))
    assert torch.equal(filled.tokens, case.prefixed.padded("right").tokens)
    assert case.slotted(2).n_slots == 2 and case.slotted(2).labels == case.prefixed.labels


def test_other_words_are_searched_once_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SEARCHED": 2,
        "VALIDATED": 1,
        "SOFT_STEPS": 3,
        "EVALUATIONS": 8,
        "BEAM": 1,
        "TOP_K": 2,
    }.items():
        monkeypatch.setattr(pushes, name, value)
    fresh, asked, match = small("pocket-1l", each=3, max_new_tokens=4), [], pushes.match_prefix
    monkeypatch.setattr(pushes, "match_prefix", lambda *args, **more: asked.append(args) or match(*args, **more))
    found = pushes.matched(fresh)
    assert pushes.matched(fresh) is found and len(asked) == 1
    assert pushes.matched_rows(fresh) == (fresh.rows("search")[:2], fresh.rows("search")[2:3])
    soft, words = pushes.prefixes(fresh)
    assert words.ids == found.ids and repr(found.text) in words.size
    assert torch.equal(words.prompts.tokens, fresh.slotted(len(found.ids)).with_prefix(list(found.ids)).tokens)
    assert isinstance(soft.interventions[0], ms.SoftPrefix) and soft.slots == len(found.ids)
    assert not any(word in found.text.casefold() for word in fresh.telltale)


def test_unrelated_texts_do_not_show_the_behaviour_and_differ_by_use(case: Case) -> None:
    one, again, other = (pushes.unrelated(case, use, 6) for use in ("this", "this", "that"))
    assert one.texts == again.texts and one.texts != other.texts and len(one) == 6
    assert case.judge is not None
    assert not any(case.judge(text) for text in one.texts)
    assert one.without_completions().lengths.tolist() == [2] * 6  # BOS and the first token
    assert int(one.span("completion").sum(1).max()) <= pushes.TEXT_TOKENS - 1


def test_a_push_stands_before_other_texts(case: Case) -> None:
    texts = pushes.unrelated(case, "this", 2)
    prefix = pushes.reference(case)
    on = prefix.on(texts)
    for row in range(2):
        ids = texts.tokens[row][texts.mask[row]].tolist()
        assert on.tokens[row][on.mask[row]].tolist() == [ids[0], *prefix.ids, *ids[1:]]
    assert torch.equal(pushes.nothing(case).on(texts).tokens, texts.padded("right").tokens)
    soft = pushes.Push("soft", "", case.model, case.plain, slots=3).on(texts)
    assert soft.n_slots == 3 and soft.lengths.tolist() == (texts.lengths + 3).tolist()


def test_the_score_is_that_of_plain_runs(case: Case) -> None:
    rows = case.rows("search")[:2]
    direction = ms.Direction(torch.randn(case.model.d_model, generator=torch.Generator().manual_seed(1)),
                             ms.Site("resid_post", 0), case.model.id)  # fmt: skip
    add = ms.Add(direction, 2.0)
    push = pushes.Push("vector", "", case.model, case.plain, (add,), layer=0)
    found = pushes.score(case, push, rows)
    own = case.unsteered[rows]
    rise = pooled(*scores(case.model, own, [add])) - pooled(*scores(case.model, own))
    assert found["rise"] == pytest.approx(rise, abs=2e-4)
    assert case.judge is not None
    done = case.model.generate(case.plain[rows], interventions=[add], max_new_tokens=6)
    assert found["target"] == pytest.approx(sum(case.judge(text) for text in done.completions) / 2)
    assert found["score"] == pytest.approx(found["target"] - pushes.WEIGHT * found["rise"])


def test_without_a_judge_the_score_is_of_the_reference_completions() -> None:
    other = small("pocket-1l", each=2, prefix="Be kind to everyone you meet.", max_new_tokens=4)
    rows = other.rows("search")
    found = pushes.score(other, pushes.reference(other), rows)
    assert found["target"] == pytest.approx(-pooled(*scores(other.model, other.reference[rows])), abs=2e-4)


def test_an_edit_is_its_hook_form_and_its_size_that_of_the_change(case: Case) -> None:
    edit = _edit(case)
    push = pushes.edited(case, edit)
    tokens = case.plain[[0]].padded("right").tokens
    hooks: Any = edit.fwd_hooks(case.model)
    with torch.no_grad():
        expected = case.model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)
        found = push.model.hooked(tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    change = edit.reads.vectors.T @ edit.writes.vectors
    matrix = dict(case.model.hooked.named_parameters())["blocks.0.mlp.W_out"]
    share = 100 * float(change.norm() / matrix.detach().norm())
    assert push.size == f"rank 2 in the MLP of block 0, {share:.0f} % of that matrix's norm"
    assert push.layer == 0 and push.interventions == ()


def test_the_vector_is_chosen_once_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "BUDGET", 5)
    fresh = small("pocket-1l", each=2, max_new_tokens=4)
    asked = []
    choose = pushes.choose_alpha
    monkeypatch.setattr(pushes, "choose_alpha", lambda *args, **more: asked.append(1) or choose(*args, **more))
    found = pushes.chosen_vector(fresh)
    assert pushes.chosen_vector(fresh) is found and len(asked) == 1
    push = pushes.vector(fresh)
    (add,) = push.interventions
    assert isinstance(add, ms.Add) and add.alpha == found.alpha and add.direction is found.direction
    length = found.alpha / float(found.chosen.result["scale"].sel(direction=found.name))
    assert push.size == f"one vector after block 0, {length:.2g} of the stream's length"


def test_features_need_an_autoencoder(case: Case) -> None:
    with pytest.raises(MechsteerError, match="No sparse autoencoder that ships with mechsteer belongs to pocket-1l"):
        pushes.features(case)


def test_an_edit_has_nothing_to_add_where_the_prefix_adds_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pushes.unrelated(case, "this", 2)
    same = Case(case.settings, case.model, case.prefixed, case.prefixed)
    assert pushes._edit(same, same.rows("search"), 0, texts) is None
    with pytest.raises(MechsteerError, match="The prefix adds nothing behind block 0 of pocket-1l that an edit could"):
        pushes.weight_edit(same)


def test_models_under_study_stay_as_they_are(case: Case) -> None:
    before = case.model.id.hash
    pushes.edited(case, _edit(case))
    assert model("pocket-1l").id.hash == before and case.model.id.hash == before
