"""The options that commands share, declared once; what completes them; and how their values are read."""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mechsteer.data import data_path
from mechsteer.errors import MechsteerError

# Here and not in the rooms that they are of, which take seconds to import: help and completion show them.
PREFIX = "Talk only about cats."
CHAPTERS = ("behaviour", "entry", "travel", "vector", "strength", "features", "words", "together")
DTYPES = ("float32", "float64", "bfloat16", "float16")
EXECUTORS = ("local", "ray")
STATUS = {
    0: "done",
    1: "a check fell short",
    2: "a mistake in what was asked",
    130: "stopped with Ctrl-C",
}
"""Of all commands; some say more exactly what 1 and 2 mean."""


def epilog(*examples: str, after: str = "", **meanings: str) -> str:
    """The foot of a command's help: its examples, and what its exit status means.

    Args:
        examples: command lines.
        after: a sentence that stands before the exit statuses.
        meanings: of a status that is not as in `STATUS`: `s1="a chapter has no findings"`; one that does not occur has
            an empty text.
    """
    statuses = {status: meanings.get(f"s{status}", text) for status, text in STATUS.items()}
    told = ", ".join(f"{status} {text}" for status, text in statuses.items() if text)
    lines = [f"  {example}" for example in examples]
    return "\n\n".join(["[bold]Examples[/]", *lines, f"{after} Exit status: {told}.".strip()])


# ---- completion ----


def _completing(values: Callable[[], Iterable[str]], *, several: bool = False) -> Callable[[str], list[str]]:
    """Completes one of some values, or the last of several between commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",") if several else ("", "", incomplete)
        taken = before.split(",")
        return [f"{before}{comma}{value}" for value in values() if value.startswith(begun) and value not in taken]

    return complete


def shipped_models() -> list[str]:
    """Names of the models that ship with mechsteer."""
    return sorted(path.parent.name for path in data_path("models").glob("*/config.json"))


def cached_models() -> dict[str, Path]:
    """Snapshots of models in the local Hugging Face cache, by the name on the hub."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    found: dict[str, Path] = {}
    for config in sorted(cache.glob("models--*/snapshots/*/config.json")):
        name = config.parents[2].name.removeprefix("models--").replace("--", "/")
        found[name] = config.parent  # of several snapshots any one tells the shape
    return found


def _models() -> list[str]:
    here = [str(path.parent) for path in (*Path().glob("*/config.json"), *Path().glob("*/*/config.json"))]
    return [*shipped_models(), *cached_models(), *sorted(here)]


def _kinds() -> list[str]:
    from mechsteer.site import KINDS

    return list(KINDS)


def concept_names() -> list[str]:
    """The concepts whose texts ship with mechsteer."""
    held = json.loads(data_path("concepts", "pocket.json").read_text(encoding="utf-8"))
    return [each["name"] for each in held["concepts"]]


def topic_names() -> list[str]:
    """The topics that the pocket language's labeller knows."""
    from mechsteer.pocket.lexicon import TOPICS

    return list(TOPICS)


def _prefixes() -> list[str]:
    return [f"Talk only about {topic}." for topic in topic_names()]


