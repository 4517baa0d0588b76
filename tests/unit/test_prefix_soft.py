"""Soft prefixes: batched restarts against a plain loop, constraints and pulls against loops, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import assert_close, ids, noise

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.prefix.embedding_space import EmbeddingSpace
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prefix.soft import FoundSoft, optimise_soft_prefix
from mechsteer.vocabulary import allowed_tokens, embeddings, insert

SLOTS = 3
Load = Callable[..., ms.Model]
CE = ms.TeacherForcedCE(first=2)


def slotted(model: ms.Model, where: str = "prefix") -> ms.Prompts:
    """Left-padded prompts of unlike lengths with completions of unlike lengths."""
    rows = [[1, *row] for row in ids((4, 7, 5, 6))]
    prompts = ms.Prompts.from_ids(rows, tokenizer=model.tokenizer, padding="left")
    return insert(prompts, where=where, slots=SLOTS).with_completions(ids((3, 5, 2, 4), seed=1)).padded("left")


def target(model: ms.Model, prompts: ms.Prompts, site: str = "resid_post") -> ms.StateMatch:
    """The states of the same prompts with some tokens in their slots."""
    filled = prompts.with_prefix([7, 30, 90])
    return ms.StateMatch(model.run(filled, record=(site, 1)).activations, (site, 1))


def objectives(model: ms.Model, prompts: ms.Prompts) -> dict[str, ms.Objective]:
    state, gap = target(model, prompts), ms.LogitGap([5, 6], [7, 9], reduce="logsumexp")
    return {
        "cross entropy": CE,
        "cosine": -state,
        "squared error": ms.StateMatch(state_of(model, prompts), ("resid_post", 1), at="completion", measure="mse"),
        "gap": -gap,
        "sum": CE - 0.5 * gap - 2 * state,
        "before the slots too": ms.TeacherForcedCE(span="all"),
        "by hooks": -target(model, prompts, "ln1_normalized"),
    }


def state_of(model: ms.Model, prompts: ms.Prompts) -> ms.Activations:
    return model.run(prompts.with_prefix([7, 30, 90]), record=("resid_post", 1)).activations


def by_hand(
    model: ms.Model, prompts: ms.Prompts, objective: ms.Objective, embeddings: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one prefix and its gradient, from one whole run with hooks."""
    leaf = embeddings.detach().clone().requires_grad_()
    run = model.run(prompts, [ms.SoftPrefix(leaf)], record=objective.sites(), grad=True)
    loss = (objective(run) * weights).sum() / weights.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---- the loss and its gradient ----


@pytest.mark.parametrize(("architecture", "where"), [("llama", "prefix"), ("gpt2", "suffix"), ("gemma2", "prefix")])
def test_losses_and_gradients_are_those_of_one_run_a_prefix(precise: Load, architecture: str, where: str) -> None:
    model = precise(architecture)
    prompts = slotted(model, where)
    vectors = noise(3, SLOTS, model.d_model, seed=4).double()
    rows = [0, 1, 3]
    for name, objective in objectives(model, prompts).items():
        pooled = isinstance(objective, ms.TeacherForcedCE)
        weights = objective.total_weight(prompts).double() if pooled else torch.ones(len(prompts)).double()
        counted = torch.zeros(len(prompts)).double()
        counted[rows] = weights[rows]
        expected = [by_hand(model, prompts, objective, each, counted) for each in vectors]
        for batch_rows in (None, 40) if objective is CE else (None,):  # all at once, and one prompt at a time
            loss = PrefixLoss(model, prompts, objective, n_prefixes=3, rows=rows, batch_rows=batch_rows)
            values, gradient = loss.gradient(vectors)
            assert_close(values, torch.stack([each[0] for each in expected]), 1e-9)
            assert_close(gradient, torch.stack([each[1] for each in expected]), 1e-8)
            assert float(gradient.abs().max()) > 0, name
            assert_close(loss(vectors), values, 1e-9)


