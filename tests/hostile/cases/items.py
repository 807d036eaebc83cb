"""The files of a distributed checkpoint: items that are not what the index says."""

from pathlib import Path
from typing import Any

import torch

from tests.hostile.corpus import DAMAGED, REFUSED, Group
from tests.hostile.craft import (
    EXABYTE,
    SerializationFormat,
    archive,
    distcp,
    edit_index,
    entry,
    pickled,
    place_of,
    safetensors,
    saved,
    storage,
    tensor,
    write_dcp,
)

GROUP = Group("items")
NAME = "a.weight"


def items(name: str, image: bytes, **said: Any) -> None:
    """A good checkpoint, of which one item is replaced by ``image``."""

    def make(folder: Path) -> None:
        write_dcp(folder)
        file = distcp(folder)
        place_at = file.stat().st_size

        def change(index: Any) -> None:
            place = place_of(index, NAME)
            place.offset, place.length = place_at, len(image)

        edit_index(folder, change)
        with file.open("ab") as stream:
            stream.write(image)

    GROUP.add(name, make, **{"file": ".distcp", "says": "a.weight", **said})


HELD = {"0": bytes(48)}
AS_IT_IS = tensor(storage(numel=12), 0, (3, 4), (4, 1))
items("item_is_a_list", archive(pickled([AS_IT_IS]), HELD))
items("item_is_of_two_tensors", archive(pickled((AS_IT_IS, AS_IT_IS)), HELD))
items("item_lacks_its_storage", archive(pickled(AS_IT_IS)))
items("item_has_a_short_storage", archive(pickled(AS_IT_IS), {"0": bytes(47)}))
items("item_reaches_beyond", archive(pickled(tensor(storage(numel=12), 1, (3, 4), (4, 1))), HELD))
items("item_is_compressed", archive(pickled(AS_IT_IS), HELD, method=8), errors=REFUSED)
items("item_has_two_pickles", archive(pickled(AS_IT_IS), HELD, extra=[("b/data.pkl", b".")]))
items("item_is_a_tar", b"\0" * 2048)
items("item_is_a_legacy_file", saved(torch.ones(3, 4), old=True))
items(
    "item_is_big_endian",
    archive(pickled(AS_IT_IS), HELD).replace(b"little", b"bigger"),
    errors=DAMAGED + "|" + REFUSED,
)


def image(name: str, data: bytes, **said: Any) -> None:
    """A checkpoint of DCP's safetensors serialization, of which the file is ``data``."""

    def make(folder: Path) -> None:
        write_dcp(folder, {"a": torch.ones(2)}, kind=SerializationFormat.SAFETENSORS)
        distcp(folder).write_bytes(data)

    GROUP.add(name, make, **{"file": ".distcp", **said})


image("image_is_cut", safetensors({"a": entry(0, 8, (2,))}, bytes(7)))
image("image_lacks_the_tensor", safetensors({"b": entry(0, 8, (2,))}, bytes(8)), says="'a'")
image("image_has_another_dtype", safetensors({"a": entry(0, 8, (2,), "I32")}, bytes(8)), says="'a'")
image("image_has_another_shape", safetensors({"a": entry(0, 12, (3,))}, bytes(12)), says="'a'")
image("image_claims_an_exabyte", safetensors({"a": entry(0, 8, (2,))}, length=EXABYTE))
image("image_overlaps", safetensors({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, bytes(12)))
NOTED = {"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [9]}}'}}
image(
    "image_is_of_another_chunk",
    safetensors({**NOTED, "a": entry(0, 8, (2,))}, bytes(8)),
    says="'a'",
)
NONSENSE = {"__metadata__": {"DCP_SHARDING_INFO": "[" * 100_000}}
image("image_has_a_note_of_nonsense", safetensors({**NONSENSE, "a": entry(0, 8, (2,))}, bytes(8)))
