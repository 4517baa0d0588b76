"""Curves over alpha of next-token probabilities: single tokens, and sets of tokens that stand for concepts."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechsteer.directions import Direction
from mechsteer.errors import MechsteerError
from mechsteer.interventions import Add
from mechsteer.model import Model, PromptsLike
from mechsteer.objectives.tokens import Tokens, TokenSet
from mechsteer.prompts import Prompts
from mechsteer.rendering import str_tokens
from mechsteer.result import Result
from mechsteer.rows import At
from mechsteer.strength.recipes import alpha_grid, check_recipe, published_prompts
from mechsteer.strength.tables import LikeliestTokens, SetProbabilities, Table
from mechsteer.strength.vectors import labels_of
from mechsteer.sweeps import sweep

Directions = Direction | Mapping[str, Direction]
Alphas = Iterable[float | int] | Tensor


def token_curves(
    model: Model,
    prompts: PromptsLike,
    directions: Directions,
    alphas: Alphas,
    *,
    tokens: Tokens | None = None,
    top: int = 8,
    at: At = "all",
    recipe: str = "default",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Next-token probabilities against the strength of steering.

        Delta p(z | c, alpha) = p_alpha(z | c) - p_0(z | c)

    Definition 3.1 of "Towards Understanding Steering Strength", with p_alpha the model's softmax (in fp32) at the last
    token of the context c under alpha * v; theorem 3.3 says that most of these curves are bumps.

    Args:
        model: to steer.
        prompts: the contexts.
        directions: one, or several by name, such as `concept_vectors` makes.
        alphas: strengths, also negative ones; 0 is put in where it is missing. Units: lengths of the direction.
        tokens: ids, or strings that are one token; None takes the `top` likeliest ones at either end of the grid, those
            of every direction and prompt.
        top: how many at either end; 8 in the paper's figures, 100 in its code.
        at: which tokens are steered: "all", "last", or as for `Add`.
        recipe: "published" tokenises texts as the authors' code does and cuts them at 100 tokens; see `RECIPES`.
        out: a folder where a stopped measurement goes on, see `sweep`.
        progress: show a bar where it takes long.

    Returns:
        `p` and `delta_p` [direction, alpha, token, prompt] with the coordinate `text` of each token id; where tokens
        were not given also `is_top_low` and `is_top_high` [direction, token, prompt], which say where each is among the
        likeliest.

    Raises:
        MechsteerError: an argument does not fit; see `Add`, `sweep` and `TokenSet`.
    """
    named, grid, given = named_directions(directions), alpha_grid(alphas), contexts(model, prompts, recipe)
    flags: dict[str, Any] = {}
    if tokens is None:
        ids, flags = _likeliest(model, given, named, grid, top, at, progress)
    else:
        found = TokenSet.of(tokens, tokenizer=model.tokenizer)
        if found.per_example:
            raise MechsteerError("tokens got one id for each prompt, and curves take one set. Pass a list of ids.")
        ids = found.ids[0].tolist()
    table = SetProbabilities.of_sets([[token] for token in ids], d_vocab=model.d_vocab)
    swept = strength_sweep(model, given, named, grid, table, len(ids), at=at, out=out, progress=progress)
    data = xr.Dataset(
        {"p": _stacked(swept, len(ids), "token"), **flags},
        coords={"token": ids, "text": ("token", _texts(model, ids))},
    )
    data["delta_p"] = data["p"] - data["p"].isel(alpha=grid.index(0.0))
    return _finished(data, swept, named, what="probability of the next token")


