"""The tensors of all partitions, gathered, and each put together out of its parts.

Pieces where each partition holds a box of it; bytes made while reading where they hold copies or
summands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from bioinit.errors import AmbiguousFormat, CorruptCheckpoint
from bioinit.formats._partitions.combine import Part, same, total
from bioinit.formats._partitions.rules import Rule, Rules
from bioinit.formats.protocol import Contents, Piece, StoredTensor
from bioinit.keys import template
from bioinit.layout import Box, Dims
from bioinit.storage import File

EXTRA_STATE = "_extra_state"
_DEEPEST = 4


class Merger:
    """Gathers the files of all partitions, and the tensors that their parts make."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.files: list[File] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.kinds: Counter[str] = Counter()
        self.byte_objects: Counter[str] = Counter()
        self.deduced: dict[str, int] = {}
        self.sums: set[str] = set()

    @property
    def metadata(self) -> dict[str, Any]:
        """What there is to say of how it was put together."""
        found: dict[str, Any] = {}
        if self.kinds:
            found["merged"] = dict(self.kinds)
        if self.sums:
            found["sums"] = sorted(self.sums)
        if self.deduced:
            found["divided_by_shape"] = dict(self.deduced)
        if self.byte_objects:
            count = sum(self.byte_objects.values())
            found["byte_objects"] = {"count": count, "names": sorted(self.byte_objects)}
        return found

    def take(self, contents: Contents) -> dict[str, StoredTensor]:
        """The tensors of one file, their pieces counted among all files."""
        first = len(self.files)
        for name in _extra_states(contents.metadata.get("objects"), ""):
            self.byte_objects[template(name)] += 1
        self.files.extend(contents.files)
        return {
            name: StoredTensor(
                shape, dtype, tuple(Piece(first + file, at, box) for file, at, box in pieces), kind
            )
            for name, (shape, dtype, pieces, kind) in contents.tensors.items()
            if not self._is_extra_state(name, kind)
        }

    def _is_extra_state(self, name: str, kind: str) -> bool:
        """Whether it is what a layer keeps beside its weights, pickled into a tensor; counted."""
        found = kind == "weight" and name.rpartition(".")[2] == EXTRA_STATE
        if found:
            self.byte_objects[template(name)] += 1
        return found

    @staticmethod
    def weights(tensors: Mapping[str, StoredTensor]) -> list[str]:
        return [name for name, tensor in tensors.items() if tensor.kind == "weight"]

    def aside(self, label: str, tensors: Mapping[str, StoredTensor]) -> None:
        """List what is no weight under the name of its partition; it is not put together."""
        for name, tensor in tensors.items():
            if tensor.kind != "weight":
                self.add(f"{label}.{name}", tensor)

    def add(self, name: str, tensor: StoredTensor) -> None:
        """Add a tensor that is whole.

        Raises:
            CorruptCheckpoint: there is one of that name.
        """
        if name in self.tensors:
            raise CorruptCheckpoint(
                f"{self.where} holds the tensor {name!r} twice. Fetch or write it again."
            )
        self.tensors[name] = tensor

    def merge(
        self, prefix: str, partitions: Sequence[tuple[str, Mapping[str, StoredTensor]]],
        rules: Rules, remark: str = "",
    ) -> None:  # fmt: skip
        """Add the weights of ``partitions``, each a file's name and its tensors, under ``prefix``.

        Raises:
            CorruptCheckpoint: the partitions contradict each other.
            AmbiguousFormat: nobody knows how a tensor was divided.
        """
        self.require_same_names(partitions)
        for name in self.weights(partitions[0][1]):
            parts = [Part(file, found[name]) for file, found in partitions]
            self.add(prefix + name, self.whole(prefix + name, parts, rules, name, remark))

    def whole(
        self, name: str, parts: Sequence[Part], rules: Rules, known_as: str, remark: str = ""
    ) -> StoredTensor:
        """The tensor whose ``parts`` these are; ``known_as`` is its name in its file."""
        if len(parts) == 1:
            return parts[0].tensor
        rule = rules.find(known_as)
        if rule is None:
            self._raise_unknown(name, parts, rules)
        self._require_alike(name, parts)
        self.kinds[rule.kind] += 1
        if rule.kind == "sum":
            self.sums.add(template(name))
        if known_as in rules.deduced:
            self.deduced[template(name)] = rule.dim
        if rule.kind in ("same", "sum"):
            return self.combined(name, parts, rule, remark)
        return self._placed(name, parts, rule)

    def combined(
        self, name: str, parts: Sequence[Part], rule: Rule, remark: str = ""
    ) -> StoredTensor:
        """A tensor that every part holds a copy of, or a summand."""
        self._require_alike(name, parts)
        shape, dtype, _, kind = parts[0].tensor
        if 0 in shape:
            return parts[0].tensor
        made = (
            same(self.files, name, parts)
            if rule.kind == "same"
            else total(self.files, name, parts, remark)
        )
        self.files.append(made)
        piece = Piece(len(self.files) - 1, 0, Box.contiguous(shape))
        return StoredTensor(shape, dtype, (piece,), kind)

    def _placed(self, name: str, parts: Sequence[Part], rule: Rule) -> StoredTensor:
        """A tensor that every part holds a box of, or one of each of its slabs."""
        shape, dtype, _, kind = parts[0].tensor
        size, count, slabs = shape[rule.dim], len(parts), rule.slabs
        if size % slabs:
            raise CorruptCheckpoint(
                f"{name!r} in {self.where} should be {slabs} equal parts along dim {rule.dim}, but "
                f"{parts[0].file} has {_words(parts[0].tensor)}. Fetch or write it again."
            )
        length = size // slabs
        pieces = []
        for slab in range(slabs):
            for index, part in enumerate(parts):
                low = slab * length
                to = (slab * count + index) * length
                pieces += _cut(part.tensor.pieces, rule.dim, low, low + length, to)
        return StoredTensor(_with(shape, rule.dim, size * count), dtype, tuple(pieces), kind)

    def require_weights(self) -> None:
        """Raise CorruptCheckpoint if there is not one weight in all the files."""
        if not any(tensor.kind == "weight" for tensor in self.tensors.values()):
            raise CorruptCheckpoint(
                f"{self.where} holds no weights: {len(self.files)} files, the first of them "
                f"{self.files[0]}, without a model in them. Point at a complete checkpoint."
            )

    def require_same_names(
        self, partitions: Sequence[tuple[str, Mapping[str, StoredTensor]]]
    ) -> None:
        """Raise CorruptCheckpoint if a weight is in one of ``partitions`` and not in another."""
        first, tensors = partitions[0]
        wanted = dict.fromkeys(self.weights(tensors))
        for file, others in partitions[1:]:
            found = dict.fromkeys(self.weights(others))
            odd = next((name for name in wanted if name not in found), None)
            holds, lacks = first, file
            if odd is None:
                odd = next((name for name in found if name not in wanted), None)
                holds, lacks = file, first
            if odd is not None:
                raise CorruptCheckpoint(
                    f"{holds} in {self.where} holds the tensor {odd!r}, which {lacks}, another "
                    "partition of the same, lacks. Fetch or write both again."
                )

    def _require_alike(self, name: str, parts: Sequence[Part]) -> None:
        one = parts[0]
        for other in parts[1:]:
            if other.tensor[:2] != one.tensor[:2]:
                raise CorruptCheckpoint(
                    f"the partitions of {name!r} in {self.where} do not belong together: "
                    f"{one.file} has {_words(one.tensor)}, {other.file} has {_words(other.tensor)},"
                    " and all partitions are equally large. Fetch or write them again."
                )

    def _raise_unknown(self, name: str, parts: Sequence[Part], rules: Rules) -> NoReturn:
        width = "nor does a norm say how wide the model is"
        if rules.hidden is not None:
            width = f"nor does its shape tell, in a model {rules.hidden} wide"
        raise AmbiguousFormat(
            f"nobody knows how the tensor {name!r} in {self.where} was divided: each of its "
            f"{len(parts)} partitions has {_words(parts[0].tensor)}; no rule fits its name, "
            f"{width}. Merge the partitions into one with the program that wrote them, and report "
            "the name to the authors of bioinit."
        )


