"""Rows that are clips, from videos to batches."""

import io
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import prepare
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_pictures import encoded, noise_png, wide_gamut
from sample_videos import clip_experiment, counted, numbered, read_number, shifting, video

from ray_sd.config import DatasetConfig, ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData, training_batches, validation_batches
from ray_sd.data import prepare as prepare_by_ray
from ray_sd.data.lanes import LaneReader, lanes_of, to_tensors
from ray_sd.data.reader import RowReader
from ray_sd.data.sources import SourceRow, list_source
from ray_sd.data.view import View
from ray_sd.errors import DataError
from ray_sd.files import Location, locate
from ray_sd.methods import build_method
from ray_sd.models import load_model

PIXELS = RowSpec(images="pixels", text="none", caption_dropout=0.0)
CLIPS = build_method(clip_experiment("dataset.source.path=x").method).rows()
BOTH_ENDS = RowSpec(images="latents", text="none", caption_dropout=0.0, condition_frames=(0, -1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six videos of numbered frames, each beginning with a number of its own."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(6):
        frames = [numbered(20 * i + number) for number in range(20)]
        (folder / f"{i}.mp4").write_bytes(video(frames))
    return folder


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """`clip_experiment` on a path, with a cache of the test's own."""

    def configure(path: Path, *settings: str, **choices: str) -> ExperimentConfig:
        return clip_experiment(f"dataset.source.path={path}", f"cache_path={tmp_path / 'cache'}", *settings, **choices)

    return configure


def read_all(data: PreparedData, config: ExperimentConfig, rows: RowSpec) -> dict[str, dict[str, np.ndarray]]:
    """Every row by its id, first variant."""
    reader = RowReader(data.train, rows, config)
    count = data.train.num_rows
    batch = reader.read(range(count), [0] * count, vary=False)
    return {reader.id(i): {name: array[i] for name, array in batch.items()} for i in range(count)}


def numbers(clip: np.ndarray) -> list[int]:
    """Of the frames uint8 [F, 3, H, W]."""
    return [read_number(frame.transpose(1, 2, 0)) for frame in clip]


def source_rows(source: dict[str, Any], **dataset: Any) -> dict[str, SourceRow]:
    listing = list_source(DatasetConfig.model_validate({"source": source, "video": {}, **dataset}))
    rows = [row for unit in listing.units for row in listing.read(unit)]
    return {row.id or row.path: row for row in rows}


def test_a_row_is_a_clip_and_its_frames_are_those_of_its_video(folder: Path, configure: Callable):
    config = configure(folder, method="temporal_decoder")
    data = prepare(config, PIXELS)
    rows = read_all(data, config, PIXELS)
    assert data.summary.rows == data.train.num_rows == 6
    assert data.summary.buckets == {"   48 x    64": 6}
    assert {name: numbers(row["pixels"]) for name, row in rows.items()} == {
        f"{i}.mp4": [20 * i + number for number in (0, 2, 4, 6)] for i in range(6)
    }


def test_clips_are_encoded_as_the_model_itself_encodes_them(folder: Path, configure: Callable):
    """Frames in several parts, and two clips together."""
    for frames_at_once in (3, 8):
        cache = folder.parent / f"cache {frames_at_once}"
        config = configure(
            folder, "dataset.encode.dtype=float32", f"dataset.encode.batch_size={frames_at_once}", f"cache_path={cache}"
        )
        row = read_all(prepare(config, BOTH_ENDS), config, BOTH_ENDS)["3.mp4"]
        frames = read_all(prepare(config, PIXELS), config, PIXELS)["3.mp4"]["pixels"]
        model = load_model(config.model, {"vae", "image_encoder"})
        with torch.inference_mode():
            scaled = torch.tensor(frames).float() / 127.5 - 1
            mean, std = model.encode_images(scaled)
            embedding = model.embed_images(scaled[:1])
        # Other numbers of frames at once are added up in another order; other frames differ by more than 1e-2.
        assert np.allclose(row["latent_mean"], mean, atol=1e-4)
        assert np.allclose(row["latent_std"], std, atol=1e-4)
        assert np.allclose(row["image_embeds"], embedding[0], atol=1e-4)
        assert min(np.abs(one - other).max() for one, other in itertools.combinations(row["latent_mean"], 2)) > 1e-2
        assert (row["condition_pixels"] == frames[[0, -1]]).all()


@pytest.fixture(params=["here", pytest.param("by Ray", marks=pytest.mark.slow)])
def prepare_anyhow(request: pytest.FixtureRequest) -> Callable[..., PreparedData]:
    """`ray_sd.data.prepare`, and what does the same in this process."""
    return prepare if request.param == "here" else prepare_by_ray


@pytest.mark.usefixtures("ray_cluster")
def test_batches_hold_what_a_video_model_takes(folder: Path, configure: Callable, prepare_anyhow: Callable):
    config = configure(folder, "trainer.batch_size=3", "dataset.holdout=2", "trainer.validation.num_timesteps=4")
    data = prepare_anyhow(config, CLIPS)
    [batch] = training_batches(data, config, CLIPS, 0, 0, 1)
    assert {name: (tuple(values.shape), values.dtype) for name, values in batch.items()} == {
        "latent_mean": ((3, 4, 4, 6, 8), torch.float32),
        "latent_std": ((3, 4, 4, 6, 8), torch.float32),
        "condition_pixels": ((3, 1, 3, 48, 64), torch.uint8),
        "image_embeds": ((3, 1, 32), torch.float32),
        "fps": ((3,), torch.float32),
        "motion_bucket_id": ((3,), torch.float32),
        "row_seed": ((3,), torch.int64),
    }
    assert batch["fps"].tolist() == [5, 5, 5]

    held_out = list(validation_batches(data.validation, config, CLIPS, 0, 1))
    real = torch.cat([part["weight"] for part in held_out]).bool()
    quantiles = torch.cat([part["quantile"] for part in held_out])[real]
    assert quantiles.dtype == torch.float32
    assert sorted(quantiles.tolist()) == sorted([0.125, 0.375, 0.625, 0.875] * 2)
    assert not any("timesteps" in part for part in held_out)
    seeds = torch.cat([part["row_seed"] for part in held_out])[real]
    assert len(set(seeds.tolist())) == 8

    model = load_model(config.model)
    with torch.inference_mode():
        assert model.loss(batch).shape == (3,)
        assert model.loss(held_out[0]).isfinite().all()


def test_workers_read_the_same_clips_whatever_their_number(folder: Path, configure: Callable):
    config = configure(folder, "trainer.batch_size=4", "dataset.flip=true", "dataset.video.start=random")
    data = prepare(config, CLIPS)
    assert data.train.load().images.count(0) == 8
    names = ("latent_mean", "condition_pixels", "motion_bucket_id", "row_seed")

    def read(world_size: int, rank: int) -> list[dict[str, torch.Tensor]]:
        trainer = config.trainer.model_copy(update={"num_workers": world_size})
        several = config.model_copy(update={"trainer": trainer})
        reader = LaneReader(data, several, CLIPS, lanes_of(data.train, several, rank))
        return [to_tensors(reader.micro_batch(number)) for number in range(6)]

    alone = read(1, 0)
    for world_size in (2, 4):
        ranks = [read(world_size, rank) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            for name in names:
                assert torch.equal(torch.cat([rank[step][name] for rank in ranks]), whole[name])
    assert len({clip.numpy().tobytes() for batch in alone for clip in batch["latent_mean"]}) > 12


def test_progress_counts_clips_alone(
    folder: Path, configure: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ray_sd.data.passes.LOG_SECONDS", -1)
    (folder / "broken.mp4").write_bytes(b"no video")
    settings = ("dataset.video.start={name: random, num_variants: 3}", "dataset.max_rejected_fraction=0.5")
    with caplog.at_level(logging.INFO):
        summary = prepare(configure(folder, *settings, method="temporal_decoder"), PIXELS).summary
    told = [int(count) for count in re.findall(r"data: (\d+) encoded", caplog.text)]
    assert told[-1] == 3 * summary.encoded == 18


def test_only_what_changes_frames_is_encoded_again(folder: Path, configure: Callable, caplog: pytest.LogCaptureFixture):
    def counts(*settings: str) -> tuple[int, int]:
        summary = prepare(configure(folder, *settings, method="temporal_decoder"), PIXELS).summary
        return summary.encoded, summary.reused

    assert counts() == (6, 0)
    with caplog.at_level(logging.INFO):
        assert counts() == (0, 6)
    assert "data: 6 rows; encoded 0, reused 6 of 6" in caplog.text
    (folder / "3.txt").write_text("a caption")
    for unchanged in (
        "dataset.holdout=2",
        "dataset.video.motion_bucket_id=90",
        "dataset.video.typical_motion=0.3",
        "dataset.video.max_seconds=99",
        "dataset.max_pixels=9999",
    ):
        assert counts(unchanged) == (0, 6)
    (folder / "3.mp4").write_bytes(counted(30))
    assert counts() == (1, 5)
    for changed in (
        "dataset.video.fps=4",
        "dataset.video.num_frames=3",
        "dataset.video.short=pad",
        "dataset.video.cut_threshold=null",
        "dataset.video.start=random",
    ):
        assert counts(changed) == (6, 0)
    assert counts("dataset.video.start={name: random, num_variants: 6}") == (6, 0)
    assert counts("dataset.video.start={name: random, num_variants: 3}") == (0, 6)


def test_clips_with_other_condition_frames_share_nothing(folder: Path, configure: Callable):
    config = configure(folder)
    shapes = []
    for rows in (CLIPS, BOTH_ENDS, CLIPS):
        data = prepare(config, rows)
        shapes.append((data.summary.encoded, read_all(data, config, rows)["3.mp4"]["condition_pixels"].shape))
    assert shapes == [(6, (1, 3, 48, 64)), (6, (2, 3, 48, 64)), (0, (1, 3, 48, 64))]


def test_clips_of_another_image_encoder_or_processor_share_nothing(
    tiny_video: Path, folder: Path, tmp_path: Path, configure: Callable
):
    shutil.copytree(tiny_video, tmp_path / "other encoder")
    weights = tmp_path / "other encoder" / "image_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.copytree(tiny_video, tmp_path / "other processor")
    settings = tmp_path / "other processor" / "feature_extractor" / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))

    def cached(base: Path) -> str:
        config = configure(folder, "model=svd", f"model.base={base}")
        return View(config, CLIPS, locate(str(tmp_path), "cache_path"), list_source(config.dataset)).images.name

    shutil.copytree(tiny_video, tmp_path / "same")
    bases = [tiny_video, tmp_path / "same", tmp_path / "other encoder", tmp_path / "other processor"]
    names = [cached(base) for base in bases]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize("rows", [PIXELS, CLIPS], ids=["pixels", "latents"])
def test_clips_of_another_format_share_nothing(
    rows: RowSpec, folder: Path, tmp_path: Path, configure: Callable, monkeypatch: pytest.MonkeyPatch
):
    config = configure(folder)

    def folders() -> list[str]:
        view = View(config, rows, locate(str(tmp_path), "cache_path"), list_source(config.dataset))
        return [view.images.name, view.folder.name]

    before = folders()
    assert folders() == before
    monkeypatch.setattr("ray_sd.data.view.CLIP_FORMAT", 0)
    assert not set(folders()) & set(before)


def test_what_is_cached_is_held_against_the_limits_as_well(folder: Path, configure: Callable, rejected: Callable):
    (folder / "long.mp4").write_bytes(counted(60))
    config = configure(folder, method="temporal_decoder")
    assert prepare(config, PIXELS).summary.rows == 7
    limited = configure(
        folder, "dataset.video.max_seconds=5", "dataset.max_rejected_fraction=0.5", method="temporal_decoder"
    )
    summary = prepare(limited, PIXELS).summary
    assert (summary.encoded, summary.reused) == (0, 6)
    assert rejected(summary) == {"long.mp4": "lasts more than dataset.video.max_seconds=5: at least 6.0 s"}


def test_still_videos_are_left_out_without_counting_as_rejected(
    tmp_path: Path, configure: Callable, rejected: Callable
):
    folder = tmp_path / "videos"
    folder.mkdir()
    for step in (0, 1, 4):
        (folder / f"{step}.mp4").write_bytes(video(shifting(20, step)))
    config = configure(folder, method="temporal_decoder")
    before = prepare(config, PIXELS)
    assert before.summary.rows == 3
    # 5 frames a second that are 2 and 8 of 128 pixels apart, so 0.08 and 0.31 of the width a second.
    motions = before.train.load().motions.flatten().to_numpy()
    assert motions == pytest.approx([0, 0.078, 0.31], rel=0.15, abs=0.005)
    for bound, kept in ((0.01, 2), (0.15, 1)):
        moving = configure(folder, f"dataset.video.min_motion={bound}", method="temporal_decoder")
        summary = prepare(moving, PIXELS).summary
        assert (summary.rows, summary.encoded, summary.rejected, summary.still) == (kept, 0, 0, 3 - kept)
        assert f"; {3 - kept} move too little and are left out, listed in " in str(summary)
        assert "; rejected" not in str(summary)
        assert rejected(summary)["0.mp4"] == f"moves too little: 0.0000, dataset.video.min_motion is {bound}"
        assert prepare(moving, PIXELS).summary.rows == kept  # also when nothing is read again
    with pytest.raises(DataError, match="3 of 3 rows were rejected, so nothing is left; most often .3.: moves too lit"):
        prepare(configure(folder, "dataset.video.min_motion=2", method="temporal_decoder"), PIXELS)


def test_each_clip_is_judged_by_its_own_motion(tmp_path: Path, configure: Callable, rejected: Callable):
    """Videos of which a half stands still, the first one or the second, and one that stands still as a whole."""
    folder = tmp_path / "videos"
    folder.mkdir()
    moving = shifting(40, 4)
    for name, frames in {
        "late": [*moving[:1] * 40, *moving],
        "early": [*moving, *moving[-1:] * 40],
        "never": moving[:1] * 80,
    }.items():
        (folder / f"{name}.mp4").write_bytes(video(frames))
    settings = ("dataset.video.start={name: random, num_variants: 12}", "dataset.video.cut_threshold=null")
    whole = prepare(configure(folder, *settings), CLIPS)
    before = whole.train.load()
    motions = dict(zip(before.ids.to_pylist(), before.motions.to_pylist(), strict=True))
    assert all(min(motions[name]) < 0.05 < max(motions[name]) for name in ("late.mp4", "early.mp4"))

    config = configure(folder, *settings, "dataset.video.min_motion=0.05")
    data = prepare(config, CLIPS)
    index = data.train.load()
    kept = {name: [motion for motion in motions[name] if motion >= 0.05] for name in ("early.mp4", "late.mp4")}
    assert dict(zip(index.ids.to_pylist(), index.motions.to_pylist(), strict=True)) == kept
    assert [index.images.count(i) for i in range(2)] == [len(values) for values in kept.values()]
    left_out = 24 - sum(map(len, kept.values()))
    assert (data.summary.still, data.summary.still_clips, data.summary.encoded) == (1, left_out, 0)
    assert f"; {left_out} still clips of videos that move elsewhere are left out" in str(data.summary)
    assert rejected(data.summary) == {"never.mp4": "moves too little: 0.0000, dataset.video.min_motion is 0.05"}
    assert prepare(config, CLIPS).fingerprint == data.fingerprint != whole.fingerprint
    mirrored = prepare(configure(folder, *settings, "dataset.video.min_motion=0.05", "dataset.flip=true"), CLIPS)
    assert mirrored.summary.still_clips == left_out

    reader = RowReader(data.train, CLIPS, config)
    buckets = reader.read([0] * 100 + [1] * 100, list(range(200)))["motion_bucket_id"]
    assert len(set(buckets.tolist())) > 2
    assert buckets.min() >= config.dataset.video.motion_bucket(0.05)


def test_still_videos_neither_excuse_broken_ones_nor_are_blamed_for_them(tmp_path: Path, configure: Callable):
    """One broken video of three that are wanted is a third, whatever else is left out."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        (folder / f"still {number}.mp4").write_bytes(video(shifting(20 + number, 0)))
    for name, content in {"a": video(shifting(20, 4)), "b": video(shifting(30, 4)), "c": b"broken"}.items():
        (folder / f"{name}.mp4").write_bytes(content)
    settings = ("dataset.video.min_motion=0.1", "dataset.max_rejected_fraction={}")
    strict, lenient = (
        configure(folder, *(setting.format(share) for setting in settings), method="temporal_decoder")
        for share in (0.3, 0.4)
    )
    with pytest.raises(DataError, match=r"1 of 3 rows were rejected, more than .*; most often .1.: cannot be decoded;"):
        prepare(strict, PIXELS)
    summary = prepare(lenient, PIXELS).summary
    assert (summary.rows, summary.rejected, summary.still) == (2, 1, 3)
    assert str(summary).endswith(f"; rejected 1, listed in {summary.rejected_file}")


def test_motion_becomes_the_bucket_and_one_bucket_can_stand_for_all(tmp_path: Path, configure: Callable):
    folder = tmp_path / "videos"
    folder.mkdir()
    for step in (0, 1, 4):
        (folder / f"{step}.mp4").write_bytes(video(shifting(20, step)))
    config = configure(folder)
    data = prepare(config, CLIPS)
    buckets = {name: row["motion_bucket_id"] for name, row in read_all(data, config, CLIPS).items()}
    assert buckets["0.mp4"] < 15
    assert buckets["1.mp4"] == pytest.approx(112, abs=12)
    assert buckets["4.mp4"] == pytest.approx(224, abs=20)
    assert data.summary.motion.startswith(
        f"motion buckets {min(buckets.values()):g} to {max(buckets.values()):g}, in the"
    )
    lines = Path(data.summary.motion.partition("see ")[2].removesuffix(")")).read_text().splitlines()
    assert {line["id"]: line["motion_bucket_id"] for line in map(json.loads, lines)} == {
        name: [bucket] for name, bucket in buckets.items()
    }
    fixed = configure(folder, "dataset.video.motion_bucket_id=127")
    assert {row["motion_bucket_id"] for row in read_all(prepare(fixed, CLIPS), fixed, CLIPS).values()} == {127}


def test_every_source_gives_the_same_clips(tmp_path: Path, configure: Callable):
    frames = [numbered(number) for number in range(20)]
    data = video(frames)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "cat.mp4").write_bytes(data)
    (tmp_path / "frames" / "cat").mkdir(parents=True)
    for number, frame in enumerate(frames):
        (tmp_path / "frames" / "cat" / f"{number}.png").write_bytes(encoded(Image.fromarray(frame)))
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"video": [data], "name": ["cat"]}), tmp_path / "tables" / "x.parquet")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as tar:
        tar.add(tmp_path / "videos" / "cat.mp4", "cat.mp4")
    sources = {
        "video_folder": ("videos", "cat.mp4", ()),
        "frame_folder": ("frames", "cat", ("dataset.source.fps=10",)),
        "parquet_videos": ("tables", "cat", ("dataset.source.id_column=name",)),
        "webdataset_videos": ("tars", "x.tar/cat", ()),
    }
    for source, (path, name, settings) in sources.items():
        config = configure(tmp_path / path, *settings, source=source, method="temporal_decoder")
        rows = read_all(prepare(config, PIXELS), config, PIXELS)
        assert {row: numbers(clip["pixels"]) for row, clip in rows.items()} == {name: [0, 2, 4, 6]}


def test_frames_of_a_folder_are_in_the_natural_order_of_their_names(tmp_path: Path):
    for name in ("frame10.png", "frame2.png", "frame1.PNG", "deep/3.jpg", "deep/3²1.jpg", "deep/note.md"):
        file = tmp_path / "cat" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    (tmp_path / "cat.txt").write_text("a cat")
    rows = source_rows({"name": "frame_folder", "path": str(tmp_path), "fps": 24})
    assert {name: (row.frames, row.captions) for name, row in rows.items()} == {
        "cat": ([b"frame1.PNG", b"frame2.png", b"frame10.png"], ["a cat"]),
        "cat/deep": ([b"deep/3.jpg", "deep/3²1.jpg".encode()], []),
    }
    [unit] = list_source(
        DatasetConfig.model_validate(
            {"source": {"name": "frame_folder", "path": str(tmp_path / "cat"), "fps": 24}, "video": {}}
        )
    ).units
    assert set(unit["path"].to_pylist()) == {str(tmp_path / "cat"), str(tmp_path / "cat" / "deep")}


def test_frames_whose_colour_profile_cannot_be_used_are_counted_with_their_row(tmp_path: Path, configure: Callable):
    for name, profile in (("good", wide_gamut()), ("broken", b"no profile")):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for number in range(20):
            options = {"icc_profile": profile} if number == 5 else {}
            frame = encoded(Image.fromarray(numbered(number)), **options)
            (tmp_path / "frames" / name / f"{number}.png").write_bytes(frame)
    settings = ("dataset.source.fps=10", "dataset.video.cut_threshold=null")
    config = configure(tmp_path / "frames", *settings, source="frame_folder", method="temporal_decoder")
    summary = prepare(config, PIXELS).summary
    assert (summary.rows, summary.profile_errors) == (2, 1)


def test_folders_without_frames_or_videos_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"dataset.source.path: no folders with pictures in .*; they end in .png, "):
        source_rows({"name": "frame_folder", "path": str(tmp_path), "fps": 24})
    (tmp_path / "x.png").write_bytes(noise_png(0))
    with pytest.raises(DataError, match=r"dataset.source.path: no videos in .*; they end in .mp4, "):
        source_rows({"name": "video_folder", "path": str(tmp_path)})


def test_videos_take_captions_as_pictures_do(tmp_path: Path):
    for name in ("a.mp4", "b.MOV", "c.webm"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.MOV", "caption": "a dog"}\n{"file_name": "d.mp4"}')
    rows = source_rows({"name": "video_folder", "path": str(tmp_path)})
    assert {name: row.captions for name, row in rows.items()} == {"a.mp4": ["a cat"], "b.MOV": ["a dog"], "c.webm": []}


def test_large_videos_are_rejected_unread(tmp_path: Path):
    large, small = b"x" * (2 << 20), b"y"
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(large)
    (tmp_path / "videos" / "b.mp4").write_bytes(small)
    for name in ("a", "b"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for number in range(2):
            content = b"x" * (600 << 10) if name == "a" else small
            (tmp_path / "frames" / name / f"{number}.png").write_bytes(content)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "videos" / "a.mp4", "a.mp4")
        tar.add(tmp_path / "videos" / "b.mp4", "b.mp4")
    reason = "MB large, more than dataset.video.max_megabytes=1; not decoded"
    for source in ({"name": "video_folder", "path": "videos"}, {"name": "frame_folder", "path": "frames", "fps": 9}):
        settings = {"source": {**source, "path": str(tmp_path / source["path"])}, "video": {"max_megabytes": 1}}
        listing = list_source(DatasetConfig.model_validate(settings))
        [(path, words)] = listing.rejected
        assert Path(path).stem == "a"
        assert words.endswith(reason)
        assert [Path(row.path).stem for unit in listing.units for row in listing.read(unit)] == ["b"]
    rows = source_rows({"name": "webdataset", "path": str(tmp_path / "x.tar")}, video={"max_megabytes": 1})
    assert {name: (row.image, row.reason) for name, row in rows.items()} == {
        "x.tar/a": (b"", f"is 2.0 {reason}"),
        "x.tar/b": (small, None),
    }


def test_a_large_video_that_a_table_names_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, content in (("a.mp4", b"x" * (2 << 20)), ("b.mp4", b"y")):
        (tmp_path / name).write_bytes(content)
    structs = [{"bytes": None, "path": str(tmp_path / f"{name}.mp4")} for name in "ab"]
    pq.write_table(pa.table({"clip": structs}), tmp_path / "x.parquet")
    read = []
    whole = Location.read
    monkeypatch.setattr(Location, "read", lambda file: read.append(file.path) or whole(file))
    source = {"name": "parquet", "path": str(tmp_path / "x.parquet"), "video_column": "clip"}
    [large, small] = source_rows(source, video={"max_megabytes": 1}).values()
    assert large.reason == "is 2.0 MB large, more than dataset.video.max_megabytes=1; not decoded"
    assert (small.image, small.reason) == (b"y", None)
    assert [Path(path).name for path in read] == ["b.mp4"]


def test_parquet_rows_are_read_from_the_video_column(tmp_path: Path):
    (tmp_path / "outside.mp4").write_bytes(b"outside")
    structs = [{"bytes": b"inside", "path": None}, {"bytes": None, "path": str(tmp_path / "outside.mp4")}, None]
    table = pa.table({"clip": structs, "image": [b"p"] * 3, "caption": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = {"name": "parquet", "path": str(tmp_path / "x.parquet"), "video_column": "clip"}
    rows = list(source_rows(source).values())
    assert [(row.image, row.captions) for row in rows[:2]] == [(b"inside", ["a"]), (b"outside", ["b"])]
    assert rows[2].reason == "has no video"
    with pytest.raises(
        DataError, match=r"dataset.source.video_column: no column 'video' in .*; its columns are: clip, "
    ):
        source_rows({**source, "video_column": "video"})


def test_a_tar_s_sample_without_a_video_is_rejected(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"a.jpg": b"p", "a.txt": b"a", "b.webm": b"v", "b.json": b'{"caption": "a dog"}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = source_rows({"name": "webdataset", "path": str(tmp_path / "x.tar")})
    assert rows["x.tar/a"].reason == "has no video, only .jpg, .txt"
    assert (rows["x.tar/b"].image, rows["x.tar/b"].captions) == (b"v", ["a dog"])


def test_pictures_load_nothing_that_only_videos_need():
    program = (
        "import sys; import ray_sd.data, ray_sd.data.encode, ray_sd.data.lanes, ray_sd.data.passes;"
        "slow = {'av', 'cv2', 'scenedetect'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
