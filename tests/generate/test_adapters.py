"""Adapters of a batch's rows, against the same adapters attached to a model of their own."""

from pathlib import Path

import pytest
import torch
from tiny_models import export_adapter, tiny_config

from ray_sd.errors import ArtifactError, RequestError
from ray_sd.generate import Batch, ImageRequest, start
from ray_sd.generate.adapters import Adapters
from ray_sd.generate.words import FIRST_CHARACTER, LAST_CHARACTER
from ray_sd.methods import load_adapter
from ray_sd.methods.contents import read_contents
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS
from ray_sd.requests import Mix

METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "reads": {"name": "lora", "rank": 2, "text_encoder": True, "target_modules": ["to_q", "conv1", "proj_in"]},
    "word": {"name": "textual_inversion", "placeholder_token": "<cat>", "num_vectors": 2},
    "other_word": {"name": "textual_inversion", "placeholder_token": "<cat>", "num_vectors": 3},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
}
MIXES: list[Mix] = [
    (),
    (("lora", 1.0), ("word", 1.0)),
    (("reads", 0.7), ("other_word", 1.0)),
    (("reads", -0.5), ("lora", 1.2)),
]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapters")
    for name, method in METHODS.items():
        export_adapter(tiny, made / name, method)
    return made


def loaded(tiny: Path, folder: Path, *names: str) -> tuple[DiffusionModel, Adapters]:
    model = load_model(tiny_config(tiny)).requires_grad_(False)
    adapters = Adapters(model)
    for name in names:
        adapters.add(name, read_contents(folder / name, model))
    return model, adapters


def draw(
    model: DiffusionModel, requests: list[ImageRequest], adapters: Adapters | None = None, late: int = 0
) -> list[torch.Tensor]:
    """late: so many join when the others have taken a step."""
    drawings = start(model, requests, adapters)
    batch = Batch(model, adapters)
    batch.join(drawings[late:])
    if late:
        batch.advance()
        batch.join(drawings[:late])
    while len(batch):
        batch.advance()
    return [drawing.latents for drawing in drawings]


def test_sixteen_rows_with_their_own_adapters_are_what_each_is_with_them_attached(tiny: Path, folder: Path):
    samplers = list(SAMPLERS)
    requests = [
        ImageRequest(
            "a red <cat> here",
            seed=seed,
            num_inference_steps=2 + seed % 4,
            guidance_scale=1.0 if seed % 5 == 0 else 4.0,
            scheduler=samplers[seed % len(samplers)],
            adapters=MIXES[seed % len(MIXES)],
        )
        for seed in range(16)
    ]
    model, adapters = loaded(tiny, folder, "lora", "reads", "word", "other_word")
    together = draw(model, requests, adapters, late=5)
    for first, mix in enumerate(MIXES):
        attached = load_model(tiny_config(tiny))
        for name, weight in mix:
            load_adapter(attached, folder / name, weight)
        for number in range(first, len(requests), len(MIXES)):
            [expected] = draw(attached, [ImageRequest(**vars(requests[number]) | {"adapters": ()})])
            tolerance = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(together[number], expected, rtol=0, atol=tolerance)


def test_what_is_removed_leaves_no_trace_in_what_is_drawn(tiny: Path, folder: Path):
    model, adapters = loaded(tiny, folder)
    plain = ImageRequest("a red <cat> here", num_inference_steps=2)
    [before] = draw(model, [plain], adapters)
    for _ in range(3):
        for name in ("reads", "word", "other_word"):
            adapters.add(name, read_contents(folder / name, model))
        mixed = ImageRequest(**vars(plain) | {"adapters": (("reads", 1.0), ("other_word", 1.0))})
        assert not torch.allclose(draw(model, [mixed], adapters)[0], before)
        for name in ("word", "reads", "other_word"):
            adapters.remove(name)
    assert torch.equal(draw(model, [plain], adapters)[0], before)
    assert len(model.tokenizer) == 514 + 2 + 3  # words of three rounds took the same slots


def test_slots_that_words_left_hold_what_came_after(tiny: Path, folder: Path):
    model, adapters = loaded(tiny, folder, "other_word")
    adapters.remove("other_word")
    adapters.add("word", read_contents(folder / "word", model))
    request = ImageRequest("a <cat>", num_inference_steps=2, adapters=(("word", 1.0),))
    fresh, only = loaded(tiny, folder, "word")
    torch.testing.assert_close(draw(model, [request], adapters), draw(fresh, [request], only))


def test_no_prompt_reaches_the_words_of_another(tiny: Path, folder: Path):
    model, adapters = loaded(tiny, folder, "word")
    strange = f"a {chr(FIRST_CHARACTER)}red{chr(LAST_CHARACTER)} dog"
    found, expected = draw(
        model, [ImageRequest(prompt, num_inference_steps=2) for prompt in (strange, "a red dog")], adapters
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ((("nobody", 1.0),), "no adapter 'nobody' is loaded"),
        ((("word", 0.5),), "adapter 'word' is a word, which has no strength; give it the weight 1"),
        (
            (("word", 1.0), ("other_word", 1.0)),
            "the adapters word and other_word both have the word <cat>; take one of them",
        ),
    ],
)
def test_what_cannot_be_mixed_is_told(tiny: Path, folder: Path, mix: Mix, words: str):
    model, adapters = loaded(tiny, folder, "word", "other_word")
    with pytest.raises(RequestError, match=words):
        start(model, [ImageRequest("a <cat>", adapters=mix)], adapters)


def test_adapters_of_a_request_are_not_passed_over(tiny: Path):
    model = load_model(tiny_config(tiny))
    with pytest.raises(RequestError, match="no adapter 'pet' is loaded"):
        draw(model, [ImageRequest("a cat", adapters=(("pet", 1.0),))])


def test_what_does_not_stack_is_refused(tiny: Path, folder: Path):
    with pytest.raises(ArtifactError, match="adapter 'dora' is no sum of low rank"):
        loaded(tiny, folder, "dora")
