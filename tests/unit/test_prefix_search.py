"""Exact losses of candidates against plain runs, gradients against differences, and what searches promise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import ids

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.prefix import moves
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.constraints import Constraints
from mechsteer.prefix.round_trip import RoundTrip
from mechsteer.prefix.search import FoundPrefix, search_prefix
from mechsteer.vocabulary import embeddings, insert

Load = Callable[..., ms.Model]
CE = ms.TeacherForcedCE(first=2)
BASE = (7, 30, 90, 11)
NEAR = [
    BASE,
    (7, 30, 91, 11),
    (8, 30, 90, 11),
    (7, 30, 90, 12),
    (7, 30, 90),
    (7, 5, 30, 90, 11),
    (40, 41),
    (90, 30, 7, 11),
]


def some(model: ms.Model) -> ms.Prompts:
    """Left-padded prompts of unlike lengths with completions of unlike lengths."""
    rows = [[1, *row] for row in ids((4, 7, 5))]
    prompts = insert(ms.Prompts.from_ids(rows, tokenizer=model.tokenizer), where="prefix", slots=2)
    return prompts.with_completions(ids((3, 5, 2), seed=1)).padded("left")


def naive(model: ms.Model, prompts: ms.Prompts, objective: ms.Objective, prefix: Any, *, fluency: float = 0.0) -> float:
    """One plain forward pass of whole prompts."""
    filled = insert(prompts, prefix, where="prefix")
    values = objective(model.run(filled, record=objective.sites())).double()
    weights = objective.total_weight(filled).double() if isinstance(objective, ms.TeacherForcedCE) else values * 0 + 1
    loss = float((values * weights).sum() / weights.sum())
    if fluency:
        row = filled.padded("right")[0]
        at = int(insert(prompts, where="prefix", slots=len(prefix)).padded("right")[0].slots.int().argmax())
        logits = model.run(row).logits[0].double().log_softmax(-1)
        loss -= fluency * float(np.mean([logits[at + i - 1, token] for i, token in enumerate(prefix)]))
    return loss


def objectives(model: ms.Model, prompts: ms.Prompts) -> dict[str, ms.Objective]:
    state = model.run(insert(prompts, [3], where="prefix"), record=("resid_post", 1)).activations
    return {
        "cross entropy": CE,
        "everything": ms.TeacherForcedCE(span="all"),
        "gap": -ms.LogitGap([5, 6], [7, 9], reduce="logsumexp"),
        "sum": CE - 0.3 * ms.LogitGap([5], [7]),
        "state": -ms.StateMatch(state, ("resid_post", 1), at=-1, align="end"),
    }


# ---- losses ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
def test_losses_of_candidates_are_those_of_plain_runs(precise: Load, name: str) -> None:
    model = precise(name)
    prompts = some(model)
    for what, objective in objectives(model, prompts).items():
        losses = CandidateLosses(model, prompts, objective)
        expected = [naive(model, prompts, objective, each) for each in NEAR]
        for base in (None, BASE, (40, 2, 3, 4, 5, 6)):
            assert np.abs(losses.of(NEAR, base=base) - expected).max() < 1e-9, (what, base)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3", "mistral"])
def test_each_way_of_computing_less_gives_the_same(precise: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates share layer 0's keys and values, start together, and have clean keys in front of their own."""
    from mechsteer.backends import packing
    from mechsteer.backends.decoder import Alike, Decoder
    from mechsteer.prefix import candidates

    model = precise(name)
    # One prompt with a long beginning, in which the prefix is near the end: all cells have the same clean keys.
    prompts = ms.Prompts.from_ids([[1, *ids((14,))[0]]], tokenizer=model.tokenizer)
    prompts = insert(prompts, where="suffix", slots=4).with_completions(ids((5,), seed=1))
    near = [each for each in NEAR if len(each) == 4]
    taken: dict[str, int] = {"joined": 0, "alike": 0, "dense": 0}
    joined, alike, pack = Decoder._joined, Alike.of, packing.Pack.__init__

    def counted(self: Any, *args: Any) -> Any:
        taken["joined"] += 1
        return joined(self, *args)

    def kinds(tokens: Any, position: Any) -> Alike:
        found = alike(tokens, position)
        taken["alike"] += len(found.first) < len(tokens)
        return found

    monkeypatch.setattr(Decoder, "_joined", counted)
    monkeypatch.setattr(Alike, "of", staticmethod(kinds))
    fast = CandidateLosses(model, prompts, CE).of(near, base=BASE)
    assert taken["joined"] and taken["alike"], taken

    def absolute(self: Any, *args: Any) -> None:
        pack(self, *args)
        self.joined = self.sparse = False

    monkeypatch.setattr(packing.Pack, "__init__", absolute)
    monkeypatch.setattr(candidates, "CANDIDATE_EVEN", 0)
    rows = {"of": staticmethod(lambda tokens, position: None)}
    monkeypatch.setattr(candidates, "Alike", type("Alike", (), rows))
    taken["joined"] = 0
    slow = CandidateLosses(model, prompts, CE).of(near, base=BASE)
    assert taken["joined"] == 0
    assert np.abs(fast - slow).max() < 1e-11
    assert np.abs(fast - [naive(model, prompts, CE, each) for each in near]).max() < 1e-9


