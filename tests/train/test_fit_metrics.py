"""Metrics of validation pictures in runs: checked before Ray starts, measured at checkpoints, passed on with their steps."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ray_sd.adapter import read_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.errors import ConfigError
from ray_sd.generate import ImageRequest, generate
from ray_sd.generate.metrics import PictureMetrics
from ray_sd.media.pictures import read_parameters
from ray_sd.models import load_model
from ray_sd.train import metrics as of_runs
from ray_sd.train.job import TrainingJob
from ray_sd.train.metrics import check_metrics, measure_pictures, read_references
from ray_sd.train.monitor import Monitor
from ray_sd.train.run import fit
from ray_sd.train.storage import RunFolder

EMOJI = "model: embedded/emoji_clip"
SUBJECT = f"{{name: subject_similarity, {EMOJI}, references: embedded/pictures/owl, prompts: owl}}"
DRIFT = f"{{name: base_drift, {EMOJI}, without: owl}}"
PROMPTS = "trainer.validation.prompts=[a owl on a blue background, a dog on a red background]"
STEPS = "trainer.validation.num_inference_steps=2"


def metrics(*kinds: str) -> str:
    return f"trainer.validation.metrics=[{', '.join(kinds)}]"


def test_a_run_measures_its_pictures(configure: Callable[..., ExperimentConfig], train: Callable):
    prompt = f"{{name: prompt_similarity, {EMOJI}, label: words}}"
    config = configure(
        "name=measured",
        "trainer.max_steps=2",
        "trainer.checkpoint.every_steps=1",
        "trainer.learning_rate=1e-2",
        PROMPTS,
        STEPS,
        metrics(SUBJECT, prompt, DRIFT),
    )
    result = train(config)
    run = Path(result.run)
    names = {"val/subject_similarity", "val/words", "val/base_drift"}
    before = {"untrained_val/subject_similarity", "untrained_val/words"}

    # Whoever measures what is there finds the same.
    base = Image.open(run / "samples" / "base" / "01.png").convert("RGB")
    assert [file.name for file in (run / "samples" / "base").iterdir()] == ["01.png"]
    measure = PictureMetrics(
        config.trainer.validation.metrics,
        {"val/subject_similarity": read_references(config.trainer.validation.metrics[0], config.dataset)},
    )
    # A LoRA begins as nothing.
    settings = config.trainer.validation
    drawn = generate(
        load_model(config.model),
        [
            ImageRequest(
                prompt, seed=seed, num_inference_steps=2, guidance_scale=settings.guidance_scale, height=64, width=64
            )
            for seed, prompt in enumerate(settings.prompts)
        ],
    )
    untrained = {
        f"untrained_{key}": value for key, value in measure.measure(drawn, config.trainer.validation.prompts).items()
    }
    assert untrained.keys() == before
    history = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        folder = run / "samples" / f"step-{step:08d}"
        pictures = [Image.open(folder / name).convert("RGB") for name in ("00.png", "01.png")]
        expected = untrained | measure.measure(pictures, config.trainer.validation.prompts, {1: base})
        assert json.loads(folder.with_suffix(".json").read_text()) == pytest.approx({"step": step} | expected)
        [recorded] = [line for line in history if names & line.keys() and line["step"] == step]
        assert recorded == pytest.approx({"step": step} | expected)
    assert expected.keys() == names | before
    assert expected["val/base_drift"] > 0
    assert all(expected[name] != expected[name.removeprefix("untrained_")] for name in before)
    assert read_parameters(folder / "01.png")["prompt"] == "a dog on a red background"
    assert read_parameters(folder / "01.png")["step"] == 2

    assert {name: result.metrics[name] for name in names | before} == pytest.approx(expected)
    assert {name: read_manifest(Path(result.adapter)).metrics[name] for name in names | before} == pytest.approx(
        expected
    )


@pytest.fixture
def refused(tmp_path: Path) -> dict[str, Path]:
    """Folders and files that are no references."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "damaged").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "damaged" / "1.png")
    (tmp_path / "damaged" / "2.png").write_bytes(b"no picture")
    return {name: tmp_path / name for name in ("empty", "damaged", "absent")}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("references: {absent}", "subject_similarity: references: there is no .*/absent"),
        ("references: {empty}", "subject_similarity: references: no pictures in .*/empty; they end in .png, "),
        ("references: {damaged}", "subject_similarity: references: .*/damaged/2.png cannot be decoded"),
        ("references: {damaged}/2.png", "subject_similarity: references: .*/damaged/2.png cannot be decoded"),
        ("references: embedded/pictures/cow", "subject_similarity: references: there is no embedded/pictures/cow"),
        ("references: no-such://x", "subject_similarity: references: no-such://x: "),
        ("references: embedded/pictures/owl, label: x, model: {empty}", "x: no .safetensors weights in .*/empty"),
    ],
)
def test_what_cannot_be_measured_is_told_before_ray_starts(
    configure: Callable[..., ExperimentConfig],
    refused: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    words: str,
):
    def connect() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray_sd.train.run.connect", connect)
    model = "" if "model:" in given else f"{EMOJI}, "
    metric = f"{{name: subject_similarity, {model}{given.format(**refused)}}}"
    with pytest.raises(ConfigError, match=f"^trainer.validation.metrics: {words}"):
        fit(configure("name=refused", PROMPTS, metrics(metric)))


