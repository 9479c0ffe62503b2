"""Whole videos, from a prompt to files, by actors of Ray or by what stands in for them."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from in_process import Actors
from PIL import Image
from tiny_models import difference
from torch import nn
from tqdm import tqdm
from waiting import wait_for

from ray_sd.adapter import Base, describe_folder
from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.draw import stages, text_to_video
from ray_sd.draw.generation import next_number
from ray_sd.draw.stages import DECODED, INTERPOLATED, KEY_FRAMES, PICTURE, UPSCALED, gpu_share
from ray_sd.draw.text_to_video import make_videos
from ray_sd.errors import ArtifactError, ConfigError, RaySdError
from ray_sd.files import locate
from ray_sd.generate.text_to_video import Plan, VideoRequest
from ray_sd.media.pictures import read_parameters
from ray_sd.media.videos import read_frames, read_video_parameters
from ray_sd.methods import weights
from ray_sd.models import load_model

for module in (__name__, "waiting"):  # which actors do not have
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])

MODELS = {
    "image": "tiny_random",
    "video": "tiny_random_video",
    "interpolation": "tiny_random_video",
    "upscale": "tiny_random_upscale",
}
STEPS = {"image": 4, "video": 3, "interpolation": 2, "upscale": 1}
"""Of denoising, so many for each stage that none can have another's settings."""
MEET = (
    ((KEY_FRAMES, 1), (INTERPOLATED, 0)),
    ((INTERPOLATED, 1), (DECODED, 0)),
    ((DECODED, 1), (UPSCALED, 0)),
)
"""Calls of two stages that are at work at the same time."""
FRAMES = {"video.num_frames": 3, "interpolation.num_frames": 3}


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., TextToVideoConfig]:
    """Videos of 24 x 16 pixels by the tiny models of some stages."""

    def build(*settings: str, of: tuple[str, ...] = tuple(MODELS)) -> TextToVideoConfig:
        common = ["prompt=a cat", "height=16", "width=24", f"output={tmp_path / 'videos'}"]
        common += ["decode=null"] if "decode=null" in settings else ["decode.chunk_size=2"]
        for stage, model in MODELS.items():
            common += [f"{stage}.model={model}", f"{stage}.num_inference_steps={STEPS[stage]}"] if stage in of else []
            common += [] if stage in of else [f"{stage}=null"]
        common += [f"{name}={count}" for name, count in FRAMES.items() if name.partition(".")[0] in of]
        return load_config([*common, *settings], TextToVideoConfig)

    return build


@pytest.fixture
def here() -> Iterator[Actors]:
    """All stages work in this process, when what they make is asked for."""
    actors = Actors()
    with actors.instead_of_ray():
        yield actors


@pytest.fixture(params=["in this process", pytest.param("by Ray", marks=pytest.mark.slow)])
def by_ray(request: pytest.FixtureRequest) -> bool:
    """Whether stages are actors in processes of their own, or work in this one."""
    by_ray = request.param == "by Ray"
    request.getfixturevalue("ray_cluster" if by_ray else "here")
    return by_ray


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[stages.Line]:
    """The actors of all commands, kept to be asked what they have done."""
    kept: list[stages.Line] = []

    class Kept(stages.Line):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(text_to_video, "Line", Kept)
    return kept


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tqdm]:
    """The progress bars of all commands, kept to be asked what they have shown."""
    kept: list[tqdm] = []

    def keep(**settings: Any) -> tqdm:
        kept.append(tqdm(**settings | {"disable": False, "file": io.StringIO()}))
        return kept[-1]

    monkeypatch.setattr(text_to_video, "tqdm", keep)
    return kept


def shown(bars: list[tqdm]) -> dict[str, tuple[float, float | None]]:
    """What each bar has come to, and what is all of it."""
    return {bar.desc.strip(" :"): (bar.n, bar.total) for bar in bars}


