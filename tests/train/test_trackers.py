import json

import pytest

from ray_sd.config.load import load_config
from ray_sd.train.trackers import History, Wandb, open_trackers, recorded_steps


def _config(*settings):
    return load_config(["experiment=smoke", "name=tracked", *settings])


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "step-00000004.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_history_drops_the_lines_that_a_resumed_run_repeats(tmp_path):
    config = _config("tracker=none")
    (history,) = open_trackers(config, tmp_path, 0)
    for step in (1, 2, 3):
        history.log({"loss": step / 10}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (history,) = open_trackers(config, tmp_path, 2)
    history.log({"loss": 0.5}, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5}]


def test_lines_of_a_history_that_are_damaged_are_left_out(tmp_path, caplog):
    whole = ['{"step": 1, "loss": 0.1}\n', '{"step": 2, "val/a": 0.2}\n']
    damaged = [b"\x00\x00\n", b"\xff\n", b"[]\n", b'{"loss": 1}\n', b'{"st\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([whole[0].encode(), *damaged, whole[1].encode()]))
    assert recorded_steps(tmp_path, "val/") == {2}
    open_trackers(_config("tracker=none"), tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole)
    assert "metrics.jsonl: 5 of 7 lines are damaged, and are left out" in caplog.text


def test_tensorboard_gets_scalars_pictures_and_the_configuration(tmp_path, picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(_config("tracker=tensorboard"), tmp_path, 0)
    for tracker in trackers:
        tracker.log({"loss": 0.25}, 4)
        tracker.log_picture("samples", picture, 4)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(4, 0.25)]
    assert [e.step for e in events.Images("samples")] == [4]
    assert events.Tags()["tensors"] == ["config/text_summary"]


def test_runs_of_a_group_can_be_told_apart_by_their_settings(tmp_path):
    """One TensorBoard run each, with hparams in it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = ("tracker.group=rates", "tracker.compare=[trainer.learning_rate, trainer.schedule]", "dataset.holdout=2")
    for tracker in open_trackers(_config("tracker=tensorboard", "trainer.learning_rate=0.5", *settings), tmp_path, 0):
        tracker.close()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    plugin = EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")
    begun = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    assert begun.hparams["trainer.learning_rate"].number_value == 0.5
    assert '"constant"' in begun.hparams["trainer.schedule"].string_value
    measured = HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment.metric_infos
    assert {info.name.tag for info in measured} == {"loss", "validation_loss"}


def test_a_run_that_begins_with_anothers_weights_is_described_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config("tracker=tensorboard", "tracker.compare=[trainer.learning_rate]")
    folder = tmp_path / "tensorboard"
    for start in (4, 8):
        for tracker in open_trackers(config, tmp_path, start):
            tracker.close()
        assert "_hparams_/session_start_info" in EventAccumulator(str(folder)).Reload().summary_metadata
    described = [path for path in folder.iterdir() if b"session_start_info" in path.read_bytes()]
    assert len(described) == 1


@pytest.mark.slow
def test_mlflow_goes_on_with_the_same_run(tmp_path, picture):
    mlflow = pytest.importorskip("mlflow")
    config = _config("tracker=mlflow", "tracker.group=rates")
    for start, value in ((0, 0.5), (4, 0.25)):
        for tracker in open_trackers(config, tmp_path, start):
            tracker.log({"loss": value}, start + 4)
            tracker.log_picture("samples", picture, start + 4)
            tracker.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ray_sd").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(4, 0.5), (8, 0.25)]
    assert run.info.status == "FINISHED"
    assert run.data.tags["group"] == "rates"
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 2


@pytest.mark.slow
def test_wandb_works_offline(tmp_path, picture):
    pytest.importorskip("wandb")
    config = _config("tracker=wandb", "tracker.wandb.mode=offline", "tracker.group=rates")
    for tracker in open_trackers(config, tmp_path, 0):
        if isinstance(tracker, Wandb):
            assert tracker._run.group == "rates"
            assert tracker._run.job_type == "train"
        tracker.log({"loss": 0.5}, 4)
        tracker.log_picture("samples", picture, 4)
        tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / "wandb_id").read_text() in run.name
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("*.png"))


def test_a_run_with_settings_to_compare_is_a_trial_to_wandb(tmp_path):
    pytest.importorskip("wandb")
    settings = ("tracker.wandb.mode=offline", "tracker.compare=[trainer.learning_rate]")
    _, tracker = open_trackers(_config("tracker=wandb", *settings), tmp_path, 0)
    tracker.close()
    assert tracker._run.job_type == "trial"


def test_wandb_takes_what_is_measured_late_and_loses_no_step_for_it(tmp_path, picture):
    """It drops numbers of a step before its last, and what it is given without a step counts as one."""
    pytest.importorskip("wandb")
    _, tracker = open_trackers(_config("tracker=wandb", "tracker.wandb.mode=offline"), tmp_path, 0)
    tracker.log({"loss": 0.5}, 10)
    tracker.log_picture("samples", picture, 4)
    tracker.log_later({"val/subject_similarity": 0.25}, 4)
    tracker.log({"loss": 0.4}, 11)
    tracker.log_later({"val/subject_similarity": 0.3}, 8)
    tracker.log_later({"val/prompt_similarity": 0.2}, 9)
    for step in (20, 30):  # what comes later finishes the row before
        tracker.log({"end": 1.0}, step)
    found = dict(tracker._run.summary)
    tracker.close()
    assert found["loss"] == 0.4
    assert (found["val/subject_similarity"], found["val/prompt_similarity"], found["pictures_step"]) == (0.3, 0.2, 9)


def test_steps_with_numbers_of_a_kind_are_known(tmp_path):
    assert recorded_steps(tmp_path, "val/") == set()
    history = History(tmp_path, 0)
    history.log({"loss": 0.5}, 1)
    history.log({"val/x": 0.5, "val/y": 0.5}, 1)
    history.log({"validation_loss": 0.5}, 2)
    history.log_later({"val/x": 0.5}, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val/x')
    assert recorded_steps(tmp_path, "val/") == {1, 3}


def test_any_number_of_trackers_run_at_once(tmp_path):
    config = _config("tracker=[tensorboard,mlflow]")
    names = {type(tracker).__name__ for tracker in open_trackers(config, tmp_path, 0)}
    assert names == {"History", "TensorBoard", "Mlflow"}