def test_metrics_that_can_be_measured_pass(configure: Callable[..., ExperimentConfig]):
    check_metrics(configure("name=fine", PROMPTS, metrics(SUBJECT, DRIFT)))


def test_references_are_files_and_folders_prepared_as_the_data_are(
    configure: Callable[..., ExperimentConfig], tmp_path: Path
):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "photos" / "more" / "clear.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "red.jpg")
    references = f"[{tmp_path}/photos, 'file://{tmp_path}/photos/red.jpg', embedded/pictures/owl/owl-1.png]"
    metric = f"{{name: subject_similarity, {EMOJI}, references: {references}}}"
    config = configure("name=x", PROMPTS, metrics(metric), "dataset.background=#00ff00")
    found = read_references(config.trainer.validation.metrics[0], config.dataset)
    clear, red, again, owl = found
    assert clear.getpixel((4, 4)) == (0, 255, 0)
    assert red == again
    assert owl.size == (128, 128)


@pytest.fixture
def requests() -> list[ImageRequest]:
    return [
        ImageRequest(prompt, seed=seed, num_inference_steps=1, height=64, width=64)
        for seed, prompt in enumerate(["a owl", "a dog", "a cat"])
    ]


def drift(*settings: str) -> str:
    return metrics(f"{{{', '.join(['name: base_drift', EMOJI, *settings])}}}")


