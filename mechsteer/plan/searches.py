"""What a search for a prefix will take."""

from collections.abc import Sequence
from dataclasses import replace

from mechsteer.costs import (
    CANDIDATE_EVEN,
    CANDIDATE_LOGITS,
    CANDIDATE_TOKENS,
    MIXED_PARTS,
    Dims,
    counted,
    kept_bytes,
    whole,
)
from mechsteer.errors import MechsteerError
from mechsteer.plan.devices import Device
from mechsteer.plan.estimate import Plan, Work, batch_memory, estimate
from mechsteer.plan.kernels import Kernel, Pass
from mechsteer.plan.pieces import Cells, Prompts, gradients, swept, together
from mechsteer.plan.shape import Shape
from mechsteer.plan.sweeps import Planned, _device, assumptions, check_numbers

METHODS = ("hotflip", "gcg", "mixed")
# Steps after which `mechsteer.prefix.soft` looks at held-out prompts.
LOOK = 10


def plan_prefix(
    model: Planned,
    *,
    tokens: int = 6,
    evaluations: int = 1000,
    steps: int = 100,
    restarts: int = 3,
    beam: int = 4,
    top_k: int = 8,
    method: str = "mixed",
    width: int = 64,
    prompts: int = 12,
    positions: int = 16,
    before: int = 1,
    completion: int = 40,
    validation: int = 0,
    text: bool = True,
    device: str | Device = "h100",
    workers: int = 1,
    dtype: str | None = None,
    tf32: bool = False,
) -> Plan:
    """What `mechsteer.prefix.match_prefix`, or a search alone, will take: soft prefix, beam, and search.

        ms.plan_prefix("google/gemma-2-2b-it", tokens=8, evaluations=2000, prompts=16, positions=24, device="a100-80")
        ms.plan_prefix("pocket", steps=0, beam=0, method="gcg", evaluations=4096, device="here")     # a search alone

    Args:
        model: as for `Shape.of`.
        tokens: of the prefix.
        evaluations: candidates whose exact loss is computed, those of the beam included.
        steps: of the soft prefix, each a pass forward and back; 0 for none.
        restarts: soft prefixes side by side.
        beam, top_k: of the beam that makes tokens of the soft prefix; beam=0 for none.
        method, width: of the search; see `mechsteer.prefix.search_prefix`.
        prompts: that are searched on, all of one length.
        positions: tokens of each, without the prefix and the completion.
        before: of these, tokens before the prefix.
        completion: tokens of each completion, which are scored; 0 where the last token's logits are.
        validation: prompts that say when the soft prefix stops.
        text: whether there is a tokenizer, with which candidates are checked as text.
        device, workers, dtype, tf32: as for `plan_sweep`. A search is planned for one worker.

    Raises:
        MechsteerError: a number is out of range, or something has an unknown name.
    """
    shape = Shape.of(model, dtype=dtype)
    machine = _device(device, shape, tf32)
    check_numbers(
        tokens=tokens, evaluations=evaluations, restarts=restarts, top_k=top_k, width=width, prompts=prompts,
        positions=positions, workers=workers,
    )  # fmt: skip
    if method not in METHODS:
        raise MechsteerError(f"method={method!r} does not exist. Pass one of {', '.join(METHODS)}.")
    for name, value in (("steps", steps), ("beam", beam), ("completion", completion), ("validation", validation)):
        if value < 0:
            raise MechsteerError(f"{name}={value} is out of range. Pass 0 or more.")
    if not 0 <= before < positions:
        raise MechsteerError(f"before={before} is out of range. Pass 0 to {positions - 1}, one less than positions.")
    placed = Prompts.of(prompts, positions + tokens, completion)
    stages: list[Work] = []
    if steps:
        held = replace(placed, n=validation) if validation else None
        stages.append(soft(shape, placed, before, tokens, steps, restarts, machine, held))
    spent = 0
    if beam:
        stages.append(beamed(shape, placed, before, tokens, beam, top_k, machine))
        spent = 2 + top_k + (tokens - 1) * beam * top_k
        if evaluations <= spent:
            raise MechsteerError(
                f"evaluations={evaluations} are used up by a beam of {beam} x {top_k} over {tokens} slots, which may "
                f"take {spent}. Pass more, or a smaller beam."
            )
    stages.append(
        searched(shape, placed, before, tokens, evaluations - spent, method, width, machine, candidate_seconds(text))
    )
    what = f"prefix of {tokens} tokens, {evaluations} evaluations, {prompts} prompts of {placed.length} tokens"
    notes = [*assumptions(machine, shape, workers), "Moves that help are also tried together: that adds a few passes."]
    return estimate(what, stages, shape, machine, workers, notes if method == "mixed" else notes[:-1])


def candidate_seconds(text: bool = True) -> float:
    """What the host is assumed to do for a candidate: decoding and encoding it in its place, and checking the
    constraints. It depends on the tokenizer."""
    return 2e-4 if text else 2e-5


