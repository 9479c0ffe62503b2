"""docs/configuration.md."""

from ray_sd.config import ExperimentConfig, GenerateConfig
from ray_sd.config.documentation import TARGET, document
from ray_sd.config.export import EXPORTS
from ray_sd.config.settings import schemas, settings_below


def test_page_is_current():
    assert TARGET.read_text() == document(), "run `make docs`"


def test_every_setting_is_on_the_page_with_its_meaning():
    page = document()
    for schema in (ExperimentConfig, GenerateConfig, *EXPORTS.values()):
        for path, field, owner in settings_below(schema):
            assert field.description, f"{owner.__name__}: no docstring under {path}"
            if path in schema.model_fields and schemas(field.annotation):
                assert f"### `{path}`" in page  # a group has a section
            elif not (path.endswith(".name") and path != "model.name"):
                assert " ".join(field.description.split()).replace("|", "\\|") in page, path


def test_page_has_no_broken_table_rows():
    for line in document().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 5), line
