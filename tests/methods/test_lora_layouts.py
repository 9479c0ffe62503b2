"""A LoRA in the layouts of kohya-ss, diffusers and PEFT: the names of full-size models, and the same picture from all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from kohya_keys import PUBLISHED, PUBLISHED_CONVOLUTIONS
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from random_loras import random_updates
from safetensors.torch import load_file, save_file
from tiny_models import UNET_XL, difference, draw, tiny_config, tiny_xl_config

from ray_sd.config import ModelConfig, TrainerConfig
from ray_sd.config.method import LoraMethod
from ray_sd.errors import ArtifactError
from ray_sd.methods import build_method
from ray_sd.methods.lora import attach_updates, trained_updates
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_reader import read_lora
from ray_sd.methods.lora_writers import write_diffusers, write_kohya, write_peft
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.original_layout import unet_names

FAMILIES = {"sd15": "stable_diffusion", "sd21": "stable_diffusion", "sdxl": "stable_diffusion_xl"}
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SIZES = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""Parameters of the published models."""
VARIANTS: dict[str, dict] = {
    "attention": {},
    "without text": {"text": False},
    "convolutions": {"convolutions": True},
    "many ranks and alphas": {"convolutions": True, "alike": False},
    "dora": {"dora": True},
    "dora of convolutions": {"dora": True, "convolutions": True},
}
HELD_BY_ANOTHER = ("convolutions", "dora")
"""Variants whose layers are among those of a variant that has more."""


def skeleton(layout: str, folder: Path) -> DiffusionModel:
    """A full-size model on the meta device; nothing is read from its file."""
    file = folder / f"{layout}.safetensors"
    file.touch()
    config = {"name": layout, "base": str(file), "layout": layout, "family": FAMILIES[layout]}
    return load_model(ModelConfig.model_validate(config), skeleton=True)


def adapted(model: DiffusionModel, **settings: object) -> dict[str, torch.nn.Parameter]:
    """What a LoRA of rank 4 trains."""
    build_method(LoraMethod(rank=4, **settings)).prepare(model, TrainerConfig())
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kohya_names(model: DiffusionModel) -> set[str]:
    names = LoraNames(model)
    return {names.kohya((part, layer)) for part, layers in trained_updates(model).items() for layer in layers}


@pytest.mark.parametrize("layout", FAMILIES)
def test_full_size_models_have_the_published_numbers_of_parameters_and_spellings_of_their_own(
    layout: str, tmp_path: Path
):
    model = skeleton(layout, tmp_path)
    found = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in SIZES[layout]}
    assert found == SIZES[layout]
    names = LoraNames(model)
    spelled = [spelling for layer in names.layers for spelling in set(names._spellings(layer))]
    assert len(spelled) == len(set(spelled)) == len(names.spellings())


@pytest.mark.parametrize(
    "layout", ["sd15", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("sd21", "sdxl"))]
)
def test_a_lora_has_the_keys_of_kohyas_default_and_of_its_conv_dim(layout: str, tmp_path: Path):
    """Of all linear layers the one, of convolutions the other."""
    model = skeleton(layout, tmp_path)
    targets = (*LINEAR, *CONVOLUTIONS)
    adapted(model, target_modules=targets, text_encoder=True, text_encoder_target_modules=TEXT)
    convolutions = {name for name in trained_updates(model)["unet"] if name.endswith(CONVOLUTIONS)}
    names = LoraNames(model)
    spelled = {names.kohya(("unet", name)) for name in convolutions}
    assert spelled == PUBLISHED_CONVOLUTIONS[layout]
    assert kohya_names(model) - spelled == PUBLISHED[layout]


@pytest.mark.parametrize(
    ("layout", "blocks", "parameters"), [("sd15", 16, 797_184), ("sd21", 16, 829_952), ("sdxl", 70, 5_806_080)]
)
def test_a_default_lora_trains_the_attention_of_every_transformer_block(
    layout: str, blocks: int, parameters: int, tmp_path: Path
):
    trained = adapted(skeleton(layout, tmp_path))
    assert sum(parameter.numel() for parameter in trained.values()) == parameters
    assert len(trained) == blocks * 2 * 4 * 2  # attentions, projections, halves
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    found = sorted(name for name in trained if name.startswith(f"unet.{block}."))
    assert found == sorted(
        f"unet.{block}.{attention}.{layer}.lora_{half}.default.weight"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for half in "AB"
    )


