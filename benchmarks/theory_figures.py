"""Draws the theory's figures (3, 4, 5 and B.1 of the paper on steering strength) and prints what they rest on.

    python benchmarks/theory_figures.py out/          # HTML, and PNG where there is a Chromium

The paper gives no settings for them. Here: appendix B.3's data with gamma and omega that vary within a concept,
contrastive sets, a context of the opposite concept, a UFM trained by gradient descent.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import browser, screenshot

import mechsteer.strength.theory as theory
from mechsteer.result import Result


def varied(n_concepts: int, size: int, *, eps: float, seed: int) -> theory.ConceptData:
    """Data of appendix B.3 whose gamma and omega vary by a factor of three within a concept."""
    draws = torch.Generator().manual_seed(seed)
    gamma, omega = (0.5 + torch.rand(n_concepts, size, generator=draws, dtype=torch.float64) for _ in range(2))
    return theory.ConceptData.varied(gamma, omega, eps=eps)


def figures(console: Console) -> dict[str, tuple[Result, dict[str, str]]]:
    """Each figure's name, its Result, and the options it is drawn with."""
    started = time.perf_counter()
    even = theory.ConceptData.smoothed(3, 3, eps=0.05)
    trained = theory.UFM.train(even)
    console.print(
        f"G = 3, s = 3, eps = 0.05: entropy {even.entropy:.7f}, trained to {trained.cross_entropy(even):.7f} nats in "
        f"{time.perf_counter() - started:.2f} s; largest error of a probability {trained.error(even):.1e}"
    )
    two, three = varied(2, 4, eps=0.3, seed=46), varied(3, 3, eps=0.05, seed=0)
    pair, triple = two.sets(0, opposite=1), three.sets(0, opposite=1)
    one, other = theory.UFM.train(two), theory.UFM.train(three)
    context, outside = len(two.contexts) - 1, len(three.contexts) // 2
    up, down, wide = (torch.linspace(*ends, 241, dtype=torch.float64) for ends in ((0, 8), (-8, 0), (-2, 2)))
    tokens = {"colour": "role"}
    made = {
        "figure-3-tokens": (theory.probability_increase(pair, up, context=context, ufm=one), tokens),
        "figure-4-concepts": (theory.concept_increase(triple, wide, context=outside, ufm=other), {"colour": "shape"}),
        "figure-5-cross-entropy": (theory.cross_entropy_increase(triple, wide / 4, ufm=other), {}),
        "figure-B1-tokens-negative": (theory.probability_increase(pair, down, context=context, ufm=one), tokens),
    }
    peaks = made["figure-3-tokens"][0]["peak"]
    console.print(f"peaks of tokens (figures 3 and B.1): {', '.join(f'{each:.3f}' for each in peaks.values)}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder; made if it is not there")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name, (result, options) in figures(console).items():
        page = out / f"{name}.html"
        result.plot(title=name, **options).update_layout(width=760, height=420, font_family="sans-serif").write_html(
            page
        )
        if browser() is not None:
            screenshot(page, page.with_suffix(".png"), width=780, height=440)
        console.print(f"wrote {page}")


if __name__ == "__main__":
    main()
