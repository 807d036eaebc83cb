"""Loads a torch_dist folder with megatron-core's own ``dist_checkpointing.load``: a script.

Whatever the folder lists is asked for as megatron's models ask: sharded tensors, and an object for
each extra state.
"""

import os
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

warnings.simplefilter("ignore")

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402

import bioinit  # noqa: E402


def main(folder: str) -> None:
    asked: dict[str, object] = {}
    objects = 0
    for name, stored in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            key, _, place = name.rpartition("/shard_")
            offset, shape = (tuple(map(int, part.split("."))) for part in place.split("_"))
            asked[name] = ShardedObject(key, None, shape, offset)
            objects += 1
        else:
            memory = torch.empty(stored.size, dtype=stored.properties.dtype)
            asked[name] = ShardedTensor.from_rank_offsets(name, memory)
    found = dist_checkpointing.load(asked, folder, strict=StrictHandling.RAISE_ALL)
    with bioinit.open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(found[name], checkpoint.read(name)), name
        print(f"loaded {len(checkpoint.tensors)} tensors and {objects} extra states")


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.cuda.current_device = lambda: "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/meeting", rank=0, world_size=1
        )
        main(sys.argv[1])
        dist.destroy_process_group()
