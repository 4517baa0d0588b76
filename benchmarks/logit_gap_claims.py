"""Each claim of "The Mechanism of Logit Gap Steering" as a measurement, on the models at hand.

    python benchmarks/logit_gap_claims.py                              # the pocket model, a few minutes on one core
    python benchmarks/logit_gap_claims.py --model FOLDER --positive She --negative He \\
        --openings data/requests/openings.txt

On the pocket model the gap is that between answering and declining (log-odds of the first tokens of either) on requests
for the locked subject in held-out wordings. On other models it is that of two tokens after openings, one a line, which
end where the token would follow. Prints a table; means over prompts with 95 % bootstrap intervals.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

import mechsteer as ms
from mechsteer.pocket.grammar import sample_chat
from mechsteer.pocket.labeller import label
from mechsteer.propagator import dyson, gap_gradient, identity_share, linear_prediction, nearest_tokens, search_tokens
from mechsteer.result import bootstrap_ci
from mechsteer.vocabulary import allowed_tokens, insert

N_PROMPTS, N_TOKENS, N_JACOBIANS = 16, 200, 6


@dataclass(frozen=True)
class Question:
    """What is asked of a model: prompts, and the gap that is to go up."""

    model: ms.Model
    prompts: ms.Prompts
    gap: ms.LogitGap
    where: str


def refusal(n: int, seed: int) -> Question:
    """Requests that the pocket model declines, and the gap between answering and declining."""
    model, rng = ms.load_model("pocket"), random.Random(seed)
    asked = {locked: [sample_chat(rng, "held_out", locked=locked).request for _ in range(2 * n)]
             for locked in (True, False)}  # fmt: skip
    said = {
        locked: model.generate(ms.Prompts.from_chats(texts, model), max_new_tokens=24)
        for locked, texts in asked.items()
    }
    first = {
        declines: {
            int(done.tokens[row][done.span("completion")[row]][0])
            for done in said.values()
            for row, text in enumerate(done.completions)
            if label(text).refusal == declines
        }
        for declines in (True, False)
    }
    gap = ms.LogitGap(sorted(first[False] - first[True]), sorted(first[True]), reduce="logsumexp")
    kept = [text for text, answer in zip(asked[True], said[True].completions, strict=True) if label(answer).refusal]
    return Question(model, ms.Prompts.from_chats(list(dict.fromkeys(kept))[:n], model), gap, "suffix")


def two_tokens(folder: str, positive: str, negative: str, openings: list[str]) -> Question:
    """Openings of texts, and the gap between two tokens behind them. Tokens are tried in front of the opening."""
    model = ms.load_model(folder)
    gap = ms.LogitGap(positive, negative, tokenizer=model)
    return Question(model, ms.Prompts.from_strings(openings, model), gap, "prefix")


def interval(values: np.ndarray, form: str = ".2f") -> str:
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[np.isfinite(kept)]
    low, high = bootstrap_ci(kept, seed=0)
    return f"{kept.mean():{form}} ({float(low):{form}} to {float(high):{form}}, n = {len(kept)})"


# ---- the claims ----


def as_a_sum(asked: Question, table: Table, seed: int) -> None:
    """Section 1: h_0 with the tokens ~ h_0 + sum_t E(t)."""
    rng = random.Random(seed)
    tokens = rng.sample(allowed_tokens(asked.model), min(N_TOKENS, len(allowed_tokens(asked.model))))
    found = linear_prediction(asked.model, asked.prompts, tokens, measure=asked.gap, where=asked.where)
    data = found.data
    text = f"{len(tokens)} single tokens"
    table.add_row("1", "correlation of what a token does with what its embedding, added at the deciding token, does",
                  text, interval(data["correlation_as_sum"].values))  # fmt: skip
    table.add_row("1, 4", "correlation of what a token does in a slot with the gradient's prediction there", text,
                  interval(data["correlation"].values))  # fmt: skip
    slotted = insert(asked.prompts, where=asked.where, slots=1)
    target = gap_gradient(asked.model, slotted, measure=asked.gap).direction()
    for by in ("cosine", "inner_product"):
        best = int(nearest_tokens(asked.model, target, by=by, n=1)["token"][0])
        one = linear_prediction(asked.model, asked.prompts, [best], measure=asked.gap, where=asked.where)
        better = (data["inserted"].mean("prompt") > float(one["inserted"].mean())).values.mean()
        table.add_row("4", f"random tokens that raise the gap more than the nearest token by {by.replace('_', ' ')}",
                      text, f"{100 * better:.0f} %")  # fmt: skip


def identity(asked: Question, table: Table, seed: int) -> None:
    """Section 2: J ~ I, and a push at layer 0 arrives as it was made."""
    few, n = asked.prompts[range(min(N_JACOBIANS, len(asked.prompts)))], asked.model.n_layers
    share = identity_share(asked.model, few, random=16, seed=seed).data.sel(span="end")
    orders = dyson(asked.model, few, layers=None, random=8, seed=seed).data
    for layer in dict.fromkeys((0, 1, n // 2, n - 1)):
        here, where = share.sel(layer=layer), f"layer {layer} to the end"
        table.add_row("2", "c of J = c I + R (identity: 1)", where, interval(here["c"].values))
        table.add_row("2", "|R| / |J| (identity: 0)", where, interval(here["rest"].values))
        table.add_row("2", "cosine of J v and v, random v (identity: 1)", where, interval(here["cos_random"].values))
        terms = orders["share"].sel(layer=layer).mean("vector")
        largest = int(np.argmax(terms.mean("prompt").values))
        table.add_row("2", f"share of J v that came through freely; the largest order is {largest}", where,
                      interval(terms.sel(order=0).values))  # fmt: skip


def along_the_readout(asked: Question, table: Table) -> None:
    """Sections 2 and 3: delta along w_gap, added at the start, reaches the logits."""
    model, last = asked.model, asked.model.n_layers - 1
    readout = ms.Propagator(model, asked.prompts, ("resid_post", last), asked.gap)
    w = readout.rmv(torch.ones(1, dtype=model.dtype, device=model.device))
    run = model.run(asked.prompts, record=[("resid_pre", layer) for layer in range(model.n_layers)])
    base = asked.gap(run)
    for layer in dict.fromkeys((0, 1, model.n_layers // 2, last)):
        site = ms.Site("resid_pre", layer)
        stream = run.activations[site][run.prompts.at(-1)]
        push = stream + w / w.norm(dim=-1, keepdim=True) * stream.norm(dim=-1, keepdim=True)
        moved = asked.gap(model.run(asked.prompts, [ms.Replace(site, push, at=-1)], logits="last")) - base
        table.add_row("2, 3", "change of the gap by w_gap, as long as the stream, added at the deciding token (logits)",
                      f"before layer {layer}", interval(moved.cpu().numpy()))  # fmt: skip


def searches(asked: Question, table: Table) -> None:
    """Section 4: one step of projection against searches on exact gaps."""
    plain = None
    for name, options in {
        "projection, cosine": {"method": "projection"},
        "projection, inner product": {"method": "projection", "by": "inner_product"},
        "sorted single tokens": {"method": "sorted"},
        "greedy": {"method": "greedy"},
        "greedy among 64 chosen by the gradient": {"method": "greedy", "preselect": 64},
    }.items():
        found = search_tokens(asked.model, asked.prompts, measure=asked.gap, where=asked.where, n_tokens=3, **options)
        gaps: xr.DataArray = found.gaps["gap"]
        if plain is None:
            plain = gaps.isel(step=0).values
            table.add_row("4", "mean gap (logits)", "no tokens", interval(plain, ".1f"))
        text = f"{name}: {found.text!r}, {found.forward_passes:,} passes"
        table.add_row("4", "mean gap with at most three tokens (logits)", text,
                      interval(gaps.isel(step=-1).values, ".1f"))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; the pocket model and its refusal without it")
    parser.add_argument("--positive", help="token that is to win, with its leading space")
    parser.add_argument("--negative", help="token that is to lose")
    parser.add_argument("--openings", type=Path, help="file with one opening a line")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    own = (given.positive, given.negative, given.openings)
    if (given.model is None) != (own == (None, None, None)) or (given.model is not None and None in own):
        parser.error("--model goes with --positive, --negative and --openings, all of them")
    asked = (
        refusal(N_PROMPTS, given.seed)
        if given.model is None
        else two_tokens(given.model, *own[:2], [line for line in own[2].read_text().splitlines() if line.strip()])
    )
    table = Table("section", "quantity", "of", "mean (95 % interval)", title=f"{asked.model.name}: {asked.gap!r}")
    as_a_sum(asked, table, given.seed)
    identity(asked, table, given.seed)
    along_the_readout(asked, table)
    searches(asked, table)
    Console(width=150 if not sys.stdout.isatty() else None).print(table)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ms.MechsteerError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
