"""Peak memory of `record_stream` against the number of tokens: it must not grow with them.

    python benchmarks/recorder_memory.py                # 10^4 and 10^5 tokens
    python benchmarks/recorder_memory.py --full         # and 10^6
    python benchmarks/recorder_memory.py --check        # exit status 1 if the largest takes 10 % more than the smallest

Each size runs in a new process, on the one-layer pocket model, and records the residual stream with its covariance and
the 10 largest tokens of each feature in shards of 4,096 rows, then reads all rows back. Every size fills several
shards: a run that fills less than one takes less. The first column is the peak of the whole process, most of which is
imports and the model; the second is the peak while recording above what was resident before (Linux only).

What still grows is not the rows. Each shard of a new size leaves about 17 kB behind, mostly because safetensors calls
numpy.ctypeslib.as_array, which keeps a type for every length: 4 MB for 10^6 tokens in shards this small, and a
sixteenth of it with the default ones. The rest is glibc's heap, which varies by some 10 MB between shards; with
MALLOC_MMAP_THRESHOLD_=65536 it does not. Pages of shards that were written are not resident, and pages of shards that
are read go with the shard.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

SIZES = (10_000, 100_000, 1_000_000)
SHARD_TOKENS = 4096
LIMIT = 1.10


def measure(tokens: int) -> dict[str, float]:
    """Record `tokens` tokens in this process: MB at the peak, MB above the start, seconds."""
    import tempfile

    import torch

    from mechsteer.model import load_model
    from mechsteer.prompts import Prompts
    from mechsteer.recording.recorder import record_stream

    torch.set_num_threads(1)  # more of them wait for one another where other work keeps the cores busy
    model = load_model("pocket-1l")
    generator = torch.Generator().manual_seed(0)

    def stream():
        left = tokens
        while left:
            lengths = []
            while left and len(lengths) < 25:
                # Lengths differ, so that memory is asked for in many sizes, which is what fragments it.
                lengths.append(min(left, int(torch.randint(20, 120, (), generator=generator))))
                left -= lengths[-1]
            yield Prompts.from_ids([torch.randint(3, 3000, (n,), generator=generator).tolist() for n in lengths])

    with tempfile.TemporaryDirectory() as folder:
        before, began = _start_peak(), time.perf_counter()
        recording = record_stream(
            model,
            stream(),
            ["resid_post"],
            folder,
            shard_tokens=SHARD_TOKENS,
            top_k=10,
            covariance=True,
            progress=False,
        )
        total = sum(float(rows.values.sum()) for rows in recording.batches(("resid_post", 0)))
        seconds = time.perf_counter() - began
        assert total == total and recording.n_tokens > 0
        return {
            "tokens": recording.n_tokens,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
            "above": _status("VmHWM") - before if before else float("nan"),
            "seconds": seconds,
        }


def _start_peak() -> float:
    """Forget the process's peak so far and give what is resident now, in MB; 0 where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return 0.0
    return _status("VmRSS")


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(name)) / 2**10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also 10^6 tokens")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if memory grows by more than 10 %%")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    # The parent imports nothing large: a child's peak starts from that of the process that it was forked from.
    results = []
    print(f"{'tokens':>10} {'peak MB':>9} {'recording MB':>13} {'seconds':>8} {'tokens/s':>9}")
    for size in SIZES if args.full else SIZES[:2]:
        child = subprocess.run([sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, check=True)
        found = json.loads(child.stdout.splitlines()[-1])
        results.append(found)
        rate = found["tokens"] / found["seconds"]
        memory = f"{found['peak']:>9.1f} {found['above']:>13.1f}"
        print(f"{found['tokens']:>10,} {memory} {found['seconds']:>8.1f} {rate:>9,.0f}", flush=True)
    growth = results[-1]["peak"] / results[0]["peak"]
    print(f"peak at the largest size: {growth:.3f} times that at the smallest (limit {LIMIT})")
    return int(args.check and growth > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