def test_batches_do_not_change_losses(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model)
    whole, parts = (CandidateLosses(model, prompts, CE, fluency=0.2) for _ in range(2))
    parts._tokens = 16
    assert len(list(parts._chunks(4))) > 1
    expected = [naive(model, prompts, CE, each, fluency=0.2) for each in NEAR]
    assert np.abs(whole.of(NEAR, base=BASE) - expected).max() < 1e-9
    assert np.abs(parts.of(NEAR, base=BASE) - expected).max() < 1e-9
    assert np.abs(parts.gradient(BASE)[1] - whole.gradient(BASE)[1]).max() < 1e-9
    assert whole.of([]).shape == (0,)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_the_gradient_is_that_of_the_pooled_loss(precise: Load, backend: str) -> None:
    model = precise("llama", backend)
    prompts, table, way = some(model), embeddings(model), 1e-5
    for what, objective in objectives(model, prompts).items():
        loss, gradient = CandidateLosses(model, prompts, objective).gradient(BASE)
        # The bridge's norms are fp32 whatever the model's type.
        assert abs(loss - naive(model, prompts, objective, BASE)) < (1e-9 if backend != "bridge" else 1e-5)
        slotted = insert(prompts, where="prefix", slots=4)
        filled = insert(prompts, BASE, where="prefix")
        for slot, entry in ((0, 3), (2, 11), (3, 30)):
            ends = []
            for sign in (1, -1):
                rows = table[list(BASE)].clone()
                rows[slot, entry] += sign * way
                values = objective(model.run(slotted, [ms.SoftPrefix(rows)], record=objective.sites())).double()
                weights = CE.total_weight(filled).double() if objective is CE else torch.ones_like(values)
                if isinstance(objective, ms.TeacherForcedCE) and objective is not CE:
                    # The slots' own tokens are no targets there; the weights are then other ones too.
                    break
                ends.append(float((values * weights).sum() / weights.sum()))
            if ends:
                assert abs(float(gradient[slot, entry]) - (ends[0] - ends[1]) / (2 * way)) < (
                    1e-6 if backend != "bridge" else 3e-2
                ), what


