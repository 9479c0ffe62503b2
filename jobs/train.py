"""Train: `python jobs/train.py experiment=lora dataset.source.path=photos name=my-dog`."""

import sys
from collections.abc import Sequence

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, ExperimentConfig)
    from ray_sd.cluster import connect_while_importing

    connect_while_importing("ray_sd.methods")
    from ray_sd.train.run import fit

    print(fit(config).summary())


if __name__ == "__main__":
    sys.exit(run_job(main))
