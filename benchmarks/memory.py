"""Memory that mechsteer says it needs, beside what it took: peak bytes of tensors, as PyTorch's profiler counts them.

python benchmarks/memory.py --check
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mechsteer as ms
from mechsteer.data import data_path
from mechsteer.engine import Engine
from mechsteer.prefix.loss import PrefixLoss

LIMIT = 0.3


def peak(call: Any) -> int:
    """Bytes of tensors at their most, beyond those at the start."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    kineto: Any = found.profiler
    events = [each for each in kineto.kineto_results.events() if each.name() == "[memory]"]
    at = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        at += event.nbytes()
        most = max(most, at)
    return most


def model(dtype: torch.dtype) -> ms.Model:
    """Random weights, wide enough for batches to be what counts."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 3072}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
    with tempfile.TemporaryDirectory() as folder:
        made = LlamaForCausalLM(LlamaConfig(**shape, **heads))
        made.save_pretrained(folder)
        for path in data_path("models", "pocket").glob("*token*"):
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        return ms.load_model(folder, device="cpu", dtype=dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"fail where an estimate is off by more than {LIMIT:.0%}")
    check = parser.parse_args().check
    worst = max(measured(dtype) for dtype in (torch.float32, torch.bfloat16))
    return int(check and worst > LIMIT)


def measured(dtype: torch.dtype) -> float:
    """Print what was said and taken, and give the largest share by which an estimate is off."""
    m = model(dtype)
    assert m.decoder is not None
    tokens = torch.randint(4, 3000, (16, 64), generator=torch.Generator().manual_seed(0))
    prompts, gap, vector = ms.Prompts.from_ids(tokens, tokenizer=m.tokenizer), ms.LogitGap(5, 9), torch.ones(256)
    options: dict[str, Any] = {"axes": {"alpha": [float(each) for each in range(8)]}, "measure": gap, "rows": 4096}

    def build(alpha: float) -> ms.Intervention:
        return ms.Add(vector, alpha, site=("resid_post", 0))

    slotted = replace(prompts, slots=(prompts.positions > 0) & (prompts.positions < 9))
    loss = PrefixLoss(m, slotted, ms.TeacherForcedCE(span="all"), n_prefixes=4, batch_rows=2048)
    start = torch.randn(4, 8, 256, generator=torch.Generator().manual_seed(0))
    found = {
        "sweep": (
            Engine(m, prompts, {"gap": gap}).memory([2], rows=4096, chunk=4096).new,
            peak(lambda: ms.sweep(m, prompts, build=build, progress=False, **options)),
        ),
        "prefix batch": (loss.memory.parts["batch"], peak(lambda: loss.gradient(start))),
    }
    for name, (said, took) in found.items():
        print(
            f"{str(dtype)[6:]:9} {name:13} said {said / 1e6:6.1f} MB, took {took / 1e6:6.1f} MB: {said / took - 1:+.0%}"
        )
    return max(abs(said / took - 1) for said, took in found.values())


if __name__ == "__main__":
    sys.exit(main())