def test_weights_are_those_that_are_passed(precise: Load) -> None:
    model = precise("llama")
    prompts, vectors = slotted(model), noise(1, SLOTS, model.d_model).double()
    weights = torch.tensor([1.0, 5.0, 0.5, 2.0])
    value, gradient = PrefixLoss(model, prompts, CE, n_prefixes=1, weights=weights).gradient(vectors)
    expected = by_hand(model, prompts, CE, vectors[0], weights)
    assert_close(value[0], expected[0], 1e-9)
    assert_close(gradient[0], expected[1], 1e-8)


def test_a_bridge_gives_the_same(zoo_models: Load) -> None:
    vectors, found = noise(2, SLOTS, 32), []
    for backend in ("hooked_transformer", "bridge"):
        model = zoo_models("llama", backend)
        found.append(PrefixLoss(model, slotted(model), CE, n_prefixes=2).gradient(vectors))
    assert_close(found[1][0], found[0][0], 1e-5)
    assert_close(found[1][1], found[0][1], 1e-5)


def test_parameters_get_no_gradients(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)
    for objective in (CE, -target(model, prompts, "ln1_normalized")):
        PrefixLoss(model, prompts, objective, n_prefixes=2).gradient(noise(2, SLOTS, model.d_model))
    assert all(parameter.grad is None for parameter in model.hooked.parameters())


