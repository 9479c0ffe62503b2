"""benchmarks/svd_gpu.py, as far as it goes without a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("svd_gpu")


def test_without_a_gpu_it_says_in_one_line_that_it_needs_one(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["svd_gpu.py"])
    benchmark.main()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("svd_gpu: needs a CUDA GPU")


@pytest.mark.slow
def test_a_steps_operations_are_counted_without_weights_and_grow_with_its_clips(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    counted = []
    for batch in (1, 2):
        monkeypatch.setattr(sys, "argv", ["svd_gpu.py", "--tiny", f"--batch={batch}"])
        config = benchmark.configure(benchmark.parse_options())
        shapes, flops = benchmark.step_flops(config)
        assert shapes["latent_mean"].shape == (batch, 3, 4, 8, 8)
        assert all(tensor.is_meta for tensor in shapes.values())
        counted.append(flops)
    assert counted[1] == 2 * counted[0] > 0


@pytest.mark.slow
def test_a_tiny_model_goes_all_the_way_on_a_cpu():
    figures = json.loads(run("--tiny", "--steps=2", "--warmup=1")[-1])
    assert min(figures.values()) > 0
    assert figures["estimate_over_peak"] == pytest.approx(figures["estimate_gib"] / figures["peak_memory_gib"], rel=0.1)
    assert figures["bf16_share"] == pytest.approx(figures["tflops"] / figures["matmul_tflops"], rel=0.1)
    assert figures["clips_per_s"] == pytest.approx(1 / figures["seconds_per_step"], rel=0.01)
