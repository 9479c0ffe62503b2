"""Data of all trials of a sweep, in an actor that imports no model before there is something to encode."""

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData, prepare
from ray_sd.data.sources import Listing


class Preparer:
    """Encodes data for all trials, one after another, so that none encodes what another is encoding."""

    def prepare(self, config: ExperimentConfig, rows: RowSpec, listing: Listing | None = None) -> PreparedData:
        return prepare(config, rows, listing)
