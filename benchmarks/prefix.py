"""`mechsteer.prefix` beside nanoGCG and a plain forward and backward pass, on the same machine, in the same run.

    python benchmarks/prefix.py --peer-python PATH                # about eight minutes on one idle core
    python benchmarks/prefix.py --peer-python PATH --check        # exit status 1 where a bar is missed
    python benchmarks/prefix.py --peer-python PATH --quick        # two seeds of two seconds
    python benchmarks/prefix.py --peer-python PATH --check --full --cases cases      # what is found, too

nanoGCG 0.3.0 keeps its prefix cache with transformers 4.47 only, so it runs in an interpreter of its own, PATH:

    python -m venv nanogcg && nanogcg/bin/pip install nanogcg==0.3.0 transformers==4.47.1 torch

- the search: one chat, a completion to make likely by its mean cross entropy, and nanoGCG's usual place and length for
  the tokens: 20 behind what the user says. Both sides get the same model folder, template, ids, starts (random tokens,
  others for each seed), width, top-k, printable ASCII alone and one thread, and work turn by turn for as many seconds
  from nothing on. Counted are candidates whose exact loss was computed, by GCG on both sides, and the lowest loss of
  the steps that were over in time, by nanoGCG's GCG and our default search, of prefixes that survive as text
- a soft step: an Adam step of `optimise_soft_prefix`, set-up included, beside a forward and backward pass of
  TransformerLens through the same prompts and prefixes, whose parameters need no gradients either

`--full` also runs `prefix_layers.py`, of states at every layer, and `prefix_stages.py`, of six teachers and ten seeds,
which takes two hours on a core, and keeps finished cases in the folder.

`--clock cpu` counts each process's own time instead of the wall's, for a machine that does other work too.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # on both sides: one thread

import numpy as np
import torch
from engine import load
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.prefix import Constraints, RoundTrip, optimise_soft_prefix, search_prefix
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.prefix.loss import PrefixLoss
from mechsteer.prefix.moves import Ids, built
from mechsteer.vocabulary import embeddings, insert

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEER = Path(__file__).parent / "peers/nanogcg_side.py"
STORIES = Path(__file__).parents[2] / "shared/models/stories260K"
# stories260K has no template. Its tokenizer takes a blank off the start of a text, so something stands before.
PLAIN = "{{ bos_token }}A story:{% for message in messages %}{{ message['content'] }}{% endfor %}"
CE = ms.TeacherForcedCE(first=0)  # every token of the completion counts the same, as in nanoGCG's loss
KEEP = Constraints(characters="ascii")
REFERENCE, N_NEW = "Talk only about cats.", 16
# Of the soft step: how many prefixes at once, and steps that are timed.
N_RESTARTS, N_SLOTS, STEPS = 4, 6, 10
REQUESTS = (
    "Tell me about the harbour.",
    "What should I do on Sunday?",
    "Describe your morning.",
    "Tell me a story.",
    "What is good about the winter?",
    "Write about a long road.",
    "What do you think of music?",
    "Give me some advice.",
)
# Least ratios of candidates a second, and what is aimed at; share of seeds with the lower loss; most that a soft step
# may take of a plain pass; and how far losses of the same ids may be apart.
RATE, AIM, WON, SOFT, TOLERANCE = 2.5, 4.0, 0.9, 1.3, 1e-4

Step = tuple[float, int, float]  # seconds since the start, candidates so far, lowest loss so far


class Job(NamedTuple):
    """What both sides search for.

    Attributes:
        prompts: with slots and the completion.
        peer: the job as `peers/nanogcg_side.py` reads it, but for start and seed.
    """

    model: ms.Model
    prompts: ms.Prompts
    peer: dict[str, Any]


class Outcome(NamedTuple):
    """One search."""

    steps: list[Step]
    candidates: int
    seconds: float
    best: Ids
    loss: float

    @property
    def rate(self) -> float:
        """Candidates a second."""
        return self.candidates / self.seconds

    def lowest(self, seconds: float) -> float:
        """Loss of the best of the steps that were over by then."""
        return min((loss for now, _, loss in self.steps if now <= seconds), default=float("inf"))

    def reached(self, loss: float) -> float:
        """When it was first as low."""
        return next((now for now, _, lowest in self.steps if lowest <= loss), float("inf"))


class Turn(NamedTuple):
    """A seed's searches, and by how much the two sides' losses of the same ids are apart."""

    peer: Outcome
    gcg: Outcome
    mixed: Outcome
    difference: float


class Peer:
    """nanoGCG in another interpreter, which answers one job after the other."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.about = self._read()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"nanoGCG's side ended:\n{self._process.stderr.read()}")
        return json.loads(line)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


