"""From the command to the first optimizer step, beside a bare loop: `python benchmarks/first_step.py`.

A LoRA on 64 pictures with one worker, each time in fresh processes:

- cold: `jobs/train.py` with an empty cache;
- warm: the same with the cache that the cold run filled;
- bare: `bare_lora.py`, a loop of diffusers and PEFT that encodes its first batch.

A run takes one step, so that the times of its files tell when each phase ended: the configuration is written when the data are
prepared, the log of metrics after the first step, the manifest when the adapter is exported. Seconds of the CPU are of all
processes that a command starts, Ray's own included, until they have ended.

Bars, of two cores and nothing else that runs: 24 s cold, 16 s warm.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from report import print_table, write_result

REPOSITORY = Path(__file__).parents[1]
AT_MOST = {"first_step_s_cold": 24, "first_step_s_warm": 16}
PICTURES = 64
ADOPT_ORPHANS = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""
PHASES = ("imports and Ray", "listing and encoding", "worker and engine", "first batch", "first step", "export", "exit")

Seconds = dict[str, float]


def main() -> None:
    options = parse_options()
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1)
    ways: dict[str, list[Seconds]] = {"cold": [], "warm": [], "bare": []}
    imports = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            settings = settings_of(Path(scratch), options)
            ways["cold"].append(run_job(Path(scratch) / "runs" / "cold", settings, options.batch))
            ways["warm"].append(run_job(Path(scratch) / "runs" / "warm", settings, options.batch))
            ways["bare"].append(run_bare(Path(scratch) / "pictures", options))
            imports.append(timed([sys.executable, "-c", "import ray_sd.train.run"]))
    medians = {
        way: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]} for way, runs in ways.items()
    }
    cold, warm, bare = medians.values()
    figures = {
        "first_step_s_cold": round(cold["until the first step"], 1),
        "first_step_s_warm": round(warm["until the first step"], 1),
        "import_s": round(statistics.median(imports), 1),
        "bare_first_step_s": round(bare["until the first step"], 1),
        "over_bare_cold": round(cold["until the first step"] / bare["until the first step"], 2),
        "over_bare_warm": round(warm["until the first step"] / bare["until the first step"], 2),
        "cpu_s_cold": round(cold["CPU"], 1),
        "cpu_s_warm": round(warm["CPU"], 1),
        "cpu_s_bare": round(bare["CPU"], 1),
    }
    rows = [
        [phase, *(f"{times[phase]:.1f}" if phase in times else "" for times in medians.values())]
        for phase in (*PHASES, "until the first step", "whole", "CPU")
    ]
    print_table(f"seconds, median of {options.repeats}", ["phase", *medians], rows)
    write_result("first_step", figures, settings=vars(options), at_most=AT_MOST, keep=not options.short)


def settings_of(scratch: Path, options: argparse.Namespace) -> list[str]:
    """The run's settings, on pictures of noise made here."""
    folder = scratch / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        pixels = generator.integers(0, 256, (options.resolution, options.resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a picture of number {i}")
    return [
        "experiment=lora",
        f"model={options.model}",
        f"dataset.source.path={folder}",
        f"dataset.resolution={options.resolution}",
        f"storage_path={scratch / 'runs'}",
        f"cache_path={scratch / 'cache'}",
        "trainer=cpu",
        "trainer.max_steps=1",
        "trainer.gradient_checkpointing=false",
        f"trainer.batch_size={options.batch}",
    ]


def run_job(run: Path, settings: list[str], batch_size: int) -> Seconds:
    """How long each phase of `jobs/train.py` took."""
    command = [sys.executable, "jobs/train.py", *settings, f"name={run.name}"]
    before, began = cpu_seconds(), time.time()
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as job:
        said = [(time.time(), line) for line in job.stderr]
    ended = time.time()
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(line for _, line in said)}")
    wait_for_orphans()
    log = run / "logs" / "metrics.jsonl"
    step = json.loads(log.read_text())
    stepped = log.stat().st_mtime
    since_engine = batch_size / step["images_per_second"]
    ends = [
        next(moment for moment, line in said if line.startswith("Ray: ")),
        (run / "config.yaml").stat().st_mtime,
        stepped - since_engine,
        stepped - since_engine * (1 - step["data_wait_fraction"]),
        stepped,
        (run / "adapter" / "manifest.json").stat().st_mtime,
        ended,
    ]
    starts = [began, *ends[:-1]]
    phases = {phase: end - start for phase, start, end in zip(PHASES, starts, ends, strict=True)}
    return phases | {"until the first step": stepped - began, "whole": ended - began, "CPU": cpu_seconds() - before}


def run_bare(pictures: Path, options: argparse.Namespace) -> Seconds:
    model = REPOSITORY / "ray_sd" / "embedded" / options.model
    command = [sys.executable, "benchmarks/bare_lora.py", str(model), str(pictures), str(options.batch)]
    before, began = cpu_seconds(), time.time()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported, stepped = map(float, done.stdout.split())
    whole = time.time() - began
    return {
        "imports and Ray": imported - began,
        "first step": stepped - imported,
        "exit": began + whole - stepped,
        "until the first step": stepped - began,
        "whole": whole,
        "CPU": cpu_seconds() - before,
    }


def timed(command: Sequence[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return time.monotonic() - began


def wait_for_orphans() -> None:
    """Processes whose parent has ended are this one's children, and count for its CPU once they have been waited for."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def cpu_seconds() -> float:
    """Of all processes below this one that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="an embedded model of pictures")
    parser.add_argument("--resolution", type=int, default=64, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--short", action="store_true", help="keep no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
