"""`mechsteer.sweep` beside TransformerLens on the same machine, in the same run.

    python benchmarks/engine.py                  # every model, median of 5
    python benchmarks/engine.py --check          # exit status 1 where a bar is missed
    python benchmarks/engine.py --models pocket stories260K --runs 3

Each line is one piece of work done three ways, turn by turn: TransformerLens's own function (or the plain loop that
its users write), a loop with one hooked forward pass per cell, and `sweep`. What is printed is the ratio of the
medians; the largest difference between the values, over the largest of them where that is above 1; and the
floating-point operations that `sweep` did over the least that the cells' own layers and positions need.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TQDM_DISABLE"] = "1"  # get_act_patch_resid_pre would draw a bar for every turn

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens import ActivationCache, HookedTransformer, HookedTransformerConfig, patching

import mechsteer as ms

N_POS = 32
ALPHAS = torch.linspace(-20, 20, 41).tolist()
N_PROMPTS = 16
# Least ratio and aim, against the peer.
BARS = {"layer x position map": (12, 20), "41 alphas, all positions": (3, 6), "41 alphas, last position": (12, 25)}
TOLERANCE = 1e-5


class Outcome(NamedTuple):
    work: str
    model: str
    peer: float
    loop: float
    ours: float
    difference: float
    flops: float


def gpt2_small() -> ms.Model:
    """A random model of GPT-2 small's shape: 12 layers, d_model 768, 50257 tokens."""
    cfg = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257, act_fn="gelu_new",
        normalization_type="LN", seed=0, model_name="random GPT-2 small", device="cpu",
    )  # fmt: skip
    return ms.Model(HookedTransformer(cfg).eval(), name="random GPT-2 small")


def load(name: str) -> ms.Model:
    if name == "gpt2-small":
        return gpt2_small()
    if name == "stories260K":
        return ms.load_model(Path(__file__).parents[2] / "shared/models/stories260K")
    return ms.load_model(name)


def tokens(model: ms.Model, batch: int, seed: int) -> torch.Tensor:
    """Random tokens [batch, 32]."""
    return torch.randint(4, model.d_vocab, (batch, N_POS), generator=torch.Generator().manual_seed(seed))


def layer_by_position(model: ms.Model) -> tuple[Callable[[], Any], ...]:
    """Residual-stream patching of every layer and position, as a logit difference at the last token."""
    corrupt, clean = tokens(model, 1, 0), tokens(model, 1, 1)
    hooked = model.hooked
    _, cache = hooked.run_with_cache(clean)
    recorded = model.run(clean, record="resid_pre", logits="none").activations
    sites = [ms.Site("resid_pre", layer) for layer in range(model.n_layers)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 5] - logits[0, -1, 9]

    def peer() -> torch.Tensor:
        return patching.get_act_patch_resid_pre(hooked, corrupt, ActivationCache(dict(cache.items()), hooked), metric)

    def loop() -> torch.Tensor:
        out = torch.zeros(model.n_layers, N_POS)
        for layer in range(model.n_layers):
            name = f"blocks.{layer}.hook_resid_pre"
            for pos in range(N_POS):

                def patch(resid: torch.Tensor, hook: Any, name: str = name, pos: int = pos) -> torch.Tensor:
                    resid[:, pos] = cache[name][:, pos]
                    return resid

                out[layer, pos] = metric(hooked.run_with_hooks(corrupt, fwd_hooks=[(name, patch)]))
        return out

    def ours() -> torch.Tensor:
        return sweep(
            model,
            corrupt,
            axes={"layer": range(model.n_layers), "pos": range(N_POS)},
            build=lambda layer, pos: ms.Replace(sites[layer], recorded, at=pos),
            measure=ms.LogitGap([5], [9]),
        )[..., 0]

    return peer, loop, ours


