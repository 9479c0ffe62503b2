"""Black bars: what is one, what is none, and what becomes of rows that have them."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import prepare
from PIL import Image, ImageDraw
from sample_pictures import LATENTS, PIXELS, encoded
from sample_videos import clip_experiment, numbered, video
from subject_pictures import photograph, rectangle

from ray_sd.config import ExperimentConfig
from ray_sd.data import PreparedData
from ray_sd.data.bars import BarMeter, Bars, measure
from ray_sd.data.reader import RowReader
from ray_sd.data.sources import SourceRow
from ray_sd.data.video.clips import open_footage
from ray_sd.data.video.timing import survey
from ray_sd.media.decode import decode
from ray_sd.media.sheets import window_pair

LETTERBOX, PILLARBOX = Bars(top=40, bottom=40), Bars(left=50, right=50)


def scene(name: str = "brick.png", size: tuple[int, int] = (320, 240)) -> Image.Image:
    return photograph(name).resize(size)


def boxed(picture: Image.Image, bars: Bars, level: int = 0, noise: float = 0) -> Image.Image:
    """A picture with bars around it."""
    size = (picture.height + bars.top + bars.bottom, picture.width + bars.left + bars.right, 1)
    black = np.random.default_rng(0).normal(level, noise, size).clip(0, 255)
    whole = Image.fromarray(np.repeat(black, 3, axis=2).astype(np.uint8))
    whole.paste(picture, (bars.left, bars.top))
    return whole


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    return decode(encoded(picture, "jpeg", quality=quality), background="#ffffff", max_pixels=10**7)


def on_black(size: tuple[int, int] = (400, 300)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", size)
    return picture, ImageDraw.Draw(picture)


@pytest.mark.parametrize(
    "bars", [LETTERBOX, PILLARBOX, Bars(bottom=50), Bars(left=60), Bars(top=20, bottom=50)], ids=str
)
@pytest.mark.parametrize(("level", "noise"), [(0, 0), (16, 0), (10, 2)])
@pytest.mark.parametrize("name", ["brick.png", "chelsea.png"])
def test_bars_are_measured_to_a_few_pixels(name: str, level: int, noise: float, bars: Bars):
    whole = boxed(scene(name), bars, level, noise)
    assert np.abs(np.subtract(measure(whole), bars)).max() <= 1
    for quality in (95, 75):
        assert np.abs(np.subtract(measure(jpeg(whole, quality)), bars)).max() <= 3


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_bars_of_a_picture_that_was_scaled_with_them_leave_no_dark_line(scale: float):
    whole = boxed(scene(), LETTERBOX)
    whole = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BICUBIC)
    bars = measure(jpeg(whole, 90))
    assert 40 * scale <= bars.top <= 40 * scale + 3
    assert np.asarray(bars.cut(whole))[0].mean() > 60


def test_a_tall_picture_in_a_wide_one_is_all_that_is_left():
    bars = Bars(left=340, right=340)
    assert measure(boxed(scene(size=(320, 570)), bars)) == bars


def test_a_frame_has_bars_on_all_four_sides():
    for bars in (Bars(6, 60, 6, 60), Bars(60, 6, 60, 6)):
        assert measure(boxed(scene(), bars)) == bars


def test_a_dark_scene_between_bars_is_seen_by_both_of_them():
    """Its shadows are as black as bars are, on the left above and on the right below."""
    picture = scene()
    ImageDraw.Draw(picture).rectangle((0, 0, 119, 119), fill=(2, 2, 2))
    ImageDraw.Draw(picture).rectangle((200, 120, 320, 240), fill=(2, 2, 2))
    assert measure(boxed(picture, LETTERBOX)) == LETTERBOX
    assert measure(boxed(picture, Bars(top=40))) == Bars()


@pytest.mark.parametrize(
    "name",
    ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "moon.png"],
)
def test_photographs_have_no_bars(name: str):
    assert measure(photograph(name)) == Bars()


def test_space_is_no_bar_whatever_lies_in_it():
    stars, draw = on_black()
    for x, y in np.random.default_rng(0).integers(0, 300, (80, 2)):
        draw.ellipse((x, y, x + 1, y + 1), fill=(200, 200, 220))
    draw.ellipse((280, 30, 320, 70), fill="white")
    assert measure(stars) == Bars()
    assert measure(Image.new("RGB", (400, 300))) == Bars()
    assert measure(Image.new("RGB", (400, 300), (16, 16, 16))) == Bars()


def test_a_night_sky_over_the_ground_is_no_bar():
    """Its ground is bright and begins sharply, but not along one line."""
    for slope in (0.0, 0.03):
        hill = np.full((300, 400, 3), 5.0)
        y, x = np.mgrid[:300, :400]
        hill[y > 60 + slope * x + (8 * np.sin(x / 40) if not slope else 0)] = 120
        noise = np.random.default_rng(0).normal(0, 3, hill.shape)
        assert measure(Image.fromarray((hill + noise).clip(0, 255).astype(np.uint8))) == Bars()


def test_the_dark_blue_of_a_sky_is_not_black():
    sky = np.zeros((300, 400, 3), np.uint8)
    sky[:50] = (0, 0, 40)
    sky[50:] = 150
    assert measure(Image.fromarray(sky)) == Bars()


def test_what_stands_on_black_is_not_cut_to_its_edges():
    for shape in ("ellipse", "rectangle"):
        for box in ((100, 50, 300, 250), (40, 50, 360, 250), (0, 50, 200, 250)):
            product, draw = on_black()
            getattr(draw, shape)(box, fill="orange")
            assert measure(product) == Bars(), (shape, box)
    face, draw = on_black((300, 300))
    draw.ellipse((0, 0, 299, 299), fill="yellow")  # an emoji that touches all borders
    assert measure(face) == Bars()
    writing, draw = on_black()
    for y in range(20, 280, 14):
        draw.text((10, y), "a page of writing on black " * 3, fill="white")
    assert measure(writing) == Bars()


def test_stripes_of_flags_are_no_bars():
    for colours in (["black", "red", "gold"], ["red", "white", "black"]):
        flag = Image.new("RGB", (300, 180))
        for number, colour in enumerate(colours):
            ImageDraw.Draw(flag).rectangle((0, 60 * number, 300, 60 * number + 59), fill=colour)
        assert measure(flag) == Bars()
        assert measure(flag.transpose(Image.Transpose.ROTATE_90)) == Bars()


def test_a_bar_with_a_title_in_it_is_left():
    whole = boxed(scene(), Bars(bottom=50))
    ImageDraw.Draw(whole).text((20, 260), "a title", fill="white")
    assert measure(whole) == Bars()


def test_shadows_that_grow_lighter_are_no_bars():
    for start in (-100, -255):
        ramp = np.linspace(start, 255, 300).clip(0, 255)[:, None, None]
        assert measure(Image.fromarray(np.tile(ramp, (1, 400, 3)).astype(np.uint8))) == Bars()


def test_dark_frames_of_a_video_are_no_bars():
    """Half of the first is black along a straight line; what follows is seen in full."""
    dark = scene()
    dark.paste((0, 0, 0), (0, 0, 320, 50))
    assert measure(dark) == Bars(top=50)
    meter = BarMeter()
    meter.add(dark)
    assert meter.may_have
    meter.add(scene())
    assert not meter.may_have
    assert meter.bars() == Bars()
    meter = BarMeter()
    for frame in (Image.new("RGB", (320, 320)), boxed(dark, LETTERBOX), boxed(scene(), LETTERBOX)):
        meter.add(frame)
    assert meter.bars() == LETTERBOX


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (31, 31)])
def test_pictures_too_small_for_bars_have_none(size: tuple[int, int]):
    assert measure(Image.new("RGB", size)) == Bars()
    assert measure(boxed(Image.new("RGB", size, "white"), Bars(top=1))) == Bars()


# From here on: what becomes of rows.


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two with bars, two without."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, bars in {"letter": LETTERBOX, "pillar": PILLARBOX, "none": Bars(), "other": Bars()}.items():
        picture = scene("coffee.png" if name == "other" else "brick.png")
        (folder / f"{name}.png").write_bytes(encoded(boxed(picture, bars)))
        (folder / f"{name}.txt").write_text(f"a picture: {name}")
    return folder


def read(data: PreparedData, config: ExperimentConfig, column: str = "pixels") -> dict[str, np.ndarray]:
    rows = PIXELS if column == "pixels" else LATENTS
    reader = RowReader(data.train, rows, config)
    count = data.train.num_rows
    values = reader.read(range(count), [0] * count, vary=False)[column]
    return {reader.id(i).partition(".")[0]: values[i] for i in range(count)}


def lines(summary: Any) -> dict[str, Bars]:
    file = Path(summary.rejected_file).with_name("bars.jsonl")
    return {line.pop("id"): Bars(**line) for line in map(json.loads, file.read_text().splitlines())}


def test_bars_are_told_and_with_the_setting_cut_off(pictures: Path, configure: Callable):
    kept = prepare(configure(pictures), PIXELS)
    file = Path(kept.summary.rejected_file).with_name("bars.jsonl")
    assert f"2 of 4 pictures have black bars (see {file}); dataset.crop_bars=true cuts them off" in str(kept.summary)
    assert lines(kept.summary) == {"letter.png": LETTERBOX, "pillar.png": PILLARBOX}
    whole = read(kept, configure(pictures))

    config = configure(pictures, crop_bars=True)
    cut = prepare(config, PIXELS)
    assert f"black bars cut off 2 of 4 pictures (see {Path(cut.summary.rejected_file).parent}" in str(cut.summary)
    assert lines(cut.summary) == {"letter.png": LETTERBOX, "pillar.png": PILLARBOX}
    pixels = read(cut, config)
    assert (pixels["letter"] == pixels["none"]).all()
    assert (pixels["pillar"] == pixels["none"]).all()
    assert (pixels["other"] == whole["other"]).all()
    assert whole["letter"][:, 0].max() < 60 < pixels["letter"][:, 0].min()
    assert cut.fingerprint != kept.fingerprint


def test_the_setting_encodes_again_only_what_it_changes(pictures: Path, configure: Callable):
    on, off = configure(pictures, crop_bars=True), configure(pictures)
    first = prepare(off, PIXELS)
    assert first.summary.encoded == 4
    second = prepare(on, PIXELS)
    assert (second.summary.encoded, second.summary.reused) == (2, 2)
    assert prepare(on, PIXELS).summary.encoded == 0
    (pictures / "note.txt").write_text("so that the source is read again")
    for config, before in ((off, first), (on, second)):
        again = prepare(config, PIXELS)
        assert again.summary.encoded == 0
        assert again.fingerprint == before.fingerprint
        assert lines(again.summary) == {"letter.png": LETTERBOX, "pillar.png": PILLARBOX}
    mirrored = prepare(configure(pictures, crop_bars=True, flip=True), PIXELS)
    assert mirrored.summary.encoded == 4
    assert [mirrored.train.load().images.count(row) for row in range(4)] == [2] * 4


def test_the_setting_alone_changes_no_data_set_without_bars(pictures: Path, configure: Callable):
    for name in ("letter", "pillar"):
        (pictures / f"{name}.png").unlink()
    on = prepare(configure(pictures, crop_bars=True), PIXELS)
    off = prepare(configure(pictures), PIXELS)
    assert (on.summary.encoded, off.summary.encoded) == (2, 0)
    assert on.fingerprint == off.fingerprint
    assert "black bars cut off 0 of 2 pictures" in str(on.summary)
    assert "bars" not in str(off.summary)


def test_rows_of_a_cache_that_knows_nothing_of_bars_are_looked_at(pictures: Path, configure: Callable, tmp_path: Path):
    prepare(configure(pictures), PIXELS)
    for file in (tmp_path / "cache").glob("pixels/*/*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["bars"]), file)
    for prepared in (tmp_path / "cache").glob("views/*/prepared.json"):
        prepared.unlink()
    assert "bars" not in str(prepare(configure(pictures), PIXELS).summary)
    config = configure(pictures, crop_bars=True)
    cut = prepare(config, PIXELS)
    assert cut.summary.encoded == 2
    assert "black bars cut off 2 of 4 pictures" in str(cut.summary)
    pixels = read(cut, config)
    assert (pixels["letter"] == pixels["none"]).all()


def test_a_mask_loses_what_its_picture_does(pictures: Path, configure: Callable, tmp_path: Path):
    (tmp_path / "masks").mkdir()
    for name, bars in (("letter", LETTERBOX), ("pillar", PILLARBOX), ("none", Bars()), ("other", Bars())):
        mask = Image.new("RGB", (320, 240))
        mask.paste("white", (0, 0, 160, 240))
        (tmp_path / "masks" / f"{name}.png").write_bytes(encoded(boxed(mask, bars, 255).convert("L")))
    mask = {"name": "files", "path": str(tmp_path / "masks")}
    config = configure(pictures, crop_bars=True, mask=mask, resolution=(24, 32))
    masks = read(prepare(config, LATENTS), config, "loss_mask")
    assert all(mask.tolist() == [[[1, 1, 0, 0]] * 3] for mask in masks.values())


def test_what_is_transparent_is_no_bar(pictures: Path, configure: Callable):
    for file in pictures.glob("*.png"):
        file.unlink()
    cut_out = scene()
    alpha = Image.new("L", cut_out.size, 255)
    alpha.paste(0, (0, 0, 320, 40))
    cut_out.putalpha(alpha)
    (pictures / "none.png").write_bytes(encoded(cut_out))
    config = configure(pictures, crop_bars=True, background="#000000")
    assert "black bars cut off 0 of 1 pictures" in str(prepare(config, PIXELS).summary)


def test_buckets_are_those_of_the_cut_pictures(pictures: Path, configure: Callable):
    settings = {"resolution": 64, "buckets": {"step": 16}}
    kept = prepare(configure(pictures, **settings), PIXELS).summary.buckets
    cut = prepare(configure(pictures, crop_bars=True, **settings), PIXELS).summary.buckets
    assert len(kept) > 1
    assert list(cut.values()) == [4]


@pytest.mark.parametrize("finder", ["foreground", "detector"])
def test_subjects_are_looked_for_in_the_cut_picture(finder: str, tmp_path: Path, configure: Callable, detector: str):
    folder = tmp_path / "scenes"
    folder.mkdir()
    scene = rectangle((150, 100, 250, 200), (255, 0, 0))
    (folder / "a.png").write_bytes(encoded(scene))
    (folder / "b.png").write_bytes(encoded(boxed(scene, LETTERBOX)))
    crop = {"name": "subject", "margin": 0.0, "max_enlargement": 100.0}
    crop |= {"detector": detector} if finder == "detector" else {}
    config = configure(folder, crop=crop, crop_bars=True)
    data = prepare(config, PIXELS)
    pixels = read(data, config)
    assert (pixels["a"] == pixels["b"]).all()
    told = Path(data.summary.contact_sheet).with_name("subjects.jsonl").read_text().splitlines()
    one, other = ({**json.loads(line), "id": ""} for line in told)
    assert one == other
    pair = window_pair(scene, one["window"], (16, 16), one["subject"])
    sheet = Image.open(data.summary.contact_sheet).convert("RGB")
    for top in (8, 8 + (sheet.height - 8) // 2):
        shown = np.asarray(sheet.crop((8, top, 8 + pair.width, top + pair.height))).astype(int)
        assert np.abs(shown - np.asarray(pair)).mean() < 1


def test_tables_and_shards_are_read_alike(pictures: Path, configure: Callable, tmp_path: Path):
    rows = [{"image": file.read_bytes(), "name": file.name, "text": "x"} for file in sorted(pictures.glob("*.png"))]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table/a.parquet")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(pictures.iterdir()):
            tar.add(file, file.name)
    for source in (
        {"name": "parquet", "path": str(tmp_path / "table"), "id_column": "name"},
        {"name": "webdataset", "path": str(tmp_path / "shard.tar")},
    ):
        summary = prepare(configure(source, crop_bars=True), PIXELS).summary
        assert "black bars cut off 2 of 4 pictures" in str(summary), source


def in_bars(frame: np.ndarray, bars: int = 24) -> np.ndarray:
    return np.pad(frame, ((bars, bars), (0, 0), (0, 0)))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """One with bars, one without, and one that is black above at first only."""
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = [numbered(number, (128, 96)) for number in range(20)]
    late = [
        np.concatenate([np.zeros_like(frame[:16]), frame[16:]]) if i < 10 else frame for i, frame in enumerate(frames)
    ]
    black = np.zeros((144, 128, 3), np.uint8)
    bars = [black] * 3 + [in_bars(frame) for frame in frames]
    for name, content in {"bars": bars, "none": frames, "late": late}.items():
        (folder / f"{name}.mp4").write_bytes(video(content))
    return folder


def clips_of(folder: Path, *settings: str, source: str = "video_folder") -> ExperimentConfig:
    cache = folder.parent / "cache"
    places = (f"dataset.source.path={folder}", f"cache_path={cache}")
    return clip_experiment(*places, *settings, source=source, method="temporal_decoder")


def test_bars_of_clips_are_told_and_with_the_setting_cut_off(videos: Path):
    whole = ("dataset.video.cut_threshold=null", "dataset.resolution=[72,64]")
    config = clips_of(videos, *whole)
    kept = prepare(config, PIXELS)
    assert "1 of 3 clips have black bars" in str(kept.summary)
    assert set(lines(kept.summary)) == {"bars.mp4"}
    assert np.abs(np.subtract(lines(kept.summary)["bars.mp4"], (0, 24, 0, 24))).max() <= 2
    config = clips_of(videos, *whole, "dataset.crop_bars=true")
    cut = prepare(config, PIXELS)
    assert (cut.summary.encoded, cut.summary.reused) == (1, 2)
    assert "black bars cut off 1 of 3 clips" in str(cut.summary)
    before, after = read(kept, config)["bars"], read(cut, config)["bars"]
    assert before[2:, :, 0].max() < 60 < after[2:, :, 0].min()
    assert prepare(config, PIXELS).summary.encoded == 0


def test_clips_begin_where_they_would_with_their_bars(videos: Path):
    random = ("dataset.video.start=random", "dataset.video.cut_threshold=null", "dataset.flip=true")
    for setting in ("false", "true"):
        prepare(clips_of(videos, *random, f"dataset.crop_bars={setting}"), PIXELS)
    files = (videos.parent / "cache").glob("pixels/*/*.parquet")
    rows = pa.concat_tables([pq.read_table(file, columns=["bars", "start", "box"]) for file in files]).to_pylist()
    starts = [row["start"] for row in rows if any(row["bars"])]
    assert len(starts) == 16
    assert all(starts.count(start) == 4 for start in starts)


def test_bars_of_frame_folders_are_cut_off(tmp_path: Path):
    folder = tmp_path / "frames"
    (folder / "a").mkdir(parents=True)
    for number in range(8):
        frame = Image.fromarray(in_bars(numbered(number, (128, 96))))
        (folder / "a" / f"{number}.jpg").write_bytes(encoded(frame, "jpeg", quality=90))
    config = clips_of(folder, "dataset.source.fps=5", "dataset.crop_bars=true", source="frame_folder")
    data = prepare(config, PIXELS)
    assert "black bars cut off 1 of 1 clips" in str(data.summary)
    assert read(data, config)["a"][:, :, 0].min() > 60


def test_few_frames_of_a_long_video_are_measured(monkeypatch: pytest.MonkeyPatch, videos: Path):
    config = clips_of(videos).dataset
    measured = []
    add = BarMeter.add
    monkeypatch.setattr(BarMeter, "add", lambda meter, picture: measured.append(picture.size) or add(meter, picture))
    with_bars = [in_bars(numbered(number % 200, (128, 96))) for number in range(300)]
    for frames, most in ((with_bars, 30), (with_bars[:40], 10), ([numbered(number) for number in range(50)], 1)):
        measured.clear()
        survey(open_footage(SourceRow("x", "x", video(frames), []), config), config)
        assert most / 2 < len(measured) <= most
