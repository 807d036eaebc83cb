"""Directories of several files, and the index that says which file holds which tensor."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.corpus import ANY, REFUSED, Group, Target
from tests.hostile.craft import STATE, saved

GROUP = Group("sharded")
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PARTS = {FIRST: {"a": torch.ones(2)}, SECOND: {"b": torch.zeros(3)}}
WHOLE = {name: tensor for part in PARTS.values() for name, tensor in part.items()}
PLACED = {"a": FIRST, "b": SECOND}


def write(folder: Path, index: object = None, parts: dict[str, dict] = PARTS) -> None:
    for name, part in parts.items():
        save_file(part, folder / name)
    held = {"metadata": {"total_size": 20}, "weight_map": PLACED} if index is None else index
    text = held if isinstance(held, bytes) else json.dumps(held).encode()
    (folder / INDEX).write_bytes(text)


def placed(name: str, index: object, **said: object) -> None:
    """A case of a good pair of files with this index."""
    said = {"file": INDEX, **said}
    GROUP.add(name, lambda folder: write(folder, index), **said)


def leads(name: str, where: str, **said: object) -> None:
    """A case of an index that sends the reader to ``where``, and of a good file that lies there."""

    def make(folder: Path) -> None:
        write(folder, {"weight_map": {**PLACED, "c": where}})
        for place in (folder.parent / "secret.safetensors", folder.parent / "ckpt2"):
            save_file({"c": torch.ones(1)}, place)

    GROUP.add(name, make, **{"file": "", "says": "secret|ckpt", **said})


leads("name_leads_up", "../secret.safetensors", errors=REFUSED)
leads("name_leads_up_from_inside", "x/../../secret.safetensors", errors=REFUSED)
leads("name_leads_up_and_back", "../ckpt/model-00001-of-00002.safetensors", errors=REFUSED)
leads("name_is_absolute", "/etc/secret.safetensors", errors=REFUSED)
leads("name_has_a_nul", "secret\0.safetensors", errors=REFUSED)
leads("name_has_backslashes", "..\\secret.safetensors")
leads("name_has_a_newline", "secret\n.safetensors")
leads("name_is_half_a_character", "secret\ud800.safetensors", errors=REFUSED)
leads("name_has_an_escape_sequence", "secret\x1b[2J.safetensors")
leads("name_is_long", "secret" * 2000)
leads("name_is_a_home", "~/secret.safetensors")
leads("name_is_the_folder", ".", says="ckpt", errors=REFUSED)
leads("name_is_empty", "", says="", errors=REFUSED)
leads("name_is_a_uri", "file:///etc/secret.safetensors", errors=REFUSED)

placed("index_is_a_list", [PLACED])
placed("index_is_empty", b"")
placed("index_is_no_json", b'{"weight_map": {"a"')
placed("index_is_not_utf8", b'{"weight_map": {"\xff": "x"}}')
placed("index_has_no_weight_map", {"metadata": {}})
placed("weight_map_is_a_list", {"weight_map": list(PLACED)})
placed("weight_map_is_empty", {"weight_map": {}})
placed("weight_map_holds_numbers", {"weight_map": {"a": 1, "b": 2}}, says="1")
placed(
    "weight_map_holds_a_target", {"weight_map": {"a": {"_target_": "os.system"}}}, says="_target_"
)
placed(
    "weight_map_has_a_key_twice",
    b'{"weight_map": {"a": "%s", "a": "%s"}}' % (FIRST.encode(), SECOND.encode()),
    says="a",
)
placed("weight_map_lists_what_is_not_there", {"weight_map": {**PLACED, "c": FIRST}}, says="c")
placed("weight_map_swaps_two", {"weight_map": {"a": SECOND, "b": FIRST}}, says="a|b")
placed(
    "weight_map_names_a_missing_file",
    {"weight_map": {**PLACED, "c": "gone.safetensors"}},
    says="gone",
)
placed(
    "index_is_nested_100000_deep", b'{"weight_map":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
)
placed(
    "weight_map_of_a_hundred_thousand_missing_files",
    {"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(100_000)}},
    says="f",
)


@GROUP.bad(says="'a'")
def a_tensor_stands_in_two_files(folder):
    write(folder, parts={FIRST: {"a": torch.ones(2)}, SECOND: {"a": torch.ones(2)}})
    (folder / INDEX).unlink()


@GROUP.bad(says="number 2")
def a_number_is_missing_and_there_is_no_index(folder):
    write(folder)
    (folder / INDEX).unlink()
    (folder / SECOND).unlink()


@GROUP.bad(file="-of-")
def there_should_be_a_million_files(folder):
    save_file(PARTS[FIRST], folder / "model-00001-of-999999.safetensors")


@GROUP.bad(errors="AmbiguousFormat", says="several sets")
def two_sets_of_pickles(folder):
    (folder / "one.pt").write_bytes(saved(STATE))
    (folder / "two.pt").write_bytes(saved(STATE))


@GROUP.bad(file=FIRST)
def a_shard_is_a_folder(folder):
    write(folder)
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


@GROUP.bad(file=FIRST, errors="CorruptCheckpoint|RefusedCheckpoint|StorageError")
def a_shard_links_to_itself(folder):
    write(folder)
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)


@GROUP.bad(file=FIRST, errors="CorruptCheckpoint|RefusedCheckpoint|StorageError")
def a_shard_links_to_nothing(folder):
    write(folder)
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("../gone")


@GROUP.bad(file=FIRST, errors="CorruptCheckpoint|RefusedCheckpoint|StorageError")
def a_shard_is_a_device(folder):
    write(folder)
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("/dev/zero")


@GROUP.bad(file=INDEX, says="'x'")
def the_index_leaves_out_a_tensor(folder):
    write(folder, parts={**PARTS, FIRST: {"a": torch.ones(2), "x": torch.ones(1)}})


@GROUP.bad(file=FIRST, errors=ANY)
def one_shard_is_of_another_format_and_damaged(folder):
    write(folder)
    (folder / FIRST).write_bytes(saved(PARTS[FIRST])[:-30])


@GROUP.bad(errors="RefusedCheckpoint", says="auto_map")
def it_brings_code_along(folder):
    write(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    config = {"model_type": "bert", "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))


@GROUP.good()
def as_it_should_be(folder):
    write(folder)
    return WHOLE


@GROUP.good()
def files_in_an_inner_folder(folder):
    (folder / "parts").mkdir()
    for name, part in PARTS.items():
        save_file(part, folder / "parts" / name)
    index = {"weight_map": {key: f"parts/{name}" for key, name in PLACED.items()}}
    (folder / INDEX).write_text(json.dumps(index))
    return WHOLE


@GROUP.good()
def one_shard_of_each_format(folder):
    write(folder, {"weight_map": {"a": FIRST, "b": "second.bin"}})
    (folder / SECOND).unlink()
    (folder / "second.bin").write_bytes(saved(PARTS[SECOND]))
    return WHOLE


@GROUP.good()
def pointed_at_the_index(folder):
    write(folder)
    return Target(INDEX, WHOLE)


@GROUP.good()
def pointed_at_one_shard(folder):
    write(folder)
    return Target(FIRST, WHOLE)


@GROUP.good()
def a_hub_cache_of_links(folder):
    """As huggingface_hub lays it out: names link to blobs by their hash, beside the snapshot."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    write(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(Path("..") / "blobs" / f"{number:064x}")
    return Target("", WHOLE, also=(blobs,))
