"""Models over several devices, on devices that are made up; see `devices.Pretend`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from devices import Pretend
from elsewhere import moved

import mechsteer as ms
from mechsteer.backends.hooked_transformer import spread
from mechsteer.executors import transport
from mechsteer.prefix.loss import PrefixLoss

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
GAP = ms.LogitGap(5, 9)
SITES = ["resid_post", "z", "mlp_out"]


@pytest.fixture(params=["gpt2", "llama", "gemma3"])
def both(request: pytest.FixtureRequest, zoo_folders: dict[str, Path]) -> Iterator[tuple[ms.Model, ms.Model, Pretend]]:
    """The model on the CPU, and over two devices that are made up."""
    plain, split = (ms.load_model(zoo_folders[request.param], device="cpu") for _ in range(2))
    with Pretend() as pretend:
        spread(split.hooked, FIRST, 2)
        yield plain, split, pretend


def rows(model: ms.Model, seed: int = 0) -> ms.Prompts:
    ids = [zoo.prompts(batch=1, n_pos=n, seed=seed + n)[0].tolist() for n in (10, 12, 9)]
    return ms.Prompts.from_ids(ids, tokenizer=model.tokenizer)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one.cpu(), other.cpu(), atol=1e-4, rtol=1e-4)


def test_blocks_are_spread_as_transformer_lens_runs_them(both: tuple[ms.Model, ms.Model, Pretend]) -> None:
    _, split, pretend = both
    where = [{p.device for p in block.parameters()} for block in split.hooked.blocks]
    assert where == [{FIRST}, {FIRST}, {SECOND}]
    assert split.device == FIRST and split.hooked.unembed.W_U.device == SECOND
    assert [layer.device for layer in split.decoder.layers] == [FIRST, FIRST, SECOND], "the packed pass does so too"
    pretend.moved.clear()
    split.decoder.whole(torch.randint(4, 100, (2, 8), device=FIRST))
    assert (FIRST, SECOND) in pretend.moved, "rows go on to the device of the next block"


def test_runs_and_recordings(both: tuple[ms.Model, ms.Model, Pretend]) -> None:
    plain, split, _ = both
    vector = torch.randn(plain.d_model, generator=torch.Generator().manual_seed(0))
    add = [ms.Add(vector, site=("resid_post", layer), at=3) for layer in (0, 2)]
    add.append(ms.Scale(ms.Site("z", 2, head=1), 0.5))
    runs = [model.run(rows(model), add, record=SITES) for model in (plain, split)]
    close(runs[1].rows, runs[0].rows)
    for site in runs[0].activations:
        assert runs[1].activations[site].device == FIRST, "what comes out is in one place"
        close(runs[1].activations[site], runs[0].activations[site])
    site = ms.Site("resid_post", 2)
    means = [ms.difference_of_means(m, rows(m), rows(m, 50), sites=site, progress=False)[site] for m in (plain, split)]
    close(means[1].vector, means[0].vector)


def test_sweeps(both: tuple[ms.Model, ms.Model, Pretend]) -> None:
    plain, split, _ = both
    found = []
    for model in (plain, split):
        source = model.run(rows(model, 50), record=["resid_pre", "pattern"], logits="none").activations

        def build(layer: int, kind: str, source: ms.Activations = source) -> ms.Intervention:
            if kind == "ablate":
                return ms.Ablate(source["resid_pre", 1][0, 2], everywhere=True)
            at = {"stream": ms.Site("resid_pre", layer, pos=4), "pattern": ms.Site("pattern", layer, head=1)}[kind]
            return ms.Scale(at, 0.5) if kind == "pattern" else ms.Replace(at, source)

        measures = {"gap": GAP, "ce": ms.TeacherForcedCE(span="all")}
        measures["state"] = ms.StateMatch(source, ("resid_pre", 2), at=1)
        swept = ms.sweep(
            model, rows(model), axes={"layer": [0, 2], "kind": ["stream", "pattern", "ablate"]}, build=build,
            measure=measures, progress=False,
        )  # fmt: skip
        assert swept.provenance["options"]["engine"] == "packed"
        found.append(swept)
    for name in ("gap", "ce", "state"):
        assert found[1][name].values == pytest.approx(found[0][name].values, abs=1e-4)


def test_generation_and_gradients(both: tuple[ms.Model, ms.Model, Pretend]) -> None:
    plain, split, _ = both
    done = [model.generate(rows(model), max_new_tokens=4, progress=False) for model in (plain, split)]
    assert torch.equal(done[0].tokens, done[1].tokens.cpu())
    J = [ms.Propagator(model, rows(model), ("resid_post", 0), ("resid_post", 2)) for model in (plain, split)]
    push = torch.randn(plain.d_model, generator=torch.Generator().manual_seed(1))
    close(J[1].mv(push), J[0].mv(push))
    close(J[1].rmv(push), J[0].rmv(push))
    maps = [
        ms.attribution_patching(m, rows(m), rows(m, 50), measure=GAP, progress=False)["effect"].values
        for m in (plain, split)
    ]
    assert maps[1] == pytest.approx(maps[0], abs=1e-4)
    start = torch.randn(2, 2, plain.d_model, generator=torch.Generator().manual_seed(2))
    losses = []
    for model in (plain, split):
        prompts = rows(model)
        slotted = replace(prompts, slots=(prompts.positions > 0) & (prompts.positions < 3))
        losses.append(PrefixLoss(model, slotted, GAP, n_prefixes=2).gradient(start.to(model.device)))
    close(losses[1][1], losses[0][1])


def test_a_worker_holds_a_model_on_as_many_devices_or_on_one(
    both: tuple[ms.Model, ms.Model, Pretend], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, split, pretend = both
    assert transport.gpus_of(split) == 2 and transport.gpus_of(plain) == 0, "what a worker asks the cluster for"
    alone = moved(split)
    assert alone.device.type == "cpu" and alone.cfg.n_devices == 1 and alone.id == split.id, "no GPU is there"
    close(alone.run(rows(alone)).rows, plain.run(rows(plain)).rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arrived = transport.unpack

    @wraps(arrived)  # and so still pickled by name
    def unpack(packed: Any) -> torch.Tensor:
        out = arrived(packed)
        pretend.put(out, arrived((*packed[:4], False)).device)  # which is lost where a parameter is made
        return out

    monkeypatch.setattr(transport, "unpack", unpack)
    twice = moved(split)
    assert [layer.device for layer in twice.decoder.layers] == [FIRST, FIRST, SECOND]
    close(twice.run(rows(twice)).rows, plain.run(rows(plain)).rows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_devices": 2, "device": "cpu"}, r"^n_devices=2 from cpu on needs as many CUDA devices, and there are \d+"),
        ({"n_devices": 0}, r"^n_devices=0 is no number of devices"),
        ({"n_devices": 2, "backend": "bridge"}, r"^n_devices=2 goes with backend='hooked_transformer'"),
    ],
)
def test_devices_that_are_not_there(zoo_folders: dict[str, Path], options: dict[str, object], error: str) -> None:
    with pytest.raises(ms.ModelLoadError, match=error):
        ms.load_model(zoo_folders["llama"], **options)
