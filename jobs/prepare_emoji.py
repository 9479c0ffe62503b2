"""Prepare what the embedded models learn from: `python jobs/prepare_emoji.py selection=two_core out=runs/data/emoji`."""

import sys
from collections.abc import Sequence

from ray_sd.config.load import load_settings, run_job
from ray_sd.embedded.prepare import PrepareConfig, prepare


def main(argv: Sequence[str]) -> None:
    print(prepare(load_settings(argv, PrepareConfig)))


if __name__ == "__main__":
    sys.exit(run_job(main))
