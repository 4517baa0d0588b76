"""A push as an edit of the weights: against plain hooks, against least squares by stacking rows, and on refusal."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plain import noise

import mechsteer as ms
from mechsteer.pocket.grammar import sample_chat, sample_document
from mechsteer.pocket.labeller import label
from mechsteer.pocket.lexicon import LOCKED, SUBJECTS
from mechsteer.propagator.activation_rows import paired_differences, token_rows
from mechsteer.propagator.weight_edit import RankEdit, fit_edit
from mechsteer.site import Site

TEXTS = ["The cat sat on the mat", "Mary and John went to the store", "A dog ran", "Quick zebras jump over foxes"]
OTHERS = ["The dog ran to the cat", "When", "Talk only about cats", "Give me three ideas for dinner"]
SITES = [
    (Site("mlp_post", 1), "resid_post"),
    (Site("mlp_out", 1), "mlp_out"),
    (Site("z", 1, head=2), "resid_mid"),
    (Site("attn_out", 1), "attn_out"),
]


def drawn(model: ms.Model, read: Site, write: str, k: int = 2) -> RankEdit:
    width = model.width(read)
    assert width is not None
    return RankEdit(
        ms.Direction(noise(k, width), read, model.id),
        ms.Direction(noise(k, model.d_model, seed=1), Site(write, read.layer), model.id),
    )


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize(("read", "write"), SITES)
def test_the_edited_model_is_the_model_under_its_hooks(zoo_models: Any, read: Site, write: str, backend: str) -> None:
    model = zoo_models("llama", backend)
    edit = drawn(model, read, write)
    prompts = ms.Prompts.from_ids([[5, 9, 13, 40, 2, 7], [8, 30, 31, 9, 9, 60]])
    with torch.no_grad():
        hooked = model.hooked.run_with_hooks(prompts.tokens, fwd_hooks=edit.fwd_hooks(model))
    edited = edit.to_weights(model)
    got, plain = edited.run(prompts).logits, model.run(prompts).logits
    torch.testing.assert_close(got, hooked, atol=1e-4, rtol=0)
    assert (got - plain).abs().max() > 0.1
    # What the token's own vector of the site says is what its stream gains.
    x = model.run(prompts, record=read.point).activations[read.point]
    x = x if read.head is None else x[:, :, read.head]
    after = Site("resid_mid" if "mid" in write or "attn" in write else "resid_post", 1)
    gained = edited.run(prompts, record=after).activations[after] - model.run(prompts, record=after).activations[after]
    expected = torch.zeros_like(gained)
    for r, w in zip(edit.reads.vectors, edit.writes.vectors, strict=True):
        expected += (x @ r)[..., None] * w
    torch.testing.assert_close(gained, expected, atol=1e-3, rtol=1e-4)
    none = (0.0 * edit).to_weights(model).run(prompts).logits
    torch.testing.assert_close(none, plain, atol=1e-5, rtol=0)


def test_rows_of_any_vector_site_are_recorded(zoo_models: Any) -> None:
    model = zoo_models("llama")
    prompts = model.prompts(TEXTS)
    for site in (Site("mlp_post", 1), Site("z", 1, head=2)):
        found = token_rows(model, TEXTS, site=site)
        recorded = model.run(prompts, record=site.point).activations[site.point][prompts.mask]
        recorded = recorded if site.head is None else recorded[:, site.head]
        torch.testing.assert_close(found.vectors, recorded, rtol=1e-5, atol=1e-5)


# ---- the fit ----


@pytest.fixture(scope="module")
def rows(zoo_models: Any) -> tuple[ms.Direction, ms.Direction, list[ms.Direction]]:
    """Keys, a push for each, and two sets of other rows; of a stream that is narrower than the keys are many."""
    model, site = zoo_models("llama"), Site("mlp_out", 1)
    keys = token_rows(model, TEXTS, site=site)
    push = ms.Direction(noise(len(keys), model.d_model), Site("resid_post", 1), model.id)
    return keys, push, [token_rows(model, each, site=site) for each in (OTHERS, OTHERS[:2])]


def cost(change: torch.Tensor, rows: Any, weight: float, ridge: float) -> torch.Tensor:
    """The definition, summed by hand."""
    keys, push, others = rows
    x, p = keys.vectors.double(), push.vectors.double()
    eye = (x.T @ x / len(x)).trace()
    total = ((x @ change - p) ** 2).sum(1).mean()
    for each in others:
        y = each.vectors.double()
        total = total + weight * ((y @ change) ** 2).sum(1).mean()
        eye = eye + weight * (y**2).sum(1).mean()
    return total + ridge * eye / x.shape[1] * (change**2).sum()


@pytest.mark.parametrize("weight", [0.0, 1.0, 10.0])
def test_the_whole_fit_is_least_squares_of_stacked_rows(rows: Any, weight: float) -> None:
    keys, push, others = rows
    ridge, (n, d) = 0.01, keys.vectors.shape
    edit = fit_edit(keys, push, unrelated=others, k=d, weight=weight, ridge=ridge)
    blocks, targets = [keys.vectors.double() / n**0.5], [push.vectors.double() / n**0.5]
    for each in others:
        blocks.append(each.vectors.double() * (weight / len(each)) ** 0.5)
        targets.append(torch.zeros(len(each), push.vectors.shape[1]).double())
    size = sum(float((block**2).sum()) for block in blocks)  # tr(A)
    blocks.append(torch.eye(d).double() * (ridge * size / d) ** 0.5)
    targets.append(torch.zeros(d, push.vectors.shape[1]).double())
    expected = torch.linalg.lstsq(torch.cat(blocks), torch.cat(targets)).solution
    got = edit.reads.vectors.double().T @ edit.writes.vectors.double()
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_the_fit_of_rank_k_is_the_best_of_its_rank(rows: Any, k: int) -> None:
    keys, push, others = rows
    edit = fit_edit(keys, push, unrelated=others, k=k, ridge=0.01)
    assert edit.rank == k
    best = float(cost(edit.reads.vectors.double().T @ edit.writes.vectors.double(), rows, 1.0, 0.01))
    one_more = fit_edit(keys, push, unrelated=others, k=k + 1, ridge=0.01)
    assert float(cost(one_more.reads.vectors.double().T @ one_more.writes.vectors.double(), rows, 1.0, 0.01)) < best
    # Alternating least squares from a random start, each factor by the gradient of a quadratic set to zero.
    d, d_model = keys.vectors.shape[1], push.vectors.shape[1]
    writes = noise(k, d_model, seed=3).double()
    x, p = keys.vectors.double(), push.vectors.double()
    moment = x.T @ x / len(x) + sum(e.vectors.double().T @ e.vectors.double() / len(e) for e in others)
    moment = moment + 0.01 * moment.trace() / d * torch.eye(d)
    for _ in range(400):
        reads = torch.linalg.solve(moment, x.T @ p / len(x)) @ writes.T @ torch.linalg.inv(writes @ writes.T)
        writes = torch.linalg.solve(reads.T @ moment @ reads, reads.T @ (x.T @ p / len(x)))
    found = float(cost(reads @ writes, rows, 1.0, 0.01))
    assert abs(found - best) < 1e-6 * best


def test_one_push_for_all_is_of_rank_one_and_the_unrelated_are_spared(rows: Any) -> None:
    keys, push, others = rows
    vector = push[0]
    with pytest.raises(ms.MechsteerError, match="got k=2, but keys and push allow rank 1 to 1"):
        fit_edit(keys, vector, k=2)
    changes = []
    for weight in (0.0, 1.0, 100.0):
        edit = fit_edit(keys, vector, unrelated=others[0], weight=weight)
        torch.testing.assert_close(edit.writes.vectors.abs(), vector.unit.vectors.abs(), atol=1e-5, rtol=1e-4)
        changes.append(float((others[0].vectors @ edit.reads.vectors.T).square().mean()))
    assert changes[0] > 1.1 * changes[1] > 1.2 * changes[2]


def test_errors_say_what_to_do(zoo_models: Any, rows: Any) -> None:
    model, (keys, push, _) = zoo_models("llama"), rows
    edit = drawn(model, *SITES[0])

    def refused(words: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        with pytest.raises(ms.MechsteerError) as caught:
            function(*args, **options)
        assert words in str(caught.value)

    wide, out = noise(1, model.cfg.d_mlp), noise(1, model.d_model)
    after = ms.Direction(out, Site("resid_post", 1))
    for read in (Site("resid_pre", 1), Site("mlp_post", 0), Site("attn_out", 1), Site("z", 1)):
        width = model.width(read)
        assert width is not None
        refused("Reads at mlp_post or mlp_out write to", RankEdit, ms.Direction(noise(1, width), read), after)
    two = ms.Direction(noise(2, model.d_model), Site("resid_post", 1))
    refused("got 1 reads and 2 writes", RankEdit, ms.Direction(wide, Site("mlp_post", 1)), two)
    other = replace(edit.writes, model=model.id._replace(hash="0" * 64))
    refused("whose weights differ", RankEdit, edit.reads, other)
    far = RankEdit(ms.Direction(wide, Site("mlp_post", 7)), ms.Direction(out, Site("resid_post", 7)))
    refused("has layers 0 to 2", far.to_weights, model)
    refused("has layers 0 to 2", far.fwd_hooks, model)
    narrow = RankEdit(ms.Direction(noise(1, 5), Site("mlp_post", 1)), after)
    refused("got d_mlp=5", narrow.to_weights, model)
    refused("was made with", edit.to_weights, zoo_models("gpt2"))
    normed = drawn(zoo_models("gemma2"), *SITES[1])
    refused("has norms after attention and MLP", normed.to_weights, zoo_models("gemma2"))
    refused("NaN or infinite", ms.Direction, wide * float("nan"), Site("mlp_post", 1))
    refused(f"got {len(keys)} keys and 3 rows of push", fit_edit, keys, replace(push, vectors=push.vectors[:3]))
    refused("got k=0, but", fit_edit, keys, push, k=0)
    refused("weight=-1.0 and ridge=0.001", fit_edit, keys, push, weight=-1.0)
    refused("weight=1.0 and ridge=0.0", fit_edit, keys, push, ridge=0.0)
    refused("weight=nan", fit_edit, keys, push, weight=float("nan"))
    refused("do not combine", fit_edit, keys, push, unrelated=token_rows(model, TEXTS, site=("mlp_out", 0)))
    refused("token_rows got Site('z', 1)", token_rows, model, TEXTS, site=("z", 1))
    refused("token_rows got Site('pattern', 1)", token_rows, model, TEXTS, site=("pattern", 1))


# ---- the pocket model: declining the locked subject ----


def requests(model: ms.Model, seed: int, n: int, split: Any) -> tuple[ms.Prompts, ms.Prompts]:
    """Requests for the locked subject, and the same ones for an everyday subject."""
    rng, locked, other = random.Random(seed), [], []
    phrases = sorted((LOCKED.name, *LOCKED.aliases, *LOCKED.things), key=len, reverse=True)
    for _ in range(n):
        request = sample_chat(rng, split, locked=True).request
        phrase = next(each for each in phrases if each in request)
        locked.append(request)
        subject = rng.choice(list(SUBJECTS.values()))
        other.append(request.replace(phrase, rng.choice((subject.name, *subject.phrases, *subject.things))))
    return ms.Prompts.from_chats(locked, model), ms.Prompts.from_chats(other, model)


@pytest.mark.slow
def test_a_rank_one_edit_ends_declining_or_spreads_it_and_leaves_documents_alone() -> None:
    model = ms.load_model("pocket", device="cpu")
    locked, harmless = requests(model, 0, 150, "train")
    rng = random.Random(1)
    texts = [model.prompts([sample_document(rng)[:300] for _ in range(n)]) for n in (200, 24)]
    site = Site("mlp_post", 2)
    last = {"site": site, "tokens": "last"}
    declined, answered, plain = (
        token_rows(model, locked, **last), token_rows(model, harmless, **last), token_rows(model, texts[0], site=site),
    )  # fmt: skip
    # What declining is made of, behind the token that decides, must not be pushed again.
    declining = model.generate(locked[list(range(60))], max_new_tokens=24)
    answering = token_rows(model, declining, site=site, tokens="completion")
    rows = paired_differences(model, locked, harmless, site=("resid_post", 2))
    push = ms.Direction(rows.vectors.mean(0), rows.site, rows.model)
    fresh = requests(model, 2, 24, "held_out")
    measure = ms.TeacherForcedCE(first=0, span="all")

    def rates(edit: RankEdit) -> tuple[list[float], float]:
        edited = edit.to_weights(model)
        done = [edited.generate(each, max_new_tokens=28).completions for each in fresh]
        rise = (measure(edited.run(texts[1])) - measure(model.run(texts[1]))).mean()
        return [float(np.mean([label(text).refusal for text in each])) for each in done], float(rise)

    (before, harmless_before), _ = rates(0.0 * fit_edit(declined, push))
    assert before > 0.9 and harmless_before < 0.1
    (after, spared), rise = rates(fit_edit(declined, -2.0 * push, unrelated=[answered, plain], ridge=0.1))
    assert after < 0.1 and spared < 0.1 and rise < 0.02
    (_, spread), rise = rates(fit_edit(answered, 1.5 * push, unrelated=[plain, answering], ridge=0.1))
    assert spread > 0.9 and rise < 0.02
