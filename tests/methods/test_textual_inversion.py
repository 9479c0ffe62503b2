"""New tokens: what moves and what does not, files that other tools read, and input that cannot be right."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import difference, draw, random_batch, tiny_config

from ray_sd.config import TrainerConfig
from ray_sd.config.method import TextualInversionMethod
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.generate import ImageRequest, generate
from ray_sd.methods import Method, build_method
from ray_sd.methods.embeddings import read_embedding
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.tokens import set_end_of_text

TRAINER = TrainerConfig(learning_rate=0.5)
PROMPT = "a <cat> on <mat>"


def settings(**values: object) -> TextualInversionMethod:
    return TextualInversionMethod.model_validate(
        {"placeholder_token": ["<cat>", "<mat>"], "initializer_token": ["a", "b"], "num_vectors": [3, 1]} | values
    )


def prepared(folder: Path, **values: object) -> tuple[Method, DiffusionModel]:
    method = build_method(settings(**values))
    model = load_model(tiny_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TRAINER)
    return method, model


def batch_of(model: DiffusionModel, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = random_batch(text="tokens", seed=seed)
    return batch | model.tokenize([PROMPT, "a <cat>", "<mat>"])


def train(method: Method, model: DiffusionModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(groups_of(method, model))
    for step in range(steps):
        optimizer.zero_grad()
        method.objective(model, batch_of(model, step)).backward()
        optimizer.step()
    model.eval()


def groups_of(method: Method, model: DiffusionModel) -> list[dict]:
    return [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, TRAINER)]


def test_only_the_new_rows_train_and_the_vocabulary_stays_bit_for_bit(tiny: Path):
    method, model = prepared(tiny)
    embedding = model.text_encoder.get_input_embeddings()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "text_encoder.embeddings.token_embedding.rows"
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(method, model)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"text_encoder.embeddings.token_embedding.rows"}
    assert embedding.rows.shape == (4, 32)
    assert (after[moved.pop()] - before["text_encoder.embeddings.token_embedding.rows"]).abs().min() > 0


def test_loss_and_update_equal_those_of_a_resized_vocabulary(tiny: Path):
    """The reference is the paper's: rows appended to the vocabulary, all other rows' gradients thrown away.

    By plain gradient descent: Adam's steps are as large where a gradient is nothing but rounding.
    """
    method, model = prepared(tiny)
    plain = load_model(tiny_config(tiny), method.components())
    plain.tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<mat>"])
    ids = plain.tokenizer(
        ["a <cat> <cat>_1 <cat>_2 on <mat>", "a <cat> <cat>_1 <cat>_2", "<mat>"],
        padding="max_length", max_length=16, return_tensors="pt",
    ).input_ids  # fmt: skip
    assert torch.equal(ids, batch_of(model)["input_ids"])
    old = plain.text_encoder.get_input_embeddings().weight.detach()
    a, b = (plain.tokenizer(letter).input_ids[1] for letter in "ab")
    table = torch.cat([old[:514], old[[a, a, a, b]]]).requires_grad_()
    plain.text_encoder.requires_grad_(False)
    plain.unet.requires_grad_(False)
    learning_rate = 100 * TRAINER.learning_rate
    [group] = groups_of(method, model)
    assert (group["lr"], group["weight_decay"]) == (TRAINER.learning_rate, 0)
    optimizers = [torch.optim.SGD([parameter], lr=learning_rate) for parameter in (table, *group["params"])]
    before = table[514:].detach().clone()
    for step in range(3):
        batch = random_batch(text="tokens", seed=step)
        hidden = table[ids] + plain.text_encoder.embeddings.position_embedding.weight
        text = _encode(plain.text_encoder, hidden)
        loss = plain.loss({**{k: v for k, v in batch.items() if k != "input_ids"}, "text_embeds": text}).mean()
        found = method.objective(model, batch_of(model, step))
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=0)
        for optimizer, objective in zip(optimizers, (loss, found), strict=True):
            optimizer.zero_grad()
            objective.backward()
        table.grad[:514] = 0
        for optimizer in optimizers:
            optimizer.step()
    moved = table[514:].detach() - before
    apart = model.text_encoder.get_input_embeddings().rows.detach() - table[514:].detach()
    assert apart.abs().max() < 1e-3 * moved.abs().max()
    assert torch.equal(table[:514].detach(), old[:514])


def _encode(encoder: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A CLIP text encoder from its embeddings on, by its layers alone."""
    length = hidden.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    for layer in encoder.encoder.layers:
        output = layer(hidden, mask)
        hidden = output[0] if isinstance(output, tuple) else output
    return encoder.final_layer_norm(hidden)


