"""From a target to words on the pocket model: the stages of `match_prefix` beside HotFlip and GCG.

    python benchmarks/prefix_stages.py --folder cases                # 6 teachers x 10 seeds, about two hours on a core
    python benchmarks/prefix_stages.py --teachers 1 --seeds 2        # three minutes
    python benchmarks/prefix_stages.py --folder cases --check        # exit status 1 where a bar is missed
    python benchmarks/prefix_stages.py --folder cases --markdown     # the tables of the documentation

Two commands on one folder share the work: a case that one of them has begun, the other passes over.

A case is a teacher's instruction and a seed. The seed draws requests of the pocket grammar: 12 to search on, 6 that say
when the soft prefix stops, 18 held out. The reference completions are the likeliest tokens with the instruction, as in
"Steering Prefix Generation"; there a prefix that makes the model surer of itself predicts them better than the
reference does. With `--sampled` they are drawn at temperature 1: no prefix can then be expected to predict them better
than the reference, whose cross entropy is the model's own entropy.

- *soft*, *projected*: embeddings by gradient descent, and their nearest tokens one by one. They begin as random tokens,
  and end not far from them. With `--init mean` they begin at the mean embedding, which projects better.
- *refined*: the chain of that document, HotFlip from the projected prefix.
- *beam*, *final*: ours, a beam over the soft prefix and a search from there.
- *hotflip*, *gcg*: the two alone, from random tokens.

Forbidden are the instruction's own words of more than three letters and all names of its topic, in every casing, as
parts of words, and in pieces; and all that is not ASCII. Every method searches under these constraints, for as many
tokens, and evaluates as many candidates; ours counts its projection and its beam among them. A soft prefix costs time
besides, which HotFlip and GCG alone do not spend: the seconds of each are printed.

Loss is the cross entropy of section 2.3 of that document, in nats a token. The gap closed is
(projected - final) / (projected - soft), there 50 %.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.judges import judge_of, telltale_words
from mechsteer.pocket.grammar import sample_request
from mechsteer.prefix import Constraints, RoundTrip, match_prefix, search_prefix
from mechsteer.prefix.candidates import CandidateLosses
from mechsteer.vocabulary import insert

TEACHERS = (
    "Talk only about cats.", "Nothing but trains, please.", "Your only subject is music.", "Make it all about chess.",
    "Keep to the weather.", "Sound gloomy.",
)  # fmt: skip
STAGES = ("reference", "soft", "projected", "refined", "beam", "final", "hotflip", "gcg")
PURE = ("hotflip", "gcg")
RIVALS = ("refined", *PURE)
N_TOKENS, EVALUATIONS, SOFT_STEPS, N_RESTARTS, BEAM, TOP_K = 6, 400, 100, 3, 3, 8
SIZES = {"search": 12, "validation": 6, "held out": 18}
N_NEW, N_JUDGED = 16, 40
# Seconds after which a case that was begun and not finished is taken to be abandoned.
ABANDONED = 1800
CLOSED, WON, ADHERENCE = 0.9, 0.9, 0.9
CE = ms.TeacherForcedCE()


class Case:
    """Requests of a seed, with the completions that the teacher brings about."""

    def __init__(self, model: ms.Model, teacher: str, seed: int, *, sampled: bool = False) -> None:
        rng = random.Random(f"prefix stages {seed}")
        self.model, self.teacher, self.seed = model, teacher, seed
        texts = list(dict.fromkeys(sample_request(rng, "held_out")[0] for _ in range(200)))
        self.requests: dict[str, list[str]] = {}
        for name, count in SIZES.items():
            self.requests[name], texts = texts[:count], texts[count:]
        self.judge = judge_of(teacher)
        self.prompts = {name: self._completed(name, sampled) for name in SIZES}
        prefixed = ms.Prompts.from_chats(self.requests["search"][:1], model, prefix=teacher)
        self.reference = tuple(prefixed.tokens[0][prefixed.span("prefix")[0]].tolist())

    def _completed(self, name: str, sampled: bool) -> ms.Prompts:
        prefixed = ms.Prompts.from_chats(self.requests[name], self.model, prefix=self.teacher)
        how = {"temperature": 1.0 if sampled else 0.0, "seed": 1000 * self.seed + list(SIZES).index(name)}
        done = self.model.generate(prefixed, max_new_tokens=N_NEW, progress=False, **how)
        ids = [row[keep].tolist() for row, keep in zip(done.tokens, done.span("completion"), strict=True)]
        return ms.Prompts.from_chats(self.requests[name], self.model, slots=N_TOKENS).with_completions(ids)

    def adherence(self, ids: Sequence[int]) -> float:
        """Share of held-out requests whose greedy completion shows the behaviour."""
        plain = self.prompts["held out"].without_completions()
        done = self.model.generate(
            insert(plain, ids, where="prefix"), max_new_tokens=N_JUDGED, progress=False
        )  # fmt: skip
        assert self.judge is not None
        return float(self.judge.many(done.completions).mean())


def run(case: Case, init: str) -> dict[str, Any]:
    """All methods on one case."""
    model, prompts = case.model, case.prompts
    keep = Constraints(forbidden_words=telltale_words(case.teacher), characters="ascii")
    began = time.perf_counter()
    match = match_prefix(
        model, prompts["search"], CE, evaluations=EVALUATIONS, soft_steps=SOFT_STEPS, n_restarts=N_RESTARTS, init=init,
        beam=BEAM, top_k=TOP_K, constraints=keep, validation=prompts["validation"], held_out=prompts["held out"],
        seed=case.seed, progress=False,
    )  # fmt: skip
    losses = {name: CandidateLosses(model, prompts[name], CE) for name in ("search", "held out")}
    stages = match.stages.data
    made = dict(match.stages.provenance["options"]["ids"])
    found: dict[str, Any] = {
        "search": dict(zip(stages.stage.values.tolist(), stages["loss"].values.tolist(), strict=True)),
        "held out": dict(zip(stages.stage.values.tolist(), stages["held_out_loss"].values.tolist(), strict=True)),
        "text": {"final": match.text}, "evaluated": int(stages["evaluated"].sum()),
        "soft steps": match.soft.history.data.sizes["step"] - 1, "seconds": {"ours": time.perf_counter() - began},
    }  # fmt: skip
    made["reference"] = case.reference
    for method in RIVALS:
        began = time.perf_counter()
        start = made["projected"] if method == "refined" else None
        pure = search_prefix(
            model, prompts["search"], CE, method="gcg" if method == "gcg" else "hotflip", start=start,
            n_tokens=N_TOKENS, evaluations=EVALUATIONS, constraints=keep, seed=case.seed, progress=False,
        )  # fmt: skip
        made[method], found["text"][method] = pure.ids, pure.text
        found["seconds"][method] = time.perf_counter() - began
    for name in ("reference", *RIVALS):
        for split, each in losses.items():
            found[split][name] = float(each.of([tuple(made[name])])[0])
    named = ("reference", "projected", "final", *RIVALS)
    found["adherence"] = {name: case.adherence(made[name]) for name in named}
    found["adherence"]["none"] = case.adherence(())
    trip = RoundTrip(prompts["held out"])
    found["survives"] = {name: sum(trip.survives(tuple(made[name]))) for name in ("final", *RIVALS)}
    found["violation"] = keep.violation(match.ids, trip.text(match.ids))
    found["requests"] = len(prompts["held out"])
    return found


def cases(arguments: argparse.Namespace, model: ms.Model) -> dict[tuple[str, int], dict[str, Any]]:
    """Those asked for; finished ones are read from the folder."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    kind = f"{'sampled' if arguments.sampled else 'greedy'}-{arguments.init.split()[0]}"
    for seed in range(arguments.seeds):
        for number, teacher in enumerate(TEACHERS[: arguments.teachers]):
            kept = arguments.folder and arguments.folder / f"{kind}-{number}-{seed}.json"
            if kept and not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                begun = kept.with_suffix(".begun")
                if begun.exists() and time.time() - begun.stat().st_mtime < ABANDONED:
                    continue
                begun.touch()
            if kept and kept.exists():
                found[teacher, seed] = json.loads(kept.read_text())
                continue
            one = found[teacher, seed] = run(Case(model, teacher, seed, sampled=arguments.sampled), arguments.init)
            line = " ".join(f"{name} {one['search'][name]:.3f}" for name in STAGES)
            print(f"{teacher} seed {seed}: {line} {one['text']['final']!r}", file=sys.stderr, flush=True)
            if kept:
                fresh = kept.with_suffix(".tmp")
                fresh.write_text(json.dumps(one, indent=1))
                os.replace(fresh, kept)
    return found


