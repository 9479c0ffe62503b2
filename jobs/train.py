"""Train: `python jobs/train.py experiment=lora dataset.source.path=photos name=my-dog`."""

import sys
from collections.abc import Sequence

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config, run_job
from ray_sd.config.paths import absolute_paths


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, ExperimentConfig)
    from ray_sd.cluster import connect_while_importing
    from ray_sd.data import list_source

    # Before models are imported and Ray starts, which takes seconds: the path of the data is what is wrong most often.
    listing = list_source(absolute_paths(config).dataset)
    connect_while_importing("ray_sd.methods")
    from ray_sd.train.run import fit

    print(fit(config, listing=listing).summary())


if __name__ == "__main__":
    sys.exit(run_job(main))