@pytest.fixture(scope="module", params=["sd", "xl"])
def base(request: pytest.FixtureRequest, tiny: Path, tiny_xl: Path) -> Callable[[], DiffusionModel]:
    """Loads a tiny model of either family, anew at every call."""
    config = tiny_config(tiny) if request.param == "sd" else tiny_xl_config(tiny_xl)
    return lambda: load_model(config)


@pytest.mark.parametrize(
    ("change", "original"),
    [
        ({"mid_block_type": None}, {}),
        ({"mid_block_type": "UNetMidBlock2D"}, {"mid_block.resnets.0.conv1": "middle_block_0_in_layers_2"}),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 80}, {"encoder_hid_proj": "encoder_hid_proj"}),
    ],
    ids=str,
)
def test_a_lora_of_an_unusual_unet_goes_through_every_layout(
    tiny_xl: Path, tmp_path: Path, change: dict, original: dict
):
    model = load_model(tiny_xl_config(tiny_xl, unet={"architecture": UNET_XL | change}))
    names = LoraNames(model)
    assert {name: names.kohya(("unet", name)) for name in original} == {
        name: f"lora_unet_{spelled}" for name, spelled in original.items()
    }
    method = build_method(LoraMethod(rank=4))
    method.prepare(model, TrainerConfig())
    method.export(model, tmp_path)
    layers = trained_updates(model)["unet"].keys()
    for file in ("pytorch_lora_weights.safetensors", "kohya/lora.safetensors"):
        assert read_lora(tmp_path / file, names)["unet"].keys() == layers


def picture_with(model: DiffusionModel, updates: Updates) -> Image.Image:
    attach_updates(model, updates, 1.0)
    return draw(model.pipeline())


