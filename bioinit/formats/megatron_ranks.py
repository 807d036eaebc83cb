"""What Megatron-LM and NeMo 1 write by rank: a folder for each, its whole state in one file.

``mp_rank_TT``, ``mp_rank_TT_PPP``, ``mp_rank_TT_PPP_EEE`` (``mp_rank_TT_EEE`` without pipeline) and
``tp_rank_TT_pp_rank_PPP`` say which tensor, pipeline and expert rank it is. A stage of the pipeline
counts its layers from 0, and so does each expert rank its experts: here they get the numbers that
they have in the whole model. With a virtual pipeline a stage holds several chunks, ``model0``,
``model1``, ...: chunk ``c`` of stage ``s`` of ``p`` comes at place ``c * p + s``.

How queries, keys and values lie in one matrix depends on ``checkpoint_version``, which is listed
among the objects; it is put together as it was and not brought to another order. Only Megatron and
NeMo 1, which builds on it, write such folders, so the names are always looked up in its table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bioinit.errors import AmbiguousFormat, RefusedCheckpoint, UnfinishedCheckpoint
from bioinit.formats._partitions import (
    Merger,
    argument,
    require_layers,
    require_one_step,
    settings,
    size,
)
from bioinit.formats._partitions.ranks import Layout, Rank, layer_numbers, layout, put_together
from bioinit.formats._partitions.rules import is_fused
from bioinit.formats.protocol import Contents, Format, Open
from bioinit.storage import Folder

_RANK = re.compile(
    r"(mp_rank_(?P<mp>\d{1,6})(_(?P<second>\d{1,6}))?(_(?P<third>\d{1,6}))?"
    r"|tp_rank_(?P<tp>\d{1,6})_pp_rank_(?P<pp>\d{1,6}))(?P<fsdp>_fsdp_shard_\d+)?"
)
_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")
_OPTIMIZER = re.compile(r"(distrib_)?optim.*\.pt")
_KEPT = ("args", "iteration", "checkpoint_version")
_SIZES = {
    "tensor": ("tensor_model_parallel_size", "model_parallel_size"),
    "pipeline": ("pipeline_model_parallel_size",),
    "expert": ("expert_model_parallel_size",),
}


def _recognizes(folder: Folder) -> bool:
    if folder.is_file:
        return False
    ranks = [name for name in folder.folders() if _RANK.fullmatch(name)]
    return any(map(_is_weights, folder.folder(ranks[0]).names())) if ranks else False


def _is_weights(name: str) -> bool:
    return name in _FILES or name.endswith(".ckpt")


def _open(folder: Folder, open_inner: Open) -> Contents:
    names = [name for name in folder.folders() if _RANK.fullmatch(name)]
    file = _file(folder, names[0])
    merger = Merger(str(folder.path))
    ranks: list[Rank] = []
    each: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        found = _numbers(folder, name)
        inner = folder.folder(name)
        if not inner.has(file):
            raise UnfinishedCheckpoint(
                f"{folder.path} lacks {name}/{file}, which the other ranks have. Fetch it, or "
                "point at a complete checkpoint."
            )
        contents = open_inner(inner.lone(file))
        each.append((f"{name}/{file}", settings(contents.metadata.get("objects"), _KEPT)))
        ranks.append(Rank(f"{name}/{file}", found, merger.take(contents)))
    require_one_step(str(folder.path), each)
    said = each[0][1]
    sizes = _sizes(said)
    placed = layout(folder.path, ranks, sizes)
    _require_known_experts(folder, said, placed)
    for name, rank in zip(names, ranks, strict=True):
        merger.aside(name, rank.tensors)
    chunks = put_together(
        merger,
        placed,
        gated=_gated(said),
        hidden=size(said, "hidden_size"),
        is_slabbed=_is_slabbed(said, file),
    )
    merger.require_weights()
    if argument(said, "heterogeneous_layers_config_path") is None:  # its layers may be empty
        require_layers(str(folder.path), said, layer_numbers(merger.tensors))
    return Contents(
        tuple(merger.files),
        merger.tensors,
        _metadata(folder, names, file, merger, placed, said, chunks),
    )


def _file(folder: Folder, first: str) -> str:
    """The name that the file of weights has in every rank's folder."""
    names = folder.folder(first).names()
    usual = [name for name in _FILES if name in names]
    fitting = usual or [name for name in names if name.endswith(".ckpt")]
    if len(fitting) > 1:
        raise AmbiguousFormat(
            f"{folder.path}/{first} holds {len(fitting)} files that could be the weights: "
            f"{', '.join(fitting[:4])}. Move those that are not meant out of each rank's folder."
        )
    return fitting[0]


