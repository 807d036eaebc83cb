"""Safetensors files that torch's distributed checkpoint writes for the hub, one per rank."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.hostile.corpus import Group
from tests.hostile.craft import EXABYTE, entry, safetensors

GROUP = Group("hf_dcp")


def part(rank: int, of: int = 2) -> str:
    return f"shard-{rank:05d}-model-{1:05d}-of-{1:05d}.safetensors" if of else ""


def image(
    offsets: Any, shape: tuple[int, ...] = (2, 4), dtype: str = "F32", name: str = "a"
) -> bytes:
    """A file with one tensor that begins at ``offsets`` of the whole."""
    size = torch.Size(shape).numel() * 4
    note = offsets if isinstance(offsets, str) else json.dumps({name: {"saved_offsets": offsets}})
    said = {"DCP_SHARDING_INFO": note, "DCP_VERSION": "1.0", "format": "pt"}
    return safetensors({"__metadata__": said, name: entry(0, size, shape, dtype)}, bytes(size))


def files(name: str, *images: bytes, **said: Any) -> None:
    def make(folder: Path) -> None:
        for rank, data in enumerate(images, 1):
            (folder / part(rank)).write_bytes(data)

    GROUP.add(name, make, **{"file": "", "says": "'a'|shard-0", **said})


ZERO, TWO = image([0, 0]), image([2, 0])
files("parts_overlap", ZERO, image([1, 0]))
files("parts_are_the_same", ZERO, ZERO)
files("parts_leave_a_gap", ZERO, image([3, 0]))
files("a_part_is_an_exabyte_away", ZERO, image([EXABYTE, 0]))
files("a_part_overflows", ZERO, image([(1 << 63) - 1, 0]))
files("the_first_part_is_missing", TWO)
files("parts_have_other_dtypes", ZERO, image([2, 0], dtype="I32"))
files("parts_have_other_dims", ZERO, image([2], (8,)))
files("offsets_have_other_dims", ZERO, image([2]))
files("offsets_are_negative", ZERO, image([-2, 0]))
files("offsets_are_text", ZERO, image(["2", "0"]))
files("offsets_are_a_dict", ZERO, image({"x": 1}))
files("offsets_are_missing", ZERO, image('{"a": {}}'))
files("offsets_are_of_another_tensor", ZERO, image('{"b": {"saved_offsets": [2, 0]}}'))
files("note_is_no_json", ZERO, image("{"))
files("note_is_a_list", ZERO, image("[1, 2]"))
files("note_is_nested_100000_deep", ZERO, image("[" * 100_000))
files("note_is_a_number_of_5000_digits", ZERO, image([int("9" * 4000), 0]))
files("a_part_is_cut", ZERO, TWO[:-1])
files("a_part_is_empty", ZERO, b"")
files("a_part_is_garbage", ZERO, b"x" * 100)


@GROUP.bad(errors="CorruptCheckpoint|UnfinishedCheckpoint", says="shard-0")
def a_part_of_a_rank_is_missing(folder):
    for number in (1, 3):
        name = f"shard-00001-model-{number:05d}-of-00003.safetensors"
        (folder / name).write_bytes(image([0, 0], name=f"t{number}"))


@GROUP.good()
def two_ranks(folder):
    (folder / part(1)).write_bytes(ZERO)
    (folder / part(2)).write_bytes(TWO)
    return {"a": torch.zeros(4, 4)}