def test_the_untrained_base_draws_once_a_run(
    configure: Callable[..., ExperimentConfig],
    requests: list[ImageRequest],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    drawn = []

    def count(model: object, asked: list[ImageRequest]) -> list[Image.Image]:
        drawn.append([request.prompt for request in asked])
        return generate(model, asked)

    monkeypatch.setattr(of_runs, "generate", count)
    config = configure("name=kept", "trainer.validation.prompts=[a owl, a dog, a cat]", drift("without: owl"))
    pictures = generate(load_model(config.model), requests)
    kept = Path(config.storage_path) / "kept" / "samples" / "base"

    def measure(asked: list[ImageRequest] = requests) -> float:
        return measure_pictures(config, asked, pictures, "cpu")["val/base_drift"]

    assert measure() == pytest.approx(0, abs=1e-6)
    assert sorted(file.name for file in kept.iterdir()) == ["01.png", "02.png"]
    assert read_parameters(kept / "02.png") == requests[2].settings()
    assert measure() == pytest.approx(0, abs=1e-6)
    assert drawn == [["a dog", "a cat"]]

    # Of what is asked for in another way, or was cut off, it draws anew, and of nothing else.
    other = [*requests[:2], ImageRequest("a cat", seed=9, num_inference_steps=1, height=64, width=64)]
    assert measure(other) > 1e-4
    (kept / "01.png").write_bytes((kept / "01.png").read_bytes()[:-200])
    measure(other)
    assert drawn[1:] == [["a cat"], ["a dog"]]
    Image.new("RGB", (64, 64)).save(kept / "01.png")  # without a word of how it was made
    measure(other)
    assert drawn[3:] == [["a dog"]]
    assert "drew 2 pictures without training: " in caplog.text


def test_the_base_draws_nothing_where_no_metric_asks(configure: Callable[..., ExperimentConfig], requests: list):
    config = configure("name=without", "trainer.validation.prompts=[a owl, a dog, a cat]", metrics(SUBJECT))
    pictures = [Image.new("RGB", (64, 64))] * 3
    found = measure_pictures(config, requests, pictures, "cpu")
    assert found.keys() == {"val/subject_similarity", "untrained_val/subject_similarity"}
    samples = Path(config.storage_path) / "without" / "samples"
    assert [file.name for file in samples.rglob("*.png")] == ["00.png"]  # of the only prompt that counts
    assert not (samples / "base").exists()
    assert measure_pictures(configure("name=nothing"), requests, pictures, "cpu") == {}
    assert not (Path(config.storage_path) / "nothing").exists()


def test_a_new_word_is_measured_before_training_as_what_it_begins_as(configure: Callable[..., ExperimentConfig]):
    subject = SUBJECT.replace("prompts: owl", "prompts: <owl>")
    found = {}
    for word in ("eagle", "penguin"):
        config = configure(
            *(
                "experiment=textual_inversion",
                f"name={word}",
                f"method.initializer_token={word}",
                "method.num_vectors=1",
            ),
            *("trainer.validation.prompts=a <owl> on a blue background", metrics(subject)),
        )
        asked = ImageRequest("a <owl> on a blue background", num_inference_steps=2, height=64, width=64)
        found[word] = measure_pictures(config, [asked], [Image.new("RGB", (64, 64))], "cpu")
        same = generate(load_model(config.model), [replace(asked, prompt=f"a {word} on a blue background")])[0]
        kept = Image.open(Path(config.storage_path) / word / "samples" / "untrained" / "00.png").convert("RGB")
        assert np.abs(np.asarray(kept, int) - np.asarray(same, int)).max() <= 1
    assert found["eagle"]["untrained_val/subject_similarity"] != found["penguin"]["untrained_val/subject_similarity"]


def test_a_run_that_is_shown_elsewhere_has_no_bar_and_tells_when_it_steps(
    configure: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = configure("name=watched", "trainer.log_every=10", f"storage_path={tmp_path}/runs")
    run = RunFolder(config.storage_path, config.name)
    drawn: list[str] = []

    class Bar:
        def __init__(self, desc: str, **_: object) -> None:
            drawn.append(desc)

        def update(self, images: int) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("ray_sd.train.monitor.tqdm_ray.tqdm", Bar)
    reports: Queue = Queue()
    for told in (reports, None):
        job = TrainingJob(config, config, None, None, None, reports=told)
        monitor = Monitor(SimpleNamespace(device=torch.device("cpu")), job, run, start=4, rank=0)
        monitor.after_step(5)
        monitor.after_step(6)
        monitor.close()
        assert drawn == ([] if told else ["watched"])
    assert list(reports.queue) == [{"began": 5}]  # the first step of this start, once


def test_waiting_for_data_and_the_most_memory_are_told(
    configure: Callable[..., ExperimentConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    config = configure("name=watched", "trainer.log_every=2", f"storage_path={tmp_path}/runs")
    now = 0.0
    monkeypatch.setattr("ray_sd.train.monitor.time.perf_counter", lambda: now)
    monkeypatch.setattr("ray_sd.train.monitor.dist.all_reduce", lambda tensor: None)
    engine = SimpleNamespace(device=torch.device("cpu"), learning_rate=0.1, gradient_norm=lambda: None)
    job = TrainingJob(config, config, None, None, None, estimated_bytes=3 * 2**30)
    monitor = Monitor(engine, job, RunFolder(config.storage_path, config.name), start=0, rank=0)

    def batches() -> Iterator[dict]:
        nonlocal now
        for seconds in (3.0, 3.0, 0.0, 0.0):
            now += seconds
            yield {}

    with caplog.at_level("INFO", "ray_sd.train.monitor"):
        waits = []
        for step, _ in enumerate(monitor.waited_for(batches()), start=1):
            now += 1
            monitor.record(torch.ones(()))
            monitor.after_step(step)
            waits.append(monitor.latest.get("data_wait_fraction"))
        monitor.close()
    assert waits == [None, 0.75, 0.75, 0.0]
    assert 0.1 < monitor.latest["peak_memory_gib"] < 100
    assert re.search(r"a worker took [\d.]+ GiB at most; about 3.00 were foreseen for tensors", caplog.text)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_measurements_reach_trackers_with_the_step_of_their_pictures(
    configure: Callable[..., ExperimentConfig], tmp_path: Path, scheme: str
):
    config = configure("name=watched", f"storage_path={scheme}{tmp_path}/runs")
    run = RunFolder(config.storage_path, config.name)
    assert (run.local is None) is bool(scheme)

    def measured(step: int) -> None:
        run.write(f"samples/step-{step:08d}.json", json.dumps({"step": step, "val/x": step / 10}).encode())

    def monitor(start: int) -> Monitor:
        job = TrainingJob(config, config, None, None, None)
        return Monitor(SimpleNamespace(device=torch.device("cpu")), job, run, start=start, rank=0)

    def recorded() -> list[dict]:
        return [json.loads(line) for line in (run.read("logs/metrics.jsonl") or b"").splitlines()]

    first = monitor(0)
    measured(4)
    first.log({"loss": 0.5}, 6)
    first.after_checkpoint(2, "checkpoint-00000002")
    first.after_checkpoint(2, "checkpoint-00000002")
    # A checkpoint's numbers are its own; those of one before it are not reported again.
    assert first.latest == {"loss": 0.5}
    measured(8)
    first.close()
    assert recorded() == [{"step": 6, "loss": 0.5}, {"step": 4, "val/x": 0.4}, {"step": 8, "val/x": 0.8}]

    # What was measured while nobody looked is passed on after a resume, and what is measured again only once.
    measured(5)
    resumed = monitor(6)
    resumed.after_checkpoint(4, "checkpoint-00000004")
    assert run.read("samples/step-00000008.json") is None
    measured(8)
    resumed.close()
    assert recorded()[2:] == [{"step": 5, "val/x": 0.5}, {"step": 8, "val/x": 0.8}]


def test_damaged_measurements_and_files_that_are_none_are_left_out(
    configure: Callable[..., ExperimentConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = configure("name=watched", f"storage_path={tmp_path}/runs")
    run = RunFolder(config.storage_path, config.name)
    contents = [b"", b'{"val/x": ', b"[]", b'{"step": 4, "val/x": "much"}', b'{"val/x": 0.5}']
    for step, content in enumerate(contents):
        run.write(f"samples/step-{step:08d}.json", content)
    run.write("samples/step-best.json", b"{}")
    run.write("samples/notes.json", b"{}")
    run.write("samples/step-best.png", b"")
    job = TrainingJob(config, config, None, None, None)
    Monitor(SimpleNamespace(device=torch.device("cpu")), job, run, start=9, rank=0).close()
    assert json.loads(run.read("logs/metrics.jsonl") or b"") == {"step": 4, "val/x": 0.5}
    assert caplog.text.count("is damaged; what was measured in it is left out") == 4