def job_of(name: str, arguments: argparse.Namespace) -> Job:
    model = load(name)
    tokenizer = model.tokenizer
    if name == "stories260K":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = PLAIN
        folder: Any = STORIES
        request, target = "Once upon a time there was a little girl", "who had a big red ball and liked to play"
    else:
        folder, request = data_path("models", name), REQUESTS[0]
        taught = ms.Prompts.from_chats([request], model, prefix=REFERENCE)
        target = model.generate(taught, max_new_tokens=N_NEW, progress=False).completions[0]
    prompts = insert(ms.Prompts.from_chats([request], tokenizer), where=arguments.place, slots=arguments.tokens)
    prompts = prompts.with_completions([target])
    content = request + "{optim_str}" if arguments.place == "suffix" else "{optim_str}" + request
    peer = {
        "folder": str(folder), "template": tokenizer.chat_template, "target": target, "width": arguments.width,
        "top_k": arguments.top_k, "batch": arguments.batch, "seconds": arguments.seconds,
        "threads": arguments.threads, "clock": arguments.clock, "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    return Job(model, prompts, peer)


def start_of(job: Job, seed: int) -> Ids:
    """Random tokens that both sides' checks keep: encoded again alone, and in their place."""
    rng, trip, tokenizer = np.random.default_rng(seed), RoundTrip(job.prompts), job.prompts.tokenizer
    allowed = KEEP.allowed(job.model)

    def fine(candidates: Any) -> list[bool]:
        alone = [tuple(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)) == ids for ids in candidates]
        return [placed.survives and same for placed, same in zip(trip.near(candidates), alone, strict=True)]

    start = built([rng.permutation(allowed).tolist() for _ in range(job.prompts.n_slots)], fine)
    assert start is not None
    return start


def ours(job: Job, method: str, start: Ids, seed: int, seconds: float) -> Outcome:
    """A search from nothing on that is stopped, as by Ctrl-C, after the step in which the time is over."""
    steps: list[Step] = []
    clock = CLOCKS[job.peer["clock"]]
    began = clock()

    def tell(done: int, loss: float, text: str) -> None:
        steps.append((clock() - began, done, loss))
        if steps[-1][0] >= seconds:
            raise KeyboardInterrupt

    options: Any = {"method": method, "width": job.peer["width"], "top_k": job.peer["top_k"], "constraints": KEEP}
    found = search_prefix(
        job.model, job.prompts, CE, start=start, evaluations=10**9, seed=seed, progress=False, tell=tell, **options
    )
    return Outcome(steps, found.evaluated, clock() - began, found.ids, found.loss)


def turn(job: Job, peer: Peer, seed: int) -> Turn:
    start = start_of(job, seed)
    answer = peer.ask(job.peer | {"start": job.prompts.tokenizer.decode(start), "seed": seed})
    row = [*answer["before"], *start, *answer["after"], *answer["target"]]
    alike = job.prompts.tokens.clone()
    alike[job.prompts.slots] = torch.tensor(start)
    if tuple(answer["start"]) != start or alike[0].tolist() != row:
        raise SystemExit(f"The two sides do not see the same tokens: {alike[0].tolist()} here and {row} there.")
    theirs = Outcome(
        answer["steps"], answer["candidates"], answer["seconds"], tuple(answer["best"]), answer["best_loss"]
    )
    exact = CandidateLosses(job.model, job.prompts, CE).of([start, theirs.best])
    off = float(np.abs(exact - [answer["start_loss"], answer["best_loss"]]).max())
    seconds = job.peer["seconds"]
    # A rate needs less time than a search.
    gcg, mixed = ours(job, "gcg", start, seed, seconds / 2), ours(job, "mixed", start, seed, seconds)
    return Turn(theirs, gcg, mixed, off)


