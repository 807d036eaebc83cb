"""Which files of a directory are its weights, and how several of them make one checkpoint.

This is knowledge about names, gathered from what transformers, the hub, Lightning and accelerate
write: an index beside its shards, numbered shards without an index, one file, training state and
adapters that are no weights, the same weights twice in two formats. What is left aside is reported
with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from bioinit.errors import AmbiguousFormat, CorruptCheckpoint
from bioinit.formats.protocol import Contents, Piece, StoredTensor
from bioinit.storage import File, Folder

SAFE = "safetensors"
_SUFFIX = r"\.(?P<suffix>safetensors|bin|pt|pth|ckpt)"
_WEIGHTS = re.compile(rf"(?P<stem>.+?)(-(?P<number>\d{{1,6}})-of-(?P<total>\d{{1,6}}))?{_SUFFIX}")
_INDEX = re.compile(rf"(?P<stem>.+){_SUFFIX}\.index\.json")
_PART = re.compile(r"(layer_\d+-model_\d+-|mp_rank_\d+_)model_states\.pt")
_NOT_WEIGHTS = re.compile(
    r"training_args|(.*_)?optimizer.*|(lr_)?scheduler.*|rng_state.*|random_states.*|scaler.*"
    r"|sampler.*|dl_state_dict.*|trainer_state|(latest_)?train_state|train_dataloader_.*"
    r"|.*optim_states|adapter_.*|tokenizer.*|common"
)
_USUAL = 1
_STEM_BY_DEFAULT = {SAFE: "model", "bin": "pytorch_model"}


@dataclass(frozen=True)
class WeightSet:
    """Files that belong together: one file, the shards of a number, or those an index names."""

    stem: str
    suffix: str
    files: tuple[str, ...] = ()
    index: str | None = None
    total: int | None = None

    @property
    def rank(self) -> int:
        """Sets of a lower rank are preferred: usual names first, and safetensors before pickles."""
        usual = _STEM_BY_DEFAULT.get(self.suffix) == self.stem
        return (0 if usual else 2) + (0 if self.suffix == SAFE else 1)

    def __str__(self) -> str:
        return self.index or self.files[0]


@dataclass(frozen=True)
class Chosen:
    """The weight files of a directory, and where its index, if it has one, places each tensor.

    ``metadata`` says how the files belong together and which others are not read, and why.
    """

    files: tuple[str, ...]
    index: File | None = None
    placed: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def stands_for_directory(name: str) -> bool:
    """Whether a person who points at the file ``name`` means the set of files around it."""
    if _INDEX.fullmatch(name) or _PART.fullmatch(name):
        return True
    found = _WEIGHTS.fullmatch(name)
    if found is None or _NOT_WEIGHTS.fullmatch(found["stem"]):
        return False
    return found["total"] is not None and int(found["total"]) > 1


def has_weights(folder: Folder) -> bool:
    """Whether a name in ``folder`` looks like a file of weights that stands by itself."""
    found = map(_WEIGHTS.fullmatch, folder.names())
    return any(match and not _NOT_WEIGHTS.fullmatch(match["stem"]) for match in found)


def usual(folder: Folder) -> WeightSet | None:
    """A set of weights in ``folder`` that has the name Hugging Face gives it, if there is one."""
    here = (found for found in _sets(folder) if found.files)
    return next((found for found in here if found.rank <= _USUAL), None)


def choose(folder: Folder, *, pointed_at: str | None = None) -> Chosen | None:
    """The weight files of ``folder``, or None if none of its names looks like weights.

    Raises:
        AmbiguousFormat: two sets fit equally well.
        CorruptCheckpoint: a shard is missing, or the index is not usable.
    """
    sets = _sets(folder)
    if pointed_at is not None:
        sets = [s for s in sets if pointed_at == s.index or pointed_at in s.files]
    if not sets:
        return None
    best = min(s.rank for s in sets)
    chosen = _settle(folder, [s for s in sets if s.rank == best])
    read_instead = chosen.index.name if chosen.index else chosen.files[0]
    ignored = {
        name: "training state or an adapter"
        if _NOT_WEIGHTS.fullmatch(found["stem"])
        else f"{read_instead} is read instead"
        for name in folder.names()
        if (found := _WEIGHTS.fullmatch(name)) and name not in chosen.files
    }
    if not ignored:
        return chosen
    return replace(chosen, metadata={**chosen.metadata, "ignored": ignored})


def gather(chosen: Chosen, opened: Sequence[tuple[str, Contents]]) -> Contents:
    """The contents of several files as one, held against the index.

    Raises:
        CorruptCheckpoint: a tensor is in two files, or index and files contradict each other.
    """
    files: list[File] = []
    tensors: dict[str, StoredTensor] = {}
    num_seen = num_weights = 0
    for name, contents in opened:
        found = contents.tensors
        if chosen.index:
            weights = [key for key, tensor in found.items() if tensor.kind == "weight"]
            if not dict.fromkeys(weights, name).items() <= chosen.placed.items():
                _raise_misplaced(chosen, weights, name)
            num_weights += len(weights)
        tensors.update(_renumbered(found, first=len(files)) if files else found)
        files.extend(contents.files)
        num_seen += len(found)
        if len(tensors) != num_seen:
            _raise_twice(opened)
    if chosen.index and num_weights != len(chosen.placed):
        key = next(key for key in chosen.placed if key not in tensors)
        raise CorruptCheckpoint(
            f"{chosen.index} places tensor {key!r} in {chosen.placed[key]}, which does not hold "
            "it. Fetch that file again, or write the checkpoint again."
        )
    metadata = {**_agreed([contents.metadata for _, contents in opened]), **chosen.metadata}
    return Contents(tuple(files), tensors, metadata)


def _sets(folder: Folder) -> list[WeightSet]:
    """The sets of weights that the names in ``folder`` speak of."""
    alone: list[WeightSet] = []
    indexed: dict[tuple[str, str], str] = {}
    numbered: dict[tuple[str, str], dict[int, list[str]]] = {}
    for name in folder.names():
        if found := _INDEX.fullmatch(name):
            indexed[found["stem"], found["suffix"]] = name
            continue
        found = _WEIGHTS.fullmatch(name)
        if found is None or _NOT_WEIGHTS.fullmatch(found["stem"]):
            continue
        stem, suffix = found["stem"], found["suffix"]
        if found["total"] is None:
            alone.append(WeightSet(stem, suffix, (name,)))
        else:
            totals = numbered.setdefault((stem, suffix), {})
            totals.setdefault(int(found["total"]), []).append(name)
    sets = []
    for key, index in indexed.items():
        shards = [name for names in numbered.pop(key, {}).values() for name in names]
        sets.append(WeightSet(*key, tuple(shards), index))
    for key, totals in numbered.items():
        sets.extend(WeightSet(*key, tuple(names), total=n) for n, names in totals.items())
    return sets + alone


def _settle(folder: Folder, sets: Sequence[WeightSet]) -> Chosen:
    """The one set that is meant among ``sets``, which are of equal rank."""
    with_index = [s for s in sets if s.index]
    if len(with_index) == 1:
        chosen = _read_index(folder, with_index[0].index or "")
        others = [s for s in sets if not s.index and not set(s.files) <= set(chosen.files)]
        if others:
            _raise_several(folder, [*with_index, *others])
        return chosen
    if len(sets) == 1:
        files, total = sets[0].files, sets[0].total
        if total is None:
            return Chosen(files)
        _require_all_shards(folder, files, total)
        return Chosen(files, metadata={"layout": f"{total} numbered files, no index"})
    # Safetensors files hold nothing but weights, so several of them are taken for shards.
    if all(s.suffix == SAFE and s.total is None and not s.index for s in sets):
        files = tuple(s.files[0] for s in sets)
        return Chosen(files, metadata={"layout": f"{len(files)} files side by side, no index"})
    _raise_several(folder, sets)


def _read_index(folder: Folder, name: str) -> Chosen:
    index, content = folder.file(name), folder.read_json(name)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CorruptCheckpoint(
            f"{index} has no 'weight_map' that says which file holds which tensor. Fetch or write "
            "it again."
        )
    odd = [where for where in placed.values() if not isinstance(where, str)]
    if odd:
        raise CorruptCheckpoint(
            f"{index} places a tensor in {odd[0]!r:.100}, which is no file name. Fetch or write "
            "it again."
        )
    files = tuple(sorted(set(placed.values())))
    for file in files:
        folder.require_inside(file)
        if not folder.has(file):
            wanted = [key for key, where in placed.items() if where == file]
            raise CorruptCheckpoint(
                f"{index} places {len(wanted)} tensors, such as {wanted[0]!r:.200}, in "
                f"{file!r:.200}, which is missing. Fetch that file, or write the checkpoint again."
            )
    metadata = {"layout": f"{len(files)} files, index {name}"}
    if isinstance(content.get("metadata"), dict):
        metadata["index"] = content["metadata"]
    return Chosen(files, index, placed, metadata)


def _require_all_shards(folder: Folder, files: Sequence[str], total: int) -> None:
    numbers = {int(found["number"]) for name in files if (found := _WEIGHTS.fullmatch(name))}
    first = 0 if 0 in numbers else 1
    missing = next((n for n in range(first, first + total) if n not in numbers), None)
    if missing is not None:
        raise CorruptCheckpoint(
            f"{folder.path} holds {len(numbers)} of the {total} files that {files[0]} is one of: "
            f"number {missing} is missing. Fetch it, or point at a complete checkpoint."
        )


def _raise_several(folder: Folder, sets: Sequence[WeightSet]) -> NoReturn:
    raise AmbiguousFormat(
        f"{folder.path} holds several sets of weights: {', '.join(str(s) for s in sets)}. Point at "
        "the file that is meant, or remove the others."
    )


def _renumbered(tensors: Mapping[str, StoredTensor], first: int) -> dict[str, StoredTensor]:
    """``tensors`` with their files counted from ``first`` on."""
    renumbered = {}
    for key, (shape, dtype, pieces, kind) in tensors.items():
        if len(pieces) == 1:  # all but always; a generator here would double the time
            file, offset, box = pieces[0]
            moved: tuple[Piece, ...] = (Piece(first + file, offset, box),)
        else:
            moved = tuple(Piece(first + file, offset, box) for file, offset, box in pieces)
        renumbered[key] = StoredTensor(shape, dtype, moved, kind)
    return renumbered


def _raise_misplaced(chosen: Chosen, keys: Sequence[str], name: str) -> NoReturn:
    key = next(key for key in keys if chosen.placed.get(key) != name)
    where = chosen.placed.get(key)
    said = "does not list" if where is None else f"places in {where}"
    raise CorruptCheckpoint(
        f"{name} holds tensor {key!r}, which {chosen.index} {said}. Files and index do not belong "
        "together: fetch or write them again."
    )


def _raise_twice(opened: Sequence[tuple[str, Contents]]) -> NoReturn:
    first_in: dict[str, str] = {}
    for name, contents in opened:
        for key in contents.tensors:
            if key in first_in:
                raise CorruptCheckpoint(
                    f"tensor {key!r} is in two files of {contents.files[0].path.parent}: "
                    f"{first_in[key]} and {name}. Point at the one that is meant, or, if they are "
                    "parts of one tensor, merge them with the program that wrote them."
                )
            first_in[key] = name
    raise LookupError("no tensor is in two files")


def _agreed(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all files say alike, and what they do not as a tuple of their answers."""
    if len(metadata) == 1:
        return dict(metadata[0])
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in metadata for key in one):
        values = [one.get(key) for one in metadata]
        same = all(value == values[0] for value in values)
        merged[key] = values[0] if same else tuple(values)
    return merged
