"""What is written beside the weights: the receipt, and what becomes of a save that fails."""

import json
import shutil

import pytest

import bioinit
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.report import dumps
from bioinit.save import verify
from tests.checkpoints import write


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A model that was started and not saved."""
    root = tmp_path_factory.mktemp("checkpoint")
    write(root, "bert")
    source = root / "safetensors"
    record = bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={source}"])
    return bioinit.initialize(record), source


@pytest.fixture(scope="module")
def written(started, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "out"
    started[0].save(folder)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_the_receipt_is_kept_and_is_the_one_on_disk(started, tmp_path):
    done = started[0]
    given = done.save(tmp_path / "out")
    assert done.receipt is given
    assert json.loads(json.dumps(given)) == json.loads((tmp_path / "out/receipt.json").read_text())


def test_a_save_that_fails_keeps_no_receipt_and_may_be_repeated(started, tmp_path):
    done = bioinit.initialize(
        bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={started[1]}"])
    )
    assert done.receipt is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    for place, overwrite in (
        (tmp_path / "full", False),
        (started[1], True),
        (started[1].parent, True),
    ):
        before = sorted(place.rglob("*"))
        with pytest.raises(StorageError):
            done.save(place, overwrite=overwrite)
        assert done.receipt is None and sorted(place.rglob("*")) == before
    done.save(tmp_path / "out")
    assert done.receipt is not None and verify(tmp_path / "out")


def test_what_was_written_is_what_the_receipt_says(written):
    found = verify(written)
    assert {entry["status"] for entry in found} == {"unchanged"}
    names = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    assert {entry["path"] for entry in found} == names - {"receipt.json"}


def test_who_may_read_one_of_the_files_may_read_all(written):
    modes = {
        file.name: file.stat().st_mode & 0o777 for file in written.rglob("*") if file.is_file()
    }
    assert set(modes.values()) == {modes["receipt.json"]}, modes


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", ".hidden", "context/x.json"])
def test_a_file_that_was_added_is_not_what_the_receipt_says(copy, name):
    (copy / name).write_text("x")
    with pytest.raises(CorruptCheckpoint, match=f"{name} added"):
        verify(copy)


def test_all_that_changed_is_named_at_once(copy):
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").unlink()
    (copy / "extra").symlink_to("/nowhere")
    (copy / "more").symlink_to("/")
    with pytest.raises(CorruptCheckpoint) as caught:
        verify(copy)
    for said in ("config.json changed", "model.safetensors missing", "extra added", "more added"):
        assert said in str(caught.value)


def test_a_document_with_infinities_is_json_all_the_same():
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    inf = float("inf")
    document = {"a": (1.5, inf), "b": [{"c": -inf}], "d": float("nan"), inf: 0, 0.5: 1}
    assert json.loads(dumps(document), parse_constant=refuse) == {
        "a": [1.5, {"$float": "inf"}],
        "b": [{"c": {"$float": "-inf"}}],
        "d": {"$float": "nan"},
        "inf": 0,
        "0.5": 1,
    }


def test_a_file_that_became_a_link_is_changed(copy, tmp_path):
    (copy / "config.json").rename(tmp_path / "elsewhere")
    (copy / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json changed"):
        verify(copy)


def from_links(started, folder, target):
    """A start from a copy of the checkpoint whose tokenizer is a link to ``target``."""
    shutil.copytree(started[1], folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("{}")
    (folder / "tokenizer.json").symlink_to(target)
    record = bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={folder}"])
    return bioinit.initialize(record)


def test_a_link_out_of_the_checkpoint_is_not_copied(started, tmp_path):
    done = from_links(started, tmp_path / "checkpoint", tmp_path / "secret")
    with pytest.raises(RefusedCheckpoint, match=r"tokenizer\.json is a link to .*secret"):
        done.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_a_hub_cache_are_followed(started, tmp_path):
    done = from_links(started, tmp_path / "m" / "snapshots" / "abc", tmp_path / "m/blobs/1234")
    done.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert verify(tmp_path / "out")
