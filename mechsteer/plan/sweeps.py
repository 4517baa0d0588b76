"""What a sweep will take."""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from mechsteer.costs import ROWS
from mechsteer.errors import MechsteerError
from mechsteer.plan.devices import Device, device
from mechsteer.plan.estimate import Plan, estimate, told
from mechsteer.plan.pieces import Cells, Prompts, grid, swept
from mechsteer.plan.shape import Shape

if TYPE_CHECKING:
    from mechsteer.model import Model

    Planned = Shape | Model | str | PathLike[str] | Mapping[str, Any]
else:
    # Naming the class here would import torch.
    Planned = Any


def plan_sweep(
    model: Planned,
    *,
    axes: Mapping[str, int | Iterable[int]],
    prompts: int = 1,
    positions: int = 32,
    kind: str = "resid_pre",
    layer: int | None = None,
    at: int | str = "all",
    completion: int = 0,
    device: str | Device = "h100",
    workers: int = 1,
    dtype: str | None = None,
    tf32: bool = False,
    rows: int | None = None,
) -> Plan:
    """What `mechsteer.sweep` will take over a grid: operations, bytes, memory and time, without a model.

        ms.plan_sweep("pocket", axes={"layer": 6, "pos": 16}, prompts=20, positions=16, device="l4")    # a patching map
        ms.plan_sweep("google/gemma-2-9b-it", axes={"layer": 42, "alpha": 41}, kind="resid_post", prompts=200,
                      positions=48, completion=40, device="h100", dtype="bfloat16", workers=8)

    Batches are those that the engine makes: each cell from the layer and position on that it touches first, clean keys
    and values shared, and only tokens that are read unembedded; see `docs/cost.md`.

    Args:
        model: as for `Shape.of`: a name, a folder, numbers, or a Model.
        axes: sizes of the grid, or values. "layer" and "pos" mean those of the site; others, such as "head" and
            "alpha", how many cells there are at each.
        prompts: how many, all of one length.
        positions: tokens of each, without completions.
        kind: of the site, as in `mechsteer.Site`.
        layer: of the site where no axis says; None for the middle one. For "embed" there is none.
        at: first position touched where no axis says: "all" for the first, "last" for the last before completions, or a
            position.
        completion: tokens of each prompt's completion, where that is scored; 0 where the last token's logits are.
        device: a name of `mechsteer.plan.DEVICES`, "here" to measure this machine, or a Device.
        workers: devices that share the batches; see `Plan.seconds`.
        dtype: of the weights; None for what the config says.
        tf32: whether products of float32 are those of TF32.
        rows: of a batch, as for `sweep`.

    Raises:
        MechsteerError: the model has no such layer or position, a number is below 1, or something has an unknown name.
    """
    shape = Shape.of(model, dtype=dtype)
    machine = _device(device, shape, tf32)
    check_numbers(prompts=prompts, positions=positions, workers=workers, **{"rows": rows} if rows is not None else {})
    if completion < 0:
        raise MechsteerError(f"completion={completion} is no number of tokens. Pass 0 or more.")
    whole = Prompts.of(prompts, positions, completion)
    if whole.length > shape.context:
        raise MechsteerError(
            f"A prompt has {whole.length} tokens, and the context is {shape.context}. Plan for shorter ones."
        )
    sizes = {name: _values(name, values) for name, values in axes.items()}
    groups = _groups(shape, sizes, kind, layer, at, positions)
    counts = {name: len(values) for name, values in sizes.items()}
    work = swept(shape, groups, whole, machine, rows=rows or shared_rows(machine, workers))
    what = f"sweep of {told(counts) or '1 cell'}, {kind}, {prompts} prompts of {whole.length} tokens"
    return estimate(what, [work], shape, machine, workers, assumptions(machine, shape, workers))


def shared_rows(machine: Device, workers: int) -> int | None:
    """Rows of the batches that workers share, which are all of one size; None for one worker alone."""
    return ROWS[machine.kind] if workers > 1 else None


def assumptions(machine: Device, shape: Shape, workers: int) -> list[str]:
    """What a plan rests on, in sentences."""
    if machine.measured:
        notes = [f"Rates, bandwidth and overheads of {machine.name} were measured just now."]
    else:
        notes = [
            f"{machine.name}: published peaks, of which products are assumed to reach {100 * machine.matmul_share:.0f} "
            f"%, attention {100 * machine.attention_share:.0f} % and memory {100 * machine.bandwidth_share:.0f} %."
        ]
    notes.append("Loading the model is not included. Memory holds the weights twice: the engine keeps its own copies.")
    if workers > 1:
        notes.append("Workers share the batches of sweeps; every other stage takes as long as on one.")
    if shape.dtype in ("bfloat16", "float16") and machine.kind == "cpu":
        notes.append(f"Many CPUs compute in {shape.dtype} slowly.")
    return notes


def check_numbers(**values: int | None) -> None:
    """Raise `MechsteerError` unless each is a whole number from 1."""
    for name, value in values.items():
        if not (isinstance(value, int) and value >= 1):
            raise MechsteerError(f"{name}={value!r} is none. Pass a whole number of 1 or more.")


def _device(name: str | Device, shape: Shape, tf32: bool) -> Device:
    found = device(name, dtype=shape.dtype, tf32=tf32)
    found.rate(shape.dtype)
    return found


def _values(name: str, values: int | Iterable[int]) -> list[Any]:
    found = list(range(values)) if isinstance(values, int) else list(values)
    if not found:
        raise MechsteerError(f"axes: {name!r} has no values. Give at least one.")
    return found


def _groups(
    shape: Shape, axes: Mapping[str, list[Any]], kind: str, layer: int | None, at: int | str, positions: int
) -> list[Cells]:
    from mechsteer.site import KINDS

    if kind not in KINDS:
        raise MechsteerError(f"kind={kind!r} is no kind of site. Pass one of {', '.join(KINDS)}.")
    layers = axes.get("layer", [shape.layers // 2 if layer is None else layer])
    starts = axes.get("pos")
    if starts is None:
        if isinstance(at, str) and at not in ("all", "last"):
            raise MechsteerError(f"at={at!r} is none of 'all', 'last' and positions. Pass one of these.")
        starts = [{"all": 0, "last": positions - 1}.get(at, 0) if isinstance(at, str) else at]
    for name, values, most in (("layer", layers, shape.layers), ("pos", starts, positions)):
        wrong = next((each for each in values if not (isinstance(each, int) and 0 <= each < most)), None)
        if wrong is not None:
            raise MechsteerError(f"{name} {wrong!r} is none of 0 to {most - 1}. Pass those that there are.")
    sizes = {name: len(values) for name, values in axes.items()}
    if "{layer}" not in KINDS[kind].hook:
        many = 1
        for name, n in sizes.items():
            many *= 1 if name == "pos" else n
        return [Cells(-1, tuple((start, many) for start in starts))]
    return grid(sizes, layers, kind, starts)