class Soft(NamedTuple):
    model: str
    plain: float
    step: float
    difference: float


def soft_step(name: str, runs: int, clock: Callable[[], float]) -> Soft:
    """Median seconds of a plain pass and of an optimiser step, and by how much their gradients differ."""
    model = load(name)
    if name == "stories260K":
        rows = torch.randint(4, model.d_vocab, (len(REQUESTS), 40), generator=torch.Generator().manual_seed(0))
        prompts = ms.Prompts.from_ids(rows[:, :16], tokenizer=model.tokenizer)
        prompts = insert(prompts, where="prefix", slots=N_SLOTS).with_completions(rows[:, 16:].tolist())
    else:
        taught = ms.Prompts.from_chats(list(REQUESTS), model, prefix=REFERENCE)
        said = model.generate(taught, max_new_tokens=24, progress=False).completions
        prompts = ms.Prompts.from_chats(list(REQUESTS), model, slots=N_SLOTS).with_completions(said)
    filled = prompts.padded("right")
    batch = filled[[row for _ in range(N_RESTARTS) for row in range(len(filled))]]
    table = embeddings(model)
    drawn = torch.randint(0, len(table), (N_RESTARTS, N_SLOTS), generator=torch.Generator().manual_seed(1))
    vectors = table[drawn]
    weights = PrefixLoss.shares(filled, CE, None)
    wanted = filled.span("completion").repeat(N_RESTARTS, 1)
    for parameter in model.hooked.parameters():
        parameter.requires_grad_(False)

    def plain() -> torch.Tensor:
        leaf = vectors.clone().requires_grad_()

        def put(embed: torch.Tensor, hook: Any) -> torch.Tensor:
            return embed.masked_scatter(batch.slots[..., None], leaf.repeat_interleave(len(filled), 0))

        with torch.enable_grad():
            logits = model.hooked.run_with_hooks(batch.tokens, fwd_hooks=[("hook_embed", put)])
            said = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
            losses = -(said * wanted[:, 1:]).sum(1) / wanted.sum(1)
            total = (losses.view(N_RESTARTS, -1) * weights).sum()
            return torch.autograd.grad(total, leaf)[0]

    def steps() -> None:
        optimise_soft_prefix(
            model, prompts, CE, n_restarts=N_RESTARTS, steps=STEPS, check_every=10 * STEPS, progress=False
        )

    times = turns([plain, steps], runs, clock)
    mine = PrefixLoss(model, prompts, CE, n_prefixes=N_RESTARTS).gradient(vectors)[1]
    expected = plain()
    off = float((mine - expected).abs().max() / expected.abs().max())
    return Soft(model.name, times[0], times[1] / STEPS, off)


