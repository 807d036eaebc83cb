"""A mixture of experts with 1.4 trillion parameters, of which only headers exist.

``safetensors`` writes it as transformers names Mixtral's tensors, one per expert and projection,
over hundreds of shards; ``torch_dist`` as Megatron-Core writes it on tensor-parallel ranks, all
layers and experts stacked, more than a million chunks. True headers, true lengths; the weights are
holes.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARD_BYTES = 5 * 10**9
Named = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Giant:
    """Its sizes, in Megatron's words."""

    layers: int = 400
    experts: int = 128
    hidden: int = 4096
    ffn: int = 2208
    heads: int = 32
    groups: int = 8
    channels: int = 128
    vocab: int = 128256

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(_numel(shape) for _, shape in hf_tensors(self))


SMALL = Giant(layers=8, experts=8, hidden=64, ffn=32, heads=4, groups=2, channels=16, vocab=512)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def config(giant: Giant) -> dict[str, object]:
    """Its ``config.json``."""
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": giant.vocab,
        "hidden_size": giant.hidden,
        "intermediate_size": giant.ffn,
        "num_hidden_layers": giant.layers,
        "num_attention_heads": giant.heads,
        "num_key_value_heads": giant.groups,
        "head_dim": giant.channels,
        "num_local_experts": giant.experts,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
    }


def hf_tensors(giant: Giant) -> Iterator[Named]:
    """Names and shapes on the hub."""
    hidden, ffn = giant.hidden, giant.ffn
    queries, keys = giant.heads * giant.channels, giant.groups * giant.channels
    yield "model.embed_tokens.weight", (giant.vocab, hidden)
    for layer in range(giant.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{at}.block_sparse_moe.gate.weight", (giant.experts, hidden)
        for expert in range(giant.experts):
            inside = f"{at}.block_sparse_moe.experts.{expert}"
            yield f"{inside}.w1.weight", (ffn, hidden)
            yield f"{inside}.w2.weight", (hidden, ffn)
            yield f"{inside}.w3.weight", (ffn, hidden)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (giant.vocab, hidden)


def safetensors(folder: Path, giant: Giant, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Write shards of about ``shard_bytes`` and their index; says how much there is."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[Named]] = [[]]
    held = 0
    for name, shape in hf_tensors(giant):
        size = 2 * _numel(shape)
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, shape))
        held += size
    placed: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        total += _shard(folder / file, tensors)
        placed.update(dict.fromkeys((name for name, _ in tensors), file))
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(giant)))
    return {"tensors": len(placed), "files": len(groups), "bytes": total}


def _shard(path: Path, tensors: list[Named]) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * _numel(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + end)
    return end


Cut = tuple[str, tuple[int, ...], int, int | None, int]
"""Name, whole shape, stacked dims, the dim that ranks share, and how many chunks each has of it."""


def megatron_tensors(giant: Giant) -> Iterator[Cut]:
    """The tensors as Megatron-Core stacks them on the disk."""
    layers, experts, hidden, ffn = giant.layers, giant.experts, giant.hidden, giant.ffn
    fused = (giant.heads + 2 * giant.groups) * giant.channels
    at = "decoder.layers"
    yield "embedding.word_embeddings.weight", (giant.vocab, hidden), 0, 0, 1
    yield f"{at}.input_layernorm.weight", (layers, hidden), 1, None, 1
    yield f"{at}.self_attention.linear_qkv.weight", (layers, fused, hidden), 1, 1, 1
    queries = giant.heads * giant.channels
    yield f"{at}.self_attention.linear_proj.weight", (layers, hidden, queries), 1, 2, 1
    yield f"{at}.pre_mlp_layernorm.weight", (layers, hidden), 1, None, 1
    yield f"{at}.mlp.router.weight", (layers, experts, hidden), 1, None, 1
    inner = f"{at}.mlp.experts.experts"
    yield f"{inner}.linear_fc1.weight", (layers, experts, 2 * ffn, hidden), 2, 2, 2
    yield f"{inner}.linear_fc2.weight", (layers, experts, hidden, ffn), 2, 3, 1
    yield "decoder.final_layernorm.weight", (hidden,), 0, None, 1
    yield "output_layer.weight", (giant.vocab, hidden), 0, 0, 1


def torch_dist(folder: Path, giant: Giant, tp: int) -> dict[str, int]:
    """Write index, item headers and lengths.

    Every item takes two blocks of the disk for its header.
    """
    import torch
    from indices import CONFIG, Files
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True, exist_ok=True)
    files, described, places = Files(folder), {}, {}
    properties = TensorProperties(dtype=torch.bfloat16)
    for name, shape, stacked, dim, parts in megatron_tensors(giant):
        listed = []
        for rank, at, sizes in _chunks(shape, stacked, dim, parts, tp):
            listed.append(ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)))
            index = MetadataIndex(name, torch.Size(at), index=len(listed) - 1)
            places[index] = files.add(rank, sizes, torch.bfloat16)
        described[name] = TensorStorageMetadata(properties, torch.Size(shape), listed)
    files.close()
    raw = pickle.dumps(Metadata(described, None, places, StorageMeta(), "1.0.0"))
    (folder / ".metadata").write_bytes(raw)
    torch.save({"iteration": 1000, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").write_text(json.dumps(config(giant)))
    return {"tensors": len(described), "chunks": len(places), "index_bytes": len(raw)}


def _chunks(
    shape: tuple[int, ...], stacked: int, dim: int | None, parts: int, tp: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Rank, offsets and sizes of every chunk."""
    count = 1 if dim is None else tp * parts
    sizes = [1] * stacked + list(shape[stacked:])
    if dim is not None:
        sizes[dim] //= count
    outer = [()]
    for size in shape[:stacked]:
        outer = [(*at, index) for at in outer for index in range(size)]
    for at in outer:
        for number in range(count):
            offsets = [*at, *(0 for _ in shape[stacked:])]
            if dim is not None:
                offsets[dim] = number * sizes[dim]
            yield number % tp, tuple(offsets), tuple(sizes)
