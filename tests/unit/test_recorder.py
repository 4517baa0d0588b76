"""Recording in shards: the rows and statistics of the whole set at once, also after a kill at any moment."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechsteer.files as files
import mechsteer.recording.recorder as recorder
from mechsteer.activations import MissingSiteError
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model
from mechsteer.prompts import Prompts
from mechsteer.recording.reader import Recording, TokenRows
from mechsteer.recording.recorder import record_stream
from mechsteer.site import Site

RESID, Z = Site("resid_post", 0), Site("z", 0)
SITES = (RESID, Z)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("pocket-1l")


def some_prompts(n: int = 12, *, seed: int = 0, side: str = "right") -> Prompts:
    """Prompts of 1 to 20 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (n,), generator=generator).tolist()
    ids = [torch.randint(3, 3000, (length,), generator=generator).tolist() for length in lengths]
    return Prompts.from_ids(ids, padding=side)  # type: ignore[arg-type]


def parts(prompts: Prompts, size: int = 2) -> list[Prompts]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def all_rows(recording: Recording, site: Site, **options: Any) -> TokenRows:
    columns = zip(*recording.batches(site, **options), strict=True)
    return TokenRows(*(torch.cat(column) for column in columns))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- recordings


@given(
    shard_tokens=st.integers(1, 200), part=st.integers(1, 12), batch_tokens=st.integers(1, 90), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_shards_and_batches_of_any_size_hold_the_same(
    model: Model, tmp_path_factory: Any, shard_tokens: int, part: int, batch_tokens: int, seed: int
) -> None:
    prompts, folder = some_prompts(seed=seed), tmp_path_factory.mktemp("recording")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "BATCH_TOKENS", batch_tokens)
        record_stream(model, parts(prompts, part), SITES, folder, shard_tokens=shard_tokens, top_k=3, covariance=True)
    recording = Recording.load(folder, model=model)
    whole = model.run(prompts, record=SITES, logits="none").activations.at(prompts.mask)
    example, column = torch.where(prompts.mask)
    assert (recording.n_tokens, recording.n_examples) == (len(example), len(prompts))
    for site in SITES:
        rows = all_rows(recording, site, size=7)
        torch.testing.assert_close(rows.values, whole[site], rtol=1e-5, atol=1e-5)
        assert torch.equal(rows.example, example)
        assert torch.equal(rows.position, prompts.positions[example, column])
        assert torch.equal(rows.token, prompts.tokens[example, column])
        exact = rows.values.double().flatten(1).numpy()
        np.testing.assert_allclose(recording.mean[site].flatten(), exact.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(recording.covariance[site], np.cov(exact.T), rtol=0, atol=1e-11)
        top = recording.top_k[site]
        order = rows.values.sort(dim=0, descending=True, stable=True).indices[:3]
        assert torch.equal(top.values, rows.values.gather(0, order))
        assert torch.equal(top.example, rows.example[order])
        assert torch.equal(top.position, rows.position[order])
        assert torch.equal(top.token, rows.token[order])
    longest = int(prompts.lengths.max())
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert all(shard["tokens"] <= max(shard_tokens, batch_tokens, longest) for shard in shards)


def test_padding_does_not_matter(model: Model, tmp_path: Path) -> None:
    for side in ("left", "right"):
        record_stream(model, some_prompts(side=side), SITES, tmp_path / side, top_k=2, shard_tokens=50)
    assert contents(tmp_path / "left") == contents(tmp_path / "right")


def test_rows_are_memory_mapped_and_batches_end_with_shards(model: Model, tmp_path: Path) -> None:
    recording = record_stream(model, parts(some_prompts()), [RESID], tmp_path, shard_tokens=40)
    sizes = [len(rows.values) for rows in recording.batches(RESID, size=16)]
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert sizes == [min(16, shard["tokens"] - start) for shard in shards for start in range(0, shard["tokens"], 16)]
    first = next(recording.batches(RESID))
    assert first.values.untyped_storage().nbytes() >= (tmp_path / "shard-00000.safetensors").stat().st_size - 4096


@pytest.mark.parametrize(
    "where",
    ["completion", lambda prompts: prompts.mask & (prompts.positions > 1), lambda prompts: prompts.at(-1)],
)
def test_where_chooses_tokens(model: Model, tmp_path: Path, where: Any) -> None:
    plain = some_prompts(8)
    roles = torch.where(plain.positions >= 4, 3, plain.roles)  # prompts of up to four tokens have no completion
    prompts = Prompts(plain.tokens, plain.mask, roles, plain.slots)
    recording = record_stream(model, parts(prompts, 3), [RESID], tmp_path, where=where)
    marked = prompts.span(where) if isinstance(where, str) else where(prompts)
    rows = all_rows(recording, RESID)
    assert torch.equal(torch.stack(torch.where(marked)), torch.stack([rows.example, rows.position]))
    whole = model.run(prompts, record=[RESID], logits="none").activations.at(marked)[RESID]
    torch.testing.assert_close(rows.values, whole, rtol=1e-5, atol=1e-5)
    assert recording.n_examples == 8


def test_without_rows_the_statistics_are_the_same(model: Model, tmp_path: Path) -> None:
    kept = record_stream(model, some_prompts(), SITES, tmp_path / "kept", shard_tokens=50, covariance=True, top_k=2)
    lean = record_stream(
        model, some_prompts(), SITES, tmp_path / "lean", shard_tokens=50, covariance=True, top_k=2, keep=False
    )
    assert not list((tmp_path / "lean").glob("shard-*"))
    for site in SITES:
        assert torch.equal(kept.mean[site], lean.mean[site])
        assert torch.equal(kept.covariance[site], lean.covariance[site])
        assert torch.equal(kept.top_k[site].example, lean.top_k[site].example)
    with pytest.raises(
        MechsteerError, match=r"lean was recorded with keep=False and holds no rows\. Record with keep=Tr"
    ):
        lean.batches(RESID)


def test_rows_can_be_stored_in_half_precision(model: Model, tmp_path: Path) -> None:
    full = record_stream(model, some_prompts(), [RESID], tmp_path / "full")
    half = record_stream(model, some_prompts(), [RESID], tmp_path / "half", dtype=torch.float16)
    assert torch.equal(all_rows(half, RESID).values, all_rows(full, RESID).values.half())
    assert torch.equal(half.mean[RESID], full.mean[RESID]), "statistics are of the rows before"


def test_a_recording_says_what_it_is(model: Model, tmp_path: Path) -> None:
    recording = record_stream(model, some_prompts(4), ["blocks.0.hook_resid_post"], tmp_path)
    n = int(some_prompts(4).mask.sum())
    assert repr(recording) == f"Recording({n} tokens of 4 prompts, at blocks.0.hook_resid_post of 'pocket-1l')"
    assert recording.sites == (RESID,) and recording.model == model.id and recording.complete
    assert sorted(contents(tmp_path)) == ["manifest.json", "shard-00000.safetensors", "statistics-00000.safetensors"]


# --- after a kill

OPTIONS: dict[str, Any] = {"shard_tokens": 30, "top_k": 2, "covariance": True}


@pytest.fixture(scope="module")
def uninterrupted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    record_stream(model, parts(some_prompts()), SITES, folder, **OPTIONS)
    return contents(folder)


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_recording_continues_to_the_same_bits(
    model: Model, tmp_path: Path, uninterrupted: dict[str, bytes], stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[Prompts]:
        for number, part in enumerate(parts(some_prompts())):
            if number == stop:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        record_stream(model, interrupted(), SITES, tmp_path, **OPTIONS)
    done = 0
    if (tmp_path / "manifest.json").exists():
        partial = Recording.load(tmp_path)
        assert not partial.complete and "unfinished" in repr(partial)
        rows = all_rows(partial, RESID)
        assert len(rows.values) == partial.n_tokens
        np.testing.assert_allclose(partial.mean[RESID], rows.values.double().mean(0), atol=1e-12)
        done = partial.n_examples
    assert done or stop < 5, "a shard holds two or three batches"

    ran: list[int] = []
    real = Model.states_at
    monkeypatch.setattr(Model, "states_at", lambda self, *args: ran.append(len(args[0])) or real(self, *args))
    recording = record_stream(model, parts(some_prompts()), SITES, tmp_path, **OPTIONS)
    assert recording.complete
    assert sum(ran) == 12 - done, "finished prompts are not run again"
    assert len(list(tmp_path.glob("statistics-*"))) == 1, "older statistics are removed"
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("fatal", range(12))
def test_a_kill_between_any_two_writes_loses_no_more_than_a_shard(
    model: Model, tmp_path: Path, uninterrupted: dict[str, bytes], fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], files.os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fatal + 1:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            record_stream(model, parts(some_prompts()), SITES, tmp_path, **OPTIONS)
    if fatal >= 3:
        partial = Recording.load(tmp_path)
        assert len(all_rows(partial, Z).values) == partial.n_tokens > 0
        assert partial.covariance[Z].isfinite().all()
    record_stream(model, parts(some_prompts()), SITES, tmp_path, **OPTIONS)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_what_can_be_continued(
    model: Model, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.save_file

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if "shard-00002" in path.name:
            path.write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        real(tensors, path, metadata=metadata)

    # Forked, because a new process takes seconds to import TransformerLens.
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", save_file)
        arguments = (model, parts(some_prompts()), SITES, tmp_path)
        process = multiprocessing.get_context("fork").Process(target=record_stream, args=arguments, kwargs=OPTIONS)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()].count(".tmp") == 1
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 2
    record_stream(model, parts(some_prompts()), SITES, tmp_path, **OPTIONS)
    assert contents(tmp_path) == uninterrupted


def test_a_finished_recording_is_not_recorded_again(model: Model, tmp_path: Path, monkeypatch: Any) -> None:
    record_stream(model, some_prompts(), SITES, tmp_path, **OPTIONS)
    before = contents(tmp_path)
    monkeypatch.setattr(Model, "states_at", None)
    assert record_stream(model, some_prompts(), SITES, tmp_path, **OPTIONS).complete
    assert contents(tmp_path) == before


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sites": [RESID]},
            r"holds a recording with sites=\['blocks\.0\.attn\.hook_z', .*\], and this call has \['blo",
        ),
        (
            {"where": "user"},
            r"with where=None, and this call has 'user'\. Pass the same options to continue it, or anot",
        ),
        ({"where": lambda prompts: prompts.mask}, r"with where=None, and this call has 'a function'"),
        ({"dtype": torch.float16}, r"with dtype=None, and this call has 'float16'"),
        ({"shard_tokens": 31}, r"with shard_tokens=30, and this call has 31"),
        ({"keep": False}, r"with keep=True, and this call has False"),
        ({"top_k": 3}, r"with top_k=2, and this call has 3"),
        ({"covariance": False}, r"with covariance=True, and this call has False"),
    ],
)
def test_other_options_are_refused(
    model: Model, tmp_path: Path, uninterrupted: dict[str, bytes], change: dict[str, Any], message: str
) -> None:
    for name, content in uninterrupted.items():
        (tmp_path / name).write_bytes(content)
    call = {"sites": SITES, **OPTIONS, **change}
    with pytest.raises(MechsteerError, match=message):
        record_stream(model, parts(some_prompts()), out=tmp_path, **call)
    assert contents(tmp_path) == uninterrupted


