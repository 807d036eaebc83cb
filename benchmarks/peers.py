"""The ways to load a checkpoint that people use today, each as its users call it.

Every way gets a ``Job`` and returns a module whose parameters can be trained. A module is built in
the cheapest way that its loader allows: on meta where the loader brings its own tensors
(``assign``), with uninitialized memory where it copies into the module. Nothing here is slowed
down: no random initialization, no default dtype detour.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import Cells
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be loaded, and as what."""

    path: str
    model: str
    dtype: str = "bfloat16"
    device: str = "cpu"
    cells: int = 0
    skip: tuple[str, ...] = ()
    check_finite: bool = False

    @functools.cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the parameters end in."""
        return getattr(torch, self.dtype)

    def wants(self, name: str) -> bool:
        """Whether the stored tensor is not skipped."""
        return not any(name == s or name.startswith(s + ".") for s in self.skip)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to load: what to import before the clock, which container, what it can do."""

    label: str
    run: Callable[[Job], object]
    imports: tuple[str, ...] = ()
    container: str = "single"
    can: frozenset[str] = field(default_factory=lambda: frozenset({"cells", "float32", "cuda"}))


def meta_model(job: Job) -> nn.Module:
    """The module with parameters on meta and real buffers."""
    if job.model == "cells":
        return Cells(job.cells, "meta")
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return decoder(job)


def empty_model(job: Job) -> nn.Module:
    """The module with its own uninitialized memory."""
    if job.model == "cells":
        return Cells(job.cells, job.device)
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(job.device):
        return decoder(job)


def decoder(job: Job) -> nn.Module:
    """The module by its own config, wherever the caller's context puts its parameters."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(job.path)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=job.torch_dtype)


def finish(model: nn.Module, job: Job) -> nn.Module:
    """What is left for a loader that keeps the stored dtype, or that leaves buffers on the CPU."""
    return model.to(device=job.device, dtype=None if job.model == "cells" else job.torch_dtype)


def safetensors_files(job: Job) -> list[str]:
    """The files of a folder, by its index if it has one."""
    folder = Path(job.path)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [str(folder / "model.safetensors")]
    names = set(json.loads(index.read_text())["weight_map"].values())
    return [str(folder / name) for name in sorted(names)]


def _safetensors_states(job: Job, backend: str) -> Iterator[dict[str, Tensor]]:
    from safetensors.torch import load_file

    for file in safetensors_files(job):
        yield load_file(file, device=job.device, backend=backend)


def safetensors_copy(job: Job) -> nn.Module:
    """``load_file``, then ``load_state_dict`` copies into the module."""
    model = empty_model(job)
    for state in _safetensors_states(job, "mmap"):
        model.load_state_dict(state, strict=False)
    return model


def safetensors_assign(job: Job, backend: str = "mmap") -> nn.Module:
    """``load_file``, then ``load_state_dict(assign=True)`` on a module on meta."""
    model = meta_model(job)
    for state in _safetensors_states(job, backend):
        model.load_state_dict(state, strict=False, assign=True)
    return finish(model, job)


def safetensors_pread(job: Job) -> nn.Module:
    """The same with the reader that does not map the file."""
    return safetensors_assign(job, "pread")


def safetensors_open(job: Job) -> nn.Module:
    """``safe_open`` and a copy tensor by tensor: what one writes to skip some."""
    from safetensors import safe_open

    model = empty_model(job)
    targets = model.state_dict()
    for file in safetensors_files(job):
        with safe_open(file, framework="pt", device=job.device) as stored:
            for name in stored.keys():
                if job.wants(name):
                    targets[name].copy_(stored.get_tensor(name))
    return model


def transformers_from_pretrained(job: Job) -> nn.Module:
    """``AutoModelForCausalLM.from_pretrained``."""
    import transformers

    place = {"device_map": job.device} if job.device != "cpu" else {}
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(job.path, dtype=job.torch_dtype, **place)


def accelerate_load(job: Job) -> nn.Module:
    """``load_checkpoint_in_model`` on an empty-weights module."""
    from accelerate import load_checkpoint_in_model

    model = meta_model(job)
    dtype = None if job.model == "cells" else job.torch_dtype
    where = job.device if job.device == "cpu" else 0
    load_checkpoint_in_model(model, job.path, device_map={"": where}, dtype=dtype)
    return finish(model, job)


def torch_copy(job: Job) -> nn.Module:
    """``torch.load(mmap=True)``, then ``load_state_dict`` copies."""
    file = str(Path(job.path) / "pytorch_model.bin")
    model = empty_model(job)
    stored = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    wanted = {name: tensor for name, tensor in stored.items() if job.wants(name)}
    model.load_state_dict(wanted, strict=False)
    return model


def torch_assign(job: Job) -> nn.Module:
    """``torch.load(mmap=True)``, then ``load_state_dict(assign=True)``."""
    file = str(Path(job.path) / "pytorch_model.bin")
    model = meta_model(job)
    stored = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    model.load_state_dict(stored, assign=True)
    return finish(model, job)


def dcp_load(job: Job) -> nn.Module:
    """``torch.distributed.checkpoint.load`` into the module's own state dict."""
    from torch.distributed import checkpoint as dcp

    model = empty_model(job)
    dcp.load(model.state_dict(), checkpoint_id=job.path, no_dist=True)
    return model