# ---- the search ----


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_restarts_in_one_batch_are_those_of_a_plain_loop(precise: Load, schedule: str) -> None:
    model = precise("llama")
    prompts = slotted(model)
    steps, warmup, lr, held = 6, 2, 0.3, [2, 0]
    starts = noise(3, SLOTS, model.d_model, seed=7).double()
    found = optimise_soft_prefix(
        model, prompts, CE, n_restarts=3, steps=steps, lr=lr, warmup=warmup, schedule=schedule, init=starts,
        held_out=held, check_every=2,
    )  # fmt: skip
    scale = float(embeddings(model)[allowed_tokens(model)].square().mean().sqrt())
    weights = CE.total_weight(prompts).double()
    search, apart = weights.clone(), torch.zeros_like(weights)
    search[held], apart[held] = 0, weights[held]
    shares = {
        "constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25],
        "cosine": [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
    }[schedule]  # fmt: skip
    rates = [lr * share for share in (1 / 3, 2 / 3, *shares)]
    for restart, start in enumerate(starts):
        at = start.clone().requires_grad_()
        adam = torch.optim.Adam([at])
        losses, looks = [], []
        for step in range(steps + 1):
            value, at.grad = by_hand(model, prompts, CE, at, search)
            losses.append(float(value))
            if step % 2 == 0:
                looks.append((float(by_hand(model, prompts, CE, at, apart)[0]), at.detach().clone()))
            if step < steps:
                adam.param_groups[0]["lr"] = rates[step] * scale
                adam.step()
        assert found.history["loss"].values[:, restart] == pytest.approx(losses, abs=1e-8)
        assert found.history["held_out_loss"].values[:, restart] == pytest.approx([look[0] for look in looks], abs=1e-8)
        best = min(looks, key=lambda look: look[0])
        assert float(found.losses[restart]) == pytest.approx(best[0], abs=1e-8)
        assert_close(found.restarts[restart], best[1], 1e-7)
    assert found.history["lr"].values[:steps] == pytest.approx(rates)
    assert found.history["check"].values.tolist() == [0, 2, 4, 6]
    assert found.loss == float(found.losses.min()) == float(found.losses[found.best_restart])
    assert torch.equal(found.embeddings, found.restarts[found.best_restart])


def test_without_held_out_prompts_the_best_step_counts(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)
    # From the very states it is to match, steps can only lead away.
    match, near = target(model, prompts), embeddings(model)[[7, 30, 90]] * 1.05
    found = optimise_soft_prefix(
        model, prompts, -match, n_restarts=2, init=near, noise=0.1, steps=7, lr=2.0, schedule="constant", check_every=5
    )
    losses = found.history["loss"].values
    assert (losses.min(0) < losses[-1] - 1e-3).all()
    assert found.losses.tolist() == pytest.approx(losses.min(0).tolist())
    run = model.run(prompts, [found.intervention()], record=match.sites())
    assert -float(match(run).mean()) == pytest.approx(found.loss, abs=1e-5)


def test_it_comes_down_and_says_how(zoo_models: Load) -> None:
    model = zoo_models("gpt2")
    prompts, lines = slotted(model), []
    found = optimise_soft_prefix(
        model, prompts, -target(model, prompts), n_restarts=2, steps=40, until=-0.9, check_every=4, tell=lines.append
    )
    assert -1 <= found.loss <= -0.9
    options = found.history.provenance["options"]
    assert options["ended"] == "until" and found.history.data.sizes["step"] < 41
    assert lines[0].startswith("step 0: loss ") and len(lines) == found.history.data.sizes["check"]
    assert repr(found).startswith("FoundSoft(3 slots of 32: loss ") and not found.interrupted


def test_patience_ends_it(zoo_models: Load) -> None:
    model = zoo_models("llama")
    found = optimise_soft_prefix(
        model, slotted(model), CE, n_restarts=1, steps=50, lr=1e-9, check_every=3, patience=2, held_out=[1]
    )
    assert found.history.provenance["options"]["ended"] == "patience"
    assert found.history["check"].values.tolist() == [0, 3, 6]


def test_the_seed_is_what_makes_restarts_differ(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)

    def found(seed: int) -> torch.Tensor:
        return optimise_soft_prefix(model, prompts, CE, n_restarts=2, steps=1, seed=seed).restarts

    state = torch.random.get_rng_state()
    first = found(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found(0), first) and not torch.equal(found(1), first)
    assert not torch.equal(first[0], first[1])


class Stops(ms.Objective):
    """The cross entropy, and Ctrl-C at some call."""

    reads = CE.reads

    def __init__(self, at: int) -> None:
        object.__setattr__(self, "calls", [at])

    def __call__(self, run: ms.Run) -> torch.Tensor:
        self.calls[0] -= 1  # type: ignore[attr-defined]
        if self.calls[0] < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return CE(run)


def test_ctrl_c_keeps_the_best_so_far(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)
    whole = optimise_soft_prefix(model, prompts, Stops(99), n_restarts=2, steps=3, schedule="constant", seed=3)
    cut = optimise_soft_prefix(model, prompts, Stops(4), n_restarts=2, steps=30, schedule="constant", seed=3)
    assert cut.interrupted and not whole.interrupted
    assert cut.history.data.sizes["step"] == 4
    assert torch.equal(cut.restarts, whole.restarts)
    with pytest.raises(KeyboardInterrupt):
        optimise_soft_prefix(model, prompts, Stops(0), n_restarts=2, steps=3)


# ---- tokens: where it starts, what pulls and what holds ----


def test_starts(zoo_models: Load) -> None:
    model = zoo_models("llama")
    space, table = EmbeddingSpace(model, [9, 5, 7, 5]), embeddings(model)
    assert space.ids == [5, 7, 9]

    def of(init: Any, seed: int = 0, noise: float = 0.0) -> torch.Tensor:
        return space.starts(init, 4, SLOTS, noise=noise, seed=seed)

    def is_token(vectors: torch.Tensor) -> bool:
        apart = (vectors.flatten(0, -2)[:, None] - table[space.ids]).abs().amax(2).amin(1)
        return bool((apart == 0).all())

    assert is_token(of("random tokens")) and not torch.equal(of("random tokens"), of("random tokens", seed=1))
    assert_close(of("mean"), table[[5, 7, 9]].mean(0).expand(4, SLOTS, -1))
    text = model.tokenizer.encode(" cat", add_special_tokens=False)
    assert 0 < len(text) <= SLOTS
    assert torch.equal(of(" cat")[:, : len(text)], table[text].expand(4, -1, -1))
    given = of([100, 101])
    assert torch.equal(given[:, :2], table[[100, 101]].expand(4, -1, -1)) and is_token(given[:, 2:])
    one, each = noise(SLOTS, 32), noise(4, SLOTS, 32)
    assert torch.equal(of(one), one.expand(4, -1, -1))
    # Where every restart has its own, no noise is added.
    assert torch.equal(of(each, noise=1.0), each)
    noisy = of("mean", noise=0.5)
    assert torch.equal(noisy[0], of("mean")[0])
    assert float((noisy[1:] - of("mean")[1:]).std()) == pytest.approx(0.5 * space.scale, rel=0.2)


def test_the_pull_is_the_distance_to_the_nearest_token(precise: Load) -> None:
    model = precise("llama")
    space, vectors = EmbeddingSpace(model), 0.3 * noise(2, SLOTS, 32).double()
    table = space.table[space.ids]
    spread = float((table - table.mean(0)).square().sum(1).mean())

    def by_loops(prefix: torch.Tensor) -> float:
        return sum(min(float((e - row).square().sum()) for row in table) for e in prefix) / spread / SLOTS

    pull, gradient = space.pull(vectors)
    assert pull.tolist() == pytest.approx([by_loops(prefix) for prefix in vectors])
    step = 1e-6 * noise(SLOTS, 32, seed=5).double()
    change = by_loops(vectors[0] + step) - by_loops(vectors[0] - step)
    assert float((gradient[0] * step).sum()) * 2 == pytest.approx(change, rel=1e-4)
    assert float(space.pull(space.table[space.ids[:SLOTS]][None])[0]) == pytest.approx(0)


def test_the_penalty_grows_and_pulls(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)

    def found(penalty: float) -> FoundSoft:
        return optimise_soft_prefix(model, prompts, CE, n_restarts=2, steps=20, lr=0.3, penalty=penalty, patience=None)

    free, pulled = found(0.0), found(50.0)
    assert pulled.history["penalty"].values == pytest.approx([50 * step / 20 for step in range(21)])
    space = EmbeddingSpace(model)
    near, far = (float(space.pull(each.embeddings[None])[0]) for each in (pulled, free))
    assert near < 0.2 * far
    # The best are chosen with the whole penalty, whatever it counts at their step.
    start = noise(1, SLOTS, 32) * space.scale
    strong = optimise_soft_prefix(model, prompts, CE, n_restarts=1, steps=6, init=start, penalty=500.0, check_every=1)
    loss, distance = (strong.history[name].values[:, 0] for name in ("loss", "distance"))
    chosen = int((loss + 500 * distance).argmin())
    assert chosen != int(loss.argmin())
    assert strong.loss == pytest.approx(loss[chosen])
    assert (pulled.history["distance"].values[-1] < 0.2 * free.history["distance"].values[-1]).all()


def test_steps_with_a_penalty_are_those_of_a_plain_loop(precise: Load) -> None:
    model = precise("llama")
    prompts, space = slotted(model), EmbeddingSpace(model)
    weights, start = CE.total_weight(prompts).double(), noise(1, SLOTS, 32, seed=3).double()
    found = optimise_soft_prefix(
        model, prompts, CE, n_restarts=1, steps=4, lr=0.5, schedule="constant", init=start, penalty=20.0
    )
    at = start[0].clone().requires_grad_()
    adam = torch.optim.Adam([at], lr=0.5 * space.scale)
    for step in range(5):
        value, gradient = by_hand(model, prompts, CE, at, weights)
        assert found.history["loss"].values[step, 0] == pytest.approx(float(value), abs=1e-9)
        apart = (at[:, None] - space.table[space.ids]).square().sum(2).amin(1).mean() / space.spread
        at.grad = gradient + 20 * step / 4 * torch.autograd.grad(apart, at)[0]
        adam.step()


def test_constraints_hold(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts, space = slotted(model), EmbeddingSpace(model)
    table = space.table[space.ids]

    def found(constraint: str | None) -> torch.Tensor:
        return optimise_soft_prefix(
            model, prompts, CE, n_restarts=2, steps=8, lr=3.0, constraint=constraint, schedule="constant"
        ).restarts.flatten(0, 1)

    low, high = table.norm(dim=1).quantile(torch.tensor([0.05, 0.95])).tolist()
    assert float(found(None).norm(dim=1).max()) > 1.2 * high
    norms = found("norm").norm(dim=1)
    assert low - 1e-4 <= float(norms.min()) and float(norms.max()) <= high + 1e-4
    centred = (table - table.mean(0)).double()
    inverse = torch.linalg.inv(centred.T @ centred / len(centred))

    def distance(rows: torch.Tensor) -> torch.Tensor:
        away = rows.double() - table.mean(0).double()
        return (away @ inverse * away).sum(1).sqrt()

    reach = float(distance(table).quantile(0.95))
    assert float(distance(found("ellipsoid")).max()) <= reach * 1.001 < float(distance(found(None)).max())
    for row in found("tokens"):
        assert float((table - row).abs().amax(1).min()) == 0


def test_on_tokens_gradients_are_taken_there(precise: Load) -> None:
    model = precise("llama")
    prompts = slotted(model)
    weights, space = CE.total_weight(prompts).double(), EmbeddingSpace(model)
    start = noise(1, SLOTS, 32, seed=2).double()
    found = optimise_soft_prefix(
        model, prompts, CE, n_restarts=1, steps=5, lr=1.0, schedule="constant", init=start, constraint="tokens"
    )
    at = start[0].clone().requires_grad_()
    adam = torch.optim.Adam([at], lr=space.scale)
    for step in range(6):
        here = at.detach()
        near = torch.stack(
            [space.table[min(space.ids, key=lambda t: float((e - space.table[t]).norm()))] for e in here]
        )
        value, at.grad = by_hand(model, prompts, CE, near, weights)
        assert found.history["loss"].values[step, 0] == pytest.approx(float(value), abs=1e-9)
        adam.step()


@pytest.mark.parametrize("by", ["cosine", "inner_product", "l2"])
def test_nearest(precise: Load, by: str) -> None:
    model = precise("llama")
    space, vectors = EmbeddingSpace(model, range(20, 60)), noise(3, 32).double()

    def likeness(vector: torch.Tensor, token: int) -> float:
        row = space.table[token]
        product = float(vector @ row)
        return {
            "cosine": product / float(vector.norm() * row.norm()),
            "inner_product": product,
            "l2": -float((vector - row).square().sum()),
        }[by]

    found, near = space.nearest(vectors, 5, by=by)
    for vector, tokens, values in zip(vectors, found.tolist(), near.tolist(), strict=True):
        expected = sorted(range(20, 60), key=lambda token: -likeness(vector, token))[:5]
        assert tokens == expected
        assert values == pytest.approx([likeness(vector, token) for token in expected])
    assert space.nearest(vectors, 99)[0].shape == (3, 40)


# ---- keeping it, and what is refused ----


def test_saved_and_loaded(zoo_models: Load, tmp_path: Path) -> None:
    model = zoo_models("llama")
    found = optimise_soft_prefix(model, slotted(model), CE, n_restarts=2, steps=3, held_out=[0], check_every=2)
    found.save(tmp_path / "soft.safetensors")
    again = FoundSoft.load(tmp_path / "soft.safetensors", model)
    assert torch.equal(again.restarts, found.restarts) and torch.equal(again.losses, found.losses)
    assert again.history.data.identical(found.history.data)
    assert again.history.provenance == found.history.provenance and again.model == found.model
    assert repr(again) == repr(found)
    with pytest.raises(MechsteerError, match="This soft prefix was made with"):
        FoundSoft.load(tmp_path / "soft.safetensors", zoo_models("gpt2"))
    found.history.save(tmp_path / "history.safetensors")
    with pytest.raises(MechsteerError, match=r"has format 'mechsteer\.result', expected 'mechsteer\.soft_prefix'"):
        FoundSoft.load(tmp_path / "history.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sine"}, "schedule got 'sine'. Pass one of 'constant', 'linear', 'cosine'"),
        ({"constraint": "ball"}, "constraint got 'ball'. Pass one of 'norm', 'ellipsoid', 'tokens'"),
        ({"n_restarts": 0}, "n_restarts=0 is out of range. Pass 1 or more"),
        ({"penalty": -1.0}, "penalty=-1.0 is out of range. Pass 0 or more"),
        ({"lr": float("nan")}, "lr=nan is no step size"),
        ({"held_out": range(4)}, "held_out= takes all 4 prompts"),
        ({"held_out": [9]}, r"rows \[9\] were asked for of 4 prompts"),
        ({"init": [5] * 4}, r"init=\[5, 5, 5, 5\] is 4 tokens for 3 slots. Pass 1 to 3"),
        ({"init": ""}, "init='' is 0 tokens for 3 slots"),
        ({"init": [500]}, "token id 500 is none of"),
        ({"init": noise(2, 3, 32)}, r"init has shape \[2, 3, 32\]. Pass \[slot 3, d_model 32\]"),
        ({"allowed": []}, r"allowed=\[\] leaves no token"),
        ({"weights": torch.ones(3)}, "weights= has 3 numbers for 4 prompts"),
        ({"weights": torch.zeros(4)}, "Pass one above 0 for each of them"),
    ],
)
def test_options_that_do_not_fit(zoo_models: Load, options: dict[str, Any], message: str) -> None:
    model = zoo_models("llama")
    with pytest.raises(MechsteerError, match=message):
        optimise_soft_prefix(model, slotted(model), CE, **{"n_restarts": 3, "steps": 3, **options})


