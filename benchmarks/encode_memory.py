"""Peak memory of encoding a small and a ten times larger data set, over all processes: it should not grow.

    .venv/bin/python benchmarks/encode_memory.py [ROWS]

encodes ROWS (default 2000) and ten times ROWS pictures of 64x64, each with a caption of its own, with the tiny random
model into an empty cache. Memory is the proportional share (PSS) of every process that the run starts, Ray's daemons
and the shared memory of its object store included, read from /proc four times a second.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from report import print_table, write_result

BAR = 1.1
SIDE = 64
ROWS_PER_FILE = 100
"""Few, so that also the smaller run has enough files to keep all stages busy at once; memory follows from that."""
PROGRAM = """
import json, sys, time
from ray_sd.config.load import load_config
from ray_sd.data import prepare
from ray_sd.methods import build_method

config = load_config(sys.argv[1:])
start = time.perf_counter()
summary = prepare(config, build_method(config.method).rows()).summary
print(json.dumps({"rows": summary.encoded, "seconds": time.perf_counter() - start}))
"""


def main() -> None:
    small = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    runs = [measure(rows) for rows in (small, 10 * small)]
    print_table(
        "Encoding 64x64 pictures and captions with model=tiny_random",
        ["pictures", "peak memory, GB", "of it object store, GB", "pictures/s"],
        [
            [f"{run['rows']:,}", f"{run['peak'] / 1e9:.3f}", f"{run['shared'] / 1e9:.3f}", f"{run['rate']:.0f}"]
            for run in runs
        ],
    )
    ratio = runs[1]["peak"] / runs[0]["peak"]
    print(
        f"peak of {10 * small} over peak of {small}: {ratio:.3f}, bar {BAR}: {'reached' if ratio <= BAR else 'MISSED'}"
    )
    figures = {
        "peak_ratio_20k_over_2k": round(ratio, 4),
        "peak_gb": round(runs[1]["peak"] / 1e9, 3),
        "rows_per_s": round(runs[1]["rate"], 1),
    }
    write_result("encode_memory", figures, settings={"rows": [small, 10 * small], "side": SIDE, "model": "tiny_random"})


def measure(rows: int) -> dict[str, float]:
    """Encode `rows` new pictures in a process of their own. Returns its peaks in bytes, and rows a second."""
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch) / "pictures", rows)
        arguments = [
            "experiment=lora",
            "model=tiny_random",
            "dataset=parquet",
            f"dataset.source.path={scratch}/pictures",
            "dataset.source.id_column=id",
            f"dataset.resolution={SIDE}",
            f"cache_path={scratch}/cache",
        ]
        command = [sys.executable, "-c", PROGRAM, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak, shared = 0, 0
        while process.poll() is None:
            now, now_shared = memory(process.pid)
            if now > peak:
                peak, shared = now, now_shared
            time.sleep(0.25)
        if process.returncode:
            raise SystemExit(process.returncode)
        result = json.loads(process.stdout.read().splitlines()[-1])
    if result["rows"] != rows:
        raise SystemExit(f"{result['rows']} of {rows} pictures were encoded")
    return {"rows": rows, "peak": peak, "shared": shared, "rate": rows / result["seconds"]}


def memory(root: int) -> tuple[int, int]:
    """Proportional share of a process and all below it, and the part of it that is shared memory, in bytes."""
    total, shared = 0, 0
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # It ended meanwhile.
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:]}
        total += sizes.get("Pss", 0)
        shared += sizes.get("Pss_Shmem", 0)
    return total, shared


def write_pictures(folder: Path, rows: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for start in range(0, rows, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, rows))
        table = {
            "id": [f"{number:06}" for number in numbers],
            "image": [png(random) for _ in numbers],
            "caption": [f"picture number {number}" for number in numbers],
        }
        pq.write_table(pa.table(table), folder / f"{start:06}.parquet")


def png(random: np.random.Generator) -> bytes:
    """A smooth picture, as different as pictures are."""
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    sink = pa.BufferOutputStream()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(sink, "png")
    return sink.getvalue().to_pybytes()


if __name__ == "__main__":
    main()
