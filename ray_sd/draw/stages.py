"""The stages of a video as actors, each on a GPU of its own where there are enough, and the work that is under way.

Every video is a chain of calls, one waiting for what another returns, so a stage works on what comes as soon as it comes:
while frames are drawn between one video's key frames, the next video's key frames are drawn, and windows that are done are
decoded and enlarged.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from PIL import Image
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from ray_sd.cluster import possible_resources
from ray_sd.config import TextToVideoConfig
from ray_sd.config.paths import absolute_paths
from ray_sd.config.text_to_video import StageModel
from ray_sd.errors import RaySdError, first_line
from ray_sd.files import from_anywhere
from ray_sd.generate.decoding import decode_each
from ray_sd.generate.loading import load_for_generation
from ray_sd.generate.text_to_video import (
    Decoding,
    Plan,
    VideoRequest,
    draw_key_frames,
    draw_picture,
    draw_window,
    enlarge,
    fit_picture,
    frames_a_second,
)

logger = logging.getLogger(__name__)

PICTURE, KEY_FRAMES, INTERPOLATED, DECODED, UPSCALED = "picture", "key_frames", "interpolated", "decoded", "upscaled"
"""What stages make; files and progress bars are called so."""
ACTOR_CPUS = 0.2
"""So little that all five are there at once on one CPU: they wait for each other more than they work."""
VIDEOS_UNDER_WAY = 3
"""Videos whose frames are held at once."""

Made = dict[str, list[ray.ObjectRef]]
"""What becomes of a video: by stage, the parts that it makes, in order."""


@dataclass(frozen=True)
class Span:
    """When a stage worked on a video, in seconds since the epoch."""

    stage: str
    video: int
    began: float
    ended: float


class _Board:
    """An actor that knows what stages have done."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()
        self._spans: list[Span] = []

    def add(self, stage: str, count: int) -> None:
        self._done[stage] += count

    def close(self, span: Span) -> None:
        self._spans.append(span)

    def done(self) -> dict[str, int]:
        return dict(self._done)

    def spans(self) -> list[Span]:
        return self._spans


class _Stage:
    """What all actors share. The model is loaded by `prepare`, so that what is wrong with it reaches the driver in words."""

    makes: str
    components: tuple[str, ...] | None = None
    """Parts of the model that it needs; None for all."""

    def __init__(self, config: TextToVideoConfig, settings: Any, planned: Plan, board: Any) -> None:
        """settings: what of `config` is this stage's."""
        self._config, self._settings, self._plan, self._board = config, settings, planned, board

    def prepare(self, name: str, stage: StageModel) -> None:
        """Load the model of the stage whose settings are called `name`."""
        if not torch.cuda.is_available():
            # On a small machine two stages are at work most of the time.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
        self._model = load_for_generation(stage, self.components, f"{name}.")
        self._begin()

    def _begin(self) -> None:
        """Set up what is kept from call to call."""

    def _tell(self, count: int) -> None:
        self._board.add.remote(self.makes, count)

    @contextmanager
    def _at_work(self, video: int) -> Iterator[None]:
        began = time.time()
        yield
        # Waited for, so that it is known before what was made is.
        ray.get(self._board.close.remote(Span(self.makes, video, began, time.time())))


class _Picture(_Stage):
    makes = PICTURE

    def draw(self, video: int, request: VideoRequest) -> list[Image.Image]:
        with self._at_work(video):
            return [draw_picture(self._model, self._settings, self._plan, request, self._tell)]


class _KeyFrames(_Stage):
    makes = KEY_FRAMES

    def draw(
        self, video: int, pictures: Sequence[Image.Image], request: VideoRequest
    ) -> tuple[Tensor, list[Image.Image]]:
        """Latents of the key frames, and the key frames, which begin with the one picture."""
        [picture], chunk_size = pictures, self._config.chunk_size
        with self._at_work(video):
            return draw_key_frames(
                self._model, self._settings, self._plan, picture, request.seed, chunk_size, self._tell
            )


class _Interpolation(_Stage):
    makes = INTERPOLATED

    def draw(
        self, video: int, latents: Tensor, frames: Sequence[Image.Image], number: int, request: VideoRequest
    ) -> tuple[Tensor, list[Image.Image]]:
        """Latents from key frame `number` on, and each of them decoded by itself."""
        with self._at_work(video):
            fps, seed = frames_a_second(self._config, self._plan), request.seed
            drawn = draw_window(self._model, self._settings, self._plan, latents, frames, number, seed, fps, self._tell)
            return drawn, decode_each(self._model, drawn, self._config.chunk_size)


class _Decoding(_Stage):
    makes = DECODED
    components = ("vae",)

    def _begin(self) -> None:
        self._decoding = Decoding(self._model, self._settings.chunk_size, self._tell)

    def decode(self, video: int, latents: Tensor, last: bool) -> list[Image.Image]:
        with self._at_work(video):
            return self._decoding.decode(latents, last)


class _Upscaling(_Stage):
    makes = UPSCALED

    def enlarge(self, video: int, frames: Sequence[Image.Image], request: VideoRequest) -> list[Image.Image]:
        with self._at_work(video):
            return enlarge(self._model, self._settings, frames, request, self._tell)


