"""The choice of a strength: the search on known curves, and `choose_alpha` on models against naive loops."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.model import Model
from mechsteer.objectives import KLFromBaseline, TeacherForcedCE, TokenProb
from mechsteer.prompts import Prompts
from mechsteer.run import Run
from mechsteer.strength.choose import ChosenAlpha, choose_alpha
from mechsteer.strength.choose_search import Curve, SideLaw, per_prompt, search, target_curve

TOKEN = 77
# With these the best strength for the token on the tiny model lies well inside.
WEIGHT, LARGEST = 0.22, 80.0


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Laws:
    """A target that rises as a sigmoid at `place` and falls behind `fall`, and a side effect that saturates."""

    def __init__(self, place: float, steep: float, *, fall: float = 1e9, curvature: float = 0.1, n: int = 40) -> None:
        self.place, self.steep, self.fall, self.curvature, self.n = place, steep, fall, curvature, n
        self.asked: list[float] = []

    def target_at(self, alphas: Any) -> np.ndarray:
        alphas = np.asarray(alphas, dtype=float)
        up = sigmoid(self.steep * (np.log(np.maximum(alphas, 1e-9)) - np.log(self.place)))
        return 0.02 + 0.9 * up * sigmoid(-2 * (alphas - self.fall))

    def side_at(self, alphas: Any) -> np.ndarray:
        square = np.asarray(alphas, dtype=float) ** 2
        return self.curvature * square / 2 / (1 + self.curvature * square / 20)

    def target(self, alphas: Sequence[float]) -> np.ndarray:
        self.asked += list(alphas)
        return np.repeat(self.target_at(alphas)[:, None], self.n, 1)

    def side(self, alphas: Sequence[float]) -> np.ndarray:
        return np.repeat(2.0 + self.side_at(alphas)[:, None], 5, 1)

    def best(self, weight: float) -> float:
        alphas = np.linspace(0, 30, 30001)
        return float((self.target_at(alphas) - weight * self.side_at(alphas)).max())


# --- the search


@pytest.mark.parametrize("place", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("steep", [4.0, 8.0])
@pytest.mark.parametrize("curvature, weight", [(0.1, 0.2), (0.03, 0.5), (0.6, 0.1)])
@pytest.mark.parametrize("fall", [1e9, 8.0])
def test_search_finds_the_best_of_known_curves(
    place: float, steep: float, curvature: float, weight: float, fall: float
) -> None:
    laws = Laws(place, steep, curvature=curvature, fall=fall)
    found = search(
        laws.target, laws.side, scale=7.0, weight=weight, budget=7, local=(0.0, curvature), most=1.0
    )  # fmt: skip
    best = int(found.score.argmax())
    exact = laws.target_at(found.alphas) - weight * laws.side_at(found.alphas)
    assert found.score[best] == pytest.approx(exact[best], abs=1e-9)  # the returned point's is exact
    np.testing.assert_allclose(found.score, exact, atol=0.02)  # the others' side effect may be the curve's
    assert exact[best] >= 0.95 * laws.best(weight)
    assert len(laws.asked) == len(set(laws.asked)) <= 7
    assert laws.asked[0] == 0.0


def test_search_without_a_known_largest_value() -> None:
    """As for objectives in any units: here in hundreds."""
    laws = Laws(3.0, 6.0)
    found = search(
        lambda alphas: 100 * laws.target(alphas), laws.side, scale=7.0, weight=20.0, budget=9, local=None, most=None
    )  # fmt: skip
    assert found.score.max() >= 0.95 * 100 * laws.best(0.2)
    assert found.reach >= 100 * (laws.target_at(found.alphas).max() - 0.02) - 1e-6


def test_search_tries_nothing_that_costs_more_than_there_is_to_gain() -> None:
    laws = Laws(50.0, 8.0, curvature=2.0)  # the target comes too late
    found = search(laws.target, laws.side, scale=7.0, weight=1.0, budget=7, local=(0.0, 2.0), most=1.0)
    assert found.alphas[found.score.argmax()] == 0.0
    assert laws.side_at(found.alphas).max() < 1.0


def test_search_without_a_side_effect_and_below_a_largest_strength() -> None:
    laws = Laws(3.0, 8.0)
    found = search(laws.target, laws.side, scale=7.0, weight=0.0, budget=7, most=1.0, largest=4.0)
    assert found.alphas.max() <= 4.0
    assert found.score.max() == pytest.approx(laws.target_at(found.alphas).max())


def test_side_law_goes_through_its_points_and_is_a_parabola_near_0() -> None:
    alphas = np.array([0.0, 2.0, 5.0])
    law = SideLaw(alphas, 0.3 * alphas**2, (0.0, 0.6))
    dense = np.linspace(0, 5, 50)
    np.testing.assert_allclose(law(dense), 0.3 * dense**2, atol=1e-9)
    bent = SideLaw(alphas, np.array([0.0, 1.0, 2.0]), (0.0, 0.6))
    np.testing.assert_allclose(bent(alphas), [0, 1, 2], atol=1e-12)
    assert bent(np.array([0.5]))[0] == pytest.approx(0.3 * 0.25)
    falling = SideLaw(alphas, np.array([0.0, -1.0, 3.0]))
    np.testing.assert_allclose(falling(alphas), [0, -1, 3], atol=1e-12)


def test_target_curve_knows_its_points_and_how_little_it_knows_elsewhere() -> None:
    u, y = np.log([2.0, 3.0]), np.array([0.2, 0.7])
    grid = np.log(np.geomspace(0.5, 10, 200))
    curve = target_curve(
        u, y, np.full(2, 1e-8), grid, base=0.0, reach=1.0, centre=np.log(4.0), loose=lambda at: np.ones_like(at)
    )
    np.testing.assert_allclose(np.interp(u, grid, curve.mean), y, atol=0.01)
    assert np.interp(u, grid, curve.sd).max() < 0.01
    assert 0.15 < curve.sd[-1] < 0.3  # the process's own, and which sigmoid it is
    assert curve.mean[0] < 0.1
    drawn = curve.draws(4000, seed=1)
    np.testing.assert_allclose(drawn.mean(0), curve.mean, atol=0.01)
    np.testing.assert_allclose(drawn.std(0), curve.sd, atol=0.01)
    assert not np.array_equal(drawn, curve.draws(4000, seed=2))
    assert np.array_equal(drawn, curve.draws(4000, seed=1))


def test_no_push_no_departure() -> None:
    """Where the side effect says that nothing moved, the curve is the sigmoid's."""
    curve: Curve = target_curve(
        np.log([4.0]), np.array([0.5]), np.array([1e-6]), np.log([1.0, 8.0]), base=0.0, reach=1.0, centre=np.log(4.0),
        loose=lambda at: np.where(at < np.log(2.0), 0.0, 1.0),
    )  # fmt: skip
    assert curve.sd[0] < 0.05  # what is left is which sigmoid it is
    assert curve.sd[1] > 0.1


