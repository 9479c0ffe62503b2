"""What may be measured on validation pictures."""

from pathlib import Path
from typing import get_args

import pytest

from ray_sd.config.documentation import document
from ray_sd.config.load import load_config, to_dict, validate
from ray_sd.config.metrics import BaseDrift, PictureMetric, PromptSimilarity, SubjectSimilarity
from ray_sd.config.paths import absolute_paths
from ray_sd.config.settings import element, variants
from ray_sd.config.trainer import ValidationConfig
from ray_sd.errors import ConfigError

METRICS = "trainer.validation.metrics"
SUBJECT = "{name: subject_similarity, model: embedded/emoji_clip, references: embedded/pictures/owl}"


def test_metrics_are_written_as_a_list_of_kinds():
    config = load_config(
        [
            "experiment=demo",
            f"{METRICS}=[{SUBJECT}, {{name: prompt_similarity, model: m, replace: {{<owl>: owl}}, label: words}}]",
        ]
    )
    subject, prompt = config.trainer.validation.metrics
    assert isinstance(subject, SubjectSimilarity)
    assert (subject.key, subject.references) == ("val/subject_similarity", ("embedded/pictures/owl",))
    assert isinstance(prompt, PromptSimilarity)
    assert prompt.key == "val/words"
    assert prompt.wording("a <owl> on an <owls>") == "a owl on an <owls>"
    assert validate(to_dict(config), type(config)) == config


@pytest.mark.parametrize(
    ("prompts", "without", "counted"),
    [
        (None, None, ["a <owl>", "an owl", "a cat"]),
        ("<owl>", None, ["a <owl>"]),
        ("owl", None, ["a <owl>", "an owl"]),
        (None, "owl", ["a cat"]),
        ("owl", "<owl>", ["an owl"]),
    ],
)
def test_a_metric_counts_prompts_by_what_they_hold(prompts: str | None, without: str | None, counted: list[str]):
    metric = BaseDrift(model="m", prompts=prompts, without=without)
    assert [prompt for prompt in ("a <owl>", "an owl", "a cat") if metric.counts(prompt)] == counted


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            [f"{METRICS}=[{{name: subject_similarty, model: m}}]"],
            f"{METRICS}[0].name: no metric 'subject_similarty'; did you mean 'subject_similarity'? the metrics are: base_drift, ",
        ),
        ([f"{METRICS}=base_drift"], f"{METRICS}[0].model: required: A CLIP: "),
        ([f"{METRICS}=[{{model: m}}]"], f"{METRICS}[0].name: required; the metrics are: base_drift, dino_similarity, "),
        (
            [f"{METRICS}=[{{name: base_drift, model: m, reference: x}}]"],
            f"{METRICS}[0].reference: no such setting; the settings here are: name, label, prompts, without, model",
        ),
        (
            [f"{METRICS}=[{SUBJECT}, {SUBJECT}]"],
            "trainer.validation: metrics: 2 are reported as val/subject_similarity; give each a label of its own, such as label: "
            "subject_similarity_2",
        ),
        (
            [f"{METRICS}=[{{name: lpips, weights: w, label: base_drift}}, {{name: base_drift, model: m}}]"],
            "trainer.validation: metrics: 2 are reported as val/base_drift; ",
        ),
        ([f"{METRICS}=[{{name: base_drift, model: m, label: a b}}]"], f"{METRICS}[0].label: 'a b' does not match "),
        (
            [f"{METRICS}=[{SUBJECT}]", "trainer.validation.prompts=[]"],
            f"{METRICS} measure the pictures of trainer.validation.prompts, and there are none; give some, as in ",
        ),
        (
            [f"{METRICS}=[{{name: base_drift, model: m, label: d, prompts: dog, without: cat}}]"],
            f"{METRICS}: d is measured on prompts that hold 'dog' and do not hold 'cat', and none of trainer.validation.prompts ",
        ),
        (
            [f"{METRICS}=[{{name: lpips, weights: w}}]", "dataset.resolution=24"],
            f"{METRICS}: lpips needs pictures of at least 32 pixels a side, and dataset.resolution is 24 x 24",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_at_composition(settings: list[str], line: str):
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=demo", *settings])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["model=svd", "method=temporal", "dataset=video_folder"], "clips"),
        (["model=x4_upscaler", "method=full", "dataset=image_folder"], "enlargements of pictures"),
    ],
)
def test_only_pictures_of_prompts_are_measured(settings: list[str], what: str):
    images = "trainer.validation.images=[embedded/pictures/owl/owl-1.png]"
    settings = [*settings, "name=x", "dataset.source.path=x", images]
    load_config(settings)
    with pytest.raises(
        ConfigError, match=f"^{METRICS} measure pictures that are drawn from prompts alone, .* draws {what}"
    ):
        load_config([*settings, f"{METRICS}=[{SUBJECT}]"])


def test_two_metrics_of_one_kind_have_labels():
    both = [BaseDrift(model="m", label="dogs", prompts="dog"), BaseDrift(model="m", label="cats", prompts="cat")]
    assert [metric.key for metric in ValidationConfig(metrics=both).metrics] == ["val/dogs", "val/cats"]


def test_models_references_and_weights_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("clip", "photos", "alexnet.pth"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    given = (
        "[{name: subject_similarity, model: clip, references: [photos, embedded/pictures/owl, s3://b/c.png]}, "
        "{name: prompt_similarity, model: openai/clip}, {name: lpips, weights: alexnet.pth}]"
    )
    config = load_config(["experiment=demo", f"{METRICS}={given}"])
    subject, prompt, lpips = absolute_paths(config).trainer.validation.metrics
    assert subject.model == f"{tmp_path}/clip"
    assert subject.references == (f"{tmp_path}/photos", "embedded/pictures/owl", "s3://b/c.png")
    assert prompt.model == "openai/clip"
    assert lpips.weights == f"{tmp_path}/alexnet.pth"
    assert config.trainer.validation.metrics[0].model == "clip"


def test_every_setting_of_every_metric_is_on_the_page():
    page = document()
    kinds = variants(element(ValidationConfig.model_fields["metrics"].annotation))
    assert set(kinds.values()) == set(get_args(get_args(PictureMetric)[0]))
    for name, kind in kinds.items():
        section = page.partition(f"#### `{METRICS}[].name={name}`")[2].partition("\n#")[0]
        assert section, name
        for field in kind.model_fields:
            assert field == "name" or f"| `{METRICS}[].{field}` | " in section, (name, field)
