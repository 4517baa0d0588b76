"""`mechsteer plan`: what a sweep, a search or a study will take, before it is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mechsteer.cli import options, terminal
from mechsteer.errors import MechsteerError

if TYPE_CHECKING:
    from mechsteer.plan import Plan

# Here and not in `mechsteer.plan`, so that the shell completes without it.
DEVICES = ("here", "a100-40", "a100-80", "h100", "h200", "l4", "l40s", "rtx4090", "rtx3090")

app = typer.Typer(
    help="What a sweep, a search for a prefix, or a study will take: operations, bytes, memory, wall time, GPU-hours. "
    "No weights are read.",
    epilog=options.epilog(
        "mechsteer plan sweep pocket",
        "mechsteer plan sweep google/gemma-2-9b-it --axes layer=42,pos=64 --prompts 200 --device h100 --dtype bfloat16",
        "mechsteer plan prefix pocket --tokens 8 --evaluations 2000 --device l4",
        "mechsteer plan study pocket --device here",
        s1="",
    ),
    no_args_is_help=True,
)

Planned = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help='"pocket", a folder with config.json, hub name, or numbers: "layers=12,d_model=768,heads=12,vocab=50257". '
        'Default: "pocket"',
        autocompletion=options.complete_models,
    ),
]
Completion = Annotated[int, typer.Option(min=0, help="Tokens of each completion, which are scored; 0 for none.")]
Tokens = Annotated[int, typer.Option(min=1, help="Of the prefix.")]


@dataclass(frozen=True)
class Running:
    """The options of every plan: those of `options.Running` that matter here, and machines that may not be here."""

    model: Annotated[str | None, typer.Option(help="The same as MODEL.", autocompletion=options.complete_models)] = None
    device: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(DEVICES[1:])}; or here, which measures this machine.",
            autocompletion=options.one_of(*DEVICES),
        ),
    ] = "h100"
    workers: Annotated[int, typer.Option(min=1, help="Devices that share the batches of sweeps.")] = 1
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights. Default: what the config says.", autocompletion=options.one_of(*options.DTYPES)
        ),
    ] = None
    tf32: Annotated[bool, typer.Option("--tf32", help="Products of float32 are those of TF32.")] = False
    json: options.Json = False

    @property
    def machines(self) -> dict[str, Any]:
        """What every plan takes of them, by name."""
        return {name: getattr(self, name) for name in ("device", "workers", "tf32")}

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Around what makes the plan: measuring this machine takes some seconds."""
        with terminal.for_machines(self.json), terminal.status("measuring this machine", quiet=self.device != "here"):
            yield


@app.command(
    epilog=options.epilog(
        "mechsteer plan sweep pocket --device here",
        "mechsteer plan sweep ./my-model --axes layer=12,head=12 --kind z --prompts 100 --positions 40",
        "mechsteer plan sweep google/gemma-2-9b-it --axes layer=42,alpha=41 --kind resid_post --prompts 500 "
        "--completion 40 --device h100 --dtype bfloat16 --workers 8 --json",
        s1="",
    )
)
@options.expanded
def sweep(
    text: Planned = None,
    axes: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the grid: layer, pos, and others such as head or alpha. Default: every layer and position."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many, all of one length.")] = 20,
    positions: Annotated[int, typer.Option(min=1, help="Tokens of each, without completions.")] = 16,
    kind: Annotated[str, typer.Option(help="Of the site.", autocompletion=options.complete_kind)] = "resid_pre",
    layer: Annotated[int | None, typer.Option(min=0, help="Of the site, where no axis says. Default: middle.")] = None,
    at: Annotated[
        str, typer.Option(help='First token touched, where no axis says: "all", "last", or a number.')
    ] = "all",
    completion: Completion = 0,
    *,
    running: Running,
) -> None:
    """Plan a sweep over layers, positions, heads, strengths or anything else."""
    model = _model_of(text, running)
    with running.planning():
        from mechsteer.plan import Shape, plan_sweep

        shape = Shape.of(model, dtype=running.dtype)
        sizes = {"layer": shape.layers, "pos": positions} if axes is None else _axes(axes)
        plan = plan_sweep(
            shape, axes=sizes, prompts=prompts, positions=positions, kind=kind, layer=layer,
            at=int(at) if at.lstrip("-").isdigit() else at, completion=completion, **running.machines,
        )  # fmt: skip
    _say(plan, running, "sweep")


