"""What Optuna's dashboard shows of a trial beside its values: which runs it was, how they ended, and what they drew."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from ray_sd.errors import first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """A trial as it ended."""

    id: str
    status: str
    step: int = 0
    run: str = ""
    samples: str | None = None
    """Contact sheet of the pictures that its last report drew."""

    @property
    def reason(self) -> str:
        """Why it came to no end. Of what failed a study is told before it is known."""
        told = {"stopped": f"others were better at step {self.step}", "failed": "report.html says why"}
        return told.get(self.status, "")


def describe(trial: optuna.Trial, runs: Sequence[Ended], artifacts: Path | None) -> None:
    """Keep in a study what became of a trial, which is several runs where there are several seeds. It must not be told yet.

    artifacts: folder for pictures; None keeps none. Notes are for the dashboard alone, and are kept where that is installed.
    """
    attributes: dict[str, list[Any]] = {
        "trial": [run.id for run in runs],
        "steps": [run.step for run in runs],
        "status": [run.status for run in runs],
        "reason": [run.reason for run in runs],
    }
    for name, values in attributes.items():
        trial.set_user_attr(name, values[0] if len(runs) == 1 else values)
    _save_note(trial, "\n\n".join(map(_note, runs)))
    if artifacts is not None:
        for run in runs:
            _upload(trial, run, artifacts)


def _note(run: Ended) -> str:
    reason = f": {run.reason}" if run.reason else ""
    place = f"\n\n    {run.run}" if run.run else ""
    return f"**{run.id}** {run.status} after {run.step} steps{reason}{place}"


def _save_note(trial: optuna.Trial, text: str) -> None:
    try:
        from optuna_dashboard import save_note
    except ImportError:
        return
    save_note(trial, text)


def _upload(trial: optuna.Trial, run: Ended, artifacts: Path) -> None:
    """The contact sheet, which names the prompts, and the pictures each by itself, in the folder of its name."""
    if run.samples is None:
        return
    sheet = Path(run.samples)
    try:
        artifacts.mkdir(exist_ok=True)
        for picture in (sheet, *sorted(sheet.with_suffix("").glob("[!.]*"))):
            upload_artifact(
                artifact_store=FileSystemArtifactStore(artifacts), file_path=str(picture), study_or_trial=trial
            )
    except OSError as error:  # a sweep does not end for what a page does not show
        logger.warning("pictures of trial %s are not in the study: %s", run.id, first_line(error))
