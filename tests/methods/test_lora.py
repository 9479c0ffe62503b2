import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import difference, draw, random_batch, save_tiny_model, tiny_config

from ray_sd.config import TrainerConfig
from ray_sd.config.method import LoraMethod
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods import build_method
from ray_sd.methods.lora import Lora
from ray_sd.models import DiffusionModel, load_model

BROAD = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
VARIANTS = {
    "attention": {},
    "broad": {"target_modules": BROAD, "alpha": 2.0},
    "dora": {"use_dora": True},
    "text": {"text_encoder": True, "alpha": 8.0},
    "text_mlp": {"text_encoder": True, "text_encoder_target_modules": ("fc1",)},
    "text_dora": {"text_encoder": True, "use_dora": True, "target_modules": BROAD},
}


def train(folder: Path, steps: int = 3, **settings: object) -> tuple[Lora, DiffusionModel]:
    """A few large steps, so that the adapter matters."""
    torch.manual_seed(0)
    method = build_method(LoraMethod(rank=4, **settings))
    model = load_model(tiny_config(folder), method.components())
    method.prepare(model, TrainerConfig())
    optimizer = torch.optim.AdamW(method.parameter_groups(model, TrainerConfig(learning_rate=0.05)))
    for step in range(steps):
        optimizer.zero_grad()
        method.objective(model, random_batch(text=method.rows().text, seed=step)).backward()
        optimizer.step()
    model.eval()
    return method, model


def test_a_lora_is_given_without_importing_bitsandbytes(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)  # as in a process that has no use for it
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.bnb", raising=False)
    train(tiny, steps=0)
    assert "peft.tuners.lora.bnb" not in sys.modules


def whole(folder: Path, trained: DiffusionModel | None = None) -> DiffusionModel:
    model = load_model(tiny_config(folder))
    if trained is not None:
        model.unet = trained.unet
        model.text_encoder = trained.text_encoder or model.text_encoder
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_draws_alike_in_training_in_plain_diffusers_and_here(tiny: Path, tmp_path: Path, variant: str):
    method, trained = train(tiny, **VARIANTS[variant])
    method.export(trained, tmp_path)
    expected = draw(whole(tiny, trained).pipeline())

    plain = whole(tiny).pipeline()
    before = draw(plain)
    plain.load_lora_weights(tmp_path)
    assert difference(draw(plain), expected) <= 1
    assert difference(before, expected) > 10

    ours = whole(tiny)
    count = method.attach(ours, tmp_path, 1.0)
    assert difference(draw(ours.pipeline()), expected) <= 1
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as tensors:
        assert count == len(list(tensors.keys()))

    if "dora" not in variant:  # which has no kohya file
        pipeline = whole(tiny).pipeline()
        pipeline.load_lora_weights(tmp_path / "kohya", weight_name="lora.safetensors")
        assert difference(draw(pipeline), expected) <= 1


def test_text_encoder_names_have_the_prefix_that_other_tools_expect(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, steps=1, text_encoder=True)
    method.export(trained, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as tensors:
        names = [name for name in list(tensors.keys()) if not name.startswith("unet.")]
    layer = "text_encoder.text_model.encoder.layers.1.self_attn.k_proj.lora_linear_layer"
    assert {f"{layer}.down.weight", f"{layer}.up.weight"} <= set(names)
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)


def test_the_kohya_export_has_its_names_and_alphas(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, steps=1, text_encoder=True, alpha=8.0)
    method.export(trained, tmp_path)
    with safe_open(tmp_path / "kohya/lora.safetensors", "pt") as tensors:
        layers = {}
        for name in list(tensors.keys()):
            layers.setdefault(name.split(".", 1)[0], []).append(name.split(".", 1)[1])
        assert tensors.metadata()["ss_network_dim"] == "4"
        assert tensors.get_tensor("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha").item() == 8
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in layers
    assert all(sorted(parts) == ["alpha", "lora_down.weight", "lora_up.weight"] for parts in layers.values())


