from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import difference, export_adapter, tiny_config, tiny_xl_config

from ray_sd.errors import RequestError
from ray_sd.generate import ImageRequest, generate
from ray_sd.generate.adapters import Adapters
from ray_sd.generate.text import encode_prompts
from ray_sd.methods import load_adapter
from ray_sd.methods.contents import read_contents
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.prompt_weights import encode_weighted_text
from ray_sd.models.tokens import splice

TEXT = ("text_encoder", "tokenizer")


@pytest.fixture(params=["tiny", "tiny_xl"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    configure = {"tiny": tiny_config, "tiny_xl": tiny_xl_config}[request.param]
    return load_model(configure(request.getfixturevalue(request.param), prompt_chunks=2), TEXT)


def encode(model: DiffusionModel, *prompts: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.encode_text(model.tokenize(prompts))


def weigh(model: DiffusionModel, *prompts: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return encode_weighted_text(model, prompts)


def test_a_prompt_without_weights_is_encoded_as_always(model: DiffusionModel):
    prompts = ("a b", "", "a (b c", "a " * 20)
    for name, tensor in weigh(model, *prompts).items():
        assert torch.equal(tensor, encode(model, *prompts)[name])


def test_a_weight_moves_its_word_away_from_the_empty_prompt(model: DiffusionModel):
    # Token places: start, a, b, c, end; the empty prompt's are not zeros here, whatever the family does with it.
    if hasattr(model, "zero_empty_prompt"):
        model.zero_empty_prompt = False
    plain, empty = (encode(model, prompt)["text_embeds"][0] for prompt in ("a b c", ""))
    found = weigh(model, "a (b)1.5 c")["text_embeds"][0]
    expected = plain.clone()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_weight_below_one_mixes_with_the_prompt_without_the_word(model: DiffusionModel):
    plain, found = encode(model, "a b c")["text_embeds"], weigh(model, "a (b)0.5 c")["text_embeds"]
    assert (plain - found)[0, 3].abs().max() > 1e-4
    torch.testing.assert_close(weigh(model, "a (b)1.0 c")["text_embeds"], plain, rtol=0, atol=1e-5)


def test_the_pooled_embedding_is_that_of_the_words(tiny_xl: Path):
    model = load_model(tiny_xl_config(tiny_xl), TEXT)
    pooled = "pooled_text_embeds"
    assert torch.equal(weigh(model, "a (b)1.5 c")[pooled], encode(model, "a b c")[pooled])


def test_a_weighted_prompt_may_fill_several_chunks(model: DiffusionModel):
    found = weigh(model, "a " * 16 + "(b)1.3", "(a)1.2", "a " * 40 + "(b)1.3")["text_embeds"]
    assert found.shape[1] == 32
    plain = encode(model, "a " * 16 + "b", "a")["text_embeds"]
    torch.testing.assert_close(found[0, :16], plain[0, :16], rtol=0, atol=1e-5)
    assert (found[0, 19] - plain[0, 19]).abs().max() > 1e-3


def test_a_weighted_placeholder_has_all_of_its_vectors(model: DiffusionModel):
    for encoder, tokenizer in model.text_encoders().values():
        splice(encoder, len(tokenizer), torch.randn(3, encoder.config.hidden_size))
    model.add_placeholder("<cat>", 3)
    plain, found = encode(model, "a <cat> b")["text_embeds"], weigh(model, "a (<cat>)1.5 b")["text_embeds"]
    changed = ((plain - found).abs().amax(dim=-1)[0] > 1e-5).nonzero().flatten().tolist()
    assert changed == [2, 3, 4]


def test_each_parenthesis_within_others_takes_no_multiple_of_the_time(model: DiffusionModel):
    nested = weigh(model, "(" * 12 + "a" + ")1.1" * 12 + " b", "(" * 12 + "a b")
    plain, open_ones = weigh(model, f"(a){1.1**12} b"), encode(model, "(" * 12 + "a b")
    for name, tensor in nested.items():
        torch.testing.assert_close(tensor, torch.cat([plain[name], open_ones[name]]))


@pytest.mark.parametrize("prompt", ['("a","b").blend(1, 1)', '("a","b").and()', "a cat.swap(dog)"])
def test_more_than_weights_is_refused(model: DiffusionModel, prompt: str):
    with pytest.raises(RequestError, match=r"asks for more than weights; understood are \(red\)1.5"):
        weigh(model, prompt)


def test_pictures_follow_weights_only_where_asked(tiny: Path):
    whole = load_model(tiny_config(tiny))
    settings = {"num_inference_steps": 3, "seed": 1}
    plain, words, weighted, unweighted = generate(
        whole,
        [
            ImageRequest("a b", **settings),
            ImageRequest("a (b)1.9", **settings),
            ImageRequest("a (b)1.9", prompt_weighting=True, **settings),
            ImageRequest("a b", prompt_weighting=True, **settings),
        ],
    )
    assert difference(plain, unweighted) <= 1
    assert difference(plain, weighted) > 1
    assert difference(words, weighted) > 1


def test_weights_are_read_by_the_adapters_of_each_request(tiny: Path, tmp_path: Path):
    export_adapter(tiny, tmp_path / "reads", {"name": "lora", "rank": 2, "text_encoder": True})
    model, attached = load_model(tiny_config(tiny)), load_model(tiny_config(tiny))
    plain = ImageRequest("a (red)0.5 cat", prompt_weighting=True)
    expected = [encode_prompts(attached, [plain])[0]["text_embeds"]]
    load_adapter(attached, tmp_path / "reads")
    expected.append(encode_prompts(attached, [plain])[0]["text_embeds"])
    adapters = Adapters(model)
    adapters.add("reads", read_contents(tmp_path / "reads", model))
    requests = [plain, replace(plain, adapters=(("reads", 1.0),))]
    for found, wanted in zip(encode_prompts(model, requests, adapters), expected, strict=True):
        torch.testing.assert_close(found["text_embeds"], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*expected, rtol=1e-2, atol=1e-2)
