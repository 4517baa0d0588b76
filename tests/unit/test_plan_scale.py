"""`benchmarks/scale.py` at its smallest, which also measures the machine that the tests run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.mark.slow
def test_the_benchmark_foretells_operations_and_measures() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--processor-time"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "150"},
    )  # fmt: skip
    rows = [line.split("│") for line in done.stdout.splitlines() if "0.2M" in line]
    assert [row[1].strip() for row in rows] == ["layer x position patching", "alphas x layers", "prefix search"]
    for row in rows:
        assert abs(float(row[5]) - 1) < 0.02  # operations; seconds of work this small are mostly noise
        assert float(row[6]) > 0 and float(row[7]) > 0
    assert "GFLOP/s at best" in done.stdout