def test_prompts_get_their_own_strength_where_they_differ() -> None:
    early, late = Laws(2.0, 8.0), Laws(4.0, 8.0)

    def target(alphas: Sequence[float]) -> np.ndarray:
        return np.concatenate([early.target(alphas), late.target(alphas)], 1)

    found = search(target, early.side, scale=7.0, weight=0.2, budget=12, local=(0.0, 0.1), most=1.0)
    scores = found.target - 0.2 * found.rise[:, None]
    best = int(found.score.argmax())
    alpha, own = float(found.alphas[best]), per_prompt(found, scores, best)
    assert own[:40].mean() < own[40:].mean() - 0.5

    def reached(alphas: np.ndarray) -> float:
        target = np.concatenate([early.target_at(alphas[:40]), late.target_at(alphas[40:])])
        return float((target - 0.2 * early.side_at(alphas)).mean())

    assert reached(own) > reached(np.full(80, alpha))


def test_prompts_that_differ_by_noise_alone_get_the_common_strength() -> None:
    laws, rng = Laws(3.0, 8.0, n=200), np.random.default_rng(0)

    def target(alphas: Sequence[float]) -> np.ndarray:
        return (rng.random((len(alphas), 200)) < laws.target(alphas)).astype(float)

    found = search(target, laws.side, scale=7.0, weight=0.2, budget=7, local=(0.0, 0.1), most=1.0)
    scores = found.target - 0.2 * found.rise[:, None]
    best = int(found.score.argmax())
    alpha, own = float(found.alphas[best]), per_prompt(found, scores, best)
    assert (own == alpha).mean() > 0.9