class Flat(ms.Objective):
    """Knows nothing of the prefix."""

    def __call__(self, run: ms.Run) -> torch.Tensor:
        return torch.ones(len(run.prompts))


class Breaks(ms.Objective):
    """Becomes NaN."""

    reads = CE.reads

    def __call__(self, run: ms.Run) -> torch.Tensor:
        return (CE(run) - 1e9).sqrt()


def test_objectives_and_prompts_that_do_not_fit(zoo_models: Load) -> None:
    model = zoo_models("llama")
    prompts = slotted(model)
    with pytest.raises(MechsteerError, match="has no gradient at the embeddings"):
        optimise_soft_prefix(model, prompts, Flat(), steps=1)
    with pytest.raises(
        MechsteerError, match=r"or its step is NaN or infinite at step 0 \(restart 0\). Pass a smaller lr"
    ):
        optimise_soft_prefix(model, prompts, Breaks(), steps=1)
    with pytest.raises(MechsteerError, match="holds values for 4 prompts, and 2 were passed"):
        optimise_soft_prefix(model, prompts[:2], -target(model, prompts), steps=1)
    with pytest.raises(MechsteerError, match=r"have shape \[2, 3, 32\]. Pass \[prefix, slot, d_model\] = \[4, 3, 32\]"):
        PrefixLoss(model, prompts, CE, n_prefixes=4)(noise(2, 3, 32))
    with pytest.raises(MechsteerError, match="needs prompts with slots"):
        optimise_soft_prefix(model, prompts.with_prefix([5, 6, 7]), CE, steps=1)
    with pytest.raises(MechsteerError, match="needs a tokenizer"):
        bare = ms.Model(model.hooked, tokenizer=None)
        bare.tokenizer = None
        optimise_soft_prefix(bare, prompts, CE, steps=1, init="cat")


def test_the_pocket_model_is_matched_at_its_middle_layer() -> None:
    model = ms.load_model("pocket-1l", device="cpu")
    requests = ["Tell me about your day.", "Write a poem.", "What should I cook for dinner?", "Give me some advice."]
    reference = ms.Prompts.from_chats(requests, model, prefix="Talk only about cats.")
    prompts = ms.Prompts.from_chats(requests, model, slots=int(reference.span("prefix").sum(1)[0]))
    states = model.run(reference, record="resid_post", logits="none").activations
    match = ms.StateMatch(states, ("resid_post", 0), align="end")
    found = optimise_soft_prefix(model, prompts, -match, n_restarts=2, steps=60, held_out=[3], until=-0.995)
    run = model.run(prompts, [found.intervention()], record=match.sites())
    assert float(match(run).min()) > 0.98 and -found.loss >= 0.99