def adapter(folder: Path, method: dict, fingerprints: dict[str, str] | None = None, **parts: nn.Module) -> Path:
    """An adapter of the tiny video model, as a run on clips of three frames leaves it."""
    for name, part in parts.items():
        weights.save_component(part, folder / name)
    folder.mkdir(exist_ok=True)
    describe_folder(
        folder,
        kind=method["name"],
        family="stable_video_diffusion",
        base=Base(name="tiny_random_video", source="random weights", fingerprints=fingerprints or {}),
        config={"method": method, "dataset": {"video": {"num_frames": 3}}},
    )
    return folder


def largest_difference(one: Path, other: Path) -> int:
    frames = [read_frames(path) for path in (one, other)]
    assert len(frames[0]) == len(frames[1])
    return max(difference(*pair) for pair in zip(*frames, strict=True))


def at_work(spans: list[stages.Span], stage: str) -> list[int]:
    """On which videos a stage worked, in order."""
    return [span.video for span in sorted(spans, key=lambda span: span.began) if span.stage == stage]


def meeting(kind: type[stages._Stage], folder: Path) -> type[stages._Stage]:
    """A stage that is not done with a call of `MEET` before the other of the pair has begun."""

    class Meeting(kind):
        calls = 0

        @contextmanager
        def _at_work(self, video: int) -> Iterator[None]:
            call = (self.makes, self.calls)
            self.calls += 1
            with super()._at_work(video):
                (folder / "at-{}-{}".format(*call)).touch()
                for one in (one for pair in MEET if call in pair for one in pair):
                    wait_for((folder / "at-{}-{}".format(*one)).exists, 120)
                yield

    return Meeting


def test_two_videos_with_all_their_stages(
    configure: Callable, lines: list, bars: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_ray: bool
):
    config = configure("num_videos=2", "seed=5", "video.fps=4")
    if by_ray:
        for name, kind in stages.ACTORS.items():
            monkeypatch.setitem(stages.ACTORS, name, meeting(kind, tmp_path))
    result = make_videos(config)
    if by_ray:
        assert {path.name for path in tmp_path.glob("at-*")} >= {f"at-{stage}-{call}" for stage, call in sum(MEET, ())}
    work = {PICTURE: 4, KEY_FRAMES: 3, INTERPOLATED: 2 * 2, DECODED: 5, UPSCALED: 5}  # of each video
    assert lines[0].work() == work
    assert lines[0].done() == {stage: 2 * count for stage, count in work.items()}
    assert shown(bars) == {stage.replace("_", " "): (2 * count, 2 * count) for stage, count in work.items()}
    folder = tmp_path / "videos"
    assert [video.path for video in result.videos] == [f"{folder}/00000.mp4", f"{folder}/00001.mp4"]
    sizes = {
        KEY_FRAMES: (3, 24, 16, 4),
        INTERPOLATED: (5, 24, 16, 8),
        DECODED: (5, 24, 16, 8),
        UPSCALED: (5, 96, 64, 8),
    }
    for number, seed in ((0, 5), (1, 6)):
        own = folder / f"{number:05d}"
        assert read_parameters(own / "picture.png")["stage"] == PICTURE
        assert Image.open(own / "picture.png").size == (24, 16)
        for stage, (count, width, height, fps) in sizes.items():
            frames = read_frames(own / f"{stage}.mp4")
            assert [frame.size for frame in frames] == [(width, height)] * count
            said = read_video_parameters(own / f"{stage}.mp4")
            assert (said["stage"], said["prompt"], said["seed"], said["num_frames"]) == (stage, "a cat", seed, count)
            assert (said["fps"], said["width"], said["height"]) == (fps, width, height)
            assert said["config"] == config.model_dump(mode="json")
            assert said == read_video_parameters(own / f"{stage}.gif") == read_parameters(own / f"{stage}.png")
        for suffix in (".mp4", ".gif", ".png"):
            assert (folder / f"{number:05d}{suffix}").read_bytes() == (own / f"{UPSCALED}{suffix}").read_bytes()
    assert largest_difference(folder / "00000.mp4", folder / "00001.mp4") > 20
    summary = result.summary()
    assert "videos:  2, 96 x 64 pixels, 5 frames at 8 a second (0.6 s)" in summary
    assert (
        f"stages:  {folder}/00000: picture.png, key_frames.mp4, interpolated.mp4, decoded.mp4, upscaled.mp4" in summary
    )
    assert all(f"{stage} " in summary for stage in ("key frames", "interpolated", "decoded", "upscaled"))

    # What each stage was at, and in which order: windows of a video one after the other, and videos, too.
    parts = {PICTURE: 1, KEY_FRAMES: 1, INTERPOLATED: 2, DECODED: 2, UPSCALED: 2}
    assert {stage: at_work(result.spans, stage) for stage in parts} == {
        stage: [0] * count + [1] * count for stage, count in parts.items()
    }

    if by_ray:
        return
    # The same seed makes the same video, whatever is made beside it; numbers go on.
    again = make_videos(configure("seed=6", "video.fps=4"))
    assert [video.path for video in again.videos] == [f"{folder}/00002.mp4"]
    # Of the sheets, which are not compressed: H.264 makes more of a difference that no eye sees.
    assert difference(*(Image.open(folder / f"{number:05d}.png") for number in (1, 2))) <= 1


