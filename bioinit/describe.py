"""A checkpoint for people and for programs: what `bioinit inspect` says, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bioinit import families
from bioinit.contexts import Checkpoint
from bioinit.layout import numel
from bioinit.report import human_bytes

FILES_SHOWN = 8
FIELDS_SHOWN = 24
TELLING = (
    "num_layers num_hidden_layers hidden_size ffn_hidden_size intermediate_size "
    "num_attention_heads num_query_groups num_key_value_heads kv_channels head_dim seq_length "
    "encoder_seq_length max_position_embeddings vocab_size make_vocab_size_divisible_by "
    "num_moe_experts num_local_experts position_embedding_type rotary_base rotary_percent "
    "normalization layernorm_epsilon activation_func activation add_bias_linear "
    "share_embeddings_and_output_weights tie_word_embeddings params_dtype dtype precision"
).split()
"""The fields that tell one model from another; a saved config has hundreds."""


def describe(checkpoint: Checkpoint, *, with_tensors: bool = False) -> dict[str, Any]:
    """The JSON document of `inspect`; ``with_tensors`` adds every stored tensor."""
    kinds: dict[str, dict[str, int]] = {}
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        size = numel(tensor.shape) * tensor.dtype.itemsize
        for counts, name in ((kinds, tensor.kind), (dtypes, _name(tensor.dtype))):
            known = counts.setdefault(name, {"tensors": 0, "bytes": 0})
            known["tensors"] += 1
            known["bytes"] += size
    context = checkpoint.context
    metadata = dict(checkpoint.metadata)
    document: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "writer": metadata.get("writer"),
        "parallel": metadata.get("parallel"),
        "dialect": checkpoint.dialect,
        "family": families.find(context, checkpoint.tensors),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.bytes,
        "kinds": kinds,
        "dtypes": dtypes,
        "files": [
            {"path": str(file), "bytes": file.size, **({"how": file.how} if file.how else {})}
            for file in checkpoint.files
        ],
        "context": None
        if context is None
        else {
            "dialect": context.dialect,
            "where": context.where,
            "model": context.model,
            "data": dict(context.data),
        },
        "metadata": metadata,
        "digest": checkpoint.digest,
    }
    if with_tensors:
        document["tensor_list"] = [
            {
                "key": key,
                "shape": list(tensor.shape),
                "dtype": _name(tensor.dtype),
                "kind": tensor.kind,
                "pieces": [
                    {
                        "file": piece.file,
                        "offset": piece.offset + piece.box.start * tensor.dtype.itemsize,
                        "at": list(piece.box.offsets),
                        "sizes": list(piece.box.sizes),
                        "strides": list(piece.box.strides),
                    }
                    for piece in tensor.pieces
                ],
            }
            for key, tensor in checkpoint.tensors.items()
        ]
    return document


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The same for a person, in short; the document has all of it."""
    metadata = document["metadata"]
    inside = metadata.get("inside")
    yield f"path      {document['path']}"
    yield f"format    {document['format']}" + (
        f", inside {inside}" if inside not in (None, document["format"]) else ""
    )
    for key in ("writer", "layout"):
        if isinstance(metadata.get(key), str):
            yield f"{key:<10}{metadata[key]}"
    if document["parallel"]:
        sizes = ", ".join(f"{axis} {size}" for axis, size in document["parallel"].items())
        yield f"parallel  {sizes}"
    for key in ("dialect", "family"):
        yield f"{key:<10}{document[key] or 'unknown'}"
    if metadata.get("iteration") is not None:
        yield f"step      {metadata['iteration']}"
    yield f"tensors   {document['tensors']}, {human_bytes(document['bytes'])}"
    optimizer = document["kinds"].get("optimizer")
    if optimizer:
        yield (
            f"          of these {optimizer['tensors']} tensors, "
            f"{human_bytes(optimizer['bytes'])}, are state of the optimizer, which init never reads"
        )
    for name, counts in document["dtypes"].items():
        many = "tensor" if counts["tensors"] == 1 else "tensors"
        yield f"dtype     {name}: {counts['tensors']} {many}, {human_bytes(counts['bytes'])}"
    yield from _files(document["files"])
    yield from _notes(metadata)
    yield from _context(document["context"])
    for tensor in document.get("tensor_list", ()):
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        marked = "" if tensor["kind"] == "weight" else f"  ({tensor['kind']})"
        yield f"{tensor['dtype']:<9}{shape:<16}{tensor['key']}{marked}"


def _files(files: list[dict[str, Any]]) -> Iterator[str]:
    files = [file for file in files if "how" not in file] or files
    for file in files[:FILES_SHOWN]:
        yield f"file      {file['path']}, {human_bytes(file['bytes'])}"
    if len(files) > FILES_SHOWN:
        yield f"          and {len(files) - FILES_SHOWN} more; --json lists all"


def _notes(metadata: Mapping[str, Any]) -> Iterator[str]:
    objects = metadata.get("byte_objects")
    if objects:
        yield f"objects   {objects['count']} stored objects, such as _extra_state, are never read"
    missing = metadata.get("missing_chunks")
    if missing:
        shown = ", ".join(f"{name} ({count})" for name, count in list(missing.items())[:4])
        yield (
            f"missing   {sum(missing.values())} chunks of {len(missing)} tensors are not stored "
            f"and have the fill value: {shown}"
        )
    unreadable = metadata.get("unreadable")
    if unreadable:
        name, why = next(iter(unreadable.items()))
        yield f"damaged   state of the optimizer, {len(unreadable)} tensors, such as {name}: {why}"
    if metadata.get("doubt"):
        yield f"doubt     {metadata['doubt']}"
    ignored = metadata.get("ignored")
    if isinstance(ignored, Mapping) and ignored:
        shown = ", ".join(f"{name} ({why})" for name, why in list(ignored.items())[:4])
        yield f"not read  {len(ignored)} files: {shown}"


def _context(context: Mapping[str, Any] | None) -> Iterator[str]:
    if context is None:
        yield "context   none: nothing here says what model this is"
        return
    yield f"context   {context['where']}, {context['model'] or 'no model named'}"
    data = context["data"]
    telling = [name for name in TELLING if data.get(name) is not None]
    others = [name for name, value in data.items() if name not in telling and _is_short(value)]
    shown = (telling + others)[:FIELDS_SHOWN]
    for name in shown:
        yield f"          {name}: {data[name]}"
    if len(data) > len(shown):
        yield f"          {len(data) - len(shown)} more in --json"


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 100


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
