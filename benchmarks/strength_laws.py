"""The laws of steering strength on models that ship: the figures of "Towards Understanding Steering Strength" in kind.

    python benchmarks/strength_laws.py                        # three models, about ten minutes on one core
    python benchmarks/strength_laws.py --models pocket --out runs/laws

Eight concepts, an early, a middle and a late layer. Strengths are in lengths of the residual stream: at 1 the push is
as long as the stream at that layer, on average over the contexts. Printed and written to `laws.json`, with the curves
beside it as Results:

- tokens (theorem 3.3): the shapes of Delta p for the tokens that are likeliest at the far end of positive strengths;
  and how often a target token peaks later than an off-target one
- concepts (theorem 3.6): whether Delta p of the concept steered to rises, and whether it is a sigmoid: explained to
  95 % by a logistic curve, and better than 95 % of random smooth rising curves are
- cross entropy (theorem 3.8): whether it bends up at 0; whether a parabola with its vertex at 0 explains 95 % of it up
  to a tenth; how far one explains 95 % of its even part (the mean of both signs, which has no slope); and whether there
  is a slope, on text that the model drew itself (for which it is perfectly trained: assumption 2) and on given text
- the limit (proposition 4.1): the distance's rate, and the plateau of the cross entropy, predicted without a run
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.pocket.grammar import sample_document
from mechsteer.strength.concepts import negatives_from, shipped
from mechsteer.strength.cross_entropy import cross_entropy_curves, text_windows
from mechsteer.strength.curves import concept_curves, token_curves
from mechsteer.strength.limits import ce_plateau, limit_curves
from mechsteer.strength.shapes import SHAPES, curve_shape, fit_sigmoid, local_quadratic, quadratic_radius
from mechsteer.strength.vectors import concept_vectors, note

STORIES = Path(__file__).parents[2] / "shared/models/stories260K"
GIVEN_STORIES = Path(__file__).parents[2] / "shared/data/tinystories_1000.json"
FAR, TOP = 4.0, 8
# Within this strength the parabola of theorem 3.8 is fitted.
NEAR = 0.1
# A token that never gets this likely is left out of the order of peaks.
SEEN = 1e-3


def load(name: str) -> ms.Model:
    return ms.load_model(STORIES if name == "stories260K" else name)


def layers_of(model: ms.Model) -> dict[str, int]:
    """Early, middle and late; a model with one layer has a late one only."""
    if model.n_layers == 1:
        return {"late": 0}
    return {"early": 0, "middle": model.n_layers // 2, "late": model.n_layers - 1}


def given_texts(model: ms.Model, n: int) -> list[str]:
    if model.name == "stories260K":
        return json.loads(GIVEN_STORIES.read_text())[:n] if GIVEN_STORIES.exists() else []
    rng = random.Random("laws")
    return [sample_document(rng) for _ in range(n)]


def scaled(model: ms.Model, vectors: dict[str, ms.Direction], contexts: ms.Prompts) -> dict[str, ms.Direction]:
    """The directions, as long as the stream is on average where they are added."""
    stream = model.run(contexts, record="resid_post", logits="none").activations
    lengths = {
        layer: float(stream[ms.Site("resid_post", layer)][contexts.mask].norm(dim=-1).mean())
        for layer in {direction.site.layer for direction in vectors.values()}
    }
    return {name: each * (lengths[each.site.layer] / each.norm) for name, each in vectors.items()}


def token_laws(curves: ms.Result, target: list[int]) -> dict[str, Any]:
    """Of one direction: shapes of the tokens that are likeliest at the far end, and the order of peaks."""
    ids, alphas = curves["token"].values, curves["alpha"].values
    shapes: Counter[str] = Counter()
    later = pairs = 0.0
    belongs = np.isin(ids, target)
    for prompt in range(curves["p"].sizes["prompt"]):
        p = curves["p"].values[0, :, :, prompt]
        shapes.update(curve_shape(p[:, place]) for place in np.flatnonzero(curves["is_top_high"].values[0, :, prompt]))
        peaks, seen = alphas[p.argmax(0)], p.max(0) > SEEN
        apart = peaks[belongs & seen][:, None] - peaks[~belongs & seen][None]
        later += float((apart > 0).sum() + (apart == 0).sum() / 2)
        pairs += apart.size
    top = ids[curves["is_top_high"].values[0].any(1)]
    return {
        **{shape: shapes[shape] for shape in SHAPES}, "tokens": shapes.total(),
        "later": later / pairs if pairs else float("nan"), "own": float(np.isin(top, target).mean()),
    }  # fmt: skip


def concept_laws(curves: ms.Result) -> list[dict[str, Any]]:
    rows, alphas = [], curves["alpha"].values
    for d, concept in enumerate(curves["concept"].values):
        p = curves["p"].sel(token_set=concept).values[d].mean(-1)
        fit = fit_sigmoid(alphas, p)
        rows.append({
            "shape": curve_shape(p), "rises": p[-1] > p[0], "r2": fit.r2, "monotone_r2": fit.monotone_r2,
            "p_value": fit.p_value, "sigmoid": bool(fit.r2 >= 0.95 and fit.high > fit.low),
            "beats_null": bool(fit.p_value <= 0.05 and fit.high > fit.low), "centre": fit.centre, "width": fit.width,
        })  # fmt: skip
    return rows


def ce_laws(curves: ms.Result) -> list[dict[str, Any]]:
    rows, alphas = [], curves["alpha"].values
    edge = int(np.abs(alphas - NEAR).argmin())
    for delta, error in zip(curves["delta_ce"].values, curves["delta_ce_se"].values, strict=True):
        fit = local_quadratic(alphas, delta, radius=NEAR)
        rows.append({
            "curvature": fit.curvature, "asymmetry": fit.asymmetry, "r2": fit.r2, "r2_with_linear": fit.r2_with_linear,
            "radius": quadratic_radius(alphas, (delta + delta[::-1]) / 2), "lowest": float(alphas[delta.argmin()]),
            # The slope over its standard error over windows.
            "slope_z": fit.linear * NEAR / error[edge],
        })  # fmt: skip
    return rows


def near_grid() -> list[float]:
    """Fine near 0 and coarse far from it."""
    near = np.linspace(0, NEAR, 5)[1:]
    far = np.geomspace(NEAR, FAR, 9)[1:]
    return [*(-far[::-1]), *(-near[::-1]), 0.0, *near, *far]


def measure(name: str, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    model = load(name)
    concepts = list(shipped().values())[: arguments.concepts]
    # As ids: text that is tokenised again is no longer drawn from the model.
    start = ms.Prompts.from_ids([[model.tokenizer.bos_token_id]] * arguments.texts, tokenizer=model)
    own = model.generate(start, max_new_tokens=100, temperature=1.0, seed=1, progress=False)
    # What a model writes stands for its contexts too: the first 12 tokens of other texts.
    begun = negatives_from(model, arguments.contexts, max_new_tokens=12, top_p=1.0, seed=2, progress=False)
    contexts = ms.Prompts.from_strings(list(begun), model)
    targets = {each.name: each.token_ids(model, against=concepts) for each in concepts}
    places = layers_of(model)
    vectors = concept_vectors(model, concepts, layers=places.values(), progress=False)
    vectors = scaled(model, vectors, contexts)
    grid = np.linspace(-FAR, FAR, arguments.alphas).tolist()
    options: dict[str, Any] = {"progress": False}
    # One direction at a time: curves of a token are of use where it is among the likeliest.
    tokens = {
        name: token_curves(model, contexts, {name: each}, grid, top=TOP, **options) for name, each in vectors.items()
    }
    concept_of = [note(direction, "concept") for direction in vectors.values()]
    sets = concept_curves(model, contexts, vectors, grid, targets, **options)
    results = {f"tokens, {name}": each for name, each in tokens.items()} | {"concepts": sets}
    found: dict[str, list[dict[str, Any]]] = {
        "tokens": [token_laws(each, targets[name]) for each, name in zip(tokens.values(), concept_of, strict=True)],
        "concepts": concept_laws(sets),
    }
    for kind, texts in (("own text", own), ("given text", given_texts(model, arguments.texts))):
        if len(texts):
            windows = texts if isinstance(texts, ms.Prompts) else text_windows(model, texts, window=100)
            windows = windows[: arguments.texts]
            results[kind] = cross_entropy_curves(model, windows, vectors, near_grid(), **options)
            found[kind] = ce_laws(results[kind])
            plateau = ce_plateau(model, windows, vectors, 100 * FAR, **options)
            found[f"{kind}, plateau"] = [
                {
                    "measured": plateau["delta_ce"].values[d].tolist(),
                    "predicted": plateau["predicted"].values[d].tolist(),
                }
                for d in range(len(vectors))
            ]
    limits = limit_curves(model, contexts, vectors, [side * x for x in np.geomspace(1, 1000, 16) for side in (-1, 1)])
    results["limits"] = limits
    found["limits"] = [
        {"rate": limits["rate"].values[d].tolist(), "far": float(limits["distance"].sel(alpha=[-1000, 1000])[d].mean())}
        for d in range(len(vectors))
    ]
    for kind, result in results.items():
        result.save(out / model.name / f"{kind}.safetensors")
    names = {layer: place for place, layer in places.items()}
    where = [each.site.layer for each in vectors.values()]
    return {
        "model": model.name,
        "rows": [
            {
                "concept": concept,
                "layer": layer,
                "place": names[layer],
                **{kind: rows[d] for kind, rows in found.items()},
            }
            for d, (layer, concept) in enumerate(zip(where, concept_of, strict=True))
        ],
    }


def tables(reports: list[dict[str, Any]]) -> list[Table]:
    made = {
        "Tokens (theorem 3.3): shapes of the likeliest at the far end": [
            "model", "layer", "tokens", *SHAPES, "target peaks later", "top is target"
        ],
        "Concepts (theorem 3.6): the concept steered to": [
            "model", "layer", "curves", "rises", "monotone 95 %", "sigmoid 95 %", "beats the null", "not so"
        ],
        "Cross entropy (theorem 3.8)": [
            "model", "layer", "text", "curves", "bends up", "parabola 95 %", "with slope 95 %", "slope's share",
            "radius, even part", "slope beyond 3 se", "lowest at 0"
        ],
        "Limit (proposition 4.1)": [
            "model", "layer", "rate", "distance at 1000", "plateau off by, nats", "worst", "of plateau, nats"
        ],
    }  # fmt: skip
    shown = {title: Table(*columns, title=title) for title, columns in made.items()}
    first, second, third, fourth = shown.values()
    for report in reports:
        for place in dict.fromkeys(row["place"] for row in report["rows"]):
            rows = [row for row in report["rows"] if row["place"] == place]
            head = (report["model"], f"{place} ({rows[0]['layer']})")
            cells = [row["tokens"] for row in rows]
            first.add_row(
                *head, str(sum(c["tokens"] for c in cells)), *(str(sum(c[shape] for c in cells)) for shape in SHAPES),
                f"{np.nanmean([c['later'] for c in cells]):.2f}", f"{np.mean([c['own'] for c in cells]):.2f}",
            )  # fmt: skip
            cells = [row["concepts"] for row in rows]
            fails = [row["concept"] for row in rows if not row["concepts"]["sigmoid"]]
            second.add_row(
                *head, str(len(cells)), str(sum(bool(c["rises"]) for c in cells)),
                str(sum(c["monotone_r2"] >= 0.95 for c in cells)), str(sum(c["sigmoid"] for c in cells)),
                str(sum(c["beats_null"] for c in cells)), ", ".join(fails),
            )  # fmt: skip
            for kind in ("own text", "given text"):
                if kind in rows[0]:
                    cells = [row[kind] for row in rows]
                    third.add_row(
                        *head, kind, str(len(cells)), str(sum(c["curvature"] > 0 for c in cells)),
                        str(sum(c["r2"] >= 0.95 for c in cells)), str(sum(c["r2_with_linear"] >= 0.95 for c in cells)),
                        f"{np.median([c['asymmetry'] for c in cells]):.2f}",
                        f"{np.median([c['radius'] for c in cells]):.2f}",
                        str(sum(abs(c["slope_z"]) > 3 for c in cells)), str(sum(c["lowest"] == 0 for c in cells)),
                    )  # fmt: skip
            off = [
                abs(m - p)
                for row in rows
                for m, p in zip(
                    row["own text, plateau"]["measured"], row["own text, plateau"]["predicted"], strict=True
                )
            ]
            fourth.add_row(
                *head, f"{np.median([row['limits']['rate'] for row in rows]):.2f}",
                f"{np.mean([row['limits']['far'] for row in rows]):.4f}", f"{np.mean(off):.4f}", f"{max(off):.4f}",
                f"{np.mean([row['own text, plateau']['measured'] for row in rows]):.2f}",
            )  # fmt: skip
    return list(shown.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pocket", "pocket-1l", "stories260K"])
    parser.add_argument("--out", type=Path, default=Path("runs/strength-laws"), help="folder for counts and curves")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--texts", type=int, default=64, help="texts of about 100 tokens for the cross entropy")
    parser.add_argument("--alphas", type=int, default=161)
    arguments = parser.parse_args()
    reports = []
    for name in arguments.models:
        if name == "stories260K" and not STORIES.exists():
            print("stories260K is not here; left out", file=sys.stderr)
            continue
        reports.append(measure(name, arguments, arguments.out))
        print(f"{name} measured", file=sys.stderr)
    console = Console(width=150)
    for table in tables(reports):
        console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "laws.json").write_text(json.dumps(reports, indent=1, default=lambda value: value.item()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