def megatron_load(job: Job) -> nn.Module:
    """``megatron.core.dist_checkpointing.load`` into the module's own state dict, as one rank."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    model = empty_model(job)
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_device = lambda: "cpu"
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    wanted = {
        name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, tensor)
        for name, tensor in model.state_dict().items()
    }
    try:
        loaded = dist_checkpointing.load(wanted, str(job.path), validate_access_integrity=False)
    finally:
        dist.destroy_process_group()
    model.load_state_dict(loaded, assign=True)
    return model


def tensorstore_load(job: Job) -> nn.Module:
    """Each zarr array through tensorstore, as Megatron-Core did, copied into its parameter."""
    import tensorstore

    model = empty_model(job)
    opened = {}
    for name in model.state_dict():
        store = {"driver": "file", "path": f"{Path(job.path).resolve()}/{name}"}
        opened[name] = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
    reading = {name: array.read() for name, array in opened.items()}
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            numbers = torch.from_numpy(reading.pop(name).result().view("int16"))
            parameter.copy_(numbers.view(torch.bfloat16))
    return model


def fastsafetensors_load(job: Job) -> nn.Module:
    """``fastsafe_open`` over all files; its tensors own their buffer, so they are assigned."""
    from fastsafetensors import fastsafe_open

    model = meta_model(job)
    device = "cuda:0" if job.device == "cuda" else job.device
    with fastsafe_open(safetensors_files(job), nogds=True, device=device) as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}
        model.load_state_dict(state, assign=True)
    return finish(model, job)


def runai_load(job: Job) -> nn.Module:
    """``SafetensorsStreamer``, assigning what it yields."""
    from runai_model_streamer import SafetensorsStreamer

    model = meta_model(job)
    device = "cuda:0" if job.device == "cuda" else job.device
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(safetensors_files(job), device=device)
        model.load_state_dict(dict(streamer.get_tensors()), assign=True)
    return finish(model, job)


SAFETENSORS = ("safetensors.torch", "accelerate", "transformers")
WHOLE_MODEL = frozenset({"float32", "cuda"})
PEERS = {
    "safetensors_copy": Way(
        label="safetensors load_file + load_state_dict",
        run=safetensors_copy,
        imports=SAFETENSORS,
    ),
    "safetensors_assign": Way(
        label="safetensors load_file + load_state_dict(assign)",
        run=safetensors_assign,
        imports=SAFETENSORS,
    ),
    "safetensors_pread": Way(
        label="safetensors load_file(backend=pread) + assign",
        run=safetensors_pread,
        imports=SAFETENSORS,
    ),
    "safetensors_open": Way(
        label="safetensors safe_open + copy", run=safetensors_open, imports=SAFETENSORS
    ),
    "from_pretrained": Way(
        label="transformers from_pretrained",
        run=transformers_from_pretrained,
        imports=("transformers", "accelerate"),
        can=WHOLE_MODEL,
    ),
    "accelerate": Way(
        label="accelerate load_checkpoint_in_model",
        run=accelerate_load,
        imports=("accelerate", "transformers"),
    ),
    "torch_copy": Way(
        label="torch.load(mmap) + load_state_dict",
        run=torch_copy,
        imports=("transformers",),
        container="bin",
    ),
    "torch_assign": Way(
        label="torch.load(mmap) + load_state_dict(assign)",
        run=torch_assign,
        imports=("transformers", "accelerate"),
        container="bin",
    ),
    "dcp": Way(
        label="torch.distributed.checkpoint.load",
        run=dcp_load,
        imports=("transformers", "torch.distributed.checkpoint"),
        container="dcp",
    ),
    "megatron": Way(
        label="megatron-core dist_checkpointing.load",
        run=megatron_load,
        imports=("transformers", "megatron.core.dist_checkpointing"),
        container="torch_dist",
        can=frozenset(),
    ),
    "tensorstore": Way(
        label="tensorstore (zarr driver) + copy",
        run=tensorstore_load,
        imports=("transformers", "tensorstore"),
        container="zarr",
        can=frozenset(),
    ),
    "fastsafetensors": Way(
        label="fastsafetensors fastsafe_open + assign",
        run=fastsafetensors_load,
        imports=("fastsafetensors", "accelerate", "transformers"),
    ),
    "runai": Way(
        label="runai-model-streamer + assign",
        run=runai_load,
        imports=("runai_model_streamer", "transformers", "accelerate"),
    ),
}


def import_all(way: Way) -> None:
    """Import what a way needs, so that no import is on the clock."""
    for name in way.imports:
        importlib.import_module(name)
