"""`docs/configuration.md`, written from the schemas and presets: `python -m ray_sd.config.documentation`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ray_sd.config.base import Schema
from ray_sd.config.compose import PRESETS, preset_groups
from ray_sd.config.experiment import ExperimentConfig, GenerateConfig
from ray_sd.config.export import EXPORTS
from ray_sd.config.identity import marks
from ray_sd.config.load import ROOTS
from ray_sd.config.model import ModelConfig
from ray_sd.config.serve import ApiKey, ServeConfig, ServedModel
from ray_sd.config.settings import describe, element, options, schemas, variants
from ray_sd.config.sweep import SweepConfig
from ray_sd.config.text_to_video import TextToVideoConfig

TARGET = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from the schemas and presets. Change those, not this file. -->

A command is configured by presets, and by settings that win over them:

    python jobs/train.py experiment=lora dataset.source.path=photos trainer.learning_rate=5e-5 method.rank=8
    python jobs/train.py experiment=demo model/scheduler=euler 'tracker=[tensorboard,wandb]' --print-config
    python jobs/train.py --config-dir my_presets experiment=mine

- `group=preset` takes a file from a group of [presets](#presets); `group=null` takes none, where
  none is needed. An experiment is a preset that chooses presets of the other groups, which the command line may choose again.
- `path=value` sets one value. Text is taken as it stands, so prompts need no quotes beyond the shell's: `<cat>`,
  `a cat, a dog` and `(blue:1.2)` are what they look like. `null` empties a setting that may be null.
- Lists and mappings are written in YAML: `'trainer.validation.prompts=[a cat, "a dog, asleep"]'`. A list of one needs no
  brackets: `trainer.validation.prompts=a cat, asleep`.
- Where a setting has kinds, `name` chooses among them: `trainer.schedule.name=cosine trainer.schedule.num_cycles=3`. A bare
  `trainer.schedule=cosine` takes that kind with its defaults, and drops what a preset had set.
- `--config-dir DIR` adds presets of your own, laid out as in `ray_sd/presets` (`DIR/model/mine.yaml`); of two with one name
  yours is taken. `--print-config` prints the whole configuration and stops, `--help` lists groups and presets.
- In a preset, but not on the command line, `${path}` stands for another setting, and `\\${` for itself.
- What cannot be right stops the command with exit code 2 and one line a problem, before anything is encoded, drawn or trained.
"""


def document() -> str:
    """The page: how to write settings, the presets of each group, then every setting with its default."""
    blocks = [_INTRODUCTION, _presets()]
    blocks.append(f"## Settings of `jobs/train.py` and `jobs/encode.py`\n\n{_root(ExperimentConfig)}")
    blocks.append(_going_on())
    sweep = _section("sweep", SweepConfig.model_fields["sweep"])
    blocks.append(f"## Settings of `jobs/sweep.py`\n\nThose of `jobs/train.py`, and:\n\n{sweep}")
    blocks.append(f"## Settings of `jobs/generate.py`\n\n{_root(GenerateConfig, elsewhere={'model'})}")
    blocks.append(f"## Settings of `jobs/text_to_video.py`\n\n{_root(TextToVideoConfig)}")
    named = [("models.NAME", ServedModel), ("keys.NAME", ApiKey)]
    each = "\n".join(_section(path, FieldInfo(annotation=schema)) for path, schema in named)
    blocks.append(f"## Settings of `jobs/serve.py`\n\n{_root(ServeConfig)}\n{each}")
    for verb, schema in EXPORTS.items():
        blocks.append(f"## Settings of `jobs/export.py {verb}`\n\n{_root(schema, elsewhere={'model'})}")
    return "\n".join(blocks)


def preset_description(file: Path) -> str:
    """The comment that a preset begins with, without Hydra's package line."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _presets() -> str:
    lines = ["## Presets", ""]
    groups = {
        group: names for root in ROOTS.values() for group, names in preset_groups(root).items() if "." not in group
    }
    for group in sorted(groups, key=lambda group: (group != "experiment", group)):
        lines += [f"### `{group}`", "", "| Preset | What it is |", "| --- | --- |"]
        lines += [
            f"| `{name}` | {_cell(preset_description(PRESETS / group / f'{name}.yaml'))} |" for name in groups[group]
        ]
        lines.append("")
    return "\n".join(lines)


def _root(schema: type[Schema], elsewhere: frozenset[str] | set[str] = frozenset()) -> str:
    """The root's own settings in one table, then a section for each group below it."""
    own, sections = [], []
    for name, field in schema.model_fields.items():
        if name in elsewhere:
            own.append(f"| `{name}` | group | **required** | As in [the settings above](#{name}). |")
        elif schemas(field.annotation):
            sections.append(_section(name, field))
        else:
            own.append(_row(name, field))
    return "\n".join([_table(own), *sections])


