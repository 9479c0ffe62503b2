"""Make a video: `python jobs/text_to_video.py prompt="a tiger face on a blue background"`."""

import sys
from collections.abc import Sequence

from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config, run_job


def main(argv: Sequence[str]) -> None:
    config = load_config(argv, TextToVideoConfig)
    from ray_sd.draw.text_to_video import make_videos

    print(make_videos(config).summary())


if __name__ == "__main__":
    sys.exit(run_job(main))