# --- on models


def prompts_of(model: Model) -> Prompts:
    tokens = zoo.prompts(batch=4, n_pos=10)
    return Prompts.from_ids(tokens, mask=torch.arange(10) < torch.tensor([10, 7, 9, 8])[:, None], tokenizer=model)


def towards(model: Model, layer: int = 2) -> ms.Direction:
    """The unembedding of a token: added late, it makes the token likelier."""
    return ms.Direction(model.unembedding()[:, TOKEN].detach().clone(), ms.Site("resid_post", layer), model.id)


@pytest.fixture(scope="module")
def model(zoo_models: Callable[..., Model]) -> Model:
    return zoo_models("llama")


@pytest.fixture(scope="module")
def chosen(model: Model) -> ChosenAlpha:
    return choose_alpha(
        model, {"late": towards(model), "middle": towards(model, 1)}, prompts_of(model), TokenProb(TOKEN),
        weight=WEIGHT, budget=9, most=1.0, largest=LARGEST,
    )  # fmt: skip


def naive(model: Model, direction: ms.Direction, objective: ms.Objective, alphas: Sequence[Any]) -> np.ndarray:
    prompts = prompts_of(model)
    return np.stack([objective(model.run(prompts, [ms.Add(direction, alpha)])).double().numpy() for alpha in alphas])


def test_points_are_those_of_one_run_each(model: Model, chosen: ChosenAlpha) -> None:
    kl = KLFromBaseline(model.run(prompts_of(model), logits="last"))
    for name, direction in chosen.directions.items():
        one = chosen.result.sel(direction=name)
        alphas = one["point_alpha"].values
        target = naive(model, direction, TokenProb(TOKEN), alphas)
        np.testing.assert_allclose(one["target"], target, atol=1e-5)
        best = int(one["score"].values.argmax())
        cost = naive(model, direction, kl, [alphas[best]]).mean()
        assert float(one["side_effect"][best]) == pytest.approx(cost, abs=1e-5)
        assert float(one["score"][best]) == pytest.approx(target[best].mean() - WEIGHT * cost, abs=1e-5)
        assert chosen.alphas[name] == alphas[best]


def test_the_choice_is_near_the_best_of_a_dense_grid(model: Model, chosen: ChosenAlpha) -> None:
    kl = KLFromBaseline(model.run(prompts_of(model), logits="last"))
    for name, direction in chosen.directions.items():
        one = chosen.result.sel(direction=name)
        grid = np.linspace(0, LARGEST, 41)
        score = naive(model, direction, TokenProb(TOKEN) - WEIGHT * kl, grid.tolist()).mean(1)
        assert float(one["score"].max()) >= 0.95 * score.max()
        assert 0 < grid[score.argmax()] < grid[-1]  # over-steering is in it
        low, high = float(one["low"]), float(one["high"])
        assert low <= chosen.alphas[name] <= high
        assert chosen.works[name]


def test_each_prompts_own_strength_is_better_than_the_common_one(model: Model, chosen: ChosenAlpha) -> None:
    kl = KLFromBaseline(model.run(prompts_of(model), logits="last"))
    score = TokenProb(TOKEN) - WEIGHT * kl
    for name, direction in chosen.directions.items():
        own = torch.from_numpy(chosen.result.sel(direction=name)["alpha_of_prompt"].values)
        common = naive(model, direction, score, [chosen.alphas[name]])
        assert naive(model, direction, score, [own]).mean() >= common.mean() - 1e-6


def test_forward_passes_are_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as rows are asked of sweeps and generation; the laws' passes count twice."""
    asked = {"rows": 0, "tokens": 0}
    real = ms.sweep

    def counted(model: Model, prompts: Any, *, axes: Any, **options: Any) -> Any:
        asked["rows"] += len(axes["alpha"]) * len(prompts)
        asked["tokens"] += len(axes["alpha"]) * int(prompts.lengths.sum())
        return real(model, prompts, axes=axes, **options)

    monkeypatch.setattr("mechsteer.strength.choose_points.sweep", counted)
    texts = prompts_of(model)[:2]
    found = choose_alpha(
        model, towards(model), prompts_of(model), TokenProb(TOKEN), side_prompts=texts, weight=0.1, budget=6
    )  # fmt: skip
    assert found.forward_passes == asked["rows"] + 2 * (2 + 4)
    assert int(found.result["tokens"].sum()) == asked["tokens"] + 2 * int(
        texts.lengths.sum() + prompts_of(model).lengths.sum()
    )
    assert int(found.result["target"].notnull().all("prompt").sum()) == 6


