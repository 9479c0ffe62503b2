"""Every method on Stable Diffusion XL: what it exports draws alike in training, in plain diffusers and here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from pydantic import TypeAdapter
from safetensors.torch import load_file
from tiny_models import difference, draw, random_xl_batch, tiny_config, tiny_xl_config
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ray_sd import config
from ray_sd.config import TrainerConfig
from ray_sd.errors import ArtifactError
from ray_sd.generate import ImageRequest, generate
from ray_sd.methods import Method, build_method
from ray_sd.methods.embeddings import read_embedding
from ray_sd.models import DiffusionModel, load_model

TRAINER = TrainerConfig(learning_rate=0.02, token_learning_rate=0.5)
TOKENS = {"placeholder_token": "<cat>", "initializer_token": "a", "num_vectors": 2}
LORA_TEXT = {"name": "lora", "rank": 4, "text_encoder": True}
METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "lora with text": LORA_TEXT,
    "full": {"name": "full"},
    "full with text": {"name": "full", "text_encoder": True},
    "textual inversion": {"name": "textual_inversion", **TOKENS},
    "dreambooth": {"name": "dreambooth", "class_prompt": "a cat", "adapter": LORA_TEXT},
    "pivotal": {"name": "dreambooth", "class_prompt": "a cat", "adapter": LORA_TEXT, "tokens": TOKENS},
}
Exported = tuple[Method, DiffusionModel, Path]
REQUEST = ImageRequest("a <cat> on", seed=1, num_inference_steps=3, guidance_scale=5.0)


@pytest.fixture(scope="module")
def exported(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """What a method of METHODS trains and exports."""

    @cache
    def train(name: str) -> Exported:
        method, model = trained_on(tiny_xl, METHODS[name])
        folder = tmp_path_factory.mktemp("exported")
        method.export(model, folder)
        return method, model, folder

    return train


def trained_on(folder: Path, settings: dict) -> tuple[Method, DiffusionModel]:
    """A few large steps, and the parts that training did without."""
    method = build_method(TypeAdapter(config.Method).validate_python(settings))
    model = load_model(tiny_xl_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TRAINER)
    groups = [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, TRAINER)]
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        optimizer.zero_grad()
        method.objective(model, batch_of(method, model, step)).backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    assert before, "something trains"
    assert not [name for name, value in before.items() if torch.equal(value, parameters[name])]
    whole = load_model(tiny_xl_config(folder))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if getattr(model, name) is None:
            setattr(model, name, getattr(whole, name))
    return method, model.eval()


def batch_of(method: Method, model: DiffusionModel, seed: int) -> dict[str, torch.Tensor]:
    rows = method.rows()
    batch = random_xl_batch(2, rows.text, seed)
    if rows.placeholders:
        batch |= model.tokenize(["a <cat>", "<cat> b"])
    if rows.prior is not None:
        batch |= {f"class_{name}": value for name, value in random_xl_batch(2, rows.text, seed + 100).items()}
    return batch


@pytest.mark.parametrize("name", METHODS)
def test_an_export_draws_alike_in_training_in_plain_diffusers_and_here(
    tiny_xl: Path, exported: Callable[[str], Exported], name: str
):
    method, trained, folder = exported(name)
    expected = generate(trained, [REQUEST])[0]
    assert difference(generate(load_model(tiny_xl_config(tiny_xl)), [REQUEST])[0], expected) > 5

    ours = load_model(tiny_xl_config(tiny_xl))
    assert method.attach(ours, folder, 1.0) > 0
    assert difference(generate(ours, [REQUEST])[0], expected) <= 1

    plain = load_in_plain_diffusers(tiny_xl, folder)
    assert difference(draw(plain, REQUEST.prompt, guidance_scale=5.0), expected) <= 1


def load_in_plain_diffusers(base: Path, folder: Path) -> StableDiffusionXLPipeline:
    """As a user would who has nothing of ours."""
    classes = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    parts = {part: cls.from_pretrained(folder / part) for part, cls in classes.items() if (folder / part).is_dir()}
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, **parts, add_watermarker=False)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(folder)
    for embeddings in (folder / "learned_embeds.safetensors", folder / "embeddings/learned_embeds.safetensors"):
        if embeddings.is_file():
            tensors = load_file(embeddings)
            pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
            for key, encoder, tokenizer in (
                ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
                ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
            ):
                pipeline.load_textual_inversion(tensors[key], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def test_layers_that_the_unet_never_reads_do_not_train(exported: Callable[[str], Exported]):
    for kind in ("lora with text", "full with text"):
        _, model, _ = exported(kind)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any(name.startswith("text_encoder.encoder.layers.0.") for name in names)
        assert not any(name.startswith("text_encoder.encoder.layers.1.") for name in names)
        assert any(name.startswith("text_encoder_2.text_model.encoder.layers.1.") for name in names)


def test_a_pair_of_embeddings_is_one_file_of_the_published_layout(exported: Callable[[str], Exported]):
    _, _, folder = exported("textual inversion")
    tensors = load_file(folder / "learned_embeds.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    assert load_file(folder / "a1111/cat.safetensors").keys() == tensors.keys()
    assert read_embedding(folder / "learned_embeds.safetensors")[0] == "<cat>"


def test_an_embedding_of_another_family_is_refused(tiny: Path, exported: Callable[[str], Exported]):
    method, _, folder = exported("textual inversion")
    with pytest.raises(
        ArtifactError, match="has vectors for text_encoder and text_encoder_2, the base has text_encoder"
    ):
        method.attach(load_model(tiny_config(tiny)), folder, 1.0)
