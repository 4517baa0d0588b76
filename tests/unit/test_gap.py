"""The logit gap at the embeddings, searches for tokens that move it, and tokens as vectors, against plain loops."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from plain import ids, noise

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.propagator.gap import (
    allowed_tokens,
    embeddings,
    gap_gradient,
    insert,
    linear_prediction,
    nearest_tokens,
)
from mechsteer.propagator.prompt_vector import prompt_vector, replacement_loss, tokens_like
from mechsteer.propagator.token_search import search_tokens
from mechsteer.result import bootstrap_ci
from mechsteer.site import Site

# A bridge says that it computes norms by another formula where hooks hold them.
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited")
backends = pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
GAP = ms.LogitGap([5, 6], [7, 9], reduce="logsumexp")
FEW = [5, 11, 17, 30, 44, 63, 90]
Load = Callable[..., ms.Model]


@pytest.fixture(scope="module")
def pocket() -> ms.Model:
    return ms.load_model("pocket")


def some(model: ms.Model, lengths: tuple[int, ...] = (12, 9)) -> ms.Prompts:
    return ms.Prompts.from_ids(ids(lengths), tokenizer=model.tokenizer, padding="left")


def plainly(model: ms.Model, prompts: ms.Prompts, tokens: Any = (), where: str = "suffix") -> np.ndarray:
    """The gap of each prompt, of lists of ids put together by hand, one run each."""
    values = []
    for row, keep in zip(prompts.tokens, prompts.mask, strict=True):
        own = row[keep].tolist()
        if where == "suffix":
            own = [*own, *tokens]
        else:  # behind a BOS token, which is no user text
            start = int(own[0] == model.tokenizer.bos_token_id)
            own = [*own[:start], *tokens, *own[start:]]
        values.append(float(GAP(model.run(ms.Prompts.from_ids([own]), logits="last"))))
    return np.array(values)


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


# ---- where tokens go ----


def test_ids_go_around_the_users_text_or_into_slots(pocket: ms.Model) -> None:
    prompts = ms.Prompts.from_chats(["Tell me about cats.", "Hello"], pocket, completions=["Once", "Well"])
    before, after = insert(prompts, [700, 701], where="prefix"), insert(prompts, [700, 701], slots=1)
    for row in range(2):
        plain, first, last = (each.tokens[row][each.mask[row]].tolist() for each in (prompts, before, after))
        end = plain.index(4)  # where the template opens the answer
        assert first == [*plain[:2], 700, 701, *plain[2:]]
        assert last == [*plain[:end], 700, 701, pocket.tokenizer.pad_token_id, *plain[end:]]
    assert bool((before.span("prefix").sum(1) == 2).all()) and before.n_slots == 0
    assert after.n_slots == 1 and bool((after.span("prefix").sum(1) == 3).all())
    assert torch.equal(before.span("completion").sum(1), prompts.span("completion").sum(1))
    reserved = ms.Prompts.from_chats(["Tell me about cats."], pocket, slots=4)
    chat = insert(reserved, [700, 701], where="suffix")
    asked = ms.Prompts.from_chats(["Tell me about cats."], pocket, slots=2).with_prefix([700, 701])
    assert torch.equal(chat.tokens, asked.tokens) and chat.n_slots == 0
    assert torch.equal(insert(prompts).tokens, prompts.tokens)


def test_embeddings_are_what_enters(zoo_models: Load, architecture: str) -> None:
    tokens = zoo.prompts(batch=2, n_pos=7)
    for backend in ("hooked_transformer", "bridge"):
        model = zoo_models(architecture, backend)
        entered = model.run(ms.Prompts.from_ids(tokens), record="embed").activations[Site("embed")]
        torch.testing.assert_close(embeddings(model)[tokens], entered)


def test_special_tokens_and_ids_without_a_token_are_never_allowed(tmp_path: Path, pocket: ms.Model) -> None:
    model = ms.load_model(zoo.write_folder("llama", tmp_path / "wide", vocab_size=zoo.D_VOCAB + 9))
    top = len(model.tokenizer)
    assert top < model.d_vocab
    assert allowed_tokens(model, forbidden=[20, 21]) == [each for each in range(4, top) if each not in (20, 21)]
    texts = {pocket.tokenizer.decode([each]) for each in allowed_tokens(pocket, forbidden=["Once"])}
    assert not texts & {"<|bos|>", "<|user|>", "<|assistant|>", "Once"} and "Warning" in texts
    found = search_tokens(model, some(model), measure=GAP, n_tokens=1, candidates=[0, 1, 2, top, 30])
    assert found.ids == (30,)


# ---- the gradient ----


@pytest.mark.parametrize("filler", [None, 17])
def test_gradient_is_the_slope_at_slots_and_positions(precise: Load, architecture: str, filler: int | None) -> None:
    model = precise(architecture)
    prompts = insert(some(model), slots=2, where="prefix")
    found = gap_gradient(model, prompts, measure=GAP, filler=filler)
    assert found.gradient.dtype == torch.float64 and bool((found.gradient[~prompts.mask] == 0).all())
    fill = embeddings(model).mean(0) if filler is None else embeddings(model)[filler]
    soft, way, step = ms.SoftPrefix(fill.expand(2, -1)), noise(model.d_model).double(), 1e-5

    def value(size: float, at: Any) -> torch.Tensor:
        return GAP(model.run(prompts, [soft, ms.Add(way, size, site=Site("embed"), at=at)], logits="last"))

    close(found.value, GAP(model.run(prompts, [soft], logits="last")))
    for at in ("slots", "decision", "user", 4):
        place = -1 if at == "decision" else at
        near, far = (value(size, place) - value(-size, place) for size in (step, 2 * step))
        slope = (8 * near - far) / (12 * step)
        assert float(slope.abs().max()) > 1e-3
        close(found.target(at) @ way, slope, 1e-7)
    close(found.slots.sum(1), found.target())
    close(found.direction().vector, found.target().mean(0))
    one_by_one = gap_gradient(model, prompts, measure=GAP, filler=filler, tokens=1)
    close(one_by_one.gradient, found.gradient)
    bridge = gap_gradient(precise(architecture, "bridge"), prompts, measure=GAP, filler=filler)
    close(bridge.gradient, found.gradient, 1e-4)  # it computes norms in fp32


def test_gradient_of_an_objective_with_one_value_for_each_prompt(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model, (12, 7, 9))
    each = ms.LogitGap(torch.tensor([5, 6, 8]), [7])
    found = gap_gradient(model, prompts, measure=each, tokens=1)
    for row, token in enumerate([5, 6, 8]):
        alone = gap_gradient(model, prompts[row].padded("right"), measure=ms.LogitGap(token, 7))
        close(found.gradient[row, : alone.gradient.shape[1]], alone.gradient[0])


@pytest.mark.parametrize("by", ["cosine", "inner_product"])
def test_nearest_tokens_are_those_of_a_loop(precise: Load, by: str) -> None:
    model = precise("gemma2")
    target, table = noise(model.d_model).double(), embeddings(model)
    scores = {}
    for token in range(4, len(model.tokenizer)):
        product = float(table[token] @ target)
        scores[token] = product / float(table[token].norm() * target.norm()) if by == "cosine" else product
    del scores[20]
    best = sorted(scores, key=lambda token: -scores[token])[:6]
    found = nearest_tokens(model, target, by=by, n=6, forbidden=[20])
    assert found["token"].values.tolist() == best
    close(found[by], [scores[token] for token in best], 1e-6)


@backends
def test_linear_prediction_against_runs_by_hand(precise: Load, backend: str) -> None:
    model = precise("llama", backend)
    prompts, candidates = some(model), [[5, 30], [44, 11], [63, 90], [5, 30]]
    found = linear_prediction(model, prompts, candidates, measure=GAP, filler=17, patterns="layers", progress=False)
    assert found["token"].values.tolist() == ["5 30", "44 11", "63 90"]
    plain, fillers, table = plainly(model, prompts), plainly(model, prompts, [17, 17]), embeddings(model)
    slotted = insert(prompts, slots=2)
    held = model.run(insert(prompts, [17, 17]), record="pattern").activations
    held = ms.Activations({site: held[site] for site in held}, prompts=slotted, model=model.id)
    fixed = [ms.Replace(Site("pattern", layer), held) for layer in range(model.n_layers)]
    tolerance = 1e-5
    step = 1e-5 if backend == "hooked_transformer" else 3e-3
    for index, pair in enumerate(candidates[:3]):
        inserted = plainly(model, prompts, pair)
        close(found["true"][index], inserted - fillers, tolerance)
        close(found["inserted"][index], inserted - plain, tolerance)
        delta = ms.Add(table[pair].sum(0), site=Site("embed"), at=-1)
        close(found["as_sum"][index], GAP(model.run(prompts, [delta], logits="last")).numpy() - plain, tolerance)
        soft = [ms.SoftPrefix(table[[17, 17]] + size * (table[pair] - table[[17, 17]])) for size in (step, -step, 1.0)]
        up, down = (GAP(model.run(slotted, [each], logits="last")).numpy() for each in soft[:2])
        close(found["predicted"][index], (up - down) / (2 * step), 1e-6 if backend == "hooked_transformer" else 1e-3)
        kept = GAP(model.run(slotted, [soft[2], *fixed], logits="last")).numpy()
        close(found["fixed_patterns"][index], kept - fillers, tolerance)
        for layer in range(model.n_layers):
            one = GAP(model.run(slotted, [soft[2], fixed[layer]], logits="last")).numpy()
            close(found["fixed_layer"].sel(layer=layer)[index], one - fillers, tolerance)
    rest = (found["true"] - found["fixed_patterns"]).values
    assert np.abs(rest).max() > 1e-3
    for name, first, second in (("correlation", "true", "predicted"), ("correlation_as_sum", "inserted", "as_sum")):
        each = [np.corrcoef(found[first].values[:, row], found[second].values[:, row])[0, 1] for row in range(2)]
        close(found[name], each, 1e-9)
    for name, first, second in (("explained", "true", "predicted"), ("explained_as_sum", "inserted", "as_sum")):
        each = [1 - sum((t - p) ** 2 for t, p in pairs) / sum(t**2 for t, _ in pairs) for pairs in (
            list(zip(found[first].values[:, row], found[second].values[:, row], strict=True)) for row in range(2)
        )]  # fmt: skip
        close(found[name], each, 1e-9)
    true = found["true"].values
    slopes = [np.linalg.lstsq(true[:, [row]], rest[:, row], rcond=None)[0][0] for row in range(2)]
    close(found["attention_share"], slopes, 1e-9)
    moved = true - found["fixed_layer"].values
    close(found["attention_share_layer"], (moved * true).sum(1) / (true**2).sum(0), 1e-9)
    for name in ("correlation", "explained", "attention_share"):
        ends = [float(found[f"{name}_{end}"]) for end in ("low", "high")]
        close(ends, [float(found[name].min()), float(found[name].max())], 1e-9)  # two prompts: one, or the other twice


def test_intervals_of_the_prediction_cover_its_mean_over_prompts(precise: Load) -> None:
    model = precise("llama")
    found = linear_prediction(model, some(model, (12, 9, 7, 10)), FEW, measure=GAP, patterns=True)
    for name in ("correlation", "correlation_as_sum", "explained", "explained_as_sum", "attention_share"):
        low, high = bootstrap_ci(found[name].values, seed=0)
        close([found[f"{name}_low"], found[f"{name}_high"]], [low, high], 1e-9)
        assert low < float(found[name].mean()) < high
    near = embeddings(model)[30] + 1e-4 * noise(model.d_model).double()
    exact = linear_prediction(model, some(model), [30, 30], measure=GAP, filler=near, patterns=True)
    assert float(exact["explained"].min()) > 0.9999 and bool(np.isnan(exact["correlation"]).all())


def test_prediction_is_exact_for_small_steps_and_not_for_large_ones(precise: Load) -> None:
    """The filler close to the tokens: prediction and truth agree to second order."""
    model = precise("qwen3")
    near = embeddings(model)[30] + 1e-4 * noise(model.d_model).double()
    found = linear_prediction(model, some(model), [30], measure=GAP, filler=near)
    true, predicted = found["true"].values, found["predicted"].values
    assert np.abs(true).max() > 1e-6
    assert np.abs(true - predicted).max() < 1e-2 * np.abs(true).max()
    far = linear_prediction(model, some(model), [30], measure=GAP, filler=44)
    assert np.abs((far["true"] - far["predicted"]).values).max() > 0.1 * np.abs(far["true"].values).max()


# ---- searches ----


@pytest.mark.parametrize("where", ["suffix", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_greedy_is_the_loop_over_candidates(precise: Load, name: str, where: str) -> None:
    model = precise(name)
    prompts, chosen = some(model), ()
    gaps = [plainly(model, prompts)]
    for _ in range(2):
        tried = {token: plainly(model, prompts, (*chosen, token), where) for token in FEW}
        best = max(tried, key=lambda token: tried[token].mean())
        chosen, gaps = (*chosen, best), [*gaps, tried[best]]
    found = search_tokens(model, prompts, measure=GAP, where=where, n_tokens=2, candidates=FEW, progress=False)
    assert found.ids == chosen
    close(found.gaps["gap"], np.stack(gaps))
    assert found.forward_passes == 2 * (1 + 2 * len(FEW))


def test_beam_finds_what_trying_all_pairs_finds(precise: Load) -> None:
    model = precise("mistral")
    prompts = some(model)
    tried = {pair: plainly(model, prompts, pair).mean() for pair in itertools.product(FEW, repeat=2)}
    best = max(tried, key=tried.__getitem__)
    wide = search_tokens(model, prompts, measure=GAP, method="beam", beam=len(FEW), n_tokens=2, candidates=FEW)
    assert wide.ids == best
    close(wide.gaps["gap"].mean("prompt")[-1], tried[best])
    assert wide.forward_passes == 2 * (1 + len(FEW) + len(FEW) ** 2)
    narrow = search_tokens(model, prompts, measure=GAP, method="beam", beam=1, n_tokens=2, candidates=FEW)
    assert narrow.ids == search_tokens(model, prompts, measure=GAP, n_tokens=2, candidates=FEW).ids


def test_sorted_adds_single_tokens_in_their_order_until_the_gap_is_closed(precise: Load) -> None:
    model = precise("gpt2")
    prompts = some(model)
    alone = {token: plainly(model, prompts, [token]).mean() for token in FEW}
    order = sorted(FEW, key=lambda token: -alone[token])
    whole = search_tokens(model, prompts, measure=GAP, method="sorted", n_tokens=3, candidates=FEW)
    assert whole.ids == tuple(order[:3])
    assert whole.forward_passes == 2 * (1 + len(FEW) + 3)
    for step in range(4):
        close(whole.gaps["gap"][step], plainly(model, prompts, order[:step]))
    lowest = whole.gaps["gap"].min("prompt").values
    until = float(lowest[1])
    assert lowest[0] < until - 1e-3
    cut = search_tokens(model, prompts, measure=GAP, method="sorted", n_tokens=3, candidates=FEW, until=until - 1e-4)
    assert cut.ids == whole.ids[:1]
    closed = search_tokens(model, prompts, measure=GAP, candidates=FEW, until=float(lowest[0]) - 1.0)
    assert closed.ids == () and closed.forward_passes == 2 and closed.text == ""


@pytest.mark.parametrize("by", ["cosine", "inner_product"])
def test_projection_takes_the_nearest_token_at_each_slot(precise: Load, by: str) -> None:
    model = precise("gemma3")
    prompts = some(model)
    targets = gap_gradient(model, insert(prompts, slots=3), measure=-GAP).slots.mean(0)
    expected = tuple(int(nearest_tokens(model, each, by=by, n=1)["token"][0]) for each in targets)
    found = search_tokens(model, prompts, measure=-GAP, method="projection", by=by)
    assert found.ids == expected
    assert found.forward_passes == 2 * (1 + 1 + 3)
    for step in range(4):
        close(found.gaps["gap"][step], -plainly(model, prompts, expected[:step]))


def test_round_trip_is_of_the_tokens_in_place(pocket: ms.Model) -> None:
    prompts = ms.Prompts.from_chats(["Tell me about cats."], pocket)
    once = pocket.tokenizer.encode("Once", add_special_tokens=False)[0]
    gap = ms.LogitGap("Once", "Warning", tokenizer=pocket)
    whole = search_tokens(pocket, prompts, measure=gap, n_tokens=1, candidates=[once])
    assert whole.round_trip == (True,) and whole.text == "Once"
    assert whole.gaps["token"].values.tolist() == ["", "Once"]
    first, *rest = (pocket.tokenizer.convert_tokens_to_ids(letter) for letter in "Once")
    broken = search_tokens(pocket, insert(prompts, rest), measure=gap, n_tokens=1, candidates=[first])
    assert broken.round_trip == (False,)  # the four letters together read as one token


# ---- tokens as vectors ----


@backends
def test_vector_is_the_difference_at_the_decision(precise: Load, backend: str) -> None:
    model = precise("gemma2", backend)
    prompts, tokens = some(model), [30, 44]
    found = prompt_vector(model, prompts, tokens)
    for row in range(2):
        own = prompts.tokens[row][prompts.mask[row]].tolist()
        runs = [model.run(ms.Prompts.from_ids([each]), record="resid_post") for each in (own, [*own, *tokens])]
        for layer in range(model.n_layers):
            before, after = (run.activations[Site("resid_post", layer)][0, -1] for run in runs)
            close(found.deltas[layer, row], after - before)
    close(found.direction(1).vector, found.deltas[1].mean(0))
    assert found.direction(1).site == Site("resid_post", 1)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_replacement_against_runs_by_hand(precise: Load, name: str) -> None:
    model = precise(name)
    prompts, others, tokens = some(model), some(model, (8, 15, 10)), [30, 44]
    vector = prompt_vector(model, prompts, tokens, where="prefix")
    found = replacement_loss(model, others, vector, measure=GAP)
    plain, filled = insert(others), insert(others, tokens, where="prefix")
    reference = model.run(filled, logits="last")
    close(found["gap_tokens"], GAP(reference))
    close(found["gap_plain"], plainly(model, others))
    own = prompt_vector(model, others, tokens, where="prefix").deltas
    for layer in range(model.n_layers):
        site, mean = Site("resid_post", layer), vector.deltas[layer].mean(0)
        close(found["norm"].sel(layer=layer), mean.norm())
        likeness = [float(each @ mean / each.norm() / mean.norm()) for each in own[layer]]
        assert max(likeness) < 0.999
        close(found["cosine"].sel(layer=layer), likeness)
        for name, rows in (("mean", mean.expand(3, -1)), ("own", own[layer])):
            for row in range(3):
                run = model.run(plain[row], [ms.Add(rows[row], site=site, at=-1)], logits="last")
                got = found.sel(vector=name, layer=layer)
                close(got["gap"][row], GAP(run)[0])
                p, q = reference.rows[row].log_softmax(0), run.rows[0].log_softmax(0)
                close(got["kl"][row], (p.exp() * (p - q)).sum())
    last = found.sel(vector="own", layer=model.n_layers - 1)
    close(last["gap"], found["gap_tokens"])
    close(found["loss"], (found["gap_tokens"] - found["gap"]).transpose(*found["loss"].dims))
    for name in ("loss", "gap", "kl", "kl_plain", "cosine"):
        axis = found[name].dims.index("prompt")
        low, high = bootstrap_ci(np.moveaxis(found[name].values, axis, 0).astype(float), seed=0)
        close(found[f"{name}_low"], low)
        close(found[f"{name}_high"], high)
    assert float(last["kl"].max()) < 1e-6 < float(found["kl_plain"].min())


def test_tokens_like_a_vector_are_those_of_a_loop_and_the_first_is_itself(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model)
    vector = prompt_vector(model, prompts, [44]).direction(1)
    expected = {}
    for token in FEW:
        added = prompt_vector(model, prompts, [token]).deltas[1]
        expected[token] = torch.nn.functional.cosine_similarity(added, vector.vector[None]).numpy()
    found = tokens_like(model, prompts, vector, candidates=FEW)
    assert found["token"].values.tolist() == sorted(FEW, key=lambda token: -expected[token].mean())
    assert int(found["token"][0]) == 44
    for token in FEW:
        close(found["cosine"].sel(token=token), expected[token])
    close(found["norm"].sel(token=44), prompt_vector(model, prompts, [44]).deltas[1].norm(dim=1))


# ---- on the pocket model ----


def test_a_found_suffix_flips_the_opening_of_fresh_requests(pocket: ms.Model) -> None:
    """Found on two requests, it makes others answer with a letter instead of a warning, as what they write shows."""
    gap = ms.LogitGap("Dear", "Warning", tokenizer=pocket)
    search = ms.Prompts.from_chats([f"What should I {each}?" for each in ("cook", "paint")], pocket)
    fresh = ms.Prompts.from_chats([f"What should I {each}?" for each in ("plant", "do today", "read", "buy")], pocket)
    found = search_tokens(pocket, search, measure=gap, n_tokens=3, until=0.0, progress=False)
    assert found.gaps["gap"].values[-1].min() > 0 > found.gaps["gap"].values[0].max()
    before, after = (gap(pocket.run(insert(fresh, each), logits="last")) for each in ((), found.ids))
    assert float(before.max()) < 0 < float(after.min())
    answers = pocket.generate(insert(fresh, found.ids), max_new_tokens=8).completions
    assert all(text.startswith("Dear ") for text in answers)


# ---- what does not fit ----


def test_errors_say_what_to_do(precise: Load) -> None:
    model = precise("llama")
    prompts = some(model)
    no_user = replace(prompts, roles=torch.zeros_like(prompts.roles))

    class Flat(ms.Objective):
        def __call__(self, run: ms.Run) -> torch.Tensor:
            return torch.zeros(len(run.prompts))

    class Broken(ms.Objective):
        reads = GAP.reads

        def __call__(self, run: ms.Run) -> torch.Tensor:
            return GAP(run) * float("nan")

    def message(call: Callable[[], Any]) -> str:
        with pytest.raises(MechsteerError) as caught:
            call()
        return str(caught.value)

    vector = prompt_vector(model, prompts, [30])
    other = replace(vector, model=vector.model._replace(hash="0" * 64))
    for call, text in (
        (lambda: insert(prompts, [5], where="middle"), "where got 'middle'"),
        (lambda: insert(no_user, [5]), "prompt 0 has neither slots nor user text to put tokens at"),
        (lambda: gap_gradient(model, prompts, measure=Flat()), "has no gradient at the embeddings"),
        (lambda: gap_gradient(model, prompts, measure=Broken()), "is NaN or infinite on prompt 0"),
        (
            lambda: gap_gradient(model, prompts, measure=ms.LogitGap(torch.tensor([5]), 7)),
            "1 prompts, and 2 were passed",
        ),
        (lambda: gap_gradient(model, prompts, measure=GAP, filler=999), "filler=999 is no id"),
        (lambda: gap_gradient(model, prompts, measure=GAP, filler=torch.zeros(3)), "filler has shape [3]"),
        (lambda: gap_gradient(model, prompts, measure=GAP).slots, "The prompts have no slots"),
        (lambda: nearest_tokens(model, noise(32).double(), by="l2"), "by got 'l2'"),
        (lambda: nearest_tokens(model, vector.direction(0)), "Pass one at the embeddings"),
        (lambda: linear_prediction(model, prompts, [], measure=GAP), "candidates have no tokens"),
        (lambda: linear_prediction(model, prompts, [[5], [5, 6]], measure=GAP), "candidates have 1 or 2 tokens"),
        (lambda: linear_prediction(model, prompts, [5], measure=Broken()), "is NaN or infinite on prompt 0"),
        (lambda: linear_prediction(model, prompts, [5], measure=Flat()), "has no gradient at the embeddings"),
        (lambda: linear_prediction(model, prompts, [5], measure=GAP, patterns="heads"), "patterns got 'heads'"),
        (lambda: replacement_loss(model, prompts, vector, measure=Broken()), "is NaN or infinite on prompt 0"),
        (lambda: linear_prediction(model, prompts, [500], measure=GAP), "token id 500 is none of"),
        (lambda: allowed_tokens(model, forbidden=range(zoo.D_VOCAB)), "forbidden= leaves none of the"),
        (lambda: search_tokens(model, prompts, measure=GAP, method="magic"), "method got 'magic'"),
        (lambda: search_tokens(model, prompts, measure=GAP, n_tokens=0), "n_tokens=0 is none"),
        (lambda: search_tokens(model, prompts, measure=GAP, candidates=[1, 2]), "All 2 candidates are forbidden"),
        (lambda: search_tokens(model, prompts, measure=Broken(), candidates=FEW), "is NaN or infinite on prompt 0"),
        (lambda: prompt_vector(model, prompts, []), "prompt_vector got no ids"),
        (lambda: vector.direction(3), "PromptVector has no layer 3"),
        (lambda: replacement_loss(model, prompts, other, measure=GAP), "PromptVector was made with"),
        (lambda: tokens_like(model, prompts, vector.direction(0), candidates=[1]), "All 1 candidates are forbidden"),
    ):
        assert text in message(call)
