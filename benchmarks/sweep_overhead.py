"""A sweep beside the same runs one after another: `python benchmarks/sweep_overhead.py`.

Eight learning rates of one experiment, none stopped early:

- the sweep: `jobs/sweep.py`, which runs as many trials side by side as the machine has room for;
- one after another: `jobs/train.py` once for each of the sweep's trials, with its settings, its checkpoints and its pictures.

`sweep_over_sequential` is the ratio of wall times, starts of Ray and of every process included. `stepping_share` is the share of
the sweep's wall time in which at least one trial was taking optimizer steps, by the wall times that TensorBoard keeps of each.

Bars: at most 0.9, at least 0.85, with a minute of steps and more in each trial.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from report import print_table, write_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[1]
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
BARS = {"stepping_share": 0.85, "least_stepping_seconds": 60}
AT_MOST = {"sweep_over_sequential": 0.9}
LONGEST_STEP = 3
"""Times the median between two steps, above which the time in between went elsewhere: to a checkpoint or a validation."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        swept = run_sweep(folder, options.steps)
        trials = pq.read_table(folder / "sweeps" / "overhead" / "trials.parquet").to_pylist()
        steps = [step_intervals(Path(trial["run"])) for trial in trials]
        stepping = [sum(end - start for start, end in one) for one in steps]
        sequential = [run_alone(folder, trial, options.steps) for trial in trials]
    figures = {
        "sweep_over_sequential": round(swept / sum(sequential), 3),
        "stepping_share": round(covered(itertools.chain(*steps)) / swept, 3),
        "sweep_seconds": round(swept, 1),
        "sequential_seconds": round(sum(sequential), 1),
        "least_stepping_seconds": round(min(stepping), 1),
    }
    rows = [
        [f"{trial['trainer.learning_rate']:g}", f"{inside:.0f}", f"{alone:.0f}"]
        for trial, inside, alone in zip(trials, stepping, sequential, strict=True)
    ]
    print_table("seconds of each run", ["learning rate", "stepping in the sweep", "whole, alone"], rows)
    write_result("sweep_overhead", figures, BARS, vars(options), at_most=AT_MOST, keep=not options.short)


def common(folder: Path, steps: int) -> list[str]:
    return [
        "experiment=demo",
        "dataset.holdout=2",
        "tracker=tensorboard",
        "trainer.num_workers=1",
        "trainer.log_every=1",
        f"trainer.max_steps={steps}",
        f"trainer.checkpoint.every_steps={steps // 2}",
        f"trainer.validation.every_steps={steps // 2}",
        f"cache_path={folder / 'cache'}",
    ]


def run_sweep(folder: Path, steps: int) -> float:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return timed(
        "jobs/sweep.py",
        *("sweep=learning_rate", *common(folder, steps), "name=overhead", f"storage_path={folder / 'sweeps'}"),
        *(f"sweep.space.trainer.learning_rate={{grid: [{rates}]}}", f"sweep.num_trials={len(RATES)}"),
        *("sweep.scheduler=none", "sweep.include_base=false", f"sweep.report_steps={steps // 2}"),
    )


def run_alone(folder: Path, trial: dict, steps: int) -> float:
    rate = trial["trainer.learning_rate"]
    return timed(
        "jobs/train.py",
        *(*common(folder, steps), f"name=alone-{rate:g}", f"storage_path={folder / 'runs'}"),
        f"trainer.learning_rate={rate}",
    )


def timed(*command: str) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def step_intervals(run: Path) -> list[tuple[float, float]]:
    """When a run was taking steps, in seconds since the epoch."""
    events = EventAccumulator(str(run / "logs" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    ends = [event.wall_time for event in events.Scalars("loss")]
    usual = statistics.median(after - before for before, after in itertools.pairwise(ends))
    starts = [ends[0] - usual, *ends[:-1]]
    return [(max(start, end - LONGEST_STEP * usual), end) for start, end in zip(starts, ends, strict=True)]


def covered(intervals: itertools.chain) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of each trial, so that it steps for at least a minute")
    parser.add_argument("--short", action="store_true", help="keep no result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