def alphas(model: ms.Model, at: int | None) -> tuple[Callable[[], Any], ...]:
    """41 strengths of a vector at the middle layer on 16 prompts: one token's probability at the last position."""
    prompts, layer = tokens(model, N_PROMPTS, 2), model.n_layers // 2
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 0.1
    pushed = vector.to(model.device, model.dtype)
    direction = ms.Direction(vector[None], site=ms.Site("resid_post", layer), model=None, origin={})
    name = f"blocks.{layer}.hook_resid_post"

    def peer() -> torch.Tensor:
        rows = []
        for alpha in ALPHAS:

            def add(resid: torch.Tensor, hook: Any, alpha: float = alpha) -> torch.Tensor:
                if at is None:
                    return resid + alpha * pushed
                resid[:, at] = resid[:, at] + alpha * pushed
                return resid

            logits = model.hooked.run_with_hooks(prompts, fwd_hooks=[(name, add)])
            rows.append(logits[:, -1].softmax(-1)[:, 5])
        return torch.stack(rows)

    def ours() -> torch.Tensor:
        return sweep(
            model,
            prompts,
            axes={"alpha": ALPHAS},
            build=lambda alpha: ms.Add(direction, alpha, at=at),
            measure=ms.TokenProb([5]),
        )

    return peer, peer, ours


_flops: list[float] = []  # of the last sweep: done, and the least that its cells need


def operations() -> float:
    """Floating-point operations of the last sweep."""
    return _flops[0]


def sweep(model: ms.Model, prompts: torch.Tensor, **options: Any) -> torch.Tensor:
    result = ms.sweep(model, prompts, progress=False, **options)
    done = result.provenance["options"]
    _flops[:] = [done["flops"], done["least_flops"]]
    (name,) = result.data.data_vars
    return torch.from_numpy(result[str(name)].values)


def measure(work: str, model: ms.Model, sides: tuple[Callable[[], Any], ...], runs: int) -> Outcome:
    """Medians over `runs` turns, in each of which every side runs once."""
    times: list[list[float]] = [[], [], []]
    values: list[torch.Tensor] = [torch.empty(0)] * 3
    peer, loop, ours = sides
    ours()  # builds the packed weights, once per model
    for _ in range(runs):
        for place, side in enumerate(sides):
            if place == 1 and loop is peer:
                times[1].append(times[0][-1])
                continue
            began = time.perf_counter()
            values[place] = side()
            times[place].append(time.perf_counter() - began)
    # On the scale of the values, with which the fp32 rounding of both sides grows.
    expected = values[0].cpu().float()
    difference = float((values[2] - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return Outcome(work, model.name, *(statistics.median(each) for each in times), difference, _flops[0] / _flops[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--runs", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--models", nargs="+", default=["stories260K", "pocket", "gpt2-small"])
    arguments = parser.parse_args()
    outcomes = []
    torch.set_grad_enabled(False)
    for name in arguments.models:
        model = load(name)
        works = {
            "layer x position map": layer_by_position(model),
            "41 alphas, all positions": alphas(model, None),
            "41 alphas, last position": alphas(model, -1),
        }
        for work, sides in works.items():
            outcomes.append(measure(work, model, sides, arguments.runs))
            print(f"{name}: {work} measured", file=sys.stderr)
    table = Table(title=f"sweep against TransformerLens, median of {arguments.runs}")
    for column in (
        "work",
        "model",
        "peer, s",
        "sweep, s",
        "ratio",
        "to a loop",
        "bar",
        "aim",
        "difference",
        "FLOP / least",
    ):
        table.add_column(column)
    missed = False
    for each in outcomes:
        least, aim = BARS[each.work]
        ratio = each.peer / each.ours
        bad = ratio < least or not each.difference <= TOLERANCE
        missed |= bad
        table.add_row(
            each.work, each.model, f"{each.peer:.3f}", f"{each.ours:.4f}", f"{ratio:.1f}{' missed' if bad else ''}",
            f"{each.loop / each.ours:.1f}", str(least), str(aim), f"{each.difference:.1e}", f"{each.flops:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    return int(arguments.check and missed)


if __name__ == "__main__":
    sys.exit(main())