def test_what_stands_before_the_change_is_not_computed_again(precise: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise("llama")
    losses = CandidateLosses(model, some(model), CE)
    assert losses.decoder is not None
    rows: list[int] = []
    embed = losses.decoder.embed
    monkeypatch.setattr(
        losses.decoder, "embed", lambda tokens, *rest: (rows.append(len(tokens)), embed(tokens, *rest))[1]
    )
    losses.of([BASE], base=BASE)
    rows.clear()
    layout = losses.layout(4)
    after = int((layout.stop - layout.first).sum()) - 3 * 4
    for slot in range(4):
        changed = tuple(55 if i == slot else token for i, token in enumerate(BASE))
        losses.of([changed], base=BASE)
        assert rows.pop() == after + 3 * (4 - slot) and not rows


# ---- moves ----


def test_moves_are_what_they_say() -> None:
    rng, start = np.random.default_rng(0), (1, 2, 3, 4)
    top = [[10 * slot + r for r in range(5)] for slot in range(1, 5)]
    assert moves.replacements(start, top, 1) == [(1, t, 3, 4) for t in top[1]]
    mates = [(5, 6, 7, 8), (1, 2, 3)]
    crossed = moves.mixed(start, top, 50, rng, moves=["cross"], others=mates, shortest=4, longest=4)
    assert all(
        token in pair for each in crossed for token, pair in zip(each, zip(start, mates[0], strict=True), strict=True)
    )
    assert len(set(crossed)) > 8
    for each in moves.random_replacements(start, top, 50, rng):
        (slot,) = [i for i in range(4) if each[i] != start[i]]
        assert each[slot] in top[slot]
    made = moves.mixed(start, top, 300, rng, moves=moves.MOVES, shortest=3, longest=5)
    assert {len(each) for each in made} == {3, 4, 5}
    assert {len(each) for each in moves.mixed(start, top, 300, rng, moves=moves.MOVES, shortest=4, longest=4)} == {4}
    swapped = moves.mixed(start, top, 20, rng, moves=["swap"], shortest=4, longest=4)
    assert all(sorted(each) == sorted(start) and sum(a != b for a, b in zip(each, start)) == 2 for each in swapped)  # noqa: B905
    better = [(9, 2, 3, 4), (1, 2, 8, 4), (7, 2, 3, 4), (1, 6, 3, 4)]
    assert moves.merges(start, better) == [(9, 2, 8, 4), (9, 6, 8, 4), (9, 6, 3, 4)]
    assert sum(a != b for a, b in zip(moves.kicked(start, 2, top, rng), start, strict=True)) == 2
    assert moves.built([[1, 2], [3, 4]], lambda tried: [sum(each) != 1 for each in tried]) == (2, 3)
    assert moves.built([[1]], lambda tried: [False]) is None


# ---- searches ----


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket-1l", device="cpu")


@pytest.fixture(scope="module")
def chats(pocket: ms.Model) -> ms.Prompts:
    requests = ["Write a haiku on my birthday.", "Tell me something new."]
    reference = pocket.generate(
        ms.Prompts.from_chats(requests, pocket, prefix="Talk only about cats."), max_new_tokens=8
    )
    said = [row[keep].tolist() for row, keep in zip(reference.tokens, reference.span("completion"), strict=True)]
    return ms.Prompts.from_chats(requests, pocket, slots=4, completions=said)


NO_CATS = Constraints(forbidden_words=("cat", "kitten", "feline"), characters="ascii")


@pytest.mark.parametrize("method", ["hotflip", "gcg", "mixed"])
def test_the_answer_is_the_best_ever_evaluated_and_survives(pocket: ms.Model, chats: ms.Prompts, method: str) -> None:
    told: list[tuple[int, float, str]] = []
    options: dict[str, Any] = {"method": method, "evaluations": 40, "width": 10, "top_k": 16, "constraints": NO_CATS}
    found = search_prefix(pocket, chats, CE, tell=lambda *each: told.append(each), **options)
    losses, best = found.trajectory["loss"].values, found.trajectory["best"].values
    assert found.evaluated == len(losses) == 40 and found.finished and found.method == method
    assert found.loss == losses.min() == best[-1] and (np.diff(best) <= 0).all()
    assert best[0] == losses[0] > found.loss
    assert abs(found.loss - naive(pocket, chats, CE, found.ids)) < 1e-5
    assert len(found.ids) == 4 and found.text == RoundTrip(chats).text(found.ids)
    assert found.round_trip == (True, True) == RoundTrip(chats).survives(found.ids)
    assert NO_CATS.violation(found.ids, found.text) is None
    assert told[-1] == (40, found.loss, found.text)
    assert search_prefix(pocket, chats, CE, **options).ids == found.ids
    assert search_prefix(pocket, chats, CE, seed=1, **options).trajectory["loss"].values[0] != losses[0]


def test_lengths_stay_within_the_constraints(pocket: ms.Model, chats: ms.Prompts) -> None:
    keep = Constraints(min_tokens=2, max_tokens=5)
    found = search_prefix(pocket, chats, CE, evaluations=40, width=20, n_tokens=3, constraints=keep)
    assert 2 <= len(found.ids) <= 5
    fluent = search_prefix(
        pocket, chats, CE, evaluations=40, width=20, n_tokens=3, constraints=Constraints(fluency=1.0)
    )
    assert abs(fluent.loss - naive(pocket, chats, CE, fluent.ids, fluency=1.0)) < 1e-4


def test_a_start_that_may_not_be_returned_is_mended(pocket: ms.Model, chats: ms.Prompts) -> None:
    reference = tuple(pocket.tokenizer.encode("Talk only about cats.", add_special_tokens=False))
    found = search_prefix(pocket, chats, CE, start=reference, evaluations=30, width=10, constraints=NO_CATS)
    first, best = found.trajectory["loss"].values[0], found.trajectory["best"].values
    assert abs(first - naive(pocket, chats, CE, reference)) < 1e-5
    assert np.isnan(best[0]) and not np.isnan(best[1]) and found.ids != reference
    # All but the word stays, and the mended one is the second that is evaluated.
    only = search_prefix(pocket, chats, CE, start=reference, evaluations=2, constraints=NO_CATS)
    assert [a == b for a, b in zip(only.ids, reference, strict=True)] == [True, True, True, False, True]
    split = (reference[0], *pocket.tokenizer.encode("Ta", add_special_tokens=False), *[reference[1]] * 2)
    assert all(search_prefix(pocket, chats, CE, start=split, evaluations=3).round_trip)


@pytest.mark.parametrize("method", ["hotflip", "gcg", "mixed"])
def test_a_stopped_search_goes_on_as_if_it_had_not(
    pocket: ms.Model, chats: ms.Prompts, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": method, "width": 6, "top_k": 8, "restarts": 2, "constraints": NO_CATS}
    whole = search_prefix(pocket, chats, CE, evaluations=30, **options)

    def stop(evaluated: int, loss: float, text: str) -> None:
        if evaluated > 10:
            raise KeyboardInterrupt

    # In the middle of a step first, whose work is done again.
    original = CandidateLosses.gradient

    def broken(losses: CandidateLosses, prefix: Any) -> Any:
        calls.append(prefix)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(losses, prefix)

    calls: list[Any] = []
    monkeypatch.setattr(CandidateLosses, "gradient", broken)
    assert not search_prefix(pocket, chats, CE, evaluations=30, out=tmp_path / "a", **options).finished
    part = search_prefix(pocket, chats, CE, evaluations=30, tell=stop, out=tmp_path / "a", **options)
    assert not part.finished and 10 < part.evaluated < 30 and "interrupted" in repr(part)
    assert part.loss == part.trajectory["loss"].values[~np.isnan(part.trajectory["best"].values)].min()
    rest = search_prefix(pocket, chats, CE, evaluations=30, out=tmp_path / "a", **options)
    assert rest.ids == whole.ids and rest.finished
    assert np.array_equal(rest.trajectory["loss"].values, whole.trajectory["loss"].values)
    again = search_prefix(pocket, chats, CE, evaluations=30, out=tmp_path / "a", **options)
    assert again.evaluated == 30 and again.ids == whole.ids
    with pytest.raises(MechsteerError, match="holds another search: model, prompts, objective or options differ"):
        search_prefix(pocket, chats, CE, evaluations=30, out=tmp_path / "a", seed=4, **options)
    rest.save(tmp_path / "found.safetensors")
    loaded = FoundPrefix.load(tmp_path / "found.safetensors")
    assert (loaded.ids, loaded.text, loaded.loss) == (rest.ids, rest.text, rest.loss)
    assert loaded.round_trip == rest.round_trip and repr(loaded) == repr(rest)
    (tmp_path / "a" / "search.json").write_text("{")
    with pytest.raises(MechsteerError, match=r"search\.json is damaged"):
        search_prefix(pocket, chats, CE, evaluations=30, out=tmp_path / "a", **options)
    rest.trajectory.data["loss"].attrs.clear()
    ms.Result(rest.trajectory.data).save(tmp_path / "other.safetensors")
    with pytest.raises(MechsteerError, match="holds no found prefix"):
        FoundPrefix.load(tmp_path / "other.safetensors")


def test_all_that_may_be_said_is_found(precise: Load) -> None:
    """Against every prefix there is: one token, all allowed."""
    model = precise("llama")
    prompts = some(model)
    keep = Constraints()
    legal = [i for i in keep.allowed(model) if all(RoundTrip(prompts).survives((i,)))]
    best = min(legal, key=lambda i: naive(model, prompts, CE, (i,)))
    for method in ("hotflip", "mixed", "gcg"):
        found = search_prefix(model, prompts, CE, method=method, n_tokens=1, evaluations=130, width=130, top_k=200)
        assert found.ids == (best,), method


def test_errors_say_what_to_do(pocket: ms.Model, chats: ms.Prompts) -> None:
    plain = ms.Prompts.from_chats(["Hello."], pocket, completions=[[9]])
    ban = Constraints(reference=(9,), max_shared=0)
    for prompts, options, text in (
        (chats, {"method": "adam"}, "method got 'adam'. Pass one of 'hotflip', 'gcg', 'mixed'"),
        (chats, {"moves": ["jump"]}, "moves got 'jump'"),
        (chats, {"moves": ["swap"]}, "moves=('swap',) change no token"),
        (chats, {"width": 0}, "width=0 is none. Pass at least 1"),
        (chats, {"start": [5, 6], "n_tokens": 3}, "start has 2 tokens and n_tokens=3"),
        (chats, {"start": [99999]}, "token id 99999 is none of"),
        (plain, {}, "How long the prefix is to be is not said"),
        (chats, {"constraints": Constraints(reference=(9,), max_cosine=-1.0)}, "leaves none of the"),
        (chats, {"start": [9], "evaluations": 1, "constraints": ban}, "None of 1 candidates survives"),
        (chats, {"constraints": Constraints(reference=(9,), min_edit_distance=9)}, "Loosen the constraints"),
        (chats, {"n_tokens": 400}, "but the context of"),
    ):
        with pytest.raises(MechsteerError) as caught:
            search_prefix(pocket, prompts, CE, **{"evaluations": 5, **options})
        assert text in str(caught.value), text
    other = ms.KLFromBaseline(pocket.run(plain))
    with pytest.raises(MechsteerError, match="holds values for 1 prompts, and 2 were passed"):
        search_prefix(pocket, chats, other)
