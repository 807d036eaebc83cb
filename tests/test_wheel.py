"""What pip installs: the recipes come along, and are found where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bioinit.recipe import sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="needs hatchling, which the extra test brings")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [found] = folder.glob("bioinit-*.whl")
    return found


def test_the_wheel_holds_every_recipe_every_preset_and_the_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "recipes"):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert files <= {name.removeprefix("bioinit/_data/") for name in names}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "bioinit/py.typed" in names
    assert not [name for name in names if name.split("/")[0] in ("tests", "demo", "benchmarks")]


def test_an_installed_wheel_finds_its_recipes(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path), str(wheel)], check=True)
    command = [sys.executable, "-c", "import bioinit; print(bioinit.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(command, **options).stdout.startswith(str(tmp_path))
    command = [sys.executable, "-m", "bioinit", "recipes"]
    listed = subprocess.run(command, **options)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(sources.names())
    command = [str(tmp_path / "bin" / "bioinit"), "recipes", "esm2/masked_lm", "--json"]
    assert '"family": "esm2"' in subprocess.run(command, **options).stdout
