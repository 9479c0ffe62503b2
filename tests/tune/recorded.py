"""What a sweep has recorded."""

import json
from pathlib import Path


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["trials"]


def reported_lines(folder: Path) -> dict[str, list[str]]:
    """Of each trial that has reported: what it logged up to then, which a start of it that goes on from there leaves as it was.

    A step that is done twice is logged with another speed.
    """
    return {
        trial["id"]: [line for line in history(folder, trial["id"]) if json.loads(line)["step"] <= reports[-1]["step"]]
        for trial in trials(folder)
        if (reports := trial["reports"])
    }


def history(folder: Path, trial: str) -> list[str]:
    return (folder / "trials" / f"{trial}-0" / "logs" / "metrics.jsonl").read_text().splitlines()
