from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sprites import decode, disc, flag
from PIL import Image
from safetensors import safe_open
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

import ray_sd.embedded
from ray_sd.embedded.clip import (
    ClipTrainingConfig,
    Example,
    Scenes,
    build_clip,
    contrastive_loss,
    embed_captions,
    embed_pictures,
    fit,
    image_processor,
    retrieval,
)
from ray_sd.embedded.sprites import catalogue
from ray_sd.embedded.tokenizer import build_tokenizer

PACKAGE = Path(ray_sd.embedded.__file__).parent
FOLDER = PACKAGE / "emoji_clip"
NAMES = (PACKAGE / "names.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def shipped():
    return CLIPModel.from_pretrained(FOLDER).float().eval()


def shipped_spins():
    """First frames of the shipped clips, each turned a little, with names and colours."""
    for path in sorted((PACKAGE / "clips" / "spin").glob("*.mp4")):
        colour = path.with_suffix(".txt").read_text().split()[-2]
        yield Example(path.stem.replace("_", " "), colour, Image.fromarray(decode(path, frames=1)[0]).reduce(2))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
@torch.no_grad()
def test_pictures_find_their_name_among_all_names(shipped, tokenizer, every):
    """Among the first five of about a thousand, or of a fifth of these; many look alike: a dragon and a dragon's face."""
    examples = list(shipped_spins())
    names = [*NAMES[::every], *({example.name for example in examples} - set(NAMES[::every]))]
    pictures = embed_pictures(shipped, [example.picture for example in examples])
    captions = {
        colour: embed_captions(shipped, tokenizer, [f"a {name} on a {colour} background" for name in names])
        for colour in {example.colour for example in examples}
    }
    found = {
        example.name: [names[number] for number in (captions[example.colour] @ picture).topk(5).indices]
        for example, picture in zip(examples, pictures, strict=True)
    }
    assert np.mean([name in likely for name, likely in found.items()]) > 0.8, found
    assert np.mean([name == likely[0] for name, likely in found.items()]) > 0.5, found


@pytest.mark.slow
@torch.no_grad()
def test_pictures_find_their_colour(shipped, tokenizer):
    assert retrieval(shipped, tokenizer, list(shipped_spins()))[1] > 0.8


@pytest.mark.slow
@torch.no_grad()
def test_the_image_tower_alone_embeds_as_the_whole_does(shipped):
    tower = CLIPVisionModelWithProjection.from_pretrained(FOLDER).float()
    pictures = [example.picture for example in shipped_spins()][:4]
    pixels = CLIPImageProcessor.from_pretrained(FOLDER)(pictures, return_tensors="pt").pixel_values
    assert pixels.shape == (4, 3, 224, 224)
    embedded = tower(pixels).image_embeds
    assert embedded.shape == (4, 128)
    # the processor resizes a little differently than Stable Video Diffusion's pipeline
    assert torch.cosine_similarity(embedded, embed_pictures(shipped, pictures)).min() > 0.95


@torch.no_grad()
def test_the_text_tower_alone_embeds_as_the_whole_does(shipped, tokenizer):
    tower = CLIPTextModelWithProjection.from_pretrained(FOLDER).float()
    captions = ["a tiger face on a blue background", "a dog on a red background"]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    embedded = torch.nn.functional.normalize(tower(**tokens).text_embeds, dim=-1)
    torch.testing.assert_close(embedded, embed_captions(shipped, tokenizer, captions), atol=1e-3, rtol=0)


def test_shipped_weights_are_in_half_precision_under_the_names_that_every_release_loads():
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    assert {name.split(".")[0] for name in names} == {
        "text_model",
        "vision_model",
        "text_projection",
        "visual_projection",
        "logit_scale",
    }
    assert "vision_model.encoder.layers.3.self_attn.q_proj.weight" in names
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in names


def test_its_tokenizer_is_that_of_the_image_model(tokenizer):
    assert tokenizer.get_vocab() == CLIPTokenizer.from_pretrained(PACKAGE / "emoji" / "tokenizer").get_vocab()


def test_pixels_are_normalised_as_clip_does_it():
    assert list(image_processor().image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(image_processor().image_std) == [0.26862954, 0.26130258, 0.27577711]


def test_examples_of_one_sprite_are_not_told_apart():
    one, other = torch.eye(4)[:2]
    blank = Image.new("RGB", (64, 64))
    pictures, captions = torch.stack([one, one]), torch.stack([one, other])
    pair = [Example("dog", "red", blank), Example("dog", "black", blank)]
    assert contrastive_loss(torch.tensor(10.0), pictures, captions, pair).item() == 0
    others = [Example("dog", "red", blank), Example("cat", "black", blank)]
    assert contrastive_loss(torch.tensor(10.0), pictures, captions, others).item() > 1


def test_scenes_are_pictures_of_each_sprite_that_match_their_captions():
    scenes = Scenes([flag(), disc()], seed=0)
    examples = scenes.each()
    assert [example.name for example in examples] == ["flag", "disc"]
    for example in scenes.draw(20):
        pixels = np.asarray(example.picture)
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        background = catalogue().colours[example.colour]
        assert pixels.shape == (64, 64, 3)
        assert counts[(colours == background).all(axis=1)] > 100
        assert example.caption == f"a {example.name} on a {example.colour} background"
    assert len({example.picture.tobytes() for example in scenes.draw(20)}) == 20


def test_a_step_reaches_every_part(tokenizer):
    model = build_clip(tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(model, tokenizer, Scenes([flag("dog"), disc()], seed=0), ClipTrainingConfig(steps=2, batch_size=4))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    undecayed = {name.split(".")[0] for name in moved if before[name].ndim <= 1}  # which weight decay does not move
    assert undecayed == {"text_model", "vision_model", "logit_scale"}
    assert {"text_projection.weight", "visual_projection.weight"} <= moved


@pytest.mark.slow
def test_a_few_steps_teach_two_sprites():
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer)
    scenes = Scenes([flag("dog"), disc()], seed=0)
    fit(model, tokenizer, scenes, ClipTrainingConfig(steps=30, batch_size=12))
    assert np.mean([retrieval(model, tokenizer, scenes.each())[0] for _ in range(10)]) > 0.9
