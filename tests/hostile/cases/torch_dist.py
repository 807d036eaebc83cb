"""Distributed checkpoints of torch: an index that can lie, and files that it leads to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.hostile.corpus import REFUSED, UNFINISHED, Group, Target
from tests.hostile.craft import (
    CONFIG,
    EXABYTE,
    STATE,
    SerializationFormat,
    distcp,
    edit_index,
    place_of,
    write_dcp,
)

GROUP = Group("torch_dist")
NAME = "a.weight"
INDEX = ".metadata"
BYTE = r"a\.weight|byte \d+"


def lie(name: str, change: Callable[[Any], Any], **said: Any) -> None:
    """A good checkpoint, in whose index ``change`` changes something."""

    def make(folder: Path) -> None:
        write_dcp(folder)
        edit_index(folder, change)

    GROUP.add(name, make, **{"file": INDEX, "says": "a.weight", **said})


def stated(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change what the index says of one tensor."""
    return lambda index: change(index.state_dict_metadata[NAME])


def placing(**said: Any) -> Callable[[Any], Any]:
    """Change where the index says that one tensor lies."""

    def change(index: Any) -> None:
        for key, value in said.items():
            setattr(place_of(index, NAME), key, value)

    return change


def shape(*sizes: Any, chunks: Any = ...) -> Callable[[Any], Any]:
    def change(held: Any) -> None:
        held.size = tuple(sizes)
        if chunks is ...:
            held.chunks = [ChunkStorageMetadata((0,) * len(sizes), tuple(sizes))]
        else:
            held.chunks = [ChunkStorageMetadata(*chunk) for chunk in chunks]

    return stated(change)


def cut(*chunks: Any) -> Callable[[Any], Any]:
    """Say that the tensor, of shape (3, 4), consists of these chunks, all at one place."""

    def change(index: Any) -> None:
        held = index.state_dict_metadata[NAME]
        held.chunks = [ChunkStorageMetadata(*map(torch.Size, chunk)) for chunk in chunks]
        place = place_of(index, NAME)
        for key in [key for key in index.storage_data if key.fqn == NAME]:
            del index.storage_data[key]
        for at, _ in chunks:
            index.storage_data[MetadataIndex(NAME, torch.Size(at))] = place

    return change


class Odd:
    """A class that pickles by its name."""


