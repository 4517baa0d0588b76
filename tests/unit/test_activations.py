"""Activations: the same numbers under any layout and any spelling of a site, and every wrong use refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechsteer.activations import Activations, MissingSiteError, ModelId, SiteMap
from mechsteer.errors import MechsteerError
from mechsteer.model import Model, load_model
from mechsteer.prompts import Prompts
from mechsteer.site import Site

TOY = ModelId("toy", "a" * 64, False)
RESID, Z, PATTERN, SCALE = Site("resid_post", 1), Site("z", 0), Site("pattern", 0), Site("ln_final_scale")
N_HEADS, D_HEAD, D_MODEL = 3, 2, 4
SIZES = {"head": N_HEADS, "d_head": D_HEAD, "d_model": D_MODEL, "one": 1}

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right"])


def toy_prompts(lengths: list[int], side: str = "right") -> Prompts:
    """Prompts whose ids are all different."""
    starts = [10 * row for row in range(len(lengths))]
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return Prompts.from_ids(ids, padding=side)  # type: ignore[arg-type]


def toy(
    lengths: list[int], *, side: str = "right", sites: tuple[Site, ...] = (RESID, Z, PATTERN, SCALE), seed: int = 0
) -> Activations:
    """Random values, the same for the same tokens under either padding, and NaN where nothing may be read."""
    prompts, width = toy_prompts(lengths, side), max(lengths)
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES | {"batch": len(lengths)} | dict.fromkeys(("pos", "dest", "src"), width)
    values = {}
    for site in sites:
        value = torch.full([sizes[axis] for axis in site.axes], torch.nan)
        for row, length in enumerate(lengths):
            real = torch.randn(
                [length if axis in ("pos", "dest", "src") else sizes[axis] for axis in site.axes[1:]],
                generator=generator,
            )
            first = width - length if side == "left" else 0
            part = value[row]
            for axis, name in enumerate(site.axes[1:]):
                if name in ("pos", "dest", "src"):
                    part = part.narrow(axis, first, length)
            part.copy_(real)
        values[site] = value
    return Activations(values, prompts=prompts, model=TOY)


@pytest.fixture(scope="module")
def pocket() -> Model:
    return load_model("pocket")


# --- what a site means


@given(lengths, sides, st.data())
@settings(max_examples=50, deadline=None)
def test_a_head_and_a_position_are_what_indexing_example_by_example_gives(
    lengths: list[int], side: str, data: st.DataObject
) -> None:
    acts = toy(lengths, side=side)
    pos = data.draw(st.integers(-min(lengths), min(lengths) - 1))
    head = data.draw(st.integers(0, N_HEADS - 1))
    width = max(lengths)
    columns = []
    for length in lengths:
        first = width - length if side == "left" else 0
        columns.append(first + (pos if pos >= 0 else length + pos))
    each = list(enumerate(columns))
    expected = {
        RESID.at(pos=pos): [acts[RESID][row, column] for row, column in each],
        Z.at(pos=pos): [acts[Z][row, column] for row, column in each],
        Z.at(head=head): [acts[Z][row, :, head] for row, _ in each],
        Z.at(head=head, pos=pos): [acts[Z][row, column, head] for row, column in each],
        PATTERN.at(head=head): [acts[PATTERN][row, head] for row, _ in each],
        PATTERN.at(pos=pos): [acts[PATTERN][row, :, column] for row, column in each],
        PATTERN.at(head=head, pos=pos): [acts[PATTERN][row, head, column] for row, column in each],
    }
    for site, rows in expected.items():
        assert torch.equal(acts[site].nan_to_num(7.0), torch.stack(rows).nan_to_num(7.0)), site


def test_negative_positions_count_back_from_the_end_of_the_prompt(pocket: Model) -> None:
    prompts = pocket.prompts(["Tell me of the sea", "Tell me"])
    last = prompts.at(prompts.lengths - 1)
    answered = Prompts(prompts.tokens, prompts.mask, torch.where(last, 3, prompts.roles), prompts.slots)
    values = answered.positions[..., None].float().expand(-1, -1, D_MODEL)
    acts = Activations({RESID: values}, prompts=answered, model=TOY)
    assert torch.equal(acts[RESID.at(pos=-1)][:, 0].long(), prompts.lengths - 2), "the completion is left out"


def test_all_spellings_of_a_site_are_one_key() -> None:
    acts = toy([2, 3])
    for name in (RESID, ("resid_post", 1), "blocks.1.hook_resid_post"):
        assert acts[name] is acts[RESID]
        assert name in acts
    assert Site("z", 0, head=1) in acts
    assert ("resid_post", 0) not in acts
    assert list(acts) == [PATTERN, Z, RESID, SCALE], "in the order of a forward pass"
    assert acts.get(Site("embed")) is None
    assert acts == acts and acts != toy([2, 3]) and len({acts, acts}) == 1


def test_what_was_not_recorded_is_answered_with_the_nearest() -> None:
    acts = toy([2, 3])
    message = (
        r"^blocks\.4\.hook_resid_post was not recorded\. Nearest recorded: blocks\.1\.hook_resid_post, .*"
        r"Run the model with record=\['blocks\.4\.hook_resid_post'\] too\.$"
    )
    with pytest.raises(MissingSiteError, match=message):
        acts["resid_post", 4]
    with pytest.raises(KeyError):
        acts["resid_post", 4]
    with pytest.raises(MechsteerError, match="embed was not recorded: nothing was"):
        Activations({}, prompts=toy_prompts([2]), model=TOY)["embed"]
    with pytest.raises(MechsteerError, match="'resid_psot' is no site that mechsteer knows"):
        assert "resid_psot" in acts
    with pytest.raises(MechsteerError, match=r"^Site\('z', 0, head=3\) does not exist: it has 3 heads, counted from 0"):
        acts[Site("z", 0, head=3)]
    with pytest.raises(MechsteerError, match="position 2 is outside prompt 0, which has 2 tokens"):
        acts[RESID.at(pos=2)]


# --- shapes


@pytest.mark.parametrize(
    ("site", "shape", "expected"),
    [
        (RESID, (2, 4, D_MODEL), r"shape \[2, 4, 4\], expected \[batch=2, pos=3, d_model\]"),
        (RESID, (1, 3, D_MODEL), r"expected \[batch=2, pos=3, d_model\]"),
        (RESID, (2, 3), r"shape \[2, 3\], expected \[batch=2, pos=3, d_model\]"),
        (Z, (2, 3, 4), r"blocks\.0\.attn\.hook_z have .* expected \[batch=2, pos=3, head, d_head\]"),
        (PATTERN, (2, 1, 3, 4), r"expected \[batch=2, head, dest=3, src=3\]"),
        (PATTERN, (2, 1, 4, 3), r"expected \[batch=2, head, dest=3, src=3\]"),
        (SCALE, (2, 3, 2), r"expected \[batch=2, pos=3, one=1\]"),
    ],
)
def test_shapes_must_fit_the_prompts(site: Site, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(MechsteerError, match=expected + r"\. Pass the prompts that were run, in the same layout\.$"):
        Activations({site: torch.zeros(shape)}, prompts=toy_prompts([2, 3]), model=TOY)


def test_parts_of_hook_points_are_no_keys() -> None:
    with pytest.raises(
        MechsteerError,
        match=r"value for Site\('z', 0, head=1\), but hold whole hook points\. Pass all of Site\('z', 0\)",
    ):
        Activations({Z.at(head=1): torch.zeros(2, 3, 2)}, prompts=toy_prompts([2, 3]), model=TOY)


# --- layouts


@given(lengths, sides)
@settings(max_examples=30, deadline=None)
def test_padding_changes_nothing_but_the_layout(lengths: list[int], side: str) -> None:
    left, right = toy(lengths, side="left"), toy(lengths, side="right")
    for source in (left, right):
        moved = source.padded(side)  # type: ignore[arg-type]
        wanted = {"left": left, "right": right}[side]
        assert torch.equal(moved.prompts.tokens * moved.prompts.mask, wanted.prompts.tokens * wanted.prompts.mask)
        for site, value in wanted.items():
            assert torch.equal(moved[site].nan_to_num(0.0), value.nan_to_num(0.0)), site
    rows = left.at(left.prompts.mask)
    for site, values in right.at(right.prompts.mask).items():
        if site != PATTERN:  # its sources have the layout of the prompts
            assert torch.equal(rows[site], values)


@given(lengths, sides, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_rows_and_means_are_those_of_a_loop(lengths: list[int], side: str, random: Any) -> None:
    acts = toy(lengths, side=side, sites=(RESID, Z))
    mask = acts.prompts.mask
    where = mask & torch.tensor([[random.random() < 0.6 for _ in row] for row in mask])
    where[0] |= mask[0]
    for site in acts:
        rows = [acts[site][b, p] for b in range(len(lengths)) for p in range(mask.shape[1]) if where[b, p]]
        assert torch.equal(acts.at(where)[site], torch.stack(rows))
        mean = acts.mean(where)[site]
        assert mean.dtype == torch.float32
        assert torch.allclose(mean.double(), torch.stack(rows).double().mean(0), rtol=1e-7, atol=1e-7)
    every = acts.mean()
    assert torch.equal(every["resid_post", 1], acts.mean(mask)[RESID])


def test_the_rows_of_a_pattern_are_its_destinations() -> None:
    acts = toy([3, 3])
    where = torch.tensor([[False, True, False], [True, False, False]])
    assert torch.equal(acts.at(where)[PATTERN], torch.stack([acts[PATTERN][0, :, 1], acts[PATTERN][1, :, 0]]))


def test_a_mean_in_half_precision_is_summed_in_double() -> None:
    prompts = Prompts.from_ids(torch.zeros(1, 30_000, dtype=torch.long))
    value = torch.ones(1, 30_000, 1, dtype=torch.float16)
    value[0, 0] = 3e4
    acts = Activations({Site("embed"): value}, prompts=prompts, model=TOY)
    assert float(acts.mean()["embed"]) == pytest.approx(59_999 / 30_000, rel=1e-6)


def test_a_span_is_the_tokens_of_that_role(pocket: Model) -> None:
    prompts = pocket.prompts(["Tell me of the sea", "Tell me"])
    acts = pocket.run(prompts, record=["resid_post"], logits="none").activations
    assert torch.equal(acts.span("user")["resid_post", 3], acts["resid_post", 3][prompts.span("user")])
    with pytest.raises(MechsteerError, match=r"span\('usr'\) does not exist"):
        acts.span("usr")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            torch.ones(2, 4, dtype=torch.bool),
            r"`where` is bool \[2, 4\], but marks tokens of .* = \[2, 3\]\. Pass a bool",
        ),
        (torch.ones(2, 3, dtype=torch.int64), r"`where` is int64 \[2, 3\]"),
        (torch.ones(2, 3, dtype=torch.bool), r"`where` marks 1 padding tokens, which .* Pass where & prompts\.mask"),
    ],
)
def test_masks_must_fit(where: Tensor, message: str) -> None:
    from mechsteer.activations import check_where

    with pytest.raises(MechsteerError, match=message):
        # The annotation would catch the wrong dtype first, in tests only.
        getattr(check_where, "__wrapped__", check_where)(where, toy_prompts([2, 3]))
    if where.dtype == torch.bool:
        with pytest.raises(MechsteerError, match=message):
            toy([2, 3]).at(where)


def test_a_mean_over_nothing_is_refused() -> None:
    with pytest.raises(MechsteerError, match=r"mean\(where\) got a `where` that marks no token"):
        toy([2, 3]).mean(torch.zeros(2, 3, dtype=torch.bool))


# --- choosing


@pytest.mark.parametrize("index", [1, -1, slice(1, 3), [2, 0], torch.tensor([True, False, True])])
def test_examples_go_with_their_prompts(index: Any) -> None:
    acts = toy([2, 4, 3])
    some = acts.example(index)
    rows = torch.arange(3)[index].reshape(-1)
    assert torch.equal(some.prompts.tokens, acts.prompts.tokens[rows])
    assert torch.equal(some[RESID].nan_to_num(), acts[RESID][rows].nan_to_num())


def test_select_takes_kinds_layers_and_sites() -> None:
    sites = tuple(Site(kind, layer) for kind in ("resid_pre", "resid_post") for layer in range(4))
    acts = toy([2, 3], sites=sites)
    assert set(acts.select(kind="resid_pre")) == set(sites[:4])
    assert set(acts.select(kind=("resid_pre", "resid_post"), layer=2)) == {Site("resid_pre", 2), RESID.at(layer=2)}
    assert set(acts.select(layer=range(1, 3), kind="resid_post")) == {RESID.at(layer=1), RESID.at(layer=2)}
    assert set(acts.select(sites=[("resid_post", 3), "blocks.0.hook_resid_pre"])) == {
        RESID.at(layer=3),
        Site("resid_pre", 0),
    }
    with pytest.raises(
        MissingSiteError, match=r"select\(kind='z', layer=None\) fits no recorded site\. Recorded: blocks"
    ):
        acts.select(kind="z")
    with pytest.raises(MissingSiteError, match="hook_resid_post was not recorded"):
        acts.select(sites=[("resid_post", 9)])


def test_stack_goes_up_the_layers() -> None:
    acts = toy([2, 3], sites=(Site("resid_post", 2), Site("resid_post", 0), Site("embed")))
    stacked = acts.stack("resid_post")
    assert stacked.shape == (2, 2, 3, D_MODEL)
    assert torch.equal(stacked[1].nan_to_num(), acts["resid_post", 2].nan_to_num())
    with pytest.raises(MechsteerError, match=r"stack\('embed'\) needs a kind with layers.*acts\['embed'\]"):
        acts.stack("embed")
    uneven = Activations(
        {Site("mlp_post", 0): torch.zeros(1, 2, 3), Site("mlp_post", 1): torch.zeros(1, 2, 5)},
        prompts=toy_prompts([2]),
        model=TOY,
    )
    with pytest.raises(MechsteerError, match=r"needs the same shape at all layers, but blocks\.0.* has \[1, 2, 3\], "):
        uneven.stack("mlp_post")


def test_to_changes_dtype_or_device_and_nothing_else() -> None:
    acts = toy([2, 3])
    half = acts.to(torch.float16)
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert half.prompts.tokens.dtype == acts.prompts.tokens.dtype
    assert acts.to("cpu")[RESID].device == torch.device("cpu")
    assert acts.to("meta").prompts.tokens.device == torch.device("meta")


# --- arithmetic


@given(lengths, sides, sides, st.floats(-4, 4))
@settings(max_examples=30, deadline=None)
def test_arithmetic_is_that_of_the_values_whatever_the_layout(
    lengths: list[int], left: str, right: str, factor: float
) -> None:
    a, b = toy(lengths, side=left, seed=1), toy(lengths, side=right, seed=2)
    same = toy(lengths, side=left, seed=2)
    for site in (RESID, Z, SCALE):
        rows_a, rows_b = (x.at(x.prompts.mask)[site] for x in (a, same))
        for result, expected in [
            (a - b, rows_a - rows_b),
            (a + b, rows_a + rows_b),
            (a * factor, rows_a * factor),
            (factor * a, rows_a * factor),
            (-a, -rows_a),
        ]:
            assert set(result) == set(a), "a difference keeps its sites"
            assert torch.equal(result.at(result.prompts.mask)[site], expected)


def test_what_does_not_go_together_is_not_subtracted() -> None:
    a = toy([2, 3])
    other = Activations(dict(a), prompts=a.prompts, model=ModelId("toy", "b" * 64, True))
    with pytest.raises(
        MechsteerError,
        match=r"^activations - activations: they are of two models, 'toy' \(aaaaaaaa\) and 'toy' \(bbbb.*pro",
    ):
        a - other
    with pytest.raises(
        MechsteerError, match=r"blocks\.0\.attn\.hook_z stands on one side only\. Record the same sites"
    ):
        a + a.select(sites=[RESID, PATTERN, SCALE])
    with pytest.raises(
        MechsteerError, match=r"as many and as long, got prompt 1 has 3 and 2 tokens\. Align the prompts"
    ):
        a - toy([2, 2])
    with pytest.raises(MechsteerError, match="as many and as long, got 2 and 3 prompts"):
        a - toy([2, 3, 2])
    for wrong in (lambda: a - 1, lambda: a + "x", lambda: a * a):  # type: ignore[operator]
        with pytest.raises(TypeError):
            wrong()


# --- showing


def test_repr_lists_sites_and_shapes_and_html_escapes_names() -> None:
    acts = toy([2, 3], sites=(RESID, Z))
    assert repr(acts).splitlines() == [
        "Activations of 'toy' (aaaaaaaa) on 2 prompts of 2 to 3 tokens, 2 sites",
        "  blocks.0.attn.hook_z  [batch=2, pos=3, head=3, d_head=2]  float32 on cpu",
        "  blocks.1.hook_resid_post  [batch=2, pos=3, d_model=4]  float32 on cpu",
    ]
    hostile = Activations(dict(acts), prompts=acts.prompts, model=ModelId("<script>x</script>", "a" * 64, False))
    page = hostile._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "blocks.1.hook_resid_post" in page
    assert repr(acts.mean()) == "SiteMap(blocks.0.attn.hook_z, blocks.1.hook_resid_post)"


# --- files


@given(lengths, sides, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_files_return_every_bit(tmp_path_factory: Any, lengths: list[int], side: str, dtype: torch.dtype) -> None:
    path = tmp_path_factory.mktemp("acts") / "a.safetensors"
    acts = toy(lengths, side=side).to(dtype)
    prompts = Prompts(
        acts.prompts.tokens, acts.prompts.mask, acts.prompts.roles, acts.prompts.slots, ("é<b>",) * len(lengths)
    )
    Activations(dict(acts), prompts=prompts, model=TOY).save(path)
    back = Activations.load(path)
    assert back.model == TOY and list(back) == list(acts)
    for site, value in acts.items():
        assert back[site].dtype == dtype
        assert torch.equal(back[site].nan_to_num(7.0), value.nan_to_num(7.0))
    for name in ("tokens", "mask", "roles", "slots"):
        assert torch.equal(getattr(back.prompts, name), getattr(prompts, name))
    assert back.prompts.labels == prompts.labels and back.prompts.tokenizer is None
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_views_of_one_tensor_and_tensors_with_gradients_can_be_saved(tmp_path: Path) -> None:
    shared = torch.randn(2, 3, 2 * D_MODEL, requires_grad=True)
    values = {Site("resid_post", 0): shared[..., :4], Site("resid_pre", 1): shared[..., :4], Site("embed"): shared}
    Activations(values, prompts=toy_prompts([2, 3]), model=TOY).save(tmp_path / "deep" / "a.safetensors")
    back = Activations.load(tmp_path / "deep" / "a.safetensors")
    for site, value in values.items():
        assert torch.equal(back[site], value.detach())


def test_chosen_sites_are_read_alone(tmp_path: Path) -> None:
    acts = toy([2, 3])
    acts.save(tmp_path / "a.safetensors")
    some = Activations.load(tmp_path / "a.safetensors", sites=["blocks.0.attn.hook_z", ("resid_post", 1)])
    assert list(some) == [Z, RESID]
    with pytest.raises(MissingSiteError, match=r"^hook_embed was not recorded. Nearest recorded: "):
        Activations.load(tmp_path / "a.safetensors", sites=["embed"])


def test_a_file_can_be_replaced_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    acts = toy([2, 3])
    acts.save(path)
    mapped = Activations.load(path)
    (mapped * 2.0).save(path)
    assert torch.equal(mapped[Z].nan_to_num(), acts[Z].nan_to_num())
    assert torch.equal(Activations.load(path)[Z].nan_to_num(), 2 * acts[Z].nan_to_num())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mechsteer.files as files

    path = tmp_path / "a.safetensors"
    toy([2, 3]).save(path)
    before = path.read_bytes()

    def half_written(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        toy([4, 4]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_the_model_that_was_recorded_is_accepted(pocket: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    acts = pocket.run(["Tell me of the sea", "Hello"], record=["resid_post"], logits="none").activations
    acts.save(path)
    back = Activations.load(path, model=pocket)
    assert back.model == pocket.id
    assert back.prompts.texts == acts.prompts.texts
    with pytest.raises(MechsteerError, match=r"a\.safetensors was made with pocket .* and this is pocket-1l "):
        Activations.load(path, model=load_model("pocket-1l"))
    folded = Activations(dict(acts), prompts=acts.prompts, model=ModelId("pocket", "c" * 64, True))
    folded.save(path)
    with pytest.raises(
        MechsteerError, match=r"a\.safetensors was made with folded or centred weights of pocket, and pocket"
    ):
        Activations.load(path, model=pocket)


def _without_manifest(path: Path) -> None:
    save_file(load_file(path), path)


def _with_manifest(change: dict[str, Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            manifest = json.loads(file.metadata()["mechsteer"])
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"mechsteer": json.dumps(manifest | change)})

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"a\.safetensors is no file\. Pass one that \.save\(path\) wrote\."),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"a\.safetensors is damaged or was copied only in part \(",
        ),
        (lambda path: path.write_bytes(b"junk"), r"a\.safetensors is damaged or was copied only in part \("),
        (_without_manifest, r"a\.safetensors holds no mechsteer manifest"),
        (
            _with_manifest({"version": 99}),
            r"has version 99 of format 'mechsteer\.activations', and this mechsteer reads 1",
        ),
        (
            _with_manifest({"format": "mechsteer.result"}),
            r"has format 'mechsteer\.result', expected 'mechsteer\.activat",
        ),
        (_with_manifest({"model": 3}), r"a\.safetensors is damaged"),
        (_with_manifest({"sites": {"blocks.0.hook_resid_pre": []}}), r"a\.safetensors is damaged"),
        (_with_manifest({"labels": None}), r"a\.safetensors is damaged"),
    ],
)
def test_files_that_cannot_be_read_are_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    toy([2, 3]).save(path)
    damage(path)
    with pytest.raises(MechsteerError, match=message) as caught:
        Activations.load(path)
    assert "\n" not in str(caught.value)


def test_a_site_map_takes_what_a_site_takes() -> None:
    found = SiteMap({Site("resid_post", 2): 1, Site("z", 0, head=1): 2})
    assert found["blocks.2.hook_resid_post"] == 1 and found["blocks.0.attn.hook_z[head=1]"] == 2
    assert ("resid_post", 2) in found and Site("z", 0) not in found and len(found) == 2
    with pytest.raises(MissingSiteError, match="was not recorded"):
        found["embed"]
