"""Curves over alpha of multiple-choice accuracy."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives import TeacherForcedCE, TokenProb
from mechsteer.prompts import Prompts
from mechsteer.rendering import encode, mark_completions
from mechsteer.result import Result, provenance
from mechsteer.rows import At
from mechsteer.strength.completions import steered_samples
from mechsteer.strength.curves import Alphas, Directions, contexts, named_directions, steered
from mechsteer.strength.recipes import alpha_grid
from mechsteer.strength.vectors import labels_of
from mechsteer.sweeps import sweep

Options = Sequence[str] | Sequence[Sequence[str]]
"""Answers to choose from, for all prompts or for each."""

_DIMS = ("direction", "alpha", "prompt")
# Tokens in which a written answer has to name its letter.
_WRITTEN = 8


def choice_curves(
    model: Model,
    prompts: PromptsLike,
    directions: Directions,
    alphas: Alphas,
    options: Options,
    answers: Sequence[int],
    *,
    at: At = "all",
    recipe: str = "default",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Which of several answers a model prefers, against the strength of steering.

        log p(option | prompt, alpha) = sum_t log p_alpha(y_t | prompt, y_1 .. y_(t-1))

    The model chooses the option of the highest log-probability; where options are of unlike lengths, the highest one a
    token may be the better measure (Gao et al. 2021, "Multiple Choice Normalization in LM Evaluation"), so both are
    given. Multiple choice is how figure A.6 of "Towards Understanding Steering Strength" measures what steering costs.

    Args:
        model: to steer.
        prompts: the questions, without completions; `lettered_prompt` makes one with lettered options.
        directions: one, or several by name.
        alphas: strengths, also negative ones; 0 is put in where it is missing. Units: lengths of the direction.
        options: texts that go on behind each prompt as they are (mind the leading blank): one list for all prompts, or
            one for each.
        answers: index of the right option of each prompt.
        at: which tokens are steered: "all", those of the options too; or as for `Add`.
        recipe: "published" lets the model write instead: greedily, up to 8 tokens, of which the first capital letter
            that stands alone and names an option counts, and an answer without one counts as "A", as in the authors'
            code. At large strengths, where nothing can be read, accuracy is then the share of questions whose answer is
            A. The options are only counted.
        out: a folder where a stopped measurement goes on, see `sweep`.
        progress: show a bar where it takes long.

    Returns:
        `accuracy` (0 or 1) and `chosen` (an index) [direction, alpha, prompt], the same `_per_token`, and `log_prob`
        [direction, alpha, option, prompt] in nats (NaN where a prompt has fewer options), with the coordinates `answer`
        and `n_tokens`. With recipe="published" `accuracy` and `chosen`, with `parsed` and `completion`.

    Raises:
        MechsteerError: options or answers do not fit the prompts, or as in `sweep`.
    """
    began = time.perf_counter()
    named, grid = named_directions(directions), alpha_grid(alphas)
    given = contexts(model, prompts, recipe, max_tokens=model.n_ctx)
    each = _options(options, answers, len(given))
    if recipe == "published":
        if out is not None:
            raise MechsteerError('out= keeps sweeps, and recipe="published" makes none. Leave out= out.')
        data, engine = _written(model, given, named, grid, [len(texts) for texts in each], at, progress), {}
    else:
        log_prob, counts, engine = _log_probs(model, given, named, grid, each, at, out, progress)
        chosen = {"": _likeliest(log_prob), "_per_token": _likeliest(log_prob / counts)}
        data = xr.Dataset(
            {
                **{f"chosen{name}": (_DIMS, values) for name, values in chosen.items()},
                "log_prob": (("direction", "alpha", "option", "prompt"), log_prob, {"units": "nats"}),
            },
            coords={"option": np.arange(log_prob.shape[2]), "n_tokens": (("option", "prompt"), counts)},
        )
    for name in [str(name) for name in data if str(name).startswith("chosen")]:
        right = (data[name].values == np.array(answers)).astype(np.float64)
        attrs = {"long_name": "share of right answers", "units": "1"}
        data[name.replace("chosen", "accuracy")] = xr.Variable(_DIMS, right, attrs)
    coords: dict[str, Any] = {
        "direction": list(named),
        "alpha": ("alpha", grid, {"long_name": "strength", "units": "lengths of the direction"}),
        "prompt": list(given.labels) if given.labels else np.arange(len(given)),
        "answer": ("prompt", list(answers)),
        **labels_of(list(named.values())),
    }
    data = data.assign_coords(coords)
    about = {"recipe": recipe, "at": list(at) if isinstance(at, tuple) else at, **engine}
    return Result(data, provenance=provenance(model=model.id, seconds=time.perf_counter() - began, **about))