def test_stages_wait_for_what_they_need_and_for_nothing_else(configure: Callable, here: Actors):
    """So they work side by side: the second video is begun, and the first windows are decoded, before the last are drawn."""
    line = stages.Line(configure(), Plan(height=16, width=24, num_key_frames=3, window=3, factor=4), None)
    first, second = line.make([VideoRequest("a cat", seed) for seed in (0, 1)])
    stages.get(second[PICTURE][0])
    assert line.done() == {PICTURE: 2 * STEPS["image"]}
    stages.get(first[UPSCALED][0])
    for stage in (KEY_FRAMES, INTERPOLATED, DECODED, UPSCALED):
        assert at_work(line.spans(), stage) == [0]
    stages.get(first[UPSCALED][1])
    assert at_work(line.spans(), DECODED) == [0, 0]
    assert at_work(line.spans(), KEY_FRAMES) == [0]


def test_so_many_videos_are_under_way_at_once(configure: Callable, here: Actors):
    """None is waited for before the next is begun, and no more are held than are needed for that."""
    line = stages.Line(configure(), Plan(height=16, width=24, num_key_frames=3, window=3, factor=4), None)
    asked = []
    requests = (asked.append(seed) or VideoRequest("a cat", seed) for seed in range(9))
    next(line.make(requests))
    assert len(asked) == stages.VIDEOS_UNDER_WAY == 3


def test_frames_of_key_frames_alone(configure: Callable, lines: list, tmp_path: Path, here: Actors):
    result = make_videos(configure("prompt=a dog", of=("image", "video")))
    assert lines[0].done() == lines[0].work() == {PICTURE: 4, KEY_FRAMES: 3, DECODED: 3}
    assert set(result.videos[0].stages) == {PICTURE, KEY_FRAMES, DECODED}
    assert len(read_frames(tmp_path / "videos/00000.mp4")) == 3
    assert read_video_parameters(tmp_path / "videos/00000.mp4")["fps"] == 7


def test_without_a_stage_that_decodes_frames_are_decoded_each_by_itself(configure: Callable, lines: list, here: Actors):
    alone = make_videos(configure("decode=null", of=("image", "video", "interpolation"))).videos[0]
    assert lines[0].done() == lines[0].work() == {PICTURE: 4, KEY_FRAMES: 3, INTERPOLATED: 4}
    assert set(alone.stages) == {PICTURE, KEY_FRAMES, INTERPOLATED}
    assert Path(alone.path).read_bytes() == Path(alone.stages[INTERPOLATED]).read_bytes()


