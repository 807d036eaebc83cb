"""Opens with megatron-core what our writer made of megatron-core's own checkpoints: a script.

Two processes over gloo save a small model in each layout asked for, the first one writes all of it
again with our reader and writer, in chunks and parts much smaller than any real one, and both load
the two side by side into models of their own. What they find to differ ends the script.

    python -m tests.formats.megatron_opener FOLDER LAYOUT...
"""

import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from bioinit.contexts import open_checkpoint
from bioinit.formats import load as load_format
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.formats.torch_dist import parts
from bioinit.storage import Journal
from tests.formats.megatron_driver import LAYOUTS, VOCAB, WORLD, build, fill, save_torch_dist


def write_again(original: Path, folder: Path) -> None:
    """The checkpoint as our writer makes it, in chunks and parts much smaller than any real one."""
    parts.CHUNK_BYTES, parts.SMALLEST_PART = 700, 5000
    folder.mkdir(parents=True)
    index = pickle.loads((original / ".metadata").read_bytes())
    names = [k for k, v in index.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)]
    with open_checkpoint(original) as checkpoint, Journal(folder, "") as journal:
        outgoing = []
        for key in checkpoint.tensors:
            tensor = checkpoint.read(key)
            flat = tensor.contiguous().view(-1)

            def give(first: int, memory: torch.Tensor, flat: torch.Tensor = flat) -> None:
                memory[...] = flat[first : first + memory.numel()]

            outgoing.append(Outgoing(key, tuple(tensor.shape), tensor.dtype, give))
        options = WriteOptions(
            objects=dict.fromkeys(names, b""), common={"iteration": 5, "checkpoint_version": 3.0}
        )
        load_format("torch_dist").write(folder, outgoing, options, journal)
    (folder / Journal.NAME).unlink()
    assert len(list(folder.glob("*.distcp"))) > 2


def loaded(folder: Path, name: str) -> torch.nn.Module:
    """A new model of the layout, with what megatron-core reads in ``folder``."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    torch.manual_seed(len(str(folder)))
    model = build(LAYOUTS[name])
    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(folder), strict=StrictHandling.RAISE_ALL
    )
    assert state["iteration"] == 5 and state["checkpoint_version"] == 3.0
    model.load_state_dict(state["model"])
    return model.eval()


def compare(original: Path, ours: Path, name: str) -> None:
    from megatron.core import tensor_parallel

    theirs, found = loaded(original, name), loaded(ours, name)
    for (key, one), (other_key, other) in zip(
        theirs.named_parameters(), found.named_parameters(), strict=True
    ):
        assert key == other_key and one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (name, key)
    if name == "tp1":
        # Dropout is off, but attention asks for the state of a GPU's random numbers all the same.
        tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: nullcontext()
        tokens = torch.arange(8)[None] % VOCAB
        mask = torch.ones(1, 1, 8, 8).triu(1).bool()
        with torch.no_grad():
            one, other = (model(tokens, torch.arange(8)[None], mask) for model in (theirs, found))
        assert one.shape == (1, 8, VOCAB) and torch.equal(one, other) and one.isfinite().all()


def process(rank: int, folder: str, names: Sequence[str], meeting: str) -> None:
    """One of the two processes."""
    from megatron.core import parallel_state

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    for name in names:
        layout = LAYOUTS[name]
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert
        )
        original, ours = Path(folder, name, "theirs"), Path(folder, name, "ours")
        model = build(layout)
        fill(model, layout)
        if rank == 0:
            original.mkdir(parents=True)
        dist.barrier()
        state = {"model": model.sharded_state_dict(), "iteration": 5, "checkpoint_version": 3.0}
        save_torch_dist(state, original)
        if rank == 0:
            write_again(original, ours)
        dist.barrier()
        compare(original, ours, name)
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder, *names = sys.argv[1:]
        torch.multiprocessing.spawn(process, (folder, names, f"{scratch}/meeting"), nprocs=WORLD)
