"""Peak memory of encoding a small and a ten times larger set of videos, over all processes: it should not grow.

    .venv/bin/python benchmarks/video_memory.py [VIDEOS]

renders VIDEOS (default 300) and ten times VIDEOS videos of 160x120 pixels and 2 seconds, and encodes a clip of 14 frames of each,
at 64x64 pixels, with the tiny random video model into an empty cache. Memory is measured as `encode_memory.py` measures it.
The smaller run is to last until memory has settled; over a first hundred videos it had not.
"""

import io
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from encode_memory import BAR, PROGRAM, memory
from PIL import Image
from report import print_table, write_result

WIDTH, HEIGHT, FPS, SECONDS = 160, 120, 25, 2
SIDE = 64


def main() -> None:
    small = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    runs = [measure(count) for count in (small, 10 * small)]
    print_table(
        "Encoding clips of 14 frames of 64x64 with model=tiny_random_video",
        ["clips", "peak memory, GB", "of it object store, GB", "clips/s"],
        [
            [f"{run['clips']:,}", f"{run['peak'] / 1e9:.3f}", f"{run['shared'] / 1e9:.3f}", f"{run['rate']:.1f}"]
            for run in runs
        ],
    )
    ratio = runs[1]["peak"] / runs[0]["peak"]
    print(
        f"peak of {10 * small} over peak of {small}: {ratio:.3f}, bar {BAR}: {'reached' if ratio <= BAR else 'MISSED'}"
    )
    figures = {
        f"peak_ratio_{10 * small}_over_{small}": round(ratio, 4),
        "peak_gb": round(runs[1]["peak"] / 1e9, 3),
        "clips_per_s": round(runs[1]["rate"], 2),
    }
    settings = {"clips": [small, 10 * small], "side": SIDE, "frames": 14, "model": "tiny_random_video"}
    write_result("video_memory", figures, settings=settings)


def measure(count: int) -> dict[str, float]:
    """Encode `count` new videos in a process of their own. Returns its peaks in bytes, and clips a second."""
    with tempfile.TemporaryDirectory() as scratch:
        render(Path(scratch) / "videos", count)
        arguments = [
            "name=video_memory",
            "model=tiny_random_video",
            "method.name=temporal",
            "trainer=cpu",
            "dataset=video_folder",
            f"dataset.source.path={scratch}/videos",
            f"dataset.resolution={SIDE}",
            f"cache_path={scratch}/cache",
        ]
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
        peak, shared = 0, 0
        while process.poll() is None:
            now, now_shared = memory(process.pid)
            if now > peak:
                peak, shared = now, now_shared
            time.sleep(0.25)
        if process.returncode:
            raise SystemExit(process.returncode)
        result = json.loads(process.stdout.read().splitlines()[-1])
    if result["rows"] != count:
        raise SystemExit(f"{result['rows']} of {count} videos were encoded")
    return {"clips": count, "peak": peak, "shared": shared, "rate": count / result["seconds"]}


def render(folder: Path, count: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number:05}.mp4").write_bytes(video(random))


def video(random: np.random.Generator) -> bytes:
    """A window that moves over a smooth picture of its own."""
    small = Image.fromarray(random.integers(0, 256, (12, 24, 3), dtype=np.uint8))
    picture = np.asarray(small.resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FPS * SECONDS):
            window = picture[:, 2 * number : 2 * number + WIDTH]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


if __name__ == "__main__":
    main()
