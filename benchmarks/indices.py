"""How long opening takes: a 70-billion-parameter Llama as Megatron-Core would have saved it.

    python benchmarks/indices.py                  # tensor-parallel over 8 ranks, with its optimizer
    python benchmarks/indices.py --layers 4 --without-plans

True index, true item headers, true lengths; the numbers are holes, so the terabyte takes megabytes
of disk. Opening happens in a fresh process, once to warm the page cache and then for the clock.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

HIDDEN, INNER, VOCAB, QKV = 8192, 28672, 128256, 10240
STATES = ("exp_avg", "exp_avg_sq", "fp32_param")
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Cut = tuple[str, tuple[int, ...], int | None, int]
"""Name, whole shape, the dim that ranks share, and how many chunks of it each of them has."""


def weights(layers: int) -> Iterator[Cut]:
    """The tensors of the model; those of layers are stacked."""
    at = "module.decoder.layers"
    yield "module.embedding.word_embeddings.weight", (VOCAB, HIDDEN), 0, 1
    yield f"{at}.self_attention.linear_qkv.layer_norm_weight", (layers, HIDDEN), None, 1
    yield f"{at}.self_attention.linear_qkv.weight", (layers, QKV, HIDDEN), 1, 1
    yield f"{at}.self_attention.linear_proj.weight", (layers, HIDDEN, HIDDEN), 2, 1
    yield f"{at}.mlp.linear_fc1.layer_norm_weight", (layers, HIDDEN), None, 1
    yield f"{at}.mlp.linear_fc1.weight", (layers, 2 * INNER, HIDDEN), 1, 2
    yield f"{at}.mlp.linear_fc2.weight", (layers, HIDDEN, INNER), 2, 1
    yield "module.decoder.final_layernorm.weight", (HIDDEN,), None, 1
    yield "module.output_layer.weight", (VOCAB, HIDDEN), 0, 1


def chunks(cut: Cut, ranks: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Rank, offsets and sizes of every chunk."""
    name, shape, dim, parts = cut
    stacked = ".layers." in name
    sizes = [1, *shape[1:]] if stacked else list(shape)
    count = 1 if dim is None else ranks * parts
    if dim is not None:
        sizes[dim] //= count
    for layer in range(shape[0] if stacked else 1):
        for number in range(count):
            offsets = [0] * len(shape)
            if stacked:
                offsets[0] = layer
            if dim is not None:
                offsets[dim] = number * sizes[dim]
            yield number % ranks, tuple(offsets), tuple(sizes)


class Files:
    """Sparse ``.distcp`` files, two per rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: dict[str, int] = {}
        self.streams: dict[str, object] = {}
        self.ready: dict[tuple[object, ...], tuple[bytes, bytes, int]] = {}
        self.count = 0

    def add(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> _StorageInfo:
        """Append an item of these sizes."""
        self.count += 1
        name = f"__{rank}_{self.count % 2}.distcp"
        if name not in self.streams:
            self.streams[name] = open(self.folder / name, "wb")
        head, tail, length = self._ends(sizes, dtype)
        begin = self.ends.get(name, 0)
        stream = self.streams[name]
        stream.seek(begin)
        stream.write(head)
        stream.seek(begin + length - len(tail))
        stream.write(tail)
        self.ends[name] = begin + length
        return _StorageInfo(name, begin, length)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def _ends(self, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes, int]:
        """What torch.save writes before and after the numbers, and the length of it all."""
        key = (sizes, dtype)
        if key not in self.ready:
            path = self.folder / "item"
            with torch.serialization.skip_data():
                torch.save(torch.empty(sizes, dtype=dtype), path)
            length = path.stat().st_size
            with open(path, "rb") as stream:
                head = stream.read(min(1024, length))
                stream.seek(max(0, length - 4096))
                tail = stream.read()
            path.unlink()
            self.ready[key] = head, tail, length
        return self.ready[key]


def build(folder: Path, layers: int, ranks: int, *, plans: bool) -> dict[str, int]:
    """Write the checkpoint; how much of what there is."""
    folder.mkdir(parents=True)
    files, described, places = Files(folder), {}, {}
    planned: list[list[WriteItem]] = [[] for _ in range(ranks)]
    items = 0
    for cut in weights(layers):
        name, shape = cut[:2]
        kinds = [(name, torch.bfloat16)]
        kinds += [(f"optimizer.state.{state}.{name}", torch.float32) for state in STATES]
        for key, dtype in kinds:
            properties = TensorProperties(dtype=dtype)
            boxes = list(chunks(cut, ranks))
            described[key] = TensorStorageMetadata(
                properties,
                torch.Size(shape),
                [ChunkStorageMetadata(torch.Size(at), torch.Size(n)) for _, at, n in boxes],
            )
            for number, (rank, at, n) in enumerate(boxes):
                index = MetadataIndex(key, at, index=number)
                places[index] = files.add(rank, n, dtype)
                chunk = ChunkStorageMetadata(torch.Size(at), torch.Size(n))
                data = TensorWriteData(chunk, properties, torch.Size(shape))
                mine = MetadataIndex(key, at, index=number)
                planned[rank].append(WriteItem(mine, WriteItemType.SHARD, tensor_data=data))
                items += 1
        if name.endswith(("linear_qkv.weight", "linear_proj.weight", "fc1.weight", "fc2.weight")):
            for layer in range(layers):
                key = f"{name.removesuffix('.weight')}._extra_state/shard_{layer}_{layers}"
                described[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", 0, 1000)
    files.close()
    index = Metadata(described, None, places, StorageMeta(), "1.0.0")
    if plans:
        index.all_local_plans = [SavePlan(items) for items in planned]
    raw = pickle.dumps(index)
    (folder / ".metadata").write_bytes(raw)
    torch.save({"iteration": 1000, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(CONFIG))
    return {"tensors": len(described), "items": items, "index_bytes": len(raw)}


def open_once(path: str) -> None:
    """In the fresh process: seconds for opening, twice."""
    from bioinit import formats
    from bioinit.storage import Folder

    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        contents = formats.open_weights(Folder.at(path))[1]
        seconds.append(time.perf_counter() - begin)
    read = sum(file.bytes_read for file in contents.files if file.how is None)
    print(json.dumps({"first": seconds[0], "second": seconds[1], "bytes_read": read}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-plans", action="store_true", help="as before megatron-core 0.9")
    parser.add_argument("--open", help="only open what lies here, once")
    chosen = parser.parse_args()
    if chosen.open:
        open_once(chosen.open)
        return
    with tempfile.TemporaryDirectory(prefix="bioinit-index-") as scratch:
        folder = Path(scratch) / "llama"
        made = build(folder, chosen.layers, chosen.ranks, plans=not chosen.without_plans)
        rounds = []
        for _ in range(chosen.rounds):
            command = [sys.executable, __file__, "--open", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
        for key in ("first", "second"):
            made[f"seconds_{key}"] = statistics.median(found[key] for found in rounds)
        made["bytes_read"] = rounds[-1]["bytes_read"]
        print(json.dumps(made))


if __name__ == "__main__":
    main()
