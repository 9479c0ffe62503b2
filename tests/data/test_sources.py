import gzip
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import prepare
from sample_pictures import LATENTS, PIXELS, noise_png

from ray_sd.config import DatasetConfig
from ray_sd.data.examine import source_rows
from ray_sd.data.sources import SourceRow, list_source
from ray_sd.errors import ConfigError, DataError
from ray_sd.files import Location


def read(source: dict[str, Any], **settings: Any) -> dict[str, SourceRow]:
    """All rows of a source by their id (or their place, where they have none)."""
    listing = list_source(DatasetConfig(source=source, **settings))
    rows = [row for unit in listing.units for row in listing.read(unit)]
    return {row.id or row.path: row for row in rows}


def captions(rows: dict[str, SourceRow]) -> dict[str, list[str]]:
    return {name: row.captions for name, row in rows.items() if row.reason is None}


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.DEFAULT_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            file = path.parent / "member"
            file.write_bytes(content)
            tar.add(file, name)


def test_a_folder_takes_captions_from_text_files_and_metadata(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.PNG", "deep/c.png", "deep/d.png", ".hidden.png"):
        (tmp_path / name).write_bytes(noise_png(0))
    (tmp_path / "a.txt").write_bytes("\ufeff a cät \n".encode())
    lines = [{"file_name": "c.png", "caption": "a dog"}, {"file_name": "d.png", "caption": ["one", "two"]}]
    (tmp_path / "deep" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read({"name": "image_folder", "path": str(tmp_path)})
    assert captions(rows) == {"a.png": ["a cät"], "b.PNG": [], "deep/c.png": ["a dog"], "deep/d.png": ["one", "two"]}
    assert rows["a.png"].image == noise_png(0)


def test_the_caption_column_names_the_key_of_metadata(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(noise_png(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "no", "text": "yes"}')
    rows = read({"name": "image_folder", "path": str(tmp_path)}, caption={"column": "text"})
    assert captions(rows) == {"a.png": ["yes"]}


def test_metadata_that_cannot_be_used_is_reported_by_its_line(tmp_path: Path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(noise_png(0))
    lines = ["{broken", '{"file_name": "gone.png", "caption": "x"}', '{"file_name": "a.png", "caption": 7}', "[]"]
    lines.append('{"file_name": "\\ud800.png", "caption": "x"}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    listing = list_source(DatasetConfig(source={"name": "image_folder", "path": str(tmp_path)}))
    assert {path.rpartition("/")[2]: reason for path, reason in listing.rejected} == {
        "metadata.jsonl:1": "is no JSON object",
        "a.png": "the caption is a int, not text",
        "metadata.jsonl:4": "is no JSON object",
        "gone.png": "metadata.jsonl names this picture, but it is not there",
        r"\xed\xa0\x80.png": "metadata.jsonl names this picture, but it is not there",
    }
    assert [row.id for unit in listing.units for row in listing.read(unit)] == ["b.png"]


def test_captions_that_are_not_utf8_are_rejected_with_their_row(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(noise_png(0))
    (tmp_path / "a.txt").write_bytes("Katze über Bord".encode("latin-1"))
    (tmp_path / "b.png").write_bytes(noise_png(1))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "caption": "half a pair \\ud800"}')
    listing = list_source(DatasetConfig(source={"name": "image_folder", "path": str(tmp_path)}))
    rows = [row for unit in listing.units for row in listing.read(unit)]
    assert {row.id: row.reason for row in rows} == {"a.png": "the caption is not UTF-8"}
    assert listing.rejected == [(str(tmp_path / "b.png"), "the caption is not UTF-8")]


def test_a_folder_without_pictures_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"dataset.source.path: no pictures in .*; they end in .png, "):
        list_source(DatasetConfig(source={"name": "image_folder", "path": str(tmp_path)}))


def test_a_file_name_that_is_not_utf8_is_left_out_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))).write_bytes(noise_png(0))
    assert len(read({"name": "image_folder", "path": str(folder)})) == 10
    assert "1 files are left out; their names are not UTF-8" in caplog.text


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset.source.path: there is no .*/nowhere"):
        list_source(DatasetConfig(source={"name": "image_folder", "path": str(tmp_path / "nowhere")}))


def test_the_listing_changes_with_a_file(folder: Path):
    config = DatasetConfig(source={"name": "image_folder", "path": str(folder)})
    before = list_source(config).fingerprint
    assert list_source(config).fingerprint == before
    (folder / "3.txt").write_text("another caption")
    assert list_source(config).fingerprint != before


def test_a_folder_is_read_through_a_uri(folder: Path):
    rows = read({"name": "image_folder", "path": folder.as_uri()})
    assert captions(rows) == {f"{i}.png": [f"picture number {i}"] for i in range(10)}


def test_a_folder_is_read_through_a_filesystem_that_only_fsspec_knows(folder: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"inside/{file.name}")
    rows = read({"name": "image_folder", "path": f"zip://inside::{(tmp_path / 'pictures.zip').as_uri()}"})
    assert captions(rows) == {f"{i}.png": [f"picture number {i}"] for i in range(10)}


def test_a_uri_of_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"dataset.source.path: nosuch://bucket/x: "):
        list_source(DatasetConfig(source={"name": "image_folder", "path": "nosuch://bucket/x"}))


@pytest.mark.parametrize("kind", ["image_folder", "huggingface"])
def test_the_home_of_nobody_is_refused(kind: str):
    with pytest.raises(ConfigError, match="dataset.source.path: ~nosuchuser/x is in the home of a user that is not"):
        list_source(DatasetConfig(source={"name": kind, "path": "~nosuchuser/x"}))


def test_parquet_rows_are_read_from_bytes_and_from_structs(tmp_path: Path):
    images = [noise_png(i) for i in range(5)]
    table = pa.table({"image": images, "name": list("abcde"), "caption": ["one", None, "", "four", "five"]})
    pq.write_table(table, tmp_path / "plain.parquet", row_group_size=2)
    rows = read({"name": "parquet", "path": str(tmp_path / "plain.parquet"), "id_column": "name"})
    assert captions(rows) == {"a": ["one"], "b": [], "c": [], "d": ["four"], "e": ["five"]}
    assert [row.image for row in rows.values()] == images

    (tmp_path / "outside.png").write_bytes(images[1])
    structs = [{"bytes": images[0], "path": None}, {"bytes": None, "path": str(tmp_path / "outside.png")}]
    pq.write_table(pa.table({"picture": structs}), tmp_path / "structs.parquet")
    rows = read({"name": "parquet", "path": str(tmp_path / "structs.parquet"), "image_column": "picture"})
    assert [row.image for row in rows.values()] == images[:2]
    assert [row.id for row in rows.values()] == [None, None]


def test_parquet_rows_that_cannot_be_used_are_rejected_alone(tmp_path: Path):
    bad_text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(pa.array([0, 2, 3, 3], pa.int32()).buffers()[1]), pa.py_buffer(b"ok\xff")]
    )
    table = pa.table({"image": [noise_png(0), noise_png(1), None], "caption": bad_text})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = read({"name": "parquet", "path": str(tmp_path / "x.parquet")})
    assert [row.reason for row in rows.values()] == [None, "the caption is not UTF-8", "has no picture"]


