"""What the cache holds, and removing what is no longer wanted."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ray_sd.config.cache import CachePruneConfig
from ray_sd.data.cache import FOLDER_FILE, KINDS
from ray_sd.errors import DataError
from ray_sd.files import Location, locate

DAY = 86_400
GB = 10**9


@dataclass(frozen=True)
class CachedFolder:
    """One folder of the cache."""

    name: str
    """`kind/fingerprint`."""
    rows: int
    nbytes: int
    used: float
    """When a run last used it, in seconds since 1970."""
    uses: tuple[str, ...]
    """The folders that a view points into."""

    @property
    def age_days(self) -> float:
        return (time.time() - self.used) / DAY


def list_cache(cache_path: str) -> list[CachedFolder]:
    """The folders of a cache, used last first."""
    root = locate(cache_path, "cache_path")
    names = [f"{kind}/{info.base_name}" for kind in KINDS for info in (root / kind).children() if not info.is_file]
    return sorted((_look_at(root, name) for name in names), key=lambda folder: folder.used, reverse=True)


def prune_cache(config: CachePruneConfig) -> list[CachedFolder]:
    """Remove what the conditions name, and the views that point into it. Returns the folders that went."""
    folders = list_cache(config.cache_path)
    if config.folder is not None and config.folder not in {folder.name for folder in folders}:
        raise DataError(
            f"folder: no '{config.folder}' in {config.cache_path}; it has: "
            f"{', '.join(folder.name for folder in folders) or 'nothing'}"
        )
    unwanted = [folder for folder in folders if _is_unwanted(folder, config)]
    if config.max_gb is not None:
        kept = [folder for folder in folders if folder not in unwanted]
        while kept and sum(folder.nbytes for folder in kept) > config.max_gb * GB:
            unwanted.append(kept.pop())
    gone = {folder.name for folder in unwanted}
    unwanted += [folder for folder in folders if folder.name not in gone and gone.intersection(folder.uses)]
    if not config.dry_run:
        root = locate(config.cache_path, "cache_path")
        for folder in sorted(unwanted, key=lambda folder: not folder.uses):  # Views go before what they point into.
            root.filesystem.delete_dir((root / folder.name).path)
    return unwanted


def cache_table(folders: Iterable[CachedFolder]) -> str:
    """Folders as lines of text."""
    lines = [f"{'folder':<26} {'rows':>10} {'MB':>10} {'used, days ago':>15}"]
    for folder in folders:
        rows = f"{folder.rows:,}" if folder.rows else "-"  # views have none
        lines.append(f"{folder.name:<26} {rows:>10} {folder.nbytes / 1e6:>10,.1f} {folder.age_days:>15.1f}")
    return "\n".join(lines)


def _is_unwanted(folder: CachedFolder, config: CachePruneConfig) -> bool:
    old = config.older_than_days is not None and folder.age_days > config.older_than_days
    return old or folder.name == config.folder


def _look_at(root: Location, name: str) -> CachedFolder:
    files = (root / name).files()
    rows = sum(_num_rows(Location(root.filesystem, info.path)) for info in files if info.extension == "parquet")
    rows += sum(info.extension == "png" for info in files)  # class pictures
    description = root / name / FOLDER_FILE
    # A run that was killed at its first pass has written shards, but not yet what they are.
    content = json.loads(description.read()) if description.exists() else {}
    used = content.get("used", max((info.mtime_ns for info in files), default=0) / 1e9)
    return CachedFolder(name, rows, sum(info.size for info in files), used, tuple(content.get("uses", ())))


def _num_rows(file: Location) -> int:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            return pq.read_metadata(stream).num_rows
    except (OSError, pa.ArrowException):
        return 0
