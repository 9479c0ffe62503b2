import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from in_process import in_process, prepare
from PIL import Image
from sample_pictures import PIXELS, bomb_png, encoded, noise_png
from subject_pictures import BLUE, RED, find, overlap, rectangle

from ray_sd.config import ExperimentConfig
from ray_sd.config.dataset import SubjectCrop
from ray_sd.config.rows import RowSpec
from ray_sd.data import finders, subjects
from ray_sd.data import prepare as prepare_by_ray
from ray_sd.data.crops import variants
from ray_sd.data.examine import Examination, KnownKeys, examine
from ray_sd.data.finders import Subject
from ray_sd.data.reader import RowReader
from ray_sd.data.sources import list_source
from ray_sd.media.decode import Layers
from ray_sd.media.sheets import window_pair

LATENTS_ONLY = RowSpec(images="latents", text="none", caption_dropout=0.0)
OBJECTS = {
    "a.png": (40, 30, 140, 180),
    "b.png": (250, 150, 370, 250),
    "c.png": (30, 190, 110, 270),
}
"""Where the object is in each picture of 400x300 pixels."""


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Three pictures with an object each, and one with nothing."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name, box in OBJECTS.items():
        (folder / name).write_bytes(encoded(rectangle(box, RED)))
    (folder / "nothing.png").write_bytes(encoded(Image.new("RGB", (400, 300), "white")))
    return folder


@pytest.fixture
def stored() -> Iterator[Callable[[ExperimentConfig], dict[str, dict]]]:
    """Reads what the cache keeps of every unmirrored window, by id."""

    def stored(config: ExperimentConfig) -> dict[str, dict]:
        columns = ["id", "box", "subject", "subject_label", "subject_score", "flip"]
        tables = [pq.read_table(file, columns=columns) for file in Path(config.cache_path).glob("[pl]*/*/*.parquet")]
        rows = pa.concat_tables(tables).to_pylist()
        return {row["id"]: row for row in rows if not row["flip"]}

    return stored


def pictures(prepared: Any, config: ExperimentConfig) -> dict[str, np.ndarray]:
    reader = RowReader(prepared.train, PIXELS, config)
    count = prepared.train.num_rows
    pixels = reader.read(range(count), [0] * count, vary=False)["pixels"]
    return {reader.id(i): pixels[i] for i in range(count)}


def lines(summary: Any) -> dict[str, dict]:
    file = Path(summary.contact_sheet).with_name("subjects.jsonl")
    return {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}


def test_pictures_are_cut_to_their_subject_and_the_others_from_the_middle(
    scenes: Path, configure: Callable, stored: Callable
):
    config = configure(scenes, crop={"name": "subject", "margin": 0.0, "max_enlargement": 100.0})
    prepared = prepare(config, PIXELS)
    for name, pixels in pictures(prepared, config).items():
        red = (pixels[0] > 200) & (pixels[1] < 60)
        assert red.mean() > 0.45 if name in OBJECTS else not red.any(), name
    cut = stored(config)
    assert all(overlap(cut[name]["subject"], box) > 0.9 for name, box in OBJECTS.items())
    assert cut["nothing.png"]["subject"] is None
    assert cut["nothing.png"]["box"] == [50, 0, 350, 300]

    summary = prepared.summary
    assert summary.not_found == 1
    words = f"subject found in 3 of 4, the other 1 are cut from the middle (see {summary.contact_sheet})"
    assert words in str(summary)
    told = lines(summary)
    assert told["nothing.png"] == {
        "id": "nothing.png", "label": None, "score": None, "subject": None, "window": [50, 0, 350, 300],
    }  # fmt: skip
    assert told["a.png"]["label"] == "foreground"
    assert told["a.png"]["window"] == pytest.approx(cut["a.png"]["box"], abs=0.1)


def test_what_was_found_is_told_again_when_all_is_cached(scenes: Path, configure: Callable):
    config = configure(scenes, crop="subject")
    first = prepare(config, PIXELS).summary
    sheet, told = Path(first.contact_sheet).read_bytes(), lines(first)
    known = prepare(config, PIXELS).summary
    assert asdict(known) == asdict(first) | {"encoded": 0}
    (scenes / "a.txt").write_text("so that the source is read again")
    again = prepare(config, PIXELS).summary
    assert (again.encoded, again.not_found) == (0, 1)
    assert again.contact_sheet != first.contact_sheet
    assert Path(again.contact_sheet).read_bytes() == sheet
    assert lines(again) == told


def test_cached_pictures_are_not_searched_again(scenes: Path, configure: Callable, monkeypatch: pytest.MonkeyPatch):
    class NoFinder:
        def __init__(self, crop: SubjectCrop) -> None: ...

        def find(self, pictures: list[Layers]) -> list[Subject | None]:
            raise AssertionError("searched")

    config = configure(scenes, crop="subject").dataset
    listing, kinds = list_source(config), variants(config)

    def run(known: list[bytes]) -> list[dict]:
        with in_process():
            keys = ray.put(KnownKeys(np.sort(np.array(known, dtype="S16")), np.array([], dtype="S16")))
            examination = Examination(listing.read, config, kinds, False, keys)
            return pa.concat_tables(examine(listing.units[0], examination=examination)).to_pylist()

    encoded_now = run([])
    assert sum(row["key"] is not None for row in encoded_now) == 4
    monkeypatch.setitem(finders.FINDERS, "foreground", NoFinder)
    assert [row["key"] for row in run([row["key"] for row in encoded_now])] == [None] * 4
    with pytest.raises(AssertionError, match="searched"):
        run([row["key"] for row in encoded_now[1:]])


