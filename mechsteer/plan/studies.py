"""What a study will take: the work of each chapter, from the settings and constants that the chapters use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mechsteer.errors import MechsteerError
from mechsteer.plan.devices import Device
from mechsteer.plan.estimate import Plan, Work, estimate
from mechsteer.plan.kernels import matmul
from mechsteer.plan.pieces import (
    Cells,
    Prompts,
    generated,
    gradients,
    grid,
    recorded,
    repeated,
    scored,
    stage_of,
    swept,
    together,
)
from mechsteer.plan.searches import beamed, candidate_seconds, searched, soft
from mechsteer.plan.shape import Shape
from mechsteer.plan.sweeps import Planned, _device, assumptions, check_numbers, shared_rows

ROUGH: dict[str, tuple[float, str]] = {
    "travel": (2.2, "passes in forward mode, dense Jacobians and their singular values"),
    "strength": (1.3, "the local laws and the choice among curves"),
    "features": (1.2, "what the autoencoder itself computes"),
    "together": (1.2, "the weights of edits, which are solved for"),
}
"""Chapters that are modelled only roughly: how many times as long as predicted they took, and what is left out or
simplified. `python benchmarks/scale.py --study` measured that on the pocket model; see `docs/cost.md`."""


@dataclass(frozen=True)
class _Case:
    """The sizes of a study.

    Attributes:
        search, held: requests of each half.
        plain: tokens of a request without the prefix.
        prefix: of the prefix.
        new: of a completion.
        rows: of a batch of a sweep; see `swept`.
    """

    shape: Shape
    device: Device
    search: int
    held: int
    plain: int
    prefix: int
    new: int
    rows: int | None = None

    @property
    def n(self) -> int:
        """All requests."""
        return self.search + self.held

    @property
    def long(self) -> int:
        """Tokens of a request with the prefix."""
        return self.plain + self.prefix

    def swept(self, groups: Sequence[Cells], prompts: Prompts) -> Work:
        return swept(self.shape, groups, prompts, self.device, rows=self.rows)

    def scored(self, n: int, length: int, times: int = 1) -> Work:
        return scored(self.shape, Prompts.of(n, length, self.new), self.device, times=times)

    def said(self, n: int, length: int, times: int = 1) -> Work:
        return generated(self.shape, n, length, self.new, times=times)

    def alphas(self, n: int, length: int, cells: int) -> Work:
        """A vector at several strengths behind the middle block."""
        return self.swept(
            [Cells(stage_of("resid_post", self.shape.layers // 2), ((0, cells),))], Prompts.of(n, length, self.new)
        )


def plan_study(
    model: Planned = "pocket",
    *,
    requests: int = 36,
    positions: int = 16,
    tokens: int = 6,
    max_new_tokens: int = 40,
    chapters: Sequence[str] | None = None,
    device: str | Device = "h100",
    workers: int = 1,
    dtype: str | None = None,
    tf32: bool = False,
) -> Plan:
    """What `mechsteer.study.study` will take, chapter by chapter.

        ms.plan_study("google/gemma-2-9b-it", positions=24, tokens=6, device="h100", dtype="bfloat16")

    Work that several chapters share, such as completions or the search for other words, is counted where the first of
    them needs it. A chapter that is modelled roughly says so in its row.

    Args:
        model: as for `Shape.of`.
        requests: how many, half of them to search on.
        positions: tokens of a request without the prefix, with the chat template's.
        tokens: of the prefix.
        max_new_tokens: length of the completions, all of which are taken to go to the end.
        chapters: names; None for all.
        device, workers, dtype, tf32: as for `plan_sweep`.

    Raises:
        MechsteerError: a number is below 1, or something has an unknown name.
    """
    from mechsteer.study.chapters import NAMES

    shape = Shape.of(model, dtype=dtype)
    machine = _device(device, shape, tf32)
    check_numbers(positions=positions, tokens=tokens, max_new_tokens=max_new_tokens, workers=workers)
    if not (isinstance(requests, int) and requests >= 2):
        raise MechsteerError(f"requests={requests!r} is too few. Pass at least 2, one for each half.")
    asked = list(NAMES if chapters is None else chapters)
    for name in asked:
        if name not in NAMES:
            raise MechsteerError(f"chapters: {name!r} is none of {', '.join(NAMES)}.")
    half = requests // 2
    case = _Case(
        shape, machine, requests - half, half, positions, tokens, max_new_tokens, shared_rows(machine, workers)
    )
    stages = [together("completions", [case.said(case.n, case.long), case.said(case.n, case.plain)])]
    made: set[str] = set()
    for name in [each for each in NAMES if each in asked]:
        parts = _CHAPTERS[name](case, made)
        note = _rough(name) if parts else "no autoencoder ships for this model"
        stages.append(together(name, parts, note) if parts else Work(name, [], calls=0, note=note))
    what = f"study of {requests} requests of {positions} tokens, prefix of {tokens}, completions of {max_new_tokens}"
    notes = [*assumptions(machine, shape, workers), "Judging texts and drawing the report are left out."]
    return estimate(what, stages, shape, machine, workers, notes)


def _rough(name: str) -> str:
    """What the row of a chapter that is modelled roughly says."""
    if name not in ROUGH:
        return ""
    times, why = ROUGH[name]
    return f"rough: took {times:g} x as long as predicted on the pocket model ({why})"


# ---- chapters ----


def _behaviour(case: _Case, made: set[str]) -> list[Work]:
    return [case.scored(case.n, case.long), case.scored(case.n, case.plain)]


def _entry(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study.chapters import entry

    shape, n = case.shape, min(entry.MOST_REQUESTS, case.search)
    prompts = Prompts.of(n, case.long, min(entry.MOST_TOKENS, case.new))
    layers = range(shape.layers)
    sites = [cells for kind in entry.SITES for cells in grid({"layer": shape.layers}, layers, kind, range(case.long))]
    heads = grid({"head": shape.heads}, layers, "z", [0])
    plain = scored(shape, prompts, case.device, times=2 * 3)
    # A gradient, and the mean of ten, of each of the two maps.
    estimates = gradients(shape, len(entry.MAPS) * 11, prompts, 0, case.device)
    return [
        case.scored(n, case.long, len(entry.FILLERS) + entry.N_RANDOM + 3), case.swept(sites, prompts),
        repeated(case.swept(heads, prompts), 2), plain, estimates,
        recorded(shape, n, prompts.length, 3, times=3 + 2 * len(entry.MAPS) * 2 + 2),
        case.said(min(entry.MOST_REQUESTS, case.held), case.long, 3),
    ]  # fmt: skip


def _travel(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study.chapters import travel

    shape, dims = case.shape, case.shape.dims
    n = min(travel.MOST_FORKS, case.held)
    few = min(travel.MOST_JACOBIANS, n)
    layers = range(shape.layers)
    at_fork = Prompts.of(n, case.plain)
    last = case.plain - 1
    directions = 1 + travel.N_RANDOM
    pushes = case.swept([Cells(stage_of("resid_pre", layer), ((last, 3),)) for layer in layers], at_fork)
    regime = case.swept(
        [Cells(stage_of("resid_pre", layer), ((last, 2 * directions * len(travel.SIZES)),)) for layer in layers],
        at_fork,
    )
    rank = case.swept([Cells(stage_of("resid_pre", shape.layers // 2), ((last, 2 * len(travel.KS)),))], at_fork)
    slopes = gradients(shape, shape.layers, at_fork, last, case.device)
    some = min(shape.layers, travel.MOST_LAYERS)
    # From each layer to the end, every push through all blocks behind it; half of them on average.
    series = gradients(
        shape, some * shape.layers // 2, Prompts.of(few, case.plain), last, case.device, cells=directions
    )
    flow = gradients(shape, some, Prompts.of(few, case.long), 1, case.device, cells=case.prefix * travel.N_RANDOM)
    d = dims.d_model
    # A row of the Jacobian of every block for each dimension, their products, and singular values of some.
    jacobian = [
        replace(matmul(few * d, d, dims.layer_weights // d, shape.itemsize), times=2.0 * shape.layers),
        replace(matmul(few * d, d, d, shape.itemsize), times=40.0 * shape.layers),
    ]
    identity = Work("", [], calls=0, kept=10.0 * few * d * d * shape.itemsize, extra=jacobian)
    return [
        recorded(shape, n, case.long, 1, times=6), pushes, regime, rank, slopes, series, flow, identity,
    ]  # fmt: skip


def _vector(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study.chapters import vector

    shape = case.shape
    searched_on = Prompts.of(case.search, case.plain, case.new)
    cells = grid(
        {"vector": 3, "layer": shape.layers, "alpha": len(vector.ALPHAS)}, range(shape.layers), "resid_post", [0]
    )
    n = len(vector.CURVE)
    return [
        recorded(shape, case.search, case.long + case.new, 1, times=6), case.swept(cells, searched_on),
        repeated(case.alphas(case.n, case.plain, n), 2), case.said(case.n, case.plain, n),
        case.scored(case.n, case.long, n), case.alphas(case.held, case.plain, 5), case.scored(case.held, case.plain, 3),
    ]  # fmt: skip


def _chosen(case: _Case, made: set[str]) -> list[Work]:
    """The vector whose strength is chosen, made once for a study."""
    from mechsteer.study import pushes

    if "chosen" in made:
        return []
    made.add("chosen")
    n = len(set(pushes.DEPTHS))
    return [
        recorded(case.shape, case.search, case.long + case.new, 1, times=2),
        case.said(case.search, case.plain, n * pushes.BUDGET),
        repeated(case.alphas(case.search, case.plain, 1), n * pushes.BUDGET),
        # The local laws: passes in forward mode, each as dear as a gradient.
        gradients(case.shape, n, Prompts.of(case.search, case.plain, case.new), 0, case.device),
    ]


def _strength(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study.chapters import strength

    n = len(strength.CURVE)
    return [
        *_chosen(case, made), repeated(case.alphas(case.held, case.plain, n), 2), case.said(case.held, case.plain, n),
        case.said(case.held, case.plain, len(strength.SHOWN)),
        gradients(case.shape, 1, Prompts.of(case.held, case.plain, case.new), 0, case.device),
    ]  # fmt: skip


def _features(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study.chapters import features

    if case.shape.name != "pocket":
        return []
    shape = case.shape
    tried = 1 + 2 * len(features.STRENGTHS)
    few = Prompts.of(min(features._REQUESTS, case.search), case.plain + features._SLOTS)
    return [
        recorded(shape, case.search, case.long + case.new, 1, times=8),
        gradients(shape, 1, Prompts.of(case.search, case.plain, case.new), 0, case.device),
        repeated(case.alphas(case.held, case.long, 6), 2), case.said(case.n, case.plain, tried),
        case.scored(case.n, case.long, tried), repeated(case.alphas(case.n, case.plain, tried), 3),
        soft(shape, few, 1, features._SLOTS, features._STEPS, 1, case.device),
        searched(
            shape, few, 1, features._SLOTS, features._EVALUATIONS, "mixed", 64, case.device, candidate_seconds()
        ),
        case.said(case.held, case.long, 7), case.scored(case.held, case.long, 7 * 4),
    ]  # fmt: skip


def _matched(case: _Case, made: set[str]) -> list[Work]:
    """Other words, found once for a study."""
    from mechsteer.study import pushes

    if "matched" in made:
        return []
    made.add("matched")
    rows = min(pushes.SEARCHED, case.search)
    others = min(pushes.VALIDATED, max(0, case.search - rows))
    prompts = Prompts.of(rows, case.long, min(pushes.MATCHED_TOKENS, case.new))
    held = replace(prompts, n=others) if others else None
    shape, device, size = case.shape, case.device, case.prefix
    return [
        soft(shape, prompts, 1, size, pushes.SOFT_STEPS, 1, device, held),
        beamed(shape, prompts, 1, size, pushes.BEAM, pushes.TOP_K, device),
        searched(shape, prompts, 1, size, pushes.EVALUATIONS, "mixed", 64, device, candidate_seconds()),
    ]


def _words(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.prefix.match import beam_evaluations
    from mechsteer.study import pushes
    from mechsteer.study.chapters import words

    shape, device, size = case.shape, case.device, case.prefix
    rows = min(pushes.SEARCHED, case.search)
    prompts = Prompts.of(rows, case.long, min(pushes.MATCHED_TOKENS, case.new))
    evaluated = beam_evaluations(size, beam=pushes.BEAM, top_k=pushes.TOP_K) + pushes.EVALUATIONS
    layered = Prompts.of(min(words.LAYERED, case.search), case.long)
    layers = len({0, (shape.layers - 1) // 2, shape.layers - 1})
    each_layer = [
        soft(shape, layered, 1, size, words.LAYER_STEPS, 1, device),
        beamed(shape, layered, 1, size, words.LAYER_WIDTH, words.LAYER_TOP_K, device),
        searched(shape, layered, 1, size, words.LAYER_EVALUATIONS, "mixed", 64, device, candidate_seconds()),
        case.said(case.held, case.long, 2),
    ]  # fmt: skip
    # The prefixes of the table: four of words, a soft one, the reference, random tokens, and none.
    tables, transferred = 8, 5 if shape.name == "pocket" else 0
    return [
        *_matched(case, made),
        searched(shape, prompts, 1, size, evaluated, "hotflip", 64, device, candidate_seconds()),
        case.said(case.held, case.long, tables * (1 + words._SAMPLES)), case.scored(case.held, case.long, tables),
        case.scored(rows, case.long, 7), repeated(together("", each_layer), layers),
        *([repeated(case.said(case.held, case.long), transferred)] if transferred else []),
    ]  # fmt: skip


def _together(case: _Case, made: set[str]) -> list[Work]:
    from mechsteer.study import pushes

    shape, ships = case.shape, case.shape.name == "pocket"
    tried = len(pushes.FEATURES) * len(pushes.TIMES) if ships else 0
    edits = len(pushes.EDIT_DEPTHS) * len(pushes.EDIT_TIMES)
    forms = 6 + ships
    some = max(1, case.search // 2)
    of_features = [case.said(case.search, case.plain, tried), case.scored(case.search, case.plain, 2 * tried)]
    texts = Prompts.of(pushes.TEXTS, 2, pushes.TEXT_TOKENS)
    return [
        *_chosen(case, made), *_matched(case, made),
        *(of_features if ships else []), case.said(some, case.plain, edits), case.scored(some, case.plain, 2 * edits),
        recorded(shape, case.search, case.long + case.new, 1, times=3 * len(pushes.EDIT_DEPTHS)),
        case.said(case.held, case.long, forms), case.scored(case.held, case.long, 4 * forms),
        recorded(shape, case.held, case.long + case.new, 1, times=3 * forms),
        scored(shape, texts, case.device, times=forms),
    ]  # fmt: skip


_CHAPTERS: dict[str, Callable[[_Case, set[str]], list[Work]]] = {
    "behaviour": _behaviour, "entry": _entry, "travel": _travel, "vector": _vector, "strength": _strength,
    "features": _features, "words": _words, "together": _together,
}  # fmt: skip