class Written(NamedTuple):
    """A random LoRA, a folder that holds it in every layout, and what its model draws with it."""

    variant: str
    updates: Updates
    folder: Path
    expected: Image.Image


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in HELD_BY_ANOTHER)) for name in VARIANTS],
)
def written(
    request: pytest.FixtureRequest, base: Callable[[], DiffusionModel], tmp_path_factory: pytest.TempPathFactory
) -> Written:
    model, folder = base(), tmp_path_factory.mktemp("layouts")
    names = LoraNames(model)
    updates = random_updates(model, **VARIANTS[request.param])
    write_diffusers(updates, folder / "diffusers.safetensors")
    write_kohya(updates, folder / "kohya.safetensors", names)
    write_peft(updates, folder / "peft", names)
    before = draw(model.pipeline())
    expected = picture_with(model, updates)
    assert difference(before, expected) > 10
    return Written(request.param, updates, folder, expected)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_lora_draws_alike_through_every_layout_here_and_in_its_own_tools(
    base: Callable[[], DiffusionModel], written: Written, layout: str
):
    path = written.folder / (layout if layout == "peft" else f"{layout}.safetensors")
    model = base()
    found = read_lora(path, LoraNames(model))
    assert {part: layers.keys() for part, layers in found.items()} == {p: u.keys() for p, u in written.updates.items()}
    for part, layers in found.items():
        for name, layer in layers.items():
            wanted = written.updates[part][name]
            torch.testing.assert_close(layer.delta(), wanted.delta(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.magnitude, wanted.magnitude)
    if layout == "kohya" and "dora" in written.variant:
        return  # diffusers leaves a kohya file's magnitudes out
    assert difference(draw(in_plain_tools(model.pipeline(), path)), written.expected) <= 1


def test_a_lora_that_was_read_draws_what_it_drew(base: Callable[[], DiffusionModel], written: Written):
    model = base()
    updates = read_lora(written.folder / "kohya.safetensors", LoraNames(model))
    assert difference(picture_with(model, updates), written.expected) <= 1


def in_plain_tools(pipeline: DiffusionPipeline, path: Path) -> DiffusionPipeline:
    if path.is_file():
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        return pipeline
    for folder in path.iterdir():
        wrapped = PeftModel.from_pretrained(getattr(pipeline, folder.name), folder)
        setattr(pipeline, folder.name, wrapped.base_model.model)
    return pipeline


def test_a_fused_update_is_what_pefts_layers_compute(base: Callable[[], DiffusionModel]):
    for variant in ("attention", "dora of convolutions"):
        updates = random_updates(base(), **VARIANTS[variant])
        attached, fused = base(), base()
        attach_updates(attached, updates, 0.7)
        names = LoraNames(fused)
        with torch.no_grad():
            for component, layers in updates.items():
                for name, update in layers.items():
                    weight = names.layers[component, name].weight
                    weight.copy_(update.added_to(weight, 0.7))
        assert difference(draw(fused.pipeline()), draw(attached.pipeline())) <= 1


def test_a_kohya_file_has_its_parts_and_one_alpha(tiny: Path, tmp_path: Path):
    model = load_model(tiny_config(tiny))
    updates = random_updates(model, convolutions=True, alike=False)
    write_kohya(updates, tmp_path / "x.safetensors", LoraNames(model))
    tensors = load_file(tmp_path / "x.safetensors")
    parts = {"alpha", "lora_down.weight", "lora_up.weight"}
    assert {name.split(".", 1)[1] for name in tensors} == parts
    assert len({float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}) == 1
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape[1:] == (64, 3, 3)
    assert len({len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}) == 3


def test_xl_files_in_either_spelling_of_the_unet_mean_the_same(tiny_xl: Path, tmp_path: Path):
    model = load_model(tiny_xl_config(tiny_xl))
    names = LoraNames(model)
    updates = random_updates(model, convolutions=True)
    write_kohya(updates, tmp_path / "original.safetensors", names)
    renamed = {
        names.kohya((component, name)): f"lora_unet_{name.replace('.', '_')}"
        for component, name in names.layers
        if component == "unet"
    }
    tensors = load_file(tmp_path / "original.safetensors")
    respelled = {
        f"{renamed.get(layer, layer)}.{part}": tensor
        for (layer, part), tensor in ((name.split(".", 1), tensor) for name, tensor in tensors.items())
    }
    assert respelled.keys() != tensors.keys()
    save_file(respelled, tmp_path / "diffusers.safetensors")
    one, other = (read_lora(tmp_path / f"{name}.safetensors", names) for name in ("original", "diffusers"))
    assert {part: layers.keys() for part, layers in one.items()} == {p: u.keys() for p, u in other.items()}
    for component, layers in one.items():
        for name, layer in layers.items():
            again = other[component][name]
            assert torch.equal(layer.down, again.down)
            assert torch.equal(layer.up, again.up)
            assert layer.alpha == again.alpha


def test_files_of_old_diffusers_read_as_plain_diffusers_reads_them(tiny: Path, tmp_path: Path):
    """Attention processors named what they had learnt; text encoders had the same names; there was no alpha."""
    model = load_model(tiny_config(tiny))
    updates = random_updates(model)
    shorts = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k"}
    shorts |= {"v_proj": "to_v", "out_proj": "to_out"}
    old = {}
    for component, layers in updates.items():
        for name, update in layers.items():
            layer = next((layer for layer in shorts if name.endswith(f".{layer}")), None)
            if layer is not None:
                processor = "processor." if component == "unet" else ""
                start = f"{component}.{name.removesuffix(layer)}{processor}{shorts[layer]}_lora"
                old |= {f"{start}.down.weight": update.down, f"{start}.up.weight": update.up}
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, tmp_path / "old.safetensors")
    plain = in_plain_tools(load_model(tiny_config(tiny)).pipeline(), tmp_path / "old.safetensors")
    expected = draw(plain)
    assert difference(draw(model.pipeline()), expected) > 10
    assert difference(picture_with(model, read_lora(tmp_path / "old.safetensors", LoraNames(model))), expected) <= 1