def _numbers(folder: Folder, name: str) -> tuple[int, ...]:
    """Tensor rank and those behind it, as the folder's name gives them."""
    found = _RANK.fullmatch(name)
    if found is None or found["fsdp"]:
        raise RefusedCheckpoint(
            f"{folder.path} was written by FSDP ({name}): each file holds a flat slice of all "
            "parameters. Load it with NeMo and save a full state dict (or a .nemo without FSDP)."
        )
    if found["tp"] is not None:
        return int(found["tp"]), int(found["pp"])
    return tuple(int(n) for n in (found["mp"], found["second"], found["third"]) if n is not None)


def _sizes(said: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that the saved arguments give."""
    found = {kind: size(said, *names) for kind, names in _SIZES.items()}
    return {kind: value for kind, value in found.items() if value is not None}


def _gated(said: Mapping[str, Any]) -> bool | None:
    value = argument(said, "swiglu", "gated_linear_unit")
    return value if isinstance(value, bool) else None


def _is_slabbed(said: Mapping[str, Any], file: str) -> bool:
    """Whether a rank keeps its heads' queries, then their keys, then their values.

    Version 0 does; 1.0 and later keep those of a head together. Megatron takes a file that does not
    say for version 0. NeMo 1 never says, and never wrote that. Nor did any Megatron that has
    ``tensor_model_parallel_size``, which always says: there somebody has rewritten the file.
    """
    version = said.get("checkpoint_version")
    if version is not None:
        return bool(version == 0)
    return not file.endswith(".ckpt") and argument(said, "tensor_model_parallel_size") is None


def _doubt(merger: Merger, said: Mapping[str, Any], file: str, placed: Layout) -> str:
    """How queries, keys and values were read, where nothing says it and it makes a difference."""
    is_told = said.get("checkpoint_version") is not None or file.endswith(".ckpt")
    is_same = placed.tensor == 1 or not any(map(is_fused, merger.weights(merger.tensors)))
    if is_told or is_same:
        return ""
    order = "kept together by head, as version 1.0 and later have them"
    if _is_slabbed(said, file):
        order = "kept apart in each rank, as Megatron's version 0, which it takes such a file for"
    return f"no checkpoint_version: queries, keys and values were read as {order}"


def _require_known_experts(folder: Folder, said: Mapping[str, Any], placed: Layout) -> None:
    divided = argument(said, "expert_tensor_parallel_size")
    if placed.expert > 1 and type(divided) is int and divided != placed.tensor:
        raise RefusedCheckpoint(
            f"{folder.path} divides its experts over {divided} tensor ranks and everything else "
            f"over {placed.tensor}, which is not read. Save it with Megatron as torch_dist "
            "(--ckpt-format torch_dist), and start from that."
        )
    groups = argument(said, "num_query_groups")
    grouped = argument(said, "group_query_attention") is True
    if grouped and type(groups) is int and groups % placed.tensor:
        raise RefusedCheckpoint(
            f"{folder.path} has {groups} query groups over {placed.tensor} tensor ranks: ranks "
            "share groups, which is not read. Save it with Megatron over fewer ranks, or as "
            "torch_dist, and start from that."
        )


def _metadata(
    folder: Folder, names: list[str], file: str, merger: Merger, placed: Layout,
    said: Mapping[str, Any], chunks: int,
) -> dict[str, Any]:  # fmt: skip
    parallel = {"tensor": placed.tensor, "pipeline": placed.pipeline, "expert": placed.expert}
    if chunks > 1:
        parallel["virtual"] = chunks
    data = argument(said, "data_parallel_size")
    if type(data) is int:
        parallel["data"] = data
    found: dict[str, Any] = {
        "writer": "NeMo 1" if file.endswith(".ckpt") else "Megatron-LM",
        "parallel": parallel,
        "ranks_with_files": ("tensor", "pipeline"),
        "layout": f"{len(names)} ranks, each a folder with {file}",
        **merger.metadata,
    }
    if doubt := _doubt(merger, said, file, placed):
        found["doubt"] = doubt
    if type(said.get("iteration")) is int:
        found["iteration"] = said["iteration"]
    if said:
        found["objects"] = dict(said)
    ignored = {
        f"{name}/{other}": "state of the optimizer"
        if _OPTIMIZER.fullmatch(other)
        else f"{file} is read"
        for name in names
        for other in folder.folder(name).names()
        if other != file
    }
    if ignored:
        found["ignored"] = ignored
    return found


FORMAT = Format(recognizes=_recognizes, open=_open, marks="mp_rank_*/ or tp_rank_*_pp_rank_*/")
