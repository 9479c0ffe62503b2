"""Runs that go on from the checkpoints of one that nothing happened to, and one that goes on once there is room."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import cut_off
from long_run import EVERY_STEPS, LONG, STEPS, TWO_WORKERS, assert_same_adapter
from PIL import Image

from ray_sd.cluster import SNAPSHOT, CheckpointList
from ray_sd.errors import ArtifactError
from ray_sd.train.checkpoint import read_index
from ray_sd.train.resume import CONFIG
from ray_sd.train.run import fit

pytestmark = pytest.mark.slow


def test_a_finished_run_is_exported_again_also_where_it_was_damaged(configure, undisturbed, tmp_path):
    run = tmp_path / "runs" / "undisturbed"
    shutil.copytree(undisturbed.run, run, ignore=shutil.ignore_patterns("adapter"))
    lines = (run / "logs" / "metrics.jsonl").read_text()
    for damage in (False, True):
        if damage:
            (run / SNAPSHOT).write_text('{"checkpoints": [')  # as a full disk leaves it
            (run / CONFIG).unlink()
        again = fit(configure("name=undisturbed", *LONG, *TWO_WORKERS, "resume=true"))
        assert again.step == STEPS
        assert_same_adapter(undisturbed.adapter, again.adapter)
        assert (run / "logs" / "metrics.jsonl").read_text() == lines
        shutil.rmtree(run / "adapter")


def test_a_run_goes_on_from_its_newest_whole_checkpoint(configure, undisturbed, tmp_path, caplog):
    run, before = tmp_path / "runs" / "undisturbed", f"checkpoint-{STEPS - EVERY_STEPS:08d}"
    shutil.copytree(undisturbed.run, run, ignore=shutil.ignore_patterns("adapter"))
    newest = Path(undisturbed.checkpoint).name
    cut_off(run / newest / "state-00001-of-00002.safetensors")
    again = fit(configure("name=undisturbed", *LONG, *TWO_WORKERS, "resume=true"))
    assert f"going on from {run}/{before}" in caplog.text
    assert_same_adapter(undisturbed.adapter, again.adapter)
    assert (run / "damaged" / newest).is_dir()
    listed = json.loads((run / SNAPSHOT).read_text())["checkpoint_results"]
    assert [result["checkpoint_dir_name"] for result in listed] == sorted(
        path.name for path in run.glob("checkpoint-*")
    )


def test_pictures_that_a_killed_run_had_not_asked_for_are_drawn_by_the_one_that_goes_on(configure, ray_cluster):
    settings = ("name=drawn", "trainer.max_steps=2", "trainer.checkpoint.every_steps=1",
                "trainer.validation.prompts=[an owl]", "trainer.validation.num_inference_steps=2")  # fmt: skip
    run = Path(fit(configure(*settings)).run)
    sheet = run / "samples" / "step-00000002.png"
    drawn = Image.open(sheet).tobytes()
    # As where it was killed between storing its last checkpoint and writing that down.
    listed = CheckpointList.parse((run / SNAPSHOT).read_bytes())
    (run / SNAPSHOT).write_bytes(CheckpointList.of({"checkpoint-00000001": {"step": 1}}, listed).to_json())
    sheet.unlink()
    (run / "samples.png").unlink()
    fit(configure(*settings, "resume=true"))
    assert Image.open(sheet).tobytes() == Image.open(run / "samples.png").tobytes() == drawn


def test_a_run_goes_on_with_other_workers_and_stage(configure, undisturbed):
    checkpoint = Path(undisturbed.run) / f"checkpoint-{STEPS - 2 * EVERY_STEPS:08d}"
    rest = fit(configure("name=rest", *LONG, "trainer.zero.stage=0", f"resume={checkpoint}"))
    assert rest.step == STEPS
    # Sums in another order differ by rounding; a step without the optimizer's state or with other rows, by 1e-2.
    assert_same_adapter(undisturbed.adapter, rest.adapter, tolerance=1e-3)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_a_compiled_unet_learns_the_same_and_exports_the_same_names(configure, undisturbed):
    checkpoint = Path(undisturbed.run) / f"checkpoint-{STEPS - EVERY_STEPS:08d}"
    compiled = fit(configure("name=compiled", *LONG, "trainer.compile=true", f"resume={checkpoint}"))
    assert_same_adapter(undisturbed.adapter, compiled.adapter, tolerance=1e-3)  # compiled layers round otherwise


def test_a_full_disk_ends_in_words_and_the_run_goes_on_once_there_is_room(configure, small_disk, ray_cluster):
    settings = ("name=full", f"storage_path={small_disk}", "trainer.max_steps=6", "trainer.checkpoint.every_steps=2",
                "trainer.max_failures=0", "method.rank=8", "trainer.checkpoint.keep=5")  # fmt: skip
    with pytest.raises(ArtifactError, match="cannot be (stored|written).*: no space left on the device"):
        fit(configure(*settings))
    assert read_index(small_disk / "full" / "checkpoint-00000002")["step"] == 2
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert fit(configure(*settings, "resume=true")).step == 6


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