def turns(sides: list[Callable[[], Any]], runs: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each side over `runs` turns, after one that is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(runs + 1):
        for side, seconds in zip(sides, times, strict=True):
            began = clock()
            side()
            if number:
                seconds.append(clock() - began)
    return [statistics.median(each) for each in times]


def searched(name: str, found: list[Turn], seconds: float, table: Table) -> bool:
    """A row of the table; whether a bar is missed."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    ratio = median([each.gcg.rate / each.peer.rate for each in found])
    losses = [(each.peer.lowest(seconds), each.mixed.lowest(seconds)) for each in found]
    won, off = sum(mine < theirs for theirs, mine in losses), max(each.difference for each in found)
    reached = median([each.mixed.reached(theirs) for each, (theirs, _) in zip(found, losses, strict=True)])
    bad = {"rate": ratio < RATE, "loss": won < WON * len(found), "difference": not off <= TOLERANCE}
    table.add_row(
        name, f"{median([each.peer.rate for each in found]):.0f}", f"{median([each.gcg.rate for each in found]):.0f}",
        f"{ratio:.2f}{' missed' if bad['rate'] else ''}", f"{median([each.mixed.rate for each in found]):.0f}",
        f"{median([theirs for theirs, _ in losses]):.3f}", f"{median([mine for _, mine in losses]):.3f}",
        f"{won} of {len(found)}{' missed' if bad['loss'] else ''}", f"{reached:.1f}",
        f"{off:.0e}{' missed' if bad['difference'] else ''}",
    )  # fmt: skip
    return any(bad.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--quick", action="store_true", help="two seeds of two seconds")
    parser.add_argument("--peer-python", help="interpreter in which nanogcg and transformers 4.47 import")
    parser.add_argument("--models", nargs="+", default=["stories260K", "pocket"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each search")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20, help="how many are searched for")
    parser.add_argument("--place", choices=("suffix", "prefix"), default="suffix", help="of them, around the request")
    parser.add_argument("--width", type=int, default=256, help="candidates a step")
    parser.add_argument("--top-k", type=int, default=64, help="tokens a slot")
    parser.add_argument("--batch", type=int, help="nanoGCG's batch size; None for the whole width, as by default")
    parser.add_argument("--runs", type=int, default=5, help="turns of the soft step; the median counts")
    parser.add_argument("--full", action="store_true", help="also prefix_layers.py and prefix_stages.py")
    parser.add_argument("--cases", default="cases", help="folder that keeps finished cases of prefix_stages.py")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.seconds, arguments.runs = 2, 2.0, 2
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu adds up the time of all threads. Use it with one.")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    missed, skipped, about = False, [], {}
    table = Table(title=f"{arguments.seeds} seeds of {arguments.seconds:g} s ({arguments.clock}), medians")
    for column in (
        "model", "nanoGCG / s", "ours / s", "ratio", "mixed / s", "its loss", "our loss", "seeds won",
        "s to its loss", "difference",
    ):  # fmt: skip
        table.add_column(column)
    soft = Table(title=f"a soft step of {N_RESTARTS} prefixes x {len(REQUESTS)} prompts, median of {arguments.runs}")
    for column in ("model", "plain, ms", "step, ms", "share", "at most", "difference"):
        soft.add_column(column)
    for name in arguments.models:
        try:
            each = soft_step(name, arguments.runs, CLOCKS[arguments.clock])
        except ms.ModelLoadError as error:
            skipped.append(f"{name} is not here ({error}); left out")
            continue
        share = each.step / each.plain
        bad = share > SOFT or not each.difference <= TOLERANCE
        missed |= bad
        cells = f"{1000 * each.plain:.1f}", f"{1000 * each.step:.1f}", f"{share:.2f}{' missed' if bad else ''}"
        soft.add_row(name, *cells, f"{SOFT}", f"{each.difference:.0e}")
        print(f"{name}: soft step measured", file=sys.stderr)
        if arguments.peer_python is None:
            continue
        job = job_of(name, arguments)
        ours(job, "gcg", start_of(job, 0), 0, 0.5)  # builds the packed weights, once for each model
        with Peer(arguments.peer_python) as peer:
            about = peer.about
            found = []
            for seed in range(arguments.seeds):
                found.append(turn(job, peer, seed))
                sides = [f"{each.rate:.0f} / s to {each.lowest(arguments.seconds):.3f}" for each in found[-1][:3]]
                print(f"{name}, seed {seed}: {', '.join(sides)}", file=sys.stderr)
        missed |= searched(name, found, arguments.seconds, table)
    if about:
        Console(width=150).print(table)
        print(
            f"bars: ratio {RATE} (aim {AIM:g}), {WON:.0%} of the seeds won; {arguments.tokens} tokens as a "
            f"{arguments.place}, width {arguments.width}, top-k {arguments.top_k}; nanoGCG with transformers "
            f"{about['transformers']} and torch {about['torch']}"
        )
    else:
        skipped.append(
            "nanoGCG left out. It needs an interpreter of its own: python -m venv nanogcg && nanogcg/bin/pip install "
            "nanogcg==0.3.0 transformers==4.47.1 torch, then --peer-python nanogcg/bin/python"
        )
        missed = True  # nothing was compared
    Console(width=150).print(soft)
    for note in skipped:
        print(note)
    print(f"{arguments.threads} threads, torch {torch.__version__}")
    for script, *options in (("prefix_layers.py",), ("prefix_stages.py", "--folder", arguments.cases)):
        if arguments.full:
            command = [sys.executable, str(Path(__file__).with_name(script)), "--check", *options]
            missed |= subprocess.run(command).returncode != 0
    return int(arguments.check and missed)


if __name__ == "__main__":
    sys.exit(main())
