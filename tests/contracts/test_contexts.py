"""What every kind of saved config promises, run for each one that is found."""

import json
from pathlib import Path

import pytest

from bioinit.contexts import find, load, names
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CheckpointError
from bioinit.storage import Folder

each_kind = pytest.mark.parametrize("name", names())
HOSTILE = ("", "{", "[]", "null", "1", '"text"', '{"a": NaN}', "\x00", '{"model": []}', "{" * 9999)


def test_ours_and_hugging_face_s_are_found() -> None:
    assert {"bioinit", "hf"} <= set(names())


PLACES = (
    "config.json context/record.json context/io.json context/model.yaml model_config.yaml "
    "run_config.yaml configs/run.yml common.pt mp_rank_00/model_optim_rng.pt"
).split()


@each_kind
def test_a_kind_is_what_its_file_defines(name: str) -> None:
    assert isinstance(load(name), ContextKind)


@each_kind
def test_an_empty_folder_and_a_lone_file_hold_none(name: str, tmp_path: Path) -> None:
    assert load(name).read(Folder.at(tmp_path)) is None
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02junk")
    assert load(name).read(Folder.at(tmp_path)) is None
    assert load(name).read(Folder.at(tmp_path / "weights.bin")) is None


@each_kind
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_files_give_a_context_or_an_error_of_ours(
    name: str, text: str, tmp_path: Path
) -> None:
    for place in PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    try:
        context = load(name).read(Folder.at(tmp_path))
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
    else:
        assert context is None or isinstance(context, Context)


def test_a_real_folder_gives_plain_data(fixtures_dir: Path) -> None:
    folders = sorted(path.parent for path in fixtures_dir.glob("hf/*/*/config.json"))
    folders += sorted(path.parent.parent for path in fixtures_dir.glob("nemo2/*/context/io.json"))
    assert len(folders) > 20
    for folder in folders:
        context = find((Folder.at(folder),))
        assert context is not None and context.model and context.where.startswith(str(folder))
        assert json.loads(json.dumps(dict(context.tree))) == context.tree
        model = context.tree["model"]
        assert context.data.items() <= model.get("config", model).items()
