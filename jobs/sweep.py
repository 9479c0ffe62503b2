"""Sweep: `python jobs/sweep.py sweep=learning_rate experiment=textual_inversion`."""

import sys
from collections.abc import Sequence

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, SweepConfig, _plan)
    from ray_sd.tune.run import sweep

    print(sweep(config).summary())


def _plan(config: SweepConfig) -> str:
    from ray_sd.tune.plan import plan

    return plan(config)


if __name__ == "__main__":
    sys.exit(run_job(main))
