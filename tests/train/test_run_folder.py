from pathlib import Path

import pytest

from ray_sd.train.storage import RunFolder


@pytest.mark.parametrize("files", [("a.json",), ("a.json", "part/b.json")])
def test_what_was_copied_into_a_run_is_copied_out_of_it(tmp_path: Path, files: tuple[str, ...]):
    source = tmp_path / "source"
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text(file)
    run = RunFolder((tmp_path / "runs").as_uri(), "run")
    run.upload(source, "adapter")
    run.download("adapter", tmp_path / "elsewhere" / "adapter")
    copied = {
        path.relative_to(tmp_path / "elsewhere" / "adapter").as_posix()
        for path in (tmp_path / "elsewhere").rglob("*.json")
    }
    assert copied == set(files)
    run.download("absent", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_what_is_set_aside_keeps_all_its_files_and_never_takes_anothers_place(tmp_path: Path):
    run = RunFolder(tmp_path.as_uri(), "run")
    asides = []
    for content in ("first", "second"):
        (tmp_path / "run" / "torn" / "part").mkdir(parents=True)
        (tmp_path / "run" / "torn" / "part" / "a.json").write_text(content)
        asides.append(run.set_aside("torn"))
        assert not (tmp_path / "run" / "torn").exists()
    assert asides == ["damaged/torn", "damaged/torn-1"]
    assert [(tmp_path / "run" / aside / "part" / "a.json").read_text() for aside in asides] == ["first", "second"]


def test_a_file_holds_no_checkpoints(tmp_path: Path):
    (tmp_path / "run").write_text("")
    assert RunFolder(str(tmp_path), "run").checkpoints() == []
