import json
import runpy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_sd.config.cache import CachePruneConfig
from ray_sd.config.load import load_config, run_job
from ray_sd.data.cache import KEY, SHARD_BYTES, CacheFolder, Field, row_key
from ray_sd.data.passes import BYTES_UNDER_WAY, latent_bytes
from ray_sd.data.prune import DAY, cache_table, list_cache, prune_cache
from ray_sd.data.reader import ShardReader
from ray_sd.errors import DataError
from ray_sd.files import locate

FIELD = Field("values", "float16", (2, 3))


def shard_of(*names: str) -> pa.Table:
    contents = [np.full((2, 3), i, np.float16).tobytes() for i in range(len(names))]
    return pa.table({"key": pa.array([row_key(name) for name in names], KEY), "values": contents})


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache with an old and a new folder, and a view of the old one."""
    root = locate(str(tmp_path / "cache"), "cache_path")
    for name, days, uses in (("latents/old", 40, []), ("text/new", 1, []), ("views/of-old", 2, ["latents/old"])):
        folder = CacheFolder(root, name)
        folder.write(shard_of("a", "b", name), [FIELD])
        content = {"used": time.time() - days * DAY, "uses": uses}
        (folder.location / "folder.json").write(json.dumps(content).encode())
    return str(tmp_path / "cache")


def names(folders: list) -> list[str]:
    return sorted(folder.name for folder in folders)


def test_written_rows_are_found_by_their_keys_and_read_back(tmp_path: Path):
    folder = CacheFolder(locate(str(tmp_path), "cache_path"), "latents/x")
    shard = folder.write(shard_of("a", "b", "c"), [FIELD])
    entries = folder.entries()
    assert entries.column_names == ["key", "shard", "row"]
    assert entries["key"].to_pylist() == [row_key("a"), row_key("b"), row_key("c")]
    reader = ShardReader(folder, memory=1 << 20)
    assert (reader.row(shard, 2)["values"] == np.full((2, 3), 2, np.float16)).all()


def test_the_same_rows_make_the_same_shard(tmp_path: Path):
    folder = CacheFolder(locate(str(tmp_path), "cache_path"), "latents/x")
    assert folder.write(shard_of("a", "b"), [FIELD]) == folder.write(shard_of("a", "b"), [FIELD])
    assert folder.write(shard_of("a", "c"), [FIELD]) != folder.write(shard_of("a", "b"), [FIELD])
    assert len(folder.shards()) == 2


@pytest.mark.parametrize(("model", "channels"), [("emoji", 24), ("tiny_random", 4)])
def test_what_waits_to_be_a_shard_may_be_under_way(model: str, channels: int):
    """Ray Data would hold blocks back that the shard waits for."""
    config = load_config(["experiment=smoke", f"model={model}"])
    assert latent_bytes(config, 64 * 64) == 2 * channels * (64 * 64 // 8**2) * 2  # mean and deviation, of two bytes
    assert 8 * SHARD_BYTES <= BYTES_UNDER_WAY


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    root = locate(str(tmp_path), "cache_path")

    def write_half() -> None:
        with (root / "x" / "file").open_for_writing() as stream:
            stream.write(b"half of it")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert list((tmp_path / "x").iterdir()) == []


def test_readers_keep_no_more_row_groups_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_sd.data.cache.ROW_GROUP_BYTES", FIELD.nbytes)
    folder = CacheFolder(locate(str(tmp_path), "cache_path"), "latents/x")
    shard = folder.write(shard_of(*"abcdefgh"), [FIELD])
    reader = ShardReader(folder, memory=3 * FIELD.nbytes)
    for row in (0, 1, 2, 3, 4, 0):
        assert reader.row(shard, row)["values"][0, 0] == row
    assert [group for _, group in reader._groups] == [3, 4, 0]


def test_the_list_names_folders_with_rows_sizes_and_ages(cache: str):
    folders = list_cache(cache)
    assert [folder.name for folder in folders] == ["text/new", "views/of-old", "latents/old"]
    assert {folder.rows for folder in folders} == {3}
    assert folders[0].nbytes > 100
    assert 39.9 < folders[2].age_days < 40.1
    assert cache_table(folders).splitlines()[3].split() == ["latents/old", "3", "0.0", "40.0"]


def test_pruning_by_age_takes_the_views_along_that_point_there(cache: str):
    assert names(prune_cache(CachePruneConfig(cache_path=cache, older_than_days=30, dry_run=True))) == [
        "latents/old",
        "views/of-old",
    ]
    assert len(list_cache(cache)) == 3
    prune_cache(CachePruneConfig(cache_path=cache, older_than_days=30))
    assert names(list_cache(cache)) == ["text/new"]


def test_pruning_by_size_takes_what_was_used_longest_ago(cache: str):
    newest = list_cache(cache)[0]
    prune_cache(CachePruneConfig(cache_path=cache, max_gb=newest.nbytes / 1e9))
    assert names(list_cache(cache)) == ["text/new"]


def test_pruning_by_name_refuses_an_unknown_folder(cache: str):
    assert names(prune_cache(CachePruneConfig(cache_path=cache, folder="text/new"))) == ["text/new"]
    with pytest.raises(DataError, match="no 'text/new' in .*; it has: views/of-old, latents/old"):
        prune_cache(CachePruneConfig(cache_path=cache, folder="text/new"))


def test_the_job_lists_and_prunes(cache: str, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "jobs" / "encode.py"))["main"]

    assert run_job(main, ["list", f"cache_path={cache}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["folder", "text/new", "views/of-old", "latents/old"]
    assert run_job(main, ["prune", f"cache_path={cache}", "folder=text/new"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "removed 1 folders"
    assert run_job(main, ["prune", f"cache_path={cache}"]) == 2
    assert capsys.readouterr().err == "error: nothing to prune; give folder=…, older_than_days=… or max_gb=…\n"
    assert run_job(main, ["prune", "older_than=3"]) == 2
    assert "older_than: no such setting" in capsys.readouterr().err
    assert run_job(main, ["list", "everything"]) == 2
    assert capsys.readouterr().err == "error: everything: settings are written key=value; they are: cache_path\n"


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, configure: Callable):
    assert list_cache(str(tmp_path / "nowhere")) == []
