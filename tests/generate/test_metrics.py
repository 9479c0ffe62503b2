"""Metrics of pictures by the embedded CLIP, by tiny vision transformers, and by LPIPS with random weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

import ray_sd.embedded
from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config
from ray_sd.config.metrics import BaseDrift, DinoSimilarity, Lpips, PromptSimilarity, SubjectSimilarity
from ray_sd.embedded.clip import embed_captions, embed_pictures
from ray_sd.errors import ConfigError
from ray_sd.generate import ImageRequest, embedders, generate
from ray_sd.generate.embedders import Clip, Dino
from ray_sd.generate.lpips import NETS, PerceptualDistance
from ray_sd.generate.metrics import PictureMetrics, check_model, prompts_of_base
from ray_sd.models import load_model

PACKAGE = Path(ray_sd.embedded.__file__).parent
EMOJI = "embedded/emoji_clip"
SUBJECT = SubjectSimilarity(model=EMOJI, references=["embedded/pictures/owl"])
DRIFT = BaseDrift(model=EMOJI)
PROMPTS = ["a dog on a red background", "a tiger face on a blue background", "a penguin on a yellow background"]


def owls(folder: str) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted((PACKAGE / "pictures" / folder).glob("*.png"))]


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    """What the embedded model draws of PROMPTS."""
    model = load_model(load_config(["model=emoji", "prompt=x"], GenerateConfig).model)
    return generate(model, [ImageRequest(prompt, seed=3, num_inference_steps=12) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(EMOJI, "cpu", "model")


def noise(size: tuple[int, int], count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def test_pictures_of_the_subject_are_nearer_to_its_references_than_others(drawn: list[Image.Image]):
    metrics = PictureMetrics([SUBJECT], {SUBJECT.key: owls("owl")})
    owl = metrics.measure(owls("owl_upright"), ["a owl"] * 8)["val/subject_similarity"]
    other = metrics.measure(drawn, PROMPTS)["val/subject_similarity"]
    assert owl > 0.85
    assert other < 0.4


def test_subject_similarity_is_the_mean_over_all_pairs(clip: Clip, drawn: list[Image.Image]):
    references = owls("owl")[:2]
    pairs = [
        float(torch.cosine_similarity(*clip.embed_pictures([one, other]), dim=0))
        for one in drawn
        for other in references
    ]
    found = PictureMetrics([SUBJECT], {SUBJECT.key: references}).measure(drawn, PROMPTS)
    assert found == {"val/subject_similarity": pytest.approx(np.mean(pairs), abs=1e-5)}


def test_a_picture_answers_its_own_prompt_better_than_anothers(drawn: list[Image.Image]):
    metrics = PictureMetrics([PromptSimilarity(model=EMOJI)], {})
    for number, picture in enumerate(drawn):
        found = [metrics.measure([picture], [prompt])["val/prompt_similarity"] for prompt in PROMPTS]
        assert np.argmax(found) == number, found
        assert found[number] > 0.4
    together = metrics.measure(drawn, PROMPTS)["val/prompt_similarity"]
    alone = [
        metrics.measure([picture], [prompt])["val/prompt_similarity"]
        for picture, prompt in zip(drawn, PROMPTS, strict=True)
    ]
    assert together == pytest.approx(np.mean(alone), abs=1e-5)


def test_new_words_of_prompts_are_read_as_plain_ones(drawn: list[Image.Image]):
    plain, replaced = PromptSimilarity(model=EMOJI), PromptSimilarity(model=EMOJI, label="r", replace={"<pet>": "dog"})
    expected = PictureMetrics([plain], {}).measure(drawn[:1], PROMPTS[:1])["val/prompt_similarity"]
    found = PictureMetrics([plain, replaced], {}).measure(drawn[:1], ["a <pet> on a red background"])
    assert found["val/r"] == pytest.approx(expected, abs=1e-5)
    assert found["val/prompt_similarity"] < expected - 0.01


def test_pictures_that_are_the_bases_have_not_drifted(drawn: list[Image.Image]):
    metrics = PictureMetrics([DRIFT], {})
    assert metrics.measure(drawn, PROMPTS, dict(enumerate(drawn)))["val/base_drift"] == pytest.approx(0, abs=1e-5)
    moved = metrics.measure(drawn, PROMPTS, dict(enumerate([*drawn[1:], drawn[0]])))["val/base_drift"]
    assert moved > 0.3


def test_a_metric_counts_the_prompts_that_it_is_told_to(drawn: list[Image.Image]):
    """Of four pictures the owl's is near its references, and the last is another than the base's."""
    pictures, prompts = [*drawn, owls("owl")[0]], [*PROMPTS, "a owl on a blue background"]
    subject = SUBJECT.model_copy(update={"prompts": "owl", "label": "owl"})
    others = DRIFT.model_copy(update={"without": "owl", "label": "others"})
    tigers = DRIFT.model_copy(update={"prompts": "background", "without": "a ", "label": "none"})
    assert prompts_of_base([subject, others], prompts) == [0, 1, 2]
    assert prompts_of_base([subject, tigers], prompts) == []
    assert prompts_of_base([DRIFT, others], prompts) == [0, 1, 2, 3]
    base = dict(enumerate([*drawn, drawn[0]]))
    references = {subject.key: owls("owl")[:1], SUBJECT.key: owls("owl")[:1]}
    found = PictureMetrics([subject, others, SUBJECT, DRIFT], references).measure(pictures, prompts, base)
    assert found["val/owl"] == pytest.approx(1, abs=1e-5)
    assert found["val/others"] == pytest.approx(0, abs=1e-5)
    assert found["val/subject_similarity"] < 0.6
    assert found["val/base_drift"] > 0.1


def test_small_pictures_are_embedded_as_the_embedded_clip_learnt_them(clip: Clip, drawn: list[Image.Image]):
    model = CLIPModel.from_pretrained(PACKAGE / "emoji_clip").float().eval()
    with torch.no_grad():
        theirs = embed_pictures(model, drawn), embed_captions(model, clip._tokenizer, PROMPTS)
    torch.testing.assert_close(clip.embed_pictures(drawn).float(), theirs[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_texts(PROMPTS).float(), theirs[1], atol=1e-5, rtol=0)


def test_large_pictures_are_embedded_as_transformers_does_it(clip: Clip):
    pictures = [picture.resize((320, 256)) for picture in noise((10, 8), 2)]
    model = CLIPModel.from_pretrained(PACKAGE / "emoji_clip").float().eval()
    pixels = CLIPImageProcessor.from_pretrained(PACKAGE / "emoji_clip")(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(clip.embed_pictures(pictures).float(), expected, atol=1e-4, rtol=0)


def test_pictures_of_any_shape_have_embeddings(clip: Clip):
    sizes = [(64, 96), (96, 64), (300, 500), (40, 400)]
    assert clip.embed_pictures([noise(size, 1)[0] for size in sizes]).shape == (4, 128)


def test_an_embedding_does_not_depend_on_its_batch(
    clip: Clip, drawn: list[Image.Image], monkeypatch: pytest.MonkeyPatch
):
    together = clip.embed_pictures(drawn), clip.embed_texts(PROMPTS)
    monkeypatch.setattr(embedders, "BATCH_SIZE", 2)
    apart = clip.embed_pictures(drawn), clip.embed_texts(PROMPTS)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Callable[[int], Path]:
    """A CLIP whose tokenizer has a word with a higher number than the end of a text, which its configuration may know."""

    def save(eos_token_id: int) -> Path:
        folder = save_tokenizer(tmp_path / f"clip-{eos_token_id}")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["wug"])
        tokenizer.save_pretrained(folder)
        shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = shared | {"vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": eos_token_id}
        vision = shared | {"image_size": 32, "patch_size": 16}
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        return folder

    return save


def test_a_text_is_read_to_its_end_whatever_the_configuration_says(tiny_clip: Callable[[int], Path]):
    texts = ["a wug", "a wug and more"]
    right, wrong = (Clip(str(tiny_clip(number)), "cpu", "model").embed_texts(texts) for number in (513, 2))
    assert torch.cosine_similarity(*right, dim=0) < 0.999
    torch.testing.assert_close(right, wrong)


@pytest.fixture
def tiny_dino(tmp_path: Path) -> Path:
    folder = tmp_path / "dino"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_dino_compares_class_tokens(tiny_dino: Path):
    pictures = [picture.resize((48, 40)) for picture in noise((4, 4), 3)]
    metric = DinoSimilarity(model=str(tiny_dino), references=["x"])
    pixels = BitImageProcessor.from_pretrained(tiny_dino)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(tiny_dino).eval()(pixels).last_hidden_state[:, 0]
    expected = torch.cosine_similarity(tokens[:2, None], tokens[None, 2:], dim=-1).mean()
    found = PictureMetrics([metric], {metric.key: pictures[2:]}).measure(pictures[:2], ["a", "b"])
    assert found == {"val/dino_similarity": pytest.approx(float(expected), abs=1e-4)}
    assert float(expected) < 0.999


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AlexNet and VGG16 with random weights, as torchvision names these, with a part of the classifier."""
    found = {}
    for build in NETS.values():
        torch.manual_seed(0)
        net = build()
        state = {f"features.{name}": value for name, value in torch.nn.Sequential(*net.layers).state_dict().items()}
        found[net.name] = tmp_path_factory.mktemp("backbones") / f"{net.name}.safetensors"
        save_file(state | {"classifier.1.bias": torch.zeros(8)}, found[net.name])
    return found


