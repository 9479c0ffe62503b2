"""What finds the animal or object in a picture."""

from collections.abc import Callable

from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.finders.base import Finder, Subject
from ray_sd.data.finders.cascade import CascadeFinder
from ray_sd.data.finders.detector import DetectorFinder
from ray_sd.data.finders.foreground import ForegroundFinder

FINDERS: dict[str, Callable[[SubjectCrop], Finder]] = {
    "foreground": ForegroundFinder,
    "cascade": CascadeFinder,
    "detector": DetectorFinder,
}


def build_finder(crop: SubjectCrop) -> Finder:
    """The finder of a crop. Raises ConfigError or ArtifactError where it cannot work."""
    return FINDERS[crop.finder](crop)


__all__ = ["FINDERS", "Finder", "Subject", "build_finder"]