lie("chunks_overlap", cut(((0, 0), (2, 4)), ((1, 0), (2, 4))), says="overlap|item")
lie(
    "chunks_overlap_in_a_pinwheel",
    cut(((0, 0), (1, 3)), ((0, 3), (2, 1)), ((2, 1), (1, 3)), ((1, 0), (2, 1)), ((0, 0), (2, 2))),
)
lie("chunks_leave_a_hole", cut(((0, 0), (1, 4)), ((2, 0), (1, 4))))
lie(
    "chunks_leave_a_hole_in_the_middle",
    cut(((0, 0), (1, 3)), ((0, 3), (2, 1)), ((2, 1), (1, 3)), ((1, 0), (2, 1))),
)
lie("chunk_stands_twice", cut(((0, 0), (3, 4)), ((0, 0), (3, 4))))
lie("chunk_lies_outside", cut(((0, 0), (4, 4))))
lie("chunk_lies_far_outside", cut(((0, 0), (3, 4)), ((EXABYTE, 0), (3, 4))))
lie("chunk_has_other_dims", cut(((0,), (12,))))
lie("no_chunks", stated(lambda held: held.chunks.clear()))
lie(
    "chunks_of_a_size_that_the_item_has_not",
    cut(((0, 0), (3, 2)), ((0, 2), (3, 2))),
    file=".distcp",
)
lie(
    "a_hundred_thousand_equal_chunks",
    lambda index: index.state_dict_metadata[NAME].chunks.extend(
        [index.state_dict_metadata[NAME].chunks[0]] * 100_000
    ),
)
lie(
    "twenty_thousand_chunks_in_a_staircase",
    cut(*(((i, i), (20_000 - i, 20_000 - i)) for i in range(0, 20_000, 10))),
)
lie("chunks_are_a_dict", stated(lambda held: setattr(held, "chunks", {})))
lie("chunks_are_text", stated(lambda held: setattr(held, "chunks", "x")))
lie("offsets_are_negative", stated(lambda h: setattr(h.chunks[0], "offsets", (-1, 0))))
lie("offsets_are_missing", stated(lambda h: delattr(h.chunks[0], "offsets")))
lie("sizes_are_floats", shape(3.0, 4.0))
lie("shape_is_negative", shape(-3, -4))
lie("shape_is_an_exabyte", shape(EXABYTE, 4))
lie("shape_is_an_exabyte_without_chunks", shape(EXABYTE, chunks=()))
lie("shape_has_10_to_the_5_dims", shape(*(1,) * 100_000))
lie("shape_overflows", shape(1 << 40, 1 << 40))
lie("shape_of_a_thousand_digits", shape(10**1000))
lie("shape_is_not_that_of_the_item", shape(4, 3), file=".distcp")
lie("dtype_is_missing", stated(lambda held: setattr(held, "properties", None)))
lie("dtype_is_text", stated(lambda held: setattr(held.properties, "dtype", "float32")))
lie("dtype_is_unknown", stated(lambda held: setattr(held.properties, "dtype", Odd)))
lie(
    "dtype_is_not_that_of_the_item",
    stated(lambda held: setattr(held, "properties", TensorProperties(torch.int32))),
    file=".distcp",
)
lie("entry_is_a_number", lambda index: index.state_dict_metadata.__setitem__(NAME, 3))
lie("entry_is_another_class", lambda i: i.state_dict_metadata.__setitem__(NAME, Odd()))
lie("name_is_a_number", lambda i: i.state_dict_metadata.__setitem__(7, Odd()), says="int")
lie("names_are_a_list", lambda i: setattr(i, "state_dict_metadata", []), says="list")
lie("places_are_missing", lambda index: delattr(index, "storage_data"), says="storage_data")
lie("places_are_empty", lambda index: index.storage_data.clear())
lie("places_are_text", lambda i: setattr(i, "storage_data", "x"), says="str")
lie("index_is_a_dict", lambda index: {"state_dict_metadata": {}}, says="dict")
lie("index_holds_itself", lambda i: i.state_dict_metadata.__setitem__(NAME, i))
lie("chunk_holds_itself", stated(lambda h: setattr(h.chunks[0], "sizes", h)))
lie(
    "path_leads_up",
    placing(relative_path="../secret.distcp"),
    file="secret",
    errors=REFUSED,
    says="",
)
lie(
    "path_is_absolute", placing(relative_path="/etc/passwd"), file="passwd", errors=REFUSED, says=""
)
lie("path_has_a_nul", placing(relative_path="__0_0.distcp\0"), file="", errors=REFUSED, says="0_0")
lie("path_has_backslashes", placing(relative_path="..\\secret.distcp"), file="", says="secret")
lie("path_has_a_newline", placing(relative_path="__0_0.distcp\n"), file="", says="0_0")
lie("path_is_a_number", placing(relative_path=3), says="text|storage_data")
lie("path_is_empty", placing(relative_path=""), file="", errors=REFUSED, says="ckpt")
lie("path_is_the_index_itself", placing(relative_path=INDEX))
lie("offset_is_negative", placing(offset=-1), says="place|storage_data")
lie("offset_is_beyond", placing(offset=1 << 40), file=".distcp")
lie("offset_is_between_items", placing(offset=7), file=".distcp", says=BYTE)
lie("offset_is_a_fraction", placing(offset=0.0), says="place|storage_data")
lie("length_is_an_exabyte", placing(length=EXABYTE), file=".distcp", says=BYTE)
lie("length_is_zero", placing(length=0), file=".distcp")
lie(
    "length_is_short_by_one",
    lambda i: setattr(place_of(i, NAME), "length", place_of(i, NAME).length - 1),
    file=".distcp",
)
lie(
    "length_covers_two_items",
    lambda i: setattr(place_of(i, NAME), "length", 2 * place_of(i, NAME).length),
    file=".distcp",
    says=BYTE,
)
lie(
    "item_of_another_tensor",
    lambda i: setattr(place_of(i, NAME), "offset", place_of(i, "b.weight").offset),
    file=".distcp",
)
lie(
    "went_through_a_codec",
    placing(transform_descriptors=("evil.Codec",)),
    file=".distcp",
    errors=REFUSED,
    says="evil.Codec",
)
lie(
    "places_of_twenty_thousand_files",
    lambda index: index.storage_data.update(
        {
            MetadataIndex(f"t{i}", torch.Size([0])): type(place_of(index, NAME))(
                f"f{i}.distcp", 0, 1
            )
            for i in range(20_000)
        }
    ),
    file="distcp",
    says="20000|20001",
    errors=UNFINISHED,
)


