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
