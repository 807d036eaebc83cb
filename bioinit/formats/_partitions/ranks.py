"""Ranks of tensor, pipeline and expert parallelism: which are there, and the whole they make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, UnfinishedCheckpoint
from bioinit.formats._partitions.combine import Part
from bioinit.formats._partitions.merger import Merger
from bioinit.formats._partitions.rules import SAME, Rules
from bioinit.formats.protocol import StoredTensor

_CHUNK = re.compile(r"model(\d{1,6})\.(.+)")
_LAYER = re.compile(r"(?P<stem>(.*?\.)?layers\.)(?P<number>\d{1,9})(?P<rest>\..+)")
_OWN_NUMBERS = re.compile(r"(.*\.)?mtp\.(.*\.)?layers\.")
"""Layers that predict further tokens: all are in the last stage, and count by themselves."""
_EXPERT = re.compile(
    r"(?P<stem>.*\.experts\.local_experts\.)(?P<number>\d{1,9})(?P<rest>\..+)"
    r"|(?P<stem2>.*\.experts\.linear_fc[12]\.(weight|bias))(?P<number2>\d{1,9})"
)
_GROUPED = re.compile(r"(.*\.)?experts\.weight[12]")

Tensors = Mapping[str, StoredTensor]


class Rank(NamedTuple):
    """One rank: the file people know it by, its numbers as they stand there, and its tensors."""

    file: str
    numbers: tuple[int, ...]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Layout:
    """How many ranks there are of each kind, and each of them by tensor, pipeline and expert."""

    tensor: int
    pipeline: int
    expert: int
    ranks: Mapping[tuple[int, int, int], Rank]


def layout(where: Path, ranks: Sequence[Rank], said: Mapping[str, int]) -> Layout:
    """The place of every rank; ``said`` are the sizes that the checkpoint itself gives.

    Raises:
        UnfinishedCheckpoint: one is missing.
        CorruptCheckpoint: there are more than it says, or two have the same place.
    """
    lengths = {len(rank.numbers) for rank in ranks}
    if len(lengths) > 1:
        raise CorruptCheckpoint(
            f"{where} holds ranks of two layouts, such as {ranks[0].file} and {ranks[-1].file}. "
            "Remove those that do not belong there."
        )
    is_expert = lengths == {2} and _second_is_expert(ranks, said)
    placed: dict[tuple[int, int, int], Rank] = {}
    for rank in ranks:
        tensor, *others = rank.numbers
        pipeline, expert = (0, 0)
        if is_expert:
            expert = others[0]
        elif others:
            pipeline, expert = others[0], (others[1] if len(others) > 1 else 0)
        place = (tensor, pipeline, expert)
        if place in placed:
            raise CorruptCheckpoint(
                f"{where} holds {placed[place].file} and {rank.file}, which have the same place. "
                "Remove the one that does not belong there."
            )
        placed[place] = rank
    found = [1 + max(place[axis] for place in placed) for axis in range(3)]
    for axis, kind in enumerate(("tensor", "pipeline", "expert")):
        size = said.get(kind)
        if size is not None and size < found[axis]:
            raise CorruptCheckpoint(
                f"{where} holds {found[axis]} {kind} ranks, and its arguments say {size}. Remove "
                "the ranks of another run, or fetch the checkpoint again."
            )
        found[axis] = max(found[axis], size or 1)
    missing = next((place for place in _places(found) if place not in placed), None)
    if missing is not None:
        numbers = " and ".join(
            f"{kind} rank {n}" for kind, n, size in
            zip(("tensor", "pipeline", "expert"), missing, found, strict=True) if size > 1
        )  # fmt: skip
        raise UnfinishedCheckpoint(
            f"{where} lacks {_file(ranks[0], missing, is_expert)}, the file of {numbers}: it holds "
            f"{len(placed)} of {found[0]} x {found[1]} x {found[2]} ranks (tensor, pipeline, "
            "expert). Fetch it, or point at a complete checkpoint."
        )
    return Layout(found[0], found[1], found[2], placed)


def put_together(merger: Merger, placed: Layout, **known: Any) -> int:
    """Add the weights of all ranks to ``merger``; returns how many chunks a stage has.

    ``known`` is what :class:`Rules` is told beside names and shapes.

    Raises:
        CorruptCheckpoint: ranks contradict each other.
        AmbiguousFormat: nobody knows how a tensor was divided.
        RefusedCheckpoint: it is divided in a way that is not undone.
    """
    chunks = max(max(_by_chunk(rank)) + 1 for rank in placed.ranks.values())
    held: dict[tuple[int, int], dict[tuple[int, int], tuple[str, Tensors]]] = {}
    for (tensor, stage, expert), rank in placed.ranks.items():
        by_chunk = _by_chunk(rank)
        missing = next((n for n in range(len(by_chunk) + 1) if n not in by_chunk), chunks)
        if missing < chunks:
            raise CorruptCheckpoint(
                f"{rank.file} in {merger.where} lacks the chunk model{missing} of its virtual "
                f"pipeline, in which chunks 0 to {chunks - 1} are counted. Fetch or write it again."
            )
        for chunk, tensors in by_chunk.items():
            held.setdefault((chunk, stage), {})[tensor, expert] = (rank.file, tensors)
    first_layer: dict[str, int] = {}
    found: dict[str, list[Part]] = {}
    for place in sorted(held):  # chunk by chunk, in each stage by stage: the order of the layers
        stage_of = held[place]
        if len(stage_of) != placed.tensor * placed.expert:
            file = next(iter(stage_of.values()))[0]
            raise CorruptCheckpoint(
                f"{file} in {merger.where} holds the chunk model{place[0]}, which another rank of "
                "the same stage lacks. Fetch or write both again."
            )
        offsets = _offsets(merger.where, stage_of[0, 0], first_layer)
        for name, part in _stage(merger, placed, stage_of, known):
            found.setdefault(_renumbered(name, offsets), []).append(part)
    for name, parts in found.items():  # what several stages hold is tied
        whole = parts[0].tensor if len(parts) == 1 else merger.combined(name, parts, SAME)
        merger.add(name, whole)
    return chunks


def layer_numbers(tensors: Tensors) -> set[int]:
    """The numbers of the layers in the deepest stack of a whole model."""
    stacks: dict[str, set[int]] = {}
    for name in tensors:
        found = _LAYER.fullmatch(name)
        if found and tensors[name].kind == "weight" and not _OWN_NUMBERS.fullmatch(found["stem"]):
            stacks.setdefault(found["stem"], set()).add(int(found["number"]))
    return max(stacks.values(), key=len, default=set())


def _stage(
    merger: Merger,
    placed: Layout,
    held: Mapping[tuple[int, int], tuple[str, Tensors]],
    known: Mapping[str, Any],
) -> Iterator[tuple[str, Part]]:
    """The weights of one chunk of one stage, whole, under the names in its files."""
    rules = Rules("megatron", held[0, 0][1], **known)
    first_expert: dict[str, int] = {}
    for expert in range(placed.expert):
        ranks = [held[tensor, expert] for tensor in range(placed.tensor)]
        merger.require_same_names(ranks)
        if expert:
            merger.require_same_names([held[0, 0], ranks[0]])
        count = _counts(ranks[0][1], _EXPERT)
        for name in merger.weights(ranks[0][1]):
            number = _EXPERT.fullmatch(name)
            if number is None and expert:
                continue  # everything else is a copy of what expert rank 0 has
            if _GROUPED.fullmatch(name) and len(held) > 1:
                raise RefusedCheckpoint(
                    f"{name!r} in {ranks[0][0]} ({merger.where}) holds many experts in one matrix "
                    "that is divided over ranks, which is not put together. Save it with Megatron "
                    "as torch_dist (--ckpt-format torch_dist), and start from that."
                )
            parts = []
            for tensor, (file, tensors) in enumerate(ranks):
                stored = tensors[name]
                if number is None and placed.expert > 1:
                    copies = [
                        Part(held[tensor, e][0], held[tensor, e][1][name])
                        for e in range(placed.expert)
                    ]
                    stored = merger.combined(f"{name} (tensor rank {tensor})", copies, SAME)
                parts.append(Part(file, stored))
            whole = Part(ranks[0][0], merger.whole(name, parts, rules, name))
            moved_by = 0 if number is None else first_expert.get(_stem(number), 0)
            yield name if number is None else _moved(number, moved_by), whole
        for stem, length in count.items():
            first_expert[stem] = first_expert.get(stem, 0) + length


def _offsets(where: str, held: tuple[str, Tensors], first: dict[str, int]) -> dict[str, int]:
    """By how much each kind of layer of a chunk is moved; ``first`` is where the next begins."""
    file, tensors = held
    offsets = {}
    lowest: dict[str, int] = {}
    for name in tensors:
        if number := _LAYER.fullmatch(name):
            value = int(number["number"])
            lowest[number["stem"]] = min(value, lowest.get(number["stem"], value))
    for stem, length in _counts(tensors, _LAYER).items():
        if _OWN_NUMBERS.fullmatch(stem):
            continue
        before = first.get(stem, 0)
        if lowest[stem] == 0:
            offsets[stem] = before
            first[stem] = before + length
        elif lowest[stem] == before:  # a writer that counts through all stages
            first[stem] = length
        else:
            raise CorruptCheckpoint(
                f"{file} in {where} numbers {stem}* from {lowest[stem]} on, but a stage counts "
                f"from 0, or from {before} on if the stages before it are counted. Fetch or write "
                "it again."
            )
    return offsets


def _counts(tensors: Tensors, pattern: re.Pattern[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in tensors:
        if (found := pattern.fullmatch(name)) and tensors[name].kind == "weight":
            stem = _stem(found)
            number = int(found["number"] or found["number2"])
            counts[stem] = max(counts.get(stem, 0), number + 1)
    return counts


def _stem(found: re.Match[str]) -> str:
    groups = found.groupdict()
    return groups["stem"] or groups["stem2"] or ""


def _moved(found: re.Match[str], by: int) -> str:
    groups = found.groupdict()
    number = int(groups["number"] or groups["number2"]) + by
    return f"{_stem(found)}{number}{groups.get('rest') or ''}"


def _renumbered(name: str, offsets: Mapping[str, int]) -> str:
    found = _LAYER.fullmatch(name)
    return name if found is None else _moved(found, offsets.get(found["stem"], 0))


def _by_chunk(rank: Rank) -> dict[int, dict[str, StoredTensor]]:
    """The weights of a rank by chunk of the virtual pipeline; one chunk if there is none."""
    weights = {name: tensor for name, tensor in rank.tensors.items() if tensor.kind == "weight"}
    numbered = {name: found for name in weights if (found := _CHUNK.fullmatch(name))}
    if not numbered or len(numbered) < len(weights):
        return {0: weights}
    chunks: dict[int, dict[str, StoredTensor]] = {}
    for name, found in numbered.items():
        chunks.setdefault(int(found[1]), {})[found[2]] = weights[name]
    return chunks


def _second_is_expert(ranks: Sequence[Rank], said: Mapping[str, int]) -> bool:
    """Whether ``mp_rank_TT_NNN`` counts expert ranks: there is no pipeline then."""
    if "pipeline" in said:
        return said["pipeline"] == 1 and said.get("expert", 1) > 1
    # Two stages differ in their names, since only the first has the embedding.
    same = all(rank.tensors.keys() == ranks[0].tensors.keys() for rank in ranks)
    return same and len(ranks) > 1 and any(map(_EXPERT.fullmatch, ranks[0].tensors))


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    tensors, stages, experts = sizes
    for tensor in range(tensors):
        for stage in range(stages):
            for expert in range(experts):
                yield tensor, stage, expert


def _file(like: Rank, place: tuple[int, int, int], is_expert: bool) -> str:
    """The file of the rank at ``place``, named like that of another."""
    folder, _, file = like.file.partition("/")
    tensor, stage, expert = place
    if folder.startswith("tp_rank"):
        return f"tp_rank_{tensor:02d}_pp_rank_{stage:03d}/{file}"
    numbers = [expert] if is_expert else [stage, expert][: len(like.numbers) - 1]
    return "_".join([f"mp_rank_{tensor:02d}", *(f"{n:03d}" for n in numbers)]) + f"/{file}"
