"""Whole runs: from pictures to an adapter, through failures."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from killing import kill_with_cluster
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from ray_sd.adapter import read_manifest
from ray_sd.config.load import load_config
from ray_sd.errors import ArtifactError, ConfigError, DataError, RaySdError
from ray_sd.generate import ImageRequest, generate
from ray_sd.methods import load_adapter
from ray_sd.models import load_model
from ray_sd.train.checkpoint import read_index
from ray_sd.train.run import Beginning, TrainingResult, _check_resume, _in_words, _note_data, fit
from ray_sd.train.storage import RunFolder

REPOSITORY = Path(__file__).parents[2]
LONG = (
    "trainer.max_steps=24",
    "trainer.checkpoint.every_steps=4",
    "trainer.learning_rate=1e-2",
    "trainer.ema_decay=0.9",
    "method.caption_dropout=0.2",
)
TWO_WORKERS = ("trainer.num_workers=2", "trainer.zero.stage=2")


@pytest.fixture(scope="module")
def undisturbed(run_settings, tmp_path_factory, ray_cluster) -> TrainingResult:
    """A run of 24 steps that nothing happened to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return fit(
        load_config([*run_settings(folder), "name=undisturbed", *LONG, *TWO_WORKERS, "trainer.checkpoint.keep=10"])
    )


def test_a_run_leaves_an_adapter_metrics_and_pictures(configure, ray_cluster):
    config = configure(
        "name=whole",
        "dataset.holdout=2",
        "trainer.validation.prompts=[a cat, a dog]",
        "trainer.validation.num_inference_steps=2",
        "trainer.validation.every_steps=2",
    )
    result = fit(config)
    assert result.step == 4
    manifest = read_manifest(Path(result.adapter))
    assert (manifest.kind, manifest.step, manifest.family) == ("lora", 4, "stable_diffusion")
    assert manifest.config["trainer"]["max_steps"] == 4
    run = Path(result.run)
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert (run / "samples.png").read_bytes() == (run / "samples" / "step-00000004.png").read_bytes()
    assert (run / "config.yaml").exists()
    assert result.adapter in result.summary()


def test_a_pivotal_tuning_goes_from_pictures_to_an_adapter_that_draws(configure, ray_cluster):
    config = configure(
        "name=pivotal",
        "method=pivotal",
        "dataset.caption.replace={picture: <thing>}",
        "method.tokens.placeholder_token=<thing>",
        "method.class_prompt=[a cat, a dog]",
        "method.class_images={count: 2, num_inference_steps: 1}",
        "trainer.validation.prompts=a <thing>",
        "trainer.validation.num_inference_steps=1",
        *TWO_WORKERS,
    )
    result = fit(config)
    manifest = read_manifest(Path(result.adapter))
    assert manifest.kind == "dreambooth"
    assert manifest.files.keys() >= {"pytorch_lora_weights.safetensors", "embeddings/learned_embeds.safetensors"}
    assert (Path(result.run) / "samples.png").exists()
    assert len(list(Path(config.cache_path).glob("class/*/*.png"))) == 2
    model = load_model(config.model)
    load_adapter(model, result.adapter)
    request = ImageRequest("a <thing>", num_inference_steps=1)
    untrained = generate(load_model(config.model), [request])[0]
    assert generate(model, [request])[0].tobytes() != untrained.tobytes()


def test_models_are_found_from_the_folder_where_the_command_runs(configure, tmp_path, monkeypatch, ray_cluster):
    """Workers run in another one; what is written down says what was given."""
    emoji = REPOSITORY / "ray_sd" / "embedded" / "emoji"
    (tmp_path / "models").symlink_to(emoji.parent)
    monkeypatch.chdir(tmp_path)
    settings = ("model=emoji", "model.vae=models/emoji", "method=autoencoder", "method.teacher=models/emoji")
    result = fit(configure("name=run", *settings, "method.crop_size=16", "trainer.max_steps=1", "tracker=none"))
    stored = [yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())]
    stored += [read_index(Path(result.checkpoint))["config"], read_manifest(Path(result.adapter)).config]
    for config in stored:
        assert (config["model"]["vae"]["path"], config["method"]["teacher"]) == ("models/emoji", "models/emoji")