@GROUP.bad(file=INDEX, says="a.weight|dims|shape")
def a_tensor_of_10_to_the_18_chunks_of_nothing(folder):
    write_dcp(folder)
    chunk = ChunkStorageMetadata((0, 0), (0, 4))
    held = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([3, 4]), [chunk] * 50)
    edit_index(folder, lambda index: index.state_dict_metadata.__setitem__(NAME, held))


@GROUP.bad(errors=UNFINISHED, says="__0_0|distcp")
def the_files_are_missing(folder):
    write_dcp(folder)
    distcp(folder).unlink()


@GROUP.bad(errors=UNFINISHED, file=INDEX)
def the_index_is_missing(folder):
    write_dcp(folder)
    (folder / INDEX).unlink()


@GROUP.bad(errors=UNFINISHED, file="metadata.json")
def the_last_file_is_missing(folder):
    write_dcp(folder, common={})
    (folder / "metadata.json").unlink()


@GROUP.bad(errors=UNFINISHED, file="common.pt")
def the_first_file_is_missing(folder):
    write_dcp(folder, common={})
    (folder / "common.pt").unlink()


@GROUP.bad(errors=UNFINISHED, says="ckpt-unfinished")
def a_marker_says_that_it_was_never_finished(folder):
    write_dcp(folder / "weights", common={})
    folder.with_name("ckpt-unfinished").touch()


def config(name: str, content: object, **said: Any) -> None:
    def make(folder: Path) -> None:
        write_dcp(folder, common={})
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "metadata.json").write_bytes(text)

    GROUP.add(name, make, **{"file": "metadata.json", **said})


config("config_is_a_list", [1])
config("config_is_empty", b"")
config(
    "config_has_a_key_twice",
    b'{"sharded_backend": "torch_dist", "sharded_backend": "zarr"}',
    says="twice",
)
config("config_is_of_a_newer_version", {**CONFIG, "sharded_backend_version": 99}, errors=REFUSED)
config(
    "config_names_another_backend",
    {**CONFIG, "sharded_backend": "evil.module"},
    errors=REFUSED,
    says="evil",
)
config("config_has_a_target", {**CONFIG, "_target_": "os.system"}, kind="inert")
config("config_is_nested_100000_deep", b"[" * 100_000)


@GROUP.bad(file=".distcp", says="a.weight")
def a_link_to_a_file_of_another_length(folder):
    write_dcp(folder)
    file = distcp(folder)
    short = folder.parent / "short"
    short.write_bytes(file.read_bytes()[:100])
    file.unlink()
    file.symlink_to(short)
    return Target(also=(short,))


@GROUP.good()
def as_megatron_writes_it(folder):
    write_dcp(folder / "weights", common={"iteration": 3, "args": {"a": 1}})
    return STATE


@GROUP.good()
def strides_offsets_zero_size_and_scalar(folder):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "turned": base.T,
        "part": base[1:3, 2:4],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True, False]),
    }
    write_dcp(folder, state)
    return state


@GROUP.good()
def objects_are_listed_and_never_read(folder):
    write_dcp(folder, {**STATE, "x._extra_state/shard_0_1": b"", "y": {"z": [1, 2]}})
    return STATE


@GROUP.good()
def the_safetensors_serialization(folder):
    write_dcp(folder, kind=SerializationFormat.SAFETENSORS)
    return STATE


@GROUP.good()
def optimizer_state_that_is_nonsense_is_no_weight(folder):
    """Nobody starts from it, so it stays listed as unreadable, and the weights are read."""
    write_dcp(folder, {**STATE, "optimizer.state.exp_avg.a": torch.ones(2)})
    edit_index(
        folder,
        lambda index: index.state_dict_metadata["optimizer.state.exp_avg.a"].chunks.clear(),
    )
    return STATE


@GROUP.bad(file="", says="safetensors|holds weights|more than one")
def weights_beside_weights(folder):
    write_dcp(folder / "weights", common={})
    save_file(STATE, folder / "model.safetensors")


GROUP.cases[-1] = type(GROUP.cases[-1])(**{**vars(GROUP.cases[-1]), "errors": "AmbiguousFormat"})
assert Metadata