def test_what_an_old_unet_alone_had_learnt_needs_no_prefix(tiny: Path, tmp_path: Path):
    names = LoraNames(load_model(tiny_config(tiny)))
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    halves = {f"{layer}.processor.to_k_lora.down.weight": torch.ones(2, 64)}
    halves |= {f"{layer}.processor.to_k_lora.up.weight": torch.ones(64, 2)}
    save_file(halves, tmp_path / "x.safetensors")
    assert list(read_lora(tmp_path / "x.safetensors", names)) == ["unet"]
    assert list(read_lora(tmp_path / "x.safetensors", names)["unet"]) == [f"{layer}.to_k"]


def test_a_convolution_split_in_two_is_one(tiny: Path, tmp_path: Path):
    """LyCORIS' lora_mid: the three convolutions in turn give what the one update gives."""
    names = LoraNames(load_model(tiny_config(tiny)))
    generator = torch.Generator().manual_seed(0)
    layer = "lora_unet_mid_block_resnets_0_conv1"
    down, mid, up = (torch.randn(shape, generator=generator) for shape in ((2, 64, 1, 1), (2, 2, 3, 3), (64, 2, 1, 1)))
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{layer}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    [update] = read_lora(tmp_path / "x.safetensors", names)["unet"].values()
    pixels = torch.randn(1, 64, 5, 5, generator=generator)
    conv = torch.nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(pixels, down), mid, padding=1), up)
    torch.testing.assert_close(conv(pixels, update.delta(), padding=1), expected, rtol=1e-4, atol=1e-3)


def test_a_lone_folder_of_peft_finds_its_component(tiny_xl: Path, tmp_path: Path):
    """The text encoders' layers have the same names; only their sizes tell which one it is."""
    model = load_model(tiny_xl_config(tiny_xl))
    names = LoraNames(model)
    write_peft(random_updates(model), tmp_path, names)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        assert list(read_lora(tmp_path / component, names)) == [component]


def test_pefts_settings_are_kept(tiny: Path, tmp_path: Path):
    model = load_model(tiny_config(tiny))
    names = LoraNames(model)
    write_peft(random_updates(model, text=False), tmp_path, names)
    config = tmp_path / "unet" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 8.0}}))
    layers = read_lora(tmp_path / "unet", names)["unet"]
    alphas = {name.endswith("attn1.to_q"): update.alpha for name, update in layers.items()}
    assert alphas == {True: 16.0, False: 4.0}  # alpha times the root of rank 4


def test_a_file_of_a_unet_alone_keeps_its_alpha(tiny: Path, tmp_path: Path):
    """`unet.save_lora_adapter` names the component neither in the tensors nor in the metadata."""
    model = load_model(tiny_config(tiny))
    model.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    model.unet.save_lora_adapter(tmp_path)
    layers = read_lora(tmp_path / "pytorch_lora_weights.safetensors", LoraNames(model))["unet"]
    assert {update.alpha for update in layers.values()} == {8.0}


def test_a_lora_of_which_some_layers_are_dora_is_not_written_where_nothing_loads_it(tiny: Path, tmp_path: Path):
    model = load_model(tiny_config(tiny))
    names = LoraNames(model)
    updates = {"unet": random_updates(model, text=False)["unet"] | _half(random_updates(model, dora=True)["unet"])}
    for write in (
        lambda: attach_updates(model, updates, 1.0),
        lambda: write_diffusers(updates, tmp_path / "x.safetensors"),
        lambda: write_peft(updates, tmp_path, names),
    ):
        with pytest.raises(ArtifactError, match="some layers of the unet are DoRA and others LoRA; fuse them"):
            write()
    write_kohya(updates, tmp_path / "kohya.safetensors", names)
    kept = read_lora(tmp_path / "kohya.safetensors", names)["unet"]
    assert {name: layer.magnitude is None for name, layer in kept.items()} == {
        name: layer.magnitude is None for name, layer in updates["unet"].items()
    }


def _half(layers: dict[str, LowRank]) -> dict[str, LowRank]:
    return {name: layers[name] for name in sorted(layers)[::2]}