def closed(one: dict[str, Any], split: str = "search", by: str = "final") -> float:
    """The share of the hardening gap that is closed."""
    soft, projected, final = (one[split][name] for name in ("soft", "projected", by))
    return (projected - final) / (projected - soft) if projected > soft else float("nan")


def report(found: dict[tuple[str, int], dict[str, Any]], markdown: bool) -> int:
    """Print the tables and the bars; 1 where one is missed."""
    stages = [["stage", "search mean ± sd", "min", "max", "held out mean ± sd", "held out adherence"]]
    for name in STAGES:
        search, held = (np.array([one[split][name] for one in found.values()]) for split in ("search", "held out"))
        shows = [one["adherence"].get(name) for one in found.values()]
        share = f"{np.mean([each for each in shows if each is not None]):.1%}" if None not in shows else ""
        stages.append(
            [name, f"{search.mean():.3f} ± {search.std():.3f}", f"{search.min():.3f}", f"{search.max():.3f}",
             f"{held.mean():.3f} ± {held.std():.3f}", share]
        )  # fmt: skip
    heads = ["teacher", "gap closed, median", "held out", "final", *RIVALS, "below hotflip and gcg", "fall to held out",
             "adherence", "of the reference's"]  # fmt: skip
    rows = [heads]
    teachers = list(dict.fromkeys(teacher for teacher, _ in found))
    won: dict[str, list[bool]] = {}
    for teacher in teachers:
        own = [one for (name, _), one in found.items() if name == teacher]
        won[teacher] = [one["search"]["final"] < min(one["search"][name] for name in PURE) for one in own]
        shows, reference = (np.mean([one["adherence"][name] for one in own]) for name in ("final", "reference"))
        fall = np.mean([one["held out"]["final"] - one["search"]["final"] for one in own])
        rows.append(
            [teacher, f"{np.nanmedian([closed(one) for one in own]):.0%}",
             f"{np.nanmedian([closed(one, 'held out') for one in own]):.0%}",
             *(f"{np.mean([one['search'][name] for one in own]):.3f}" for name in ("final", *RIVALS)),
             f"{sum(won[teacher])} of {len(own)}", f"{fall:+.3f}", f"{shows:.1%}", f"{shows / reference:.0%}"]
        )  # fmt: skip
    for table in (stages, rows):
        show(table, markdown)
    every = list(found.values())
    shares, held = [closed(one) for one in every], [closed(one, "held out") for one in every]
    rise = {name: np.mean([one["held out"][name] - one["search"][name] for one in every]) for name in STAGES}
    ratio = np.mean([one["adherence"]["final"] for one in every]) / np.mean(
        [one["adherence"]["reference"] for one in every]
    )
    wins = np.mean([each for group in won.values() for each in group])
    seeds = {seed: [one for (_, at), one in found.items() if at == seed] for _, seed in found}
    below = [
        all(np.mean([one["search"]["final"] - one["search"][name] for one in own]) < 0 for name in PURE)
        for own in seeds.values()
    ]
    means = [np.mean([one["search"][name] for one in every]) for name in ("soft", "final", "projected")]
    survives = all(one["survives"]["final"] == one["requests"] for one in every)
    met = {
        "soft < final < projected: " + " < ".join(f"{mean:.3f}" for mean in means): means == sorted(means),
        f"hardening gap closed, median of {len(every)}: {np.nanmedian(shares):.1%} (quartiles "
        f"{np.nanquantile(shares, 0.25):.1%} and {np.nanquantile(shares, 0.75):.1%})": np.nanmedian(shares) >= CLOSED,
        f"final below HotFlip and GCG at {EVALUATIONS} candidates, mean over teachers: {sum(below)} of {len(below)} "
        "seeds": np.mean(below) >= WON,
        f"adherence of the final prefix on held-out requests: {ratio:.1%} of the reference's": ratio >= ADHERENCE,
        "every final prefix survives in every held-out prompt": survives,
        "no final prefix breaks the constraints": not any(one["violation"] for one in every),
    }
    for text, bar in met.items():
        print(f"{'ok    ' if bar else 'MISSED'}  {text}")
    refined = [closed(one, by="refined") for one in every]
    print(f"        final below both in {wins:.1%} of single cases; below "
          + ", ".join(f"{name} in {np.mean([one['search']['final'] < one['search'][name] for one in every]):.1%}"
                      for name in RIVALS))  # fmt: skip
    print(f"        gap closed on held-out requests, median {np.nanmedian(held):.1%}")
    print(f"        gap closed by HotFlip from the projection: {np.nanmedian(refined):.1%} (quartiles "
          f"{np.nanquantile(refined, 0.25):.1%} and {np.nanquantile(refined, 0.75):.1%})")  # fmt: skip
    print("        rise of the loss from search to held-out requests, mean: "
          + ", ".join(f"{name} {rise[name]:.3f}" for name in ("reference", "soft", "final", *RIVALS)))  # fmt: skip
    seconds = {name: np.mean([one["seconds"][name] for one in every]) for name in ("ours", *RIVALS)}
    print("        seconds a case: " + ", ".join(f"{name} {each:.0f}" for name, each in seconds.items())
          + f"; soft steps {np.mean([one['soft steps'] for one in every]):.0f}")  # fmt: skip
    return int(not all(met.values()))


def show(rows: list[list[str]], markdown: bool) -> None:
    """A table, to look at or to paste."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        print("\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]) + "\n")
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=len(TEACHERS), choices=range(1, len(TEACHERS) + 1))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sampled", action="store_true", help="completions drawn at temperature 1")
    parser.add_argument("--init", default="random tokens", choices=("random tokens", "mean"), help="of the soft prefix")
    parser.add_argument("--folder", type=Path, help="keeps finished cases")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    found = cases(arguments, ms.load_model("pocket"))
    missed = report(found, arguments.markdown)
    return int(arguments.check and missed)


if __name__ == "__main__":
    sys.exit(main())