def test_a_judge_reads_steered_completions(model: Model) -> None:
    prompts, direction = prompts_of(model), towards(model)
    word = model.tokenizer.decode([TOKEN])
    read: list[str] = []

    def judge(text: str) -> float:
        read.append(text)
        return min(1.0, text.count(word) / 3)

    found = choose_alpha(
        model, direction, prompts, judge, side_effect=TeacherForcedCE(first=0, span="all"), weight=0.05,
        max_new_tokens=6, temperature=1.0, seed=3,
    )  # fmt: skip
    passes = tokens = 0
    for place, alpha in enumerate(found.result["point_alpha"][0].values):
        done = model.generate(
            prompts, interventions=[ms.Add(direction, float(alpha))], max_new_tokens=6, temperature=1.0, seed=3
        )
        values = [min(1.0, text.count(word) / 3) for text in done.completions]
        np.testing.assert_allclose(found.result["target"][0, place], values)
        passes += int((done.lengths - prompts.lengths).sum())
        tokens += int((done.lengths - 1).sum())
    assert len(read) == 7 * len(prompts)
    # The side effect's: the laws, 0 and two fractions of the scale, and some of the points.
    beside = found.forward_passes - passes
    assert beside % len(prompts) == 0
    assert 2 + 3 <= beside // len(prompts) <= 2 + 3 + 6
    assert int(found.result["tokens"].sum()) == tokens + beside // len(prompts) * int(prompts.lengths.sum())
    assert found.works[found.result["direction"].values[0]]
    assert np.isnan(found.result["slope"]).all()


def test_no_strength_works(model: Model) -> None:
    """Away from the token: its probability only falls."""
    found = choose_alpha(model, {"away": -towards(model)}, prompts_of(model), TokenProb(TOKEN), weight=0.1)
    assert found.alpha == 0.0
    assert not found.works["away"]
    assert (found.result["alpha_of_prompt"] == 0).all()
    assert "away: no strength works" in repr(found)
    assert found.plot().layout.title.text == "away: no strength works"


def test_an_objective_without_a_derivative_is_searched_all_the_same(model: Model) -> None:
    class Wins(ms.Objective):
        def reads(self, prompts: Prompts) -> torch.Tensor:
            return prompts.at(prompts.decision)

        def __call__(self, run: Run) -> torch.Tensor:
            return (run.logits_at(self.reads(run.prompts)).argmax(-1) == TOKEN).float()

    found = choose_alpha(model, towards(model), prompts_of(model), Wins(), weight=0.01, budget=8)
    assert np.isnan(found.result["slope"]).all()
    assert float(found.result["target"][0].mean("prompt").max()) == 1.0
    assert found.alpha > 0


def test_the_default_side_effect(model: Model) -> None:
    alone = choose_alpha(model, towards(model), prompts_of(model), TokenProb(TOKEN), weight=0.1, budget=5)
    assert "KLFromBaseline" in alone.result.provenance["options"]["side_effect"]
    assert abs(float(alone.result["side_slope"][0])) < 1e-5
    texts = choose_alpha(
        model, towards(model), prompts_of(model), TokenProb(TOKEN), side_prompts=prompts_of(model), budget=5
    )
    assert "TeacherForcedCE" in texts.result.provenance["options"]["side_effect"]


def test_add_steers_as_chosen(model: Model, chosen: ChosenAlpha) -> None:
    add = chosen.add("late")
    assert add.alpha == chosen.alphas["late"]
    assert add.direction is chosen.directions["late"]
    own = chosen.add("late", adaptive=True).alpha
    assert isinstance(own, torch.Tensor)
    np.testing.assert_allclose(own, chosen.result.sel(direction="late")["alpha_of_prompt"])
    last = choose_alpha(model, towards(model), prompts_of(model), TokenProb(TOKEN), weight=0.1, budget=5, at="last")
    assert last.add().at == -1


