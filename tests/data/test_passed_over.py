"""What folders and shards hold beside rows: it is passed over, counted by its reason, and listed."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import prepare
from PIL import Image
from pyarrow import fs
from sample_pictures import PIXELS, encoded, noise_png, wide_gamut

from ray_sd.config import DatasetConfig
from ray_sd.config.metrics import SubjectSimilarity
from ray_sd.data.sources import Listing, list_source, webdataset
from ray_sd.data.sources.masks import with_masks
from ray_sd.errors import DataError
from ray_sd.files import HIDDEN, LEADS_BACK, LEADS_NOWHERE, OF_A_SYSTEM, Location, locate
from ray_sd.train.metrics import read_references


def write(root: Path, *names: str, content: bytes | None = None) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(noise_png(seed) if content is None else content)


def listed(path: Path, kind: str = "image_folder", **settings: Any) -> tuple[list[str], Counter[str]]:
    """Ids of a source's rows, sorted, and how much is passed over for what."""
    listing = list_source(DatasetConfig.model_validate({"source": {"name": kind, "path": str(path)}, **settings}))
    return sorted(row.id for row in rows(listing)), Counter(reason for _, reason in listing.passed_over)


def rows(listing: Listing) -> list[Any]:
    return [row for unit in listing.units for row in listing.read(unit)]


STRAYS = {
    ".ipynb_checkpoints/dog-checkpoint.png": HIDDEN,
    "deep/.git/objects/dog.png": HIDDEN,
    "deep/._dog.png": HIDDEN,
    ".Trash-1000/files/dog.png": HIDDEN,
    "__MACOSX/dog.png": OF_A_SYSTEM,
    "deep/@eaDir/dog.png/SYNOFILE_THUMB_M.jpg": OF_A_SYSTEM,
    "$RECYCLE.BIN/S-1-5-21/dog.png": OF_A_SYSTEM,
    "System Volume Information/dog.png": OF_A_SYSTEM,
    "lost+found/dog.png": OF_A_SYSTEM,
    "Thumbs/dog.png": OF_A_SYSTEM,
    "deep/Thumbs.db": OF_A_SYSTEM,
}