def test_other_prompts_are_refused(model: Model, tmp_path: Path) -> None:
    record_stream(model, parts(some_prompts()), SITES, tmp_path, **OPTIONS)
    changed = some_prompts()
    tokens = changed.tokens.clone()
    tokens[9, 0] += 1
    changed = Prompts(tokens, changed.mask, changed.roles, changed.slots)
    for other in (parts(changed), parts(some_prompts()[:8]), parts(some_prompts(), 3), [some_prompts(seed=1)]):
        with pytest.raises(
            MechsteerError,
            match=r"was recorded with other prompts, or other tokens of them: shard \d differs\. Pass the same",
        ):
            record_stream(model, other, SITES, tmp_path, **OPTIONS)
    with pytest.raises(
        MechsteerError,
        match=r"holds a finished recording of 12 prompts, and more were passed\. Pass the same prompts, or",
    ):
        record_stream(model, [*parts(some_prompts()), some_prompts(1)], SITES, tmp_path, **OPTIONS)


def test_another_choice_of_tokens_is_refused_though_functions_have_no_name(model: Model, tmp_path: Path) -> None:
    record_stream(model, some_prompts(), SITES, tmp_path, where=lambda prompts: prompts.at(0))
    with pytest.raises(MechsteerError, match="other prompts, or other tokens of them: shard 0 differs"):
        record_stream(model, some_prompts(), SITES, tmp_path, where=lambda prompts: prompts.at(-1))


