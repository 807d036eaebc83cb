"""Checkpoints that megatron-core itself writes, held against the models that it wrote them from."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bioinit import formats
from bioinit.storage import Folder

DRIVER = Path(__file__).with_name("megatron_driver.py")
FORMATS = ("torch_dist", "zarr")
LAYOUTS = "tp1 tp2 pp2 tp2_swiglu pp2_swiglu_bf16 tp1_moe tp2_moe ep2_moe pp2_moe".split()
SECONDS = 240
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")
ON_DISK = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def writable(format_name: str) -> bool:
    """Whether what the driver needs for the format is installed."""
    if format_name != "zarr":
        return True
    found = importlib.util.find_spec("zarr") is not None
    return found and importlib.metadata.version("zarr").startswith("2.")


def in_each_format(*arguments: object) -> list[object]:
    """One case per format and argument; without zarr 2 those in zarr are skipped."""
    no_zarr = pytest.mark.skipif(not writable("zarr"), reason="zarr 2 writes what is read here")
    return [
        pytest.param(name, argument, marks=no_zarr if name == "zarr" else ())
        for name in FORMATS
        for argument in arguments
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder per format with one checkpoint per layout, all written by one pair of processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core", reason="megatron-core writes what is read here")
    folder = tmp_path_factory.mktemp("megatron")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(DRIVER), str(folder), *filter(writable, FORMATS)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def model_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The whole model, put together from what the processes held, under the names on disk."""
    parts: dict[str, dict[int, tuple[Tensor, int | None]]] = {}
    for file in sorted(folder.glob(f"{name}.rank*")):
        rank = torch.load(file, weights_only=True)
        for key, entry in rank["held"].items():
            if layer := LAYER.fullmatch(key):
                number = int(layer[1]) + rank["pipeline"] * rank["layers"]
                inside = layer[2]
                if expert := EXPERT.fullmatch(inside):
                    which = int(expert[1]) + rank["expert"] * rank["experts"]
                    inside = f"mlp.experts.local_experts.{which}.{expert[2]}"
                key = f"decoder.layers.{number}.{inside}"
            held = parts.setdefault(key, {})
            before = held.setdefault(rank["tensor"], (entry["tensor"], entry["dim"]))
            assert torch.equal(before[0], entry["tensor"]), "replicas are not alike"
    gated = "swiglu" in name or "moe" in name
    whole = {key: joined(key, held, gated) for key, held in parts.items()}
    return stacked(whole)


def joined(key: str, held: dict[int, tuple[Tensor, int | None]], gated: bool) -> Tensor:
    """One tensor from its parts on the tensor-parallel ranks."""
    tensors, dim = [held[rank][0] for rank in sorted(held)], held[0][1]
    if dim is None:
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
        return tensors[0]
    if gated and "linear_fc1" in key:
        halves = [tensor.chunk(2) for tensor in tensors]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(tensors, dim)


def stacked(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers, and experts in them, as the dims that they are on disk."""
    made: dict[str, Tensor] = {}
    layers: dict[str, dict[int, Tensor | dict[int, Tensor]]] = {}
    for key, tensor in whole.items():
        layer = LAYER.fullmatch(key)
        if layer is None:
            made[key] = tensor
            continue
        number, inside = int(layer[1]), layer[2]
        for live, disk in ON_DISK.items():
            inside = inside.replace(live, disk)
        if expert := EXPERT.fullmatch(inside):
            entry = layers.setdefault(f"mlp.experts.experts.{expert[2]}", {})
            entry.setdefault(number, {})[int(expert[1])] = tensor
        else:
            layers.setdefault(inside, {})[number] = tensor
    for inside, by_number in layers.items():
        rows = [by_number[number] for number in sorted(by_number)]
        if isinstance(rows[0], dict):
            rows = [torch.stack([row[expert] for expert in sorted(row)]) for row in rows]
        made[f"decoder.layers.{inside}"] = torch.stack(rows)
    return made


def read(path: Path, format_name: str) -> dict[str, Tensor]:
    """Every tensor of the checkpoint at ``path``, from its pieces."""
    name, contents = formats.open_weights(Folder.at(path))
    assert name == format_name
    found = {}
    for key, stored in contents.tensors.items():
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for file, offset, box in stored.pieces:
            part = torch.empty(box.sizes, dtype=stored.dtype)
            data = contents.files[file].read(offset, part.nbytes)
            region = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
            whole[region] = torch.frombuffer(bytearray(data), dtype=stored.dtype).view(box.sizes)
        found[key] = whole
    return found


@pytest.mark.parametrize(("format_name", "name"), in_each_format(*LAYOUTS))
def test_every_tensor_is_what_the_model_held(format_name, name, saved):
    expected, found = model_of(saved, name), read(saved / format_name / name, format_name)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("format_name", "case"), in_each_format(("tp1", 1), ("tp2", 2), ("tp2_moe", 2))
)
def test_the_writer_and_what_it_saved_beside_the_model_are_told(format_name, case, saved):
    name, ways = case
    metadata = formats.open_weights(Folder.at(saved / format_name / name))[1].metadata
    assert metadata["parallel"]["tensor"] == ways
    assert metadata["writer"].startswith("megatron-core")
    assert metadata["iteration"] == 5 and metadata["checkpoint_version"] == 3.0
    assert all(key.endswith("._extra_state") for key in metadata["byte_objects"]["names"])


def test_the_layouts_are_those_that_the_driver_writes(saved):
    for format_name in filter(writable, FORMATS):
        assert {path.name for path in (saved / format_name).iterdir()} == set(LAYOUTS)