def test_a_row_takes_the_first_of_its_columns_that_has_a_caption(tmp_path: Path):
    texts = {"caption": [None, "", "c"], "text": ["a", None, "no"], "captions": [["no"], ["b", "b2"], []]}
    pq.write_table(
        pa.table({"image": [noise_png(i) for i in range(3)], "id": list("abc"), **texts}), tmp_path / "x.parquet"
    )
    source = {"name": "parquet", "path": str(tmp_path), "id_column": "id"}
    assert captions(read(source)) == {"a": ["a"], "b": ["b", "b2"], "c": ["c"]}
    assert captions(read(source, caption={"column": "text"})) == {"a": ["a"], "b": [], "c": ["no"]}


def test_captions_of_another_type_lose_their_row_alone(tmp_path: Path):
    table = pa.table({"image": [noise_png(0), noise_png(1)], "captions": [[{"text": "a"}], []]})
    pq.write_table(table, tmp_path / "x.parquet")
    first, second = read({"name": "parquet", "path": str(tmp_path)}).values()
    assert (first.reason, second.reason) == ("the caption is a dict, not text", None)


def test_a_path_that_leads_nowhere_loses_no_other_row(tmp_path: Path):
    structs = [{"bytes": None, "path": "nosuch://x"}, {"bytes": noise_png(0), "path": None}]
    pq.write_table(pa.table({"image": structs}), tmp_path / "x.parquet")
    first, second = read({"name": "parquet", "path": str(tmp_path)}).values()
    assert first.reason.startswith("cannot be read: its path: nosuch://x: ")
    assert second.image == noise_png(0)


