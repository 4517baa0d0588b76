"""Sweeps, the propagator and a prefix search at the shape of a large model, on one card.

    python benchmarks/card.py                               # Gemma 2 2B's shape in bf16, on a GPU
    python benchmarks/card.py --peer-python PATH            # with nanoGCG; see prefix.py
    python benchmarks/card.py --shape small --device cpu --dtype float32 --runs 1

Each line is one piece of work, done by TransformerLens and by mechsteer, turn by turn on the same device, or by nanoGCG
for 20 seconds, after mechsteer's turns. Weights are random, which changes no time. *Share* is the rate of the
operations that mechsteer did, over the rate of a large product of matrices on the same device, in the same run and
type: operations that a cache saves do not count. *Difference* is that of the values, over the largest of them: in bf16
of two roundings, not of right and wrong.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ["TQDM_DISABLE"] = "1"  # get_act_patch_resid_pre would draw a bar for every turn

import torch
from engine import alphas, layer_by_position, operations
from prefix import Peer
from propagator import stream
from rich.console import Console
from rich.table import Table
from scale import model_of

import mechsteer as ms
from mechsteer.prefix import search_prefix
from mechsteer.propagator.operator import Propagator
from mechsteer.vocabulary import insert

SHAPES = {
    "gemma-2-2b": ms.Shape(26, 2304, 8, 4, 256, 9216, 256000, name="Gemma 2 2B's shape"),
    "small": ms.Shape(3, 64, 4, 2, 16, 176, 512, name="a small shape"),
}
# Of the propagator: rows of the Jacobian. Of the search: tokens that are searched for, candidates a step, and steps.
ROWS, SLOTS, WIDTH, STEPS, TOP_K = 64, 20, 256, 4, 64


class Line(NamedTuple):
    work: str
    peer: str
    theirs: float | None
    ours: float
    unit: str
    difference: float | None
    flops: float | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is."""
        if self.theirs is None:
            return None
        return self.ours / self.theirs if self.unit.endswith("/s") else self.theirs / self.ours


