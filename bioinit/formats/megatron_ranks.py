"""What Megatron-LM and NeMo 1 write by rank: a folder for each, its whole state in one file.

``mp_rank_TT``, ``mp_rank_TT_PPP``, ``mp_rank_TT_PPP_EEE`` (``mp_rank_TT_EEE`` without pipeline) and
``tp_rank_TT_pp_rank_PPP`` say which tensor, pipeline and expert rank it is. A stage of the pipeline
counts its layers from 0, and so does each expert rank its experts: here they get the numbers that
they have in the whole model. With a virtual pipeline a stage holds several chunks, ``model0``,
``model1``, ...: chunk ``c`` of stage ``s`` of ``p`` comes at place ``c * p + s``.

How queries, keys and values lie in one matrix depends on ``checkpoint_version``, which is listed
among the objects; it is put together as it was and not brought to another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bioinit.errors import AmbiguousFormat, CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats._partitions import Merger, settings
from bioinit.formats._partitions.ranks import Layout, Rank, layout, put_together
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
    objects: Any = None
    for name in names:
        found = _numbers(folder, name)
        inner = folder.folder(name)
        if not inner.has(file):
            raise CorruptCheckpoint(
                f"{folder.path} lacks {name}/{file}, which the other ranks have. Fetch it, or "
                "point at a complete checkpoint."
            )
        contents = open_inner(inner.lone(file))
        objects = contents.metadata.get("objects") if objects is None else objects
        ranks.append(Rank(f"{name}/{file}", found, merger.take(contents)))
    said = settings(objects, _KEPT)
    sizes = _sizes(said)
    placed = layout(folder.path, ranks, sizes)
    _require_known_experts(folder, said, placed)
    for name, rank in zip(names, ranks, strict=True):
        merger.aside(name, rank.tensors)
    chunks = put_together(
        merger,
        placed,
        gated=_gated(said),
        hidden=_hidden(said),
        # Version 1.0 and later keep a head's queries, keys and values together.
        is_slabbed=said.get("checkpoint_version") == 0,
    )
    merger.require_weights()
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


def _argument(said: Mapping[str, Any], *names: str) -> Any:
    args = said.get("args")
    values = (args.get(name) for name in names) if isinstance(args, Mapping) else ()
    return next((value for value in values if value is not None), None)


def _sizes(said: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that the saved arguments give."""
    found = {kind: _argument(said, *names) for kind, names in _SIZES.items()}
    return {kind: size for kind, size in found.items() if type(size) is int and size > 0}


def _gated(said: Mapping[str, Any]) -> bool | None:
    value = _argument(said, "swiglu", "gated_linear_unit")
    return value if isinstance(value, bool) else None


def _hidden(said: Mapping[str, Any]) -> int | None:
    value = _argument(said, "hidden_size")
    return value if type(value) is int else None


def _require_known_experts(folder: Folder, said: Mapping[str, Any], placed: Layout) -> None:
    divided = _argument(said, "expert_tensor_parallel_size")
    if placed.expert > 1 and type(divided) is int and divided != placed.tensor:
        raise RefusedCheckpoint(
            f"{folder.path} divides its experts over {divided} tensor ranks and everything else "
            f"over {placed.tensor}, which is not read. Save it with Megatron as torch_dist "
            "(--ckpt-format torch_dist), and start from that."
        )
    groups = _argument(said, "num_query_groups")
    grouped = _argument(said, "group_query_attention") is True
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
    data = _argument(said, "data_parallel_size")
    if type(data) is int:
        parallel["data"] = data
    found: dict[str, Any] = {
        "writer": "NeMo 1" if file.endswith(".ckpt") else "Megatron-LM",
        "parallel": parallel,
        "layout": f"{len(names)} ranks, each a folder with {file}",
        **merger.metadata,
    }
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
