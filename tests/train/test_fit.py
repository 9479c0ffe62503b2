"""Whole runs on two workers: from pictures to an adapter, and on from where one stopped."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from in_process import prepare
from safetensors.torch import load_file
from traces import assert_same_bits, lines_of, state_of
from without_ray import fit_without_ray

from ray_sd.adapter import read_manifest
from ray_sd.cluster import SNAPSHOT
from ray_sd.config.load import load_config
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.media.pictures import read_parameters
from ray_sd.methods import build_method
from ray_sd.train.run import TrainingResult, fit

WHOLE = (
    "name=whole",
    "dataset.holdout=2",
    "method.caption_dropout=0.2",
    "trainer.num_workers=2",
    "trainer.zero.stage=2",
    "trainer.max_steps=6",
    "trainer.learning_rate=0.012",
    "trainer.schedule=linear",
    "trainer.schedule.warmup_steps=2",
    "trainer.ema_decay=0.9",
    "trainer.checkpoint.every_steps=2",
    "trainer.checkpoint.keep=2",
    "trainer.validation.prompts=[a cat, a dog]",
    "trainer.validation.num_inference_steps=2",
    "trainer.validation.every_steps=3",
)


@pytest.fixture(scope="module")
def whole(run_settings, tmp_path_factory, ray_cluster) -> TrainingResult:
    """A run of six steps on two workers, of which every other one left a checkpoint and pictures.

    Of pictures that were encoded in this process, which otherwise starts two more and takes a third of the time.
    """
    config = load_config([*run_settings(tmp_path_factory.mktemp("whole")), *WHOLE])
    return fit(config, data=prepare(config, build_method(config.method).rows()))


def test_a_run_leaves_an_adapter_metrics_and_pictures(whole):
    assert whole.step == 6
    manifest = read_manifest(Path(whole.adapter))
    assert (manifest.kind, manifest.step, manifest.family) == ("lora", 6, "stable_diffusion")
    assert manifest.config["trainer"]["max_steps"] == 6
    run = Path(whole.run)
    lines = lines_of(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert whole.metrics["validation_loss"] == lines[-1]["validation_loss"]
    assert {path.name for path in (run / "samples").glob("*.png")} == {f"step-0000000{step}.png" for step in (2, 4, 6)}
    assert (run / "samples.png").read_bytes() == (run / "samples" / "step-00000006.png").read_bytes()
    assert read_parameters(run / "samples.png")["prompts"] == ["a cat", "a dog"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    assert whole.adapter in whole.summary()


def test_rates_and_checkpoints_follow_the_settings(whole):
    run = Path(whole.run)
    rates = [line["learning_rate"] for line in lines_of(run) if "learning_rate" in line]
    assert rates == pytest.approx([0.004, 0.008, 0.012, 0.009, 0.006, 0.003])
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-00000004", "checkpoint-00000006"]
    assert Path(whole.checkpoint) == run / "checkpoint-00000006"
    assert len(list((run / "checkpoint-00000006").glob("state-*-of-00002.safetensors"))) == 2


def test_what_is_exported_is_the_moving_average(whole):
    state = state_of(whole.checkpoint)
    sums = [
        sum(float(tensor.abs().sum()) for name, tensor in state.items() if name.partition(":")[2] == key)
        for key in ("", "ema")
    ]
    exported = load_file(Path(whole.adapter) / "pytorch_lora_weights.safetensors")
    assert sum(float(tensor.abs().sum()) for tensor in exported.values()) == pytest.approx(sums[1], rel=1e-5)
    assert sums[0] != pytest.approx(sums[1], rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_from_what_a_killed_driver_left(whole, configure, tmp_path, ray_cluster):
    """That is: everything up to a checkpoint, and log lines of some steps after it. Here behind a URI."""
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole.run, run, ignore=shutil.ignore_patterns("adapter", "samples*", "checkpoint-00000006"))
    snapshot = json.loads((run / SNAPSHOT).read_text())
    kept = [result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]
    assert kept == ["checkpoint-00000004", "checkpoint-00000006"]
    del snapshot["checkpoint_results"][1], snapshot["checkpoint_report_indices"][1]
    snapshot["latest_checkpoint_result"] = snapshot["checkpoint_results"][0]
    snapshot["validated_checkpoint_dir_names"] = ["checkpoint-00000004"]
    snapshot["current_report_index"] -= 1
    (run / SNAPSHOT).write_text(json.dumps(snapshot))
    with (run / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')

    storage = f"storage_path={(tmp_path / 'runs').as_uri()}"
    resumed = fit(configure(*WHOLE, "resume=true", "trainer.validation.prompts=[]", storage))
    assert resumed.step == 6
    assert_same_bits(state_of(whole.checkpoint), state_of(run / "checkpoint-00000006"))
    for name in ("loss", "validation_loss"):
        losses = [
            [(line["step"], line[name]) for line in lines_of(at) if name in line] for at in (Path(whole.run), run)
        ]
        assert losses[0] == losses[1]


def test_a_run_goes_on_from_another_runs_checkpoint_with_other_workers_and_stage(whole, configure):
    checkpoint = Path(whole.run) / "checkpoint-00000004"
    one = ("trainer.num_workers=1", "trainer.zero.stage=0", f"resume={checkpoint}")
    rest = fit_without_ray(configure(*WHOLE, "name=rest", *one, "trainer.validation.prompts=[]"))
    assert rest.step == 6
    # Gradients are summed in another order, which changes what rounding does: a thousandth at most. Other rows change losses
    # by more, and so do moments that begin anew, which after six steps are three times those of two.
    expected = [line["loss"] for line in lines_of(Path(whole.run)) if line["step"] > 4 and "loss" in line]
    assert [line["loss"] for line in lines_of(Path(rest.run)) if "loss" in line] == pytest.approx(expected, rel=1e-3)
    before, after = state_of(whole.checkpoint), state_of(rest.checkpoint)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if (after[name] - tensor).norm() > 1e-2 * tensor.norm()] == []
    with pytest.raises(ConfigError, match="checkpoint-00000004 has finished 4 steps; set trainer.max_steps above"):
        fit(configure(*WHOLE, "name=over", "trainer.max_steps=4", f"resume={checkpoint}"))


def test_a_checkpoint_of_another_method_is_refused_in_words(whole, configure):
    further = ("name=rank4", "method.rank=4", "trainer.max_steps=7", "trainer.ema_decay=0.9")
    with pytest.raises(ArtifactError, match="rank changed"):
        fit_without_ray(configure(*further, f"resume={whole.checkpoint}"))
