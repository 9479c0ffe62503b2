"""What a sweep has recorded."""

import json
from pathlib import Path


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["trials"]