@pytest.mark.parametrize("kind", ["local", "fsspec"])
def test_what_editors_and_systems_leave_is_no_row(kind: str, tmp_path: Path):
    write(tmp_path, "dog.png", "deep/cat.png", *STRAYS)
    root = locate(str(tmp_path), "path")
    if kind == "fsspec":
        root = Location(fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file"))), root.path)
    found = root.search()
    assert [info.base_name for info in found.files] == ["cat.png", "dog.png"]
    assert dict(found.passed_over) == {str(tmp_path / name): reason for name, reason in STRAYS.items()}


def test_a_source_below_a_hidden_folder_is_read(tmp_path: Path):
    write(tmp_path, ".cache/thumbs/dog.png")
    assert listed(tmp_path / ".cache" / "thumbs") == (["dog.png"], Counter())


def test_a_folder_of_a_system_that_cannot_be_listed_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "dog.png", "lost+found/x.png")
    scan = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("lost+found"):
            raise PermissionError(folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert listed(tmp_path) == (["dog.png"], Counter({OF_A_SYSTEM: 1}))


def test_links_that_lead_back_are_followed_once(tmp_path: Path):
    root = tmp_path / "root"
    write(tmp_path, "root/a/1.png", "root/b/2.png", "elsewhere/3.png", "beside/4.png")
    (root / "a" / "itself").symlink_to(root / "a")
    (root / "a" / "up").symlink_to("../..")
    (root / "a" / "other").symlink_to(root / "b")
    (root / "b" / "other").symlink_to(root / "a")
    (root / "0 linked").symlink_to(tmp_path / "elsewhere")
    (root / "5.png").symlink_to(root / "b" / "2.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "round.png").symlink_to(root / "round.png")
    assert listed(root) == (
        ["0 linked/3.png", "5.png", "a/1.png", "b/2.png"],
        Counter({LEADS_BACK: 4, LEADS_NOWHERE: 2}),
    )


def test_endings_that_are_not_read_are_counted_by_name(tmp_path: Path):
    write(tmp_path, "a.png", "b.jfif", "c.JPE", "d.svg", "e.SVG", "f.psd", "g.tga", "README", "notes.md")
    names, reasons = listed(tmp_path)
    assert names == ["a.png", "b.jfif", "c.JPE"]
    assert reasons == Counter({".svg": 2, ".psd": 1, ".tga": 1, "without an ending": 1, ".md": 1})


def test_a_folder_of_other_kinds_alone_says_which(tmp_path: Path):
    write(tmp_path, "a.svg", "b.svg", "c.psd", ".hidden/d.png")
    with pytest.raises(DataError, match=r"no pictures in .*; passed over: 2 \.svg, 1 \.psd, 1 hidden"):
        listed(tmp_path)


def test_videos_of_other_kinds_are_counted_too(tmp_path: Path):
    write(tmp_path, "a.mp4", "b.ts", "c.wmv", "d.mpg", "e.png", "@eaDir/a.mp4", content=b"video")
    names, reasons = listed(tmp_path, "video_folder", video={})
    assert names == ["a.mp4"]
    assert reasons == Counter({OF_A_SYSTEM: 1, ".ts": 1, ".wmv": 1, ".mpg": 1, ".png": 1})


def test_frame_folders_leave_out_the_same(tmp_path: Path):
    write(tmp_path, "cat/1.png", "cat/2.png", "cat/.thumbs/1.png", "@eaDir/1.png", "cat/3.svg")
    write(tmp_path, "dog.txt", "cat/1.txt", content=b"a dog")
    config = {"source": {"name": "frame_folder", "path": str(tmp_path), "fps": 8}, "video": {}}
    listing = list_source(DatasetConfig.model_validate(config))
    assert [(row.id, len(row.frames)) for row in rows(listing)] == [("cat", 2)]
    assert Counter(reason for _, reason in listing.passed_over) == Counter(
        {HIDDEN: 1, OF_A_SYSTEM: 1, ".svg": 1, "captions of no video": 2}
    )


def test_tables_leave_out_the_same(tmp_path: Path):
    for name in ("a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [noise_png(0)], "name": ["one"]}), tmp_path / name)
    write(tmp_path, "README.md")
    config = {"source": {"name": "parquet", "path": str(tmp_path), "id_column": "name"}}
    listing = list_source(DatasetConfig.model_validate(config))
    assert [row.id for row in rows(listing)] == ["one"]
    assert dict(Counter(reason for _, reason in listing.passed_over)) == {HIDDEN: 1, ".md": 1}


def test_a_stray_among_masks_changes_nothing(tmp_path: Path):
    write(tmp_path, "pictures/1.png", "masks/1.png")
    config = {"source": {"name": "image_folder", "path": str(tmp_path / "pictures")}}
    config["mask"] = {"name": "files", "path": str(tmp_path / "masks")}
    dataset = DatasetConfig.model_validate(config)
    before = list_source(dataset)
    write(tmp_path, "masks/@eaDir/1.png", "masks/.ipynb_checkpoints/1.png")
    assert with_masks(list_source(dataset.model_copy(update={"mask": None})), dataset.mask).fingerprint == (
        before.fingerprint
    )


def test_references_of_a_metric_leave_out_strays(tmp_path: Path):
    write(tmp_path, "dog.png", ".ipynb_checkpoints/dog-checkpoint.png", "__MACOSX/dog.png")
    metric = SubjectSimilarity(model="x", references=(str(tmp_path),))
    dataset = DatasetConfig.model_validate({"source": {"name": "image_folder", "path": str(tmp_path)}})
    assert len(read_references(metric, dataset)) == 1


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            file = path.parent / "member"
            file.write_bytes(content)
            tar.add(file, name)
            file.unlink()


def tar_rows(path: Path) -> tuple[dict[str, tuple[bytes, list[str]]], dict[str, str]]:
    """Picture and captions of each row of tars by its id, and what is passed over, with the reason."""
    listing = list_source(DatasetConfig.model_validate({"source": {"name": "webdataset", "path": str(path)}}))
    found = rows(listing)
    good = {row.id.partition("/")[2]: (row.image, row.captions) for row in found if row.reason is None}
    return good, {row.id.rpartition(":")[2]: row.reason for row in found if row.reason is not None}


def test_strays_in_a_tar_are_no_rows(tmp_path: Path):
    names = ["./1.png", "__MACOSX/1.png", "__MACOSX/._1.png", ".DS_Store", "a/@eaDir/1.png/thumb.jpg", "LICENSE"]
    write_tar(tmp_path / "x.tar", {name: noise_png(i) for i, name in enumerate(names)})
    good, other = tar_rows(tmp_path)
    assert list(good) == ["1"]
    assert other == {
        "__MACOSX/1.png": f"passed over: {OF_A_SYSTEM}",
        "__MACOSX/._1.png": f"passed over: {HIDDEN}",
        ".DS_Store": f"passed over: {HIDDEN}",
        "a/@eaDir/1.png/thumb.jpg": f"passed over: {OF_A_SYSTEM}",
        "LICENSE": "passed over: without an ending",
    }


def test_strays_in_a_tar_that_windows_packed_are_no_rows(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {r"cats\1.png": noise_png(0), r"__MACOSX\1.png": noise_png(1)})
    good, other = tar_rows(tmp_path)
    assert (list(good), other) == ([r"cats\1"], {r"__MACOSX\1.png": f"passed over: {OF_A_SYSTEM}"})


def test_captions_in_a_tar_that_no_picture_takes_are_told(tmp_path: Path):
    names = {
        "1.image.png": noise_png(0),
        "1.caption.txt": b"a",
        "2.png": noise_png(1),
        "2.json": b"{}",
        "2.old.txt": b"b",
    }
    write_tar(tmp_path / "x.tar", names)
    good, other = tar_rows(tmp_path)
    assert {name: captions for name, (_, captions) in good.items()} == {"1.image": [], "2": []}
    assert other == dict.fromkeys(("1.caption.txt", "2.old.txt"), "passed over: captions of no picture")


def test_a_name_that_a_tar_has_twice_is_two_rows(tmp_path: Path):
    for name, start in (("x", 0), ("y", 2)):
        write_tar(tmp_path / f"{name}.tar", {"1.png": noise_png(start), "1.txt": f"{start}".encode()})
    ends = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
    ends += bytes(-len(ends) % 512)
    (tmp_path / "x.tar").write_bytes(ends + (tmp_path / "y.tar").read_bytes())
    (tmp_path / "y.tar").unlink()
    listing = list_source(DatasetConfig.model_validate({"source": {"name": "webdataset", "path": str(tmp_path)}}))
    assert [(row.image, row.captions) for row in rows(listing)] == [(noise_png(0), ["0"]), (noise_png(2), ["2"])]


def test_names_with_dots_in_a_tar_are_rows_of_their_own(tmp_path: Path):
    pictures = [noise_png(i) for i in range(8)]
    members = {
        "img.v1.0.png": pictures[0],
        "img.v1.0.txt": b"zero",
        "img.v1.1.png": pictures[1],
        "img.v1.1.json": b'{"text": "one"}',
        "img.v2.png": pictures[2],
        "img.txt": b"any",
        "alone.2024.01.png": pictures[3],
        "alone.2024.01.png.txt": b"new year",
        "two.png": pictures[4],
        "two.2.png": pictures[5],
        "two.sketch2.png": pictures[6],
        "two.caption": b"two",
    }
    write_tar(tmp_path / "x.tar", members)
    good, other = tar_rows(tmp_path)
    assert good == {
        "img.v1.0": (pictures[0], ["zero"]),
        "img.v1.1": (pictures[1], ["one"]),
        "img.v2": (pictures[2], ["any"]),
        "alone.2024.01": (pictures[3], ["new year"]),
        "two": (pictures[4], ["two"]),
        "two.2": (pictures[5], ["two"]),
    }
    assert other == {"two.sketch2.png": "passed over: pictures beside that of their key"}


def test_layers_go_with_the_picture_of_their_key(tmp_path: Path):
    members = {f"1.{name}": noise_png(i) for i, name in enumerate(("depth.png", "seg.png", "jpg", "png"))}
    members |= {"2.rgb.png": noise_png(5), "2.depth.png": noise_png(6), "3.seg.png": noise_png(7)}
    write_tar(tmp_path / "x.tar", members)
    good, other = tar_rows(tmp_path)
    assert {name: image for name, (image, _) in good.items()} == {
        "1": noise_png(2),
        "2.rgb": noise_png(5),
        "3": noise_png(7),
    }
    beside = "passed over: pictures beside that of their key"
    assert other == dict.fromkeys(("1.depth.png", "1.seg.png", "1.png", "2.depth.png"), beside)


@pytest.mark.parametrize("limit", ["GROUP_BYTES", "GROUP_MEMBERS"])
def test_a_shard_of_one_key_is_not_held_at_once(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    members = {
        f"photo.{i:04}.{end}": noise_png(i) if end == "png" else b"c" for i in range(9) for end in ("png", "txt")
    }
    write_tar(tmp_path / "x.tar", members)
    held: list[int] = []

    def count(suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
        held.append(len(suffixes))
        return own(suffixes)

    own = webdataset._own
    monkeypatch.setattr(webdataset, "_own", count)
    monkeypatch.setattr(webdataset, limit, 3 * (len(noise_png(0)) if limit == "GROUP_BYTES" else 2))
    good, other = tar_rows(tmp_path)
    assert list(good) == [f"photo.{i:04}" for i in range(9)]
    assert {tuple(captions) for _, captions in good.values()} == {("c",)}
    assert not other
    assert max(held) == 3


def test_the_summary_counts_what_is_passed_over_and_says_where_the_list_is(tmp_path: Path, configure: Callable):
    root = tmp_path / "photos"
    write(root, "1.png", "2.png", ".ipynb_checkpoints/1-checkpoint.png", "a.svg", "b.svg", "Thumbs.db")
    summary = prepare(configure(root), PIXELS).summary
    assert summary.rows == 2
    assert summary.passed_over == {".svg": 2, HIDDEN: 1, OF_A_SYSTEM: 1}
    assert str(summary).endswith(
        f"passed over 4 files (2 .svg, 1 hidden, 1 {OF_A_SYSTEM}), listed in {summary.passed_over_file}"
    )
    lines = [json.loads(line) for line in Path(summary.passed_over_file).read_text().splitlines()]
    assert {"path": str(root / "a.svg"), "reason": ".svg"} in lines
    assert len(lines) == 4
    assert prepare(configure(root), PIXELS).summary.passed_over == summary.passed_over
    write(root, ".new/1.png")
    again = prepare(configure(root), PIXELS).summary
    assert (again.encoded, again.passed_over[HIDDEN]) == (0, 2)


def test_colour_profiles_that_cannot_be_used_are_counted(tmp_path: Path, configure: Callable):
    root = tmp_path / "photos"
    root.mkdir()
    for number, profile in enumerate((b"no profile", wide_gamut(), None)):
        picture = Image.new("RGB", (24, 24), (219, 0, number))
        (root / f"{number}.png").write_bytes(encoded(picture, **({} if profile is None else {"icc_profile": profile})))
    summary = prepare(configure(root), PIXELS).summary
    assert (summary.rows, summary.profile_errors) == (3, 1)
    assert "1 have a colour profile that cannot be used, and count as they are" in str(summary)


def test_members_of_tars_are_counted_without_being_rejected(tmp_path: Path, configure: Callable):
    write_tar(tmp_path / "x.tar", {"1.png": noise_png(0), **{f".hidden{i}.png": noise_png(i) for i in range(9)}})
    summary = prepare(configure({"name": "webdataset", "path": str(tmp_path / "x.tar")}), PIXELS).summary
    assert (summary.rows, summary.rejected, summary.passed_over) == (1, 0, {HIDDEN: 9})
