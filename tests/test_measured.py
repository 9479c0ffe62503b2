"""What guides and cards tell of measurements is what was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "result", "words"),
    [
        (
            "docs/sweeps.md",
            "sweep_overhead",
            lambda f: f"took {f['sweep_over_sequential']:.2f} of the time that they take one after another",
        ),
        (
            "docs/sweeps.md",
            "sweep_overhead",
            lambda f: f"in {100 * f['stepping_share']:.0f} of 100 seconds at least one of them took steps",
        ),
        (
            "ray_sd/embedded/emoji_video/README.md",
            "embedded_video_quality",
            lambda f: f"{100 * f['followed']:.0f} of 100 are less than half as far from the truth as a still picture",
        ),
        (
            "ray_sd/embedded/emoji_video/README.md",
            "embedded_video_quality",
            lambda f: f"in the last frame only {100 * f['last_kept']:.0f} of 100 figures",
        ),
        (
            "ray_sd/embedded/emoji_video/README.md",
            "embedded_video_quality",
            lambda f: (
                f"in every frame {100 * f['identity_kept']:.0f}, where it finds {100 * f['identity_kept_true']:.0f} in "
                "the true clips"
            ),
        ),
        (
            "ray_sd/embedded/emoji_video/README.md",
            "embedded_video_quality",
            lambda f: f"flickers nearly as much ({f['flicker_ratio']:.2f}) as the one of pictures",
        ),
        (
            "ray_sd/embedded/emoji_interpolation/README.md",
            "embedded_video_quality",
            lambda f: f"is {-f['interpolation_gain_db']:.1f} dB nearer to the true frames between",
        ),
    ],
)
def test_what_is_told_was_measured(text: str, result: str, words: Callable[[dict[str, float]], str]):
    figures = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())["figures"]
    assert words(figures) in " ".join((ROOT / text).read_text().split())
