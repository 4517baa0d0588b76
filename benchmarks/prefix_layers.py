"""What each layer knows of a prefix, as words: Fig. 2 of "Steering Prefix Generation", with numbers.

    python benchmarks/prefix_layers.py                        # the pocket model, all layers: two minutes on one core
    python benchmarks/prefix_layers.py --check                # exit status 1 where a bar is missed
    python benchmarks/prefix_layers.py --models pocket stories260K
    python benchmarks/prefix_layers.py --anything             # also the reference's own words

For every layer a soft prefix is made whose states behind that layer, at the tokens of the request and at the last one
of the prompt, have the direction of those under the reference; then it is made into tokens (`match_layers`). Cosines
are means over requests that nothing was searched on, those in brackets over those that were; "explained" is the share
of the change of the states that the reference makes, pooled over held-out requests. The bar is on the cosine of the
soft prefix, at every layer of the pocket model and on both halves.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from engine import load
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.judges import Judge, judge_of, lexicon_judge, telltale_words
from mechsteer.prefix import Constraints
from mechsteer.prefix.layer_sweep import match_layers
from mechsteer.prefix.match import beam_evaluations
from mechsteer.study.requests import shipped
from mechsteer.study.settings import Request

# Least cosine of the soft prefix.
SOFT = 0.99
CATS = "Talk only about cats."
# A model of stories knows no instructions: the reference is a beginning, and what follows are other ones.
STORY = "The cat sat."
STORIES = (
    "One day,", "Then Tom said,", "It was dark.", "In the park,", "Mom came home.", "The sun was hot.", "At night,",
    "They ran to the tree.", "Next day,", "Tom was happy.", "They sat down.", "In the house,",
)  # fmt: skip


class Job(NamedTuple):
    """What is asked of a model.

    Attributes:
        prompts: with slots, those to search on first.
        plain: without a prefix.
        reference: its ids.
        held_out: rows to measure on.
    """

    text: str
    prompts: ms.Prompts
    plain: ms.Prompts
    reference: list[int]
    held_out: range
    judge: Judge


def job_of(model: ms.Model, search: int, held_out: int) -> Job:
    if getattr(model.tokenizer, "chat_template", None):
        halves: list[Sequence[Request]] = [
            [each for each in shipped() if each.split == split] for split in ("search", "held-out")
        ]
        texts = [each.text for part, n in zip(halves, (search, held_out), strict=True) for each in part[:n]]
        make, prefix, judge = ms.Prompts.from_chats, CATS, judge_of(CATS)
    else:
        texts, prefix = list(STORIES), STORY
        search = len(texts) // 2
        make, judge = ms.Prompts.from_strings, lexicon_judge(["cat", "cats", "kitty", "kitten", "kittens"])
    assert judge is not None
    told = make(texts, model, prefix=prefix)
    reference = told.tokens[0][told.span("prefix")[0]].tolist()
    prompts = make(texts, model, slots=len(reference), labels=texts)
    return Job(prefix, prompts, make(texts, model), reference, range(search, len(texts)), judge)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pocket"], help="pocket, pocket-1l, stories260K, or a path")
    parser.add_argument("--anything", action="store_true", help="let prefixes hold the reference's own words")
    parser.add_argument("--measure", default="cosine", choices=["cosine", "mse"])
    parser.add_argument("--search", type=int, default=8, help="requests to search on")
    parser.add_argument("--held-out", type=int, default=8, help="requests to measure on")
    parser.add_argument("--steps", type=int, default=120, help="of the soft prefix")
    parser.add_argument("--evaluations", type=int, default=200, help="prefixes of tokens, after the beam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a folder: a run that was stopped goes on from there")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, missed = Console(width=200), []
    for name in arguments.models:
        model = load(name)
        job = job_of(model, arguments.search, arguments.held_out)
        words = () if arguments.anything else telltale_words(job.text)
        found = match_layers(
            model, job.prompts, job.reference, measure=arguments.measure, held_out=job.held_out, plain=job.plain,
            judge=job.judge, evaluations=beam_evaluations(len(job.reference)) + arguments.evaluations,
            soft_steps=arguments.steps, seed=arguments.seed,
            constraints=Constraints(forbidden_words=words, characters="printable"), progress=console.is_terminal,
            out=None if arguments.out is None else f"{arguments.out}/{name}",
        )  # fmt: skip
        console.print(table(name, job, words, found))
        missed += [f"{name}, layer {each}" for each in below(found) if name == "pocket"]
    if missed:
        console.print(f"[bold red]Missed (soft cosine >= {SOFT}): {'; '.join(missed)}")
    return int(arguments.check and bool(missed))


def halves(found: ms.Result, name: str, layer: int, stage: str) -> dict[str, float]:
    """Means over the requests that were searched on, and over those that were not."""
    one = found[name].sel(layer=layer, stage=stage)
    return {half: float(one[one["split"].values == half].mean()) for half in ("search", "held-out")}


def below(found: ms.Result) -> list[int]:
    """Layers whose soft prefix misses the bar on one half."""
    return [int(each) for each in found["layer"].values if min(halves(found, "cosine", each, "soft").values()) < SOFT]


def explained(found: ms.Result, layer: int, stage: str) -> float:
    """Pooled over held-out requests."""
    squared = found["squared"].sel(layer=layer)
    squared = squared[:, squared["split"].values == "held-out"].sum("prompt")
    return float(1 - squared.sel(stage=stage) / squared.sel(stage="none"))


def table(name: str, job: Job, words: Sequence[str], found: ms.Result) -> Table:
    held = found["split"].values == "held-out"
    forbidden = f"without {', '.join(words)}" if words else "with any words"
    seconds, reference = found.provenance["seconds"], found["reference_shows"].values[held].mean()
    shown = Table(
        title=f"{name}: states under {job.text!r} ({len(job.reference)} tokens), {forbidden}; {seconds:.0f} s. With "
        f"the reference {100 * reference:.0f} % of the held-out continuations {job.judge.shown}."
    )
    for column in ("layer", "no prefix", "soft", "nearest tokens", "final", "soft explains", "final explains", "shows"):
        shown.add_column(column, justify="right")
    shown.add_column("final prefix", overflow="fold")
    shown.add_column("a continuation", overflow="fold", max_width=60)
    first = int(np.argmax(held))
    for layer in map(int, found["layer"].values):
        one = found.sel(layer=layer)
        cosines = []
        for stage in ("none", "soft", "projected", "final"):
            each = halves(found, "cosine", layer, stage)
            cosines.append(f"{each['held-out']:.3f} ({each['search']:.3f})")
        shares = [f"{100 * explained(found, layer, stage):.0f} %" for stage in ("soft", "final")]
        on = f"{100 * one['shows'].values[held].mean():.0f} %"
        text = repr(str(one["text"].sel(stage="final").values))
        shown.add_row(str(layer), *cosines, *shares, on, text, str(one["completion"].values[first]))
    return shown


if __name__ == "__main__":
    sys.exit(main())
