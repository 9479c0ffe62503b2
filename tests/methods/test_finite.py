"""Values that are no finite numbers, in weights of every kind: refused with the tensor's name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from random_loras import random_updates
from safetensors.torch import load_file, save_file
from tiny_models import export_adapter, tiny_config

from jobs.export import main
from ray_sd.config import TrainerConfig
from ray_sd.config.load import run_job
from ray_sd.config.method import LoraMethod
from ray_sd.errors import ArtifactError
from ray_sd.finite import check_finite
from ray_sd.methods import build_method, load_adapter
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya, write_peft
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.original_layout import original_weights
from ray_sd.train import checkpoint


def spoil(file: Path, value: float = torch.nan, which: int = 0) -> str:
    """Puts a value in the middle of one tensor of a file; returns a pattern of what is said of it."""
    tensors = load_file(file)
    name = sorted(name for name in tensors if tensors[name].is_floating_point())[which]
    flat = tensors[name].flatten()
    flat[len(flat) // 2] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    save_file(tensors, file, {"format": "pt"})
    return f": {re.escape(name)} has values that are not finite"


HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in (torch.float64, torch.float32, *HALF) for value in (torch.nan, torch.inf, -torch.inf)]
    + [(torch.float8_e5m2, torch.inf), (torch.float8_e4m3fn, torch.nan)],
    ids=str,
)
def test_one_value_of_many_is_found_in_every_precision(dtype: torch.dtype, value: float):
    values = torch.full((3, 1001), 400.0)  # whose sum half precision does not hold
    check_finite({"a": values.to(dtype), "empty": torch.ones(0), "ids": torch.arange(3)}, "x")
    values[2, 700] = value
    with pytest.raises(ArtifactError, match=r"^x: a has values that are not finite \(NaN or infinity\); the training"):
        check_finite({"a": values.to(dtype)}, "x")


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_lora_is_refused_whole(tiny: Path, tmp_path: Path, layout: str):
    model = load_model(tiny_config(tiny), ("unet", "text_encoder"))
    updates = random_updates(model)
    file = tmp_path / "x.safetensors"
    if layout == "peft":
        write_peft(updates, tmp_path, LoraNames(model))
        file = tmp_path / "unet" / "adapter_model.safetensors"
    elif layout == "kohya":
        write_kohya(updates, file, LoraNames(model))
    else:
        write_diffusers(updates, file)
    with pytest.raises(ArtifactError, match=spoil(file, torch.inf, which=5)):
        load_adapter(model, file)


def test_an_alpha_that_is_written_as_text_is_looked_at(tiny: Path, tmp_path: Path):
    model = load_model(tiny_config(tiny), ("unet", "text_encoder"))
    write_peft(random_updates(model, text=False), tmp_path, LoraNames(model))
    config = tmp_path / "unet" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change in ({"lora_alpha": torch.nan}, {"lora_alpha": None}, {"alpha_pattern": {"attn1.to_q": torch.inf}}):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(ArtifactError, match=r"the lora_alpha of .* is (nan|None|inf), no finite number"):
            load_adapter(model, tmp_path / "unet")


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ({"name": "loha", "rank": 2}, "peft/unet/adapter_model.safetensors"),
        ({"name": "full"}, "unet/diffusion_pytorch_model.safetensors"),
        ({"name": "textual_inversion", "placeholder_token": ["<cat>"]}, "learned_embeds.safetensors"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_adapters_of_every_kind_are_refused(tiny: Path, tmp_path: Path, method: dict, file: str):
    export_adapter(tiny, tmp_path, method)
    words = spoil(tmp_path / file)
    settings = json.loads((tmp_path / "manifest.json").read_text())
    del settings["files"][file]
    (tmp_path / "manifest.json").write_text(json.dumps(settings))
    with pytest.raises(ArtifactError, match=words):
        load_adapter(load_model(tiny_config(tiny)), tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_whole_weights_are_refused(tiny: Path, tmp_path: Path, component: str):
    shutil.copytree(tiny / component, tmp_path / component)
    [file] = (tmp_path / component).glob("*.safetensors")
    with pytest.raises(ArtifactError, match=spoil(file, which=1)):
        load_model(tiny_config(tiny, **{component: str(tmp_path)}), (component,))


def test_a_single_file_is_refused(tiny: Path, tmp_path: Path):
    weights = original_weights(load_model(tiny_config(tiny)))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=spoil(tmp_path / "x.safetensors", which=-1)):
        load_model(tiny_config(tmp_path / "x.safetensors"), ("unet",))


@pytest.fixture
def trained(tiny: Path) -> DiffusionModel:
    model = load_model(tiny_config(tiny), ("unet", "text_encoder"))
    build_method(LoraMethod(rank=2)).prepare(model, TrainerConfig())
    return model


def test_a_checkpoint_is_refused(trained: DiffusionModel, tmp_path: Path):
    parameters = checkpoint.trained_parameters(trained)
    save_file({name: parameter.detach().clone() for name, parameter in parameters.items()}, tmp_path / "s.safetensors")
    index = {"format": checkpoint.FORMAT, "step": 3, "keys": [checkpoint.PARAMETER], "config": {}}
    index |= {"files": dict.fromkeys(parameters, "s.safetensors"), "optimizer": {"kind": {}, "scalars": {}}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert checkpoint.load_weights(trained, tmp_path) == 3
    with pytest.raises(ArtifactError, match=f"checkpoint .*{spoil(tmp_path / 's.safetensors')}"):
        checkpoint.load_weights(trained, tmp_path)


def test_what_diverged_is_not_exported(trained: DiffusionModel, tmp_path: Path):
    name, parameter = next(iter(checkpoint.trained_parameters(trained).items()))
    with torch.no_grad():
        parameter[0, 0] = torch.nan
    layer = re.escape(name.removeprefix("unet.").partition(".lora_")[0])
    with pytest.raises(ArtifactError, match=f"lora_weights.safetensors: unet.{layer}.* the training diverged"):
        build_method(LoraMethod(rank=2)).export(trained, tmp_path)
    assert not list(tmp_path.iterdir())


def large_lora(model: DiffusionModel, path: Path) -> None:
    updates = random_updates(model, text=False)
    for update in updates["unet"].values():
        update.up.mul_(1e6)
    write_diffusers(updates, path)


def test_numbers_that_half_precision_does_not_hold_are_not_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    large_lora(load_model(tiny_config(tiny), ("unet", "text_encoder")), tmp_path / "large.safetensors")
    shared = ["model=sd15", f"model.base={tiny}"]
    convert = ["convert", *shared, "adapter=large.safetensors"]
    fuse = ["fuse", *shared, "adapters=large.safetensors", "output=fused"]
    for arguments in ([*convert, "layout=kohya", "output=x.safetensors"], [*convert, "output=folder"], fuse):
        assert run_job(main, [*arguments, "dtype=float16"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(
            r"(attn|ff|proj).* has values that are not finite .*dtype=float16, which ends at 65504", line
        ), line
        assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    assert run_job(main, [*convert, "layout=kohya", "output=x.safetensors", "dtype=bfloat16"]) == 0
