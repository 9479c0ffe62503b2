"""Animals and objects, found by an object-detection model of transformers.

What is slow to import is imported by what needs it, since the tasks of the other finders read this file, too.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sd.config.dataset import DetectorConfig, SubjectCrop
from ray_sd.config.words import suggestion
from ray_sd.data.finders.base import Subject, is_strip
from ray_sd.data.windows import Box
from ray_sd.errors import ArtifactError, ConfigError, first_line
from ray_sd.files import expand
from ray_sd.headers import what_is_there
from ray_sd.media.decode import Layers

if TYPE_CHECKING:
    from torch import Tensor

SETTING = "dataset.crop.detector"
MIN_SIDE = 16
"""Pictures with fewer pixels on a side are not looked at; scaled up for a model, they would be all of one colour."""


class DetectorFinder:
    """The detection with the best score among the wanted labels."""

    def __init__(self, crop: SubjectCrop) -> None:
        """Raises ArtifactError for a model that cannot be loaded, and ConfigError for a label that it does not know."""
        if crop.detector is None:
            raise ValueError("a detector needs a model")
        self._threshold = crop.detector.threshold
        # Labels first: to find one wrong, no weights need to be fetched.
        self._names = _wanted(crop, _load_config(_folder(crop.detector, "*.json")))
        folder = _folder(crop.detector, "*.safetensors")
        self._processor = _load_processor(folder)
        self._model = _load_model(folder)

    def find(self, pictures: Sequence[Layers]) -> list[Subject | None]:
        import torch

        # Not before there is work: who only wants to know whether it loads takes no GPU.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(device)
        inputs: dict[int, dict[str, Tensor]] = {
            i: self._processor(images=one.picture, return_tensors="pt")
            for i, one in enumerate(pictures)
            if min(one.picture.size) >= MIN_SIDE
        }
        # Pictures of different shapes would be padded, and models take the padding for a part of the picture: what is
        # found would depend on what was searched along with it.
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, values in inputs.items():
            groups[values["pixel_values"].shape].append(i)
        found: list[Subject | None] = [None] * len(pictures)
        for group in groups.values():
            batch = {name: torch.cat([inputs[i][name] for i in group]).to(device) for name in inputs[group[0]]}
            with torch.inference_mode():
                outputs = self._model(**batch)
            sizes = [(pictures[i].picture.height, pictures[i].picture.width) for i in group]
            results = self._processor.post_process_object_detection(
                outputs, threshold=self._threshold, target_sizes=sizes
            )
            for i, result, size in zip(group, results, sizes, strict=True):
                found[i] = self._best(result, *size)
        return found

    def _best(self, result: "dict[str, Tensor]", height: int, width: int) -> Subject | None:
        detections = zip(*(result[name].tolist() for name in ("scores", "labels", "boxes")), strict=True)
        subjects = [
            Subject(_within(box, height, width), self._names[label], score)
            for score, label, box in detections
            if label in self._names
        ]
        visible = [
            subject for subject in subjects if _area(subject.box) >= 1 and not is_strip(subject.box, width, height)
        ]
        return max(visible, key=lambda subject: subject.score or 0.0, default=None)


def fingerprint(detector: DetectorConfig) -> str:
    """Hex digest that changes with the model's weights, configuration and preprocessing, wherever its files lie."""
    from ray_sd.models.components import read_json
    from ray_sd.models.fingerprints import BOOKKEEPING, tensors_digest

    _folder(detector, "*.json")
    folder = _folder(detector, "*.safetensors")
    digest = hashlib.blake2b(tensors_digest(_weight_files(folder)).encode(), digest_size=16)
    for name in ("config.json", "preprocessor_config.json"):
        content = {key: value for key, value in read_json(folder / name).items() if key not in BOOKKEEPING}
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _folder(detector: DetectorConfig, pattern: str) -> Path:
    """The local folder of a model, with the files of the pattern fetched from the hub if need be."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ray_sd.models.components import is_hub_id, snapshot

    local = expand(detector.path, SETTING)
    if local.is_dir():
        return local
    if not is_hub_id(detector.path):
        raise ArtifactError(f"{SETTING}: no folder {detector.path}, and no hub id either, such as hustvl/yolos-tiny")
    try:
        return snapshot(detector.path, detector.revision, (pattern,), None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{SETTING}: cannot fetch '{detector.path}' from the Hugging Face hub ({first_line(error)}), and no local "
            "folder has that name; download it elsewhere and give its folder"
        ) from error


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged or unknown configuration leads to
        raise ArtifactError(f"{SETTING}: cannot read the model in {folder}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        raise ArtifactError(
            f"{SETTING}: {folder} holds a '{config.model_type}' model; "
            "it must be one of transformers for object detection, such as YOLOS, DETR or RT-DETR"
        )
    return config


def _wanted(crop: SubjectCrop, config: Any) -> dict[int, str]:
    """The names of the labels that may be the subject, by the model's numbers."""
    names = {int(number): name for number, name in config.id2label.items()}
    for label in crop.labels:
        if label not in names.values():
            # Some models have hundreds; where one is near, it is enough.
            hint = suggestion(label, names.values()) or f"; its labels are: {', '.join(sorted(set(names.values())))}"
            path = crop.detector.path if crop.detector is not None else ""
            raise ConfigError(f"dataset.crop.labels: {path} has no label '{label}'{hint}")
    return {number: name for number, name in names.items() if not crop.labels or name in crop.labels}


def _load_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        # In Pillow, so that a picture looks the same to the model wherever torchvision is installed or not.
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # as above
        raise ArtifactError(f"{SETTING}: cannot read the preprocessing in {folder}: {first_line(error)}") from error
    return processor


def _load_model(folder: Path) -> Any:
    """The model in fp32, from safetensors only."""
    import torch
    from transformers import AutoModelForObjectDetection

    from ray_sd.finite import check_finite
    from ray_sd.models.components import no_progress_bar

    _weight_files(folder)
    try:
        with no_progress_bar():
            model, info = AutoModelForObjectDetection.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        check_finite(model.state_dict(), "its weights")
    except Exception as error:  # as above; a backbone may want a library that is not installed
        raise ArtifactError(f"{SETTING}: cannot load the model in {folder}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ArtifactError(
            f"{SETTING}: the model in {folder} lacks {len(missing)} of its weights, such as {missing[0]}"
        )
    return model.eval()


def _weight_files(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        there = what_is_there(file.name for file in folder.iterdir())
        raise ArtifactError(f"{SETTING}: no .safetensors weights in {folder} {there}")
    return files


def _within(box: Sequence[float], height: int, width: int) -> Box:
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
