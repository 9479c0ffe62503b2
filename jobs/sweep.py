"""Sweep: `python jobs/sweep.py sweep=learning_rate experiment=textual_inversion`."""

import sys
from collections.abc import Sequence

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config, run_job
from ray_sd.config.paths import absolute_paths


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, SweepConfig, _plan)
    from ray_sd.cluster import connect_while_importing
    from ray_sd.data import list_source
    from ray_sd.tune.space import Space

    # Before models are imported and Ray starts, which takes seconds: what is wrong most often.
    Space(config).check()
    listing = list_source(absolute_paths(config).dataset)
    connect_while_importing("ray_sd.methods")
    from ray_sd.tune.run import sweep

    print(sweep(config, listing=listing).summary())


def _plan(config: SweepConfig) -> str:
    from ray_sd.tune.plan import plan

    return plan(config)


if __name__ == "__main__":
    sys.exit(run_job(main))
