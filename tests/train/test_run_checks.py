"""What is refused before a run begins, what is remembered of one, and how failures are told."""

import copy
import errno
import logging
import re
import shutil
from functools import reduce

import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from ray.train import WorkerGroupError

from jobs import encode, sweep, train
from ray_sd.cluster import OWNER_IS_GONE
from ray_sd.config import ExperimentConfig
from ray_sd.config.identity import is_identity
from ray_sd.errors import ArtifactError, ConfigError, DataError, RaySdError
from ray_sd.train.failures import in_words
from ray_sd.train.restarts import Restarts
from ray_sd.train.resume import Beginning, check_unchanged, find_beginning, note_data
from ray_sd.train.run import fit
from ray_sd.train.storage import RunFolder


def test_a_used_name_is_refused_and_a_missing_run_is_not_resumed(configure, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="exists in .*resume=true"):
        fit(configure("name=taken"))
    with pytest.raises(ConfigError, match="there is no run 'absent'"):
        fit(configure("name=absent", "resume=true"))
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        fit(configure("name=other", f"resume={tmp_path}"))


@pytest.mark.parametrize(
    ("job", "dear"), [(train, "ray_sd.cluster.connect_while_importing"), (encode, "ray_sd.methods.build_method")]
)
def test_a_path_that_is_not_there_is_told_before_what_takes_seconds(monkeypatch, settings, tmp_path, job, dear):
    monkeypatch.setattr(dear, lambda module: pytest.fail("too early"))
    with pytest.raises(DataError, match="dataset.source.path: there is no .*/absent"):
        job.main([*settings, "name=absent", f"dataset.source.path={tmp_path / 'absent'}"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("dataset.source.path=absent", "dataset.source.path: there is no .*absent"),
        ("sweep.space.trainer.learning_rat={choice: [1, 2]}", "sweep.space: trainer.learning_rat: no such setting"),
    ],
)
def test_what_is_wrong_most_often_with_a_sweep_is_told_before_what_takes_seconds(monkeypatch, wrong, words):
    monkeypatch.setattr("ray_sd.cluster.connect_while_importing", lambda module: pytest.fail("too early"))
    with pytest.raises(RaySdError, match=words):
        sweep.main(["sweep=learning_rate", "name=absent", wrong])


def test_a_run_goes_on_as_it_was(configure, tmp_path):
    """What would make it another run is refused, what it began from is remembered."""
    run = tmp_path / "runs" / "young"
    run.mkdir(parents=True)
    origin = write_checkpoint(tmp_path / "elsewhere", step=4)
    began = configure("name=young").model_dump(mode="json") | {"resume": str(origin)}
    (run / "config.yaml").write_text(yaml.safe_dump(began))
    with pytest.raises(ConfigError, match="resume: seed was 0 and is 3; set it back") as refused:
        fit(configure("name=young", "resume=true", "seed=3", "method.rank=5"))
    assert "resume: method.rank was 16 and is 5" in str(refused.value)
    config = configure("name=young", "resume=true", "trainer.max_steps=9")
    beginning = find_beginning(config, RunFolder(config.storage_path, config.name))
    assert beginning == Beginning(origin=str(origin), checkpoint=str(origin))
    shutil.rmtree(origin)
    with pytest.raises(ConfigError, match="resume: checkpoint .*/elsewhere/checkpoint-00000004 is gone"):
        find_beginning(config, RunFolder(config.storage_path, config.name))


def test_a_run_goes_on_only_where_nothing_changed_that_makes_it_another(configure):
    """Each setting in turn was another; some say only how quickly, or where, something is done."""
    config = configure("name=young", "method=dreambooth", "method.class_prompt=a dog", "resume=true")
    began = config.model_dump(mode="json")
    refused = {}
    for path in leaves(began):
        before = copy.deepcopy(began)
        *parents, name = path.split(".")
        reduce(dict.__getitem__, parents, before)[name] = "another"
        try:
            check_unchanged(config, before)
        except ConfigError as error:
            refused[path] = str(error)
    assert all(words.startswith(f"resume: {path} was another and is ") for path, words in refused.items())
    assert refused.keys() == {path for path in leaves(began) if is_identity(path, ExperimentConfig)}
    assert {"method.class_images.count", "method.adapter.rank", "dataset.encode.dtype", "model.base"} <= refused.keys()
    assert not {"method.class_images.num_workers", "dataset.encode.batch_size", "dataset.source.path"} & refused.keys()


def leaves(settings: dict, prefix: str = "") -> list[str]:
    """Paths of all values that are no mappings of settings."""
    return [
        path
        for name, value in settings.items()
        for path in (leaves(value, f"{prefix}{name}.") if value and isinstance(value, dict) else [f"{prefix}{name}"])
    ]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "seed: [0", r"runs/cut/config.yaml is damaged"),
        ("config.yaml", "- seed", r"runs/cut/config.yaml is damaged: it holds no settings"),
        ("index.json", '{"format": ', r"checkpoint .*cut is damaged: index.json is cut off"),
        ("index.json", "", r"checkpoint .*cut is damaged: index.json is empty"),
        ("index.json", "[]", r"checkpoint .*cut is damaged: index.json: "),
        ("index.json", '{"format": 2, "step": 2}', r"checkpoint .*cut is damaged: index.json.keys: Field required"),
        ("index.json", '{"format": 9}', r"checkpoint .*cut has format 9; this version reads 2"),
        ("other.json", "", r"no checkpoint folder"),
    ],
)
def test_what_is_damaged_is_not_resumed(configure, tmp_path, file, content, words):
    run = tmp_path / "runs" / "cut"
    run.mkdir(parents=True)
    (run / file).write_text(content)
    resumed = ["name=cut", "resume=true"] if file == "config.yaml" else ["name=new", f"resume={run}"]
    with pytest.raises((ConfigError, ArtifactError), match=words):
        fit(configure(*resumed))


