"""Where an export writes: never over what exists, and whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_sd.errors import ConfigError
from ray_sd.files import expand


@contextmanager
def new_output(path: str) -> Iterator[Path]:
    """A path to write a file or folder to, with what belongs beside it; all takes its place when nothing went wrong.

    Raises ConfigError for what exists, other than an empty folder, and where nothing can be written.
    """
    target = expand(path, "output")
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be written: {error}") from error
    try:
        yield scratch / target.name
        made = sorted(scratch.iterdir())
        for child in made:
            _check_free(target.parent / child.name)
        for child in made:
            os.replace(child, target.parent / child.name)
    finally:
        shutil.rmtree(scratch)


def _check_free(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"output: {target} exists; give another name, or move it away")
