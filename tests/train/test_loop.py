"""What a run does with its settings, shown by runs of one worker."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import yaml
from checkpoints import STATE, cut_off, write_checkpoint
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from traces import assert_same_bits, lines_of
from without_ray import fit_without_ray

from ray_sd.adapter import read_manifest
from ray_sd.cluster import SNAPSHOT
from ray_sd.errors import ArtifactError, ConfigError, RaySdError
from ray_sd.generate import ImageRequest, generate
from ray_sd.methods import load_adapter
from ray_sd.models import load_model
from ray_sd.train.checkpoint import read_index
from ray_sd.train.resume import Beginning

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_finished_run_that_was_damaged_is_exported_again(configure, tmp_path, caplog):
    first = fit_without_ray(configure("name=finished", "trainer.checkpoint.every_steps=2"))
    run = Path(first.run)
    lines = lines_of(run)
    shutil.move(run / "adapter", tmp_path / "first")
    (run / SNAPSHOT).write_text('{"checkpoints": [')
    (run / "data.json").write_text("")
    cut_off(run / "checkpoint-00000004" / STATE)
    again = fit_without_ray(configure("name=finished", "trainer.checkpoint.every_steps=2", "resume=true"))
    assert again.step == 4
    assert f"going on from {run}/checkpoint-00000002" in caplog.text
    losses = [[(line["step"], line["loss"]) for line in found if "loss" in line] for found in (lines, lines_of(run))]
    assert losses[0] == losses[1]
    weights = [
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "first", run / "adapter")
    ]
    assert_same_bits(*weights)


def test_a_checkpoint_that_workers_find_damaged_is_told_and_not_tried_again(configure, monkeypatch, tmp_path):
    """What a worker raises would be tried again."""
    torn = write_checkpoint(tmp_path, step=2)
    monkeypatch.setattr("ray_sd.train.run.find_beginning", lambda *_: Beginning(None, str(torn)))
    monkeypatch.setattr("ray_sd.train.run.in_words", lambda *_: pytest.fail("a worker failed"))
    cut_off(torn / STATE)
    with pytest.raises(ArtifactError, match=f"{torn} is damaged: .*resume=true goes on from the newest checkpoint"):
        fit_without_ray(configure("name=torn"))


def test_a_checkpoint_with_values_that_are_none_is_told_and_not_tried_again(configure, monkeypatch):
    """Be they of the weights or of what the optimizer keeps."""
    result = fit_without_ray(configure("name=spoilt", "trainer.max_steps=1"))
    [state] = Path(result.checkpoint).glob("*.safetensors")
    tensors = load_file(state)
    name = max(tensors)
    assert ":" in name
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, state)
    monkeypatch.setattr("ray_sd.train.run.in_words", lambda *_: pytest.fail("a worker failed"))
    words = f"{result.checkpoint}: {name} has values that are not finite .*; it is damaged; delete it, and resume=true"
    with pytest.raises(ArtifactError, match=words):
        fit_without_ray(configure("name=spoilt", "trainer.max_steps=2", "resume=true"))


def test_lost_weights_are_not_saved(configure):
    config = configure("name=lost", "trainer.learning_rate=1e30", "trainer.checkpoint.every_steps=2")
    with pytest.raises(
        RaySdError,
        match=r"step 2: (validation_)?loss is (nan|inf), and the weights are lost; lower trainer.*; no checkpoint was stored",
    ):
        fit_without_ray(config)
    assert not list((Path(config.storage_path) / "lost").glob("checkpoint-*"))


def test_numbers_are_logged_every_so_many_steps_and_at_the_last(configure):
    result = fit_without_ray(configure("name=seldom", "trainer.max_steps=5", "trainer.log_every=2"))
    assert [line["step"] for line in lines_of(Path(result.run))] == [2, 4, 5]


def test_nothing_has_to_be_built_before_workers_sum_gradients(configure):
    fit_without_ray(configure("name=sums", "trainer.max_steps=1"))
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


@pytest.mark.slow
def test_the_unet_is_compiled_where_that_is_asked_for(configure, monkeypatch):
    compiled: list[UNet2DConditionModel] = []
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    fit_without_ray(configure("name=plain", "trainer.max_steps=1"))
    assert compiled == []
    fit_without_ray(configure("name=compiled", "trainer.max_steps=1", "trainer.compile=true"))
    assert len(compiled) == 1


def test_a_worker_without_a_compiler_is_told_in_words(configure, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # so that this machine's compiler is nobody's concern before
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="^trainer.compile: on CPUs torch compiles by no-such-compiler"):
        fit_without_ray(configure("name=uncompiled", "trainer.use_gpu=false", "trainer.compile=true"))


def test_a_pivotal_tuning_goes_from_pictures_to_an_adapter_that_draws(configure: Callable, train: Callable):
    config = configure(
        "name=pivotal",
        "method=pivotal",
        "dataset.caption.replace={picture: <thing>}",
        "method.tokens.placeholder_token=<thing>",
        "method.class_prompt=[a cat, a dog]",
        "method.class_images={count: 2, num_inference_steps: 1}",
        "trainer.validation.prompts=a <thing>",
        "trainer.validation.num_inference_steps=1",
        "trainer.zero.stage=2",
    )
    result = train(config)
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


def test_models_are_found_from_the_folder_where_the_command_runs(configure, tmp_path, monkeypatch, train):
    """Workers run in another one; what is written down says what was given."""
    emoji = REPOSITORY / "ray_sd" / "embedded" / "emoji"
    (tmp_path / "models").symlink_to(emoji.parent)
    monkeypatch.chdir(tmp_path)
    settings = ("model=emoji", "model.vae=models/emoji", "method=autoencoder", "method.teacher=models/emoji")
    result = train(configure("name=run", *settings, "method.crop_size=16", "trainer.max_steps=1"))
    stored = [yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())]
    stored += [read_index(Path(result.checkpoint))["config"], read_manifest(Path(result.adapter)).config]
    for config in stored:
        assert (config["model"]["vae"]["path"], config["method"]["teacher"]) == ("models/emoji", "models/emoji")
