"""How much moves in which row, for a person who is to choose `min_motion` and `typical_motion`."""

import json

import numpy as np
import pyarrow as pa

from ray_sd.config.video import VideoConfig
from ray_sd.files import Location

LINES = "motion.jsonl"


def write_motions(folder: Location, rows: pa.Table, motions: pa.ListArray, video: VideoConfig) -> str:
    """Write a line for each row into a view's folder. Returns where it is, with what the buckets are like.

    rows: `id` of usable rows. motions: of the clips of each.
    """
    file = folder / LINES
    with file.open_for_writing() as stream:
        for name, values in zip(rows["id"].to_pylist(), motions.to_pylist(), strict=True):
            buckets = [video.motion_bucket(value) for value in values]
            line = {"id": name, "motion": [round(value, 4) for value in values], "motion_bucket_id": buckets}
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    buckets = [video.motion_bucket(value) for value in motions.flatten().to_pylist()]
    return (
        f"motion buckets {min(buckets):g} to {max(buckets):g}, in the middle {np.median(buckets):g} (see {file.path})"
    )
