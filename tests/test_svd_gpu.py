"""benchmarks/svd_gpu.py, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RESULT = BENCHMARKS / "results" / "svd_gpu.json"


def run(*options: str) -> list[str]:
    """The lines that it prints where no GPU is seen."""
    kept = RESULT.read_bytes() if RESULT.exists() else None
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "svd_gpu.py", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert (RESULT.read_bytes() if RESULT.exists() else None) == kept
    return done.stdout.splitlines()


def test_without_a_gpu_it_says_in_one_line_that_it_needs_one():
    [line] = run()
    assert line.startswith("svd_gpu: needs a CUDA GPU")


def test_a_tiny_model_goes_all_the_way_on_a_cpu():
    figures = json.loads(run("--tiny", "--steps=2", "--warmup=1")[-1])
    assert min(figures.values()) > 0
    assert figures["estimate_over_peak"] == pytest.approx(figures["estimate_gib"] / figures["peak_memory_gib"], rel=0.1)
    assert figures["bf16_share"] == pytest.approx(figures["tflops"] / figures["matmul_tflops"], rel=0.1)
    assert figures["clips_per_s"] == pytest.approx(1 / figures["seconds_per_step"], rel=0.01)