ACTORS: dict[str, type[_Stage]] = {
    "image": _Picture,
    "video": _KeyFrames,
    "interpolation": _Interpolation,
    "decode": _Decoding,
    "upscale": _Upscaling,
}
"""Who does what, by the name of its settings, in the order of the work."""


class Line:
    """The actors, and the work that is under way."""

    def __init__(self, config: TextToVideoConfig, planned: Plan, picture: Image.Image | None) -> None:
        """Start the actors, and wait until all have loaded their models."""
        self._config, self._plan = config, planned
        self._picture = None if picture is None else ray.put([fit_picture(picture, planned)])
        self._board = ray.remote(num_cpus=0)(_Board).remote()
        stages = stage_models(config)
        gpus = gpu_share(len(stages))
        self._actors = {
            name: ray.remote(num_cpus=ACTOR_CPUS, num_gpus=gpus)(ACTORS[name]).remote(
                config, getattr(config, name), planned, self._board
            )
            for name in stages
        }
        logger.info("stages: %s; each has %g GPUs", ", ".join(stages), gpus)
        get([self._actors[name].prepare.remote(name, _from_anywhere(name, stage)) for name, stage in stages.items()])

    def make(self, requests: Sequence[VideoRequest]) -> Iterator[Made]:
        """For each request what becomes of it: by stage, the parts that it makes, in order.

        So many are under way that no stage waits for another video's to be written.
        """
        under_way: deque[Made] = deque()
        for number, request in enumerate(requests):
            under_way.append(self._start(number, request))
            if len(under_way) == VIDEOS_UNDER_WAY:
                yield under_way.popleft()
        yield from under_way

    def _start(self, number: int, request: VideoRequest) -> Made:
        """Tell the actors what to do; they wait for each other."""
        made: Made = {}
        picture = self._picture or self._actors["image"].draw.remote(number, request)
        made[PICTURE] = [picture]
        parts = [picture]
        if "video" in self._actors:
            latents, frames = self._actors["video"].draw.options(num_returns=2).remote(number, picture, request)
            parts = made[KEY_FRAMES] = [frames]
            windows = [latents]
            if "interpolation" in self._actors:
                draw = self._actors["interpolation"].draw.options(num_returns=2)
                pairs = [
                    draw.remote(number, latents, frames, window, request) for window in range(self._plan.num_windows)
                ]
                windows, parts = (list(refs) for refs in zip(*pairs, strict=True))
                made[INTERPOLATED] = parts
            if "decode" in self._actors:
                parts = made[DECODED] = [
                    self._actors["decode"].decode.remote(number, window, place == len(windows))
                    for place, window in enumerate(windows, start=1)
                ]
        if "upscale" in self._actors:
            made[UPSCALED] = [self._actors["upscale"].enlarge.remote(number, part, request) for part in parts]
        return made

    def work(self) -> dict[str, int]:
        """By stage, the denoising steps of a video, or the frames that are decoded."""
        drawn = {"image": 1, "video": 1, "interpolation": self._plan.num_windows, "upscale": self._plan.num_frames}
        work = {}
        for name in self._actors:
            steps = 1 if name == "decode" else getattr(self._config, name).num_inference_steps
            work[ACTORS[name].makes] = steps * drawn.get(name, self._plan.num_frames)
        return work

    def done(self) -> dict[str, int]:
        return get(self._board.done.remote())

    def spans(self) -> list[Span]:
        return get(self._board.spans.remote())


def stage_models(config: TextToVideoConfig) -> dict[str, StageModel]:
    """The model of each stage, by the name of its settings; decoding has the video model's autoencoder."""
    stages: dict[str, StageModel] = {}
    for name in ACTORS:
        if name != "decode":
            stages |= {} if getattr(config, name) is None else {name: getattr(config, name)}
        elif config.video is not None and config.decode is not None:
            own = config.decode
            stages["decode"] = StageModel(
                model=config.video.model, adapter=own.adapter, allow_other_base=own.allow_other_base
            )
    return stages


def _from_anywhere(name: str, stage: StageModel) -> StageModel:
    """A stage with its model and its adapter where actors find them, which may run in another folder."""
    stage = absolute_paths(stage)
    if stage.adapter is None:
        return stage
    return stage.model_copy(update={"adapter": from_anywhere(stage.adapter, f"{name}.adapter")})


def gpu_share(actors: int) -> float:
    """Each actor's part of the GPUs that there are: a whole one, or as much as lets all of them have a part."""
    gpus = int(possible_resources().get("GPU", 0))
    return 0.0 if gpus == 0 else 1 / math.ceil(actors / gpus)


def get(reference: Any) -> Any:
    """`ray.get`, with an error in words where an actor was lost or had too little memory."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, torch.OutOfMemoryError):
            raise RaySdError(
                f"a GPU has too little memory for a stage: {first_line(error.cause)}; lower height and width, "
                "video.num_frames, interpolation.num_frames, decode.chunk_size or upscale.batch_size, or set upscale.tiling=true"
            ) from error
        raise
    except RayActorError as error:
        raise RaySdError(
            f"the process of a stage died, as it does where the machine has too little memory: {first_line(error)}"
        ) from error
