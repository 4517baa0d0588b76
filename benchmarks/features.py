"""Does moving an SAE feature move the behaviour that it stands for? All twelve topics of the pocket model.

    python benchmarks/features.py                      # about two minutes on one core
    python benchmarks/features.py --topics cats music weather --out features.safetensors

For each topic the feature is the one that "Talk only about {topic}." raises most on the answers that it brings, against
the same answers without it. Then five pushes at it, and their effect on held-out requests, before anything is said (the
feature at the decision token) and after (share of greedy answers that are about the topic, by the labeller):

- *instruction*: the prefix itself
- *soft prefix*: four embeddings, by Adam, that raise the feature's pre-activation at the decision token
- *searched tokens*: three tokens that raise it, by exact greedy search ("Steering Prefix Generation", section 4.1, made
  a prefix that raises a feature's dot product)
- *clamp*, *clamp x2.5*: the feature held, at all tokens, at what its 90 % quantile is on the topic's answers

and whether the feature is *why* each prompt works, by what is said with the prompt and the feature *held back*, at all
tokens, at its mean over the answers without the instruction. And whether it is why the instruction works, by the cross
entropy of the instruction's own answers: *needed*, the share of its effect that goes when the feature is held, token by
token, at what it is without the instruction; *enough*, the share that comes without the instruction when the feature is
what it is with it. The same of the 64 features that attribution puts first (with the gradient without the instruction,
where features do not stand in for each other; and with the gradient under it), of all features, and of the whole state
at these tokens of this layer.

Means over topics and correlations have 95 % intervals from resampling topics.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.features.causes import activation_and_behaviour, agreement, mediation
from mechsteer.features.ranking import rank_by_attribution, rank_by_contrast
from mechsteer.features.states import token_features
from mechsteer.judges import topic_judge
from mechsteer.pocket.lexicon import TOPICS
from mechsteer.prefix.soft import optimise_soft_prefix
from mechsteer.propagator import search_tokens
from mechsteer.result import bootstrap_ci
from mechsteer.study.requests import shipped
from mechsteer.vocabulary import insert

NEW_TOKENS, SLOTS, TOKENS, MANY = 24, 4, 3, 64
N_SEARCH = 9  # requests that prefixes are searched on
ONE, FIRST = "the feature", f"{MANY} by attribution without it"
UNDER = f"{MANY} by attribution under it"
PARTS = (ONE, FIRST, UNDER, "all features", "whole state")
PROMPTS = ("instruction", "soft prefix", "searched tokens")
REWARD = -ms.TeacherForcedCE(first=0)


class Split:
    """Requests as they are, with the instruction, and both with the answers that the instruction brings."""

    def __init__(self, model: ms.Model, split: str, topic: str) -> None:
        texts = [each.text for each in shipped() if each.split == split]
        self.plain = ms.Prompts.from_chats(texts, model)
        self.told = ms.Prompts.from_chats(texts, model, prefix=f"Talk only about {topic}.")
        self.slotted = ms.Prompts.from_chats(texts, model, slots=SLOTS)
        answers = model.generate(self.told, max_new_tokens=NEW_TOKENS, progress=False).completions
        self.plain_answered = self.plain.with_completions(answers)
        self.told_answered = self.told.with_completions(answers)


def case(model: ms.Model, sae: ms.SparseAutoencoder, topic: str, steps: int) -> tuple[ms.Result, dict[str, Any]]:
    """What the pushes of one topic did, and its row of the second table."""
    search, held_out = (Split(model, split, topic) for split in ("search", "held-out"))
    ranked = rank_by_contrast(
        model, sae, search.told_answered, search.plain_answered, at="completion", by="difference", n=1
    )
    feature = int(ranked["feature"].values[0])
    inside = search.told_answered.span("completion")
    strength = float(token_features(model, sae, search.told_answered, [feature])[..., 0][inside].quantile(0.9))
    reads = ms.FeatureActivation(sae, feature, pre=True)
    soft = optimise_soft_prefix(model, search.slotted, -reads, n_restarts=1, steps=steps, progress=False)
    hard = search_tokens(
        model, search.plain[:N_SEARCH], measure=reads, where="prefix", n_tokens=TOKENS, preselect=32, progress=False
    )
    pushes = {
        "instruction": (held_out.told, ()),
        "soft prefix": (held_out.slotted, [soft.intervention()]),
        "searched tokens": (insert(held_out.plain, hard.ids, where="prefix"), ()),
        "clamp": (held_out.plain, [ms.SetFeature(sae, feature, strength)]),
        "clamp x2.5": (held_out.plain, [ms.SetFeature(sae, feature, 2.5 * strength)]),
    }
    moved = activation_and_behaviour(
        model, sae, feature, held_out.plain, pushes, shows=topic_judge(topic).many, max_new_tokens=NEW_TOKENS,
        progress=False,
    )  # fmt: skip
    own = model.generate(search.plain, max_new_tokens=NEW_TOKENS, progress=False)
    rest = float(token_features(model, sae, own, [feature])[..., 0][own.span("completion")].mean())
    back = {name: (pushes[name][0], [*pushes[name][1], ms.SetFeature(sae, feature, rest)]) for name in PROMPTS}
    held_back = activation_and_behaviour(
        model, sae, feature, held_out.plain, back, shows=topic_judge(topic).many, max_new_tokens=NEW_TOKENS,
        progress=False,
    )  # fmt: skip
    sides = {FIRST: (search.plain_answered, search.told_answered), UNDER: (search.told_answered, search.plain_answered)}
    sets = {
        name: rank_by_attribution(model, sae, here, against=there, measure=REWARD, n=MANY, progress=False)
        for name, (here, there) in sides.items()
    }
    shares = mediation(
        model, sae, {ONE: [feature]} | {name: each["feature"].values.tolist() for name, each in sets.items()},
        held_out.told_answered, held_out.plain_answered, measure=REWARD, progress=False,
    )  # fmt: skip
    row = {"feature": feature, "auroc": float(ranked["auroc"][0]), "tokens": hard.text, "rest": rest}
    row["back"] = held_back.data["behaviour"].mean("prompt").sel(push=list(PROMPTS)).values
    return moved, row | {share: shares[share].sel(part=list(PARTS)).values for share in ("needed", "enough")}


def _mean(values: list[float] | np.ndarray, digits: int = 2) -> str:
    array = np.asarray(values, dtype=float)
    low, high = bootstrap_ci(array, seed=0)
    return f"{array.mean():.{digits}f} ({float(low):.{digits}f} to {float(high):.{digits}f})"


def report(console: Console, cases: dict[str, ms.Result], rows: dict[str, dict[str, Any]]) -> ms.Result:
    """Prints the three tables: levels, why, and moves."""
    results = {reads: agreement(cases, reads=reads) for reads in ("activation", "pre_activation")}
    pushes = next(iter(cases.values()))["push"].values.tolist()

    table = Table(
        "topic", "feature", "AUROC", title="activation at the decision token -> share of answers on the topic"
    )
    for push in pushes:
        table.add_column(push, justify="right")
    for topic, result in cases.items():
        means = result.data.mean("prompt")
        cells = [
            f"{float(a):.0f} -> {float(b):.2f}" for a, b in zip(means["activation"], means["behaviour"], strict=True)
        ]
        table.add_row(topic, str(rows[topic]["feature"]), f"{rows[topic]['auroc']:.2f}", *cells)
    together = np.stack([each.data["behaviour"].mean("prompt").values for each in cases.values()])
    table.add_row("all", "", "", *(_mean(together[:, place]) for place in range(len(pushes))), style="bold")
    console.print(table)

    title = f"is it why? {', '.join(PARTS)}; and answers on the topic with the feature held back: {', '.join(PROMPTS)}"
    why = Table("topic", "needed", "enough", "searched tokens", "held back", title=title)
    for topic, row in rows.items():
        each = ["  ".join(f"{share:.2f}" for share in row[name]) for name in ("needed", "enough", "back")]
        why.add_row(topic, *each[:2], repr(row["tokens"]), each[2])
    for place, part in enumerate(PARTS):
        each = [_mean([row[name][place] for row in rows.values()]) for name in ("needed", "enough")]
        why.add_row(part, *each, style="bold")
    for place, name in enumerate(PROMPTS):
        free = together[:, pushes.index(name)]
        held = np.array([row["back"][place] for row in rows.values()])
        why.add_row(f"{name}: held back", _mean(held), f"falls by {_mean(free - held)}", style="bold")
    console.print(why)

    title = (
        "feature moved, as a share of the topic's largest move, against share of answers moved; and their correlation"
    )
    numbers = Table("pushes", "feature", "behaviour", *(reads.replace("_", "-") for reads in results), title=title)
    moved = results["activation"].data
    for place, push in enumerate(["all", *pushes[1:]]):
        each = []
        for result in results.values():
            ends = [
                float(result[f"correlation{end}"])
                if push == "all"
                else float(result[f"correlation_push{end}"][place - 1])
                for end in ("", "_low", "_high")
            ]
            each.append("{:.2f} ({:.2f} to {:.2f})".format(*ends))
        means = [
            "" if push == "all" else _mean(moved[name].sel(push=push).values)
            for name in ("share_moved", "behaviour_moved")
        ]
        numbers.add_row(push, *means, *each)
    console.print(numbers)
    return results["activation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", nargs="+", default=list(TOPICS), choices=list(TOPICS), metavar="TOPIC")
    parser.add_argument("--steps", type=int, default=40, help="of the soft prefix (default: 40)")
    parser.add_argument("--out", type=Path, help="a file for the correlations and what they are made of")
    options = parser.parse_args()
    if len(options.topics) < 3:
        parser.error("--topics takes at least three, or there is nothing to correlate.")
    console, began = Console(width=150), time.perf_counter()
    model = ms.load_model("pocket")
    sae = ms.load_sae("pocket", model=model)
    cases: dict[str, ms.Result] = {}
    rows: dict[str, dict[str, Any]] = {}
    for topic in options.topics:
        cases[topic], rows[topic] = case(model, sae, topic, options.steps)
        print(f"{topic}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    result = report(console, cases, rows)
    console.print(f"{len(cases)} topics, {cases[options.topics[0]].data.sizes['prompt']} held-out requests each, "
                  f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    if options.out is not None:
        result.save(options.out)


if __name__ == "__main__":
    main()
