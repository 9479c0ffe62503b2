import json

import pytest

from ray_sd.config.load import load_config
from ray_sd.train.trackers import open_trackers


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


def test_mlflow_goes_on_with_the_same_run(tmp_path, picture):
    mlflow = pytest.importorskip("mlflow")
    config = _config("tracker=mlflow")
    for start, value in ((0, 0.5), (4, 0.25)):
        for tracker in open_trackers(config, tmp_path, start):
            tracker.log({"loss": value}, start + 4)
            tracker.log_picture("samples", picture, start + 4)
            tracker.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ray_sd").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(4, 0.5), (8, 0.25)]
    assert run.info.status == "FINISHED"
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 2


def test_wandb_works_offline(tmp_path, picture):
    pytest.importorskip("wandb")
    for tracker in open_trackers(_config("tracker=wandb", "tracker.wandb.mode=offline"), tmp_path, 0):
        tracker.log({"loss": 0.5}, 4)
        tracker.log_picture("samples", picture, 4)
        tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / "wandb_id").read_text() in run.name
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("*.png"))


def test_any_number_of_trackers_run_at_once(tmp_path):
    config = _config("tracker=[tensorboard,mlflow]")
    names = {type(tracker).__name__ for tracker in open_trackers(config, tmp_path, 0)}
    assert names == {"History", "TensorBoard", "Mlflow"}
