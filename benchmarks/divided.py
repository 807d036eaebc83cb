"""One rank of a few, in this fresh process: started by ``ranks.py``, which talks to it by lines.

It imports what its way needs, meets the others, loads a tiny checkpoint once so that no lazy import
and no first connection is on the clock, says ``ready``, waits for ``go``, loads, touches every page
of its shards, and prints one line of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import once
import torch
from torch import nn


@dataclass(frozen=True)
class Task:
    """What a rank loads, and how the model is divided."""

    path: str
    layout: str
    size: int
    parallel: str = "off"

    @property
    def files(self) -> list[str]:
        """Its safetensors files."""
        return [str(file) for file in sorted(Path(self.path).glob("*.safetensors"))]


def whole(task: Task) -> nn.Module:
    """The decoder on meta, by its own config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(task.path)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def divided(task: Task) -> nn.Module:
    """The decoder on meta, in shards."""
    model = whole(task)
    LAYOUTS[task.layout](model, task.size)
    return model


def rows(model: nn.Module, size: int) -> None:
    """FSDP2: every parameter along dim 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def columns(model: nn.Module, size: int) -> None:
    """Every weight along dim 1: the layout that costs a reader most."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                placement = Shard(1) if parameter.dim() == 2 else Replicate()
                made = distribute_tensor(parameter.detach(), mesh, [placement])
                module._parameters[name] = nn.Parameter(made)


def tensor_parallel(model: nn.Module, size: int) -> None:
    """Rows and columns, as a plan for tensor parallelism alternates them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, object] = {
        "model.embed_tokens": RowwiseParallel(),
        "lm_head": ColwiseParallel(),
    }
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[f"model.layers.*.{kind}"] = ColwiseParallel()
    for kind in ("mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{kind}"] = ColwiseParallel()
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{kind}"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (size,)), plan)


def replicas(model: nn.Module, size: int) -> None:
    """Every rank has all of it."""


LAYOUTS: dict[str, Callable[[nn.Module, int], None]] = {
    "rows": rows,
    "columns": columns,
    "tp": tensor_parallel,
    "replicas": replicas,
}


def ours(task: Task, model: nn.Module) -> nn.Module:
    """``bioinit.load_weights`` into the divided model on meta."""
    import bioinit

    bioinit.load_weights(model, task.path)
    return model


def initialize(task: Task, model: nn.Module) -> nn.Module:
    """``bioinit.initialize`` of a replicated model, each replica reading all, or its part.

    It builds a model of its own, on the clock.
    """
    import bioinit

    said = [f"model.initial_ckpt_path={task.path}", "placement.dtype=bfloat16"]
    said += ["placement.strategy=ddp", f"placement.parallel_load={task.parallel}"]
    return bioinit.initialize(bioinit.compose("auto/as_saved", said)).model


def dcp(task: Task, model: nn.Module) -> nn.Module:
    """``torch.distributed.checkpoint.load`` into the divided model's state dict."""
    from torch.distributed import checkpoint

    model.to_empty(device="cpu")
    checkpoint.load(model.state_dict(), checkpoint_id=task.path)
    return model


def slices(task: Task, model: nn.Module) -> nn.Module:
    """``safe_open`` and ``get_slice``, copied into the shards."""
    from safetensors import safe_open

    model.to_empty(device="cpu")
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for file in task.files:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():
                    local, region = part(wanted[name])
                    local.copy_(stored.get_slice(name)[region])
    return model


def part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Local memory, and which region of the whole it holds."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple(slice(0, n) for n in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    region = tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))
    return tensor._local_tensor.detach(), region


TRANSFORMERS = ("transformers", "transformers.models.llama.modeling_llama")
Way = Callable[[Task, nn.Module], nn.Module]
"""Loads what a task names into the divided model, which is on meta."""

WAYS: dict[str, tuple[Way, tuple[str, ...]]] = {
    "load_weights": (ours, (*TRANSFORMERS, "bioinit")),
    "initialize": (initialize, (*TRANSFORMERS, "bioinit")),
    "dcp": (dcp, (*TRANSFORMERS, "torch.distributed.checkpoint")),
    "slices": (slices, (*TRANSFORMERS, "safetensors.torch")),
}


def shards(model: nn.Module) -> list[torch.Tensor]:
    """The local memory of every parameter."""
    return [part(parameter)[0] for parameter in model.parameters()]


def differing(model: nn.Module, path: str) -> list[str]:
    """Parameters whose shards are not what one safetensors file holds there."""
    from safetensors import safe_open

    wrong = []
    with safe_open(str(Path(path).parent / "single" / "model.safetensors"), framework="pt") as f:
        stored = set(f.keys())
        for name, parameter in model.named_parameters():
            local, region = part(parameter)
            if name not in stored or not torch.equal(local, f.get_slice(name)[region]):
                wrong.append(name)
    return wrong


def measure(way: Way, task: Task) -> tuple[nn.Module, dict[str, object]]:
    """Load and touch on the clock, with what the kernel counted meanwhile."""
    model = divided(task)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    say("ready")
    if sys.stdin.readline().strip() != "go":
        raise SystemExit("nobody said go")
    before, io_before = once.status(), once.io()
    begin = time.perf_counter()
    model = way(task, model)
    there = time.perf_counter()
    mine = shards(model)
    read = once.io()["rchar"] - io_before["rchar"]
    once.touch(mine)
    end = time.perf_counter()
    after = once.status()
    held = sum(tensor.nbytes for tensor in mine)
    return model, {
        "seconds": end - begin,
        "call_seconds": there - begin,
        "shard_bytes": held,
        "bytes_by_calls": read,
        "resident_peak": after["VmHWM"] - before["VmRSS"],
        "anonymous": after["RssAnon"] - before["RssAnon"],
    }


def main() -> None:
    """Answer one request."""
    global _answers
    request = json.loads(sys.argv[1])
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not answer for us
    way, imports = WAYS[request["way"]]
    for name in imports:
        importlib.import_module(name)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    task = Task(request["path"], request["layout"], request["size"], request["parallel"])
    tiny = Task(request["warm_up"], *vars_after(task))
    way(tiny, divided(tiny))
    model, result = measure(way, task)
    say("done")
    if request["check"]:
        result["differing"] = differing(model, task.path)
    say(json.dumps(result))
    torch.distributed.barrier()
    os._exit(0)  # freeing gigabytes tidily is nobody's time


def vars_after(task: Task) -> Iterator[object]:
    """The fields of ``task`` but its path."""
    return (getattr(task, name) for name in ("layout", "size", "parallel"))


_answers = sys.stdout


def say(line: str) -> None:
    """A line for ``ranks.py``."""
    print(line, file=_answers, flush=True)


if __name__ == "__main__":
    main()