def _going_on() -> str:
    """What cannot change where a run is resumed, and what of that can."""
    stay, free = (
        ", ".join(f"`{path}`" for path, stays in marks(ExperimentConfig).items() if stays == wanted)
        for wanted in (True, False)
    )
    return (
        "## Going on with a run\n\n"
        f"`resume=true` refuses another value of {stay}.\n\nOf these may change: {free}. So may everything else; what has "
        "changed is told.\n"
    )


def _section(path: str, field: FieldInfo) -> str:
    """Settings of one group: a table, and one more for each kind of what has kinds."""
    kinds = variants(field.annotation)
    if kinds:
        return f"### `{path}`\n\n" + "\n".join(_kind(path, name, kind) for name, kind in kinds.items())
    schema = schemas(field.annotation)[0]
    entries = list(_flat(path, schema))
    rows = [entry for entry in entries if entry.startswith("|")]
    later = [entry for entry in entries if not entry.startswith("|")]
    return f"### `{path}`\n\n{_text(schema.__doc__)}\n\n" + "\n".join([_table(rows), *later])


def _kind(path: str, name: str, schema: type[Schema]) -> str:
    rows = [entry for entry in _flat(path, schema) if not entry.startswith(f"| `{path}.name`")]
    return f"#### `{path}.name={name}`\n\n{_text(schema.__doc__)}\n\n" + (f"{_table(rows)}" if rows else "")


def _flat(path: str, schema: type[Schema]) -> Iterator[str]:
    """Rows of a schema and of the schemas within it; a whole sub-section for each kind of what has kinds."""
    seen: dict[type[Schema], str] = {}
    for name, field in schema.model_fields.items():
        here = f"{path}.{name}"
        kinds = variants(field.annotation)
        nested = schemas(field.annotation)
        if kinds:
            default = None if field.is_required() else field.get_default()
            shown = "**required**" if field.is_required() else f"`{'null' if default is None else default.name}`"
            yield f"| `{here}` | {' · '.join(f'`{kind}`' for kind in kinds)} | {shown} | {_text(field.description)} |"
            for kind, kind_schema in kinds.items():
                yield _kind(here, kind, kind_schema)
        elif of_list := variants(element(field.annotation)):
            yield _row(here, field)
            for kind, kind_schema in of_list.items():
                yield _kind(f"{here}[]", kind, kind_schema)
        elif nested == [ModelConfig]:
            yield f"| `{here}` | group | **required** | As in [the settings above](#model). |"
        elif nested:
            if nested[0] in seen:
                yield f"| `{here}` | as `{seen[nested[0]]}` | {_default(field)} | {_text(field.description)} |"
                continue
            seen[nested[0]] = here
            yield _row(here, field)
            yield from _flat(here, nested[0])
        else:
            yield _row(here, field)


def _row(path: str, field: FieldInfo) -> str:
    return f"| `{path}` | {_type(field)} | {_default(field)} | {_text(field.description)} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| Setting | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _type(field: FieldInfo) -> str:
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{words} {getattr(limit, bound)}"
        for limit in field.metadata
        for bound, words in bounds.items()
        if hasattr(limit, bound)
    ]
    found = schemas(field.annotation)
    if found:
        words = f"text (`{found[0].shorthand}`) or settings below" if found[0].shorthand else "settings below"
        return f"{words} or null" if type(None) in options(field.annotation) else words
    choices = [f"`{choice}`" for option in options(field.annotation) for choice in _choices(option)]
    words = " · ".join(choices) if choices else describe(field.annotation)
    if choices and type(None) in options(field.annotation):
        words += " · null"
    return ", ".join([words, *limits])


def _choices(option: Any) -> tuple[Any, ...]:
    return get_args(option) if get_origin(option) is Literal else ()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Schema):
        return ""
    words = {None: "null", True: "true", False: "false", "": "empty", (): "empty"}
    if isinstance(default, (bool, type(None), str, tuple)) and default in words:
        return words[default]
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`"


def _text(words: str | None) -> str:
    return _cell(" ".join((words or "").split()))


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(document())