@pytest.mark.parametrize(("net", "expected"), [("alexnet", (0.217769, 0.091482)), ("vgg16", (0.185274, 0.137281))])
def test_lpips_is_that_of_the_package_lpips(backbones: dict[str, Path], net: str, expected: tuple[float, float]):
    """The numbers are those of lpips 0.1.4 with the same random weights in its backbone."""
    pictures = noise((64, 48), 2)
    others = [pictures[0].resize((6, 8)).resize((48, 64)), noise((64, 48), 1, seed=1)[0]]
    distance = PerceptualDistance(str(backbones[net]), "cpu", "weights")
    assert distance.distances(pictures, others).tolist() == pytest.approx(expected, abs=2e-5)
    metric = Lpips(weights=str(backbones[net]))
    found = PictureMetrics([metric], {}).measure(pictures, ["a", "b"], dict(enumerate(others)))
    assert found == {"val/lpips": pytest.approx(np.mean(expected), abs=2e-5)}
    same = PictureMetrics([metric], {}).measure(pictures, ["a", "b"], dict(enumerate(pictures)))
    assert same == {"val/lpips": pytest.approx(0, abs=1e-6)}


def test_lpips_reads_weights_as_torchvision_saves_them(backbones: dict[str, Path], tmp_path: Path):
    pictures, others = noise((64, 64), 1), noise((64, 64), 1, seed=1)
    torch.save(load_file(backbones["alexnet"]), tmp_path / "alexnet.pth")
    one, other = (
        PerceptualDistance(str(path), "cpu", "w").distances(pictures, others)
        for path in (tmp_path / "alexnet.pth", backbones["alexnet"])
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "lpips: there is no file .*weights.pth; give torchvision's weights of AlexNet or VGG16"),
        ({"features.0.weight": torch.zeros(64, 3, 7, 7)}, "neither AlexNet nor VGG16"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, "is no whole alexnet: .*3.weight"),
        (torch.zeros(3), "neither AlexNet nor VGG16"),
        (Path("a pickled object"), "no state dict of tensors alone"),
        (b"cut off", "no state dict of tensors alone"),
    ],
)
def test_weights_of_no_backbone_are_refused(tmp_path: Path, content: object, words: str):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ConfigError, match=f"trainer.validation.metrics: {words}" if content is None else words):
        check_model(Lpips(weights=str(file)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("embedded/emoji/text_encoder", "holds a 'clip_text_model' model; it must be a whole CLIP"),
        ("embedded/emoji_video/image_encoder", "holds a 'clip_vision_model' model; it must be a whole CLIP"),
        ("embedded/emojis", "there is no folder embedded/emojis"),
        ("{folder}/absent", "there is no folder .*/absent"),
        ("{folder}/empty", "no .safetensors weights in .*empty .found: nothing."),
        ("{folder}/pickled", "no .safetensors weights in .*pickled .found: config.json, pytorch_model.bin.; pickled"),
        ("{folder}/damaged", "cannot read the model in .*damaged"),
        ("{folder}/no_tokenizer", "no_tokenizer has no tokenizer"),
        ("{folder}/no_words", "cannot read the tokenizer in .*no_words"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path: Path, model: str, words: str):
    files = {"config.json": (PACKAGE / "emoji_clip" / "config.json").read_bytes(), "model.safetensors": b""}
    preprocessing = {"preprocessor_config.json": (PACKAGE / "emoji_clip" / "preprocessor_config.json").read_bytes()}
    folders = {
        "empty": {},
        "pickled": {"config.json": files["config.json"], "pytorch_model.bin": b""},
        "damaged": files | {"config.json": b"{"},
        "no_tokenizer": files | preprocessing,
        "no_words": files | preprocessing | {"tokenizer.json": b"{"},
    }
    for folder, contents in folders.items():
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^trainer.validation.metrics: drift: .*{words}"):
        check_model(BaseDrift(model=model.format(folder=tmp_path), label="drift"))


def test_weights_that_are_missing_are_told(tiny_clip: Callable[[int], Path]):
    folder = tiny_clip(513)
    save_file({"logit_scale": torch.zeros(())}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="base_drift: the model in .* lacks .* of its weights, such as text_model"):
        PictureMetrics([BaseDrift(model=str(folder))], {})


def test_a_clip_is_no_dino(tiny_dino: Path):
    check_model(DinoSimilarity(model=str(tiny_dino), references=["x"]))
    with pytest.raises(ConfigError, match="dino_similarity: embedded/emoji_clip holds a 'clip' model"):
        Dino(EMOJI, "cpu", "dino_similarity")


def test_a_model_that_the_hub_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object) -> Path:
        raise OSError("no route")

    monkeypatch.setattr(embedders, "snapshot", unreachable)
    with pytest.raises(ConfigError, match="cannot fetch 'openai/clip' from the Hugging Face hub .no route."):
        check_model(BaseDrift(model="openai/clip"))


def test_a_model_of_the_hub_needs_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_bytes((PACKAGE / "emoji_clip" / "config.json").read_bytes())
    monkeypatch.setattr(embedders, "snapshot", lambda *_: tmp_path)
    with pytest.raises(ConfigError, match="base_drift: no .safetensors weights in .* .found: config.json."):
        check_model(BaseDrift(model="openai/clip"))


def test_models_are_loaded_once(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    load = embedders._load
    monkeypatch.setattr(embedders, "_load", lambda *args: loaded.append(args[1]) or load(*args))
    PictureMetrics([SUBJECT, PromptSimilarity(model=EMOJI), DRIFT], {SUBJECT.key: owls("owl")})
    assert loaded == [EMOJI]
