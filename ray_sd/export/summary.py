"""What an export says when it is done."""

from pathlib import Path

from ray_sd.config.export import ExportConfig
from ray_sd.export.adapter_output import embeddings_beside


def summary(config: ExportConfig, *lines: str) -> str:
    """Where the output is, and lines on what it holds."""
    beside = embeddings_beside(Path(config.output).expanduser())
    tokens = (
        [f"{beside}: the tokens, for which such a file has no place"] if config.writes_file and beside.exists() else []
    )
    return "\n".join([f"output:  {config.output}", *(f"         {line}" for line in [*lines, *tokens])])