def seconds_of(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """How long work takes until the device has done it, and what it gives."""
    _settled(device)
    began = time.perf_counter()
    found = work()
    _settled(device)
    return time.perf_counter() - began, found


def _settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the largest product of square matrices that is tried: the best of three."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device)[0] for _ in range(3))


def turns(sides: tuple[Callable[[], Any], ...], runs: int, device: str) -> tuple[list[float], list[Any]]:
    """Median seconds of each side, after a turn that is not counted; and what each gave."""
    times: list[list[float]] = [[] for _ in sides]
    values: list[Any] = [None] * len(sides)
    for number in range(runs + 1):
        for place, side in enumerate(sides):
            took, values[place] = seconds_of(side, device)
            if number:
                times[place].append(took)
    return [statistics.median(each) for each in times], values


def swept(work: str, sides: tuple[Callable[[], Any], ...], runs: int, device: str) -> Line:
    peer, _, ours = sides
    (theirs, mine), (expected, found) = turns((peer, ours), runs, device)
    return Line(work, "TransformerLens", theirs, mine, "s", _difference(found, expected), operations())


def jacobian(model: ms.Model, runs: int, device: str) -> Line:
    """Rows of the Jacobian from the first block to behind the last, of one prompt's last token."""
    prompt = torch.randint(4, model.d_vocab, (1, 16), generator=torch.Generator().manual_seed(0))
    ends = ("resid_pre", 0), ("resid_post", model.n_layers - 1)
    rows = torch.randn(ROWS, model.d_model, generator=torch.Generator().manual_seed(1)).to(device)
    run, x = stream(model, prompt.to(device), *ends)

    def peer() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            y = run(leaf)
            found = [torch.autograd.grad(y, leaf, row.to(y), retain_graph=True)[0] for row in rows]
        return torch.stack(found)

    def ours() -> torch.Tensor:
        return Propagator(model, prompt, *ends).rmv(rows[:, None])[:, 0]

    (theirs, mine), (expected, found) = turns((peer, ours), runs, device)
    return Line(f"{ROWS} rows of a Jacobian", "TransformerLens, autograd", theirs, mine, "s",
                _difference(found, expected), None)  # fmt: skip


def searched(model: ms.Model, shape: ms.Shape, python: str | None, runs: int, device: str, dtype: str) -> Line:
    """Candidates a second of GCG, whose exact loss was computed."""
    generator = torch.Generator().manual_seed(0)
    drawn = lambda n: torch.randint(4, model.d_vocab, (1, n), generator=generator)  # noqa: E731
    prompts = insert(ms.Prompts.from_ids(drawn(12), completions=drawn(16).tolist()), where="prefix", slots=SLOTS)
    rates, flops = [], 0.0
    for number in range(runs + 1):
        took, found = seconds_of(
            lambda: search_prefix(
                model, prompts, ms.TeacherForcedCE(first=0), method="gcg", width=WIDTH, top_k=TOP_K,
                evaluations=WIDTH * STEPS, progress=False,
            ),
            device,
        )  # fmt: skip
        if number:
            rates.append(found.evaluated / took)
            flops = float(found.trajectory.provenance["options"]["flops"]) / found.evaluated
    theirs = None if python is None else nanogcg(shape, python, device, dtype)
    ours = statistics.median(rates)
    return Line("GCG, candidates", "nanoGCG", theirs, ours, "/s", None, flops * ours)


def nanogcg(shape: ms.Shape, python: str, device: str, dtype: str) -> float:
    """The same of nanoGCG, on a Llama of this shape of transformers' own."""
    with TemporaryDirectory() as folder:
        template = write_llama(shape, Path(folder), getattr(torch, dtype))
        words = lambda n, seed: " ".join(  # noqa: E731
            f"w{i}" for i in torch.randint(4, shape.vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        )
        job = {
            "folder": folder, "template": template, "target": words(16, 1), "start": words(SLOTS, 2), "width": WIDTH,
            "top_k": TOP_K, "batch": None, "seconds": 20.0, "seed": 0, "threads": torch.get_num_threads(),
            "clock": "wall", "device": device, "dtype": dtype,
            "messages": [{"role": "user", "content": f"{words(10, 3)} {{optim_str}}"}],
        }  # fmt: skip
        with Peer(python) as peer:
            answer = peer.ask(job)
    return answer["candidates"] / answer["seconds"]


def write_llama(shape: ms.Shape, folder: Path, dtype: torch.dtype) -> str:
    """A random model and a tokenizer of words w4, w5, ... as transformers stores them; its chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d_model, intermediate_size=shape.d_mlp, head_dim=shape.d_head,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, shape.vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    return "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %} "


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float().cpu()
    return float((found.float().cpu() - expected).abs().max() / expected.abs().max())


def measured(arguments: argparse.Namespace) -> tuple[list[Line], float]:
    """All lines, and the matrix rate."""
    shape, device = SHAPES[arguments.shape], arguments.device
    rate = matrix_rate(device, getattr(torch, arguments.dtype))
    model = model_of(shape, device, getattr(torch, arguments.dtype))
    lines = []
    with torch.no_grad():
        lines.append(swept("layer x position map", layer_by_position(model), arguments.runs, device))
        lines.append(swept("41 alphas, all positions", alphas(model, None), arguments.runs, device))
        lines.append(swept("41 alphas, last position", alphas(model, -1), arguments.runs, device))
        lines.append(jacobian(model, arguments.runs, device))
        lines.append(searched(model, shape, arguments.peer_python, arguments.runs, device, arguments.dtype))
    return lines, rate


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="gemma-2-2b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--peer-python", help="interpreter in which nanogcg and transformers 4.47 import")
    arguments = parser.parse_args(words)
    if arguments.runs < 1:
        parser.error("--runs takes one or more.")
    lines, rate = measured(arguments)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = Table(title=f"{SHAPES[arguments.shape].name}, {arguments.dtype}, {name}, {datetime.date.today()}")
    for column in ("work", "peer", "peer's", "ours", "ratio", "difference", "TFLOP/s", "share"):
        table.add_column(column)
    for each in lines:
        per_second = None
        if each.flops is not None:
            per_second = each.flops if each.unit == "/s" else each.flops / each.ours
        cells = (
            "–" if each.theirs is None else f"{each.theirs:.4g} {each.unit}", f"{each.ours:.4g} {each.unit}",
            "–" if each.ratio is None else f"{each.ratio:.1f}",
            "–" if each.difference is None else f"{each.difference:.0e}",
            "–" if per_second is None else f"{per_second / 1e12:.3g}",
            "–" if per_second is None else f"{per_second / rate:.0%}",
        )  # fmt: skip
        table.add_row(each.work, each.peer, *cells)
    Console(width=130).print(table)
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
