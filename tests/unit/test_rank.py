"""The rank of a behaviour: rows, their spectrum, and the test that removes and adds them."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mechsteer as ms
from mechsteer.pocket.corpus import TEXT_MIXTURE, sample_documents
from mechsteer.pocket.grammar import sample_chat
from mechsteer.pocket.labeller import label
from mechsteer.pocket.lexicon import LOCKED, SUBJECTS
from mechsteer.propagator.activation_rows import paired_differences, prompt_gradients, token_rows, whitened
from mechsteer.propagator.rank import least_rank, principal, rank_test, spectrum
from mechsteer.result import bootstrap_ci

TEXTS = ["The cat sat on the mat", "Mary and John went to the store", "A dog ran", "Quick zebras jump over foxes"]
OTHERS = ["The dog ran to the cat", "When", "Talk only about cats", "Give me three ideas for dinner"]
SITE = ms.Site("resid_post", 1)


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket", device="cpu")


def declines(text: str) -> bool:
    return label(text).refusal


def pairs(model: ms.Model, seed: int, n: int, split: Any) -> tuple[ms.Prompts, ms.Prompts]:
    """Requests for the locked subject, and the same ones for an everyday subject."""
    rng, locked, other = random.Random(seed), [], []
    phrases = sorted((LOCKED.name, *LOCKED.aliases, *LOCKED.things), key=len, reverse=True)
    for _ in range(n):
        request = sample_chat(rng, split, locked=True).request
        phrase = next(each for each in phrases if each in request)
        subject = rng.choice(list(SUBJECTS.values()))
        words = (*(subject.phrases or (subject.name,)), *subject.things)
        locked.append(request)
        other.append(request.replace(phrase, rng.choice(words)))
    return ms.Prompts.from_chats(locked, model), ms.Prompts.from_chats(other, model)


# ---- rows ----


@pytest.mark.parametrize("tokens", ["last", "all", 0])
def test_the_mean_of_paired_differences_is_the_difference_of_means(zoo_models: Any, tokens: Any) -> None:
    model = zoo_models("llama")
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE, tokens=tokens)
    both = [model.prompts(each) for each in (TEXTS, OTHERS)]
    chosen: Any = tokens if isinstance(tokens, str) else tuple(each.at(tokens) for each in both)
    expected = ms.difference_of_means(model, *both, sites=SITE, tokens=chosen)[SITE]
    torch.testing.assert_close(rows.vectors.mean(0), expected.vector, rtol=1e-5, atol=1e-5)
    alone = paired_differences(model, TEXTS[1], OTHERS[1], site=SITE, tokens=tokens)
    torch.testing.assert_close(rows.vectors[1], alone.vector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_gradients_are_finite_differences(zoo_models: Any, architecture: str, tokens: str) -> None:
    model, measure = zoo_models(architecture), ms.LogitGap(7, 9)
    rows = prompt_gradients(model, TEXTS, measure, site=SITE, tokens=tokens)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    at = None if tokens == "all" else -1
    ends = []
    for size in (1e-2, -1e-2):
        run = model.run(TEXTS, [ms.Add(vector, size, site=SITE, at=at)])
        ends.append(measure(run).double())
    slope = (ends[0] - ends[1]) / 2e-2
    torch.testing.assert_close(rows.vectors.double() @ vector.double(), slope, rtol=2e-2, atol=2e-3)
    assert slope.abs().max() > 0.01


def test_gradients_do_not_depend_on_the_batch_or_the_padding(zoo_models: Any) -> None:
    model, measure = zoo_models("llama"), ms.LogitGap(7, torch.tensor([9, 10, 11, 12]))
    prompts = model.prompts(TEXTS)
    rows = prompt_gradients(model, prompts.padded("left"), measure, site=SITE)
    many = prompt_gradients(
        model, prompts[[i % 4 for i in range(600)]], ms.LogitGap(7, torch.tensor([9, 10, 11, 12] * 150)), site=SITE
    )
    torch.testing.assert_close(rows.vectors.repeat(150, 1), many.vectors, rtol=1e-4, atol=1e-6)
    alone = [prompt_gradients(model, text, ms.LogitGap(7, 9 + i), site=SITE) for i, text in enumerate(TEXTS)]
    torch.testing.assert_close(rows.vectors, ms.Direction.stack(alone).vectors, rtol=1e-4, atol=1e-6)


# ---- spectrum ----


def test_the_spectrum_of_rows_of_known_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator).double()).Q for n in (9, 16))
    known = torch.tensor([4.0, 2.0, 1.0, 0.0]).double()
    rows = ms.Direction(((u * known) @ v.T).float(), SITE)
    even = ms.Direction(torch.eye(16)[:5], SITE)
    result = spectrum({"known": rows, "even": even, "one": ms.Direction(torch.ones(1, 16), SITE)})
    assert result["singular"].dims == ("direction", "component")
    np.testing.assert_allclose(result["singular"].sel(direction="known")[:4], known, atol=1e-6)
    share = np.array([16, 4, 1]) / 21
    one = result.sel(direction="known")
    np.testing.assert_allclose(one["effective_rank"], np.exp(-(share * np.log(share)).sum()), rtol=1e-5)
    np.testing.assert_allclose(one["participation_ratio"], 21**2 / (16**2 + 4**2 + 1), rtol=1e-5)
    assert one["rank_90"] == 2
    np.testing.assert_allclose(result["effective_rank"].values[1:], [5, 1], rtol=1e-5)
    np.testing.assert_allclose(result["participation_ratio"].values[1:], [5, 1], rtol=1e-5)
    np.testing.assert_allclose(result["rank_90"].values[1:], [5, 1])
    # Five orthonormal rows have a fifth of their length along their mean.
    np.testing.assert_allclose(result["mean_share"].values[1:], [0.2, 1], rtol=1e-5)
    assert np.isnan(result["share"].sel(direction="one").values[1:]).all()


def test_the_principal_directions_are_the_closest_subspace(zoo_models: Any) -> None:
    rows = paired_differences(zoo_models("llama"), TEXTS, OTHERS, site=SITE)
    basis = principal(rows, 2)
    torch.testing.assert_close(basis.vectors @ basis.vectors.T, torch.eye(2), atol=1e-5, rtol=0)
    kept = torch.linalg.matrix_norm(rows.vectors @ basis.vectors.T) ** 2
    shares = spectrum(rows)["share"].values[0]
    assert math.isclose(float(kept / torch.linalg.matrix_norm(rows.vectors) ** 2), shares[:2].sum(), rel_tol=1e-5)
    assert (basis.vectors @ rows.vectors.mean(0) > 0).all()


def test_whitened_rows_cost_the_texts_least(zoo_models: Any) -> None:
    model = zoo_models("llama")
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    texts = token_rows(model, OTHERS, site=SITE)
    prompts = model.prompts(OTHERS)
    recorded = model.run(prompts, record=SITE).activations[SITE]
    torch.testing.assert_close(texts.vectors, recorded[prompts.mask], rtol=1e-5, atol=1e-5)
    turned = whitened(rows, texts, ridge=0.3)
    # The definition, by gradient: |Y w|^2 / n + ridge tr(C) / d |w|^2 grows along v_i alone.
    w, y = turned.vectors.double().requires_grad_(), texts.vectors.double()
    cost = ((y @ w.T) ** 2).mean(0).sum() + 0.3 * (y**2).sum(1).mean() / y.shape[1] * (w**2).sum()
    slope = torch.autograd.grad(cost, w)[0]
    cosines = torch.cosine_similarity(slope, rows.vectors.double(), dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-5, rtol=0)
    assert torch.cosine_similarity(turned.vectors, rows.vectors).max() < 0.99
    assert math.isclose(turned.vectors.norm(), rows.vectors.norm(), rel_tol=1e-5)
    longer = token_rows(model, TEXTS, site=SITE)
    alike = whitened(rows, [texts, longer], ridge=0.3)
    repeated = torch.cat([texts.vectors.repeat(len(longer), 1), longer.vectors.repeat(len(texts), 1)])
    torch.testing.assert_close(alike.vectors, whitened(rows, ms.Direction(repeated, SITE), ridge=0.3).vectors)
    far = whitened(rows, texts, ridge=1e6)
    torch.testing.assert_close(far.vectors, rows.vectors, rtol=1e-3, atol=1e-4)


# ---- the test of a rank ----


@pytest.mark.parametrize("everywhere", [True, False])
def test_ablation_is_one_run_for_each_cell(zoo_models: Any, everywhere: bool) -> None:
    model, measure = zoo_models("llama"), ms.LogitGap(7, 9)
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    result = rank_test(
        model, TEXTS, rows, behaviour=measure, ks=(0, 1, 3), unrelated=OTHERS, everywhere=everywhere, n_random=1
    )
    assert result["behaviour"].dims == ("subspace", "k", "prompt")
    assert result["subspace"].values.tolist() == ["found", "random 0"]
    ce = ms.TeacherForcedCE(first=0, span="all")
    plain = model.run(OTHERS)
    for k in (1, 3):
        _, _, basis = torch.linalg.svd(rows.vectors, full_matrices=False)
        edit = [ms.Ablate(basis[:k], site=None if everywhere else SITE, everywhere=everywhere)]
        cell = result.sel(subspace="found", k=k)
        np.testing.assert_allclose(cell["behaviour"], measure(model.run(TEXTS, edit)), atol=1e-4)
        after = model.run(OTHERS, edit)
        np.testing.assert_allclose(cell["cross_entropy"], ce(after) - ce(plain), atol=1e-4)
        np.testing.assert_allclose(cell["kl"], ms.KLFromBaseline(plain, where="all")(after), atol=1e-4)
    assert abs(result["behaviour"].sel(k=3) - result["behaviour"].sel(k=0)).min("prompt").max() > 1e-3
    np.testing.assert_allclose(result["cross_entropy"].sel(k=0), 0, atol=1e-5)
    np.testing.assert_allclose(result["behaviour"].sel(k=0), measure(model.run(TEXTS)).expand(2, -1), atol=1e-5)


def test_the_ablation_is_an_edit_of_the_weights(zoo_models: Any) -> None:
    model, measure = zoo_models("llama"), ms.LogitGap(7, 9)
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    result = rank_test(model, TEXTS, rows, behaviour=measure, ks=(1, 3), n_random=0)
    for k in (1, 3):
        edited = ms.Ablate(principal(rows, k), everywhere=True).to_weights(model)
        np.testing.assert_allclose(result.sel(k=k)["behaviour"][0], measure(edited.run(TEXTS)), atol=1e-4)


@pytest.mark.parametrize(("push", "architecture"), [("ablate", "llama"), ("ablate", "gpt2"), ("add", "llama")])
@pytest.mark.parametrize("judged", [False, True])
def test_the_weights_give_the_numbers_of_the_hooks(zoo_models: Any, push: str, architecture: str, judged: bool) -> None:
    model = zoo_models(architecture)
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    behaviour: Any = (lambda text: len(text) % 7 / 7) if judged else ms.LogitGap(7, 9)
    both = [
        rank_test(
            model, TEXTS, rows, behaviour=behaviour, push=push, form=form, ks=(0, 1, 3), alpha=2.0, unrelated=OTHERS,
            n_random=1, max_new_tokens=4, progress=False,
        )
        for form in ("hooks", "weights")
    ]  # fmt: skip
    assert set(both[0].data.data_vars) == set(both[1].data.data_vars)
    for name in ("behaviour", "cross_entropy", "kl"):
        assert both[0][name].dims == both[1][name].dims
        np.testing.assert_allclose(both[1][name], both[0][name], atol=1e-4)
        for end in ("low", "high"):
            np.testing.assert_allclose(both[1][f"{name}_{end}"], both[0][f"{name}_{end}"], atol=1e-4)
        assert np.abs(both[0][name].sel(k=3) - both[0][name].sel(k=0)).max() > 1e-2
    assert both[1].provenance["options"]["form"] == "weights"


def test_means_come_with_their_bootstrap_interval(zoo_models: Any) -> None:
    model, measure = zoo_models("llama"), ms.LogitGap(7, 9)
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    result = rank_test(model, TEXTS, rows, behaviour=measure, ks=(0, 2), unrelated=OTHERS, n_random=1, seed=3)
    for name, over in (("behaviour", "prompt"), ("cross_entropy", "text"), ("kl", "text")):
        for subspace in result["subspace"].values:
            cell = result.sel(subspace=subspace, k=2)
            low, high = bootstrap_ci(cell[name].values.astype(np.float64), seed=3)
            np.testing.assert_allclose([cell[f"{name}_low"], cell[f"{name}_high"]], [low, high], rtol=1e-6)
            assert low < cell[name].mean(over) < high


def test_texts_with_completions_are_judged_on_these(zoo_models: Any) -> None:
    model = zoo_models("llama")
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    texts = model.prompts(TEXTS).with_completions(OTHERS)
    result = rank_test(model, TEXTS, rows, behaviour=ms.LogitGap(7, 9), ks=(1,), unrelated=texts, n_random=0)
    edit, ce = [ms.Ablate(principal(rows, 1), everywhere=True)], ms.TeacherForcedCE(first=0)
    plain, after = model.run(texts), model.run(texts, edit)
    np.testing.assert_allclose(result["cross_entropy"][0, 0], ce(after) - ce(plain), atol=1e-4)
    np.testing.assert_allclose(result["kl"][0, 0], ms.KLFromBaseline(plain, where="completion")(after), atol=1e-4)


def test_what_is_added_has_the_length_of_the_mean_in_the_subspace(zoo_models: Any) -> None:
    model = zoo_models("llama")
    last = model.n_layers - 1
    site = ms.Site("resid_post", last)
    rows = paired_differences(model, TEXTS, OTHERS, site=site)
    # The distance that the stream moves is the length of what was added.
    moved = ms.StateMatch(model.run(TEXTS, record=site).activations, site, at=-1, measure="mse")
    result = rank_test(model, TEXTS, rows, behaviour=moved, push="add", ks=(0, 1, 4), alpha=2.0, at=-1, n_random=2)
    lengths = [0.0]
    for k in (1, 4):
        basis = principal(rows, k).vectors
        lengths.append(float(torch.linalg.vector_norm(2.0 * basis @ rows.vectors.mean(0))))
    got = result["behaviour"].values
    ratio = got[:, 1:] / got[:, 1:2]
    assert np.ptp(got[:, 1], axis=-1).max() < 1e-3 * got[:, 1].max()
    np.testing.assert_allclose(ratio[..., 1, :], (lengths[2] / lengths[1]) ** 2, rtol=1e-3)
    np.testing.assert_allclose(got[:, 0], 0, atol=1e-6)
    assert lengths[2] > lengths[1] > 0


def test_a_seed_fixes_the_random_subspaces_and_a_judge_reads_completions(zoo_models: Any) -> None:
    model = zoo_models("llama")
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)

    def judge(text: str) -> bool:
        return len(text) % 2 == 0

    def go(seed: int) -> np.ndarray:
        result = rank_test(
            model, TEXTS, rows, behaviour=judge, ks=(0, 2), n_random=2, seed=seed, max_new_tokens=6, unrelated=OTHERS
        )
        edit = [ms.Ablate(principal(rows, 2), everywhere=True)]
        done = model.generate(TEXTS, max_new_tokens=6, interventions=edit).completions
        assert result.sel(subspace="found", k=2)["behaviour"].values.tolist() == [judge(text) for text in done]
        plain = [judge(text) for text in model.generate(TEXTS, max_new_tokens=6).completions]
        assert (result["behaviour"].sel(k=0).values == plain).all()
        return result["kl"].values

    first, again, other = go(0), go(0), go(1)
    assert (first == again).all()
    assert (first[0] == other[0]).all() and np.abs(first[1:, 1] - other[1:, 1]).min() > 1e-6


def test_errors_say_what_to_do(zoo_models: Any) -> None:
    model = zoo_models("llama")
    rows = paired_differences(model, TEXTS, OTHERS, site=SITE)
    gap = ms.LogitGap(7, 9)

    class Broken(ms.Objective):
        reads = gap.reads

        def __call__(self, run: ms.Run) -> torch.Tensor:
            return gap(run) * math.nan

    def refused(words: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        with pytest.raises(ms.MechsteerError) as caught:
            function(*args, **options)
        assert words in str(caught.value)

    refused("got 4 positives and 1 negatives. Pass pairs", paired_differences, model, TEXTS, ["a"], site=SITE)
    refused("works on the residual stream at chosen tokens", paired_differences, model, TEXTS, OTHERS, site=("z", 0))
    nowhere = "no token that tokens='completion' means"
    refused(nowhere, prompt_gradients, model, TEXTS, gap, site=SITE, tokens="completion")
    constant = ms.StateMatch(model.run(TEXTS, record=("resid_pre", 0)).activations, ("resid_pre", 0), at=-1)
    refused("has no gradient at blocks.1.hook_resid_post", prompt_gradients, model, TEXTS, constant, site=SITE)
    refused("All rows of 'rows' are zero", spectrum, ms.Direction(torch.zeros(2, 8), SITE))
    refused("spectrum got no directions", spectrum, {})
    refused("5 directions were asked for, but the rows at", principal, rows, 5)
    refused("span 4. Pass 1 to 4", rank_test, model, TEXTS, rows, behaviour=gap, ks=(0, 5))
    refused("push got 'pull'", rank_test, model, TEXTS, rows, behaviour=gap, push="pull")
    refused("ks=[-1] and n_random=3", rank_test, model, TEXTS, rows, behaviour=gap, ks=(-1,))
    refused("form got 'bias'", rank_test, model, TEXTS, rows, behaviour=gap, form="bias")
    for options in ({"at": -1}, {"everywhere": False}):
        refused(
            "has no equal in the weights",
            rank_test,
            model,
            TEXTS,
            rows,
            behaviour=gap,
            ks=(1,),
            form="weights",
            **options,
        )
    refused("Add at blocks.1.hook_resid_post with at=-1 has no equal in the weights", rank_test, model, TEXTS, rows,
            behaviour=gap, ks=(1,), push="add", form="weights", at=-1)  # fmt: skip
    norms = zoo_models("gemma2")
    theirs = paired_differences(norms, TEXTS, OTHERS, site=SITE)
    refused(
        "has norms after attention and MLP", rank_test, norms, TEXTS, theirs, behaviour=gap, ks=(1,), form="weights"
    )
    refused("is NaN or infinite on prompt 0", rank_test, model, TEXTS, rows, behaviour=Broken(), ks=(0,))
    refused("<lambda> is NaN or infinite on prompt 0", rank_test, model, TEXTS, rows, behaviour=lambda text: math.nan,
            ks=(0,), max_new_tokens=2)  # fmt: skip
    refused("numbers that are NaN or infinite", prompt_gradients, model, TEXTS, Broken(), site=SITE)
    refused(
        "alpha=nan is not finite", rank_test, model, TEXTS, rows, behaviour=gap, ks=(1,), push="add", alpha=math.nan
    )
    refused("whitened got no texts", whitened, rows, [])
    refused("whitened got ridge=nan", whitened, rows, rows, ridge=math.nan)
    refused("ridge=0.0. Pass a finite number above 0", whitened, rows, rows, ridge=0.0)
    elsewhere = ms.Direction(rows.vectors, ms.Site("resid_post", 0))
    refused("do not combine. Take both at one site", whitened, rows, elsewhere)
    result = rank_test(model, TEXTS, rows, behaviour=gap, ks=(0,), n_random=0)
    refused("had no unrelated texts", least_rank, result, behaviour=0.1, cross_entropy=0.02)


# ---- the pocket model: declining the locked subject ----


def corpus(model: ms.Model, seed: int, n: int) -> ms.Prompts:
    """Fresh texts as in training (chats, documents, sentences), none of which declines."""
    texts = sample_documents(random.Random(seed), model.tokenizer, 2 * n, mixture=TEXT_MIXTURE)
    kept = [each.ids[:160] for each in texts if LOCKED.name not in model.tokenizer.decode(each.ids).lower()]
    kept = [
        ids for ids in kept if not any(word in model.tokenizer.decode(ids) for word in ("is locked", "cannot talk"))
    ]
    return ms.Prompts.from_ids([list(ids) for ids in kept[:n]], tokenizer=model.tokenizer)


@pytest.fixture(scope="module")
def locked(pocket: ms.Model) -> ms.Direction:
    """What the token that decides carries when the subject is locked, after block 2."""
    return paired_differences(pocket, *pairs(pocket, 0, 200, "train"), site=("resid_post", 2))


def test_one_direction_ablated_everywhere_ends_declining(pocket: ms.Model) -> None:
    """Layer and ridge are those that `benchmarks/refusal.py` chooses on wordings of the training split."""
    locked, harmless = pairs(pocket, 0, 100, "train")
    answers = pocket.generate(harmless[list(range(40))], max_new_tokens=24)
    rows = paired_differences(pocket, locked, harmless, site=("resid_post", 4))
    texts = [
        token_rows(pocket, each, site=rows.site, tokens=tokens)
        for each, tokens in ((corpus(pocket, 1, 60), "all"), (answers, "completion"))
    ]
    turned = whitened(rows, texts, ridge=10.0)
    rows = ms.Direction(turned.vectors.mean(0), rows.site, rows.model)
    fresh, others = pairs(pocket, 2, 16, "held_out")
    options: dict[str, Any] = {"n_random": 1, "max_new_tokens": 24}
    result = rank_test(pocket, fresh, rows, behaviour=declines, ks=(0, 1), unrelated=corpus(pocket, 3, 40), **options)
    # The same as edits of the weights; and the model's own answers to harmless requests.
    own = pocket.generate(others, max_new_tokens=32)
    again = rank_test(pocket, fresh, rows, behaviour=declines, ks=(1,), unrelated=own, form="weights", **options)
    assert (again["behaviour"].sel(k=1).values == result["behaviour"].sel(k=1).values).all()
    assert again["cross_entropy"].sel(subspace="found", k=1).mean() < 0.02
    rate, rise = result["behaviour"].mean("prompt"), result["cross_entropy"].mean("text")
    assert (rate.sel(k=0) > 0.95).all()
    assert rate.sel(subspace="found", k=1) < 0.1
    assert rise.sel(subspace="found", k=1) < 0.02
    assert (rate.sel(k=1)[1:] > 0.95).all()
    assert least_rank(result, behaviour=0.1, cross_entropy=0.02) == 1
    assert least_rank(result, behaviour=0.1, cross_entropy=-1.0) is None


def test_one_direction_added_makes_it_decline_everything(pocket: ms.Model, locked: ms.Direction) -> None:
    fresh = pairs(pocket, 4, 24, "held_out")[1]
    rows = ms.Direction(locked.vectors.mean(0), locked.site, locked.model)
    result = rank_test(
        pocket, fresh, rows, behaviour=declines, push="add", ks=(0, 1), alpha=2.0, at=-1, n_random=1, max_new_tokens=28
    )
    rate = result["behaviour"].mean("prompt")
    assert (rate.sel(k=0) < 0.05).all()
    assert rate.sel(subspace="found", k=1) > 0.9
    assert (rate.sel(k=1)[1:] < 0.05).all()
    assert least_rank(result, behaviour=0.9) == 1