def soft(
    shape: Shape, prompts: Prompts, before: int, tokens: int, steps: int, restarts: int, device: Device,
    held: Prompts | None = None,
) -> Work:  # fmt: skip
    """A soft prefix: a gradient a step, and a look at the held-out prompts every ten."""
    parts = [gradients(shape, steps, prompts, before, device, cells=restarts)]
    looks = 1 + steps // LOOK
    forward = [replace(each, backward=False, times=each.times // steps) for each in parts[0].passes]
    if held is not None:
        checked = gradients(shape, looks, held, before, device, cells=restarts)
        parts.append(replace(checked, passes=[replace(each, backward=False) for each in checked.passes]))
    # The last look is a pass without a gradient.
    parts.append(replace(parts[0], passes=forward, batch=0.0))
    clean = Pass(whole(prompts.n, prompts.length, ()))
    parts.append(Work("", [clean], calls=1))
    return together(f"soft prefix, {steps} steps", parts)


def beamed(shape: Shape, prompts: Prompts, before: int, tokens: int, beam: int, top_k: int, device: Device) -> Work:
    """The beam: a sweep for each slot."""
    sizes = [2, top_k, *[beam * top_k] * (tokens - 1)]
    parts = [swept(shape, [Cells(-1, ((before, n),))], prompts, device) for n in sizes]
    return replace(together(f"beam of {beam} x {top_k}", parts), splits=False)


def searched(
    shape: Shape, prompts: Prompts, before: int, tokens: int, evaluations: int, method: str, width: int, device: Device,
    host: float | int,
) -> Work:  # fmt: skip
    """Steps of a search: a gradient, the keys and values before the end of the present prefix, and its candidates."""
    dims = shape.dims
    each = max(1, width // MIXED_PARTS) if method == "mixed" else width
    steps = max(1, -(-evaluations // each))
    per = max(
        1,
        min(
            prompts.n, CANDIDATE_TOKENS[device.kind] // (prompts.length - tokens),
            CANDIDATE_LOGITS[device.kind] // (len(prompts.read) * dims.d_vocab),
        ),
    )  # fmt: skip
    parts = {per: prompts.n // per} | ({prompts.n % per: 1} if prompts.n % per else {})
    passes: list[Pass] = []
    for n, times in parts.items():
        start = counted([(before, 1)], prompts.stop, prompts.read, n)
        logits = n * len(prompts.read)
        passes.append(Pass(start, logits=logits, backward=True, times=times * steps))
        passes.append(Pass(whole(n, before + tokens, ()), times=times * steps))
        for starts, many in _candidates(dims, prompts, before, tokens, min(each, evaluations), n, device.kind, method):
            passes.append(_candidate_pass(dims, starts, prompts, before, tokens, n, many * times * steps))
    cache = kept_bytes(dims, shape.itemsize, prompts.n * (prompts.length + 4))
    # The table that tokens are ranked with is in fp64, and is read once for each gradient.
    table = 8.0 * dims.d_vocab * dims.d_model + shape.itemsize * dims.d_vocab * dims.d_model
    batch = max(batch_memory(dims, one, shape.itemsize) for one in passes)
    return Work(
        f"search, {method}, {evaluations} candidates", passes, cells=0, calls=1, host=host * evaluations,
        kept=cache + table, batch=batch, extra=[Kernel("move", 0.0, 8.0 * dims.d_vocab * dims.d_model, times=steps)],
    )  # fmt: skip


def _candidates(
    dims: Dims, prompts: Prompts, before: int, tokens: int, n_candidates: int, n: int, device: str, method: str
) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """(starts of a batch's candidates, how many such batches) of one step on n of the prompts.

    Candidates differ from the present prefix first in a slot that is any of them with even odds; those that start late
    come first, as `mechsteer.prefix.candidates` orders them.
    """
    cost = max(1, (prompts.stop - before) * n)
    logits = n * len(prompts.read) * dims.d_vocab
    size = max(1, min(CANDIDATE_TOKENS[device] // cost, CANDIDATE_LOGITS[device] // logits))
    same = sorted((place * tokens // n_candidates for place in range(n_candidates)), reverse=True)
    if method == "hotflip":
        # One slot after the other: on average the middle one.
        same = [tokens // 2] * n_candidates
    found: list[tuple[tuple[tuple[int, int], ...], int]] = []
    for place in range(0, n_candidates, size):
        starts = [before + each for each in same[place : place + size]]
        earliest = min(starts)
        rows, even = sum(prompts.stop - at for at in starts), len(starts) * (prompts.stop - earliest)
        if even <= CANDIDATE_EVEN * rows:
            starts = [earliest] * len(starts)
        found.append((tuple((at, starts.count(at)) for at in sorted(set(starts))), 1))
    return found


def _candidate_pass(
    dims: Dims, starts: Sequence[tuple[int, int]], prompts: Prompts, before: int, tokens: int, n: int, times: int
) -> Pass:
    counts = counted(starts, prompts.stop, prompts.read, n)
    cells = sum(many for _, many in starts)
    earliest = min(start for start, _ in starts)
    # The same token at the same place in every candidate, and one that only it has.
    kinds = n * (prompts.stop - before - tokens) + (before + tokens - earliest) + cells
    alike = max(0, counts.rows - kinds) if dims.n_layers > 1 else 0
    return Pass(counts, logits=n * cells * len(prompts.read), alike=alike, times=times)