def test_another_margin_cuts_anew_beside_other_crops_in_one_cache(scenes: Path, configure: Callable):
    center = pictures(prepare(configure(scenes), PIXELS), configure(scenes))
    found = {}
    for margin in (0.0, 1.0):
        config = configure(scenes, crop={"name": "subject", "margin": margin}, flip=True)
        prepared = prepare(config, PIXELS)
        assert prepared.summary.encoded == 4
        found[margin] = pictures(prepared, config)
        places = prepared.train.load().images
        assert [places.count(row) for row in range(4)] == [2] * 4
    assert not (found[0.0]["a.png"] == found[1.0]["a.png"]).all()
    assert not (center["a.png"] == found[1.0]["a.png"]).all()
    assert (center["nothing.png"] == found[1.0]["nothing.png"]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_detector_searches_in_actors_what_can_be_read(
    scenes: Path, configure: Callable, detector: str, stored: Callable, rejected: Callable
):
    large = rectangle((1200, 300, 2000, 1100), BLUE, (2400, 1800))
    upright = large.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    (scenes / "large.jpg").write_bytes(encoded(upright, "jpeg", exif=exif, quality=95))
    (scenes / "bomb.png").write_bytes(bomb_png())
    (scenes / "empty.png").write_bytes(b"")
    crop = {"name": "subject", "detector": {"path": detector, "batch_size": 3}, "max_enlargement": 100.0}
    config = configure(scenes, crop=crop, flip=True, max_rejected_fraction=0.5)
    prepared = prepare_by_ray(config, LATENTS_ONLY)
    assert set(rejected(prepared.summary)) == {"bomb.png", "empty.png"}
    cut = stored(config)
    assert set(cut) == {*OBJECTS, "large.jpg", "nothing.png"}
    assert {name: row["subject_label"] for name, row in cut.items()}["large.jpg"] == "dog"
    # Shown sideways, or in pixels of what was shown to the model, there would be no overlap at all.
    assert overlap(cut["large.jpg"]["subject"], (1200, 300, 2000, 1100)) > 0.5
    assert all(cut[name]["subject_label"] == "cat" for name in OBJECTS)
    (alone,) = find(crop | {"detector": detector}, Image.open(scenes / "a.png"))
    assert cut["a.png"]["subject"] == pytest.approx(alone.box, abs=0.1)
    assert cut["a.png"]["subject_score"] == pytest.approx(alone.score, abs=1e-3)
    assert lines(prepared.summary)["a.png"]["label"] == "cat"

    again = prepare(configure(scenes, crop=crop, max_rejected_fraction=0.5), LATENTS_ONLY)
    assert (again.summary.encoded, again.summary.reused) == (0, 5)


def test_the_contact_sheet_shows_each_picture_beside_its_window(scenes: Path, configure: Callable):
    for name in ("b.png", "c.png", "nothing.png"):
        (scenes / name).unlink()
    crop = {"name": "subject", "margin": 0.25, "max_enlargement": 100.0}
    summary = prepare(configure(scenes, crop=crop), PIXELS).summary
    line = lines(summary)["a.png"]
    pair = window_pair(Image.open(scenes / "a.png").convert("RGB"), line["window"], (16, 16), line["subject"])
    sheet = Image.open(summary.contact_sheet).convert("RGB")
    shown = np.asarray(sheet.crop((8, 8, 8 + pair.width, 8 + pair.height))).astype(int)
    assert np.abs(shown - np.asarray(pair)).mean() < 1  # lines are rounded to tenths of a pixel


def test_the_contact_sheet_takes_pictures_from_all_over_the_source(tmp_path: Path, configure: Callable):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.png").write_bytes(b"never decoded")
    names = [row.id for row in subjects._sample(list_source(configure(folder).dataset))]
    assert len(names) == 64
    assert names[0] == "000.png"
    assert names[-1] > "290.png"

    tables = tmp_path / "tables"
    tables.mkdir()
    for i in range(20):
        table = pa.table(
            {"image": [noise_png(20 * i + j) for j in range(20)], "name": [f"{i:02}-{j:02}" for j in range(20)]}
        )
        pq.write_table(table, tables / f"{i:02}.parquet")
    source = {"name": "parquet", "path": str(tables), "id_column": "name"}
    names = [row.id for row in subjects._sample(list_source(configure(source).dataset))]
    assert len(names) == 64
    assert len({name[:2] for name in names}) == 8


def test_settings_that_contradict_each_other_are_refused(configure: Callable, tmp_path: Path):
    def config(**crop: Any) -> SubjectCrop:
        return SubjectCrop.model_validate(crop)

    assert config(detector="a/b").finder == "detector"
    for crop, words in (
        ({"finder": "detector"}, "finder 'detector' needs a model"),
        ({"finder": "cascade", "detector": "a/b"}, "finder 'cascade' asks no model"),
        ({"labels": ["cat"]}, "finder 'foreground' knows no labels"),
        ({"finder": "cascade", "labels": ["cat fase"]}, "no label 'cat fase'; did you mean 'cat face'?"),
    ):
        with pytest.raises(ValueError, match=words):
            config(**crop)
