import pickle
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sample_pictures import experiment
from subject_pictures import BLUE, GREY, RED, find, overlap, photograph, rectangle

from ray_sd.config.load import run_job
from ray_sd.data import check_crop, finders
from ray_sd.data.crops import variants
from ray_sd.errors import ArtifactError

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def test_a_detector_finds_what_it_learnt_in_pixels_of_the_picture(detector: str):
    for colour, label in ((RED, "cat"), (BLUE, "dog")):
        for box in ((40, 30, 180, 180), (220, 130, 380, 270)):
            (subject,) = find({"detector": detector}, rectangle(box, colour))
            assert subject.label == label
            assert subject.score > 0.9
            assert overlap(subject.box, box) > 0.6


def test_other_labels_do_not_count(detector: str):
    cat = rectangle((40, 30, 180, 180), RED)
    assert find({"detector": detector, "labels": ["dog"]}, cat) == [None]
    assert find({"detector": detector, "labels": ["dog", "cat"]}, cat)[0].label == "cat"


def test_a_strip_along_an_edge_is_no_detection(detector: str, monkeypatch: pytest.MonkeyPatch):
    strip = rectangle((0, 200, 400, 300), RED)
    assert find({"detector": detector}, strip) == [None]
    monkeypatch.setattr("ray_sd.data.finders.detector.is_strip", lambda *_: False)
    assert find({"detector": detector}, strip)[0].label == "cat"


def test_detections_count_from_the_threshold_on(detector: str):
    nothing = rectangle((0, 0, 1, 1), GREY)
    cat = rectangle((40, 30, 180, 180), RED)
    assert find({"detector": {"path": detector, "threshold": 1.0}}, cat) == [None]
    assert find({"detector": {"path": detector, "threshold": 0.0}}, nothing)[0] is not None


def test_the_best_of_the_wanted_detections_is_that_of_plain_transformers(random_detector: str):
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(random_detector, backend="pil")
    model = AutoModelForObjectDetection.from_pretrained(random_detector).eval()
    picture = photograph("chelsea.png")
    with torch.inference_mode():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    (result,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(300, 451)])
    for number, label in model.config.id2label.items():
        mine = [i for i in result["scores"].argsort(descending=True).tolist() if result["labels"][i] == number]
        (subject,) = find({"detector": {"path": random_detector, "threshold": 0.0}, "labels": [label]}, picture)
        if not mine:
            assert subject is None
            continue
        expected = result["boxes"][mine[0]].numpy().clip(0, [451, 300, 451, 300])
        assert subject.label == label
        assert subject.score == pytest.approx(float(result["scores"][mine[0]]), abs=1e-5)
        assert subject.box == pytest.approx(expected, abs=0.01)


def test_what_is_found_does_not_depend_on_the_rest_of_the_batch(random_detector: str):
    cat = photograph("chelsea.png")
    pictures = [
        cat,
        cat.rotate(90, expand=True),
        cat.crop((0, 0, 300, 300)),
        cat.transpose(0),
        Image.new("RGB", (900, 2)),
    ]
    crop = {"detector": {"path": random_detector, "threshold": 0.0}}
    together = find(crop, *pictures)
    assert together[4] is None
    for picture, subject in zip(pictures[:4], together[:4], strict=True):
        (alone,) = find(crop, picture)
        assert alone.label == subject.label
        assert alone.box == pytest.approx(subject.box, abs=0.01)


def test_another_model_in_the_same_place_gives_windows_of_another_name(
    detector: str, random_detector: str, tmp_path: Path
):
    def name(path: str, **settings: Any) -> str:
        crop = {"name": "subject", "detector": {"path": path, **settings}}
        return str(variants(experiment(tmp_path, tmp_path, crop=crop).dataset)[0])

    assert name(detector) == name(detector, batch_size=2)
    assert len({name(detector), name(random_detector), name(detector, threshold=0.6)}) == 3
    copied = tmp_path / "copy"
    shutil.copytree(detector, copied)
    assert name(str(copied)) == name(detector)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("catt", "has no label 'catt'; did you mean 'cat'?"),
        ("elephant", "has no label 'elephant'; its labels are: cat, dog"),
    ],
)
@pytest.mark.parametrize("job", ["encode", "train"])
def test_an_unknown_label_is_refused_before_ray_starts(
    job: str,
    label: str,
    words: str,
    detector: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray_sd.train.run.connect", started)
    monkeypatch.setattr("ray_sd.data.pipeline.connect", started)
    main = runpy.run_path(str(JOBS / f"{job}.py"))["main"]
    settings = [f"cache_path={tmp_path}/cache", f"storage_path={tmp_path}/runs", f"dataset.crop.detector={detector}"]
    assert run_job(main, ["experiment=smoke", *settings, "dataset.crop=subject", f"dataset.crop.labels={label}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [f"error: dataset.crop.labels: {detector} {words}"]


def refused(tmp_path: Path, detector: str | Path, words: str) -> None:
    config = experiment(tmp_path, tmp_path, crop={"name": "subject", "detector": str(detector)}).dataset
    with pytest.raises(ArtifactError, match=words):
        check_crop(config)


def test_a_detector_that_cannot_be_loaded_is_refused_in_words(detector: str, tmp_path: Path):
    refused(tmp_path, "nowhere", "dataset.crop.detector: no folder nowhere, and no hub id either")
    refused(tmp_path, tmp_path, "cannot read the model in .*: Unrecognized model")
    embedded = Path(finders.__file__).parents[2] / "embedded" / "emoji"
    refused(tmp_path, embedded / "text_encoder", "holds a 'clip_text_model' model; it must be one of transformers for")

    whole = shutil.copytree(detector, tmp_path / "whole")
    (whole / "preprocessor_config.json").unlink()
    refused(tmp_path, whole, "cannot read the preprocessing in")
    shutil.copy(Path(detector) / "preprocessor_config.json", whole)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path, whole, "cannot load the model in")
    weights.unlink()
    (whole / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(tmp_path, whole, "no .safetensors weights in .*pytorch_model.bin.*; pickled weights are not read")


def test_a_detector_without_some_of_its_weights_is_refused(detector: str, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    part = shutil.copytree(detector, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    del weights["bbox_predictor.layers.0.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    refused(tmp_path, part, "lacks 1 of its weights, such as bbox_predictor.layers.0.weight")
