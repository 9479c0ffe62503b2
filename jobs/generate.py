"""Draw: `python jobs/generate.py model=emoji adapter=runs/my-dog/adapter prompt='a dog on a red background'`."""

import sys
from collections.abc import Sequence

from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, GenerateConfig)
    from ray_sd.draw.generation import draw

    print(draw(config).summary())


if __name__ == "__main__":
    sys.exit(run_job(main))