@pytest.mark.parametrize("saved", ["[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": ["x"]}'])
def test_settings_in_a_file_that_are_none_are_refused(tiny: Path, tmp_path: Path, saved: str):
    model = load_model(tiny_config(tiny))
    write_diffusers(random_updates(model), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": saved})
    with pytest.raises(ArtifactError, match="x.safetensors: .*(holds no settings|is x, no finite number)"):
        read_lora(tmp_path / "x.safetensors", LoraNames(model))


def test_a_lora_of_comfyui_is_read(base: Callable[[], DiffusionModel], tmp_path: Path):
    """It names layers as its own model does: `comfy/lora.py`."""
    model = base()
    updates, names = random_updates(model, convolutions=True), LoraNames(model)
    encoders = {
        "text_encoder": "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    }
    originals = unet_names(model.unet)
    tensors = {
        f"{encoders.get(component, 'diffusion_model')}.{name if component in encoders else originals[name]}.{half}.weight": part
        for component, layers in updates.items()
        for name, update in layers.items()
        for half, part in (("lora_down", update.down), ("lora_up", update.up))
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", names)
    assert {part: layers.keys() for part, layers in found.items()} == {p: u.keys() for p, u in updates.items()}


def attn_key(part: str) -> str:
    return f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.{part}"


def base_key(layer: str) -> str:
    return f"{layer}.lora_A.weight"


HALVES = {attn_key("lora_down.weight"): (2, 32), attn_key("lora_up.weight"): (32, 2)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({**HALVES, "lora_unet_nothing.alpha": ()}, "no layer for 1 of 3 tensors, such as lora_unet_nothing.alpha"),
        (
            {"model.diffusion_model.out.2.bias": (4,)},
            "holds a whole model .1 of 1 .*; give it as the base: model.base=",
        ),
        ({"conditioner.embedders.0.x": (4,), "first_stage_model.x": (4,)}, "holds a whole model .1 of 2 tensors"),
        ({"decoder.conv_in.weight": (4,), "quant_conv.bias": (4,)}, "an autoencoder .2 of 2 .*: model.vae=PATH"),
        ({"mid_block.attentions.0.proj_in.weight": (4,), "b": (4,)}, "all weights of the unet .* model.unet=FOLDER"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.bias": (4,)}, "all weights of the text_encoder .*FOLDER"),
        (
            {**HALVES, "lora_unet_mid_block_attentions_0_norm.w_norm": (4,)},
            "holds norms.* .1 of 3 .*w_norm.*train_norm",
        ),
        ({**HALVES, "lora_unet_mid_block_attentions_0_norm.b_norm": (4,)}, "holds norms, .*b_norm"),
        ({attn_key("diff"): (32, 32), attn_key("diff_b"): (32,)}, "holds full differences of weights .2 of 2"),
        ({**HALVES, attn_key("lora_B.bias"): (32,)}, "holds biases of layers .1 of 3"),
        ({attn_key("lokr_w1"): (2, 2), attn_key("alpha"): ()}, "holds a LoKr .1 of 2"),
        ({attn_key("oft_blocks"): (2, 2), attn_key("alpha"): ()}, "holds an OFT .1 of 2"),
        ({attn_key("on_input"): (), attn_key("weight"): (2,)}, "holds an .IA.³"),
        ({attn_key("a1.weight"): (2,), attn_key("b2.weight"): (2,)}, "holds a GLoRA .1 of 2|holds a GLoRA .2 of 2"),
        ({"down_blocks.0.motion_modules.0.x.to_q_lora.up.weight": (2,)}, "holds motion modules .AnimateDiff."),
        ({"image_proj.proj.weight": (2,), "ip_adapter.1.to_k_ip.weight": (2,)}, "holds an IP-Adapter .2 of 2"),
        ({"control_model.x.weight": (2,), "c": (2,)}, "holds a ControlNet .1 of 2"),
        (
            {"lora_te2_text_model.lora_up.weight": (2,), "b": (2,)},
            "such as lora_te2_.*another base, Stable Diffusion XL",
        ),
        ({base_key("unet.down_blocks.1.attentions.0.transformer_blocks.1"): (2,)}, "another base, Stable Diffusion XL"),
        ({base_key("text_encoder.text_model.encoder.layers.22.mlp.fc1"): (2,)}, "another base, Stable Diffusion 2"),
        ({base_key("transformer.transformer_blocks.1.attn.add_q_proj"): (2,)}, "another base, Stable Diffusion 3"),
        ({base_key("lora_unet_joint_blocks_1_x_block_attn_qkv"): (2,)}, "another base, Stable Diffusion 3"),
        ({base_key("transformer.single_transformer_blocks.1.attn.to_q"): (2,)}, "another base, Flux"),
        ({base_key("lora_unet_double_blocks_1_img_attn_qkv"): (2,)}, "another base, Flux"),
        ({base_key("diffusion_model.blocks.1.self_attn.q"): (2,), "blocks.1.diff_b": (2,)}, "another base, Wan"),
        ({base_key("transformer.blocks.1.attn1.to_q"): (2,)}, "another base, Wan"),
        ({base_key("transformer.transformer_blocks.1.attn1.to_q"): (2,)}, "another base, a diffusion transformer"),
        ({"a.b": (2,), "c.d": (2,)}, ": none of its tensors is named as a LoRA's, such as a.b; LoRA and DoRA are read"),
        ({**HALVES, "a.b": (2,)}, ": 1 of 3 tensors are not named as a LoRA's, such as a.b"),
        (
            {"a.lora_A.weight": (2, 2)},
            ": none of its layers is called as tools call the base's, such as a.lora_A.weight",
        ),
        (
            {base_key("diffusion_model.down_blocks.0.x"): (2,)},
            "none of its layers is called .*; which tool wrote it",
        ),
        (
            {base_key("base_model.model.mid_block.x"): (2,)},
            "holds a LoRA of PEFT .*; give its folder, .*adapter_config",
        ),
        ({"emb_params": (1, 32), "step": ()}, "an embedding beside other tensors .1 of 2 .*; leave emb_params alone"),
        (
            {"text_encoders_0": (1, 32), "text_encoders_1": (1, 32)},
            "holds embeddings of which it does not tell the words",
        ),
        ({}, "holds no tensors of a LoRA"),
        ({**HALVES, attn_key("alpha"): (2,)}, "alpha is .2,., and a LoRA's alpha is one number"),
        ({**HALVES, attn_key("lora_down.weight"): (32,)}, "lora_down.weight is .32,., which is no half of an update"),
        (dict.fromkeys(HALVES, (0,)), "lora_down.weight is .0,., which is no half"),
        ({attn_key("lora_down.weight"): (0, 32), attn_key("lora_up.weight"): (32, 0)}, "is .0, 32., which is no half"),
        ({attn_key("lora_down.weight"): (2, 32)}, "attn1_to_q.lora_down.weight has no up matrix beside it"),
        ({attn_key("alpha"): ()}, "attn1_to_q.alpha has no down matrix beside it"),
        ({attn_key("hada_w1_a"): (2, 2)}, "holds a LoHa .*hada_w1_a.; LoRA and DoRA are read"),
        ({**HALVES, attn_key("lora_up.weight"): (64, 2)}, "lora_up.weight is made for 64 features, .* has 32"),
        ({**HALVES, attn_key("lora_up.weight"): (32, 3)}, "which is no update of a weight of \\(32, 32\\)"),
        ({**HALVES, attn_key("lora_down.weight"): (2, 32, 3, 3)}, "which is no update of a weight of \\(32, 32\\)"),
        ({**HALVES, attn_key("dora_scale"): (1, 32)}, "dora_scale scales a layer's inputs"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_words(tiny: Path, tmp_path: Path, shapes: dict, words: str):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=words):
        read_lora(tmp_path / "x.safetensors", LoraNames(load_model(tiny_config(tiny), ("unet", "text_encoder"))))


def test_folders_of_peft_that_hold_no_lora_are_refused(tiny: Path, tmp_path: Path):
    model = load_model(tiny_config(tiny))
    names = LoraNames(model)
    get_peft_model(model.unet, LoHaConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "unet")
    with pytest.raises(ArtifactError, match="unet holds a LOHA of PEFT's; LORA is read"):
        read_lora(tmp_path, names)
    (tmp_path / "unet" / "adapter_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="adapter_config.json is no configuration of PEFT's"):
        read_lora(tmp_path, names)
