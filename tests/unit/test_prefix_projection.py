"""Projection of soft prefixes to tokens: against loops over the vocabulary and over all combinations of tokens."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain import ids, noise

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.prefix.projection import decode_beam, nearest_tokens, project, replace_tokens
from mechsteer.prefix.soft import FoundSoft, optimise_soft_prefix
from mechsteer.vocabulary import allowed_tokens, embeddings, insert

SLOTS = 3
Load = Callable[..., ms.Model]
Ids = tuple[int, ...]
CE = ms.TeacherForcedCE(first=2)


def slotted(model: ms.Model) -> ms.Prompts:
    prompts = ms.Prompts.from_ids([[1, *row] for row in ids((3, 5))], tokenizer=model.tokenizer, padding="left")
    return insert(prompts, where="prefix", slots=SLOTS).with_completions(ids((3, 2), seed=1))


def soft(model: ms.Model, seed: int = 0) -> torch.Tensor:
    return embeddings(model).std() * noise(SLOTS, model.d_model, seed=seed)


class Naive:
    """The exact loss of ids, one whole run each: the cross entropy pooled by its weights."""

    def __init__(self, model: ms.Model) -> None:
        self.model, self.prompts, self.soft = model, slotted(model), soft(model)
        self.weights = CE.total_weight(self.prompts)
        self.table = embeddings(model)

    def _pooled(self, run: ms.Run) -> float:
        return float((CE(run) * self.weights).sum() / self.weights.sum())

    def of(self, tokens: Sequence[int]) -> float:
        """With ids in the first slots, and the soft prefix in the others."""
        if len(tokens) == SLOTS:
            return self._pooled(self.model.run(self.prompts.with_prefix(list(tokens))))
        mixed = torch.stack([*(self.table[token] for token in tokens), *self.soft[len(tokens) :]])
        return self._pooled(self.model.run(self.prompts, [ms.SoftPrefix(mixed)]))

    def best(self, lists: Sequence[Sequence[int]]) -> tuple[Ids, float]:
        """Of all combinations."""
        losses = {each: self.of(each) for each in itertools.product(*lists)}
        found = min(losses, key=lambda each: losses[each])
        return found, losses[found]


@pytest.fixture(scope="module")
def naive(zoo_models: Load) -> Naive:
    return Naive(zoo_models("llama"))


# ---- nearest tokens ----


@pytest.mark.parametrize("by", ["cosine", "inner_product", "l2"])
def test_nearest_tokens_are_those_of_a_loop(naive: Naive, by: str) -> None:
    def likeness(vector: torch.Tensor, token: int) -> float:
        row = naive.table[token]
        if by == "l2":
            return -float((vector - row).norm())
        product = float(vector @ row)
        return product if by == "inner_product" else product / float(row.norm())

    for allowed in (None, [5, 6, 40, 41, 90]):
        among = allowed_tokens(naive.model) if allowed is None else allowed
        ranked = [sorted(among, key=lambda token: -likeness(row, token)) for row in naive.soft]
        found = project(naive.model, naive.soft, by=by, allowed=allowed)
        assert found == tuple(row[0] for row in ranked)
        assert nearest_tokens(naive.model, naive.soft, k=4, by=by, allowed=allowed) == [row[:4] for row in ranked]


def test_tokens_project_to_themselves(naive: Naive) -> None:
    assert project(naive.model, naive.table[[17, 5, 99]], by="l2") == (17, 5, 99)
    assert project(naive.model, 3 * naive.table[[17, 5, 99]]) == (17, 5, 99)


def test_what_was_found_is_projected_with_its_own_model(zoo_models: Load) -> None:
    model = zoo_models("llama")
    found = optimise_soft_prefix(model, slotted(model), CE, n_restarts=2, steps=2, constraint="tokens")
    assert isinstance(found, FoundSoft)
    chosen = project(model, found)
    assert torch.equal(embeddings(model)[list(chosen)], found.embeddings)
    with pytest.raises(MechsteerError, match="This soft prefix was made with"):
        project(zoo_models("gpt2"), found)


# ---- decoding ----


@pytest.mark.parametrize("options", [{"beam": 16}, {"beam": 999, "by": "l2"}])
def test_a_beam_of_full_width_finds_the_best_of_all_combinations(naive: Naive, options: dict[str, Any]) -> None:
    lists = nearest_tokens(naive.model, naive.soft, k=4, by=options.get("by", "cosine"))
    best, loss = naive.best(lists)
    found = decode_beam(naive.model, naive.soft, naive.prompts, CE, top_k=4, **options)
    assert found.ids == best
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.evaluations == 1 + 4 + 16 + 64
    assert found.soft_loss == pytest.approx(naive.of(()), abs=1e-5)
    nearest = tuple(row[0] for row in lists)
    assert found.nearest_loss == pytest.approx(naive.of(nearest), abs=1e-5)
    gap = found.nearest_loss - found.soft_loss
    if gap > 0:
        assert found.gap_closed == pytest.approx((found.nearest_loss - found.loss) / gap)
    else:
        assert found.gap_closed != found.gap_closed


@pytest.mark.parametrize("method", ["beam", "viterbi"])
def test_narrow_decoding_is_a_plain_loop(naive: Naive, method: str) -> None:
    lists = nearest_tokens(naive.model, naive.soft, k=5)
    known = {(): naive.of(())}
    kept: list[Ids] = [()]
    trail = [known[()]]
    for choices in lists:
        known |= {(*each, token): naive.of((*each, token)) for each in kept for token in choices}
        longer = sorted(((*each, token) for each in kept for token in choices), key=lambda each: known[each])
        if method == "viterbi":
            kept = [next(each for each in longer if each[-1] == token) for token in choices]
            kept.sort(key=lambda each: known[each])
        else:
            kept = longer[:2]
        trail.append(known[kept[0]])
    nearest = tuple(row[0] for row in lists)
    known[nearest] = naive.of(nearest)
    found = decode_beam(naive.model, naive.soft, naive.prompts, CE, method=method, beam=2, top_k=5)
    best = min((each for each in known if len(each) == SLOTS), key=lambda each: known[each])
    assert found.ids == best
    assert found.loss == pytest.approx(known[best], abs=1e-5)
    assert found.evaluations == len(known)
    assert found.steps["loss"].values == pytest.approx(trail, abs=1e-5)
    assert found.steps.provenance["options"]["method"] == method
    assert repr(found).startswith("Hardened(") and f"{found.evaluations} evaluations" in repr(found)


# ---- several at once ----


def test_all_slots_at_once_finds_the_best_of_all_combinations(naive: Naive) -> None:
    lists = nearest_tokens(naive.model, naive.soft, k=4)
    best, loss = naive.best(lists)
    found = replace_tokens(naive.model, naive.soft, naive.prompts, CE, at_once=SLOTS, top_k=4)
    assert (found.ids, found.loss) == (best, pytest.approx(loss, abs=1e-5))
    assert found.evaluations == 1 + 64


def test_two_at_once_is_a_plain_loop(naive: Naive) -> None:
    lists, here = nearest_tokens(naive.model, naive.soft, k=4), (30, 31, 32)
    start = here
    known = {here: naive.of(here)}
    trail = [known[here]]
    while True:
        around = {
            tuple({a: x, b: y}.get(slot, token) for slot, token in enumerate(here))
            for a, b in itertools.combinations(range(SLOTS), 2)
            for x in (here[a], *lists[a])
            for y in (here[b], *lists[b])
        }
        known |= {each: naive.of(each) for each in around if each not in known}
        best = min(around, key=lambda each: known[each])
        if known[best] >= known[here]:
            break
        here = best
        trail.append(known[here])
    found = replace_tokens(
        naive.model, naive.soft, naive.prompts, CE, ids=start, at_once=2, top_k=4, rounds=20, tries=None
    )
    assert found.ids == here and len(trail) > 1
    assert found.steps["loss"].values == pytest.approx(trail, abs=1e-5)
    assert found.evaluations == len(known) + 1  # and the soft prefix
    assert found.nearest_loss == pytest.approx(known[start], abs=1e-5)


def test_tries_and_rounds_bound_the_evaluations(naive: Naive) -> None:
    def found(seed: int) -> Any:
        return replace_tokens(naive.model, naive.soft, naive.prompts, CE, top_k=8, tries=10, rounds=2, seed=seed)

    assert found(0).evaluations <= 2 + 2 * 10
    assert found(0).ids == found(0).ids
    assert len({found(seed).ids for seed in range(4)}) > 1
    assert found(0).loss <= found(0).nearest_loss


class Counted(ms.Objective):
    """The cross entropy, and of how many prompts it was asked for."""

    reads = CE.reads
    asked: list[int]

    def __init__(self) -> None:
        object.__setattr__(self, "asked", [])

    def __call__(self, run: ms.Run) -> torch.Tensor:
        self.asked.append(len(run.prompts))
        return CE(run)


@pytest.mark.parametrize("search", [decode_beam, replace_tokens])
def test_evaluations_are_counted(naive: Naive, search: Callable[..., Any]) -> None:
    counted = Counted()
    found = search(naive.model, naive.soft, naive.prompts, counted, top_k=3)
    assert sum(counted.asked) == found.evaluations * len(naive.prompts)


def test_only_allowed_tokens_are_tried(naive: Naive) -> None:
    among = [40, 50, 60, 70]
    for search in (decode_beam, replace_tokens):
        found = search(naive.model, naive.soft, naive.prompts, CE, allowed=among, top_k=99)
        assert set(found.ids) <= set(among)
        assert found.text == "".join(ms.Prompts.from_ids([found.ids], tokenizer=naive.model.tokenizer).str_tokens(0))


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        (decode_beam, {"method": "greedy"}, "method got 'greedy'. Pass one of 'beam', 'viterbi'"),
        (decode_beam, {"beam": 0}, "beam=0 is none. Pass at least 1"),
        (decode_beam, {"top_k": 0}, "top_k=0 is none"),
        (decode_beam, {"by": "l1"}, "by got 'l1'. Pass one of 'cosine', 'inner_product', 'l2'"),
        (decode_beam, {"soft": noise(2, 32)}, "soft prefix has 2 embeddings, and the prompts reserve 3 slots"),
        (decode_beam, {"soft": noise(3, 16)}, "got d_model=16"),
        (decode_beam, {"weights": torch.ones(5)}, "weights= has 5 numbers for 2 prompts"),
        (replace_tokens, {"at_once": 0}, "at_once=0 is none"),
        (replace_tokens, {"tries": 0}, "tries=0 is none"),
        (replace_tokens, {"ids": [5]}, "ids= has 1 ids for 3 slots. Pass one for each"),
        (replace_tokens, {"ids": [5, 5, 999]}, "token id 999 is none of"),
    ],
)
def test_options_that_do_not_fit(
    naive: Naive, search: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    given = {"soft": naive.soft, **options}
    with pytest.raises(MechsteerError, match=message):
        search(naive.model, given.pop("soft"), naive.prompts, CE, **given)


class Breaks(ms.Objective):
    """Is NaN."""

    reads = CE.reads

    def __call__(self, run: ms.Run) -> torch.Tensor:
        return CE(run) * torch.nan


def test_a_loss_that_is_nan_is_refused(naive: Naive) -> None:
    with pytest.raises(MechsteerError, match=r"is NaN or infinite with the ids \(\). Choose another"):
        decode_beam(naive.model, naive.soft, naive.prompts, Breaks())
