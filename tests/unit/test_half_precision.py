"""What is a sum, or a small change of something large, is computed in fp32 where tensors are in half precision."""

from pathlib import Path

import pytest
import torch
import zoo

import mechsteer as ms
from mechsteer.backends import fingerprint, is_processed
from mechsteer.generation import Choice
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.propagator import prompt_vector
from mechsteer.strength.limits import limit_logits
from mechsteer.vocabulary import embeddings, filling

HALF = torch.bfloat16
SITE = ms.Site("resid_post", 1)


@pytest.fixture(scope="module")
def half(zoo_folders: dict[str, Path]) -> ms.Model:
    return ms.load_model(zoo_folders["llama"], device="cpu", dtype=HALF)


@pytest.fixture(scope="module")
def prompts() -> ms.Prompts:
    return ms.Prompts.from_ids(zoo.prompts(batch=3, n_pos=12))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(model: ms.Model, prompts: ms.Prompts, *interventions: ms.Intervention) -> torch.Tensor:
    return model.run(prompts, interventions, record=SITE, logits="none").activations[SITE]


@pytest.mark.parametrize("alpha", [0.1234567, torch.tensor([0.1, 1.01, 1.02])])
def test_add_is_rounded_once(half: ms.Model, prompts: ms.Prompts, alpha: float | torch.Tensor) -> None:
    v, x = noise(half.d_model), state(half, prompts).float()
    factor = alpha.view(-1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha
    assert torch.equal(state(half, prompts, ms.Add(v, alpha, site=SITE)), (x + factor * v).to(HALF))


def test_stacked_alphas_keep_their_digits(half: ms.Model, prompts: ms.Prompts) -> None:
    # bf16 has no numbers between 1 and 1.0078.
    vector, alphas = 30 * noise(half.d_model), [1.0, 1.003, 1.006]
    target = ms.Projection(ms.Direction(vector, SITE), at="all")
    swept = ms.sweep(
        half, prompts, axes={"alpha": alphas}, build=lambda alpha: ms.Add(vector, alpha, site=SITE), measure=target,
        progress=False,
    )["projection"].values  # fmt: skip
    length = float(vector.norm())
    assert (swept[1:] - swept[:-1]) / length == pytest.approx(0.003, rel=0.1)


def test_scale_and_ablate_are_rounded_once(half: ms.Model, prompts: ms.Prompts) -> None:
    x, u = state(half, prompts).float(), noise(half.d_model).to(HALF)
    assert torch.equal(state(half, prompts, ms.Scale(SITE, 1.003)), (x * 1.003).to(HALF))
    ablate = ms.Ablate(u, site=SITE)
    unit = u.double() / u.double().norm()
    assert ablate.basis.dtype == torch.float32 and float((ablate.basis.double()[0] - unit).abs().max()) < 1e-6
    exact = (x.double() - (x.double() @ unit)[..., None] * unit).to(HALF)
    assert float((state(half, prompts, ablate).float() - exact.float()).abs().max()) <= torch.finfo(HALF).eps * 2
    assert (state(half, prompts, ablate) != exact).float().mean() < 0.01


def test_gradients_of_many_tokens_are_summed_in_fp32() -> None:
    # A sum of ones in bf16 stops at 256.
    table = torch.ones(1, 4, requires_grad=True)
    like = torch.zeros(1000, 4, dtype=HALF)
    rows = ms.Prompts.from_ids(torch.zeros(1000, 1, dtype=torch.long))
    from dataclasses import replace

    from mechsteer.rows import Rows

    slotted, zero = replace(rows, slots=torch.ones_like(rows.mask)), torch.zeros(1000, dtype=torch.long)
    edit = ms.SoftPrefix._edit([ms.SoftPrefix(table)], like)
    edit(like, Rows(slotted, torch.arange(1000), zero, zero)).sum().backward()
    assert table.grad is not None and bool((table.grad == 1000).all())
    vector = torch.zeros(4, requires_grad=True)
    added = ms.Add._edit([ms.Add(vector, site=SITE)], like)
    added(like, Rows(slotted, torch.arange(1000), zero, zero)).sum().backward()
    assert vector.grad is not None and bool((vector.grad == 1000).all())


def test_gradient_of_a_text_prefix(zoo_folders: dict[str, Path]) -> None:
    found = []
    for dtype in (torch.float32, HALF):
        model = ms.load_model(zoo_folders["llama"], device="cpu", dtype=dtype)
        rows = ms.Prompts.from_ids(zoo.prompts(batch=8, n_pos=12), tokenizer=model.tokenizer)
        from dataclasses import replace

        slotted = replace(rows, slots=(rows.positions > 0) & (rows.positions < 3))
        found.append(CandidateLosses(model, slotted, ms.TeacherForcedCE(span="all")).gradient((5, 9))[1])
    assert float(torch.cosine_similarity(*(each.flatten() for each in found), dim=0)) > 1 - 4 * torch.finfo(HALF).eps


def test_directions_in_half_precision() -> None:
    v, w = noise(64).to(HALF), noise(64, seed=1).to(HALF)
    one, other = (ms.Direction(each, SITE) for each in (v, w))
    assert one.norm == pytest.approx(float(v.double().norm()), rel=1e-6)
    assert float(one.unit.vector.double().norm()) == pytest.approx(1, abs=1e-6)
    assert torch.equal((one - 0.1 * other).vector, v.float() - 0.1 * w.float())
    both = ms.Direction.stack([one, other]).orthonormal().vectors.double()
    assert float((both @ both.T - torch.eye(2)).abs().max()) < 1e-6


def test_directions_of_the_vocabulary(half: ms.Model) -> None:
    matrix = half.unembedding().detach().float()
    difference = ms.from_unembedding(half, 5, minus=9).vector
    assert torch.equal(difference, matrix[:, 5] - matrix[:, 9])
    table = embeddings(half)
    assert float((filling(table, None).double() - table.double().mean(0)).abs().max()) < 1e-7


def test_small_edits_of_weights_are_noticed(zoo_folders: dict[str, Path]) -> None:
    model = ms.load_model(zoo_folders["gpt2"], device="cpu", dtype=HALF)
    before = fingerprint(model.hooked)
    weight = next(p for name, p in model.hooked.named_parameters() if name.endswith("W_in"))
    weight.data[0, 0] *= 1.5
    assert fingerprint(model.hooked) != before
    assert not is_processed(model.hooked)
    unembed = model.hooked.unembed.W_U
    centred = unembed.detach().double() - unembed.detach().double().mean(1, keepdim=True)
    unembed.data.copy_(centred)
    assert is_processed(model.hooked), "centred, and rounded after that"


def test_sampling_takes_differences_of_logits_in_fp32() -> None:
    logits = torch.full((1, 3), -100.0, dtype=HALF)
    logits[0, 0], logits[0, 1] = 5.0, -0.0117
    # exp(-5.0117); the difference rounded to bf16 would be 5.0.
    ratio = float((logits[0, 1].double() - 5.0).exp())
    share = ratio / (1 + ratio)
    choice = Choice(1.0, None, None)
    draws = torch.tensor([1 - share - 1e-5, 1 - share + 1e-5], dtype=torch.float64)
    assert [int(choice(logits, draw[None])[0]) for draw in draws] == [0, 1]


def test_prompt_vector_and_limit(half: ms.Model, zoo_folders: dict[str, Path]) -> None:
    rows = ms.Prompts.from_ids(zoo.prompts(batch=4, n_pos=8), tokenizer=half.tokenizer)
    from dataclasses import replace

    user = replace(rows, roles=torch.full_like(rows.roles, 2))
    delta = prompt_vector(half, user, [5, 9]).deltas
    assert delta.dtype == torch.float32
    narrow = ms.load_model(zoo_folders["llama"], device="cpu", dtype=torch.float16)
    spiky = torch.zeros(half.d_model)
    spiky[3], spiky[4] = 1.0, 0.01
    found = limit_logits(narrow, ms.Direction(spiky, SITE))
    wide = limit_logits(ms.load_model(zoo_folders["llama"], device="cpu"), ms.Direction(spiky, SITE))
    assert bool(found.isfinite().all()) and float((found - wide).abs().max()) < 0.02 * float(wide.abs().max())


def test_files_keep_half_precision(half: ms.Model, prompts: ms.Prompts, tmp_path: Path) -> None:
    kept = half.run(prompts, record="resid_post", logits="none").activations
    kept.save(tmp_path / "acts.safetensors")
    again = ms.Activations.load(tmp_path / "acts.safetensors", model=half)
    assert all(again[site].dtype == HALF and torch.equal(again[site], kept[site]) for site in kept)
    direction = ms.Direction(kept[SITE][0, 0], SITE, half.id)
    direction.save(tmp_path / "v.safetensors")
    assert torch.equal(ms.Direction.load(tmp_path / "v.safetensors", half).vectors, direction.vectors)
    recording = ms.record_stream(half, prompts, [SITE], tmp_path / "rows", covariance=True, progress=False)
    (rows,) = recording.batches(SITE)
    exact = rows.values.double()
    assert rows.values.dtype == HALF and torch.allclose(recording.mean[SITE], exact.mean(0), atol=1e-12)
    assert torch.allclose(recording.covariance[SITE], torch.cov(exact.T), atol=1e-10)
    options = {"axes": {"alpha": [0.0, 1.0]}, "measure": ms.LogitGap(5, 9), "progress": False}
    build = lambda alpha: ms.Add(direction, alpha)  # noqa: E731
    swept = ms.sweep(half, prompts, build=build, out=tmp_path / "sweep", **options)
    loaded = ms.Result.load(tmp_path / "sweep" / "result.safetensors")
    assert loaded["logit_gap"].dtype == "float32" and (loaded["logit_gap"].values == swept["logit_gap"].values).all()


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_model_that_was_passed_is_left_as_it_is(
    zoo_folders: dict[str, Path], backend: str, dtype: torch.dtype
) -> None:
    """Not moved, not cast, not copied into, no gradients, whatever is done with it."""
    hooked = ms.load_model(zoo_folders["llama"], backend=backend, device="cpu", dtype=dtype).hooked
    for index, each in enumerate(hooked.parameters()):
        each.requires_grad_(index % 2 == 0)

    def facts() -> list[object]:
        return [
            (
                name,
                p.data_ptr(),
                p.device,
                p.dtype,
                p.requires_grad,
                p.grad,
                p._version,
                p.detach().float().sum().item(),
            )
            for name, p in hooked.named_parameters()
        ]

    before = facts()
    model = ms.Model(hooked)
    assert model.hooked is hooked
    from dataclasses import replace

    from mechsteer.prefix import optimise_soft_prefix

    rows = ms.Prompts.from_ids(zoo.prompts(batch=2, n_pos=8), tokenizer=model.tokenizer)
    slotted = replace(rows, slots=rows.positions == 1)
    gap = ms.LogitGap(5, 9)
    kept = model.run(rows, record="resid_post").activations
    add = ms.Add(kept[SITE][0, 3].float(), site=SITE)
    model.run(rows, [add], grad=True)
    model.generate(rows, max_new_tokens=2, interventions=[add], progress=False)
    ms.sweep(model, rows, axes={"a": [0, 1]}, build=lambda a: add if a else None, measure=gap, progress=False)
    ms.Propagator(model, rows, ("resid_post", 0), ("resid_post", 2)).svd(2)
    ms.attribution_patching(model, rows, rows[[1, 0]], measure=gap, progress=False)
    optimise_soft_prefix(model, slotted, gap, steps=2, n_restarts=1, allowed=[5, 6, 7], progress=False)
    assert facts() == before
