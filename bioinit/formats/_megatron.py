"""What Megatron-Core adds to torch's distributed checkpoint, and what it tells about the writer.

``common.pt`` is written first and holds all that is no tensor; ``metadata.json`` is written last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, UnfinishedCheckpoint
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import template
from bioinit.storage import File, Folder
from bioinit.storage.zip import data_start, members
from bioinit.unpickle import Opaque, load, plain

CONFIG = "metadata.json"
COMMON = "common.pt"
BACKEND = "torch_dist"
LONGEST_CONFIG = 1 << 16
ADAPTER = "adapter_metadata.json"
_KNOWN = {
    "sharded_backend": (BACKEND,),
    "sharded_backend_version": (1,),
    "common_backend": ("torch",),
    "common_backend_version": (1,),
}
_PARALLEL = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
    "data": "data_parallel_size",
}
_BRIDGE = ("run_config.yaml", "train_state.pt")
_BESIDE = re.compile(
    r"common\.pt|run_config\.yaml|(latest_)?train_state\.pt|train_dataloader_\w+\.pt|\.metadata\.tmp"
)
_INSIDE = ("tokenizer",)


def wrote(folder: Folder) -> bool:
    """Whether Megatron wrote this, and not torch alone."""
    names = folder.names()
    return CONFIG in names or COMMON in names or all(name in names for name in _BRIDGE)


def is_begun(folder: Folder) -> bool:
    """Whether Megatron began to write here, going by the files it writes first and last."""
    names = folder.names()
    if CONFIG in names:
        return backend(folder) == BACKEND
    return (
        wrote(folder)
        and all(name in _INSIDE for name in folder.folders())
        and all(_BESIDE.fullmatch(name) for name in names)
    )


def backend(folder: Folder) -> str | None:
    """The format that ``metadata.json`` names; None if it is not there, or not Megatron's."""
    if not folder.has(CONFIG):
        return None
    file = folder.file(CONFIG)
    if file.size > LONGEST_CONFIG:
        return None
    try:
        found = json.loads(file.read(0, file.size), object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        return None
    named = found.get("sharded_backend") if isinstance(found, dict) else None
    return named if isinstance(named, str) else None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def require_readable(folder: Folder) -> None:
    """Raise if ``metadata.json`` says that something else, or something newer, was written."""
    if CONFIG not in folder.names():
        return
    config = folder.read_json(CONFIG)
    if type(config) is not dict:
        raise CorruptCheckpoint(
            f"{folder.path}/{CONFIG} is damaged: it is a {type(config).__name__}, not an object. "
            "Fetch or write it again."
        )
    for key, known in _KNOWN.items():
        if config.get(key, known[0]) not in known:
            raise RefusedCheckpoint(
                f"{folder.path}/{CONFIG} says {key} {config[key]!r:.100}, and "
                f"{' or '.join(map(repr, known))} is read. Load it with the megatron-core that "
                f"wrote it, and save it as {BACKEND!r} version 1."
            )


def require_finished(folder: Folder) -> None:
    """Raise if one of Megatron's two files is there without the other."""
    names = folder.names()
    if COMMON in names and CONFIG not in names:
        raise UnfinishedCheckpoint(
            f"{folder.path} holds {COMMON}, which Megatron writes first, but no {CONFIG}, which it "
            "writes last: its writer was stopped. Point at a checkpoint that was finished, or copy "
            f"{CONFIG} too."
        )
    if CONFIG in names and COMMON not in names:
        raise UnfinishedCheckpoint(
            f"{folder.path} holds {CONFIG}, but no {COMMON}, which Megatron writes before it: a "
            f"part was not fetched. Fetch {COMMON} too."
        )


def describe(
    folder: Folder, torch_writer: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """The writer, its parallel layout and what else it saved, as plain data."""
    names = folder.names()
    if CONFIG not in names:  # as Bridge leaves it after training with FSDP
        by_bridge = all(name in names for name in _BRIDGE)
        return {"writer": f"Megatron-Bridge, {torch_writer}" if by_bridge else torch_writer}
    common = _common(folder.file(COMMON))
    metadata: dict[str, Any] = {"objects": plain(common)}
    values = common if type(common) is dict else {}
    args = values.get("args")
    settings = args.state if isinstance(args, Opaque) and type(args.state) is dict else {}
    parallel = {
        key: settings[name] for key, name in _PARALLEL.items() if type(settings.get(name)) is int
    }
    if "tensor" not in parallel and (cuts := _tensor_cuts(tensors)):
        parallel["tensor"] = cuts
    if parallel:
        metadata["parallel"] = parallel
    lightning = values.get("pytorch-lightning_version")
    program = "Megatron-LM" if settings else "megatron-core"
    if "run_config.yaml" in names:
        program = "Megatron-Bridge"
    elif type(lightning) is str or "global_step" in values:
        program = f"NeMo 2 (Lightning {lightning:.20})" if type(lightning) is str else "NeMo 2"
    metadata["writer"] = f"{program}, {torch_writer}"
    for key in ("iteration", "global_step"):
        if type(values.get(key)) is int:
            metadata["iteration"] = values[key]
            break
    version = values.get("checkpoint_version")
    if isinstance(version, int | float):
        metadata["checkpoint_version"] = version
    if ADAPTER in names:
        metadata["adapter"] = folder.read_json(ADAPTER)
    return metadata


def folded(names: Iterable[str]) -> list[str]:
    """Names of stored objects, without the shards of each, and with numbers as ``*``."""
    return sorted({template(name.split("/shard_", 1)[0]) for name in names})


def _common(file: File) -> Any:
    found = members(file)
    pickles = [name for name in found if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CorruptCheckpoint(
            f"{file} is damaged: it is an archive with {len(pickles)} members called data.pkl, and "
            "one was expected. Fetch or write it again."
        )
    name = pickles[0]
    begin = data_start(file, name, found[name])
    return load(file.read(begin, found[name].size), where=f"{file} ({name})")


def _tensor_cuts(tensors: Mapping[str, StoredTensor]) -> int | None:
    """How often the tensors that Megatron always cuts across its tensor-parallel ranks are cut.

    Columns are cut for no other reason; rows of an embedding may be, where nothing else tells.
    """
    columns = rows = 0
    for name, stored in tensors.items():
        if stored.kind != "weight" or not stored.shape:
            continue
        if name.endswith("self_attention.linear_proj.weight"):
            columns = max(columns, _cuts(stored, len(stored.shape) - 1))
        elif name.endswith("word_embeddings.weight"):
            rows = max(rows, _cuts(stored, 0))
    return columns or rows or None


def _cuts(stored: StoredTensor, dim: int) -> int:
    return len({piece.box.offsets[dim] for piece in stored.pieces})
