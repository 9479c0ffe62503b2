"""Folders of pictures each of which is one video, with a caption in a file beside the folder."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from ray_sd.config.dataset import DatasetConfig, FrameFolderSource
from ray_sd.data.sources.base import (
    IMAGES,
    SETTING,
    UNREADABLE,
    Listing,
    SourceRow,
    fingerprint,
    list_files,
    nothing_there,
    relative_path,
    too_large,
)
from ray_sd.data.sources.caption_files import CAPTION_FILES, match_captions, read_captions
from ray_sd.errors import DataError
from ray_sd.files import Location, locate
from ray_sd.media.decode import RejectedError

FOLDERS_PER_UNIT = 8
_UNIT = pa.schema([("path", pa.string()), ("frames", pa.list_(pa.string())), ("text_path", pa.string())])


def list_frame_folder(source: FrameFolderSource, dataset: DatasetConfig) -> Listing:
    root = locate(source.path, SETTING)
    found = list_files(root, source.path, (*IMAGES, *CAPTION_FILES))
    folders: dict[str, list[fs.FileInfo]] = defaultdict(list)
    for info in found.files:
        if info.base_name.lower().endswith(IMAGES):
            folders[info.path.rpartition("/")[0]].append(info)
    if not folders:
        raise nothing_there(f"folders with pictures in {source.path}; they end in {', '.join(IMAGES)}", found)
    beside = {info.path: info.size for info in found.files if info.base_name.lower().endswith(CAPTION_FILES)}
    texts, unread = match_captions({path: (path,) for path in folders}, beside, "video")
    rejected, rows = [], []
    for path, frames in folders.items():
        size = sum(info.size for info in frames)
        if dataset.video is not None and size > dataset.video.max_bytes:
            rejected.append((path, too_large(size, dataset.video.max_bytes)))
            continue
        names = sorted((info.path for info in frames), key=_natural)
        rows.append({"path": path, "frames": names, "text_path": texts.get(path)})
    if not rows:
        raise DataError(f"{SETTING}: no folder in {source.path} can be used; {': '.join(rejected[0])}")
    table = pa.Table.from_pylist(rows, _UNIT)
    units = [table.slice(start, FOLDERS_PER_UNIT) for start in range(0, len(table), FOLDERS_PER_UNIT)]
    passed_over = dict(unread)
    used = [info for info in found.files if info.path not in passed_over]
    reader = FrameFolderReader(root, dataset.caption.column)
    return Listing(units, reader, fingerprint(used), rejected, passed_over=[*found.passed_over, *unread])


@dataclass(frozen=True)
class FrameFolderReader:
    root: Location
    caption_column: str | None

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        for folder in unit.to_pylist():
            path, name = folder["path"], relative_path(folder["path"], self.root)
            try:
                frames = [self._read(frame) for frame in folder["frames"]]
                captions: list[str] = []
                keys: Sequence[str] = ()
                if folder["text_path"] is not None:
                    text = Location(self.root.filesystem, folder["text_path"])
                    captions, keys = read_captions(text, self.caption_column)
            except RejectedError as error:
                yield SourceRow(name, path, b"", [], str(error))
            except Exception as error:  # noqa: BLE001 - remote filesystems raise their own, and the next may be well
                yield SourceRow(name, path, b"", [], f"{UNREADABLE}: {error}")
            else:
                yield SourceRow(name, path, b"", captions, frames=frames, unread_keys=keys)

    def _read(self, path: str) -> bytes:
        return Location(self.root.filesystem, path).read()


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts `frame2.png` before `frame10.png`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", path)]
