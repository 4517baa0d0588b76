"""Curves over alpha of what steered models say: how many sampled completions show a concept."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy.special import ndtri

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.files import check_stamp, stamp
from mechsteer.generation import generate
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.progress import bar
from mechsteer.prompts import Prompts
from mechsteer.result import Result, provenance
from mechsteer.rows import At
from mechsteer.strength.curves import Alphas, Directions, contexts, named_directions, steered
from mechsteer.strength.recipes import alpha_grid
from mechsteer.strength.vectors import labels_of

Judge = Callable[[str], bool | float]
"""Whether a text shows the concept, or how likely it does; one with `many(texts)` gets all texts at once."""

Cell = tuple[int, int, int]  # indices of direction, alpha and prompt

_FILE, _FORMAT, _VERSION = "completions.jsonl", "steered completions", 1
_SAMPLING: dict[str, dict[str, Any]] = {
    "default": {"samples": 32, "max_new_tokens": 40, "temperature": 1.0, "top_k": None, "top_p": None},
    "published": {"samples": 12, "max_new_tokens": 100, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
}


def completion_curves(
    model: Model,
    prompts: PromptsLike,
    directions: Directions,
    alphas: Alphas,
    judge: Judge,
    *,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    at: At = "all",
    recipe: str = "default",
    level: float = 0.95,
    batch_size: int = 256,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Share of sampled completions that show a concept, against the strength of steering.

    "Towards Understanding Steering Strength", section 5 and figure 7: 32 completions of each prompt and strength, each
    of which a judge calls showing the concept or not. Directions, strengths and prompts share batches, and the samples
    of a prompt share its forward pass. Every (direction, alpha, prompt) has its own random streams, fixed by `seed`,
    the direction's name, alpha and the prompt's place, so that a part of a grid gives the numbers of the whole.

    Args:
        model: to steer.
        prompts: without completions.
        directions: one, or several by name.
        alphas: strengths, also negative ones; 0 is put in where it is missing. Units: lengths of the direction.
        judge: says of a text whether it shows the concept (or how likely), such as `mechsteer.judges` makes.
        samples: completions of each prompt at each strength; None takes 32 (published: 12).
        max_new_tokens: of each completion; None takes 40 (published: 100).
        temperature: of the draws, above 0; None takes 1 (published: 0.9).
        top_k: draw from the likeliest this many; None takes all (published: 50).
        top_p: draw from the fewest tokens with this probability; None takes all (published: 0.95).
        seed: of the draws.
        at: which tokens are steered: "all", every generated one too; or as for `Add`.
        recipe: "published" cuts prompts at 100 tokens and shows the judge all samples of a prompt as one text, as the
            authors' code does: `share` is then 0 or 1, whether any of the samples shows the concept, which is higher
            than the share of samples. The default judges each completion by itself, as the paper says.
        level: of the intervals.
        batch_size: completions generated side by side.
        out: a folder that keeps the completions. The same call goes on where it ended, also with another judge.
        progress: show a bar where it takes long.

    Returns:
        `share` [direction, alpha, prompt], with `share_low` and `share_high`, the ends of its Wilson interval (Wilson
        1927) over samples, which for probabilities instead of verdicts is too wide, never too narrow; `completion`, the
        texts, and `verdict` [direction, alpha, sample, prompt] (published: [direction, alpha, prompt]). The mean over
        prompts is `result.mean("prompt")`.

    Raises:
        MechsteerError: an argument does not fit, the judge gives no probability, or `out` holds other completions.
    """
    began = time.perf_counter()
    named, grid = named_directions(directions), alpha_grid(alphas)
    given = contexts(model, prompts, recipe)
    asked = {
        "samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p
    }  # fmt: skip
    options = {key: _SAMPLING[recipe][key] if value is None else value for key, value in asked.items()}
    if options["samples"] < 1 or not 0 < level < 1 or options["temperature"] == 0:
        raise MechsteerError(
            f"completion_curves got samples={options['samples']}, temperature={options['temperature']} and "
            f"level={level}. Pass at least 1 sample, a temperature above 0 and a level between 0 and 1."
        )
    cells = list(itertools.product(range(len(named)), range(len(grid)), range(len(given))))
    wanted = {"recipe": recipe, "seed": seed, "at": at, **options}
    texts = np.empty((len(named), len(grid), options["samples"], len(given)), dtype=object)
    with (
        _kept(out, lambda: _identity(model, given, named, grid, wanted)) as (done, keep),
        bar("completions", len(cells) * options["samples"], show=progress) as shown,
    ):
        for (direction, alpha, prompt), each in done.items():
            texts[direction, alpha, :, prompt] = each
        shown.advance(len(done) * options["samples"])
        left = [cell for cell in cells if cell not in done]
        # Several batches at a time, so that prompts of like lengths find one another.
        size = max(1, 4 * batch_size // options["samples"])
        for start in range(0, len(left), size):
            part = left[start : start + size]
            for cell, each in zip(
                part,
                steered_samples(
                    model, given, named, grid, part, at=at, seed=seed, batch_size=batch_size, progress=False, **options
                ),
                strict=True,
            ):
                texts[cell[0], cell[1], :, cell[2]] = each
                keep(cell, each)
            shown.advance(len(part) * options["samples"])
    dims = ("direction", "alpha", "sample", "prompt")
    if recipe == "published":
        together = ["\n".join(texts[d, a, :, p]) for d, a, p in cells]
        verdict = scores(judge, together).reshape(len(named), len(grid), len(given))
        share, n, verdict_dims = verdict, 1, ("direction", "alpha", "prompt")
    else:
        verdict = scores(judge, texts.ravel().tolist()).reshape(texts.shape)
        share, n, verdict_dims = verdict.mean(2), options["samples"], dims
    low, high = wilson_interval(share, n, level=level)
    attrs = {"long_name": "share of completions that show the concept", "units": "1"}
    data = xr.Dataset(
        {
            **{
                name: (("direction", "alpha", "prompt"), values, attrs)
                for name, values in (("share", share), ("share_low", low), ("share_high", high))
            },
            "verdict": (verdict_dims, verdict),
            "completion": (dims, texts),
        },
        coords={
            "direction": list(named),
            "alpha": ("alpha", grid, {"long_name": "strength", "units": "lengths of the direction"}),
            "prompt": list(given.labels) if given.labels else np.arange(len(given)),
            **labels_of(list(named.values())),
        },
    )
    name = getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)
    about = {**wanted, "at": _plain(at), "judge": name, "level": level}
    seconds = time.perf_counter() - began
    return Result(data, provenance=provenance(model=model.id, seconds=seconds, **about))


