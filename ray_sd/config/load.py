"""From a command line to a validated configuration: `experiment=lora model=sd15 trainer.learning_rate=1e-4`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from ray_sd.config.base import Origin, Schema
from ray_sd.config.compose import compose_presets, preset_groups
from ray_sd.config.dump import dump
from ray_sd.config.experiment import ExperimentConfig, GenerateConfig
from ray_sd.config.export import EXPORTS
from ray_sd.config.logs import own_level
from ray_sd.config.overrides import apply_overrides
from ray_sd.config.serve import ServeConfig, ServedPreset
from ray_sd.config.sweep import SweepConfig
from ray_sd.config.text_to_video import TextToVideoConfig
from ray_sd.config.words import no_such, problems
from ray_sd.errors import ConfigError, RaySdError, RequestError

ROOTS: dict[type[Schema], str] = {
    ExperimentConfig: "train",
    SweepConfig: "sweep",
    GenerateConfig: "generate",
    TextToVideoConfig: "text_to_video",
    ServeConfig: "serve",
    ServedPreset: "served_model",
    **dict.fromkeys(EXPORTS.values(), "export"),
}
"""The file in `presets/` that each root schema is composed from."""

Root = TypeVar("Root", bound=Schema)


# mypy knows no default for a type variable's parameter.
def load_config(
    arguments: Sequence[str],
    schema: type[Root] = ExperimentConfig,  # type: ignore[assignment]  # see above
    plan: Callable[[Root], str] | None = None,
) -> Root:
    """The configuration that a command line asks for.

    `group=preset` chooses a preset (a group is a folder of presets, such as `model` or `model/vae`); any other
    `path=value` sets one value, over what presets say. `--print-config` and `--help` print and exit with 0;
    what `plan` says of the configuration is printed below it, as comments, and what it raises is raised.
    Its relative paths lead on from the folder that is the working one now. Raises ConfigError with one line a problem.
    """
    folders = _config_folders(arguments)
    groups = preset_groups(ROOTS[schema], folders)
    options = _parser(schema, groups).parse_intermixed_args(list(arguments))
    choices, overrides = _split(options.settings, groups)
    data = compose_presets(ROOTS[schema], choices, folders)
    apply_overrides(data, overrides, schema)
    config = validate(data, schema, groups)
    config._origin = Origin(os.getcwd())
    if options.print_config:
        lines = [] if plan is None else plan(config).splitlines()
        print(to_yaml(config) + "".join(f"# {line}\n" for line in lines), end="")
        raise SystemExit(0)
    return config


def load_settings(arguments: Sequence[str], schema: type[Root]) -> Root:
    """Settings `key=value` of a schema that has no presets. Raises ConfigError with one line a problem."""
    if bad := [argument for argument in arguments if "=" not in argument]:
        raise ConfigError(f"{bad[0]}: settings are written key=value; they are: {', '.join(schema.model_fields)}")
    data: dict[str, Any] = {}
    apply_overrides(data, dict(argument.split("=", 1) for argument in arguments), schema)
    return validate(data, schema)


def validate(data: dict[str, Any], schema: type[Root], groups: dict[str, list[str]] | None = None) -> Root:
    """`data` as a schema instance. Raises ConfigError with one line a problem."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(problems(error, schema, groups or {}))) from None


def to_dict(config: Schema) -> dict[str, Any]:
    """The resolved configuration in plain lists, mappings and scalars; `validate` reads it back."""
    return config.model_dump(mode="json")


def to_yaml(config: Schema) -> str:
    return dump(to_dict(config))


def run_job(main: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None) -> int:
    """Run a job and return its exit code: 0, 2 for wrong input, 1 for other errors in words, 130 when interrupted.

    Errors in words are printed as `error: …`, a line a problem; any other exception is a defect and keeps its traceback.
    What ends services and containers (SIGTERM) interrupts as Ctrl-C does.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        logging.getLogger("ray_sd").setLevel(own_level())
        main(sys.argv[1:] if arguments is None else arguments)
    except RaySdError as error:
        for line in _message(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | RequestError) else 1
    except KeyboardInterrupt as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # of a command in a shell's background, which knows no Ctrl-C
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _message(error: BaseException) -> str:
    """The words of an error; one that crossed Ray is wrapped in an exception whose text is a traceback."""
    cause = getattr(error, "cause", None)
    return _message(cause) if isinstance(cause, RaySdError) else str(error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows how it is used")


def _config_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders of `--config-dir`, which have to be known before the presets can be listed."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", action="append", default=[])
    folders = [Path(folder) for folder in parser.parse_known_args(list(arguments))[0].config_dir]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir: no folder '{folder}'")
    return folders


def _parser(schema: type[Schema], groups: dict[str, list[str]]) -> argparse.ArgumentParser:
    width = max(len(group) for group in groups)
    lines = "\n".join(f"  {group:<{width}}  {', '.join(presets)}" for group, presets in groups.items())
    settings = "\n".join(
        f"  {name:<{width}}  {' '.join((field.description or '').split())}"
        for name, field in schema.model_fields.items()
    )
    parser = _Parser(
        usage="%(prog)s [--config-dir DIR] [--print-config] [group=preset …] [setting=value …]",
        description=schema.__doc__,
        epilog=f"groups and their presets:\n{lines}\n\nsettings (all of them: docs/configuration.md):\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config-dir", action="append", metavar="DIR", help="folder of presets of your own; may be repeated"
    )
    parser.add_argument("--print-config", action="store_true", help="print what would run, and stop")
    return parser


def _split(settings: Sequence[str], groups: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """Group choices and value overrides, each key -> text."""
    choices, overrides = {}, {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"{setting}: settings are written key=value")
        if key in groups:
            choices[key] = text
        elif "/" in key:
            raise ConfigError(f"{key}: {no_such('group', key, groups)}")
        else:
            overrides[key] = text
    return choices, overrides