def test_missing_columns_are_named(tmp_path: Path):
    pq.write_table(pa.table({"img": [b"x"], "text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"image_column: no column 'image' in .*x.parquet; its columns are: img, text"):
        list_source(DatasetConfig(source={"name": "parquet", "path": str(tmp_path)}))


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_captions_of_a_column_that_is_not_there_are_refused_or_told(
    kind: str, tmp_path: Path, configure: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    if kind == "parquet":
        for name in ("title", "subtitle"):
            pq.write_table(pa.table({"image": [noise_png(0)], name: ["a cat"]}), tmp_path / f"{name}.parquet")
    else:
        content = {"image": [noise_png(0)], "subtitle": ["a cat"], "title": ["a cat"]}
        datasets.Dataset.from_dict(content).save_to_disk(str(tmp_path))
    source = {"name": kind, "path": str(tmp_path)}
    words = f"dataset.caption.column: no column 'caption' in {tmp_path}; its columns are: image, subtitle, title"
    known = words.replace("'caption'", "'caption' or 'text' or 'prompt' or 'txt' or 'captions'")
    for settings, found in (({"column": "caption"}, words), ({}, known)):
        with pytest.raises(DataError, match=f"{found}; name one of them by dataset.caption.column=NAME, or "):
            prepare(configure(source, caption=settings), LATENTS)

    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("ray_sd.data.pipeline.View", stop)
    for settings, rows, told in (
        ({"column": "title"}, LATENTS, False),
        ({}, PIXELS, False),
        ({}, replace(LATENTS, templates=("x",)), False),
        ({"template": "a cat"}, LATENTS, True),
    ):
        caplog.clear()
        with pytest.raises(InterruptedError):
            prepare(configure(source, caption=settings), rows)
        assert (known in caplog.text) == told


def test_a_damaged_parquet_file_is_refused(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"x.parquet cannot be read as Parquet"):
        list_source(DatasetConfig(source={"name": "parquet", "path": str(tmp_path)}))


def test_each_row_that_a_damaged_row_group_loses_is_counted(tmp_path: Path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [noise_png(i) for i in range(50)]}), file, compression=None, use_dictionary=False)
    listing = list_source(DatasetConfig(source={"name": "parquet", "path": str(tmp_path)}))
    content = bytearray(file.read_bytes())
    content[4:40] = bytes(36)  # the first page's header
    file.write_bytes(content)
    rows = [row for unit in listing.units for row in source_rows(listing.read, unit)]
    assert len(rows) == 50
    assert all(row.reason.startswith("cannot be read after 0 rows: ") for row in rows)


def test_each_file_that_a_failing_unit_loses_is_counted():
    def fail(unit: pa.Table) -> Iterator[SourceRow]:
        yield SourceRow("a.png", "a.png", b"", [])
        raise RuntimeError("gone")

    rows = list(source_rows(fail, pa.table({"path": ["a.png", "b.png", "c.png"]})))
    reason = "cannot be read after 1 rows: RuntimeError: gone"
    assert [(row.path, row.reason) for row in rows] == [("a.png", None), ("b.png", reason), ("c.png", reason)]


def test_a_file_system_that_fails_on_one_picture_loses_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch):
    read_file = Location.read

    def fail(self: Location) -> bytes:
        if self.path.endswith("/4.png"):
            raise RuntimeError("502 from the bucket")
        return read_file(self)

    monkeypatch.setattr(Location, "read", fail)
    rows = read({"name": "image_folder", "path": str(folder)})
    assert {name: row.reason for name, row in rows.items() if row.reason} == {
        "4.png": "cannot be read: 502 from the bucket"
    }
    assert len(rows) == 10


def test_webdataset_samples_are_read_with_either_kind_of_caption(tmp_path: Path):
    members = {
        "000.png": noise_png(0),
        "000.txt": b"from text",
        "001.json": json.dumps({"caption": "from json"}).encode(),
        "001.jpg": noise_png(1),
        "002.cls": b"7",
        "dir/003.seg.png": noise_png(3),
        "004.depth.png": noise_png(4),
        "004.jpg": noise_png(5),
    }
    write_tar(tmp_path / "shard-0.tar", members)
    rows = read({"name": "webdataset", "path": str(tmp_path)})
    assert captions(rows) == {
        "shard-0.tar/000": ["from text"],
        "shard-0.tar/001": ["from json"],
        "shard-0.tar/dir/003": [],
        "shard-0.tar/004": [],
    }
    assert rows["shard-0.tar/004"].image == noise_png(5)
    assert rows["shard-0.tar/001"].image == noise_png(1)
    assert rows["shard-0.tar/002"].reason == "has no picture, only .cls"


def test_names_in_a_tar_that_are_not_utf8_are_escaped(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {"b\udcfcr.png": noise_png(0), "b\udcfcr.txt": b"a bear"})
    assert captions(read({"name": "webdataset", "path": str(tmp_path)})) == {"x.tar/b\\xfcr": ["a bear"]}


def test_a_truncated_tar_gives_what_is_before_the_damage(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {f"{i}.png": noise_png(i) for i in range(5)})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 3 * len(whole) // 10])
    config = DatasetConfig(source={"name": "webdataset", "path": str(tmp_path)}, resolution=16)
    listing = list_source(config)
    rows = list(source_rows(listing.read, listing.units[0]))
    assert len(rows) >= 2
    assert rows[-1].reason.startswith(f"cannot be read after {len(rows) - 1} rows: ")
    assert {row.reason for row in rows[:-1]} == {None}


def damage_header(shard: Path, name: str, content: bytes) -> None:
    """Overwrite the beginning of a member's header."""
    data = shard.read_bytes()
    place = data.index(name.encode() + b"\0")
    shard.write_bytes(data[:place] + content + data[place + len(content) :])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff" * 100, "the header of a member is damaged: bad checksum"),
        (bytes(512), "more follows the zeros that end a tar file"),
    ],
    ids=["garbage", "zeros"],
)
@pytest.mark.parametrize(("kind", "video"), [("png", None), ("mp4", {})], ids=["pictures", "videos"])
def test_a_tar_with_a_damaged_header_tells_so_and_gives_what_is_before(
    kind: str, video: dict | None, content: bytes, reason: str, tmp_path: Path
):
    shard = tmp_path / "x.tar"
    members = {f"{i}.{end}": f"{end} {i}".encode() for i in range(5) for end in (kind, "txt")}
    write_tar(shard, members, tarfile.USTAR_FORMAT)
    damage_header(shard, f"3.{kind}", content)
    listing = list_source(
        DatasetConfig.model_validate({"source": {"name": "webdataset", "path": str(tmp_path)}, "video": video})
    )
    *rows, last = source_rows(listing.read, listing.units[0])
    assert [(row.id, row.image, row.captions, row.reason) for row in rows] == [
        (f"x.tar/{i}", f"{kind} {i}".encode(), [f"txt {i}"], None) for i in range(3)
    ]
    assert (last.path, last.reason) == (str(shard), f"cannot be read after 3 rows: ReadError: {reason}")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("end", [0, 1, 2, 20, 2000], ids="{} blocks of zeros".format)
