"""Draw for whoever asks over HTTP: `python jobs/serve.py serve=sdxl adapters=runs`."""

import sys
import time
from collections.abc import Sequence

from ray_sd.config import ServeConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    config = load_config(argv, ServeConfig)
    from ray_sd.serve.app import run

    run(config, began)


if __name__ == "__main__":
    sys.exit(run_job(main))
