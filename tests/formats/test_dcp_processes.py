"""What several processes write together with torch's distributed checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bioinit import formats
from bioinit.formats.protocol import Contents
from bioinit.storage import Folder

DRIVER = Path(__file__).with_name("dcp_driver.py")
SECONDS = 240


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint per way to store, and what it should hold."""
    folder = tmp_path_factory.mktemp("dcp")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(DRIVER), str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "expected.pt", weights_only=True)


def whole(contents: Contents, name: str) -> Tensor:
    stored = contents.tensors[name]
    made = torch.empty(stored.shape, dtype=stored.dtype)
    for file, offset, box in stored.pieces:
        steps = zip(box.sizes, box.strides, strict=True)
        reach = 1 + sum((size - 1) * step for size, step in steps)
        data = bytearray(contents.files[file].read(offset, reach * stored.dtype.itemsize))
        region = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        flat = torch.frombuffer(data, dtype=stored.dtype)
        made[region] = flat.as_strided(box.sizes, box.strides)
    return made


@pytest.mark.parametrize(
    ("folder", "format_name", "prefix"),
    [
        ("plain", "torch_dist", "model."),
        ("threads", "torch_dist", ""),
        ("per_rank", "torch_dist", ""),
        ("image", "torch_dist", ""),
        ("hub", "hf_dcp", ""),
        ("hub_merged", "safetensors", ""),
        ("hub_merged/sharded", "hf_dcp", ""),
    ],
)
def test_a_module_sharded_by_fsdp2_comes_back_whole(folder, format_name, prefix, saved):
    name, contents = formats.open_weights(Folder.at(saved[0] / folder))
    assert name == format_name
    found = {key for key, stored in contents.tensors.items() if stored.kind == "weight"}
    expected = {prefix + key: tensor for key, tensor in saved[1]["weights"].items()}
    scalars = {key for key, tensor in expected.items() if not tensor.dim()}
    without = scalars if folder.startswith(("hub", "image")) else set()  # the driver left them out
    assert found == set(expected) - without
    for key in found:
        assert contents.tensors[key].dtype == expected[key].dtype
        assert torch.equal(whole(contents, key), expected[key]), key


@pytest.mark.parametrize("name", ["rows", "columns", "everywhere"])
def test_uneven_shards_of_either_dim_are_put_together(name, saved):
    contents = formats.open_weights(Folder.at(saved[0] / "cut"))[1]
    assert torch.equal(whole(contents, name), saved[1]["cut"][name])
    assert len(contents.tensors[name].pieces) == (1 if name == "everywhere" else 2)


def test_its_optimizer_is_listed_and_can_be_read(saved):
    contents = formats.open_weights(Folder.at(saved[0] / "plain"))[1]
    moments = [key for key in contents.tensors if key.endswith("first.weight.exp_avg")]
    assert moments and all(contents.tensors[key].kind == "optimizer" for key in moments)
    shape = saved[1]["weights"]["first.weight"].shape
    assert whole(contents, moments[0]).shape == shape and whole(contents, moments[0]).any()
    assert contents.metadata["layout"] == "2 files by 2 ranks"