def test_an_export_draws_alike_in_plain_diffusers_and_here(tiny: Path, tmp_path: Path):
    method, trained = prepared(tiny)
    base = load_model(tiny_config(tiny))
    train(method, trained)
    method.export(trained, tmp_path)
    trained.unet, trained.vae = base.unet, base.vae
    request = ImageRequest(PROMPT, seed=1, num_inference_steps=3)
    expected = generate(trained, [request])[0]

    ours = load_model(tiny_config(tiny))
    assert method.attach(ours, tmp_path, 1.0) == 2
    assert difference(generate(ours, [request])[0], expected) <= 1

    plain: StableDiffusionPipeline = load_model(tiny_config(tiny)).pipeline()
    for file in sorted(tmp_path.glob("*.safetensors")):
        plain.load_textual_inversion(tmp_path, weight_name=file.name, local_files_only=True)
    assert difference(draw(plain, PROMPT), expected) <= 1
    assert difference(draw(plain, "a on"), expected) > 1


def test_a_single_token_is_found_by_plain_diffusers_without_a_file_name(tiny: Path, tmp_path: Path):
    method, trained = prepared(tiny, placeholder_token="<cat>", initializer_token="a", num_vectors=2)
    method.export(trained, tmp_path)
    plain = load_model(tiny_config(tiny)).pipeline()
    plain.load_textual_inversion(tmp_path, local_files_only=True)
    assert plain.maybe_convert_prompt("a <cat>", plain.tokenizer) == "a <cat> <cat>_1"


@pytest.mark.parametrize("layout", ["diffusers", "a1111", "one vector"])
def test_embeddings_of_other_tools_are_read(tmp_path: Path, layout: str):
    vectors = torch.randn(2, 32)
    content = {"diffusers": {"<cat>": vectors}, "a1111": {"emb_params": vectors}, "one vector": {"<cat>": vectors[0]}}
    save_file(content[layout], tmp_path / "<cat>.safetensors")
    token, read = read_embedding(tmp_path / "<cat>.safetensors")
    assert token == "<cat>"
    assert torch.equal(read["text_encoder"], vectors[:1] if layout == "one vector" else vectors)


def test_the_a1111_file_is_named_by_the_token(tiny: Path, tmp_path: Path):
    method, trained = prepared(tiny)
    method.export(trained, tmp_path)
    assert {path.name for path in (tmp_path / "a1111").iterdir()} == {"cat.safetensors", "mat.safetensors"}
    ours, theirs = (load_file(tmp_path / name) for name in ("learned_embeds-cat.safetensors", "a1111/cat.safetensors"))
    assert torch.equal(ours["<cat>"], theirs["emb_params"])


def test_norm_control_keeps_vectors_at_the_vocabularys_median_length(tiny: Path, tmp_path: Path):
    method, model = prepared(tiny, norm_control=True)
    median = model.text_encoder.get_input_embeddings().vocabulary.weight.norm(dim=-1).median()
    train(method, model)
    method.export(model, tmp_path)
    kept = load_file(tmp_path / "learned_embeds-cat.safetensors")["<cat>"].norm(dim=-1)
    torch.testing.assert_close(kept, median.expand(3))
    method, model = prepared(tiny)
    train(method, model)
    assert (model.text_encoder.get_input_embeddings().rows.norm(dim=-1) > 2 * median).all()


def test_without_an_initializer_rows_look_like_the_vocabulary(tiny: Path):
    _, model = prepared(tiny, initializer_token=[], num_vectors=100, placeholder_token="<cat>")
    embedding = model.text_encoder.get_input_embeddings()
    assert float(embedding.rows.detach().std() / embedding.vocabulary.weight.std()) == pytest.approx(1, abs=0.1)
    assert len({tuple(row.tolist()) for row in embedding.rows}) == 100


