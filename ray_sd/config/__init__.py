"""Schemas, composition of presets, and errors in words. Imports neither torch nor ray."""

from ray_sd.config.dataset import DatasetConfig
from ray_sd.config.experiment import ExperimentConfig, GenerateConfig
from ray_sd.config.method import Method
from ray_sd.config.model import ModelConfig
from ray_sd.config.serve import ServeConfig
from ray_sd.config.sweep import SweepConfig
from ray_sd.config.text_to_video import TextToVideoConfig
from ray_sd.config.tracker import TrackerConfig
from ray_sd.config.trainer import TrainerConfig

__all__ = [
    "DatasetConfig",
    "ExperimentConfig",
    "GenerateConfig",
    "Method",
    "ModelConfig",
    "ServeConfig",
    "SweepConfig",
    "TextToVideoConfig",
    "TrackerConfig",
    "TrainerConfig",
]
