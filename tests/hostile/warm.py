"""One good checkpoint of each format, which the driver opens before it begins to watch."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.contexts import write_contexts
from tests.hostile.corpus import Group
from tests.hostile.craft import (
    STATE,
    SerializationFormat,
    nemo,
    saved,
    tar_member,
    write_array,
    write_dcp,
    write_layers,
    write_zarr,
)

GROUP = Group("warm")


@GROUP.good()
def safetensors(folder):
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


@GROUP.good()
def torch_zip(folder):
    (folder / "model.pt").write_bytes(saved(STATE))


@GROUP.good()
def torch_legacy(folder):
    (folder / "model.pt").write_bytes(saved(STATE, old=True))


@GROUP.good()
def torch_dist(folder):
    write_dcp(folder / "weights", common={"iteration": 1})


@GROUP.good()
def torch_dist_of_safetensors(folder):
    write_dcp(folder, kind=SerializationFormat.SAFETENSORS)


@GROUP.good()
def zarr(folder):
    import numcodecs

    write_zarr(folder)
    for codec in (numcodecs.Blosc(), numcodecs.Zlib(), numcodecs.Zstd(), numcodecs.LZ4()):
        said = codec.get_config()
        write_array(
            folder,
            said["id"],
            torch.ones(64),
            pack=lambda raw, c=codec: bytes(c.encode(raw)),
            compressor=said,
        )
    assert zlib


@GROUP.good()
def nemo_archive(folder):
    import gzip

    (folder / "model.nemo").write_bytes(gzip.compress(nemo(tar_member("./tokenizer.model", b"x"))))


@GROUP.good()
def neox(folder):
    write_layers(folder)


@GROUP.good()
def deepspeed(folder):
    (folder / "mp_rank_00_model_states.pt").write_bytes(saved({"module": STATE}))


@GROUP.good()
def megatron(folder):
    inner = folder / "iter_0000001" / "mp_rank_00"
    inner.mkdir(parents=True)
    value = {"model": {"language_model": dict(STATE)}, "checkpoint_version": 3.0}
    (inner / "model_optim_rng.pt").write_bytes(saved(value))


@GROUP.bad()
def nothing(folder):
    pass


@GROUP.bad()
def a_damaged_file(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 50)


for name, write in write_contexts().items():
    GROUP.add(f"context_{name}", write, kind="good")

GOOD = GROUP.cases
assert Path