def test_dora_has_no_kohya_file(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, steps=1, use_dora=True)
    method.export(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_only_the_adapter_trains_and_nothing_else_moves(tiny: Path):
    _, trained = train(tiny, text_encoder=True)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert any(name.startswith("text_encoder.") for name in names)
    before = whole(tiny).state_dict()
    for name, tensor in trained.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


def test_an_untrained_adapter_changes_nothing(tiny: Path):
    method = build_method(LoraMethod())
    model = load_model(tiny_config(tiny), method.components())
    batch = random_batch()
    before = model.loss(batch)
    method.prepare(model, TrainerConfig())
    assert torch.equal(method.row_losses(model, batch), before)


def test_the_text_encoder_has_its_own_rate(tiny: Path):
    method = build_method(LoraMethod(text_encoder=True))
    model = load_model(tiny_config(tiny), method.components())
    method.prepare(model, TrainerConfig())
    trainer = TrainerConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5)
    groups = method.parameter_groups(model, trainer)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-3), ("text_encoder", 1e-5)]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_scale_weighs_the_adapter(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, text_encoder=True)
    method.export(trained, tmp_path)
    nothing, half = whole(tiny), whole(tiny)
    method.attach(nothing, tmp_path, 0.0)
    method.attach(half, tmp_path, 0.5)
    plain = whole(tiny).pipeline()
    assert difference(draw(nothing.pipeline()), draw(plain)) <= 1
    plain.load_lora_weights(tmp_path, adapter_name="lora")
    plain.set_adapters("lora", 0.5)
    assert difference(draw(half.pipeline()), draw(plain)) <= 1


def test_two_adapters_add_up_as_in_plain_diffusers(tiny: Path, tmp_path: Path):
    first, one = train(tiny)
    second, other = train(tiny, steps=5, text_encoder=True)
    first.export(one, tmp_path / "one")
    second.export(other, tmp_path / "other")
    ours = whole(tiny)
    first.attach(ours, tmp_path / "one", 0.7)
    second.attach(ours, tmp_path / "other", 0.4)
    plain = whole(tiny).pipeline()
    plain.load_lora_weights(tmp_path / "one", adapter_name="one")
    plain.load_lora_weights(tmp_path / "other", adapter_name="other")
    plain.set_adapters(["one", "other"], [0.7, 0.4])
    assert difference(draw(ours.pipeline()), draw(plain)) <= 1


@pytest.mark.filterwarnings("error::FutureWarning")  # a user would read of names that they have not written
def test_checkpointing_gives_the_same_gradients(tiny: Path):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method = build_method(LoraMethod(text_encoder=True, min_snr_gamma=5.0))
        model = load_model(tiny_config(tiny), method.components())
        trainer = TrainerConfig(gradient_checkpointing=checkpointing)
        method.prepare(model, trainer)
        assert model.unet.is_gradient_checkpointing is checkpointing
        method.objective(model, random_batch(text="tokens")).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_a_frozen_bf16_base_trains_under_autocast(tiny: Path):
    method = build_method(LoraMethod(text_encoder=True, dropout=0.1))
    model = load_model(tiny_config(tiny), method.components())
    method.prepare(model, TrainerConfig())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.row_losses(model, random_batch(text="tokens"))
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_min_snr_and_noise_offset_weigh_training_but_not_validation(tiny: Path):
    plain, weighing = build_method(LoraMethod()), build_method(LoraMethod(min_snr_gamma=0.01, noise_offset=0.5))
    model = load_model(tiny_config(tiny), plain.components())
    plain.prepare(model, TrainerConfig())
    batch = random_batch()
    assert not torch.allclose(weighing.row_losses(model, batch), plain.row_losses(model, batch))
    torch.testing.assert_close(weighing.validation_losses(model, batch), plain.row_losses(model, batch))


def test_a_target_that_names_no_layer_is_refused(tiny: Path):
    method = build_method(LoraMethod(target_modules=("to_q", "to_x")))
    model = load_model(tiny_config(tiny), method.components())
    with pytest.raises(ConfigError, match="method.target_modules: no layer of the unet is named 'to_x'"):
        method.prepare(model, TrainerConfig())


def test_weights_of_another_shape_and_of_unknown_layers_are_refused(tiny: Path, tmp_path: Path):
    import tiny_models

    method, trained = train(tiny, steps=1)
    method.export(trained, tmp_path / "adapter")
    wide = tiny_models.UNET | {"block_out_channels": [64, 64]}
    with pytest.raises(
        ArtifactError, match="is made for 32 features, the base's layer has 64; it was made for another base"
    ):
        method.attach(load_model(tiny_config(tiny, unet={"architecture": wide})), tmp_path / "adapter", 1.0)
    other = tiny_models.UNET | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    with pytest.raises(
        ArtifactError, match="no layer for 16 of 64 tensors, such as unet.down_blocks.0.*made for another base"
    ):
        method.attach(load_model(tiny_config(tiny, unet={"architecture": other})), tmp_path / "adapter", 1.0)


def test_an_export_of_a_base_loads_in_another_of_its_shape(tiny: Path, tmp_path: Path):
    method, trained = train(tiny, steps=1)
    method.export(trained, tmp_path / "adapter")
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert method.attach(load_model(tiny_config(other)), tmp_path / "adapter", 1.0) > 0
