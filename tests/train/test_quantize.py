from importlib.machinery import ModuleSpec

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train import quantize
from ray_sd.train.quantize import check_quantization, quantize_frozen

NF4 = TrainerConfig(quantize_base="nf4")


@pytest.mark.parametrize(("kind", "dtype", "error"), [("nf4", torch.uint8, 0.4), ("int8", torch.int8, 0.03)])
def test_only_frozen_layers_are_quantised_and_hold_nearly_what_they_held(kind: str, dtype: torch.dtype, error: float):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    module[1].requires_grad_(True)
    sample = torch.randn(8, 64)
    expected = module[0](sample)
    assert quantize_frozen(module, kind, torch.float32) == 1
    module.to("cpu")
    assert module[0].weight.dtype == dtype
    assert (type(module[1]), type(module[2])) == (nn.Linear, nn.Conv2d)
    assert (module[0](sample) - expected).abs().max() < error


def test_the_low_rank_layers_beside_a_quantised_one_still_train():
    config = load_config(["experiment=smoke"], ExperimentConfig)
    method, model = build_method(config.method), load_model(config.model, ("unet", "scheduler"))
    method.prepare(model, config.trainer)
    before = [name for name, p in model.unet.named_parameters() if p.requires_grad]
    quantize_frozen(model.unet, "nf4", torch.float32)
    assert [name for name, p in model.unet.named_parameters() if p.requires_grad] == before


def test_without_a_gpu_it_is_refused():
    check_quantization(TrainerConfig(), has_gpus=False)
    check_quantization(NF4, has_gpus=True)
    with pytest.raises(ConfigError, match="trainer.quantize_base=nf4 needs a GPU, and there is none; set it to null"):
        check_quantization(NF4, has_gpus=False)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    def find(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(quantize, "find_spec", find)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed; run `pip install 'ray-sd\[optimizers\]'`"):
        check_quantization(NF4, has_gpus=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.zero.stage=3", "trainer.use_gpu=true"], "does not go with zero.stage=3"),
        (["trainer.use_gpu=false"], "needs a GPU, and use_gpu=false takes none"),
        (["method=full", "trainer.use_gpu=true"], "is for adapters; 'full' trains the weights themselves"),
        (["method=lora_dora", "trainer.use_gpu=true"], "does not go with use_dora"),
        (["method=loha", "trainer.use_gpu=true"], "=nf4 does not go with 'loha', .*; take int8"),
        (["method=lokr", "trainer.use_gpu=true"], "=nf4 does not go with 'lokr', .*; take int8"),
        (["method=dreambooth_full", "trainer.use_gpu=true"], "is for adapters; 'full' trains"),
    ],
)
def test_what_it_does_not_go_with_is_refused(settings: list[str], words: str):
    with pytest.raises((ConfigError, ValidationError), match=words):
        load_config(["experiment=smoke", *settings, "trainer.quantize_base=nf4"], ExperimentConfig)
