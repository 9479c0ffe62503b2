"""Draw for whoever asks over HTTP: `python jobs/serve.py serve=sdxl adapters=runs`."""

import sys
from collections.abc import Sequence

from ray_sd.config import ServeConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, ServeConfig)
    from ray_sd.serve.app import run

    run(config)


if __name__ == "__main__":
    sys.exit(run_job(main))
