"""What a checkpoint says of itself: its saved config, and the checkpoint as a whole.

The folder is the list of kinds of saved config: a file here that defines ``CONTEXT`` is one, and
packages add more through the entry-point group ``bioinit.contexts``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bioinit import formats
from bioinit.contexts import _one_file, _subpath
from bioinit.contexts._artifacts import CARRIED_FILES, TOKENIZER_FILES
from bioinit.contexts._sidecar import PLACE as SIDECAR
from bioinit.contexts._sidecar import Sidecar, read_sidecar
from bioinit.contexts.checkpoint import Checkpoint, Whose
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import (
    RefusedCheckpoint,
    StorageError,
    UnfinishedCheckpoint,
    UnknownFormat,
)
from bioinit.formats.protocol import Contents
from bioinit.record.notation import require_shallow
from bioinit.siblings import Siblings
from bioinit.storage import File, Folder

__all__ = [
    "CARRIED_FILES",
    "SIDECAR",
    "TOKENIZER_FILES",
    "Checkpoint",
    "find",
    "load",
    "load_context",
    "names",
    "open_checkpoint",
    "read_file",
]

SIBLINGS = Siblings(
    __name__, __path__, "CONTEXT", ContextKind, "kind of saved config", apart=("checkpoint",)
)
names, load = SIBLINGS.names, SIBLINGS.load
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADS = {
    "hf": "hf download ORG/NAME --local-dir DIR",
    "s3": "aws s3 cp --recursive URI DIR",
    "gs": "gcloud storage cp --recursive URI DIR",
}
_NEMO_ADAPTER = "adapter_metadata.json"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|nemo)(\.index\.json)?$")


def find(homes: Sequence[Folder]) -> Context | None:
    """The saved config in ``homes`` that says most, with the others beside it; None if none.

    Of one kind, the one nearest to the weights counts.

    Raises:
        CheckpointError: there is one that cannot be used.
    """
    kinds = sorted((kind for _, kind in SIBLINGS.usable()), key=lambda kind: -kind.rank)
    nearest = (next(filter(None, map(kind.read, homes)), None) for kind in kinds)
    found = [context for context in nearest if context is not None]
    if not found:
        return None
    carried: dict[str, File] = {}
    for context in found:
        carried = {**context.carried, **carried}
    sidecar = next(filter(None, map(read_sidecar, homes)), Sidecar())
    return replace(
        found[0],
        beside=tuple(found[1:]),
        carried={**sidecar.files, **carried},
        sidecar=sidecar.carried,
    )


def read_file(path: str | Path) -> Context:
    """The saved config in one file of any kind, or in a folder, with nothing of a checkpoint's.

    Args:
        path: ``config.json``, ``io.json``, ``model_config.yaml``, a YAML of GPT-NeoX, a file with
            Megatron's arguments, ...; the folder in which it lies serves as well.

    Raises:
        StorageError: there is nothing.
        UnknownFormat: no kind of saved config is recognized in it.
    """
    folder = _local(path)
    kinds = [kind for _, kind in SIBLINGS.usable()]
    found = _one_file.read(folder, kinds) if folder.is_file else find((folder,))
    if found is None:
        raise UnknownFormat(
            f"{folder.path} is no saved config of a known kind: {', '.join(names())}. Give the "
            "file that the model's own software reads."
        )
    return found


def open_checkpoint(path: str | Path, whose: Whose | None = None) -> Checkpoint:
    """Open a checkpoint: its headers and its saved config, no weight byte.

    Args:
        path: a local folder or file.
        whose: who is asked for the dialect; see :func:`bioinit.families.open_checkpoint`.

    Raises:
        StorageError: there is nothing at ``path``, or it is not local.
        CheckpointError: what is there cannot be used; the message says why and what to do.
    """
    folder = _local(path)
    try:
        _refuse_what_needs_more(folder.around or folder)
        format_name, contents = formats.open_weights(folder)
        for home in contents.homes:
            _refuse_adapters(home)
        context = find(contents.homes)
        _require_all_ranks(folder, contents, context)
    except BaseException:
        folder.close()
        raise
    return Checkpoint(folder, format_name, contents, context, whose)


def load_context(path: str | Path, subpath: str | None = None) -> Any:
    """The saved config of a checkpoint, or a part of it, as plain data. Nothing is imported.

    Args:
        path: the checkpoint's folder, its ``context/``, or a weight file beside them.
        subpath: dotted keys, ``model`` or ``model.config`` for the model's fields, and further
            down a single field, ``model.config.hidden_size``.

    Raises:
        UnknownFormat: there is no saved config.
        ConfigError: it has nothing at ``subpath``; the message lists what there is.
    """
    folder = _local(path)
    context = find(formats.homes(folder))
    if context is None:
        raise UnknownFormat(
            f"{folder.path} holds no saved config. Known kinds: {', '.join(names())}. "
            "Point at the folder in which config.json or context/ lies."
        )
    return _subpath.at(context, subpath)


def _local(path: str | Path) -> Folder:
    scheme = _URI.match(str(path))
    if scheme is not None:
        how = _DOWNLOADS.get(scheme[1].lower(), "any tool that can fetch it")
        raise StorageError(
            f"{path} is not local, and bioinit cannot fetch it yet. Download it first ({how}) and "
            "give the local path."
        )
    if _HUB_NAME.fullmatch(str(path)) and not os.path.lexists(path):
        raise StorageError(
            f"there is nothing at {path}. If it is a name on the Hugging Face hub: bioinit fetches "
            f"nothing yet, so run `hf download {path} --local-dir FOLDER` and give FOLDER."
        )
    return Folder.at(path)


def _refuse_what_needs_more(folder: Folder) -> None:
    """Raise for a checkpoint that only runs with code, kernels or weights that are not ours."""
    if folder.has("adapter_config.json") and not any(map(_is_full_weights, _all_files(folder))):
        raise RefusedCheckpoint(
            f"{folder.path} is a bare adapter: adapter_config.json and no weights of a whole "
            "model. Merge it into its base first (peft: merge_and_unload, then save_pretrained) "
            "and start from the result, or start from the base."
        )
    if not folder.has("config.json"):
        return
    config = folder.read_json("config.json")
    if not isinstance(config, dict):
        return
    require_shallow(config, str(folder.path / "config.json"))
    for at, part in _objects(config):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                method = part[key].get("quant_method") if isinstance(part[key], dict) else None
                raise RefusedCheckpoint(
                    f"{folder.path} is quantized ({at}{key} in config.json, method "
                    f"{method or 'unknown'}): its tensors are codes, not weights. Start from the "
                    "checkpoint it was made from, or write a dequantized one with the tool that "
                    "made it (transformers: model.dequantize(), then save_pretrained)."
                )
        if part.get("auto_map"):
            files = sorted({str(target).split(".")[0] for target in _values(part["auto_map"])})
            raise RefusedCheckpoint(
                f"{folder.path} needs code that it brings along ({at}auto_map in config.json: "
                f"{', '.join(files)}), and bioinit runs no code of a checkpoint. If transformers "
                f"has this architecture ({config.get('model_type')!r}) itself, remove auto_map "
                "from config.json; otherwise write your own module and use bioinit.load_weights "
                "on a copy of the weights."
            )


def _require_all_ranks(folder: Folder, contents: Contents, context: Context | None) -> None:
    """Raise if a saved config counts more ranks than left a file, each of which is a part."""
    for said in () if context is None else (context, *context.beside):
        for axis in contents.metadata.get("ranks_with_files", ()):
            field, held = f"{axis}_model_parallel_size", contents.metadata["parallel"][axis]
            wanted = said.data.get(field)
            if type(wanted) is int and wanted > held:
                raise UnfinishedCheckpoint(
                    f"{folder.path} holds the files of {held} {axis} rank{'s' * (held != 1)}, and "
                    f"{said.where} says {field} {wanted}: the others are missing. Fetch them too, "
                    "or point at a complete checkpoint."
                )


def _refuse_adapters(home: Folder) -> None:
    if home.has(_NEMO_ADAPTER):
        said = home.read_json(_NEMO_ADAPTER)
        base = said.get("model_ckpt_path") if isinstance(said, dict) else None
        raise RefusedCheckpoint(
            f"{home.path} is a bare adapter ({_NEMO_ADAPTER}), made for the base at {base!r:.300}. "
            "Merge it into its base first (NeMo: llm.peft.merge_lora) and start from the result, "
            "or start from the base."
        )


def _objects(value: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a parsed config, and its dotted path with a dot behind it."""
    if isinstance(value, dict):
        yield at, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list):
            yield from _objects(inner, f"{at}{key}.")


def _all_files(folder: Folder) -> tuple[str, ...]:
    return (*folder.names(), *(f"{inner}/" for inner in folder.folders()))


def _is_full_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None and not name.startswith("adapter_")


def _values(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        return tuple(inner for item in value.values() for inner in _values(item))
    if isinstance(value, list):
        return tuple(inner for item in value for inner in _values(item))
    return () if value is None else (value,)
