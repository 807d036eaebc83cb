"""Every block of docs/connectors.md runs, in its order: files are written, the rest is done."""

import re
import shlex
import shutil
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bioinit
from bioinit import cli, families

PAGE = (Path(__file__).parents[1] / "docs" / "connectors.md").read_text()
BLOCKS = re.findall(r"^```(console|python|yaml|toml)\n(.*?)^```$", PAGE, flags=re.M | re.S)
FILE = re.compile(r"# (\w+\.\w+)\n")
WRITTEN = ("old_names", "rna_connector", "rna_worlds", "rnaformer")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory from which modules are imported, and the names that blocks share."""
    folder = tmp_path_factory.mktemp("connectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(vars(families.SIBLINGS), "plug_ins", {})
        yield folder, {"__name__": "connectors"}
    for name in WRITTEN:
        sys.modules.pop(name, None)


def test_the_page_has_blocks_of_every_kind():
    assert {kind for kind, _ in BLOCKS} == {"console", "python", "yaml", "toml"}
    assert {FILE.match(text)[1] for _, text in BLOCKS if FILE.match(text)} == {
        *(f"{name}.py" for name in WRITTEN),
        "rules.yaml",
        "rna.yaml",
    }


@pytest.mark.parametrize(
    ("kind", "text"), BLOCKS, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(BLOCKS)]
)
def test_a_block_runs(kind, text, place, monkeypatch, capsys):
    folder, shared = place
    monkeypatch.chdir(folder)
    named = FILE.match(text)
    if named is not None:
        (folder / named[1]).write_text(text)
    elif kind == "python":
        exec(compile(text, "connectors.md", "exec", dont_inherit=True), shared)
    elif kind == "toml":
        for group, entries in tomllib.loads(text)["project"]["entry-points"].items():
            assert group == families.SIBLINGS.package
            found = {name: EntryPoint(name, value, group) for name, value in entries.items()}
            vars(families.SIBLINGS)["plug_ins"].update(found)
    else:
        assert kind == "console"
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "bioinit"
            assert cli.main(arguments) == 0, capsys.readouterr().err


def test_the_connected_checkpoint_is_known_by_name(place, capsys, monkeypatch):
    monkeypatch.chdir(place[0])
    assert cli.main(["inspect", "old"]) == 0
    assert "rnaformer" in capsys.readouterr().out


def test_what_wrappers_put_in_front_is_solved_before_the_table_is_asked(place, monkeypatch):
    folder, shared = place
    monkeypatch.chdir(folder)
    stored = {f"module.{name}": tensor for name, tensor in shared["stored"].items()}
    (folder / "wrapped").mkdir()
    save_file(stored, folder / "wrapped" / "model.safetensors")
    shutil.copy(folder / "old" / "config.json", folder / "wrapped")
    record = bioinit.compose("./rna.yaml", ["model.initial_ckpt_path=wrapped"])
    done = bioinit.initialize(record)
    sources = {claim.key: claim.sources for claim in done.report.claims}
    names = ("module.net.blocks.1.mix.g", "module.net.blocks.1.mix.v")
    assert sources["layers.1.mix.weight"] == names
    g, v = (stored[name] for name in names)
    assert torch.equal(done.model.layers[1].mix.weight, g * v / v.norm(dim=1, keepdim=True))
