"""What NeMo 1 writes: a `.nemo` file, which is a tar archive, plain or packed with gzip.

Its root holds `model_config.yaml`, whatever the tokenizer needs, and the weights in one of four
ways: `model_weights.ckpt` as torch saves it, that file once per rank in `mp_rank_XX/` or
`tp_rank_XX_pp_rank_XXX/`, or the folder `model_weights/` with a distributed checkpoint. Members are
read where they lie in the archive and the rest is left to the formats of what is in it, so the same
tree unpacked gives the same tensors.
"""

from __future__ import annotations

import re
from dataclasses import replace

from bioinit.errors import AmbiguousFormat
from bioinit.formats import _directory
from bioinit.formats.protocol import Contents, Format, Open
from bioinit.storage import File, Folder, gzip
from bioinit.storage.tar import BLOCK, first_name, members

SUFFIX = ".nemo"
CONFIG, WEIGHTS, SHARDS = "model_config.yaml", "model_weights.ckpt", "model_weights"
_PACKED_SUFFIXES = (SUFFIX, ".tar.gz", ".tgz")
_FIRST_NAMES = re.compile(
    r"\./(?!@).*|(model_config\.yaml|model_weights|mp_rank_\d+|tp_rank_\d+_pp_rank_\d+).*"
)
_OF_TORCH_0_1 = ("sys_info", "pickle", "storages", "tensors")
_VERSION = re.compile(rb"^nemo_version:[ \t]*['\"]?([\w.+-]{1,40})", re.MULTILINE)
_LONGEST_CONFIG = 1 << 20


def _recognizes(folder: Folder) -> bool:
    if folder.is_file:
        return _is_archive(folder)
    names = folder.names()
    if CONFIG in names and WEIGHTS in names:
        return True
    return bool(_archives(folder)) and not _directory.has_weights(folder)


def _is_archive(folder: Folder) -> bool:
    """Whether this file is one, by its first block; one inside another is none."""
    if folder.around is None:  # archives in archives would nest without end
        return False
    file = folder.file(folder.names()[0])
    if file.size < BLOCK:
        return _is_packed(file) and file.name.endswith(_PACKED_SUFFIXES)
    block = file.read(0, BLOCK)
    if block.startswith(gzip.MAGIC):
        return file.name.endswith(_PACKED_SUFFIXES)
    name = first_name(block)
    if name is None or name.removeprefix("./") in _OF_TORCH_0_1:
        return False
    return file.name.endswith(SUFFIX) or _FIRST_NAMES.fullmatch(name) is not None


def _is_packed(file: File) -> bool:
    return file.size >= len(gzip.MAGIC) and file.read(0, len(gzip.MAGIC)) == gzip.MAGIC


def _archives(folder: Folder) -> list[str]:
    """The archives in a directory of which they are the weights."""
    named = [name for name in folder.names() if name.endswith(SUFFIX)]
    return [name for name in named if _is_archive(folder.lone(name))]


def _unpack(folder: Folder) -> Folder:
    """The members of the archive as a folder; a tree that is unpacked already is one.

    Raises:
        AmbiguousFormat: there are several archives.
        CheckpointError: it is damaged, or a member of it is no plain file.
    """
    if not folder.is_file:
        archives = _archives(folder)
        if not archives:
            return folder
        if len(archives) > 1 or folder.has(WEIGHTS):
            others = [WEIGHTS] if folder.has(WEIGHTS) else []
            raise AmbiguousFormat(
                f"{folder.path} holds several sets of weights: {', '.join([*archives, *others])}. "
                "Point at the file that is meant."
            )
        folder = folder.lone(archives[0])
    return Folder.over(folder.path, members(folder.file(folder.names()[0])))


def _open(folder: Folder, open_inner: Open) -> Contents:
    root = _unpack(folder)
    kind = f"unpacked {SUFFIX} archive" if root is folder else f"{SUFFIX} archive"
    return _open_root(root, open_inner, kind)


def _open_root(root: Folder, open_inner: Open, kind: str) -> Contents:
    """Open the weights in the ``root`` of a tree of NeMo 1; a tokenizer may lie beside them."""
    has_shards = SHARDS in root.folders()
    if root.has(WEIGHTS) and has_shards:
        raise AmbiguousFormat(
            f"{root.path} holds {WEIGHTS}, and {SHARDS}/ too, and NeMo writes one of them. Unpack "
            "it and point at the one that is meant."
        )
    if root.has(WEIGHTS):
        found = open_inner(root.lone(WEIGHTS))
    else:
        found = open_inner(root.folder(SHARDS) if has_shards else root)
    metadata = dict(found.metadata)
    if root.has(CONFIG):
        said = f"NeMo 1 ({kind}){_version(root.file(CONFIG))}"
        inner = metadata.get("writer")
        metadata["writer"] = f"{said}, {inner}" if inner else said
    homes = found.homes
    if not any(home.path == root.path for home in homes):
        homes = (*homes, root)
    return replace(found, metadata=metadata, homes=homes)


def _version(config: File) -> str:
    """The version that a config gives; nothing else of it is read here."""
    version = _VERSION.search(config.read(0, min(config.size, _LONGEST_CONFIG)))
    return f", nemo_version {version[1].decode()}" if version else ""


FORMAT = Format(recognizes=_recognizes, open=_open, unpack=_unpack, marks="*.nemo, or one unpacked")