@app.command(
    epilog=options.epilog(
        "mechsteer plan prefix pocket --device here",
        "mechsteer plan prefix google/gemma-2-2b-it --tokens 8 --evaluations 5000 --prompts 16 --device a100-80",
        "mechsteer plan prefix ./my-model --steps 0 --beam 0 --method gcg --width 512 --json",
        s1="",
    )
)
@options.expanded
def prefix(
    text: Planned = None,
    tokens: Tokens = 6,
    evaluations: Annotated[int, typer.Option(min=1, help="Prefixes whose exact loss is computed.")] = 1000,
    steps: Annotated[int, typer.Option(min=0, help="Of the soft prefix; 0 for none.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, help="Soft prefixes side by side.")] = 3,
    beam: Annotated[int, typer.Option(min=0, help="Width of the beam; 0 for none.")] = 4,
    method: Annotated[
        str, typer.Option(help="mixed, gcg or hotflip.", autocompletion=options.one_of("mixed", "gcg", "hotflip"))
    ] = "mixed",
    width: Annotated[int, typer.Option(min=1, help="Candidates a step.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="That are searched on.")] = 18,
    positions: Annotated[int, typer.Option(min=2, help="Tokens of each, without prefix and completion.")] = 16,
    completion: Completion = 40,
    *,
    running: Running,
) -> None:
    """Plan a search for a prefix: soft prefix, beam, and candidates."""
    model = _model_of(text, running)
    with running.planning():
        from mechsteer.plan import plan_prefix

        plan = plan_prefix(
            model, tokens=tokens, evaluations=evaluations, steps=steps, restarts=restarts, beam=beam, method=method,
            width=width, prompts=prompts, positions=positions, completion=completion, dtype=running.dtype,
            **running.machines,
        )  # fmt: skip
    _say(plan, running, "prefix")


@app.command(
    epilog=options.epilog(
        "mechsteer plan study pocket --device here",
        "mechsteer plan study google/gemma-2-9b-it --requests 36 --positions 24 --device h100 --dtype bfloat16",
        "mechsteer plan study ./my-model --chapters behaviour,vector --device l4 --json",
        s1="",
    )
)
@options.expanded
def study(
    text: Planned = None,
    requests: Annotated[
        str, typer.Option(help="How many, half of them to search on; or the file that a study will read them from.")
    ] = "36",
    positions: Annotated[int, typer.Option(min=1, help="Tokens of each, with the chat template's.")] = 16,
    tokens: Tokens = 6,
    max_new_tokens: options.MaxNewTokens = 40,
    chapters: options.Chapters = None,
    *,
    running: Running,
) -> None:
    """Plan a study, chapter by chapter."""
    model = _model_of(text, running)
    many = int(requests) if requests.isdecimal() else len(options.lines_of(Path(requests), "--requests"))
    with running.planning():
        from mechsteer.plan import plan_study

        plan = plan_study(
            model, requests=many, positions=positions, tokens=tokens, max_new_tokens=max_new_tokens,
            chapters=None if chapters is None else options.names(chapters), dtype=running.dtype, **running.machines,
        )  # fmt: skip
    _say(plan, running, "study")


def _model_of(text: str | None, running: Running) -> str:
    """The model of a plan, which is an argument and an option.

    Raises:
        MechsteerError: it is given twice.
    """
    if text is not None and running.model is not None:
        raise MechsteerError(
            f"the model is given twice, as {text!r} and as --model {running.model!r}: give one of them"
        )
    return text or running.model or "pocket"


def _axes(text: str) -> dict[str, int]:
    """Sizes such as "layer=26,pos=64".

    Raises:
        MechsteerError: a part is no name with a whole number from 1.
    """
    found: dict[str, int] = {}
    for part in options.names(text):
        name, _, number = (each.strip() for each in part.partition("="))
        if not name or not number.isdigit() or not int(number):
            raise MechsteerError(f"--axes: {part!r} is no size: give names with numbers, such as layer=26,pos=64")
        found[name] = int(number)
    return found


def _say(plan: "Plan", running: Running, command: str) -> None:
    if running.json:
        terminal.document({"command": f"plan {command}", **plan.as_json()})
        return
    from mechsteer.plan.estimate import quantity, size

    shape = plan.shape
    about = f"{shape.name or 'a model'}: {quantity(shape.parameters, '').strip()} parameters, {shape.dtype}"
    columns = ("stage", "operations", "bytes moved", "memory", "wall time", "")
    fits = "" if plan.fits else f" It does not fit: {plan.device.name} has {size(plan.device.memory)}."
    notes = list(plan.notes)
    if running.dtype is None and shape.dtype != "float32":
        notes.append(
            f"Planned in {shape.dtype}, the model's own type. Commands load float32 where --dtype says nothing."
        )
    hours = f"{plan.gpu_hours:.3g} {'GPU' if plan.device.kind == 'cuda' else 'CPU'}-hours"
    terminal.say(
        [
            Text(plan.work, "bold"),
            Text(about),
            terminal.table(columns, plan.rows(), numbers=columns[1:5], whole=("stage",)),
            Text(f"{hours} on {plan.workers} x {plan.device.name}.{fits}"),
            *(Text(note, "dim") for note in notes),
        ]
    )
