"""What `jobs/encode.py list` and `jobs/encode.py prune` take."""

from pydantic import Field, model_validator

from ray_sd.config.base import Schema


class CacheListConfig(Schema):
    """What the cache holds (`jobs/encode.py list`)."""

    cache_path: str = "runs/cache"
    """Folder or URI of the cache."""


class CachePruneConfig(CacheListConfig):
    """What the cache loses (`jobs/encode.py prune`); of several conditions each removes its own."""

    folder: str | None = None
    """Folder of the cache to remove, by its name in the list, such as `latents/8c1d38b642588f1c`."""
    older_than_days: float | None = Field(None, ge=0)
    """Remove folders that no run has used for so many days."""
    max_gb: float | None = Field(None, ge=0)
    """Remove the folders used longest ago, until the rest is no larger than this."""
    dry_run: bool = False
    """Only say what would be removed."""

    @model_validator(mode="after")
    def _check(self) -> "CachePruneConfig":
        if self.folder is None and self.older_than_days is None and self.max_gb is None:
            raise ValueError("nothing to prune; give folder=…, older_than_days=… or max_gb=…")
        return self
