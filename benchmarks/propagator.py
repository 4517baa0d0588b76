"""`mechsteer.propagator` beside PyTorch's ways to a Jacobian, on the same machine, in the same run.

    python benchmarks/propagator.py              # about ten minutes on one core
    python benchmarks/propagator.py --check      # exit status 1 where a bar is missed

A random model of GPT-2 small's shape, 16 tokens, the last position's stream from the first block to behind the last
one. The peers differentiate TransformerLens's forward pass of the whole prompt; each of ours starts from nothing,
its forward passes included. Peers take minutes and run once; ours run `--runs` times, of which the median counts.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from engine import gpt2_small, tokens
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.propagator.identity import identity_pairs
from mechsteer.propagator.operator import Propagator

N_POS, K = 16, 16
SOURCE, TARGET = ("resid_pre", 0), ("resid_post", 11)
# Least ratio of times, and largest relative difference.
BARS = {
    "dense / autograd.functional.jacobian": (10, 1e-5),
    "dense / row by row": (10, 1e-5),
    "top 16 singular values / autograd.functional.jacobian": (20, 0.015),
    "top 16 singular values / our dense": (1, 0.015),
    "identity share of all pairs / each pair on its own": (8, 1e-4),
}


def stream(
    model: ms.Model, prompt: torch.Tensor, source: tuple[str, int] = SOURCE, target: tuple[str, int] = TARGET
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The last position at the target as a function of the same at the source, and its clean argument."""

    def run(x: torch.Tensor) -> torch.Tensor:
        taken = {}

        def put(resid: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.cat([resid[:, :-1], x[None, None]], 1)

        def take(resid: torch.Tensor, hook: Any) -> None:
            taken["y"] = resid[0, -1]

        hooks = [(ms.Site(*source).hook_name, put), (ms.Site(*target).hook_name, take)]
        model.hooked.run_with_hooks(prompt, return_type=None, fwd_hooks=hooks)
        return taken["y"]

    return run, model.run(prompt, record=[source], logits="none").activations[ms.Site(*source)][0, -1]


def row_by_row(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = run(x)
    return torch.stack([torch.autograd.grad(row, x, retain_graph=True)[0] for row in y])


def pairs(model: ms.Model, prompt: torch.Tensor) -> torch.Tensor:
    """c and |R|_F / |J|_F of every span of blocks, one Jacobian after the other [2, span]."""
    spans, eye = itertools.combinations_with_replacement(range(model.n_layers), 2), torch.eye(model.d_model)
    out = []
    for source, target in spans:
        J = Propagator(model, prompt, ("resid_pre", source), ("resid_post", target)).dense()[0]
        c = J.diagonal().mean()
        out.append(torch.stack([c, torch.linalg.matrix_norm(J - c * eye) / torch.linalg.matrix_norm(J)]))
    return torch.stack(out, 1)


def shares(model: ms.Model, prompt: torch.Tensor) -> torch.Tensor:
    found, there = identity_pairs(model, prompt).sel(prompt=0), torch.ones(model.n_layers, model.n_layers).triu() > 0
    return torch.stack([torch.from_numpy(found[name].values)[there] for name in ("c", "rest")])


def timed(work: Callable[[], torch.Tensor], runs: int) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - began)
    return statistics.median(times), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--runs", type=int, default=3, help="turns of ours, of which the median counts")
    arguments = parser.parse_args()
    model = gpt2_small()
    prompt = tokens(model, 1, 0)[:, :N_POS]
    run, x = stream(model, prompt)
    timed(lambda: Propagator(model, prompt, SOURCE, TARGET).mv(x), 1)  # so that nothing is made for the first time
    dense = timed(lambda: Propagator(model, prompt, SOURCE, TARGET).dense()[0], arguments.runs)
    top = timed(lambda: Propagator(model, prompt, SOURCE, TARGET).svd(K).S[0], arguments.runs)
    share = timed(lambda: shares(model, prompt), arguments.runs)
    alone = timed(lambda: pairs(model, prompt), 1)
    rows = timed(lambda: row_by_row(run, x), 1)
    peer = timed(lambda: torch.autograd.functional.jacobian(run, x), 1)  # type: ignore[arg-type, return-value]
    exact = torch.linalg.svdvals(peer[1])[:K]
    off = float(((top[1] - exact).abs() / exact).max())
    found = {
        "dense / autograd.functional.jacobian": (peer[0], dense[0], _difference(dense[1], peer[1])),
        "dense / row by row": (rows[0], dense[0], _difference(dense[1], rows[1])),
        "top 16 singular values / autograd.functional.jacobian": (peer[0], top[0], off),
        "top 16 singular values / our dense": (dense[0], top[0], off),
        "identity share of all pairs / each pair on its own": (alone[0], share[0], _difference(share[1], alone[1])),
    }
    table = Table("work / peer", "peer s", "ours s", "ratio", "bar", "difference", "at most")
    missed = False
    for name, (slow, fast, difference) in found.items():
        bar, most = BARS[name]
        missed |= slow / fast < bar or not difference <= most
        cells = f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.1f}", f"{bar}", f"{difference:.1e}", f"{most:.1e}"
        table.add_row(name, *cells)
    Console(width=120).print(table)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {N_POS} tokens, d_model {model.d_model}")
    return int(arguments.check and missed)


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    sys.exit(main())
