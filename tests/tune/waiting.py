"""What drills of sweeps wait for."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def trials(folder: Path) -> list[dict]:
    """What is recorded of a sweep's trials."""
    return json.loads((folder / "sweep.json").read_text())["trials"]


def wait_for(condition: Callable[[], T], seconds: float = 400) -> T:
    """What comes of it once it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found
