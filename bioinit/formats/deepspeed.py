"""What DeepSpeed, Megatron-DeepSpeed, Savanna (Evo 2) and GPT-NeoX write without pipelines.

``mp_rank_XX_model_states.pt`` holds everything of one tensor-parallel partition, its weights under
``module``. Stored names are those under ``module``. State of the optimizer lies in files of its own
and is never opened. ZeRO-3 leaves parameters empty there, which is refused with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, UnfinishedCheckpoint
from bioinit.formats._partitions import (
    Merger,
    Rules,
    biases_are_copies,
    require_one_step,
    require_partitions,
    settings,
    size,
    style,
)
from bioinit.formats.protocol import Contents, Format, Open, StoredTensor
from bioinit.storage import Folder

_RANK = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
_ZERO_3 = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_OPTIMIZER = re.compile(r".*optim_states\.pt")
_EXPERTS = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt")
_LAYER = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_KEPT = (
    "args",
    "iteration",
    "global_steps",
    "mp_world_size",
    "dp_world_size",
    "ds_version",
    "checkpoint_version",
)
_EMPTY = (0,)
_WRITERS = {"neox": "GPT-NeoX", "savanna": "Savanna", "megatron": "Megatron-DeepSpeed"}


def _recognizes(folder: Folder) -> bool:
    if folder.is_file:
        return False
    names = folder.names()
    return any(_RANK.fullmatch(n) or _ZERO_3.fullmatch(n) for n in names) and not any(
        map(_LAYER.fullmatch, names)
    )


def _open(folder: Folder, open_inner: Open) -> Contents:
    names = folder.names()
    sharded = next((name for name in names if _ZERO_3.fullmatch(name)), None)
    if sharded is not None:
        _raise_sharded(folder, f"it holds {sharded}")
    experts = next((name for name in names if _EXPERTS.fullmatch(name)), None)
    if experts is not None:
        raise RefusedCheckpoint(
            f"{folder.path} keeps experts in files of their own, such as {experts}, which is not "
            "read. Load it with DeepSpeed and save one state dict, best as safetensors."
        )
    ranks = _ranks(folder)
    merger = Merger(str(folder.path))
    opened, said = [], []
    for name in ranks:
        contents = open_inner(folder.lone(name))
        said.append((name, settings(contents.metadata.get("objects"), _KEPT)))
        opened.append((name, merger.take(contents)))
    require_one_step(str(folder.path), said)
    found = said[0][1]
    tensors = opened[0][1]
    _require_weights(folder, ranks[0], tensors)
    missing = f"mp_rank_{len(ranks):02d}_model_states.pt"
    require_partitions(folder, found, tensors, len(ranks), missing)
    table = style(list(tensors))
    for name, held in opened:
        merger.aside(name.removesuffix("_model_states.pt"), held)
    doubt = biases_are_copies(folder, found) if table == "neox" and len(ranks) > 1 else ""
    merger.merge("", opened, Rules(table, tensors, hidden=size(found, "hidden_size")), doubt)
    ignored = {name: "state of the optimizer" for name in names if _OPTIMIZER.fullmatch(name)}
    metadata: dict[str, Any] = {
        "writer": _writer(table, tensors, found),
        "parallel": _parallel(len(ranks), found),
        "layout": f"{len(ranks)} tensor-parallel files" if len(ranks) > 1 else "1 file",
        "state_dict": "module",
    }
    metadata |= merger.metadata
    if doubt and merger.sums:
        metadata["doubt"] = doubt
    iteration = found.get("iteration", found.get("global_steps"))
    if type(iteration) is int:
        metadata["iteration"] = iteration
    if found:
        metadata["objects"] = found
    if ignored:
        metadata["ignored"] = ignored
    return Contents(tuple(merger.files), merger.tensors, metadata)


def _ranks(folder: Folder) -> list[str]:
    found = {int(m[1]): name for name in folder.names() if (m := _RANK.fullmatch(name))}
    count = sum(_RANK.fullmatch(name) is not None for name in folder.names())
    if count > len(found):
        raise CorruptCheckpoint(
            f"{folder.path} holds two files of one partition. Remove what does not belong there."
        )
    missing = next((number for number in range(count) if number not in found), None)
    if missing is not None:
        raise UnfinishedCheckpoint(
            f"{folder.path} lacks mp_rank_{missing:02d}_model_states.pt, but holds "
            f"{found[max(found)]}. Fetch it, or point at a complete checkpoint."
        )
    return [found[number] for number in sorted(found)]


def _require_weights(folder: Folder, name: str, tensors: Mapping[str, StoredTensor]) -> None:
    weights = {key: tensor for key, tensor in tensors.items() if tensor.kind == "weight"}
    if not weights:
        raise UnfinishedCheckpoint(
            f"{name} in {folder.path} holds no weights, and there are no layer_*-model_*-"
            "model_states.pt files that could. Fetch them, or point at a complete checkpoint."
        )
    empty = next((key for key, tensor in weights.items() if tensor.shape == _EMPTY), None)
    if empty is not None:
        _raise_sharded(folder, f"the parameter {empty!r} in {name} is empty")


def _raise_sharded(folder: Folder, sign: str) -> NoReturn:
    raise RefusedCheckpoint(
        f"{folder.path} was written by ZeRO-3 ({sign}): its parameters lie in pieces among the "
        "state of the optimizer. Put them together with the zero_to_fp32.py that DeepSpeed left "
        "beside it (or Savanna's convert_zero3_to_zero1.py), and start from the result."
    )


def _writer(table: str, names: Sequence[str] | Mapping[str, Any], found: Mapping[str, Any]) -> str:
    version = found.get("ds_version")
    engine = f"DeepSpeed {version}" if isinstance(version, str) else "DeepSpeed"
    # A model of any other library has other names than GPT-NeoX's layers in a row.
    if table == "neox" and not any(name.startswith("sequential.") for name in names):
        return engine
    return f"{_WRITERS[table]} ({engine})"


def _parallel(count: int, found: Mapping[str, Any]) -> dict[str, int]:
    data = found.get("dp_world_size")
    return {"tensor": count, **({"data": data} if type(data) is int else {})}


FORMAT = Format(recognizes=_recognizes, open=_open, marks="mp_rank_*_model_states.pt")
