"""`Model.generate` with and without an intervention, beside TransformerLens and transformers, in the same run.

    python benchmarks/generation.py                  # every model, median of 5
    python benchmarks/generation.py --check          # exit status 1 where the bar is missed
    python benchmarks/generation.py --models pocket --runs 3

16 prompts of 32 tokens get 32 new ones each, greedily, turn by turn: in every turn each side runs once. The bar is on
what steering costs: a vector added at all tokens of the middle layer may take at most 15 % more time than generating
without. The others are there for reference.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from engine import gpt2_small
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mechsteer as ms
from mechsteer.data import data_path

N_PROMPTS, N_POS, N_NEW = 16, 32, 32
BAR = 1.15
# What each reference is compared with. TransformerLens 3.9 loses count of positions in a cached `generate` of a model
# with position embeddings and without a tokenizer: its tokens for GPT-2 small are not those of its own forward passes.
REFERENCES = {"TransformerLens": "plain", "TransformerLens, add": "add", "transformers": "plain"}

Sides = dict[str, Callable[[], torch.Tensor]]


def sides(name: str) -> Sides:
    """What is timed for one model; each gives the new tokens [prompt, new]."""
    model = gpt2_small() if name == "gpt2-small" else ms.load_model(name, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, model.d_vocab, (N_PROMPTS, N_POS), generator=generator)
    vector, layer = torch.randn(model.d_model, generator=generator), model.n_layers // 2
    site = ms.Site("resid_post", layer)
    add = ms.Add(vector, 1.0, site=site)
    prompts = ms.Prompts.from_ids(tokens)

    def ours(*interventions: ms.Intervention) -> torch.Tensor:
        out = model.generate(
            prompts, max_new_tokens=N_NEW, interventions=interventions, stop_at_eos=False, progress=False
        )
        return out.tokens[:, N_POS:]

    def lens(*hooks: tuple[str, Callable[..., torch.Tensor]]) -> torch.Tensor:
        with model.hooked.hooks(fwd_hooks=list(hooks)):
            out = model.hooked.generate(
                tokens, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
            )
        return out[:, N_POS:]

    reference = hugging_face(name, model)

    def theirs() -> torch.Tensor:
        mask = torch.ones_like(tokens)
        out = reference.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=N_NEW, eos_token_id=None
        )
        return out[:, N_POS:]

    hook = (site.hook_name, lambda resid, hook: resid + vector)
    return {
        "plain": ours,
        "add": lambda: ours(add),
        "TransformerLens": lens,
        "TransformerLens, add": lambda: lens(hook),
        "transformers": theirs,
    }


def hugging_face(name: str, model: ms.Model) -> Any:
    """The same model as transformers runs it."""
    if name != "gpt2-small":
        return AutoModelForCausalLM.from_pretrained(data_path("models", name)).eval()
    config = GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    reference = GPT2LMHeadModel(config).eval()
    hooked, blocks = model.hooked.state_dict(), reference.transformer
    state = {"wte.weight": hooked["embed.W_E"], "wpe.weight": hooked["pos_embed.W_pos"]}
    for layer in range(model.n_layers):
        source, target = f"blocks.{layer}.", f"h.{layer}."
        q, k, v = (hooked[f"{source}attn.W_{part}"].transpose(0, 1).flatten(1) for part in "QKV")
        state[target + "attn.c_attn.weight"] = torch.cat([q, k, v], 1)
        state[target + "attn.c_attn.bias"] = torch.cat([hooked[f"{source}attn.b_{part}"].flatten() for part in "QKV"])
        state[target + "attn.c_proj.weight"] = hooked[source + "attn.W_O"].flatten(0, 1)
        state[target + "attn.c_proj.bias"] = hooked[source + "attn.b_O"]
        for mine, yours in (("in", "c_fc"), ("out", "c_proj")):
            state[f"{target}mlp.{yours}.weight"] = hooked[f"{source}mlp.W_{mine}"]
            state[f"{target}mlp.{yours}.bias"] = hooked[f"{source}mlp.b_{mine}"]
        for mine, yours in (("ln1", "ln_1"), ("ln2", "ln_2")):
            state[f"{target}{yours}.weight"], state[f"{target}{yours}.bias"] = (
                hooked[f"{source}{mine}.{part}"] for part in "wb"
            )
    state["ln_f.weight"], state["ln_f.bias"] = hooked["ln_final.w"], hooked["ln_final.b"]
    missing = blocks.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(key.endswith("attn.bias") for key in missing.missing_keys), missing
    reference.lm_head.weight = torch.nn.Parameter(hooked["unembed.W_U"].T.contiguous())
    return reference


def measure(timed: Sides, runs: int) -> dict[str, list[float]]:
    """Seconds of each side in each of `runs` turns, after one that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in timed}
    tokens: dict[str, torch.Tensor] = {}
    for turn in range(runs + 1):
        for side, run in timed.items():
            began = time.perf_counter()
            tokens[side] = run()
            if turn:
                times[side].append(time.perf_counter() - began)
    for side, like in REFERENCES.items():
        same = float((tokens[side] == tokens[like]).float().mean())
        if same < 1:
            print(f"{side}: {100 * (1 - same):.0f} % of the tokens differ from ours", file=sys.stderr)
    assert torch.equal(tokens["transformers"], tokens["plain"]) and not torch.equal(tokens["plain"], tokens["add"])
    return times


def ratio(one: list[float], other: list[float]) -> float:
    """Median over the turns of one side's time over the other's: what slows a whole turn cancels."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where the bar is missed")
    parser.add_argument("--runs", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--models", nargs="+", default=["pocket", "gpt2-small"])
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    times = {}
    for name in arguments.models:
        times[name] = measure(sides(name), arguments.runs)
        print(f"{name} measured", file=sys.stderr)
    table = Table(title=f"{N_PROMPTS} prompts of {N_POS} tokens, {N_NEW} new ones, median of {arguments.runs}")
    for column in ("model", "side", "s", "ms a step"):
        table.add_column(column)
    for name, seconds in times.items():
        for side, each in seconds.items():
            median = statistics.median(each)
            table.add_row(name, side, f"{median:.3f}", f"{1000 * median / N_NEW:.1f}")
    Console(width=100).print(table)
    missed = False
    for name, seconds in times.items():
        cost = ratio(seconds["add"], seconds["plain"])
        missed |= cost > BAR
        others = ", ".join(f"{side} {ratio(seconds[side], seconds[like]):.2f}" for side, like in REFERENCES.items())
        print(f"{name}: with Add {cost:.3f} times the time without (bar {BAR}{', missed' if cost > BAR else ''})")
        print(f"{name}: the others' time over ours: {others}")
    return int(arguments.check and missed)


if __name__ == "__main__":
    sys.exit(main())
