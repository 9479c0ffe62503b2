"""Videos, sound and broken, that say in their pictures which frame is which."""

import io
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config

BITS = 8
DARK, LIGHT = 100, 160
"""Far enough apart to be told after compression, near enough not to look like a cut."""
SIZE = (64, 48)


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A grey frame, (width, height) large, with its number in `BITS` bars: uint8 [H, W, 3]."""
    bars = [LIGHT if number >> bit & 1 else DARK for bit in range(BITS)]
    return np.tile(np.repeat(bars, size[0] // BITS)[None, :, None], (size[1], 1, 3)).astype(np.uint8)


def read_number(frame: np.ndarray) -> int:
    """The number in a frame uint8 [H, W, 3]."""
    bars = frame.mean(axis=(0, 2)).reshape(BITS, -1).mean(axis=1)
    return sum(1 << bit for bit in range(BITS) if bars[bit] > (DARK + LIGHT) / 2)


def scene(number: int) -> list[np.ndarray]:
    """Ten frames of one colour, far from those of the scenes next to it."""
    return [np.full((SIZE[1], SIZE[0], 3), ((200, 30, 30), (20, 60, 220))[number % 2], np.uint8)] * 10


def shifting(num_frames: int, step: int, size: tuple[int, int] = (128, 96)) -> list[np.ndarray]:
    """A soft texture that moves to the left by `step` pixels a frame."""
    noise = np.random.default_rng(0).integers(80, 176, (size[1] // 8, (size[0] + num_frames * step) // 8 + 2, 3))
    wide = Image.fromarray(noise.astype(np.uint8))
    wide = np.asarray(wide.resize((wide.width * 8, size[1]), Image.Resampling.BICUBIC))
    return [wide[:, step * i : step * i + size[0]] for i in range(num_frames)]


def video(
    frames: Iterable[np.ndarray],
    *,
    fps: float = 10,
    times: Sequence[int] | None = None,
    kind: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rotation: int | None = None,
    mirrored: bool = False,
    sound: float = 0,
    options: dict[str, str] | None = None,
    **context: Any,
) -> bytes:
    """An encoded video.

    times: of each frame in milliseconds, where they are not `fps` a second. sound: seconds of silence, in another track.
    options: of the container.
    """
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind, options=options) as container:
        track = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        track.pix_fmt = pixels
        track.codec_context.thread_count = 1  # else the bytes depend on the number of cores
        if rotation is not None:
            track.set_display_rotation(rotation, hflip=mirrored)
        silence = container.add_stream("libopus", rate=48000) if sound else None
        for name, value in context.items():
            setattr(track.codec_context, name, value)
        if times is not None:
            track.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            if number == 0:
                track.height, track.width = array.shape[:2]
            mode = "rgba" if array.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=mode)
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / Fraction(fps).limit_denominator(1000) if times is None else Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode())
        if silence is not None:
            for start in range(0, round(sound * 48000), 960):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="flt", layout="mono")
                frame.rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                container.mux(silence.encode(frame))
            container.mux(silence.encode())
    return stream.getvalue()


def counted(num_frames: int, size: tuple[int, int] = SIZE, **settings: Any) -> bytes:
    """A video of numbered frames."""
    return video([numbered(number, size) for number in range(num_frames)], **settings)


def noisy(num_frames: int, **settings: Any) -> bytes:
    """A video that no encoder makes small."""
    random = np.random.default_rng(0)
    return video([random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(num_frames)], **settings)


def stretched(data: bytes, ratio: int) -> bytes:
    """An MP4 made with a `sample_aspect_ratio`, whose pixels then say to be so many times as wide as they are high."""
    place = data.index(b"pasp") + 4
    return data[:place] + struct.pack(">II", ratio, 1) + data[place + 8 :]


def streamable(data: bytes) -> bytes:
    """An MP4 with its index before its frames, so that it can be opened when its end is lost."""
    [header] = struct.unpack_from(">I", data)
    start = data.index(b"moov") - 4
    index = bytearray(data[start:])
    chunks = index.index(b"stco") + 8
    [count] = struct.unpack_from(">I", index, chunks)
    for place in range(chunks + 4, chunks + 4 + 4 * count, 4):
        struct.pack_into(">I", index, place, struct.unpack_from(">I", index, place)[0] + len(index))
    return data[:header] + index + data[header:start]


def without_frames(data: bytes) -> bytes:
    """An MP4 whose index lists none, or an AVI that ends before the first."""
    if data.startswith(b"RIFF"):
        return data[: data.index(b"movi") + 4]
    sizes = data.index(b"stsz") + 12
    return data[:sizes] + bytes(4) + data[sizes + 4 :]


def sound_only() -> bytes:
    """An MP4 without pictures."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=8000)
        for start in range(0, 8000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


def gif(frames: Sequence[np.ndarray], milliseconds: int | list[int] = 100) -> bytes:
    """milliseconds: of all frames, or of each."""
    pictures = [Image.fromarray(frame) for frame in frames]
    stream = io.BytesIO()
    pictures[0].save(stream, "gif", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return stream.getvalue()


def clip_experiment(*settings: str, source: str = "video_folder", method: str = "temporal") -> ExperimentConfig:
    """An experiment on clips of four frames with the smallest video model."""
    return load_config(
        [
            "name=test",
            "model=tiny_random_video",
            f"method.name={method}",
            "trainer=cpu",
            "tracker=none",
            f"dataset={source}",
            "dataset.resolution=[48,64]",
            "dataset.video.num_frames=4",
            "dataset.video.fps=5",
            *settings,
        ]
    )
