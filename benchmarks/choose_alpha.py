"""`choose_alpha` beside a grid of 41 strengths, fixed strengths and a KL target, on the pocket model.

    python benchmarks/choose_alpha.py                          # eight concepts x six layers, half an hour on a core
    python benchmarks/choose_alpha.py --concepts joy --layers 3
    python benchmarks/choose_alpha.py --check --folder done    # exit status 1 where a bar is missed; cases are kept

The score of a strength is the share of 128 requests whose sampled completion shows the concept, by the labeller, less
`--weight` times the rise of the cross entropy (nats a token) of 16 plain documents:

    score(alpha) = share of completions with the concept - 0.2 * (CE(alpha) - CE(0))

The grid is 0, 0.5, ... 20, up to where nothing is left of language. `choose_alpha` works with the same requests, draws
and documents. A grid point whose cross entropy alone costs more than the best score found so far cannot be the best;
the grid is charged for it, but nothing is generated there, and rivals get the most that it could have.

- *fixed*: each of the grid's strengths, for all concepts and layers; the table shows the best.
- *KL target*: the strength at which the documents' predictions have moved by so many nats, by the KL of all
  strengths on the grid; that number is the one of 41 with which it does best on these very cases.
- *held out*: requests, draws and documents that nothing was chosen on, at the strength that `choose_alpha` chose and at
  the grid's best one.

A forward pass is one prompt through the model once; every generated token is one more.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.objectives import KLFromBaseline, TeacherForcedCE
from mechsteer.pocket.grammar import sample_document, sample_request
from mechsteer.pocket.labeller import label
from mechsteer.prompts import Prompts
from mechsteer.strength.choose import choose_alpha
from mechsteer.strength.concepts import shipped
from mechsteer.strength.vectors import concept_vectors

ALPHAS = [0.5 * step for step in range(41)]
KL_TARGETS = np.geomspace(0.02, 8, 41)
N_REQUESTS, N_TEXTS, N_NEW = 128, 16, 24
WITHIN, CASES, PASSES = 0.05, 0.9, 0.2


class Split:
    """Requests to complete and documents to leave alone, and what steering does to them."""

    def __init__(self, model: ms.Model, name: str, seed: int) -> None:
        rng = random.Random(f"choose_alpha {name}")
        self.model, self.seed = model, seed
        self.requests = Prompts.from_chats([sample_request(rng, "held_out")[0] for _ in range(N_REQUESTS)], model)
        self.texts = model.prompts([sample_document(rng) for _ in range(N_TEXTS)])
        self.kl = KLFromBaseline(model.run(self.texts), where="all")

    def shows(self, concept: str, direction: ms.Direction, alpha: Any, *, draws: int = 0) -> tuple[float, int]:
        """Share of completions with the concept, and the number of generated tokens; `draws` picks other samples."""
        done = self.model.generate(
            self.requests, interventions=[ms.Add(direction, alpha)], max_new_tokens=N_NEW, temperature=0.9,
            seed=self.seed + draws, progress=False,
        )  # fmt: skip
        new = int((done.lengths - self.requests.lengths).sum())
        return float(np.mean([label(text).mood == concept for text in done.completions])), new

    def moves(self, direction: ms.Direction, alphas: list[float]) -> dict[str, np.ndarray]:
        """Rise of the cross entropy, and KL, of the documents."""
        each = sorted({0.0, *alphas})
        swept = ms.sweep(
            self.model, self.texts, axes={"alpha": each}, build=lambda alpha: ms.Add(direction, float(alpha)),
            measure={"ce": TeacherForcedCE(first=0, span="all"), "kl": self.kl}, progress=False,
        )  # fmt: skip
        mean = swept.mean("prompt")
        at = [each.index(alpha) for alpha in alphas]
        return {"ce": (mean["ce"] - mean["ce"][0]).values[at], "kl": mean["kl"].values[at]}


def case(concept: str, direction: ms.Direction, search: Split, held_out: Split, weight: float) -> dict[str, Any]:
    """All numbers of one concept at one layer."""
    moved = search.moves(direction, ALPHAS)
    most = 1 - weight * moved["ce"]
    score = np.full(len(ALPHAS), np.nan)
    tokens = np.full(len(ALPHAS), np.inf)
    for place in [0, *(1 + np.argsort(-most[1:], kind="stable"))]:
        if place == 0 or most[place] >= np.nanmax(score):
            share, tokens[place] = search.shows(concept, direction, ALPHAS[place])
            score[place] = share - weight * moved["ce"][place]
    best = int(np.nanargmax(score))
    # What was left out is charged as the cheapest point that was not.
    generated = np.where(np.isfinite(tokens), tokens, tokens[np.isfinite(tokens)].min())
    texts, requests = int(search.texts.lengths.sum()), int(search.requests.lengths.sum())
    chosen = choose_alpha(
        search.model, direction, search.requests, lambda text: label(text).mood == concept, weight=weight,
        side_prompts=search.texts, max_new_tokens=N_NEW, temperature=0.9, seed=search.seed, progress=False,
    )  # fmt: skip
    alpha = chosen.alpha
    own = search.shows(concept, direction, alpha)[0] - weight * search.moves(direction, [alpha])["ce"][0]
    apart = held_out.moves(direction, [alpha, ALPHAS[best]])["ce"]
    at = np.arange(len(ALPHAS))
    of_prompt = chosen.result["alpha_of_prompt"][0].values
    adaptive: Any = chosen.add(adaptive=True).alpha
    return {
        "grid_alpha": ALPHAS[best],
        "grid_score": float(score[best]),
        "grid_error": float(np.sqrt(max(score[best] + weight * moved["ce"][best], 0) / N_REQUESTS)),
        "zero_score": float(score[0]),
        "grid_passes": int(generated.sum()) + len(at) * N_TEXTS,
        "grid_tokens": int((generated + requests - N_REQUESTS).sum()) + len(at) * texts,
        "alpha": alpha,
        "low": float(chosen.result["low"][0]),
        "high": float(chosen.result["high"][0]),
        "works": bool(chosen.result["works"][0]),
        "score": float(own),
        "passes": chosen.forward_passes,
        "tokens": int(chosen.result["tokens"].sum()),
        "held_score": float(held_out.shows(concept, direction, alpha)[0] - weight * apart[0]),
        "held_grid": float(held_out.shows(concept, direction, ALPHAS[best])[0] - weight * apart[1]),
        "spread": float(np.ptp(of_prompt)),
        "again": [search.shows(concept, direction, each, draws=1000)[0] for each in (alpha, adaptive)],
        "scores": np.where(np.isnan(score), most, score).tolist(),
        "kl": moved["kl"].tolist(),
    }


def rivals(cases: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, str]]:
    """Scores [case] of the best fixed strength and of the best KL target."""
    fixed = np.array([each["scores"] for each in cases])
    by_kl = np.stack([
        [float(np.interp(np.interp(goal, each["kl"], ALPHAS), ALPHAS, each["scores"])) for goal in KL_TARGETS]
        for each in cases
    ])  # fmt: skip
    best, goal = fixed.mean(0).argmax(), by_kl.mean(0).argmax()
    return {
        "fixed": (fixed[:, best], f"alpha = {ALPHAS[best]:g}"),
        "KL": (by_kl[:, goal], f"{KL_TARGETS[goal]:.2g} nats"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--concepts", nargs="+", default=None)
    parser.add_argument("--layers", nargs="+", type=int, default=None)
    parser.add_argument("--weight", type=float, default=0.2, help="of a nat of cross entropy")
    parser.add_argument("--folder", type=Path, default=None, help="keeps finished cases, and goes on from them")
    arguments = parser.parse_args()
    model = ms.load_model("pocket")
    concepts = shipped()
    names = arguments.concepts or list(concepts)
    layers = arguments.layers or list(range(model.n_layers))
    search, held_out = Split(model, "search", 0), Split(model, "held out", 1)
    cases, labels = [], []
    for name in names:
        vectors = None
        for layer in layers:
            kept = arguments.folder and arguments.folder / f"{name}-{layer}-{arguments.weight:g}.json"
            if kept and kept.exists():
                found = json.loads(kept.read_text())
            else:
                vectors = vectors or list(concept_vectors(model, concepts[name], progress=False).values())
                found = case(name, vectors[layer], search, held_out, arguments.weight)
                if kept:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(json.dumps(found))
            cases.append(found)
            labels.append((name, layer))
    missed = report(labels, cases)
    return int(arguments.check and missed)


def report(labels: list[tuple[str, int]], cases: list[dict[str, Any]]) -> int:
    """Print the table and the bars; 1 where one is missed."""

    def column(name: str) -> np.ndarray:
        return np.array([each[name] for each in cases], dtype=float)

    others = rivals(cases)
    heads = ["grid alpha", "score", "chosen alpha", "band", "score", "passes"]
    rules = [f"{name} {which}" for name, (_, which) in others.items()]
    table = Table("concept", "layer", *heads, *rules, "held out", "grid there")
    for place, ((name, layer), each) in enumerate(zip(labels, cases, strict=True)):
        rival = [f"{scores[place]:.3f}" for scores, _ in others.values()]
        said = f"{each['alpha']:.2f}" if each["works"] else "none"
        good = "" if each["score"] >= (1 - WITHIN) * each["grid_score"] else " *"
        table.add_row(
            name, str(layer), f"{each['grid_alpha']:g}", f"{each['grid_score']:.3f}", said,
            f"{each['low']:.2f} to {each['high']:.2f}", f"{each['score']:.3f}{good}",
            f"{each['passes'] / each['grid_passes']:.3f}", *rival, f"{each['held_score']:.3f}",
            f"{each['held_grid']:.3f}",
        )  # fmt: skip
    Console(width=150).print(table)
    within = column("score") >= (1 - WITHIN) * column("grid_score")
    works = column("works") > 0
    passes, tokens = column("passes") / column("grid_passes"), column("tokens") / column("grid_tokens")
    mean = column("score").mean()
    met = {
        f"within {WITHIN:.0%} of the grid's best: {within.mean():.1%} of {len(cases)} cases": within.mean() >= CASES,
        f"forward passes: at most {passes.max():.3f} of the grid's": passes.max() <= PASSES,
        f"tokens run: at most {tokens.max():.3f} of the grid's": tokens.max() <= PASSES,
    }
    for name, (scores, which) in others.items():
        text = f"mean score {mean:.3f}, best {name} ({which}) {scores.mean():.3f}, that within {WITHIN:.0%} in "
        text += f"{(scores >= (1 - WITHIN) * column('grid_score')).mean():.1%}"
        met[text] = mean > scores.mean()
    for text, bar in met.items():
        print(f"{'ok    ' if bar else 'MISSED'}  {text}")
    gap = column("held_score") - column("held_grid")
    error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else np.nan
    print(f"        mean score of the grid's best {column('grid_score').mean():.3f}")
    print(f"        no strength works in {int((~works).sum())} cases, of which {within[~works].sum()} are within")
    print(f"        held out: {column('held_score').mean():.3f}, grid's best there {column('held_grid').mean():.3f}, "
          f"difference {gap.mean():.3f} +- {error:.3f}")  # fmt: skip
    again = np.array([each["again"] for each in cases])
    print(
        f"        other draws: {again[:, 0].mean():.3f} show the concept, {again[:, 1].mean():.3f} with own strengths"
    )
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
