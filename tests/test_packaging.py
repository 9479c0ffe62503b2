"""What is installed: the files of the package, and the packages that it needs."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

import ray_sd

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def requirements() -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for texts in PROJECT["optional-dependencies"].values() for text in texts)]
    found = [Requirement(text) for text in texts]
    return {canonicalize_name(found.name): found for found in found if found.name != PROJECT["name"]}


def test_every_direct_dependency_is_pinned_within_its_range():
    for name, requirement in requirements().items():
        (pin,) = PINS[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(Version(pin.version)), f"{requirement} does not contain {pin.version}"


def test_what_is_tested_is_what_is_pinned():
    for name in requirements():
        (pin,) = PINS[name].specifier
        assert Version(importlib.metadata.version(name)).public == Version(pin.version).public, name


def test_extras_that_people_are_told_of_are_there():
    told = set()
    for file in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "pyproject.toml",
    ):
        told |= {name for names in re.findall(r"ray-sd\[([a-z,]+)\]", file.read_text()) for name in names.split(",")}
    assert "sweep" in told
    assert told <= set(PROJECT["optional-dependencies"])


def test_every_import_is_declared():
    """Something that only another package pulls in today may be gone tomorrow."""
    owners = importlib.metadata.packages_distributions()
    declared = requirements()
    for file in (*(ROOT / "ray_sd").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"ray_sd", "jobs"}:
                distributions = {canonicalize_name(owner) for owner in owners.get(name, [])}
                assert distributions & set(declared), (
                    f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml lacks"
                )


def test_package_carries_presets_models_and_layouts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    apply_configuration(distribution, "pyproject.toml")
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # or setuptools writes an egg-info folder to find them
    packages = set(distribution.packages)
    packed = {Path(path).as_posix() for path in command.find_data_files("ray_sd", "ray_sd")}
    for file in (ROOT / "ray_sd").rglob("*"):
        path = file.relative_to(ROOT).as_posix()
        if file.is_dir() or "__pycache__" in path:
            continue
        carried = ".".join(Path(path).parent.parts) in packages if file.suffix == ".py" else path in packed
        assert carried, f"{path} would not be installed"


@pytest.mark.slow
def test_no_skip_is_let_through_where_none_is_allowed(tmp_path: Path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it():\n    pytest.skip('no reason')\n")
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    command.append("--continue-on-collection-errors")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_SD_NO_SKIP"}
    allowed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "2 skipped" in allowed.stdout
    refused = subprocess.run(command, env=environment | {"RAY_SD_NO_SKIP": "1"}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "no reason" in refused.stdout
    assert "no_such_module" in refused.stdout


def test_hooks_before_a_commit_need_no_network():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}


def test_changelog_has_the_version():
    assert re.search(
        rf"^## \[({re.escape(ray_sd.__version__)}|Unreleased)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
