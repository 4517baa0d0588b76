"""Shapes of models from names, folders and numbers; and what plans, and `mechsteer plan`, refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from commands import run

import mechsteer as ms
from mechsteer.cli.plan import DEVICES as COMPLETED
from mechsteer.plan import DEVICES, device


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_a_folders_shape_is_that_of_the_loaded_model(architecture: str, zoo_folders: Any, zoo_models: Any) -> None:
    read, loaded = ms.Shape.of(zoo_folders[architecture]), ms.Shape.of(zoo_models(architecture))
    assert read.dims == loaded.dims and read.dtype == "float32" and read.context == zoo.N_CTX
    assert ms.Shape.of(zoo_folders[architecture] / "config.json").dims == read.dims


def test_numbers_fill_in_what_follows_from_them() -> None:
    shape = ms.Shape.of("layers=26,d_model=2304,heads=8,kv_heads=4,d_head=256,d_mlp=9216,vocab=256000,tied=true")
    assert (shape.kv_heads, shape.d_head, shape.gated, shape.tied) == (4, 256, True, True)
    assert 2.5e9 < shape.parameters < 2.7e9  # Gemma 2 2B has 2.61 billion
    plain = ms.Shape.of("layers=12,d_model=768,heads=12,vocab=50257,gated=false", dtype="float16")
    assert (plain.kv_heads, plain.d_head, plain.d_mlp, plain.itemsize) == (12, 64, 3072, 2)


def test_a_model_that_sees_has_the_shape_of_its_language_model() -> None:
    config = zoo.build_config("gemma3_vision").to_dict()
    assert ms.Shape.of(config).dims == ms.Shape.of(zoo.build_config("gemma3").to_dict()).dims


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=2,width=3", "'width=3' is no number of a shape"),
        ("layers=2,d_model=64", "The shape lacks heads, vocab"),
        ("layers=two", "layers='two' is no whole number"),
        ("layers=0,d_model=64,heads=4,vocab=9", "Shape got layers=0. Pass a whole number of 1 or more"),
        ("layers=1,d_model=64,heads=5,vocab=9", "d_model=64, which its 5 heads do not divide"),
        ("layers=1,d_model=64,heads=4,kv_heads=3,vocab=9", "heads=4 and kv_heads=3"),
        ("layers=1,d_model=64,heads=4,vocab=9,dtype=int8", "dtype='int8'"),
        ("nobody/has-this-model", "Connect to the network, pass a folder with a config.json, or numbers"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(ms.MechsteerError) as error:
        ms.Shape.of(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ms.MechsteerError, match="holds no config"):
        ms.Shape.of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ms.MechsteerError, match="is not readable JSON"):
        ms.Shape.of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(ms.MechsteerError, match="has 8 experts"):
        ms.Shape.of(tmp_path)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: ms.plan_sweep("pocket", axes={"layer": 7}), "layer 6 is none of 0 to 5"),
        (lambda: ms.plan_sweep("pocket", axes={"pos": [40]}, positions=8), "pos 40 is none of 0 to 7"),
        (lambda: ms.plan_sweep("pocket", axes={"alpha": []}), "'alpha' has no values"),
        (lambda: ms.plan_sweep("pocket", axes={}, kind="residual"), "kind='residual' is no kind of site"),
        (lambda: ms.plan_sweep("pocket", axes={}, at="first"), "at='first' is none of"),
        (lambda: ms.plan_sweep("pocket", axes={}, positions=300), "the context is 256"),
        (lambda: ms.plan_sweep("pocket", axes={}, prompts=0), "prompts=0 is none"),
        (lambda: ms.plan_sweep("pocket", axes={}, device="abacus"), "No device is called 'abacus'"),
        (lambda: ms.plan_prefix("pocket", method="dice"), "method='dice' does not exist"),
        (lambda: ms.plan_prefix("pocket", evaluations=20), "are used up by a beam of 4 x 8 over 6 slots"),
        (lambda: ms.plan_prefix("pocket", before=16), "before=16 is out of range"),
        (lambda: ms.plan_study("pocket", chapters=["weather"]), "'weather' is none of behaviour"),
        (lambda: ms.plan_study("pocket", requests=1), "requests=1 is too few"),
    ],
)
def test_what_cannot_be_planned_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(ms.MechsteerError) as error:
        plan()
    assert message in str(error.value)


def test_tf32_is_for_float32() -> None:
    plain, fast = (device("h100", tf32=tf32) for tf32 in (False, True))
    assert fast.rate("float32") > 5 * plain.rate("float32") and fast.rate("bfloat16") == plain.rate("bfloat16")
    with pytest.raises(ms.MechsteerError, match="is not known to compute in int8"):
        plain.rate("int8")


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["sweep", "pocket"], ["sweep"]),
        (["sweep", "pocket", "--axes", "layer=6,head=6", "--kind", "z", "--workers", "4"], ["sweep"]),
        (["prefix", "pocket", "--evaluations", "500"], ["soft prefix, 100 steps", "beam of 4 x 8"]),
        (["study", "pocket", "--chapters", "behaviour,vector"], ["completions", "behaviour", "vector"]),
        (["study", "--model", "pocket", "--chapters", "vector", "--tokens", "4"], ["completions", "vector"]),
    ],
)
def test_the_command_prints_a_plan(arguments: list[str], stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "plan", *arguments, "--device", "l4")
    assert said.status == 0 and all(stage in said.out for stage in stages) and "GPU-hours" in said.out
    found = run(capsys, "plan", *arguments, "--device", "l4", "--json").json
    assert found["command"] == f"plan {arguments[0]}" and found["device"] == "l4" and found["gpu_hours"] > 0
    assert [stage["name"] for stage in found["stages"]][: len(stages)] == stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "nowhere/model"], "is no folder, and its config is neither in the local"),
        (["sweep", "pocket", "--axes", "layer"], "--axes: 'layer' is no size"),
        (["sweep", "pocket", "--device", "abacus"], "No device is called 'abacus'"),
        (["prefix", "pocket", "--method", "dice"], "method='dice' does not exist"),
        (["sweep", "pocket", "--model", "gpt2"], "the model is given twice, as 'pocket' and as --model 'gpt2'"),
        (["study", "--requests", "none.txt"], "--requests none.txt cannot be read"),
        (["study", "pocket", "--chapters", "weather"], "'weather' is none of"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "plan", *arguments)
    assert said.status == 2 and message in " ".join(said.err.split()) and not said.out


def test_a_type_that_commands_would_not_load_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    numbers, note = "layers=2,d_model=64,heads=4,vocab=90,dtype=bfloat16", "Planned in bfloat16, the model's own type."
    assert note in " ".join(run(capsys, "plan", "sweep", numbers).out.split())
    for words in ([numbers, "--dtype", "bfloat16"], [numbers, "--dtype", "float32"], ["pocket"]):
        assert "Planned in" not in run(capsys, "plan", "sweep", *words).out


def test_requests_are_a_number_or_the_file_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Say something.\nTell a story.\n\nName a colour.\nSing.\n", encoding="utf-8")
    plans = [
        run(capsys, "plan", "study", "--chapters", "vector", "--requests", each, "--json").json["stages"]
        for each in ("4", str(file))
    ]
    assert plans[0] == plans[1]


def test_the_devices_that_the_shell_completes_are_those_that_there_are() -> None:
    assert ("here", *DEVICES) == COMPLETED