def test_the_pooled_embedding_is_that_of_the_end_of_text(tiny: Path):
    """Many CLIP configurations carry end-of-text id 2, and then the largest id is taken: a new token's."""
    _, model = prepared(tiny)
    model.eval()
    ids = model.tokenize(["a <cat>"])["input_ids"]
    end = int((ids[0] == model.tokenizer.eos_token_id).nonzero()[0])
    right = model.text_encoder(ids)
    assert torch.equal(right.pooler_output[0], right.last_hidden_state[0, end])
    model.text_encoder.eos_token_id = 2
    assert not torch.equal(model.text_encoder(ids).pooler_output, right.pooler_output)
    set_end_of_text(model.text_encoder, model.tokenizer)
    assert torch.equal(model.text_encoder(ids).pooler_output, right.pooler_output)


def test_templates_name_the_placeholders():
    assert all("<cat> <mat>" in prompt for prompt in settings(templates="style").prompts())
    assert settings(templates=["my {}"]).prompts() == ("my <cat> <mat>",)
    assert settings(templates="captions").prompts() == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"placeholder_token": ["a", "<mat>"]}, "'a' is already a word of the tokenizer"),
        ({"placeholder_token": ["my cat", "<mat>"]}, "'my cat' must be one word without spaces"),
        (
            {"initializer_token": ["abcd", "b"]},
            "'abcd' is 4 tokens and '<cat>' has 3 vectors; set num_vectors=4",
        ),
        ({"initializer_token": ["", "b"]}, "an empty text initializes nothing"),
    ],
)
def test_tokens_that_cannot_be_are_refused_on_a_model_without_weights(tiny: Path, values: dict, words: str):
    method = build_method(settings(**values))
    model = load_model(tiny_config(tiny), method.components(), skeleton=True)
    with pytest.raises(ConfigError, match=words):
        method.prepare(model, TRAINER)


def test_a_skeleton_takes_what_can_be(tiny: Path):
    method = build_method(settings(norm_control=True))
    method.prepare(load_model(tiny_config(tiny), method.components(), skeleton=True), TRAINER)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"placeholder_token": []}, "must name one word or several different ones"),
        ({"placeholder_token": ["<cat>", "<cat>"]}, "must name one word or several different ones"),
        ({"initializer_token": ["a", "b", "c"]}, "3 initializer_tokens for 2 placeholder_tokens"),
        ({"num_vectors": [1]}, "1 num_vectors for 2 placeholder_tokens"),
        ({"num_vectors": 0}, "must be at least 1"),
        ({"templates": ["a cat"]}, "has no {} for the placeholder"),
        ({"placeholder_token": ["<cat>", "(cat)"]}, "<cat> and \\(cat\\) differ in nothing that a file name keeps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict, words: str):
    with pytest.raises(ValidationError, match=words):
        settings(**values)


def test_an_embedding_of_another_base_or_twice_is_refused(tiny: Path, tmp_path: Path):
    method, trained = prepared(tiny)
    method.export(trained, tmp_path)
    model = load_model(tiny_config(tiny))
    method.attach(model, tmp_path, 1.0)
    with pytest.raises(ConfigError, match="'<cat>' is already a word"):
        method.attach(model, tmp_path, 1.0)
    save_file({"<other>": torch.zeros(1, 48)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ArtifactError, match="'<other>' has vectors of 48 numbers, .* takes 32"):
        method.attach(load_model(tiny_config(tiny)), tmp_path, 1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": (1, 2), "b": (1, 2)}, "holds 2 words, a, b; .* token=a"),
        ({"a.b": (1, 2), "b": (1, 2)}, "no embedding of one token: it holds a.b, b"),
        ({"a": (1, 2, 2)}, "has 3 dimensions"),
    ],
)
def test_files_that_are_no_embedding_are_refused(tmp_path: Path, content: dict, words: str):
    save_file({name: torch.zeros(shape) for name, shape in content.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=words):
        read_embedding(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="pickled weights are not read"):
        read_embedding(tmp_path / "x.pt")
