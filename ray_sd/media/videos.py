"""Clips as files: MP4 and GIF that carry their parameters."""

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from ray_sd.errors import ArtifactError
from ray_sd.media.pictures import at_most

PARAMETERS = "comment"
"""Name under which a file's metadata hold the parameters as JSON."""
GIF_SIDE = 512
"""Longer side, in pixels, of a frame of a GIF at most, since they are large files."""
CRF = "12"
"""x264's quality: 0 loses nothing, 18 passes for that, 23 is what it takes unless told otherwise."""


def save_mp4(frames: Sequence[Image.Image], path: Path, fps: float, parameters: dict[str, Any]) -> None:
    """Write an MP4 file (H.264, yuv420p, which every player and browser shows) whose metadata say how it was made.

    Chroma has half the resolution, so a side of an odd number of pixels repeats its last one.
    """
    _check(frames, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The index comes first, so that a browser plays the file while it loads.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata[PARAMETERS] = json.dumps(parameters, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": CRF})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = _even(frames[0]).shape[:2]
        # Players take another matrix for large pictures than for small ones, unless they are told.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for image in frames:
            frame = av.VideoFrame.from_ndarray(_even(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def mp4_bytes(frames: Sequence[Image.Image], fps: float, parameters: dict[str, Any]) -> bytes:
    """The content of the file that `save_mp4` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        save_mp4(frames, path, fps, parameters)
        return path.read_bytes()


def save_gif(frames: Sequence[Image.Image], path: Path, fps: float, parameters: dict[str, Any]) -> None:
    """Write a GIF that plays without end, for where no video plays: 256 colours a frame, times in hundredths of a second,
    large frames made smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gif_bytes(frames, fps, parameters))


def gif_bytes(frames: Sequence[Image.Image], fps: float, parameters: dict[str, Any]) -> bytes:
    """The content of the file that `save_gif` writes."""
    _check(frames, fps)
    ends = [round(100 * number / fps) for number in range(1, len(frames) + 1)]
    seconds = np.diff([0, *ends])
    small = (at_most(image, GIF_SIDE).convert("RGB") for image in frames)
    first, *rest = (image.quantize(method=Image.Quantize.MEDIANCUT) for image in small)
    content = io.BytesIO()
    first.save(
        content,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=[10 * max(2, int(hundredths)) for hundredths in seconds],  # browsers slow down what is faster
        loop=0,
        comment=json.dumps(parameters).encode(),
    )
    return content.getvalue()


def read_video_parameters(path: Path) -> dict[str, Any]:
    """The parameters in the metadata of an MP4 or GIF file. Raises ArtifactError for a file that has none."""
    with _open(path) as container:
        text = container.metadata.get(PARAMETERS)
    try:
        return json.loads(text or "")
    except ValueError as error:
        raise ArtifactError(f"{path} does not say how it was made") from error


def read_frames(path: Path) -> list[Image.Image]:
    """All frames of a video file, RGB. Raises ArtifactError for a file that is none."""
    with _open(path) as container:
        try:
            return [frame.to_image() for frame in container.decode(video=0)]
        except (FFmpegError, IndexError) as error:
            raise ArtifactError(f"{path} has no frames that can be decoded: {error}") from error


def _open(path: Path) -> Any:
    try:
        return av.open(str(path))
    except FFmpegError as error:
        raise ArtifactError(f"{path} cannot be read as a video: {error.strerror}") from error


def _check(frames: Sequence[Image.Image], fps: float) -> None:
    if not frames:
        raise ValueError("a clip needs at least one frame")
    if not fps > 0:
        raise ValueError(f"{fps} frames a second; a clip needs more than none")
    if len({image.size for image in frames}) > 1:
        raise ValueError("the frames of a clip have one size")


def _even(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] with even sides."""
    pixels = np.asarray(image.convert("RGB"))
    return np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