def test_a_tar_may_end_with_any_number_of_zeros(end: int, suffix: str, tmp_path: Path):
    write_tar(tmp_path / "x", {f"{i}.png": noise_png(i) for i in range(3)})
    data = (tmp_path / "x").read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512 + 512 * end)
    (tmp_path / f"x.{suffix}").write_bytes(data if suffix == "tar" else gzip.compress(data))
    listing = list_source(DatasetConfig(source={"name": "webdataset", "path": str(tmp_path)}))
    assert [row.reason for row in source_rows(listing.read, listing.units[0])] == [None] * 3


def test_a_saved_hugging_face_data_set_is_read(tmp_path: Path):
    import datasets

    images = [{"bytes": noise_png(i), "path": None} for i in range(3)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    saved = datasets.Dataset.from_dict({"image": images, "caption": ["a", "b", None]}, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    rows = read({"name": "huggingface", "path": str(tmp_path / "saved")})
    assert [row.captions for row in rows.values()] == [["a"], ["b"], []]
    assert [row.image for row in rows.values()] == [image["bytes"] for image in images]
    with pytest.raises(DataError, match="no split 'test' in .*; it has: train"):
        list_source(DatasetConfig(source={"name": "huggingface", "path": str(tmp_path / "saved"), "split": "test"}))


def test_a_hub_id_without_network_says_in_one_line_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        list_source(DatasetConfig(source={"name": "huggingface", "path": "somebody/some-pictures"}))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "dataset.source.path: tried a local folder (there is none) and the hub for 'somebody/some-pictures': "
    )
    assert message.endswith("save_to_disk and give that folder: dataset.source.path=/path/to/folder")
