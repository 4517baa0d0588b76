"""Cross entropy against the strength, beside plain loops in fp64."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import assert_close

import mechsteer as ms
from mechsteer.errors import MechsteerError
from mechsteer.strength.cross_entropy import cross_entropy_curves, text_windows
from mechsteer.strength.tables import SummedNLL

TEXTS = ["The cat sat on the mat and the dog ran to the other cat. " * 3, "A feline purrs", "Talk only about cats."]
ALPHAS = [-3.0, 0.5, 2.0]


def direction(model: ms.Model, layer: int = 1) -> ms.Direction:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(layer))
    return ms.Direction(vector[None], ms.Site("resid_post", layer))


def losses(model: ms.Model, ids: list[int], push: ms.Direction, alpha: float, at: slice = slice(None)) -> torch.Tensor:
    """Minus log-probability of each token but the first, with a plain TransformerLens hook."""

    def add(resid: torch.Tensor, hook: object) -> torch.Tensor:
        mask = torch.zeros(resid.shape[1], 1)
        mask[at] = 1
        return resid + alpha * mask * push.vector

    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.hooked.run_with_hooks(tokens, fwd_hooks=[(push.site.hook_name, add)])[0]
    return -logits[:-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("at", ["all", "last"])
def test_curves_are_those_of_plain_loops(zoo_models: Callable[..., ms.Model], architecture: str, at: str) -> None:
    model = zoo_models(architecture)
    named = {"early": direction(model, 0), "late": direction(model, 2)}
    result = cross_entropy_curves(model, TEXTS, named, ALPHAS, window=12, at=at)
    windows = text_windows(model, TEXTS, window=12)
    ids = [windows.tokens[row][windows.mask[row]].tolist() for row in range(len(windows))]
    where = slice(-1, None) if at == "last" else slice(None)
    alphas = [-3.0, 0.0, 0.5, 2.0]
    nll = torch.stack(
        [
            torch.stack(
                [torch.stack([losses(model, row, push, alpha, where).sum() for row in ids]) for alpha in alphas]
            )
            for push in named.values()
        ]
    )
    assert result["alpha"].values.tolist() == alphas and result["layer"].values.tolist() == [0, 2]
    assert_close(torch.tensor(result["nll"].values), nll, 1e-5)
    total = sum(len(row) - 1 for row in ids)
    assert int(result["n_tokens"].sum()) == total
    ce = nll.sum(-1) / total
    assert_close(torch.tensor(result["ce"].values), ce, 1e-5)
    assert_close(torch.tensor(result["delta_ce"].values), ce - ce[:, 1:2], 1e-5)
    if at == "all":
        assert float(abs(result["delta_ce"]).max()) > 0.1
    assert result["ce"].dtype == np.float64 and result["delta_ce"].sel(alpha=0.0).values.tolist() == [0.0, 0.0]


def test_the_standard_error_is_that_of_resampled_windows(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    result = cross_entropy_curves(model, [text[:40] for text in TEXTS * 30], direction(model), [2.0], window=4)
    excess = (result["nll"] - result["nll"].sel(alpha=0.0)).sel(alpha=2.0).values[0]
    counts, rng = result["n_tokens"].values, np.random.default_rng(0)
    picks = rng.integers(len(counts), size=(3000, len(counts)))
    spread = (excess[picks].sum(1) / counts[picks].sum(1)).std()
    assert float(result["delta_ce_se"].sel(alpha=2.0)[0]) == pytest.approx(spread, rel=0.1)
    alone = cross_entropy_curves(model, ["The cat sat"], direction(model), [2.0], window=9)
    assert np.isnan(alone["delta_ce_se"].values).all()


def test_sums_keep_fp64(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    prompts = text_windows(model, TEXTS, window=50)
    run, table = model.run(prompts), SummedNLL()
    both = table.values(run).double().sum(1)
    exact = torch.zeros(len(prompts), dtype=torch.float64)
    for row in range(len(prompts)):
        tokens = prompts.tokens[row][prompts.mask[row]]
        logits = run.logits[row][prompts.mask[row]][:-1]
        each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        exact[row] = sum(each.double())
    assert float((both - exact).abs().max()) < 1e-10 * float(exact.max())
    assert float((table.values(run)[:, 0].double() - exact).abs().max()) > 1e-8  # one fp32 number would not do


def test_windows(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    encode = model.tokenizer.encode
    ids = [encode(text, add_special_tokens=False) for text in TEXTS]
    found = text_windows(model, TEXTS, window=8)
    rows = [found.tokens[row][found.mask[row]].tolist() for row in range(len(found))]
    assert all(row[0] == 1 and 2 <= len(row) <= 9 for row in rows)
    assert [token for row in rows for token in row[1:]] == [token for each in ids for token in each]
    assert int(SummedNLL().reads(found).sum()) == sum(map(len, ids))  # each token once
    published = text_windows(model, TEXTS, window=8, recipe="published")
    assert bool(published.mask.all()) and published.tokens.shape[1] == 9
    expected = [
        [*each, 2][start : start + 9]
        for each in ids
        for start in range(0, len(each) + 1, 8)
        if start + 9 <= len(each) + 1
    ]
    assert published.tokens.tolist() == expected and len(expected) < len(rows)
    whole = text_windows(model, TEXTS[2:], window=len(ids[2]), recipe="published")  # it fits exactly
    assert whole.tokens.tolist() == [[*ids[2], 2]]
    cut = text_windows(model, TEXTS[:1], window=8, max_tokens=11)
    assert int(SummedNLL().reads(cut).sum()) == 11
    bare = text_windows(zoo_models("qwen3"), ["The cat sat on the mat"], window=50)  # no BOS: the first is given
    assert bare.tokens[0].tolist() == encode("The cat sat on the mat", add_special_tokens=False)


def test_prompts_are_windows_as_they_are(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    prompts = ms.Prompts.from_ids([[5, 6, 7, 8], [9, 10]], padding="left")
    result = cross_entropy_curves(model, prompts, direction(model), [1.0])
    expected = [float(losses(model, ids, direction(model), 1.0).sum()) for ids in ([5, 6, 7, 8], [9, 10])]
    np.testing.assert_allclose(result["nll"].sel(alpha=1.0).values[0], expected, rtol=1e-5)
    assert result["n_tokens"].values.tolist() == [3, 1]


def test_it_goes_on_where_it_ended(zoo_models: Callable[..., ms.Model], tmp_path: Path) -> None:
    model = zoo_models("llama")
    first = cross_entropy_curves(model, TEXTS, direction(model), ALPHAS, window=9, out=tmp_path / "ce")
    again = cross_entropy_curves(model, TEXTS, direction(model), ALPHAS, window=9, out=tmp_path / "ce")
    assert again.provenance["options"]["flops"] == 0
    np.testing.assert_array_equal(first["nll"].values, again["nll"].values)


def test_batches_do_not_grow_with_the_texts(
    zoo_models: Callable[..., ms.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = zoo_models("llama"), []
    values = SummedNLL.values
    monkeypatch.setattr(SummedNLL, "values", lambda self, run: sizes.append(len(run.rows)) or values(self, run))
    for n in (160, 640):
        ids = torch.randint(4, model.d_vocab, (n, 33), generator=torch.Generator().manual_seed(0))
        cross_entropy_curves(model, ms.Prompts.from_ids(ids), direction(model, 2), [1.0])
        sizes.append(-1)
    small, large = sizes[: sizes.index(-1)], sizes[sizes.index(-1) + 1 : -1]
    assert max(large) <= 1.05 * max(small) and sum(large) == 4 * sum(small) == 2 * 640 * 32


_GROWTH = """
import resource, sys
import mechsteer as ms, torch
from mechsteer.strength.cross_entropy import cross_entropy_curves
model = ms.load_model(sys.argv[1], device="cpu")
torch.set_num_threads(1)
push = ms.Direction(torch.ones(1, model.d_model), ms.Site("resid_post", 1))
def peak(n):
    ids = torch.randint(4, model.d_vocab, (n // 32, 33), generator=torch.Generator().manual_seed(0))
    cross_entropy_curves(model, ms.Prompts.from_ids(ids), push, [-1.0, 1.0], progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(6_000), peak(48_000))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(zoo_folders: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(zoo_folders["llama"])], capture_output=True, text=True, check=True
    )
    small, large = (int(value) for value in done.stdout.split())
    # Kibibytes (bytes on macOS). All logits would be 65 MB more.
    unit = 1024 if sys.platform == "darwin" else 1
    assert large - small < 25_000 * unit, (small, large)


def test_errors(zoo_models: Callable[..., ms.Model]) -> None:
    model = zoo_models("llama")
    push = direction(model)
    for wrong, message in (
        (lambda: cross_entropy_curves(model, TEXTS, push, ALPHAS, recipe="x"), "recipe='x' does not exist"),
        (lambda: cross_entropy_curves(model, TEXTS, {}, ALPHAS), "directions is empty"),
        (lambda: cross_entropy_curves(model, [], push, ALPHAS, window=9), r"texts got \[\]. Pass a list of texts"),
        (lambda: cross_entropy_curves(model, TEXTS, push, ALPHAS, window=64), "window=64 does not fit: the context of"),
        (lambda: text_windows(model, TEXTS, window=0), "window=0 does not fit"),
        (lambda: text_windows(model, ["a"], window=20, recipe="published"), "None of the 1 texts is long enough for a"),
    ):
        with pytest.raises(MechsteerError, match=message):
            wrong()
    assert text_windows(model, TEXTS, window=63).tokens.shape[1] <= model.n_ctx
    assert text_windows(model, [TEXTS[0] * 3], window=64, recipe="published").tokens.shape[1] == 65
