"""Every example of the README runs, in the order in which it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from bioinit import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```$", README, flags=re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory in which `demo/esm2_tiny` lies where the README says."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("readme")
    (folder / "demo").symlink_to(ROOT / "demo")
    return folder


def test_the_readme_has_examples_of_both_kinds():
    assert {kind for kind, _ in BLOCKS} == {"console", "python"} and len(BLOCKS) > 5


@pytest.mark.parametrize(
    ("kind", "text"), BLOCKS, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(BLOCKS)]
)
def test_an_example_runs(kind, text, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if kind == "python":
        exec(compile(text, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
        return
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "bioinit"
        assert cli.main(arguments) == 0, capsys.readouterr().err