def _cut(pieces: Sequence[Piece], dim: int, low: int, high: int, to: int) -> list[Piece]:
    """What of ``pieces`` lies between ``low`` and ``high`` of ``dim``, moved to begin at ``to``."""
    found = []
    for file, offset, (offsets, sizes, start, strides) in pieces:
        begin, end = max(low, offsets[dim]), min(high, offsets[dim] + sizes[dim])
        if end < begin or (end == begin and sizes[dim]):
            continue
        box = Box(
            _with(offsets, dim, to + begin - low),
            _with(sizes, dim, end - begin),
            start + (begin - offsets[dim]) * strides[dim],
            strides,
        )
        found.append(Piece(file, offset, box))
    return found


def _with(dims: Dims, dim: int, size: int) -> Dims:
    return (*dims[:dim], size, *dims[dim + 1 :])


def _words(tensor: StoredTensor) -> str:
    return f"shape {tensor.shape} of {tensor.dtype}"


def _extra_states(objects: Any, name: str, depth: int = 0) -> Iterator[str]:
    """Names of what layers keep beside their weights, in the plain data of a pickle."""
    if isinstance(objects, Mapping) and depth < _DEEPEST:
        for key, value in objects.items():
            if str(key).rpartition(".")[2] == EXTRA_STATE:
                yield f"{name}{key}"
            else:
                yield from _extra_states(value, f"{name}{key}.", depth + 1)