@pytest.mark.parametrize(
    ("left_out", "work", "made"),
    [
        (
            {"image"},
            {KEY_FRAMES: 3, INTERPOLATED: 4, DECODED: 5, UPSCALED: 5},
            {PICTURE: 1, KEY_FRAMES: 3, INTERPOLATED: 5, DECODED: 5, UPSCALED: 5},
        ),
        ({"video", "interpolation"}, {PICTURE: 4, UPSCALED: 1}, {PICTURE: 1, UPSCALED: 1}),
        (
            {"interpolation"},
            {PICTURE: 4, KEY_FRAMES: 3, DECODED: 3, UPSCALED: 3},
            {PICTURE: 1, KEY_FRAMES: 3, DECODED: 3, UPSCALED: 3},
        ),
        pytest.param(
            {"decode"},
            {PICTURE: 4, KEY_FRAMES: 3, INTERPOLATED: 4, UPSCALED: 5},
            {PICTURE: 1, KEY_FRAMES: 3, INTERPOLATED: 5, UPSCALED: 5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"upscale"},
            {PICTURE: 4, KEY_FRAMES: 3, INTERPOLATED: 4, DECODED: 5},
            {PICTURE: 1, KEY_FRAMES: 3, INTERPOLATED: 5, DECODED: 5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda part: "-".join(sorted(part)) if isinstance(part, set) else "",
)
def test_a_stage_that_is_left_out_leaves_the_others(
    configure: Callable,
    lines: list,
    bars: list,
    tmp_path: Path,
    here: Actors,
    left_out: set[str],
    work: dict[str, int],
    made: dict[str, int],
):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    settings = [f"picture={tmp_path / 'red.png'}"] if "image" in left_out else []
    settings += ["decode=null"] if "decode" in left_out else []
    [video] = make_videos(configure(*settings, of=tuple(MODELS.keys() - left_out))).videos
    assert lines[0].done() == lines[0].work() == work
    assert shown(bars) == {stage.replace("_", " "): (count, count) for stage, count in work.items()}
    frames = {
        stage: [Image.open(path)] if path.endswith(".png") else read_frames(path)
        for stage, path in video.stages.items()
    }
    assert {stage: len(pictures) for stage, pictures in frames.items()} == made
    assert {stage: pictures[0].size for stage, pictures in frames.items()} == {
        stage: (96, 64) if stage == UPSCALED else (24, 16) for stage in made
    }
    assert (frames[PICTURE][0].getpixel((5, 5)) == (255, 0, 0)) == ("image" in left_out)
    assert Path(video.path).read_bytes() == Path(video.stages[list(made)[-1]]).read_bytes()


def test_models_adapters_and_pictures_are_found_from_the_folder_where_the_command_runs(
    configure: Callable, lines: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_ray: bool
):
    """Ray's actors run in another one, as they do in a cluster that was joined."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), "red").save("red.png")
    vae = load_model(configure().video.model, {"vae"}).vae
    weights.save_component(vae, Path("models/vae"))
    with torch.no_grad():
        vae.decoder.time_conv_out.weight.zero_()
        vae.decoder.time_conv_out.bias.fill_(1)
    adapter(Path("white"), {"name": "temporal_decoder"}, {"vae": "of another"}, vae=vae)
    settings = ["picture=red.png", "decode.adapter=white", "video.model.vae=models/vae"]
    if not by_ray:
        words = "the vae of 'tiny_random_video' is another; .* try it anyway by decode.allow_other_base=true"
        with pytest.raises(RaySdError, match=words):
            make_videos(configure(*settings, of=("video",)))
    result = make_videos(configure(*settings, "decode.allow_other_base=true", of=("video",)))
    line = lines[-1]
    assert line.done() == line.work() == {KEY_FRAMES: 3, DECODED: 3}
    assert [at_work(line.spans(), stage) for stage in (KEY_FRAMES, DECODED)] == [[0], [0]]
    made = result.videos[0].stages
    assert made.keys() == {PICTURE, KEY_FRAMES, DECODED}
    assert Image.open(made[PICTURE]).getpixel((5, 5)) == (255, 0, 0)
    video = read_video_parameters(Path(result.videos[0].path))["config"]["video"]
    assert video["model"]["vae"]["path"] == "models/vae"
    frames = {stage: read_frames(Path(made[stage])) for stage in (KEY_FRAMES, DECODED)}
    assert [frame.size for frame in frames[DECODED]] == [(24, 16)] * 3
    assert min(frames[DECODED][1].convert("L").getdata()) > 250
    assert min(frames[KEY_FRAMES][1].convert("L").getdata()) < 250


def test_a_picture_of_ones_own_is_made_larger(configure: Callable, lines: list, tmp_path: Path, here: Actors):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    result = make_videos(configure(f"picture={tmp_path / 'red.png'}", "prompt=", "num_videos=2", of=("upscale",)))
    assert (lines[0].work(), lines[0].done()) == ({UPSCALED: 1}, {UPSCALED: 2})  # of one video, and of both
    assert result.videos[0].stages.keys() == {PICTURE, UPSCALED}
    paths = [Path(video.path) for video in result.videos]
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    large = [Image.open(path) for path in paths]
    assert [image.size for image in large] == [(96, 64)] * 2
    assert difference(*large) > 5  # of another seed
    assert Image.open(tmp_path / "videos/00000/picture.png").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("there", ["00003.png", "00003.mp4", "00003/picture.png", "00003/decoded.mp4"])
def test_numbers_go_on_from_pictures_videos_and_what_an_interrupted_run_left(tmp_path: Path, there: str):
    output = locate(str(tmp_path), "output")
    assert next_number(output) == 0
    for name in ("00001.png", there, "keep/00008.png", "sheet-00000-00009.png"):
        (output / name).write(b"")
    assert next_number(output) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["upscale.noise_level=999"], "upscale.noise_level: 999 is more than the 350"),
        (["interpolation.model.vae.architecture.scaling_factor=0.1"], "its latents have scaling_factor 0.1"),
        (["image.adapter=nowhere"], "image.adapter: no folder or file nowhere"),
        (["decode.adapter=nowhere"], "decode.adapter: no folder or file nowhere"),
        (["video.adapter=embedded/adapters/owl"], "was made for a model of family stable_diffusion, not"),
        (["prompts_file=nowhere.txt"], "prompts_file: cannot read nowhere.txt"),
        (["image=null", "picture=nowhere.png"], "picture: nowhere.png"),
    ],
)
def test_what_cannot_go_is_told_before_anything_starts(
    configure: Callable, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: str
):
    monkeypatch.setattr(text_to_video, "connect", lambda: pytest.fail("it started"))
    left_out = tuple(MODELS) if "image=null" not in settings else ("video", "interpolation", "upscale")
    with pytest.raises((ConfigError, ArtifactError), match=words):
        make_videos(configure(*[setting for setting in settings if setting != "image=null"], of=left_out))


@pytest.mark.parametrize(
    ("stage", "method", "words"),
    [
        ("decode", {"name": "temporal"}, "this stage takes one of temporal_decoder or autoencoder; give it as video.adapter"),
        ("video", {"name": "temporal_decoder"}, "this stage takes one of temporal or inflate; give it as decode.adapter"),
        ("video", {"name": "autoencoder"}, "give it as decode.adapter"),
        ("video", {"name": "interpolation", "key_frames": [0, -1]}, "give it as interpolation.adapter"),
        ("interpolation", {"name": "temporal"}, "this stage takes one of interpolation; give it as video.adapter"),
        ("interpolation", {"name": "interpolation", "key_frames": [0]}, r"key_frames=\[0\] of 3 frames, and this stage gives"),
        ("interpolation", {"name": "interpolation", "key_frames": [-1, 0]}, r"train one with method.key_frames=\[0,-1\]"),
        ("interpolation", {"name": "interpolation", "key_frames": [0, 1]}, r"method.key_frames=\[0, 1\] of 3 frames"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_stage_is_told_before_anything_starts(
    configure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, method: dict, words: str
):
    monkeypatch.setattr(text_to_video, "connect", lambda: pytest.fail("it started"))
    path = adapter(tmp_path / "adapter", method)
    with pytest.raises(ConfigError, match=rf"^{stage}.adapter: .* was (made by method|trained with) .*{words}"):
        make_videos(configure(f"{stage}.adapter={path}"))


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("video", {"name": "inflate", "image_model": "x"}),
        ("decode", {"name": "autoencoder", "teacher": "x"}),
        ("interpolation", {"name": "interpolation", "key_frames": [0, -1]}),
        ("interpolation", {"name": "interpolation", "key_frames": [0, 2]}),
    ],
)
def test_adapters_of_a_stage_are_taken(configure: Callable, tmp_path: Path, stage: str, method: dict):
    path = adapter(tmp_path / "adapter", method)
    text_to_video._check_adapters(stages.stage_models(configure(f"{stage}.adapter={path}")))


def test_a_model_that_cannot_be_loaded_is_told_in_words(configure: Callable, tmp_path: Path, here: Actors):
    config = configure("image.model.unet.architecture.cross_attention_dim=48", of=("image", "upscale"))
    with pytest.raises(ArtifactError, match="takes text embeddings of width 48"):
        make_videos(config)
    broken = tmp_path / "unet"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(configure(of=("image", "upscale")).image.model.unet.architecture))
    with pytest.raises(RaySdError, match="no .safetensors weights for the unet"):
        make_videos(configure(f"image.model.unet={broken}", of=("image", "upscale")))


@pytest.mark.parametrize(("gpus", "actors", "share"), [(0, 5, 0), (1, 5, 0.2), (2, 5, 1 / 3), (4, 5, 0.5), (8, 5, 1)])
def test_gpus_are_divided_so_that_every_stage_has_a_part(
    monkeypatch: pytest.MonkeyPatch, gpus: int, actors: int, share: float
):
    monkeypatch.setattr(stages, "possible_resources", lambda: {"CPU": 8, "GPU": gpus})
    assert gpu_share(actors) == share


def test_actors_of_stages_ask_for_their_part_of_the_gpus(configure: Callable):
    actors = Actors()
    with actors.instead_of_ray(CPU=1, GPU=2):
        stages.Line(
            configure(of=("image", "video")), Plan(height=16, width=24, num_key_frames=3, window=2, factor=1), None
        )
    asked = {name: resources["num_gpus"] for name, resources in actors.asked.items() if name != "_Board"}
    assert asked == {"_Picture": 0.5, "_KeyFrames": 0.5, "_Decoding": 0.5}


ASKED_FOR = """
import json, sys
import ray
from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.draw.stages import Line
from ray_sd.generate.text_to_video import Plan

ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, logging_level="ERROR")
config = load_config(sys.argv[1:], TextToVideoConfig)
line = Line(config, Plan(height=16, width=24, num_key_frames=3, window=2, factor=1), None)
ask = lambda actor: ray.get_runtime_context().get_assigned_resources()
asked = {name: ray.get(actor.__ray_call__.remote(ask)) for name, actor in line._actors.items()}
print(json.dumps(asked))
"""
"""Starts the actors of a command in a Ray instance that counts two GPUs, and prints what each asked for."""


@pytest.mark.slow
@pytest.mark.cluster
def test_actors_of_stages_get_their_part_of_the_gpus_on_one_cpu():
    settings = ["prompt=a cat", "image.model=tiny_random", "video.model=tiny_random_video"]
    settings += ["interpolation=null", "upscale=null"]
    done = subprocess.run([sys.executable, "-c", ASKED_FOR, *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = json.loads(done.stdout.splitlines()[-1])
    assert {name: resources.get("GPU") for name, resources in asked.items()} == {
        "image": 0.5,
        "video": 0.5,
        "decode": 0.5,
    }


def test_a_stage_that_fails_or_whose_process_dies_is_told_in_words(ray_cluster: None):
    @ray.remote(num_cpus=0.1)
    class Failing:
        def refuse(self) -> None:
            from ray_sd.errors import ArtifactError

            raise ArtifactError("no weights for the unet")

        def die(self) -> None:
            import os

            os._exit(1)

    actor = Failing.remote()
    with pytest.raises(ArtifactError, match="no weights for the unet"):
        stages.get(actor.refuse.remote())
    with pytest.raises(RaySdError, match="the process of a stage died"):
        stages.get(actor.die.remote())
