"""Runs go on from their newest whole checkpoint, whatever is damaged, and say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train
import yaml
from checkpoints import DAMAGES, STATE, cut_off, write_checkpoint, write_list
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from ray_sd.cluster import SNAPSHOT
from ray_sd.config import ExperimentConfig
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.train.checkpoint import INDEX
from ray_sd.train.resume import CONFIG, DATA, END, Beginning, find_beginning, note_data, stored_config, write_config
from ray_sd.train.storage import RunFolder
from ray_sd.train.trackers import HISTORY

BEFORE, NEWEST = "checkpoint-00000004", "checkpoint-00000006"


@pytest.fixture
def config(configure: Callable[..., ExperimentConfig]) -> ExperimentConfig:
    return configure("name=run", "resume=true", "trainer.max_steps=8")


@pytest.fixture
def run(config: ExperimentConfig, tmp_path: Path) -> Path:
    """A run of three checkpoints that was stopped."""
    settings = config.model_copy(update={"resume": False}).model_dump(mode="json")
    folder = tmp_path / "runs" / "run"
    for step in (2, 4, 6):
        write_checkpoint(folder, step=step, config=settings)
    (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
    write_list(folder)
    return folder


def begin(config: ExperimentConfig, run: Path) -> str | None:
    """The name of the checkpoint from which it goes on, in which Ray Train agrees."""
    found = find_beginning(config, RunFolder(config.storage_path, config.name)).checkpoint
    name = found and Path(found).name
    assert listed_last(run) == name
    return name


def listed_last(run: Path) -> str | None:
    """What Ray Train itself would go on from."""
    manager = CheckpointManager(ray.train.CheckpointConfig(), StorageContext(str(run.parent), run.name))
    latest = manager.latest_checkpoint_result
    return latest and Path(latest.checkpoint.path).name


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("ray_sd"))


def test_an_undamaged_run_goes_on_quietly_and_is_left_as_it_is(config, run, caplog):
    listed = (run / SNAPSHOT).read_text()
    assert begin(config, run) == NEWEST
    assert told(caplog) == ""
    assert (run / SNAPSHOT).read_text() == listed
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("file", [INDEX, STATE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_a_damaged_file_is_moved_aside(config, run, caplog, file, damage):
    DAMAGES[damage](run / NEWEST / file)
    left = {path.name: path.read_bytes() for path in (run / NEWEST).iterdir()}
    assert begin(config, run) == BEFORE
    assert f"{NEWEST} is " in told(caplog)
    assert f"it is kept as damaged/{NEWEST}; going on from {run}/{BEFORE}" in told(caplog)
    assert {path.name: path.read_bytes() for path in (run / "damaged" / NEWEST).iterdir()} == left
    assert not (run / NEWEST).exists()
    caplog.clear()
    assert begin(config, run) == BEFORE
    assert told(caplog) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99}, "has format 99; this version reads 2"),
        ({"format": None}, "is damaged: index.json.format"),
        ({"step": "six"}, "is damaged: index.json.step"),
        ({"files": ["weight"]}, "is damaged: index.json.files"),
        ({"files": {"bias": STATE}}, f"is damaged: {STATE} has no bias"),
        ({"optimizer": {}}, "is damaged: index.json.optimizer.kind"),
    ],
)
def test_an_index_of_another_kind_is_no_whole_checkpoint(config, run, caplog, change, words):
    index = json.loads((run / NEWEST / INDEX).read_text())
    (run / NEWEST / INDEX).write_text(json.dumps(index | change))
    assert begin(config, run) == BEFORE
    assert f"{NEWEST} {words}" in told(caplog)


def test_an_empty_a_missing_and_a_replaced_checkpoint_are_passed_over(config, run, caplog):
    shutil.rmtree(run / NEWEST)
    assert begin(config, run) == BEFORE
    assert f"{run}/{NEWEST} is gone; going on from {run}/{BEFORE}" in told(caplog)
    shutil.rmtree(run / BEFORE)
    (run / BEFORE).mkdir()
    (run / NEWEST).write_text("a file")
    assert begin(config, run) == "checkpoint-00000002"
    assert "it is empty" in told(caplog)
    assert f"{NEWEST} is no checkpoint folder, but a file" in told(caplog)


def test_what_was_kept_is_never_overwritten(config, run):
    for _ in range(2):
        cut_off(run / NEWEST / STATE)
        assert begin(config, run) == BEFORE
        shutil.copytree(run / BEFORE, run / NEWEST)
    assert {path.name for path in (run / "damaged").iterdir()} == {NEWEST, f"{NEWEST}-1"}


def test_a_run_without_a_whole_checkpoint_begins_again_and_says_so(config, run, caplog):
    for name in (BEFORE, NEWEST):
        shutil.rmtree(run / name)
    cut_off(run / "checkpoint-00000002" / STATE)
    assert begin(config, run) is None
    assert "no whole checkpoint is left, so it begins again at step 0" in told(caplog)


def test_a_run_of_another_version_does_not_begin_again(config, run):
    for folder in run.glob("checkpoint-*"):
        (folder / INDEX).write_text('{"format": 99}')
    with pytest.raises(ArtifactError, match=f"{NEWEST} has format 99; this version reads 2"):
        begin(config, run)
    assert (run / NEWEST).exists()


def without(*keys: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        listed = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in listed.items() if key not in keys}))

    return change


def shortened(file: Path) -> None:
    listed = json.loads(file.read_text())
    file.write_text(json.dumps(listed | {"checkpoint_report_indices": [0]}))


def with_an_absent_last(file: Path) -> None:
    listed = json.loads(file.read_text())
    listed["latest_checkpoint_result"]["checkpoint_dir_name"] = "checkpoint-00000099"
    file.write_text(json.dumps(listed))


def of_an_old_ray(file: Path) -> None:
    file.write_text('{"ray_version": "2.40.0", "results": []}')


@pytest.mark.parametrize(
    "damage",
    [
        *DAMAGES.values(),
        without("checkpoint_results"),
        without("latest_checkpoint_result"),
        shortened,
        with_an_absent_last,
        of_an_old_ray,
    ],
)
def test_a_damaged_list_of_checkpoints_is_made_anew(config, run, caplog, damage):
    damage(run / SNAPSHOT)
    assert begin(config, run) == NEWEST
    assert f"resume: {SNAPSHOT} " in told(caplog)
    assert f"; going on from {run}/{NEWEST}" in told(caplog)
    listed = json.loads((run / SNAPSHOT).read_text())
    # All of them, so that `trainer.checkpoint.keep` counts them.
    assert [result["checkpoint_dir_name"] for result in listed["checkpoint_results"]] == [
        "checkpoint-00000002",
        BEFORE,
        NEWEST,
    ]


def test_a_mended_list_keeps_what_was_reported_and_what_is_still_to_be_drawn(config, run):
    listed = json.loads((run / SNAPSHOT).read_text())
    for result in listed["checkpoint_results"]:
        result["metrics"]["loss"] = 0.5
    listed["pending_training_results"] = listed["checkpoint_results"][1:]
    listed["pending_validation_specs"] = [True, True]
    (run / SNAPSHOT).write_text(json.dumps(listed))
    shutil.rmtree(run / NEWEST)
    assert begin(config, run) == BEFORE
    mended = json.loads((run / SNAPSHOT).read_text())
    assert mended["latest_checkpoint_result"]["metrics"] == {"step": 4, "loss": 0.5}
    assert [result["checkpoint_dir_name"] for result in mended["pending_training_results"]] == [BEFORE]
    assert mended["pending_validation_specs"] == [True]


def test_a_checkpoint_that_ray_was_not_told_of_is_gone_on_from(config, run, caplog):
    """As where a run was killed between storing it and writing it down."""
    write_checkpoint(run, step=8)
    records = [
        {"step": 0, "untrained_validation_loss": 2.0},
        {"step": 6, "loss": 0.7, "validation_loss": 1.5},
        {"step": 8, "loss": 0.5},
        {"step": 10, "loss": 0.1},
    ]
    (run / "logs").mkdir()
    (run / "logs" / HISTORY).write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 7')
    assert begin(config, run) == "checkpoint-00000008"
    assert f"{SNAPSHOT} does not end with checkpoint-00000008" in told(caplog)
    *_, last = json.loads((run / SNAPSHOT).read_text())["checkpoint_results"]
    metrics = {"step": 8, "loss": 0.5, "validation_loss": 1.5, "untrained_validation_loss": 2.0}
    assert last["metrics"] == metrics  # of which a run that was at its end makes no other report


@pytest.mark.parametrize("listed", [True, False])
def test_pictures_that_ray_was_not_told_to_draw_are_drawn_yet(configure, run, listed):
    """Of those that it knew, it knows itself; where its list is lost, pictures that are there are not drawn again."""
    config = configure("name=run", "resume=true", "trainer.max_steps=8", "trainer.validation.prompts=[an owl]")
    settings = config.model_copy(update={"resume": False}).model_dump(mode="json")
    (run / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
    write_checkpoint(run, step=8, config=settings)
    (run / "samples").mkdir()
    for step in (2, 4):
        (run / "samples" / f"step-{step:08d}.png").touch()
    if not listed:
        (run / SNAPSHOT).unlink()
    assert begin(config, run) == "checkpoint-00000008"
    mended = json.loads((run / SNAPSHOT).read_text())
    drawn = [result["checkpoint_dir_name"] for result in mended["pending_training_results"]]
    assert drawn == (["checkpoint-00000008"] if listed else [NEWEST, "checkpoint-00000008"])
    assert mended["pending_validation_specs"] == [True] * len(drawn)


def test_a_copy_that_somebody_made_of_a_checkpoint_is_not_one(config, run, caplog):
    shutil.copytree(run / BEFORE, run / "checkpoint-best")
    shutil.copytree(run / BEFORE, run / f"{NEWEST} (copy)")
    assert begin(config, run) == NEWEST
    assert told(caplog) == ""


@pytest.mark.parametrize("damage", DAMAGES.values())
def test_settings_are_taken_from_a_checkpoint_where_their_own_file_is_damaged(config, run, caplog, damage):
    began = stored_config(RunFolder(config.storage_path, config.name))
    assert began is not None
    # In this style of YAML nothing is left over where the end is missing.
    (run / CONFIG).write_text(yaml.safe_dump(began, default_flow_style=True))
    damage(run / CONFIG)
    assert stored_config(RunFolder(config.storage_path, config.name)) == began
    assert f"taking the settings that {NEWEST} was stored with" in told(caplog)
    assert begin(config, run) == NEWEST


def test_settings_of_which_whole_groups_are_missing_are_cut_off(config, run, caplog):
    lines = (run / CONFIG).read_text().partition("trainer:")[0]
    (run / CONFIG).write_text(lines)
    assert begin(config, run) == NEWEST
    assert f"{CONFIG} is cut off: it has no trainer; taking the settings" in told(caplog)


def test_settings_that_are_cut_off_in_their_last_line_are_not_taken(config, run, caplog):
    write_config(config, RunFolder(config.storage_path, "run"))
    written = (run / CONFIG).read_bytes()
    (run / CONFIG).write_bytes(written.removesuffix(END))
    assert begin(config, run) == NEWEST
    assert f"{CONFIG} is cut off in its last line; taking the settings" in told(caplog)


def test_settings_of_an_earlier_version_are_whole_without_what_it_did_not_know(config, run, caplog):
    write_config(config, RunFolder(config.storage_path, "run"))
    known = yaml.safe_load((run / CONFIG).read_text())
    del known["tracker"]
    (run / CONFIG).write_text(yaml.safe_dump(known, explicit_end=True))
    assert begin(config, run) == NEWEST
    assert "cut off" not in told(caplog)
    assert stored_config(RunFolder(config.storage_path, "run")) == known


def test_a_folder_that_says_nothing_of_its_run_is_told(config, run):
    (run / CONFIG).unlink()
    for folder in run.glob("checkpoint-*"):
        (folder / INDEX).unlink()
    with pytest.raises(ConfigError, match=f"there is no run 'run' in .*; {run} has no config.yaml and no checkpoint"):
        begin(config, run)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"rows": 7}', b'{"fingerprint": 1, "rows": "x"}', b"\xff"]
)
def test_damaged_data_notes_are_told_and_written_again(tmp_path, caplog, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / DATA).write_bytes(content)
    run = RunFolder(str(tmp_path), "run")
    note_data(Data(), run)
    assert f"run/{DATA} is damaged, so whether the data are what they were is not known" in told(caplog)
    caplog.clear()
    note_data(Data(), run)
    assert told(caplog) == ""


def test_a_folder_in_the_place_of_a_file_ends_in_words(config, run):
    (run / DATA).mkdir()
    with pytest.raises(ArtifactError, match=f"resume: {run} cannot be read or written: .*{DATA}"):
        note_data(Data(), RunFolder(config.storage_path, "run"))
    (run / CONFIG).unlink()
    (run / CONFIG).mkdir()
    with pytest.raises(ArtifactError, match=f"resume: {run} cannot be read or written: .*{CONFIG}"):
        begin(config, run)


def test_missing_data_notes_are_told_where_there_are_checkpoints(config, run, caplog):
    note_data(Data(), RunFolder(config.storage_path, "run"))
    assert f"run/{DATA} is gone" in told(caplog)


class Data:
    """As much of a prepared data set as is noted."""

    fingerprint = "a"

    class train:  # noqa: N801 - an attribute
        num_rows = 7


def test_another_runs_damaged_checkpoint_is_told_with_one_that_is_whole(configure, run):
    cut_off(run / NEWEST / STATE)
    config = configure("name=new", f"resume={run / NEWEST}", "trainer.max_steps=8")
    with pytest.raises(ArtifactError, match=rf"{NEWEST} is damaged: .*{STATE} .*; take {run}/{BEFORE}$"):
        find_beginning(config, RunFolder(config.storage_path, config.name))
    assert (run / NEWEST).exists()
    config = configure("name=new", f"resume={run}", "trainer.max_steps=8")
    with pytest.raises(ConfigError, match=f"is no checkpoint folder.*; take {run}/{BEFORE}$"):
        find_beginning(config, RunFolder(config.storage_path, config.name))


def test_a_run_behind_a_uri_is_mended_the_same(configure, run, caplog):
    cut_off(run / NEWEST / STATE)
    config = configure("name=run", "resume=true", f"storage_path={run.parent.as_uri()}", "trainer.max_steps=8")
    found = find_beginning(config, RunFolder(config.storage_path, config.name))
    assert found == Beginning(None, f"{run.as_uri()}/{BEFORE}")
    assert (run / "damaged" / NEWEST / STATE).exists()
