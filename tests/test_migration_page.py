"""Every line of docs/migration.md runs, in its order, but for those that it says to replace."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bioinit import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.M | re.S)
FILE = re.compile(r"# (\w+\.yaml)\n")
OLD = {
    "esm2_nemo2": "nemo2/esm2_tp1",
    "llama_nemo2": "nemo2/llama_tp1",
    "bert.nemo": "nemo1/bert_torch_dist.nemo",
    "neox": "gpt_neox",
}

# What megatron-core says when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:megatron")


@pytest.fixture(scope="module")
def place(tmp_path_factory, fixtures_dir):
    """A working directory with `old/` as the page says, and the names that blocks share."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("migration")
    (folder / "old").mkdir()
    for name, found in OLD.items():
        (folder / "old" / name).symlink_to(fixtures_dir / found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOINIT_HOME", str(folder / "home"))
        yield folder, {"__name__": "migration"}


def sides(text: str) -> tuple[str, str]:
    """What a block says before and after; a line is one of either, or of both."""
    before, after = [], []
    for line in text.splitlines():
        mark, rest = line[:1], line[1:]
        assert mark in ("-", "+", " ", ""), f"{line!r} should begin with -, + or a space"
        before += [rest] * (mark != "+")
        after += [rest] * (mark != "-")
    return "\n".join(before) + "\n", "\n".join(after) + "\n"


def is_shell(text: str) -> bool:
    return text.lstrip("\n").startswith("bioinit ")


def test_the_page_has_blocks_of_every_kind_and_no_others():
    assert {kind for kind, _ in BLOCKS} == {"diff", "yaml", "console"}
    assert len(BLOCKS) >= 20
    assert not re.findall(r"^ +```", PAGE, flags=re.M), "an indented block would not be run"


@pytest.mark.parametrize(
    ("kind", "text"), BLOCKS, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(BLOCKS)]
)
def test_a_block_runs(kind, text, place, monkeypatch, capsys):
    folder, shared = place
    monkeypatch.chdir(folder)
    if kind == "yaml":
        named = FILE.match(text)
        assert named, "a file begins with its name"
        (folder / named[1]).write_text(text)
        return
    before, after = sides(text) if kind == "diff" else ("", text)
    if not is_shell(after):
        compile(before, "migration.md", "exec")  # what people have is at least Python
        exec(compile(after, "migration.md", "exec", dont_inherit=True), shared)
        return
    for line in after.splitlines():
        command, _, output = line.partition(" > ")
        program, *arguments = shlex.split(command)
        assert program == "bioinit"
        assert cli.main(arguments) == 0, capsys.readouterr().err
        if output:
            (folder / output).write_text(capsys.readouterr().out)


NAMES = [
    (re.findall(r"`([\w.]+)`", modules), re.findall(r"`(\w+)`", names))
    for modules, names in re.findall(
        r"^\| `[a-z_]+\..*? \| (`bioinit\.compat.*?) \| (.*?) \|$", PAGE, re.M
    )
]


@pytest.mark.parametrize(("modules", "names"), NAMES, ids=lambda found: found[0])
def test_every_name_is_where_the_page_says(modules, names):
    for module in map(importlib.import_module, modules):
        found = names if module.__name__ != "bioinit.compat.nemo.resume" else names[:1]
        assert not [name for name in found if not hasattr(module, name)]


def test_the_page_has_all_names_that_were_promised():
    said = {name for _, names in NAMES for name in names}
    # As issue 6 lists them, a name by its last part.
    assert said >= set(
        """BionemoModelConfig BionemoTrainableModelConfig MegatronBioNeMoModelConfig
        MegatronBioNeMoTrainableModelConfig load_settings_from_checkpoint
        update_model_from_checkpoint override_mutate_possibly_extra_mutated_fiddle IOMixinProto
        WillHaveGetSetHparam IOMixinWithGettersSetters OVERRIDE_BIONEMO_CONFIG_DEFAULTS
        OVERRIDE_BIOBERT_CONFIG_DEFAULTS load_weights_sharded_inplace_nemo2_to_mcore
        nemo1_to_nemo2_biobert_key_mapping IOMixin track_io reinit load load_context
        state_transform apply_transforms TransformCTX TransformFns ModelConnector model_importer
        model_exporter ConnectorMixin import_ckpt export_ckpt TrainerContext ckpt_to_dir
        ckpt_to_context_subdir ckpt_to_weights_subdir AutoResume RestoreConfig
        get_files_to_download download load_checkpoint_files merge_params_dim_0 merge_params_dim_1
        merge_params_duplicate merge_params_sum LayerGenerator""".split()
    )


def test_a_row_of_the_table_has_four_cells():
    table = PAGE.partition("## What is different")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == 4 and all(cell.strip() for cell in cells), row
    assert len(set(rows)) == len(rows), "a row stands twice"