def lettered_prompt(
    question: str, options: Sequence[str], *, examples: Sequence[tuple[str, Sequence[str], int]] = ()
) -> str:
    """A question with lettered options, as MMLU has them (Hendrycks et al. 2021), ending where the letter is to follow.

    The options of such a prompt are " A", " B", and so on.

    Args:
        question: the text of the question.
        options: at most 26.
        examples: answered questions that go before, each with its options and the index of the right one.

    Raises:
        MechsteerError: there are no options or too many, or an example's answer is none of them.
    """
    parts = []
    for text, each, answer in [*examples, (question, options, None)]:
        if not 1 <= len(each) <= len(ascii_uppercase) or (answer is not None and not 0 <= answer < len(each)):
            raise MechsteerError(
                f"lettered_prompt got {len(each)} options{'' if answer is None else f' and the answer {answer}'}. "
                "Pass from 1 to 26, and an answer that is an index of one."
            )
        lines = [text, *(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, each, strict=False))]
        parts.append("\n".join([*lines, "Answer:" if answer is None else f"Answer: {ascii_uppercase[answer]}"]))
    return "\n\n".join(parts)


def _options(options: Options, answers: Sequence[int], n: int) -> list[list[str]]:
    """The options of each prompt."""
    shared = all(isinstance(option, str) for option in options)
    each = [list(options)] * n if shared else [list(texts) for texts in options]
    if isinstance(options, str) or len(each) != n or len(answers) != n or not all(each):
        raise MechsteerError(
            f"choice_curves got {'a string' if isinstance(options, str) else f'options for {len(each)}'} and answers "
            f"for {len(answers)} of {n} prompts. Pass one list of options for all or for each, and one answer for each."
        )
    for row, (texts, answer) in enumerate(zip(each, answers, strict=True)):
        if not 0 <= answer < len(texts):
            raise MechsteerError(f"The answer {answer} of prompt {row} is none of its {len(texts)} options (from 0).")
    return each  # type: ignore[return-value]


def _log_probs(
    model: Model,
    prompts: Prompts,
    directions: Mapping[str, Direction],
    alphas: Sequence[float],
    options: Sequence[Sequence[str]],
    at: At,
    out: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Log-probability of each option [direction, alpha, option, prompt], and its number of tokens."""
    owner = [(row, place) for row, texts in enumerate(options) for place in range(len(texts))]
    written = [text for texts in options for text in texts]
    ids = [row.ids for row in encode(mark_completions(written), model.tokenizer, what="option")]
    if not all(ids):
        raise MechsteerError("An option is empty. Give each at least one token.")
    most = max(len(texts) for texts in options)
    shape = (len(directions), len(alphas), most, len(prompts))
    values, counts = np.full(shape, np.nan), np.ones(shape[2:], dtype=np.int64)
    where = steered(at)
    grid: dict[str, Any] = {
        "axes": {"direction": list(directions), "alpha": alphas},
        "build": lambda direction, alpha: Add(directions[direction], alpha, at=where),
        "out": out,
        "progress": progress,
    }
    if all(len(each) == 1 for each in ids):
        # One pass over the prompt scores them all. A prompt with fewer options gets its first once more, unread.
        table = torch.tensor([[0] * most] * len(prompts))
        for (row, place), (token,) in zip(owner, ids, strict=True):
            table[row, place:] = token
        measures = {str(place): TokenProb(table[:, place], log=True) for place in range(most)}
        swept = sweep(model, prompts, measure=measures, **grid)
        for row, place in owner:
            values[:, :, place, row] = swept[str(place)].values[:, :, row]
    else:
        whole = prompts[[row for row, _ in owner]].with_completions(ids)
        ce = TeacherForcedCE(first=0)
        swept = sweep(model, whole, measure=ce, **grid)
        for index, (row, place) in enumerate(owner):
            counts[place, row] = len(ids[index])
            values[:, :, place, row] = -len(ids[index]) * swept[ce.name].values[:, :, index].astype(np.float64)
    return values, counts, {"engine": swept.provenance["options"]["engine"]}


def _likeliest(log_prob: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(log_prob), -np.inf, log_prob).argmax(2)


def _written(
    model: Model,
    prompts: Prompts,
    directions: Mapping[str, Direction],
    alphas: Sequence[float],
    counts: Sequence[int],
    at: At,
    progress: bool,
) -> xr.Dataset:
    """What the model writes, and the letter in it."""
    cells = [(d, a, p) for d in range(len(directions)) for a in range(len(alphas)) for p in range(len(prompts))]
    texts = steered_samples(
        model, prompts, directions, alphas, cells, samples=1, max_new_tokens=_WRITTEN, temperature=0.0, top_k=None,
        top_p=None, seed=0, at=at, batch_size=128, progress=progress,
    )  # fmt: skip
    found = [
        re.search(rf"\b[{ascii_uppercase[: counts[prompt]]}]\b", text)
        for (_, _, prompt), (text,) in zip(cells, texts, strict=True)
    ]
    shape = (len(directions), len(alphas), len(prompts))
    chosen = [0 if match is None else ascii_uppercase.index(match[0]) for match in found]
    arrays: dict[str, Any] = {
        "chosen": np.array(chosen).reshape(shape),
        "parsed": np.array([match is not None for match in found]).reshape(shape),
        "completion": np.array([text for (text,) in texts], dtype=object).reshape(shape),
    }
    return xr.Dataset({name: (_DIMS, values) for name, values in arrays.items()})
