"""Validation errors in words."""

import pytest

from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("trainer.learning_rat=1", "trainer.learning_rat: no such setting; did you mean 'learning_rate'?"),
        ("learning_rate=1", "learning_rate: no such setting; did you mean 'trainer.learning_rate'?"),
        ("trainer.rank=1", "trainer.rank: no such setting; did you mean 'method.rank'?"),
        ("tracker.zzz=1", "tracker.zzz: no such setting; the settings here are: tensorboard, wandb, mlflow"),
        ("a.b.c=1", "a: no such setting"),
        (
            "tracker.compare=[seed, trainer.learning_rat]",
            "tracker.compare: trainer.learning_rat: no such setting; did you mean 'learning_rate'?",
        ),
        ("tracker.compare=[trainr.seed]", "tracker.compare: trainr: no such setting; did you mean 'trainer'?"),
        (
            "tracker.compare=[learning_rate]",
            "tracker.compare: learning_rate: no such setting; did you mean 'trainer.lear",
        ),
        ("dataset.crop.detector=a/b", "dataset.crop.detector: no such setting; it belongs to dataset.crop=subject"),
        (
            "method.name=lorra",
            "method.name: no method 'lorra'; did you mean 'lora'? the methods are: autoencoder, dreambooth, full, inflate",
        ),
        (
            "trainer.schedule.name=zzz",
            "trainer.schedule.name: no schedule 'zzz'; the schedules are: constant, cosine, linear",
        ),
        ("trainer.max_steps=ten", "trainer.max_steps: 'ten' is no whole number"),
        ("trainer.max_steps=1.5", "trainer.max_steps: '1.5' is no whole number"),
        ("trainer.learning_rate=fast", "trainer.learning_rate: 'fast' is no number"),
        ("trainer.learning_rate=nan", "trainer.learning_rate: 'nan' is no finite number"),
        ("trainer.learning_rate=0", "trainer.learning_rate: '0' is out of range; it must be more than 0"),
        (f"seed={2**63}", f"seed: '{2**63}' is out of range; it must be less than {2**63}"),
        ("trainer.ema_decay=1", "trainer.ema_decay: '1' is out of range; it must be less than 1"),
        ("dataset.flip=maybe", "dataset.flip: 'maybe' is neither true nor false"),
        ("dataset.resolution=ten", "dataset.resolution: 'ten' is no whole number or list of 2 whole numbers"),
        ("dataset.resolution=[64]", "dataset.resolution: [64] is no whole number or list of 2 whole numbers"),
        ("dataset.resolution=[64, x]", "dataset.resolution: [64, x] is no whole number or list of 2 whole numbers"),
        ("trainer.optimizer.betas=[0.9]", "trainer.optimizer.betas: [0.9] is no list of 2 numbers"),
        ("trainer.optimizer.betas=[0.9, x]", "trainer.optimizer.betas[1]: 'x' is no number"),
        ("trainer.zero=2", "trainer.zero: '2' is no mapping; the settings below it are: stage, offload, "),
        ("trainer.zero.stage=4", "trainer.zero.stage: '4' is not among the choices; they are: 0, 1, 2, 3"),
        (
            "model.scheduler.sampler=eular",
            "model.scheduler.sampler: 'eular' is not among the choices; did you mean 'euler'? they are: ddim, ",
        ),
        ("model.unet.weights=x", "model.unet.weights: no such setting; "),
        ("name=my run", "name: 'my run' does not match "),
        ("dataset.source={name: parquet}", "dataset.source.path: required: File, folder or URI of the Parquet files."),
        ("dataset.source={path: x}", "dataset.source.name: required; the sources are: frame_folder, huggingface, "),
        ("trainer.batch_size=3", "trainer: batch_size 3 is not divisible by num_workers 2; try 2 or 4"),
    ],
)
def test_problem_is_one_line_that_says_what_to_do(setting: str, line: str):
    arguments = ["experiment=demo", setting]
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=demo", "trainer.max_steps=ten", "method.rnk=2", "dataset.flip=maybe"])
    assert len(str(caught.value).splitlines()) == 3


def test_problem_of_the_whole_has_no_path():
    with pytest.raises(ConfigError, match="^nothing to draw; give prompt='…' or prompts_file=PATH$"):
        load_config([], GenerateConfig)