def concept_curves(
    model: Model,
    prompts: PromptsLike,
    directions: Directions,
    alphas: Alphas,
    token_sets: Mapping[str, Tokens],
    *,
    at: At = "all",
    recipe: str = "default",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Probability of concepts, as sets of next tokens, against the strength of steering.

        Delta p(C | c, alpha) = 1 / |C| sum_{z in C} Delta p(z | c, alpha)

    Definition 3.5 of "Towards Understanding Steering Strength"; theorem 3.6 says that it rises along a tanh for the
    concept that is steered to.

    Args:
        token_sets: the tokens of each concept by name, such as `{name: concept.token_ids(model)}`; each direction is
            measured on all of them.
        model, prompts, directions, alphas, at, recipe, out, progress: as in `token_curves`.

    Returns:
        `p`, the probability of the whole set, and `delta_p` as above [direction, alpha, token_set, prompt]; the
        coordinate `n_tokens` is |C|.

    Raises:
        MechsteerError: as in `token_curves`, or there are no sets.
    """
    named, grid, given = named_directions(directions), alpha_grid(alphas), contexts(model, prompts, recipe)
    sets = {name: TokenSet.of(each, tokenizer=model.tokenizer, what=name) for name, each in token_sets.items()}
    ids = [found.ids[0].tolist() for found in sets.values()]
    if not ids or any(found.per_example for found in sets.values()):
        raise MechsteerError("token_sets holds no set, or one id for each prompt. Pass lists of tokens by name.")
    table = SetProbabilities.of_sets(ids, d_vocab=model.d_vocab)
    swept = strength_sweep(model, given, named, grid, table, len(ids), at=at, out=out, progress=progress)
    counts = ("token_set", [len(each) for each in table.sets])
    data = xr.Dataset(
        {"p": _stacked(swept, len(ids), "token_set")}, coords={"token_set": list(sets), "n_tokens": counts}
    )
    data["delta_p"] = (data["p"] - data["p"].isel(alpha=grid.index(0.0))) / data["n_tokens"]
    return _finished(data, swept, named, what="probability of the concept's tokens")


def over_seeds(result: Result) -> Result:
    """Mean and standard deviation of curves over resampled sets P and N: figure A.3 of the paper.

    Args:
        result: curves of directions that `resampled_vectors` made.

    Returns:
        Each array's mean under its own name and standard deviation (n - 1) under `{name}_sd`, with one direction for
        each concept and layer.

    Raises:
        MechsteerError: the directions know no seeds.
    """
    if "seed" not in result.data.coords or "concept" not in result.data.coords:
        raise MechsteerError("over_seeds needs curves of resampled directions. Pass those of resampled_vectors.")
    names = [
        f"{concept}, layer {layer}"
        for concept, layer in zip(result["concept"].values, result["layer"].values, strict=True)
    ]
    parts = []
    for name in dict.fromkeys(names):
        part = result.data.isel(direction=[place for place, each in enumerate(names) if each == name])
        arrays = {key: array for key, array in part.data_vars.items() if "direction" in array.dims}
        made = {str(key): array.mean("direction", keep_attrs=True) for key, array in arrays.items()}
        made |= {f"{key}_sd": array.std("direction", ddof=1) for key, array in arrays.items()}
        first = {key: ("direction", part[key].values[:1]) for key in ("layer", "concept")}
        parts.append(xr.Dataset(made).expand_dims(direction=[name]).assign_coords(first))
    data = xr.concat(parts, "direction", coords="minimal", compat="override", join="exact")
    order = [dim for dim in result.data.dims if dim in data.dims]
    return Result(data.transpose(*order), provenance=result.provenance)


def contexts(model: Model, prompts: PromptsLike, recipe: str, *, max_tokens: int = 100) -> Prompts:
    """Prompts as a recipe tokenises them; Prompts and ids are taken as they are.

    Raises:
        MechsteerError: there is no such recipe, or the prompts do not fit the model.
    """
    check_recipe(recipe)
    if recipe == "published" and not isinstance(prompts, Prompts | Tensor):
        texts = [prompts] if isinstance(prompts, str) else list(prompts)  # type: ignore[arg-type]
        prompts = published_prompts(texts, model, max_tokens=min(max_tokens, model.n_ctx))
    return model.prompts(prompts)


def strength_sweep(
    model: Model,
    prompts: Prompts,
    directions: Mapping[str, Direction],
    alphas: Sequence[float],
    table: Table,
    n_columns: int,
    *,
    at: At = "all",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Columns "0", "1", ... of a table [direction, alpha, prompt], under `Add` of each direction and strength."""
    where = steered(at)
    return sweep(
        model,
        prompts,
        axes={"direction": list(directions), "alpha": alphas},
        build=lambda direction, alpha: Add(directions[direction], alpha, at=where),
        measure=table.objectives(map(str, range(n_columns))),
        out=out,
        progress=progress,
    )


def steered(at: At) -> At:
    """`at` as `Add` takes it: "all" is None there, and "last" the last token before any completion."""
    return {"all": None, "last": -1}.get(at, at) if isinstance(at, str) else at


def named_directions(directions: Directions) -> dict[str, Direction]:
    """Directions by name."""
    named = {str(directions.site): directions} if isinstance(directions, Direction) else dict(directions)
    if not named:
        raise MechsteerError("directions is empty. Pass a Direction, or several by name.")
    return named


def _likeliest(
    model: Model,
    prompts: Prompts,
    directions: Mapping[str, Direction],
    alphas: Sequence[float],
    top: int,
    at: At,
    progress: bool,
) -> tuple[list[int], dict[str, Any]]:
    """The likeliest tokens at either end, and where each of them is one."""
    if not 1 <= top <= model.d_vocab:
        raise MechsteerError(f"top={top} of {model.d_vocab} tokens were asked for. Pass a number of them from 1 on.")
    ends = [alphas[-1], alphas[0]] if len(alphas) > 1 else [alphas[0]]
    swept = strength_sweep(
        model, prompts, directions, sorted(ends), LikeliestTokens(top), top, at=at, progress=progress
    )
    found = np.stack([swept[str(rank)].values for rank in range(top)], 2).astype(np.int64)
    high, low = found[:, -1], found[:, 0]  # [direction, rank, prompt]
    ids = list(dict.fromkeys([*high.transpose(1, 0, 2).ravel().tolist(), *low.transpose(1, 0, 2).ravel().tolist()]))
    flags = {
        f"is_top_{name}": (("direction", "token", "prompt"), (part[:, None] == np.array(ids)[:, None, None]).any(2))
        for name, part in (("low", low.transpose(0, 1, 2)), ("high", high))
    }
    return ids, flags


def _stacked(swept: Result, n: int, dim: str) -> Any:
    values = np.stack([swept[str(column)].values for column in range(n)], 2)
    return ("direction", "alpha", dim, "prompt"), values


def _texts(model: Model, ids: Sequence[int]) -> list[str]:
    known = max(len(model.tokenizer), 1 + max(model.tokenizer.added_tokens_decoder, default=-1))
    return [str_tokens(torch.tensor([i]), model.tokenizer)[0] if i < known else f"<id {i}>" for i in ids]


def _finished(data: xr.Dataset, swept: Result, directions: Mapping[str, Direction], *, what: str) -> Result:
    coords = {name: swept.data.coords[name] for name in ("direction", "alpha", "prompt")}
    data = data.assign_coords({**coords, **labels_of(list(directions.values()))})
    data["alpha"].attrs = {"long_name": "strength", "units": "lengths of the direction"}
    data["p"].attrs = {"long_name": what, "units": "1"}
    data["delta_p"].attrs = {"long_name": f"change of the {what}", "units": "1"}
    return Result(data, provenance=swept.provenance)