def steered_samples(
    model: Model,
    prompts: Prompts,
    directions: Mapping[str, Direction],
    alphas: Sequence[float],
    cells: Sequence[Cell],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float | int,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    at: At,
    batch_size: int,
    progress: bool,
) -> list[list[str]]:
    """Completions of each cell, which is a direction, a strength and a prompt by their indices, all in shared batches.

    Raises:
        MechsteerError: as `Model.generate` and `Add` do.
    """
    names = list(directions)
    strength = torch.tensor([alphas[alpha] for _, alpha, _ in cells], dtype=torch.float64)
    owner = torch.tensor([direction for direction, _, _ in cells])
    # Every row gets every direction, most of them with a strength of 0, which leaves it as it is.
    interventions = [
        Add(directions[names[index]], torch.where(owner == index, strength, 0.0), at=steered(at))
        for index in owner.unique().tolist()
    ]
    streams = [
        _stream(seed, names[direction], alphas[alpha], prompt, sample)
        for direction, alpha, prompt in cells
        for sample in range(samples)
    ]
    done = generate(
        model, prompts[[prompt for _, _, prompt in cells]], max_new_tokens=max_new_tokens, interventions=interventions,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_at_eos=True, batch_size=batch_size,
        progress=progress, samples=samples, streams=streams,
    )  # fmt: skip
    texts = done.completions
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def scores(judge: Judge, texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    """What a judge says of each text, as numbers from 0 to 1.

    Raises:
        MechsteerError: it says something else.
    """
    many = getattr(judge, "many", None)
    said = many(list(texts)) if many is not None else [judge(text) for text in texts]
    values = np.asarray(said, dtype=np.float64)
    if values.shape != (len(texts),) or not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values.shape if values.shape != (len(texts),) else values[~((values >= 0) & (values <= 1))][0]
        raise MechsteerError(
            f"The judge gave {wrong} for {len(texts)} texts. It gives True or False, or a probability, for each text."
        )
    return values


def wilson_interval(
    share: Float[np.ndarray, "*cell"], n: int, *, level: float = 0.95
) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """Interval of a probability from the share of `n` independent trials (Wilson 1927).

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)        z the normal quantile of the level

    Args:
        share: of trials that succeeded.
        n: number of trials behind each share.
        level: of the interval.

    Returns:
        Lower and upper end.
    """
    z = float(ndtri((1 + level) / 2))
    centre = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    ends = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    # Rounding must not leave [0, 1], nor the share.
    return np.clip(ends[0], 0, share), np.clip(ends[1], share, 1)


def _stream(seed: int, direction: str, alpha: float, prompt: int, sample: int) -> int:
    key = json.dumps([seed, direction, alpha, prompt, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2


def _plain(at: At) -> Any:
    return list(at) if isinstance(at, tuple) else at


def _identity(
    model: Model, prompts: Prompts, directions: Mapping[str, Direction], alphas: Sequence[float], wanted: dict[str, Any]
) -> dict[str, Any]:
    """What makes two sets of completions the same, for the folder that keeps them."""
    vectors = {
        name: f"{each.site} {hashlib.sha256(each.vector.detach().cpu().double().numpy().tobytes()).hexdigest()}"
        for name, each in directions.items()
    }
    about = {"model": model.id.hash, "prompts": prompts.hash, "directions": vectors, "alphas": list(alphas)}
    return json.loads(json.dumps({**about, **wanted, "at": _plain(wanted["at"])}))


@contextmanager
def _kept(
    out: str | os.PathLike[str] | None, identity: Callable[[], dict[str, Any]]
) -> Iterator[tuple[dict[Cell, list[str]], Callable[[Cell, list[str]], None]]]:
    """What a folder holds of these completions already, and how to add to it; a line of JSON for each cell."""
    if out is None:
        yield {}, lambda cell, texts: None
        return
    path, wanted = Path(out) / _FILE, identity()
    done: dict[Cell, list[str]] = {}
    if path.exists():
        # What a kill left of a last line does not count.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            parsed = [json.loads(line) for line in lines]
            head = check_stamp(parsed[0] if parsed else None, path, format=_FORMAT, version=_VERSION)
            done = {tuple(line["cell"]): line["texts"] for line in parsed[1:]}  # pyright: ignore
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise MechsteerError(f"{path} is damaged ({error}). Choose another folder, or remove it.") from error
        differing = [key for key, value in wanted.items() if head.get("identity", {}).get(key) != value]
        if differing:
            raise MechsteerError(
                f"{path} holds other completions ({', '.join(differing)} differ). Choose another folder for out=, or "
                "remove it."
            )
        whole = sum(len(line.encode()) + 1 for line in lines)
        with path.open("r+b") as file:
            file.truncate(whole)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({**stamp(_FORMAT, _VERSION), "identity": wanted})
        path.write_text(head + "\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def keep(cell: Cell, texts: list[str]) -> None:
            file.write(json.dumps({"cell": cell, "texts": texts}) + "\n")
            file.flush()

        yield done, keep