def test_a_file_is_no_checkpoint(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is no checkpoint folder, but a file"):
        fit(configure("name=new", f"resume={tmp_path / 'file'}"))


def test_nothing_to_read_is_told_before_ray_starts(configure, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(DataError, match="dataset.source.path: there is no /nowhere"):
        fit(configure("name=empty", "dataset.source.path=/nowhere"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            ["trainer.num_workers=2", "trainer.use_gpu=true"],
            "2 workers need a GPU each, and the cluster has 0; take trainer.use_gpu=false",
        ),
        (
            ["trainer.cpus_per_worker=4"],
            "1 workers of 4 CPUs, .* need 4.1, and the cluster has 4; take trainer.cpus_per_worker=3.9",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_told_before_anything_is_encoded(
    configure, ray_cluster, monkeypatch, wanted, words
):
    monkeypatch.setattr("ray_sd.train.run.prepare", lambda *_: pytest.fail("pictures were encoded"))
    with pytest.raises(ConfigError, match=words):
        fit(configure("name=large", *wanted))


def test_other_data_are_told_when_a_run_goes_on(tmp_path, caplog):
    run = RunFolder(str(tmp_path), "run")
    for fingerprint, rows in (("a", 7), ("a", 7)):
        note_data(_Data(fingerprint, rows), run)
        assert caplog.text == ""
    note_data(_Data("b", 6), run)
    assert "the data are not what they were (7 rows to train on, now 6)" in caplog.text
    caplog.clear()
    note_data(_Data("b", 6), run)
    assert caplog.text == ""


class _Data:
    """As much of a prepared data set as tells it from another."""

    def __init__(self, fingerprint: str, num_rows: int) -> None:
        self.fingerprint, self.train = fingerprint, self
        self.num_rows = num_rows


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        (
            {0: RuntimeError("[gloo] Connection closed by peer"), 1: torch.OutOfMemoryError("CUDA out of memory.")},
            "a GPU's memory was not enough: CUDA out of memory.*gradient_checkpointing=true",
        ),
        (
            {0: RuntimeError("[gloo] Connection closed by peer"), 1: ValueError("no such\nthing")},
            "training stopped: thing",
        ),
        ({0: RuntimeError("[gloo] Connection closed by peer")}, "training stopped: .*Connection closed"),
        ({0: RuntimeError("lost"), 1: ArtifactError("the checkpoint is another")}, "^the checkpoint is another"),
        (
            {0: OSError(errno.ENOSPC, "No space left on device")},
            "run cannot be written: no space left on the device; no checkpoint was stored in .*resume=true begins it again",
        ),
    ],
)
def test_the_failure_that_came_first_is_told_and_not_its_consequence(tmp_path, failures, words):
    told = in_words(WorkerGroupError("failed", failures), RunFolder(str(tmp_path), "run"))
    assert re.search(words, str(told))


def test_a_run_that_stored_a_checkpoint_goes_on_from_it(tmp_path):
    (tmp_path / "run" / "checkpoint-00000004").mkdir(parents=True)
    told = in_words(WorkerGroupError("failed", {0: ValueError("no such thing")}), RunFolder(str(tmp_path), "run"))
    assert str(told) == (
        f"training stopped: no such thing; checkpoints are in {tmp_path}/run, and resume=true goes on from the last"
    )


def test_a_worker_that_was_lost_is_told_unless_the_run_ends_with_it(caplog):
    restarts = Restarts(max_failures=1)
    lost = {0: RuntimeError("Connection closed by peer"), 1: RuntimeError("Traceback\nkilled by signal 9")}
    stopped = {0: RuntimeError(f"The actor is dead because {OWNER_IS_GONE}. Owner Id: 5a")}
    for exceptions in (stopped, lost, lost):
        restarts.after_exception(None, exceptions)
    assert caplog.messages == [
        "a worker was lost: killed by signal 9; the run goes on from what it has stored (1 of trainer.max_failures=1)"
    ]


def test_what_will_run_is_told_once_before_it_does(configure, monkeypatch, caplog, tmp_path):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_sd.train.run.connect", stop)
    caplog.set_level(logging.INFO, "ray_sd")
    checkpoint = write_checkpoint(tmp_path / "elsewhere", step=4)
    for settings in (["name=new"], ["name=other", f"resume={checkpoint}", "trainer.max_steps=7"]):
        with pytest.raises(KeyboardInterrupt):
            fit(configure(*settings, "trainer.batch_size=4", "trainer.num_workers=2", "method=lora"))
    told = [message for message in caplog.messages if message.startswith("run: ")]
    assert re.fullmatch(rf"run: lora on \S+, \d+ steps of 4 rows on 2 workers; in {tmp_path}/runs/new", told[0])
    assert re.fullmatch(
        rf"run: lora on \S+, 7 steps of 4 rows on 2 workers, going on from {checkpoint.name}; in {tmp_path}/runs/other",
        told[1],
    )
    assert len(told) == 2


def test_what_cannot_be_trained_is_refused_before_ray_starts(configure, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="method.target_modules: no layer of the unet is named 'to_x'"):
        fit(configure("name=wrong", "method.target_modules=[to_x]"))
    assert list((tmp_path / "runs" / "wrong").iterdir()) == []


def test_unwritable_storage_is_refused_before_ray_starts(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="storage_path: .* cannot be written"):
        fit(configure("name=nowhere", f"storage_path={tmp_path / 'file' / 'runs'}"))
