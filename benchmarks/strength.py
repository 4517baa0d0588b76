"""`mechsteer.strength` beside the ways it replaces, on the same machine, in the same run.

    python benchmarks/strength.py                  # median of 3
    python benchmarks/strength.py --check          # exit status 1 where a bar is missed; parity and choice too
    python benchmarks/strength.py --models stories260K --tokens 20000 --runs 1

- a curve: eight tokens' probabilities at 41 strengths on 16 contexts of 32 tokens, against one hooked forward pass of
  all contexts for each strength, and against one forward pass for each context with all strengths in its batch; at an
  early, a middle and a late layer. "operations" are the floating-point operations of the peer's matrix products over
  those of ours: the ratio that two sides equally fast at arithmetic would show, with no overhead on either
- Delta CE of 10^5 tokens at 21 strengths, against one hooked forward pass for each strength and batch of windows
  (timed on a tenth of the tokens); and its peak memory, in a process of its own, against that of a fifth of the tokens
- last-token vectors from the pairs of shipped texts that fit the model's context: differences of means at all layers
  against steering-vectors, principal components against repeng, where they are installed, each with the batch size
  that is fastest for it, and ours with its default. Peers cut no text, and ours is told not to. repeng's last layer
  lies behind the final norm and is left out on both sides

`--check` also runs the test of parity with the published recipe (`tests/parity/`) and `choose_alpha.py --check`, which
measures the choice of a strength and takes half an hour on a core. `strength_laws.py` counts where the laws hold.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from engine import ALPHAS, load, tokens
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.strength.concepts import shipped
from mechsteer.strength.cross_entropy import cross_entropy_curves
from mechsteer.strength.curves import token_curves

STORIES = Path(__file__).parents[2] / "shared/models/stories260K"
N_CONTEXTS, N_TOKENS, WINDOW = 16, 8, 128
CE_ALPHAS = np.linspace(-4, 4, 21).tolist()
TOLERANCE = 1e-4
# Least ratios: of the curves at all three layers, of the one at the middle layer, and of vectors to either peer.
LOOP, BATCHED, PEER = 3.0, 1.8, 1.0
# Texts in a peer's batch; the fastest of these counts. With 32 both take longer still on a CPU.
PEER_TEXTS = (1, 2, 4, 8)
# Most that memory may grow from a fifth of the tokens to all.
GROWTH = 1.10


class Line(NamedTuple):
    work: str
    model: str
    peer: float
    ours: float
    bar: float | None
    difference: float
    # Floating-point operations of the matrix products on either side.
    peer_flops: float | None = None
    our_flops: float | None = None


def push(model: ms.Model, layer: int, seed: int = 3) -> ms.Direction:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed)) * 0.1
    return ms.Direction(vector[None], ms.Site("resid_post", layer))


def turns(sides: list[Callable[[], Any]], runs: int) -> tuple[list[float], list[Any]]:
    """Median times and last values over `runs` turns, in each of which every side runs once."""
    times: list[list[float]] = [[] for _ in sides]
    values: list[Any] = [None] * len(sides)
    for _ in range(runs):
        for place, side in enumerate(sides):
            began = time.perf_counter()
            values[place] = side()
            times[place].append(time.perf_counter() - began)
    return [statistics.median(each) for each in times], values


def curve(model: ms.Model, layer: int, runs: int, *, middle: bool) -> list[Line]:
    contexts, direction = tokens(model, N_CONTEXTS, 2), push(model, layer)
    vector, name, strengths = direction.vector, direction.site.hook_name, torch.tensor(ALPHAS)
    ids = model.run(contexts[:1], logits="last").rows[0].topk(N_TOKENS).indices.tolist()

    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].softmax(-1)[:, ids]

    def loop() -> torch.Tensor:
        rows = []
        for alpha in ALPHAS:
            hook = (name, lambda x, hook, alpha=alpha: x + alpha * vector)
            rows.append(probabilities(model.hooked.run_with_hooks(contexts, fwd_hooks=[hook])))
        return torch.stack(rows)

    def batched() -> torch.Tensor:
        hook = (name, lambda x, hook: x + strengths[:, None, None] * vector)
        rows = [
            probabilities(model.hooked.run_with_hooks(context.expand(len(ALPHAS), -1), fwd_hooks=[hook]))
            for context in contexts
        ]
        return torch.stack(rows, 1)

    def curves() -> ms.Result:
        return token_curves(model, contexts, {"v": direction}, ALPHAS, tokens=ids, progress=False)

    def ours() -> torch.Tensor:
        return torch.tensor(curves()["p"].values[0]).transpose(1, 2)

    few = curves().provenance["options"]["flops"]  # this first run builds the packed weights, too
    with FlopCounterMode(display=False) as counter:
        model.hooked(contexts)
    many = float(counter.get_total_flops() * len(ALPHAS))
    (slow, stacked, fast), (expected, again, found) = turns([loop, batched, ours], runs)
    off = max(float((found - each).abs().max()) for each in (expected, again))
    where = f"layer {layer} of {model.n_layers}"
    return [
        Line(f"41 alphas, {where} / a hooked forward each", model.name, slow, fast, None, off, many, few),
        Line(
            f"41 alphas, {where} / a batch for each context",
            model.name,
            stacked,
            fast,
            BATCHED if middle else None,
            off,
            many,
            few,
        ),
    ]


def windows(model: ms.Model, n: int) -> ms.Prompts:
    return ms.Prompts.from_ids(
        torch.randint(4, model.d_vocab, (n // WINDOW, WINDOW + 1), generator=torch.Generator().manual_seed(0))
    )


def cross_entropy(model: ms.Model, n_tokens: int) -> Line:
    direction, part = push(model, model.n_layers // 2), max(WINDOW, n_tokens // 10)
    vector, name = direction.vector, direction.site.hook_name

    def loop(prompts: ms.Prompts) -> np.ndarray:
        sums = np.zeros(len(CE_ALPHAS))
        for place, alpha in enumerate(CE_ALPHAS):
            hook = (name, lambda x, hook, alpha=alpha: x + alpha * vector)
            for batch in prompts.tokens.split(16):
                logits = model.hooked.run_with_hooks(batch, fwd_hooks=[hook])[:, :-1]
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
                )
                sums[place] += float(losses.double().sum())
        return sums / (len(prompts) * WINDOW)

    def ours(prompts: ms.Prompts) -> np.ndarray:
        return cross_entropy_curves(model, prompts, {"v": direction}, CE_ALPHAS, progress=False)["ce"].values[0]

    few = windows(model, part)
    ours(few[:1])
    (slow,), (expected,) = turns([lambda: loop(few)], 1)
    found = ours(few)
    (fast,), _ = turns([lambda: ours(windows(model, n_tokens))], 1)
    off = float(np.abs(found - expected).max())
    return Line(
        f"Delta CE, {n_tokens} tokens x 21 alphas / a hooked forward each",
        model.name,
        slow * n_tokens / part,
        fast,
        1.0,
        off,
    )


def peak(name: str, n_tokens: int) -> float:
    """MB that a process of its own takes at most for Delta CE of as many tokens."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, str(n_tokens)], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_here(name: str, n_tokens: int) -> float:
    torch.set_num_threads(1)
    model = load(name)
    cross_entropy_curves(
        model, windows(model, n_tokens), {"v": push(model, model.n_layers // 2)}, CE_ALPHAS, progress=False
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def vectors(model: ms.Model, folder: Any, runs: int) -> tuple[list[Line], list[str]]:
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    # The published recipe's special tokens are the peers' too.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pairs = whole_pairs(model, tokenizer)
    lines, skipped = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not hasattr(np, "float_"):
            np.float_ = np.float64  # type: ignore[attr-defined]
        for name, make in (("steering_vectors", _steering_vectors), ("repeng", _repeng)):
            try:
                package = importlib.import_module(name)
            except ImportError as error:
                skipped.append(f"{name} is not installed ({error}); left out")
                continue
            work, ours, peer = make(package, model, plain, tokenizer, pairs)
            ours()  # builds the packed weights, once for each model
            (fast, *slow), (found, *expected) = turns([ours, *(partial(peer, size) for size in PEER_TEXTS)], runs)
            off = max(float((found - each).abs().max() / found.abs().max()) for each in expected)
            best = min(zip(slow, PEER_TEXTS, strict=True))
            title = f"{work}, {len(pairs)} pairs / {name}, {best[1]} in a batch"
            lines.append(Line(title, model.name, best[0], fast, PEER, off))
    return lines, skipped


def whole_pairs(model: ms.Model, tokenizer: Any) -> list[tuple[str, str]]:
    """Pairs of shipped texts that fit the model's context, each text of the same ids for us as for the peers.

    Peers cut no text. Ours cuts where it is told and where the context ends, and the last token of a text that was cut
    is not the last one of the text.
    """
    joy = shipped()["joy"]
    pairs = [
        pair
        for pair in zip(joy.positives, joy.negatives, strict=True)
        if max(map(len, tokenizer(list(pair))["input_ids"])) <= model.n_ctx
    ]
    texts = [text for pair in pairs for text in pair]
    prompts = model.prompts(texts)
    ids = [row[real].tolist() for row, real in zip(prompts.tokens, prompts.mask, strict=True)]
    assert ids == tokenizer(texts)["input_ids"], "ours and the peers' texts have other ids"
    return pairs


# What is made, by us, and by a peer with so many texts in a batch.
Sides = tuple[str, Callable[[], torch.Tensor], Callable[[int], torch.Tensor]]


def _steering_vectors(package: Any, model: ms.Model, plain: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> Sides:
    positives, negatives = map(list, zip(*pairs, strict=True))

    def ours() -> torch.Tensor:
        found = ms.difference_of_means(
            model, positives, negatives, tokens="last", max_tokens=model.n_ctx, progress=False
        )
        return torch.stack([direction.vector for direction in found.values()])

    def peer(size: int) -> torch.Tensor:
        made = package.train_steering_vector(plain, tokenizer, pairs, batch_size=size, show_progress=False)
        return torch.stack([made.layer_activations[layer] for layer in sorted(made.layer_activations)])

    return "mean differences at all layers", ours, peer


def _repeng(package: Any, model: ms.Model, plain: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> Sides:
    positives, negatives = map(list, zip(*pairs, strict=True))
    data = [package.DatasetEntry(positive=positive, negative=negative) for positive, negative in pairs]
    layers = list(range(model.n_layers - 1))
    sites = [ms.Site("resid_post", layer) for layer in layers]

    def signless(vectors: torch.Tensor) -> torch.Tensor:
        # Its signs are votes of the pairs, ours come from their mean.
        return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()

    def ours() -> torch.Tensor:
        found = ms.pca(model, positives, negatives, sites=sites, max_tokens=model.n_ctx, progress=False)
        return signless(torch.stack([direction.vector for direction in found.values()]))

    def peer(size: int) -> torch.Tensor:
        made = package.ControlVector.train(plain, tokenizer, data, hidden_layers=layers, batch_size=size)
        return signless(torch.from_numpy(np.stack([made.directions[layer] for layer in layers])))

    return "components at all layers but the last", ours, peer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--runs", type=int, default=3, help="turns; the median counts")
    parser.add_argument(
        "--models", nargs="+", default=["stories260K", "pocket"], help="also gpt2-small, its shape with random weights"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of Delta CE")
    parser.add_argument("--cases", type=Path, help="folder that keeps finished cases of choose_alpha.py")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.peak:
        print(json.dumps(peak_here(arguments.peak[0], int(arguments.peak[1]))))
        return 0
    lines: list[Line] = []
    skipped: list[str] = []
    memory: list[tuple[str, float, float]] = []
    for name in arguments.models:
        try:
            model = load(name)
        except ms.ModelLoadError as error:
            skipped.append(f"{name} is not here ({error}); left out")
            continue
        curves: list[Line] = []
        for layer in dict.fromkeys((0, model.n_layers // 2, model.n_layers - 1)):
            curves += curve(model, layer, arguments.runs, middle=layer == model.n_layers // 2)
            print(f"{name}, layer {layer}: curve measured", file=sys.stderr)
        loops = [each for each in curves if each.work.endswith("a hooked forward each")]
        slow, fast, many, few = (
            sum(getattr(each, side) for each in loops) for side in ("peer", "ours", "peer_flops", "our_flops")
        )
        off = max(each.difference for each in loops)
        together = "41 alphas, these layers together / a hooked forward each"
        curves.append(Line(together, model.name, slow, fast, LOOP, off, many, few))
        lines += curves
        if name != "gpt2-small":  # random weights of 124 M parameters, and no tokenizer
            lines.append(cross_entropy(model, arguments.tokens))
            if not memory:  # one model tells: what is kept does not depend on it
                memory.append((name, peak(name, arguments.tokens // 5), peak(name, arguments.tokens)))
            folder = data_path("models", name) if name in ("pocket", "pocket-1l") else STORIES
            found, absent = vectors(model, folder, arguments.runs)
            lines += found
            skipped += absent
        print(f"{name} measured", file=sys.stderr)
    table = Table(title=f"mechsteer.strength, median of {arguments.runs}")
    for column in ("work / peer", "model", "peer, s", "ours, s", "ratio", "operations", "bar", "difference"):
        table.add_column(column)
    missed = False
    for each in lines:
        ratio = each.peer / each.ours
        bad = (each.bar is not None and ratio < each.bar) or not each.difference <= TOLERANCE
        missed |= bad
        table.add_row(
            each.work, each.model, f"{each.peer:.3f}", f"{each.ours:.3f}", f"{ratio:.1f}{' missed' if bad else ''}",
            "" if not each.peer_flops or not each.our_flops else f"{each.peer_flops / each.our_flops:.1f}",
            "" if each.bar is None else f"{each.bar:g}", f"{each.difference:.1e}",
        )  # fmt: skip
    for name, small, large in memory:
        bad = large > GROWTH * small
        missed |= bad
        shown = f"{large / small:.2f} times{' missed' if bad else ''}"
        table.add_row(
            "peak MB of Delta CE, all tokens / a fifth", name, f"{small:.0f}", f"{large:.0f}", shown, "", "", ""
        )
    Console(width=150).print(table)
    for note in dict.fromkeys(skipped):
        print(note)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.check:
        here = Path(__file__).parent
        choice = [
            str(here / "choose_alpha.py"),
            "--check",
            *(["--folder", str(arguments.cases)] if arguments.cases else []),
        ]
        for command in (
            ["-m", "pytest", "-n", "0", str(here.parent / "tests/parity/test_published_strength.py")],
            choice,
        ):
            missed |= subprocess.run([sys.executable, *command]).returncode != 0
    return int(arguments.check and missed)


if __name__ == "__main__":
    sys.exit(main())
