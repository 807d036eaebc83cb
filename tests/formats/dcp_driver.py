"""Writes checkpoints with torch's distributed checkpoint in two processes: run as a script.

``test_dcp_processes.py`` reads what it wrote: a module sharded by FSDP2 with its optimizer,
in each way that torch can store it, and beside them the whole values that the processes gathered.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

WORLD = 2


class Small(nn.Module):
    """Dims that do not divide, one row that only one process holds, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.one_row = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.tensor([2.5]))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sum() + self.one_row.weight.sum() + self.scale


def gathered(state: dict[str, object]) -> dict[str, torch.Tensor]:
    """The whole tensors behind the shards of a flat state dict."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def process(rank: int, folder: str, meeting: str) -> None:
    """One of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    root = Path(folder)
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    model = fully_shard(Small(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(6)).backward()
    optimizer.step()
    weights = get_model_state_dict(model)
    state = {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=root / "plain")
    dcp.save(weights, storage_writer=dcp.FileSystemWriter(root / "threads", thread_count=2))
    flat = {name: value for name, value in weights.items() if value.dim()}
    writer = dcp.FileSystemWriter(
        root / "image", serialization_format=SerializationFormat.SAFETENSORS
    )
    dcp.save(flat, storage_writer=writer)
    for name, merge in (("hub", False), ("hub_merged", True)):
        hub = dcp.HuggingFaceStorageWriter(
            str(root / name), save_distributed=True, enable_consolidation=merge
        )
        dcp.save(dict(flat), storage_writer=hub)
    dcp.save(weights, checkpoint_id=root / "per_rank", use_collectives=False)
    torch.manual_seed(1)
    grid = torch.randn(5, 7)
    cut = {
        "rows": distribute_tensor(grid, mesh, [Shard(0)]),
        "columns": distribute_tensor(grid, mesh, [Shard(1)]),
        "everywhere": distribute_tensor(grid, mesh, [Replicate()]),
    }
    dcp.save(cut, checkpoint_id=root / "cut")
    whole, cut_whole = gathered(weights), gathered(cut)
    if rank == 0:
        torch.save({"weights": whole, "cut": cut_whole}, root / "expected.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(process, (sys.argv[1], f"{scratch}/meeting"), nprocs=WORLD)