complete_models = _completing(_models)
complete_kinds = _completing(_kinds, several=True)
complete_kind = _completing(_kinds)
complete_chapters = _completing(lambda: CHAPTERS, several=True)
complete_concepts = _completing(concept_names)
complete_topics = _completing(topic_names)
complete_prefixes = _completing(_prefixes)
complete_dims = _completing(lambda: ("layer", "head", "pos", "dest", "src"), several=True)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completes one of these."""
    return _completing(lambda: values)


# ---- options ----

Text = Annotated[
    str | None,
    typer.Argument(metavar="PREFIX", help=f'The instruction. Default: "{PREFIX}"', autocompletion=complete_prefixes),
]
Words = Annotated[
    str, typer.Option(help='Words that show the behaviour, such as "cat,cats", for prefixes of no known topic.')
]
Out = Annotated[Path, typer.Option(help="The folder for what comes out: new, empty, or of the same command.")]
Device = Annotated[
    str | None,
    typer.Option(help='"cpu", "cuda", ... Default: CUDA where there is one.', autocompletion=one_of("cpu", "cuda")),
]
Dtype = Annotated[str, typer.Option(help='Of the weights: "float32", "bfloat16", ...', autocompletion=one_of(*DTYPES))]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the completions.")]
Chapters = Annotated[
    str | None,
    typer.Option(help=f"Some of {', '.join(CHAPTERS)}. Default: all.", autocompletion=complete_chapters),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing on the way.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on standard output.")]


@dataclass(frozen=True)
class Question:
    """The options of every command about a prefix, besides its argument."""

    prefix: Annotated[
        str | None,
        typer.Option(help="The same as PREFIX, or a file that holds it.", autocompletion=complete_prefixes),
    ] = None
    requests: Annotated[
        Path | None, typer.Option(help="A .txt file with one request a line, or a .jsonl file. Default: shipped ones.")
    ] = None
    max_new_tokens: MaxNewTokens = 40


@dataclass(frozen=True)
class Running:
    """The options of every command that runs a model."""

    model: Annotated[
        str, typer.Option(help='"pocket", "pocket-1l", a hub name, or a folder.', autocompletion=complete_models)
    ] = "pocket"
    device: Device = None
    dtype: Dtype = "float32"
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0
    executor: Annotated[
        str,
        typer.Option(
            help='Where the work is done: "local", this process; or "ray", workers on the cluster of the variable '
            "RAY_ADDRESS or, without one, on this machine (pip install 'mechsteer\\[ray]').",
            autocompletion=one_of(*EXECUTORS),
        ),
    ] = "local"
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of --executor ray. Default: as many as the cluster has room for.")
    ] = None
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="Of each worker, such as 0.5. Default: as many as the model is on."),
    ] = None
    quiet: Quiet = False
    json: Json = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, work is done where `executor` says.

        Raises:
            MechsteerError: there is no such executor, or `workers` or `gpus` are not for it.
        """
        choice(self.executor, EXECUTORS, "--executor")
        if self.executor == "local":
            for name in ("workers", "gpus"):
                if getattr(self, name) is not None:
                    raise MechsteerError(f"--{name} is for --executor ray: leave it out, or add that")
            yield
            return
        from mechsteer.cli import terminal
        from mechsteer.executors import RayExecutor, using

        executor = RayExecutor(workers=self.workers, gpus=self.gpus)
        try:
            with terminal.status("joining the Ray cluster", quiet=self.quiet):
                executor.connect()
            with terminal.logged("mechsteer.executors", quiet=self.quiet), using(executor):
                yield
        finally:
            executor.close()

    @property
    def settings(self) -> dict[str, Any]:
        """Those that settings have too, by name."""
        return {name: getattr(self, name) for name in ("model", "device", "dtype", "seed")}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: each parameter that is a dataclass of options becomes one option for each field."""
    own = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: each.annotation for name, each in own.items() if is_dataclass(each.annotation)}
    parameters: list[inspect.Parameter] = []
    for name, each in own.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            parameters += [
                each.replace(name=part.name, default=part.default, annotation=hints[part.name])
                for part in fields(groups[name])
            ]
        else:
            parameters.append(each)

    def call(**given: Any) -> None:
        with ExitStack() as inside:
            for name, group in groups.items():
                given[name] = group(**{part.name: given.pop(part.name) for part in fields(group)})
                if isinstance(given[name], Running):
                    inside.enter_context(given[name].computing())
            command(**given)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return call


# ---- reading values ----


def names(listed: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def prefix_of(text: str | None, prefix: str | None) -> str:
    """The prefix of a command that takes it as an argument and as an option.

    Raises:
        MechsteerError: it is given twice, or is the name of a file that is not there or holds no text.
    """
    if text is not None and prefix is not None:
        raise MechsteerError(f"the prefix is given twice, as {text!r} and as --prefix {prefix!r}: give one of them")
    return text if text is not None else text_or_file(PREFIX if prefix is None else prefix, "--prefix", "the prefix")


def text_or_file(value: str, option: str, what: str) -> str:
    """The text of a file of this name, or the value itself.

    Raises:
        MechsteerError: the file cannot be read as text, or there is none where only a file can be meant.
    """
    path = Path(value)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, ValueError) as error:  # also a text too long for a file's name, and a file that is no UTF-8
        if len(value) < 256:
            raise MechsteerError(f"{option} {value}: this file cannot be read as text ({error})") from error
    if path.suffix in (".txt", ".md") and not any(char.isspace() for char in value):
        raise MechsteerError(f"{option} {value} names no file: give a file that exists, or {what} itself")
    return value


def lines_of(path: Path, option: str) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        MechsteerError: it cannot be read as text, or every line is empty.
    """
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise MechsteerError(f"{option} {path} cannot be read ({reason}): give a file with one text a line") from error
    kept = [line for line in lines if line.strip()]
    if not kept:
        raise MechsteerError(f"{option} {path} is empty: give a file with one text a line")
    return kept


def choice(value: str, allowed: Iterable[str], option: str) -> str:
    """The value, if it is one of those allowed.

    Raises:
        MechsteerError: it is not.
    """
    every = list(allowed)
    if value not in every:
        raise MechsteerError(f"{option} {value!r} is none of {', '.join(every)}")
    return value


def model_folder(name: str) -> Path:
    """The folder of a shipped model's name, or the folder itself.

    Raises:
        MechsteerError: it is neither.
    """
    if name in shipped_models():
        return data_path("models", name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise MechsteerError(f'{name} is neither "pocket", "pocket-1l" nor a folder with a config.json')
    return folder


def sha256(path: Path) -> str:
    """Of a file's bytes: what tells it from another of the same name.

    Raises:
        MechsteerError: it cannot be read.
    """
    import hashlib

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MechsteerError(f"{path} cannot be read ({error.strerror}): give a file that exists") from error


def plain(value: Any) -> Any:
    """A value as JSON has it: what is not finite becomes null, numpy's numbers plain ones, paths text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return str(value) if isinstance(value, Path) else value
