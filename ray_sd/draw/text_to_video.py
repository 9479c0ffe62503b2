"""Videos from prompts, written with what each stage made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from PIL import Image
from tqdm import tqdm

from ray_sd import __version__
from ray_sd.adapter import MANIFEST, AdapterManifest, read_manifest
from ray_sd.cluster import connect
from ray_sd.config import TextToVideoConfig
from ray_sd.config.text_to_video import METHODS_OF, StageModel
from ray_sd.draw.generation import check_adapter, next_number, read_prompts
from ray_sd.draw.stages import ACTORS, KEY_FRAMES, Line, Made, Span, get, stage_models
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.files import Location, local_copy, writable_folder
from ray_sd.generate.text_to_video import Plan, VideoRequest, frames_a_second, plan
from ray_sd.media.pictures import png_bytes, read_picture
from ray_sd.media.sheets import frame_sheet
from ray_sd.media.videos import gif_bytes, mp4_bytes
from ray_sd.models import load_model

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class VideoResult:
    """One video, or the picture that it is where nothing moves."""

    path: str
    stages: dict[str, str]
    """Files of what each stage made, by its name."""


@dataclass(frozen=True)
class VideosResult:
    """All videos of a command."""

    videos: list[VideoResult]
    plan: Plan
    fps: float
    spans: list[Span]
    """When stages worked on what."""

    def summary(self) -> str:
        planned = self.plan
        size = f"{planned.width * planned.factor} x {planned.height * planned.factor} pixels"
        if planned.num_frames > 1:
            seconds = planned.num_frames / self.fps
            size += f", {planned.num_frames} frames at {self.fps:g} a second ({seconds:.1f} s)"
        lines = [f"videos:  {len(self.videos)}, {size}", *(f"         {video.path}" for video in self.videos)]
        folder, _, _ = next(iter(self.videos[0].stages.values())).rpartition("/")
        names = [path.rpartition("/")[2] for path in self.videos[0].stages.values()]
        lines.append(f"stages:  {folder}: {', '.join(names)}")
        work = [f"{stage.replace('_', ' ')} {seconds:.1f} s" for stage, seconds in self._seconds().items()]
        return "\n".join([*lines, f"work:    {', '.join(work)}"])

    def _seconds(self) -> dict[str, float]:
        """How long each stage worked."""
        seconds: dict[str, float] = {}
        for actor in ACTORS.values():
            own = [span.ended - span.began for span in self.spans if span.stage == actor.makes]
            seconds |= {actor.makes: sum(own)} if own else {}
        return seconds


def make_videos(config: TextToVideoConfig) -> VideosResult:
    """Make what the configuration asks for in `config.output`, numbering on from what is there.

    Raises ConfigError or ArtifactError for what cannot go together or be read, before a model is loaded.
    """
    picture = None if config.picture is None else read_picture(config.picture, "picture")
    stages = stage_models(config)
    skeletons = {name: load_model(stage.model, skeleton=True) for name, stage in stages.items() if name != "decode"}
    planned = plan(config, skeletons, picture)
    _check_adapters(stages)
    requests = [
        VideoRequest(prompt, seed)
        for prompt in read_prompts(config)
        for seed in range(config.seed, config.seed + config.num_videos)
    ]
    output = writable_folder(config.output, "output")
    number = next_number(output)
    connect()
    line = Line(config, planned, picture)
    videos: list[VideoResult] = []
    with _Bars(line, len(requests)) as bars:
        for request, made in zip(requests, line.make(requests), strict=True):
            videos.append(_write(config, planned, output, number + len(videos), request, bars.follow(made)))
    return VideosResult(videos, planned, frames_a_second(config, planned), line.spans())


def _check_adapters(stages: dict[str, StageModel]) -> None:
    for name, stage in stages.items():
        if stage.adapter is not None:
            with local_copy(stage.adapter, f"{name}.adapter") as adapter:
                if not adapter.exists():
                    raise ArtifactError(f"{name}.adapter: no folder or file {stage.adapter}")
                check_adapter(stage, adapter)
                if name in METHODS_OF and (adapter / MANIFEST).is_file():
                    _check_method(name, stage.adapter, read_manifest(adapter))


def _check_method(stage: str, path: str, manifest: AdapterManifest) -> None:
    """Raise ConfigError for an adapter of a video model that was trained for something else than a stage does."""
    kind = manifest.kind
    if kind not in METHODS_OF[stage]:
        places = [f"{other}.adapter" for other, methods in METHODS_OF.items() if kind in methods]
        raise ConfigError(
            f"{stage}.adapter: {path} was made by method '{kind}', and this stage takes one of "
            f"{' or '.join(METHODS_OF[stage])}; " + (f"give it as {places[0]}" if places else "leave it out")
        )
    if kind == "interpolation":
        key_frames, num_frames = (
            manifest.config["method"]["key_frames"],
            manifest.config["dataset"]["video"]["num_frames"],
        )
        if [place % num_frames for place in key_frames] != [0, num_frames - 1]:
            raise ConfigError(
                f"{stage}.adapter: {path} was trained with method.key_frames={key_frames} of {num_frames} frames, and this "
                "stage gives the first and the last; train one with method.key_frames=[0,-1]"
            )


def _write(
    config: TextToVideoConfig,
    planned: Plan,
    output: Location,
    number: int,
    request: VideoRequest,
    made: Iterator[tuple[str, list[Image.Image]]],
) -> VideoResult:
    """Write what each stage makes of a video as it comes, and what the last one makes beside other videos, too."""
    folder, name = config.output.rstrip("/"), f"{number:05d}"
    files: dict[str, bytes] = {}
    paths: dict[str, str] = {}
    for stage, frames in made:
        fps = config.video.fps if stage == KEY_FRAMES and config.video is not None else frames_a_second(config, planned)
        files = clip_files(frames, fps, _parameters(config, request, stage, frames, fps))
        for suffix, content in files.items():
            (output / name / f"{stage}{suffix}").write(content)
        paths[stage] = f"{folder}/{name}/{stage}{next(iter(files))}"
    for suffix, content in files.items():
        (output / f"{name}{suffix}").write(content)
    return VideoResult(f"{folder}/{name}{next(iter(files))}", paths)


def clip_files(frames: Sequence[Image.Image], fps: float, parameters: dict[str, Any]) -> dict[str, bytes]:
    """The files of a clip by their suffix, first the one that matters: a video, a GIF and a sheet, or a single picture."""
    if len(frames) == 1:
        return {".png": png_bytes(frames[0], parameters)}
    return {
        ".mp4": mp4_bytes(frames, fps, parameters),
        ".gif": gif_bytes(frames, fps, parameters),
        ".png": png_bytes(frame_sheet(frames), parameters),
    }


def _parameters(
    config: TextToVideoConfig, request: VideoRequest, stage: str, frames: Sequence[Image.Image], fps: float
) -> dict[str, Any]:
    """What a file says of how it was made."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "stage": stage,
        "num_frames": len(frames),
        "fps": fps,
        "width": frames[0].width,
        "height": frames[0].height,
        "ray_sd": __version__,
        "config": config.model_dump(mode="json"),
    }


class _Bars:
    """A progress bar a stage, over all videos."""

    def __init__(self, line: Line, num_videos: int) -> None:
        self._line = line
        self._bars = {
            stage: tqdm(
                desc=f"{stage.replace('_', ' '):<12}",
                total=count * num_videos,
                position=place,
                leave=False,
                disable=None,
            )
            for place, (stage, count) in enumerate(line.work().items())
        }

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def follow(self, made: Made) -> Iterator[tuple[str, list[Image.Image]]]:
        """What stages make of a video, as soon as all of it is there."""
        for stage, parts in made.items():
            frames: list[Image.Image] = []
            for part in parts:
                while not ray.wait([part], timeout=POLL_SECONDS)[0]:
                    self._update()
                frames += get(part)
            self._update()
            yield stage, frames

    def _update(self) -> None:
        done = self._line.done()
        for stage, bar in self._bars.items():
            bar.update(done.get(stage, 0) - bar.n)