def test_a_used_name_is_refused_and_a_missing_run_is_not_resumed(configure, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="exists in .*resume=true"):
        fit(configure("name=taken"))
    with pytest.raises(ConfigError, match="there is no run 'absent'"):
        fit(configure("name=absent", "resume=true"))
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        fit(configure("name=other", f"resume={tmp_path}"))


def test_a_run_goes_on_as_it_was(configure, tmp_path):
    """What would make it another run is refused, what it began from is remembered."""
    run = tmp_path / "runs" / "young"
    run.mkdir(parents=True)
    began = configure("name=young").model_dump(mode="json") | {"resume": "/elsewhere/checkpoint-00000004"}
    (run / "config.yaml").write_text(yaml.safe_dump(began))
    with pytest.raises(ConfigError, match="resume: seed was 0 and is 3; set it back") as refused:
        fit(configure("name=young", "resume=true", "seed=3", "method.rank=5"))
    assert "resume: method.rank was 16 and is 5" in str(refused.value)
    config = configure("name=young", "resume=true", "trainer.max_steps=9")
    beginning = _check_resume(config, RunFolder(config.storage_path, config.name))
    assert beginning == Beginning(origin="/elsewhere/checkpoint-00000004", checkpoint="/elsewhere/checkpoint-00000004")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "seed: [0", r"runs/cut/config.yaml is damaged"),
        ("config.yaml", "- seed", r"runs/cut/config.yaml is damaged: it holds no settings"),
        ("index.json", '{"format": ', r"checkpoint .*cut is damaged: index.json is cut off"),
        ("index.json", "[]", r"checkpoint .*cut has format None; this version reads"),
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
    with pytest.raises(ConfigError, match="file is no checkpoint folder"):
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
        _note_data(_Data(fingerprint, rows), run)
        assert caplog.text == ""
    _note_data(_Data("b", 6), run)
    assert "the data are not what they were (7 rows to train on, now 6)" in caplog.text
    caplog.clear()
    _note_data(_Data("b", 6), run)
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
    ],
)
def test_the_failure_that_came_first_is_told_and_not_its_consequence(tmp_path, failures, words):
    told = _in_words(WorkerGroupError("failed", failures), RunFolder(str(tmp_path), "run"))
    assert re.search(words, str(told))


def test_a_finished_run_whose_list_of_checkpoints_is_cut_off_is_exported_again(configure, undisturbed, tmp_path):
    run = tmp_path / "runs" / "undisturbed"
    shutil.copytree(undisturbed.run, run, ignore=shutil.ignore_patterns("adapter"))
    (run / "checkpoint_manager_snapshot.json").write_text('{"checkpoints": [')
    again = fit(configure("name=undisturbed", *LONG, *TWO_WORKERS, "trainer.checkpoint.keep=10", "resume=true"))
    assert again.step == 24
    _assert_equal(undisturbed.adapter, again.adapter)


def test_what_cannot_be_trained_is_refused_before_ray_starts(configure, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="method.target_modules: no layer of the unet is named 'to_x'"):
        fit(configure("name=wrong", "method.target_modules=[to_x]"))
    assert list((tmp_path / "runs" / "wrong").iterdir()) == []


def test_rates_checkpoints_averages_and_logs_follow_the_settings(configure, tmp_path, ray_cluster):
    settings = [
        "name=settings",
        f"storage_path={(tmp_path / 'runs').as_uri()}",
        "trainer.schedule=linear",
        "trainer.schedule.warmup_steps=2",
        "trainer.learning_rate=0.6",
        "trainer.checkpoint.every_steps=1",
        "trainer.checkpoint.keep=2",
        "trainer.ema_decay=0.9",
    ]
    fit(configure(*settings))
    run = tmp_path / "runs" / "settings"
    lines = (run / "logs" / "metrics.jsonl").read_text()
    rates = [json.loads(line)["learning_rate"] for line in lines.splitlines()]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.3])
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-00000003", "checkpoint-00000004"]
    state = load_file(run / "checkpoint-00000004" / "state-00000-of-00001.safetensors")
    sums = [
        sum(float(tensor.abs().sum()) for name, tensor in state.items() if name.partition(":")[2] == key)
        for key in ("", "ema")
    ]
    exported = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert sum(float(tensor.abs().sum()) for tensor in exported.values()) == pytest.approx(sums[1], rel=1e-6)
    assert sums[0] != pytest.approx(sums[1], rel=1e-3)
    fit(configure(*settings, "resume=true"))
    assert (run / "logs" / "metrics.jsonl").read_text() == lines


