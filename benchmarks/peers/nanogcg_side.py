"""nanoGCG's side of `benchmarks/prefix.py`, for an interpreter of its own: it needs transformers 4.47.

Reads one job (JSON) a line from standard input, and answers each with one line (JSON) on standard output:

    job     folder, template, messages (with "{optim_str}" in one), target, start (text), width, top_k, batch or null,
            seconds, seed, threads, clock ("wall", or "cpu" for this process's own time), and where they are not "cpu"
            and "float32", device and dtype
    answer  before, after, target, start, best (ids), start_loss, best_loss, candidates, seconds, and steps: one
            [seconds since the start, candidates so far, lowest loss so far] a step

All candidates count whose loss was computed. The clock runs from before nanoGCG is set up until its run is over.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import nanogcg
import torch
import transformers
from nanogcg.gcg import GCG
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timed(GCG):
    """GCG that notes when which loss was reached, and stops after a time."""

    def begin(self, clock: Callable[[], float], began: float, seconds: float) -> None:
        self.clock, self.began, self.seconds = clock, began, seconds
        self.candidates, self.lowest = 0, float("inf")
        self.first: float | None = None
        self.steps: list[tuple[float, int, float]] = []

    def _compute_candidates_loss_original(self, search_batch_size: int, input_embeds: torch.Tensor) -> torch.Tensor:
        losses = super()._compute_candidates_loss_original(search_batch_size, input_embeds)
        if self.first is None:
            self.first = float(losses[0])
        self.candidates += len(losses)
        self.lowest = min(self.lowest, float(losses.min()))
        now = self.clock() - self.began
        self.steps.append((now, self.candidates, self.lowest))
        self.stop_flag = now >= self.seconds
        return losses


@lru_cache(maxsize=1)
def loaded(folder: str, template: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer: newer files name a tokenizer class and a template file that 4.47 has not."""
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    special = {
        name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in settings
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"), clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    model = model.to(device).eval().requires_grad_(False)
    return model, tokenizer


def answer(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    model, tokenizer = loaded(job["folder"], job["template"], job.get("device", "cpu"), job.get("dtype", "float32"))
    config = nanogcg.GCGConfig(
        num_steps=10**9, optim_str_init=job["start"], search_width=job["width"], batch_size=job["batch"],
        topk=job["top_k"], seed=job["seed"], use_prefix_cache=True, verbosity="ERROR",
    )  # fmt: skip
    clock = CLOCKS[job["clock"]]
    began = clock()
    search = Timed(model, tokenizer, config)
    search.begin(clock, began, job["seconds"])
    result = search.run(job["messages"], job["target"])
    seconds = clock() - began

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rendered = tokenizer.apply_chat_template(job["messages"], tokenize=False, add_generation_prompt=True)
    before, after = rendered.replace(tokenizer.bos_token, "").split("{optim_str}")
    return {
        "before": tokenizer(before)["input_ids"], "after": ids(after), "target": search.target_ids[0].tolist(),
        "start": ids(job["start"]), "best": ids(result.best_string), "start_loss": search.first,
        "best_loss": result.best_loss, "candidates": search.candidates, "seconds": seconds, "steps": search.steps,
    }  # fmt: skip


def main() -> None:
    # Whatever nanoGCG and transformers print must not come between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    transformers.logging.set_verbosity_error()
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
