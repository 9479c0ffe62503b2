"""Captions in files of their own: their endings, keys and paths as other tools and systems write them."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import prepare
from sample_pictures import noise_png

from ray_sd.config import DatasetConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data.sources import SourceRow, list_source
from ray_sd.errors import DataError

CAPTIONED_PIXELS = RowSpec(images="pixels", text="tokens", caption_dropout=0.0)


def write(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(noise_png(seed))


def rows(listing: Any) -> list[SourceRow]:
    return [row for unit in listing.units for row in listing.read(unit)]


CAPTION_SOURCES = {
    "a.caption": "a",
    "b.cap": "b",
    "c.json": '{"caption": "c", "width": 8}',
    "d.png.txt": "d",
    "e.TXT": "e",
    "f.json": '{"Prompt": "f"}',
    "g.png.caption": "g",
}


def test_captions_beside_are_read_by_the_endings_of_other_trainers(tmp_path: Path):
    for name, content in CAPTION_SOURCES.items():
        write(tmp_path, f"{name[0]}.png")
        (tmp_path / name).write_text(content)
    source = {"name": "image_folder", "path": str(tmp_path)}
    found = rows(list_source(DatasetConfig.model_validate({"source": source})))
    assert {row.id: row.captions for row in found} == {f"{letter}.png": [letter] for letter in "abcdefg"}


def test_of_several_captions_beside_a_picture_the_first_counts(tmp_path: Path):
    write(tmp_path, "a.png", "b.png")
    for name in ("a.txt", "a.png.txt", "a.caption", "a.cap", "a.json", "b.cap", "b.json", "c.caption"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.txt").touch()
    listing = list_source(DatasetConfig.model_validate({"source": {"name": "image_folder", "path": str(tmp_path)}}))
    assert {row.id: row.captions for row in rows(listing)} == {"a.png": ["a.txt"], "b.png": ["b.cap"]}
    assert Counter(reason for _, reason in listing.passed_over) == Counter(
        {"captions that another file goes before": 6, "captions of no picture": 1}
    )


def metadata_rows(root: Path, **caption: Any) -> dict[str, list[str]]:
    config = {"source": {"name": "image_folder", "path": str(root)}, "caption": caption}
    return {row.id: row.captions for row in rows(list_source(DatasetConfig.model_validate(config)))}


@pytest.mark.parametrize("key", ["caption", "text", "prompt", "txt", "TEXT"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "semicolons"])
def test_metadata_is_read_by_the_keys_that_are_usual(kind: str, key: str, tmp_path: Path):
    write(tmp_path, "1.png")
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", key: "a cät, sleeping"}))
    else:
        line = f'file_name,{key}\n1.png,"a cät, sleeping"\n'
        line = line if kind == "csv" else f"file_name;{key}\n1.png;a cät, sleeping\n"
        (tmp_path / "metadata.csv").write_bytes(line.encode("utf-8-sig"))
    assert metadata_rows(tmp_path) == {"1.png": ["a cät, sleeping"]}


def test_a_column_that_was_set_is_read_alone(tmp_path: Path):
    write(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "no", "title": "yes"}')
    assert metadata_rows(tmp_path, column="title") == {"1.png": ["yes"]}
    assert metadata_rows(tmp_path, column="other") == {"1.png": []}


def listed(root: Path) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Captions by picture, and what is rejected, by the file's name."""
    listing = list_source(DatasetConfig.model_validate({"source": {"name": "image_folder", "path": str(root)}}))
    found = rows(listing)
    rejected = [*listing.rejected, *((row.path, row.reason) for row in found if row.reason)]
    captions = {row.id: row.captions for row in found if not row.reason}
    return captions, [(path.rpartition("/")[2], reason) for path, reason in rejected]


def test_texts_that_windows_calls_unicode_are_read(tmp_path: Path):
    write(tmp_path, "1.png", "2.png", "3.png", "4.png", "5.png")
    contents = {"1.txt": "Kätzchen", "2.json": '{"text": "Käfer"}', "metadata.csv": "file_name,text\r\n3.png,Bär\r\n"}
    contents["metadata.jsonl"] = '{"file_name": "4.png", "text": "Löwe"}\r\n'
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode("utf-16"))
    (tmp_path / "5.txt").write_bytes("a dog".encode("utf-16-le"))
    captions, rejected = listed(tmp_path)
    assert captions == {"1.png": ["Kätzchen"], "2.png": ["Käfer"], "3.png": ["Bär"], "4.png": ["Löwe"]}
    reason = "the caption is not UTF-8: it has null characters, as UTF-16 without its mark has"
    assert rejected == [("5.png", reason)]


