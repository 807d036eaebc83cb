"""Texts of a checkpoint that were made to fill the memory, and folders with odd names."""

import json
import os
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from bioinit.contexts import open_checkpoint
from bioinit.errors import CorruptCheckpoint, StorageError
from bioinit.storage import Folder


@pytest.mark.parametrize("part", ["[],", "{},", "1,", '"",', "[[1]],"])
def test_a_text_that_means_far_more_than_it_is_long_is_corrupt(part, tmp_path):
    text = "[" + part * (8_000_000 // len(part)) + "0]"
    (tmp_path / "x.json").write_text(text)
    folder, begin = Folder.at(tmp_path), time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint, match=r"x\.json is not usable JSON: it spells"):
            folder.read_json("x.json")
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 1


def test_the_index_of_a_hundred_thousand_tensors_is_read(tmp_path):
    names = {f"model.layers.{n // 1000}.mlp.experts.{n}.down_proj.weight" for n in range(100_000)}
    value = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00042.safetensors")}
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(value, indent=indent))
        begin = time.process_time()
        assert Folder.at(tmp_path).read_json("x.json") == value
        assert time.process_time() - begin < 2


def test_a_text_without_end_is_corrupt_and_not_read(tmp_path):
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 1 << 40)
    with pytest.raises(CorruptCheckpoint, match=f"has {1 << 40} bytes.*67108864 at the most"):
        Folder.at(tmp_path).read_json("x.json")
    with pytest.raises(CorruptCheckpoint, match="1000 at the most"):
        Folder.at(tmp_path).read_text("x.json", most=1000)


def test_a_folder_cannot_write_lines_of_its_own(tmp_path):
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(StorageError) as caught:
        Folder.at(tmp_path / "a\nb").folder("c\nd")
    assert str(caught.value).isprintable()


def test_a_file_whose_name_is_no_text_has_a_digest(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    path = os.fsencode(tmp_path) + b"/model\xff.safetensors"
    os.rename(tmp_path / "x.safetensors", path)
    with open_checkpoint(os.fsdecode(path)) as checkpoint:
        assert len(checkpoint.digest) == 64 and checkpoint.read("a").tolist() == [0, 0]
