"""The checkpoints that the benchmark reads: built once in a work folder, then used again.

``decoder``: a Llama of about 1.5 billion bfloat16 parameters (3.0 GB, 147 tensors) in four
containers, and ``torch_dist``, which shares its bytes with one of them. ``cells``: 50 000 tensors
of 4 KB. ``dense_headers`` and ``moe_headers``: real safetensors headers over sparse files, for
planning only. ``--quick`` shrinks each to a few hundred kilobytes; the shapes of the trees stay.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

DONE = "built.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large each checkpoint is."""

    decoder: dict[str, int]
    cells: int
    dense: dict[str, int]
    dense_shards: int
    moe: dict[str, int]
    moe_shards: int


FULL = Size(
    decoder={
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    cells=50_000,
    dense={
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    dense_shards=31,
    moe={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 122,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    moe_shards=161,
)
QUICK = Size(
    decoder={
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    cells=60,
    dense={**FULL.dense, "num_hidden_layers": 2},
    dense_shards=3,
    moe={**FULL.moe, "num_hidden_layers": 2, "num_experts": 8},
    moe_shards=3,
)


class Cells(nn.Module):
    """Very many small parameters: leaves of 32 x 32 float32, fifty to a block."""

    def __init__(self, count: int, device: str | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(min(50, count - first), device) for first in range(0, count, 50)
        )


class Block(nn.Module):
    """Fifty leaves."""

    def __init__(self, count: int, device: str | None) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Cell(device) for _ in range(count))


class Cell(nn.Module):
    """One leaf: one page of parameters, uninitialized."""

    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 32, device=device))


def ensure(folder: Path, build: Callable[[Path], None], wanted: object) -> Path:
    """Build ``folder`` unless a finished build of the same thing is there."""
    described = json.dumps(wanted, sort_keys=True, default=vars)
    marker = folder / DONE
    if marker.exists() and marker.read_text() == described:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build(folder)
    os.sync()
    marker.write_text(described)
    return folder


def decoder(work: Path, size: Size) -> Path:
    """The decoder as ``single``, ``shards``, ``bin``, ``dcp``, ``torch_dist``, ``zarr``, ``nemo2``.

    ``expected.json`` is beside them.
    """
    made = ensure(work / "decoder", lambda folder: _build_decoder(folder, size), size.decoder)
    _add_torch_dist(made)
    _add_zarr(made)
    _add_nemo2(made)
    return made


def cells(work: Path, size: Size) -> Path:
    """The many small tensors as ``single`` and ``dcp``."""
    return ensure(work / "cells", lambda folder: _build_cells(folder, size), size.cells)


def dense_headers(work: Path, size: Size) -> Path:
    """A 70-billion-parameter Llama, headers only."""
    wanted = [size.dense, size.dense_shards]
    return ensure(work / "dense_headers", lambda folder: _build_dense(folder, size), wanted)


def moe_headers(work: Path, size: Size) -> Path:
    """A Qwen3 mixture of experts with one tensor per expert and projection, headers only."""
    wanted = [size.moe, size.moe_shards]
    return ensure(work / "moe_headers", lambda folder: _build_moe(folder, size), wanted)


def digest(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes, for comparing what ways loaded."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy())


def _fill(state: dict[str, Tensor], seed: int) -> None:
    """Fill with finite values; every tensor takes another stretch of one pool of normals."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(2**22 + 4099, generator=generator)
    for number, tensor in enumerate(state.values()):
        flat = tensor.view(-1)
        start = number * 7919 % 4099
        for at in range(0, flat.numel(), 2**22):
            piece = flat[at : at + 2**22]
            piece.copy_(pool[start : start + piece.numel()])


def _build_decoder(folder: Path, size: Size) -> None:
    import transformers

    config = transformers.LlamaConfig(
        **size.decoder,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    _fill(state, seed=3)
    _write_containers(folder, state, shards=8)
    for container in ("single", "shards", "bin", "dcp"):
        config.save_pretrained(folder / container)


def _build_cells(folder: Path, size: Size) -> None:
    state = {k: torch.empty(v.shape) for k, v in Cells(size.cells, "meta").state_dict().items()}
    _fill(state, seed=5)
    _write_containers(folder, state, shards=None)


def _write_containers(folder: Path, state: dict[str, Tensor], shards: int | None) -> None:
    from safetensors.torch import save_file
    from torch.distributed import checkpoint as dcp

    for container in ("single", "bin", "dcp"):
        (folder / container).mkdir()
    save_file(state, folder / "single" / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    if shards:
        (folder / "shards").mkdir()
        index = {}
        for number, names in enumerate(_portions(state, shards), 1):
            file = f"model-{number:05}-of-{shards:05}.safetensors"
            part = {name: state[name] for name in names}
            save_file(part, folder / "shards" / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(names, file))
        total = sum(t.nbytes for t in state.values())
        _write_index(folder / "shards", index, total)
    digests = {name: digest(tensor) for name, tensor in state.items()}
    (folder / "expected.json").write_text(json.dumps(digests))


def _add_torch_dist(folder: Path) -> None:
    """The files of ``dcp`` once more, with the two that Megatron-Core adds."""
    made = folder / "torch_dist"
    if made.exists():
        return
    made.mkdir()
    for file in (folder / "dcp").iterdir():
        os.link(file, made / file.name)
    torch.save({}, made / "common.pt")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (made / "metadata.json").write_text(json.dumps(config))


def _add_nemo2(folder: Path) -> None:
    """The decoder in NeMo 2's names and layouts: layers stacked, query, key and value fused."""
    if not (folder / "nemo2").exists():
        import bioinit

        bioinit.convert(folder / "single", folder / "nemo2", to="nemo2")
        shutil.copy(folder / "single" / "config.json", folder / "nemo2")  # what the module is


def _add_zarr(folder: Path) -> None:
    """The decoder as Megatron-Core wrote zarr on two tensor ranks: raw chunks, halves of rows."""
    from safetensors import safe_open

    made = folder / "zarr"
    if made.exists():
        return
    begun = folder / "zarr.begun"
    begun.mkdir(exist_ok=True)
    with safe_open(folder / "single" / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():
            tensor = stored.get_tensor(name)
            (begun / name).mkdir(exist_ok=True)
            parts = 2 if tensor.shape[0] % 2 == 0 else 1
            for number, part in enumerate(tensor.chunk(parts)):
                place = ".".join([str(number), *("0" for _ in tensor.shape[1:])])
                part.contiguous().view(-1).view(torch.uint8).numpy().tofile(begun / name / place)
            header = {
                "chunks": [tensor.shape[0] // parts, *tensor.shape[1:]],
                "compressor": None,
                "dtype": "bfloat16",
                "fill_value": None,
                "filters": None,
                "order": "C",
                "shape": list(tensor.shape),
                "zarr_format": 2,
            }
            (begun / name / ".zarray").write_text(json.dumps(header, indent=4))
    shutil.copy(folder / "single" / "config.json", begun)
    torch.save({}, begun / "common.pt")
    config = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (begun / "metadata.json").write_text(json.dumps(config))
    begun.rename(made)


def _portions(state: dict[str, Tensor], shards: int) -> Iterator[list[str]]:
    """Names in order, cut into portions of about equal bytes."""
    total, at, portion = sum(t.nbytes for t in state.values()), 0, 1
    names: list[str] = []
    for name, tensor in state.items():
        if at >= total * portion / shards and portion < shards:
            yield names
            names, portion = [], portion + 1
        names.append(name)
        at += tensor.nbytes
    yield names


def _write_index(folder: Path, index: dict[str, str], total: int) -> None:
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def _build_dense(folder: Path, size: Size) -> None:
    import transformers

    config = transformers.LlamaConfig(
        **size.dense,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = ((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    config.save_pretrained(folder)
    _write_sparse_shards(folder, list(shapes), size.dense_shards)


def _build_moe(folder: Path, size: Size) -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(
        **size.moe,
        head_dim=128,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    _write_sparse_shards(folder, list(_moe_names(size.moe)), size.moe_shards)


def _moe_names(moe: dict[str, int]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Qwen3-MoE checkpoints on the hub spell them: one tensor per expert."""
    hidden, inner, head = moe["hidden_size"], moe["moe_intermediate_size"], 128
    queries, keys = moe["num_attention_heads"] * head, moe["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (moe["vocab_size"], hidden)
    for layer in range(moe["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{at}.self_attn.q_norm.weight", (head,)
        yield f"{at}.self_attn.k_norm.weight", (head,)
        yield f"{at}.mlp.gate.weight", (moe["num_experts"], hidden)
        for expert in range(moe["num_experts"]):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (moe["vocab_size"], hidden)


def _write_sparse_shards(
    folder: Path, tensors: list[tuple[str, tuple[int, ...]]], shards: int
) -> None:
    """Write true headers and lengths; the weights are holes, so a terabyte costs megabytes."""
    index, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        mine = tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]
        for name, shape in mine:
            size = 2
            for extent in shape:
                size *= extent
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            index[name] = file
            at += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + at)
        total += at
    _write_index(folder, index, total)