def test_a_compiled_unet_learns_the_same_and_exports_the_same_names(configure, undisturbed):
    checkpoint = Path(undisturbed.run) / "checkpoint-00000020"
    compiled = fit(configure("name=compiled", *LONG, "trainer.compile=true", f"resume={checkpoint}"))
    _assert_equal(undisturbed.adapter, compiled.adapter, tolerance=1e-4)


def test_unwritable_storage_is_refused_before_ray_starts(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="storage_path: .* cannot be written"):
        fit(configure("name=nowhere", f"storage_path={tmp_path / 'file' / 'runs'}"))


def test_a_run_that_lost_a_worker_equals_an_undisturbed_one(configure, undisturbed):
    config = configure("name=disturbed", *LONG, *TWO_WORKERS, "trainer.max_failures=1")
    run = Path(config.storage_path) / "disturbed"
    killed: list[bool] = []

    def kill_a_worker_in_mid_run():
        _wait_for(run / "checkpoint-00000008")
        next(child for child in psutil.Process().children(recursive=True) if _is_train_worker(child)).kill()
        killed.append(not (run / "checkpoint-00000024").exists())

    killer = threading.Thread(target=kill_a_worker_in_mid_run)
    killer.start()
    disturbed = fit(config)
    killer.join()
    assert killed == [True]
    _assert_equal(undisturbed.adapter, disturbed.adapter)


def test_a_killed_driver_resumes_to_the_same_adapter(settings, tmp_path, undisturbed):
    command = [sys.executable, "jobs/train.py", *settings, "name=killed", *LONG, *TWO_WORKERS]
    run = tmp_path / "runs" / "killed"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        _wait_for(run / "checkpoint-00000008")
        kill_with_cluster(driver)
    assert not (run / "checkpoint-00000024").exists()
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    resumed = subprocess.run([*command, "resume=true"], cwd=REPOSITORY, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line)["step"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
    _assert_equal(undisturbed.adapter, run / "adapter")


def test_a_run_goes_on_from_another_runs_checkpoint_with_other_workers_and_stage(configure, undisturbed):
    checkpoint = Path(undisturbed.run) / "checkpoint-00000016"
    rest = fit(configure("name=rest", *LONG, "trainer.zero.stage=0", f"resume={checkpoint}"))
    assert rest.step == 24
    _assert_equal(undisturbed.adapter, rest.adapter, tolerance=1e-5)
    with pytest.raises(ConfigError, match="checkpoint-00000016 has finished 16 steps; set trainer.max_steps above"):
        fit(configure("name=over", "trainer.max_steps=16", f"resume={checkpoint}"))


def test_a_checkpoint_of_another_method_is_refused_in_words(configure, undisturbed):
    with pytest.raises(ArtifactError, match="rank changed"):
        fit(
            configure(
                "name=rank4",
                "method.rank=4",
                "trainer.max_steps=25",
                "trainer.max_failures=0",
                f"resume={undisturbed.checkpoint}",
            )
        )


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


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def _is_train_worker(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _assert_equal(left: str | Path, right: str | Path, tolerance: float = 1e-6) -> None:
    name = "pytorch_lora_weights.safetensors"
    a, b = load_file(Path(left) / name), load_file(Path(right) / name)
    assert a.keys() == b.keys()
    assert any(value.abs().max() > 1e-3 for key, value in a.items() if "lora_B" in key)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)


def test_lost_weights_are_not_saved(configure, ray_cluster):
    config = configure("name=lost", "trainer.learning_rate=1e30", "trainer.checkpoint.every_steps=2", "tracker=none")
    with pytest.raises(
        RaySdError, match=r"step 2: (validation_)?loss is (nan|inf), and the weights are lost; lower trainer"
    ):
        fit(config)
    assert not list((Path(config.storage_path) / "lost").glob("checkpoint-*"))