def test_saved_and_loaded(chosen: ChosenAlpha, tmp_path: Path) -> None:
    chosen.result.save(tmp_path / "chosen.safetensors")
    again = ChosenAlpha.load(tmp_path / "chosen.safetensors")
    assert again.alphas == chosen.alphas
    assert repr(again) == repr(chosen)
    assert again.plot("late").to_json() == chosen.plot("late").to_json()
    with pytest.raises(MechsteerError, match=r"loaded without its Direction 'late'. Use ms.Add\(direction, chosen"):
        again.add("late")
    ms.Result(chosen.result.data[["score"]]).save(tmp_path / "other.safetensors")
    with pytest.raises(MechsteerError, match=r"other.safetensors holds a Result that choose_alpha did not make"):
        ChosenAlpha.load(tmp_path / "other.safetensors")


def test_the_figure_shows_laws_points_and_choice(chosen: ChosenAlpha) -> None:
    figure = chosen.plot("late")
    one = chosen.result.sel(direction="late")
    names = [trace.name for trace in figure.data if trace.name]
    assert [name.removeprefix("curve=") for name in names] == [
        "target", "cost", "score", "cost by its local law", "target by its slope at 0",
    ]  # fmt: skip
    points = [trace for trace in figure.data if trace.mode == "markers"]
    np.testing.assert_allclose(points[2].y, one["score"])
    np.testing.assert_allclose(points[2].x, one["point_alpha"])
    lines = {shape.type: shape for shape in figure.layout.shapes}
    assert lines["line"].x0 == chosen.alphas["late"]
    assert (lines["rect"].x0, lines["rect"].x1) == (float(one["low"]), float(one["high"]))
    assert figure.layout.title.text == f"late: alpha = {chosen.alphas['late']:.3g}"


def test_same_seed_same_choice(model: Model) -> None:
    options: dict[str, Any] = {"weight": 0.05, "max_new_tokens": 4, "budget": 5}
    judge = lambda text: len(set(text)) > 6  # noqa: E731
    first, second, other = (
        choose_alpha(model, towards(model), prompts_of(model), judge, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert first.result.data.identical(second.result.data)
    assert not first.result["target"].equals(other.result["target"])


@pytest.mark.parametrize(
    "options, error",
    [
        ({"budget": 4}, r"budget=4 is too small: it counts the strengths .* 0 among them. Pass at least 5."),
        ({"weight": -1.0}, r"weight=-1.0 is no weight. Pass a finite number of 0 or more."),
        ({"largest": 0.0}, r"largest=0.0 leaves no strength to try. Pass a number above 0, or None."),
        ({"most": float("nan")}, r"most=nan is no largest value of the objective. Pass a finite number, or None."),
        ({"at": "prefix"}, r"Add at .* would never fire: none of the 4 prompts has a token in span 'prefix'"),
        ({"objective": lambda text: 2.0}, r"The judge gave 2.0 for 4 texts"),
    ],
)
def test_errors(model: Model, options: dict[str, Any], error: str) -> None:
    objective = options.pop("objective", TokenProb(TOKEN))
    with pytest.raises(MechsteerError, match=error):
        choose_alpha(model, towards(model), prompts_of(model), objective, **options)


def test_errors_of_directions_and_values(model: Model, chosen: ChosenAlpha) -> None:
    with pytest.raises(MechsteerError, match=r"Direction 'flat' is zero: no strength of it does anything"):
        choose_alpha(model, {"flat": towards(model) * 0.0}, prompts_of(model), TokenProb(TOKEN))
    undecorated = choose_alpha.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of types
    with pytest.raises(MechsteerError, match=r"objective got a str. Pass an Objective, or a judge: a function of a"):
        undecorated(model, towards(model), prompts_of(model), "joy")
    with pytest.raises(MechsteerError, match=r"There are 2 directions: late, middle. Name one of them."):
        _ = chosen.alpha
    with pytest.raises(MechsteerError, match=r"There is no direction 'soon' here. There are late, middle."):
        chosen.plot("soon")

    class Breaks(TokenProb):
        def __call__(self, run: Run) -> torch.Tensor:
            return super().__call__(run).log() * float("inf")

    with pytest.raises(MechsteerError, match=r"breaks is not finite at alpha=0 of Direction.* Pass largest= below"):
        choose_alpha(model, towards(model), prompts_of(model), Breaks(TOKEN))