def test_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    record_stream(model, some_prompts(2), [RESID], tmp_path)
    other = load_model("pocket")
    with pytest.raises(MechsteerError, match=r"^The recording in .* was made with pocket-1l .* and this is pocket "):
        record_stream(other, some_prompts(2), [RESID], tmp_path)
    with pytest.raises(MechsteerError, match=r" was made with pocket-1l .* and this is pocket "):
        Recording.load(tmp_path, model=other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"sites": ["pattern"]},
            r"record_stream got blocks\.0\.attn\.hook_pattern\. Pass sites whose width is the same for",
        ),
        ({"sites": []}, r"record_stream got no sites\. Pass sites"),
        ({"sites": [("resid_post", 7)]}, r"Site\('resid_post', 7\) does not exist: pocket-1l has layers 0 to 0"),
        ({"shard_tokens": 0}, r"shard_tokens=0 and top_k=0\. Pass shard_tokens of at least 1 and top_k of at least 0"),
        ({"top_k": -1}, r"shard_tokens=65536 and top_k=-1\. Pass shard_tokens of at least 1"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 cannot hold activations\. Pass a floating-point one"),
        ({"where": "usr"}, r"span\('usr'\) does not exist"),
        (
            {"where": "completion"},
            r"recorded nothing: none of the tokens of 3 prompts was marked\. Pass prompts that have",
        ),
        ({"where": lambda prompts: 3}, r"where\(prompts\) gave a int\. Return a mask Bool\[batch, pos\]"),
        ({"where": lambda prompts: ~prompts.mask}, r"`where` marks \d+ padding tokens"),
        (
            {"prompts": iter(["a text"])},
            r"record_stream got prompts of type str\. Pass Prompts, or an iterable of Prompts\.",
        ),
        ({"prompts": []}, r"recorded nothing: none of the tokens of 0 prompts was marked"),
    ],
)
def test_what_has_no_meaning_is_refused(model: Model, tmp_path: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(MechsteerError, match=message):
        record_stream(model, **{"prompts": some_prompts(3), "sites": [RESID], "out": tmp_path / "run", **call})
    assert not (tmp_path / "run").exists()


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = load_model("pocket-1l")
    with torch.no_grad():
        model.hooked.W_E[7] *= 1e8
    prompts = Prompts.from_ids([[5, 6], [5, 6, 7]])
    with pytest.raises(
        MechsteerError,
        match=r"^hook_embed at position 2 of prompt 1 reaches .*e\+0\d, too large for dtype=torch\.float16\. Pass",
    ):
        record_stream(model, prompts, ["embed"], tmp_path, dtype=torch.float16)
    with torch.no_grad():
        model.hooked.W_E[7] = torch.nan
    with pytest.raises(
        MechsteerError,
        match=r"^hook_embed at position 2 of prompt 1 is NaN or infinite\. Leave out that prompt, or run",
    ):
        record_stream(model, prompts, ["embed"], tmp_path)


def test_what_was_not_recorded_is_named(model: Model, tmp_path: Path) -> None:
    recording = record_stream(model, some_prompts(2), [RESID], tmp_path)
    with pytest.raises(
        MechsteerError, match=r"was recorded with covariance=False and has no covariance\. Record more than"
    ):
        _ = recording.covariance
    with pytest.raises(MechsteerError, match=r"was recorded with top_k=0\. Record with top_k of at least 1"):
        _ = recording.top_k
    with pytest.raises(
        MissingSiteError, match=r"hook_z was not recorded\. Nearest recorded: blocks\.0\.hook_resid_post"
    ):
        recording.batches(Z)
    with pytest.raises(MechsteerError, match=r"batches\(size=0\) needs at least one row"):
        recording.batches(RESID, size=0)
    single = record_stream(model, Prompts.from_ids([[5]]), [RESID], tmp_path / "one", covariance=True, top_k=4)
    with pytest.raises(MechsteerError, match=r"was recorded with one token and has no covariance"):
        _ = single.covariance
    assert single.top_k[RESID].values.shape == (1, model.d_model), "no more than there were tokens"


def _rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r" holds no manifest\.json\. Pass a folder where record_stream",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text('{"a'),
            r"manifest\.json is damaged \(.*\)\. Remove .* and ",
        ),
        (_rewrite(lambda content: content.pop("shards")), r"manifest\.json is damaged \('shards'\)"),
        (_rewrite(lambda content: content["options"].pop("sites")), r"manifest\.json is damaged"),
        (
            _rewrite(lambda content: content.update(version=2)),
            r"has version 2 of format 'mechsteer\.recording', and this",
        ),
        (_rewrite(lambda content: content.update(format="x")), r"has format 'x', expected 'mechsteer\.recording'"),
        (
            _rewrite(lambda content: content["shards"][0].update(tokens=3)),
            r"00000\.safetensors should hold 3 rows, but does",
        ),
        (lambda folder: (folder / "shard-00000.safetensors").unlink(), r"shard-00000\.safetensors is no file"),
        (lambda folder: (folder / "shard-00000.safetensors").write_text("x"), r"shard-00000\.safetensors is damaged"),
        (lambda folder: next(folder.glob("stat*")).unlink(), r"statistics-\d+\.safetensors is no file"),
    ],
)
def test_damaged_recordings_are_named(
    tmp_path: Path, uninterrupted: dict[str, bytes], damage: Callable[[Path], None], message: str
) -> None:
    for name, content in uninterrupted.items():
        (tmp_path / name).write_bytes(content)
    damage(tmp_path)
    with pytest.raises(MechsteerError, match=message) as caught:
        recording = Recording.load(tmp_path)
        list(recording.batches(RESID))
        _ = recording.mean
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(model: Model, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(MechsteerError, match=r"taken is a file\. Pass a folder to record into\."):
        record_stream(model, some_prompts(2), [RESID], tmp_path / "taken")


# --- the bar


@pytest.mark.parametrize(("late", "progress", "shown"), [(3600.0, True, False), (0.0, True, True), (0.0, False, False)])
def test_a_bar_appears_when_it_takes_long(
    model: Model, tmp_path: Path, monkeypatch: Any, capsys: Any, late: float, progress: bool, shown: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("mechsteer.progress.SECONDS", late)
    record_stream(model, [some_prompts(3), some_prompts(4)], [RESID], tmp_path, progress=progress)
    out = capsys.readouterr()
    assert out.out == ""
    assert ("tokens" in out.err) == shown
    assert bool(out.err) == shown