def test_a_table_is_read_as_people_type_it(tmp_path: Path):
    write(tmp_path, "1.png", "2.png", "3.png", "4.png", "5.png")
    lines = ["", "File_Name, Text,", '1.png, "one, two",', "2.png,one, two, three", '3.png,a 5" disk', "4.png,four"]
    (tmp_path / "metadata.csv").write_text("\n".join([*lines, '5.png,"five', ""]))
    captions, rejected = listed(tmp_path)
    assert captions == {"1.png": ["one, two"], "2.png": [], "3.png": ['a 5" disk'], "4.png": ["four"], "5.png": []}
    assert rejected == [
        ("metadata.csv:4", "has more fields than the first line: a text with ',' needs quotes around it"),
        ("metadata.csv:7", "is no CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize("first", ["image,text", "1.png,one"])
def test_a_table_that_names_no_files_is_refused(tmp_path: Path, first: str):
    write(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text(f"{first}\n1.png,one\n")
    with pytest.raises(DataError, match=f"metadata.csv has no column file_name; its columns are: {first[:5]}, "):
        listed(tmp_path)


def test_objects_without_a_file_are_told_with_their_keys(tmp_path: Path):
    write(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "1.png", "prompt": "one"}\n"1.png"\n{"file_name": 1}')
    assert listed(tmp_path)[1] == [
        ("metadata.jsonl:1", "has no file_name: its keys are image, prompt"),
        ("metadata.jsonl:2", "is no JSON object"),
        ("metadata.jsonl:3", "has no file_name: its keys are file_name"),
    ]


def test_metadata_may_be_one_list(tmp_path: Path):
    write(tmp_path, "1.png", "2.png")
    content = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(content, indent=1))
    assert listed(tmp_path) == ({"1.png": ["one"], "2.png": ["two"]}, [])


def test_all_that_is_said_of_a_picture_counts(tmp_path: Path):
    write(tmp_path, "sub/1.png", "2.png")
    lines = [("2.png", "a"), ("2.png", "b"), ("2.png", "a"), ("sub/1.png", "outer"), ("2.png", "")]
    written = (json.dumps({"file_name": name, "text": text}) for name, text in lines)
    (tmp_path / "metadata.jsonl").write_text("\n".join(written))
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\n1.png,inner\n")
    assert listed(tmp_path)[0] == {"2.png": ["a", "b"], "sub/1.png": ["outer", "inner"]}


def test_a_csv_that_is_not_utf8_loses_the_rows_that_are_not(tmp_path: Path):
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\r\n1.png,K\xe4tzchen\r\n2.png,a dog\r\n,none\r\n")
    listing = list_source(DatasetConfig.model_validate({"source": {"name": "image_folder", "path": str(tmp_path)}}))
    assert {row.id: row.captions for row in rows(listing)} == {"2.png": ["a dog"]}
    assert (str(tmp_path / "1.png"), "the caption is not UTF-8") in listing.rejected


def test_metadata_finds_pictures_whose_paths_other_systems_write(tmp_path: Path):
    composed, apart = (unicodedata.normalize(form, "Käfer.png") for form in ("NFC", "NFD"))
    write(tmp_path, "sub/1.png", "2.png", apart, "4.PNG")
    written = {r"sub\1.png": "one", "./2.png": "two", composed: "three", "4.png": "four"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in written.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert metadata_rows(tmp_path) == {"sub/1.png": ["one"], "2.png": ["two"], apart: ["three"], "4.PNG": ["four"]}


def test_a_table_s_paths_are_below_its_own_folder(tmp_path: Path):
    write(tmp_path, "sub/1.png", "sub/2.png")
    structs = [{"bytes": None, "path": path} for path in (r"sub\1.png", "./sub/2.png", "sub/gone.png")]
    pq.write_table(pa.table({"image": structs}), tmp_path / "x.parquet")
    config = {"source": {"name": "parquet", "path": str(tmp_path)}}
    listing = list_source(DatasetConfig.model_validate(config))
    first, second, gone = rows(listing)
    assert (first.image, second.image) == (noise_png(0), noise_png(1))
    assert gone.reason.startswith("cannot be read: ")
    assert listing.passed_over == []
    inside = [{"bytes": noise_png(2), "path": "sub/1.png"}]
    pq.write_table(pa.table({"image": inside}), tmp_path / "x.parquet")
    again = list_source(DatasetConfig.model_validate(config))
    assert Counter(reason for _, reason in again.passed_over) == Counter({".png": 2})


@pytest.mark.parametrize("beside", ["metadata.jsonl", "metadata.csv"])
def test_metadata_whose_keys_are_not_known_is_refused_or_told(
    beside: str, tmp_path: Path, configure: Callable, caplog: pytest.LogCaptureFixture
):
    root = tmp_path / "photos"
    write(root, "1.png", "2.png")
    if beside.endswith("csv"):
        (root / beside).write_text("file_name,alt\n1.png,a cat\n2.png,a dog\n")
    else:
        (root / beside).write_text('{"file_name": "1.png", "alt": "a cat"}\n{"file_name": "2.png", "alt": "a dog"}')
    with pytest.raises(DataError, match=r"its columns are: alt; name one of them by dataset.caption.column=NAME, or"):
        prepare(configure(root), CAPTIONED_PIXELS)
    summary = prepare(configure(root, caption={"template": "x"}), CAPTIONED_PIXELS).summary
    assert "its columns are: alt; all rows take dataset.caption.template" in caplog.text
    assert summary.templated == 2
    told = "2 have no caption and take dataset.caption.template (beside 2 are keys that are not read, alt; dataset"
    assert told in str(summary)
    named = prepare(configure(root, caption={"template": "x", "column": "alt"}), CAPTIONED_PIXELS).summary
    assert named.templated == 0
    assert "template" not in str(named)


def test_keys_of_files_beside_are_named_where_none_is_known(tmp_path: Path, configure: Callable):
    root = tmp_path / "photos"
    write(root, "1.png")
    (root / "1.json").write_text('{"alt": "a cat", "tags": ["cat"], "width": 8}')
    with pytest.raises(DataError, match=r"only the keys alt, tags, one of which dataset.caption.column=KEY reads"):
        prepare(configure(root), CAPTIONED_PIXELS)
    summary = prepare(configure(root, caption={"template": "x"}), CAPTIONED_PIXELS).summary
    assert summary.unread_keys == {"alt, tags": 1}
