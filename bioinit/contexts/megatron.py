"""Megatron-LM's saved config: the arguments of its run, kept beside or among the weights.

They are the ``args`` of ``common.pt`` (``torch_dist`` and ``zarr``), of ``model_optim_rng.pt`` in
each rank's folder, or of DeepSpeed's ``mp_rank_XX_model_states.pt``. Only the pickle is read, by
the closed unpickler: an object in it is a mapping with its class under ``_target_``, what is called
by name is its dotted name, and tensors are left out. DeepSpeed's file with a plain mapping is what
GPT-NeoX writes: its names are NeoX's.
"""

from __future__ import annotations

import re
from typing import Any

from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import RefusedCheckpoint
from bioinit.storage import File, Folder
from bioinit.storage.zip import LOCAL_START, data_start, members
from bioinit.unpickle import Opaque, Truncated, load, load_next, plain

_COMMON = "common.pt"
_RANKED = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_0+(_0+){0,2}")
_DEEPSPEED = re.compile(r"mp_rank_0+_model_states\.pt")
_PICKLE = "/data.pkl"
_LARGEST = 256 << 20
_FIRST_READ = 64 * 1024
_BEFORE_OBJECT = 3
"""Pickles that torch before 1.6 wrote ahead of the object."""
_BESIDE = ("iteration", "checkpoint_version")


def _read(folder: Folder) -> Context | None:
    file = _file(folder)
    value = None if file is None else _value(file)
    if file is None or not isinstance(value, dict):
        return None
    args = value.get("args")
    if isinstance(args, Opaque):
        args = args.state
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        return None
    shown = plain(args) or {}
    data = {key: _plain(item, shown[key]) for key, item in args.items() if key in shown}
    beside = {key: plain(value[key]) for key in _BESIDE if key in value}
    is_neox = isinstance(value["args"], dict) and _DEEPSPEED.fullmatch(file.path.name) is not None
    if is_neox:
        data = {key.replace("-", "_"): item for key, item in data.items()}
    return Context(
        dialect="neox" if is_neox else "megatron", where=f"{file} (args)", data=data, model=None,
        tree={"model": data, **beside},
    )  # fmt: skip


def _file(folder: Folder) -> File | None:
    """The file that has the arguments of the first rank."""
    if folder.is_file:
        return None
    for name in (_COMMON, _RANKED):
        if folder.has(name):
            return folder.file(name)
    for name in folder.names():
        if _DEEPSPEED.fullmatch(name):
            return folder.file(name)
    ranks = [folder.folder(name) for name in folder.folders() if _RANK.fullmatch(name)]
    return next((rank.file(_RANKED) for rank in ranks if rank.has(_RANKED)), None)


def _value(file: File) -> Any:
    """What was saved, its tensors by reference; None if that is not for us to read."""
    try:
        if file.size >= len(LOCAL_START) and file.read(0, len(LOCAL_START)) == LOCAL_START:
            found = members(file)
            names = [name for name in found if name.endswith(_PICKLE) and name.count("/") == 1]
            if len(names) != 1 or found[names[0]].size > _LARGEST:
                return None
            begin = data_start(file, names[0], found[names[0]])
            return load(file.read(begin, found[names[0]].size), where=f"{file} ({names[0]})")
        return _older(file)
    except RefusedCheckpoint:
        return None  # about tensors in it; whoever reads the weights says so


def _older(file: File) -> Any:
    """The object in a file of torch before 1.6, read from its start in growing steps."""
    size = min(file.size, _FIRST_READ)
    while True:
        data = file.read(0, size)
        end = 0
        try:
            for _ in range(_BEFORE_OBJECT):
                _, end = load_next(data, end, where=str(file))
            return load_next(data, end, where=str(file))[0]
        except Truncated:
            if size >= min(file.size, _LARGEST):
                raise
            size = min(file.size, size * 4)


def _plain(value: Any, shown: Any) -> Any:
    """``shown``, and for an inert object its fields with its class under ``_target_``."""
    if not isinstance(value, Opaque) or not isinstance(shown, dict):
        return shown
    name, state = f"{value.module}.{value.name}", shown.get("state")
    if isinstance(state, str) and not value.args:  # a member of an enumeration
        return f"{name}.{state}"
    if isinstance(state, dict):
        return {"_target_": name, **state}
    made_from = shown.get("args") or ([] if state is None else [state])
    return {"_target_": name, "_args_": made_from} if made_from else {"_target_": name}


CONTEXT = ContextKind(read=_read, rank=2)
